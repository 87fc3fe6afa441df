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
    NEXT,
    ancestry,
    brought_back,
    current_version,
    published_versions,
    purged_versions,
    put_back,
    request_states,
    taken_again,
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
    """

    left: int
    version: int
    brought_back: tuple[str, ...]
    out_again: tuple[str, ...]
    taken_again: tuple[str, ...]
    put_back: tuple[str, ...]


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
        Refused: Removed text would come back or reinstated text go out, and there is no override.
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
        back, out = brought_back(entries, version), taken_again(entries, version)
        if back and not override:
            raise Refused(
                f"v{version}: still holds what was taken out for {', '.join(back)}. Nothing was changed; to bring it "
                "back nevertheless, on record, add --override."
            )
        if out and not override:
            raise Refused(
                f"v{version}: does not hold what was put back for {', '.join(out)}. Nothing was changed; to take it "
                "out again nevertheless, on record, add --override."
            )
        store.check_restores(store.manifest(version))
        again, states = _out_again(entries, version), request_states(entries)
        returns = {n: v for n, v in put_back(entries, version).items() if states[n].state in NEXT["reinstated"]}
        data: dict[str, object] = {"left": left, "reason": reason, "override": override, "brought_back": list(back)}
        ledger.append(
            Event(kind="rolled-back", actor=actor, version=version, data=data),
            *(
                Event(kind="regressed", actor=actor, version=version, request_id=name, data={"cause": "rollback"})
                for name in back
            ),
            *(
                # The weights are those that were measured: what was found on them holds again.
                Event(
                    kind="verified",
                    actor=actor,
                    version=event.version,
                    request_id=event.request_id,
                    run_id=event.run_id,
                    data=event.data,
                )
                for event in again
            ),
            *(
                # What led to the reinstatement stands again: it can be reinstated once more, in a new version.
                Event(kind=kind, actor=actor, request_id=name, data={"cause": "rollback"})
                for name, kind in out.items()
            ),
            *(
                Event(kind="reinstated", actor=actor, request_id=name, version=v, data={"cause": "rollback"})
                for name, v in returns.items()
            ),
        )
    return Rollback(
        left=left,
        version=version,
        brought_back=back,
        out_again=tuple(str(event.request_id) for event in again),
        taken_again=tuple(out),
        put_back=tuple(returns),
    )


def _out_again(entries: Sequence[LedgerEntry], version: int) -> list[Event]:
    """The measurements of requests that came back by an earlier rollback and that this version excludes after all."""
    path = ancestry(published_versions(entries), version)
    states, back = request_states(entries), put_back(entries, version)
    came_back = {
        e.event.request_id: states[e.event.request_id].version
        for e in entries
        if e.event.request_id in states
        and e.event.request_id not in back
        and e.event.kind == "regressed"
        and e.at == states[e.event.request_id].decided_at
        and e.event.data.get("cause") == "rollback"
        and states[e.event.request_id].state == "regressed"
    }
    found = {
        e.event.request_id: e.event
        for e in entries
        if e.event.kind == "verified"
        and e.event.request_id in came_back
        and e.event.version == came_back[e.event.request_id]
        and e.event.version in path
    }
    return list(found.values())
