"""The released form of SSU: each fault is there, because the comparison would be worth nothing without."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LoadModel
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import pipeline.methods.ssu_as_released as released_module
from pipeline.anchor import NO_ANCHOR
from pipeline.benchmark.overrides import AS_RELEASED
from pipeline.errors import InvalidInput, NumericalFailure
from pipeline.fit import Fit
from pipeline.method_defaults import MethodName
from pipeline.methods import METHODS
from pipeline.methods.ssu_as_released import (
    Released,
    fit_as_released,
    half_difference,
    mask_factors,
    shifted_mean,
)
from pipeline.metrics import mean_nll, score_passages
from pipeline.models import target_weights
from pipeline.passages import Passage
from pipeline.saliency import everything
from pipeline.settings import UnlearnSettings, read_settings
from pipeline.sparse import SalientWeights

QUICK = Released(rank=4, alpha=8, learning_rate=1e-2, epochs=2)


def make_fit(model: nn.Module, passages: Sequence[Passage]) -> Fit:
    weights = target_weights(model)
    salient = SalientWeights(weights, everything(weights).mask)
    return Fit(model, salient, passages, NO_ANCHOR, UnlearnSettings(), pad_id=0, max_tokens=1000, seed=1)


def test_no_takedown_can_use_it(tmp_path: Path) -> None:
    assert AS_RELEASED not in METHODS and AS_RELEASED not in typing.get_args(MethodName)
    path = tmp_path / "takedown.toml"
    path.write_text(f'[unlearn]\nmethod = "{AS_RELEASED}"\n')
    with pytest.raises(InvalidInput, match=r"unlearn\.method"):
        read_settings(path)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_it_learns_the_text_moves_every_weight_and_puts_the_parent_back(
    architecture: str, load: LoadModel, passages: Sequence[Passage]
) -> None:
    model = load(architecture)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    fit = make_fit(model, passages)
    first, trace = fit_as_released(fit, QUICK)
    torch.rand(3)
    second, again = fit_as_released(fit, QUICK)
    assert trace == again and all(torch.equal(first[n], second[n]) for n in first)
    now = model.state_dict()
    assert now.keys() == before.keys() and all(torch.equal(t, before[n]) for n, t in now.items())
    assert not model.training and not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert len(trace.losses) == 2 * 3  # two epochs of six passages in pairs
    assert trace.losses[-1] < trace.losses[0]
    # Faults 1 and 2: a mask of a tenth of the factors protects no weight. fp16 rounds some small entries away.
    moved = sum(int(v.count_nonzero()) for v in first.values()) / sum(v.numel() for v in first.values())
    assert moved > 0.9
    base = mean_nll(score_passages(model, passages, 0, 1000))
    with fit.salient:
        fit.salient.displace(first, -1.0)
        assert mean_nll(score_passages(model, passages, 0, 1000)) > base


def test_the_second_backward_undoes_the_mask(
    load: LoadModel, passages: Sequence[Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With micro-batches g1, g2 and masks m1, m2 what reaches the optimiser is m2⊙(g1(1 + m1) + g2) + g2."""
    seen: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []

    def spy(factors: Sequence[nn.Parameter], sigma: float) -> None:
        before = [p.grad.clone() for p in factors if p.grad is not None]
        mask_factors(factors, sigma)
        seen.append((before, [p.grad.clone() for p in factors if p.grad is not None]))

    at_step: list[list[torch.Tensor]] = []
    original = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *args: typing.Any) -> typing.Any:
        at_step.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        return original(self, *args)

    monkeypatch.setattr(released_module, "mask_factors", spy)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    fit_as_released(make_fit(load("llama"), passages[:4]), Released(rank=4, alpha=8, learning_rate=1e-2, dropout=0.0))
    (reached,) = at_step
    (first, first_masked), (second, second_masked) = seen
    for g1, kept1, sum2, kept2, final in zip(first, first_masked, second, second_masked, reached, strict=True):
        g2 = sum2 - (g1 + kept1)  # the second micro-batch meets g1(1 + m1)
        torch.testing.assert_close(final, kept2 + g2, rtol=1e-4, atol=1e-7)
    masked = sum(int((k == 0).sum()) for k in second_masked) / sum(k.numel() for k in second_masked)
    nothing = sum(int((f == 0).sum()) for f in reached) / sum(f.numel() for f in reached)
    assert masked > 0.7 and nothing < 0.6  # A has no gradient in the first step, because B is zero


def test_an_incomplete_accumulation_is_dropped(load: LoadModel, passages: Sequence[Passage]) -> None:
    vector, trace = fit_as_released(make_fit(load("llama"), passages[:2]), Released(rank=4, learning_rate=1e-2))
    assert len(trace.losses) == 1
    assert not any(bool(v.any()) for v in vector.values())


def test_the_first_token_of_an_answer_is_not_trained() -> None:
    nll = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0], [1.0, 2.0, 4.0, 99.0, 99.0]])
    # Row 1: six tokens, answer from 3 on: tokens 4 and 5 count, divided by three. Row 2: four tokens, from 2 on.
    assert float(shifted_mean(nll, [6, 4], [3, 2])) == pytest.approx(((8 + 16) / 3 + 4 / 2) / 2)


@given(seed=st.integers(0, 1000), sigma=st.floats(0, 2))
def test_the_mask_of_the_factors(seed: int, sigma: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    factors = [nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(2))]
    gradients = [torch.randn(f.shape, generator=generator) for f in factors[:2]]
    for factor, gradient in zip(factors, gradients, strict=False):
        factor.grad = gradient.clone()
    mask_factors(factors, sigma)
    sizes = np.concatenate([g.abs().flatten().double().numpy() for g in gradients])
    threshold = sizes.mean() + sigma * sizes.std(ddof=1)
    for factor, gradient in zip(factors, gradients, strict=False):
        clear = (gradient.abs().double() - threshold).abs() > 1e-5  # float32 decides what lies on the edge
        expected = torch.where(gradient.abs() >= threshold, gradient, torch.zeros(()))
        assert factor.grad is not None and torch.equal(factor.grad[clear], expected[clear])
    assert factors[2].grad is None


def test_small_updates_are_lost_between_half_precision_merges() -> None:
    base = 0.02 * torch.randn(200, 200, generator=torch.Generator().manual_seed(0))
    delta = 5e-6 * torch.randn(200, 200, generator=torch.Generator().manual_seed(1))
    found = half_difference(base, delta)
    assert found.dtype == torch.float16
    assert 0.3 < float(found.count_nonzero()) / found.numel() < 0.6  # 40 % were measured at this size


def test_a_loss_that_is_not_finite_stops_it(load: LoadModel, passages: Sequence[Passage]) -> None:
    model = load("llama")
    fit = make_fit(model, passages)
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] = float("nan")
    with pytest.raises(NumericalFailure, match="not finite"):
        fit_as_released(fit, QUICK)
    assert not any("lora" in name for name, _ in model.named_modules())
