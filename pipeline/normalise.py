"""Text to comparable words: what a retyped, re-wrapped or disguised copy has in common with its original.

In: raw text. Out: normalised words, each with its place in the raw text. Never: language or meaning; no word
is dropped for being common. A change of one output is a new `NORMALISER`: indexes record it and refuse others.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import Final, Literal, NamedTuple

NORMALISER: Final[Literal["v1"]] = "v1"

_APOSTROPHES = frozenset("'`´‘’‛′ʹʻʼ＇")
"""Deleted, not separators: ``don't``, ``don’t`` and ``dont`` are one word."""

_LINE_HYPHENS = "-\u2010\u00ad"
"""Hyphen-minus, hyphen and soft hyphen: what ends a line inside a word."""

_SPACELESS = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\uaa60-\uaa7f"  # Myanmar
    "\u1780-\u17ff"  # Khmer
    "\u3005-\u3007\u3040-\u312f\u31f0-\u31ff"  # iteration marks, kana, bopomofo
    "\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua48f\U00020000-\U0003ffff"  # Han, Yi
)
"""Scripts written without spaces. Each of their characters is a word of its own: where words end would need a
dictionary, and one unbroken paragraph must not become one word."""

_UNIT = re.compile(f"[{_SPACELESS}]|[^ {_SPACELESS}]+")
_IS_SPACELESS = re.compile(f"[{_SPACELESS}]")

_JOINABLE = "\\w\u0300-\u036f\u200b-\u200f\u2060\ufeff"
_PIECE = re.compile(
    # A run without space, going on over a line end (never over a blank line) after letter + hyphen. A digit does
    # not join: 1914-\n1918 are two numbers.
    rf"\S+(?:(?<=[{_JOINABLE}][{_LINE_HYPHENS}])(?<!\d[{_LINE_HYPHENS}])[^\S\r\n]*(?:\r\n|\n|\r)[^\S\r\n]*"
    rf"(?=[{_JOINABLE}])\S+)*"
)
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
