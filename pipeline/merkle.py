"""Merkle trees of RFC 6962: one digest for a list, short proofs about its entries and about its growth.

In: leaves or their hashes (32 bytes each). Out: roots, proofs, and yes or no on a proof. Never: storage, signatures.

H is SHA-256. A leaf hashes to H(0x00 ‖ leaf), a node to H(0x01 ‖ left ‖ right); a list of n > 1 is split at the largest
power of two below n (RFC 6962, section 2.1; unchanged in RFC 9162). The verifying functions take hostile values: every
hash has its length checked, and a proof longer than the tree is deep ends the walk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from pipeline.errors import UsageError

HASH_BYTES = 32

EMPTY_ROOT = hashlib.sha256().digest()
"""Root of a tree without leaves."""


def leaf_hash(leaf: bytes) -> bytes:
    """Hash of a leaf, 32 bytes."""
    return hashlib.sha256(b"\x00" + leaf).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Hash of a node over its two children, 32 bytes."""
    return hashlib.sha256(b"\x01" + left + right).digest()


class Frontier:
    """A growing tree, reduced to what its next root needs: the roots of its full subtrees, largest first.

    Gives the root at every size of a long log in one pass: appending costs two hashes on average, a root at most
    log2(size).

    Attributes:
        size: Leaves appended so far.
    """

    def __init__(self) -> None:
        self.size = 0
        self._peaks: list[bytes] = []

    def copy(self) -> Frontier:
        """Another one over the same leaves."""
        other = Frontier()
        other.size, other._peaks = self.size, list(self._peaks)
        return other

    def append(self, leaf_hash: bytes) -> None:
        """Add the hash of the next leaf."""
        carried = leaf_hash
        # Two subtrees of equal size become one, like the carry when a binary number is counted up.
        size = self.size
        while size & 1:
            carried = node_hash(self._peaks.pop(), carried)
            size >>= 1
        self._peaks.append(carried)
        self.size += 1

    def root(self) -> bytes:
        """Root over all leaves so far, 32 bytes."""
        if not self._peaks:
            return EMPTY_ROOT
        *larger, root = self._peaks
        for peak in reversed(larger):
            root = node_hash(peak, root)
        return root


def root_of_hashes(hashes: Sequence[bytes]) -> bytes:
    """Root over leaf hashes, 32 bytes; `EMPTY_ROOT` for none."""
    frontier = Frontier()
    for hash_ in hashes:
        frontier.append(hash_)
    return frontier.root()


def merkle_root(leaves: Sequence[bytes]) -> bytes:
    """Root over leaves, 32 bytes; `EMPTY_ROOT` for none."""
    return root_of_hashes([leaf_hash(leaf) for leaf in leaves])


def _split(size: int) -> int:
    """The largest power of two below ``size``, which is at least 2."""
    return 1 << ((size - 1).bit_length() - 1)


def inclusion_proof(hashes: Sequence[bytes], index: int) -> tuple[bytes, ...]:
    """The sibling hashes from a leaf up to the root: PATH of RFC 6962, section 2.1.1.

    Args:
        hashes: Leaf hashes of the whole tree.
        index: The leaf, counted from 0.

    Returns:
        At most ⌈log2 n⌉ hashes, the leaf's own sibling first.

    Raises:
        UsageError: There is no such leaf.
    """
    if not 0 <= index < len(hashes):
        raise UsageError(f"leaf {index}: the tree has {len(hashes)} leaves, counted from 0. Ask for one of them.")
    start, end = 0, len(hashes)
    proof = []
    while end - start > 1:
        middle = start + _split(end - start)
        if index < middle:
            proof.append(root_of_hashes(hashes[middle:end]))
            end = middle
        else:
            proof.append(root_of_hashes(hashes[start:middle]))
            start = middle
    return tuple(reversed(proof))


def consistency_proof(hashes: Sequence[bytes], old_size: int) -> tuple[bytes, ...]:
    """The hashes that show an older tree to be the start of this one: PROOF of RFC 6962, section 2.1.2.

    Args:
        hashes: Leaf hashes of the whole tree.
        old_size: Number of leaves of the older tree.

    Returns:
        At most ⌈log2 n⌉ + 1 hashes; none for an older tree that is empty or as large as this one.

    Raises:
        UsageError: The older tree would be larger than this one.
    """
    if not 0 <= old_size <= len(hashes):
        raise UsageError(f"size {old_size}: the tree has only {len(hashes)} leaves. Ask for a size up to that.")
    if old_size == 0:
        return ()
    start, end = 0, len(hashes)
    proof = []
    while end != old_size:
        middle = start + _split(end - start)
        if old_size <= middle:
            proof.append(root_of_hashes(hashes[middle:end]))
            end = middle
        else:
            proof.append(root_of_hashes(hashes[start:middle]))
            start = middle
    if start:  # otherwise what is left is the whole older tree, whose root the verifier has
        proof.append(root_of_hashes(hashes[start:end]))
    return tuple(reversed(proof))


def _are_hashes(*values: bytes) -> bool:
    return all(len(value) == HASH_BYTES for value in values)


def verify_inclusion(leaf_hash: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> bool:
    """Whether a leaf is in a tree at this place (RFC 9162, section 2.1.3.2).

    The size only tells left from right; what binds it is the root. Take both from one signed checkpoint.

    Args:
        leaf_hash: `leaf_hash` of the leaf.
        index: Its place, counted from 0.
        size: Number of leaves of the tree.
        proof: From `inclusion_proof`.
        root: Root of the tree.
    """
    if not 0 <= index < size or not _are_hashes(leaf_hash, root, *proof):
        return False
    node, last = index, size - 1
    found = leaf_hash
    for sibling in proof:
        if last == 0:
            return False
        if node & 1 or node == last:
            found = node_hash(sibling, found)
            while node and not node & 1:  # levels where the last node has no sibling and moves up unchanged
                node, last = node >> 1, last >> 1
        else:
            found = node_hash(found, sibling)
        node, last = node >> 1, last >> 1
    return last == 0 and found == root


def verify_consistency(old_size: int, old_root: bytes, size: int, root: bytes, proof: Sequence[bytes]) -> bool:
    """Whether a tree is an older one with leaves added at the end (RFC 9162, section 2.1.4.2).

    Each size is bound by its root only, as in `verify_inclusion`. The RFC leaves out an empty older tree: here, every
    tree continues it, by an empty proof.

    Args:
        old_size: Number of leaves of the older tree.
        old_root: Root of the older tree.
        size: Number of leaves of the newer tree.
        root: Root of the newer tree.
        proof: From `consistency_proof`.
    """
    if not 0 <= old_size <= size or not _are_hashes(old_root, root, *proof):
        return False
    if old_size == 0:
        return old_root == EMPTY_ROOT and not proof and (size > 0 or root == EMPTY_ROOT)
    if old_size == size:
        return old_root == root and not proof
    node, last = old_size - 1, size - 1
    while node & 1:
        node, last = node >> 1, last >> 1
    # The walk starts at the last full subtree of the older tree; if that is all of it, its root is known.
    path = [old_root, *proof] if node == 0 else proof
    if not path:
        return False
    old_found = found = path[0]
    for sibling in path[1:]:
        if last == 0:
            return False
        if node & 1 or node == last:
            old_found = node_hash(sibling, old_found)
            found = node_hash(sibling, found)
            while node and not node & 1:
                node, last = node >> 1, last >> 1
        else:
            found = node_hash(found, sibling)
        node, last = node >> 1, last >> 1
    return last == 0 and old_found == old_root and found == root
