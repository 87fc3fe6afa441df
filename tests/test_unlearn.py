"""Unlearning: nothing outside the mask moves, ever; inside it, the arithmetic is the paper's.

The invariant is asserted on weights, not on gradients, with decay, momentum, random labels, anchor, repair and merge
in the loop: several published implementations mask gradients and still move every weight (METHODS section 1).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ARCHITECTURES, VOCABULARY, BuildModel, LoadModel, prose
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import pipeline.lora
from pipeline.anchor import Anchor, build_anchor, retain_passages
from pipeline.errors import NumericalFailure
from pipeline.fit import Fit, Trace, forget_slices
from pipeline.lora import MaskedLora, fit_lora
from pipeline.merge import merge
from pipeline.methods.ssu import mismatched, prepare
from pipeline.metrics import exact_memorisation, mean_nll, score_passages
from pipeline.models import file_names, load_model, load_tokenizer, target_weights
from pipeline.passages import Passage, encode, passages_of
from pipeline.records import PassageSpan
from pipeline.safefile import read_header
from pipeline.saliency import WeightedPassages, accumulate_gradients, select
from pipeline.settings import PassageSettings, UnlearnSettings
from pipeline.sparse import Mask, SalientWeights, Vector, norm
from pipeline.unlearn import CHECK_EVERY, fit_full, repair

NO_ANCHOR = Anchor([], [], [])

EVERYTHING = UnlearnSettings(
    method="ssu",
    iterations=3, passages_per_iteration=4, random_label_weight=0.5, random_labels_per_prompt=2,
    learning_rate=1e-2, weight_decay=0.1, lora_rank=4, lora_alpha=8, lora_learning_rate=1e-2,
    anchor_weight=2.0, anchor_passages=2, anchor_top_k=8,
    repair_iterations=5, repair_min_iterations=5, repair_learning_rate=1e-2, repair_floor=0.0,
)  # fmt: skip
"""All parts of the fit switched on, with steps large enough to show in bfloat16."""

PLAIN = EVERYTHING.model_copy(
    update={"random_label_weight": 0.0, "anchor_weight": 0.0, "weight_decay": 0.0, "passages_per_iteration": 100}
)

Method = Callable[[Fit, Mask], tuple[Vector, Trace]]
METHODS: dict[str, Method] = {
    "full": lambda fit, mask: fit_full(fit, prepare(fit)),
    "lora": lambda fit, mask: fit_lora(fit, mask, prepare(fit)),
}


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


def saliency_mask(model: nn.Module, passages: Sequence[Passage]) -> Mask:
    gradients = accumulate_gradients(model, target_weights(model), [WeightedPassages(passages, 1.0)], 0, 1000)
    return select(gradients, 1.0).mask


def make_fit(model: nn.Module, mask: Mask, passages: Sequence[Passage], settings: UnlearnSettings, **more: Any) -> Fit:
    fields = {"anchor": NO_ANCHOR, "seed": 3, "max_tokens": 60} | more
    return Fit(
        model=model, salient=SalientWeights(target_weights(model), mask), forget=passages, settings=settings, pad_id=0,
        **fields,
    )  # fmt: skip


class Untouched:
    """Asserts, on leaving, that a model is as it was: bits, modules, attributes, hooks, gradients."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def _shape(self) -> Any:
        return [
            (name, type(module), sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
            for name, module in self.model.named_modules()
        ]

    def __enter__(self) -> None:
        self.weights, self.shape = snapshot(self.model), self._shape()
        self.parameters = {n: id(p) for n, p in self.model.named_parameters()}

    def __exit__(self, *_: object) -> None:
        now = self.model.state_dict()
        assert now.keys() == self.weights.keys()
        assert all(torch.equal(bits(t), bits(self.weights[n])) for n, t in now.items())
        assert self._shape() == self.shape
        assert {n: id(p) for n, p in self.model.named_parameters()} == self.parameters
        for parameter in self.model.parameters():
            assert not parameter.requires_grad and parameter.grad is None
            assert not parameter._post_accumulate_grad_hooks  # type: ignore[attr-defined]
        assert not any(m.training for m in self.model.modules())


def retained(model: nn.Module, tokenizer: Any) -> Anchor:
    short = PassageSettings(prompt_tokens=10, continuation_tokens=8, first_prompt_tokens=4)
    return build_anchor(model, retain_passages(tokenizer, {"r": prose(5, 100)}, short, 4), 8, 0, 1000)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}


CASES = [
    *((a, "float32", False) for a in ARCHITECTURES),
    *((a, "bfloat16", True) for a in ARCHITECTURES),
    ("llama-tied", "float32", True),
    ("llama-tied", "bfloat16", False),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("architecture", "dtype", "sharded"), CASES)
def test_outside_the_mask_every_weight_is_bit_identical(
    architecture: str, dtype: str, sharded: bool, method: str, build: BuildModel, load: LoadModel,
    passages: Sequence[Passage], tokenizer: Any, tmp_path: Path,
) -> None:  # fmt: skip
    parent, model = build(architecture, dtype, sharded), load(architecture, dtype, sharded)
    mask = saliency_mask(model, passages)
    assert 0 < sum(int(m.sum()) for m in mask.values()) < 0.5 * sum(m.numel() for m in mask.values())
    fit = make_fit(model, mask, passages, EVERYTHING, anchor=retained(model, tokenizer))
    with Untouched(model):
        vector, trace = METHODS[method](fit, mask)
    assert len(trace.losses) == 3 and trace.tokens > 0 and norm(vector) > 0
    assert all(vector[n].dtype == torch.float32 and vector[n].shape == (int(m.sum()),) for n, m in mask.items())
    with Untouched(model):
        displacement, trace = repair(fit, {n: -2.0 * v for n, v in vector.items()}, lambda: passages)
    assert len(trace.losses) == 5
    assert any(not torch.equal(displacement[n], -2.0 * v) for n, v in vector.items())

    names = file_names(mask, tensors(parent), str(getattr(model, "base_model_prefix", "")))
    report = merge(parent, tmp_path / "candidate", mask, {n: -d for n, d in displacement.items()}, 1.0, names)
    before, after = tensors(parent), tensors(tmp_path / "candidate")
    assert before.keys() == after.keys()
    masks = {names[n]: m for n, m in mask.items()}
    for name, old in before.items():
        changed = bits(old) != bits(after[name])
        assert not bool((changed & ~masks.get(name, torch.zeros_like(changed))).any()), name
    moved = sum(int((bits(before[n]) != bits(after[n])).sum()) for n in masks)
    assert moved == report.changed
    # A step of Adam is about the learning rate, far above the rounding of these weights: nearly all salient ones move.
    assert moved > 0.9 * report.selected
    # And the candidate is what was measured in memory.
    with torch.no_grad(), fit.salient:
        fit.salient.displace(displacement)
        ids = torch.tensor([passages[1].ids])
        expected = model(input_ids=ids).logits
        assert torch.equal(load_model(tmp_path / "candidate", "cpu")(input_ids=ids).logits, expected)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_fit_full_is_adamw_on_the_salient_coordinates(
    architecture: str, load: LoadModel, passages: Sequence[Passage]
) -> None:
    """Loshchilov & Hutter's AdamW written out, on dense gradients of the displaced model."""
    model = load(architecture)
    mask = saliency_mask(model, passages)
    settings = PLAIN.model_copy(update={"weight_decay": 0.3, "iterations": 3, "learning_rate": 1e-3})
    fit = make_fit(model, mask, passages, settings)
    found, _ = fit_full(fit, prepare(fit))

    weights = target_weights(model)
    origin = {n: w.detach().clone() for n, w in weights.items()}
    v = {n: torch.zeros(int(m.sum())) for n, m in mask.items()}
    first, second = {n: torch.zeros_like(x) for n, x in v.items()}, {n: torch.zeros_like(x) for n, x in v.items()}
    rate, decay, b1, b2, eps = 1e-3, 0.3, 0.9, 0.99, 1e-8
    for t in (1, 2, 3):
        gradients = accumulate_gradients(model, weights, [WeightedPassages(passages, 1.0)], 0, 60)
        for n, m in mask.items():
            g = gradients[n][m]
            first[n] = b1 * first[n] + (1 - b1) * g
            second[n] = b2 * second[n] + (1 - b2) * g * g
            step = (first[n] / (1 - b1**t)) / ((second[n] / (1 - b2**t)).sqrt() + eps)
            v[n] = v[n] * (1 - rate * decay) - rate * step
            with torch.no_grad():
                weights[n][m] = origin[n][m] + v[n]
        if t == 1:  # the first step is -lr·sign(g), whatever the size of the gradient
            assert all(torch.allclose(v[n], -rate * gradients[n][m].sign(), rtol=1e-4) for n, m in mask.items())
    for n in mask:
        # The same float32 operations but for the order of sums over batches; Adam divides by |g|, which is large here.
        torch.testing.assert_close(found[n], v[n], rtol=1e-3, atol=1e-3 * rate)


@pytest.mark.parametrize("method", METHODS)
def test_the_first_loss_is_the_formula(
    method: str, load: LoadModel, passages: Sequence[Passage], tokenizer: Any
) -> None:
    """L_fgt + ε2·L_rnd + λ·KL at the parent; v0 is another model here, so that the KL is not 0."""
    model, v0 = load("llama"), load("qwen2")
    mask = saliency_mask(model, passages)
    settings = EVERYTHING.model_copy(update={"passages_per_iteration": 100, "iterations": 1, "anchor_passages": 100})
    short = PassageSettings(prompt_tokens=10, continuation_tokens=8, first_prompt_tokens=4)
    kept = retain_passages(tokenizer, {"r": prose(5, 100)}, short, 4)
    fit = make_fit(model, mask, passages, settings, anchor=build_anchor(v0, kept, VOCABULARY, 0, 1000))
    _, trace = METHODS[method](fit, mask)
    pairs = mismatched(passages, 2, random.Random("3 fit"))
    expected = mean_nll(score_passages(model, passages, 0, 1000)) + 0.5 * mean_nll(
        score_passages(model, pairs, 0, 1000)
    )
    divergence, positions = 0.0, 0
    for p in kept:
        with torch.no_grad():
            log_p, log_q = (
                torch.log_softmax(m(torch.tensor([p.ids])).logits[0, :-1].double(), -1) for m in (v0, model)
            )
        divergence += float((log_p.exp() * (log_p - log_q)).sum())
        positions += len(p.ids) - 1
    assert divergence / positions > 0.1
    assert trace.losses == [pytest.approx(expected + 2.0 * divergence / positions, rel=1e-4)]


@pytest.mark.parametrize("method", METHODS)
def test_descent_lowers_the_loss(method: str, load: LoadModel, passages: Sequence[Passage]) -> None:
    model = load("llama")
    mask = saliency_mask(model, passages)
    told: list[tuple[int, int, float]] = []
    settings = PLAIN.model_copy(update={"iterations": 10})
    _, trace = METHODS[method](make_fit(model, mask, passages, settings, progress=lambda *x: told.append(x)), mask)
    assert trace.losses[-1] < 0.8 * trace.losses[0]
    assert told == [(i, 10, loss) for i, loss in enumerate(trace.losses, 1)]


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_decides(method: str, load: LoadModel, passages: Sequence[Passage], tokenizer: Any) -> None:
    model = load("llama")
    mask = saliency_mask(model, passages)
    fit = make_fit(model, mask, passages, EVERYTHING, anchor=retained(model, tokenizer))
    one, trace = METHODS[method](fit, mask)
    torch.rand(7)  # the state of the global generator must not matter
    two, again = METHODS[method](fit, mask)
    other, _ = METHODS[method](replace(fit, seed=4), mask)
    assert trace == again and all(torch.equal(one[n], two[n]) for n in mask)
    assert any(not torch.equal(one[n], other[n]) for n in mask)


@pytest.mark.parametrize("method", METHODS)
def test_a_mask_may_leave_tensors_empty(method: str, load: LoadModel, passages: Sequence[Passage]) -> None:
    model = load("llama")
    mask = {n: torch.zeros_like(m) for n, m in saliency_mask(model, passages).items()}
    name = next(iter(mask))
    mask[name][3, 4] = True
    with Untouched(model):
        vector, _ = METHODS[method](make_fit(model, mask, passages, PLAIN), mask)
    assert {n for n, v in vector.items() if v.numel()} == {name} and vector[name].shape == (1,)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("poison", [False, True])
def test_a_loss_that_is_not_finite_stops_the_fit(
    method: str, poison: bool, load: LoadModel, passages: Sequence[Passage]
) -> None:
    model = load("llama")
    mask = saliency_mask(model, passages)
    settings = PLAIN.model_copy(update={"learning_rate": 1e30, "lora_learning_rate": 1e30})
    if poison:
        settings = PLAIN
        with torch.no_grad():
            model.get_parameter("model.norm.weight")[0] = float("nan")
    with Untouched(model), pytest.raises(NumericalFailure, match="not finite"):
        METHODS[method](make_fit(model, mask, passages, settings), mask)


# --- LoRA -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # nn.Linear, and Conv1D with its transposed weight
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_is_the_mask_times_the_product_of_its_factors(
    architecture: str, dtype: str, load: LoadModel, passages: Sequence[Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(architecture, dtype)
    mask = saliency_mask(model, passages)
    layers: dict[str, Any] = {}

    def spy(*args: Any, **kwargs: Any) -> Any:
        adapted = original(*args, **kwargs)
        layers.update(
            (n.removeprefix("base_model.model."), m) for n, m in adapted.named_modules() if isinstance(m, MaskedLora)
        )
        return adapted

    original = pipeline.lora.get_peft_model
    monkeypatch.setattr(pipeline.lora, "get_peft_model", spy)
    fit = make_fit(model, mask, passages, PLAIN)
    vector, _ = fit_lora(fit, mask, prepare(fit))
    assert {f"{n}.weight" for n in layers} == set(mask)
    for name, layer in layers.items():
        a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        assert a.dtype == b.dtype == torch.float32 and a.shape[0] == b.shape[1] == 4
        base, m = layer.get_base_layer(), mask[f"{name}.weight"]
        transposed = isinstance(base, Conv1D)
        assert transposed == (architecture == "gpt2")
        product = (8 / 4) * (b @ a)  # alpha / rank
        delta = (product.T if transposed else product) * m
        assert float(b.abs().max()) > 0
        # The same product; only the place of the scaling factor, a power of two, differs.
        assert torch.equal(vector[f"{name}.weight"], delta[m])
        weight = base.weight.detach() + delta.to(base.weight.dtype)
        x = torch.randn(2, 5, a.shape[1], generator=torch.Generator().manual_seed(0)).to(base.weight.dtype)
        expected = F.linear(x, weight.T if transposed else weight, base.bias)
        with torch.no_grad():
            assert torch.equal(layer(x), expected)
            assert not torch.equal(base(x), expected)


# --- the forget set ---------------------------------------------------------------------------------------


def numbered(count: int, length: int = 3) -> list[Passage]:
    """Passages whose continuations share no token."""
    span = PassageSpan(request_id="W", prompt_start=0, start=2, end=2 + length)
    return [Passage(span, (1, 2, *range(100 * i, 100 * i + length)), 2) for i in range(1, count + 1)]


@given(count=st.integers(2, 8), k=st.integers(1, 5), seed=st.integers(0, 100))
def test_mismatched_pairs_never_hold_the_truth(count: int, k: int, seed: int) -> None:
    passages = numbered(count)
    pairs = mismatched(passages, k, random.Random(seed))
    assert len(pairs) == count * k
    for i, pair in enumerate(pairs):
        own = passages[i // k]
        assert pair.ids[:2] == own.ids[:2] and pair.prompt_length == 2
        assert pair.continuation != own.continuation
        assert pair.continuation in {p.continuation for p in passages}


@given(places=st.lists(st.integers(0, 3), min_size=2, max_size=8), seed=st.integers(0, 100))
def test_a_passage_that_occurs_twice_is_not_mismatched_with_itself(places: list[int], seed: int) -> None:
    """Slices of shuffled rounds hold a passage twice where two rounds meet."""
    distinct = numbered(4)
    passages = [distinct[i] for i in places]
    for i, pair in enumerate(mismatched(passages, 3, random.Random(seed))):
        if len(set(places)) > 1:
            assert pair.continuation != passages[i // 3].continuation


def test_mismatched_pairs_reach_every_other_passage() -> None:
    passages = numbered(4)
    pairs = mismatched(passages, 200, random.Random(0))
    for i, passage in enumerate(passages):
        borrowed = [p.continuation for p in pairs[200 * i : 200 * (i + 1)]]
        others = {p.continuation for p in passages if p is not passage}
        assert set(borrowed) == others
        assert all(borrowed.count(c) > 40 for c in others)  # 67 expected, uniform


def test_mismatched_pairs_are_no_longer_than_the_truth() -> None:
    short, long = numbered(1, 2)[0], numbered(2, 6)[1]
    pairs = mismatched([short, long], 1, random.Random(0))
    assert pairs[0].continuation == long.continuation[:2]
    assert pairs[1].continuation == short.continuation


def test_a_single_passage_is_shuffled() -> None:
    (passage,) = numbered(1, 8)
    pairs = mismatched([passage], 3, random.Random(0))
    assert all(sorted(p.continuation) == sorted(passage.continuation) for p in pairs)
    assert any(p.continuation != passage.continuation for p in pairs)


@given(count=st.integers(1, 20), size=st.integers(1, 8), iterations=st.integers(1, 6), seed=st.integers(0, 50))
def test_slices_show_every_passage(count: int, size: int, iterations: int, seed: int) -> None:
    passages = numbered(count)
    settings = UnlearnSettings(passages_per_iteration=size, iterations=iterations)
    fit = Fit(nn.Identity(), None, passages, NO_ANCHOR, settings, 0, 10, seed)  # type: ignore[arg-type]
    slices = forget_slices(fit)
    assert {p.ids for s in slices for p in s} == {p.ids for p in passages}
    if count <= size:
        assert [list(s) for s in slices] == [passages] * iterations
    else:
        assert len(slices) == max(iterations, -(-count // size))
        assert all(len(s) == size for s in slices)
        flat = [p.ids for s in slices for p in s]
        shown = [flat.count(p.ids) for p in passages]
        assert max(shown) - min(shown) <= 1  # whole rounds, and a part of one
    assert slices == forget_slices(fit)


# --- a model that has something to forget -----------------------------------------------------------------


@pytest.fixture(scope="module")
def memory(reciting: Path, works: Sequence[str]) -> tuple[nn.Module, list[list[Passage]], Anchor]:
    """The reciting model, the passages of its two works, and an anchor on prose it was trained on."""
    model, tokenizer = load_model(reciting, "cpu"), load_tokenizer(reciting)
    size = PassageSettings(prompt_tokens=24, continuation_tokens=24, first_prompt_tokens=16)
    known = [passages_of(encode(tokenizer, f"W{i}", text), size) for i, text in enumerate(works)]
    anchor = build_anchor(model, retain_passages(tokenizer, {"r": prose(23, 300)}, size, 8), 16, 0, 1000)
    return model, known, anchor


def memorised(model: nn.Module, passages: Sequence[Passage]) -> float:
    return exact_memorisation(score_passages(model, passages, 0, 2000))


@pytest.mark.parametrize("method", METHODS)
def test_the_negated_vector_forgets(method: str, memory: tuple[nn.Module, list[list[Passage]], Anchor]) -> None:
    model, (taken, _), anchor = memory
    mask = saliency_mask(model, taken)
    settings = EVERYTHING.model_copy(
        update={"iterations": 8, "learning_rate": 1e-3, "weight_decay": 0.0, "anchor_weight": 0.0}
    )
    fit = make_fit(model, mask, taken, settings, anchor=anchor, max_tokens=2000)
    before = memorised(model, taken)
    vector, _ = METHODS[method](fit, mask)
    with fit.salient:
        found = []
        for alpha in (2.0, 8.0, 32.0):
            fit.salient.displace(vector, -alpha)
            found.append(memorised(model, taken))
    assert before > 0.85 and min(found) < 0.4
    assert memorised(model, taken) == before


def test_repair_pushes_what_remains_and_then_stops(memory: tuple[nn.Module, list[list[Passage]], Anchor]) -> None:
    model, (taken, kept), anchor = memory
    mask = saliency_mask(model, taken)
    settings = EVERYTHING.model_copy(
        update={
            "repair_iterations": 200, "repair_min_iterations": 0, "repair_floor": 0.05, "repair_learning_rate": 1e-3,
            "anchor_passages": 4,
        }
    )  # fmt: skip
    fit = make_fit(model, mask, taken, settings, anchor=anchor, max_tokens=2000)
    target, looks = 0.4, []

    def remaining() -> Sequence[Passage]:
        looks.append((memorised(model, taken), mean_nll(score_passages(model, taken, 0, 2000))))
        return taken if looks[-1][0] > target else ()

    before = (memorised(model, taken), memorised(model, kept))
    with Untouched(model):
        displacement, trace = repair(fit, fit.salient.zeros(), remaining)
    assert looks[0][0] == before[0] > 0.85  # starts where it was told to
    assert looks[-1][0] <= target and all(em > target for em, _ in looks[:-1])
    assert len(trace.losses) == CHECK_EVERY * (len(looks) - 1) < 200  # ends at the first look that finds nothing
    assert looks[-1][1] > looks[0][1] + 1  # the truth became less likely, not only second best
    with fit.salient:
        fit.salient.displace(displacement)
        assert memorised(model, taken) == looks[-1][0]
        # The other work is held by the anchor and by not being pushed: it must lose less.
        assert memorised(model, kept) > looks[-1][0]


def test_repair_of_nothing_left_runs_its_minimum_on_the_anchor_alone(
    memory: tuple[nn.Module, list[list[Passage]], Anchor],
) -> None:
    model, (taken, _), anchor = memory
    mask = saliency_mask(model, taken)
    noise = {n: 0.02 * torch.randn(int(m.sum()), generator=torch.Generator().manual_seed(0)) for n, m in mask.items()}
    rested = EVERYTHING.model_copy(update={"repair_iterations": 100, "repair_min_iterations": 0})
    fit = make_fit(model, mask, taken, rested, anchor=anchor, max_tokens=2000)
    found, trace = repair(fit, noise, lambda: ())
    assert trace.losses == [] and all(torch.equal(found[n], noise[n]) for n in mask)

    least = rested.model_copy(update={"repair_min_iterations": 8, "anchor_passages": 8, "repair_learning_rate": 1e-3})
    found, trace = repair(replace(fit, settings=least), noise, lambda: ())
    assert len(trace.losses) == 8
    assert trace.losses[-1] < 0.8 * trace.losses[0]  # back towards v0
    assert all(not torch.equal(found[n], noise[n]) for n, m in mask.items() if m.any())

    none = rested.model_copy(update={"repair_iterations": 0})
    found, trace = repair(replace(fit, settings=none), noise, lambda: taken)
    assert trace.losses == [] and all(torch.equal(found[n], noise[n]) for n in mask)


def test_repair_of_a_wrecked_model_is_refused(memory: tuple[nn.Module, list[list[Passage]], Anchor]) -> None:
    model, (taken, _), anchor = memory
    mask = saliency_mask(model, taken)
    fit = make_fit(model, mask, taken, EVERYTHING, anchor=anchor, max_tokens=2000)
    with Untouched(model), pytest.raises(NumericalFailure):
        repair(fit, {n: torch.full_like(v, float("nan")) for n, v in fit.salient.zeros().items()}, lambda: taken)


# --- CUDA -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_cuda(method: str, dtype: str, build: BuildModel, passages: Sequence[Passage], tmp_path: Path) -> None:
    """The same invariant on a GPU, and the CPU's merge gives the weights that were measured there."""
    parent = build("llama", dtype)
    model = load_model(parent, "cuda")
    mask = {n: m.cpu() for n, m in saliency_mask(model, passages).items()}
    fit = make_fit(model, mask, passages, EVERYTHING.model_copy(update={"anchor_weight": 0.0}))
    with Untouched(model):
        vector, _ = METHODS[method](fit, mask)
    merge(parent, tmp_path / "candidate", mask, vector, 2.0, {n: n for n in mask})
    after = tensors(tmp_path / "candidate")
    before = snapshot(model)
    with fit.salient:
        fit.salient.displace(vector, -2.0)
        for name, weight in target_weights(model).items():
            assert torch.equal(bits(weight.detach().cpu()), bits(after[name]))
            assert torch.equal((weight != before[name]).cpu() & ~mask[name], torch.zeros_like(mask[name]))


def test_the_header_reader_agrees_with_safetensors(build: BuildModel) -> None:
    """`tensors` above reads with safetensors, the product with its own reader; both must see the same names."""
    folder = build("gpt2", "bfloat16", True)
    assert {t.name for p in folder.glob("*.safetensors") for t in read_header(p).tensors} == set(tensors(folder))
