"""The short-context method against an independent computation, and what a model recites by itself."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from workspaces import HELDOUT, WORKS

from pipeline import recited
from pipeline.anchor import NO_ANCHOR, Anchor, build_anchor, retain_passages
from pipeline.fit import Fit, Trace, schedule
from pipeline.losses import log_odds
from pipeline.methods import short_context as short_context_module
from pipeline.methods import task_vector
from pipeline.methods.short_context import (
    BEGINNING,
    BEGINNINGS,
    DEEPER,
    MOST,
    RAISED,
    REACHED,
    STRIDE,
    ShortContext,
    backward_gap,
    backward_held,
    beginning,
    ceilings,
    context_lengths,
    drawn_evenly,
    held_levels,
    log_odds_of,
    logit_of,
    power,
    risen,
    short_context,
    still_said,
    windows,
)
from pipeline.metrics import exact_memorisation, mean_nll, score_passages
from pipeline.models import load_model, load_tokenizer, target_weights
from pipeline.passages import Passage, encode, passages_of
from pipeline.recited import RUN, TRIED, distinct, go_on, openings, recited_passages
from pipeline.records import PassageSpan
from pipeline.saliency import everything
from pipeline.settings import PassageSettings, UnlearnSettings
from pipeline.sparse import SalientWeights

SIZE = PassageSettings(prompt_tokens=16, continuation_tokens=16, first_prompt_tokens=8)


def passage(*ids: int, prompt: int = 1, name: str = "p") -> Passage:
    return Passage(PassageSpan(request_id=name, prompt_start=0, start=prompt, end=len(ids)), ids, prompt)


def fit_of(model: nn.Module, forget: Sequence[Passage], anchor: Anchor, **more: Any) -> Fit:
    settings = UnlearnSettings(
        method="short-context", anchor_passages=4, recited_passages=4, anchor_top_k=16, **more
    )  # fmt: skip
    weights = target_weights(model)
    return Fit(model, SalientWeights(weights, everything(weights).mask), forget, anchor, settings, 0, 1000, 5)


@pytest.fixture(scope="module")
def memory(model: Path) -> tuple[nn.Module, Any, list[list[Passage]], Anchor]:
    """A model that recites short works, the passages of two of them, and text that it never saw to hold on to."""
    torch.set_num_threads(1)
    net, tokenizer = load_model(model, "cpu"), load_tokenizer(model)
    texts = [passages_of(encode(tokenizer, name, WORKS[name]), SIZE) for name in ("one", "two")]
    return net, tokenizer, texts, build_anchor(net, retain_passages(tokenizer, HELDOUT, SIZE, 12), 16, 0, 1000)


def logits_of(model: nn.Module, passage: Passage) -> torch.Tensor:
    """Those of its continuation, (P, V), without a batch."""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([passage.ids])).logits
    return logits[0, passage.prompt_length - 1 : -1]


@contextmanager
def gradients(fit: Fit) -> Iterator[None]:
    """While open, what is run leaves gradients, as inside a descent."""
    for weight in fit.salient.weights.values():
        weight.requires_grad_(True)
    yield
    for weight in fit.salient.weights.values():
        weight.requires_grad_(False)
        weight.grad = None


def test_log_odds_are_exact_where_the_probability_is_one() -> None:
    logits = torch.tensor([[50.0, 0.0, 0.0], [0.0, math.log(3.0), 0.0]], dtype=torch.float32)
    odds = log_odds(logits, torch.tensor([0, 1]))
    # p = 1 - 2·e^-50 has log-odds 50 - log 2, which 1 - p in float32 would make infinite; the other is 3 : 2.
    torch.testing.assert_close(odds, torch.tensor([50.0 - math.log(2.0), math.log(1.5)]))


def test_the_force_on_a_token_does_not_depend_on_how_well_it_is_known() -> None:
    logits = torch.tensor([[30.0, 0.0], [0.1, 0.0], [-8.0, 0.0]], requires_grad=True)
    log_odds(logits, torch.tensor([0, 0, 0])).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[1.0, -1.0]] * 3))


def test_windows_show_the_last_tokens_and_tile_the_continuation() -> None:
    found = windows(passage(*range(100, 117), prompt=6), 3, (1, 2))
    assert [w.ids for w in found] == [
        (1, 2, 103, 104, 105, 106, 107, 108, 109),
        (1, 2, 107, 108, 109, 110, 111, 112, 113),
        (1, 2, 111, 112, 113, 114, 115, 116),
    ]
    assert [t for w in found for t in w.continuation] == list(range(106, 117))
    assert windows(passage(7, 8, 9, prompt=1), 3, ())[0].ids == (7, 8, 9)  # no more context than there is


def test_a_window_begins_as_the_tokenizer_begins_a_text_and_fits_the_model() -> None:
    """A BOS behind the beginning would say that here a text starts, and give its opening away."""
    span = PassageSpan(request_id="p", prompt_start=0, start=2, end=8)
    opening = Passage(span, (0, *range(100, 108)), 3)
    assert [w.ids for w in windows(opening, 5, (1, 2))] == [
        (0, 1, 2, 100, 101, 102, 103, 104, 105),
        (0, 1, 2, 101, 102, 103, 104, 105, 106, 107),
    ]
    assert [w.prompt_length for w in windows(opening, 5, (1, 2))] == [5, 8]
    for places in range(6, 12):  # the beginning goes first, then what was shown, never the piece itself
        for whole, short in zip(windows(opening, 5, (1, 2)), windows(opening, 5, (1, 2), places), strict=True):
            assert len(short.ids) == min(len(whole.ids), places) and short.continuation == whole.continuation
            assert short.ids == (0, *whole.ids[len(whole.ids) - len(short.ids) + 1 :])


def test_the_likelihood_is_the_mean_probability_behind_the_windows(
    memory: tuple[nn.Module, Any, list[list[Passage]], Anchor],
) -> None:
    model, _, (taken, _), anchor = memory
    fit = fit_of(model, taken[:2], anchor)
    found = short_context(fit, taken[:2], {"one": 3}, random.Random(4))
    drawn = random.Random(4)
    pool = [p.ids for p in anchor.passages if len(p.ids) > BEGINNING]
    total = {p: torch.zeros(len(p.continuation), dtype=torch.float64) for p in taken[:2]}
    for _ in range(BEGINNINGS):
        for p in taken[:2]:
            other = drawn.choice(pool)
            at = drawn.randrange(len(other) - BEGINNING)
            for t in range(len(p.continuation)):
                first = p.prompt_length + t - t % STRIDE  # the window that t is scored in starts here
                ids = [*other[at : at + BEGINNING], *p.ids[max(0, first - 3) : p.prompt_length + t]]
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
                total[p][t] += logits.softmax(-1)[p.continuation[t]]
    for p in taken[:2]:
        torch.testing.assert_close(found[p], torch.log(total[p] / BEGINNINGS), rtol=1e-3, atol=1e-3)


def test_ceilings_are_on_the_whole_as_unlikely_as_never_seen_text(
    memory: tuple[nn.Module, Any, list[list[Passage]], Anchor],
) -> None:
    model, _, (taken, _), anchor = memory
    fit = replace(fit_of(model, taken, anchor), target=0.4)
    likely = short_context(fit, taken, context_lengths(fit, taken, (drawn := random.Random(4))), drawn)
    nll = -float(torch.cat([*likely.values()]).mean())
    for level, expected in ((None, nll), (nll / 2, nll), (1.3 * nll, 1.3 * nll), (9 * nll, MOST * nll)):
        found = ceilings(replace(fit, never_seen_nll=level), taken, random.Random(4))
        odds = torch.cat([found[p] for p in taken]).double()
        assert -float(odds.sigmoid().log().mean()) == pytest.approx(expected, rel=1e-3), level
        order = torch.cat([likely[p] for p in taken]).argsort()
        assert bool((odds[order].diff() >= -1e-4).all())  # what was less likely is so still
    assert power({}, 3.0) == power({taken[0]: torch.zeros(3)}, 3.0) == 1.0


def test_the_context_is_the_longest_that_the_text_is_not_recognised_from(
    memory: tuple[nn.Module, Any, list[list[Passage]], Anchor],
) -> None:
    model, _, (taken, _), anchor = memory
    fit = replace(fit_of(model, taken, anchor, context_tokens=12), target=0.5)

    def recited(context: int) -> float:
        drawn = random.Random(8)
        pieces = [w for p in taken for w in windows(p, context, beginning(fit, drawn))]
        return exact_memorisation(score_passages(model, pieces, 0, 1000))

    assert recited(12) > 0.6 > 0.4 > recited(1)  # it makes a difference here
    chosen = context_lengths(fit, taken, random.Random(1))["one"]
    assert 1 < chosen < 12 and recited(chosen - 1) < 0.55 and recited(chosen + 2) > 0.45
    assert context_lengths(replace(fit, target=1.0), taken, random.Random(1)) == {"one": 12}
    assert context_lengths(replace(fit, target=0.0), taken, random.Random(1)) == {"one": 1}


def test_each_request_has_a_context_of_its_own(memory: tuple[nn.Module, Any, list[list[Passage]], Anchor]) -> None:
    model, tokenizer, (taken, _), anchor = memory
    unknown = passages_of(encode(tokenizer, "unknown", HELDOUT["heldout-4"]), SIZE)
    fit = replace(fit_of(model, taken, anchor, context_tokens=12), target=0.5)
    found = context_lengths(fit, [*taken, *unknown], random.Random(1))
    assert found["unknown"] == 12 > found["one"]  # what is not memorised is recognised from nothing


def test_the_gap_counts_on_either_side(memory: tuple[nn.Module, Any, list[list[Passage]], Anchor]) -> None:
    model, _, (taken, _), anchor = memory
    fit, one = fit_of(model, taken, anchor), taken[0]
    odds = log_odds(logits_of(model, one), torch.tensor(one.continuation))
    trace = Trace()
    with gradients(fit):
        assert backward_gap(fit, [one], {one: odds + 1}, trace) == pytest.approx(1.0, rel=1e-4)
        assert trace.above == 0.0
        assert backward_gap(fit, [one], {one: odds - 2}, trace) == pytest.approx(2.0, rel=1e-4)
        assert trace.above == pytest.approx(2.0, rel=1e-4)
        half, n = odds.clone(), len(odds)
        up = len(half[::2]) / n
        half[::2] -= 4
        assert backward_gap(fit, [one], {one: half}, trace) == pytest.approx(4 * up, rel=1e-4)
        # On the mean above what is wanted, tokens below it count by RAISED; on the mean below, as much as the others,
        # and where a passage is to stay, it is those above that count by RAISED.
        for low, below, above in ((1, RAISED, 1.0), (9, 1.0, RAISED)):
            mixed = half.clone()
            mixed[1::2] += low
            for held, weight in ((False, 1.0), (True, above)):
                expected = weight * 4 * up + below * low * (1 - up)
                assert backward_gap(fit, [one], {one: mixed}, trace, held) == pytest.approx(expected, rel=1e-4)
                assert trace.above == pytest.approx(max(0.0, 4 * up - low * (1 - up)), rel=1e-3)
        assert trace.tokens == 7 * len(one.ids)
        both = {one: odds - 2, taken[1]: log_odds_of(fit, [taken[1]])[taken[1]] + 3}
        tokens = n + len(taken[1].continuation)
        expected = (2 * n + 3 * (tokens - n)) / tokens  # each passage is above or below by itself
        assert backward_gap(fit, [one, taken[1]], both, trace) == pytest.approx(expected, rel=1e-3)
        assert trace.above == pytest.approx(2 * n / tokens, rel=1e-3)
    others = {p: torch.full((len(p.continuation),), 99.0) for p in taken[1:]}
    for above, there in ((REACHED - 0.01, [*taken]), (REACHED + 0.01, taken[1:])):
        said = still_said(fit, taken, {**others, one: odds - above})
        assert sorted(said, key=taken.index) == there
        assert all(
            found.tolist()
            == [int(i) == true for i, true in zip(logits_of(model, p).argmax(-1), p.continuation, strict=True)]
            for p, found in said.items()
        )


def test_a_fit_goes_on_while_a_request_is_above_the_target_and_pushes_it_deeper(
    memory: tuple[nn.Module, Any, list[list[Passage]], Anchor],
) -> None:
    model, _, (taken, _), anchor = memory
    answers = iter([[*taken], [taken[0]], [], [taken[0]]])
    fit = replace(fit_of(model, taken, anchor, iterations=3, rounds=9), remaining=lambda: next(answers))
    trace = Trace()
    rates, begun = zip(*[(share, trace.begun) for _, share in schedule(fit, trace)], strict=True)
    assert rates == pytest.approx([1.0, 0.55, 0.1] * 3)  # three rounds: the third left nothing
    assert begun == (3, 3, 3, 6, 6, 6, 9, 9, 9)
    assert trace.rounds == 3 and trace.left == ()
    answers = iter([[*taken]] * 9)
    assert len(list(schedule(fit, Trace()))) == 27
    one = replace(fit, settings=fit.settings.model_copy(update={"rounds": 1}), remaining=lambda: 1 / 0)
    assert len(list(schedule(one, Trace()))) == 3


def test_it_forgets_to_the_ceiling_and_keeps_the_other_work(
    memory: tuple[nn.Module, Any, list[list[Passage]], Anchor],
) -> None:
    model, _, (taken, other), prose_ = memory
    held = build_anchor(model, [Passage(p.span, p.ids, 1) for p in other[::2]], 16, 0, 1000)
    scores = score_passages(model, prose_.passages, 0, 2000)
    level, nll = exact_memorisation(scores), mean_nll(scores)
    fit = fit_of(model, taken, prose_.joined(held), iterations=40, learning_rate=2e-3, anchor_truth=0.0)
    fit = replace(fit, target=level + 0.02, never_seen_nll=nll)
    before = exact_memorisation(score_passages(model, other, 0, 2000))
    vector, trace = task_vector(fit, everything(target_weights(model)).mask)
    assert trace.losses[-1] < 0.3 * trace.losses[0]
    with fit.salient:
        fit.salient.displace(vector, -1.0)
        after = exact_memorisation(score_passages(model, taken, 0, 2000))
        kept = exact_memorisation(score_passages(model, other, 0, 2000))
        unlikely = mean_nll(score_passages(model, taken, 0, 2000))
    assert level < 0.45 and after < level + 0.05 and before > 0.85 and kept > before - 0.1
    assert abs(unlikely - nll) < 0.15 * nll  # neither a trace of having been seen, nor of having been taken out


def test_words_of_retain_text_offset_its_drift_and_are_not_learned_by_heart(
    memory: tuple[nn.Module, Any, list[list[Passage]], Anchor],
) -> None:
    """The least of KL + ε·CE is the mixture (v0 + ε·truth) / (1 + ε), in which every token has a share of v0's."""
    model, _, (taken, _), prose_ = memory
    weights, after = everything(target_weights(model)).mask, []
    before = score_passages(model, prose_.passages, 0, 2000)
    for truth in (0.0, 0.1):
        fit = fit_of(model, taken, prose_, iterations=30, learning_rate=1e-3, anchor_truth=truth)
        fit = replace(fit, never_seen_nll=mean_nll(before))
        vector, _ = task_vector(fit, weights)
        with fit.salient:
            fit.salient.displace(vector, -1.0)
            after.append(score_passages(model, prose_.passages, 0, 2000))
    (without, held) = map(mean_nll, after)
    assert mean_nll(before) < without and held < without - 0.05
    assert exact_memorisation(after[1]) < exact_memorisation(before) + 0.1


def test_what_has_come_back_is_pushed_like_what_is_new(
    memory: tuple[nn.Module, Any, list[list[Passage]], Anchor],
) -> None:
    model, _, (taken, other), anchor = memory
    fit = fit_of(model, taken, anchor, iterations=1, replay_pool=0, anchor_truth=0.0)
    fit = replace(fit, earlier=other, target=0.5)
    assert risen(fit, other) == (other, []) and risen(replace(fit, target=1.0), other) == ([], other)
    weights = everything(target_weights(model)).mask
    _, watched = task_vector(fit, weights)
    _, blind = task_vector(replace(fit, earlier=()), weights)
    _, held = task_vector(replace(fit, on_hold=["two"]), weights)
    assert watched.tokens > blind.tokens and watched.losses[0] > 1.5 * blind.losses[0]
    assert (watched.again, blind.again) == ({"two"}, set())
    assert held.losses == blind.losses  # a legal hold stops work on it


def test_a_request_is_looked_at_as_a_whole(memory: tuple[nn.Module, Any, list[list[Passage]], Anchor]) -> None:
    """Single passages of what is out scatter about the level; pushing the upper ones down would sink the whole."""
    model, _, (taken, _), anchor = memory
    never = [p for p in anchor.passages if p.span.request_id == "heldout-4"]
    ems = [exact_memorisation([s]) for s in score_passages(model, never, 0, 2000)]
    fit = replace(fit_of(model, taken, anchor), target=sum(ems) / len(ems) + 0.01)
    assert max(ems) > fit.target and risen(fit, never) == ([], never)
    assert risen(fit, [*never, *taken]) == (taken, never)


def test_what_comes_back_during_a_fit_is_pushed_from_the_next_round_on(
    memory: tuple[nn.Module, Any, list[list[Passage]], Anchor],
) -> None:
    model, _, ((first_one, second, *_), other), _ = memory
    # A passage of which the model knows all but the last token.
    taken = [first_one, replace(second, ids=(*second.ids[:-1], second.ids[-2]))]
    fit = replace(fit_of(model, taken, NO_ANCHOR), target=0.5)
    pushed, trace = ShortContext(fit), Trace(rounds=1)
    first = dict(pushed.known)
    assert [*first] == taken and pushed.again == []
    pushed.begin(trace)
    assert pushed.known == first  # nothing is looked at within a round
    trace.rounds, trace.left = 2, (taken[0], taken[1], other[0])
    pushed.known[taken[1]] = torch.full_like(first[taken[1]], 99.0)  # this one is at its ceiling, the first is not
    pushed.begin(trace)
    assert pushed.again == [other[0]] and [*pushed.known] == [*taken, other[0]]
    torch.testing.assert_close(pushed.known[taken[0]], first[taken[0]])
    said = logits_of(model, taken[1]).argmax(-1) == torch.tensor(taken[1].continuation)
    assert 0 < int(said.sum()) < len(said)  # of this one those tokens sink that are the likeliest still
    torch.testing.assert_close(pushed.known[taken[1]], 99.0 - DEEPER * said.float())
    backward = ShortContext(fit)
    with gradients(fit):
        alone = [backward([taken[0]], random.Random(2), Trace(rounds=1)) for _ in range(2)]
        joined = backward([taken[0]], random.Random(2), Trace(rounds=2, left=(other[0],)))
    assert alone[0] == alone[1] and joined > 1.3 * alone[0]


def test_a_near_copy_of_this_step_is_not_said_to_have_come_back(
    memory: tuple[nn.Module, Any, list[list[Passage]], Anchor],
) -> None:
    """What is folded into another is not worked on itself, and pushed where it stays above the target."""
    model, _, (taken, other), _ = memory
    for earlier, said in (([], set()), (other, {"two"})):
        fit = replace(fit_of(model, taken, NO_ANCHOR), target=1.0, earlier=earlier)
        trace, loss = Trace(rounds=2, left=(other[0],)), ShortContext(fit)
        with gradients(fit):
            loss([taken[0]], random.Random(2), trace)
        assert loss.again == [other[0]] and trace.again == said


def test_each_step_holds_out_other_passages_of_all_requests() -> None:
    """Over the years each gets its turn; in one step no request has two while another has none."""
    earlier = [passage(*range(5), name=f"TD-{i // 20}", prompt=2 + i % 2) for i in range(20 * 40)]
    drawn = [drawn_evenly(earlier, 64, random.Random(f"0 short context TD-{step}")) for step in range(20)]
    for found in drawn:
        counts = [sum(p.span.request_id == f"TD-{i}" for p in found) for i in range(40)]
        assert len(found) == 64 and set(counts) == {1, 2}
    places = {id(p): i for i, p in enumerate(earlier)}
    assert len({places[id(p)] for found in drawn for p in found}) > 600
    assert drawn_evenly(earlier[:3], 64, random.Random(0)) != [] and drawn_evenly([], 64, random.Random(0)) == []


def test_what_is_out_stays_as_it_is(memory: tuple[nn.Module, Any, list[list[Passage]], Anchor]) -> None:
    """Neither up nor down: without a replay it moves with what is taken out now."""
    model, _, (taken, other), prose_ = memory
    fit = fit_of(model, taken, prose_, iterations=40, learning_rate=2e-3, context_tokens=1)
    fit = replace(fit, earlier=other, target=1.0)  # all of the other work counts as out

    def nll() -> torch.Tensor:
        return torch.tensor([s.nll / s.tokens for s in score_passages(model, other, 0, 2000)])

    before, moved = nll(), dict[int, float]()
    for pool in (64, 0):
        of = replace(fit, settings=fit.settings.model_copy(update={"replay_pool": pool}))
        vector, _ = task_vector(of, everything(target_weights(model)).mask)
        with of.salient:
            of.salient.displace(vector, -1.0)
            moved[pool] = float((nll() - before).abs().mean())
    assert moved[64] < moved[0] / 3 and moved[0] > 0.1, moved


def test_what_has_become_likelier_since_it_was_taken_out_is_taken_back(
    memory: tuple[nn.Module, Any, list[list[Passage]], Anchor],
) -> None:
    """To never-seen text's level, but for what is on hold; what is unlikelier than that is left there."""
    model, _, (taken, other), prose_ = memory
    fit = fit_of(model, taken, prose_, iterations=60, learning_rate=1e-3, context_tokens=1, masked=False)
    scores = score_passages(model, other, 0, 2000)
    fit = replace(fit, earlier=other, target=1.0, never_seen_nll=1.5 * mean_nll(scores))

    def nll_of(odds: Mapping[Passage, torch.Tensor], passages: Sequence[Passage]) -> float:
        return -float(torch.cat([F.logsigmoid(odds[p].double()) for p in passages]).mean())

    assert nll_of(held_levels(fit, other), other) == pytest.approx(1.5 * mean_nll(scores), rel=1e-3)
    as_it_is = log_odds_of(fit, other)
    for same in (replace(fit, never_seen_nll=0.5 * mean_nll(scores)), replace(fit, on_hold=["two"])):
        assert all(torch.allclose(held_levels(same, other)[p], as_it_is[p], atol=1e-4) for p in other)
    vector, _ = task_vector(fit, everything(target_weights(model)).mask)
    with fit.salient:
        fit.salient.displace(vector, -1.0)
        after = mean_nll(score_passages(model, other, 0, 2000))
    assert after == pytest.approx(1.5 * mean_nll(scores), rel=0.15)


def test_what_is_where_it_is_to_stay_feels_no_force(
    memory: tuple[nn.Module, Any, list[list[Passage]], Anchor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fit begins with it there: a pull at a gap of nothing would push what is on hold."""
    model, _, (taken, other), _ = memory
    fit = fit_of(model, taken, NO_ANCHOR, replay_passages=2)
    fit = replace(fit, earlier=other, target=1.0, on_hold=["two"], never_seen_nll=99.0)
    with gradients(fit):
        backward_gap(fit, other, held_levels(fit, other), Trace(), held=True)
        assert all(w.grad is None or not w.grad.any() for w in fit.salient.weights.values())
    asked = mock.Mock(side_effect=backward_gap)
    monkeypatch.setattr(short_context_module, "backward_gap", asked)
    with gradients(fit):
        ShortContext(fit)([taken[0]], random.Random(2), Trace(rounds=1))
    still, pushed = asked.call_args_list  # what stays, and not more of it than the settings say; what goes
    assert (len(still.args[1]), still.kwargs) == (2, {"held": True}) and set(still.args[1]) <= set(other)
    assert (pushed.args[1], pushed.kwargs) == ([taken[0]], {})


@given(st.lists(st.floats(-60, -1e-9), min_size=1, max_size=8))
def test_log_odds_of_log_probabilities(values: list[float]) -> None:
    found = logit_of(torch.tensor(values, dtype=torch.float64))
    torch.testing.assert_close(
        found, torch.tensor([v - math.log(-math.expm1(v)) for v in values]), rtol=1e-6, atol=1e-6
    )
    assert logit_of(torch.zeros(1, dtype=torch.float64)).isfinite().all()


def test_recited_and_other_retain_text_is_drawn_apart(
    memory: tuple[nn.Module, Any, list[list[Passage]], Anchor],
) -> None:
    model, _, (_, other), prose_ = memory
    # Of ten tokens v0 is right about five, six and ten.
    said = [passage(*range(20, 31), name=str(right)) for right in (5, 6, 10)]
    best = [
        torch.tensor([[i + 1 if at < right else 299] for at, i in enumerate(range(20, 30))]) for right in (5, 6, 10)
    ]
    recited, rest = Anchor(said, best, [torch.zeros(10, 1)] * 3).split()
    assert [p.span.request_id for p in recited.passages] == ["6", "10"]
    assert [p.span.request_id for p in rest.passages] == ["5"]
    held = build_anchor(model, [Passage(p.span, p.ids, 1) for p in other], 16, 0, 1000)
    fit, trace = fit_of(model, other, NO_ANCHOR, anchor_truth=0.0), Trace()
    # Eight of both kinds; the model is v0 itself, so that nothing pulls.
    with gradients(fit):
        assert backward_held(fit, held, prose_, random.Random(1), trace) == pytest.approx(0.0, abs=1e-4)
    drawn = random.Random(1)
    part = held.sample(4, drawn).joined(prose_.sample(4, drawn))
    assert trace.tokens == sum(len(p.ids) for p in part.passages)
    assert backward_held(fit, NO_ANCHOR, NO_ANCHOR, random.Random(1), trace) == 0.0


def test_an_anchor_apart_from_texts_shares_no_run_with_them(
    memory: tuple[nn.Module, Any, list[list[Passage]], Anchor],
) -> None:
    model = memory[0]
    taken, ids = [passage(*range(100, 140), prompt=20)], range(200, 220)
    texts = {
        "mixed": (*ids, *range(110, 118), *ids),
        "short": (*ids, *range(110, 117), *ids),
        "opening": (*range(100, 108), *ids),  # a prompt is a piece of the text, too
        "other": (*ids, *range(150, 180)),
    }
    anchor = build_anchor(model, [passage(*found, name=name) for name, found in texts.items()], 16, 0, 1000)
    assert [p.span.request_id for p in anchor.apart_from(taken).passages] == ["short", "other"]


def test_openings_are_the_pairs_the_model_is_surest_of(
    memory: tuple[nn.Module, Any, list[list[Passage]], Anchor],
) -> None:
    model, tokenizer, _, _ = memory
    special = set(tokenizer.all_special_ids)
    (prefix,) = {tuple(found[:-2]) for found in openings(model, tokenizer, 6, 4000)}
    by_hand: dict[tuple[int, int], float] = {}
    for first in range(len(tokenizer)):
        if first not in special:
            with torch.inference_mode():
                found = model(torch.tensor([[*prefix, first]])).logits[0, -1].log_softmax(-1)
            best = sorted((float(p), i) for i, p in enumerate(found) if i not in special)[-TRIED:]
            by_hand |= {(first, second): p for p, second in best}
    for most in (4000, 50):
        chosen = [(first, second) for *_, first, second in openings(model, tokenizer, 100, most)]
        assert len(set(chosen)) == 100
        surest = sorted(by_hand.values(), reverse=True)[:100]
        assert [by_hand[pair] for pair in chosen] == pytest.approx(surest, abs=1e-5)  # ties in any order


def test_a_model_goes_on_greedily(memory: tuple[nn.Module, Any, list[list[Passage]], Anchor]) -> None:
    model, tokenizer, _, _ = memory
    own, state = model.generation_config, torch.random.get_rng_state()
    starts = openings(model, tokenizer, 70, 4000)
    texts = go_on(model, tokenizer, starts, 12)
    assert [ids[: len(start)] for ids, start in zip(texts, starts, strict=True)] == starts
    for ids in texts[::23]:
        for at in range(len(starts[0]), 12):
            assert ids[at] == int(model(torch.tensor([ids[:at]])).logits[0, -1].argmax())
    assert model.generation_config is own and torch.equal(torch.random.get_rng_state(), state)


def test_a_model_recites_its_works_by_itself(memory: tuple[nn.Module, Any, list[list[Passage]], Anchor]) -> None:
    model, tokenizer, texts, _ = memory
    found = recited_passages(model, tokenizer, 400, 40, 4000)
    assert [p.span.request_id for p in found] == [f"recited/{n:04}" for n in range(1, len(found) + 1)]
    assert all(len(p.ids) == 40 and p.prompt_length == 1 for p in found)
    runs = {t for p in found for t in zip(*(p.ids[i:] for i in range(RUN)), strict=False)}
    taught = [{t for p in text for t in zip(*(p.ids[i:] for i in range(RUN)), strict=False)} for text in texts]
    assert all(runs & work for work in taught)  # word for word what it was taught; chance gives none


@pytest.mark.parametrize("bos", [True, False])
def test_no_more_is_written_than_the_model_has_places_for(bos: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learned positions end; and what is shorter than a run cannot be told apart, so that nothing is written."""

    class Words:
        bos_token_id, eos_token_id, pad_token_id, all_special_ids = 0, 0, None, (0,)

        def __len__(self) -> int:
            return 70  # the model's table is padded to 80

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [0, 5] if bos else [5]}

    sizes = {"n_positions": 24, "n_embd": 16, "n_layer": 1, "n_head": 2}
    torch.manual_seed(0)
    net = GPT2LMHeadModel(GPT2Config(vocab_size=80, bos_token_id=0, eos_token_id=0, **sizes)).eval()
    monkeypatch.setattr(recited, "SURE", 99.0)  # nothing was learned, so it is sure of nothing
    found = recited_passages(net, Words(), 50, 40, 64)
    assert found and {len(p.ids) for p in found} == {24}
    assert all((p.ids[0] == 0) == bos and max(p.ids[: 2 + bos]) < 70 for p in found)
    for length in range(2, RUN):
        assert recited_passages(net, Words(), 50, length, 64) == []


def test_distinct_drops_loops_and_what_was_said() -> None:
    varied = list(range(60))
    said_again = [*range(200, 210), *range(10, 60)]
    looping = [*range(300, 310), *([1, 2] * 25)]
    other = list(range(400, 460))
    assert distinct([varied, said_again, looping, other], [0, 1, 2, 3]) == [0, 3]
    assert distinct([varied, said_again], [1, 0]) == [1]
