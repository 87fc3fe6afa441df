"""What the benchmark's numbers say together, and the page about them: by hand, well-formed, self-contained."""

from __future__ import annotations

import csv
import io
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from typing import Any

import pytest
from benchmarking import EVIL, canned

from pipeline.benchmark.figures import Point, bars, frontier_plot
from pipeline.benchmark.page import frontier_points, render
from pipeline.benchmark.records import Results
from pipeline.benchmark.summary import (
    CSV_COLUMNS,
    Spread,
    csv_rows,
    last_step,
    over_seeds,
    over_vanilla,
    privleak_reading,
    score,
    spread_of,
    taken_down,
    under_attack,
)
from pipeline.errors import NumericalFailure
from pipeline.export import to_csv


@pytest.fixture
def results() -> Results:
    return canned()


def test_means_over_seeds_by_hand(results: Results) -> None:
    assert spread_of([1.0, None, 3.0]) == Spread(2.0, 2**0.5, 2)
    assert spread_of([4.0]) == Spread(4.0, 0.0, 1)
    assert spread_of([None]) is None
    found = over_seeds(results, "ssu", 2, score("this", "exact_memorisation"))
    assert found == Spread(0.25, pytest.approx(0.1 / 2**0.5), 2)  # type: ignore[arg-type]
    assert over_seeds(results, "ssu", 2, score("later", "nll")) is None
    rise = over_seeds(results, "ssu", 2, over_vanilla(results, "heldout", "nll"))
    assert rise is not None and rise.mean == pytest.approx(0.1)


def test_privleak_is_relative_to_the_retrained_model(results: Results) -> None:
    ssu = next(r for r in results.rows if r.method == "ssu")
    assert privleak_reading(results)(ssu) == pytest.approx(-25)  # s = .36 against .48
    alone = results.model_copy(update={"rows": tuple(r for r in results.rows if r.method != "retrained")})
    assert privleak_reading(alone)(ssu) == pytest.approx(-28)  # against .5


def test_everything_taken_down_follows_the_sequence_not_the_alphabet(results: Results) -> None:
    read = taken_down(results)
    first, second = [r for r in results.rows if r.method == "ssu" and r.seed == 0]
    assert read(first) == pytest.approx(0.2)
    assert read(second) == pytest.approx((0.3 + 0.2) / 2)
    # JSON sorts the keys of an object; the order must not come from there.
    again = Results.model_validate_json(results.model_dump_json())
    assert taken_down(again)(second) == pytest.approx(0.25)


def test_a_run_that_broke_down_holds_its_method_back(results: Results) -> None:
    assert [last_step(results, m) for m in results.methods] == [2, 2, 2, 1]
    assert last_step(results, "absent") == 0


def test_attacks_over_seeds(results: Results) -> None:
    found = under_attack(results, "ssu", "4 bits", "exact_memorisation")
    assert found is not None and found.mean == pytest.approx(0.35) and found.seeds == 2
    assert under_attack(results, "ga", "4 bits", "exact_memorisation") is None


def test_the_csv_has_every_number_once(results: Results) -> None:
    read = list(csv.DictReader(io.StringIO(to_csv(CSV_COLUMNS, csv_rows(results)))))
    assert len(read) == len(results.rows)
    ssu = next(r for r in read if (r["method"], r["seed"], r["step"]) == ("ssu", "1", "2"))
    assert float(ssu["this_exact_memorisation"]) == pytest.approx(0.3)
    assert (ssu["later_nll"], ssu["changed"], ssu["seconds"], ssu["auc_min-k"]) == ("", "20", "3.0", "0.64")
    assert float(ssu["privleak"]) == pytest.approx(-25)
    vanilla = read[0]
    assert vanilla["alpha"] == vanilla["seconds"] == ""


def test_the_frontier_counts_over_unlearning_as_reaching_the_level(results: Results) -> None:
    points = {p.name: p for p in frontier_points(results, {"ssu": "SSU"})}
    assert points["SSU"].best and points["ga"].best  # one keeps more, the other forgets more
    assert not points["Vanilla"].best and points["Vanilla"].fixed
    level = results.screened.level.model_copy(update={"mean": 0.5})
    above = results.model_copy(update={"screened": results.screened.model_copy(update={"level": level})})
    assert not {p.name: p for p in frontier_points(above, {})}["ga"].best  # both have reached it, and ga keeps less


class _Checker(HTMLParser):
    """Every tag closed as HTML wants it, and nothing that loads or runs."""

    VOID, OPTIONAL = ("meta",), ("li", "dt", "dd", "th", "td", "tr", "thead", "tbody", "p")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.seen.add(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag not in (*self.VOID, *self.OPTIONAL):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        self.seen.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.OPTIONAL:
            assert self.open and self.open.pop() == tag, tag


def test_the_page_is_whole_and_loads_nothing(results: Results) -> None:
    page = render(results, {"ssu": "SSU", "ga": f"GA {EVIL}"})
    checker = _Checker()
    checker.feed(page)
    assert checker.open == []
    assert not checker.seen & {"script", "img", "link", "iframe", "object", "use"}
    assert not checker.attributes & {"src", "onclick", "onload", "style"}
    assert "alert(1)</script>" not in page and "alert(1)" in page  # shown, not run
    assert not re.search(r"(?:https?:)?//(?!www\.w3\.org/2000/svg)", page.replace("</", ""))
    assert page == render(results, {"ssu": "SSU", "ga": f"GA {EVIL}"})


def test_every_figure_is_well_formed_and_told_in_words(results: Results) -> None:
    figures = re.findall(r"<svg.*?</svg>", render(results, {}), re.DOTALL)
    assert len(figures) == 1 + 2 * 3 + 3  # frontier, three for each method, cost
    space = "{http://www.w3.org/2000/svg}"
    for figure in figures:
        tree = ET.fromstring(figure)
        assert tree.get("role") == "img"
        assert tree.findtext(f"{space}title") and tree.findtext(f"{space}desc")


def test_what_the_page_says(results: Results) -> None:
    page = render(results, {"ssu": "SSU"})
    assert "0.250 <small>± 0.071</small>" in page
    assert "PrivLeak against retrained" in page and "root-sha256:bb" in page
    assert page.index("as it is") < page.index("4 bits")
    assert "(step 1)" in page and "seed 1, in step 2" in page
    assert "0.237" in page or "0.238" in page  # the task
    assert page.index('row">second &lt;b&gt; / work') < page.index('row">first')
    alone = results.model_copy(update={"reference": None, "tasks": {}, "stopped": ()})
    without = render(alone, {})
    assert "PrivLeak against AUC .5 (trained on neither)" in without
    assert "Runs that broke down" not in without and "lm-evaluation-harness" not in without


def test_figures_with_nothing_to_show() -> None:
    assert "Nothing to be kept was measured" in frontier_plot([], 0.2)
    assert "Nothing was measured" in bars("Wall time", "seconds", [])


def test_labels_of_the_frontier_do_not_cover_each_other() -> None:
    same = Spread(0.2, 0.0, 1)
    points = [Point(f"method {i}", Spread(0.2 + i / 1000, 0.0, 1), same, False, False) for i in range(8)]
    tree = ET.fromstring(frontier_plot(points, 0.15))
    places = [
        (float(t.get("x", 0)), float(t.get("y", 0)))
        for t in tree.iter("{http://www.w3.org/2000/svg}text")
        if (t.text or "").startswith("method")
    ]
    assert len(places) == 8
    assert all(
        abs(a[1] - b[1]) >= 13 or abs(a[0] - b[0]) >= 55 for i, a in enumerate(places) for b in places[:i]
    )  # fmt: skip


def test_a_number_that_cannot_be_drawn_is_an_error() -> None:
    broken = Point("x", Spread(float("nan"), 0.0, 1), Spread(0.5, 0.0, 1), True, False)
    with pytest.raises(NumericalFailure):
        frontier_plot([broken], 0.2)
