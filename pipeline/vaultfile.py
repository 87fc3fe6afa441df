"""The bytes of the vault's files.

In: bytes as they lie on disk. Out: what they hold, or None where they are not as they were written. Never: a file, a
key, an exception that carries what was parsed.

Two files for each request, named after the SHA-256 of its id: ``<name>.json`` holds the request, sealed under a key of
its own; ``<name>.key`` holds that key, wrapped under the master key. So a rotation of the master key rewrites some 200
bytes a request, and without its key file a record is noise, in whatever backup it lies. Releases up to 0.1 wrote the
request itself, readable, and a digest of it.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any, NamedTuple

from pipeline.files import canonical_json, digest_json
from pipeline.records import TakedownRequest

RECORD_FORMAT, KEY_FORMAT = "takedown-vault-1", "takedown-vault-key-1"

PLAIN_START = b'{"digest":'
"""How a plain record begins, in canonical JSON."""


class WrappedKey(NamedTuple):
    """A request's key.

    Attributes:
        master: Name of the master key that it is wrapped under.
        wrapped: See `pipeline.envelope.seal`.
    """

    master: str
    wrapped: bytes


def record_label(name: str) -> bytes:
    """What a sealed record is bound to: the request whose file it is."""
    return f"{RECORD_FORMAT}\x00{name}".encode()


def key_label(name: str) -> bytes:
    """What a wrapped key is bound to."""
    return f"{KEY_FORMAT}\x00{name}".encode()


def request_bytes(request: TakedownRequest) -> bytes:
    """What is sealed of a request."""
    return canonical_json(request.model_dump(mode="json"))


def parse_request(data: bytes) -> TakedownRequest | None:
    """The inverse of `request_bytes`."""
    return _validated(_json(data))


def sealed_file(sealed: bytes) -> bytes:
    """The file of a record."""
    return _line({"format": RECORD_FORMAT, "sealed": base64.b64encode(sealed).decode()})


def parse_sealed(data: bytes) -> bytes | None:
    """The inverse of `sealed_file`; None for any other bytes, those that decode to the same included."""
    sealed = _decoded(_json(data), RECORD_FORMAT, "sealed")
    return sealed if sealed is not None and sealed_file(sealed) == data else None


def key_file(key: WrappedKey) -> bytes:
    """The file of a key."""
    return _line({"format": KEY_FORMAT, "master": key.master, "wrapped": base64.b64encode(key.wrapped).decode()})


def parse_key(data: bytes) -> WrappedKey | None:
    """The inverse of `key_file`, as strict as `parse_sealed`."""
    tree = _json(data)
    wrapped = _decoded(tree, KEY_FORMAT, "wrapped")
    if wrapped is None or not isinstance(tree.get("master"), str):
        return None
    key = WrappedKey(tree["master"], wrapped)
    return key if key_file(key) == data else None


def is_plain(data: bytes) -> bool:
    """Whether what begins like this is a record of a release that did not encrypt."""
    return data.startswith(PLAIN_START)


def parse_plain(data: bytes) -> TakedownRequest | None:
    """The request in a record of a release that did not encrypt; None where it does not match its digest."""
    tree = _json(data)
    if not isinstance(tree, dict) or tree.keys() != {"request", "digest"}:
        return None
    try:
        sound = digest_json(tree["request"]) == tree["digest"]
    except (ValueError, RecursionError):
        return None
    return _validated(tree["request"]) if sound else None


def _line(tree: dict[str, str]) -> bytes:
    return canonical_json(tree) + b"\n"


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _decoded(tree: Any, kind: str, field: str) -> bytes | None:
    """A field that is Base64, in a file of some format."""
    if not isinstance(tree, dict) or tree.get("format") != kind or not isinstance(tree.get(field), str):
        return None
    try:
        return base64.b64decode(tree[field], validate=True)
    except (binascii.Error, ValueError):
        return None


def _validated(tree: Any) -> TakedownRequest | None:
    try:
        return TakedownRequest.model_validate(tree)
    except (ValueError, RecursionError):
        return None
