"""Passages: the tiling law, batches that padding cannot disturb."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, LoadModel
from hypothesis import given
from hypothesis import strategies as st

from pipeline.metrics import score_passages
from pipeline.passages import (
    EncodedText,
    Passage,
    batches,
    cut,
    encode,
    pad_id,
    passages_of,
    prompt_prefix,
    tile,
    with_continuation,
)
from pipeline.records import PassageSpan
from pipeline.settings import PassageSettings

CPU = torch.device("cpu")
cuts = st.builds(
    PassageSettings,
    prompt_tokens=st.integers(1, 40),
    continuation_tokens=st.integers(2, 40),
    first_prompt_tokens=st.integers(1, 40),
)


def passage(length: int, prompt: int, first: int = 1) -> Passage:
    return Passage(
        PassageSpan(request_id="W", prompt_start=0, start=prompt, end=length),
        tuple(range(first, first + length)),
        prompt,
    )


@given(length=st.integers(0, 500), settings=cuts)
def test_continuations_tile_the_text(length: int, settings: PassageSettings) -> None:
    spans = tile("W", length, settings)
    if length < 2:
        assert spans == []
        return
    assert spans[0].start == min(settings.first_prompt_tokens, length // 2) > 0
    assert spans[-1].end == length
    assert all(a.end == b.start for a, b in pairwise(spans))
    covered = [i for s in spans for i in range(s.start, s.end)]
    assert covered == list(range(spans[0].start, length))  # each token behind the first prompt exactly once
    size = settings.continuation_tokens
    for span in spans:
        assert 0 <= span.prompt_start < span.start < span.end
        assert span.start - span.prompt_start == min(span.start, settings.prompt_tokens)
    assert all(s.end - s.start == size for s in spans[:-1])
    last = spans[-1].end - spans[-1].start
    # A remainder of less than a quarter joins the one before; only a single passage may be shorter still.
    assert last < size + max(1, size // 4)
    assert last >= max(1, size // 4) or len(spans) == 1


@given(length=st.integers(2, 200), settings=cuts, prefix=st.sampled_from([(), (999,)]))
def test_cut_is_prefix_prompt_continuation(length: int, settings: PassageSettings, prefix: tuple[int, ...]) -> None:
    ids = tuple(range(length))
    text = EncodedText("W", ids, prefix)
    passages = passages_of(text, settings)
    assert sum((p.continuation for p in passages), ()) == ids[passages[0].span.start :]
    for p in passages:
        assert p.ids == prefix + ids[p.span.prompt_start : p.span.end]
        assert p.ids[: p.prompt_length] == prefix + ids[p.span.prompt_start : p.span.start]
    assert cut(text, [p.span for p in passages]) == passages


def test_one_token_has_no_passage(tokenizer: Any) -> None:
    assert passages_of(encode(tokenizer, "W", ""), PassageSettings()) == []
    assert passages_of(encode(tokenizer, "W", "a"), PassageSettings()) == []


def test_tokens_spell_the_text(tokenizer: Any, text: str) -> None:
    encoded = encode(tokenizer, "W", text)
    assert tokenizer.decode(encoded.ids) == text


def test_the_bos_is_a_prefix_only_where_the_tokenizer_adds_one(tokenizer: Any, bos_tokenizer: Any, text: str) -> None:
    assert prompt_prefix(tokenizer) == ()
    assert prompt_prefix(bos_tokenizer) == (bos_tokenizer.bos_token_id,)
    plain, with_bos = encode(tokenizer, "W", text), encode(bos_tokenizer, "W", text)
    assert with_bos.ids == plain.ids
    settings = PassageSettings(prompt_tokens=8, continuation_tokens=8, first_prompt_tokens=4)
    for a, b in zip(passages_of(plain, settings), passages_of(with_bos, settings), strict=True):
        assert b.ids == (bos_tokenizer.bos_token_id, *a.ids)
        assert b.span == a.span and b.continuation == a.continuation and b.prompt_length == a.prompt_length + 1


@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), max_size=20),
    max_tokens=st.integers(1, 200),
)
def test_batches_hold_everything_once_within_the_budget(lengths: list[tuple[int, int]], max_tokens: int) -> None:
    passages = [
        passage(prompt + continuation, prompt, first=100 * i) for i, (prompt, continuation) in enumerate(lengths)
    ]
    seen: list[int] = []
    widths: list[int] = []
    for batch in batches(passages, max_tokens, 7, CPU):
        assert batch.ids.shape == batch.attention.shape == batch.scored.shape
        assert batch.ids.numel() <= max_tokens or len(batch.rows) == 1
        widths.append(batch.ids.shape[1])
        for row, index in enumerate(batch.rows):
            length = len(passages[index].ids)
            assert tuple(batch.ids[row, :length].tolist()) == passages[index].ids
            assert set(batch.ids[row, length:].tolist()) <= {7}
            assert batch.attention[row].tolist() == [1] * length + [0] * (batch.ids.shape[1] - length)
            assert tuple(batch.ids[row][batch.scored[row]].tolist()) == passages[index].continuation
        seen += batch.rows
    assert sorted(seen) == list(range(len(passages)))
    assert widths == sorted(widths, reverse=True)  # the longest first


def test_with_continuation_keeps_the_prompt() -> None:
    changed = with_continuation(passage(10, 6), [50, 51])
    assert changed.ids == (1, 2, 3, 4, 5, 6, 50, 51)
    assert changed.continuation == (50, 51) and changed.prompt_length == 6


def test_pad_id_falls_back(tokenizer: Any) -> None:
    class Bare:
        pad_token_id: int | None = None
        eos_token_id: int | None = 2

    assert pad_id(tokenizer) == tokenizer.pad_token_id
    assert pad_id(Bare) == 2
    Bare.eos_token_id = None
    assert pad_id(Bare) == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_does_not_change_scores(architecture: str, load: LoadModel, tokenizer: Any, text: str) -> None:
    model = load(architecture)
    encoded = encode(tokenizer, "W", text)
    mixed: Sequence[Passage] = [
        p
        for prompt, size in ((3, 4), (20, 9), (50, 30))
        for p in passages_of(
            encoded, PassageSettings(prompt_tokens=prompt, continuation_tokens=size, first_prompt_tokens=prompt)
        )[:2]
    ]
    together = score_passages(model, mixed, pad_id(tokenizer), 10_000)
    for p, joint in zip(mixed, together, strict=True):
        (alone,) = score_passages(model, [p], pad_id(tokenizer), 10_000)
        assert (joint.hits, joint.tokens, joint.extraction) == (alone.hits, alone.tokens, alone.extraction)
        # float32 sums in another order: eps 1.2e-7 times a few dozen terms and two layers.
        assert joint.nll == pytest.approx(alone.nll, rel=1e-5)
    other_pad = score_passages(model, mixed, 5, 10_000)
    assert other_pad == together  # not even the padding token matters
