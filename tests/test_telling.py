"""Who is told of runs that end badly: real POSTs to a receiver on this machine, from runs in a real Prefect."""

from __future__ import annotations

import json
import logging
import re
import socket
import time
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from histories import array_model, start_history
from prefects import Prefect
from receivers import Receiver, receiving
from workspaces import draw_text, leaks, write_batch

from flows.telling import left_behind
from pipeline.dropfolder import Delivery, Rejected
from pipeline.errors import InvalidInput, Problem
from pipeline.records import Publication
from pipeline.settings import Settings, read_settings
from pipeline.submit import submit
from pipeline.workspace import Workspace, writing

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

PAGE = (Path(__file__).resolve().parent.parent / "flows" / "README.md").read_text()
TEXT, TITLE, CONTACT = draw_text("confidential", 40), "The Title of a Work", "someone@example.org"
CLOCK = "[deadlines.clocks.answer]\nstates = ['waiting']\nwithin = '36 hours'\n"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as found:
        yield found


# --- settings and documentation ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    ["https://chat.example/hooks/T0/B0", "http://127.0.0.1:9000/x", "http://localhost/x", "http://[::1]:9000/x"],
)
def test_addresses_that_are_private_on_the_way(url: str) -> None:
    assert Settings.model_validate({"serve": {"webhook": url}}).serve.webhook == url
    assert "hooks" not in repr(Settings.model_validate({"serve": {"webhook": url}}))


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://chat.example/s3cret", "webhook_in_clear = true"),
        ("http://127.0.0.1.chat.example/s3cret", "webhook_in_clear = true"),
        ("http://user:s3cret@127.0.0.1/", "is no address"),
        ("file:///etc/s3cret", "is no address"),
        ("ftp://chat.example/s3cret", "is no address"),
        ("https://", "is no address"),
        ("https://chat.example:99999/s3cret", "is no address"),
        ("https://chat.example/s3 cret", "is no address"),
        ("https://chat.example/s3cret\\r\\nX: y", "is no address"),
        ("s3cret", "is no address"),
    ],
)
def test_other_addresses_are_refused_and_not_repeated(tmp_path: Path, url: str, told: str) -> None:
    path = tmp_path / "takedown.toml"
    path.write_text(f'[serve]\nport = 0\nwebhook = "{url}"\n')
    with pytest.raises(InvalidInput) as error:
        read_settings(path)
    assert told in str(error.value) and "serve.port" in str(error.value) and "cret" not in str(error.value)


def test_plain_http_to_another_machine_is_a_setting() -> None:
    tree = {"serve": {"webhook": "http://chat.example/x", "webhook_in_clear": True}}
    assert Settings.model_validate(tree).serve.webhook == "http://chat.example/x"


def test_the_settings_of_the_operations_page_are_settings() -> None:
    blocks = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    found = [Settings.model_validate(tomllib.loads(block)) for block in blocks]
    assert {"answer", "privacy", "counter-notice", "hold"} in [set(s.deadlines.clocks) for s in found]
    assert any(s.serve.webhook for s in found)


def test_the_automation_of_the_operations_page_fires_on_every_bad_end() -> None:
    """By Prefect's own schema, and by its server's own way to match events."""
    from prefect.events.schemas.automations import AutomationCore
    from prefect.server.events.schemas.automations import EventTrigger
    from prefect.server.events.schemas.events import ReceivedEvent

    block, tree = automation("01234567-89ab-4def-8123-456789abcdef")
    made = AutomationCore.model_validate(tree)
    assert {action.type for action in made.actions} == {"call-webhook", "send-notification"}
    assert "message" not in block, "that of an exception may quote anything"
    trigger = EventTrigger.model_validate(tree["trigger"])

    def covered(name: str, kind: str, flow_tag: str = "takedown") -> bool:
        event = ReceivedEvent.model_validate({
            "occurred": "2026-03-02T09:00:00Z", "event": f"prefect.flow-run.{name}", "id": "0" * 32,
            "resource": {"prefect.resource.id": "prefect.flow-run.1", "prefect.state-type": kind},
            "related": [{"prefect.resource.id": f"prefect.tag.{flow_tag}", "prefect.resource.role": "tag"}],
        })  # fmt: skip
        return trigger.covers(event) and trigger.expects(event.event)

    bad = ("Refused", "SetAside", "Breaks", "Overdue", "Failed")
    assert all(covered(name, "FAILED") for name in bad) and covered("Crashed", "CRASHED")
    assert not covered("Published", "COMPLETED") and not covered("Failed", "FAILED", "others")


def automation(block_id: str) -> tuple[str, dict[str, Any]]:
    """The automation of the operations page for a block, as text and read."""
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    return text, yaml.safe_load(text.replace("BLOCK_ID", block_id))


# --- one POST ---------------------------------------------------------------------------------------------


def test_a_message_is_posted_once_and_what_goes_wrong_is_said_without_the_address(receiver: Receiver) -> None:
    from flows.telling import post

    assert post(receiver.url, {"text": "x"}) is None
    assert receiver.got == [("/hooks/s3cret", b'{"text": "x"}')]
    for answer, words in ((500, "500"), (404, "404"), (302, "sends on"), (307, "sends on")):
        receiver.got.clear()
        receiver.answer = answer
        failure = post(receiver.url, {"text": "x"})
        assert failure is not None and words in failure and failure.startswith("127.0.0.1: ")
        assert "s3cret" not in failure and len(receiver.got) == 1, "a redirect is not followed"


def test_a_receiver_that_never_answers_holds_nobody_up(receiver: Receiver) -> None:
    from flows.telling import post

    receiver.answer = None
    failure = post(receiver.url, {"text": "x"}, longest_s=0.3)
    assert failure is not None and ("within 0.3 s" in failure or "timed out" in failure)


def test_a_receiver_that_is_not_there_is_told() -> None:
    from flows.telling import post

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    failure = post(f"http://127.0.0.1:{port}/s3cret", {})
    assert failure is not None and "refused" in failure and "s3cret" not in failure


# --- runs -------------------------------------------------------------------------------------------------


@pytest.fixture
def ws(tmp_path: Path, receiver: Receiver) -> Workspace:
    """TD-1 waits since 2020; nothing of it can be worked on, for there is no language model."""
    workspace = start_history(tmp_path / "ws", array_model(tmp_path / "model"))
    path = write_batch(tmp_path, "b", {"TD-1": TEXT}, title=TITLE, contact=CONTACT)
    tree = json.loads(path.read_bytes()) | {"received_at": "2020-01-06T09:00:00Z"}
    path.write_text(json.dumps(tree))
    submit(workspace, path, "tester")
    path.unlink()
    workspace.settings_file.write_text(f"[serve]\nwebhook = '{receiver.url}'\n{CLOCK}")
    return workspace


def confidential(ws: Workspace, receiver: Receiver) -> list[str]:
    """What of the request was sent, or stands outside the vault."""
    return leaks([TITLE, CONTACT, "A. Holder", TEXT.split(".")[0]], ws.root, *(body for _, body in receiver.got))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_audit_that_finds_a_deadline_passed_tells_once(prefect: Prefect, ws: Workspace, receiver: Receiver) -> None:
    from flows.doors import audit

    state: State[Any] = audit(str(ws.root), return_state=True)
    assert (state.type.value, state.name) == ("FAILED", "Overdue")
    assert str(state.message).startswith("Everything holds; ")
    assert " 1 deadline overdue: TD-1 (answer). See " in str(state.message)
    (told,) = receiver.told()
    assert told.pop("flow_run")
    assert told == {
        "text": "takedown, ws: audit ended as Overdue (1 deadline).", "workspace": "ws", "flow": "audit",
        "state": "Overdue", "run": None, "overdue_count": 1,
        "overdue": [{"request": "TD-1", "clock": "answer", "due": "2020-01-07T21:00:00+00:00"}],
    }  # fmt: skip
    (path,) = ws.reports.glob("audit-*.json")
    (late,) = json.loads(path.read_bytes())["overdue"]
    assert (late["request_id"], late["clock"]) == ("TD-1", "answer")
    assert confidential(ws, receiver) == []
    ws.settings_file.write_text(f"[serve]\nwebhook = '{receiver.url}'\n")
    assert audit(str(ws.root), return_state=True).name == "Sound"
    assert len(receiver.got) == 1, "of what is well nobody is told"


def test_the_run_that_a_dead_process_left_is_named_only_where_that_is_certain(ws: Workspace) -> None:
    begun = datetime(2026, 11, 30, 9, tzinfo=UTC)
    folder = ws.runs / "run-0123456789ab"
    assert left_behind(ws, begun) is None
    folder.mkdir()
    (folder / "plan.json").write_text("{}")
    assert left_behind(ws, begun) is None, "nothing is heard of it"
    (folder / "log.jsonl").write_text('{"at":"2026-11-30T09:00:01+00:00","event":"stage-begun"}\n')
    assert left_behind(ws, begun) == folder.name
    assert left_behind(ws, begun + timedelta(seconds=2)) is None, "what was last heard of it was before"
    assert left_behind(ws, None) is None
    with writing(ws):
        assert left_behind(ws, begun) is None, "somebody works on it"
    other = ws.runs / "run-ba9876543210"
    other.mkdir()
    (other / "plan.json").write_text("{}")
    assert left_behind(ws, begun) is None, "one of two"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_whose_process_died_with_everything_else_is_told_when_it_is_noticed(
    prefect: Prefect, ws: Workspace, receiver: Receiver
) -> None:
    from prefect.client.orchestration import get_client
    from prefect.states import Running

    from flows.doors import audit
    from flows.environment import prefect_home
    from flows.liveness import reconcile

    with get_client(sync_client=True) as client:
        run = client.create_flow_run(audit, parameters={"workspace": str(ws.root)})
        client.set_flow_run_state(run.id, Running(), force=True)
    path = prefect_home(ws.root) / "alive" / str(run.id)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    assert reconcile(ws.root) == 1
    (told,) = receiver.told()
    assert (told["flow"], told["flow_run"], told["state"]) == ("audit", str(run.id), "Crashed")
    assert reconcile(ws.root) == 0 and len(receiver.got) == 1
    assert confidential(ws, receiver) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_runs_that_are_refused_or_fail_tell_once_and_only_ids(
    prefect: Prefect, ws: Workspace, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step itself needs a language model, and is replaced by what it ends with."""
    from flows import doors

    def failing(*args: object) -> Publication:
        raise RuntimeError(f"{TITLE}: {TEXT} {CONTACT}")

    refused = Publication(outcome="refused", run_id="run-0123456789ab")
    rejected = Delivery(rejected=(Rejected(f"{CONTACT}.json", (Problem(CONTACT, TITLE, TEXT),)),))
    for step, delivery, name, run in (
        (lambda *args: refused, None, "Refused", "run-0123456789ab"),
        (lambda *args: None, rejected, "SetAside", None),
        (failing, None, "Failed", None),
    ):
        receiver.got.clear()
        monkeypatch.setattr(doors, "run_step", step)
        monkeypatch.setattr(doors, "take_in", lambda *args, found=delivery: found or Delivery())
        state = doors.scheduled(str(ws.root), return_state=True)
        assert (state.type.value, state.name) == ("FAILED", name)
        (told,) = receiver.told()
        assert (told["flow"], told["state"], told["run"]) == ("scheduled", name, run)
        assert (told["overdue"], told["overdue_count"]) == ([], 0)
        assert confidential(ws, receiver) == []
    monkeypatch.setattr(doors, "run_step", lambda *args: None)
    receiver.got.clear()
    assert doors.scheduled(str(ws.root), return_state=True).name == "NothingWaits" and receiver.got == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_automation_of_the_operations_page_tells_once_of_a_refused_run(
    prefect: Prefect, ws: Workspace, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the server alone: the workspace has no webhook."""
    from prefect import tags
    from prefect.automations import Automation
    from prefect.blocks.webhook import Webhook

    from flows import doors

    block = Webhook(method="POST", url=receiver.url, allow_private_urls=True)
    tree = automation(str(block.save("receiver", _sync=True)))[1]
    tree["actions"] = [action for action in tree["actions"] if action["type"] == "call-webhook"]
    made = Automation.model_validate(tree).create(_sync=True)
    monkeypatch.setattr(doors, "take_in", lambda *args: Delivery())
    ws.settings_file.write_text("")
    with tags("takedown"):
        for outcome in ("nothing", "refused", "nothing"):
            publication = Publication(outcome=outcome, run_id="run-0123456789ab")
            monkeypatch.setattr(doors, "run_step", lambda *args, found=publication: found)
            state = doors.scheduled(str(ws.root), return_state=True)
            if outcome == "refused":
                run_id = state.state_details.flow_run_id
    end = time.monotonic() + 120
    while not receiver.got and time.monotonic() < end:
        time.sleep(0.2)
    assert receiver.told() == [{"text": f"scheduled ended as Refused: {run_id}"}]
    made.delete(_sync=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_ends_as_it_would_where_nobody_can_be_told(
    prefect: Prefect,
    ws: Workspace,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from flows import doors

    monkeypatch.setattr(doors, "run_step", lambda *args: Publication(outcome="refused", run_id="run-0123456789ab"))
    monkeypatch.setattr(doors, "take_in", lambda *args: Delivery())
    receiver.answer = 500
    with caplog.at_level(logging.ERROR, "prefect.flow_runs"):
        assert doors.scheduled(str(ws.root), return_state=True).name == "Refused"
        assert "Nobody was told by the webhook: 127.0.0.1: HTTP Error 500" in caplog.text
        ws.settings_file.write_text("[serve]\nwebhook = 'gopher://s3cret'\n")
        assert doors.audit(str(ws.root), return_state=True).name == "Failed"
    assert "Nobody was told by the webhook: " in caplog.text and "serve.webhook" in caplog.text
    assert "s3cret" not in caplog.text and len(receiver.got) == 1
