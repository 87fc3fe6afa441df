"""Deltas: whatever changed comes back in every bit, in bounded memory; a wrong byte anywhere is found and named."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from test_blocks import mutate

from pipeline import delta, footer, lanes
from pipeline.blocks import Codec
from pipeline.delta import (
    DeltaFile,
    DeltaStats,
    Room,
    TensorSource,
    WholeFile,
    can_delta,
    rebuild,
    write_delta,
)
from pipeline.errors import StoreDamaged, UnsupportedModel
from pipeline.files import canonical_json, digest_file
from pipeline.footer import MAGIC, read_footer
from pipeline.safefile import DTYPE_BITS, TensorInfo, read_header, tensor_digests

pytestmark = pytest.mark.filterwarnings("error")

Tensors = dict[str, tuple[str, list[int], bytes]]
"""Name → dtype, shape, bytes."""


def _write(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> WholeFile:
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(data)]}
        position += len(data)
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"".join(data for _, _, data in tensors.values()))
    return WholeFile(path, digest_file(path))


def _store(path: Path, base: TensorSource, target: TensorSource) -> DeltaStats:
    with path.open("wb") as stream:
        stats = write_delta(base, target, stream)
    assert (stats.digest, stats.nbytes) == (digest_file(path), path.stat().st_size)
    return stats


def _rebuilt(source: TensorSource) -> bytes:
    stream = io.BytesIO()
    digests = rebuild(source, stream)
    assert digests == rebuild(source, None)
    return stream.getvalue()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 entries: every tensor below has several."""
    monkeypatch.setattr(delta, "BLOCK_ENTRIES", 16)


def _weights(seed: int, entries: int) -> np.ndarray[Any, Any]:
    return (np.random.default_rng(seed).standard_normal(entries) * 0.02).astype("<f4")


def _touched(data: bytes, seed: int, width: int, share: float) -> bytes:
    """The bytes with about this share of entries changed."""
    draw = np.random.default_rng(seed)
    entries = np.frombuffer(data, f"<u{width}").copy()
    where = draw.random(entries.size) < share
    entries[where] ^= 1 + draw.integers(0, 100, int(where.sum())).astype(entries.dtype)
    return entries.tobytes()


MODEL: Tensors = {
    "embed": ("F32", [10, 10], _weights(1, 100).tobytes()),
    "norm": ("BF16", [7], (_weights(2, 7).view("<u4") >> 16).astype("<u2").tobytes()),
    "head": ("BF16", [30, 2], (_weights(3, 60).view("<u4") >> 16).astype("<u2").tobytes()),
    "steps": ("I64", [], struct.pack("<q", 17)),
    "none": ("F16", [0, 4], b""),
}


def _step(tensors: Tensors, seed: int, share: float = 0.1) -> Tensors:
    """The model after a step: embed and head change, the rest does not."""
    width = {"embed": 4, "head": 2}
    return {
        name: (dtype, shape, _touched(data, seed, width[name], share) if name in width else data)
        for name, (dtype, shape, data) in tensors.items()
    }


@pytest.fixture
def model(tmp_path: Path) -> WholeFile:
    return _write(tmp_path / "v0.safetensors", MODEL)


@pytest.fixture
def target(tmp_path: Path) -> WholeFile:
    return _write(tmp_path / "v1.safetensors", _step(MODEL, 1))


@pytest.fixture
def stored(tmp_path: Path, model: WholeFile, target: WholeFile) -> Path:
    _store(tmp_path / "v1.delta", model, target)
    return tmp_path / "v1.delta"


# --- round trips ------------------------------------------------------------------------------------------


def test_a_delta_gives_the_target_back(tmp_path: Path, model: WholeFile, target: WholeFile) -> None:
    stats = _store(tmp_path / "d", model, target)
    source = DeltaFile(tmp_path / "d", target.digest, model)
    assert _rebuilt(source) == target.path.read_bytes()
    assert rebuild(source, None) == tensor_digests(target.path) == list(stats.tensors)
    assert source.tensors == target.tensors
    assert source.header == target.header
    assert stats.entries == 168
    assert stats.changed == sum(
        int((np.frombuffer(a[2], f"<u{w}") != np.frombuffer(b[2], f"<u{w}")).sum())
        for a, b, w in zip(MODEL.values(), _step(MODEL, 1).values(), (4, 2, 2, 8, 2), strict=True)
    )
    assert 0 < stats.changed < 40
    assert sum(stats.blocks.values()) == 7 + 1 + 4 + 1
    assert stats.blocks[Codec.REFERENCE] >= 2


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_tensors_survive(tmp_path: Path, data: st.DataObject) -> None:
    before: Tensors = {}
    after: Tensors = {}
    for name in data.draw(st.lists(st.text(max_size=5).filter(lambda n: n != "__metadata__"), max_size=5, unique=True)):
        dtype = data.draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = data.draw(st.sampled_from(([], [0], [1], [8], [2, 40], [67])))
        bits = DTYPE_BITS[dtype] * int(np.prod(shape, dtype=np.int64))
        if bits % 8:
            shape, bits = [8], DTYPE_BITS[dtype] * 8
        raw = random.Random(data.draw(st.integers(0, 99))).randbytes(bits // 8)
        share = data.draw(st.sampled_from((0, 0.02, 0.3, 1)))
        before[name] = (dtype, shape, raw)
        after[name] = (dtype, shape, _touched(raw, 5, max(1, DTYPE_BITS[dtype] // 8), share))
    order = data.draw(st.permutations(list(after)))
    base = _write(tmp_path / "a", before)
    target = _write(tmp_path / "b", {name: after[name] for name in order}, data.draw(st.none() | st.just({"x": "é"})))
    _store(tmp_path / "d", base, target)
    assert _rebuilt(DeltaFile(tmp_path / "d", target.digest, base)) == target.path.read_bytes()


def test_files_of_the_reference_library_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # blocks of the real size
    before = {"w": _weights(1, 30_000).reshape(100, 300), "n": np.array([np.nan, -0.0, 0.0], np.float16)}
    after = {"w": before["w"].copy(), "n": np.array([np.nan, 0.0, -0.0], np.float16)}
    after["w"][3] += 1
    save_file(before, tmp_path / "a", {"format": "pt"})
    save_file(after, tmp_path / "b", {"format": "pt", "step": "1", "more": "2"})
    base, target = (WholeFile(tmp_path / name, digest_file(tmp_path / name)) for name in "ab")
    stats = _store(tmp_path / "d", base, target)
    assert (stats.changed, stats.entries) == (302, 30_003)
    assert _rebuilt(DeltaFile(tmp_path / "d", target.digest, base)) == target.path.read_bytes()


def test_a_header_is_stored_only_when_it_differs(tmp_path: Path, model: WholeFile, stored: Path) -> None:
    assert read_footer(stored).header_length == 0
    other = _write(tmp_path / "b", dict(reversed(MODEL.items())), {"step": "2"})
    stats = _store(tmp_path / "d", model, other)
    assert stats.changed == 0
    assert read_footer(tmp_path / "d").header_length > 0
    assert _rebuilt(DeltaFile(tmp_path / "d", other.digest, model)) == other.path.read_bytes()


def test_an_unchanged_tensor_takes_no_payload(stored: Path) -> None:
    footer = read_footer(stored)
    assert {t.name for t in footer.tensors if not t.length} == {"norm", "steps", "none"}
    assert all((t.pre == t.post) == (t.length == 0) == (t.changed == 0) for t in footer.tensors)


def _chain(tmp_path: Path, steps: int) -> tuple[list[TensorSource], list[bytes]]:
    """v0 as a whole file, v1 … as deltas, each over the one before; and what each file must be."""
    tensors = MODEL
    sources: list[TensorSource] = [_write(tmp_path / "v0.safetensors", tensors)]
    files = [sources[0].path.read_bytes()]
    for number in range(1, steps + 1):
        tensors = _step(tensors, number)
        whole = _write(tmp_path / f"v{number}.safetensors", tensors, {"step": str(number)})
        _store(tmp_path / f"v{number}.delta", sources[-1], whole)
        sources.append(DeltaFile(tmp_path / f"v{number}.delta", whole.digest, sources[-1]))
        files.append(whole.path.read_bytes())
        whole.path.unlink()
    return sources, files


def test_chains_of_deltas_compose(tmp_path: Path) -> None:
    sources, files = _chain(tmp_path, 12)
    for source, data in zip(sources, files, strict=True):
        assert _rebuilt(source) == data


def test_a_chain_is_written_anew_as_one_delta(tmp_path: Path) -> None:
    sources, files = _chain(tmp_path, 5)
    one = _store(tmp_path / "one", sources[0], sources[5])
    assert _rebuilt(DeltaFile(tmp_path / "one", sources[5].digest, sources[0])) == files[5]
    assert one.nbytes < sum((tmp_path / f"v{n}.delta").stat().st_size for n in range(1, 6))
    _store(tmp_path / "tail", sources[2], sources[5])
    assert _rebuilt(DeltaFile(tmp_path / "tail", sources[5].digest, sources[2])) == files[5]


def test_a_block_is_not_read_over_before_it_is_hashed_and_written(
    tmp_path: Path, model: WholeFile, target: WholeFile, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every job starts late, hashing and writing in turn; what they see is what was read all the same."""
    do, late = lanes.Lane.do, iter(range(10**6))

    def delayed(lane: lanes.Lane, job: Callable[..., Any], *args: Any) -> Any:
        wait = 0.002 * (next(late) % 3)

        def slow() -> Any:
            time.sleep(wait)
            return job(*args)

        return do(lane, slow)

    monkeypatch.setattr(lanes.Lane, "do", delayed)
    assert _rebuilt(DeltaFile(stored, target.digest, model)) == target.path.read_bytes()
    _store(tmp_path / "again", model, target)
    assert (tmp_path / "again").read_bytes() == stored.read_bytes()


def test_every_file_of_a_chain_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources, _ = _chain(tmp_path, 4)
    opened: list[Path] = []
    real = delta.open_regular

    def noting(path: Path) -> Any:
        opened.append(path)
        return real(path)

    monkeypatch.setattr(delta, "open_regular", noting)
    rebuild(sources[4], None)
    assert sorted(opened) == sorted(source.path for source in sources)


@pytest.mark.parametrize("entries", [0, 1, 15, 16, 17, 32, 40])
@pytest.mark.parametrize(("dtype", "width"), [("F64", 8), ("BF16", 2), ("F4", 0.5), ("F6_E2M3", 0.75)])
def test_the_sizes_of_blocks_cover_a_tensor(entries: int, dtype: str, width: float) -> None:
    count = int(entries * max(width, 1) / width)  # of dtypes below one byte, so many that they take so many bytes
    info = TensorInfo("w", dtype, (count,), 0, int(count * width))
    sizes = delta.block_sizes(info)
    assert sum(sizes) == info.end // max(1, int(width))
    assert all(size == 16 for size in sizes[:-1]) and all(0 < size <= 16 for size in sizes)


def test_digests_that_are_known_are_not_taken_again(
    tmp_path: Path, model: WholeFile, target: WholeFile, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = tensor_digests(target.path)
    hashed: list[int] = []
    do = lanes.Lane.do

    def counting(lane: lanes.Lane, job: Callable[..., Any], *args: Any) -> Any:
        if getattr(job, "__name__", "") == "update":
            hashed.append(args[0].nbytes)
        return do(lane, job, *args)

    monkeypatch.setattr(lanes.Lane, "do", counting)
    data = target.path.stat().st_size - len(target.header)
    for source, times in ((target, 2), (WholeFile(target.path, target.digest, known), 1)):
        hashed.clear()
        _store(tmp_path / "d", model, source)
        assert sum(hashed) == times * data
        assert (tmp_path / "d").read_bytes() == stored.read_bytes()


def test_a_known_digest_that_is_wrong_is_found(tmp_path: Path, model: WholeFile, target: WholeFile) -> None:
    known = tensor_digests(target.path)

    def with_wrong(name: str) -> WholeFile:
        wrong = [t._replace(sha256=HEX) if t.name == name else t for t in known]
        return WholeFile(target.path, target.digest, wrong)

    with pytest.raises(StoreDamaged, match=rf"v1\.safetensors: tensor 'norm' has SHA-256 .* expected {HEX}"):
        write_delta(model, with_wrong("norm"), io.BytesIO())  # equal to the base's, whose digest is taken
    _store(tmp_path / "d", model, with_wrong("embed"))
    with pytest.raises(StoreDamaged, match=rf"d: tensor 'embed' has SHA-256 .* expected {HEX}"):
        rebuild(DeltaFile(tmp_path / "d", target.digest, model), None)
    with pytest.raises(StoreDamaged, match=rf"v1\.safetensors: tensor 'embed' has SHA-256 .* expected {HEX}"):
        rebuild(with_wrong("embed"), None)
    same = [t._replace(sha256=_digest_in(model, "embed")) if t.name == "embed" else t for t in known]
    with pytest.raises(StoreDamaged, match=r"v1\.safetensors: tensor 'embed' has SHA-256"):
        write_delta(model, WholeFile(target.path, target.digest, same), io.BytesIO())  # the base's, but it changes


def _digest_in(file: WholeFile, name: str) -> str:
    return next(t.sha256 for t in tensor_digests(file.path) if t.name == name)


def test_a_delta_is_the_same_every_time(model: WholeFile, target: WholeFile, stored: Path) -> None:
    again = io.BytesIO()
    write_delta(model, target, again)
    assert again.getvalue() == stored.read_bytes()


def test_other_tensors_are_no_delta(tmp_path: Path, model: WholeFile) -> None:
    others: list[Tensors] = [
        {name: MODEL[name] for name in ("embed", "norm")},
        {**MODEL, "more": ("U8", [1], b"x")},
        {**MODEL, "norm": ("F16", [7], MODEL["norm"][2])},
        {**MODEL, "head": ("BF16", [60], MODEL["head"][2])},
    ]
    assert can_delta(model, _write(tmp_path / "same", dict(reversed(MODEL.items()))))
    for tensors in others:
        other = _write(tmp_path / "other", tensors)
        assert not can_delta(model, other)
        with pytest.raises(UnsupportedModel, match=r"other: has other tensors than .*Store it as a whole file"):
            write_delta(model, other, io.BytesIO())


def test_memory_holds_a_few_blocks_not_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries, block = 4_000_000, 1 << 16
    monkeypatch.setattr(delta, "BLOCK_ENTRIES", block)
    data = _weights(1, entries).tobytes()
    base = _write(tmp_path / "a", {"w": ("F32", [entries], data)})
    target = _write(tmp_path / "b", {"w": ("F32", [entries], _touched(data, 2, 4, 0.05))})
    del data
    tracemalloc.start()
    _store(tmp_path / "d", base, target)
    writing = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    with (tmp_path / "c").open("wb") as stream:
        rebuild(DeltaFile(tmp_path / "d", target.digest, base), stream)
    reading = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "c").read_bytes() == target.path.read_bytes()
    # Blocks of 256 KiB: two of each source; 1 MiB pieces where the delta is hashed; what encoding and decoding take.
    assert writing < 10 * 4 * block
    assert reading < 6 * 4 * block


class _Choosy(io.RawIOBase):
    """A raw file that takes few bytes at a time, and after ``limit`` none."""

    def __init__(self, limit: int) -> None:
        self.data, self.limit = bytearray(), limit

    def writable(self) -> bool:
        return True

    def write(self, piece: Any) -> int:
        if len(self.data) >= self.limit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.data += bytes(piece[:11])
        return min(len(piece), 11)


def test_short_writes_are_finished_and_a_full_disk_is_told(model: WholeFile, target: WholeFile, stored: Path) -> None:
    source = DeltaFile(stored, target.digest, model)
    stream = _Choosy(10**6)
    rebuild(source, stream)  # type: ignore[arg-type]
    assert stream.data == target.path.read_bytes()
    for limit in (0, 50, len(target.header) + 100, len(stream.data) - 8):  # the last: before the last tensor
        with pytest.raises(OSError, match="No space left"):
            rebuild(source, _Choosy(limit))  # type: ignore[arg-type]
    for limit in (0, 50, stored.stat().st_size - 20):
        with pytest.raises(OSError, match="No space left"):
            write_delta(model, target, _Choosy(limit))  # type: ignore[arg-type]


# --- damage and who is at fault ---------------------------------------------------------------------------


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _sealed(data: bytes) -> bytes:
    """The container with the digest at its end made right again, so that what is inside gets read."""
    return data[:-32] + hashlib.sha256(data[:-32]).digest()


def _with_footer(data: bytes, edit: Callable[[dict[str, Any]], object], payload: bytes | None = None) -> bytes:
    """The container with an edited footer, and if given another payload."""
    length = int.from_bytes(data[-40:-32], "little")
    tree = json.loads(data[-40 - length : -40])
    edit(tree)
    footer = canonical_json(tree)
    head = data[: -40 - length] if payload is None else payload
    return _sealed(head + footer + struct.pack("<Q", len(footer)) + bytes(32))


def test_every_flipped_byte_of_a_delta_is_found_when_it_is_opened(
    model: WholeFile, target: WholeFile, stored: Path
) -> None:
    sound = stored.read_bytes()
    for at in range(len(sound)):
        _flip(stored, at)
        with pytest.raises(StoreDamaged, match=str(stored)):
            DeltaFile(stored, target.digest, model)
        stored.write_bytes(sound)
    for length in range(len(sound)):
        stored.write_bytes(sound[:length])
        with pytest.raises(StoreDamaged, match=str(stored)):
            DeltaFile(stored, target.digest, model)


def test_every_flipped_byte_of_a_base_is_found_or_does_not_matter(
    model: WholeFile, target: WholeFile, stored: Path
) -> None:
    """Where a delta replaces an entry, its old value does not matter; everywhere else the base is named."""
    matters = 0
    for at in range(model.path.stat().st_size):
        _flip(model.path, at)
        try:
            found = _rebuilt(DeltaFile(stored, target.digest, WholeFile(model.path, model.digest)))
        except StoreDamaged as error:
            matters += 1
            assert str(error).startswith(str(model.path))
        else:
            assert found == target.path.read_bytes()
        _flip(model.path, at)
    assert matters > model.path.stat().st_size * 0.8


def _forged(path: Path, name: str) -> None:
    """Change one value in a tensor's last block, as someone would who can make the digest at the end right again."""
    record = next(t for t in read_footer(path).tensors if t.name == name)
    data = bytearray(path.read_bytes())
    data[record.offset + record.length - 1] ^= 0x40
    path.write_bytes(_sealed(bytes(data)))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_forged_link_of_a_chain_is_named(tmp_path: Path, number: int) -> None:
    sources, files = _chain(tmp_path, 3)
    _forged(tmp_path / f"v{number}.delta", "head")
    source = sources[0]
    for n in range(1, 4):
        source = DeltaFile(tmp_path / f"v{n}.delta", sources[n].digest, source)
        if n < number:
            assert _rebuilt(source) == files[n]
            continue
        with pytest.raises(StoreDamaged, match=rf"v{number}\.delta: tensor 'head'"):
            rebuild(source, io.BytesIO())
        with pytest.raises(StoreDamaged, match=rf"v{number}\.delta: tensor 'head'"):  # nor is it built upon
            write_delta(source, sources[0], io.BytesIO())


def test_the_damaged_base_of_a_chain_is_named(tmp_path: Path) -> None:
    sources, _ = _chain(tmp_path, 3)
    offset = len(sources[0].header) + 100 * 4 + 3  # in norm, which no step changes
    _flip(sources[0].path, offset)
    with pytest.raises(StoreDamaged, match=r"v0\.safetensors: tensor 'norm' has SHA-256"):
        rebuild(sources[3], None)
    _flip(sources[0].path, offset)
    assert rebuild(sources[3], None)
    with sources[0].path.open("r+b") as stream:
        stream.truncate(offset)
    with pytest.raises(StoreDamaged, match=r"v0\.safetensors: tensor 'norm': became shorter"):
        rebuild(sources[3], None)
    sources[0].path.unlink()
    with pytest.raises(StoreDamaged, match=r"v0\.safetensors: is missing"):
        rebuild(sources[3], None)


def test_a_base_that_was_misread_once_is_told(
    model: WholeFile, target: WholeFile, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = DeltaFile(stored, target.digest, model)
    honest, calls = WholeFile.read, []

    def once_wrong(self: WholeFile, names: Sequence[str], room: Room) -> Iterator[Any]:
        for name in names:
            for block in honest(self, [name], room):
                if name == "norm" and not calls:
                    calls.append(name)
                    block[0] ^= 1
                yield block

    monkeypatch.setattr(WholeFile, "read", once_wrong)
    with pytest.raises(StoreDamaged, match=r"v1\.delta: tensor 'norm' was wrong when it was read, and right"):
        rebuild(source, None)
    assert rebuild(source, None) == tensor_digests(target.path)


def test_a_delta_for_another_base_or_target_is_refused(
    tmp_path: Path, model: WholeFile, target: WholeFile, stored: Path
) -> None:
    with pytest.raises(StoreDamaged, match=rf"leads to {target.digest}, expected sha256:0"):
        DeltaFile(stored, "sha256:" + "0" * 64, model)
    with pytest.raises(StoreDamaged, match=rf"was made on {model.digest}, but .*v1\.safetensors is {target.digest}"):
        DeltaFile(stored, target.digest, target)
    smaller = _write(tmp_path / "x", {"embed": MODEL["embed"]})
    with pytest.raises(StoreDamaged, match="x: does not hold the header that the delta was made with"):
        DeltaFile(stored, target.digest, WholeFile(smaller.path, model.digest))
    link = DeltaFile(stored, target.digest, model)  # its tensors are not those of v0
    second = _write(tmp_path / "v2.safetensors", _step(_step(MODEL, 1), 2))
    _store(tmp_path / "v2.delta", model, second)
    data = (tmp_path / "v2.delta").read_bytes()
    (tmp_path / "v2.delta").write_bytes(_with_footer(data, lambda t: t.update(base=target.digest)))
    with pytest.raises(StoreDamaged, match=r"was made on another tensor 'embed' than .*v1\.delta leads to"):
        DeltaFile(tmp_path / "v2.delta", second.digest, link)


def test_a_delta_that_shrinks_while_it_is_read_is_refused(model: WholeFile, target: WholeFile, stored: Path) -> None:
    source = DeltaFile(stored, target.digest, model)
    with stored.open("r+b") as stream:
        stream.truncate(source.footer.tensors[0].offset + 9)
    with pytest.raises(StoreDamaged, match=r"v1\.delta: tensor 'embed': became shorter"):
        rebuild(source, None)


# --- hostile containers -----------------------------------------------------------------------------------


def _tensor(field: int, value: Any, number: int = 0) -> Callable[[dict[str, Any]], object]:
    return lambda tree: tree["tensors"][number].__setitem__(field, value)


HEX = "0" * 64
FOOTERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "other format": (lambda t: t.update(format="takedown-delta-2"), "of format takedown-delta-1"),
    "field missing": (lambda t: t.pop("base"), "does not have the fields"),
    "field too many": (lambda t: t.update(more=1), "does not have the fields"),
    "base without algorithm": (lambda t: t.update(base=HEX), "sha256:<hex>"),
    "target not a text": (lambda t: t.update(target=7), "sha256:<hex>"),
    "header a list": (lambda t: t.update(header=[]), "does not have the fields"),
    "header without size": (lambda t: t["header"].pop("size"), "does not have the fields"),
    "header of 2^62 bytes": (lambda t: t["header"].update(size=2**62), "a size of at most"),
    "header of other size": (lambda t: t["header"].update(size=5), "v0.safetensors: does not hold the header"),
    "header of other digest": (lambda t: t["header"].update(sha256=HEX), "v0.safetensors: does not hold the header"),
    "header taken from a payload": (lambda t: t["header"].update(length=4), "starts at"),
    "tensors an object": (lambda t: t.update(tensors={}), "does not have the fields"),
    "no tensors": (lambda t: t.update(tensors=[]), "accounts for"),
    "seven fields": (lambda t: t["tensors"][0].pop(), "is not a list of 8"),
    "name not a text": (_tensor(0, 5), "a name and a known dtype"),
    "name twice": (_tensor(0, "head"), "names a tensor twice"),
    "other name": (_tensor(0, "other"), "has other tensors"),
    "lone surrogate": (_tensor(0, "\ud800"), "has other tensors"),
    "unknown dtype": (_tensor(1, "U7"), "a known dtype"),
    "dtype not a text": (_tensor(1, ["F32"]), "a known dtype"),
    "other dtype": (_tensor(1, "I32"), "has other tensors"),
    "negative shape": (_tensor(2, [-1]), "needs a shape"),
    "boolean shape": (_tensor(2, [True]), "needs a shape"),
    "rank 65": (_tensor(2, [1] * 65), "needs a shape"),
    "huge shape": (_tensor(2, [2**62] * 64), "has other tensors"),
    "other shape": (_tensor(2, [100]), "has other tensors"),
    "short digest": (_tensor(3, "00"), "two SHA-256"),
    "digest in capitals": (_tensor(4, "A" * 64), "two SHA-256"),
    "digest with a line": (_tensor(4, HEX + "\n"), "two SHA-256"),
    "negative offset": (_tensor(5, -1), "three counts"),
    "offset not a number": (_tensor(5, "17"), "three counts"),
    "other offset": (_tensor(5, 18), "starts at 18, expected 17"),
    "length of 2^64": (_tensor(6, 2**64), "three counts"),
    "other length": (_tensor(6, 9), "starts at"),
    "fractional count": (_tensor(7, 1.5), "three counts"),
    "more changes than entries": (_tensor(7, 101), "its digests say otherwise"),
    "no changes, yet a payload": (_tensor(7, 0), "its digests say otherwise"),
    "other number of changes": (_tensor(7, 1), r"tensor 'embed': changes \d+ entries and leaves 0 bytes, expected 1"),
    "equal digests, yet a payload": (lambda t: t["tensors"][0].__setitem__(3, t["tensors"][0][4]), "otherwise"),
    "other digests, yet no payload": (_tensor(4, HEX, 1), "its digests say otherwise"),
    "other order": (lambda t: t["tensors"].insert(3, t["tensors"].pop(4)), "describes other tensors than its footer"),
    "other digest of the target": (_tensor(4, HEX), f"v1.delta: tensor 'embed' has SHA-256 .* expected {HEX}"),
    "other digest of the base": (_tensor(3, HEX), f"v0.safetensors: tensor 'embed' has SHA-256 .* expected {HEX}"),
}


@pytest.mark.parametrize("name", FOOTERS)
def test_a_footer_that_is_never_written_is_refused(
    name: str, model: WholeFile, target: WholeFile, stored: Path
) -> None:
    edit, message = FOOTERS[name]
    if name == "other digest of the base":  # only looked at when the tensor comes out wrong
        _flip(model.path, model.path.stat().st_size - 1)
        _forged(stored, "embed")
    stored.write_bytes(_with_footer(stored.read_bytes(), edit))
    with pytest.raises(StoreDamaged, match=message):
        rebuild(DeltaFile(stored, target.digest, model), None)


def _raw_footer(footer: bytes, length: int | None = None) -> bytes:
    return _sealed(MAGIC + footer + struct.pack("<Q", len(footer) if length is None else length) + bytes(32))


CONTAINERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too short"),
    "too short": (MAGIC + bytes(39), "too short"),
    "other magic": (_sealed(b"takedown-delta-2\n" + bytes(40)), "does not start as"),
    "footer past the start": (_raw_footer(b"{}", 3), "announces a footer of 3"),
    "footer of 2^64 - 1": (_raw_footer(b"{}", 2**64 - 1), "announces a footer"),
    "empty footer": (_raw_footer(b""), "is not JSON"),
    "not JSON": (_raw_footer(b"{"), "is not JSON"),
    "not UTF-8": (_raw_footer(b'"\xff"'), "is not JSON"),
    "NaN": (_raw_footer(b'{"format":NaN}'), "is not JSON"),
    "no end of nesting": (_raw_footer(b"[" * 200_000), "is not JSON"),
    "deep nesting": (_raw_footer(b"[" * 900 + b"]" * 900), "is not"),
    "huge integer": (_raw_footer(b"9" * 10_000), "is not JSON"),
    "not an object": (_raw_footer(b"[]"), "is not canonical JSON"),
    "spaces": (_raw_footer(b'{"format": "takedown-delta-1"}'), "is not canonical JSON"),
    "a key twice": (_raw_footer(b'{"format":"takedown-delta-1","format":"takedown-delta-1"}'), "is not canonical"),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_that_is_never_written_is_refused(tmp_path: Path, model: WholeFile, name: str) -> None:
    data, message = CONTAINERS[name]
    (tmp_path / "d").write_bytes(data)
    for read in (read_footer, lambda path: DeltaFile(path, model.digest, model)):
        with pytest.raises(StoreDamaged, match=message) as caught:
            read(tmp_path / "d")
        assert str(tmp_path / "d") in str(caught.value)


@pytest.mark.timeout(10)
def test_pipes_folders_and_missing_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("pipe", "not a regular file"), (".", "not a regular file"), ("absent", "is missing")):
        with pytest.raises(StoreDamaged, match=message):
            read_footer(tmp_path / name)
        with pytest.raises(StoreDamaged, match=message):
            WholeFile(tmp_path / name, "sha256:" + HEX)


def test_a_footer_over_the_limit_is_neither_written_nor_read(
    model: WholeFile, target: WholeFile, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(footer, "MAX_FOOTER_BYTES", 500)
    with pytest.raises(UnsupportedModel, match="the limit is 500"):
        write_delta(model, target, io.BytesIO())
    with pytest.raises(StoreDamaged, match="the limit is 500"):
        read_footer(stored)


def test_a_header_frame_is_checked(tmp_path: Path, model: WholeFile) -> None:
    other = _write(tmp_path / "b", MODEL, {"step": "2"})
    path = tmp_path / "d"
    _store(path, model, other)
    data = path.read_bytes()
    length = read_footer(path).header_length
    frame = data[len(MAGIC) : len(MAGIC) + length]

    def opened(frame: bytes, header: bytes) -> None:
        def edit(tree: dict[str, Any]) -> None:
            tree["header"] = {
                "length": len(frame), "size": len(header), "sha256": hashlib.sha256(header).hexdigest()
            }  # fmt: skip
            for record in tree["tensors"]:
                record[5] += len(frame) - length

        path.write_bytes(_with_footer(data, edit, MAGIC + frame))
        DeltaFile(path, other.digest, model)

    opened(frame, other.header)
    for bad, message in (
        (frame + b"x", "header: payload has a damaged zstd frame"),
        (frame[:-1], "header: payload has a damaged zstd frame"),
        (delta.compress(bytes(len(other.header))), "does not hold the header"),
        (delta.compress(other.header + b" "), "header: payload has a zstd frame of"),
    ):
        with pytest.raises(StoreDamaged, match=message):
            opened(bad, other.header)
    fewer = _write(tmp_path / "c", {n: MODEL[n] for n in MODEL if n != "none"}).header
    swapped = _write(tmp_path / "c", {n: MODEL[n] for n in sorted(MODEL)}).header
    for header, message in (
        (fewer, "describes other tensors"),
        (swapped, "describes other tensors"),
        (struct.pack("<Q", 2) + b"{}", "header and tensors need"),
        (b"1234567", "too short"),
        (other.header[:-1] + b" ", "is not a JSON object"),
    ):
        with pytest.raises(StoreDamaged, match=message):
            opened(delta.compress(header), header)


def _deep_mutation(draw: random.Random, data: bytes) -> bytes:
    """Edit payload or footer so that all outer checks still hold, or edit anything."""
    length = int.from_bytes(data[-40:-32], "little")
    start = len(data) - 40 - length
    kind = draw.randrange(4)
    if kind == 0:  # anywhere
        return _sealed(mutate(draw, data[:-32]) + bytes(32))
    if kind == 1:  # inside the payloads, the footer as before
        at = draw.randrange(len(MAGIC), start)
        return _sealed(data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :])
    footer = json.loads(data[start:-40])
    payload = data[:start]
    number = draw.randrange(len(footer["tensors"]))
    record = footer["tensors"][number]
    if kind == 2 and record[6]:  # another payload of any length, the footer fitted to it
        end = record[5] + record[6]
        other = mutate(draw, payload[record[5] : end])
        payload = payload[: record[5]] + other + payload[end:]
        for later in footer["tensors"][number + 1 :]:
            later[5] += len(other) - record[6]
        record[6] = len(other)
    else:  # another value in the footer
        field = draw.randrange(8)
        record[field] = draw.choice((0, 1, 2**63, record[field - 1], [4], "x", record[6] + 4, None, -1))
    return _with_footer(data, lambda tree: tree.update(footer), payload)


@pytest.mark.slow
def test_mutated_containers_are_refused_or_give_the_target(tmp_path: Path, stored: Path) -> None:
    """The digest at the end is made right each time, so that all parsing behind it is reached."""
    base = _write(tmp_path / "a", MODEL)
    other = _write(tmp_path / "b", _step(MODEL, 1, 0.3), {"step": "1"})
    _store(tmp_path / "c", base, other)
    draw = random.Random(4)
    refused = total = 0
    first = _write(tmp_path / "v", _step(MODEL, 1))
    path = tmp_path / "d"
    for data, target in ((stored.read_bytes(), first), ((tmp_path / "c").read_bytes(), other)):
        expected = target.path.read_bytes()
        for _ in range(6_000):
            path.write_bytes(_deep_mutation(draw, data))
            total += 1
            found = io.BytesIO()
            try:
                rebuild(DeltaFile(path, target.digest, base), found)
            except StoreDamaged:
                refused += 1
            else:
                assert found.getvalue() == expected
    assert total == 12_000
    assert refused > 0.9 * total


def test_whole_files_are_digested_and_copied_alike(tmp_path: Path, model: WholeFile) -> None:
    assert _rebuilt(model) == model.path.read_bytes()
    assert rebuild(model, None) == tensor_digests(model.path)
    assert read_header(model.path).tensors == model.tensors
