"""What is done to the texts themselves: `takedown rekey`, `erase`, `guard`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.terminal import Actor, Json, Reason, checked_entries, megabytes, opened, outside, say, show_json, state_words
from pipeline.bloom import DEFAULT_FPR, DEFAULT_LETTERS
from pipeline.display import plain
from pipeline.erase import erase as destroy
from pipeline.errors import UsageError
from pipeline.rekey import rekey as change_key

verbs = typer.Typer(rich_markup_mode=None)
guarding = typer.Typer(
    rich_markup_mode=None, no_args_is_help=True,
    help="Block verbatim output of what waits and of what was taken out, where the model is served.",
)  # fmt: skip
verbs.add_typer(guarding, name="guard")

SHOWN = 20
"""Places of a text that are listed; ``--json`` has all."""


@verbs.command()
def rekey(context: typer.Context, actor: Actor, as_json: Json = False) -> None:
    """Put a new master key in the place of the vault's, and encrypt what an earlier release left readable.

    The key lies in keys/vault.key, or where vault.key_file says: keep a copy elsewhere, for without it every text is
    lost. A key in TAKEDOWN_VAULT_KEY goes before the file; set the old one as TAKEDOWN_VAULT_KEY_OLD meanwhile.
    Interrupted, the same command continues.

    Example: takedown -w ws rekey
    """
    done = change_key(opened(context), actor)
    if as_json:
        show_json(done)
        return
    say(f"The master key is {done.master} now: {done.rewrapped:,} texts changed over, the old key is destroyed.")
    if done.sealed:
        say(f"Encrypted, and readable until now: {done.sealed:,} texts. Backups may hold them readable still.")
    say("Keep a copy of the new key elsewhere: without it every text in the vault is lost.")


@verbs.command()
def erase(context: typer.Context, request: str, reason: Reason, actor: Actor, as_json: Json = False) -> None:
    """Destroy the text and contact of a request for ever; ledger, measurements and certificates still prove what was
    done.

    New versions cannot be measured against the text any more, and it cannot be put back. A request that waits is
    withdrawn first. Exit 1 while it is on legal hold. Weights of old versions may recite the text still: see purge.

    Example: takedown -w ws erase TD-1 --reason "asked by the sender, case 7/26"
    """
    state = destroy(opened(context), request, actor, reason)
    if as_json:
        show_json(state)
        return
    say(f"{state.request_id}: {state_words(state)}. Backups may hold it still; `takedown rekey` and the end of the old "
        "master key make them useless.")  # fmt: skip
    say("Not reached, for it lies outside the workspace: guards, copies of the index in Redis, exported registers. "
        "Make them again, or delete them.")  # fmt: skip


@guarding.command("export")
def export_guard(
    context: typer.Context,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the two files; a guard in it is replaced.")],
    letters: Annotated[
        int, typer.Option("--letters", min=8, help="Letters of a run that must not be written.")
    ] = DEFAULT_LETTERS,
    fpr: Annotated[
        float, typer.Option("--fpr", min=1e-12, max=0.5, help="Probability that a run is taken for one of them.")
    ] = DEFAULT_FPR,
    as_json: Json = False,
) -> None:
    """Write a guard over everything that waits and everything that was taken out, for the server of the model.

    No text can be listed from the files, but whoever has them can test guesses: keep them with the server. Export anew
    after each batch. The server needs the modules pipeline.guard, pipeline.bloom and pipeline.errors:
    generate(logits_processor=[Guard.load(DIR).processor(Spelling.of_letters(tokenizer))])

    Example: takedown -w ws guard export --out ./guard
    """
    from pipeline.guard_export import export_guard as write_guard  # loads torch

    workspace = opened(context)
    made = write_guard(workspace, checked_entries(workspace), outside(workspace, folder), letters, fpr)
    if as_json:
        show_json(made)
        return
    say(f"Wrote {plain(str(folder), 2000)}: {made.requests:,} texts, {made.runs:,} runs of {made.letters} letters, "
        f"{megabytes(made.nbytes)}; a run is taken for one of them with probability {made.fpr:g}.")  # fmt: skip
    if made.short:
        say(f"Shorter than a run, so not guarded: {', '.join(map(plain, made.short))}.")
    if made.erased:
        say(f"Erased, so not guarded: {', '.join(map(plain, made.erased))}.")


@guarding.command("check")
def check_guard(
    file: Annotated[Path, typer.Argument(help="A text, UTF-8.")],
    folder: Annotated[Path, typer.Option("--dir", help="Folder of the guard.")],
    as_json: Json = False,
) -> None:
    """Find what a guard would have blocked in a text. Exit 1 if there is any. Needs no workspace.

    Example: takedown guard check answer.txt --dir ./guard
    """
    from pipeline.guard import Guard  # loads torch
    from pipeline.guard_export import guarded_ranges

    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{plain(str(file), 2000)}: is not UTF-8 (byte {error.start}). Save it as UTF-8.") from None
    guard = Guard.load(folder)
    ranges = guarded_ranges(guard, text)
    if as_json:
        show_json({"letters": guard.n, "ranges": ranges})
    elif ranges:
        say(f"Blocked, of {guard.n} letters or more: {len(ranges):,} by characters:")
        for start, end in ranges[:SHOWN]:
            say(f"  {start:,}-{end:,}")
        if len(ranges) > SHOWN:
            say(f"  and {len(ranges) - SHOWN:,} more; --json has all.")
    else:
        say(f"No run of {guard.n} letters is blocked.")
    if ranges:
        raise typer.Exit(1)
