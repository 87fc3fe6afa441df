"""Intake: a batch file becomes checked requests, or a list of everything that is wrong with it.

In: a JSON file and the text files beside it, all untrusted. Out: a `TakedownBatch`. Never: writes anything, opens a
file outside the batch's folder, or lets a text or contact into an error (`_Fault` carries lengths and positions only,
and `InvalidInput` is raised without a cause, because the exceptions of parsers carry what they parsed).
"""

from __future__ import annotations

import difflib
import json
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from pipeline.display import INVISIBLE, plain
from pipeline.errors import InvalidInput, Problem
from pipeline.records import Basis, Record, TakedownRequest
from pipeline.settings import IntakeSettings

MAX_BATCH_FILE_BYTES = 64 << 20
"""Largest batch file: one inline text of 5 million characters fits even with every character escaped."""
MAX_TEXT_FILES_BYTES = 256 << 20
"""All text files of one batch together, about 80 long novels; they are in memory at once."""
MAX_FIELDS = 64
"""Most fields of a JSON object; the format knows 7. Keeps the list of problems of a hostile file short."""
ID_PATTERN = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

_ID_RULE = "Use 1 to 64 letters (a-z), digits, dots, underscores and hyphens; begin with a letter or digit."
_DATE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d(:\d\d(\.\d{1,6})?)?(Z|[+-]\d\d:\d\d)", re.ASCII)
_DATE_RULE = "Write date, time and zone like 2026-11-23T09:00:00Z or 2026-11-23T10:00:00+01:00."
_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_BLANK_BRAILLE = "\u2800"
_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_FIELD_NAME = re.compile("[A-Za-z_][A-Za-z0-9_-]{0,31}")
_BOM = b"\xef\xbb\xbf"
_OPEN = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
"""A FIFO without a writer opens at once, and a terminal does not become ours."""
_SAVE_AS_UTF8 = 'Save it as plain text with the encoding "UTF-8".'
_SEE_FORMAT = "See takedowns/README.md for the format and an example."
_CHECK_PATH = "Check the name and the permissions of the file."
_DELETE = "Delete that character, or copy the words again from the original."

_Location = tuple[str | int, ...]


class _Shape(BaseModel):
    """A JSON object of the batch format: no unknown fields, no conversion of types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)


class RequestEntry(_Shape):
    """One takedown request. Exactly one of `text` and `text_file` is given."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": ["text"], "properties": {"text": {"type": "string"}}},
                {"required": ["text_file"], "properties": {"text_file": {"type": "string"}}},
            ]
        }
    )

    request_id: str = Field(pattern=ID_PATTERN, description="Your id of this request; used once, ever.")
    title: str = Field(min_length=1, max_length=500, description="Name of the work, on one line.")
    rights_holder: str = Field(min_length=1, max_length=500, description="Who claims, on one line.")
    basis: Basis = Field(description="Legal basis of the claim.")
    contact: str | None = Field(
        None, min_length=1, max_length=1000, description="How to answer the sender. Confidential: kept in the vault."
    )
    text: str | None = Field(None, min_length=1, description="The text itself. Confidential: kept in the vault.")
    text_file: str | None = Field(
        None,
        min_length=1,
        max_length=1000,
        description="A plain text file (UTF-8) with the text, relative to the batch file and inside its folder.",
    )


class BatchFile(_Shape):
    """Takedown requests that arrived together."""

    batch_id: str = Field(pattern=ID_PATTERN, description="Your id of this batch; used once, ever.")
    received_at: str = Field(
        description="When the batch was received, with zone.", json_schema_extra={"format": "date-time"}
    )
    requests: list[RequestEntry] = Field(min_length=1, description="The requests, at least one.")


_FIELDS = (*BatchFile.model_fields, *RequestEntry.model_fields)


class TakedownBatch(Record):
    """A batch that was accepted, with every text resolved.

    Attributes:
        batch_id: The sender's id, unique in the workspace.
        received_at: When the batch was received, in UTC.
        requests: The requests in the order of the file; confidential, so not part of ``repr``.
    """

    batch_id: str
    received_at: datetime
    requests: tuple[TakedownRequest, ...] = Field(repr=False)


def read_batch(
    path: Path,
    settings: IntakeSettings,
    known_requests: Collection[str] = (),
    known_batches: Collection[str] = (),
) -> TakedownBatch:
    """Read and check a batch file and the text files it names.

    Ids are compared without regard to case. Texts are kept as they were sent but for a byte order mark and the line
    ends, which become ``\\n``: a work saved on Windows must give the tokens that the model was trained on.

    Args:
        path: The batch file.
        settings: Limits.
        known_requests: Ids of all requests that were ever taken in.
        known_batches: Ids of all batches that were ever taken in.

    Returns:
        The batch.

    Raises:
        InvalidInput: Something is wrong; all of it is listed, in the order of the file.
    """
    report = _Report(plain(str(path), limit=4096))
    tree: Any = None
    with report.noting(()):
        tree = _parse(_read_open(_open(path), MAX_BATCH_FILE_BYTES))
        _check_count(tree, settings.max_requests)
    report.raise_if_any()

    batch = _check_shape(tree, report)
    received_at = _check_head(tree, report, {known.lower() for known in known_batches})
    _check_ids(tree, report, known_requests)
    texts = _read_texts(tree, report, _TextFolder(path.parent, settings.max_text_chars))
    report.raise_if_any()
    if batch is None or received_at is None:
        raise RuntimeError("a batch without problems has a shape and a date")
    return TakedownBatch(
        batch_id=batch.batch_id,
        received_at=received_at,
        requests=tuple(
            TakedownRequest(
                **entry.model_dump(exclude={"text", "text_file"}),
                batch_id=batch.batch_id,
                received_at=received_at,
                text=texts[index],
            )
            for index, entry in enumerate(batch.requests)
        ),
    )


def batch_schema() -> str:
    """The JSON Schema of a batch file, as it lies in ``takedowns/schema.json``.

    What it refuses, `read_batch` refuses; the other way round `read_batch` knows more (dates, files, characters).
    """
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **BatchFile.model_json_schema()}
    return json.dumps(schema, indent=2) + "\n"


# --- collecting problems ------------------------------------------------------------------------------------


class _Fault(Exception):
    """Something is wrong, not yet said where. Holds field names, lengths and positions, never content."""

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(found)
        self.found = found
        self.remedy = remedy


class _Report:
    """All problems of one batch file, by their place in it."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._noted: list[tuple[_Location, Problem]] = []
        self._places: set[_Location] = set()

    def add(self, at: _Location, fault: _Fault) -> None:
        """Note a problem."""
        self._places.add(at)
        where = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in at).lstrip(".")
        self._noted.append((at, Problem(f"{self._file}: {where}" if where else self._file, fault.found, fault.remedy)))

    @contextmanager
    def noting(self, at: _Location) -> Iterator[None]:
        """Note a fault raised inside, and go on after it."""
        try:
            yield
        except _Fault as fault:
            self.add(at, fault)

    def good(self, entry: Any, at: _Location) -> str | None:
        """The string in the field ``at[-1]`` of ``entry``; None where there is none or it has a problem already."""
        value = entry.get(at[-1]) if isinstance(entry, dict) else None
        return value if isinstance(value, str) and at not in self._places else None

    def raise_if_any(self) -> None:
        """Raise what was noted: the batch first, then the requests in order.

        Raises:
            InvalidInput: There is at least one problem.
        """
        if self._noted:
            raise InvalidInput(problem for _, problem in sorted(self._noted, key=lambda noted: _index(noted[0])))


def _index(at: _Location) -> int:
    """Number of the request that a place lies in; -1 for the batch itself."""
    return at[1] if len(at) > 1 and isinstance(at[1], int) else -1


# --- JSON and shape -----------------------------------------------------------------------------------------


class _Object(dict[str, Any]):
    """A JSON object that remembers the fields a dict would hide: given twice, or named by half a character."""

    __slots__ = ("repeated", "unreadable")

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        if len(pairs) > MAX_FIELDS:
            raise _Fault(f"has an object with {len(pairs)} fields, expected at most 7", _SEE_FORMAT)
        super().__init__((name, value) for name, value in pairs if not _SURROGATE.search(name))
        counts = Counter(name for name, _ in pairs if name in self)
        self.repeated = [name for name, count in counts.items() if count > 1]
        self.unreadable = len(pairs) - counts.total()


def _parse(data: bytes) -> Any:
    """Read JSON. Numbers become 0: no field is one, so size and NaN do not matter; the shape refuses them.

    Raises:
        _Fault: Not UTF-8 or not JSON.
    """
    try:
        return json.loads(
            _decode(data),
            object_pairs_hook=_Object,
            parse_int=lambda _: 0,
            parse_float=lambda _: 0,
            parse_constant=lambda _: 0,
        )
    except json.JSONDecodeError as error:
        what = error.msg.partition(": ")[0].lower()  # behind it one release quotes the text
        raise _Fault(
            f"is not JSON: {what} (line {error.lineno}, column {error.colno})",
            'Correct the file there. Inside quotes write a line break as \\n and a quote as \\", or use text_file.',
        ) from None
    except RecursionError:
        raise _Fault("is nested too deeply for a batch", _SEE_FORMAT) from None


def _check_count(tree: Any, max_requests: int) -> None:
    """Stop before a batch that is too large is looked at in detail."""
    requests = tree.get("requests") if isinstance(tree, dict) else None
    if isinstance(requests, list) and len(requests) > max_requests:
        raise _Fault(f"holds {len(requests)} requests, allowed are {max_requests}", "Split the batch.")


def _check_shape(tree: Any, report: _Report) -> BatchFile | None:
    """Note wrong types, missing, unknown and repeated fields, patterns and lengths."""
    for at, value in [((), tree), *_entries(tree)]:
        if not isinstance(value, _Object):
            continue
        for name in value.repeated:
            report.add(at, _Fault(f"has {_field(name)} more than once", "Keep one of them."))
        if value.unreadable:
            report.add(at, _Fault("has a field whose name is broken (half of a surrogate pair)", _SEE_FORMAT))
    try:
        return BatchFile.model_validate(tree)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            at = detail["loc"][:-1] if detail["type"] == "extra_forbidden" else detail["loc"]
            report.add(at, _explain(detail))
        return None


def _entries(tree: Any) -> list[tuple[_Location, Any]]:
    """Each request with its place, as far as there is a list of them."""
    requests = tree.get("requests") if isinstance(tree, dict) else None
    return [(("requests", i), entry) for i, entry in enumerate(requests)] if isinstance(requests, list) else []


def _explain(detail: ErrorDetails) -> _Fault:
    """Say what pydantic found without its words, which may quote the input."""
    limits, value, name = detail.get("ctx", {}), detail["input"], detail["loc"][-1] if detail["loc"] else ""
    match detail["type"]:
        case "missing":
            return _Fault("is missing", "Add the field.")
        case "extra_forbidden":
            close = difflib.get_close_matches(str(name)[:32], _FIELDS, n=1)
            hint = f'Did you mean "{close[0]}"?' if close else "Remove it."
            return _Fault(f"has {_field(str(name))}, which the format does not know", hint)
        case "string_pattern_mismatch":
            return _Fault(f"is not a valid id ({len(value)} characters)", _ID_RULE)
        case "string_too_short":
            return _Fault("is empty", "Fill it in.")
        case "string_too_long":
            return _Fault(f"has {len(value)} characters, allowed are {limits['max_length']}", "Shorten it.")
        case "string_unicode":
            return _Fault("holds a broken character (half of a surrogate pair)", _DELETE)
        case "literal_error" if isinstance(value, str):
            return _Fault("is not one of the known values", f"Use {limits['expected']}.")
        case "string_type" | "literal_error":
            return _Fault(f"is {_kind(value)}, expected text in quotes", 'Write it as "…".')
        case "list_type":
            return _Fault(f"is {_kind(value)}, expected a list", "Write the requests as [{…}, {…}].")
        case "too_short":
            return _Fault("holds no request", "Add at least one.")
        case "model_type":
            return _Fault(f"is {_kind(value)}, expected an object", _SEE_FORMAT)
        case other:
            return _Fault(f"does not fit the format ({other})", _SEE_FORMAT)


def _kind(value: Any) -> str:
    """What a JSON value is, without the value."""
    names = {str: "text", bool: "true or false", int: "a number", list: "a list", _Object: "an object"}
    return names.get(type(value), "null")


def _field(name: str) -> str:
    """A field's name, unless it could be misplaced content."""
    return f'the field "{name}"' if _FIELD_NAME.fullmatch(name) else f"a field with a name of {len(name)} characters"


# --- content ------------------------------------------------------------------------------------------------


def _check_head(tree: Any, report: _Report, known_batches: Collection[str]) -> datetime | None:
    """Note a batch id that was used before and a date that is none; return the date."""
    batch_id = report.good(tree, ("batch_id",))
    if batch_id is not None and batch_id.lower() in known_batches:
        report.add(("batch_id",), _Fault(f'"{batch_id}" was already taken in', "Give each batch an id of its own."))
    stated = report.good(tree, ("received_at",))
    if stated is not None:
        with report.noting(("received_at",)):
            return _instant(stated)
    return None


def _instant(stated: str) -> datetime:
    """A date with time and zone, in UTC; the future is allowed, clocks differ."""
    if not _DATE.fullmatch(stated):
        raise _Fault("is not a date with time and zone", _DATE_RULE)
    try:
        return datetime.fromisoformat(stated).astimezone(UTC)
    except (ValueError, OverflowError):
        raise _Fault("is a date or time that does not exist", _DATE_RULE) from None


def _check_ids(tree: Any, report: _Report, known_requests: Collection[str]) -> None:
    """Note ids that were used before, here or in an earlier batch; case does not tell two ids apart."""
    taken = {known.lower() for known in known_requests}
    first: dict[str, int] = {}
    for index, (at, entry) in enumerate(_entries(tree)):
        place = (*at, "request_id")
        request_id = report.good(entry, place)
        if request_id is None:
            continue
        if request_id.lower() in taken:
            fault = _Fault(f'"{request_id}" was already taken in', "Give the request a new id, or leave it out.")
            report.add(place, fault)
        if (earlier := first.setdefault(request_id.lower(), index)) != index:
            fault = _Fault(
                f'"{request_id}" is also the id of requests[{earlier}] (upper and lower case count as the same)',
                "Give each request an id of its own.",
            )
            report.add(place, fault)


def _read_texts(tree: Any, report: _Report, folder: _TextFolder) -> dict[int, str]:
    """Note what is wrong with the content of each request; return the texts by number of the request."""
    texts = {}
    for index, (at, entry) in enumerate(_entries(tree)):
        for name in ("title", "rights_holder", "contact"):
            value = report.good(entry, (*at, name))
            if value is not None:
                with report.noting((*at, name)):
                    _check_label(value, line_breaks=name == "contact")
        given = [n for n in ("text", "text_file") if isinstance(entry, dict) and entry.get(n) is not None]
        if len(given) != 1 and isinstance(entry, dict):
            found = "has both text and text_file" if given else "has neither text nor text_file"
            report.add(at, _Fault(found, "Give exactly one of them."))
        for name in given:
            value = report.good(entry, (*at, name))
            if value is not None:
                with report.noting((*at, name)):
                    text = value if name == "text" else folder.read(value)
                    texts[index] = _checked_text(text, folder.max_chars)
    return texts


def _check_label(value: str, line_breaks: bool) -> None:
    """Refuse what could disguise or break a line on a screen, and what shows nothing."""
    for place, character in enumerate(value, start=1):
        if character == "\n" and line_breaks:
            continue
        if character in _BIDI:
            raise _Fault(f"holds U+{ord(character):04X} at character {place}, which reorders what is shown", _DELETE)
        if unicodedata.category(character) in ("Cc", "Zl", "Zp"):
            what = "a line break" if character in "\n\r\x85\u2028\u2029" else "a control character"
            raise _Fault(f"holds {what} (U+{ord(character):04X}) at character {place}", _DELETE)
    if _is_blank(value):
        raise _Fault("holds nothing that can be seen", "Fill it in.")


def _checked_text(text: str, max_chars: int) -> str:
    """A text with its line ends as ``\\n``."""
    if len(text) > max_chars:
        raise _Fault(f"has {len(text)} characters, allowed are {max_chars}", "Split it, or raise max_text_chars.")
    if control := _CONTROL.search(text):
        line = text.count("\n", 0, control.start()) + 1
        raise _Fault(
            f"holds a control character (U+{ord(control.group()):04X}) at character {control.start() + 1}, line {line}",
            f"{_DELETE} Many of them mean that the file is not UTF-8: save it as such.",
        )
    if _is_blank(text):
        raise _Fault(f"holds nothing that can be seen ({len(text)} characters)", "Put the text in.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _is_blank(text: str) -> bool:
    """Whether a reader sees nothing: white space, zero-width, format and filler characters only."""
    return not any(
        unicodedata.category(c)[0] not in "CZ" and c != _BLANK_BRAILLE and not INVISIBLE.match(c) for c in text
    )


# --- files --------------------------------------------------------------------------------------------------


class _TextFolder:
    """The folder of a batch, the only one that its text files are read from."""

    def __init__(self, folder: Path, max_chars: int) -> None:
        self.max_chars = max_chars
        self._folder = folder
        self._left = MAX_TEXT_FILES_BYTES

    def read(self, relative: str) -> str:
        """Read one text file.

        Raises:
            _Fault: The path or the file is refused; the path is not quoted, it may be a misplaced text.
        """
        data = _read_open(_open_inside(self._folder, relative), 4 * self.max_chars + len(_BOM), self._left)
        self._left -= len(data)
        return _decode(data)


def _open_inside(folder: Path, relative: str) -> int:
    """Open a file below a folder. Links inside the folder are followed, links out of it refused.

    The path is resolved first and then opened step by step without following links, so that a folder
    swapped for a link in between leads nowhere.
    """
    pure = PurePosixPath(relative)
    if pure.is_absolute() or "\\" in relative or re.match("[A-Za-z]:", relative):
        raise _Fault("is not a relative path", "Name the file from the batch file's folder, like works/two.txt.")
    if ".." in pure.parts:
        raise _Fault('holds ".."', "Put the file into the batch file's folder and name it from there.")
    try:
        root = folder.resolve(strict=True)
        real = (root / pure).resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError):
        raise _Fault("names a file that does not exist", _CHECK_PATH) from None
    except (OSError, RuntimeError, ValueError):
        raise _Fault("names a file that cannot be reached", _CHECK_PATH) from None
    if not real.is_relative_to(root):
        raise _Fault("leads out of the batch file's folder through a link", "Put the file itself into the folder.")
    *folders, name = real.relative_to(root).parts or (".",)
    at = _open(root)
    try:
        for step in folders:
            below = _open(Path(step), within=at)
            os.close(at)
            at = below
        return _open(Path(name), within=at)
    finally:
        os.close(at)


def _open(path: Path, within: int | None = None) -> int:
    """Open without waiting for anyone; below an open folder, without following links."""
    try:
        return os.open(path, _OPEN | (os.O_NOFOLLOW if within is not None else 0), dir_fd=within)
    except FileNotFoundError:
        raise _Fault("does not exist", _CHECK_PATH) from None
    except OSError as error:
        raise _Fault(f"cannot be opened ({error.strerror})", _CHECK_PATH) from None
    except ValueError:
        raise _Fault("is not a path", _CHECK_PATH) from None


def _read_open(fd: int, max_bytes: int, left: int = MAX_BATCH_FILE_BYTES) -> bytes:
    """Read a regular file whole and close it; its size is looked at before.

    Args:
        fd: The open file.
        max_bytes: Most bytes of this file.
        left: Most bytes that the batch may still read.
    """
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise _Fault("is a folder, a pipe or a device", "Name a regular file.")
        if status.st_size > max_bytes:
            raise _Fault(f"is {status.st_size} bytes long, allowed are {max_bytes}", "Shorten or split it.")
        if status.st_size > left:
            raise _Fault(f"brings the text files of the batch over {MAX_TEXT_FILES_BYTES} bytes", "Split the batch.")
        with os.fdopen(fd, "rb", closefd=False) as stream:
            data = stream.read(status.st_size + 1)
    except OSError as error:
        raise _Fault(f"cannot be read ({error.strerror})", _CHECK_PATH) from None
    finally:
        os.close(fd)
    if len(data) > status.st_size:
        raise _Fault("grew while it was read", "Wait until it is complete and try again.")
    return data


def _decode(data: bytes) -> str:
    """Text of UTF-8 bytes; a byte order mark in front is dropped."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _Fault("is UTF-16, expected UTF-8", _SAVE_AS_UTF8)
    try:
        return data.removeprefix(_BOM).decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _Fault(f"is not UTF-8 (first at line {line})", _SAVE_AS_UTF8) from None


if __name__ == "__main__":
    print(batch_schema(), end="")
