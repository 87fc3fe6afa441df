"""The shingles of all works at once: what a corpus is compared with.

In: works by name. Out: sorted arrays that processes can share, and which shingles of a text are in them. Never: a text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import ClassVar, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from pipeline.files import digest_bytes, digest_json
from pipeline.shingles import DedupeParameters, Prints, shingle_many

Integers: TypeAlias = npt.NDArray[np.int64]
Places: TypeAlias = npt.NDArray[np.int32]
Bytes: TypeAlias = npt.NDArray[np.uint8]

CORPUS_PARAMETERS: Final = DedupeParameters(shingle_words=10, shingle_characters=24)
"""Ten words in a row, which unrelated texts practically never share; 24 characters in scripts without spaces are about
as many words' worth."""
_SPARSE = 16
"""Bits of the filter per fingerprint: one in 16 foreign shingles goes on to the exact search."""
_TOGETHER = 256
"""Works whose words are in memory together."""
_LOOKED_AT = 64
"""Owners of a shingle that are looked at to tell boilerplate from copies of one work."""
_SAMPLE = 64
"""Shingles of a work that stand for it then: those with the smallest fingerprints, which is a random sample."""


@dataclass(frozen=True)
class FingerprintSet:
    """The shingles of all works.

    Attributes:
        names: The works.
        sizes: (works,) distinct shingles of each that count.
        keys: (n,) fingerprints of all works, sorted, each once.
        first: (n + 1,) where the owners of each key begin.
        owners: Works, as places in ``names``, of each key in turn, rising.
        bits: Filter: bit p is set when a key begins with the bits p. It has a power of two of bits.
        short: Whether a work is shorter than a shingle, so that whole short documents must be compared.
    """

    names: tuple[str, ...]
    sizes: Integers
    keys: Prints
    first: Integers
    owners: Places
    bits: Bytes
    short: bool

    ARRAYS: ClassVar = ("sizes", "keys", "first", "owners", "bits")

    @classmethod
    def of(
        cls, works: Iterable[tuple[str, str]], boilerplate: Sequence[str] = (), most_works: int | None = None
    ) -> FingerprintSet:
        """The set of some works.

        Args:
            works: Names and texts. A text without words, or of boilerplate only, is never found.
            boilerplate: Texts that are nobody's, such as licences: their shingles do not count.
            most_works: Neither do shingles of more unrelated works than this; None: all count.
        """
        names: list[str] = []
        prints: list[Prints] = []
        short = False
        waiting = iter(works)
        while some := list(islice(waiting, _TOGETHER)):
            names += [name for name, _ in some]
            for text in shingle_many([text for _, text in some], CORPUS_PARAMETERS):
                prints.append(text.prints)
                short |= len(text.sequence) == 1
        listed = [text.prints for text in shingle_many(boilerplate, CORPUS_PARAMETERS)]
        ignored = np.unique(np.concatenate([*listed, np.empty(0, np.uint64)]))
        if most_works is not None:
            ignored = np.union1d(ignored, _common(prints, most_works))
        prints = [np.setdiff1d(p, ignored, assume_unique=True) for p in prints]
        keys, first, owners = _inverted(prints)
        sizes = np.array([len(p) for p in prints], dtype=np.int64)
        return cls(tuple(names), sizes, keys, first, owners, _filter(keys), short)

    @cached_property
    def digest(self) -> str:
        """Digest of the works' names and shingles."""
        return digest_json([list(self.names), *(digest_bytes(getattr(self, name).tobytes()) for name in self.ARRAYS)])

    def find(self, sequence: Prints) -> tuple[Integers, Integers]:
        """Which shingles of a sequence are in the set.

        Returns:
            Their places in the sequence, rising, and the place of each in ``keys``.
        """
        if not len(self.keys):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        slots = sequence >> _shift(self.bits)
        likely = np.flatnonzero(self.bits[slots >> np.uint64(3)] >> (slots & np.uint64(7)).astype(np.uint8) & 1)
        # In rising order the searches go through memory in one direction: less than half the time in a large set.
        order = np.argsort(sequence[likely])
        wanted = sequence[likely[order]]
        found = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        real = np.flatnonzero(self.keys[found] == wanted)
        real = real[np.argsort(order[real])]
        return likely[order[real]], found[real]


def _inverted(prints: Sequence[Prints]) -> tuple[Prints, Integers, Places]:
    """Sorted fingerprints of all works, and the works that own each: see `FingerprintSet`."""
    every = np.concatenate([*prints, np.empty(0, np.uint64)])
    order = np.argsort(every, kind="stable")
    keys, first = np.unique(every[order], return_index=True)
    owners = np.repeat(np.arange(len(prints), dtype=np.int32), [len(p) for p in prints])[order]
    return keys, np.append(first, len(every)), owners


def _filter(keys: Prints) -> Bytes:
    """The bits of `FingerprintSet.bits`."""
    width = max(16, (_SPARSE * len(keys)).bit_length())
    bits = np.zeros(1 << (width - 3), np.uint8)
    slots = keys >> _shift(bits)
    np.bitwise_or.at(bits, slots >> np.uint64(3), np.uint8(1) << (slots & np.uint64(7)).astype(np.uint8))
    return bits


def _shift(bits: Bytes) -> np.uint64:
    """By how many bits a fingerprint is shifted to be a place in the filter."""
    return np.uint64(64 - (len(bits).bit_length() + 2))


def _common(prints: Sequence[Prints], most_works: int) -> Prints:
    """Sorted shingles of more than so many unrelated works.

    Copies and pieces of one work count once. Of a shingle's owners only the first `_LOOKED_AT` are looked at: where
    those are all copies of one work, it stays evidence.
    """
    keys, first, owners = _inverted(prints)
    if len(prints) <= most_works:
        return keys[:0]
    representatives: list[int] = []
    groups: dict[int, int] = {}
    verdicts: dict[bytes, bool] = {}
    frequent = np.flatnonzero(np.diff(first) > most_works)
    common = np.zeros(len(frequent), np.bool_)
    for at, key in enumerate(frequent.tolist()):
        some = owners[first[key] : first[key + 1]][:_LOOKED_AT]
        verdict = verdicts.get(some.tobytes())
        if verdict is None:
            for work in some.tolist():
                if work not in groups:
                    groups[work] = _group(work, representatives, prints)
            verdict = verdicts[some.tobytes()] = len({groups[work] for work in some.tolist()}) > most_works
        common[at] = verdict
    return keys[frequent[common]]


def _group(work: int, representatives: list[int], prints: Sequence[Prints]) -> int:
    """The first work seen that this one is a copy of, a piece of, or has as a piece; itself where there is none."""
    for other in representatives:
        few, many = sorted((prints[work], prints[other]), key=len)
        sample = few[:_SAMPLE]
        shared = np.searchsorted(many, sample, "right") - np.searchsorted(many, sample)
        if 2 * int(shared.sum()) >= len(sample):
            return other
    representatives.append(work)
    return work
