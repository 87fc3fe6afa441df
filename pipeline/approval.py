"""Approval: what the gate accepted waits, unpublished, until somebody decides; see `pipeline.decide`.

In: a run whose stages are done. Out: an event that it waits, and what there is to look at meanwhile. Never: a process
or a lock that is held while people think, or torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from pipeline.display import plain
from pipeline.errors import StoreDamaged, UsageError
from pipeline.evidence import checks_root
from pipeline.files import digest_json
from pipeline.ledger import Ledger
from pipeline.records import Evaluation, Event, LedgerEntry, MergeReport, Record, Verdict
from pipeline.runlog import report
from pipeline.runs import Run, open_run, outdated, undecided
from pipeline.states import AWAITING, approvals, decisions, questions
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
        asked_before: How many other candidates of this run were asked about, or approved, and are none of this one.
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
    asked_before: int = 0
    root: str
    candidate: str
    evaluation: Evaluation


def hold(workspace_root: str, run_id: str, actor: str, reason: str = "") -> bool:
    """Put on record that a run waits for approval: once, and again where its candidate has become another.

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
        asked, candidate = questions(entries).get(run_id), _candidate(run)
        if asked is not None and _same(asked, candidate):
            return run_id not in approvals(entries)
        # Also where other weights were asked about, or approved: what was lost is computed again, and on another
        # machine to other bytes. Nobody has seen these.
        reason = reason or str(asked.event.data.get("reason", "") if asked is not None else "")
        data = {**candidate, **({"reason": reason} if reason else {})}
        ledger.append(Event(kind=AWAITING, actor=actor, run_id=run_id, version=run.plan.parent, data=data))
        report(run.workspace, run_id, AWAITING, actor=actor, again=asked is not None)
    return True


def _candidate(run: Run) -> dict[str, object]:
    """What is decided on: these weights in these files, with these measurements."""
    merged = run.finished("merge", MergeReport)
    return {
        "root": merged.root,
        "files": digest_json([[file.path, file.digest] for file in merged.files]),
        "checks": checks_root(run.finished("evaluate", Evaluation)),
    }


def _same(entry: LedgerEntry, candidate: Mapping[str, object]) -> bool:
    return all(entry.event.data.get(name) == value for name, value in candidate.items())


def check_candidate(run: Run, entry: LedgerEntry) -> None:
    """The candidate must be the one that an entry asked about.

    Raises:
        StoreDamaged: It is another one, or was measured otherwise.
    """
    if not _same(entry, _candidate(run)):
        raise StoreDamaged(
            f"{run.run_id}: is not what ledger entry {entry.seq} speaks of. Delete the run's folder; `takedown run` "
            "computes it again, and asks about it again where it has become another."
        )


def waiting(workspace: Workspace, entries: Sequence[LedgerEntry]) -> list[Waiting]:
    """The runs that wait for a decision, oldest first; reads only.

    Not one that is computed again, until it is there again: nobody can look at it meanwhile, and it may become another.
    """
    found, approved, asked_about = [], approvals(entries), questions(entries)
    for plan in undecided(workspace, entries):
        if plan.run_id in approved:
            continue  # and killed before it was published: the next run does that
        run, asked = open_run(workspace.root, plan.run_id), asked_about[plan.run_id]
        there = all((run.folder / f"{name}.json").is_file() for name in ("merge", "evaluate", "gate"))
        if not there or not _same(asked, _candidate(run)):
            continue
        found.append(
            Waiting(
                run_id=plan.run_id,
                since=asked.at,
                asked_by=asked.event.actor,
                parent=plan.parent,
                requests=plan.requests,
                reinstates=plan.reinstates,
                reworks=plan.reworks,
                asked_before=sum(e.event.kind == AWAITING and e.event.run_id == plan.run_id for e in entries) - 1,
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
    asked = questions(entries).get(run_id)
    if asked is None:
        raise UsageError(f"{plain(run_id)}: does not wait for approval. `takedown review` lists what does.")
    if decided := decisions(entries).get(run_id):
        entry = approvals(entries).get(run_id, decided)  # what was approved is accepted for whoever asked
        raise UsageError(f"{run_id}: was decided on by {plain(entry.event.actor)} in ledger entry {entry.seq}.")
    run = open_run(workspace_root, run_id)
    if reason := outdated(entries, run.plan):
        raise UsageError(f"{run_id}: {reason}, so it is not decided on any more. The next run starts anew.")
    return run, asked
