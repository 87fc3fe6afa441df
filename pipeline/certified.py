"""What a certificate says, as records; every time is text as the log has it.

In: nothing. Out: types that `pipeline.certificate` fills and writes, and whose JSON `pipeline.verify_bundle` checks
without them. Never: a text, a contact, another request.
"""

from __future__ import annotations

from typing import Any, Literal

from pipeline.records import Comparison, NeverSeenLevel, Record, TextScore


class CertifiedRequest(Record):
    """The request; title and rights holder are the sender's words and stand in no log.

    Attributes:
        request_id: Its id.
        title: Name of the work, untrusted.
        rights_holder: Who claims, untrusted.
        batch_id: Batch that it came in.
        received_at: When, as the batch says.
        recorded_at: When the log recorded it.
        commitment: Keyed digest of the text; whoever has the vault's key can recompute it.
        record: Likewise of title, rights holder, basis and contact together with that; None, and left out of the
            JSON, where the log has none because an earlier release recorded the request.
    """

    request_id: str
    title: str
    rights_holder: str
    batch_id: str
    received_at: str
    recorded_at: str
    commitment: str
    record: str | None = None


class CertifiedVersion(Record):
    """The version that the certificate is about, as the log published it.

    Attributes:
        version: Its number: the first that excludes the text, else the one on which the text was measured.
        root: Tensor root, the identity of the weights.
        manifest: Digest of its manifest, which is not given away.
        signature: Digest of ``model.sig``.
        parent: Version that it was made from; None for v0.
        published_at: When.
        published_by: Who.
    """

    version: int
    root: str
    manifest: str
    signature: str
    parent: int | None
    published_at: str
    published_by: str


class LaterVersion(Record):
    """A version made from that one.

    Attributes:
        version: Its number.
        root: Tensor root.
        published_at: When.
        published_by: Who.
        measured: Score of the text on it; None where it was not measured, as with a text that was not excluded.
        reworked: Whether its step worked on the text again; left out of the JSON where not.
    """

    version: int
    root: str
    published_at: str
    published_by: str
    measured: TextScore | None
    reworked: bool = False


class Measured(Record):
    """What was measured of a text that was taken out.

    Attributes:
        before: On the parent.
        after: On the version that excludes it.
        level: Score of text that the model never saw.
        limit: Level plus the tolerance that was fixed beforehand.
    """

    before: TextScore
    after: TextScore
    level: NeverSeenLevel
    limit: float


class Answered(Record):
    """What was measured of a text that needed no new version.

    Attributes:
        exact_memorisation: Share of its tokens that the model predicted, over the whole text, in [0, 1].
        passages: Number of passages of the text.
        memorised: How many of them counted as memorised.
        covered: Share of the text that earlier takedowns cover, in [0, 1].
    """

    exact_memorisation: float
    passages: int
    memorised: int
    covered: float


class FixedBefore(Record):
    """What was on record before the run that answered.

    Attributes:
        run_id: The run.
        planned_at: When.
        planned_by: Who.
        limits: The gate's limits.
        settings: Digest of all settings.
        code: Release that computed.
    """

    run_id: str
    planned_at: str
    planned_by: str
    limits: dict[str, float]
    settings: str
    code: str


class GateDecision(Record):
    """How the gate decided.

    Attributes:
        accepted_at: When.
        accepted_by: Who.
        checks: Root over everything that was measured in the run.
        reasons: Limits broken: none.
        unchecked: Limits that could not be checked.
        approved_at: When somebody approved it; left out of the JSON, with the next, where nobody was asked.
        approved_by: Who.
    """

    accepted_at: str
    accepted_by: str
    checks: str
    reasons: tuple[str, ...]
    unchecked: tuple[str, ...]
    approved_at: str | None = None
    approved_by: str | None = None


class ProvenCheck(Record):
    """A measurement with its way up to the root over all measurements of its run.

    Attributes:
        version: Version measured.
        comparison: The measurement.
        index: Its place among them, from 0.
        size: How many there are.
        proof: Merkle inclusion proof, each hash in base64.
    """

    version: int
    comparison: Comparison
    index: int
    size: int
    proof: tuple[str, ...]


class ProvenEntry(Record):
    """An entry of the log.

    Attributes:
        leaf: Its exact text, ASCII; the leaf's number is its ``seq`` less one.
        proof: Merkle inclusion proof to the checkpoint's root, each hash in base64.
    """

    leaf: str
    proof: tuple[str, ...]


class Continued(Record):
    """An older checkpoint, and the proof that the log was only added to since.

    Attributes:
        checkpoint: As it was signed then.
        size: How many entries it signs.
        proof: Merkle consistency proof to the newest checkpoint's root, each hash in base64.
    """

    checkpoint: str
    size: int
    proof: tuple[str, ...]


class LogProof(Record):
    """The log as far as the certificate needs it.

    Attributes:
        checkpoint: The newest signed checkpoint.
        vkey: The key that signed it.
        entries: By rising number.
        since: An older checkpoint that this one continues; left out of the JSON where none was given.
    """

    checkpoint: str
    vkey: str
    entries: tuple[ProvenEntry, ...]
    since: Continued | None = None


class Certificate(Record):
    """What is certified of a request.

    Attributes:
        format: Version of this layout.
        issued_at: When this was written.
        lineage: Name of the lineage.
        request: The request.
        outcome: ``excluded`` by a version, else how it was answered without one.
        state: Where the request stands now.
        decided_at: When that was decided.
        decided_by: Who ran it.
        version: The version that this is about.
        current: The version in force.
        later: Versions made from that one, up to the one in force.
        erased_at: When the text was erased: versions made since are left out of ``later`` and ``current``, for nothing
            could be measured on them; None, and left out of the JSON, where it was not.
        passages: Token ranges (prompt start, start, end) of the text that were taken out and measured.
        measured: For a text that was taken out.
        answer: For one that was not.
        plan: What was on record beforehand.
        gate: For a text that was taken out.
        statement: What this certifies in words, and what it does not.
        checks: The measurements, with proofs.
        log: The log's entries, with proofs.
    """

    format: Literal["takedown-certificate-1"]
    issued_at: str
    lineage: str
    request: CertifiedRequest
    outcome: Literal["excluded", "repeat", "folded", "empty", "not-memorised"]
    state: str
    decided_at: str
    decided_by: str
    version: CertifiedVersion
    current: int
    later: tuple[LaterVersion, ...]
    erased_at: str | None = None
    passages: tuple[tuple[int, int, int], ...]
    measured: Measured | None
    answer: Answered | None
    plan: FixedBefore
    gate: GateDecision | None
    statement: tuple[str, ...]
    checks: tuple[ProvenCheck, ...]
    log: LogProof

    def as_json(self) -> dict[str, Any]:
        """The document as it is written: without the fields that earlier releases do not know, where they are empty."""
        tree = self.model_dump(mode="json")
        if self.log.since is None:
            del tree["log"]["since"]
        for later in tree["later"]:
            if not later["reworked"]:
                del later["reworked"]
        if self.erased_at is None:
            del tree["erased_at"]
        if self.request.record is None:
            del tree["request"]["record"]
        if self.gate is not None and self.gate.approved_at is None:
            del tree["gate"]["approved_at"], tree["gate"]["approved_by"]
        return tree
