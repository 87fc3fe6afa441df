"""What a run computed, kept for good: its records as contents of the store, named by the event that decided it.

In: a finished run. Out: name → digest, for the ledger; later the records again. Never: a tensor, a text, a record
whose digest the ledger does not give.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from pipeline.errors import StoreDamaged
from pipeline.files import canonical_json, explained_space
from pipeline.merkle import merkle_root
from pipeline.objects import ObjectStore
from pipeline.records import Comparison, DedupeReport, Evaluation, LedgerEntry, Record, RetainExclusion
from pipeline.states import decisions

R = TypeVar("R", bound=Record)

RECORDS = (
    "plan", "reference", "leave-out", "dedupe", "screen", "saliency", "unlearn", "repair", "merge", "evaluate", "gate",
)  # fmt: skip
"""Records of a run, in the order they are made. One that needed no training ends with ``screen``."""


def keep(folder: Path, objects: ObjectStore) -> dict[str, str]:
    """Put the records in a run's folder into the store; returns their digests by name.

    Raises:
        NoSpace: The disk is full or read-only.
    """
    found = {name: folder / f"{name}.json" for name in RECORDS}
    with explained_space(objects.folder):
        return {name: objects.put_bytes(path.read_bytes()) for name, path in found.items() if path.is_file()}


def evidence_of(entry: LedgerEntry) -> dict[str, str]:
    """Name → digest, as a deciding entry gives it; nothing where it gives none."""
    found = entry.event.data.get("evidence")
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, Mapping) else {}


def all_evidence(entries: Iterable[LedgerEntry]) -> list[str]:
    """Digests of all contents that runs left as evidence."""
    return [digest for entry in decisions(entries).values() for digest in evidence_of(entry).values()]


def recall(objects: ObjectStore, entry: LedgerEntry, name: str, kind: type[R]) -> R | None:
    """One record of a decided run; None where it has none of this name.

    Raises:
        StoreDamaged: It is missing, changed, or no such record.
    """
    digest = evidence_of(entry).get(name)
    if digest is None:
        return None
    try:
        return kind.model_validate_json(_record(objects.read(digest)))
    except (ValueError, RecursionError) as error:  # ValidationError is a ValueError
        raise StoreDamaged(
            f"ledger entry {entry.seq}: its evidence {name!r} is not a {kind.__name__}. Run `takedown verify`."
        ) from error


def noted_exclusions(
    objects: ObjectStore, entries: Iterable[LedgerEntry], requests: Collection[str]
) -> tuple[RetainExclusion, ...]:
    """Documents that runs left out of what is kept because they resemble some requests, as the evidence has it.

    Raises:
        StoreDamaged: Evidence is missing or changed.
    """
    if not requests:
        return ()
    found: dict[str, RetainExclusion] = {}
    for entry in decisions(entries).values():
        report = recall(objects, entry, "dedupe", DedupeReport)
        for exclusion in report.retain_excluded if report is not None else ():
            if exclusion.request_id in requests:
                found[exclusion.document] = exclusion
    return tuple(found.values())


def _record(data: bytes) -> bytes:
    """A stage's record without the key under which the run kept it; other records are kept as they are."""
    tree = json.loads(data)
    return canonical_json(tree["record"] if isinstance(tree, dict) and tree.keys() == {"key", "record"} else tree)


def check_leaves(evaluation: Evaluation) -> list[bytes]:
    """The leaves of an evaluation's Merkle tree: one comparison each, in order, as canonical JSON."""
    return [check_leaf(comparison) for comparison in evaluation.comparisons]


def check_leaf(comparison: Comparison) -> bytes:
    """One measured text as a leaf."""
    return canonical_json(comparison.model_dump(mode="json"))


def checks_root(evaluation: Evaluation) -> str:
    """Commitment to everything measured, from which each text can be shown without the others (RFC 6962 root).

    A certificate for one claimant proves that text's measurement and gives away nobody else's.
    """
    return f"root-sha256:{merkle_root(check_leaves(evaluation)).hex()}"


def find_check(evaluation: Evaluation, request_id: str, roles: Sequence[str]) -> int | None:
    """Place of a request's comparison in an evaluation."""
    for place, comparison in enumerate(evaluation.comparisons):
        if comparison.name == request_id and comparison.role in roles:
            return place
    return None
