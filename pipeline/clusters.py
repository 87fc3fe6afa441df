"""Workers of Dask and Ray: where they are, and searching a corpus on them.

In: how many local workers to start, or the address of others in the environment. Out: a function that searches a list
of pieces somewhere. Never: Dask or Ray imported without being asked for; a worker that needs a file of this machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from pipeline.corpus import Piece
from pipeline.errors import Interrupted, UsageError
from pipeline.fingerprints import FingerprintSet
from pipeline.scan import Rule, find

Cluster = Literal["dask", "ray"]

Place = tuple[str | None, dict[str, Any]]
"""Address of a cluster that is there, or None and how to start one on this machine."""


def dask_place(workers: int) -> Place:
    """The cluster at ``TAKEDOWN_DASK_ADDRESS``, or local processes."""
    local = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": None}
    address = os.environ.get("TAKEDOWN_DASK_ADDRESS")
    return (address, {}) if address else (None, local)


def ray_place(workers: int) -> Place:
    """The cluster at ``RAY_ADDRESS``, or a local node; to be called before Ray is imported."""
    # No reports of use, and no token file in the home of whoever runs this.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    address = os.environ.get("RAY_ADDRESS")
    return (address, {}) if address else (None, {"num_cpus": workers, "include_dashboard": False})


@contextmanager
def searching_on(
    cluster: Cluster, prints: FingerprintSet, rule: Rule, workers: int
) -> Iterator[tuple[Callable[[Sequence[Piece]], Any], int]]:
    """Give a function that hands pieces to a worker and returns a future of what `find` makes of them.

    The fingerprints are sent to each worker once.

    Args:
        cluster: Whose workers.
        prints: What is looked for.
        rule: When a document counts.
        workers: Processes to start where no address is given.

    Yields:
        The function, and how many workers there are.

    Raises:
        UsageError: The extra is not installed.
        Interrupted: The cluster cannot be reached, or lost a worker too often.
    """
    try:
        with (_dask if cluster == "dask" else _ray)(prints, rule, workers) as search:
            yield search
    except ImportError as error:
        raise missing(cluster) from error


def missing(cluster: Cluster) -> UsageError:
    """What to say where an extra is not installed."""
    return UsageError(
        f'runtime.runner = "{cluster}" needs an extra: pip install "takedown-pipeline[{cluster}]". '
        'Or set it to "threads".'
    )


def _lost(error: Exception) -> Interrupted:
    return Interrupted(
        f"The workers failed ({type(error).__name__}). Nothing found so far is lost with --out: run the same command "
        "again when they are there and have memory."
    )


@contextmanager
def _dask(prints: FingerprintSet, rule: Rule, workers: int) -> Iterator[tuple[Callable[[Sequence[Piece]], Any], int]]:
    from distributed import Client
    from distributed.client import FutureCancelledError
    from distributed.scheduler import KilledWorker

    address, local = dask_place(workers)
    try:
        with Client(address, set_as_default=False, **local) as client:
            sent = client.scatter(prints, broadcast=True)
            yield lambda pieces: client.submit(find, pieces, sent, rule, pure=False), len(client.nthreads())
    except (OSError, KilledWorker, FutureCancelledError) as error:  # a timeout and a lost connection are OSErrors
        raise _lost(error) from error


@contextmanager
def _ray(prints: FingerprintSet, rule: Rule, workers: int) -> Iterator[tuple[Callable[[Sequence[Piece]], Any], int]]:
    address, local = ray_place(workers)
    import ray
    from ray.exceptions import RayError

    try:
        ray.init(address=address, log_to_driver=False, **local)
    except Exception as error:  # it has no kind of its own for a node that does not start in time
        raise _lost(error) from error
    try:
        try:
            sent, search = ray.put(prints), ray.remote(find)
            count = int(ray.cluster_resources().get("CPU", 1))
            yield lambda pieces: search.remote(pieces, sent, rule).future(), max(count, 1)
        finally:
            ray.shutdown()
    except (RayError, ConnectionError) as error:
        raise _lost(error) from error
