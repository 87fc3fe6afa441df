"""`takedown erase`: the text is gone from everywhere, the proof stays, and what it costs is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import workspaces
from histories import LEVEL, array_model, entries_of, make_step, prepare_step, publish, start_history
from tampered.calls import call_in as call
from workspaces import WORKS, copied, draw_text, leaks, take_in

from pipeline import verify_bundle
from pipeline.erase import erase
from pipeline.errors import Refused, UsageError
from pipeline.evidence import noted_exclusions, recall
from pipeline.gate import decide
from pipeline.index import DedupeIndex
from pipeline.ledger import Ledger
from pipeline.recheck import to_recheck
from pipeline.records import Comparison, DedupeReport, Evaluation, Event, RetainExclusion, TextScore, Verdict
from pipeline.reinstate import check_reinstatement
from pipeline.requests import note
from pipeline.rollback import roll_back
from pipeline.search import claimed_works
from pipeline.settings import GateSettings
from pipeline.states import current_version, decisions, excluded, request_states, stays_out
from pipeline.storecheck import Depth
from pipeline.vault import Vault
from pipeline.verify import verify
from pipeline.versions import VersionStore
from pipeline.workspace import Workspace

CONTACT, REASON = "mira.quill@holder.example", "asked by the sender, case 7/26"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """v1 without TD-1, v2 without TD-2 and TD-3; TD-4 waits."""
    folder = tmp_path_factory.mktemp("erase")
    workspace = start_history(folder / "ws", array_model(folder / "model"))
    make_step(workspace, "TD-1")
    make_step(workspace, "TD-2", "TD-3")
    take_in(workspace, "fourth", {"TD-4": draw_text("TD-4", 30)}, contact=CONTACT)
    return workspace.root


@pytest.fixture
def ws(made: Path, tmp_path: Path) -> Workspace:
    return copied(made, tmp_path / "ws")


def test_what_is_erased_is_gone_and_the_proof_stays(ws: Workspace) -> None:
    request = Vault(ws.vault).get("TD-1")
    before = entries_of(ws)
    with DedupeIndex.open(ws.index) as index:
        assert "TD-1" in index.ids()
    answer = call(ws, "erase", "TD-1", "--reason", REASON, "--actor", "officer")
    assert answer.code == 0 and "TD-1: verified, erased." in answer.text
    assert [(e.event.kind, e.event.actor, e.event.data) for e in entries_of(ws)[len(before) :]] == [
        ("erasing", "officer", {"reason": REASON}), ("erased", "officer", {"reason": REASON}),
    ]  # fmt: skip
    assert not Vault(ws.vault).holds("TD-1") and sorted(Vault(ws.vault).ids()) == ["TD-2", "TD-3", "TD-4"]
    assert list(ws.index.iterdir()) == [], "fingerprints of three words each could be guessed together again"
    assert request_states(entries_of(ws))["TD-1"].erased
    assert excluded(entries_of(ws), 2).keys() == {"TD-1", "TD-2", "TD-3"}, "v2 was still made without its text"

    answer = call(ws, "verify", "--deep")
    assert (answer.code, answer.out.split()[0]) == (0, "Everything") and "erased, so that" in answer.err
    assert "TD-1" in answer.err and "TD-2" not in answer.err
    for arguments in (["status"], ["log"], ["show", "TD-1"], ["export", "--out", "register"], ["report", "--out", "r"]):
        assert call(ws, *arguments).code == 0, arguments
    assert "verified, erased" in call(ws, "show", "TD-1").text
    page = (ws.root.parent / "r").read_text()
    assert "□ erased" in page and "Erased, so no longer measured on new versions: TD-1." in page and REASON in page
    rows = json.loads((ws.root.parent / "register" / "requests.json").read_bytes())
    assert [(r["request_id"], r["erased"], r["title"]) for r in rows][:2] == [
        ("TD-1", True, ""), ("TD-2", False, "Work TD-2"),
    ]  # fmt: skip
    shutil.rmtree(ws.root.parent / "register")
    assert leaks([request.title, request.text, *request.text.split(". ")], ws.root, answer.text.encode()) == []
    assert leaks([request.title], ws.vault, *ws.vault.iterdir()) == []


def test_page_and_register_in_the_workspace_lose_title_and_rights_holder(ws: Workspace) -> None:
    audit = ws.reports / "audit-20261123T090000Z.json"
    audit.write_text("{}")
    for command in ("report", "export"):
        assert call(ws, command).code == 0
    title = b"Work TD-1"
    assert title in ws.report_page.read_bytes() and title in (ws.register / "requests.csv").read_bytes()
    erase(ws, "TD-1", "officer", REASON)
    assert [path for path in ws.reports.iterdir() if path.name != "logs"] == [audit]  # logs hold ids only
    for command in ("report", "export"):
        assert call(ws, command).code == 0
    assert leaks([title.decode()], ws.root) == [] and b"Work TD-2" in ws.report_page.read_bytes()


def test_certificate_of_an_erased_text_holds_and_says_up_to_where_it_was_measured(ws: Workspace) -> None:
    assert call(ws, "certificate", "TD-1", "--out", "before").code == 0
    erase(ws, "TD-1", "officer", REASON)
    make_step(ws, "TD-5")
    for name, later in (("TD-1", [2]), ("TD-2", [3])):
        answer = call(ws, "certificate", name, "--out", f"c-{name}")
        assert answer.code == 0, answer
        tree = json.loads((ws.root.parent / f"c-{name}" / "certificate.json").read_bytes())
        assert [v["version"] for v in tree["later"]] == later
        lines = verify_bundle.check_bundle(ws.root.parent / f"c-{name}")
        assert "FAILED" not in {line.verdict for line in lines}
        page = (ws.root.parent / f"c-{name}" / "certificate.html").read_text()
        told = " ".join(tree["statement"])
        assert ("erased" in told) == ("erased" in page) == ("erased_at" in tree) == (name == "TD-1")
    tree = json.loads((ws.root.parent / "c-TD-1" / "certificate.json").read_bytes())
    assert (tree["request"]["title"], tree["request"]["rights_holder"], tree["current"]) == ("(erased)",) * 2 + (2,)
    assert "up to the last one before its text was erased: version 2" in " ".join(tree["statement"])
    # That it was erased cannot be left out or put in by whoever passes the certificate on.
    for name, change in (("c-TD-1", lambda t: t.pop("erased_at")), ("before", lambda t: t.update(erased_at="x"))):
        path = ws.root.parent / name / "certificate.json"
        tree = json.loads(path.read_bytes())
        change(tree)
        path.write_bytes(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode() + b"\n")
        assert "FAILED" in {line.verdict for line in verify_bundle.check_bundle(path.parent)}


def test_a_text_erased_before_any_later_version(ws: Workspace) -> None:
    make_step(ws, "TD-5")
    erase(ws, "TD-5", "officer", REASON)
    make_step(ws, "TD-6")
    assert call(ws, "certificate", "TD-5", "--out", "c").code == 0
    tree = json.loads((ws.root.parent / "c" / "certificate.json").read_bytes())
    assert tree["later"] == [] and "No later version was measured before its text was erased." in tree["statement"]
    assert verify(ws, Depth.DEEP) == []


def test_what_waits_is_held_or_unknown_is_not_erased(ws: Workspace) -> None:
    note(ws, "hold", "TD-2", "officer", "litigation")
    before = {p: p.read_bytes() for p in ws.vault.iterdir()}, len(entries_of(ws))
    for name, reason, kind, told in (
        ("TD-1", " ", UsageError, "needs a reason"),
        ("TD-9", REASON, UsageError, "no such request"),
        ("TD-4", REASON, UsageError, "is waiting, so a run is still to work on its text. Withdraw it first"),
        ("TD-2", REASON, Refused, "is on legal hold"),
    ):
        with pytest.raises(kind, match=told):
            erase(ws, name, "officer", reason)
    assert ({p: p.read_bytes() for p in ws.vault.iterdir()}, len(entries_of(ws))) == before
    assert call(ws, "erase", "TD-2", "--reason", REASON).code == 1
    note(ws, "released", "TD-2", "officer", "settled")
    note(ws, "withdrawn", "TD-4", "officer", "sent twice")
    for name in ("TD-2", "TD-4"):
        assert erase(ws, name, "officer", REASON).erased
        with pytest.raises(UsageError, match="was erased already"):
            erase(ws, name, "officer", REASON)
    with pytest.raises(UsageError, match="nothing left to hold"):
        note(ws, "hold", "TD-4", "officer", "too late")
    assert verify(ws) == []


def test_a_copy_in_the_inbox_is_named_and_nothing_is_destroyed(ws: Workspace) -> None:
    (ws.inbox / "rejected").mkdir()
    for path in (ws.inbox / "again.json", ws.inbox / "rejected" / "bad.json"):
        path.write_text(json.dumps({"requests": [{"request_id": "TD-1", "text": "…"}]}))
    (ws.inbox / "other.json").write_text("[]")
    with pytest.raises(UsageError, match=r"again\.json: holds a request(.|\n)*bad\.json: holds a request") as caught:
        erase(ws, "TD-1", "officer", REASON)
    assert "other.json" not in str(caught.value) and Vault(ws.vault).get("TD-1").title == "Work TD-1"


def test_an_audit_leaves_out_what_nobody_can_measure(ws: Workspace) -> None:
    before = to_recheck(ws, current_version(entries_of(ws)))
    assert "TD-1" in before
    erase(ws, "TD-1", "officer", REASON)
    assert to_recheck(ws, current_version(entries_of(ws))) == [name for name in before if name != "TD-1"]


def test_runs_that_worked_on_it_go_and_others_stay(ws: Workspace) -> None:
    other = prepare_step(ws, ["TD-7"])
    plan = json.loads((ws.runs / other / "plan.json").read_bytes())
    mine = ws.runs / "run-of-TD-1"
    mine.mkdir()
    (mine / "plan.json").write_text(json.dumps(plan | {"requests": ["TD-1", "TD-2"]}))
    (ws.runs / ".check-x").mkdir()
    erase(ws, "TD-1", "officer", REASON)
    assert [path.name for path in ws.runs.iterdir()] == [other]


def test_nothing_brings_an_erased_text_back(ws: Workspace) -> None:
    for name in ("TD-1", "TD-3"):
        erase(ws, name, "officer", REASON)
    with pytest.raises(Refused, match="TD-1, TD-3, whose text was erased since"):
        roll_back(ws, 0, "officer", "trial", override=True)
    for name in ("TD-1", "TD-2"):
        note(ws, "countered", name, "officer", "licence shown")
    for name, told in (
        ("TD-1", "TD-1: its text was erased, so nobody could measure whether it came back"),
        ("TD-2", "TD-3: was taken out in the same step and its text was erased"),
    ):
        with pytest.raises(UsageError, match=told):
            check_reinstatement(ws, entries_of(ws), [name], "licence shown")
    assert stays_out(entries_of(ws), [2], ["TD-2"]) == ()


def test_an_interrupted_erasure_is_a_break_until_the_same_command_ends_it(ws: Workspace) -> None:
    with Ledger.open(ws.ledger) as ledger:
        ledger.append(Event(kind="erasing", actor="officer", request_id="TD-1", data={"reason": REASON}))
    assert [b.found for b in verify(ws)] == ["its erasure was begun and not ended"]
    assert erase(ws, "TD-1", "officer", REASON).erased and verify(ws) == []


def test_a_record_that_is_put_back_is_found(ws: Workspace, made: Path) -> None:
    erase(ws, "TD-1", "officer", REASON)
    for path in (made / "vault").iterdir():
        shutil.copyfile(path, ws.vault / path.name)
    assert [b.found for b in verify(ws)] == ["was erased, and the vault has a record or key of it again"]


def test_search_leaves_an_erased_text_out(ws: Workspace) -> None:
    assert claimed_works(ws, entries_of(ws)).names == ("TD-1", "TD-2", "TD-3", "TD-4")
    erase(ws, "TD-1", "officer", REASON)
    assert claimed_works(ws, entries_of(ws)).names == ("TD-2", "TD-3", "TD-4")


def test_the_gate_says_what_it_could_not_check() -> None:
    score = TextScore(
        exact_memorisation=0.1, extraction_strength=0, rouge_1=None, rouge_l=None, longest_run=None, nll=3
    )
    compared = [Comparison(name=name, role=role, before=score, after=score)
                for name, role in (("A", "this"), ("B", "earlier"))]  # fmt: skip
    evaluation = Evaluation(level=LEVEL, comparisons=tuple(compared))
    told = decide(evaluation, {}, GateSettings(), ["B", "C"]).unchecked
    assert told[0] == "C (earlier): its text was erased, so nobody can measure whether it is still out."
    assert len(told) == 3, "B was measured before it was erased; kept and held-out texts are missing, too"


def test_documents_that_resembled_it_stay_left_out_by_what_is_on_record(ws: Workspace, tmp_path: Path) -> None:
    run_id = prepare_step(ws, ["TD-7"])
    path = ws.runs / run_id / "dedupe.json"
    exclusion = RetainExclusion(document="retain/a.txt", request_id="TD-7", jaccard=0.5, containment=0.9, contained=0.5)
    report = DedupeReport.model_validate(json.loads(path.read_bytes())["record"])
    report = report.model_copy(update={"retain_excluded": (exclusion,)})
    path.write_text(json.dumps({"key": "made", "record": report.model_dump(mode="json")}))
    publish(ws, run_id)
    objects, entries = VersionStore(ws.versions).objects, entries_of(ws)
    assert noted_exclusions(objects, entries, {"TD-7"}) == (exclusion,)
    assert noted_exclusions(objects, entries, {"TD-1"}) == noted_exclusions(objects, entries, ()) == ()


@pytest.mark.slow
def test_steps_with_a_real_model_after_an_erasure(tmp_path: Path, model: Path, one_model: None) -> None:
    """The next step runs, publishes, and says what it could not check; a repeat is looked for in the model."""
    ws = workspaces.copied(workspaces.published(model.parent), tmp_path / "ws")
    for name in ("A", "B"):  # B is a near-copy of A
        erase(ws, name, "officer", REASON)
    take_in(ws, "batch-2", {"D": WORKS["two"], "E": WORKS["one"]})
    outcome = workspaces.step(ws)
    assert outcome is not None and outcome.outcome == "published"
    run = list(decisions(entries_of(ws)).values())[-1]
    objects = VersionStore(ws.versions).objects
    verdict, evaluation = (recall(objects, run, n, k) for n, k in (("gate", Verdict), ("evaluate", Evaluation)))
    assert isinstance(verdict, Verdict) and isinstance(evaluation, Evaluation)
    assert [told.split(": ")[0] for told in verdict.unchecked] == ["A (earlier)", "B (earlier)"]
    assert {c.name for c in evaluation.comparisons if c.role in ("this", "earlier", "not-memorised")} == {"D", "E"}
    assert request_states(entries_of(ws))["E"].state == "not-memorised", "no repeat, but not in the model either"
    with DedupeIndex.open(ws.index) as index:
        assert index.ids() == ("D",)
    assert verify(ws, Depth.DEEP) == []
