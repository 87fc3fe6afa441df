"""The reading verbs: history, proof and reports. None of them writes to the workspace, waits for a lock or needs torch.

Exit 0 fine · 1 the evidence says no · 2 wrong use.
"""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from flows.deadlines import (
    SHOWN,
    deadline_words,
    settings_if_readable,
    settings_with_clocks,
    show_deadlines,
    span,
    told_present,
)
from flows.overlaps import show_overlaps
from flows.progress import bars
from flows.terminal import (
    TIME,
    Json,
    err,
    megabytes,
    number_of,
    opened,
    out,
    outside,
    say,
    show_json,
    show_table,
    table,
)
from pipeline.approval import waiting
from pipeline.certificate import write_certificate
from pipeline.clocks import Standing, standing
from pipeline.diff import VersionDiff
from pipeline.diff import diff as compare_versions
from pipeline.digests import prove_tensor
from pipeline.display import plain, plural
from pipeline.erase import erased_notes
from pipeline.errors import StoreDamaged, UsageError
from pipeline.export import EVENT_COLUMNS, REQUEST_COLUMNS, event_rows, request_rows, to_csv
from pipeline.files import write_atomic
from pipeline.history import (
    acknowledged_versions,
    decision_of,
    lineage_view,
    read_entries,
    version_status,
    version_views,
)
from pipeline.keys import log_vkey
from pipeline.records import LedgerEntry, VersionManifest
from pipeline.rekey import rekey_notes
from pipeline.report import render
from pipeline.runlog import log_file, read_events, stage_seconds
from pipeline.states import (
    TAKEN_OUT,
    RequestState,
    current_version,
    excluded,
    published_versions,
    purged_versions,
    put_back,
    request_states,
)
from pipeline.storecheck import Depth
from pipeline.undo import left_out_of, reworked_in
from pipeline.verify import index_notes, key_notes, seal_notes
from pipeline.verify import verify as find_breaks
from pipeline.versions import VersionStore
from pipeline.workspace import Workspace

reading = typer.Typer(rich_markup_mode=None)

VERSION = re.compile("v?[0-9]{1,9}")
"""How versions are called; where a request has such an id, the version is meant with --tensor."""

SOUND = {
    Depth.QUICK: "Everything is there and signed: ledger, checkpoints, manifests; no content was re-read.",
    Depth.FULL: "Everything matches: ledger, checkpoints, manifests, every stored byte, signatures, index, vault.",
    Depth.DEEP: "Everything matches, and every version was made again from the store, tensor by tensor.",
}


def checked_entries(workspace: Workspace) -> tuple[LedgerEntry, ...]:
    """All ledger entries; whoever may not read the public key is told that nobody's signature was checked.

    Raises:
        StoreDamaged: The chain does not hold, or the entries are not those that the newest checkpoint signs.
    """
    entries = read_entries(workspace)
    try:
        log_vkey(workspace.keys)
    except UsageError as error:
        err.print(Text(f"takedown: {plain(str(error), 2000)} Whose entries these are was not checked."), soft_wrap=True)
    return entries


# --- state and history ------------------------------------------------------------------------------------


@reading.command()
def status(
    context: typer.Context,
    fail_overdue: Annotated[
        bool, typer.Option("--fail-overdue", help="Exit 1 where a deadline has passed; for monitoring.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Requests and their state, what waits and for how long, and what must be done by when.

    Deadlines are set in takedown.toml under [deadlines]; what is overdue comes first.

    Example: takedown -w ws status; takedown -w ws status --fail-overdue --json
    """
    workspace = opened(context)
    entries = checked_entries(workspace)
    states, current = request_states(entries), current_version(entries)
    held = [run.run_id for run in waiting(workspace, entries)]
    settings = settings_with_clocks(workspace) if fail_overdue else settings_if_readable(workspace)
    now = told_present(entries)
    found = standing(entries, settings, now)
    if as_json:
        counts = Counter(s.state for s in states.values())
        queue = [name for name, s in states.items() if s.to_do]
        show_json({"current": current, "requests": list(states.values()), "undecided": held, "at": now.isoformat(),
                   "counts": dict(counts), "queue": queue, "oldest_waiting": found.oldest,
                   "deadlines": list(found.deadlines), "postdated": found.postdated})  # fmt: skip
    else:
        show_status(states, current, found, now)
        for run_id in held:
            say(f"{run_id} waits for approval; see takedown review.")
    if fail_overdue and found.overdue:
        raise typer.Exit(1)


def show_status(states: Mapping[str, RequestState], current: int, found: Standing, now: datetime) -> None:
    """The version in force, counts, deadlines, and requests: those to be done first, then the newest."""
    say(f"Current version: v{current}")
    if states:
        counts = Counter(s.state for s in states.values()).most_common()
        say(f"{plural(len(states), 'request')}: {', '.join(f'{count:,} {state}' for state, count in counts)}")
    show_deadlines(found, now)
    queue = [s for s in states.values() if s.to_do]
    others = [s for s in states.values() if not s.to_do]
    listed = list(states.values()) if len(states) <= SHOWN else [*queue, *reversed(others)][:SHOWN]
    rows = [
        (
            s.request_id,
            state_words(s),
            s.batch_id,
            s.received_at.strftime(TIME),
            f"v{s.version}" if s.state in TAKEN_OUT else "",
        )
        for s in listed
    ]
    out.print(table("Requests", ("request", "state", "batch", "received", "excluded since"), rows))
    if len(listed) < len(states):
        say(f"and {len(states) - len(listed):,} more; --json has all.")
    if found.oldest is None:
        say("Nothing waits.")
        return
    say(f"{len(queue):,} waiting. The oldest, {plain(found.oldest.request_id)}, for {span(now - found.oldest.since)}.")


def state_words(state: RequestState) -> str:
    """A state with the answer that led to it, where it has another name, a hold, and an erasure."""
    answer = f" ({state.decision})" if state.decision not in (None, state.state, "applied") else ""
    if state.reinstated_in is not None and state.state == "reinstated":
        answer = f" in v{state.reinstated_in}"
    return f"{state.state}{answer}{', on hold' if state.on_hold else ''}{', erased' if state.erased else ''}"


@reading.command()
def log(context: typer.Context, as_json: Json = False) -> None:
    """The ledger: every event, oldest first, and the newest signed checkpoint.

    Keep copies of the checkpoint (the file `checkpoint` of the workspace) elsewhere: with one, anybody can tell later
    whether history before it was rewritten.

    Example: takedown -w ws log
    """
    workspace = opened(context)
    entries = checked_entries(workspace)
    if as_json:
        show_json(list(entries))
        return
    rows = [
        (
            e.seq,
            e.at.strftime(TIME),
            e.event.kind,
            e.event.actor,
            e.event.request_id,
            "" if e.event.version is None else f"v{e.event.version}",
            e.event.run_id,
        )
        for e in entries
    ]
    show_table("Ledger", ("#", "at", "event", "actor", "request", "version", "run"), rows)
    say(workspace.checkpoint.read_text(encoding="utf-8").rstrip() if workspace.checkpoint.is_file() else "")


def manifest_of(workspace: Workspace, entries: tuple[LedgerEntry, ...], name: str) -> VersionManifest:
    """The manifest of a published version.

    Raises:
        UsageError: There is no such version.
    """
    known = list(published_versions(entries))
    try:
        number = number_of(name)
    except UsageError:
        number = -1
    if number not in known:
        raise UsageError(f"{plain(name)}: no such request or version; there are v{known[0]} to v{known[-1]}.")
    return VersionStore(workspace.versions, published_versions(entries)).manifest(number)


def there(entries: tuple[LedgerEntry, ...], manifest: VersionManifest) -> None:
    """Refuse a version whose weights are gone.

    Raises:
        UsageError: They were purged; says by whom and when.
    """
    entry = purged_versions(entries).get(manifest.version)
    if entry is not None:
        raise UsageError(
            f"v{manifest.version}: its weights were purged on {entry.at.strftime(TIME)} by {plain(entry.event.actor)}; "
            "manifest and ledger still prove what it was."
        )


@reading.command()
def show(
    context: typer.Context,
    name: str,
    tensor: Annotated[str | None, typer.Option("--tensor", help="Prove one tensor of a version (RFC 6962).")] = None,
    as_json: Json = False,
) -> None:
    """One version (v3), one request with the evidence of its answer, or one run with its log.

    With --tensor: that this tensor is in the version's root, checkable without the other tensors.

    Example: takedown -w ws show v1; takedown -w ws show TD-1; takedown -w ws show run-0123456789ab; takedown -w ws
    show v1 --tensor lm_head.weight
    """
    workspace = opened(context)
    entries = checked_entries(workspace)
    states = request_states(entries)
    if tensor is not None:
        if name in states and not VERSION.fullmatch(name):
            raise UsageError(
                f"{plain(name)}: is a request; tensors are proven to be in a version. Name the version, for instance "
                f"v{current_version(entries)}, the one in force; `takedown versions` lists all."
            )
        show_tensor(workspace, manifest_of(workspace, entries, name), tensor, as_json)
        return
    if name in states:
        events = [e for e in entries if e.event.request_id == name]
        try:
            decision = decision_of(workspace, states[name], entries)
        except StoreDamaged as error:  # the ledger's answer stands without it
            decision = None
            err.print(Text(f"takedown: its evidence cannot be shown: {plain(str(error), 2000)}"), soft_wrap=True)
        now = told_present(entries)
        due = standing(events, settings_if_readable(workspace), now).deadlines
        if as_json:
            show_json({"state": states[name], "events": events, "deduplication": decision, "deadlines": due})
            return
        show_request(states[name], events)
        for deadline in due:
            say(f"  {deadline_words(deadline, now)}")
        show_overlaps([decision] if decision else [])
        return
    if of_run := [e for e in entries if e.event.run_id == name]:
        show_run(workspace, name, of_run, as_json)
        return
    manifest = manifest_of(workspace, entries, name)
    entry = published_versions(entries)[manifest.version]
    if as_json:
        show_json({"status": version_status(entries, manifest.version), "manifest": manifest, "entry": entry})
        return
    show_version(workspace, entries, manifest, entry)


def show_tensor(workspace: Workspace, manifest: VersionManifest, name: str, as_json: bool) -> None:
    """The proof that a tensor is in a version's root."""
    proof = prove_tensor(VersionStore(workspace.versions).tensors(manifest), name)
    if proof is None:
        raise UsageError(f"v{manifest.version}: has no tensor {plain(name)}. `takedown diff` lists those that changed.")
    hashes = [base64.b64encode(h).decode() for h in proof.proof]
    if as_json:
        show_json({"version": manifest.version, "root": manifest.root, "leaf": proof.leaf.decode(),
                   "index": proof.index, "size": proof.size, "proof": hashes})  # fmt: skip
        return
    say(f"v{manifest.version}  {manifest.root}\nleaf {proof.index} of {proof.size}: {proof.leaf.decode()}")
    for line in hashes:
        say(f"  {line}")


def show_request(state: RequestState, events: list[LedgerEntry]) -> None:
    """A request: where it stands, then every event."""
    since = f", excluded since v{state.version}" if state.state in TAKEN_OUT else ""
    say(f"{state.request_id}: {state_words(state)}{since}  (batch {state.batch_id})")
    for e in events:
        version = f"  v{e.event.version}" if e.event.version is not None else ""
        say(f"  {e.at.strftime(TIME)}  {e.event.kind}{version}  by {plain(e.event.actor)}  (ledger entry {e.seq})")
        for key, value in e.event.data.items():
            say(f"    {key}: {plain(json.dumps(value), 200)}")


def show_run(workspace: Workspace, run_id: str, entries: list[LedgerEntry], as_json: bool) -> None:
    """A run: what the ledger says of it, where its log lies, how long its stages took."""
    path = log_file(workspace, run_id)
    seconds = stage_seconds(read_events(path)) if path else {}
    if as_json:
        show_json({"run": run_id, "entries": entries, "log": path, "seconds": seconds})
        return
    say(run_id)
    for e in entries:
        version = f"  v{e.event.version}" if e.event.version is not None else ""
        request = f"  {e.event.request_id}" if e.event.request_id is not None else ""
        say(f"  {e.at.strftime(TIME)}  {e.event.kind}{request}{version}  by {plain(e.event.actor)}  (entry {e.seq})")
    if seconds:
        say("  " + ", ".join(f"{stage} {took:.1f} s" for stage, took in seconds.items() if "/" not in stage))
    say(f"  log: {path}" if path else "  log: none is kept")


def show_version(
    workspace: Workspace, entries: tuple[LedgerEntry, ...], manifest: VersionManifest, entry: LedgerEntry
) -> None:
    """A version: what it is, what it was made from, what it changed, how it is kept."""
    store = VersionStore(workspace.versions)
    say(f"v{manifest.version}  {manifest.root}  ({version_status(entries, manifest.version)})")
    parent = f"v{manifest.parent}  {manifest.parent_root}" if manifest.parent is not None else "none"
    made = f"{manifest.created_at.strftime(TIME)} by {manifest.run_id or 'init'} ({plain(entry.event.actor)})"
    say(f"  made {made}, parent {parent}")
    say(f"  excludes first: {', '.join(manifest.requests) or 'nothing'}")
    say(f"  excludes altogether: {', '.join(excluded(entries, manifest.version)) or 'nothing'}")
    if left_out := left_out_of(manifest):
        back = [name for name, number in put_back(entries, manifest.version).items() if number == manifest.version]
        say(f"  puts back: {', '.join(back)}, leaving out what {', '.join(f'v{n}' for n in left_out)} changed")
    if again := reworked_in(manifest):
        say(f"  works again on: {', '.join(again)}")
    for key in ("alpha", "selected", "changed", "total"):
        if key in manifest.report:
            say(f"  {key}: {manifest.report[key]}")
    rows = []
    for f in manifest.files:
        paths = store.objects.paths(f.digest)
        kept = "purged" if not paths else "whole" if len(paths) == 1 else f"{len(paths) - 1} deltas"
        rows.append((f.path, f"{f.size:,}", kept, f"{paths[-1].stat().st_size:,}" if paths else "", f.digest))
    out.print(table("Files", ("file", "bytes", "kept as", "stored bytes", "digest"), rows))


@reading.command()
def versions(context: typer.Context, as_json: Json = False) -> None:
    """All versions and what they exclude.

    Example: takedown -w ws versions
    """
    workspace = opened(context)
    entries = checked_entries(workspace)
    views = version_views(acknowledged_versions(workspace, entries), entries)
    if as_json:
        show_json(list(views))
        return
    rows = [(f"v{v.version}", v.status, v.created_at.strftime(TIME),
             f"puts back {', '.join(v.puts_back)}" if v.puts_back else ", ".join(v.requests),
             f"{v.changed:,}" if v.changed is not None else "", v.root[12:24]) for v in views]  # fmt: skip
    show_table("Versions", ("version", "status", "made", "excludes first", "entries changed", "root"), rows)


@reading.command("first-version")
def first_version(context: typer.Context, request: str, as_json: Json = False) -> None:
    """The first version that excludes a request. Exit 1 when none that is in force does.

    Example: takedown -w ws first-version TD-1
    """
    workspace = opened(context)
    entries = checked_entries(workspace)
    states = request_states(entries)
    if request not in states:
        raise UsageError(f"{plain(request)}: no such request. `takedown status` lists all.")
    state, current = states[request], current_version(entries)
    found = excluded(entries, current).get(request)
    store = VersionStore(workspace.versions, published_versions(entries))
    manifest = store.manifest(found.version) if found and found.version is not None else None
    if as_json:
        show_json({"request_id": request, "state": state.state, "version": manifest.version if manifest else None,
                   "root": manifest.root if manifest else None})  # fmt: skip
    elif manifest:
        say(f"v{manifest.version}  {manifest.root}")
    else:
        say(f"None: no version that v{current} is made of excludes {request}, which is {state_words(state)}.")
    if manifest is None:
        raise typer.Exit(1)


@reading.command("diff")
def difference(context: typer.Context, first: str, second: str, as_json: Json = False) -> None:
    """What differs between two versions: tensors, entries, norms, settings, measurements.

    Example: takedown -w ws diff v0 v1
    """
    workspace = opened(context)
    entries = checked_entries(workspace)
    old, new = (manifest_of(workspace, entries, name) for name in (first, second))
    for manifest in (old, new):
        there(entries, manifest)
    with bars(err, "reading"):
        found = compare_versions(VersionStore(workspace.versions), old, new, entries)
    show_json(found) if as_json else show_diff(found)


def show_diff(found: VersionDiff) -> None:
    """A comparison: tensors by falling number of changed entries, then everything else that differs."""
    rows = [
        (t.name, t.dtype, f"{t.changed:,}", f"{t.changed / max(1, t.entries):.2%}",
         *map(_short, (t.norm, t.relative, t.largest)))
        for t in sorted(found.tensors, key=lambda t: -t.changed)
    ]  # fmt: skip
    title = f"v{found.first} → v{found.second}: {found.changed:,} of {found.entries:,} entries differ"
    if found.same_weights:
        say(f"v{found.first} and v{found.second} have the same weights.")
    else:
        columns = ("tensor", "dtype", "entries changed", "share", "norm", "relative", "largest")
        out.print(table(title, columns, rows))
    for label, names in (("only in the first", found.only_first), ("only in the second", found.only_second),
                         ("other files that differ", found.files), (f"out of v{found.second} only", found.requests),
                         (f"out of v{found.first} only", found.back)):  # fmt: skip
        if names:
            say(f"{label}: {', '.join(map(plain, names))}")
    for label, pairs in (("settings", found.settings), ("measured", found.report)):
        if pairs:
            changes = [(name, _value(old), _value(new)) for name, (old, new) in pairs.items()]
            out.print(table(label, ("what", f"v{found.first}", f"v{found.second}"), changes))


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _value(value: object) -> str:
    return "" if value is None else plain(json.dumps(value), 60)


# --- weights ----------------------------------------------------------------------------------------------


@reading.command()
def checkout(context: typer.Context, version: str, folder: Path) -> None:
    """Write a version as a model folder that from_pretrained loads, bit-exact and signed.

    The folder also gets model.sig, an OpenSSF Model Signing bundle made when the version was published. Anybody can
    check it with the public tool: model_signing verify key FOLDER --signature FOLDER/model.sig --public_key
    WS/keys/model.pub

    Example: takedown -w ws checkout v1 ./served
    """
    workspace = opened(context)
    entries = checked_entries(workspace)
    manifest = manifest_of(workspace, entries, version)
    there(entries, manifest)
    outside(workspace, folder)
    with bars(err, "writing"):
        VersionStore(workspace.versions, published_versions(entries)).restore(manifest.version, folder, sign=True)
    say(f"Wrote v{manifest.version} to {folder}\n{manifest.root}")


# --- proof ------------------------------------------------------------------------------------------------


@reading.command()
def verify(
    context: typer.Context,
    quick: Annotated[bool, typer.Option("--quick", help="Names, sizes and signatures only; reads no content.")] = False,
    deep: Annotated[bool, typer.Option("--deep", help="Also make every version again from the store.")] = False,
    checkpoint: Annotated[
        list[Path] | None, typer.Option("--checkpoint", help="A checkpoint kept elsewhere; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Re-check everything that is stored; print every break and what it means. Exit 1 if there is one.

    A missing private key is no break, for a copy is checked without it; a note on standard error says so.

    Example: takedown -w ws verify && echo sound; takedown -w ws verify --deep --checkpoint /media/kept/checkpoint
    """
    if quick and deep:
        raise UsageError("--quick and --deep exclude each other. Give one of them, or neither.")
    depth = Depth.QUICK if quick else Depth.DEEP if deep else Depth.FULL
    workspace = opened(context)
    with bars(err, "verify"):
        breaks = find_breaks(workspace, depth, checkpoint or ())
    erased = erased_notes(read_entries(workspace)) if not breaks else ()
    told = (*key_notes(workspace), *rekey_notes(workspace), *seal_notes(workspace, depth), *index_notes(workspace))
    for note in (*told, *erased):
        err.print(Text(f"Note: {plain(note, 2000)}"), soft_wrap=True)
    if as_json:
        show_json(breaks)
    elif breaks:
        rows = [(b.where, b.found, b.means) for b in breaks]
        title = "1 break" if len(breaks) == 1 else f"{len(breaks)} breaks"
        out.print(table(title, ("where", "found", "means"), rows, limit=2000))
    else:
        say(SOUND[depth])
    if breaks:
        raise typer.Exit(1)


@reading.command()
def certificate(
    context: typer.Context,
    request: str,
    folder: Annotated[Path, typer.Option("--out", help="New folder for the certificate and its proof.")],
    since: Annotated[
        Path | None,
        typer.Option("--since", help="A checkpoint kept earlier: prove that the log was only added to since."),
    ] = None,
    as_json: Json = False,
) -> None:
    """What was done about a request and measured, with proof that needs none of this software.

    It certifies a process and a measurement, never absence. Check it anywhere: python verify_bundle.py FOLDER

    Example: takedown -w ws certificate TD-1 --out ./TD-1; takedown -w ws certificate TD-1 --out ./TD-1-again
    --since ./TD-1/checkpoint
    """
    workspace = opened(context)
    made = write_certificate(workspace, request, outside(workspace, folder), since)
    if as_json:
        show_json(made.as_json())
        return
    say(f"Wrote {folder}\nCheck it: python {folder}/verify_bundle.py {folder}")


@reading.command()
def export(
    context: typer.Context,
    folder: Annotated[Path | None, typer.Option("--out", help="New or empty folder; default reports/export.")] = None,
    as_json: Json = False,
) -> None:
    """The register as CSV and JSON: requests and events, without texts and contacts.

    Cells that a spreadsheet would run as a formula get an apostrophe in front.

    Example: takedown -w ws export --out ./register
    """
    workspace = opened(context)
    entries = checked_entries(workspace)
    requests, events = request_rows(workspace, entries), event_rows(entries)
    if as_json:
        show_json({"requests": requests, "events": events})
        return
    target = outside(workspace, folder or workspace.register)
    target.mkdir(parents=True, exist_ok=True)
    for name, columns, rows in (("requests", REQUEST_COLUMNS, requests), ("events", EVENT_COLUMNS, events)):
        # With a byte order mark, without which spreadsheets take UTF-8 for something else.
        write_atomic(target / f"{name}.csv", to_csv(columns, rows).encode("utf-8-sig"))
        write_atomic(target / f"{name}.json", (json.dumps(rows, indent=2, ensure_ascii=True) + "\n").encode())
    say(f"Wrote {len(requests)} requests and {len(events)} events to {target} (CSV and JSON)")


@reading.command()
def report(
    context: typer.Context,
    file: Annotated[Path | None, typer.Option("--out", help="File to write; default reports/report.html.")] = None,
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page about the whole lineage.

    Example: takedown -w ws report --out takedowns.html
    """
    workspace = opened(context)
    with bars(err, "verify"):
        breaks = find_breaks(workspace)
    view = lineage_view(workspace, breaks)
    if as_json:
        show_json(view)
        return
    path = outside(workspace, file or workspace.report_page)
    if file is None:
        workspace.reports.mkdir(exist_ok=True)  # an empty folder does not survive every copy of a workspace
    try:
        write_atomic(path, render(view).encode())
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror}). Name a file in an existing folder.") from error
    say(f"Wrote {path}")


def storage_line(workspace: Workspace, entries: tuple[LedgerEntry, ...]) -> str:
    """How much the store holds against whole copies of every version."""
    store = VersionStore(workspace.versions)
    gone = purged_versions(entries)
    manifests: list[Any] = [m for m in acknowledged_versions(workspace, entries) if m.version not in gone]
    whole = sum(f.size for m in manifests for f in m.files)
    kept = sum(path.stat().st_size for path in store.objects.files())
    return f"{len(manifests)} versions in {megabytes(kept)}; whole copies would take {megabytes(whole)}."
