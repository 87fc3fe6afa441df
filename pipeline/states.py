"""What the ledger's entries say: where each request stands, which version is in force, what it excludes.

In: entries. Out: plain records. Never: a file, a state that was stored: every one is derived from the events.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Literal

from pydantic import ValidationError

from pipeline.errors import NotAWorkspace, StoreDamaged
from pipeline.records import Event, LedgerEntry, Record

State = Literal[
    "waiting", "repeat", "folded", "empty", "not-memorised", "applied", "verified", "refused", "regressed",
    "countered", "reinstated", "withdrawn",
]  # fmt: skip

DECISIONS = ("repeat", "folded", "empty", "not-memorised", "applied", "refused")
"""Events with which a run answers a request; the state bears the same name."""
TO_DO = ("waiting", "refused", "regressed")
"""States that the next run works on."""
TAKEN_OUT = ("applied", "verified", "folded", "repeat", "countered")
"""States in which a version excludes the text. A countered one stays out until it is reinstated."""
RELEASED = ("countered", "withdrawn")
"""States from which a text can be put back."""

NEXT: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(DECISIONS, TO_DO),
    # From a repeat, or from not memorised: a reinstatement brought the text back, and its run took it out again.
    **dict.fromkeys(("applied", "folded"), (*TO_DO, "repeat", "not-memorised")),
    # From refused: a rollback to a version that excludes the text.
    "verified": ("applied", "folded", "regressed", "refused"),
    "regressed": ("applied", "verified", "folded", "repeat", "countered"),
    # From reinstated: a rollback to a version that leaves the text out still.
    "countered": (*TO_DO, "applied", "verified", "folded", "repeat", "reinstated"),
    "withdrawn": (
        *TO_DO, "applied", "verified", "folded", "repeat", "not-memorised", "empty", "countered", "reinstated",
    ),
    # From what is to be done: a rollback to the version that put the text back on purpose.
    "reinstated": (*RELEASED, "regressed", "refused"),
    "reopened": ("not-memorised",),
}  # fmt: skip
"""Event → states that it may follow. Its name is the state that it leads to; a reopened request is waiting again: the
version that it was answered on is not in force."""

OUT, IN = ("applied", "folded", "repeat"), ("reinstated", "regressed")
"""Events that say of a version, which they name, that it excludes a text, or that it holds it."""

AWAITING = "awaiting-approval"
"""Event of a run that the gate accepted and that nobody has decided on yet."""

HOLDS = {"hold": True, "released": False}
"""Events that put a request on legal hold and end that; its state stays."""
NOTED: dict[str, tuple[str, ...]] = {"not-reinstated": RELEASED, "reworked": TAKEN_OUT}
"""Event that leaves a state as it is → states that it may follow: putting the text back was refused, and a later step
worked on it again, though it was out."""

ERASURE = ("erasing", "erased")
"""Events around the destruction of a request's text and contact; its state stays. From the first on nothing may count
on the text, whatever of it is left."""

PUBLISHING = ("initialised", "published")
"""Events that acknowledge a version."""

DECIDED = ("accepted", "refused", "answered")
"""Events of a run (without a request id) that end it and name its evidence."""


class RequestState(Record):
    """Where a request stands.

    Attributes:
        request_id: The request.
        state: ``waiting``: received, nothing decided; ``refused``: the gate refused the last attempt, it is still to
            be done; ``applied``: a published version was made without it; ``verified``: and that version was measured
            below the limit; ``regressed``: it came back later and is still to be done; see `NEXT` for the others.
        decision: How the last run answered it: one of `DECISIONS`; None while none has.
        on_hold: Under legal hold: not worked on, and nothing that concerns it is destroyed.
        erased: Its text and contact were destroyed, or are being: nothing can be worked on or measured any more.
        batch_id: Batch that it arrived in.
        received_at: When, as the batch says.
        decided_at: When the state was reached; None while waiting.
        version: Version named by the decision: for ``applied`` the first one that excludes the text.
        reinstated_in: Version in which the text was put back; None where it was not, or was never taken out.
        run_id: Run that decided.
        commitment: Binds the entry to the text in the vault without showing it.
    """

    request_id: str
    state: State
    decision: str | None = None
    on_hold: bool = False
    erased: bool = False
    batch_id: str
    received_at: datetime
    decided_at: datetime | None = None
    version: int | None = None
    reinstated_in: int | None = None
    run_id: str | None = None
    commitment: str | None = None

    @property
    def to_do(self) -> bool:
        """Whether the next run works on it."""
        return self.state in TO_DO and not self.on_hold and not self.erased


def request_states(entries: Iterable[LedgerEntry]) -> dict[str, RequestState]:
    """Where every request stands, in the order received.

    Raises:
        StoreDamaged: An event that cannot follow what came before it.
    """
    return sound(*follow(entries))


def sound(states: dict[str, RequestState], faults: Sequence[tuple[LedgerEntry, str]]) -> dict[str, RequestState]:
    """The states, where there is no fault; see `follow`.

    Raises:
        StoreDamaged: There is one.
    """
    if faults:
        entry, fault = faults[0]
        raise StoreDamaged(f"ledger entry {entry.seq}: {fault}. Run `takedown verify`.")
    return states


def follow(
    entries: Iterable[LedgerEntry],
) -> tuple[dict[str, RequestState], list[tuple[LedgerEntry, str]]]:
    """Follow all requests through the ledger.

    Returns:
        Their states, and every entry that cannot follow what came before it, with the reason.
    """
    states: dict[str, RequestState] = {}
    faults = []
    for entry, result in moves(entries):
        if isinstance(result, str):
            faults.append((entry, result))
        else:
            states[result.request_id] = result
    return states, faults


def moves(entries: Iterable[LedgerEntry]) -> Iterator[tuple[LedgerEntry, RequestState | str]]:
    """Every entry of a request with the state that it leads to, or why it cannot follow what came before it."""
    states: dict[str, RequestState] = {}
    for entry in entries:
        name = entry.event.request_id
        if name is None:
            continue
        known = states.get(name)
        result = _received(entry) if entry.event.kind == "received" else _moved(known, entry)
        if entry.event.kind == "received" and known is not None and not isinstance(result, str):
            result = known
        if not isinstance(result, str):
            states[name] = result
        yield entry, result


def _received(entry: LedgerEntry) -> RequestState | str:
    fields = {key: entry.event.data.get(key) for key in ("batch_id", "received_at", "commitment")}
    try:
        return RequestState.model_validate({"request_id": entry.event.request_id, "state": "waiting", **fields})
    except ValidationError:
        return "'received' needs data.batch_id and data.received_at"


def _moved(known: RequestState | None, entry: LedgerEntry) -> RequestState | str:
    """The state after an event, or why it cannot be."""
    event = entry.event
    if event.kind not in (*NEXT, *HOLDS, *NOTED, *ERASURE):
        return f"{event.kind!r} is no event of a request"
    if known is None:
        return f"request {event.request_id!r} is {event.kind}, but no earlier entry received it"
    if event.kind in HOLDS:
        return known.model_copy(update={"on_hold": HOLDS[event.kind]})
    if event.kind in ERASURE:
        return known.model_copy(update={"erased": True})
    if known.state not in (NEXT | NOTED)[event.kind]:
        return f"request {event.request_id!r} is {event.kind}, but was {known.state} before"
    if event.kind in NOTED:
        return known
    changes: dict[str, object] = {"state": event.kind, "decided_at": entry.at}
    if event.kind in DECISIONS:
        changes |= {"decision": event.kind, "version": event.version, "run_id": event.run_id}
    elif event.kind == "countered" and known.state in TO_DO:
        changes["version"] = None  # what was not taken out, or came back, is excluded by no version
    elif event.kind == "reinstated":
        changes["reinstated_in"] = event.version
    elif event.kind == "reopened":
        changes |= {"state": "waiting", "decision": None, "version": None, "run_id": None, "decided_at": None}
    return known.model_copy(update=changes)


def current_version(entries: Sequence[LedgerEntry]) -> int:
    """The version that is in force: that of the latest ``initialised``, ``published`` or ``rolled-back`` event.

    Raises:
        NotAWorkspace: There is none: ``takedown init`` did not finish.
    """
    return in_force(entries)[0]


def in_force(entries: Sequence[LedgerEntry]) -> tuple[int, int]:
    """The version that is in force, and the number of the entry that put it there.

    Raises:
        NotAWorkspace: See `current_version`.
    """
    for entry in reversed(entries):
        if entry.event.kind in (*PUBLISHING, "rolled-back") and entry.event.version is not None:
            return entry.event.version, entry.seq
    raise NotAWorkspace("The ledger names no version: `takedown init` did not finish. Run it again.")


def published_versions(entries: Iterable[LedgerEntry]) -> dict[int, LedgerEntry]:
    """The entry that acknowledges each version, by rising version."""
    found = {
        e.event.version: e for e in entries if e.event.kind in PUBLISHING and e.event.version is not None
    }  # fmt: skip
    return dict(sorted(found.items()))


def purged_versions(entries: Iterable[LedgerEntry]) -> dict[int, LedgerEntry]:
    """Versions whose weights were destroyed, or are being destroyed, with the first entry that says so."""
    found: dict[int, LedgerEntry] = {}
    for entry in entries:
        if entry.event.kind in ("purging", "purged"):
            listed = entry.event.data.get("versions")
            for version in listed if isinstance(listed, list) else ():
                if isinstance(version, int):
                    found.setdefault(version, entry)
    return found


def unfinished_purge(entries: Iterable[LedgerEntry]) -> LedgerEntry | None:
    """The entry of a purge that was begun and not ended."""
    begun: LedgerEntry | None = None
    for entry in entries:
        if entry.event.kind in ("purging", "purged"):
            begun = entry if entry.event.kind == "purging" else None
    return begun


def erased_requests(entries: Iterable[LedgerEntry]) -> dict[str, LedgerEntry]:
    """Requests whose text was destroyed, or is being, with the first entry that says so."""
    found: dict[str, LedgerEntry] = {}
    for entry in entries:
        if entry.event.kind in ERASURE and entry.event.request_id is not None:
            found.setdefault(entry.event.request_id, entry)
    return found


def unfinished_erasures(entries: Sequence[LedgerEntry]) -> dict[str, LedgerEntry]:
    """Those of them whose erasure was begun and not ended."""
    ended = {e.event.request_id for e in entries if e.event.kind == "erased"}
    return {name: entry for name, entry in erased_requests(entries).items() if name not in ended}


def ancestry(published: Mapping[int, LedgerEntry], version: int) -> tuple[int, ...]:
    """The versions from v0 to this one, along the parents that the ledger names."""
    path = [version]
    while path[-1] in published:
        parent = published[path[-1]].event.data.get("parent")
        if not isinstance(parent, int) or parent >= path[-1]:  # versions only grow: no loop whatever is written there
            break
        path.append(parent)
    return tuple(reversed(path))


def last_words(entries: Sequence[LedgerEntry], version: int) -> dict[str, Event]:
    """For each request the event that decides whether a version holds its text, whatever its state is now.

    Of all that is said (`OUT`, `IN`) of the version and of those that it was made from, what is said of the newest
    counts, and of what is said of one version the last.
    """
    path = set(ancestry(published_versions(entries), version))
    found: dict[str, Event] = {}
    for entry in entries:
        event = entry.event
        if event.kind in OUT + IN and event.version in path and event.request_id is not None:
            known = found.get(event.request_id)
            if known is None or known.version is None or event.version >= known.version:
                found[event.request_id] = event
    return found


def taken_out(entries: Sequence[LedgerEntry], version: int) -> tuple[str, ...]:
    """Requests whose text is out of the weights of a version, whatever became of them since."""
    return tuple(name for name, event in last_words(entries, version).items() if event.kind in OUT)


def let_go_and_out(entries: Sequence[LedgerEntry], states: Mapping[str, RequestState]) -> frozenset[str]:
    """Requests that were withdrawn while their text is out of the version in force; it stays so until reinstated."""
    let_go = {name for name, s in states.items() if s.state == "withdrawn"}
    return frozenset(let_go.intersection(taken_out(entries, current_version(entries)))) if let_go else frozenset()


def excluded(entries: Sequence[LedgerEntry], version: int) -> dict[str, RequestState]:
    """Requests that a version is meant to exclude: their text is out of it, and they stand.

    Returns:
        Their states by id; ``version`` is the first one on the way to this version that excludes the text.
    """
    words = last_words(entries, version)
    return {
        n: s.model_copy(update={"version": words[n].version})
        for n, s in request_states(entries).items()
        if s.state in TAKEN_OUT and n in words and words[n].kind in OUT
    }


def put_back(entries: Sequence[LedgerEntry], version: int) -> dict[str, int]:
    """Requests whose text a version, or one that it was made from, put back on purpose, with that version."""
    words = last_words(entries, version).items()
    return {n: e.version for n, e in words if e.kind == "reinstated" and e.version is not None}


class Turn(Record):
    """What a rollback means for the requests.

    Attributes:
        brought_back: Taken out of the current version, and held by the other one.
        out_again: Came back by a rollback, still to be done, and taken out of the other one.
        taken_again: Reinstated in the current version, and taken out of the other one; with the event that led to the
            reinstatement, ``countered`` or ``withdrawn``.
        put_back: Put back in the other one on purpose, after a counter-notice or withdrawal that stands; with the
            version that did.
        reopened: Answered as not memorised on a version that the other one was not made from.
    """

    brought_back: tuple[str, ...]
    out_again: tuple[str, ...]
    taken_again: dict[str, str]
    put_back: dict[str, int]
    reopened: tuple[str, ...]


def turn(entries: Sequence[LedgerEntry], target: int) -> Turn:
    """What becomes of each request when another version is put in force."""
    states, out = request_states(entries), set(taken_out(entries, target))
    back = put_back(entries, target)
    returns = {n: v for n, v in back.items() if states[n].state in (*RELEASED, "regressed", "refused")}
    path = set(ancestry(published_versions(entries), target))
    released = {
        str(e.event.request_id): e.event.kind
        for e in entries
        if e.event.kind in RELEASED and e.event.data.get("cause") != "rollback"
    }
    came_back = {e.event.request_id: e.event for e in entries if e.event.kind == "regressed"}
    by_rollback = {str(n) for n, event in came_back.items() if event.data.get("cause") == "rollback"}
    return Turn(
        brought_back=tuple(sorted(excluded(entries, current_version(entries)).keys() - out - returns.keys())),
        out_again=tuple(sorted(n for n in out & by_rollback if states[n].state in ("regressed", "refused"))),
        taken_again={n: released[n] for n in sorted(out) if states[n].state == "reinstated"},
        put_back=returns,
        reopened=tuple(n for n, s in states.items() if s.state == "not-memorised" and s.version not in path),
    )


def stays_out(entries: Sequence[LedgerEntry], left_out: Sequence[int], reinstates: Iterable[str]) -> tuple[str, ...]:
    """Requests that a reinstatement must look at, because their text could come back with the one that is put back.

    Everything that the version in force excludes; and what was answered as not memorised when the text was out already,
    that is on a version with a step that is left out now. But for what was erased: there is nothing left to look for.
    """
    current = current_version(entries)
    path = set(ancestry(published_versions(entries), current))
    asked = {
        n
        for n, s in request_states(entries).items()
        if s.state == "not-memorised" and s.version in path and s.version >= min(left_out)
    }
    gone = set(reinstates) | erased_requests(entries).keys()
    return tuple(sorted((excluded(entries, current).keys() | asked) - gone))


def known_batches(entries: Iterable[LedgerEntry]) -> set[str]:
    """Ids of all batches of which a request was received."""
    return {str(e.event.data["batch_id"]) for e in entries if e.event.kind == "received" and "batch_id" in e.event.data}


def questions(entries: Iterable[LedgerEntry]) -> dict[str, LedgerEntry]:
    """The newest entry that asked for approval of each run."""
    return {str(e.event.run_id): e for e in entries if e.event.kind == AWAITING}


def approvals(entries: Iterable[LedgerEntry]) -> dict[str, LedgerEntry]:
    """The entry that approved what was asked last of each run; an answer to an earlier question is none to this one."""
    found: dict[str, LedgerEntry] = {}
    for entry in entries:
        if entry.event.kind == AWAITING:
            found.pop(str(entry.event.run_id), None)
        elif entry.event.kind == "approved":
            found.setdefault(str(entry.event.run_id), entry)
    return found


def decisions(entries: Iterable[LedgerEntry]) -> dict[str, LedgerEntry]:
    """The entry that decided each run, in order."""
    return {
        str(e.event.run_id): e
        for e in entries
        if e.event.kind in DECIDED and e.event.request_id is None and e.event.run_id is not None
    }
