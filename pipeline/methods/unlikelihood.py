"""Unlikelihood of the text beside KL on retain text.

-Σ log(1 - p_θ(y_t)) / |y| + λ·KL(v0 ‖ θ), the first term by Welleck et al. (arXiv 1908.04319, eq. 5). Deviations: only
tokens still predicted with more than ``unlearn.repair_floor`` are pushed, a soft stop. The combination with KL is not
published, so that the product's form is used, whose reference is v0 and not the parent: held to the parent, small
drifts add up over the steps.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from pipeline.fit import Backward, Fit, Trace
from pipeline.methods.method import Method
from pipeline.methods.retain import EVERY, chosen
from pipeline.passages import Passage
from pipeline.terms import backward_anchor, backward_unlikelihood


def prepare(fit: Fit) -> Backward:
    """Mean unlikelihood + λ·KL(v0 ‖ θ)."""
    chosen(fit, EVERY)  # refuses where there is nothing to hold on to

    def backward(passages: Sequence[Passage], random_: random.Random, trace: Trace) -> float:
        tokens = sum(len(p.continuation) for p in passages)
        loss, _ = backward_unlikelihood(fit, passages, 1 / tokens, trace)
        return loss + backward_anchor(fit, fit.anchor, random_, trace)

    return backward


UNLIKELIHOOD_KL = Method("unlikelihood-kl", "Unlikelihood + KL", "Welleck et al. 1908.04319, eq. 5", prepare)
