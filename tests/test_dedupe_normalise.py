"""Normaliser v1: what counts as the same word, and where it stands in the raw text."""

from __future__ import annotations

import unicodedata
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.normalise import NORMALISER, is_spaceless, words

PROSE = "The baker’s café keeps its “naïve” clock—slow by ten minutes—on purpose; nobody asks why, and nobody minds."


def texts(raw: str) -> list[str]:
    return [word.text for word in words(raw)]


def test_version_is_what_indexes_record() -> None:
    assert NORMALISER == "v1"


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("", []),
        (" \n\t ", []),
        ("?! — … “” ’ \u200b\ufeff", []),
        ("Hello, World", ["hello", "world"]),
        ("Don't don’t dont DON`T", ["dont"] * 4),
        ("exam-\nple exam-  \r\n  ple exam\u00ad\nple exam\u2010\nple", ["example"] * 4),
        ("exam-\n\nple", ["exam", "ple"]),  # a blank line ends a paragraph, never a word
        ("1914-\n1918", ["1914", "1918"]),
        ("well-known a--b and/or", ["well", "known", "a", "b", "and", "or"]),
        ("snake_case", ["snake", "case"]),
        ("so\u00adft ze\u200bro \u202ebidi\u202c \ufeffbom", ["soft", "zero", "bidi", "bom"]),
        ("cafe\u0301 café CAFÉ", ["cafe"] * 3),
        ("ﬁne ＦＵＬＬ Straße x² ½ Acme™", ["fine", "full", "strasse", "x2", "1", "2", "acmetm"]),
        ("Σίσυφος ΣΊΣΥΦΟΣ", ["σισυφοσ"] * 2),
        ("天地abc玄", ["天", "地", "abc", "玄"]),
        ("ไทย", ["ไ", "ท", "ย"]),
        ("हिन्दी में", ["हिन्दी", "में"]),  # vowel signs are marks and part of the word
        ("مرحبا، بالعالم", ["مرحبا", "بالعالم"]),
    ],
)
def test_words_of(raw: str, expected: list[str]) -> None:
    assert texts(raw) == [unicodedata.normalize("NFKD", word) for word in expected]


def test_indic_vowel_signs_keep_words_apart() -> None:
    assert texts("कि") != texts("की") != texts("क")


@pytest.mark.parametrize(
    "edit",
    [
        str.upper,
        str.lower,
        lambda t: unicodedata.normalize("NFD", t),
        lambda t: t.replace("’", "'").replace("“", '"').replace("”", '"').replace("—", " - "),
        lambda t: "\u200b".join(t),
        lambda t: t.replace(" ", "\n\t "),
        lambda t: t.replace("minutes", "min-\nutes").replace("nobody", "no\u00adbody"),
        lambda t: "".join(c for c in t if c not in ",;.“”"),
        lambda t: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in t),
    ],
    ids=["upper", "lower", "NFD", "straight quotes", "zero width", "wrap", "hyphens", "no punctuation", "full width"],
)
def test_disguises_do_not_change_the_words(edit) -> None:  # type: ignore[no-untyped-def]
    assert texts(edit(PROSE)) == texts(PROSE)


def test_spans_point_at_the_raw_words() -> None:
    raw = "  “Cafe\u0301!” he wro-\nte, na\u00adi\u200bve."
    assert [raw[w.start : w.end] for w in words(raw)] == ["Cafe\u0301", "he", "wro-\nte", "na\u00adi\u200bve"]


def test_spaceless_scripts() -> None:
    assert [is_spaceless(w) for w in ("天", "ท", "か", "abc", "é", "ह", "م")] == [True] * 3 + [False] * 4


ANY = st.text(st.characters(codec="utf-8"), max_size=60)
NASTY = st.text(
    st.sampled_from(list("aZé\u0301\u00ad\u200b-–'’ \n\r\t_1½ß天が\u3099ที่हि\u0345ŉﬁ™\u064b\ufeff")), max_size=40
)


@given(ANY | NASTY)
@settings(max_examples=300, deadline=None)
def test_laws(raw: str) -> None:
    found = words(raw)
    # Normalised text normalises to itself.
    assert texts(" ".join(w.text for w in found)) == [w.text for w in found]
    assert all(w.text and " " not in w.text for w in found)
    # Ranges are inside the text, not empty, in order; they overlap only when equal (½).
    assert all(0 <= w.start < w.end <= len(raw) for w in found)
    for left, right in pairwise(found):
        assert left.end <= right.start or (left.start < right.end and left.start <= right.start)
    # A word's own range holds that word; marks may have changed places with their neighbours.
    for word in found:
        if not any(unicodedata.combining(c) for c in word.text):
            assert word.text in texts(raw[word.start : word.end])


@given(NASTY, NASTY)
@settings(max_examples=200, deadline=None)
def test_a_blank_line_separates(left: str, right: str) -> None:
    assert texts(f"{left}\n\n{right}") == texts(left) + texts(right)
