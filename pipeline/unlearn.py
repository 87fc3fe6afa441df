"""Stable Sequential Unlearning: fit a task vector under the mask, and repair what its negation breaks.

In: the parent, the memorised passages, the anchor. Out: vectors over the salient coordinates. Never: a weight
outside the mask, a retain text that resembles a takedown.

SSU (Dou et al., arXiv 2406.10952): L(θ) = L_fgt + ε2·L_rnd, descended from θ_p with only salient weights free;
τ = θ_ft - θ_p is later negated. Deviations, each a setting: the fit is anchored on retain text by KL to v0; after
negation a repair descends the same KL plus unlikelihood on what is still predicted.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from pipeline.anchor import NO_ANCHOR, Anchor, anchor_loss
from pipeline.errors import NumericalFailure
from pipeline.losses import predict, sum_nll, unlikelihood
from pipeline.passages import Passage, batches, with_continuation
from pipeline.settings import UnlearnSettings
from pipeline.sparse import GradientCollector, SalientWeights, Vector

BETAS = (0.9, 0.99)
"""Adam's; a second moment over 100 steps suits fits of a few dozen."""

CHECK_EVERY = 4
"""Iterations of the repair between two looks at what is still reproduced; a look is one forward pass."""

PUSH_GROWTH = 1.25
"""Factor on the weight of unlikelihood at each look: doubles in about 12 iterations."""


@dataclass
class Trace:
    """What a fit did: total loss per iteration and tokens run."""

    losses: list[float] = field(default_factory=list)
    tokens: int = 0


@dataclass(frozen=True)
class Fit:
    """What every fit needs.

    Attributes:
        model: The parent, whose weights are displaced and restored through ``salient``.
        salient: Its salient coordinates.
        forget: Memorised passages of this step.
        anchor: Retain passages with v0's predictions; empty for none.
        put_back: Passages of reinstated texts with the predictions of the model that the step starts from, of which as
            many are held to as of retain passages; empty but in a reinstatement.
        settings: Strengths and lengths.
        pad_id: Padding id.
        max_tokens: Most tokens in a forward pass.
        seed: Seed of the order and of the mismatched pairs.
        progress: Called after each iteration with its number and loss.
    """

    model: nn.Module
    salient: SalientWeights
    forget: Sequence[Passage]
    anchor: Anchor
    settings: UnlearnSettings
    pad_id: int
    max_tokens: int
    seed: int
    progress: Callable[[int, float], None] = lambda iteration, loss: None
    put_back: Anchor = NO_ANCHOR


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


def forget_slices(fit: Fit) -> Sequence[Sequence[Passage]]:
    """The passages of each iteration: all of them, or shuffled slices that cover them at least once."""
    size, count = fit.settings.passages_per_iteration, fit.settings.iterations
    if len(fit.forget) <= size:
        return [fit.forget] * count
    count = max(count, -(-len(fit.forget) // size))
    random_ = random.Random(f"{fit.seed} slices")
    order: list[Passage] = []
    while len(order) < count * size:
        order += random_.sample(fit.forget, len(fit.forget))
    return [order[i * size : (i + 1) * size] for i in range(count)]


def _backward_ce(fit: Fit, passages: Sequence[Passage], weight: float, trace: Trace) -> float:
    """Backpropagate weight · mean token CE of the continuations."""
    tokens = sum(len(p.continuation) for p in passages)
    device = next(fit.model.parameters()).device
    total = 0.0
    for batch in batches(passages, fit.max_tokens, fit.pad_id, device):
        loss = sum_nll(predict(fit.model, batch)) * (weight / tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
        trace.tokens += batch.ids.numel()
    return total


def _backward_unlikelihood(fit: Fit, passages: Sequence[Passage], trace: Trace) -> tuple[float, int]:
    """Backpropagate the summed unlikelihood of the tokens that are still predicted; returns it with their number."""
    device = next(fit.model.parameters()).device
    total, count = 0.0, 0
    for batch in batches(passages, fit.max_tokens, fit.pad_id, device):
        loss, active = unlikelihood(predict(fit.model, batch), fit.settings.repair_floor)
        trace.tokens += batch.ids.numel()
        if active:
            loss.backward()  # type: ignore[no-untyped-call]
            total, count = total + float(loss.detach()), count + active
    return total, count


def _backward_anchor(fit: Fit, random_: random.Random, trace: Trace) -> float:
    """Backpropagate λ · KL(v0 ‖ θ) on some retain passages, and on some of texts that are put back."""
    part = fit.anchor.sample(fit.settings.anchor_passages, random_)
    part = part.joined(fit.put_back.sample(fit.settings.anchor_passages, random_))
    if not fit.settings.anchor_weight or not part.passages:
        return 0.0
    trace.tokens += sum(len(p.ids) for p in part.passages)
    return anchor_loss(fit.model, part, fit.pad_id, fit.max_tokens, fit.settings.anchor_weight)


def backward_ssu(fit: Fit, passages: Sequence[Passage], random_: random.Random, trace: Trace) -> float:
    """Backpropagate L_fgt + ε2·L_rnd + λ·KL and record the loss.

    Raises:
        NumericalFailure: The loss is not finite.
    """
    settings = fit.settings
    loss = _backward_ce(fit, passages, 1.0, trace)
    if settings.random_label_weight:
        pairs = mismatched(passages, settings.random_labels_per_prompt, random_)
        loss += _backward_ce(fit, pairs, settings.random_label_weight, trace)
    loss += _backward_anchor(fit, random_, trace)
    return _record(fit, loss, trace)


def _record(fit: Fit, loss: float, trace: Trace) -> float:
    if not abs(loss) < float("inf"):
        raise NumericalFailure(
            f"The loss of iteration {len(trace.losses) + 1} is not finite. Lower unlearn.learning_rate; "
            "nothing was published."
        )
    trace.losses.append(loss)
    fit.progress(len(trace.losses), loss)
    return loss


class _Descent:
    """AdamW on a vector of salient coordinates; the model follows it. Decay pulls towards the parent."""

    def __init__(self, salient: SalientWeights, vector: Vector, learning_rate: float, weight_decay: float) -> None:
        self.salient, self.vector = salient, vector
        self.optimiser = torch.optim.AdamW(vector.values(), lr=learning_rate, betas=BETAS, weight_decay=weight_decay)

    def step(self, gradients: Vector) -> None:
        for name, value in self.vector.items():
            value.grad = gradients[name]
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.salient.displace(self.vector)


def fit_full(fit: Fit) -> tuple[Vector, Trace]:
    """Fit τ = m ⊙ (θ_ft - θ_p) with the salient coordinates themselves as parameters.

    Memory beside the model: one dense gradient, and about 28 bytes for each salient coordinate.
    """
    trace, random_, vector = Trace(), random.Random(f"{fit.seed} fit"), fit.salient.zeros()
    descent = _Descent(fit.salient, vector, fit.settings.learning_rate, fit.settings.weight_decay)
    try:
        with GradientCollector(fit.salient) as gradients:
            for passages in forget_slices(fit):
                backward_ssu(fit, passages, random_, trace)
                descent.step(gradients.take())
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
    settings, trace = fit.settings, Trace()
    random_ = random.Random(f"{fit.seed} repair")
    vector = {name: value.clone() for name, value in start.items()}
    descent = _Descent(fit.salient, vector, settings.repair_learning_rate, 0.0)
    left: Sequence[Passage] = ()
    weight = 1.0
    try:
        fit.salient.displace(vector)
        with GradientCollector(fit.salient) as gradients:
            for iteration in range(settings.repair_iterations):
                if iteration % CHECK_EVERY == 0:
                    left = remaining()
                    weight = weight * PUSH_GROWTH if left else max(1.0, weight / PUSH_GROWTH)
                    if not left and iteration >= settings.repair_min_iterations:
                        break
                part = random_.sample(left, min(len(left), settings.passages_per_iteration))
                loss, active = _backward_unlikelihood(fit, part, trace)
                push = gradients.take()
                anchor = _backward_anchor(fit, random_, trace)
                pull = gradients.take()
                # The mean over active tokens: the force on the last few must not fade with the many forgotten.
                scale = weight / max(1, active)
                _record(fit, loss * scale + anchor, trace)
                descent.step({name: pull[name] + push[name] * scale for name in pull})
    finally:
        fit.salient.restore()
    return vector, trace
