"""Text to comparable words: what a retyped, re-wrapped or disguised copy has in common with its original.

In: raw text. Out: normalised words, each with its place in the raw text. Never: language or meaning; no word
is dropped for being common. A change of one output is a new `NORMALISER`: indexes record it and refuse others.

`words` is the definition, one Python object per word. `word_arrays` gives the same words as arrays, some fifty times
faster: what single characters become is asked of the same functions, once per character.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Final, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

NORMALISER: Final[Literal["v1"]] = "v1"

_APOSTROPHES = frozenset("'`´‘’‛′ʹʻʼ＇")
"""Deleted, not separators: ``don't``, ``don’t`` and ``dont`` are one word."""

_LINE_HYPHENS = "-\u2010\u00ad"
"""Hyphen-minus, hyphen and soft hyphen: what ends a line inside a word."""

_SPACELESS_RANGES = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    *((0x1000, 0x109F), (0xAA60, 0xAA7F)),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    *((0x3005, 0x3007), (0x3040, 0x312F), (0x31F0, 0x31FF)),  # iteration marks, kana, bopomofo
    *((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xA000, 0xA48F), (0x20000, 0x3FFFF)),  # Han, Yi
)
"""Scripts written without spaces. Each of their characters is a word of its own: where words end would need a
dictionary, and one unbroken paragraph must not become one word."""

_SPACELESS = "".join(f"{chr(first)}-{chr(last)}" for first, last in _SPACELESS_RANGES)
_UNIT = re.compile(f"[{_SPACELESS}]|[^ {_SPACELESS}]+")
_IS_SPACELESS = re.compile(f"[{_SPACELESS}]")

_JOINABLE = "\\w\u0300-\u036f\u200b-\u200f\u2060\ufeff"
# A word goes on over a line end (never over a blank line) after letter + hyphen. A digit does not join: 1914-\n1918 are
# two numbers.
_AFTER_HYPHEN = (
    rf"(?<=[{_JOINABLE}][{_LINE_HYPHENS}])(?<!\d[{_LINE_HYPHENS}])[^\S\r\n]*(?:\r\n|\n|\r)[^\S\r\n]*(?=[{_JOINABLE}])"
)
_JOIN = re.compile(_AFTER_HYPHEN)
_PIECE = re.compile(rf"\S+(?:{_AFTER_HYPHEN}\S+)*")
_ASCII_EDGES = "\"#$%&()*+,-./:;<=>?@[\\]^_{|}~!'`"
_LONGEST_CACHED = 64


class Word(NamedTuple):
    """A normalised word and the characters [start, end) of the raw text that it came from."""

    text: str
    start: int
    end: int


def words(text: str) -> list[Word]:
    """Normalise a text to words, version `NORMALISER`.

    Words hyphenated at a line end are re-joined; format characters (soft hyphen, zero-width, bidi, BOM) are
    deleted; NFKD, with U+0300-036F stripped; casefold; apostrophes deleted; words are runs of letters, digits and
    remaining marks, and single characters in scripts written without spaces.

    Only the U+0300 block is stripped: the vowel signs of Indic scripts are marks too, and taking them out would
    turn different words into the same.

    Law: ``words(" ".join(w.text for w in words(t)))`` has the same texts. Ranges rise and do not overlap, except
    that one character which stands for several words (½) gives them all its own range.

    Args:
        text: Any text.

    Returns:
        Its words in order; empty when nothing but punctuation is left.
    """
    # Words repeat: a piece is folded once per call. Kept per call, so that no text outlives its use.
    known: dict[str, list[Word]] = {}
    result: list[Word] = []
    for match in _PIECE.finditer(text):
        piece, at = match[0], match.start()
        core = piece.strip(_ASCII_EDGES)
        if core.isascii() and core.isalnum():
            start = at + piece.index(core)
            result.append(Word(core.lower(), start, start + len(core)))
            continue
        found = known.get(piece)
        if found is None:
            found = _piece_words(piece)
            if len(piece) <= _LONGEST_CACHED:
                known[piece] = found
        result.extend(Word(word, at + start, at + end) for word, start, end in found)
    return result


def is_spaceless(word: str) -> bool:
    """Whether a normalised word is a single character of a script written without spaces."""
    return not word.isascii() and _IS_SPACELESS.match(word) is not None


def _piece_words(piece: str) -> list[Word]:
    """The words of one run without spaces, with places inside the piece."""
    chars: list[str] = []
    owners: list[int] = []
    for i, char in enumerate(piece):
        # White space inside a piece is a re-joined line end: it goes, and the hyphen in front of it.
        if char.isspace() or (char in _LINE_HYPHENS and piece[i + 1 : i + 2].isspace()):
            continue
        for folded in _fold(char):
            chars.append(folded)
            owners.append(i)
    # All is decomposed by now, so this only puts marks into canonical order; lengths and word ends stay.
    normal = unicodedata.normalize("NFKD", "".join(chars))
    owners.append(len(piece))
    return [
        # A word ends where the next thing begins, so that trailing accents and zero-width characters belong to it.
        Word(m[0], owners[m.start()], max(owners[m.end()], owners[m.end() - 1] + 1))
        for m in _UNIT.finditer(normal)
    ]


@lru_cache(maxsize=8192)
def _fold(char: str) -> str:
    """What one raw character contributes: word characters, a space where it separates, nothing if deleted."""
    if _deleted(char):
        return ""
    folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", char).casefold())
    return "".join(c if _in_word(c) else " " for c in folded if not _deleted(c))


def _deleted(char: str) -> bool:
    return (
        char in _APOSTROPHES
        or "\u0300" <= char <= "\u036f"
        or unicodedata.category(char) == "Cf"
        or "\ufe00" <= char <= "\ufe0f"  # variation selectors: how a character looks, not which it is
        or "\U000e0100" <= char <= "\U000e01ef"
    )


def _in_word(char: str) -> bool:
    return char.isalnum() or unicodedata.category(char).startswith("M")


# --- the same as arrays -------------------------------------------------------------------------------------

Codes: TypeAlias = npt.NDArray[np.uint8] | npt.NDArray[np.uint32]
Places: TypeAlias = npt.NDArray[np.int64]
Flags: TypeAlias = npt.NDArray[np.bool_]

_SEPARATOR, _DELETED, _UNKNOWN = 0, 1, 2
"""What a character becomes, where it does not become a letter; no word holds these control characters."""

_EXPANDS = 0x110000
"""From here on: several characters; the number of their row in the table of expansions."""

_LONGEST_FOLD = 18
"""Characters that the longest expansion in Unicode has, that of U+FDFA."""

_FIRST_MARK = 0x300
"""The first character with a place in canonical order."""

_BLOCK = 1 << 16
"""Characters handled at once: temporary arrays of 512 kB, which stay in the cache."""

_CUT = re.compile(
    # Before white space that no hyphen can reach over, or before an ideographic mark after a character that is a word
    # of its own: Chinese and Japanese have no spaces to cut at.
    rf"(?<=[^{_LINE_HYPHENS}\s])\s|(?<=[{_SPACELESS}])[\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f]"
)

_SPACE = np.array([chr(code).isspace() for code in range(0x3001)] + [False])
"""Whether a character is white space; the last entry stands for all above U+3000, which is the last one."""


@dataclass(frozen=True)
class WordArrays:
    """The words of a stretch of text, without a Python object for each.

    Attributes:
        letters: (letters,) code points of the normalised text, uint8 when all of it is ASCII, else uint32; 0 stands
            for everything between words.
        starts: (words,) index of each word's first letter.
        ends: (words,) index after each word's last letter.
        spans: (words, 2) characters [start, end) of the raw text, as in `Word`.
        spaceless: (words,) whether it is a single character of a script written without spaces.
    """

    letters: Codes
    starts: Places
    ends: Places
    spans: Places
    spaceless: Flags


def word_arrays(text: str) -> Iterator[WordArrays]:
    """Normalise a text to words: the words and places of `words`, in blocks of some `_BLOCK` characters.

    Args:
        text: Any text. A run of that many characters without white space and ideographic punctuation is one block, and
            takes about 60 bytes of memory per character.

    Yields:
        Words in order; blocks end between words. Spans count from the beginning of the text.
    """
    at = 0
    while at < len(text):
        # The last block may be longer: half a block costs nearly as much as a whole one.
        cut = _CUT.search(text, at + _BLOCK) if len(text) - at > 2 * _BLOCK else None
        end = cut.start() if cut else len(text)
        yield _block_words(text[at:end], at)
        at = end


def _block_words(text: str, offset: int) -> WordArrays:
    """The words of one block, which begins at a character of the raw text and shares no word with its neighbours."""
    raw: Codes
    codes: Codes
    letters: Codes
    table = _fold_table()  # one for the whole block: threads that begin together may each get their own
    if text.isascii():
        data = bytearray(text, "ascii")
        raw, codes = np.frombuffer(data, np.uint8), np.frombuffer(data.translate(_ascii_table()), np.uint8)
    else:
        raw = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.dtype("<u4"))
        codes = table.codes(raw)
    _delete_joins(text, raw, codes)
    owners = np.flatnonzero(codes != _DELETED)
    letters = codes.take(owners)  # twice as fast as indexing
    if letters.dtype == np.uint32:
        letters, owners = table.expanded(letters.astype(np.uint32, copy=False), owners)
        if len(letters) and letters.max() >= _FIRST_MARK:
            letters = _in_canonical_order(letters)
    starts, ends, spaceless = _word_bounds(letters)
    first, last = owners.take(starts), owners.take(ends - 1)
    # A word ends where the next thing begins, or with the block.
    stop = owners.take(ends, mode="clip")
    stop[-1:][ends[-1:] == len(owners)] = len(raw)
    np.maximum(stop, last + 1, out=stop)
    trailing = np.flatnonzero(stop > last + 1)
    trailing = trailing[raw[last[trailing] + 1] < 0x80]
    if len(trailing):
        plain = trailing[(last - first + 1 == ends - starts)[trailing]]
        plain = plain[_alone_in_ascii(raw, codes, first, plain)]
        stop[plain] = last[plain] + 1
    return WordArrays(letters, starts, ends, np.stack((first, stop), axis=1) + offset, spaceless)


def _delete_joins(text: str, raw: Codes, codes: Codes) -> None:
    """Mark hyphens that a word goes on after, and the line end behind them, as deleted; in place."""
    hyphens = raw[:-1] == ord("-")
    if raw.dtype != np.uint8:
        hyphens |= (raw[:-1] == 0x2010) | (raw[:-1] == 0xAD)
    places = np.flatnonzero(hyphens)
    for place in places[_SPACE.take(raw[places + 1], mode="clip")].tolist():
        if join := _JOIN.match(text, place + 1):
            codes[place : join.end()] = _DELETED


def _word_bounds(letters: Codes) -> tuple[Places, Places, Flags]:
    """First letters, ends, and which are single characters of a script without spaces."""
    inside = np.zeros(len(letters) + 2, dtype=np.bool_)
    np.not_equal(letters, _SEPARATOR, out=inside[1:-1])
    if not len(letters) or letters.max() < _SPACELESS_RANGES[0][0]:
        edges = np.flatnonzero(inside[1:] != inside[:-1])
        return edges[::2], edges[1::2], np.zeros(len(edges) // 2, dtype=np.bool_)
    single = np.zeros_like(inside)
    single[1:-1] = _spaceless_table().take(letters, mode="clip")
    change = (inside[1:] != inside[:-1]) | single[1:] | single[:-1]  # between one letter and the next
    starts, ends = np.flatnonzero(change[:-1] & inside[1:-1]), np.flatnonzero(change[1:] & inside[1:-1]) + 1
    return starts, ends, single[1:-1][starts]


def _alone_in_ascii(raw: Codes, codes: Codes, first: Places, chosen: Places) -> Flags:
    """Which of some words are all there is, besides ASCII punctuation, between two white spaces of the raw text.

    `words` leaves apostrophes behind such a word out of its range.
    """
    space: Flags = _SPACE.take(raw, mode="clip") & (codes != _DELETED)
    spaces = np.concatenate(([-1], np.flatnonzero(space), [len(raw)]))
    other = np.flatnonzero(((raw <= 0x20) | (raw >= 0x7F)) & ~space)  # control, not ASCII, re-joined line end
    at = np.searchsorted(spaces, first[chosen])
    left, right = spaces[at - 1], spaces[at]
    around = np.concatenate(([-1], first, [len(raw)]))
    alone: Flags = (around[chosen] <= left) & (around[chosen + 2] >= right)
    alone &= np.searchsorted(other, left) == np.searchsorted(other, right)
    return alone


def _in_canonical_order(letters: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Marks in canonical order. All is decomposed, so nothing else changes; separators are starters like any other."""
    decomposed = letters.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")
    if unicodedata.is_normalized("NFKD", decomposed):
        return letters
    ordered = unicodedata.normalize("NFKD", decomposed).encode("utf-32-le", "surrogatepass")
    return np.frombuffer(ordered, np.dtype("<u4")).astype(np.uint32)


class _FoldTable:
    """What `_fold` makes of a character, for arrays of them. Grows with the characters met, 1.1 million at most."""

    def __init__(self) -> None:
        self._codes = np.full(_EXPANDS, _UNKNOWN, dtype=np.uint32)
        self._expansions = np.full((0, _LONGEST_FOLD), _DELETED, dtype=np.uint32)
        self._learning = threading.Lock()

    def codes(self, raw: Codes) -> npt.NDArray[np.uint32]:
        """What each character becomes: a letter, separator, deleted, or the number of an expansion."""
        found = self._codes.take(raw)
        unknown = raw[found == _UNKNOWN]
        if len(unknown):
            with self._learning:
                for code in np.unique(unknown[self._codes[unknown] == _UNKNOWN]).tolist():
                    self._learn(code)
            found = self._codes.take(raw)
        return found

    def expanded(self, codes: npt.NDArray[np.uint32], owners: Places) -> tuple[npt.NDArray[np.uint32], Places]:
        """Put in the characters of the expansions, each with the owner of the one that they come from."""
        if not len(codes) or codes.max() < _EXPANDS:
            return codes, owners
        several = codes >= _EXPANDS
        rows = self._expansions[codes[several] - _EXPANDS]
        used = rows != _DELETED
        counts = np.ones(len(codes), dtype=np.int64)
        counts[several] = used.sum(axis=1)
        result = np.repeat(codes, counts)
        result[result >= _EXPANDS] = rows[used]
        return result, np.repeat(owners, counts)

    def _learn(self, code: int) -> None:
        folded = [_SEPARATOR if char == " " else ord(char) for char in _fold(chr(code))] or [_DELETED]
        if len(folded) > 1:
            row = np.full((1, _LONGEST_FOLD), _DELETED, dtype=np.uint32)
            row[0, : len(folded)] = folded
            folded = [_EXPANDS + len(self._expansions)]
            self._expansions = np.concatenate((self._expansions, row))
        self._codes[code] = folded[0]  # last: what is not unknown any more can be looked up


@cache
def _ascii_table() -> bytes:
    """What each ASCII character becomes; the upper half is there because a byte table has 256 entries."""
    return _fold_table().codes(np.arange(128, dtype=np.uint8)).astype(np.uint8).tobytes() * 2


@cache
def _fold_table() -> _FoldTable:
    return _FoldTable()


@cache
def _spaceless_table() -> Flags:
    """Whether a code point belongs to a script without spaces; the last entry stands for all above."""
    table = np.zeros(_SPACELESS_RANGES[-1][1] + 2, dtype=np.bool_)
    for first, last in _SPACELESS_RANGES:
        table[first : last + 1] = True
    return table
