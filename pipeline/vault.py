"""The vault: the only place where a request's text and contact are kept.

In: requests that intake accepted. Out: the same requests, and keyed commitments that a ledger may hold in their place.
Never: writes over a request, never puts a text or a contact into an error.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path

from pipeline.errors import StoreDamaged, UsageError
from pipeline.files import canonical_json, digest_bytes, digest_json, read_whole, write_atomic
from pipeline.records import LedgerEntry, TakedownRequest

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
        return self._keyed(text.encode())

    def record_commitment(self, request: TakedownRequest) -> str:
        """Stand-in for a whole request: title, rights holder, basis, contact, batch, time, and the text's commitment.

        It holds the text by its commitment, so that the rest can still be checked when the text is no longer kept.
        No text begins like what is hashed here: intake takes none with a null character.

        Returns:
            ``hmac-sha256:<hex>``.

        Raises:
            StoreDamaged: The key is missing or not a key.
        """
        tree = request.model_dump(mode="json") | {"text": self.commitment(request.text)}
        return self._keyed(b"takedown request\x00" + canonical_json(tree))

    def differences(self, request: TakedownRequest, received: Mapping[str, object]) -> str | None:
        """What of a request is not what the ledger committed to when it came in; None where all is.

        Args:
            request: As the vault has it.
            received: Data of its ``received`` event. Those of the first release commit to the text only; then nothing
                binds the rest.

        Raises:
            StoreDamaged: The vault's key is missing or not a key.
        """
        if received.get("commitment") not in (None, self.commitment(request.text)):
            return "text"
        if "record" in received and received["record"] != self.record_commitment(request):
            return "title, rights holder, basis or contact"
        return None

    def confirmed(self, request_id: str, received: Mapping[str, object]) -> TakedownRequest:
        """Read a request back and hold it against what the ledger committed to.

        Raises:
            StoreDamaged: See `get`, or it is not what the ledger committed to.
        """
        request = self.get(request_id)
        if (found := self.differences(request, received)) is not None:
            raise StoreDamaged(
                f"{self._path(request_id)}: has another {found} than the ledger committed to. Restore the file from a "
                "backup; `takedown verify` lists all breaks."
            )
        return request

    def _keyed(self, data: bytes) -> str:
        return f"hmac-sha256:{hmac.new(self._key(), data, hashlib.sha256).hexdigest()}"

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


def received_data(entries: Iterable[LedgerEntry]) -> dict[str, Mapping[str, object]]:
    """Data of the first ``received`` event of each request: what the ledger committed to."""
    found: dict[str, Mapping[str, object]] = {}
    for entry in entries:
        if entry.event.kind == "received" and entry.event.request_id is not None:
            found.setdefault(entry.event.request_id, entry.event.data)
    return found


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
