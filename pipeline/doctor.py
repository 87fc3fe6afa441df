"""The doctor: what somebody on call looks at before and after trouble, one finding a line, each with its remedy.

In: a workspace and the machine it lies on. Out: findings. Never: a repair, a lock, a change that stays: what the file
system can do is tried in a temporary folder of the workspace, which is removed again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import InvalidRequirement, Requirement

from pipeline.display import plain, size_words
from pipeline.dropfolder import REASON
from pipeline.errors import InvalidInput, TakedownError
from pipeline.files import TEMPORARY, fsync_folder, place, put_in_place, write_atomic
from pipeline.keys import LOG_KEY, MODEL_KEY, load_log_key, load_model_key
from pipeline.preflight import Estimate, shortages
from pipeline.records import LedgerEntry, Record
from pipeline.resources import Room, lock_holder
from pipeline.runlog import read_events
from pipeline.runs import undecided, unfinished_runs
from pipeline.settings import Settings
from pipeline.states import approvals, questions, request_states
from pipeline.storecheck import Depth
from pipeline.vault import open_vault
from pipeline.verify import verify
from pipeline.workspace import Workspace, lock_note, read_entries

OLDEST_PYTHON = (3, 11)
AHEAD = timedelta(minutes=5)
"""The ledger's last time may be so far ahead of this machine's clock: several machines write to one workspace."""
LONG = timedelta(hours=24)
"""A lock that is held longer is worth a look; the longest step measured took minutes."""
UNDECIDED = timedelta(days=7)
"""A run that waits longer for approval may have been forgotten."""
SPARE_DISK = 1 << 30
"""Bytes below which a file system that only holds Prefect's database or temporary files is worth a look."""

UNKNOWN = "this system does not say"
SEEN = ", as far as is seen from here"
"""Of locks: those of other containers, and of other machines, are not."""

Status = Literal["ok", "warning", "problem"]


class Finding(Record):
    """What one check found.

    Attributes:
        status: ``problem``: a run will fail or must not be trusted; ``warning``: worth a look.
        what: What was looked at.
        found: What was found.
        remedy: What to do about it; empty where it is ok.
    """

    status: Status
    what: str
    found: str
    remedy: str = ""


Check = Callable[[], list[Finding]]


def checks(workspace: Workspace, now: datetime) -> dict[str, Check]:
    """Every check that needs nothing but the workspace, by name, in the order shown."""
    return {
        "Python": check_python,
        "packages": check_packages,
        "settings": lambda: check_settings(workspace),
        "permissions": lambda: check_permissions(workspace),
        "keys": lambda: check_keys(workspace),
        "file system": lambda: check_file_system(workspace.root),
        "evidence": lambda: check_evidence(workspace),
        "write lock": lambda: check_lock(workspace, now),
        "runs": lambda: check_runs(workspace, read_entries(workspace), now),
        "inbox": lambda: check_inbox(workspace),
        "clock": lambda: check_clock(read_entries(workspace), now),
    }


def examined(what: str, check: Check) -> list[Finding]:
    """The findings of a check; one that fails is a finding itself, and holds up no other."""
    try:
        return check()
    except TakedownError as error:
        return [
            Finding(status="problem", what=what, found=str(error).splitlines()[0], remedy="takedown verify says more.")
        ]
    except OSError as error:
        found = f"{error.filename or 'a file'}: {error.strerror}"
        return [Finding(status="problem", what=what, found=found, remedy="Check the path and its permissions.")]


# --- software ---------------------------------------------------------------------------------------------


def check_python(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> list[Finding]:
    """The interpreter."""
    told = ".".join(map(str, version))
    if version[:2] < OLDEST_PYTHON:
        return [Finding(status="problem", what="Python", found=told, remedy="Install Python 3.11 or newer.")]
    return [Finding(status="ok", what="Python", found=told)]


def check_packages(
    requires: Callable[[str], Sequence[str] | None] = metadata.requires,
    version: Callable[[str], str] = metadata.version,
) -> list[Finding]:
    """The packages that this release pins: installed, and in range."""
    try:
        needed = requires("takedown-pipeline") or ()
    except metadata.PackageNotFoundError:
        found = "takedown-pipeline is not installed, so nobody says which versions it needs"
        return [Finding(status="warning", what="packages", found=found, remedy="Install it with pip.")]
    fine, findings = list[str](), list[Finding]()
    for line in needed:
        try:
            wanted = Requirement(line)
        except InvalidRequirement:
            continue
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            has = version(wanted.name)
        except metadata.PackageNotFoundError:
            has = ""
        if has and wanted.specifier.contains(has, prereleases=True):
            fine.append(f"{wanted.name} {has}")
            continue
        remedy = f"pip install '{wanted.name}{wanted.specifier}'"
        found = f"{has or 'missing'}, needed is {wanted.specifier or 'any'}"
        findings.append(Finding(status="problem", what=f"package {wanted.name}", found=found, remedy=remedy))
    return [*findings, Finding(status="ok", what="packages", found=", ".join(fine))]


# --- the workspace ----------------------------------------------------------------------------------------


def check_settings(workspace: Workspace) -> list[Finding]:
    """``takedown.toml`` can be read."""
    try:
        settings = workspace.settings()
    except TakedownError as error:
        found = "; ".join(str(error).splitlines())
        return [Finding(status="problem", what="settings", found=found, remedy="Correct takedown.toml.")]
    told = f"method {settings.unlearn.method}, approval {settings.approval}"
    return [Finding(status="ok", what="settings", found=told)]


def check_permissions(workspace: Workspace) -> list[Finding]:
    """Texts and private keys are their owner's alone, and that is who runs this."""
    try:
        key_file = workspace.root / workspace.settings().vault.key_file
    except TakedownError:
        key_file = workspace.keys / "vault.key"
    paths = [workspace.vault, *sorted(workspace.vault.glob("*")), workspace.keys / LOG_KEY, workspace.keys / MODEL_KEY]
    findings = []
    for path in (*paths, key_file):
        try:
            found = path.stat()
        except FileNotFoundError:
            continue  # an auditor's copy has no private keys; a missing text is named by `takedown verify`
        if open_to := stat.S_IMODE(found.st_mode) & 0o077:
            mode = "0700" if path.is_dir() else "0600"
            told = f"{path}: is open to others (mode {stat.S_IMODE(found.st_mode):04o}, {open_to:03o} too much)"
            findings.append(Finding(status="problem", what="permissions", found=told, remedy=f"chmod {mode} {path}"))
        elif found.st_uid != os.geteuid():
            told = f"{path}: belongs to user {found.st_uid}, this is {os.geteuid()}"
            remedy = "Run takedown as its owner, or hand the workspace over with chown."
            findings.append(Finding(status="warning", what="permissions", found=told, remedy=remedy))
    return findings or [Finding(status="ok", what="permissions", found="vault and keys are their owner's alone")]


def check_keys(workspace: Workspace) -> list[Finding]:
    """What a run signs with, and what opens the vault: there, belonging together, and fitting what is kept."""

    def opens() -> None:
        try:
            vault = open_vault(workspace)
        except InvalidInput:  # which key is not known; a finding of its own
            return
        vault.master()
        next(vault.requests(), None)  # one is enough to see another key

    tried: dict[str, Callable[[], object]] = {
        "the log's": lambda: load_log_key(workspace.keys), "the models'": lambda: load_model_key(workspace.keys),
        "the vault's": opens,
    }  # fmt: skip
    findings = []
    for what, attempt in tried.items():
        try:
            attempt()
        except TakedownError as error:
            remedy = "Restore it from a backup; without it nothing can be added here."
            told = f"{what}: {str(error).splitlines()[0]}"
            findings.append(Finding(status="problem", what="keys", found=told, remedy=remedy))
    return findings or [Finding(status="ok", what="keys", found=f"{', '.join(tried)} serve")]


def check_file_system(root: Path) -> list[Finding]:
    """What the store needs of the file system, tried: durable writes, names that are never taken over, locks."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}doctor-", dir=root))
    except OSError as error:
        told = f"{root}: cannot be written ({error.strerror})"
        remedy = "Free some space, or make it writable for this user."
        return [Finding(status="problem", what="file system", found=told, remedy=remedy)]
    findings = []
    try:
        for name, trial in TRIALS.items():
            try:
                told = trial(folder)
            except OSError as error:
                told = error.strerror or "fails"
            if told:
                remedy = "Put the workspace on a local file system (ext4, xfs, btrfs), or on a network one that has it."
                findings.append(Finding(status="problem", what=f"file system: {name}", found=told, remedy=remedy))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return findings or [Finding(status="ok", what="file system", found=", ".join(TRIALS))]


def _fsync(folder: Path) -> str:
    write_atomic(folder / "synced", b"1")
    fsync_folder(folder)
    return "" if (folder / "synced").read_bytes() == b"1" else "what was written reads back differently"


def _no_overwrite(folder: Path) -> str:
    (folder / "first").write_bytes(b"1")
    (folder / "second").write_bytes(b"2")
    place(folder / "first", folder / "placed")
    try:
        place(folder / "second", folder / "placed")
    except FileExistsError:
        return "" if (folder / "placed").read_bytes() == b"1" else "a name that was taken has other bytes"
    return "a name that was taken was given away"


def _replace(folder: Path) -> str:
    (folder / "old").write_bytes(b"1")
    (folder / "new").write_bytes(b"2")
    put_in_place(folder / "new", folder / "old")
    return "" if (folder / "old").read_bytes() == b"2" else "a file was not replaced"


def _locks(folder: Path) -> str:
    fds = [os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600) for _ in range(2)]
    try:
        fcntl.flock(fds[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(fds[1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return ""
            raise
        return "two writers get the same lock"
    finally:
        for fd in fds:
            os.close(fd)


TRIALS: Mapping[str, Callable[[Path], str]] = {
    "durable writes": _fsync,
    "names are never taken over": _no_overwrite,
    "files are replaced whole": _replace,
    "locks": _locks,
}
"""What is tried; each says what is wrong, or nothing."""


def check_evidence(workspace: Workspace) -> list[Finding]:
    """What ``takedown verify --quick`` finds."""
    breaks = verify(workspace, Depth.QUICK)
    if not breaks:
        return [Finding(status="ok", what="evidence", found="ledger, checkpoint, seal and manifests hold (quick)")]
    remedy = "takedown verify names every break; restore from a backup what it names."
    return [Finding(status="problem", what="evidence", found=f"{b.where}: {b.found}", remedy=remedy) for b in breaks]


def check_lock(workspace: Workspace, now: datetime) -> list[Finding]:
    """Who writes, and since when. The kernel frees a dead process's lock, so that only a living one can be stuck."""
    held = lock_holder(workspace.root / ".lock")
    if held is None:
        return [Finding(status="ok", what="write lock", found=f"unknown: {UNKNOWN} who holds it")]
    if not held:
        return [Finding(status="ok", what="write lock", found=f"free{SEEN}")]
    who, since = lock_note(workspace)
    if since is not None and now - since > LONG:
        remedy = "If it does not work any more, end that process; the next run continues."
        told = f"held for {(now - since).total_seconds() / 3600:,.0f} hours by {who}"
        return [Finding(status="warning", what="write lock", found=told, remedy=remedy)]
    return [Finding(status="ok", what="write lock", found=f"held by {who}")]


def check_runs(workspace: Workspace, entries: Sequence[LedgerEntry], now: datetime) -> list[Finding]:
    """Runs that were begun and not ended while nobody works on them, and decisions that nobody takes."""
    states = request_states(entries)
    asked, approved = {run_id: e.at for run_id, e in questions(entries).items()}, set(approvals(entries))
    held = {plan.run_id for plan in undecided(workspace, entries)}  # not what was overtaken: the next run removes it
    busy, findings = lock_holder(workspace.root / ".lock"), []
    for run_id in sorted(asked.keys() & held):
        if run_id in approved and not busy:
            told = f"{run_id}: was approved and is not published"
            remedy = "takedown run publishes it."
            findings.append(Finding(status="warning", what="runs", found=told, remedy=remedy))
        elif run_id not in approved and now - asked[run_id] > UNDECIDED:
            told = f"{run_id}: waits for approval since {asked[run_id]:%Y-%m-%d}"
            remedy = "takedown review; then approve or refuse it."
            findings.append(Finding(status="warning", what="runs", found=told, remedy=remedy))
    if not busy:
        for run_id in unfinished_runs(workspace, entries):
            last = next((e for e in reversed(read_events(workspace.runs / run_id / "log.jsonl")) if "event" in e), {})
            when = f", last heard of at {plain(str(last.get('at', '')))}" if last else ""
            nobody = f", and nobody works on it{SEEN}" if busy is False else f"; {UNKNOWN} whether somebody works on it"
            told = f"{run_id}: was begun and not ended{nobody}{when}"
            remedy = "takedown run continues it; its log says what stopped it."
            findings.append(Finding(status="warning", what="runs", found=told, remedy=remedy))
    waiting = sum(s.to_do for s in states.values())
    return findings or [Finding(status="ok", what="runs", found=f"none is stuck; {waiting} requests wait")]


def check_inbox(workspace: Workspace) -> list[Finding]:
    """Files that were set aside because they are no valid batches."""
    rejected = sorted(p.name for p in (workspace.inbox / "rejected").glob("*") if not p.name.endswith(REASON))
    if rejected:
        told = f"{len(rejected)} set aside: {', '.join(plain(name) for name in rejected[:5])}"
        remedy = f"Read the reason beside it ({REASON}), correct the file, move it back to inbox/; or remove it."
        return [Finding(status="warning", what="inbox", found=told, remedy=remedy)]
    return [Finding(status="ok", what="inbox", found="nothing was set aside")]


def check_clock(entries: Sequence[LedgerEntry], now: datetime) -> list[Finding]:
    """The last event must not lie in the future."""
    last = max((e.at for e in entries), default=now)
    if last - now > AHEAD:
        told = f"{now.astimezone(UTC):%Y-%m-%d %H:%M}Z, but the ledger's last event is of {last:%Y-%m-%d %H:%M}Z"
        remedy = "Set this machine's clock (NTP) before anything is written."
        return [Finding(status="problem", what="clock", found=told, remedy=remedy)]
    return [Finding(status="ok", what="clock", found=f"{now.astimezone(UTC):%Y-%m-%d %H:%M}Z")]


# --- room -------------------------------------------------------------------------------------------------


def check_device(settings: Settings) -> list[Finding]:
    """What the settings resolve to."""
    name = settings.runtime.device
    if name == "cpu":
        return [Finding(status="ok", what="device", found="cpu")]
    import torch  # takes seconds

    from pipeline.models import pick_device

    device = pick_device(name)
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device.type, False) or (
        device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    ):
        told = f"{name}: is not there"
        remedy = 'Set runtime.device = "auto" or "cpu", or repair the driver.'
        return [Finding(status="problem", what="device", found=told, remedy=remedy)]
    return [Finding(status="ok", what="device", found=f"{device} (set: {name})")]


def check_room(found: Estimate, program_bytes: int) -> list[Finding]:
    """Memory and disk against what the next step needs.

    Args:
        found: The estimate.
        program_bytes: What a new process takes beside it.
    """
    peak = found.need.peak
    need = peak.model_copy(update={"memory_bytes": peak.memory_bytes + program_bytes})
    memory, disk = Room(found.memory_bytes, found.memory_source), Room(found.disk_bytes, "disk")
    short = shortages(need, memory, found.need.disk_bytes, disk)
    if short:
        return [Finding(status="problem", what=p.where, found=p.found, remedy=p.remedy) for p in short]
    left = "unknown" if memory.nbytes is None else f"{size_words(memory.nbytes)} left ({memory.source})"
    free = "unknown" if disk.nbytes is None else f"{size_words(disk.nbytes)} free"
    return [
        Finding(status="ok", what="memory", found=f"{left}; {need.stage} needs {size_words(need.memory_bytes)}"),
        Finding(status="ok", what="disk", found=f"{free}; the next step needs {size_words(found.need.disk_bytes)}"),
    ]


def check_places(places: Mapping[str, Room]) -> list[Finding]:
    """Room where temporary files and Prefect's database lie."""
    findings = []
    for name, room in places.items():
        if room.nbytes is None:
            told, status, remedy = "unknown", "ok", ""
        elif room.nbytes < SPARE_DISK:
            told, status = f"{size_words(room.nbytes)} free at {room.source}", "warning"
            remedy = "Free some space there, or name another place."
        else:
            told, status, remedy = f"{size_words(room.nbytes)} free at {room.source}", "ok", ""
        findings.append(Finding(status=status, what=f"disk: {name}", found=told, remedy=remedy))
    return findings
