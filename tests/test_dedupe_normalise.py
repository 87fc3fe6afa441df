"""Normaliser v1: what counts as the same word, where it stands in the raw text, and the same as arrays."""

from __future__ import annotations

import random
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import normalise
from pipeline.normalise import NORMALISER, Word, is_spaceless, word_arrays, words

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


# --- the same as arrays -------------------------------------------------------------------------------------

DEMO = Path(__file__).resolve().parent.parent / "takedowns" / "demo"


def as_words(raw: str) -> list[Word]:
    """What `word_arrays` found, in the form of `words`."""
    found = list[Word]()
    for block in word_arrays(raw):
        assert block.spans.dtype == np.int64
        assert block.spans.shape == (len(block.starts), 2)
        assert block.letters.dtype in (np.uint8, np.uint32)
        letters, gaps = list(map(chr, block.letters.tolist())), np.ones(len(block.letters), dtype=bool)
        for at, to, (start, end), spaceless in zip(
            block.starts.tolist(), block.ends.tolist(), block.spans.tolist(), block.spaceless.tolist(), strict=True
        ):
            text = "".join(letters[at:to])
            assert spaceless == is_spaceless(text)
            gaps[at:to] = False
            found.append(Word(text, start, end))
        assert not block.letters[gaps].any()  # hashing counts on it
    return found


PUNCTUATED = st.text(st.sampled_from(list("ab1'`-_,.\"( \n\r\t\x00\x1c\x7f")), max_size=40)
MIXED = st.text(
    st.sampled_from(
        list("a1'’-\u2010\u00ad \r\n\x85\u2028\u3000é½ﬁ天。、がไ한أ\u0651\u064e\u1dc0\u302aﷺ\ud800\U00020000\U000e0100")
    ),
    max_size=40,
)


@given(ANY | NASTY | PUNCTUATED | MIXED, st.sampled_from([1, 3, 10, 1 << 16]))
@settings(max_examples=1500, deadline=None)
def test_arrays_hold_the_same_words_in_blocks_of_any_size(raw: str, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(normalise, "_BLOCK", block)
        assert as_words(raw) == words(raw)


@pytest.mark.parametrize(
    "raw",
    [
        "the boys' 'hello' x'y' `a`, (b'). c'-d' e'\x00 f'é g-\nh' _-\n_i' 'j",
        "rock 'n' roll; o' the 'tis' don't' ''k'' l'\n\nm' n’ o'’ ’p’'",
        "exam-\nple exam- \t\r\n ple 1914-\n1918 exam-\n\nple -\nx a-\n-b a-\nb-\nc x-\r",
        "عَرَبِيّ שָׁלוֹם ที่ दि़ a\u0651\u064e b\u064e\u0651",  # marks out of canonical order
    ],
)
def test_arrays_agree_on_apostrophes_hyphens_and_marks(raw: str) -> None:
    assert as_words(raw) == words(raw)


def test_arrays_agree_on_every_character() -> None:
    rng = random.Random(5)
    codes = rng.sample(range(sys.maxunicode + 1), 60_000) + list(range(0x3100)) + list(range(0xF900, 0x10000))
    contexts = ("{} ", "a{}b ", "{}' ", "a-{}\n", "天{}\u0651")
    raw = "".join(contexts[i % len(contexts)].format(chr(code)) for i, code in enumerate(codes))
    assert as_words(raw) == words(raw)


def test_no_character_becomes_more_than_the_table_holds() -> None:
    longest = max(len(normalise._fold(chr(code))) for code in range(sys.maxunicode + 1))
    assert longest <= normalise._LONGEST_FOLD


@pytest.mark.parametrize("edit", [str, str.upper, lambda t: unicodedata.normalize("NFD", t), "\u00ad".join])
def test_arrays_agree_on_prose_longer_than_a_block(edit) -> None:  # type: ignore[no-untyped-def]
    raw = edit("\n\n".join(path.read_text(encoding="utf-8") for path in sorted(DEMO.rglob("*.txt"))))
    assert len(raw) > 2 * normalise._BLOCK
    assert as_words(raw) == words(raw)


@pytest.mark.parametrize("unit", ["x", "天", "-", "\n", "’", "a-\n"])
def test_arrays_agree_on_monotony(unit: str) -> None:
    raw = unit * 200_000
    assert as_words(raw) == words(raw)


def test_a_text_of_ideographs_is_cut_at_its_punctuation() -> None:
    raw = "老船长每天清晨都要到码头上走一圈，看看潮水退到哪块石头。" * 10_000
    blocks = list(word_arrays(raw))
    assert max(len(block.letters) for block in blocks) < 2.1 * normalise._BLOCK
    assert as_words(raw) == words(raw)


def test_tables_may_be_filled_by_several_threads() -> None:
    raws = ["".join(map(chr, range(start, start + 3000))) for start in range(0xAC00, 0xD000, 1000)]  # Hangul expands
    normalise._fold_table.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(as_words, raws))
    assert found == list(map(words, raws))
