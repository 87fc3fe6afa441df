"""What comes in and what is said of it later: `takedown check`, `submit`, `hold`, `release`, `withdraw`, `counter`."""

from __future__ import annotations

from pathlib import Path

import typer

from flows.terminal import Actor, Json, Reason, opened, out, say, show_json, state_words, table
from pipeline.requests import Kind, note
from pipeline.submit import check_batch
from pipeline.submit import submit as take_in

verbs = typer.Typer(rich_markup_mode=None)


@verbs.command()
def check(context: typer.Context, batch: Path, as_json: Json = False) -> None:
    """Validate a batch without touching anything.

    Example: takedown -w ws check 2026-11-acme.json
    """
    found = check_batch(opened(context), batch)
    if as_json:
        show_json({"batch_id": found.batch_id, "requests": [r.request_id for r in found.requests]})
        return
    rows = [(r.request_id, r.title, r.rights_holder, f"{len(r.text.split()):,} words") for r in found.requests]
    out.print(table(f"Batch {found.batch_id}: fine", ("request", "title", "rights holder", "length"), rows))


@verbs.command()
def submit(context: typer.Context, batch: Path, actor: Actor, as_json: Json = False) -> None:
    """Take a batch in for the next run; its texts go into the vault.

    Example: takedown -w ws submit 2026-11-acme.json
    """
    found = take_in(opened(context), batch, actor)
    if as_json:
        show_json({"batch_id": found.batch_id, "requests": [r.request_id for r in found.requests]})
        return
    say(f"Took in {len(found.requests)} requests of {found.batch_id}. Next: takedown -w {context.obj} run")


@verbs.command()
def hold(context: typer.Context, request: str, reason: Reason, actor: Actor, as_json: Json = False) -> None:
    """Put a request on legal hold: no run works on it, and nothing is purged meanwhile.

    A text that is out already stays out: it is measured, and where another one's reinstatement brings it back, taken
    out again.

    Example: takedown -w ws hold TD-1 --reason "court order 7/26"
    """
    put_on_record(context, "hold", request, actor, reason, as_json)


@verbs.command()
def release(context: typer.Context, request: str, reason: Reason, actor: Actor, as_json: Json = False) -> None:
    """End a legal hold.

    Example: takedown -w ws release TD-1 --reason "order lifted"
    """
    put_on_record(context, "released", request, actor, reason, as_json)


@verbs.command()
def withdraw(context: typer.Context, request: str, reason: Reason, actor: Actor, as_json: Json = False) -> None:
    """Record that the sender took a request back. Versions made without its text stay as they are; see reinstate.

    Example: takedown -w ws withdraw TD-1 --reason "retracted by letter"
    """
    put_on_record(context, "withdrawn", request, actor, reason, as_json)


@verbs.command()
def counter(context: typer.Context, request: str, reason: Reason, actor: Actor, as_json: Json = False) -> None:
    """Record a counter-notice. The text stays out until the request is reinstated.

    Example: takedown -w ws counter TD-1 --reason "licence shown"
    """
    put_on_record(context, "countered", request, actor, reason, as_json)


def put_on_record(context: typer.Context, kind: Kind, request: str, actor: str, reason: str, as_json: bool) -> None:
    """Record an event of a request and say where it stands now."""
    state = note(opened(context), kind, request, actor, reason)
    show_json(state) if as_json else say(f"{state.request_id}: {state_words(state)}")
