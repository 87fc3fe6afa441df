"""Take batches in.

In: a batch file. Out: requests in the vault and ``received`` events. Never: an acknowledged request that could be
lost, a text outside the vault, or torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.display import plain
from pipeline.errors import InvalidInput, UsageError
from pipeline.intake import TakedownBatch, read_batch
from pipeline.ledger import Ledger
from pipeline.records import Event, TakedownRequest
from pipeline.states import known_batches, request_states
from pipeline.vault import open_vault
from pipeline.workspace import Workspace, writing


def check_batch(workspace: Workspace, path: Path) -> TakedownBatch:
    """Validate a batch against the limits and the history; touches nothing.

    Raises:
        InvalidInput: With every problem.
    """
    with Ledger.open(workspace.ledger, read_only=True) as ledger:
        entries = ledger.entries()
    return read_batch(path, workspace.settings().intake, request_states(entries).keys(), known_batches(entries))


def submit(workspace: Workspace, path: Path, actor: str) -> TakedownBatch:
    """Take a batch in: texts into the vault first, then all ``received`` events in one transaction.

    The batch file itself stays where it is; nothing of it but ids and keyed commitments leaves the vault.

    Raises:
        InvalidInput: With every problem; nothing was changed.
        WorkspaceBusy: Another process is writing.
    """
    with writing(workspace):
        return take_in(workspace, path, actor)


def take_in(workspace: Workspace, path: Path, actor: str) -> TakedownBatch:
    """What `submit` does, in a workspace that is locked for writing already.

    Raises:
        InvalidInput: With every problem; nothing was changed.
    """
    batch = check_batch(workspace, path)
    vault = open_vault(workspace)
    vault.create()  # what it has it keeps; a vault of a release before encryption gets its master key here,
    vault.seal_plain()  # and no text stays readable in a vault that is written to
    for request in batch.requests:
        # A record the ledger does not know is the rest of a submit that died; it was never acknowledged.
        vault.put(request, replace=True)
    events = [
        Event(kind="received", actor=actor, request_id=r.request_id, data={
            "batch_id": batch.batch_id, "received_at": batch.received_at.isoformat(),
            "basis": r.basis, "commitment": vault.commitment(r.text), "record": vault.record_commitment(r)})
        for r in batch.requests
    ]  # fmt: skip
    with Ledger.open(workspace.ledger) as ledger:
        ledger.append(*events)
    return batch


def taken_in(workspace: Workspace, path: Path) -> TakedownBatch | None:
    """The batch in a file, when exactly this one was taken in before; None for any other, or for none at all."""
    with Ledger.open(workspace.ledger, read_only=True) as ledger:
        states = request_states(ledger.entries())
    try:
        batch = read_batch(path, workspace.settings().intake)
    except InvalidInput:
        return None
    vault = open_vault(workspace)

    def known(request: TakedownRequest) -> bool:
        state = states.get(request.request_id)
        return (
            state is not None
            and state.batch_id == batch.batch_id
            and state.commitment == vault.commitment(request.text)
        )

    return batch if all(map(known, batch.requests)) else None


def submit_or_resume(workspace: Workspace, path: Path, actor: str) -> list[str]:
    """Take a batch in, or find again the one that an interrupted call of the same command took in.

    Args:
        workspace: The workspace, locked for writing.
        path: The batch file.
        actor: Who asked for it, for the ledger.

    Returns:
        Ids of its requests that wait.

    Raises:
        InvalidInput: With every problem; nothing was changed.
    """
    batch = taken_in(workspace, path) or take_in(workspace, path, actor)
    with Ledger.open(workspace.ledger, read_only=True) as ledger:
        states = request_states(ledger.entries())
    return [r.request_id for r in batch.requests if states[r.request_id].to_do]


def still_waiting(workspace: Workspace, batch_id: str, requests: Sequence[str]) -> list[str]:
    """Those requests of a batch, and of a list, that still wait; what is answered is not asked again.

    Args:
        workspace: Where.
        batch_id: A batch that was taken in; empty for none.
        requests: Ids of requests that were taken in.

    Raises:
        UsageError: The batch or a request is not known.
    """
    with Ledger.open(workspace.ledger, read_only=True) as ledger:
        entries = ledger.entries()
    states = request_states(entries)
    unknown = [plain(name) for name in requests if name not in states]
    if batch_id and batch_id not in known_batches(entries):
        unknown.append(f"batch {plain(batch_id)}")
    if unknown:
        raise UsageError(
            f"Not taken in: {', '.join(unknown)}. Put the batch file into {workspace.inbox}; where it was set aside, "
            "the reason is in the folder rejected/ there."
        )
    return [n for n, s in states.items() if s.to_do and (n in requests or (batch_id and s.batch_id == batch_id))]
