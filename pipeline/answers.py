"""The end of a run: the version is published and every request gets its answer, in one ledger transaction.

In: the records of the stages. Out: a manifest and events. Never: an answer without its version, or a version twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

from pipeline.context import first_worked_on, forget_spans, model_folder, thin_anchors
from pipeline.discreet import discreet
from pipeline.errors import StoreDamaged
from pipeline.evidence import all_evidence, checks_root, keep
from pipeline.index import DedupeIndex
from pipeline.ledger import Ledger
from pipeline.lineage import model_signer
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
from pipeline.runlog import put_aside, report, timed
from pipeline.runs import Run, clean, open_run
from pipeline.states import decisions, published_versions, questions
from pipeline.vault import open_vault
from pipeline.versions import VersionStore

OUTCOMES = {"answered": "nothing", "accepted": "published", "refused": "refused"}
"""What became of a run, by the event that decided it."""


def publish(workspace_root: str, run_id: str, actor: str, reason: str = "", refusal: str = "") -> Publication:
    """Publish what the gate accepted and write the answer of every request, in one ledger transaction.

    Args:
        workspace_root: Folder of the workspace.
        run_id: The run; its stages are done.
        actor: Who asked for it.
        reason: Why texts are put back; only for a reinstatement. Where it waited for approval the ledger has it.
        refusal: Why the actor refuses what the gate accepted; empty where nobody does.
    """
    run = open_run(workspace_root, run_id)
    with timed(run.workspace, run_id, "publish"):
        publication = _published(run, actor, reason, refusal)
    store = VersionStore(run.workspace.versions)
    root = store.manifest(publication.version).root if publication.version is not None else None
    gate = run.finished("gate", Verdict) if (run.folder / "gate.json").is_file() else None
    reasons = ["refused by a person"] if refusal else list(gate.reasons) if gate else []
    report(
        run.workspace, run_id, "run-ended", actor=actor, outcome=publication.outcome, version=publication.version,
        root=root, reasons=reasons,
    )  # fmt: skip
    put_aside(run.workspace, run.folder)
    return publication


def _published(run: Run, actor: str, reason: str, refusal: str) -> Publication:
    """See `publish`."""
    workspace, run_id, store = run.workspace, run.run_id, VersionStore(run.workspace.versions)
    with Ledger.open(workspace.ledger) as ledger:  # renews the checkpoint beside it, where that was interrupted
        entries = ledger.entries()
    if run_id not in decisions(entries):  # a run that was resumed after its answer answers once, and publishes once
        asked = questions(entries).get(run_id)
        said = str(asked.event.data.get("reason", "")) if asked is not None else reason
        events = _events(run, store, actor, said, refusal)
        with Ledger.open(workspace.ledger) as ledger:
            ledger.append(*events)
            entries = ledger.entries()
    # What an interrupted publish of other weights left behind is named by nothing.
    store.collect(all_evidence(entries), published_versions(entries))
    version = next((n for n, e in published_versions(entries).items() if e.event.run_id == run_id), None)
    if version is not None:
        discreet(open_vault(workspace), "publish", lambda: _index(run))
    clean(run.folder)
    return Publication(outcome=OUTCOMES[decisions(entries)[run_id].event.kind], run_id=run_id, version=version)


def _index(run: Run) -> None:
    """Add what was taken out to the fingerprints and remove what was put back; hold on to none of it."""
    vault = open_vault(run.workspace)
    with DedupeIndex.open(run.workspace.index) as index:
        for name in forget_spans(run):
            index.add(name, vault.get(name).text)
        for name in run.plan.reinstates:
            index.remove(name)
    thin_anchors(run)


def _events(run: Run, store: VersionStore, actor: str, reason: str, refusal: str) -> list[Event]:
    """What the ledger is to say of a run: its outcome, its version where it has one, and every answer."""
    deduped, screened = run.finished("dedupe", DedupeReport), run.finished("screen", ScreenReport)
    spans = forget_spans(run)
    verdict = run.finished("gate", Verdict) if spans or run.plan.left_out else None
    if verdict is not None and refusal:
        verdict = verdict.model_copy(update={"accepted": False, "reasons": (*verdict.reasons, refusal)})
    events = [_outcome(run, actor, verdict, keep(run.folder, store.objects))]
    version = None
    if verdict is not None and verdict.accepted:
        version, data = _publish_version(run, spans)
        events.append(Event(kind="published", actor=actor, version=version, run_id=run.run_id, data=data))
    if run.plan.reinstates:
        fresh = first_worked_on(run) if version is not None else []
        answers = _decisions(run, actor, deduped, screened, verdict, version)
        events += [*_reinstated(run, actor, verdict, version, reason), *(e for e in answers if e.request_id in fresh)]
        return [*events, *_measured(run, actor, version)]
    answers = _decisions(run, actor, deduped, screened, verdict, version)
    return [*events, *answers, *_measured(run, actor, version), *_reworked(run, actor, version)]


def _outcome(run: Run, actor: str, verdict: Verdict | None, evidence: Mapping[str, str]) -> Event:
    """The event of the run itself: what was decided, on which evidence."""
    data: dict[str, object] = {"evidence": dict(evidence)}
    if verdict is not None:
        evaluation = run.finished("evaluate", Evaluation)
        data |= {
            "checks": checks_root(evaluation),
            "level": evaluation.level.model_dump(mode="json"),
            "reasons": list(verdict.reasons),
            "unchecked": list(verdict.unchecked),
        }
    kind = "answered" if verdict is None else "accepted" if verdict.accepted else "refused"
    return Event(kind=kind, actor=actor, run_id=run.run_id, version=run.plan.parent, data=data)


def _measured(run: Run, actor: str, version: int | None) -> list[Event]:
    """What was measured on the published version of each request that it was made to exclude.

    Requests that came back in an earlier version and were measured below the limit again are among them.
    """
    if version is None:
        return []
    evaluation = run.finished("evaluate", Evaluation)
    limit = evaluation.level.mean + run.settings.gate.forget_tolerance
    return [
        Event(
            kind="verified",
            actor=actor,
            request_id=c.name,
            run_id=run.run_id,
            version=version,
            data={
                "before": c.before.model_dump(mode="json"),
                "after": c.after.model_dump(mode="json"),
                "level": evaluation.level.model_dump(mode="json"),
                "limit": limit,
            },
        )
        for c in evaluation.of("this", "folded", "repeat")
    ]


def _reworked(run: Run, actor: str, version: int | None) -> Iterable[Event]:
    """That texts which were out already were worked on again, and how they were measured; their state stays."""
    if version is None:
        return
    evaluation = run.finished("evaluate", Evaluation)
    for comparison in evaluation.of("earlier"):
        if comparison.name in run.plan.reworks:
            data = {side: getattr(comparison, side).model_dump(mode="json") for side in ("before", "after")}
            yield Event(
                kind="reworked", actor=actor, request_id=comparison.name, run_id=run.run_id, version=version, data=data
            )


def _reinstated(run: Run, actor: str, verdict: Verdict | None, version: int | None, reason: str) -> list[Event]:
    """That texts were put back, or that this was asked for and refused: who asked, and why.

    What stays out was measured as on any later version, and its state is the same.
    """
    kind, shown = "reinstated", version
    data: dict[str, object] = {"reason": reason, "left_out": list(run.plan.left_out)}
    if version is None:
        kind, shown = "not-reinstated", run.plan.parent
        data["reasons"] = list(verdict.reasons) if verdict else []
    return [
        Event(kind=kind, actor=actor, request_id=name, run_id=run.run_id, version=shown, data=data)
        for name in run.plan.reinstates
    ]


def _publish_version(run: Run, spans: Mapping[str, Sequence[PassageSpan]]) -> tuple[int, dict[str, object]]:
    """Put the candidate into the store; returns its number and what the ledger says of it."""
    with Ledger.open(run.workspace.ledger, read_only=True) as ledger:
        known = published_versions(ledger.entries())
    store = VersionStore(run.workspace.versions, known)
    # One more than the highest that the ledger names: a manifest that it does not name was never published.
    version, parent = 1 + max(known), store.manifest(run.plan.parent)
    merged, evaluation = run.finished("merge", MergeReport), run.finished("evaluate", Evaluation)
    published = store.publish(
        run.folder / "candidate",
        version=version,
        parent=parent,
        created_at=datetime.now(UTC),
        run_id=run.run_id,
        requests=tuple(first_worked_on(run)),
        settings=run.settings.model_dump(mode="json"),
        report={
            **_trained(run, spans),
            "selected": merged.selected,
            "changed": merged.changed,
            "level": evaluation.level.model_dump(mode="json"),
            "memorised": {n: [[s.prompt_start, s.start, s.end] for s in found] for n, found in spans.items()},
            **({"left_out": list(run.plan.left_out)} if run.plan.left_out else {}),
            **({"reworked": list(run.plan.reworks)} if run.plan.reworks else {}),
        },
        software=software(),
        keyframe_every=run.settings.store.keyframe_every,
        sign=model_signer(run.workspace.keys),
        replace_orphan=True,
        parent_folder=model_folder(run, run.plan.parent),
        # Not the weights alone: another config.json or tokenizer is another model than the one that was measured.
        evaluated={file.path: file.digest for file in merged.files},
    )
    if published.manifest.root != merged.root:
        raise StoreDamaged(
            f"v{version}: the store holds {published.manifest.root}, the evaluated candidate is {merged.root}."
        )
    return version, published.facts()


def _trained(run: Run, spans: Mapping[str, Sequence[PassageSpan]]) -> dict[str, object]:
    """What the manifest says of a fit; nothing where a reinstatement brought no other text back."""
    if not spans:
        return {}
    step, masked = run.finished("repair", Step), run.finished("saliency", MaskReport)
    return {"alpha": step.calibration.alpha, "total": masked.total, "threshold": masked.threshold}


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
            # How many others it resembles; which ones is in the run's evidence, so that a certificate for one sender
            # can show this entry without naming another's request.
            "similar": len(decision.evidence),
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
