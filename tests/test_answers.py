"""The end of a run, called again: it is noticed that the run was answered."""

from __future__ import annotations

from pathlib import Path

import pytest
from histories import array_model, entries_of, prepare_step, start_history

from pipeline.answers import publish
from pipeline.verify import verify
from pipeline.versions import VersionStore
from pipeline.workspace import writing


@pytest.mark.parametrize("accepted", [True, False])
def test_answering_again_changes_nothing_and_says_the_same(tmp_path: Path, accepted: bool) -> None:
    workspace = start_history(tmp_path / "store", array_model(tmp_path / "model"))
    run_id = prepare_step(workspace, ["TD-1"], accepted=accepted)
    with writing(workspace):
        first = publish(str(workspace.root), run_id, "tester")
    entries, numbers = entries_of(workspace), VersionStore(workspace.versions).numbers()
    with writing(workspace):
        again = publish(str(workspace.root), run_id, "tester")
    assert again == first and first.outcome == ("published" if accepted else "refused")
    assert first.version == (1 if accepted else None)
    assert entries_of(workspace) == entries
    assert VersionStore(workspace.versions).numbers() == numbers
    assert verify(workspace) == []
