"""Descent over the salient coordinates: fit what a method's loss asks for, and repair what negation breaks.

In: the parent, the memorised passages, a loss. Out: vectors over the salient coordinates. Never: a weight outside the
mask, a retain text that resembles a takedown.

The loss comes from `pipeline.methods`. The repair belongs to the product: KL to v0 on retain text, unlikelihood on what
is still predicted.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch

from pipeline.fit import Backward, Descent, Fit, Trace, record, schedule
from pipeline.passages import Passage
from pipeline.sparse import GradientCollector, SalientWeights, Vector
from pipeline.terms import backward_anchor, backward_unlikelihood

BETAS = (0.9, 0.99)
"""Adam's; a second moment over 100 steps suits fits of a few dozen."""

CHECK_EVERY = 4
"""Iterations of the repair between two looks at what is still reproduced; a look is one forward pass."""

PUSH_GROWTH = 1.25
"""Factor on the weight of unlikelihood at each look: doubles in about 12 iterations."""


class _Descent:
    """AdamW on a vector of salient coordinates; the model follows it. Decay pulls towards the parent."""

    def __init__(self, salient: SalientWeights, vector: Vector, learning_rate: float, weight_decay: float) -> None:
        self.salient, self.vector = salient, vector
        self.learning_rate = learning_rate
        self.optimiser = torch.optim.AdamW(vector.values(), lr=learning_rate, betas=BETAS, weight_decay=weight_decay)

    def rate(self, share: float) -> None:
        """Take steps of this share of the learning rate from here on."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate * share

    def step(self, gradients: Vector) -> None:
        for name, value in self.vector.items():
            value.grad = gradients[name]
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.salient.displace(self.vector)


def fit_full(fit: Fit, backward: Backward) -> tuple[Vector, Trace]:
    """Fit m ⊙ (θ_ft - θ_p) with the salient coordinates themselves as parameters.

    Memory beside the model: one dense gradient, and about 28 bytes for each salient coordinate.

    Args:
        fit: The parent and what to work on.
        backward: The loss to descend, prepared at the parent.

    Returns:
        The displacement that the descent found, and the trace. The parent's weights are back in the model.

    Raises:
        NumericalFailure: The loss or a gradient is not finite.
    """
    trace, random_, vector = Trace(), random.Random(f"{fit.seed} fit"), fit.salient.zeros()
    descent = _Descent(fit.salient, vector, fit.settings.learning_rate, fit.settings.weight_decay)
    whole = Descent(descent.optimiser, vector, random_, trace, backward)
    try:
        done, _ = whole.take_up(fit.halfway)
        if done:
            fit.salient.displace(vector)
        with GradientCollector(fit.salient) as gradients:
            for passages, share in schedule(fit, trace, done):
                descent.rate(share)
                record(fit, backward(passages, random_, trace), trace)
                descent.step(gradients.take())
                whole.note(fit.halfway, len(trace.losses))
    finally:
        fit.salient.restore()
    return vector, trace


def repair(fit: Fit, start: Vector, remaining: Callable[[], Sequence[Passage]]) -> tuple[Vector, Trace]:
    """Mend a negated model: KL to v0 on retain text, unlikelihood on what is not forgotten yet.

    Only passages of requests above the target are pushed, so that those already there are not forgotten further than
    text that was never seen. The push grows as long as some are left (dual ascent on the constraint), since no fixed
    weight against the anchor suits every text.

    Args:
        fit: As in `fit_full`; ``fit.forget`` is not used.
        start: Displacement from the parent to start at, -α·τ.
        remaining: The passages, of this and of earlier steps, whose requests the model as it stands still
            reproduces above the target; asked every few iterations.

    Returns:
        The displacement found, and the trace. The parent's weights are back in the model.
    """
    settings = fit.settings
    trace, random_ = Trace(begun=settings.repair_iterations), random.Random(f"{fit.seed} repair")
    vector = {name: value.clone() for name, value in start.items()}
    descent = _Descent(fit.salient, vector, settings.repair_learning_rate, 0.0)
    left: Sequence[Passage] = ()
    whole = Descent(descent.optimiser, vector, random_, trace)
    try:
        done, noted = whole.take_up(fit.halfway)
        weight = float(noted.get("weight", 1.0))
        fit.salient.displace(vector)
        with GradientCollector(fit.salient) as gradients:
            for iteration in range(done, settings.repair_iterations):
                if iteration % CHECK_EVERY == 0:
                    if iteration > done:
                        whole.note(fit.halfway, iteration, weight=weight)
                    left = remaining()
                    weight = weight * PUSH_GROWTH if left else max(1.0, weight / PUSH_GROWTH)
                    if not left and iteration >= settings.repair_min_iterations:
                        break
                part = random_.sample(left, min(len(left), settings.passages_per_iteration))
                loss, active = backward_unlikelihood(fit, part, 1.0, trace)
                push = gradients.take()
                anchor = backward_anchor(fit, fit.anchor, random_, trace)
                pull = gradients.take()
                # The mean over active tokens: the force on the last few must not fade with the many forgotten.
                scale = weight / max(1, active)
                record(fit, loss * scale + anchor, trace)
                descent.step({name: pull[name] + push[name] * scale for name in pull})
    finally:
        fit.salient.restore()
    return vector, trace
