"""Calibration: the smallest strength that forgets, found with forward passes alone.

In: a function α → (forget, earlier, utility). Out: α with the whole curve. A task vector is linear in α, so the
strength can be bisected (METHODS section 3). The target is the level of never-seen text, for the request that is
hardest to forget; easier ones may fall below it.

For comparisons between methods `retained_mix` does the opposite, as UWC has it: fix what is kept, then compare what is
forgotten.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.records import CurvePoint


@dataclass(frozen=True)
class Strength:
    """Outcome of the search.

    Attributes:
        point: The chosen point of the curve.
        reached: Whether it meets the target.
        bounded_by_utility: Whether the utility limit ended the search.
        curve: Every point tried, by rising α, α = 0 included.
    """

    point: CurvePoint
    reached: bool
    bounded_by_utility: bool
    curve: tuple[CurvePoint, ...]


def find_strength(
    measure: Callable[[float], CurvePoint],
    target: float,
    max_alpha: float,
    bisections: int,
    max_utility_rise: float | None,
    start: float = 1.0,
    fixed: float | None = None,
    whole: bool = False,
) -> Strength:
    """Search for the smallest α that brings every request to the target without passing the utility limit.

    The bracket doubles from ``start`` until the target is met, the limit is passed or ``max_alpha`` is reached, and is
    then halved. The curve need not be monotone: what is returned is a point that was measured.

    Args:
        measure: Measures the model at parent + α · displacement.
        target: Largest exact memorisation allowed, for this step's and earlier requests.
        max_alpha: Largest strength tried.
        bisections: Halvings.
        max_utility_rise: Largest rise of ``utility_nll`` over α = 0, in nats; None for no limit.
        start: First strength tried.
        fixed: Do not search, take this strength.
        whole: Take ``start`` where it meets the target within the utility limit, however little would do.
    """
    points: dict[float, CurvePoint] = {}

    def at(alpha: float) -> CurvePoint:
        if alpha not in points:
            points[alpha] = measure(alpha)
        return points[alpha]

    base = at(0.0).utility_nll

    def affordable(p: CurvePoint) -> bool:
        if max_utility_rise is None or p.utility_nll is None or base is None:
            return True
        return p.utility_nll <= base + max_utility_rise

    if fixed is not None:
        point = at(fixed)
        return Strength(point, point.forgets(target), False, tuple(points[a] for a in sorted(points)))
    if whole and at(start).forgets(target) and affordable(at(start)):
        return Strength(at(start), True, False, tuple(points[a] for a in sorted(points)))
    low, high = 0.0, min(start, max_alpha)
    while not at(high).forgets(target) and affordable(at(high)) and high < max_alpha:
        low, high = high, min(2 * high, max_alpha)
    if at(high).forgets(target) or not affordable(at(high)):
        for _ in range(bisections):
            middle = (low + high) / 2
            # Either condition ends the bracket: past it the model forgets more, or costs more, than it must.
            if at(middle).forgets(target) or not affordable(at(middle)):
                high = middle
            else:
                low = middle
    good = [p for p in points.values() if p.forgets(target) and affordable(p)]
    cheap = [p for p in points.values() if affordable(p)]
    chosen = min(good, key=lambda p: p.alpha) if good else max(cheap, key=lambda p: p.alpha)
    bounded = not good and any(not affordable(p) for p in points.values())
    return Strength(chosen, bool(good), bounded, tuple(points[a] for a in sorted(points)))


def retained_mix(measure: Callable[[float], float], kept: float = 0.95, scan: int = 10, bisections: int = 6) -> float:
    """UWC (Wang et al., arXiv 2406.09179, section 4): the largest a with ES_retain(θ(a)) ≥ τ·ES_retain(θ_p).

    θ(a) = (1 - a)·θ_p + a·θ_u is the parent displaced by a times θ_u - θ_p, so that methods whose vector is negated
    mix like all others. The released code leaves this search out. The curve need not be monotone: a grid is scanned
    from a = 1 downwards, and the step in which retain performance falls is halved; what is returned was measured.

    Args:
        measure: Retain performance of θ(a), extraction strength in the paper; larger is better.
        kept: τ.
        scan: Steps of the grid.
        bisections: Halvings of the step in which it falls.

    Returns:
        a, exact to 1 / (scan · 2^bisections).
    """
    points: dict[float, float] = {}

    def at(share: float) -> float:
        if share not in points:
            points[share] = measure(share)
        return points[share]

    floor = kept * at(0.0)
    best = next(i for i in range(scan, -1, -1) if i == 0 or at(i / scan) >= floor)
    low, high = best / scan, (best + 1) / scan
    if best < scan:
        for _ in range(bisections):
            middle = (low + high) / 2
            low, high = (middle, high) if at(middle) >= floor else (low, middle)
    return low
