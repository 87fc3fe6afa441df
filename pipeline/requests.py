"""What senders and lawyers do to a request outside of runs: holds, withdrawals, counter-notices.

In: a request and a reason. Out: one ledger event. Never: a change of weights; what is out stays out until a version is
made, or made current, that says otherwise.
"""

from __future__ import annotations

from typing import Literal

from pipeline.errors import UsageError
from pipeline.ledger import Ledger
from pipeline.records import Event
from pipeline.states import HOLDS, NEXT, RequestState, request_states
from pipeline.workspace import Workspace, writing

Kind = Literal["hold", "released", "withdrawn", "countered"]


def note(workspace: Workspace, kind: Kind, request_id: str, actor: str, reason: str) -> RequestState:
    """Put an event of a request on record.

    Args:
        workspace: Where.
        kind: ``hold``: nothing is done about it or destroyed; ``released``: that ends; ``withdrawn``: the sender takes
            it back; ``countered``: somebody contests it. Putting a text back is `pipeline.reinstate`.
        request_id: The request.
        actor: Who puts it on record.
        reason: Why, in words that may stay for ever: no names, no text.

    Returns:
        Where the request stands now.

    Raises:
        UsageError: No such request, no reason, or it cannot follow the state that the request is in.
        WorkspaceBusy: Another process is writing.
    """
    if not reason.strip():
        raise UsageError("This needs a reason: it stays on record. Give one with --reason.")
    with writing(workspace), Ledger.open(workspace.ledger) as ledger:
        states = request_states(ledger.entries())
        state = states.get(request_id)
        if state is None:
            raise UsageError(f"{request_id!r}: no such request. `takedown status` lists all.")
        if kind == "hold" and state.erased:
            raise UsageError(f"{request_id}: was erased, so there is nothing left to hold.")
        if kind in HOLDS and state.on_hold == HOLDS[kind]:
            raise UsageError(f"{request_id}: is {'on hold already' if state.on_hold else 'not on hold'}.")
        if kind not in HOLDS and state.state == "reinstated":
            raise UsageError(f"{request_id}: its text was put back. Who claims it anew sends a new request.")
        if kind not in HOLDS and state.state not in NEXT[kind]:
            raise UsageError(f"{request_id}: is {state.state}, so it cannot be {kind}.")
        ledger.append(Event(kind=kind, actor=actor, request_id=request_id, data={"reason": reason}))
        return request_states(ledger.entries())[request_id]
