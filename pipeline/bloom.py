"""Sets of runs of symbols that can be asked, but not listed: rolling hashes and a Bloom filter, in NumPy.

In: sequences of small integers. Out: which runs of a fixed length were put in, never fewer, at times one too many.
Never: Python code for each symbol.

A run s₁…sₙ is hashed to Σ sᵢ·Bⁿ⁻ⁱ mod 2⁶¹ − 1 (Karp and Rabin) with a random base B. So the hash of a run that is
continued follows from that of its beginning and that of its end: h(xy) = h(x)·B^|y| + h(y).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

PRIME = (1 << 61) - 1

# Of `pipeline.guard`; here, because the command line names them and is not to load torch for it.
DEFAULT_LETTERS = 40
"""About eight words, so that common phrases and short quotations pass. On the demo not even a run of 20 letters of a
work ends in any other text (`tests/benchmarks/guard.py`)."""
DEFAULT_FPR = 1e-4

Hashes = NDArray[np.uint64]

_LOW29, _LOW32 = np.uint64((1 << 29) - 1), np.uint64((1 << 32) - 1)
_P = np.uint64(PRIME)
_S29, _S32, _S61 = np.uint64(29), np.uint64(32), np.uint64(61)


def fold(values: Hashes) -> Hashes:
    """Reduce numbers below 2⁶⁴ mod 2⁶¹ − 1."""
    once = (values & _P) + (values >> _S61)
    return once - np.where(once >= _P, _P, np.uint64(0))


def times(values: Hashes, factor: int) -> Hashes:
    """Multiply numbers below 2⁶¹ by one, mod 2⁶¹ − 1: in halves of 32 bits, for 2⁶¹ = 1 and 2⁶⁴ = 8 there."""
    high, low = values >> _S32, values & _LOW32
    factor_high, factor_low = np.uint64(factor >> 32), np.uint64(factor & 0xFFFFFFFF)
    middle = high * factor_low + low * factor_high
    return fold(
        fold(high * factor_high << np.uint64(3))
        + fold(low * factor_low)
        + (middle >> _S29)
        + ((middle & _LOW29) << _S32)
    )


def run_hashes(symbols: Hashes, length: int, base: int) -> Hashes:
    """Hashes of all runs of a length, in log₂(length) passes.

    Args:
        symbols: (count,) numbers below 2⁶¹.
        length: Symbols of a run, at least 1.
        base: B.

    Returns:
        (max(count - length + 1, 0),) hashes.
    """
    if len(symbols) < length:
        return np.empty(0, np.uint64)
    done, covered = np.zeros(len(symbols) + 1, np.uint64), 0  # of the first `covered` symbols from each place on
    power, span = symbols, 1  # of `span` symbols from each place on
    while covered < length:
        if length >> (span.bit_length() - 1) & 1:
            count = len(symbols) + 1 - covered - span
            done = fold(times(done[:count], pow(base, span, PRIME)) + power[covered : covered + count])
            covered += span
        count = len(power) - span
        if count > 0:
            power = fold(times(power[:count], pow(base, span, PRIME)) + power[span : span + count])
        span *= 2
    return done[: len(symbols) - length + 1]


def run_hash(symbols: Sequence[int], base: int) -> int:
    """Hash of one run, of any length."""
    found = 0
    for symbol in symbols:
        found = (found * base + symbol) % PRIME
    return found


def _mixed(values: Hashes, salt: int) -> Hashes:
    """Spread hashes over 64 bits, differently for each salt (the finaliser of SplitMix64)."""
    mixed = values + np.uint64(salt)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


class Bloom:
    """A Bloom filter over 61-bit hashes. Its bits are all there is to it: the same hashes and salts give the same bits.

    Args:
        bits: (bytes,) uint8, of which the lowest bit of the first is bit 0.
        size: Number of bits in use.
        probes: Bits of each member.
        salts: Two numbers below 2⁶⁴; whoever does not know them cannot ask.
    """

    def __init__(self, bits: NDArray[np.uint8], size: int, probes: int, salts: tuple[int, int]) -> None:
        self.bits, self.size, self.probes, self.salts = bits, size, probes, salts

    @classmethod
    def empty(cls, capacity: int, fpr: float, salts: tuple[int, int]) -> Bloom:
        """A filter that is asked wrongly with probability ``fpr`` at most once it holds ``capacity`` members."""
        probes = max(1, math.ceil(math.log2(1 / fpr)))
        # (1 - e^(-probes·n/size))^probes = fpr, solved for size: for a rounded number of probes, too.
        size = max(64, math.ceil(-probes * capacity / math.log1p(-(fpr ** (1 / probes)))))
        return cls(np.zeros((size + 7) // 8, np.uint8), size, probes, salts)

    def add(self, hashes: Hashes) -> None:
        """Put members in."""
        for probe in range(self.probes):
            at = self._place(hashes, probe)
            np.bitwise_or.at(self.bits, at >> np.uint64(3), np.left_shift(1, at & np.uint64(7)).astype(np.uint8))

    def holds(self, hashes: Hashes) -> NDArray[np.bool_]:
        """Whether each is a member; after each probe only those are looked at that can still be."""
        left: NDArray[Any] = np.arange(len(hashes))
        for probe in range(self.probes):
            at = self._place(hashes[left], probe)
            left = left[(self.bits[at >> np.uint64(3)] >> (at & np.uint64(7)).astype(np.uint8)) & 1 == 1]
            if not len(left):
                break
        found = np.zeros(len(hashes), np.bool_)
        found[left] = True
        return found

    def _place(self, hashes: Hashes, probe: int) -> Hashes:
        """Bit of each that a probe looks at: mixed anew for each probe.

        First place and step, as Kirsch and Mitzenmacher have it, go round in a few bits where the step happens to
        divide the size: a filter of some thousand bits then errs 2 to 20 times as often as it is made for.
        """
        first, step = self.salts
        return _mixed(hashes, (first + probe * (step | 1)) % (1 << 64)) % np.uint64(self.size)
