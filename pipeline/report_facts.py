"""What follows from the records on the page: what each version excludes, what was measured on it, what to say of it.

In: a `LineageView`. Out: the summary, and the numbers of matrix, curves and tables. Never: a number that no run
measured, silence where something should have been measured and was not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pipeline.records import Comparison, TextScore
from pipeline.report_svg import ROUNDING
from pipeline.report_views import LineageView, RequestView, StepView, VersionView
from pipeline.report_words import STATES, change, counted, listed, perplexity, when
from pipeline.states import TAKEN_OUT, TO_DO

REQUEST_ROLES = ("this", "repeat", "folded", "not-memorised", "earlier", "reinstated")
"""Roles of comparisons that name a request; the others name reference texts."""

RELEASED = ("reinstated", "withdrawn")
"""States in which no later version is held to excluding the text."""

Mark = Literal["good", "bad", "open"]


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
    mark: Mark


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

    A version that was rolled back is no ancestor of what was made later, so its requests do not count there; nor does
    a request count on a version that puts its text back, on those made from it, or on what was published after it was
    withdrawn.
    """
    first = {v.version: set(v.requests) for v in view.versions}
    for request in view.requests:
        if request.version in first and request.state in TAKEN_OUT:
            first[request.version].add(request.request_id)
    released = {r.request_id: r.decided_at for r in view.requests if r.state in RELEASED and r.decided_at is not None}
    excluded, puts_back = {}, {v.version: v.puts_back for v in view.versions}
    for v in view.versions:
        meant = frozenset[str]().union(*(first.get(a, set()) for a in ancestry(view, v.version)))
        excluded[v.version] = meant - {name for name, at in released.items() if at <= v.created_at}
        excluded[v.version] -= {name for a in ancestry(view, v.version) for name in puts_back.get(a, ())}
    return excluded


def measured_requests(view: LineageView) -> frozenset[str]:
    """Requests of which a version was made to forget passages; only these are measured again on later versions.

    The others that are taken out are repeats and near-copies: what the model knew of them belongs to another request.
    """
    return frozenset(name for v in view.versions for name in v.requests)


def measured_scores(view: LineageView) -> dict[tuple[str, int], TextScore]:
    """Scores of requests by (request, version): on the candidate that became the version, else as a later parent."""
    scores: dict[tuple[str, int], TextScore] = {}
    for step in view.steps:
        for item in compared(step, *REQUEST_ROLES):
            scores.setdefault((item.name, step.parent), item.before)
    for step in view.steps:
        if step.version is not None:
            scores |= {(item.name, step.version): item.after for item in compared(step, *REQUEST_ROLES)}
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


@dataclass(frozen=True)
class Recheck:
    """What a version was found to know of a request.

    Attributes:
        version: The version.
        score: What was measured; None where it was not.
        limit: Largest exact memorisation that its step allowed; None where no level was measured.
        meant: Whether the version is meant to exclude the request.
    """

    version: VersionView
    score: TextScore | None
    limit: float | None
    meant: bool

    @property
    def over(self) -> bool:
        """Whether it knows more than it may."""
        return self.meant and self.score is not None and above(self.score.exact_memorisation, self.limit)


def rechecks(view: LineageView) -> dict[str, tuple[Recheck, ...]]:
    """For each request every version on which it was measured, or should have been, in order."""
    scores, limits, excluded, measured = (
        measured_scores(view), forget_limits(view), excluded_requests(view), measured_requests(view),
    )  # fmt: skip
    return {
        r.request_id: tuple(
            Recheck(v, score, limits.get(v.version), meant)
            for v in view.versions
            for score in [scores.get((r.request_id, v.version))]
            for meant in [r.request_id in excluded[v.version]]
            if score is not None or (meant and r.request_id in measured)
        )
        for r in view.requests
    }


@dataclass(frozen=True)
class Trend:
    """Forgetting and utility along the history of the version in force; each value is None where nothing was measured.

    Attributes:
        versions: From v0 to the version in force.
        forget: Largest exact memorisation of a request that the version is meant to exclude.
        kept: Mean exact memorisation of the works to be kept.
        held: Mean NLL on held-out text, in nats per token.
        limit: Limit of the version in force.
    """

    versions: tuple[int, ...]
    forget: tuple[float | None, ...]
    kept: tuple[float | None, ...]
    held: tuple[float | None, ...]
    limit: float | None


def trend(view: LineageView) -> Trend | None:
    """The curves; None where the version in force is v0."""
    path = ancestry(view, view.current)
    if len(path) < 2:
        return None
    makers = [maker(view, version) for version in path]
    scores, out = measured_scores(view), excluded_requests(view)
    forget = tuple(
        max((scores[name, v].exact_memorisation for name in out.get(v, ()) if (name, v) in scores), default=None)
        for v in path
    )
    kept = [_mean_after(step, "kept", "exact_memorisation") for step in makers]
    held = [_mean_after(step, "held-out", "nll") for step in makers]
    if makers[1] is not None:
        kept[0] = _mean(c.before.exact_memorisation for c in compared(makers[1], "kept"))
        held[0] = _mean(c.before.nll for c in compared(makers[1], "held-out"))
    return Trend(path, forget, tuple(kept), tuple(held), forget_limits(view).get(view.current))


def above(value: float, limit: float | None) -> bool:
    """Whether a value breaks its limit, with the gate's slack for rounding."""
    return limit is not None and value > limit + ROUNDING


def _about_version(view: LineageView) -> Fact:
    version = _version(view, view.current)
    if version is None:
        return Fact("Current version", (f"v{view.current}, of which there is no manifest.",), "bad")
    made = "the untouched model" if version.parent is None else f"made from v{version.parent}"
    sentences = [f"v{version.version}, {made}, published {when(version.created_at)} by {version.published_by}."]
    path = ancestry(view, view.current)
    left = [v.version for v in view.versions if v.version not in path]
    if left:
        sentences.append(f"Not part of its history: {listed(f'v{n}' for n in left)}.")
    return Fact("Current version", tuple(sentences), "good")


def _about_requests(view: LineageView) -> Fact:
    if not view.requests:
        return Fact("Requests", ("None has been received.",), "open")
    out = excluded_requests(view).get(view.current, frozenset())
    lost = [r.request_id for r in view.requests if _is_out(r) and r.request_id not in out]
    back = [r.request_id for r in view.requests if r.state == "regressed"]
    held = [r.request_id for r in view.requests if r.on_hold]
    gone = [r.request_id for r in view.requests if r.erased]
    counts: dict[str, int] = {}
    for request in view.requests:
        phrase = _standing(view, request, out)
        counts[phrase] = counts.get(phrase, 0) + 1
    sentences = [f"{len(view.requests)} on file: {'; '.join(f'{n} {phrase}' for phrase, n in counts.items())}."]
    if back:
        sentences.append(f"Came back: {listed(back)}.")
    if held:
        sentences.append(f"On legal hold: {listed(held)}.")
    if gone:
        sentences.append(f"Erased, so no longer measured on new versions: {listed(gone)}.")
    waits = any(r.state in TO_DO for r in view.requests)
    return Fact("Requests", tuple(sentences), "bad" if lost or back else "open" if waits else "good")


def _is_out(request: RequestView) -> bool:
    """Whether a version excludes it; a request that was countered before that is excluded by none."""
    return request.state in TAKEN_OUT and request.version is not None


def _standing(view: LineageView, request: RequestView, out: frozenset[str]) -> str:
    """Where a request stands with respect to the version in force."""
    if not _is_out(request):
        return STATES.get(request.state, request.state)
    if request.request_id not in out:
        return f"taken out of a version that v{view.current} was not made from"
    countered = ", though countered" if request.state == "countered" else ""
    return f"taken out of v{view.current}{countered}"


def _about_forgetting(view: LineageView) -> Fact:
    """Whether everything taken out of the current version scores as text that it never saw."""
    label = "Forgetting"
    out = excluded_requests(view).get(view.current, frozenset())
    step = maker(view, view.current)
    if not out:
        return Fact(label, ("No request is taken out of the current version, so there is nothing to measure.",), "open")
    if step is None or step.evaluation is None:
        return Fact(label, (f"No measurement of v{view.current} can be read.",), "bad")
    scores = measured_scores(view)
    values = {name: scores[name, view.current].exact_memorisation for name in out if (name, view.current) in scores}
    level, limit = step.evaluation.level, forget_limits(view)[view.current]
    over = sorted(name for name, value in values.items() if above(value, limit))
    own = out & measured_requests(view)
    missing, covered = sorted(own - values.keys()), sorted(out - own - values.keys())
    bound = f"the limit of {limit:.3f} (never-seen level {level.mean:.3f} + tolerance {step.limits.forget_tolerance:g})"
    sentences = []
    if over:
        named = listed(f"{name} ({values[name]:.3f})" for name in over)
        verb = "is" if len(over) == 1 else "are"
        part = f"{len(over)} of {counted(len(out), 'request')}"
        sentences.append(f"{part} taken out of v{view.current} {verb} above {bound}: {named}.")
    elif values and not missing:
        everything = f"All {len(values)} requests" if len(values) > 1 else "The one request"
        verb = "are" if len(values) > 1 else "is"
        sentences.append(f"{everything} taken out of v{view.current} {verb} at or below {bound}.")
    if missing:
        sentences.append(f"Not measured on v{view.current}: {listed(missing)}.")
    if covered:
        sentences.append(f"Covered by these, with no memorised passage of their own: {listed(covered)}.")
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
        sentences.append(f"The level was measured on {counted(level.passages, 'passage')} of {level.source} text.")
    mark: Mark = "bad" if over or missing else "open" if level.source == "assumed" else "good"
    return Fact(label, tuple(sentences), mark)


def _about_utility(view: LineageView) -> Fact:
    """What the lineage cost, counted from v0 where v0 was measured on the same texts."""
    label = "Everything else"
    step = maker(view, view.current)
    if step is None or step.evaluation is None:
        if view.current == 0:
            return Fact(label, ("Nothing has been changed.",), "open")
        return Fact(label, (f"No measurement of v{view.current} can be read.",), "bad")
    original = {(c.role, c.name): c.before for s in reversed(view.steps) if s.parent == 0 for c in compared(s)}
    sentences = []
    for role, text in (("kept", "Works to be kept"), ("held-out", "Held-out text")):
        pairs = [(original[c.role, c.name], c.after) for c in compared(step, role) if (c.role, c.name) in original]
        if not pairs:
            sentences.append(f"{text}: not measured on both v0 and v{view.current}.")
        elif role == "kept":
            before, after = (sum(p[side].exact_memorisation for p in pairs) / len(pairs) for side in (0, 1))
            sentences.append(f"{text}: mean exact memorisation {after:.3f}, in v0 {before:.3f}.")
        else:
            before, after = (sum(p[side].nll for p in pairs) / len(pairs) for side in (0, 1))
            sentences.append(
                f"{text}: perplexity {perplexity(after)}, in v0 {perplexity(before)} ({change(after - before)})."
            )
    accepted = step.verdict is not None and step.verdict.accepted
    sentences.append("The gate accepted this." if accepted else "There is no acceptance by the gate on file.")
    return Fact(label, tuple(sentences), "good" if accepted else "bad")


def _about_proof(view: LineageView) -> Fact:
    sentences, mark = _about_breaks(view)
    if view.lost:
        gone = listed(step.run_id for step in view.lost)
        sentences, mark = (
            [*sentences, f"The records of {counted(len(view.lost), 'run')} cannot be read: {gone}."],
            "bad",
        )
    return Fact("Stored evidence", tuple(sentences), mark)


def _about_breaks(view: LineageView) -> tuple[list[str], Mark]:
    if view.breaks is None:
        return ["Not re-checked for this page. Run takedown verify."], "open"
    if view.breaks:
        told = f"Re-checked for this page: {counted(len(view.breaks), 'break')}, listed at the head."
        return [told, "Do not rely on the evidence until settled."], "bad"
    return ["Re-checked for this page: ledger, checkpoints, versions, weights and signatures match."], "good"


# --- looking things up ---------------------------------------------------------------------------------


def _version(view: LineageView, number: int) -> VersionView | None:
    return next((v for v in view.versions if v.version == number), None)


def maker(view: LineageView, version: int) -> StepView | None:
    """The step that published a version."""
    return next((s for s in view.steps if s.version == version), None)


def compared(step: StepView, *roles: str) -> tuple[Comparison, ...]:
    """The comparisons of a step with one of these roles; all of them where none is given."""
    if step.evaluation is None:
        return ()
    return step.evaluation.of(*roles) if roles else step.evaluation.comparisons


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None


def _mean_after(step: StepView | None, role: str, field: Literal["exact_memorisation", "nll"]) -> float | None:
    """Mean over the texts of one role after the step; None where none was measured."""
    return None if step is None else _mean(getattr(c.after, field) for c in compared(step, role))
