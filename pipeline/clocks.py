"""Deadlines: what must be done by when, and what is late.

In: ledger entries, settings, what the machine's clock says. Out: plain records. Never: a text, a name of anybody; a
deadline that is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from zoneinfo import ZoneInfo

from pipeline.ledger import Ledger
from pipeline.periods import EARLIEST, end_of
from pipeline.records import LedgerEntry, Record
from pipeline.report_requests import aware
from pipeline.settings import Clock, Settings
from pipeline.states import TO_DO, RequestState, moves
from pipeline.workspace import Workspace


class Deadline(Record):
    """A clock that runs for a request.

    Attributes:
        request_id: The request.
        clock: Its name in the settings.
        state: Where the request stands.
        on_hold: Whether it is on legal hold.
        since: When the clock started.
        due: When it is over.
        overdue: Whether it is over.
    """

    request_id: str
    clock: str
    state: str
    on_hold: bool
    since: datetime
    due: datetime
    overdue: bool


class Waiting(Record):
    """What the next run works on, and has been waiting longest.

    Attributes:
        request_id: The request.
        since: When it came in, or came back.
        age_s: Seconds since then.
    """

    request_id: str
    since: datetime
    age_s: float


class Present(NamedTuple):
    """What counts as now.

    Attributes:
        at: The moment, in UTC.
        behind: By how much the machine's clock is behind the ledger's latest time; zero where it is not.
        latest: Number of the entry that has this time; None in an empty ledger.
    """

    at: datetime
    behind: timedelta
    latest: int | None


def present(entries: Sequence[LedgerEntry], machine: datetime) -> Present:
    """Now: what the machine says, but never before the latest time in the ledger.

    A clock that was set back would otherwise make what is overdue look as if there was time left.
    """
    last = max(entries, key=lambda e: e.at, default=None)
    if last is None or last.at <= machine:
        return Present(machine.astimezone(UTC), timedelta(0), last.seq if last else None)
    return Present(last.at.astimezone(UTC), last.at - machine, last.seq)


class Standing(NamedTuple):
    """Who waits, and by when what must be done.

    Attributes:
        deadlines: Every clock that runs: what is overdue longest first, then what is due next.
        oldest: Of what the next run works on, what has been waiting longest; a hold in between does not make it
            younger. None where nothing waits.
        postdated: Requests that arrived, by what their batch says, after they were taken in; the ledger's time counts.
        states: Where every request stands, in the order received.
        faults: Entries that cannot follow what came before them, with the reason.
    """

    deadlines: tuple[Deadline, ...]
    oldest: Waiting | None
    postdated: tuple[str, ...]
    states: dict[str, RequestState]
    faults: tuple[tuple[LedgerEntry, str], ...]

    @property
    def overdue(self) -> tuple[Deadline, ...]:
        """The deadlines that have passed."""
        return tuple(d for d in self.deadlines if d.overdue)


def standing(entries: Iterable[LedgerEntry], settings: Settings, now: datetime) -> Standing:
    """Follow every request once, and every clock that runs for it.

    A request arrived when its batch says, or when it was taken in, whichever is earlier: a batch cannot postpone its
    own deadline. Everything else happened when the ledger says. Entries that cannot be are left to `verify`.

    Args:
        entries: Of the ledger.
        settings: Their clocks, holidays and time zone.
        now: See `present`.
    """
    clocks, zone = settings.deadlines.clocks, ZoneInfo(settings.serve.time_zone)
    periods = {name: clock.period for name, clock in clocks.items()}
    last: dict[str, RequestState] = {}
    basis: dict[str, object] = {}
    started: dict[str, dict[str, datetime]] = {}
    waits: dict[str, datetime] = {}
    postdated, faults = [], []
    for entry, state in moves(entries):
        if isinstance(state, str):
            faults.append((entry, state))
            continue
        name, at = state.request_id, entry.at
        if name not in last:
            basis[name], arrived = entry.event.data.get("basis"), max(aware(state.received_at), EARLIEST)
            if arrived > at:
                postdated.append(name)
            at = min(at, arrived)
        before = started.get(name, {})
        started[name] = {c: before.get(c, at) for c, clock in clocks.items() if _runs(clock, state, basis[name])}
        if state.state in TO_DO:
            waits.setdefault(name, at)
        else:
            waits.pop(name, None)
        last[name] = state
    waiting = [(since, name) for name, since in waits.items() if last[name].to_do]
    found = [
        _deadline(last[name], clock, at, end_of(periods[clock], at, zone, settings.deadlines.holidays), now)
        for name, since in started.items()
        for clock, at in since.items()
    ]
    deadlines = tuple(sorted(found, key=lambda d: d.due))
    return Standing(deadlines, _oldest(waiting, now), tuple(postdated), last, tuple(faults))


def overdue(workspace: Workspace, machine: datetime) -> tuple[Deadline, ...]:
    """The deadlines of a workspace that have passed.

    Raises:
        StoreDamaged: The ledger does not hold.
        InvalidInput: The settings have a mistake.
    """
    with Ledger.open(workspace.ledger, read_only=True) as ledger:
        entries = ledger.entries()
    return standing(entries, workspace.settings(), present(entries, machine).at).overdue


def _runs(clock: Clock, state: RequestState, basis: object) -> bool:
    matches = state.state in clock.states or (state.on_hold and "on-hold" in clock.states)
    return matches and not state.erased and (not clock.basis or basis is None or basis in clock.basis)


def _deadline(state: RequestState, clock: str, since: datetime, due: datetime, now: datetime) -> Deadline:
    return Deadline(
        request_id=state.request_id, clock=clock, state=state.state, on_hold=state.on_hold,
        since=since.astimezone(UTC), due=due, overdue=due <= now,
    )  # fmt: skip


def _oldest(waiting: list[tuple[datetime, str]], now: datetime) -> Waiting | None:
    if not waiting:
        return None
    at, name = min(waiting, key=lambda found: found[0])  # of equal ones the first that came
    return Waiting(request_id=name, since=at.astimezone(UTC), age_s=max(0.0, (now - at).total_seconds()))
