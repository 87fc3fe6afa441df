"""The terms that losses are made of: each backpropagates its share batch by batch and returns its value.

In: a `Fit` and passages. Out: gradients, left where whoever called finds them (in `pipeline.sparse.GradientCollector`,
or in the factors of LoRA). Summing terms is summing calls, so that no more than one batch is ever in memory.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch

from pipeline.anchor import Anchor, anchor_loss
from pipeline.fit import Fit, Trace
from pipeline.losses import Predictions, predict, relabelled, sum_nll, unlikelihood
from pipeline.passages import Passage, batches

BatchLoss = Callable[[Predictions, Sequence[int]], torch.Tensor]
"""Predictions of a batch and the indices of its rows among the passages → a scalar."""


def device_of(fit: Fit) -> torch.device:
    """Where the model is."""
    return next(fit.model.parameters()).device


def backward_sum(fit: Fit, passages: Sequence[Passage], share_of: BatchLoss, trace: Trace) -> float:
    """A loss that is a sum over passages, one batch at a time.

    Args:
        share_of: Predictions of a batch and the indices of its rows in ``passages`` → its share of the loss, a scalar.
    """
    total = 0.0
    for batch in batches(passages, fit.max_tokens, fit.pad_id, device_of(fit)):
        loss = share_of(predict(fit.model, batch), batch.rows)
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
        trace.tokens += batch.ids.numel()
    return total


def backward_ce(fit: Fit, passages: Sequence[Passage], weight: float, trace: Trace) -> float:
    """weight · mean token cross-entropy of the continuations; a negative weight ascends."""
    tokens = sum(len(p.continuation) for p in passages)
    return backward_sum(fit, passages, lambda predictions, rows: sum_nll(predictions) * (weight / tokens), trace)


def backward_labels(fit: Fit, passages: Sequence[Passage], labels: Sequence[Sequence[int]], trace: Trace) -> float:
    """Mean token cross-entropy of other labels than the true continuations; the inputs stay the true text.

    Args:
        labels: For each passage one label for each token of its continuation.
    """
    tokens = sum(map(len, labels))

    def share_of(predictions: Predictions, rows: Sequence[int]) -> torch.Tensor:
        wanted = torch.tensor([label for row in rows for label in labels[row]], device=predictions.targets.device)
        return sum_nll(relabelled(predictions, wanted)) / tokens

    return backward_sum(fit, passages, share_of, trace)


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


def backward_anchor(fit: Fit, pool: Anchor, random_: random.Random, trace: Trace) -> float:
    """λ · mean over positions of KL(reference ‖ θ) on some passages of a pool, and as many of texts put back."""
    count = fit.settings.anchor_passages
    part = pool.sample(count, random_)
    return backward_kl(fit, part.joined(fit.put_back.sample(count, random_)), trace)


def backward_kl(fit: Fit, part: Anchor, trace: Trace) -> float:
    """λ · mean over positions of KL(reference ‖ θ) - ε · log p_θ(true token), with ε = ``anchor_truth``; nothing is run
    where λ is 0 or there is no passage."""
    settings = fit.settings
    if not settings.anchor_weight or not part.passages:
        return 0.0
    trace.tokens += sum(len(p.ids) for p in part.passages)
    return anchor_loss(fit.model, part, fit.pad_id, fit.max_tokens, settings.anchor_weight, settings.anchor_truth)


def backward_retain_ce(fit: Fit, pool: Sequence[Passage], random_: random.Random, trace: Trace) -> float:
    """λ · mean token cross-entropy of some passages of a pool, and as many of texts put back."""
    part = some(fit, pool, random_)
    if not fit.settings.anchor_weight or not part:
        return 0.0
    return backward_ce(fit, part, fit.settings.anchor_weight, trace)


def some(fit: Fit, pool: Sequence[Passage], random_: random.Random) -> Sequence[Passage]:
    """The retain passages of one iteration: of a pool, and as many of texts that are put back."""
    count = fit.settings.anchor_passages
    put_back = fit.put_back.sample(count, random_).passages
    return [*random_.sample(pool, min(count, len(pool))), *put_back]
