"""The flow in Prefect: that it does what the stages do, shows it, and keeps every text to itself.

One embedded server for the whole file, started by the first test (20 to 40 s); Prefect is imported in fixtures only,
so that other tests do not pay for it.
"""

from __future__ import annotations

import json
import os
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import workspaces
from workspaces import UNSEEN, WORKS, copied, near_copy, new_workspace, take_in, write_batch

from pipeline.ledger import Ledger
from pipeline.records import Publication
from pipeline.runs import Run, open_run
from pipeline.states import current_version, request_states
from pipeline.verify import verify
from pipeline.versions import VersionStore
from pipeline.workspace import Workspace, writing

if TYPE_CHECKING:
    from prefect.client.schemas.objects import Artifact, FlowRun

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CANARY = "Quorvantish zemblefrot quiddled the hyxomorphic brandelwick"
CONTACT = "wexlaphant.canary@nowhere.invalid, +44 20 7946 0958, 12 Mumblethrop Row"
SECRETS = [CANARY, CONTACT, *CANARY.split()[:2], "hyxomorphic", "wexlaphant", "7946 0958", "Mumblethrop"]
TASKS = [
    "plan", "reference", "dedupe", "screen", "saliency", "unlearn", "repair", "merge", "evaluate", "gate", "publish",
    "leave_artifacts",
]  # fmt: skip


class Prefect(NamedTuple):
    """The running Prefect: the flow, and where it writes."""

    flow: Any
    home: Path
    database: Path


@pytest.fixture(scope="session")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    """A server with a database of its own, logging as much as it can."""
    home = tmp_path_factory.mktemp("prefect")
    environment = dict(os.environ)
    os.environ.update(
        PREFECT_HOME=str(home),
        PREFECT_SERVER_ANALYTICS_ENABLED="false",
        DO_NOT_TRACK="1",
        PREFECT_LOGGING_LEVEL="DEBUG",
        PREFECT_SERVER_LOGGING_LEVEL="DEBUG",
        PREFECT_LOGGING_TO_API_ENABLED="true",
    )
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, get_current_settings, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    from flows.takedown import takedown

    with (
        prefect_test_harness(server_startup_timeout=180),
        temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
    ):
        url = get_current_settings().server.database.connection_url
        assert url is not None
        yield Prefect(takedown, home, Path(url.get_secret_value().split("///", 1)[1]))
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def fresh(tmp_path: Path, model: Path) -> Workspace:
    """A workspace at v0."""
    return new_workspace(tmp_path / "fresh", model)


@pytest.fixture
def ws(tmp_path: Path, model: Path) -> Workspace:
    """A copy of a workspace with v1."""
    return copied(workspaces.published(model.parent), tmp_path / "ws")


def latest_run(last: str) -> tuple[FlowRun, list[tuple[str, str | None]]]:
    """The newest flow run, with names and states of its task runs, oldest first.

    Prefect writes task runs down behind the flow's back: waits until the task named ``last`` is there, and finished.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
    from prefect.client.schemas.sorting import FlowRunSort

    until = time.monotonic() + 30
    while True:
        with get_client(sync_client=True) as client:
            (run,) = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)
            tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])))
        tasks.sort(key=lambda t: str(t.start_time))
        # A name that was given is followed by the start of an id.
        found = [(t.name.rsplit("-", 1)[0], t.state_name) for t in tasks]
        finished = all(t.state is not None and t.state.is_final() for t in tasks)
        if (finished and found and found[-1][0] == last) or time.monotonic() > until:
            return run, found
        time.sleep(0.1)


def artifacts() -> list[Artifact]:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return client.read_artifacts()


def entries(workspace: Workspace) -> Any:
    with Ledger.open(workspace.ledger, read_only=True) as ledger:
        return ledger.entries()


def stored_by_prefect(prefect: Prefect) -> list[Path | bytes]:
    """Everything that Prefect has written: its home, and its database with the log behind it."""
    from prefect.logging.handlers import APILogHandler

    APILogHandler().flush()
    with closing(sqlite3.connect(prefect.database, timeout=30)) as connection:
        connection.execute("PRAGMA wal_checkpoint(FULL)")
    database = prefect.database.read_bytes()
    wal = prefect.database.with_name(prefect.database.name + "-wal")
    assert len(database) > 100_000
    return [prefect.home, database, wal.read_bytes() if wal.exists() else b""]


def told(publication: Publication) -> tuple[str, int | None]:
    """Outcome and version; the run's id differs between workspaces."""
    assert publication.run_id.startswith("run-")
    return publication.outcome, publication.version


# --- the flow ---------------------------------------------------------------------------------------------


def test_flow_publishes_what_the_stages_compute(prefect: Prefect, fresh: Workspace, model: Path) -> None:
    take_in(fresh, "batch", {"A": WORKS["one"], "B": near_copy(WORKS["one"]), "C": UNSEEN})
    assert told(prefect.flow(str(fresh.root), None, "nightly")) == ("published", 1)
    assert verify(fresh) == []
    published = [e.event for e in entries(fresh) if e.event.kind == "published"]
    assert [(e.actor, e.version) for e in published] == [("nightly", 1)]
    # The same step without Prefect, in another workspace, gave the same bytes.
    folders = (fresh.root, workspaces.published(model.parent))
    roots = [VersionStore(folder / "versions").manifest(1).root for folder in folders]
    assert roots[0] == roots[1]

    run, tasks = latest_run("leave_artifacts")
    assert run.state_name == "Completed"
    # Nothing but a folder, ids and the actor is a parameter.
    assert run.parameters == {"workspace": str(fresh.root), "requests": None, "actor": "nightly"}
    assert tasks == [(name, "Completed") for name in TASKS]

    run_id = published[0].run_id
    found = {a.key: a for a in artifacts() if a.key and a.key.startswith(run_id)}
    assert {(key, a.type) for key, a in found.items()} == {(run_id, "markdown"), (f"{run_id}-scores", "table")}
    assert "outcome: **published**" in str(found[run_id].data) and "version: v1" in str(found[run_id].data)
    rows = json.loads(str(found[f"{run_id}-scores"].data))
    assert {"text", "role", "EM before", "EM after"} <= rows[0].keys()
    assert {r["text"] for r in rows if r["role"] == "this"} == {"A"}


def test_nothing_waits(prefect: Prefect, ws: Workspace) -> None:
    before = len(entries(ws))
    assert prefect.flow(str(ws.root)) is None
    assert len(entries(ws)) == before
    assert latest_run("plan")[1] == [("plan", "Completed")]


def test_never_seen_batch_skips_the_training(prefect: Prefect, ws: Workspace) -> None:
    take_in(ws, "batch-2", {"X": workspaces.draw_text("never", 60)})
    assert told(prefect.flow(str(ws.root))) == ("nothing", None)
    names = [name for name, _ in latest_run("leave_artifacts")[1]]
    assert names == ["plan", "reference", "dedupe", "screen", "publish", "leave_artifacts"]


def test_unknown_request_and_busy_workspace_fail_the_flow(prefect: Prefect, ws: Workspace) -> None:
    state = prefect.flow(str(ws.root), ["nobody"], return_state=True)
    assert state.is_failed() and "Not waiting: nobody" in str(state.message)
    with writing(ws):
        state = prefect.flow(str(ws.root), return_state=True)
    assert state.is_failed() and "is being written to by" in str(state.message)
    assert prefect.flow(str(ws.root)) is None


# --- failures, and what they must not show ----------------------------------------------------------------


STAGE_NAMES = ["dedupe", "screen", "saliency", "unlearn", "repair", "merge", "evaluate", "gate"]


def test_canary_stays_in_the_vault_whatever_stage_fails(
    prefect: Prefect, fresh: Workspace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # The canary stands in the middle of a work that the model recites, so that it passes through every stage.
    words = WORKS["one"].split()
    text = " ".join([*words[:60], CANARY + ".", *words[60:]])
    take_in(fresh, "batch", {"A": text, "C": f"{UNSEEN} {CANARY}."}, contact=CONTACT)
    assert any(CANARY.encode() in p.read_bytes() for p in fresh.vault.iterdir())
    output = b""
    plain = Run.stage

    def looked_for() -> list[str]:
        nonlocal output
        captured = capfd.readouterr()
        output += captured.out.encode() + captured.err.encode()
        return workspaces.leaks(SECRETS, fresh.root, output, *stored_by_prefect(prefect))

    def failing_in(stage: str) -> Callable[..., Any]:
        def run_stage(self: Run, name: str, record: Any, inputs: Any, compute: Callable[[], Any]) -> Any:
            def broken() -> Any:
                found = compute()  # fails with everything computed, and nothing written
                if name == stage:
                    raise RuntimeError(f"{name} broke")
                return found

            return plain(self, name, record, inputs, broken)

        return run_stage

    for failing in STAGE_NAMES:
        with monkeypatch.context() as patch:
            patch.setattr(Run, "stage", failing_in(failing))
            state = prefect.flow(str(fresh.root), return_state=True)
        assert state.is_failed() and f"{failing} broke" in str(state.message)
        with writing(fresh):  # the lock is free again
            pass
        run, tasks = latest_run(failing)
        assert run.state_name == "Failed"
        assert tasks[-1] == (failing, "Failed")
        assert looked_for() == [], failing
    # The search does reach what Prefect stores: the harmless message is found.
    assert workspaces.leaks([f"{STAGE_NAMES[0]} broke"], fresh.root, *stored_by_prefect(prefect))

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "append", full)
        assert prefect.flow(str(fresh.root), return_state=True).is_failed()
    assert looked_for() == [], "publish"
    assert {s.state for s in request_states(entries(fresh)).values()} == {"waiting"}

    # The next run takes up what is finished, and completes.
    computed: list[str] = []

    def noting(self: Run, name: str, record: Any, inputs: Any, compute: Callable[[], Any]) -> Any:
        return plain(self, name, record, inputs, lambda: computed.append(name) or compute())

    with monkeypatch.context() as patch:
        patch.setattr(Run, "stage", noting)
        assert told(prefect.flow(str(fresh.root))) == ("published", 1)
    assert computed == []
    assert latest_run("leave_artifacts")[0].state_name == "Completed"
    assert [e.event.kind for e in entries(fresh)].count("published") == 1
    assert verify(fresh) == []
    assert looked_for() == [], "success"


def test_error_deep_inside_does_not_carry_a_text_to_prefect(
    prefect: Prefect, fresh: Workspace, capfd: pytest.CaptureFixture[str]
) -> None:
    """Damaged vault records: their parsers' exceptions would quote what they parsed."""
    take_in(fresh, "batch", {"A": f"{WORKS['one']} {CANARY}."}, contact=CONTACT)
    (path,) = fresh.vault.glob("*.json")
    good = path.read_bytes()
    for bad in (good[:-40], good.replace(b'"basis"', b'"bases"'), good.replace(b"copyright", b"copywrong")):
        path.write_bytes(bad)
        state = prefect.flow(str(fresh.root), return_state=True)
        assert state.is_failed() and "is not what was written there" in str(state.message)
        captured = capfd.readouterr()
        output = captured.out.encode() + captured.err.encode()
        assert workspaces.leaks(SECRETS, fresh.root, output, *stored_by_prefect(prefect)) == []


# --- the command ------------------------------------------------------------------------------------------


@pytest.fixture
def takedown(
    prefect: Prefect, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """``takedown -w WORKSPACE VERB …`` in this process, on the server that is running."""
    from flows import cli

    def call(workspace: Workspace, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["takedown", "-w", str(workspace.root), *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capfd.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def run(takedown: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str, str]]:
    """``takedown -w WORKSPACE run …``."""
    return lambda workspace, *arguments: takedown(workspace, "run", *arguments)


def test_run_command_answers_and_exits_by_the_outcome(
    run: Callable[..., tuple[int, str, str]], ws: Workspace, tmp_path: Path
) -> None:
    code, out, _ = run(ws)
    assert (code, out) == (0, "Nothing waits.\n")
    assert json.loads(run(ws, "--json")[1]) == {"outcome": "idle"}

    # Never seen: answered, no version.
    code, out, _ = run(ws, write_batch(tmp_path, "unseen", {"X": workspaces.draw_text("never", 60)}))
    assert code == 0 and "not-memorised" in out and "No new version was needed; v1 stays current." in out

    # Refused: exit 1, the requests wait, the reason is told.
    settings = workspaces.with_settings(gate={"kept_share": 1.0})
    ws.settings_file.write_text(workspaces.toml(settings))
    batch = write_batch(tmp_path, "second", {"D": WORKS["two"], "E": WORKS["one"]}, title="[red]<b>\N{BELL}")
    code, out, _ = run(ws, batch)
    assert code == 1 and "Refused: Kept works" in out and "v1 stays current" in out
    assert current_version(entries(ws)) == 1
    code, out, _ = run(ws, batch, "--json")  # the same command again: the same answer, nothing taken in twice
    assert code == 1 and json.loads(out)["outcome"] == "refused"

    # The same command continues once the limits are met.
    ws.settings_file.write_text(workspaces.toml(workspaces.SETTINGS))
    code, out, _ = run(ws, batch, "--json", "--actor", "legal")
    answer = json.loads(out)
    assert code == 0 and (answer["outcome"], answer["version"]) == ("published", 2)
    assert answer["run"] == answer["step"]["run_id"]
    states = {n: (s.state, s.version) for n, s in request_states(entries(ws)).items()}
    assert states["D"] == ("verified", 2) and states["E"][0] == "repeat"
    assert run(ws, batch)[:2] == (0, "Every request of this batch is answered; see takedown status.\n")
    assert verify(ws) == []

    # What lies in the inbox is taken in and worked on.
    write_batch(ws.inbox, "third", {"G": workspaces.draw_text("never", 70)})
    code, out, _ = run(ws)
    assert code == 0 and "G" in out and "v2 stays current" in out
    assert not list(ws.inbox.iterdir())
    assert open_run(ws.root, [e.event.run_id for e in entries(ws)][-1]).plan.parent == 2


def test_reinstate_command_makes_a_version_and_exits_by_the_outcome(
    takedown: Callable[..., tuple[int, str, str]], ws: Workspace
) -> None:
    why = ("--reason", "licence shown")
    code, _, err = takedown(ws, "reinstate", "A", "Z", *why)
    assert code == 2 and "A: is verified" in err and "'Z': no such request" in err
    assert takedown(ws, "reinstate", "A")[0] == 2, "a reason is needed"
    for name in ("A", "B", "C"):
        assert takedown(ws, "withdraw" if name == "C" else "counter", name, *why)[0] == 0

    code, _, err = takedown(ws, "reinstate", "A", *why)
    assert code == 2 and "A: its text is out for B, too" in err

    ws.settings_file.write_text(
        workspaces.toml(workspaces.with_settings(gate={"perplexity_rise": 0.0, "kept_share": 1.0}))
    )
    code, out, _ = takedown(ws, "reinstate", "A", "B", *why, "--actor", "legal")
    assert code == 0 and "Left out: what v1 changed." in out and "Published v2" in out
    assert "A reinstated in v2" in out
    store = VersionStore(ws.versions)
    assert store.manifest(2).root == store.manifest(0).root
    run, tasks = latest_run("leave_artifacts")
    assert run.state_name == "Completed"
    assert [name for name, _ in tasks] == [
        "plan_reinstatement", "reference", "leave_out", "dedupe", "screen", "merge", "evaluate", "gate", "publish",
        "leave_artifacts",
    ]  # fmt: skip
    code, out, _ = takedown(ws, "show", "v2")
    assert "puts back: A, B, leaving out what v1 changed" in out
    code, out, _ = takedown(ws, "reinstate", "C", *why)
    assert code == 0 and "C: on record as reinstated. v2 was not made without it" in out
    code, out, _ = takedown(ws, "rollback", "v1", "--reason", "trial", "--override")
    assert code == 0 and "It does not hold what was put back for A, B" in out
    code, out, _ = takedown(ws, "rollback", "v2", "--reason", "back")
    assert code == 0 and "It puts back again: A, B." in out
    shown = json.loads(takedown(ws, "status", "--json")[1])["requests"]
    assert {s["request_id"]: s["reinstated_in"] for s in shown} == {"A": 2, "B": 2, "C": None}
    assert verify(ws) == []
