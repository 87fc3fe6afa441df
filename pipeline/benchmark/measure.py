"""Measure a model on groups of passages: one forward pass and one greedy continuation feed every metric.

In: a model and passages. Out: what each passage shows, and scores of groups made of it. Never: the answer in a prompt,
another decoding for another method.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pipeline.benchmark.records import GroupScore
from pipeline.evaluate import spread
from pipeline.membership import ATTACKS, auc
from pipeline.metrics import (
    PassageScore,
    accumulated_common_runs,
    exact_memorisation,
    extractable,
    generate,
    longest_common_run,
    mean_nll,
    normalised_words,
    passage_score,
    repetition,
    rouge,
    score_tokens,
)
from pipeline.passages import Passage, pad_id

GENERATED = 16
"""Passages of a group that are continued greedily, spread evenly over it."""

QUERIES, CHANCE = 1000, 0.5
"""(n, p) of extraction by sampling: a thousand samples give the passage away at even odds or better."""


@dataclass(frozen=True)
class Teacher:
    """What one forward pass shows of a passage."""

    score: PassageScore
    extractable: bool
    attacks: Mapping[str, float]


@dataclass(frozen=True)
class Written:
    """What one greedy continuation shows of a passage; see `GroupScore`."""

    rouge_1: float
    rouge_l: float
    run: int
    accumulated: int
    repetition: float


@dataclass(frozen=True)
class Measured:
    """Passages of one group: all of them teacher-forced (or none), some of them continued."""

    passages: int
    teacher: Sequence[Teacher]
    written: Sequence[Written]


def compare(truth: str, generated: str) -> Written:
    """A continuation against the true one."""
    expected, found = normalised_words(truth), normalised_words(generated)
    one, longest = rouge(truth, generated)
    return Written(
        one, longest, longest_common_run(expected, found), accumulated_common_runs(expected, found), repetition(found)
    )


def measure(
    model: nn.Module,
    tokenizer: Any,
    groups: Mapping[str, Sequence[Passage]],
    max_tokens: int,
    progress: Callable[[int], None] = lambda done: None,
    processors: Sequence[Any] = (),
) -> dict[str, Measured]:
    """Measure every group.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        groups: Name → passages.
        max_tokens: Most tokens in a forward pass.
        progress: Called with the number of passages done.
        processors: Logits processors of generation. With any the model predicts one thing and writes another, so that
            nothing is teacher-forced.

    Returns:
        Name → what was found, in the order given.
    """
    found = {}
    for name, passages in groups.items():
        teacher = [] if processors else _teacher(model, tokenizer, passages, max_tokens)
        picked = spread(passages, GENERATED)
        answers = generate(model, tokenizer, picked, max_tokens, processors)
        truths = [tokenizer.decode(p.continuation) for p in picked]
        written = [compare(truth, answer) for truth, answer in zip(truths, answers, strict=True)]
        found[name] = Measured(len(passages), teacher, written)
        progress(len(passages))
    return found


def _teacher(model: nn.Module, tokenizer: Any, passages: Sequence[Passage], max_tokens: int) -> list[Teacher]:
    tokens = score_tokens(model, passages, pad_id(tokenizer), max_tokens)
    texts = [tokenizer.decode(p.continuation) for p in passages]
    scores = [passage_score(found) for found in tokens]
    return [
        Teacher(s, extractable(-s.nll, QUERIES, CHANCE), {a: score(t, text) for a, score in ATTACKS.items()})
        for s, t, text in zip(scores, tokens, texts, strict=True)
    ]


def together(parts: Iterable[Measured]) -> Measured:
    """Several groups as one."""
    parts = list(parts)
    return Measured(
        sum(p.passages for p in parts), [t for p in parts for t in p.teacher], [w for p in parts for w in p.written]
    )


def group_score(measured: Measured) -> GroupScore:
    """The scores of a group."""
    scores, written = [t.score for t in measured.teacher], measured.written
    values: dict[str, float | int] = {}
    if scores:
        values |= {
            "exact_memorisation": exact_memorisation(scores),
            "extraction_strength": statistics.fmean(s.extraction for s in scores),
            "nll": mean_nll(scores),
            "extractable": statistics.fmean(t.extractable for t in measured.teacher),
        }
    if written:
        values |= {
            "rouge_1": statistics.fmean(w.rouge_1 for w in written),
            "rouge_l": statistics.fmean(w.rouge_l for w in written),
            "longest_run": statistics.fmean(w.run for w in written),
            "longest_run_max": max(w.run for w in written),
            "accumulated_runs": statistics.fmean(w.accumulated for w in written),
            "repetition": statistics.fmean(w.repetition for w in written),
        }
    return GroupScore.model_validate({"passages": measured.passages, **values})


def membership(taken: Measured, unseen: Measured | None) -> dict[str, float]:
    """Attack → AUC of passages taken down against never-seen ones; empty where either is missing."""
    if unseen is None or not taken.teacher or not unseen.teacher:
        return {}
    return {a: auc([t.attacks[a] for t in taken.teacher], [t.attacks[a] for t in unseen.teacher]) for a in ATTACKS}
