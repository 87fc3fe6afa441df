"""Membership inference: can texts that were taken down still be told from texts never seen? (METHODS section 4)

In: token scores of both kinds of passages on the same model. Out: AUCs, and PrivLeak against a reference. Pure.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence

import torch

from pipeline.metrics import TokenScores

LOWEST = 0.4
"""Share of the least likely tokens that min-k looks at, as in MUSE."""

CHANCE = 0.5
"""AUC of a model that saw neither kind of text: what PrivLeak is relative to where no such model was trained."""


def lowest_mean(values: torch.Tensor, share: float = LOWEST) -> float:
    """Mean of the lowest ``share`` of T values, at least one (Shi et al. 2310.16789)."""
    count = max(1, math.floor(share * values.numel()))
    return float(values.double().sort().values[:count].mean())


def loss_score(tokens: TokenScores, text: str) -> float:
    """Mean log-probability: the negative loss (Yeom et al. 1709.01604)."""
    return float(tokens.logprobs.double().mean())


def zlib_score(tokens: TokenScores, text: str) -> float:
    """Summed log-probability per byte that zlib needs for the text (Carlini et al. 2012.07805)."""
    return float(tokens.logprobs.double().sum()) / len(zlib.compress(text.encode()))


def min_k_score(tokens: TokenScores, text: str) -> float:
    """Min-K%: mean log-probability of the least likely tokens."""
    return lowest_mean(tokens.logprobs)


def min_k_plus_score(tokens: TokenScores, text: str) -> float:
    """Min-K%++: the same after standardising each token over the vocabulary."""
    return lowest_mean(tokens.standardised)


ATTACKS: Mapping[str, Callable[[TokenScores, str], float]] = {
    "loss": loss_score,
    "zlib": zlib_score,
    "min-k": min_k_score,
    "min-k++": min_k_plus_score,
}
"""Attack → score of a continuation, its tokens and its text; the higher, the more it looks like training text."""

PRIVLEAK_ATTACK = "min-k"
"""The attack that PrivLeak is taken from, as in MUSE."""


def auc(members: Sequence[float], others: Sequence[float]) -> float:
    """Probability that a member scores above a non-member, ties counted half (Mann-Whitney).

    Raises:
        ValueError: One side is empty.
    """
    if not members or not others:
        raise ValueError("an AUC needs passages of both kinds")
    inside, outside = (torch.tensor(v, dtype=torch.float64) for v in (members, others))
    above = (inside[:, None] > outside[None, :]).double() + 0.5 * (inside[:, None] == outside[None, :]).double()
    return float(above.mean())


def privleak(membership: float, reference: float) -> float | None:
    """PrivLeak = 100·(s - s_ref)/s_ref with s = 1 - AUC, as MUSE's code has it (2407.06460, section 3).

    0 is a model that never saw the texts. Negative: they can still be told (-100 for a model that recites them);
    positive: they are predicted worse than text never seen, which gives them away as well.

    Args:
        membership: AUC of the model, taken-down passages against never-seen ones.
        reference: The same of a model trained without the texts; `CHANCE` where there is none.

    Returns:
        A percentage; None where the reference tells the texts apart perfectly, so that nothing can be relative to it.
    """
    if reference == 1:
        return None
    return 100 * ((1 - membership) - (1 - reference)) / (1 - reference)
