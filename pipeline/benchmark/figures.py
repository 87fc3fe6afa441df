"""The benchmark's figures as inline SVG: curves over steps, the frontier, cost. Pure functions from numbers to strings.

In: numbers and labels. Out: one ``<svg>`` each, with title and description, legible without colour. Never: a script.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.benchmark.summary import Spread
from pipeline.report_svg import (
    ACCENT,
    ALARM,
    INK,
    LEFT,
    MUTED,
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
from pipeline.report_svg import nice_ticks as round_numbers

_WIDTH, _RIGHT, _TOP, _FOOT = 640.0, 620.0, 40.0, 360.0


@dataclass(frozen=True)
class Point:
    """A method in the plane of forgetting and keeping.

    Attributes:
        name: Its title.
        forget: Exact memorisation of what was taken down; low is good.
        keep: Exact memorisation of what was to be kept; high is good.
        best: Whether it is on the frontier of the methods.
        fixed: Whether it is a baseline or a reference, not a method.
    """

    name: str
    forget: Spread
    keep: Spread
    best: bool
    fixed: bool


def frontier_plot(points: Sequence[Point], never_seen: float) -> str:
    """Forgetting against keeping after the last step; methods on the frontier are joined.

    Methods are circles, baselines and references squares; every point bears its name.
    """
    title = "Forgetting against keeping after the last step"
    if not points:
        return sentence(title, "Nothing to be kept was measured.")
    ends = [[s.mean - s.std, s.mean + s.std] for p in points for s in (p.forget, p.keep)]
    require_finite(title, [v for pair in ends for v in pair] + [never_seen])
    x = padded([v for p in points for v in (p.forget.mean - p.forget.std, p.forget.mean + p.forget.std)] + [never_seen],
               LEFT, _RIGHT - 8, low=0.0)  # fmt: skip
    y = padded([v for p in points for v in (p.keep.mean - p.keep.std, p.keep.mean + p.keep.std)], _FOOT, _TOP, high=1.0)
    parts = [text_at(LEFT, 14, "Exact memorisation of what is to be kept", bold=True), y_axis(y, LEFT, _RIGHT)]
    ticks = [(x(float(t)), t) for t in round_numbers(x.lo, x.hi, 9)]
    parts.append(x_axis(ticks, _FOOT, _RIGHT))
    parts.append(text_at(_RIGHT, _FOOT + 36, "exact memorisation of what was taken down", anchor="end", fill=MUTED))
    parts.append(rule(x(never_seen), _TOP - 6, x(never_seen), _FOOT, ALARM, "7 4"))
    parts.append(text_at(x(never_seen) + 5, _FOOT - 8, f"never seen {never_seen:.3f}", fill=ALARM, halo=True))
    best = sorted((p for p in points if p.best), key=lambda p: p.forget.mean)
    if len(best) > 1:
        way = "L".join(f"{place(x(p.forget.mean))},{place(y(p.keep.mean))}" for p in best)
        parts.append(f'<path d="M{way}" fill="none" stroke="{MUTED}" stroke-dasharray="2 3"/>')
    never = x(never_seen) + 5
    taken = [(never, _FOOT - 20, never + text_width("never seen 0.000"), _FOOT - 4)]
    for p in points:
        at = (x(p.forget.mean), y(p.keep.mean))
        if p.forget.std:
            parts.append(rule(x(p.forget.mean - p.forget.std), at[1], x(p.forget.mean + p.forget.std), at[1], MUTED))
        if p.keep.std:
            parts.append(rule(at[0], y(p.keep.mean - p.keep.std), at[0], y(p.keep.mean + p.keep.std), MUTED))
        taken.append((at[0] - 5, at[1] - 5, at[0] + 5, at[1] + 5))
    for p in points:
        at = (x(p.forget.mean), y(p.keep.mean))
        hint = f"{p.name}: taken down {p.forget.mean:.3f}, kept {p.keep.mean:.3f}"
        parts.append(markers([(*at, hint)], 1 if p.fixed else 0))
        parts.append(_label(p.name, at, taken, bold=p.best))
    said = "; ".join(f"{p.name} {p.forget.mean:.3f} and {p.keep.mean:.3f}" for p in points)
    names = ", ".join(p.name for p in best) or "none"
    description = f"Memorisation of what was taken down and of what is to be kept: {said}. On the frontier: {names}."
    return svg(_WIDTH, _FOOT + 44, title, description, parts)


def _label(name: str, at: tuple[float, float], taken: list[tuple[float, float, float, float]], bold: bool) -> str:
    """A name near its point, where nothing else stands; noted in ``taken``."""
    shown = fit(name, 150)
    wide = text_width(shown) * (1.15 if bold else 1.0)
    offsets = [4.0, *(4.0 + way * 14.0 * i for i in range(1, 16) for way in (-1, 1))]
    places = [(sign, dy) for dy in offsets for sign in (1, -1)]
    boxes = []
    for sign, dy in places:
        left = at[0] + 8 if sign > 0 else at[0] - 8 - wide
        boxes.append((left, at[1] + dy - 11, left + wide, at[1] + dy + 3))
    inside = [b for b in boxes if b[0] >= LEFT and b[2] <= _RIGHT and b[1] >= _TOP - 20 and b[3] <= _FOOT] or boxes
    free = [b for b in inside if not any(_overlap(b, other) for other in taken)]
    box = (free or inside)[0]
    taken.append(box)
    return text_at(box[0], box[3] - 3, shown, bold=bold, halo=True, hint=name if shown != name else None)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def bars(title: str, unit: str, rows: Sequence[tuple[str, Spread]]) -> str:
    """One horizontal bar for each row, its value printed behind it, a line for its deviation."""
    if not rows:
        return sentence(title, "Nothing was measured.")
    most = max(s.mean + s.std for _, s in rows)
    require_finite(title, [most])
    left = 20 + max(text_width(fit(name, 190)) for name, _ in rows)
    scale = (560.0 - left - 90) / most if most > 0 else 0.0
    parts = [text_at(10, 14, unit, bold=True)]
    for i, (name, s) in enumerate(rows):
        top, long = 28 + 24 * i, s.mean * scale
        parts.append(text_at(left - 8, top + 13, fit(name, 190), anchor="end"))
        parts.append(
            f'<rect x="{place(left)}" y="{place(top)}" width="{place(max(long, 1.0))}" height="17" fill="{ACCENT}"/>'
        )
        if s.std:
            parts.append(rule(left + long - s.std * scale, top + 8.5, left + long + s.std * scale, top + 8.5, INK))
        value = f"{s.mean:.3g}" + (f" ± {s.std:.2g}" if s.std else "")
        parts.append(text_at(left + long + s.std * scale + 6, top + 13, value))
    said = "; ".join(f"{name} {short_number(s.mean)}" for name, s in rows)
    return svg(580, 34 + 24 * len(rows), title, f"{unit}: {said}.", parts)
