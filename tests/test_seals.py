"""Seals over the two databases: what is compared, what is explained, who writes them when, and what is never sealed."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import BinaryIO
from unittest import mock

import pytest
from histories import array_model, entries_of, make_step, start_history
from tampered.calls import call_in as call
from tampered.scene import flip, settle, unused_byte
from workspaces import copied, draw_text, take_in

from pipeline.errors import NoSpace, StoreDamaged
from pipeline.keys import log_vkey
from pipeline.ledger import Ledger
from pipeline.records import Event
from pipeline.requests import note
from pipeline.seals import INDEX, Seal, read_seal, renew, seal_text, seals_are_kept
from pipeline.verify import seal_notes, verify
from pipeline.workspace import Workspace, writing

DIGEST, OTHER = "sha256:" + "0" * 64, "sha256:" + "1" * 64


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """v1 without TD-1."""
    folder = tmp_path_factory.mktemp("made")
    workspace = start_history(folder / "store", array_model(folder / "model"))
    make_step(workspace, "TD-1")
    settle(workspace)
    return workspace.root


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Workspace:
    return copied(made, tmp_path / "store")


def seal_of(store: Workspace) -> Seal:
    return read_seal((store.root / "seal").read_bytes(), log_vkey(store.keys))


def test_a_workspace_has_a_seal_from_its_first_moment(tmp_path: Path) -> None:
    store = start_history(tmp_path / "store", array_model(tmp_path / "model"))
    assert seals_are_kept(entries_of(store))
    assert (seal_of(store).entries, seal_of(store).index) == (1, None)
    assert verify(store) == [] and seal_notes(store) == ()


def test_the_end_of_a_writing_command_seals_what_it_wrote(store: Workspace) -> None:
    before = seal_of(store)
    assert before.entries == len(entries_of(store)) and before.index is not None
    take_in(store, "batch-2", {"TD-2": draw_text("TD-2", 30)})
    after = seal_of(store)
    assert after.entries == len(entries_of(store)) == before.entries + 1
    assert after.ledger != before.ledger and after.index == before.index
    assert verify(store) == []


def test_a_command_that_writes_nothing_leaves_the_seal(store: Workspace) -> None:
    before = (store.root / "seal").stat()
    with writing(store):
        pass
    after = (store.root / "seal").stat()  # the time of access changes with the reading
    assert (after.st_ino, after.st_mtime_ns, after.st_ctime_ns) == (
        before.st_ino,
        before.st_mtime_ns,
        before.st_ctime_ns,
    )


@pytest.fixture
def digested(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files of which every byte was digested as a stream, as they are."""
    from pipeline import seals

    found, real = list[str](), seals.digest_stream

    def noting(stream: BinaryIO) -> str:
        found.append(Path(stream.name).name)
        return real(stream)

    monkeypatch.setattr(seals, "digest_stream", noting)
    return found


def test_the_index_is_digested_where_it_is_compared_or_changed_and_only_there(
    store: Workspace, digested: list[str]
) -> None:
    take_in(store, "batch-2", {"TD-2": draw_text("TD-2", 30)})
    assert seal_notes(store) == () and digested == [], "intake writes to the ledger alone, notes need the state alone"
    assert call(store, "verify", "--quick").code == 0 and digested == []
    assert call(store, "verify").code == 0 and digested == ["index.db"]
    make_step(store, "TD-3")
    assert len(digested) > 1 and verify(store) == []


def test_a_quick_check_does_not_open_the_index(store: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import seals

    monkeypatch.setattr(seals, "index_file", mock.Mock(side_effect=AssertionError("opened")))
    assert call(store, "verify", "--quick").code == 0
    with pytest.raises(AssertionError, match="opened"):
        seal_notes(store)


def test_a_command_that_died_is_explained_and_the_next_one_seals(store: Workspace) -> None:
    with Ledger.open(store.ledger) as ledger:
        ledger.append(Event(kind="hold", actor="tester", request_id="TD-1", data={"reason": "litigation"}))
    assert verify(store) == []
    (told,) = seal_notes(store)
    assert "the ledger has" in told and "the next writing command renews the seal" in told
    note(store, "released", "TD-1", "tester", "order lifted")
    assert verify(store) == [] and seal_notes(store) == ()


def test_an_index_that_a_run_changed_before_it_died_is_explained(store: Workspace) -> None:
    from pipeline.index import DedupeIndex

    with DedupeIndex.open(store.index) as index:
        index.remove("TD-1")
    assert verify(store) == []
    (told,) = seal_notes(store)
    assert "of another state of the index" in told
    with writing(store):
        pass
    assert seal_notes(store) == () and verify(store) == []


def test_an_index_may_be_deleted_and_made_again(store: Workspace) -> None:
    path = store.root / INDEX
    path.unlink()
    assert verify(store) == []
    with writing(store):
        pass
    assert seal_of(store).index is None
    make_step(store, "TD-2")
    assert seal_of(store).index is not None and verify(store) == []


@pytest.mark.parametrize("name", ["ledger.db", INDEX])
def test_a_byte_that_nothing_reads_is_found_and_not_sealed_anew(store: Workspace, name: str) -> None:
    flip(store.root / name, unused_byte(store.root / name))
    for _ in range(2):
        (found,) = verify(store)
        assert found.where == name and found.found == "its bytes are not those that were sealed"
        assert "all that is read of it holds" in found.means
        with writing(store):  # which writes nothing
            pass


def test_bytes_behind_the_last_page_are_found(store: Workspace) -> None:
    with store.ledger.open("ab") as stream:
        stream.write(b"x")
    (found,) = verify(store)
    assert found.found == "1 bytes follow behind its last page"


def test_a_count_of_transactions_that_contradicts_itself_is_found(store: Workspace) -> None:
    flip(store.root / INDEX, 27)
    (found,) = verify(store)
    assert "transactions in one place" in found.found


def test_a_seal_that_was_deleted_is_missed_and_made_again(store: Workspace) -> None:
    (store.root / "seal").unlink()
    (found,) = verify(store)
    assert (found.where, found.found) == ("seal", "is missing")
    with writing(store):
        pass
    assert verify(store) == []


def test_an_older_copy_of_the_ledger_contradicts_its_seal(store: Workspace, made: Path) -> None:
    take_in(store, "batch-2", {"TD-2": draw_text("TD-2", 30)})
    settle(store)
    for name in ("ledger.db", "checkpoint"):
        (store.root / name).write_bytes((made / name).read_bytes())
    assert "seal" in {b.where for b in verify(store)}


def test_a_writer_on_the_way_is_no_break(store: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole command runs between reading the seal and reading the ledger."""
    from pipeline import verify as checking

    def late(workspace: Workspace) -> bytes:
        found = (workspace.root / "seal").read_bytes()
        take_in(workspace, "batch-2", {"TD-2": draw_text("TD-2", 30)})
        return found

    monkeypatch.setattr(checking, "_seal", late)
    assert verify(store) == []


def test_readers_and_their_locks_change_no_byte(store: Workspace) -> None:
    before = {name: (store.root / name).read_bytes() for name in ("ledger.db", INDEX)}
    entries_of(store)
    assert verify(store) == []
    assert {name: (store.root / name).read_bytes() for name in before} == before


def test_a_reader_that_holds_the_ledger_does_not_hinder_sealing(store: Workspace) -> None:
    """Its snapshot keeps the write-ahead log from being folded in; the seal is over the pages, wherever they are."""
    with closing(sqlite3.connect(f"{store.ledger.as_uri()}?mode=ro", uri=True, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM entries").fetchall()
        take_in(store, "batch-2", {"TD-2": draw_text("TD-2", 30)})
        assert verify(store) == [] and seal_notes(store) == ()
    settle(store)
    assert verify(store) == [] and seal_notes(store) == ()


def test_a_full_disk_says_that_the_work_is_done(store: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import seals

    def full(path: Path, data: bytes) -> None:
        raise NoSpace(f"{path}: full")

    with monkeypatch.context() as patch:
        patch.setattr(seals, "write_atomic", full)
        with pytest.raises(NoSpace, match="is done and on record; only this seal is old"):
            note(store, "hold", "TD-1", "tester", "litigation")
    assert entries_of(store)[-1].event.kind == "hold"
    renew(store.root)
    assert seal_notes(store) == ()


@pytest.mark.parametrize("index", [None, (DIGEST, OTHER)])
def test_text_and_reading_are_inverse_and_nothing_else_is_read(store: Workspace, index: tuple[str, str] | None) -> None:
    from pipeline.keys import load_log_key
    from pipeline.notes import parse_vkey, sign_note

    vkey = log_vkey(store.keys)
    origin, key = parse_vkey(vkey).name, load_log_key(store.keys)
    seal = Seal(12, DIGEST, index)
    text = seal_text(seal, origin)
    assert read_seal(sign_note(text, origin, key).encode(), vkey) == seal
    for other in (text.replace(" 12 ", " 012 "), text + "more\n", text.replace(origin, "other/lineage")):
        with pytest.raises(StoreDamaged, match="not a seal of this lineage"):
            read_seal(sign_note(other, origin, key).encode(), vkey)
    assert store.checkpoint.is_file()
    with pytest.raises(StoreDamaged, match="not a seal of this lineage"):  # nor what the same key signed of the log
        read_seal(store.checkpoint.read_bytes(), vkey)
