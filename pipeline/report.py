"""The report for people: one self-contained HTML page about a lineage.

In: a `LineageView`, plain records that the caller has read from ledger, versions and runs. Out: the page as a string;
equal views give equal pages. Never: opens a file of the workspace, knows a text of a request, trusts a title.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pydantic import AwareDatetime

from pipeline.plots import ROUNDING, Series, alpha_curve, lines, persistence_matrix, plain_text
from pipeline.records import (
    Break,
    Calibration,
    Comparison,
    DedupeReport,
    Evaluation,
    MaskReport,
    Record,
    ScreenReport,
    TextScore,
    VectorReport,
    Verdict,
)
from pipeline.settings import GateSettings

REQUEST_ROLES = ("this", "repeat", "folded", "not-memorised", "earlier")
"""Roles of comparisons that name a request; the others name reference texts."""

TAKEN_OUT = ("applied", "repeat", "folded")
"""States that say that a version excludes the text."""

STATES = {
    "waiting": "waiting",
    "refused": "refused by the gate, still to be done",
    "repeat": "covered by an earlier takedown",
    "folded": "near-copy of another request of its batch",
    "empty": "no text left after normalisation",
    "not-memorised": "not memorised by the model",
    "applied": "taken out",
}
"""States in words; a state that is not here is shown as it is."""


# --- what the caller provides -----------------------------------------------------------------------------


class VersionView(Record):
    """One published version.

    Attributes:
        version: 0 for the untouched model.
        parent: Version it was made from; None for v0.
        root: Its tensor root.
        created_at: When it was published.
        requests: Requests that it is the first to exclude.
        selected: Entries inside the mask; None for v0.
        changed: Entries whose bits differ from the parent; None for v0.
        total: Entries that the mask could choose from; None for v0.
        alpha: Strength of the task vector; None for v0.
        status: Whether it is the version in force.
    """

    version: int
    parent: int | None
    root: str
    created_at: AwareDatetime
    requests: tuple[str, ...]
    selected: int | None
    changed: int | None
    total: int | None
    alpha: float | None
    status: Literal["current", "superseded"]


class RequestView(Record):
    """One request as the page shows it; title, rights holder and note are untrusted.

    Attributes:
        request_id: The request.
        title: Name of the work.
        rights_holder: Who claims.
        batch_id: Batch that it arrived in.
        received_at: When.
        state: State of the ledger, see `STATES`.
        version: Version that first excluded it; None where none did.
        before: Its score on the parent of the step that decided; None where it was not measured.
        after: Its score on that step's candidate likewise.
        note: Anything to add, e.g. which request covers it.
    """

    request_id: str
    title: str
    rights_holder: str
    batch_id: str
    received_at: AwareDatetime
    state: str
    version: int | None = None
    before: TextScore | None = None
    after: TextScore | None = None
    note: str = ""


class StepView(Record):
    """One run, accepted or refused.

    Attributes:
        run_id: The run.
        at: When it was decided.
        version: Version that it published; None when it published none.
        parent: Version it started from.
        dedupe: Outcome of deduplication.
        screen: Outcome of screening.
        mask: The saliency mask; None where nothing was trained.
        vectors: Task vectors in the order they were fitted.
        calibrations: Strengths in the order they were found.
        evaluation: What was measured; None where there was no candidate.
        verdict: The gate's decision; None likewise.
        limits: Limits that the gate applied.
    """

    run_id: str
    at: AwareDatetime
    version: int | None
    parent: int
    dedupe: DedupeReport
    screen: ScreenReport
    mask: MaskReport | None
    vectors: tuple[VectorReport, ...]
    calibrations: tuple[Calibration, ...]
    evaluation: Evaluation | None
    verdict: Verdict | None
    limits: GateSettings


class LineageView(Record):
    """Everything on the page.

    Attributes:
        workspace: Its name.
        generated_at: When the page was made.
        current: Version in force.
        software: Versions of this product and its libraries.
        versions: By rising number.
        requests: In the order received.
        steps: In the order run.
        breaks: What ``takedown verify`` found; None where it was not run for this page.
    """

    workspace: str
    generated_at: AwareDatetime
    current: int
    software: dict[str, str]
    versions: tuple[VersionView, ...]
    requests: tuple[RequestView, ...]
    steps: tuple[StepView, ...]
    breaks: tuple[Break, ...] | None


def render(view: LineageView) -> str:
    """Render the page.

    Returns:
        One HTML document with inline style and figures; it loads nothing and runs nothing.
    """
    return _environment().get_template("report.html").render(
        view=view,
        facts=summarise(view),
        excluded=excluded_requests(view),
        scores=measured_scores(view),
        steps_measured=any(step.evaluation is not None for step in view.steps),
        limits=forget_limits(view),
        states=STATES,
        matrix=Markup(_matrix(view)),
        trend=[Markup(figure) for figure in _trends(view)],
        curve=lambda c: Markup(alpha_curve(c.curve, c.target, c.alpha)),
    )  # fmt: skip


# --- what follows from it ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fact:
    """One line of the summary.

    Attributes:
        label: What it is about.
        sentences: In plain words.
        mark: ``good``, ``bad``, or ``open`` where nothing was shown either way.
    """

    label: str
    sentences: tuple[str, ...]
    mark: Literal["good", "bad", "open"]


def summarise(view: LineageView) -> tuple[Fact, ...]:
    """The summary at the head of the page, each line with its mark."""
    return (
        _about_version(view),
        _about_requests(view),
        _about_forgetting(view),
        _about_utility(view),
        _about_proof(view),
    )


def ancestry(view: LineageView, version: int) -> tuple[int, ...]:
    """The versions from v0 to this one, along the parents."""
    parents = {v.version: v.parent for v in view.versions}
    path = [version]
    while (parent := parents.get(path[-1])) is not None and parent not in path:
        path.append(parent)
    return tuple(reversed(path))


def excluded_requests(view: LineageView) -> dict[int, frozenset[str]]:
    """For each version, the requests that it is meant to exclude: those of all versions it was made from.

    A version that was rolled back is no ancestor of what was made later, so its requests do not count there.
    """
    first = {v.version: set(v.requests) for v in view.versions}
    for request in view.requests:
        if request.version in first and request.state in TAKEN_OUT:
            first[request.version].add(request.request_id)
    return {v: frozenset().union(*(first.get(a, set()) for a in ancestry(view, v))) for v in first}


def measured_scores(view: LineageView) -> dict[tuple[str, int], TextScore]:
    """Scores of requests by (request, version): on the candidate that became the version, else as a later parent."""
    scores: dict[tuple[str, int], TextScore] = {}
    for step in view.steps:
        for item in _compared(step, *REQUEST_ROLES):
            scores.setdefault((item.name, step.parent), item.before)
    for step in view.steps:
        if step.version is not None:
            scores |= {(item.name, step.version): item.after for item in _compared(step, *REQUEST_ROLES)}
    return scores


def forget_limits(view: LineageView) -> dict[int, float]:
    """For each version, never-seen level + tolerance of the step that made it; for v0 of the first step from it."""
    limits: dict[int, float] = {}
    for step in view.steps:
        if step.evaluation is not None:
            limit = step.evaluation.level.mean + step.limits.forget_tolerance
            if step.version is not None:
                limits[step.version] = limit
            if step.parent == 0:
                limits.setdefault(0, limit)
    return limits


def above(value: float, limit: float | None) -> bool:
    """Whether a value breaks its limit, with the gate's slack for rounding."""
    return limit is not None and value > limit + ROUNDING


def _about_version(view: LineageView) -> Fact:
    version = _version(view, view.current)
    if version is None:
        return Fact("Current version", (f"v{view.current}, of which there is no manifest.",), "bad")
    made = "the untouched model" if version.parent is None else f"made from v{version.parent}"
    sentences = [f"v{version.version}, {made}, published {when(version.created_at)}."]
    path = ancestry(view, view.current)
    left = [v.version for v in view.versions if v.version not in path]
    if left:
        sentences.append(f"Not part of its history: {_listed(f'v{n}' for n in left)}.")
    return Fact("Current version", tuple(sentences), "good")


def _about_requests(view: LineageView) -> Fact:
    if not view.requests:
        return Fact("Requests", ("None has been received.",), "open")
    out = excluded_requests(view).get(view.current, frozenset())
    counts: dict[str, int] = {}
    for request in view.requests:
        if request.request_id in out:
            phrase = f"taken out of v{view.current}"
        elif request.state in TAKEN_OUT:
            phrase = f"taken out of a version that v{view.current} was not made from"
        else:
            phrase = STATES.get(request.state, request.state)
        counts[phrase] = counts.get(phrase, 0) + 1
    waits = any(r.state in ("waiting", "refused") for r in view.requests)
    lost = any(r.state in TAKEN_OUT and r.request_id not in out for r in view.requests)
    parts = "; ".join(f"{count} {phrase}" for phrase, count in counts.items())
    return Fact(
        "Requests", (f"{len(view.requests)} on file: {parts}.",), "bad" if lost else "open" if waits else "good"
    )


def _about_forgetting(view: LineageView) -> Fact:
    """Whether everything taken out of the current version scores as text that it never saw."""
    label = "Forgetting"
    out = excluded_requests(view).get(view.current, frozenset())
    step = _maker(view, view.current)
    if not out:
        return Fact(label, ("No request is taken out of the current version, so there is nothing to measure.",), "open")
    if step is None or step.evaluation is None:
        return Fact(label, (f"No measurement of v{view.current} is on file.",), "bad")
    scores = measured_scores(view)
    values = {name: scores[name, view.current].exact_memorisation for name in out if (name, view.current) in scores}
    level, limit = step.evaluation.level, forget_limits(view)[view.current]
    over = sorted(name for name, value in values.items() if above(value, limit))
    missing = sorted(out - values.keys())
    bound = f"the limit of {limit:.3f} (never-seen level {level.mean:.3f} + tolerance {step.limits.forget_tolerance:g})"
    sentences = []
    if over:
        named = _listed(f"{name} ({values[name]:.3f})" for name in over)
        verb = "is" if len(over) == 1 else "are"
        part = f"{len(over)} of {_counted(len(out), 'request')}"
        sentences.append(f"{part} taken out of v{view.current} {verb} above {bound}: {named}.")
    elif not missing:
        everything = f"All {len(out)} requests" if len(out) > 1 else "The one request"
        verb = "are" if len(out) > 1 else "is"
        sentences.append(f"{everything} taken out of v{view.current} {verb} at or below {bound}.")
    if missing:
        sentences.append(f"Not measured on v{view.current}: {_listed(missing)}.")
    if values:
        highest = max(sorted(values), key=values.__getitem__)
        below = sum(not above(value, level.mean) for value in values.values())
        verb = "is" if below == 1 else "are"
        sentences.append(
            f"Highest exact memorisation: {values[highest]:.3f} ({highest}). "
            f"{below} of {len(values)} {verb} at or below the never-seen level itself."
        )
    if level.source == "assumed":
        sentences.append("The never-seen level is assumed from the settings; it was not measured.")
    else:
        sentences.append(f"The level was measured on {_counted(level.passages, 'passage')} of {level.source} text.")
    mark: Literal["good", "bad", "open"] = "bad" if over or missing else "open" if level.source == "assumed" else "good"
    return Fact(label, tuple(sentences), mark)


def _about_utility(view: LineageView) -> Fact:
    """What the lineage cost, counted from v0 where v0 was measured on the same texts."""
    label = "Everything else"
    step = _maker(view, view.current)
    if step is None or step.evaluation is None:
        return Fact(label, ("Nothing has been changed.",) if view.current == 0 else ("Not measured.",), "open")
    original = {(c.role, c.name): c.before for s in reversed(view.steps) if s.parent == 0 for c in _compared(s)}
    sentences = []
    for role, text in (("kept", "Works to be kept"), ("held-out", "Held-out text")):
        pairs = [(original[c.role, c.name], c.after) for c in _compared(step, role) if (c.role, c.name) in original]
        if not pairs:
            sentences.append(f"{text}: not measured on both v0 and v{view.current}.")
        elif role == "kept":
            before, after = (sum(p[side].exact_memorisation for p in pairs) / len(pairs) for side in (0, 1))
            sentences.append(f"{text}: mean exact memorisation {after:.3f}, in v0 {before:.3f}.")
        else:
            before, after = (sum(p[side].nll for p in pairs) / len(pairs) for side in (0, 1))
            sentences.append(
                f"{text}: perplexity {perplexity(after)}, in v0 {perplexity(before)} ({_change(after - before)})."
            )
    accepted = step.verdict is not None and step.verdict.accepted
    sentences.append("The gate accepted this." if accepted else "There is no acceptance by the gate on file.")
    return Fact(label, tuple(sentences), "good" if accepted else "bad")


def _about_proof(view: LineageView) -> Fact:
    label = "Stored evidence"
    if view.breaks is None:
        return Fact(label, ("Not re-checked for this page. Run takedown verify.",), "open")
    if view.breaks:
        found = _counted(len(view.breaks), "break")
        return Fact(
            label,
            (f"Re-checked for this page: {found}, listed at the head. Do not rely on the evidence until settled.",),
            "bad",
        )
    return Fact(label, ("Re-checked for this page: ledger, versions and weights match their digests.",), "good")


def _matrix(view: LineageView) -> str:
    scores, limits, out = measured_scores(view), forget_limits(view), excluded_requests(view)
    versions = [v.version for v in view.versions]
    rows = [r.request_id for r in view.requests if any((r.request_id, v) in scores for v in versions)]
    values = [[_em(scores.get((name, v))) for v in versions] for name in rows]
    return persistence_matrix(
        rows,
        [f"v{v}" for v in versions],
        values,
        [limits.get(v) for v in versions],
        [[name in out[v] for v in versions] for name in rows],
    )


def _trends(view: LineageView) -> list[str]:
    """Forgetting and utility along the history of the current version."""
    path = ancestry(view, view.current)
    if len(path) < 2:
        return []
    makers = [_maker(view, version) for version in path]
    scores, out = measured_scores(view), excluded_requests(view)
    forget = [
        max((scores[name, v].exact_memorisation for name in out.get(v, ()) if (name, v) in scores), default=None)
        for v in path
    ]
    kept: list[float | None] = [_mean_after(step, "kept", "exact_memorisation") for step in makers]
    held: list[float | None] = [_mean_after(step, "held-out", "nll") for step in makers]
    if makers[1] is not None:
        kept[0] = _mean([c.before.exact_memorisation for c in _compared(makers[1], "kept")])
        held[0] = _mean([c.before.nll for c in _compared(makers[1], "held-out")])
    labels = [f"v{v}" for v in path]
    figures = [
        lines(
            labels,
            [Series("taken out, largest", forget), Series("works to be kept, mean", kept)],
            "Exact memorisation over the versions",
            "Exact memorisation",
            limit=forget_limits(view).get(view.current),
            low=0.0,
            high=1.0,
        )
    ]
    if any(value is not None for value in held):
        title = "Loss on held-out text over the versions"
        figures.append(lines(labels, [Series("held-out text, mean", held)], title, "NLL in nats per token"))
    return figures


def _version(view: LineageView, number: int) -> VersionView | None:
    return next((v for v in view.versions if v.version == number), None)


def _maker(view: LineageView, version: int) -> StepView | None:
    """The step that published a version."""
    return next((s for s in view.steps if s.version == version), None)


def _compared(step: StepView, *roles: str) -> tuple[Comparison, ...]:
    """The comparisons of a step with one of these roles; all of them where none is given."""
    if step.evaluation is None:
        return ()
    return step.evaluation.of(*roles) if roles else step.evaluation.comparisons


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None


def _mean_after(step: StepView | None, role: str, field: Literal["exact_memorisation", "nll"]) -> float | None:
    """Mean over the texts of one role after the step; None where none was measured."""
    return None if step is None else _mean(getattr(c.after, field) for c in _compared(step, role))


def _em(score: TextScore | None) -> float | None:
    return None if score is None else score.exact_memorisation


# --- how things are written -------------------------------------------------------------------------------


def when(moment: datetime) -> str:
    """A moment in UTC, to the minute."""
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def perplexity(nll: float | None) -> str:
    """exp(NLL); a number that float64 cannot hold is written as a power."""
    if nll is None:
        return "–"
    if nll > 700:
        return f"e^{nll:.0f}"
    value = math.exp(nll)
    return f"{value:,.1f}" if value < 1e6 else f"{value:.2e}"


def decimal(value: float | None, places: int = 3) -> str:
    """A number with fixed places, a dash where there is none."""
    return "–" if value is None else f"{value:.{places}f}"


def count(value: int | None) -> str:
    """A whole number with thousands separators, a dash where there is none."""
    return "–" if value is None else f"{value:,}"


def share(part: int, whole: int) -> str:
    """A share in per cent with three significant digits; a dash of nothing."""
    return f"{100 * part / whole:.3g} %" if whole else "–"


def _change(nll_rise: float) -> str:
    """A rise of NLL as relative change of perplexity."""
    return f"{math.expm1(nll_rise):+.1%}" if nll_rise < 100 else "far more"


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _listed(items: Iterable[str], most: int = 8) -> str:
    """Items with commas; of a long list the first and how many more there are."""
    found = list(items)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more


def _clean(value: object) -> object:
    """What Jinja calls on every output before escaping: control characters of untrusted text become visible."""
    return plain_text(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        when=when, perplexity=perplexity, decimal=decimal, count=count, counted=_counted, listed=_listed
    )
    environment.globals.update(share=share, above=above)
    return environment
