"""Safetensors as hostile input: real files are read like the reference does, every other byte string is refused."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from pipeline.errors import StoreDamaged, UnsupportedModel
from pipeline.safefile import (
    DTYPE_BITS,
    file_and_tensor_digests,
    is_plain_name,
    model_root,
    model_tensor_digests,
    read_header,
    tensor_digests,
)

WEIGHTS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.array([1, 2, 3], dtype=np.int64),
    "empty": np.zeros((0, 4), dtype=np.float16),
    "scalar": np.array(2.5),
}


def _file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def _entry(start: int, end: int, dtype: object = "U8", shape: object = None) -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


def _reference_reads(path: Path) -> bool:
    try:
        with safe_open(path, "np"):
            return True
    except SafetensorError:
        return False


def test_a_real_file_is_read_and_digested(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(WEIGHTS, path, metadata={"format": "np"})
    header = read_header(path)
    assert {t.name: t.shape for t in header.tensors} == {k: v.shape for k, v in WEIGHTS.items()}
    assert header.metadata == {"format": "np"}
    assert header.data_start + sum(t.end - t.start for t in header.tensors) == path.stat().st_size
    for tensor in tensor_digests(path):
        assert tensor.sha256 == hashlib.sha256(WEIGHTS[tensor.name].tobytes()).hexdigest()
    assert file_and_tensor_digests(path)[0] == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def test_tensors_larger_than_a_piece_are_streamed(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    large = np.arange(300_000, dtype=np.int64)  # 2.4 MB: three pieces of 1 MiB
    save_file({"large": large}, path)
    assert tensor_digests(path)[0].sha256 == hashlib.sha256(large.tobytes()).hexdigest()


TORCH_DTYPES = (
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64, torch.bool, torch.uint8, torch.int16,
    torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_torch_dtypes_are_known(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "w.safetensors"
    save_torch({"w": torch.zeros(3, 2).to(dtype)}, path)
    assert read_header(path).tensors[0].shape == (3, 2)


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_every_dtype_has_the_size_of_the_reference(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "w.safetensors"
    nbytes = 8 * DTYPE_BITS[dtype] // 8
    path.write_bytes(_file({"w": _entry(0, nbytes, dtype, [8])}, bytes(nbytes)))
    assert read_header(path)
    assert _reference_reads(path)


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too short"),
    "seven bytes": (b"1234567", "too short"),
    "length past the end": (_file({}, length=3), "announces a header of 3 bytes"),
    "length of 2^64 - 1": (_file({}, length=2**64 - 1), "announces a header"),
    "not JSON": (_file(b"{nonsense"), "is not a JSON object"),
    "not an object": (_file([]), "does not start with"),
    "leading space": (_file(b" {}"), "does not start with"),
    "not UTF-8": (_file(b'{"\xff": 1}'), "is not a JSON object"),
    "no end of nesting": (_file(b'{"a":' + b"[" * 200_000), "is not a JSON object"),
    "huge integer": (_file(b'{"a":' + b"9" * 10_000 + b"}"), "is not a JSON object"),
    "NaN": (_file(b'{"a": NaN}'), "NaN"),
    "duplicate tensor": (
        _file(b'{"a":%s,"a":%s}' % ((json.dumps(_entry(0, 1)).encode(),) * 2), b"x"),
        "a key occurs twice",
    ),
    "duplicate field": (_file(b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"), "twice"),
    "lone surrogate": (_file({"\ud800": _entry(0, 1)}, b"x"), "not Unicode"),
    "metadata not strings": (_file({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata not an object": (_file({"__metadata__": 1}), "__metadata__"),
    "entry not an object": (_file({"a": 1}), "needs exactly the fields"),
    "field missing": (_file({"a": {"dtype": "U8", "shape": [1]}}, b"x"), "needs exactly the fields"),
    "field too many": (_file({"a": {**_entry(0, 1), "x": 1}}, b"x"), "needs exactly the fields"),
    "unknown dtype": (_file({"a": _entry(0, 1, "U7")}, b"x"), "unknown dtype"),
    "dtype not a string": (_file({"a": _entry(0, 1, ["U8"])}, b"x"), "unknown dtype"),
    "negative size": (_file({"a": _entry(0, 1, shape=[-1])}, b"x"), "needs a shape"),
    "boolean size": (_file({"a": _entry(0, 1, shape=[True])}, b"x"), "needs a shape"),
    "fractional size": (_file({"a": _entry(0, 1, shape=[1.0])}, b"x"), "needs a shape"),
    "rank 65": (_file({"a": _entry(0, 1, shape=[1] * 65)}, b"x"), "needs a shape"),
    "overflowing shape": (_file({"a": _entry(0, 0, shape=[2**62, 4])}), "needs 147573952589676412928 bits"),
    "shape does not match": (_file({"a": _entry(0, 1, shape=[2])}, b"x"), "needs 16 bits"),
    "half a byte": (_file({"a": _entry(0, 1, "F4", [1])}, b"x"), "needs 4 bits"),
    "end before start": (_file({"a": _entry(1, 0, shape=[0])}, b"x"), "data_offsets"),
    "negative offset": (_file({"a": _entry(-1, 0, shape=[1])}, b"x"), "data_offsets"),
    "gap at the start": (_file({"a": _entry(1, 2)}, b"xx"), "a gap before"),
    "gap between": (_file({"a": _entry(0, 1), "b": _entry(2, 3)}, b"xxx"), "a gap before"),
    "overlap": (_file({"a": _entry(0, 2), "b": _entry(1, 3)}, b"xxx"), "an overlap"),
    "same bytes twice": (_file({"a": _entry(0, 2), "b": _entry(0, 2)}, b"xx"), "an overlap"),
    "past the end": (_file({"a": _entry(0, 2)}, b"x"), "header and tensors need"),
    "bytes left over": (_file({"a": _entry(0, 1)}, b"xy"), "header and tensors need"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_file_is_refused_with_file_and_reason(tmp_path: Path, name: str) -> None:
    path = tmp_path / "w.safetensors"
    data, message = BAD[name]
    path.write_bytes(data)
    with pytest.raises(StoreDamaged, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_a_header_over_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", 100_000_001))
        stream.truncate(200_000_000)  # sparse: takes no space
    with pytest.raises(StoreDamaged, match="limit is 100000000"):
        read_header(path)


@pytest.mark.timeout(10)
def test_pipes_folders_and_missing_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("pipe", "not a regular file"), (".", "not a regular file"), ("absent", "is missing")):
        with pytest.raises(StoreDamaged, match=message):
            read_header(tmp_path / name)


def _small() -> bytes:
    header = {"__metadata__": {"format": "pt"}, "a": _entry(0, 4, "F32", [1]), "b": _entry(4, 6, "BF16", [1, 1])}
    return _file(header, b"abcdef")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, len(_small()) - 1), st.integers(0, 255)), max_size=4),
    st.integers(0, len(_small())),
    st.binary(max_size=3),
)
@example([], len(_small()), b"")
def test_mutated_bytes_are_read_like_the_reference_or_refused(
    tmp_path: Path, changes: list[tuple[int, int]], keep: int, more: bytes
) -> None:
    data = bytearray(_small())
    for at, value in changes:
        data[at] = value
    path = tmp_path / "w.safetensors"
    path.write_bytes(bytes(data[:keep]) + more)
    try:
        header = read_header(path)
    except StoreDamaged:
        return
    # What we accept, the reference accepts: never the other way round a surprise for the loader.
    assert _reference_reads(path)
    assert header.data_start + sum(t.end - t.start for t in header.tensors) == path.stat().st_size


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=64) | st.binary(max_size=64).map(lambda raw: _file(b"{" + raw)))
def test_arbitrary_bytes_are_refused_clearly(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(data)
    try:
        read_header(path)
    except StoreDamaged as error:
        assert str(path) in str(error)


def test_every_flipped_byte_of_the_data_changes_its_tensor(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(_small())
    before = tensor_digests(path)
    for at in range(read_header(path).data_start, len(_small())):
        data = bytearray(_small())
        data[at] ^= 1
        path.write_bytes(data)
        assert tensor_digests(path) != before


# --- model folders ----------------------------------------------------------------------------------------


def _sharded(folder: Path, change: Callable[[dict[str, Any]], None] = lambda tree: None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({"a": WEIGHTS["a"], "empty": WEIGHTS["empty"]}, folder / "model-1.safetensors")
    save_file({"b": WEIGHTS["b"], "scalar": WEIGHTS["scalar"]}, folder / "model-2.safetensors")
    one, two = "model-1.safetensors", "model-2.safetensors"
    tree = {"metadata": {"total_size": 1}, "weight_map": {"a": one, "empty": one, "b": two, "scalar": two}}
    change(tree)
    (folder / "model.safetensors.index.json").write_text(json.dumps(tree))
    return folder


def test_the_root_does_not_depend_on_the_layout(tmp_path: Path) -> None:
    single = tmp_path / "single"
    single.mkdir()
    save_file(dict(reversed(WEIGHTS.items())), single / "model.safetensors", metadata={"x": "y"})
    sharded = _sharded(tmp_path / "sharded")
    assert model_tensor_digests(single) == model_tensor_digests(sharded)
    assert [t.name for t in model_tensor_digests(single)] == sorted(WEIGHTS)
    assert model_root(single) == model_root(sharded)


SHARD_BREAKS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "tensor in the index only": (
        lambda t: t["weight_map"].update(ghost="model-1.safetensors"),
        "'ghost' is in no file",
    ),
    "tensor in a shard only": (lambda t: t["weight_map"].pop("a"), "says nothing of it"),
    "tensor in another shard": (lambda t: t["weight_map"].update(a="model-2.safetensors"), "'a' is in model-1"),
    "shard missing": (lambda t: t["weight_map"].update(a="model-3.safetensors"), "missing: model-3"),
    "path upwards": (lambda t: t["weight_map"].update(a="../model-1.safetensors"), "plain"),
    "absolute path": (lambda t: t["weight_map"].update(a="/etc/x.safetensors"), "plain"),
    "not safetensors": (lambda t: t["weight_map"].update(a="model-1.bin"), "plain"),
    "not a string": (lambda t: t["weight_map"].update(a=1), "plain"),
    "no weight_map": (lambda t: t.pop("weight_map"), "needs a weight_map"),
    "empty weight_map": (lambda t: t["weight_map"].clear(), "needs a weight_map"),
}


@pytest.mark.parametrize("name", SHARD_BREAKS)
def test_index_and_shards_must_agree(tmp_path: Path, name: str) -> None:
    change, message = SHARD_BREAKS[name]
    with pytest.raises(StoreDamaged, match=message):
        model_root(_sharded(tmp_path, lambda tree: change(tree) and None))


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    _sharded(tmp_path)
    save_file({"b": WEIGHTS["b"], "scalar": WEIGHTS["scalar"], "a": WEIGHTS["a"]}, tmp_path / "model-2.safetensors")
    with pytest.raises(StoreDamaged, match=r"'a' is in model-1\.safetensors and in model-2\.safetensors"):
        model_root(tmp_path)


def test_ambiguous_or_stray_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"no model\.safetensors"):
        model_root(tmp_path)
    _sharded(tmp_path)
    save_file(WEIGHTS, tmp_path / "consolidated.safetensors")
    with pytest.raises(UnsupportedModel, match=r"outside the model: consolidated\.safetensors"):
        model_root(tmp_path)
    (tmp_path / "consolidated.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModel, match="both present"):
        model_root(tmp_path)


def test_plain_names() -> None:
    assert all(is_plain_name(name) for name in ("a", "model-00001-of-00002.safetensors", ".gitattributes", "a b"))
    assert not any(is_plain_name(name) for name in ("", ".", "..", "a/b", "/a", "a\\b", "c:a", "a\0", "a\n"))
