"""The reading side: what the ledger, the manifests and the finished runs say, as plain records.

In: a workspace. Out: views for the terminal, for JSON and for the report. Never: torch, Prefect, a lock, a write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from pipeline.errors import StoreDamaged, TakedownError
from pipeline.evidence import evidence_of, recall
from pipeline.files import digest_bytes
from pipeline.keys import log_vkey, model_public_key
from pipeline.ledger import Ledger
from pipeline.notes import read_checkpoint
from pipeline.records import (
    Break,
    DedupeDecision,
    DedupeReport,
    Evaluation,
    LedgerEntry,
    MaskReport,
    Record,
    ScreenReport,
    Step,
    Verdict,
    VersionManifest,
)
from pipeline.report_requests import aware, chronicle, request_views
from pipeline.report_views import (
    Kind,
    LineageView,
    LogView,
    LostStep,
    StepView,
    StorageView,
    VersionStatus,
    VersionView,
)
from pipeline.runlog import log_file
from pipeline.runs import Plan
from pipeline.states import (
    RequestState,
    ancestry,
    current_version,
    decisions,
    follow,
    published_versions,
    purged_versions,
    put_back,
)
from pipeline.undo import reworked_in
from pipeline.versions import VersionStore
from pipeline.workspace import Workspace, read_entries

R = TypeVar("R", bound=Record)


def acknowledged_versions(workspace: Workspace, entries: Sequence[LedgerEntry]) -> tuple[VersionManifest, ...]:
    """Manifests of the versions that the ledger names; others are rests of interrupted publishes."""
    known = published_versions(entries)
    store = VersionStore(workspace.versions, known)
    return tuple(store.manifest(n) for n in known)


def step_view(workspace: Workspace, run_id: str, entries: Sequence[LedgerEntry]) -> StepView:
    """One decided run, from the records that its deciding entry names as evidence.

    Raises:
        StoreDamaged: No entry decided it, or a record is missing or was changed.
    """
    entry = decisions(entries).get(run_id)
    if entry is None:
        raise StoreDamaged(f"{run_id}: no ledger entry decided this run. `takedown log` lists runs.")
    objects = VersionStore(workspace.versions).objects

    def record(name: str, kind: type[R]) -> R | None:
        return recall(objects, entry, name, kind)

    def needed(name: str, kind: type[R]) -> R:
        found = record(name, kind)
        if found is None:
            raise StoreDamaged(f"ledger entry {entry.seq}: names no evidence {name!r}. Run `takedown verify`.")
        return found

    trained = "gate" in evidence_of(entry)
    plan = needed("plan", Plan)
    steps = [step for name in ("unlearn", "repair") if (step := record(name, Step)) is not None]
    if len(steps) == 2 and steps[0] == steps[1]:
        steps = steps[:1]  # without retain text nothing was repaired
    return StepView(
        run_id=run_id,
        at=entry.at,
        version=_version_of(run_id, entries),
        parent=plan.parent,
        left_out=plan.left_out,
        reworks=plan.reworks if trained else (),
        dedupe=needed("dedupe", DedupeReport),
        screen=needed("screen", ScreenReport),
        mask=record("saliency", MaskReport),
        vectors=tuple(s.vector for s in steps),
        calibrations=tuple(s.calibration for s in steps),
        evaluation=needed("evaluate", Evaluation) if trained else None,
        verdict=_decided(entry, needed("gate", Verdict)) if trained else None,
        limits=plan.settings.gate,
        log=str(log.relative_to(workspace.root)) if (log := log_file(workspace, run_id)) else None,
    )


def decision_of(workspace: Workspace, state: RequestState, entries: Sequence[LedgerEntry]) -> DedupeDecision | None:
    """What deduplication decided of a request in the run that answered it last; None where none has.

    Raises:
        StoreDamaged: That run's record is missing or was changed.
    """
    entry = decisions(entries).get(str(state.run_id))
    found = recall(VersionStore(workspace.versions).objects, entry, "dedupe", DedupeReport) if entry else None
    return next((d for d in found.decisions if d.request_id == state.request_id), None) if found else None


def _decided(entry: LedgerEntry, verdict: Verdict) -> Verdict:
    """The verdict as the ledger has it: somebody may have refused what the gate accepted."""
    reasons = entry.event.data.get("reasons")
    if entry.event.kind != "refused" or not verdict.accepted or not isinstance(reasons, list):
        return verdict
    return verdict.model_copy(update={"accepted": False, "reasons": tuple(map(str, reasons))})


def _version_of(run_id: str, entries: Sequence[LedgerEntry]) -> int | None:
    """The version that a run published."""
    return next((e.event.version for e in entries if e.event.kind == "published" and e.event.run_id == run_id), None)


def version_status(entries: Sequence[LedgerEntry], version: int) -> VersionStatus:
    """How a version stands to the one in force."""
    current = current_version(entries)
    if version == current:
        return "current"
    if version in purged_versions(entries):
        return "purged"
    return "superseded" if version in ancestry(published_versions(entries), current) else "rolled back"


def version_views(manifests: Sequence[VersionManifest], entries: Sequence[LedgerEntry]) -> tuple[VersionView, ...]:
    """Versions for people."""
    published = published_versions(entries)
    return tuple(_version_view(published[m.version], m, entries) for m in manifests)


def _version_view(
    entry: LedgerEntry, manifest: VersionManifest | None, entries: Sequence[LedgerEntry]
) -> VersionView:  # fmt: skip
    """A version as its manifest says; as its ledger entry alone says where that cannot be read."""
    event, version = entry.event, entry.event.version or 0
    report = manifest.report if manifest else {}

    def number(key: str) -> int | None:
        value = report.get(key)
        return value if isinstance(value, int) else None

    parent, alpha = event.data.get("parent"), report.get("alpha")
    return VersionView(
        version=version,
        parent=manifest.parent if manifest else parent if isinstance(parent, int) else None,
        root=manifest.root if manifest else str(event.data.get("root")),
        created_at=aware(manifest.created_at if manifest else entry.at),
        published_by=event.actor,
        run_id=event.run_id,
        requests=manifest.requests if manifest else _taken_out(entries, version),
        puts_back=tuple(name for name, number in put_back(entries, version).items() if number == version),
        reworks=reworked_in(manifest) if manifest else (),
        selected=number("selected"),
        changed=number("changed"),
        total=number("total"),
        alpha=float(alpha) if isinstance(alpha, int | float) else None,
        status=version_status(entries, version),
    )


def _taken_out(entries: Sequence[LedgerEntry], version: int) -> tuple[str, ...]:
    """Requests that a version is the first to exclude, as the ledger says."""
    return tuple(
        str(e.event.request_id) for e in entries if e.event.kind == "verified" and e.event.version == version
    )  # fmt: skip


def storage_views(
    store: VersionStore, manifests: Mapping[int, VersionManifest], entries: Sequence[LedgerEntry]
) -> tuple[StorageView, ...]:
    """How each version is kept; what several versions share is counted for the first of them that is there."""
    counted, gone, views = set[Path](), purged_versions(entries), list[StorageView]()
    for number, manifest in sorted(manifests.items()):
        kind, paths = _kept_as(store, manifest) if number not in gone else ("purged", set[Path]())
        fresh = {path for path in paths if path not in counted}
        proof = {store.manifest_path(number), store.signature_path(number), store.objects.object_path(manifest.tensors)}
        counted |= fresh
        views.append(
            StorageView(
                version=number,
                kind=kind,
                added=None if kind == "missing" else sum(p.stat().st_size for p in fresh | proof if p.is_file()),
                whole=sum(f.size for f in manifest.files),
            )
        )
    return tuple(views)


def _kept_as(store: VersionStore, manifest: VersionManifest) -> tuple[Kind, set[Path]]:
    """How a version's files are kept, and the last file that each is read from: itself, or the delta to it."""
    found = {file.path: store.objects.paths(file.digest) for file in manifest.files}
    if not all(found.values()):
        return "missing", set()
    made = any(len(paths) > 1 for paths in found.values())
    return "delta" if made else "whole", {paths[-1] for paths in found.values()}


def log_view(workspace: Workspace, entries: Sequence[LedgerEntry]) -> LogView:
    """The log as it can be checked from outside; what does not hold is left out, and `verify` names it."""
    checkpoint = log_key = model_key = None
    with suppress(TakedownError, OSError):
        log_key = log_vkey(workspace.keys)
        with Ledger.open(workspace.ledger, read_only=True) as ledger:
            note = ledger.checkpoint()
        if note is not None:
            read_checkpoint(note, log_key)
            checkpoint = note
    with suppress(TakedownError, OSError):
        model_key = digest_bytes(model_public_key(workspace.keys))
    return LogView(entries=len(entries), checkpoint=checkpoint, log_key=log_key, model_key=model_key)


def readable_steps(
    workspace: Workspace, entries: Sequence[LedgerEntry]
) -> tuple[tuple[StepView, ...], tuple[LostStep, ...]]:
    """All decided runs, and those whose records cannot be read, each in order."""
    steps, lost = [], []
    for run_id, entry in decisions(entries).items():
        try:
            steps.append(step_view(workspace, run_id, entries))
        except StoreDamaged as error:
            version = _version_of(run_id, entries)
            lost.append(
                LostStep(run_id=run_id, at=entry.at, outcome=entry.event.kind, version=version, found=str(error))
            )
    return tuple(steps), tuple(lost)


def readable_manifests(store: VersionStore, entries: Sequence[LedgerEntry]) -> dict[int, VersionManifest]:
    """Manifests of the versions that the ledger names, without those that cannot be read."""
    found = {}
    for number in published_versions(entries):
        with suppress(StoreDamaged):
            found[number] = store.manifest(number)
    return found


def lineage_view(workspace: Workspace, breaks: Sequence[Break] | None) -> LineageView:
    """Everything the report shows. What cannot be read is shown as such; only a ledger that does not hold stops it.

    Raises:
        StoreDamaged: The ledger does not hold.
    """
    entries = read_entries(workspace)
    current, store = current_version(entries), VersionStore(workspace.versions)
    manifests, (steps, lost) = readable_manifests(store, entries), readable_steps(workspace, entries)
    in_force = manifests.get(current)
    return LineageView(
        workspace=workspace.root.name,
        generated_at=datetime.now(UTC),
        current=current,
        software=manifests[max(manifests)].software if manifests else {},
        versions=tuple(_version_view(e, manifests.get(n), entries) for n, e in published_versions(entries).items()),
        storage=storage_views(store, manifests, entries),
        files=in_force.files if in_force else (),
        requests=request_views(workspace, follow(entries)[0], steps, entries),
        steps=steps,
        lost=lost,
        chronicle=chronicle(entries),
        log=log_view(workspace, entries),
        breaks=None if breaks is None else tuple(breaks),
    )
