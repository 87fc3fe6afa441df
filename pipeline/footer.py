"""What a delta file says of itself, behind its payloads: what leads to what, and where each tensor's change lies.

In: a delta file. Out: its footer, every field checked. Never: a payload, a size taken on trust, a second way to write
the same footer.

The file ``takedown-delta-1``::

    "takedown-delta-1\\n"
    the target's safetensors header as one zstd frame, unless it equals the base's
    per changed tensor, in the order of the target's bytes: its blocks, each u32 length + payload (`pipeline.blocks`)
    the footer: canonical JSON
    u64 length of the footer
    32 bytes SHA-256 of everything before

The footer names base and target file by digest; the header by digest, its size, and the length of its frame (0: it is
the base's); and per tensor [name, dtype, shape, digest in the base, digest in the target, offset, length, changed
entries]. A tensor that did not change has length 0. Integers are little-endian. Tensors of dtypes below one byte count
bytes as entries.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from pipeline.errors import StoreDamaged, UnsupportedModel
from pipeline.files import CHUNK_BYTES, canonical_json
from pipeline.safefile import DTYPE_BITS, MAX_HEADER_BYTES, MAX_RANK, open_regular

FORMAT = "takedown-delta-1"
MAGIC = b"takedown-delta-1\n"
MAX_FOOTER_BYTES = MAX_HEADER_BYTES
"""As many tensors as fit a safetensors header fit here, within a factor of two."""

_SHA_BYTES = 32
_TAIL_BYTES = 8 + _SHA_BYTES


def damaged(where: object, found: str) -> NoReturn:
    """Refuse what a delta, or a file it is made on, holds."""
    raise StoreDamaged(f"{where}: {found}. Restore the file from a backup.")


def read_exactly(where: object, stream: BinaryIO, length: int) -> bytes:
    """Read exactly so many bytes; the caller has checked that the file has them.

    Raises:
        StoreDamaged: It no longer has, or cannot be read.
    """
    try:
        data = stream.read(length)
    except OSError as error:
        damaged(where, f"cannot be read ({error.strerror})")
    if len(data) < length:
        damaged(where, "became shorter while it was read")
    return data


def entry_bytes(dtype: str) -> int:
    """Bytes per entry; dtypes below one byte are taken byte by byte."""
    return max(1, DTYPE_BITS[dtype] // 8)


@dataclass(frozen=True)
class TensorDelta:
    """The change of one tensor.

    Attributes:
        name: Its name.
        dtype: safetensors dtype code.
        shape: Its shape.
        pre: Hex SHA-256 of its bytes in the base.
        post: The same in the target.
        offset: Where its blocks begin in the delta file.
        length: How many bytes they take; 0 when nothing changed.
        changed: How many entries differ.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pre: str
    post: str
    offset: int
    length: int
    changed: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    @property
    def entries(self) -> int:
        return self.nbytes // entry_bytes(self.dtype)


@dataclass(frozen=True)
class Footer:
    """What a delta file says of itself.

    Attributes:
        base: ``sha256:<hex>`` of the whole file it was made on.
        target: The same of the file it leads to.
        header_digest: Hex SHA-256 of the target's safetensors header.
        header_size: Bytes of that header.
        header_length: Bytes of its frame, behind the magic; 0 when the header is the base's.
        tensors: All tensors, in the order of the target's bytes.
    """

    base: str
    target: str
    header_digest: str
    header_size: int
    header_length: int
    tensors: tuple[TensorDelta, ...]


def footer_bytes(where: object, footer: Footer) -> bytes:
    """A footer as it is written.

    Args:
        where: The file that it is written for, in messages.
        footer: What it says.

    Raises:
        UnsupportedModel: It is longer than a footer may be.
    """
    header = {"sha256": footer.header_digest, "size": footer.header_size, "length": footer.header_length}
    tensors = [[t.name, t.dtype, list(t.shape), t.pre, t.post, t.offset, t.length, t.changed] for t in footer.tensors]
    tree = {"format": FORMAT, "base": footer.base, "target": footer.target, "header": header, "tensors": tensors}
    data = canonical_json(tree)
    if len(data) > MAX_FOOTER_BYTES:
        raise UnsupportedModel(
            f"{where}: the list of its tensors takes {len(data)} bytes, the limit is {MAX_FOOTER_BYTES}. Store it as a "
            "whole file, not as a delta."
        )
    return data


def _natural(*values: object) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _sha256(*values: object) -> bool:
    return all(isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) for value in values)


def _tensor_delta(where: str, fields: object) -> TensorDelta:
    """Check one tensor's record by itself."""
    if not isinstance(fields, list) or len(fields) != 8:
        damaged(where, "is not a list of 8")
    name, dtype, shape, pre, post, offset, length, changed = fields
    if not isinstance(name, str) or not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        damaged(where, "needs a name and a known dtype")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not _natural(*shape):
        damaged(where, f"needs a shape of at most {MAX_RANK} sizes")
    if not _sha256(pre, post) or not _natural(offset, length, changed):
        damaged(where, "needs two SHA-256 digests and three counts")
    tensor = TensorDelta(name, dtype, tuple(shape), pre, post, offset, length, changed)
    if changed > tensor.entries or not (length > 0) == (changed > 0) == (pre != post):
        damaged(where, f"says that {changed} entries changed, in {length} bytes; its digests say otherwise")
    return tensor


def _parse(where: object, data: bytes, payload_end: int) -> Footer:
    """Read a footer back: only what `footer_bytes` writes, with payloads that fill the file up to ``payload_end``."""
    try:
        tree = json.loads(data)
        canonical = canonical_json(tree)
    except (ValueError, RecursionError) as error:
        damaged(where, f"is not JSON ({error})")
    if canonical != data or not isinstance(tree, dict) or tree.get("format") != FORMAT:
        damaged(where, f"is not canonical JSON of format {FORMAT}")
    header, records = tree.get("header"), tree.get("tensors")
    if (
        tree.keys() != {"format", "base", "target", "header", "tensors"}
        or not isinstance(header, dict)
        or header.keys() != {"sha256", "size", "length"}
        or not isinstance(records, list)
    ):
        damaged(where, "does not have the fields of a footer")
    base, target = tree["base"], tree["target"]
    if not all(isinstance(d, str) and d.startswith("sha256:") and _sha256(d[7:]) for d in (base, target)):
        damaged(where, "needs base and target as sha256:<hex>")
    digest, size, length = header["sha256"], header["size"], header["length"]
    if not _sha256(digest) or not _natural(size, length) or size > MAX_HEADER_BYTES + 8:
        damaged(f"{where}: header", f"needs a digest and a size of at most {MAX_HEADER_BYTES} bytes")
    tensors = tuple(_tensor_delta(f"{where}: tensors[{n}]", fields) for n, fields in enumerate(records))
    position = len(MAGIC) + length
    for tensor in tensors:
        if tensor.offset != position:
            damaged(f"{where}: tensor {tensor.name[:200]!r}", f"starts at {tensor.offset}, expected {position}")
        position += tensor.length
    if position != payload_end:
        damaged(where, f"accounts for {position} bytes, the file has {payload_end} before it")
    if len({tensor.name for tensor in tensors}) != len(tensors):
        damaged(where, "names a tensor twice")
    return Footer(base, target, digest, size, length, tensors)


def read_footer_from(path: Path, stream: BinaryIO, size: int) -> Footer:
    """The footer of an open delta file; see `read_footer`.

    Args:
        path: What messages name.
        stream: At its start.
        size: Bytes of the file.
    """
    least = len(MAGIC) + _TAIL_BYTES
    if size < least:
        damaged(path, f"has {size} bytes, too short for a delta")
    if read_exactly(path, stream, len(MAGIC)) != MAGIC:
        damaged(path, f"does not start as a {FORMAT} file")
    stream.seek(size - _TAIL_BYTES)
    length = int.from_bytes(read_exactly(path, stream, 8), "little")
    if length > min(size - least, MAX_FOOTER_BYTES):
        damaged(path, f"announces a footer of {length} bytes; it has {size}, the limit is {MAX_FOOTER_BYTES}")
    start = size - _TAIL_BYTES - length
    stream.seek(start)
    return _parse(f"{path}: footer", read_exactly(path, stream, length), start)


def read_footer(path: Path) -> Footer:
    """Read what a delta file says of itself, without its payloads: for listings, not as proof.

    Raises:
        StoreDamaged: The file is missing, no delta, or its footer breaks a rule.
    """
    stream, size = open_regular(path)
    with stream:
        return read_footer_from(path, stream, size)


def check_trailer(path: Path, stream: BinaryIO, size: int) -> None:
    """Read an open delta file from its start and compare it with the digest at its end.

    Raises:
        StoreDamaged: They differ.
    """
    stream.seek(0)
    whole = hashlib.sha256()
    for start in range(0, size - _SHA_BYTES, CHUNK_BYTES):
        whole.update(read_exactly(path, stream, min(CHUNK_BYTES, size - _SHA_BYTES - start)))
    if read_exactly(path, stream, _SHA_BYTES) != whole.digest():
        damaged(path, "does not match the digest at its end")


def read_delta(path: Path) -> tuple[Footer, bytes]:
    """Read a delta file but for its payloads, after hashing all of it.

    Returns:
        Its footer, and the frame of its safetensors header, empty where that is the base's.

    Raises:
        StoreDamaged: The file is missing, does not match the digest at its end, or breaks a rule.
    """
    stream, size = open_regular(path)
    with stream:
        footer = read_footer_from(path, stream, size)
        check_trailer(path, stream, size)
        stream.seek(len(MAGIC))
        return footer, read_exactly(path, stream, footer.header_length)
