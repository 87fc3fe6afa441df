"""Segments: the candidates of datasketch, the same bytes every time, and no trust in a file that was touched."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasketch import LeanMinHash, MinHashLSH
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pipeline import segments
from pipeline.errors import NoSpace, StoreDamaged
from pipeline.files import canonical_json
from pipeline.segments import (
    PAGE_BYTES,
    Segment,
    SegmentFile,
    SegmentHeader,
    Windows,
    band_keys,
    build,
    describe,
    sign_texts,
    write_segment,
)
from pipeline.shingles import DedupeParameters, shingle, sign

SMALL = DedupeParameters(num_perm=8, bands=4, rows=2)


def windows_of(values: list[list[list[int]]], num_perm: int) -> Windows:
    """Windows from the signatures of each text."""
    flat = [row for text in values for row in text]
    signatures = np.array(flat, dtype=np.uint32).reshape(len(flat), num_perm)
    owners = np.repeat(np.arange(len(values)), [len(text) for text in values])
    return Windows(signatures, owners, len(values))


def segment_of(windows: Windows, parameters: DedupeParameters = SMALL) -> Segment:
    """A segment whose work i has the place 3 * i + 1 and the fingerprints from 10 * i on."""
    count = windows.texts
    prints = [np.arange(10 * i, 10 * i + 1 + i % 4, dtype=np.uint64) for i in range(count)]
    return build([3 * i + 1 for i in range(count)], prints, windows, parameters)


def drawn(count: int, seed: int = 0, values: int = 6) -> Windows:
    """Windows of some works with so few different values that many keys are the same."""
    rng = np.random.default_rng(seed)
    return windows_of([rng.integers(0, values, (1 + i % 3, 8)).tolist() for i in range(count)], 8)


def pairs(segment: Segment, windows: Windows, parameters: DedupeParameters = SMALL) -> list[tuple[int, int]]:
    texts, works = segment.candidates(windows, parameters)
    return list(zip(texts.tolist(), works.tolist(), strict=True))


# --- the search -------------------------------------------------------------------------------------------

TEXTS = st.lists(
    st.lists(st.lists(st.sampled_from([0, 1, 2, 2**32 - 1]), min_size=8, max_size=8), max_size=3), max_size=6
)


@given(TEXTS, TEXTS, st.sampled_from([(4, 2), (2, 4), (8, 1), (2, 3)]))
@hypothesis_settings(max_examples=200, deadline=None)
def test_candidates_are_those_of_datasketch(
    works: list[list[list[int]]], texts: list[list[list[int]]], shape: tuple[int, int]
) -> None:
    bands, rows = shape
    parameters = DedupeParameters(num_perm=8, bands=bands, rows=rows)
    lsh = MinHashLSH(num_perm=8, params=shape)
    for work, of_work in enumerate(works):
        for number, row in enumerate(of_work):
            lsh.insert((work, number), _lean(row))
    expected = sorted({(i, work) for i, text in enumerate(texts) for row in text for work, _ in lsh.query(_lean(row))})
    segment = segment_of(windows_of(works, 8), parameters)
    assert pairs(segment, windows_of(texts, 8), parameters) == expected


def _lean(row: list[int]) -> LeanMinHash:
    return LeanMinHash(seed=1, hashvalues=np.array(row, dtype=np.uint32), scheme="affine32")


@given(st.lists(st.lists(st.integers(0, 2**32 - 1), min_size=8, max_size=8), max_size=30), st.sampled_from([1, 2, 3]))
@hypothesis_settings(max_examples=100, deadline=None)
def test_keys_are_equal_where_the_rows_are(rows: list[list[int]], size: int) -> None:
    rows += [row[:size] + [0] * (8 - size) for row in rows]  # the first band again, beside other ones
    parameters = DedupeParameters(num_perm=8, bands=2, rows=size)
    keys = band_keys(np.array(rows, dtype=np.uint32).reshape(-1, 8), parameters)
    for band in range(2):
        said = [tuple(row[band * size : (band + 1) * size]) for row in rows]
        assert len(set(zip(said, keys[band].tolist(), strict=True))) == len(set(said)) == len(set(keys[band].tolist()))


@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 3), max_size=50))
def test_the_order_is_stable(keys: list[int]) -> None:
    values = np.array(keys, dtype=np.uint64)
    assert segments._order(values).tolist() == np.argsort(values, kind="stable").tolist()


def test_a_key_that_all_windows_share_is_expanded_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = windows_of([[[7] * 8] * (1 + i % 3) for i in range(40)], 8)
    segment = segment_of(windows)
    whole = pairs(segment, windows)
    assert whole == [(text, work) for text in range(40) for work in range(40)]
    monkeypatch.setattr(segments, "PAIRS_AT_ONCE", 50)
    assert pairs(segment, windows) == whole


def test_nothing_in_nothing() -> None:
    empty = windows_of([], 8)
    assert pairs(segment_of(empty), drawn(5)) == []
    assert pairs(segment_of(drawn(5)), empty) == []
    assert pairs(segment_of(windows_of([[], []], 8)), drawn(5)) == []


def test_texts_are_signed_together_as_one_by_one() -> None:
    parameters = DedupeParameters()
    raw = ["one two three four five", "", "so it goes " * 100, "一二三四五六七八九十"]
    texts = [shingle(text, parameters) for text in raw]
    signed = sign_texts(texts, parameters)
    assert signed.texts == 4 and len(signed.of(1)) == 0
    for number, text in enumerate(texts):
        assert np.array_equal(signed.of(number), sign(text.windows(parameters), parameters))


# --- the file ---------------------------------------------------------------------------------------------


def write(folder: Path, segment: Segment, parameters: DedupeParameters = SMALL) -> Path:
    folder.mkdir(exist_ok=True)
    return write_segment(folder, segment, describe(segment, parameters, 1, 2, "sha256:chain"))


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    windows = drawn(9)
    segment = segment_of(windows)
    path = write(tmp_path, segment)
    file = SegmentFile(path, SMALL)
    header = file.header
    assert (header.first, header.last, header.removed, header.chain) == (1, 25, 2, "sha256:chain")
    assert (header.works, header.windows, header.prints) == (9, 18, sum(1 + i % 4 for i in range(9)))
    found = file.read()
    for name in ("positions", "ends", "prints", "keys", "owners"):
        assert np.array_equal(getattr(found, name), getattr(segment, name)), name
        assert not getattr(found, name).flags.writeable
    assert [found.prints_of(i).tolist() for i in range(3)] == [[0], [10, 11], [20, 21, 22]]
    assert pairs(found, drawn(20, seed=1)) == pairs(segment, drawn(20, seed=1)) != []
    assert file.read() is found, "checked once"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "nothing is left behind"


def test_the_same_works_give_the_same_bytes(tmp_path: Path) -> None:
    windows = windows_of([[[(5 * i + 3 * j) % 7 for j in range(8)]] * (1 + i % 2) for i in range(9)], 8)
    paths = [write(tmp_path / name, segment_of(windows)) for name in ("a", "b")]
    assert paths[0].name == paths[1].name
    assert paths[0].read_bytes() == paths[1].read_bytes()
    # Golden: another digest is another format, and needs a new number in it.
    assert SegmentFile(paths[0], SMALL).header.digest == GOLDEN


GOLDEN = "52b77d78bfc69ddd22f1169a5c43dfe95ddb8aecbc061110a37ab8b31b348a25"


def test_every_flipped_byte_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, segment_of(drawn(3)))
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        with pytest.raises(StoreDamaged, match=r"\.seg: .* Nothing is lost: delete it"):
            SegmentFile(path, SMALL).read()
    path.write_bytes(data)
    SegmentFile(path, SMALL).read()


@pytest.mark.parametrize("change", [-1, -8, -100, 1, 8, 4096])
def test_another_length_is_refused_when_it_is_opened(tmp_path: Path, change: int) -> None:
    path = write(tmp_path, segment_of(drawn(3)))
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + bytes(change))
    with pytest.raises(StoreDamaged, match="another number than its header says"):
        SegmentFile(path, SMALL)


@pytest.mark.parametrize("size", [0, 1, 43, 44, 300, PAGE_BYTES - 1])
def test_a_cut_header_is_refused(tmp_path: Path, size: int) -> None:
    path = write(tmp_path, segment_of(drawn(3)))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(StoreDamaged, match="shorter than its header"):
        SegmentFile(path, SMALL)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreDamaged, match="is missing"):
        SegmentFile(tmp_path / "none.seg", SMALL)
    os.mkfifo(tmp_path / "pipe.seg")
    for path in (tmp_path, tmp_path / "pipe.seg"):
        with pytest.raises(StoreDamaged, match="is not a regular file"):
            SegmentFile(path, SMALL)


def test_other_parameters_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, segment_of(drawn(3)))
    for other in ({"seed": 2}, {"bands": 2}, {"shingle_words": 10}):
        with pytest.raises(StoreDamaged, match="other parameters"):
            SegmentFile(path, SMALL.model_copy(update=other))


def forged(path: Path, segment: Segment, header: dict[str, Any] | bytes) -> Path:
    """A file with all digests right, by whoever knows the format."""
    data = header if isinstance(header, bytes) else canonical_json(header)
    start = segments._PREFIX.pack(segments.MAGIC, len(data), hashlib.sha256(data).digest()) + data
    path.write_bytes(start + bytes(PAGE_BYTES - len(start)) + b"".join(segments._arrays(segment)))
    return path


def _with(field: str, at: Any, value: int) -> Segment:
    segment = segment_of(drawn(5))
    changed = getattr(segment, field).copy()
    changed[at] = value
    return Segment(**{name: getattr(segment, name) for name in Segment.__dataclass_fields__} | {field: changed})


@pytest.mark.parametrize(
    ("field", "at", "value"),
    [
        ("owners", (2, 3), 5),
        ("owners", (0, 0), 2**32 - 1),
        ("keys", (1, 0), 2**64 - 1),
        ("ends", 0, 0),
        ("ends", 1, -1),
        ("ends", 2, 2**62),
        ("ends", -1, 2**40),
        ("prints", 1, 2**63),
        ("positions", 0, 0),
        ("positions", 2, 2),
        ("positions", 1, -(2**63)),
    ],
    ids=str,
)
def test_arrays_that_contradict_each_other_are_refused_whatever_their_digest(
    tmp_path: Path, field: str, at: Any, value: int
) -> None:
    segment = _with(field, at, value)
    path = write_segment(tmp_path, segment, describe(segment, SMALL, 1, 0, "sha256:"))
    with pytest.raises(StoreDamaged, match="does not write"):
        SegmentFile(path, SMALL).read()


@pytest.mark.parametrize(
    "change",
    [
        {"works": 0}, {"works": -1}, {"works": 2**70}, {"works": "5"}, {"works": 5.0}, {"windows": 2**39},
        {"prints": 2**39}, {"format": 2}, {"more": 1}, {"digest": None}, {"first": 0}, {"last": 10**30},
    ],
    ids=str,
)  # fmt: skip
def test_headers_that_say_what_is_not_so_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    segment = segment_of(drawn(5))
    header = describe(segment, SMALL, 1, 0, "sha256:").model_dump() | change
    with pytest.raises(StoreDamaged):
        SegmentFile(forged(tmp_path / "x.seg", segment, header), SMALL)


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"nul", b"\xff\xfe", b"[" * 4000, b'{"works":NaN}'], ids=repr)
def test_headers_that_are_none_are_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(StoreDamaged, match="no header of this product"):
        SegmentFile(forged(tmp_path / "x.seg", segment_of(drawn(5)), data), SMALL)


def test_a_header_has_one_spelling(tmp_path: Path) -> None:
    segment = segment_of(drawn(5))
    data = b" " + canonical_json(describe(segment, SMALL, 1, 0, "sha256:").model_dump())
    with pytest.raises(StoreDamaged, match="this product does not write"):
        SegmentFile(forged(tmp_path / "x.seg", segment, data), SMALL)


@given(st.binary(max_size=200), st.integers(0, 5000))
@hypothesis_settings(max_examples=100, deadline=None)
def test_any_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes, zeros: int) -> None:
    path = tmp_path_factory.mktemp("any") / "x.seg"
    for start in (b"", segments.MAGIC):
        path.write_bytes(start + data + bytes(zeros))
        with pytest.raises(StoreDamaged):
            SegmentFile(path, SMALL).read()


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(NoSpace):
        write(tmp_path, segment_of(drawn(3)))
    assert list(tmp_path.iterdir()) == []


def test_the_header_of_a_whole_shelf_fits() -> None:
    """The largest numbers still leave the header inside its page."""
    most = SegmentHeader(
        parameters="sha256:" + "0" * 64, first=2**63 - 1, last=2**63 - 1, removed=2**63 - 1, chain="sha256:" + "0" * 64,
        works=2**32 - 1, windows=2**40 - 1, prints=2**40 - 1, digest="0" * 64,
    )  # fmt: skip
    assert segments._padding(most) > 3000
