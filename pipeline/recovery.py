"""Recovery: ways in which a text that was taken down may come back, each to be measured like the model itself.

In: a model, passages. Out: the model under a change that is undone on leaving, or other prompts for the same
continuations. Never: a change that stays.

Four ways (METHODS section 4): the weights are rounded to fewer bits (Zhang et al. 2410.16454), the model is trained a
little on a part of the text or on related text (Deeb & Roger 2410.08827, Hu et al. 2406.13356), the prompt is changed;
sampling needs nothing here, its probabilities come out of every measurement (`pipeline.metrics.extractable`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pipeline.losses import predict, sum_nll
from pipeline.models import target_weights
from pipeline.passages import Passage, batches
from pipeline.saliency import everything
from pipeline.sparse import GradientCollector, SalientWeights

BITS = (8, 4)
"""Widths of the rounding."""

RELEARN_SHARE = 0.05
"""Share of the removed passages that an attacker trains on, at least one; the others are measured."""

PREFIX = "The following is an excerpt from the book, word for word:\n\n"
"""Put before a prompt: an unlearned model must not be opened by a request to recite."""

DROPPED, DOUBLED = 0.1, 0.1
"""Shares of the words of a prompt that perturbing drops, and doubles."""


@dataclass(frozen=True)
class Relearning:
    """A fixed, small training run on the target weights: Adam without decay, all passages in each step.

    Attributes:
        steps: Optimiser steps.
        learning_rate: Of Adam.
    """

    steps: int = 20
    learning_rate: float = 1e-4


def round_to_nearest(weight: torch.Tensor, bits: int, channel: int = 0) -> torch.Tensor:
    """Symmetric round-to-nearest quantisation per output channel, as values of the weight's own dtype.

    scale = max |w| / (2^(bits-1) - 1) per channel, w' = scale · round(w / scale); zero stays zero.

    Args:
        weight: (O, I), or (I, O) with ``channel`` 1.
        bits: Width of the integers, 2 or more.
        channel: Dimension of the output channels.
    """
    largest = 2 ** (bits - 1) - 1
    values = weight.float()
    scale: torch.Tensor = values.abs().amax(dim=1 - channel, keepdim=True) / largest
    steps = torch.where(scale > 0, values / scale, 0.0).round()
    return (steps * scale).to(weight.dtype)


@contextmanager
def quantised(model: nn.Module, bits: int) -> Iterator[None]:
    """The model with its target weights rounded to ``bits``; put back on leaving, bit for bit.

    Embeddings, norms and head stay as they are, as weight-only quantisation leaves them. Memory: a copy of the
    target weights.
    """
    weights = target_weights(model)
    channels = {
        f"{name}.weight": 1 for name, module in model.named_modules() if isinstance(module, Conv1D)
    }  # Conv1D keeps (inputs, outputs)
    kept = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        for name, weight in weights.items():
            weight.data.copy_(round_to_nearest(kept[name], bits, channels.get(name, 0)))
        yield
    finally:
        for name, weight in weights.items():
            weight.data.copy_(kept[name])


@contextmanager
def relearned(
    model: nn.Module, passages: Sequence[Passage], settings: Relearning, pad_id: int, max_tokens: int
) -> Iterator[None]:
    """The model after a short training on the continuations of some passages; put back on leaving, bit for bit.

    Raises:
        NumericalFailure: A gradient is not finite.
    """
    weights = target_weights(model)
    with SalientWeights(weights, everything(weights).mask) as salient:
        vector = salient.zeros()
        optimiser = torch.optim.Adam(vector.values(), lr=settings.learning_rate)
        tokens = sum(len(p.continuation) for p in passages)
        device = next(model.parameters()).device
        with GradientCollector(salient) as gradients:
            for _ in range(settings.steps):
                for batch in batches(passages, max_tokens, pad_id, device):
                    (sum_nll(predict(model, batch)) / tokens).backward()  # type: ignore[no-untyped-call]
                taken = gradients.take()
                for name, value in vector.items():
                    value.grad = taken[name]
                optimiser.step()
                salient.displace(vector)
        yield


def split_for_relearning(passages: Sequence[Passage], seed: int) -> tuple[list[Passage], list[Passage]]:
    """`RELEARN_SHARE` of the passages to train on, at least one, and the others to measure, in their order."""
    count = max(1, round(RELEARN_SHARE * len(passages)))
    drawn = set(random.Random(f"{seed} relearning").sample(range(len(passages)), min(count, len(passages))))
    return [passages[i] for i in sorted(drawn)], [p for i, p in enumerate(passages) if i not in drawn]


def with_prompt(tokenizer: Any, passage: Passage, bos: int, text: str) -> Passage:
    """The same continuation after another prompt.

    Args:
        tokenizer: The model's tokenizer.
        passage: A passage.
        bos: Number of tokens in front of its prompt that are no text.
        text: The new prompt.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    head = passage.ids[:bos]
    return Passage(passage.span, (*head, *ids, *passage.continuation), bos + len(ids))


def prompt_text(tokenizer: Any, passage: Passage, bos: int) -> str:
    """The prompt of a passage as text."""
    return str(tokenizer.decode(passage.ids[bos : passage.prompt_length]))


def prefixed(tokenizer: Any, passage: Passage, bos: int) -> Passage:
    """The passage behind `PREFIX`."""
    return with_prompt(tokenizer, passage, bos, PREFIX + prompt_text(tokenizer, passage, bos))


def perturbed(tokenizer: Any, passage: Passage, bos: int, seed: int) -> Passage:
    """The passage behind a damaged prompt: see `perturb`."""
    text = prompt_text(tokenizer, passage, bos)
    return with_prompt(tokenizer, passage, bos, perturb(text, random.Random(f"{seed} {text}")))


def perturb(text: str, random_: random.Random) -> str:
    """A prompt as somebody might type it from memory: lower case, no punctuation, words dropped and doubled.

    Not a paraphrase: nothing here knows what a word means. The last word stays, since the continuation joins it.
    """
    words = ["".join(c for c in word if c.isalnum() or c in "'’-") for word in text.lower().split()]
    words = [word for word in words if word]
    changed: list[str] = []
    for word in words[:-1]:
        draw = random_.random()
        if draw >= DROPPED:
            changed += [word, word] if draw < DROPPED + DOUBLED else [word]
    # The space in front of the text, if any, is part of how its first word is tokenised.
    return (" " if text[:1].isspace() else "") + " ".join([*changed, *words[-1:]])
