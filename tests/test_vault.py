"""The vault: modes, durability of what is there, damage is found, nothing leaks."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from workspaces import plain_record

from pipeline import files
from pipeline.errors import NoSpace, StoreDamaged, UsageError, VaultLocked
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
    assert sorted(p.name for p in folder.parent.iterdir()) == ["keys", "vault"]


def test_modes_hold_under_umask_zero(tmp_path: Path, no_umask: None) -> None:
    (tmp_path / "vault").mkdir(mode=0o777)  # `init` may have made the folder already
    vault = Vault(tmp_path / "vault")
    vault.create()
    vault.put(request())
    paths = [tmp_path / "vault", *(tmp_path / "vault").iterdir(), tmp_path / "keys" / "vault.key"]
    modes = {p.name: p.stat().st_mode & 0o777 for p in paths}
    assert modes.pop("vault") == 0o700
    assert len(modes) == 4, "the commitments' key, a record, its key, the master key"
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


@pytest.mark.parametrize("ending", [".json", ".key"])
def test_every_damaged_byte_is_found(vault: Vault, folder: Path, ending: str) -> None:
    vault.put(request())
    path = only_request(folder).with_suffix(ending)
    good = path.read_bytes()
    for place in range(len(good)):
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
    """Records are bound to their request: with or without its key, one opens under no other name."""
    with pytest.raises(StoreDamaged, match="missing"):
        vault.get("TD-1")
    vault.put(request("TD-1"))
    first = only_request(folder)
    vault.put(request("TD-2"))
    (second,) = set(folder.glob("*.json")) - {first}
    own = second.with_suffix(".key").read_bytes()
    second.write_bytes(first.read_bytes())
    for key in (own, first.with_suffix(".key").read_bytes()):
        second.with_suffix(".key").write_bytes(key)
        with pytest.raises(StoreDamaged, match="another request"):
            vault.get("TD-2")
        with pytest.raises(StoreDamaged, match="another request"):
            vault.ids()
    second.with_suffix(".key").unlink()
    with pytest.raises(StoreDamaged, match=r"\.key: is missing"):
        vault.get("TD-2")


def test_swapped_plain_records_of_an_old_vault(vault: Vault, folder: Path) -> None:
    first, second = (plain_record(folder, request(name)) for name in ("TD-1", "TD-2"))
    second.write_bytes(first.read_bytes())
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


def test_the_basis_that_the_ledger_names_is_that_of_the_record(vault: Vault) -> None:
    kept = request(basis="privacy")
    data = {"commitment": vault.commitment(kept.text), "record": vault.record_commitment(kept)}
    assert vault.differences(kept, data | {"basis": "privacy"}) is None
    for other in ("copyright", None):
        assert vault.differences(kept, data | {"basis": other}) == "title, rights holder, basis or contact"


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
def test_a_lost_key_of_the_commitments_is_never_replaced(vault: Vault, folder: Path, key: bytes | None) -> None:
    vault.put(request())
    (folder / "key").unlink()
    if key is not None:
        (folder / "key").write_bytes(key)
    with pytest.raises(StoreDamaged, match="key"):
        vault.commitment("x")
    with pytest.raises(StoreDamaged, match="key"):
        vault.create()
    assert vault.get("TD-1") == request()  # the requests themselves do not depend on it


# --- encryption -------------------------------------------------------------------------------------------


def test_nothing_of_a_request_can_be_read_on_the_disk(vault: Vault, tmp_path: Path) -> None:
    """No text, contact, title or holder, in names or contents; and the same request twice has nothing in common."""
    vault.put(request())
    first = only_request(tmp_path / "vault")
    before = {p.name: p.read_bytes() for p in (first, first.with_suffix(".key"))}
    secrets = [CANARY, "Somebody", "title", "Zeile", base64.b64encode(CANARY.encode()).decode()[4:-4]]
    for path in tmp_path.rglob("*"):
        data = path.name.encode() + (path.read_bytes() if path.is_file() else b"")
        assert not [secret for secret in secrets if secret.encode() in data], path
    vault.put(request(), replace=True)
    after = {name: (tmp_path / "vault" / name).read_bytes() for name in before}
    sealed = [[base64.b64decode(json.loads(d)[f]) for d, f in zip(r.values(), ("sealed", "wrapped"), strict=True)]
              for r in (before, after)]  # fmt: skip
    assert all(old[:12] != new[:12] and old[12:] != new[12:] for old, new in zip(*sealed, strict=True))


def test_format_can_be_opened_by_whoever_knows_it(vault: Vault, folder: Path, tmp_path: Path) -> None:
    """The rule, from the master key alone."""
    vault.put(request())
    path = only_request(folder)
    record, key = json.loads(path.read_bytes()), json.loads(path.with_suffix(".key").read_bytes())
    assert (record["format"], key["format"]) == ("takedown-vault-1", "takedown-vault-key-1")
    master = bytes.fromhex((tmp_path / "keys" / "vault.key").read_text().strip())
    assert key["master"] == hashlib.sha256(b"takedown vault master key\x00" + master).hexdigest()[:16]

    def opened(secret: bytes, sealed: str, label: str) -> bytes:
        data = base64.b64decode(sealed)
        return AESGCM(secret).decrypt(data[:12], data[12:], f"{label}\x00{path.stem}".encode())

    secret = opened(master, key["wrapped"], "takedown-vault-key-1")
    assert json.loads(opened(secret, record["sealed"], "takedown-vault-1")) == request().model_dump(mode="json")


def test_missing_broken_and_wrong_master_keys_are_told_and_nothing_changes(
    vault: Vault, folder: Path, tmp_path: Path
) -> None:
    vault.put(request())
    file = tmp_path / "keys" / "vault.key"
    good, before = file.read_bytes(), contents(folder)
    other = b"7" * 64
    for bad, told in ((None, "is missing, and TAKEDOWN_VAULT_KEY"), (b"x" * 64, "64 hexadecimal digits"),
                      (good[:-9], "64 hexadecimal digits"), (other, "needs the master key")):  # fmt: skip
        file.unlink(missing_ok=True)
        if bad is not None:
            file.write_bytes(bad)
        fresh = Vault(folder)
        calls: list[Callable[[], object]] = [
            lambda v=fresh: v.get("TD-1"), fresh.ids, fresh.rewrap, lambda v=fresh: v.put(request(title="other")),
        ]  # fmt: skip
        if bad != other:  # under another key new requests can be kept
            calls += [lambda v=fresh: v.put(request("TD-2")), fresh.create]
        for call in calls:
            with pytest.raises(VaultLocked, match=told) as caught:
                call()
            assert "Nothing was changed" in str(caught.value)
            assert not any(digits in str(caught.value) for digits in (good.decode()[:9], "7777777"))
        assert contents(folder) == before and not (tmp_path / "keys" / "vault.key.next").exists()
    file.write_bytes(good)
    assert Vault(folder).get("TD-1") == request()


def test_master_key_from_the_environment_goes_before_the_file(
    folder: Path, vault: Vault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault.put(request("TD-1"))
    monkeypatch.setenv("TAKEDOWN_VAULT_KEY", "A5" * 32)
    assert Vault(folder).get("TD-1") == request("TD-1"), "the file is still at hand"
    Vault(folder).put(request("TD-2"))
    file = tmp_path / "keys" / "vault.key"
    kept = file.read_bytes()
    file.unlink()
    assert Vault(folder).get("TD-2") == request("TD-2")
    with pytest.raises(VaultLocked, match=r"at hand: [0-9a-f]{16} \(TAKEDOWN_VAULT_KEY\)"):
        Vault(folder).get("TD-1")
    monkeypatch.setenv("TAKEDOWN_VAULT_KEY", "no key")
    with pytest.raises(VaultLocked, match="TAKEDOWN_VAULT_KEY: is not a master key"):
        Vault(folder).get("TD-2")
    # Rotation: the new key in the variable, the old ones at hand; afterwards it alone opens everything.
    file.write_bytes(kept)
    monkeypatch.setenv("TAKEDOWN_VAULT_KEY", "5A" * 32)
    monkeypatch.setenv("TAKEDOWN_VAULT_KEY_OLD", "A5" * 32)
    assert Vault(folder).rewrap() == 2
    monkeypatch.delenv("TAKEDOWN_VAULT_KEY_OLD")
    assert not file.exists()
    assert Vault(folder).ids() == ("TD-1", "TD-2")
    with pytest.raises(UsageError, match="under this key already"):
        Vault(folder).rewrap()


def test_a_key_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "elsewhere" / "k"
    vault = Vault(tmp_path / "vault", file)
    vault.create()
    vault.put(request())
    assert len(file.read_text()) == 65 and not (tmp_path / "keys").exists()
    assert Vault(tmp_path / "vault", file).get("TD-1") == request()


def test_rewrapping_touches_no_record_and_the_old_key_opens_nothing(vault: Vault, folder: Path, tmp_path: Path) -> None:
    names = [f"TD-{i}" for i in range(5)]
    for name in names:
        vault.put(request(name))
    file = tmp_path / "keys" / "vault.key"
    old, before = file.read_bytes(), contents(folder)
    reader = Vault(folder)
    assert reader.get("TD-0") == request("TD-0")
    assert vault.rewrap() == 5
    after = contents(folder)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if name.endswith(".key")} and before.keys() == after.keys()
    assert file.read_bytes() != old and not vault.rotating()
    assert reader.ids() == tuple(names), "a reader that had the old key in memory takes the new one"
    file.write_bytes(old)
    with pytest.raises(VaultLocked):
        Vault(folder).get("TD-0")


def test_rewrapping_names_every_key_that_does_not_open_and_changes_nothing(vault: Vault, folder: Path) -> None:
    for name in ("TD-1", "TD-2", "TD-3"):
        vault.put(request(name))
    bad = sorted(folder.glob("*.key"))[:2]
    for path in bad:
        path.write_bytes(path.read_bytes().replace(b'"wrapped":"', b'"wrapped":"AAAA'))
    before = contents(folder)
    with pytest.raises(StoreDamaged) as caught:
        vault.rewrap()
    assert all(path.name in str(caught.value) for path in bad) and str(caught.value).startswith("Nothing was changed")
    assert contents(folder) == before and not vault.rotating()


def test_an_old_vault_is_read_and_sealed(vault: Vault, folder: Path) -> None:
    plain_record(folder, request("TD-1"))
    path = plain_record(folder, request("TD-2"))
    vault.put(request("TD-3"))
    assert vault.ids() == ("TD-1", "TD-2", "TD-3")
    assert vault.get("TD-2") == request("TD-2")
    vault.put(request("TD-2"))
    assert CANARY.encode() in path.read_bytes(), "the same again changes nothing"
    (folder / f"{'e' * 64}.json").mkdir()  # named like a record, and none: told by whoever reads it
    assert (vault.seal_plain(), vault.seal_plain()) == (2, 0)
    (folder / f"{'e' * 64}.json").rmdir()
    assert vault.ids() == ("TD-1", "TD-2", "TD-3")
    assert not any(CANARY.encode() in data for data in contents(folder).values())


def test_erasing_leaves_nothing_and_touches_no_other(vault: Vault, folder: Path) -> None:
    vault.put(request("TD-1"))
    before = contents(folder)
    vault.put(request("TD-2"))
    assert vault.holds("TD-2")
    vault.erase("TD-2")
    vault.erase("TD-2")
    assert contents(folder) == before and not vault.holds("TD-2")
    with pytest.raises(StoreDamaged, match="missing"):
        vault.get("TD-2")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
