"""Progress of long work, told to whoever listens: the command line draws bars, tests and libraries stay silent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Listener = Callable[[str, int, int, str], None]
"""Called with stage, done, total (0 when open) and a short note."""

_listeners: list[Listener] = []


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Send all progress in this process to a listener, too."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def tell(stage: str, done: int, total: int, note: str = "") -> None:
    """Report that ``done`` of ``total`` units of a stage are finished."""
    for listener in _listeners:
        listener(stage, done, total, note)


class Counter:
    """Counts the units of one stage; pass `add` as a progress callback."""

    def __init__(self, stage: str, total: int) -> None:
        self.stage, self.total, self.done = stage, total, 0
        tell(stage, 0, total)

    def add(self, units: int = 1, note: str = "") -> None:
        self.done = min(self.done + units, self.total) if self.total else self.done + units
        tell(self.stage, self.done, self.total, note)
