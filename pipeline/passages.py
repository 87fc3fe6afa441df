"""Passages: windows of a text in tokens, and the padded batches that a model reads.

In: a text and a tokenizer. Out: prompts with continuations whose continuations tile the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from pipeline.records import PassageSpan
from pipeline.settings import PassageSettings


@dataclass(frozen=True)
class EncodedText:
    """A text as tokens.

    Attributes:
        name: Request id or document name.
        ids: Token ids without special tokens.
        prefix: Tokens that this tokenizer puts in front of every prompt (a BOS, or nothing).
    """

    name: str
    ids: tuple[int, ...]
    prefix: tuple[int, ...]


@dataclass(frozen=True)
class Passage:
    """A prompt with its continuation.

    Attributes:
        span: Where it lies.
        ids: Prefix, prompt and continuation.
        prompt_length: Number of ids in front of the continuation.
    """

    span: PassageSpan
    ids: tuple[int, ...]
    prompt_length: int

    @property
    def continuation(self) -> tuple[int, ...]:
        return self.ids[self.prompt_length :]


class TokenBatch(NamedTuple):
    """Passages padded on the right to the longest.

    Attributes:
        ids: (B, L) int64.
        attention: (B, L) int64, 1 on real tokens.
        scored: (B, L) bool, True on continuation tokens.
        rows: Index of each row in the sequence that was batched.
    """

    ids: torch.Tensor
    attention: torch.Tensor
    scored: torch.Tensor
    rows: tuple[int, ...]


def encode(tokenizer: Any, name: str, text: str) -> EncodedText:
    """Tokenise a text once."""
    # Very long texts exceed model_max_length by design; they are cut into passages.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return EncodedText(name, tuple(ids), prompt_prefix(tokenizer))


def prompt_prefix(tokenizer: Any) -> tuple[int, ...]:
    """The BOS that the tokenizer puts before a text by default, if it does."""
    with_special = tokenizer("a", add_special_tokens=True)["input_ids"]
    bos = tokenizer.bos_token_id
    return (bos,) if bos is not None and with_special and with_special[0] == bos else ()


def tile(name: str, length: int, settings: PassageSettings) -> list[PassageSpan]:
    """Cut a text of ``length`` tokens into spans whose continuations tile it without gap or overlap.

    The first continuation starts after a short prompt; a remainder shorter than a quarter continuation
    joins the one before. Every token but the first prompt is thus in exactly one continuation; a text of
    one token has no passage.
    """
    first = min(settings.first_prompt_tokens, length // 2)
    if first == 0:
        return []
    size = settings.continuation_tokens
    starts = list(range(first, length, size))
    if len(starts) > 1 and length - starts[-1] < max(1, size // 4):
        starts.pop()
    ends = [*starts[1:], length]
    return [
        PassageSpan(request_id=name, prompt_start=max(0, s - settings.prompt_tokens), start=s, end=e)
        for s, e in zip(starts, ends, strict=True)
    ]


def cut(text: EncodedText, spans: Sequence[PassageSpan]) -> list[Passage]:
    """The passages at given spans."""
    return [
        Passage(s, text.prefix + text.ids[s.prompt_start : s.end], len(text.prefix) + s.start - s.prompt_start)
        for s in spans
    ]


def passages_of(text: EncodedText, settings: PassageSettings) -> list[Passage]:
    """All passages of a text."""
    return cut(text, tile(text.name, len(text.ids), settings))


def with_continuation(passage: Passage, continuation: Sequence[int]) -> Passage:
    """The same prompt with another continuation (SSU's mismatched labels)."""
    return Passage(passage.span, passage.ids[: passage.prompt_length] + tuple(continuation), passage.prompt_length)


def batches(passages: Sequence[Passage], max_tokens: int, pad_id: int, device: torch.device) -> Iterator[TokenBatch]:
    """Group passages by length into batches of at most ``max_tokens`` tokens, padding included.

    Longest first, so that a batch that does not fit in memory fails at once; at least one passage a batch.
    """
    order = sorted(range(len(passages)), key=lambda i: -len(passages[i].ids))
    while order:
        longest = len(passages[order[0]].ids)
        count = max(1, max_tokens // longest)
        rows, order = order[:count], order[count:]
        yield collate([passages[i] for i in rows], tuple(rows), pad_id, device)


def collate(passages: Sequence[Passage], rows: tuple[int, ...], pad_id: int, device: torch.device) -> TokenBatch:
    """Pad passages on the right into one batch."""
    longest = max(len(p.ids) for p in passages)
    ids = torch.full((len(passages), longest), pad_id, dtype=torch.int64)
    attention = torch.zeros_like(ids)
    scored = torch.zeros_like(ids, dtype=torch.bool)
    for row, passage in enumerate(passages):
        length = len(passage.ids)
        ids[row, :length] = torch.tensor(passage.ids)
        attention[row, :length] = 1
        scored[row, passage.prompt_length : length] = True
    return TokenBatch(ids.to(device), attention.to(device), scored.to(device), rows)


def pad_id(tokenizer: Any) -> int:
    """An id to pad with; padding is masked everywhere, so any valid id serves."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)
