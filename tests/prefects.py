"""A running Prefect for tests: an embedded server with a database of its own, and what it has written.

A start takes 20 to 40 s, so a file of tests shares one; Prefect is imported inside the functions only.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun


class Prefect(NamedTuple):
    """The running Prefect: the flow, and where it writes."""

    flow: Any
    home: Path
    database: Path


@contextmanager
def running(home: Path) -> Iterator[Prefect]:
    """A server that logs as much as it can; everything that it writes is below ``home``."""
    environment = dict(os.environ)
    os.environ.update(
        PREFECT_HOME=str(home),
        PREFECT_SERVER_ANALYTICS_ENABLED="false",
        DO_NOT_TRACK="1",
        PREFECT_LOGGING_LEVEL="DEBUG",
        PREFECT_SERVER_LOGGING_LEVEL="DEBUG",
        PREFECT_LOGGING_TO_API_ENABLED="true",
        OMP_NUM_THREADS="1",  # workers of a cluster compute as these tests do
    )
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, get_current_settings, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    from flows.takedown import takedown

    with (
        prefect_test_harness(server_startup_timeout=180),
        temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
    ):
        url = get_current_settings().server.database.connection_url
        assert url is not None
        yield Prefect(takedown, home, Path(url.get_secret_value().split("///", 1)[1]))
    os.environ.clear()
    os.environ.update(environment)


def latest_run(last: str) -> tuple[FlowRun, list[tuple[str, str | None]]]:
    """The newest flow run, with names and states of its task runs, oldest first.

    Prefect writes task runs down behind the flow's back: waits until the task named ``last`` is there, and finished.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
    from prefect.client.schemas.sorting import FlowRunSort

    until = time.monotonic() + 30
    while True:
        with get_client(sync_client=True) as client:
            (run,) = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)
            tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])))
        tasks.sort(key=lambda t: str(t.start_time))
        # A name that was given is followed by the start of an id.
        found = [(t.name.rsplit("-", 1)[0], t.state_name) for t in tasks]
        finished = all(t.state is not None and t.state.is_final() for t in tasks)
        if (finished and found and found[-1][0] == last) or time.monotonic() > until:
            return run, found
        time.sleep(0.1)


def stored_by_prefect(prefect: Prefect) -> list[Path | bytes]:
    """Everything that Prefect has written: its home, and its database with the log behind it."""
    from prefect.logging.handlers import APILogHandler

    APILogHandler().flush()
    with closing(sqlite3.connect(prefect.database, timeout=30)) as connection:
        connection.execute("PRAGMA wal_checkpoint(FULL)")
    database = prefect.database.read_bytes()
    wal = prefect.database.with_name(prefect.database.name + "-wal")
    assert len(database) > 100_000
    return [prefect.home, database, wal.read_bytes() if wal.exists() else b""]
