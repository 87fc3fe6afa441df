"""Measurements as a table for the terminal: before → after, a row for each text, or kind of text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from rich.table import Table

from flows.terminal import table
from pipeline.records import Comparison, Evaluation

GROUPS = {"earlier": "earlier requests", "kept": "kept works", "held-out": "held-out texts"}


def score_table(evaluation: Evaluation, answers: Mapping[str, str]) -> Table:
    """Before → after: a row for each request of the batch, then the means of earlier, kept and held-out texts.

    Args:
        evaluation: What was measured.
        answers: State of each request, shown beside its id.
    """
    groups: dict[str, list[Comparison]] = {}
    for c in evaluation.comparisons:
        groups.setdefault(c.role if c.role in GROUPS else c.name, []).append(c)
    rows = [
        (
            f"{GROUPS[key]} ({len(found)})" if key in GROUPS else f"{key} {answers.get(key, '')}",
            change(found, "rouge_l"),
            change(found, "exact_memorisation"),
            change(found, "extraction_strength"),
            change(found, "nll"),
        )
        for key, found in groups.items()
    ]
    level = evaluation.level
    title = f"Before → after (never-seen level: EM {level.mean:.3f} ± {level.std:.3f}, {level.source})"
    return table(title, ("text", "ROUGE-L", "EM", "ES", "perplexity"), rows)


def change(found: Sequence[Comparison], field: str) -> str:
    """Mean of a score before and after, in as few characters as can be read; NLL is shown as perplexity."""
    pairs = [(getattr(c.before, field), getattr(c.after, field)) for c in found]
    if any(value is None for pair in pairs for value in pair):
        return ""
    means = [statistics.fmean(column) for column in zip(*pairs, strict=True)]
    if field == "nll":
        return "→".join(f"{math.exp(min(m, 700)):.1f}" for m in means)
    return "→".join(f"{m:.3f}" for m in means)
