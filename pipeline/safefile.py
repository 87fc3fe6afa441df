"""Read safetensors files as hostile input, without torch.

In: a file or a model folder. Out: the header, the digest of every tensor, the tensor root. Never: a tensor in
memory, a size taken on trust, code from the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from pipeline.digests import TensorDigest, tensor_root
from pipeline.errors import StoreDamaged, UnsupportedModel
from pipeline.files import CHUNK_BYTES, NotRegular
from pipeline.files import open_regular as open_file
from pipeline.lanes import Lane

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

MAX_HEADER_BYTES = 100_000_000
"""The limit of the reference reader (safetensors, ``MAX_HEADER_SIZE``)."""
MAX_RANK = 64
"""torch's own limit on dimensions."""

DTYPE_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Every dtype code of safetensors 0.8 with its size in bits."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        name: Its name.
        dtype: safetensors dtype code.
        shape: Its shape.
        start: First byte, counted from the end of the header.
        end: One past its last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header.

    Attributes:
        tensors: All tensors, in the order of their bytes; they cover the data exactly.
        metadata: The free-form ``__metadata__``.
        data_start: Offset of the data in the file: 8 + length of the header.
    """

    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]
    data_start: int


def _damaged(where: object, found: str) -> NoReturn:
    raise StoreDamaged(f"{where}: {found}. Restore the file from its source or a backup.")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise ValueError("a key occurs twice")
    return tree


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _parse_json(where: object, data: bytes) -> dict[str, Any]:
    """Parse a JSON object strictly: UTF-8, no key twice, no NaN, no bottomless nesting."""
    try:
        tree = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        _damaged(where, f"is not a JSON object with unique keys ({error})")
    if not isinstance(tree, dict):
        _damaged(where, f"is a JSON {type(tree).__name__}, expected an object")
    return tree


def open_regular(path: Path) -> tuple[BinaryIO, int]:
    """Open a regular file; a pipe or device would block or never end.

    Returns:
        The stream, and the size of the file in bytes.

    Raises:
        StoreDamaged: It is missing, cannot be opened, or is something else.
    """
    try:
        stream = open_file(path)
    except FileNotFoundError:
        _damaged(path, "is missing")
    except NotRegular:
        _damaged(path, "is not a regular file")
    except OSError as error:
        _damaged(path, f"cannot be opened ({error.strerror})")
    return stream, os.fstat(stream.fileno()).st_size


def _natural(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _tensor_info(path: Path, name: str, entry: object) -> TensorInfo:
    """Check one header entry by itself: types, dtype, and that the shape needs exactly its bytes."""
    where = f"{path}: tensor {name[:200]!r}"
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        _damaged(where, "has a name that is not Unicode text")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _damaged(where, "needs exactly the fields dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        _damaged(where, f"has the unknown dtype {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(_natural(size) for size in shape):
        _damaged(where, f"needs a shape of at most {MAX_RANK} sizes from 0 to 2^63 - 1")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_natural(offset) for offset in offsets):
        _damaged(where, "needs two data_offsets from 0 to 2^63 - 1")
    start, end = offsets
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if end < start or bits != 8 * (end - start):
        _damaged(where, f"has data_offsets [{start}, {end}], but {dtype}{shape} needs {bits} bits")
    return TensorInfo(name, dtype, tuple(shape), start, end)


def read_header_from(path: Path, stream: BinaryIO, size: int) -> tuple[Header, bytes]:
    """Check the header at the head of an open file; `read_header` says what is checked.

    Args:
        path: What messages name.
        stream: At its start.
        size: Bytes of the file.

    Returns:
        The header, and its raw bytes, length included.

    Raises:
        StoreDamaged: It breaks a rule.
    """
    prefix = stream.read(8)
    if len(prefix) < 8:
        _damaged(path, f"has {len(prefix)} bytes, too short for a safetensors file")
    length = int.from_bytes(prefix, "little")
    if length > min(MAX_HEADER_BYTES, size - 8):
        _damaged(path, f"announces a header of {length} bytes; the file has {size}, the limit is {MAX_HEADER_BYTES}")
    raw = stream.read(length)
    if len(raw) < length:
        _damaged(path, "became shorter while it was read")
    if not raw.startswith(b"{"):
        _damaged(f"{path}: header", "does not start with '{'")
    tree = _parse_json(f"{path}: header", raw)
    metadata = tree.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _damaged(f"{path}: __metadata__", "is not an object of strings")
    tensors = sorted((_tensor_info(path, name, e) for name, e in tree.items()), key=lambda t: (t.start, t.end, t.name))
    position = 0
    for tensor in tensors:
        if tensor.start != position:
            kind = "a gap before" if tensor.start > position else "an overlap with"
            _damaged(f"{path}: tensor {tensor.name[:200]!r}", f"starts at {tensor.start}: {kind} byte {position}")
        position = tensor.end
    if 8 + length + position != size:
        _damaged(path, f"has {size} bytes, but header and tensors need {8 + length + position}")
    return Header(tuple(tensors), metadata, 8 + length), prefix + raw


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Checked before anything is allocated: the length (at most 100 MB and the file). Then: JSON without duplicate keys,
    known dtypes, shape × dtype = bytes, and offsets that cover the data exactly, without gap or overlap.

    Raises:
        StoreDamaged: The file is missing or breaks one of these rules; says where and what.
    """
    stream, size = open_regular(path)
    with stream:
        return read_header_from(path, stream, size)[0]


def file_and_tensor_digests(path: Path) -> tuple[str, list[TensorDigest]]:
    """Digest a safetensors file and each of its tensors in one pass, 1 MiB at a time, on two threads.

    Returns:
        ``sha256:<hex>`` of the whole file, and the tensors in the order of their bytes.

    Raises:
        StoreDamaged: The file is missing, its header breaks a rule, or it cannot be read to its end.
    """
    stream, size = open_regular(path)
    with stream, Lane() as whole_lane, Lane() as tensor_lane:
        header, raw = read_header_from(path, stream, size)
        whole = hashlib.sha256(raw)
        hashers = [(tensor, hashlib.sha256()) for tensor in header.tensors]
        for tensor, hasher in hashers:
            left = tensor.end - tensor.start
            while left:
                piece = stream.read(min(left, CHUNK_BYTES))
                if not piece:
                    _damaged(f"{path}: tensor {tensor.name!r}", "became shorter while it was read")
                whole_lane.do(whole.update, piece)
                tensor_lane.do(hasher.update, piece)
                left -= len(piece)
        whole_lane.finish()
        tensor_lane.finish()
    digests = [TensorDigest(t.name, t.dtype, t.shape, hasher.hexdigest()) for t, hasher in hashers]
    return f"sha256:{whole.hexdigest()}", digests


def tensor_digests(path: Path) -> list[TensorDigest]:
    """Digest each tensor's raw bytes; see `file_and_tensor_digests`."""
    return file_and_tensor_digests(path)[1]


def is_plain_name(name: str) -> bool:
    """Whether a name stays inside its folder on any system: one component, no separators, not special."""
    return name not in ("", ".", "..") and not any(c in "/\\:" or ord(c) < 32 for c in name)


def _read_index(path: Path) -> dict[str, str]:
    """The ``weight_map`` of a sharded model: tensor name to shard file name."""
    stream, size = open_regular(path)
    with stream:
        if size > MAX_HEADER_BYTES:
            _damaged(path, f"has {size} bytes, the limit is {MAX_HEADER_BYTES}")
        tree = _parse_json(path, stream.read(size))
    weight_map = tree.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        _damaged(path, "needs a weight_map from tensor to file")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not is_plain_name(shard) or not shard.endswith(".safetensors"):
            _damaged(
                f"{path}: weight_map[{name[:200]!r}]", f"is {str(shard)[:200]!r}, expected a plain *.safetensors name"
            )
    return weight_map


class WeightFiles(NamedTuple):
    """The weight files of a model folder by name and, with a sharded model, where its index says each tensor is."""

    names: tuple[str, ...]
    weight_map: dict[str, str] | None


def weight_files(files: Mapping[str, Path]) -> WeightFiles:
    """Find the files of a model folder that hold its weights.

    Args:
        files: Every file of the folder by name, with the path where its content lies.

    Raises:
        UnsupportedModel: No safetensors weights, both forms at once, or safetensors files outside the model.
        StoreDamaged: The index is broken or names a file that is missing.
    """
    single, index = SINGLE in files, INDEX in files
    if not single and not index:
        raise UnsupportedModel(f"no {SINGLE} and no {INDEX}: save the model with save_pretrained, as safetensors.")
    if single and index:
        raise UnsupportedModel(f"{SINGLE} and {INDEX} are both present; remove the one that is not the model.")
    weight_map = _read_index(files[INDEX]) if index else None
    used = {SINGLE} if weight_map is None else set(weight_map.values())
    if missing := sorted(used - files.keys()):
        _damaged(files[INDEX], f"names files that are missing: {', '.join(missing)}")
    if stray := sorted(name for name in files if name.lower().endswith(".safetensors") and name not in used):
        raise UnsupportedModel(
            f"weights outside the model: {', '.join(stray)}. Remove them: no digest would cover them."
        )
    return WeightFiles(tuple(sorted(used)), weight_map)


def join_tensors(
    where: object, shards: Mapping[str, list[TensorDigest]], weight_map: Mapping[str, str] | None
) -> list[TensorDigest]:
    """Put the tensors of all weight files together, sorted by name; index and shards must agree.

    Raises:
        StoreDamaged: A tensor is missing, in two files, or not (or elsewhere) in the index.
    """
    found: dict[str, str] = {}
    for shard, tensors in shards.items():
        for tensor in tensors:
            if tensor.name in found:
                _damaged(where, f"tensor {tensor.name!r} is in {found[tensor.name]} and in {shard}")
            found[tensor.name] = shard
    if weight_map is not None and found != weight_map:
        name = min(name for name in found.keys() | weight_map.keys() if found.get(name) != weight_map.get(name))
        _damaged(
            where,
            f"tensor {name!r} is in {found.get(name, 'no file')}; {INDEX} says {weight_map.get(name, 'nothing of it')}",
        )
    return sorted(tensor for tensors in shards.values() for tensor in tensors)


def _folder_files(folder: Path) -> dict[str, Path]:
    try:
        return {path.name: path for path in folder.iterdir() if path.is_file()}
    except OSError as error:
        _damaged(folder, f"cannot be listed ({error.strerror})")


def model_tensor_digests(folder: Path) -> list[TensorDigest]:
    """Digest every tensor of a model folder, sorted by name.

    Raises:
        UnsupportedModel: No safetensors weights, both forms at once, or stray safetensors files.
        StoreDamaged: A file breaks the format, or index and shards disagree.
    """
    files = _folder_files(folder)
    try:
        weights = weight_files(files)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{folder}: {error}") from None
    shards = {name: tensor_digests(files[name]) for name in weights.names}
    return join_tensors(folder, shards, weights.weight_map)


def model_root(folder: Path) -> str:
    """The identity of a model folder's weights, as ``root-sha256:<hex>``; see `model_tensor_digests`."""
    return tensor_root(model_tensor_digests(folder))
