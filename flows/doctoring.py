"""`takedown doctor`: what somebody on call looks at first, in one table; and what the next step will need.

Exit 0 fine, warnings included · 1 a problem · 2 wrong use.
"""

from __future__ import annotations

import json
import os
import tempfile
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path

import typer
from rich.text import Text

from flows.environment import prefect_home, served_at, server_answers
from flows.terminal import Json, err, opened, out, show_json, table
from pipeline.display import plain, size_words
from pipeline.doctor import Finding, check_device, check_places, check_room, checks, examined
from pipeline.errors import TakedownError
from pipeline.estimate import PROGRAM_BYTES
from pipeline.patience import is_locked
from pipeline.preflight import Estimate, estimate
from pipeline.resources import free_disk
from pipeline.runs import reusable_bytes
from pipeline.settings import Settings
from pipeline.workspace import Workspace, read_entries

verbs = typer.Typer(rich_markup_mode=None)


@verbs.command()
def doctor(context: typer.Context, as_json: Json = False) -> None:
    """Look at everything that a run needs, and at what runs left: software, room, permissions, evidence, locks, runs.

    Changes nothing. Each line says what was found and what to do about it. Exit 1 where there is a problem.

    Example: takedown -w ws doctor
    """
    workspace = opened(context)
    findings = [f for what, check in checks(workspace, datetime.now(UTC)).items() for f in examined(what, check)]
    needed: Estimate | None = None
    if (settings := _settings(workspace)) is not None:
        findings += examined("device", lambda: check_device(settings))
        try:
            entries = read_entries(workspace)
            needed = estimate(workspace, entries, reusable_bytes(workspace, entries))
            findings += check_room(needed, PROGRAM_BYTES)
        except (TakedownError, OSError) as error:
            told = str(error).splitlines()[0]
            findings.append(Finding(status="problem", what="estimate", found=told, remedy="takedown verify says more."))
    home = Path(os.environ.get("PREFECT_HOME") or prefect_home(workspace.root))
    places = {"temporary files": free_disk(Path(tempfile.gettempdir())), "Prefect": free_disk(home)}
    findings += check_places(places)
    findings += check_prefect({"PREFECT_API_URL": os.environ.get("PREFECT_API_URL", ""),
                               "takedown serve": served_at(workspace.root)})  # fmt: skip
    findings += examined("flow runs", lambda: check_flows(workspace))
    bad = any(finding.status == "problem" for finding in findings)
    if as_json:
        show_json({"sound": not bad, "findings": findings, "estimate": needed})
    else:
        rows = [(f.status, f.what, f.found, f.remedy) for f in findings]
        out.print(table("Doctor", ("status", "what", "found", "remedy"), rows, limit=500))
        if needed is not None:
            show_estimate(needed)
    if bad:
        err.print(Text("takedown: there are problems; a run may fail."), soft_wrap=True)
        raise typer.Exit(1)


def _settings(workspace: Workspace) -> Settings | None:
    """The settings; None where they cannot be read, which is a finding of its own: of defaults nothing is told."""
    try:
        return workspace.settings()
    except (TakedownError, OSError):
        return None


def show_estimate(needed: Estimate) -> None:
    """What each stage of the next step needs."""
    known = needed.seconds
    rows = [(s.stage, size_words(s.memory_bytes), f"{known[s.stage]:,.0f} s" if s.stage in known else "unknown")
            for s in needed.need.stages]  # fmt: skip
    learned = "no run is recorded"
    if needed.runs:
        learned = f"time: median of {needed.runs} recorded runs, {sum(known.values()):,.0f} s with all stages"
    title = (
        f"Estimate for a step from v{needed.version}, beside {size_words(PROGRAM_BYTES)} for the program ({learned})"
    )
    out.print(table(title, ("stage", "memory", "time"), rows))


def check_prefect(addresses: Mapping[str, str]) -> list[Finding]:
    """Whether the servers that are named answer, and in which version.

    Args:
        addresses: API addresses by who names them; empty where nobody does.
    """
    findings = []
    for name, address in addresses.items():
        if not address:
            continue
        shown = plain(address.rpartition("@")[2])  # no password
        if server_answers(address):
            told = f"answers at {shown}, version {_server_version(address)}"
            findings.append(Finding(status="ok", what=f"Prefect ({name})", found=told))
        else:
            status, remedy = "problem", "Start the server, or unset PREFECT_API_URL; a run embeds its own otherwise."
            if name != "PREFECT_API_URL":
                status, remedy = "warning", "It ended; start takedown serve again, if it is to serve."
            told = f"does not answer at {shown}"
            findings.append(Finding.model_validate({"status": status, "what": f"Prefect ({name})", "found": told,
                                                    "remedy": remedy}))  # fmt: skip
    return findings or [Finding(status="ok", what="Prefect", found="no server is named; a run embeds its own")]


def _server_version(address: str) -> str:
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/admin/version", timeout=3.0) as answer:
            return plain(str(json.load(answer)))
    except (OSError, ValueError, HTTPException):
        return "unknown"


def check_flows(workspace: Workspace) -> list[Finding]:
    """Flow runs whose process died while Prefect still calls them running, see `flows.liveness`."""
    dead = []
    for path in sorted((prefect_home(workspace.root) / "alive").glob("*")):
        try:
            if not is_locked(os.open(path, os.O_RDONLY | os.O_CLOEXEC)):
                dead.append(path.name)
        except FileNotFoundError:  # it ended just now
            continue
    if dead:
        told = f"{len(dead)} flow runs died without a word: {', '.join(map(plain, dead[:3]))}"
        remedy = "takedown run or serve tells Prefect, and goes on."
        return [Finding(status="warning", what="flow runs", found=told, remedy=remedy)]
    return [Finding(status="ok", what="flow runs", found="none died without a word")]
