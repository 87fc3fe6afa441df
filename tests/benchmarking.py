"""A benchmark small enough for tests: the model of `workspaces`, two steps, two methods."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import workspaces

if TYPE_CHECKING:
    import pytest

    from pipeline.benchmark.records import Inputs, Job, Results, Screened

UNSEEN = {f"unseen-{i}": workspaces.draw_text(f"bench-unseen-{i}", 90) for i in range(4)}
"""Never seen, of the same kind as the works."""

SETTINGS = workspaces.with_settings(
    unlearn={"iterations": 6, "repair_iterations": 12, "repair_min_iterations": 4},
    calibrate={"bisections": 4},
)
"""Enough to see forgetting, not to do it well."""


def write_inputs(folder: Path, **changed: Any) -> Inputs:
    """Folders of texts: a step that is one file, and one that is a folder with two requests."""
    from pipeline.benchmark.records import Inputs

    steps = workspaces.write_texts(folder / "steps", {"step-1": workspaces.WORKS["one"]})
    workspaces.write_texts(steps / "step-2", {name: workspaces.WORKS[name] for name in ("two", "three")})
    groups = {
        "retain": workspaces.RETAIN, "kept": workspaces.KEPT, "heldout": workspaces.HELDOUT, "unseen": UNSEEN,
    }  # fmt: skip
    written = {name: str(workspaces.write_texts(folder / name, texts)) for name, texts in groups.items()}
    return Inputs.model_validate({"texts": str(steps), **written, **changed})


def settings_file(folder: Path) -> Path:
    path = folder / "takedown.toml"
    path.write_text(workspaces.toml(SETTINGS))
    return path


def job(model: Path, inputs: Inputs, method: str, screened: Screened | None = None, seed: int = 0) -> Job:
    from pipeline.benchmark.records import Job
    from pipeline.benchmark.runner import method_settings
    from pipeline.benchmark.texts import read_texts

    return Job(
        method=method, model=str(model), model_root="root", inputs=inputs, inputs_digest=read_texts(inputs).digest(),
        settings=method_settings(SETTINGS, method, seed), screened=screened, software={}, threads=1,
    )  # fmt: skip


def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Do jobs without new processes; returns the methods that were worked on."""
    from pipeline.benchmark import runner, sequence

    done: list[str] = []

    def run(task: Job, folder: Path) -> None:
        done.append(task.method)
        sequence.work(task, folder)

    monkeypatch.setattr(runner, "run_alone", run)
    return done


def run(
    model: Path | str, inputs: Inputs, out: Path, methods: Sequence[str] = ("ssu", "ga"), seeds: Sequence[int] = (0,),
    **asked: Any,
) -> Results:  # fmt: skip
    from pipeline.benchmark.runner import Benchmark, run_benchmark

    out.parent.mkdir(exist_ok=True)
    return run_benchmark(Benchmark(str(model), inputs, methods, seeds, out, settings_file(out.parent), **asked))
