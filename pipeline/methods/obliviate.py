"""Obliviate: take every n-th token of a memorised passage off its place, leave the rest of each distribution.

Russinovich and Salem (arXiv 2502.15010, section 4): KL(q ‖ p_θ) at every token of the passage, q the parent's top-k
tokens normalised; at every n-th token the true one is left out of them. No retain text.

Deviations: the tokens are counted from the start of each continuation, whose prompt is given, instead of from the tenth
token of a text. The choice of the token that takes the place by spelling and case ("smart select") is left out.

Exact memorisation cannot fall far below 1 - 1/n by design: teacher forcing puts the model back on track after each
changed token. Verbatim runs are what it is made for.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from pipeline.fit import Backward, Fit, Trace
from pipeline.losses import Predictions, bucketed_kl, predict
from pipeline.methods.method import Method
from pipeline.passages import Passage, batches
from pipeline.terms import backward_sum, device_of


def targets_of(logits: torch.Tensor, true: torch.Tensor, stride: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What each position shall predict.

    Args:
        logits: (N, V) of the parent at the continuation's positions.
        true: (N,) int64 the text.
        stride: Every so many positions, from the first, the true token is left out.
        top_k: Tokens that share the probability.

    Returns:
        (N, k) int64 tokens and (N, k) float32 log-probabilities that sum to 1.
    """
    logits = logits.float().clone()
    logits[::stride] = logits[::stride].scatter(-1, true[::stride].unsqueeze(-1), float("-inf"))
    values, ids = logits.topk(min(top_k, logits.shape[-1] - 1), dim=-1)
    return ids, F.log_softmax(values, dim=-1)


def prepare(fit: Fit) -> Backward:
    """Mean over tokens of KL(q ‖ p_θ)."""
    chosen = fit.settings.method_settings
    device = device_of(fit)
    wanted: dict[Passage, tuple[torch.Tensor, torch.Tensor]] = {}
    with torch.inference_mode():
        for batch in batches(fit.forget, fit.max_tokens, fit.pad_id, device):
            logits, true, scored = predict(fit.model, batch)
            for row, index in enumerate(batch.rows):
                at = scored[row]
                ids, logprobs = targets_of(
                    logits[row][at], true[row][at], chosen.obliviate_stride, chosen.obliviate_top_k
                )
                wanted[fit.forget[index]] = (ids.cpu(), logprobs.cpu())

    def backward(passages: Sequence[Passage], random_: random.Random, trace: Trace) -> float:
        tokens = sum(len(p.continuation) for p in passages)

        def share_of(predictions: Predictions, rows: Sequence[int]) -> torch.Tensor:
            ids, logprobs = (torch.cat([wanted[passages[i]][part] for i in rows]).to(device) for part in (0, 1))
            return bucketed_kl(predictions.logits[predictions.scored], ids, logprobs).sum() / tokens

        return backward_sum(fit, passages, share_of, trace)

    return backward


OBLIVIATE = Method("obliviate", "Obliviate", "Russinovich and Salem 2502.15010, section 4", prepare)
