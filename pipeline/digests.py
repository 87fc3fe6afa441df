"""Identity of weights: a Merkle root over all tensors, independent of how they are laid out in files.

Leaves follow RFC 6962 (section 2.1): H(0x00 ‖ leaf), nodes H(0x01 ‖ left ‖ right), split at the largest
power of two below n. A leaf is the canonical JSON of (name, dtype, shape, SHA-256 of the raw little-endian bytes),
sorted by name. safetensors headers are not byte-reproducible, so files are no identity.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.files import canonical_json
from pipeline.merkle import inclusion_proof, leaf_hash, merkle_root


class TensorDigest(NamedTuple):
    """Name, safetensors dtype code (``F32``, ``BF16`` …), shape and hex SHA-256 of one tensor's bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str


def tensor_root(tensors: Iterable[TensorDigest]) -> str:
    """The identity of a set of tensors as ``root-sha256:<hex>``; the order given does not matter."""
    return f"root-sha256:{merkle_root([tensor_leaf(t) for t in sorted(tensors)]).hex()}"


@dataclass(frozen=True)
class TensorProof:
    """That one tensor is among those of a root, without the others (RFC 6962 section 2.1.1).

    Attributes:
        leaf: The tensor as a leaf: canonical JSON of name, dtype, shape and SHA-256 of its bytes.
        index: Place of the leaf, sorted by name.
        size: Number of tensors.
        proof: Hashes on the way to the root, lowest first.
    """

    leaf: bytes
    index: int
    size: int
    proof: tuple[bytes, ...]


def prove_tensor(tensors: Iterable[TensorDigest], name: str) -> TensorProof | None:
    """The proof of one tensor; None where there is none of this name. `merkle.verify_inclusion` checks it."""
    ordered = sorted(tensors)
    index = next((i for i, tensor in enumerate(ordered) if tensor.name == name), None)
    if index is None:
        return None
    hashes = [leaf_hash(tensor_leaf(tensor)) for tensor in ordered]
    return TensorProof(tensor_leaf(ordered[index]), index, len(ordered), inclusion_proof(hashes, index))


def tensor_leaf(tensor: TensorDigest) -> bytes:
    """One tensor as a leaf of the root."""
    return canonical_json([tensor.name, tensor.dtype, list(tensor.shape), tensor.sha256])
