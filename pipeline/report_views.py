"""What the report shows: plain records, read from ledger, store and vault before a word of the page is written.

In: nothing. Out: the types between `pipeline.history`, which reads, and `pipeline.report`, which writes. Never: a text
or a contact of a request; titles, rights holders, actors and reasons are untrusted words.
"""

from __future__ import annotations

from typing import Literal

from pydantic import AwareDatetime

from pipeline.records import (
    Break,
    Calibration,
    DedupeReport,
    Evaluation,
    MaskReport,
    Record,
    ScreenReport,
    StoredFile,
    TextScore,
    VectorReport,
    Verdict,
)
from pipeline.settings import GateSettings

VersionStatus = Literal["current", "superseded", "rolled back", "purged"]
"""``superseded``: the version in force was made from it; ``rolled back``: it was not; ``purged``: weights destroyed."""

Kind = Literal["whole", "delta", "purged", "missing"]
"""``whole``: all files of a version are kept whole; ``delta``: some are made from an earlier version's; ``purged``: its
weights were destroyed and their proof is kept; ``missing``: something that it needs is not there."""


class VersionView(Record):
    """One published version.

    Attributes:
        version: 0 for the untouched model.
        parent: Version it was made from; None for v0.
        root: Its tensor root.
        created_at: When it was published.
        published_by: Actor of the entry that published it.
        run_id: Run that made it; None for v0.
        requests: Requests that it is the first to exclude.
        puts_back: Requests whose text it puts back.
        reworks: Requests whose text was out already and that its step worked on again.
        selected: Entries inside the mask; None for v0.
        changed: Entries whose bits differ from the parent; None for v0.
        total: Entries that the mask could choose from; None for v0.
        alpha: Strength of the task vector; None for v0.
        status: How it stands to the version in force.
    """

    version: int
    parent: int | None
    root: str
    created_at: AwareDatetime
    published_by: str
    run_id: str | None
    requests: tuple[str, ...]
    puts_back: tuple[str, ...] = ()
    reworks: tuple[str, ...] = ()
    selected: int | None
    changed: int | None
    total: int | None
    alpha: float | None
    status: VersionStatus


class StorageView(Record):
    """How a version is kept now. Repacking and purging change this, never the version.

    Attributes:
        version: The version.
        kind: See `Kind`.
        added: Bytes that the store holds for it and for no earlier version: contents, table of tensors, manifest,
            signature; None where something is missing.
        whole: Bytes of its model folder, written out.
    """

    version: int
    kind: Kind
    added: int | None
    whole: int


class EventView(Record):
    """One entry of the ledger, as the page shows it.

    Attributes:
        seq: Number of the entry.
        at: When it was written.
        kind: Kind of the event.
        actor: Who did it, untrusted words.
        request_id: Request that it is about; None where it is about none.
        version: Version that it names.
        run_id: Run that it belongs to.
        note: What else it says, in words: numbers, ids and reasons only.
    """

    seq: int
    at: AwareDatetime
    kind: str
    actor: str
    request_id: str | None
    version: int | None
    run_id: str | None
    note: str


class PlannedView(Record):
    """Limits as they were put on record before a run measured anything.

    Attributes:
        seq: Number of the entry.
        at: When it was written.
        actor: Who asked for the run.
        limits: The limits.
    """

    seq: int
    at: AwareDatetime
    actor: str
    limits: GateSettings


class RequestView(Record):
    """One request as the page shows it; title, rights holder and note are untrusted.

    Attributes:
        request_id: The request.
        title: Name of the work.
        rights_holder: Who claims.
        batch_id: Batch that it arrived in.
        received_at: When, as the batch says.
        state: State of the ledger, see `pipeline.states`.
        decision: How the last run answered it; None while none has.
        decided_at: When the state was reached; None while it waits.
        on_hold: Under legal hold.
        erased: Text, contact, title and rights holder were destroyed.
        version: Version that first excluded it; None where none does.
        run_id: Run that answered it last.
        planned: Limits of that run, as they were put on record before; None where no entry gives them.
        before: Its score on the parent of that run; None where it was not measured.
        after: Its score on that run's candidate likewise.
        limit: Largest exact memorisation that the run allowed; None where nothing was measured.
        note: Anything to add, e.g. which request covers it.
        events: Every entry about it, in order.
    """

    request_id: str
    title: str
    rights_holder: str
    batch_id: str
    received_at: AwareDatetime
    state: str
    decision: str | None = None
    decided_at: AwareDatetime | None = None
    on_hold: bool = False
    erased: bool = False
    version: int | None = None
    run_id: str | None = None
    planned: PlannedView | None = None
    before: TextScore | None = None
    after: TextScore | None = None
    limit: float | None = None
    note: str = ""
    events: tuple[EventView, ...] = ()


class StepView(Record):
    """One run, accepted or refused.

    Attributes:
        run_id: The run.
        at: When it was decided.
        version: Version that it published; None when it published none.
        parent: Version it started from.
        left_out: Versions whose steps it left out, to put texts back.
        reworks: Requests whose text was out already and that it worked on again; none where it trained nothing.
        dedupe: Outcome of deduplication.
        screen: Outcome of screening.
        mask: The saliency mask; None where nothing was trained.
        vectors: Task vectors in the order they were fitted.
        calibrations: Strengths in the order they were found.
        evaluation: What was measured; None where there was no candidate.
        verdict: The gate's decision; None likewise.
        limits: Limits that the gate applied.
        log: Where its log lies, from the workspace on; None where there is none.
    """

    run_id: str
    at: AwareDatetime
    version: int | None
    parent: int
    left_out: tuple[int, ...] = ()
    reworks: tuple[str, ...] = ()
    dedupe: DedupeReport
    screen: ScreenReport
    mask: MaskReport | None
    vectors: tuple[VectorReport, ...]
    calibrations: tuple[Calibration, ...]
    evaluation: Evaluation | None
    verdict: Verdict | None
    limits: GateSettings
    log: str | None = None


class LostStep(Record):
    """A decided run whose records cannot be read: what the ledger alone says of it.

    Attributes:
        run_id: The run.
        at: When it was decided.
        outcome: ``accepted``, ``refused`` or ``answered``.
        version: Version that it published; None when it published none.
        found: What is wrong with its records.
    """

    run_id: str
    at: AwareDatetime
    outcome: str
    version: int | None
    found: str


class LogView(Record):
    """The signed log, as it can be checked from outside.

    Attributes:
        entries: Number of entries.
        checkpoint: The newest signed checkpoint, verbatim; None where it does not hold.
        log_key: The key that checks it (a C2SP vkey); None where it cannot be read.
        model_key: ``sha256:<hex>`` of the file ``keys/model.pub``; None likewise.
    """

    entries: int
    checkpoint: str | None
    log_key: str | None
    model_key: str | None


class LineageView(Record):
    """Everything on the page.

    Attributes:
        workspace: Its name.
        generated_at: When the page was made.
        current: Version in force.
        software: Versions of this product and its libraries.
        versions: By rising number.
        storage: How they are kept, likewise.
        files: The files of the version in force.
        requests: In the order received.
        steps: In the order run.
        lost: Runs whose records cannot be read, in the order run.
        chronicle: Rollbacks, purges, holds and the like, in order.
        log: The signed log.
        breaks: What ``takedown verify`` found; None where it was not run for this page.
    """

    workspace: str
    generated_at: AwareDatetime
    current: int
    software: dict[str, str]
    versions: tuple[VersionView, ...]
    storage: tuple[StorageView, ...]
    files: tuple[StoredFile, ...]
    requests: tuple[RequestView, ...]
    steps: tuple[StepView, ...]
    lost: tuple[LostStep, ...]
    chronicle: tuple[EventView, ...]
    log: LogView
    breaks: tuple[Break, ...] | None
