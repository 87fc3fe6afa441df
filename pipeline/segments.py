"""Segments: what is derived from the record of takedowns so that candidates are found fast.

In: fingerprints and signatures of works. Out: which works may share a passage with a text, for many texts at once; and
files that hold the same, memory-mapped. Never: text, a decision, a byte of a file that was not checked first.

A segment holds works in the order they were taken down: their fingerprints, and for each band of the LSH the sorted
keys of all windows with the work that each belongs to. Two windows are candidates where they have a key in common, the
law of datasketch's ``MinHashLSH``; but all windows of all texts are looked up together, and a window costs twelve bytes
per band.

A file is never edited: it is written whole under a new name, and deleted when others have taken its place. When it is
opened its header and its length are checked, which takes no longer for a large one; its SHA-256 and its structure when
it is read for the first time in a process.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError

from pipeline.errors import StoreDamaged
from pipeline.files import (
    CHUNK_BYTES,
    canonical_json,
    digest_json,
    explained_space,
    put_in_place,
    seal,
    temporary,
    unreadable,
)
from pipeline.records import Record
from pipeline.safefile import open_regular
from pipeline.shingles import DedupeParameters, Prints, ShingledText, Signatures, sign

Numbers: TypeAlias = npt.NDArray[np.int64]
Owners: TypeAlias = npt.NDArray[np.uint32]

MAGIC = b"TDSEG\x00\x00\x01"
PAGE_BYTES = 4096
"""Bytes in front of the arrays: magic, length and SHA-256 of the header, the header as JSON, zeros."""
_PREFIX = struct.Struct("<8sI32s")
PAIRS_AT_ONCE = 1 << 22
"""Pairs expanded at a time: what a key that very many windows share may cost in memory (32 MB per array)."""
_TRANSPOSED = 1024
"""Windows whose keys are turned from rows into columns at a time, inside the cache."""
_MIX = np.uint64(0x9E3779B97F4A7C15)


# --- windows and their keys -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
    """All windows of several texts, signed.

    Attributes:
        signatures: (windows, num_perm) uint32, the windows of a text one after another.
        owners: (windows,) int64, which text each belongs to; rising.
        texts: How many texts; some may have no window.
    """

    signatures: Signatures
    owners: Numbers
    texts: int

    def of(self, text: int) -> Signatures:
        """(windows, num_perm) signatures of one text; a view."""
        first, last = np.searchsorted(self.owners, (text, text + 1))
        return self.signatures[first:last]


def sign_texts(texts: Sequence[ShingledText], parameters: DedupeParameters) -> Windows:
    """Sign all windows of some texts in one call."""
    windows = [text.windows(parameters) for text in texts]
    owners = np.repeat(np.arange(len(texts), dtype=np.int64), [len(of_text) for of_text in windows])
    signatures = sign([window for of_text in windows for window in of_text], parameters)
    return Windows(signatures, owners, len(texts))


def band_keys(signatures: Signatures, parameters: DedupeParameters) -> Prints:
    """(bands, windows) keys: two windows have the same key of a band where all rows of the band are the same.

    Two rows are packed into 64 bits and never collide; more are mixed, and collide like 64 random bits.
    """
    keys = np.empty((parameters.bands, len(signatures)), dtype=np.uint64)
    for at in range(0, len(signatures), _TRANSPOSED):
        some = signatures[at : at + _TRANSPOSED, : parameters.bands * parameters.rows]
        rows = some.reshape(-1, parameters.bands, parameters.rows)
        mixed = rows[:, :, 0].astype(np.uint64)
        for number in range(1, parameters.rows):
            if number > 1:
                mixed ^= mixed >> np.uint64(31)
                mixed *= _MIX
                mixed ^= mixed >> np.uint64(29)
            mixed = (mixed << np.uint64(32)) | (mixed >> np.uint64(32))
            mixed ^= rows[:, :, number]
        keys[:, at : at + _TRANSPOSED] = mixed.T
    return keys


def _order(keys: Prints) -> Numbers:
    """Stable order of keys: radix sort by 16 bits at a time, twice as fast as NumPy's stable sort of 64 bits."""
    order = np.arange(len(keys))
    for shift in (0, 16, 32, 48):
        digits = (keys >> np.uint64(shift)).astype(np.uint16)
        order = order[np.argsort(digits[order], kind="stable")]
    return order


# --- a segment in memory ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segment:
    """Works with their fingerprints and band keys.

    Attributes:
        positions: (works,) int64, place of each work in the record; rising.
        ends: (works,) int64, where each work's fingerprints end in ``prints``.
        prints: (fingerprints,) uint64, those of each work sorted.
        keys: (bands, windows) uint64, sorted in each band.
        owners: (bands, windows) uint32, which work the window of each key belongs to.
    """

    positions: Numbers
    ends: Numbers
    prints: Prints
    keys: Prints
    owners: Owners

    @property
    def windows(self) -> int:
        """How many windows the works have."""
        return int(self.keys.shape[1])

    def prints_of(self, work: int) -> Prints:
        """Sorted fingerprints of a work; a view."""
        return self.prints[int(self.ends[work - 1]) if work else 0 : int(self.ends[work])]

    def candidates(self, windows: Windows, parameters: DedupeParameters) -> tuple[Numbers, Numbers]:
        """Works that have a band key in common with a text.

        Args:
            windows: Those of the texts.
            parameters: What the segment was made with.

        Returns:
            (pairs,) text and (pairs,) work of each pair, each pair once, by text, then by work.
        """
        works = len(self.positions)
        found = [np.empty(0, dtype=np.int64)]
        wanted = band_keys(windows.signatures, parameters)
        for table, owners, keys in zip(self.keys, self.owners, wanted, strict=True) if self.windows else ():
            order = np.argsort(keys)  # neighbours are found where the one before was: three times as fast
            found += _matches(table, owners, keys[order], windows.owners[order], works)
        pairs = np.unique(np.concatenate(found))
        return pairs // max(works, 1), pairs % max(works, 1)


def _matches(table: Prints, owners: Owners, keys: Prints, texts: Numbers, works: int) -> Iterator[Numbers]:
    """Pairs ``text * works + work`` of one band, with repetitions inside a block taken out."""
    starts = np.searchsorted(table, keys)
    equal = table[np.minimum(starts, len(table) - 1)] == keys
    if not equal.any():
        return
    starts, keys, texts = starts[equal], keys[equal], texts[equal]
    stops = np.searchsorted(table, keys, "right")
    # Windows of one text with the same key have the same works.
    once = np.unique(texts * len(table) + starts, return_index=True)[1]
    texts, starts, stops = texts[once], starts[once], stops[once]
    for block in _blocks(stops - starts, PAIRS_AT_ONCE):
        counts = stops[block] - starts[block]
        offsets = np.cumsum(counts) - counts
        at = np.arange(int(counts.sum())) + np.repeat(starts[block] - offsets, counts)
        yield np.unique(np.repeat(texts[block], counts) * works + owners[at])


def _blocks(sizes: Numbers, most: int) -> Iterator[slice]:
    """Slices of neighbours that together have at most this size, or one that is larger by itself."""
    ends, start = np.cumsum(sizes), 0
    while start < len(sizes):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + most, "right")))
        yield slice(start, stop)
        start = stop


def build(
    positions: Sequence[int], prints: Sequence[Prints], windows: Windows, parameters: DedupeParameters
) -> Segment:
    """Make a segment; the same works give the same bytes.

    Args:
        positions: Place of each work in the record, rising.
        prints: Sorted fingerprints of each work.
        windows: Those of the works, ``windows.owners`` being indices into ``positions``.
        parameters: Bands and rows.
    """
    keys = band_keys(windows.signatures, parameters)
    owners = np.empty(keys.shape, dtype=np.uint32)
    of_window = windows.owners.astype(np.uint32)
    for of_band, owners_of_band in zip(keys, owners, strict=True):
        order = _order(of_band)
        of_band[:] = of_band[order]
        owners_of_band[:] = of_window[order]
    return Segment(
        positions=np.array(positions, dtype=np.int64),
        ends=np.cumsum([len(of_work) for of_work in prints], dtype=np.int64),
        prints=np.concatenate(prints) if prints else np.empty(0, dtype=np.uint64),
        keys=keys,
        owners=owners,
    )


# --- a segment on disk ------------------------------------------------------------------------------------


class SegmentHeader(Record):
    """What a segment file says of itself.

    Attributes:
        format: Of the file.
        parameters: Digest of the parameters that it was made with.
        first: Places of the record that it stands for begin here …
        last: … and end here; some may have been removed before.
        removed: How many had.
        chain: The record's chain at ``last``: nothing up to there was another (`pipeline.index`).
        works: Works in it.
        windows: Their windows.
        prints: Their fingerprints.
        digest: SHA-256 of everything behind the header, zeros included.
    """

    format: Literal[1] = 1
    parameters: str
    first: int = Field(ge=1, lt=1 << 63)
    last: int = Field(ge=1, lt=1 << 63)
    removed: int = Field(ge=0, lt=1 << 63)
    chain: str
    works: int = Field(ge=1, lt=1 << 32)
    windows: int = Field(ge=1, lt=1 << 40)
    prints: int = Field(ge=1, lt=1 << 40)
    digest: str


def _array_bytes(header: SegmentHeader, bands: int) -> int:
    return 16 * header.works + 8 * header.prints + 12 * bands * header.windows


def parameters_digest(parameters: DedupeParameters) -> str:
    """Stands for the parameters in a header."""
    return digest_json(parameters.model_dump())


def _arrays(segment: Segment) -> Iterator[memoryview]:
    """The arrays in the order of the file, little-endian, in pieces."""
    for array, kind in (
        (segment.positions, "<i8"), (segment.ends, "<i8"), (segment.prints, "<u8"), (segment.keys, "<u8"),
        (segment.owners, "<u4"),
    ):  # fmt: skip
        data = np.ascontiguousarray(array, dtype=kind).reshape(-1).view(np.uint8).data
        for at in range(0, len(data), CHUNK_BYTES):
            yield data[at : at + CHUNK_BYTES]


def describe(segment: Segment, parameters: DedupeParameters, first: int, removed: int, chain: str) -> SegmentHeader:
    """The header of a segment; the same works give the same one.

    Args:
        segment: What it describes.
        parameters: What the segment was made with.
        first: Places of the record that it stands for begin here, and end with its last work.
        removed: How many takedowns were removed from there.
        chain: The record's chain at its last work.
    """
    blank = SegmentHeader(
        parameters=parameters_digest(parameters), first=first, last=int(segment.positions[-1]), removed=removed,
        chain=chain, works=len(segment.positions), windows=segment.windows, prints=len(segment.prints),
        digest="0" * 64,
    )  # fmt: skip
    hasher = hashlib.sha256(bytes(_padding(blank)))  # as many zeros whatever the digest is
    for piece in _arrays(segment):
        hasher.update(piece)
    return blank.model_copy(update={"digest": hasher.hexdigest()})


def _padding(header: SegmentHeader) -> int:
    return PAGE_BYTES - _PREFIX.size - len(canonical_json(header.model_dump()))


def write_segment(folder: Path, segment: Segment, header: SegmentHeader) -> Path:
    """Write a segment, whole or not at all.

    Args:
        folder: Where; exists.
        segment: What.
        header: Its description.

    Returns:
        Its path, whose name says which places it stands for.

    Raises:
        NoSpace: The disk is full or read-only.
    """
    data = canonical_json(header.model_dump())
    path = folder / f"{header.first:012d}-{header.last:012d}-{header.digest[:12]}.seg"
    with explained_space(path), temporary(folder) as (written, stream):
        stream.write(_PREFIX.pack(MAGIC, len(data), hashlib.sha256(data).digest()) + data + bytes(_padding(header)))
        for piece in _arrays(segment):
            stream.write(piece)
        seal(stream, 0o600)
        put_in_place(written, path)
    return path


class SegmentFile:
    """A segment on disk, opened: its header and its length are right; what it holds is checked by `read`.

    Raises:
        StoreDamaged: It is missing, no segment, of another length than its header says, or made with other parameters.
    """

    def __init__(self, path: Path, parameters: DedupeParameters) -> None:
        self.path = path
        self._parameters = parameters
        self._segment: Segment | None = None
        stream, size = open_regular(path)
        with stream:
            try:
                head = stream.read(PAGE_BYTES)
            except OSError as error:
                raise _damaged(path, unreadable(error)) from error
        self.header = _parse(path, head)
        if self.header.parameters != parameters_digest(parameters):
            raise _damaged(path, "was made with other parameters")
        if size != PAGE_BYTES + _array_bytes(self.header, parameters.bands):
            raise _damaged(path, f"has {size} bytes, another number than its header says")

    def read(self) -> Segment:
        """The arrays, mapped; the first call reads and checks every byte.

        Raises:
            StoreDamaged: A byte was changed, or the arrays contradict each other.
        """
        if self._segment is None:
            try:
                self._segment = self._mapped()
            except (OSError, ValueError) as error:
                raise _damaged(self.path, f"cannot be mapped ({error})") from error
        return self._segment

    def _mapped(self) -> Segment:
        header, bands = self.header, self._parameters.bands
        with open_regular(self.path)[0] as stream:
            # Through read, not through the map: checked pages need not stay in this process's memory.
            stream.seek(_PREFIX.size + len(canonical_json(header.model_dump())))
            hasher = hashlib.sha256()
            while piece := stream.read(CHUNK_BYTES):
                hasher.update(piece)
            if hasher.hexdigest() != header.digest:
                raise _damaged(self.path, "does not match its digest")
            view = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        if len(view) != PAGE_BYTES + _array_bytes(header, bands):
            raise _damaged(self.path, "changed its length while it was read")
        at, arrays = PAGE_BYTES, []
        for count, kind in (
            (header.works, "<i8"), (header.works, "<i8"), (header.prints, "<u8"), (bands * header.windows, "<u8"),
            (bands * header.windows, "<u4"),
        ):  # fmt: skip
            arrays.append(np.frombuffer(view, kind, count, at))
            at += arrays[-1].nbytes
        positions, ends, prints, keys, owners = arrays
        shape = (bands, header.windows)
        segment = Segment(positions, ends, prints, keys.reshape(shape), owners.reshape(shape))
        if not _is_sound(segment, header):
            raise _damaged(self.path, "holds what this product does not write")
        view.madvise(mmap.MADV_DONTNEED)  # what was only checked need not stay in memory
        return segment


def _parse(path: Path, head: bytes) -> SegmentHeader:
    if len(head) < PAGE_BYTES:
        raise _damaged(path, "is shorter than its header")
    magic, length, digest = _PREFIX.unpack_from(head)
    if magic != MAGIC:
        raise _damaged(path, "is not a segment of this format")
    data = head[_PREFIX.size : _PREFIX.size + length]
    if length > PAGE_BYTES - _PREFIX.size or hashlib.sha256(data).digest() != digest:
        raise _damaged(path, "has a header that does not match its digest")
    try:
        header = SegmentHeader.model_validate_json(data, strict=True)
    except ValidationError as error:
        raise _damaged(path, f"has no header of this product ({error.error_count()} faults)") from error
    if canonical_json(header.model_dump()) != data:
        raise _damaged(path, "has a header that this product does not write")
    return header


def _is_sound(segment: Segment, header: SegmentHeader) -> bool:
    """Whether the arrays keep the laws that the search relies on; a digest alone can be made by anybody."""
    positions, ends = segment.positions, segment.ends
    rising = np.ones(len(segment.prints), dtype=np.bool_)
    rising[1:] = segment.prints[1:] > segment.prints[:-1]
    sizes = np.diff(ends, prepend=0)
    if not (sizes > 0).all() or ends[-1] != header.prints:
        return False
    rising[ends[:-1]] = True  # where the next work begins
    return bool(
        rising.all()
        and (np.diff(positions) > 0).all()
        and header.first <= positions[0]
        and positions[-1] == header.last
        and all((keys[1:] >= keys[:-1]).all() for keys in segment.keys)
        and all(owners.max() < header.works for owners in segment.owners)
    )


def _damaged(path: Path, found: str) -> StoreDamaged:
    return StoreDamaged(f"{path}: {found}. Nothing is lost: delete it; the next search makes it again from index.db.")
