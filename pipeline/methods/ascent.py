"""Gradient ascent on the text, alone or beside a term on retain text.

Yao et al. (arXiv 2402.15159): -CE_f (1); -CE_f + λ·CE_r on in-distribution (4) and general (6) retain text, also known
as gradient difference; -CE_f + λ·KL(p_parent ‖ p_θ) on either (5, 7). λ = 1 as published.

Deviations: the KL keeps the parent's top tokens apart and the rest in one bucket; what is in-distribution is decided by
what the parent recites (`pipeline.methods.retain`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from pipeline.fit import Backward, Fit, Trace
from pipeline.methods.method import Method
from pipeline.methods.retain import GENERAL, IN_DISTRIBUTION, Retain, descent, kl_to_parent, nothing
from pipeline.passages import Passage
from pipeline.terms import backward_ce


def ascent(retain: Retain) -> Callable[[Fit], Backward]:
    """-CE_f + a retain term."""

    def prepare(fit: Fit) -> Backward:
        keep = retain(fit)

        def backward(passages: Sequence[Passage], random_: random.Random, trace: Trace) -> float:
            return backward_ce(fit, passages, -1.0, trace) + keep(random_, trace)

        return backward

    return prepare


_SOURCE = "Yao et al. 2402.15159, method"

GA = Method("ga", "GA", f"{_SOURCE} 1", ascent(nothing))
GRAD_DIFF = Method("grad-diff", "GradDiff", f"{_SOURCE} 4", ascent(descent(IN_DISTRIBUTION)))
GRAD_DIFF_GENERAL = Method("grad-diff-general", "GradDiff (general)", f"{_SOURCE} 6", ascent(descent(GENERAL)))
GA_KL = Method("ga-kl", "GA + KL", f"{_SOURCE} 5", ascent(kl_to_parent(IN_DISTRIBUTION)))
GA_KL_GENERAL = Method("ga-kl-general", "GA + KL (general)", f"{_SOURCE} 7", ascent(kl_to_parent(GENERAL)))
