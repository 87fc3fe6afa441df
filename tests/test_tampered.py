"""Every tampered store gives exactly the exit codes and messages that stand beside it, and a sound one passes.

Also: every byte of every file of a small store, one bit flipped, as a disk does it that fails without a word.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from histories import array_model, make_step, start_history
from tampered.calls import Answer, takedown
from tampered.cases import CASES, SOUND, Call, Case, expected
from tampered.make import copied_scene, write_all
from tampered.scene import Scene, other_lineage, overwrite, settle, sound_scene

from pipeline.errors import StoreDamaged
from pipeline.keys import load_log_key, load_model_key, log_vkey
from pipeline.seals import check_index, check_ledger, read_seal
from pipeline.storecheck import Depth
from pipeline.verify import verify
from pipeline.workspace import Workspace


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """The sound store; only copied."""
    folder = tmp_path_factory.mktemp("scene")
    return sound_scene(folder / "sound", other_lineage(folder / "lineage"))


def answer(scene: Scene, command: str) -> Answer:
    """Make a call in the folder of a case."""
    shutil.rmtree(scene.folder / "out", ignore_errors=True)
    return takedown("-w", "store", *shlex.split(command), folder=scene.folder)


def check(scene: Scene, call: Call) -> None:
    """The answer must be the one expected, and what was refused must have written nothing to the log."""
    before = log_rows(scene)
    found = answer(scene, call.command)
    assert (found.code, call.says in found.text) == (call.code, True), f"{call}: {found.code}, {found.text}"
    assert "Traceback" not in found.text
    assert not call.code or log_rows(scene) == before


def log_rows(scene: Scene) -> list[tuple[object, ...]]:
    """What the log holds, as far as SQLite can tell."""
    if not scene.workspace.ledger.is_file():
        return []
    try:
        with closing(sqlite3.connect(f"{scene.workspace.ledger.as_uri()}?mode=ro", uri=True)) as connection:
            return connection.execute("SELECT seq, at, CAST(event AS BLOB), digest FROM entries").fetchall()
    except sqlite3.DatabaseError:
        return []


# --- the cases --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", SOUND.values(), ids=lambda call: call.command.split(" --actor")[0])
def test_a_sound_store_passes(sound: Scene, tmp_path: Path, call: Call) -> None:
    check(copied_scene(sound, tmp_path / "sound"), call)


@pytest.mark.timeout(60)  # a reader that waits for ever has failed
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_tampered_store_is_answered_as_expected(sound: Scene, tmp_path: Path, case: Case) -> None:
    scene = copied_scene(sound, tmp_path / case.name)
    case.tamper(scene)
    for call in case.calls:
        check(scene, call)


def test_the_table_for_people_says_why(sound: Scene, tmp_path: Path) -> None:
    """Where, what and what it means; a file's name and a digest alone have more than 80 characters."""
    (case,) = (case for case in CASES if case.name == "object-weights-byte")
    scene = copied_scene(sound, tmp_path / case.name)
    case.tamper(scene)
    check(scene, Call("verify", 1, "it was changed after it was published"))


def test_every_case_has_a_name_of_its_own_and_at_least_one_answer() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(case.calls and case.done.endswith(".") and call.says for case in CASES for call in case.calls)


def test_all_cases_can_be_written_out_for_another_reader(tmp_path: Path) -> None:
    chosen = [case for case in CASES if case.name in ("log-cut-everywhere", "object-linked")]
    write_all(tmp_path / "all", chosen)
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == [
        "log-cut-everywhere",
        "object-linked",
        "sound",
    ]
    for case in chosen:
        folder = tmp_path / "all" / case.name
        assert (folder / "expected.json").read_bytes() == expected(case)
        for call in json.loads(expected(case))["calls"]:
            found = takedown("-w", "store", *shlex.split(call["command"]), folder=folder)
            assert found.code == call["code"] and call["says"] in found.text


# --- every byte -------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Workspace:
    """v0, and v1 without TD-1, with the smallest weights of which a delta is worthwhile."""
    workspace = start_history(tmp_path / "small", array_model(tmp_path / "model", tensors=2))
    make_step(workspace, "TD-1")
    settle(workspace)
    return workspace


def flipped(path: Path, data: bytes, at: int) -> None:
    """Write a file with one bit of one byte flipped; which bit differs from byte to byte."""
    overwrite(path, data[:at] + bytes([data[at] ^ 1 << (at * 5 + at // 8) % 8]) + data[at + 1 :])


def contents(workspace: Workspace) -> dict[Path, str]:
    """Every file of which each must be named by verify itself when it is flipped, whatever else is: path → name."""
    versions, vault = workspace.versions, workspace.vault
    stored = [path for folder in ("objects", "deltas") for path in (versions / folder).rglob("*") if path.is_file()]
    return {
        **{path: path.name for path in stored},
        **{path: f"v{int(path.stem)}: signature" for path in versions.glob("*.sig")},
        **dict.fromkeys(vault.glob("*.json"), "request TD-1"),
        workspace.checkpoint: "checkpoint",
    }


@pytest.mark.slow
def test_every_flipped_byte_of_a_content_is_found_and_its_file_named(small: Workspace) -> None:
    """Objects, deltas, signatures, vault records and checkpoint: one byte of each of them at a time, all at once.

    Their checks do not depend on each other, so that as many calls suffice as the longest of them has bytes.
    """
    files = {path: path.read_bytes() for path in contents(small)}
    names = contents(small)
    tried = found = 0
    for at in range(max(map(len, files.values()))):
        hit = [path for path, data in files.items() if at < len(data)]
        for path in hit:
            flipped(path, files[path], at)
        where = [b.where for b in verify(small)]
        missed = [path.name for path in hit if not any(names[path] in place for place in where)]
        assert not missed, f"byte {at}: {missed}"
        tried, found = tried + len(hit), found + len(hit) - len(missed)
        for path in hit:
            if at + 1 == len(files[path]):
                overwrite(path, files[path])
    assert verify(small) == []
    print(f"contents: {found} of {tried} flipped bytes found, in {len(files)} files")


@pytest.mark.slow
def test_every_flipped_byte_of_what_the_others_hang_on_is_found(small: Workspace) -> None:
    """Seal, manifests, public keys, the vault's keys, the marker: one byte at a time."""
    chosen = [
        small.root / "seal",
        *small.versions.glob("*.json"),
        small.keys / "log.pub",
        small.keys / "model.pub",
        small.keys / "vault.key",
        small.vault / "key",
        *small.vault.glob("*.key"),
    ]
    tried = 0
    for path in (*chosen, small.marker):
        data = path.read_bytes()
        for at in range(len(data)):
            flipped(path, data, at)
            if path == small.marker and path.read_bytes().split() == data.split():
                continue  # one kind of white space for another
            if path.name == "vault.key" and path.read_bytes().strip().lower() == data.strip():
                continue  # a capital digit
            assert verify(small), f"{path.name}: byte {at}"
            tried += 1
        overwrite(path, data)
    assert verify(small) == []
    print(f"seal, manifests, keys, marker: {tried} of {tried} flipped bytes found")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ledger.db", "index/index.db"])
def test_every_flipped_byte_of_a_database_is_found(small: Workspace, name: str) -> None:
    """Also of free pages, of unused room in others, and of counters that nothing reads.

    Comparing a file with its seal takes a millisecond; where that finds nothing, all of verify runs.
    """
    seal = read_seal((small.root / "seal").read_bytes(), log_vkey(small.keys))
    assert seal.index is not None
    path, depth = small.root / name, Depth.QUICK if name == "ledger.db" else Depth.FULL
    data, by_seal = path.read_bytes(), 0
    for at in range(len(data)):
        flipped(path, data, at)
        found = check_ledger(small.root, seal) if name == "ledger.db" else check_index(small.root, seal.index)
        by_seal += bool(found)
        assert found or verify(small, depth), f"{name}: byte {at}"
        for left in path.parent.glob(f"{path.name}-*"):
            left.unlink()
    overwrite(path, data)
    assert verify(small) == []
    print(f"{name}: {len(data)} of {len(data)} flipped bytes found, {by_seal} of them by the seal")


@pytest.mark.parametrize(("name", "load"), [("log.key", load_log_key), ("model.key", load_model_key)])
def test_a_flipped_byte_of_a_private_key_is_refused_or_leaves_the_same_key(
    small: Workspace, name: str, load: Callable[[Path], object]
) -> None:
    """Verify does not read private keys; whoever signs with one checks first that it belongs to the public one.

    A bit of the line ends around the key, or of what its encoding leaves open, may be harmless.
    """
    path = small.keys / name
    data, harmless = path.read_bytes(), 0
    for at in range(len(data)):
        flipped(path, data, at)
        try:
            load(small.keys)
            harmless += 1
        except StoreDamaged as error:
            assert name in str(error) and not any(line in str(error) for line in data.decode().split("\n") if line)
    print(f"{name}: {len(data) - harmless} of {len(data)} flipped bytes refused, the others leave the same key")
    assert harmless < len(data) // 10
