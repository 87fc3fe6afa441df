"""File access of the product: canonical JSON, digests, and writes that are whole or absent.

Everything that must survive a power cut goes through the eight calls at the end: a fresh path, fsync, rename, fsync of
the folder. Nothing here ever writes over a file in place. They are the one layer that the crash tests stop at.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import NoSpace, StoreDamaged

CHUNK_BYTES = 1 << 20

MOST_BYTES = 1 << 28
"""Most bytes of a manifest, record or signature: far above what is ever written, and small enough for memory."""

TEMPORARY = ".tmp-"
"""Prefix of files being written; after a crash they are left and mean nothing."""

NO_HARD_LINKS = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""What a file system without hard links answers."""


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
    with path.open("rb") as stream:
        return digest_stream(stream)


def digest_stream(stream: BinaryIO) -> str:
    """SHA-256 of what is left to read of a stream as ``sha256:<hex>``, read in pieces of 1 MiB."""
    hasher = hashlib.sha256()
    while piece := stream.read(CHUNK_BYTES):
        hasher.update(piece)
    return f"sha256:{hasher.hexdigest()}"


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
                f"{path}: cannot be written ({error.strerror}). Free some space or make the disk writable and run the "
                "same command again."
            ) from error
        raise


class NotRegular(OSError):
    """What has the name of a file is a folder, a pipe or a device."""


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; a pipe or device would block or never end.

    Raises:
        NotRegular: It is no regular file.
        OSError: It is missing, or cannot be read.
    """
    return os.fdopen(_descriptor(path), "rb")


def first_bytes(path: Path | str, count: int) -> bytes:
    """The beginning of a regular file, at a quarter of what a stream costs: for thousands of files.

    Raises:
        OSError: See `open_regular`.
    """
    fd = _descriptor(path)
    try:
        return os.read(fd, count)
    finally:
        os.close(fd)


def _descriptor(path: Path | str) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise NotRegular(errno.EINVAL, "is not a regular file", str(path))
    return fd


def read_whole(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """Read a small regular file.

    Raises:
        OSError: It is missing, cannot be read, is no regular file, or is larger than anything written there.
    """
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > most_bytes:
            raise OSError(errno.EFBIG, f"has {size} bytes, at most {most_bytes} are written there", str(path))
        return stream.read()


def unreadable(error: OSError) -> str:
    """Why a file could not be read, as the end of a sentence that begins with its name."""
    if isinstance(error, FileNotFoundError):
        return "is missing"
    told = error.strerror or "unknown"
    return told if error.errno in (errno.EINVAL, errno.EFBIG) else f"cannot be read ({told})"


# --- the layer: every call that changes what is on disk ---------------------------------------------------


def fsync_folder(path: Path) -> None:
    """Make renames and new names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(folder: Path, mode: int = 0o755) -> None:
    """Create a folder durably; an existing one is fine."""
    if not folder.is_dir():
        folder.mkdir(mode=mode, exist_ok=True)
        fsync_folder(folder.parent)


@contextmanager
def temporary(folder: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A fresh file to write in a folder; at the end it is gone, under this name."""
    fd, name = tempfile.mkstemp(prefix=TEMPORARY, dir=folder)
    try:
        with os.fdopen(fd, "wb") as stream:
            yield Path(name), stream
    finally:
        remove(Path(name))


def seal(stream: BinaryIO, mode: int) -> None:
    """Bring a written file to the disk with its final permissions."""
    stream.flush()
    os.fchmod(stream.fileno(), mode)
    os.fsync(stream.fileno())


def place(written: Path, target: Path) -> None:
    """Give a sealed file its final name, never replacing another file, durably.

    Raises:
        FileExistsError: The name is taken.
    """
    try:
        os.link(written, target)
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        os.rename(written, target)  # noqa: PTH104  (the tests stop the process at each call of os)
    fsync_folder(target.parent)


def put_in_place(written: Path, target: Path) -> None:
    """Give a sealed file its final name in the place of what had it, durably."""
    os.replace(written, target)  # noqa: PTH105 (crash tests stop at each call of os)
    fsync_folder(target.parent)


def remove(path: Path) -> None:
    """Delete a file; one that is gone is fine. `fsync_folder` makes it durable where that matters."""
    with suppress(FileNotFoundError):
        os.unlink(path)  # noqa: PTH108 (crash tests stop at each call of os)


def append_line(path: Path, data: bytes) -> None:
    """Add to a file in one call, so that lines of several processes do not mix; no power cut is thought of: for logs.

    Raises:
        OSError: It cannot be written, or is a link.
    """
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def link_or_not(source: Path, target: Path) -> bool:
    """Hard-link a file; False where the file system cannot."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in NO_HARD_LINKS:
            return False
        raise
    return True


# --- made of them -----------------------------------------------------------------------------------------


def write_atomic(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file so that it is seen whole or not at all, and survives a power cut.

    Args:
        path: Target; its folder must exist. An existing file is replaced by rename.
        data: The whole content.
        mode: Permission bits of the new file.

    Raises:
        NoSpace: The disk is full or read-only; the target is as it was.
    """
    with explained_space(path), temporary(path.parent) as (written, stream):
        stream.write(data)
        seal(stream, mode)
        put_in_place(written, path)


def write_new(path: Path, data: bytes, mode: int = 0o444) -> None:
    """Write a file that must not exist yet: sealed, read back and compared, then named.

    Raises:
        FileExistsError: There is such a file; it stays as it is.
        StoreDamaged: The disk gives back other bytes than were written.
        NoSpace: The disk is full or read-only; nothing is there.
    """
    with explained_space(path), temporary(path.parent) as (written, stream):
        stream.write(data)
        seal(stream, mode)
        if written.read_bytes() != data:
            raise StoreDamaged(f"{path}: reads back differently from what was written. The disk is failing.")
        place(written, path)


def write_json(path: Path, value: Any, mode: int = 0o644) -> None:
    """Write canonical JSON atomically."""
    write_atomic(path, canonical_json(value) + b"\n", mode)


def read_json(path: Path) -> Any:
    """Read JSON that this product wrote.

    Raises:
        StoreDamaged: The file is absent or not JSON.
    """
    try:
        return json.loads(read_whole(path))
    except FileNotFoundError as error:
        raise StoreDamaged(
            f"{path}: is missing. Restore it from a backup; `takedown verify` lists all breaks."
        ) from error
    except (ValueError, RecursionError) as error:
        raise StoreDamaged(f"{path}: is not JSON ({error}). Restore it from a backup.") from error
