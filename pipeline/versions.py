"""The store of published versions: objects named by their digest, and one manifest per version.

In: a candidate folder. Out: a manifest; later the same folder, bit-exact. Never: an object or a published manifest
edited, a pickle, a file that was not hashed again after it was written. The caller holds the workspace's write lock
while it publishes. A manifest counts once the ledger names it; one without is the rest of an interrupted publish.

Layout: ``objects/<first two hex>/<hex>`` (read-only files), ``<six digits>.json``; ``.tmp-*`` is being written.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, NoReturn

from pydantic import ValidationError

from pipeline.digests import TensorDigest, tensor_root
from pipeline.errors import StoreDamaged, UnsupportedModel, UsageError
from pipeline.files import (
    CHUNK_BYTES,
    canonical_json,
    digest_bytes,
    digest_file,
    explained_space,
    fsync_folder,
    write_atomic,
)
from pipeline.records import Break, StoredFile, VersionManifest
from pipeline.safefile import file_and_tensor_digests, is_plain_name, join_tensors, model_root, weight_files

TEMPORARY = ".tmp-"
"""Prefix of files being written; after a crash they are left and mean nothing."""

MAY_HOLD_CODE = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".py", ".pyc", ".so"})
"""Pickles and code: run when loaded."""
MAY_HOLD_WEIGHTS = frozenset({".h5", ".msgpack", ".onnx", ".gguf", ".npy", ".npz"})
"""Weights that no tensor root covers: the text could be kept there unseen."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_ROOT = re.compile(r"root-sha256:[0-9a-f]{64}")
_MANIFEST_NAME = re.compile(r"[0-9]{6}\.json|[1-9][0-9]{6,}\.json")
_NO_HARD_LINKS = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


def _copy_hashed(source: Path, stream: BinaryIO) -> str:
    """Copy a file into an open one; returns ``sha256:<hex>`` of the bytes that went through."""
    hasher = hashlib.sha256()
    with source.open("rb") as origin:
        while piece := origin.read(CHUNK_BYTES):
            hasher.update(piece)
            stream.write(piece)
    return f"sha256:{hasher.hexdigest()}"


@contextmanager
def _temporary(folder: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A fresh file to write in a folder; gone at the end, under this name."""
    fd, name = tempfile.mkstemp(prefix=TEMPORARY, dir=folder)
    try:
        with os.fdopen(fd, "wb") as stream:
            yield Path(name), stream
    finally:
        Path(name).unlink(missing_ok=True)


def _seal(stream: BinaryIO, mode: int) -> None:
    """Bring a written file to the disk with its final permissions."""
    stream.flush()
    os.fchmod(stream.fileno(), mode)
    os.fsync(stream.fileno())


def _place(temporary: Path, target: Path) -> None:
    """Give a sealed file its final name, never replacing another file, durably."""
    try:
        os.link(temporary, target)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        os.rename(temporary, target)  # noqa: PTH104  (the tests stop the process at each call of os)
    fsync_folder(target.parent)


def _make_folder(folder: Path) -> None:
    """Create a folder durably; an existing one is fine."""
    if not folder.is_dir():
        folder.mkdir(exist_ok=True)
        fsync_folder(folder.parent)


def _candidate_files(folder: Path) -> dict[str, Path]:
    """Every file of a model folder by name, after refusing what may not be in one.

    Raises:
        UnsupportedModel: Links, subfolders, pickles, code, or weights in another format; all are named.
    """
    if not folder.is_dir():
        raise UnsupportedModel(f"{folder}: is not a folder. Name a folder that save_pretrained wrote.")
    files, problems = {}, []
    for path in sorted(folder.iterdir()):
        if not stat.S_ISREG(path.lstat().st_mode):
            problems.append(f"{path.name}: is a link, a folder or a device, expected plain files only")
        elif path.suffix.lower() in MAY_HOLD_CODE | MAY_HOLD_WEIGHTS:
            problems.append(f"{path.name}: may hold code, or weights that are not safetensors")
        elif not is_plain_name(path.name):
            problems.append(f"{path.name!r}: is not a name that every system can store")
        else:
            files[path.name] = path
    if problems:
        raise UnsupportedModel(f"{folder}: cannot be stored. Remove:\n  " + "\n  ".join(problems))
    return files


def _candidate_digests(folder: Path, files: Mapping[str, Path]) -> tuple[dict[str, str], str]:
    """Digest every file of a candidate, and its tensors; returns both, each byte read once."""
    try:
        weights = weight_files(files)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{folder}: {error}") from None
    digests, shards = {}, {}
    for name, path in files.items():
        if name in weights.names:
            digests[name], shards[name] = file_and_tensor_digests(path)
        else:
            digests[name] = digest_file(path)
    return digests, tensor_root(join_tensors(folder, shards, weights.weight_map))


class VersionStore:
    """The versions of one lineage, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.objects = folder / "objects"

    # --- names -------------------------------------------------------------------------------------------

    def manifest_path(self, version: int) -> Path:
        """Where the manifest of a version lies."""
        return self.folder / f"{version:06d}.json"

    def object_path(self, digest: str) -> Path:
        """Where the object with a digest (``sha256:<hex>``) lies."""
        hexes = digest.removeprefix("sha256:")
        return self.objects / hexes[:2] / hexes

    def name(self, path: Path) -> str:
        """A path as named in breaks: from the store's folder on."""
        return str(path.relative_to(self.folder.parent))

    # --- publish -----------------------------------------------------------------------------------------

    def publish(
        self,
        candidate: Path,
        *,
        version: int,
        parent: VersionManifest | None,
        created_at: datetime,
        run_id: str | None,
        requests: Sequence[str],
        settings: Mapping[str, object],
        report: Mapping[str, object],
        software: Mapping[str, str],
        replace_orphan: bool = False,
    ) -> VersionManifest:
        """Store a candidate as a version: objects, then everything read back, then the manifest.

        Publishing identical content again changes nothing and returns the stored manifest, so a killed run simply
        repeats the call.

        Args:
            candidate: A flat model folder; every file in it becomes part of the version.
            version: Its number.
            parent: Manifest that it was made from; None for v0 only.
            created_at: When, with zone.
            run_id: Run that made it.
            requests: Requests that it is the first to exclude.
            settings: Resolved settings.
            report: Summary of what was done and measured; ids and numbers, never texts.
            software: Versions of the software.
            replace_orphan: Replace a different manifest of this number. Only for one that the ledger does not name.

        Returns:
            The manifest as stored.

        Raises:
            UnsupportedModel: The folder holds what may not be stored; nothing was written.
            UsageError: Another manifest has this number, and ``replace_orphan`` is not set or later versions exist.
            StoreDamaged: The candidate is not a sound model, or what was written does not read back the same.
            NoSpace: The disk is full or read-only. Nothing of the version is visible.
            ValueError: A parent that cannot be one, a time without zone, or settings or a report with NaN.
        """
        if (parent is None) != (version == 0) or (parent is not None and parent.version >= version):
            raise ValueError(f"version {version} cannot have parent {parent and parent.version}")
        if created_at.tzinfo is None:
            raise ValueError("created_at needs a zone")
        canonical_json([dict(settings), dict(report)])  # refuses what pydantic would write as null: NaN, infinity
        if parent is not None and (stored := self.manifest(parent.version)) != parent:
            raise StoreDamaged(f"v{parent.version}: the store has root {stored.root}, the caller {parent.root}.")
        files = _candidate_files(candidate)
        digests, root = _candidate_digests(candidate, files)
        with explained_space(self.folder):
            _make_folder(self.folder)
            _make_folder(self.objects)
            stored_files = tuple(self._store(name, path, digests[name]) for name, path in files.items())
        manifest = VersionManifest(
            version=version,
            root=root,
            parent=parent.version if parent else None,
            parent_root=parent.root if parent else None,
            created_at=created_at,
            run_id=run_id,
            requests=tuple(requests),
            files=stored_files,
            settings=dict(settings),
            report=dict(report),
            software=dict(software),
        )
        self._check_root(manifest)
        self._write_manifest(manifest, replace_orphan)
        return self.manifest(version)

    def _store(self, name: str, source: Path, digest: str) -> StoredFile:
        """Make sure that a file's content is an object; one that is there already is hashed again."""
        target = self.object_path(digest)
        if not target.exists():
            _make_folder(target.parent)
            with _temporary(target.parent) as (temporary, stream):
                if _copy_hashed(source, stream) != digest:
                    raise StoreDamaged(f"{source}: changed while it was published. Run the same command again.")
                _seal(stream, 0o444)
                if digest_file(temporary) != digest:
                    self._damaged(temporary, f"reads back differently from what was written ({name})")
                _place(temporary, target)
        elif (found := digest_file(target)) != digest:
            self._damaged(target, f"holds {found}; it was changed after it was written")
        return StoredFile(path=name, digest=digest, size=target.stat().st_size)

    def _write_manifest(self, manifest: VersionManifest, replace_orphan: bool) -> None:
        path = self.manifest_path(manifest.version)
        data = _manifest_bytes(manifest)
        if path.exists():
            try:
                existing = self.manifest(manifest.version)
                if _manifest_bytes(existing.model_copy(update={"created_at": manifest.created_at})) == data:
                    return
            except StoreDamaged:
                if not replace_orphan:
                    raise
            # An orphan is always the newest: the next publish, under the same number, comes before any later one.
            if not replace_orphan or self.numbers()[-1] > manifest.version:
                raise UsageError(
                    f"{path}: v{manifest.version} exists with other content, and a published version is never "
                    "replaced. Publish under the next number."
                )
            write_atomic(path, data, mode=0o444)
            return
        with explained_space(path), _temporary(self.folder) as (temporary, stream):
            stream.write(data)
            _seal(stream, 0o444)
            _place(temporary, path)

    # --- read --------------------------------------------------------------------------------------------

    def numbers(self) -> tuple[int, ...]:
        """Versions that have a manifest, ascending; the ledger says which of them count."""
        if not self.folder.is_dir():
            return ()
        return tuple(sorted(int(p.stem) for p in self.folder.iterdir() if _MANIFEST_NAME.fullmatch(p.name)))

    def manifest(self, version: int) -> VersionManifest:
        """Read and check a manifest.

        Raises:
            StoreDamaged: It is missing, or not exactly what `publish` writes.
        """
        path = self.manifest_path(version)
        try:
            data = path.read_bytes()
            manifest = VersionManifest.model_validate(json.loads(data))
            sound = _manifest_bytes(manifest) == data
        except FileNotFoundError:
            self._damaged(path, "is missing")
        except ValidationError as error:
            self._damaged(path, f"is not a manifest ({'.'.join(str(p) for p in error.errors()[0]['loc'])})")
        except (OSError, ValueError, RecursionError) as error:
            self._damaged(path, f"cannot be read ({error})")
        names = [file.path for file in manifest.files]
        if not sound or len(set(names)) != len(names):
            self._damaged(path, "is not in the form that is written")
        if manifest.version != version:
            self._damaged(path, f"is the manifest of v{manifest.version}")
        if bad := [name for name in names if not is_plain_name(name)]:
            self._damaged(path, f"names a file outside the model folder ({bad[0]!r})")
        if not _ROOT.fullmatch(manifest.root) or not all(_DIGEST.fullmatch(file.digest) for file in manifest.files):
            self._damaged(path, "holds something that is not a digest")
        return manifest

    def manifest_digest(self, version: int) -> str:
        """Digest of a manifest's bytes, as noted in the ledger.

        Raises:
            StoreDamaged: It is missing or cannot be read.
        """
        path = self.manifest_path(version)
        try:
            return digest_bytes(path.read_bytes())
        except OSError as error:
            self._damaged(path, f"cannot be read ({error.strerror})")

    def restore(self, version: int, folder: Path, link: bool = False) -> VersionManifest:
        """Write a version's model folder, exactly the files that were published, every byte hashed on the way.

        Args:
            version: Which.
            folder: Where; must be absent or empty.
            link: Hard-link the store's own read-only files instead of copying (copies where that is impossible).
                Faster, but whoever writes into such a file in place damages the store: only for readers.

        Raises:
            UsageError: The folder is not empty.
            StoreDamaged: A file does not match its digest, or the weights not their root. Nothing is left behind.
            NoSpace: The disk is full or read-only. Nothing is left behind.
        """
        manifest = self.manifest(version)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"{folder}: exists and is not empty. Name a new folder.")
        made = not folder.exists()
        written: list[Path] = []
        with explained_space(folder):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                for file in manifest.files:
                    target = folder / file.path
                    written.append(target)
                    self._restore_file(version, file, target, link)
                if (found := model_root(folder)) != manifest.root:
                    raise StoreDamaged(f"v{version}: its weights have root {found}, its manifest says {manifest.root}.")
                fsync_folder(folder)
            except BaseException:
                for path in written:
                    path.unlink(missing_ok=True)
                if made:
                    with suppress(OSError):
                        folder.rmdir()
                raise
        return manifest

    def _restore_file(self, version: int, file: StoredFile, target: Path, link: bool) -> None:
        source = self.object_path(file.digest)
        if not source.is_file():
            raise StoreDamaged(
                f"v{version}: {file.path}: its object {self.name(source)} is missing. Restore it from a backup."
            )
        if link and _hard_link(source, target):
            found = digest_file(target)
        else:
            with target.open("xb") as stream:
                found = _copy_hashed(source, stream)
                _seal(stream, 0o644)
        if found != file.digest:
            raise StoreDamaged(
                f"v{version}: {file.path}: its object {self.name(source)} holds {found}; it was changed after it was "
                "published. Restore it from a backup."
            )

    # --- check -------------------------------------------------------------------------------------------

    def check(self, version: int) -> list[Break]:
        """Check one version: its manifest, every object, the tensor root. Never raises on damaged content."""
        return StoreCheck(self).version(version)

    def unreferenced(self) -> tuple[Path, ...]:
        """Objects that no manifest names: left by an interrupted publish, or foreign.

        Raises:
            StoreDamaged: A manifest cannot be read, so that nobody knows what it names.
        """
        # Objects are listed first: a publish that runs meanwhile adds objects before their manifest.
        objects = self.object_files()
        named = {self.object_path(f.digest) for n in self.numbers() for f in self.manifest(n).files}
        return tuple(path for path in objects if path not in named)

    def object_files(self) -> tuple[Path, ...]:
        """Everything under ``objects/`` but folders and temporary files, sorted."""
        return tuple(
            sorted(
                path
                for path in self.objects.rglob("*")
                if not path.name.startswith(TEMPORARY) and (path.is_symlink() or not path.is_dir())
            )
        )

    def collect(self) -> tuple[Path, ...]:
        """Remove temporary files and unreferenced objects of interrupted publishes; the caller holds the write lock.

        Returns:
            What was removed.

        Raises:
            StoreDamaged: A manifest cannot be read; nothing was removed.
        """
        garbage = (*self.unreferenced(), *self.folder.glob(f"{TEMPORARY}*"), *self.objects.glob(f"*/{TEMPORARY}*"))
        for path in garbage:
            path.unlink()
        return garbage

    def _check_root(self, manifest: VersionManifest) -> None:
        """Read every object of a version back and compare with what its manifest says."""
        if breaks := StoreCheck(self).content(manifest):
            raise StoreDamaged(
                "\n".join(f"{b.where}: {b.found}. {b.means}" for b in breaks) + "\nThe version was not published."
            )

    def _damaged(self, path: Path, found: str) -> NoReturn:
        raise StoreDamaged(f"{path}: {found}. Restore it from a backup; `takedown verify` lists all breaks.")


class StoreCheck:
    """Checks versions of one store, reading each object once however many versions share it."""

    def __init__(self, store: VersionStore) -> None:
        self._store = store
        self._objects: dict[str, str | None] = {}
        self._tensors: dict[str, list[TensorDigest]] = {}

    def version(self, version: int) -> list[Break]:
        """All breaks of one version."""
        try:
            manifest = self._store.manifest(version)
        except StoreDamaged as error:
            return [manifest_break(version, error)]
        return self.content(manifest)

    def content(self, manifest: VersionManifest) -> list[Break]:
        """All breaks between a manifest and the objects that it names."""
        where = f"v{manifest.version}"
        breaks = []
        for file in manifest.files:
            if (found := self._object(file)) is not None:
                path = self._store.object_path(file.digest)
                means = f"{where} cannot be restored, nor any other version that shares this file."
                breaks.append(Break(where=f"{self._store.name(path)} ({where}: {file.path})", found=found, means=means))
        if breaks:
            return breaks
        paths = {file.path: self._store.object_path(file.digest) for file in manifest.files}
        digests = {file.path: file.digest for file in manifest.files}
        try:
            weights = weight_files(paths)
            shards = {name: self._weights(digests[name]) for name in weights.names}
            root = tensor_root(join_tensors(where, shards, weights.weight_map))
        except (StoreDamaged, UnsupportedModel) as error:
            return [Break(where=where, found=str(error), means="Its files are not the model that was published.")]
        if root != manifest.root:
            found = f"weights have root {root}, the manifest says {manifest.root}"
            return [Break(where=where, found=found, means="The manifest speaks of other weights than it names.")]
        return []

    def _object(self, file: StoredFile) -> str | None:
        """What is wrong with an object, or None; each digest is read once."""
        if file.digest not in self._objects:
            self._objects[file.digest] = self._read(file)
        found = self._objects[file.digest]
        if found is None and (size := self._store.object_path(file.digest).stat().st_size) != file.size:
            return f"has {size} bytes, the manifest says {file.size}"
        return found

    def _read(self, file: StoredFile) -> str | None:
        path = self._store.object_path(file.digest)
        try:
            if not stat.S_ISREG(path.lstat().st_mode):
                return "is not a regular file"
            if file.path.endswith(".safetensors"):
                found, self._tensors[file.digest] = file_and_tensor_digests(path)
            else:
                found = digest_file(path)
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        except StoreDamaged as error:
            return f"was changed after it was published: {error}"
        return None if found == file.digest else f"holds {found}; it was changed after it was published"

    def _weights(self, digest: str) -> list[TensorDigest]:
        if digest not in self._tensors:  # the same bytes are also a file with another ending
            self._tensors[digest] = file_and_tensor_digests(self._store.object_path(digest))[1]
        return self._tensors[digest]


def manifest_break(version: int, error: StoreDamaged) -> Break:
    """A manifest that cannot be read, as a break."""
    return Break(
        where=f"v{version}", found=str(error), means=f"Nobody can say what v{version} is; it cannot be restored."
    )


def _manifest_bytes(manifest: VersionManifest) -> bytes:
    return canonical_json(manifest.model_dump(mode="json")) + b"\n"


def _hard_link(source: Path, target: Path) -> bool:
    """Link a file; False where the file system cannot."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in _NO_HARD_LINKS:
            return False
        raise
    return True
