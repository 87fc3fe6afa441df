"""`takedown doctor`: each check by itself, sound and failing, and the whole as somebody on call meets it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from histories import array_model, entries_of, prepare_step, publish, start_history
from workspaces import draw_text, take_in

from flows import cli, doctoring
from pipeline import doctor
from pipeline.doctor import Finding
from pipeline.dropfolder import take_inbox
from pipeline.estimate import StageNeed, StepNeed
from pipeline.preflight import Estimate
from pipeline.records import Event
from pipeline.resources import Room
from pipeline.states import AWAITING
from pipeline.workspace import Workspace, writing


def now() -> datetime:
    """Of the call: the workspace is made later than this module is imported."""
    return datetime.now(UTC)


GB = 10**9


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace at v0, only to be copied."""
    folder = tmp_path_factory.mktemp("original")
    return start_history(folder / "ws", array_model(folder / "model")).root


@pytest.fixture
def ws(tmp_path: Path, original: Path) -> Workspace:
    shutil.copytree(original, tmp_path / "ws")
    return Workspace(tmp_path / "ws")


def only(findings: list[Finding]) -> Finding:
    (found,) = findings
    assert (found.remedy == "") == (found.status == "ok")
    return found


# --- software ---------------------------------------------------------------------------------------------


def test_python() -> None:
    assert only(doctor.check_python()).status == "ok"
    old = only(doctor.check_python((3, 10, 9)))
    assert (old.status, old.found) == ("problem", "3.10.9")


NEEDED = ["alpha>=2.1,<3", 'beta>=1; extra == "dev"', "gamma"]


def test_packages() -> None:
    has = {"alpha": "2.10.0", "gamma": "0.1"}
    found = only(doctor.check_packages(lambda name: NEEDED, has.__getitem__))
    assert (found.status, found.found) == ("ok", "alpha 2.10.0, gamma 0.1")
    assert [f.status for f in doctor.check_packages()] == ["ok"], "what these tests run with"


@pytest.mark.parametrize(("has", "told"), [("3.0", "3.0, needed is <3,>=2.1"), (None, "missing, needed is <3,>=2.1")])
def test_a_package_out_of_range_or_missing(has: str | None, told: str) -> None:
    def version(name: str) -> str:
        if has is None:
            raise metadata.PackageNotFoundError
        return has

    bad, rest = doctor.check_packages(lambda name: NEEDED[:1], version)
    assert (bad.status, bad.what, bad.found) == ("problem", "package alpha", told)
    assert bad.remedy == "pip install 'alpha<3,>=2.1'" and rest.found == ""


def test_packages_of_a_product_that_is_not_installed() -> None:
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    assert only(doctor.check_packages(requires)).status == "warning"


# --- the workspace ----------------------------------------------------------------------------------------


def test_settings(ws: Workspace) -> None:
    assert only(doctor.check_settings(ws)).status == "ok"
    ws.settings_file.write_text("[runtime]\nseeed = 1\n")
    found = only(doctor.check_settings(ws))
    assert found.status == "problem" and "runtime.seeed" in found.found


@pytest.mark.parametrize("place", ["vault", "vault/key", "keys/log.key", "keys/model.key", "keys/vault.key"])
def test_permissions(ws: Workspace, place: str) -> None:
    assert only(doctor.check_permissions(ws)).status == "ok"
    (ws.root / place).chmod(0o750)
    found = only(doctor.check_permissions(ws))
    assert (found.status, found.what) == ("problem", "permissions")
    assert found.found == f"{ws.root / place}: is open to others (mode 0750, 050 too much)"
    assert found.remedy == f"chmod {'0700' if place == 'vault' else '0600'} {ws.root / place}"


def test_a_key_elsewhere_is_looked_at(ws: Workspace, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.key").write_text("0" * 64)
    (tmp_path / "elsewhere.key").chmod(0o644)
    ws.settings_file.write_text(f'[vault]\nkey_file = "{tmp_path / "elsewhere.key"}"\n')
    assert str(tmp_path / "elsewhere.key") in only(doctor.check_permissions(ws)).found


def test_another_owner(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: ws.root.stat().st_uid + 1)
    assert {f.status for f in doctor.check_permissions(ws)} == {"warning"}


@pytest.mark.parametrize(("name", "whose"), [("log.key", "log"), ("model.key", "models"), ("vault.key", "vault")])
def test_a_key_that_is_missing_or_another(ws: Workspace, name: str, whose: str) -> None:
    take_in(ws, "batch", {"A": draw_text("A", 30)})
    assert only(doctor.check_keys(ws)).found == "the log's, the models', the vault's serve"
    (ws.keys / name).unlink()
    found = only(doctor.check_keys(ws))
    assert found.status == "problem" and found.found.startswith(f"the {whose}") and name in found.found
    if name == "vault.key":
        (ws.keys / name).write_text("0" * 64 + "\n")
        (ws.keys / name).chmod(0o600)
        assert "needs the master key" in only(doctor.check_keys(ws)).found


def test_file_system(ws: Workspace) -> None:
    before = sorted(p.name for p in ws.root.iterdir())
    assert only(doctor.check_file_system(ws.root)).status == "ok"
    assert sorted(p.name for p in ws.root.iterdir()) == before, "nothing of the trial stays"


def _refuse(*args: object, **kwargs: object) -> Any:
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")


@pytest.mark.parametrize(
    ("module", "call", "instead", "what"),
    [
        (os, "fsync", _refuse, "durable writes"),
        (os, "link", lambda old, new: Path(old).replace(new), "names are never taken over"),
        (os, "replace", lambda old, new: None, "files are replaced whole"),
        (fcntl, "flock", lambda fd, how: None, "locks"),
        (fcntl, "flock", _refuse, "locks"),
    ],
)
def test_a_file_system_that_lacks_something(
    ws: Workspace, monkeypatch: pytest.MonkeyPatch, module: Any, call: str, instead: Any, what: str
) -> None:
    before = sorted(p.name for p in ws.root.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(module, call, instead)
        findings = doctor.check_file_system(ws.root)
    assert f"file system: {what}" in [f.what for f in findings]
    assert {f.status for f in findings} == {"problem"} and all(f.remedy for f in findings)
    assert sorted(p.name for p in ws.root.iterdir()) == before


def test_a_workspace_that_cannot_be_written(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.mkdtemp", _refuse)
    assert only(doctor.check_file_system(ws.root)).status == "problem"


def test_evidence(ws: Workspace) -> None:
    assert only(doctor.check_evidence(ws)).status == "ok"
    (ws.versions / "000000.json").unlink()
    findings = doctor.check_evidence(ws)
    assert {f.status for f in findings} == {"problem"} and "v0" in " ".join(f.found + f.what for f in findings)


def test_lock(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(doctor.check_lock(ws, now())).found == "free, as far as is seen from here"
    with writing(ws):
        held = only(doctor.check_lock(ws, datetime.now(UTC)))
        assert held.status == "ok" and f"process {os.getpid()} on" in held.found
        late = only(doctor.check_lock(ws, datetime.now(UTC) + timedelta(hours=30)))
        assert late.status == "warning" and late.found.startswith("held for 30 hours by process")
        assert (ws.root / ".lock").stat().st_size > 0
    free = only(doctor.check_lock(ws, now())).found
    assert free == "free, as far as is seen from here", "what a dead process noted is no lock"
    monkeypatch.setattr(doctor, "lock_holder", lambda path: None)
    assert only(doctor.check_lock(ws, now())).found.startswith("unknown")


def test_runs(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(doctor.check_runs(ws, entries_of(ws), now())).found == "none is stuck; 0 requests wait"
    run_id = prepare_step(ws, ["A"])
    stuck = only(doctor.check_runs(ws, entries_of(ws), now()))
    assert stuck.status == "warning" and stuck.found.startswith(f"{run_id}: was begun and not ended")
    assert ", last heard of at 20" in stuck.found
    with writing(ws):
        assert only(doctor.check_runs(ws, entries_of(ws), now())).status == "ok", "somebody may be at work on it"
    monkeypatch.setattr(doctor, "lock_holder", lambda path: None)
    unknown = only(doctor.check_runs(ws, entries_of(ws), now()))
    assert "not ended; this system does not say whether somebody works on it" in unknown.found
    publish(ws, run_id)
    assert only(doctor.check_runs(ws, entries_of(ws), now())).status == "ok"


def test_a_run_that_nobody_decides_on(ws: Workspace) -> None:
    from pipeline.ledger import Ledger

    run_id = prepare_step(ws, ["A"])
    with writing(ws), Ledger.open(ws.ledger) as ledger:
        ledger.append(Event(kind=AWAITING, actor="t", run_id=run_id, version=0))
    assert only(doctor.check_runs(ws, entries_of(ws), now())).status == "ok"
    late = only(doctor.check_runs(ws, entries_of(ws), now() + timedelta(days=8)))
    assert late.status == "warning" and late.found.startswith(f"{run_id}: waits for approval since")


def test_a_run_that_was_approved_or_overtaken_waits_for_nobody(ws: Workspace) -> None:
    from pipeline.ledger import Ledger

    run_id, later = prepare_step(ws, ["A"]), now() + timedelta(days=8)
    with writing(ws), Ledger.open(ws.ledger) as ledger:
        ledger.append(Event(kind=AWAITING, actor="t", run_id=run_id, version=0))
        ledger.append(Event(kind="approved", actor="t", run_id=run_id, version=0))
    stopped = only(doctor.check_runs(ws, entries_of(ws), later))
    assert stopped.found == f"{run_id}: was approved and is not published"
    with writing(ws), Ledger.open(ws.ledger) as ledger:
        ledger.append(Event(kind="hold", actor="t", request_id="A"))
    assert only(doctor.check_runs(ws, entries_of(ws), later)).status == "ok", "review lists it no more"


def test_inbox(ws: Workspace) -> None:
    assert only(doctor.check_inbox(ws)).status == "ok"
    (ws.inbox / "bad.json").write_text("{")
    with writing(ws):
        take_inbox(ws, "tester", sleep=lambda seconds: None)
    found = only(doctor.check_inbox(ws))
    assert (found.status, found.found) == ("warning", "1 set aside: bad.json")


def test_clock(ws: Workspace) -> None:
    assert only(doctor.check_clock(entries_of(ws), now())).status == "ok"
    behind = only(doctor.check_clock(entries_of(ws), now() - timedelta(days=2)))
    assert behind.status == "problem" and "but the ledger's last event is of" in behind.found


def test_a_check_that_fails_is_a_finding() -> None:
    def fail() -> list[Finding]:
        raise OSError(errno.EIO, "Input/output error", "/disk")

    assert only(doctor.examined("inbox", fail)).found == "/disk: Input/output error"


# --- room -------------------------------------------------------------------------------------------------


def test_device() -> None:
    from pipeline.settings import Settings

    def on(name: str) -> Finding:
        return only(doctor.check_device(Settings.model_validate({"runtime": {"device": name}})))

    assert on("cpu").found == "cpu"
    assert on("auto").status == "ok"
    assert on("cuda:99").status == "problem"


def room(memory: int | None, disk: int | None) -> Estimate:
    need = StepNeed(stages=(StageNeed(stage="unlearn", memory_bytes=3 * GB),), disk_bytes=2 * GB)
    return Estimate(version=0, need=need, memory_bytes=memory, memory_source="memory.max", disk_bytes=disk, seconds={},
                    runs=0)  # fmt: skip


@pytest.mark.parametrize(
    ("memory", "disk", "told"),
    [
        (5 * GB, 5 * GB, ["5.0 GB left (memory.max); unlearn needs 4.0 GB", "5.0 GB free; the next step needs 2.0 GB"]),
        (None, None, ["unknown; unlearn needs 4.0 GB", "unknown; the next step needs 2.0 GB"]),
    ],
)
def test_room_that_suffices_or_is_unknown(memory: int | None, disk: int | None, told: list[str]) -> None:
    findings = doctor.check_room(room(memory, disk), GB)
    assert [f.found for f in findings] == told and {f.status for f in findings} == {"ok"}


def test_room_that_does_not_suffice() -> None:
    memory, disk = doctor.check_room(room(4 * GB - 1, GB), GB)
    assert memory.found == "unlearn needs about 4.0 GB, 4.0 GB are left" and memory.what == "memory (memory.max)"
    assert disk.found == "a run and its version need up to 2.0 GB, 1.0 GB are free"
    assert memory.status == disk.status == "problem" and memory.remedy and disk.remedy


def test_places() -> None:
    fine, little, unknown = doctor.check_places(
        {"a": Room(5 * GB, "/a"), "b": Room(10**6, "/b"), "c": Room(None, "/c")}
    )
    assert (fine.status, little.status, unknown.status) == ("ok", "warning", "ok")
    assert little.found == "1 MB free at /b" and unknown.found == "unknown"


# --- Prefect ----------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[str]:
    """What answers as Prefect's server does."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"/api/health": True, "/api/admin/version": "3.9.0"}[self.path]).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{made.server_port}/api"
        made.shutdown()
        thread.join()


def test_prefect(server: str) -> None:
    assert "embeds its own" in only(doctoring.check_prefect({"PREFECT_API_URL": ""})).found
    found = only(doctoring.check_prefect({"PREFECT_API_URL": server}))
    assert found.status == "ok" and found.found == f"answers at {server}, version 3.9.0"
    named = {"PREFECT_API_URL": "http://user:secret@127.0.0.1:9/api", "takedown serve": "http://127.0.0.1:9/api"}
    configured, served = doctoring.check_prefect(named)
    assert (configured.status, served.status) == ("problem", "warning")
    assert "secret" not in configured.found


def test_what_is_no_prefect_server_is_a_finding() -> None:
    """A port that is none, and a service that speaks something else."""
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"SSH-2.0-other\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        address = f"http://127.0.0.1:{other.getsockname()[1]}/api"
        assert "does not answer" in only(doctoring.check_prefect({"PREFECT_API_URL": address})).found
        thread.join()
    assert only(doctoring.check_prefect({"PREFECT_API_URL": "http://127.0.0.1:port/api"})).status == "problem"


def test_flow_runs_that_died(ws: Workspace) -> None:
    assert only(doctoring.check_flows(ws)).status == "ok"
    alive = ws.root / "prefect" / "alive"
    alive.mkdir(parents=True)
    fd = os.open(alive / "living", os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    assert only(doctoring.check_flows(ws)).status == "ok"
    (alive / "dead").touch()
    assert only(doctoring.check_flows(ws)).found == "1 flow runs died without a word: dead"
    os.close(fd)


# --- the whole --------------------------------------------------------------------------------------------


def call(*arguments: str) -> int:
    sys.argv[:] = ["takedown", *arguments]
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def everything(root: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_the_command(ws: Workspace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    ws.settings_file.write_text('[runtime]\ndevice = "cpu"\n')
    before = everything(ws.root)
    assert call("-w", str(ws.root), "doctor", "--json") == 0
    found = json.loads(capfd.readouterr().out)
    assert found["sound"] and {f["status"] for f in found["findings"]} <= {"ok", "warning"}
    assert {
        "Python",
        "packages",
        "permissions",
        "keys",
        "file system",
        "evidence",
        "write lock",
        "runs",
        "inbox",
        "clock",
        "device",
        "memory",
        "disk",
        "Prefect",
        "flow runs",
    } <= {f["what"] for f in found["findings"]}
    assert [s["stage"] for s in found["estimate"]["need"]["stages"]][-1] == "publish"
    assert found["estimate"]["seconds"] == {} and found["estimate"]["runs"] == 0, "a time is never invented"
    assert everything(ws.root) == before, "read-only"
    assert call("-w", str(ws.root), "doctor") == 0
    shown = capfd.readouterr().out
    assert "Estimate for a step from v0" in shown and "no run is recorded" in shown and "unknown" in shown


def test_the_command_exits_with_1_on_a_problem(
    ws: Workspace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    ws.settings_file.write_text('[runtime]\ndevice = "cpu"\n')
    (ws.keys / "vault.key").chmod(0o644)
    assert call("-w", str(ws.root), "doctor") == 1
    captured = capfd.readouterr()
    assert re.search(r"problem +permissions", captured.out) and "there are problems" in captured.err
    # With a ledger that cannot be read everything else is still looked at.
    ws.ledger.write_bytes(b"no database at all")
    assert call("-w", str(ws.root), "doctor", "--json") == 1
    found = {f["what"]: f["status"] for f in json.loads(capfd.readouterr().out)["findings"]}
    assert found["permissions"] == found["clock"] == found["estimate"] == "problem"
    assert found["file system"] == "ok"


def test_settings_that_cannot_be_read_are_one_finding(
    ws: Workspace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    ws.settings_file.write_text("[runtime]\ndevice = 7\n")
    assert call("-w", str(ws.root), "doctor", "--json") == 1
    found = {f["what"]: f for f in json.loads(capfd.readouterr().out)["findings"] if f["status"] == "problem"}
    assert found.keys() == {"settings"} and found["settings"]["remedy"] == "Correct takedown.toml."
    ws.settings_file.unlink()
    ws.settings_file.mkdir()
    assert call("-w", str(ws.root), "doctor", "--json") == 1
    found = {f["what"]: f["status"] for f in json.loads(capfd.readouterr().out)["findings"]}
    assert found["settings"] == "problem" and found["flow runs"] == "ok", "everything else is looked at"
