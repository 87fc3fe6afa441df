"""The losses of unlearning as pure functions of logits; they know no files, models or settings.

Shapes: logits (B, N, V) are next-token predictions for positions whose true tokens are ``targets`` (B, N) int64;
``scored`` (B, N) bool marks the positions that count. All arithmetic in float32, results in nats.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.passages import TokenBatch


class Predictions(NamedTuple):
    """Next-token predictions aligned with what they predict.

    Attributes:
        logits: (B, N, V), the model's dtype.
        targets: (B, N) int64.
        scored: (B, N) bool.
    """

    logits: torch.Tensor
    targets: torch.Tensor
    scored: torch.Tensor


def predict(model: nn.Module, batch: TokenBatch) -> Predictions:
    """One forward pass; logits only from the first scored token on, since the vocabulary dominates memory."""
    length = batch.ids.shape[1]
    first = int(batch.scored.any(dim=0).nonzero()[0, 0]) if bool(batch.scored.any()) else 1
    first = max(first, 1)  # the first token of a sequence has no prediction
    keep = length - first + 1
    logits = model(input_ids=batch.ids, attention_mask=batch.attention, logits_to_keep=keep, use_cache=False).logits
    return Predictions(logits[:, -keep:-1], batch.ids[:, first:], batch.scored[:, first:])


def token_nll(predictions: Predictions) -> torch.Tensor:
    """-log p(target) per position, (B, N) float32; meaningless where not scored."""
    logits = predictions.logits.float()
    return F.cross_entropy(logits.transpose(1, 2), predictions.targets, reduction="none")


def sum_nll(predictions: Predictions) -> torch.Tensor:
    """Summed cross-entropy over the scored positions, a scalar (CE of METHODS section 1, before the mean)."""
    return (token_nll(predictions) * predictions.scored).sum()


def sequence_nll(predictions: Predictions) -> torch.Tensor:
    """-log p(continuation) of each row, summed over its scored positions, (B,) float32."""
    return (token_nll(predictions) * predictions.scored).sum(1)


def relabelled(predictions: Predictions, labels: torch.Tensor) -> Predictions:
    """The same predictions with other labels at the scored positions; inputs stay the true text.

    Args:
        predictions: As `predict` returns them.
        labels: (S,) int64, one for each scored position, row by row.
    """
    return predictions._replace(targets=predictions.targets.masked_scatter(predictions.scored, labels))


def npo(nll: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
    """-(2/β)·log σ(-β·(log p_θ(y) - log p_ref(y))) of each sequence (Zhang et al. 2404.05868, eq. 3).

    Its gradient is that of ascent times a weight in (0, 2) that vanishes once the sequence is forgotten.

    Args:
        nll: (B,) -log p_θ(y), summed over the sequence.
        reference: (B,) -log p_ref(y).
        beta: Inverse temperature.

    Returns:
        (B,) float32.
    """
    return (2 / beta) * F.softplus(beta * (reference - nll))


def simnpo(nll: torch.Tensor, tokens: torch.Tensor, beta: float, margin: float) -> torch.Tensor:
    """-(2/β)·log σ(-(β/|y|)·log p_θ(y) - γ) of each sequence (Fan et al. 2410.07163, eq. 4); no reference model.

    Args:
        nll: (B,) -log p_θ(y), summed over the sequence.
        tokens: (B,) its length |y|.
        beta: Inverse temperature.
        margin: γ.

    Returns:
        (B,) float32.
    """
    return (2 / beta) * F.softplus(margin - beta * nll / tokens)


def unlikelihood(predictions: Predictions, floor: float) -> tuple[torch.Tensor, int]:
    """-Σ log(1 - p(target)) over the scored tokens still predicted with p > floor (Welleck et al. 1908.04319, eq. 5).

    The floor is a soft stop: a token that is forgotten exerts no further force.

    Returns:
        The sum, a scalar with gradient, and the number of active tokens.
    """
    probability = torch.exp(-token_nll(predictions).detach())
    active = predictions.scored & (probability > floor)
    # 1 - p from the odds: as a difference it is 0 in float32 for a perfectly memorised token, whose loss would be
    # infinite or, clamped, without gradient. -log(1 - p) = log(1 + p/(1 - p)).
    odds = log_odds(predictions.logits[active], predictions.targets[active])
    return F.softplus(odds).sum(), int(active.sum())


def log_odds(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p(target) - log(1 - p(target)), exact where p is within rounding of 1.

    Args:
        logits: (N, V).
        targets: (N,) int64.

    Returns:
        (N,) float32, in nats; its gradient over the target's logit is 1 whatever p is.
    """
    logits = logits.float()
    true = logits.gather(-1, targets.unsqueeze(-1))
    others = logits.scatter(-1, targets.unsqueeze(-1), float("-inf"))
    return true.squeeze(-1) - others.logsumexp(-1)


def bucketed_kl(logits: torch.Tensor, top_ids: torch.Tensor, top_logprobs: torch.Tensor) -> torch.Tensor:
    """KL(p_ref ‖ p_θ) with the reference's top-k tokens kept apart and the rest in one bucket.

    A lower bound of the full divergence, exact for k = V; it needs k numbers a position instead of V, so
    that the reference can be computed once and kept.

    Args:
        logits: (P, V) of the model being fitted.
        top_ids: (P, k) int64, the reference's most likely tokens.
        top_logprobs: (P, k) float32, their log-probabilities under the reference.

    Returns:
        (P,) float32, in nats, ≥ 0 up to rounding.
    """
    log_p = F.log_softmax(logits.float(), dim=-1)
    log_q = log_p.gather(-1, top_ids)
    ref = top_logprobs.exp()
    inside = (ref * (top_logprobs - log_q)).sum(-1)
    if top_ids.shape[-1] == logits.shape[-1]:
        return inside
    rest_ref = (1 - ref.sum(-1)).clamp_min(0)
    # Not 1 - Σq: where the model leaves the other tokens less than about 1e-7, float32 loses it, and its gradient.
    log_rest = log_p.scatter(-1, top_ids, float("-inf")).logsumexp(-1)
    return inside + torch.xlogy(rest_ref, rest_ref) - rest_ref * log_rest
