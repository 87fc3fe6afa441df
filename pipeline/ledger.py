"""The append-only record of what happened to a lineage.

In: events. Out: numbered, dated entries, each chained to its predecessor by digest, and with every transaction a signed
checkpoint: the RFC 6962 root over all entries so far (C2SP tlog-checkpoint). Never: a text, a contact, an entry changed
or removed, an entry without a signature over it. The newest checkpoint is also written beside the database; whoever
keeps a copy of it elsewhere can tell a history that was rewritten or cut back later, even by the owner of the key.

A leaf of the log is the canonical JSON of ``{"at", "event", "previous", "seq"}``, the bytes whose SHA-256 is the
entry's digest.

Every read fetches every row; `pipeline.chain` says what of them is sound.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from pipeline.chain import (
    GENESIS,
    Checked,
    Row,
    check_rows,
    check_signed,
    check_sound,
    leaf_data,
    leaf_of,
    read_row,
    remember,
    time_text,
)
from pipeline.databases import declarations, declared_by
from pipeline.errors import NoSpace, NotAWorkspace, StoreDamaged, TakedownError, UsageError, WorkspaceBusy
from pipeline.files import (
    canonical_json,
    digest_bytes,
    explained_space,
    put_in_place,
    read_whole,
    seal,
    unreadable,
    write_atomic,
)
from pipeline.keys import load_log_key, log_vkey
from pipeline.merkle import Frontier, leaf_hash, root_of_hashes
from pipeline.notes import MAX_NOTE_BYTES, Checkpoint, checkpoint_text, parse_vkey, read_checkpoint, sign_note
from pipeline.records import Break, Event, LedgerEntry

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
    "CREATE TABLE checkpoints (size INTEGER PRIMARY KEY, note TEXT NOT NULL)",
    "CREATE TRIGGER checkpoints_no_update BEFORE UPDATE ON checkpoints"
    " BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    "CREATE TRIGGER checkpoints_no_delete BEFORE DELETE ON checkpoints"
    " BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    "CREATE TRIGGER checkpoints_in_order BEFORE INSERT ON checkpoints"
    " WHEN NEW.size IS NOT (SELECT max(seq) FROM entries) OR NEW.size IN (SELECT size FROM checkpoints)"
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


class Image(NamedTuple):
    """A database, every byte of it.

    Attributes:
        entries: How many it holds.
        pages: Its pages: the bytes of its file, once what a writer left beside it is folded in.
        behind: How many bytes of the file follow behind the last page; none in a sound one.
    """

    entries: int
    pages: bytes
    behind: int


class Ledger:
    """An open ledger. Get one from `Ledger.create` or `Ledger.open`; use it in the thread that opened it.

    The keys are those in ``keys/`` beside the database: the private one is read when something is appended.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self.keys = path.parent / "keys"
        self.checkpoint_file = path.parent / "checkpoint"
        self._connection = connection

    @classmethod
    def create(cls, path: Path) -> Ledger:
        """Make an empty ledger beside its keys, whole or not at all, and open it.

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
            with fresh.open("rb") as stream:
                seal(stream, 0o644)
            put_in_place(fresh, path)
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
            StoreDamaged: The file is not a ledger, or (for writing) it ends before the newest checkpoint beside it.
        """
        if not path.is_file():
            raise NotAWorkspace(f"{path}: there is no ledger. Name a workspace, or make one with `takedown init`.")
        with _explained(path):
            if not read_only:
                connection = _connect(path, "mode=rw", timeout_s)
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=FULL")
                opened = cls(path, connection)
                opened._mend_checkpoint_file()
                return opened
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
        """Write events and a signed checkpoint over them in one transaction: all of it, or after an error nothing.

        Args:
            *events: What happened, in order. References only: ids and digests, never a text.
            at: When, with zone; now by default.

        Returns:
            The entries as stored.

        Raises:
            WorkspaceBusy: Another process is writing.
            NoSpace: The disk is full or read-only. Where only the checkpoint file could not be written, it says so.
            StoreDamaged: An entry does not hold, or the entries are not those that were signed; nothing is built or
                signed on top of that.
            UsageError: A key cannot be read.
            ValueError: An event's data is not JSON (NaN), or ``at`` has no zone.
        """
        time = time_text(at or datetime.now(UTC))
        for event in events:
            canonical_json(event.data)  # refuses what pydantic would write as null: NaN, infinity
        trees = [event.model_dump(mode="json") for event in events]
        entries: list[LedgerEntry] = []
        with _explained(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                before = self._sound(self._rows(), self.checkpoint())
                seq, previous = (len(before.rows), before.entries[-1].digest) if before.rows else (0, GENESIS)
                rows = list[tuple[Any, ...]]()
                for tree in trees:
                    seq += 1
                    text = canonical_json(tree).decode()
                    digest = digest_bytes(leaf_data(seq, time, text, previous))
                    row = Row(seq, time, text, previous, digest)
                    self._connection.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?)", row)
                    entry, found = read_row(row)
                    if entry is None or found:
                        raise ValueError(f"event {tree['kind']!r} does not survive being written: {found}")
                    entries.append(entry)
                    rows.append(tuple(row))
                    previous = digest
                after = before.grown(rows, entries)
                if entries:
                    note = self._sign(after.frontier)
                    self._connection.execute("INSERT INTO checkpoints VALUES (?, ?)", (seq, note))
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
        remember(after)
        if entries:
            self._write_checkpoint_file(note, len(entries))
        return tuple(entries)

    def _write_checkpoint_file(self, note: str, written: int) -> None:
        try:
            write_atomic(self.checkpoint_file, note.encode())
        except NoSpace as error:
            raise NoSpace(
                f"{self.checkpoint_file}: cannot be written. The ledger's {written} new entries are there and signed; "
                "only this copy of the newest checkpoint is old. Free some space; the next writing command renews it."
            ) from error

    def checkpoint(self) -> str | None:
        """The newest signed checkpoint, a C2SP note; None while the ledger is empty."""
        with _explained(self.path):
            rows = self._connection.execute("SELECT note FROM checkpoints ORDER BY size DESC LIMIT 1").fetchall()
        return str(rows[0][0]) if rows else None

    def leaves(self) -> list[bytes]:
        """The bytes of every leaf of the log, in order, as they are found; `examine` says whether they hold."""
        with _explained(self.path):
            return [leaf_of(Row(*row)) for row in self._rows()]

    def count(self) -> int:
        """How many entries there are, read or not.

        Raises:
            StoreDamaged: It cannot be read.
        """
        with _explained(self.path):
            ((entries,),) = self._connection.execute("SELECT count(*) FROM entries").fetchall()
        return int(entries)

    def image(self) -> Image:
        """The whole database as one reader sees it, whatever another process writes meanwhile.

        Raises:
            StoreDamaged: It cannot be read.
        """
        with _explained(self.path), self._snapshot():
            entries = self.count()
            pages, log = self._connection.serialize(), self.path.with_name(self.path.name + "-wal")
            # Pages that a writer has not folded into the file yet may make it longer.
            folded = not (log.exists() and log.stat().st_size)
            return Image(entries, pages, max(0, self.path.stat().st_size - len(pages)) if folded else 0)

    def _sign(self, frontier: Frontier) -> str:
        origin = parse_vkey(log_vkey(self.keys)).name
        key = load_log_key(self.keys)
        return sign_note(checkpoint_text(Checkpoint(origin, frontier.size, frontier.root())), origin, key)

    def _sound(self, rows: list[tuple[Any, ...]], note: str | None) -> Checked:
        """Rows that hold, and that the newest checkpoint signs.

        Raises:
            StoreDamaged: An entry was changed, removed, inserted or not signed.
            UsageError: The public key cannot be read.
        """
        try:
            signed = read_checkpoint((note or "").encode("utf-8", "surrogateescape"), log_vkey(self.keys))
            taken = check_signed(rows, signed)
        except (StoreDamaged, UsageError):
            taken = None
        if taken is None:  # what is wrong with an entry tells more than that the root is not theirs
            taken = check_sound(self.path, rows)
            self._require_signed(taken, note, log_vkey(self.keys))
        return taken

    def _require_signed(self, checked: Checked, note: str | None, vkey: str) -> None:
        """The newest checkpoint must be signed by the lineage's key, over exactly these rows.

        Raises:
            StoreDamaged: It is not.
        """
        if note is None and not checked.rows:
            return
        size = "there is none"
        if note is not None:
            try:
                signed = read_checkpoint(note.encode("utf-8", "surrogateescape"), vkey)
            except StoreDamaged as error:
                raise StoreDamaged(f"{self.path}: its newest checkpoint does not hold: {error}") from error
            if (signed.size, signed.root) == (checked.frontier.size, checked.frontier.root()):
                return
            size = str(signed.size)
        raise StoreDamaged(
            f"{self.path}: its {len(checked.rows)} entries are not those of its last signed checkpoint ({size}). "
            "Nothing is shown of them or written after them; `takedown verify` lists all breaks."
        )

    def _mend_checkpoint_file(self) -> None:
        """Write the newest checkpoint beside the database, where a process died before it could.

        Raises:
            StoreDamaged: The file holds a checkpoint that this ledger does not continue: it was cut back or rewritten.
        """
        note = self.checkpoint()
        try:
            found = read_whole(self.checkpoint_file, MAX_NOTE_BYTES)
        except FileNotFoundError:
            found = b""
        except OSError as error:
            raise StoreDamaged(f"{self.checkpoint_file}: {unreadable(error)}. Remove it and run again.") from error
        if found == (note or "").encode():
            return
        self._refuse_contradicted(found, [leaf_hash(leaf) for leaf in self.leaves()])
        if note is not None:
            write_atomic(self.checkpoint_file, note.encode())

    def _refuse_contradicted(self, note: bytes, hashes: Sequence[bytes]) -> None:
        if (contradiction := self._contradicted(note, hashes)) is not None:
            raise StoreDamaged(
                f"{self.path}: {self.checkpoint_file.name} {contradiction}: the ledger was cut back, rewritten or is "
                "an older copy. Restore the newest one; `takedown verify` lists all breaks."
            )

    def _contradicted(self, note: bytes, hashes: Sequence[bytes]) -> str | None:
        """How a checkpoint of this lineage contradicts the entries; None where it does not, or is none of ours."""
        try:
            signed = read_checkpoint(note, log_vkey(self.keys))
        except StoreDamaged:
            return None  # `verify` names it until the next writer puts the right one there
        if signed.size > len(hashes):
            return f"signs {signed.size} entries, the ledger has {len(hashes)}"
        if root_of_hashes(hashes[: signed.size]) != signed.root:
            return f"signs {signed.size} entries, and others than the first {signed.size} of the ledger"
        return None

    def entries(self) -> tuple[LedgerEntry, ...]:
        """All entries, oldest first: the whole chain checked, and that they are those that were signed last.

        A reader who may not read the public key gets them without a check of the signature; `verify` says so.

        Raises:
            StoreDamaged: An entry was changed, removed, inserted or not signed, or the checkpoint beside the database
                signs more or others.
        """
        beside = self._beside()  # first: a writer commits and then renews it, so the database holds what it signs
        with _explained(self.path), self._snapshot():
            rows, note = self._rows(), self.checkpoint()
        try:
            checked = self._sound(rows, note)
        except UsageError:
            return check_sound(self.path, rows).entries
        if beside != (note or "").encode():
            self._refuse_contradicted(beside, checked.hashes)
        return checked.entries

    def _beside(self) -> bytes:
        """The checkpoint beside the database; empty where it cannot be read: `verify` names that."""
        try:
            return read_whole(self.checkpoint_file, MAX_NOTE_BYTES)
        except OSError:
            return b""

    def check(self) -> list[Break]:
        """Check everything that can be checked inside the ledger; never raises, whatever it holds."""
        return self.examine()[1]

    def examine(self, every_signature: bool = True) -> tuple[tuple[LedgerEntry, ...], list[Break]]:
        """Like `check`, and return every entry that can still be read, sound or not.

        Args:
            every_signature: Verify each checkpoint's signature; otherwise that of the newest only. Roots are always
                recomputed.
        """
        name = self.path.name
        breaks: list[Break] = []
        entries: list[LedgerEntry] = []
        beside = self._beside()
        try:
            with self._snapshot():
                for (line,) in self._connection.execute("PRAGMA integrity_check"):
                    if line != "ok":
                        means = "The database file was changed outside SQLite, or its disk is failing."
                        breaks.append(Break(where=name, found=str(line), means=means))
                breaks += self._check_schema()
                rows = self._rows()
                entries, found = check_rows(name, rows)
                breaks += found
                breaks += self._check_counter(rows)
                breaks += self._check_checkpoints(rows, every_signature, beside)
        except (sqlite3.Error, UnicodeDecodeError) as error:
            means = "The ledger was changed outside this product, or its disk is failing. Restore it from a backup."
            breaks.append(Break(where=name, found=f"cannot be read ({error})", means=means))
        return tuple(entries), breaks

    def _check_counter(self, rows: Sequence[tuple[Any, ...]]) -> list[Break]:
        """The highest number ever given, kept by SQLite beside the table, must be that of the last row."""
        used = self._connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'entries'").fetchall()
        last = rows[-1][0] if rows else 0
        if used == [(last,)] or not (used or rows):
            return []
        found = f"SQLite counts {used[0][0] if used else 'no'} entries written, the last one is {last}"
        return [Break(where=self.path.name, found=found, means="The newest entries were removed or replaced.")]

    def _check_checkpoints(self, rows: Sequence[tuple[Any, ...]], every_signature: bool, beside: bytes) -> list[Break]:
        """Every checkpoint must be signed by the lineage's key, over exactly the entries that precede it."""
        name, means = self.path.name, "The history was changed after it was signed, or signed by somebody else."
        try:
            vkey = log_vkey(self.keys)
        except (TakedownError, OSError) as error:
            lost = "Without the public key nobody can tell who signed this history. Restore it from a copy."
            return [Break(where=f"{self.keys.name}/log.pub", found=str(error), means=lost)]
        notes = dict(self._connection.execute("SELECT size, note FROM checkpoints ORDER BY size"))
        breaks, frontier, hashes = [], Frontier(), [leaf_hash(leaf_of(Row(*row))) for row in rows]
        for hash_ in hashes:
            frontier.append(hash_)
            note = notes.get(frontier.size)
            if note is None or not (every_signature or frontier.size == len(rows)):
                continue
            where = f"{name}: checkpoint {frontier.size}"
            try:
                signed = read_checkpoint(str(note).encode("utf-8", "surrogateescape"), vkey)
            except StoreDamaged as error:
                breaks.append(Break(where=where, found=str(error), means=means))
                continue
            if (signed.size, signed.root) != (frontier.size, frontier.root()):
                found = f"signs {signed.size} entries with another root than entries 1 to {frontier.size} have"
                breaks.append(Break(where=where, found=found, means=means))
        sizes = range(1, len(rows) + 1)
        for size in sorted((size for size in notes if size not in sizes), key=str):  # after damage it may be anything
            found = f"signs {str(size)[:80]} entries, there are {len(rows)}"
            breaks.append(Break(where=f"{name}: checkpoint {str(size)[:80]}", found=found, means=means))
        last = max((size for size in notes if isinstance(size, int)), default=0)
        if last != len(rows):
            found = f"the last checkpoint signs {last} entries, there are {len(rows)}"
            unsigned = "Entries were removed after they were signed, or written by somebody without the key."
            breaks.append(Break(where=name, found=found, means=unsigned))
        return breaks + self._check_checkpoint_file(notes.get(last), hashes, beside)

    def _check_checkpoint_file(self, newest: object, hashes: Sequence[bytes], before: bytes) -> list[Break]:
        """The file beside the database must hold the newest checkpoint.

        Args:
            newest: The newest note in the database.
            hashes: Leaf hashes of all entries.
            before: What the file held before the database was read: a running writer may have renewed it meanwhile.
        """
        where = self.checkpoint_file.name
        if newest is None:
            if not self.checkpoint_file.exists():
                return []
            found_text = "is there, but the ledger holds no checkpoint"
            return [Break(where=where, found=found_text, means="The ledger was emptied or exchanged.")]
        try:
            found = read_whole(self.checkpoint_file, MAX_NOTE_BYTES)
        except OSError as error:
            means = "Whoever keeps copies of it has no newest one to compare with. Any writing command restores it."
            return [Break(where=where, found=unreadable(error), means=means)]
        if str(newest).encode("utf-8", "surrogateescape") in (found, before):
            return []
        # A copy that changed meanwhile is a running writer's, and may sign more than was read here.
        if (contradiction := self._contradicted(before if found != before else found, hashes)) is not None:
            means = "The ledger was cut back or rewritten after this checkpoint was signed, or is an older copy."
            return [Break(where=where, found=contradiction, means=means)]
        if found != before:
            return []
        means = (
            "It is older than the ledger: a command was interrupted, and the next writing one mends it; or it was "
            "exchanged. Compare with a checkpoint kept elsewhere: takedown verify --checkpoint FILE."
        )
        return [Break(where=where, found="is not the newest checkpoint of the ledger", means=means)]

    def _rows(self) -> list[tuple[Any, ...]]:
        """All rows as they are found; SQLite's own decoding is fast, ours takes what is no text, too."""
        try:
            self._connection.text_factory = str
            return self._connection.execute(f"{_SELECT} ORDER BY seq").fetchall()
        except sqlite3.OperationalError:
            self._connection.text_factory = _text
            return self._connection.execute(f"{_SELECT} ORDER BY seq").fetchall()
        finally:
            self._connection.text_factory = _text

    @contextmanager
    def _snapshot(self) -> Iterator[None]:
        """One state of the database for several statements, whatever another process commits meanwhile."""
        self._connection.execute("BEGIN")
        try:
            yield
        finally:
            if self._connection.in_transaction:  # SQLite ends it itself after some errors
                self._connection.execute("ROLLBACK")

    def _check_schema(self) -> list[Break]:
        """Tables and triggers must be exactly those that `create` makes."""
        expected = declared_by(SCHEMA)
        found = declarations(self._connection)
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
