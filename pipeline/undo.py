"""Leave steps out of a model: θ - Δ, entry by entry, where Δ is what those steps added to the weights.

In: versions of a store and the steps to leave out. Out: a model folder that later stages start from. Never: torch, two
models in memory (blocks of 4 M entries instead), an entry moved that no such step had moved.

A step is the version that it made. Its vector is that version minus what the step started from: its parent, or where
it left steps out itself, the parent without those. So the result is a sum of versions, each added or subtracted, of
which equal ones cancel before anything is read.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter as Multiset
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from pipeline.blocks import Entries
from pipeline.delta import TensorSource
from pipeline.diff import Values, numbers, tensor_places
from pipeline.errors import NumericalFailure, StoreDamaged
from pipeline.files import explained_space, fsync_folder
from pipeline.progress import Counter
from pipeline.records import LeftOut, VersionManifest
from pipeline.safefile import model_root, read_header
from pipeline.versions import VersionStore

Singles = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def left_out_of(manifest: VersionManifest) -> tuple[int, ...]:
    """The steps that a version left out, newest first; none but in a reinstatement."""
    listed = manifest.report.get("left_out", ())
    return tuple(v for v in listed if isinstance(v, int)) if isinstance(listed, list | tuple) else ()


def reworked_in(manifest: VersionManifest) -> tuple[str, ...]:
    """The requests whose text was out already and that a step worked on again."""
    listed = manifest.report.get("reworked", ())
    return tuple(map(str, listed)) if isinstance(listed, list | tuple) else ()


def memorised_in(manifest: VersionManifest) -> Mapping[str, Sequence[tuple[int, int, int]]]:
    """The passages that a version was made to forget, by request: (prompt start, start, end), in tokens."""
    found = manifest.report.get("memorised", {})
    if not isinstance(found, Mapping):
        raise StoreDamaged(f"v{manifest.version}: its manifest lists no passages. Run `takedown verify`.")
    return found


def recipe(manifest: Callable[[int], VersionManifest], parent: int, left_out: Sequence[int]) -> dict[int, int]:
    """How often each version is added (or subtracted, below 0) to leave steps out of a parent; the sum is 1.

    Args:
        manifest: Manifest of a version.
        parent: Version to take the steps out of.
        left_out: Steps, by the versions that they made.
    """
    terms = Multiset([parent])
    for step in left_out:
        made = manifest(step)
        if made.parent is None:
            raise StoreDamaged(f"v{step}: was made by no step, so it cannot be left out. Run `takedown verify`.")
        terms.subtract([step])
        terms.update(recipe(manifest, made.parent, left_out_of(made)))
    return {version: count for version, count in sorted(terms.items()) if count}


def combine(added: Sequence[Entries], subtracted: Sequence[Entries], dtype: str) -> tuple[Entries, Entries]:
    """Add and subtract the same block of several versions.

    Law: where all that is subtracted has the bits of something that is added, the entry gets the bits of the one that
    is left. Elsewhere the sum is taken in float64 and rounded to the dtype, once.

    Args:
        added: Blocks, each of shape (n,), as bits; one more than are subtracted.
        subtracted: Blocks likewise.
        dtype: safetensors dtype code.

    Returns:
        The bits, shape (n,); and where they are those of a version, bool of the same shape.

    Raises:
        NumericalFailure: A sum is not finite.
        StoreDamaged: Entries of a dtype that no step changes differ.
    """
    left = [np.ones(block.size, bool) for block in added]
    exact = np.ones(added[0].size, bool)
    for block in subtracted:
        waiting = np.ones(block.size, bool)
        for other, free in zip(added, left, strict=True):
            equal = waiting & free & (block == other)
            free &= ~equal
            waiting &= ~equal
        exact &= ~waiting
    bits = np.empty_like(added[0])
    for block, free in zip(added, left, strict=True):
        np.copyto(bits, block, where=free & exact)
    summed = ~exact
    if summed.any():
        total = np.zeros(int(summed.sum()))
        for sign, blocks in ((1.0, added), (-1.0, subtracted)):
            for block in blocks:
                total += sign * _numbers(block[summed], dtype)
        bits[summed] = bits_of(total, dtype)
    return bits, exact


def _numbers(bits: Entries, dtype: str) -> Values:
    found = numbers(bits, dtype)
    if found is None:
        raise StoreDamaged(f"Entries of dtype {dtype} differ between versions, which no step of this product does.")
    return found


def bits_of(values: Values, dtype: str) -> Entries:
    """Numbers as entries of a dtype, rounded once to nearest even; undoes `diff.numbers`.

    Raises:
        NumericalFailure: One is not finite in that dtype.
    """
    with np.errstate(over="ignore"):
        if dtype == "BF16":
            wide = _rounded_to_odd(values).view("<u4").astype("<u8")
            rounded = (wide + 0x7FFF + (wide >> 16 & 1)) >> 16
            finite, bits = (rounded & 0x7F80) != 0x7F80, np.asarray(rounded.astype("<u2"))
        else:
            narrow = values.astype(f"<f{int(dtype[1:]) // 8}")
            finite, bits = np.isfinite(narrow), narrow.view(f"<u{narrow.itemsize}")
    if not bool(finite.all()):
        raise NumericalFailure(f"Leaving steps out gives numbers that {dtype} cannot hold. Nothing was changed.")
    return bits


def _rounded_to_odd(values: Values) -> Singles:
    """float64 to float32 so that rounding further is as if it were done at once (Boldo & Melquiond 2008).

    What does not fit is cut towards zero, and its last bit set.
    """
    nearest = values.astype("<f4")
    cut: Singles = np.where(np.abs(nearest) > np.abs(values), np.nextafter(nearest, np.float32(0)), nearest)
    cut.view("<u4")[cut != values] |= 1
    return cut


def leave_out(store: VersionStore, parent: int, left_out: Sequence[int], source: Path, target: Path) -> LeftOut:
    """Write the parent without the vectors of some steps.

    Args:
        store: The store; its manifests are compared with the ledger where it was given one.
        parent: Version to take them out of.
        left_out: Steps, by the versions that they made, newest first.
        source: The parent as a model folder.
        target: Folder to make; what an interrupted call left there is removed first.

    Raises:
        StoreDamaged: A version does not hold, or has other tensors than the parent.
        NumericalFailure: A sum is not finite.
        NoSpace: The disk is full or read-only.
    """
    terms = recipe(store.manifest, parent, left_out)
    manifests = {version: store.manifest(version) for version in {parent, *terms}}
    tables = {version: {t.name: t for t in store.tensors(manifest)} for version, manifest in manifests.items()}
    for version, table in tables.items():
        if {t[:3] for t in table.values()} != {t[:3] for t in tables[parent].values()}:
            raise StoreDamaged(f"v{version}: has other tensors than v{parent}, so its step cannot be left out.")
    places = {version: tensor_places(store, manifest) for version, manifest in manifests.items()}

    def read(version: int, name: str) -> Iterator[Entries]:
        return _hashed(places[version][name][0], name, tables[version][name].sha256)

    moved = {name for name in tables[parent] if len({table[name].sha256 for table in tables.values()}) > 1}
    count, changed, exact = Counter("leave out", len(moved)), 0, 0
    with explained_space(target):
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for path in sorted(p for p in source.iterdir() if p.is_file()):
            copy = target / path.name
            shutil.copyfile(path, copy)  # copyfile: the parent's read-only mode is not taken over
            with copy.open("r+b") as stream:
                if path.suffix == ".safetensors":
                    header = read_header(path)
                    for info in (t for t in header.tensors if t.name in moved):
                        stream.seek(header.data_start + info.start)
                        readers = {version: read(version, info.name) for version in manifests}
                        for old, bits, same in _combined(terms, parent, readers, info.dtype):
                            differs = bits != old
                            changed += int(np.count_nonzero(differs))
                            exact += int(np.count_nonzero(differs & same))
                            stream.write(bits.tobytes())
                        count.add(note=info.name[-40:])
                    stream.flush()
                os.fsync(stream.fileno())  # of every file: the root that a resumed run compares is that of the tensors
        fsync_folder(target)
    return LeftOut(versions=tuple(left_out), root=model_root(target), changed=changed, exact=exact)


def _combined(
    terms: Mapping[int, int], parent: int, readers: Mapping[int, Iterator[Entries]], dtype: str
) -> Iterator[tuple[Entries, Entries, Entries]]:
    """The blocks of one tensor: the parent's, the combined ones, and where these are bits of a version."""
    for together in zip(*readers.values(), strict=True):
        blocks = dict(zip(readers, together, strict=True))
        added = [blocks[v] for v, times in terms.items() for _ in range(times)]
        subtracted = [blocks[v] for v, times in terms.items() for _ in range(-times)]
        yield blocks[parent], *combine(added, subtracted, dtype)


def _hashed(source: TensorSource, name: str, sha256: str) -> Iterator[Entries]:
    """The blocks of a tensor; raises after the last one where they are not those of the digest."""
    hasher = hashlib.sha256()
    for block in source.blocks(name):
        hasher.update(block.data)
        yield block
    if hasher.hexdigest() != sha256:
        raise StoreDamaged(f"{source.path}: tensor {name!r} is not the one that was published. Run `takedown verify`.")
