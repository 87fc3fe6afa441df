"""`takedown rekey` on whole workspaces: the verb, the event, old stores, keys elsewhere, interruptions.


That the power may fail at every call is in `test_faults.py`, what a vault does by itself in `test_vault.py`.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from histories import array_model, entries_of, make_step, start_history
from tampered.calls import call_in as call
from workspaces import copied, draw_text, leaks, plain_record, take_in, write_batch

from pipeline.errors import NoSpace, UsageError, VaultLocked
from pipeline.masters import MasterKeys
from pipeline.rekey import rekey
from pipeline.storecheck import Depth
from pipeline.vault import Vault, open_vault
from pipeline.verify import verify
from pipeline.workspace import Workspace, open_workspace

CONTACT = "mira.quill@holder.example"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """v1 without TD-1; TD-2 waits."""
    folder = tmp_path_factory.mktemp("rekey")
    workspace = start_history(folder / "ws", array_model(folder / "model"))
    make_step(workspace, "TD-1")
    take_in(workspace, "second", {"TD-2": draw_text("TD-2", 30)}, contact=CONTACT)
    return workspace.root


@pytest.fixture
def ws(made: Path, tmp_path: Path) -> Workspace:
    return copied(made, tmp_path / "ws")


def records(ws: Workspace) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in ws.vault.glob("*.json")}


def test_init_makes_a_key_that_only_its_owner_reads(ws: Workspace) -> None:
    file = ws.keys / "vault.key"
    assert file.stat().st_mode & 0o777 == 0o600 and len(bytes.fromhex(file.read_text().strip())) == 32
    assert leaks([draw_text("TD-2", 30), CONTACT], ws.root) == []
    assert not any(CONTACT.encode() in data for data in records(ws).values()), "nor in the vault, as it lies there"


def test_the_verb_changes_the_key_and_nothing_else(ws: Workspace) -> None:
    old, before = (ws.keys / "vault.key").read_text(), records(ws)
    answer = call(ws, "rekey", "--actor", "officer", "--json")
    said = json.loads(answer.out)
    assert answer.code == 0 and said == {"master": open_vault(ws).master(), "rewrapped": 2, "sealed": 0}
    assert (ws.keys / "vault.key").read_text() != old and records(ws) == before
    assert sorted(p.name for p in ws.keys.glob("vault*")) == ["vault.key"]
    event = entries_of(ws)[-1].event
    assert (event.kind, event.actor, event.data) == ("rekeyed", "officer", said)
    assert verify(ws, Depth.DEEP) == []
    assert Vault(ws.vault).get("TD-2").contact == CONTACT
    digits = [key.strip() for key in (old, (ws.keys / "vault.key").read_text())]
    assert leaks([*digits, CONTACT], ws.root, answer.out.encode(), answer.err.encode()) == [
        f"{ws.keys / 'vault.key'}: {digits[1].encode()!r}"
    ]
    answer = call(ws, "rekey")
    assert answer.code == 0 and "2 texts changed over" in answer.text and "Keep a copy" in answer.text


def test_a_missing_key_stops_every_verb_that_needs_a_text_and_only_those(ws: Workspace) -> None:
    (ws.keys / "vault.key").rename(ws.root.parent / "away")
    before = records(ws), len(entries_of(ws))
    batch = write_batch(ws.root.parent, "third", {"TD-3": draw_text("TD-3", 30)})
    for arguments in (
        ["rekey"],
        ["submit", str(batch)],
        ["certificate", "TD-1", "--out", "c"],
        ["find-copies", "away"],
    ):
        answer = call(ws, *arguments)
        assert answer.code == 1 and "Restore the key from a backup" in answer.text, (arguments, answer)
    assert (records(ws), len(entries_of(ws))) == before
    (told,) = verify(ws)
    assert told.where == "vault" and "needs the master key" in told.found and "No sealed text" in told.means
    for arguments in (["status"], ["log"], ["show", "TD-1"], ["export", "--out", "register"], ["verify", "--quick"]):
        assert call(ws, *arguments).code == 0, arguments
    (ws.root.parent / "away").rename(ws.keys / "vault.key")
    assert call(ws, "submit", str(batch)).code == 0 and verify(ws) == []


def test_a_key_elsewhere_is_named_in_the_settings_and_travels_with_no_version(ws: Workspace, tmp_path: Path) -> None:
    elsewhere = tmp_path / "safe" / "master"
    elsewhere.parent.mkdir()
    (ws.keys / "vault.key").rename(elsewhere)
    ws.settings_file.write_text(f'[vault]\nkey_file = "{elsewhere}"\n')
    assert call(ws, "rekey").code == 0 and not (ws.keys / "vault.key").exists()
    make_step(ws, "TD-3")
    assert verify(ws) == [] and open_vault(ws).ids() == ("TD-1", "TD-2", "TD-3")
    assert leaks([str(elsewhere)], ws.versions) == []
    ws.settings_file.write_text("[vault]\nkey_file = 7\n")
    (told,) = verify(ws)
    assert told.where == "takedown.toml" and "key_file" in told.found
    assert call(ws, "verify").code == 1


def test_a_store_of_a_release_before_encryption_is_sealed_by_the_next_batch_or_by_the_verb(ws: Workspace) -> None:
    for name in ("TD-1", "TD-2"):
        plain_record(ws.vault, Vault(ws.vault).get(name))
    (ws.keys / "vault.key").unlink()
    assert verify(ws, Depth.DEEP) == [] and call(ws, "status").code == 0
    assert not (ws.keys / "vault.key").exists(), "reading makes no key"
    old = ws.root.parent / "old"
    shutil.copytree(ws.root, old)
    answer = call(open_workspace(old), "rekey")
    assert answer.code == 0 and "readable until now: 2 texts" in answer.text
    batch = write_batch(ws.root.parent, "third", {"TD-3": draw_text("TD-3", 30)})
    assert call(ws, "submit", str(batch)).code == 0
    for root in (old, ws.root):
        found = open_workspace(root)
        assert verify(found, Depth.DEEP) == [] and not any(CONTACT.encode() in d for d in records(found).values())
        assert Vault(found.vault).get("TD-2").contact == CONTACT


def test_an_interrupted_change_goes_on_with_the_same_key_and_is_told(
    ws: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.files.os.fsync", full)
        with pytest.raises(NoSpace):
            rekey(ws, "tester")
    assert not open_vault(ws).rotating() and verify(ws) == []

    with monkeypatch.context() as patch:
        patch.setattr(MasterKeys, "end_rotation", full)
        with pytest.raises(OSError, match="space"):
            rekey(ws, "tester")
    begun = (ws.keys / "vault.key.next").read_text()
    assert verify(ws) == [] and "begun and not ended" in call(ws, "verify").err
    batch = write_batch(ws.root.parent, "third", {"TD-3": draw_text("TD-3", 30)})
    assert call(ws, "submit", str(batch)).code == 0, "a batch may come in between"
    (ws.keys / "vault.key").unlink()
    assert Vault(ws.vault).ids() == ("TD-1", "TD-2", "TD-3"), "the new key opens everything already"
    assert rekey(ws, "tester").rewrapped == 0
    assert (ws.keys / "vault.key").read_text() == begun
    assert verify(ws) == [] and "not ended" not in call(ws, "verify").err


def test_an_interrupted_change_to_a_key_of_the_environment_ends_with_the_old_file_gone(
    ws: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise OSError(5, os.strerror(5))

    monkeypatch.setenv("TAKEDOWN_VAULT_KEY", "5a" * 32)
    with monkeypatch.context() as patch:
        patch.setattr(MasterKeys, "end_rotation", stopped)
        with pytest.raises(OSError, match=os.strerror(5)):
            rekey(ws, "tester")
    assert (ws.keys / "vault.key").exists() and verify(ws) == []
    assert rekey(ws, "tester").rewrapped == 0
    assert not (ws.keys / "vault.key").exists() and verify(ws) == []
    assert entries_of(ws)[-1].event.kind == "rekeyed"
    with pytest.raises(UsageError, match="under this key already"):
        rekey(ws, "tester")


def test_a_broken_key_is_never_taken_for_none(ws: Workspace) -> None:
    (ws.keys / "vault.key").write_text("")
    with pytest.raises(VaultLocked, match="64 hexadecimal digits"):
        open_vault(ws).create()
    assert (ws.keys / "vault.key").read_text() == ""
