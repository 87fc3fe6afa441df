"""A method other than the default in the stages of a run: its mask, its direction, and what the run says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from workspaces import SETTINGS, WORKS, new_workspace, step, take_in

from pipeline.errors import UsageError
from pipeline.records import MaskReport, Step
from pipeline.runs import Run, open_run
from pipeline.sparse import load_mask, load_vector
from pipeline.workspace import Workspace

pytestmark = pytest.mark.usefixtures("one_model")


def prepared(folder: Path, model: Path, references: bool = True, **unlearn: Any) -> Workspace:
    """A workspace with one request waiting, whose ``[unlearn]`` holds nothing else."""
    workspace = new_workspace(folder / "ws", model, {**SETTINGS, "unlearn": unlearn}, references)
    take_in(workspace, "batch", {"A": WORKS["one"]})
    return workspace


def only_run(workspace: Workspace) -> Run:
    (folder,) = workspace.runs.iterdir()
    return open_run(workspace.root, folder.name)


def test_a_direct_method_without_mask_is_mixed_with_its_parent(tmp_path: Path, model: Path) -> None:
    workspace = prepared(
        tmp_path, model, method="unlikelihood-kl", iterations=30, learning_rate=2e-3, anchor_passages=8
    )
    records: list[tuple[MaskReport, Step, Step]] = []

    def note(run_id: str) -> None:
        """Look while the run's tensors still exist."""
        run = open_run(workspace.root, run_id)
        masked, fitted = run.finished("saliency", MaskReport), run.finished("unlearn", Step)
        mask, vector = load_mask(run.folder, masked.mask), load_vector(run.folder, fitted.vector.vector)
        assert all(bool(m.all()) and vector[n].numel() == m.numel() for n, m in mask.items())
        records.append((masked, fitted, run.finished("repair", Step)))

    outcome = step(workspace, before_publish=note)
    assert outcome is not None and outcome.version == 1
    ((masked, fitted, repaired),) = records
    run = only_run(workspace)
    assert run.settings.unlearn.method == "unlikelihood-kl"  # the plan, and with it the settings, is evidence
    assert masked.selected == masked.total and masked.threshold == 0
    assert fitted == repaired  # no method gets the product's repair
    found = fitted.calibration
    assert found.reached and 0 < found.alpha <= 1
    assert all(point.alpha <= 1 for point in found.curve)
    (chosen,) = (point for point in found.curve if point.alpha == found.alpha)
    assert found.curve[0].forget > 0.9 and chosen.forget <= found.target


def test_saluns_mask_is_the_share_of_its_settings(tmp_path: Path, model: Path) -> None:
    workspace = prepared(tmp_path, model, method="salun", saliency_fraction=0.1)
    assert step(workspace, stop_after="saliency") is None
    found = only_run(workspace).finished("saliency", MaskReport)
    assert found.selected == pytest.approx(0.1 * found.total, abs=1)
    assert found.threshold > found.mean


def test_a_method_that_needs_retain_text_stops_the_run_without(tmp_path: Path, model: Path) -> None:
    workspace = prepared(tmp_path, model, references=False, method="npo-kl")
    with pytest.raises(UsageError, match=r"npo-kl: needs retain text \(any\), and there is none"):
        step(workspace)
