"""Descent towards other labels than the text: drawn uniformly, or the parent's best wrong guess.

CE of x̃_t given the true x_<t, Yao et al. (arXiv 2402.15159): every x̃_t uniform over the vocabulary (2, random labels),
or x̃_t = argmax over a ≠ x_t of p_parent(a | x_<t) (3, adversarial samples). SalUn (Fan et al., arXiv 2310.12508,
eq. 6): random labels and descent on retain data with the salient weights free, here a share of all by |gradient|.

Deviations: labels are drawn anew in every iteration. SalUn's classes are the vocabulary; its mask comes from the same
pass as SSU's (`pipeline.saliency`: the signed gradients of the whole forget set are summed before the absolute value is
taken, as published). Alone it is not negated.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch

from pipeline.fit import Backward, Fit, Trace
from pipeline.losses import predict
from pipeline.methods.method import Method
from pipeline.methods.retain import EVERY, Retain, descent, nothing
from pipeline.passages import Passage, batches
from pipeline.terms import backward_labels, device_of


def uniform_labels(passages: Sequence[Passage], vocabulary: int, random_: random.Random) -> list[list[int]]:
    """One label for each token of each continuation, drawn uniformly; the true one is not excluded."""
    return [random_.choices(range(vocabulary), k=len(p.continuation)) for p in passages]


def adversarial_labels(fit: Fit, passages: Sequence[Passage]) -> list[tuple[int, ...]]:
    """The most likely token but the true one, under the model as it stands, for each token of each continuation."""
    labels: list[tuple[int, ...]] = [()] * len(passages)
    with torch.inference_mode():
        for batch in batches(passages, fit.max_tokens, fit.pad_id, device_of(fit)):
            logits, targets, scored = predict(fit.model, batch)
            best = logits.scatter(-1, targets.unsqueeze(-1), float("-inf")).argmax(-1).cpu()
            for row, index in enumerate(batch.rows):
                labels[index] = tuple(best[row][scored[row].cpu()].tolist())
    return labels


def random_labels(retain: Retain) -> Callable[[Fit], Backward]:
    """CE of uniform labels + a retain term."""

    def prepare(fit: Fit) -> Backward:
        keep = retain(fit)
        vocabulary = fit.model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]

        def backward(passages: Sequence[Passage], random_: random.Random, trace: Trace) -> float:
            labels = uniform_labels(passages, vocabulary, random_)
            return backward_labels(fit, passages, labels, trace) + keep(random_, trace)

        return backward

    return prepare


def prepare_adversarial(fit: Fit) -> Backward:
    """CE of the parent's best wrong guess."""
    known = dict(zip(fit.forget, adversarial_labels(fit, fit.forget), strict=True))

    def backward(passages: Sequence[Passage], random_: random.Random, trace: Trace) -> float:
        return backward_labels(fit, passages, [known[p] for p in passages], trace)

    return backward


RANDOM_LABELS = Method(
    "random-labels", "Random labels", "Yao et al. 2402.15159, method 2", random_labels(nothing)
)  # fmt: skip
SALUN = Method("salun", "SalUn", "Fan et al. 2310.12508, eq. 6", random_labels(descent(EVERY)))
ADVERSARIAL = Method("adversarial", "Adversarial samples", "Yao et al. 2402.15159, method 3", prepare_adversarial)
