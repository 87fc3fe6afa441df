"""Content by digest: whole files, and weight files as forward deltas against other weight files.

In: files and their digests. Out: the same bytes, every one hashed on the way. Never: an object edited or replaced, a
delta that was not read back and rebuilt, a name that says something else than the content.

Layout: ``objects/<first two hex>/<hex>`` holds the content with that SHA-256; ``deltas/<first two hex>/<target
hex>.<base hex>`` says how to make the content ``target`` from the content ``base``. What names a digest (manifests,
events) does not know which of the two it is, so a store can be repacked without touching them. Files are read-only.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import suppress
from itertools import cycle, pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from pipeline.delta import DeltaFile, TensorSource, WholeFile, can_delta, rebuild, write_delta
from pipeline.digests import TensorDigest
from pipeline.errors import StoreDamaged
from pipeline.files import (
    CHUNK_BYTES,
    TEMPORARY,
    digest_bytes,
    digest_file,
    explained_space,
    fsync_folder,
    link_or_not,
    make_folder,
    place,
    read_whole,
    remove,
    seal,
    temporary,
    unreadable,
)
from pipeline.footer import read_delta, read_footer
from pipeline.lanes import Lane
from pipeline.safefile import file_and_tensor_digests

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_DELTA_NAME = re.compile(r"([0-9a-f]{64})\.([0-9a-f]{64})")

WORTHWHILE = 0.9
"""A delta larger than this share of the whole file is not kept: it saves little and lengthens every restore."""


def hexadecimal(digest: str) -> str:
    """The hex digits of ``sha256:<hex>``.

    Raises:
        StoreDamaged: It is no such digest, so that it may not become part of a path.
    """
    if not DIGEST.fullmatch(digest):
        raise StoreDamaged(f"{digest[:80]!r}: is not a SHA-256 digest. `takedown verify` lists all breaks.")
    return digest.removeprefix("sha256:")


class HashedStream:
    """A stream to write to that also hashes what goes through."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._hasher = stream, hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Write and hash."""
        count = self._stream.write(data)
        self._hasher.update(data[:count])
        return count

    @property
    def digest(self) -> str:
        """``sha256:<hex>`` of everything written."""
        return f"sha256:{self._hasher.hexdigest()}"


class EagerStream:
    """A stream to write to that has the system bring what it gets to the disk at once, while the next is made.

    Otherwise it begins with fsync, which then takes as long as everything before it.

    Args:
        stream: An empty file.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._position = stream, 0

    def write(self, data: bytes) -> int:
        """Write a part of the data, at most 1 MiB, and have it brought to the disk; returns how many bytes it was."""
        count = self._stream.write(data[:CHUNK_BYTES])
        if hasattr(os, "posix_fadvise"):
            # Linux begins to write dirty pages out, and drops none of them while it does. It is advice: if it cannot be
            # taken, fsync does all of the work.
            with suppress(OSError):
                os.posix_fadvise(self._stream.fileno(), self._position, count, os.POSIX_FADV_DONTNEED)
        self._position += count
        return count


def copy_hashed(source: Path, stream: BinaryIO) -> str:
    """Copy a file into an open one; returns ``sha256:<hex>`` of the bytes that went through."""
    hashed = HashedStream(stream)
    with source.open("rb") as origin:
        while piece := origin.read(CHUNK_BYTES):
            hashed.write(piece)
    return hashed.digest


class StoredDelta(NamedTuple):
    """A delta as the ledger notes it.

    Attributes:
        name: ``<target hex>.<base hex>``.
        digest: SHA-256 of the delta file.
        size: Its bytes.
        changed: Entries whose bits differ.
    """

    name: str
    digest: str
    size: int
    changed: int


class ObjectStore:
    """The objects and deltas below one folder.

    Args:
        folder: Where ``objects/`` and ``deltas/`` lie, or will lie after the first write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.objects = folder / "objects"
        self.deltas = folder / "deltas"

    # --- names ---------------------------------------------------------------------------------------------

    def object_path(self, digest: str) -> Path:
        """Where the content with a digest lies if it is kept whole."""
        name = hexadecimal(digest)
        return self.objects / name[:2] / name

    def delta_path(self, target: str, base: str) -> Path:
        """Where the delta from one content to another lies."""
        name = hexadecimal(target)
        return self.deltas / name[:2] / f"{name}.{hexadecimal(base)}"

    def bases(self, target: str) -> tuple[str, ...]:
        """Digests of the contents that there is a delta from; by their names alone."""
        name = hexadecimal(target)
        with suppress(OSError):  # from what cannot be listed nothing can be read
            found = map(_DELTA_NAME.fullmatch, sorted(p.name for p in (self.deltas / name[:2]).iterdir()))
            return tuple(f"sha256:{m[2]}" for m in found if m and m[1] == name)
        return ()

    def is_whole(self, digest: str) -> bool:
        """Whether a content is kept whole."""
        return self.object_path(digest).is_file()

    def chain(self, digest: str, without: AbstractSet[Path] = frozenset()) -> tuple[str, ...] | None:
        """The contents from a whole one to this one, each made from the one before; None where that cannot be done.

        The shortest where there are several. Looks at names only.

        Args:
            digest: Which content.
            without: Files that are taken as gone.
        """
        paths, seen = list[tuple[str, ...]]([(digest,)]), {digest}
        while paths:
            wider = list[tuple[str, ...]]()
            for path in paths:
                if self.is_whole(path[0]) and self.object_path(path[0]) not in without:
                    return path
                for base in self.bases(path[0]):
                    # A loop, of forged deltas or of two contents that were made from each other, ends here.
                    if base not in seen and self.delta_path(path[0], base) not in without:
                        seen.add(base)
                        wider.append((base, *path))
            paths = wider
        return None

    def paths(self, digest: str) -> tuple[Path, ...]:
        """The files that a content is read from, whole one first; empty where it cannot be read."""
        chain = self.chain(digest)
        if chain is None:
            return ()
        return (self.object_path(chain[0]), *(self.delta_path(t, b) for b, t in pairwise(chain)))

    def files(self) -> tuple[Path, ...]:
        """Everything under ``objects/`` and ``deltas/`` but folders and temporary files, sorted."""
        return tuple(
            sorted(
                path
                for folder in (self.objects, self.deltas)
                for path in folder.rglob("*")
                if not path.name.startswith(TEMPORARY) and (path.is_symlink() or not path.is_dir())
            )
        )

    def temporary_files(self) -> Iterator[Path]:
        """What killed processes were writing."""
        for folder in (self.folder, self.objects, self.deltas):
            yield from folder.glob(f"{TEMPORARY}*")
            yield from folder.glob(f"*/{TEMPORARY}*") if folder != self.folder else ()

    def label(self, path: Path) -> str:
        """A path as people are shown it: relative to the workspace."""
        return str(path.relative_to(self.folder.parent))

    # --- write ---------------------------------------------------------------------------------------------

    def put(self, source: Path, digest: str) -> None:
        """Keep a file whole; one that is there already is hashed again.

        Raises:
            StoreDamaged: The source changed meanwhile, or what is there, or was read back, has another digest.
        """
        target = self._room(self.object_path(digest))
        if target.exists():
            self._same(target, digest)
            return
        with temporary(target.parent) as (written, stream):
            if copy_hashed(source, stream) != digest:
                raise StoreDamaged(f"{source}: changed while it was stored. Run the same command again.")
            self._commit(written, stream, digest, target)

    def put_bytes(self, data: bytes) -> str:
        """Keep a small content whole; returns its digest."""
        digest = digest_bytes(data)
        target = self._room(self.object_path(digest))
        if target.exists():
            self._same(target, digest)
            return digest
        with temporary(target.parent) as (written, stream):
            stream.write(data)
            self._commit(written, stream, digest, target)
        return digest

    def put_delta(
        self,
        source: Path,
        digest: str,
        base: str,
        known: Iterable[TensorDigest] = (),
        origin: TensorSource | None = None,
    ) -> StoredDelta | None:
        """Keep a weight file as a delta against a content that the store has.

        Args:
            source: The file.
            digest: Its digest.
            base: Digest of the content.
            known: The digests of the file's tensors, where they were taken already; they are not taken again, and
                whether the delta leads to them is seen when it is rebuilt.
            origin: The content ``base``, where the caller has it at hand, with the digests that its tensors must have;
                else it is made from the store.

        Returns:
            The delta; None where the two files hold other tensors, or where it would save too little.

        Raises:
            StoreDamaged: The base does not hold, or the delta was read back differently.
        """
        fresh = WholeFile(source, digest, known)
        origin = origin or self.source(base)
        if not can_delta(origin, fresh):
            return None
        target = self._room(self.delta_path(digest, base))
        if target.exists():  # of an interrupted publish; whether it leads where it should is seen when it is rebuilt
            return self.stored_delta(target)
        with temporary(target.parent) as (written, stream):
            stats = write_delta(origin, fresh, stream)
            if stats.nbytes > WORTHWHILE * source.stat().st_size:
                return None
            self._commit(written, stream, stats.digest, target)
        return StoredDelta(target.name, stats.digest, stats.nbytes, stats.changed)

    def make_whole(self, digest: str) -> None:
        """Keep a content whole that can be made by deltas; they stay.

        Raises:
            StoreDamaged: It cannot be made, or differs from its digest.
        """
        target = self._room(self.object_path(digest))
        if target.exists():
            return
        with temporary(target.parent) as (written, stream):
            hashed = HashedStream(stream)
            rebuild(self.source(digest), cast(BinaryIO, hashed))
            if hashed.digest != digest:
                raise StoreDamaged(f"{self.label(target)}: its deltas give {hashed.digest}. Restore from a backup.")
            self._commit(written, stream, digest, target)

    def _room(self, target: Path) -> Path:
        for folder in (self.folder, target.parent.parent, target.parent):
            make_folder(folder)
        return target

    def _same(self, path: Path, digest: str) -> None:
        if (found := digest_file(path)) != digest:
            raise StoreDamaged(
                f"{path}: holds {found}; it was changed after it was written. Restore it from a backup; "
                "`takedown verify` lists all breaks."
            )

    def _commit(self, written: Path, stream: BinaryIO, digest: str, target: Path) -> None:
        """Seal, read back, hash again, name."""
        seal(stream, 0o444)
        if digest_file(written) != digest:
            raise StoreDamaged(f"{target}: reads back differently from what was written. The disk is failing.")
        place(written, target)

    # --- read ----------------------------------------------------------------------------------------------

    def source(self, digest: str) -> TensorSource:
        """A weight file as a stream of tensors, whole or through its deltas.

        Raises:
            StoreDamaged: It is not there, or one of its files is not what it should be.
        """
        chain = self.chain(digest)
        if chain is None:
            raise StoreDamaged(
                f"{self.label(self.object_path(digest))}: is missing, and no deltas lead to it. Restore it from a "
                "backup."
            )
        links = [(self.delta_path(target, base), target) for base, target in pairwise(chain)]
        source: TensorSource = WholeFile(self.object_path(chain[0]), chain[0])
        with Lane() as one, Lane() as two:
            contents = [lane.do(read_delta, path) for lane, (path, _) in zip(cycle((one, two)), links, strict=False)]
            for (path, target), content in zip(links, contents, strict=True):
                source = DeltaFile(path, target, source, content.result())
        return source

    def read(self, digest: str) -> bytes:
        """A small content that is kept whole.

        Raises:
            StoreDamaged: It is missing or has another digest.
        """
        path = self.object_path(digest)
        try:
            data = read_whole(path)
        except OSError as error:
            raise StoreDamaged(f"{self.label(path)}: {unreadable(error)}. Restore it from a backup.") from error
        if digest_bytes(data) != digest:
            raise StoreDamaged(f"{self.label(path)}: was changed after it was written. Restore it from a backup.")
        return data

    def write_out(self, digest: str, target: Path, link: bool = False) -> None:
        """Write a content that is kept whole as a file of its own, hashed on the way.

        Args:
            digest: Which.
            target: File to make.
            link: Hard-link it instead of copying where that is possible; it is then read-only.

        Raises:
            StoreDamaged: It is missing or differs from its digest.
        """
        origin = self.object_path(digest)
        if not origin.is_file():
            raise StoreDamaged(f"{self.label(origin)}: is missing. Restore it from a backup.")
        if link and link_or_not(origin, target):
            found = digest_file(target)
        else:
            with target.open("xb") as stream:
                found = copy_hashed(origin, stream)
                seal(stream, 0o644)
        self._expect(digest, found)

    def write_weights(self, digest: str, header: str, target: Path, link: bool = False) -> list[TensorDigest]:
        """Write a weight file, whole or through its deltas, every byte hashed on the way.

        Of a whole one both the file and its tensors are hashed, so that a damaged file can be named; of one made by
        deltas the tensors, which with the header are all of its bytes.

        Args:
            digest: Which.
            header: Digest of its safetensors header.
            target: File to make.
            link: Hard-link a whole one instead of copying where that is possible; it is then read-only.

        Returns:
            The digests of its tensors, of the bytes that were written; with the header they are the whole file.

        Raises:
            StoreDamaged: It differs from its digest, or cannot be made.
        """
        origin = self.object_path(digest)
        if link and self.is_whole(digest) and link_or_not(origin, target):
            found, tensors = file_and_tensor_digests(target)
            self._expect(digest, found)
            return tensors
        with target.open("xb", buffering=0) as stream:
            eager = EagerStream(cast(BinaryIO, stream))
            if self.is_whole(digest):
                hashed = HashedStream(cast(BinaryIO, eager))
                tensors = rebuild(self.source(digest), cast(BinaryIO, hashed))
                self._expect(digest, hashed.digest)
            else:
                tensors = rebuild(self.source_with(digest, header), cast(BinaryIO, eager))
            seal(cast(BinaryIO, stream), 0o644)
        return tensors

    def source_with(self, digest: str, header: str) -> TensorSource:
        """A weight file as a stream of tensors, if it has this safetensors header.

        Raises:
            StoreDamaged: It has another one, is not there, or one of its files is not what it should be.
        """
        source = self.source(digest)
        if (found := digest_bytes(source.header)) != header:
            raise StoreDamaged(
                f"{self.label(source.path)}: leads to a safetensors header with {found}, expected {header}. Restore it "
                "from a backup."
            )
        return source

    def _expect(self, digest: str, found: str) -> None:
        if found != digest:
            raise StoreDamaged(
                f"{self.label(self.object_path(digest))}: holds, or its deltas give, {found}; it was changed after it "
                "was published. Restore it from a backup."
            )

    def stored_delta(self, path: Path) -> StoredDelta:
        """A delta as the ledger notes it.

        Raises:
            StoreDamaged: The file is no whole delta.
        """
        changed = sum(tensor.changed for tensor in read_footer(path).tensors)
        return StoredDelta(path.name, digest_file(path), path.stat().st_size, changed)

    def drop(self, paths: list[Path]) -> None:
        """Delete files durably.

        Raises:
            NoSpace: The disk is read-only; some of them may be gone.
        """
        with explained_space(self.folder):
            for path in paths:
                remove(path)
            for folder in sorted({path.parent for path in paths}):
                fsync_folder(folder)
