"""Evaluate: how well a model reproduces texts, the same way for every model and every text.

In: a model and encoded texts with the passages that count. Out: a `TextScore` for each. Never: the answer in the
prompt, or another decoding for another model.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from pipeline.metrics import (
    PassageScore,
    exact_memorisation,
    generate,
    longest_common_run,
    mean_nll,
    normalised_words,
    rouge,
    score_passages,
)
from pipeline.passages import Passage, pad_id
from pipeline.records import NeverSeenLevel, TextScore
from pipeline.settings import ScreenSettings


def score_texts(
    model: nn.Module,
    tokenizer: Any,
    texts: Mapping[str, Sequence[Passage]],
    generate_passages: int,
    max_tokens: int,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, TextScore]:
    """Score texts by their passages; texts without passages (too short to prompt) are left out.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        texts: Name → passages.
        generate_passages: Passages per text to continue greedily; 0 leaves ROUGE and the run empty.
        max_tokens: Most tokens in a forward pass.
        progress: Called with the number of passages done.

    Returns:
        Name → score, in the order given.
    """
    texts = {name: passages for name, passages in texts.items() if passages}
    flat = [p for passages in texts.values() for p in passages]
    scores = iter(score_passages(model, flat, pad_id(tokenizer), max_tokens))
    progress(len(flat))
    picked = {name: spread(passages, generate_passages) for name, passages in texts.items()}
    prompts = [p for passages in picked.values() for p in passages]
    answers = iter(generate(model, tokenizer, prompts, max_tokens) if prompts else [])
    progress(len(prompts))
    result = {}
    for name, passages in texts.items():
        teacher = [next(scores) for _ in passages]
        pairs = [(tokenizer.decode(p.continuation), next(answers)) for p in picked[name]]
        result[name] = summarise(teacher, pairs)
    return result


def summarise(scores: Sequence[PassageScore], pairs: Sequence[tuple[str, str]]) -> TextScore:
    """One text's score from its passages' scores and its (truth, generated) pairs."""
    rouges = [rouge(truth, generated) for truth, generated in pairs]
    runs = [longest_common_run(normalised_words(t), normalised_words(g)) for t, g in pairs]
    return TextScore(
        exact_memorisation=exact_memorisation(scores),
        extraction_strength=statistics.fmean(s.extraction for s in scores),
        rouge_1=statistics.fmean(r[0] for r in rouges) if rouges else None,
        rouge_l=statistics.fmean(r[1] for r in rouges) if rouges else None,
        longest_run=max(runs) if runs else None,
        nll=mean_nll(scores),
    )


def spread(passages: Sequence[Passage], count: int) -> list[Passage]:
    """``count`` passages evenly spread over the text, the first one included."""
    if count >= len(passages):
        return list(passages)
    return [passages[i * len(passages) // count] for i in range(count)]


def never_seen_level(
    held_out: Sequence[PassageScore], retain: Sequence[PassageScore], settings: ScreenSettings
) -> NeverSeenLevel:
    """The level to forget to, from held-out text; else from retain text; else as assumed in the settings.

    Retain text may have been trained on, so its level errs upwards: less is screened, less is forgotten.
    Outliers there (memorised passages) are kept out by taking the lower half's spread around the median.
    """
    if len(held_out) >= 2:
        values = [s.hits / s.tokens for s in held_out if s.tokens]
        return NeverSeenLevel(
            mean=statistics.fmean(values), std=statistics.pstdev(values), passages=len(values), source="held-out"
        )
    if len(retain) >= 2:
        values = sorted(s.hits / s.tokens for s in retain if s.tokens)
        centre = statistics.median(values)
        lower = [v for v in values if v <= centre]
        std = (sum((v - centre) ** 2 for v in lower) / len(lower)) ** 0.5
        return NeverSeenLevel(mean=centre, std=std, passages=len(values), source="retain")
    return NeverSeenLevel(mean=settings.assumed_mean, std=settings.assumed_std, passages=0, source="assumed")
