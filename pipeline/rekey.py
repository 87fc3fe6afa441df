"""A new master key for the vault: `takedown rekey`.

In: a workspace. Out: the same texts under a new master key, and a ledger event. Never: a moment at which a text opens
under neither key, a ledger entry before the old key is gone.
"""

from __future__ import annotations

from pipeline.errors import InvalidInput
from pipeline.ledger import Ledger
from pipeline.records import Event, Record
from pipeline.vault import open_vault
from pipeline.workspace import Workspace, writing


class Rekeyed(Record):
    """What a change of the master key did.

    Attributes:
        master: Name of the new master key.
        rewrapped: Requests whose key is wrapped under it now.
        sealed: Requests that a release before encryption had left readable, and that are sealed now.
    """

    master: str
    rewrapped: int
    sealed: int


def rekey(workspace: Workspace, actor: str) -> Rekeyed:
    """Put a new master key in the place of the old one, which is destroyed. Interrupted, the same command goes on.

    The new key is made at random, or taken from ``TAKEDOWN_VAULT_KEY``; then the old one is expected in
    ``TAKEDOWN_VAULT_KEY_OLD`` or in the key file. Backups of the vault open under the key of their day only: whoever
    keeps backups keeps that key as long, or lets both go.

    Raises:
        StoreDamaged: A request's key does not open; all are named, and nothing was changed.
        VaultLocked: The old master key is missing; likewise.
        UsageError: The new key is the old one.
        NoSpace: The disk is full; what was done stays done, and everything opens.
        WorkspaceBusy: Another process is writing.
    """
    with writing(workspace), Ledger.open(workspace.ledger) as ledger:
        vault = open_vault(workspace)
        rewrapped = vault.rewrap()
        done = Rekeyed(master=vault.master(), rewrapped=rewrapped, sealed=vault.seal_plain())
        ledger.append(Event(kind="rekeyed", actor=actor, data=done.model_dump()))
    return done


def rekey_notes(workspace: Workspace) -> tuple[str, ...]:
    """That a change of the master key was begun and not ended, which is no break: everything opens."""
    try:
        rotating = open_vault(workspace).rotating()
    except InvalidInput:
        return ()  # `verify` has a break for it
    if not rotating:
        return ()
    return ("a change of the vault's master key was begun and not ended; run `takedown rekey` again.",)
