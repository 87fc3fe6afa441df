"""What deduplication found of requests, for the terminal: what each shares with which other text, how much, and where.

In: decisions. Out: a table of pairs, and a sentence for each text of which a part was not counted. Never: a text.
"""

from __future__ import annotations

from collections.abc import Sequence

from flows.terminal import out, say, table
from pipeline.display import plain
from pipeline.records import DedupeDecision
from pipeline.report_words import places

SHOWN = 8
"""Pairs shown of a request, strongest first; `--json` has all."""


def show_overlaps(decisions: Sequence[DedupeDecision]) -> None:
    """The evidence of some decisions; nothing where no text resembles another one and all was counted."""
    rows = [
        (d.request_id, e.request_id, f"{e.jaccard:.3f}", f"{e.containment:.3f}", f"{e.contained:.3f}", places(e.ranges))
        for d in decisions
        for e in d.evidence[:SHOWN]
    ]
    if rows:
        columns = ("request", "shares with", "Jaccard", "share of it", "of the other", "at its characters")
        out.print(table("Texts in common", columns, rows))
    for decision in decisions:
        name = plain(decision.request_id)
        if len(decision.evidence) > SHOWN:
            say(f"{name}: shares something with {len(decision.evidence) - SHOWN} more texts; --json lists them.")
        if decision.uncounted:
            say(f"{name}: {decision.uncounted:.1%} of the text is boilerplate; all shares are of the rest.")
