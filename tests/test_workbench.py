"""UWC's control on a real model: what it keeps, and what it says of what it forgets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import nn
from workspaces import KEPT, WORKS, with_settings

from pipeline.anchor import NO_ANCHOR, Anchor, build_anchor, retain_passages
from pipeline.errors import UsageError
from pipeline.metrics import exact_memorisation, score_passages
from pipeline.models import load_model, load_tokenizer, target_weights
from pipeline.passages import Passage, encode, passages_of
from pipeline.records import NeverSeenLevel
from pipeline.saliency import everything
from pipeline.settings import Settings
from pipeline.workbench import StepTexts, Workbench


@pytest.fixture(scope="module")
def network(model: Path) -> tuple[nn.Module, Any]:
    torch.set_num_threads(1)
    return load_model(model, "cpu"), load_tokenizer(model)


def workbench(network: tuple[nn.Module, Any], documents: Mapping[str, str], **calibrate: Any) -> Workbench:
    """One work to take out by gradient ascent, which wrecks what it is not stopped at."""
    net, tokenizer = network
    ascent = {"method": "ga", "iterations": 12, "learning_rate": 2e-3, "masked": False, "anchor_weight": 0.0}
    settings = Settings.model_validate(with_settings(unlearn=ascent, calibrate=calibrate))
    forget = {"A": passages_of(encode(tokenizer, "A", WORKS["one"]), settings.passages)}
    anchor: Anchor = NO_ANCHOR
    if documents:
        anchor = build_anchor(net, retain_passages(tokenizer, documents, settings.passages, 64), 16, 0, 2000)
    level = NeverSeenLevel(mean=0.35, std=0.07, passages=30, source="held-out")
    texts = StepTexts(forget=forget, trained=forget["A"], earlier={}, anchor=anchor)
    return Workbench(net, everything(target_weights(net)).mask, texts, level, settings, 0)


def extraction(bench: Workbench, passages: tuple[Passage, ...]) -> float:
    return fmean(s.extraction for s in score_passages(bench.model, passages, 0, 2000))


def test_uwc_keeps_what_is_retained_and_says_what_is_left(network: tuple[nn.Module, Any]) -> None:
    bench = workbench(network, KEPT, control="uwc")
    retain = tuple(bench.texts.anchor.passages)
    start = extraction(bench, retain)
    assert start > 0.1  # some of it is recited, or there would be nothing to keep
    found = bench.fitted()
    share = found.strength.point.alpha
    assert 0 < share < 1
    with bench.salient:
        bench.salient.displace(found.vector, -share)
        assert extraction(bench, retain) >= 0.95 * start
        left = exact_memorisation(score_passages(bench.model, bench.texts.forget["A"], 0, 2000))
        assert found.strength.point.forget == pytest.approx(left)
        assert found.strength.reached == (left <= bench.target)
        bench.salient.displace(found.vector, -1.0)
        assert extraction(bench, retain) < 0.95 * start  # the whole of it costs more than UWC allows
    assert extraction(bench, retain) == start  # the parent is back


def test_uwc_is_not_undone_by_a_repair(network: tuple[nn.Module, Any]) -> None:
    def mending(control: str) -> Workbench:
        bench = workbench(network, KEPT, control=control)
        more = {"repair_iterations": 5, "anchor_weight": 1.0}
        chosen = bench.settings.unlearn.model_copy(update=more)
        bench.settings = bench.settings.model_copy(update={"unlearn": chosen})
        return bench

    assert mending("target").has_repair and not mending("uwc").has_repair


def test_uwc_without_retain_text_is_wrong_use(network: tuple[nn.Module, Any]) -> None:
    with pytest.raises(UsageError, match=r"calibrate\.control = uwc: needs retain text"):
        workbench(network, {}, control="uwc").fitted()


def test_what_is_worked_on_again_is_not_held_where_it_is(network: tuple[nn.Module, Any]) -> None:
    """A text that is out already and worked on again is measured as an earlier one, and trained on."""
    net, tokenizer = network
    settings = Settings.model_validate(with_settings())
    new, again, out = (passages_of(encode(tokenizer, n, WORKS[n]), settings.passages) for n in ("one", "two", "three"))
    level = NeverSeenLevel(mean=0.35, std=0.07, passages=30, source="held-out")
    texts = StepTexts({"one": new, "two": again[:2]}, [*new, *again[:2]], {"two": again, "three": out})
    bench = Workbench(net, everything(target_weights(net)).mask, texts, level, settings, 0)
    assert bench.fit.earlier == [*again[2:], *out]
    assert bench.texts.earlier == {"two": again, "three": out}, "strengths are measured on all of it"


def test_what_is_on_hold_is_measured_and_never_left_to_do(network: tuple[nn.Module, Any]) -> None:
    """Both works are recited; the one on hold keeps the strength from counting as reached, but no fit works on it."""
    net, tokenizer = network
    settings = Settings.model_validate(with_settings(unlearn={"method": "ga", "masked": False}))
    works = {name: passages_of(encode(tokenizer, name, WORKS[name]), settings.passages) for name in ("one", "two")}
    level = NeverSeenLevel(mean=0.35, std=0.07, passages=30, source="held-out")
    for on_hold, left in ((frozenset(), {"one", "two"}), (frozenset({"two"}), {"one"})):
        texts = StepTexts({"one": works["one"]}, works["one"], {"two": works["two"]}, on_hold=on_hold)
        bench = Workbench(net, everything(target_weights(net)).mask, texts, level, settings, 0)
        assert {p.span.request_id for p in bench.remaining()} == left
        assert bench.worst(texts.earlier) > 0.9 and bench.fit.on_hold == on_hold
    # A reinstatement that brings such a text back keeps it out: there it is what the step works on.
    texts = StepTexts(works, works["one"], {"two": works["two"]}, on_hold=frozenset({"two"}))
    bench = Workbench(net, everything(target_weights(net)).mask, texts, level, settings, 0)
    assert {p.span.request_id for p in bench.remaining()} == {"one", "two"}
