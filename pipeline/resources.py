"""What this machine has left: memory, room on disk, who holds a kernel lock.

In: the files in which Linux tells it, and `statvfs`. Out: numbers, or None where nobody says. Never: a guess, a lock.

Limits of control groups count as well as the machine's own memory: inside a container only they say what may be used.
Both versions are read, for this process's group and every group above it. Swap is not counted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


class Room(NamedTuple):
    """How much is left.

    Attributes:
        nbytes: Bytes; None where nobody says.
        source: Who says so.
    """

    nbytes: int | None
    source: str


def free_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> Room:
    """Memory that may still be taken: the least of what the machine and its control groups leave."""
    found = [*_of_machine(proc), *_of_groups(proc, cgroups)]
    return min(found, key=lambda room: room.nbytes or 0, default=Room(None, "unknown"))


def free_disk(folder: Path) -> Room:
    """Room that an ordinary user has where a folder lies, or will lie."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        found = os.statvfs(folder)
    except OSError:
        return Room(None, str(folder))
    return Room(found.f_bavail * found.f_frsize, str(folder))


def _of_machine(proc: Path) -> Iterator[Room]:
    available = _table(proc / "meminfo").get("MemAvailable:")
    if available is not None:
        yield Room(available * 1024, "/proc/meminfo")


def _of_groups(proc: Path, cgroups: Path) -> Iterator[Room]:
    """What each control group with a limit leaves; its page cache can be had back."""
    for line in _text(proc / "self" / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if (number, controllers) == ("0", ""):
            root, limit, used, cache = cgroups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, used = cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        group = Path(path.strip("/"))
        for above in (group, *group.parents):  # in a container the path may be the host's: then only the root is there
            folder = root / above
            most, taken = _number(folder / limit), _number(folder / used)
            if most is not None and taken is not None:
                left = most - taken + _table(folder / "memory.stat").get(cache, 0)
                yield Room(max(0, left), str(folder / limit))


def lock_holder(path: Path, proc: Path = PROC) -> bool | None:
    """Whether a process holds a kernel lock (flock) of a file, without taking it; None where nobody says.

    Only processes that can be seen from here: the kernel tells a container nothing of those outside of it, and no
    machine of those on another that has the same network file system.
    """
    locks = _text(proc / "locks")
    try:
        found = path.stat()
    except OSError:
        return False
    if not locks and not (proc / "locks").is_file():
        return None
    place = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    return any("FLOCK" in line and place in line.split() and "->" not in line for line in locks.splitlines())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None  # ``max`` is no limit


def _table(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    rows = (line.split() for line in _text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}
