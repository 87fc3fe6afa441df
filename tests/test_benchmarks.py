"""The store's benchmark at toy size: it runs, restores exactly, and its numbers can be true."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from histories import array_model, make_step, start_history

ROOT = Path(__file__).resolve().parent.parent


def _run(tmp_path: Path, *options: object) -> tuple[str, dict[str, Any]]:
    """The benchmark's output and its numbers; it compares every restored file itself."""
    out = tmp_path / "numbers.json"
    command = [sys.executable, "-m", "tests.benchmarks.store", "--json", out, *options]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout, json.loads(out.read_bytes())


@pytest.mark.slow
def test_the_numbers_of_a_toy_run_are_plausible(tmp_path: Path) -> None:
    shown, found = _run(
        tmp_path, "--megabytes", 1, "--versions", 2, "--dtype", "bf16", "--density", 0.05, "--history", 2, "--rounds", 1
    )
    (sequence,) = found["sequences"]
    whole, ways = sequence["file_bytes"], sequence["ways"]
    assert 0.9e6 < whole < 1.1e6
    assert 0.04 < sequence["density"] < 0.06
    assert sequence["changed_bytes"] == pytest.approx(sequence["density"] * whole, rel=0.01)
    assert set(ways) == {"deltas", "whole", "tensors", "zstd", "copy"}
    assert ways["copy"]["bytes"] == whole
    assert 0.7 * sequence["changed_bytes"] < ways["deltas"]["bytes"] < 0.1 * whole
    for name in ("whole", "tensors"):  # every tensor changed: nothing is shared
        assert whole <= ways[name]["bytes"] < 1.01 * whole
    assert ways["zstd"]["bytes"] < whole
    for way in ways.values():
        for timed in (way["publish"], *way["restore"].values()):
            assert timed["seconds"] > 0
            assert timed["peak_bytes"] > whole
    assert ways["copy"]["publish"]["times_copy"] == 1
    assert found["history"]["versions"] == 2
    assert 0 < found["history"]["quick_check_seconds"] < found["history"]["cli_seconds"]
    assert "| deltas " in shown
    assert "Targets, BF16" in shown


@pytest.mark.slow
def test_the_deltas_of_a_workspace_are_reported(tmp_path: Path) -> None:
    workspace = start_history(tmp_path / "ws", array_model(tmp_path / "model", shape=(256, 64)))
    make_step(workspace, "R1", share=0.1)
    make_step(workspace, "R2", share=0.02)
    _, found = _run(tmp_path, "--workspace", workspace.root)
    first, second = found["steps"]
    assert [first["version"], second["version"]] == [1, 2]
    for row, share in ((first, 0.1), (second, 0.02)):
        assert row["entries"] == 3 * 256 * 64
        assert row["changed"] / row["entries"] == pytest.approx(share, rel=0.2)
        assert row["changed_bytes"] == 4 * row["changed"]
        assert row["changed_bytes"] * 0.5 < row["bytes"] < row["whole"]
