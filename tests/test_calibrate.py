"""Calibration on made-up curves: whatever their shape, the answer was measured and is the best one tried."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.calibrate import Strength, find_strength, retained_mix
from pipeline.records import CurvePoint


class Curve:
    """A measurable curve that remembers where it was measured."""

    def __init__(
        self, forget: Callable[[float], float], utility: Callable[[float], float] | None = None,
        earlier: Callable[[float], float] | None = None,
    ) -> None:  # fmt: skip
        self.forget, self.utility, self.earlier = forget, utility, earlier
        self.tried: list[float] = []

    def __call__(self, alpha: float) -> CurvePoint:
        self.tried.append(alpha)
        return CurvePoint(
            alpha=alpha,
            forget=self.forget(alpha),
            earlier=self.earlier(alpha) if self.earlier else None,
            utility_nll=self.utility(alpha) if self.utility else None,
        )


def falling(threshold: float) -> Callable[[float], float]:
    """1 below a strength, 0 from it on."""
    return lambda alpha: 0.0 if alpha >= threshold else 1.0


def check_honest(found: Strength, curve: Curve, target: float, rise: float | None) -> None:
    """What holds for every curve."""
    points = {p.alpha: p for p in found.curve}
    assert [p.alpha for p in found.curve] == sorted(points)
    assert sorted(curve.tried) == sorted(points)  # nothing measured twice, nothing left out
    assert points[found.point.alpha] == found.point

    def good(p: CurvePoint) -> bool:
        return p.forget <= target and (p.earlier is None or p.earlier <= target)

    def cheap(p: CurvePoint) -> bool:
        base = points[0.0].utility_nll
        return rise is None or base is None or p.utility_nll is None or p.utility_nll <= base + rise

    best = [p.alpha for p in found.curve if good(p) and cheap(p)]
    if best:
        assert found.reached and found.point.alpha == min(best)
        assert not found.bounded_by_utility
    else:
        assert not found.reached and cheap(found.point)
        assert found.point.alpha == max(p.alpha for p in found.curve if cheap(p))
        assert found.bounded_by_utility == any(not cheap(p) for p in found.curve)


@given(threshold=st.floats(0.01, 60), bisections=st.integers(1, 12))
def test_a_falling_curve_is_met_within_the_bracket(threshold: float, bisections: int) -> None:
    curve = Curve(falling(threshold))
    found = find_strength(curve, 0.3, 64.0, bisections, None)
    check_honest(found, curve, 0.3, None)
    assert found.reached and found.point.alpha >= threshold
    bracket = max(1.0, threshold)  # [0, 1] or the last doubling
    assert found.point.alpha - threshold <= bracket / 2**bisections + 1e-9


@given(
    values=st.lists(st.floats(0, 1), min_size=1, max_size=9),
    utilities=st.lists(st.floats(0, 5), min_size=1, max_size=7),
    earlier=st.none() | st.lists(st.floats(0, 1), min_size=1, max_size=5),
    target=st.floats(0, 1),
    rise=st.none() | st.floats(0.01, 2),
    max_alpha=st.floats(0.1, 100),
    bisections=st.integers(1, 8),
    start=st.floats(0.05, 10),
)
def test_any_curve_at_all(
    values: list[float], utilities: list[float], earlier: list[float] | None, target: float, rise: float | None,
    max_alpha: float, bisections: int, start: float,
) -> None:  # fmt: skip
    def rugged(table: list[float]) -> Callable[[float], float]:
        return lambda alpha: table[hash(alpha) % len(table)]  # as far from monotone as it gets; the same each time

    curve = Curve(rugged(values), rugged(utilities), rugged(earlier) if earlier else None)
    found = find_strength(curve, target, max_alpha, bisections, rise, start)
    check_honest(found, curve, target, rise)
    assert all(0 <= a <= max_alpha for a in curve.tried)
    assert 0.0 in curve.tried and len(curve.tried) <= 2 + bisections + 12  # doublings from 0.05 to 100


def test_what_is_forgotten_already_needs_no_strength() -> None:
    found = find_strength(Curve(lambda alpha: 0.1), 0.3, 64.0, 8, None)
    assert found.reached and found.point.alpha == 0


def test_meeting_the_target_exactly_counts() -> None:
    assert find_strength(Curve(lambda alpha: 0.3 if alpha >= 1 else 1.0), 0.3, 64.0, 1, None).reached


def test_max_alpha_is_tried_and_never_passed() -> None:
    curve = Curve(lambda alpha: 1.0)
    found = find_strength(curve, 0.3, 10.0, 8, None)
    assert curve.tried == [0.0, 1.0, 2.0, 4.0, 8.0, 10.0]
    assert not found.reached and not found.bounded_by_utility and found.point.alpha == 10.0
    assert find_strength(Curve(falling(10.0)), 0.3, 10.0, 8, None).reached
    small = Curve(falling(0.2))
    found = find_strength(small, 0.3, 0.5, 8, None)
    assert max(small.tried) == 0.5 and found.reached and found.point.alpha < 0.21


def test_utility_bounds_the_search() -> None:
    curve = Curve(falling(20.0), lambda alpha: 4.0 + 0.1 * alpha)  # affordable up to 5
    found = find_strength(curve, 0.3, 64.0, 8, 0.5)
    check_honest(found, curve, 0.3, 0.5)
    assert not found.reached and found.bounded_by_utility
    assert 4.9 < found.point.alpha <= 5
    # Forgetting that is affordable is found, although the first bracket end was too dear.
    curve = Curve(falling(4.1), lambda alpha: 4.0 + 0.1 * alpha)
    found = find_strength(curve, 0.3, 64.0, 8, 0.5)
    assert found.reached and not found.bounded_by_utility and 4.1 <= found.point.alpha < 4.2


def test_without_a_utility_measure_there_is_no_bound() -> None:
    assert find_strength(Curve(falling(20.0)), 0.3, 64.0, 8, 0.01).reached


def test_earlier_requests_must_be_met_too() -> None:
    found = find_strength(Curve(falling(1.0), None, falling(6.0)), 0.3, 64.0, 8, None)
    assert found.reached and found.point.alpha == pytest.approx(6.0, abs=4 / 2**8)


def test_what_stops_by_itself_is_taken_whole_where_that_is_affordable() -> None:
    def curve(utility: float) -> Curve:
        return Curve(forget=lambda a: 0.5 - 0.4 * a, utility=lambda a: 3.0 + utility * a)

    found = find_strength(curve(0.05), 0.3, 1.0, 8, 0.1, whole=True)
    assert found.point.alpha == 1.0 and found.reached and [p.alpha for p in found.curve] == [0.0, 1.0]
    dear = find_strength(curve(0.15), 0.3, 1.0, 8, 0.1, whole=True)
    assert 0.5 <= dear.point.alpha < 0.51 and dear.reached
    short = find_strength(curve(0.05), 0.05, 1.0, 8, 0.1, whole=True)
    assert short.point.alpha == 1.0 and not short.reached


@pytest.mark.parametrize(("fixed", "reached"), [(1.0, False), (3.0, True), (100.0, True)])
def test_a_fixed_strength_is_taken_and_judged(fixed: float, reached: bool) -> None:
    curve = Curve(falling(3.0), lambda alpha: alpha)
    found = find_strength(curve, 0.3, 64.0, 8, 0.1, fixed=fixed)
    assert curve.tried == [0.0, fixed] and found.point.alpha == fixed and found.reached == reached
    assert [p.alpha for p in found.curve] == [0.0, fixed]


# --- UWC --------------------------------------------------------------------------------------------------


class Performance:
    """Retain performance, with every point that was asked for."""

    def __init__(self, curve: Callable[[float], float]) -> None:
        self.curve, self.points, self.calls = curve, dict[float, float](), 0

    def __call__(self, share: float) -> float:
        self.calls += 1
        self.points[share] = self.curve(share)
        return self.points[share]


@given(edge=st.floats(0.0, 1.0), start=st.floats(0.1, 1.0), kept=st.floats(0.5, 1.0))
def test_the_largest_share_that_keeps_enough(edge: float, start: float, kept: float) -> None:
    """Performance holds up to an edge and then falls below the floor."""
    measured = Performance(lambda a: start if a <= edge else 0.4 * start)
    found = retained_mix(measured, kept)
    assert found <= edge < found + 1 / (10 * 2**6) + 1e-12 or found == edge == 1.0
    assert measured.points[found] == start and measured.calls == len(measured.points)  # none measured twice


@given(values=st.lists(st.floats(0.0, 1.0), min_size=200, max_size=200), kept=st.floats(0.5, 1.0))
def test_on_any_curve_the_share_was_measured_and_none_larger_was_good(values: list[float], kept: float) -> None:
    measured = Performance(lambda a: values[round(a * 199)])
    found = retained_mix(measured, kept)
    floor = kept * values[0]
    assert found == 0.0 or measured.points[found] >= floor
    assert all(value < floor for a, value in measured.points.items() if a > found)


def test_nothing_is_searched_where_the_whole_model_is_good_enough() -> None:
    measured = Performance(lambda a: 1.0 - 0.04 * a)
    assert retained_mix(measured) == 1.0
    assert measured.points == {0.0: 1.0, 1.0: pytest.approx(0.96)}


def test_a_model_that_keeps_nothing_is_not_mixed_in() -> None:
    assert retained_mix(lambda a: float(a == 0)) == 0.0
