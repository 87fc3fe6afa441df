"""Fingerprints, shingles and signatures: the kernels against their definitions and against datasketch."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from datasketch import LeanMinHash, MinHash, MinHashLSH
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline import shingles
from pipeline.normalise import is_spaceless, words
from pipeline.shingles import DedupeParameters, Prints, fingerprint, shingle, shingle_many, sign, to_lean

ROOT = Path(__file__).resolve().parent.parent
PARAMETERS = DedupeParameters()
TEN = DedupeParameters(shingle_words=10)
MASK = (1 << 64) - 1

ANY = st.text(st.characters(), max_size=80)
PIECES = ["a", "Bee", "don’t", "éclair", "天地", "ไทย", "½", "-\n", "مَرْحَبًا", "..."]
TEXTS = ANY | st.lists(st.sampled_from(PIECES), max_size=40).map(" ".join)


def finalised(value: int) -> int:
    """MurmurHash3's 64-bit finaliser in plain integers."""
    value ^= value >> 33
    value = value * 0xFF51AFD7ED558CCD & MASK
    value ^= value >> 33
    value = value * 0xC4CEB9FE1A85EC53 & MASK
    return value ^ value >> 33


def reference(shingle_words: list[str]) -> int:
    """The fingerprint's definition once more, by Horner's rule."""
    total = 0
    for word in reversed(shingle_words):
        letters = 0
        for char in reversed(word):
            letters = letters * 0xD1342543DE82EF95 + ord(char) & MASK
        total = total * 0xAF251AF3B0F025B5 + finalised(letters) & MASK
    return finalised(total)


def slowly(text: str, parameters: DedupeParameters) -> tuple[list[list[int]], list[int], list[int]]:
    """Spans, fingerprints and ends, word by word."""
    found, sequence, ends = words(text), list[int](), list[int]()
    for start, word in enumerate(found):
        end = start + (parameters.shingle_characters if is_spaceless(word.text) else parameters.shingle_words)
        sequence.append(reference([word.text for word in found[start:end]]))
        ends.append(min(end, len(found)))
        if end >= len(found):
            break
    return [[word.start, word.end] for word in found], sequence, ends


# --- fingerprints -----------------------------------------------------------------------------------------


def test_fingerprints_are_the_same_everywhere() -> None:
    # Golden: a change makes every index on disk unreadable and needs a new name in DedupeParameters.fingerprint.
    assert PARAMETERS.fingerprint == "words-64"
    assert fingerprint("the ferry had") == 0x169E7B36EDB77566
    assert fingerprint("天 地 玄 黄 宇 宙 洪 荒") == 0xD75C3F48F075AD1C


@given(st.lists(st.text(st.characters(exclude_characters=" "), min_size=1, max_size=12), min_size=1, max_size=12))
def test_a_fingerprint_is_what_its_definition_says(found: list[str]) -> None:
    assert fingerprint(" ".join(found)) == reference(found)


def test_other_fingerprints_are_other_parameters() -> None:
    with pytest.raises(ValidationError):
        DedupeParameters.model_validate({"fingerprint": "blake2b-64"})


def test_short_words_do_not_collide() -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    spelled = [a + b + c + d for a in " abcdefgh" for b in "abyz09" for c in "abcxyz" for d in letters]
    found = {word.strip() for word in spelled}
    assert len(shingle(" ".join(found), DedupeParameters(shingle_words=1)).prints) == len(found)


def test_order_and_number_of_words_count() -> None:
    phrases = [
        "a b c",
        "a c b",
        "b a c",
        "c b a",
        "ab c",
        "a bc",
        "a a b",
        "a b b",
        "a b",
        "b a",
        "a",
        "aa",
        "a a",
        "a a a",
    ]
    assert len({fingerprint(phrase) for phrase in phrases}) == len(phrases)


def shares(values: Prints) -> npt.NDArray[np.float64]:
    """(64,) share of the values in which each bit is set."""
    return np.unpackbits(values.view(np.uint8).reshape(len(values), 8), axis=1).mean(axis=0)


def test_every_bit_is_fair_and_moves_with_a_letter() -> None:
    rng = random.Random(3)
    vocabulary = list({"".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 9))) for _ in range(3000)})
    prints = shingle(" ".join(rng.choices(vocabulary, k=200_000)), PARAMETERS).prints
    moved = np.array([fingerprint(f"{word} on sea") ^ fingerprint(f"{word}s on sea") for word in vocabulary], np.uint64)
    for values in (prints, moved):  # within 5 standard deviations of a fair coin
        assert np.abs(shares(values) - 0.5).max() < 5 * 0.5 / len(values) ** 0.5


# --- shingles ---------------------------------------------------------------------------------------------


@given(
    st.lists(TEXTS, max_size=6),
    st.sampled_from([PARAMETERS, TEN, DedupeParameters(shingle_words=1, shingle_characters=2)]),
    st.sampled_from([1, 20, 1 << 16]),
    st.sampled_from([4, 1 << 17]),
)
@settings(max_examples=300, deadline=None)
def test_shingles_are_those_of_the_definition(
    texts: list[str], parameters: DedupeParameters, block: int, powers: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shingles, "_BLOCK", block)
        patch.setattr(shingles, "_POWERS", powers)
        found = shingle_many(texts, parameters)
    assert len(found) == len(texts)
    for text, made in zip(texts, found, strict=True):
        assert made.length == len(text)
        assert (made.spans.tolist(), made.sequence.tolist(), made.ends.tolist()) == slowly(text, parameters)
        assert (made.spans.dtype, made.sequence.dtype, made.ends.dtype) == (np.int64, np.uint64, np.int64)
        assert made.spans.shape[1:] == (2,)
        alone = shingle(text, parameters)
        assert np.array_equal(alone.spans, made.spans)
        assert np.array_equal(alone.sequence, made.sequence)
        assert np.array_equal(alone.ends, made.ends)


def test_texts_handled_together_do_not_touch() -> None:
    texts = ["the exam-", "ple of the boys'", "", "\u0651 mark", "half a co\r", "\nlon -", "天地玄", "黄宇宙"]
    for text, made in zip(texts, shingle_many(texts, PARAMETERS), strict=True):
        assert (made.spans.tolist(), made.sequence.tolist(), made.ends.tolist()) == slowly(text, PARAMETERS)


def test_no_texts() -> None:
    assert shingle_many([], PARAMETERS) == []
    assert sign([], PARAMETERS).shape == (0, 128)


# --- signatures -------------------------------------------------------------------------------------------


def of_datasketch(window: Prints, parameters: DedupeParameters) -> npt.NDArray[np.uint32]:
    """The signature made by `MinHash.update`, one shingle after the other."""
    sketch = MinHash(num_perm=parameters.num_perm, seed=parameters.seed, scheme="affine32", hashfunc=int)
    for value in window.tolist():
        sketch.update(value & 0xFFFFFFFF)
    return sketch.hashvalues


@given(
    st.lists(TEXTS, max_size=5),
    st.sampled_from([1, 42]),
    st.sampled_from([16, 128, 200]),
    st.sampled_from([1, 1 << 16]),
)
@settings(max_examples=150, deadline=None)
def test_signatures_are_those_of_datasketch(texts: list[str], seed: int, num_perm: int, block: int) -> None:
    parameters = DedupeParameters(seed=seed, num_perm=num_perm)
    windows = [text.sequence for text in shingle_many(texts, parameters)]  # empty ones among them
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shingles, "_BLOCK", block)
        rows = sign(iter(windows), parameters)
    assert (rows.dtype, rows.shape) == (np.uint32, (len(texts), num_perm))
    generated = MinHash.generator(
        [(window & np.uint64(0xFFFFFFFF)).tolist() for window in windows],
        num_perm=num_perm, seed=seed, scheme="affine32", hashfunc=int,
    )  # fmt: skip
    for row, window, sketch in zip(rows, windows, generated, strict=True):
        assert np.array_equal(row, of_datasketch(window, parameters))
        assert np.array_equal(row, sketch.hashvalues)


@given(st.lists(st.integers(0, MASK), max_size=40), st.integers(0, 3))
@settings(deadline=None)
def test_signatures_of_any_values(values: list[int], empty: int) -> None:
    window, nothing = np.array(values, dtype=np.uint64), np.empty(0, dtype=np.uint64)
    rows = sign([nothing] * empty + [window] + [nothing] * empty, PARAMETERS)
    assert np.array_equal(rows[empty], of_datasketch(window, PARAMETERS))
    assert (np.delete(rows, empty, axis=0) == 0xFFFFFFFF).all()
    assert np.array_equal(np.array(values, dtype=np.uint64), window)  # what is signed is left as it was


def test_signatures_go_back_into_datasketch() -> None:
    texts = ["the ferry had two captains and they did not speak", "nobody in the office would admit to winding it"]
    rows = sign((text.sequence for text in shingle_many(texts, PARAMETERS)), PARAMETERS)
    lean = list(to_lean(rows, PARAMETERS))
    assert all(isinstance(sketch, LeanMinHash) for sketch in lean)
    assert [sketch.hashvalues.tolist() for sketch in lean] == rows.tolist()
    made_there = MinHash(num_perm=128, seed=1, scheme="affine32", hashfunc=lambda s: fingerprint(s) & 0xFFFFFFFF)
    found = texts[0].split()
    for at in range(len(found) - 2):
        made_there.update(" ".join(found[at : at + 3]))
    assert LeanMinHash(made_there) == lean[0]
    lsh = MinHashLSH(num_perm=128, params=(64, 2))
    lsh.insert("ferry", made_there)
    assert [lsh.query(sketch) for sketch in lean] == [["ferry"], []]


def test_signing_does_not_load_datasketch() -> None:
    code = (
        "import sys; from pipeline.shingles import *; p = DedupeParameters(); sign([shingle('a b c', p).sequence], p);"
        "assert not {'datasketch', 'scipy', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# --- the benchmark ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_benchmark_runs_and_its_numbers_can_be_true(tmp_path: Path) -> None:
    out = tmp_path / "numbers.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.dedupe_signing", "--megabytes", "0.3", "--rounds", "1", "--json", out],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    found = json.loads(out.read_bytes())
    ways = {"ours", "update", "generator", "text-dedup", "datatrove", "rensa", "numba"}
    assert set(found["ways"]) | set(found["not_installed"]) == ways
    assert found["ways"]["ours"]["ours_faster"] == 1
    assert found["ways"]["update"]["ours_faster"] > 5
    assert 500 < found["bytes_per_passage"] < 2000
    assert all(name in done.stdout for name in ways)
