"""Masks, vectors and salient coordinates: what comes back is what went in, and the parent returns bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import LoadModel
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st
from torch import nn

from pipeline.errors import NumericalFailure, StoreDamaged
from pipeline.losses import predict, sum_nll
from pipeline.models import target_weights
from pipeline.passages import Passage, collate
from pipeline.sparse import (
    GradientCollector,
    Mask,
    SalientWeights,
    _pack,
    _unpack,
    apply_displacement,
    load_mask,
    load_vector,
    norm,
    save_mask,
    save_vector,
)

CPU = torch.device("cpu")


def random_mask(weights: dict[str, nn.Parameter], share: float, seed: int = 0) -> Mask:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(w.shape, generator=generator) < share for n, w in weights.items()}


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = {4: torch.int32, 2: torch.int16}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


@given(st.lists(st.booleans(), max_size=70))
def test_packing_bits_is_invertible(bits: list[bool]) -> None:
    packed = _pack(torch.tensor(bits, dtype=torch.bool))
    assert packed.numel() == -(-len(bits) // 8)
    assert _unpack(packed, len(bits)).tolist() == bits


@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
@example_settings(max_examples=30)
def test_mask_and_vector_survive_the_disk(
    shapes: list[tuple[int, int]], share: float, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("sparse")
    generator = torch.Generator().manual_seed(seed)
    mask = {f"w{i}": torch.rand(s, generator=generator) < share for i, s in enumerate(shapes)}
    vector = {n: torch.randn(int(m.sum()), generator=generator) for n, m in mask.items()}
    back = load_mask(folder, save_mask(folder / "mask.safetensors", mask))
    assert back.keys() == mask.keys()
    assert all(back[n].dtype == torch.bool and torch.equal(back[n], m) for n, m in mask.items())
    vector_back = load_vector(folder, save_vector(folder / "vector.safetensors", vector))
    assert vector_back.keys() == vector.keys()
    assert all(same_bits(vector_back[n], v) for n, v in vector.items())
    assert sorted(p.name for p in folder.iterdir()) == ["mask.safetensors", "vector.safetensors"]  # no leftovers


def test_a_mask_takes_one_bit_per_weight(tmp_path: Path) -> None:
    save_mask(tmp_path / "m", {"w": torch.zeros(1000, 800, dtype=torch.bool)})
    assert (tmp_path / "m").stat().st_size < 1000 * 800 / 8 + 1000


def test_any_changed_byte_is_found(tmp_path: Path) -> None:
    mask = {"w": torch.eye(5, dtype=torch.bool)}
    vector = {"w": torch.arange(5.0)}
    mask_ref = save_mask(tmp_path / "mask", mask)
    vector_ref = save_vector(tmp_path / "vector", vector)
    for path, read in (
        (tmp_path / "mask", lambda: load_mask(tmp_path, mask_ref)),
        (tmp_path / "vector", lambda: load_vector(tmp_path, vector_ref)),
    ):
        good = path.read_bytes()
        for position in range(len(good)):
            path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
            with pytest.raises(StoreDamaged, match="changed"):
                read()
        path.write_bytes(good)
        read()
        path.unlink()
        with pytest.raises(StoreDamaged, match="missing"):
            read()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_vector_that_is_not_finite_is_never_written(tmp_path: Path, bad: float) -> None:
    with pytest.raises(NumericalFailure, match="w2: the task vector"):
        save_vector(tmp_path / "vector", {"w1": torch.ones(3), "w2": torch.tensor([0.0, bad])})
    assert list(tmp_path.iterdir()) == []


def test_norm() -> None:
    assert norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0, 0.0])}) == 5.0
    assert norm({"a": torch.full((10,), 1e30)}) == pytest.approx(10**0.5 * 1e30)  # the squares overflow float32


@given(
    origin=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20),
    step=st.floats(-1e6, 1e6, width=32),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_displacement_is_one_sum_in_float32_rounded_once(origin: list[float], step: float, dtype: torch.dtype) -> None:
    flat = torch.tensor(origin).to(dtype)
    start = flat.float()
    index = torch.arange(0, len(origin), 2)
    expected = flat.clone()
    for i in index.tolist():
        expected[i] = torch.tensor(float(start[i]), dtype=torch.float32).add(step).to(dtype)
    apply_displacement(flat, index, start[index], torch.full((len(index),), step))
    assert same_bits(flat, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2"])
def test_displace_moves_the_mask_alone_and_restore_is_bit_exact(architecture: str, dtype: str, load: LoadModel) -> None:
    model = load(architecture, dtype)
    weights = target_weights(model)
    first = next(iter(weights.values()))
    with torch.no_grad():  # bits that a comparison of values would not tell apart
        first[0, 0], first[0, 1] = -0.0, 1e-45 if dtype == "float32" else 1e-40
    mask = random_mask(weights, 0.3)
    before = snapshot(model)
    salient = SalientWeights(weights, mask)
    vector = {n: torch.full((int(m.sum()),), 1e4) for n, m in mask.items()}
    with salient:
        salient.displace(vector, -2.0)
        for name, now in model.state_dict().items():
            moved = before[name] != now
            assert torch.equal(moved, mask.get(name, torch.zeros_like(moved)))
        assert salient.moved() == sum(int(m.sum()) for m in mask.values())
        salient.displace(vector, 1e30)  # from the parent, not from where it stands
        salient.displace(vector, float("nan"))
        salient.displace(vector, 0.25)
        for name, m in mask.items():
            expected = (before[name].float()[m] + 2500).to(before[name].dtype)
            assert same_bits(weights[name].detach()[m], expected)
    assert all(same_bits(t, before[n]) for n, t in model.state_dict().items())
    assert salient.moved() == 0


def test_the_parent_returns_after_an_error(load: LoadModel) -> None:
    model = load("llama")
    before = snapshot(model)
    weights = target_weights(model)
    salient = SalientWeights(weights, random_mask(weights, 0.5))
    with pytest.raises(KeyboardInterrupt), salient:
        salient.displace({n: torch.ones_like(v) for n, v in salient.zeros().items()})
        raise KeyboardInterrupt
    assert all(same_bits(t, before[n]) for n, t in model.state_dict().items())


def test_a_mask_of_another_model_is_refused(load: LoadModel) -> None:
    weights = target_weights(load("llama"))
    mask = random_mask(weights, 0.5)
    name = next(iter(mask))
    for wrong in (
        {n: m for n, m in mask.items() if n != name},
        mask | {"other": mask[name]},
        mask | {name: mask[name][:, :-1]},
        mask | {name: mask[name].flatten()},
    ):
        with pytest.raises(StoreDamaged, match="does not belong"):
            SalientWeights(weights, wrong)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2"])
def test_collected_gradients_are_the_dense_ones_at_the_mask(
    architecture: str, dtype: str, load: LoadModel, passages: Sequence[Passage]
) -> None:
    model = load(architecture, dtype)
    weights = target_weights(model)
    mask = random_mask(weights, 0.4)
    groups = [collate(passages[i : i + 2], (0, 1), 0, CPU) for i in (0, 2, 4)]
    expected = {n: torch.zeros(int(m.sum())) for n, m in mask.items()}
    for batch in groups:
        gradients = torch.autograd.grad(sum_nll(predict(_requiring(model, weights), batch)), list(weights.values()))
        for (name, m), gradient in zip(mask.items(), gradients, strict=True):
            expected[name] += gradient.float()[m]
    model.requires_grad_(False)
    with GradientCollector(SalientWeights(weights, mask)) as collector:
        for batch in groups:
            sum_nll(predict(model, batch)).backward()  # type: ignore[no-untyped-call]
            assert all(w.grad is None for w in weights.values())  # no dense gradient outlives its backward
        found = collector.take()
        for name in mask:
            assert torch.equal(found[name], expected[name])  # same operations in the same order
        assert all(bool((v == 0).all()) for v in collector.take().values())  # and starts again
    assert not any(p.requires_grad for p in model.parameters())
    batch = groups[0]
    assert not predict(model, batch).logits.requires_grad  # the hooks are gone


def _requiring(model: nn.Module, weights: dict[str, nn.Parameter]) -> nn.Module:
    for weight in weights.values():
        weight.requires_grad_(True)
    return model


def test_a_gradient_that_is_not_finite_is_refused(load: LoadModel, passages: Sequence[Passage]) -> None:
    model = load("llama")
    weights = target_weights(model)
    with GradientCollector(SalientWeights(weights, random_mask(weights, 0.4))) as collector:
        loss = sum_nll(predict(model, collate(passages[:1], (0,), 0, CPU))) * float("inf")
        loss.backward()  # type: ignore[no-untyped-call]
        with pytest.raises(NumericalFailure, match="gradient is not finite"):
            collector.take()
