"""New versions: `takedown init`, `run`, `reinstate`, and what is shown of a step."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from flows.approving import show_waiting
from flows.environment import server_needed
from flows.overlaps import show_overlaps
from flows.progress import bars
from flows.scores import score_table
from flows.terminal import (
    Actor,
    Json,
    Reason,
    err,
    opened,
    out,
    plain_lines,
    quiet_libraries,
    say,
    show_json,
    state_words,
    table,
)
from flows.versioning import storage_line
from pipeline.approval import waiting
from pipeline.history import step_view
from pipeline.patience import LONGEST_WAIT_S, standing_first, writing_in_turn
from pipeline.records import Publication
from pipeline.reinstate import check_reinstatement, unfinished
from pipeline.runs import undecided
from pipeline.states import AWAITING, current_version, request_states
from pipeline.versions import VersionStore
from pipeline.workspace import Workspace, read_entries, writing

if TYPE_CHECKING:
    from pipeline.dropfolder import Delivery

verbs = typer.Typer(rich_markup_mode=None)

ANSWERED = "Every request of this batch is answered, or on hold; see takedown status."


@verbs.command()
def init(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="Model folder, or a hub id to download.")],
    actor: Actor,
    retain: Annotated[Path | None, typer.Option(help="Folder of *.txt that the model must keep (anchor).")] = None,
    kept: Annotated[Path | None, typer.Option(help="Folder of *.txt works to keep; only ever measured.")] = None,
    heldout: Annotated[Path | None, typer.Option(help="Folder of *.txt that the model never saw.")] = None,
) -> None:
    """Start a lineage: version v0 is the untouched model.

    Example: takedown -w ws init --model ./llama --retain ./retain --heldout ./heldout
    """
    quiet_libraries()
    from pipeline.lineage import start_lineage

    references = {"retain": retain, "kept": kept, "heldout": heldout}
    workspace = start_lineage(context.obj, model, references, actor)
    manifest = VersionStore(workspace.versions).manifest(0)
    say(f"Started {workspace.root}\nv0  {manifest.root}\nNext: takedown -w {context.obj} run BATCH")


@verbs.command()
def run(
    context: typer.Context,
    actor: Actor,
    batch: Annotated[Path | None, typer.Argument(help="A batch to take in and work on now.")] = None,
    now: Annotated[bool, typer.Option("--now", help="Urgent: wait for a running step, go before others.")] = False,
    as_json: Json = False,
) -> None:
    """One step: for a batch now, or for all that waits and lies in the inbox.

    What else waits stays in the queue. Where another process is writing, exit 3; with --now wait for it. A file in the
    inbox that is no valid batch is set aside into inbox/rejected, with the reason beside it: exit 2, all others are
    worked on.

    Example: takedown -w ws run 2026-11-acme.json --now
    """
    workspace = opened(context)
    workspace.settings()  # a mistake in takedown.toml is told before anything is taken in
    # Until the step ends: the write lock is free while Prefect starts, and nobody else is to take this batch meanwhile.
    with standing_first(workspace) if now else nullcontext():
        requests, delivery = take_in_now(workspace, batch, actor, now)
        show_delivery(delivery)
        entries = read_entries(workspace)
        held = batch is None and undecided(workspace, entries)  # the step shows it, or finishes it
        if requests == [] or not (held or any(s.to_do for s in request_states(entries).values())):
            idle = "Nothing waits." if batch is None else ANSWERED
            show_json({"outcome": "idle"}) if as_json else say(idle)
        else:
            run_step(workspace, requests, actor, as_json, now)
    if delivery.rejected:
        raise typer.Exit(2)


def take_in_now(workspace: Workspace, batch: Path | None, actor: str, now: bool) -> tuple[list[str] | None, Delivery]:
    """Take a batch in, or what lies in the inbox, and meet another writer, before Prefect takes its time to start.

    Returns:
        The requests to work on, None for all that wait; and what came of the inbox.
    """
    from pipeline.dropfolder import Delivery, take_inbox
    from pipeline.submit import submit_or_resume

    with bars(err, "taking in"), writing_in_turn(workspace, LONGEST_WAIT_S if now else 0.0, urgent=now):
        if batch is not None:
            return submit_or_resume(workspace, batch, actor), Delivery()
        return None, take_inbox(workspace, actor)


def show_delivery(delivery: Delivery) -> None:
    """Say what of the drop folder was not taken in."""
    for file in delivery.rejected:
        reasons = "\n  ".join(map(str, file.problems))
        err.print(Text(plain_lines(f"takedown: inbox/rejected/{file.name}: set aside\n  {reasons}")), soft_wrap=True)
    for name in delivery.arriving:
        err.print(Text(plain_lines(f"takedown: inbox/{name}: is still being written; the next run takes it")))


def run_step(workspace: Workspace, requests: list[str] | None, actor: str, as_json: bool, now: bool) -> None:
    """Run the flow and show what came of it.

    Raises:
        typer.Exit: With 1, when the gate refused.
    """
    from flows.server import some_server

    quiet_libraries()
    with bars(err, "starting Prefect"), server_needed():
        some_server(workspace.root)
        from flows.liveness import reconcile
        from flows.takedown import takedown

        reconcile(workspace.root)
        publication = takedown(str(workspace.root), requests, actor, urgent=now)
    if publication is None:  # another process answered them in the meantime
        idle = "Nothing waits." if requests is None else ANSWERED
        show_json({"outcome": "idle"}) if as_json else say(idle)
        return
    show_outcome(workspace, publication, as_json)


@verbs.command()
def reinstate(
    context: typer.Context,
    requests: Annotated[list[str], typer.Argument(help="Countered or withdrawn requests, put back in one version.")],
    reason: Reason,
    actor: Actor,
    as_json: Json = False,
) -> None:
    """Put the text of countered or withdrawn requests back: a new version without the vectors of their steps.

    What the same steps took out for others stays out: it is measured, worked on again where needed, and decided on by
    the gate like any other step. Exit 1 where the gate refuses. Interrupted, the same command continues.

    Example: takedown -w ws reinstate TD-1 --reason "licence confirmed"
    """
    workspace = opened(context)
    workspace.settings()
    requests = sorted(set(requests))
    with writing(workspace):  # what speaks against it is told before Prefect takes its time to start
        entries = read_entries(workspace)
        if unfinished(workspace, entries, requests) is None:
            check_reinstatement(workspace, entries, requests, reason)
    from flows.server import some_server

    quiet_libraries()
    with bars(err, "starting Prefect"), server_needed():
        some_server(workspace.root)
        from flows.liveness import reconcile
        from flows.takedown import reinstate as flow

        reconcile(workspace.root)
        publication = flow(str(workspace.root), requests, actor, reason)
    if publication is None:
        listed = ", ".join(requests)
        current = current_version(read_entries(workspace))
        show_json({"outcome": "on record"}) if as_json else say(
            f"{listed}: on record as reinstated. v{current} was not made without it, so no new version was needed."
        )
        return
    show_outcome(workspace, publication, as_json)


def show_outcome(workspace: Workspace, publication: Publication, as_json: bool) -> None:
    """Show what became of a run.

    Raises:
        typer.Exit: With 1, when the gate refused.
    """
    if publication.outcome == AWAITING:
        (found,) = (w for w in waiting(workspace, read_entries(workspace)) if w.run_id == publication.run_id)
        show_json({"run": publication.run_id, **publication.model_dump()}) if as_json else show_waiting(found)
        return
    view = step_view(workspace, publication.run_id, read_entries(workspace))
    if as_json:
        show_json({"run": publication.run_id, **publication.model_dump(), "step": view})
    else:
        show_step(workspace, view)
    if publication.outcome == "refused":
        raise typer.Exit(1)


def show_step(workspace: Workspace, view: Any) -> None:
    """A step's outcome: one row per text, then the verdict."""
    states = request_states(read_entries(workspace))
    decisions = {d.request_id: d for d in view.dedupe.decisions}
    rows = []
    for found in view.screen.requests:
        memorised = f"{len(found.memorised)}/{found.passages}"
        if found.request_id not in decisions:  # out already, and planned to be worked on again beside the others
            answer = "worked on again" if found.request_id in view.reworks else "nothing to do"
            rows.append((found.request_id, answer, "", "", memorised, f"{found.exact_memorisation:.3f}"))
            continue
        decision = decisions[found.request_id]
        other = decision.evidence[0].request_id if decision.evidence and decision.verdict != "fresh" else ""
        rows.append((found.request_id, state_words(states[found.request_id]), other, f"{decision.covered:.2f}",
                     memorised, f"{found.exact_memorisation:.3f}"))  # fmt: skip
    columns = ("request", "answer", "like", "covered", "memorised passages", "EM before")
    out.print(table(f"{view.run_id}: requests", columns, rows))
    show_overlaps(view.dedupe.decisions)
    if view.evaluation:
        out.print(score_table(view.evaluation, {name: state_words(s) for name, s in states.items()}))
    if again := [name for vector in view.vectors for name in vector.again]:
        say(f"Had come back above the target, and was pushed down again with them: {', '.join(again)}.")
    for reason in view.verdict.reasons if view.verdict else ():
        say(f"Refused: {reason}")
    for sentence in view.verdict.unchecked if view.verdict else ():
        say(f"Not checked: {sentence}")
    if view.version is not None:
        manifest = VersionStore(workspace.versions).manifest(view.version)
        say(f"Published v{view.version}  {manifest.root}")
        if view.left_out:
            say(f"Left out: what {', '.join(f'v{step}' for step in view.left_out)} changed.")
        total = manifest.report.get("total")
        say(f"Changed {manifest.report['changed']:,} " + (f"of {total:,} target weights." if total else "weights."))
        say(storage_line(workspace, read_entries(workspace)))
    elif view.verdict is None:
        say(f"No new version was needed; v{view.parent} stays current.")
    else:
        what = "nothing was put back" if view.left_out else "the requests keep waiting"
        say(f"v{view.parent} stays current; {what}. The same again would give the same: change takedown.toml or a")
        say("reference text, or submit further requests, and run again.")
