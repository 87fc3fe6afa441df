"""Reading a training corpus: text, JSON lines and Parquet, packed or not, as a stream of pieces of documents.

In: paths of files and folders. Out: pieces of at most some 270,000 characters, and the problems met on the way. Never:
a whole file, a whole line or a whole unpacked archive in memory; a file that is left out without a word.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Final

import zstandard

from pipeline.errors import InvalidInput, Problem
from pipeline.files import open_regular, unreadable
from pipeline.longjson import long_text, no_text
from pipeline.unpacking import READ_BYTES, unpacked

PIECE_CHARS: Final = 1 << 18
"""Characters of a piece: large enough that its cost is that of its text, small enough for the cache."""
OVERLAP_CHARS: Final = 1 << 12
"""What a piece shows of the next one, so that every shingle lies whole in one piece; ten words of 400 characters."""
LONG_LINE_BYTES: Final = 1 << 22
"""A JSON line longer than this is read in a stream; the others as a whole, which is faster, but a line of ``{},{},``
takes thirty times its size."""
BATCH_ROWS: Final = 16
"""Parquet rows in memory together. A dictionary of one long value, which every row names, is a file of some kilobytes:
what a batch takes can be bounded by its rows alone. Larger batches are hardly faster."""
NO_TEXT_SHARE: Final = 0.1
"""Share of NUL and replaced characters from which a file is not UTF-8: English in UTF-16 has half of them, Russian in
a one-byte encoding four fifths, French in Latin-1 one in thirty."""
LONGEST_NAME: Final = 200
"""Characters that are kept of a document's id."""

_KINDS = (".txt", ".jsonl", ".parquet")
_PACKINGS = ("", ".gz", ".zst")
SUFFIXES: Final = tuple(kind + packing for kind in _KINDS for packing in _PACKINGS)
"""Names of files that are read, in lower case."""

_CUT = re.compile("(?<=[^\\s\\-\u2010\u00ad])\\s")
"""White space where words end for certain: after a hyphen a word might go on in the next line."""


@dataclass(frozen=True)
class CorpusFile:
    """A file to read.

    Attributes:
        path: Where.
        size: Bytes as stored.
        modified: When it was last changed, in nanoseconds.
    """

    path: Path
    size: int
    modified: int


@dataclass(frozen=True)
class Piece:
    """A stretch of a document.

    Attributes:
        file: Place of the file in the corpus.
        document: Number of the document in its file, from 1: line or row; blank lines count.
        name: The document's id, where the file gives one.
        start: Characters of the document in front of this piece.
        text: The piece, and the beginning of the next one.
        keep: Characters of ``text`` that are this piece's own.
        last: Whether the document ends here.
    """

    file: int
    document: int
    name: str | None
    start: int
    text: str
    keep: int
    last: bool

    @property
    def whole(self) -> bool:
        """Whether this is the whole document."""
        return self.last and not self.start


# --- which files ------------------------------------------------------------------------------------------


def corpus_files(paths: Sequence[Path], leave_out: Sequence[Path] = ()) -> tuple[list[CorpusFile], list[Problem], int]:
    """The files of a corpus, each once however often it is named or linked, in order of their paths.

    Args:
        paths: Files and folders; folders are walked, links to folders followed once.
        leave_out: Files that are not part of it, such as the one being written.

    Returns:
        The files, folders that could not be read, and how many files in folders have other names than `SUFFIXES`.

    Raises:
        InvalidInput: A path is missing, or is neither a folder nor a file of a known name; all are listed.
    """
    wrong = [problem for path in paths if (problem := _unusable(path))]
    if wrong:
        raise InvalidInput(wrong)
    seen = {(found.st_dev, found.st_ino) for path in leave_out if (found := _stat(path))}
    files: list[CorpusFile] = []
    problems: list[Problem] = []
    others = 0
    waiting = sorted(set(paths), reverse=True)
    while waiting:
        path = waiting.pop()
        found = _stat(path)
        if found is None or (found.st_dev, found.st_ino) in seen:
            continue
        seen.add((found.st_dev, found.st_ino))
        if stat.S_ISDIR(found.st_mode):
            try:
                waiting.extend(sorted(path.iterdir(), reverse=True))
            except OSError as error:
                problems.append(_unread(path, error.strerror or str(error)))
        elif stat.S_ISREG(found.st_mode) and path.name.lower().endswith(SUFFIXES):
            files.append(CorpusFile(path, found.st_size, found.st_mtime_ns))
        else:
            others += 1
    return files, problems, others


def _stat(path: Path) -> os.stat_result | None:
    """What a path leads to; None for a link into nothing, or to itself."""
    try:
        return path.stat()
    except OSError:
        return None


def _unusable(path: Path) -> Problem | None:
    found = _stat(path)
    if found is None:
        return Problem(str(path), "is missing or cannot be reached", "Name files or folders that are there.")
    known = stat.S_ISREG(found.st_mode) and path.name.lower().endswith(SUFFIXES)
    if stat.S_ISDIR(found.st_mode) or known:
        return None
    return Problem(
        str(path), "is no kind of file that can be read", f"Name folders, or files in {', '.join(SUFFIXES)}."
    )


# --- documents --------------------------------------------------------------------------------------------


def read_file(number: int, file: CorpusFile, field: str, tell: Callable[[int], None]) -> Iterator[Piece | Problem]:
    """The documents of a file, piece by piece, and what is wrong with it.

    A broken line or row is a problem, and the next one goes on; what breaks the file ends it, and the document that
    was being read. Bytes that are not UTF-8 come out as U+FFFD; text files may be UTF-16 or UTF-32 with their mark.
    A file that is not as it was listed is read, and a problem.

    Args:
        number: Place of the file in the corpus.
        file: The file.
        field: Name of the field that holds the text, in JSON and Parquet.
        tell: Called with the number of stored bytes read so far.

    Yields:
        Pieces in order of the text, the last one of each document marked; problems where they are met.
    """
    name = file.path.name.lower()
    packing = next((end for end in _PACKINGS if end and name.endswith(end)), "")
    documents = _READERS[Path(name.removesuffix(packing)).suffix]
    try:
        with open_regular(file.path) as stored:
            with unpacked(stored, packing, documents is _parquet, tell) as reader:
                for document in documents(reader, field):
                    if isinstance(document, str):
                        yield _unread(file.path, document)
                    else:
                        yield from _pieces_of(number, file.path, document)
            found = os.fstat(stored.fileno())
            if (found.st_size, found.st_mtime_ns) != (file.size, file.modified):
                yield _unread(file.path, "was changed after the search began")
    except (ValueError, *_FILE_ERRORS) as error:
        yield _unread(file.path, _reason(error))


@dataclass(frozen=True)
class _Document:
    """A document as its format gives it: its number, its id, and its text in chunks of any size."""

    number: int
    name: str | None
    chunks: Iterable[str]


def _pieces_of(file: int, path: Path, document: _Document) -> Iterator[Piece | Problem]:
    """The pieces of one document, up to where it breaks off."""
    broken: list[Exception] = []

    def readable() -> Iterator[str]:
        try:
            yield from document.chunks
        except (ValueError, *_FILE_ERRORS) as error:
            broken.append(error)

    for start, text, keep, last in cut(readable()):
        yield Piece(file, document.number, document.name, start, text, keep, last)
    for error in broken:
        if not isinstance(error, ValueError):
            raise error
        yield _unread(path, f"document {document.number}: {_reason(error)}")


def cut(chunks: Iterable[str]) -> Iterator[tuple[int, str, int, bool]]:
    """Cut a document into pieces; where it is cut depends on its text alone, not on the chunks it comes in.

    Law: the pieces' own characters, put together, are the document; the words of a piece that begin among its own
    characters are the document's words there (a run of 4,096 characters without white space may be cut inside a word).

    Yields:
        Characters in front, text, characters of it that are the piece's own, whether the document ends here.
    """
    start, waiting = 0, ""
    for chunk in chunks:
        waiting += chunk
        while len(waiting) > PIECE_CHARS + OVERLAP_CHARS:
            keep = _cut_at(waiting)
            yield start, waiting[: keep + OVERLAP_CHARS], keep, False
            start, waiting = start + keep, waiting[keep:]
    yield start, waiting, len(waiting), True


def _cut_at(text: str) -> int:
    """Where a text of more than `PIECE_CHARS` is cut: at the last certain end of a word among the last characters."""
    at = PIECE_CHARS
    for found in _CUT.finditer(text, PIECE_CHARS - OVERLAP_CHARS, PIECE_CHARS):
        at = found.start()
    return at


# --- formats ----------------------------------------------------------------------------------------------


_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),  # the mark of UTF-16 is the beginning of one
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip


def _plain_text(reader: BinaryIO, field: str) -> Iterator[_Document | str]:
    """The file is one document."""
    first = reader.read(READ_BYTES)
    encoding = next((name for mark, name in _MARKS if first.startswith(mark)), "utf-8")
    text = first.decode(encoding, "replace")
    if text.count("\0") + text.count("\ufffd") > NO_TEXT_SHARE * len(text):
        yield "is not text in UTF-8, nor in UTF-16 with its mark; convert it"
        return
    yield _Document(1, None, _decoded(chain((first,), iter(lambda: reader.read(READ_BYTES), b"")), encoding))


def _decoded(blocks: Iterable[bytes], encoding: str = "utf-8") -> Iterator[str]:
    """Bytes as text."""
    decoder = codecs.getincrementaldecoder(encoding)("replace")
    for block in blocks:
        yield decoder.decode(block)
    yield decoder.decode(b"", final=True)


def _json_lines(reader: BinaryIO, field: str) -> Iterator[_Document | str]:
    """A document is a line, an object with a field that holds the text."""
    for number, line in enumerate(_lines(reader), 1):
        if not isinstance(line, bytes):
            yield _Document(number, None, long_text(_decoded(line), field))
        elif line.strip():
            try:
                tree = json.loads(line.decode("utf-8", "replace").lstrip("\ufeff"), object_pairs_hook=_Members)
            except (ValueError, RecursionError) as error:
                yield f"document {number}: {_reason(error)}"
                continue
            # Of a name that is there twice other readers take the first, or the last: neither may go unsearched.
            values = [value for name, value in tree if name == field] if isinstance(tree, _Members) else []
            if len(values) == 1 and isinstance(values[0], str | None):
                yield _Document(number, _named(dict(tree).get("id")), (values[0] or "",))
            else:
                yield f"document {number}: {no_text(field, len(values))}"


class _Members(list[tuple[str, object]]):
    """The members of a JSON object, as they are written."""


def _named(value: object) -> str | None:
    return str(value)[:LONGEST_NAME] if isinstance(value, str | int) else None


def _lines(reader: BinaryIO) -> Iterator[bytes | Iterator[bytes]]:
    """Lines; one of more than `LONG_LINE_BYTES` as an iterator over its blocks, valid until the next line is asked for.

    A block may hold ends of lines only behind its line's own, so the rest of it is kept for the next line.
    """
    waiting = b""
    while block := reader.read(READ_BYTES):
        *whole, waiting = (waiting + block).split(b"\n") if b"\n" in block else (waiting + block,)
        yield from whole
        if len(waiting) > LONG_LINE_BYTES:
            rest: list[bytes] = []
            line = _long_line(waiting, reader, rest)
            yield line
            for _ in line:  # what nobody wanted
                pass
            (waiting,) = rest
            *whole, waiting = waiting.split(b"\n")
            yield from whole
    if waiting:
        yield waiting


def _long_line(begun: bytes, reader: BinaryIO, rest: list[bytes]) -> Iterator[bytes]:
    """The blocks of a line; what comes behind its end is put into ``rest``."""
    yield begun
    while block := reader.read(READ_BYTES):
        own, end, behind = block.partition(b"\n")
        yield own
        if end:
            rest.append(behind)
            return
    rest.append(b"")


def _parquet(reader: BinaryIO, field: str) -> Iterator[_Document | str]:
    """A document is a row of one column."""
    arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    try:
        table = parquet.ParquetFile(reader, pre_buffer=False, buffer_size=READ_BYTES)
        columns = [name for name in (field, "id") if table.schema_arrow.names.count(name) == 1]
        if field not in columns:
            yield f"has not one column {field!r} (see --text-field)"
            return
        number = 0
        for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=columns, use_threads=False):
            texts = batch.column(field).cast(arrow.large_binary())
            names = batch.column("id").to_pylist() if "id" in columns else [None] * len(texts)
            for text, name in zip(texts, names, strict=True):
                number += 1
                value = text.as_buffer()
                yield _Document(number, _named(name), _decoded(_blocks(memoryview(value)) if value is not None else ()))
    except arrow.lib.ArrowException as error:
        raise ValueError(str(error)) from error


def _blocks(value: memoryview) -> Iterator[bytes]:
    for at in range(0, len(value), READ_BYTES):
        yield bytes(value[at : at + READ_BYTES])


_READERS = {".txt": _plain_text, ".jsonl": _json_lines, ".parquet": _parquet}


# --- what went wrong ------------------------------------------------------------------------------------------------

_FILE_ERRORS = (OSError, EOFError, zlib.error, zstandard.ZstdError, ImportError, MemoryError)
"""What breaks a file, beside `ValueError`."""


def _reason(error: BaseException) -> str:
    """Why something could not be read, in one short line and without its text."""
    if isinstance(error, ImportError):
        return "needs pyarrow; install it with `pip install 'takedown-pipeline[parquet]'`"
    if isinstance(error, json.JSONDecodeError):
        return f"is not JSON ({error.msg} at character {error.pos})"
    if isinstance(error, OSError) and error.strerror:
        return unreadable(error)
    if isinstance(error, RecursionError | MemoryError):
        return "is nested too deeply" if isinstance(error, RecursionError) else "asks for more memory than there is"
    return f"cannot be read ({' '.join(str(error).split())[:_LONGEST_REASON]})"


_LONGEST_REASON = 200


def _unread(path: Path, found: str) -> Problem:
    return Problem(str(path), found, "Its copies are not in the list; mend the file or leave it out on purpose.")
