"""The figures of the report as inline SVG: pure functions from numbers to one ``<svg>`` element.

In: numbers and labels, the labels untrusted. Out: well-formed XML that needs nothing from outside. Never: scripts,
colour as the only difference (series differ by dash and marker, alarms by a sign), a figure without title and
description.
"""

from __future__ import annotations

import html
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pipeline.errors import NumericalFailure
from pipeline.records import CurvePoint

ROUNDING = 1e-9
"""Slack when a value is compared with a limit, that of the gate: a limit met exactly is met."""

INK, MUTED, RULE, ALARM = "#1b1f24", "#57606a", "#d0d7de", "#9b1c1c"

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Series:
    """One line of a plot.

    Attributes:
        name: Shown in the legend.
        values: One value per label; None leaves a gap.
    """

    name: str
    values: Sequence[float | None]


# --- the three figures ------------------------------------------------------------------------------------

_LEFT, _WIDTH, _MARGIN = 56.0, 600.0, 20.0
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
    _require_finite("a strength curve", [target, chosen, *alphas])
    xs, ticks = _strength_axis(alphas, chosen)
    series = [Series("this step's requests", [p.forget for p in points])]
    if any(p.earlier is not None for p in points):
        series.append(Series("earlier requests", [p.earlier for p in points]))
    utility = Series("utility NLL", [p.utility_nll for p in points])
    has_utility = any(v is not None for v in utility.values)

    forget_values = [v for s in series for v in s.values if v is not None]
    forget_y = _Scale(min(0.0, target, *forget_values), max(1.0, target, *forget_values), 222, 62)
    x = [xs(a) for a in alphas]
    parts = [_text(_LEFT, 14, "Largest exact memorisation", bold=True), _legend(_LEFT, 32, series)]
    parts.append(_y_axis(forget_y, _LEFT, _RIGHT))
    parts.append(_rule(_LEFT, forget_y(target), _RIGHT, forget_y(target), ALARM, "7 4"))
    # Under the line: the curve comes down from above it, so that the space below is free at the left.
    parts.append(_text(_LEFT + 6, forget_y(target) + 14, f"target {target:.3f}", fill=ALARM, halo=True))
    bottom = forget_y.start
    if has_utility:
        utility_y = _padded([v for v in utility.values if v is not None], 358, 274)
        parts.append(_y_axis(utility_y, _LEFT, _RIGHT))
        bottom = utility_y.start
    parts.append(_rule(xs(chosen), 60, xs(chosen), bottom, INK, "1.5 3"))
    parts.append(_text(xs(chosen), 55, f"chosen α = {_number(chosen)}", anchor=_side(xs(chosen)), bold=True, halo=True))
    if has_utility:
        parts.append(_text(_LEFT, 258, "Mean NLL on utility text, in nats", bold=True, halo=True))
    for index, line in enumerate(series):
        parts.append(_polyline(line, x, forget_y, index, lambda i, v: f"α {_number(alphas[i])}: {v:.3f}"))
    if has_utility:
        parts.append(_polyline(utility, x, utility_y, 2, lambda i, v: f"α {_number(alphas[i])}: {v:.4f} nats"))
    parts.append(_x_axis([(xs(a), _number(a)) for a in ticks], bottom, _RIGHT))
    parts.append(_text(_RIGHT, bottom + 34, "strength α, logarithmic", anchor="end", fill=MUTED))
    title = "Forgetting and utility over the strength α" if has_utility else "Forgetting over the strength α"
    return _svg(_WIDTH, bottom + 42, title, _describe_curve(points, target, chosen), parts)


def lines(
    labels: Sequence[str],
    series: Sequence[Series],
    title: str,
    unit: str,
    limit: float | None = None,
    low: float | None = None,
    high: float | None = None,
    width: float = 480.0,
) -> str:
    """Plot series over versions, evenly spaced, on a linear y axis.

    Args:
        labels: One per position, e.g. ``v3``.
        series: At most four lines, each as long as ``labels``.
        title: What is shown.
        unit: Caption of the y axis.
        limit: A level to draw across.
        low: Lowest value the axis must hold.
        high: Highest value likewise.
        width: Of the figure, in pixels.
    """
    shown = [v for s in series for v in s.values if v is not None]
    if not labels or not shown:
        return sentence(title, "Nothing has been measured yet.")
    _require_finite(title, [*shown, *(v for v in (limit, low, high) if v is not None)])
    y = _padded([*shown, *(v for v in (limit,) if v is not None)], 210, 50, low, high)
    right = width - _MARGIN
    xs = _Scale(0, max(1, len(labels) - 1), _LEFT + 16, right - 16)
    x = [xs(i) for i in range(len(labels))]
    parts = [_text(_LEFT, 14, unit, bold=True), _legend(_LEFT, 32, series), _y_axis(y, _LEFT, right)]
    if limit is not None:
        parts.append(_rule(_LEFT, y(limit), right, y(limit), ALARM, "7 4"))
        parts.append(_text(_LEFT + 6, y(limit) - 5, f"limit {limit:.3f}", fill=ALARM, halo=True))
    for index, line in enumerate(series):
        if len(line.values) != len(labels):
            raise ValueError(f"{title}: series {line.name!r} has {len(line.values)} values for {len(labels)} labels")
        parts.append(_polyline(line, x, y, index, lambda i, v: f"{labels[i]}: {v:.4g}"))
    step = max(1, math.ceil(len(labels) * 40 / (right - _LEFT)))
    parts.append(_x_axis([(x[i], _fit(labels[i], 40)) for i in range(0, len(labels), step)], 210, right))
    last = [(s.name, next((v for v in reversed(s.values) if v is not None), None)) for s in series]
    said = "; ".join(f"{name} {value:.4g}" for name, value in last if value is not None)
    description = f"{len(labels)} positions from {labels[0]} to {labels[-1]}. Last values: {said}."
    return _svg(width, 236, title, description, parts)


_CELL_W, _CELL_H, _TOP = 56.0, 26.0, 26.0


def persistence_matrix(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    limits: Sequence[float | None],
    excluded: Sequence[Sequence[bool]] | None = None,
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
    """
    if not rows or not columns:
        return sentence("Persistence matrix", "No request has been measured on any version yet.")
    if len(values) != len(rows) or any(len(row) != len(columns) for row in values) or len(limits) != len(columns):
        raise ValueError(f"values must be {len(rows)} rows of {len(columns)}, limits {len(columns)}")
    _require_finite("the persistence matrix", [v for row in [*values, limits] for v in row if v is not None])
    left = 20 + max(_text_width(_fit(r, 190)) for r in [*rows, "limit"])
    parts = [
        _text(left + (j + 0.5) * _CELL_W, 17, _fit(name, _CELL_W - 4), anchor="middle", bold=True)
        for j, name in enumerate(columns)
    ]
    alarms = []
    fences = []
    for i, row in enumerate(values):
        top = _TOP + i * _CELL_H
        label = _fit(rows[i], 190)
        parts.append(_text(left - 10, top + 17, label, anchor="end", hint=rows[i] if label != rows[i] else None))
        for j, value in enumerate(row):
            meant = excluded is None or excluded[i][j]
            alarm = meant and _above(value, limits[j])
            parts.append(_cell(left + j * _CELL_W, top, value, limits[j], alarm))
            if alarm:
                alarms.append(f"{rows[i]} on {columns[j]} ({value:.3f})")
            if excluded is not None and meant and j and not excluded[i][j - 1]:
                x = left + j * _CELL_W
                fences.append(_rule(x, top - 0.5, x, top + _CELL_H + 0.5, INK, width=3))
    foot = _TOP + len(rows) * _CELL_H
    parts += fences
    parts.append(_text(left - 10, foot + 18, "limit", anchor="end", fill=MUTED))
    for j, limit in enumerate(limits):
        shown = "–" if limit is None else f"{limit:.3f}"
        parts.append(_text(left + (j + 0.5) * _CELL_W, foot + 18, shown, anchor="middle", fill=MUTED))
    return _svg(
        left + len(columns) * _CELL_W + 4,
        foot + 28,
        "Persistence matrix",
        f"Exact memorisation of {len(rows)} requests on {len(columns)} versions. Above the limit although taken out: "
        + ("; ".join(alarms) if alarms else "none")
        + ".",
        parts,
    )


def sentence(title: str, text: str) -> str:
    """What stands in the place of a figure that has nothing to show."""
    return _svg(max(240.0, _text_width(text) + 24), 34, title, text, [_text(8, 22, text, fill=MUTED)])


def fill_of(value: float | None, limit: float | None, alarm: bool) -> str:
    """Fill of a cell of the persistence matrix: the darker, the further above the limit; white at or below it."""
    if alarm:
        return ALARM
    if value is None or limit is None or not _above(value, limit):
        return "#ffffff"
    # 0x8c is the darkest grey on which the ink keeps a contrast of more than 4.5 : 1.
    excess = min(1.0, (value - limit) / max(1.0 - limit, ROUNDING))
    return "#" + f"{round(0xF2 - (0xF2 - 0x8C) * excess):02x}" * 3


# --- scales -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scale:
    """The linear map from [lo, hi] to pixels [start, end]."""

    lo: float
    hi: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.lo) / (self.hi - self.lo) * (self.end - self.start)


def _padded(
    values: Sequence[float], start: float, end: float, low: float | None = None, high: float | None = None
) -> _Scale:
    """A scale around values, never narrower than 0.1 or a thousandth of them, so that noise does not fill the panel."""
    bounds = [*values, *(v for v in (low, high) if v is not None)]
    lo, hi = min(bounds), max(bounds)
    narrow = max(0.1, 1e-3 * max(abs(lo), abs(hi)))
    if hi - lo < narrow:
        lo, hi = (lo + hi - narrow) / 2, (lo + hi + narrow) / 2
    pad = 0.08 * (hi - lo)
    return _Scale(lo if lo == low else lo - pad, hi if hi == high else hi + pad, start, end)


def _strength_axis(alphas: Sequence[float], chosen: float) -> tuple[Callable[[float], float], list[float]]:
    """The log1p axis of α and its ticks: zero, the largest strength, and round numbers where there is room."""
    top = max([0.0, chosen, *alphas])
    # The bound keeps the quotient finite where the chosen strength is next to nothing.
    unit = max(chosen, 1e-6 * top) if chosen > 0 else top if top > 0 else 1.0

    def warp(alpha: float) -> float:
        return math.copysign(math.log1p(abs(alpha) / unit), alpha)

    lo, hi = warp(min([0.0, chosen, *alphas])), warp(top)
    scale = _Scale(lo, hi if hi > lo else lo + 1.0, _LEFT + 8, _RIGHT - 16)

    def place(alpha: float) -> float:
        return scale(warp(alpha))

    ticks = [0.0] if top == 0 else [0.0, top]
    if top > 0:
        first = math.floor(math.log10(unit)) - 1
        last = math.ceil(math.log10(top))
        for digit in (1, 5, 2):
            for power in range(last, first - 1, -1):
                value = float(f"{digit}e{power}")
                if value < top and all(abs(place(value) - place(t)) >= 44 for t in ticks):
                    ticks.append(value)
    return place, sorted(ticks)


def _nice_ticks(lo: float, hi: float, most: int) -> list[str]:
    """Round numbers within [lo, hi], as text, at most ``most`` of them."""
    exponent = math.floor(math.log10((hi - lo) / most))
    for digit, power in ((1, 0), (2, 0), (5, 0), (1, 1), (2, 1)):
        step = digit * 10.0 ** (exponent + power)
        first, last = math.ceil(lo / step - ROUNDING), math.floor(hi / step + ROUNDING)
        if last - first < most:
            break
    places = max(0, -math.floor(math.log10(step)))
    return [f"{i * step:.{places}f}" if abs(i * step) < 1e6 else f"{i * step:.6g}" for i in range(first, last + 1)]


# --- pieces of SVG ----------------------------------------------------------------------------------------

_DASHES = ("", "6 4", "2 3", "9 3 2 3")
_COLOURS = ("#12467b", "#8a4b08", "#2f5d3a", "#5b2a6e")
_MARKERS = (
    "M-3.5,0a3.5,3.5 0 1,0 7,0a3.5,3.5 0 1,0 -7,0z",
    "M-3.2,-3.2h6.4v6.4h-6.4z",
    "M0,-4.2L4,3.2H-4z",
    "M0,-4.4L4.4,0L0,4.4L-4.4,0z",
)


def plain_text(text: str) -> str:
    """Replace what XML cannot hold (control characters, lone surrogates) by U+FFFD."""
    return _NOT_XML.sub("\ufffd", text)


def _escape(text: str) -> str:
    return html.escape(plain_text(text), quote=True)


def _svg(width: float, height: float, title: str, description: str, parts: Iterable[str]) -> str:
    """Wrap parts into the element; title and description are what a screen reader says of it."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {math.ceil(width)} {math.ceil(height)}" font-size="12" fill="{INK}" '
        "font-family=\"system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif\">"
        f"<title>{_escape(title)}</title><desc>{_escape(description)}</desc>{''.join(parts)}</svg>"
    )


def _text(
    x: float,
    y: float,
    text: str,
    anchor: str = "start",
    fill: str = INK,
    bold: bool = False,
    halo: bool = False,
    hint: str | None = None,
) -> str:
    """A line of text; ``halo`` keeps it legible on top of lines, ``hint`` is shown when pointed at."""
    weight = ' font-weight="600"' if bold else ""
    under = ' paint-order="stroke" stroke="#ffffff" stroke-width="4" stroke-linejoin="round"' if halo else ""
    title = f"<title>{_escape(hint)}</title>" if hint is not None else ""
    style = f'text-anchor="{anchor}" fill="{fill}"{weight}{under}'
    return f'<text x="{x:.2f}" y="{y:.2f}" {style}>{title}{_escape(text)}</text>'


def _rule(x1: float, y1: float, x2: float, y2: float, colour: str, dash: str = "", width: float = 1.3) -> str:
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}" stroke="{colour}" '
        f'stroke-width="{width:g}"{dashed}/>'
    )


def _marker(x: float, y: float, index: int, hint: str | None = None) -> str:
    title = f"<title>{_escape(hint)}</title>" if hint is not None else ""
    return (
        f'<path transform="translate({x:.2f},{y:.2f})" d="{_MARKERS[index % 4]}" fill="{_COLOURS[index % 4]}" '
        f'stroke="#ffffff" stroke-width="1">{title}</path>'
    )


def _polyline(line: Series, x: Sequence[float], y: _Scale, index: int, hint: Callable[[int, float], str]) -> str:
    """One series: a line that breaks at gaps, with a marker on every value."""
    parts = []
    previous: tuple[float, float] | None = None
    steps: list[str] = []
    markers = []
    for i, value in enumerate(line.values):
        if value is None:
            previous = None
            continue
        here = (x[i], y(value))
        steps.append(f"{'L' if previous else 'M'}{here[0]:.2f},{here[1]:.2f}")
        markers.append(_marker(*here, index, hint(i, value)))
        previous = here
    dash = f' stroke-dasharray="{_DASHES[index % 4]}"' if _DASHES[index % 4] else ""
    parts.append(f'<path d="{"".join(steps)}" fill="none" stroke="{_COLOURS[index % 4]}" stroke-width="1.8"{dash}/>')
    return f'<g class="series-{index}">{"".join(parts + markers)}</g>'


def _legend(x: float, y: float, series: Sequence[Series]) -> str:
    parts = []
    for index, line in enumerate(series):
        name = _fit(line.name, 210)
        parts.append(_rule(x, y - 4, x + 26, y - 4, _COLOURS[index % 4], _DASHES[index % 4], 1.8))
        parts.append(_marker(x + 13, y - 4, index))
        parts.append(_text(x + 32, y, name))
        x += 52 + _text_width(name)
    return "".join(parts)


def _y_axis(y: _Scale, left: float, right: float) -> str:
    parts = []
    # A tick every 27 px or more: room for its label.
    for tick in _nice_ticks(y.lo, y.hi, int((y.start - y.end) // 26)):
        at = y(float(tick))
        parts.append(_rule(left, at, right, at, RULE, width=1))
        parts.append(f'<g class="y-tick">{_text(left - 8, at + 4, tick, anchor="end", fill=MUTED)}</g>')
    return "".join(parts)


def _x_axis(ticks: Iterable[tuple[float, str]], y: float, right: float) -> str:
    parts = [_rule(_LEFT, y, right, y, MUTED, width=1)]
    for x, label in ticks:
        parts.append(_rule(x, y, x, y + 5, MUTED, width=1))
        parts.append(_text(x, y + 18, label, anchor="middle", fill=MUTED))
    return "".join(parts)


def _cell(x: float, y: float, value: float | None, limit: float | None, alarm: bool) -> str:
    """One cell with its value; an alarm carries a sign, so that it is seen in black and white."""
    shown = "–" if value is None else f"▲{value:.3f}" if alarm else f"{value:.3f}"
    ink = "#ffffff" if alarm else MUTED if value is None else INK
    return (
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{_CELL_W:g}" height="{_CELL_H:g}" '
        f'fill="{fill_of(value, limit, alarm)}" stroke="{RULE}"/>'
        + _text(x + _CELL_W / 2, y + 17, shown, anchor="middle", fill=ink, bold=alarm)
    )


def _above(value: float | None, limit: float | None) -> bool:
    return value is not None and limit is not None and value > limit + ROUNDING


def _side(x: float) -> str:
    """Text anchor that keeps a label near x inside the panel."""
    return "start" if x < _LEFT + 60 else "end" if x > _RIGHT - 60 else "middle"


def _number(value: float) -> str:
    return f"{value:.4g}"


def _text_width(text: str) -> float:
    """Estimated width in pixels at font size 12; wide East Asian characters count double."""
    return sum(13.0 if unicodedata.east_asian_width(c) in "WF" else 7.0 for c in text)


def _fit(text: str, pixels: float) -> str:
    """Shorten a label to a width, with an ellipsis."""
    if _text_width(text) <= pixels:
        return text
    kept = text
    while kept and _text_width(kept) + 7.0 > pixels:
        kept = kept[:-1]
    return kept + "…"


def _require_finite(what: str, values: Iterable[float]) -> None:
    """Raises:
    NumericalFailure: A value cannot be drawn, and must not be left out silently.
    """
    for value in values:
        if not math.isfinite(value):
            raise NumericalFailure(f"{what}: holds {value}, expected finite numbers. Run `takedown verify`.")


def _describe_curve(points: Sequence[CurvePoint], target: float, chosen: float) -> str:
    """The curve in words: its ends, the target and the chosen point."""

    def at(point: CurvePoint) -> str:
        utility = "" if point.utility_nll is None else f", utility NLL {point.utility_nll:.3f}"
        return f"at {_number(point.alpha)} largest exact memorisation {point.forget:.3f}{utility}"

    taken = [p for p in points if p.alpha == chosen]
    named = {p.alpha: p for p in (points[0], *taken, points[-1])}
    return (
        f"{len(points)} strengths from {_number(points[0].alpha)} to {_number(points[-1].alpha)}: "
        f"{'; '.join(at(p) for p in named.values())}. Target {target:.3f}, chosen strength {_number(chosen)}."
    )
