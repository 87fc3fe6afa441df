"""lm-evaluation-harness on the benchmark's models: MMLU, HellaSwag and the like, for models that can do them.

In: a job's folder and task names. Out: one score per task. Optional: ``pip install 'takedown-pipeline[bench]'``.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from pipeline.benchmark.records import Finished, Job
from pipeline.benchmark.subject import put_weights
from pipeline.errors import UsageError
from pipeline.models import load_model, load_tokenizer

FIRST = (
    "acc_norm,none", "acc,none", "exact_match,strict-match", "exact_match,none", "word_perplexity,none",
)  # fmt: skip
"""The metric that stands for a task, the first that it has."""


def harness() -> tuple[Any, Any]:
    """``simple_evaluate`` and ``HFLM`` of lm-evaluation-harness.

    Raises:
        UsageError: It is not installed.
    """
    try:
        return import_module("lm_eval").simple_evaluate, import_module("lm_eval.models.huggingface").HFLM
    except ImportError as error:
        raise UsageError(
            f"--tasks needs lm-evaluation-harness, which is not installed ({error}). "
            "Run pip install 'takedown-pipeline[bench]', or leave --tasks out."
        ) from error


def run_tasks(job: Job, folder: Path, last: Finished | None, tasks: Sequence[str]) -> dict[str, float]:
    """Run tasks on the final model of a job.

    Args:
        job: The job.
        folder: Its folder.
        last: Its last step, whose weights are put into the model.
        tasks: Names that the harness knows.

    Returns:
        Task → score, of all tasks and groups that the harness reports.
    """
    simple_evaluate, wrapped = harness()
    source = Path(job.model)
    model, tokenizer = load_model(source, job.settings.runtime.device), load_tokenizer(source)
    if last is not None and last.weights is not None:
        put_weights(model, folder, last.weights)
    found = simple_evaluate(model=wrapped(pretrained=model, tokenizer=tokenizer), tasks=list(tasks), log_samples=False)
    scores = {}
    for task, metrics in found["results"].items():
        named = next((name for name in FIRST if name in metrics), None)
        if named is not None:
            scores[str(task)] = float(metrics[named])
    return scores
