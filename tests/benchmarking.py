"""A benchmark small enough for tests: the model of `workspaces`, two steps, two methods."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import workspaces

if TYPE_CHECKING:
    import pytest

    from pipeline.benchmark.records import GroupScore, Inputs, Job, Results, Row, Screened

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
    from pipeline.benchmark.overrides import Overrides
    from pipeline.benchmark.records import Job
    from pipeline.benchmark.texts import read_texts

    return Job(
        method=method, model=str(model), model_root="root", inputs=inputs, inputs_digest=read_texts(inputs).digest(),
        settings=Overrides(SETTINGS).settings(method, seed), screened=screened, software={}, threads=1,
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


STEPS = ("second <b>", "first")  # in the order of the sequence, not of the alphabet
EVIL = '"><script>alert(1)</script>'


def group(em: float, nll: float = 4.0) -> GroupScore:
    from pipeline.benchmark.records import GroupScore

    return GroupScore(
        passages=3, exact_memorisation=em, extraction_strength=em, nll=nll, extractable=0.0, rouge_1=em, rouge_l=em,
        longest_run=2.5, longest_run_max=4, accumulated_runs=3.0, repetition=0.1,
    )  # fmt: skip


def row(method: str, seed: int, step: int, this: float, kept: float, auc: float, nll: float = 4.0) -> Row:
    from pipeline.benchmark.records import Change, Cost, Row

    groups = {"this": group(this), "kept": group(kept), "heldout": group(0.2, nll)}
    groups |= {"earlier": group(0.3)} if step == 2 else {"later": group(0.9)}
    persistence = {STEPS[0]: this if step == 1 else 0.3, STEPS[1]: 0.9 if step == 1 else this}
    fixed = method in ("vanilla", "retrained")
    return Row(
        method=method, seed=seed, step=step, source=STEPS[step - 1], groups=groups, persistence=persistence,
        membership={"loss": 0.7, "zlib": 0.7, "min-k": auc, "min-k++": 0.7},
        change=None if fixed else Change(alpha=2.0, reached=True, selected=30, changed=20, total=100),
        cost=None if fixed else Cost(
            seconds=float(step + seed), tokens=1000, peak_bytes=9_000_000, rise_bytes=step * 10**6
        ),
    )  # fmt: skip


def canned() -> Results:
    """Results made up for two steps, of which one run broke down in the second."""
    from pipeline.benchmark.records import Recovered, Results, Screened, ScreenedText, Stopped
    from pipeline.records import NeverSeenLevel
    from pipeline.settings import Settings

    rows = [row("vanilla", 0, s, 1.0, 1.0, 1.0) for s in (1, 2)]
    rows += [row("retrained", 0, s, 0.2, 1.0, 0.52) for s in (1, 2)]
    rows += [row("ssu", seed, s, 0.2 + 0.1 * seed, 0.9, 0.64, 4.1) for seed in (0, 1) for s in (1, 2)]
    rows += [row("ga", 0, s, 0.1, 0.4, 0.5) for s in (1, 2)] + [row("ga", 1, 1, 0.1, 0.4, 0.5)]
    methods = ("vanilla", "retrained", "ssu", "ga")
    text = ScreenedText(passages=3, memorised=(0, 2), exact_memorisation=0.9)
    return Results(
        model=f"model {EVIL}", model_root="root-sha256:aa", reference="root-sha256:bb", inputs_digest="sha256:cc",
        software={"torch": "2"}, threads=1, methods=methods, seeds=(0, 1), steps=STEPS,
        settings={m: Settings() for m in methods},
        screened=Screened(
            level=NeverSeenLevel(mean=0.15, std=0.05, passages=9, source="held-out"), memorised_above=0.3,
            requests={STEPS[1]: {STEPS[1]: text}, STEPS[0]: {f"work {EVIL}": text}},
        ),
        rows=tuple(rows),
        recovered=tuple(
            Recovered(method="ssu", seed=s, attacks={"4 bits": group(0.3 + s / 10), "as it is": group(0.2)})
            for s in (0, 1)
        ),
        stopped=(Stopped(method="ga", seed=1, step=2, reason=f"not finite {EVIL}"),),
        tasks={"vanilla": {"mmlu": 0.25}, "ssu": {"mmlu": 0.2375}},
    )  # fmt: skip
