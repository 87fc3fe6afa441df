"""Move the current version back: an event, never a deletion.

In: a workspace and a version. Out: a ledger entry, and one for each request whose text comes back or goes out with it.
Never: text brought back, or reinstated text taken out again, without an override on record, or a version made current
that the store cannot give back.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.errors import Refused, UsageError
from pipeline.ledger import Ledger
from pipeline.records import Event, LedgerEntry, Record
from pipeline.states import (
    current_version,
    erased_requests,
    last_words,
    published_versions,
    purged_versions,
    turn,
)
from pipeline.versions import VersionStore
from pipeline.workspace import Workspace, writing


class Rollback(Record):
    """A rollback that was done.

    Attributes:
        left: Version that was current.
        version: Version that is current now.
        brought_back: Requests whose text the new current version does not exclude any more; the next run works on
            them again.
        out_again: Requests that had come back by an earlier rollback and that this version excludes.
        taken_again: Reinstated requests whose text this version excludes still; reinstating makes a new version.
        put_back: Requests that this version reinstates, after a rollback to one that excluded them.
        reopened: Requests that were answered as not memorised on a version that this one was not made from; they wait.
    """

    left: int
    version: int
    brought_back: tuple[str, ...]
    out_again: tuple[str, ...]
    taken_again: tuple[str, ...]
    put_back: tuple[str, ...]
    reopened: tuple[str, ...]


def roll_back(workspace: Workspace, version: int, actor: str, reason: str, override: bool = False) -> Rollback:
    """Make an earlier (or left) version the current one.

    Args:
        workspace: Where.
        version: The version to be in force.
        actor: Who does it.
        reason: Why, in words that may stay for ever: no names, no text of a request.
        override: Do it though removed text comes back, or reinstated text goes out again.

    Raises:
        UsageError: No such version, no reason, already current, or purged.
        Refused: Removed text would come back or reinstated text go out, and there is no override; or removed text would
            come back that was erased, whether there is one or not.
        StoreDamaged: The store cannot make this version again.
        WorkspaceBusy: Another process is writing.
    """
    if not reason.strip():
        raise UsageError("A rollback needs a reason: it stays on record. Give one with --reason.")
    with writing(workspace), Ledger.open(workspace.ledger) as ledger:
        entries = ledger.entries()
        left, known = current_version(entries), published_versions(entries)
        store = VersionStore(workspace.versions, known)
        if version not in known:
            raise UsageError(f"v{version}: was never published. `takedown versions` lists all.")
        if version == left:
            raise UsageError(f"v{version}: is the current version already. Nothing was changed.")
        if version in purged_versions(entries):
            raise UsageError(f"v{version}: its weights were purged. Choose a version that is still there.")
        turned = turn(entries, version)
        gone = sorted(set(turned.brought_back) & erased_requests(entries).keys())
        if gone:
            raise Refused(
                f"v{version}: still holds what was taken out for {', '.join(gone)}, whose text was erased since: no "
                "run could take it out again. Nothing was changed."
            )
        against = []
        if turned.brought_back:
            against.append(f"still holds what was taken out for {', '.join(turned.brought_back)}")
        if turned.taken_again:
            against.append(f"does not hold what was put back for {', '.join(turned.taken_again)}")
        if against and not override:
            raise Refused(
                f"v{version}: {'; '.join(against)}. Nothing was changed; to do it nevertheless, on record, add "
                "--override."
            )
        store.check_restores(store.manifest(version))
        again = _measured(entries, version, turned.out_again)
        data: dict[str, object] = {
            "left": left, "reason": reason, "override": override, "brought_back": list(turned.brought_back)
        }  # fmt: skip
        cause = {"cause": "rollback"}
        ledger.append(
            Event(kind="rolled-back", actor=actor, version=version, data=data),
            *(
                Event(kind="regressed", actor=actor, version=version, request_id=name, data=cause)
                for name in turned.brought_back
            ),
            # The weights are those that were measured: what was found on them holds again.
            *(event.model_copy(update={"actor": actor}) for event in again),
            # What led to the reinstatement stands again: it can be reinstated once more, in a new version.
            *(Event(kind=kind, actor=actor, request_id=name, data=cause) for name, kind in turned.taken_again.items()),
            *(
                Event(kind="reinstated", actor=actor, request_id=name, version=v, data=cause)
                for name, v in turned.put_back.items()
            ),
            *(Event(kind="reopened", actor=actor, request_id=name, data=cause) for name in turned.reopened),
        )
    return Rollback(
        left=left,
        version=version,
        brought_back=turned.brought_back,
        out_again=tuple(str(event.request_id) for event in again),
        taken_again=tuple(turned.taken_again),
        put_back=tuple(turned.put_back),
        reopened=turned.reopened,
    )


def _measured(entries: Sequence[LedgerEntry], version: int, requests: Sequence[str]) -> list[Event]:
    """What was measured of requests on the version that takes their text out of this one; repeats have nothing."""
    words = last_words(entries, version)
    found = {
        e.event.request_id: e.event
        for e in entries
        if e.event.kind == "verified"
        and e.event.request_id in requests
        and e.event.version == words[str(e.event.request_id)].version
    }
    return list(found.values())
