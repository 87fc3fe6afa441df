"""Figures of the versions as inline SVG: the graph of their descent, and what each adds to the store.

In: versions by rising number. Out: figures of at most `ROWS` rows each, so that none is cut by the edge of a printed
page. Never: a status or kind that only a colour tells; each is also a shape and a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC
from itertools import pairwise

from pipeline.report_svg import ACCENT, ALARM, INK, MUTED, RULE, fit, rule, svg, text_at, text_width
from pipeline.report_views import StorageView, VersionView
from pipeline.report_words import listed, share, size

ROWS = 28
"""Rows of a figure: with its head it is 806 pixels high, and a printed A4 page has about 1,000."""

_ROW, _LANE, _HEAD = 28.0, 22.0, 22.0

# The shapes of the nodes, around (0, 0); a second path is drawn inside the first.
_CIRCLE = "M-{0},0a{0},{0} 0 1,0 {1},0a{0},{0} 0 1,0 -{1},0z"
_SHAPES: Mapping[str, tuple[tuple[str, str, str], ...]] = {
    "current": ((_CIRCLE.format(8, 16), "#ffffff", ACCENT), (_CIRCLE.format(4.5, 9), ACCENT, ACCENT)),
    "superseded": ((_CIRCLE.format(5.5, 11), INK, INK),),
    "rolled back": (("M-5.5,-5.5h11v11h-11z", "#ffffff", INK),),
    "purged": (("M-5,-5h10v10h-10z", "#ffffff", "#ffffff"), ("M-5,-5L5,5M5,-5L-5,5", "none", INK)),
}
"""Status → (path, fill, stroke): a ring around a disc, a disc, an empty square, a cross."""


# --- the graph --------------------------------------------------------------------------------------------


def lanes(nodes: Sequence[VersionView], line: Sequence[int]) -> dict[int, int]:
    """The column in which each version is drawn.

    The versions of ``line`` take column 0. Every other chain of versions takes the leftmost column that is free from
    its parent's row to its own last row, so that no edge runs through a version that it does not belong to.

    Args:
        nodes: Versions by rising number.
        line: The version in force and those that it was made from.
    """
    row = {node.version: i for i, node in enumerate(nodes)}
    found = {node.version: 0 for node in nodes if node.version in line}
    chains: list[list[VersionView]] = []
    tail: dict[int, list[VersionView]] = {}
    for node in nodes:
        if node.version in found:
            continue
        chain = tail.pop(node.parent, None) if node.parent is not None else None
        if chain is None:
            chain = []
            chains.append(chain)
        chain.append(node)
        tail[node.version] = chain
    taken: dict[int, list[tuple[int, int]]] = {}
    for chain in chains:
        first = row.get(chain[0].parent, row[chain[0].version]) if chain[0].parent is not None else 0
        last, lane = row[chain[-1].version], 1
        while any(first <= end and start <= last for start, end in taken.get(lane, ())):
            lane += 1
        taken.setdefault(lane, []).append((first, last))
        found |= {node.version: lane for node in chain}
    return found


def lineage_graph(nodes: Sequence[VersionView], line: Sequence[int]) -> list[str]:
    """Draw the descent of the versions, oldest first, one row each.

    Args:
        nodes: Versions by rising number.
        line: The version in force and those that it was made from, drawn as one straight line.

    Returns:
        Figures to be shown one under the other; none where there is no version.
    """
    lane, row = lanes(nodes, line), {node.version: i for i, node in enumerate(nodes)}
    left = 16 + _LANE * (1 + max(lane.values(), default=0))
    # An edge leaves the column of the parent in the first row after it, then runs straight down.
    edges = [
        (row[node.parent], row[node.version], lane[node.parent], lane[node.version], node.version in line)
        for node in nodes
        if node.parent in row and row[node.parent] < row[node.version]
    ]
    figures = []
    for start in range(0, len(nodes), ROWS):
        shown = nodes[start : start + ROWS]
        parts = [
            text_at(left + x, 13, head, fill=MUTED)
            for x, head in ((0, "version"), (56, "status"), (144, "published"), (234, "first to exclude"))
        ]
        for top, bottom, origin, target, main in edges:
            parts += _edge(top, bottom, origin, target, main, start, start + len(shown) - 1)
        for i, node in enumerate(shown):
            parts += _node(node, 16 + lane[node.version] * _LANE, _HEAD + (i + 0.5) * _ROW, left)
        width = left + 234 + max(100.0, *(text_width(fit(_label(node), 250)) for node in shown)) + 4
        title = "Lineage" if len(nodes) <= ROWS else f"Lineage, v{shown[0].version} to v{shown[-1].version}"
        figures.append(svg(width, _HEAD + len(shown) * _ROW + 4, title, _described(shown), parts))
    return figures


def _edge(top: int, bottom: int, origin: int, target: int, main: bool, first: int, last: int) -> list[str]:
    """The part of an edge that lies in the rows from ``first`` to ``last`` of one figure; a branch is dashed."""

    def x(at: float) -> float:
        return 16 + _LANE * (origin + (target - origin) * min(1.0, at - top))

    def y(at: float) -> float:
        return _HEAD + (at - first + 0.5) * _ROW

    begin, end = max(float(top), first - 0.5), min(float(bottom), last + 0.5)
    stops = [begin, *([top + 1.0] if origin != target and begin < top + 1 < end else []), end]
    if begin >= end:
        return []
    dash, width = ("", 2.0) if main else ("4 3", 1.6)
    return [rule(x(a), y(a), x(b), y(b), INK, dash, width) for a, b in pairwise(stops)]


def _node(node: VersionView, x: float, y: float, left: float) -> list[str]:
    paths = [
        f'<path transform="translate({x:.2f},{y:.2f})" d="{path}" fill="{fill}" stroke="{stroke}" stroke-width="2"/>'
        for path, fill, stroke in _SHAPES.get(node.status, _SHAPES["superseded"])
    ]
    bold = node.status == "current"
    label, date = _label(node), node.created_at.astimezone(UTC).strftime("%Y-%m-%d")
    fitted = fit(label, 250)
    return [
        *paths,
        text_at(left, y + 4, f"v{node.version}", bold=True),
        text_at(left + 56, y + 4, node.status, bold=bold),
        text_at(left + 144, y + 4, date, bold=bold),
        text_at(left + 234, y + 4, fitted, bold=bold, hint=label if label != fitted else None),
    ]


def _label(node: VersionView) -> str:
    if node.puts_back:
        return f"puts back {listed(node.puts_back, 20)}"
    return "untouched model" if node.parent is None else listed(node.requests, 20)


def _described(nodes: Sequence[VersionView]) -> str:
    """The graph in sentences; the table beside it has every parent."""
    groups = [
        f"{status}: {listed([f'v{n.version}' for n in nodes if n.status == status], 40)}"
        for status in _SHAPES
        if any(n.status == status for n in nodes)
    ]
    turns = [
        f"v{n.version} from v{n.parent}"
        for before, n in pairwise(nodes)
        if n.parent is not None and n.parent != before.version
    ]
    joints = f" Not made from the version before: {listed(turns, 40)}." if turns else ""
    return f"{'; '.join(groups).capitalize()}.{joints}"


# --- what is stored ---------------------------------------------------------------------------------------

_BAR_LEFT, _BAR, _BAR_RIGHT = 52.0, 200.0, 266.0


def storage_bars(versions: Sequence[StorageView]) -> list[str]:
    """Draw how much each version adds to the store, as a share of a whole copy; the frame of a bar is that copy.

    Returns:
        Figures to be shown one under the other; none where there is no version.
    """
    figures = []
    for start in range(0, len(versions), ROWS):
        shown = versions[start : start + ROWS]
        parts = [
            text_at(_BAR_LEFT, 13, "share of a whole copy", fill=MUTED),
            *(text_at(x, 13, head, anchor="end", fill=MUTED) for x, head in ((394, "added"), (450, "share"))),
        ]
        for i, item in enumerate(shown):
            parts += _bar(item, _HEAD + i * _ROW)
        title = "Bytes added to the store by each version"
        if len(versions) > ROWS:
            title += f", v{shown[0].version} to v{shown[-1].version}"
        said = "; ".join(f"v{k.version} {k.kind}, {size(k.added)} of {size(k.whole)}" for k in shown)
        figures.append(svg(456, _HEAD + len(shown) * _ROW + 4, title, f"{said}.", parts))
    return figures


def _bar(item: StorageView, top: float) -> list[str]:
    part = min(1.0, item.added / item.whole) if item.added is not None and item.whole else 0.0
    # A whole copy is a full bar, a delta an outlined one: they differ in black and white too.
    fill = INK if item.kind == "whole" else "#ffffff" if item.kind == "delta" else RULE
    drawn = max(2.0, _BAR * part) if item.added else 0.0
    missing = item.kind == "missing"
    bars = [_rect(top, _BAR, "#ffffff", RULE), *([_rect(top, drawn, fill, INK)] if drawn else [])]
    told = share(item.added, item.whole) if item.added is not None else "–"
    return [
        text_at(_BAR_LEFT - 10, top + 18, f"v{item.version}", anchor="end", bold=True),
        *bars,
        text_at(_BAR_RIGHT, top + 18, f"▲ {item.kind}" if missing else item.kind, fill=ALARM if missing else INK),
        text_at(394, top + 18, size(item.added), anchor="end"),
        text_at(450, top + 18, told, anchor="end"),
    ]


def _rect(top: float, width: float, fill: str, stroke: str) -> str:
    return (
        f'<rect x="{_BAR_LEFT:.2f}" y="{top + 7:.2f}" width="{width:.2f}" height="14" fill="{fill}" stroke="{stroke}"/>'
    )
