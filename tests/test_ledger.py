"""The ledger: append-only, whole transactions, readers beside a writer, and every kind of tampering found."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import NoSpace, NotAWorkspace, StoreDamaged, TakedownError, UsageError, WorkspaceBusy
from pipeline.files import canonical_json, digest_json
from pipeline.ledger import GENESIS, SCHEMA, Ledger, current_version, known_batches, request_states
from pipeline.records import Event, LedgerEntry

AT = datetime(2026, 11, 23, 9, 0, tzinfo=UTC)


def _received(request_id: str, batch_id: str = "b1") -> Event:
    data = {"batch_id": batch_id, "received_at": "2026-11-20T08:00:00Z", "commitment": f"c-{request_id}"}
    return Event(kind="received", actor="test", request_id=request_id, data=data)


def _event(kind: str, **fields: Any) -> Event:
    return Event(kind=kind, actor="test", **fields)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger of four entries, closed: everything is in the one file."""
    path = tmp_path / "ledger.db"
    with Ledger.create(path) as ledger:
        ledger.append(_event("initialised", version=0, data={"root": "r0", "manifest": "m0"}), at=AT)
        ledger.append(_received("TD-1"), _received("TD-2", "b2"), at=AT)
        ledger.append(_event("applied", request_id="TD-1", version=1, run_id="run"), at=AT)
    return path


def _check(path: Path) -> list[str]:
    with Ledger.open(path, read_only=True) as ledger:
        return [f"{b.where}: {b.found}" for b in ledger.check()]


def _tamper(path: Path, *statements: str, restore: bool = True) -> None:
    """Change a ledger like someone who knows SQLite: triggers dropped, changed, triggers put back."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in SCHEMA[1:]:
            connection.execute(f"DROP TRIGGER {statement.split()[2]}")
        for statement in statements:
            connection.execute(statement)
        for statement in SCHEMA[1:] if restore else ():
            connection.execute(statement)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


# --- writing and reading ----------------------------------------------------------------------------------


def test_entries_are_numbered_dated_and_chained(path: Path) -> None:
    with Ledger.open(path) as ledger:
        entries = ledger.entries()
        assert ledger.head() == entries[-1]
        assert ledger.check() == []
    assert [e.seq for e in entries] == [1, 2, 3, 4]
    assert [e.previous for e in entries] == [GENESIS, *(e.digest for e in entries[:-1])]
    for e in entries:  # the published rule, computed from the record alone
        event = e.event.model_dump(mode="json")
        fields = {"seq": e.seq, "at": "2026-11-23T09:00:00.000000Z", "event": event, "previous": e.previous}
        assert e.digest == digest_json(fields)


def test_append_returns_what_entries_reads(path: Path) -> None:
    with Ledger.open(path) as ledger:
        before = ledger.entries()
        assert ledger.append() == ()
        added = ledger.append(_event("refused", request_id="TD-2"), _event("empty", request_id="TD-2"))
        assert ledger.entries() == before + added
        assert datetime.now(UTC) - added[0].at < timedelta(minutes=1)


def test_an_empty_ledger_holds(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "ledger.db") as ledger:
        assert ledger.entries() == ()
        assert ledger.head() is None
        assert ledger.check() == []


def test_times_are_stored_in_utc_and_need_a_zone(path: Path) -> None:
    with Ledger.open(path) as ledger:
        (entry,) = ledger.append(_received("x"), at=datetime(2026, 1, 1, 1, tzinfo=timezone(timedelta(hours=2))))
        assert entry.at == datetime(2025, 12, 31, 23, tzinfo=UTC)
        with pytest.raises(ValueError, match="zone"):
            ledger.append(_received("x"), at=datetime(2026, 1, 1))
        assert len(ledger.entries()) == 5


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.builds(Event, kind=st.text(), actor=st.text(), data=st.dictionaries(st.text(), JSON)), max_size=3))
def test_any_event_survives_the_round_trip(path: Path, events: list[Event]) -> None:
    with Ledger.open(path) as ledger:
        ledger._connection.execute("PRAGMA synchronous=OFF")  # speed; durability is not the point here
        ledger.append(*events)
        assert [e.event for e in ledger.entries()[len(ledger.entries()) - len(events) :]] == events


def test_an_event_that_is_no_json_is_refused_whole(path: Path) -> None:
    with Ledger.open(path) as ledger:
        with pytest.raises(ValueError):
            ledger.append(_received("x"), _event("applied", data={"loss": float("nan")}))
        assert len(ledger.entries()) == 4


def test_create_refuses_what_is_there(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        Ledger.create(path)
    assert path.read_bytes() == before


def test_create_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.db"

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, call, stopped)
            Ledger.create(path)
        assert list(tmp_path.iterdir()) == []
    Ledger.create(path).close()
    assert list(tmp_path.iterdir()) == [path]


# --- what opening refuses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("read_only", [False, True])
def test_missing_and_foreign_files(tmp_path: Path, read_only: bool) -> None:
    path = tmp_path / "ledger.db"
    with pytest.raises(NotAWorkspace, match="no ledger"):
        Ledger.open(path, read_only)
    assert not path.exists()
    for content in (b"", b"not a database" * 100):
        path.write_bytes(content)
        with pytest.raises(StoreDamaged):
            Ledger.open(path, read_only)
        assert path.read_bytes() == content
    path.unlink()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE other (x)")
    with pytest.raises(StoreDamaged, match="application id"):
        Ledger.open(path, read_only)


def test_a_path_with_odd_characters_opens(tmp_path: Path) -> None:
    path = tmp_path / "a?mode=memory#%41.db"
    with Ledger.create(path) as ledger:
        ledger.append(_received("x"))
    assert _check(path) == []


# --- one writer, many readers -----------------------------------------------------------------------------


def test_a_second_writer_is_told_to_wait(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as other, Ledger.open(path, timeout_s=0.05) as ledger:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(WorkspaceBusy, match="Nothing was written"):
            ledger.append(_received("x"))
        other.execute("ROLLBACK")
        assert len(ledger.append(_received("x"))) == 1


def test_readers_read_while_a_transaction_is_open(path: Path) -> None:
    with Ledger.open(path) as writer, Ledger.open(path, read_only=True) as reader:
        writer._connection.execute("BEGIN IMMEDIATE")
        assert len(reader.entries()) == 4
        writer._connection.execute("ROLLBACK")
        writer.append(_received("x"))
        assert len(reader.entries()) == 5
        assert reader.check() == []


def test_a_reader_cannot_write(path: Path) -> None:
    with Ledger.open(path, read_only=True) as reader, pytest.raises(NoSpace):
        reader.append(_received("x"))


def test_a_full_disk_loses_nothing(path: Path) -> None:
    with Ledger.open(path) as ledger:
        pages = ledger._connection.execute("PRAGMA page_count").fetchone()[0]
        ledger._connection.execute(f"PRAGMA max_page_count={pages}")
        with pytest.raises(NoSpace, match="run the same command again"):
            ledger.append(*(_received(f"x{i}") for i in range(200)))
        ledger._connection.execute("PRAGMA max_page_count=100000")
        assert len(ledger.entries()) == 4
        ledger.append(_received("x"))
        assert ledger.check() == []


@pytest.mark.skipif(os.getuid() != 0, reason="needs to become another user")
def test_an_auditor_reads_a_folder_that_he_cannot_write(path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    code = """
import os, sys
from pathlib import Path
from pipeline.ledger import Ledger
folder = os.open(sys.argv[1], os.O_RDONLY)
os.fchdir(folder); os.setuid(65534)
with Ledger.open(Path("ledger.db"), read_only=True) as ledger:
    assert len(ledger.entries()) == 4 and ledger.check() == []
"""
    folder = Path("/tmp") / f"takedown-ledger-{os.getpid()}"
    shutil.copytree(path.parent, folder)
    try:
        folder.chmod(0o555)
        (folder / "ledger.db").chmod(0o444)
        subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o555
        assert len(list(folder.iterdir())) == 1
    finally:
        shutil.rmtree(folder)


@pytest.mark.slow
def test_kill_9_loses_nothing_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    Ledger.create(path).close()
    code = """
import sys
from pathlib import Path
from pipeline.ledger import Ledger
from pipeline.records import Event
ledger = Ledger.open(Path(sys.argv[1]))
while True:
    pair = ledger.append(Event(kind="received", actor="a"), Event(kind="empty", actor="a"))
    print(pair[-1].seq, pair[-1].digest, flush=True)
"""
    for kill_after in (1, 7, 20):
        with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for _ in range(kill_after):
                seq, digest = child.stdout.readline().split()
            child.send_signal(signal.SIGKILL)
        with Ledger.open(path) as ledger:
            entries = ledger.entries()
            assert ledger.check() == []
        assert entries[int(seq) - 1].digest == digest
        assert len(entries) % 2 == 0, "half a transaction is visible"


# --- tampering --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET at = at",
        "UPDATE OR REPLACE entries SET seq = 9 WHERE seq = 4",
        "DELETE FROM entries",
        "DELETE FROM entries WHERE seq = 4",
        "INSERT OR REPLACE INTO entries VALUES (2, '', '', '', '')",
        "REPLACE INTO entries VALUES (4, '', '', '', '')",
        "INSERT INTO entries VALUES (9, '', '', '', '')",
        "INSERT INTO entries (at, event, previous, digest) VALUES ('', '', '', '')",
    ],
)
def test_sql_cannot_change_what_is_there(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as connection, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        connection.execute(statement)
    assert _check(path) == []


TAMPERED = {
    "time": ("UPDATE entries SET at = '2025-11-23T09:00:00.000000Z' WHERE seq = 2", "entry 2: content"),
    "time in other words": ("UPDATE entries SET at = '2026-11-23T09:00:00Z' WHERE seq = 2", "entry 2: the time"),
    "time not a time": ("UPDATE entries SET at = 'yesterday' WHERE seq = 2", "entry 2: time or event"),
    "event": ("UPDATE entries SET event = replace(event, 'TD-1', 'TD-9') WHERE seq = 2", "entry 2: content"),
    "event, a space": (
        "UPDATE entries SET event = ' ' || event WHERE seq = 2",
        "entry 2: the event is not in the form",
    ),
    "event not JSON": ("UPDATE entries SET event = '{' WHERE seq = 2", "entry 2: time or event cannot be read"),
    "event of another kind": ("UPDATE entries SET event = '[]' WHERE seq = 2", "fields that are not an event's"),
    "event bottomless": (f"UPDATE entries SET event = '{'[' * 100_000}' WHERE seq = 2", "entry 2: time or event"),
    "event null byte": ("UPDATE entries SET event = event || char(0) WHERE seq = 2", "entry 2: time or event"),
    "event a blob": ("UPDATE entries SET event = x'00' WHERE seq = 2", "entry 2: a column"),
    "text not Unicode": ("UPDATE entries SET previous = CAST(x'ff' AS TEXT) WHERE seq = 2", "entry 2: names"),
    "digest not Unicode": ("UPDATE entries SET digest = CAST(x'ff' AS TEXT) WHERE seq = 2", "entry 2: content"),
    "previous": ("UPDATE entries SET previous = 'x' WHERE seq = 2", "entry 2: names 'x' as its predecessor"),
    "genesis": ("UPDATE entries SET previous = 'x' WHERE seq = 1", "entry 1: names 'x' as its predecessor"),
    "digest": ("UPDATE entries SET digest = 'x' WHERE seq = 2", "entry 3: names"),
    "number": ("UPDATE entries SET seq = 9 WHERE seq = 4", "entry 9: the entries after 3 missing"),
    "negative number": ("UPDATE entries SET seq = -1 WHERE seq = 1", "entry -1:"),
    "first removed": ("DELETE FROM entries WHERE seq = 1", "entry 2: entry 1 missing before it"),
    "middle removed": ("DELETE FROM entries WHERE seq = 2", "entry 3: entry 2 missing before it"),
    "two removed": ("DELETE FROM entries WHERE seq IN (2, 3)", "entry 4: the entries after 1 missing"),
    "last removed": ("DELETE FROM entries WHERE seq = 4", "SQLite counts 4 entries written, the last one is 3"),
    "all removed": ("DELETE FROM entries", "SQLite counts 4 entries written, the last one is 0"),
    "inserted": ("INSERT INTO entries SELECT 5, at, event, previous, digest FROM entries WHERE seq = 4", "entry 5"),
    "swapped": ("UPDATE entries SET event = (SELECT event FROM entries e WHERE e.seq = 5 - entries.seq)", "entry 2"),
    "counter removed": ("DELETE FROM sqlite_sequence", "SQLite counts no entries"),
    "table emptied": ("DROP TABLE entries", "cannot be read"),
    "column added": ("ALTER TABLE entries ADD COLUMN note", "entries: was changed"),
    "foreign table": ("CREATE TABLE notes (x)", "notes: is foreign"),
    "foreign index": ("CREATE UNIQUE INDEX extra ON entries (digest)", "extra: is foreign"),
    "foreign trigger": ("CREATE TRIGGER x AFTER INSERT ON entries BEGIN SELECT 1; END", "x: is foreign"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_tampering_is_found_and_named(path: Path, name: str) -> None:
    statement, expected = TAMPERED[name]
    dropped = name == "table emptied"
    with Ledger.open(path, read_only=True) as before:
        _tamper(path, statement, restore=not dropped)
        found = [f"{b.where}: {b.found}" for b in before.check()]  # opened before: even a table that vanishes is found
    assert any(expected in line for line in found), found
    if not dropped:
        assert found == _check(path)
        with Ledger.open(path, read_only=True) as ledger:
            if any("entry" in line for line in found):
                with pytest.raises(StoreDamaged, match="does not hold"):
                    ledger.entries()


@pytest.mark.parametrize("statement", SCHEMA[1:])
def test_a_missing_or_weakened_trigger_is_found(path: Path, statement: str) -> None:
    name = statement.split()[2]
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"DROP TRIGGER {name}")
        assert _check(path) == [f"ledger.db: {name}: is missing"]
        connection.execute(statement.replace("RAISE(ABORT, 'the ledger is append-only')", "1"))
    assert _check(path) == [f"ledger.db: {name}: was changed"]


def _rechain(path: Path, first: int, last: int, change: Callable[[int, dict[str, Any]], None]) -> None:
    """Rewrite entries with all digests computed anew, as someone who has this source would."""
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT seq, at, event, previous, digest FROM entries ORDER BY seq").fetchall()
    statements = []
    previous = rows[first - 1][3]
    for seq, at, event, _, _ in rows[first - 1 : last]:
        tree = json.loads(event)
        change(seq, tree)
        digest = digest_json({"seq": seq, "at": at, "event": tree, "previous": previous})
        text = canonical_json(tree).decode()
        statements.append(
            f"UPDATE entries SET event = '{text}', previous = '{previous}', digest = '{digest}' WHERE seq = {seq}"
        )
        previous = digest
    _tamper(path, *statements)


def _rename(seq: int, tree: dict[str, Any]) -> None:
    tree["actor"] = "nobody"


def test_a_partly_rewritten_chain_breaks_where_the_rewriting_ends(path: Path) -> None:
    _rechain(path, 2, 3, _rename)
    assert [line.split(" names")[0] for line in _check(path)] == ["ledger.db: entry 4:"]


def test_a_wholly_rewritten_end_shows_only_against_a_digest_noted_elsewhere(path: Path) -> None:
    """The limit of a hash chain, written down: this is why `Ledger.head` should be kept by somebody else."""
    with Ledger.open(path, read_only=True) as ledger:
        noted = ledger.head()
    _rechain(path, 2, 4, _rename)
    assert _check(path) == []
    with Ledger.open(path, read_only=True) as ledger:
        assert ledger.head() != noted


def test_a_cut_end_with_its_counter_shows_only_against_a_digest_noted_elsewhere(path: Path) -> None:
    _tamper(path, "DELETE FROM entries WHERE seq = 4", "UPDATE sqlite_sequence SET seq = 3")
    assert _check(path) == []


def test_nothing_is_built_on_a_damaged_head(path: Path) -> None:
    _tamper(path, TAMPERED["event"][0].replace("seq = 2", "seq = 4"))
    with Ledger.open(path) as ledger, pytest.raises(StoreDamaged, match="entry 4"):
        ledger.append(_received("x"))
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM entries").fetchone() == (4,)


def test_every_flipped_byte_of_a_row_is_found(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT at || event || previous || digest FROM entries").fetchall()
    data = path.read_bytes()
    places = [at for (row,) in rows for at in range(data.index(row.encode()), data.index(row.encode()) + len(row))]
    assert len(places) > 1000
    for at in places:
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        assert _check(path), f"byte {at}"


def test_no_flipped_byte_of_the_file_gives_anything_but_a_break_or_a_clear_error(path: Path) -> None:
    with Ledger.open(path, read_only=True) as ledger:
        entries = ledger.entries()
    data = path.read_bytes()
    used = [at for at, byte in enumerate(data) if byte]  # headers, cells, records; the rest is empty space
    for at in random.Random(0).sample(used, 400):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        try:
            with Ledger.open(path, read_only=True) as ledger:
                if not ledger.check():
                    assert ledger.entries() == entries, f"byte {at}: other content, no break"
        except TakedownError as error:
            assert str(path) in str(error)


# --- what the entries say ---------------------------------------------------------------------------------


def _entries(*events: Event) -> tuple[LedgerEntry, ...]:
    return tuple(
        LedgerEntry(seq=i, at=AT + timedelta(days=i), event=event, previous="", digest="")
        for i, event in enumerate(events, 1)
    )


def test_current_version_is_the_latest_published_one() -> None:
    entries = _entries(
        _event("initialised", version=0),
        _event("published", version=1),
        _event("applied", version=7),
        _event("refused"),
    )
    assert current_version(entries) == 1
    assert current_version(entries[:1]) == 0
    with pytest.raises(NotAWorkspace, match="did not finish"):
        current_version(())


@pytest.mark.parametrize("kind", ["repeat", "folded", "empty", "not-memorised", "applied", "refused"])
def test_a_decision_moves_a_request_out_of_waiting(kind: str) -> None:
    events = (_received("TD-1"), _received("TD-2", "b2"), _event(kind, request_id="TD-1", version=3, run_id="r"))
    states = request_states(_entries(*events))
    assert list(states) == ["TD-1", "TD-2"]
    one, two = states["TD-1"], states["TD-2"]
    assert (one.state, one.version, one.run_id, one.decided_at) == (kind, 3, "r", AT + timedelta(days=3))
    assert (one.batch_id, one.commitment) == ("b1", "c-TD-1")
    assert one.received_at == datetime(2026, 11, 20, 8, tzinfo=UTC)
    assert (two.state, two.batch_id, two.decided_at, two.version) == ("waiting", "b2", None, None)


def test_a_refused_request_can_be_applied_later() -> None:
    events = [
        _received("TD-1"),
        _event("refused", request_id="TD-1", run_id="r1"),
        _event("applied", request_id="TD-1", version=2, run_id="r2"),
    ]
    assert request_states(_entries(*events[:2]))["TD-1"].state == "refused"
    state = request_states(_entries(*events))["TD-1"]
    assert (state.state, state.version, state.run_id) == ("applied", 2, "r2")


def test_events_of_runs_are_not_requests() -> None:
    assert request_states(_entries(_event("published", version=1), _event("refused", run_id="r"))) == {}


def test_a_ledger_that_makes_no_sense_is_not_skipped_over() -> None:
    with pytest.raises(StoreDamaged, match="'TD-1' is applied but was never received"):
        request_states(_entries(_event("applied", request_id="TD-1")))
    with pytest.raises(StoreDamaged, match="needs data"):
        request_states(_entries(_event("received", request_id="TD-1")))


def test_known_batches() -> None:
    assert known_batches(_entries(_received("a"), _received("b", "b2"), _event("published"))) == {"b1", "b2"}
