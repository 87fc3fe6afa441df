"""A disk that loses power: stops a process at any call that changes what is on disk, and shows what would be left.

Every such call of the product goes through `os` (see the end of `pipeline/files.py`; `tests/test_faults.py` checks that
nothing goes around it). While a `Power` is on, those calls are counted, and what they have made durable is written
down: a file's bytes at its last fsync, a folder's names at its last fsync. `Power.left_behind` then writes the folder
tree that a reader would find after the power came back.

SQLite is trusted with its own files: they are taken as they are on disk at that moment.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

CALLS = ("fsync", "link", "replace", "rename", "unlink", "fchmod", "mkdir", "rmdir")
"""The calls that are counted and stopped at."""


class PowerCut(BaseException):
    """The machine is off: nothing runs any more, not even cleaning up."""


class Loss(Enum):
    """What becomes of writes that no fsync has made durable."""

    NOTHING = "the process was killed, the machine lives: everything is kept"
    UNSYNCED = "everything that was not synced is gone: bytes, names, removals"
    TORN = "names are kept, but of bytes that were not synced only the first half"


@dataclass
class _Inode:
    """A file's bytes as they are on the platter; None where no fsync has happened since it was made."""

    durable: bytes | None = None


@dataclass
class _Tree:
    """A folder's names as they are on the platter."""

    names: dict[str, _Inode | _Tree] = field(default_factory=dict)


class Power:
    """Watches one folder tree.

    Args:
        root: The tree.
        stop_at: Number of the call to stop at, from 1.
        before: Stop before the call takes effect, else right after.
        fault: Raised instead of cutting the power, for disks that fail: gets the name of the call.
    """

    def __init__(
        self, root: Path, stop_at: int, before: bool = False, fault: Callable[[str], OSError] | None = None
    ) -> None:
        self.root, self.stop_at, self.before, self.fault = root, stop_at, before, fault
        self.calls = 0
        self._inodes: dict[int, _Inode] = {}
        self._tree = self._scan(root, durable=True)

    # --- watching ------------------------------------------------------------------------------------------

    @contextmanager
    def on(self, patch: Any) -> Iterator[Power]:
        """Watch, count and stop; ``patch`` is pytest's monkeypatch."""
        with patch.context() as inner:
            for name in CALLS:
                inner.setattr(os, name, self._wrapped(name, getattr(os, name)))
            inner.setattr(os, "open", self._opening(os.open))
            yield self

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.fault is not None:
                if self.calls == self.stop_at:
                    raise self.fault(name)
                return real(*args, **kwargs)
            if self.calls > self.stop_at or (self.calls == self.stop_at and self.before):
                raise PowerCut
            result = real(*args, **kwargs)
            if name == "fsync":
                self._synced(args[0])
            if self.calls == self.stop_at:
                raise PowerCut
            return result

        return call

    def _opening(self, real: Callable[..., int]) -> Callable[..., int]:
        def call(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            fd = real(path, flags, *args, **kwargs)
            if flags & os.O_CREAT and os.fstat(fd).st_size == 0:
                self._inodes[os.fstat(fd).st_ino] = _Inode()  # a new file, whatever had this number before
            return fd

        return call

    def _synced(self, fd: int) -> None:
        path = Path(f"/proc/self/fd/{fd}").readlink()
        if not path.is_relative_to(self.root):
            return
        found = os.fstat(fd)
        if stat.S_ISREG(found.st_mode):
            self._inode(found.st_ino).durable = path.read_bytes()
        else:
            tree = self._find(path)
            if tree is not None:
                known = dict(tree.names)
                tree.names = {entry.name: self._node(entry, known.get(entry.name)) for entry in os.scandir(path)}

    def _inode(self, number: int) -> _Inode:
        return self._inodes.setdefault(number, _Inode())

    def _node(self, entry: os.DirEntry[str], known: _Inode | _Tree | None) -> _Inode | _Tree:
        if entry.is_dir(follow_symlinks=False):
            return known if isinstance(known, _Tree) else _Tree()
        return self._inode(entry.inode())

    def _find(self, folder: Path) -> _Tree | None:
        """The durable names of a folder; None while the folder itself is not durable."""
        node: _Inode | _Tree = self._tree
        for part in folder.relative_to(self.root).parts:
            if not isinstance(node, _Tree):
                return None
            # A folder whose own name is not durable yet is followed all the same: the parent's fsync comes later.
            node = node.names.setdefault(part, _Tree())
        return node if isinstance(node, _Tree) else None

    def _scan(self, folder: Path, durable: bool) -> _Tree:
        tree = _Tree()
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False):
                tree.names[entry.name] = self._scan(Path(entry.path), durable)
            else:
                inode = self._inode(entry.inode())
                inode.durable = Path(entry.path).read_bytes() if durable else None
                tree.names[entry.name] = inode
        return tree

    # --- after the cut -------------------------------------------------------------------------------------

    def left_behind(self, target: Path, loss: Loss) -> Path:
        """Write what is left of the tree to a new folder."""
        if loss is Loss.UNSYNCED:
            self._write(self._tree, target)
        else:
            shutil.copytree(self.root, target)
            if loss is Loss.TORN:
                self._tear(target)
        for path in self.root.rglob("*.db*"):
            copy = target / path.relative_to(self.root)
            if copy.parent.is_dir():
                shutil.copyfile(path, copy)
        return target

    def _write(self, tree: _Tree, target: Path) -> None:
        target.mkdir(exist_ok=True)
        for name, node in tree.names.items():
            if isinstance(node, _Tree):
                self._write(node, target / name)
            else:
                (target / name).write_bytes(node.durable or b"")
                if name in ("key", "log.key", "model.key"):
                    (target / name).chmod(0o600)

    def _tear(self, target: Path) -> None:
        for path in self.root.rglob("*"):
            if path.is_file() and not path.is_symlink() and ".db" not in path.name:
                data, known = path.read_bytes(), self._inodes.get(path.stat().st_ino)
                if known is None or known.durable != data:
                    copy = target / path.relative_to(self.root)
                    copy.chmod(0o644)
                    copy.write_bytes(data[: len(data) // 2])
