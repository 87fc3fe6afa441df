"""The records that travel between the stages: small, frozen, JSON. Never tensors, never texts.

Only `TakedownRequest` carries a text and a contact; it lives in the vault and goes no further.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer


class Record(BaseModel):
    """A frozen record; unknown fields are refused so that an old reader never drops evidence silently."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)


Basis = Literal["copyright", "contract", "privacy", "court-order", "other"]
"""Legal basis of a claim. It stands in the ledger, too: deadlines depend on it."""


class TakedownRequest(Record):
    """One claim with its text, as kept in the vault.

    Attributes:
        request_id: The sender's id, unique in the workspace.
        title: Name of the work, untrusted text.
        rights_holder: Who claims, untrusted text.
        basis: Legal basis of the claim.
        contact: How to answer the sender; confidential.
        batch_id: Batch that it arrived in.
        received_at: When the batch was received, with zone.
        text: The text to take out; confidential.
    """

    request_id: str
    title: str
    rights_holder: str
    basis: str
    contact: str | None = Field(None, repr=False)
    batch_id: str
    received_at: datetime
    text: str = Field(repr=False)


# --- dedupe -----------------------------------------------------------------------------------------------


class Evidence(Record):
    """How much a new text shares with one other text, over their word shingles.

    Attributes:
        request_id: The other text.
        jaccard: |A ∩ B| / |A ∪ B|.
        containment: |A ∩ B| / |A|, A the new text.
        contained: |A ∩ B| / |B|: the share of the other text that the new one holds.
        ranges: Character ranges [start, end) of the new text that the other one covers; records of release 0.1.0
            have none.
    """

    request_id: str
    jaccard: float
    containment: float
    contained: float
    ranges: tuple[tuple[int, int], ...] = ()


class DedupeDecision(Record):
    """What deduplication decided of one request, with the evidence.

    Attributes:
        request_id: The request.
        verdict: ``fresh``: all or part is new (see ``fresh_spans``); ``repeat``: already covered by earlier
            takedowns; ``folded``: a near-copy of another request of the same batch, which is worked on in its place;
            ``empty``: nothing is left after normalisation.
        covered: Share of the text's shingles found in the union of the earlier takedowns in the evidence, in [0, 1].
        evidence: Every verified pair, strongest containment first.
        fresh_spans: Character ranges [start, end) of the raw text that no earlier takedown covers.
        uncounted: Share of the text's shingles that are boilerplate, in [0, 1]: they are evidence for nothing, and
            all other shares are of what is left.
    """

    request_id: str
    verdict: Literal["fresh", "repeat", "folded", "empty"]
    covered: float
    evidence: tuple[Evidence, ...] = ()
    fresh_spans: tuple[tuple[int, int], ...] = ()
    uncounted: float = 0.0


class RetainExclusion(Record):
    """A retain document that resembles a takedown and is therefore not kept on purpose.

    Attributes:
        document: The document.
        request_id: The takedown that it resembles most.
        jaccard: As in `Evidence`.
        containment: Of the document or of its most similar window, whichever is larger.
        contained: As in `Evidence`.
        ranges: Character ranges [start, end) of the document that the takedown covers.
        uncounted: Share of the document's shingles that are boilerplate.
    """

    document: str
    request_id: str
    jaccard: float
    containment: float
    contained: float
    ranges: tuple[tuple[int, int], ...] = ()
    uncounted: float = 0.0


class DedupeReport(Record):
    """Outcome of deduplication for one run."""

    decisions: tuple[DedupeDecision, ...]
    retain_excluded: tuple[RetainExclusion, ...]


# --- screen -----------------------------------------------------------------------------------------------


class NeverSeenLevel(Record):
    """How a model scores on text of the same kind that it never saw: the honest target of forgetting.

    Attributes:
        mean: Mean exact memorisation over the passages, in [0, 1].
        std: Standard deviation over the passages.
        passages: Number of passages; 0 when assumed.
        source: Where it was measured; ``assumed`` means the value of the settings, nothing measured.
        nll: Nats per token; None where nothing was measured, or by a release that did not look.
    """

    mean: float
    std: float
    passages: int
    source: Literal["held-out", "retain", "assumed"]
    nll: float | None = None

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Without a likelihood, as releases wrote it that knew of none: ledgers and certificates are compared."""
        tree: dict[str, object] = handler(self)
        if self.nll is None:
            del tree["nll"]
        return tree


class PassageSpan(Record):
    """A window of a work in tokens: prompt = tokens[prompt_start:start], continuation = tokens[start:end]."""

    request_id: str
    prompt_start: int
    start: int
    end: int


class ScreenedRequest(Record):
    """What one forward pass of the parent says of one request.

    Attributes:
        request_id: The request.
        passages: Number of passages that tile the text.
        memorised: The passages that the parent reproduces.
        exact_memorisation: Share of continuation tokens that the parent predicts, over the whole text.
        longest_extraction: Largest extraction strength of a passage.
    """

    request_id: str
    passages: int
    memorised: tuple[PassageSpan, ...]
    exact_memorisation: float
    longest_extraction: float


class ScreenReport(Record):
    """Outcome of screening: which passages are unlearned, and the thresholds that decided."""

    level: NeverSeenLevel
    memorised_above: float
    requests: tuple[ScreenedRequest, ...]

    def selected(self) -> tuple[PassageSpan, ...]:
        """All memorised passages, in order of the requests."""
        return tuple(span for request in self.requests for span in request.memorised)


# --- leave out --------------------------------------------------------------------------------------------


class LeftOut(Record):
    """What a reinstatement starts from: the parent without the vectors of some steps (`pipeline.reinstate`).

    Attributes:
        versions: The steps, by the versions that they made.
        root: Tensor root of the result.
        changed: Entries whose bits differ from the parent.
        exact: Of those, entries that no later step had moved: they have the very bits from before their step.
    """

    versions: tuple[int, ...]
    root: str
    changed: int
    exact: int


# --- saliency, unlearn, calibrate, merge -------------------------------------------------------------------


class FileRef(Record):
    """A file of the run by relative path and digest."""

    path: str
    digest: str


class MaskReport(Record):
    """The saliency mask of a step: threshold = mean + k·std of |gradient| over all target weights.

    For a method without a mask the threshold is 0, everything is selected, and no gradient was measured: mean and std
    are 0, too. Where the settings select a share of the weights, k is not used.
    """

    mask: FileRef
    mean: float
    std: float
    k: float
    threshold: float
    selected: int
    total: int
    per_tensor: dict[str, int]


class VectorReport(Record):
    """A task vector on disk: float32 values at the salient coordinates, zero elsewhere.

    Attributes:
        vector: The file; its coordinates are those of the mask, in the mask's order.
        norm: Euclidean norm.
        losses: Total loss per iteration.
        tokens: Tokens run forward and backward.
        rounds: How often the fit went through its iterations; None for a repair, or by a release that had no rounds.
        again: Earlier requests that had come back above the target, so that the fit pushed them down, too.
    """

    vector: FileRef
    norm: float
    losses: tuple[float, ...]
    tokens: int
    rounds: int | None = None
    again: tuple[str, ...] = ()

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Without rounds, as releases wrote it that knew of none: evidence is found by its digest."""
        tree: dict[str, object] = handler(self)
        return tree if self.rounds is not None else {k: v for k, v in tree.items() if k not in ("rounds", "again")}


class CurvePoint(Record):
    """One point of the curve α → (forget, utility).

    Attributes:
        alpha: Strength.
        forget: Largest exact memorisation of a request of this step.
        earlier: Largest exact memorisation of an earlier request; None without any.
        utility_nll: Mean token NLL on the utility texts (held-out, else retain); None without any.
    """

    alpha: float
    forget: float
    earlier: float | None
    utility_nll: float | None

    def forgets(self, target: float) -> bool:
        """Whether every request, of this and of earlier steps, is at the target or below."""
        return max(self.forget, self.earlier or 0.0) <= target


class Calibration(Record):
    """Strength found by bisection on forward passes.

    Attributes:
        vector: The vector that the strength belongs to.
        alpha: Smallest strength found that reaches ``target``, or the largest that utility allows.
        target: Exact memorisation to reach, for every request.
        reached: Whether ``forget ≤ target`` holds at ``alpha``.
        bounded_by_utility: Whether the utility limit cut the search short.
        curve: All points tried, by rising α.
    """

    vector: FileRef
    alpha: float
    target: float
    reached: bool
    bounded_by_utility: bool
    curve: tuple[CurvePoint, ...]


class MergeReport(Record):
    """What merging changed.

    Attributes:
        files: Every file of the candidate with its digest.
        root: Tensor root of the candidate (see `pipeline.digests`).
        selected: Entries inside the mask.
        changed: Entries whose bits differ from the parent.
        changed_tensors: Tensors with at least one such entry.
    """

    files: tuple[FileRef, ...]
    root: str
    selected: int
    changed: int
    changed_tensors: tuple[str, ...]


# --- evaluate, gate ---------------------------------------------------------------------------------------


class TextScore(Record):
    """How one model reproduces one text (METHODS section 4): greedy, teacher-forced where stated.

    Attributes:
        exact_memorisation: Share of continuation positions whose teacher-forced argmax is the true token.
        extraction_strength: Mean over passages of 1 - k/L, exactly 0 where nothing is extracted.
        rouge_1: ROUGE-1 F1 of greedy continuations, mean over passages; None where nothing was generated.
        rouge_l: ROUGE-L F1 likewise.
        longest_run: Longest common run of normalised words in a passage, in words.
        nll: Mean token negative log-likelihood of the continuations, in nats.
    """

    exact_memorisation: float
    extraction_strength: float
    rouge_1: float | None
    rouge_l: float | None
    longest_run: int | None
    nll: float


class Measured(Record):
    """Which texts are measured together."""

    names: tuple[str, ...]


class TextScores(Record):
    """Scores of some texts, by name."""

    scores: dict[str, TextScore]


class Comparison(Record):
    """One text before (parent) and after (candidate).

    Attributes:
        name: Request id, or file name of a reference text.
        role: ``this``: unlearned in this step; ``repeat``/``folded``/``not-memorised``: in this batch but not
            trained on; ``earlier``: taken down in an earlier version; ``reinstated``: put back in this one; ``kept``:
            a work to be kept; ``held-out``.
    """

    name: str
    role: Literal["this", "repeat", "folded", "not-memorised", "earlier", "reinstated", "kept", "held-out"]
    before: TextScore
    after: TextScore


class Evaluation(Record):
    """Everything measured on a candidate."""

    level: NeverSeenLevel
    comparisons: tuple[Comparison, ...]

    def of(self, *roles: str) -> tuple[Comparison, ...]:
        """The comparisons with one of these roles."""
        return tuple(c for c in self.comparisons if c.role in roles)


class Verdict(Record):
    """The gate's decision with every reason; an accepted candidate has none.

    Attributes:
        accepted: Whether the candidate may become current.
        reasons: Every limit that is broken.
        unchecked: What could not be checked, because the workspace has no text to measure it on.
    """

    accepted: bool
    reasons: tuple[str, ...]
    unchecked: tuple[str, ...] = ()


class Reference(Record):
    """What v0 says of the reference texts, measured once for a lineage.

    Attributes:
        folder: Folder of the measurement, relative to the workspace.
        level: Never-seen level.
        scores: v0's scores of kept and held-out texts, by ``kept/NAME`` and ``heldout/NAME``.
        anchor: v0's predictions on the retain text; None without any.
    """

    folder: str
    level: NeverSeenLevel
    scores: dict[str, TextScore]
    anchor: FileRef | None


class Step(Record):
    """A fitted vector with the strength found for it.

    Attributes:
        vector: The task vector, to be negated.
        calibration: Its strength.
    """

    vector: VectorReport
    calibration: Calibration


class Publication(Record):
    """What became of a run.

    Attributes:
        outcome: ``published``, ``refused``, ``nothing`` when no request needed a new version, or
            ``awaiting-approval`` when somebody must decide first.
        version: The version published.
        run_id: The run.
    """

    outcome: str
    run_id: str = ""
    version: int | None = None


# --- versions, ledger, audit ------------------------------------------------------------------------------


class StoredFile(Record):
    """One file of a version: where it belongs in the model folder and what it holds.

    Attributes:
        path: Its name.
        digest: SHA-256 of its bytes.
        size: Its bytes.
        header: SHA-256 of a weight file's safetensors header, length included; None for other files. With the digests
            of the tensors it decides every byte of the file, so that a restore need not hash them a second time.
    """

    path: str
    digest: str
    size: int
    header: str | None = None


class VersionManifest(Record):
    """A published version. Identity is ``root``; nothing here depends on the clock but ``created_at``.

    Attributes:
        version: 0 for the untouched model, then 1, 2, …
        root: Tensor root: digest of all tensors, independent of file layout.
        parent: Version that it was made from; None for v0.
        parent_root: Its tensor root.
        created_at: When it was published.
        run_id: Run that made it; None for v0.
        requests: Requests that this version is the first to exclude.
        files: All files of the model folder.
        tensors: Digest of the table of all tensors (name, dtype, shape, SHA-256), whose Merkle root is ``root``.
        settings: Resolved settings of the run (empty for v0).
        report: Summary of what was done (mask, α, entries changed) and measured.
        software: Versions of this product and of the libraries that computed it.
    """

    version: int
    root: str
    parent: int | None
    parent_root: str | None
    created_at: datetime
    run_id: str | None
    requests: tuple[str, ...]
    files: tuple[StoredFile, ...]
    tensors: str
    settings: dict[str, object]
    report: dict[str, object]
    software: dict[str, str]


class Event(Record):
    """What is written to the ledger: a kind, who did it, and references (ids and digests, never texts).

    Of a request: ``received``, then ``repeat``, ``folded``, ``empty``, ``not-memorised``, ``applied``, ``refused`` by a
    run, ``verified`` by a measurement, later ``regressed``, ``countered``, ``withdrawn``, ``reinstated``,
    ``not-reinstated`` where the gate refused that, ``reworked`` by a later step, ``reopened``, ``hold``, ``released``,
    ``erasing``, ``erased`` (`pipeline.states` says what may follow what). Of a run: ``planned``, before anything is
    computed, with the limits; then ``accepted`` or ``refused`` by the gate, or ``answered`` where nothing had to be
    trained. Of a version: ``initialised``, ``published``, ``rolled-back``. Of the store: ``purging``, ``purged``,
    ``repacked``, ``sealed``. Of the vault: ``rekeyed``.
    """

    kind: str
    actor: str
    request_id: str | None = None
    version: int | None = None
    run_id: str | None = None
    data: dict[str, object] = {}


class LedgerEntry(Record):
    """An event as stored: numbered, dated, chained to its predecessor by digest."""

    seq: int
    at: datetime
    event: Event
    previous: str
    digest: str


class Break(Record):
    """A place where stored evidence does not hold.

    Attributes:
        where: File, row or tensor.
        found: What is wrong.
        means: What it means for whoever relies on it.
    """

    where: str
    found: str
    means: str
