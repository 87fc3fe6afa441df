"""Word shingles of a text and their MinHash signatures.

In: texts. Out: 64-bit fingerprints with positions, and datasketch's signatures. Never: a decision, which takes the
exact overlap (`pipeline.dedupe`); nor words or letters of a text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from pipeline.normalise import NORMALISER, Places, WordArrays, word_arrays
from pipeline.records import Record

if TYPE_CHECKING:
    from datasketch import LeanMinHash

Prints: TypeAlias = npt.NDArray[np.uint64]
Flags: TypeAlias = npt.NDArray[np.bool_]
Signatures: TypeAlias = npt.NDArray[np.uint32]
Item = TypeVar("Item", bound=Sized)

_LETTER = 0xD1342543DE82EF95
_WORD = 0xAF251AF3B0F025B5
"""Multipliers modulo 2**64 with a good lattice up to dimension eight (Steele and Vigna, "Computationally easy,
spectrally good multipliers", 2021). The shortest vector of LETTER's lattice in seven dimensions is longer than 500: no
two words of up to seven ASCII letters and digits have the same sum."""

_LETTER_INVERSE = pow(_LETTER, -1, 1 << 64)

_BLOCK = 1 << 16
"""Characters, or shingles, handled at once: what is computed with stays in the cache."""

_POWERS = 1 << 17
"""Powers kept; a word block of more letters (a text without spaces) computes its own."""

_EMPTY = 0xFFFFFFFF
"""What datasketch's signature of nothing holds."""


class DedupeParameters(Record):
    """What signatures and fingerprints depend on; an index of other parameters cannot be compared with.

    Attributes:
        normaliser: Version of `pipeline.normalise`.
        shingle_words: Words of a shingle.
        shingle_characters: Characters of a shingle that starts in a script without spaces: about as telling as
            three words; three characters would all be found in any long book.
        fingerprint: Hash of a shingle, 64 bits: `fingerprint`.
        scheme: Permutations of datasketch.
        seed: Seed of the permutations.
        num_perm: Length of a signature.
        bands: Bands of the LSH.
        rows: Rows of a band. 64 x 2 finds pairs from Jaccard 0.2 on (93 % there, 99.7 % at 0.3).
        window_shingles: Shingles of a window; about 100 words, so that 30 words in common are enough.
        window_step: Shingles from one window to the next; any stretch of half a window lies whole in one.
    """

    normaliser: Literal["v1"] = NORMALISER
    shingle_words: int = 3
    shingle_characters: int = 8
    fingerprint: Literal["words-64"] = "words-64"
    scheme: Literal["affine32"] = "affine32"
    seed: int = 1
    num_perm: int = 128
    bands: int = 64
    rows: int = 2
    window_shingles: int = 98
    window_step: int = 49


@dataclass(frozen=True)
class ShingledText:
    """A text as its shingles; shingle i starts at word i.

    Attributes:
        length: Characters of the raw text.
        spans: (words, 2) character range of each word in the raw text.
        sequence: (shingles,) fingerprint of each shingle, in order of the text.
        ends: (shingles,) index of the word after each shingle.
    """

    length: int
    spans: Places
    sequence: Prints
    ends: Places

    @cached_property
    def prints(self) -> Prints:
        """The set of fingerprints, sorted."""
        return np.unique(self.sequence)

    def windows(self, parameters: DedupeParameters) -> list[Prints]:
        """Overlapping windows of the sequence; the last one may be shorter."""
        size, step = parameters.window_shingles, parameters.window_step
        count = len(self.sequence)
        return [self.sequence[at : at + size] for at in range(0, max(count - size + step, min(count, 1)), step)]


def fingerprint(shingle: str) -> int:
    """64-bit hash of a shingle, ``words-64``; the same on every machine. The definition; `shingle` computes many.

    All arithmetic is modulo 2**64; ``mix`` is the finaliser of MurmurHash3 (64 bits), a bijection in which every bit
    depends on every other. With c the code points of a word::

        word    = mix(c[0] + c[1] * LETTER + c[2] * LETTER**2 + ...)
        shingle = mix(word[0] + word[1] * WORD + word[2] * WORD**2 + ...)

    It spreads well but keeps no secret: whoever wants two shingles with the same fingerprint can compute them.

    Args:
        shingle: Normalised words, joined by one space.
    """
    words = (_mix_one(_weighted_sum(map(ord, word), _LETTER)) for word in shingle.split(" "))
    return _mix_one(_weighted_sum(words, _WORD))


def shingle(text: str, parameters: DedupeParameters) -> ShingledText:
    """Cut a text into shingles.

    The last shingle is the first that reaches the end, so a text shorter than a shingle is one as a whole, and a
    text without words has none.
    """
    return _shingle_together([text], parameters)[0]


def shingle_many(texts: Iterable[str], parameters: DedupeParameters) -> list[ShingledText]:
    """Cut texts into shingles: what `shingle` makes of each, many times faster when they are short."""
    return [found for group in _grouped(texts) for found in _shingle_together(group, parameters)]


def sign(windows: Iterable[Prints], parameters: DedupeParameters) -> Signatures:
    """MinHash signatures as datasketch computes them, one row per window.

    Returns:
        (windows, num_perm) uint32: the hashvalues of ``MinHash(num_perm, seed, scheme="affine32", hashfunc=low32)``
        updated with each shingle, ``low32`` being the low 32 bits of `fingerprint`.
    """
    rows = [_sign_together(group, parameters) for group in _grouped(windows)]
    return np.concatenate(rows) if rows else np.empty((0, parameters.num_perm), dtype=np.uint32)


def to_lean(signatures: Signatures, parameters: DedupeParameters) -> Iterator[LeanMinHash]:
    """Signatures as datasketch's own objects, which every LSH class of it takes."""
    from datasketch import LeanMinHash  # half a second, most of it SciPy's: longer than many a search

    for row in signatures:
        yield LeanMinHash(seed=parameters.seed, hashvalues=row, scheme=parameters.scheme)


def _grouped(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Items in order, in lists of about `_BLOCK` together; a larger one is alone at the end of its list."""
    group, held = list[Item](), 0
    for item in items:
        group.append(item)
        held += len(item)
        if held >= _BLOCK:
            yield group
            group, held = [], 0
    if group:
        yield group


# --- fingerprints ---------------------------------------------------------------------------------------------


def _weighted_sum(values: Iterable[int], base: int) -> int:
    """The sum of value i times base ** i, modulo 2**64."""
    return sum(value * pow(base, i, 1 << 64) for i, value in enumerate(values)) % (1 << 64)


def _mix_one(value: int) -> int:
    return int(_mix(np.array([value], dtype=np.uint64))[0])


def _mix(values: Prints) -> Prints:
    """The 64-bit finaliser of MurmurHash3, in place."""
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        values ^= values >> np.uint64(33)
        values *= np.uint64(multiplier)
    values ^= values >> np.uint64(33)
    return values


@cache
def _kept_powers(base: int) -> Prints:
    return _powers(base, _POWERS)


def _powers(base: int, count: int) -> Prints:
    """(count,) 1, base, base ** 2, … modulo 2**64."""
    factors = np.full(count, base, dtype=np.uint64)
    factors[:1] = 1
    return np.cumprod(factors, dtype=np.uint64)


def _word_hashes(block: WordArrays) -> Prints:
    """Hash every word of a block.

    Letter i is weighed with ``LETTER ** i``, i counted from the beginning of the block; dividing a word's sum by the
    weight of its first letter leaves what the word has everywhere.
    """
    letters = block.letters
    forth, back = (
        _kept_powers(base) if len(letters) <= _POWERS else _powers(base, len(letters))
        for base in (_LETTER, _LETTER_INVERSE)
    )
    running = np.multiply(letters, forth[: len(letters)], dtype=np.uint64)
    np.cumsum(running, out=running)
    # What lies between words is 0, so the sum at the end of a word less that at the end of the word before is its own.
    sums = np.diff(running[block.ends - 1], prepend=np.uint64(0))
    sums *= back[block.starts]
    return _mix(sums)


def _sums_of_runs(words: Prints, size: int, count: int) -> Prints:
    """(count,) weighted sums of the ``size`` word hashes from each of the first ``count`` places on."""
    sums = words[size - 1 : size - 1 + count].copy()
    for first in reversed(range(size - 1)):
        sums *= np.uint64(_WORD)
        sums += words[first : first + count]
    return sums


def _shingle_together(texts: Sequence[str], parameters: DedupeParameters) -> list[ShingledText]:
    """Shingles of some texts, computed as one; the results are views of arrays in common."""
    lengths = np.array([len(text) for text in texts])
    begins = np.cumsum(lengths + 2) - lengths - 2
    # No word reaches over a blank line, and no hyphen joins over it.
    blocks = list(word_arrays("\n\n".join(texts)))
    spans = np.concatenate([np.empty((0, 2), dtype=np.int64), *(block.spans for block in blocks)])
    hashes = np.concatenate([np.empty(0, np.uint64), *map(_word_hashes, blocks)])
    spaceless: Flags = np.concatenate([np.empty(0, np.bool_), *(block.spaceless for block in blocks)])

    bounds = np.append(np.searchsorted(spans[:, 0], begins), len(spans))
    counts = np.diff(bounds)
    owners = np.repeat(np.arange(len(texts)), counts)
    for column in spans.T:
        column -= begins[owners]
    # Words behind the end count as 0, so that a shingle cut short by it sees nothing of the next text.
    gap = max(parameters.shingle_words, parameters.shingle_characters) - 1
    padded = np.zeros(len(hashes) + gap * len(texts), dtype=np.uint64)
    places = np.arange(len(hashes)) + gap * owners
    padded[places] = hashes
    sequence = _sums_of_runs(padded, parameters.shingle_words, len(padded) - gap)[places]
    sizes = np.full(len(hashes), parameters.shingle_words)
    if spaceless.any():
        sequence[spaceless] = _sums_of_runs(padded, parameters.shingle_characters, len(padded) - gap)[places[spaceless]]
        sizes[spaceless] = parameters.shingle_characters
    sequence = _mix(sequence)

    ends = np.arange(len(hashes)) - bounds[owners] + sizes
    reaching = np.flatnonzero(ends >= counts[owners])
    # The last word of a text always reaches its end; a text without words takes nothing of the next one.
    stops = np.minimum(np.append(reaching, len(hashes))[np.searchsorted(reaching, bounds[:-1])] + 1, bounds[1:])
    np.minimum(ends, counts[owners], out=ends)
    return [
        ShingledText(length, spans[first:last], sequence[first:stop], ends[first:stop])
        for length, first, last, stop in zip(
            lengths.tolist(), bounds[:-1].tolist(), bounds[1:].tolist(), stops.tolist(), strict=True
        )
    ]


# --- signatures -----------------------------------------------------------------------------------------------


@cache
def _permutations(seed: int, num_perm: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """Odd multipliers and summands of ``affine32``, each (num_perm,), drawn as datasketch draws them."""
    drawn = np.random.RandomState(seed)
    halves = drawn.randint(0, 1 << 31, num_perm, dtype=np.uint32)
    return halves * np.uint32(2) + np.uint32(1), drawn.randint(0, 1 << 32, num_perm, dtype=np.uint32)


def _sign_together(windows: Sequence[Prints], parameters: DedupeParameters) -> Signatures:
    """Signatures of some windows: each permutation of all shingles at once, then the minima of the stretches."""
    lengths = np.array([len(window) for window in windows])
    filled = np.flatnonzero(lengths)  # reduceat takes an empty stretch for one element of its neighbour
    result = np.full((len(windows), parameters.num_perm), _EMPTY, dtype=np.uint32)
    if not len(filled):
        return result
    hashes = _mix_32(np.concatenate(windows).astype(np.uint32))  # keeps the low 32 bits
    starts = (np.cumsum(lengths) - lengths)[filled]
    permuted, minima = np.empty_like(hashes), np.empty((parameters.num_perm, len(filled)), dtype=np.uint32)
    multipliers, summands = _permutations(parameters.seed, parameters.num_perm)
    for multiplier, summand, row in zip(multipliers, summands, minima, strict=True):
        np.multiply(hashes, multiplier, out=permuted)
        np.add(permuted, summand, out=permuted)
        np.minimum.reduceat(permuted, starts, out=row)
    result[filled] = minima.T
    return result


def _mix_32(values: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """The 32-bit finaliser of MurmurHash3, in place: what datasketch does to a hash before the permutations."""
    for shift, multiplier in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        values ^= values >> np.uint32(shift)
        values *= np.uint32(multiplier)
    values ^= values >> np.uint32(16)
    return values
