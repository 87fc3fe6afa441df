"""The figures: well-formed, at the right place, readable without colour, whatever the numbers and labels."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import NumericalFailure
from pipeline.plots import Series, alpha_curve, fill_of, lines, persistence_matrix
from pipeline.records import CurvePoint
from pipeline.report_lineage import ROWS, lanes, lineage_graph, storage_bars
from pipeline.report_svg import plain_text, sentence
from pipeline.report_views import StorageView, VersionView

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = ["<script>alert(1)</script>", '" onload="x', "a & b", "</title></svg>", "{{ 7*7 }}", "\x00\x1b\ud800\uffff"]


def parse(svg: str) -> ET.Element:
    """Parse and check what every figure promises: a role, a title, a description, nothing from outside."""
    root = ET.fromstring(svg)
    assert root.tag == f"{SVG}svg" and root.get("role") == "img"
    assert [child.tag for child in list(root)[:2]] == [f"{SVG}title", f"{SVG}desc"]
    assert root[0].text and root[1].text
    assert svg.count("http") == 1
    assert not {e.tag.removeprefix(SVG) for e in root.iter()} - {
        "svg",
        "title",
        "desc",
        "text",
        "line",
        "path",
        "rect",
        "g",
    }
    assert not any(name.startswith("on") or "href" in name for e in root.iter() for name in e.attrib)
    return root


def numbers(text: str) -> list[float]:
    return [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", text)]


def walk(d: str) -> list[tuple[float, float]]:
    """Every position that a path goes to; capital letters are absolute, as in SVG."""
    found, x, y = [], 0.0, 0.0
    for letter, rest in re.findall("([A-Za-z])([^A-Za-z]*)", d):
        values = numbers(rest)
        steps: list[tuple[float | None, float | None]]
        match letter.lower():
            case "m" | "l":
                steps = list(zip(values[::2], values[1::2], strict=True))
            case "a":
                steps = list(zip(values[5::7], values[6::7], strict=True))
            case "h":
                steps = [(value, None) for value in values]
            case "v":
                steps = [(None, value) for value in values]
            case _:
                assert letter == "z"
                steps = []
        for across, down in steps:
            if letter.isupper():
                x, y = (x if across is None else across), (y if down is None else down)
            else:
                x, y = x + (across or 0), y + (down or 0)
            found.append((x, y))
    return found


def coordinates(root: ET.Element) -> list[tuple[float, float]]:
    """Every position in a figure; of a path that is moved as a whole, where it is moved to."""
    found = []
    for e in root.iter():
        if e.tag == f"{SVG}line":
            found += [(float(e.attrib[f"x{i}"]), float(e.attrib[f"y{i}"])) for i in "12"]
        elif e.tag in (f"{SVG}text", f"{SVG}rect"):
            found.append((float(e.attrib["x"]), float(e.attrib["y"])))
            if e.tag == f"{SVG}rect":
                found.append((found[-1][0] + float(e.attrib["width"]), found[-1][1] + float(e.attrib["height"])))
        elif e.tag == f"{SVG}path":
            moved = numbers(e.attrib.get("transform", ""))
            found += [(moved[0], moved[1])] if moved else walk(e.attrib["d"])
    return found


def assert_inside(root: ET.Element) -> None:
    left, top, width, height = numbers(root.attrib["viewBox"])
    for x, y in coordinates(root):
        assert math.isfinite(x) and math.isfinite(y)
        assert left <= x <= left + width and top <= y <= top + height, (x, y)


def series(root: ET.Element, index: int) -> tuple[list[tuple[float, float]], ET.Element]:
    """Marker positions of a series, and its line."""
    group = next(e for e in root.iter(f"{SVG}g") if e.get("class") == f"series-{index}")
    line, markers = list(group)
    return [walk(m.attrib["d"])[0] for m in markers], line


def y_of_ticks(root: ET.Element, panel: slice = slice(None)) -> list[tuple[float, float]]:
    """(value, y) of the ticks, read off the axis labels; a label stands 4 px under its line."""
    ticks = [g[0] for g in root.iter(f"{SVG}g") if g.get("class") == "y-tick"]
    return [(float(t.text or ""), float(t.attrib["y"]) - 4) for t in ticks][panel]


def expected_y(value: float, ticks: Sequence[tuple[float, float]]) -> float:
    """Linear interpolation between the outermost ticks."""
    (v0, y0), (v1, y1) = ticks[0], ticks[-1]
    return y0 + (value - v0) / (v1 - v0) * (y1 - y0)


def texts(root: ET.Element) -> list[str]:
    return ["".join(t for t in [e.text, *(c.tail for c in e)] if t) for e in root.iter(f"{SVG}text")]


def point(alpha: float, forget: float, utility: float | None = None, earlier: float | None = None) -> CurvePoint:
    return CurvePoint(alpha=alpha, forget=forget, earlier=earlier, utility_nll=utility)


SEARCH = [
    point(a, 0.05 + 0.93 / (1 + a * a), 4.35 + 0.01 * a, 0.17 + 0.001 * a)
    for a in (0.0, 1.0, 2.0, 4.0, 64.0, 3.0, 2.5, 2.25, 2.375, 2.4375, 2.40625)
]


# --- the curve --------------------------------------------------------------------------------------------


def test_curve_points_lie_where_the_linear_formula_puts_them() -> None:
    root = parse(alpha_curve(SEARCH, 0.184, 2.4375))
    assert_inside(root)
    ticks = y_of_ticks(root)
    forget_ticks, utility_ticks = ticks[:6], ticks[6:]
    assert [v for v, _ in forget_ticks] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    ordered = sorted(SEARCH, key=lambda p: p.alpha)
    forget, earlier, utility = (series(root, i)[0] for i in range(3))
    for i, p in enumerate(ordered):
        assert p.earlier is not None and p.utility_nll is not None
        # Coordinates are written with two decimals; ticks too, so that the formula adds at most as much again.
        assert forget[i][1] == pytest.approx(expected_y(p.forget, forget_ticks), abs=0.02)
        assert earlier[i][1] == pytest.approx(expected_y(p.earlier, forget_ticks), abs=0.02)
        assert utility[i][1] == pytest.approx(expected_y(p.utility_nll, utility_ticks), abs=0.03)
    assert [x for x, _ in forget] == [x for x, _ in utility] == sorted(x for x, _ in forget)


def test_curve_x_axis_is_log1p_of_alpha_over_the_chosen_one() -> None:
    root = parse(alpha_curve(SEARCH, 0.184, 2.4375))
    alphas = sorted(p.alpha for p in SEARCH)
    x = [x for x, _ in series(root, 0)[0]]
    for a, at in zip(alphas, x, strict=True):
        share = math.log1p(a / 2.4375) / math.log1p(64 / 2.4375)
        assert at == pytest.approx(x[0] + share * (x[-1] - x[0]), abs=0.02)


def test_curve_draws_target_and_chosen_strength() -> None:
    root = parse(alpha_curve(SEARCH, 0.184, 2.4375))
    assert "target 0.184" in texts(root) and "chosen α = 2.438" in texts(root)
    y = expected_y(0.184, y_of_ticks(root)[:6])
    dashed = [e for e in root.iter(f"{SVG}line") if e.get("stroke-dasharray")]
    assert any(float(e.attrib["y1"]) == float(e.attrib["y2"]) == pytest.approx(y, abs=0.02) for e in dashed)
    x = series(root, 0)[0][sorted(p.alpha for p in SEARCH).index(2.4375)][0]
    assert any(float(e.attrib["x1"]) == float(e.attrib["x2"]) == pytest.approx(x, abs=0.01) for e in dashed)
    assert "11 strengths from 0 to 64" in (root[1].text or "") and "Target 0.184" in (root[1].text or "")


def test_curve_hints_carry_every_value() -> None:
    root = parse(alpha_curve(SEARCH, 0.184, 2.4375))
    hints = {e.text for e in root.iter(f"{SVG}title")}
    for p in SEARCH:
        assert f"α {p.alpha:.4g}: {p.forget:.3f}" in hints and f"α {p.alpha:.4g}: {p.utility_nll:.4f} nats" in hints


@pytest.mark.parametrize("chosen", [0.03, 0.7, 2.4375, 40.0, 64.0])
def test_bisection_around_the_chosen_strength_stays_apart(chosen: float) -> None:
    alphas = [0.0, chosen * 0.75, chosen, 64.0]
    root = parse(alpha_curve([point(a, 0.5) for a in alphas], 0.2, chosen))
    x = sorted({x for x, _ in series(root, 0)[0]})
    assert x[2] - x[1] > 8  # more than a marker


@pytest.mark.parametrize("chosen", [0.003, 0.7, 2.4375, 40.0, 64.0])
def test_labels_of_the_strength_axis_do_not_touch(chosen: float) -> None:
    root = parse(alpha_curve([point(a, 0.5, 4.0) for a in (0.0, chosen, 64.0)], 0.2, chosen))
    labels = [e for e in root.iter(f"{SVG}text") if e.get("text-anchor") == "middle" and "α" not in (e.text or "")]
    spans = sorted((float(e.attrib["x"]), 7 * len(e.text or "") / 2) for e in labels)
    assert len(spans) >= 3
    assert all(x1 + w1 < x2 - w2 for (x1, w1), (x2, w2) in pairwise(spans))


def test_curve_without_utility_has_one_panel() -> None:
    both, one = parse(alpha_curve(SEARCH, 0.2, 2.5)), parse(alpha_curve([point(0, 1), point(1, 0.1)], 0.2, 1))
    assert float(one.attrib["height"]) < float(both.attrib["height"])
    assert not any("NLL" in t for t in texts(one))


@pytest.mark.parametrize(
    "points",
    [
        [point(0.0, 1.0, 4.0)],
        [point(1.0, 1.0, 4.0)],
        [point(a, 0.3, 4.0) for a in (0.0, 1.0, 2.0)],
        [point(1.0, 0.3, 4.0), point(1.0, 0.2, 4.1)],
        [point(0.0, 1.0, None), point(1.0, 0.5, 4.0), point(2.0, 0.2, None)],
    ],
    ids=["one at zero", "one", "equal", "same alpha", "gaps"],
)
def test_curve_of_few_or_equal_points(points: list[CurvePoint]) -> None:
    root = parse(alpha_curve(points, 0.2, points[-1].alpha))
    assert_inside(root)
    assert len(series(root, 0)[0]) == len(points)


def test_nothing_to_show_is_said_in_a_sentence() -> None:
    for svg in (alpha_curve([], 0.2, 0.0), lines([], [], "t", "u"), lines(["v0"], [Series("a", [None])], "t", "u")):
        assert any(t.endswith(".") for t in texts(parse(svg)))
    for rows, columns in ([], ["v0"]), (["TD-1"], []):
        svg = persistence_matrix(rows, columns, [[] for _ in rows], [None for _ in columns])
        assert "No request has been measured on any version yet." in texts(parse(svg))
    assert_inside(parse(sentence("a", "Nothing here.")))


share = st.floats(0, 1)
curves = st.lists(
    st.builds(
        CurvePoint,
        alpha=st.floats(0, 1e6) | st.sampled_from([0.0, 0.5, 1.0, 64.0]),
        forget=share,
        earlier=st.none() | share,
        utility_nll=st.none() | st.floats(0, 1e6),
    ),
    min_size=1,
    max_size=20,
)


@settings(max_examples=150, deadline=None)
@given(points=curves, target=share, data=st.data())
def test_any_curve_is_finite_and_inside_its_box(points: list[CurvePoint], target: float, data: st.DataObject) -> None:
    chosen = data.draw(st.sampled_from(points)).alpha
    root = parse(alpha_curve(points, target, chosen))
    assert_inside(root)
    assert len(series(root, 0)[0]) == len(points)


# --- lines ------------------------------------------------------------------------------------------------


def test_lines_break_at_gaps_and_differ_without_colour() -> None:
    data = [Series("forget", [None, 0.2, None, 0.25, 0.21]), Series("kept", [1.0, 0.9, 0.9, 0.88, 0.87])]
    root = parse(lines([f"v{i}" for i in range(5)], data, "Over time", "EM", limit=0.3, low=0.0, high=1.0))
    assert_inside(root)
    (points, line), (others, other) = series(root, 0), series(root, 1)
    assert line.attrib["d"].count("M") == 2 and len(points) == 3
    assert other.attrib["d"].count("M") == 1 and len(others) == 5
    assert line.get("stroke-dasharray") != other.get("stroke-dasharray")
    drawn = [m.attrib["d"] for g in root.iter(f"{SVG}g") if g.get("fill") for m in g]
    assert len(drawn) == 3 + 5 + 2  # a marker on every value, and one of each series in the legend
    assert len({d[d.index("m") :] for d in drawn}) == 2
    ticks = y_of_ticks(root)
    for (_, y), value in zip(others, (1.0, 0.9, 0.9, 0.88, 0.87), strict=True):
        assert y == pytest.approx(expected_y(value, ticks), abs=0.02)
    assert {"forget", "kept", "limit 0.300", "v0", "v4"} <= set(texts(root))


def test_lines_with_error_bars() -> None:
    data = [Series("a", [0.5, None, 0.7], [0.2, 0.0, 0.0])]
    root = parse(lines(["1", "2", "3"], data, "t", "u", limit_name="never seen", limit=0.1, x_name="after step"))
    assert_inside(root)
    ticks = y_of_ticks(root)
    bars = [
        p.attrib["d"] for p in root.iter(f"{SVG}path") if re.fullmatch(r"M[^M]+h6M[^M]+h6M[^M]+V[^M]+", p.attrib["d"])
    ]
    assert len(bars) == 1  # a value without a spread has none
    low, high = (float(y) for y in re.findall(r"M[\d.]+,([\d.]+)h6", bars[0]))
    assert low == pytest.approx(expected_y(0.3, ticks), abs=0.02)
    assert high == pytest.approx(expected_y(0.7, ticks), abs=0.02)
    assert {"never seen 0.100", "after step"} <= set(texts(root))


def test_lines_of_many_versions_label_only_some() -> None:
    labels = [f"v{i}" for i in range(400)]
    root = parse(lines(labels, [Series("a", [0.1] * 400)], "t", "u"))
    assert_inside(root)
    assert sum(t.startswith("v") for t in texts(root)) <= 14


def test_lines_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="2 values for 1 labels"):
        lines(["v0"], [Series("a", [0.1, 0.2])], "t", "u")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.none() | st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_any_lines_are_finite_and_inside_their_box(values: list[float | None]) -> None:
    assert_inside(parse(lines([f"v{i}" for i in range(len(values))], [Series("a", values)], "t", "u")))


# --- the matrix -------------------------------------------------------------------------------------------


def matrix() -> ET.Element:
    return parse(
        persistence_matrix(
            ["TD-1", "TD-2"],
            ["v0", "v1", "v2"],
            [[0.99, 0.21, 0.262], [None, 0.97, 0.2]],
            [None, 0.21, 0.25],
            [[False, True, True], [False, False, True]],
        )
    )


def test_matrix_prints_every_value_in_its_cell() -> None:
    """Cells of 56 x 26 pixels right of the ids, below the line of versions; a bar where nothing was measured."""
    root = matrix()
    assert_inside(root)
    (grid,) = (e for e in root.iter(f"{SVG}path") if "H" in e.attrib["d"] and "V" in e.attrib["d"])
    left, top = walk(grid.attrib["d"])[0]
    (bar,) = (walk(e.attrib["d"]) for e in root.iter(f"{SVG}path") if e.get("class") == "gaps")
    for i, row in enumerate((["0.990", "0.210", "▲0.262"], [None, "0.970", "0.200"])):
        for j, value in enumerate(row):
            x, y = left + 56 * j, top + 26 * i
            inside = [
                e.text
                for e in root.iter(f"{SVG}text")
                if x < float(e.attrib["x"]) < x + 56 and y < float(e.attrib["y"]) < y + 26
            ]
            barred = all(x < a < x + 56 and y < b < y + 26 for a, b in bar)
            assert (inside, barred) == (([value], False) if value else ([], True))
    assert {"0.210", "0.250", "limit", "TD-1", "v2"} <= set(texts(root))


def test_matrix_fills_only_cells_above_the_limit() -> None:
    fills = [(e.get("fill"), e.get("x"), e.get("y")) for e in matrix().iter(f"{SVG}rect")]
    left = 55.0
    assert [(fill, float(x or 0) - left, float(y or 0)) for fill, x, y in fills] == [
        ("#9b1c1c", 112.0, 26.0),
        (fill_of(0.97, 0.21, False), 56.0, 52.0),
    ]


@pytest.mark.parametrize(
    ("before", "fences"), [(None, []), ([True, True], [1]), ([False, True], [0, 1]), ([False, False], [0, 1])]
)
def test_exclusion_that_begins_with_a_page_of_the_matrix_is_marked(
    before: list[bool] | None, fences: list[int]
) -> None:
    """TD-1 is excluded from the first column on, TD-2 from the second."""
    excluded = [[True, True], [False, True]]
    svg = persistence_matrix(
        ["TD-1", "TD-2"], ["v11", "v12"], [[0.1, 0.1], [0.9, 0.1]], [0.2, 0.2], excluded, before=before
    )
    found = [e for e in parse(svg).iter(f"{SVG}line") if e.get("stroke-width") == "3"]
    assert sorted((float(e.attrib["y1"]) - 25.5) // 26 for e in found) == ([1] if before is None else fences)


def test_matrix_alarms_only_where_the_text_should_be_gone() -> None:
    root = matrix()
    assert "although taken out: TD-1 on v2 (0.262)." in (root[1].text or "")
    fences = [e for e in root.iter(f"{SVG}line") if e.get("stroke-width") == "3"]
    (grid,) = (walk(e.attrib["d"]) for e in root.iter(f"{SVG}path") if "V" in e.attrib["d"])
    left = grid[0][0]
    assert [float(e.attrib["x1"]) for e in fences] == [left + 56, left + 2 * 56]


def test_matrix_without_knowledge_of_exclusion_holds_every_cell_to_the_limit() -> None:
    root = parse(persistence_matrix(["a"], ["v0"], [[0.5]], [0.2]))
    assert "▲0.500" in texts(root)


def test_shade_is_relative_to_the_limit() -> None:
    assert fill_of(0.2, 0.2, False) == fill_of(0.0, 0.2, False) == fill_of(None, 0.2, False) == "#ffffff"
    assert fill_of(0.9, None, False) == "#ffffff"
    greys = [int(fill_of(v, 0.2, False)[1:3], 16) for v in (0.21, 0.4, 0.6, 0.8, 1.0)]
    assert greys == sorted(greys, reverse=True) and greys[-1] == 0x8C
    # halfway between limit and 1, halfway between the greys
    assert int(fill_of(0.6, 0.2, False)[1:3], 16) == (0xF2 + 0x8C) // 2
    assert fill_of(1.0, 1.0, False) == "#ffffff"


def test_matrix_shortens_long_labels_and_keeps_them_as_hints() -> None:
    long, wide = "TD-" + "x" * 200, "灯" * 60
    root = parse(persistence_matrix([long, wide], ["v0"], [[0.1], [0.1]], [0.2]))
    assert float(root.attrib["width"]) < 320
    assert {long, wide} <= {e.text for e in root.iter(f"{SVG}title")}


def test_matrix_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="1 rows of 2"):
        persistence_matrix(["a"], ["v0", "v1"], [[0.1]], [0.2, 0.2])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_matrix_is_finite_and_inside_its_box(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    cell = st.none() | st.floats(0, 1)
    values = data.draw(st.lists(st.lists(cell, min_size=columns, max_size=columns), min_size=rows, max_size=rows))
    limits = data.draw(st.lists(cell, min_size=columns, max_size=columns))
    labels = data.draw(st.lists(st.text(max_size=40), min_size=rows, max_size=rows))
    root = parse(persistence_matrix(labels, [f"v{i}" for i in range(columns)], values, limits))
    assert_inside(root)
    bars = [e.attrib["d"].count("h6") for e in root.iter(f"{SVG}path") if e.get("class") == "gaps"]
    assert sum(bars) == sum(value is None for row in values for value in row)


# --- versions ---------------------------------------------------------------------------------------------


def node(number: int, parent: int | None, status: str = "superseded", requests: tuple[str, ...] = ()) -> VersionView:
    return VersionView.model_validate(
        {
            "version": number, "parent": parent, "root": "r", "created_at": datetime(2026, 11, 2, tzinfo=UTC)
            + timedelta(days=number), "published_by": "x", "run_id": None, "requests": requests, "selected": None,
            "changed": None, "total": None, "alpha": None, "status": status,
        }
    )  # fmt: skip


FORKED = (
    node(0, None, "purged"), node(1, 0), node(2, 1, "rolled back", ("TD-2",)), node(3, 2, "rolled back"),
    node(4, 1, "rolled back"), node(5, 1, "current", ("TD-5", "TD-6")), node(6, 5, "rolled back"),
)  # fmt: skip


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[VersionView], list[int]]:
    """Any tree of versions in which parents come first, some left out, and the line to one of them."""
    parents: dict[int, int | None] = {0: None}
    for number in range(1, draw(st.integers(1, 70))):
        parents[number] = draw(st.integers(0, number - 1))
    current = draw(st.sampled_from(sorted(parents)))
    line = [current]
    while (parent := parents[line[-1]]) is not None:
        line.append(parent)
    lost = draw(st.sets(st.sampled_from(sorted(parents)), max_size=3)) - {current}
    status = {n: "current" if n == current else "superseded" if n in line else "rolled back" for n in parents}
    return [node(n, p, status[n]) for n, p in parents.items() if n not in lost], line


def test_branches_stand_beside_the_line_that_is_in_force() -> None:
    assert lanes(FORKED, (0, 1, 5)) == {0: 0, 1: 0, 2: 1, 3: 1, 4: 2, 5: 0, 6: 1}


@settings(max_examples=150, deadline=None)
@given(histories())
def test_no_edge_runs_through_a_version_that_it_does_not_belong_to(
    history: tuple[list[VersionView], list[int]],
) -> None:
    nodes, line = history
    column, row = lanes(nodes, line), {v.version: i for i, v in enumerate(nodes)}
    assert {v for v in column if column[v] == 0} == {v.version for v in nodes if v.version in line}
    for v in nodes:
        if v.parent in row:
            between = [n for n in nodes if row[v.parent] < row[n.version] < row[v.version]]
            assert all(column[n.version] != column[v.version] for n in between), v


@settings(max_examples=60, deadline=None)
@given(histories())
def test_any_graph_shows_every_version_once_and_stays_inside_its_box(
    history: tuple[list[VersionView], list[int]],
) -> None:
    nodes, line = history
    figures = [parse(svg) for svg in lineage_graph(nodes, line)]
    assert len(figures) == math.ceil(len(nodes) / ROWS)
    for root in figures:
        assert_inside(root)
        assert float(root.attrib["height"]) < 900  # a printed A4 page has about 1,000
    shown = [t for root in figures for t in texts(root) if re.fullmatch(r"v\d+", t)]
    assert shown == [f"v{v.version}" for v in nodes]


def test_graph_tells_status_by_shape_and_word() -> None:
    (root,) = (parse(svg) for svg in lineage_graph(FORKED, (0, 1, 5)))
    shapes: dict[str, set[tuple[str, ...]]] = {}
    rows: dict[float, list[str]] = {}
    for e in root.iter(f"{SVG}path"):
        rows.setdefault(numbers(e.attrib["transform"])[1], []).append(e.attrib["d"])
    for v, (_, paths) in zip(FORKED, sorted(rows.items()), strict=True):
        shapes.setdefault(v.status, set()).add(tuple(paths))
    assert all(len(found) == 1 for found in shapes.values())
    assert len({next(iter(found)) for found in shapes.values()}) == 4
    assert [t for t in texts(root) if t in shapes] == [v.status for v in FORKED]
    dashed = [e for e in root.iter(f"{SVG}line") if e.get("stroke-dasharray")]
    solid = [e for e in root.iter(f"{SVG}line") if not e.get("stroke-dasharray")]
    assert len(solid) == 2  # 0-1 and 1-5, straight
    assert {e.attrib["x1"] == e.attrib["x2"] for e in solid} == {True} and dashed
    said = root[1].text or ""
    assert said.startswith("Current: v5; superseded: v1; rolled back: v2, v3, v4, v6; purged: v0.")
    assert "v4 from v1" in said and "v5 from v1" in said


def test_edges_go_on_over_the_border_of_a_figure() -> None:
    nodes = [node(0, None), *(node(n, n - 1) for n in range(1, ROWS + 3))]
    first, second = (parse(svg) for svg in lineage_graph(nodes, [v.version for v in nodes]))
    assert len(list(first.iter(f"{SVG}line"))) == ROWS  # the last one leads on to the next figure
    tops = sorted(float(e.attrib["y1"]) for e in second.iter(f"{SVG}line"))
    assert tops[0] == pytest.approx(22.0)  # where the first row begins


def stored(number: int, kind: str, added: int | None) -> StorageView:
    return StorageView.model_validate({"version": number, "kind": kind, "added": added, "whole": 1_000_000})


def test_storage_bars_are_shares_of_a_whole_copy() -> None:
    views = [
        stored(0, "whole", 1_004_000), stored(1, "delta", 250_000), stored(2, "delta", 1),
        stored(3, "purged", 0), stored(4, "missing", None),
    ]  # fmt: skip
    (root,) = (parse(svg) for svg in storage_bars(views))
    assert_inside(root)
    rects = [(float(e.attrib["y"]), float(e.attrib["width"]), e.attrib["fill"]) for e in root.iter(f"{SVG}rect")]
    rows = [[r for r in rects if r[0] == y] for y in sorted({r[0] for r in rects})]
    assert [len(row) for row in rows] == [2, 2, 2, 1, 1]  # a frame each, and what is stored
    frame = rows[0][0][1]
    assert [row[1][1] / frame for row in rows[:3]] == pytest.approx([1.0, 0.25, 2 / frame])
    assert rows[0][1][2] != rows[1][1][2]  # whole and delta differ in black and white
    assert {"whole", "delta", "purged", "▲ missing", "1.00 MB", "250 kB", "25 %", "–"} <= set(texts(root))
    assert "v1 delta, 250 kB of 1.00 MB" in (root[1].text or "")


def test_many_versions_make_several_figures_that_fit_a_page() -> None:
    figures = [parse(svg) for svg in storage_bars([stored(n, "delta", 10) for n in range(2 * ROWS + 1)])]
    assert len(figures) == 3 and all(float(root.attrib["height"]) < 900 for root in figures)
    assert [root[0].text for root in figures][
        1
    ] == f"Bytes added to the store by each version, v{ROWS} to v{2 * ROWS - 1}"
    assert storage_bars([]) == lineage_graph([], []) == []


# --- all of them ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hostile", HOSTILE)
def test_labels_are_text(hostile: str) -> None:
    shown = plain_text(hostile)
    for svg in (
        persistence_matrix([hostile], [hostile], [[0.9]], [0.2]),
        lines([hostile], [Series(hostile, [0.1])], hostile, hostile),
        sentence(hostile, hostile),
        *lineage_graph([node(0, None), node(1, 0, "current", (hostile,))], [0, 1]),
    ):
        assert shown in "".join(parse(svg).itertext())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stops(bad: float) -> None:
    drawings: list[Callable[[], str]] = [
        lambda: lines(["v0"], [Series("a", [bad])], "t", "u"),
        lambda: persistence_matrix(["a"], ["v0"], [[bad]], [0.2]),
        lambda: persistence_matrix(["a"], ["v0"], [[0.1]], [bad]),
        lambda: alpha_curve(SEARCH, bad, 1.0),
    ]
    for draw in drawings:
        with pytest.raises(NumericalFailure, match="expected finite"):
            draw()
