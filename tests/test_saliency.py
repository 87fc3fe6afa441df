"""Saliency: the gradient of the whole forget set, and a threshold that numpy agrees with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, LoadModel
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st

from pipeline.errors import NumericalFailure
from pipeline.models import target_weights
from pipeline.passages import Passage
from pipeline.saliency import WeightedPassages, accumulate_gradients, select


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_equal_autograd_of_one_loss(architecture: str, load: LoadModel, passages: Sequence[Passage]) -> None:
    model = load(architecture)
    weights = target_weights(model)
    terms = [WeightedPassages(passages[:4], 1.0), WeightedPassages(passages[3:], 0.25)]
    # Independent: the mean CE of each term over all its tokens, passage by passage with all logits.
    for weight in weights.values():
        weight.requires_grad_(True)
    loss = torch.zeros(())
    for term in terms:
        tokens = sum(len(p.continuation) for p in term.passages)
        for p in term.passages:
            logits = model(input_ids=torch.tensor([p.ids])).logits[0]
            nll = -torch.log_softmax(logits[p.prompt_length - 1 : -1], -1)
            loss = loss + term.weight / tokens * nll.gather(1, torch.tensor(p.continuation)[:, None]).sum()
    expected = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
    model.requires_grad_(False)

    before = {n: t.clone() for n, t in model.state_dict().items()}
    seen: list[int] = []
    found = accumulate_gradients(model, weights, terms, 0, 40, seen.append)
    assert sum(seen) == 7 and len(seen) > 2  # several batches, every passage counted
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32 and gradient.shape == weights[name].shape
        # Sums of some hundred float32 products in another order; rounding shows against the largest entry.
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5 * float(expected[name].abs().max()))
    assert all(w.grad is None and not w.requires_grad for w in weights.values())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_bfloat16_gradients_are_summed_in_float32(load: LoadModel, passages: Sequence[Passage]) -> None:
    model = load("llama", "bfloat16")
    weights = target_weights(model)
    one = accumulate_gradients(model, weights, [WeightedPassages(passages[:1], 1.0)], 0, 1000)
    # 300 equal contributions of 1/300: a bfloat16 sum would stop growing near 256 of them.
    many = accumulate_gradients(model, weights, [WeightedPassages([passages[0]] * 300, 300.0)], 0, 1)
    for name in weights:
        assert many[name].dtype == torch.float32
        torch.testing.assert_close(many[name], 300 * one[name], rtol=1e-4, atol=1e-4 * float(many[name].abs().max()))


def test_the_tied_head_does_not_become_a_target(load: LoadModel, passages: Sequence[Passage]) -> None:
    model = load("llama-tied")
    weights = target_weights(model)
    gradients = accumulate_gradients(model, weights, [WeightedPassages(passages, 1.0)], 0, 1000)
    assert gradients.keys() == weights.keys() == select(gradients, 1.0).mask.keys()
    assert not any("embed" in n or "lm_head" in n for n in gradients)
    assert not model.get_input_embeddings().weight.requires_grad  # type: ignore[operator]


@given(
    sizes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=4),
    k=st.floats(-2, 3),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
)
@example_settings(max_examples=60)
def test_threshold_is_mean_plus_k_std_over_all_tensors_together(
    sizes: list[tuple[int, int]], k: float, seed: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradients = {f"w{i}": torch.randn(s, generator=generator) * scale * (i + 1) for i, s in enumerate(sizes)}
    together = np.abs(np.concatenate([g.numpy().ravel() for g in gradients.values()]).astype(np.float64))
    threshold = together.mean() + k * together.std()  # numpy's std is the population's
    if not (together >= threshold).any():
        with pytest.raises(NumericalFailure, match="Lower unlearn"):
            select(gradients, k)
        return
    try:
        found = select(gradients, k)
    except NumericalFailure:
        assert together.max() == pytest.approx(threshold, rel=1e-6)  # only a tie may be lost to rounding
        return
    # The streamed variance E[x²] - E[x]² cancels where all entries are alike; float64 leaves 1e-8 of the mean.
    assert found.mean == pytest.approx(together.mean(), rel=1e-12)
    assert found.std == pytest.approx(together.std(), rel=1e-6, abs=1e-7 * together.mean())
    assert found.threshold == found.mean + k * found.std
    for name, gradient in gradients.items():
        size = gradient.abs().double()
        tie = (size - threshold).abs() <= 1e-6 * abs(threshold)
        assert torch.equal(found.mask[name] | tie, (size >= threshold) | tie)


def test_a_very_low_k_selects_everything() -> None:
    assert all(bool(m.all()) for m in select({"a": torch.randn(4, 5), "b": torch.zeros(2, 2)}, -1e9).mask.values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite(bad: float) -> None:
    with pytest.raises(NumericalFailure, match=r"w1: .*not finite"):
        select({"w0": torch.ones(2, 2), "w1": torch.tensor([[0.0, bad]])}, 1.0)


def test_an_all_zero_gradient() -> None:
    with pytest.raises(NumericalFailure, match="zero everywhere"):
        select({"w0": torch.zeros(2, 2), "w1": torch.zeros(3, 3)}, 1.0)


def test_nothing_selected() -> None:
    with pytest.raises(NumericalFailure, match=r"No weight is salient at k = 100"):
        select({"w": torch.randn(5, 5, generator=torch.Generator().manual_seed(0))}, 100.0)
