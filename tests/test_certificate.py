"""Certificates: what they say, of what they refuse to speak, and what they never give away."""

from __future__ import annotations

import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from histories import array_model, entries_of, prepare_step, publish, start_history
from workspaces import WORKS, copied, draw_text, leaks, published, step, take_in

from pipeline import verify_bundle
from pipeline.certificate import certify, render, write_certificate
from pipeline.errors import NoSpace, StoreDamaged, UsageError
from pipeline.evidence import find_check, recall
from pipeline.keys import load_log_key, log_vkey
from pipeline.ledger import Ledger
from pipeline.merkle import EMPTY_ROOT
from pipeline.notes import Checkpoint, checkpoint_text, parse_vkey, sign_note
from pipeline.records import Evaluation, Event
from pipeline.states import decisions, request_states
from pipeline.vault import Vault
from pipeline.versions import VersionStore
from pipeline.workspace import Workspace

FILES = {
    "certificate.json", "certificate.html", "checkpoint", "log.pub", "model.pub", "model.sig", "verify_bundle.py",
}  # fmt: skip
ALPHA, BETA, GAMMA, DELTA = (f"request-{name}" for name in ("alpha", "beta", "gamma", "delta"))


def text_of(name: str) -> str:
    return draw_text(name, 30)


def step_of(workspace: Workspace, *names: str) -> None:
    """Take requests in, each with a contact and a title of its own, and publish a version without them."""
    for name in names:
        private = {"contact": f"{name}@holder.example", "title": f"The {name} book"}
        take_in(workspace, f"batch-{name}", {name: text_of(name)}, **private)
    publish(workspace, prepare_step(workspace, names, submit=False))


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """v1 without alpha and beta, v2 without gamma; delta waits."""
    folder = tmp_path_factory.mktemp("history")
    workspace = start_history(folder / "workspace", array_model(folder / "model"))
    step_of(workspace, ALPHA, BETA)
    step_of(workspace, GAMMA)
    take_in(workspace, "batch-delta", {DELTA: text_of(DELTA)})
    return workspace.root


@pytest.fixture
def workspace(history: Path, tmp_path: Path) -> Workspace:
    return copied(history, tmp_path / "workspace")


def append(workspace: Workspace, *events: Event) -> None:
    with Ledger.open(workspace.ledger) as ledger:
        ledger.append(*events)


def answer(workspace: Workspace, name: str, kind: str, evidence: object = ()) -> None:
    """Take a request in and answer it on v2 without a new version, as a run does that needs to train nothing."""
    take_in(workspace, f"batch-{name}", {name: text_of(name)})
    run = {"actor": "tester", "run_id": f"run-{name}", "version": 2}
    limits = {"forget_tolerance": 0.05, "kept_share": 0.85, "perplexity_rise": 0.1}
    plan = {"limits": limits, "settings": "sha256:" + "1" * 64, "code": "0.1.0"}
    found = {"exact_memorisation": 0.2, "passages": 4, "memorised": 0, "covered": 0.75, "evidence": evidence}
    append(
        workspace,
        Event(kind="planned", data=plan, **run),
        Event(kind="answered", data={"evidence": {}}, **run),
        Event(kind=kind, request_id=name, data=found, **run),
    )


def failed(folder: Path, **options: Any) -> list[str]:
    return [line.text for line in verify_bundle.check_bundle(folder, **options) if line.verdict == "FAILED"]


def tree_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "certificate.json").read_bytes()))


# --- what it says -----------------------------------------------------------------------------------------


def test_certificate_says_what_the_ledger_says(workspace: Workspace, tmp_path: Path) -> None:
    certificate = write_certificate(workspace, ALPHA, tmp_path / "out")
    entries = entries_of(workspace)

    def entry(kind: str, **wanted: object) -> Any:
        return next(
            e for e in entries if e.event.kind == kind and all(getattr(e.event, k) == v for k, v in wanted.items())
        )

    verified, one = entry("verified", request_id=ALPHA), entry("published", version=1)
    assert certificate.outcome == "excluded" and certificate.state == "verified"
    assert (certificate.version.version, certificate.current) == (1, 2)
    assert certificate.version.root == VersionStore(workspace.versions).manifest(1).root
    assert certificate.version.manifest == one.event.data["manifest"]
    assert datetime.fromisoformat(certificate.decided_at) == verified.at
    assert certificate.measured is not None
    assert certificate.measured.model_dump(mode="json") == verified.event.data
    assert certificate.measured.limit == pytest.approx(0.21)
    assert certificate.plan.limits == entry("planned", run_id=one.event.run_id).event.data["limits"]
    assert datetime.fromisoformat(certificate.plan.planned_at) <= datetime.fromisoformat(certificate.decided_at)
    assert certificate.gate is not None and certificate.gate.reasons == ()
    assert certificate.request.title == f"The {ALPHA} book" and certificate.request.batch_id == f"batch-{ALPHA}"
    assert certificate.request.commitment == request_states(entries)[ALPHA].commitment
    assert certificate.passages == ((0, 16, 32),)
    two = recall(
        VersionStore(workspace.versions).objects, list(decisions(entries).values())[1], "evaluate", Evaluation
    )  # fmt: skip
    assert two is not None
    place = find_check(two, ALPHA, ("earlier",))
    assert place is not None
    assert [v.version for v in certificate.later] == [2]
    assert certificate.later[0].measured == two.comparisons[place].after
    words = " ".join(certificate.statement)
    assert "never absence" in words and "suffices in law" in words and "version 2 0.150" in words
    assert f"request {ALPHA}" in words and "1.000 before and 0.170 in version 1" in words


def test_bundle_has_these_files_and_holds(workspace: Workspace, tmp_path: Path) -> None:
    write_certificate(workspace, ALPHA, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == FILES
    assert failed(tmp_path / "out") == []
    assert (tmp_path / "out" / "checkpoint").read_bytes() == workspace.checkpoint.read_bytes()
    assert (tmp_path / "out" / "verify_bundle.py").read_bytes() == Path(verify_bundle.__file__).read_bytes()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(("name", "first", "later"), [(BETA, 1, [2]), (GAMMA, 2, [])])
def test_every_request_of_the_history_gets_its_first_version(
    workspace: Workspace, tmp_path: Path, name: str, first: int, later: list[int]
) -> None:
    certificate = write_certificate(workspace, name, tmp_path / "out")
    assert certificate.version.version == first
    assert [v.version for v in certificate.later] == later
    assert [check.version for check in certificate.checks] == [first, *later]


@pytest.mark.parametrize("kind", verify_bundle.ANSWERS)
def test_request_without_a_version_of_its_own_is_certified_as_such(
    workspace: Workspace, tmp_path: Path, kind: str
) -> None:
    answer(workspace, "request-omega", kind)
    step_of(workspace, "request-psi")  # a version made since does not measure the text
    certificate = write_certificate(workspace, "request-omega", tmp_path / "out")
    assert (certificate.outcome, certificate.measured, certificate.gate, certificate.checks) == (kind, None, None, ())
    assert certificate.answer is not None and certificate.answer.exact_memorisation == 0.2
    assert (certificate.version.version, certificate.current) == (2, 3)
    assert "no version was made for it" in certificate.statement[1] and "0.200" in certificate.statement[1]
    assert failed(tmp_path / "out") == []


def test_countered_request_is_still_out(workspace: Workspace, tmp_path: Path) -> None:
    append(workspace, Event(kind="countered", actor="court", request_id=ALPHA))
    assert write_certificate(workspace, ALPHA, tmp_path / "out").state == "countered"
    assert failed(tmp_path / "out") == []


def test_version_that_was_taken_out_again_after_a_regress_is_certified(workspace: Workspace, tmp_path: Path) -> None:
    append(workspace, Event(kind="regressed", actor="tester", request_id=ALPHA))
    publish(workspace, prepare_step(workspace, [ALPHA], submit=False))
    certificate = write_certificate(workspace, ALPHA, tmp_path / "out")
    assert (certificate.version.version, certificate.current) == (3, 3)


def test_rollback_keeps_what_the_version_in_force_excludes(workspace: Workspace, tmp_path: Path) -> None:
    append(workspace, Event(kind="rolled-back", actor="tester", version=1))
    certificate = write_certificate(workspace, ALPHA, tmp_path / "out")
    assert (certificate.version.version, certificate.current, certificate.later) == (1, 1, ())
    with pytest.raises(UsageError, match=r"was answered on v2, but v1 is in force"):
        certify(workspace, GAMMA)
    step_of(workspace, "request-psi")  # v3, made from v1
    assert [v.version for v in certify(workspace, ALPHA).later] == [3]


def test_what_is_appended_meanwhile_is_left_out(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, grown = Ledger.entries, []

    def entries(ledger: Ledger) -> Any:
        if not grown:
            grown.append(True)
            append(workspace, Event(kind="hold", actor="court", request_id=BETA))
        return original(ledger)

    size = len(entries_of(workspace))
    monkeypatch.setattr(Ledger, "entries", entries)
    certificate = write_certificate(workspace, ALPHA, tmp_path / "out")
    assert certificate.log.checkpoint.split("\n")[1] == str(size)
    assert failed(tmp_path / "out") == []


def test_older_checkpoint_is_continued_and_that_is_said(workspace: Workspace, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_bytes(workspace.checkpoint.read_bytes())
    size = len(entries_of(workspace))
    append(workspace, Event(kind="hold", actor="court", request_id=BETA))
    certificate = write_certificate(workspace, ALPHA, tmp_path / "out", kept)
    assert certificate.log.since is not None and certificate.log.since.size == size
    assert certificate.log.since.checkpoint == kept.read_text()
    page = (tmp_path / "out" / "certificate.html").read_text()
    assert f"An earlier checkpoint, kept elsewhere, over the first {size} entries." in page
    assert f"over its first {size} entries: none of them was changed" in " ".join(page.split())
    assert all(html.escape(node) in page for node in certificate.log.since.proof) and certificate.log.since.proof
    assert failed(tmp_path / "out", checkpoints=[kept]) == []
    # Nothing was added since the newest one: it is continued by itself, without a hash.
    newest = write_certificate(workspace, ALPHA, tmp_path / "same", workspace.checkpoint)
    assert newest.log.since is not None and newest.log.since.proof == ()
    assert failed(tmp_path / "same") == []


def _signed(workspace: Workspace, size: int, root: bytes) -> bytes:
    origin = parse_vkey(log_vkey(workspace.keys)).name
    return sign_note(checkpoint_text(Checkpoint(origin, size, root)), origin, load_log_key(workspace.keys)).encode()


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda w: None, UsageError, "is missing"),
        (lambda w: b"x" * ((1 << 20) + 1), UsageError, "at most 1048576 are written there"),
        (lambda w: b"", StoreDamaged, "is no checkpoint of this lineage"),
        (lambda w: b"\xff" * 200, StoreDamaged, "is no checkpoint of this lineage"),
        (
            lambda w: re.sub(rb"\n([0-9]+)\n", rb"\n1\1\n", w.checkpoint.read_bytes()),
            StoreDamaged,
            "does not match the text",
        ),
        (lambda w: _signed(w, 1, b"\x01" * 32), StoreDamaged, "the history was rewritten since"),
        (lambda w: _signed(w, 10_000, b"\x01" * 32), StoreDamaged, "signs 10000 entries, the ledger has"),
        (lambda w: _signed(w, 0, EMPTY_ROOT), UsageError, "signs an empty log"),
    ],
)
def test_what_is_no_older_checkpoint_of_this_log_is_refused_and_nothing_written(
    workspace: Workspace,
    tmp_path: Path,
    make: Callable[[Workspace], bytes | None],
    kind: type[Exception],
    message: str,
) -> None:
    kept = tmp_path / "kept"
    if (content := make(workspace)) is not None:
        kept.write_bytes(content)
    with pytest.raises(kind, match=message) as error:
        write_certificate(workspace, ALPHA, tmp_path / "out", kept)
    assert str(kept) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_checkpoint_of_another_log_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    other = start_history(tmp_path / "other", array_model(tmp_path / "model"))
    with pytest.raises(StoreDamaged, match="has no signature of"):
        certify(workspace, ALPHA, other.checkpoint)


def test_title_that_the_log_did_not_commit_to_is_not_certified(workspace: Workspace) -> None:
    vault = Vault(workspace.vault)
    request = vault.get(ALPHA).model_copy(update={"request_id": "request-rho", "text": text_of("request-rho")})
    vault.put(request)
    data = {"batch_id": request.batch_id, "received_at": request.received_at.isoformat(),
            "commitment": vault.commitment(request.text), "record": vault.record_commitment(request)}  # fmt: skip
    append(workspace, Event(kind="received", actor="tester", request_id="request-rho", data=data))
    publish(workspace, prepare_step(workspace, ["request-rho"], submit=False))
    found = certify(workspace, "request-rho")
    assert (found.request.title, found.request.record) == (request.title, data["record"])
    assert str(data["record"]) in render(found)
    vault.put(request.model_copy(update={"title": "Another book"}), replace=True)
    with pytest.raises(StoreDamaged, match="another title, rights holder, basis or contact than the ledger"):
        certify(workspace, "request-rho")


def test_exchanged_text_is_not_certified(workspace: Workspace) -> None:
    vault = Vault(workspace.vault)
    vault.put(vault.get(ALPHA).model_copy(update={"text": "other words"}), replace=True)
    with pytest.raises(StoreDamaged, match="another text than the ledger committed to"):
        certify(workspace, ALPHA)


# --- of what it does not speak ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("events", "name", "message"),
    [
        ((), DELTA, "is waiting"),
        ((), "request-nobody", "was never received"),
        (("withdrawn",), ALPHA, "is withdrawn"),
        (("regressed",), ALPHA, "is regressed"),
        (("countered", "reinstated"), ALPHA, "is reinstated"),
        (("regressed", "countered"), ALPHA, r"came back after v1 \(ledger entry"),
        (("countered",), DELTA, "is countered"),
    ],
)
def test_states_that_cannot_be_certified(
    workspace: Workspace, tmp_path: Path, events: tuple[str, ...], name: str, message: str
) -> None:
    append(workspace, *(Event(kind=kind, actor="tester", request_id=name) for kind in events))
    with pytest.raises(UsageError, match=message) as caught:
        write_certificate(workspace, name, tmp_path / "out")
    assert caught.value.exit_code == 2 and name in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_refused_request_is_not_certified(workspace: Workspace) -> None:
    publish(workspace, prepare_step(workspace, [DELTA], accepted=False, submit=False))
    with pytest.raises(UsageError, match="is refused"):
        certify(workspace, DELTA)


def test_request_without_a_measurement_is_not_certified(workspace: Workspace) -> None:
    append(workspace, Event(kind="applied", actor="tester", request_id=DELTA, version=2, run_id="run-x"))
    with pytest.raises(UsageError, match="is applied"):
        certify(workspace, DELTA)


def test_later_measurement_above_the_limit_is_not_certified(workspace: Workspace) -> None:
    # The limit was relaxed: the gate accepts what the certificate's own limit does not.
    workspace.settings_file.write_text("[gate]\nforget_tolerance = 0.9\n")
    run_id = prepare_step(workspace, ["request-psi"])
    path = workspace.runs / run_id / "evaluate.json"
    tree = json.loads(path.read_bytes())
    for comparison in tree["record"]["comparisons"]:
        if comparison["name"] == ALPHA:
            comparison["after"]["exact_memorisation"] = 0.6
    path.write_text(json.dumps(tree))
    publish(workspace, run_id)
    with pytest.raises(UsageError, match=r"v3 was measured at 0\.600, above the limit of 0\.210"):
        certify(workspace, ALPHA)
    assert certify(workspace, BETA).current == 3


def test_later_version_that_did_not_measure_the_text_is_damage(workspace: Workspace) -> None:
    run_id = prepare_step(workspace, ["request-psi"])
    path = workspace.runs / run_id / "evaluate.json"
    tree = json.loads(path.read_bytes())
    tree["record"]["comparisons"] = [c for c in tree["record"]["comparisons"] if c["name"] != ALPHA]
    path.write_text(json.dumps(tree))
    publish(workspace, run_id)
    with pytest.raises(StoreDamaged, match=rf"v3: request '{ALPHA}' was not measured on it"):
        certify(workspace, ALPHA)


def test_answer_that_names_other_requests_is_not_given_away(workspace: Workspace) -> None:
    pair = {"request_id": ALPHA, "jaccard": 1.0, "containment": 1.0, "contained": 1.0}
    answer(workspace, "request-omega", "repeat", evidence=[pair])
    with pytest.raises(UsageError, match="names other requests") as caught:
        certify(workspace, "request-omega")
    assert ALPHA not in str(caught.value)


# --- what it never gives away -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [ALPHA, GAMMA])
def test_no_text_no_contact_and_nothing_of_other_requests(workspace: Workspace, tmp_path: Path, name: str) -> None:
    write_certificate(workspace, name, tmp_path / "out")
    others = {ALPHA, BETA, GAMMA, DELTA} - {name}
    secrets = [f"{name}@holder.example", *text_of(name).split(". ")]
    secrets += [*others, *(f"The {other} book" for other in others), *(text_of(other)[:20] for other in others)]
    assert leaks(secrets, tmp_path / "out") == []
    assert leaks([name], tmp_path / "out") != []  # the search would find something


def test_workspace_is_only_read(workspace: Workspace, tmp_path: Path) -> None:
    def digests() -> Mapping[str, str]:
        return {
            str(p): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(workspace.root.rglob("*"))
            if p.is_file() and not p.name.endswith(("-wal", "-shm"))  # SQLite's own, made by any reader
        }

    before = digests()
    write_certificate(workspace, ALPHA, tmp_path / "out")
    assert digests() == before


def test_reading_side_starts_without_torch_and_prefect() -> None:
    code = "import sys, pipeline.certificate; print(sorted({'torch', 'prefect', 'transformers'} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# --- the folder -------------------------------------------------------------------------------------------


def test_folder_must_be_absent_or_empty(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_certificate(workspace, ALPHA, tmp_path / "out")
    kept = tree_of(tmp_path / "out")
    with pytest.raises(UsageError, match="is not empty"):
        write_certificate(workspace, BETA, tmp_path / "out")
    assert tree_of(tmp_path / "out") == kept
    with pytest.raises(UsageError, match="is not empty"):
        write_certificate(workspace, ALPHA, tmp_path / "out" / "checkpoint")


def test_missing_parents_are_made(workspace: Workspace, tmp_path: Path) -> None:
    write_certificate(workspace, ALPHA, tmp_path / "a" / "b" / "out")
    assert failed(tmp_path / "a" / "b" / "out") == []


@pytest.mark.parametrize("damage", ["signature", "key", "manifest"])
def test_certificate_that_would_not_hold_is_not_written(workspace: Workspace, tmp_path: Path, damage: str) -> None:
    store = VersionStore(workspace.versions)
    if damage == "key":
        path, data = workspace.keys / "model.pub", b""
        other = start_history(tmp_path / "other", array_model(tmp_path / "other-model"))
        data = (other.keys / "model.pub").read_bytes()
        shutil.rmtree(other.root)
        shutil.rmtree(tmp_path / "other-model")
    elif damage == "signature":
        path, data = store.signature_path(1), store.signature(2)
    else:
        path = store.manifest_path(1)
        data = path.read_bytes().replace(b'"tester"', b'"taster"').replace(b"[0,16,32]", b"[0,16,33]")
        assert data != path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(data)
    with pytest.raises(StoreDamaged, match=r"takedown verify"):
        write_certificate(workspace, ALPHA, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["workspace"]


def test_full_disk_leaves_nothing(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoSpace, match="make the disk writable"):
        write_certificate(workspace, ALPHA, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["workspace"]


# --- the page ---------------------------------------------------------------------------------------------


def test_page_shows_everything_and_loads_nothing(workspace: Workspace, tmp_path: Path) -> None:
    certificate = write_certificate(workspace, ALPHA, tmp_path / "out")
    page = html.unescape((tmp_path / "out" / "certificate.html").read_text())
    for value in (
        *certificate.statement, certificate.request.title, certificate.request.commitment, certificate.version.root,
        certificate.later[0].root, certificate.plan.settings, certificate.plan.run_id, certificate.log.vkey,
        certificate.version.signature, "verify_bundle.py", "0–16–32",
    ):  # fmt: skip
        assert value in page, value
    for proven in certificate.log.entries:
        assert all(node in page for node in proven.proof)
        assert proven.leaf in page
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    assert "src=" not in page and "url(" not in page and "href=" not in page


def test_page_escapes_what_the_sender_wrote(workspace: Workspace) -> None:
    certificate = certify(workspace, ALPHA)
    title = "<script>alert(1)</script>\u202e\x07\"'&"
    request = certificate.request.model_copy(update={"title": title, "rights_holder": "</bdi><b>x"})
    page = render(certificate.model_copy(update={"request": request}))
    assert "<script" not in page and "<b>x" not in page and "\x07" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "&lt;/bdi&gt;&lt;b&gt;x" in page


# --- with a model that really recites ---------------------------------------------------------------------


@pytest.mark.slow
def test_certificates_of_a_real_lineage(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    workspace = copied(published(tmp_path_factory.mktemp("published")), tmp_path / "workspace")
    take_in(workspace, "batch-2", {"D": WORKS["two"]})
    assert step(workspace) is not None
    store = VersionStore(workspace.versions)
    for version in (0, 1, 2):
        store.restore(version, tmp_path / f"v{version}", sign=True)
    for name, first in (("A", 1), ("B", 1), ("D", 2)):
        certificate = write_certificate(workspace, name, tmp_path / name)
        assert certificate.outcome == "excluded" and certificate.version.version == first
        assert certificate.measured is not None
        assert certificate.measured.after.exact_memorisation <= certificate.measured.limit + 1e-9
        assert certificate.measured.before.exact_memorisation > 0.8
        for version in (first, 2):
            assert failed(tmp_path / name, model=tmp_path / f"v{version}") == []
        assert failed(tmp_path / name, model=tmp_path / "v0") == [
            "model: its weights are none of the versions that this certificate is about."
        ]
        assert leaks([*(t[:30] for t in WORKS.values())], tmp_path / name) == []
    never = write_certificate(workspace, "C", tmp_path / "C")
    assert never.outcome == "not-memorised" and never.version.version == 0
    assert never.answer is not None and never.answer.memorised == 0
    # It was measured on the version that its run made for the others, too.
    assert [check.version for check in never.checks] == [1]
    assert [v.measured is None for v in never.later] == [False, True]
    assert failed(tmp_path / "C", model=tmp_path / "v0") == []


def test_issue_time_is_now(workspace: Workspace) -> None:
    before = datetime.now(UTC)
    assert before <= datetime.fromisoformat(certify(workspace, ALPHA).issued_at) <= datetime.now(UTC)
