"""Evaluate: how well a model reproduces texts, the same way for every model and every text.

In: a model and encoded texts with the passages that count. Out: a `TextScore` for each. Never: the answer in the
prompt, or another decoding for another model.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from pipeline.errors import NumericalFailure
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
) -> dict[str, TextScore]:
    """Score texts by their passages; texts without passages (too short to prompt) are left out.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        texts: Name → passages.
        generate_passages: Passages per text to continue greedily; 0 leaves ROUGE and the run empty.
        max_tokens: Most tokens in a forward pass.

    Returns:
        Name → score, in the order given.
    """
    texts = {name: passages for name, passages in texts.items() if passages}
    flat = [p for passages in texts.values() for p in passages]
    scores = iter(score_passages(model, flat, pad_id(tokenizer), max_tokens))
    picked = {name: spread(passages, generate_passages) for name, passages in texts.items()}
    prompts = [p for passages in picked.values() for p in passages]
    answers = iter(generate(model, tokenizer, prompts, max_tokens) if prompts else [])
    result = {}
    for name, passages in texts.items():
        teacher = [next(scores) for _ in passages]
        pairs = [(tokenizer.decode(p.continuation), next(answers)) for p in picked[name]]
        result[name] = summarise(teacher, pairs)
    return result


def scores_by_text(
    model: nn.Module, texts: Mapping[str, Sequence[Passage]], pad: int, max_tokens: int
) -> dict[str, list[PassageScore]]:
    """Teacher-forced scores of every text's passages, all texts batched together."""
    flat = [p for passages in texts.values() for p in passages]
    scores = iter(score_passages(model, flat, pad, max_tokens))
    return {name: [next(scores) for _ in passages] for name, passages in texts.items()}


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


CERTAIN = 0.9
"""A passage predicted better than this is memorised, however widely never-seen passages scatter."""


def memorised_above(level: NeverSeenLevel, settings: ScreenSettings) -> float:
    """Exact memorisation above which a passage is memorised: mean + sigma·std of never-seen text, at most `CERTAIN`."""
    return min(level.mean + settings.sigma * level.std, CERTAIN)


PLAUSIBLE = 0.6
"""No text that was never seen is predicted better than this by teacher forcing; large models reach about 0.45."""
OUTLIER = 6.0
"""Spreads above the median from which a held-out passage counts as seen."""


def _lower_half(values: Sequence[float]) -> tuple[float, float]:
    """Median, and root mean square deviation of the values below it: neither is moved by recited passages above."""
    centre = statistics.median(values)
    lower = [v for v in values if v <= centre]
    return centre, (sum((v - centre) ** 2 for v in lower) / len(lower)) ** 0.5


def never_seen_level(
    held_out: Sequence[PassageScore], retain: Sequence[PassageScore], settings: ScreenSettings
) -> NeverSeenLevel:
    """The level to forget to, from held-out text; else from retain text; else as assumed in the settings.

    Passages far above the rest are recited, so they were seen, and do not count. Retain text may have been trained on,
    so its level errs upwards: where even its median is recited, it says nothing and the assumed level is used.

    Raises:
        NumericalFailure: The held-out text is recited. A level taken from it would call every work not memorised.
    """
    if len(held_out) >= 2:
        scored = [s for s in held_out if s.tokens]
        centre, spread_ = _lower_half([s.hits / s.tokens for s in scored])
        unseen = [s for s in scored if s.hits / s.tokens <= centre + OUTLIER * max(spread_, 0.02)]
        values = [s.hits / s.tokens for s in unseen]
        mean, std = statistics.fmean(values), statistics.pstdev(values)
        if mean > PLAUSIBLE:
            raise NumericalFailure(
                f"The model predicts {mean:.0%} of the held-out text: it was seen in training, and no work could be "
                "told from it. Put text that the model never saw into reference/heldout."
            )
        return NeverSeenLevel(mean=mean, std=std, passages=len(values), source="held-out", nll=mean_nll(unseen))
    scored = [s for s in retain if s.tokens]
    if len(retain) >= 2 and _lower_half([s.hits / s.tokens for s in scored])[0] <= PLAUSIBLE:
        centre, std = _lower_half([s.hits / s.tokens for s in scored])
        nll = statistics.median(s.nll / s.tokens for s in scored)
        return NeverSeenLevel(mean=centre, std=std, passages=len(scored), source="retain", nll=nll)
    return NeverSeenLevel(mean=settings.assumed_mean, std=settings.assumed_std, passages=0, source="assumed")
