"""`verify` on a tiny workspace: silent when it holds, and every kind of damage found, named and explained."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.files import canonical_json, digest_bytes, digest_json, write_json
from pipeline.ledger import SCHEMA, Ledger, current_version
from pipeline.records import Event, TakedownRequest, VersionManifest
from pipeline.vault import Vault
from pipeline.verify import verify
from pipeline.versions import VersionStore
from pipeline.workspace import FORMAT, Workspace

AT = datetime(2026, 11, 23, 9, 0, tzinfo=UTC)


def _request(request_id: str) -> TakedownRequest:
    return TakedownRequest(
        request_id=request_id,
        title="Work",
        rights_holder="Holder",
        basis="copyright",
        batch_id="b1",
        received_at=AT,
        text=f"confidential text of {request_id}",
    )


def _model(folder: Path, seed: int) -> Path:
    folder.mkdir()
    save_file({"w": np.random.default_rng(seed).random(3, dtype=np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def _receive(workspace: Workspace, ledger: Ledger, *request_ids: str) -> None:
    vault = Vault(workspace.vault)
    events = []
    for request in map(_request, request_ids):
        vault.put(request)
        commitment = vault.commitment(request.text)
        data = {"batch_id": "b1", "received_at": "2026-11-23T09:00:00Z", "commitment": commitment}
        events.append(Event(kind="received", actor="t", request_id=request.request_id, data=data))
    ledger.append(*events, at=AT)


def _publish(
    workspace: Workspace, version: int, parent: VersionManifest | None, *request_ids: str, seed: int | None = None
) -> VersionManifest:
    candidate = workspace.root / "candidate"
    _model(candidate, version if seed is None else seed)
    manifest = VersionStore(workspace.versions).publish(
        candidate,
        version=version,
        parent=parent,
        created_at=AT,
        run_id=f"run-{version}" if parent else None,
        requests=request_ids,
        settings={},
        report={},
        software={},
        replace_orphan=True,
    )
    shutil.rmtree(candidate)
    return manifest


def _acknowledge(workspace: Workspace, ledger: Ledger, manifest: VersionManifest) -> None:
    version = manifest.version
    data = {"root": manifest.root, "manifest": VersionStore(workspace.versions).manifest_digest(version)}
    ledger.append(
        *(Event(kind="applied", actor="t", request_id=r, version=version) for r in manifest.requests),
        Event(kind="published" if version else "initialised", actor="t", version=version, data=data),
        at=AT,
    )


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """v0 (untouched), v1 (TD-1), v2 (TD-2, from v1), and TD-3 waiting. The ledger has 8 entries."""
    workspace = Workspace(tmp_path_factory.mktemp("pristine") / "w")
    for folder in (workspace.root, *workspace.folders()):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(workspace.marker, {"format": FORMAT})
    Vault(workspace.vault).create()
    with Ledger.create(workspace.ledger) as ledger:
        v0 = _publish(workspace, 0, None)
        _acknowledge(workspace, ledger, v0)
        _receive(workspace, ledger, "TD-1", "TD-2")
        v1 = _publish(workspace, 1, v0, "TD-1")
        _acknowledge(workspace, ledger, v1)
        v2 = _publish(workspace, 2, v1, "TD-2")
        _acknowledge(workspace, ledger, v2)
        _receive(workspace, ledger, "TD-3")
    return workspace.root


@pytest.fixture
def workspace(pristine: Path, tmp_path: Path) -> Workspace:
    return Workspace(Path(shutil.copytree(pristine, tmp_path / "w")))


def _found(workspace: Workspace) -> list[str]:
    breaks = verify(workspace)
    assert all(b.where and b.found and b.means for b in breaks)
    assert not any("confidential" in str(b) for b in breaks)
    return [f"{b.where}: {b.found}" for b in breaks]


def _store(workspace: Workspace) -> VersionStore:
    return VersionStore(workspace.versions)


def _tamper(workspace: Workspace, *statements: str) -> None:
    """Change the ledger without leaving a trace in its triggers."""
    with closing(sqlite3.connect(workspace.ledger, isolation_level=None)) as connection:
        for statement in SCHEMA[1:]:
            connection.execute(f"DROP TRIGGER {statement.split()[2]}")
        for statement in (*statements, *SCHEMA[1:]):
            connection.execute(statement)


def _rechain(workspace: Workspace, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Rewrite the whole ledger with all digests computed anew: what a hash chain alone cannot show."""
    with closing(sqlite3.connect(workspace.ledger)) as connection:
        rows = connection.execute("SELECT event FROM entries ORDER BY seq").fetchall()
    events = [json.loads(event) for (event,) in rows]
    change(events)
    workspace.ledger.unlink()
    with Ledger.create(workspace.ledger) as ledger:
        ledger.append(*(Event.model_validate(event) for event in events), at=AT)


def _remanifest(workspace: Workspace, version: int, change: Callable[[dict[str, Any]], object]) -> None:
    """Forge a manifest, and the ledger with it."""
    path = _store(workspace).manifest_path(version)
    tree = json.loads(path.read_bytes())
    change(tree)
    path.unlink()
    path.write_bytes(canonical_json(tree) + b"\n")

    def follow(events: list[dict[str, Any]]) -> None:
        for event in events:
            if event["version"] == version and "manifest" in event["data"]:
                event["data"] = {"root": tree["root"], "manifest": digest_bytes(path.read_bytes())}

    _rechain(workspace, follow)


def test_a_sound_workspace_has_no_breaks_and_is_not_written_to(workspace: Workspace) -> None:
    before = {p: p.stat().st_mtime_ns for p in workspace.root.rglob("*") if p.is_file() and "ledger" not in p.name}
    assert verify(workspace) == []
    after = {p: p.stat().st_mtime_ns for p in workspace.root.rglob("*") if p.is_file() and "ledger" not in p.name}
    assert after == before


def test_it_holds_while_a_writer_is_in_the_middle(workspace: Workspace) -> None:
    with Ledger.open(workspace.ledger) as ledger:
        ledger._connection.execute("BEGIN IMMEDIATE")
        assert verify(workspace) == []
        ledger._connection.execute("ROLLBACK")


@pytest.mark.parametrize("module", ["pipeline.ledger", "pipeline.versions", "pipeline.safefile", "pipeline.verify"])
def test_the_reading_side_starts_without_torch_and_prefect(module: str) -> None:
    code = f"import {module}, sys; sys.exit(bool({{'torch', 'transformers', 'prefect', 'numpy'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_shared_objects_are_read_once(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = os.open

    def counting(path: Any, *args: Any, **kwargs: Any) -> int:
        opened.append(Path(path).name)
        return real(path, *args, **kwargs)

    def counting_open(self: Path, *args: Any, **kwargs: Any) -> Any:
        opened.append(self.name)
        return path_open(self, *args, **kwargs)

    path_open = Path.open
    monkeypatch.setattr(os, "open", counting)
    monkeypatch.setattr(Path, "open", counting_open)
    assert verify(workspace) == []
    names = [path.name for path in _store(workspace).object_files()]
    assert len(names) == 4
    assert [opened.count(name) for name in names] == [1] * 4


# --- every byte -------------------------------------------------------------------------------------------


def test_every_flipped_byte_of_an_object_is_found(workspace: Workspace) -> None:
    manifest = _store(workspace).manifest(1)
    for file in manifest.files:
        path = _store(workspace).object_path(file.digest)
        path.chmod(0o644)
        data = path.read_bytes()
        for at in range(len(data)):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
            assert any(path.name in line and file.path in line for line in _found(workspace)), f"{file.path} byte {at}"
        path.write_bytes(data)
    assert verify(workspace) == []


def test_every_flipped_byte_of_a_manifest_is_found(workspace: Workspace) -> None:
    path = _store(workspace).manifest_path(1)
    path.chmod(0o644)
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        assert any(line.startswith("v1: ") for line in _found(workspace)), f"byte {at}"


def test_flipped_bytes_of_the_ledger_are_found(workspace: Workspace) -> None:
    """Every 17th byte here; tests/test_ledger.py flips every one of them against the ledger's own check."""
    with closing(sqlite3.connect(workspace.ledger)) as connection:
        rows = connection.execute("SELECT at || event || previous || digest FROM entries").fetchall()
    data = workspace.ledger.read_bytes()
    for (row,) in rows:
        start = data.index(row.encode())
        for at in range(start, start + len(row), 17):
            workspace.ledger.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
            assert _found(workspace), f"byte {at}"


# --- the ledger -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("UPDATE entries SET at = '2020-01-01T00:00:00.000000Z' WHERE seq = 5", "entry 5: content"),
        ("UPDATE entries SET event = replace(event, '\"t\"', '\"x\"') WHERE seq = 5", "entry 5: content"),
        ("UPDATE entries SET previous = digest WHERE seq = 5", "entry 5: names"),
        ("UPDATE entries SET digest = previous WHERE seq = 5", "entry 5: content"),
        ("UPDATE entries SET seq = 99 WHERE seq = 8", "entry 99: the entries after 7 missing"),
        ("DELETE FROM entries WHERE seq = 8", "SQLite counts 8"),
        ("DELETE FROM entries WHERE seq = 2", "entry 3: entry 2 missing"),
        ("DELETE FROM entries", "SQLite counts 8"),
    ],
)
def test_a_changed_ledger_is_found(workspace: Workspace, statement: str, expected: str) -> None:
    _tamper(workspace, statement)
    assert any(expected in line for line in _found(workspace))


def test_dropped_triggers_are_found(workspace: Workspace) -> None:
    with closing(sqlite3.connect(workspace.ledger)) as connection:
        for statement in SCHEMA[1:]:
            connection.execute(f"DROP TRIGGER {statement.split()[2]}")
    assert len(_found(workspace)) == 3


def test_a_ledger_cut_before_a_publish_shows_through_the_manifest(workspace: Workspace) -> None:
    """Even when the cutter knows SQLite's counter: v2 and TD-3 are still there and nothing speaks of them."""
    _tamper(workspace, "DELETE FROM entries WHERE seq > 5", "UPDATE sqlite_sequence SET seq = 5")
    assert _found(workspace) == [
        "v2: not acknowledged: no ledger entry names it",
        "request TD-3: is in the vault, but no ledger entry received it",
    ]


def test_a_ledger_cut_after_the_last_publish_shows_through_the_vault(workspace: Workspace) -> None:
    _tamper(workspace, "DELETE FROM entries WHERE seq = 8", "UPDATE sqlite_sequence SET seq = 7")
    assert _found(workspace) == ["request TD-3: is in the vault, but no ledger entry received it"]


def test_what_is_cut_everywhere_at_once_shows_only_against_a_digest_noted_elsewhere(workspace: Workspace) -> None:
    """The limit without checkpoints: entry, manifest, object and vault record of the newest step all removed."""
    with Ledger.open(workspace.ledger, read_only=True) as ledger:
        noted = ledger.entries()[-1]
    _tamper(workspace, "DELETE FROM entries WHERE seq = 8", "UPDATE sqlite_sequence SET seq = 7")
    (workspace.vault / f"{digest_bytes(b'TD-3').removeprefix('sha256:')}.json").unlink()
    assert verify(workspace) == []
    with Ledger.open(workspace.ledger, read_only=True) as ledger:
        assert noted not in ledger.entries()


def test_a_rewritten_ledger_contradicts_the_manifests(workspace: Workspace) -> None:
    def drop_v1(events: list[dict[str, Any]]) -> None:
        events[:] = [e for e in events if e["version"] != 1]

    _rechain(workspace, drop_v1)
    assert "v1: not acknowledged: no ledger entry names it" in _found(workspace)
    assert any("removed, or the manifest was put there by hand" in b.means for b in verify(workspace))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda es: es[4]["data"].update(root="root-sha256:00"), "v1: the manifest has root"),
        (lambda es: es[4]["data"].update(manifest="sha256:00"), "v1: the manifest has digest"),
        (lambda es: es[4]["data"].clear(), "v1: the manifest has digest"),
        (lambda es: es[4].update(version=7), "v7: has no manifest, but ledger entry 5 published it"),
        (lambda es: es[4].update(version=None), "ledger entry 5: published names no version"),
        (lambda es: es.append(es[4]), "ledger entry 9: published names v1, which an earlier entry"),
        (lambda es: es[3].update(version=2), "request TD-1 is applied in v2, whose manifest does not list it"),
        (lambda es: es[3].update(version=None), "request TD-1 is applied, but no version is named"),
        (lambda es: es[3].update(request_id="TD-9"), "request TD-9 is applied, but no earlier entry received it"),
        (lambda es: es.pop(1), "v1: lists request TD-1, which no ledger entry received"),
    ],
)
def test_a_ledger_that_contradicts_itself_or_the_store(
    workspace: Workspace, change: Callable[[list[dict[str, Any]]], object], expected: str
) -> None:
    _rechain(workspace, change)
    assert any(expected in line for line in _found(workspace)), _found(workspace)


@pytest.mark.parametrize("content", [None, b"", b"x" * 5000])
def test_a_ledger_that_is_none(workspace: Workspace, content: bytes | None) -> None:
    workspace.ledger.unlink()
    if content is not None:
        workspace.ledger.write_bytes(content)
    assert _found(workspace)[0].startswith("ledger.db: ")


# --- manifests, lineage, objects --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "change", "expected"),
    [
        (2, lambda t: t.update(parent_root="root-sha256:" + "0" * 64), "v2: names v1 with root"),
        (2, lambda t: t.update(parent=0), "v2: names v0 with root"),
        (2, lambda t: t.update(parent=2), "v2: names v2 as its parent"),
        (2, lambda t: t.update(parent=None), "v2: names parent None"),
        (0, lambda t: t.update(parent=0), "v0: names parent 0"),
        (1, lambda t: t.update(root="root-sha256:" + "0" * 64), "v1: weights have root"),
        (1, lambda t: t["files"].pop(), "no model.safetensors"),
        (1, lambda t: t["files"][0].update(size=7), "has 2 bytes, the manifest says 7"),
        (1, lambda t: t["files"][0].update(digest="sha256:" + "0" * 64), "is missing"),
    ],
)
def test_a_forged_manifest_with_a_forged_ledger(
    workspace: Workspace, version: int, change: Callable[[dict[str, Any]], object], expected: str
) -> None:
    _remanifest(workspace, version, change)
    assert any(expected in line for line in _found(workspace)), _found(workspace)


def test_missing_manifest_and_object(workspace: Workspace) -> None:
    store = _store(workspace)
    weights = next(f for f in store.manifest(2).files if f.path == "model.safetensors")
    store.object_path(weights.digest).unlink()
    assert [line.split(": ")[-1] for line in _found(workspace)] == ["is missing"]
    store.manifest_path(1).unlink()
    found = _found(workspace)
    assert "v1: has no manifest, but ledger entry 5 published it" in found
    assert "v2: its parent v1 has no manifest that can be read" in found
    assert any("unreferenced object" in line for line in found)


def test_an_unreadable_manifest_does_not_make_its_objects_unreferenced(workspace: Workspace) -> None:
    path = _store(workspace).manifest_path(1)
    path.unlink()
    path.write_bytes(b"{")
    found = _found(workspace)
    assert any(line.startswith("v1: ") and "cannot be read" in line for line in found)
    assert not any("unreferenced" in line for line in found)


def test_strangers_in_the_store_are_found_and_temporary_files_are_not(workspace: Workspace) -> None:
    objects = workspace.versions / "objects"
    (objects / "ab").mkdir(exist_ok=True)
    for path in (objects / "ab" / ("ab" + "0" * 62), objects / "note", workspace.versions / "1.json"):
        path.write_bytes(b"")
    for path in (objects / "ab" / ".tmp-x", objects / ".tmp-y", workspace.versions / ".tmp-z"):
        path.write_bytes(b"")
    assert _found(workspace) == [
        f"versions/objects/ab/ab{'0' * 62}: unreferenced object",
        "versions/objects/note: unreferenced object",
        "versions/1.json: does not belong into the version store",
    ]


def test_an_interrupted_publish_is_reported_and_gone_after_the_next_run(workspace: Workspace) -> None:
    """Killed between manifest and ledger; then the run is repeated, this time with other weights."""
    store = _store(workspace)
    _publish(workspace, 3, store.manifest(2), "TD-3", seed=3)
    (found,) = verify(workspace)
    assert (found.where, found.found) == ("v3", "not acknowledged: no ledger entry names it")
    assert "interrupted" in found.means
    with Ledger.open(workspace.ledger) as ledger:
        assert current_version(ledger.entries()) == 2
        manifest = _publish(workspace, 3, store.manifest(2), "TD-3", seed=4)
        assert len(store.collect()) == 1
        _acknowledge(workspace, ledger, manifest)
        assert current_version(ledger.entries()) == 3
    assert verify(workspace) == []


# --- vault and marker -------------------------------------------------------------------------------------


def _vault_file(workspace: Workspace, request_id: str) -> Path:
    return workspace.vault / f"{digest_bytes(request_id.encode()).removeprefix('sha256:')}.json"


def test_a_missing_or_changed_vault_record_is_found(workspace: Workspace) -> None:
    path = _vault_file(workspace, "TD-1")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"confidential", b"confidentiaL"))
    (line,) = _found(workspace)
    assert line.startswith("request TD-1: vault: ")
    path.unlink()
    (line,) = _found(workspace)
    assert "is missing" in line


def test_an_exchanged_text_contradicts_its_commitment(workspace: Workspace) -> None:
    """With a digest made anew the record is sound by itself; the ledger knows better."""
    path = _vault_file(workspace, "TD-1")
    value = json.loads(path.read_bytes())["request"]
    value["text"] = "something else"
    path.write_bytes(canonical_json({"digest": digest_json(value), "request": value}) + b"\n")
    (line,) = _found(workspace)
    assert line.startswith("request TD-1: its text in the vault")


def test_a_lost_key_is_found(workspace: Workspace) -> None:
    (workspace.vault / "key").unlink()
    assert len(_found(workspace)) == 3


def test_a_foreign_or_broken_vault_file_is_found(workspace: Workspace) -> None:
    (workspace.vault / "stray.json").write_text("{}")
    assert len(_found(workspace)) == 1


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"format": 99}'])
def test_a_bad_marker_is_found(workspace: Workspace, content: bytes | None) -> None:
    workspace.marker.unlink()
    if content is not None:
        workspace.marker.write_bytes(content)
    (line,) = _found(workspace)
    assert line.startswith("workspace.json: ")


def test_an_empty_folder_gives_breaks_not_exceptions(tmp_path: Path) -> None:
    assert [line.split(":")[0] for line in _found(Workspace(tmp_path))] == ["workspace.json", "ledger.db"]
