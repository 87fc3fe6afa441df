"""Put the text of a countered or withdrawn request back: which steps to leave out for that, and what speaks against it.

In: requests. Out: the plan of a run that makes a new version without the vectors of their steps. Never: an edited
version, a text brought back that another request still keeps out, a plan that the store cannot follow.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pipeline.dedupe import dedupe
from pipeline.discreet import discreet
from pipeline.errors import UsageError
from pipeline.files import explained_space
from pipeline.index import DedupeIndex
from pipeline.ledger import Ledger
from pipeline.records import Event, LedgerEntry, VersionManifest
from pipeline.references import boilerplate
from pipeline.runs import Plan, begin, open_run
from pipeline.states import (
    RELEASED,
    ancestry,
    current_version,
    decisions,
    erased_requests,
    excluded,
    published_versions,
    purged_versions,
    put_back,
    request_states,
    stays_out,
)
from pipeline.undo import left_out_of, memorised_in, recipe
from pipeline.vault import open_vault
from pipeline.versions import VersionStore
from pipeline.workspace import Workspace


def plan_reinstatement(workspace: Workspace, requests: Sequence[str], actor: str, reason: str) -> Plan | None:
    """Plan a run that puts texts back, and record the plan before anything is done.

    The same steps may have taken out texts of other requests, and later steps may have leaned on them: everything that
    stays out is screened again on what is left, and what came back is worked on again in the same run.

    Args:
        workspace: The workspace, locked for writing.
        requests: Ids of countered or withdrawn requests.
        actor: Who asked for it, for the ledger.
        reason: Why, in words that may stay for ever: no names, no text.

    Returns:
        The plan; None when the version in force was not made without these texts, so that nothing has to be done but to
        put the reinstatement on record, which this does.

    Raises:
        UsageError: See `check_reinstatement`.
        NoSpace: The disk is full or read-only.
    """
    chosen = sorted(set(requests))
    with Ledger.open(workspace.ledger) as ledger:
        entries = ledger.entries()
        if (begun := unfinished(workspace, entries, chosen)) is not None:
            return begun
        left_out = check_reinstatement(workspace, entries, chosen, reason)
        if not left_out:
            data: dict[str, object] = {"reason": reason}
            ledger.append(*(Event(kind="reinstated", actor=actor, request_id=name, data=data) for name in chosen))
            return None
        return begin(workspace, ledger, actor, stays_out(entries, left_out, chosen), chosen, left_out)


def unfinished(workspace: Workspace, entries: Sequence[LedgerEntry], requests: Sequence[str]) -> Plan | None:
    """The plan of a reinstatement of just these requests that was put on record, but not cleaned up behind."""
    decided = decisions(entries)
    for folder in sorted(workspace.runs.glob("run-*")):
        if folder.name in decided and (folder / "candidate").is_dir():
            plan = open_run(workspace.root, folder.name).plan
            if plan.reinstates == tuple(sorted(set(requests))):
                return plan
    return None


def check_reinstatement(
    workspace: Workspace, entries: Sequence[LedgerEntry], requests: Sequence[str], reason: str
) -> tuple[int, ...]:
    """Everything that speaks against a reinstatement, all at once.

    Returns:
        The versions whose steps are left out, newest first; none where none was made without the texts.

    Raises:
        UsageError: No reason; a request is unknown, erased, on hold or in another state; its text is that of others,
            too; its step took out what is withdrawn, erased or on hold; or the weights of its step were purged.
        StoreDamaged: A manifest is not the one that the ledger names.
    """
    if not reason.strip():
        raise UsageError("A reinstatement needs a reason: it stays on record. Give one with --reason.")
    _stop(_problems(requests, entries))
    left_out, shared = steps_to_leave_out(workspace, entries, requests)
    # With what was erased nothing can be compared any more.
    stay = excluded(entries, current_version(entries)).keys() - set(requests) - erased_requests(entries).keys()
    _stop(_shared_steps(shared, entries, requests) + _kept_out(workspace, requests, stay))
    return left_out


def _stop(problems: Sequence[str]) -> None:
    if problems:
        raise UsageError("\n  ".join(["Nothing was changed.", *problems]))


def steps_to_leave_out(
    workspace: Workspace, entries: Sequence[LedgerEntry], requests: Sequence[str]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The versions whose steps are left out to put texts back, newest first, and all requests of these steps.

    Raises:
        UsageError: Their weights were purged.
        StoreDamaged: A manifest is not the one that the ledger names.
    """
    parent, known = current_version(entries), published_versions(entries)
    store = VersionStore(workspace.versions, known)
    manifests = {v: store.manifest(v) for v in ancestry(known, parent)}
    left_out = tuple(sorted({s for name in requests for s in steps_of(manifests, name)}, reverse=True))
    gone = sorted(recipe(store.manifest, parent, left_out).keys() & purged_versions(entries).keys())
    if gone:
        listed = ", ".join(f"v{version}" for version in gone)
        raise UsageError(
            f"{', '.join(requests)}: the weights of {listed} were purged, so what the step changed is not known any "
            "more. Nothing was changed."
        )
    return left_out, tuple(sorted({name for step in left_out for name in memorised_in(manifests[step])}))


def steps_of(manifests: Mapping[int, VersionManifest], request_id: str) -> tuple[int, ...]:
    """The versions whose steps took a request's text out and were not left out since; newest first.

    Args:
        manifests: From v0 to the version in force, each made from the one before.
        request_id: The request.
    """
    already = {step for manifest in manifests.values() for step in left_out_of(manifest)}
    return tuple(
        v for v, m in sorted(manifests.items(), reverse=True) if v not in already and request_id in memorised_in(m)
    )  # fmt: skip


def _problems(chosen: Iterable[str], entries: Sequence[LedgerEntry]) -> list[str]:
    """What speaks against each request by itself."""
    problems, states = [], request_states(entries)
    back = put_back(entries, current_version(entries))
    for name in chosen:
        state = states.get(name)
        if state is None:
            problems.append(f"{name!r}: no such request. `takedown status` lists all.")
        elif state.erased:
            problems.append(f"{name}: its text was erased, so nobody could measure whether it came back.")
        elif state.on_hold:
            problems.append(f"{name}: is on hold. Release it first.")
        elif name in back:
            problems.append(f"{name}: was put back in v{back[name]} already.")
        elif state.state not in RELEASED:
            problems.append(
                f"{name}: is {state.state}; only what was countered or withdrawn is reinstated. Record that first with "
                "`takedown counter` or `takedown withdraw`."
            )
    return problems


def _shared_steps(shared: Iterable[str], entries: Sequence[LedgerEntry], requests: Sequence[str]) -> list[str]:
    """Requests of the same steps that would come back unasked, or that no run may work on."""
    states, problems = request_states(entries), []
    for name in sorted(set(shared) - set(requests)):
        if states[name].state == "withdrawn":
            problems.append(f"{name}: was taken out in the same step and is withdrawn. Reinstate it with them.")
        elif states[name].erased:
            problems.append(
                f"{name}: was taken out in the same step and its text was erased: it would come back, and no run could "
                "take it out again."
            )
        elif states[name].on_hold:
            problems.append(f"{name}: was taken out in the same step and is on hold. Release it first.")
    return problems


def _kept_out(workspace: Workspace, chosen: Sequence[str], out: Iterable[str]) -> list[str]:
    """Requests whose text is, by the rule for repeats, also that of others which stand."""
    return discreet(open_vault(workspace), "reinstate", lambda: _compared(workspace, chosen, out))


def _compared(workspace: Workspace, chosen: Sequence[str], out: Iterable[str]) -> list[str]:
    vault = open_vault(workspace)
    with explained_space(workspace.runs):
        workspace.runs.mkdir(exist_ok=True)
        with (
            # Where what a killed process leaves is removed by the next run.
            tempfile.TemporaryDirectory(prefix=".check-", dir=workspace.runs) as folder,
            DedupeIndex.open(Path(folder)) as index,
        ):
            index.add_many((name, vault.get(name).text) for name in out)
            decisions = dedupe(
                [vault.get(name) for name in chosen], index, workspace.settings().dedupe, boilerplate(workspace)
            )
    others = {d.request_id: [e.request_id for e in d.evidence if e.request_id not in chosen] for d in decisions}
    return [
        f"{d.request_id}: its text is out for {', '.join(others[d.request_id])}, too. Reinstate those with it."
        for d in decisions
        if d.verdict == "repeat"
    ]
