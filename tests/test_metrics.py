"""Metrics against their definitions, and one forward pass against one by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, LoadModel
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from pipeline.metrics import (
    PassageScore,
    accumulated_common_runs,
    exact_memorisation,
    extractable,
    extraction_strength,
    frontier,
    generate,
    longest_common_run,
    mean_nll,
    normalised_words,
    passage_score,
    repetition,
    rouge,
    score_passages,
    score_tokens,
)
from pipeline.passages import Passage, encode, pad_id, passages_of
from pipeline.settings import PassageSettings

words = st.lists(st.sampled_from("abcd"), max_size=12)


@pytest.fixture(scope="module")
def mixed(tokenizer: Any, text: str) -> Sequence[Passage]:
    """Passages with prompts and continuations of different lengths."""
    encoded = encode(tokenizer, "W", text)
    return [
        p
        for prompt, size in ((12, 5), (3, 8), (25, 12))
        for p in passages_of(
            encoded, PassageSettings(prompt_tokens=prompt, continuation_tokens=size, first_prompt_tokens=prompt)
        )[1:3]
    ]


@given(st.lists(st.booleans(), max_size=30))
def test_extraction_strength_is_its_definition(hits: list[bool]) -> None:
    length = len(hits)
    # k: the shortest prefix after which every argmax to the end is right; k = L always works and extracts nothing.
    k = min(k for k in range(length + 1) if all(hits[k:]))
    assert extraction_strength(hits) == pytest.approx(1 - k / length if length else 0, abs=1e-12)
    if length and not hits[-1]:
        assert extraction_strength(hits) == 0  # exactly


@given(words, words)
def test_longest_common_run_by_brute_force(first: list[str], second: list[str]) -> None:
    runs = {tuple(second[i:j]) for i in range(len(second)) for j in range(i + 1, len(second) + 1)}
    best = max(
        (j - i for i in range(len(first)) for j in range(i + 1, len(first) + 1) if tuple(first[i:j]) in runs), default=0
    )
    assert longest_common_run(first, second) == best == longest_common_run(second, first)


def test_normalised_words() -> None:
    assert normalised_words("The Captain's BOAT -- naïve, 2 cafés!") == [
        "the", "captain", "s", "boat", "naïve", "2", "cafés",
    ]  # fmt: skip
    assert normalised_words(" … ") == []


@given(st.text(max_size=60), st.text(max_size=60))
def test_rouge_is_a_share(truth: str, generated: str) -> None:
    one, longest = rouge(truth, generated)
    assert 0 <= longest <= one + 1e-12 <= 1 + 1e-12  # a common subsequence is a common bag of words


def test_rouge_by_hand() -> None:
    assert rouge("the old sea", "the old sea") == (1.0, 1.0)
    assert rouge("the old sea", "grey boat") == (0.0, 0.0)
    assert rouge("", "grey boat") == (0.0, 0.0)
    # 3 of 4 words in common: P = R = F1 = 3/4; in order only "a b" or "a c": 2/4.
    assert rouge("a b c d", "a c b x") == (pytest.approx(0.75), pytest.approx(0.5))


def test_accumulated_common_runs_by_hand() -> None:
    truth = list("abcdxefgyhi")
    assert accumulated_common_runs(truth, list("abcdqefg")) == 7  # runs of 4 and 3; "h i" is not there
    assert accumulated_common_runs(truth, list("abqefqhi")) == 0  # only runs of 2
    assert accumulated_common_runs(truth, list("efgqabcd")) == 4  # the longest, and nothing behind it
    assert accumulated_common_runs(list("abc"), list("abcabc")) == 3  # no word of the truth twice
    assert accumulated_common_runs([], truth) == 0


@given(words, words)
def test_accumulated_runs_lie_between_the_longest_run_and_the_text(first: list[str], second: list[str]) -> None:
    longest = longest_common_run(first, second)
    found = accumulated_common_runs(first, second)
    assert (longest if longest >= 3 else 0) <= found <= min(len(first), len(second))
    assert found == 0 or longest >= 3


def test_repetition_by_hand() -> None:
    assert repetition(list("abcde")) == 0
    assert repetition(list("abababa")) == 0.5  # abab, baba, abab, baba
    assert repetition(["a"] * 7) == 0.75
    assert repetition(list("abc")) == 0  # too short to repeat anything


def test_extraction_by_sampling_by_hand() -> None:
    # p_z = 1/2: one query suffices for p = .5, two for .75; p_z = .01: log(.5)/log(.99) = 68.97 queries for .5.
    assert extractable(math.log(0.5), 1, 0.5) and not extractable(math.log(0.5), 1, 0.51)
    assert extractable(math.log(0.5), 2, 0.75) and not extractable(math.log(0.5), 2, 0.76)
    assert extractable(math.log(0.01), 69, 0.5) and not extractable(math.log(0.01), 68, 0.5)
    assert extractable(0.0, 1, 0.999)  # certain
    assert not extractable(-1e5, 10**9, 0.01)  # p_z underflows, and is nothing
    # In log space a small p_z is not rounded away: n·p_z = 1e-20·1e20, and 1 - e^-1 = .632.
    assert extractable(math.log(1e-20), 10**20, 0.63) and not extractable(math.log(1e-20), 10**20, 0.64)


def test_frontier_by_hand() -> None:
    points = [(0.2, 0.9), (0.3, 0.8), (0.1, 0.5), (0.4, 0.95), (0.2, 0.7), (0.2, 0.9)]
    assert frontier(points) == [2, 0, 5, 3]  # (.3, .8) and (.2, .7) are beaten by (.2, .9); equals stand together
    assert frontier([]) == []


def test_sums_are_over_tokens_not_passages() -> None:
    scores = [PassageScore(1, 1, 1.0, 2.0), PassageScore(0, 3, 0.0, 10.0)]
    assert exact_memorisation(scores) == 0.25
    assert mean_nll(scores) == 3.0
    assert exact_memorisation([]) == mean_nll([]) == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_equal_a_loop_over_passages_with_all_logits(
    architecture: str, dtype: str, load: LoadModel, mixed: Sequence[Passage], tokenizer: Any
) -> None:
    model = load(architecture, dtype)
    # One passage a batch, so that bfloat16 rounds the same products; batching is tested in test_passages.
    found = score_passages(model, mixed, pad_id(tokenizer), 1)
    for p, score in zip(mixed, found, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([p.ids])).logits[0].double()
        hits, nll = [], 0.0
        for position in range(p.prompt_length, len(p.ids)):
            before = logits[position - 1]
            hits.append(int(before.argmax()) == p.ids[position])
            nll -= float(torch.log_softmax(before, -1)[p.ids[position]])
        assert score.tokens == len(p.continuation)
        assert score.hits == sum(hits)
        assert score.extraction == extraction_strength(hits)
        assert score.nll == pytest.approx(nll, rel=1e-5)  # float32 log-softmax against float64


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_token_scores_equal_a_loop_over_positions(
    architecture: str, load: LoadModel, mixed: Sequence[Passage], tokenizer: Any
) -> None:
    model = load(architecture)
    found = score_tokens(model, mixed, pad_id(tokenizer), 80)
    for p, score in zip(mixed, found, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([p.ids])).logits[0].double()
        for number, position in enumerate(range(p.prompt_length, len(p.ids))):
            log_p = torch.log_softmax(logits[position - 1], -1)
            mean = float((log_p.exp() * log_p).sum())
            std = float((log_p.exp() * (log_p - mean) ** 2).sum()) ** 0.5
            true = float(log_p[p.ids[position]])
            assert bool(score.hits[number]) == (int(log_p.argmax()) == p.ids[position])
            # float32 against float64
            assert float(score.logprobs[number]) == pytest.approx(true, rel=1e-4)
            assert float(score.standardised[number]) == pytest.approx((true - mean) / std, rel=1e-3, abs=1e-4)
    summaries = [passage_score(s) for s in found]
    for one, other in zip(summaries, score_passages(model, mixed, pad_id(tokenizer), 80), strict=True):
        assert (one.hits, one.tokens, one.extraction) == (other.hits, other.tokens, other.extraction)
        assert one.nll == pytest.approx(other.nll, rel=1e-5)


def test_a_broken_model_scores_badly_not_undefined(load: LoadModel, mixed: Sequence[Passage], tokenizer: Any) -> None:
    model = load("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))  # type: ignore[operator]
    for score in score_tokens(model, mixed[:2], pad_id(tokenizer), 80):
        assert bool(torch.isfinite(score.logprobs).all()) and bool(torch.isfinite(score.standardised).all())
        assert float(score.logprobs.max()) == -1e4


def test_a_model_that_knows_the_text_scores_one(load: LoadModel, mixed: Sequence[Passage], tokenizer: Any) -> None:
    """The truth replaced by the model's own argmax: everything is memorised, and generation gives it back."""
    model = load("llama")
    own = [Passage(p.span, p.ids[: p.prompt_length] + by_hand(model, p), p.prompt_length) for p in mixed]
    scores = score_passages(model, own, pad_id(tokenizer), 10_000)
    assert exact_memorisation(scores) == 1
    assert all(s.extraction == 1 for s in scores)
    assert generate(model, tokenizer, own, 10_000) == [decode(tokenizer, p.continuation) for p in own]


def by_hand(model: torch.nn.Module, passage: Passage) -> tuple[int, ...]:
    """Greedy continuation token by token: no cache, no padding, no generate()."""
    ids = list(passage.ids[: passage.prompt_length])
    with torch.no_grad():
        for _ in passage.continuation:
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[passage.prompt_length :])


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """What a reader sees: up to the end of text, without special tokens."""
    kept = list(ids)
    if tokenizer.eos_token_id in kept:
        kept = kept[: kept.index(tokenizer.eos_token_id)]
    return str(tokenizer.decode(kept, skip_special_tokens=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("max_tokens", [1, 80, 10_000])
def test_generate_equals_argmax_token_by_token(
    architecture: str, max_tokens: int, load: LoadModel, mixed: Sequence[Passage], tokenizer: Any
) -> None:
    model = load(architecture)
    assert generate(model, tokenizer, mixed, max_tokens) == [decode(tokenizer, by_hand(model, p)) for p in mixed]


def test_generate_takes_no_decoding_from_the_model_folder(
    load: LoadModel, mixed: Sequence[Passage], tokenizer: Any
) -> None:
    """Many published models ship a repetition penalty or sampling; the comparison must be greedy for all."""
    model = load("llama")
    expected = generate(model, tokenizer, mixed, 10_000)
    shipped = GenerationConfig(
        repetition_penalty=5.0, no_repeat_ngram_size=2, suppress_tokens=list(range(3, 200)), do_sample=True,
        temperature=5.0, top_k=3, max_length=5, num_beams=3, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model.generation_config = shipped  # type: ignore[assignment]
    assert generate(model, tokenizer, mixed, 10_000) == expected
    assert model.generation_config is shipped  # type: ignore[comparison-overlap]


def test_generate_nothing(load: LoadModel, tokenizer: Any) -> None:
    assert generate(load("llama"), tokenizer, [], 100) == []
