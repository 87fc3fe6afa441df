"""The register of requests for lawyers' own tools: CSV and JSON.

In: a workspace. Out: one row per request, one per event. Never: a text or a contact; a cell that a spreadsheet would
run as a formula.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence

from pipeline.errors import StoreDamaged
from pipeline.records import LedgerEntry
from pipeline.states import TAKEN_OUT, current_version, excluded, request_states
from pipeline.vault import open_vault, received_data
from pipeline.workspace import Workspace

FORMULA_STARTS = ("=", "+", "-", "@", "＝", "＋", "－", "＠")
"""What spreadsheets take for the start of a formula, full-width forms included."""

REQUEST_COLUMNS = (
    "request_id", "batch_id", "title", "rights_holder", "basis", "state", "answer", "on_hold", "received_at",
    "erased", "decided_at", "excluded_since", "excluded_now", "em_before", "em_after", "em_limit", "run_id",
    "commitment",
)  # fmt: skip
EVENT_COLUMNS = ("seq", "at", "event", "actor", "request_id", "version", "run_id", "reason", "digest")

Row = dict[str, object]


def request_rows(workspace: Workspace, entries: Sequence[LedgerEntry]) -> list[Row]:
    """One row for each request, in the order received; titles come from the vault.

    They are empty where it has none, or others than the ledger committed to.
    """
    vault, out = open_vault(workspace), excluded(entries, current_version(entries))
    measured: dict[str, Mapping[str, object]] = {
        str(e.event.request_id): e.event.data for e in entries if e.event.kind == "verified"
    }
    received = received_data(entries)
    rows = []
    for name, state in request_states(entries).items():
        try:
            request = vault.confirmed(name, received[name])
            title, holder, basis = request.title, request.rights_holder, request.basis
        except StoreDamaged:
            title = holder = basis = ""
        found = measured.get(name, {})
        rows.append(
            {
                "request_id": name,
                "batch_id": state.batch_id,
                "title": title,
                "rights_holder": holder,
                "basis": basis,
                "state": state.state,
                "answer": state.decision,
                "on_hold": state.on_hold,
                "erased": state.erased,
                "received_at": state.received_at.isoformat(),
                "decided_at": state.decided_at.isoformat() if state.decided_at else None,
                "excluded_since": f"v{state.version}" if state.state in TAKEN_OUT else None,
                "excluded_now": name in out,
                "em_before": _em(found.get("before")),
                "em_after": _em(found.get("after")),
                "em_limit": found.get("limit"),
                "run_id": state.run_id,
                "commitment": state.commitment,
            }
        )
    return rows


def event_rows(entries: Iterable[LedgerEntry]) -> list[Row]:
    """One row for each event, oldest first."""
    return [
        {
            "seq": e.seq,
            "at": e.at.isoformat(),
            "event": e.event.kind,
            "actor": e.event.actor,
            "request_id": e.event.request_id,
            "version": e.event.version,
            "run_id": e.event.run_id,
            "reason": _reason(e),
            "digest": e.digest,
        }
        for e in entries
    ]


def _reason(entry: LedgerEntry) -> str | None:
    """Why, as whoever did it gave it; of a refused run, every limit that was broken."""
    reason, reasons = entry.event.data.get("reason"), entry.event.data.get("reasons")
    if isinstance(reason, str):
        return f"{reason} (on an override)" if entry.event.data.get("override") is True else reason
    return " ".join(map(str, reasons)) if isinstance(reasons, list) and reasons else None


def to_csv(columns: Sequence[str], rows: Iterable[Row]) -> str:
    """Rows as CSV (RFC 4180: CRLF, quotes doubled), every cell neutralised by `harmless`."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(columns)
    writer.writerows([harmless(row[column]) for column in columns] for row in rows)
    return out.getvalue()


def harmless(value: object) -> str:
    """A cell that no spreadsheet runs: text that would start a formula gets an apostrophe in front.

    Numbers stay numbers; leading blanks do not hide a formula from the rule, nor line breaks inside a cell.
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return str(value)
    text = str(value)
    starts = text.lstrip().startswith(FORMULA_STARTS) or text.startswith(("\t", "\r", "\n"))
    return f"'{text}" if starts else text


def _em(score: object) -> object:
    return score.get("exact_memorisation") if isinstance(score, Mapping) else None
