"""The index on disk: what it keeps, what it refuses, and that derived segments never change an answer."""

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
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasketch import MinHashLSH
from histories import entries_of
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from powerloss import Loss, Power, PowerCut
from stories import CHINESE, FERRY, ORCHARD, SYLLABLES
from workspaces import take_in

from pipeline import index as index_module
from pipeline.dedupe import dedupe
from pipeline.errors import NoSpace, StoreDamaged, UsageError, WorkspaceBusy
from pipeline.files import digest_json
from pipeline.index import DedupeIndex, examine, older_release
from pipeline.progress import listening
from pipeline.records import DedupeDecision, TakedownRequest
from pipeline.runs import plan_run
from pipeline.segments import SegmentFile, describe, sign_texts, write_segment
from pipeline.settings import DedupeSettings
from pipeline.shingles import DedupeParameters, shingle, to_lean
from pipeline.stages import dedupe_stage
from pipeline.states import excluded
from pipeline.vault import Vault
from pipeline.verify import index_notes, verify
from pipeline.workspace import Workspace, open_workspace, writing

PARAMETERS = DedupeParameters()
OLD_STORE = Path(__file__).parent / "compat" / "store-1" / "index"


def drawn(seed: int, count: int) -> str:
    """Words of a made-up language; different seeds have next to nothing in common."""
    rng = random.Random(seed)
    return " ".join("".join(rng.choices(SYLLABLES, k=2)) for _ in range(count))


@pytest.fixture
def index(tmp_path: Path) -> Iterator[DedupeIndex]:
    with DedupeIndex.open(tmp_path) as opened:
        yield opened


def decide(index: DedupeIndex, *texts: str) -> list[DedupeDecision]:
    requests = [
        TakedownRequest(
            request_id=f"N{i}", title="T", rights_holder="R", basis="copyright", batch_id="b",
            received_at=datetime(2026, 11, 23, tzinfo=UTC), text=text,
        )
        for i, text in enumerate(texts)
    ]  # fmt: skip
    return list(dedupe(requests, index, DedupeSettings()))


def test_the_file_is_private_and_holds_no_text(tmp_path: Path) -> None:
    with DedupeIndex.open(tmp_path / "index") as index:
        index.add("T1", FERRY)
        path = index.path
    assert path == tmp_path / "index" / "index.db"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    data = path.read_bytes().lower()
    assert not [word for word in FERRY.lower().split() if len(word) > 5 and word.encode() in data]
    assert [p.name for p in path.parent.iterdir()] == ["index.db"]


def test_add_is_idempotent_and_refuses_another_text(index: DedupeIndex) -> None:
    assert index.add("T1", FERRY) is True
    before = index.path.read_bytes()
    assert index.add("T1", FERRY) is False
    assert index.add("T1", FERRY.upper()) is False  # the same after normalisation
    with pytest.raises(UsageError, match="another text"):
        index.add("T1", ORCHARD)
    assert index.path.read_bytes() == before
    assert index.ids() == ("T1",)


def test_reopening_gives_the_same_answers(tmp_path: Path) -> None:
    batch = (f"{FERRY} {drawn(9, 70)}", ORCHARD, CHINESE, FERRY[50:400])
    with DedupeIndex.open(tmp_path) as index:
        index.candidates(shingle(FERRY, PARAMETERS))  # tables built before, kept up to date after
        for name, text in (("T2", ORCHARD), ("T1", FERRY), ("T3", CHINESE)):
            index.add(name, text)
        first, prints = decide(index, *batch), index.prints("T1")
    with DedupeIndex.open(tmp_path) as index:
        assert index.ids() == ("T2", "T1", "T3")
        assert decide(index, *batch) == first
        assert np.array_equal(index.prints("T1"), prints)


def test_removed_takedowns_no_longer_count(index: DedupeIndex) -> None:
    index.add("T1", FERRY)
    index.add("T2", ORCHARD)
    assert decide(index, FERRY)[0].verdict == "repeat"
    assert index.remove("T1") is True
    assert index.remove("T1") is False
    assert index.ids() == ("T2",)
    assert [d.verdict for d in decide(index, FERRY, ORCHARD)] == ["fresh", "repeat"]
    with pytest.raises(UsageError, match="T1"):
        index.prints("T1")
    assert index.add("T1", FERRY) is True


@pytest.mark.parametrize(
    "other",
    [{"seed": 2}, {"num_perm": 256}, {"bands": 32, "rows": 4}, {"shingle_words": 5}, {"window_step": 20}],
    ids=str,
)
def test_other_parameters_are_refused(tmp_path: Path, other: dict[str, int]) -> None:
    DedupeIndex.open(tmp_path).close()
    with pytest.raises(UsageError, match="Rebuild the index") as caught:
        DedupeIndex.open(tmp_path, DedupeParameters(**other))  # type: ignore[arg-type]
    assert all(f"{key} is" in str(caught.value) for key in other)
    assert "scheme is" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"), [("normaliser", "v0"), ("scheme", "legacy"), ("fingerprint", "sha1-64"), ("seed", None)]
)
def test_an_index_of_another_release_is_refused(tmp_path: Path, key: str, value: str | None) -> None:
    recorded = {**PARAMETERS.model_dump(), key: value}
    with DedupeIndex.open(tmp_path) as index:
        path = index.path
    execute(path, "UPDATE parameters SET value = ?", json.dumps(recorded))
    with pytest.raises(UsageError, match=f"{key} is {value!r}, wanted"):
        DedupeIndex.open(tmp_path)


def execute(path: Path, statement: str, *values: object) -> None:
    database = sqlite3.connect(path)
    with database:
        database.execute(statement, values)
    database.close()


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(b"not a database, whatever its name says" * 100),
        lambda p: p.write_bytes(p.read_bytes()[:5000]),
        lambda p: p.write_bytes(p.read_bytes()[:4096] + b"\xff" * 4096 + p.read_bytes()[8192:]),
        lambda p: execute(p, "DROP TABLE takedown"),
        lambda p: execute(p, "DELETE FROM parameters"),
        lambda p: execute(p, "UPDATE parameters SET value = 'x'"),
        lambda p: execute(p, "UPDATE parameters SET value = '[1]'"),
        lambda p: execute(p, "UPDATE parameters SET value = ?", "[" * 100_000),
        lambda p: execute(p, "UPDATE parameters SET value = ?", b"\xff"),
    ],
    ids=[
        "emptied",
        "not SQLite",
        "cut",
        "overwritten",
        "no table",
        "no parameters",
        "not JSON",
        "not an object",
        "deep",
        "bytes",
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    with DedupeIndex.open(tmp_path) as index:
        for i in range(5):
            index.add(f"T{i}", drawn(i, 300))
        path = index.path
    damage(path)
    with pytest.raises(StoreDamaged, match=r"index\.db.*Rebuild the index"), DedupeIndex.open(tmp_path) as index:
        index.ids()


@pytest.mark.parametrize("column", ["prints", "signatures", "request_id", "digest"])
def test_a_changed_row_is_named(tmp_path: Path, column: str) -> None:
    with DedupeIndex.open(tmp_path) as index:
        index.add("T1", FERRY)
        path = index.path
    execute(path, f"UPDATE takedown SET {column} = ?", "T9" if column == "request_id" else b"\0" * 512)
    with DedupeIndex.open(tmp_path) as index, pytest.raises(StoreDamaged, match="does not match its digest"):
        decide(index, ORCHARD)


@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("CREATE TRIGGER grow AFTER INSERT ON takedown BEGIN DELETE FROM takedown WHERE request_id = 'a'; END", "grow"),
        ("ALTER TABLE takedown ADD COLUMN extra", "takedown"),
        ("ALTER TABLE parameters RENAME COLUMN value TO worth", "parameters"),
        ("CREATE TABLE other (x)", "other"),
        ("CREATE VIEW seen AS SELECT * FROM takedown", "seen"),
        ("CREATE INDEX faster ON takedown (digest)", "faster"),
        ("DROP TABLE takedown", "sqlite_autoindex_takedown_1"),
    ],
)
def test_an_index_that_declares_anything_else_is_refused(tmp_path: Path, statement: str, name: str) -> None:
    with DedupeIndex.open(tmp_path) as made:
        made.add("a", "one two three four five six seven eight nine ten eleven twelve")
    database = sqlite3.connect(tmp_path / "index.db", isolation_level=None)
    database.execute(statement)
    database.close()
    with pytest.raises(StoreDamaged, match=rf"declares other than this product does: .*'{name}'.*delete this file"):
        DedupeIndex.open(tmp_path)


def test_a_busy_or_read_only_file_is_no_damage(index: DedupeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    other = sqlite3.connect(index.path)
    other.execute("BEGIN EXCLUSIVE")
    index._database.execute("PRAGMA busy_timeout = 10")
    with pytest.raises(WorkspaceBusy):
        index.add("T1", FERRY)
    other.close()
    index._database.execute("PRAGMA query_only = 1")
    with pytest.raises(NoSpace):
        index.add("T1", FERRY)
    index._database.execute("PRAGMA query_only = 0")
    assert index.ids() == ()
    assert index.add("T1", FERRY)


# --- segments ---------------------------------------------------------------------------------------------


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments are written from 4 windows on and merged up to 40."""
    monkeypatch.setattr(index_module, "SMALLEST_SEGMENT", 4)
    monkeypatch.setattr(index_module, "LARGEST_SEGMENT", 40)


WORKS = {f"T{i}": drawn(i, 60 + 90 * (i % 4)) for i in range(30)}
"""Thirty works of one to six windows."""


def asked() -> Any:
    """Windows of ten copies, ten excerpts and ten other texts."""
    texts = [*list(WORKS.values())[::3], *(" ".join(t.split()[10:50]) for t in list(WORKS.values())[1::3])]
    texts += [drawn(1000 + i, 200) for i in range(10)]
    return sign_texts([shingle(text, PARAMETERS) for text in texts], PARAMETERS)


def answers(index: DedupeIndex) -> list[dict[str, list[int]]]:
    return [{name: prints.tolist() for name, prints in found.items()} for found in index.candidates_many(asked())]


def filled(folder: Path, *names: str) -> None:
    with DedupeIndex.open(folder) as index:
        index.add_many((name, WORKS[name]) for name in names or WORKS)


def segment_files(folder: Path) -> list[Path]:
    return sorted((folder / "segments").glob("*"))


def reference(folder: Path, names: list[str]) -> list[dict[str, list[int]]]:
    """The answers of an index in memory, made at once."""
    with DedupeIndex.open(folder) as index:
        index.add_many((name, WORKS[name]) for name in names)
        return answers(index)


def test_small_indexes_write_no_files(tmp_path: Path) -> None:
    filled(tmp_path)
    with DedupeIndex.open(tmp_path) as index:
        assert any(answers(index))
    assert [p.name for p in tmp_path.iterdir()] == ["index.db"]


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize("at_a_time", [1, 3, 30])
def test_answers_do_not_depend_on_how_the_index_grew(tmp_path: Path, at_a_time: int) -> None:
    names = list(WORKS)
    with DedupeIndex.open(tmp_path / "index") as index:
        for at in range(0, len(names), at_a_time):
            index.add_many((name, WORKS[name]) for name in names[at : at + at_a_time])
            grown = answers(index)
    files = segment_files(tmp_path / "index")
    sizes = [SegmentFile(path, PARAMETERS).header.windows for path in files]
    assert 2 <= len(files) <= 6 and max(sizes) <= 40 + 6
    assert stat.S_IMODE(files[0].parent.stat().st_mode) == 0o700
    with DedupeIndex.open(tmp_path / "index") as index:
        assert answers(index) == grown
    assert segment_files(tmp_path / "index") == files, "opened again, nothing is written"
    assert examine(tmp_path / "index") == tuple(names)
    shutil.rmtree(tmp_path / "index" / "segments")
    with DedupeIndex.open(tmp_path / "index") as index:
        assert answers(index) == grown, "made again"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "SMALLEST_SEGMENT", 1000)
        assert reference(tmp_path / "memory", names) == grown


@pytest.mark.usefixtures("small_segments")
def test_segments_hold_no_text(tmp_path: Path) -> None:
    with DedupeIndex.open(tmp_path) as index:
        index.add("T1", f"{FERRY} {ORCHARD} {drawn(1, 300)}")
        index.candidates(shingle(FERRY, PARAMETERS))
    (path,) = segment_files(tmp_path)
    data = path.read_bytes().lower()
    assert not [word for word in (FERRY + ORCHARD).lower().split() if len(word) > 5 and word.encode() in data]
    assert b"t1" not in data


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])


def _flip_header(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:60] + bytes([data[60] ^ 1]) + data[61:])


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize("which", [0, -1])
@pytest.mark.parametrize("damage", [_cut, _flip, _flip_header, Path.unlink, lambda p: p.write_bytes(b"")])
def test_a_damaged_segment_is_made_again(tmp_path: Path, which: int, damage: Callable[[Path], object]) -> None:
    filled(tmp_path)
    with DedupeIndex.open(tmp_path) as index:
        before = answers(index)
    paths = segment_files(tmp_path)
    good = {path.name: path.read_bytes() for path in paths}
    damage(paths[which])
    if paths[which].exists():
        with pytest.raises(StoreDamaged, match=r"\.seg: .*Nothing is lost"):
            examine(tmp_path)
    with DedupeIndex.open(tmp_path) as index:
        assert answers(index) == before
    assert {path.name: path.read_bytes() for path in segment_files(tmp_path)} == good
    assert examine(tmp_path) == tuple(WORKS)


@pytest.mark.usefixtures("small_segments")
def test_a_segment_of_other_parameters_is_not_used(tmp_path: Path) -> None:
    filled(tmp_path)
    with DedupeIndex.open(tmp_path) as index:
        before = answers(index)
    path = segment_files(tmp_path)[0]
    file = SegmentFile(path, PARAMETERS)
    other = PARAMETERS.model_copy(update={"seed": 2})
    header = describe(file.read(), other, 1, 0, file.header.chain)
    path.unlink()
    write_segment(path.parent, SegmentFile(segment_files(tmp_path)[0], PARAMETERS).read(), header)
    with DedupeIndex.open(tmp_path) as index:
        assert answers(index) == before
    assert examine(tmp_path) == tuple(WORKS)


@pytest.mark.usefixtures("small_segments")
def test_a_forged_segment_with_all_digests_right_is_found_by_verify(tmp_path: Path) -> None:
    """Whoever can write the file can make its digests; that works are left out of it shows against the record."""
    filled(tmp_path)
    with DedupeIndex.open(tmp_path) as index:
        answers(index)
    path = segment_files(tmp_path)[0]
    file = SegmentFile(path, PARAMETERS)
    segment = file.read()
    keys = segment.keys.copy()
    keys[:, :] = keys[:, :1]
    forged = type(segment)(segment.positions, segment.ends, segment.prints, keys, segment.owners)
    path.unlink()
    write_segment(path.parent, forged, describe(forged, PARAMETERS, 1, 0, file.header.chain))
    with pytest.raises(StoreDamaged, match="holds other than the record does"):
        examine(tmp_path)


@pytest.mark.usefixtures("small_segments")
def test_what_is_removed_is_in_no_file_any_more(tmp_path: Path) -> None:
    filled(tmp_path)
    with DedupeIndex.open(tmp_path) as index:
        answers(index)
        gone = ["T0", "T7", "T29"]
        prints = [index.prints(name)[:4].tobytes() for name in gone]
        assert all(any(p in path.read_bytes() for path in segment_files(tmp_path)) for p in prints[:2])
        for name in gone:
            assert index.remove(name)
        data = [path.read_bytes() for path in (tmp_path / "index.db", *segment_files(tmp_path))]
        assert not any(p in d for p in prints for d in data)
        left = [name for name in WORKS if name not in gone]
        assert index.ids() == tuple(left)
        after = answers(index)
        assert after == reference(tmp_path / "other", left)
        assert examine(tmp_path) == tuple(left)
        index.add("T7", WORKS["T7"])
        assert index.ids() == (*left, "T7")
        assert answers(index) == reference(tmp_path / "third", [*left, "T7"])
    with DedupeIndex.open(tmp_path) as index:
        assert answers(index) == reference(tmp_path / "fourth", [*left, "T7"])
    assert examine(tmp_path) == (*left, "T7")


@pytest.mark.usefixtures("small_segments")
def test_a_kill_between_removal_and_its_files_is_made_good_by_the_next_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path)
    with DedupeIndex.open(tmp_path) as index:
        answers(index)
        with monkeypatch.context() as patch:
            patch.setattr(DedupeIndex, "_usable", lambda self: [])
            index.remove("T0")
        before = segment_files(tmp_path)
    with DedupeIndex.open(tmp_path) as index:
        assert answers(index) == reference(tmp_path / "other", [n for n in WORKS if n != "T0"])
    assert before[0] not in segment_files(tmp_path)


@pytest.mark.usefixtures("small_segments")
def test_segments_of_another_history_of_the_record_are_not_used(tmp_path: Path) -> None:
    """The record was put back from a backup and went on differently, with as many takedowns."""
    names = list(WORKS)
    filled(tmp_path / "index", *names[:10])
    shutil.copyfile(tmp_path / "index" / "index.db", tmp_path / "backup")
    filled(tmp_path / "index", *names[10:15], names[20])
    with DedupeIndex.open(tmp_path / "index") as index:
        answers(index)
    shutil.copyfile(tmp_path / "backup", tmp_path / "index" / "index.db")
    with DedupeIndex.open(tmp_path / "index") as index:
        assert answers(index) == reference(tmp_path / "backed", names[:10])
        index.add_many((name, WORKS[name]) for name in (*names[15:20], names[20]))
        assert answers(index) == reference(tmp_path / "other", [*names[:10], *names[15:20], names[20]])
    with DedupeIndex.open(tmp_path / "index") as index:
        assert answers(index) == reference(tmp_path / "again", [*names[:10], *names[15:20], names[20]])


@pytest.mark.usefixtures("small_segments")
def test_where_nothing_can_be_written_the_search_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path)

    def refused(*arguments: object) -> Path:
        raise PermissionError(13, "Permission denied")

    expected = reference(tmp_path / "other", list(WORKS))
    with monkeypatch.context() as patch, DedupeIndex.open(tmp_path) as index:
        patch.setattr(index_module, "write_segment", refused)
        assert answers(index) == expected
    assert segment_files(tmp_path) == []
    with DedupeIndex.open(tmp_path) as index:
        answers(index)
        before = segment_files(tmp_path)
        index.add_many((f"more {i}", drawn(500 + i, 300)) for i in range(9))
        with monkeypatch.context() as patch:
            patch.setattr(index_module, "write_segment", refused)
            assert answers(index) == expected
        assert segment_files(tmp_path) == before, "what cannot be replaced is kept"


@pytest.mark.usefixtures("small_segments")
def test_a_reader_goes_on_while_the_writer_adds_removes_and_merges(tmp_path: Path) -> None:
    names = list(WORKS)
    filled(tmp_path, *names[:15])
    with DedupeIndex.open(tmp_path) as reader, DedupeIndex.open(tmp_path) as writer:
        before = answers(reader)
        for name in names[15:]:
            writer.add(name, WORKS[name])
            answers(writer)
        assert answers(reader) == before, "it sees what was there when it searched first"
        writer.remove("T0")
        answers(writer)
        assert answers(reader) == [{k: v for k, v in found.items() if k != "T0"} for found in before]


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize("loss", Loss)
def test_power_cut_at_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: Loss) -> None:
    """While an index grows, is searched, and forgets: what is left has the answers of what SQLite committed."""
    names, step, ended = list(WORKS)[:12], 0, False
    filled(tmp_path / "start", *names[:6])
    while not ended:
        step += 1
        folder = tmp_path / f"{step}"
        shutil.copytree(tmp_path / "start", folder)
        power = Power(folder, step)
        with power.on(monkeypatch):
            try:
                with DedupeIndex.open(folder) as index:
                    answers(index)
                    index.add_many((name, WORKS[name]) for name in names[6:])
                    answers(index)
                    index.remove("T3")
                    answers(index)
                ended = True
            except PowerCut:
                pass
        left = power.left_behind(tmp_path / f"{step}-left", loss)
        with DedupeIndex.open(left) as index:
            known = index.ids()
            assert known in (tuple(names[:6]), tuple(names), tuple(n for n in names if n != "T3"))
            assert answers(index) == reference(tmp_path / f"{step}-reference", list(known))
        examine(left)
    assert step > 20


@pytest.mark.slow
def test_killed_at_any_moment_it_holds_what_was_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "SMALLEST_SEGMENT", 4)
    rng = random.Random(3)
    for attempt in range(8):
        folder = tmp_path / f"{attempt}"
        child = os.fork()
        if child == 0:
            try:
                with DedupeIndex.open(folder) as index:
                    for name, text in WORKS.items():
                        index.add(name, text)
                        index.candidates(shingle(text, PARAMETERS))
                        if int(name[1:]) % 5 == 4:
                            index.remove(f"T{int(name[1:]) - 2}")
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0.02, 0.5))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with DedupeIndex.open(folder) as index:
            known = index.ids()
            assert set(known) <= set(WORKS)
            assert answers(index) == reference(tmp_path / f"{attempt}-reference", list(known))
        assert examine(folder) == known


# --- datasketch -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_segments")
@given(st.integers(0, 2**32), st.floats(0.0, 0.6))
@hypothesis_settings(max_examples=20, deadline=None)
def test_datasketch_has_the_same_candidates(
    tmp_path_factory: pytest.TempPathFactory, seed: int, exchanged: float
) -> None:
    rng = random.Random(seed)
    texts = [
        " ".join(drawn(seed, 1) if rng.random() < exchanged else word for word in text.split())
        for text in WORKS.values()
    ]
    with DedupeIndex.open(tmp_path_factory.mktemp("index")) as index:
        index.add_many(WORKS.items())
        windows = sign_texts([shingle(text, PARAMETERS) for text in texts], PARAMETERS)
        ours = [set(found) for found in index.candidates_many(windows)]
        lsh = index.to_datasketch()
    assert isinstance(lsh, MinHashLSH)
    theirs = [
        {name for sketch in to_lean(windows.of(i), PARAMETERS) for name, _ in lsh.query(sketch)}
        for i in range(len(texts))
    ]
    assert ours == theirs
    assert any(ours)


# --- an older release -------------------------------------------------------------------------------------


def test_the_index_of_an_older_release_is_replaced_and_says_so(tmp_path: Path) -> None:
    shutil.copytree(OLD_STORE, tmp_path / "index")
    before = (tmp_path / "index" / "index.db").read_bytes()
    assert older_release(tmp_path / "index") == "0.1.0"
    assert examine(tmp_path / "index") == ()
    assert (tmp_path / "index" / "index.db").read_bytes() == before, "looking changes nothing"
    with DedupeIndex.open(tmp_path / "index") as index:
        assert (index.renewed, index.ids()) == ("0.1.0", ())
        assert index.add("T1", FERRY)
    assert older_release(tmp_path / "index") is None
    with DedupeIndex.open(tmp_path / "index") as index:
        assert (index.renewed, index.ids()) == (None, ("T1",))
    assert examine(tmp_path / "index") == ("T1",)


@pytest.mark.parametrize("change", [{"seed": 2}, {"fingerprint": "sha1-64"}, {"num_perm": 256}], ids=str)
def test_another_index_in_the_form_of_an_older_release_is_not_replaced(tmp_path: Path, change: dict[str, Any]) -> None:
    shutil.copytree(OLD_STORE, tmp_path / "index")
    path = tmp_path / "index" / "index.db"
    database = sqlite3.connect(path)
    ((recorded,),) = database.execute("SELECT value FROM parameters").fetchall()
    database.close()
    execute(path, "UPDATE parameters SET value = ?", json.dumps(json.loads(recorded) | change))
    assert older_release(tmp_path / "index") is None
    for read in (DedupeIndex.open, examine):
        with pytest.raises(StoreDamaged, match="declares other"):
            read(tmp_path / "index")


def test_only_this_releases_parameters_replace_an_older_index(tmp_path: Path) -> None:
    shutil.copytree(OLD_STORE, tmp_path / "index")
    with pytest.raises(StoreDamaged, match="declares other"):
        DedupeIndex.open(tmp_path / "index", PARAMETERS.model_copy(update={"shingle_words": 10}))
    assert older_release(tmp_path / "index") == "0.1.0"


def test_older_release_of_what_is_none(tmp_path: Path) -> None:
    assert older_release(tmp_path) is None
    (tmp_path / "index.db").write_bytes(b"no database at all" * 300)
    assert older_release(tmp_path) is None


@pytest.fixture
def old_store(tmp_path: Path) -> Workspace:
    shutil.copytree(OLD_STORE.parent, tmp_path / "store")
    return open_workspace(tmp_path / "store")


def test_verify_says_what_becomes_of_an_older_index_and_finds_no_break(old_store: Workspace) -> None:
    assert verify(old_store) == []
    (note,) = index_notes(old_store)
    assert "release 0.1.0" in note and "builds it again" in note
    (old_store.index / "index.db").unlink()
    assert index_notes(old_store) == ()


def run_of(workspace: Workspace, name: str, text: str) -> tuple[DedupeDecision, list[str]]:
    """Dedupe of a batch of one request, and what was told meanwhile."""
    take_in(workspace, f"batch-{name}", {name: text})
    told: list[str] = []
    with writing(workspace):
        plan = plan_run(workspace, [name])
        assert plan is not None
        with listening(lambda stage, done, total, note: told.append(note)):
            (decision,) = dedupe_stage(str(workspace.root), plan.run_id).decisions
    return decision, [note for note in told if note]


def test_a_run_builds_the_index_of_an_older_release_again_from_the_vault(old_store: Workspace) -> None:
    out = [name for name, state in excluded(entries_of(old_store), 5).items() if state.decision != "repeat"]
    text = Vault(old_store.vault).get(out[0]).text
    decision, told = run_of(old_store, "N1", text.upper())
    assert (decision.verdict, decision.evidence[0].request_id) == ("repeat", out[0])
    assert told == ["the index of release 0.1.0 is built again from the vault"]
    assert set(examine(old_store.index)) == set(out)
    assert verify(old_store) == [] and index_notes(old_store) == ()
    decision, told = run_of(old_store, "N2", text)
    assert (decision.verdict, told) == ("repeat", [])


def test_the_users_list_of_boilerplate_is_read_from_the_workspace(old_store: Workspace) -> None:
    out = next(iter(excluded(entries_of(old_store), 5)))
    text = Vault(old_store.vault).get(out).text
    folder = old_store.reference / "boilerplate"
    folder.mkdir(parents=True)
    (folder / "licence.txt").write_text(f"{text} and more", encoding="utf-8")
    decision, _ = run_of(old_store, "N1", text)
    assert (decision.verdict, decision.uncounted, decision.evidence) == ("fresh", 1.0, ())


# --- examine ----------------------------------------------------------------------------------------------


def test_examine_finds_exchanged_rows(tmp_path: Path) -> None:
    """Two rows of another index, whole in themselves, in the places of ours."""
    filled(tmp_path / "ours", "T1", "T2", "T3")
    filled(tmp_path / "other", "T4", "T5", "T6")
    database = sqlite3.connect(tmp_path / "ours" / "index.db", isolation_level=None)
    database.execute("ATTACH ? AS other", (str(tmp_path / "other" / "index.db"),))
    database.execute("DELETE FROM takedown WHERE position = 2")
    database.execute("INSERT INTO takedown SELECT * FROM other.takedown WHERE position = 2")
    database.close()
    with pytest.raises(StoreDamaged, match="'T5' does not follow its chain"):
        examine(tmp_path / "ours")


def test_the_chain_is_what_it_says(tmp_path: Path) -> None:
    filled(tmp_path, "T1", "T2", "T3")
    with DedupeIndex.open(tmp_path) as index:
        index.remove("T2")
        index.add("T4", WORKS["T4"])
    database = sqlite3.connect(tmp_path / "index.db")
    rows = database.execute("SELECT position, digest, chain FROM takedown ORDER BY position").fetchall()
    ((position, removed),) = database.execute("SELECT position, chain FROM removed").fetchall()
    database.close()
    assert [row[0] for row in rows] == [1, 3, 4] and position == 2
    assert rows[0][2] == digest_json(["", rows[0][1]])
    assert rows[1][2] == digest_json([removed, rows[1][1]])
    assert rows[2][2] == digest_json([rows[1][2], rows[2][1]])
    assert examine(tmp_path) == ("T1", "T3", "T4")


@pytest.mark.parametrize("damage", ["prints unsorted", "no prints", "odd signatures"])
def test_a_row_that_breaks_a_law_is_refused_whatever_its_digest(tmp_path: Path, damage: str) -> None:
    filled(tmp_path, "T1")
    with DedupeIndex.open(tmp_path) as index:
        row = index._row("T1")
    prints, signatures = row.prints.tobytes(), row.signatures.tobytes()
    if damage == "prints unsorted":
        prints = row.prints[::-1].tobytes()
    elif damage == "no prints":
        prints = b""
    else:
        signatures = signatures[:-4]
    digest = index_module._row_digest("T1", prints, signatures)
    execute(
        tmp_path / "index.db", "UPDATE takedown SET prints = ?, signatures = ?, digest = ?", prints, signatures, digest
    )
    with DedupeIndex.open(tmp_path) as index, pytest.raises(StoreDamaged, match="does not write"):
        answers(index)


def test_add_many_is_add_again_and_again(tmp_path: Path) -> None:
    with DedupeIndex.open(tmp_path / "a") as one, DedupeIndex.open(tmp_path / "b") as many:
        assert [one.add(name, text) for name, text in WORKS.items()] == [True] * 30
        assert many.add_many([*WORKS.items(), ("E", "…"), ("T3", WORKS["T3"])]) == 30
        assert one.ids() == many.ids()
        for name in WORKS:
            assert np.array_equal(one.prints(name), many.prints(name))
            assert np.array_equal(one.signatures(name), many.signatures(name))
        with pytest.raises(UsageError, match="another text"):
            many.add_many([("new", FERRY), ("T1", ORCHARD)])
        assert "new" not in many.ids(), "a group is added whole or not at all"


@pytest.mark.usefixtures("small_segments")
def test_opening_reads_no_row_and_no_segment(tmp_path: Path) -> None:
    filled(tmp_path)
    with DedupeIndex.open(tmp_path) as index:
        answers(index)
    for path in segment_files(tmp_path):
        path.write_bytes(b"damaged")
    execute(tmp_path / "index.db", "UPDATE takedown SET prints = x'00'")
    with DedupeIndex.open(tmp_path) as index:
        assert index.ids() == tuple(WORKS)
        with pytest.raises(StoreDamaged, match="does not match its digest"):
            answers(index)


@pytest.mark.slow
def test_the_benchmark_runs_and_its_numbers_are_plausible(tmp_path: Path) -> None:
    out = tmp_path / "numbers.json"
    options = ["--passages", "6000", "--large", "0", "--rounds", "1", "--json", str(out)]
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "tests.benchmarks.dedupe_index", *options]
    done = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    found = json.loads(out.read_bytes())
    (turn,) = found["rounds"]
    assert turn["candidates"] > 2500, "every edited passage finds its original"
    assert min(found["ratios"].values()) > 1
    assert found["small"]["segment_files"] == 1 and 0 < found["small"]["open_seconds"] < 0.1
    assert ">= 30x" in done.stdout
