"""The ``takedown`` command: verbs a paralegal understands, JSON for machines, exit codes for schedulers.

Exit 0 fine · 1 the evidence or the gate says no · 2 wrong use · 3 interrupted, the same command resumes it.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

import pipeline
from flows.approving import approving, show_waiting
from flows.benchmarking import benchmarking
from flows.doctoring import doctoring
from flows.keeping import keeping
from flows.overlaps import show_overlaps
from flows.progress import bars
from flows.reading import reading, state_words, storage_line
from flows.scanning import scanning
from flows.scores import score_table
from flows.serving import serving
from flows.sharing import sharing
from flows.terminal import (
    Actor,
    Json,
    Reason,
    err,
    megabytes,
    number_of,
    opened,
    out,
    quiet_libraries,
    say,
    show_json,
    table,
)
from pipeline.approval import waiting
from pipeline.display import plain
from pipeline.errors import TakedownError
from pipeline.history import read_entries, step_view
from pipeline.patience import LONGEST_WAIT_S, standing_first, writing_in_turn
from pipeline.records import Publication
from pipeline.reinstate import check_reinstatement, unfinished
from pipeline.requests import Kind, note
from pipeline.runs import AWAITING, undecided
from pipeline.states import current_version, request_states
from pipeline.versions import VersionStore
from pipeline.workspace import Workspace, writing

if TYPE_CHECKING:
    from pipeline.dropfolder import Delivery

app = typer.Typer(
    name="takedown", no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, rich_markup_mode=None,
    help="Take copyrighted text out of a language model, one takedown after another, with proof.\n\n"
    "Example: takedown -w ws init --model ./my-model --retain ./retain; takedown -w ws run batch.json; "
    "takedown -w ws checkout v1 ./served",
)  # fmt: skip

INTERRUPTED_BY_USER = 130
"""Typer's exit code for Ctrl-C, as shells have it."""


@app.callback(invoke_without_command=True)
def choose(
    context: typer.Context,
    workspace: Annotated[
        Path, typer.Option("--workspace", "-w", envvar="TAKEDOWN_WORKSPACE", help="Workspace folder.")
    ] = Path(),
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Remember the workspace for the verb."""
    if version:
        out.print(f"takedown-pipeline {pipeline.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        out.print(context.get_help(), markup=False)
        raise typer.Exit(2)
    context.obj = workspace


app.add_typer(reading)
app.add_typer(doctoring)
app.add_typer(scanning)
app.add_typer(keeping)
app.add_typer(serving)
app.add_typer(approving)
app.add_typer(sharing)
app.add_typer(benchmarking)


# --- writing verbs ----------------------------------------------------------------------------------------


@app.command()
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


@app.command()
def check(context: typer.Context, batch: Path, as_json: Json = False) -> None:
    """Validate a batch without touching anything.

    Example: takedown -w ws check 2026-11-acme.json
    """
    from pipeline.submit import check_batch

    found = check_batch(opened(context), batch)
    if as_json:
        show_json({"batch_id": found.batch_id, "requests": [r.request_id for r in found.requests]})
        return
    rows = [(r.request_id, r.title, r.rights_holder, f"{len(r.text.split()):,} words") for r in found.requests]
    out.print(table(f"Batch {found.batch_id}: fine", ("request", "title", "rights holder", "length"), rows))


@app.command()
def submit(context: typer.Context, batch: Path, actor: Actor, as_json: Json = False) -> None:
    """Take a batch in for the next run; its texts go into the vault.

    Example: takedown -w ws submit 2026-11-acme.json
    """
    from pipeline.submit import submit as take_in

    found = take_in(opened(context), batch, actor)
    if as_json:
        show_json({"batch_id": found.batch_id, "requests": [r.request_id for r in found.requests]})
        return
    say(f"Took in {len(found.requests)} requests of {found.batch_id}. Next: takedown -w {context.obj} run")


@app.command()
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
            answered = "Every request of this batch is answered; see takedown status."
            idle = "Nothing waits." if batch is None else answered
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
    from flows.environment import prepare

    prepare(workspace.root)
    quiet_libraries()
    with bars(err, "starting Prefect"):
        from flows.liveness import reconcile
        from flows.takedown import takedown

        reconcile(workspace.root)
        publication = takedown(str(workspace.root), requests, actor, urgent=now)
    if publication is None:  # another process answered them in the meantime
        show_json({"outcome": "idle"}) if as_json else say("Nothing waits.")
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
        say(f"v{view.parent} stays current; {what}. Change takedown.toml and run again.")


# --- versions ---------------------------------------------------------------------------------------------


@app.command()
def rollback(
    context: typer.Context,
    version: str,
    reason: Reason,
    actor: Actor,
    override: Annotated[bool, typer.Option("--override", help="Do it though removed text comes back.")] = False,
    as_json: Json = False,
) -> None:
    """Make another version the current one; nothing is removed. Exit 1 where it would bring removed text back, or take
    reinstated text out again.

    With --override it is done nevertheless, on record, and the requests concerned wait for the next run again.

    Example: takedown -w ws rollback v3 --reason "v4 answers slowly"
    """
    from pipeline.rollback import roll_back

    workspace = opened(context)
    with bars(err, "checking"):
        done = roll_back(workspace, number_of(version), actor, reason, override)
    if as_json:
        show_json(done)
        return
    say(f"v{done.version} is current now; it was v{done.left}.")
    if done.brought_back:
        say(f"It holds again what was taken out for {', '.join(done.brought_back)}; the next run works on them.")
    if done.out_again:
        say(f"It excludes again, as measured before: {', '.join(done.out_again)}.")
    if done.taken_again:
        say(f"It does not hold what was put back for {', '.join(done.taken_again)}; `reinstate` makes a new version.")
    if done.put_back:
        say(f"It puts back again: {', '.join(done.put_back)}.")
    if done.reopened:
        say(f"Answered as not memorised on another version, and waiting again: {', '.join(done.reopened)}.")


@app.command()
def repack(
    context: typer.Context,
    actor: Actor,
    keyframe_every: Annotated[
        int | None,
        typer.Option("--keyframe-every", help="Every n-th version stays whole; default store.keyframe_every."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Keep versions as deltas against their parents, with a whole one at a set spacing. Changes no version.

    Example: takedown -w ws repack --keyframe-every 16
    """
    from pipeline.upkeep import repack as pack

    workspace = opened(context)
    spacing = keyframe_every if keyframe_every is not None else workspace.settings().store.keyframe_every
    with bars(err, "repack"):
        done = pack(workspace, spacing, actor)
    if as_json:
        show_json(done)
        return
    say(f"{done.made_deltas} weight files became deltas, {done.made_whole} became whole: "
        f"{megabytes(done.bytes_before)} → {megabytes(done.bytes_after)}.")  # fmt: skip
    say(storage_line(workspace, read_entries(workspace)))


@app.command()
def purge(
    context: typer.Context,
    before: Annotated[str, typer.Option("--before", help="First version that stays, e.g. v12.")],
    reason: Reason,
    actor: Actor,
    as_json: Json = False,
) -> None:
    """Destroy the weights of all earlier versions for ever.

    Manifests, signatures and ledger still prove what they were. Exit 1 while a request is on legal hold.

    Example: takedown -w ws purge --before v12 --reason "retention policy 4.2"
    """
    from pipeline.upkeep import purge as destroy

    workspace = opened(context)
    with bars(err, "purge"):
        done = destroy(workspace, number_of(before), actor, reason)
    if as_json:
        show_json(done)
        return
    listed = ", ".join(f"v{number}" for number in done.versions)
    say(f"Destroyed the weights of {listed}: {done.files} files, {megabytes(done.nbytes)}.")
    say(storage_line(workspace, read_entries(workspace)))


# --- requests ---------------------------------------------------------------------------------------------


@app.command()
def hold(context: typer.Context, request: str, reason: Reason, actor: Actor, as_json: Json = False) -> None:
    """Put a request on legal hold: no run works on it, and nothing is purged meanwhile.

    Example: takedown -w ws hold TD-1 --reason "court order 7/26"
    """
    put_on_record(context, "hold", request, actor, reason, as_json)


@app.command()
def release(context: typer.Context, request: str, reason: Reason, actor: Actor, as_json: Json = False) -> None:
    """End a legal hold.

    Example: takedown -w ws release TD-1 --reason "order lifted"
    """
    put_on_record(context, "released", request, actor, reason, as_json)


@app.command()
def withdraw(context: typer.Context, request: str, reason: Reason, actor: Actor, as_json: Json = False) -> None:
    """Record that the sender took a request back. Versions made without its text stay as they are; see reinstate.

    Example: takedown -w ws withdraw TD-1 --reason "retracted by letter"
    """
    put_on_record(context, "withdrawn", request, actor, reason, as_json)


@app.command()
def counter(context: typer.Context, request: str, reason: Reason, actor: Actor, as_json: Json = False) -> None:
    """Record a counter-notice. The text stays out until the request is reinstated.

    Example: takedown -w ws counter TD-1 --reason "licence shown"
    """
    put_on_record(context, "countered", request, actor, reason, as_json)


@app.command()
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
    from flows.environment import prepare

    prepare(workspace.root)
    quiet_libraries()
    with bars(err, "starting Prefect"):
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


def put_on_record(context: typer.Context, kind: Kind, request: str, actor: str, reason: str, as_json: bool) -> None:
    """Record an event of a request and say where it stands now."""
    state = note(opened(context), kind, request, actor, reason)
    show_json(state) if as_json else say(f"{state.request_id}: {state_words(state)}")


def main() -> None:
    """Run the command; turn the product's errors into messages and exit codes."""
    try:
        app()
    except SystemExit as stop:  # Typer exits itself: 0, a verb's own code, 2 for wrong use, 130 for Ctrl-C
        if stop.code != INTERRUPTED_BY_USER:
            raise
        err.print("takedown: interrupted. Nothing acknowledged is lost; the same command continues.")
        sys.exit(3)
    except TakedownError as error:
        err.print(Text(f"takedown: {plain_lines(str(error))}"), soft_wrap=True)
        sys.exit(error.exit_code)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        err.print(Text(f"takedown: {plain_lines(place + (error.strerror or str(error)))}. Check the path and its "
                       "permissions; nothing was published."), soft_wrap=True)  # fmt: skip
        sys.exit(2)


def plain_lines(message: str) -> str:
    """A message with several lines, each made safe for the terminal."""
    return "\n".join(plain(line, 2000) for line in message.splitlines())
