"""Periods against an independent count day by day, over summer time, month ends and holidays."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.periods import EARLIEST, LATEST, end_of, read_period

BERLIN, NEW_YORK, SAO_PAULO = map(ZoneInfo, ("Europe/Berlin", "America/New_York", "America/Sao_Paulo"))

DAYS = st.dates(date(2000, 1, 1), date(2060, 1, 1))


def due(within: str, start: str, zone: ZoneInfo = BERLIN, holidays: tuple[str, ...] = ()) -> str:
    """The end of a period as local time."""
    found = end_of(read_period(within), datetime.fromisoformat(start), zone, {date.fromisoformat(h) for h in holidays})
    assert found.tzinfo is UTC
    return found.astimezone(zone).isoformat()


@pytest.mark.parametrize(
    ("within", "start", "end"),
    [
        # A month ends on its last day where it has no such day, and not a day later.
        ("1 month", "2026-01-31T10:00+01:00", "2026-03-01T00:00:00+01:00"),
        ("1 month", "2028-01-31T10:00+01:00", "2028-03-01T00:00:00+01:00"),
        ("1 month", "2026-01-15T23:59+01:00", "2026-02-16T00:00:00+01:00"),
        ("1 month", "2026-12-31T10:00+01:00", "2027-02-01T00:00:00+01:00"),
        ("13 months", "2027-01-31T10:00+01:00", "2028-03-01T00:00:00+01:00"),
        # Local days count: this is 1 March in Berlin.
        ("1 day", "2026-02-28T23:30Z", "2026-03-03T00:00:00+01:00"),
        # Summer time begins on 29 March and ends on 25 October 2026: days stay days, hours stay hours.
        ("1 day", "2026-03-28T12:00+01:00", "2026-03-30T00:00:00+02:00"),
        ("24 hours", "2026-03-28T12:00+01:00", "2026-03-29T13:00:00+02:00"),
        ("1 day", "2026-10-24T12:00+02:00", "2026-10-26T00:00:00+01:00"),
        ("24 hours", "2026-10-24T12:00+02:00", "2026-10-25T11:00:00+01:00"),
        # Friday, Saturday and Sunday all lead to Monday.
        ("1 business day", "2026-11-27T09:00+01:00", "2026-12-01T00:00:00+01:00"),
        ("1 business day", "2026-11-28T09:00+01:00", "2026-12-01T00:00:00+01:00"),
        ("1 business day", "2026-11-29T09:00+01:00", "2026-12-01T00:00:00+01:00"),
        ("10 business days", "2026-11-23T09:00+01:00", "2026-12-08T00:00:00+01:00"),
    ],
)
def test_periods_end_where_a_calendar_says(within: str, start: str, end: str) -> None:
    assert due(within, start) == end


def test_holidays_are_no_business_days_but_days_of_everything_else() -> None:
    christmas = ("2026-12-25", "2026-12-26", "2027-01-01")
    assert due("2 business days", "2026-12-23T09:00+01:00", holidays=christmas) == "2026-12-29T00:00:00+01:00"
    assert due("2 days", "2026-12-23T09:00+01:00", holidays=christmas) == "2026-12-26T00:00:00+01:00"


def test_a_day_whose_midnight_is_skipped_ends_when_the_next_begins() -> None:
    """In São Paulo summer time began at midnight of 4 November 2018: that day began at one."""
    assert due("1 day", "2018-11-02T12:00-03:00", SAO_PAULO) == "2018-11-04T01:00:00-02:00"


@given(DAYS, st.integers(1, 300), st.sets(DAYS, max_size=30), st.sets(st.integers(0, 40), max_size=20))
def test_business_days_against_a_count_day_by_day(first: date, count: int, holidays: set[date], soon: set[int]) -> None:
    """Twice: every day up to the last one looked at by itself, and numpy's calendar, which counts from a valid day."""
    holidays |= {first + timedelta(days=n) for n in soon}
    start = datetime(first.year, first.month, first.day, 15, tzinfo=BERLIN)
    end = end_of(read_period(f"{count} business days"), start, BERLIN, holidays)
    last = (end.astimezone(BERLIN) - timedelta(days=1)).date()
    assert end.astimezone(BERLIN).time().isoformat() == "00:00:00"
    passed = [first + timedelta(days=n) for n in range(1, (last - first).days + 1)]
    counted = [day for day in passed if day.isoweekday() not in (6, 7) and day not in holidays]
    assert len(counted) == count and counted[-1] == last
    expected = np.busday_offset(first, count, roll="backward", holidays=sorted(holidays))
    assert last == expected.astype(date)


@given(
    st.datetimes(datetime(1900, 1, 2), datetime(2100, 1, 1)), st.sampled_from(("hour", "day", "business day", "month"))
)
def test_a_longer_period_never_ends_earlier_and_none_ends_before_it_starts(start: datetime, unit: str) -> None:
    at = start.replace(tzinfo=UTC)
    ends = [end_of(read_period(f"{n} {unit}s"), at, NEW_YORK) for n in range(1, 15)]
    assert at < ends[0] and ends == sorted(set(ends))


def test_no_moment_is_out_of_reach() -> None:
    for within in ("1 hour", "87600 hours", "3650 days", "2600 business days", "120 months"):
        for moment in (datetime.min, datetime.max):
            for zone in (UTC, ZoneInfo("Asia/Tokyo"), NEW_YORK):
                found = end_of(read_period(within), moment.replace(tzinfo=zone), NEW_YORK)
                assert EARLIEST < found < LATEST + timedelta(days=3700)


@pytest.mark.parametrize(
    "text", ["", "7", "7 weeks", "0 days", "-1 days", "1.5 days", "7days", "7  days", " 7 days", "7 days ", "٧ days",
             "3651 days", "2601 business days", "121 months", "999999 hours", "business days", "7 Days"],
)  # fmt: skip
def test_what_is_no_period_is_told(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no period|is not between"):
        read_period(text)
