"""What runs the pieces of a stage that maps: threads of this process, or the workers of Dask or Ray.

In: the settings. Out: a task runner of Prefect. Never: Dask or Ray imported without being asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect import Task, unmapped
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from pipeline.clusters import dask_place, missing, ray_place
from pipeline.settings import RuntimeSettings


def side_by_side(
    work: Task[..., Any], pieces: Sequence[list[str]], runtime: RuntimeSettings, **same: object
) -> list[Any]:
    """Do a task for every piece, as many at a time as the settings say; in the order of the pieces.

    Args:
        work: A task with a parameter ``requests``, which gets one piece; it must not depend on how they were cut.
        pieces: Ids of requests.
        runtime: Which runner, and how many workers.
        **same: The task's other parameters, the same for every piece.

    Raises:
        UsageError: The runner's extra is not installed.
    """
    if len(pieces) < 2:  # a cluster takes longer to start than one piece may take
        return [work(requests=piece, **same) for piece in pieces]
    with task_runner(runtime) as runner:
        futures = runner.map(work, {"requests": list(pieces), **{k: unmapped(v) for k, v in same.items()}})
        return [future.result() for future in futures]


def shares(names: Sequence[str], pieces: int) -> list[list[str]]:
    """Split names over workers: at most so many pieces, none empty, every name in one, order kept within a piece."""
    return [list(names[n::pieces]) for n in range(min(pieces, len(names)))]


def task_runner(runtime: RuntimeSettings) -> TaskRunner[Any]:
    """The task runner that the settings name, with local workers.

    An address in ``TAKEDOWN_DASK_ADDRESS`` or ``RAY_ADDRESS`` is used instead; its workers need the workspace at the
    same path and Prefect's API.

    Raises:
        UsageError: The extra is not installed.
    """
    if runtime.runner == "threads":
        return ThreadPoolTaskRunner(max_workers=runtime.workers)
    try:
        return _on_dask(runtime.workers) if runtime.runner == "dask" else _on_ray(runtime.workers)
    except ImportError as error:
        raise missing(runtime.runner) from error


def _on_dask(workers: int) -> TaskRunner[Any]:
    address, local = dask_place(workers)
    from prefect_dask import DaskTaskRunner

    made: TaskRunner[Any] = DaskTaskRunner(address=address, cluster_kwargs=local or None)
    return made


def _on_ray(workers: int) -> TaskRunner[Any]:
    address, local = ray_place(workers)
    from prefect_ray import RayTaskRunner

    made: TaskRunner[Any] = RayTaskRunner(address=address, init_kwargs=local)
    return made
