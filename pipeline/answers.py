"""The end of a run: the version is published and every request gets its answer, in one ledger transaction.

In: the records of the stages. Out: a manifest and events. Never: an answer without its version, or a version twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

from pipeline.context import forget_spans
from pipeline.errors import StoreDamaged
from pipeline.files import digest_json
from pipeline.index import DedupeIndex
from pipeline.ledger import Ledger
from pipeline.models import software
from pipeline.records import (
    DedupeReport,
    Evaluation,
    Event,
    MaskReport,
    MergeReport,
    PassageSpan,
    Publication,
    ScreenReport,
    Step,
    Verdict,
)
from pipeline.runs import Run, clean, open_run
from pipeline.vault import Vault
from pipeline.versions import VersionStore


def publish(workspace_root: str, run_id: str, actor: str) -> Publication:
    """Publish what the gate accepted and write the answer of every request, in one ledger transaction."""
    run = open_run(workspace_root, run_id)
    workspace = run.workspace
    deduped, screened = run.finished("dedupe", DedupeReport), run.finished("screen", ScreenReport)
    spans = forget_spans(run)
    verdict = run.finished("gate", Verdict) if spans else None
    version, data = None, dict[str, object]()
    if verdict is not None and verdict.accepted:
        version = _next_version(run)
        data = {**_publish_version(run, version, spans), "unchecked": list(verdict.unchecked)}
    events = list(_decisions(run, actor, deduped, screened, verdict, version))
    if version is not None:
        events.append(Event(kind="published", actor=actor, version=version, run_id=run_id, data=data))
    with Ledger.open(workspace.ledger) as ledger:
        if not any(e.event.run_id == run_id for e in ledger.entries()):  # a resumed run answers once
            ledger.append(*events)
    if version is not None:
        # What an interrupted publish of other weights left behind is named by nothing.
        VersionStore(workspace.versions).collect()
        vault = Vault(workspace.vault)
        with DedupeIndex.open(workspace.index) as index:
            for name in spans:
                index.add(name, vault.get(name).text)
    clean(run.folder)
    return Publication(
        outcome="nothing" if verdict is None else "published" if verdict.accepted else "refused",
        run_id=run_id,
        version=version,
    )


def _next_version(run: Run) -> int:
    """One more than the highest version that the ledger names; a manifest it does not name was never published."""
    with Ledger.open(run.workspace.ledger, read_only=True) as ledger:
        return 1 + max(e.event.version or 0 for e in ledger.entries() if e.event.kind in ("initialised", "published"))


def _publish_version(run: Run, version: int, spans: Mapping[str, Sequence[PassageSpan]]) -> dict[str, object]:
    """Put the candidate into the store; returns what the ledger says of it."""
    store = VersionStore(run.workspace.versions)
    step, masked = run.finished("repair", Step), run.finished("saliency", MaskReport)
    merged, evaluation = run.finished("merge", MergeReport), run.finished("evaluate", Evaluation)
    manifest = store.publish(
        run.folder / "candidate",
        version=version,
        parent=store.manifest(run.plan.parent),
        created_at=datetime.now(UTC),
        run_id=run.run_id,
        requests=tuple(spans),
        settings=run.settings.model_dump(mode="json"),
        report={
            "alpha": step.calibration.alpha,
            "selected": merged.selected,
            "changed": merged.changed,
            "total": masked.total,
            "threshold": masked.threshold,
            "level": evaluation.level.model_dump(mode="json"),
            "memorised": {n: [[s.prompt_start, s.start, s.end] for s in found] for n, found in spans.items()},
            "evaluation": digest_json(evaluation.model_dump(mode="json")),
        },
        software=software(),
        replace_orphan=True,
    )
    if manifest.root != merged.root:
        raise StoreDamaged(f"v{version}: the store holds {manifest.root}, the evaluated candidate is {merged.root}.")
    return {"root": manifest.root, "manifest": store.manifest_digest(version)}


def _decisions(
    run: Run, actor: str, deduped: DedupeReport, screened: ScreenReport, verdict: Verdict | None, version: int | None
) -> Iterable[Event]:
    """The answer to each request; refused ones keep waiting."""
    screens = {r.request_id: r for r in screened.requests}
    for decision in deduped.decisions:
        found = screens[decision.request_id]
        data: dict[str, object] = {
            "exact_memorisation": found.exact_memorisation,
            "passages": found.passages,
            "memorised": len(found.memorised),
            "covered": decision.covered,
            "evidence": [e.model_dump() for e in decision.evidence[:8]],
        }
        kind: str = decision.verdict
        if found.memorised and version is None:
            kind = "refused"
            data["reasons"] = list(verdict.reasons) if verdict else []
        elif found.memorised:
            kind = "folded" if kind == "folded" else "applied"
        elif kind == "fresh":
            kind = "not-memorised"
        yield Event(
            kind=kind, actor=actor, request_id=decision.request_id, run_id=run.run_id,
            version=version if found.memorised and version is not None else run.plan.parent, data=data,
        )  # fmt: skip
