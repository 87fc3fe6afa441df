"""Signed notes and checkpoints: the published examples, every changed byte, and lines of other keys."""

from __future__ import annotations

import base64
import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import StoreDamaged, UsageError
from pipeline.notes import (
    MAX_NOTE_BYTES,
    Checkpoint,
    checkpoint_text,
    open_note,
    parse_vkey,
    read_checkpoint,
    sign_note,
    strict_base64,
    vkey,
)

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
NAME = "takedown-pipeline/0123456789abcdef"
VKEY = vkey(NAME, KEY.public_key())
CHECKPOINT = Checkpoint(NAME, 20852163, hashlib.sha256(b"root").digest())
NOTE = sign_note(checkpoint_text(CHECKPOINT), NAME, KEY)
WITNESS = sign_note("x\n", "witness.example/w1", OTHER).split("\n\n")[1]
"""A signature line of another key; what it signs does not matter."""


def _signed(text: str) -> str:
    return sign_note(text, NAME, KEY)


def _line(name: str, data: bytes) -> str:
    return f"— {name} {base64.b64encode(data).decode()}\n"


# --- published examples -----------------------------------------------------------------------------------


def test_the_example_of_the_specification_is_read() -> None:
    key = "example.com/foo+530d903a+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k"
    note = (
        "This is an example message.\n\n— example.com/foo "
        "Uw2QOkn8srV1yJGh2VYRlL1Tnagv1YEq6TfXppzi2ONncAlTgK7Ztg1ERYNZXsYjOBH3mFXmRKuwHjG1Yu72IneyaQM=\n"
    )
    assert open_note(note, key) == "This is an example message.\n"
    assert vkey("example.com/foo", parse_vkey(key).public_key) == key
    with pytest.raises(StoreDamaged, match="does not match the text"):
        open_note(note.replace("an example", "an Example"), key)


def test_the_example_of_the_reference_implementation_is_written() -> None:
    """golang.org/x/mod/sumdb/note publishes a private key and what it signs."""
    seed = base64.b64decode("AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz")[1:]
    key = Ed25519PrivateKey.from_private_bytes(seed)
    text = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
    line = (
        "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
    )
    assert sign_note(text, "PeterNeumann", key) == f"{text}\n{line}"
    assert (
        vkey("PeterNeumann", key.public_key()) == "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
    )


# --- notes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a\n", "\n", "a\n\nb\n", "a\n\n", "\n\n\n", "Wörter\n— x y\n", "a\x7f\n"])
def test_open_is_the_inverse_of_sign(text: str) -> None:
    note = _signed(text)
    assert open_note(note, VKEY) == open_note(note.encode(), VKEY) == text
    assert note == _signed(text)  # the same bytes each time


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters=[chr(c) for c in range(32) if c != 10])))
def test_any_text_survives(text: str) -> None:
    assert open_note(_signed(text + "\n"), VKEY) == text + "\n"


def test_every_flipped_bit_is_found() -> None:
    raw = NOTE.encode()
    for at in range(len(raw)):
        for bit in range(8):
            changed = bytearray(raw)
            changed[at] ^= 1 << bit
            with pytest.raises(StoreDamaged):
                open_note(bytes(changed), VKEY)


def test_every_exchanged_dropped_or_added_byte_is_found() -> None:
    raw = NOTE.encode()
    for at in range(len(raw) + 1):
        variants = [raw[:at], raw[:at] + raw[at + 1 :]] if at < len(raw) else []
        variants += [raw[:at] + extra + raw[at:] for extra in (b"\n", b" ", b"A", b"=", b"\0", b"\r", b"\xc2\xa0")]
        for changed in variants:
            with pytest.raises(StoreDamaged):
                open_note(changed, VKEY)


def test_lines_of_other_keys_are_ignored_and_not_trusted() -> None:
    head, ours = NOTE.split("\n\n")
    same_name = sign_note("x\n", NAME, OTHER).split("\n\n")[1]
    same_id = _line("someone.else", parse_vkey(VKEY).key_id + bytes(64))
    other_type = _line("post-quantum.example", bytes(4 + 2420))
    for lines in (ours + WITNESS, WITNESS + ours, same_name + ours, same_id + ours, ours + other_type, ours + ours):
        assert open_note(f"{head}\n\n{lines}", VKEY) == head + "\n"
    for lines in (WITNESS, same_name, same_id):
        with pytest.raises(StoreDamaged, match="has no signature of takedown-pipeline/0123456789abcdef with key"):
            open_note(f"{head}\n\n{lines}", VKEY)


def test_a_changed_line_of_a_witness_never_changes_the_text() -> None:
    raw = (NOTE + WITNESS).encode()
    outcomes = set()
    for at in range(len(NOTE.encode()), len(raw)):
        changed = bytearray(raw)
        changed[at] ^= 1
        try:
            outcomes.add(open_note(bytes(changed), VKEY))
        except StoreDamaged:
            outcomes.add("refused")
    assert outcomes == {checkpoint_text(CHECKPOINT), "refused"}


def test_one_bad_signature_of_the_key_spoils_the_note() -> None:
    bad = _line(NAME, parse_vkey(VKEY).key_id + bytes(64))
    short = _line(NAME, parse_vkey(VKEY).key_id + b"x")
    for line in (bad, short):
        with pytest.raises(StoreDamaged, match="does not match the text"):
            open_note(NOTE + line, VKEY)


def test_many_signatures_are_read_up_to_a_limit() -> None:
    assert open_note(NOTE + WITNESS * 99, VKEY) == checkpoint_text(CHECKPOINT)
    with pytest.raises(StoreDamaged, match="101 signature lines"):
        open_note(NOTE + WITNESS * 100, VKEY)


BAD_NOTES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "is not a text, an empty line"),
    "no signature": ("a\n", "is not a text, an empty line"),
    "no lines": ("a\n\n", "is not a text, an empty line"),
    "no empty line": (NOTE.replace("\n\n", "\n"), "is not a text, an empty line"),
    "no newline at the end": (NOTE[:-1], "each ended by a newline"),
    "carriage returns": (NOTE.replace("\n", "\r\n"), "characters that no note may have"),
    "a zero byte": ("\0" + NOTE, "characters that no note may have"),
    "a lone surrogate": ("\ud800" + NOTE, "characters that no note may have"),
    "latin-1": ("ä".encode("latin-1") + NOTE.encode(), "is not UTF-8 text"),
    "too long": ("a" * MAX_NOTE_BYTES + NOTE, "is longer than"),
    "a hyphen": (NOTE.replace("— ", "- "), "signature line 1 is not an em dash"),
    "a line without a key": (NOTE + "— x\n", "signature line 2 is not an em dash"),
    "an unnamed line": (NOTE + "—  AAAAAAA=\n", "signature line 2 is not an em dash"),
    "a plus in a name": (NOTE + "— a+b AAAAAAA=\n", "signature line 2 is not an em dash"),
    "a no-break space in a name": (NOTE + "— a\u00a0b AAAAAAA=\n", "signature line 2 is not an em dash"),
    "two spaces": (NOTE + "— a  AAAAAAA=\n", "signature line 2 is not an em dash"),
    "not base64": (NOTE + "— a AAAAAA!=\n", "signature line 2 is not base64"),
    "base64 not canonical": (NOTE + "— a AAAAAAB=\n", "signature line 2 is not base64"),
    "base64 of an id only": (NOTE + "— a AAAAAA==\n", "signature line 2 holds no signature"),
}


@pytest.mark.parametrize("name", BAD_NOTES)
def test_a_malformed_note_is_refused_with_a_reason(name: str) -> None:
    note, message = BAD_NOTES[name]
    with pytest.raises(StoreDamaged, match=message):
        open_note(note, VKEY)


@given(st.binary(max_size=80) | st.text(max_size=80) | st.text("—\n AB=+x", max_size=40))
def test_arbitrary_notes_are_refused_clearly(note: bytes | str) -> None:
    with pytest.raises(StoreDamaged, match="signed note: "):
        open_note(note, VKEY)


@pytest.mark.parametrize("text", ["", "a", "a\r\n", "a\tb\n", "\ud800\n"])
def test_what_cannot_be_a_note_is_not_signed(text: str) -> None:
    with pytest.raises(UsageError, match="needs a newline at its end"):
        _signed(text)


def test_a_note_nobody_would_read_is_not_signed() -> None:
    with pytest.raises(UsageError, match="Shorten it"):
        _signed("a" * MAX_NOTE_BYTES + "\n")


@pytest.mark.parametrize("name", ["", "a b", "a+b", "a\nb", "a\u2003b", "a\x01b", "\ud800"])
def test_a_name_that_no_line_can_hold_is_refused(name: str) -> None:
    for call in (lambda: vkey(name, KEY.public_key()), lambda: sign_note("a\n", name, KEY)):
        with pytest.raises(UsageError, match="key name"):
            call()


# --- verifier keys ----------------------------------------------------------------------------------------


def test_parse_is_the_inverse_of_vkey() -> None:
    key = parse_vkey(VKEY)
    assert (key.name, key.key_id.hex()) == (NAME, VKEY.split("+")[1])
    assert key.public_key == KEY.public_key()
    assert vkey(key.name, key.public_key) == VKEY


def _vkey(name: str, data: bytes) -> str:
    key_id = hashlib.sha256(name.encode() + b"\n" + data).digest()[:4]
    return f"{name}+{key_id.hex()}+{base64.b64encode(data).decode()}"


BAD_KEYS: dict[str, tuple[str, str]] = {
    "empty": ("", "expected name"),
    "name only": (NAME, "expected name"),
    "no key": (NAME + "+00000000", "expected name"),
    "no name": (VKEY.removeprefix(NAME), "expected name"),
    "a space in the name": ("a " + VKEY, "expected name"),
    "upper-case id": (NAME + VKEY.removeprefix(NAME).upper(), "expected name"),
    "another id": (VKEY.replace("+", "+0", 1)[: len(NAME) + 9] + VKEY[len(NAME) + 9 :], "says id 0"),
    "another name": ("x" + VKEY, "but name and key give"),
    "not base64": (VKEY[:-1] + "!", "is not base64"),
    "a newline": (VKEY + "\n", "is not base64"),
    "another type": (_vkey(NAME, b"\x02" + bytes(32)), "is not a key for Ed25519"),
    "a short key": (_vkey(NAME, b"\x01" + bytes(31)), "is not a key for Ed25519"),
    "nothing in it": (_vkey(NAME, b""), "is not a key for Ed25519"),
    "a surrogate": ("\ud800" + VKEY, "expected name"),
}


@pytest.mark.parametrize("name", BAD_KEYS)
def test_a_malformed_verifier_key_is_refused_with_a_reason(name: str) -> None:
    text, message = BAD_KEYS[name]
    with pytest.raises(StoreDamaged, match=message) as caught:
        parse_vkey(text)
    assert str(caught.value).isprintable()


def test_every_flipped_bit_of_a_verifier_key_is_found() -> None:
    for at in range(len(VKEY)):
        for bit in range(7):
            changed = VKEY[:at] + chr(ord(VKEY[at]) ^ (1 << bit)) + VKEY[at + 1 :]
            with pytest.raises(StoreDamaged):
                parse_vkey(changed)


@given(st.binary(max_size=12), st.text("ABQgw+/=", max_size=12))
def test_base64_has_one_spelling(data: bytes, text: str) -> None:
    assert strict_base64(base64.b64encode(data).decode()) == data
    try:
        decoded = strict_base64(text)
    except ValueError:
        return
    assert base64.b64encode(decoded).decode() == text


# --- checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 9, 10, 20852163, (1 << 63) - 1])
def test_a_checkpoint_survives(size: int) -> None:
    checkpoint = Checkpoint(NAME, size, CHECKPOINT.root)
    text = checkpoint_text(checkpoint)
    assert text == f"{NAME}\n{size}\n{base64.b64encode(CHECKPOINT.root).decode()}\n"
    assert read_checkpoint(_signed(text), VKEY) == checkpoint
    assert read_checkpoint((_signed(text) + WITNESS).encode(), VKEY) == checkpoint


ROOT = base64.b64encode(CHECKPOINT.root).decode()
BAD_CHECKPOINTS: dict[str, tuple[str, str]] = {
    "another origin": (f"takedown-pipeline/other\n5\n{ROOT}\n", "is about the log 'takedown-pipeline/other'"),
    "an empty origin": (f"\n5\n{ROOT}\n", "is about the log ''"),
    "two lines": (f"{NAME}\n5\n", "not an origin, a decimal size and a root"),
    "an extension line": (f"{NAME}\n5\n{ROOT}\nmore\n", "not an origin, a decimal size and a root"),
    "an empty line": (f"{NAME}\n5\n{ROOT}\n\n", "not an origin, a decimal size and a root"),
    "a leading zero": (f"{NAME}\n05\n{ROOT}\n", "not an origin, a decimal size and a root"),
    "a sign": (f"{NAME}\n+5\n{ROOT}\n", "not an origin, a decimal size and a root"),
    "a space": (f"{NAME}\n5 \n{ROOT}\n", "not an origin, a decimal size and a root"),
    "other digits": (f"{NAME}\n٥\n{ROOT}\n", "not an origin, a decimal size and a root"),
    "an underscore": (f"{NAME}\n1_0\n{ROOT}\n", "not an origin, a decimal size and a root"),
    "too large": (f"{NAME}\n{1 << 63}\n{ROOT}\n", "not an origin, a decimal size and a root"),
    "endless digits": (f"{NAME}\n{'9' * 5000}\n{ROOT}\n", "not an origin, a decimal size and a root"),
    "a root in hex": (f"{NAME}\n5\n{CHECKPOINT.root.hex()}\n", "its root has 48 bytes"),
    "a root not canonical": (f"{NAME}\n5\n{ROOT[:-2]}B=\n", "its root is not base64"),
    "a short root": (f"{NAME}\n5\nAAAA\n", "its root has 3 bytes"),
}


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_a_signed_text_that_is_no_checkpoint_is_refused(name: str) -> None:
    text, message = BAD_CHECKPOINTS[name]
    with pytest.raises(StoreDamaged, match=message):
        read_checkpoint(_signed(text), VKEY)


def test_a_checkpoint_of_another_key_is_refused() -> None:
    with pytest.raises(StoreDamaged, match="has no signature"):
        read_checkpoint(sign_note(checkpoint_text(CHECKPOINT), NAME, OTHER), VKEY)


@pytest.mark.parametrize(
    "checkpoint",
    [CHECKPOINT._replace(size=-1), CHECKPOINT._replace(size=1 << 63), CHECKPOINT._replace(root=b""),
     CHECKPOINT._replace(origin=""), CHECKPOINT._replace(origin="a\nb")],
)  # fmt: skip
def test_what_cannot_be_a_checkpoint_is_not_written(checkpoint: Checkpoint) -> None:
    with pytest.raises(UsageError):
        checkpoint_text(checkpoint)
