"""The vault: modes, durability of what is there, damage is found, nothing leaks."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipeline import files
from pipeline.errors import NoSpace, StoreDamaged, UsageError
from pipeline.records import TakedownRequest
from pipeline.vault import Vault

CANARY = "xyzzy-canary-plugh"


def request(request_id: str = "TD-1", **changed: object) -> TakedownRequest:
    fields: dict[str, object] = {
        "request_id": request_id,
        "title": "A \u202e title",
        "rights_holder": "Somebody",
        "basis": "copyright",
        "contact": f"{CANARY}@example.org",
        "batch_id": "B",
        "received_at": datetime(2026, 11, 23, 9, 0, 0, 123456, tzinfo=UTC),
        "text": f"Zeile eins\nça \x0c 日本 🎈 {CANARY}",
    }
    return TakedownRequest.model_validate(fields | changed)


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    vault = Vault(tmp_path / "vault")
    vault.create()
    return vault


@pytest.fixture
def folder(vault: Vault, tmp_path: Path) -> Path:
    return tmp_path / "vault"


@pytest.fixture
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def only_request(folder: Path) -> Path:
    (path,) = folder.glob("*.json")
    return path


def test_get_is_the_inverse_of_put(vault: Vault) -> None:
    vault.put(request())
    vault.put(request("TD-2", contact=None))
    assert vault.get("TD-1") == request()
    assert vault.get("TD-2") == request("TD-2", contact=None)
    assert vault.ids() == ("TD-1", "TD-2")


def test_ids_that_differ_only_in_case_and_odd_ids_do_not_collide(vault: Vault, folder: Path) -> None:
    odd = ["td-1", "TD-1", "../../escape", "a/b", "", ".", "CON", "x" * 5000]
    for name in odd:
        vault.put(request(name))
    assert vault.ids() == tuple(sorted(odd))
    assert len({p.name.lower() for p in folder.glob("*.json")}) == len(odd)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["vault"]


def test_modes_hold_under_umask_zero(tmp_path: Path, no_umask: None) -> None:
    (tmp_path / "vault").mkdir(mode=0o777)  # `init` may have made the folder already
    vault = Vault(tmp_path / "vault")
    vault.create()
    vault.put(request())
    modes = {p.name: p.stat().st_mode & 0o777 for p in [tmp_path / "vault", *(tmp_path / "vault").iterdir()]}
    assert modes.pop("vault") == 0o700
    assert len(modes) == 2
    assert set(modes.values()) == {0o600}


def test_putting_the_same_again_changes_nothing(vault: Vault, folder: Path) -> None:
    vault.put(request())
    before = only_request(folder).stat()
    vault.put(request())
    assert (only_request(folder).stat().st_ino, only_request(folder).stat().st_mtime_ns) == (
        before.st_ino,
        before.st_mtime_ns,
    )


@pytest.mark.parametrize("changed", [{"text": "other"}, {"title": "other"}, {"contact": None}])
def test_other_content_under_a_known_id_is_refused(vault: Vault, changed: dict[str, object]) -> None:
    vault.put(request())
    with pytest.raises(UsageError, match="TD-1") as caught:
        vault.put(request(**changed))
    assert CANARY not in str(caught.value)
    assert vault.get("TD-1") == request()


def test_every_damaged_byte_is_found(vault: Vault, folder: Path) -> None:
    vault.put(request())
    path = only_request(folder)
    good = path.read_bytes()
    for place in range(len(good) - 1):  # the last byte is the line end after the JSON
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(StoreDamaged, match="backup") as caught:
            vault.get("TD-1")
        assert CANARY not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "data", [b"", b"{", b"null", b"[]", b"{}", b'{"request": 1, "digest": 2}', b"\xff", b"[" * 99999]
)
def test_other_files_in_place_of_a_request(vault: Vault, folder: Path, data: bytes) -> None:
    vault.put(request())
    only_request(folder).write_bytes(data)
    with pytest.raises(StoreDamaged):
        vault.get("TD-1")
    with pytest.raises(StoreDamaged):
        vault.ids()
    with pytest.raises(StoreDamaged):
        vault.put(request())


def test_right_digest_of_a_wrong_record(vault: Vault, folder: Path) -> None:
    vault.put(request())
    value = {"request_id": "TD-1", "text": CANARY}
    only_request(folder).write_text(json.dumps({"digest": files.digest_json(value), "request": value}))
    with pytest.raises(StoreDamaged) as caught:
        vault.get("TD-1")
    assert CANARY not in "".join(traceback.format_exception(caught.value))


def test_missing_and_swapped_requests(vault: Vault, folder: Path) -> None:
    with pytest.raises(StoreDamaged, match="missing"):
        vault.get("TD-1")
    vault.put(request("TD-1"))
    first = only_request(folder)
    data = first.read_bytes()
    vault.put(request("TD-2"))
    (second,) = set(folder.glob("*.json")) - {first}
    second.write_bytes(data)
    with pytest.raises(StoreDamaged, match="another request"):
        vault.get("TD-2")
    with pytest.raises(StoreDamaged, match="another name"):
        vault.ids()


def test_left_over_temporary_files_are_no_requests(vault: Vault, folder: Path) -> None:
    (folder / ".tmp-abc").write_bytes(b"half")
    (folder / ".tmp-abc.json").write_bytes(b"half")
    vault.put(request())
    assert vault.ids() == ("TD-1",)


def test_failed_write_leaves_nothing(vault: Vault, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(NoSpace):
        vault.put(request())
    assert [p.name for p in folder.iterdir()] == ["key"]


def test_commitment_is_keyed_and_can_be_recomputed(vault: Vault, folder: Path, tmp_path: Path) -> None:
    key = (folder / "key").read_bytes()
    assert len(key) == 32
    expected = hmac.new(key, "ça".encode(), hashlib.sha256).hexdigest()
    assert vault.commitment("ça") == f"hmac-sha256:{expected}"
    assert Vault(folder).commitment("ça") == vault.commitment("ça")
    assert vault.commitment("ca") != vault.commitment("ça")
    other = Vault(tmp_path / "other")
    other.create()
    assert other.commitment("ça") != vault.commitment("ça")


@pytest.mark.parametrize(
    ("field", "value"),
    [("title", "Other"), ("rights_holder", "Other"), ("basis", "privacy"), ("contact", None), ("batch_id", "b9"),
     ("received_at", datetime(2020, 1, 1, tzinfo=UTC)), ("request_id", "other"), ("text", "other words")],
)  # fmt: skip
def test_commitment_to_a_record_covers_every_field(vault: Vault, field: str, value: object) -> None:
    assert set(TakedownRequest.model_fields) == {
        "title", "rights_holder", "basis", "contact", "batch_id", "received_at", "request_id", "text",
    }  # fmt: skip
    kept = request()
    data = {"commitment": vault.commitment(kept.text), "record": vault.record_commitment(kept)}
    assert data["record"] not in (
        data["commitment"],
        vault.record_commitment(request(**({"request_id": "TD-1"} | {field: value}))),
    )
    assert vault.differences(kept, data) is None
    expected = "text" if field == "text" else "title, rights holder, basis or contact"
    assert vault.differences(request(**({"request_id": "TD-1"} | {field: value})), data) == expected


def test_what_an_earlier_release_recorded_binds_the_text_only(vault: Vault) -> None:
    data = {"commitment": vault.commitment(request().text)}
    assert vault.differences(request(title="Other"), data) is None
    assert vault.differences(request(text="other words"), data) == "text"
    assert vault.differences(request(text="other words"), {}) is None


def test_commitment_to_a_record_needs_no_text_but_its_commitment(vault: Vault, folder: Path) -> None:
    """So that the rest can be checked when the text is no longer kept; the rule, computed from the key alone."""
    tree = request().model_dump(mode="json") | {"text": vault.commitment(request().text)}
    data = b"takedown request\x00" + json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()
    made = hmac.new((folder / "key").read_bytes(), data, hashlib.sha256).hexdigest()
    assert vault.record_commitment(request()) == f"hmac-sha256:{made}"


def test_confirmed_gives_back_what_the_ledger_committed_to(vault: Vault) -> None:
    kept = request()
    vault.put(kept)
    data = {"commitment": vault.commitment(kept.text), "record": vault.record_commitment(kept)}
    assert vault.confirmed(kept.request_id, data) == kept
    vault.put(request(title="Other"), replace=True)
    with pytest.raises(StoreDamaged, match="has another title") as error:
        vault.confirmed(kept.request_id, data)
    assert "Other" not in str(error.value)


def test_create_keeps_an_existing_key(vault: Vault, folder: Path) -> None:
    key = (folder / "key").read_bytes()
    vault.create()
    assert (folder / "key").read_bytes() == key


@pytest.mark.parametrize("key", [None, b"", b"x" * 31, b"x" * 33])
def test_a_lost_key_is_never_replaced(vault: Vault, folder: Path, key: bytes | None) -> None:
    vault.put(request())
    (folder / "key").unlink()
    if key is not None:
        (folder / "key").write_bytes(key)
    with pytest.raises(StoreDamaged, match="key"):
        vault.commitment("x")
    with pytest.raises(StoreDamaged, match="key"):
        vault.create()
    assert vault.get("TD-1") == request()  # the requests themselves do not depend on it
