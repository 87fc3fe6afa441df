"""SSU as its released code does it, faults included; for comparison only, and no setting of a takedown names it.

After github.com/guangyaodou/SSU_Unlearn at 052dd24, as analysed, not copied; the paper's method is
`pipeline.methods.ssu`. LoRA on all target layers, AdamW, one epoch, linear decay, strength 1. What it does other than
the paper says, each reproduced here on purpose:

1. After the gradients are masked ``backward`` runs a second time, so that every weight moves.
2. The mask lies on the factors of LoRA; their product is dense.
3. The mask is computed anew for each micro-batch, on the gradient accumulated so far.
4. Weight decay and momentum move what is masked.
5. The random-label loss begins at token 2 of the prompt (the length of a dictionary stands where that of the prompt
   should), so that prompts are trained, too.
6. Every loss is off by one: the first token of an answer is never trained.
7. Random answers are drawn once per batch from all answers, the true one among them.
8. An accumulation that is not full at the end of the epoch is dropped.
9. The difference is taken between half-precision merges, which rounds small entries away.

Not reproduced: half precision in the forward pass, names and paths, and the cut of texts to 400 tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pipeline.fit import Fit, Trace, record
from pipeline.losses import Predictions, token_nll
from pipeline.passages import Passage, collate, with_continuation
from pipeline.sparse import Vector
from pipeline.terms import device_of

TITLE = "SSU as released"


@dataclass(frozen=True)
class Released:
    """Its settings as published; the learning rate is for models of 7 to 8 B."""

    rank: int = 32
    alpha: float = 32.0
    dropout: float = 0.01
    learning_rate: float = 1e-5
    weight_decay: float = 0.01
    epochs: int = 1
    batch: int = 2
    accumulation: int = 2
    random_label_weight: float = 0.5
    random_answers: int = 3
    sigma: float = 1.0


def fit_as_released(fit: Fit, released: Released) -> tuple[Vector, Trace]:
    """Fit its task vector; the candidate is θ_p - τ.

    Args:
        fit: The parent and the passages; ``fit.salient`` must hold all target weights, since nothing is masked in
            effect, and of ``fit.settings`` nothing is used.
        released: Its own settings.

    Returns:
        τ as half-precision merges leave it, in float32, and the trace. The parent's weights are back in the model.

    Raises:
        NumericalFailure: The loss is not finite.
    """
    layers = [name.removesuffix(".weight") for name in fit.salient.weights]
    config = LoraConfig(
        r=released.rank, lora_alpha=released.alpha, lora_dropout=released.dropout, target_modules=layers,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(fit.seed)  # peft draws A, and dropout draws, from the global generator
    adapted = get_peft_model(fit.model, config, autocast_adapter_dtype=False)
    try:
        adapted.train()
        trace = _descend(fit, released, [p for p in adapted.parameters() if p.requires_grad])
        with torch.no_grad():
            vector = {
                f"{name}.weight": fit.salient.gather(f"{name}.weight", half_difference(base, delta))
                for name, base, delta in _merged(adapted)
            }
    finally:
        adapted.unload()
        fit.model.requires_grad_(False)
        fit.model.eval()
    return vector, trace


def _descend(fit: Fit, released: Released, factors: Sequence[nn.Parameter]) -> Trace:
    per_epoch = -(-len(fit.forget) // released.batch)
    trace, random_ = Trace(begun=released.epochs * per_epoch), random.Random(f"{fit.seed} fit")
    steps = max(1, released.epochs * (per_epoch // released.accumulation))
    optimiser = torch.optim.AdamW(factors, lr=released.learning_rate, weight_decay=released.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: max(0.0, 1 - step / steps))
    for _ in range(released.epochs):
        order = random_.sample(fit.forget, len(fit.forget))
        for number in range(per_epoch):
            passages = order[number * released.batch : (number + 1) * released.batch]
            loss = _loss(fit, released, passages, random_, trace)
            scaled = loss / released.accumulation
            scaled.backward(retain_graph=True)  # type: ignore[no-untyped-call]
            mask_factors(factors, released.sigma)  # fault 2 and 3
            scaled.backward()  # type: ignore[no-untyped-call]  # fault 1
            record(fit, float(loss.detach()), trace)
            if (number + 1) % released.accumulation == 0:
                optimiser.step()
                schedule.step()
                optimiser.zero_grad(set_to_none=True)
        optimiser.zero_grad(set_to_none=True)  # fault 8
    return trace


def _loss(
    fit: Fit, released: Released, passages: Sequence[Passage], random_: random.Random, trace: Trace
) -> torch.Tensor:
    """Answer loss of the batch + ε2 · that of random answers."""
    answers = random_.choices(fit.forget, k=released.random_answers)  # fault 7
    mismatched = [with_continuation(p, a.continuation) for p in passages for a in answers]
    forget = _answer_loss(fit, passages, [p.prompt_length for p in passages], trace)
    rest = _answer_loss(fit, mismatched, [2] * len(mismatched), trace)  # fault 5
    return forget + released.random_label_weight * rest


def _answer_loss(fit: Fit, passages: Sequence[Passage], starts: Sequence[int], trace: Trace) -> torch.Tensor:
    batch = collate(passages, tuple(range(len(passages))), fit.pad_id, device_of(fit))
    logits = fit.model(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False).logits
    trace.tokens += batch.ids.numel()
    nll = token_nll(Predictions(logits[:, :-1], batch.ids[:, 1:], batch.attention[:, 1:].bool()))
    return shifted_mean(nll, [len(p.ids) for p in passages], starts)


def shifted_mean(nll: torch.Tensor, lengths: Sequence[int], starts: Sequence[int]) -> torch.Tensor:
    """Mean over rows of the answer's loss with its fault 6: tokens from start + 1 on, divided by all from start on.

    Args:
        nll: (B, L - 1), of tokens 1 to L - 1.
        lengths: Tokens of each row, prompt and answer.
        starts: Where each answer begins.
    """
    return torch.stack([
        row[start : length - 1].sum() / (length - start)
        for row, length, start in zip(nll, lengths, starts, strict=True)
    ]).mean()  # fmt: skip


def mask_factors(factors: Sequence[nn.Parameter], sigma: float) -> None:
    """Zero the gradients below mean + σ·std of all |gradients| of the factors together, in place."""
    found = [p.grad for p in factors if p.grad is not None]
    sizes = torch.cat([g.abs().flatten() for g in found])
    threshold = sizes.mean() + sigma * sizes.std()
    for gradient in found:
        gradient.mul_(gradient.abs() >= threshold)


def half_difference(base: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """fp16(W + s·BA) - fp16(W), in float16: what is left of a small update (fault 9)."""
    half = base.half()
    return (half.float() + delta.float()).half() - half


def _merged(adapted: nn.Module) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name in the plain model, base weight and s·BA of each adapted layer."""
    modules: Mapping[str, Any] = dict(adapted.named_modules())
    for name, module in modules.items():
        if hasattr(module, "get_delta_weight"):
            weight = module.get_base_layer().weight
            yield name.removeprefix("base_model.model."), weight, module.get_delta_weight("default")
