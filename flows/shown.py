"""Progress of the stages in Prefect: one artifact for each stage that counts, on the page of its task.

In: what `pipeline.progress` tells. Out: artifacts, updated every few seconds. Never: a note or a name, only numbers; a
stage that fails, or waits, because nobody can be shown how far it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from uuid import UUID

from httpx import HTTPError
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import TaskRunContext
from prefect.exceptions import PrefectException

from pipeline.progress import listening

EVERY_S = 5.0
"""Seconds between two updates; each is a call to Prefect's server."""


@contextmanager
def progress_artifacts() -> Iterator[None]:
    """Show the progress of every task that runs meanwhile."""
    known: dict[tuple[UUID, str], tuple[UUID, float]] = {}
    short: set[UUID] = set()
    unheard = False

    def show(call: Callable[[], Any]) -> Any:
        """Call Prefect's server, but not again after it could not be reached: each call waits for minutes then."""
        nonlocal unheard
        if not unheard:
            try:
                return call()
            except (HTTPError, PrefectException):
                unheard = True
        return None

    def listen(stage: str, done: int, total: int, note: str) -> None:
        context = TaskRunContext.get()
        if context is None or not total:
            return
        key, now, percent = (context.task_run.id, stage), time.monotonic(), 100 * min(done / total, 1)
        if key not in known:
            name = f"progress-{stage.replace(' ', '-')}"  # Prefect wants letters, digits and dashes
            units = f"{total:,} units"
            made = show(lambda: create_progress_artifact(progress=percent, key=name, description=units))
            if made is not None:
                known[key] = (UUID(str(made)), now)
                short.add(known[key][0])
            return
        artifact, last = known[key]
        if done >= total or now - last >= EVERY_S:
            show(lambda: update_progress_artifact(artifact_id=artifact, progress=percent))
            known[key] = (artifact, now)
        if done >= total:
            short.discard(artifact)

    with listening(listen):
        yield
    for artifact in short:  # a stage may reach its aim before it has counted to the end
        show(partial(update_progress_artifact, artifact_id=artifact, progress=100.0))
