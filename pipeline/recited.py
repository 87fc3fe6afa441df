"""What a model recites by itself: text to hold it to that nobody has to supply.

In: a model. Out: distinct passages that it writes and is sure of. What a model knows by heart it goes on with from very
little: from two tokens, where one makes the next sure. So it is asked what it is surest of behind each token of its
vocabulary, and goes on greedily from the surest pairs. Works that nobody listed as worth keeping are thereby kept.
Extraction attacks sample instead (Carlini et al., arXiv 2012.07805, section 5.1.1), which of the same number of texts
brings up the same likely ones again and again. Never: a text from outside. What resembles a takedown is left out by
whoever uses the passages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pipeline.anchor import SHARED, Anchor, build_anchor, retain_passages
from pipeline.metrics import plain_decoding, score_passages
from pipeline.passages import Passage, pad_id, prompt_prefix
from pipeline.progress import Counter
from pipeline.records import PassageSpan
from pipeline.settings import Settings

TRIED = 8
"""Second tokens tried behind each first one; and first tokens tried for each opening asked for, where the vocabulary is
larger than that."""
GLANCE = 32
"""Tokens after which what is not sure of itself is given up."""
SURE = 0.6
"""Largest mean negative log-likelihood, in nats, of the second half of what counts as recited: prose that was never
seen has several nats, text known by heart nearly none."""
RUN = 16
"""Tokens of a run by which texts are told apart: two that share such a run recite the same place."""
NEW = 0.4
"""Share of a text's runs that must be new for it to be kept."""
VARIED = 0.5
"""Share of a text's runs that must differ from each other: a loop is sure of itself, too."""

PREFIX = "recited/"
"""Begins the names of such passages; no document's name has a slash."""
AT_ONCE = 64
"""Texts written together."""


def openings(model: nn.Module, tokenizer: Any, count: int, max_tokens: int) -> list[list[int]]:
    """Beginnings of two tokens whose second the model is surest of, surest first.

    Args:
        model: The model.
        tokenizer: Its tokenizer; what it puts before a text is put before the two tokens.
        count: How many.
        max_tokens: Most tokens in a forward pass.

    Returns:
        Token ids of each, without special tokens but those in front.
    """
    prefix, special = list(prompt_prefix(tokenizer)), set(tokenizer.all_special_ids)
    ordinary = [i for i in range(len(tokenizer)) if i not in special]
    firsts = ordinary[:: max(1, len(ordinary) // max(1, TRIED * count))]
    device, rows = next(model.parameters()).device, max(1, max_tokens // (len(prefix) + 1))
    sure, pairs = list[torch.Tensor](), list[torch.Tensor]()
    with torch.inference_mode():
        for at in range(0, len(firsts), rows):
            ids = torch.tensor([[*prefix, first] for first in firsts[at : at + rows]], device=device)
            last = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -1].float()
            found = last.log_softmax(-1)[:, torch.tensor(ordinary, device=device)].topk(min(TRIED, len(ordinary)))
            seconds = torch.tensor(ordinary)[found.indices.cpu()]
            sure.append(found.values.cpu().flatten())
            pairs.append(torch.stack([ids[:, -1:].cpu().expand_as(seconds), seconds], -1).flatten(0, 1))
    order = torch.cat(sure).argsort(descending=True, stable=True)[:count]
    return [[*prefix, *pair] for pair in torch.cat(pairs)[order].tolist()]


def go_on(model: nn.Module, tokenizer: Any, starts: Sequence[Sequence[int]], length: int) -> list[list[int]]:
    """Let the model write on from beginnings of one length, greedily, up to so many tokens in all."""
    device = next(model.parameters()).device
    progress, texts = Counter("recite", len(starts)), list[list[int]]()
    with torch.inference_mode(), plain_decoding(model):
        for at in range(0, len(starts), AT_ONCE):
            ids = torch.tensor([list(start) for start in starts[at : at + AT_ONCE]], device=device)
            out = model.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_length=length,
                min_length=length, pad_token_id=pad_id(tokenizer),
            )  # fmt: skip
            texts += out.tolist()
            progress.add(len(ids))
    return texts


def surest(model: nn.Module, texts: Sequence[Sequence[int]], pad: int, max_tokens: int) -> list[int]:
    """Places of the distinct texts whose second half the model is sure of, surest first."""
    nowhere = PassageSpan(request_id="recited", prompt_start=0, start=1, end=2)
    scores = score_passages(model, [Passage(nowhere, tuple(ids), len(ids) // 2) for ids in texts], pad, max_tokens)
    doubt = [s.nll / max(1, s.tokens) for s in scores]
    return distinct(texts, sorted((i for i in range(len(texts)) if doubt[i] <= SURE), key=lambda i: doubt[i]))


def distinct(texts: Sequence[Sequence[int]], surest_first: Sequence[int]) -> list[int]:
    """Which texts to keep so that no two say mostly the same.

    Args:
        texts: Token ids.
        surest_first: Places of those to choose from, best first.

    Returns:
        Places of those chosen, in that order.
    """
    seen: set[tuple[int, ...]] = set()
    chosen = []
    for place in surest_first:
        ids = texts[place]
        runs = [tuple(ids[i : i + RUN]) for i in range(len(ids) - RUN + 1)]
        fresh = set(runs)
        if not runs or len(fresh) < VARIED * len(runs) or sum(r not in seen for r in runs) <= NEW * len(runs):
            continue
        chosen.append(place)
        seen |= fresh
    return chosen


def recited_passages(model: nn.Module, tokenizer: Any, count: int, length: int, max_tokens: int) -> list[Passage]:
    """Distinct passages that the model recites by itself, surest first.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        count: Openings that it is let go on from.
        length: Tokens of a passage; fewer where the model has no place for so many.
        max_tokens: Most tokens in a forward pass.

    Returns:
        Passages scored from their second token on, under the names ``recited/0001`` …; none where that is less than a
        `RUN`, by which they are told apart.
    """
    # With learned positions a longer text would be an index behind their table.
    length = min(length, getattr(model.config, "max_position_embeddings", None) or length)
    if length < RUN:
        return []
    pad = pad_id(tokenizer)
    texts: Sequence[Sequence[int]] = openings(model, tokenizer, count, max_tokens)
    for end in sorted({min(GLANCE, length), length}):
        texts = go_on(model, tokenizer, texts, end)
        texts = [texts[place] for place in surest(model, texts, pad, max_tokens)]
    return [
        Passage(PassageSpan(request_id=f"{PREFIX}{number:04}", prompt_start=0, start=1, end=len(ids)), tuple(ids), 1)
        for number, ids in enumerate(texts, 1)
    ]


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
    if unlearn.recited_openings:
        found += recited_passages(
            model, tokenizer, unlearn.recited_openings, cut.prompt_tokens + cut.continuation_tokens,
            settings.runtime.batch_tokens,
        )  # fmt: skip
    return found
