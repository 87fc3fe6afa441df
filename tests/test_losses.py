"""Losses against their formulas, and the bounds that the bucketed divergence promises."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, LoadModel
from hypothesis import given
from hypothesis import strategies as st

from pipeline.losses import Predictions, bucketed_kl, predict, sum_nll, token_nll, unlikelihood
from pipeline.passages import Passage, collate

CPU = torch.device("cpu")


def random_predictions(seed: int, scale: float = 3.0, shape: tuple[int, int, int] = (3, 7, 11)) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator) * scale
    targets = torch.randint(shape[2], shape[:2], generator=generator)
    return Predictions(logits, targets, torch.rand(shape[:2], generator=generator) < 0.6)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64 with numpy: the reference of this file."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def target_logprobs(p: Predictions) -> np.ndarray:
    logprobs = log_softmax(p.logits.detach().float().numpy())
    result: np.ndarray = np.take_along_axis(logprobs, p.targets.numpy()[..., None], -1)[..., 0]
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_nll_is_the_formula(dtype: torch.dtype) -> None:
    p = random_predictions(1)
    p = p._replace(logits=p.logits.to(dtype))
    expected = -(target_logprobs(p) * p.scored.numpy()).sum()
    # Both start from the same (rounded) logits; the sum of about 13 float32 terms errs by a few eps.
    assert float(sum_nll(p)) == pytest.approx(expected, rel=1e-6)
    assert sum_nll(p).dtype == token_nll(p).dtype == torch.float32


def test_sum_nll_of_nothing_is_zero() -> None:
    p = random_predictions(1)
    assert float(sum_nll(p._replace(scored=torch.zeros_like(p.scored)))) == 0


@pytest.mark.parametrize("floor", [0.0, 0.05, 0.5, 0.999])
def test_unlikelihood_is_the_formula_with_a_floor(floor: float) -> None:
    p = random_predictions(2)
    p.logits.requires_grad_(True)
    loss, active = unlikelihood(p, floor)
    probability = np.exp(target_logprobs(p))
    counted = p.scored.numpy() & (probability > floor)
    assert active == counted.sum()
    assert float(loss.detach()) == pytest.approx(-np.log1p(-probability[counted]).sum(), rel=1e-4, abs=1e-6)
    loss.backward()  # type: ignore[no-untyped-call]
    assert p.logits.grad is not None
    # d/dz_j of -log(1 - p_y) = p_y·(1[j = y] - softmax_j)/(1 - p_y); nothing outside the counted positions.
    softmax = np.exp(log_softmax(p.logits.detach().numpy()))
    one_hot = np.eye(softmax.shape[-1])[p.targets.numpy()]
    expected = (probability / (1 - probability))[..., None] * (one_hot - softmax) * counted[..., None]
    np.testing.assert_allclose(p.logits.grad.numpy(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("gap", [5.0, 14.0, 20.0, 60.0, 1000.0])
def test_unlikelihood_of_a_certain_token_is_finite_and_still_pushes(gap: float) -> None:
    """p = 1 in float32 from a gap of about 17 on: the best memorised token must not be the one left alone."""
    logits = torch.zeros(1, 1, 5)
    logits[0, 0, 2] = gap
    logits.requires_grad_(True)
    loss, active = unlikelihood(Predictions(logits, torch.tensor([[2]]), torch.tensor([[True]])), 0.05)
    loss.backward()  # type: ignore[no-untyped-call]
    assert active == 1
    assert bool(torch.isfinite(loss)) and logits.grad is not None and bool(torch.isfinite(logits.grad).all())
    assert float(logits.grad[0, 0, 2]) > 0  # descent lowers the token's logit
    assert all(float(g) < 0 for i, g in enumerate(logits.grad[0, 0]) if i != 2)


def test_unlikelihood_of_nothing_is_zero() -> None:
    p = random_predictions(3)
    loss, active = unlikelihood(p._replace(scored=torch.zeros_like(p.scored)), 0.0)
    assert float(loss) == 0 and active == 0


def reference_kl(ref: torch.Tensor, logits: torch.Tensor) -> np.ndarray:
    p, q = log_softmax(ref.numpy()), log_softmax(logits.numpy())
    result: np.ndarray = (np.exp(p) * (p - q)).sum(-1)
    return result


def top(ref: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, ids = torch.log_softmax(ref, -1).topk(k, -1)
    return ids, values


@given(seed=st.integers(0, 10_000), k=st.integers(1, 20), scale=st.floats(0.0, 8.0), shift=st.floats(0.0, 8.0))
def test_bucketed_kl_is_a_lower_bound_and_exact_for_all_tokens(seed: int, k: int, scale: float, shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    ref = torch.randn(4, 20, generator=generator) * scale
    logits = ref + torch.randn(4, 20, generator=generator) * shift
    full = reference_kl(ref, logits)
    found = bucketed_kl(logits, *top(ref, k))
    assert found.shape == (4,) and found.dtype == torch.float32
    # float32: log-probabilities up to about 60 in size, each wrong by half an eps, weighted by p.
    slack = 2e-5 + 1e-5 * full
    assert (found.numpy() <= full + slack).all()
    assert (found.numpy() >= -2e-5).all()
    if k == 20:
        np.testing.assert_allclose(found.numpy(), full, rtol=1e-4, atol=2e-5)


def test_bucketed_kl_is_the_kl_of_the_bucketed_distributions() -> None:
    ref, logits = random_predictions(5).logits[0], random_predictions(6).logits[0]
    ids, logprobs = top(ref, 4)
    p, q = np.exp(log_softmax(ref.numpy())), np.exp(log_softmax(logits.numpy()))
    p_top, q_top = np.take_along_axis(p, ids.numpy(), -1), np.take_along_axis(q, ids.numpy(), -1)
    p_all = np.concatenate([p_top, 1 - p_top.sum(-1, keepdims=True)], -1)
    q_all = np.concatenate([q_top, 1 - q_top.sum(-1, keepdims=True)], -1)
    np.testing.assert_allclose(
        bucketed_kl(logits, ids, logprobs).numpy(), (p_all * np.log(p_all / q_all)).sum(-1), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("gap", [10.0, 16.0, 20.0, 40.0])
def test_bucketed_kl_sees_a_rest_below_the_resolution_of_float32(gap: float) -> None:
    """The reference gives a fifth to the rest, the model e^-gap of it: 1 - Σq would be 0, or wrong by any factor."""
    ref = torch.zeros(1, 5)
    logits = torch.tensor([[gap, gap, gap, gap, 0.0]], requires_grad=True)
    ids = torch.tensor([[0, 1, 2, 3]])
    kl = bucketed_kl(logits, ids, torch.log_softmax(ref, -1).gather(-1, ids))
    np.testing.assert_allclose(kl.detach().numpy(), reference_kl(ref, logits.detach()), rtol=1e-5)
    kl.sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert float(logits.grad[0, 4]) == pytest.approx(-0.2, rel=1e-3)  # d KL/d z_j = q_j - p_j


@pytest.mark.parametrize("k", [1, 5, 11])
@pytest.mark.parametrize("scale", [0.0, 3.0, 50.0])
def test_bucketed_kl_of_equal_distributions_is_zero_with_zero_gradient(k: int, scale: float) -> None:
    logits = (random_predictions(7).logits[0] * scale).requires_grad_(True)
    kl = bucketed_kl(logits, *top(logits.detach(), k))
    kl.sum().backward()  # type: ignore[no-untyped-call]
    assert kl.detach().abs().max() < 2e-5  # 1 - Σp in float32 errs by about 1e-7, times a log of up to 100
    assert logits.grad is not None and float(logits.grad.abs().max()) < 1e-4


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_bucketed_kl_has_a_finite_gradient_far_from_the_reference(scale: float) -> None:
    logits = (random_predictions(8).logits[0] * scale).requires_grad_(True)
    ids, logprobs = top(random_predictions(9, 20.0).logits[0], 3)
    kl = bucketed_kl(logits, ids, logprobs)
    kl.sum().backward()  # type: ignore[no-untyped-call]
    assert bool(torch.isfinite(kl).all())
    assert logits.grad is not None and bool(torch.isfinite(logits.grad).all())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_predict_equals_all_logits_shifted_by_one(
    architecture: str, load: LoadModel, passages: Sequence[Passage]
) -> None:
    model = load(architecture)
    batch = collate(passages[:4], (0, 1, 2, 3), 0, CPU)
    with torch.no_grad():
        found = predict(model, batch)
        every = model(input_ids=batch.ids, attention_mask=batch.attention).logits
    first = min(p.prompt_length for p in passages[:4])
    assert found.logits.shape[1] == batch.ids.shape[1] - first  # nothing in front of the first scored token
    torch.testing.assert_close(found.logits, every[:, first - 1 : -1], rtol=1e-5, atol=1e-5)  # other matmul shapes
    assert torch.equal(found.targets, batch.ids[:, first:])
    assert torch.equal(found.scored, batch.scored[:, first:])
    assert int(found.scored.sum()) == sum(len(p.continuation) for p in passages[:4])


def test_predict_scores_all_but_the_first_token_when_all_is_scored(
    load: LoadModel, passages: Sequence[Passage]
) -> None:
    model = load("llama")
    whole = Passage(passages[0].span, passages[0].ids, 0)
    found = predict(model, collate([whole], (0,), 0, CPU))
    assert found.targets.tolist() == [list(whole.ids[1:])]
    assert bool(found.scored.all())
