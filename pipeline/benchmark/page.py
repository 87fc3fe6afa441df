"""The benchmark's page: one self-contained HTML document, no script, nothing loaded.

In: `Results`. Out: the page as a string; equal results give equal pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from pipeline.benchmark.figures import Point, bars, frontier_plot
from pipeline.benchmark.records import FIXED, Results, Row
from pipeline.benchmark.summary import (
    Reading,
    Spread,
    attacks_of,
    last_step,
    over_seeds,
    over_vanilla,
    privleak_reading,
    rows_of,
    score,
    spread_of,
    taken_down,
    title_of,
    under_attack,
)
from pipeline.metrics import frontier
from pipeline.pages import pages
from pipeline.plots import Series, lines, persistence_matrix

FORGOTTEN = 0.05
"""A text counts as forgotten up to so much above never-seen text: the marks of the persistence matrix."""


@dataclass(frozen=True)
class Column:
    """A column of the main table."""

    title: str
    places: int
    read: Reading


@dataclass(frozen=True)
class MethodView:
    """What the page shows of one method.

    Attributes:
        title: Its name for people.
        changed: Whether it changes weights; the others have no curves, for they stay the same.
        step: Last step that all its seeds finished.
        cells: Its row of the main table.
        attacks: Its row of the recovery table.
        figures: Curves and persistence matrix.
    """

    title: str
    changed: bool
    step: int
    cells: Sequence[Spread | None]
    attacks: Sequence[Spread | None]
    figures: Sequence[Markup]


def columns(results: Results) -> list[Column]:
    """The columns of the main table."""
    against = "retrained" if results.reference else "AUC .5 (trained on neither)"
    return [
        Column("this step, EM", 3, score("this", "exact_memorisation")),
        Column("earlier, EM", 3, score("earlier", "exact_memorisation")),
        Column("kept, EM", 3, score("kept", "exact_memorisation")),
        Column("held-out NLL over vanilla", 3, over_vanilla(results, "heldout", "nll")),
        Column("this step, ES", 3, score("this", "extraction_strength")),
        Column("longest run, words", 2, score("this", "longest_run")),
        Column("ROUGE-L", 3, score("this", "rouge_l")),
        Column("extractable by sampling", 2, score("this", "extractable")),
        Column("AUC min-k", 3, lambda row: row.membership.get("min-k")),
        Column(f"PrivLeak against {against}", 1, privleak_reading(results)),
        Column("repeated 4-grams", 3, score("heldout", "repetition")),
    ]


def render(results: Results, titles: dict[str, str]) -> str:
    """Render the page.

    Args:
        results: What was found.
        titles: Method → its name for people.
    """
    attacks, shown = attacks_of(results), columns(results)
    views = [_view(results, method, titles, shown, attacks) for method in results.methods]
    steps = [last_step(results, m) for m in results.methods if m not in FIXED]
    costly = [(m, title_of(m, titles)) for m in results.methods if m not in FIXED]
    return pages(number=_number).get_template("benchmark.html").render(
        results=results,
        columns=shown,
        attacks=attacks,
        views=views,
        last=max(steps, default=len(results.steps)),
        frontier=Markup(frontier_plot(frontier_points(results, titles), results.screened.level.mean)),
        costs=[
            Markup(bars("Wall time of a step", "seconds a step, mean over steps", _costs(results, costly, _seconds))),
            Markup(bars("Memory of a step", "MB above what was held before, largest step",
                        _costs(results, costly, _megabytes, max))),
            Markup(bars("Tokens of a step", "thousand tokens through the model a step, mean over steps",
                        _costs(results, costly, _tokens))),
        ],
        title_of=lambda method: title_of(method, titles),
        tolerance=FORGOTTEN,
    )  # fmt: skip


def frontier_points(results: Results, titles: dict[str, str]) -> list[Point]:
    """Every method after its last step; the frontier is that of the methods alone.

    Forgetting further than never-seen text is no merit, and counts as reaching it.
    """
    found = []
    for method in results.methods:
        step = last_step(results, method)
        forget = over_seeds(results, method, step, taken_down(results))
        keep = over_seeds(results, method, step, score("kept", "exact_memorisation"))
        if forget is not None and keep is not None:
            found.append((method, forget, keep))
    level = results.screened.level.mean
    methods = [(m, max(f.mean, level), k.mean) for m, f, k in found if m not in FIXED]
    best = {methods[i][0] for i in frontier([(f, k) for _, f, k in methods])}
    return [Point(title_of(m, titles), f, k, m in best, m in FIXED) for m, f, k in found]


def _view(
    results: Results, method: str, titles: dict[str, str], shown: Sequence[Column], attacks: Sequence[str]
) -> MethodView:
    title, step = title_of(method, titles), last_step(results, method)
    return MethodView(
        title=title,
        changed=method not in FIXED,
        step=step,
        cells=[over_seeds(results, method, step, column.read) for column in shown],
        attacks=[under_attack(results, method, attack, "exact_memorisation") for attack in attacks],
        figures=[] if method in FIXED or not step else [Markup(f) for f in _figures(results, method, title, step)],
    )


def _series(results: Results, method: str, steps: Sequence[int], name: str, read: Reading) -> Series:
    found = [over_seeds(results, method, step, read) for step in steps]
    return Series(name, [f.mean if f else None for f in found], [f.std if f else 0.0 for f in found])


def _figures(results: Results, method: str, title: str, last: int) -> list[str]:
    """Forgetting and keeping over the steps, held-out loss over the steps, and the persistence matrix."""
    steps, level = range(1, last + 1), results.screened.level.mean
    labels = [str(step) for step in steps]
    groups = {"this": "this step", "earlier": "earlier", "later": "not yet", "kept": "to be kept"}
    curves = [_series(results, method, steps, name, score(g, "exact_memorisation")) for g, name in groups.items()]
    curves = [c for c in curves if any(v is not None for v in c.values)]
    loss = _series(results, method, steps, "held-out text", over_vanilla(results, "heldout", "nll"))
    figures = [
        lines(labels, curves, f"{title}: exact memorisation over the steps", "Exact memorisation", limit=level, low=0.0,
              high=1.0, limit_name="never seen", x_name="after step"),
        lines(labels, [loss], f"{title}: loss on held-out text over the steps", "NLL above vanilla, nats a token",
              x_name="after step"),
    ]  # fmt: skip
    values = [
        [spread.mean if (spread := over_seeds(results, method, s, _persistence(name))) else None for s in steps]
        for name in results.steps
    ]
    excluded = [[s >= number for s in steps] for number in range(1, len(results.steps) + 1)]
    matrix = persistence_matrix(
        list(results.steps), labels, values, [level + FORGOTTEN] * last, excluded,
        title=f"{title}: every step's texts after every step",
    )  # fmt: skip
    return [*figures, matrix]


def _persistence(name: str) -> Reading:
    return lambda row: row.persistence.get(name)


def _seconds(row: Row) -> float | None:
    return row.cost.seconds if row.cost else None


def _megabytes(row: Row) -> float | None:
    return row.cost.rise_bytes / 1e6 if row.cost else None


def _tokens(row: Row) -> float | None:
    return row.cost.tokens / 1000 if row.cost else None


def _costs(
    results: Results,
    methods: Sequence[tuple[str, str]],
    read: Reading,
    over_steps: Callable[[Sequence[float]], float] = lambda values: sum(values) / len(values),
) -> list[tuple[str, Spread]]:
    """A cost of each method: over its steps, then over seeds."""
    found = []
    for method, title in methods:
        by_seed: dict[int, list[float]] = {}
        for step in range(1, last_step(results, method) + 1):
            for row in rows_of(results, method, step):
                value = read(row)
                if value is not None:
                    by_seed.setdefault(row.seed, []).append(value)
        spread = spread_of(over_steps(values) for values in by_seed.values())
        if spread is not None:
            found.append((title, spread))
    return found


def _number(spread: Spread | None, places: int = 3) -> Markup:
    """A cell: mean, and below it the deviation where there is more than one seed."""
    if spread is None:
        return Markup("–")
    below = f" <small>± {spread.std:.{places}f}</small>" if spread.seeds > 1 else ""
    return Markup(f"{spread.mean:.{places}f}{below}")
