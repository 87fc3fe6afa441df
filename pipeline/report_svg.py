"""Pieces of the report's figures: axes, markers, lines of text, and the ``<svg>`` element around them.

In: numbers and labels, the labels untrusted. Out: well-formed XML that needs nothing from outside. Never: a script, a
reference to another element or file, a figure without title and description.
"""

from __future__ import annotations

import html
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.errors import NumericalFailure

ROUNDING = 1e-9
"""Slack when a value is compared with a limit, that of the gate: a limit met exactly is met."""

INK, MUTED, RULE, ALARM, ACCENT = "#1b1f24", "#57606a", "#d0d7de", "#9b1c1c", "#12467b"

LEFT = 56.0
"""Where the panel of a plot begins: room for the labels of its y axis."""

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


# --- scales -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """The linear map from [lo, hi] to pixels [start, end]."""

    lo: float
    hi: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.lo) / (self.hi - self.lo) * (self.end - self.start)


def padded(
    values: Sequence[float], start: float, end: float, low: float | None = None, high: float | None = None
) -> Scale:
    """A scale around values, never narrower than 0.1 or a thousandth of them, so that noise does not fill the panel."""
    bounds = [*values, *(v for v in (low, high) if v is not None)]
    lo, hi = min(bounds), max(bounds)
    narrow = max(0.1, 1e-3 * max(abs(lo), abs(hi)))
    if hi - lo < narrow:
        lo, hi = (lo + hi - narrow) / 2, (lo + hi + narrow) / 2
    pad = 0.08 * (hi - lo)
    return Scale(lo if lo == low else lo - pad, hi if hi == high else hi + pad, start, end)


def nice_ticks(lo: float, hi: float, most: int) -> list[str]:
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

# How the series of a plot differ, by their number.
DASHES = ("", "6 4", "2 3", "9 3 2 3")
COLOURS = ("#12467b", "#8a4b08", "#2f5d3a", "#5b2a6e")
MARKERS = (
    "m-3.5,0a3.5,3.5 0 1,0 7,0a3.5,3.5 0 1,0 -7,0z",
    "m-3.2,-3.2h6.4v6.4h-6.4z",
    "m0,-4.2l4,7.4h-8z",
    "m0,-4.4l4.4,4.4l-4.4,4.4l-4.4,-4.4z",
)


def plain_text(text: str) -> str:
    """Replace what XML cannot hold (control characters, lone surrogates) by U+FFFD."""
    return _NOT_XML.sub("\ufffd", text)


def _escape(text: str) -> str:
    return html.escape(plain_text(text), quote=True)


def svg(width: float, height: float, title: str, description: str, parts: Iterable[str]) -> str:
    """Wrap parts into the element; title and description are what a screen reader says of it.

    Args:
        width: In pixels.
        height: Likewise.
        title: What is shown, in a few words.
        description: The same in sentences, for whoever does not see it.
        parts: Elements, well-formed and escaped.
    """
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {math.ceil(width)} {math.ceil(height)}" font-size="12" fill="{INK}" '
        "font-family=\"system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif\">"
        f"<title>{_escape(title)}</title><desc>{_escape(description)}</desc>{''.join(parts)}</svg>"
    )


def place(value: float) -> str:
    """A coordinate in as few characters as show it to a hundredth of a pixel."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def text_at(
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
    # What is said once for the whole figure is not said again: a long report has many thousand of these.
    placed = "" if anchor == "start" else f' text-anchor="{anchor}"'
    colour = "" if fill == INK else f' fill="{fill}"'
    return f'<text x="{place(x)}" y="{place(y)}"{placed}{colour}{weight}{under}>{title}{_escape(text)}</text>'


def rule(x1: float, y1: float, x2: float, y2: float, colour: str, dash: str = "", width: float = 1.3) -> str:
    """A straight line."""
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{place(x1)}" y1="{place(y1)}" x2="{place(x2)}" y2="{place(y2)}" stroke="{colour}" '
        f'stroke-width="{width:g}"{dashed}/>'
    )


def markers(points: Iterable[tuple[float, float, str]], index: int) -> str:
    """Points of the series with this number: place and what is shown when pointed at, nothing for an empty text."""
    drawn = (
        f'<path d="M{place(x)},{place(y)}{MARKERS[index % 4]}">'
        f"{f'<title>{_escape(hint)}</title>' if hint else ''}</path>"
        for x, y, hint in points
    )
    return f'<g fill="{COLOURS[index % 4]}" stroke="#ffffff">{"".join(drawn)}</g>'


def y_axis(y: Scale, left: float, right: float) -> str:
    """Labels and rules at round numbers."""
    parts = []
    # A tick every 27 px or more: room for its label.
    for tick in nice_ticks(y.lo, y.hi, int((y.start - y.end) // 26)):
        at = y(float(tick))
        parts.append(rule(left, at, right, at, RULE, width=1))
        parts.append(f'<g class="y-tick">{text_at(left - 8, at + 4, tick, anchor="end", fill=MUTED)}</g>')
    return "".join(parts)


def x_axis(ticks: Iterable[tuple[float, str]], y: float, right: float) -> str:
    """A line at height y from the panel's left, with a label under each tick.

    Args:
        ticks: Position and label of each.
        y: Height.
        right: Where it ends.
    """
    parts = [rule(LEFT, y, right, y, MUTED, width=1)]
    for x, label in ticks:
        parts.append(rule(x, y, x, y + 5, MUTED, width=1))
        parts.append(text_at(x, y + 18, label, anchor="middle", fill=MUTED))
    return "".join(parts)


def short_number(value: float) -> str:
    """A number with four significant digits."""
    return f"{value:.4g}"


def text_width(text: str) -> float:
    """Estimated width in pixels at font size 12; wide East Asian characters count double."""
    return sum(13.0 if unicodedata.east_asian_width(c) in "WF" else 7.0 for c in text)


def fit(text: str, pixels: float) -> str:
    """Shorten a label to a width, with an ellipsis."""
    if text_width(text) <= pixels:
        return text
    kept = text
    while kept and text_width(kept) + 7.0 > pixels:
        kept = kept[:-1]
    return kept + "…"


def require_finite(what: str, values: Iterable[float]) -> None:
    """Raises:
    NumericalFailure: A value cannot be drawn, and must not be left out silently.
    """
    for value in values:
        if not math.isfinite(value):
            raise NumericalFailure(f"{what}: holds {value}, expected finite numbers. Run `takedown verify`.")


def sentence(title: str, text: str) -> str:
    """What stands in the place of a figure that has nothing to show."""
    return svg(max(240.0, text_width(text) + 24), 34, title, text, [text_at(8, 22, text, fill=MUTED)])
