"""The keys of a lineage: made once, never replaced, refused when damaged, silent in messages."""

from __future__ import annotations

import base64
import os
import stat
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from pipeline import keys
from pipeline.errors import StoreDamaged, TakedownError, UsageError
from pipeline.keys import create_keys, load_log_key, load_model_key, log_vkey, model_public_key
from pipeline.notes import open_note, sign_note
from pipeline.oms import check_model_signature, model_signature

NAME = "takedown-pipeline/0123456789abcdef"
FILES = ("log.key", "log.pub", "model.key", "model.pub")
READERS: dict[str, Callable[[Path], object]] = {
    "log.key": load_log_key,
    "log.pub": log_vkey,
    "model.key": load_model_key,
    "model.pub": model_public_key,
}
"""What reads each file and nothing but it, or it and its public half."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    create_keys(tmp_path / "keys", NAME)
    return tmp_path / "keys"


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _pem(
    key: Ed25519PrivateKey | Ed448PrivateKey | ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey,
    encryption: KeySerializationEncryption | None = None,
) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())


def test_both_pairs_are_made_with_narrow_modes(folder: Path) -> None:
    assert sorted(_content(folder)) == sorted(FILES)
    assert stat.S_IMODE(folder.stat().st_mode) & 0o077 == 0o055, "an auditor reads the public halves"
    for private in ("log.key", "model.key"):
        assert stat.S_IMODE((folder / private).stat().st_mode) == 0o600
        assert (folder / private).read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----\n")  # PKCS #8, unencrypted


def test_the_mode_does_not_depend_on_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        create_keys(tmp_path / "keys", NAME)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "keys" / "log.key").stat().st_mode) == 0o600


def test_the_log_key_signs_what_its_vkey_opens(folder: Path) -> None:
    key = log_vkey(folder)
    assert key.startswith(NAME + "+") and (folder / "log.pub").read_text() == key + "\n"
    assert open_note(sign_note("a\n", NAME, load_log_key(folder)), key) == "a\n"


def test_the_model_key_signs_what_its_public_key_checks(folder: Path) -> None:
    key = load_model_key(folder)
    assert key.curve.name == "secp256r1"
    pem = model_public_key(folder)
    assert load_pem_public_key(pem) == key.public_key()
    files = {"config.json": "sha256:" + "ab" * 32}
    check_model_signature(model_signature(files, NAME, key), files, pem)


def test_lineages_have_different_keys(folder: Path, tmp_path: Path) -> None:
    create_keys(tmp_path / "other", NAME)
    other = _content(tmp_path / "other")
    assert all(other[name] != data for name, data in _content(folder).items())


# --- nothing is replaced ----------------------------------------------------------------------------------


def test_keys_that_exist_are_kept(folder: Path) -> None:
    before = _content(folder)
    create_keys(folder, NAME)
    assert _content(folder) == before
    with pytest.raises(UsageError, match=r"log\.pub: holds another key or name\. Nothing was changed"):
        create_keys(folder, "takedown-pipeline/other")
    assert _content(folder) == before


@pytest.mark.parametrize("stop_at", range(4))
def test_an_interrupted_call_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int) -> None:
    folder = tmp_path / "keys"
    written: list[str] = []

    def stopping(path: Path, data: bytes, mode: int = 0o644) -> None:
        if len(written) == stop_at:
            raise KeyboardInterrupt
        written.append(path.name)
        write_atomic(path, data, mode)

    write_atomic = keys.write_atomic
    with monkeypatch.context() as patch:
        patch.setattr(keys, "write_atomic", stopping)
        with pytest.raises(KeyboardInterrupt):
            create_keys(folder, NAME)
    before = _content(folder)
    assert len(before) == stop_at
    create_keys(folder, NAME)
    after = _content(folder)
    assert before.items() <= after.items()
    for name in FILES:
        READERS[name](folder)


@pytest.mark.parametrize("pair", ["log", "model"])
def test_a_lost_private_key_is_not_made_anew(folder: Path, pair: str) -> None:
    (folder / f"{pair}.key").unlink()
    before = _content(folder)
    with pytest.raises(StoreDamaged, match=rf"{pair}\.key: is missing, but {pair}\.pub is there"):
        create_keys(folder, NAME)
    assert _content(folder) == before


@pytest.mark.parametrize("name", ["", "a b", "a+b", "a\nb"])
def test_a_name_that_no_note_can_hold_makes_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="key name"):
        create_keys(tmp_path / "keys", name)
    assert not (tmp_path / "keys").exists()


# --- damage -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.timeout(10)
def test_what_is_no_small_file_is_refused(folder: Path, name: str) -> None:
    path = folder / name
    path.unlink()
    with pytest.raises(StoreDamaged, match=rf"{name}: is missing.*[Rr]estore"):
        READERS[name](folder)
    os.mkfifo(path)
    with pytest.raises(StoreDamaged, match=rf"{name}: is not a regular file"):
        READERS[name](folder)
    path.unlink()
    path.mkdir()
    with pytest.raises(StoreDamaged, match=rf"{name}: is not a regular file"):
        READERS[name](folder)
    path.rmdir()
    with path.open("wb") as stream:
        stream.truncate(1 << 40)  # sparse: takes no space
    with pytest.raises(StoreDamaged, match=rf"{name}: has more than 10000 bytes"):
        READERS[name](folder)


def test_a_file_that_cannot_be_opened_is_explained(folder: Path) -> None:
    path = folder / "log.key"
    path.unlink()
    path.symlink_to(path)  # a loop; unlike a mode, it also stops root
    with pytest.raises(UsageError, match=r"log\.key: cannot be read"):
        load_log_key(folder)


WRONG_KEYS: dict[str, bytes] = {
    "empty": b"",
    "not PEM": b"\xff\xfe\0" * 50,
    "an empty PEM": b"-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n",
    # PKCS #8 of an Ed25519 key that lacks a byte: the parser calls it an internal error.
    "a short Ed25519 key": b"-----BEGIN PRIVATE KEY-----\n"
    + base64.b64encode(bytes.fromhex("302d020100300506032b65700421041f") + bytes(31))
    + b"\n-----END PRIVATE KEY-----\n",
    "RSA": _pem(rsa.generate_private_key(65537, 2048)),
    "Ed448": _pem(Ed448PrivateKey.generate()),
    "P-384": _pem(ec.generate_private_key(ec.SECP384R1())),
    "encrypted Ed25519": _pem(Ed25519PrivateKey.generate(), BestAvailableEncryption(b"x")),
    "encrypted P-256": _pem(ec.generate_private_key(ec.SECP256R1()), BestAvailableEncryption(b"x")),
}


@pytest.mark.parametrize("what", WRONG_KEYS)
@pytest.mark.parametrize("name", ["log.key", "model.key"])
def test_a_key_of_another_kind_is_refused(folder: Path, name: str, what: str) -> None:
    (folder / name).write_bytes(WRONG_KEYS[what])
    with pytest.raises(StoreDamaged, match=rf"{name}: is not an unencrypted (Ed25519|ECDSA P-256) private key"):
        READERS[name](folder)


def test_exchanged_keys_are_refused(folder: Path) -> None:
    (folder / "log.key").rename(folder / "x")
    (folder / "model.key").rename(folder / "log.key")
    (folder / "x").rename(folder / "model.key")
    for name in ("log.key", "model.key"):
        with pytest.raises(StoreDamaged, match="is not an unencrypted"):
            READERS[name](folder)


@pytest.mark.parametrize("pair", ["log", "model"])
@pytest.mark.parametrize("half", ["key", "pub"])
def test_halves_of_two_lineages_are_refused(folder: Path, tmp_path: Path, pair: str, half: str) -> None:
    create_keys(tmp_path / "other", NAME)
    (tmp_path / "other" / f"{pair}.{half}").replace(folder / f"{pair}.{half}")
    with pytest.raises(StoreDamaged, match=rf"{pair}\.key: does not belong to {pair}\.pub"):
        READERS[f"{pair}.key"](folder)


@pytest.mark.parametrize("name", ["log.pub", "model.pub"])
def test_every_flipped_bit_of_a_public_key_is_found(folder: Path, name: str) -> None:
    path = folder / name
    raw = path.read_bytes()
    private = name.replace("pub", "key")
    for at in range(len(raw)):
        for bit in range(8):
            changed = bytearray(raw)
            changed[at] ^= 1 << bit
            path.write_bytes(changed)
            with pytest.raises(StoreDamaged):
                READERS[private](folder)  # reads the public half too, and must find that they no longer match


@pytest.mark.parametrize("more", [b"\n", b" ", b"x\n", b"\xff"])
@pytest.mark.parametrize("name", ["log.pub", "model.pub"])
def test_a_public_key_with_something_added_is_refused(folder: Path, name: str, more: bytes) -> None:
    path = folder / name
    raw = path.read_bytes()
    for changed in (raw + more, more + raw, raw[:-1]):
        path.write_bytes(changed)
        with pytest.raises(StoreDamaged, match=name):
            READERS[name](folder)


def test_a_public_key_on_another_curve_is_refused(folder: Path) -> None:
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    (folder / "model.pub").write_bytes(keys.public_pem(key))
    with pytest.raises(StoreDamaged, match=r"model\.pub: .*is not an ECDSA P-256 key"):
        model_public_key(folder)


@pytest.mark.parametrize("name", ["log.key", "model.key"])
def test_no_message_shows_a_private_key(folder: Path, name: str) -> None:
    """Every byte of the key file is damaged in turn; the whole traceback must hold no line of it."""
    path = folder / name
    raw = path.read_bytes()
    secret = raw.decode().splitlines()[1]
    whole = load_pem_private_key(raw, None)
    assert secret not in repr(whole) and secret not in repr(READERS[name](folder))
    refused = 0
    for at in range(len(raw)):
        changed = bytearray(raw)
        changed[at] ^= 1
        path.write_bytes(changed)
        try:
            READERS[name](folder)
        except TakedownError as error:
            refused += 1
            shown = "".join(traceback.format_exception(error))
            assert not any(secret[i : i + 12] in shown for i in range(len(secret) - 12))
            assert error.__cause__ is None and (error.__context__ is None or error.__suppress_context__)
    assert refused > len(secret)
