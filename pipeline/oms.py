"""Sign a model's files so that tools which know nothing of this product can check them.

In: the digests of the files, known already, and a key. Out: an OpenSSF Model Signing bundle, or an error that says how
one differs from the files. Never: a file opened, a network, a private key in a message.

OpenSSF Model Signing 1.0 (https://github.com/ossf/model-signing-spec): a JSON bundle of Sigstore around a DSSE envelope
around an in-toto statement that lists every file with its SHA-256, signed by an ECDSA P-256 key. The nonce is derived
from the message (RFC 6979), so the same files, name and key give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final, Literal, NoReturn, TypeVar

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import StoreDamaged, UsageError
from pipeline.files import canonical_json
from pipeline.notes import strict_base64

SIGNATURE_FILE = "model.sig"
"""Name of the bundle in the model's folder."""

IGNORED = (".git", ".gitattributes", ".github", ".gitignore", SIGNATURE_FILE)
"""Names at the top of the folder that no signature covers (specification, section 6.2); the bundle lists them."""

MAX_BUNDLE_BYTES = 16_000_000
"""About 60,000 files."""

PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")

Sha256 = Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]


class _Part(BaseModel):
    """Part of a bundle: exact types, and no field but those of the specification's schemas."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


_P = TypeVar("_P", bound=_Part)


class _PublicKey(_Part):
    hint: Sha256


class _Material(_Part):
    publicKey: _PublicKey
    tlogEntries: Annotated[list[Any], Field(max_length=0)] = []


class _Signature(_Part):
    sig: str
    keyid: Literal["", None] = None


class _Envelope(_Part):
    payload: str
    payloadType: Literal["application/vnd.in-toto+json"]
    signatures: Annotated[list[_Signature], Field(min_length=1, max_length=1)]


class _Bundle(_Part):
    mediaType: Literal["application/vnd.dev.sigstore.bundle.v0.3+json"]
    verificationMaterial: _Material
    dsseEnvelope: _Envelope


class _Digests(_Part):
    sha256: Sha256


class _Subject(_Part):
    name: Annotated[str, Field(min_length=1)]
    digest: _Digests


class _Resource(_Part):
    model_config = ConfigDict(extra="ignore")  # the specification asks for it here, and only here

    name: str
    algorithm: Literal["sha256"]
    digest: Sha256


class _Serialization(_Part):
    method: Literal["files"]
    hash_type: Literal["sha256"]
    allow_symlinks: bool
    ignore_paths: list[str] = []


class _Predicate(_Part):
    resources: list[_Resource]
    serialization: _Serialization


class _Statement(_Part):
    type_: Annotated[Literal["https://in-toto.io/Statement/v1"], Field(alias="_type")]
    subject: Annotated[list[_Subject], Field(min_length=1, max_length=1)]
    predicateType: Literal["https://model_signing/signature/v1.0"]
    predicate: _Predicate


def public_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    """A public key as SubjectPublicKeyInfo in PEM; the SHA-256 of these bytes is the bundle's key hint."""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def load_public_key(pem: bytes) -> ec.EllipticCurvePublicKey:
    """Read a public key in PEM; the inverse of `public_pem`.

    Raises:
        StoreDamaged: It is not an ECDSA P-256 key.
    """
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise StoreDamaged(
            "public key of the model signature: is not an ECDSA P-256 key in PEM. Use the lineage's `model.pub`."
        )
    return key


def _hint(key: ec.EllipticCurvePublicKey) -> str:
    return hashlib.sha256(public_pem(key)).hexdigest()


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_canonical(path: str) -> bool:
    """Whether a path is as section 6.1.2 of the specification wants it: relative, normal, Unicode."""
    return _is_unicode(path) and "\0" not in path and all(part not in ("", ".", "..") for part in path.split("/"))


def _signed_files(files: Mapping[str, str]) -> dict[str, str]:
    """The files that a signature covers: path to hex digest, in the order of code points."""
    signed = {}
    for path in sorted(files):
        digest = _DIGEST.fullmatch(files[path])
        if not _is_canonical(path) or not digest:
            raise UsageError(
                f"model file {path!r} with digest {files[path][:100]!r}: cannot be signed. "
                "It needs a normal relative path with '/' and a digest sha256:<64 hexadecimal digits>."
            )
        if path.split("/")[0] not in IGNORED:
            signed[path] = digest[1]
    return signed


def _root(digests: Iterable[str]) -> str:
    """The digest of a list of hex digests: SHA-256 over their bytes, end to end (section 6.5.1)."""
    return hashlib.sha256(bytes.fromhex("".join(digests))).hexdigest()


def _signing_input(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding of a payload."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def model_signature(files: Mapping[str, str], name: str, private_key: ec.EllipticCurvePrivateKey) -> bytes:
    """Sign the files of a model folder.

    Args:
        files: Every file of the folder: path → ``sha256:<hex>``. Those that `IGNORED` covers are left out.
        name: What the signature calls the model; tells people, is checked by nobody.
        private_key: ECDSA P-256.

    Returns:
        The bundle, canonical JSON in ASCII, to be written to `SIGNATURE_FILE`.

    Raises:
        UsageError: No file is left to sign, there are too many, a path or digest is not canonical, the name is empty
            or not Unicode, or the key is on another curve.
    """
    signed = _signed_files(files)
    if not signed or not name or not _is_unicode(name):
        raise UsageError("model signature: needs a name and at least one file beside Git's own. Check the folder.")
    if not isinstance(private_key.curve, ec.SECP256R1):
        raise UsageError(f"model signature: the key is on the curve {private_key.curve.name}. Use an ECDSA P-256 key.")
    statement = _Statement.model_validate(
        {
            "_type": "https://in-toto.io/Statement/v1",
            "subject": [_Subject(name=name, digest=_Digests(sha256=_root(signed.values())))],
            "predicateType": "https://model_signing/signature/v1.0",
            "predicate": _Predicate(
                resources=[_Resource(name=path, algorithm="sha256", digest=digest) for path, digest in signed.items()],
                serialization=_Serialization(
                    method="files", hash_type="sha256", allow_symlinks=False, ignore_paths=list(IGNORED)
                ),
            ),
        }
    )
    payload = canonical_json(statement.model_dump(by_alias=True))
    signature = private_key.sign(_signing_input(payload), ec.ECDSA(hashes.SHA256(), deterministic_signing=True))
    made = _Bundle(
        mediaType="application/vnd.dev.sigstore.bundle.v0.3+json",
        verificationMaterial=_Material(publicKey=_PublicKey(hint=_hint(private_key.public_key()))),
        dsseEnvelope=_Envelope(
            payload=base64.b64encode(payload).decode(),
            payloadType=PAYLOAD_TYPE,
            signatures=[_Signature(sig=base64.b64encode(signature).decode(), keyid="")],
        ),
    )
    bundle = canonical_json(made.model_dump())
    if len(bundle) > MAX_BUNDLE_BYTES:
        raise UsageError(f"model signature: {len(signed)} files need more than {MAX_BUNDLE_BYTES} bytes. Sign fewer.")
    return bundle


def _damaged(found: str) -> NoReturn:
    raise StoreDamaged(f"model signature ({SIGNATURE_FILE}): {found}. Check the model out again from its version.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise ValueError("a key occurs twice")
    return tree


def _read(kind: type[_P], data: bytes) -> _P:
    """Read JSON into one of the parts above: unique keys, exact types, known fields."""
    try:
        return kind.model_validate(json.loads(data.decode(), object_pairs_hook=_unique))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        _damaged(f"{ascii('.'.join(map(str, first['loc'])))[:200]}: {first['msg']}")
    except (ValueError, RecursionError) as error:
        _damaged(f"is not JSON with unique keys ({error})")


def _base64(field: str, text: str) -> bytes:
    try:
        return strict_base64(text)
    except ValueError as error:
        _damaged(f"{field} is not base64 ({error})")


def _some(paths: set[str]) -> str:
    """The first few of some paths, printable."""
    return ", ".join(map(ascii, sorted(paths)[:5])) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")


def _compare(signed: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Refuse a signature that is about other files, and name them."""
    if missing := expected.keys() - signed.keys():
        _damaged(f"does not cover {_some(missing)}")
    if extra := signed.keys() - expected.keys():
        _damaged(f"covers files that the model does not have: {_some(extra)}")
    if changed := {path for path in signed if signed[path] != expected[path]}:
        _damaged(f"was made for another content of {_some(changed)}")


def check_model_signature(bundle: bytes, files: Mapping[str, str], public_key_pem: bytes) -> None:
    """Check that a bundle signs exactly these files, and that the public tool would check the same ones.

    Bundles of other software are accepted when they use SHA-256 of whole files and leave out no file but `IGNORED`.

    Args:
        bundle: The content of `SIGNATURE_FILE`; hostile.
        files: Every file that the folder should have: path → ``sha256:<hex>``. Nothing is hashed here.
        public_key_pem: The key that must have signed; trusted.

    Raises:
        StoreDamaged: The bundle is malformed, of another key, not signed by it, or about other files; says which.
        UsageError: A path or digest in ``files`` is not canonical.
    """
    key = load_public_key(public_key_pem)
    if len(bundle) > MAX_BUNDLE_BYTES:
        _damaged(f"has {len(bundle)} bytes, the limit is {MAX_BUNDLE_BYTES}")
    outer = _read(_Bundle, bundle)
    if outer.verificationMaterial.publicKey.hint != _hint(key):
        _damaged("was made with another key than the one given")
    payload = _base64("dsseEnvelope.payload", outer.dsseEnvelope.payload)
    try:
        key.verify(
            _base64("dsseEnvelope.signatures.0.sig", outer.dsseEnvelope.signatures[0].sig),
            _signing_input(payload),
            ec.ECDSA(hashes.SHA256()),
        )
    except InvalidSignature:
        _damaged("its signature does not match its content: one of them was changed")
    statement = _read(_Statement, payload)
    resources = statement.predicate.resources
    signed = {resource.name: resource.digest for resource in resources}
    if len(signed) != len(resources):
        _damaged("lists a file twice")
    if statement.subject[0].digest.sha256 != _root([resource.digest for resource in resources]):
        _damaged("its root digest does not belong to the files that it lists")
    serialization = statement.predicate.serialization
    if serialization.allow_symlinks:
        _damaged("tells other tools to follow links")
    if unseen := set(serialization.ignore_paths) - set(IGNORED):
        _damaged(f"tells other tools to ignore {_some(unseen)}")
    _compare(signed, _signed_files(files))
