"""Every method of the field on tiny models: it unlearns, and nothing outside the mask moves.

The losses are compared with their formulas in `test_method_losses`; here methods run as the product runs them.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BuildModel, LoadModel, prose
from torch import nn

from pipeline.anchor import NO_ANCHOR, Anchor, build_anchor, retain_passages
from pipeline.errors import InvalidInput, NumericalFailure, UsageError
from pipeline.fit import Fit
from pipeline.method_defaults import DEFAULT_METHOD, METHOD_DEFAULTS, MethodName
from pipeline.methods import METHODS, task_vector
from pipeline.methods.retain import GENERAL, IN_DISTRIBUTION
from pipeline.metrics import mean_nll, score_passages
from pipeline.models import load_model, load_tokenizer, target_weights
from pipeline.passages import Passage, encode, passages_of
from pipeline.records import PassageSpan
from pipeline.saliency import WeightedPassages, accumulate_gradients, everything, select
from pipeline.settings import PassageSettings, UnlearnSettings, read_settings
from pipeline.sparse import Mask, SalientWeights, norm

PARAMETERISATIONS = ("full", "lora")
SHORT = PassageSettings(prompt_tokens=10, continuation_tokens=8, first_prompt_tokens=4)


def settings(name: str, **more: Any) -> UnlearnSettings:
    """A method with its own defaults, and steps large enough for models of this size."""
    quick = {
        "iterations": 3, "learning_rate": 1e-3, "lora_learning_rate": 1e-2, "lora_rank": 4, "lora_alpha": 8,
        "anchor_passages": 4, "anchor_top_k": 8, "passages_per_iteration": 4,
    }  # fmt: skip
    return UnlearnSettings(method=typing.cast(MethodName, name), **{**quick, **more})


def mask_of(model: nn.Module, passages: Sequence[Passage], masked: bool) -> Mask:
    if not masked:
        return everything(target_weights(model)).mask
    gradients = accumulate_gradients(model, target_weights(model), [WeightedPassages(passages, 1.0)], 0, 1000)
    return select(gradients, 1.0).mask


def make_fit(model: nn.Module, mask: Mask, forget: Sequence[Passage], anchor: Anchor, chosen: UnlearnSettings) -> Fit:
    salient = SalientWeights(target_weights(model), mask)
    return Fit(model, salient, forget, anchor, chosen, pad_id=0, max_tokens=400, seed=3)


@pytest.fixture(scope="module")
def memory(reciting: Path, works: Sequence[str]) -> tuple[nn.Module, list[Passage], Anchor]:
    """The reciting model, the passages of one of its works, and retain text: the other work, and prose."""
    model, tokenizer = load_model(reciting, "cpu"), load_tokenizer(reciting)
    size = PassageSettings(prompt_tokens=24, continuation_tokens=24, first_prompt_tokens=16)
    taken = passages_of(encode(tokenizer, "W0", works[0]), size)
    kept = retain_passages(tokenizer, {"work": works[1], "prose": prose(23, 300)}, size, 12)
    return model, taken, build_anchor(model, kept, 16, 0, 1000)


def retained(model: nn.Module, tokenizer: Any) -> Anchor:
    """Prose, and a passage that even a random model recites: its own greedy continuation."""
    ids = list(range(20, 24))
    with torch.no_grad():
        while len(ids) < 20:
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    own = Passage(PassageSpan(request_id="own", prompt_start=0, start=1, end=20), tuple(ids), 1)
    return build_anchor(model, [own, *retain_passages(tokenizer, {"r": prose(5, 100)}, SHORT, 4)], 8, 0, 1000)


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    sizes = {4: torch.int32, 2: torch.int16}
    return {n: t.contiguous().view(sizes[t.element_size()]).clone() for n, t in model.state_dict().items()}


def test_settings_offer_every_method_with_defaults_that_are_valid(tmp_path: Path) -> None:
    assert set(typing.get_args(MethodName)) == set(METHODS) == set(METHOD_DEFAULTS)
    for name, method in METHODS.items():
        assert method.name == name and method.title and method.source
        path = tmp_path / "takedown.toml"
        path.write_text(f'[unlearn]\nmethod = "{name}"\nlearning_rate = 7e-5\n')
        found = read_settings(path).unlearn
        assert found == UnlearnSettings.model_validate(found.model_dump())  # resolved: nothing is filled in twice
        own = dict(METHOD_DEFAULTS[method.name]) | {"method": name, "learning_rate": 7e-5}
        expected = UnlearnSettings(method="ssu").model_dump() | own
        assert found.model_dump() == expected


def test_what_is_set_goes_over_what_the_method_sets() -> None:
    assert UnlearnSettings(method="ga").masked is False
    assert UnlearnSettings(method="ga", masked=True).masked is True


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_descends_towards_the_text_has_one_round(name: str, tmp_path: Path) -> None:
    path = tmp_path / "takedown.toml"
    path.write_text(f'[unlearn]\nmethod = "{name}"\nrounds = 2\n')
    if METHODS[name].negated:  # type: ignore[index]
        with pytest.raises(InvalidInput, match=f"unlearn.*{name} descends towards the text"):
            read_settings(path)
    else:
        assert read_settings(path).unlearn.rounds == 2
    assert UnlearnSettings.model_validate({"method": name, "rounds": 2}).rounds == 2, "what is on record is read"


@pytest.mark.parametrize("value", ['"gradient-assent"', '["ga"]', "1"])
def test_a_method_that_does_not_exist_is_named_as_the_problem(value: str, tmp_path: Path) -> None:
    path = tmp_path / "takedown.toml"
    path.write_text(f"[unlearn]\nmethod = {value}\n")
    with pytest.raises(InvalidInput, match=r"unlearn\.method.*'npo-kl'"):
        read_settings(path)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("parameterisation", PARAMETERISATIONS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_unlearns_under_its_mask(
    name: str, parameterisation: str, masked: bool, memory: tuple[nn.Module, list[Passage], Anchor]
) -> None:
    model, taken, anchor = memory
    mask = mask_of(model, taken, masked)
    chosen = settings(
        name, parameterisation=parameterisation, masked=masked, iterations=4, rounds=1, passages_per_iteration=16
    )
    fit = make_fit(model, mask, taken, anchor, chosen)
    parent = bits(model)
    before = mean_nll(score_passages(model, taken, 0, 2000))
    vector, trace = task_vector(fit, mask)
    assert all(torch.equal(t, parent[n]) for n, t in bits(model).items())  # the parent is back
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert len(trace.losses) == 4 and trace.tokens > 0 and norm(vector) > 0
    with fit.salient:
        fit.salient.displace(vector, -1.0)
        after = mean_nll(score_passages(model, taken, 0, 2000))
        for weight, tensor in bits(model).items():
            changed = tensor != parent[weight]
            assert not bool((changed & ~mask.get(weight, torch.zeros_like(changed))).any()), weight
    assert after > before  # the text became less likely


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_bytes(name: str, memory: tuple[nn.Module, list[Passage], Anchor]) -> None:
    """In the full parameterisation; that LoRA draws by the seed alone does not depend on the method."""
    model, taken, anchor = memory
    mask = mask_of(model, taken, True)
    fit = make_fit(model, mask, taken, anchor, settings(name))
    one, trace = task_vector(fit, mask)
    torch.rand(7)  # the state of the global generator must not matter
    two, again = task_vector(fit, mask)
    assert trace == again and all(torch.equal(one[n], two[n]) for n in mask)


@pytest.mark.parametrize(
    ("name", "architecture"), [(name, ("llama-tied", "gpt2")[i % 2]) for i, name in enumerate(METHODS)]
)
def test_tied_weights_and_bfloat16(
    name: str, architecture: str, load: LoadModel, passages: Sequence[Passage], tokenizer: Any
) -> None:
    """The embedding that is also the head gets gradients from both ends, and must not move."""
    model = load(architecture, "bfloat16")
    mask = mask_of(model, passages, True)
    fit = make_fit(model, mask, passages, retained(model, tokenizer), settings(name))
    parent = bits(model)
    vector, _ = task_vector(fit, mask)
    assert all(v.dtype == torch.float32 and bool(torch.isfinite(v).all()) for v in vector.values())
    assert norm(vector) > 0
    assert all(torch.equal(t, parent[n]) for n, t in bits(model).items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "parameterisation"), [(name, PARAMETERISATIONS[i % 2]) for i, name in enumerate(METHODS)]
)
def test_a_loss_that_is_not_finite_stops_the_fit(
    name: str, parameterisation: str, build: BuildModel, passages: Sequence[Passage], tokenizer: Any
) -> None:
    model = load_model(build("llama"), "cpu")
    mask = mask_of(model, passages, True)
    chosen = settings(name, parameterisation=parameterisation, learning_rate=1e30, lora_learning_rate=1e30)
    fit = make_fit(model, mask, passages, retained(model, tokenizer), chosen)
    parent = bits(model)
    with pytest.raises(NumericalFailure, match="not finite"):
        task_vector(fit, mask)
    assert all(torch.equal(t, parent[n]) for n, t in bits(model).items())


@pytest.mark.parametrize("parameterisation", PARAMETERISATIONS)
def test_the_learning_rate_falls_evenly_to_its_end(
    parameterisation: str, load: LoadModel, passages: Sequence[Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    plain = torch.optim.AdamW.step

    def noted(self: torch.optim.AdamW, *args: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return plain(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    model = load("llama")
    mask = mask_of(model, passages, True)
    chosen = settings("tv", parameterisation=parameterisation, iterations=5, learning_rate_end=0.2)
    chosen = chosen.model_copy(update={"passages_per_iteration": 16})
    task_vector(make_fit(model, mask, passages, NO_ANCHOR, chosen), mask)
    start = {"full": chosen.learning_rate, "lora": chosen.lora_learning_rate}[parameterisation]
    assert rates == pytest.approx([start * share for share in (1.0, 0.8, 0.6, 0.4, 0.2)])


@pytest.mark.parametrize(
    "name", [n for n, d in METHOD_DEFAULTS.items() if d.get("anchor_weight") and n != DEFAULT_METHOD]
)
def test_a_method_that_holds_on_to_retain_text_refuses_without(
    name: str, load: LoadModel, passages: Sequence[Passage], tokenizer: Any
) -> None:
    model = load("llama")
    mask = mask_of(model, passages, True)
    with pytest.raises(UsageError, match=rf"method = {name}: needs retain text .* there is none"):
        task_vector(make_fit(model, mask, passages, NO_ANCHOR, settings(name)), mask)
    # Told to do without, it does.
    alone = settings(name, anchor_weight=0.0, iterations=1, repair_floor=0.0)  # a random model predicts hardly anything
    vector, _ = task_vector(make_fit(model, mask, passages, NO_ANCHOR, alone), mask)
    assert norm(vector) > 0


def test_the_default_does_without_retain_text(load: LoadModel, passages: Sequence[Passage]) -> None:
    model = load("llama")
    mask = mask_of(model, passages, True)
    vector, _ = task_vector(make_fit(model, mask, passages, NO_ANCHOR, settings(DEFAULT_METHOD, iterations=1)), mask)
    assert norm(vector) > 0


def test_retain_text_of_one_kind_is_not_taken_for_the_other(
    load: LoadModel, passages: Sequence[Passage], tokenizer: Any
) -> None:
    model = load("llama")
    mask = mask_of(model, passages, True)
    both = retained(model, tokenizer)
    recited, others = both.without({"r"}), both.without({"own"})
    assert len(recited.passages) == 1 and len(others.passages) == 4

    def pools(anchor: Anchor) -> tuple[Sequence[Passage], Sequence[Passage]]:
        fit = make_fit(model, mask, passages, anchor, settings("ga"))
        return IN_DISTRIBUTION.choose(fit), GENERAL.choose(fit)

    assert pools(both) == (recited.passages, others.passages)
    assert pools(recited) == (recited.passages, [])
    assert pools(others) == ([], others.passages)
