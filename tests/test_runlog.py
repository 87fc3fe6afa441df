"""The log of a run: what is in it, where it lies and stays, and that it never costs a run anything."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from histories import array_model, entries_of, make_step, prepare_step, publish, start_history
from workspaces import take_in

from flows import cli
from pipeline import patience
from pipeline.answers import publish as answer
from pipeline.erase import erase
from pipeline.errors import InvalidInput
from pipeline.files import append_line
from pipeline.history import lineage_view
from pipeline.patience import writing_in_turn
from pipeline.records import Verdict
from pipeline.report import render
from pipeline.requests import note
from pipeline.runlog import LOGGER, archive, log_file, read_events, recorded_times, report, watched
from pipeline.runs import open_run
from pipeline.states import request_states
from pipeline.workspace import Workspace, writing


@pytest.fixture
def ws(tmp_path: Path) -> Workspace:
    return start_history(tmp_path / "ws", array_model(tmp_path / "model"))


def events(ws: Workspace, run_id: str) -> list[dict[str, Any]]:
    path = log_file(ws, run_id)
    assert path is not None
    return [json.loads(line) for line in path.read_text().splitlines()]


def words(ws: Workspace, run_id: str) -> list[str]:
    return [" ".join(filter(None, (e["event"], e.get("stage")))) for e in events(ws, run_id)]


def test_a_step_from_begin_to_end(ws: Workspace) -> None:
    run_id = prepare_step(ws, ["A"])
    publish(ws, run_id)
    assert words(ws, run_id) == ["run-begun", "stage-begun publish", "stage-ended publish", "run-ended"]
    begun, _, took, ended = events(ws, run_id)
    assert begun["requests"] == ["A"] and begun["actor"] == "tester" and begun["run"] == run_id
    assert took["seconds"] >= 0 and took["pid"] == os.getpid()
    assert (ended["outcome"], ended["version"]) == ("published", 1)
    assert ended["root"].startswith("root-sha256:")
    assert {e["level"] for e in events(ws, run_id)} == {"info"}


def test_a_run_that_goes_on_says_so_and_what_is_finished_is_a_detail(ws: Workspace) -> None:
    run_id = prepare_step(ws, ["A"])
    assert prepare_step(ws, ["A"], submit=False) == run_id
    assert words(ws, run_id) == ["run-begun", "run-resumed"]
    run = open_run(ws.root, run_id)
    made = run.stage("new", Verdict, (), lambda: Verdict(accepted=True, reasons=()))
    assert run.stage("new", Verdict, (), lambda: pytest.fail("computed twice")) == made
    assert words(ws, run_id)[2:] == ["stage-begun new", "stage-ended new"]
    ws.settings_file.write_text('[logging]\nlevel = "debug"\n')
    run.stage("new", Verdict, (), lambda: pytest.fail("computed twice"))
    (run.folder / "screened").mkdir()
    run.stage("screened/A", Verdict, (), lambda: made)
    assert words(ws, run_id)[4:] == ["stage-kept new", "stage-begun screened/A", "stage-ended screened/A"]


def test_the_gates_reasons_are_told(ws: Workspace) -> None:
    run_id = prepare_step(ws, ["A"], accepted=False)
    publish(ws, run_id)
    ended = events(ws, run_id)[-1]
    assert (ended["outcome"], ended["version"], ended["reasons"]) == ("refused", None, ["A (this): too high."])


def test_what_a_person_wrote_is_not(ws: Workspace) -> None:
    run_id = prepare_step(ws, ["A"])
    with writing(ws):
        answer(str(ws.root), run_id, "counsel", refusal="a reason in somebody's words")
    assert events(ws, run_id)[-1]["reasons"] == ["refused by a person"]


def test_an_exception_is_told_by_type_and_place_only(ws: Workspace) -> None:
    run = open_run(ws.root, prepare_step(ws, ["A"]))

    def fail() -> Verdict:
        raise ZeroDivisionError("a message that may quote")

    with pytest.raises(ZeroDivisionError), watched(ws, run.run_id):
        run.stage("new", Verdict, (), fail)
    failed, stopped = events(ws, run.run_id)[-2:]
    assert (failed["event"], failed["stage"], failed["level"]) == ("stage-failed", "new", "error")
    for told in (failed, stopped):
        assert told["type"] == "ZeroDivisionError" and told["where"].startswith("test_runlog.py:")
    assert stopped["event"] == "run-stopped"
    path = log_file(ws, run.run_id)
    assert path is not None and "quote" not in path.read_text()


def test_a_log_outlives_the_folder_of_its_run(ws: Workspace) -> None:
    first = prepare_step(ws, ["A"])
    assert log_file(ws, first) == ws.runs / first / "log.jsonl"
    publish(ws, first)
    assert log_file(ws, first) == archive(ws) / f"{first}.jsonl"
    assert not (ws.runs / first / "log.jsonl").exists()
    before = words(ws, first)
    make_step(ws, "B")  # its begin removes what is decided
    assert not (ws.runs / first).exists()
    assert words(ws, first) == before == ["run-begun", "stage-begun publish", "stage-ended publish", "run-ended"]


def test_an_erased_texts_run_keeps_its_log(ws: Workspace) -> None:
    run_id = prepare_step(ws, ["A"])
    note(ws, "withdrawn", "A", "tester", "by letter")
    erase(ws, "A", "tester", "by order")
    assert not (ws.runs / run_id).exists()
    assert words(ws, run_id) == ["run-begun"]


def test_the_report_says_where_a_log_lies(ws: Workspace) -> None:
    run_id = prepare_step(ws, ["A"])
    publish(ws, run_id)
    view = lineage_view(ws, None)
    assert view.steps[0].log == f"reports/logs/{run_id}.jsonl"
    assert f"reports/logs/{run_id}.jsonl" in render(view)
    (archive(ws) / f"{run_id}.jsonl").unlink()
    assert lineage_view(ws, None).steps[0].log is None


def test_show_says_where_a_log_lies(
    ws: Workspace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def shown(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["takedown", "-w", str(ws.root), "show", run_id, *options])
        with suppress(SystemExit):
            cli.main()
        return capfd.readouterr().out

    run_id = prepare_step(ws, ["A"])
    publish(ws, run_id)
    told = shown()
    path = archive(ws) / f"{run_id}.jsonl"
    assert f"log: {path}" in told and "published  v1  by tester" in told
    assert told.splitlines()[-2].startswith("  publish ")
    found = json.loads(shown("--json"))
    assert found["log"] == str(path) and found["seconds"].keys() == {"publish"}
    path.unlink()
    assert "log: none is kept" in shown()


@pytest.mark.parametrize("place", ["ops/takedown.log", "stderr"])
def test_level_and_destination_are_settings(ws: Workspace, place: str, capfd: pytest.CaptureFixture[str]) -> None:
    ws.settings_file.write_text(f'[logging]\nlevel = "warning"\ndestination = "{place}"\n')
    run_id = prepare_step(ws, ["A"])
    report(ws, run_id, "hot", logging.WARNING, degrees=40)
    assert log_file(ws, run_id) is None
    text = capfd.readouterr().err if place == "stderr" else (ws.root / place).read_text()
    (line,) = text.splitlines()
    assert json.loads(line).items() >= {"event": "hot", "degrees": 40, "level": "warning", "run": run_id}.items()


@pytest.mark.parametrize("place", ["", "checkpoint", "ledger.db", "keys/log.key", "reports"])
def test_evidence_is_no_place_for_a_log(ws: Workspace, place: str) -> None:
    ws.settings_file.write_text(f'[logging]\ndestination = "{place}"\n')
    with pytest.raises(InvalidInput, match=r'logging\.destination: is not "run", "stderr" or a file'):
        ws.settings()


def test_level_and_destination_do_not_make_another_run(ws: Workspace) -> None:
    run_id = prepare_step(ws, ["A"])
    ws.settings_file.write_text('[logging]\nlevel = "error"\ndestination = "stderr"\n')
    assert prepare_step(ws, ["A"], submit=False) == run_id


def test_other_handlers_get_the_same_lines(ws: Workspace) -> None:
    got: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: got.append(record.getMessage())  # type: ignore[method-assign]
    LOGGER.addHandler(handler)
    try:
        run_id = prepare_step(ws, ["A"])
    finally:
        LOGGER.removeHandler(handler)
    assert [json.loads(line) for line in got] == events(ws, run_id)


def test_who_waited_for_the_lock_is_in_the_log_of_the_workspace(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "POLL_S", 0.01)
    held, free = threading.Event(), threading.Event()

    def hold() -> None:
        with writing(ws):
            held.set()
            free.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(30)
    monkeypatch.setattr(patience, "tell", lambda *told: free.set())  # told that it waits: time to let go
    with writing_in_turn(ws, 30):
        pass
    thread.join()
    busy, waited = read_events(archive(ws) / "workspace.jsonl")
    assert busy["event"] == "lock-busy" and f"process {os.getpid()} on" in str(busy["reason"])
    assert waited["event"] == "lock-waited" and waited["urgent"] is False


@pytest.mark.parametrize("code", [28, 30])
def test_a_log_that_cannot_be_written_stops_nothing(ws: Workspace, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr("pipeline.runlog.append_line", full)
    first = prepare_step(ws, ["A"])
    publish(ws, first)
    make_step(ws, "B")
    assert log_file(ws, first) is None
    assert {s.state for s in request_states(entries_of(ws)).values()} == {"verified"}


def test_a_settings_file_that_cannot_be_read_is_told_by_others(ws: Workspace) -> None:
    run_id = prepare_step(ws, ["A"])
    ws.settings_file.write_text("[logging")
    report(ws, run_id, "still-logged")
    assert words(ws, run_id)[-1] == "still-logged"


def test_a_link_in_the_place_of_a_log_is_not_followed(ws: Workspace, tmp_path: Path) -> None:
    run_id = prepare_step(ws, ["A"])
    (tmp_path / "elsewhere").write_text("")
    (ws.runs / run_id / "log.jsonl").unlink()
    (ws.runs / run_id / "log.jsonl").symlink_to(tmp_path / "elsewhere")
    report(ws, run_id, "followed")
    assert (tmp_path / "elsewhere").read_text() == ""


def test_times_are_learned_from_recorded_runs_only(ws: Workspace) -> None:
    assert recorded_times(ws) == ({}, 0)
    take_in(ws, "batch", {"A": "one two three four five"})
    for number, seconds in enumerate((10.0, 30.0, 20.0)):
        archive(ws).mkdir(exist_ok=True)
        for stage, took in (("unlearn", seconds), ("screening", seconds), ("screening", 5.0), ("screened/A", 1.0)):
            line = {"event": "stage-ended", "stage": stage, "seconds": took}
            append_line(archive(ws) / f"run-{number}.jsonl", json.dumps(line).encode() + b"\n")
    append_line(archive(ws) / "run-0.jsonl", b'[1]\n{"event": "stage-ended", "stage": "merge", "sec')  # killed here
    assert recorded_times(ws) == ({"screening": 20.0, "unlearn": 20.0}, 3)
    for event, seconds in (("stage-begun", {}), ("stage-begun", {}), ("stage-ended", {"seconds": 0.1})):  # killed once
        line = {"event": event, "stage": "unlearn", **seconds}
        append_line(archive(ws) / "run-3.jsonl", json.dumps(line).encode() + b"\n")
    assert recorded_times(ws) == ({"screening": 20.0, "unlearn": 20.0}, 3)
