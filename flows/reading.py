"""The reading verbs: history, proof and reports. None of them writes to the workspace, waits for a lock or needs torch.

Exit 0 fine · 1 the evidence says no · 2 wrong use.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from flows.deadlines import (
    deadline_words,
    settings_if_readable,
    told_present,
)
from flows.overlaps import show_overlaps
from flows.progress import bars
from flows.terminal import (
    TIME,
    Json,
    checked_entries,
    err,
    number_of,
    opened,
    out,
    outside,
    say,
    show_json,
    show_table,
    state_words,
    table,
)
from pipeline.clocks import standing
from pipeline.diff import VersionDiff
from pipeline.diff import diff as compare_versions
from pipeline.digests import prove_tensor
from pipeline.display import plain
from pipeline.errors import StoreDamaged, UsageError
from pipeline.history import (
    acknowledged_versions,
    decision_of,
    version_status,
    version_views,
)
from pipeline.records import LedgerEntry, VersionManifest
from pipeline.runlog import log_file, read_events, stage_seconds
from pipeline.states import (
    TAKEN_OUT,
    RequestState,
    current_version,
    excluded,
    let_go_and_out,
    published_versions,
    purged_versions,
    put_back,
    request_states,
)
from pipeline.undo import left_out_of, reworked_in
from pipeline.versions import VersionStore
from pipeline.workspace import Workspace

verbs = typer.Typer(rich_markup_mode=None)

VERSION = re.compile("v?[0-9]{1,9}")
"""How versions are called; where a request has such an id, the version is meant with --tensor."""


# --- state and history ------------------------------------------------------------------------------------


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


@verbs.command()
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
        show_request(states[name], events, name in let_go_and_out(entries, states))
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


def show_request(state: RequestState, events: list[LedgerEntry], still_out: bool) -> None:
    """A request: where it stands, then every event."""
    since = f", excluded since v{state.version}" if state.state in TAKEN_OUT or still_out else ""
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


@verbs.command()
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


@verbs.command("first-version")
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


@verbs.command("diff")
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


@verbs.command()
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
