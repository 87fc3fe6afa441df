"""The sound store that every case starts from, and the tools of whoever tampers with it.

In: an empty folder. Out: a small store with everything that a history can hold, and beside it what an auditor kept
elsewhere. Never: a tool that needs a private key, unless it is handed one.
"""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import struct
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from histories import array_model, make_step, start_history
from safetensors.numpy import load_file, save_file
from workspaces import draw_text, take_in, write_batch

from pipeline.chain import GENESIS, leaf_data
from pipeline.digests import tensor_root
from pipeline.files import canonical_json, digest_bytes, digest_file
from pipeline.keys import log_vkey
from pipeline.ledger import SCHEMA, Ledger
from pipeline.merkle import leaf_hash, root_of_hashes
from pipeline.notes import Checkpoint, checkpoint_text, parse_vkey, sign_note
from pipeline.objects import hexadecimal
from pipeline.records import Event
from pipeline.rollback import roll_back
from pipeline.safefile import file_and_tensor_digests
from pipeline.seals import INDEX, NAME, Seal, index_file, seal_text
from pipeline.vault import Vault
from pipeline.versions import VersionStore, table_bytes
from pipeline.workspace import Workspace

TRIGGERS = tuple(statement for statement in SCHEMA if statement.startswith("CREATE TRIGGER"))
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Scene:
    """One folder with a store and what lies beside it.

    Attributes:
        folder: ``store/`` the workspace, ``kept/`` checkpoints that somebody kept elsewhere while it was sound
            (``first``: of the time of v1; ``newest``), ``backup/`` the ledger with checkpoint and seal before TD-5
            arrived, ``batch.json`` a batch that can be submitted.
        other: A sound workspace of another lineage; only read.
    """

    folder: Path
    other: Path

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.folder / "store")

    @property
    def store(self) -> VersionStore:
        return VersionStore(self.workspace.versions)

    def kept(self, name: str) -> Path:
        """A checkpoint that was kept elsewhere."""
        return self.folder / "kept" / name

    def backup(self, name: str) -> Path:
        """A file of the workspace as it was before TD-5 arrived."""
        return self.folder / "backup" / name

    # --- where things lie ----------------------------------------------------------------------------------

    def digest(self, version: int, name: str = WEIGHTS) -> str:
        """Digest of one file of a version."""
        return next(f.digest for f in self.store.manifest(version).files if f.path == name)

    def whole(self, version: int, name: str = WEIGHTS) -> Path:
        """Where one file of a version lies if it is kept whole."""
        return self.store.objects.object_path(self.digest(version, name))

    def table(self, version: int) -> Path:
        """Where the table of a version's tensors lies."""
        return self.store.objects.object_path(self.store.manifest(version).tensors)

    def delta(self, version: int) -> Path:
        """The delta that a version's weights are kept as."""
        return self.store.objects.paths(self.digest(version))[-1]

    def evidence(self, run: int, name: str) -> Path:
        """A record that a run left, by the number of the run among all that were decided."""
        rows = [event for _, event in read_log(self.workspace) if event["kind"] == "accepted"]
        return self.store.objects.object_path(rows[run]["data"]["evidence"][name])

    def record(self, request_id: str) -> Path:
        """The vault's file of a request."""
        return self.workspace.vault / f"{hexadecimal(digest_bytes(request_id.encode()))}.json"


def sound_scene(folder: Path, other: Path) -> Scene:
    """Make the sound store.

    v0 whole, v1 without TD-1, v2 without TD-2, v3 without TD-3, each a delta on the one before; rolled back to v2 with
    an override, which brings TD-3 back; v4, made from v2, without TD-3. TD-4 is on legal hold, TD-5 waits. The last
    entry of the log is the receipt of TD-5.
    """
    folder.mkdir(parents=True)
    workspace = start_history(folder / "store", array_model(folder / "model"))
    scene = Scene(folder, other)
    scene.kept("").mkdir()
    make_step(workspace, "TD-1")
    shutil.copyfile(workspace.checkpoint, scene.kept("first"))
    make_step(workspace, "TD-2")
    make_step(workspace, "TD-3")
    roll_back(workspace, 2, "tester", "v3 answers slowly", override=True)
    make_again(workspace, "TD-3", share=0.06)
    take_in(workspace, "batch-TD-4", {"TD-4": draw_text("TD-4", 30)})
    with Ledger.open(workspace.ledger) as ledger:
        ledger.append(Event(kind="hold", actor="tester", request_id="TD-4", data={"reason": "litigation"}))
    settle(workspace)
    scene.backup("").mkdir()
    for name in ("ledger.db", "checkpoint", "seal"):
        shutil.copyfile(workspace.root / name, scene.backup(name))
    take_in(workspace, "batch-TD-5", {"TD-5": draw_text("TD-5", 30)}, contact="td-5@holder.example")
    shutil.copyfile(workspace.checkpoint, scene.kept("newest"))
    write_batch(folder, "batch", {"TD-6": draw_text("TD-6", 30)})
    shutil.rmtree(folder / "model")
    settle(workspace)
    return scene


def other_lineage(folder: Path) -> Path:
    """A sound workspace of another lineage, with a version of its own."""
    folder.mkdir(parents=True)
    workspace = start_history(folder / "other", array_model(folder / "model", seed=7))
    make_step(workspace, "TD-1")
    settle(workspace)
    return workspace.root


def make_again(workspace: Workspace, request_id: str, share: float) -> None:
    """One more step for a request that was received before."""
    from histories import prepare_step, publish

    publish(workspace, prepare_step(workspace, [request_id], share, submit=False))


def settle(workspace: Workspace) -> None:
    """Fold the write-ahead log into the database, and remove what only a running process needs."""
    with closing(sqlite3.connect(workspace.ledger)) as connection:
        busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    assert not busy
    for path in (workspace.ledger.with_name("ledger.db-wal"), workspace.ledger.with_name("ledger.db-shm")):
        assert not path.exists() or path.suffix == ".db-shm" or not path.stat().st_size
        path.unlink(missing_ok=True)
    (workspace.root / ".lock").unlink(missing_ok=True)


# --- files ------------------------------------------------------------------------------------------------


def overwrite(path: Path, data: bytes) -> None:
    """Write over a file in place, whatever its mode."""
    path.chmod(0o644)
    path.write_bytes(data)


def flip(path: Path, at: int | None = None) -> None:
    """Flip one bit of one byte, in the middle if no place is given."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    overwrite(path, bytes(data))


def cut(path: Path) -> None:
    """Lose the second half of a file."""
    data = path.read_bytes()
    overwrite(path, data[: len(data) // 2])


def exchange(first: Path, second: Path) -> None:
    """Exchange the contents of two files."""
    data = first.read_bytes()
    overwrite(first, second.read_bytes())
    overwrite(second, data)


def delta_parts(data: bytes) -> tuple[bytes, bytes]:
    """Payloads and footer of a delta file; see `pipeline.footer` for its layout."""
    (length,) = struct.unpack("<Q", data[-40:-32])
    return data[: -40 - length], data[-40 - length : -40]


def sealed_delta(payloads: bytes, footer: bytes) -> bytes:
    """A delta file with the digest at its end that belongs to its content."""
    body = payloads + footer + struct.pack("<Q", len(footer))
    return body + bytes.fromhex(hexadecimal(digest_bytes(body)))


def other_weights(scene: Scene, version: int, folder: Path) -> Path:
    """Weights of a version with one tensor doubled: what somebody would rather have published."""
    source = folder / "published"
    scene.store.restore(version, source)
    weights = load_file(source / WEIGHTS)
    weights["layer.0.weight"] = weights["layer.0.weight"] * np.float32(2)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    shutil.rmtree(source)
    return folder / WEIGHTS


def republish(scene: Scene, version: int, weights: Path) -> None:
    """Put other weights into a version: object, table and manifest agree with each other; the log is left as it is."""
    digest, tensors = file_and_tensor_digests(weights)
    objects = scene.store.objects
    objects.put(weights, digest)
    path = scene.store.manifest_path(version)
    tree = json.loads(path.read_bytes())
    tree |= {"root": tensor_root(tensors), "tensors": objects.put_bytes(table_bytes(tensors))}
    for file in tree["files"]:
        if file["path"] == WEIGHTS:
            file |= {"digest": digest, "size": weights.stat().st_size}
    overwrite(path, canonical_json(tree) + b"\n")


def rewrite_record(scene: Scene, request_id: str, **fields: str) -> None:
    """Change fields of a vault record, and the digest in it accordingly."""
    vault = Vault(scene.workspace.vault)
    vault.put(vault.get(request_id).model_copy(update=fields), replace=True)


# --- the log ----------------------------------------------------------------------------------------------

Rows = list[tuple[str, dict[str, Any]]]
"""Time and event of every entry."""


def read_log(workspace: Workspace) -> Rows:
    """All entries, as they are stored."""
    with closing(sqlite3.connect(f"{workspace.ledger.as_uri()}?mode=ro", uri=True)) as connection:
        rows = connection.execute("SELECT at, event FROM entries ORDER BY seq").fetchall()
    return [(at, json.loads(event)) for at, event in rows]


def sql(workspace: Workspace, *statements: str | tuple[str, Sequence[Any]]) -> None:
    """Run SQL on the ledger behind its triggers, and leave no trace in them."""
    with closing(sqlite3.connect(workspace.ledger, isolation_level=None)) as connection:
        for statement in TRIGGERS:
            connection.execute(f"DROP TRIGGER {statement.split()[2]}")
        for found in statements:
            connection.execute(*((found,) if isinstance(found, str) else found))
        for statement in TRIGGERS:
            connection.execute(statement)
    settle(workspace)


def cut_log(workspace: Workspace, last: int) -> None:
    """Cut the log back to a number of entries, with its checkpoints and SQLite's own count."""
    sql(
        workspace,
        f"DELETE FROM entries WHERE seq > {last}",
        f"DELETE FROM checkpoints WHERE size > {last}",
        f"UPDATE sqlite_sequence SET seq = {last}",
    )


def newest_checkpoint(workspace: Workspace) -> None:
    """Make the file beside the database say what the database says."""
    with Ledger.open(workspace.ledger, read_only=True) as ledger:
        overwrite(workspace.checkpoint, str(ledger.checkpoint()).encode())
    settle(workspace)


def rechain(workspace: Workspace, change: Callable[[Rows], object], key: Ed25519PrivateKey | None = None) -> None:
    """Rewrite the log with a chain that holds from its first entry to its last.

    Args:
        workspace: Whose.
        change: Changes the entries.
        key: Signs every checkpoint anew, in the name that ``log.pub`` has; without one the checkpoints stay.
    """
    rows = read_log(workspace)
    change(rows)
    entries, previous = list[tuple[int, str, str, str, str]](), GENESIS
    hashes = list[bytes]()
    for seq, (at, event) in enumerate(rows, 1):
        text = canonical_json(event).decode()
        leaf = leaf_data(seq, at, text, previous)
        entries.append((seq, at, text, previous, digest_bytes(leaf)))
        hashes.append(leaf_hash(leaf))
        previous = entries[-1][-1]
    statements = list[str | tuple[str, Sequence[Any]]](["DELETE FROM entries"])
    statements += [("INSERT INTO entries VALUES (?, ?, ?, ?, ?)", entry) for entry in entries]
    statements += [f"UPDATE sqlite_sequence SET seq = {len(entries)}"]
    if key is not None:
        statements += ["DELETE FROM checkpoints"]
        statements += [
            ("INSERT INTO checkpoints VALUES (?, ?)", (size, signed(workspace, hashes[:size], key)))
            for size in _sizes(workspace, len(entries))
        ]
    sql(workspace, *statements)
    if key is not None:
        newest_checkpoint(workspace)
        reseal(workspace, key)


def reseal(workspace: Workspace, key: Ed25519PrivateKey) -> None:
    """Seal the databases as they are, in the name that ``log.pub`` has."""
    origin, index = parse_vkey(log_vkey(workspace.keys)).name, index_file(workspace.root / INDEX, lambda _: True)
    assert index is not None and index.digest is not None
    with Ledger.open(workspace.ledger, read_only=True) as ledger:
        image = ledger.image()
    seal = Seal(image.entries, digest_bytes(image.pages), (index.state, index.digest))
    overwrite(workspace.root / NAME, sign_note(seal_text(seal, origin), origin, key).encode())
    settle(workspace)


def unused_byte(path: Path) -> int:
    """Place of a byte of a database that belongs to no row: the middle of its longest run of zeros."""
    runs = sorted(re.finditer(rb"\0+", path.read_bytes()), key=lambda run: run.end() - run.start())
    return (runs[-1].start() + runs[-1].end()) // 2


def _sizes(workspace: Workspace, entries: int) -> list[int]:
    """Where the log is to have checkpoints: where it had some, and at its end."""
    with closing(sqlite3.connect(f"{workspace.ledger.as_uri()}?mode=ro", uri=True)) as connection:
        found = [size for (size,) in connection.execute("SELECT size FROM checkpoints")]
    return sorted({size for size in found if size < entries} | {entries})


def signed(workspace: Workspace, hashes: Sequence[bytes], key: Ed25519PrivateKey) -> str:
    """A checkpoint over leaves."""
    origin = parse_vkey(log_vkey(workspace.keys)).name
    return sign_note(checkpoint_text(Checkpoint(origin, len(hashes), root_of_hashes(hashes))), origin, key)


def append_row(workspace: Workspace, **event: Any) -> None:
    """Put an entry behind the last one with a sound chain, but without a signature."""
    rechain(workspace, lambda rows: rows.append((rows[-1][0], tree(**event))))


def tree(**event: Any) -> dict[str, Any]:
    """An event as the log has it."""
    return Event(actor="tester", **event).model_dump(mode="json")


def place_of(rows: Rows, kind: str, **fields: Any) -> int:
    """Where the first entry of a kind stands."""
    return next(n for n, (_, e) in enumerate(rows) if e["kind"] == kind and all(e[k] == v for k, v in fields.items()))


def remove_entry(kind: str, **fields: Any) -> Callable[[Rows], object]:
    """A change that leaves one entry out."""
    return lambda rows: rows.pop(place_of(rows, kind, **fields))


def chain_paths(scene: Scene, version: int) -> list[Path]:
    """The deltas between whole files and a version, in order."""
    chain = scene.store.objects.chain(scene.digest(version)) or ()
    return [scene.store.objects.delta_path(target, base) for base, target in pairwise(chain)]


def as_named(scene: Scene, path: Path) -> Path:
    """Where a file of the store would lie under the name of its content."""
    return scene.store.objects.object_path(digest_file(path))
