"""The tampered stores: what was done to each, and what the command line must answer.

In: the sound store of `scene.py`. Out: a table. Never: a case whose answer depends on the clock or on chance.

Three kinds of hands: a failing disk; somebody who can write to the folder but has no key; and whoever owns the keys.
Against the last one, and against a history that was cut back everywhere at once, nothing inside the folder can help:
those cases end in exit 0, and in 1 only with a checkpoint that was kept elsewhere.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from safetensors.numpy import load_file, save_file
from workspaces import plain_record

from pipeline.delta import WholeFile, write_delta
from pipeline.files import canonical_json, digest_bytes
from pipeline.keys import load_log_key, load_model_key, log_vkey
from pipeline.ledger import Ledger
from pipeline.notes import parse_vkey, vkey
from pipeline.objects import hexadecimal
from pipeline.oms import model_signature
from pipeline.records import Event
from pipeline.upkeep import purge
from pipeline.vault import Vault
from tampered.scene import (
    WEIGHTS,
    Rows,
    Scene,
    append_row,
    as_named,
    cut,
    cut_log,
    delta_parts,
    exchange,
    flip,
    newest_checkpoint,
    other_weights,
    overwrite,
    place_of,
    read_log,
    rechain,
    remove_entry,
    republish,
    rewrite_record,
    sealed_delta,
    settle,
    sql,
    tree,
    unused_byte,
)

FORGED = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
"""A key that is not the lineage's."""


class Call(NamedTuple):
    """One call, made in the folder of the case, and its answer.

    Attributes:
        command: What follows ``takedown -w store``.
        code: Exit code.
        says: What stands in the output, line breaks and runs of spaces taken as one space.
    """

    command: str
    code: int
    says: str


class Case(NamedTuple):
    """One tampered store.

    Attributes:
        name: Its folder.
        done: What was done to it.
        tamper: Does it to a copy of the sound store.
        calls: In this order; later ones find what earlier ones wrote.
    """

    name: str
    done: str
    tamper: Callable[[Scene], object]
    calls: tuple[Call, ...]


VERIFY, QUICK, DEEP = "verify --json", "verify --quick --json", "verify --deep --json"
FIRST, NEWEST = "verify --json --checkpoint kept/first", "verify --json --checkpoint kept/newest"
SUBMIT = "submit batch.json --actor tester"
BACK = "rollback v1 --override --reason tested --actor tester"
PURGE = "purge --before v2 --reason tested --actor tester"

HOLDS = "[]"
"""What `verify --json` says of a store without breaks."""

SOUND = {
    VERIFY: Call(VERIFY, 0, HOLDS),
    QUICK: Call(QUICK, 0, HOLDS),
    DEEP: Call(DEEP, 0, HOLDS),
    FIRST: Call(FIRST, 0, HOLDS),
    NEWEST: Call(NEWEST, 0, HOLDS),
    "status": Call("status", 0, "Current version: v4"),
    "first-version TD-1": Call("first-version TD-1", 0, "v1 root-sha256:"),
    "checkout v0 out": Call("checkout v0 out", 0, "Wrote v0"),
    "checkout v1 out": Call("checkout v1 out", 0, "Wrote v1"),
    "checkout v2 out": Call("checkout v2 out", 0, "Wrote v2"),
    "checkout v3 out": Call("checkout v3 out", 0, "Wrote v3"),
    PURGE: Call(PURGE, 1, "On legal hold: TD-4. Nothing was destroyed"),
    BACK: Call(BACK, 0, "v1 is current now; it was v4."),
    SUBMIT: Call(SUBMIT, 0, "Took in 1 requests of batch"),
}
"""What the sound store answers to every command that a case uses; the writing ones last."""


def _no(command: str, says: str) -> Call:
    return Call(command, 1, says)


def _out(version: int, says: str) -> Call:
    """A checkout that must fail."""
    return Call(f"checkout v{version} out", 1, says)


# --- contents ---------------------------------------------------------------------------------------------

UNREAD = SOUND[QUICK]
"""A quick look reads no content, so what only changed bytes of one is not seen."""


def _reorder_tensors(scene: Scene) -> None:
    """The same tensors in another order, the header accordingly: every tensor has its digest, the file has not."""
    path = scene.whole(0)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header, size = data[8:start], (len(data) - start) // 3
    # All three have one shape, so exchanging two names exchanges two tensors.
    for old, new in ((b"layer.0", b"layer.X"), (b"layer.1", b"layer.0"), (b"layer.X", b"layer.1")):
        header = header.replace(old, new)
    first, second, rest = data[start : start + size], data[start + size : start + 2 * size], data[start + 2 * size :]
    overwrite(path, data[:8] + header + second + first + rest)


def _exchange_tensors(scene: Scene) -> None:
    """Two tensors under each other's names; a well-formed weight file of another model."""
    path = scene.whole(0)
    weights = load_file(path)
    weights["layer.0.weight"], weights["layer.1.weight"] = weights["layer.1.weight"], weights["layer.0.weight"]
    with tempfile.TemporaryDirectory() as folder:
        save_file(weights, Path(folder) / WEIGHTS, metadata={"format": "pt"})
        overwrite(path, (Path(folder) / WEIGHTS).read_bytes())


def _seal_flipped_delta(scene: Scene) -> None:
    path = scene.delta(2)
    payloads, footer = delta_parts(path.read_bytes())
    changed = bytearray(payloads)
    changed[-1] ^= 1
    overwrite(path, sealed_delta(bytes(changed), footer))


def _flip_footer(scene: Scene) -> None:
    path = scene.delta(2)
    payloads, footer = delta_parts(path.read_bytes())
    flip(path, len(payloads) + len(footer) // 2)


def _delta_of_other_base(scene: Scene) -> None:
    """v2's weights as a delta on v0, sound in itself, under the name of the delta on v1."""
    path = scene.delta(2)
    with tempfile.TemporaryDirectory() as folder:
        scene.store.restore(2, Path(folder) / "v2")
        target = WholeFile(Path(folder) / "v2" / WEIGHTS, scene.digest(2))
        with (Path(folder) / "delta").open("wb") as stream:
            write_delta(WholeFile(scene.whole(0), scene.digest(0)), target, stream)
        overwrite(path, (Path(folder) / "delta").read_bytes())


def _delta_to_other_target(scene: Scene) -> None:
    """A sound delta on v1 that leads to somebody's own weights, under the name of v2's."""
    path = scene.delta(2)
    with tempfile.TemporaryDirectory() as folder:
        weights = other_weights(scene, 2, Path(folder))
        scene.store.restore(1, Path(folder) / "v1")
        with (Path(folder) / "delta").open("wb") as stream:
            # Footer and name agree: it says that it leads to what it does not lead to.
            base = WholeFile(Path(folder) / "v1" / WEIGHTS, scene.digest(1))
            write_delta(base, WholeFile(weights, scene.digest(2)), stream)
        overwrite(path, (Path(folder) / "delta").read_bytes())


def _rename_object(scene: Scene) -> None:
    path = scene.whole(0, "config.json")
    target = as_named(scene, scene.table(1)).with_name("0" * 64)
    path.rename(target)


def _link_object(scene: Scene) -> None:
    path = scene.whole(0)
    path.rename(scene.folder / "elsewhere")
    path.symlink_to(scene.folder / "elsewhere")


def _pipe(path: Path) -> None:
    """A pipe in the place of a file: who opens it carelessly waits for ever."""
    path.unlink()
    os.mkfifo(path)


def _endless(path: Path) -> None:
    """A file of a terabyte that takes no room on the disk: who reads it whole has no memory left."""
    path.chmod(0o644)
    os.truncate(path, 1 << 40)


def _stray(scene: Scene) -> None:
    scene.store.objects.put_bytes(b"put there by hand")


CONTENTS = (
    Case(
        "object-weights-byte", "One bit of v0's weights was flipped.",
        lambda s: flip(s.whole(0)),
        (_no(VERIFY, "it was changed after it was published"), UNREAD, _no(DEEP, "it was changed after"),
         _out(0, "it was changed after it was published"), _out(3, "Restore this file from a backup"),
         _no(BACK, "Restore this file from a backup")),
    ),
    Case(
        "object-config-byte", "One bit of config.json, which all versions share, was flipped.",
        lambda s: flip(s.whole(0, "config.json")),
        (_no(VERIFY, "(v4: config.json)"), UNREAD, _out(3, "v3: config.json:")),
    ),
    Case(
        "object-table-byte", "One bit of v2's table of tensors was flipped.",
        lambda s: flip(s.table(2)),
        (_no(VERIFY, "(v2: table of tensors)"), UNREAD, SOUND["checkout v2 out"]),
    ),
    Case(
        "object-evidence-byte", "One bit of a measurement that a run left as evidence was flipped.",
        lambda s: flip(s.evidence(1, "evaluate")),
        (_no(VERIFY, "what was measured for it cannot be shown"), UNREAD, SOUND["checkout v2 out"]),
    ),
    Case(
        "object-evidence-replaced", "A measurement was replaced by that of another run, under its name.",
        lambda s: overwrite(s.evidence(1, "evaluate"), s.evidence(0, "evaluate").read_bytes()),
        (_no(VERIFY, "evidence 'evaluate'"), UNREAD),
    ),
    Case(
        "object-truncated", "v0's weights lost their second half.",
        lambda s: cut(s.whole(0)),
        (_no(VERIFY, "it was changed after"), _no(QUICK, "bytes, the manifest says"),
         _out(0, "v0: model.safetensors:")),
    ),
    Case(
        "object-removed", "v0's weights were deleted.",
        lambda s: s.whole(0).unlink(),
        (_no(VERIFY, "is missing"), _no(QUICK, "(v4: model.safetensors)"), _out(3, "no deltas lead to it")),
    ),
    Case(
        "object-renamed", "config.json was given the name of another digest.",
        _rename_object,
        (_no(VERIFY, "unreferenced object"), _no(QUICK, "is missing"), _out(0, "is missing")),
    ),
    Case(
        "object-linked", "v0's weights were moved out of the store, with a link to them in their place.",
        _link_object,
        (_no(VERIFY, "is not a regular file"), _no(QUICK, "is not a regular file")),
    ),
    Case(
        "object-pipe", "v0's weights were replaced by a pipe, on which a careless reader waits for ever.",
        lambda s: _pipe(s.whole(0)),
        (_no(VERIFY, "is not a regular file"), _no(QUICK, "is not a regular file"), _out(0, "no deltas lead to it")),
    ),
    Case(
        "object-extra", "A content that nothing names was put into the store.",
        _stray,
        (_no(VERIFY, "unreferenced object"), _no(QUICK, "unreferenced object"), SOUND["checkout v3 out"]),
    ),
    Case(
        "store-extra-file", "A file that does not belong there was put beside the manifests.",
        lambda s: (s.workspace.versions / "notes.txt").write_text("mine"),
        (_no(VERIFY, "does not belong into the version store"), SOUND["checkout v3 out"]),
    ),
    Case(
        "tensors-reordered", "Two tensors of v0's weights changed places, and so did their names in the header.",
        _reorder_tensors,
        (_no(VERIFY, "it was changed after"), UNREAD, _out(0, "v0: model.safetensors:"),
         _no(DEEP, "it was changed after")),
    ),
    Case(
        "tensors-exchanged", "Two tensors of v0's weights were exchanged under each other's names.",
        _exchange_tensors,
        (_no(VERIFY, "it was changed after"), UNREAD, _out(0, "it was changed after it was published"),
         _out(2, "layer.0.weight")),
    ),
    Case(
        "delta-payload-byte", "One bit of a change in v2's delta was flipped.",
        lambda s: flip(s.delta(2), 40),
        (_no(VERIFY, "it was changed after"), UNREAD, _out(2, "v2: model.safetensors:"),
         _out(3, "v3: model.safetensors:"), SOUND["checkout v1 out"]),
    ),
    Case(
        "delta-footer-byte", "One bit of the list of tensors in v2's delta was flipped.",
        _flip_footer,
        (_no(VERIFY, "it was changed after"), UNREAD, _out(3, "footer"), SOUND["checkout v1 out"]),
    ),
    Case(
        "delta-trailer-byte", "One bit of the digest at the end of v2's delta was flipped.",
        lambda s: flip(s.delta(2), s.delta(2).stat().st_size - 1),
        (_no(VERIFY, "it was changed after"), UNREAD, _out(3, "does not match the digest at its end")),
    ),
    Case(
        "delta-resealed", "One bit of a change in v2's delta was flipped and the digest at its end made anew.",
        _seal_flipped_delta,
        (_no(VERIFY, "it was changed after"), UNREAD, _out(2, "v2: model.safetensors:"), SOUND["checkout v1 out"]),
    ),
    Case(
        "delta-truncated", "v2's delta lost its second half.",
        lambda s: cut(s.delta(2)),
        (_no(VERIFY, "bytes, the ledger says"), _no(QUICK, "bytes, the ledger says"),
         _out(3, "v3: model.safetensors:")),
    ),
    Case(
        "delta-emptied", "v2's delta has no bytes any more.",
        lambda s: overwrite(s.delta(2), b""),
        (_no(VERIFY, "bytes, the ledger says"), _no(QUICK, "bytes, the ledger says"), _out(3, "too short for a delta")),
    ),
    Case(
        "delta-removed", "v1's delta, in the middle of the chain, was deleted.",
        lambda s: s.delta(1).unlink(),
        (_no(VERIFY, "is missing"), _no(QUICK, "is missing"), _out(3, "no deltas lead to it"),
         SOUND["checkout v0 out"]),
    ),
    Case(
        "deltas-exchanged", "The deltas of v1 and v2 were exchanged under each other's names.",
        lambda s: exchange(s.delta(1), s.delta(2)),
        (_no(VERIFY, "(v1: model.safetensors)"), _no(VERIFY, "(v2: model.safetensors)"),
         _out(1, "v1: model.safetensors:"), _out(2, "v2: model.safetensors:")),
    ),
    Case(
        "delta-other-base", "v2's delta was replaced by a sound one on v0, which also leads to v2.",
        _delta_of_other_base,
        (_no(VERIFY, "(v2: model.safetensors)"), _out(2, "v2: model.safetensors:")),
    ),
    Case(
        "delta-other-target", "v2's delta was replaced by a sound one on v1 that leads to other weights.",
        _delta_to_other_target,
        (_no(VERIFY, "(v2: model.safetensors)"), _out(2, "v2: its weights have root"),
         _no(DEEP, "(v2: model.safetensors)")),
    ),
)  # fmt: skip

# --- manifests and signatures -----------------------------------------------------------------------------


def _other_model(scene: Scene) -> None:
    with tempfile.TemporaryDirectory() as folder:
        republish(scene, 1, other_weights(scene, 1, Path(folder)))


def _flip_request(scene: Scene) -> None:
    """A bit that leaves the manifest well-formed: TD-1 becomes TD-0."""
    path = scene.store.manifest_path(1)
    flip(path, path.read_bytes().index(b'"TD-1"') + 4)


def _sign_again(scene: Scene) -> None:
    """Signatures are deterministic; under another name it is another one."""
    files = {file.path: file.digest for file in scene.store.manifest(2).files}
    key = load_model_key(scene.workspace.keys)
    overwrite(scene.store.signature_path(2), model_signature(files, "v2 as we remember it", key))


MANIFESTS = (
    Case(
        "manifest-byte", "One bit of v1's manifest was flipped, so that it is none any more.",
        lambda s: flip(s.store.manifest_path(1), 0),
        (_no(VERIFY, "v1 is; it cannot be restored"), _no(QUICK, "v1 is; it cannot be restored"),
         _out(1, "ledger entry")),
    ),
    Case(
        "manifest-request", "One bit of v1's manifest was flipped, so that it names request TD-0 in the place of TD-1.",
        _flip_request,
        (_no(VERIFY, "the manifest has digest"), _no(QUICK, "the manifest has digest"), _out(1, "ledger entry"),
         _no("first-version TD-1", "ledger entry")),
    ),
    Case(
        "manifest-pipe", "v1's manifest was replaced by a pipe.",
        lambda s: _pipe(s.store.manifest_path(1)),
        (_no(VERIFY, "is not a regular file"), _no(QUICK, "is not a regular file"), _out(1, "is not a regular file")),
    ),
    Case(
        "manifest-endless", "v1's manifest was made a terabyte long.",
        lambda s: _endless(s.store.manifest_path(1)),
        (_no(VERIFY, "has 1099511627776 bytes"), _no(QUICK, "has 1099511627776 bytes"),
         _out(1, "has 1099511627776 bytes")),
    ),
    Case(
        "manifest-removed", "v1's manifest was deleted.",
        lambda s: s.store.manifest_path(1).unlink(),
        (_no(VERIFY, "has no manifest, but ledger entry"), _no(QUICK, "has no manifest"), _out(1, "is missing")),
    ),
    Case(
        "manifest-of-another", "v1's manifest was replaced by v2's.",
        lambda s: overwrite(s.store.manifest_path(1), s.store.manifest_path(2).read_bytes()),
        (_no(VERIFY, "is the manifest of v2"), _no(QUICK, "is the manifest of v2"), _out(1, "ledger entry")),
    ),
    Case(
        "manifest-of-other-weights",
        "v1 was replaced by other weights: object, table and manifest agree with each other, the log does not.",
        _other_model,
        (_no(VERIFY, "the manifest has root"), _no(QUICK, "the manifest has digest"), _out(1, "ledger entry"),
         _no(BACK, "ledger entry")),
    ),
    Case(
        "manifest-extra", "A manifest of a version that was never published was put there.",
        lambda s: s.store.manifest_path(5).write_bytes(
            s.store.manifest_path(4).read_bytes().replace(b'"version":4', b'"version":5')
        ),
        (_no(VERIFY, "not acknowledged: no ledger entry names it"), Call("checkout v5 out", 2, "there are v0 to v4"),
         SOUND["status"]),
    ),
    Case(
        "signature-byte", "One bit of v2's model signature was flipped.",
        lambda s: flip(s.store.signature_path(2)),
        (_no(VERIFY, "v2: signature"), UNREAD, _out(2, "signature")),
    ),
    Case(
        "signature-of-another", "v2's model signature was replaced by v1's.",
        lambda s: overwrite(s.store.signature_path(2), s.store.signature_path(1).read_bytes()),
        (_no(VERIFY, "v2: signature"), UNREAD, _out(2, "signature")),
    ),
    Case(
        "signature-pipe", "v2's model signature was replaced by a pipe.",
        lambda s: _pipe(s.store.signature_path(2)),
        (_no(VERIFY, "v2: signature"), _no(QUICK, "v2: signature"), _out(2, "is not a regular file")),
    ),
    Case(
        "signature-removed", "v2's model signature was deleted.",
        lambda s: s.store.signature_path(2).unlink(),
        (_no(VERIFY, "v2: signature"), _no(QUICK, "v2: signature"), _out(2, "000002.sig: is missing")),
    ),
    Case(
        "signature-made-again", "v2's model signature was made again with the lineage's key: sound, but another one.",
        _sign_again,
        (_no(VERIFY, "is not the one that ledger entry"), UNREAD),
    ),
)  # fmt: skip

# --- keys, marker, vault, index ---------------------------------------------------------------------------


def _flip_print(scene: Scene) -> None:
    """A byte of a stored fingerprint, wherever SQLite put it."""
    path = scene.workspace.index / "index.db"
    with closing(sqlite3.connect(path)) as connection:
        ((prints,),) = connection.execute("SELECT prints FROM takedown WHERE request_id = 'TD-1'").fetchall()
    flip(path, path.read_bytes().index(prints[:32]))


def _folder_for_index(scene: Scene) -> None:
    path = scene.workspace.index / "index.db"
    path.unlink()
    path.mkdir()


def _make_plain(scene: Scene) -> None:
    request = Vault(scene.workspace.vault).get("TD-1")
    plain_record(scene.workspace.vault, request.model_copy(update={"text": "Something harmless."}))


def _forget_in_index(scene: Scene) -> None:
    with closing(sqlite3.connect(scene.workspace.index / "index.db", isolation_level=None)) as connection:
        connection.execute("DELETE FROM takedown WHERE request_id = 'TD-1'")


def _replace_log_key(scene: Scene) -> None:
    """The forger's own key pair in the place of the log's."""
    name = parse_vkey(log_vkey(scene.workspace.keys)).name
    overwrite(scene.workspace.keys / "log.pub", f"{vkey(name, FORGED.public_key())}\n".encode())
    private = FORGED.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    overwrite(scene.workspace.keys / "log.key", private)


SURROUNDINGS = (
    Case(
        "log-key-byte", "One bit of keys/log.pub was flipped.",
        lambda s: flip(s.workspace.keys / "log.pub"),
        (_no(VERIFY, "keys/log.pub"), _no(QUICK, "keys/log.pub"), _no(SUBMIT, "log.pub")),
    ),
    Case(
        "log-key-replaced", "The log's key pair was replaced by a forged one; nothing was signed with it yet.",
        _replace_log_key,
        (_no(VERIFY, "is not the key that the first entry names"), _no(QUICK, "signed note"),
         _no(SUBMIT, "has no signature of")),
    ),
    Case(
        "log-key-removed", "keys/log.pub was deleted.",
        lambda s: (s.workspace.keys / "log.pub").unlink(),
        (_no(VERIFY, "log.pub: is missing"), _no(QUICK, "log.pub: is missing"), _no(SUBMIT, "log.pub: is missing")),
    ),
    Case(
        "private-log-key-byte", "One bit of keys/log.key, the private half, was flipped: verify does not need it.",
        lambda s: flip(s.workspace.keys / "log.key"),
        (SOUND[VERIFY], _no(SUBMIT, "log.key")),
    ),
    Case(
        "model-key-byte", "One bit of keys/model.pub was flipped.",
        lambda s: flip(s.workspace.keys / "model.pub"),
        (_no(VERIFY, "keys/model.pub"), _no(QUICK, "keys/model.pub")),
    ),
    Case(
        "marker-version", "One bit of workspace.json was flipped, so that it names another layout.",
        lambda s: flip(s.workspace.marker, s.workspace.marker.read_bytes().index(b"2")),
        (Call(VERIFY, 2, "has layout 3, this release reads 2"), Call(SUBMIT, 2, "has layout 3")),
    ),
    Case(
        "marker-byte", "One bit of workspace.json was flipped, so that it is no JSON any more.",
        lambda s: flip(s.workspace.marker, 0),
        (_no(VERIFY, "workspace.json: is not JSON"), _no(SUBMIT, "workspace.json: is not JSON")),
    ),
    Case(
        "vault-record-byte", "One bit of the text of TD-1 in the vault was flipped.",
        lambda s: flip(s.record("TD-1")),
        (_no(VERIFY, "is not what was written there"), UNREAD),
    ),
    Case(
        "vault-record-pipe", "The vault's record of TD-1 was replaced by a pipe.",
        lambda s: _pipe(s.record("TD-1")),
        (_no(VERIFY, "is not a regular file"), UNREAD),
    ),
    Case(
        "vault-record-removed", "The vault's record of TD-1 was deleted.",
        lambda s: s.record("TD-1").unlink(),
        (_no(VERIFY, "request TD-1"), UNREAD),
    ),
    Case(
        "vault-records-exchanged", "The vault's records of TD-1 and TD-2 were exchanged under each other's names.",
        lambda s: exchange(s.record("TD-1"), s.record("TD-2")),
        (_no(VERIFY, "or was written for another request"), UNREAD),
    ),
    Case(
        "vault-text-replaced", "The text of TD-1 in the vault was replaced, and the record's own digest made anew.",
        lambda s: rewrite_record(s, "TD-1", text="Something harmless."),
        (_no(VERIFY, "is not the one that the ledger committed to"), UNREAD),
    ),
    Case(
        "vault-batch-replaced", "The batch of TD-1 in the vault was replaced, and the record's own digest made anew.",
        lambda s: rewrite_record(s, "TD-1", batch_id="another batch"),
        (_no(VERIFY, "names another batch or time than the ledger"), UNREAD),
    ),
    Case(
        "vault-title-replaced",
        "The title of TD-1 in the vault was replaced, and the record's own digest made anew.",
        lambda s: rewrite_record(s, "TD-1", title="Another work"),
        (_no(VERIFY, "has another title, rights holder, basis or contact than the ledger committed to"),
         _no("certificate TD-1 --out out", "has another title, rights holder, basis or contact")),
    ),
    Case(
        "vault-key-byte", "One bit of the vault's key was flipped.",
        lambda s: flip(s.workspace.vault / "key"),
        (_no(VERIFY, "is not the one that the ledger committed to"), UNREAD),
    ),
    Case(
        "vault-key-pipe", "The vault's key was replaced by a pipe.",
        lambda s: _pipe(s.workspace.vault / "key"),
        (_no(VERIFY, "is not a regular file"), UNREAD),
    ),
    Case(
        "vault-key-short", "The vault's key lost its second half.",
        lambda s: cut(s.workspace.vault / "key"),
        (_no(VERIFY, "expected 32 bytes, found 16"), UNREAD),
    ),
    Case(
        "vault-record-extra", "A record that nobody submitted was put into the vault.",
        lambda s: shutil.copyfile(
            s.record("TD-1"), s.record("TD-1").with_name(f"{hexadecimal(digest_bytes(b'TD-7'))}.json")
        ),
        (_no(VERIFY, ".key: is missing"), UNREAD),
    ),
    Case(
        "vault-wrapped-key-byte", "One bit of the key of TD-1 in the vault was flipped.",
        lambda s: flip(s.record("TD-1").with_suffix(".key")),
        (_no(VERIFY, "request TD-1"), UNREAD),
    ),
    Case(
        "vault-keys-exchanged", "The keys of TD-1 and TD-2 in the vault were exchanged.",
        lambda s: exchange(s.record("TD-1").with_suffix(".key"), s.record("TD-2").with_suffix(".key")),
        (_no(VERIFY, "or was written for another request"), UNREAD),
    ),
    Case(
        "vault-made-plain", "The record of TD-1 was replaced by a readable one of an old release with another text.",
        _make_plain,
        (_no(VERIFY, "is not the one that the ledger committed to"), UNREAD),
    ),
    Case(
        "master-key-removed", "The vault's master key was deleted.",
        lambda s: (s.workspace.keys / "vault.key").unlink(),
        (_no(VERIFY, "needs the master key"), SOUND[QUICK], _no(SUBMIT, "Restore the key from a backup")),
    ),
    Case(
        "master-key-replaced", "The vault's master key was replaced by another one.",
        lambda s: overwrite(s.workspace.keys / "vault.key", b"7" * 64),
        (_no(VERIFY, "needs the master key"), SOUND[QUICK]),
    ),
    Case(
        "index-byte", "One bit of a fingerprint in the index was flipped.",
        _flip_print,
        (_no(VERIFY, "does not match its digest"), UNREAD),
    ),
    Case(
        "index-emptied", "index.db has no bytes any more.",
        lambda s: overwrite(s.workspace.index / "index.db", b""),
        (_no(VERIFY, "the next run builds it from the vault"), UNREAD),
    ),
    Case(
        "index-folder", "index.db was replaced by a folder.",
        _folder_for_index,
        (_no(VERIFY, "index.db is not a regular file"), UNREAD),
    ),
    Case(
        "index-forgets", "The index lost the row of TD-1; the next run adds it again from the vault.",
        _forget_in_index,
        (SOUND[VERIFY],),
    ),
    Case(
        "settings-edited", "takedown.toml was edited, as it may be: what ran before has its settings on record.",
        lambda s: s.workspace.settings_file.write_text("[gate]\nforget_tolerance = 0.9\n"),
        (SOUND[VERIFY], SOUND[SUBMIT]),
    ),
)  # fmt: skip

# --- the log, by a failing disk or without the key --------------------------------------------------------


def _zero_page(scene: Scene) -> None:
    data = bytearray(scene.workspace.ledger.read_bytes())
    start = data.index(b'"kind":"received"') // 4096 * 4096
    data[start : start + 4096] = bytes(4096)
    overwrite(scene.workspace.ledger, bytes(data))


def _flip_trigger_kind(scene: Scene) -> None:
    """A row of the schema begins with kind and name, one behind the other; SQLite reads on with a capital letter."""
    data = scene.workspace.ledger.read_bytes()
    overwrite(scene.workspace.ledger, data.replace(b"triggerentries_no_delete", b"Triggerentries_no_delete"))


def _forge_write_ahead_log(scene: Scene) -> None:
    """SQLite reads a log that lies beside the database as part of it."""
    ledger = scene.workspace.ledger
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copy(ledger, Path(folder) / ledger.name))
        with closing(sqlite3.connect(copy, isolation_level=None)) as connection:
            connection.execute("PRAGMA wal_autocheckpoint=0")
            ((trigger,),) = connection.execute("SELECT sql FROM sqlite_master WHERE name = 'entries_no_update'")
            connection.execute("DROP TRIGGER entries_no_update")
            connection.execute("UPDATE entries SET at = '2020-01-01T00:00:00.000000Z' WHERE seq = 2")
            connection.execute(trigger)
            shutil.copyfile(copy.with_name("ledger.db-wal"), ledger.with_name("ledger.db-wal"))


def _cut_everywhere(scene: Scene) -> None:
    """The receipt of TD-5, the checkpoint over it and its record in the vault, and an older genuine checkpoint file."""
    cut_log(scene.workspace, len(read_log(scene.workspace)) - 1)
    newest_checkpoint(scene.workspace)
    scene.record("TD-5").unlink()


def _older_copy(scene: Scene) -> None:
    """As a backup of the moment before TD-5 arrived would bring it back."""
    for name in ("ledger.db", "checkpoint", "seal"):
        overwrite(scene.workspace.root / name, scene.backup(name).read_bytes())
    scene.record("TD-5").unlink()


def _foreign_ledger(scene: Scene) -> None:
    for name in ("ledger.db", "checkpoint"):
        overwrite(scene.workspace.root / name, (scene.other / name).read_bytes())


def _change_actor(rows: Rows) -> None:
    rows[place_of(rows, "published", version=2)][1]["actor"] = "somebody else"


def _reorder(rows: Rows) -> None:
    """TD-1 is taken out before it was received."""
    received, applied = (place_of(rows, kind, request_id="TD-1") for kind in ("received", "applied"))
    rows[received], rows[applied] = rows[applied], rows[received]


def _forge_answer(kind: str, **data: Any) -> Callable[[Scene], object]:
    return lambda scene: append_row(scene.workspace, kind=kind, request_id="TD-5", version=4, run_id="run-0", data=data)


CUT = "the ledger was cut back, rewritten or is an older copy"
UNSIGNED = "are not those of its last signed checkpoint"
READING = (
    "status", "log", "show v1", "show TD-1", "versions", "diff v0 v1", "first-version TD-1", "export --out out",
    "report --out page.html", "checkout v0 out", "certificate TD-1 --out out",
)  # fmt: skip
"""All verbs that show what the log says."""

LOG = (
    Case(
        "ledger-row", "The time of one entry was changed.",
        lambda s: sql(s.workspace, "UPDATE entries SET at = '2020-01-01T00:00:00.000000Z' WHERE seq = 5"),
        (_no(VERIFY, "content does not match its digest"), _no(QUICK, "content does not match its digest"),
         _no("status", "does not hold in"), _out(3, "does not hold in"), _no(SUBMIT, "does not hold in")),
    ),
    Case(
        "ledger-page", "One page of ledger.db, which holds entries, was filled with zeros.",
        _zero_page,
        (_no(VERIFY, "ledger.db"), _no(QUICK, "ledger.db"), _no("status", "ledger"), _no(SUBMIT, "ledger")),
    ),
    Case(
        "ledger-write-ahead-log", "A write-ahead log that changes an entry was put beside ledger.db.",
        _forge_write_ahead_log,
        (_no(VERIFY, "content does not match its digest"), _no("status", "does not hold in"),
         _no(SUBMIT, "does not hold in")),
    ),
    Case(
        "ledger-removed", "ledger.db was deleted.",
        lambda s: s.workspace.ledger.unlink(),
        (_no(VERIFY, "there is no ledger"), Call("status", 2, "there is no ledger"),
         Call(SUBMIT, 2, "there is no ledger")),
    ),
    Case(
        "ledger-of-another", "ledger.db and checkpoint were replaced by those of another lineage.",
        _foreign_ledger,
        (_no(VERIFY, "is not the key that the first entry names"), _no(QUICK, "signed note"),
         _no(SUBMIT, "signed note")),
    ),
    Case(
        "trigger-dropped", "The rule that lets nobody delete entries was removed from the database.",
        lambda s: sqlite_statement(s, "DROP TRIGGER entries_no_delete"),
        (_no(VERIFY, "ledger.db: entries_no_delete"), _no(QUICK, "ledger.db: entries_no_delete")),
    ),
    Case(
        "trigger-kind", "One bit of the word by which SQLite knows that rule for a trigger was flipped.",
        _flip_trigger_kind,
        (_no(VERIFY, "ledger.db: entries_no_delete"), _no(QUICK, "ledger.db: entries_no_delete")),
    ),
    Case(
        "log-rows-removed", "The last three entries were deleted, nothing else.",
        lambda s: sql(s.workspace, f"DELETE FROM entries WHERE seq > {len(read_log(s.workspace)) - 3}"),
        (_no(VERIFY, "SQLite counts"), _no(QUICK, "SQLite counts"), _no(SUBMIT, UNSIGNED)),
    ),
    Case(
        "log-cut", "The last entry was deleted, with its checkpoint and SQLite's count.",
        lambda s: cut_log(s.workspace, len(read_log(s.workspace)) - 1),
        (_no(VERIFY, "The ledger was cut back"), _no(VERIFY, "request TD-5"),
         _no(QUICK, "The ledger was cut back"), _no(SUBMIT, CUT), _no(NEWEST, "The ledger was cut back")),
    ),
    Case(
        "log-cut-everywhere",
        "The last entry was deleted, with its checkpoint, SQLite's count and the vault's record, and the checkpoint "
        "file was exchanged for an older genuine one.",
        _cut_everywhere,
        (_no(VERIFY, "seals 29 entries, the ledger has 28"), _no(QUICK, "seals 29 entries"),
         _no(NEWEST, "The ledger was cut back, or is an older copy.")),
    ),
    Case(
        "log-older-copy", "Ledger, checkpoint and seal are those of an older backup, and the later record is gone.",
        _older_copy,
        (SOUND[VERIFY], SOUND[FIRST], _no(NEWEST, "The ledger was cut back, or is an older copy.")),
    ),
    Case(
        "ledger-unused-byte", "One bit of ledger.db was flipped in room that no entry uses.",
        lambda s: flip(s.workspace.ledger, unused_byte(s.workspace.ledger)),
        (_no(VERIFY, "its bytes are not those that were sealed"), _no(QUICK, "only bytes that mean nothing changed"),
         SOUND["status"], SOUND[SUBMIT]),
    ),
    Case(
        "ledger-longer", "A page of zeros was written behind the end of ledger.db.",
        lambda s: overwrite(s.workspace.ledger, s.workspace.ledger.read_bytes() + bytes(4096)),
        (_no(VERIFY, "4096 bytes follow behind its last page"), SOUND["status"]),
    ),
    Case(
        "seal-removed", "The seal over the databases was deleted; the next writing command makes it again.",
        lambda s: (s.workspace.root / "seal").unlink(),
        (_no(VERIFY, "the next writing command seals them"), _no(QUICK, "is missing"), SOUND[SUBMIT], SOUND[VERIFY]),
    ),
    Case(
        "seal-byte", "One bit of the seal was flipped; the next writing command makes it again.",
        lambda s: flip(s.workspace.root / "seal"),
        (_no(VERIFY, "was changed, or is of another lineage"), SOUND[SUBMIT], SOUND[VERIFY]),
    ),
    Case(
        "seal-foreign", "The seal of another lineage was put in the place of this one's.",
        lambda s: overwrite(s.workspace.root / "seal", (s.other / "seal").read_bytes()),
        (_no(VERIFY, "signed note: has no signature of"),),
    ),
    Case(
        "log-rechained", "One entry was changed and the chain of all later ones made anew, without the key.",
        lambda s: rechain(s.workspace, _change_actor),
        (_no(VERIFY, "with another root than entries 1 to"), _no(QUICK, "with another root"),
         *(_no(command, UNSIGNED) for command in (*READING, SUBMIT)), _no(NEWEST, "The history was rewritten")),
    ),
    Case(
        "log-rechained-unsigned", "As before, and all checkpoints were deleted.",
        lambda s: (rechain(s.workspace, _change_actor), sql(s.workspace, "DELETE FROM checkpoints")),
        (_no(VERIFY, "the last checkpoint signs 0 entries"), _no(QUICK, "the last checkpoint signs 0 entries"),
         _no("status", UNSIGNED), _no(SUBMIT, UNSIGNED)),
    ),
    Case(
        "log-forged-signature", "One entry was changed, and everything chained and signed anew with a forged key.",
        lambda s: rechain(s.workspace, _change_actor, FORGED),
        (_no(VERIFY, "signed note: has no signature of"), _no(QUICK, "has no signature of"),
         *(_no(command, "has no signature of") for command in (*READING, SUBMIT))),
    ),
    Case(
        "log-forged-key", "As before, and keys/log.pub was replaced by the forged key.",
        lambda s: (_replace_log_key(s), rechain(s.workspace, _change_actor, FORGED)),
        (_no(VERIFY, "is not the key that the first entry names"),
         _no(QUICK, "is not the key that the first entry names"),
         _no(NEWEST, "the lineage's key was exchanged")),
    ),
    Case(
        "log-forged-lineage",
        "As before, and the first entry names the forged key: a history of its own, in which everything agrees.",
        lambda s: (_replace_log_key(s), rechain(s.workspace, _forged_start(s), FORGED)),
        (SOUND[VERIFY], _no(FIRST, "the lineage's key was exchanged"), _no(NEWEST, "the lineage's key was exchanged")),
    ),
    Case(
        "log-reordered", "Two entries changed places, and the chain was made anew, without the key.",
        lambda s: rechain(s.workspace, _reorder),
        (_no(VERIFY, "with another root"), _no(VERIFY, "but no earlier entry received it"),
         _no("status", UNSIGNED), _no(SUBMIT, UNSIGNED)),
    ),
    Case(
        "checkpoint-byte", "One bit of the checkpoint file was flipped; the next writing command mends it.",
        lambda s: flip(s.workspace.checkpoint),
        (_no(VERIFY, "is not the newest checkpoint of the ledger"), _no(QUICK, "is not the newest checkpoint"),
         SOUND[SUBMIT], SOUND[VERIFY]),
    ),
    Case(
        "checkpoint-pipe", "The checkpoint file was replaced by a pipe.",
        lambda s: _pipe(s.workspace.checkpoint),
        (_no(VERIFY, "checkpoint"), _no(QUICK, "checkpoint")),
    ),
    Case(
        "checkpoint-stale", "The checkpoint file was exchanged for an older one; the next writing command mends it.",
        lambda s: overwrite(s.workspace.checkpoint, s.kept("first").read_bytes()),
        (_no(VERIFY, "is not the newest checkpoint of the ledger"), _no(QUICK, "is not the newest checkpoint"),
         SOUND[SUBMIT], SOUND[VERIFY]),
    ),
    Case(
        "checkpoint-removed", "The checkpoint file was deleted; the next writing command writes it again.",
        lambda s: s.workspace.checkpoint.unlink(),
        (_no(VERIFY, "Any writing command restores it."), SOUND[SUBMIT], SOUND[VERIFY]),
    ),
    Case(
        "checkpoint-of-another", "The checkpoint file was exchanged for that of another lineage.",
        lambda s: overwrite(s.workspace.checkpoint, (s.other / "checkpoint").read_bytes()),
        (_no(VERIFY, "is not the newest checkpoint of the ledger"), SOUND[SUBMIT], SOUND[VERIFY]),
    ),
    Case(
        "kept-of-another", "The store is sound; the checkpoint that was kept is of another lineage.",
        lambda s: overwrite(s.kept("newest"), (s.other / "checkpoint").read_bytes()),
        (SOUND[VERIFY], _no(NEWEST, "It is no checkpoint of this lineage")),
    ),
    Case(
        "forged-applied", "An entry that says that TD-5 was taken out was put behind the last one, without the key.",
        _forge_answer("applied"),
        (_no(VERIFY, "Entries were removed after they were signed, or written by somebody without the key."),
         _no(QUICK, "the last checkpoint signs"), _no(SUBMIT, UNSIGNED)),
    ),
    Case(
        "forged-verified", "An entry that says that TD-4 was measured was put behind the last one, without the key.",
        lambda s: append_row(s.workspace, kind="verified", request_id="TD-4", version=4, run_id="run-0"),
        (_no(VERIFY, "is verified, but was waiting before"), _no(QUICK, "the last checkpoint signs"),
         _no("status", UNSIGNED)),
    ),
    Case(
        "rollback-removed", "The entry of the rollback was deleted and the chain made anew, without the key.",
        lambda s: rechain(s.workspace, remove_entry("rolled-back")),
        (_no(VERIFY, "with another root"), _no(SUBMIT, UNSIGNED)),
    ),
    Case(
        "hold-removed", "The entry of a legal hold was deleted and the chain made anew, without the key.",
        lambda s: rechain(s.workspace, remove_entry("hold")),
        (_no(VERIFY, "with another root"), _no(QUICK, "with another root"), _no(PURGE, UNSIGNED),
         _no("checkout v0 out", UNSIGNED)),
    ),
)  # fmt: skip


def _forged_start(scene: Scene) -> Callable[[Rows], object]:
    def change(rows: Rows) -> None:
        _change_actor(rows)
        rows[0][1]["data"]["keys"]["log"] = log_vkey(scene.workspace.keys)

    return change


def sqlite_statement(scene: Scene, statement: str) -> None:
    """Run one statement without putting anything back."""
    with closing(sqlite3.connect(scene.workspace.ledger, isolation_level=None)) as connection:
        connection.execute(statement)
    settle(scene.workspace)


# --- by the owner of the keys -----------------------------------------------------------------------------


def _own(change: Callable[[Rows], object]) -> Callable[[Scene], None]:
    """Rewrite the log with the lineage's own key."""
    return lambda scene: rechain(scene.workspace, change, load_log_key(scene.workspace.keys))


def _lose_evidence(rows: Rows) -> None:
    rows[place_of(rows, "accepted")][1]["data"]["evidence"] = {}


def _exchange_evidence(rows: Rows) -> None:
    """The first run claims the second one's measurements."""
    decided = [event["data"]["evidence"] for _, event in rows if event["kind"] == "accepted"]
    decided[0]["evaluate"] = decided[1]["evaluate"]


def _purged(scene: Scene) -> dict[Path, bytes]:
    """Release the hold and purge v0 and v1; returns what was destroyed."""
    with Ledger.open(scene.workspace.ledger) as ledger:
        ledger.append(Event(kind="released", actor="tester", request_id="TD-4"))
    before = {path: path.read_bytes() for path in scene.store.objects.files()}
    purge(scene.workspace, 2, "tester", "retention")
    settle(scene.workspace)
    return {path: data for path, data in before.items() if not path.exists()}


def _put_back(scene: Scene) -> None:
    weights = scene.whole(0)
    weights.write_bytes(_purged(scene)[weights])


def _begin_purge(scene: Scene) -> None:
    with Ledger.open(scene.workspace.ledger) as ledger:
        data = {"before": 2, "versions": [0, 1], "reason": "retention"}
        ledger.append(Event(kind="purging", actor="tester", data=data))
    settle(scene.workspace)


OWNER = (
    Case(
        "owner-rewrites", "One entry was changed, and everything chained and signed anew with the lineage's own key.",
        _own(_change_actor),
        (SOUND[VERIFY], SOUND[FIRST], _no(NEWEST, "The history was rewritten after this checkpoint was kept.")),
    ),
    Case(
        "owner-removes-hold", "The entry of a legal hold was deleted, everything chained and signed anew with the key.",
        _own(remove_entry("hold")),
        (SOUND[VERIFY], _no(NEWEST, "The ledger was cut back"), Call(PURGE, 0, "Destroyed the weights of v0, v1")),
    ),
    Case(
        "owner-removes-rollback",
         "The entry of the rollback was deleted, the rest chained and signed anew with the key.",
        _own(remove_entry("rolled-back")),
        (_no(VERIFY, "was planned on v2, but v3 was in force"), _no(NEWEST, "The ledger was cut back"),
         SOUND["status"]),
    ),
    Case(
        "owner-removes-gate", "The entry with which the gate let v2 pass was deleted, the rest signed anew.",
        _own(lambda rows: rows.pop(place_of(rows, "published", version=2) - 1)),
        (_no(VERIFY, "which no earlier entry accepted"), _no(QUICK, "which no earlier entry accepted")),
    ),
    Case(
        "owner-removes-plan", "The entry that fixed a run's limits was deleted, the rest signed anew with the key.",
        _own(remove_entry("planned")),
        (_no(VERIFY, "but no earlier entry planned it"), _no(QUICK, "but no earlier entry planned it")),
    ),
    Case(
        "owner-reorders", "Two entries changed places, everything chained and signed anew with the key.",
        _own(_reorder),
        (_no(VERIFY, "but no earlier entry received it"), _no(QUICK, "but no earlier entry received it")),
    ),
    Case(
        "owner-publishes-twice", "v2 is published by a second entry at the end, signed with the key.",
        _own(lambda rows: rows.append(rows[place_of(rows, "published", version=2)])),
        (_no(VERIFY, "which an earlier entry published already"), _no(QUICK, "A version is published once.")),
    ),
    Case(
        "owner-loses-evidence", "A run's decision names no evidence any more, the log signed anew with the key.",
        _own(_lose_evidence),
        (_no(VERIFY, "was accepted without evidence"), _no(QUICK, "without evidence")),
    ),
    Case(
        "owner-exchanges-evidence", "A run's decision names another run's measurements, the log signed anew.",
        _own(_exchange_evidence),
        (_no(VERIFY, "unreferenced object"), _no(NEWEST, "The history was rewritten")),
    ),
    Case(
        "owner-forgets-version", "v0 became current by a rollback to a version that never was, signed with the key.",
        _own(lambda rows: rows.append((rows[-1][0], tree(kind="rolled-back", version=9)))),
        (_no(VERIFY, "v9 was put in force"), _no(QUICK, "v9 was put in force")),
    ),
    Case(
        "purge-undone", "v0 and v1 were purged; then v0's weights were put back.",
        _put_back,
        (_no(VERIFY, "Weights that were to be destroyed are still there."), _no(QUICK, "belongs to a purged version"),
         Call("checkout v0 out", 2, "its weights were purged on")),
    ),
    Case(
        "purge-unfinished", "A purge of v0 and v1 was begun and never ended.",
        _begin_purge,
        (_no(VERIFY, "a purge was begun and not ended"), _no(QUICK, "a purge was begun and not ended"),
         Call("checkout v0 out", 2, "its weights were purged on")),
    ),
)  # fmt: skip

CASES = (*CONTENTS, *MANIFESTS, *SURROUNDINGS, *LOG, *OWNER)


def expected(case: Case) -> bytes:
    """What a reader must answer, as a file: canonical JSON, one object."""
    calls = [call._asdict() for call in case.calls]
    return canonical_json({"name": case.name, "done": case.done, "calls": calls}) + b"\n"
