"""The two keys of a lineage: one signs its log, one signs its models.

In: a folder. Out: key pairs, made once and read back. Never: a key replaced, private key bytes in a message.

``log.key`` (Ed25519) and ``model.key`` (ECDSA P-256) are PKCS #8 in PEM, unencrypted, mode 0600: whoever has them can
sign in the lineage's name, so they belong to the workspace's owner alone. ``log.pub`` (a vkey, see `pipeline.notes`)
and ``model.pub`` (PEM) are what others need to check.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from cryptography.exceptions import InternalError, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from pipeline.errors import StoreDamaged, UsageError
from pipeline.files import NotRegular, explained_space, make_folder, open_regular, write_atomic
from pipeline.notes import parse_vkey, require_key_name, vkey
from pipeline.oms import load_public_key, public_pem

LOG_KEY, LOG_PUBLIC = "log.key", "log.pub"
MODEL_KEY, MODEL_PUBLIC = "model.key", "model.pub"

MAX_KEY_BYTES = 10_000
"""A key file has about 200."""

_K = TypeVar("_K", Ed25519PrivateKey, ec.EllipticCurvePrivateKey)


def _damaged(path: Path, found: str) -> NoReturn:
    raise StoreDamaged(f"{path}: {found}. Restore it from a backup of the workspace.")


def _read(path: Path) -> bytes:
    """Read a small regular file."""
    try:
        with open_regular(path) as stream:
            data = stream.read(MAX_KEY_BYTES + 1)
    except FileNotFoundError:
        _damaged(path, "is missing")
    except NotRegular:
        _damaged(path, "is not a regular file")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}). Check its permissions and the disk.") from None
    if len(data) > MAX_KEY_BYTES:
        _damaged(path, f"has more than {MAX_KEY_BYTES} bytes, too many for a key")
    return data


def _private_key(path: Path) -> object:
    """Whatever private key a file holds; None if none. What the parser complains of is not passed on."""
    try:
        return load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm, InternalError):  # the last one for some wrong key lengths
        return None


def _log_key(path: Path) -> Ed25519PrivateKey:
    key = _private_key(path)
    if not isinstance(key, Ed25519PrivateKey):
        _damaged(path, "is not an unencrypted Ed25519 private key in PEM")
    return key


def _model_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = _private_key(path)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        _damaged(path, "is not an unencrypted ECDSA P-256 private key in PEM")
    return key


def _model_public(key: ec.EllipticCurvePrivateKey) -> bytes:
    return public_pem(key.public_key())


def _create(
    private: Path, public: Path, generate: Callable[[], _K], load: Callable[[Path], _K], publish: Callable[[_K], bytes]
) -> None:
    """Make one key pair, or what is missing of it, the private half first."""
    if private.exists():
        key = load(private)
    elif public.exists():
        _damaged(private, f"is missing, but {public.name} is there")
    else:
        key = generate()
        write_atomic(private, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), mode=0o600)
    if not public.exists():
        write_atomic(public, publish(key))
    elif _read(public) != publish(key):
        raise UsageError(f"{public}: holds another key or name. Nothing was changed; keys are never replaced.")


def create_keys(folder: Path, name: str) -> None:
    """Make both key pairs; what is there already is kept, so that a call that was interrupted can be repeated.

    Args:
        folder: Gets mode 0700; its parent must exist.
        name: The lineage's public name, the origin of its log.

    Raises:
        UsageError: The name cannot be a key's, or the folder holds keys of another name.
        StoreDamaged: A private key is broken, or missing beside its public one: a new one would silently part what was
            signed from what will be.
        NoSpace: The disk is full or read-only.
    """
    require_key_name(name)
    with explained_space(folder):
        make_folder(folder)  # open to auditors: the private keys in it are their owner's alone
    _create(
        folder / LOG_KEY, folder / LOG_PUBLIC, Ed25519PrivateKey.generate, _log_key,
        lambda key: f"{vkey(name, key.public_key())}\n".encode(),
    )  # fmt: skip
    _create(
        folder / MODEL_KEY, folder / MODEL_PUBLIC, lambda: ec.generate_private_key(ec.SECP256R1()), _model_key,
        _model_public,
    )  # fmt: skip


def log_vkey(folder: Path) -> str:
    """The key that checks the log's notes, with the lineage's name in it.

    Raises:
        StoreDamaged: ``log.pub`` is missing or not one whole vkey.
        UsageError: It cannot be read.
    """
    path = folder / LOG_PUBLIC
    try:
        text = _read(path).decode()
    except UnicodeDecodeError:
        _damaged(path, "is not text")
    line, newline, rest = text.partition("\n")
    if not newline or rest:
        _damaged(path, "is not one line")
    try:
        parse_vkey(line)
    except StoreDamaged as error:
        raise StoreDamaged(f"{path}: {error}") from None
    return line


def model_public_key(folder: Path) -> bytes:
    """The key that checks model signatures, in PEM.

    Raises:
        StoreDamaged: ``model.pub`` is missing, not an ECDSA P-256 key, or not written as this product writes it.
        UsageError: It cannot be read.
    """
    path = folder / MODEL_PUBLIC
    pem = _read(path)
    try:
        key = load_public_key(pem)
    except StoreDamaged as error:
        raise StoreDamaged(f"{path}: {error}") from None
    if public_pem(key) != pem:
        _damaged(path, "holds more than the key, or in another form")
    return pem


def load_log_key(folder: Path) -> Ed25519PrivateKey:
    """The key that signs the log.

    Raises:
        StoreDamaged: It or ``log.pub`` is missing or broken, or they do not belong together: nobody could check what
            it signs.
        UsageError: It cannot be read.
    """
    key = _log_key(folder / LOG_KEY)
    if vkey(parse_vkey(log_vkey(folder)).name, key.public_key()) != log_vkey(folder):
        _damaged(folder / LOG_KEY, f"does not belong to {LOG_PUBLIC}")
    return key


def load_model_key(folder: Path) -> ec.EllipticCurvePrivateKey:
    """The key that signs models.

    Raises:
        StoreDamaged: It or ``model.pub`` is missing or broken, or they do not belong together.
        UsageError: It cannot be read.
    """
    key = _model_key(folder / MODEL_KEY)
    if _model_public(key) != model_public_key(folder):
        _damaged(folder / MODEL_KEY, f"does not belong to {MODEL_PUBLIC}")
    return key
