"""The doors: one flow for each way in. Each is served as a deployment, see `flows.catalogue`.

Each opens the workspace, takes its turn at the write lock (the audit takes none) and ends in a state whose name says
what came of it. Parameters are a folder, ids and names of people; what is typed into a form is kept by Prefect for
ever, so no text is ever asked for. torch is imported where it is needed: the process that serves stays small.
"""

from __future__ import annotations

import logging
import tempfile
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from httpx import HTTPError
from prefect import flow, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.exceptions import FailedRun
from prefect.states import Completed, Failed
from pydantic import BaseModel, ConfigDict, Field, model_validator

from flows.environment import prefect_home
from flows.liveness import alive
from flows.runners import shares, side_by_side
from flows.telling import tell
from pipeline.dropfolder import Delivery, take_inbox
from pipeline.errors import WorkspaceBusy
from pipeline.patience import LONGEST_WAIT_S, only_one, writing_in_turn
from pipeline.records import Break, Publication
from pipeline.states import AWAITING
from pipeline.submit import still_waiting
from pipeline.verify import verify
from pipeline.workspace import open_workspace

if TYPE_CHECKING:
    from pipeline.audit import Audit
    from pipeline.clocks import Deadline
    from pipeline.recheck import Rechecked

NAMES = {"published": "Published", "refused": "Refused", "nothing": "Answered", AWAITING: "AwaitingApproval"}
"""The final state of a run in Prefect, by its outcome."""

OPTIONS: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False}
logging.getLogger("prefect.engine").addFilter(
    # A state that says Failed is raised once more at the end of the process; its traceback would look like a crash.
    lambda record: not (record.exc_info and isinstance(record.exc_info[1], FailedRun))
)

TOLD: dict[str, Any] = {"persist_result": False, "on_failure": [tell], "on_crashed": [tell]}
"""Of every door: who is to be told of a bad end is told, see `flows.telling`."""


class Urgent(BaseModel):
    """What cannot wait for the next scheduled run: a batch, or requests that wait already."""

    model_config = ConfigDict(extra="forbid")

    batch: str = Field(
        "",
        title="Batch id",
        max_length=64,
        description="The `batch_id` of a batch whose file lies in the workspace's `inbox`, or that was taken in "
        "before. Texts are never typed in here.",
    )
    requests: list[str] = Field(
        [], title="Requests", description="Instead of a batch: ids of requests that wait already."
    )
    actor: str = Field("legal", title="Who asks for it", min_length=1, max_length=200, description="For the ledger.")

    @model_validator(mode="after")
    def _one_of_them(self) -> Urgent:
        if bool(self.batch) == bool(self.requests):
            raise ValueError("give either a batch id or request ids")
        return self


# --- scheduled and ad hoc ---------------------------------------------------------------------------------


@task(**OPTIONS)
def take_in(workspace: str, actor: str) -> Delivery:
    """Take in what lies in the drop folder."""
    return take_inbox(open_workspace(Path(workspace)), actor)


@flow(name="scheduled", **TOLD)
def scheduled(workspace: str, actor: str = "scheduled") -> State[Any]:
    """Take in what lies in the drop folder, and run one step for all that waits.

    Args:
        workspace: Folder of the workspace.
        actor: For the ledger.
    """
    opened = open_workspace(Path(workspace))
    # A schedule that is faster than its runs must not pile them up.
    with alive(opened.root), only_one(prefect_home(opened.root) / "scheduled.lock") as first:
        if not first:
            return Completed(name="Deferred", message="The scheduled run before this one is still at work.")
        try:
            with writing_in_turn(opened, opened.settings().serve.wait_s):
                delivery = take_in(workspace, actor)
                publication = run_step(workspace, None, actor)
        except WorkspaceBusy as busy:
            return Completed(name="Deferred", message=str(busy))
    return ended(publication, delivery)


@flow(name="ad-hoc", **TOLD)
def ad_hoc(workspace: str, urgent: Urgent) -> State[Any]:
    """Run one step for an urgent batch: before everything that waits, after the step that is running.

    What else lies in the drop folder is taken in and stays in the queue.

    Args:
        workspace: Folder of the workspace.
        urgent: What to work on. What is answered already is not worked on again.
    """
    opened = open_workspace(Path(workspace))
    with alive(opened.root), writing_in_turn(opened, LONGEST_WAIT_S, urgent=True):
        delivery = take_in(workspace, urgent.actor)
        waiting = still_waiting(opened, urgent.batch, urgent.requests)
        publication = run_step(workspace, waiting, urgent.actor) if waiting else None
    return ended(publication, delivery)


def run_step(workspace: str, requests: list[str] | None, actor: str) -> Publication | None:
    """The tasks of a step, see `flows.takedown`."""
    from flows.takedown import step

    return step(workspace, requests, actor)


def ended(publication: Publication | None, delivery: Delivery) -> State[Any]:
    """The state that says what came of a run. Failed is what somebody must look at."""
    name, message = "NothingWaits", "Nothing waits."
    if publication is not None:
        name = NAMES[publication.outcome]
        version = "no new version" if publication.version is None else f"v{publication.version}"
        message = f"{publication.run_id}: {publication.outcome}, {version}."
    if delivery.arriving:
        message += f" Still being written: {', '.join(f'inbox/{file}' for file in delivery.arriving)}."
    if delivery.rejected:
        message += f" Set aside: {', '.join(f'inbox/rejected/{r.name}' for r in delivery.rejected)}."
        return Failed(name="SetAside" if name != "Refused" else name, message=message)
    return Failed(name=name, message=message) if name == "Refused" else Completed(name=name, message=message)


# --- approval ---------------------------------------------------------------------------------------------


class Decision(BaseModel):
    """A decision on a run that waits for approval; `takedown review` shows it, and its candidate."""

    model_config = ConfigDict(extra="forbid")

    run: str = Field(title="Run", pattern=r"^run-[0-9a-f]{12}$", description="E.g. run-0123456789ab.")
    decision: Literal["approve", "refuse"]
    actor: str = Field(title="Who decides", min_length=1, max_length=200, description="For the ledger.")
    reason: str = Field("", title="Reason", description="Needed to refuse. Stays on record: no names, no texts.")


@task(**OPTIONS)
def decide_on(workspace: str, decision: Decision) -> Publication:
    """Put the decision on record, and end the run."""
    from pipeline.decide import approve, refuse

    if decision.decision == "approve":
        return approve(workspace, decision.run, decision.actor)
    return refuse(workspace, decision.run, decision.actor, decision.reason)


@flow(name="decide", **TOLD)
def decide(workspace: str, decision: Decision) -> State[Any]:
    """Approve or refuse a run that waits, as `takedown approve` and `takedown refuse` do.

    Args:
        workspace: Folder of the workspace.
        decision: What was decided, by whom.
    """
    opened = open_workspace(Path(workspace))
    with alive(opened.root), writing_in_turn(opened, LONGEST_WAIT_S, urgent=True):
        publication = decide_on(workspace, decision)
    version = "" if publication.version is None else f", v{publication.version}"
    message = f"{publication.run_id}: {publication.outcome}{version}."
    return Completed(name="Decided", message=message)


# --- audit ------------------------------------------------------------------------------------------------


@task(**OPTIONS)
def check_store(workspace: str) -> list[Break]:
    """Re-check every byte of ledger, store, signatures, index and vault."""
    return verify(open_workspace(Path(workspace)))


@task(**OPTIONS)
def restore_version(workspace: str, folder: str) -> int:
    """Restore the version in force beside the workspace."""
    from pipeline.recheck import restore_current

    return restore_current(open_workspace(Path(workspace)), Path(folder))


@task(**OPTIONS)
def measure(workspace: str, folder: str, version: int, requests: list[str]) -> list[Rechecked]:
    """Measure some requests again."""
    from pipeline.recheck import recheck

    return recheck(workspace, folder, version, requests)


@task(**OPTIONS)
def find_overdue(workspace: str) -> list[Deadline]:
    """Deadlines that have passed."""
    from pipeline.clocks import overdue

    return list(overdue(open_workspace(Path(workspace)), datetime.now(UTC)))


@task(**OPTIONS)
def report(workspace: str, audit: Audit) -> str:
    """Write the report, and show it in Prefect; returns its place."""
    from pipeline.audit import keep_audit

    path = keep_audit(open_workspace(Path(workspace)), audit)
    breaks = [f"- {b.where}: {b.found}. {b.means}" for b in audit.breaks]
    rows = [
        {"request": r.request_id, "EM": round(r.exact_memorisation, 3),
         "limit": None if r.limit is None else round(r.limit, 3), "within": r.within}
        for r in audit.rechecked
    ]  # fmt: skip
    # For people; the report is written. And Prefect pickles what a task raises: a request with its API key, here.
    with suppress(HTTPError):
        create_markdown_artifact(
            key="audit",
            markdown="\n".join([f"# {audit.sentence()}", "", *breaks, "", f"`{path}`"]),
            description="Every stored byte, every text and every deadline looked at again",
        )
        create_table_artifact(
            key="audit-texts", table=rows, description="Every text that is out, measured again on the version in force"
        )
    return str(path)


@flow(name="audit", **TOLD)
def audit(workspace: str) -> State[Any]:
    """Verify everything that is kept, measure every request again on the version in force, and look for deadlines that
    have passed. Changes nothing of it.

    Args:
        workspace: Folder of the workspace.
    """
    from pipeline.audit import Audit
    from pipeline.recheck import to_recheck

    opened = open_workspace(Path(workspace))
    with (
        alive(opened.root),
        only_one(prefect_home(opened.root) / "audit.lock") as first,
        tempfile.TemporaryDirectory(prefix="takedown-audit-") as scratch,
    ):
        if not first:
            return Completed(name="Deferred", message="The audit before this one is still at work.")
        breaks = check_store(workspace)
        folder = str(Path(scratch) / "model")
        version = restore_version(workspace, folder)
        names, runtime = to_recheck(opened, version), opened.settings().runtime
        pieces = shares(names, runtime.workers)
        done = side_by_side(measure, pieces, runtime, workspace=workspace, folder=folder, version=version)
        rechecked = {r.request_id: r for piece in done for r in piece}
        found = Audit(
            at=datetime.now(UTC), version=version, breaks=tuple(breaks), rechecked=tuple(rechecked[n] for n in names),
            overdue=tuple(find_overdue(workspace)),
        )  # fmt: skip
        place = report(workspace, found)
    message = f"{found.sentence()} See {place}."
    if not found.sound:
        return Failed(name="Breaks", message=message)
    return Failed(name="Overdue", message=message) if found.overdue else Completed(name="Sound", message=message)
