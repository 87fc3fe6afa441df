"""The command line as a new user meets it: every verb, every mistake, exit codes, nothing raw on the terminal.

`takedown run` needs Prefect: its outcomes are in `test_flow.py`, here is one run of the installed command.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import workspaces
from typer.main import get_group
from workspaces import UNSEEN, WORKS, copied, write_batch

from flows import cli, terminal
from pipeline.ledger import Ledger
from pipeline.states import request_states
from pipeline.submit import submit_or_resume
from pipeline.versions import VersionStore
from pipeline.workspace import Workspace, writing

HOSTILE_TITLE = "<script>alert(1)</script> [red]loud[/red] :smile: {{ 7*7 }} &amp;"
HOSTILE_ACTOR = "\x1b[31mroot\x1b[0m\u202e [bold]x"


class Answer(NamedTuple):
    """What a call left behind."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


Takedown = Callable[..., Answer]


@pytest.fixture
def takedown(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Takedown]:
    """Calls `main` as the console script does, in this process."""

    def call(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["takedown", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capfd.readouterr()
        assert "\x1b" not in captured.out + captured.err  # no terminal here, so nothing may colour or command it
        assert "Traceback" not in captured.err
        return Answer(int(stop.value.code or 0), captured.out, captured.err)

    monkeypatch.delenv("TAKEDOWN_WORKSPACE", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    environment = dict(os.environ)
    yield call
    os.environ.clear()  # `run` sets what Prefect needs, for its process only
    os.environ.update(environment)


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A workspace with v1; only to be read."""
    return workspaces.published(model.parent)


@pytest.fixture
def ws(tmp_path: Path, published: Path) -> Workspace:
    """A copy of it, to be written to."""
    return copied(published, tmp_path / "ws")


@pytest.fixture
def batch(tmp_path: Path) -> Path:
    return write_batch(tmp_path, "batch-2", {"D": WORKS["two"], "F": UNSEEN})


def snapshot(folder: Path) -> dict[str, str]:
    """Digest of every file, but for what SQLite and the lock touch when they are only opened."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not p.name.endswith(("-wal", "-shm", ".lock"))
    }


# --- reading verbs ----------------------------------------------------------------------------------------


def test_reading_verbs_answer_in_text(takedown: Takedown, published: Path) -> None:
    expected = {
        ("status",): ["Current version: v1", "verified", "verified (folded)", "not-memorised", "Nothing waits."],
        ("log",): [
            "initialised",
            "received",
            "planned",
            "accepted",
            "applied",
            "folded",
            "not-memorised",
            "published",
            "verified",
            "tester",
            "takedown-pipeline/",
        ],
        ("versions",): ["v0", "superseded", "v1", "current", "A, B"],
        ("show", "v1"): ["excludes first: A, B", "parent v0", "model.safetensors", "sha256:"],
        ("show", "v0"): ["made", "by init (tester), parent none", "excludes first: nothing"],
        ("show", "A"): ["A: verified, excluded since v1", "exact_memorisation", "limit", "ledger entry"],
        ("show", "C"): ["C: not-memorised", "memorised: 0"],
        ("verify",): ["Everything matches"],
        ("verify", "--quick"): ["Everything is there and signed"],
        ("verify", "--deep"): ["made again from the store"],
        ("show", "v1", "--tensor", "model.norm.weight"): ["leaf ", "model.norm.weight", "root-sha256:"],
        ("first-version", "A"): ["v1  root-sha256:"],
        ("diff", "v0", "v1"): ["v0 → v1", "entries differ", "model.layers", "out of v1 only: A, B", "changed"],
        ("diff", "v1", "v1"): ["have the same weights"],
    }
    for verb, words in expected.items():
        answer = takedown("-w", published, *verb)
        assert answer.code == 0 and not answer.err, verb
        for word in words:
            assert word in answer.out, (verb, word)


def test_reading_verbs_answer_in_json(takedown: Takedown, published: Path) -> None:
    def ask(*verb: str) -> Any:
        answer = takedown("-w", published, *verb, "--json")
        assert answer.code == 0 and not answer.err
        return answer.json()

    status = ask("status")
    assert status["current"] == 1
    assert {r["request_id"]: r["state"] for r in status["requests"]} == {
        "A": "verified", "B": "verified", "C": "not-memorised",
    }  # fmt: skip
    log = ask("log")
    assert [e["seq"] for e in log] == list(range(1, len(log) + 1))
    assert [e["event"]["kind"] for e in log][:2] == ["initialised", "received"]
    assert "published" in [e["event"]["kind"] for e in log]
    assert [v["version"] for v in ask("versions")] == [0, 1]
    assert ask("show", "v1")["manifest"]["root"] == ask("versions")[1]["root"]
    assert ask("show", "v0")["status"] == "superseded"
    assert ask("first-version", "B")["version"] == 1
    assert ask("diff", "v0", "v1")["entries"] > ask("show", "v1")["manifest"]["report"]["changed"] > 0
    assert ask("show", "A")["state"]["version"] == 1
    assert ask("verify") == []
    report = ask("report")
    assert report["current"] == 1 and len(report["steps"]) == 1 and report["breaks"] == []


def test_reading_changes_nothing(takedown: Takedown, ws: Workspace, tmp_path: Path) -> None:
    before = snapshot(ws.root)
    for verb in (
        ["status"],
        ["log"],
        ["versions"],
        ["show", "v1"],
        ["show", "A"],
        ["verify"],
        ["verify", "--deep"],
        ["diff", "v0", "v1"],
        ["first-version", "A"],
        ["export", "--json"],
        ["report", "--json"],
        ["certificate", "A", "--out", tmp_path / "certificate"],
        ["export", "--out", tmp_path / "register"],
    ):
        assert takedown("-w", ws.root, *verb).code == 0
    assert takedown("-w", ws.root, "checkout", "v1", tmp_path / "served").code == 0
    assert snapshot(ws.root) == before


def test_workspace_from_environment_and_current_folder(
    takedown: Takedown, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAKEDOWN_WORKSPACE", str(published))
    assert "Current version: v1" in takedown("status").out
    monkeypatch.delenv("TAKEDOWN_WORKSPACE")
    monkeypatch.chdir(published)
    assert "Current version: v1" in takedown("status").out


def test_checkout_is_the_published_folder(takedown: Takedown, published: Path, tmp_path: Path) -> None:
    answer = takedown("-w", published, "checkout", "v1", tmp_path / "served")
    manifest = VersionStore(published / "versions").manifest(1)
    assert answer.code == 0 and manifest.root in answer.out
    found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / "served").iterdir()}
    signature = found.pop("model.sig")
    assert found == {f.path: f.digest.removeprefix("sha256:") for f in manifest.files}
    assert signature == hashlib.sha256((published / "versions" / "000001.sig").read_bytes()).hexdigest()
    assert takedown("-w", published, "checkout", "0", tmp_path / "original").code == 0


def test_report_is_one_html_page(takedown: Takedown, ws: Workspace, tmp_path: Path) -> None:
    assert takedown("-w", ws.root, "report").code == 0
    page = (ws.reports / "report.html").read_text()
    assert page.startswith("<!doctype html>") or page.startswith("<!DOCTYPE html>")
    assert takedown("-w", ws.root, "report", "--out", tmp_path / "r.html").code == 0
    assert (tmp_path / "r.html").stat().st_size > 10_000
    missing = takedown("-w", ws.root, "report", "--out", tmp_path / "absent" / "r.html")
    assert missing.code == 2 and "cannot be written" in missing.err


def test_help_and_version(takedown: Takedown) -> None:
    version = takedown("--version")
    assert version.code == 0 and version.out.startswith("takedown-pipeline ")
    page = takedown("--help")
    assert page.code == 0
    verbs = (
        "init",
        "check",
        "submit",
        "run",
        "status",
        "log",
        "show",
        "checkout",
        "verify",
        "report",
        "versions",
        "diff",
        "first-version",
        "rollback",
        "purge",
        "repack",
        "certificate",
        "export",
        "hold",
        "release",
        "withdraw",
        "counter",
        "rekey",
        "erase",
    )
    for verb in verbs:
        assert verb in page.out
        helped = takedown(verb, "--help")
        assert helped.code == 0 and f"Example: takedown -w ws {verb}" in " ".join(helped.out.split())
    assert takedown().code == 2  # nothing asked for is wrong use, answered with the help


# --- versions ---------------------------------------------------------------------------------------------


def test_rollback_needs_an_override_where_text_comes_back(takedown: Takedown, ws: Workspace) -> None:
    refused = takedown("-w", ws.root, "rollback", "v0", "--reason", "trial")
    assert refused.code == 1 and "A, B" in refused.err and "--override" in refused.err
    assert takedown("-w", ws.root, "rollback", "v0").code == 2, "a reason is needed"
    done = takedown("-w", ws.root, "rollback", "v0", "--reason", "trial", "--override", "--actor", "ann")
    assert done.code == 0 and "v0 is current now; it was v1." in done.out and "A, B" in done.out
    assert "regressed" in takedown("-w", ws.root, "status").out
    assert takedown("-w", ws.root, "first-version", "A").code == 1
    assert takedown("-w", ws.root, "versions", "--json").json()[1]["status"] == "rolled back"
    assert takedown("-w", ws.root, "certificate", "A", "--out", ws.root.parent / "c").code == 2
    assert takedown("-w", ws.root, "verify", "--deep").code == 0
    assert takedown("-w", ws.root, "rollback", "v1", "--reason", "back again").code == 0


def test_repack_and_purge(takedown: Takedown, ws: Workspace, tmp_path: Path) -> None:
    assert takedown("-w", ws.root, "repack", "--keyframe-every", "1").code == 0
    packed = takedown("-w", ws.root, "repack", "--json")
    assert packed.code == 0 and packed.json()["made_deltas"] == 1
    assert takedown("-w", ws.root, "purge", "--before", "v1").code == 2
    purged = takedown("-w", ws.root, "purge", "--before", "v1", "--reason", "retention")
    assert purged.code == 0 and "Destroyed the weights of v0" in purged.out
    gone = takedown("-w", ws.root, "checkout", "v0", tmp_path / "v0")
    assert gone.code == 2 and "were purged on" in gone.err
    assert takedown("-w", ws.root, "diff", "v0", "v1").code == 2
    assert "purged" in takedown("-w", ws.root, "show", "v0").out
    assert takedown("-w", ws.root, "checkout", "v1", tmp_path / "v1").code == 0
    assert takedown("-w", ws.root, "verify", "--deep").code == 0


def test_a_hold_stops_purges_until_it_is_released(takedown: Takedown, ws: Workspace) -> None:
    held = takedown("-w", ws.root, "hold", "A", "--reason", "court order")
    assert held.code == 0 and "A: verified, on hold" in held.out
    assert takedown("-w", ws.root, "purge", "--before", "v1", "--reason", "x").code == 1
    assert takedown("-w", ws.root, "release", "A", "--reason", "lifted", "--actor", " ").code == 2
    assert takedown("-w", ws.root, "release", "A", "--reason", "lifted").code == 0
    assert takedown("-w", ws.root, "counter", "A", "--reason", "licence", "--json").json()["state"] == "countered"
    assert takedown("-w", ws.root, "withdraw", "A", "--reason", "letter").code == 0
    assert takedown("-w", ws.root, "withdraw", "A", "--reason", "letter").code == 2
    assert "A: withdrawn, excluded since v1" in takedown("-w", ws.root, "show", "A").out, "it is still out"
    row = next(line for line in takedown("-w", ws.root, "status").out.splitlines() if line.split()[:1] == ["A"])
    assert row.split()[-1] == "v1"
    assert takedown("-w", ws.root, "rollback", "v0", "--reason", "withdrawn").code == 1, "B is still out"
    assert takedown("-w", ws.root, "verify").code == 0


def test_no_verb_writes_over_the_workspaces_own_files(takedown: Takedown, ws: Workspace) -> None:
    before = snapshot(ws.root)
    for verb in (["report", "--out", ws.ledger], ["report", "--out", ws.keys / "log.key"],
                 ["export", "--out", ws.vault / "x"], ["certificate", "A", "--out", ws.versions / "c"],
                 ["checkout", "v1", ws.root / "served"]):  # fmt: skip
        answer = takedown("-w", ws.root, *verb)
        assert answer.code == 2 and "lies inside the workspace" in answer.err, verb
    assert snapshot(ws.root) == before


def test_checkpoint_kept_elsewhere_convicts_a_rewritten_history(
    takedown: Takedown, ws: Workspace, published: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    shutil.copyfile(ws.checkpoint, kept)
    assert takedown("-w", ws.root, "verify", "--checkpoint", kept).code == 0
    assert takedown("-w", ws.root, "submit", write_batch(tmp_path, "more", {"M": UNSEEN})).code == 0
    assert takedown("-w", ws.root, "verify", "--checkpoint", kept).code == 0, "it has grown since, nothing else"
    later = tmp_path / "later"
    shutil.copyfile(ws.checkpoint, later)
    found = takedown("-w", published, "verify", "--checkpoint", later)
    assert found.code == 1 and "the ledger has" in found.out and "cut back" in found.out
    assert takedown("-w", ws.root, "verify", "--checkpoint", tmp_path / "absent").code == 2
    assert takedown("-w", ws.root, "verify", "--quick", "--deep").code == 2
    assert takedown("-w", ws.root, "show", "v1", "--tensor", "absent").code == 2


def test_export_writes_four_files(takedown: Takedown, published: Path, tmp_path: Path) -> None:
    answer = takedown("-w", published, "export", "--out", tmp_path / "register")
    assert answer.code == 0 and "3 requests" in answer.out
    names = {p.name for p in (tmp_path / "register").iterdir()}
    assert names == {"requests.csv", "requests.json", "events.csv", "events.json"}
    assert (tmp_path / "register" / "requests.csv").read_bytes().startswith(b"\xef\xbb\xbfrequest_id,")
    rows = json.loads((tmp_path / "register" / "requests.json").read_text())
    assert [row["request_id"] for row in rows] == ["A", "B", "C"]


def test_certificate_checks_without_this_software(takedown: Takedown, published: Path, tmp_path: Path) -> None:
    folder = tmp_path / "certificate"
    assert takedown("-w", published, "certificate", "A", "--out", folder).code == 0
    command = [sys.executable, "-I", str(folder / "verify_bundle.py"), str(folder)]
    checked = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    (folder / "certificate.json").write_text((folder / "certificate.json").read_text().replace('"A"', '"B"'))
    assert subprocess.run(command, capture_output=True, cwd=tmp_path).returncode == 1
    assert takedown("-w", published, "certificate", "Z", "--out", tmp_path / "z").code == 2


# --- check and submit -------------------------------------------------------------------------------------


def test_check_touches_nothing(takedown: Takedown, ws: Workspace, batch: Path) -> None:
    before = snapshot(ws.root)
    answer = takedown("-w", ws.root, "check", batch)
    assert answer.code == 0 and "Batch batch-2: fine" in answer.out and "Work D" in answer.out
    assert takedown("-w", ws.root, "check", batch, "--json").json() == {"batch_id": "batch-2", "requests": ["D", "F"]}
    assert snapshot(ws.root) == before


def test_submit_waits_for_the_next_run(takedown: Takedown, ws: Workspace, batch: Path) -> None:
    answer = takedown("-w", ws.root, "submit", batch, "--json", "--actor", "legal")
    assert answer.code == 0 and answer.json()["requests"] == ["D", "F"]
    status = takedown("-w", ws.root, "status")
    assert "2 to be worked on." in status.out
    received = [e["event"] for e in takedown("-w", ws.root, "log", "--json").json()][-2:]
    assert [(e["kind"], e["actor"], e["request_id"]) for e in received] == [
        ("received", "legal", "D"),
        ("received", "legal", "F"),
    ]
    assert batch.exists()
    # The same batch a second time is a mistake, and says so.
    again = takedown("-w", ws.root, "submit", batch)
    assert again.code == 2 and "was already taken in" in again.err


def test_invalid_batch_lists_every_problem_and_changes_nothing(
    takedown: Takedown, ws: Workspace, tmp_path: Path
) -> None:
    tree = {
        "batch_id": "batch-1",
        "received_at": "yesterday",
        "requests": [
            {"request_id": "A", "title": "\x1b[2Jtitle", "rights_holder": "h", "basis": "copyright", "text": "words"},
            {
                "request_id": "../x",
                "title": "t",
                "rights_holder": "h",
                "basis": "theft",
                "text_file": "../../etc/passwd",
            },
            {"request_id": "G", "title": "t", "rights_holder": "h", "basis": "copyright", "secret canary": 1},
        ],
    }
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(tree))
    before = snapshot(ws.root)
    for verb in ("check", "submit", "run"):
        answer = takedown("-w", ws.root, verb, path)
        assert answer.code == 2 and not answer.out
        for problem in (
            'batch_id: "batch-1" was already taken in', "received_at: is not a date",
            'requests[0].request_id: "A" was already taken in', "requests[0].title: holds a control character",
            "requests[1].request_id: is not a valid id", "requests[1].basis: is not one of the known values",
            "requests[1].text_file: holds", "requests[2]: has a field", "requests[2]: has neither text nor text_file",
        ):  # fmt: skip
            assert problem in answer.err, (verb, problem)
        assert "canary" not in answer.err
    prefect = ws.root / "prefect"
    assert not prefect.exists()
    assert snapshot(ws.root) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[]", "expected an object"),
        (b"\xff\xfe\x00", "is UTF-16"),
        (b'{"batch_id": "x", "received_at": "2026-11-23T09:00:00Z", "requests": []}', "holds no request"),
    ],
)
def test_file_that_is_no_batch(
    takedown: Takedown, ws: Workspace, tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "b.json"
    if content is not None:
        path.write_bytes(content)
    before = snapshot(ws.root)
    for verb in ("check", "submit", "run"):
        answer = takedown("-w", ws.root, verb, path)
        assert answer.code == 2 and message in answer.err
    assert snapshot(ws.root) == before


def test_hostile_names_are_shown_as_they_are(takedown: Takedown, ws: Workspace, tmp_path: Path) -> None:
    path = write_batch(tmp_path, "hostile", {"H": UNSEEN}, title=HOSTILE_TITLE, rights_holder="[link=x]me[/link]")
    checked = takedown("-w", ws.root, "check", path)
    assert "<script>alert(1)</script> [red]loud[/red] :smile:" in checked.out and "[link=x]me[/link]" in checked.out
    assert takedown("-w", ws.root, "submit", path, "--actor", HOSTILE_ACTOR).code == 0
    for verb in (["status"], ["log"], ["show", "H"], ["verify"]):
        answer = takedown("-w", ws.root, *verb)
        assert answer.code == 0 and "\u202e" not in answer.out
    log = takedown("-w", ws.root, "log").out
    assert "\\x1b[31mroot\\x1b[0m\\u202e" in log and "[bold]x" in log
    assert takedown("-w", ws.root, "report", "--out", tmp_path / "r.html").code == 0
    page = (tmp_path / "r.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "{{ 7*7 }}" in page and "&amp;amp;" in page
    assert "\x1b" not in page


def test_escape_in_a_file_name_does_not_reach_the_terminal(takedown: Takedown, ws: Workspace, tmp_path: Path) -> None:
    path = tmp_path / "\x1b[31mevil.json"
    assert "\\x1b[31mevil.json: does not exist" in takedown("-w", ws.root, "check", path).err
    assert takedown("-w", ws.root, "show", "\x1b]0;x\x07").code == 2
    assert takedown("-w", tmp_path / "\x1b[1m", "status").code == 2


# --- wrong use --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "verb",
    [
        ["status"],
        ["log"],
        ["versions"],
        ["verify"],
        ["show", "v0"],
        ["report"],
        ["check", "x"],
        ["run"],
        ["diff", "0", "1"],
        ["first-version", "A"],
        ["export"],
        ["certificate", "A", "--out", "c"],
        ["rollback", "v0", "--reason", "x"],
        ["repack"],
        ["purge", "--before", "v1", "--reason", "x"],
    ],
)
def test_folder_that_is_no_workspace(takedown: Takedown, tmp_path: Path, verb: list[str]) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        answer = takedown("-w", folder, *verb)
        assert answer.code == 2 and "is not a takedown workspace" in answer.err and "takedown init" in answer.err
    assert not list(tmp_path.iterdir())


def test_wrong_words(takedown: Takedown, published: Path, tmp_path: Path) -> None:
    for words in (["bogus"], ["status", "--bogus"], ["show"], ["check"], ["checkout", "v1"], ["init"]):
        answer = takedown("-w", published, *words)
        assert answer.code == 2 and "Error:" in answer.err, words
    for name in ("v7", "v-1", "latest", "v", "²", "TD-9", "v1.0"):
        for verb in (["show", name], ["checkout", name, tmp_path / "out"]):
            answer = takedown("-w", published, *verb)
            assert answer.code == 2 and "no such request or version; there are v0 to v1" in answer.err, verb
    assert not (tmp_path / "out").exists()


def test_checkout_never_writes_into_a_folder_in_use(takedown: Takedown, published: Path, tmp_path: Path) -> None:
    folder = tmp_path / "used"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    answer = takedown("-w", published, "checkout", "v1", folder)
    assert answer.code == 2 and "is not empty" in answer.err
    assert [p.name for p in folder.iterdir()] == ["mine.txt"]
    assert takedown("-w", published, "checkout", "v1", folder / "mine.txt").code == 2
    assert takedown("-w", published, "checkout", "v1", tmp_path / "no" / "such" / "parent").code in (0, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[gate]\nforget_tolerence = 0.1\n", "gate.forget_tolerence"),
        ("[gate]\nforget_tolerance = -1\n[runtime]\nseed = 'x'\n", "gate.forget_tolerance"),
        ("[gate\n", "is not TOML"),
        ("gate = 3\n", "gate"),
        ("[gate]\nforget_tolerance = nan\n", "gate.forget_tolerance"),
    ],
)
def test_mistake_in_the_settings_is_told_before_anything_is_taken_in(
    takedown: Takedown, ws: Workspace, batch: Path, text: str, message: str
) -> None:
    ws.settings_file.write_text(text)
    before = snapshot(ws.root)
    for verb in ("check", "submit", "run"):
        answer = takedown("-w", ws.root, verb, batch)
        assert answer.code == 2 and "takedown.toml" in answer.err and message in answer.err
    if "seed" in text:
        assert "runtime.seed" in answer.err  # all problems at once
    assert snapshot(ws.root) == before
    assert takedown("-w", ws.root, "status").code == 0  # readers need no settings


# --- init -------------------------------------------------------------------------------------------------


def test_init_makes_a_whole_workspace(takedown: Takedown, model: Path, tmp_path: Path) -> None:
    retain = workspaces.write_texts(tmp_path / "retain", workspaces.RETAIN)
    answer = takedown("-w", tmp_path / "new", "init", "--model", model, "--retain", retain)
    assert answer.code == 0 and "v0" in answer.out
    assert takedown("-w", tmp_path / "new", "verify").code == 0
    status = takedown("-w", tmp_path / "new", "status", "--json").json()
    assert {key: value for key, value in status.items() if key != "at"} == {
        "current": 0, "requests": [], "undecided": [], "counts": {}, "queue": [], "oldest_waiting": None,
        "deadlines": [], "postdated": [],
    }  # fmt: skip
    assert (tmp_path / "new" / "vault").stat().st_mode & 0o077 == 0
    # A second init leaves the first as it is.
    before = snapshot(tmp_path / "new")
    again = takedown("-w", tmp_path / "new", "init", "--model", model)
    assert again.code == 2 and "is not empty" in again.err
    assert snapshot(tmp_path / "new") == before


def drop_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def foreign_tokenizer(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["extra-token"])
    tokenizer.save_pretrained(folder)


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def remote_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    (folder / "evil.py").write_text("raise SystemExit('ran')")


def truncated_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_weights, "has no *.safetensors file"),
        (pickle_weights, "holds pickled weights (pytorch_model.bin)"),
        (foreign_tokenizer, "belongs to another model"),
        (no_tokenizer, "has no tokenizer"),
        (remote_code, "which is never run"),
        (truncated_weights, "file not fully covered"),
        (broken_config, "is not JSON"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_init_refuses_a_model_it_cannot_use(
    takedown: Takedown, model: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    source = Path(shutil.copytree(model, tmp_path / "model"))
    damage(source)
    answer = takedown("-w", tmp_path / "new", "init", "--model", source)
    assert answer.code in (1, 2) and message in answer.err
    assert [p.name for p in tmp_path.iterdir()] == ["model"]  # no half-made workspace, hidden or not


def test_init_without_a_model_or_with_useless_texts(takedown: Takedown, model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.txt").write_bytes(b"\xff\xfe")
    answer = takedown(
        "-w", tmp_path / "new", "init", "--model", model, "--retain", tmp_path / "empty", "--kept", tmp_path / "bad",
        "--heldout", tmp_path / "absent",
    )  # fmt: skip
    assert answer.code == 2
    for word in ("--retain", "holds no *.txt file", "x.txt", "cannot be read as UTF-8", "--heldout"):
        assert word in answer.err
    assert not (tmp_path / "new").exists()


# --- damage, locks, processes -----------------------------------------------------------------------------


def test_verify_finds_a_flipped_byte(takedown: Takedown, ws: Workspace, tmp_path: Path) -> None:
    store = VersionStore(ws.versions)
    weights = next(f for f in store.manifest(1).files if f.path == "model.safetensors")
    path = store.objects.paths(weights.digest)[-1]
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    answer = takedown("-w", ws.root, "verify")
    assert answer.code == 1 and "1 break" in answer.out and "v1" in answer.out
    breaks = takedown("-w", ws.root, "verify", "--json")
    assert breaks.code == 1 and breaks.json()
    served = takedown("-w", ws.root, "checkout", "v1", tmp_path / "served")
    assert served.code == 1 and not (tmp_path / "served" / "model.safetensors").exists()
    assert takedown("-w", ws.root, "checkout", "v0", tmp_path / "v0").code == 0
    # A report of damaged evidence can be made, and says so.
    report = takedown("-w", ws.root, "report", "--json")
    assert report.code == 0 and report.json()["breaks"]


def test_verify_finds_a_changed_ledger(takedown: Takedown, ws: Workspace) -> None:
    import sqlite3

    with sqlite3.connect(ws.ledger) as connection:
        connection.execute("DROP TRIGGER entries_no_update")
        connection.execute("UPDATE entries SET event = replace(event, 'not-memorised', 'applied')")
    connection.close()
    assert takedown("-w", ws.root, "verify").code == 1
    for verb in ("status", "log", "versions"):
        answer = takedown("-w", ws.root, verb)
        assert answer.code == 1 and "takedown verify" in answer.err


HOLDER = """
import sys
from pathlib import Path
from pipeline.workspace import open_workspace, writing
with writing(open_workspace(Path(sys.argv[1]))):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(ws: Workspace) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the write lock."""
    command = [sys.executable, "-c", HOLDER, str(ws.root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_second_writer_is_sent_away_and_readers_are_not(
    takedown: Takedown, ws: Workspace, batch: Path, holder: subprocess.Popen[str]
) -> None:
    before = snapshot(ws.root)
    for verb in (["submit", batch], ["run", batch]):
        answer = takedown("-w", ws.root, *verb)
        assert answer.code == 3 and f"by process {holder.pid} on " in answer.err and "Nothing was changed" in answer.err
    for verb in (["status"], ["check", batch], ["verify"]):
        assert takedown("-w", ws.root, *verb).code == 0
    assert snapshot(ws.root) == before
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert takedown("-w", ws.root, "submit", batch).code == 0  # the lock died with its process


def test_lock_is_not_inherited_and_frees_itself(ws: Workspace) -> None:
    with writing(ws):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with writing(ws):
            fd = os.open(ws.root / ".lock", os.O_RDWR)
            with pytest.raises(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.close(fd)
    finally:
        child.kill()
        child.wait()


QUIET = """
import json, sys
from pathlib import Path
from flows import cli
codes = {}
for verb in json.loads(sys.argv[1]):
    sys.argv = ["takedown", *verb]
    try:
        cli.main()
    except SystemExit as stop:
        codes[" ".join(verb[2:3])] = stop.code or 0
heavy = sorted({m.split(".")[0] for m in sys.modules} & {"torch", "transformers", "prefect", "peft", "tokenizers"})
print(json.dumps({"heavy": heavy, "codes": codes}))
"""


def test_reading_checking_and_submitting_import_neither_torch_nor_prefect(
    ws: Workspace, batch: Path, tmp_path: Path
) -> None:
    verbs = (
        ["status"], ["log"], ["versions"], ["show", "v1"], ["verify"], ["report"],
        ["checkout", "v1", str(tmp_path / "s")], ["check", str(batch)], ["submit", str(batch)],
    )  # fmt: skip
    arguments = json.dumps([["-w", str(ws.root), *verb] for verb in verbs])
    done = subprocess.run([sys.executable, "-c", QUIET, arguments], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["heavy"] == []
    assert found["codes"] == dict.fromkeys((v[0] for v in verbs), 0)


def test_every_verb_of_every_module_is_offered(takedown: Takedown) -> None:
    for name, verbs in cli.MODULES.items():
        assert set(get_group(import_module(f"flows.{name}").verbs).commands) == set(verbs), name
    shown = takedown("--help").out
    assert all(f"  {verb} " in shown for verb in cli.MODULE_OF)


def test_a_wrong_verb_is_told_with_what_resembles_it(takedown: Takedown) -> None:
    answer = takedown("statsu")
    assert answer.code == 2 and "Did you mean 'status'?" in answer.err


def test_reading_verb_starts_quickly(published: Path) -> None:
    def used(*code: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", *code], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    plain = used("import cryptography.hazmat.primitives.asymmetric.ed25519, numpy, pydantic, rich.console, typer")
    # Processor time against what the libraries take anyway, 3.7 times measured: machines differ, and may be shared.
    # torch alone takes ten times as much.
    assert used("from flows.cli import main; main()", "-w", str(published), "status") < 6 * plain


def test_interrupt_says_that_nothing_is_lost(
    takedown: Takedown, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal, "read_entries", interrupted)
    answer = takedown("-w", published, "status")
    assert answer.code == 3 and "Nothing acknowledged is lost" in answer.err


# --- what a killed process leaves -------------------------------------------------------------------------


def test_run_of_the_same_batch_resumes(ws: Workspace, batch: Path, tmp_path: Path) -> None:
    assert submit_or_resume(ws, batch, "legal") == ["D", "F"]
    assert submit_or_resume(ws, batch, "legal") == ["D", "F"]
    answered = write_batch(tmp_path, "batch-1", {"A": WORKS["one"]})
    assert submit_or_resume(ws, answered, "legal") == []  # answered long ago: nothing of it waits
    with Ledger.open(ws.ledger, read_only=True) as ledger:
        states = request_states(ledger.entries())
    assert (states["D"].state, states["A"].state) == ("waiting", "verified")


@pytest.mark.slow
def test_the_installed_command_runs_a_step(ws: Workspace, batch: Path, tmp_path: Path) -> None:
    """One process as a user starts it, with the Prefect it embeds; some 25 s, nearly all of it Prefect's start."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT")} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from flows.cli import main; main()", "-w", str(ws.root), "run", str(batch)]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["outcome"], answer["version"]) == ("published", 2)
    assert [r["request_id"] for r in answer["step"]["screen"]["requests"]] == ["D", "F"]
    assert "Traceback" not in done.stderr
    # Prefect keeps its database inside the workspace; no sentence of a work got there, or anywhere but the vault.
    assert list((ws.root / "prefect").glob("*.db*"))
    sentences = [s.strip() for text in (WORKS["two"], UNSEEN) for s in text.split(".") if s.strip()]
    assert workspaces.leaks(sentences, ws.root, done.stdout.encode() + done.stderr.encode()) == []
