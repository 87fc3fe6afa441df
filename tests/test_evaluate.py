"""Evaluation: scores of texts from scores of passages, by hand; the level of never-seen text."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import pytest
from conftest import LoadModel
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluate import never_seen_level, score_texts, spread, summarise
from pipeline.metrics import (
    PassageScore,
    generate,
    longest_common_run,
    normalised_words,
    rouge,
    score_passages,
)
from pipeline.passages import Passage
from pipeline.records import NeverSeenLevel
from pipeline.settings import ScreenSettings

SCREEN = ScreenSettings(assumed_mean=0.4, assumed_std=0.1)


def scored(*hits: int) -> list[PassageScore]:
    return [PassageScore(h, 10, 0.0, 1.0) for h in hits]


def test_summarise_by_hand() -> None:
    scores = [PassageScore(3, 4, 0.5, 2.0), PassageScore(1, 4, 0.0, 6.0), PassageScore(2, 2, 1.0, 0.5)]
    pairs = [("the grey old sea", "The grey, old boat!"), ("home again", "under the sea")]
    found = summarise(scores, pairs)
    assert found.exact_memorisation == 6 / 10  # over tokens, not the mean of passages
    assert found.extraction_strength == 0.5
    assert found.nll == 8.5 / 10
    assert found.rouge_1 == pytest.approx((0.75 + 0) / 2)  # 3 of 4 words in common; none
    assert found.rouge_l == pytest.approx((0.75 + 0) / 2)
    assert found.longest_run == 3  # "the grey old", whatever the case and punctuation; the largest of the passages


def test_summarise_without_generation() -> None:
    found = summarise(scored(5), [])
    assert found.rouge_1 is found.rouge_l is found.longest_run is None


@given(length=st.integers(0, 50), count=st.integers(0, 60))
def test_spread_is_even(length: int, count: int) -> None:
    passages: list[Any] = list(range(length))
    found: list[Any] = spread(passages, count)
    assert len(found) == min(count, length) == len(set(found))
    assert found == sorted(found)
    if found:
        assert found[0] == 0
        gaps = [b - a for a, b in zip(found, [*found[1:], length], strict=True)]
        assert max(gaps) - min(gaps) <= 1


def test_score_texts_puts_scores_to_their_texts(load: LoadModel, tokenizer: Any, passages: Sequence[Passage]) -> None:
    model = load("llama")
    texts = {"one": passages[:1], "empty": [], "three": passages[1:4], "two": passages[4:6]}
    found = score_texts(model, tokenizer, texts, 2, 60)
    assert list(found) == ["one", "three", "two"]  # a text without passages is left out
    for name, score in found.items():
        alone = score_passages(model, texts[name], 0, 60)
        assert score.exact_memorisation == sum(s.hits for s in alone) / sum(s.tokens for s in alone)
        assert score.extraction_strength == pytest.approx(statistics.fmean(s.extraction for s in alone))
        assert score.nll == pytest.approx(sum(s.nll for s in alone) / sum(s.tokens for s in alone), rel=1e-5)
        picked = spread(texts[name], 2)
        answers = generate(model, tokenizer, picked, 60)
        truths = [tokenizer.decode(p.continuation) for p in picked]
        pairs = list(zip(truths, answers, strict=True))
        assert score.rouge_1 == pytest.approx(statistics.fmean(rouge(t, a)[0] for t, a in pairs))
        assert score.rouge_l == pytest.approx(statistics.fmean(rouge(t, a)[1] for t, a in pairs))
        assert score.longest_run == max(longest_common_run(normalised_words(t), normalised_words(a)) for t, a in pairs)
    teacher = score_texts(model, tokenizer, texts, 0, 60)
    assert all(s.rouge_1 is None and s.longest_run is None for s in teacher.values())
    assert teacher["two"].exact_memorisation == found["two"].exact_memorisation
    assert score_texts(model, tokenizer, {}, 2, 60) == {}


def test_level_from_held_out_text() -> None:
    found = never_seen_level(scored(1, 2, 3), scored(9, 9, 9), SCREEN)
    assert (found.source, found.passages) == ("held-out", 3)
    assert found.mean == pytest.approx(0.2)
    assert found.std == pytest.approx(statistics.pstdev([0.1, 0.2, 0.3]))


def test_level_from_retain_text_ignores_what_is_memorised_there() -> None:
    found = never_seen_level(scored(5), scored(1, 2, 3, 10, 10), SCREEN)  # a single held-out passage is no evidence
    assert (found.source, found.passages) == ("retain", 5)
    assert found.mean == pytest.approx(0.3)  # the median
    assert found.std == pytest.approx(((0.2**2 + 0.1**2 + 0) / 3) ** 0.5)  # of the lower half around it
    less = never_seen_level([], scored(1, 2, 3, 4, 5), SCREEN)
    assert found.std == pytest.approx(less.std) and found.mean == pytest.approx(less.mean)


@pytest.mark.parametrize(("held_out", "retain"), [([], []), (scored(1), scored(1))])
def test_level_assumed(held_out: list[PassageScore], retain: list[PassageScore]) -> None:
    found = never_seen_level(held_out, retain, SCREEN)
    assert (found.source, found.passages, found.mean, found.std) == ("assumed", 0, 0.4, 0.1)


def test_the_level_has_a_likelihood_where_it_was_measured() -> None:
    held = [PassageScore(2, 10, 0.0, 30.0), PassageScore(3, 10, 0.0, 50.0), PassageScore(10, 10, 0.0, 0.1)]
    assert never_seen_level(held, [], SCREEN).nll == pytest.approx(4.0)  # the recited one was seen
    assert never_seen_level([], held, SCREEN).nll == pytest.approx(3.0)  # the median, whichever were
    assumed = never_seen_level([], [], SCREEN)
    assert assumed.nll is None and "nll" not in assumed.model_dump(mode="json")  # as it was written before
    assert NeverSeenLevel.model_validate(found := never_seen_level(held, [], SCREEN).model_dump()).nll == found["nll"]


def test_the_level_weighs_passages_not_tokens() -> None:
    scores = [PassageScore(1, 2, 0.0, 1.0), PassageScore(0, 100, 0.0, 1.0), PassageScore(0, 0, 0.0, 0.0)]
    found = never_seen_level(scores, [], SCREEN)
    assert found.mean == 0.25 and found.passages == 2  # an empty passage says nothing
