"""The ledger: append-only, signed whole transactions, readers beside a writer, and every kind of tampering found."""

from __future__ import annotations

import base64
import hashlib
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
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import chain
from pipeline import ledger as ledger_module
from pipeline.chain import GENESIS, leaf_data
from pipeline.errors import NoSpace, NotAWorkspace, StoreDamaged, TakedownError, UsageError, WorkspaceBusy
from pipeline.files import canonical_json, digest_json
from pipeline.keys import create_keys, load_log_key, log_vkey
from pipeline.ledger import SCHEMA, Ledger
from pipeline.merkle import leaf_hash, root_of_hashes
from pipeline.notes import Checkpoint, checkpoint_text, read_checkpoint, sign_note
from pipeline.records import Event, LedgerEntry

AT = datetime(2026, 11, 23, 9, 0, tzinfo=UTC)
ORIGIN = "takedown-pipeline/0011223344556677"
TRIGGERS = [statement for statement in SCHEMA if statement.startswith("CREATE TRIGGER")]


def _received(request_id: str, batch_id: str = "b1") -> Event:
    data = {"batch_id": batch_id, "received_at": "2026-11-20T08:00:00Z", "commitment": f"c-{request_id}"}
    return Event(kind="received", actor="test", request_id=request_id, data=data)


def _event(kind: str, **fields: Any) -> Event:
    return Event(kind=kind, actor="test", **fields)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger of four entries, closed: everything is in the one file."""
    path = tmp_path / "ledger.db"
    create_keys(path.parent / "keys", ORIGIN)
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
        for statement in TRIGGERS:
            connection.execute(f"DROP TRIGGER {statement.split()[2]}")
        for statement in statements:
            connection.execute(statement)
        for statement in TRIGGERS if restore else ():
            connection.execute(statement)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


# --- writing and reading ----------------------------------------------------------------------------------


def test_entries_are_numbered_dated_and_chained(path: Path) -> None:
    with Ledger.open(path) as ledger:
        entries = ledger.entries()
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
    create_keys(tmp_path / "keys", ORIGIN)
    with Ledger.create(tmp_path / "ledger.db") as ledger:
        assert ledger.entries() == ()
        assert ledger.checkpoint() is None
        assert ledger.leaves() == []
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
    create_keys(path.parent / "keys", ORIGIN)
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
@pytest.mark.parametrize(("keys_mode", "expected"), [(0o755, []), (0o700, ["keys/log.pub"])])
def test_an_auditor_reads_a_folder_that_he_cannot_write(path: Path, keys_mode: int, expected: list[str]) -> None:
    """Without the public key he can read the entries, and is told that he cannot check the signatures."""
    code = """
import os, sys
from pathlib import Path
from pipeline.ledger import Ledger
folder = os.open(sys.argv[1], os.O_RDONLY)
os.fchdir(folder); os.setuid(65534)
with Ledger.open(Path("ledger.db"), read_only=True) as ledger:
    assert len(ledger.entries()) == 4 and [b.where for b in ledger.check()] == sys.argv[2:]
"""
    folder = Path("/tmp") / f"takedown-ledger-{os.getpid()}"
    shutil.copytree(path.parent, folder)
    try:
        folder.chmod(0o555)
        (folder / "keys").chmod(keys_mode)  # the private keys in it stay 0600
        (folder / "ledger.db").chmod(0o444)
        subprocess.run([sys.executable, "-c", code, str(folder), *expected], check=True)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o555
        assert sorted(p.name for p in folder.iterdir()) == ["checkpoint", "keys", "ledger.db"]
    finally:
        shutil.rmtree(folder)


@pytest.mark.slow
def test_kill_9_loses_nothing_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    create_keys(tmp_path / "keys", ORIGIN)
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
        "UPDATE checkpoints SET note = note",
        "DELETE FROM checkpoints WHERE size = 1",
        "REPLACE INTO checkpoints VALUES (4, '')",
        "INSERT OR REPLACE INTO checkpoints VALUES (1, '')",
        "INSERT INTO checkpoints VALUES (5, '')",
        "INSERT INTO checkpoints VALUES (NULL, '')",
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
    "checkpoint note": (
        "UPDATE checkpoints SET note = replace(note, char(10) || '3', char(10) || '2') WHERE size = 3",
        "checkpoint 3: signed note",
    ),
    "checkpoint a blob": ("UPDATE checkpoints SET note = x'00' WHERE size = 4", "checkpoint 4: signed note"),
    "checkpoint not Unicode": (
        "UPDATE checkpoints SET note = CAST(x'ff' AS TEXT) WHERE size = 4",
        "checkpoint 4: signed note",
    ),
    "checkpoint of another size": ("UPDATE checkpoints SET size = 2 WHERE size = 1", "checkpoint 2: signs 1 entries"),
    "checkpoint of no size": ("UPDATE checkpoints SET size = 0 WHERE size = 1", "checkpoint 0: signs 0 entries"),
    "checkpoint too large": ("UPDATE checkpoints SET size = 9 WHERE size = 1", "checkpoint 9: signs 9 entries"),
    "checkpoint of others": (
        "INSERT INTO checkpoints SELECT 2, note FROM checkpoints WHERE size = 3",
        "checkpoint 2: signs 3 entries",
    ),
    "last checkpoint removed": ("DELETE FROM checkpoints WHERE size = 4", "the last checkpoint signs 3 entries"),
    "checkpoints removed": ("DELETE FROM checkpoints", "the last checkpoint signs 0 entries, there are 4"),
    "checkpoints dropped": ("DROP TABLE checkpoints", "cannot be read"),
    "column added": ("ALTER TABLE entries ADD COLUMN note", "entries: was changed"),
    "foreign table": ("CREATE TABLE notes (x)", "notes: is foreign"),
    "foreign index": ("CREATE UNIQUE INDEX extra ON entries (digest)", "extra: is foreign"),
    "foreign trigger": ("CREATE TRIGGER x AFTER INSERT ON entries BEGIN SELECT 1; END", "x: is foreign"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_tampering_is_found_and_named(path: Path, name: str) -> None:
    statement, expected = TAMPERED[name]
    dropped = statement.startswith("DROP TABLE")
    with Ledger.open(path, read_only=True) as before:
        _tamper(path, statement, restore=not dropped)
        found = [f"{b.where}: {b.found}" for b in before.check()]  # opened before: even a table that vanishes is found
    assert any(expected in line for line in found), found
    if not dropped:
        assert found == _check(path)
        with Ledger.open(path, read_only=True) as ledger:
            if any("ledger.db: entry" in line for line in found):
                with pytest.raises(StoreDamaged, match="does not hold"):
                    ledger.entries()


@pytest.mark.parametrize("statement", TRIGGERS)
def test_a_missing_or_weakened_trigger_is_found(path: Path, statement: str) -> None:
    name = statement.split()[2]
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"DROP TRIGGER {name}")
        assert _check(path) == [f"ledger.db: {name}: is missing"]
        connection.execute(statement.replace("RAISE(ABORT, 'the ledger is append-only')", "1"))
    assert _check(path) == [f"ledger.db: {name}: was changed"]


def _raw(path: Path) -> list[tuple[int, str, str, str, str]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT seq, at, event, previous, digest FROM entries ORDER BY seq").fetchall()


def _notes(path: Path) -> dict[int, str]:
    with closing(sqlite3.connect(path)) as connection:
        return dict(connection.execute("SELECT size, note FROM checkpoints ORDER BY size"))


def _chained(rows: list[tuple[int, str, dict[str, Any]]], previous: str) -> list[tuple[int, str, str, str, str]]:
    """Rows with all digests computed anew, as someone who has this source would."""
    made = []
    for seq, at, tree in rows:
        digest = digest_json({"seq": seq, "at": at, "event": tree, "previous": previous})
        made.append((seq, at, canonical_json(tree).decode(), previous, digest))
        previous = digest
    return made


def _literal(row: tuple[int, str, str, str, str]) -> str:
    seq, *texts = row
    return ", ".join([str(seq), *(f"'{text}'" for text in texts)])


def _rechain(path: Path, first: int, last: int, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite entries, with a chain that holds up to the last of them."""
    rows = [(seq, at, json.loads(event)) for seq, at, event, _, _ in _raw(path)[first - 1 : last]]
    for _, _, tree in rows:
        change(tree)
    made = _chained(rows, _raw(path)[first - 1][3])
    _tamper(path, *(f"REPLACE INTO entries VALUES ({_literal(row)})" for row in made))


def _root(leaves: list[bytes]) -> bytes:
    """RFC 6962, section 2.1, word for word: independent of `pipeline.merkle`."""
    if not leaves:
        return hashlib.sha256().digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    split = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\x01" + _root(leaves[:split]) + _root(leaves[split:])).digest()


def _leaves(path: Path) -> list[bytes]:
    """The leaves, from the rows alone: JSON with sorted keys and no spaces, as the ledger's head says."""
    return [
        json.dumps(
            {"at": at, "event": json.loads(event), "previous": previous, "seq": seq},
            sort_keys=True, separators=(",", ":"),
        ).encode()
        for seq, at, event, previous, _ in _raw(path)
    ]  # fmt: skip


def _resign(path: Path, keys: Path) -> None:
    """Sign every checkpoint anew over what the entries are now, with the key of a folder; the file beside, too."""
    leaves, key = _leaves(path), load_log_key(keys)
    notes = {
        size: sign_note(checkpoint_text(Checkpoint(ORIGIN, size, _root(leaves[:size]))), ORIGIN, key)
        for size in _notes(path)
        if size <= len(leaves)
    }
    _tamper(
        path, "DELETE FROM checkpoints", *(f"INSERT INTO checkpoints VALUES ({n}, '{t}')" for n, t in notes.items())
    )
    path.with_name("checkpoint").write_text(notes[max(notes)])


def _rename(tree: dict[str, Any]) -> None:
    tree["actor"] = "nobody"


def test_a_partly_rewritten_chain_breaks_where_the_rewriting_ends(path: Path) -> None:
    _rechain(path, 2, 3, _rename)
    assert [line.split(" names")[0].split(" signs")[0] for line in _check(path)] == [
        "ledger.db: entry 4:",
        "ledger.db: checkpoint 3:",
        "ledger.db: checkpoint 4:",
    ]


def test_a_wholly_rewritten_end_does_not_match_its_signature(path: Path) -> None:
    """What a hash chain alone would not show."""
    _rechain(path, 2, 4, _rename)
    assert [line.split(" signs")[0] for line in _check(path)] == [
        "ledger.db: checkpoint 3:",
        "ledger.db: checkpoint 4:",
    ]
    with Ledger.open(path) as ledger, pytest.raises(StoreDamaged, match="not those of its last signed checkpoint"):
        ledger.append(_received("x"))
    assert len(_raw(path)) == 4


def test_a_history_rewritten_with_the_key_shows_only_against_a_checkpoint_noted_elsewhere(path: Path) -> None:
    """The limit of signatures, written down: this is why copies of ``checkpoint`` should be kept by somebody else."""
    noted = path.with_name("checkpoint").read_text()
    _rechain(path, 2, 4, _rename)
    _resign(path, path.with_name("keys"))
    assert _check(path) == []
    with Ledger.open(path, read_only=True) as ledger:
        assert ledger.checkpoint() != noted
    # Both are signed by the lineage, over the same number of entries, with other roots: a proof of the rewriting.
    old, new = (read_checkpoint(n, log_vkey(path.with_name("keys"))) for n in (noted, _notes(path)[4]))
    assert old.size == new.size and old.root != new.root


def test_a_history_signed_with_another_key_is_found(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "keys"
    other.parent.mkdir()
    create_keys(other, ORIGIN)
    _rechain(path, 1, 4, _rename)
    _resign(path, other)
    found = _check(path)
    assert [line.split(": ")[1] for line in found] == ["checkpoint 1", "checkpoint 3", "checkpoint 4"]
    assert all("has no signature of" in line for line in found)


def _cut(path: Path, size: int) -> None:
    """Cut the ledger back to one of its checkpoints, with SQLite's counter, leaving no trace in the database."""
    _tamper(
        path,
        f"DELETE FROM entries WHERE seq > {size}",
        f"DELETE FROM checkpoints WHERE size > {size}",
        f"UPDATE sqlite_sequence SET seq = {size}" if size else "DELETE FROM sqlite_sequence",
    )


@pytest.mark.parametrize("size", [0, 1, 3])
def test_a_cut_end_shows_against_the_checkpoint_file_and_nothing_is_written(path: Path, size: int) -> None:
    note = path.with_name("checkpoint").read_bytes()
    _cut(path, size)
    (found,) = _check(path)
    assert found.startswith("checkpoint: ")
    for _ in range(2):
        with pytest.raises(StoreDamaged, match=f"checkpoint signs 4 entries, the ledger has {size}"):
            Ledger.open(path)
    assert path.with_name("checkpoint").read_bytes() == note, "what shows the cut must not be written over"
    assert len(_raw(path)) == size


def test_a_cut_end_with_an_old_checkpoint_file_shows_only_against_one_noted_elsewhere(path: Path) -> None:
    _cut(path, 3)
    path.with_name("checkpoint").write_text(_notes(path)[3])
    assert _check(path) == []


def test_entries_cut_without_their_checkpoint_are_found_and_not_built_on(path: Path) -> None:
    _tamper(path, "DELETE FROM entries WHERE seq = 4", "UPDATE sqlite_sequence SET seq = 3")
    assert _check(path) == [
        "ledger.db: checkpoint 4: signs 4 entries, there are 3",
        "ledger.db: the last checkpoint signs 4 entries, there are 3",
    ]
    with Ledger.open(path) as ledger, pytest.raises(StoreDamaged, match="its 3 entries are not those"):
        ledger.append(_received("x"))


def test_an_unsigned_row_with_a_sound_chain_is_found_and_not_built_on(path: Path) -> None:
    tree = _event("published", version=7).model_dump(mode="json")
    (row,) = _chained([(5, "2026-11-23T09:00:00.000000Z", tree)], _raw(path)[-1][4])
    _tamper(path, f"INSERT INTO entries VALUES ({_literal(row)})")
    with pytest.raises(StoreDamaged, match=r"its 5 entries are not those of its last signed checkpoint \(4\)"):
        _entries(path)  # though the chain by itself holds
    assert _check(path) == ["ledger.db: the last checkpoint signs 4 entries, there are 5"]
    with Ledger.open(path) as ledger, pytest.raises(StoreDamaged, match="Nothing is shown of them or written"):
        ledger.append(_received("x"))
    assert len(_raw(path)) == 5 and len(_notes(path)) == 3


# --- checkpoints ------------------------------------------------------------------------------------------


def test_every_transaction_is_signed_over_all_entries_so_far(path: Path) -> None:
    leaves = _leaves(path)
    with Ledger.open(path) as ledger:
        assert ledger.leaves() == leaves
        assert ledger.checkpoint() == _notes(path)[4]
    assert [f"sha256:{hashlib.sha256(leaf).hexdigest()}" for leaf in leaves] == [row[4] for row in _raw(path)]
    assert list(_notes(path)) == [1, 3, 4]  # one, two and one entries
    for size, note in _notes(path).items():
        origin, count, root, empty, signature = note.removesuffix("\n").split("\n")
        assert (origin, count, empty) == (ORIGIN, str(size), "")
        assert base64.b64decode(root) == _root(leaves[:size])
        assert signature.startswith(f"— {ORIGIN} ")
        assert read_checkpoint(note, log_vkey(path.with_name("keys"))).size == size
    assert path.with_name("checkpoint").read_text() == _notes(path)[4]


def test_a_long_ledger_is_signed_over_all_of_it(path: Path) -> None:
    with Ledger.open(path) as ledger:
        ledger._connection.execute("PRAGMA synchronous=OFF")  # speed; durability is not the point here
        for count in (1, 2, 3, 5, 8):
            ledger.append(*(_received(f"{count}-{i}") for i in range(count)))
            checkpoint = read_checkpoint(str(ledger.checkpoint()), log_vkey(path.with_name("keys")))
            assert (checkpoint.size, checkpoint.root) == (len(_raw(path)), _root(_leaves(path)))
        assert ledger.check() == []


def test_an_empty_append_signs_nothing(path: Path) -> None:
    with Ledger.open(path) as ledger:
        ledger.append()
    assert list(_notes(path)) == [1, 3, 4]


def test_without_the_key_nothing_is_written(path: Path) -> None:
    (path.with_name("keys") / "log.key").unlink()
    with Ledger.open(path) as ledger:
        with pytest.raises(StoreDamaged, match=r"log\.key"):
            ledger.append(_received("x"))
        assert ledger.check() == []  # checking needs the public key only
    assert len(_raw(path)) == 4 and list(_notes(path)) == [1, 3, 4]


def test_without_the_public_key_nothing_holds(path: Path) -> None:
    (path.with_name("keys") / "log.pub").unlink()
    (found,) = _check(path)
    assert found.startswith("keys/log.pub: ")


@pytest.mark.parametrize("moments", [("_beside",), ("_check_counter",), ("_beside", "_check_counter")])
def test_a_check_beside_a_running_writer_sees_no_rewritten_history(
    path: Path, monkeypatch: pytest.MonkeyPatch, moments: tuple[str, ...]
) -> None:
    """A writer commits, and renews the checkpoint file, behind the first look at that file, and behind the snapshot."""

    def write_behind(name: str) -> None:
        plain = getattr(Ledger, name)

        def then_written(self: Ledger, *arguments: Any) -> Any:
            found = plain(self, *arguments)
            monkeypatch.setattr(Ledger, name, plain)  # once
            with Ledger.open(path) as writer:
                writer.append(Event(kind="note", actor="writer"))
            return found

        monkeypatch.setattr(Ledger, name, then_written)

    for name in moments:
        write_behind(name)
    with Ledger.open(path, read_only=True) as reader:
        assert reader.check() == []
    with Ledger.open(path, read_only=True) as reader:
        assert len(reader.entries()) == 4 + len(moments), "the writer did write"


def test_a_crash_before_the_checkpoint_file_is_mended_by_the_next_writer(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = path.with_name("checkpoint").read_bytes()

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, Ledger.open(path) as ledger:
        patch.setattr(ledger_module, "write_atomic", crash)
        with pytest.raises(KeyboardInterrupt):
            ledger.append(_received("x"))
    assert path.with_name("checkpoint").read_bytes() == old
    assert _check(path) == ["checkpoint: is not the newest checkpoint of the ledger"]
    with Ledger.open(path, read_only=True) as ledger:
        assert len(ledger.entries()) == 5, "it was committed"
    assert path.with_name("checkpoint").read_bytes() == old, "a reader writes nothing"
    Ledger.open(path).close()
    assert path.with_name("checkpoint").read_text() == _notes(path)[5]
    assert _check(path) == []


def test_a_full_disk_behind_the_transaction_says_that_the_entries_are_in(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(target: Path, *_: object) -> None:
        raise NoSpace(f"{target}: full. Nothing was published.")

    with monkeypatch.context() as patch, Ledger.open(path) as ledger:
        patch.setattr(ledger_module, "write_atomic", full)
        with pytest.raises(NoSpace, match="1 new entries are there and signed") as error:
            ledger.append(_received("x"))
        assert "Nothing" not in str(error.value)
    assert len(_raw(path)) == 5
    with Ledger.open(path) as ledger:
        assert ledger.check() == []


@pytest.mark.parametrize("content", [None, b"", b"junk", b"\xff" * 300])
def test_a_lost_or_spoilt_checkpoint_file_is_found_and_mended(path: Path, content: bytes | None) -> None:
    file = path.with_name("checkpoint")
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    (found,) = _check(path)
    assert found.startswith("checkpoint: ")
    Ledger.open(path).close()
    assert _check(path) == []


def test_every_flipped_byte_of_the_checkpoint_file_is_found(path: Path) -> None:
    file = path.with_name("checkpoint")
    data = file.read_bytes()
    for at in range(len(data)):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        assert [line.split(":")[0] for line in _check(path)] == ["checkpoint"], f"byte {at}"


def test_every_flipped_byte_of_a_stored_checkpoint_is_found(path: Path) -> None:
    data = path.read_bytes()
    places = [at for note in _notes(path).values() for at in _places(data, note.encode())]
    assert len(places) > 500
    for at in places:
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        assert _check(path), f"byte {at}"


def test_a_quick_look_checks_every_root_and_the_newest_signature(path: Path, tmp_path: Path) -> None:
    with Ledger.open(path, read_only=True) as ledger:
        assert ledger.examine(every_signature=False) == (ledger.entries(), [])
    _tamper(path, "UPDATE checkpoints SET note = 'x' WHERE size = 1")
    with Ledger.open(path, read_only=True) as ledger:
        assert ledger.examine(every_signature=False)[1] == []
        assert [b.where for b in ledger.examine()[1]] == ["ledger.db: checkpoint 1"]
    _tamper(path, "UPDATE checkpoints SET note = 'x' WHERE size = 4")
    with Ledger.open(path, read_only=True) as ledger:
        found = [b.where for b in ledger.examine(every_signature=False)[1]]
    assert found == ["ledger.db: checkpoint 4", "checkpoint"]


# --- what was checked once --------------------------------------------------------------------------------


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the rows that are parsed and hashed, in order."""
    seen: list[int] = []

    def count(module: ModuleType, name: str) -> None:
        parse = getattr(module, name)

        def counting(row: Any) -> Any:
            seen.append(row.seq)
            return parse(row)

        monkeypatch.setattr(module, name, counting)

    count(ledger_module, "read_row")
    count(chain, "read_row")
    count(chain, "_entry_of")
    monkeypatch.setattr(chain, "_newest", chain._NOTHING)
    return seen


def _entries(path: Path) -> tuple[LedgerEntry, ...]:
    with Ledger.open(path, read_only=True) as ledger:
        return ledger.entries()


def test_a_row_is_parsed_once_in_a_process(path: Path, parsed: list[int]) -> None:
    first = _entries(path)
    assert parsed == [1, 2, 3, 4]
    assert _entries(path) == first
    assert parsed == [1, 2, 3, 4]
    with Ledger.open(path) as ledger:
        ledger.append(_received("x"))
        assert len(ledger.entries()) == 5
    assert parsed == [1, 2, 3, 4, 5]
    assert _check(path) == []
    assert parsed == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5], "`verify` trusts no earlier look"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.lists(st.dictionaries(st.text(), JSON, max_size=3), max_size=4))
def test_what_is_signed_reads_as_what_is_checked(path: Path, data: list[dict[str, object]]) -> None:
    """Rows whose root is signed are not looked at one by one; they give the same entries, kinds of numbers included."""
    with Ledger.open(path) as ledger:
        ledger.append(*(Event(kind="planned", actor="a", data=d) for d in data))
    chain._newest = chain._NOTHING
    quick = _entries(path)
    chain._newest = chain._NOTHING
    with mock.patch.object(ledger_module, "check_signed", return_value=None):
        slow = _entries(path)
    assert quick == slow
    assert repr(quick) == repr(slow)
    assert [e.model_dump_json() for e in quick] == [e.model_dump_json() for e in slow]
    assert [e.model_fields_set for e in quick] == [e.model_fields_set for e in slow]


LOOSENED = (
    "ALTER TABLE entries RENAME TO old",
    "CREATE TABLE entries (seq, at, event, previous, digest)",
    "INSERT INTO entries SELECT * FROM old",
    "DROP TABLE old",
)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET seq = 3.0 WHERE seq = 3",
        "UPDATE entries SET seq = 1.0 WHERE seq = 1",
        "INSERT INTO entries VALUES (9e999, 'a', '{}', 'p', 'd')",
        "INSERT INTO entries VALUES (-9e999, 'a', '{}', 'p', 'd')",
    ],
)
def test_a_number_that_is_only_equal_is_none(path: Path, statement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """2.0 gives the same leaf as 2, so that the root holds; what is read and what is written on top must not."""
    _tamper(path, *LOOSENED, statement)
    monkeypatch.setattr(chain, "_newest", chain._NOTHING)
    with pytest.raises(StoreDamaged):
        _entries(path)
    with pytest.raises(StoreDamaged), Ledger.open(path) as ledger:
        ledger.append(_received("x"))


@pytest.mark.parametrize("at", ["2026-11-24", "2026-11-23T10:00:00.000000+01:00", "9999-12-31T23:59:59.999999-23:00"])
def test_a_signed_time_in_another_form_is_refused(path: Path, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the owner of the key signed it: what reads it would not know when that is."""
    text = canonical_json(_received("x").model_dump(mode="json")).decode()
    with closing(sqlite3.connect(path)) as connection, connection:
        rows = connection.execute("SELECT seq, at, event, previous, digest FROM entries ORDER BY seq").fetchall()
        leaf = leaf_data(5, at, text, rows[-1][4])
        rows.append((5, at, text, rows[-1][4], f"sha256:{hashlib.sha256(leaf).hexdigest()}"))
        connection.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?)", rows[-1])
        root = root_of_hashes([leaf_hash(leaf_data(*r[:4])) for r in rows])
        note = sign_note(checkpoint_text(Checkpoint(ORIGIN, 5, root)), ORIGIN, load_log_key(path.parent / "keys"))
        connection.execute("INSERT INTO checkpoints VALUES (5, ?)", (note,))
    monkeypatch.setattr(chain, "_newest", chain._NOTHING)
    with pytest.raises(StoreDamaged, match="time"):
        _entries(path)


def test_only_what_another_process_added_is_parsed(path: Path, tmp_path: Path, parsed: list[int]) -> None:
    """And rows that are the same are not parsed again though they lie in another file."""
    copy = tmp_path / "copy" / "ledger.db"
    shutil.copytree(path.parent, copy.parent, ignore=shutil.ignore_patterns("copy"))
    first = _entries(path)
    code = """
import sys
from pathlib import Path
from pipeline.ledger import Ledger
from pipeline.records import Event
with Ledger.open(Path(sys.argv[1])) as ledger:
    ledger.append(Event(kind="empty", actor="a"))
"""
    subprocess.run([sys.executable, "-c", code, str(copy)], check=True)
    assert _entries(copy)[:4] == first
    assert parsed == [1, 2, 3, 4, 5]
    assert _entries(path) == first, "a shorter ledger is not taken for the longer one"


@pytest.mark.parametrize("name", [n for n, (statement, _) in TAMPERED.items() if "TABLE" not in statement])
def test_what_changes_between_two_reads_of_a_process_is_noticed(path: Path, name: str) -> None:
    """By a reader that was open all the time, by a fresh one, and by a writer."""
    with Ledger.open(path, read_only=True) as reader:
        assert reader.entries() == _entries(path)
        before = _bytes(path)
        _tamper(path, TAMPERED[name][0])
        if _bytes(path) == before:
            return  # schema or checkpoints: the former is for `verify`, the newest of the latter has a test below
        for read in (reader.entries, lambda: _entries(path)):
            with pytest.raises(StoreDamaged):
                read()
    with pytest.raises(StoreDamaged), Ledger.open(path) as writer:
        writer.append(_received("x"))


def _bytes(path: Path) -> list[tuple[Any, ...]]:
    """Every row as bytes; after tampering they may be anything."""
    with closing(sqlite3.connect(path)) as connection:
        connection.text_factory = bytes
        return connection.execute("SELECT * FROM entries ORDER BY seq").fetchall()


@pytest.mark.parametrize("column", ["at", "event", "digest"])
def test_the_same_bytes_of_another_kind_are_noticed(path: Path, column: str) -> None:
    assert len(_entries(path)) == 4
    _tamper(path, f"UPDATE entries SET {column} = CAST({column} AS BLOB) WHERE seq = 2")
    with pytest.raises(StoreDamaged, match="a column does not hold the kind of value"):
        _entries(path)


# --- what reading refuses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("DELETE FROM checkpoints", "are not those of its last signed checkpoint .there is none."),
        ("DELETE FROM checkpoints WHERE size = 4", "its 4 entries are not those of its last signed checkpoint .3."),
        ("UPDATE checkpoints SET note = replace(note, '4', '3') WHERE size = 4", "newest checkpoint does not hold"),
        ("UPDATE checkpoints SET note = x'00' WHERE size = 4", "newest checkpoint does not hold"),
        ("UPDATE checkpoints SET note = CAST(x'ff' AS TEXT) WHERE size = 4", "newest checkpoint does not hold"),
    ],
)
def test_entries_that_nobody_signed_are_not_shown(path: Path, statement: str, expected: str) -> None:
    assert len(_entries(path)) == 4
    _tamper(path, statement)
    with pytest.raises(StoreDamaged, match=expected):
        _entries(path)


def test_entries_signed_with_another_key_are_not_shown(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "keys"
    other.parent.mkdir()
    create_keys(other, ORIGIN)
    _rechain(path, 1, 4, _rename)
    _resign(path, other)
    with pytest.raises(StoreDamaged, match="has no signature of"):
        _entries(path)


def test_a_missing_public_key_is_told_and_nothing_shown(path: Path) -> None:
    (path.with_name("keys") / "log.pub").unlink()
    with pytest.raises(StoreDamaged, match=r"log\.pub: is missing"):
        _entries(path)


@pytest.mark.parametrize("size", [1, 3])
def test_a_ledger_that_was_cut_back_is_not_shown(path: Path, size: int) -> None:
    note = path.with_name("checkpoint").read_text()
    _cut(path, size)
    with pytest.raises(StoreDamaged, match=f"checkpoint signs 4 entries, the ledger has {size}"):
        _entries(path)
    path.with_name("checkpoint").write_text(note.replace("—", "-"))  # no checkpoint: `verify` names it
    assert len(_entries(path)) == size


def test_one_state_is_read_whatever_is_committed_meanwhile(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Ledger._rows

    def slow(self: Ledger) -> Any:
        found = rows(self)
        if self is reader:
            with monkeypatch.context() as patch, Ledger.open(path) as writer:
                patch.setattr(Ledger, "_rows", rows)
                writer.append(_received("x"))
        return found

    with Ledger.open(path, read_only=True) as reader:
        monkeypatch.setattr(Ledger, "_rows", slow)
        assert len(reader.entries()) == 4
        assert reader.check() == []
    assert len(_entries(path)) == 6


# --- damage -----------------------------------------------------------------------------------------------


def test_nothing_is_built_on_a_damaged_head(path: Path) -> None:
    _tamper(path, TAMPERED["event"][0].replace("seq = 2", "seq = 4"))
    with Ledger.open(path) as ledger, pytest.raises(StoreDamaged, match="entry 4"):
        ledger.append(_received("x"))
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM entries").fetchone() == (4,)


def _places(data: bytes, part: bytes) -> range:
    return range(data.index(part), data.index(part) + len(part))


def test_every_flipped_byte_of_a_row_is_found(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT at || event || previous || digest FROM entries").fetchall()
    data = path.read_bytes()
    places = [at for (row,) in rows for at in _places(data, row.encode())]
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
