"""The change of one block of weights, as few bytes, bit for bit.

In: the old and the new entries of one block, as unsigned integers of the dtype's width. Out: a payload that turns the
old entries into the new ones; applied to anything else it is meaningless. Never: a file, a float comparison (NaN and
-0.0 are bit patterns like others), an old value in a payload, a size taken on trust.

A payload, little-endian::

    codec u8 | k u8 | changed u32 | body

    0 REFERENCE  nothing changed    empty
    1 SPARSE     coordinates        section "high", k bit planes "low", values of the changed entries
    2 BITMAP     a bit per entry    section of packed bits (first entry = highest bit), values of the changed entries
    3 WHOLE      everything         values of all entries

A section is ``form u8 | length u32 | bytes``; form 0 is raw, form 1 one zstd frame that states its size and is smaller
than the raw bytes. Values are one section per byte of the width, lowest byte first: sign and exponent compress well
when they stand together, mantissas never do.

Coordinates are Golomb-Rice-like: from one changed entry to the next (the first counts from -1) lie g unchanged ones.
The k low bits of every g are noise and stay raw, one plane of ⌈changed / 8⌉ bytes per bit, lowest first; the rest,
g >> k, is a byte, where 255 means "add 255 and go on". zstd's Huffman stage then comes within 3 % of the entropy of
random positions (and further below it where changes cluster).
"""

from __future__ import annotations

import struct
import threading
from enum import IntEnum
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import zstandard

from pipeline.errors import StoreDamaged

Entries = npt.NDArray[np.unsignedinteger[Any]]
"""Shape (n,), little-endian unsigned integers of 1, 2, 4 or 8 bytes: the bits of n entries of a tensor."""

BLOCK_ENTRIES = 1 << 22
"""Entries per block, the last one of a tensor excepted: what bounds memory, and part of the format."""

ZSTD_LEVEL = 1
"""Measured on normal weights: level 3 finds short matches by chance in what is noise, which makes the top byte of
bf16 15 % larger than level 1 does (0.424 against 0.369 of its size), and takes 1.6 times as long."""

DENSE = 0.15
"""Share of changed entries from which a bit per entry is used: there it is 1 % larger than coordinates (2.4 % against
1.1 % above the entropy), from 0.2 on smaller, and several times faster throughout."""

HIGH_BITS = 6
"""The high part of an average distance has at most this many bits, so that escapes are rare; 4 to 7 differ little."""

MAX_LOW_BITS = 31
"""More would let the sums of hostile coordinates overflow 64 bits."""

_HEAD = struct.Struct("<BBI")
HEAD_BYTES = _HEAD.size
"""What `changed_entries` and `block_codec` look at."""
_SECTION = struct.Struct("<BI")
_RAW, _ZSTD = 0, 1
_ESCAPE = 255


class _Own(threading.local):
    """Each thread's own decompressor: to make one takes as long as to decompress a small section."""

    def __init__(self) -> None:
        self.decompressor = zstandard.ZstdDecompressor()


_own = _Own()


class Codec(IntEnum):
    """How a payload says what changed."""

    REFERENCE = 0
    SPARSE = 1
    BITMAP = 2
    WHOLE = 3


def _refuse(found: str) -> NoReturn:
    raise StoreDamaged(f"payload {found}. Restore the delta from a backup.")


def max_payload_bytes(entries: int, width: int) -> int:
    """An upper bound for what `encode_block` writes for so many entries of ``width`` bytes."""
    return entries * width + entries // 8 + 128


def entries_dtype(width: int) -> np.dtype[Any]:
    """The unsigned little-endian dtype of 1, 2, 4 or 8 bytes."""
    return np.dtype(f"<u{width}")


def compress(data: bytes | memoryview) -> bytes:
    """One zstd frame that states its size; no checksum, for digests stand above it."""
    return zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(data)


def decompress(frame: bytes | memoryview, at_least: int, at_most: int) -> bytes:
    """Undo `compress`, allocating nothing before the frame's stated size has been checked.

    Args:
        frame: Exactly one frame; nothing may follow it.
        at_least: The fewest bytes that it may hold.
        at_most: The most.

    Raises:
        StoreDamaged: It is anything else than what `compress` writes for so many bytes.
    """
    try:
        stated = zstandard.get_frame_parameters(frame)
        if not at_least <= stated.content_size <= at_most or stated.dict_id or stated.has_checksum:
            _refuse(f"has a zstd frame of {stated.content_size} bytes, expected {at_least} to {at_most}, plain")
        data = _own.decompressor.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        _refuse(f"has a damaged zstd frame ({error})")
    if len(data) != stated.content_size:  # a skippable frame states a size and holds nothing
        _refuse(f"has a zstd frame of {len(data)} bytes that states {stated.content_size}")
    return data


# --- writing ----------------------------------------------------------------------------------------------


def _section(data: Entries) -> bytes:
    """The smaller of raw and zstd, with its form and length."""
    frame = compress(data.data)
    form, body = (_ZSTD, frame) if len(frame) < data.nbytes else (_RAW, data.tobytes())
    return _SECTION.pack(form, len(body)) + body


def _values(values: Entries) -> list[bytes]:
    width = values.dtype.itemsize
    planes = values.view(np.uint8).reshape(-1, width)
    return [_section(np.ascontiguousarray(planes[:, byte])) for byte in range(width)]


def _coordinates(where: npt.NDArray[np.int64], entries: int) -> tuple[int, list[bytes]]:
    """Code ascending indices, shape (changed,), below ``entries``; returns k and the pieces of the body."""
    distances = np.diff(where, prepend=-1) - 1
    k = max(0, (entries // where.size).bit_length() - HIGH_BITS)
    high = distances >> k
    escapes = high // _ESCAPE
    coded = np.full(where.size + int(escapes.sum()), _ESCAPE, np.uint8)
    coded[np.cumsum(escapes + 1) - 1] = high - _ESCAPE * escapes
    low = [np.packbits((distances >> bit & 1).astype(np.uint8)).tobytes() for bit in range(k)]
    return k, [_section(coded), *low]


def encode_block(old: Entries, new: Entries) -> bytes:
    """Say how to turn the old entries of a block into the new ones.

    Law: ``change_block(encode_block(a, b), a)`` makes of a what b is, in every bit.

    Args:
        old: Shape (n,), n < 2^32; the bits before.
        new: Same shape and dtype; the bits after.

    Returns:
        The payload; equal inputs give equal payloads (with one version of zstd).
    """
    mask = old != new
    changed = int(np.count_nonzero(mask))
    k, body = 0, list[bytes]()
    if not changed:
        codec = Codec.REFERENCE
    elif (old.size - changed) * 8 * old.itemsize < old.size:  # the mask would cost more than the values it saves
        codec, body = Codec.WHOLE, _values(new)
    else:
        where = np.flatnonzero(mask)
        values = _values(new[where])
        if changed < DENSE * old.size:
            codec = Codec.SPARSE
            k, body = _coordinates(where, old.size)
        else:
            codec, body = Codec.BITMAP, [_section(np.packbits(mask))]
        body += values
    return b"".join([_HEAD.pack(codec, k, changed), *body])


# --- reading ----------------------------------------------------------------------------------------------


class _Reader:
    """Takes a payload apart from front to back; every length is checked against the bytes that are there."""

    def __init__(self, body: memoryview) -> None:
        self._rest = body

    def take(self, length: int) -> memoryview:
        if length > len(self._rest):
            _refuse(f"ends early: {length} bytes expected, {len(self._rest)} left")
        taken, self._rest = self._rest[:length], self._rest[length:]
        return taken

    def section(self, at_least: int, at_most: int) -> Entries:
        """The bytes of a section that must hold a number of bytes in this range; shape (bytes,), uint8."""
        form, length = _SECTION.unpack(self.take(_SECTION.size))
        stored = self.take(length)
        data: bytes | memoryview = stored
        if form == _ZSTD:
            data = decompress(stored, at_least, at_most)
            if length >= len(data):
                _refuse(f"has {len(data)} bytes compressed to {length}")
        elif form != _RAW or not at_least <= length <= at_most:
            _refuse(f"has a section of form {form} with {length} bytes, expected {at_least} to {at_most}")
        return np.frombuffer(data, np.uint8)

    def values(self, count: int, width: int) -> Entries:
        """Undo `_values`: shape (count,), of the width. Shifted together: a third of the time of strided copies."""
        dtype = entries_dtype(width)
        values = self.section(count, count).astype(dtype)
        for byte in range(1, width):
            plane = self.section(count, count).astype(dtype)
            plane <<= dtype.type(8 * byte)
            values |= plane
        return values

    def bits(self, packed: Entries, count: int) -> Entries:
        """The first ``count`` of packed bits, shape (count,), uint8; those after them must be 0."""
        if packed.size and int(packed[-1]) & ((1 << (-count % 8)) - 1):
            _refuse("has bits set past its last entry")
        return np.unpackbits(packed, count=count)

    def coordinates(self, k: int, count: int, entries: int) -> npt.NDArray[np.int64]:
        """Undo `_coordinates`: ascending indices below ``entries``, shape (count,)."""
        if k > MAX_LOW_BITS:
            _refuse(f"splits distances at {k} bits, the limit is {MAX_LOW_BITS}")
        coded = self.section(count, count + (entries >> k) // _ESCAPE)
        escapes = np.flatnonzero(coded == _ESCAPE)
        if coded[-1] == _ESCAPE or coded.size - escapes.size != count:
            _refuse(f"does not hold {count} distances")
        # All sums fit 64 bits: the bytes of a block, which has at most 2^22 entries, add up to less than 2^31, and are
        # shifted by 31 at most.
        gaps = coded[coded != _ESCAPE].astype(np.int64)
        np.add.at(gaps, escapes - np.arange(escapes.size), _ESCAPE)  # few: onto the distance that each belongs to
        gaps <<= k
        for bit in range(k):
            plane = np.frombuffer(self.take((count + 7) // 8), np.uint8)
            low = self.bits(plane, count)
            gaps += low if bit == 0 else low.astype(np.int64) << bit
        gaps[1:] += 1  # the entry itself; the first counts from -1
        where: npt.NDArray[np.int64] = np.cumsum(gaps, out=gaps)
        if where[-1] >= entries:
            _refuse(f"changes entry {where[-1]} of {entries}")
        return where

    def end(self) -> None:
        if len(self._rest):
            _refuse(f"has {len(self._rest)} bytes too many")


def _head(payload: bytes) -> tuple[Codec, int, int]:
    if len(payload) < _HEAD.size:
        _refuse(f"has {len(payload)} bytes, fewer than its head")
    code, k, changed = _HEAD.unpack_from(payload)
    if code > max(Codec):
        _refuse(f"has the unknown codec {code}")
    codec = Codec(code)
    if (changed == 0) != (codec is Codec.REFERENCE) or (k and codec is not Codec.SPARSE):
        _refuse(f"has a head that does not fit its codec: {codec.name}, k = {k}, {changed} changed")
    return codec, k, changed


def changed_entries(payload: bytes) -> int:
    """How many entries a payload says it changes; `change_block` checks that it does.

    Raises:
        StoreDamaged: The head is malformed.
    """
    return _head(payload)[2]


def block_codec(payload: bytes) -> Codec:
    """The codec of a payload.

    Raises:
        StoreDamaged: The head is malformed.
    """
    return _head(payload)[0]


def change_block(payload: bytes, entries: Entries) -> None:
    """Turn old entries into new ones, in their own array.

    Args:
        payload: What `encode_block` wrote, or anything else.
        entries: Shape (n,); the entries that the payload was made on. Overwritten, also when this raises.

    Raises:
        StoreDamaged: `encode_block` cannot have written this payload for these entries. Memory stays bounded by
            a small multiple of the block, whatever the payload says.
    """
    codec, k, changed = _head(payload)
    if changed > entries.size:
        _refuse(f"changes {changed} of {entries.size} entries")
    reader = _Reader(memoryview(payload)[_HEAD.size :])
    if codec is Codec.REFERENCE:
        reader.end()
        return
    if codec is Codec.WHOLE:
        new = reader.values(entries.size, entries.itemsize)
        reader.end()
        if (found := int(np.count_nonzero(new != entries))) != changed:
            _refuse(f"changes {found} entries, its head says {changed}")
        entries[:] = new
        return
    if codec is Codec.SPARSE:
        where = reader.coordinates(k, changed, entries.size)
    else:
        size = (entries.size + 7) // 8
        mask = reader.bits(reader.section(size, size), entries.size)
        where = np.flatnonzero(mask.view(np.bool_))  # as bytes it would take six times as long
        if where.size != changed:
            _refuse(f"marks {where.size} entries, its head says {changed}")
    values = reader.values(changed, entries.itemsize)
    reader.end()
    if np.any(values == entries.take(where, mode="clip")):  # all are inside; not to check it again is faster
        _refuse("lists an entry that it does not change")
    entries[where] = values
