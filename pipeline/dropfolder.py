"""The drop folder: batch files that land in ``inbox/`` are taken in by the next run, bad ones are set aside.

In: files that anybody may have put there, whole or half-written. Out: requests in the vault and on record, or the file
in ``inbox/rejected/`` with the reason beside it. Never: a file that holds up the others, a text in a reason.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from pipeline.errors import InvalidInput, Problem
from pipeline.files import explained_space, put_in_place, read_whole, write_atomic
from pipeline.submit import take_in, taken_in
from pipeline.workspace import Workspace

REASON = ".reason.txt"
"""Ending of the file that says why the file of the same name was set aside."""


@dataclass(frozen=True)
class Rejected:
    """A file that was set aside.

    Attributes:
        name: Its name in ``inbox/rejected/``.
        problems: Everything that is wrong with it.
    """

    name: str
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Delivery:
    """What came of the files in the drop folder.

    Attributes:
        batches: Ids of the batches taken in.
        rejected: Files set aside.
        arriving: Names of files that somebody is still writing; they stay for the next run.
    """

    batches: tuple[str, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    arriving: tuple[str, ...] = ()


def take_inbox(workspace: Workspace, actor: str, sleep: Callable[[float], None] = time.sleep) -> Delivery:
    """Take in every batch file that lies in the drop folder, by name, and remove what was taken in.

    The text files of a batch go with it, unless another batch in the folder names them, too: no text stays outside the
    vault. Those of a batch that is set aside stay where they are: corrected and moved back, it finds them again.

    Args:
        workspace: The workspace, locked for writing.
        actor: Who asked for it, for the ledger.
        sleep: Waits so many seconds; for tests.
    """
    batches, rejected = list[str](), list[Rejected]()
    waiting = sorted(p for p in workspace.inbox.iterdir() if p.suffix.lower() == ".json" and p.name[0] != ".")
    arriving = _arriving(waiting, workspace.settings().intake.settle_s, sleep)
    for path in waiting:
        if path in arriving:
            continue
        try:
            # A process that died behind the ledger left the file here; it was acknowledged and is not new.
            batch = taken_in(workspace, path) or take_in(workspace, path, actor)
        except InvalidInput as error:
            rejected.append(_set_aside(workspace, path, error.problems))
            continue
        needed = {text for other in waiting if other != path and other.exists() for text in _text_files(other)}
        for text in _text_files(path) - needed:
            text.unlink(missing_ok=True)
        path.unlink()
        batches.append(batch.batch_id)
    return Delivery(tuple(batches), tuple(rejected), tuple(sorted(p.name for p in arriving)))


def _arriving(paths: Iterable[Path], settle_s: float, sleep: Callable[[float], None]) -> set[Path]:
    """Batch files that change, or whose text files do, while somebody watches.

    Only where one was touched within the last ``settle_s`` seconds is anybody kept waiting, for as long; a time of
    another machine's clock that lies ahead counts as such.
    """
    before = {path: _marks(path) for path in paths}
    newest = max((modified for marks in before.values() for _, modified, _ in marks), default=0)
    if time.time() - newest / 1e9 < settle_s:
        sleep(settle_s)
    return {path for path, marks in before.items() if _marks(path) != marks}


def _marks(path: Path) -> list[tuple[str, int, int]]:
    """Name, time of change in ns and size of a batch file and of every text file that it names and that is there."""
    found = []
    for part in sorted({path, *_text_files(path)}):
        try:
            status = part.lstat()
        except (OSError, ValueError):  # ValueError: a NUL in the name
            continue
        found.append((str(part), status.st_mtime_ns, status.st_size))
    return found


def _set_aside(workspace: Workspace, path: Path, problems: tuple[Problem, ...]) -> Rejected:
    """Move a file into ``rejected/``. The reason is written first: a process that dies between is repeated."""
    folder = workspace.inbox / "rejected"
    folder.mkdir(mode=0o700, exist_ok=True)
    names = (path.name if n == 1 else f"{path.stem}-{n}{path.suffix}" for n in count(1))
    name = next(name for name in names if not (folder / name).exists() and not (folder / name).is_symlink())
    told = [str(problem).replace(str(path), name) for problem in problems]  # where it lies from now on
    lines = [*told, "", f"Correct the file and move it back to {workspace.inbox}.", ""]
    write_atomic(folder / f"{name}{REASON}", "\n".join(lines).encode("utf-8", "replace"))
    with explained_space(folder):
        put_in_place(path, folder / name)
    return Rejected(name, problems)


def _text_files(path: Path) -> set[Path]:
    """The text files that a batch file names, as far as it can be read."""
    try:
        requests = json.loads(read_whole(path))["requests"]
        return {path.parent / r["text_file"] for r in requests if r.get("text_file")}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return set()
