"""The harness that kills real runs, with a handful of moments; and that it would find what it looks for."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks import kills
from benchmarks.kills import BOUNDARIES, Moment, Undisturbed, cpu_seconds, ended, moments_of, outcome, records_of, shown
from histories import array_model, make_step, start_history
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_runs_end_like_the_undisturbed_one(tmp_path: Path) -> None:
    """Exit 1 where a run differs, computes a stage again or publishes twice."""
    command = [
        sys.executable, "-m", "tests.benchmarks.kills", "--moments", "4", "--seeds", "0", "--port", str(_free_port()),
        "--json", str(tmp_path / "found.json"),
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    rows = json.loads((tmp_path / "found.json").read_bytes())
    assert len(rows) == 4 and not any(r["problems"] for r in rows)
    assert all(r["killed"] for r in rows if r["boundary"])


def test_moments_are_boundaries_and_random_ones_and_the_same_each_time() -> None:
    found = moments_of(40, 0)
    assert found == moments_of(40, 0) != moments_of(40, 1)
    assert [m.boundary for m in found[:20]] == [*BOUNDARIES, *BOUNDARIES[: 20 - len(BOUNDARIES)]]
    assert all(not m.boundary and 0 < m.share < 1 for m in found[20:])


def test_a_process_is_killed_by_its_cpu_time() -> None:
    if (pid := os.fork()) == 0:
        while True:
            pass
    seen = list[float]()

    def watch(cpu: float) -> bool:
        seen.append(cpu)
        return cpu >= 0.05

    assert cpu_seconds(pid) >= 0
    assert ended(pid, watch) is None
    assert seen == sorted(seen) and seen[-1] >= 0.05


@pytest.mark.parametrize("code", [0, 3])
def test_an_exit_code_is_told(code: int) -> None:
    if (pid := os.fork()) == 0:
        os._exit(code)
    assert ended(pid) == code


def test_a_signal_of_its_own_is_a_kill() -> None:
    if (pid := os.fork()) == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    assert ended(pid) is None


def test_two_histories_of_other_weights_differ(tmp_path: Path) -> None:
    """What is compared would show other weights and another order of events."""
    workspace = start_history(tmp_path / "ws", array_model(tmp_path / "model"))
    make_step(workspace, "A")
    first = outcome(workspace.root)
    assert first == outcome(workspace.root) and first["breaks"] == []
    make_step(workspace, "B")
    second = outcome(workspace.root)
    changed = {name for name in first if first[name] != second[name]}
    assert changed >= {"events", "states", "manifests", "contents", "index", "vault"}


def test_records_are_named_by_run_and_stage(tmp_path: Path) -> None:
    """What the step before left is not taken for the records of this one."""
    names = {"run-0/gate", "run-1/plan", "run-1/screened/D", "run-1/gate"}
    for name in names:
        path = tmp_path / "runs" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    assert set(records_of(tmp_path)) == names


@pytest.mark.parametrize("again_in", [2, 3])
def test_a_stage_that_is_computed_again_is_found_after_either_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again_in: int
) -> None:
    (tmp_path / "start").mkdir()
    calls = list[int]()

    def started(workspace: Path, *_: object) -> int:
        calls.append(len(calls) + 1)
        path = workspace / "runs" / "run-0" / "screen.json"
        if calls[-1] in (1, again_in):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name("new").write_text("{}")
            path.with_name("new").rename(path)
        return calls[-1]

    monkeypatch.setattr(kills, "started", started)
    monkeypatch.setattr(kills, "ended", lambda pid, watch=None: None if pid < 3 else 0)
    monkeypatch.setattr(kills, "stage_of", lambda workspace: "screen")
    monkeypatch.setattr(kills, "outcome", lambda workspace: {})
    found = kills.survive(tmp_path / "start", tmp_path, Moment(share=0.5), Undisturbed(0, 1, {}), 0.5)
    assert found["problems"] == ["computed again: run-0/screen"] and found["killed"] == 2


def test_the_table_counts_by_stage() -> None:
    rows = [
        {"stage": "screen", "boundary": "screen", "problems": []},
        {"stage": "screen", "boundary": "", "problems": ["events: differs"]},
        {"stage": "published", "boundary": "", "problems": []},
    ]
    page = io.StringIO()
    Console(file=page, width=120).print(shown(rows))
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in page.getvalue().splitlines() if "|" in line]
    assert lines[2:] == [
        ["screen", "1", "1", "1 / 2"], ["published", "0", "1", "1 / 1"], ["all", "1", "2", "2 / 3"]
    ]  # fmt: skip
