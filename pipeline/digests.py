"""Identity of weights: a Merkle root over all tensors, independent of how they are laid out in files.

Leaves follow RFC 6962 (section 2.1): H(0x00 ‖ leaf), nodes H(0x01 ‖ left ‖ right), split at the largest
power of two below n. A leaf is the canonical JSON of (name, dtype, shape, SHA-256 of the raw little-endian bytes),
sorted by name. safetensors headers are not byte-reproducible, so files are no identity.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pipeline.files import canonical_json


class TensorDigest(NamedTuple):
    """Name, safetensors dtype code (``F32``, ``BF16`` …), shape and hex SHA-256 of one tensor's bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str


def merkle_root(leaves: Sequence[bytes]) -> bytes:
    """RFC 6962 Merkle tree hash of a list of leaves; SHA-256 of nothing for an empty list."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    split = 1 << ((len(leaves) - 1).bit_length() - 1)
    return hashlib.sha256(b"\x01" + merkle_root(leaves[:split]) + merkle_root(leaves[split:])).digest()


def tensor_root(tensors: Iterable[TensorDigest]) -> str:
    """The identity of a set of tensors as ``root-sha256:<hex>``; the order given does not matter."""
    leaves = [canonical_json([t.name, t.dtype, list(t.shape), t.sha256]) for t in sorted(tensors)]
    return f"root-sha256:{merkle_root(leaves).hex()}"
