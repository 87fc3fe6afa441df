"""File access of the product: canonical JSON, digests, and writes that are whole or absent.

Everything that must survive a power cut goes through here: a fresh path, fsync, rename, fsync of the
folder. Nothing here ever writes over a file in place.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import NoSpace, StoreDamaged

CHUNK_BYTES = 1 << 20


def canonical_json(value: Any) -> bytes:
    """Serialise to the one JSON text that digests are taken of: sorted keys, ASCII, no spaces, no NaN.

    Law: equal values give equal bytes, and ``json.loads`` is its inverse.
    """
    return json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()


def digest_bytes(data: bytes) -> str:
    """SHA-256 of ``data`` as ``sha256:<hex>``."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def digest_json(value: Any) -> str:
    """Digest of the canonical JSON of ``value``."""
    return digest_bytes(canonical_json(value))


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes as ``sha256:<hex>``, read in pieces of 1 MiB."""
    hasher = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(CHUNK_BYTES):
            hasher.update(piece)
    return f"sha256:{hasher.hexdigest()}"


def fsync_folder(path: Path) -> None:
    """Make renames and new names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def explained_space(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into an error that says what to do.

    Raises:
        NoSpace: Writing failed with ENOSPC, EDQUOT or EROFS.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise NoSpace(
                f"{path}: cannot be written ({error.strerror}). Nothing was published; free some space "
                "or make the disk writable and run the same command again."
            ) from error
        raise


def write_atomic(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file so that it is seen whole or not at all, and survives a power cut.

    Args:
        path: Target; its folder must exist. An existing file is replaced by rename.
        data: The whole content.
        mode: Permission bits of the new file.

    Raises:
        NoSpace: The disk is full or read-only; the target is as it was.
    """
    with explained_space(path):
        fd, name = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
        try:
            with os.fdopen(fd, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fchmod(stream.fileno(), mode)
                os.fsync(stream.fileno())
            os.replace(name, path)  # noqa: PTH105 (crash tests stop at each call of os)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


def write_json(path: Path, value: Any, mode: int = 0o644) -> None:
    """Write canonical JSON atomically."""
    write_atomic(path, canonical_json(value) + b"\n", mode)


def read_json(path: Path) -> Any:
    """Read JSON that this product wrote.

    Raises:
        StoreDamaged: The file is absent or not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise StoreDamaged(
            f"{path}: is missing. Restore it from a backup; `takedown verify` lists all breaks."
        ) from error
    except ValueError as error:
        raise StoreDamaged(f"{path}: is not JSON ({error}). Restore it from a backup.") from error
