"""The reading verbs on a history without a language model: what they refuse to show, and what they say beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from histories import array_model, make_step, prepare_step, publish, reinstate, start_history
from tampered.calls import Answer, takedown
from tampered.scene import rechain, settle, sql
from workspaces import copied

from pipeline.evidence import evidence_of
from pipeline.ledger import Ledger
from pipeline.records import Event, Evidence
from pipeline.requests import note
from pipeline.states import decisions, request_states
from pipeline.versions import VersionStore
from pipeline.workspace import Workspace, read_entries

READING = (
    "status", "log", "show v1", "show TD-1", "versions", "diff v0 v1", "first-version TD-1", "export --out out",
    "report --out page.html",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """v1 without TD-1, v2 without TD-2."""
    folder = tmp_path_factory.mktemp("made")
    workspace = start_history(folder / "store", array_model(folder / "model"))
    make_step(workspace, "TD-1")
    make_step(workspace, "TD-2")
    settle(workspace)
    return workspace.root


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Workspace:
    return copied(made, tmp_path / "store")


def call(store: Workspace, command: str) -> Answer:
    return takedown("-w", "store", *command.split(), folder=store.root.parent)


# --- what is shown is what was signed ---------------------------------------------------------------------


@pytest.mark.parametrize("verb", READING)
def test_entries_that_nobody_signed_are_not_shown(store: Workspace, verb: str) -> None:
    """The chain by itself holds: somebody without the key changed an entry and computed all digests anew."""
    assert call(store, verb).code == 0
    rechain(store, lambda rows: rows[1][1].update(actor="nobody"))
    found = call(store, verb)
    assert found.code == 1 and "are not those of its last signed checkpoint" in found.err
    assert "takedown verify" in found.err and not found.out


@pytest.mark.parametrize("verb", READING)
def test_who_may_not_read_the_public_key_is_told(store: Workspace, verb: str) -> None:
    """A link that leads to itself cannot be read, as a file of another user; here, root may read all of those."""
    (store.keys / "log.pub").unlink()
    (store.keys / "log.pub").symlink_to("log.pub")
    found = call(store, verb)
    assert found.code == 0 or verb.startswith("report")
    assert verb.startswith("report") or "Whose entries these are was not checked." in found.err
    sql(store, "DELETE FROM entries WHERE seq = 3")
    assert call(store, verb).code == 1, "the chain is checked all the same"


def test_a_signature_is_still_checked_with_the_checkpoint_file_gone(store: Workspace) -> None:
    store.checkpoint.unlink()
    assert call(store, "status").code == 0
    sql(store, "UPDATE checkpoints SET note = replace(note, '—', '-')")
    found = call(store, "status")
    assert found.code == 1 and "its newest checkpoint does not hold" in found.err


# --- show, verify, certificate ----------------------------------------------------------------------------


def test_a_request_is_shown_with_what_its_text_shares_with_others(store: Workspace) -> None:
    pair = Evidence(request_id="TD-1", jaccard=0.31, containment=0.52, contained=0.64, ranges=((0, 1204), (1300, 1377)))
    others = [pair.model_copy(update={"request_id": f"TD-{n}"}) for n in range(11, 21)]
    publish(store, prepare_step(store, ["TD-3"], evidence=[pair, *others]))
    found = call(store, "show TD-3")
    row = next(line.split() for line in found.out.splitlines() if line.split()[:2] == ["TD-3", "TD-1"])
    assert row[2:] == ["0.310", "0.520", "0.640", "0–1204,", "1300–1377"]
    assert "TD-3: 25.0% of the text is boilerplate; all shares are of the rest." in found.out
    assert "TD-3: shares something with 3 more texts" in found.out and "TD-18" not in found.out
    shown = json.loads(call(store, "show TD-3 --json").out)["deduplication"]
    assert len(shown["evidence"]) == 11 and shown["evidence"][0]["ranges"] == [[0, 1204], [1300, 1377]]
    assert "in common" not in call(store, "show TD-1").out, "it was the first text"


def test_a_request_is_shown_without_evidence_that_is_lost(store: Workspace) -> None:
    entry = decisions(read_entries(store))[str(request_states(read_entries(store))["TD-1"].run_id)]
    VersionStore(store.versions).objects.object_path(evidence_of(entry)["dedupe"]).unlink()
    found = call(store, "show TD-1")
    assert found.code == 0 and "TD-1: verified" in found.out and "its evidence cannot be shown" in found.err
    assert json.loads(call(store, "show TD-1 --json").out)["deduplication"] is None


def test_tensors_are_proven_to_be_in_a_version_not_in_a_request(store: Workspace) -> None:
    found = call(store, "show TD-1 --tensor layer.0.weight")
    assert found.code == 2
    assert "TD-1: is a request; tensors are proven to be in a version." in found.text and "v2" in found.text
    assert call(store, "show v1 --tensor layer.0.weight").code == 0
    unknown = call(store, "show TD-9 --tensor layer.0.weight")
    assert unknown.code == 2 and "no such request or version" in unknown.text


def test_verify_without_private_keys_is_sound_and_noted(store: Workspace) -> None:
    assert "Note:" not in call(store, "verify").text
    (store.keys / "log.key").unlink()
    for command in ("verify", "verify --quick", "verify --json"):
        found = call(store, command)
        assert found.code == 0 and "Note: nothing can be added here" in found.err and "log.key" in found.err
    assert json.loads(call(store, "verify --json").out) == []


def test_an_unreadable_ledger_is_named_first_and_the_rest_in_one_line(store: Workspace) -> None:
    store.ledger.write_bytes(b"x" * 5000)
    found = call(store, "verify --json")
    breaks = json.loads(found.out)
    assert found.code == 1
    assert [b["where"] for b in breaks] == ["ledger.db", "everything else"]
    assert "is not a readable ledger" in breaks[0]["found"] and "was not checked" in breaks[1]["found"]


def test_who_asked_in_vain_for_a_reinstatement_and_why_is_shown(store: Workspace) -> None:
    note(store, "countered", "TD-1", "tester", "licensed")
    assert reinstate(store, "TD-1", again=["TD-2"], accepted=False) == 2
    shown = call(store, "show TD-1").text
    assert shown.startswith("TD-1: countered, excluded since v1")
    assert "not-reinstated v2 by tester" in shown and 'reason: "licence shown"' in shown
    assert "TD-1 (reinstated): did not come back." in shown and "not-reinstated" not in call(store, "show TD-2").text
    assert "not-reinstated" in call(store, "log").text
    (row,) = [r for r in json.loads(call(store, "export --json").out)["events"] if r["event"] == "not-reinstated"]
    assert (row["request_id"], row["actor"], row["reason"]) == ("TD-1", "tester", "licence shown")
    assert call(store, "verify").code == 0


def test_a_seal_that_is_old_is_a_note(store: Workspace) -> None:
    with Ledger.open(store.ledger) as ledger:
        ledger.append(Event(kind="hold", actor="tester", request_id="TD-1"))
    found = call(store, "verify")
    assert found.code == 0 and "Note: the seal is of" in found.err


def test_certificate_since_a_kept_checkpoint(store: Workspace) -> None:
    kept = store.root.parent / "kept"
    kept.write_bytes(store.checkpoint.read_bytes())
    make_step(store, "TD-3")
    found = call(store, "certificate TD-1 --out out --since kept")
    assert found.code == 0, found.text
    assert json.loads((store.root.parent / "out" / "certificate.json").read_bytes())["log"]["since"]
    kept.write_text("no checkpoint")
    refused = call(store, "certificate TD-1 --out again --since kept")
    assert refused.code == 1 and "kept: is no checkpoint of this lineage" in refused.text
    assert call(store, "certificate TD-1 --out again --since absent").code == 2
    assert not (store.root.parent / "again").exists()
    plain = call(store, "certificate TD-1 --out plain --json")
    assert "since" not in json.loads(plain.out)["log"]


# --- long tables ------------------------------------------------------------------------------------------


def test_a_long_table_is_not_folded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from flows import terminal

    monkeypatch.setattr(terminal, "out", Console(highlight=False, width=40))
    row = ("TD-1", "a[red]b\x1b", "漢字" * 30, 7)
    terminal.show_table("Log", ("request", "what", "note", "changed"), [row] * terminal.LONG)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 40, "a short one folds to the terminal"
    terminal.show_table("Log", ("request", "what", "note", "changed"), [row] * (terminal.LONG + 1))
    title, head, rule, *lines = capsys.readouterr().out.splitlines()
    assert title == "Log" and head.split() == ["request", "what", "note", "changed"] and set(rule) == {"─", " "}
    assert lines == [f"TD-1     a[red]b\\x1b  {'漢字' * 30}        7"] * (terminal.LONG + 1)


def test_cells_are_aligned_by_the_columns_that_they_take() -> None:
    from flows.terminal import aligned

    assert aligned("T", ("name", "x"), [("漢", "a"), ("bcdef", None)]) == (
        "T\nname   x\n─────  ─\n漢     a\nbcdef"
    )  # fmt: skip
