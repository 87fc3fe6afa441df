"""A workspace: one model's lineage on disk, and the lock that lets one process write to it.

In: a folder. Out: its paths. Never: opens the model or the texts.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pipeline.errors import NotAWorkspace, WorkspaceBusy
from pipeline.files import read_json
from pipeline.ledger import Ledger
from pipeline.records import LedgerEntry
from pipeline.seals import renew
from pipeline.settings import Settings, read_settings

FORMAT = 2
"""Layout version; raised when an older release could misread a workspace."""


@dataclass(frozen=True)
class Workspace:
    """Paths of a workspace. Build one with `open_workspace`."""

    root: Path

    @property
    def marker(self) -> Path:
        return self.root / "workspace.json"

    @property
    def settings_file(self) -> Path:
        return self.root / "takedown.toml"

    @property
    def inbox(self) -> Path:
        return self.root / "inbox"

    @property
    def vault(self) -> Path:
        return self.root / "vault"

    @property
    def index(self) -> Path:
        return self.root / "index"

    @property
    def versions(self) -> Path:
        return self.root / "versions"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.db"

    @property
    def keys(self) -> Path:
        return self.root / "keys"

    @property
    def checkpoint(self) -> Path:
        """The newest signed checkpoint of the ledger; keep copies of it elsewhere."""
        return self.root / "checkpoint"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    @property
    def report_page(self) -> Path:
        """The page that `takedown report` writes where no other file is named; it has titles and rights holders."""
        return self.reports / "report.html"

    @property
    def register(self) -> Path:
        """The folder that `takedown export` writes where no other is named; it has titles and rights holders."""
        return self.reports / "export"

    @property
    def reference(self) -> Path:
        """Texts given at ``init``: ``retain/``, ``kept/`` and ``heldout/``."""
        return self.root / "reference"

    def folders(self) -> tuple[Path, ...]:
        """Every folder of the layout."""
        return (
            self.inbox, self.vault, self.index, self.versions, self.runs, self.reports,
            *(self.reference / kind for kind in ("retain", "kept", "heldout")),
        )  # fmt: skip

    def settings(self) -> Settings:
        """The settings as they are now."""
        return read_settings(self.settings_file)


def open_workspace(root: Path) -> Workspace:
    """Open an existing workspace.

    Raises:
        NotAWorkspace: The folder is not one, or belongs to a newer release.
    """
    workspace = Workspace(root.resolve())
    if not workspace.marker.is_file():
        raise NotAWorkspace(
            f"{root}: is not a takedown workspace (no workspace.json). "
            "Name one with -w or $TAKEDOWN_WORKSPACE, or make one with `takedown init --model DIR`."
        )
    marker = read_json(workspace.marker)
    found = marker.get("format") if isinstance(marker, dict) else marker
    if found != FORMAT:
        raise NotAWorkspace(f"{root}: has layout {found!r}, this release reads {FORMAT}. Use the release that made it.")
    return workspace


@contextmanager
def writing(workspace: Workspace) -> Iterator[None]:
    """Hold the workspace's one write lock. The kernel frees it when the process dies, however it dies.

    What was written is sealed at the end, unless it ends in an exception.

    Raises:
        WorkspaceBusy: Another process holds it; says which and since when.
        TakedownError: See `pipeline.seals.renew`.
    """
    fd = os.open(workspace.root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise WorkspaceBusy(
                f"{workspace.root}: is being written to by {_holder(os.pread(fd, 4096, 0))}. Nothing was changed; try "
                "again when it is done."
            ) from None
        os.ftruncate(fd, 0)
        who = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat()}
        os.pwrite(fd, json.dumps(who).encode(), 0)
        yield
        renew(workspace.root)
    finally:
        os.close(fd)


def lock_note(workspace: Workspace) -> tuple[str, datetime | None]:
    """Who noted that it has the write lock, in words, and since when. Nobody need hold it any more."""
    try:
        noted = (workspace.root / ".lock").read_bytes()
        since = datetime.fromisoformat(json.loads(noted)["since"])
    except (OSError, ValueError, LookupError, TypeError):
        return "another process", None
    return _holder(noted), since if since.tzinfo else since.replace(tzinfo=UTC)


def _holder(noted: bytes) -> str:
    """What the holder of the lock noted in it, in words; it may not have come to that yet."""
    try:
        who = json.loads(noted)
        return f"process {who['pid']} on {who['host']} since {who['since']}"
    except (ValueError, LookupError, TypeError):
        return "another process"


def read_entries(workspace: Workspace) -> tuple[LedgerEntry, ...]:
    """All ledger entries; reads only."""
    with Ledger.open(workspace.ledger, read_only=True) as ledger:
        return ledger.entries()
