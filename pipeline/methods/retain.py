"""Retain terms: which retain text a method holds on to, and how.

A term is prepared at the parent like the method it belongs to. Which text is which: the pool is ``fit.anchor``, the
passages of all retain documents that do not resemble a takedown. *In-distribution* are those that v0 recites, as it
did the text to be removed; *general* are all others. Both published methods (Yao et al., arXiv 2402.15159) take
them from data sets known beforehand; here the only thing known of a retain document is what the model does with it.

Published terms refer to the parent: gradient descent needs no reference, and KL(p_parent ‖ p_θ) is computed here, with
the top tokens apart and the rest in one bucket. The product's own form refers to v0 (`pipeline.terms.backward_anchor`
on ``fit.anchor``), because small drifts from parent to parent add up.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.anchor import build_anchor
from pipeline.errors import UsageError
from pipeline.fit import Fit, Trace
from pipeline.passages import Passage
from pipeline.terms import backward_anchor, backward_retain_ce

Term = Callable[[random.Random, Trace], float]
"""The retain term of one iteration: backpropagates λ · loss on some passages and returns it."""


@dataclass(frozen=True)
class Pool:
    """The retain passages of a method.

    Attributes:
        words: What they are, for an error.
        choose: Picks them; the model is the parent.
    """

    words: str
    choose: Callable[[Fit], Sequence[Passage]]


Retain = Callable[[Fit], Term]
"""A retain term before it is prepared."""


def nothing(fit: Fit) -> Term:
    """No retain term."""
    return lambda random_, trace: 0.0


EVERY = Pool("any", lambda fit: fit.anchor.passages)
IN_DISTRIBUTION = Pool("recited by v0", lambda fit: fit.anchor.split()[0].passages)
GENERAL = Pool("not recited by v0", lambda fit: fit.anchor.split()[1].passages)


def descent(pool: Pool) -> Retain:
    """λ · CE of retain passages (GD)."""

    def prepare(fit: Fit) -> Term:
        passages = chosen(fit, pool)
        return lambda random_, trace: backward_retain_ce(fit, passages, random_, trace)

    return prepare


def kl_to_parent(pool: Pool) -> Retain:
    """λ · KL(p_parent ‖ p_θ) on retain passages."""

    def prepare(fit: Fit) -> Term:
        passages = chosen(fit, pool)
        found = build_anchor(fit.model, passages, fit.settings.anchor_top_k, fit.pad_id, fit.max_tokens)
        return lambda random_, trace: backward_anchor(fit, found, random_, trace)

    return prepare


def chosen(fit: Fit, pool: Pool) -> Sequence[Passage]:
    """The passages of a pool; none are needed where the term weighs nothing.

    Raises:
        UsageError: There are none.
    """
    if not fit.settings.anchor_weight:
        return ()
    passages = pool.choose(fit)
    if not passages:
        raise UsageError(
            f"unlearn.method = {fit.settings.method}: needs retain text ({pool.words}), and there is none. Put such "
            "texts into reference/retain, take another method, or set unlearn.anchor_weight = 0 to do without."
        )
    return passages
