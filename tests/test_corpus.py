"""Reading a corpus: every format gives the same documents, what is broken is named, and nothing is held whole."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from pipeline import corpus
from pipeline.corpus import OVERLAP_CHARS, PIECE_CHARS, SUFFIXES, CorpusFile, Piece, corpus_files, cut, read_file
from pipeline.errors import InvalidInput, Problem
from pipeline.longjson import long_text, no_text
from pipeline.normalise import words

DOCUMENTS = ["Plain words.", "", "Ünïcode, “quotes”, 漢字 and\na line break", "the last one"]


def jsonl(documents: Sequence[str]) -> bytes:
    return b"".join(json.dumps({"id": f"d{n}", "text": text}).encode() + b"\n" for n, text in enumerate(documents, 1))


def parquet(documents: Sequence[str | bytes]) -> bytes:
    arrow, files = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table(
        {"other": list(range(len(documents))), "text": documents, "id": [f"d{n}" for n in range(1, len(documents) + 1)]}
    )
    stream = io.BytesIO()
    files.write_table(table, stream)
    return stream.getvalue()


def packed(data: bytes, name: str) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(data)
    return zstandard.compress(data) if name.endswith(".zst") else data


def file_of(path: Path, data: bytes | None = None) -> CorpusFile:
    if data is not None:
        path.write_bytes(data)
    found = path.stat()
    return CorpusFile(path, found.st_size, found.st_mtime_ns)


def read(file: CorpusFile, field: str = "text") -> tuple[dict[int, str], list[str]]:
    """The documents of a file by number, and what was found wrong."""
    texts: dict[int, str] = {}
    problems, ended = [], True
    for item in read_file(0, file, field, lambda _: None):
        if isinstance(item, Problem):
            assert item.where == str(file.path)
            problems.append(item.found)
        else:
            assert ended == (item.start == 0), "a document begins when the one before has ended"
            assert item.start == len(texts.get(item.document, ""))
            texts[item.document] = texts.get(item.document, "") + item.text[: item.keep]
            ended = item.last
    assert ended
    return texts, problems


# --- which files ------------------------------------------------------------------------------------------


def test_each_file_is_found_once_however_it_is_linked(tmp_path: Path) -> None:
    deep = tmp_path / "corpus" / "deep"
    deep.mkdir(parents=True)
    for name in ("b.txt", "a.JSONL.gz", "c.md", "out.jsonl"):
        (deep / name).write_bytes(b"x")
    (deep / "loop").symlink_to(tmp_path / "corpus")
    (deep / "self").symlink_to("self")
    (deep / "nowhere.txt").symlink_to("absent")
    (deep / "again.txt").symlink_to("b.txt")
    os.link(deep / "b.txt", deep / "hard.txt")
    os.mkfifo(deep / "pipe.txt")
    found, problems, others = corpus_files([tmp_path / "corpus", deep, deep / "b.txt"], leave_out=[deep / "out.jsonl"])
    assert [file.path.name for file in found] == ["a.JSONL.gz", "again.txt"] or [file.path.name for file in found] == [
        "a.JSONL.gz",
        "b.txt",
    ]
    assert problems == []
    assert others == 2, "c.md and the pipe"


def test_a_folder_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("x")
    real = Path.iterdir

    def refused(path: Path) -> Iterator[Path]:  # root may read everything
        if path.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    with mock.patch.object(Path, "iterdir", refused):
        found, (problem,), _ = corpus_files([tmp_path])
    assert [file.path.name for file in found] == ["a.txt"]
    assert problem.where == str(tmp_path / "closed") and "Permission denied" in problem.found


def test_files_are_in_order_of_their_paths(tmp_path: Path) -> None:
    for name in ("z/1.txt", "a/2.txt", "m.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found, _, _ = corpus_files([tmp_path])
    assert [str(file.path.relative_to(tmp_path)) for file in found] == ["a/2.txt", "m.txt", "z/1.txt"]
    assert corpus_files([tmp_path / "z", tmp_path / "a"])[0] == [f for f in found if f.path.parent != tmp_path]


def test_what_cannot_be_meant_is_refused_all_at_once(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(InvalidInput) as caught:
        corpus_files([tmp_path / "absent", tmp_path / "notes.md", tmp_path / "pipe.txt", tmp_path])
    assert [Path(problem.where).name for problem in caught.value.problems] == ["absent", "notes.md", "pipe.txt"]
    assert ".parquet.zst" in str(caught.value)


# --- formats ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_gives_its_documents(tmp_path: Path, suffix: str) -> None:
    if ".txt" in suffix:
        for text in DOCUMENTS:
            assert read(file_of(tmp_path / f"a{suffix}", packed(text.encode(), suffix))) == ({1: text}, [])
        return
    data = jsonl(DOCUMENTS) if ".jsonl" in suffix else parquet(DOCUMENTS)
    file = file_of(tmp_path / f"a{suffix}", packed(data, suffix))
    assert read(file) == (dict(enumerate(DOCUMENTS, 1)), [])
    names = {item.document: item.name for item in read_file(7, file, "text", lambda _: None) if isinstance(item, Piece)}
    assert names == {n: f"d{n}" for n in range(1, len(DOCUMENTS) + 1)}
    texts, problems = read(file, "body")
    assert texts == {} and all("'body'" in problem and "--text-field" in problem for problem in problems) and problems


def test_packed_files_may_have_several_members(tmp_path: Path) -> None:
    for suffix in (".gz", ".zst"):
        data = b"".join(packed(part, suffix) for part in (b"one ", b"", b"two"))
        assert read(file_of(tmp_path / f"a.txt{suffix}", data)) == ({1: "one two"}, [])


def test_broken_lines_are_counted_and_the_others_read(tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"text": "first"}\r', b"", b"{", b'{"text": 5}', b'["text"]', b'{"text": null}', b"[" * 100_000,
        b'{"id": 9, "text": "bad \xff byte"}', b'{"text": "lone \\ud800 half"}', b'{"text": "last"}',
    ]  # fmt: skip
    texts, problems = read(file_of(tmp_path / "a.jsonl", b"\n".join(lines)))
    assert texts == {1: "first", 6: "", 8: "bad \ufffd byte", 9: "lone \ud800 half", 10: "last"}
    assert [problem.split(":")[0] for problem in problems] == [f"document {n}" for n in (3, 4, 5, 7)]
    assert "is not JSON" in problems[0] and "no text in a field 'text'" in problems[1]


def test_bytes_that_are_not_utf8_are_replaced(tmp_path: Path) -> None:
    words = "some words in front of them "
    file = file_of(tmp_path / "a.txt", words.encode() + b"one \xff\xfe two \xe2\x82")
    assert read(file) == ({1: f"{words}one \ufffd\ufffd two \ufffd"}, [])
    file = file_of(tmp_path / "a.parquet", parquet([b"one \xff two", b"three"]))
    assert read(file) == ({1: "one \ufffd two", 2: "three"}, [])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_a_text_file_with_a_mark_is_decoded_by_it(tmp_path: Path, encoding: str) -> None:
    text = "A text, long enough to be cut. Ünïcode, 漢字, 😀\n" * 100
    mark = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE, "utf-32-be": codecs.BOM_UTF32_BE}
    with mock.patch.object(corpus, "READ_BYTES", 1001):  # in the middle of a character
        texts, problems = read(file_of(tmp_path / "a.txt", mark.get(encoding, b"") + text.encode(encoding)))
    assert texts[1].removeprefix("\ufeff") == text and problems == []


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "cp1251", "shift_jis"])
def test_text_in_another_encoding_is_a_problem(tmp_path: Path, encoding: str) -> None:
    text = (
        "Ёлка, и слова по-русски. " if encoding == "cp1251" else "漢字 " if encoding == "shift_jis" else "Plain words. "
    )
    texts, (problem,) = read(file_of(tmp_path / "a.txt.gz", gzip.compress((text * 50).encode(encoding))))
    assert texts == {} and "UTF-8" in problem
    texts, problems = read(
        file_of(tmp_path / "a.txt", "Un texte français, déjà lu par beaucoup. ".encode("latin-1") * 9)
    )
    assert problems == [] and texts[1].startswith("Un texte fran\ufffdais"), "some accents are no reason not to search"


def test_a_field_that_is_there_twice_is_told(tmp_path: Path) -> None:
    twice = b'{"text": "one", "te\\u0078t": "two"}\n'
    texts, problems = read(file_of(tmp_path / "a.jsonl", twice + b'{"x": {"text": 1}, "text": "three", "x": 5}\n'))
    assert texts == {2: "three"} and problems == ["document 1: " + no_text("text", 2)]
    with mock.patch.multiple(corpus, LONG_LINE_BYTES=10, READ_BYTES=8):
        texts, (problem,) = read(file_of(tmp_path / "a.jsonl", twice))
    assert texts == {1: "one"} and no_text("text", 2) in problem


def test_a_column_that_is_there_twice_is_told(tmp_path: Path) -> None:
    arrow, files = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for names in (["text", "text", "id"], ["text", "id", "id"]):
        files.write_table(arrow.Table.from_arrays([arrow.array(["words"])] * 3, names=names), tmp_path / "a.parquet")
        texts, problems = read(file_of(tmp_path / "a.parquet"))
        assert (texts, problems) == (
            ({1: "words"}, []) if names[1] == "id" else ({}, ["has not one column 'text' (see --text-field)"])
        )


def test_a_column_that_is_no_text_is_a_problem(tmp_path: Path) -> None:
    texts, problems = read(file_of(tmp_path / "a.parquet", parquet(["a"])), "other")
    assert texts == {} and len(problems) == 1


@pytest.mark.parametrize("suffix", [s for s in SUFFIXES if s.endswith((".gz", ".zst"))])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_packed_file_cut_short_is_told(tmp_path: Path, suffix: str, share: float) -> None:
    draw = random.Random(1)
    text = " ".join(f"word{draw.randrange(10**6)}" for _ in range(60_000))
    data = parquet([text]) if ".parquet" in suffix else jsonl([text]) if ".jsonl" in suffix else text.encode()
    whole = packed(data, suffix)
    texts, problems = read(file_of(tmp_path / f"a{suffix}", whole[: int(share * len(whole))]))
    # Nothing at all is an empty text, but no Parquet.
    assert len(problems) == (1 if share or ".parquet" in suffix else 0)
    assert all(text.startswith(read_text) for read_text in texts.values())
    if share and ".txt" in suffix:
        assert len(texts[1]) > 0.4 * share * len(text), "what can be read is"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_changed_bytes_never_stop_the_reader(tmp_path: Path, suffix: str) -> None:
    text = "some words of a text that is long enough to be packed " * 40
    data = (
        parquet([text, text]) if ".parquet" in suffix else jsonl([text, text]) if ".jsonl" in suffix else text.encode()
    )
    whole = packed(data, suffix)
    draw = random.Random(2)
    for _ in range(150):
        changed = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        cut = bytes(changed[: draw.choice([len(changed), draw.randrange(len(changed))])])
        texts, problems = read(file_of(tmp_path / f"a{suffix}", cut))
        assert all(len(problem) < 300 and "\n" not in problem for problem in problems), "short lines for people"
        if suffix == ".txt":
            assert (texts, problems) == ({1: cut.decode("utf-8", "replace")}, [])


def test_a_file_that_goes_away_is_a_problem(tmp_path: Path) -> None:
    file = file_of(tmp_path / "a.txt", b"text")
    (tmp_path / "a.txt").unlink()
    texts, problems = read(file)
    assert texts == {} and problems == ["is missing"]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl.gz", ".parquet"])
def test_a_file_that_changes_meanwhile_is_read_and_told(tmp_path: Path, suffix: str) -> None:
    data = "words" if suffix == ".txt" else jsonl(["words"]) if ".jsonl" in suffix else parquet(["words"])
    file = file_of(tmp_path / f"a{suffix}", packed(data.encode() if isinstance(data, str) else data, suffix))
    os.utime(file.path, ns=(0, file.modified + 1))
    assert read(file) == ({1: "words"}, ["was changed after the search began"])


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    file = file_of(tmp_path / "a.txt", b"text")
    file.path.unlink()
    os.mkfifo(file.path)
    assert read(file) == ({}, ["is not a regular file"])


def test_parquet_without_its_library_says_what_to_install(tmp_path: Path) -> None:
    file = file_of(tmp_path / "a.parquet", parquet(["a"]))
    with mock.patch.dict(sys.modules, {"pyarrow": None}):
        texts, problems = read(file)
    assert texts == {} and "takedown-pipeline[parquet]" in problems[0]


def test_a_packed_parquet_file_that_swells_is_refused(tmp_path: Path) -> None:
    bomb = gzip.compress(bytes(100_000_000))
    texts, problems = read(file_of(tmp_path / "a.parquet.gz", bomb))
    assert texts == {} and "unpacks to more than" in problems[0]


def test_a_frame_that_asks_for_too_much_memory_is_refused(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=30, write_content_size=False)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    texts, problems = read(file_of(tmp_path / "a.txt.zst", stream.compress(b"text") + stream.flush()))
    assert len(problems) == 1 and "memory" in problems[0].lower() and set(texts.values()) <= {""}


# --- pieces -----------------------------------------------------------------------------------------------

scripts = st.text(
    alphabet=st.sampled_from("abcé -\u2010\u00ad\n\r\u200b\u0301'漢語か\u3099ก\u0e48\u0e38½ß"), max_size=400
)


@given(text=scripts, cuts=st.lists(st.integers(0, 400), max_size=5))
def test_pieces_are_the_document_and_do_not_depend_on_chunks(text: str, cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(text)]
    chunks = [text[a:b] for a, b in pairwise(edges)]
    with mock.patch.multiple(corpus, PIECE_CHARS=60, OVERLAP_CHARS=30):
        found = list(cut(chunks))
        assert found == list(cut([text]))
    assert "".join(part[:keep] for _, part, keep, _ in found) == text
    assert [last for *_, last in found] == [False] * (len(found) - 1) + [True]
    for start, part, keep, last in found:
        assert text.startswith(part, start)
        assert keep == len(part) if last else len(part) == keep + 30 and keep <= 60


@given(
    st.lists(
        st.sampled_from(["word", "naïve", "line-\n", "half- \n", "it's", "\u200b", "漢字", "½", "-", "\n\n"]),
        max_size=80,
    )
)
def test_the_words_of_pieces_are_the_words_of_the_document(parts: list[str]) -> None:
    text = " ".join(parts)
    with mock.patch.multiple(corpus, PIECE_CHARS=50, OVERLAP_CHARS=40):
        found = [
            (word.text, start + word.start, start + word.end)
            for start, part, keep, _ in cut([text])
            for word in words(part)
            if word.start < keep
        ]
    assert found == [tuple(word) for word in words(text)]


def test_pieces_of_real_size() -> None:
    text = "word " * (PIECE_CHARS // 2)
    first, *_, last = cut([text])
    assert first[0] == 0 and PIECE_CHARS - 5 <= first[2] <= PIECE_CHARS
    assert len(first[1]) == first[2] + OVERLAP_CHARS and first[1][first[2]] == " "
    assert last[3]


# --- lines that are too long to be held -------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.just("text"), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    text=st.text(
        alphabet=st.characters(codec=None, categories=None) | st.sampled_from('"\\/\n\t😀é\ud800\udc00'), max_size=60
    ),
    before=st.dictionaries(st.text(max_size=6).filter(lambda key: key != "text"), values, max_size=3),
    after=values,
    ascii=st.booleans(),
    size=st.integers(1, 30),
)
def test_one_string_of_a_long_object(
    text: str, before: dict[str, object], after: object, ascii: bool, size: int
) -> None:
    raw = json.dumps({**before, "text": text, "after": after}, ensure_ascii=ascii)
    chunks = [raw[at : at + size] for at in range(0, len(raw), size)]
    assert "".join(long_text(chunks, "text")) == json.loads(raw)["text"]


@pytest.mark.parametrize(
    "raw",
    [
        '{"other": "text"}', '{"text": 5, "x": "y"}', '["text", "a"]', '"text"', "", '{"text": "never ends',
        '{"text": "a", "text": "b"}', '{"text": "a", "x": "never ends', '{"a": {"text": "inner"}}',
        '{"text": "bad \\q escape"}', '{"text": ["a"]}', '{"text": "\\',
    ],
)  # fmt: skip
def test_a_long_object_without_its_text_is_no_document(raw: str) -> None:
    for size in (1, 3, 100):
        with pytest.raises(ValueError):
            list(long_text([raw[at : at + size] for at in range(0, len(raw), size)], "text"))


def test_null_is_an_empty_text_in_a_long_object() -> None:
    raw = '{"a": [null], "x": null, "text": null, "b": "text"}'
    assert list(long_text(iter(raw), "text")) == []
    with pytest.raises(ValueError, match="holds no text"):
        list(long_text(iter(raw), "a"))


def test_long_lines_among_short_ones(tmp_path: Path) -> None:
    texts = ["short", 'long "quoted" \\ é\n' * 300, "short again", "x" * 5000, "end"]
    lines = jsonl(texts).splitlines(keepends=True)
    lines.insert(3, b'{"nothing": "' + b"y" * 5000 + b'"}\n')
    with mock.patch.multiple(corpus, LONG_LINE_BYTES=1000, READ_BYTES=700):
        found, problems = read(file_of(tmp_path / "a.jsonl", b"".join(lines)))
        # The end of the file is the end of the last line, too.
        assert read(file_of(tmp_path / "b.jsonl", b"".join(lines).rstrip(b"\n")))[0] == found
    assert list(found.values()) == [*texts[:3], "", *texts[3:]]
    assert len(problems) == 1 and problems[0].startswith("document 4: ")


# --- memory -----------------------------------------------------------------------------------------------

READ = """
import resource, sys
from pathlib import Path
from pipeline.corpus import CorpusFile, read_file, Piece
path = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
chars = problems = 0
for item in read_file(0, CorpusFile(path, path.stat().st_size, path.stat().st_mtime_ns), "text", lambda _: None):
    if isinstance(item, Piece):
        chars += item.keep
    else:
        problems += 1
print(chars, problems, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def memory(path: Path) -> tuple[int, int, float]:
    """Characters, problems, and how many MB of memory reading a file took."""
    done = subprocess.run([sys.executable, "-c", READ, path], check=True, capture_output=True, text=True)
    chars, problems, kilobytes = map(int, done.stdout.split())
    return chars, problems, kilobytes / 1000


def line(nbytes: int) -> Iterator[bytes]:
    """A JSON line with a text of so many characters."""
    yield b'{"id": 1, "text": "'
    for _ in range(nbytes >> 20):
        yield b"a word or two \\u00e9\\n".ljust(32) * (1 << 15)
    yield b'"}\n'


@pytest.mark.slow
def test_a_line_of_300_megabytes_takes_little_memory(tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("wb") as stream:
        stream.writelines(line(300 << 20))
    chars, problems, megabytes = memory(tmp_path / "a.jsonl")
    assert problems == 0 and chars == 300 * (1 << 15) * 26
    assert megabytes < 150


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_a_bomb_takes_little_memory(tmp_path: Path, suffix: str, kind: str) -> None:
    path, size = tmp_path / f"a{kind}{suffix}", 400 << 20
    if suffix == ".gz":
        with gzip.open(path, "wb", compresslevel=1) as stream:
            for _ in range(size >> 20):
                stream.write(b" " * (1 << 20))
    else:
        path.write_bytes(zstandard.compress(b" " * size))
    chars, problems, megabytes = memory(path)
    assert megabytes < 200
    assert (chars, problems) == ((size, 0) if kind == ".txt" else (0, 1))


@pytest.mark.slow
def test_a_dictionary_of_one_long_value_takes_little_memory(tmp_path: Path) -> None:
    arrow, files = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    column = arrow.DictionaryArray.from_arrays(
        arrow.array([0] * 300, arrow.int32()), arrow.array(["word " * (1 << 20)])
    )
    files.write_table(arrow.table({"text": column}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 10_000
    chars, problems, megabytes = memory(tmp_path / "a.parquet")
    assert (chars, problems) == (300 * (5 << 20), 0) and megabytes < 400, "1.6 GB of text"


@pytest.mark.slow
def test_a_line_of_small_values_takes_little_memory(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "words", "x": [' + b"{}," * (5 << 20) + b"0]}\n")
    chars, problems, megabytes = memory(tmp_path / "a.jsonl")
    assert (chars, problems) == (5, 0) and megabytes < 100
