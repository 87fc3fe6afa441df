"""Whole-or-absent writes, names that are never taken over, canonical JSON, and the root of a set of tensors."""

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

from pipeline.digests import TensorDigest, prove_tensor, tensor_leaf, tensor_root
from pipeline.errors import NoSpace, StoreDamaged
from pipeline.files import (
    NO_HARD_LINKS,
    TEMPORARY,
    canonical_json,
    digest_bytes,
    digest_file,
    link_or_not,
    make_folder,
    place,
    put_in_place,
    read_json,
    remove,
    seal,
    temporary,
    write_atomic,
    write_json,
    write_new,
)
from pipeline.merkle import leaf_hash, merkle_root, verify_inclusion

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


def test_write_new_sets_content_and_mode_and_replaces_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_new(path, b"one")
    assert path.read_bytes() == b"one" and stat.S_IMODE(path.stat().st_mode) == 0o444
    with pytest.raises(FileExistsError):
        write_new(path, b"two")
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "link", "fchmod"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_write_new_on_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    def full(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(NoSpace, match="run the same command again"):
        write_new(tmp_path / "a", b"one")
    assert list(tmp_path.iterdir()) == []


def test_write_new_reads_back_before_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def losing(fd: int) -> None:
        fsync(fd)
        os.pwrite(fd, b"X", 0)

    monkeypatch.setattr(os, "fsync", losing)
    with pytest.raises(StoreDamaged, match="reads back differently"):
        write_new(tmp_path / "a", b"one")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("hard_links", [True, False])
def test_place_never_takes_a_name_that_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard_links: bool
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not hard_links:
        monkeypatch.setattr(os, "link", refuse)
    target = tmp_path / "a"
    for content, taken in ((b"one", False), (b"two", True)):
        with temporary(tmp_path) as (written, stream):
            assert written.name.startswith(TEMPORARY) and written.parent == tmp_path
            stream.write(content)
            seal(stream, 0o444)
            if taken:
                with pytest.raises(FileExistsError):
                    place(written, target)
            else:
                place(written, target)
    assert target.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [target]


def test_put_in_place_takes_the_name_over(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"two")
    put_in_place(tmp_path / "b", tmp_path / "a")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"two")]


@pytest.mark.parametrize("code", sorted(NO_HARD_LINKS))
def test_link_or_not_tells_where_there_are_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    (tmp_path / "a").write_bytes(b"one")
    assert link_or_not(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").samefile(tmp_path / "b")
    with pytest.raises(FileExistsError):
        link_or_not(tmp_path / "a", tmp_path / "b")

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    assert not link_or_not(tmp_path / "a", tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_folders_are_made_once_and_files_removed_once(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    make_folder(folder, 0o700)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    make_folder(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700, "one that is there stays as it is"
    (folder / "x").write_bytes(b"")
    remove(folder / "x")
    remove(folder / "x")
    assert list(folder.iterdir()) == []


def test_other_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "absent" / "a", b"")


def test_read_json_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(StoreDamaged, match="is missing"):
        read_json(tmp_path / "a")
    for content in ("{", "", "[" * 100_000):
        (tmp_path / "a").write_text(content)
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


# --- the root of a set of tensors -------------------------------------------------------------------------

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


@given(TENSORS)
def test_tensor_root_is_the_tree_over_the_tensors_by_name(tensors: list[TensorDigest]) -> None:
    leaves = [tensor_leaf(tensor) for tensor in sorted(tensors, key=lambda tensor: tensor.name)]
    assert tensor_root(tensors) == f"root-sha256:{merkle_root(leaves).hex()}"
    assert [json.loads(leaf) for leaf in leaves] == [
        [t.name, t.dtype, list(t.shape), t.sha256] for t in sorted(tensors, key=lambda tensor: tensor.name)
    ]


@given(TENSORS.filter(len), st.data())
def test_any_one_tensor_can_be_proved(tensors: list[TensorDigest], data: st.DataObject) -> None:
    chosen = data.draw(st.sampled_from(tensors))
    root = bytes.fromhex(tensor_root(tensors).removeprefix("root-sha256:"))
    proof = prove_tensor(tensors, chosen.name)
    assert proof is not None
    assert json.loads(proof.leaf)[0] == chosen.name
    assert verify_inclusion(leaf_hash(proof.leaf), proof.index, proof.size, proof.proof, root)
    assert not verify_inclusion(leaf_hash(proof.leaf + b" "), proof.index, proof.size, proof.proof, root)
    assert prove_tensor(tensors, chosen.name + "x" * 50) is None
