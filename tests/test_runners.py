"""Task runners: pieces of a stage on threads, on Dask and on Ray give the same bytes.

Dask and Ray are extras; without them their cases are skipped.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import workspaces
from prefects import Prefect
from workspaces import copied, draw_text, step, take_in, toml, with_settings

from pipeline.errors import UsageError
from pipeline.recheck import recheck, restore_current, to_recheck
from pipeline.settings import RuntimeSettings
from pipeline.workspace import Workspace

RUNNERS = ("threads", "dask", "ray")


def needs(runner: str) -> None:
    if runner != "threads" and importlib.util.find_spec(f"prefect_{runner}") is None:
        pytest.skip(f"the extra {runner!r} is not installed")


@pytest.mark.parametrize("pieces", [1, 2, 3, 7])
def test_shares_hold_every_name_once(pieces: int) -> None:
    from flows.runners import shares

    names = [f"n{i}" for i in range(5)]
    found = shares(names, pieces)
    assert sorted(n for piece in found for n in piece) == names and all(found) and len(found) == min(pieces, 5)
    assert shares([], pieces) == []


@pytest.mark.parametrize("runner", ["dask", "ray"])
def test_missing_extra_is_told(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.runners import task_runner

    monkeypatch.setitem(sys.modules, f"prefect_{runner}", None)
    with pytest.raises(UsageError, match=rf'pip install "takedown-pipeline\[{runner}\]"'):
        task_runner(RuntimeSettings(runner=runner))


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A workspace with v1, where three more requests wait that the model never saw: nothing has to be trained."""
    workspace = copied(workspaces.published(model.parent), tmp_path_factory.mktemp("waiting") / "ws")
    take_in(workspace, "batch-2", {name: draw_text(f"never-{name}", 60) for name in "XYZ"})
    return workspace.root


def screening(workspace: Workspace) -> bytes:
    """What was measured of the requests, byte for byte."""
    (path,) = workspace.runs.glob("*/screen.json")
    return path.read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("runner", RUNNERS)
def test_same_bytes_whatever_runs_the_pieces(prefect: Prefect, waiting: Path, tmp_path: Path, runner: str) -> None:
    needs(runner)
    from flows.doors import audit
    from flows.takedown import takedown

    alone, shared = (copied(waiting, tmp_path / name) for name in ("alone", "shared"))
    assert step(alone) is not None  # without Prefect, in one piece
    version = restore_current(alone, tmp_path / "model")
    found = recheck(alone.root, tmp_path / "model", version, to_recheck(alone, version))
    expected = [r.model_dump(mode="json") for r in found]

    shared.settings_file.write_text(toml(with_settings(runtime={"workers": 2, "runner": runner})))
    publication = takedown(str(shared.root))
    assert publication is not None and publication.outcome == "nothing"
    assert screening(shared) == screening(alone)
    state = audit(str(shared.root), return_state=True)
    assert state.name == "Sound", state.message
    (report,) = (json.loads(path.read_text()) for path in shared.reports.glob("audit-*.json"))
    assert report["rechecked"] == expected and [r["request_id"] for r in expected] == ["A", "B"]
