"""The anchor: v0's predictions, kept exactly, and a pull that is zero at v0."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, LoadModel, prose

from pipeline.anchor import Anchor, anchor_loss, build_anchor, load_anchor, retain_passages, save_anchor
from pipeline.errors import StoreDamaged
from pipeline.models import target_weights
from pipeline.passages import Passage, encode, passages_of, prompt_prefix
from pipeline.settings import PassageSettings

SETTINGS = PassageSettings(prompt_tokens=10, continuation_tokens=8, first_prompt_tokens=4)
DOCUMENTS = {"b.txt": prose(1, 40), "a.txt": prose(2, 200), "ä\n.txt": prose(3, 12), "tiny": "I"}


@pytest.fixture(scope="module")
def retained(tokenizer: Any) -> list[Passage]:
    return retain_passages(tokenizer, DOCUMENTS, SETTINGS, 9)


@pytest.fixture
def anchor(load: LoadModel, retained: list[Passage]) -> Anchor:
    return build_anchor(load("llama"), retained, 6, 0, 60)


def test_retain_passages_are_spread_over_documents(tokenizer: Any, retained: list[Passage]) -> None:
    names = [p.span.request_id for p in retained]
    assert len(names) == 9
    assert names[:3] == ["a.txt", "b.txt", "ä\n.txt"]  # first one of each before the second of any
    assert names[3:5] == ["a.txt", "b.txt"] and names[-1] == "a.txt"
    assert "tiny" not in names  # too short to prompt
    for p in retained:
        whole = encode(tokenizer, "", DOCUMENTS[p.span.request_id])
        assert p.ids == prompt_prefix(tokenizer) + whole.ids[p.span.prompt_start : p.span.end]
        assert p.prompt_length == 1  # scored from the second token on
    taken = [(p.span.request_id, p.span.start) for p in retained]
    assert len(set(taken)) == len(taken)
    assert retain_passages(tokenizer, {}, SETTINGS, 9) == []


def test_predictions_are_the_models_own(load: LoadModel, retained: list[Passage], anchor: Anchor) -> None:
    model = load("llama")
    for p, ids, logprobs in zip(retained, anchor.top_ids, anchor.top_logprobs, strict=True):
        with torch.no_grad():
            expected = torch.log_softmax(model(input_ids=torch.tensor([p.ids])).logits[0, :-1].double(), -1)
        assert ids.shape == logprobs.shape == (len(p.ids) - 1, 6)
        assert (ids.dtype, logprobs.dtype) == (torch.int32, torch.float32)  # on disk, too
        # float32 forward in a padded batch against float64 softmax of a single one
        np.testing.assert_allclose(logprobs, expected.gather(1, ids.long()), atol=1e-4)
        np.testing.assert_allclose(logprobs, expected.topk(6).values, atol=1e-4)


def test_k_beyond_the_vocabulary(load: LoadModel, retained: list[Passage]) -> None:
    built = build_anchor(load("llama"), retained[:1], 10**6, 0, 60)
    assert built.top_ids[0].shape[1] == VOCABULARY


def test_an_anchor_survives_the_disk(tmp_path: Path, anchor: Anchor) -> None:
    ref = save_anchor(tmp_path, anchor)
    back = load_anchor(tmp_path, ref)
    assert list(back.passages) == list(anchor.passages)
    for a, b in zip((*back.top_ids, *back.top_logprobs), (*anchor.top_ids, *anchor.top_logprobs), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    path = tmp_path / ref.path
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreDamaged):
        load_anchor(tmp_path, ref)


def test_without_and_sample(anchor: Anchor) -> None:
    less = anchor.without({"a.txt"})
    assert {p.span.request_id for p in less.passages} == {"b.txt", "ä\n.txt"}
    assert [len(t) for t in less.top_ids] == [len(p.ids) - 1 for p in less.passages]
    assert anchor.without(DOCUMENTS).passages == []
    drawn = anchor.sample(4, random.Random(1))
    assert len(drawn.passages) == len({p.span for p in drawn.passages}) == 4
    assert drawn.passages == anchor.sample(4, random.Random(1)).passages
    for p, ids in zip(drawn.passages, drawn.top_ids, strict=True):
        assert ids is anchor.top_ids[list(anchor.passages).index(p)]
    assert len(anchor.sample(100, random.Random(1)).passages) == 9


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loss_is_zero_at_v0_and_the_mean_kl_elsewhere(dtype: str, load: LoadModel, retained: list[Passage]) -> None:
    model = load("llama", dtype)
    anchor = build_anchor(model, retained, VOCABULARY, 0, 60)
    weights = target_weights(model)
    for weight in weights.values():
        weight.requires_grad_(True)
    # The same forward pass twice: only the rounding of log-softmax is left.
    assert abs(anchor_loss(model, anchor, 0, 60, 8.0)) < 1e-4
    model.zero_grad()
    v0 = {p: _logprobs(model, p) for p in retained}
    with torch.no_grad():
        for weight in weights.values():
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    expected, said, positions = 0.0, 0.0, 0
    for p in retained:
        now = _logprobs(model, p)
        expected += float((v0[p].exp() * (v0[p] - now)).sum())
        said -= float(now.gather(-1, torch.tensor(p.ids[1:])[:, None]).sum())
        positions += len(p.ids) - 1
    # bfloat16 rounds the products of a padded batch and of a single row differently, by 2^-8 each.
    tolerance = {"float32": 1e-4, "bfloat16": 0.05}[dtype]
    found = anchor_loss(model, anchor, 0, 60, 8.0)
    assert found == pytest.approx(8.0 * expected / positions, rel=tolerance)
    assert found > 0.01 and all(w.grad is not None for w in weights.values())
    both = anchor_loss(model, anchor, 0, 60, 8.0, truth=0.25)
    assert both == pytest.approx(8.0 * (expected + 0.25 * said) / positions, rel=tolerance)


def _logprobs(model: torch.nn.Module, p: Passage) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=torch.tensor([p.ids])).logits[0, :-1].double(), -1)


def test_descent_of_the_anchor_returns_to_v0(load: LoadModel, anchor: Anchor) -> None:
    """Independent of formulas: following the gradient from a displaced model must bring the loss down."""
    model = load("llama")
    weights = list(target_weights(model).values())
    for weight in weights:
        weight.requires_grad_(True)
    with torch.no_grad():
        for weight in weights:
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    optimiser = torch.optim.Adam(weights, lr=1e-3)
    losses = []
    for _ in range(15):
        optimiser.zero_grad()
        losses.append(anchor_loss(model, anchor, 0, 1000, 1.0))
        optimiser.step()
    assert losses[-1] < losses[0] / 2


def test_the_prefix_belongs_to_the_passage(bos_tokenizer: Any) -> None:
    (first, *_) = retain_passages(bos_tokenizer, {"a": prose(2, 200)}, SETTINGS, 3)
    expected = passages_of(encode(bos_tokenizer, "a", prose(2, 200)), SETTINGS)[1]
    assert first.ids == expected.ids and first.ids[0] == bos_tokenizer.bos_token_id
