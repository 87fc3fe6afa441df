"""The log of a run: one JSON object a line, so that somebody on call, or a program, can see what happened when.

In: events with ids, numbers, digests and names of types. Out: lines in ``runs/<id>/log.jsonl``; once the run has ended
or its folder goes, in ``reports/logs/<id>.jsonl``; what belongs to no run, in ``reports/logs/workspace.jsonl``. Never:
a text, a contact, the message of an exception, or a run that fails because its log could not be written. The ledger is
the record; a log may be deleted at any time.

Events go through the logger ``takedown`` of the standard library: a program that wants them elsewhere adds a handler.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import NamedTuple

from pipeline.errors import TakedownError
from pipeline.files import append_line, canonical_json, read_whole
from pipeline.settings import LoggingSettings
from pipeline.workspace import Workspace

NAME = "log.jsonl"
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
STAGES = (
    "reference", "leave-out", "dedupe", "screening", "saliency", "unlearn", "repair", "merge", "evaluate", "gate",
    "publish",
)  # fmt: skip
"""What takes time in a run, in order."""


class _Lines(logging.Handler):
    """Writes each event where the settings of its workspace want it."""

    def emit(self, record: logging.LogRecord) -> None:
        # A full disk, a folder that went: the run's own checks tell, and a log is not worth a run.
        with suppress(OSError, ValueError):
            if (place := record.__dict__.get("place")) is not None:
                place.parent.mkdir(parents=True, exist_ok=True)
                append_line(place, record.getMessage().encode() + b"\n")
            else:
                sys.stderr.write(record.getMessage() + "\n")


LOGGER = logging.getLogger("takedown")
LOGGER.setLevel(logging.DEBUG)  # each workspace has a level of its own
LOGGER.propagate = False  # what the terminal and Prefect show stays as it is
LOGGER.addHandler(_Lines())


def archive(workspace: Workspace) -> Path:
    """Where logs lie whose runs have ended, or have no folder any more."""
    return workspace.reports / "logs"


def log_file(workspace: Workspace, run_id: str) -> Path | None:
    """Where the log of a run lies; None where it has none, or it goes elsewhere by the settings."""
    for path in (workspace.runs / run_id / NAME, archive(workspace) / f"{run_id}.jsonl"):
        if path.is_file():
            return path
    return None


def report(workspace: Workspace, run_id: str | None, event: str, level: int = logging.INFO, /, **facts: object) -> None:
    """Write an event.

    Args:
        workspace: Where.
        run_id: The run; None for what belongs to none.
        event: What happened, one word.
        level: Of `logging`.
        facts: What there is to say: ids, numbers, digests, names of types; JSON.
    """
    settings = _settings(workspace)
    if level < LEVELS[settings.level]:
        return
    told = {"at": datetime.now(UTC).isoformat(timespec="milliseconds"), "level": logging.getLevelName(level).lower(),
            "event": event, "run": run_id, "pid": os.getpid(), **facts}  # fmt: skip
    # The line is the message, safe from the formatting of `logging`, which is off without arguments.
    LOGGER.log(level, canonical_json(told).decode(), extra={"place": _place(workspace, run_id, settings.destination)})


def _settings(workspace: Workspace) -> LoggingSettings:
    try:
        return workspace.settings().logging
    except (TakedownError, OSError):  # told by whatever is run
        return LoggingSettings()


def _place(workspace: Workspace, run_id: str | None, destination: str) -> Path | None:
    """The file that an event is written to; None for standard error."""
    if destination == "stderr":
        return None
    if destination != "run":
        return workspace.root / destination
    if run_id is not None and (workspace.runs / run_id).is_dir():
        return workspace.runs / run_id / NAME
    return archive(workspace) / f"{run_id or 'workspace'}.jsonl"


@contextmanager
def timed(workspace: Workspace, run_id: str, stage: str, level: int = logging.INFO, **facts: object) -> Iterator[None]:
    """Log that a stage begins, and that it ended and after how many seconds, or what stopped it and where."""
    report(workspace, run_id, "stage-begun", level, stage=stage, **facts)
    begun = time.monotonic()
    try:
        yield
    except BaseException as error:
        report(workspace, run_id, "stage-failed", logging.ERROR, stage=stage, seconds=_since(begun), **told_of(error))
        raise
    report(workspace, run_id, "stage-ended", level, stage=stage, seconds=_since(begun))


@contextmanager
def watched(workspace: Workspace, run_id: str) -> Iterator[None]:
    """Log what stops a run, in a stage or between two."""
    try:
        yield
    except BaseException as error:
        report(workspace, run_id, "run-stopped", logging.ERROR, **told_of(error))
        raise


def _since(begun: float) -> float:
    return round(time.monotonic() - begun, 3)


def told_of(error: BaseException) -> dict[str, object]:
    """What may be told of any exception: its type, and the file and line that raised it. Its message may quote."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "unknown"
    return {"type": type(error).__name__, "where": where}


def put_aside(workspace: Workspace, folder: Path) -> None:
    """Move the log of a run out of its folder, which may be deleted from here on; what cannot be moved stays there."""
    source, target = folder / NAME, archive(workspace) / f"{folder.name}.jsonl"
    with suppress(OSError):
        data = read_whole(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        append_line(target, data)
        source.unlink()


def remove_run(workspace: Workspace, folder: Path) -> None:
    """Delete the folder of a run; its log stays.

    Raises:
        OSError: It cannot be deleted.
    """
    put_aside(workspace, folder)
    shutil.rmtree(folder)


# --- reading ----------------------------------------------------------------------------------------------


class StageTimes(NamedTuple):
    """How long the stages of a lineage took.

    Attributes:
        seconds: Stage → median over the runs that had it.
        runs: How many runs there were to learn from.
    """

    seconds: dict[str, float]
    runs: int


def read_events(path: Path) -> list[dict[str, object]]:
    """The events of a log; a line that a killed process left half, or that is no event, is left out."""
    try:
        lines = read_whole(path).splitlines()
    except OSError:
        return []
    events = []
    for line in lines:
        with suppress(ValueError, RecursionError):
            if isinstance(event := json.loads(line), dict):
                events.append(event)
    return events


ENDS = ("stage-begun", "stage-ended")
"""Events around a stage; one that failed or was killed has only the first."""


def stage_seconds(events: list[dict[str, object]]) -> dict[str, float]:
    """Seconds of each stage of one run; pieces that ran side by side count as the longest."""
    found: dict[str, float] = {}
    for event in events:
        stage, seconds = event.get("stage"), event.get("seconds")
        if event.get("event") == "stage-ended" and isinstance(stage, str) and isinstance(seconds, int | float):
            found[stage] = max(found.get(stage, 0.0), float(seconds))
    return found


def _without_a_break(events: list[dict[str, object]]) -> dict[str, float]:
    """Seconds of the stages that were not begun more often than they ended."""
    begun, ended = (Counter(e.get("stage") for e in events if e.get("event") == kind) for kind in ENDS)
    return {stage: seconds for stage, seconds in stage_seconds(events).items() if begun[stage] <= ended[stage]}


def recorded_times(workspace: Workspace) -> StageTimes:
    """How long the stages took in the runs whose logs are there; of one that was killed and taken up nobody knows."""
    paths = [*workspace.runs.glob(f"*/{NAME}"), *archive(workspace).glob("run-*.jsonl")]
    logs = [read_events(path) for path in sorted(paths)]
    runs = [found for events in logs if (found := _without_a_break(events))]
    stages = [stage for stage in STAGES if any(stage in found for found in runs)]
    seconds = {stage: median(found[stage] for found in runs if stage in found) for stage in stages}
    return StageTimes(seconds, len(runs))
