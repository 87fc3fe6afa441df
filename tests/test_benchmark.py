"""The benchmark: rows against the model measured by hand, refusal, resumption after kill -9, the same from a seed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import benchmarking
import pytest
import torch
import workspaces

from pipeline.benchmark import processes, recipe, sequence, tasks
from pipeline.benchmark.cost import Meter
from pipeline.benchmark.measure import compare, group_score, measure, membership, together
from pipeline.benchmark.overrides import read_overrides
from pipeline.benchmark.records import FIXED, UNDER_ATTACK, Finished, Inputs, Results, Screened
from pipeline.benchmark.subject import load_subject, passages_in, put_weights
from pipeline.benchmark.summary import privleak_reading
from pipeline.benchmark.texts import BenchText, read_texts, usable_retain
from pipeline.errors import EvidenceError, Interrupted, InvalidInput, NumericalFailure, StoreDamaged, UsageError
from pipeline.files import read_json
from pipeline.membership import auc
from pipeline.method_defaults import DEFAULT_METHOD
from pipeline.metrics import exact_memorisation, score_passages
from pipeline.models import load_model, target_weights
from pipeline.settings import DedupeSettings, PassageSettings
from pipeline.training import TrainingSettings

pytestmark = pytest.mark.slow  # models are trained, methods run; test_benchmarking and test_benchmark_page are quick

TINY = TrainingSettings(
    vocabulary=300, width=32, layers=1, heads=2, feed_forward=48, context=48, batch=4, max_steps=12, check_every=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return benchmarking.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def screened(model: Path, inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Screened, Path]:
    """The untouched model, measured, and the folder of that job."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("vanilla")
    sequence.work(benchmarking.job(model, inputs, "vanilla"), folder)
    return Screened.model_validate(read_json(folder / sequence.SCREENED)), folder


@pytest.fixture(scope="module")
def unlearned(
    model: Path, inputs: Inputs, screened: tuple[Screened, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a method that ran through without interruption."""
    folder = tmp_path_factory.mktemp("ssu")
    sequence.work(benchmarking.job(model, inputs, "ssu", screened[0]), folder)
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    """Finished rows without what a clock or the allocator says."""
    return [f.model_copy(update={"row": f.row.model_copy(update={"cost": None})}).model_dump()
            for f in sequence.finished_rows(folder)]  # fmt: skip


# --- texts ------------------------------------------------------------------------------------------------


def test_steps_are_files_and_folders_in_order(inputs: Inputs) -> None:
    texts = read_texts(inputs)
    assert {step: list(found) for step, found in texts.steps.items()} == {
        "step-1": ["step-1.txt"], "step-2": ["three.txt", "two.txt"],
    }  # fmt: skip
    assert texts.steps["step-1"]["step-1.txt"] == [BenchText(workspaces.WORKS["one"], False)]
    assert sorted(texts.kept) == [f"{name}.txt" for name in sorted(workspaces.KEPT)]
    assert set(texts.works()) == set(workspaces.WORKS.values())


def test_the_digest_is_of_texts_names_and_places(inputs: Inputs, tmp_path: Path) -> None:
    again = benchmarking.write_inputs(tmp_path / "again")
    assert read_texts(again).digest() == read_texts(inputs).digest()  # wherever they lie
    cut = again.model_copy(update={"passage_tokens": 20})
    assert read_texts(cut).digest() != read_texts(inputs).digest()
    Path(again.texts, "step-1.txt").rename(Path(again.texts, "step-9.txt"))
    assert read_texts(again).digest() != read_texts(inputs).digest()


def test_passages_file(tmp_path: Path) -> None:
    lines: list[tuple[str, str, str]] = [
        ("takedown", "b", "one two"), ("unseen", "b", "three four"), ("takedown", "a", "five six"),
        ("takedown", "b", "seven eight"), ("keep_retain", "c", "nine"), ("keep_measured", "c", "ten"),
        ("heldout", "d", "eleven\u2028twelve\u0085"),
    ]  # fmt: skip
    path = tmp_path / "passages.jsonl"
    rows = [dict(zip(("split", "source", "text"), x, strict=True)) for x in lines]
    # JSON may hold these line ends as they are.
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), newline="")
    texts = read_texts(Inputs(texts=str(path)))
    assert list(texts.steps) == ["b", "a"]  # in the order of the file
    assert texts.steps["b"] == {"b": [BenchText("one two", True), BenchText("seven eight", True)]}
    found = {group: [item.text for item in items.values()] for group, items in texts.groups().items()}
    assert found == {
        "retain": ["nine"],
        "kept": ["ten"],
        "heldout": ["eleven\u2028twelve\u0085"],
        "unseen": ["three four"],
    }


def test_all_problems_of_the_texts_are_told(tmp_path: Path) -> None:
    path = tmp_path / "passages.jsonl"
    path.write_text('{"split": "takedown"}\n{"split": "other", "source": "a", "text": "b"}\nno JSON\n[1]\n')
    with pytest.raises(InvalidInput) as caught:
        read_texts(Inputs(texts=str(path), kept=str(tmp_path / "missing")))
    told = str(caught.value)
    assert [f"line {n}" in told for n in (1, 2, 3, 4)] == [True] * 4
    assert "'other'" in told and "missing" in told
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidInput, match="not UTF-8"):
        read_texts(Inputs(texts=str(tmp_path)))
    with pytest.raises(InvalidInput, match="holds no step"):
        read_texts(Inputs(texts=str(tmp_path / "nowhere")))


def test_a_text_in_two_groups_is_refused(tmp_path: Path) -> None:
    inputs = benchmarking.write_inputs(tmp_path / "in")
    Path(str(inputs.unseen), "leak.txt").write_text(workspaces.WORKS["one"])
    with pytest.raises(InvalidInput, match=r"unseen: leak\.txt: is the same text as one of a step"):
        read_texts(inputs)


def test_retain_text_that_holds_a_takedown_is_left_out(tmp_path: Path) -> None:
    inputs = benchmarking.write_inputs(tmp_path / "in")
    Path(str(inputs.retain), "quotes.txt").write_text(workspaces.near_copy(workspaces.WORKS["two"]))
    usable = usable_retain(read_texts(inputs), DedupeSettings())
    assert "quotes.txt" not in usable and len(usable) == len(workspaces.RETAIN)


def test_a_whole_passage_is_prompted_by_its_first_half(tokenizer: Any, text: str) -> None:
    found = passages_in(tokenizer, "x", BenchText(text[:120], True), PassageSettings())
    length = len(tokenizer(text[:120])["input_ids"])
    assert [(p.prompt_length, len(p.ids)) for p in found] == [(length // 2, length)]
    assert passages_in(tokenizer, "x", BenchText("a", True), PassageSettings()) == []
    short = passages_in(tokenizer, "x", BenchText(text[:120], True), PassageSettings(), 11)
    assert [(p.prompt_length, p.ids) for p in short] == [(5, found[0].ids[:11])]


# --- measuring --------------------------------------------------------------------------------------------


def test_a_continuation_by_hand() -> None:
    found = compare("the grey old sea under the lantern", "The grey old sea! home the lantern home")
    assert (found.run, found.accumulated, found.repetition) == (4, 4, 0)
    assert found.rouge_1 == pytest.approx(2 * 6 / 15)  # 6 words in common, of 7 and of 8


def test_measure_agrees_with_the_model_by_hand(model: Path, inputs: Inputs, screened: tuple[Screened, Path]) -> None:
    subject = load_subject(benchmarking.job(model, inputs, "ssu")).memorised(screened[0])
    groups = {"one": subject.of_step("step-1"), "unseen": list(subject.groups["unseen"])}
    found = measure(subject.model, subject.tokenizer, groups, 500)
    scores = score_passages(subject.model, groups["one"], subject.pad, 500)
    one = group_score(found["one"])
    assert one.exact_memorisation == exact_memorisation(scores)
    assert one.passages == len(groups["one"])
    assert one.longest_run is not None and one.longest_run > 5  # it recites
    losses = [[-s.nll / s.tokens for s in score_passages(subject.model, p, subject.pad, 500)] for p in groups.values()]
    assert membership(found["one"], found["unseen"])["loss"] == pytest.approx(auc(*losses))
    assert membership(found["one"], None) == {}
    both = together(found.values())
    assert both.passages == len(both.teacher) == sum(map(len, groups.values()))


def test_behind_a_processor_only_what_is_written_is_measured(
    model: Path, inputs: Inputs, screened: tuple[Screened, Path]
) -> None:
    subject = load_subject(benchmarking.job(model, inputs, "ssu")).memorised(screened[0])

    def only_the_first_word(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, float("-inf")).index_fill(1, torch.tensor([5]), 0.0)

    found = measure(
        subject.model, subject.tokenizer, {"": subject.of_step("step-1")}, 500, processors=[only_the_first_word]
    )
    guarded = group_score(found[""])
    assert guarded.exact_memorisation is guarded.nll is guarded.extractable is None
    assert guarded.longest_run is not None and guarded.longest_run <= 1


# --- a job ------------------------------------------------------------------------------------------------


def test_the_untouched_model_recites_and_is_screened(screened: tuple[Screened, Path]) -> None:
    found, folder = screened
    assert list(found.requests) == ["step-1", "step-2"]
    assert all(r.memorised and r.exact_memorisation > 0.8 for texts in found.requests.values() for r in texts.values())
    assert found.level.mean < 0.6
    done = sequence.finished_rows(folder)
    assert [d.row.step for d in done] == [1, 2]
    assert set(done[0].row.groups) == {"this", "later", "kept", "heldout", "unseen"}
    assert set(done[1].row.groups) == {"this", "earlier", "kept", "heldout", "unseen"}
    assert all(d.row.change is d.row.cost is d.weights is None for d in done)


def test_a_method_forgets_and_its_rows_say_what_its_weights_do(
    model: Path, inputs: Inputs, screened: tuple[Screened, Path], unlearned: Path
) -> None:
    done = sequence.finished_rows(unlearned)
    before = sequence.finished_rows(screened[1])
    last = done[-1].row
    assert last.persistence["step-1"] is not None and before[-1].row.persistence["step-1"] is not None
    assert last.persistence["step-1"] < before[-1].row.persistence["step-1"] - 0.1
    assert last.change is not None and 0 < last.change.changed <= last.change.selected < last.change.total
    assert last.cost is not None and last.cost.tokens > 0 and last.cost.peak_bytes > last.cost.rise_bytes
    assert not (unlearned / "weights-001.safetensors").exists()  # only the newest are kept
    # The weights on disk are the ones measured.
    subject = load_subject(benchmarking.job(model, inputs, "ssu")).memorised(screened[0])
    weights = done[-1].weights
    assert weights is not None
    put_weights(subject.model, unlearned, weights)
    passages = subject.of_step("step-1")
    scores = score_passages(subject.model, passages, subject.pad, subject.max_tokens)
    assert exact_memorisation(scores) == last.persistence["step-1"]
    changed = sum(
        int((now != old).sum())
        for now, old in zip(
            target_weights(subject.model).values(), target_weights(load_model(model, "cpu")).values(), strict=True
        )
    )
    assert changed >= last.change.changed


def test_the_final_model_is_attacked(unlearned: Path) -> None:
    found = read_json(unlearned / sequence.RECOVERED)["attacks"]
    assert set(found) == set(UNDER_ATTACK)
    taken = found["as it is"]["passages"]
    assert found["relearned on 5 % of the text"]["passages"] == taken - 1  # what is trained on is not measured
    assert found["relearned on 5 % of the text"]["nll"] < found["as it is"]["nll"]


def test_the_same_seed_gives_the_same_rows_and_another_one_others(
    model: Path, inputs: Inputs, screened: tuple[Screened, Path], unlearned: Path, tmp_path: Path
) -> None:
    torch.rand(5)  # whatever the global generator was at
    folders = []
    for seed in (0, 1):
        folders.append(tmp_path / str(seed))
        folders[-1].mkdir()
        sequence.work(benchmarking.job(model, inputs, "ssu", screened[0], seed), folders[-1])
    assert rows(folders[0]) == rows(unlearned)  # to the digest of the weights
    assert read_json(folders[0] / sequence.RECOVERED) == read_json(unlearned / sequence.RECOVERED)
    assert rows(folders[1])[0]["weights"] != rows(unlearned)[0]["weights"]


KILLED = """
    import os, signal, sys
    from pathlib import Path
    import torch
    from pipeline.benchmark import sequence
    from pipeline.benchmark.records import Job

    torch.set_num_threads(1)
    name, calls = sys.argv[3], []
    whole = getattr(sequence, name)

    def dies(*args):
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args)

    setattr(sequence, name, dies)
    sequence.work(Job.model_validate_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("where", ["take_down", "_keep"])  # before the second step; between its weights and its row
def test_a_killed_job_goes_on_and_ends_the_same(
    where: str, model: Path, inputs: Inputs, screened: tuple[Screened, Path], unlearned: Path, tmp_path: Path
) -> None:
    job = benchmarking.job(model, inputs, "ssu", screened[0])
    (tmp_path / "job.json").write_text(job.model_dump_json())
    folder = tmp_path / "run"
    folder.mkdir()
    call = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "job.json"), str(folder), where]
    assert subprocess.run(call, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert len(sequence.finished_rows(folder)) == 1 and not sequence.finished(folder)
    first = (folder / "step-001.json").read_bytes()
    sequence.work(job, folder)
    assert rows(folder) == rows(unlearned)
    assert (folder / "step-001.json").read_bytes() == first  # not done again
    assert (folder / "weights-002.safetensors").read_bytes() == (unlearned / "weights-002.safetensors").read_bytes()
    assert read_json(folder / sequence.RECOVERED) == read_json(unlearned / sequence.RECOVERED)


def test_damaged_weights_are_not_gone_on_from(
    model: Path, inputs: Inputs, screened: tuple[Screened, Path], unlearned: Path, tmp_path: Path
) -> None:
    first = Finished.model_validate(read_json(unlearned / "step-001.json"))
    assert first.weights is not None
    (tmp_path / "step-001.json").write_text(first.model_dump_json())
    (tmp_path / first.weights.path).write_bytes(b"nothing")
    with pytest.raises(StoreDamaged, match="was changed"):
        sequence.work(benchmarking.job(model, inputs, "ssu", screened[0]), tmp_path)


def test_a_method_that_breaks_down_is_a_result(
    model: Path, inputs: Inputs, screened: tuple[Screened, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: Any) -> None:
        raise NumericalFailure("The loss of iteration 3 is not finite.")

    monkeypatch.setattr(sequence, "take_down", breaks)
    sequence.work(benchmarking.job(model, inputs, "ga", screened[0]), tmp_path)
    assert sequence.finished(tmp_path)
    stopped = read_json(tmp_path / sequence.STOPPED)
    assert (stopped["method"], stopped["step"]) == ("ga", 1) and "iteration 3" in stopped["reason"]


def test_texts_that_change_meanwhile_are_noticed(model: Path, tmp_path: Path) -> None:
    inputs = benchmarking.write_inputs(tmp_path / "in")
    job = benchmarking.job(model, inputs, "vanilla")
    Path(inputs.texts, "step-1.txt").write_text("Something else.")
    with pytest.raises(UsageError, match="changed while the benchmark ran"):
        sequence.work(job, tmp_path)


# --- the whole --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(model: Path, inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Path]:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        done = benchmarking.in_this_process(patch)
        out = tmp_path_factory.mktemp("whole") / "out"
        found = benchmarking.run(model, inputs, out, ("ssu", "ga"))
        assert done == ["vanilla", "system-prompt", "guard", "ssu", "ga"]
    return found, out


def test_every_row_is_there(results: tuple[Results, Path]) -> None:
    found = results[0]
    assert found.methods == ("vanilla", "system-prompt", "guard", "ssu", "ga")
    assert found.steps == ("step-1", "step-2")
    assert [(r.method, r.seed, r.step) for r in found.rows] == [(m, 0, s) for m in found.methods for s in (1, 2)]
    assert [r.method for r in found.recovered] == list(found.methods)
    assert {r.method for r in found.rows if r.change is None} == {"vanilla", "system-prompt", "guard"} < set(FIXED)


def test_behind_the_guard_only_what_is_taken_down_is_guarded(results: tuple[Results, Path]) -> None:
    first = next(r for r in results[0].rows if (r.method, r.step) == ("guard", 1)).groups
    assert first["this"].exact_memorisation is None
    assert first["this"].longest_run is not None and first["later"].longest_run is not None
    assert first["this"].longest_run < first["later"].longest_run  # still recited


def test_what_is_done_is_not_done_again(
    results: tuple[Results, Path], model: Path, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = benchmarking.in_this_process(monkeypatch)
    again = benchmarking.run(model, inputs, results[1], ("ssu", "ga"))
    assert done == []
    assert again == results[0]  # times included: they are those of the first run
    fewer = benchmarking.run(model, inputs, results[1], ("ga",))
    assert done == [] and fewer.methods == ("vanilla", "system-prompt", "guard", "ga")


def test_texts_that_were_never_memorised_are_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = benchmarking.in_this_process(monkeypatch)
    inputs = benchmarking.write_inputs(tmp_path / "in")
    Path(inputs.texts, "step-3.txt").write_text(workspaces.UNSEEN)
    with pytest.raises(
        EvidenceError, match=r"step-3: step-3\.txt has \d+ passages, exact memorisation 0\.\d+"
    ) as caught:
        benchmarking.run(model, inputs, tmp_path / "x/out")
    assert caught.value.exit_code == 1
    assert "step-1" not in str(caught.value)
    assert done == ["vanilla"]  # no method ran


def test_wrong_calls_are_told_at_once(model: Path, inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(InvalidInput) as caught:
        benchmarking.run(model, inputs, tmp_path / "x/out", ("ssu", "magic", "ssu"), ())
    told = str(caught.value)
    assert "magic" in told and "--methods: names something twice" in told and "--seeds: names nothing" in told
    assert not (tmp_path / "x/out").exists()


def test_settings_of_every_row(tmp_path: Path) -> None:
    path = tmp_path / "takedown.toml"
    path.write_text(
        '[unlearn]\niterations = 3\n[runtime]\ndevice = "cpu"\n[methods.ssu-paper.calibrate]\nfixed_alpha = 1\n'
        '[methods.ga-lora.unlearn]\nmethod = "ga"\nparameterisation = "lora"\niterations = 5\n'
    )
    found = read_overrides(path, ("ga", "ssu-paper", "ga-lora", "ssu-as-released"))
    plain = found.settings("ga", 7)
    assert (plain.unlearn.method, plain.unlearn.iterations, plain.runtime.seed) == ("ga", 3, 7)
    assert not plain.unlearn.masked and plain.unlearn.repair_iterations == 0  # its own defaults
    assert plain.calibrate.fixed_alpha is None and found.settings("ssu-paper", 0).calibrate.fixed_alpha == 1
    lora = found.settings("ga-lora", 0).unlearn
    assert (lora.method, lora.parameterisation, lora.iterations, lora.masked) == ("ga", "lora", 5, False)
    assert found.settings("vanilla", 0).unlearn.method == DEFAULT_METHOD
    released = found.settings("ssu-as-released", 0).unlearn
    assert (released.method, released.anchor_weight, released.recited_openings) == ("ssu-paper", 0.0, 0)


def test_all_problems_of_the_settings_are_told(tmp_path: Path) -> None:
    path = tmp_path / "takedown.toml"
    path.write_text("[unlearn]\nnonsense = 1\n[methods.x.calibrate]\nfixed_alpha = -1\n")
    with pytest.raises(InvalidInput) as caught:
        read_overrides(path, ("ga", "x", "y"))
    told = str(caught.value)
    assert "ga: unlearn.nonsense" in told and "x: calibrate.fixed_alpha" in told and "--methods y: is no method" in told
    for wrong in ("[unlearn", "unlearn = 3\n", "[methods]\nx = 3\n", "[methods.x]\nfixed_alpha = 1\n"):
        path.write_text(wrong)
        with pytest.raises(InvalidInput):
            read_overrides(path, ("ga",))
    path.write_text("[methods.ssu.unlearn]\nrounds = 2\n")
    with pytest.raises(InvalidInput, match="ssu descends towards the text"):
        read_overrides(path, ("ga", "ssu"))


def test_the_released_code_is_a_row(
    model: Path, inputs: Inputs, screened: tuple[Screened, Path], tmp_path: Path
) -> None:
    sequence.work(benchmarking.job(model, inputs, "ssu-as-released", screened[0]), tmp_path)
    change = sequence.finished_rows(tmp_path)[-1].row.change
    assert change is not None and change.reached is None and change.alpha == 1
    assert change.changed > 0.5 * change.total  # its mask does not mask


# --- the project's own models -----------------------------------------------------------------------------


def test_model_and_reference_differ_by_the_texts_alone(inputs: Inputs, tmp_path: Path) -> None:
    texts = read_texts(inputs)
    model, reference = tmp_path / "model", tmp_path / "retrained"
    recipe.train_both(texts, TINY, model, reference)
    assert (model / "tokenizer.json").read_bytes() == (reference / "tokenizer.json").read_bytes()
    assert (model / "model.safetensors").read_bytes() != (reference / "model.safetensors").read_bytes()
    assert read_json(model / recipe.MADE) == read_json(reference / recipe.MADE)  # as many steps
    before = {p: p.read_bytes() for p in (model / "model.safetensors", reference / "model.safetensors")}
    recipe.train_both(texts, TINY, model, reference)  # there already
    assert {p: p.read_bytes() for p in before} == before
    del texts.steps["step-1"]
    with pytest.raises(UsageError, match="was not trained by this recipe on these texts"):
        recipe.train_both(texts, TINY, model, reference)
    texts.retain.clear()
    with pytest.raises(UsageError, match="needs general prose"):
        recipe.train_both(texts, TINY, tmp_path / "a", tmp_path / "b")


def test_recipes_are_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("width = 64\nlearning_rate = 0.01\n")
    assert recipe.read_recipe(path) == TrainingSettings(width=64, learning_rate=0.01)
    path.write_text('depth = 3\nwidth = "wide"\n')
    with pytest.raises(InvalidInput) as caught:
        recipe.read_recipe(path)
    assert len(caught.value.problems) == 2


# --- processes --------------------------------------------------------------------------------------------


def _dies(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_job_in_its_own_process(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its errors arrive with their class; a process that is killed is an interruption."""
    inputs = benchmarking.write_inputs(tmp_path / "in")
    job = benchmarking.job(model, inputs, "vanilla").model_copy(update={"inputs_digest": "another"})
    with pytest.raises(UsageError, match="changed while the benchmark ran"):
        processes.run_alone(job, tmp_path)
    monkeypatch.setattr(processes, "_begin", _dies)
    with pytest.raises(Interrupted, match="ended with -9"):
        processes.run_alone(job, tmp_path)


# --- tasks ------------------------------------------------------------------------------------------------


def test_tasks_need_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"pip install 'takedown-pipeline\[bench\]'"):
        tasks.harness()


def test_tasks_get_the_unlearned_model(
    model: Path, inputs: Inputs, screened: tuple[Screened, Path], unlearned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def wrapped(pretrained: Any, tokenizer: Any) -> Any:
        seen.append(pretrained)
        return pretrained

    def simple_evaluate(model: Any, tasks: Sequence[str], log_samples: bool) -> dict[str, Any]:
        return {"results": {tasks[0]: {"acc,none": 0.25, "acc_norm,none": 0.5}, "odd": {"alias": "odd"}}}

    monkeypatch.setattr(tasks, "harness", lambda: (simple_evaluate, wrapped))
    job, last = benchmarking.job(model, inputs, "ssu", screened[0]), sequence.finished_rows(unlearned)[-1]
    assert tasks.run_tasks(job, unlearned, last, ["hellaswag"]) == {"hellaswag": 0.5}
    old = target_weights(load_model(model, "cpu"))
    assert any(not torch.equal(weight, old[name]) for name, weight in target_weights(seen[0]).items())


# --- cost -------------------------------------------------------------------------------------------------


def test_cost_counts_tokens_and_memory(model: Path) -> None:
    loaded = load_model(model, "cpu")
    ids = torch.zeros((3, 7), dtype=torch.int64)
    with Meter(loaded) as meter:
        loaded(input_ids=ids)
        loaded(ids)
        del_me = torch.ones(20_000_000)  # 80 MB
        del del_me
    assert meter.cost.tokens == 42
    assert meter.cost.rise_bytes > 70_000_000 and meter.cost.peak_bytes > meter.cost.rise_bytes
    assert meter.cost.seconds > 0
    loaded(input_ids=ids)
    assert meter.cost.tokens == 42  # only what happens inside


def test_the_retrained_reference_is_the_ideal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmarking.in_this_process(monkeypatch)
    torch.set_num_threads(1)
    inputs = benchmarking.write_inputs(tmp_path / "in")
    (tmp_path / "recipe.toml").write_text(
        "vocabulary = 1000\nwidth = 48\nlayers = 2\nheads = 4\nfeed_forward = 96\ncontext = 96\nbatch = 8\n"
        "max_steps = 500\ncheck_every = 25\nlearning_rate = 6e-3\nrecited = 0.95\n"
    )
    found = benchmarking.run(tmp_path / "model", inputs, tmp_path / "x/out", ("ga",), recipe=tmp_path / "recipe.toml")
    assert found.reference is not None and found.reference != found.model_root
    assert found.methods[:2] == ("vanilla", "retrained")
    last = {row.method: row.groups for row in found.rows if row.step == 2}
    level = found.screened.level
    never_saw = last["retrained"]["this"].exact_memorisation
    assert never_saw is not None and abs(never_saw - level.mean) < 4 * level.std
    kept = last["retrained"]["kept"].exact_memorisation
    assert kept is not None and kept > 0.8  # it recites what it was trained on
    read = privleak_reading(found)
    leaks = {row.method: read(row) for row in found.rows if row.step == 2}
    assert leaks["retrained"] == 0
    assert leaks["vanilla"] is not None and leaks["vanilla"] < -50
