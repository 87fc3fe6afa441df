"""Re-check everything that a workspace keeps as evidence.

In: a workspace. Out: every break, named. Never: a write, a lock, an exception for damaged content. A running publish
is seen like an interrupted one: objects, then a manifest, that the ledger does not name yet.

What it cannot see without a digest noted elsewhere (`Ledger.head`): a ledger cut after an entry together with the
manifests and vault records that came later, or rewritten from some point on with all digests computed anew.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import NotAWorkspace, StoreDamaged, TakedownError
from pipeline.ledger import DECISIONS, Ledger
from pipeline.records import Break, LedgerEntry, VersionManifest
from pipeline.vault import Vault
from pipeline.versions import TEMPORARY, StoreCheck, VersionStore, manifest_break
from pipeline.workspace import Workspace, open_workspace

_ACKNOWLEDGING = ("initialised", "published")


def verify(workspace: Workspace) -> list[Break]:
    """Check marker, ledger, manifests, lineage, every object and the vault against each other.

    Every object is hashed once, however many versions share it.

    Returns:
        All breaks, in that order; empty when everything holds.
    """
    store = VersionStore(workspace.versions)
    # Listed in the opposite order of writing, so that what a running publish adds meanwhile is not a false break.
    objects = store.object_files()
    numbers = store.numbers()
    entries, breaks = _check_ledger(workspace)
    manifests, found = _check_manifests(store, numbers, entries)
    breaks = _check_marker(workspace) + breaks + found + _check_lineage(manifests) + _check_requests(manifests, entries)
    reader = StoreCheck(store)
    for manifest in manifests.values():
        breaks += reader.content(manifest)
    breaks += _check_stray(store, objects, manifests, complete=len(manifests) == len(numbers))
    return breaks + _check_vault(workspace, entries)


def _check_marker(workspace: Workspace) -> list[Break]:
    try:
        open_workspace(workspace.root)
    except (NotAWorkspace, StoreDamaged, AttributeError, OSError) as error:  # AttributeError: JSON, but no object
        means = "The commands refuse this workspace."
        return [Break(where=workspace.marker.name, found=str(error), means=means)]
    return []


def _check_ledger(workspace: Workspace) -> tuple[tuple[LedgerEntry, ...], list[Break]]:
    try:
        with Ledger.open(workspace.ledger, read_only=True) as ledger:
            return ledger.examine()
    except TakedownError as error:
        means = "Nothing proves which version excludes which text."
        return (), [Break(where=workspace.ledger.name, found=str(error), means=means)]


def _check_manifests(
    store: VersionStore, numbers: tuple[int, ...], entries: tuple[LedgerEntry, ...]
) -> tuple[dict[int, VersionManifest], list[Break]]:
    """Compare the manifests with the entries that acknowledge them.

    Returns:
        Every manifest that can be read, by version, and the breaks.
    """
    breaks = []
    manifests = {}
    digests = {}
    for number in numbers:
        try:
            digests[number] = store.manifest_digest(number)
            manifests[number] = store.manifest(number)
        except StoreDamaged as error:
            breaks.append(manifest_break(number, error))
    named: set[int] = set()
    for entry in entries:
        event, where = entry.event, f"ledger entry {entry.seq}"
        if event.kind not in _ACKNOWLEDGING:
            continue
        version = event.version
        if version is None:
            breaks.append(Break(where=where, found=f"{event.kind} names no version", means="It proves nothing."))
            continue
        if version in named:
            found = f"{event.kind} names v{version}, which an earlier entry published already"
            breaks.append(Break(where=where, found=found, means="A version is published once."))
        named.add(version)
        if version not in numbers:
            means = f"v{version} was removed after it was published; it cannot be restored."
            breaks.append(Break(where=f"v{version}", found=f"has no manifest, but {where} published it", means=means))
            continue
        if version in digests and event.data.get("manifest") != digests[version]:
            found = f"the manifest has digest {digests[version]}, {where} says {event.data.get('manifest')}"
            means = f"The manifest of v{version} was changed or replaced after it was published."
            breaks.append(Break(where=f"v{version}", found=found, means=means))
        if version in manifests and event.data.get("root") != manifests[version].root:
            found = f"the manifest has root {manifests[version].root}, {where} says {event.data.get('root')}"
            breaks.append(Break(where=f"v{version}", found=found, means=f"v{version} is not what was published."))
    newest = max(named, default=-1)
    for number in numbers:
        if number not in named:
            means = (
                "A publish was interrupted or is still running, and the next run replaces it; or the newest ledger "
                "entries were removed. Run the interrupted command again, then verify again."
                if number > newest
                else "The ledger entry that published it was removed, or the manifest was put there by hand."
            )
            breaks.append(Break(where=f"v{number}", found="not acknowledged: no ledger entry names it", means=means))
    return manifests, breaks


def _check_lineage(manifests: dict[int, VersionManifest]) -> list[Break]:
    """Every version but v0 must come from an earlier one with the root that it names."""
    breaks = []
    means = "The lineage does not hold: nobody can say what this version was made from."
    for version, manifest in manifests.items():
        parent = manifest.parent
        if version == 0 or parent is None:
            if version or parent is not None or manifest.parent_root is not None:
                found = f"names parent {parent} with root {manifest.parent_root}; v0, and only v0, has none"
                breaks.append(Break(where=f"v{version}", found=found, means=means))
        elif not 0 <= parent < version:
            breaks.append(Break(where=f"v{version}", found=f"names v{parent} as its parent", means=means))
        elif parent not in manifests:
            found = f"its parent v{parent} has no manifest that can be read"
            breaks.append(Break(where=f"v{version}", found=found, means=means))
        elif manifests[parent].root != manifest.parent_root:
            found = f"names v{parent} with root {manifest.parent_root}, which has {manifests[parent].root}"
            breaks.append(Break(where=f"v{version}", found=found, means=means))
    return breaks


def _check_stray(
    store: VersionStore, objects: tuple[Path, ...], manifests: dict[int, VersionManifest], complete: bool
) -> list[Break]:
    """Find what no manifest names. Objects are left out while a manifest is unreadable: it might name them."""
    breaks = []
    if complete:
        named = {store.object_path(file.digest) for manifest in manifests.values() for file in manifest.files}
        means = "Left by an interrupted or running publish, or put there by hand; no version depends on it."
        breaks = [
            Break(where=store.name(path), found="unreferenced object", means=means)
            for path in objects
            if path not in named
        ]
    known = {store.objects, *(store.manifest_path(number) for number in store.numbers())}
    for path in sorted(store.folder.iterdir()) if store.folder.is_dir() else ():
        if path not in known and not path.name.startswith(TEMPORARY):
            means = "It was put there by hand; no version depends on it."
            where = store.name(path)
            breaks.append(Break(where=where, found="does not belong into the version store", means=means))
    return breaks


def _check_requests(manifests: dict[int, VersionManifest], entries: tuple[LedgerEntry, ...]) -> list[Break]:
    """What the ledger says of a request must agree with itself and with the version that it names."""
    breaks = []
    contradicts = "Ledger and version contradict each other."
    received: set[str | None] = set()
    for entry in entries:
        event, where = entry.event, f"ledger entry {entry.seq}"
        if event.kind == "received":
            received.add(event.request_id)
        elif event.kind in DECISIONS and event.request_id is not None and event.request_id not in received:
            found = f"request {event.request_id} is {event.kind}, but no earlier entry received it"
            breaks.append(Break(where=where, found=found, means="An entry was removed, or the order was changed."))
        if event.kind != "applied":
            continue
        if event.version is None:
            found = f"request {event.request_id} is applied, but no version is named"
            breaks.append(Break(where=where, found=found, means="Nobody can say which version first excludes it."))
        elif event.version in manifests and event.request_id not in manifests[event.version].requests:
            found = f"request {event.request_id} is applied in v{event.version}, whose manifest does not list it"
            breaks.append(Break(where=where, found=found, means=contradicts))
    for version, manifest in manifests.items():
        for request_id in manifest.requests:
            if request_id not in received:
                found = f"lists request {request_id}, which no ledger entry received"
                breaks.append(Break(where=f"v{version}", found=found, means=contradicts))
    return breaks


def _check_vault(workspace: Workspace, entries: tuple[LedgerEntry, ...]) -> list[Break]:
    """Every received request must have its record in the vault, with the text that the ledger committed to."""
    vault = Vault(workspace.vault)
    breaks = []
    received = {e.event.request_id: e.event for e in reversed(entries) if e.event.kind == "received"}
    lost = "Its text is lost or was exchanged: it can no longer be re-checked on new versions."
    for request_id, event in reversed(received.items()):
        where = f"request {request_id}"
        try:
            text = vault.get(str(request_id)).text
            commitment = vault.commitment(text)
        except StoreDamaged as error:
            breaks.append(Break(where=where, found=f"vault: {error}", means=lost))
        except OSError as error:
            means = "Its text was not checked. Run verify as the user who owns the vault."
            breaks.append(Break(where=where, found=f"vault: cannot be read ({error.strerror})", means=means))
        else:
            if event.data.get("commitment") not in (None, commitment):
                found = "its text in the vault, under the vault's key, is not the one that the ledger committed to"
                breaks.append(Break(where=where, found=found, means=lost))
    try:
        extra = [request_id for request_id in vault.ids() if request_id not in received]
    except (StoreDamaged, OSError) as error:
        extra = []
        if not breaks:
            means = "A record of the vault cannot be read; whose it is cannot be said."
            breaks.append(Break(where=workspace.vault.name, found=str(error), means=means))
    found = "is in the vault, but no ledger entry received it"
    means = "Intake was interrupted or is running, and submitting it again is safe; or ledger entries were removed."
    return breaks + [Break(where=f"request {request_id}", found=found, means=means) for request_id in extra]
