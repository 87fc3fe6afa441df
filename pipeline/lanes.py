"""Work done beside the work: a thread that hashes or writes one piece while its caller reads the next.

In: jobs, in order. Out: the same jobs done, in that order. Never: more pieces waiting than memory was planned for, an
error lost. Only for jobs that release the interpreter lock: hashing, compressing, reading and writing do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_AHEAD = 2
"""Jobs that the caller may be ahead: enough to overlap, and it bounds memory."""


class Lane:
    """A worker thread that does jobs in order while its caller goes on, at most `_AHEAD` jobs behind."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._waiting: deque[Future[Any]] = deque()

    def do(self, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue a job; an earlier job's error comes out here or in `finish`.

        Returns:
            What the job will return.
        """
        if len(self._waiting) == _AHEAD:
            self._waiting.popleft().result()
        future = self._pool.submit(job, *args, **kwargs)
        self._waiting.append(future)
        return future

    def finish(self) -> None:
        """Wait until every job is done."""
        while self._waiting:
            self._waiting.popleft().result()

    def __enter__(self) -> Lane:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)
