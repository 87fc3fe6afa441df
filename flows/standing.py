"""Where every request stands, and the ledger: `takedown status` and `log`.

Asked most often, by people and by monitoring, so that they load only what they need. They write nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Annotated

import typer

from flows.deadlines import SHOWN, settings_if_readable, settings_with_clocks, show_deadlines, span, told_present
from flows.terminal import TIME, Json, checked_entries, opened, out, say, show_json, show_table, state_words, table
from pipeline.clocks import Standing, standing
from pipeline.display import plain, plural
from pipeline.records import LedgerEntry
from pipeline.states import AWAITING, TAKEN_OUT, RequestState, current_version, let_go_and_out, sound
from pipeline.workspace import Workspace

verbs = typer.Typer(rich_markup_mode=None)


@verbs.command()
def status(
    context: typer.Context,
    fail_overdue: Annotated[
        bool, typer.Option("--fail-overdue", help="Exit 1 where a deadline has passed; for monitoring.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Requests and their state, what waits and for how long, and what must be done by when.

    Deadlines are set in takedown.toml under [deadlines]; what is overdue comes first.

    Example: takedown -w ws status; takedown -w ws status --fail-overdue --json
    """
    workspace = opened(context)
    entries = checked_entries(workspace)
    current = current_version(entries)
    settings = settings_with_clocks(workspace) if fail_overdue else settings_if_readable(workspace)
    now = told_present(entries)
    found = standing(entries, settings, now)
    states = sound(found.states, found.faults)
    held = held_runs(workspace, entries)
    if as_json:
        counts = Counter(s.state for s in states.values())
        queue = [name for name, s in states.items() if s.to_do]
        show_json({"current": current, "requests": list(states.values()), "undecided": held, "at": now.isoformat(),
                   "counts": dict(counts), "queue": queue, "oldest_waiting": found.oldest,
                   "deadlines": list(found.deadlines), "postdated": found.postdated})  # fmt: skip
    else:
        show_status(states, current, found, now, let_go_and_out(entries, states))
        for run_id in held:
            say(f"{run_id} waits for approval; see takedown review.")
    if fail_overdue and found.overdue:
        raise typer.Exit(1)


def held_runs(workspace: Workspace, entries: Sequence[LedgerEntry]) -> list[str]:
    """Runs that wait for approval; what reads their records is loaded only where one ever did."""
    if not any(e.event.kind == AWAITING for e in entries):
        return []
    from pipeline.approval import waiting

    return [run.run_id for run in waiting(workspace, entries)]


def show_status(
    states: Mapping[str, RequestState], current: int, found: Standing, now: datetime, still_out: Collection[str]
) -> None:
    """The version in force, counts, deadlines, and requests: those to be done first, then the newest."""
    say(f"Current version: v{current}")
    if states:
        counts = Counter(s.state for s in states.values()).most_common()
        on_hold = sum(s.on_hold for s in states.values())
        held = f"; {on_hold:,} on hold" if on_hold else ""
        say(f"{plural(len(states), 'request')}: {', '.join(f'{count:,} {state}' for state, count in counts)}{held}")
    show_deadlines(found, now)
    queue = [s for s in states.values() if s.to_do]
    others = [s for s in states.values() if not s.to_do]
    listed = list(states.values()) if len(states) <= SHOWN else [*queue, *reversed(others)][:SHOWN]
    rows = [
        (
            s.request_id,
            state_words(s),
            s.batch_id,
            s.received_at.strftime(TIME),
            f"v{s.version}" if s.state in TAKEN_OUT or s.request_id in still_out else "",
        )
        for s in listed
    ]
    out.print(table("Requests", ("request", "state", "batch", "received", "excluded since"), rows))
    if len(listed) < len(states):
        say(f"and {len(states) - len(listed):,} more; --json has all.")
    if found.oldest is None:
        say("Nothing waits.")
        return
    oldest = f"The oldest, {plain(found.oldest.request_id)}, waits for {span(now - found.oldest.since)}."
    say(f"{len(queue):,} to be worked on. {oldest}")


@verbs.command()
def log(context: typer.Context, as_json: Json = False) -> None:
    """The ledger: every event, oldest first, and the newest signed checkpoint.

    Keep copies of the checkpoint (the file `checkpoint` of the workspace) elsewhere: with one, anybody can tell later
    whether history before it was rewritten.

    Example: takedown -w ws log
    """
    workspace = opened(context)
    entries = checked_entries(workspace)
    if as_json:
        show_json(list(entries))
        return
    rows = [
        (
            e.seq,
            e.at.strftime(TIME),
            e.event.kind,
            e.event.actor,
            e.event.request_id,
            "" if e.event.version is None else f"v{e.event.version}",
            e.event.run_id,
        )
        for e in entries
    ]
    show_table("Ledger", ("#", "at", "event", "actor", "request", "version", "run"), rows)
    say(workspace.checkpoint.read_text(encoding="utf-8").rstrip() if workspace.checkpoint.is_file() else "")
