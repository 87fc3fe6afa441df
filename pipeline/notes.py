"""Signed notes and checkpoints: what a log says of itself, in the text formats that transparency logs share.

In: a text and a key. Out: the text with a signature line, or the text of a note whose signature holds. Never: a text
whose signature was not checked, a key's private half.

The formats are C2SP's (https://c2sp.org/signed-note, https://c2sp.org/tlog-checkpoint), so that a log's checkpoints can
be checked, kept and cosigned by tools that know nothing of this product. Only Ed25519 (type 0x01) is made and checked.
Stricter than they ask: base64 must be canonical and a line that is no signature makes a note malformed, so that no two
byte strings are the same note.
"""

from __future__ import annotations

import base64
import hashlib
import re
from typing import NamedTuple, NoReturn

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from pipeline.errors import StoreDamaged, UsageError
from pipeline.merkle import HASH_BYTES

MAX_NOTE_BYTES = 1 << 20
"""Far above a checkpoint (about 200 bytes) with the cosignatures of many witnesses (up to 5 kB each)."""
MAX_SIGNATURES = 100
"""The format asks for 16 at least; Go's reference reader takes 100."""
MAX_SIZE = (1 << 63) - 1
"""Largest number of leaves."""

ED25519 = b"\x01"
KEY_ID_BYTES = 4
PUBLIC_KEY_BYTES = 32

_SIGNATURE = "— "
_DECIMAL = re.compile(r"0|[1-9][0-9]{0,18}")
_HEX_ID = re.compile(r"[0-9a-f]{8}")


class VerifierKey(NamedTuple):
    """A parsed vkey: who signs, and the key that checks it. Name and id together say which lines are its own."""

    name: str
    key_id: bytes
    public_key: Ed25519PublicKey


class Checkpoint(NamedTuple):
    """The state of a log: its name, the number of its entries and the root over them (32 bytes)."""

    origin: str
    size: int
    root: bytes


def strict_base64(text: str) -> bytes:
    """Decode canonical base64: the inverse of encoding, and of nothing else.

    Raises:
        ValueError: Another alphabet, missing padding, or padding bits that are not zero.
    """
    data = base64.b64decode(text, validate=True)
    if base64.b64encode(data).decode() != text:
        raise ValueError("the base64 is not canonical")
    return data


def is_key_name(name: str) -> bool:
    """Whether a name can stand in a signature line: Unicode without spaces, control characters and ``+``."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return name != "" and not any(c == "+" or c.isspace() or c < " " for c in name)


def require_key_name(name: str) -> None:
    """Refuse a name that `is_key_name` does not take.

    Raises:
        UsageError: Says what a name needs.
    """
    if not is_key_name(name):
        raise UsageError(f"key name {name!r}: needs at least one character and no space or '+'. Choose another one.")


def _key_id(name: str, public_key: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\n" + ED25519 + public_key).digest()[:KEY_ID_BYTES]


def vkey(name: str, public_key: Ed25519PublicKey) -> str:
    """The verifier key to publish: name, key id in hex and base64 of 0x01 ‖ key, joined by ``+``.

    Raises:
        UsageError: The name cannot stand in a signature line.
    """
    require_key_name(name)
    raw = public_key.public_bytes_raw()
    return f"{name}+{_key_id(name, raw).hex()}+{base64.b64encode(ED25519 + raw).decode()}"


def parse_vkey(text: str) -> VerifierKey:
    """Read a verifier key; the inverse of `vkey`.

    Raises:
        StoreDamaged: It is not one of an Ed25519 key, or its parts do not belong together.
    """

    def damaged(found: str) -> NoReturn:
        raise StoreDamaged(f"verifier key {text[:200]!r}: {found}. Use the whole line from the log's `log.pub`.")

    name, *parts = text.split("+", 2)  # base64 may hold further ones
    if len(parts) != 2 or not is_key_name(name) or not _HEX_ID.fullmatch(parts[0]):
        damaged("expected name+id+key, the id as 8 lower-case hexadecimal digits")
    try:
        data = strict_base64(parts[1])
    except ValueError as error:
        damaged(f"its key is not base64 ({error})")
    if len(data) != 1 + PUBLIC_KEY_BYTES or data[:1] != ED25519:
        damaged("is not a key for Ed25519 (type 1, 32 bytes)")
    key_id = _key_id(name, data[1:])
    if key_id.hex() != parts[0]:
        damaged(f"says id {parts[0]}, but name and key give {key_id.hex()}")
    return VerifierKey(name, key_id, Ed25519PublicKey.from_public_bytes(data[1:]))


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return not any(c < " " and c != "\n" for c in text)


def sign_note(text: str, name: str, private_key: Ed25519PrivateKey) -> str:
    """Sign a text. Ed25519 is deterministic: the same text, name and key give the same note.

    Args:
        text: Ends in a newline; no other control characters.
        name: Name of the key.
        private_key: The key.

    Returns:
        The text, an empty line and one signature line: em dash, name, base64 of key id ‖ signature.

    Raises:
        UsageError: Text or name cannot stand in a note.
    """
    require_key_name(name)
    if not text.endswith("\n") or not _is_text(text):
        raise UsageError("text of a note: needs a newline at its end and no other control character. Change the text.")
    key_id = _key_id(name, private_key.public_key().public_bytes_raw())
    signature = base64.b64encode(key_id + private_key.sign(text.encode())).decode()
    note = f"{text}\n{_SIGNATURE}{name} {signature}\n"
    if len(note.encode()) > MAX_NOTE_BYTES:
        raise UsageError(f"text of a note: makes a note of more than {MAX_NOTE_BYTES} bytes. Shorten it.")
    return note


def _damaged(found: str) -> NoReturn:
    raise StoreDamaged(f"signed note: {found}. Fetch it again from its source, or restore it from a backup.")


def _decode(note: str | bytes) -> str:
    """The note as text: not too long, UTF-8, no control characters but newlines."""
    if len(note) > MAX_NOTE_BYTES:
        _damaged(f"is longer than {MAX_NOTE_BYTES} bytes")
    try:
        text = note.decode() if isinstance(note, bytes) else note
    except UnicodeDecodeError as error:
        _damaged(f"is not UTF-8 text ({error.reason} at byte {error.start})")
    if not _is_text(text):
        _damaged("has characters that no note may have")
    return text


def _parse_signature(number: int, line: str) -> tuple[str, bytes, bytes]:
    """Name, key id and signature bytes of a signature line."""
    name, *rest = line.removeprefix(_SIGNATURE).split(" ")
    if not line.startswith(_SIGNATURE) or len(rest) != 1 or not is_key_name(name):
        _damaged(f"signature line {number} is not an em dash, a name and a signature, with one space between")
    try:
        data = strict_base64(rest[0])
    except ValueError as error:
        _damaged(f"signature line {number} is not base64 ({error})")
    if len(data) <= KEY_ID_BYTES:
        _damaged(f"signature line {number} holds no signature")
    return name, data[:KEY_ID_BYTES], data[KEY_ID_BYTES:]


def open_note(note: str | bytes, vkey: str) -> str:
    """Check a note and return its text.

    Lines of other keys, say of witnesses, need the right form and are not checked further.

    Args:
        note: The whole note; hostile.
        vkey: The key that must have signed; trusted.

    Returns:
        The signed text, with its final newline.

    Raises:
        StoreDamaged: The note is malformed, the key did not sign it, or a line in its name does not hold.
    """
    key = parse_vkey(vkey)
    head, found, tail = _decode(note).rpartition("\n\n")
    if not found or not tail.endswith("\n"):
        _damaged("is not a text, an empty line and signature lines, each ended by a newline")
    lines = tail[:-1].split("\n")
    if len(lines) > MAX_SIGNATURES:
        _damaged(f"has {len(lines)} signature lines, at most {MAX_SIGNATURES} are read")
    text = head + "\n"
    signed = False
    for number, line in enumerate(lines, 1):
        name, key_id, signature = _parse_signature(number, line)
        if (name, key_id) != (key.name, key.key_id):
            continue
        try:
            key.public_key.verify(signature, text.encode())
        except InvalidSignature:
            _damaged(f"the signature of {key.name} does not match the text: one of them was changed")
        signed = True
    if not signed:
        raise StoreDamaged(
            f"signed note: has no signature of {key.name} with key {key.key_id.hex()}. "
            "Check that this is the key of the log that the note belongs to."
        )
    return text


def checkpoint_text(checkpoint: Checkpoint) -> str:
    """The text of a checkpoint: origin, size in decimal and root in base64, a line each.

    Raises:
        UsageError: The origin cannot be a key name, or size or root are out of range.
    """
    require_key_name(checkpoint.origin)
    if not 0 <= checkpoint.size <= MAX_SIZE or len(checkpoint.root) != HASH_BYTES:
        raise UsageError(
            f"checkpoint of {checkpoint.origin}: size {checkpoint.size} and a root of {len(checkpoint.root)} bytes, "
            f"expected 0 to 2^63 - 1 and {HASH_BYTES}. Take both from a log."
        )
    return f"{checkpoint.origin}\n{checkpoint.size}\n{base64.b64encode(checkpoint.root).decode()}\n"


def read_checkpoint(note: str | bytes, vkey: str) -> Checkpoint:
    """Check a signed checkpoint and read it.

    The format allows extension lines; our logs write none, so a checkpoint with some is refused, and so is one whose
    origin is not the name of the key.

    Args:
        note: The whole note; hostile.
        vkey: The log's key; trusted.

    Raises:
        StoreDamaged: See `open_note`, or the signed text is not a checkpoint of this log.
    """
    origin, *rest = open_note(note, vkey)[:-1].split("\n")
    name = parse_vkey(vkey).name
    if origin != name:
        _damaged(f"is about the log {origin[:200]!r}, expected {name}")
    if len(rest) != 2 or not _DECIMAL.fullmatch(rest[0]) or int(rest[0]) > MAX_SIZE:
        _damaged("its text is not an origin, a decimal size and a root, a line each")
    try:
        root = strict_base64(rest[1])
    except ValueError as error:
        _damaged(f"its root is not base64 ({error})")
    if len(root) != HASH_BYTES:
        _damaged(f"its root has {len(root)} bytes, expected {HASH_BYTES}")
    return Checkpoint(origin, int(rest[0]), root)
