"""The anchor: what v0 says on retain text, computed once, so that later versions can be held to it.

In: v0 and the retain documents. Out: for each position the top-k tokens of v0 with their log-probabilities. Holding
every step to v0, not to its parent, keeps small drifts from adding up (METHODS section 5, second pilot).
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from pipeline.losses import bucketed_kl, predict, sum_nll
from pipeline.passages import Passage, batches, encode, passages_of
from pipeline.records import FileRef, PassageSpan
from pipeline.settings import PassageSettings
from pipeline.sparse import checked, save_tensors

SHARED = 8
"""Tokens of a run by which a retain passage is known to hold a piece of another text."""
RECITED = 0.6
"""Exact memorisation from which a retain passage counts as recited: never-seen prose is predicted at .15 by a model of
2 M weights and at about .5 by one of 8 B, memorised text at .8 and above, openings included."""


def _runs(ids: Sequence[int]) -> set[tuple[int, ...]]:
    return {tuple(ids[i : i + SHARED]) for i in range(len(ids) - SHARED + 1)}


@dataclass(frozen=True)
class Anchor:
    """Retain passages with the predictions of v0.

    Attributes:
        passages: Passages scored from their second token on; ``span.request_id`` is the document's name.
        top_ids: Per passage (P, k) int32.
        top_logprobs: Per passage (P, k) float32.
    """

    passages: Sequence[Passage]
    top_ids: Sequence[torch.Tensor]
    top_logprobs: Sequence[torch.Tensor]

    def _subset(self, rows: Sequence[int]) -> Anchor:
        return Anchor(
            [self.passages[i] for i in rows], [self.top_ids[i] for i in rows], [self.top_logprobs[i] for i in rows]
        )

    def without(self, documents: Collection[str]) -> Anchor:
        """The anchor less some documents."""
        return self._subset([i for i, p in enumerate(self.passages) if p.span.request_id not in documents])

    def apart_from(self, passages: Iterable[Passage]) -> Anchor:
        """The anchor less all that shares a run of `SHARED` tokens with some passages: holding on to it would bring
        them back."""
        taken = {run for p in passages for run in _runs(p.ids)}
        return self._subset([i for i, p in enumerate(self.passages) if taken.isdisjoint(_runs(p.ids))])

    def split(self) -> tuple[Anchor, Anchor]:
        """What v0 recites of it, that is predicts `RECITED` of, and the rest."""
        recited = [bool(self.recited(i) >= RECITED) for i in range(len(self.passages))]
        rows = range(len(self.passages))
        return self._subset([i for i in rows if recited[i]]), self._subset([i for i in rows if not recited[i]])

    def recited(self, row: int) -> float:
        """Exact memorisation of a passage by v0, read off its most likely tokens."""
        passage, best = self.passages[row], self.top_ids[row][:, 0]
        return float((best == torch.tensor(passage.continuation)).float().mean())

    def joined(self, other: Anchor) -> Anchor:
        """This anchor and another one after it."""
        return Anchor(
            [*self.passages, *other.passages], [*self.top_ids, *other.top_ids],
            [*self.top_logprobs, *other.top_logprobs],
        )  # fmt: skip

    def sample(self, count: int, random_: random.Random) -> Anchor:
        """``count`` passages drawn without replacement, or all."""
        return self._subset(random_.sample(range(len(self.passages)), min(count, len(self.passages))))


NO_ANCHOR = Anchor((), (), ())


def retain_passages(
    tokenizer: Any, documents: Mapping[str, str], settings: PassageSettings, limit: int
) -> list[Passage]:
    """Passages of the retain text, spread evenly: first passages of all documents, then second ones, up to a limit."""
    columns = []
    for name, text in sorted(documents.items()):
        passages = passages_of(encode(tokenizer, name, text), settings)
        # One in two: a passage holds its prompt, so every other one already covers the text.
        columns.append(passages[1::2] if len(passages) > 2 else passages[-1:])
    mixed = [p for row in zip_longest(*columns) for p in row if p is not None]
    return [Passage(p.span, p.ids, 1) for p in mixed[:limit]]


def build_anchor(model: nn.Module, passages: Sequence[Passage], k: int, pad_id: int, max_tokens: int) -> Anchor:
    """Run v0 once over the retain passages."""
    device = next(model.parameters()).device
    lengths = [len(p.continuation) for p in passages]
    top_ids: Sequence[torch.Tensor] = ()
    top_logprobs: Sequence[torch.Tensor] = ()
    with torch.inference_mode():
        for batch in batches(passages, max_tokens, pad_id, device):
            predictions = predict(model, batch)
            if not top_ids:
                # Whole tensors, filled in parts: small ones, made by the thousand between large temporaries, would tear
                # the heap apart.
                shape = sum(lengths), min(k, predictions.logits.shape[-1])
                top_ids = torch.split(torch.empty(shape, dtype=torch.int32), lengths)
                top_logprobs = torch.split(torch.empty(shape), lengths)
            for row, index in enumerate(batch.rows):
                logprobs = F.log_softmax(predictions.logits[row][predictions.scored[row]].float(), dim=-1)
                values, ids = logprobs.topk(top_ids[index].shape[-1], dim=-1)
                top_ids[index].copy_(ids)
                top_logprobs[index].copy_(values)
    return Anchor(passages, top_ids, top_logprobs)


def anchor_loss(
    model: nn.Module, anchor: Anchor, pad_id: int, max_tokens: int, weight: float, truth: float = 0.0
) -> float:
    """Backpropagate weight · mean over positions of KL(v0 ‖ θ) + truth · -log p_θ(true token).

    Returns:
        The loss; gradients are left in place.
    """
    device = next(model.parameters()).device
    positions = sum(len(t) for t in anchor.top_ids)
    total = 0.0
    for batch in batches(anchor.passages, max_tokens, pad_id, device):
        predictions = predict(model, batch)
        top_ids = torch.cat([anchor.top_ids[i] for i in batch.rows]).to(device).long()
        top_logprobs = torch.cat([anchor.top_logprobs[i] for i in batch.rows]).to(device)
        found = bucketed_kl(predictions.logits[predictions.scored], top_ids, top_logprobs).sum()
        if truth:
            found = found + truth * sum_nll(predictions)
        loss = found * (weight / positions)
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total


def save_anchor(folder: Path, anchor: Anchor) -> FileRef:
    """Write an anchor: token ids, spans and v0's predictions, laid end to end.

    The file is named by its number of passages, so that a smaller one never overwrites the one in use.
    """
    names = sorted({p.span.request_id for p in anchor.passages})
    spans = [
        [names.index(p.span.request_id), p.span.prompt_start, p.span.start, p.span.end, len(p.ids)]
        for p in anchor.passages
    ]
    return save_tensors(
        folder / f"anchor-{len(anchor.passages)}.safetensors",
        {
            "ids": torch.tensor([i for p in anchor.passages for i in p.ids], dtype=torch.int32),
            "spans": torch.tensor(spans, dtype=torch.int64).view(-1, 5),
            "top_ids": torch.cat(list(anchor.top_ids)),
            "top_logprobs": torch.cat(list(anchor.top_logprobs)),
            "names": torch.tensor(list("\0".join(names).encode()), dtype=torch.uint8),
        },
    )


def load_anchor(folder: Path, ref: FileRef) -> Anchor:
    """Read an anchor; the inverse of `save_anchor`."""
    with safe_open(checked(folder, ref), framework="pt") as file:
        ids, spans, top_ids, top_logprobs, names_ = (
            file.get_tensor(n) for n in ("ids", "spans", "top_ids", "top_logprobs", "names")
        )
    names = bytes(names_.tolist()).decode().split("\0")
    rows = spans.tolist()
    lengths = [row[4] for row in rows]
    passages = [
        Passage(PassageSpan(request_id=names[n], prompt_start=p, start=s, end=e), tuple(chunk.tolist()), 1)
        for (n, p, s, e, _), chunk in zip(rows, ids.split(lengths), strict=True)
    ]
    positions = [length - 1 for length in lengths]
    return Anchor(passages, top_ids.split(positions), top_logprobs.split(positions))
