"""`verify` on a tiny workspace: silent when it holds, and every kind of damage found, named and explained."""

from __future__ import annotations

import json
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
from workspaces import plain_record

from pipeline.errors import StoreDamaged, UsageError
from pipeline.evidence import all_evidence
from pipeline.files import canonical_json, digest_bytes, digest_file, digest_json, write_json
from pipeline.keys import create_keys, load_model_key, log_vkey, model_public_key
from pipeline.ledger import SCHEMA, Ledger
from pipeline.oms import model_signature
from pipeline.records import Event, TakedownRequest, VersionManifest
from pipeline.states import current_version
from pipeline.storecheck import Depth
from pipeline.vault import Vault
from pipeline.verify import key_notes, verify
from pipeline.versions import Published, VersionStore
from pipeline.workspace import FORMAT, Workspace

AT = datetime(2026, 11, 23, 9, 0, tzinfo=UTC)
ORIGIN = "takedown-pipeline/0011223344556677"
TRIGGERS = [statement for statement in SCHEMA if statement.startswith("CREATE TRIGGER")]


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
    """Two models differ in three entries, so that all but the first are kept as deltas."""
    folder.mkdir()
    weights = np.random.default_rng(0).random(300, dtype=np.float32)
    weights[[seed, 100 + seed, 200 + seed]] = np.random.default_rng(seed).random(3, dtype=np.float32)
    save_file({"w": weights}, folder / "model.safetensors")
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
) -> Published:
    candidate = workspace.root / "candidate"
    _model(candidate, version if seed is None else seed)
    published = VersionStore(workspace.versions).publish(
        candidate,
        version=version,
        parent=parent,
        created_at=AT,
        run_id=f"run-{version}" if parent else None,
        requests=request_ids,
        settings={},
        report={},
        software={},
        sign=lambda files, name: model_signature(files, name, load_model_key(workspace.keys)),
        replace_orphan=True,
    )
    shutil.rmtree(candidate)
    return published


def _acknowledge(workspace: Workspace, ledger: Ledger, published: Published) -> None:
    """What a run that publishes writes: first the plan, then everything else in one transaction."""
    version, run_id, requests = published.manifest.version, published.manifest.run_id, published.manifest.requests
    if version == 0:
        keys = {"log": log_vkey(workspace.keys), "model": model_public_key(workspace.keys).decode()}
        data = published.facts() | {"lineage": ORIGIN, "keys": keys}
        ledger.append(Event(kind="initialised", actor="t", version=0, data=data), at=AT)
        return
    ledger.append(Event(kind="planned", actor="t", run_id=run_id, data={"limits": {}}), at=AT)
    evidence = {"plan": _store(workspace).objects.put_bytes(b'{"plan of version":%d}' % version)}
    ledger.append(
        Event(kind="accepted", actor="t", run_id=run_id, data={"evidence": evidence}),
        *(Event(kind="applied", actor="t", request_id=r, version=version, run_id=run_id) for r in requests),
        Event(kind="published", actor="t", version=version, run_id=run_id, data=published.facts()),
        *(Event(kind="verified", actor="t", request_id=r, version=version, run_id=run_id) for r in requests),
        at=AT,
    )


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """v0 (untouched), v1 (TD-1), v2 (TD-2, from v1), and TD-3 waiting.

    The ledger has 14 entries in 7 transactions: 1 initialised, 2 and 3 received, 4 planned, 5 to 8 accepted, applied,
    published and verified, 9 planned, 10 to 13 as 5 to 8, 14 received.
    """
    workspace = Workspace(tmp_path_factory.mktemp("pristine") / "w")
    for folder in (workspace.root, *workspace.folders()):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(workspace.marker, {"format": FORMAT})
    Vault(workspace.vault).create()
    create_keys(workspace.keys, ORIGIN)
    with Ledger.create(workspace.ledger) as ledger:
        v0 = _publish(workspace, 0, None)
        _acknowledge(workspace, ledger, v0)
        _receive(workspace, ledger, "TD-1", "TD-2")
        v1 = _publish(workspace, 1, v0.manifest, "TD-1")
        _acknowledge(workspace, ledger, v1)
        v2 = _publish(workspace, 2, v1.manifest, "TD-2")
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
        for statement in TRIGGERS:
            connection.execute(f"DROP TRIGGER {statement.split()[2]}")
        for statement in (*statements, *TRIGGERS):
            connection.execute(statement)


def _rechain(workspace: Workspace, change: Callable[[list[dict[str, Any]]], object] = lambda events: None) -> None:
    """Rewrite the whole ledger and sign it anew with the lineage's own key: what nothing inside it can show."""
    with closing(sqlite3.connect(workspace.ledger)) as connection:
        rows = connection.execute("SELECT event FROM entries ORDER BY seq").fetchall()
    events = [json.loads(event) for (event,) in rows]
    change(events)
    for path in (workspace.ledger, workspace.checkpoint):
        path.unlink()
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
                event["data"] |= {"root": tree["root"], "manifest": digest_file(path), "parent": tree["parent"]}

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


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("pipeline.ledger", {"numpy"}),
        ("pipeline.states", {"numpy"}),
        ("pipeline.safefile", {"numpy"}),
        ("pipeline.versions", set()),  # deltas are numpy
        ("pipeline.verify", set()),
        ("pipeline.history", set()),
    ],
)
def test_the_reading_side_starts_without_torch_and_prefect(module: str, heavy: set[str]) -> None:
    heavy = heavy | {"torch", "transformers", "prefect", "datasketch", "scipy", "safetensors"}
    code = f"import {module}, sys; sys.exit(', '.join({heavy!r} & sys.modules.keys()) or 0)"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (0, "")


def test_every_depth_holds_and_deeper_ones_check_more(workspace: Workspace) -> None:
    assert [verify(workspace, depth) for depth in Depth] == [[], [], []]
    path = _vault_file(workspace, "TD-1")
    path.write_bytes(path.read_bytes() + b" ")
    config = next(f for f in _store(workspace).manifest(1).files if f.path == "config.json")
    stored = _store(workspace).objects.object_path(config.digest)
    stored.chmod(0o644)
    stored.write_bytes(b"[]")  # of the same size
    assert verify(workspace, Depth.QUICK) == []
    found = verify(workspace, Depth.FULL)
    assert len([b for b in found if stored.name in b.where]) == 3, "all three versions share it"


# --- every byte -------------------------------------------------------------------------------------------


def _flipped_in_all(workspace: Workspace, names: dict[Path, str]) -> None:
    """Flip the n-th byte of all files at once, for every n; each file must be named, by what is said of it alone."""
    contents = {path: path.read_bytes() for path in names}
    for path in contents:
        path.chmod(0o644)
    for at in range(max(map(len, contents.values()))):
        flipped = [path for path, data in contents.items() if at < len(data)]
        for path in flipped:
            data = contents[path]
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        found = _found(workspace)
        for path in flipped:
            assert any(names[path] in line for line in found), f"{path.name} byte {at}: {found}"
            path.write_bytes(contents[path])
    assert verify(workspace) == []


@pytest.mark.slow
def test_every_flipped_byte_of_every_content_and_signature_is_found(workspace: Workspace) -> None:
    """Those that are checked against digests kept elsewhere, so that no damage of one hides another's."""
    store = _store(workspace)
    names = {path: f"/{path.name} (" for path in store.objects.files()}
    assert len(names) == 9  # v0's weights, two deltas, a shared config.json, three tables, two records
    names |= {store.signature_path(n): f"v{n}: signature: " for n in store.numbers()}
    _flipped_in_all(workspace, names | {workspace.checkpoint: "checkpoint: "})


@pytest.mark.slow
def test_every_flipped_byte_of_every_manifest_and_public_key_is_found(workspace: Workspace) -> None:
    names = {_store(workspace).manifest_path(n): f"v{n}: " for n in range(3)}
    _flipped_in_all(workspace, names | {workspace.keys / f"{k}.pub": f"keys/{k}.pub: " for k in ("log", "model")})


@pytest.mark.slow
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
        ("UPDATE entries SET seq = 99 WHERE seq = 14", "entry 99: the entries after 13 missing"),
        ("DELETE FROM entries WHERE seq = 14", "SQLite counts 14"),
        ("DELETE FROM entries WHERE seq = 2", "entry 3: entry 2 missing"),
        ("DELETE FROM entries", "SQLite counts 14"),
        ("DELETE FROM checkpoints", "the last checkpoint signs 0 entries, there are 14"),
        ("UPDATE checkpoints SET note = replace(note, '13', '12') WHERE size = 13", "checkpoint 13: signed note"),
    ],
)
def test_a_changed_ledger_is_found(workspace: Workspace, statement: str, expected: str) -> None:
    _tamper(workspace, statement)
    assert any(expected in line for line in _found(workspace))


def test_dropped_triggers_are_found(workspace: Workspace) -> None:
    with closing(sqlite3.connect(workspace.ledger)) as connection:
        for statement in TRIGGERS:
            connection.execute(f"DROP TRIGGER {statement.split()[2]}")
    assert len(_found(workspace)) == len(TRIGGERS) == 6


def _cut(workspace: Workspace, size: int) -> None:
    """Cut the ledger back to one of its checkpoints, with SQLite's counter, leaving no trace in the database."""
    _tamper(
        workspace,
        f"DELETE FROM entries WHERE seq > {size}",
        f"DELETE FROM checkpoints WHERE size > {size}",
        f"UPDATE sqlite_sequence SET seq = {size}",
    )


def _with_its_checkpoint(workspace: Workspace) -> None:
    """The file beside the ledger, too, says what the ledger says now."""
    with Ledger.open(workspace.ledger, read_only=True) as ledger:
        workspace.checkpoint.write_text(str(ledger.checkpoint()))


def test_a_ledger_cut_before_a_publish_shows_through_the_manifest(workspace: Workspace) -> None:
    """Even when the cutter knows SQLite's counter and the file: v2 and TD-3 are still there, nothing speaks of them."""
    evidence = digest_bytes(b'{"plan of version":2}').removeprefix("sha256:")
    _cut(workspace, 8)
    expected = [
        "v2: not acknowledged: no ledger entry names it",
        f"versions/objects/{evidence[:2]}/{evidence}: unreferenced object",
        "request TD-3: is in the vault, but no ledger entry received it",
    ]
    assert _found(workspace) == ["checkpoint: signs 14 entries, the ledger has 8", *expected]
    _with_its_checkpoint(workspace)
    assert _found(workspace) == expected


def test_a_ledger_cut_after_the_last_publish_shows_through_the_vault(workspace: Workspace) -> None:
    _cut(workspace, 13)
    _with_its_checkpoint(workspace)
    assert _found(workspace) == ["request TD-3: is in the vault, but no ledger entry received it"]


def test_each_record_is_decrypted_once_and_a_damaged_one_hides_no_strange_one(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, real = list[Path](), Vault._read

    def noting(vault: Vault, path: Path) -> TakedownRequest:
        read.append(path)
        return real(vault, path)

    monkeypatch.setattr(Vault, "_read", noting)
    assert verify(workspace) == [] and sorted(read) == sorted(workspace.vault.glob("*.json")) != []
    Vault(workspace.vault).put(_request("TD-9"))
    damaged = workspace.vault / f"{digest_bytes(b'TD-1').removeprefix('sha256:')}.json"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    found = _found(workspace)
    assert len(found) == 2 and found[0].startswith("request TD-1: vault: ")
    assert found[1] == "request TD-9: is in the vault, but no ledger entry received it"


def test_what_is_cut_everywhere_at_once_shows_only_against_a_checkpoint_kept_elsewhere(
    workspace: Workspace, tmp_path: Path
) -> None:
    """The limit without one: entry, checkpoint and vault record of the newest step all removed."""
    kept = Path(shutil.copy(workspace.checkpoint, tmp_path / "kept"))
    _cut(workspace, 13)
    _with_its_checkpoint(workspace)
    _vault_file(workspace, "TD-3").unlink()
    assert verify(workspace) == []
    (found,) = verify(workspace, checkpoints=[kept])
    assert found.where == "checkpoint kept" and found.found == "signs 14 entries, the ledger has 13"
    assert "cut back" in found.means


def test_a_ledger_that_was_cut_back_is_not_written_to(workspace: Workspace) -> None:
    _cut(workspace, 13)
    with pytest.raises(StoreDamaged, match="checkpoint signs 14 entries, the ledger has 13"):
        Ledger.open(workspace.ledger)


# --- checkpoints kept elsewhere ---------------------------------------------------------------------------


def _all_checkpoints(workspace: Workspace, folder: Path) -> list[Path]:
    """Every checkpoint that was ever signed, as somebody may have kept it."""
    folder.mkdir()
    with closing(sqlite3.connect(workspace.ledger)) as connection:
        notes = connection.execute("SELECT size, note FROM checkpoints ORDER BY size").fetchall()
    assert [size for size, _ in notes] == [1, 3, 4, 8, 9, 13, 14]
    for size, note in notes:
        (folder / str(size)).write_text(note)
    return [folder / str(size) for size, _ in notes]


def test_every_checkpoint_that_was_kept_holds(workspace: Workspace, tmp_path: Path) -> None:
    kept = _all_checkpoints(workspace, tmp_path / "kept")
    assert verify(workspace, checkpoints=kept) == []
    with Ledger.open(workspace.ledger) as ledger:
        _receive(workspace, ledger, "TD-4")
    assert verify(workspace, checkpoints=kept) == [], "the history went on from there"


def test_a_history_rewritten_by_the_owner_of_the_key_shows_against_a_checkpoint_kept_elsewhere(
    workspace: Workspace, tmp_path: Path
) -> None:
    """Everything is signed anew and agrees with itself; from the changed entry on no old checkpoint fits."""
    kept = _all_checkpoints(workspace, tmp_path / "kept")
    _rechain(workspace, lambda events: events[6].update(actor="somebody else"))
    assert verify(workspace) == []
    found = verify(workspace, checkpoints=kept)
    # `_rechain` puts all into one transaction; roots do not depend on that.
    assert [b.where for b in found] == ["checkpoint 8", "checkpoint 9", "checkpoint 13", "checkpoint 14"]
    assert all("have another root" in b.found and "rewritten" in b.means for b in found)


def test_a_history_rewritten_as_it_was_is_the_same_history(workspace: Workspace, tmp_path: Path) -> None:
    kept = _all_checkpoints(workspace, tmp_path / "kept")
    _rechain(workspace)
    assert verify(workspace, checkpoints=kept) == []


def test_a_history_signed_with_other_keys_is_found(workspace: Workspace, tmp_path: Path) -> None:
    kept = _all_checkpoints(workspace, tmp_path / "kept")
    workspace.keys.rename(tmp_path / "old keys")
    create_keys(workspace.keys, ORIGIN)
    (tmp_path / "old keys" / "vault.key").rename(workspace.keys / "vault.key")
    _rechain(workspace)
    found = _found(workspace)
    assert found[:2] == [f"keys/{kind}.pub: is not the key that the first entry names" for kind in ("log", "model")]
    assert [line.split(": ")[:2] for line in found[2:]] == [[f"v{n}", "signature"] for n in range(3)]

    # Whoever also exchanges the keys in the first entry, and every model's signature, makes a lineage of his own.
    for number in range(3):
        manifest, path = _store(workspace).manifest(number), _store(workspace).signature_path(number)
        path.chmod(0o644)
        files = {f.path: f.digest for f in manifest.files}
        path.write_bytes(model_signature(files, f"v{number}", load_model_key(workspace.keys)))

    def own(events: list[dict[str, Any]]) -> None:
        keys = {"log": log_vkey(workspace.keys), "model": model_public_key(workspace.keys).decode()}
        events[0]["data"]["keys"] = keys

    _rechain(workspace, own)
    assert _found(workspace) == [
        f"v{version}: signature: is not the one that ledger entry {seq} names"
        for version, seq in ((0, 1), (1, 7), (2, 12))
    ]

    def signed(events: list[dict[str, Any]]) -> None:
        for event in events:
            if "signature" in event["data"]:
                event["data"]["signature"] = digest_file(_store(workspace).signature_path(event["version"]))

    _rechain(workspace, signed)
    assert verify(workspace) == []
    found = [str(b.where) for b in verify(workspace, checkpoints=kept) if b.where.startswith("checkpoint ")]
    assert found == [f"checkpoint {path.name}" for path in kept], "no old checkpoint is of this key"


@pytest.mark.parametrize("content", [b"", b"junk", b"\xff" * 100, b"x" * 2_000_000])
def test_a_kept_file_that_is_no_checkpoint_is_told(workspace: Workspace, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "kept").write_bytes(content)
    (found,) = verify(workspace, checkpoints=[tmp_path / "kept"])
    assert found.where == "checkpoint kept" and "no checkpoint of this lineage" in found.means
    with pytest.raises(UsageError, match="absent: is missing"):
        verify(workspace, checkpoints=[tmp_path / "absent"])


@pytest.mark.parametrize("kind", ["log", "model"])
def test_a_missing_public_key_is_found(workspace: Workspace, kind: str) -> None:
    (workspace.keys / f"{kind}.pub").unlink()
    assert any(line.startswith(f"keys/{kind}.pub: ") for line in _found(workspace))


@pytest.mark.parametrize("name", ["log.key", "model.key"])
@pytest.mark.parametrize("content", [None, b"", b"junk"])
def test_a_copy_without_private_keys_holds_and_says_that_it_cannot_be_continued(
    workspace: Workspace, name: str, content: bytes | None
) -> None:
    assert key_notes(workspace) == ()
    path = workspace.keys / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert verify(workspace) == []
    (note,) = key_notes(workspace)
    assert str(path) in note and "nothing can be added here" in note


def test_a_private_key_of_another_lineage_is_told(workspace: Workspace, tmp_path: Path) -> None:
    create_keys(tmp_path / "other", "takedown-pipeline/ffeeddccbbaa9988")
    shutil.copy(tmp_path / "other" / "log.key", workspace.keys / "log.key")
    (note,) = key_notes(workspace)
    assert "does not belong to log.pub" in note


def test_an_unsigned_entry_with_a_sound_chain_is_found(workspace: Workspace) -> None:
    with closing(sqlite3.connect(workspace.ledger)) as connection:
        ((previous,),) = connection.execute("SELECT digest FROM entries WHERE seq = 14").fetchall()
    at, event = "2026-11-23T09:00:00.000000Z", Event(kind="withdrawn", actor="t", request_id="TD-3").model_dump()
    digest = digest_json({"at": at, "event": event, "previous": previous, "seq": 15})
    text = canonical_json(event).decode()
    _tamper(workspace, f"INSERT INTO entries VALUES (15, '{at}', '{text}', '{previous}', '{digest}')")
    assert _found(workspace) == ["ledger.db: the last checkpoint signs 14 entries, there are 15"]


# --- a ledger that speaks against itself ------------------------------------------------------------------


def _tree(kind: str, **fields: Any) -> dict[str, Any]:
    return Event(kind=kind, actor="t", **fields).model_dump(mode="json")


def test_a_rewritten_ledger_contradicts_the_manifests(workspace: Workspace) -> None:
    def drop_v1(events: list[dict[str, Any]]) -> None:
        events[:] = [e for e in events if e["version"] != 1 and e["run_id"] != "run-1"]

    _rechain(workspace, drop_v1)
    assert "v1: not acknowledged: no ledger entry names it" in _found(workspace)
    assert any("removed, or the manifest was put there by hand" in b.means for b in verify(workspace))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda es: es[6]["data"].update(root="root-sha256:00"), "v1: the manifest has root"),
        (lambda es: es[6]["data"].update(manifest="sha256:00"), "v1: the manifest has digest"),
        (lambda es: es[6]["data"].update(parent=None), "v1: the manifest has parent 0, ledger entry 7 says None"),
        (lambda es: es[6]["data"].clear(), "v1: the manifest has digest"),
        (lambda es: es[6]["data"].update(deltas={}), "no ledger entry names it"),
        (lambda es: es[6]["data"].update(deltas=7), "no ledger entry names it"),
        (lambda es: [d.update(digest="sha256:00") for d in es[6]["data"]["deltas"].values()], "changed after"),
        (lambda es: es[6].update(version=7), "v7: has no manifest, but ledger entry 7 published it"),
        (lambda es: es[6].update(version=None), "ledger entry 7: published names no version"),
        (lambda es: es[6].update(run_id="run-9"), "v1 was published by run-9, which no earlier entry accepted"),
        (lambda es: es.append(es[6]), "ledger entry 15: published names v1, which an earlier entry"),
        (lambda es: es[5].update(version=2), "request TD-1 is applied in v2, whose manifest does not list it"),
        (lambda es: es[5].update(version=None), "request TD-1 is applied, but no version is named"),
        (lambda es: es[5].update(request_id="TD-9"), "request 'TD-9' is applied, but no earlier entry received it"),
        (lambda es: es.pop(1), "v1: lists request TD-1, which no ledger entry received"),
        (lambda es: es.pop(3), "run-1 was accepted, but no earlier entry planned it"),
        (lambda es: es.insert(5, es.pop(3)), "run-1 was accepted, but no earlier entry planned it"),
        (lambda es: es[4]["data"].clear(), "run-1 was accepted without evidence"),
        (lambda es: es[4]["data"]["evidence"].update(plan="sha256:" + "0" * 64), "evidence 'plan'): is missing"),
        (lambda es: es[4]["data"]["evidence"].update(plan="../key"), "is not a SHA-256 digest"),
        (lambda es: es[7].update(kind="reinstated"), "request 'TD-1' is reinstated, but was applied before"),
        (lambda es: es[0]["data"].pop("keys"), "no first entry names the lineage's keys"),
        (lambda es: es[0]["data"]["keys"].update(log="x"), "keys/log.pub: is not the key that the first entry names"),
        (lambda es: es.append(_tree("rolled-back", version=7)), "v7 was put in force, which no earlier entry"),
        (lambda es: es.append(_tree("rolled-back")), "vNone was put in force"),
        (lambda es: es.append(_tree("purging", data={"versions": [0]})), "a purge was begun and not ended"),
        (lambda es: es.append(_tree("purged", data={"versions": [0]})), "belongs to a purged version"),
        (lambda es: es.append(_tree("purged", data={"versions": [[0], None]})), ""),
    ],
)
def test_a_ledger_that_contradicts_itself_or_the_store(
    workspace: Workspace, change: Callable[[list[dict[str, Any]]], object], expected: str
) -> None:
    _rechain(workspace, change)
    found = _found(workspace)
    assert any(expected in line for line in found) if expected else found == [], found


def test_a_rollback_is_no_break(workspace: Workspace) -> None:
    with Ledger.open(workspace.ledger) as ledger:
        ledger.append(
            Event(kind="rolled-back", actor="t", version=1),
            Event(kind="regressed", actor="t", version=1, request_id="TD-2"),
        )
    assert verify(workspace) == []


@pytest.mark.parametrize("content", [None, b"", b"x" * 5000])
def test_a_ledger_that_is_none(workspace: Workspace, content: bytes | None) -> None:
    workspace.ledger.unlink()
    if content is not None:
        workspace.ledger.write_bytes(content)
    first, second = _found(workspace)
    assert first.startswith("ledger.db: ")
    assert second.startswith("everything else: was not checked: keys, versions, requests")


def test_an_unreadable_ledger_is_told_before_what_follows_from_it(workspace: Workspace) -> None:
    """A page that SQLite cannot read, and entries that are all of another kind: no line for every version and file."""
    with closing(sqlite3.connect(workspace.ledger, isolation_level=None)) as connection:
        for statement in TRIGGERS:
            connection.execute(f"DROP TRIGGER {statement.split()[2]}")
        connection.execute("UPDATE entries SET event = '{'")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    found = _found(workspace)
    assert all(line.startswith(("ledger.db", "checkpoint")) for line in found[:-1])
    assert found[-1].startswith("everything else: was not checked")
    data = bytearray(workspace.ledger.read_bytes())
    data[100:108] = b"\xff" * 8  # the header of the first page's tree
    workspace.ledger.write_bytes(bytes(data))
    workspace.marker.unlink()
    cause, unchecked, marker = _found(workspace)
    assert cause.startswith("ledger.db: ") and unchecked.startswith("everything else: ")
    assert marker.startswith("workspace.json: ")


# --- manifests, lineage, objects --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "change", "expected"),
    [
        (2, lambda t: t.update(parent_root="root-sha256:" + "0" * 64), "v2: names v1 with root"),
        (2, lambda t: t.update(parent=0), "v2: names v0 with root"),
        (2, lambda t: t.update(parent=2), "v2: names v2 as its parent"),
        (2, lambda t: t.update(parent=None), "v2: names parent None"),
        (0, lambda t: t.update(parent=0), "v0: names parent 0"),
        (1, lambda t: t.update(root="root-sha256:" + "0" * 64), "v1: v1: its table of tensors has root"),
        (1, lambda t: t.update(tensors="sha256:" + "0" * 64), "(v1: table of tensors): is missing"),
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
    store.objects.paths(weights.digest)[-1].unlink()
    assert [line.split(": ")[-1] for line in _found(workspace)] == ["is missing"]
    store.manifest_path(1).unlink()
    found = _found(workspace)
    assert "v1: has no manifest, but ledger entry 7 published it" in found
    assert "versions/000001.sig: does not belong into the version store" in found
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
    deltas = workspace.versions / "deltas"
    stray = deltas / "ab" / f"ab{'0' * 62}.{'1' * 64}"
    stray.parent.mkdir(exist_ok=True)
    for path in (objects / "ab" / ("ab" + "0" * 62), objects / "note", workspace.versions / "1.json", stray):
        path.write_bytes(b"")
    for path in (objects / "ab" / ".tmp-x", objects / ".tmp-y", workspace.versions / ".tmp-z", deltas / ".tmp-d"):
        path.write_bytes(b"")
    assert _found(workspace) == [
        f"versions/deltas/ab/ab{'0' * 62}.{'1' * 64}: unreferenced object",
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
        published = _publish(workspace, 3, store.manifest(2), "TD-3", seed=4)
        assert len(store.collect(all_evidence(ledger.entries()))) == 2  # the delta that led elsewhere, and its table
        _acknowledge(workspace, ledger, published)
        assert current_version(ledger.entries()) == 3
    assert verify(workspace) == []


# --- vault and marker -------------------------------------------------------------------------------------


def _vault_file(workspace: Workspace, request_id: str) -> Path:
    return workspace.vault / f"{digest_bytes(request_id.encode()).removeprefix('sha256:')}.json"


def test_a_missing_or_changed_vault_record_is_found(workspace: Workspace) -> None:
    path = _vault_file(workspace, "TD-1")
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (line,) = _found(workspace)
    assert line.startswith("request TD-1: vault: ")
    path.unlink()
    (line,) = _found(workspace)
    assert "is missing" in line


def test_an_exchanged_text_contradicts_its_commitment(workspace: Workspace) -> None:
    """Sealed anew, or written as old releases did, the record is sound by itself; the ledger knows better."""
    vault = Vault(workspace.vault)
    other = vault.get("TD-1").model_copy(update={"text": "something else"})
    vault.put(other, replace=True)
    (line,) = _found(workspace)
    assert line.startswith("request TD-1: its text in the vault")
    plain_record(workspace.vault, other)
    assert _found(workspace) == [line]


@pytest.mark.parametrize(("field", "value"), [("title", "Other"), ("rights_holder", "Other"), ("contact", "x@y")])
def test_another_title_holder_or_contact_contradicts_the_commitment(
    workspace: Workspace, field: str, value: str
) -> None:
    vault, request = Vault(workspace.vault), _request("TD-9")
    vault.put(request)
    data = {"batch_id": "b1", "received_at": "2026-11-23T09:00:00Z", "commitment": vault.commitment(request.text),
            "record": vault.record_commitment(request)}  # fmt: skip
    with Ledger.open(workspace.ledger) as ledger:
        ledger.append(Event(kind="received", actor="t", request_id="TD-9", data=data))
    assert verify(workspace) == []
    vault.put(request.model_copy(update={field: value}), replace=True)
    told = "its record in the vault has another title, rights holder, basis or contact than the ledger committed to"
    assert _found(workspace) == [f"request TD-9: {told}"]
    vault.put(request.model_copy(update={"text": "other words"}), replace=True)
    (line,) = _found(workspace)
    assert line.startswith("request TD-9: its text in the vault"), "the text is named once, not as a record, too"


def test_a_lost_key_is_found(workspace: Workspace) -> None:
    (workspace.vault / "key").unlink()
    assert len(_found(workspace)) == 3


def test_a_foreign_or_broken_vault_file_is_found(workspace: Workspace) -> None:
    (workspace.vault / "stray.json").write_text("{}")
    assert len(_found(workspace)) == 1


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"format": 99}', b"[" * 100_000])
def test_a_bad_marker_is_found(workspace: Workspace, content: bytes | None) -> None:
    workspace.marker.unlink()
    if content is not None:
        workspace.marker.write_bytes(content)
    (line,) = _found(workspace)
    assert line.startswith("workspace.json: ")


def test_an_empty_folder_gives_breaks_not_exceptions(tmp_path: Path) -> None:
    found = [line.split(":")[0] for line in _found(Workspace(tmp_path))]
    assert found == ["ledger.db", "everything else", "workspace.json"]
