"""`takedown share-index`: a copy of the index in Redis, for other programs that ask datasketch.

Exit 0 fine · 2 wrong use · 3 Redis failed; the copy before is still in use.
"""

from __future__ import annotations

from typing import Annotated

import typer

from flows.terminal import Json, err, opened, say, show_json

verbs = typer.Typer(rich_markup_mode=None)


@verbs.command("share-index")
def share(
    context: typer.Context,
    redis: Annotated[
        str, typer.Option("--redis", envvar="TAKEDOWN_REDIS", help="redis://[[user]:password@]host[:port][/db]")
    ],
    name: Annotated[str, typer.Option("--name", help="Entry that points to the copy.")] = "takedown",
    trusted: Annotated[bool, typer.Option("--trusted", help="Only trusted programs can write to this Redis.")] = False,
    as_json: Json = False,
) -> None:
    """Copy the signatures of everything taken down into Redis, for other programs that use datasketch.

    No text: request ids, and sketches of 128 numbers. One index is enough for one machine, whatever its size; this is
    for several that must see each other's takedowns. Give the address in TAKEDOWN_REDIS where it holds a password.

    Example: takedown -w ws share-index --redis redis://10.0.0.5:6379/3 --trusted
    """
    from pipeline.errors import UsageError
    from pipeline.index import DedupeIndex
    from pipeline.sharing import WARNING, share_index
    from pipeline.workspace import writing

    workspace = opened(context)
    if not trusted:
        raise UsageError(f"{WARNING} Say --trusted if that is so.")
    err.print(f"takedown: warning: {WARNING}", soft_wrap=True, markup=False)
    with writing(workspace), DedupeIndex.open(workspace.index) as index:
        made = share_index(index, redis, name)
    show_json(made) if as_json else say(
        f"Copied {made.windows:,} signatures of {made.takedowns:,} takedowns; the entry {made.name!r} names them."
    )
