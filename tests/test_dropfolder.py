"""The drop folder: whole batches are taken, bad ones set aside with a reason, half-written ones left alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from histories import array_model, entries_of, start_history
from workspaces import UNSEEN, WORKS, leaks, toml, write_batch

from pipeline import dropfolder
from pipeline.dropfolder import take_inbox
from pipeline.states import request_states
from pipeline.workspace import Workspace

SECRET = "Quorvantish zemblefrot"
ENTRY = {"title": "t", "rights_holder": "r", "basis": "copyright"}


@pytest.fixture
def ws(tmp_path: Path) -> Workspace:
    workspace = start_history(tmp_path / "ws", array_model(tmp_path / "model"))
    workspace.settings_file.write_text(toml({"intake": {"settle_s": 0.0}}))
    return workspace


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def write_naming(folder: Path, batch_id: str, files: list[str]) -> Path:
    """A batch whose texts are in files."""
    requests = [{"request_id": f"{batch_id}-{i}", "text_file": file, **ENTRY} for i, file in enumerate(files)]
    path = folder / f"{batch_id}.json"
    path.write_text(json.dumps({"batch_id": batch_id, "received_at": "2026-11-23T09:00:00Z", "requests": requests}))
    return path


def test_batches_are_taken_in_by_name_and_removed(ws: Workspace) -> None:
    for name, texts in (("b", {"B-1": WORKS["two"]}), ("a", {"A-1": UNSEEN})):
        write_batch(ws.inbox, name, texts)
    assert take_inbox(ws, "nightly").batches == ("a", "b")
    assert names(ws.inbox) == []
    assert take_inbox(ws, "nightly") == dropfolder.Delivery()
    assert [(e.event.kind, e.event.actor, e.event.request_id) for e in entries_of(ws)[1:]] == [
        ("received", "nightly", "A-1"), ("received", "nightly", "B-1"),
    ]  # fmt: skip


def test_batch_that_was_taken_in_before_a_crash_is_not_in_the_way(
    ws: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_batch(ws.inbox, "a", {"A-1": UNSEEN})
    content = path.read_bytes()
    assert take_inbox(ws, "nightly").batches == ("a",)
    path.write_bytes(content)  # as it lies there when the process dies between the ledger and the removal
    monkeypatch.setattr(dropfolder, "take_in", None)
    assert take_inbox(ws, "nightly").batches == ("a",)
    assert not path.exists()
    assert [e.event.request_id for e in entries_of(ws)].count("A-1") == 1


def test_text_files_go_with_their_batch(ws: Workspace) -> None:
    """What was taken in must not stay outside the vault; a text that another batch needs stays until then."""
    (ws.inbox / "shared.txt").write_text(UNSEEN)
    (ws.inbox / "own.txt").write_text(UNSEEN)
    write_naming(ws.inbox, "a", ["shared.txt", "own.txt"])
    write_naming(ws.inbox, "b", ["shared.txt"])
    assert take_inbox(ws, "nightly").batches == ("a", "b")
    assert names(ws.inbox) == []


def test_bad_files_are_set_aside_with_the_reason_and_hold_up_nothing(ws: Workspace) -> None:
    write_batch(ws.inbox, "known", {"K-1": UNSEEN})
    take_inbox(ws, "nightly")
    bad = {
        "0-cut.json": '{"batch_id": "0-cut", "requests": [{"text": "' + SECRET,
        "1-field.json": json.dumps({"batch_id": "f", "requests": [{"text": SECRET, "contact": 7, SECRET: SECRET}]}),
        "2-not.JSON": SECRET,
        "3-list.json": json.dumps([SECRET]),
    }
    for name, content in bad.items():
        (ws.inbox / name).write_text(content)
    write_batch(ws.inbox, "known", {"K-1": f"{UNSEEN} {SECRET}"}, contact=SECRET)  # another batch under a used id
    (ws.inbox / "kept.txt").write_text("text\0" + SECRET)
    write_naming(ws.inbox, "control", ["kept.txt", "missing.txt", "../ledger.db"])
    (ws.inbox / "folder.json").mkdir()
    (ws.inbox / "link.json").symlink_to(ws.settings_file)
    os.mkfifo(ws.inbox / "pipe.json")
    write_batch(ws.inbox, "good", {"G-1": UNSEEN})

    delivery = take_inbox(ws, "nightly")
    assert delivery.batches == ("good",) and delivery.arriving == ()
    aside = [*bad, "control.json", "folder.json", "known.json", "link.json", "pipe.json"]
    assert [r.name for r in delivery.rejected] == sorted(aside)
    assert names(ws.inbox) == ["kept.txt", "rejected"]  # its text waits for the corrected batch
    rejected = ws.inbox / "rejected"
    assert names(rejected) == sorted([*aside, *(f"{n}.reason.txt" for n in aside)])
    reasons = {name: (rejected / f"{name}.reason.txt").read_text() for name in aside}
    assert all("move it back" in reason for reason in reasons.values())
    assert "was already taken in" in reasons["known.json"] and "control.json: requests[0]" in reasons["control.json"]
    assert all(str(ws.inbox / name) not in reason for name, reason in reasons.items()), "it lies elsewhere now"
    assert not any(word in reason for reason in reasons.values() for word in SECRET.split())
    assert leaks([SECRET], ws.root, *(reason.encode() for reason in reasons.values())) == [
        *leaks([SECRET], ws.inbox)
    ]  # what was set aside, in the drop folder, and nowhere else
    assert request_states(entries_of(ws))["G-1"].state == "waiting"
    assert take_inbox(ws, "nightly") == dropfolder.Delivery()


def test_second_bad_file_of_a_name_does_not_replace_the_first(ws: Workspace) -> None:
    for content in ("{", "[", "]"):
        (ws.inbox / "a.json").write_text(content)
        take_inbox(ws, "nightly")
    found = {n: (ws.inbox / "rejected" / n).read_text() for n in ("a.json", "a-2.json", "a-3.json")}
    assert list(found.values()) == ["{", "[", "]"]


def test_setting_aside_that_died_is_repeated(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    (ws.inbox / "a.json").write_text("{")
    with monkeypatch.context() as patch:
        patch.setattr(dropfolder, "put_in_place", killed)
        with pytest.raises(KeyboardInterrupt):
            take_inbox(ws, "nightly")
    assert names(ws.inbox) == ["a.json", "rejected"]
    assert [r.name for r in take_inbox(ws, "nightly").rejected] == ["a.json"]
    assert names(ws.inbox / "rejected") == ["a.json", "a.json.reason.txt"]


def growing(path: Path) -> Callable[[float], None]:
    """Instead of sleeping, somebody goes on writing."""
    return lambda seconds: path.open("a").write(" ") and None


@pytest.mark.parametrize("part", ["a.json", "long.txt"])
def test_file_that_is_still_being_written_stays(ws: Workspace, part: str) -> None:
    ws.settings_file.write_text(toml({"intake": {"settle_s": 1.5}}))
    (ws.inbox / "long.txt").write_text(UNSEEN)
    write_naming(ws.inbox, "a", ["long.txt"])
    write_batch(ws.inbox, "b", {"B-1": WORKS["two"]})
    first = take_inbox(ws, "nightly", growing(ws.inbox / part))
    assert first.arriving == ("a.json",) and first.batches == ("b",) and first.rejected == ()
    waited = list[float]()
    assert take_inbox(ws, "nightly", waited.append).batches == ("a",)
    assert waited == [1.5]


def test_nobody_waits_for_files_that_lay_there_long(ws: Workspace) -> None:
    ws.settings_file.write_text(toml({"intake": {"settle_s": 1.5}}))
    path = write_batch(ws.inbox, "a", {"A-1": UNSEEN})
    os.utime(path, (1_000_000_000, 1_000_000_000))
    assert take_inbox(ws, "nightly", sleep=pytest.fail).batches == ("a",)


def test_part_and_hidden_files_are_left_alone(ws: Workspace) -> None:
    for name in ("a.json.part", ".b.json", "c.txt"):
        (ws.inbox / name).write_text("{")
    assert take_inbox(ws, "nightly") == dropfolder.Delivery()
    assert names(ws.inbox) == [".b.json", "a.json.part", "c.txt"]
