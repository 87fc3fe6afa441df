"""The register for lawyers' tools: complete, confidential, and harmless in a spreadsheet."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from histories import array_model, entries_of, make_step, start_history
from hypothesis import given
from hypothesis import strategies as st
from workspaces import copied, draw_text, leaks, take_in

from pipeline.export import EVENT_COLUMNS, REQUEST_COLUMNS, event_rows, harmless, request_rows, to_csv
from pipeline.vault import Vault
from pipeline.workspace import Workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("export")
    workspace = start_history(folder / "ws", array_model(folder / "m"))
    make_step(workspace, "A")
    formula = '=HYPERLINK("http://evil","click")'
    take_in(workspace, "batch-f", {"F": draw_text("F", 20)}, title=formula, contact="secret@example.org")
    return workspace


def test_every_request_and_event_has_its_row(workspace: Workspace) -> None:
    entries = entries_of(workspace)
    rows = {row["request_id"]: row for row in request_rows(workspace, entries)}
    assert set(rows) == {"A", "F"}
    assert rows["A"]["state"] == "verified"
    assert rows["A"]["answer"] == "applied"
    assert (rows["A"]["excluded_since"], rows["A"]["excluded_now"]) == ("v1", True)
    assert rows["A"]["em_before"] == 1.0
    assert rows["A"]["em_after"] == pytest.approx(0.17)
    assert rows["A"]["em_limit"] == pytest.approx(0.21)
    assert (rows["F"]["state"], rows["F"]["excluded_since"], rows["F"]["em_after"]) == ("waiting", None, None)
    assert [row["seq"] for row in event_rows(entries)] == list(range(1, len(entries) + 1))


def test_csv_reads_back_and_holds_no_formula_text_or_contact(workspace: Workspace, tmp_path: Path) -> None:
    entries = entries_of(workspace)
    text = to_csv(REQUEST_COLUMNS, request_rows(workspace, entries)) + to_csv(EVENT_COLUMNS, event_rows(entries))
    table = list(csv.reader(io.StringIO(text)))
    assert table[0] == list(REQUEST_COLUMNS)
    formula = next(cell for row in table for cell in row if "HYPERLINK" in cell)
    assert formula == '\'=HYPERLINK("http://evil","click")'
    secrets = [draw_text("F", 20), draw_text("A", 30), "secret@example.org"]
    assert leaks(secrets, workspace.root, text.encode()) == []


def test_title_that_is_not_the_one_committed_to_is_left_out(workspace: Workspace, tmp_path: Path) -> None:
    own = copied(workspace.root, tmp_path / "own")
    vault = Vault(own.vault)
    request = vault.get("A")
    vault.put(request.model_copy(update={"text": "other words"}), replace=True)
    rows = {row["request_id"]: row for row in request_rows(own, entries_of(own))}
    assert (rows["A"]["title"], rows["A"]["rights_holder"], rows["A"]["basis"]) == ("", "", "")
    assert rows["A"]["commitment"] and rows["F"]["title"], "what the ledger says stays, and so do the others"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "  =1", "\u3000=1", "＝1"])
def test_formulas_are_neutralised(text: str) -> None:
    assert harmless(text) == "'" + text


@pytest.mark.parametrize(
    ("value", "cell"), [("TD-1", "TD-1"), (None, ""), (True, "yes"), (False, "no"), (-0.5, "-0.5"), (3, "3"), ("", "")]
)
def test_harmless_cells_stay(value: object, cell: str) -> None:
    assert harmless(value) == cell


@given(st.text())
def test_no_cell_starts_a_formula_and_nothing_is_lost(text: str) -> None:
    cell = harmless(text)
    assert cell.removeprefix("'") == text or cell == text
    assert not cell.lstrip().startswith(("=", "+", "-", "@")) and not cell.startswith(("\t", "\r", "\n"))
    (row,) = csv.reader(io.StringIO(to_csv(("a", "b"), [{"a": text.replace("\0", ""), "b": 1}]).split("\r\n", 1)[1]))
    assert row[1] == "1"
