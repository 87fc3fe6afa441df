"""The published versions: one manifest each, over contents by digest.

In: a candidate folder. Out: a manifest; later the same folder, bit-exact. Never: a published manifest edited, a pickle,
a version that was not made again from the store before it counts. The caller holds the workspace's write lock while it
publishes. A manifest counts once the ledger names it; one without is the rest of an interrupted publish.

Layout: ``<six digits>.json`` the manifest, ``<six digits>.sig`` a signature over the model folder (OpenSSF Model
Signing), and the contents as `pipeline.objects` keeps them.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

from pydantic import ValidationError

from pipeline.delta import TensorSource, WholeFile, rebuild
from pipeline.digests import TensorDigest, tensor_root
from pipeline.display import plain
from pipeline.errors import StoreDamaged, UnsupportedModel, UsageError
from pipeline.files import (
    TEMPORARY,
    canonical_json,
    digest_bytes,
    digest_file,
    explained_space,
    fsync_folder,
    make_folder,
    read_whole,
    remove,
    unreadable,
    write_atomic,
    write_new,
)
from pipeline.footer import read_footer
from pipeline.objects import DIGEST, ObjectStore, StoredDelta
from pipeline.records import LedgerEntry, StoredFile, VersionManifest
from pipeline.safefile import (
    WeightFiles,
    file_and_tensor_digests,
    is_plain_name,
    join_tensors,
    open_regular,
    read_header_from,
    weight_files,
)

MAY_HOLD_CODE = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".py", ".pyc", ".so"})
"""Pickles and code: run when loaded."""
MAY_HOLD_WEIGHTS = frozenset({".h5", ".msgpack", ".onnx", ".gguf", ".npy", ".npz"})
"""Weights that no tensor root covers: the text could be kept there unseen."""

SIGNATURE = "model.sig"
"""Name of the signature in a model folder; the public tool leaves a file of this name out of what it checks."""

ROOT = re.compile(r"root-sha256:[0-9a-f]{64}")
_MANIFEST_NAME = re.compile(r"([0-9]{6}|[1-9][0-9]{6,})\.json")

Sign = Callable[[Mapping[str, str], str], bytes]
"""(file → digest, name) → signature bundle."""


class Published(NamedTuple):
    """What a publish did.

    Attributes:
        manifest: The manifest, as it is on disk.
        deltas: The weight files that were kept as deltas.
        signature: Digest of the signature; None where nobody signed.
    """

    manifest: VersionManifest
    deltas: tuple[StoredDelta, ...]
    signature: str | None

    def facts(self) -> dict[str, object]:
        """What the ledger says of a publish."""
        return {
            "root": self.manifest.root,
            "manifest": digest_bytes(manifest_bytes(self.manifest)),
            "parent": self.manifest.parent,
            "deltas": delta_facts(self.deltas),
            "signature": self.signature,
        }


class _Base(NamedTuple):
    """A parent's file.

    Attributes:
        file: As its manifest names it.
        tensors: The parent's table, of all its files.
        copy: Where the file lies outside the store, if it does.
    """

    file: StoredFile
    tensors: Sequence[TensorDigest]
    copy: Path | None

    def source(self) -> TensorSource | None:
        """The copy as what a delta is made on: with the header that was published, and the tensors of the table.

        Raises:
            StoreDamaged: It is missing, or has another header; other tensors are found when they are read.
        """
        if self.copy is None:
            return None
        source = WholeFile(self.copy, self.file.digest, self.tensors)
        if (found := digest_bytes(source.header)) != self.file.header:
            raise StoreDamaged(
                f"{self.copy}: has a safetensors header with {found}, published was {self.file.header}. Restore the "
                "parent to this folder again."
            )
        return source


def delta_facts(deltas: Iterable[StoredDelta]) -> dict[str, object]:
    """Deltas as events name them."""
    return {d.name: {"digest": d.digest, "size": d.size, "changed": d.changed} for d in deltas}


def candidate_files(folder: Path) -> dict[str, Path]:
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
        elif path.name == SIGNATURE:
            problems.append(f"{path.name}: has the name under which a version's own signature is checked out")
        else:
            files[path.name] = path
    if problems:
        raise UnsupportedModel(f"{folder}: cannot be stored. Remove:\n  " + "\n  ".join(problems))
    return files


def _candidate_digests(folder: Path, files: Mapping[str, Path]) -> tuple[dict[str, str], list[TensorDigest]]:
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
    return digests, join_tensors(folder, shards, weights.weight_map)


def table_bytes(tensors: Sequence[TensorDigest]) -> bytes:
    """The table of a version's tensors as it is kept: canonical JSON, sorted by name."""
    return canonical_json([[t.name, t.dtype, list(t.shape), t.sha256] for t in sorted(tensors)]) + b"\n"


def parse_table(data: bytes) -> list[TensorDigest]:
    """Inverse of `table_bytes`.

    Raises:
        StoreDamaged: It is not exactly what `table_bytes` gives.
    """
    try:
        tensors = [TensorDigest(n, d, tuple(s), h) for n, d, s, h in json.loads(data)]
        sound = table_bytes(tensors) == data
    except (ValueError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise StoreDamaged("A table of tensors is not in the form that is written. Restore it from a backup.")
    return tensors


class VersionStore:
    """Published versions in one folder.

    Args:
        folder: Where they lie, or will lie after the first publish.
        published: The ledger's entry for each version that it names. Manifests and signatures of these must have the
            digests that the entries give: whoever works with a version gives them, so that what is used is what was
            published. Without them a file is only checked in itself.
    """

    def __init__(self, folder: Path, published: Mapping[int, LedgerEntry] | None = None) -> None:
        self.folder = folder
        self._published = published or {}
        self.objects = ObjectStore(folder)

    def manifest_path(self, version: int) -> Path:
        """Where a version's manifest lies."""
        return self.folder / f"{version:06d}.json"

    def signature_path(self, version: int) -> Path:
        """Where the signature over a version's model folder lies."""
        return self.folder / f"{version:06d}.sig"

    # --- publish -------------------------------------------------------------------------------------------

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
        keyframe_every: int = 16,
        parent_folder: Path | None = None,
        sign: Sign | None = None,
        replace_orphan: bool = False,
        evaluated: Mapping[str, str] | None = None,
    ) -> Published:
        """Publish a candidate: contents, check, signature, manifest, in this order, each durable before the next.

        Weight files are kept as deltas against the parent's of the same name while the chain is short enough and that
        saves space. Publishing the same again changes nothing, so an interrupted publish is simply repeated.

        Args:
            candidate: Model folder; only read.
            version: Number to publish under; 0 exactly for a version without parent.
            parent: Manifest that it was made from.
            created_at: When, with zone.
            run_id: Run that made it.
            requests: Requests that this version is the first to exclude.
            settings: Resolved settings.
            report: Summary for the manifest; JSON.
            software: Versions of what computed it.
            keyframe_every: Every n-th version of a line is kept whole.
            parent_folder: The parent's model folder, where there is one: deltas are made on its weights, each tensor
                compared with the parent's table, so that the parent's chain is read once, for the check, not twice.
            sign: Makes the signature over the model folder.
            replace_orphan: A manifest of this number that the ledger does not name, of an interrupted publish, is
                replaced where it differs.
            evaluated: Digest of each file of the candidate as it was measured; nothing is stored where it differs.

        Raises:
            UnsupportedModel: The candidate is not a plain safetensors model folder.
            StoreDamaged: Something was read back differently from what was written, the parent does not hold, or the
                version made again from the store has another tensor root.
            UsageError: The version exists with other content.
            NoSpace: The disk is full or read-only.
            ValueError: Wrong call: numbers, time zone, NaN.
        """
        if (version == 0) != (parent is None) or (parent is not None and parent.version >= version):
            raise ValueError(f"v{version} cannot follow {f'v{parent.version}' if parent else 'nothing'}")
        if created_at.tzinfo is None:
            raise ValueError("created_at needs a zone")
        canonical_json([dict(settings), dict(report)])  # refuses what pydantic would write as null: NaN, infinity
        if parent is not None and (stored := self.manifest(parent.version)) != parent:
            raise StoreDamaged(f"v{parent.version}: the store has root {stored.root}, the caller {parent.root}.")
        files = candidate_files(candidate)
        digests, tensors = _candidate_digests(candidate, files)
        if evaluated is not None and digests != evaluated:
            differing = sorted({plain(name) for name, _ in digests.items() ^ evaluated.items()})
            raise StoreDamaged(
                f"{candidate}: {', '.join(differing)}: not as it was when the candidate was measured. Nothing was "
                "published. Delete the run's folder; it is computed again."
            )
        with explained_space(self.folder):
            make_folder(self.folder)
            bases = self._bases(parent, parent_folder)
            deltas = [
                self._keep(files[name], digest, tensors, bases.get(name), keyframe_every)
                for name, digest in digests.items()
            ]
            manifest = VersionManifest(
                version=version,
                root=tensor_root(tensors),
                parent=parent.version if parent else None,
                parent_root=parent.root if parent else None,
                created_at=created_at,
                run_id=run_id,
                requests=tuple(requests),
                files=tuple(_stored_file(files[name], digest) for name, digest in digests.items()),
                tensors=self.objects.put_bytes(table_bytes(tensors)),
                settings=dict(settings),
                report=dict(report),
                software=dict(software),
            )
            signature = self._commit(manifest, sign and partial(sign, digests), replace_orphan)
        return Published(self.manifest(version), tuple(d for d in deltas if d), signature)

    def _commit(
        self, manifest: VersionManifest, sign: Callable[[str], bytes] | None, replace_orphan: bool
    ) -> str | None:
        """Check a version whose contents are kept, and write its signature and manifest; returns what `Published` says.

        Args:
            manifest: What is to be written.
            sign: Name → signature over the model folder.
            replace_orphan: As for `publish`.
        """
        self.check_restores(manifest)
        there = self._is_there(manifest, replace_orphan)  # refuses before a signature is written over
        signature = self._write_signature(manifest.version, sign(f"v{manifest.version}")) if sign else None
        if not there:
            self._write_manifest(manifest)
        return signature

    def _bases(self, parent: VersionManifest | None, folder: Path | None) -> dict[str, _Base]:
        """What a candidate's files may be deltas against, by name."""
        if parent is None:
            return {}
        known = self.tensors(parent)
        return {file.path: _Base(file, known, folder and folder / file.path) for file in parent.files}

    def _keep(
        self, path: Path, digest: str, tensors: Sequence[TensorDigest], base: _Base | None, keyframe_every: int
    ) -> StoredDelta | None:
        """Keep one file of a candidate, as a delta where there is a base.

        Args:
            path: The file.
            digest: Its digest.
            tensors: The candidate's tensors, of all files.
            base: The parent's file of the same name.
            keyframe_every: Every n-th version of a line is kept whole.
        """
        objects = self.objects
        if base is not None and path.suffix == ".safetensors" and not objects.is_whole(digest):
            before = base.file.digest
            chain = objects.chain(before)
            if chain is not None and before == digest:
                return None  # unchanged, and made by deltas; `check_restores` reads it
            if (
                chain is not None
                and len(chain) < keyframe_every
                and (delta := objects.put_delta(path, digest, before, tensors, base.source()))
            ):
                self._check_base(objects.delta_path(digest, before), base.tensors)
                return delta
        objects.put(path, digest)
        return None

    def _check_base(self, delta: Path, published: Sequence[TensorDigest]) -> None:
        """A delta must be made on the tensors that were published: the base itself is not hashed while it is read."""
        known = {tensor.name: tensor.sha256 for tensor in published}
        wrong = [t.name for t in read_footer(delta).tensors if t.pre != known.get(t.name)]
        if wrong:
            self.objects.drop([delta])  # it does not belong to what a backup of the base holds
            raise StoreDamaged(
                f"{self.objects.label(delta)}: its base holds another tensor {wrong[0]!r} than was published. Restore "
                "the base from a backup; `takedown verify` lists all breaks."
            )

    def check_restores(self, manifest: VersionManifest) -> None:
        """Make a version again from the store, tensor by tensor, and compare its root with the manifest's.

        Raises:
            StoreDamaged: It cannot be made, or is another one.
        """
        files = {file.path: file for file in manifest.files}
        weights = weight_files({name: self.objects.object_path(file.digest) for name, file in files.items()})
        shards = {name: rebuild(self._source(files[name]), None) for name in weights.names}
        self._check_root(manifest, weights, shards)

    def _source(self, file: StoredFile) -> TensorSource:
        return self.objects.source_with(file.digest, file.header or "no header")

    def _write_signature(self, version: int, bundle: bytes) -> str:
        path = self.signature_path(version)
        if not path.exists() or path.read_bytes() != bundle:
            write_atomic(path, bundle, mode=0o444)  # over that of an orphan; a published one is the same bytes
        return digest_bytes(bundle)

    def _is_there(self, manifest: VersionManifest, replace_orphan: bool) -> bool:
        """Whether the manifest is on disk already; refuses where another one is that may not be replaced."""
        path = self.manifest_path(manifest.version)
        if not path.exists():
            return False
        try:
            existing = self.manifest(manifest.version).model_copy(update={"created_at": manifest.created_at})
            if manifest_bytes(existing) == manifest_bytes(manifest):
                return True
        except StoreDamaged:
            if not replace_orphan:
                raise
        # An orphan is always the newest: the next publish, under the same number, comes before any later one.
        if not replace_orphan or self.numbers()[-1] > manifest.version:
            raise UsageError(
                f"{path}: v{manifest.version} exists with other content, and a published version is never "
                "replaced. Publish under the next number."
            )
        return False

    def _write_manifest(self, manifest: VersionManifest) -> None:
        path = self.manifest_path(manifest.version)
        if path.exists():
            write_atomic(path, manifest_bytes(manifest), mode=0o444)
        else:
            write_new(path, manifest_bytes(manifest))

    # --- read ----------------------------------------------------------------------------------------------

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
            data = read_whole(path)
        except OSError as error:
            self._damaged(path, unreadable(error))
        self._as_noted(path, version, "manifest", data)
        return self.parse_manifest(version, data)

    def parse_manifest(self, version: int, data: bytes) -> VersionManifest:
        """Check the bytes of a manifest.

        Raises:
            StoreDamaged: They are not exactly what `publish` writes for this version.
        """
        path = self.manifest_path(version)
        try:
            manifest = VersionManifest.model_validate(json.loads(data))
            sound = manifest_bytes(manifest) == data
        except ValidationError as error:
            self._damaged(path, f"is not a manifest ({'.'.join(str(p) for p in error.errors()[0]['loc'])})")
        except (ValueError, RecursionError) as error:
            self._damaged(path, f"cannot be read ({error})")
        names = [file.path for file in manifest.files]
        if not sound or len(set(names)) != len(names):
            self._damaged(path, "is not in the form that is written")
        if manifest.version != version:
            self._damaged(path, f"is the manifest of v{manifest.version}")
        if bad := [name for name in names if not is_plain_name(name)]:
            self._damaged(path, f"names a file outside the model folder ({bad[0]!r})")
        digests = [*(file.digest for file in manifest.files), manifest.tensors]
        digests += [file.header or "none" for file in manifest.files if file.path.endswith(".safetensors")]
        if not ROOT.fullmatch(manifest.root) or not all(DIGEST.fullmatch(digest) for digest in digests):
            self._damaged(path, "holds something that is not a digest")
        return manifest

    def manifest_digest(self, version: int) -> str:
        """Digest of a manifest's bytes, as noted in the ledger.

        Raises:
            StoreDamaged: It is missing or cannot be read.
        """
        path = self.manifest_path(version)
        try:
            return digest_bytes(read_whole(path))
        except OSError as error:
            self._damaged(path, unreadable(error))

    def signature(self, version: int) -> bytes:
        """The signature over a version's model folder.

        Raises:
            StoreDamaged: It is missing, cannot be read, or is not the one that was published.
        """
        path = self.signature_path(version)
        try:
            data = read_whole(path)
        except OSError as error:
            self._damaged(path, unreadable(error))
        self._as_noted(path, version, "signature", data)
        return data

    def _as_noted(self, path: Path, version: int, what: str, data: bytes) -> None:
        entry = self._published.get(version)
        if entry is not None and (found := digest_bytes(data)) != entry.event.data.get(what):
            self._damaged(path, f"has {found}, ledger entry {entry.seq} published {entry.event.data.get(what)}")

    def tensors(self, manifest: VersionManifest) -> list[TensorDigest]:
        """The table of a version's tensors, checked against its root.

        Raises:
            StoreDamaged: It is missing, changed, or has another root.
        """
        tensors = parse_table(self.objects.read(manifest.tensors))
        if (found := tensor_root(tensors)) != manifest.root:
            raise StoreDamaged(
                f"v{manifest.version}: its table of tensors has root {found}, its manifest says {manifest.root}."
            )
        return tensors

    def restore(self, version: int, folder: Path, link: bool = False, sign: bool = False) -> VersionManifest:
        """Write a version's model folder, exactly the files that were published, every byte hashed on the way.

        Memory: a few blocks of 4 M entries, whatever the size of the model.

        Args:
            version: Which.
            folder: Where; must be absent or empty.
            link: Hard-link the store's own read-only files instead of copying (copies where that is impossible).
                Faster, but whoever writes into such a file in place damages the store: only for readers.
            sign: Also write the signature that was made when it was published, as ``model.sig``.

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
                self._write_files(manifest, folder, link, written)
                if sign:
                    written.append(folder / SIGNATURE)
                    write_new(folder / SIGNATURE, self.signature(version), mode=0o644)
                fsync_folder(folder)
            except BaseException:
                for path in written:
                    remove(path)
                if made:
                    with suppress(OSError):
                        folder.rmdir()
                raise
        return manifest

    def _write_files(self, manifest: VersionManifest, folder: Path, link: bool, written: list[Path]) -> None:
        """Write all files of a version, noting each before it is begun, and compare the weights with the root."""
        shards = dict[str, list[TensorDigest]]()
        for file in manifest.files:
            target = folder / file.path
            written.append(target)
            try:
                if file.path.endswith(".safetensors"):
                    header = file.header or "no header"
                    shards[file.path] = self.objects.write_weights(file.digest, header, target, link)
                else:
                    self.objects.write_out(file.digest, target, link)
            except StoreDamaged as error:
                raise StoreDamaged(f"v{manifest.version}: {file.path}: {error}") from None
        self._check_root(manifest, weight_files({f.path: folder / f.path for f in manifest.files}), shards)

    def _check_root(
        self, manifest: VersionManifest, weights: WeightFiles, shards: Mapping[str, list[TensorDigest]]
    ) -> None:
        found = tensor_root(join_tensors(f"v{manifest.version}", shards, weights.weight_map))
        if found != manifest.root:
            raise StoreDamaged(
                f"v{manifest.version}: its weights have root {found}, its manifest says {manifest.root}."
            )

    # --- what is left over ---------------------------------------------------------------------------------

    def named(self, manifests: Sequence[VersionManifest]) -> set[Path]:
        """Every object and delta that versions are read from."""
        digests = {d for m in manifests for d in (m.tensors, *(f.digest for f in m.files))}
        return {path for digest in digests for path in self.objects.paths(digest)}

    def collect(self, evidence: Sequence[str] = (), published: Collection[int] = ()) -> tuple[Path, ...]:
        """Remove temporary files, and objects of interrupted publishes; the caller holds the write lock.

        Args:
            evidence: Digests of contents that no manifest names and that are to stay.
            published: Versions that the ledger names.

        Returns:
            What was removed.

        Raises:
            StoreDamaged: A manifest is missing or cannot be read; nothing was removed.
        """
        if missing := sorted(set(published).difference(self.numbers())):
            self._damaged(self.manifest_path(missing[0]), "is missing, so nobody knows what it needs")
        named = self.named([self.manifest(number) for number in self.numbers()])
        named |= {self.objects.object_path(digest) for digest in evidence}
        stray = [path for path in self.objects.files() if path not in named]
        garbage = (*stray, *self.objects.temporary_files(), *self._stray_signatures())
        self.objects.drop(list(garbage))
        return garbage

    def _stray_signatures(self) -> list[Path]:
        return [p for p in self.folder.glob("*.sig") if not p.with_suffix(".json").exists()]

    def strangers(self) -> list[Path]:
        """Files and folders of the store that this product does not put there."""
        if not self.folder.is_dir():
            return []
        known = {self.objects.objects, self.objects.deltas}
        for number in self.numbers():
            known |= {self.manifest_path(number), self.signature_path(number)}
        return [p for p in sorted(self.folder.iterdir()) if p not in known and not p.name.startswith(TEMPORARY)]

    def _damaged(self, path: Path, found: str) -> NoReturn:
        raise StoreDamaged(f"{path}: {found}. Restore it from a backup; `takedown verify` lists all breaks.")


def _stored_file(path: Path, digest: str) -> StoredFile:
    """A candidate's file as its manifest names it."""
    header = None
    if path.suffix == ".safetensors":
        stream, size = open_regular(path)
        with stream:
            header = digest_bytes(read_header_from(path, stream, size)[1])
    return StoredFile(path=path.name, digest=digest, size=path.stat().st_size, header=header)


def manifest_bytes(manifest: VersionManifest) -> bytes:
    """A manifest as it is written."""
    return canonical_json(manifest.model_dump(mode="json")) + b"\n"
