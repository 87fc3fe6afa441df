"""The report's plots and its matrix as inline SVG: pure functions from numbers to one ``<svg>`` element.

In: numbers and labels, the labels untrusted. Out: well-formed XML that needs nothing from outside. Never: scripts,
colour as the only difference (series differ by dash and marker, alarms by a sign), a figure without title and
description.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.records import CurvePoint
from pipeline.report_svg import (
    ALARM,
    COLOURS,
    DASHES,
    INK,
    LEFT,
    MUTED,
    ROUNDING,
    RULE,
    Scale,
    fit,
    markers,
    padded,
    place,
    require_finite,
    rule,
    sentence,
    short_number,
    svg,
    text_at,
    text_width,
    x_axis,
    y_axis,
)


@dataclass(frozen=True)
class Series:
    """One line of a plot.

    Attributes:
        name: Shown in the legend.
        values: One value per label; None leaves a gap.
        spread: Half the length of each value's error bar, as long as ``values``; empty for none.
    """

    name: str
    values: Sequence[float | None]
    spread: Sequence[float] = ()

    def pairs(self) -> list[tuple[float | None, float]]:
        """Each value with half the length of its error bar."""
        return list(zip(self.values, self.spread or [0.0] * len(self.values), strict=True))

    def reach(self) -> list[float]:
        """All values, or the ends of their error bars."""
        return [end for v, s in self.pairs() if v is not None for end in ((v - s, v + s) if s else (v,))]


# --- the three figures ------------------------------------------------------------------------------------

_WIDTH, _MARGIN = 600.0, 20.0
_RIGHT = _WIDTH - _MARGIN


def alpha_curve(points: Sequence[CurvePoint], target: float, chosen: float) -> str:
    """Plot forgetting and utility over the strength α, as calibration measured them.

    Above: the largest exact memorisation of this step's requests (and of earlier ones) with the target; below, where
    utility was measured, its NLL. The α axis is log1p(α / chosen), so that the points around the chosen strength stay
    apart whatever its magnitude; both y axes are linear.

    Args:
        points: The curve, in any order.
        target: Exact memorisation to reach.
        chosen: The strength that was taken.
    """
    if not points:
        return sentence("Strength curve", "No strength was tried in this step.")
    points = sorted(points, key=lambda p: p.alpha)
    alphas = [p.alpha for p in points]
    require_finite("a strength curve", [target, chosen, *alphas])
    xs, ticks = _strength_axis(alphas, chosen)
    series = [Series("this step's requests", [p.forget for p in points])]
    if any(p.earlier is not None for p in points):
        series.append(Series("earlier requests", [p.earlier for p in points]))
    utility = Series("utility NLL", [p.utility_nll for p in points])
    has_utility = any(v is not None for v in utility.values)

    forget_values = [v for s in series for v in s.values if v is not None]
    forget_y = Scale(min(0.0, target, *forget_values), max(1.0, target, *forget_values), 222, 62)
    x = [xs(a) for a in alphas]
    parts = [text_at(LEFT, 14, "Largest exact memorisation", bold=True), _legend(LEFT, 32, series)]
    parts.append(y_axis(forget_y, LEFT, _RIGHT))
    parts.append(rule(LEFT, forget_y(target), _RIGHT, forget_y(target), ALARM, "7 4"))
    # Under the line: the curve comes down from above it, so that the space below is free at the left.
    parts.append(text_at(LEFT + 6, forget_y(target) + 14, f"target {target:.3f}", fill=ALARM, halo=True))
    bottom = forget_y.start
    if has_utility:
        utility_y = padded([v for v in utility.values if v is not None], 358, 274)
        parts.append(y_axis(utility_y, LEFT, _RIGHT))
        bottom = utility_y.start
    parts.append(rule(xs(chosen), 60, xs(chosen), bottom, INK, "1.5 3"))
    parts.append(
        text_at(xs(chosen), 55, f"chosen α = {short_number(chosen)}", anchor=_side(xs(chosen)), bold=True, halo=True)
    )
    if has_utility:
        parts.append(text_at(LEFT, 258, "Mean NLL on utility text, in nats", bold=True, halo=True))
    for index, line in enumerate(series):
        parts.append(_polyline(line, x, forget_y, index, lambda i, v: f"α {short_number(alphas[i])}: {v:.3f}"))
    if has_utility:
        parts.append(_polyline(utility, x, utility_y, 2, lambda i, v: f"α {short_number(alphas[i])}: {v:.4f} nats"))
    parts.append(x_axis([(xs(a), short_number(a)) for a in ticks], bottom, _RIGHT))
    parts.append(text_at(_RIGHT, bottom + 34, "strength α, logarithmic", anchor="end", fill=MUTED))
    title = "Forgetting and utility over the strength α" if has_utility else "Forgetting over the strength α"
    return svg(_WIDTH, bottom + 42, title, _describe_curve(points, target, chosen), parts)


def lines(
    labels: Sequence[str],
    series: Sequence[Series],
    title: str,
    unit: str,
    limit: float | None = None,
    low: float | None = None,
    high: float | None = None,
    width: float = 480.0,
    limit_name: str = "limit",
    x_name: str = "",
) -> str:
    """Plot series over versions or steps, evenly spaced, on a linear y axis.

    Args:
        labels: One per position, e.g. ``v3``.
        series: At most four lines, each as long as ``labels``.
        title: What is shown.
        unit: Caption of the y axis.
        limit: A level to draw across.
        low: Lowest value the axis must hold.
        high: Highest value likewise.
        width: Of the figure, in pixels.
        limit_name: What the level is.
        x_name: Caption of the x axis.
    """
    shown = [v for s in series for v in s.reach()]
    if not labels or not shown:
        return sentence(title, "Nothing has been measured yet.")
    require_finite(title, [*shown, *(v for v in (limit, low, high) if v is not None)])
    y = padded([*shown, *(v for v in (limit,) if v is not None)], 210, 50, low, high)
    right = width - _MARGIN
    xs = Scale(0, max(1, len(labels) - 1), LEFT + 16, right - 16)
    x = [xs(i) for i in range(len(labels))]
    parts = [text_at(LEFT, 14, unit, bold=True), _legend(LEFT, 32, series), y_axis(y, LEFT, right)]
    if limit is not None:
        parts.append(rule(LEFT, y(limit), right, y(limit), ALARM, "7 4"))
        # Under the line where there is room: what is measured tends to lie above it.
        under = y(limit) + 14 if y.start - y(limit) > 18 else y(limit) - 5
        parts.append(text_at(LEFT + 6, under, f"{limit_name} {limit:.3f}", fill=ALARM, halo=True))
    for index, line in enumerate(series):
        if len(line.values) != len(labels):
            raise ValueError(f"{title}: series {line.name!r} has {len(line.values)} values for {len(labels)} labels")
        parts.append(_polyline(line, x, y, index, lambda i, v: f"{labels[i]}: {v:.4g}"))
        parts.append(_error_bars(line, x, y, index))
    step = max(1, math.ceil(len(labels) * 40 / (right - LEFT)))
    parts.append(x_axis([(x[i], fit(labels[i], 40)) for i in range(0, len(labels), step)], 210, right))
    last = [(s.name, next((v for v in reversed(s.values) if v is not None), None)) for s in series]
    said = "; ".join(f"{name} {value:.4g}" for name, value in last if value is not None)
    description = f"{len(labels)} positions from {labels[0]} to {labels[-1]}. Last values: {said}."
    if x_name:
        parts.append(text_at(right, 244, x_name, anchor="end", fill=MUTED))
    return svg(width, 252 if x_name else 236, title, description, parts)


_CELL_W, _CELL_H, _TOP = 56.0, 26.0, 26.0
PAPER = "#ffffff"


def persistence_matrix(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    limits: Sequence[float | None],
    excluded: Sequence[Sequence[bool]] | None = None,
    title: str = "Persistence matrix",
    before: Sequence[bool] | None = None,
) -> str:
    """Show how far every version still reproduces every request, each value printed in its cell.

    A cell at or below its column's limit is white. Above it, a request that the version is meant to exclude raises an
    alarm (dark, with a sign); one that is not taken out there yet is grey, darker the more is reproduced. A thick line
    stands where the exclusion begins.

    Args:
        rows: Request ids.
        columns: Versions.
        values: Exact memorisation per row and column; None where it was not measured.
        limits: Never-seen level + tolerance per column; None where no level was measured.
        excluded: Whether the column's version is meant to exclude the row's request; all are where this is absent.
        title: What is shown.
        before: Whether the version left of the first column, on another page, is meant to exclude the row's request;
            None where there is no such version.
    """
    if not rows or not columns:
        return sentence(title, "No request has been measured on any version yet.")
    if len(values) != len(rows) or any(len(row) != len(columns) for row in values) or len(limits) != len(columns):
        raise ValueError(f"values must be {len(rows)} rows of {len(columns)}, limits {len(columns)}")
    require_finite("the persistence matrix", [v for row in [*values, limits] for v in row if v is not None])
    left = 20 + max(text_width(fit(r, 190)) for r in [*rows, "limit"])
    parts = [
        text_at(left + (j + 0.5) * _CELL_W, 17, fit(name, _CELL_W - 4), anchor="middle", bold=True)
        for j, name in enumerate(columns)
    ]
    alarms = []
    fences = []
    for i, row in enumerate(values):
        top = _TOP + i * _CELL_H
        label = fit(rows[i], 190)
        parts.append(text_at(left - 10, top + 17, label, anchor="end", hint=rows[i] if label != rows[i] else None))
        cells, gaps = [], []
        for j, value in enumerate(row):
            meant = excluded is None or excluded[i][j]
            alarm = meant and _above(value, limits[j])
            x = left + j * _CELL_W
            if value is None:
                gaps.append(f"M{place(x + _CELL_W / 2 - 3)},{place(top + 13)}h6")
            else:
                cells.append(_cell(x, top, value, limits[j], alarm))
            if alarm:
                alarms.append(f"{rows[i]} on {columns[j]} ({value:.3f})")
            known = before[i] if j == 0 and before is not None else j == 0 or excluded is None or excluded[i][j - 1]
            if meant and not known:
                fences.append(rule(x, top - 0.5, x, top + _CELL_H + 0.5, INK, width=3))
        if gaps:
            parts.append(f'<path class="gaps" d="{"".join(gaps)}" stroke="{MUTED}"/>')
        parts.append(f'<g text-anchor="middle">{"".join(cells)}</g>')
    foot = _TOP + len(rows) * _CELL_H
    parts += [_grid(left, len(rows), len(columns)), *fences]
    parts.append(text_at(left - 10, foot + 18, "limit", anchor="end", fill=MUTED))
    for j, limit in enumerate(limits):
        shown = "–" if limit is None else f"{limit:.3f}"
        parts.append(text_at(left + (j + 0.5) * _CELL_W, foot + 18, shown, anchor="middle", fill=MUTED))
    return svg(
        left + len(columns) * _CELL_W + 4,
        foot + 28,
        title,
        f"Exact memorisation of {len(rows)} requests on {len(columns)} versions. Above the limit although taken out: "
        + ("; ".join(alarms) if alarms else "none")
        + ".",
        parts,
    )


def fill_of(value: float | None, limit: float | None, alarm: bool) -> str:
    """Fill of a cell of the persistence matrix: the darker, the further above the limit; white at or below it."""
    if alarm:
        return ALARM
    if value is None or limit is None or not _above(value, limit):
        return PAPER
    # 0x8c is the darkest grey on which the ink keeps a contrast of more than 4.5 : 1.
    excess = min(1.0, (value - limit) / max(1.0 - limit, ROUNDING))
    return "#" + f"{round(0xF2 - (0xF2 - 0x8C) * excess):02x}" * 3


# --- pieces of these figures ---


def _side(x: float) -> str:
    """Text anchor that keeps a label near x inside the panel."""
    return "start" if x < LEFT + 60 else "end" if x > _RIGHT - 60 else "middle"


def _strength_axis(alphas: Sequence[float], chosen: float) -> tuple[Callable[[float], float], list[float]]:
    """The log1p axis of α and its ticks: zero, the largest strength, and round numbers where there is room."""
    top = max([0.0, chosen, *alphas])
    # The bound keeps the quotient finite where the chosen strength is next to nothing.
    unit = max(chosen, 1e-6 * top) if chosen > 0 else top if top > 0 else 1.0

    def warp(alpha: float) -> float:
        return math.copysign(math.log1p(abs(alpha) / unit), alpha)

    lo, hi = warp(min([0.0, chosen, *alphas])), warp(top)
    scale = Scale(lo, hi if hi > lo else lo + 1.0, LEFT + 8, _RIGHT - 16)

    def axis(alpha: float) -> float:
        return scale(warp(alpha))

    ticks = [0.0] if top == 0 else [0.0, top]
    if top > 0:
        first = math.floor(math.log10(unit)) - 1
        last = math.ceil(math.log10(top))
        for digit in (1, 5, 2):
            for power in range(last, first - 1, -1):
                value = float(f"{digit}e{power}")
                if value < top and all(abs(axis(value) - axis(t)) >= 44 for t in ticks):
                    ticks.append(value)
    return axis, sorted(ticks)


def _polyline(line: Series, x: Sequence[float], y: Scale, index: int, hint: Callable[[int, float], str]) -> str:
    """One series: a line that breaks at gaps, with a marker on every value."""
    parts = []
    previous: tuple[float, float] | None = None
    steps: list[str] = []
    points = []
    for i, value in enumerate(line.values):
        if value is None:
            previous = None
            continue
        here = (x[i], y(value))
        steps.append(f"{'L' if previous else 'M'}{place(here[0])},{place(here[1])}")
        points.append((*here, hint(i, value)))
        previous = here
    dash = f' stroke-dasharray="{DASHES[index % 4]}"' if DASHES[index % 4] else ""
    parts.append(f'<path d="{"".join(steps)}" fill="none" stroke="{COLOURS[index % 4]}" stroke-width="1.8"{dash}/>')
    return f'<g class="series-{index}">{"".join(parts)}{markers(points, index)}</g>'


def _error_bars(line: Series, x: Sequence[float], y: Scale, index: int) -> str:
    """A bar with caps through every value that has a spread."""
    bars = [
        f"M{place(x[i] - 3)},{place(y(value - spread))}h6M{place(x[i] - 3)},{place(y(value + spread))}h6"
        f"M{place(x[i])},{place(y(value - spread))}V{place(y(value + spread))}"
        for i, (value, spread) in enumerate(line.pairs())
        if value is not None and spread
    ]
    return f'<path d="{"".join(bars)}" fill="none" stroke="{COLOURS[index % 4]}"/>' if bars else ""


def _legend(x: float, y: float, series: Sequence[Series]) -> str:
    parts = []
    for index, line in enumerate(series):
        name = fit(line.name, 210)
        parts.append(rule(x, y - 4, x + 26, y - 4, COLOURS[index % 4], DASHES[index % 4], 1.8))
        parts.append(markers([(x + 13, y - 4, "")], index))
        parts.append(text_at(x + 32, y, name))
        x += 52 + text_width(name)
    return "".join(parts)


def _cell(x: float, y: float, value: float, limit: float | None, alarm: bool) -> str:
    """One cell with its value, centred by its group; an alarm carries a sign, so that it is seen in black and white."""
    shown, ink = f"{'▲' if alarm else ''}{value:.3f}", "#ffffff" if alarm else INK
    fill, under = fill_of(value, limit, alarm), ""
    if fill != PAPER:
        under = f'<rect x="{place(x)}" y="{place(y)}" width="{_CELL_W:g}" height="{_CELL_H:g}" fill="{fill}"/>'
    return under + text_at(x + _CELL_W / 2, y + 17, shown, fill=ink, bold=alarm)


def _grid(left: float, rows: int, columns: int) -> str:
    """The lines between the cells."""
    right, foot = left + columns * _CELL_W, _TOP + rows * _CELL_H
    across = "".join(f"M{place(left)},{place(_TOP + i * _CELL_H)}H{place(right)}" for i in range(rows + 1))
    down = "".join(f"M{place(left + j * _CELL_W)},{place(_TOP)}V{place(foot)}" for j in range(columns + 1))
    return f'<path d="{across}{down}" fill="none" stroke="{RULE}"/>'


def _above(value: float | None, limit: float | None) -> bool:
    return value is not None and limit is not None and value > limit + ROUNDING


def _describe_curve(points: Sequence[CurvePoint], target: float, chosen: float) -> str:
    """The curve in words: its ends, the target and the chosen point."""

    def at(point: CurvePoint) -> str:
        utility = "" if point.utility_nll is None else f", utility NLL {point.utility_nll:.3f}"
        return f"at {short_number(point.alpha)} largest exact memorisation {point.forget:.3f}{utility}"

    taken = [p for p in points if p.alpha == chosen]
    named = {p.alpha: p for p in (points[0], *taken, points[-1])}
    return (
        f"{len(points)} strengths from {short_number(points[0].alpha)} to {short_number(points[-1].alpha)}: "
        f"{'; '.join(at(p) for p in named.values())}. Target {target:.3f}, chosen strength {short_number(chosen)}."
    )
