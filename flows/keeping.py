"""What is done to the texts themselves: `takedown rekey`, `takedown erase`."""

from __future__ import annotations

import typer

from flows.reading import state_words
from flows.terminal import Actor, Json, Reason, opened, say, show_json
from pipeline.erase import erase as destroy
from pipeline.rekey import rekey as change_key

keeping = typer.Typer(rich_markup_mode=None)


@keeping.command()
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


@keeping.command()
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
