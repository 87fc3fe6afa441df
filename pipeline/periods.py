"""Periods of time as deadlines count them: hours, days, business days, calendar months.

In: a moment, a period, a time zone, holidays. Out: the moment at which the period is over. Never: the clock.

Hours are counted exactly. All others are counted as laws and contracts do: the day of the event is not counted, and
the period is over at the end of its last local day, whatever summer time does on the way.
"""

from __future__ import annotations

import re
from calendar import monthrange
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from typing import Literal, get_args
from zoneinfo import ZoneInfo

Unit = Literal["hour", "day", "business day", "month"]

MOST: dict[Unit, int] = {"hour": 87_600, "day": 3_650, "business day": 2_600, "month": 120}
"""Ten years: what is longer is a mistake, and the calendar must not run out."""
EARLIEST, LATEST = datetime(1900, 1, 1, tzinfo=UTC), datetime(9900, 1, 1, tzinfo=UTC)
"""Moments outside are taken for these: a forged date must not stop anybody from seeing the others."""

_WRITTEN = re.compile(rf"([0-9]{{1,6}}) ({'|'.join(get_args(Unit))})s?")


@dataclass(frozen=True)
class Period:
    """So many of a unit."""

    count: int
    unit: Unit


def read_period(text: str) -> Period:
    """``36 hours``, ``1 day``, ``10 business days`` or ``1 month`` as a period.

    Raises:
        ValueError: It is none of these, zero, or longer than ten years.
    """
    found = _WRITTEN.fullmatch(text)
    if found is None:
        raise ValueError('is no period; write it like "36 hours", "7 days", "10 business days" or "1 month"')
    unit: Unit = next(u for u in get_args(Unit) if u == found[2])
    if not 1 <= int(found[1]) <= MOST[unit]:
        raise ValueError(f"is not between 1 and {MOST[unit]} {unit}s")
    return Period(int(found[1]), unit)


def end_of(period: Period, start: datetime, zone: ZoneInfo, holidays: Collection[date] = ()) -> datetime:
    """The moment at which a period that starts at a moment is over.

    Args:
        period: How long.
        start: When it starts, with zone.
        zone: Whose days are counted.
        holidays: Days that are no business days, beside Saturdays and Sundays.

    Returns:
        In UTC.
    """
    start = min(max(start, EARLIEST), LATEST)
    if period.unit == "hour":
        return start.astimezone(UTC) + timedelta(hours=period.count)
    return _end_of_last_day(period, start.astimezone(zone).date(), zone, frozenset(holidays))


@lru_cache(maxsize=4096)
def _end_of_last_day(period: Period, first: date, zone: ZoneInfo, holidays: frozenset[date]) -> datetime:
    """The end of a period that starts on a day; kept, for many requests arrive on the same one.

    Where summer time skips or repeats midnight, that is the first moment of the day after.
    """
    after = _last_day(period, first, holidays) + timedelta(days=1)
    return datetime(after.year, after.month, after.day, tzinfo=zone).astimezone(UTC)


def _last_day(period: Period, first: date, holidays: Collection[date]) -> date:
    if period.unit == "day":
        return first + timedelta(days=period.count)
    if period.unit == "month":
        years, month = divmod(first.month - 1 + period.count, 12)
        year = first.year + years
        # A month without such a day ends the period on its last: 31 January and a month is 28 or 29 February.
        return date(year, month + 1, min(first.day, monthrange(year, month + 1)[1]))
    day, left = first, period.count
    while left:
        day += timedelta(days=1)
        left -= day.weekday() < 5 and day not in holidays
    return day
