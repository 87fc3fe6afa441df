"""Destroy a request's text and contact, and keep the proof: `takedown erase`.

In: a request and a reason. Out: two ledger events, and nothing of the request but ids, commitments and measurements.
Never: what waits or is on legal hold, a copy that stays unnamed, an entry that claims what is not done.

What goes: the request's key and record in the vault; the index, which holds fingerprints of it and is built again from
the vault without it (a fingerprint is a plain hash of three words: whoever guesses well could put the text together
again, so it would not be erased); the folders of runs that worked on it, with vectors and masks made from its text; the
page and the register in ``reports/``, which have title and rights holder and are made again on demand, without them.

What that costs, and where it shows: later versions cannot be measured against the text (the gate says so in
``unchecked``, the certificate names the last version that was); it cannot be put back; a copy that is sent later is not
known as a repeat, but looked for in the model like any other text: not memorised, or taken out again. Retain documents
that resembled it in an earlier run stay left out of the anchor by what is on record; new ones cannot be compared.

What stays: ids, keyed commitments (who has the text can still prove that it was this one), measurements, spans of
token numbers. The weights of old versions may still recite the text: that is `takedown purge`. Reports and
certificates that were written elsewhere keep title and rights holder, and never had more.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from pipeline.errors import Refused, UsageError
from pipeline.files import explained_space, fsync_folder, read_whole, remove
from pipeline.ledger import Ledger
from pipeline.records import Event, LedgerEntry
from pipeline.runlog import remove_run
from pipeline.runs import Plan
from pipeline.states import (
    TO_DO,
    RequestState,
    erased_requests,
    request_states,
    unfinished_erasures,
)
from pipeline.vault import open_vault
from pipeline.workspace import Workspace, writing


def erase(workspace: Workspace, request_id: str, actor: str, reason: str) -> RequestState:
    """Destroy a request's text, contact, title and rights holder. Interrupted, the same command continues.

    Args:
        workspace: Where.
        request_id: The request.
        actor: Who does it.
        reason: Why, in words that may stay for ever: no names, no text.

    Returns:
        Where the request stands now.

    Raises:
        UsageError: No reason, no such request, it was erased already, it waits, or a file in the inbox holds it.
        Refused: It is on legal hold.
        NoSpace: The disk is read-only; the same command continues.
        WorkspaceBusy: Another process is writing.
    """
    if not reason.strip():
        raise UsageError("An erasure needs a reason: it stays on record. Give one with --reason.")
    with writing(workspace), Ledger.open(workspace.ledger) as ledger:
        entries = ledger.entries()
        begun = unfinished_erasures(entries)
        if request_id not in begun:
            _require_erasable(workspace, request_id, entries)
            ledger.append(Event(kind="erasing", actor=actor, request_id=request_id, data={"reason": reason}))
        open_vault(workspace).erase(request_id)
        _forget(workspace, request_id)
        ledger.append(Event(kind="erased", actor=actor, request_id=request_id, data={"reason": reason}))
        return request_states(ledger.entries())[request_id]


def erased_notes(entries: Sequence[LedgerEntry]) -> tuple[str, ...]:
    """That texts were erased, which is no break, and what can no longer be shown for it."""
    gone = sorted(erased_requests(entries).keys() - unfinished_erasures(entries).keys())
    if not gone:
        return ()
    return (
        f"erased, so that their texts can neither be checked here nor measured on new versions: {', '.join(gone)}.",
    )


def _require_erasable(workspace: Workspace, request_id: str, entries: Sequence[LedgerEntry]) -> None:
    """Everything that speaks against an erasure."""
    state = request_states(entries).get(request_id)
    if state is None:
        raise UsageError(f"{request_id!r}: no such request. `takedown status` lists all.")
    if state.erased:
        raise UsageError(f"{request_id}: was erased already.")
    if state.on_hold:
        raise Refused(f"{request_id}: is on legal hold. Nothing was destroyed; release it first.")
    problems = []
    if state.state in TO_DO:
        problems.append(
            f"{request_id}: is {state.state}, so a run is still to work on its text. Withdraw it first, or run."
        )
    problems += [
        f"{path}: holds a request of this id, perhaps its text. Remove the file first."
        for path in _batches_with(workspace.inbox, request_id)
    ]
    if problems:
        raise UsageError("\n  ".join(["Nothing was destroyed.", *problems]))


def _batches_with(inbox: Path, request_id: str) -> Iterator[Path]:
    """Batch files anywhere in the inbox that name a request."""
    for path in sorted(p for p in inbox.rglob("*") if p.suffix.lower() == ".json"):
        try:
            tree = json.loads(read_whole(path))
            named = {r.get("request_id") for r in tree["requests"]}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            named = set()  # no batch, so nobody can say what it is
        if request_id in named:
            yield path


def _forget(workspace: Workspace, request_id: str) -> None:
    """Delete what was derived from a request: the index, runs that worked on it, the page and the register."""
    with explained_space(workspace.root):
        if workspace.index.is_dir():
            for path in sorted(workspace.index.iterdir()):
                remove(path)
            fsync_folder(workspace.index)
        for run in sorted(workspace.runs.glob("*")):
            # A folder without a plan is what a killed comparison of texts left (`pipeline.reinstate`). Of one whose
            # plan cannot be read nobody can say what it worked on; a run can be computed again.
            found = _worked_on(run)
            if found is None or request_id in found:
                remove_run(workspace, run)
        _discard(workspace.report_page)
        _discard(workspace.register)
        if (workspace.reference / "measured").is_dir():
            from pipeline.context import drop_recited  # loads torch, which no other verb on the vault needs

            drop_recited(workspace)
        for folder in (workspace.runs, workspace.reports):
            if folder.is_dir():  # an empty folder does not survive every copy of a workspace
                fsync_folder(folder)


def _discard(path: Path) -> None:
    """Delete a file, a folder, or a link; one that is gone is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        remove(path)


def _worked_on(run: Path) -> tuple[str, ...] | None:
    """The requests of a run; None where its plan is not there or cannot be read."""
    try:
        plan = Plan.model_validate_json(read_whole(run / "plan.json"))
    except (OSError, ValidationError):
        return None
    return (*plan.worked_on, *plan.reinstates)
