"""Measure again, on the version in force, every text that it is meant to exclude.

In: a restored version and request ids. Out: scores beside the limits that were on record when the text was taken out.
Never: a write to the workspace.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pipeline.context import loaded, passages_at, spans_up_to
from pipeline.discreet import discreet
from pipeline.gate import ROUNDING
from pipeline.metrics import PassageScore, exact_memorisation, score_passages
from pipeline.passages import pad_id
from pipeline.records import LedgerEntry, Record
from pipeline.states import current_version, erased_requests, excluded, published_versions
from pipeline.vault import open_vault
from pipeline.versions import VersionStore
from pipeline.workspace import Workspace, open_workspace, read_entries


class Rechecked(Record):
    """A text measured again.

    Attributes:
        request_id: Whose.
        exact_memorisation: Over the passages that were taken out, in [0, 1].
        limit: What was allowed when it was taken out; None where no measurement is on record.
    """

    request_id: str
    exact_memorisation: float
    limit: float | None

    @property
    def within(self) -> bool:
        """Whether it is not above its limit."""
        return self.limit is None or self.exact_memorisation <= self.limit + ROUNDING


def restore_current(workspace: Workspace, folder: Path) -> int:
    """Make the version in force a model folder, every byte hashed; returns its number.

    Args:
        workspace: Where it is kept.
        folder: Where to; must not exist.
    """
    entries = read_entries(workspace)
    version = current_version(entries)
    VersionStore(workspace.versions, published_versions(entries)).restore(version, folder)
    return version


def to_recheck(workspace: Workspace, version: int) -> list[str]:
    """Requests that a version excludes and that have passages of their own to measure, in order received.

    The others are repeats of them, of which no passage was memorised; or their text was erased, and nobody can measure
    it any more.

    Args:
        workspace: Where; it may be written to meanwhile.
        version: The version that was restored; another one may be in force by now.
    """
    entries = read_entries(workspace)
    measurable = spans_up_to(workspace, entries, version)
    erased = erased_requests(entries)
    return [name for name in excluded(entries, version) if name in measurable and name not in erased]


def recheck(workspace_root: str | Path, model: str | Path, version: int, requests: Sequence[str]) -> list[Rechecked]:
    """Measure requests on a restored version. Each is scored by itself, so that no split of them changes a number.

    Args:
        workspace_root: Folder of the workspace.
        model: Folder of the restored version.
        version: Its number.
        requests: Some of `to_recheck`.
    """
    workspace = open_workspace(Path(workspace_root))
    entries, runtime = read_entries(workspace), workspace.settings().runtime
    spans = spans_up_to(workspace, entries, version)
    network, tokenizer = loaded(Path(model), runtime.device)
    vault = open_vault(workspace)

    def measured(name: str) -> list[PassageScore]:
        (passages,) = passages_at(tokenizer, vault, {name: spans[name]}).values()
        return score_passages(network, passages, pad_id(tokenizer), runtime.batch_tokens)

    found = []
    for name in requests:
        scores = discreet(vault, "audit", partial(measured, name))
        found.append(
            Rechecked(
                request_id=name,
                exact_memorisation=exact_memorisation(scores),
                limit=_limit(entries, name),
            )
        )
    return found


def _limit(entries: Sequence[LedgerEntry], request_id: str) -> float | None:
    """The limit under which a request was last measured for the ledger."""
    for entry in reversed(entries):
        if entry.event.kind == "verified" and entry.event.request_id == request_id:
            limit = entry.event.data.get("limit")
            return float(limit) if isinstance(limit, int | float) else None
    return None
