"""The vault: the only place where a request's text and contact are kept.

In: requests that intake accepted. Out: the same requests, and keyed commitments that a ledger may hold in their place.
Never: writes over a request, never puts a text or a contact into an error.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from pathlib import Path

from pipeline.errors import StoreDamaged, UsageError
from pipeline.files import canonical_json, digest_bytes, digest_json, read_whole, write_atomic
from pipeline.records import TakedownRequest

KEY_BYTES = 32
"""Size of the key; as long as a SHA-256 digest, which is what HMAC-SHA256 can use."""


class Vault:
    """Request texts in one folder, a file per request, readable by their owner only.

    A file is named after the digest of the request id, so that ids cannot collide on a case-insensitive file
    system and no id can name a path. It holds the request and a digest of it: a changed byte is found on reading.

    Args:
        folder: Where the vault lies, or will lie after `create`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def create(self) -> None:
        """Make the folder (0700) and its random key (0600); a vault that exists keeps its key.

        Raises:
            StoreDamaged: There are requests but no key, or the key is not one. A new key would
                silently part the ledger's commitments from their texts.
            NoSpace: The disk is full or read-only.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder.chmod(0o700)
        if self._key_file.exists() or self._files():
            self._key()
        else:
            write_atomic(self._key_file, secrets.token_bytes(KEY_BYTES), mode=0o600)

    def put(self, request: TakedownRequest, replace: bool = False) -> None:
        """Keep a request; it is on disk, durable, when this returns. Putting the same again changes nothing.

        Args:
            request: The request.
            replace: Take the place of another content under this id: for the caller who knows that the other one
                was never acknowledged.

        Raises:
            UsageError: The id is taken by another content, which stays as it is.
            StoreDamaged: The file under this id cannot be read.
            NoSpace: The disk is full or read-only.
        """
        path = self._path(request.request_id)
        if replace or not path.exists():
            value = request.model_dump(mode="json")
            write_atomic(path, canonical_json({"digest": digest_json(value), "request": value}) + b"\n", mode=0o600)
        elif self.get(request.request_id) != request:
            raise UsageError(
                f"{path}: already holds a request {request.request_id!r} with other content. "
                "Nothing was changed; give the new request an id of its own."
            )

    def get(self, request_id: str) -> TakedownRequest:
        """Read a request back and check it.

        Raises:
            StoreDamaged: The file is missing, changed, or belongs to another id.
        """
        path = self._path(request_id)
        request = _read(path)
        if request.request_id != request_id:
            raise StoreDamaged(f"{path}: holds another request than {request_id!r}. Restore the file from a backup.")
        return request

    def ids(self) -> tuple[str, ...]:
        """Ids of all requests, sorted. Reads and checks every file.

        Raises:
            StoreDamaged: A file is changed or stands under another request's name.
        """
        found = []
        for path in self._files():
            request = _read(path)
            if path != self._path(request.request_id):
                raise StoreDamaged(
                    f"{path}: holds request {request.request_id!r}, whose file has another name. "
                    "Restore the vault from a backup."
                )
            found.append(request.request_id)
        return tuple(sorted(found))

    def commitment(self, text: str) -> str:
        """Stand-in for a text where the text may not go: HMAC-SHA256 of its UTF-8 bytes under the vault's key.

        Unlike a plain digest it cannot be confirmed by guessing the text; whoever has the key can recompute it.

        Returns:
            ``hmac-sha256:<hex>``.

        Raises:
            StoreDamaged: The key is missing or not a key.
        """
        return f"hmac-sha256:{hmac.new(self._key(), text.encode(), hashlib.sha256).hexdigest()}"

    @property
    def _key_file(self) -> Path:
        return self._folder / "key"

    def _path(self, request_id: str) -> Path:
        name = digest_bytes(request_id.encode()).removeprefix("sha256:")
        return self._folder / f"{name}.json"

    def _files(self) -> list[Path]:
        """All request files; a ``.tmp-`` file that a killed process left is none."""
        return sorted(p for p in self._folder.glob("*.json") if not p.name.startswith("."))

    def _key(self) -> bytes:
        try:
            key = read_whole(self._key_file)
        except FileNotFoundError:
            key = b""
        if len(key) != KEY_BYTES:
            raise StoreDamaged(
                f"{self._key_file}: expected {KEY_BYTES} bytes, found {len(key)}. Restore the key from a backup; "
                "without it the ledger's commitments cannot be matched to their texts."
            )
        return key


def _read(path: Path) -> TakedownRequest:
    """Read one file of the vault.

    Raises:
        StoreDamaged: It is missing or not as it was written. Raised without a cause: the exceptions of the
            parsers carry what they parsed.
    """
    try:
        data = read_whole(path)
    except FileNotFoundError:
        data = None
    if data is None:
        raise StoreDamaged(f"{path}: is missing. Restore the vault from a backup.")
    request = _parse(data)
    if request is None:
        raise StoreDamaged(f"{path}: is not what was written there. Restore the file from a backup.")
    return request


def _parse(data: bytes) -> TakedownRequest | None:
    """The request that a file holds, or None where it does not match its digest."""
    try:
        value = json.loads(data)
        if digest_json(value["request"]) != value["digest"]:
            return None
        request = TakedownRequest.model_validate(value["request"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return request
