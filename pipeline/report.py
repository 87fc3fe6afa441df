"""The report for people: one self-contained HTML page about a lineage.

In: a `LineageView`, plain records that `pipeline.history` has read. Out: the page as a string; equal views give equal
pages. Never: opens a file of the workspace, knows a text of a request, trusts a title.
"""

from __future__ import annotations

import shlex

from jinja2 import Environment
from markupsafe import Markup

from pipeline.pages import pages
from pipeline.plots import Series, alpha_curve, lines, persistence_matrix
from pipeline.report_facts import (
    Trend,
    above,
    ancestry,
    excluded_requests,
    forget_limits,
    measured_requests,
    measured_scores,
    rechecks,
    summarise,
    trend,
)
from pipeline.report_lineage import ROWS, lineage_graph, storage_bars
from pipeline.report_views import LineageView
from pipeline.report_words import (
    EVENTS,
    STATES,
    count,
    counted,
    decimal,
    listed,
    perplexity,
    places,
    share,
    size,
    when,
)

COLUMNS = 11
"""Columns of a block of the matrix: with the request ids they fit a printed A4 page."""
OPEN = 12
"""With more requests or steps than this they are shown closed; printed, they are always open."""
EARLIER = 25
"""Most earlier requests that a step lists; beyond, those that remember most. All are in the matrix."""


def render(view: LineageView) -> str:
    """Render the page.

    Returns:
        One HTML document with inline style and figures; it loads nothing and runs nothing.
    """
    curves = trend(view)
    return _environment().get_template("report.html").render(
        view=view,
        facts=summarise(view),
        excluded=excluded_requests(view),
        scores=measured_scores(view),
        limits=forget_limits(view),
        rechecks=rechecks(view),
        measured=measured_requests(view),
        states=STATES,
        events=EVENTS,
        storage={item.version: item for item in view.storage},
        graph=[Markup(figure) for figure in lineage_graph(view.versions, ancestry(view, view.current))],
        bars=[Markup(figure) for figure in storage_bars(view.storage)],
        matrices=[Markup(figure) for figure in _matrices(view)],
        trend=curves,
        trend_figures=[Markup(figure) for figure in _trend_figures(curves)],
        curve=lambda c: Markup(alpha_curve(c.curve, c.target, c.alpha)),
        certifiable=_certifiable(view),
        closed=max(len(view.requests), len(view.steps)) > OPEN,
        most_earlier=EARLIER,
    )  # fmt: skip


def _certifiable(view: LineageView) -> str:
    """A request that the version in force excludes, as a word of the shell; a placeholder where there is none."""
    out = excluded_requests(view).get(view.current, frozenset())
    found = [r.request_id for r in view.requests if r.request_id in out and r.state == "verified"]
    return shlex.quote(found[0]) if found else "REQUEST"


def _matrices(view: LineageView) -> list[str]:
    """The persistence matrix in blocks that fit a printed page; blocks in which nothing was measured are left out."""
    limits, excluded = forget_limits(view), excluded_requests(view)
    values = {key: score.exact_memorisation for key, score in measured_scores(view).items()}
    versions = [v.version for v in view.versions]
    known = {name for name, _ in values}
    rows = [r.request_id for r in view.requests if r.request_id in known]
    if not rows or not versions:
        return [persistence_matrix([], [], [], [])]
    blocks = [
        (rows[top : top + ROWS], versions[left : left + COLUMNS], versions[left - 1] if left else None)
        for top in range(0, len(rows), ROWS)
        for left in range(0, len(versions), COLUMNS)
    ]
    measured = [block for block in blocks if any((name, v) in values for name in block[0] for v in block[1])]
    return [
        persistence_matrix(
            names,
            [f"v{v}" for v in columns],
            [[values.get((name, v)) for v in columns] for name in names],
            [limits.get(v) for v in columns],
            [[name in excluded[v] for v in columns] for name in names],
            title="Persistence matrix"
            if len(measured) == 1
            else f"Persistence matrix, {names[0]} to {names[-1]}, v{columns[0]} to v{columns[-1]}",
            before=None if left is None else [name in excluded[left] for name in names],
        )
        for names, columns, left in measured
    ]


def _trend_figures(curves: Trend | None) -> list[str]:
    """Forgetting and utility along the history of the current version."""
    if curves is None:
        return []
    labels = [f"v{v}" for v in curves.versions]
    figures = [
        lines(
            labels,
            [Series("taken out, largest", curves.forget), Series("works to be kept, mean", curves.kept)],
            "Exact memorisation over the versions",
            "Exact memorisation",
            limit=curves.limit,
            low=0.0,
            high=1.0,
        )
    ]
    if any(value is not None for value in curves.held):
        title = "Loss on held-out text over the versions"
        figures.append(lines(labels, [Series("held-out text, mean", curves.held)], title, "NLL in nats per token"))
    return figures


def _environment() -> Environment:
    environment = pages(
        when=when,
        perplexity=perplexity,
        decimal=decimal,
        count=count,
        counted=counted,
        listed=listed,
        places=places,
        size=size,
    )
    environment.globals.update(share=share, above=above)
    return environment
