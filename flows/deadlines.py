"""Deadlines in the terminal, for the verbs that show them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from rich.text import Text

from flows.terminal import TIME, err, out, say, table
from pipeline.clocks import Deadline, Standing, present
from pipeline.display import plain, plural
from pipeline.errors import InvalidInput, UsageError
from pipeline.records import LedgerEntry
from pipeline.settings import Settings
from pipeline.workspace import Workspace

SHOWN = 100
"""Rows of a table; a terminal takes seconds for thousands, and nobody reads them there."""
NAMED = 5
"""Requests named in a note."""


def settings_if_readable(workspace: Workspace) -> Settings:
    """The settings; where they have a mistake the defaults, without any deadline, and a note of that.

    What the ledger says must be readable whatever stands in ``takedown.toml``.
    """
    try:
        return workspace.settings()
    except (InvalidInput, OSError) as error:
        err.print(Text(f"takedown: no deadlines are shown: {plain(str(error), 2000)}"), soft_wrap=True)
        return Settings()


def settings_with_clocks(workspace: Workspace) -> Settings:
    """The settings of whoever relies on being told.

    Raises:
        InvalidInput: They have a mistake.
        UsageError: They set no deadline.
    """
    settings = workspace.settings()
    if not settings.deadlines.clocks:
        raise UsageError(
            f"{workspace.settings_file}: sets no deadline, so that nothing can be overdue. Set one under "
            "[deadlines.clocks], or leave --fail-overdue out."
        )
    return settings


def told_present(entries: Sequence[LedgerEntry]) -> datetime:
    """What counts as now; a machine whose clock is behind the ledger is told of."""
    now = present(entries, datetime.now(UTC))
    if now.behind:
        err.print(
            Text(
                f"takedown: the clock of this machine is {span(now.behind)} behind ledger entry {now.latest}; "
                f"deadlines are counted up to that, {now.at.strftime(TIME)}."
            ),
            soft_wrap=True,
        )
    return now.at


def show_deadlines(found: Standing, now: datetime) -> None:
    """A table of what must be done by when, what is overdue first."""
    if found.postdated:
        names = ", ".join(map(plain, found.postdated[:NAMED])) + (", …" if len(found.postdated) > NAMED else "")
        say(f"By their batches received after they were taken in, which counts instead: {names}")
    if not found.deadlines:
        return
    rows = [
        (d.request_id, f"{d.state}{', on hold' if d.on_hold else ''}", d.clock, d.due.strftime(TIME), left(d, now))
        for d in found.deadlines[:SHOWN]
    ]
    out.print(table("Deadlines", ("request", "state", "deadline", "due", "time left"), rows))
    if len(found.deadlines) > SHOWN:
        say(f"and {len(found.deadlines) - SHOWN:,} more; --json has all.")
    if found.overdue:
        say(f"{plural(len(found.overdue), 'deadline')} overdue.")


def deadline_words(deadline: Deadline, now: datetime) -> str:
    """A deadline in one line."""
    return f"{deadline.clock}: due {deadline.due.strftime(TIME)}, {left(deadline, now)}"


def left(deadline: Deadline, now: datetime) -> str:
    """How much time is left, or since when there is none."""
    return f"overdue by {span(now - deadline.due)}" if deadline.overdue else f"{span(deadline.due - now)} left"


def span(time: timedelta) -> str:
    """A time of zero or more in its two largest units."""
    minutes = max(0, int(time.total_seconds() // 60))
    days, hours = minutes // 1440, minutes // 60 % 24
    return f"{days:,} d {hours} h" if days else f"{hours} h {minutes % 60} min" if hours else f"{minutes} min"
