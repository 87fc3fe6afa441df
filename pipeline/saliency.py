"""Saliency: which weights the forget set moves most, once per step, at the parent.

In: the parent and the memorised passages. Out: one fixed mask. Never: a mask per micro-batch, or all gradients in one
tensor. SSU (Dou et al., arXiv 2406.10952, section 4.3): m = 1[|∇_θ L(θ_p)| ≥ γ], γ = mean + k·std of |gradient|.
"""

from __future__ import annotations

import math
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


def _statistics(gradients: Mapping[str, torch.Tensor]) -> tuple[float, float]:
    """Mean and standard deviation of |gradient| over all tensors together, streamed per tensor in float64.

    Raises:
        NumericalFailure: A gradient is not finite, or all are zero.
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
    return mean, std


def select(gradients: Mapping[str, torch.Tensor], k: float) -> Saliency:
    """Threshold |gradient| at mean + k·std over all tensors together.

    Raises:
        NumericalFailure: A gradient is not finite, all are zero, or nothing is selected.
    """
    mean, std = _statistics(gradients)
    threshold = mean + k * std
    mask = {name: gradient.abs() >= threshold for name, gradient in gradients.items()}
    if not any(bool(m.any()) for m in mask.values()):
        raise NumericalFailure(f"No weight is salient at k = {k}. Lower unlearn.saliency_k.")
    return Saliency(mask, mean, std, threshold)


def select_fraction(gradients: Mapping[str, torch.Tensor], fraction: float) -> Saliency:
    """The share of all coordinates with the largest |gradient|, as SalUn has it (arXiv 2310.12508, eq. 3).

    The threshold is found exactly and without sorting or joining the tensors: floats that are not negative are in the
    order of their bits, so that 31 halvings and as many counts end at the largest threshold that selects enough. What
    is as large as the threshold is selected, too, so that ties may add to the share.

    Args:
        gradients: Signed sums over the whole forget set, float32.
        fraction: In (0, 1].

    Raises:
        NumericalFailure: A gradient is not finite, or all are zero.
    """
    mean, std = _statistics(gradients)
    sizes = {name: gradient.float().abs().view(torch.int32) for name, gradient in gradients.items()}
    wanted = math.ceil(fraction * sum(size.numel() for size in sizes.values()))
    low, high = 0, int(torch.tensor(torch.inf).view(torch.int32))  # enough at low, none at high
    while high - low > 1:
        middle = (low + high) // 2
        enough = sum(int((size >= middle).sum()) for size in sizes.values()) >= wanted
        low, high = (middle, high) if enough else (low, middle)
    threshold = float(torch.tensor(low, dtype=torch.int32).view(torch.float32))
    return Saliency({name: size >= low for name, size in sizes.items()}, mean, std, threshold)


def everything(weights: Mapping[str, nn.Parameter]) -> Saliency:
    """The mask of methods without one: all target weights; no gradient is computed, and the threshold is 0."""
    return Saliency({name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}, 0.0, 0.0, 0.0)
