"""The terms that losses are made of: each backpropagates its share batch by batch and returns its value.

In: a `Fit` and passages. Out: gradients, left where whoever called finds them (in `pipeline.sparse.GradientCollector`,
or in the factors of LoRA). Summing terms is summing calls, so that no more than one batch is ever in memory.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from pipeline.anchor import Anchor, anchor_loss, build_anchor
from pipeline.fit import Fit, Trace
from pipeline.losses import predict, sum_nll, unlikelihood
from pipeline.passages import Passage, batches


def device_of(fit: Fit) -> torch.device:
    """Where the model is."""
    return next(fit.model.parameters()).device


def backward_ce(fit: Fit, passages: Sequence[Passage], weight: float, trace: Trace) -> float:
    """weight · mean token cross-entropy of the continuations; a negative weight ascends."""
    tokens = sum(len(p.continuation) for p in passages)
    total = 0.0
    for batch in batches(passages, fit.max_tokens, fit.pad_id, device_of(fit)):
        loss = sum_nll(predict(fit.model, batch)) * (weight / tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
        trace.tokens += batch.ids.numel()
    return total


def backward_unlikelihood(fit: Fit, passages: Sequence[Passage], weight: float, trace: Trace) -> tuple[float, int]:
    """weight · summed unlikelihood of the tokens that are still predicted; returns it with their number."""
    total, count = 0.0, 0
    for batch in batches(passages, fit.max_tokens, fit.pad_id, device_of(fit)):
        loss, active = unlikelihood(predict(fit.model, batch), fit.settings.repair_floor)
        trace.tokens += batch.ids.numel()
        if active:
            loss = loss * weight
            loss.backward()  # type: ignore[no-untyped-call]
            total, count = total + float(loss.detach()), count + active
    return total, count


def retain_sample(fit: Fit, pool: Anchor, random_: random.Random) -> Anchor:
    """The retain passages of one iteration: some of a pool, and as many of texts that are put back."""
    part = pool.sample(fit.settings.anchor_passages, random_)
    return part.joined(fit.put_back.sample(fit.settings.anchor_passages, random_))


def backward_anchor(fit: Fit, pool: Anchor, random_: random.Random, trace: Trace) -> float:
    """λ · mean over positions of KL(reference ‖ θ) on some passages of a pool; nothing is run where λ is 0."""
    part = retain_sample(fit, pool, random_)
    if not fit.settings.anchor_weight or not part.passages:
        return 0.0
    trace.tokens += sum(len(p.ids) for p in part.passages)
    return anchor_loss(fit.model, part, fit.pad_id, fit.max_tokens, fit.settings.anchor_weight)


def backward_retain_ce(fit: Fit, pool: Anchor, random_: random.Random, trace: Trace) -> float:
    """λ · mean token cross-entropy of some retain passages of a pool: gradient descent on what is to be kept."""
    part = retain_sample(fit, pool, random_)
    if not fit.settings.anchor_weight or not part.passages:
        return 0.0
    return backward_ce(fit, part.passages, fit.settings.anchor_weight, trace)


def parent_anchor(fit: Fit, passages: Sequence[Passage]) -> Anchor:
    """Retain passages with the predictions of the model as it stands, the parent when a method is prepared.

    The reference of published methods; the product's own is v0, ``fit.anchor``, so that drift does not add up.
    """
    return build_anchor(fit.model, passages, fit.settings.anchor_top_k, fit.pad_id, fit.max_tokens)
