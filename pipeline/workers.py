"""Searching in several processes: of this machine, with one mapped file of fingerprints in all, or of a cluster.

In: lists of pieces, in order. Out: what `pipeline.scan.find` makes of each, in that order. Never: a process of this
machine that outlives its parent, however that ends; more lists in memory than the workers need to stay busy.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, reduction
from typing import Any, BinaryIO, TypeVar

import numpy as np

from pipeline.children import begin_child
from pipeline.clusters import Results, Search, searching_on
from pipeline.corpus import Piece
from pipeline.errors import Interrupted
from pipeline.fingerprints import FingerprintSet
from pipeline.scan import Rule, find
from pipeline.settings import Runner

T = TypeVar("T")

_AHEAD = 2
"""Lists per worker that are read ahead."""


@contextmanager
def searching(
    prints: FingerprintSet, rule: Rule, workers: int, runner: Runner = "threads"
) -> Iterator[Callable[..., Iterator[tuple[Any, Results]]]]:
    """Give a function that searches ``(label, pieces)`` pairs and yields ``(label, results)`` pairs in their order.

    Args:
        prints: What is looked for.
        rule: When a document counts.
        workers: Processes; 1 without a cluster: all is done in this one.
        runner: ``dask`` or ``ray``: workers of that cluster; else processes of this machine.

    Raises:
        UsageError: The cluster's extra is not installed.
        Interrupted: A worker process died, or the cluster cannot be reached.
    """
    if runner != "threads":
        with searching_on(runner, prints, rule, workers) as (search, count):
            yield lambda batches: _in_order(search, batches, _AHEAD * count)
    elif workers == 1:
        yield lambda batches: ((label, find(pieces, prints, rule)) for label, pieces in batches)
    else:
        with _processes(prints, rule, workers) as search:
            yield lambda batches: _in_order(search, batches, _AHEAD * workers)


@contextmanager
def _processes(prints: FingerprintSet, rule: Rule, workers: int) -> Iterator[Search]:
    """Processes of this machine."""
    # Not forked: this process has threads, and what they hold would stay locked in the copies.
    with tempfile.TemporaryFile() as file:
        shared: Any = _Shared(prints, file)  # a `FingerprintSet` where it arrives
        pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin, initargs=(shared, rule))
        try:
            yield lambda pieces: pool.submit(_find, pieces).result
        except BrokenProcessPool as error:
            raise Interrupted(
                "A worker process died, perhaps for want of memory. Nothing found so far is lost with --out: run the "
                "same command again, with fewer --workers where memory is short."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _in_order(search: Search, batches: Iterable[tuple[T, Sequence[Piece]]], ahead: int) -> Iterator[tuple[T, Results]]:
    waiting: deque[tuple[T, Callable[[], Results]]] = deque()
    for label, pieces in batches:
        waiting.append((label, search(pieces)))
        if len(waiting) > ahead:
            first, result = waiting.popleft()
            yield first, result()
    for first, result in waiting:
        yield first, result()


class _Shared:
    """A set of fingerprints in a file without a name, whose descriptor a new process inherits."""

    def __init__(self, prints: FingerprintSet, file: BinaryIO) -> None:
        self._file = file
        self._layout: list[tuple[str, str, int, int]] = []
        for name in FingerprintSet.ARRAYS:
            values = getattr(prints, name)
            self._layout.append((name, values.dtype.str, file.tell(), len(values)))
            file.write(values.tobytes())
            file.write(bytes(-file.tell() % 8))
        file.flush()
        self._rest = (prints.names, prints.short)

    def __reduce__(self) -> tuple[object, ...]:
        return _received, (reduction.DupFd(self._file.fileno()), self._layout, *self._rest)


def _received(
    handed: Any, layout: Sequence[tuple[str, str, int, int]], names: tuple[str, ...], short: bool
) -> FingerprintSet:
    """The set in the process that it was handed to; its pages are shared by all."""
    fd = handed.detach()
    memory = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    os.close(fd)
    arrays: dict[str, Any] = {
        name: np.frombuffer(memory, kind, count, offset) for name, kind, offset, count in layout
    }  # fmt: skip
    return FingerprintSet(names=names, short=short, **arrays)


_job: list[tuple[FingerprintSet, Rule]] = []
"""What this worker process looks for."""


def _begin(prints: FingerprintSet, rule: Rule) -> None:
    """Start a worker: it ends with its parent, and Ctrl-C is the parent's to handle."""
    begin_child()
    _job[:] = [(prints, rule)]


def _find(pieces: Sequence[Piece]) -> Results:
    return find(pieces, *_job[0])
