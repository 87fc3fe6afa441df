"""Negative preference: the text as a dispreferred answer without a preferred one.

NPO (Zhang et al., arXiv 2404.05868, eq. 3): -(2/β)·log σ(-β·(log p_θ(y) - log p_parent(y))), alone or with a retain
term, KL to the parent or descent. The log-likelihoods are summed over the sequence, β = .1; several public versions
compare means or raw logits, which is another loss.

SimNPO (Fan et al., arXiv 2410.07163, eq. 4): -(2/β)·log σ(-(β/|y|)·log p_θ(y) - γ) with descent on retain text; no
reference model.

Deviations: a sequence is a passage's continuation given its prompt; the retain text of both is all there is.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch

from pipeline.fit import Backward, Fit, Trace
from pipeline.losses import Predictions, npo, predict, sequence_nll, simnpo
from pipeline.methods.method import Method
from pipeline.methods.retain import EVERY, Retain, descent, kl_to_parent, nothing
from pipeline.passages import Passage, batches
from pipeline.terms import backward_sum, device_of


def reference_nll(fit: Fit, passages: Sequence[Passage]) -> list[float]:
    """-log p(continuation) of each passage under the model as it stands."""
    found = [0.0] * len(passages)
    with torch.inference_mode():
        for batch in batches(passages, fit.max_tokens, fit.pad_id, device_of(fit)):
            for index, nll in zip(batch.rows, sequence_nll(predict(fit.model, batch)).tolist(), strict=True):
                found[index] = nll
    return found


def negative_preference(retain: Retain) -> Callable[[Fit], Backward]:
    """NPO + a retain term."""

    def prepare(fit: Fit) -> Backward:
        keep, beta = retain(fit), fit.settings.method_settings.npo_beta
        known = dict(zip(fit.forget, reference_nll(fit, fit.forget), strict=True))

        def backward(passages: Sequence[Passage], random_: random.Random, trace: Trace) -> float:
            def share_of(predictions: Predictions, rows: Sequence[int]) -> torch.Tensor:
                nll = sequence_nll(predictions)
                reference = torch.tensor([known[passages[i]] for i in rows], device=nll.device)
                return npo(nll, reference, beta).sum() / len(passages)

            return backward_sum(fit, passages, share_of, trace) + keep(random_, trace)

        return backward

    return prepare


def prepare_simnpo(fit: Fit) -> Backward:
    """SimNPO + λ·CE_r."""
    keep, settings = descent(EVERY)(fit), fit.settings.method_settings

    def backward(passages: Sequence[Passage], random_: random.Random, trace: Trace) -> float:
        def share_of(predictions: Predictions, rows: Sequence[int]) -> torch.Tensor:
            tokens = predictions.scored.sum(1)
            loss = simnpo(sequence_nll(predictions), tokens, settings.simnpo_beta, settings.simnpo_margin)
            return loss.sum() / len(passages)

        return backward_sum(fit, passages, share_of, trace) + keep(random_, trace)

    return backward


_SOURCE = "Zhang et al. 2404.05868, eq. 3"

NPO = Method("npo", "NPO", _SOURCE, negative_preference(nothing))
NPO_KL = Method("npo-kl", "NPO + KL", _SOURCE, negative_preference(kl_to_parent(EVERY)))
NPO_GD = Method("npo-gd", "NPO + GD", _SOURCE, negative_preference(descent(EVERY)))
SIMNPO = Method("simnpo", "SimNPO", "Fan et al. 2410.07163, eq. 4", prepare_simnpo)
