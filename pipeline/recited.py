"""What a model recites by itself: text to hold it to that nobody has to supply.

In: a model. Out: distinct passages that it generates and is sure of. A model that is left to itself falls into what it
knows by heart; sampled with a temperature that falls after the first tokens, as in extraction attacks (Carlini et al.,
arXiv 2012.07805, section 5.1.1), it does so often. Works that nobody listed as worth keeping are thereby kept.
Never: a text from outside. What resembles a takedown is left out by whoever uses the passages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList

from pipeline.anchor import SHARED, Anchor, build_anchor, retain_passages
from pipeline.metrics import plain_decoding, score_passages
from pipeline.passages import Passage, pad_id, prompt_prefix
from pipeline.progress import Counter
from pipeline.records import PassageSpan
from pipeline.settings import Settings

OPENING = 10
"""Tokens drawn at temperature 1, so that samples differ, before it falls to `COOL`."""
COOL = 0.5
SURE = 0.6
"""Largest mean negative log-likelihood, in nats, of the second half of what counts as recited: prose that was never
seen has several nats, text known by heart nearly none."""
RUN = 16
"""Tokens of a run by which samples are told apart: two that share such a run recite the same place."""
NEW = 0.4
"""Share of a sample's runs that must be new for it to be kept."""
VARIED = 0.5
"""Share of a sample's runs that must differ from each other: a loop is sure of itself, too."""

PREFIX = "recited/"
"""Begins the names of such passages; no document's name has a slash."""
AT_ONCE = 64
"""Samples drawn together; what is drawn depends on it, so it is no setting."""


class _Cooling(LogitsProcessor):  # type: ignore[misc]
    """Temperature 1 up to a length, `COOL` from there."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores if input_ids.shape[1] < self.length else scores / COOL


def sample(model: nn.Module, tokenizer: Any, count: int, length: int, seed: int) -> list[list[int]]:
    """Let the model write.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        count: Samples.
        length: Tokens of each, what it starts with included: the beginning that the tokenizer puts before a text, or
            any one ordinary token where it puts nothing.
        seed: Same seed, same samples on the same machine.

    Returns:
        Token ids of each sample.
    """
    device = next(model.parameters()).device
    prefix, special = prompt_prefix(tokenizer), set(tokenizer.all_special_ids)
    ordinary = [i for i in range(len(tokenizer)) if i not in special]
    progress, samples = Counter("recite", count), list[list[int]]()
    with torch.random.fork_rng(), torch.inference_mode(), plain_decoding(model):
        torch.manual_seed(seed)
        order = torch.randperm(len(ordinary)).tolist()
        starts = [list(prefix) or [ordinary[order[i % len(order)]]] for i in range(count)]
        for at in range(0, count, AT_ONCE):
            ids = torch.tensor(starts[at : at + AT_ONCE], device=device)
            out = model.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_length=length,
                min_length=length, pad_token_id=pad_id(tokenizer),
                logits_processor=LogitsProcessorList([_Cooling(ids.shape[1] + OPENING)]),
            )  # fmt: skip
            samples += out.tolist()
            progress.add(len(ids))
    return samples


def distinct(samples: Sequence[Sequence[int]], surest_first: Sequence[int]) -> list[int]:
    """Which samples to keep so that no two say mostly the same.

    Args:
        samples: Token ids.
        surest_first: Places of those to choose from, best first.

    Returns:
        Places of those chosen, in that order.
    """
    seen: set[tuple[int, ...]] = set()
    chosen = []
    for place in surest_first:
        ids = samples[place][OPENING:]
        runs = [tuple(ids[i : i + RUN]) for i in range(len(ids) - RUN + 1)]
        fresh = set(runs)
        if not runs or len(fresh) < VARIED * len(runs) or sum(r not in seen for r in runs) <= NEW * len(runs):
            continue
        chosen.append(place)
        seen |= fresh
    return chosen


def recited_passages(
    model: nn.Module, tokenizer: Any, count: int, length: int, max_tokens: int, seed: int
) -> list[Passage]:
    """Distinct passages that the model recites by itself, surest first.

    Returns:
        Passages scored from their second token on, under the names ``recited/0001`` …
    """
    samples = sample(model, tokenizer, count, length, seed)
    nowhere = PassageSpan(request_id="recited", prompt_start=0, start=1, end=2)
    halves = [Passage(nowhere, tuple(ids), len(ids) // 2) for ids in samples]
    scores = score_passages(model, halves, pad_id(tokenizer), max_tokens)
    doubt = [s.nll / max(1, s.tokens) for s in scores]
    sure = sorted((i for i in range(len(samples)) if doubt[i] <= SURE), key=lambda i: doubt[i])
    return [
        Passage(
            PassageSpan(request_id=f"{PREFIX}{number:04}", prompt_start=0, start=1, end=len(samples[place])),
            tuple(samples[place]), 1,
        )
        for number, place in enumerate(distinct(samples, sure), 1)
    ]  # fmt: skip


def still_recited(model: nn.Module, anchor: Anchor, pad: int, max_tokens: int) -> Anchor:
    """An anchor less what was found by `recited_passages` and a later version recites no more: it was taken out.

    Args:
        model: The later version.
        anchor: Passages with v0's predictions.
        pad: Padding id.
        max_tokens: Most tokens in a forward pass.

    Returns:
        The anchor without passages that hold a run of `SHARED` tokens of which v0 predicts all but one and the later
        version hardly more than half.
    """
    own = [i for i, p in enumerate(anchor.passages) if p.span.request_id.startswith(PREFIX)]
    later = build_anchor(model, [anchor.passages[i] for i in own], 1, pad, max_tokens)
    lost = set()
    for place, best in zip(own, later.top_ids, strict=True):
        passage = anchor.passages[place]
        true = torch.tensor(passage.continuation)
        hits = torch.stack([anchor.top_ids[place][:, 0] == true, best[:, 0] == true]).float()
        if hits.shape[1] >= SHARED:
            before, after = hits.unfold(1, SHARED, 1).sum(-1)
            if bool(((before >= SHARED - 1) & (after <= SHARED // 2 + 1)).any()):
                lost.add(passage.span.request_id)
    return anchor.without(lost)


def anchor_passages(
    model: nn.Module, tokenizer: Any, documents: Mapping[str, str], settings: Settings
) -> list[Passage]:
    """What a lineage is held to: passages of its retain text, and what its first version recites by itself."""
    unlearn, cut = settings.unlearn, settings.passages
    found = retain_passages(tokenizer, documents, cut, unlearn.anchor_pool)
    if unlearn.recited_samples:
        found += recited_passages(
            model, tokenizer, unlearn.recited_samples, cut.prompt_tokens + cut.continuation_tokens,
            settings.runtime.batch_tokens, settings.runtime.seed,
        )  # fmt: skip
    return found
