"""The flow in Prefect: that it does what the stages do, shows it, and keeps every text to itself.

One embedded server for the whole file, started by the first test (20 to 40 s); Prefect is imported in fixtures only,
so that other tests do not pay for it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import workspaces
from prefects import Prefect, latest_run
from workspaces import UNSEEN, WORKS, copied, near_copy, new_workspace, take_in, write_batch

from pipeline.ledger import Ledger
from pipeline.records import Publication
from pipeline.runs import open_run
from pipeline.states import current_version, request_states
from pipeline.verify import verify
from pipeline.versions import VersionStore
from pipeline.workspace import Workspace, writing

if TYPE_CHECKING:
    from prefect.client.schemas.objects import Artifact

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

TASKS = [
    "plan", "reference", "dedupe", "screen_some", "screen_some", "screen", "saliency", "unlearn", "repair", "merge",
    "evaluate", "gate", "ask_for_approval", "publish", "leave_artifacts",
]  # fmt: skip


@pytest.fixture
def fresh(tmp_path: Path, model: Path) -> Workspace:
    """A workspace at v0."""
    return new_workspace(tmp_path / "fresh", model)


@pytest.fixture
def ws(tmp_path: Path, model: Path) -> Workspace:
    """A copy of a workspace with v1."""
    return copied(workspaces.published(model.parent), tmp_path / "ws")


def artifacts() -> list[Artifact]:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return client.read_artifacts()


def entries(workspace: Workspace) -> Any:
    with Ledger.open(workspace.ledger, read_only=True) as ledger:
        return ledger.entries()


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
    assert run.parameters == {
        "workspace": str(fresh.root), "requests": None, "actor": "nightly", "urgent": False,
    }  # fmt: skip
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
    assert names == [
        "plan", "reference", "dedupe", "screen_some", "screen", "ask_for_approval", "publish", "leave_artifacts",
    ]  # fmt: skip


def test_unknown_request_and_busy_workspace_fail_the_flow(prefect: Prefect, ws: Workspace) -> None:
    state = prefect.flow(str(ws.root), ["nobody"], return_state=True)
    assert state.is_failed() and "Not taken in: nobody" in str(state.message)
    with writing(ws):
        state = prefect.flow(str(ws.root), return_state=True)
    assert state.is_failed() and "is being written to by" in str(state.message)
    assert prefect.flow(str(ws.root)) is None


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
    assert run(ws, batch)[:2] == (0, "Every request of this batch is answered, or on hold; see takedown status.\n")
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
        "plan_reinstatement", "reference", "leave_out", "dedupe", "screen", "merge", "evaluate", "gate",
        "ask_for_approval", "publish", "leave_artifacts",
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
