"""A killed fit goes on from where it was noted, and ends with the same bits as one that nobody disturbed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from workspaces import HELDOUT, KEPT, WORKS

from pipeline import halfway
from pipeline.anchor import Anchor, build_anchor, retain_passages
from pipeline.errors import NoSpace
from pipeline.fit import Fit, Trace
from pipeline.halfway import Halfway, random_state, set_random_state
from pipeline.methods import task_vector
from pipeline.methods.short_context import risen
from pipeline.models import load_model, load_tokenizer, target_weights
from pipeline.passages import Passage, encode, passages_of
from pipeline.saliency import everything
from pipeline.settings import PassageSettings, UnlearnSettings
from pipeline.sparse import SalientWeights, Vector
from pipeline.unlearn import repair

SIZE = PassageSettings(prompt_tokens=16, continuation_tokens=16, first_prompt_tokens=8)

CASES: dict[str, dict[str, Any]] = {
    # Four rounds, in which ceilings sink; earlier texts are above the target from the start.
    "short-context": {"iterations": 3, "rounds": 4, "recited_passages": 4, "learning_rate_end": 0.1},
    # Beside them one that is below it, and held there.
    "held": {"iterations": 3, "rounds": 2, "recited_passages": 4, "replay_passages": 2},
    "slices": {"iterations": 6, "passages_per_iteration": 1, "weight_decay": 0.1},
    "ssu": {"method": "ssu", "iterations": 6, "random_label_weight": 0.5, "repair_iterations": 12,
            "repair_min_iterations": 12},
    # Blocks above the one that is steered have no gradient, so Adam knows nothing of their factors.
    "rmu": {"method": "rmu", "parameterisation": "lora", "iterations": 5, "lora_rank": 4},
    "lora": {"method": "ssu", "parameterisation": "lora", "iterations": 5, "lora_rank": 4},
}  # fmt: skip


class Killed(Exception):
    """Stands for kill -9: nothing after it is done."""


@pytest.fixture(scope="module")
def memory(model: Path) -> tuple[nn.Module, dict[str, list[Passage]], Anchor]:
    torch.set_num_threads(1)
    net, tokenizer = load_model(model, "cpu"), load_tokenizer(model)
    works = {**{n: WORKS[n] for n in ("one", "two", "three")}, **KEPT, "never": HELDOUT["heldout-4"]}
    texts = {name: passages_of(encode(tokenizer, name, text), SIZE) for name, text in works.items()}
    return net, texts, build_anchor(net, retain_passages(tokenizer, HELDOUT, SIZE, 12), 16, 0, 1000)


def make_fit(memory: tuple[nn.Module, dict[str, list[Passage]], Anchor], case: str) -> Fit:
    net, texts, anchor = memory
    fields = {"method": "short-context", "learning_rate": 1e-3, "anchor_passages": 4, "anchor_weight": 2.0,
              "repair_learning_rate": 1e-3}  # fmt: skip
    settings = UnlearnSettings.model_validate({**fields, **CASES[case]})
    weights = target_weights(net)

    def remaining() -> Sequence[Passage]:
        return [*texts["one"], *texts["two"][:2]]

    earlier = [*texts["two"], *(texts["never"] if case == "held" else ())]
    fit = Fit(
        net, SalientWeights(weights, everything(weights).mask), texts["one"], anchor, settings, 0, 1000, 5,
        target=0.5, earlier=earlier, remaining=remaining, never_seen_nll=6.0,
    )  # fmt: skip
    assert (case == "held") == any(p in risen(fit, fit.earlier)[1] for p in texts["never"])
    return fit


def descend(fit: Fit) -> tuple[Vector, Trace]:
    vector, trace = task_vector(fit, everything(target_weights(fit.model)).mask)
    if fit.settings.parameterisation == "full" and fit.settings.method == "ssu":
        return repair(fit, vector, lambda: list(fit.remaining()))
    return vector, trace


def told(trace: Trace) -> dict[str, Any]:
    return {name: value for name, value in vars(trace).items() if name != "left"}


def dying_after(count: int) -> Callable[[int, int, float], None]:
    seen: list[int] = []

    def progress(iteration: int, of: int, loss: float) -> None:
        seen.append(iteration)
        if len(seen) > count:
            raise Killed

    return progress


@pytest.mark.parametrize("case", CASES)
def test_a_fit_that_is_killed_again_and_again_ends_as_if_it_had_not_been(
    case: str, memory: tuple[nn.Module, dict[str, list[Passage]], Anchor], tmp_path: Path
) -> None:
    fit = make_fit(memory, case)
    if case == "ssu":  # the repair alone; what it starts from is in the run's folder
        vector, _ = task_vector(fit, everything(target_weights(fit.model)).mask)

        def go(fit: Fit) -> tuple[Vector, Trace]:
            return repair(fit, vector, lambda: list(fit.remaining()))
    else:
        go = descend
    whole, trace = go(fit)
    spared: list[int] = []
    notes = Halfway(tmp_path, "unlearn", "key", 0.0, lambda event, **facts: spared.append(facts["iterations"]))
    done = None
    for _ in range(40):
        try:
            done = go(replace(fit, halfway=notes, progress=dying_after(5 if case == "ssu" else 2)))
            break
        except Killed:
            assert fit.salient.moved() == 0
    assert done is not None and len(spared) >= 2 and spared == sorted(set(spared))
    for name, value in whole.items():
        assert torch.equal(value.view(torch.int32), done[0][name].view(torch.int32)), name
    # A note of before a kill knows nothing of what was lost; what counts is the same in the end.
    assert told(done[1]) == told(trace)
    if case == "short-context":
        assert trace.rounds == 4 and trace.again == {"two"}
    (tmp_path / ".tmp-unlearn-9.safetensors").touch()  # a kill in the middle of writing
    notes.clear()
    assert not [*tmp_path.iterdir()]


def test_a_note_of_other_work_or_other_bytes_is_none(
    memory: tuple[nn.Module, dict[str, list[Passage]], Anchor], tmp_path: Path
) -> None:
    fit = make_fit(memory, "short-context")
    notes = Halfway(tmp_path, "unlearn", "key", 0.0)
    with pytest.raises(Killed):
        descend(replace(fit, halfway=notes, progress=dying_after(4)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["unlearn-4.safetensors", "unlearn-halfway.json"]
    found = notes.take_up()
    assert found is not None and found[0] == 4
    assert Halfway(tmp_path, "unlearn", "other", 0.0).take_up() is None
    assert Halfway(tmp_path, "repair", "key", 0.0).take_up() is None and Halfway().take_up() is None
    path, note = tmp_path / "unlearn-4.safetensors", tmp_path / "unlearn-halfway.json"
    good, text = path.read_bytes(), note.read_text()
    for bad in (b"", good[:-1], good[:-4] + b"\0\0\0\1"):
        path.write_bytes(bad)
        assert notes.take_up() is None
    path.write_bytes(good)
    for bad_text in (
        "",
        "[]",
        "{}",
        text[:-20],
        text.replace("iteration", "iterations"),
        text.replace("sha256:", ""),
        text.replace('"round":2', '"round":1'),
    ):
        note.write_text(bad_text)
        assert notes.take_up() is None
    note.write_text(text)
    assert notes.take_up() is not None
    whole, _ = descend(fit)
    path.unlink()
    begun_anew, _ = descend(replace(fit, halfway=Halfway(tmp_path, "unlearn", "key", 1e9)))
    assert all(torch.equal(whole[name], begun_anew[name]) for name in whole)


def test_notes_hold_nothing_from_which_a_text_can_be_read(
    memory: tuple[nn.Module, dict[str, list[Passage]], Anchor], tmp_path: Path
) -> None:
    """A ceiling says what the model gives the true token: with the model and the first words, whoever has all ceilings
    has the text. Only weights, moments, and how often a ceiling sank are noted."""
    fit = make_fit(memory, "short-context")
    with pytest.raises(Killed):
        descend(replace(fit, halfway=Halfway(tmp_path, "unlearn", "key", 0.0), progress=dying_after(8)))
    note = json.loads((tmp_path / "unlearn-halfway.json").read_text())
    assert note["numbers"].keys() == {"random", "trace", "again", "loss", "iteration"}
    assert note["numbers"]["loss"].keys() == {"sunk", "round", "drawn"}
    (path,) = tmp_path.glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
    weights = target_weights(fit.model)
    assert names == {f"{kind}.{n}" for kind in ("value", "step", "exp_avg", "exp_avg_sq") for n in weights}


def test_from_when_a_text_comes_back_nothing_more_is_noted(
    memory: tuple[nn.Module, dict[str, list[Passage]], Anchor], tmp_path: Path
) -> None:
    """What came back in a round gets its ceilings then, which are noted nowhere: that round is done again."""
    fit = make_fit(memory, "short-context")
    other = memory[1]["three"]
    fit = replace(fit, remaining=lambda: [*fit.forget, *other], earlier=[*fit.earlier, *other], target=0.99)
    risen_only_later = replace(fit, on_hold=["three"])  # not above the target when it is prepared
    notes = Halfway(tmp_path, "unlearn", "key", 0.0)
    whole, trace = descend(risen_only_later)
    assert "three" in trace.again
    with pytest.raises(Killed):
        descend(replace(risen_only_later, halfway=notes, progress=dying_after(8)))
    found = notes.take_up()
    assert found is not None and found[0] == 3, "the last note is that of the round before"
    again, traced = descend(replace(risen_only_later, halfway=notes))
    assert all(torch.equal(whole[name], again[name]) for name in whole) and told(traced) == told(trace)


@pytest.mark.parametrize("error", [NoSpace("full"), OSError(28, "full"), SafetensorError("I/O error")])
def test_a_fit_that_cannot_be_noted_goes_on(
    error: Exception,
    memory: tuple[nn.Module, dict[str, list[Passage]], Anchor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fit, said = make_fit(memory, "short-context"), []
    notes = Halfway(tmp_path, "unlearn", "key", 0.0, lambda event, **facts: said.append((event, facts)))

    def full(*args: object) -> None:
        raise error

    monkeypatch.setattr(halfway, "save_tensors", full)
    whole, _ = descend(fit)
    noted, _ = descend(replace(fit, halfway=notes))
    assert all(torch.equal(whole[name], noted[name]) for name in whole) and not [*tmp_path.iterdir()]
    assert set(map(str, said)) == {str(("not-noted", {"type": type(error).__name__}))}


def test_notes_are_as_far_apart_as_was_asked(tmp_path: Path) -> None:
    notes, made = Halfway(tmp_path, "unlearn", "key", 1e9), []

    def state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        made.append(1)
        return {"a": torch.zeros(1)}, {}

    notes.note(1, state)
    Halfway().note(1, state)
    assert not made and not [*tmp_path.iterdir()]


def test_a_generator_goes_on_where_it_was() -> None:
    one, two = random.Random("a"), random.Random("b")
    one.random()
    set_random_state(two, json.loads(json.dumps(random_state(one))))
    assert [one.random() for _ in range(9)] == [two.random() for _ in range(9)]
