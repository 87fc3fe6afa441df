"""The audit holds no lock: it measures what the version that it restored excludes, whatever is published meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest
from histories import array_model, make_step, start_history

from flows import doors
from pipeline.recheck import Rechecked, restore_current, to_recheck
from pipeline.records import Break
from pipeline.workspace import Workspace


@pytest.fixture
def ws(tmp_path: Path) -> Workspace:
    """v1 without A."""
    workspace = start_history(tmp_path / "ws", array_model(tmp_path / "model"))
    make_step(workspace, "A")
    return workspace


def test_requests_are_those_of_the_version_that_was_restored(ws: Workspace) -> None:
    make_step(ws, "B")
    assert (to_recheck(ws, 0), to_recheck(ws, 1), to_recheck(ws, 2)) == ([], ["A"], ["A", "B"])


def test_version_published_behind_the_restored_one_is_left_to_the_next_audit(
    ws: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[int, list[str]]] = []

    def restored(workspace: str, folder: str) -> int:
        version = restore_current(ws, Path(folder))
        make_step(ws, "B")
        return version

    def measure(workspace: str, folder: str, version: int, requests: list[str]) -> list[Rechecked]:
        measured.append((version, requests))
        return [Rechecked(request_id=name, exact_memorisation=0.1, limit=0.2) for name in requests]

    def sound(workspace: str) -> list[Break]:
        return []

    monkeypatch.setattr(doors, "check_store", sound)
    monkeypatch.setattr(doors, "restore_version", restored)
    monkeypatch.setattr(doors, "measure", measure)
    monkeypatch.setattr(doors, "report", lambda workspace, audit: f"{audit.version}")
    state = doors.audit.fn(str(ws.root))
    assert state.name == "Sound" and measured == [(1, ["A"])]
