"""Gradient ascent on the text, alone or beside a term on retain text.

Yao et al. (arXiv 2402.15159, table of methods, 1 and 4 to 7): -CE_f, alone (GA).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from pipeline.fit import Backward, Fit, Trace
from pipeline.methods.method import Method
from pipeline.passages import Passage
from pipeline.terms import backward_ce


def prepare(fit: Fit) -> Backward:
    """-CE_f."""

    def backward(passages: Sequence[Passage], random_: random.Random, trace: Trace) -> float:
        return backward_ce(fit, passages, -1.0, trace)

    return backward


GA = Method("ga", "Gradient ascent", "Yao et al. 2402.15159, method 1", prepare)
