"""Workers of Dask and Ray: where they are, and searching a corpus on them.

In: how many local workers to start, or the address of others in the environment. Out: a function that searches a list
of pieces somewhere. Never: Dask or Ray imported without being asked for; a worker that needs a file of this machine; an
error of whoever uses the function taken for one of the workers'.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from pipeline.corpus import Piece
from pipeline.errors import Interrupted, UsageError
from pipeline.fingerprints import FingerprintSet
from pipeline.scan import Copy, Rule, Stretch, find

Cluster = Literal["dask", "ray"]

Place = tuple[str | None, dict[str, Any]]
"""Address of a cluster that is there, or None and how to start one on this machine."""

Results = list[Copy | Stretch]

Search = Callable[[Sequence[Piece]], Callable[[], Results]]
"""Hands pieces to a worker; what it gives waits for what `find` makes of them."""


def dask_place(workers: int) -> Place:
    """The cluster at ``TAKEDOWN_DASK_ADDRESS``, or local processes; to be called before Dask is imported."""
    # Its scheduler and workers tell of every connection, at the end as if something had gone wrong.
    os.environ.setdefault("DASK_DISTRIBUTED__LOGGING__DISTRIBUTED", "error")
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
def searching_on(cluster: Cluster, prints: FingerprintSet, rule: Rule, workers: int) -> Iterator[tuple[Search, int]]:
    """Give a function that hands pieces to a worker and returns one that waits for the result.

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
        Interrupted: The cluster cannot be reached, or lost a worker too often; also from the two functions.
    """
    with (_dask if cluster == "dask" else _ray)(prints, rule, workers) as search:
        yield search


def missing(cluster: Cluster) -> UsageError:
    """What to say where an extra is not installed."""
    return UsageError(
        f'runtime.runner = "{cluster}" needs an extra: pip install "takedown-pipeline[{cluster}]". '
        'Or set it to "threads".'
    )


@contextmanager
def _on_workers(*failures: type[Exception]) -> Iterator[None]:
    """What is done inside fails because of the workers; what uses their results is outside."""
    try:
        yield
    except failures as error:
        raise Interrupted(
            f"The workers failed ({type(error).__name__}). Nothing found so far is lost with --out: run the same "
            "command again when they are there, with this release, and have memory."
        ) from error


def _search(submit: Callable[[Sequence[Piece]], Any], *failures: type[Exception]) -> Search:
    """A search by a function that returns a future; each library has a kind of its own."""

    def search(pieces: Sequence[Piece]) -> Callable[[], Results]:
        with _on_workers(*failures):
            future = submit(pieces)

        def result() -> Results:
            with _on_workers(*failures):
                found: Results = future.result()
            return found

        return result

    return search


@contextmanager
def _dask(prints: FingerprintSet, rule: Rule, workers: int) -> Iterator[tuple[Search, int]]:
    address, local = dask_place(workers)
    try:
        from distributed import Client
        from distributed.client import FutureCancelledError
        from distributed.scheduler import KilledWorker
    except ImportError as error:
        raise missing("dask") from error
    # A timeout and a lost connection are OSErrors; a worker without this package cannot import it.
    failures = (OSError, ImportError, KilledWorker, FutureCancelledError)
    with ExitStack() as stack:
        with _on_workers(*failures):
            client = stack.enter_context(Client(address, set_as_default=False, **local))
            sent = client.scatter(prints, broadcast=True)
            count = len(client.nthreads())
        yield _search(lambda pieces: client.submit(find, pieces, sent, rule, pure=False), *failures), max(count, 1)


@contextmanager
def _ray(prints: FingerprintSet, rule: Rule, workers: int) -> Iterator[tuple[Search, int]]:
    address, local = ray_place(workers)
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError as error:
        raise missing("ray") from error
    with _on_workers(Exception):  # it has no kind of its own for a node that does not start in time
        ray.init(address=address, log_to_driver=False, **local)
    failures = (RayError, ConnectionError)
    try:
        with _on_workers(*failures):
            sent, remote = ray.put(prints), ray.remote(find)
            count = int(ray.cluster_resources().get("CPU", 1))
        yield _search(lambda pieces: remote.remote(pieces, sent, rule).future(), *failures), max(count, 1)
    finally:
        ray.shutdown()
