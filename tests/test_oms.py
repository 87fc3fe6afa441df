"""Model signatures: every change is refused, hostile bundles are refused clearly, and the public tool agrees.

Where ``TAKEDOWN_MODEL_SIGNING`` names a Python that has ``model-signing`` 1.1 and ``pyOpenSSL`` (it does not start
without the latter), or ours has them, real folders go through its command line in both directions.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import oms
from pipeline.errors import StoreDamaged, UsageError
from pipeline.files import digest_bytes, digest_file
from pipeline.oms import IGNORED, SIGNATURE_FILE, check_model_signature, load_public_key, model_signature, public_pem

NAME = "takedown-pipeline/0123456789abcdef"
KEY = ec.derive_private_key(0xC9AFA9D845BA75166B5C215767B1D6934E50C3DB36E89B127B8A622B120F6721, ec.SECP256R1())
"""The private key of RFC 6979, appendix A.2.5: published, so never one of ours."""
PEM = public_pem(KEY.public_key())
OTHER = ec.derive_private_key(7, ec.SECP256R1())
FILES = {"config.json": digest_bytes(b"{}"), "model.safetensors": digest_bytes(b"weights"), "a/ü b": digest_bytes(b"")}
BUNDLE = model_signature(FILES, NAME, KEY)


def _statement(bundle: bytes) -> dict[str, Any]:
    return json.loads(base64.b64decode(json.loads(bundle)["dsseEnvelope"]["payload"]))


def _sign_again(payload: bytes, key: ec.EllipticCurvePrivateKey = KEY) -> bytes:
    """A bundle whose signature is right, whatever its payload says; made apart from the code under test."""
    tree = json.loads(BUNDLE)
    signed = f"DSSEv1 28 application/vnd.in-toto+json {len(payload)} ".encode() + payload
    signature = base64.b64encode(key.sign(signed, ec.ECDSA(hashes.SHA256()))).decode()
    tree["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
    tree["dsseEnvelope"]["signatures"] = [{"sig": signature}]
    return json.dumps(tree).encode()


# --- what is signed ---------------------------------------------------------------------------------------


def test_a_signature_holds_and_is_the_same_each_time() -> None:
    check_model_signature(BUNDLE, FILES, PEM)
    assert model_signature(dict(reversed(FILES.items())), NAME, KEY) == BUNDLE
    assert model_signature(FILES, "another name", KEY) != BUNDLE
    # Of this release. A change here makes every version's signature another file: it needs a reason and a note.
    assert digest_bytes(BUNDLE) == "sha256:cb291cb6edc16d1012132ec65ddfe97742b6083a2cf25f73e2ec7bf3a5c9f786"


def test_the_statement_is_that_of_the_specification() -> None:
    digests = [FILES[path].removeprefix("sha256:") for path in sorted(FILES)]
    assert _statement(BUNDLE) == {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": NAME, "digest": {"sha256": hashlib.sha256(bytes.fromhex("".join(digests))).hexdigest()}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {
            "resources": [
                {"name": path, "algorithm": "sha256", "digest": digest}
                for path, digest in zip(["a/ü b", "config.json", "model.safetensors"], digests, strict=True)
            ],
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": [".git", ".gitattributes", ".github", ".gitignore", "model.sig"],
            },
        },
    }
    tree = json.loads(BUNDLE)
    assert tree["mediaType"] == "application/vnd.dev.sigstore.bundle.v0.3+json"
    assert tree["verificationMaterial"] == {"publicKey": {"hint": hashlib.sha256(PEM).hexdigest()}, "tlogEntries": []}
    assert tree["dsseEnvelope"]["payloadType"] == "application/vnd.in-toto+json"


def test_files_that_the_format_excludes_are_left_out() -> None:
    more = dict.fromkeys([*IGNORED, ".git/config", ".github/a/b"], digest_bytes(b"x"))
    assert model_signature(FILES | more, NAME, KEY) == BUNDLE
    check_model_signature(BUNDLE, FILES | more, PEM)
    for path in ("sub/.gitignore", "sub/model.sig", ".gitmodules"):
        signed = model_signature(FILES | {path: digest_bytes(b"x")}, NAME, KEY)
        assert path in {resource["name"] for resource in _statement(signed)["predicate"]["resources"]}


PATHS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=4).filter(
    lambda part: part not in (".", "..", *IGNORED)
)


@settings(deadline=None)
@given(st.dictionaries(st.lists(PATHS, min_size=1, max_size=3).map("/".join), st.binary(max_size=2), min_size=1))
def test_any_files_can_be_signed_and_no_others_match(contents: dict[str, bytes]) -> None:
    files = {path: digest_bytes(data) for path, data in contents.items()}
    bundle = model_signature(files, NAME, KEY)
    check_model_signature(bundle, files, PEM)
    first = min(files)
    for other in (files | {first: digest_bytes(b"other")}, files | {"new/path/of/a/file": digest_bytes(b"")}):
        with pytest.raises(StoreDamaged):
            check_model_signature(bundle, other, PEM)
    with pytest.raises(StoreDamaged):
        check_model_signature(bundle, {path: digest for path, digest in files.items() if path != first}, PEM)


@pytest.mark.parametrize("path", ["", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", "./a", "a\0b", "\ud800"])
def test_a_path_that_is_not_normal_is_not_signed(path: str) -> None:
    with pytest.raises(UsageError, match="cannot be signed"):
        model_signature({path: digest_bytes(b"")}, NAME, KEY)


@pytest.mark.parametrize(
    "digest",
    ["", "ab" * 32, "sha256:" + "AB" * 32, "sha256:" + "ab" * 31, digest_bytes(b"") + "\n", "sha512:" + "a" * 64],
)
def test_a_digest_of_another_form_is_not_signed(digest: str) -> None:
    with pytest.raises(UsageError, match="cannot be signed"):
        model_signature({"a": digest}, NAME, KEY)


def test_nothing_is_signed_without_files_name_or_the_right_key() -> None:
    for files, name in (({}, NAME), ({".gitignore": digest_bytes(b"")}, NAME), (FILES, ""), (FILES, "\ud800")):
        with pytest.raises(UsageError, match="needs a name and at least one file"):
            model_signature(files, name, KEY)
    with pytest.raises(UsageError, match="on the curve secp384r1"):
        model_signature(FILES, NAME, ec.generate_private_key(ec.SECP384R1()))


def test_more_files_than_a_reader_takes_are_not_signed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oms, "MAX_BUNDLE_BYTES", len(BUNDLE) - 1)
    with pytest.raises(UsageError, match="3 files need more than"):
        model_signature(FILES, NAME, KEY)
    with pytest.raises(StoreDamaged, match=f"has {len(BUNDLE)} bytes, the limit is"):
        check_model_signature(BUNDLE, FILES, PEM)


# --- what is refused --------------------------------------------------------------------------------------


def test_other_files_are_refused_and_named() -> None:
    changed = FILES | {"config.json": digest_bytes(b"x")}
    with pytest.raises(StoreDamaged, match=r"was made for another content of 'config\.json'"):
        check_model_signature(BUNDLE, changed, PEM)
    with pytest.raises(StoreDamaged, match="does not cover 'extra'"):
        check_model_signature(BUNDLE, FILES | {"extra": digest_bytes(b"")}, PEM)
    with pytest.raises(StoreDamaged, match=r"covers files that the model does not have: 'model\.safetensors'"):
        check_model_signature(BUNDLE, {p: d for p, d in FILES.items() if p != "model.safetensors"}, PEM)
    many = {str(i): digest_bytes(b"") for i in range(12)}
    with pytest.raises(StoreDamaged, match="does not cover '0', '1', '10', '11', '2' and 7 more"):
        check_model_signature(BUNDLE, FILES | many, PEM)


def test_another_key_is_refused() -> None:
    with pytest.raises(StoreDamaged, match="was made with another key"):
        check_model_signature(BUNDLE, FILES, public_pem(OTHER.public_key()))
    forged = _sign_again(base64.b64decode(json.loads(BUNDLE)["dsseEnvelope"]["payload"]), OTHER)  # under our hint
    with pytest.raises(StoreDamaged, match="signature does not match"):
        check_model_signature(forged, FILES, PEM)


def test_every_flipped_bit_is_found() -> None:
    for at in range(len(BUNDLE)):
        for bit in (0, 1, 5):  # 1 and 2: the neighbours in any alphabet; 32: the other case
            changed = bytearray(BUNDLE)
            changed[at] ^= 1 << bit
            with pytest.raises(StoreDamaged):
                check_model_signature(bytes(changed), FILES, PEM)


def test_every_cut_is_found() -> None:
    for end in range(len(BUNDLE)):
        with pytest.raises(StoreDamaged, match="is not JSON"):
            check_model_signature(BUNDLE[:end], FILES, PEM)


Change = Callable[[dict[str, Any]], object]

BAD_BUNDLES: dict[str, tuple[Change, str]] = {
    "no envelope": (lambda t: t.pop("dsseEnvelope"), "dsseEnvelope"),
    "no material": (lambda t: t.pop("verificationMaterial"), "verificationMaterial"),
    "another format": (lambda t: t.update(mediaType="application/vnd.dev.sigstore.bundle.v0.2+json"), "mediaType"),
    "an unknown field": (lambda t: t.update({"ö\n": 1}), "Extra inputs"),
    "a field that is no text": (lambda t: t.update({"\ud800x": 1}), "unicode string"),
    "a certificate": (lambda t: t["verificationMaterial"].update(certificate={}), "certificate"),
    "a log entry": (lambda t: t["verificationMaterial"].update(tlogEntries=[{}]), "tlogEntries"),
    "no hint": (lambda t: t["verificationMaterial"].update(publicKey={}), "hint"),
    "a hint that is no digest": (lambda t: t["verificationMaterial"]["publicKey"].update(hint="x"), "hint"),
    "a hint with a newline": (
        lambda t: t["verificationMaterial"]["publicKey"].update(hint="ab" * 32 + "\n"), "hint"
    ),
    "another payload type": (lambda t: t["dsseEnvelope"].update(payloadType="text/plain"), "payloadType"),
    "no signature": (lambda t: t["dsseEnvelope"].update(signatures=[]), "signatures"),
    "two signatures": (lambda t: t["dsseEnvelope"]["signatures"].append({"sig": "AAAA"}), "signatures"),
    "a key id": (lambda t: t["dsseEnvelope"]["signatures"][0].update(keyid="x"), "keyid"),
    "an empty signature": (lambda t: t["dsseEnvelope"]["signatures"][0].update(sig=""), "signature does not match"),
    "a signature not in base64": (lambda t: t["dsseEnvelope"]["signatures"][0].update(sig="é"), "sig is not base64"),
    "a signature that is no text": (lambda t: t["dsseEnvelope"]["signatures"][0].update(sig=1), "sig"),
    "a surrogate": (lambda t: t["dsseEnvelope"]["signatures"][0].update(sig="\udc80"), "sig"),
    "a payload that is no base64": (lambda t: t["dsseEnvelope"].update(payload="AAA"), "payload is not base64"),
    "another payload": (lambda t: t["dsseEnvelope"].update(payload="AAAA"), "signature does not match"),
    "a list for an object": (lambda t: t.update(dsseEnvelope=[]), "dsseEnvelope"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_BUNDLES)
def test_a_malformed_bundle_is_refused_with_a_reason(name: str) -> None:
    change, message = BAD_BUNDLES[name]
    tree = json.loads(BUNDLE)
    change(tree)
    with pytest.raises(StoreDamaged, match=message) as caught:
        check_model_signature(json.dumps(tree).encode(), FILES, PEM)
    assert str(caught.value).isprintable() and str(caught.value).startswith("model signature (model.sig): ")


def _first(tree: dict[str, Any]) -> dict[str, Any]:
    return tree["predicate"]["resources"][0]


BAD_STATEMENTS: dict[str, tuple[Change, str]] = {
    "another statement type": (lambda t: t.update(_type="https://in-toto.io/Statement/v0.1"), "_type"),
    "the type under another name": (lambda t: t.update(type_=t.pop("_type")), "_type"),
    "an old predicate": (lambda t: t.update(predicateType="https://model_signing/Digests/v0.1"), "predicateType"),
    "no subject": (lambda t: t.update(subject=[]), "subject"),
    "two subjects": (lambda t: t["subject"].append(t["subject"][0]), "subject"),
    "an unnamed subject": (lambda t: t["subject"][0].update(name=""), "name"),
    "another root": (lambda t: t["subject"][0]["digest"].update(sha256="ab" * 32), "root digest"),
    "shards": (lambda t: t["predicate"]["serialization"].update(method="shards", shard_size=1), "method"),
    "another hash": (lambda t: t["predicate"]["serialization"].update(hash_type="blake3"), "hash_type"),
    "links followed": (lambda t: t["predicate"]["serialization"].update(allow_symlinks=True), "to follow links"),
    "a number for no": (lambda t: t["predicate"]["serialization"].update(allow_symlinks=0), "allow_symlinks"),
    "weights ignored": (
        lambda t: t["predicate"]["serialization"].update(ignore_paths=["model.safetensors"]),
        "tells other tools to ignore 'model.safetensors'",
    ),
    "the same file twice": (lambda t: t["predicate"]["resources"].append(dict(_first(t))), "lists a file twice"),
    "an upper-case digest": (lambda t: _first(t).update(digest="AB" * 32), "digest"),
    "a short digest": (lambda t: _first(t).update(digest="ab"), "digest"),
    "another algorithm": (lambda t: _first(t).update(algorithm="blake2b"), "algorithm"),
    "a file renamed": (lambda t: _first(t).update(name="b"), "does not cover 'a/"),
    "no files": (lambda t: t["predicate"].update(resources=[]), "root digest"),
    "more predicates": (lambda t: t["predicate"].update(more=1), "more"),
}


@pytest.mark.parametrize("name", BAD_STATEMENTS)
def test_a_signed_statement_that_says_something_else_is_refused(name: str) -> None:
    change, message = BAD_STATEMENTS[name]
    tree = _statement(BUNDLE)
    change(tree)
    with pytest.raises(StoreDamaged, match=message):
        check_model_signature(_sign_again(json.dumps(tree).encode()), FILES, PEM)


def test_other_writers_may_differ_where_the_specification_lets_them() -> None:
    tree = _statement(BUNDLE)
    tree["predicate"]["serialization"].pop("ignore_paths")
    tree["subject"][0]["name"] = "model"
    _first(tree)["uri"] = "file:///a"
    check_model_signature(_sign_again(json.dumps(tree, indent=2).encode()), FILES, PEM)
    bundle = json.loads(BUNDLE)
    del bundle["verificationMaterial"]["tlogEntries"]
    for keyid in ({}, {"keyid": ""}, {"keyid": None}):
        bundle["dsseEnvelope"]["signatures"] = [{"sig": bundle["dsseEnvelope"]["signatures"][0]["sig"]} | keyid]
        check_model_signature(json.dumps(bundle).encode(), FILES, PEM)


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"null", b"1", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, BUNDLE + b"{}",
            BUNDLE[:-1] + b"," + BUNDLE[1:], b"\xef\xbb\xbf" + BUNDLE],
    ids=range(11),
)  # fmt: skip
def test_what_is_no_bundle_is_refused(raw: bytes) -> None:
    with pytest.raises(StoreDamaged, match=r"model signature \(model\.sig\): "):
        check_model_signature(raw, FILES, PEM)
    with pytest.raises(StoreDamaged, match=r"model signature \(model\.sig\): "):
        check_model_signature(_sign_again(raw), FILES, PEM)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a tree."""
    pairs = list(tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ())
    return [(tree, key) for key, _ in pairs] + [place for _, value in pairs for place in _places(value)]


@settings(max_examples=300, deadline=None)
@given(st.data(), JSON, st.booleans())
def test_any_value_in_any_place_is_refused_or_harmless(data: st.DataObject, value: Any, inner: bool) -> None:
    tree = _statement(BUNDLE) if inner else json.loads(BUNDLE)
    container, key = data.draw(st.sampled_from(_places(tree)))
    container[key] = value
    raw = json.dumps(tree).encode()
    try:
        check_model_signature(_sign_again(raw) if inner else raw, FILES, PEM)
    except StoreDamaged:
        return
    # Accepted: then it was a field that only informs, and the files are still all there.
    before = _statement(BUNDLE)
    if inner:
        assert tree["predicate"]["resources"] == before["predicate"]["resources"]
        assert tree["subject"][0]["digest"] == before["subject"][0]["digest"]
    else:
        assert tree["dsseEnvelope"]["payload"] == json.loads(BUNDLE)["dsseEnvelope"]["payload"]


@pytest.mark.parametrize(
    "pem",
    [b"", b"x", b"\xff" * 100, PEM[:-30], public_pem(ec.generate_private_key(ec.SECP384R1()).public_key()),
     Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
     KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())],
    ids=["empty", "text", "bytes", "cut", "P-384", "Ed25519", "private"],
)  # fmt: skip
def test_a_public_key_of_another_kind_is_refused(pem: bytes) -> None:
    with pytest.raises(StoreDamaged, match="is not an ECDSA P-256 key in PEM"):
        check_model_signature(BUNDLE, FILES, pem)
    assert public_pem(load_public_key(PEM)) == PEM


# --- the public tool --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tool() -> str:
    """A Python that has the public tool."""
    named = os.environ.get("TAKEDOWN_MODEL_SIGNING")
    if not named and importlib.util.find_spec("model_signing") is None:
        pytest.skip("no model-signing here; TAKEDOWN_MODEL_SIGNING can name a Python that has it")
    return named or sys.executable


class Run:
    """Exit code and output of one call of the tool."""

    def __init__(self, tool: str, *arguments: str | Path) -> None:
        done = subprocess.run(
            [tool, "-m", "model_signing", *map(str, arguments)], capture_output=True, text=True, timeout=120
        )
        self.code = done.returncode
        self.output = done.stdout + done.stderr


def _verify(tool: str, folder: Path, public_key: Path) -> Run:
    return Run(tool, "verify", "key", folder, "--signature", folder / SIGNATURE_FILE, "--public_key", public_key)


def _digests(folder: Path) -> Mapping[str, str]:
    return {p.relative_to(folder).as_posix(): digest_file(p) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A signed folder with what trips up signers: an empty file, folders, Unicode, orders that differ, Git's files."""
    folder = tmp_path / "model"
    for name in ("config.json", "model.safetensors", "empty", "sub/x", "sub-x", "sub/.gitignore", "ü b.txt",
                 ".gitattributes", ".git/config"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"" if name == "empty" else name.encode() * 50)
    (folder / SIGNATURE_FILE).write_bytes(model_signature(_digests(folder), NAME, KEY))
    return folder


@pytest.fixture
def public_key(tmp_path: Path) -> Path:
    (tmp_path / "model.pub").write_bytes(PEM)
    return tmp_path / "model.pub"


def _flip(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[100] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def _edit_signature(folder: Path) -> None:
    tree = json.loads((folder / SIGNATURE_FILE).read_bytes())
    statement = base64.b64decode(tree["dsseEnvelope"]["payload"]).replace(b"takedown", b"Takedown")
    tree["dsseEnvelope"]["payload"] = base64.b64encode(statement).decode()
    (folder / SIGNATURE_FILE).write_text(json.dumps(tree))


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (_flip, "Hash mismatch for 'model.safetensors'"),
    "an extra file": (lambda folder: (folder / "extra").write_bytes(b""), "Extra files found in model 'model': extra"),
    "a missing file": (lambda folder: (folder / "config.json").unlink(), "Missing files in model"),
    "a renamed file": (lambda folder: (folder / "empty").rename(folder / "void"), "Missing files in model"),
    "an edited signature": (_edit_signature, "Verification failed"),
}


@pytest.mark.slow
def test_the_tool_accepts_what_we_sign(tool: str, model: Path, public_key: Path) -> None:
    done = _verify(tool, model, public_key)
    assert (done.code, "Verification succeeded" in done.output) == (0, True), done.output
    check_model_signature((model / SIGNATURE_FILE).read_bytes(), _digests(model), PEM)


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_the_tool_refuses_what_we_refuse(tool: str, model: Path, public_key: Path, name: str) -> None:
    change, message = REFUSED[name]
    change(model)
    done = _verify(tool, model, public_key)
    assert done.code == 1 and "Verification failed" in done.output and message in done.output, done.output
    assert "succeeded" not in done.output
    with pytest.raises(StoreDamaged):
        check_model_signature((model / SIGNATURE_FILE).read_bytes(), _digests(model), PEM)


@pytest.mark.slow
def test_the_tool_refuses_another_key(tool: str, model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pub"
    other.write_bytes(public_pem(OTHER.public_key()))
    done = _verify(tool, model, other)
    assert done.code == 1 and "Key mismatch" in done.output and "succeeded" not in done.output, done.output


@pytest.mark.slow
def test_we_accept_what_the_tool_signs(tool: str, model: Path, tmp_path: Path) -> None:
    private = tmp_path / "model.key"
    private.write_bytes(KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    signature = model / SIGNATURE_FILE
    signature.unlink()
    done = Run(tool, "sign", "key", model, "--private_key", private, "--signature", signature)
    assert done.code == 0, done.output
    check_model_signature(signature.read_bytes(), _digests(model), PEM)
    _flip(model)
    with pytest.raises(StoreDamaged, match=r"another content of 'model\.safetensors'"):
        check_model_signature(signature.read_bytes(), _digests(model), PEM)
