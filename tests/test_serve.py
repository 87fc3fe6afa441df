"""`takedown serve` as a process: a schedule that fires, an urgent run beside it, an end without orphans.

Every test starts a Prefect server of its own, which takes 15 to 60 s; nothing is asserted about time.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import workspaces
from receivers import Receiver, receiving
from workspaces import copied, draw_text, with_settings, write_batch

from flows.environment import address_file, prefect_home, served_at, server_answers
from pipeline.ledger import Ledger
from pipeline.states import request_states
from pipeline.verify import verify
from pipeline.workspace import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

MAIN = [sys.executable, "-c", "from flows.cli import main; main()"]
LONGEST_S = 800
FAR = {"cron": "0 0 1 1 *"}


def answered(request: urllib.request.Request) -> Any:
    """The server's answer; where its database is busy, it says 503 and is asked again, as Prefect's own client does."""
    for _ in range(20):
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code != 503:
                raise
            time.sleep(1)
    raise AssertionError(f"{request.full_url}: the server's database stayed busy")


class Served:
    """A running `takedown serve`."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.log = workspace.root.with_name(f"serve-{len(list(workspace.root.parent.glob('serve-*')))}.log")
        home = str(workspace.root.with_name("home"))  # not the one of whoever runs the tests
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT")}
        self.environment = environment | {"OMP_NUM_THREADS": "1", "HOME": home, "PYTHONUNBUFFERED": "1"}
        with self.log.open("wb") as stream:
            self.process = subprocess.Popen(
                [*MAIN, "-w", str(workspace.root), "serve"], stdout=stream, stderr=stream, env=self.environment
            )
        self.until(lambda: "Ctrl-C stops it." in self.log.read_text())
        self.api_url = served_at(workspace.root)
        self.server = int(json.loads(address_file(workspace.root).read_bytes())["pid"])

    def until(self, there: Callable[[], bool]) -> None:
        """Wait until something is there, as long as the process lives."""
        end = time.monotonic() + LONGEST_S
        while not there():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.5)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{self.api_url}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return answered(request)

    def get(self, path: str) -> Any:
        return answered(urllib.request.Request(f"{self.api_url}/{path}"))

    def runs(self, deployment: str) -> list[dict[str, Any]]:
        """All runs of a deployment."""
        return list(self.post("flow_runs/filter", {"deployments": {"name": {"any_": [deployment]}}}))

    def ended(self, deployment: str) -> list[tuple[str, str]]:
        """Type and name of the final states of a deployment's runs."""
        final = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
        return [(r["state_type"], r["state_name"]) for r in self.runs(deployment) if r["state_type"] in final]

    def ask(self, deployment: str, parameters: dict[str, Any], key: str, at: str | None = None) -> str:
        """Ask for a run, as `prefect deployment run` and the form do; returns its id."""
        found = self.get(f"deployments/name/{deployment}")
        body: dict[str, Any] = {"parameters": parameters, "idempotency_key": key, "enforce_parameter_schema": True}
        if at is not None:
            body["state"] = {"type": "SCHEDULED", "state_details": {"scheduled_time": at}}
        return str(self.post(f"deployments/{found['id']}/create_flow_run", body)["id"])


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture
def ws(tmp_path: Path, model: Path) -> Workspace:
    """A copy of a workspace with v1, that serves on a free port and audits only when asked to."""
    workspace = copied(workspaces.published(model.parent), tmp_path / "ws")
    configure(workspace)
    return workspace


def configure(workspace: Workspace, **serve: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    table = {"port": port, "time_zone": "Europe/Berlin", "scheduled": FAR, "audit": FAR} | serve
    rows = [
        f"{key} = {{{', '.join(f'{k} = {json.dumps(v)}' for k, v in value.items())}}}" if isinstance(value, dict)
        else f"{key} = {json.dumps(value)}"
        for key, value in table.items()
    ]  # fmt: skip
    workspace.settings_file.write_text("\n".join([workspaces.toml(with_settings()), "[serve]", *rows, ""]))


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as found:
        yield found


@pytest.fixture
def serve() -> Iterator[Callable[[Workspace], Served]]:
    started: list[Served] = []

    def start(workspace: Workspace) -> Served:
        started.append(Served(workspace))
        return started[-1]

    yield start
    for served in started:
        served.process.kill()
        served.process.wait()


def states(workspace: Workspace) -> dict[str, str]:
    with Ledger.open(workspace.ledger, read_only=True) as ledger:
        return {name: s.state for name, s in request_states(ledger.entries()).items()}


def test_schedule_fires_and_doors_work_beside_it(
    ws: Workspace, serve: Callable[[Workspace], Served], receiver: Receiver
) -> None:
    configure(ws, scheduled={"every_s": 60.0}, webhook=receiver.url)
    write_batch(ws.inbox, "first", {"Q": draw_text("never", 60)})
    (ws.inbox / "bad.json").write_text("{")
    served = serve(ws)
    said = served.log.read_text()
    assert f"Serving at {served.api_url.removesuffix('/api')}" in said
    assert "scheduled/takedown-scheduled         next 20" in said and " CE" in said
    served.until(lambda: ("FAILED", "SetAside") in served.ended("takedown-scheduled"))
    assert states(ws)["Q"] == "not-memorised"
    assert (ws.inbox / "rejected" / "bad.json.reason.txt").is_file()

    # The form of an urgent request: what it asks for, and that it cannot name another folder.
    schema = served.get("deployments/name/ad-hoc/takedown-ad-hoc")["parameter_openapi_schema"]
    assert schema["properties"]["workspace"]["readOnly"] is True
    assert {"batch", "requests", "actor"} <= schema["definitions"]["Urgent"]["properties"].keys()

    # The same request asked for twice is one run, and one answer.
    write_batch(ws.inbox, "urgent", {"U": draw_text("other", 60)})
    once, again = (served.ask("ad-hoc/takedown-ad-hoc", {"urgent": {"batch": "urgent"}}, "U") for _ in range(2))
    assert once == again
    served.ask("ad-hoc/takedown-ad-hoc", {"urgent": {"requests": ["nobody"]}}, "N")
    served.ask("audit/audit-scheduled", {}, "A")
    served.until(lambda: len(served.ended("takedown-ad-hoc")) == 2 and len(served.ended("audit-scheduled")) == 1)
    assert states(ws)["U"] == "not-memorised"
    # Whichever came first, the schedule or the urgent run, answered it; the other found nothing to do.
    assert {name for _, name in served.ended("takedown-ad-hoc")} <= {"Answered", "NothingWaits", "Failed"}
    assert ("FAILED", "Failed") in served.ended("takedown-ad-hoc")  # nobody
    assert served.ended("audit-scheduled") == [("COMPLETED", "Sound")]
    # The runs that somebody must look at told so, each once, from processes of their own.
    assert sorted((told["flow"], told["state"]) for told in receiver.told()) == [
        ("ad-hoc", "Failed"), ("scheduled", "SetAside"),
    ]  # fmt: skip
    (path,) = ws.reports.glob("audit-*.json")
    report = json.loads(path.read_text())
    assert report["breaks"] == [] and {r["request_id"] for r in report["rechecked"]} == {"A", "B"}
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(LONGEST_S) == 0
    assert gone(served.server) and not address_file(ws.root).exists()
    assert verify(ws) == []


def test_killed_server_is_no_obstacle_and_a_killed_run_is_told(
    ws: Workspace, serve: Callable[[Workspace], Served]
) -> None:
    served = serve(ws)
    second = subprocess.run(
        [*MAIN, "-w", str(ws.root), "serve"], capture_output=True, text=True, env=served.environment, check=False
    )
    assert second.returncode == 3 and "is served already" in second.stderr
    before = {
        name: served.get(f"deployments/name/{name}")
        for name in ("scheduled/takedown-scheduled", "audit/audit-scheduled")
    }
    # A run that has no process: as Prefect remembers it when everything was killed at once.
    run_id = served.ask("scheduled/takedown-scheduled", {}, "killed", at="2100-01-01T00:00:00Z")
    served.post(f"flow_runs/{run_id}/set_state", {"state": {"type": "RUNNING", "name": "Running"}, "force": True})
    alive = prefect_home(ws.root) / "alive"
    alive.mkdir(exist_ok=True)
    (alive / run_id).touch()
    served.process.kill()
    served.process.wait()
    end = time.monotonic() + LONGEST_S
    while not gone(served.server):
        assert time.monotonic() < end
        time.sleep(0.2)
    assert not server_answers(served.api_url)

    again = serve(ws)
    assert "1 runs had died" in again.log.read_text()
    found = again.get(f"flow_runs/{run_id}")
    assert found["state_type"] == "CRASHED" and "takedown log" in found["state"]["message"]
    assert list(alive.iterdir()) == []
    for name, known in before.items():
        now = again.get(f"deployments/name/{name}")
        assert [s["schedule"] for s in now["schedules"]] == [s["schedule"] for s in known["schedules"]]
        assert (now["id"], now["paused"], now["parameters"]) == (known["id"], False, known["parameters"])
    again.process.send_signal(signal.SIGTERM)
    assert again.process.wait(LONGEST_S) == 0
    assert gone(again.server)
