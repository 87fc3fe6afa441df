"""The stages end to end, from init to publish, on a very small model that really recites: no Prefect, no mocks.

What is promised of a published version is measured here a second time, with other code than the product's.
"""

from __future__ import annotations

import hashlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import workspaces
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from workspaces import HELDOUT, KEPT, SETTINGS, STAGES, UNSEEN, WORKS, copied, near_copy, new_workspace, step, take_in

from pipeline import context, stages
from pipeline.errors import NumericalFailure, StoreDamaged, UsageError
from pipeline.evidence import (
    RECORDS,
    all_evidence,
    check_leaf,
    decisions,
    evidence_of,
    find_check,
    recall,
)
from pipeline.files import digest_file
from pipeline.history import lineage_view, step_view
from pipeline.index import DedupeIndex
from pipeline.ledger import Ledger
from pipeline.models import shared_model
from pipeline.progress import Listener, listening
from pipeline.records import (
    DedupeReport,
    Evaluation,
    Event,
    LedgerEntry,
    MaskReport,
    Publication,
    Record,
    ScreenReport,
    Step,
    Verdict,
)
from pipeline.requests import note as put_on_record
from pipeline.runlog import log_file, read_events
from pipeline.runs import Plan, Run, open_run, plan_run
from pipeline.sparse import load_mask
from pipeline.states import current_version, request_states
from pipeline.upkeep import purge
from pipeline.verify import verify
from pipeline.versions import VersionStore
from pipeline.workspace import Workspace, open_workspace

R = TypeVar("R", bound=Record)

PROMPT, CONTINUATION, FIRST = 16, 16, 8
"""As in `workspaces.SETTINGS`."""
TOLERANCE = SETTINGS["gate"]["forget_tolerance"]
BATCH_1 = {"A": WORKS["one"], "B": near_copy(WORKS["one"]), "C": UNSEEN}
BATCH_2 = {"D": WORKS["two"], "E": WORKS["one"]}
PUBLISHED = Publication(outcome="published", version=1)
STEP_RECORDS = [name for name in RECORDS if name != "leave-out"]  # only a reinstatement leaves steps out


pytestmark = pytest.mark.usefixtures("one_model")


@pytest.fixture
def fresh(tmp_path: Path, model: Path) -> Workspace:
    """A workspace at v0."""
    return new_workspace(tmp_path / "fresh", model)


@dataclass(frozen=True)
class Lineage:
    """Two steps, with what is deleted at the end of each, or by the next one, noted in front."""

    workspace: Workspace
    outcomes: list[Publication | None]
    runs: list[str]
    left: list[list[str]]
    masks: list[dict[str, torch.Tensor]]
    logits: list[torch.Tensor]


def probe(folder: Path) -> torch.Tensor:
    """Logits of a model folder as a user loads it, on a fixed text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    net = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        return net(**tokenizer(WORKS["one"], return_tensors="pt")).logits


@pytest.fixture(scope="session")
def lineage(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Lineage:
    """Batch 1 and batch 2, worked on one after the other. Tests only read it."""
    torch.set_num_threads(1)
    found = Lineage(new_workspace(tmp_path_factory.mktemp("lineage") / "ws", model), [], [], [], [], [])

    def note(run_id: str) -> None:
        run = open_run(found.workspace.root, run_id)
        found.runs.append(run_id)
        found.masks.append(load_mask(run.folder, run.finished("saliency", MaskReport).mask))
        found.logits.append(probe(run.folder / "candidate"))

    for name, texts in (("batch-1", BATCH_1), ("batch-2", BATCH_2)):
        take_in(found.workspace, name, texts)
        found.outcomes.append(step(found.workspace, before_publish=note))
        found.left.append(sorted(p.name for p in (found.workspace.runs / found.runs[-1]).iterdir()))
    return found


def entries(workspace: Workspace) -> tuple[LedgerEntry, ...]:
    with Ledger.open(workspace.ledger, read_only=True) as ledger:
        return ledger.entries()


def states(workspace: Workspace) -> dict[str, str]:
    return {name: s.state for name, s in request_states(entries(workspace)).items()}


def recorded(workspace: Workspace, run_id: str, name: str, kind: type[R]) -> R:
    """A record of a decided run, from its evidence."""
    found = recall(VersionStore(workspace.versions).objects, decisions(entries(workspace))[run_id], name, kind)
    assert found is not None
    return found


def evaluated(workspace: Workspace, run_id: str) -> Evaluation:
    return recorded(workspace, run_id, "evaluate", Evaluation)


def root_of(workspace: Workspace, version: int = 1) -> str:
    return VersionStore(workspace.versions).manifest(version).root


def recited_by_hand(folder: Path, text: str, only: set[int] | None = None) -> float:
    """Exact memorisation, written down a second time: one passage, one token at a time, no batches, no padding.

    Args:
        folder: The model.
        text: The text.
        only: Where the passages start, in tokens, that are measured; None for all.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    net = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    starts = list(range(FIRST, len(ids), CONTINUATION))
    if len(ids) - starts[-1] < CONTINUATION // 4:
        starts.pop()
    hits = total = 0
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        if only is not None and start not in only:
            continue
        begin = max(0, start - PROMPT)
        with torch.inference_mode():
            guesses = net(torch.tensor([ids[begin:end]])).logits[0].argmax(-1).tolist()
        for place in range(start, end):
            hits += guesses[place - begin - 1] == ids[place]
            total += 1
    return hits / total


def never_seen_by_hand(folder: Path) -> float:
    return sum(recited_by_hand(folder, text) for text in HELDOUT.values()) / len(HELDOUT)


# --- batch 1 ----------------------------------------------------------------------------------------------


def test_first_batch_is_answered_request_by_request(lineage: Lineage) -> None:
    assert lineage.outcomes[0] == PUBLISHED
    found = [e.event for e in entries(lineage.workspace) if e.event.run_id == lineage.runs[0]]
    assert [(e.request_id, e.kind, e.version) for e in found] == [
        (None, "planned", 0),
        (None, "accepted", 0),
        (None, "published", 1),
        ("A", "applied", 1),
        ("B", "folded", 1),
        ("C", "not-memorised", 0),
        ("A", "verified", 1),
        ("B", "verified", 1),
    ]
    evidence = {e.request_id: e.data for e in found if e.kind in ("applied", "folded", "not-memorised")}
    assert evidence["A"]["exact_memorisation"] > 0.9
    assert evidence["A"]["memorised"] == evidence["A"]["passages"] > 0
    assert evidence["C"]["memorised"] == 0 and evidence["C"]["exact_memorisation"] < 0.5
    assert (evidence["A"]["similar"], evidence["B"]["similar"]) == (1, 1)  # each other
    (folded,) = (
        d for d in recorded(lineage.workspace, lineage.runs[0], "dedupe", DedupeReport).decisions if d.request_id == "B"
    )
    assert folded.evidence[0].request_id == "A"
    assert VersionStore(lineage.workspace.versions).manifest(1).requests == ("A", "B")


def test_candidate_forgot_and_kept_measured_by_hand(lineage: Lineage, tmp_path: Path) -> None:
    store = VersionStore(lineage.workspace.versions)
    store.restore(0, tmp_path / "v0")
    store.restore(1, tmp_path / "v1")
    # The level is a mean over passages, here over texts; both have about as many tokens each, hence the 0.02.
    ceiling = never_seen_by_hand(tmp_path / "v0") + TOLERANCE + 0.02
    assert recited_by_hand(tmp_path / "v0", WORKS["one"]) > 0.9
    assert recited_by_hand(tmp_path / "v1", WORKS["one"]) <= ceiling
    assert recited_by_hand(tmp_path / "v1", BATCH_1["B"]) <= ceiling
    # Works of the same kind that nobody named are still recited well above the level of never-seen text.
    for name in ("two", "three"):
        assert recited_by_hand(tmp_path / "v1", WORKS[name]) > ceiling
    for text in KEPT.values():
        assert recited_by_hand(tmp_path / "v1", text) > ceiling


def test_evaluation_is_what_a_second_measurement_finds(lineage: Lineage, tmp_path: Path) -> None:
    store = VersionStore(lineage.workspace.versions)
    for version in (0, 1, 2):
        store.restore(version, tmp_path / f"v{version}")
    texts = {**BATCH_1, **BATCH_2, **{f"kept/{n}.txt": t for n, t in KEPT.items()}}
    checked, memorised = 0, dict[str, set[int]]()
    for number, run_id in enumerate(lineage.runs):
        evaluation = evaluated(lineage.workspace, run_id)
        for request in recorded(lineage.workspace, run_id, "screen", ScreenReport).requests:
            if request.memorised:  # what is taken down is held to the passages that were memorised, then and later
                memorised[request.request_id] = {span.start for span in request.memorised}
        for item in evaluation.comparisons:
            if item.name in texts:
                # Batches and padding may turn an argmax that is a tie within 1e-6: one token of about 77.
                for score, version in ((item.before, number), (item.after, number + 1)):
                    by_hand = recited_by_hand(tmp_path / f"v{version}", texts[item.name], memorised.get(item.name))
                    assert score.exact_memorisation == pytest.approx(by_hand, abs=0.014), (run_id, item.name)
                checked += 1
    assert checked >= 9


@pytest.mark.parametrize("version", [1, 2])
def test_every_entry_outside_the_mask_is_bit_identical_to_the_parent(
    lineage: Lineage, tmp_path: Path, version: int
) -> None:
    store = VersionStore(lineage.workspace.versions)
    tensors = []
    for number in (version - 1, version):
        store.restore(number, tmp_path / f"v{number}")
        tensors.append(load_file(tmp_path / f"v{number}" / "model.safetensors"))
    before, after = tensors
    mask, changed = lineage.masks[version - 1], 0
    assert before.keys() == after.keys() and mask.keys() < before.keys()
    for name in before:
        differs = before[name].view(torch.int32) != after[name].view(torch.int32)
        assert not (differs & ~mask[name] if name in mask else differs).any(), name
        changed += int(differs.sum())
    report = store.manifest(version).report
    assert changed == report["changed"]
    assert 0 < changed <= report["selected"] == sum(int(m.sum()) for m in mask.values()) < report["total"]
    # No embedding, no norm is a target.
    assert not [name for name in mask if "embed" in name or "norm" in name or "lm_head" in name]


@pytest.mark.parametrize("version", [1, 2])
def test_version_restores_and_loads_with_the_logits_that_were_evaluated(
    lineage: Lineage, tmp_path: Path, version: int
) -> None:
    VersionStore(lineage.workspace.versions).restore(version, tmp_path / "served")
    assert torch.equal(probe(tmp_path / "served"), lineage.logits[version - 1])


def test_run_folder_keeps_records_and_no_weights_until_the_next_run(lineage: Lineage) -> None:
    assert lineage.left == [sorted(f"{name}.json" for name in STEP_RECORDS)] * 2
    assert [p.name for p in lineage.workspace.runs.iterdir()] == lineage.runs[1:]


def test_whole_lineage_verifies(lineage: Lineage) -> None:
    assert verify(lineage.workspace) == []
    # Nothing is stored that neither a version nor a run's entry names.
    store = VersionStore(lineage.workspace.versions)
    named = store.named([store.manifest(number) for number in store.numbers()])
    named |= {store.objects.object_path(digest) for digest in all_evidence(entries(lineage.workspace))}
    assert set(store.objects.files()) == named


# --- batch 2 ----------------------------------------------------------------------------------------------


def test_second_batch_applies_repeats_and_re_checks_the_first(lineage: Lineage, tmp_path: Path) -> None:
    workspace = lineage.workspace
    assert lineage.outcomes[1] == Publication(outcome="published", version=2)
    assert states(workspace) == {"A": "verified", "B": "verified", "C": "not-memorised", "D": "verified", "E": "repeat"}
    decided = {name: s.decision for name, s in request_states(entries(workspace)).items()}
    assert decided == {"A": "applied", "B": "folded", "C": "not-memorised", "D": "applied", "E": "repeat"}
    assert request_states(entries(workspace))["A"].version == 1  # the first version that excludes it stays
    manifest = VersionStore(workspace.versions).manifest(2)
    assert (manifest.parent, manifest.parent_root, manifest.requests) == (1, root_of(workspace, 1), ("D",))
    evaluation = evaluated(workspace, lineage.runs[1])
    assert {c.name for c in evaluation.of("earlier")} == {"A", "B"}
    assert [c.name for c in evaluation.of("this")] == ["D"]
    ceiling = evaluation.level.mean + TOLERANCE
    assert all(c.after.exact_memorisation <= ceiling + 1e-9 for c in evaluation.of("this", "earlier"))
    VersionStore(workspace.versions).restore(2, tmp_path / "v2")
    for text in (WORKS["one"], WORKS["two"]):
        assert recited_by_hand(tmp_path / "v2", text) <= ceiling + 0.02


def test_index_knows_every_text_taken_down(lineage: Lineage) -> None:
    with DedupeIndex.open(lineage.workspace.index) as index:
        assert set(index.ids()) == {"A", "B", "D"}


def test_nothing_waits_afterwards(lineage: Lineage) -> None:
    assert plan_run(lineage.workspace) is None


# --- other outcomes ---------------------------------------------------------------------------------------


def test_never_seen_texts_need_no_version(fresh: Workspace) -> None:
    take_in(fresh, "batch", {"X": UNSEEN, "Y": workspaces.draw_text("also unseen", 60)})
    assert step(fresh) == Publication(outcome="nothing")
    assert VersionStore(fresh.versions).numbers() == (0,)
    assert current_version(entries(fresh)) == 0
    answers = [e.event for e in entries(fresh) if e.event.kind == "not-memorised"]
    assert [e.request_id for e in answers] == ["X", "Y"]
    for answer in answers:
        assert answer.version == 0
        assert answer.data["memorised"] == 0 and answer.data["passages"] > 3
        assert 0.2 < answer.data["exact_memorisation"] < 0.5
    assert verify(fresh) == []
    assert plan_run(fresh) is None


@pytest.mark.slow
def test_refused_requests_wait_and_are_worked_on_again(fresh: Workspace) -> None:
    fresh.settings_file.write_text(workspaces.toml(workspaces.with_settings(gate={"kept_share": 1.0})))
    take_in(fresh, "batch", {"A": WORKS["one"], "C": UNSEEN})
    assert step(fresh) == Publication(outcome="refused")
    assert VersionStore(fresh.versions).numbers() == (0,)
    assert current_version(entries(fresh)) == 0
    assert states(fresh) == {"A": "refused", "C": "not-memorised"}
    event = next(e.event for e in entries(fresh) if e.event.kind == "refused")
    assert event.version == 0 and len(event.data["reasons"]) == 1
    assert "Kept works" in event.data["reasons"][0]
    assert verify(fresh) == []
    with DedupeIndex.open(fresh.index) as index:
        assert not index.ids()  # what was not taken down must not make later requests repeats

    # Without a change the answer is the same, and a repeated answer is written once.
    again = step(fresh)
    assert again == Publication(outcome="refused")
    kinds = [e.event.kind for e in entries(fresh)]
    number = len(kinds)
    assert step(fresh) == again and len(entries(fresh)) == number
    assert kinds.count("not-memorised") == 1

    fresh.settings_file.write_text(workspaces.toml(SETTINGS))
    assert step(fresh) == PUBLISHED
    assert states(fresh) == {"A": "verified", "C": "not-memorised"}
    assert verify(fresh) == []


def test_impossible_limit_gives_every_reason(fresh: Workspace) -> None:
    limits = {"forget_tolerance": 0.0, "kept_share": 1.0, "perplexity_rise": 0.0}
    settings = workspaces.with_settings(gate=limits, calibrate={"fixed_alpha": 0.01}, unlearn={"repair_iterations": 0})
    fresh.settings_file.write_text(workspaces.toml(settings))
    take_in(fresh, "batch", {"A": WORKS["one"]})
    assert step(fresh) == Publication(outcome="refused")
    reasons = next(e.event for e in entries(fresh) if e.event.kind == "refused").data["reasons"]
    assert any(r.startswith("A (this)") for r in reasons)


def test_requests_can_be_worked_on_one_by_one(fresh: Workspace) -> None:
    take_in(fresh, "batch", {"A": WORKS["one"], "C": UNSEEN})
    assert step(fresh, ["C"]) == Publication(outcome="nothing")
    assert states(fresh) == {"A": "waiting", "C": "not-memorised"}


@pytest.mark.slow
def test_repeat_that_is_still_reproduced_is_taken_out_again(tmp_path: Path, model: Path) -> None:
    workspace = copied(workspaces.published(model.parent), tmp_path / "ws")
    # What v1 still gets right by chance now counts as memorised: some passages of the repeat are to be unlearned.
    settings = workspaces.with_settings(screen={"sigma": 0.0})
    workspace.settings_file.write_text(workspaces.toml(settings))
    take_in(workspace, "batch-2", {"E": WORKS["one"]})
    assert step(workspace) == Publication(outcome="published", version=2)
    state = request_states(entries(workspace))["E"]
    assert (state.state, state.decision, state.version) == ("verified", "applied", 2)
    assert verify(workspace) == []


def test_texts_without_passages_or_words_are_answered(fresh: Workspace) -> None:
    take_in(fresh, "batch", {"P": "!!!", "Q": "x", "R": "7 7", "S": "Ω"})
    assert step(fresh) == Publication(outcome="nothing")
    assert states(fresh) == {"P": "empty", "Q": "not-memorised", "R": "not-memorised", "S": "not-memorised"}
    take_in(fresh, "batch-2", {"A": WORKS["one"], "T": "!", "U": "x"})
    assert step(fresh) == PUBLISHED
    assert states(fresh)["T"] == "empty"
    assert verify(fresh) == []


def test_index_that_was_lost_is_built_again(tmp_path: Path, model: Path) -> None:
    workspace = copied(workspaces.published(model.parent), tmp_path / "ws")
    shutil.rmtree(workspace.index)
    workspace.index.mkdir()
    take_in(workspace, "batch-2", {"E": WORKS["one"]})
    assert step(workspace) == Publication(outcome="nothing")
    assert states(workspace)["E"] == "repeat"


# --- the same everywhere ----------------------------------------------------------------------------------


def test_same_inputs_give_the_same_bytes(lineage: Lineage, fresh: Workspace) -> None:
    take_in(fresh, "other-name", BATCH_1)
    assert (fresh.vault / "key").read_bytes() != (lineage.workspace.vault / "key").read_bytes()
    assert step(fresh) == PUBLISHED
    assert root_of(fresh) == root_of(lineage.workspace)
    files = [VersionStore(w.versions).manifest(1).files for w in (fresh, lineage.workspace)]
    assert files[0] == files[1]


@pytest.mark.slow
def test_another_seed_gives_other_weights(lineage: Lineage, fresh: Workspace) -> None:
    fresh.settings_file.write_text(workspaces.toml(workspaces.with_settings(runtime={"seed": 1})))
    take_in(fresh, "batch", BATCH_1)
    assert step(fresh) == PUBLISHED
    assert root_of(fresh) != root_of(lineage.workspace)


def test_lora_publishes_inside_the_mask(fresh: Workspace, tmp_path: Path) -> None:
    settings = workspaces.with_settings(unlearn={"parameterisation": "lora", "lora_rank": 8, "lora_alpha": 8.0})
    fresh.settings_file.write_text(workspaces.toml(settings))
    take_in(fresh, "batch", {"A": WORKS["one"]})
    masks: list[dict[str, torch.Tensor]] = []

    def note(run_id: str) -> None:
        run = open_run(fresh.root, run_id)
        masks.append(load_mask(run.folder, run.finished("saliency", MaskReport).mask))

    assert step(fresh, before_publish=note) == PUBLISHED
    store = VersionStore(fresh.versions)
    store.restore(0, tmp_path / "v0")
    store.restore(1, tmp_path / "v1")
    before, after = (load_file(tmp_path / v / "model.safetensors") for v in ("v0", "v1"))
    for name in before:
        differs = before[name] != after[name]
        assert not (differs & ~masks[0][name] if name in masks[0] else differs).any(), name
    ceiling = never_seen_by_hand(tmp_path / "v0") + TOLERANCE + 0.02
    assert recited_by_hand(tmp_path / "v1", WORKS["one"]) <= ceiling


@pytest.mark.slow
def test_bfloat16_stays_bfloat16(tmp_path: Path, model: Path) -> None:
    source = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(model).to(torch.bfloat16).save_pretrained(source)
    AutoTokenizer.from_pretrained(model).save_pretrained(source)
    workspace = new_workspace(tmp_path / "ws", source)
    take_in(workspace, "batch", {"A": WORKS["one"]})
    assert step(workspace) == PUBLISHED
    store = VersionStore(workspace.versions)
    store.restore(0, tmp_path / "v0")
    store.restore(1, tmp_path / "v1")
    before, after = (load_file(tmp_path / v / "model.safetensors") for v in ("v0", "v1"))
    assert {t.dtype for t in after.values()} == {torch.bfloat16}
    changed = sum(int((before[n].view(torch.int16) != after[n].view(torch.int16)).sum()) for n in before)
    assert changed == store.manifest(1).report["changed"] > 0
    ceiling = never_seen_by_hand(tmp_path / "v0") + TOLERANCE + 0.02
    assert recited_by_hand(tmp_path / "v1", WORKS["one"]) <= ceiling


# --- without reference texts ------------------------------------------------------------------------------


def test_workspace_without_reference_texts(tmp_path: Path, model: Path) -> None:
    workspace = new_workspace(tmp_path / "ws", model, references=False)
    take_in(workspace, "batch", {"A": WORKS["one"], "C": UNSEEN})
    runs: list[Run] = []
    outcome = step(workspace, before_publish=lambda run_id: runs.append(open_run(workspace.root, run_id)))
    assert outcome == PUBLISHED
    screened = runs[0].finished("screen", ScreenReport)
    assert (screened.level.source, screened.level.mean, screened.level.passages) == ("assumed", 0.35, 0)
    fitted, repaired = (runs[0].finished(name, Step) for name in ("unlearn", "repair"))
    assert repaired == fitted  # there is nothing to mend towards
    assert all(point.utility_nll is None for point in fitted.calibration.curve)
    assert verify(workspace) == []


def test_retain_text_stands_in_for_held_out_text(tmp_path: Path, model: Path) -> None:
    workspace = new_workspace(tmp_path / "ws", model)
    for kind in ("heldout", "kept"):
        shutil.rmtree(workspace.reference / kind)
        (workspace.reference / kind).mkdir()
    take_in(workspace, "batch", {"A": WORKS["one"]})
    assert step(workspace) == PUBLISHED
    assert VersionStore(workspace.versions).manifest(1).report["level"]["source"] == "retain"


def test_retain_text_that_resembles_a_takedown_is_not_held_on_to(tmp_path: Path, model: Path) -> None:
    workspace = new_workspace(tmp_path / "ws", model)
    (workspace.reference / "retain" / "copy.txt").write_text(near_copy(WORKS["one"]))
    (workspace.reference / "kept" / "copy.txt").write_text(WORKS["one"])
    take_in(workspace, "batch", {"A": WORKS["one"]})
    runs: list[Run] = []
    outcome = step(workspace, before_publish=lambda run_id: runs.append(open_run(workspace.root, run_id)))
    assert outcome == PUBLISHED
    excluded = {e.document for e in runs[0].finished("dedupe", DedupeReport).retain_excluded}
    assert excluded == {"retain/copy.txt", "kept/copy.txt"}
    assert {c.name for c in runs[0].finished("evaluate", Evaluation).of("kept")} == {f"kept/{n}.txt" for n in KEPT}


# --- stops and crashes ------------------------------------------------------------------------------------


def test_every_stage_is_computed_once_however_often_the_run_is_stopped(
    lineage: Lineage, fresh: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[str] = []
    plain = Run.stage

    def noting(self: Run, name: str, record: Any, inputs: Any, compute: Callable[[], Any]) -> Any:
        def noted() -> Any:
            computed.append(name)
            return compute()

        return plain(self, name, record, inputs, noted)

    monkeypatch.setattr(Run, "stage", noting)
    levels: list[object] = []
    measure = context.never_seen_level
    monkeypatch.setattr(context, "never_seen_level", lambda *args: levels.append(args) or measure(*args))
    take_in(fresh, "batch", BATCH_1)
    runs = set()
    for name in STAGES:
        assert step(fresh, stop_after=name) is None
        runs.update(p.name for p in fresh.runs.iterdir())
        shared_model.cache_clear()
    assert step(fresh) == PUBLISHED
    screened = [name for name in computed if name.startswith("screened/")]
    assert sorted(screened) == sorted(f"screened/{name}" for name in BATCH_1)
    scored = [name for name in computed if name.startswith("scored/")]
    assert scored == [f"scored/{side}-{kind}-0" for side in ("parent", "candidate") for kind in ("recited", "held")]
    others = [name for name in computed if "/" not in name]
    assert others == ["dedupe", "screen", "saliency", "unlearn", "repair", "merge", "evaluate", "gate"]
    assert len(levels) == 1
    assert len(runs) == 1
    assert root_of(fresh) == root_of(lineage.workspace)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import workspaces
from pipeline.progress import listening
from pipeline.workspace import open_workspace

def stop(stage, done, total, note):
    if stage == {stage!r} and done >= {done}:
        os.kill(os.getpid(), signal.SIGKILL)

with listening(stop):
    workspaces.step(open_workspace(Path({root!r})))
"""


@pytest.mark.slow
def test_killed_run_is_continued_to_the_same_bytes(lineage: Lineage, fresh: Workspace) -> None:
    take_in(fresh, "batch", BATCH_1)
    code = KILLED.format(tests=str(Path(__file__).parent), stage="unlearn", done=5, root=str(fresh.root))
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run_id = next(fresh.runs.iterdir()).name
    assert (fresh.runs / run_id / "saliency.json").exists() and not (fresh.runs / run_id / "unlearn.json").exists()
    assert states(fresh) == dict.fromkeys("ABC", "waiting")
    assert verify(fresh) == []
    assert step(fresh) == PUBLISHED
    assert [p.name for p in fresh.runs.iterdir()] == [run_id]
    assert root_of(fresh) == root_of(lineage.workspace)
    assert verify(fresh) == []


class Crash(BaseException):
    """The process dies here."""


def crash(*args: object, **kwargs: object) -> None:
    raise Crash


def crash_in_the_last_append(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies when everything is in the store and nothing of it in the ledger."""
    append = Ledger.append

    def dying(self: Ledger, *events: Event, **kwargs: Any) -> Any:
        return append(self, *events, **kwargs) if events[0].kind == "planned" else crash()

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "append", dying)
        with pytest.raises(Crash):
            step(workspace)


def test_crash_before_the_plan_is_on_record_measures_nothing(fresh: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    take_in(fresh, "batch", BATCH_1)
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "append", crash)
        with pytest.raises(Crash):
            step(fresh)
    (run,) = fresh.runs.iterdir()
    assert [p.name for p in run.iterdir()] == ["plan.json"]
    assert "planned" not in [e.event.kind for e in entries(fresh)]
    assert step(fresh, stop_after="reference") is None
    assert [e.event.kind for e in entries(fresh)].count("planned") == 1
    assert step(fresh, stop_after="reference") is None
    assert [e.event.kind for e in entries(fresh)].count("planned") == 1, "a resumed run is planned once"


def test_crash_inside_each_stage_is_continued_to_the_same_bytes(
    lineage: Lineage, fresh: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_in(fresh, "batch", BATCH_1)
    # Long stages go on from where they were; how often that is noted is no part of a run's identity.
    fresh.settings_file.write_text(fresh.settings_file.read_text().replace("[runtime]", "[runtime]\nnote_s = 0.0"))
    measured: list[str] = []
    score = stages.score_texts
    monkeypatch.setattr(stages, "score_texts", lambda *args: measured.append(" ".join(args[2])) or score(*args))

    def dying_in(stage: str) -> Listener:
        def listen(name: str, done: int, total: int, note: str) -> None:
            if name == stage and done >= (6 if stage == "repair" else 2):
                raise Crash

        return listen

    for stage in ("screen", "saliency", "unlearn", "repair", "merge", "evaluate"):
        with listening(dying_in(stage)), pytest.raises(Crash):
            step(fresh)
        shared_model.cache_clear()  # what the dead process had in memory, half changed, is gone
        assert verify(fresh) == []
    runs: list[Run] = []
    assert step(fresh, before_publish=lambda run_id: runs.append(open_run(fresh.root, run_id))) == PUBLISHED
    assert len(list(fresh.runs.iterdir())) == 1
    assert root_of(fresh) == root_of(lineage.workspace)
    log = log_file(fresh, runs[0].run_id)
    assert log is not None
    found = [(e["stage"], e["iterations"]) for e in read_events(log) if e["event"] == "taken-up"]
    assert [stage for stage, _ in found] == ["unlearn", "repair"] and all(iterations for _, iterations in found)
    assert len(measured) == 4, "what was measured before the crash is not measured again"
    assert not [*runs[0].folder.glob("*halfway*")]


def test_pieces_that_are_read_again_stand_in_the_same_order(lineage: Lineage, fresh: Workspace) -> None:
    """The order of the comparisons is in the ledger's commitment to them."""
    for number, batch in enumerate((BATCH_1, BATCH_2)):
        take_in(fresh, f"batch-{number}", batch)

        def dying(name: str, done: int, total: int, note: str) -> None:
            if name == "evaluate" and done > total // 2:
                raise Crash

        with listening(dying), pytest.raises(Crash):
            step(fresh)
        shared_model.cache_clear()
        runs: list[Run] = []
        done = step(fresh, before_publish=lambda run_id: runs.append(open_run(fresh.root, run_id)))  # noqa: B023
        assert done == lineage.outcomes[number]
        names = [c.name for c in runs[0].finished("evaluate", Evaluation).comparisons]
        assert names == [c.name for c in evaluated(lineage.workspace, lineage.runs[number]).comparisons]
    assert names != sorted(names)


def test_a_note_counts_only_while_holds_and_withdrawals_stand_still(fresh: Workspace) -> None:
    """A fit that goes on holds out, and pushes down, what it looked up when it began."""
    take_in(fresh, "batch", {name: BATCH_1[name] for name in ("A", "B")})
    assert step(fresh) == PUBLISHED
    take_in(fresh, "more", {"D": WORKS["two"]})
    assert step(fresh, stop_after="saliency") is None
    (run_id,) = [p.name for p in fresh.runs.iterdir() if "D" in open_run(fresh.root, p.name).plan.requests]

    def key() -> str:
        run = open_run(fresh.root, run_id)
        return stages._workbench(run, "unlearn", run.finished("saliency", MaskReport)).fit.halfway.key

    first = key()
    assert key() == first
    for kind, request, same in (("hold", "A", False), ("released", "A", True), ("withdrawn", "B", False)):
        put_on_record(fresh, kind, request, "counsel", "letter")  # type: ignore[arg-type]
        assert (key() == first) is same, kind


@pytest.mark.slow
def test_crash_between_store_and_ledger_publishes_once(
    lineage: Lineage, fresh: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_in(fresh, "batch", BATCH_1)
    crash_in_the_last_append(fresh, monkeypatch)
    # Nothing is shown that was not acknowledged, and verify says what it is.
    assert current_version(entries(fresh)) == 0
    assert states(fresh) == dict.fromkeys("ABC", "waiting")
    first, *others = verify(fresh)
    assert (first.where, first.found.split(":")[0]) == ("v1", "not acknowledged")
    assert {b.found for b in others} == {"unreferenced object"} and len(others) == len(STEP_RECORDS)
    assert step(fresh) == PUBLISHED
    assert [e.event.kind for e in entries(fresh)].count("published") == 1
    assert root_of(fresh) == root_of(lineage.workspace)
    assert verify(fresh) == []


@pytest.mark.slow
def test_crash_between_store_and_ledger_then_other_settings(fresh: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    take_in(fresh, "batch", BATCH_1)
    crash_in_the_last_append(fresh, monkeypatch)
    orphan = root_of(fresh)
    fresh.settings_file.write_text(workspaces.toml(workspaces.with_settings(runtime={"seed": 1})))
    assert step(fresh) == PUBLISHED
    assert root_of(fresh) != orphan
    assert verify(fresh) == []  # nothing of the orphan is left


@pytest.mark.slow
def test_crash_behind_the_ledger_loses_nothing(fresh: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    take_in(fresh, "batch", BATCH_1)
    with monkeypatch.context() as patch:
        patch.setattr(VersionStore, "collect", crash)
        with pytest.raises(Crash):
            step(fresh)
    assert current_version(entries(fresh)) == 1
    assert step(fresh) is None
    assert verify(fresh) == []
    # The index was not written; the next run sees from the ledger that it lacks the first work.
    take_in(fresh, "batch-2", BATCH_2)
    assert step(fresh) == Publication(outcome="published", version=2)
    assert states(fresh)["E"] == "repeat"
    assert verify(fresh) == []


def test_changed_text_in_the_vault_stops_the_run(fresh: Workspace) -> None:
    from pipeline.errors import StoreDamaged
    from pipeline.vault import Vault

    take_in(fresh, "batch", {"A": WORKS["one"]})
    vault = Vault(fresh.vault)
    vault.put(vault.get("A").model_copy(update={"text": WORKS["two"]}), replace=True)
    with pytest.raises(StoreDamaged, match="A: its text in the vault is not the one that was received"):
        step(fresh)


def test_workspace_can_be_moved_between_stages(fresh: Workspace, tmp_path: Path, lineage: Lineage) -> None:
    take_in(fresh, "batch", BATCH_1)
    assert step(fresh, stop_after="unlearn") is None
    fresh.root.rename(tmp_path / "moved")
    moved = open_workspace(tmp_path / "moved")
    assert step(moved) == PUBLISHED
    assert root_of(moved) == root_of(lineage.workspace)


@pytest.mark.slow
def test_other_reference_texts_are_another_run(fresh: Workspace) -> None:
    """A refusal depends on what is to be kept; with other kept texts it must not be replayed."""
    fresh.settings_file.write_text(workspaces.toml(workspaces.with_settings(gate={"kept_share": 1.0})))
    take_in(fresh, "batch", {"A": WORKS["one"]})
    assert step(fresh) == Publication(outcome="refused")
    for path in (fresh.reference / "kept").glob("*.txt"):
        path.unlink()
    assert step(fresh) == PUBLISHED


def test_an_abandoned_run_leaves_no_model_behind(fresh: Workspace) -> None:
    take_in(fresh, "batch", {"A": WORKS["one"]})
    first = plan_run(fresh)
    assert first is not None
    folder = fresh.runs / first.run_id
    (folder / "candidate").mkdir()
    (folder / "candidate" / "model.safetensors").write_bytes(b"large")
    (folder / "mask.safetensors").write_bytes(b"large")
    assert plan_run(fresh) == first and (folder / "mask.safetensors").exists()
    fresh.settings_file.write_text(workspaces.toml(workspaces.with_settings(gate={"kept_share": 0.5})))
    second = plan_run(fresh)
    assert second is not None and second.run_id != first.run_id
    assert not folder.exists()  # whole, so that going back to these settings starts from the beginning
    fresh.settings_file.write_text(workspaces.toml(SETTINGS))
    assert plan_run(fresh) == first and step(fresh) == PUBLISHED


def test_report_says_when_the_records_of_a_run_are_gone(tmp_path: Path, model: Path) -> None:
    workspace = copied(workspaces.published(model.parent), tmp_path / "ws")
    (entry,) = decisions(entries(workspace)).values()
    digest = evidence_of(entry)["dedupe"]
    VersionStore(workspace.versions).objects.object_path(digest).unlink()
    with pytest.raises(StoreDamaged, match=digest.removeprefix("sha256:")):
        step_view(workspace, str(entry.event.run_id), entries(workspace))
    view = lineage_view(workspace, None)
    assert view.steps == ()
    assert [(lost.run_id, lost.version) for lost in view.lost] == [(entry.event.run_id, 1)]
    assert digest.removeprefix("sha256:") in view.lost[0].found
    assert any("evidence 'dedupe'" in b.where and b.found == "is missing" for b in verify(workspace))


def test_held_out_text_that_is_recited_stops_the_run(fresh: Workspace) -> None:
    """A level taken from text that was seen would answer every work with "not memorised"."""
    for path in (fresh.reference / "heldout").glob("*.txt"):
        path.write_text(WORKS["two"])
    take_in(fresh, "batch", {"A": WORKS["one"]})
    with pytest.raises(NumericalFailure, match="seen in training"):
        step(fresh)
    assert states(fresh) == {"A": "waiting"}


def test_recited_retain_text_sets_no_level(tmp_path: Path, model: Path) -> None:
    workspace = new_workspace(tmp_path / "ws", model, references=False)
    for name in ("two", "three"):
        (workspace.reference / "retain" / f"{name}.txt").write_text(WORKS[name])
    take_in(workspace, "batch", {"A": WORKS["one"]})
    assert step(workspace) == PUBLISHED
    assert VersionStore(workspace.versions).manifest(1).report["level"]["source"] == "assumed"


def test_what_could_not_be_checked_is_recorded(tmp_path: Path, model: Path) -> None:
    workspace = new_workspace(tmp_path / "ws", model, references=False)
    take_in(workspace, "batch", {"A": WORKS["one"]})
    assert step(workspace) == PUBLISHED
    (event,) = (e.event for e in entries(workspace) if e.event.kind == "accepted")
    assert [str(text).split(":")[0] for text in event.data["unchecked"]] == ["Works to be kept", "Held-out text"]


@pytest.mark.slow
def test_fixed_strength_is_not_applied_again_after_the_repair(fresh: Workspace) -> None:
    fresh.settings_file.write_text(workspaces.toml(workspaces.with_settings(calibrate={"fixed_alpha": 2.0})))
    take_in(fresh, "batch", {"A": WORKS["one"]})
    runs: list[Run] = []
    step(fresh, before_publish=lambda run_id: runs.append(open_run(fresh.root, run_id)))
    fitted, repaired = (runs[0].finished(name, Step) for name in ("unlearn", "repair"))
    assert fitted.calibration.alpha == 2.0 and 0 < repaired.calibration.alpha <= 1.0


# --- evidence ---------------------------------------------------------------------------------------------


def events_of(workspace: Workspace, kind: str) -> list[LedgerEntry]:
    return [e for e in entries(workspace) if e.event.kind == kind]


def test_deleting_the_runs_changes_nothing_that_is_shown(lineage: Lineage, tmp_path: Path) -> None:
    workspace = copied(lineage.workspace.root, tmp_path / "ws")
    before = lineage_view(workspace, ())
    shutil.rmtree(workspace.runs)
    workspace.runs.mkdir()
    after = lineage_view(workspace, ())
    assert after.model_copy(update={"generated_at": before.generated_at}) == before
    assert [s.run_id for s in after.steps] == lineage.runs
    assert all(s.evaluation and s.verdict and s.mask and s.vectors for s in after.steps)
    assert verify(workspace) == []


def test_a_run_is_planned_with_its_limits_before_anything_is_measured(lineage: Lineage) -> None:
    planned, accepted = events_of(lineage.workspace, "planned"), events_of(lineage.workspace, "accepted")
    published, verified = events_of(lineage.workspace, "published"), events_of(lineage.workspace, "verified")
    assert [e.event.run_id for e in planned] == [e.event.run_id for e in accepted] == lineage.runs
    for number, plan in enumerate(planned):
        mine = [e for e in verified if e.event.run_id == plan.event.run_id]
        assert plan.seq < accepted[number].seq < published[number].seq < mine[0].seq
        assert plan.at < accepted[number].at == published[number].at == mine[0].at, "one transaction"
        limits = plan.event.data["limits"]
        assert limits == SETTINGS["gate"] and plan.event.data["requests"] == (3, 2)[number]
        assert plan.event.data["parent_root"] == root_of(lineage.workspace, number)
        for entry in mine:
            data = entry.event.data
            assert data["limit"] == data["level"]["mean"] + limits["forget_tolerance"]
            assert data["after"]["exact_memorisation"] <= data["limit"] < data["before"]["exact_memorisation"]


def test_the_plan_is_on_record_when_the_first_measurement_is_made(
    fresh: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    measure = context.never_seen_level

    def measured(*args: Any) -> Any:
        seen.append([e.event.kind for e in entries(fresh)])
        return measure(*args)

    monkeypatch.setattr(context, "never_seen_level", measured)
    take_in(fresh, "batch", {"A": WORKS["one"]})
    assert step(fresh, stop_after="reference") is None
    assert seen == [["initialised", "received", "planned"]]


def test_verified_events_say_what_the_evaluation_found(lineage: Lineage) -> None:
    for entry in events_of(lineage.workspace, "verified"):
        evaluation = evaluated(lineage.workspace, str(entry.event.run_id))
        place = find_check(evaluation, str(entry.event.request_id), ("this", "folded", "repeat"))
        assert place is not None
        comparison = evaluation.comparisons[place]
        data = entry.event.data
        assert data["before"] == comparison.before.model_dump(mode="json")
        assert data["after"] == comparison.after.model_dump(mode="json")
        assert data["level"] == evaluation.level.model_dump(mode="json")


def test_what_was_measured_is_bound_by_one_root(lineage: Lineage) -> None:
    """RFC 6962 over the comparisons, computed a second time."""

    def tree(leaves: list[bytes]) -> bytes:
        if len(leaves) == 1:
            return hashlib.sha256(b"\x00" + leaves[0]).digest()
        split = 1 << (len(leaves) - 1).bit_length() - 1
        return hashlib.sha256(b"\x01" + tree(leaves[:split]) + tree(leaves[split:])).digest()

    for entry in events_of(lineage.workspace, "accepted"):
        evaluation = evaluated(lineage.workspace, str(entry.event.run_id))
        assert len(evaluation.comparisons) > 5
        leaves = [check_leaf(comparison) for comparison in evaluation.comparisons]
        assert entry.event.data["checks"] == f"root-sha256:{tree(leaves).hex()}"


def test_evidence_is_every_record_of_the_run(lineage: Lineage) -> None:
    objects = VersionStore(lineage.workspace.versions).objects
    for run_id, entry in decisions(entries(lineage.workspace)).items():
        assert entry.event.kind == "accepted"
        assert set(evidence_of(entry)) == set(STEP_RECORDS)
        assert all(objects.is_whole(digest) for digest in evidence_of(entry).values())
        plan = recall(objects, entry, "plan", Plan)
        assert plan is not None and plan.run_id == run_id
        verdict = recall(objects, entry, "gate", Verdict)
        assert verdict is not None and verdict.accepted
        assert (entry.event.data["reasons"], entry.event.data["unchecked"]) == ([], list(verdict.unchecked))
    last = decisions(entries(lineage.workspace))[lineage.runs[-1]]
    folder = lineage.workspace.runs / lineage.runs[-1]
    assert {n: digest_file(folder / f"{n}.json") for n in STEP_RECORDS} == evidence_of(last)


def test_a_run_without_training_leaves_what_it_has_as_evidence(fresh: Workspace) -> None:
    take_in(fresh, "batch", {"X": UNSEEN})
    assert step(fresh) == Publication(outcome="nothing")
    (entry,) = decisions(entries(fresh)).values()
    assert entry.event.kind == "answered"
    assert set(evidence_of(entry)) == {"plan", "reference", "dedupe", "screen"}
    assert "checks" not in entry.event.data
    (view,) = lineage_view(fresh, None).steps
    assert view.screen is not None and view.evaluation is None and view.verdict is None


@pytest.mark.slow
def test_a_refused_run_leaves_evidence_too(fresh: Workspace) -> None:
    fresh.settings_file.write_text(workspaces.toml(workspaces.with_settings(gate={"kept_share": 1.0})))
    take_in(fresh, "batch", {"A": WORKS["one"]})
    assert step(fresh) == Publication(outcome="refused")
    (entry,) = decisions(entries(fresh)).values()
    assert (entry.event.kind, entry.event.version) == ("refused", 0)
    assert set(evidence_of(entry)) == set(STEP_RECORDS) and len(entry.event.data["reasons"]) == 1
    assert not events_of(fresh, "verified")
    shutil.rmtree(fresh.runs)
    fresh.runs.mkdir()
    (view,) = lineage_view(fresh, None).steps
    assert view.verdict is not None and list(view.verdict.reasons) == entry.event.data["reasons"]
    assert verify(fresh) == []


# --- versions are deltas ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_versions_of_a_run_are_kept_as_deltas_within_the_settings(
    lineage: Lineage, tmp_path: Path, model: Path
) -> None:
    store = VersionStore(lineage.workspace.versions)
    weights = [next(f for f in store.manifest(n).files if f.path == "model.safetensors") for n in range(3)]
    assert [store.objects.is_whole(f.digest) for f in weights] == [True, False, False]
    for number, entry in enumerate(events_of(lineage.workspace, "published"), 1):
        ((name, facts),) = entry.event.data["deltas"].items()
        path = store.objects.paths(weights[number].digest)[-1]
        assert (path.name, digest_file(path), path.stat().st_size) == (name, facts["digest"], facts["size"])
        assert facts["changed"] == store.manifest(number).report["changed"]
        assert facts["size"] < 0.9 * weights[number].size
    whole = new_workspace(tmp_path / "whole", model, workspaces.with_settings(store={"keyframe_every": 1}))
    take_in(whole, "batch", BATCH_1)
    assert step(whole) == PUBLISHED
    assert root_of(whole) == root_of(lineage.workspace)
    assert events_of(whole, "published")[0].event.data["deltas"] == {}
    assert verify(whole) == []


# --- rollback, withdrawal, hold ---------------------------------------------------------------------------


def note(workspace: Workspace, *events: Event) -> None:
    with Ledger.open(workspace.ledger) as ledger:
        ledger.append(*events)


def event(kind: str, request_id: str | None = None, version: int | None = None) -> Event:
    return Event(kind=kind, actor="tester", request_id=request_id, version=version)


def roll_back(workspace: Workspace, version: int, *request_ids: str) -> None:
    """What a rollback writes."""
    note(
        workspace,
        event("rolled-back", version=version),
        *(event("regressed", name, version) for name in request_ids),
    )


def indexed(workspace: Workspace) -> set[str]:
    with DedupeIndex.open(workspace.index) as index:
        return set(index.ids())


@pytest.mark.slow
def test_what_a_rollback_brought_back_is_worked_on_again(tmp_path: Path, model: Path) -> None:
    workspace = copied(workspaces.published(model.parent), tmp_path / "ws")
    assert indexed(workspace) == {"A", "B"}
    roll_back(workspace, 0, "A", "B")
    assert verify(workspace) == []
    assert current_version(entries(workspace)) == 0
    # A later run's dedupe does not find the requests in its own index.
    assert step(workspace) == Publication(outcome="published", version=2)
    manifest = VersionStore(workspace.versions).manifest(2)
    assert (manifest.parent, manifest.parent_root) == (0, root_of(workspace, 0))
    assert manifest.requests == ("A", "B")
    found = request_states(entries(workspace))
    assert {n: (s.state, s.decision, s.version) for n, s in found.items()} == {
        "A": ("verified", "applied", 2),
        "B": ("verified", "folded", 2),
        "C": ("not-memorised", "not-memorised", 0),
    }
    assert current_version(entries(workspace)) == 2
    assert indexed(workspace) == {"A", "B"}
    assert verify(workspace) == []
    VersionStore(workspace.versions).restore(2, tmp_path / "v2")
    ceiling = never_seen_by_hand(model) + TOLERANCE + 0.02
    assert recited_by_hand(tmp_path / "v2", WORKS["one"]) <= ceiling


@pytest.mark.slow
def test_the_same_batch_after_a_rollback_is_another_run(fresh: Workspace) -> None:
    """Same parent, same requests, same settings, same texts: only the history tells the two runs apart."""
    take_in(fresh, "batch", {"A": WORKS["one"]})
    assert step(fresh) == PUBLISHED
    for version in (2, 3):
        roll_back(fresh, 0, "A")
        assert step(fresh) == Publication(outcome="published", version=version)
        state = request_states(entries(fresh))["A"]
        assert (state.state, state.version) == ("verified", version)
        assert VersionStore(fresh.versions).manifest(version).parent == 0
        assert root_of(fresh, version) == root_of(fresh, 1), "the same work, the same weights"
        assert verify(fresh) == []
    runs = [e.event.run_id for e in events_of(fresh, "accepted")]
    assert len(set(runs)) == 3 == len(events_of(fresh, "planned"))


def test_a_copy_of_what_a_rollback_brought_back_is_no_repeat(tmp_path: Path, model: Path) -> None:
    workspace = copied(workspaces.published(model.parent), tmp_path / "ws")
    roll_back(workspace, 0, "A", "B")
    note(workspace, event("hold", "A"), event("hold", "B"))
    take_in(workspace, "batch-2", {"E": WORKS["one"]})
    assert step(workspace) == Publication(outcome="published", version=2)
    found = request_states(entries(workspace))
    assert (found["E"].decision, found["E"].version) == ("applied", 2)
    assert (found["A"].state, found["B"].state) == ("regressed", "regressed")
    assert indexed(workspace) == {"E"}


def test_a_withdrawn_request_is_checked_no_more_and_its_copy_is_no_repeat(tmp_path: Path, model: Path) -> None:
    workspace = copied(workspaces.published(model.parent), tmp_path / "ws")
    note(workspace, event("withdrawn", "A"))
    take_in(workspace, "batch-2", {"D": WORKS["two"]})
    assert step(workspace) == Publication(outcome="published", version=2)
    evaluation = evaluated(workspace, list(decisions(entries(workspace)))[-1])
    assert [c.name for c in evaluation.of("earlier")] == ["B"]
    assert [c.name for c in evaluation.of("this")] == ["D"]
    assert indexed(workspace) == {"B", "D"}
    assert states(workspace)["A"] == "withdrawn"
    assert verify(workspace) == []


@pytest.mark.slow
def test_a_countered_request_stays_out_and_is_still_checked(tmp_path: Path, model: Path) -> None:
    workspace = copied(workspaces.published(model.parent), tmp_path / "ws")
    note(workspace, event("countered", "A"))
    take_in(workspace, "batch-2", {"D": WORKS["two"]})
    assert step(workspace) == Publication(outcome="published", version=2)
    evaluation = evaluated(workspace, list(decisions(entries(workspace)))[-1])
    assert {c.name for c in evaluation.of("earlier")} == {"A", "B"}
    note(workspace, event("reinstated", "A"))
    take_in(workspace, "batch-3", {"G": WORKS["three"]})
    assert step(workspace) == Publication(outcome="published", version=3)
    evaluation = evaluated(workspace, list(decisions(entries(workspace)))[-1])
    assert {c.name for c in evaluation.of("earlier")} == {"B", "D"}


@pytest.mark.slow
def test_a_request_on_hold_is_not_worked_on(fresh: Workspace) -> None:
    take_in(fresh, "batch", {"A": WORKS["one"], "X": UNSEEN})
    note(fresh, event("hold", "A"))
    with pytest.raises(UsageError, match="Not waiting: A"):
        plan_run(fresh, ["A"])
    assert step(fresh) == Publication(outcome="nothing")
    assert states(fresh) == {"A": "waiting", "X": "not-memorised"}
    assert plan_run(fresh) is None
    note(fresh, event("released", "A"))
    assert step(fresh) == PUBLISHED
    assert states(fresh)["A"] == "verified"
    assert verify(fresh) == []


def test_a_request_put_on_hold_in_the_middle_is_another_run(fresh: Workspace) -> None:
    take_in(fresh, "batch", {"A": WORKS["one"], "X": UNSEEN})
    assert step(fresh, stop_after="screen") is None
    note(fresh, event("hold", "A"))
    assert step(fresh) == Publication(outcome="nothing")
    assert states(fresh) == {"A": "waiting", "X": "not-memorised"}


def test_a_lineage_whose_v0_was_purged_goes_on_with_what_was_measured(tmp_path: Path, model: Path) -> None:
    """Where a release changes how much of v0 is kept; what a measurement means must be the same."""
    published = copied(workspaces.published(model.parent), tmp_path / "ws")
    before = sorted((published.reference / "measured").iterdir())
    purge(published, 1, "tester", "retention")
    take_in(published, "later", {"L": WORKS["three"]})
    settings = workspaces.with_settings(unlearn={"anchor_pool": 7}, screen={"sigma": 2.5})
    published.settings_file.write_text(workspaces.toml(settings))
    with pytest.raises(UsageError, match="v0: was purged"):
        step(published)
    settings["screen"]["sigma"] = SETTINGS["screen"]["sigma"]
    published.settings_file.write_text(workspaces.toml(settings))
    publication = step(published)
    assert publication is not None and publication.version == 2
    assert sorted((published.reference / "measured").iterdir()) == before
    # The settings of v2's own run are not those that v0 was measured with: what counts is what there is.
    take_in(published, "last", {"M": UNSEEN})
    settings["unlearn"]["anchor_pool"] = 8
    published.settings_file.write_text(workspaces.toml(settings))
    answered = step(published)
    assert answered is not None and answered.outcome == "nothing"
    assert sorted((published.reference / "measured").iterdir()) == before
