"""Checks versions of one store against their manifests, reading each file once however many versions share it.

In: a store and what the ledger says of its deltas. Out: every break, named. Never: an exception for damaged content.

Three depths. Quick: every file that a version needs is there, with its size. Full: every file has its digest, every
delta leads from and to the tensors that it names, and all tensors together have the version's root. Deep: every version
is made again from the store, and every tensor hashed.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from enum import IntEnum
from itertools import pairwise
from pathlib import Path

from pipeline.delta import DeltaFile, TensorSource, WholeFile
from pipeline.digests import TensorDigest, tensor_root
from pipeline.errors import StoreDamaged, TakedownError, UnsupportedModel
from pipeline.files import digest_bytes, digest_file
from pipeline.objects import StoredDelta
from pipeline.records import Break, StoredFile, VersionManifest
from pipeline.safefile import file_and_tensor_digests, join_tensors, weight_files
from pipeline.versions import VersionStore


class Depth(IntEnum):
    """How much is re-read; see the head of this file."""

    QUICK = 0
    FULL = 1
    DEEP = 2


class StoreCheck:
    """Checks versions of one store.

    Args:
        store: The store.
        deltas: Delta files by name, as the ledger notes them last.
        depth: How much is re-read.
    """

    def __init__(self, store: VersionStore, deltas: Mapping[str, StoredDelta], depth: Depth = Depth.FULL) -> None:
        self._store, self._objects = store, store.objects
        self._deltas, self._depth = deltas, depth
        self._found: dict[Path, str | None] = {}
        self._paths: dict[str, tuple[Path, ...]] = {}
        self._sources: dict[str, TensorSource] = {}
        self._tensors: dict[str, list[TensorDigest]] = {}

    def version(self, version: int) -> list[Break]:
        """All breaks of one version."""
        try:
            manifest = self._store.manifest(version)
        except StoreDamaged as error:
            return [manifest_break(version, error)]
        return self.content(manifest)

    def content(self, manifest: VersionManifest) -> list[Break]:
        """All breaks between a manifest and what it is made from."""
        where = f"v{manifest.version}"
        means = f"{where} cannot be restored, nor any other version that shares this file."
        breaks = self._file_breaks(where, "table of tensors", manifest.tensors, None, means)
        for file in manifest.files:
            breaks += self._file_breaks(where, file.path, file.digest, file, means)
        if breaks or self._depth is Depth.QUICK:
            return breaks
        try:
            self._store.tensors(manifest)
            found = self._root(manifest)
            if found == manifest.root and self._depth is Depth.DEEP:
                self._store.check_restores(manifest)
        except (StoreDamaged, UnsupportedModel) as error:
            return [Break(where=where, found=str(error), means="Its files are not the model that was published.")]
        if found != manifest.root:
            text = f"weights have root {found}, the manifest says {manifest.root}"
            return [Break(where=where, found=text, means="The manifest speaks of other weights than it names.")]
        return []

    def evidence(self, where: str, name: str, digest: str) -> list[Break]:
        """Breaks of a content that an event names."""
        means = f"What was decided in {where} stays; what was measured for it cannot be shown."
        return self._file_breaks(where, f"evidence {name!r}", digest, None, means)

    def paths(self, digest: str) -> tuple[Path, ...]:
        """`ObjectStore.paths`, looked up once; a version's files continue those of the version before.

        Raises:
            StoreDamaged: It is no digest.
        """
        if digest not in self._paths:
            bases = () if self._objects.is_whole(digest) else self._objects.bases(digest)
            known = self._paths.get(bases[0], ()) if len(bases) == 1 else ()
            self._paths[digest] = (
                (*known, self._objects.delta_path(digest, bases[0])) if known else self._objects.paths(digest)
            )
        return self._paths[digest]

    # --- one content ---------------------------------------------------------------------------------------

    def _file_breaks(self, where: str, name: str, digest: str, file: StoredFile | None, means: str) -> list[Break]:
        """What is wrong with the files that a content is read from."""
        try:
            paths = self.paths(digest)
            expected = self._objects.object_path(digest)
        except StoreDamaged as error:
            return [Break(where=f"{where}: {name}", found=str(error), means=means)]
        if not paths:
            label = f"{self._objects.label(expected)} ({where}: {name})"
            found = "is not a regular file" if expected.exists() or expected.is_symlink() else "is missing"
            return [Break(where=label, found=found, means=means)]
        return [
            Break(where=f"{self._objects.label(path)} ({where}: {name})", found=wrong, means=means)
            for path in paths
            if (wrong := self._wrong(path, digest, file)) is not None
        ]

    def _wrong(self, path: Path, digest: str, file: StoredFile | None) -> str | None:
        """What is wrong with one file, or None. Its content is looked at once; its size is this manifest's."""
        if path not in self._found:
            self._found[path] = self._read(path, file is not None and file.path.endswith(".safetensors"))
        found = self._found[path]
        whole = path == self._objects.object_path(digest)
        if found is None and whole and file is not None and (size := path.stat().st_size) != file.size:
            return f"has {size} bytes, the manifest says {file.size}"
        return found

    def _read(self, path: Path, weights: bool) -> str | None:
        try:
            if not stat.S_ISREG(path.lstat().st_mode):
                return "is not a regular file"
            is_delta = path.is_relative_to(self._objects.deltas)
            noted = self._deltas.get(path.name)
            if is_delta and noted is None:
                return "no ledger entry names it"
            if noted is not None and is_delta and (size := path.stat().st_size) != noted.size:
                return f"has {size} bytes, the ledger says {noted.size}"
            if self._depth is Depth.QUICK:
                return None
            expected = noted.digest if is_delta and noted is not None else f"sha256:{path.name}"
            found = self._digest_weights(path) if weights and not is_delta else digest_file(path)
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        return None if found == expected else f"holds {found}; it was changed after it was published"

    def _digest_weights(self, path: Path) -> str:
        """Digest of a whole weight file; its tensors are digested in the same pass."""
        try:
            found, tensors = file_and_tensor_digests(path)
        except StoreDamaged:  # no safetensors file any more: which bytes it has is told all the same
            return digest_file(path)
        self._tensors[found] = tensors
        return found

    # --- tensors -------------------------------------------------------------------------------------------

    def _root(self, manifest: VersionManifest) -> str:
        """Root of the tensors that the files hold, or that the deltas promise."""
        digests = {file.path: file.digest for file in manifest.files}
        weights = weight_files({file.path: self._objects.object_path(file.digest) for file in manifest.files})
        shards = {name: self._weights(digests[name]) for name in weights.names}
        for file in (f for f in manifest.files if f.path in weights.names):
            source = self._source(file.digest)
            if (found := len(source.header) + (source.tensors[-1].end if source.tensors else 0)) != file.size:
                raise StoreDamaged(f"{file.path}: is made with {found} bytes, the manifest says {file.size}.")
            if (header := digest_bytes(source.header)) != file.header:
                raise StoreDamaged(f"{file.path}: its header has {header}, the manifest says {file.header}.")
        return tensor_root(join_tensors(f"v{manifest.version}", shards, weights.weight_map))

    def _weights(self, digest: str) -> list[TensorDigest]:
        """Digests of a weight file's tensors: computed where it is whole, else as its delta promises them."""
        if digest not in self._tensors:
            if self._objects.is_whole(digest):
                self._tensors[digest] = file_and_tensor_digests(self._objects.object_path(digest))[1]
            else:
                source = self._source(digest)
                self._tensors[digest] = [
                    TensorDigest(t.name, t.dtype, t.shape, source.promised[t.name]) for t in source.tensors
                ]
        return self._tensors[digest]

    def _source(self, digest: str) -> TensorSource:
        """A weight file with its deltas opened, each once; the first must be made on the tensors of the whole file."""
        chain = self._objects.chain(digest) or (digest,)
        first = chain[0]
        if first not in self._sources:
            self._sources[first] = WholeFile(self._objects.object_path(first), first)
        for base, target in pairwise(chain):
            if target not in self._sources:
                delta = DeltaFile(self._objects.delta_path(target, base), target, self._sources[base])
                if isinstance(delta.base, WholeFile):
                    for tensor in self._weights(base):
                        if delta.pre(tensor.name) != tensor.sha256:
                            raise StoreDamaged(
                                f"{self._objects.label(delta.path)}: was made on another tensor {tensor.name!r} than "
                                f"{self._objects.label(delta.base.path)} holds."
                            )
                self._sources[target] = delta
        return self._sources[digest]


def manifest_break(version: int, error: TakedownError) -> Break:
    """A manifest that cannot be read, as a break."""
    return Break(
        where=f"v{version}", found=str(error), means=f"Nobody can say what v{version} is; it cannot be restored."
    )
