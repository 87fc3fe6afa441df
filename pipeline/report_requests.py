"""What the report shows of the requests and of what was done to history: entries of the ledger, told in words.

In: entries, steps that could be read, the vault's titles. Out: plain records. Never: a text or a contact of a request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime

from pydantic import ValidationError

from pipeline.errors import StoreDamaged
from pipeline.records import LedgerEntry, TextScore
from pipeline.report_views import EventView, PlannedView, RequestView, StepView
from pipeline.report_words import event_note, listed, places
from pipeline.settings import GateSettings
from pipeline.states import DECIDED, TAKEN_OUT, RequestState
from pipeline.vault import open_vault, received_data
from pipeline.workspace import Workspace

Scores = tuple[TextScore, TextScore, float | None]
"""Before, after, and the largest exact memorisation allowed after."""

CHRONICLE = (
    "rolled-back", "purging", "purged", "repacked", "hold", "released", "countered", "withdrawn", "reinstated",
    "not-reinstated", "regressed", "rekeyed", "erasing", "erased",
)  # fmt: skip
"""Events that are told apart from the requests' own."""

ENDS = {"purging": "purged", "erasing": "erased"}
"""What begins → what says that it is done."""

ERASED_WORDS = "(erased)"
"""Stands for what nobody can show any more."""


def aware(moment: datetime) -> datetime:
    """A moment with a zone: one that was written without is shown as UTC, and `verify` names what was forged."""
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def request_views(
    workspace: Workspace,
    states: Mapping[str, RequestState],
    steps: Sequence[StepView],
    entries: Sequence[LedgerEntry],
) -> tuple[RequestView, ...]:
    """Requests for people: titles come from the vault.

    They are missing where it has none, others than the ledger committed to, or may not be read.
    """
    vault, planned, measured = open_vault(workspace), planned_views(entries), _measured(steps, entries)
    events: dict[str, list[EventView]] = {}
    for entry in entries:
        if entry.event.request_id is not None:
            events.setdefault(entry.event.request_id, []).append(event_view(entry))
    received = received_data(entries)
    views = []
    for name, state in states.items():
        try:
            request = vault.confirmed(name, received[name])
            title, holder = request.title, request.rights_holder
        except (StoreDamaged, OSError):
            title, holder = "(not in the vault, not readable, or not what the ledger committed to)", ""
            if state.erased:
                title = ERASED_WORDS
        before, after, limit = measured.get(name, (None, None, None))
        views.append(
            RequestView(
                request_id=name,
                title=title,
                rights_holder=holder,
                batch_id=state.batch_id,
                received_at=aware(state.received_at),
                state=state.state,
                decision=state.decision,
                decided_at=state.decided_at,
                on_hold=state.on_hold,
                erased=state.erased,
                version=state.version if state.state in TAKEN_OUT else None,
                run_id=state.run_id,
                planned=planned.get(str(state.run_id)),
                before=before,
                after=after,
                limit=limit,
                note=_covering(state, steps),
                events=tuple(events.get(name, ())),
            )
        )
    return tuple(views)


def _measured(steps: Sequence[StepView], entries: Sequence[LedgerEntry]) -> dict[str, Scores]:
    """Scores of each request before and after the last run that answered it, with the limit of that run.

    From the run's evidence; where that is lost, from the ledger's own entry.
    """
    found: dict[str, Scores] = {}
    read = {step.run_id: step for step in steps}
    for entry in entries:
        event, step = entry.event, read.get(str(entry.event.run_id))
        if event.kind in DECIDED and event.request_id is None and step is not None and step.evaluation is not None:
            limit = step.evaluation.level.mean + step.limits.forget_tolerance
            for c in step.evaluation.of("this", "folded", "repeat", "not-memorised"):
                found[c.name] = (c.before, c.after, limit if c.role != "not-memorised" else None)
        elif event.kind == "verified" and event.request_id is not None and step is None:
            with suppress(ValidationError):  # what is no score cannot be shown; the run is listed as lost
                before, after = (TextScore.model_validate(event.data.get(side)) for side in ("before", "after"))
                allowed = event.data.get("limit")
                found[event.request_id] = (before, after, allowed if isinstance(allowed, int | float) else None)
    return found


def _covering(state: RequestState, steps: Sequence[StepView]) -> str:
    """Which requests stand for a repeat or a near-copy, and where in its text, as the run found that answered it."""
    decisions = [d for step in steps if step.run_id == state.run_id for d in step.dedupe.decisions]
    decision = next((d for d in decisions if d.request_id == state.request_id), None)
    if decision is None or not decision.evidence or state.decision not in ("repeat", "folded"):
        return ""
    folded = state.decision == "folded"
    pairs = decision.evidence[:1] if folded else decision.evidence
    where = (f"{e.request_id} (characters {places(e.ranges)})" if e.ranges else e.request_id for e in pairs)
    left_out = (
        f"; {decision.uncounted:.1%} of the text is boilerplate and was not counted" if decision.uncounted else ""
    )
    return f"{'with' if folded else 'covered by'} {listed(where)}{left_out}"


def planned_views(entries: Sequence[LedgerEntry]) -> dict[str, PlannedView]:
    """Limits that were put on record before each run."""
    found: dict[str, PlannedView] = {}
    for entry in entries:
        if entry.event.kind == "planned" and entry.event.run_id is not None:
            with suppress(ValidationError):  # limits of another form are no limits that can be shown
                limits = GateSettings.model_validate(entry.event.data.get("limits"))
                view = PlannedView(seq=entry.seq, at=entry.at, actor=entry.event.actor, limits=limits)
                found.setdefault(entry.event.run_id, view)
    return found


def event_view(entry: LedgerEntry) -> EventView:
    """An entry for people."""
    event = entry.event
    return EventView(
        seq=entry.seq,
        at=entry.at,
        kind=event.kind,
        actor=event.actor,
        request_id=event.request_id,
        version=event.version,
        run_id=event.run_id,
        note=event_note(event),
    )


def chronicle(entries: Sequence[LedgerEntry]) -> tuple[EventView, ...]:
    """What was done to history: rollbacks, purges, repacks, holds, counter-notices, and what came back by itself.

    What a rollback brought back stands with the rollback; a purge or an erasure that was ended stands once.
    """
    told = []
    for entry in entries:
        kind = entry.event.kind
        ended = kind in ENDS and any(
            e.event.kind == ENDS[kind] and e.event.request_id == entry.event.request_id and e.seq > entry.seq
            for e in entries
        )
        by_rollback = kind == "regressed" and entry.event.data.get("cause") == "rollback"
        if kind in CHRONICLE and not ended and not by_rollback:
            told.append(event_view(entry))
    return tuple(told)
