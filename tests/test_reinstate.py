"""Putting texts back: on a very small model that really recites, end to end, and measured a second time by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import workspaces
from transformers import AutoModelForCausalLM, AutoTokenizer
from workspaces import (
    HELDOUT,
    SETTINGS,
    UNSEEN,
    WORKS,
    copied,
    draw_text,
    new_workspace,
    reinstatement,
    step,
    take_in,
    toml,
    with_settings,
)

from pipeline import answers
from pipeline.certificate import certify, write_certificate
from pipeline.errors import Refused, UsageError
from pipeline.evidence import RECORDS, evidence_of, recall
from pipeline.history import lineage_view, step_view
from pipeline.index import DedupeIndex
from pipeline.records import Evaluation, LeftOut, Publication
from pipeline.report import render
from pipeline.report_facts import excluded_requests, measured_scores
from pipeline.requests import note
from pipeline.rollback import roll_back
from pipeline.states import current_version, decisions, excluded, request_states
from pipeline.upkeep import purge
from pipeline.verify import verify
from pipeline.versions import VersionStore
from pipeline.workspace import Workspace, read_entries

CEILING = SETTINGS["gate"]["forget_tolerance"] + 0.15
"""Above the never-seen level as measured here, which cuts passages its own way."""
LENIENT = with_settings(screen={"sigma": 5.0})
"""For what comes after the two steps. Rounding differs from processor to processor, and passages of 16 tokens scatter:
what one machine brings well below the limit of memorised text stays just above it on another."""
_made: dict[str, Workspace] = {}


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_model")]


@pytest.fixture
def workspace(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, model: Path) -> Workspace:
    """v1 took out A and D in one step, v2 G. N was never memorised, R is a repeat of G."""
    if "two steps" not in _made:
        made = new_workspace(tmp_path_factory.mktemp("made") / "ws", model)
        take_in(made, "batch-1", {"A": WORKS["one"], "D": WORKS["two"], "N": UNSEEN})
        assert step(made) == Publication(outcome="published", version=1)
        take_in(made, "batch-2", {"G": WORKS["three"]})
        assert step(made) == Publication(outcome="published", version=2)
        take_in(made, "batch-3", {"R": WORKS["three"]})
        assert step(made) == Publication(outcome="nothing")
        made.settings_file.write_text(toml(LENIENT))
        _made["two steps"] = made
    return copied(_made["two steps"].root, tmp_path / "ws")


def released(workspace: Workspace, *requests: str) -> None:
    for name in requests:
        note(workspace, "countered", name, "tester", "licence shown")


def states(workspace: Workspace) -> dict[str, str]:
    return {name: state.state for name, state in request_states(read_entries(workspace)).items()}


def recited(workspace: Workspace, version: int, folder: Path, text: str) -> float:
    """Share of a text's tokens that a version predicts, each from the 16 before it, with nothing of the product's."""
    if not (folder / f"v{version}").exists():
        VersionStore(workspace.versions).restore(version, folder / f"v{version}")
    tokenizer = AutoTokenizer.from_pretrained(folder / f"v{version}")
    net = AutoModelForCausalLM.from_pretrained(folder / f"v{version}").eval()
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    with torch.inference_mode():
        rows = torch.stack([ids[i : i + 17] for i in range(0, len(ids) - 17)])
        predicted = net(input_ids=rows).logits[:, 15].argmax(-1)
    return float((predicted == rows[:, 16]).float().mean())


def test_one_text_comes_back_and_the_others_stay_out(workspace: Workspace, tmp_path: Path) -> None:
    released(workspace, "A")
    before = read_entries(workspace)
    assert reinstatement(workspace, ["A"]) == Publication(outcome="published", version=3)

    level = sum(recited(workspace, 0, tmp_path, text) for text in HELDOUT.values()) / len(HELDOUT)
    assert recited(workspace, 2, tmp_path, WORKS["one"]) < level + CEILING < 0.6
    assert recited(workspace, 3, tmp_path, WORKS["one"]) > 0.65
    for work in ("two", "three"):
        assert recited(workspace, 0, tmp_path, WORKS[work]) > 0.8
        assert recited(workspace, 3, tmp_path, WORKS[work]) < level + CEILING

    entries = read_entries(workspace)
    assert [(e.event.kind, e.event.request_id, e.event.version) for e in entries[len(before) :]] == [
        ("planned", None, 2), ("accepted", None, 2), ("published", None, 3), ("reinstated", "A", 3),
        ("folded", "R", 3), ("verified", "R", 3),
    ]  # fmt: skip
    assert entries[len(before)].event.data["left_out"] == [1]
    assert entries[-3].event.data == {"reason": "licence shown", "left_out": [1]}
    assert states(workspace) == {
        "A": "reinstated",
        "D": "verified",
        "N": "not-memorised",
        "G": "verified",
        "R": "verified",
    }
    assert set(excluded(entries, 3)) == {"D", "G", "R"}
    assert set(excluded(entries, 2)) == {"D", "G", "R"}
    assert request_states(entries)["D"].version == 1, "the first version that excludes it is the same"
    manifest = VersionStore(workspace.versions).manifest(3)
    assert (manifest.parent, manifest.requests, manifest.report["left_out"]) == (2, ("R",), [1])
    assert verify(workspace) == []


def test_what_was_measured_and_decided_is_evidence(workspace: Workspace) -> None:
    released(workspace, "A")
    reinstatement(workspace, ["A"])
    entries = read_entries(workspace)
    run_id, entry = list(decisions(entries).items())[-1]
    assert set(evidence_of(entry)) == set(RECORDS)
    objects = VersionStore(workspace.versions).objects
    evaluation = recall(objects, entry, "evaluate", Evaluation)
    left = recall(objects, entry, "leave-out", LeftOut)
    assert evaluation is not None and left is not None
    roles = {c.name: c.role for c in evaluation.comparisons if c.role not in ("kept", "held-out")}
    assert roles == {"A": "reinstated", "D": "earlier", "G": "earlier", "R": "folded"}
    assert left.versions == (1,) and 0 < left.exact <= left.changed
    view = step_view(workspace, run_id, entries)
    assert view.left_out == (1,) and view.version == 3
    assert {r.request_id for r in view.screen.requests if r.memorised} >= {"D"}, "it came back and was worked on again"


def test_a_later_step_goes_on_from_there(workspace: Workspace, tmp_path: Path) -> None:
    released(workspace, "A")
    reinstatement(workspace, ["A"])
    take_in(workspace, "batch-4", {"H": WORKS["one"]})
    assert step(workspace) == Publication(outcome="published", version=4)
    found = request_states(read_entries(workspace))["H"]
    assert (found.state, found.decision, found.version) == ("verified", "applied", 4), "no repeat of what is back"
    with DedupeIndex.open(workspace.index) as index:
        assert set(index.ids()) == {"D", "G", "H", "R"}
    assert recited(workspace, 4, tmp_path, WORKS["one"]) < 0.5
    assert verify(workspace) == []


def test_without_its_last_request_the_model_is_the_untouched_one(workspace: Workspace) -> None:
    released(workspace, "A", "D", "G", "R")
    assert reinstatement(workspace, ["G", "D", "R", "A"]) == Publication(outcome="published", version=3)
    store = VersionStore(workspace.versions)
    assert store.manifest(3).root == store.manifest(0).root, "bit for bit"
    assert store.manifest(3).report["left_out"] == [2, 1]
    assert "alpha" not in store.manifest(3).report, "nothing was trained"
    assert verify(workspace) == []


def test_one_after_the_other_gives_the_untouched_model_too(workspace: Workspace) -> None:
    for request in ("A", "D"):
        released(workspace, request)
        reinstatement(workspace, [request])
    note(workspace, "withdrawn", "R", "tester", "sent by mistake")
    note(workspace, "withdrawn", "G", "tester", "settled")
    assert reinstatement(workspace, ["G", "R"]) == Publication(outcome="published", version=5)
    store = VersionStore(workspace.versions)
    assert [store.manifest(v).report.get("left_out") for v in range(6)] == [None, None, None, [1], [3], [4, 2]]
    assert store.manifest(5).root == store.manifest(0).root
    assert set(states(workspace).values()) == {"reinstated", "not-memorised"}
    assert excluded(read_entries(workspace), 5) == {}
    assert verify(workspace) == []
    shown = lineage_view(workspace, [])
    assert "reinstated" in render(shown)


def test_every_problem_is_named_and_nothing_changed(workspace: Workspace) -> None:
    released(workspace, "D")
    note(workspace, "hold", "D", "tester", "court order")
    before = read_entries(workspace)
    with pytest.raises(UsageError) as error:
        reinstatement(workspace, ["A", "D", "X"])
    message = str(error.value)
    assert message.startswith("Nothing was changed.")
    assert "A: is verified; only what was countered or withdrawn" in message
    assert "D: is on hold" in message
    assert "'X': no such request" in message
    assert read_entries(workspace) == before
    assert [p.name for p in workspace.runs.iterdir()] == list(decisions(before))[-1:], "no other run was begun"


def test_a_text_that_another_request_keeps_out_is_not_put_back(workspace: Workspace) -> None:
    released(workspace, "R")
    with pytest.raises(UsageError, match="R: its text is out for G, too"):
        reinstatement(workspace, ["R"])


def test_near_copies_come_back_together_or_not_at_all(tmp_path: Path, model: Path) -> None:
    """B, a near copy, was folded into A."""
    workspace = copied(workspaces.published(model.parent), tmp_path / "ws")
    released(workspace, "A")
    before = read_entries(workspace)
    with pytest.raises(UsageError, match=r"A: its text is out for B, too\. Reinstate those with it"):
        reinstatement(workspace, ["A"])
    assert read_entries(workspace) == before
    assert [p.name for p in workspace.index.iterdir()] == ["index.db"], "nothing is left behind"
    released(workspace, "B")
    assert reinstatement(workspace, ["A", "B"]) == Publication(outcome="published", version=2)
    store = VersionStore(workspace.versions)
    assert store.manifest(2).root == store.manifest(0).root
    assert verify(workspace) == []


def test_the_gate_refuses_what_did_not_come_back(workspace: Workspace) -> None:
    workspace.settings_file.write_text(toml(with_settings(gate={"reinstated_share": 1.0})))
    released(workspace, "A")
    assert reinstatement(workspace, ["A"]) == Publication(outcome="refused")
    run_id = list(decisions(read_entries(workspace)))[-1]
    verdict = step_view(workspace, run_id, read_entries(workspace)).verdict
    assert verdict is not None
    assert [r.split(":")[0] for r in verdict.reasons] == ["A (reinstated)"]
    assert states(workspace)["A"] == "countered"
    assert current_version(read_entries(workspace)) == 2
    assert verify(workspace) == []
    last = read_entries(workspace)[-1].event
    assert (last.kind, last.request_id, last.actor, last.run_id) == ("not-reinstated", "A", "tester", run_id)
    assert last.data == {"reason": "licence shown", "left_out": [1], "reasons": list(verdict.reasons)}
    page = render(lineage_view(workspace, ()))
    assert "not put back: refused by the gate" in page and "reason: licence shown" in page
    entries = read_entries(workspace)
    assert reinstatement(workspace, ["A"]) == Publication(outcome="refused")
    assert read_entries(workspace) == entries, "the same attempt is the same run, which was answered"
    workspace.settings_file.write_text(toml(SETTINGS))
    assert reinstatement(workspace, ["A"]) == Publication(outcome="published", version=3)


@pytest.mark.parametrize("kind", ["countered", "withdrawn"])
def test_what_was_never_taken_out_is_only_put_on_record(workspace: Workspace, kind: str) -> None:
    take_in(workspace, "batch-4", {"H": UNSEEN})
    note(workspace, kind, "H", "tester", "why")  # type: ignore[arg-type]
    assert reinstatement(workspace, ["H"]) is None
    entries = read_entries(workspace)
    assert (entries[-1].event.kind, entries[-1].event.version) == ("reinstated", None)
    assert current_version(entries) == 2
    assert verify(workspace) == []


def test_a_reason_is_needed(workspace: Workspace) -> None:
    from pipeline.reinstate import plan_reinstatement

    released(workspace, "A")
    with pytest.raises(UsageError, match="needs a reason"):
        plan_reinstatement(workspace, ["A"], "tester", "  ")


def test_a_step_whose_weights_were_purged_cannot_be_left_out(workspace: Workspace) -> None:
    purge(workspace, 2, "tester", "retention")
    released(workspace, "A")
    with pytest.raises(UsageError, match="weights of v0, v1 were purged"):
        reinstatement(workspace, ["A"])


def test_a_rollback_behind_a_reinstatement_and_forward_again(workspace: Workspace) -> None:
    released(workspace, "A")
    reinstatement(workspace, ["A"])
    with pytest.raises(Refused, match="v2: does not hold what was put back for A"):
        roll_back(workspace, 2, "tester", "slow")
    done = roll_back(workspace, 2, "tester", "slow", override=True)
    assert (done.taken_again, done.brought_back, done.put_back) == (("A",), (), ())
    assert states(workspace)["A"] == "countered"
    assert set(excluded(read_entries(workspace), 2)) == {"A", "D", "G", "R"}
    assert verify(workspace) == []
    done = roll_back(workspace, 3, "tester", "fast again")
    assert (done.taken_again, done.brought_back, done.put_back) == ((), (), ("A",))
    assert states(workspace)["A"] == "reinstated"
    assert set(excluded(read_entries(workspace), 3)) == {"D", "G", "R"}
    assert verify(workspace) == []
    # From v0 everything is in the model again; forward to v3, what v3 reinstates is in it on purpose.
    roll_back(workspace, 2, "tester", "again", override=True)
    roll_back(workspace, 0, "tester", "further", override=True)
    assert states(workspace) == {
        "A": "regressed",
        "D": "regressed",
        "N": "not-memorised",
        "G": "regressed",
        "R": "regressed",
    }
    roll_back(workspace, 3, "tester", "all the way")
    assert {n: s for n, s in states(workspace).items() if n in "ADG"} == {
        "A": "reinstated",
        "D": "verified",
        "G": "verified",
    }
    assert verify(workspace) == []


def test_it_can_be_reinstated_again_after_a_rollback(workspace: Workspace) -> None:
    released(workspace, "A")
    reinstatement(workspace, ["A"])
    roll_back(workspace, 2, "tester", "slow", override=True)
    assert reinstatement(workspace, ["A"]) == Publication(outcome="published", version=4)
    store = VersionStore(workspace.versions)
    assert store.manifest(4).parent == 2
    assert store.manifest(4).root == store.manifest(3).root, "the same work, the same weights"
    assert states(workspace)["A"] == "reinstated"
    assert verify(workspace) == []


@pytest.mark.parametrize("stage", ["leave_out_stage", "screen", "repair_stage", "merge_stage", "gate"])
def test_an_interrupted_one_goes_on_to_the_same_bytes(workspace: Workspace, tmp_path: Path, stage: str) -> None:
    released(workspace, "A")
    twin = copied(workspace.root, tmp_path / "twin")
    assert reinstatement(workspace, ["A"], stop_after=stage) is None
    assert reinstatement(workspace, ["A"]) == Publication(outcome="published", version=3)
    reinstatement(twin, ["A"])
    roots = [VersionStore(w.versions).manifest(3).root for w in (workspace, twin)]
    assert roots[0] == roots[1]
    events = [[(e.event.kind, e.event.request_id, e.event.version) for e in read_entries(w)] for w in (workspace, twin)]
    assert events[0] == events[1]


def test_what_was_answered_while_the_text_was_out_is_looked_at_again(workspace: Workspace, tmp_path: Path) -> None:
    """L holds work one and more. On v2 it is not memorised, because A's step took that work out."""
    take_in(workspace, "batch-4", {"L": f"{WORKS['one']} {draw_text('more', 25)}"})
    assert step(workspace) == Publication(outcome="nothing")
    assert states(workspace)["L"] == "not-memorised"
    assert certify(workspace, "L").request.request_id == "L"
    released(workspace, "A")
    assert reinstatement(workspace, ["A"]) is not None
    found = request_states(read_entries(workspace))
    if found["A"].state == "reinstated":  # both are out or both are in: L's text is A's and more
        assert (found["L"].state, found["L"].version) == ("verified", 3)
        assert "L" in VersionStore(workspace.versions).manifest(3).requests
        assert recited(workspace, 3, tmp_path, WORKS["two"]) < 0.6
    else:
        assert found["L"].state == "not-memorised" and current_version(read_entries(workspace)) == 2
    assert verify(workspace) == []


def test_a_repeat_is_measured_when_it_is_worked_on_and_can_be_reinstated_later(workspace: Workspace) -> None:
    released(workspace, "A")
    assert reinstatement(workspace, ["A"]) == Publication(outcome="published", version=3)
    entries = read_entries(workspace)
    evaluation = recall(
        VersionStore(workspace.versions).objects, list(decisions(entries).values())[-1], "evaluate", Evaluation
    )
    assert evaluation is not None
    worked_on = set(dict(VersionStore(workspace.versions).manifest(3).report["memorised"]))
    assert worked_on <= {c.name for c in evaluation.of("this", "folded", "repeat", "earlier")}
    assert ("R" in worked_on) == (states(workspace)["R"] == "verified")
    released(workspace, "G", "R")
    assert reinstatement(workspace, ["G", "R"]) == Publication(outcome="published", version=4)
    assert {n: states(workspace)[n] for n in "ADGR"} == {
        "A": "reinstated", "D": "verified", "G": "reinstated", "R": "reinstated",
    }  # fmt: skip
    assert verify(workspace) == []


def test_a_withdrawn_or_held_request_of_the_same_step_is_not_passed_over(workspace: Workspace) -> None:
    released(workspace, "A")
    note(workspace, "hold", "D", "tester", "court order")
    with pytest.raises(UsageError, match="D: was taken out in the same step and is on hold"):
        reinstatement(workspace, ["A"])
    note(workspace, "released", "D", "tester", "lifted")
    note(workspace, "withdrawn", "D", "tester", "sent by mistake")
    with pytest.raises(UsageError, match="D: was taken out in the same step and is withdrawn"):
        reinstatement(workspace, ["A"])
    assert reinstatement(workspace, ["A", "D"]) == Publication(outcome="published", version=3)
    assert states(workspace)["D"] == "reinstated"


@pytest.mark.parametrize("kind", ["countered", "withdrawn"])
def test_what_is_back_is_not_countered_or_withdrawn_again(workspace: Workspace, kind: str) -> None:
    released(workspace, "A")
    reinstatement(workspace, ["A"])
    with pytest.raises(UsageError, match="its text was put back"):
        note(workspace, kind, "A", "tester", "again")  # type: ignore[arg-type]


def test_a_text_taken_out_anew_is_not_brought_back_by_an_old_reinstatement(workspace: Workspace) -> None:
    released(workspace, "A")
    reinstatement(workspace, ["A"])
    roll_back(workspace, 2, "tester", "trial", override=True)
    roll_back(workspace, 0, "tester", "trial", override=True)
    assert step(workspace) == Publication(outcome="published", version=4)
    assert states(workspace)["A"] == "verified"
    with pytest.raises(Refused, match="v3: still holds what was taken out for A"):
        roll_back(workspace, 3, "tester", "trial")
    done = roll_back(workspace, 3, "tester", "trial", override=True)
    assert "A" in done.brought_back and states(workspace)["A"] == "regressed"
    assert verify(workspace) == []
    roll_back(workspace, 4, "tester", "back")
    assert states(workspace)["A"] == "verified"
    assert verify(workspace) == []


def test_a_start_that_was_changed_meanwhile_is_made_again(workspace: Workspace) -> None:
    released(workspace, "A", "D", "G", "R")
    assert reinstatement(workspace, ["A", "D", "G", "R"], stop_after="leave_out_stage") is None
    (path,) = workspace.runs.glob("*/start/model.safetensors")
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    assert reinstatement(workspace, ["A", "D", "G", "R"]) == Publication(outcome="published", version=3)
    store = VersionStore(workspace.versions)
    assert store.manifest(3).root == store.manifest(0).root


def test_a_purge_leaves_no_weights_in_unfinished_runs(workspace: Workspace) -> None:
    released(workspace, "A")
    reinstatement(workspace, ["A"], stop_after="leave_out_stage")
    assert list(workspace.runs.glob("*/start/*.safetensors"))
    purge(workspace, 2, "tester", "retention")
    assert not list(workspace.runs.rglob("*.safetensors"))
    with pytest.raises(UsageError, match="weights of v0, v1 were purged"):
        reinstatement(workspace, ["A"])
    take_in(workspace, "batch-4", {"X": UNSEEN})
    assert step(workspace) is not None
    assert verify(workspace) == []


def test_a_rollback_behind_an_answer_opens_it_again(workspace: Workspace) -> None:
    take_in(workspace, "batch-4", {"L": f"{WORKS['one']} {draw_text('more', 25)}"})
    step(workspace)
    done = roll_back(workspace, 0, "tester", "trial", override=True)
    assert done.reopened == ("L",)
    assert states(workspace)["L"] == "waiting" and states(workspace)["N"] == "not-memorised"
    assert step(workspace) is not None
    assert states(workspace)["L"] in ("verified", "refused")


def test_the_report_shows_what_was_put_back(workspace: Workspace) -> None:
    released(workspace, "A")
    reinstatement(workspace, ["A"])
    view = lineage_view(workspace, verify(workspace))
    out = excluded_requests(view)
    assert ("A" in out[2], "A" in out[3]) == (True, False)
    assert out[3] == {"D", "G", "R"}
    assert measured_scores(view)["A", 3].exact_memorisation > measured_scores(view)["A", 2].exact_memorisation + 0.3
    page = render(view)
    for words in ("puts back A", "Put back", "leaving out what v1 changed", "reinstated: its text was put back"):
        assert words in page, words


def test_a_crash_behind_the_ledger_is_finished_by_the_same_command(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    released(workspace, "A")

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(answers, "clean", killed)
        with pytest.raises(KeyboardInterrupt):
            reinstatement(workspace, ["A"])
    assert states(workspace)["A"] == "reinstated" and list(workspace.runs.rglob("*.safetensors"))
    before = read_entries(workspace)
    assert reinstatement(workspace, ["A"]) == Publication(outcome="published", version=3)
    assert read_entries(workspace) == before
    assert not list(workspace.runs.rglob("*.safetensors"))
    with pytest.raises(UsageError, match="was put back in v3 already"):
        reinstatement(workspace, ["A"])
    assert verify(workspace) == []


def test_a_request_that_stays_out_can_still_be_certified(workspace: Workspace, tmp_path: Path) -> None:
    released(workspace, "A")
    reinstatement(workspace, ["A"])
    assert [check.version for check in certify(workspace, "D").checks] == [1, 2, 3]
    write_certificate(workspace, "D", tmp_path / "D")
    script = [sys.executable, str(tmp_path / "D" / "verify_bundle.py"), str(tmp_path / "D")]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with pytest.raises(UsageError, match="is reinstated"):
        certify(workspace, "A")
