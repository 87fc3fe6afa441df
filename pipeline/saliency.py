"""Saliency: which weights the forget set moves most, once per step, at the parent.

In: the parent and the memorised passages. Out: one fixed mask. Never: a mask per micro-batch, or all gradients in one
tensor. SSU (Dou et al., arXiv 2406.10952, section 4.3): m = 1[|∇_θ L(θ_p)| ≥ γ], γ = mean + k·std of |gradient|.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from pipeline.errors import NumericalFailure
from pipeline.losses import predict, sum_nll
from pipeline.passages import Passage, batches
from pipeline.sparse import Mask


@dataclass(frozen=True)
class Saliency:
    """A mask with the statistics it came from.

    Attributes:
        mask: Tensor name → bool.
        mean: Mean |gradient| over all target weights.
        std: Standard deviation (population).
        threshold: mean + k·std.
    """

    mask: Mask
    mean: float
    std: float
    threshold: float


@dataclass(frozen=True)
class WeightedPassages:
    """Passages with the weight of their mean token loss in a sum of losses."""

    passages: Sequence[Passage]
    weight: float


def accumulate_gradients(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    terms: Sequence[WeightedPassages],
    pad_id: int,
    max_tokens: int,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, torch.Tensor]:
    """∇ of Σ weight · (mean token CE of the continuations), in one pass over the data.

    Sums are kept in float32 whatever the model's dtype: bfloat16 would lose small contributions.

    Returns:
        Tensor name → float32 gradient of the weight's shape.
    """
    device = next(iter(weights.values())).device
    sums = {name: torch.zeros(weight.shape, dtype=torch.float32, device=device) for name, weight in weights.items()}

    def collect(name: str, weight: torch.Tensor) -> None:
        if weight.grad is not None:
            sums[name] += weight.grad
            weight.grad = None

    handles = []
    try:
        for name, weight in weights.items():
            weight.requires_grad_(True)
            handles.append(weight.register_post_accumulate_grad_hook(partial(collect, name)))  # type: ignore[no-untyped-call]
        for term in terms:
            tokens = sum(len(p.continuation) for p in term.passages)
            for batch in batches(term.passages, max_tokens, pad_id, device):
                (sum_nll(predict(model, batch)) * (term.weight / tokens)).backward()  # type: ignore[no-untyped-call]
                progress(len(batch.rows))
    finally:
        for handle in handles:
            handle.remove()
        for weight in weights.values():
            weight.requires_grad_(False)
            weight.grad = None
    return sums


def select(gradients: Mapping[str, torch.Tensor], k: float) -> Saliency:
    """Threshold |gradient| at mean + k·std over all tensors together; statistics streamed per tensor in float64.

    Raises:
        NumericalFailure: A gradient is not finite, all are zero, or nothing is selected.
    """
    count, total, squares = 0, 0.0, 0.0
    for name, gradient in gradients.items():
        size = gradient.detach().abs().double()
        tensor_total = float(size.sum())
        if not tensor_total < float("inf"):
            raise NumericalFailure(f"{name}: the gradient of the parent is not finite; the model may be damaged.")
        count, total, squares = count + size.numel(), total + tensor_total, squares + float(size.square().sum())
    mean = total / count
    std = max(0.0, squares / count - mean * mean) ** 0.5
    if total == 0:
        raise NumericalFailure("The gradient of the forget set is zero everywhere; no weight can be selected.")
    threshold = mean + k * std
    mask = {name: gradient.abs() >= threshold for name, gradient in gradients.items()}
    if not any(bool(m.any()) for m in mask.values()):
        raise NumericalFailure(f"No weight is salient at k = {k}. Lower unlearn.saliency_k.")
    return Saliency(mask, mean, std, threshold)
