"""Intake: good batches come through as sent; every fault is named with its place, and no text is ever named."""

from __future__ import annotations

import json
import os
import socket
import traceback
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import intake
from pipeline.errors import InvalidInput, Problem
from pipeline.intake import TakedownBatch, batch_schema, read_batch
from pipeline.settings import IntakeSettings

TAKEDOWNS = Path(__file__).parent.parent / "takedowns"
CANARY = "xyzzy-canary-plugh"
LIMITS = IntakeSettings(max_text_chars=1000, max_requests=5)
ABSENT: Any = object()


def entry(**changed: Any) -> dict[str, Any]:
    fields = {
        "request_id": "TD-1",
        "title": "A title",
        "rights_holder": "Somebody",
        "basis": "copyright",
        "contact": f"{CANARY}@example.org",
        "text": f"some words {CANARY}",
    }
    return {name: value for name, value in (fields | changed).items() if value is not ABSENT}


def batch(*entries: Any, **changed: Any) -> dict[str, Any]:
    fields = {"batch_id": "B-1", "received_at": "2026-11-23T09:00:00Z", "requests": list(entries) or [entry()]}
    return {name: value for name, value in (fields | changed).items() if value is not ABSENT}


def read(folder: Path, content: Any, limits: IntakeSettings = LIMITS, **known: Any) -> TakedownBatch:
    path = folder / "batch.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return read_batch(path, limits, **known)


def problems(folder: Path, content: Any, limits: IntakeSettings = LIMITS, **known: Any) -> list[Problem]:
    """The problems of a batch, after checking that they leak nothing and that their places are short."""
    with pytest.raises(InvalidInput) as caught:
        read(folder, content, limits, **known)
    assert CANARY not in "".join(traceback.format_exception(caught.value))
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None  # parsers' exceptions hold what they parsed
    prefix = str(folder / "batch.json")
    assert all(p.where.startswith(prefix) and p.found and p.remedy for p in caught.value.problems)
    return [Problem(p.where.removeprefix(prefix).removeprefix(": "), p.found, p.remedy) for p in caught.value.problems]


def problem(folder: Path, content: Any, limits: IntakeSettings = LIMITS, **known: Any) -> Problem:
    (only,) = problems(folder, content, limits, **known)
    return only


# --- good batches -------------------------------------------------------------------------------------------


def test_example_is_read_and_fits_the_schema() -> None:
    path = TAKEDOWNS / "examples" / "two-works.json"
    jsonschema.validate(json.loads(path.read_text()), json.loads(batch_schema()))
    got = read_batch(path, IntakeSettings())
    assert [r.request_id for r in got.requests] == ["EX-1", "EX-2"]
    assert got.requests[1].text == (TAKEDOWNS / "examples" / "works" / "two.txt").read_text()
    assert got.requests[0].contact == "claims@example.org"
    assert got.requests[1].contact is None
    assert {r.batch_id for r in got.requests} == {got.batch_id} == {"2026-11-example"}
    assert {r.received_at for r in got.requests} == {got.received_at} == {datetime(2026, 11, 23, 9, tzinfo=UTC)}


def test_schema_file_is_up_to_date() -> None:
    assert (TAKEDOWNS / "schema.json").read_text() == batch_schema(), (
        "run: python -m pipeline.intake > takedowns/schema.json"
    )


def test_readme_example_is_the_example() -> None:
    block = (TAKEDOWNS / "README.md").read_text().split("```json\n")[1].split("```")[0]
    example = json.loads((TAKEDOWNS / "examples" / "two-works.json").read_text())
    example["requests"][0]["text"] = "Trim the wick before the fog arrives, …"
    assert json.loads(block) == example


@pytest.mark.parametrize(
    ("stated", "instant"),
    [
        ("2026-11-23T09:00:00Z", datetime(2026, 11, 23, 9, tzinfo=UTC)),
        ("2026-11-23T09:00Z", datetime(2026, 11, 23, 9, tzinfo=UTC)),
        ("2026-11-23T09:00:00.25+01:30", datetime(2026, 11, 23, 9, 0, 0, 250_000, timezone(timedelta(minutes=90)))),
        ("2999-01-01T00:00:00-11:00", datetime(2999, 1, 1, 11, tzinfo=UTC)),
    ],
)
def test_dates(tmp_path: Path, stated: str, instant: datetime) -> None:
    got = read(tmp_path, batch(received_at=stated)).received_at
    assert got == instant
    assert got.utcoffset() == timedelta(0)


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("a\r\nb\rc\nd", "a\nb\nc\nd"),
        ("tab\tfeed\x0c", "tab\tfeed\x0c"),
        ("  spaces stay \n", "  spaces stay \n"),
        ("e\u0301 \u200b zero \u202e bidi 🎈", "e\u0301 \u200b zero \u202e bidi 🎈"),
        ("x" * 1000, "x" * 1000),
        ("😀" * 1000, "😀" * 1000),
        ("?", "?"),
    ],
)
def test_texts_come_through_either_way(tmp_path: Path, sent: str, kept: str) -> None:
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbf" + sent.encode())
    got = read(tmp_path, batch(entry(text=sent), entry(request_id="TD-2", text=ABSENT, text_file="t.txt")))
    assert [r.text for r in got.requests] == [kept, kept]


def test_markup_null_byte_order_mark_and_lines_in_contact_are_fine(tmp_path: Path) -> None:
    sent = entry(title="<b>[red]Ünï\u200d</b>", contact="Street 1\nTown", text_file=None)
    got = read(tmp_path, b"\xef\xbb\xbf" + json.dumps(batch(sent)).encode()).requests[0]
    assert (got.title, got.contact) == ("<b>[red]Ünï\u200d</b>", "Street 1\nTown")
    assert read(tmp_path, batch(entry(contact=None))).requests[0].contact is None


def test_batch_repr_holds_no_text(tmp_path: Path) -> None:
    assert CANARY not in repr(read(tmp_path, batch()))


def test_reading_changes_nothing(tmp_path: Path) -> None:
    read(tmp_path, batch())
    before = [(p, p.stat().st_mtime_ns) for p in sorted(tmp_path.rglob("*"))]
    read_batch(tmp_path / "batch.json", LIMITS)
    assert [(p, p.stat().st_mtime_ns) for p in sorted(tmp_path.rglob("*"))] == before


def test_links_inside_the_folder_are_followed(tmp_path: Path) -> None:
    (tmp_path / "works").mkdir()
    (tmp_path / "works" / "a.txt").write_text("words")
    (tmp_path / "link.txt").symlink_to("works/a.txt")
    (tmp_path / "folder").symlink_to("works")
    for name in ("link.txt", "folder/a.txt", "./works//a.txt"):
        assert read(tmp_path, batch(entry(text=ABSENT, text_file=name))).requests[0].text == "words"


def test_batch_folder_may_itself_be_reached_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("words")
    (tmp_path / "alias").symlink_to("real")
    assert read(tmp_path / "alias", batch(entry(text=ABSENT, text_file="a.txt"))).requests[0].text == "words"


# --- one fault at a time ------------------------------------------------------------------------------------

REQUEST_FAULTS: list[tuple[dict[str, Any], str, str]] = [
    # changed fields, place after "requests[0]", part of what is found
    ({"request_id": ABSENT}, ".request_id", "missing"),
    ({"title": ABSENT}, ".title", "missing"),
    ({"rights_holder": ABSENT}, ".rights_holder", "missing"),
    ({"basis": ABSENT}, ".basis", "missing"),
    ({"request_id": ""}, ".request_id", "not a valid id"),
    ({"request_id": "-a"}, ".request_id", "not a valid id"),
    ({"request_id": "a" * 65}, ".request_id", "65 characters"),
    ({"request_id": "a\n"}, ".request_id", "not a valid id"),
    ({"request_id": "../a"}, ".request_id", "not a valid id"),
    ({"request_id": "é"}, ".request_id", "not a valid id"),
    ({"request_id": "a\u202e"}, ".request_id", "not a valid id"),
    ({"request_id": 7}, ".request_id", "a number"),
    ({"request_id": CANARY + " "}, ".request_id", "not a valid id"),
    ({"title": None}, ".title", "null"),
    ({"title": [CANARY]}, ".title", "a list"),
    ({"title": {"a": CANARY}}, ".title", "an object"),
    ({"title": True}, ".title", "true or false"),
    ({"title": float("nan")}, ".title", "a number"),
    ({"title": float("inf")}, ".title", "a number"),
    ({"title": ""}, ".title", "empty"),
    ({"title": " \u200b\u3164"}, ".title", "nothing that can be seen"),
    ({"title": "a" * 501}, ".title", "501 characters, allowed are 500"),
    ({"title": "two\nlines"}, ".title", "line break (U+000A) at character 4"),
    ({"title": "two\u2028lines"}, ".title", "line break"),
    ({"title": "esc\x1b[31m"}, ".title", "control character (U+001B) at character 4"),
    ({"title": "nul\x00"}, ".title", "control character"),
    ({"title": "bidi\u202e"}, ".title", "U+202E at character 5"),
    ({"title": "bidi\u2066"}, ".title", "U+2066"),
    ({"title": "\ud800"}, ".title", "surrogate"),
    ({"rights_holder": "a\tb"}, ".rights_holder", "control character"),
    ({"rights_holder": "a" * 501}, ".rights_holder", "501"),
    ({"rights_holder": "\u200b"}, ".rights_holder", "nothing that can be seen"),
    ({"basis": "Copyright"}, ".basis", "known values"),
    ({"basis": CANARY}, ".basis", "known values"),
    ({"basis": 1}, ".basis", "a number"),
    ({"basis": "\udfff"}, ".basis", "surrogate"),
    ({"contact": 1}, ".contact", "a number"),
    ({"contact": ""}, ".contact", "empty"),
    ({"contact": CANARY * 100}, ".contact", "1800 characters"),
    ({"contact": CANARY + "\x1b"}, ".contact", "control character"),
    ({"text": ""}, ".text", "empty"),
    ({"text": " \t\r\n\u00a0\u3000"}, ".text", "nothing that can be seen (6 characters)"),
    ({"text": "\u200b\u200c\u200d\ufeff\u2060 \u00ad\u3164\u2800\ufe0f"}, ".text", "nothing that can be seen"),
    ({"text": "x" * 1001}, ".text", "1001 characters, allowed are 1000"),
    ({"text": f"{CANARY}\nab\x00"}, ".text", "control character (U+0000) at character 22, line 2"),
    ({"text": "a\x1b"}, ".text", "U+001B"),
    ({"text": "a\x93quoted\x94"}, ".text", "U+0093"),
    ({"text": CANARY + "\ud83d"}, ".text", "surrogate"),
    ({"text": 5}, ".text", "a number"),
    ({"text": [CANARY]}, ".text", "a list"),
    ({"text_file": "a.txt"}, "", "both text and text_file"),
    ({"text": ABSENT}, "", "neither text nor text_file"),
    ({"text": None, "text_file": None}, "", "neither text nor text_file"),
    ({"txt": CANARY}, "", 'the field "txt"'),
    ({CANARY + " in a name": 1}, "", "a field with a name of 28 characters"),
    ({"\ud800": 1}, "", "surrogate"),
    ({"text": ABSENT, "text_file": ""}, ".text_file", "empty"),
    ({"text": ABSENT, "text_file": 3}, ".text_file", "a number"),
    ({"text": ABSENT, "text_file": "absent.txt"}, ".text_file", "does not exist"),
    ({"text": ABSENT, "text_file": "a.txt/b"}, ".text_file", "does not exist"),
    ({"text": ABSENT, "text_file": CANARY}, ".text_file", "does not exist"),
    ({"text": ABSENT, "text_file": CANARY * 30}, ".text_file", "cannot be reached"),  # longer than a name may be
    ({"text": ABSENT, "text_file": CANARY * 100}, ".text_file", "1800 characters"),
    ({"text": ABSENT, "text_file": "/etc/hostname"}, ".text_file", "not a relative path"),
    ({"text": ABSENT, "text_file": "C:\\a.txt"}, ".text_file", "not a relative path"),
    ({"text": ABSENT, "text_file": "works\\a.txt"}, ".text_file", "not a relative path"),
    ({"text": ABSENT, "text_file": "../secret.txt"}, ".text_file", '".."'),
    ({"text": ABSENT, "text_file": "works/../a.txt"}, ".text_file", '".."'),
    ({"text": ABSENT, "text_file": "a.txt\x00"}, ".text_file", "cannot be reached"),
    ({"text": ABSENT, "text_file": "\udc80"}, ".text_file", "surrogate"),
    ({"text": ABSENT, "text_file": "."}, ".text_file", "folder, a pipe or a device"),
    ({"text": ABSENT, "text_file": "works"}, ".text_file", "folder, a pipe or a device"),
    ({"text": ABSENT, "text_file": "fifo"}, ".text_file", "folder, a pipe or a device"),
    ({"text": ABSENT, "text_file": "socket"}, ".text_file", "cannot be opened"),
    ({"text": ABSENT, "text_file": "out.txt"}, ".text_file", "through a link"),
    ({"text": ABSENT, "text_file": "out/secret.txt"}, ".text_file", "through a link"),
    ({"text": ABSENT, "text_file": "null"}, ".text_file", "through a link"),
    ({"text": ABSENT, "text_file": "loop"}, ".text_file", "cannot be reached"),
    ({"text": ABSENT, "text_file": "empty.txt"}, ".text_file", "nothing that can be seen (0 characters)"),
    ({"text": ABSENT, "text_file": "latin1.txt"}, ".text_file", "not UTF-8 (first at line 2)"),
    ({"text": ABSENT, "text_file": "utf16.txt"}, ".text_file", "UTF-16"),
    ({"text": ABSENT, "text_file": "utf16-no-bom.txt"}, ".text_file", "U+0000"),
    ({"text": ABSENT, "text_file": "long.txt"}, ".text_file", "1001 characters, allowed are 1000"),
    ({"text": ABSENT, "text_file": "huge.txt"}, ".text_file", "4004 bytes long, allowed are 4003"),
]


@pytest.fixture
def stocked(tmp_path: Path) -> Path:
    """A batch folder with files that a text_file may not name."""
    (tmp_path / "secret.txt").write_text(CANARY)
    folder = tmp_path / "inbox"
    (folder / "works").mkdir(parents=True)
    (folder / "a.txt").write_text("words")
    os.mkfifo(folder / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(folder)  # the path of a socket may have 107 bytes only
        listener.bind("socket")
        os.chdir(here)
    (folder / "out.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "out").symlink_to("..")
    (folder / "null").symlink_to("/dev/null")
    (folder / "loop").symlink_to("loop")
    (folder / "empty.txt").touch()
    (folder / "latin1.txt").write_bytes(f"{CANARY}\nça".encode("latin-1"))
    (folder / "utf16.txt").write_bytes(CANARY.encode("utf-16"))
    (folder / "utf16-no-bom.txt").write_bytes(CANARY.encode("utf-16-le"))
    (folder / "long.txt").write_text("x" * 1001)
    (folder / "huge.txt").write_text("x" * 4004)
    return folder


@pytest.mark.parametrize(("changed", "place", "found"), REQUEST_FAULTS)
def test_request_faults(stocked: Path, changed: dict[str, Any], place: str, found: str) -> None:
    # behind a good request: the number in the place is that of the request
    got = problem(stocked, batch(entry(request_id="TD-0"), entry(**changed)))
    assert got.where == f"requests[1]{place}"
    assert found in got.found


BATCH_FAULTS: list[tuple[Any, str, str]] = [
    (batch(batch_id=ABSENT), "batch_id", "missing"),
    (batch(batch_id="a b"), "batch_id", "not a valid id"),
    (batch(batch_id=None), "batch_id", "null"),
    (batch(received_at=ABSENT), "received_at", "missing"),
    (batch(received_at=1700000000), "received_at", "a number"),
    (batch(received_at="1700000000"), "received_at", "not a date with time and zone"),
    (batch(received_at="2026-11-23"), "received_at", "not a date with time and zone"),
    (batch(received_at="2026-11-23T09:00:00"), "received_at", "not a date with time and zone"),
    (batch(received_at="2026-11-23T09:00:00Z\n"), "received_at", "not a date with time and zone"),
    (batch(received_at="٢٠٢٦-11-23T09:00:00Z"), "received_at", "not a date with time and zone"),
    (batch(received_at="2026-02-30T09:00:00Z"), "received_at", "does not exist"),
    (batch(received_at="2026-02-03T25:00:00Z"), "received_at", "does not exist"),
    (batch(received_at="0001-01-01T00:00:00+14:00"), "received_at", "does not exist"),
    (batch(received_at="2026-01-01T00:00:00+99:00"), "received_at", "does not exist"),
    (batch(requests=ABSENT), "requests", "missing"),
    (batch(requests=[]), "requests", "no request"),
    (batch(requests=None), "requests", "null"),
    (batch(requests={}), "requests", "an object"),
    (batch(requests=CANARY), "requests", "text"),
    (batch(CANARY), "requests[0]", "text, expected an object"),
    (batch(None), "requests[0]", "null, expected an object"),
    (batch([entry()]), "requests[0]", "a list, expected an object"),
    (batch(*(entry(request_id=f"T{i}") for i in range(6))), "", "holds 6 requests, allowed are 5"),
    (batch(recieved_at=CANARY), "", 'the field "recieved_at"'),
    ({"\ud800": CANARY, **batch()}, "", "surrogate"),
    ([], "", "a list, expected an object"),
    (CANARY, "", "text, expected an object"),
    (batch(**{f"f{i}": 1 for i in range(100)}), "", "103 fields"),
    (b"", "", "not JSON: expecting value (line 1, column 1)"),
    (b'{\n  "batch_id": }', "", "not JSON: expecting value (line 2, column 15)"),
    (b'{"text": "' + CANARY.encode() + b'\n"}', "", "invalid control character at (line 1, column 29)"),
    (b'{"text": "' + CANARY.encode() + b'\\z"}', "", "invalid \\escape"),
    (b'{"text": "' + CANARY.encode(), "", "unterminated string"),
    (json.dumps(batch()).encode() + b"x", "", "extra data"),
    (json.dumps(batch()).encode("utf-16"), "", "UTF-16"),
    (json.dumps(batch()).encode("utf-32-be"), "", "not JSON"),
    (b'{"a": "\xe7a ' + CANARY.encode() + b'"}', "", "not UTF-8"),
    (b"\xef\xbb\xbf\xef\xbb\xbf{}", "", "not JSON"),
    (b"[" * 200_000, "", "nested too deeply"),
    (b'{"a":' * 200_000, "", "nested too deeply"),
    (b"NaN", "", "a number, expected an object"),
    (b"9" * 10_000, "", "a number, expected an object"),
    (b"-1e999999", "", "a number, expected an object"),
]


@pytest.mark.parametrize(("content", "place", "found"), BATCH_FAULTS)
def test_batch_faults(tmp_path: Path, content: Any, place: str, found: str) -> None:
    got = problem(tmp_path, content)
    assert got.where == place
    assert found in got.found


def test_a_misspelt_field_is_guessed(tmp_path: Path) -> None:
    assert 'Did you mean "received_at"?' in problem(tmp_path, batch(recieved_at="x")).remedy


def test_fields_given_twice(tmp_path: Path) -> None:
    body = json.dumps(batch(entry(), entry(request_id="TD-2")))
    body = body.replace('"title"', '"title": "first", "title"').replace('"batch_id"', '"batch_id": "B", "batch_id"')
    got = problems(tmp_path, body.encode())
    assert [p.where for p in got] == ["", "requests[0]", "requests[1]"]
    assert ['"batch_id" more than once' in p.found or '"title" more than once' in p.found for p in got] == [True] * 3


def test_ids_used_before(tmp_path: Path) -> None:
    content = batch(entry(), entry(request_id="td-1"), entry(request_id="TD-9"), entry(request_id="TD-1"))
    got = problems(tmp_path, content, known_requests=["td-9"], known_batches={"b-1"})
    assert [(p.where, p.found.partition(" (")[0]) for p in got] == [
        ("batch_id", '"B-1" was already taken in'),
        ("requests[1].request_id", '"td-1" is also the id of requests[0]'),
        ("requests[2].request_id", '"TD-9" was already taken in'),
        ("requests[3].request_id", '"TD-1" is also the id of requests[0]'),
    ]


def test_all_problems_are_reported_together_and_in_order(stocked: Path) -> None:
    content = batch(
        entry(title="", text=ABSENT, text_file="absent.txt", contact="\x1b", extra=1),
        CANARY,
        entry(request_id="TD-1", basis="?", text="\u200b"),
        entry(request_id="td-1", rights_holder="\u202e", text_file="a.txt"),
        batch_id="?",
        received_at="yesterday",
        requests_=[],
    )
    places = [p.where for p in problems(stocked, content)]
    # the batch itself first, then request by request; within one request in any order
    batch_level = [p for p in places if not p.startswith("requests[")]
    assert places[: len(batch_level)] == batch_level
    assert [p[9] for p in places[len(batch_level) :]] == sorted(p[9] for p in places[len(batch_level) :])
    assert sorted(places) == sorted(
        [
            "",
            "batch_id",
            "received_at",
            "requests[0]",
            "requests[0].title",
            "requests[0].text_file",
            "requests[0].contact",
            "requests[1]",
            "requests[2].request_id",
            "requests[2].basis",
            "requests[2].text",
            "requests[3]",
            "requests[3].request_id",
            "requests[3].rights_holder",
        ]
    )


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "folder, a pipe or a device"),
        (os.mkfifo, "folder, a pipe or a device"),
        (lambda path: path.symlink_to("/dev/zero"), "folder, a pipe or a device"),
        (lambda path: path.symlink_to(path.name), "cannot be opened"),
        (lambda path: path.touch() or os.truncate(path, (64 << 20) + 1), "67108865 bytes long"),
    ],
)
def test_what_is_no_batch_file(tmp_path: Path, make: Callable[[Path], None], found: str) -> None:
    make(tmp_path / "batch.json")
    with pytest.raises(InvalidInput, match=found) as caught:
        read_batch(tmp_path / "batch.json", LIMITS)
    assert [p.where for p in caught.value.problems] == [str(tmp_path / "batch.json")]


def test_paths_are_shown_safely(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        read_batch(tmp_path / "\x1b[31m\n\ud800.json", LIMITS)
    assert str(caught.value).isprintable()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_text_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch(mode=0o000)
    assert "cannot be opened" in problem(tmp_path, batch(entry(text=ABSENT, text_file="a.txt"))).found


def test_texts_of_one_batch_are_limited_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "MAX_TEXT_FILES_BYTES", 25)
    (tmp_path / "a.txt").write_text("x" * 10)
    entries = [entry(request_id=f"T{i}", text=ABSENT, text_file="a.txt") for i in range(4)]
    assert len(read(tmp_path, batch(*entries[:2])).requests) == 2
    got = problems(tmp_path, batch(*entries))
    assert [p.where for p in got] == ["requests[2].text_file", "requests[3].text_file"]
    assert "over 25 bytes" in got[0].found


def test_a_folder_swapped_for_a_link_after_the_check_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox, outside = tmp_path / "inbox", tmp_path / "outside"
    for folder in (inbox / "works", outside):
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text(f"words {CANARY}")
    opened = intake._open

    def swap_then_open(path: Path, within: int | None = None) -> int:
        if path == inbox.resolve():
            (inbox / "works").rename(inbox / "moved")
            (inbox / "works").symlink_to(outside)
        return opened(path, within)

    monkeypatch.setattr(intake, "_open", swap_then_open)
    assert "cannot be opened" in problem(inbox, batch(entry(text=ABSENT, text_file="works/a.txt"))).found


def test_no_file_descriptor_is_left_open(stocked: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    names = ["works", "fifo", "socket", "out.txt", "absent", "latin1.txt", "huge.txt", "a.txt", "out/secret.txt"]
    for name in names:
        problems(stocked, batch(entry(title="", text=ABSENT, text_file=name)))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# --- properties ---------------------------------------------------------------------------------------------

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(), max_size=12), inner, max_size=4)
    ),
    max_leaves=12,
)
FIELDS = st.sampled_from([*intake.BatchFile.model_fields, *intake.RequestEntry.model_fields])


def read_or_refuse(folder: Path, content: Any) -> TakedownBatch | None:
    """Anything else than a batch or InvalidInput fails the test."""
    try:
        return read(folder, content)
    except InvalidInput as error:
        assert error.problems
        return None


@QUICK
@given(content=st.binary(max_size=200))
def test_any_bytes(tmp_path: Path, content: bytes) -> None:
    assert read_or_refuse(tmp_path, content) is None


@QUICK
@given(content=JSON_VALUES)
def test_any_json(tmp_path: Path, content: Any) -> None:
    assert read_or_refuse(tmp_path, content) is None


@QUICK
@given(
    at_batch=st.dictionaries(FIELDS, JSON_VALUES, max_size=1),
    at_request=st.dictionaries(FIELDS, JSON_VALUES, max_size=3),
)
def test_almost_good_json(tmp_path: Path, at_batch: dict[str, Any], at_request: dict[str, Any]) -> None:
    content = {**batch(entry(**at_request)), **at_batch}
    got = read_or_refuse(tmp_path, content)
    if got is not None:  # what the schema refuses is refused
        jsonschema.validate(json.loads(json.dumps(content)), json.loads(batch_schema()))


@QUICK
@given(content=st.binary(max_size=100))
def test_any_text_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.txt").write_bytes(content)
    got = read_or_refuse(tmp_path, batch(entry(text=ABSENT, text_file="t.txt")))
    if got is not None:
        assert got.requests[0].text.replace("\n", "").encode() == (
            content.removeprefix(b"\xef\xbb\xbf").replace(b"\r", b"").replace(b"\n", b"")
        )


@QUICK
@given(cut=st.integers(0, 400), junk=st.binary(max_size=3))
def test_no_broken_file_leaks_its_content(tmp_path: Path, cut: int, junk: bytes) -> None:
    """The text may land in any field or between fields; no message, cause or context shows it."""
    good = json.dumps(batch(entry(title=CANARY + "\n", basis=CANARY, text=CANARY * 60, text_file=CANARY))).encode()
    problems(tmp_path, good[:cut] + junk + good[cut:])
