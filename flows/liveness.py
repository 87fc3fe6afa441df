"""Which of Prefect's runs are alive; what it remembers of a dead process is corrected, for the ledger is the truth.

A flow holds a kernel lock on a file named after its run for as long as its process lives. A run that Prefect calls
running, and whose file is not locked, is dead: nobody told Prefect.

In: a workspace and Prefect's API. Out: states set in Prefect. Never: a change of the workspace's evidence.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.logging.loggers import flow_run_logger
from prefect.runtime import flow_run
from prefect.states import Cancelled, Crashed

from flows.environment import prefect_home, server_needed
from flows.telling import tell_of
from pipeline.files import remove
from pipeline.patience import is_locked

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun, State

UNFINISHED = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
GRACE = timedelta(seconds=60)
"""A run may be this old before it must have its file: its process is still starting."""
PAGE = 200


@contextmanager
def alive(workspace: Path) -> Iterator[None]:
    """Mark the flow run that calls this as alive; outside of one it does nothing."""
    run_id = flow_run.id
    if run_id is None:
        yield
        return
    path = _file(workspace, run_id)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = _locked(path)
    try:
        with server_needed():
            yield
    finally:
        remove(path)
        os.close(fd)


def _locked(path: Path) -> int:
    """Make and lock a file; again where `reconcile` removed it in between, as that of a dead process."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if path.exists() and path.stat().st_ino == os.fstat(fd).st_ino:
            return fd
        os.close(fd)


def _file(workspace: Path, run_id: str | UUID) -> Path:
    return prefect_home(workspace) / "alive" / str(run_id)


def _is_dead(workspace: Path, run: FlowRun) -> bool:
    path = _file(workspace, run.id)
    if path.exists():
        return not _is_alive(path)
    since = run.state.timestamp if run.state is not None else run.created
    return since is not None and datetime.now(UTC) - since > GRACE


def _is_alive(path: Path) -> bool:
    try:
        return is_locked(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:  # it ended just now
        return False


def reconcile(workspace: Path) -> int:
    """Tell Prefect which runs of this workspace are dead.

    Returns:
        How many there were.
    """
    with get_client(sync_client=True) as client:
        dead = [r for r in _runs(client, UNFINISHED) if _belongs(workspace, r) and _is_dead(workspace, r)]
        for run in dead:
            gone: State[Any] = Crashed(
                message="Its process ended without a word. `takedown log` says what it achieved."
            )
            _end_tasks(client, run.id)
            client.set_flow_run_state(run.id, gone, force=True)
            # Hooks are not called for a state that is set from outside.
            tell_of(client.read_flow(run.flow_id).name, run, gone, flow_run_logger(run))
    for path in _file(workspace, "*").parent.glob("*"):
        if not _is_alive(path):
            remove(path)
    return len(dead)


def drop_missed(workspace: Path, deployments: Sequence[UUID]) -> int:
    """Of the runs that were due while nobody served, keep the newest of each deployment; it makes up for all.

    Returns:
        How many were dropped.
    """
    now = datetime.now(UTC)
    with get_client(sync_client=True) as client:
        missed = [
            r
            for r in _runs(client, [StateType.SCHEDULED])
            if r.auto_scheduled
            and r.deployment_id in deployments
            and r.expected_start_time is not None
            and r.expected_start_time < now
        ]
        missed.sort(key=lambda r: str(r.expected_start_time))
        newest = {r.deployment_id: r.id for r in missed}
        dropped = [r for r in missed if newest[r.deployment_id] != r.id]
        for run in dropped:
            client.set_flow_run_state(run.id, Cancelled(message="Missed while nobody served."), force=True)
    return len(dropped)


def _belongs(workspace: Path, run: FlowRun) -> bool:
    named = run.parameters.get("workspace")
    return isinstance(named, str) and Path(named).resolve() == workspace


def _runs(client: SyncPrefectClient, states: list[StateType]) -> list[FlowRun]:
    wanted = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=states)))
    found: list[FlowRun] = []
    while page := client.read_flow_runs(flow_run_filter=wanted, limit=PAGE, offset=len(found)):
        found += page
    return found


def _end_tasks(client: SyncPrefectClient, run_id: UUID) -> None:
    tasks = client.read_task_runs(
        flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run_id])),
        task_run_filter=TaskRunFilter(state=TaskRunFilterState(type=TaskRunFilterStateType(any_=UNFINISHED))),
    )
    for task in tasks:
        client.set_task_run_state(task.id, Crashed(message="Its process ended without a word."), force=True)
