"""A run: its plan, its folder, and stages that are computed once.

In: a workspace and the requests to work on. Out: a run whose id is the digest of everything that decides its
outcome, so that the same work after a crash is the same run. Never imports torch.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import PrivateAttr, ValidationError

import pipeline
from pipeline.discreet import discreet
from pipeline.errors import StoreDamaged, UsageError
from pipeline.files import canonical_json, digest_file, digest_json, explained_space, read_json, write_json
from pipeline.ledger import Ledger
from pipeline.preflight import require_step
from pipeline.records import Event, LedgerEntry, Record
from pipeline.references import KINDS
from pipeline.regress import brought_back, workable
from pipeline.runlog import remove_run, report, timed
from pipeline.settings import Settings
from pipeline.states import (
    RELEASED,
    approvals,
    decisions,
    excluded,
    in_force,
    published_versions,
    questions,
    request_states,
    stays_out,
)
from pipeline.vault import open_vault
from pipeline.versions import VersionStore
from pipeline.workspace import Workspace, open_workspace

R = TypeVar("R", bound=Record)

DAMAGED_RUN = "Delete the run's folder; it is computed again."


class Plan(Record):
    """What a run will do; its digest is the run's identity.

    Attributes:
        parent: Version to start from.
        parent_root: Its tensor root.
        since: Ledger entry that put the parent in force: after a rollback the same work is another run.
        requests: Request ids, sorted: those that wait; in a reinstatement all that stay out, because any of them may
            come back with the text that is put back.
        reinstates: Requests whose text is put back, sorted.
        left_out: Versions whose steps are left out for that, newest first.
        reworks: Requests that the parent excludes and that are worked on again beside the others, sorted: a step from
            it that was refused brought them back (`pipeline.regress`).
        commitments: Keyed digest of each text in `worked_on`, in that order.
        references: Keyed digest of the retain, kept and held-out texts: other ones can turn a refusal.
        settings: Resolved settings.
        code: Release that computes.
    """

    parent: int
    parent_root: str
    since: int
    requests: tuple[str, ...]
    reinstates: tuple[str, ...] = ()
    left_out: tuple[int, ...] = ()
    reworks: tuple[str, ...] = ()
    commitments: tuple[str, ...]
    references: str
    settings: Settings
    code: str

    @property
    def worked_on(self) -> tuple[str, ...]:
        """What is screened and worked on: the requests, and what is worked on again."""
        return (*self.requests, *self.reworks)

    _written: str = PrivateAttr("")
    """The id under which it was found, if it was: by a release that knew fewer settings it was written without them."""

    @property
    def run_id(self) -> str:
        return self._written or _run_id(self.as_json())

    def as_json(self) -> dict[str, object]:
        """The plan as it is written: where nothing is worked on again, as releases wrote it that knew of no such."""
        tree = self.model_dump(mode="json")
        if not self.reworks:
            del tree["reworks"]
        return tree


def _run_id(tree: object) -> str:
    return "run-" + digest_json(tree).removeprefix("sha256:")[:12]


@dataclass(frozen=True)
class Run:
    """An opened run."""

    workspace: Workspace
    run_id: str
    plan: Plan

    @property
    def folder(self) -> Path:
        return self.workspace.runs / self.run_id

    @property
    def settings(self) -> Settings:
        return self.plan.settings

    def stage(self, name: str, record: type[R], inputs: Sequence[Record], compute: Callable[[], R]) -> R:
        """The record of a stage: read if it was computed from the same inputs, else computed and written.

        A stage is written whole or not at all, so a killed run picks up after the last finished one.

        Raises:
            Withheld: Something failed, and said so in words of a request.
        """
        key = digest_json([self.run_id, name, [i.model_dump(mode="json") for i in inputs]])
        saved = self._saved(name)
        # One of many requests is a detail of the stage that it is part of.
        level = logging.DEBUG if "/" in name else logging.INFO
        if saved is not None and saved.get("key") == key:
            report(self.workspace, self.run_id, "stage-kept", logging.DEBUG, stage=name)
            return _parse(self.folder / f"{name}.json", record, saved)

        def logged() -> R:  # inside, where an exception still has its own type
            with timed(self.workspace, self.run_id, name, level):
                return compute()

        result = discreet(open_vault(self.workspace), name, logged)
        write_json(self.folder / f"{name}.json", {"key": key, "record": result.model_dump(mode="json")})
        return result

    def finished(self, name: str, record: type[R]) -> R:
        """The record of a stage that must be there.

        Raises:
            StoreDamaged: It is not.
        """
        saved = self._saved(name)
        if saved is None:
            raise StoreDamaged(f"{self.folder / name}.json: is missing. Run `takedown run` again to compute it.")
        return _parse(self.folder / f"{name}.json", record, saved)

    def _saved(self, name: str) -> Mapping[str, object] | None:
        path = self.folder / f"{name}.json"
        saved = read_json(path) if path.is_file() else None
        if saved is not None and not isinstance(saved, dict):
            raise StoreDamaged(f"{path}: is not a stage record. {DAMAGED_RUN}")
        return saved


def _parse(path: Path, record: type[R], saved: Mapping[str, object]) -> R:
    try:
        return record.model_validate_json(canonical_json(saved.get("record")))
    except ValidationError as error:
        raise StoreDamaged(
            f"{path}: does not hold a {record.__name__} ({error.error_count()} faults). {DAMAGED_RUN}"
        ) from error


def plan_run(workspace: Workspace, requests: Sequence[str] | None = None, actor: str = "scheduled") -> Plan | None:
    """Plan a run of some or all of the waiting requests, make its folder and record the plan before anything is done.

    Args:
        workspace: The workspace, locked for writing.
        requests: Ids, all of which must wait; None for everything that waits.
        actor: Who asked for it, for the ledger.

    Returns:
        The plan, or None when nothing waits. For everything that waits no new one while a run, be it a reinstatement,
        waits for approval, which a version of another run would outdate: that one's, or one's that has it already.

    Raises:
        UsageError: A request is unknown, decided or on hold, or another run that has it waits for approval.
    """
    with Ledger.open(workspace.ledger) as ledger:
        entries = ledger.entries()
        held = undecided(workspace, entries)
        if held and requests is None:
            approved = approvals(entries)
            return next((plan for plan in held if plan.run_id in approved), held[0])
        for plan in (plan for plan in held if not plan.reinstates):
            shared = sorted(set(requests or ()) & set(plan.requests))
            if shared and set(requests or ()) != set(plan.requests):
                raise UsageError(
                    f"{plan.run_id}, which waits for approval, works on {', '.join(shared)}. Decide on it first with "
                    "`takedown approve` or `takedown refuse`."
                )
        states = request_states(entries)
        waiting = {i: s for i, s in states.items() if s.to_do}
        chosen = sorted(waiting if requests is None else requests)
        unknown = [i for i in chosen if i not in waiting]
        if unknown:
            raise UsageError(f"Not waiting: {', '.join(unknown)}. `takedown status` lists what waits.")
        if not chosen:
            return None
        again: tuple[str, ...] = ()
        if (limits := workspace.settings().gate).fold_regressed:
            again = brought_back(entries, VersionStore(workspace.versions).objects, limits)
        return begin(workspace, ledger, actor, chosen, reworks=again)


def begin(
    workspace: Workspace,
    ledger: Ledger,
    actor: str,
    requests: Sequence[str],
    reinstates: Sequence[str] = (),
    left_out: Sequence[int] = (),
    reworks: Sequence[str] = (),
) -> Plan:
    """Make the folder of a run and put its plan on record; the same work that was begun before goes on.

    Raises:
        NotEnough: Memory or disk cannot suffice; nothing was changed.
        NoSpace: The disk is full or read-only.
    """
    entries = ledger.entries()
    states = request_states(entries)
    parent, since = in_force(entries)
    plan = Plan(
        parent=parent,
        parent_root=VersionStore(workspace.versions, published_versions(entries)).manifest(parent).root,
        since=since,
        requests=tuple(requests),
        reinstates=tuple(reinstates),
        left_out=tuple(left_out),
        reworks=tuple(reworks),
        commitments=tuple(str(states[i].commitment) for i in (*requests, *reworks)),
        references=references_digest(workspace),
        settings=workspace.settings(),
        code=pipeline.__version__,
    )
    folder = workspace.runs / plan.run_id
    kept = {folder, *_held(workspace, entries)}
    require_step(workspace, entries, parent, folder, bool(left_out), reusable_bytes(workspace, entries, folder))
    with explained_space(folder):
        workspace.runs.mkdir(exist_ok=True)  # an empty folder does not survive every copy of a workspace
        for other in workspace.runs.iterdir():
            if other not in kept:  # decided, its records are evidence in the store; or abandoned for other settings
                remove_run(workspace, other)
        resumed = folder.is_dir()
        folder.mkdir(exist_ok=True)
        write_json(folder / "plan.json", plan.as_json())
    if not any(e.event.kind == "planned" and e.event.run_id == plan.run_id for e in entries):
        ledger.append(_planned(plan, actor))
    report(
        workspace, plan.run_id, "run-resumed" if resumed else "run-begun", actor=actor, parent=plan.parent,
        requests=list(plan.requests), reinstates=list(plan.reinstates),
    )  # fmt: skip
    return plan


def reusable_bytes(workspace: Workspace, entries: Sequence[LedgerEntry], resumed: Path | None = None) -> int:
    """Bytes of the runs that the next one removes or goes on with: all but those that wait for approval.

    Args:
        workspace: Where.
        entries: The ledger's.
        resumed: Folder of the run that is to go on, which may be one of those.
    """
    kept = _held(workspace, entries) - {resumed}
    return sum(_own_bytes(folder) for folder in workspace.runs.glob("*") if folder not in kept)


def _held(workspace: Workspace, entries: Sequence[LedgerEntry]) -> set[Path | None]:
    """Folders of the runs that wait for approval."""
    return {workspace.runs / plan.run_id for plan in undecided(workspace, entries)}


def _own_bytes(folder: Path) -> int:
    """Bytes of a folder that are nowhere else: contents of the store are linked into it."""
    found = (path.lstat() for path in folder.rglob("*") if path.is_file())
    return sum(status.st_size for status in found if status.st_nlink == 1)


def unfinished_runs(workspace: Workspace, entries: Sequence[LedgerEntry]) -> list[str]:
    """Runs that were planned, and neither ended nor wait for approval."""
    known = decisions(entries).keys() | questions(entries).keys()
    folders = sorted(workspace.runs.glob("run-*"))
    return [f.name for f in folders if f.name not in known and (f / "plan.json").is_file()]


def undecided(workspace: Workspace, entries: Sequence[LedgerEntry]) -> list[Plan]:
    """The plans of runs that wait for approval, or have it and are not published yet, oldest first.

    Not those that were overtaken, see `outdated`, or whose folder is gone: they are computed anew.
    """
    decided = decisions(entries)
    asked = [run_id for run_id in questions(entries) if run_id not in decided]
    there = [run_id for run_id in asked if (workspace.runs / run_id / "plan.json").is_file()]
    plans = [open_run(workspace.root, run_id).plan for run_id in there]
    return [plan for plan in plans if outdated(entries, plan) is None]


def outdated(entries: Sequence[LedgerEntry], plan: Plan) -> str | None:
    """Why a plan does not fit what is on record any more; None while it does."""
    current, since = in_force(entries)
    if (current, since) != (plan.parent, plan.since):
        return f"v{current} was put in force since it was planned"
    states = request_states(entries)
    for name in plan.reinstates:
        if states[name].state not in RELEASED or states[name].on_hold:
            return f"{name} is {'on hold' if states[name].on_hold else states[name].state} now"
    if plan.reinstates and stays_out(entries, plan.left_out, plan.reinstates) != tuple(sorted(plan.requests)):
        return "other texts have to stay out now"
    for name in () if plan.reinstates else plan.requests:
        if not states[name].to_do:
            return f"{name} is {'on hold' if states[name].on_hold else states[name].state} now"
    out = excluded(entries, plan.parent) if plan.reworks else {}
    for name in plan.reworks:
        if name not in out or not workable(out[name]):
            return f"{name} is {'on hold' if states[name].on_hold else states[name].state} now"
    return None


def _planned(plan: Plan, actor: str) -> Event:
    """The event that fixes the limits before anything is measured against them."""
    return Event(
        kind="planned",
        actor=actor,
        run_id=plan.run_id,
        version=plan.parent,
        data={
            "parent_root": plan.parent_root,
            "requests": len(plan.requests),
            "settings": digest_json(plan.settings.model_dump(mode="json")),
            "limits": plan.settings.gate.model_dump(mode="json"),
            "code": plan.code,
        }
        | ({"left_out": list(plan.left_out)} if plan.left_out else {})
        | ({"reworks": len(plan.reworks)} if plan.reworks else {}),
    )


def references_digest(workspace: Workspace) -> str:
    """Keyed digest of all reference texts: a plan is kept as evidence, and no plain digest of a text may be in it."""
    digests = {
        str(path.relative_to(workspace.reference)): digest_file(path)
        for kind in KINDS
        for path in sorted((workspace.reference / kind).glob("*.txt"))
    }
    return open_vault(workspace).commitment(canonical_json(digests).decode())


def clean(folder: Path) -> None:
    """Delete the large files of a run; its records stay."""
    with explained_space(folder):
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.suffix in (".safetensors", ".restored"):
                path.unlink()


def open_run(workspace_root: str | Path, run_id: str) -> Run:
    """Open a planned run.

    Raises:
        UsageError: There is no such run.
        StoreDamaged: Its plan does not have its id.
    """
    workspace = open_workspace(Path(workspace_root))
    path = workspace.runs / run_id / "plan.json"
    if not path.is_file():
        raise UsageError(f"{run_id}: no such run in {workspace.root}. `takedown log` lists runs.")
    try:
        plan = Plan.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise StoreDamaged(f"{path}: is not a plan. {DAMAGED_RUN}") from error
    if _run_id(read_json(path)) != run_id:
        raise StoreDamaged(f"{path}: was changed after it was made. {DAMAGED_RUN}")
    plan._written = run_id
    return Run(workspace, run_id, plan)
