"""Whole-or-absent writes, canonical JSON, and the Merkle tree against RFC 6962."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.digests import TensorDigest, merkle_root, tensor_root
from pipeline.errors import NoSpace, StoreDamaged
from pipeline.files import canonical_json, digest_bytes, digest_file, read_json, write_atomic, write_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


def test_write_atomic_sets_content_and_mode_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_atomic(path, b"one", mode=0o600)
    write_atomic(path, b"two", mode=0o444)
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace", "fchmod"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_full_disk_leaves_the_target_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    path = tmp_path / "a"
    write_atomic(path, b"one")

    def full(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(NoSpace, match="run the same command again"):
        write_atomic(path, b"two")
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_other_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "absent" / "a", b"")


def test_read_json_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(StoreDamaged, match="is missing"):
        read_json(tmp_path / "a")
    (tmp_path / "a").write_text("{")
    with pytest.raises(StoreDamaged, match="is not JSON"):
        read_json(tmp_path / "a")


@given(JSON)
def test_canonical_json_has_json_loads_as_its_inverse(value: object) -> None:
    data = canonical_json(value)
    assert json.loads(data) == value
    assert canonical_json(json.loads(data)) == data


def test_write_json_is_canonical_with_a_newline(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"b": 1, "a": "é"})
    assert (tmp_path / "a").read_bytes() == b'{"a":"\\u00e9","b":1}\n'
    assert read_json(tmp_path / "a") == {"a": "é", "b": 1}


def test_digest_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    data = b"x" * (2 * (1 << 20) + 7)
    (tmp_path / "a").write_bytes(data)
    assert digest_file(tmp_path / "a") == digest_bytes(data) == f"sha256:{hashlib.sha256(data).hexdigest()}"


# --- RFC 6962 ---------------------------------------------------------------------------------------------

LEAVES = [
    bytes.fromhex(leaf)
    for leaf in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
]
"""The leaves of the test vectors of the Certificate Transparency reference implementation (merkle_tree_test.cc)."""
ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
"""Their published roots for the first 0 … 8 leaves."""


def _bottom_up(leaves: list[bytes]) -> bytes:
    """The same tree level by level, an odd node moving up unchanged: independent of the recursion under test."""
    level = [hashlib.sha256(b"\x00" + leaf).digest() for leaf in leaves]
    while len(level) > 1:
        pairs = [level[i : i + 2] for i in range(0, len(level), 2)]
        level = [hashlib.sha256(b"\x01" + b"".join(pair)).digest() if len(pair) == 2 else pair[0] for pair in pairs]
    return level[0] if level else hashlib.sha256().digest()


@pytest.mark.parametrize("count", range(9))
def test_merkle_root_gives_the_published_vectors(count: int) -> None:
    assert merkle_root(LEAVES[:count]).hex() == ROOTS[count]


@given(st.lists(st.binary(max_size=4), max_size=70))
def test_merkle_root_equals_an_independent_construction(leaves: list[bytes]) -> None:
    assert merkle_root(leaves) == _bottom_up(leaves)


DIGESTS = st.builds(
    TensorDigest,
    name=st.text(max_size=5),
    dtype=st.sampled_from(["F32", "BF16"]),
    shape=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    sha256=st.binary(min_size=32, max_size=32).map(bytes.hex),
)
TENSORS = st.lists(DIGESTS, max_size=8, unique_by=lambda tensor: tensor.name)


@given(TENSORS, st.randoms(use_true_random=False))
def test_tensor_root_does_not_depend_on_order(tensors: list[TensorDigest], random: object) -> None:
    shuffled = list(tensors)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert tensor_root(shuffled) == tensor_root(tensors)


@given(TENSORS.filter(len), st.data())
def test_tensor_root_depends_on_every_field(tensors: list[TensorDigest], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(tensors) - 1))
    one = tensors[at]
    changed = data.draw(
        st.sampled_from(
            [
                one._replace(name=one.name + "x"),
                one._replace(dtype="F64"),
                one._replace(shape=(*one.shape, 1)),
                one._replace(sha256=f"{int(one.sha256, 16) ^ 1:064x}"),
            ]
        )
    )
    assert tensor_root([*tensors[:at], changed, *tensors[at + 1 :]]) != tensor_root(tensors)
    assert tensor_root(tensors[:at] + tensors[at + 1 :]) != tensor_root(tensors)
