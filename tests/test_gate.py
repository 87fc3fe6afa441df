"""The gate, case by case: each limit alone, exactly met, just broken, and all at once."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.gate import decide
from pipeline.records import Comparison, Evaluation, NeverSeenLevel, TextScore
from pipeline.settings import GateSettings

LIMITS = GateSettings(forget_tolerance=0.05, kept_share=0.8, perplexity_rise=0.1)
LEVEL = NeverSeenLevel(mean=0.2, std=0.05, passages=10, source="held-out")


def score(em: float = 0.0, nll: float = 2.0) -> TextScore:
    return TextScore(
        exact_memorisation=em, extraction_strength=0.0, rouge_1=None, rouge_l=None, longest_run=None, nll=nll
    )


def text(role: str, name: str, em: float = 0.0, nll: float = 2.0) -> Comparison:
    # The parent's score is absurd on purpose: no limit may be measured against it.
    return Comparison(name=name, role=role, before=score(0.0, 99.0), after=score(em, nll))  # type: ignore[arg-type]


THIS = text("this", "TD-1", 0.2)
V0 = {"k1": score(1.0), "k2": score(0.8), "h1": score(nll=3.0), "h2": score(nll=5.0)}


def judge(*items: Comparison) -> tuple[str, ...]:
    verdict = decide(Evaluation(level=LEVEL, comparisons=items), V0, LIMITS)
    assert verdict.accepted == (not verdict.reasons)
    return verdict.reasons


ALLOWED_RISE = math.log(1.1)

CASES: list[tuple[str, list[Comparison], list[str]]] = [
    ("forgotten", [THIS], []),
    ("exactly at the limit", [text("this", "TD-1", 0.25)], []),
    ("just above", [text("this", "TD-1", 0.2500001)], ["TD-1 (this)"]),
    ("an earlier one comes back", [THIS, text("earlier", "TD-0", 0.26)], ["TD-0 (earlier)"]),
    ("a repeat is held to it", [THIS, text("repeat", "TD-9", 0.5)], ["TD-9 (repeat)"]),
    ("a folded one is held to it", [THIS, text("folded", "TD-8", 0.5)], ["TD-8 (folded)"]),
    ("one not memorised is not", [THIS, text("not-memorised", "TD-7", 0.9)], []),
    ("kept exactly 80 % of v0", [THIS, text("kept", "k1", 0.8), text("kept", "k2", 0.64)], []),
    ("kept in the mean", [THIS, text("kept", "k1", 0.6), text("kept", "k2", 0.85)], []),
    ("kept too little", [THIS, text("kept", "k1", 0.8), text("kept", "k2", 0.63)], ["Kept works"]),
    ("held-out exactly 10 %", [THIS, text("held-out", "h1", nll=3.0 + ALLOWED_RISE)], []),
    ("held-out in the mean", [THIS, text("held-out", "h1", nll=3.15), text("held-out", "h2", nll=5.0)], []),
    ("held-out too much", [THIS, text("held-out", "h1", nll=3.0 + ALLOWED_RISE + 1e-6)], ["Held-out"]),
    ("held-out better", [THIS, text("held-out", "h1", nll=1.0)], []),
    ("held-out wrecked", [THIS, text("held-out", "h1", nll=5000.0)], ["Held-out"]),
    ("nothing", [], ["Nothing was unlearned"]),
    ("nothing in this step", [text("earlier", "TD-0", 0.1), text("kept", "k1", 1.0)], ["Nothing was unlearned"]),
]  # fmt: skip


@pytest.mark.parametrize(("items", "reasons"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_each_limit(items: list[Comparison], reasons: list[str]) -> None:
    found = judge(*items)
    assert len(found) == len(reasons)
    assert all(f.startswith(r) for f, r in zip(found, reasons, strict=True))


def test_every_reason_is_given_with_its_numbers() -> None:
    found = judge(
        text("earlier", "TD-0", 0.5), text("repeat", "TD-2", 0.75), text("kept", "k1", 0.1),
        text("held-out", "h1", nll=3.0 + math.log(1.5)),
    )  # fmt: skip
    assert len(found) == 4
    assert "0.500 is above 0.250" in found[0] and "0.750 is above 0.250" in found[1]
    assert "0.100 is below 80% of v0's 1.000" in found[2]
    assert "rose by 50.0% over v0, more than 10%" in found[3]


def test_losses_are_counted_from_v0_not_from_the_parent() -> None:
    parent = Comparison(name="k1", role="kept", before=score(0.5), after=score(0.5))
    assert judge(THIS, parent)  # nothing lost against the parent, half against v0
    held = Comparison(name="h1", role="held-out", before=score(nll=4.0), after=score(nll=4.0))
    assert judge(THIS, held)


@given(st.lists(st.tuples(st.sampled_from(["this", "earlier", "repeat", "folded"]), st.floats(0, 1)), max_size=8))
def test_accepted_only_if_all_are_at_the_level(items: list[tuple[str, float]]) -> None:
    found = judge(*(text(role, f"TD-{i}", em) for i, (role, em) in enumerate(items)))
    above = [i for i, (_, em) in enumerate(items) if em > 0.25 + 1e-9]
    assert [r for r in found if r.startswith("TD-")] == [r for i in above for r in found if r.startswith(f"TD-{i} ")]
    assert len(found) == len(above) + all(role == "earlier" for role, _ in items)


def test_a_step_that_changed_nothing_is_no_takedown() -> None:
    """What is memorised cannot be at the target with strength 0; the setting that makes it so is named."""
    found = decide(Evaluation(level=LEVEL, comparisons=(THIS,)), V0, LIMITS, idle=True)
    assert not found.accepted and len(found.reasons) == 1 and "calibrate.margin" in found.reasons[0]
