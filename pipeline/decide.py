"""Decide on a run that waits for approval: publish it, or refuse it.

In: its id and who decides. Out: the event that says so, and then the end of the run. Never: a candidate published that
is not the one that was approved.
"""

from __future__ import annotations

from pipeline import answers
from pipeline.approval import check_candidate, waiting_run
from pipeline.errors import UsageError
from pipeline.ledger import Ledger
from pipeline.records import Event, Publication
from pipeline.states import approvals


def approve(workspace_root: str, run_id: str, actor: str) -> Publication:
    """Approve a run that waits, and publish it. Interrupted, the same call, or the next run, continues.

    Args:
        workspace_root: Folder of the workspace, locked for writing.
        run_id: The run.
        actor: Who approves, for the ledger and the certificate.

    Raises:
        UsageError: It does not wait, or what it was made from has changed since.
        StoreDamaged: The candidate is not the one that was measured.
    """
    run, asked = waiting_run(workspace_root, run_id)
    check_candidate(run, asked)
    with Ledger.open(run.workspace.ledger) as ledger:
        if run_id not in approvals(ledger.entries()):
            data = {name: asked.event.data[name] for name in ("root", "files", "checks")}
            ledger.append(Event(kind="approved", actor=actor, run_id=run_id, version=run.plan.parent, data=data))
    return answers.publish(workspace_root, run_id, asked.event.actor)


def refuse(workspace_root: str, run_id: str, actor: str, reason: str) -> Publication:
    """Refuse a run that waits: nothing is published, and its requests keep waiting.

    Args:
        workspace_root: Folder of the workspace, locked for writing.
        run_id: The run.
        actor: Who refuses, for the ledger.
        reason: Why, in words that may stay for ever: no names, no text.

    Raises:
        UsageError: It does not wait, or there is no reason.
    """
    if not reason.strip():
        raise UsageError("A refusal needs a reason: it stays on record. Give one with --reason.")
    run, _ = waiting_run(workspace_root, run_id)
    with Ledger.open(run.workspace.ledger, read_only=True) as ledger:
        if run_id in approvals(ledger.entries()):
            raise UsageError(f"{run_id}: was approved already. Run `takedown approve` again to publish it.")
    return answers.publish(workspace_root, run_id, actor, refusal=f"Not approved: {reason}")
