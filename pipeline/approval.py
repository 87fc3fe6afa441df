"""Approval: what the gate accepted waits, unpublished, until somebody decides; see `pipeline.decide`.

In: a run whose stages are done. Out: an event that it waits, and what there is to look at meanwhile. Never: a process
or a lock that is held while people think, or torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from pipeline.display import plain
from pipeline.errors import StoreDamaged, UsageError
from pipeline.evidence import checks_root
from pipeline.ledger import Ledger
from pipeline.records import Evaluation, Event, LedgerEntry, MergeReport, Record, Verdict
from pipeline.runlog import report
from pipeline.runs import DAMAGED_RUN, Run, open_run, outdated, undecided
from pipeline.states import AWAITING, decisions
from pipeline.workspace import Workspace, open_workspace


class Waiting(Record):
    """A run that waits for a decision.

    Attributes:
        run_id: Its id.
        since: When it was put on record.
        asked_by: Who ran it.
        parent: Version that it starts from.
        requests: What it works on.
        reinstates: Whose text it puts back.
        reworks: Whose text was out already and is worked on again.
        root: Tensor root of its candidate.
        candidate: Its model folder; `from_pretrained` loads it.
        evaluation: What was measured.
    """

    run_id: str
    since: datetime
    asked_by: str
    parent: int
    requests: tuple[str, ...]
    reinstates: tuple[str, ...]
    reworks: tuple[str, ...] = ()
    root: str
    candidate: str
    evaluation: Evaluation


def hold(workspace_root: str, run_id: str, actor: str, reason: str = "") -> bool:
    """Put on record that a run waits for approval, once.

    Args:
        workspace_root: Folder of the workspace, locked for writing.
        run_id: The run; its stages are done.
        actor: Who asked for it.
        reason: Why texts are put back; only for a reinstatement.

    Returns:
        Whether it waits. Not where settings ask for none, where there is nothing to publish, where the gate refused, or
        where it was decided on.
    """
    run = open_run(workspace_root, run_id)
    if run.settings.approval != "required" or not (run.folder / "gate.json").is_file():
        return False
    if not run.finished("gate", Verdict).accepted:
        return False
    with Ledger.open(run.workspace.ledger) as ledger:
        entries = ledger.entries()
        if run_id in decisions(entries):
            return False
        if (approved := event_of(entries, run_id, "approved")) is not None:
            check_candidate(run, approved)
            return False
        if not event_of(entries, run_id, AWAITING):
            data = {**_candidate(run), **({"reason": reason} if reason else {})}
            ledger.append(Event(kind=AWAITING, actor=actor, run_id=run_id, version=run.plan.parent, data=data))
            report(run.workspace, run_id, AWAITING, actor=actor)
    return True


def _candidate(run: Run) -> dict[str, object]:
    """What is decided on: these weights, with these measurements."""
    return {
        "root": run.finished("merge", MergeReport).root,
        "checks": checks_root(run.finished("evaluate", Evaluation)),
    }


def check_candidate(run: Run, entry: LedgerEntry) -> None:
    """The candidate must be the one that an entry asked about or approved.

    Raises:
        StoreDamaged: It is another one, or was measured otherwise.
    """
    if any(entry.event.data.get(name) != value for name, value in _candidate(run).items()):
        raise StoreDamaged(f"{run.run_id}: is not what ledger entry {entry.seq} speaks of. {DAMAGED_RUN}")


def event_of(entries: Sequence[LedgerEntry], run_id: str, kind: str) -> LedgerEntry | None:
    """The first event of this kind of a run as a whole."""
    found = (e for e in entries if e.event.kind == kind and e.event.run_id == run_id and e.event.request_id is None)
    return next(found, None)


def waiting(workspace: Workspace, entries: Sequence[LedgerEntry]) -> list[Waiting]:
    """The runs that wait for a decision, oldest first; reads only."""
    found = []
    for plan in undecided(workspace, entries):
        run, asked = open_run(workspace.root, plan.run_id), event_of(entries, plan.run_id, AWAITING)
        if asked is None or event_of(entries, plan.run_id, "approved"):
            continue  # approved, and killed before it was published: the next run does that
        found.append(
            Waiting(
                run_id=plan.run_id,
                since=asked.at,
                asked_by=asked.event.actor,
                parent=plan.parent,
                requests=plan.requests,
                reinstates=plan.reinstates,
                reworks=plan.reworks,
                root=str(asked.event.data["root"]),
                candidate=str(run.folder / "candidate"),
                evaluation=run.finished("evaluate", Evaluation),
            )
        )
    return found


def waiting_run(workspace_root: str, run_id: str) -> tuple[Run, LedgerEntry]:
    """A run on which can be decided, and the entry that asked for it.

    Raises:
        UsageError: It does not wait, was decided on, or what it was made from has changed since.
    """
    workspace = open_workspace(Path(workspace_root))
    with Ledger.open(workspace.ledger, read_only=True) as ledger:
        entries = ledger.entries()
    asked = event_of(entries, run_id, AWAITING)
    if asked is None:
        raise UsageError(f"{plain(run_id)}: does not wait for approval. `takedown review` lists what does.")
    if decided := decisions(entries).get(run_id):
        entry = event_of(entries, run_id, "approved") or decided  # what was approved is accepted for whoever asked
        raise UsageError(f"{run_id}: was decided on by {plain(entry.event.actor)} in ledger entry {entry.seq}.")
    run = open_run(workspace_root, run_id)
    if reason := outdated(entries, run.plan):
        raise UsageError(f"{run_id}: {reason}, so it is not decided on any more. The next run starts anew.")
    return run, asked
