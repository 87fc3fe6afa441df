"""Membership scores, AUC and PrivLeak against numbers worked by hand."""

from __future__ import annotations

import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.membership import ATTACKS, auc, lowest_mean, privleak
from pipeline.metrics import TokenScores

values = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=8)


def tokens(logprobs: list[float], standardised: list[float]) -> TokenScores:
    return TokenScores(torch.zeros(len(logprobs), dtype=torch.bool), torch.tensor(logprobs), torch.tensor(standardised))


def test_scores_by_hand() -> None:
    found = tokens([-1.0, -4.0, -2.0, -3.0, -0.5], [0.5, -2.0, 1.0, -1.0, 0.0])
    text = "the grey old sea, the grey old sea"
    assert ATTACKS["loss"](found, text) == pytest.approx(-10.5 / 5)
    assert ATTACKS["zlib"](found, text) == pytest.approx(-10.5 / len(zlib.compress(text.encode())))
    assert ATTACKS["min-k"](found, text) == pytest.approx((-4.0 - 3.0) / 2)  # 40 % of 5 tokens are 2
    assert ATTACKS["min-k++"](found, text) == pytest.approx((-2.0 - 1.0) / 2)


def test_lowest_mean_takes_at_least_one() -> None:
    assert lowest_mean(torch.tensor([3.0, 1.0])) == 1.0
    assert lowest_mean(torch.tensor([3.0, 1.0]), 1.0) == 2.0


def test_auc_by_hand() -> None:
    assert auc([2.0, 3.0], [0.0, 1.0]) == 1
    assert auc([0.0, 1.0], [2.0, 3.0]) == 0
    assert auc([1.0], [1.0]) == 0.5
    assert auc([1.0, 2.0], [0.0, 1.0, 3.0]) == (1 + 0.5 + 0 + 1 + 1 + 0) / 6
    with pytest.raises(ValueError, match="both kinds"):
        auc([], [1.0])


@given(values, values)
def test_auc_is_antisymmetric_and_blind_to_monotone_maps(first: list[float], second: list[float]) -> None:
    found = auc(first, second)
    assert auc(second, first) == pytest.approx(1 - found)
    assert auc([2 * v + 1 for v in first], [2 * v + 1 for v in second]) == found


def test_privleak_by_hand() -> None:
    assert privleak(0.5, 0.5) == 0
    assert privleak(1.0, 0.5) == -100  # recites: fully told apart
    assert privleak(0.0, 0.5) == 100  # predicted worse than any unseen text
    assert privleak(0.64, 0.52) == pytest.approx(-25)  # s = .36 against .48
    assert privleak(0.7, 1.0) is None
