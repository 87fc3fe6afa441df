"""The vault: the only place where a request's text and contact are kept, encrypted.

In: requests that intake accepted. Out: the same requests, and keyed commitments that a ledger may hold in their place.
Never: writes over a request, never puts a text or a contact into an error.

Each request has a random key of its own, and that is wrapped under a master key (`pipeline.masters`), so that one
request can be destroyed alone, and the master key changed without touching a text. Record and key are bound to the
request's id: under another's name neither opens. The key of the commitments (``vault/key``) lies there as it is, so
that whoever is shown a text can hold it against the ledger without the master key; it opens nothing, but with it a
guess of a *whole* text can be confirmed, so it is as private as the folder.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from pipeline import vaultfile
from pipeline.envelope import new_key, seal, unseal
from pipeline.errors import StoreDamaged, UsageError, VaultLocked
from pipeline.files import (
    NotRegular,
    canonical_json,
    digest_bytes,
    explained_space,
    first_bytes,
    fsync_folder,
    read_whole,
    remove,
    write_atomic,
)
from pipeline.masters import MasterKeys, require_new_key
from pipeline.records import LedgerEntry, TakedownRequest
from pipeline.vaultfile import WrappedKey
from pipeline.workspace import Workspace

KEY_BYTES = 32
"""Size of the commitments' key; as long as a SHA-256 digest, which is what HMAC-SHA256 can use."""


def open_vault(workspace: Workspace) -> Vault:
    """The vault of a workspace, with the master key that its settings name.

    Raises:
        InvalidInput: ``takedown.toml`` cannot be read.
    """
    return Vault(workspace.vault, workspace.root / workspace.settings().vault.key_file)


class Vault:
    """Requests in one folder, two files each, readable by their owner only.

    A file is named after the digest of the request id, so that ids cannot collide on a case-insensitive file
    system and no id can name a path. A changed byte is found on reading.

    Args:
        folder: Where the vault lies, or will lie after `create`.
        key_file: The master key's file; left out, ``vault.key`` in the workspace's ``keys/``.
    """

    def __init__(self, folder: Path, key_file: Path | None = None) -> None:
        self._folder = folder
        self._masters = MasterKeys(key_file or folder.parent / "keys" / "vault.key")

    def create(self) -> None:
        """Make the folder (0700), the commitments' key and a master key (0600); a vault that exists keeps its keys.

        Raises:
            StoreDamaged: There are requests but no key of the commitments, or it is not one. A new key would
                silently part the ledger's commitments from their texts.
            VaultLocked: There are sealed requests but no master key, or it is not one.
            NoSpace: The disk is full or read-only.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder.chmod(0o700)
        if self._key_file.exists() or self._names(".json"):
            self._key()
        else:
            write_atomic(self._key_file, secrets.token_bytes(KEY_BYTES), mode=0o600)
        if self._names(".key"):
            self._masters.in_use()
        else:
            self._masters.create()

    def put(self, request: TakedownRequest, replace: bool = False) -> None:
        """Keep a request; it is on disk, durable, when this returns. Putting the same again changes nothing.

        Args:
            request: The request.
            replace: Take the place of another content under this id: for the caller who knows that the other one
                was never acknowledged.

        Raises:
            UsageError: The id is taken by another content, which stays as it is.
            StoreDamaged: The file under this id cannot be read.
            VaultLocked: There is no master key.
            NoSpace: The disk is full or read-only.
        """
        path = self._path(request.request_id)
        if path.exists() and not replace:
            if self.get(request.request_id) != request:
                raise UsageError(
                    f"{path}: already holds a request {request.request_id!r} with other content. "
                    "Nothing was changed; give the new request an id of its own."
                )
            return
        self._masters.in_use()  # before anything is changed
        self._remove(path)  # a record without its key would be a break; no record is none
        self._seal(request)

    def get(self, request_id: str) -> TakedownRequest:
        """Read a request back and check it.

        Raises:
            StoreDamaged: A file is missing, changed, or belongs to another id.
            VaultLocked: The master key is missing, or another one.
        """
        path = self._path(request_id)
        request = self._read(path)
        if request.request_id != request_id:
            raise StoreDamaged(f"{path}: holds another request than {request_id!r}. Restore the file from a backup.")
        return request

    def ids(self) -> tuple[str, ...]:
        """Ids of all requests, sorted. Reads and checks every file.

        Raises:
            StoreDamaged: A file is changed or stands under another request's name.
            VaultLocked: The master key is missing, or another one.
        """
        return tuple(sorted(request.request_id for request in self.requests()))

    def requests(self, apart_from: Iterable[str] = ()) -> Iterator[TakedownRequest]:
        """All requests, in the order of their files; each is read and checked when it is asked for.

        Args:
            apart_from: Ids whose files are not read.

        Raises:
            StoreDamaged: A file is changed or stands under another request's name.
            VaultLocked: The master key is missing, or another one.
        """
        left_out = {self._path(request_id) for request_id in apart_from}
        for path in self._files():
            if path in left_out:
                continue
            request = self._read(path)
            if path != self._path(request.request_id):
                raise StoreDamaged(
                    f"{path}: holds request {request.request_id!r}, whose file has another name. "
                    "Restore the vault from a backup."
                )
            yield request

    def erase(self, request_id: str) -> None:
        """Destroy a request: first its key, then its record; what is gone already is fine.

        Without the key the record is noise, in every copy of it. The key itself may survive where it was copied to: in
        backups, in blocks that a disk has not used again. There it is wrapped under the master key: a rotation
        (`pipeline.rekey`) makes such copies useless, too, once the old master key is gone.

        Raises:
            NoSpace: The disk is read-only.
        """
        for path in (self._wrapped(self._path(request_id)), self._path(request_id)):
            self._remove(path)

    def holds(self, request_id: str) -> bool:
        """Whether anything of a request is there, readable or not."""
        path = self._path(request_id)
        return path.exists() or self._wrapped(path).exists()

    # --- encryption ---------------------------------------------------------------------------------------

    def seal_plain(self) -> int:
        """Encrypt what a release before encryption wrote; whatever is sealed stays as it is.

        Returns:
            How many requests were plain.

        Raises:
            StoreDamaged: One is not as it was written; those before it are sealed.
            VaultLocked: There is no master key.
            NoSpace: The disk is full or read-only.
        """
        plain = self._plain()
        for path in plain:
            self._seal(self._read(path))
        return len(plain)

    def rewrap(self) -> int:
        """Wrap every request's key under a new master key, and destroy the old one. No record is touched.

        Stopped anywhere, everything opens, under one key or the other; the same call goes on.

        Returns:
            How many keys were wrapped anew.

        Raises:
            StoreDamaged: Keys cannot be opened: all are named, and nothing was changed.
            VaultLocked: A master key is missing; likewise.
            UsageError: The new key is to come from the environment, and is the old one.
            NoSpace: The disk is full or read-only; the same call goes on.
        """
        wrapped = self._all_keys()
        if wrapped and not self._plain():
            require_new_key(self._masters, frozenset(key.master for key in wrapped.values()))
        self._masters.begin_rotation()
        master, count = self._masters.in_use(), 0
        for path, old in wrapped.items():
            if old.master != master.name:
                secret = self._unwrapped(path, old)
                new = WrappedKey(master.name, seal(master.secret, secret, vaultfile.key_label(path.stem)))
                write_atomic(path, vaultfile.key_file(new), mode=0o600)
                count += 1
        self._masters.end_rotation()
        return count

    def master(self) -> str:
        """Name of the master key in use.

        Raises:
            VaultLocked: There is none.
        """
        return self._masters.in_use().name

    def rotating(self) -> bool:
        """Whether a change of the master key was begun and not ended."""
        return self._masters.rotating

    def _seal(self, request: TakedownRequest) -> None:
        """Write a request under a fresh key: the key first, so that no record is there that cannot be opened."""
        path, master, secret = self._path(request.request_id), self._masters.in_use(), new_key()
        key = WrappedKey(master.name, seal(master.secret, secret, vaultfile.key_label(path.stem)))
        sealed = seal(secret, vaultfile.request_bytes(request), vaultfile.record_label(path.stem))
        write_atomic(self._wrapped(path), vaultfile.key_file(key), mode=0o600)
        write_atomic(path, vaultfile.sealed_file(sealed), mode=0o600)

    def _read(self, path: Path) -> TakedownRequest:
        """Read a record, sealed or plain. Raised without a cause: the exceptions of parsers carry what they parsed."""
        data = _needed(path)
        sealed = vaultfile.parse_sealed(data)
        if sealed is None:
            request = vaultfile.parse_plain(data)
        else:
            wrapped = self._wrapped(path)
            key = self._unwrapped(wrapped, _wrapped_key(wrapped))
            opened = unseal(key, sealed, vaultfile.record_label(path.stem))
            request = None if opened is None else vaultfile.parse_request(opened)
        if request is None:
            raise StoreDamaged(f"{path}: {_CHANGED}")
        return request

    def _unwrapped(self, path: Path, key: WrappedKey) -> bytes:
        """A request's key, from its file."""
        master = self._masters.find(key.master, path)
        secret = unseal(master.secret, key.wrapped, vaultfile.key_label(path.stem))
        if secret is None:
            raise StoreDamaged(f"{path}: {_CHANGED}")
        return secret

    def _plain(self) -> list[Path]:
        """Records of a release that did not encrypt; only their first bytes are read, for there may be thousands."""
        return [self._folder / name for name in self._names(".json") if vaultfile.is_plain(self._head(name))]

    def _head(self, name: str) -> bytes:
        """The first bytes of a file; none of what is no regular file."""
        try:
            return first_bytes(f"{self._folder}/{name}", len(vaultfile.PLAIN_START))
        except NotRegular:
            return b""

    def _all_keys(self) -> dict[Path, WrappedKey]:
        """Every wrapped key, all of which open."""
        found, problems = dict[Path, WrappedKey](), list[str]()
        for path in self._key_files():
            try:
                found[path] = _wrapped_key(path)
                self._unwrapped(path, found[path])
            except VaultLocked:
                raise
            except StoreDamaged as error:
                problems.append(str(error))
        if problems:
            raise StoreDamaged("\n".join(["Nothing was changed.", *problems]))
        return found

    # --- commitments --------------------------------------------------------------------------------------

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
        other_record = "record" in received and received["record"] != self.record_commitment(request)
        if other_record or received.get("basis", request.basis) != request.basis:
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

    def _wrapped(self, path: Path) -> Path:
        """The key's file beside a record."""
        return path.with_suffix(".key")

    def _files(self) -> list[Path]:
        """All request files; a ``.tmp-`` file that a killed process left is none."""
        return [self._folder / name for name in self._names(".json")]

    def _key_files(self) -> list[Path]:
        """All files of wrapped keys; one without a record is left of a request that was never acknowledged."""
        return [self._folder / name for name in self._names(".key")]

    def _names(self, suffix: str) -> list[str]:
        """Names, not paths, which cost ten times as much: there may be thousands."""
        try:
            with os.scandir(self._folder) as found:
                return sorted(e.name for e in found if e.name.endswith(suffix) and not e.name.startswith("."))
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return []  # who may not look into the vault can still check all that is outside

    def _remove(self, path: Path) -> None:
        if path.exists():
            with explained_space(path):
                remove(path)
                fsync_folder(path.parent)

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


_CHANGED = "is not what was written there, or was written for another request. Restore the file from a backup."


def _needed(path: Path) -> bytes:
    """A file of the vault that must be there."""
    try:
        return read_whole(path)
    except FileNotFoundError:
        raise StoreDamaged(f"{path}: is missing. Restore the vault from a backup.") from None


def _wrapped_key(path: Path) -> WrappedKey:
    """A request's key as its file has it."""
    found = vaultfile.parse_key(_needed(path))
    if found is None:
        raise StoreDamaged(f"{path}: {_CHANGED}")
    return found
