"""The certificate of one request: what was done and measured, with proofs that hold without this software.

In: a workspace and a request. Out: a folder for the claimant or a court: the certificate for machines and for people,
the log's checkpoint, both public keys, the model's signature, and the program that checks them. Never: a text, a
contact, another request's title or id, torch, a lock, a write anywhere else.

The version's manifest is not given away: it lists every request of its run. What it would show is shown without it, by
the log's entry that names root and signature side by side, and by the signature, which lists the files.
"""

from __future__ import annotations

import base64
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import verify_bundle
from pipeline.certified import Answered, Certificate, LaterVersion, Measured, ProvenCheck
from pipeline.errors import StoreDamaged, UsageError
from pipeline.evidence import check_leaves, find_check, recall
from pipeline.files import (
    canonical_json,
    explained_space,
    fsync_folder,
    read_whole,
    unreadable,
    write_new,
)
from pipeline.gate import ROUNDING
from pipeline.keys import log_vkey, model_public_key
from pipeline.ledger import Ledger
from pipeline.merkle import consistency_proof, inclusion_proof, leaf_hash, root_of_hashes, verify_consistency
from pipeline.notes import MAX_NOTE_BYTES, read_checkpoint
from pipeline.pages import pages
from pipeline.records import Evaluation, LedgerEntry, TextScore
from pipeline.report_words import decimal
from pipeline.states import (
    RequestState,
    ancestry,
    current_version,
    erased_requests,
    published_versions,
    put_back,
    request_states,
)
from pipeline.vault import open_vault
from pipeline.versions import SIGNATURE, VersionStore
from pipeline.workspace import Workspace

CERTIFICATE, PAGE = "certificate.json", "certificate.html"

STATES_CERTIFIED = ("verified", "countered", *verify_bundle.ANSWERS)
"""States of which a certificate can speak; a countered text stays out until it is reinstated."""

ERASED = "(erased)"
"""Stands for the sender's words where they were destroyed."""

# --- reading ----------------------------------------------------------------------------------------------


class _Log(NamedTuple):
    """The log up to its newest checkpoint; what a running command appends meanwhile is left out."""

    note: str
    vkey: str
    entries: tuple[LedgerEntry, ...]
    leaves: tuple[bytes, ...]

    def find(self, kind: str, **wanted: object) -> LedgerEntry | None:
        """The newest entry of a kind with these fields of its event."""
        for entry in reversed(self.entries):
            if entry.event.kind == kind and all(getattr(entry.event, k) == v for k, v in wanted.items()):
                return entry
        return None

    def needed(self, kind: str, **wanted: object) -> LedgerEntry:
        """Like `find`, but it must be there."""
        found = self.find(kind, **wanted)
        if found is None:
            about = ", ".join(f"{name} {value}" for name, value in wanted.items())
            raise StoreDamaged(f"The ledger has no entry {kind!r} ({about}). Run `takedown verify`.")
        return found

    def at(self, entry: LedgerEntry) -> str:
        """The time of an entry, as its leaf has it."""
        return verify_bundle.read_entry(f"entry {entry.seq}", self.leaves[entry.seq - 1].decode()).at


def _read_log(workspace: Workspace) -> _Log:
    with Ledger.open(workspace.ledger, read_only=True) as ledger:
        note = ledger.checkpoint()  # first: entries are only ever added behind it
        entries, leaves = ledger.entries(), ledger.leaves()
    if note is None:
        raise StoreDamaged(f"{workspace.ledger}: has no signed checkpoint. Run `takedown verify`.")
    vkey = log_vkey(workspace.keys)
    size = read_checkpoint(note, vkey).size
    return _Log(note, vkey, entries[:size], tuple(leaves[:size]))


def _continued(log: _Log, hashes: Sequence[bytes], path: Path) -> dict[str, object]:
    """Show that the log continues a checkpoint that somebody kept.

    Raises:
        UsageError: The file cannot be read.
        StoreDamaged: It is no checkpoint of this log, or the log does not continue it.
    """
    try:
        note = read_whole(path, MAX_NOTE_BYTES)
    except OSError as error:
        raise UsageError(f"{path}: {unreadable(error)}. Name a checkpoint of this lineage.") from error
    try:
        old = read_checkpoint(note, log.vkey)
    except StoreDamaged as error:
        raise StoreDamaged(f"{path}: is no checkpoint of this lineage: {error}") from error
    if old.size > len(hashes):
        raise StoreDamaged(
            f"{path}: signs {old.size} entries, the ledger has {len(hashes)}: it was cut back, or is an older copy. "
            "Restore the newest one; `takedown verify --checkpoint` says more."
        )
    proof = consistency_proof(hashes, old.size)
    if not verify_consistency(old.size, old.root, len(hashes), root_of_hashes(hashes), proof):
        raise StoreDamaged(
            f"{path}: signs {old.size} entries, and others than the first {old.size} of the ledger: the history was "
            "rewritten since. `takedown verify --checkpoint` says more."
        )
    if old.size == 0:
        raise UsageError(f"{path}: signs an empty log, which every log continues. Name a later checkpoint.")
    return {"checkpoint": note.decode(), "size": old.size, "proof": _hashes(proof)}


class _Case(NamedTuple):
    """A request that can be certified.

    Attributes:
        state: Where it stands.
        decision: The entry that answered it: ``verified`` where a version excludes it.
        path: Versions from the one that the answer names to the one in force; of a text that was taken out and
            erased, to the last one that could be measured.
        erased: The entry that says that the text is gone.
    """

    state: RequestState
    decision: LedgerEntry
    path: tuple[int, ...]
    erased: LedgerEntry | None

    @property
    def excluded(self) -> bool:
        return self.decision.event.kind == "verified"


def _case(log: _Log, request_id: str) -> _Case:
    """Find what can be certified of a request.

    Raises:
        UsageError: Nothing can; says why.
    """

    def refuse(found: str) -> UsageError:
        return UsageError(f"request {request_id!r}: {found}. There is nothing to certify; see `takedown status`.")

    state = request_states(log.entries).get(request_id)
    if state is None:
        raise UsageError(f"request {request_id!r}: was never received. `takedown status` lists all requests.")
    if state.state not in STATES_CERTIFIED or state.run_id is None or state.decision is None:
        raise refuse(f"is {state.state}")
    decision = log.find("verified", request_id=request_id, run_id=state.run_id)
    if decision is None and state.decision in verify_bundle.ANSWERS:
        decision = log.needed(state.decision, request_id=request_id, run_id=state.run_id)
    if decision is None or decision.event.version is None:
        raise refuse("was taken out, but no measurement of it is on record")
    regressed = log.find("regressed", request_id=request_id)
    if regressed is not None and regressed.seq > decision.seq:
        raise refuse(f"came back after v{decision.event.version} (ledger entry {regressed.seq})")
    current, version = current_version(log.entries), decision.event.version
    path = ancestry(published_versions(log.entries), current)
    if version not in path:
        raise refuse(f"was answered on v{version}, but v{current} is in force, which was not made from it")
    after = [
        v for v in put_back(log.entries, current).values() if v > version and decision.event.kind != "verified"
    ]  # fmt: skip
    if after:
        raise refuse(f"was answered on v{version}; v{after[0]} put other texts back since, and its answer is older")
    if decision.event.data.get("evidence"):
        raise UsageError(
            f"request {request_id!r}: the entry that answers it ({decision.seq}) names other requests that its text "
            "resembles, and a certificate would give their ids away. An auditor can read it with `takedown log`."
        )
    path = path[path.index(version) :]
    begun = erased_requests(log.entries).get(request_id)
    if begun is not None and decision.event.kind == "verified":
        path = tuple(v for v in path if _published(log, v).seq < begun.seq)
    return _Case(state, decision, path, log.find("erased", request_id=request_id))


def _published(log: _Log, version: int) -> LedgerEntry:
    return log.needed("published" if version else "initialised", version=version)


def _hashes(proof: Sequence[bytes]) -> tuple[str, ...]:
    return tuple(base64.b64encode(node).decode() for node in proof)


def _checks(log: _Log, store: VersionStore, case: _Case, request_id: str) -> tuple[ProvenCheck, ...]:
    """The measurements of the text on the versions, each proven to be among those that the gate decided on.

    A text that was taken out was measured for every version since; another one only in the run that answered it.

    Raises:
        StoreDamaged: A version has none.
        UsageError: One is above the limit.
    """
    found = []
    roles = (*verify_bundle.TAKEN_OUT_NOW, "earlier") if case.excluded else verify_bundle.ANSWERS
    for version in case.path:
        run_id = _published(log, version).event.run_id
        if not case.excluded and run_id != case.decision.event.run_id:
            continue
        evaluation = recall(store.objects, log.needed("accepted", run_id=run_id), "evaluate", Evaluation)
        index = None if evaluation is None else find_check(evaluation, request_id, roles)
        if evaluation is None or index is None:
            raise StoreDamaged(f"v{version}: request {request_id!r} was not measured on it. Run `takedown verify`.")
        leaves = check_leaves(evaluation)
        proof = inclusion_proof([leaf_hash(leaf) for leaf in leaves], index)
        found.append(
            ProvenCheck(
                version=version,
                comparison=evaluation.comparisons[index],
                index=index,
                size=len(leaves),
                proof=_hashes(proof),
            )
        )
    if case.excluded:
        limit = Measured.model_validate(case.decision.event.data).limit
        for check in found:
            if (after := check.comparison.after.exact_memorisation) > limit + ROUNDING:
                raise UsageError(
                    f"request {request_id!r}: v{check.version} was measured at {after:.3f}, above the limit of "
                    f"{limit:.3f} that held when the text was taken out. There is nothing to certify until a later "
                    "version is below it."
                )
    return tuple(found)


def _used_entries(log: _Log, case: _Case, request_id: str) -> list[LedgerEntry]:
    """The entries that the certificate rests on, by rising number."""
    run_id = case.decision.event.run_id
    used = [
        _published(log, 0), log.needed("planned", run_id=run_id), case.decision,
        next(e for e in log.entries if e.event.kind == "received" and e.event.request_id == request_id),
    ]  # fmt: skip
    if (approved := _approval(log, case)) is not None:
        used.append(approved)
    for version in case.path:
        published = _published(log, version)
        used.append(published)
        if case.excluded or (version and published.event.run_id == run_id):
            used += [log.needed(kind, run_id=published.event.run_id) for kind in ("planned", "accepted")]
    used += _reworked(log, case, request_id).values()
    if case.erased is not None:
        used.append(case.erased)
    return sorted({entry.seq: entry for entry in used}.values(), key=lambda entry: entry.seq)


def _reworked(log: _Log, case: _Case, request_id: str) -> dict[int | None, LedgerEntry]:
    """The entries that say that a later step worked on the text again, by version."""
    of_request = (e for e in log.entries if e.event.kind == "reworked" and e.event.request_id == request_id)
    return {e.event.version: e for e in of_request if e.event.version in case.path[1:]} if case.excluded else {}


def _passages(store: VersionStore, entry: LedgerEntry, request_id: str) -> tuple[tuple[int, int, int], ...]:
    """Which passages of the text a version was made without, from its manifest."""
    version = entry.event.version or 0
    if store.manifest_digest(version) != entry.event.data.get("manifest"):
        raise StoreDamaged(f"v{version}: its manifest is not the one that was published. Run `takedown verify`.")
    memorised = store.manifest(version).report.get("memorised")
    rows = memorised.get(request_id) if isinstance(memorised, Mapping) else None
    if not rows:
        raise StoreDamaged(f"v{version}: its manifest names no passages of {request_id!r}. Run `takedown verify`.")
    return tuple((start, first, end) for start, first, end in rows)


def certify(workspace: Workspace, request_id: str, since: Path | None = None) -> Certificate:
    """Put together what can be certified of a request.

    Args:
        workspace: Where; only read.
        request_id: The request.
        since: An older checkpoint of this log, to be shown that the log was only added to since.

    Raises:
        UsageError: Nothing can: it waits, was refused, came back, was withdrawn, or the version is not in force. Or
            ``since`` cannot be read.
        StoreDamaged: The ledger or the evidence does not hold, or the log does not continue ``since``.
    """
    log, store = _read_log(workspace), VersionStore(workspace.versions)
    case = _case(log, request_id)
    checks = _checks(log, store, case, request_id)
    used = _used_entries(log, case, request_id)
    received = next(e for e in used if e.event.kind == "received")
    decision, version = case.decision, _published(log, case.path[0])
    measured, again = {check.version: check.comparison.after for check in checks}, _reworked(log, case, request_id)
    tree: dict[str, Any] = {
        "format": verify_bundle.FORMAT,
        "issued_at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "lineage": _published(log, 0).event.data.get("lineage"),
        "request": _request(log, workspace, case, received),
        "outcome": "excluded" if case.excluded else decision.event.kind,
        "state": case.state.state,
        **({"erased_at": log.at(case.erased)} if case.erased is not None else {}),
        "decided_at": log.at(decision),
        "decided_by": decision.event.actor,
        "version": _version(log, version),
        "current": case.path[-1],
        "later": [
            _later(log, number, measured.get(number), number in again).model_dump(mode="json")
            for number in case.path[1:]
        ],
        "passages": _passages(store, version, request_id) if case.excluded else (),
        "measured": decision.event.data if case.excluded else None,
        "answer": None if case.excluded else {name: decision.event.data.get(name) for name in Answered.model_fields},
        "plan": _plan(log, case),
        "gate": _gate(log, case),
        "checks": [check.model_dump(mode="json") for check in checks],
        "log": _proofs(log, used, since),
    }
    return Certificate.model_validate({**tree, "statement": verify_bundle.statement(tree)})


def _request(log: _Log, workspace: Workspace, case: _Case, received: LedgerEntry) -> dict[str, object]:
    """The request: the sender's words from the vault, confirmed, and what the log says of its arrival."""
    request_id = case.state.request_id
    if case.state.erased:
        title = rights_holder = ERASED
    else:
        request = open_vault(workspace).confirmed(request_id, received.event.data)
        title, rights_holder = request.title, request.rights_holder
    return {
        "request_id": request_id,
        "title": title,
        "rights_holder": rights_holder,
        "batch_id": received.event.data["batch_id"],
        "received_at": received.event.data["received_at"],
        "recorded_at": log.at(received),
        "commitment": received.event.data["commitment"],
        "record": received.event.data.get("record"),
    }


def _version(log: _Log, entry: LedgerEntry) -> dict[str, object]:
    """The version that the answer names."""
    return {
        "version": entry.event.version,
        **{name: entry.event.data.get(name) for name in ("root", "manifest", "signature", "parent")},
        "published_at": log.at(entry),
        "published_by": entry.event.actor,
    }


def _later(log: _Log, number: int, measured: TextScore | None, reworked: bool) -> LaterVersion:
    """A version made from it."""
    entry = _published(log, number)
    return LaterVersion(
        version=number,
        root=str(entry.event.data["root"]),
        published_at=log.at(entry),
        published_by=entry.event.actor,
        measured=measured,
        reworked=reworked,
    )


def _plan(log: _Log, case: _Case) -> dict[str, object]:
    """What was on record before anything was measured."""
    plan = log.needed("planned", run_id=case.decision.event.run_id)
    return {
        "run_id": plan.event.run_id,
        "planned_at": log.at(plan),
        "planned_by": plan.event.actor,
        **{name: plan.event.data.get(name) for name in ("limits", "settings", "code")},
    }


def _proofs(log: _Log, used: Sequence[LedgerEntry], since: Path | None) -> dict[str, object]:
    """The entries that the certificate rests on, each proven to be in the log, and the log's checkpoint."""
    hashes = [leaf_hash(leaf) for leaf in log.leaves]
    entries = [
        {"leaf": log.leaves[e.seq - 1].decode(), "proof": _hashes(inclusion_proof(hashes, e.seq - 1))} for e in used
    ]
    proofs: dict[str, object] = {"checkpoint": log.note, "vkey": log.vkey, "entries": entries}
    return proofs if since is None else {**proofs, "since": _continued(log, hashes, since)}


def _gate(log: _Log, case: _Case) -> dict[str, object] | None:
    if not case.excluded:
        return None
    accepted = log.needed("accepted", run_id=case.decision.event.run_id)
    named = {name: accepted.event.data.get(name) for name in ("checks", "reasons", "unchecked")}
    said: dict[str, object] = {"accepted_at": log.at(accepted), "accepted_by": accepted.event.actor, **named}
    if (entry := _approval(log, case)) is not None:
        said |= {"approved_at": log.at(entry), "approved_by": entry.event.actor}
    return said


def _approval(log: _Log, case: _Case) -> LedgerEntry | None:
    """The entry that approved the version; None where nobody was asked."""
    return log.find("approved", run_id=case.decision.event.run_id) if case.excluded else None


# --- writing ----------------------------------------------------------------------------------------------


def write_certificate(workspace: Workspace, request_id: str, folder: Path, since: Path | None = None) -> Certificate:
    """Write the certificate of a request into a fresh folder, checked by the program that comes with it.

    Args:
        workspace: Where; only read.
        request_id: The request.
        folder: Absent or empty.
        since: An older checkpoint of this log, see `certify`.

    Returns:
        What was written as ``certificate.json``.

    Raises:
        UsageError: The folder is not empty, or nothing can be certified, see `certify`.
        StoreDamaged: What the workspace holds gives no certificate that holds.
        NoSpace: The disk is full or read-only. Nothing is left behind.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder}: exists and is not empty. Name a new folder.")
    certificate = certify(workspace, request_id, since)
    files = {
        CERTIFICATE: canonical_json(certificate.as_json()) + b"\n",
        PAGE: render(certificate).encode(),
        "checkpoint": certificate.log.checkpoint.encode(),
        "log.pub": f"{certificate.log.vkey}\n".encode(),
        "model.pub": model_public_key(workspace.keys),
        SIGNATURE: VersionStore(workspace.versions).signature(certificate.version.version),
        "verify_bundle.py": Path(verify_bundle.__file__).read_bytes(),
    }
    with explained_space(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            for name, data in files.items():
                write_new(staging / name, data, mode=0o644)
            lines = verify_bundle.check_bundle(staging)
            if failed := [line.text for line in lines if line.verdict == "FAILED"]:
                raise StoreDamaged(
                    f"request {request_id!r}: its certificate would not hold: {'; '.join(failed)} Nothing was written; "
                    "run `takedown verify`."
                )
            staging.replace(folder)  # takes the place of an empty folder, too
            fsync_folder(folder.parent)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    return certificate


def render(certificate: Certificate) -> str:
    """The certificate as one printable HTML page that loads nothing and runs nothing."""
    environment = pages(decimal=decimal, moment=_moment)
    entries = [
        (verify_bundle.read_entry("entry", proven.leaf), proven, leaf_hash(proven.leaf.encode()).hex())
        for proven in certificate.log.entries
    ]
    leaves = [canonical_json(check.comparison.model_dump(mode="json")).decode() for check in certificate.checks]
    return environment.get_template("certificate.html").render(c=certificate, entries=entries, leaves=leaves)


def _moment(text: str) -> str:
    """A moment in UTC, to the second."""
    return datetime.fromisoformat(text).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
