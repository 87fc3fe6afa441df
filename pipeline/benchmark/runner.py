"""The benchmark from start to end: vanilla first, then the reference, the baselines, every method for every seed.

In: a model, texts, methods, seeds. Out: `Results`. Finished jobs are found again by the digest of what they depend on,
so that a killed benchmark goes on, and one more method or seed costs only itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.benchmark.overrides import Overrides, read_overrides
from pipeline.benchmark.processes import run_alone
from pipeline.benchmark.recipe import read_recipe, train_both
from pipeline.benchmark.records import (
    GUARD,
    RETRAINED,
    SYSTEM_PROMPT,
    VANILLA,
    Inputs,
    Job,
    Recovered,
    Results,
    Screened,
    Stopped,
)
from pipeline.benchmark.sequence import RECOVERED, SCREENED, STOPPED, finished, finished_rows
from pipeline.benchmark.tasks import harness, run_tasks
from pipeline.benchmark.texts import read_texts
from pipeline.errors import InvalidInput, Problem
from pipeline.files import digest_json, make_folder, read_json
from pipeline.models import check_folder, find_model, software
from pipeline.progress import Counter
from pipeline.safefile import model_root


@dataclass(frozen=True)
class Benchmark:
    """What is asked for.

    Attributes:
        model: Folder or hub id; with a recipe a folder that is trained where it is missing.
        inputs: The texts.
        methods: Rows of `pipeline.benchmark.overrides`, in the order of the table.
        seeds: In order.
        out: Folder of the results and of finished jobs.
        settings: See `pipeline.benchmark.overrides`; None for each method's defaults.
        recipe: A recipe by which the model and its reference are trained, or None.
        tasks: Names of lm-evaluation-harness.
    """

    model: str
    inputs: Inputs
    methods: Sequence[str]
    seeds: Sequence[int]
    out: Path
    settings: Path | None = None
    recipe: Path | None = None
    tasks: Sequence[str] = ()


def run_benchmark(asked: Benchmark) -> Results:
    """Do what is asked for, or what is left of it.

    Raises:
        InvalidInput: Methods, seeds, settings or texts that cannot be used; every problem is listed.
        EvidenceError: A step has nothing that the model reproduces.
        Interrupted: A process died; the same call goes on.
    """
    overrides = _check(asked)
    texts = read_texts(asked.inputs)
    if asked.tasks:
        harness()
    make_folder(asked.out)
    make_folder(asked.out / "runs")
    reference = None
    if asked.recipe is not None:
        model, reference = Path(asked.model), asked.out / "retrained"
        train_both(texts, read_recipe(asked.recipe), model, reference)
    else:
        model = find_model(asked.model)
    check_folder(model)
    make = _Jobs(asked, overrides, model, model_root(model), texts.digest())
    first = asked.seeds[0]
    vanilla = make.job(VANILLA, first, None)
    jobs = [vanilla]
    if not finished(make.folder(vanilla)):
        run_alone(vanilla, make.folder(vanilla))
    screened = Screened.model_validate(read_json(make.folder(vanilla) / SCREENED))
    if reference is not None:
        jobs.append(make.job(RETRAINED, first, screened, reference))
    jobs += [make.job(SYSTEM_PROMPT, first, screened), make.job(GUARD, first, screened)]
    jobs += [make.job(method, seed, screened) for method in asked.methods for seed in asked.seeds]
    count = Counter("benchmark", len(jobs))
    for job in jobs:
        if not finished(make.folder(job)):
            run_alone(job, make.folder(job))
        count.add(note=f"{job.method}, seed {job.settings.runtime.seed}")
    tasks = {}
    if asked.tasks:
        firsts = {job.method: job for job in reversed(jobs)}
        for method, job in reversed(firsts.items()):
            rows = finished_rows(make.folder(job))
            tasks[method] = run_tasks(job, make.folder(job), rows[-1] if rows else None, asked.tasks)
    return _collect(asked, make, jobs, tuple(texts.steps), screened, tasks)


class _Jobs:
    """Makes jobs, and finds the folder of each."""

    def __init__(self, asked: Benchmark, overrides: Overrides, model: Path, root: str, inputs_digest: str) -> None:
        self.asked, self.overrides, self.model, self.root = asked, overrides, model, root
        self.inputs_digest = inputs_digest

    def job(self, method: str, seed: int, screened: Screened | None, model: Path | None = None) -> Job:
        return Job(
            method=method,
            model=str((model or self.model).resolve()),
            model_root=model_root(model) if model else self.root,
            inputs=self.asked.inputs,
            inputs_digest=self.inputs_digest,
            settings=self.overrides.settings(method, seed),
            screened=screened,
            software=software(),
            threads=torch.get_num_threads(),
        )

    def folder(self, job: Job) -> Path:
        """Where a job lies: named by what it depends on, not by where its model and texts are."""
        key = digest_json(job.model_dump(mode="json", exclude={"model", "inputs"})).removeprefix("sha256:")[:12]
        folder = self.asked.out / "runs" / f"{job.method}-{job.settings.runtime.seed}-{key}"
        make_folder(folder)
        return folder


def _check(asked: Benchmark) -> Overrides:
    """Find what is wrong with the call itself, before anything is read or trained; the settings of every row."""
    problems = []
    for what, found in (("--methods", asked.methods), ("--seeds", asked.seeds)):
        if not found:
            problems.append(Problem(what, "names nothing", "Name at least one."))
        if len(set(found)) < len(found):
            problems.append(Problem(what, "names something twice", "Name each once."))
    overrides = Overrides()
    try:
        overrides = read_overrides(asked.settings, asked.methods)
    except InvalidInput as error:
        problems += error.problems
    if problems:
        raise InvalidInput(problems)
    return overrides


def _collect(
    asked: Benchmark,
    make: _Jobs,
    jobs: Sequence[Job],
    steps: tuple[str, ...],
    screened: Screened,
    tasks: dict[str, dict[str, float]],
) -> Results:
    folders = [make.folder(job) for job in jobs]
    return Results(
        model=make.model.name,
        model_root=make.root,
        reference=next((job.model_root for job in jobs if job.method == RETRAINED), None),
        inputs_digest=make.inputs_digest,
        software=jobs[0].software,
        threads=jobs[0].threads,
        methods=tuple(dict.fromkeys(job.method for job in jobs)),
        seeds=tuple(asked.seeds),
        steps=steps,
        settings={job.method: job.settings for job in reversed(jobs)},
        screened=screened,
        rows=tuple(done.row for folder in folders for done in finished_rows(folder)),
        recovered=tuple(
            Recovered.model_validate(read_json(f / RECOVERED)) for f in folders if (f / RECOVERED).is_file()
        ),
        stopped=tuple(Stopped.model_validate(read_json(f / STOPPED)) for f in folders if (f / STOPPED).is_file()),
        tasks=tasks,
    )
