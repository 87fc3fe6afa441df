"""A step that brings an earlier text back is refused; with a setting, the next one works on that text again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from histories import array_model, entries_of, make_step, prepare_step, publish, start_history
from typer.testing import CliRunner
from workspaces import WORKS, copied, new_workspace, step, take_in, toml, with_settings

from flows.cli import app
from flows.stepping import show_step
from flows.terminal import out
from pipeline.certificate import render, write_certificate
from pipeline.decide import approve
from pipeline.erase import erase
from pipeline.evidence import recall
from pipeline.files import read_json, write_json
from pipeline.history import acknowledged_versions, lineage_view, step_view, version_views
from pipeline.ledger import Ledger
from pipeline.records import Evaluation, Event, ScreenReport
from pipeline.regress import brought_back
from pipeline.report import render as render_report
from pipeline.requests import note
from pipeline.rollback import roll_back
from pipeline.runs import Plan, outdated, plan_run, undecided
from pipeline.settings import GateSettings, Settings
from pipeline.states import decisions, request_states
from pipeline.undo import memorised_in, reworked_in
from pipeline.verify import _check_requests, verify
from pipeline.verify_bundle import check_bundle
from pipeline.versions import VersionStore
from pipeline.workspace import Workspace, writing

DIRECT = {
    "unlearn": {"method": "npo-kl", "iterations": 40, "repair_iterations": 0},
    "calibrate": {"fixed_alpha": 1.0},
}
"""A method that leaves other texts alone, without the repair that would work on earlier ones in the same step."""
LOOSE = with_settings(calibrate={"margin": 0.25}, gate={"forget_tolerance": 0.3})
TIGHT = with_settings(**DIRECT)
FOLDING = with_settings(**DIRECT, gate={"fold_regressed": True})


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Workspace:
    """A was taken out under loose limits; the step for B was refused because A is above those of today."""
    workspace = new_workspace(tmp_path_factory.mktemp("regress") / "ws", model, LOOSE)
    take_in(workspace, "batch-1", {"A": WORKS["one"]})
    outcome = step(workspace)
    assert outcome is not None and outcome.version == 1
    workspace.settings_file.write_text(toml(TIGHT))
    take_in(workspace, "batch-2", {"B": WORKS["two"]})
    outcome = step(workspace)
    assert outcome is not None and outcome.outcome == "refused"
    return workspace


@pytest.fixture(scope="module")
def folded(refused: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The same, after the next step worked on A again."""
    workspace = copied(refused.root, tmp_path_factory.mktemp("folded") / "ws")
    workspace.settings_file.write_text(toml(FOLDING))
    outcome = step(workspace)
    assert outcome is not None and outcome.version == 2, outcome
    return workspace


def last_run(workspace: Workspace) -> str:
    return list(decisions(entries_of(workspace)))[-1]


def states(workspace: Workspace) -> dict[str, tuple[str, int | None]]:
    return {n: (s.state, s.version) for n, s in request_states(entries_of(workspace)).items()}


# --- with a model -----------------------------------------------------------------------------------------


def test_without_the_setting_the_same_run_is_refused_again(refused: Workspace, tmp_path: Path) -> None:
    before = entries_of(refused)
    (reason,) = decisions(before)[last_run(refused)].event.data["reasons"]  # type: ignore[misc]
    assert str(reason).startswith("A (earlier): exact memorisation ")
    workspace = copied(refused.root, tmp_path / "ws")
    outcome = step(workspace)
    assert outcome is not None and outcome.outcome == "refused"
    assert [e.event for e in entries_of(workspace)] == [e.event for e in before]
    assert "reworks" not in read_json(workspace.runs / last_run(refused) / "plan.json")
    assert states(workspace) == {"A": ("verified", 1), "B": ("refused", 1)}


def test_the_next_step_works_on_the_text_again(folded: Workspace) -> None:
    assert states(folded) == {"A": ("verified", 1), "B": ("verified", 2)}, "v1 stays the first that excludes A"
    entries, store = entries_of(folded), VersionStore(folded.versions)
    (planned,) = [e for e in entries if e.event.kind == "planned" and e.event.run_id == last_run(folded)]
    assert planned.event.data["reworks"] == 1
    manifest = store.manifest(2)
    assert (manifest.requests, reworked_in(manifest)) == (("B",), ("A",))
    found = memorised_in(manifest)
    assert set(map(tuple, found["A"])) >= set(map(tuple, memorised_in(store.manifest(1))["A"]))
    entry = decisions(entries)[last_run(folded)]
    screened = recall(store.objects, entry, "screen", ScreenReport)
    evaluation = recall(store.objects, entry, "evaluate", Evaluation)
    assert screened is not None and [r.request_id for r in screened.requests] == ["B", "A"]
    assert evaluation is not None
    (again,) = evaluation.of("earlier")
    assert again.name == "A" and again.after.exact_memorisation <= evaluation.level.mean + 0.05
    (event,) = [e.event for e in entries if e.event.kind == "reworked"]
    assert (event.request_id, event.version, event.run_id) == ("A", 2, entry.event.run_id)
    assert event.data["after"] == again.after.model_dump(mode="json")
    assert verify(folded) == []


def test_every_page_says_so(folded: Workspace, tmp_path: Path) -> None:
    view = lineage_view(folded, verify(folded))
    assert [(v.requests, v.reworks) for v in view.versions] == [((), ()), (("A",), ()), (("B",), ("A",))]
    assert [s.reworks for s in view.steps] == [(), (), ("A",)]
    page = render_report(view)
    assert "which a refused candidate brought back" in page and "worked on again by a later step" in page
    shown = CliRunner().invoke(app, ["-w", str(folded.root), "show", "v2"]).output
    assert "excludes first: B" in shown and "works again on: A" in shown
    certificate = write_certificate(folded, "A", tmp_path / "a")
    (later,) = certificate.later
    assert (certificate.version.version, later.version, later.reworked) == (1, 2, True)
    assert "(its step worked on the text again)" in " ".join(certificate.statement)
    assert "worked on again" in render(certificate)
    assert not [line for line in check_bundle(tmp_path / "a") if line.verdict == "FAILED"]
    other = write_certificate(folded, "B", tmp_path / "b")
    assert "reworked" not in json.dumps(other.as_json()), "nothing of A's"


def test_a_certificate_that_keeps_silent_about_it_does_not_hold(folded: Workspace, tmp_path: Path) -> None:
    write_certificate(folded, "A", tmp_path / "a")
    path = tmp_path / "a" / "certificate.json"
    tree = json.loads(path.read_bytes())
    del tree["later"][0]["reworked"]
    path.write_text(json.dumps(tree, sort_keys=True, separators=(",", ":")) + "\n")
    assert [line for line in check_bundle(tmp_path / "a") if line.verdict == "FAILED"]


@pytest.mark.parametrize("stage", ["dedupe_stage", "screen", "saliency", "merge_stage", "gate"])
def test_an_interrupted_one_goes_on_to_the_same_bytes(
    refused: Workspace, folded: Workspace, tmp_path: Path, stage: str
) -> None:
    workspace = copied(refused.root, tmp_path / "ws")
    workspace.settings_file.write_text(toml(FOLDING))
    assert step(workspace, stop_after=stage) is None
    outcome = step(workspace)
    assert outcome is not None and outcome.version == 2
    assert last_run(workspace) == last_run(folded)
    roots = [VersionStore(w.versions).manifest(2).root for w in (workspace, folded)]
    assert roots[0] == roots[1]
    assert len([e for e in entries_of(workspace) if e.event.kind == "reworked"]) == 1


def test_a_step_without_a_text_of_its_own_trains_nothing(
    refused: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = copied(refused.root, tmp_path / "ws")
    workspace.settings_file.write_text(toml(FOLDING))
    take_in(workspace, "batch-3", {"C": "a few words that the model never saw and that nobody recites to it " * 3})
    outcome = step(workspace, ["C"])
    assert outcome is not None and outcome.outcome == "nothing"
    assert states(workspace)["C"] == ("not-memorised", 1)
    run_id, entries = last_run(workspace), entries_of(workspace)
    plan = recall(VersionStore(workspace.versions).objects, decisions(entries)[run_id], "plan", Plan)
    assert plan is not None and plan.reworks == ("A",)
    view = step_view(workspace, run_id, entries)
    assert view.reworks == () and view.mask is None, "planned, and not done"
    assert "which a refused candidate brought back" not in render_report(lineage_view(workspace, []))
    monkeypatch.setattr(out, "_width", 200)
    with out.capture() as shown:
        show_step(workspace, view)
    assert "worked on again" not in shown.get() and "nothing to do" in shown.get()


def test_what_is_put_on_hold_meanwhile_outdates_it(refused: Workspace, tmp_path: Path) -> None:
    workspace = copied(refused.root, tmp_path / "ws")
    settings = toml(FOLDING)
    workspace.settings_file.write_text(settings)
    with writing(workspace):
        plan = plan_run(workspace)
    assert plan is not None and plan.reworks == ("A",)
    note(workspace, "hold", "A", "tester", "court order")
    assert outdated(entries_of(workspace), plan) == "A is on hold now"
    with writing(workspace):
        plan = plan_run(workspace)
    assert plan is not None and plan.reworks == ()


def test_it_can_wait_for_approval(refused: Workspace, tmp_path: Path) -> None:
    workspace = copied(refused.root, tmp_path / "ws")
    workspace.settings_file.write_text('approval = "required"\n' + toml(FOLDING))
    from pipeline.approval import hold, waiting

    def ask(run_id: str) -> None:
        assert hold(str(workspace.root), run_id, "tester", "")
        raise InterruptedError

    with pytest.raises(InterruptedError):
        step(workspace, before_publish=ask)
    (found,) = waiting(workspace, entries_of(workspace))
    assert (found.requests, found.reworks) == (("B",), ("A",))
    with writing(workspace):
        assert approve(str(workspace.root), found.run_id, "counsel").version == 2
    assert undecided(workspace, entries_of(workspace)) == [] and verify(workspace) == []


# --- which texts ------------------------------------------------------------------------------------------


@pytest.fixture
def history(tmp_path: Path) -> Workspace:
    """A and B are out; a step for C that brought A back, by the records, was refused."""
    workspace = start_history(tmp_path / "ws", array_model(tmp_path / "model"))
    make_step(workspace, "A")
    make_step(workspace, "B")
    refuse(workspace, "C", "A")
    return workspace


def refuse(workspace: Workspace, request_id: str, back: str, submit: bool = True) -> None:
    """A step whose candidate reproduces an earlier text, and is refused for it."""
    run_id = prepare_step(workspace, [request_id], accepted=False, submit=submit)
    path = workspace.runs / run_id / "evaluate.json"
    tree = read_json(path)
    for comparison in tree["record"]["comparisons"]:  # type: ignore[index,call-overload]
        if comparison["name"] == back:
            comparison["after"]["exact_memorisation"] = 0.4
    write_json(path, tree)
    publish(workspace, run_id)


def found(workspace: Workspace, **limits: float) -> tuple[str, ...]:
    objects = VersionStore(workspace.versions).objects
    return brought_back(entries_of(workspace), objects, GateSettings.model_validate(limits))


def test_the_evidence_of_a_refused_run_says_which(history: Workspace) -> None:
    assert found(history) == ("A",)
    assert states(history)["A"] == ("verified", 1), "the version in force excludes it still"


def test_attempts_add_up(history: Workspace) -> None:
    take_in(history, "batch-D", {"D": "other words of another text altogether, and some more of them"})
    refuse(history, "D", "B", submit=False)
    assert found(history) == ("A", "B")


def test_what_todays_limits_allow_is_left_alone(history: Workspace) -> None:
    assert found(history, forget_tolerance=0.3) == ()


@pytest.mark.parametrize("kind", ["hold", "withdrawn"])
def test_what_no_step_may_work_on_is_left_alone(history: Workspace, kind: str) -> None:
    note(history, kind, "A", "tester", "asked for")  # type: ignore[arg-type]
    assert found(history) == ()


def test_what_was_erased_is_left_alone(history: Workspace) -> None:
    erase(history, "A", "tester", "asked for")
    assert found(history) == ()


def test_a_countered_text_must_stay_out_until_it_is_reinstated(history: Workspace) -> None:
    note(history, "countered", "A", "tester", "disputed")
    assert found(history) == ("A",)


def test_another_version_in_force_begins_anew(history: Workspace) -> None:
    roll_back(history, 1, "tester", "B was too much", override=True)
    assert found(history) == ()


def test_an_accepted_step_begins_anew(history: Workspace) -> None:
    make_step(history, "D")
    assert found(history) == ()


# --- what the ledger may say ------------------------------------------------------------------------------


def test_an_entry_that_no_manifest_bears_out_is_found(history: Workspace) -> None:
    with Ledger.open(history.ledger) as ledger:
        ledger.append(Event(kind="reworked", actor="t", request_id="A", version=2))
    assert any("whose manifest does not list it so" in b.found for b in verify(history))


def test_a_manifest_that_no_entry_bears_out_is_found(folded: Workspace) -> None:
    entries = [e for e in entries_of(folded) if e.event.kind != "reworked"]
    manifests = {m.version: m for m in acknowledged_versions(folded, entries)}
    assert [b.found for b in _check_requests(manifests, entries)] == [
        "lists request A as worked on again, which no ledger entry says"
    ]


def test_the_setting_is_no_limit_and_no_part_of_a_run() -> None:
    on = Settings.model_validate({"gate": {"fold_regressed": True}})
    assert on.gate.fold_regressed and not Settings().gate.fold_regressed
    assert on.model_dump(mode="json") == Settings().model_dump(mode="json")


def test_views_without_such_a_step_are_as_before(history: Workspace) -> None:
    entries = entries_of(history)
    assert not any(v.reworks for v in version_views(acknowledged_versions(history, entries), entries))
    assert step_view(history, last_run(history), entries).reworks == ()
