"""What is done to the texts themselves: `takedown rekey`."""

from __future__ import annotations

import typer

from flows.terminal import Actor, Json, opened, say, show_json
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
