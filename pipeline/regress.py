"""Which earlier texts a step from the version in force brought back: the gate refused it, its evidence is on record.

In: the ledger's entries and the store. Out: request ids. Never: a change of their state: the version in force excludes
them still, for what would have held them was not published.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.evidence import evidence_of, recall
from pipeline.gate import above_limit
from pipeline.objects import ObjectStore
from pipeline.records import Evaluation, LedgerEntry
from pipeline.settings import GateSettings
from pipeline.states import RequestState, decisions, excluded, in_force


def brought_back(entries: Sequence[LedgerEntry], objects: ObjectStore, limits: GateSettings) -> tuple[str, ...]:
    """Requests whose text a refused candidate of the version in force reproduced above its limit, sorted.

    All candidates since that version came into force count, so that what is worked on again never gets less from one
    attempt to the next, and the attempts end. A reinstatement's do not: it starts from other weights.

    Args:
        entries: All of the ledger.
        objects: Where the evidence is.
        limits: Today's; a text that they allow is left alone.

    Raises:
        StoreDamaged: Evidence is missing or was changed.
    """
    version, since = in_force(entries)
    found = set[str]()
    for entry in decisions(entries).values():
        if entry.event.kind != "refused" or entry.seq < since or "leave-out" in evidence_of(entry):
            continue
        evaluation = recall(objects, entry, "evaluate", Evaluation)
        if evaluation is not None:
            found |= {c.name for c in evaluation.of("earlier") if above_limit(evaluation, c, limits)}
    return tuple(sorted(n for n, state in excluded(entries, version).items() if n in found and workable(state)))


def workable(state: RequestState) -> bool:
    """Whether a step may work on a text that is out: it is there, and not under legal hold."""
    return not (state.on_hold or state.erased)
