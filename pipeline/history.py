"""The reading side: what the ledger, the manifests and the finished runs say, as plain records.

In: a workspace. Out: views for the terminal, for JSON and for the report. Never: torch, Prefect, a lock, a write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TypeVar

from pipeline.errors import StoreDamaged, UsageError
from pipeline.files import digest_json
from pipeline.ledger import Ledger, RequestState, current_version, request_states
from pipeline.records import (
    Break,
    DedupeReport,
    Evaluation,
    LedgerEntry,
    MaskReport,
    Record,
    ScreenReport,
    Step,
    TextScore,
    Verdict,
    VersionManifest,
)
from pipeline.report import LineageView, RequestView, StepView, VersionView
from pipeline.runs import Run, open_run
from pipeline.vault import Vault
from pipeline.versions import VersionStore
from pipeline.workspace import Workspace

R = TypeVar("R", bound=Record)


def read_entries(workspace: Workspace) -> tuple[LedgerEntry, ...]:
    """All ledger entries."""
    with Ledger.open(workspace.ledger, read_only=True) as ledger:
        return ledger.entries()


def acknowledged_versions(workspace: Workspace, entries: Sequence[LedgerEntry]) -> tuple[VersionManifest, ...]:
    """Manifests of the versions that the ledger names; others are rests of interrupted publishes."""
    store = VersionStore(workspace.versions)
    numbers = [e.event.version for e in entries if e.event.kind in ("initialised", "published")]
    return tuple(store.manifest(n) for n in numbers if n is not None)


def run_ids(entries: Sequence[LedgerEntry]) -> list[str]:
    """Runs that the ledger names, in order."""
    return list(dict.fromkeys(e.event.run_id for e in entries if e.event.run_id))


def step_view(workspace: Workspace, run_id: str, entries: Sequence[LedgerEntry]) -> StepView:
    """One run as recorded.

    Raises:
        StoreDamaged: Its folder is gone or was changed: the records of an evaluation must have the digest that
            the version's manifest names.
    """
    try:
        run = open_run(workspace.root, run_id)
    except UsageError as error:
        raise StoreDamaged(f"{workspace.runs / run_id}: the records of a run are gone. Restore the folder.") from error
    own = [e for e in entries if e.event.run_id == run_id]
    version = next((e.event.version for e in own if e.event.kind == "published"), None)
    trained = (run.folder / "gate.json").is_file()
    evaluation = run.finished("evaluate", Evaluation) if trained else None
    if version is not None and evaluation is not None:
        recorded = VersionStore(workspace.versions).manifest(version).report.get("evaluation")
        if recorded != digest_json(evaluation.model_dump(mode="json")):
            raise StoreDamaged(f"{run.folder}/evaluate.json: is not the evaluation that v{version} was published with.")
    steps = _distinct_steps(run) if trained else []
    return StepView(
        run_id=run_id,
        at=own[-1].at,
        version=version,
        parent=run.plan.parent,
        dedupe=run.finished("dedupe", DedupeReport),
        screen=run.finished("screen", ScreenReport),
        mask=run.finished("saliency", MaskReport) if trained else None,
        vectors=tuple(s.vector for s in steps),
        calibrations=tuple(s.calibration for s in steps),
        evaluation=evaluation,
        verdict=run.finished("gate", Verdict) if trained else None,
        limits=run.settings.gate,
    )


def _distinct_steps(run: Run) -> list[Step]:
    fitted, repaired = run.finished("unlearn", Step), run.finished("repair", Step)
    return [fitted] if fitted == repaired else [fitted, repaired]


def version_views(manifests: Sequence[VersionManifest], current: int) -> tuple[VersionView, ...]:
    """Versions for people."""

    def number(manifest: VersionManifest, key: str) -> int | None:
        value = manifest.report.get(key)
        return value if isinstance(value, int) else None

    return tuple(
        VersionView(
            version=m.version,
            parent=m.parent,
            root=m.root,
            created_at=m.created_at,
            requests=m.requests,
            selected=number(m, "selected"),
            changed=number(m, "changed"),
            total=number(m, "total"),
            alpha=float(str(m.report["alpha"])) if "alpha" in m.report else None,
            status="current" if m.version == current else "superseded",
        )
        for m in manifests
    )


def request_views(
    workspace: Workspace, states: Mapping[str, RequestState], steps: Sequence[StepView]
) -> tuple[RequestView, ...]:
    """Requests for people: titles come from the vault, and are missing where it has none."""
    vault = Vault(workspace.vault)
    scores: dict[str, tuple[TextScore, TextScore]] = {}
    for step in steps:
        for c in step.evaluation.comparisons if step.evaluation else ():
            if c.role in ("this", "folded", "repeat", "not-memorised"):
                scores[c.name] = (c.before, c.after)
    views = []
    for name, state in states.items():
        try:
            request = vault.get(name)
            title, holder = request.title, request.rights_holder
        except StoreDamaged:
            title, holder = "(not in the vault)", ""
        before, after = scores.get(name, (None, None))
        first = state.version if state.state in ("applied", "folded", "repeat") else None
        views.append(
            RequestView(
                request_id=name,
                title=title,
                rights_holder=holder,
                batch_id=state.batch_id,
                received_at=state.received_at,
                state=state.state,
                version=first,
                before=before,
                after=after,
            )
        )
    return tuple(views)


def lineage_view(workspace: Workspace, breaks: Sequence[Break] | None) -> LineageView:
    """Everything the report shows."""
    entries = read_entries(workspace)
    current = current_version(entries)
    manifests = acknowledged_versions(workspace, entries)
    steps = tuple(step_view(workspace, run_id, entries) for run_id in run_ids(entries))
    return LineageView(
        workspace=workspace.root.name,
        generated_at=datetime.now(UTC),
        current=current,
        software=manifests[-1].software,
        versions=version_views(manifests, current),
        requests=request_views(workspace, request_states(entries), steps),
        steps=steps,
        breaks=None if breaks is None else tuple(breaks),
    )
