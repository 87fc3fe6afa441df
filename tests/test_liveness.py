"""Who is alive is a kernel lock: nothing that a dead process leaves is taken for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from uuid import UUID

import cloudpickle
import pytest
from httpx import ConnectError, HTTPError, HTTPStatusError, Request, Response
from prefect.client.schemas.objects import FlowRun, State, StateType

from flows import liveness, shown
from flows.environment import prefect_home, server_answers
from flows.liveness import alive
from pipeline.errors import Interrupted
from pipeline.patience import only_one
from pipeline.progress import tell

SERVED = """
import sys, time
from pathlib import Path
from flows.server import some_server
print(some_server(Path(sys.argv[1])), flush=True)
time.sleep(600)
"""
RUN = "01a22936-7ca9-707e-8695-bfa465d374d8"
LIVE = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from flows import liveness
from pipeline.errors import Interrupted
from pipeline.patience import only_one
liveness.flow_run = SimpleNamespace(id=sys.argv[2])
with liveness.alive(Path(sys.argv[1])), only_one(Path(sys.argv[3])) as first:
    print(first, flush=True)
    time.sleep(600)
"""


def remembered(minutes: float) -> FlowRun:
    """A run as Prefect remembers it, running for so long."""
    since = datetime.now(UTC) - timedelta(minutes=minutes)
    state: State[object] = State(type=StateType.RUNNING, timestamp=since)
    return FlowRun.model_validate({"id": RUN, "flow_id": RUN, "state": state, "parameters": {}})


@pytest.mark.parametrize("error", [HTTPStatusError, ConnectError])
def test_a_server_that_fails_a_flow_leaves_no_request_with_its_key(
    error: type[HTTPError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefect pickles what a flow raises, and an error of httpx holds the request, headers and all."""
    monkeypatch.setattr(liveness, "flow_run", SimpleNamespace(id=RUN))
    request = Request("POST", "https://prefect.example/api", headers={"Authorization": "Bearer pnu_s3cret"})
    more = {"response": Response(503, request=request)} if error is HTTPStatusError else {}
    assert b"pnu_s3cret" in cloudpickle.dumps(error("gone", request=request, **more))  # type: ignore[arg-type]
    with pytest.raises(Interrupted, match="the same command continues") as caught, alive(tmp_path):
        raise error("gone", request=request, **more)  # type: ignore[arg-type]
    assert caught.value.__context__ is None and caught.value.__cause__ is None
    assert b"s3cret" not in cloudpickle.dumps(caught.value)
    assert not [*(prefect_home(tmp_path) / "alive").iterdir()]


def test_killed_process_is_dead_and_lets_the_next_one_go_on(tmp_path: Path) -> None:
    lock = prefect_home(tmp_path) / "scheduled.lock"
    process = subprocess.Popen(
        [sys.executable, "-c", LIVE, str(tmp_path), RUN, str(lock)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "True\n"
        path = prefect_home(tmp_path) / "alive" / RUN
        assert path.is_file() and not liveness._is_dead(tmp_path, remembered(minutes=60))
        with only_one(lock) as first:
            assert not first
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert path.is_file() and liveness._is_dead(tmp_path, remembered(minutes=0))
    with only_one(lock) as first:
        assert first


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_server_for_one_command_ends_with_it_however_it_ends(tmp_path: Path) -> None:
    home = str(tmp_path / "prefect")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")} | {"PREFECT_HOME": home}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVED, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        api_url = process.stdout.readline().strip()
        assert server_answers(api_url)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    until = time.monotonic() + 60
    while server_answers(api_url):
        assert time.monotonic() < until
        time.sleep(0.2)


def test_a_step_goes_on_where_nobody_can_be_shown_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def unreachable(**_: object) -> None:
        tried.append(1)
        raise ConnectError("nobody there")

    task = SimpleNamespace(task_run=SimpleNamespace(id=UUID(RUN)))
    monkeypatch.setattr(shown, "TaskRunContext", SimpleNamespace(get=lambda: task))
    monkeypatch.setattr(shown, "create_progress_artifact", unreachable)
    with shown.progress_artifacts():
        for done in range(4):
            tell("unlearn", done, 4)
            tell("merge", done, 4)
    assert tried == [1]  # each further call would wait for minutes


def test_run_without_a_file_may_still_be_starting(tmp_path: Path) -> None:
    assert not liveness._is_dead(tmp_path, remembered(minutes=0.5))
    assert liveness._is_dead(tmp_path, remembered(minutes=2))


def test_file_goes_when_the_run_ends_however_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "flow_run", SimpleNamespace(id=RUN))
    folder = prefect_home(tmp_path) / "alive"
    with pytest.raises(RuntimeError, match="broke"), alive(tmp_path):
        assert [p.name for p in folder.iterdir()] == [RUN]
        raise RuntimeError("broke")
    assert list(folder.iterdir()) == []


def test_outside_of_a_flow_nothing_is_marked(tmp_path: Path) -> None:
    with alive(tmp_path):
        assert not prefect_home(tmp_path).exists()


@pytest.mark.parametrize(
    ("named", "ours"), [("ws", True), ("ws/../ws", True), ("other", False), (None, False), (7, False)]
)
def test_runs_of_other_workspaces_are_left_alone(tmp_path: Path, named: object, ours: bool) -> None:
    value = str(tmp_path / named) if isinstance(named, str) else named
    run = remembered(minutes=60).model_copy(update={"parameters": {"workspace": value}})
    assert liveness._belongs((tmp_path / "ws").resolve(), run) is ours
