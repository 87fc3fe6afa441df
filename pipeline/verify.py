"""Re-check everything that a workspace keeps as evidence.

In: a workspace, and checkpoints that somebody kept elsewhere. Out: every break, named. Never: a write, a lock, an
exception for damaged content. A running publish is seen like an interrupted one: contents, then a manifest, that the
ledger does not name yet.

What it cannot see without a checkpoint kept elsewhere: a ledger cut back, together with everything it named, to an
earlier checkpoint; or rewritten by somebody who has the signing key.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from pipeline.errors import NotAWorkspace, StoreDamaged, TakedownError, UsageError, VaultLocked
from pipeline.evidence import evidence_of
from pipeline.files import canonical_json, digest_bytes, read_whole, unreadable
from pipeline.keys import load_log_key, load_model_key, log_vkey, model_public_key
from pipeline.ledger import Ledger
from pipeline.merkle import consistency_proof, leaf_hash, root_of_hashes, verify_consistency
from pipeline.notes import Checkpoint, read_checkpoint
from pipeline.objects import StoredDelta
from pipeline.oms import check_model_signature
from pipeline.records import Break, LedgerEntry, VersionManifest
from pipeline.seals import check_seal, read_note, stale_notes
from pipeline.states import (
    AWAITING,
    DECIDED,
    OUT,
    PUBLISHING,
    current_version,
    decisions,
    erased_requests,
    follow,
    last_words,
    published_versions,
    purged_versions,
    unfinished_erasures,
    unfinished_purge,
)
from pipeline.storecheck import Depth, StoreCheck, manifest_break
from pipeline.undo import reworked_in
from pipeline.vault import Vault, open_vault
from pipeline.versions import VersionStore
from pipeline.workspace import FORMAT, Workspace, open_workspace

Entries = tuple[LedgerEntry, ...]

UNCHECKED = Break(
    where="everything else",
    found="was not checked: keys, versions, requests, evidence, contents, signatures, index, vault",
    means="All of it is held against the ledger, and no entry of that can be read. Restore the ledger, verify again.",
)


def verify(workspace: Workspace, depth: Depth = Depth.FULL, checkpoints: Sequence[Path] = ()) -> list[Break]:
    """Check marker, keys, ledger, manifests, lineage, requests, evidence, contents, signatures, index and vault.

    Args:
        workspace: What to check; only read.
        depth: How much of the store is re-read, see `pipeline.storecheck`. Quick also leaves out the vault's texts, the
            index and all but the newest signature.
        checkpoints: Files with checkpoints of this ledger that were kept elsewhere.

    Returns:
        All breaks, in that order; empty when everything holds. Where no entry of the ledger can be read, why, and
        one that says what could not be checked.

    Raises:
        UsageError: A file of ``checkpoints`` cannot be read.
    """
    store = VersionStore(workspace.versions)
    sealed = _seal(workspace)  # first: see `check_seal`
    # Listed in the opposite order of writing, so that what a running publish adds meanwhile is not a false break.
    files = store.objects.files()
    numbers = store.numbers()
    entries, breaks = _check_ledger(workspace, depth, checkpoints)
    if breaks and not entries:  # everything else would contradict a ledger that says nothing
        return [*breaks, UNCHECKED, *_check_marker(workspace)]
    breaks = _check_marker(workspace) + breaks + _check_keys(workspace, entries)
    breaks += check_seal(workspace.root, sealed, entries, with_index=depth is not Depth.QUICK)
    purged = purged_versions(entries)
    manifests, found = _check_manifests(store, numbers, entries)
    breaks += found + _check_lineage(manifests) + _check_requests(manifests, entries)
    breaks += _check_rollbacks(entries) + _check_purges(entries)
    check = StoreCheck(store, noted_deltas(entries), depth)
    kept = {number: manifest for number, manifest in manifests.items() if number not in purged}
    acknowledged = published_versions(entries)
    for number, manifest in kept.items():
        if number in acknowledged:  # of any other it is said above that it does not count; no entry has its digests
            breaks += check.content(manifest)
    for entry in decisions(entries).values():
        for name, digest in evidence_of(entry).items():
            breaks += check.evidence(f"ledger entry {entry.seq}", name, digest)
    breaks += _check_stray(store, check, files, manifests, kept, entries, complete=len(manifests) == len(numbers))
    if depth is Depth.QUICK:
        return breaks + _check_unread(store, entries)
    breaks += _check_signatures(workspace, store, manifests, acknowledged)
    return breaks + _check_index(workspace, entries) + _check_vault(workspace, entries)


def noted_deltas(entries: Sequence[LedgerEntry]) -> dict[str, StoredDelta]:
    """Delta files by name, as the ledger notes them last; what it notes badly is left out, and so not known."""
    noted: dict[str, StoredDelta] = {}
    for entry in entries:
        found = entry.event.data.get("deltas")
        for name, facts in found.items() if isinstance(found, Mapping) else ():
            if isinstance(facts, Mapping):
                digest, size, changed = facts.get("digest"), facts.get("size"), facts.get("changed")
                if isinstance(digest, str) and isinstance(size, int) and isinstance(changed, int):
                    noted[str(name)] = StoredDelta(str(name), digest, size, changed)
    return noted


# --- marker, keys, ledger ---------------------------------------------------------------------------------


def _check_marker(workspace: Workspace) -> list[Break]:
    try:
        open_workspace(workspace.root)
    except (NotAWorkspace, StoreDamaged, AttributeError, OSError) as error:  # AttributeError: JSON, but no object
        means = "The commands refuse this workspace."
        return [Break(where=workspace.marker.name, found=str(error), means=means)]
    if workspace.marker.read_bytes() != canonical_json({"format": FORMAT}) + b"\n":
        found = "says what it should, but not byte for byte as it is written"
        means = "It is read all the same; the disk is failing, or somebody edited the file."
        return [Break(where=workspace.marker.name, found=found, means=means)]
    return []


def _check_ledger(workspace: Workspace, depth: Depth, checkpoints: Sequence[Path]) -> tuple[Entries, list[Break]]:
    try:
        with Ledger.open(workspace.ledger, read_only=True) as ledger:
            entries, breaks = ledger.examine(every_signature=depth is not Depth.QUICK)
            hashes = [leaf_hash(leaf) for leaf in ledger.leaves()] if checkpoints else []
    except TakedownError as error:
        means = "Nothing proves which version excludes which text."
        return (), [Break(where=workspace.ledger.name, found=str(error), means=means)]
    for path in checkpoints:
        breaks += _check_outside(workspace, path, hashes)
    return entries, breaks


def _check_outside(workspace: Workspace, path: Path, hashes: Sequence[bytes]) -> list[Break]:
    """The ledger must begin with exactly what a checkpoint kept elsewhere signs."""
    try:
        note = read_whole(path)
    except OSError as error:
        raise UsageError(f"{path}: {unreadable(error)}. Name a checkpoint file.") from error
    where = f"checkpoint {path.name}"
    try:
        outside: Checkpoint = read_checkpoint(note, log_vkey(workspace.keys))
    except StoreDamaged as error:
        means = "It is no checkpoint of this lineage, or the lineage's key was exchanged since it was kept."
        return [Break(where=where, found=str(error), means=means)]
    if outside.size > len(hashes):
        found = f"signs {outside.size} entries, the ledger has {len(hashes)}"
        return [Break(where=where, found=found, means="The ledger was cut back, or is an older copy.")]
    proof = consistency_proof(hashes, outside.size)
    if not verify_consistency(outside.size, outside.root, len(hashes), root_of_hashes(hashes), proof):
        found = f"the first {outside.size} entries of the ledger have another root"
        return [Break(where=where, found=found, means="The history was rewritten after this checkpoint was kept.")]
    return []


def _check_keys(workspace: Workspace, entries: Entries) -> list[Break]:
    """The public keys must be those that the first entry names."""
    first = next((e for e in entries if e.event.kind == "initialised"), None)
    named = first.event.data.get("keys") if first else None
    if not isinstance(named, Mapping):
        means = "Nobody can say whose keys signed this history."
        return [Break(where=workspace.ledger.name, found="no first entry names the lineage's keys", means=means)]
    breaks = []
    for kind, read in (("log", log_vkey), ("model", lambda folder: model_public_key(folder).decode())):
        where = f"{workspace.keys.name}/{kind}.pub"
        means = "The public key was exchanged: what it verifies is not what this lineage signed."
        try:
            if read(workspace.keys) != named.get(kind):
                breaks.append(Break(where=where, found="is not the key that the first entry names", means=means))
        except (TakedownError, OSError) as error:
            breaks.append(Break(where=where, found=str(error), means="Signatures cannot be checked without it."))
    return breaks


def _seal(workspace: Workspace) -> bytes | OSError:
    try:
        return read_note(workspace.root)
    except OSError as error:
        return error


def seal_notes(workspace: Workspace, depth: Depth = Depth.FULL) -> tuple[str, ...]:
    """Why the databases were not compared with their seal at a depth, where that is no break."""
    return stale_notes(workspace.root, _seal(workspace), with_index=depth is not Depth.QUICK)


def key_notes(workspace: Workspace) -> tuple[str, ...]:
    """Why this copy can be read and checked, but not continued; nothing where both private keys serve.

    No breaks: an auditor's copy has no private keys, and they prove nothing about what is stored.
    """
    notes = []
    for what, load in (("the log", load_log_key), ("models", load_model_key)):
        try:
            load(workspace.keys)
        except (TakedownError, OSError) as error:
            notes.append(f"nothing can be added here, for {what} cannot be signed: {error}")
    return tuple(notes)


# --- versions ---------------------------------------------------------------------------------------------


def _check_manifests(
    store: VersionStore, numbers: tuple[int, ...], entries: Entries
) -> tuple[dict[int, VersionManifest], list[Break]]:
    """Compare the manifests with the entries that acknowledge them.

    Returns:
        Every manifest that can be read, by version, and the breaks.
    """
    breaks, manifests, digests = [], dict[int, VersionManifest](), dict[int, str]()
    for number in numbers:
        try:
            data = read_whole(store.manifest_path(number))
            digests[number] = digest_bytes(data)
            manifests[number] = store.parse_manifest(number, data)
        except OSError as error:
            breaks.append(manifest_break(number, StoreDamaged(unreadable(error))))
        except StoreDamaged as error:
            breaks.append(manifest_break(number, error))
    named: set[int] = set()
    accepted = {e.event.run_id for e in entries if e.event.kind == "accepted"}
    for entry in entries:
        event, where = entry.event, f"ledger entry {entry.seq}"
        if event.kind not in PUBLISHING:
            continue
        version = event.version
        if version is None:
            breaks.append(Break(where=where, found=f"{event.kind} names no version", means="It proves nothing."))
            continue
        if version in named:
            found = f"{event.kind} names v{version}, which an earlier entry published already"
            breaks.append(Break(where=where, found=found, means="A version is published once."))
        named.add(version)
        if event.kind == "published" and event.run_id not in accepted:
            found = f"v{version} was published by {event.run_id}, which no earlier entry accepted"
            breaks.append(Break(where=where, found=found, means="No gate let this version pass."))
        if version not in numbers:
            means = f"v{version} was removed after it was published; it cannot be restored."
            breaks.append(Break(where=f"v{version}", found=f"has no manifest, but {where} published it", means=means))
            continue
        if version in digests and event.data.get("manifest") != digests[version]:
            found = f"the manifest has digest {digests[version]}, {where} says {event.data.get('manifest')}"
            means = f"The manifest of v{version} was changed or replaced after it was published."
            breaks.append(Break(where=f"v{version}", found=found, means=means))
        if version in manifests:
            breaks += _against_entry(manifests[version], entry)
    newest = max(named, default=-1)
    for number in numbers:
        if number not in named:
            means = (
                "A publish was interrupted or is still running, and the next run replaces it; or the newest ledger "
                "entries were removed. Run the interrupted command again, then verify again."
                if number > newest
                else "The ledger entry that published it was removed, or the manifest was put there by hand."
            )
            breaks.append(Break(where=f"v{number}", found="not acknowledged: no ledger entry names it", means=means))
    return manifests, breaks


def _against_entry(manifest: VersionManifest, entry: LedgerEntry) -> list[Break]:
    """A manifest and the entry that published it must say the same."""
    means = f"v{manifest.version} is not what was published."
    return [
        Break(
            where=f"v{manifest.version}",
            found=f"the manifest has {field} {value}, ledger entry {entry.seq} says {entry.event.data.get(field)}",
            means=means,
        )
        for field, value in (("root", manifest.root), ("parent", manifest.parent))
        if entry.event.data.get(field) != value
    ]


def _check_lineage(manifests: Mapping[int, VersionManifest]) -> list[Break]:
    """Every version but v0 must come from an earlier one with the root that it names."""
    breaks = []
    means = "The lineage does not hold: nobody can say what this version was made from."
    for version, manifest in manifests.items():
        parent = manifest.parent
        if version == 0 or parent is None:
            if version or parent is not None or manifest.parent_root is not None:
                found = f"names parent {parent} with root {manifest.parent_root}; v0, and only v0, has none"
                breaks.append(Break(where=f"v{version}", found=found, means=means))
        elif not 0 <= parent < version:
            breaks.append(Break(where=f"v{version}", found=f"names v{parent} as its parent", means=means))
        elif parent not in manifests:
            found = f"its parent v{parent} has no manifest that can be read"
            breaks.append(Break(where=f"v{version}", found=found, means=means))
        elif manifests[parent].root != manifest.parent_root:
            found = f"names v{parent} with root {manifest.parent_root}, which has {manifests[parent].root}"
            breaks.append(Break(where=f"v{version}", found=found, means=means))
    return breaks


def _check_rollbacks(entries: Entries) -> list[Break]:
    """Only a version that was published before, and still had its weights, can have been put in force again."""
    breaks = []
    for place, entry in enumerate(entries):
        version, before = entry.event.version, entries[:place]
        if entry.event.kind != "rolled-back":
            continue
        if version not in published_versions(before) or version in purged_versions(before):
            found = f"v{version} was put in force, which no earlier entry published, or which was purged"
            means = "There is no such version, so nothing says which weights were in force from then on."
            breaks.append(Break(where=f"ledger entry {entry.seq}", found=found, means=means))
    return breaks


def _check_purges(entries: Entries) -> list[Break]:
    """A purge that was begun must have been ended: until then nobody can say which weights are gone."""
    begun = unfinished_purge(entries)
    if begun is None:
        return []
    means = "Weights of old versions may be partly destroyed, partly still there. Run the same purge again."
    return [Break(where=f"ledger entry {begun.seq}", found="a purge was begun and not ended", means=means)]


def _check_stray(
    store: VersionStore,
    check: StoreCheck,
    files: tuple[Path, ...],
    manifests: Mapping[int, VersionManifest],
    kept: Mapping[int, VersionManifest],
    entries: Entries,
    complete: bool,
) -> list[Break]:
    """Find what nothing names. Contents are left out while a manifest is unreadable: it might name them."""
    breaks = []
    if complete:
        objects, named = store.objects, set[Path]()
        digests = {d for m in kept.values() for d in (m.tensors, *(f.digest for f in m.files))}
        digests |= {manifest.tensors for manifest in manifests.values()}
        digests |= {d for entry in decisions(entries).values() for d in evidence_of(entry).values()}
        for digest in digests:
            try:
                named.update(check.paths(digest))
            except StoreDamaged:  # no digest, so no path either
                continue
        if unfinished_purge(entries) is None:
            purged = {f.digest for m in manifests.values() for f in m.files} - digests
        else:  # what is still there of the versions concerned is told in one break
            purged = set()
            named |= store.named(list(manifests.values()))
        hidden = {objects.object_path(d) for d in purged} | {
            objects.delta_path(d, b) for d in purged for b in objects.bases(d)
        }
        for path in files:
            if path in hidden:
                found, means = "belongs to a purged version", "Weights that were to be destroyed are still there."
                breaks.append(Break(where=objects.label(path), found=found, means=means))
            elif path not in named:
                means = "Left by an interrupted or running publish, or put there by hand; no version depends on it."
                breaks.append(Break(where=objects.label(path), found="unreferenced object", means=means))
    for path in store.strangers():
        means = "It was put there by hand; no version depends on it."
        where = store.objects.label(path)
        breaks.append(Break(where=where, found="does not belong into the version store", means=means))
    return breaks


def _check_unread(store: VersionStore, entries: Entries) -> list[Break]:
    """What a quick look does not read must at least be there."""
    return [
        Break(
            where=f"v{version}: signature",
            found="is missing",
            means=f"Whoever receives v{version} cannot verify that it comes from here.",
        )
        for version in published_versions(entries)
        if not store.signature_path(version).is_file()
    ]


def _check_signatures(
    workspace: Workspace,
    store: VersionStore,
    manifests: Mapping[int, VersionManifest],
    acknowledged: Mapping[int, LedgerEntry],
) -> list[Break]:
    """Every version's signature must be the lineage's, over exactly its files, and the one that its entry names."""
    breaks = []
    for version in sorted(manifests.keys() & acknowledged.keys()):
        where, means = f"v{version}: signature", f"Whoever receives v{version} cannot verify that it comes from here."
        try:
            bundle = store.signature(version)
            files = {file.path: file.digest for file in manifests[version].files}
            check_model_signature(bundle, files, model_public_key(workspace.keys))
        except (TakedownError, OSError) as error:
            breaks.append(Break(where=where, found=str(error), means=means))
            continue
        entry = acknowledged[version]
        if digest_bytes(bundle) != entry.event.data.get("signature"):
            found = f"is not the one that ledger entry {entry.seq} names"
            breaks.append(Break(where=where, found=found, means="It was made again after the version was published."))
    return breaks


# --- requests ---------------------------------------------------------------------------------------------


def _check_requests(manifests: Mapping[int, VersionManifest], entries: Entries) -> list[Break]:
    """What the ledger says of a request must agree with itself and with the version that it names."""
    breaks = [
        Break(
            where=f"ledger entry {entry.seq}", found=fault, means="An entry was removed, or the order was changed."
        )
        for entry, fault in follow(entries)[1]
    ]  # fmt: skip
    contradicts = "Ledger and version contradict each other."
    received = {e.event.request_id for e in entries if e.event.kind == "received"}
    for entry in entries:
        event, where = entry.event, f"ledger entry {entry.seq}"
        if event.kind != "applied":
            continue
        if event.version is None:
            found = f"request {event.request_id} is applied, but no version is named"
            breaks.append(Break(where=where, found=found, means="Nobody can say which version first excludes it."))
        elif event.version in manifests and event.request_id not in manifests[event.version].requests:
            found = f"request {event.request_id} is applied in v{event.version}, whose manifest does not list it"
            breaks.append(Break(where=where, found=found, means=contradicts))
    again = {(e.event.version, e.event.request_id): e for e in entries if e.event.kind == "reworked"}
    listed = {(version, name) for version, manifest in manifests.items() for name in reworked_in(manifest)}
    for version, name in sorted(listed - again.keys()):
        found = f"lists request {name} as worked on again, which no ledger entry says"
        breaks.append(Break(where=f"v{version}", found=found, means=contradicts))
    for key, entry in again.items():
        if key[0] in manifests and key not in listed:
            found = f"request {key[1]} is worked on again in v{key[0]}, whose manifest does not list it so"
            breaks.append(Break(where=f"ledger entry {entry.seq}", found=found, means=contradicts))
    for version, manifest in manifests.items():
        for request_id in manifest.requests:
            if request_id not in received:
                found = f"lists request {request_id}, which no ledger entry received"
                breaks.append(Break(where=f"v{version}", found=found, means=contradicts))
    return breaks + _check_standing(entries) + _check_approvals(manifests, entries) + _check_runs(entries)


def _check_standing(entries: Entries) -> list[Break]:
    """What counts as taken out must be out of the version in force, by what the ledger says of that and its parents."""
    states, faults = follow(entries)
    if faults or not published_versions(entries):
        return []  # said already
    current = current_version(entries)
    words = last_words(entries, current)
    return [
        Break(
            where=f"request {name}",
            found=f"is {state.state}, but v{current} in force was not made without its text",
            means="Its text may be in the model, and no run works on it. An entry was removed, or the order changed.",
        )
        for name, state in states.items()
        if state.state in ("applied", "verified", "folded", "repeat")
        and not (name in words and words[name].kind in OUT)
    ]


def _check_approvals(manifests: Mapping[int, VersionManifest], entries: Entries) -> list[Break]:
    """Weights that somebody had to approve, by the run's settings or because it waited for that, must have been."""
    breaks, approved = [], dict[str | None, object]()  # run → root of the weights that somebody approved
    asked = {m.run_id for m in manifests.values() if m.settings.get("approval") == "required"}
    for entry in entries:
        event = entry.event
        if event.kind == AWAITING:
            asked.add(event.run_id)
            approved.pop(event.run_id, None)  # what was approved before it waited is not what it waited with
        elif event.kind == "approved":
            approved[event.run_id] = event.data.get("root")
        elif event.kind == "published" and event.run_id in asked:
            if approved.get(event.run_id, "") == event.data.get("root"):
                continue
            found = f"v{event.version} was published by {event.run_id}, whose weights had to be approved"
            breaks.append(Break(where=f"ledger entry {entry.seq}", found=found, means="Nobody approved these weights."))
    return breaks


def _check_runs(entries: Entries) -> list[Break]:
    """A run's limits must have been on record before its result, and its result must name its evidence.

    What it starts from must have been in force when it was planned.
    """
    breaks, planned, current = [], set[str | None](), None
    for entry in entries:
        event, where = entry.event, f"ledger entry {entry.seq}"
        if event.kind in (*PUBLISHING, "rolled-back"):
            current = event.version
        if event.kind == "planned":
            planned.add(event.run_id)
            if event.version not in (None, current):
                found = f"{event.run_id} was planned on v{event.version}, but v{current} was in force"
                means = "The entry that put this version in force was removed, or the order was changed."
                breaks.append(Break(where=where, found=found, means=means))
        elif event.kind in DECIDED and event.request_id is None:
            if event.run_id not in planned:
                found = f"{event.run_id} was {event.kind}, but no earlier entry planned it"
                breaks.append(Break(where=where, found=found, means="Nobody can say which limits were set beforehand."))
            if not evidence_of(entry):
                found = f"{event.run_id} was {event.kind} without evidence"
                breaks.append(Break(where=where, found=found, means="What was measured cannot be shown."))
    return breaks


def _check_index(workspace: Workspace, entries: Entries) -> list[Break]:
    """Every row of the index must be whole and belong to a request; what is missing is added by the next run.

    An index of an older release is no break: it is derived, and the next run builds it again (see `index_notes`).
    """
    path = workspace.index / "index.db"
    if not path.exists() and not path.is_symlink():
        return []  # derived from the vault; the next run builds it
    from pipeline.index import examine  # datasketch takes longer to import than a quick check may last

    means = "A copy of a taken-down text may be missed. Delete the file; the next run builds it from the vault."
    received = {e.event.request_id for e in entries if e.event.kind == "received"}
    if not path.is_file():
        return [Break(where=workspace.index.name, found=f"{path.name} is not a regular file", means=means)]
    try:
        ids = examine(workspace.index)
    except (TakedownError, OSError) as error:
        return [Break(where=workspace.index.name, found=str(error), means=means)]
    found = "is indexed, but no ledger entry received it"
    return [Break(where=f"request {name}", found=found, means=means) for name in ids if name not in received]


def index_notes(workspace: Workspace) -> tuple[str, ...]:
    """What the next run will do to the index that is no break; nothing where it is of this release."""
    from pipeline.index import older_release  # as above

    release = older_release(workspace.index)
    if release is None:
        return ()
    return (f"the index was made by release {release}; the next run builds it again from the vault.",)


def _check_vault(workspace: Workspace, entries: Entries) -> list[Break]:
    """Every received request must have its record in the vault, with the text that the ledger committed to."""
    try:
        vault = open_vault(workspace)
    except TakedownError as error:
        means = "It may name the master key's file, so no text was checked. Correct it, and verify again."
        return [Break(where=workspace.settings_file.name, found=str(error), means=means)]
    breaks = []
    received = {e.event.request_id: e.event for e in reversed(entries) if e.event.kind == "received"}
    erased, unfinished = erased_requests(entries), unfinished_erasures(entries)
    try:
        for request_id, event in reversed(received.items()):
            if request_id in erased:
                breaks += _check_erased(vault, str(request_id), unfinished)
            else:
                breaks += _check_record(vault, str(request_id), event.data)
        extra = sorted(request.request_id for request in vault.requests(apart_from=map(str, received)))
    except VaultLocked as error:
        means = "No sealed text was checked. Run verify where the master key is."
        return [*breaks, Break(where=workspace.vault.name, found=str(error), means=means)]
    except (StoreDamaged, OSError) as error:
        extra = []
        if not breaks:
            means = "A record of the vault cannot be read; whose it is cannot be said."
            breaks.append(Break(where=workspace.vault.name, found=str(error), means=means))
    found = "is in the vault, but no ledger entry received it"
    means = "Intake was interrupted or is running, and submitting it again is safe; or ledger entries were removed."
    return breaks + [Break(where=f"request {request_id}", found=found, means=means) for request_id in extra]


def _check_erased(vault: Vault, request_id: str, unfinished: Collection[str]) -> list[Break]:
    """What was erased must be gone; what was begun must have been ended."""
    where, means = f"request {request_id}", "Its text or contact may still be there. Run the same erasure again."
    if request_id in unfinished:
        return [Break(where=where, found="its erasure was begun and not ended", means=means)]
    if vault.holds(request_id):
        means = "It was put back by hand or from a backup. Delete the files of this name in the vault."
        return [Break(where=where, found="was erased, and the vault has a record or key of it again", means=means)]
    return []


def _check_record(vault: Vault, request_id: str, received: Mapping[str, object]) -> list[Break]:
    """One request's record against its ``received`` event.

    Raises:
        VaultLocked: The master key is missing, or another one: that is no break of this record.
    """
    where = f"request {request_id}"
    lost = "Its text is lost or was exchanged: it can no longer be re-checked on new versions."
    try:
        request = vault.get(request_id)
        other = vault.differences(request, received)
    except VaultLocked:
        raise
    except StoreDamaged as error:
        return [Break(where=where, found=f"vault: {error}", means=lost)]
    except OSError as error:
        means = "Its text was not checked. Run verify as the user who owns the vault."
        return [Break(where=where, found=f"vault: cannot be read ({error.strerror})", means=means)]
    breaks = []
    if other == "text":
        told = "its text in the vault, under the vault's key, is not the one that the ledger committed to"
        breaks.append(Break(where=where, found=told, means=lost))
    elif other is not None:
        told = f"its record in the vault has another {other} than the ledger committed to"
        means = "Nobody can say from the vault who claimed what; certificates and reports do not show it."
        breaks.append(Break(where=where, found=told, means=means))
    if (request.batch_id, request.received_at) != _arrival(received):
        found = "its record in the vault names another batch or time than the ledger"
        means = "Nobody can say from the vault when and with what it arrived; the ledger counts."
        breaks.append(Break(where=where, found=found, means=means))
    return breaks


def _arrival(data: Mapping[str, object]) -> tuple[object, object]:
    """Batch and time of a ``received`` event; what is no time stays what it is and is equal to none."""
    at = data.get("received_at")
    try:
        return data.get("batch_id"), datetime.fromisoformat(str(at))
    except ValueError:
        return data.get("batch_id"), at
