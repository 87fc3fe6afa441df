"""The append-only record of what happened to a lineage.

In: events. Out: numbered, dated entries, each chained to its predecessor by digest. Never: a text, a contact, an
entry changed or removed. The chain shows any change inside it; that the newest entries were cut off, or that
everything after some point was rewritten, shows only against a digest noted elsewhere (`Ledger.head`).
"""

from __future__ import annotations

import json
import os
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from pipeline.errors import NoSpace, NotAWorkspace, StoreDamaged, UsageError, WorkspaceBusy
from pipeline.files import canonical_json, digest_json, explained_space, fsync_folder
from pipeline.records import Break, Event, LedgerEntry, Record

GENESIS = "genesis:takedown-pipeline-ledger-1"
"""What the first entry names as its predecessor."""

APPLICATION_ID = 0x54444C31
"""``TDL1`` in the database header: tells a ledger from any other SQLite file."""

SCHEMA = (
    # AUTOINCREMENT keeps the highest number ever used in sqlite_sequence: a plain DELETE of the last rows shows.
    "CREATE TABLE entries (seq INTEGER PRIMARY KEY AUTOINCREMENT, at TEXT NOT NULL, event TEXT NOT NULL,"
    " previous TEXT NOT NULL, digest TEXT NOT NULL)",
    "CREATE TRIGGER entries_no_update BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'the ledger is append-only');"
    " END",
    "CREATE TRIGGER entries_no_delete BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'the ledger is append-only');"
    " END",
    # INSERT OR REPLACE would delete without firing the trigger above.
    "CREATE TRIGGER entries_in_order BEFORE INSERT ON entries"
    " WHEN NEW.seq IS NOT (SELECT coalesce(max(seq), 0) + 1 FROM entries)"
    " BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
)

_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_CANNOT_WRITE = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY}
_READ_FAILED = {sqlite3.SQLITE_IOERR_READ, sqlite3.SQLITE_IOERR_SHORT_READ}


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into ours; wrong calls and refused statements pass through."""

    def damaged(found: object) -> StoreDamaged:
        return StoreDamaged(f"{path}: is not a readable ledger ({found}). Restore it from a backup.")

    try:
        yield
    except (sqlite3.ProgrammingError, sqlite3.IntegrityError):
        raise
    except UnicodeDecodeError as error:  # sqlite3 decodes names and messages itself; damage puts any bytes there
        raise damaged("its schema is not text") from error
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
        kind = code & 0xFF
        if kind in _BUSY:
            raise WorkspaceBusy(
                f"{path}: another process is writing to the ledger. Nothing was written; try again when it is done."
            ) from error
        if kind in _CANNOT_WRITE or (kind == sqlite3.SQLITE_IOERR and code not in _READ_FAILED):
            raise NoSpace(
                f"{path}: cannot be written ({error}). Nothing was written; free some space or make the disk "
                "writable and run the same command again."
            ) from error
        if kind == sqlite3.SQLITE_CANTOPEN:
            raise NotAWorkspace(f"{path}: cannot be opened ({error}). Check the path and its permissions.") from error
        raise damaged(error) from error


def _text(raw: bytes) -> str:
    """Decode a stored text; bytes that are not UTF-8 survive as surrogates and then fail their digest."""
    return raw.decode("utf-8", "surrogateescape")


def _connect(path: Path, options: str, timeout_s: float) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?{options}"
    connection = sqlite3.connect(uri, uri=True, timeout=timeout_s, isolation_level=None)
    connection.text_factory = _text
    try:
        found = connection.execute("PRAGMA application_id").fetchone()[0]
        if found != APPLICATION_ID:
            raise StoreDamaged(
                f"{path}: is not a ledger (application id {found:#x}, expected {APPLICATION_ID:#x}). "
                "Restore it from a backup."
            )
        connection.execute("SELECT seq, at, event, previous, digest FROM entries LIMIT 1").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


@cache
def _expected_schema() -> dict[str, str]:
    with closing(sqlite3.connect(":memory:")) as connection:
        for statement in SCHEMA:
            connection.execute(statement)
        return dict(connection.execute("SELECT name, sql FROM sqlite_master"))


def _time_text(at: datetime) -> str:
    """A moment as stored: UTC, microseconds, always 27 characters."""
    if at.tzinfo is None:
        raise ValueError("a ledger time needs a zone")
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ").rjust(27, "0")


def _entry_digest(seq: int, at: str, event: Any, previous: str) -> str:
    return digest_json({"seq": seq, "at": at, "event": event, "previous": previous})


class _Row(NamedTuple):
    """A row as it is found; after tampering a column may hold anything."""

    seq: Any
    at: Any
    event: Any
    previous: Any
    digest: Any


def _read_row(row: _Row) -> tuple[LedgerEntry | None, list[str]]:
    """Check one row by itself: well-formed, canonical, and matching its own digest."""
    if not isinstance(row.seq, int) or not all(isinstance(value, str) for value in row[1:]):
        return None, ["a column does not hold the kind of value it should"]
    found = []
    try:
        tree = json.loads(row.event)
        event = Event.model_validate(tree)
        at = datetime.fromisoformat(row.at)
        if at.tzinfo is None or _time_text(at) != row.at:
            found.append("the time is not in the form that is written")
        if canonical_json(tree).decode() != row.event:
            found.append("the event is not in the form that is written")
        digest = _entry_digest(row.seq, row.at, tree, row.previous)
    except (ValueError, RecursionError, OverflowError) as error:  # ValidationError is a ValueError
        what = "fields that are not an event's" if isinstance(error, ValidationError) else str(error)
        return None, [f"time or event cannot be read ({what})"]
    if digest != row.digest:
        found.append(f"content does not match its digest (stored {row.digest[:80]!r}, computed {digest})")
    try:
        entry = LedgerEntry(seq=row.seq, at=at, event=event, previous=row.previous, digest=row.digest)
    except ValidationError:  # text that is not Unicode
        return None, [*found, "a column holds text that cannot be read"]
    return entry, found


def _check_rows(name: str, rows: Iterable[_Row]) -> tuple[list[LedgerEntry], list[Break]]:
    """Read all rows, in order; also check numbering and chain.

    Returns:
        Every entry that could be read, sound or not, and every break.
    """
    entries, breaks = [], []
    seq, previous = 0, GENESIS
    for row in rows:
        where = f"{name}: entry {row.seq}"
        if row.seq != seq + 1:
            gap = f"entry {seq + 1}" if row.seq == seq + 2 else f"the entries after {seq}"
            breaks.append(Break(where=where, found=f"{gap} missing before it", means="Entries were removed."))
        elif row.previous != previous:
            breaks.append(
                Break(
                    where=where,
                    found=f"names {str(row.previous)[:80]!r} as its predecessor, which has {str(previous)[:80]!r}",
                    means="This entry or the one before it was changed, inserted or replaced after it was written.",
                )
            )
        entry, found = _read_row(row)
        breaks += [Break(where=where, found=f, means="It was changed after it was written.") for f in found]
        if entry is not None:
            entries.append(entry)
        seq, previous = (row.seq if isinstance(row.seq, int) else seq + 1), row.digest
    return entries, breaks


class Ledger:
    """An open ledger. Get one from `Ledger.create` or `Ledger.open`; use it in the thread that opened it."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection

    @classmethod
    def create(cls, path: Path) -> Ledger:
        """Make an empty ledger, whole or not at all, and open it.

        Raises:
            UsageError: Something is already there.
            NoSpace: The disk is full or read-only.
        """
        if path.exists():
            raise UsageError(f"{path}: exists already. Open it, or choose another folder.")
        with explained_space(path), tempfile.TemporaryDirectory(prefix=".tmp-", dir=path.parent) as folder:
            fresh = Path(folder) / path.name
            with _explained(fresh), closing(sqlite3.connect(fresh, isolation_level=None)) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=FULL")
                connection.execute("BEGIN IMMEDIATE")
                connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
                for statement in SCHEMA:
                    connection.execute(statement)
                connection.execute("COMMIT")
            fd = os.open(fresh, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            fresh.replace(path)
            fsync_folder(path.parent)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path, read_only: bool = False, timeout_s: float = 30.0) -> Ledger:
        """Open an existing ledger.

        Args:
            path: The database file.
            read_only: For readers; works while another process writes, and on a read-only disk.
            timeout_s: How long to wait for another writer before `WorkspaceBusy`.

        Raises:
            NotAWorkspace: There is no such file, or it may not be opened.
            StoreDamaged: The file is not a ledger.
        """
        if not path.is_file():
            raise NotAWorkspace(f"{path}: there is no ledger. Name a workspace, or make one with `takedown init`.")
        with _explained(path):
            if not read_only:
                connection = _connect(path, "mode=rw", timeout_s)
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=FULL")
                return cls(path, connection)
            try:
                return cls(path, _connect(path, "mode=ro", timeout_s))
            except sqlite3.OperationalError:
                # A reader of a WAL database must create its -shm file. Where the folder cannot be written nobody else
                # writes either: read the file as it is, unless a log beside it holds more.
                wal = path.with_name(path.name + "-wal")
                if os.access(path.parent, os.W_OK) or (wal.exists() and wal.stat().st_size):
                    raise
                return cls(path, _connect(path, "mode=ro&immutable=1", timeout_s))

    def close(self) -> None:
        """Close the ledger; closing twice is fine."""
        self._connection.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def append(self, *events: Event, at: datetime | None = None) -> tuple[LedgerEntry, ...]:
        """Write events in one transaction: all of them are in the ledger on return, none after an error.

        Args:
            *events: What happened, in order. References only: ids and digests, never a text.
            at: When, with zone; now by default.

        Returns:
            The entries as stored.

        Raises:
            WorkspaceBusy: Another process is writing.
            NoSpace: The disk is full or read-only.
            StoreDamaged: The newest entry does not hold; nothing is built on it.
            ValueError: An event's data is not JSON (NaN), or ``at`` has no zone.
        """
        time = _time_text(at or datetime.now(UTC))
        for event in events:
            canonical_json(event.data)  # refuses what pydantic would write as null: NaN, infinity
        trees = [event.model_dump(mode="json") for event in events]
        entries: list[LedgerEntry] = []
        with _explained(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                last = self.head()
                seq, previous = (last.seq, last.digest) if last else (0, GENESIS)
                for tree in trees:
                    seq += 1
                    digest = _entry_digest(seq, time, tree, previous)
                    row = _Row(seq, time, canonical_json(tree).decode(), previous, digest)
                    self._connection.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?)", row)
                    entry, found = _read_row(row)
                    if entry is None or found:
                        raise ValueError(f"event {tree['kind']!r} does not survive being written: {found}")
                    entries.append(entry)
                    previous = digest
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
        return tuple(entries)

    def head(self) -> LedgerEntry | None:
        """The newest entry, or None. Its digest stands for the whole ledger: note it elsewhere.

        Raises:
            StoreDamaged: The entry does not match its own digest.
        """
        with _explained(self.path):
            rows = self._connection.execute(f"{_SELECT} ORDER BY seq DESC LIMIT 1").fetchall()
        if not rows:
            return None
        entry, found = _read_row(_Row(*rows[0]))
        if entry is None or found:
            raise StoreDamaged(
                f"{self.path}: entry {rows[0][0]}: {'; '.join(found)}. `takedown verify` lists all breaks."
            )
        return entry

    def entries(self) -> tuple[LedgerEntry, ...]:
        """All entries, oldest first, with the whole chain checked.

        Raises:
            StoreDamaged: An entry was changed, removed or inserted.
        """
        with _explained(self.path):
            entries, breaks = _check_rows(self.path.name, self._rows())
        if breaks:
            first = breaks[0]
            raise StoreDamaged(
                f"{self.path}: does not hold in {len(breaks)} places, first {first.where}: {first.found}. "
                "`takedown verify` lists all breaks."
            )
        return tuple(entries)

    def check(self) -> list[Break]:
        """Check everything that can be checked inside the ledger; never raises, whatever it holds."""
        return self.examine()[1]

    def examine(self) -> tuple[tuple[LedgerEntry, ...], list[Break]]:
        """Like `check`, and return every entry that can still be read, sound or not."""
        name = self.path.name
        breaks: list[Break] = []
        entries: list[LedgerEntry] = []
        try:
            for (line,) in self._connection.execute("PRAGMA integrity_check"):
                if line != "ok":
                    means = "The database file was changed outside SQLite, or its disk is failing."
                    breaks.append(Break(where=name, found=str(line), means=means))
            breaks += self._check_schema()
            rows = list(self._rows())
            entries, found = _check_rows(name, rows)
            breaks += found
            # The highest number ever given, kept by SQLite beside the table.
            used = self._connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'entries'").fetchall()
            last = rows[-1].seq if rows else 0
            if (used or rows) and used != [(last,)]:
                found_text = f"SQLite counts {used[0][0] if used else 'no'} entries written, the last one is {last}"
                breaks.append(Break(where=name, found=found_text, means="The newest entries were removed or replaced."))
        except (sqlite3.Error, UnicodeDecodeError) as error:
            means = "The ledger was changed outside this product, or its disk is failing. Restore it from a backup."
            breaks.append(Break(where=name, found=f"cannot be read ({error})", means=means))
        return tuple(entries), breaks

    def _rows(self) -> Iterator[_Row]:
        return (_Row(*row) for row in self._connection.execute(f"{_SELECT} ORDER BY seq"))

    def _check_schema(self) -> list[Break]:
        """Tables and triggers must be exactly those that `create` makes."""
        expected = _expected_schema()
        found = dict(self._connection.execute("SELECT name, sql FROM sqlite_master"))
        means = "Entries could be, or have been, changed or removed without being refused."
        return [
            Break(
                where=f"{self.path.name}: {name}",
                found="is missing" if name not in found else "is foreign" if name not in expected else "was changed",
                means=means,
            )
            for name in sorted(expected.keys() | found.keys(), key=str)
            if found.get(name) != expected.get(name) or (name in found) != (name in expected)
        ]


_SELECT = "SELECT seq, at, event, previous, digest FROM entries"


# --- what the entries say ---------------------------------------------------------------------------------

State = Literal["waiting", "repeat", "folded", "empty", "not-memorised", "applied", "refused"]
DECISIONS: dict[str, State] = {
    "repeat": "repeat",
    "folded": "folded",
    "empty": "empty",
    "not-memorised": "not-memorised",
    "applied": "applied",
    "refused": "refused",
}
"""Events that decide a request, with the state that they lead to."""


class RequestState(Record):
    """Where a request stands.

    Attributes:
        request_id: The request.
        state: ``waiting``: received, nothing decided; ``refused``: the gate refused the last attempt, it is still to
            be done; the others are final.
        batch_id: Batch that it arrived in.
        received_at: When, as the batch says.
        decided_at: When the state was reached; None while waiting.
        version: Version named by the decision: for ``applied`` the first one that excludes the text.
        run_id: Run that decided.
        commitment: Binds the entry to the text in the vault without showing it.
    """

    request_id: str
    state: State
    batch_id: str
    received_at: datetime
    decided_at: datetime | None = None
    version: int | None = None
    run_id: str | None = None
    commitment: str | None = None


def current_version(entries: Sequence[LedgerEntry]) -> int:
    """The version that is in force: that of the latest ``initialised`` or ``published`` event.

    Raises:
        NotAWorkspace: There is none: ``takedown init`` did not finish.
    """
    for entry in reversed(entries):
        if entry.event.kind in ("initialised", "published") and entry.event.version is not None:
            return entry.event.version
    raise NotAWorkspace("The ledger names no version: `takedown init` did not finish. Run it again.")


def request_states(entries: Iterable[LedgerEntry]) -> dict[str, RequestState]:
    """Where every request stands, in the order received. A later decision replaces an earlier one.

    Raises:
        StoreDamaged: A decision about a request that was never received, or a ``received`` event without its fields.
    """
    states: dict[str, RequestState] = {}
    for entry in entries:
        event = entry.event
        if event.request_id is None:
            continue
        known = states.get(event.request_id)
        if event.kind == "received":
            if known is None:
                fields = {key: event.data.get(key) for key in ("batch_id", "received_at", "commitment")}
                try:
                    states[event.request_id] = RequestState.model_validate(
                        {"request_id": event.request_id, "state": "waiting", **fields}
                    )
                except ValidationError as error:
                    raise StoreDamaged(
                        f"ledger entry {entry.seq}: 'received' needs data.batch_id and data.received_at. "
                        "Run `takedown verify`."
                    ) from error
        elif event.kind in DECISIONS:
            if known is None:
                raise StoreDamaged(
                    f"ledger entry {entry.seq}: request {event.request_id!r} is {event.kind} but was never received. "
                    "Run `takedown verify`."
                )
            states[event.request_id] = known.model_copy(
                update={
                    "state": DECISIONS[event.kind],
                    "decided_at": entry.at,
                    "version": event.version,
                    "run_id": event.run_id,
                }
            )
    return states


def known_batches(entries: Iterable[LedgerEntry]) -> set[str]:
    """Ids of all batches of which a request was received."""
    return {str(e.event.data["batch_id"]) for e in entries if e.event.kind == "received" and "batch_id" in e.event.data}
