"""The takedown flow: one step from waiting requests to a published version. Read it top to bottom.

Each task is one call into `pipeline`; between tasks travel a folder and a run id, never texts or tensors, so
that nothing confidential reaches Prefect's database. Every stage is kept in the run's folder, hence no Prefect cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from httpx import HTTPError
from prefect import flow, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE

from flows.liveness import alive
from flows.runners import shares, side_by_side
from flows.shown import progress_artifacts
from pipeline import answers, approval, context, stages
from pipeline.patience import LONGEST_WAIT_S, writing_in_turn
from pipeline.records import Evaluation, Publication
from pipeline.reinstate import plan_reinstatement as reinstate_plan
from pipeline.runlog import watched
from pipeline.runs import open_run, plan_run
from pipeline.states import AWAITING
from pipeline.submit import still_waiting
from pipeline.workspace import open_workspace, writing

OPTIONS: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False}


@task(**OPTIONS)
def plan(workspace: str, requests: list[str] | None, actor: str) -> str | None:
    """Decide what this run works on; its id is the digest of that."""
    planned = plan_run(open_workspace(Path(workspace)), requests, actor)
    return planned.run_id if planned else None


@task(**OPTIONS)
def plan_reinstatement(workspace: str, requests: list[str], actor: str, reason: str) -> str | None:
    """Decide which steps are left out; None where nothing had been taken out."""
    planned = reinstate_plan(open_workspace(Path(workspace)), requests, actor, reason)
    return planned.run_id if planned else None


@task(**OPTIONS)
def reference(workspace: str, run_id: str) -> str:
    """Measure v0 on the reference texts, once for the lineage."""
    return f"never-seen level {context.reference(workspace, run_id).level.mean:.3f}"


@task(**OPTIONS)
def leave_out(workspace: str, run_id: str) -> int:
    """Leave the vectors of earlier steps out; returns the entries that differ from the parent."""
    return stages.leave_out_stage(workspace, run_id).changed


@task(**OPTIONS)
def dedupe(workspace: str, run_id: str) -> dict[str, str]:
    """Fresh, repeat or folded."""
    return {d.request_id: d.verdict for d in stages.dedupe_stage(workspace, run_id).decisions}


@task(**OPTIONS)
def screen(workspace: str, run_id: str) -> dict[str, int]:
    """Memorised passages of each request."""
    return {r.request_id: len(r.memorised) for r in stages.screen(workspace, run_id).requests}


@task(**OPTIONS)
def screen_some(workspace: str, run_id: str, requests: list[str]) -> int:
    """Screen some of the requests; returns how many are memorised."""
    return sum(bool(r.memorised) for r in stages.screen_some(workspace, run_id, requests))


@task(**OPTIONS)
def saliency(workspace: str, run_id: str) -> int:
    """Number of weights that may change."""
    return stages.saliency(workspace, run_id).selected


@task(**OPTIONS)
def unlearn(workspace: str, run_id: str) -> float:
    """Fit the task vector, find the strength of its negation."""
    return stages.unlearn(workspace, run_id).calibration.alpha


@task(**OPTIONS)
def repair(workspace: str, run_id: str) -> float:
    """Mend what negation broke."""
    return stages.repair_stage(workspace, run_id).calibration.alpha


@task(**OPTIONS)
def merge(workspace: str, run_id: str) -> str:
    """Write the candidate."""
    return stages.merge_stage(workspace, run_id).root


@task(**OPTIONS)
def evaluate(workspace: str, run_id: str) -> int:
    """Measure parent and candidate; returns the number of texts."""
    return len(stages.evaluate(workspace, run_id).comparisons)


@task(**OPTIONS)
def gate(workspace: str, run_id: str) -> bool:
    """Accept or refuse."""
    return stages.gate(workspace, run_id).accepted


@task(**OPTIONS)
def ask_for_approval(workspace: str, run_id: str, actor: str, reason: str) -> bool:
    """Hold what the gate accepted where settings want somebody to approve it."""
    return approval.hold(workspace, run_id, actor, reason)


@task(**OPTIONS)
def publish(workspace: str, run_id: str, actor: str, reason: str = "") -> Publication:
    """Publish and record. An ordinary task, because Prefect swallows exceptions in commit hooks."""
    return answers.publish(workspace, run_id, actor, reason)


@task(**OPTIONS)
def leave_artifacts(workspace: str, run_id: str, publication: Publication) -> None:
    """Leave a summary and a table in Prefect for people; nothing fails without them, for the ledger is the record."""
    try:
        _leave(workspace, run_id, publication)
    except HTTPError:
        return


def _leave(workspace: str, run_id: str, publication: Publication) -> None:
    run = open_run(workspace, run_id)
    version = f"v{publication.version}" if publication.version is not None else f"none; v{run.plan.parent} stays"
    outcome = "answered, nothing to change" if publication.outcome == "nothing" else publication.outcome
    again = run.plan.reworks if publication.outcome != "nothing" else ()
    create_markdown_artifact(
        key=run_id,
        markdown=f"# {run_id}\n\n- outcome: **{outcome}**\n- parent: v{run.plan.parent}\n"
        f"- version: {version}\n- requests: {', '.join(run.plan.requests)}\n"
        + (f"- worked on again: {', '.join(again)}\n" if again else ""),
        description="Takedown step",
    )
    if publication.outcome != "nothing":
        create_table_artifact(
            key=f"{run_id}-scores", table=score_rows(run.finished("evaluate", Evaluation)),
            description="Every text before and after: exact memorisation (EM), extraction strength (ES), ROUGE-L",
        )  # fmt: skip


@flow(name="takedown", persist_result=False)
def takedown(
    workspace: str,
    requests: list[str] | None = None,
    actor: str = "scheduled",
    urgent: bool = False,
) -> Publication | None:
    """Run one takedown step.

    Args:
        workspace: Folder of the workspace.
        requests: Ids of the waiting requests to work on; all that wait when left out.
        actor: Who asked for it, for the ledger.
        urgent: Wait for another writer, and go before everybody who is not urgent; without, be refused where one is.

    Returns:
        What became of it; None when nothing waits.
    """
    opened = open_workspace(Path(workspace))
    with alive(opened.root), writing_in_turn(opened, LONGEST_WAIT_S if urgent else 0.0, urgent):
        if requests is not None and not still_waiting(opened, "", requests):
            return None  # somebody else answered them while this waited for the lock
        return step(workspace, requests, actor)


def step(workspace: str, requests: list[str] | None, actor: str) -> Publication | None:
    """The tasks of a step, in a workspace that is locked for writing; see `takedown`."""
    run_id = plan(workspace, requests, actor)
    return carry_out(workspace, run_id, actor) if run_id is not None else None


def carry_out(workspace: str, run_id: str, actor: str, reason: str = "") -> Publication:
    """A planned run, or what is left of it: published, refused, answered, or held until somebody approves."""
    with watched(open_workspace(Path(workspace)), run_id):
        reference(workspace, run_id)
        if open_run(workspace, run_id).plan.left_out:
            leave_out(workspace, run_id)
        make_candidate(workspace, run_id)
        if ask_for_approval(workspace, run_id, actor, reason):
            publication = Publication(outcome=AWAITING, run_id=run_id)
        else:
            publication = publish(workspace, run_id, actor, reason)
        leave_artifacts(workspace, run_id, publication)
        return publication


@flow(name="reinstate", persist_result=False)
def reinstate(workspace: str, requests: list[str], actor: str, reason: str) -> Publication | None:
    """Put the texts of countered or withdrawn requests back, in a new version.

    Args:
        workspace: Folder of the workspace.
        requests: Ids of the requests.
        actor: Who asked for it, for the ledger.
        reason: Why, for the ledger.

    Returns:
        What became of it; None where the version in force was not made without the texts: that is on record then.
    """
    opened = open_workspace(Path(workspace))
    with alive(opened.root), writing(opened):
        run_id = plan_reinstatement(workspace, requests, actor, reason)
        return carry_out(workspace, run_id, actor, reason) if run_id is not None else None


@progress_artifacts()
def make_candidate(workspace: str, run_id: str) -> None:
    """The stages from the texts to the gate's decision; those that need weights to change only where they do."""
    dedupe(workspace, run_id)
    runtime = open_workspace(Path(workspace)).settings().runtime
    pieces = shares(open_run(workspace, run_id).plan.worked_on, runtime.workers)
    stages.prepare_screen(workspace, run_id)
    side_by_side(screen_some, pieces, runtime, workspace=workspace, run_id=run_id)
    screen(workspace, run_id)
    if stages.needs_training(workspace, run_id):
        saliency(workspace, run_id)
        unlearn(workspace, run_id)
        repair(workspace, run_id)
    if stages.needs_version(workspace, run_id):
        merge(workspace, run_id)
        evaluate(workspace, run_id)
        gate(workspace, run_id)


def score_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """One row per text, before and after, for a table."""
    return [
        {
            "text": c.name,
            "role": c.role,
            "EM before": round(c.before.exact_memorisation, 3),
            "EM after": round(c.after.exact_memorisation, 3),
            "ES after": round(c.after.extraction_strength, 3),
            "ROUGE-L after": None if c.after.rouge_l is None else round(c.after.rouge_l, 3),
        }
        for c in evaluation.comparisons
    ]
