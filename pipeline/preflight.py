"""Preflight: what the next step needs against what there is, before it is begun and before each long stage.

In: a workspace, its settings, the shapes of the version in force. Out: an estimate; or an error before anything is
changed. Never: a weight that is loaded, a time that no run took.

Memory, see `pipeline.estimate`, is compared with what the machine and its control groups leave, on a GPU with what that
has left. What nobody can say is unknown, and stops nothing. ``runtime.preflight = "warn"`` lets a run go on that would
be refused; the log says so.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from pipeline.display import size_words
from pipeline.errors import NotEnough, Problem, TakedownError
from pipeline.estimate import ModelSize, Shape, StageNeed, StepNeed, model_size, step_need
from pipeline.records import LedgerEntry, Record
from pipeline.resources import Room, free_disk, free_memory
from pipeline.runlog import STAGES, recorded_times, report
from pipeline.safefile import read_header
from pipeline.settings import Settings
from pipeline.states import current_version, published_versions
from pipeline.versions import VersionStore
from pipeline.workspace import Workspace

ADDRESSES = {"dask": "TAKEDOWN_DASK_ADDRESS", "ray": "RAY_ADDRESS"}
"""Where workers of their own are named, which are not on this machine."""


class Estimate(Record):
    """What the next step needs and has.

    Attributes:
        version: Version that it starts from.
        need: Bytes by stage, and on disk.
        memory_bytes: What is left; None where nobody says.
        memory_source: Who says so.
        disk_bytes: Room left in the workspace, with what the next run removes or has already.
        seconds: Stage → median seconds of the recorded runs of this lineage; a stage that none had is not in it.
        runs: How many those are.
    """

    version: int
    need: StepNeed
    memory_bytes: int | None
    memory_source: str
    disk_bytes: int | None
    seconds: dict[str, float]
    runs: int


def version_size(workspace: Workspace, entries: Sequence[LedgerEntry], version: int) -> ModelSize:
    """Shapes of a published version added up, from its table of tensors.

    Raises:
        StoreDamaged: Manifest or table is missing or changed.
    """
    store = VersionStore(workspace.versions, published_versions(entries))
    return model_size(Shape(t.name, t.dtype, t.shape) for t in store.tensors(store.manifest(version)))


def _written_out(workspace: Workspace, entries: Sequence[LedgerEntry], version: int) -> bool:
    """Whether a version is kept as deltas, so that a run must write its files instead of linking them."""
    store = VersionStore(workspace.versions, published_versions(entries))
    weights = [f for f in store.manifest(version).files if f.path.endswith(".safetensors")]
    return not all(store.objects.is_whole(f.digest) for f in weights)


def estimate(workspace: Workspace, entries: Sequence[LedgerEntry], reusable: int = 0) -> Estimate:
    """What a step from the version in force needs.

    Args:
        workspace: Where.
        entries: The ledger's.
        reusable: Bytes of runs that the next one removes, or goes on with.

    Raises:
        TakedownError: Settings, manifest or table of tensors cannot be read.
    """
    settings, version = workspace.settings(), current_version(entries)
    need = step_need(
        version_size(workspace, entries, version), settings, restores=_written_out(workspace, entries, version),
        processes=_processes(settings), retained=_retained(workspace, settings),
    )  # fmt: skip
    memory, times = memory_for(settings), recorded_times(workspace)
    disk = free_disk(workspace.runs).nbytes
    return Estimate(
        version=version,
        need=need,
        memory_bytes=memory.nbytes,
        memory_source=memory.source,
        disk_bytes=None if disk is None else disk + reusable,
        seconds={stage: times.seconds[stage] for stage in STAGES if stage in times.seconds},
        runs=times.runs,
    )


def memory_for(settings: Settings) -> Room:
    """Memory left on the device of the settings."""
    if settings.runtime.device == "cpu":
        return free_memory()
    import torch  # takes seconds; who plans a run needs it next

    from pipeline.models import pick_device

    device = pick_device(settings.runtime.device)
    if device.type != "cuda":
        return free_memory()
    try:
        return Room(torch.cuda.mem_get_info(device)[0], str(device))
    except (RuntimeError, AssertionError):  # no such device: told by whoever loads the model
        return Room(None, str(device))


def _processes(settings: Settings) -> int:
    """Worker processes on this machine that load the model for themselves."""
    runtime = settings.runtime
    return 0 if runtime.runner == "threads" or os.environ.get(ADDRESSES[runtime.runner]) else runtime.workers


def _retained(workspace: Workspace, settings: Settings) -> int:
    """Passages that the retain text has at most, with a token a byte.

    That is twice as many as are taken, which is one in two: room for tokenizers that take letters apart.
    """
    sizes = [path.stat().st_size for path in (workspace.reference / "retain").glob("*.txt") if path.is_file()]
    return sum(size // settings.passages.continuation_tokens + 1 for size in sizes)


def shortages(need: StageNeed, memory: Room, disk_need: int, disk: Room) -> list[Problem]:
    """What does not suffice; what nobody can say does."""
    problems = []
    if memory.nbytes is not None and need.memory_bytes > memory.nbytes:
        problems.append(
            Problem(
                f"memory ({memory.source})",
                f"{need.stage} needs about {size_words(need.memory_bytes)}, {size_words(memory.nbytes)} are left",
                "End other programs, raise the limit, or lower runtime.batch_tokens or runtime.workers.",
            )
        )
    if disk.nbytes is not None and disk_need > disk.nbytes:
        problems.append(
            Problem(
                disk.source,
                f"a run and its version need up to {size_words(disk_need)}, {size_words(disk.nbytes)} are free",
                "Free some space, or put the workspace on a larger disk.",
            )
        )
    return problems


def require_step(
    workspace: Workspace,
    entries: Sequence[LedgerEntry],
    version: int,
    folder: Path,
    starts_anew: bool = False,
    reusable: int = 0,
) -> None:
    """Refuse a step that memory or disk cannot suffice for, before anything is changed.

    Args:
        workspace: Where.
        entries: The ledger's.
        version: Version that it starts from.
        folder: That of its run; of stages that it has records of nothing is needed.
        starts_anew: Whether it writes a start of its own, as a reinstatement does.
        reusable: Bytes that the step's begin removes, or that it has there already.

    Raises:
        NotEnough: With everything that is short.
    """
    try:
        size = version_size(workspace, entries, version)
        restores = _written_out(workspace, entries, version) + starts_anew
    except TakedownError:
        return  # told by what reads the version
    settings = workspace.settings()
    need = step_need(
        size, settings, restores=restores, processes=_processes(settings), retained=_retained(workspace, settings)
    )
    peak = need.after(*(stage for stage in STAGES if has_finished(folder, stage))).peak
    short = shortages(peak, memory_for(settings), need.disk_bytes - reusable, free_disk(workspace.runs))
    _decide(workspace, None, short, "Nothing was begun or changed; the requests keep waiting.")


def has_finished(folder: Path, stage: str) -> bool:
    """Whether a run has the record of a stage."""
    return (folder / f"{'screen' if stage == 'screening' else stage}.json").is_file()


def require_stage(
    workspace: Workspace, run_id: str, folder: Path, settings: Settings, stage: str, selected: int | None, loaded: bool
) -> None:
    """Refuse a stage that memory cannot suffice for, or, where it writes a model, the disk; what is finished is kept.

    Args:
        workspace: Where.
        run_id: The run.
        folder: The model that it starts from.
        settings: The run's.
        stage: Its name.
        selected: Entries of the mask, where it is known.
        loaded: Whether this process has the model already.

    Raises:
        NotEnough: It does not suffice.
    """
    size = model_size(
        Shape(t.name, t.dtype, t.shape) for path in folder.glob("*.safetensors") for t in read_header(path).tensors
    )
    stages = step_need(size, settings, selected, retained=_retained(workspace, settings)).stages
    (found,) = (s for s in stages if s.stage == stage)
    need = found.model_copy(update={"memory_bytes": found.memory_bytes - size.nbytes * loaded})
    disk = 2 * size.nbytes if stage == "merge" else 0  # the candidate, and the version that is made of it
    short = shortages(need, memory_for(settings), disk, free_disk(workspace.runs))
    _decide(workspace, run_id, short, "What is finished is kept; the same command goes on.")


def _decide(workspace: Workspace, run_id: str | None, short: Sequence[Problem], kept: str) -> None:
    if not short:
        return
    allowed = workspace.settings().runtime.preflight == "warn"
    report(
        workspace, run_id, "too-little", logging.WARNING if allowed else logging.ERROR,
        reasons=[f"{p.where}: {p.found}" for p in short], refused=not allowed,
    )  # fmt: skip
    if not allowed:
        hint = 'Where the estimate is wrong, runtime.preflight = "warn" lets it go on.'
        raise NotEnough("\n".join([*map(str, short), f"{kept} {hint}"]))
