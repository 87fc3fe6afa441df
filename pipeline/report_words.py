"""How the report writes things: states and events in words, numbers with their digits.

In: values of the records. Out: short plain English. Never: a value of an event that is not listed here, so that nothing
comes onto the page unseen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from pipeline.records import Event

STATES = {
    "waiting": "waiting",
    "refused": "refused by the gate, still to be done",
    "repeat": "covered by an earlier takedown",
    "folded": "near-copy of another request of its batch",
    "empty": "no text left after normalisation",
    "not-memorised": "not memorised by the model",
    "applied": "taken out, not measured",
    "verified": "taken out and measured",
    "regressed": "came back, still to be done",
    "countered": "countered by a counter-notice",
    "reinstated": "reinstated: its text was put back",
    "withdrawn": "withdrawn by the sender",
}
"""States in words; a state that is not here is shown as it is."""

EVENTS = {
    "received": "received",
    "planned": "run planned",
    "awaiting-approval": "waiting for approval",
    "approved": "approved",
    "repeat": "answered: covered by an earlier takedown",
    "folded": "answered: near-copy of another request",
    "empty": "answered: no text left after normalisation",
    "not-memorised": "answered: not memorised",
    "applied": "taken out",
    "verified": "measured below the limit",
    "refused": "refused by the gate",
    "regressed": "came back",
    "countered": "counter-notice received",
    "withdrawn": "withdrawn",
    "reinstated": "text put back",
    "not-reinstated": "not put back: refused by the gate",
    "reworked": "worked on again by a later step",
    "reopened": "waiting again: answered on a version not in force",
    "hold": "put on legal hold",
    "released": "released from legal hold",
    "erasing": "erasure begun",
    "erased": "text and contact erased",
    "rolled-back": "rolled back",
    "purging": "purge begun",
    "purged": "purged",
    "repacked": "repacked",
    "sealed": "databases sealed from here on",
    "rekeyed": "master key of the vault changed",
}
"""Events in words; an event that is not here is shown as it is."""


def event_note(event: Event) -> str:
    """What an event says beside its kind, in words: numbers, ids and reasons, nothing else of its data."""
    data = event.data
    if event.kind == "received":
        return _joined(_phrase("batch {}", _word(data, "batch_id")))
    if event.kind == "verified":
        before, after = (_number(_part(data, side), "exact_memorisation") for side in ("before", "after"))
        change = None if before is None or after is None else f"exact memorisation {before:.3f} → {after:.3f}"
        return _joined(change, _phrase("limit {:.3f}", _number(data, "limit")))
    if event.kind in ("applied", "folded", "repeat", "not-memorised", "refused"):
        similar = _number(data, "similar")
        found, passages = _number(data, "memorised"), _number(data, "passages")
        return _joined(
            None if found is None or passages is None else f"{found:g} of {passages:g} passages memorised",
            _phrase("exact memorisation {:.3f}", _number(data, "exact_memorisation")),
            f"resembles {counted(int(similar), 'other text')}" if similar else None,
            *(str(reason) for reason in _items(data, "reasons")),
        )
    if event.kind == "rolled-back":
        back = [str(name) for name in _items(data, "brought_back")]
        return _joined(
            _phrase("from v{:g}", _number(data, "left")),
            f"brings back {listed(back)}, on an override" if back else "brings nothing back",
            _phrase("reason: {}", _word(data, "reason")),
        )
    if event.kind in ("purging", "purged"):
        gone, freed = [f"v{number}" for number in _items(data, "versions")], _number(data, "bytes")
        return _joined(
            _phrase("weights of {}", listed(gone) if gone else None),
            None if freed is None else f"{size(int(freed))} destroyed",
            _phrase("reason: {}", _word(data, "reason")),
        )
    if event.kind == "repacked":
        before, after = _number(data, "bytes_before"), _number(data, "bytes_after")
        return "" if before is None or after is None else f"{size(int(before))} → {size(int(after))}"
    left_out = [f"v{number}" for number in _items(data, "left_out")]
    return _joined(
        _phrase("leaving out what {} changed", listed(left_out) if left_out else None),
        _phrase("cause: {}", _word(data, "cause")),
        _phrase("reason: {}", _word(data, "reason")),
        *(str(reason) for reason in _items(data, "reasons")),
    )


def _part(data: Mapping[str, object], key: str) -> Mapping[str, object]:
    found = data.get(key)
    return found if isinstance(found, Mapping) else {}


def _number(data: Mapping[str, object], key: str) -> float | None:
    found = data.get(key)
    return found if isinstance(found, int | float) and not isinstance(found, bool) else None


def _word(data: Mapping[str, object], key: str) -> str | None:
    found = data.get(key)
    return found if isinstance(found, str) and found else None


def _items(data: Mapping[str, object], key: str) -> list[object]:
    found = data.get(key)
    return found if isinstance(found, list) else []


def _phrase(form: str, value: object) -> str | None:
    return None if value is None else form.format(value)


def _joined(*parts: str | None) -> str:
    return "; ".join(part.removesuffix(".") for part in parts if part)


# --- values -----------------------------------------------------------------------------------------------


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


def size(nbytes: int | None) -> str:
    """Bytes in decimal units with three significant digits; a dash where there are none to tell."""
    if nbytes is None:
        return "–"
    if nbytes < 1000:
        return f"{nbytes} B"
    power = min(5, max(1, (len(str(nbytes)) - 1) // 3))
    if nbytes / 1000**power >= 999.5 and power < 5:  # would be rounded to 1000
        power += 1
    value, unit = nbytes / 1000**power, ("kB", "MB", "GB", "TB", "PB")[power - 1]
    places = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:,.{places}f} {unit}"


def change(nll_rise: float) -> str:
    """A rise of NLL as relative change of perplexity."""
    return f"{math.expm1(nll_rise):+.1%}" if nll_rise < 100 else "far more"


def counted(number: int, noun: str) -> str:
    """A number with its noun, in the plural where it is not one."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def places(ranges: Iterable[tuple[int, int]], most: int = 3) -> str:
    """Character ranges; of many the first and how many more there are; a dash of none."""
    return listed((f"{start}–{end}" for start, end in ranges), most) or "–"


def listed(items: Iterable[str], most: int = 8) -> str:
    """Items with commas; of a long list the first and how many more there are."""
    found = list(items)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more
