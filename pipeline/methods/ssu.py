"""Stable Sequential Unlearning, and the task vector it grew from.

SSU (Dou et al., arXiv 2406.10952, eq. 4): L(θ) = L_fgt + ε2·L_rnd, descended from θ_p with only salient weights free;
τ = θ_ft - θ_p is later negated. L_fgt is the mean token cross-entropy of the true continuations, L_rnd that of
mismatched ones after the same prompts.

Deviations, each a setting: the fit is anchored on retain text by KL to v0 (``unlearn.anchor_weight``, 0 in the paper);
mismatched pairs are drawn anew in every iteration, and never hold the truth.

The variants are one loss under other settings (`pipeline.method_defaults`): the paper's without anchor and repair, and
that without its mask or without its random labels. TV (Ilharco et al., arXiv 2212.04089, section 4:
forgetting by negation) is the same loss with m = 1 and ε2 = 0.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from pipeline.fit import Backward, Fit, Trace
from pipeline.methods.method import Method
from pipeline.passages import Passage, with_continuation
from pipeline.terms import backward_anchor, backward_ce


def mismatched(passages: Sequence[Passage], count: int, random_: random.Random) -> list[Passage]:
    """Random labels as SSU has them: each prompt with the continuations of ``count`` other passages.

    Where no other continuation differs, as with a single passage, its own is shuffled.
    """
    result = []
    for passage in passages:
        length = len(passage.continuation)
        # By content, not by place: a slice can hold a passage twice, and a text can repeat itself.
        others = [c for p in passages if (c := p.continuation[:length]) != passage.continuation[: len(c)]]
        for _ in range(count):
            borrowed = random_.choice(others) if others else tuple(random_.sample(passage.continuation, length))
            result.append(with_continuation(passage, borrowed))
    return result


def prepare(fit: Fit) -> Backward:
    """L_fgt + ε2·L_rnd + λ·KL(v0 ‖ θ)."""
    settings = fit.settings

    def backward(passages: Sequence[Passage], random_: random.Random, trace: Trace) -> float:
        loss = backward_ce(fit, passages, 1.0, trace)
        if settings.random_label_weight:
            pairs = mismatched(passages, settings.random_labels_per_prompt, random_)
            loss += backward_ce(fit, pairs, settings.random_label_weight, trace)
        return loss + backward_anchor(fit, fit.anchor, random_, trace)

    return backward


_SOURCE = "Dou et al. 2406.10952, eq. 4"

SSU = Method("ssu", "SSU, anchored and repaired", _SOURCE, prepare)
PAPER = Method("ssu-paper", "SSU (paper)", _SOURCE, prepare)
NO_MASK = Method("ssu-no-mask", "SSU without mask", _SOURCE, prepare)
NO_RANDOM_LABELS = Method("ssu-no-random-labels", "SSU without random labels", _SOURCE, prepare)
TV = Method("tv", "Task vector", "Ilharco et al. 2212.04089, section 4", prepare)
