"""The vault's master keys: where they come from, which one is in use, and how one takes the other's place.

In: a key file, and two environment variables. Out: keys. Never: a key in a message, a key file that is written over
while anything is still wrapped under what it holds.

A key is 32 random bytes, written as 64 hexadecimal digits. ``TAKEDOWN_VAULT_KEY`` goes before the file. While a
rotation runs there are two: the file's new key lies beside it under ``.next`` until everything is wrapped under it; a
new key from the environment has the old one beside it in ``TAKEDOWN_VAULT_KEY_OLD``, or in the file.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.envelope import new_key
from pipeline.errors import UsageError, VaultLocked
from pipeline.files import (
    explained_space,
    fsync_folder,
    make_folder,
    put_in_place,
    read_whole,
    remove,
    unreadable,
    write_atomic,
)

VARIABLE, OLD_VARIABLE = "TAKEDOWN_VAULT_KEY", "TAKEDOWN_VAULT_KEY_OLD"

_HEX = re.compile(r"[0-9a-f]{64}")
_LARGEST = 200
"""Bytes of a key file, white space included; a larger file is none."""


@dataclass(frozen=True)
class MasterKey:
    """A master key.

    Attributes:
        secret: 32 bytes.
        source: The file or variable that it was read from.
    """

    secret: bytes = field(repr=False)
    source: str

    @property
    def name(self) -> str:
        """What the key is called where it was used: 16 digits of a digest, from which none of its 256 bits follows."""
        return hashlib.sha256(b"takedown vault master key\x00" + self.secret).hexdigest()[:16]


class MasterKeys:
    """The master keys at hand, read when one is needed.

    Args:
        file: The key file.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: dict[str, MasterKey] = {}

    def read(self) -> tuple[MasterKey, ...]:
        """All keys at hand, the one in use first; none where there is none.

        Raises:
            VaultLocked: What should be a key is not one, or cannot be read.
        """
        named = [_parsed(os.environ[name], name) for name in (VARIABLE, OLD_VARIABLE) if os.environ.get(name)]
        found = named + [key for path in (self._next, self._file) if (key := _from_file(path)) is not None]
        self._known = {key.name: key for key in found}
        return tuple(found)

    def in_use(self) -> MasterKey:
        """The key that new contents are wrapped under.

        Raises:
            VaultLocked: There is none, see also `read`.
        """
        found = self.read()
        if not found:
            raise VaultLocked(f"{self._file}: is missing, and {VARIABLE} is not set. {_REMEDY}")
        return found[0]

    def find(self, name: str, where: Path) -> MasterKey:
        """The key of a name.

        Args:
            name: See `MasterKey.name`.
            where: What is wrapped under it, for the message.

        Raises:
            VaultLocked: It is not at hand, see also `read`.
        """
        if name not in self._known:
            self.read()  # anew: a rotation may have begun or ended since
        if name not in self._known:
            others = ", ".join(f"{key.name} ({key.source})" for key in self._known.values())
            at_hand = f"at hand: {others}" if others else f"{self._file} is missing, and {VARIABLE} is not set"
            raise VaultLocked(f"{where}: needs the master key {name}; {at_hand}. {_REMEDY}")
        return self._known[name]

    def create(self) -> None:
        """Make a key (0600), unless there is one.

        Raises:
            VaultLocked: See `read`.
            NoSpace: The disk is full or read-only.
        """
        if not self.read():
            _write(self._file)

    @property
    def rotating(self) -> bool:
        """Whether a rotation of the file was begun and not ended."""
        return self._next.exists()

    def begin_rotation(self) -> None:
        """Put a new key in use; the old one stays at hand. A rotation that was begun goes on with its key.

        Raises:
            VaultLocked: See `read`.
            NoSpace: The disk is full or read-only.
        """
        self.read()
        if not self.from_environment and not self.rotating:
            _write(self._next)

    def end_rotation(self) -> None:
        """Remove the old key for good: nothing is wrapped under it any more."""
        with explained_space(self._file):
            if not self.from_environment:
                put_in_place(self._next, self._file)
                return
            for path in (self._next, self._file):
                if path.exists():
                    remove(path)
                    fsync_folder(path.parent)

    @property
    def from_environment(self) -> bool:
        """Whether the key in use comes from the environment."""
        return bool(os.environ.get(VARIABLE))

    @property
    def _next(self) -> Path:
        return self._file.with_name(self._file.name + ".next")


_REMEDY = f"Nothing was changed. Restore the key from a backup, or set {VARIABLE}."


def _write(path: Path) -> None:
    with explained_space(path):
        make_folder(path.parent)
        write_atomic(path, f"{new_key().hex()}\n".encode(), mode=0o600)


def _from_file(path: Path) -> MasterKey | None:
    """The key in a file; None where there is no such file."""
    try:
        data = read_whole(path, _LARGEST)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise VaultLocked(f"{path}: {unreadable(error)}. {_REMEDY}") from None
    return _parsed(data.decode("ascii", errors="replace"), str(path))


def _parsed(text: str, source: str) -> MasterKey:
    """A key from its digits; the message does not repeat what stands there."""
    digits = text.strip().lower()
    if not _HEX.fullmatch(digits):
        raise VaultLocked(f"{source}: is not a master key, which has 64 hexadecimal digits. {_REMEDY}")
    return MasterKey(bytes.fromhex(digits), source)


def require_new_key(keys: MasterKeys, in_use: frozenset[str]) -> None:
    """Refuse a rotation that would change nothing.

    Args:
        keys: The keys at hand.
        in_use: Names of the keys that contents are wrapped under.

    Raises:
        UsageError: The key comes from the environment, everything is wrapped under it already, and no other key is at
            hand. Where there is one, a rotation may have been stopped before the old key was removed.
        VaultLocked: See `MasterKeys.read`.
    """
    if keys.from_environment and in_use | {key.name for key in keys.read()} == {keys.in_use().name}:
        raise UsageError(
            f"{VARIABLE}: everything is wrapped under this key already. Set a new key there, and this one as "
            f"{OLD_VARIABLE}, and run the same command again. Nothing was changed."
        )
