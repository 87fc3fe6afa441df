"""Approval: a run waits without a process or a lock, and ends as somebody decides; who that was stays on record."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from histories import array_model, entries_of, make_step, prepare_reinstatement, prepare_step, publish, start_history
from workspaces import copied, draw_text, take_in

from flows import cli
from pipeline import answers, decide
from pipeline.approval import hold, waiting
from pipeline.certificate import certify, write_certificate
from pipeline.errors import StoreDamaged, UsageError
from pipeline.files import digest_json
from pipeline.history import step_view
from pipeline.ledger import Ledger
from pipeline.records import Event, MergeReport
from pipeline.requests import note
from pipeline.runs import open_run, outdated, plan_run
from pipeline.states import AWAITING, current_version, request_states
from pipeline.upkeep import purge
from pipeline.verify import verify
from pipeline.workspace import Workspace, writing

Takedown = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """v1 without A, published before anybody had to approve; a run for B and C waits for approval."""
    folder = tmp_path_factory.mktemp("approval")
    workspace = start_history(folder / "ws", array_model(folder / "model"))
    publish(workspace, prepare_step(workspace, ["A"]))
    workspace.settings_file.write_text('approval = "required"\n[intake]\nsettle_s = 0.0\n')
    take_in(workspace, "batch-B", {name: draw_text(name, 30) for name in ("B", "C")})
    run_id = prepare_step(workspace, ["B", "C"], submit=False)
    with writing(workspace):
        assert hold(str(workspace.root), run_id, "nightly")
    return workspace.root


@pytest.fixture
def ws(made: Path, tmp_path: Path) -> Workspace:
    return copied(made, tmp_path / "ws")


@pytest.fixture
def run_id(ws: Workspace) -> str:
    (found,) = waiting(ws, entries_of(ws))
    return found.run_id


def kinds(workspace: Workspace, since: int = 0) -> list[tuple[str, str]]:
    return [(e.event.kind, e.event.actor) for e in entries_of(workspace)[since:]]


def killed(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


def states(workspace: Workspace) -> dict[str, str]:
    return {name: s.state for name, s in request_states(entries_of(workspace)).items()}


def test_run_that_waits_can_be_looked_at_and_changes_nothing(ws: Workspace, run_id: str) -> None:
    with writing(ws):  # no lock is held
        assert hold(str(ws.root), run_id, "nightly")  # asked again, on record once
    (found,) = waiting(ws, entries_of(ws))
    assert (found.requests, found.parent, found.asked_by) == (("B", "C"), 1, "nightly")
    assert {c.name for c in found.evaluation.of("this")} == {"B", "C"}
    assert (Path(found.candidate) / "model.safetensors").is_file()
    assert kinds(ws).count(("awaiting-approval", "nightly")) == 1
    assert current_version(entries_of(ws)) == 1 and states(ws) == {"A": "verified", "B": "waiting", "C": "waiting"}
    assert verify(ws) == []


def test_nothing_waits_where_nobody_must_approve_or_the_gate_refused(tmp_path: Path) -> None:
    workspace = start_history(tmp_path / "ws", array_model(tmp_path / "model"))
    run_id = prepare_step(workspace, ["A"])
    assert not hold(str(workspace.root), run_id, "nightly")
    workspace.settings_file.write_text('approval = "required"\n')
    run_id = prepare_step(workspace, ["B"], accepted=False)
    assert not hold(str(workspace.root), run_id, "nightly")
    assert waiting(workspace, entries_of(workspace)) == []


def test_approved_run_is_published_and_says_by_whom(ws: Workspace, run_id: str, tmp_path: Path) -> None:
    before = len(entries_of(ws))
    with writing(ws):
        done = decide.approve(str(ws.root), run_id, "counsel")
    assert (done.outcome, done.version) == ("published", 2)
    assert kinds(ws, before)[:3] == [("approved", "counsel"), ("accepted", "nightly"), ("published", "nightly")]
    assert states(ws) == dict.fromkeys("ABC", "verified")
    assert waiting(ws, entries_of(ws)) == [] and verify(ws) == []
    with writing(ws), pytest.raises(UsageError, match="was decided on by counsel"):
        decide.approve(str(ws.root), run_id, "counsel")

    certificate = certify(ws, "B")
    assert certificate.gate is not None and certificate.gate.approved_by == "counsel"
    assert "approved_by" not in certify(ws, "A").as_json()["gate"]
    for name in ("A", "B"):
        folder = tmp_path / f"certificate-{name}"
        write_certificate(ws, name, folder)
        check = subprocess.run(
            [sys.executable, "-I", folder / "verify_bundle.py", folder], capture_output=True, text=True, check=False
        )
        assert check.returncode == 0, check.stdout
    assert "by counsel" in (tmp_path / "certificate-B" / "certificate.html").read_text()
    path = tmp_path / "certificate-B" / "certificate.json"
    path.write_text(path.read_text().replace('"approved_by":"counsel"', '"approved_by":"nobody!"'))
    check = subprocess.run(
        [sys.executable, "-I", path.with_name("verify_bundle.py"), path.parent], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert check.returncode == 1 and "approved_by" in check.stdout


def test_approval_that_was_killed_is_finished_by_the_same_call_or_the_next_run(
    takedown: Takedown, ws: Workspace, run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, writing(ws):
        patch.setattr(answers, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            decide.approve(str(ws.root), run_id, "counsel")
    assert waiting(ws, entries_of(ws)) == []
    shown = takedown("status")[1], json.loads(takedown("status", "--json")[1])["undecided"]
    assert "waits for approval" not in shown[0] and shown[1] == []
    other = copied(ws.root, tmp_path / "other")
    with writing(ws):
        assert decide.approve(str(ws.root), run_id, "counsel").version == 2
    with writing(other):
        plan = plan_run(other)
        assert plan is not None and plan.run_id == run_id
        assert not hold(str(other.root), run_id, "nightly")
        assert answers.publish(str(other.root), run_id, "nightly").version == 2
    for workspace in (ws, other):
        assert [kind for kind, _ in kinds(workspace)].count("approved") == 1
        assert verify(workspace) == []
    with writing(ws), pytest.raises(UsageError):
        decide.refuse(str(ws.root), run_id, "counsel", "too late")


def test_refused_run_is_not_published_and_its_requests_wait(ws: Workspace, run_id: str) -> None:
    with writing(ws), pytest.raises(UsageError, match="needs a reason"):
        decide.refuse(str(ws.root), run_id, "counsel", " ")
    before = len(entries_of(ws))
    with writing(ws):
        assert decide.refuse(str(ws.root), run_id, "counsel", "kept works lose").outcome == "refused"
    assert kinds(ws, before) == [("refused", "counsel")] * 3  # the run, and each request
    assert states(ws) == {"A": "verified", "B": "refused", "C": "refused"}
    view = step_view(ws, run_id, entries_of(ws))
    assert view.verdict is not None
    assert (view.verdict.accepted, view.verdict.reasons) == (False, ("Not approved: kept works lose",))
    assert current_version(entries_of(ws)) == 1 and verify(ws) == []
    with writing(ws):  # the same work again has the same answer
        plan = plan_run(ws)
        assert plan is not None and plan.run_id == run_id and not hold(str(ws.root), run_id, "nightly")
        assert answers.publish(str(ws.root), run_id, "nightly").outcome == "refused"


def test_scheduled_run_leaves_the_waiting_one_and_an_urgent_one_overtakes_it(ws: Workspace, run_id: str) -> None:
    take_in(ws, "batch-D", {"D": draw_text("D", 30)})
    with writing(ws):
        plan = plan_run(ws)  # a step of its own would outdate the one that somebody is looking at
        assert plan is not None and plan.run_id == run_id
        with pytest.raises(UsageError, match=f"{run_id}, which waits for approval, works on B"):
            plan_run(ws, ["B", "D"])
    urgent = prepare_step(ws, ["D"], submit=False)
    with writing(ws):
        assert hold(str(ws.root), urgent, "court")
    assert [w.run_id for w in waiting(ws, entries_of(ws))] == [run_id, urgent]
    with writing(ws):
        assert decide.approve(str(ws.root), urgent, "counsel").version == 2
        with pytest.raises(UsageError, match="v2 was put in force since it was planned"):
            decide.approve(str(ws.root), run_id, "counsel")
    assert waiting(ws, entries_of(ws)) == []
    with writing(ws):
        plan = plan_run(ws)
        assert plan is not None and plan.parent == 2 and plan.requests == ("B", "C")
    assert [folder.name for folder in ws.runs.iterdir()] == [plan.run_id]
    assert verify(ws) == []


@pytest.mark.parametrize("kind", ["withdrawn", "hold"])
def test_run_whose_request_was_withdrawn_is_not_decided_on(ws: Workspace, run_id: str, kind: Any) -> None:
    note(ws, kind, "B", "legal", "letter")
    for call in (decide.approve, lambda *args: decide.refuse(*args, "reason")):
        with writing(ws), pytest.raises(UsageError, match=r"B is (withdrawn|on hold) now"):
            call(str(ws.root), run_id, "counsel")
    with writing(ws):
        plan = plan_run(ws)
        assert plan is not None and plan.requests == ("C",)


def test_candidate_that_was_exchanged_is_not_approved(ws: Workspace, run_id: str) -> None:
    path = ws.runs / run_id / "merge.json"
    record = json.loads(path.read_text())
    record["record"]["root"] = "root-sha256:" + "0" * 64
    path.write_text(json.dumps(record))
    with writing(ws), pytest.raises(StoreDamaged, match="is not what ledger entry"):
        decide.approve(str(ws.root), run_id, "counsel")
    assert "approved" not in dict(kinds(ws))


def test_a_run_that_is_computed_again_is_not_shown_until_it_is_there(
    takedown: Takedown, ws: Workspace, run_id: str
) -> None:
    """What was asked about is gone, and may become another: there is nothing to look at, and nothing is wrong."""
    records = {name: (ws.runs / run_id / f"{name}.json").read_bytes() for name in ("merge", "evaluate", "gate")}
    for name in records:
        (ws.runs / run_id / f"{name}.json").unlink()
    for code, output, _ in (takedown("review"), takedown("status")):
        assert code == 0 and run_id not in output
    for name, data in records.items():
        assert waiting(ws, entries_of(ws)) == []
        (ws.runs / run_id / f"{name}.json").write_bytes(data)
    assert [found.run_id for found in waiting(ws, entries_of(ws))] == [run_id]


def test_a_plan_of_a_release_that_knew_fewer_settings_is_read_under_its_own_id(ws: Workspace, run_id: str) -> None:
    tree = json.loads((ws.runs / run_id / "plan.json").read_text())
    del tree["settings"]["unlearn"]["rounds"]
    older = "run-" + digest_json(tree).removeprefix("sha256:")[:12]
    (ws.runs / older).mkdir()
    (ws.runs / older / "plan.json").write_text(json.dumps(tree))
    run = open_run(ws.root, older)
    assert run.plan.run_id == run.run_id == older != run_id and run.plan.requests == ("B", "C")
    tree["parent"] = 0
    (ws.runs / older / "plan.json").write_text(json.dumps(tree))
    with pytest.raises(StoreDamaged, match="was changed after it was made"):
        open_run(ws.root, older)


@pytest.mark.parametrize("name", ["config.json", "chat_template.jinja"])
def test_other_files_than_those_evaluated_are_not_published(ws: Workspace, run_id: str, name: str) -> None:
    """The same weights under another configuration, or with another template, are another model."""
    path = ws.runs / run_id / "candidate" / name
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**found, "rope_theta": 7.0}))
    with writing(ws), pytest.raises(StoreDamaged, match=rf"candidate: {name}: not as it was when the candidate was"):
        decide.approve(str(ws.root), run_id, "counsel")
    assert kinds(ws)[-1] == ("approved", "counsel")
    assert {b.found for b in verify(ws)} == {"unreferenced object"}  # the evidence, which is kept first
    shutil.rmtree(ws.runs / run_id)
    assert prepare_step(ws, ["B", "C"], submit=False) == run_id
    with writing(ws):
        assert not hold(str(ws.root), run_id, "nightly")  # the same bytes again, and these are approved
        assert answers.publish(str(ws.root), run_id, "nightly").version == 2
    assert verify(ws) == []


@pytest.mark.parametrize("approved", [True, False])
def test_what_is_computed_again_to_other_weights_is_asked_about_again(
    takedown: Takedown, ws: Workspace, run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, approved: bool
) -> None:
    """Another machine, another library: the approval of the first weights is none of the second ones."""
    if approved:
        with monkeypatch.context() as patch, writing(ws):
            patch.setattr(answers, "publish", killed)
            with pytest.raises(KeyboardInterrupt):
                decide.approve(str(ws.root), run_id, "counsel")
    shutil.rmtree(ws.runs / run_id)
    assert prepare_step(ws, ["B", "C"], share=0.06, submit=False) == run_id
    with writing(ws):
        assert hold(str(ws.root), run_id, "nightly")
        assert hold(str(ws.root), run_id, "nightly")
    assert [kind for kind, _ in kinds(ws)].count(AWAITING) == 2
    (found,) = waiting(ws, entries_of(ws))
    assert found.asked_before == 1 and "to other weights" in takedown("review")[1]
    assert found.root == open_run(ws.root, run_id).finished("merge", MergeReport).root
    with writing(ws):
        assert decide.approve(str(ws.root), run_id, "the board").version == 2
    assert verify(ws) == [] and states(ws)["B"] == "verified"
    certificate = certify(ws, "B")
    assert certificate.gate is not None and certificate.gate.approved_by == "the board"
    write_certificate(ws, "B", tmp_path / "certificate")
    check = [sys.executable, "-I", tmp_path / "certificate" / "verify_bundle.py", tmp_path / "certificate"]
    assert subprocess.run(check, capture_output=True, check=False).returncode == 0


def test_verify_finds_a_version_that_nobody_approved(ws: Workspace, run_id: str, tmp_path: Path) -> None:
    other = copied(ws.root, tmp_path / "other")
    with writing(ws):
        answers.publish(str(ws.root), run_id, "nightly")
    assert [b.means for b in verify(ws)] == ["Nobody approved these weights."]
    with writing(other):
        with Ledger.open(other.ledger) as ledger:
            data: dict[str, object] = {"root": "root-sha256:" + "0" * 64}
            ledger.append(Event(kind="approved", actor="counsel", run_id=run_id, version=1, data=data))
        answers.publish(str(other.root), run_id, "nightly")
    assert [b.means for b in verify(other)] == ["Nobody approved these weights."]


@pytest.mark.parametrize("root", [None, "root-sha256:" + "0" * 64])
def test_verify_finds_a_version_whose_run_never_waited_for_the_approval_it_needed(
    tmp_path: Path, root: str | None
) -> None:
    workspace = start_history(tmp_path / "ws", array_model(tmp_path / "model"))
    make_step(workspace, "A")  # nobody had to approve this one
    workspace.settings_file.write_text('approval = "required"\n')
    run_id = prepare_step(workspace, ["B"])
    if root is not None:  # other weights were approved
        with writing(workspace), Ledger.open(workspace.ledger) as ledger:
            ledger.append(Event(kind="approved", actor="counsel", run_id=run_id, version=1, data={"root": root}))
    publish(workspace, run_id)
    (found,) = verify(workspace)
    assert found.found == f"v2 was published by {run_id}, whose weights had to be approved"
    assert found.means == "Nobody approved these weights."


def test_a_purge_waits_for_the_decision(ws: Workspace, run_id: str) -> None:
    before = entries_of(ws)
    with pytest.raises(UsageError, match=f"{run_id}: waits for approval, and a purge removes"):
        purge(ws, 1, "officer", "retention")
    assert entries_of(ws) == before and verify(ws) == []
    with writing(ws):
        decide.refuse(str(ws.root), run_id, "counsel", "kept works lose")
    assert purge(ws, 1, "officer", "retention").versions == (0,)


# --- texts put back ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made_back(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """v1 without A, v2 without B; a reinstatement of A waits for approval, and D to be worked on."""
    folder = tmp_path_factory.mktemp("back")
    workspace = start_history(folder / "ws", array_model(folder / "model"))
    make_step(workspace, "A")
    make_step(workspace, "B")
    workspace.settings_file.write_text('approval = "required"\n')
    note(workspace, "countered", "A", "legal", "letter")
    run_id = prepare_reinstatement(workspace, "A")
    with writing(workspace):
        assert hold(str(workspace.root), run_id, "legal", "licence shown")
    take_in(workspace, "batch-D", {"D": draw_text("D", 30)})
    return workspace.root


@pytest.fixture
def back(made_back: Path, tmp_path: Path) -> Workspace:
    return copied(made_back, tmp_path / "back")


def test_scheduled_run_leaves_a_reinstatement_that_waits(back: Workspace) -> None:
    (found,) = waiting(back, entries_of(back))
    assert found.reinstates == ("A",)
    with writing(back):
        plan = plan_run(back)
        assert plan is not None and plan.run_id == found.run_id
        assert hold(str(back.root), plan.run_id, "nightly")
        assert decide.approve(str(back.root), plan.run_id, "counsel").version == 3
        plan = plan_run(back)
        assert plan is not None and plan.requests == ("D",)
    assert states(back) == {"A": "reinstated", "B": "verified", "D": "waiting"} and verify(back) == []


def test_scheduled_run_finishes_an_approved_reinstatement_with_the_reason_on_record(
    back: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (found,) = waiting(back, entries_of(back))
    # An urgent run waits beside it: what is approved goes first.
    urgent = prepare_step(back, ["D"], submit=False)
    with writing(back):
        assert hold(str(back.root), urgent, "court")
    for run_id in (urgent, found.run_id):
        other = copied(back.root, back.root.with_name(run_id))
        with monkeypatch.context() as patch, writing(other):
            patch.setattr(answers, "publish", killed)
            with pytest.raises(KeyboardInterrupt):
                decide.approve(str(other.root), run_id, "counsel")
        with writing(other):
            plan = plan_run(other)
            assert plan is not None and plan.run_id == run_id and not hold(str(other.root), run_id, "nightly")
            assert answers.publish(str(other.root), run_id, "nightly").version == 3
        reasons = [e.event.data["reason"] for e in entries_of(other) if e.event.kind == "reinstated"]
        assert reasons == (["licence shown"] if run_id == found.run_id else [])
        assert verify(other) == []


@pytest.mark.parametrize(
    ("kind", "name", "told"),
    [
        ("hold", "A", "A is on hold now"),
        ("withdrawn", "B", "other texts have to stay out now"),
        ("hold", "D", None),  # not one of its texts
    ],
)
def test_reinstatement_is_outdated_by_what_concerns_its_texts(
    back: Workspace, kind: Any, name: str, told: str | None
) -> None:
    (found,) = waiting(back, entries_of(back))
    plan = open_run(back.root, found.run_id).plan
    assert outdated(entries_of(back), plan) is None
    note(back, kind, name, "legal", "letter")
    assert outdated(entries_of(back), plan) == told
    assert [w.run_id for w in waiting(back, entries_of(back))] == ([found.run_id] if told is None else [])


# --- the verbs --------------------------------------------------------------------------------------------


@pytest.fixture
def takedown(ws: Workspace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Takedown:
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["takedown", "-w", str(ws.root), *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capfd.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    monkeypatch.setenv("COLUMNS", "200")
    return call


def test_verbs(takedown: Takedown, ws: Workspace, run_id: str) -> None:
    assert f"{run_id} waits for approval; see takedown review." in takedown("status")[1]
    code, out, _ = takedown("review")
    assert code == 0 and f"{run_id} waits for approval since" in out and "takes out B, C, from v1" in out
    assert [w["run_id"] for w in json.loads(takedown("review", "--json")[1])] == [run_id]
    assert takedown("approve", "run-0")[0] == 2 and takedown("refuse", run_id)[0] == 2
    with writing(ws):
        assert takedown("approve", run_id)[0] == 3
    code, out, _ = takedown("approve", run_id, "--actor", "counsel")
    assert (code, out) == (0, f"{run_id}: approved by counsel; published v2.\n")
    assert takedown("review")[1] == "Nothing waits for approval.\n"
    assert takedown("refuse", run_id, "--reason", "no")[0] == 2
    assert "approved" in takedown("log")[1]


def test_refusal_by_verb(takedown: Takedown, ws: Workspace, run_id: str) -> None:
    code, out, _ = takedown("refuse", run_id, "--reason", "no", "--actor", "counsel")
    assert (code, out) == (0, f"{run_id}: refused by counsel; the version in force stays.\n")
    assert "Not approved: no" in takedown("show", "B")[1]
