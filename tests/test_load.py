"""The load benchmark at toy size: its workspace is one, and its numbers can be true."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from histories import entries_of

from pipeline.states import current_version, request_states
from pipeline.storecheck import Depth
from pipeline.verify import verify
from pipeline.versions import VersionStore
from pipeline.workspace import open_workspace

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_a_toy_run(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "tests.benchmarks.load", "--versions", "3", "--batches", "2", "--batch-size", "4",
        "--rounds", "1", "--work", str(tmp_path / "made"), "--json", str(tmp_path / "numbers.json"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    small, large = json.loads((tmp_path / "numbers.json").read_bytes())["sizes"]
    assert (small["versions"], small["waiting"], large["versions"], large["waiting"]) == (1, 4, 3, 8)
    for size in (small, large):
        assert set(size["verbs"]) == {f"{v} {w}" for v in ("status", "log", "submit") for w in ("shell", "process")}
        for found in size["verbs"].values():
            assert found["seconds"] > 0 and found["cpu_seconds"] > 0
            assert found["peak_bytes"] > 10 << 20
        assert size["verbs"]["status process"]["cpu_seconds"] < size["verbs"]["status shell"]["cpu_seconds"]
    assert "| submit shell " in done.stdout
    workspace = open_workspace(tmp_path / "made" / "3-2-4")
    entries = entries_of(workspace)
    assert current_version(entries) == 3
    waiting = [s for s in request_states(entries).values() if s.to_do]
    assert len(waiting) == 8 + 2 * 20, "the queue, and what two calls of submit took in"
    store = VersionStore(workspace.versions)
    store.check_restores(store.manifest(3))
    # As its documentation says: real but for the evidence.
    assert [b.found.partition(" ")[2] for b in verify(workspace, Depth.QUICK)] == ["was accepted without evidence"] * 3
