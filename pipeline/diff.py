"""What differs between two versions: tensors, entries, norms, settings, measurements.

In: two manifests of one store, and the ledger. Out: a record. Never: torch, two models in memory (blocks of 4 M
entries instead), or a restored folder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.blocks import Entries
from pipeline.delta import TensorSource
from pipeline.progress import Counter
from pipeline.records import LedgerEntry, Record, VersionManifest
from pipeline.safefile import TensorInfo
from pipeline.states import taken_out
from pipeline.versions import VersionStore

Values = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


class TensorDiff(Record):
    """One tensor that differs.

    Attributes:
        name: Its name.
        dtype: safetensors dtype code.
        shape: Its shape.
        entries: Its entries.
        changed: Entries whose bits differ.
        norm: Euclidean norm of the difference; None where entries are not floating-point numbers.
        relative: The same over the norm of the first version's tensor.
        largest: Largest absolute difference of an entry.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    entries: int
    changed: int
    norm: float | None
    relative: float | None
    largest: float | None


class VersionDiff(Record):
    """Everything that differs between two versions.

    Attributes:
        first: Number of the first version.
        second: Number of the second.
        same_weights: Whether both have the same tensor root.
        tensors: Tensors in both whose bits differ.
        only_first: Tensors of another dtype or shape, or missing, in the second.
        only_second: The same the other way round.
        entries: Entries of all tensors of the second.
        files: Other files whose content differs or that only one has.
        settings: Settings that differ, by dotted name: both values.
        report: Measurements and counts that differ likewise.
        requests: Requests whose text is out of the second and not of the first, over all steps between them.
        back: Requests whose text is out of the first and not of the second.
    """

    first: int
    second: int
    same_weights: bool
    tensors: tuple[TensorDiff, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    entries: int
    files: tuple[str, ...]
    settings: dict[str, tuple[object, object]]
    report: dict[str, tuple[object, object]]
    requests: tuple[str, ...]
    back: tuple[str, ...]

    @property
    def changed(self) -> int:
        """Entries that differ, over all tensors."""
        return sum(tensor.changed for tensor in self.tensors)


def diff(
    store: VersionStore, first: VersionManifest, second: VersionManifest, entries: Sequence[LedgerEntry]
) -> VersionDiff:
    """Compare two versions; tensors with equal digests are not read.

    Args:
        store: Where both are kept.
        first: Manifest of the one that the other is compared with.
        second: Manifest of the other; neither need be made from the other.
        entries: The ledger, which says whose text is out of each.

    Raises:
        StoreDamaged: One of them does not hold.
    """
    tables = [{t.name: t for t in store.tensors(manifest)} for manifest in (first, second)]
    kinds = [{name: (t.dtype, t.shape) for name, t in table.items()} for table in tables]
    common = [n for n in tables[1] if n in tables[0] and kinds[0][n] == kinds[1][n]]
    changed = [n for n in common if tables[0][n] != tables[1][n]]
    places = [tensor_places(store, manifest) if changed else {} for manifest in (first, second)]
    count = Counter("diff", len(changed))
    found = []
    for name in changed:
        (source, info), (other, _) = places[0][name], places[1][name]
        found.append(compare(info, source, other))
        count.add(note=name[-40:])
    out = [taken_out(entries, manifest.version) for manifest in (first, second)]
    digests = [{f.path: f.digest for f in m.files if not f.path.endswith(".safetensors")} for m in (first, second)]
    return VersionDiff(
        first=first.version,
        second=second.version,
        same_weights=first.root == second.root,
        tensors=tuple(found),
        only_first=tuple(sorted(tables[0].keys() - set(common))),
        only_second=tuple(sorted(tables[1].keys() - set(common))),
        entries=sum(math.prod(t.shape) for t in tables[1].values()),
        files=tuple(sorted(n for n in digests[0].keys() | digests[1].keys() if digests[0].get(n) != digests[1].get(n))),
        settings=differences(first.settings, second.settings),
        report=differences(_measured(first), _measured(second)),
        requests=tuple(name for name in out[1] if name not in out[0]),
        back=tuple(name for name in out[0] if name not in out[1]),
    )


def differences(first: Mapping[str, object], second: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    """Leaves of two trees that differ, by dotted name; what one lacks is None there."""
    flat = [dict(_leaves(tree)) for tree in (first, second)]
    names = sorted(flat[0].keys() | flat[1].keys())
    return {n: (flat[0].get(n), flat[1].get(n)) for n in names if flat[0].get(n) != flat[1].get(n)}


def compare(info: TensorInfo, first: TensorSource, second: TensorSource) -> TensorDiff:
    """One tensor of two files, block by block."""
    changed, entries, squares, original, largest = 0, 0, 0.0, 0.0, 0.0
    is_float = True
    for old, new in zip(first.blocks(info.name), second.blocks(info.name), strict=True):
        entries += old.size
        changed += int(np.count_nonzero(old != new))
        before, after = numbers(old, info.dtype), numbers(new, info.dtype)
        if before is None or after is None:
            is_float = False
            continue
        step = after - before
        squares += float(np.dot(step, step))
        original += float(np.dot(before, before))
        largest = max(largest, float(np.abs(step).max(initial=0.0)))
    norm = math.sqrt(squares) if is_float and math.isfinite(squares) else None
    return TensorDiff(
        name=info.name,
        dtype=info.dtype,
        shape=info.shape,
        entries=entries,
        changed=changed,
        norm=norm,
        relative=norm / math.sqrt(original) if norm is not None and 0 < original < math.inf else None,
        largest=largest if norm is not None else None,
    )


def numbers(bits: Entries, dtype: str) -> Values | None:
    """Entries, read as unsigned integers, as the float64 numbers that they stand for; None for other dtypes."""
    match dtype:
        case "BF16":
            return (bits.astype("<u4") << 16).view("<f4").astype(np.float64)
        case "F16" | "F32" | "F64":
            return bits.view(f"<f{bits.itemsize}").astype(np.float64)
        case _:
            return None


def tensor_places(store: VersionStore, manifest: VersionManifest) -> dict[str, tuple[TensorSource, TensorInfo]]:
    """Where each tensor of a version is read from."""
    sources = [store.objects.source(f.digest) for f in manifest.files if f.path.endswith(".safetensors")]
    return {info.name: (source, info) for source in sources for info in source.tensors}


def _measured(manifest: VersionManifest) -> dict[str, object]:
    """A manifest's report without the places of passages, which nobody compares by eye."""
    return {key: value for key, value in manifest.report.items() if key != "memorised"}


def _leaves(tree: Mapping[str, object], prefix: str = "") -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for key, value in tree.items():
        found += _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return found
