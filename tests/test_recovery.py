"""Recovery: rounding against numbers worked by hand, every change undone, prompts that keep their continuation."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import LoadModel
from hypothesis import given
from hypothesis import strategies as st

from pipeline.metrics import mean_nll, score_passages
from pipeline.models import target_weights
from pipeline.passages import Passage, pad_id
from pipeline.recovery import (
    PREFIX,
    Relearning,
    perturb,
    perturbed,
    prefixed,
    prompt_text,
    quantised,
    relearned,
    round_to_nearest,
    split_for_relearning,
)


def test_rounding_by_hand() -> None:
    # 4 bits: 7 steps on either side. Row 1: scale 1; row 2: scale .1; row 3: nothing to scale.
    weight = torch.tensor([[7.0, 3.4, -2.6, 0.4], [0.7, -0.26, 0.34, 0.04], [0.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([[7.0, 3.0, -3.0, 0.0], [0.7, -0.3, 0.3, 0.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(round_to_nearest(weight, 4), expected)
    torch.testing.assert_close(round_to_nearest(weight.T.contiguous(), 4, channel=1), expected.T)
    eight = round_to_nearest(weight[:1], 8)
    torch.testing.assert_close(eight, (weight[:1] * 127 / 7).round() * 7 / 127)


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_is_close_idempotent_and_has_few_levels(bits: int) -> None:
    weight = torch.randn(5, 400, generator=torch.Generator().manual_seed(3))
    found = round_to_nearest(weight, bits)
    scale = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert bool(((found - weight).abs() <= scale * 0.5001).all())
    assert all(len(row.unique()) <= 2**bits - 1 for row in found)
    torch.testing.assert_close(round_to_nearest(found, bits), found)


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2"])
def test_quantised_changes_target_weights_and_puts_them_back(architecture: str, load: LoadModel) -> None:
    model = load(architecture)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    targets = target_weights(model)
    with quantised(model, 4):
        for name, weight in model.named_parameters():
            assert torch.equal(weight, before[name]) == (name not in targets), name
        for name, weight in targets.items():
            # The fewest levels are along the inputs of one output; GPT-2 keeps them in a column.
            column = weight[:, 0] if architecture == "gpt2" else weight[0]
            assert len(column.unique()) <= 15, name
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]), name


def test_relearning_lowers_the_loss_and_is_undone(load: LoadModel, tokenizer: Any, passages: Sequence[Passage]) -> None:
    model, pad = load("llama"), pad_id(tokenizer)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    start = mean_nll(score_passages(model, passages[:2], pad, 200))
    found = []
    for _ in range(2):
        with relearned(model, passages[:2], Relearning(steps=5, learning_rate=1e-2), pad, 200):
            found.append(mean_nll(score_passages(model, passages[:2], pad, 200)))
    assert found[0] < 0.8 * start
    assert found[0] == found[1]
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]), name
        assert not weight.requires_grad


def test_relearning_is_undone_when_the_measurement_fails(
    load: LoadModel, tokenizer: Any, passages: Sequence[Passage]
) -> None:
    model = load("llama")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with pytest.raises(KeyError), relearned(model, passages[:1], Relearning(1, 1e-2), pad_id(tokenizer), 200):
        raise KeyError
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


@pytest.mark.parametrize(("count", "trained"), [(1, 1), (6, 1), (30, 2), (80, 4)])
def test_the_split_for_relearning(count: int, trained: int, passages: Sequence[Passage]) -> None:
    many = [Passage(passages[0].span, (i, i + 1), 1) for i in range(count)]
    train, measure = split_for_relearning(many, 5)
    assert len(train) == trained
    assert sorted(p.ids[0] for p in (*train, *measure)) == list(range(count))
    assert split_for_relearning(many, 5) == (train, measure)


def test_other_prompts_keep_the_continuation(tokenizer: Any, passages: Sequence[Passage]) -> None:
    for passage in passages:
        for changed in (prefixed(tokenizer, passage, 0), perturbed(tokenizer, passage, 0, 1)):
            assert changed.continuation == passage.continuation
            assert changed.ids[: changed.prompt_length] != passage.ids[: passage.prompt_length]
        assert prompt_text(tokenizer, prefixed(tokenizer, passage, 0), 0) == PREFIX + prompt_text(tokenizer, passage, 0)
        assert perturbed(tokenizer, passage, 0, 1) == perturbed(tokenizer, passage, 0, 1)


def test_a_bos_stays_in_front(tokenizer: Any, passages: Sequence[Passage]) -> None:
    passage = Passage(passages[0].span, (1, *passages[0].ids), passages[0].prompt_length + 1)
    changed = prefixed(tokenizer, passage, 1)
    assert changed.ids[0] == 1 and changed.ids.count(1) == 1
    assert changed.continuation == passage.continuation


@given(st.text(max_size=200), st.integers(0, 9))
def test_perturbing_keeps_the_last_word_and_no_punctuation(text: str, seed: int) -> None:
    found = perturb(text, random.Random(seed))
    assert all(c.isalnum() or c in " '’-" for c in found)
    words = ["".join(c for c in w if c.isalnum() or c in "'’-") for w in text.lower().split()]
    words = [w for w in words if w]
    assert found.split()[-1:] == words[-1:]
    assert set(found.split()) <= set(words)


def test_perturbing_by_hand() -> None:
    class Draws:
        def __init__(self, values: list[float]) -> None:
            self.values = iter(values)

        def random(self) -> float:
            return next(self.values)

    draws: Any = Draws([0.5, 0.05, 0.15, 0.9])
    assert perturb(" The grey, OLD sea's boat!", draws) == " the old old sea's boat"
