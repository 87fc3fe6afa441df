"""Wait for a workspace's write lock, in turn: who is urgent goes first, and nobody interrupts a running step.

In: a workspace. Out: the lock of `pipeline.workspace.writing`. Never: a queue on disk that a dead process could block;
that somebody urgent is waiting is a kernel lock, too, and ends with its process.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipeline.errors import WorkspaceBusy
from pipeline.progress import tell
from pipeline.runlog import report
from pipeline.workspace import Workspace, writing

POLL_S = 0.5
"""Seconds between two tries; a step takes minutes."""

LONGEST_WAIT_S = 7 * 86400.0
"""Longest wait of somebody urgent: as good as for ever, and a number in JSON."""

URGENT = ".urgent"
"""Empty file of the workspace whose kernel lock says that somebody urgent waits."""

STAGE = "waiting"
"""Under this name `pipeline.progress` tells who is waited for."""


@contextmanager
def writing_in_turn(workspace: Workspace, wait_s: float, urgent: bool = False) -> Iterator[None]:
    """Hold the workspace's write lock, after waiting for it where somebody else has it.

    Args:
        workspace: The workspace.
        wait_s: Longest wait in seconds; 0 does not wait, and does not go before somebody urgent either.
        urgent: Go before everybody who waits and is not urgent.

    Raises:
        WorkspaceBusy: Another process holds it still, which and since when is said; or somebody urgent goes first.
    """
    with ExitStack() as held:
        with ExitStack() as turn:
            if urgent:
                turn.enter_context(standing_first(workspace))
            _wait(workspace, wait_s, urgent, held)
        yield


def _wait(workspace: Workspace, wait_s: float, urgent: bool, held: ExitStack) -> None:
    begun, told = time.monotonic(), ""
    until = begun + wait_s
    while True:
        try:
            if not urgent and _somebody_first(workspace):
                raise WorkspaceBusy(
                    f"{workspace.root}: an urgent run goes first. Nothing was changed; try again when it is done."
                )
            held.enter_context(writing(workspace))
            if told:
                report(workspace, None, "lock-waited", seconds=round(time.monotonic() - begun, 3), urgent=urgent)
            return
        except WorkspaceBusy as busy:
            if time.monotonic() >= until:
                raise
            if str(busy) != told:
                told = str(busy)
                reason = told.partition(" Nothing was changed")[0]
                tell(STAGE, 0, 0, reason)
                report(workspace, None, "lock-busy", reason=reason, urgent=urgent)
        time.sleep(POLL_S)


@contextmanager
def standing_first(workspace: Workspace) -> Iterator[None]:
    """Be seen as urgent, also where the write lock is free: whoever is not urgent stays away from it meanwhile.

    Any number of processes at a time, and one as often as it likes.
    """
    fd = os.open(workspace.root / URGENT, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        yield
    finally:
        os.close(fd)


def _somebody_first(workspace: Workspace) -> bool:
    """Whether somebody urgent stands first."""
    try:
        fd = os.open(workspace.root / URGENT, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:  # nobody ever did; who only asks leaves nothing behind
        return False
    return is_locked(fd)


def is_locked(fd: int) -> bool:
    """Whether another process holds a kernel lock of an open file, which is closed."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


@contextmanager
def only_one(lock: Path) -> Iterator[bool]:
    """Let one of all that ask for the same lock go on; nobody waits, and the lock ends with its process.

    Args:
        lock: A file; made where it is missing, with its folder.

    Yields:
        Whether this is the one.
    """
    lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)
