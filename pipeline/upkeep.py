"""Keep the store small, and old weights away: repack and purge.

In: a workspace. Out: the same versions in fewer bytes, or fewer versions with their proof kept. Never: a version that
stays restorable touched before its new form was made again and compared, a ledger entry that claims what is not done.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.delta import DeltaFile, rebuild
from pipeline.errors import Refused, StoreDamaged, UsageError
from pipeline.evidence import all_evidence
from pipeline.files import explained_space
from pipeline.ledger import Ledger
from pipeline.objects import StoredDelta
from pipeline.progress import Counter
from pipeline.records import Event, LedgerEntry, Record, VersionManifest
from pipeline.runlog import remove_run
from pipeline.runs import undecided
from pipeline.states import (
    ancestry,
    current_version,
    published_versions,
    purged_versions,
    request_states,
    unfinished_purge,
)
from pipeline.versions import VersionStore, delta_facts
from pipeline.workspace import Workspace, writing


class Repacked(Record):
    """What a repack did.

    Attributes:
        bytes_before: Size of all contents and deltas before.
        bytes_after: The same afterwards.
        made_deltas: Weight files that were whole and are deltas now.
        made_whole: Weight files that were deltas and are whole now.
    """

    bytes_before: int
    bytes_after: int
    made_deltas: int
    made_whole: int


class Purged(Record):
    """What a purge did.

    Attributes:
        versions: Versions whose weights are gone.
        files: Files destroyed.
        nbytes: Their size.
    """

    versions: tuple[int, ...]
    files: int
    nbytes: int


def stored_bytes(paths: Sequence[Path]) -> int:
    """Size of files."""
    return sum(path.stat().st_size for path in paths)


def repack(workspace: Workspace, keyframe_every: int, actor: str) -> Repacked:
    """Keep every version as a delta against its parent, but each ``keyframe_every``-th of a line whole.

    What the versions are does not change, only how they are kept: no manifest is touched. Interrupted, the same
    command continues.

    Args:
        workspace: Where.
        keyframe_every: Every n-th version of a line becomes whole; 1 makes all of them whole.
        actor: Who does it.

    Raises:
        UsageError: ``keyframe_every`` is below 1.
        StoreDamaged: A version cannot be made again; what was there before is there still.
        NoSpace: The disk is full; likewise.
        WorkspaceBusy: Another process is writing.
    """
    if keyframe_every < 1:
        raise UsageError(f"keyframes every {keyframe_every} versions: give 1 or more.")
    with writing(workspace), Ledger.open(workspace.ledger) as ledger, explained_space(workspace.versions):
        entries = ledger.entries()
        store = VersionStore(workspace.versions, published_versions(entries))
        objects = store.objects
        kept = _kept(store, entries)
        store.collect(all_evidence(entries), published_versions(entries))
        before = stored_bytes(objects.files())
        count = Counter("repack", len(kept))
        deltas, whole, drop = list[StoredDelta](), 0, list[Path]()
        for version, manifest in kept.items():
            line = ancestry(published_versions(entries), version)
            keyframe = (len(line) - 1) % keyframe_every == 0
            parent = kept.get(manifest.parent) if manifest.parent is not None else None
            bases = {f.path: f.digest for f in parent.files} if parent else {}
            for file in manifest.files:
                base = bases.get(file.path)
                if not file.path.endswith(".safetensors") or base == file.digest:
                    continue
                if keyframe or base is None:
                    if not objects.is_whole(file.digest):
                        objects.make_whole(file.digest)
                        drop += [objects.delta_path(file.digest, b) for b in objects.bases(file.digest)]
                        whole += 1
                elif objects.is_whole(file.digest) and file.digest not in (objects.chain(base, set(drop)) or ()):
                    # A content that its own base is made from stays whole: of two deltas in a circle none can be read.
                    path = objects.object_path(file.digest)
                    delta = objects.put_delta(path, file.digest, base)
                    if delta is not None:
                        rebuilt = rebuild(
                            DeltaFile(objects.delta_path(file.digest, base), file.digest, objects.source(base)), None
                        )
                        if not set(rebuilt) <= set(store.tensors(manifest)):
                            raise StoreDamaged(
                                f"v{version}: {file.path}: its delta leads elsewhere. Nothing was removed."
                            )
                        deltas.append(delta)
                        drop.append(path)
            count.add(note=f"v{version}")
        lost = sorted({
            f"v{version}"
            for version, manifest in kept.items()
            for file in manifest.files
            if objects.chain(file.digest, set(drop)) is None
        })  # fmt: skip
        if lost:
            raise StoreDamaged(f"{', '.join(lost)}: could not be made any more after this repack. Nothing was removed.")
        if drop:
            sizes = {"bytes_before": before, "bytes_after": stored_bytes(objects.files()) - stored_bytes(drop)}
            data: dict[str, object] = {"keyframe_every": keyframe_every, "deltas": delta_facts(deltas), **sizes}
            ledger.append(Event(kind="repacked", actor=actor, data=data))
            objects.drop(drop)
        return Repacked(
            bytes_before=before,
            bytes_after=stored_bytes(objects.files()),
            made_deltas=len(deltas),
            made_whole=whole,
        )


def purge(workspace: Workspace, before: int, actor: str, reason: str) -> Purged:
    """Destroy the weights of all versions below a number; manifests, tensor tables, signatures and ledger stay.

    Versions that stay and were kept as deltas against one that goes are made whole first. Forward deltas hold no old
    values, so nothing that is left leads back. Interrupted, the same command continues.

    Args:
        workspace: Where.
        before: First version that stays.
        actor: Who does it.
        reason: Why, in words that may stay for ever.

    Raises:
        UsageError: No reason, no such version, the current version would go, or there is nothing to purge.
        Refused: A request is on legal hold.
        StoreDamaged: A version that stays cannot be made whole; nothing was destroyed.
        NoSpace: The disk is full; likewise.
        WorkspaceBusy: Another process is writing.
    """
    if not reason.strip():
        raise UsageError("A purge needs a reason: it stays on record. Give one with --reason.")
    with writing(workspace), Ledger.open(workspace.ledger) as ledger, explained_space(workspace.versions):
        entries = ledger.entries()
        if waiting := undecided(workspace, entries):
            raise UsageError(
                f"{waiting[0].run_id}: waits for approval, and a purge removes what is to be approved. Nothing was "
                "destroyed; approve or refuse it first."
            )
        store = VersionStore(workspace.versions, published_versions(entries))
        gone = _to_purge(entries, before)
        kept = {number: m for number, m in _kept(store, entries).items() if number >= before}
        _stand_alone(store, kept)
        for manifest in kept.values():
            if store.named([manifest]) == set():
                raise StoreDamaged(f"v{manifest.version}: cannot be made from the store. Nothing was destroyed.")
        data: dict[str, object] = {"before": before, "versions": list(gone), "reason": reason}
        ledger.append(Event(kind="purging", actor=actor, data=data))
        stay = store.named(list(kept.values()))
        proof = [*all_evidence(entries), *(store.manifest(number).tensors for number in published_versions(entries))]
        stay |= {store.objects.object_path(digest) for digest in proof}
        destroyed = [path for path in store.objects.files() if path not in stay]
        nbytes = stored_bytes(destroyed)
        for run in workspace.runs.glob("*"):  # unfinished runs keep copies of weights; what they need they make again
            remove_run(workspace, run)
        store.objects.drop(destroyed)
        ledger.append(Event(kind="purged", actor=actor, data={**data, "files": len(destroyed), "bytes": nbytes}))
    return Purged(versions=gone, files=len(destroyed), nbytes=nbytes)


def _kept(store: VersionStore, entries: Sequence[LedgerEntry]) -> dict[int, VersionManifest]:
    """Manifests of the versions whose weights are there, ascending."""
    purged = purged_versions(entries)
    return {number: store.manifest(number) for number in published_versions(entries) if number not in purged}


def _to_purge(entries: Sequence[LedgerEntry], before: int) -> tuple[int, ...]:
    """The versions that a purge destroys, after everything that speaks against it."""
    current, known = current_version(entries), published_versions(entries)
    begun = unfinished_purge(entries)  # to be ended: what it names is not gone yet
    purged = purged_versions(e for e in entries if begun is None or e.seq != begun.seq)
    if before not in known:
        raise UsageError(f"v{before}: was never published. `takedown versions` lists all.")
    if before > current:
        raise UsageError(f"v{before}: the current version v{current} would be purged. Choose v{current} or lower.")
    gone = tuple(number for number in known if number < before and number not in purged)
    if not gone:
        raise UsageError(f"v{before}: there is no version before it whose weights are still there.")
    held = sorted(name for name, state in request_states(entries).items() if state.on_hold)
    if held:
        raise Refused(f"On legal hold: {', '.join(held)}. Nothing was destroyed; release them first.")
    return gone


def _stand_alone(store: VersionStore, kept: dict[int, VersionManifest]) -> None:
    """Make whole what is kept as a delta against something that goes."""
    stays = {file.digest for manifest in kept.values() for file in manifest.files}
    count = Counter("purge", len(kept))
    for manifest in kept.values():
        for file in manifest.files:
            chain = store.objects.chain(file.digest)
            if chain is None:
                raise StoreDamaged(f"v{manifest.version}: {file.path}: cannot be made. Nothing was destroyed.")
            if not stays.issuperset(chain):
                store.objects.make_whole(file.digest)
        count.add(note=f"v{manifest.version}")
