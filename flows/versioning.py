"""Which version is in force and which are kept: `takedown rollback`, `repack`, `purge`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from flows.progress import bars
from flows.terminal import Actor, Json, Reason, err, megabytes, number_of, opened, say, show_json
from pipeline.history import acknowledged_versions
from pipeline.records import LedgerEntry
from pipeline.states import purged_versions
from pipeline.versions import VersionStore
from pipeline.workspace import Workspace, read_entries

verbs = typer.Typer(rich_markup_mode=None)


@verbs.command()
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


@verbs.command()
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


@verbs.command()
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


def storage_line(workspace: Workspace, entries: tuple[LedgerEntry, ...]) -> str:
    """How much the store holds against whole copies of every version."""
    store = VersionStore(workspace.versions)
    gone = purged_versions(entries)
    manifests: list[Any] = [m for m in acknowledged_versions(workspace, entries) if m.version not in gone]
    whole = sum(f.size for m in manifests for f in m.files)
    kept = sum(path.stat().st_size for path in store.objects.files())
    return f"{len(manifests)} versions in {megabytes(kept)}; whole copies would take {megabytes(whole)}."
