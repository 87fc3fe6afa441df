"""The verbs of approval: what waits for it, approve, refuse.

Exit 0 fine, also after a refusal: it was asked for · 2 wrong use · 3 another process is writing.
"""

from __future__ import annotations

from typing import Annotated

import typer

from flows.scores import score_table
from flows.terminal import TIME, Actor, Json, Reason, checked_entries, opened, out, say, show_json
from pipeline.approval import Waiting, waiting
from pipeline.display import plain
from pipeline.workspace import writing

verbs = typer.Typer(rich_markup_mode=None)

RunId = Annotated[str, typer.Argument(metavar="RUN", help="A run that waits, e.g. run-0123456789ab; see `review`.")]


@verbs.command()
def review(context: typer.Context, as_json: Json = False) -> None:
    """What waits for approval: what it works on, what was measured, and where its candidate lies.

    Example: takedown -w ws review
    """
    workspace = opened(context)
    found = waiting(workspace, checked_entries(workspace))
    if as_json:
        show_json(found)
        return
    for run in found:
        show_waiting(run)
    if not found:
        say("Nothing waits for approval.")


def show_waiting(run: Waiting) -> None:
    """A run that waits."""
    asked = f"since {run.since.strftime(TIME)}, asked for by {plain(run.asked_by)}"
    say(f"{run.run_id} waits for approval {asked}")
    what = f"puts back {', '.join(run.reinstates)}" if run.reinstates else f"takes out {', '.join(run.requests)}"
    again = f", works again on {', '.join(run.reworks)}" if run.reworks else ""
    say(f"  {what}{again}, from v{run.parent}")
    if run.asked_before:
        say("  computed again, to other weights or measurements than were asked about or approved before")
    say(f"  candidate {run.root}\n  in {run.candidate}")
    out.print(score_table(run.evaluation, {}))
    say(f"Next: takedown approve {run.run_id}, or takedown refuse {run.run_id} --reason …")


@verbs.command()
def approve(context: typer.Context, run: RunId, actor: Actor, as_json: Json = False) -> None:
    """Approve a run that waits; its candidate is published. Interrupted, the same command continues.

    Example: takedown -w ws approve run-0123456789ab --actor counsel
    """
    from pipeline import decide

    workspace = opened(context)
    with writing(workspace):
        done = decide.approve(str(workspace.root), run, actor)
    show_json(done) if as_json else say(f"{run}: approved by {plain(actor)}; published v{done.version}.")


@verbs.command()
def refuse(context: typer.Context, run: RunId, reason: Reason, actor: Actor, as_json: Json = False) -> None:
    """Refuse a run that waits; nothing is published, and its requests keep waiting.

    Example: takedown -w ws refuse run-0123456789ab --reason "kept works lose too much" --actor counsel
    """
    from pipeline import decide

    workspace = opened(context)
    with writing(workspace):
        done = decide.refuse(str(workspace.root), run, actor, reason)
    show_json(done) if as_json else say(f"{run}: refused by {plain(actor)}; the version in force stays.")
