"""Merkle trees against the published vectors, an independent construction, and every proof up to 64 leaves."""

from __future__ import annotations

import hashlib
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UsageError
from pipeline.merkle import (
    EMPTY_ROOT,
    Frontier,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    merkle_root,
    node_hash,
    root_of_hashes,
    verify_consistency,
    verify_inclusion,
)

LEAVES = [
    bytes.fromhex(text)
    for text in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
]
"""Test vectors of the certificate-transparency reference implementation."""
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
"""Their roots for the first 0 … 8 leaves."""
INCLUSION = {
    (0, 8): "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7 "
    "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e "
    "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    (5, 8): "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b "
    "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0 "
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    (2, 3): "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    (1, 5): "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d "
    "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e "
    "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
}
"""Their published audit paths: (leaf counted from 0, tree size) → hashes."""
CONSISTENCY = {
    (1, 1): "",
    (1, 8): "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7 "
    "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e "
    "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    (6, 8): "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a "
    "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0 "
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    (2, 5): "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e "
    "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
}
"""Their published consistency proofs: (old size, size) → hashes."""

HASHES = [leaf_hash(i.to_bytes(2, "big")) for i in range(66)]
SIZES = range(1, 65)
TRUE_ROOTS = [root_of_hashes(HASHES[:size]) for size in range(67)]
OTHER = leaf_hash(b"not in any tree")


def _bottom_up(hashes: list[bytes]) -> bytes:
    """The same tree level by level, an odd node moving up unchanged: independent of the code under test."""
    level = list(hashes)
    while len(level) > 1:
        pairs = [level[i : i + 2] for i in range(0, len(level), 2)]
        level = [hashlib.sha256(b"\x01" + b"".join(pair)).digest() if len(pair) == 2 else pair[0] for pair in pairs]
    return level[0] if level else hashlib.sha256().digest()


def _hashes(text: str) -> tuple[bytes, ...]:
    return tuple(bytes.fromhex(part) for part in text.split())


def _spoilt(proof: tuple[bytes, ...]) -> list[tuple[bytes, ...]]:
    """Proofs that say something else: an entry changed, dropped, added, short, long, or two exchanged."""
    changed = [(*proof[:i], bytes([proof[i][0] ^ 1]) + proof[i][1:], *proof[i + 1 :]) for i in range(len(proof))]
    dropped = [proof[:i] + proof[i + 1 :] for i in range(len(proof))]
    added = [(*proof[:i], OTHER, *proof[i:]) for i in range(len(proof) + 1)]
    short = [(*proof[:-1], proof[-1][:-1])] if proof else []
    swapped = [(*proof[:i], proof[i + 1], proof[i], *proof[i + 2 :]) for i in range(len(proof) - 1)]
    return changed + dropped + added + short + swapped + [(*proof, b""), (*proof, bytes(64))]


# --- roots ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(9))
def test_roots_are_the_published_ones(count: int) -> None:
    assert merkle_root(LEAVES[:count]).hex() == ROOTS[count]


def test_the_empty_root() -> None:
    assert merkle_root([]) == root_of_hashes([]) == Frontier().root() == EMPTY_ROOT
    assert Frontier().size == 0


def test_a_leaf_is_never_a_node() -> None:
    left, right = leaf_hash(b"a"), leaf_hash(b"b")
    assert node_hash(left, right) == merkle_root([b"a", b"b"]) != leaf_hash(left + right)


@given(st.lists(st.binary(max_size=4), max_size=70))
def test_roots_equal_an_independent_construction(leaves: list[bytes]) -> None:
    assert merkle_root(leaves) == _bottom_up([hashlib.sha256(b"\x00" + leaf).digest() for leaf in leaves])


@given(st.lists(st.binary(min_size=32, max_size=32), max_size=70))
def test_a_frontier_has_the_root_at_every_size(hashes: list[bytes]) -> None:
    frontier = Frontier()
    for size, hash_ in enumerate(hashes, 1):
        frontier.append(hash_)
        assert frontier.size == size
        assert frontier.root() == _bottom_up(hashes[:size])
        assert frontier.root() == frontier.root()  # asking changes nothing


# --- proofs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("index", "size"), INCLUSION)
def test_inclusion_proofs_are_the_published_ones(index: int, size: int) -> None:
    hashes = [leaf_hash(leaf) for leaf in LEAVES[:size]]
    proof = inclusion_proof(hashes, index)
    assert proof == _hashes(INCLUSION[index, size])
    assert verify_inclusion(hashes[index], index, size, proof, bytes.fromhex(ROOTS[size]))


@pytest.mark.parametrize(("old_size", "size"), CONSISTENCY)
def test_consistency_proofs_are_the_published_ones(old_size: int, size: int) -> None:
    proof = consistency_proof([leaf_hash(leaf) for leaf in LEAVES[:size]], old_size)
    assert proof == _hashes(CONSISTENCY[old_size, size])
    assert verify_consistency(old_size, bytes.fromhex(ROOTS[old_size]), size, bytes.fromhex(ROOTS[size]), proof)


@pytest.mark.parametrize("size", SIZES)
def test_every_inclusion_proof_holds_and_no_changed_one(size: int) -> None:
    root = TRUE_ROOTS[size]
    for index in range(size):
        leaf, proof = HASHES[index], inclusion_proof(HASHES[:size], index)
        assert len(proof) <= (size - 1).bit_length()
        assert verify_inclusion(leaf, index, size, proof, root)
        assert not any(verify_inclusion(other, index, size, proof, root) for other in HASHES if other != leaf)
        assert not verify_inclusion(leaf[:-1], index, size, proof, root)
        assert not any(verify_inclusion(leaf, index, size, proof, r) for r in TRUE_ROOTS if r != root)
        assert not any(verify_inclusion(leaf, i, size, proof, root) for i in range(-1, size + 2) if i != index)
        # Another size is bound to another root, as a checkpoint binds them.
        assert not any(verify_inclusion(leaf, index, n, proof, TRUE_ROOTS[n]) for n in range(67) if n != size)
        assert not any(verify_inclusion(leaf, index, size, spoilt, root) for spoilt in _spoilt(proof))


@pytest.mark.parametrize("size", SIZES)
def test_every_consistency_proof_holds_and_no_changed_one(size: int) -> None:
    root = TRUE_ROOTS[size]
    for old_size in range(1, size + 1):
        old_root, proof = TRUE_ROOTS[old_size], consistency_proof(HASHES[:size], old_size)
        assert len(proof) <= (size - 1).bit_length() + 1
        assert verify_consistency(old_size, old_root, size, root, proof)
        for other in (*TRUE_ROOTS, OTHER, b"", root[:-1]):
            assert other == old_root or not verify_consistency(old_size, other, size, root, proof)
            assert other == root or not verify_consistency(old_size, old_root, size, other, proof)
        for other_size in range(-1, 67):
            if other_size != old_size:
                assert not verify_consistency(other_size, old_root, size, root, proof)
            if other_size not in (old_size, 0):  # the empty tree: see below
                assert not verify_consistency(other_size, TRUE_ROOTS[other_size], size, root, proof)
            if other_size != size:
                assert not verify_consistency(old_size, old_root, other_size, TRUE_ROOTS[other_size], proof)
        assert not any(verify_consistency(old_size, old_root, size, root, spoilt) for spoilt in _spoilt(proof))


def test_a_rewritten_entry_breaks_consistency() -> None:
    for size in SIZES:
        for old_size in range(1, size + 1):
            rewritten = [OTHER, *HASHES[1:size]]
            proof = consistency_proof(rewritten, old_size)
            assert not verify_consistency(old_size, TRUE_ROOTS[old_size], size, root_of_hashes(rewritten), proof)


def test_every_tree_continues_the_empty_one() -> None:
    assert consistency_proof([], 0) == consistency_proof(HASHES, 0) == ()
    assert verify_consistency(0, EMPTY_ROOT, 5, TRUE_ROOTS[5], ())
    assert verify_consistency(0, EMPTY_ROOT, 0, EMPTY_ROOT, ())
    assert not verify_consistency(0, OTHER, 5, TRUE_ROOTS[5], ())
    assert not verify_consistency(0, EMPTY_ROOT, 5, TRUE_ROOTS[5], (OTHER,))
    assert not verify_consistency(0, EMPTY_ROOT, 0, TRUE_ROOTS[5], ())


@given(
    st.integers(-2, 9), st.integers(-2, 9), st.lists(st.binary(max_size=33) | st.sampled_from(HASHES[:9]), max_size=9)
)
def test_arbitrary_proofs_are_answered_with_no(first: int, second: int, proof: list[bytes]) -> None:
    assert not verify_inclusion(OTHER, first, second, proof, TRUE_ROOTS[8])
    assert not verify_consistency(first, OTHER, second, TRUE_ROOTS[8], proof)


def test_bytes_cannot_move_between_two_hashes() -> None:
    """A node does not say where its left child ends; only the lengths do."""
    left, right = HASHES[:2]
    root = TRUE_ROOTS[2]
    assert node_hash(left[:31], left[31:] + right) == root
    assert not verify_inclusion(left[:31], 0, 2, [left[31:] + right], root)
    assert not verify_consistency(1, left[:31], 2, root, [left[31:] + right])


@pytest.mark.timeout(10)
def test_an_endless_size_ends() -> None:
    assert not verify_inclusion(OTHER, 0, 1 << 10_000, [OTHER] * 100, OTHER)
    assert not verify_consistency((1 << 10_000) - 1, OTHER, 1 << 10_001, OTHER, [OTHER] * 100)


@pytest.mark.parametrize("index", [-1, 3, 4])
def test_there_is_no_proof_of_a_leaf_that_is_not_there(index: int) -> None:
    with pytest.raises(UsageError, match=rf"leaf {index}: the tree has 3 leaves"):
        inclusion_proof(HASHES[:3], index)


@pytest.mark.parametrize("old_size", [-1, 4])
def test_there_is_no_proof_from_a_larger_tree(old_size: int) -> None:
    with pytest.raises(UsageError, match=rf"size {old_size}: the tree has only 3 leaves"):
        consistency_proof(HASHES[:3], old_size)


def test_long_logs() -> None:
    """100,000 entries: no recursion, and time that grows with the log, not with its square."""
    count = 100_000
    hashes = [leaf_hash(i.to_bytes(4, "big")) for i in range(count)]
    started = time.process_time()
    frontier = Frontier()
    for hash_ in hashes:
        frontier.append(hash_)
    root = frontier.root()
    inclusion, consistency = inclusion_proof(hashes, 77_777), consistency_proof(hashes, 99_999)
    spent = time.process_time() - started
    assert verify_inclusion(hashes[77_777], 77_777, count, inclusion, root)
    assert verify_consistency(99_999, root_of_hashes(hashes[:-1]), count, root, consistency)
    assert len(inclusion) == 17 and len(consistency) <= 18
    assert spent < 10  # about 0.3 s; a quadratic pass would take minutes
