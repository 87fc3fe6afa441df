"""Waiting for the write lock in turn: kernel locks only, so whoever dies is out of the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from histories import array_model, start_history
from tampered.calls import takedown
from workspaces import draw_text, write_batch

from flows import stepping
from pipeline import patience
from pipeline.errors import WorkspaceBusy
from pipeline.patience import only_one, writing_in_turn
from pipeline.progress import listening
from pipeline.workspace import Workspace, writing

HOLD = """
import sys, time
from pathlib import Path
from pipeline.patience import writing_in_turn
from pipeline.progress import listening
from pipeline.workspace import Workspace
with listening(lambda *told: print("waiting", flush=True)):
    with writing_in_turn(Workspace(Path(sys.argv[1])), 60, urgent=sys.argv[2] == "urgent"):
        print("holding", flush=True)
        time.sleep(60)
"""


@pytest.fixture
def ws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.setattr(patience, "POLL_S", 0.02)
    return start_history(tmp_path / "ws", array_model(tmp_path / "model"))


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def start(ws: Workspace, how: str, processes: list[subprocess.Popen[str]]) -> subprocess.Popen[str]:
    """A process that takes the lock and keeps it; returns when it has said its first word."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(ws.root), how], stdout=subprocess.PIPE, text=True)
    processes.append(process)
    return process


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_holder_is_named_and_a_killed_one_is_out_of_the_way(
    ws: Workspace, processes: list[subprocess.Popen[str]]
) -> None:
    holder = start(ws, "patient", processes)
    assert said(holder) == "holding"
    with pytest.raises(WorkspaceBusy, match=f"by process {holder.pid} on .* since 20"), writing_in_turn(ws, 0.1):
        pytest.fail("two writers")
    told: list[str] = []

    def kill(stage: str, done: int, total: int, note: str) -> None:
        told.append(f"{stage}: {note}")
        os.kill(holder.pid, signal.SIGKILL)

    with listening(kill), writing_in_turn(ws, 60):
        pass
    assert len(told) == 1 and told[0].startswith(f"waiting: {ws.root}: is being written to by process {holder.pid}")


def test_who_is_urgent_goes_first(ws: Workspace, processes: list[subprocess.Popen[str]]) -> None:
    with writing(ws):
        urgent = start(ws, "urgent", processes)
        assert said(urgent) == "waiting"
    # Free, or taken by the urgent one by now: either way it is not this one's turn.
    with pytest.raises(WorkspaceBusy), writing_in_turn(ws, 0.1):
        pytest.fail("went before an urgent run")
    assert said(urgent) == "holding"
    urgent.kill()
    urgent.wait()
    with writing_in_turn(ws, 60):
        pass


def test_urgent_waiter_that_dies_is_out_of_the_way(ws: Workspace, processes: list[subprocess.Popen[str]]) -> None:
    with writing(ws):
        urgent = start(ws, "urgent", processes)
        assert said(urgent) == "waiting"
        assert patience._somebody_first(ws)
        urgent.kill()
        urgent.wait()
        assert not patience._somebody_first(ws)
    with writing_in_turn(ws, 1):
        pass


@pytest.mark.parametrize("wait_s", [0.0, 0.1])
def test_urgent_run_stands_first_while_nobody_holds_the_lock(
    ws: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_s: float
) -> None:
    """Between taking in and the step Prefect starts: nobody else may take the urgent batch then."""
    seen: list[str] = []

    def starting(workspace: Workspace, requests: list[str], actor: str, as_json: bool, now: bool) -> None:
        with pytest.raises(WorkspaceBusy, match="an urgent run goes first"), writing_in_turn(ws, wait_s):
            pytest.fail("took the urgent batch")
        with writing_in_turn(ws, 0, urgent=True):  # as the step itself
            seen.extend(requests)

    monkeypatch.setattr(stepping, "run_step", starting)
    batch = write_batch(tmp_path, "urgent", {"A": draw_text("A", 30)})
    assert takedown("-w", "ws", "run", str(batch), "--now", folder=tmp_path).code == 0
    assert seen == ["A"]
    with writing_in_turn(ws, 0):  # and not longer than the command
        pass


def test_two_who_wait_both_get_their_turn(ws: Workspace) -> None:
    turns: list[int] = []

    def wait(number: int) -> None:
        with writing_in_turn(ws, 60):
            turns.append(number)
            time.sleep(0.05)

    with writing(ws):
        threads = [threading.Thread(target=wait, args=(n,)) for n in range(2)]
        for thread in threads:
            thread.start()
    for thread in threads:
        thread.join()
    assert sorted(turns) == [0, 1]


def test_only_one_goes_on_and_the_next_one_after_it(tmp_path: Path) -> None:
    lock = tmp_path / "prefect" / "audit.lock"  # nothing of it is there
    with only_one(lock) as first, only_one(lock) as second, only_one(lock.with_name("scheduled.lock")) as other:
        assert (first, second, other) == (True, False, True)
    with only_one(lock) as first:
        assert first
