"""A version stored as what changed: forward deltas between safetensors files, chained, rebuilt bit for bit.

In: a base (a whole file, or a delta over another base) and a target with the same tensors; or a stored delta.
Out: a delta file; or the target's header and tensors, every tensor digested. Never: a tensor in memory (a few blocks
are), an old value in a delta (with the new model it must not lead back), a size taken on trust, a durable write: the
caller opens, syncs and renames.

The file's layout is in `pipeline.footer`.

What is digested when. The digest in the target ("post") of every tensor is checked each time a file is rebuilt: nothing
leaves here unproven. The digest in the base ("pre") is taken from the bytes when a delta is written, and compared with
the base's own post when a delta is opened on a delta; on a rebuild it is taken from the bytes only when something is
wrong, to name the file at fault. A wrong byte of the base that leaves the result right is for a check of the base to
find.
"""

from __future__ import annotations

import hashlib
import io
import math
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipeline.blocks import (
    BLOCK_ENTRIES,
    Codec,
    Entries,
    block_codec,
    change_block,
    changed_entries,
    compress,
    decompress,
    encode_block,
    entries_dtype,
    max_payload_bytes,
)
from pipeline.digests import TensorDigest
from pipeline.errors import StoreDamaged, UnsupportedModel
from pipeline.footer import (
    MAGIC,
    Footer,
    TensorDelta,
    damaged,
    entry_bytes,
    footer_bytes,
    read_delta,
    read_exactly,
)
from pipeline.lanes import Lane
from pipeline.safefile import DTYPE_BITS, TensorInfo, open_regular, read_header_from

_IN_FLIGHT = 2
"""Blocks of one source in memory at once: one being read, one hashed and written, or hashed and encoded. More of them
make nothing faster on two cores."""
# --- where tensors come from ------------------------------------------------------------------------------

Room = Callable[[int, np.dtype[Any]], Entries]
"""Gives an array of so many entries of this dtype, to be filled; ``np.empty`` is one."""


class TensorSource(ABC):
    """One safetensors file, wherever its bytes come from.

    Attributes:
        path: The file that messages name.
        digest: ``sha256:<hex>`` of the whole safetensors file, as the caller knows it.
        header: The first bytes of the safetensors file, verbatim: length and JSON.
        tensors: All tensors in the order of their bytes.
        promised: Hex SHA-256 that each tensor must have, by name; empty where only the whole file has a digest.
    """

    path: Path
    digest: str
    header: bytes
    tensors: tuple[TensorInfo, ...]
    promised: Mapping[str, str]

    @abstractmethod
    def read(self, names: Sequence[str], room: Room) -> Iterator[Entries]:
        """The blocks of these tensors, one tensor after the other, `block_sizes` of each; every file is opened once.

        Args:
            names: The tensors.
            room: Gives the arrays that are filled, one per block.

        Raises:
            StoreDamaged: Something cannot be read or is not what is ever written; before the last block of its tensor.
        """

    def blocks(self, name: str) -> Iterator[Entries]:
        """One tensor's entries, `BLOCK_ENTRIES` at a time, each time in an array that the caller may write to."""
        return self.read([name], np.empty)


def _described(tensors: Iterable[TensorInfo | TensorDelta]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}


def _dtype(tensor: TensorInfo | TensorDelta) -> np.dtype[Any]:
    """The dtype that a tensor's entries are read as."""
    return entries_dtype(entry_bytes(tensor.dtype))


def block_sizes(tensor: TensorInfo | TensorDelta) -> list[int]:
    """How many entries each block of a tensor has; none where it is empty."""
    entries = math.prod(tensor.shape) * DTYPE_BITS[tensor.dtype] // 8 // entry_bytes(tensor.dtype)
    return [min(BLOCK_ENTRIES, entries - start) for start in range(0, entries, BLOCK_ENTRIES)]


class WholeFile(TensorSource):
    """A safetensors file on disk as a `TensorSource`.

    Args:
        path: The file.
        digest: ``sha256:<hex>`` that the caller knows it by; it is not checked here.
        known: The digests of its tensors, where the caller has taken them already.

    Raises:
        StoreDamaged: The file is missing or its header breaks a rule (`pipeline.safefile.read_header`).
    """

    def __init__(self, path: Path, digest: str, known: Iterable[TensorDigest] = ()) -> None:
        stream, size = open_regular(path)
        with stream:
            header, self.header = read_header_from(path, stream, size)
        self.path, self.digest = path, digest
        self.tensors = header.tensors
        self.promised: Mapping[str, str] = {tensor.name: tensor.sha256 for tensor in known}
        self._by_name = {tensor.name: tensor for tensor in header.tensors}

    def read(self, names: Sequence[str], room: Room) -> Iterator[Entries]:
        with open_regular(self.path)[0] as stream:
            for name in names:
                tensor = self._by_name[name]
                stream.seek(len(self.header) + tensor.start)
                for size in block_sizes(tensor):
                    block = room(size, _dtype(tensor))
                    try:
                        count = stream.readinto(block)  # type: ignore[attr-defined]  # every buffered file has it
                    except OSError as error:
                        damaged(self.path, f"cannot be read ({error.strerror})")
                    if count < block.nbytes:
                        damaged(f"{self.path}: tensor {name!r}", "became shorter while it was read")
                    yield block


# --- a delta as a source ----------------------------------------------------------------------------------


class DeltaFile(TensorSource):
    """A delta over its base as a `TensorSource`; the base may be a delta again.

    Args:
        path: The delta file.
        digest: ``sha256:<hex>`` of the safetensors file that it must lead to.
        base: What it was made on.
        content: What `read_delta` gives of the file, where the caller has read it already.

    Raises:
        StoreDamaged: The file does not match its own digest or breaks a rule, leads to another file, or was made on
            another base; says which.
    """

    def __init__(
        self, path: Path, digest: str, base: TensorSource, content: tuple[Footer, bytes] | None = None
    ) -> None:
        self.path, self.digest, self.base = path, digest, base
        self.footer, frame = content or read_delta(path)
        if self.footer.target != digest:
            damaged(path, f"leads to {self.footer.target}, expected {digest}")
        if self.footer.base != base.digest:
            damaged(path, f"was made on {self.footer.base}, but {base.path} is {base.digest}")
        self.header = self._unpack_header(frame)  # first: a damaged header of the base would make its tensors others
        if _described(self.footer.tensors) != _described(base.tensors):
            damaged(path, f"has other tensors than {base.path}")
        self._by_name = {tensor.name: tensor for tensor in self.footer.tensors}
        self.promised: Mapping[str, str] = {tensor.name: tensor.post for tensor in self.footer.tensors}
        for tensor in self.footer.tensors:
            if base.promised.get(tensor.name, tensor.pre) != tensor.pre:
                damaged(path, f"was made on another tensor {tensor.name!r} than {base.path} leads to")
        data_bytes = sum(tensor.nbytes for tensor in self.footer.tensors)
        self.tensors = read_header_from(path, io.BytesIO(self.header), len(self.header) + data_bytes)[0].tensors
        if [tensor.name for tensor in self.tensors] != list(self._by_name) or (
            _described(self.tensors) != _described(self.footer.tensors)
        ):
            damaged(path, "has a header that describes other tensors than its footer")

    def _unpack_header(self, frame: bytes) -> bytes:
        size = self.footer.header_size
        try:
            header = decompress(frame, size, size) if frame else self.base.header
        except StoreDamaged as error:
            raise StoreDamaged(f"{self.path}: header: {error}") from None
        if len(header) != size or hashlib.sha256(header).hexdigest() != self.footer.header_digest:
            damaged(self.path if frame else self.base.path, "does not hold the header that the delta was made with")
        return header

    def pre(self, name: str) -> str:
        """Hex SHA-256 of a tensor in the base that the delta was made on."""
        return self._by_name[name].pre

    def read(self, names: Sequence[str], room: Room) -> Iterator[Entries]:
        blocks = self.base.read(names, room)
        with open_regular(self.path)[0] as stream:
            for name in names:
                tensor = self._by_name[name]
                of_tensor = islice(blocks, len(block_sizes(tensor)))
                yield from self._changed(tensor, of_tensor, stream) if tensor.length else of_tensor

    def _changed(self, tensor: TensorDelta, blocks: Iterable[Entries], stream: BinaryIO) -> Iterator[Entries]:
        """Change a tensor's blocks, in their own arrays, by the payloads in the open delta file."""
        where = f"{self.path}: tensor {tensor.name!r}"
        stream.seek(tensor.offset)
        to_come, left, changed = len(block_sizes(tensor)), tensor.length, 0
        for block in blocks:
            length = int.from_bytes(read_exactly(where, stream, min(4, left)), "little")
            left = max(left - 4, 0)
            if length > min(left, max_payload_bytes(block.size, block.itemsize)):
                damaged(where, f"has a block of {length} bytes for {block.size} entries, {left} bytes are left")
            payload = read_exactly(where, stream, length)
            left -= length
            try:
                change_block(payload, block)
            except StoreDamaged as error:
                raise StoreDamaged(f"{where}: {error}") from None
            changed += changed_entries(payload)
            to_come -= 1
            if not to_come and (left or changed != tensor.changed):
                damaged(where, f"changes {changed} entries and leaves {left} bytes, expected {tensor.changed} and 0")
            yield block


def _digest(source: TensorSource, name: str) -> str:
    sha = hashlib.sha256()
    for block in source.blocks(name):
        sha.update(block.data)
    return sha.hexdigest()


def _fault(source: TensorSource, name: str) -> StoreDamaged:
    """Find the file that makes a tensor wrong: from the whole file upwards, the first that breaks its promise."""
    links = [(source, source.promised[name])]
    while isinstance(link := links[-1][0], DeltaFile):
        links.append((link.base, link.pre(name)))  # a delta's pre is its base's post
    for link, expected in reversed(links):
        try:
            found = _digest(link, name)
        except StoreDamaged as error:
            return error
        if found != expected:
            return StoreDamaged(
                f"{link.path}: tensor {name!r} has SHA-256 {found}, expected {expected}. "
                "Restore this file from a backup; those it builds on are sound."
            )
    return StoreDamaged(
        f"{source.path}: tensor {name!r} was wrong when it was read, and right when it was read again. "
        "Check the memory and the disk of this machine."
    )


class _Ring:
    """Arrays for blocks, each used again once what was done with it is done: what bounds memory.

    Fresh memory for every block would take as long as reading it.

    Args:
        tensors: What is going to be read.
    """

    def __init__(self, tensors: Iterable[TensorInfo]) -> None:
        most = max((size * _dtype(tensor).itemsize for tensor in tensors for size in block_sizes(tensor)), default=0)
        self._memory = [np.empty(most, np.uint8) for _ in range(_IN_FLIGHT)]
        self._busy = deque[tuple[Future[Any], ...]]()
        self._taken = 0

    def room(self, size: int, dtype: np.dtype[Any]) -> Entries:
        """An array for the next block; waits for what is done with the block that had it."""
        if self._taken >= _IN_FLIGHT:
            for job in self._busy.popleft():
                job.result()
        memory = self._memory[self._taken % _IN_FLIGHT]
        self._taken += 1
        return memory[: size * dtype.itemsize].view(dtype)

    def busy_until(self, *jobs: Future[Any]) -> None:
        """What is done with the oldest block that this was not said of yet."""
        self._busy.append(jobs)


def _each(
    source: TensorSource, tensors: Sequence[TensorInfo], room: Room
) -> Iterator[tuple[TensorInfo, Iterator[Entries]]]:
    """Each tensor with its blocks, to be taken before the next; where reading fails, the error names the file at fault.

    Args:
        source: What is read.
        tensors: Its tensors, in the order that they are wanted in.
        room: Gives the arrays for the blocks.
    """
    blocks = source.read([tensor.name for tensor in tensors], room)

    def of(tensor: TensorInfo) -> Iterator[Entries]:
        try:
            yield from islice(blocks, len(block_sizes(tensor)))
        except StoreDamaged as error:
            # A wrong base can look like a wrong delta.
            raise (_fault(source, tensor.name) if source.promised else error) from None

    return ((tensor, of(tensor)) for tensor in tensors)


def _write_all(stream: BinaryIO, piece: memoryview) -> None:
    left = piece.cast("B")
    while len(left):  # an unbuffered file may take only a part
        left = left[stream.write(left) :]


def rebuild(source: TensorSource, stream: BinaryIO | None) -> list[TensorDigest]:
    """Write the safetensors file that a source leads to, and digest its tensors on the way.

    Every tensor is compared with what the source promises. What has been written when an error comes is not to be used.

    Args:
        source: A whole file or a chain of deltas.
        stream: Where header and tensors go; None only checks.

    Returns:
        The digest of every tensor, in the order of the bytes: with the header, this is the whole file.

    Raises:
        StoreDamaged: A tensor is not what it must be; names it, and the file at fault.
        OSError: The stream cannot be written.
    """
    digests: list[TensorDigest] = []

    def close(tensor: TensorInfo, sha: hashlib._Hash) -> None:
        found = sha.hexdigest()
        if source.promised.get(tensor.name, found) != found:
            raise _fault(source, tensor.name)
        digests.append(TensorDigest(tensor.name, tensor.dtype, tensor.shape, found))

    ring = _Ring(source.tensors)
    with Lane() as hashing, Lane() as writing:
        if stream is not None:
            _write_all(stream, memoryview(source.header))
        for tensor, blocks in _each(source, source.tensors, ring.room):
            sha = hashlib.sha256()
            for block in blocks:
                jobs = [hashing.do(sha.update, block.data)]
                if stream is not None:
                    jobs.append(writing.do(_write_all, stream, block.data))
                ring.busy_until(*jobs)
            hashing.do(close, tensor, sha)  # not waited for: the next tensor is read meanwhile
        hashing.finish()
        writing.finish()
    return digests


# --- writing a delta --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DeltaStats:
    """What a written delta holds.

    Attributes:
        digest: ``sha256:<hex>`` of the delta file.
        nbytes: Its size.
        changed: Entries that differ between base and target.
        entries: All entries.
        blocks: How many blocks took each codec.
        tensors: The digests of the target's tensors, in the order of its bytes.
    """

    digest: str
    nbytes: int
    changed: int
    entries: int
    blocks: Mapping[Codec, int]
    tensors: tuple[TensorDigest, ...]


def can_delta(base: TensorSource, target: TensorSource) -> bool:
    """Whether both have the same tensors by name, dtype and shape; order and header may differ."""
    return _described(base.tensors) == _described(target.tensors)


class _Out:
    """The delta being written: knows its position and its digest."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.sha = hashlib.sha256()
        self.position = 0

    def write(self, data: bytes) -> None:
        _write_all(self._stream, memoryview(data))
        self.sha.update(data)
        self.position += len(data)


def _write_blocks(out: _Out, payloads: Iterable[bytes], codecs: Counter[Codec]) -> int:
    """Write one tensor's blocks, nothing if none changes anything; returns how many entries they change."""
    changed, held = 0, list[bytes]()  # held: until it is known whether any changes anything
    for payload in payloads:
        codecs[block_codec(payload)] += 1
        changed += changed_entries(payload)
        held.append(len(payload).to_bytes(4, "little") + payload)
        if changed:
            out.write(b"".join(held))
            held.clear()
    return changed


def write_delta(base: TensorSource, target: TensorSource, stream: BinaryIO) -> DeltaStats:
    """Write the delta that leads from base to target, in one pass over both.

    The digests of the two files go into the footer as the sources give them, and so do those of the target's tensors
    where it promises them; whether it holds them is for the caller to see, by `rebuild`. The base's tensors are
    digested. Either source may be a chain, so a chain can be written anew as one delta.

    Args:
        base: What the delta is made on.
        target: What it leads to.
        stream: Where it goes, from its present position on.

    Raises:
        UnsupportedModel: The two have different tensors (`can_delta`), or more than a footer can list.
        StoreDamaged: A source cannot be read, or is seen to break its promise.
        OSError: The stream cannot be written.
    """
    if not can_delta(base, target):
        raise UnsupportedModel(
            f"{target.path}: has other tensors than {base.path}. Store it as a whole file, not as a delta."
        )
    pre = {tensor.name: hashlib.sha256() for tensor in target.tensors}
    post = {tensor.name: hashlib.sha256() for tensor in target.tensors if tensor.name not in target.promised}

    def payloads(hashing: Lane, encoding: Lane) -> Iterator[bytes]:
        """The payloads of all blocks, in their order, each made while the next block is read."""
        old_ring, new_ring = _Ring(target.tensors), _Ring(target.tensors)
        waiting = deque[Future[bytes]]()
        pairs = zip(
            _each(base, target.tensors, old_ring.room), _each(target, target.tensors, new_ring.room), strict=True
        )
        for (tensor, olds), (_, news) in pairs:
            for old, new in zip(olds, news, strict=True):
                payload = encoding.do(encode_block, old, new)
                before = hashing.do(pre[tensor.name].update, old.data)
                after = hashing.do(post[tensor.name].update, new.data) if tensor.name in post else payload
                old_ring.busy_until(payload, before)
                new_ring.busy_until(payload, after)
                waiting.append(payload)
                if len(waiting) == _IN_FLIGHT:
                    yield waiting.popleft().result()
        for payload in waiting:
            yield payload.result()

    def seal(tensor: TensorInfo, offset: int, length: int, changed: int) -> TensorDelta:
        """Put the digests in, once they are there; a source that promised others is damaged."""
        name, before = tensor.name, pre[tensor.name].hexdigest()
        if base.promised.get(name, before) != before:
            raise _fault(base, name)
        after = post[name].hexdigest() if name in post else target.promised[name]
        if (before != after) != (changed > 0):
            raise _fault(target, name)
        return TensorDelta(name, tensor.dtype, tensor.shape, before, after, offset, length, changed)

    out, codecs = _Out(stream), Counter[Codec]()
    frame = b"" if target.header == base.header else compress(target.header)
    out.write(MAGIC + frame)
    written = list[tuple[TensorInfo, int, int, int]]()
    with Lane() as hashing, Lane() as encoding:
        made = payloads(hashing, encoding)
        for tensor in target.tensors:
            offset = out.position
            changed = _write_blocks(out, islice(made, len(block_sizes(tensor))), codecs)
            written.append((tensor, offset, out.position - offset, changed))
        hashing.finish()
    tensors = tuple(seal(*record) for record in written)
    digest = hashlib.sha256(target.header).hexdigest()
    footer = footer_bytes(
        target.path, Footer(base.digest, target.digest, digest, len(target.header), len(frame), tensors)
    )
    out.write(footer + len(footer).to_bytes(8, "little"))
    out.write(out.sha.digest())
    return DeltaStats(
        f"sha256:{out.sha.hexdigest()}",
        out.position,
        sum(tensor.changed for tensor in tensors),
        sum(tensor.entries for tensor in tensors),
        dict(codecs),
        tuple(TensorDigest(t.name, t.dtype, t.shape, t.post) for t in tensors),
    )
