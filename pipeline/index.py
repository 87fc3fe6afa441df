"""The index of everything taken down: SQLite, a row per takedown with fingerprints and signatures; no text, no pickle.

In: request ids with their texts. Out: takedowns that may share a passage with a text. Never: opens with other
parameters than it was made with.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from pipeline.errors import NoSpace, StoreDamaged, UsageError, WorkspaceBusy
from pipeline.files import canonical_json, digest_bytes, digest_json, write_atomic
from pipeline.shingles import (
    DedupeParameters,
    Prints,
    ShingledText,
    Signatures,
    WindowTable,
    shingle,
    sign,
)


class DedupeIndex:
    """Fingerprints and signatures of everything taken down: one SQLite file, no text. Build with `open`."""

    def __init__(self, path: Path, database: sqlite3.Connection, parameters: DedupeParameters) -> None:
        self.path = path
        self.parameters = parameters
        self._database = database
        self._table: WindowTable | None = None

    @classmethod
    def open(cls, folder: Path, parameters: DedupeParameters | None = None) -> Self:
        """Open the index of a folder, or begin an empty one.

        Args:
            folder: The workspace's ``index`` folder; made if absent.
            parameters: What the index must have been made with.

        Raises:
            UsageError: It was made with other parameters; each is named.
            StoreDamaged: The file is not a whole index.
        """
        parameters = parameters or DedupeParameters()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / "index.db"
        if not path.exists():
            # Made whole, then renamed: an index that is empty later is a damaged one, never a new one.
            write_atomic(path, _empty_index(parameters), 0o600)
        database = sqlite3.connect(path, timeout=30, isolation_level=None)
        try:
            with _explained(path):
                database.execute("PRAGMA synchronous = FULL")
                _check(path, database, parameters)
        except BaseException:
            database.close()
            raise
        return cls(path, database, parameters)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def ids(self) -> tuple[str, ...]:
        """Every takedown indexed, in the order they were added."""
        with _explained(self.path):
            rows = self._database.execute("SELECT request_id FROM takedown ORDER BY position").fetchall()
        return tuple(row[0] for row in rows)

    def prints(self, request_id: str) -> Prints:
        """Sorted fingerprints of one takedown.

        Raises:
            UsageError: It is not indexed.
            StoreDamaged: Its row does not match its digest.
        """
        for _, prints, _ in self._rows("WHERE request_id = ?", request_id):
            return prints
        raise UsageError(f"{self.path}: holds no takedown {request_id!r}.")

    def add(self, request_id: str, text: str) -> bool:
        """Index a takedown, whole or not at all. Doing it again changes nothing.

        Returns:
            Whether it was added now; False when it was there, or has no words to find it by.

        Raises:
            UsageError: Another text is indexed under this id.
            NoSpace: The disk is full; nothing was added.
        """
        shingled = shingle(text, self.parameters)
        if request_id in self.ids():
            if not np.array_equal(self.prints(request_id), shingled.prints):
                raise UsageError(
                    f"{self.path}: {request_id!r} is indexed with another text. Give the new text a new id."
                )
            return False
        if not len(shingled.prints):
            return False  # two empty sketches are equal: an empty text would match every other one
        signatures = sign(shingled.windows(self.parameters), self.parameters)
        row = (request_id, shingled.prints.astype("<u8").tobytes(), signatures.astype("<u4").tobytes())
        with _explained(self.path):
            self._database.execute(
                "INSERT INTO takedown (request_id, prints, signatures, digest) VALUES (?, ?, ?, ?)",
                (*row, _row_digest(*row)),
            )
        if self._table is not None:
            self._table.add(request_id, signatures)
        return True

    def remove(self, request_id: str) -> bool:
        """Forget a takedown whose notice was withdrawn; returns whether it was there."""
        with _explained(self.path):
            gone = self._database.execute("DELETE FROM takedown WHERE request_id = ?", (request_id,)).rowcount > 0
        if gone:
            self._table = None
        return gone

    def candidates(self, text: ShingledText) -> tuple[str, ...]:
        """Takedowns that may share a passage with a text, in the order they were added; to be verified.

        The first call reads all signatures and builds the LSH tables: about 0.3 ms and 22 kB per 50 indexed words.

        Raises:
            StoreDamaged: A row does not match its digest.
        """
        if self._table is None:
            table = WindowTable(self.parameters)
            for request_id, _, signatures in self._rows():
                table.add(request_id, signatures)
            self._table = table
        found = self._table.query(sign(text.windows(self.parameters), self.parameters))
        return tuple(name for name in self.ids() if name in found) if found else ()

    def _rows(self, where: str = "", *values: str) -> Iterator[tuple[str, Prints, Signatures]]:
        query = f"SELECT request_id, prints, signatures, digest FROM takedown {where} ORDER BY position"
        with _explained(self.path):
            for request_id, prints, signatures, digest in self._database.execute(query, values):
                if digest != _row_digest(request_id, prints, signatures):
                    raise StoreDamaged(f"{self.path}: the row of {request_id!r} does not match its digest. {_REBUILD}")
                rows = np.frombuffer(signatures, "<u4").reshape(-1, self.parameters.num_perm)
                yield request_id, np.frombuffer(prints, "<u8"), rows


_REBUILD = "Rebuild the index: delete this file and add every takedown again from the vault."

_SCHEMA = (
    "CREATE TABLE parameters (value TEXT NOT NULL)",
    "CREATE TABLE takedown (position INTEGER PRIMARY KEY, request_id TEXT NOT NULL UNIQUE,"
    " prints BLOB NOT NULL, signatures BLOB NOT NULL, digest TEXT NOT NULL)",
)


def _schema(database: sqlite3.Connection) -> dict[str, tuple[object, ...]]:
    """Everything that a database declares, by name; but for the page where a table begins."""
    return {row[0]: row[1:] for row in database.execute("SELECT name, type, tbl_name, sql FROM sqlite_master")}


@cache
def _expected_schema() -> dict[str, tuple[object, ...]]:
    """What an index declares: two tables, and nothing that acts by itself when one is written."""
    with closing(sqlite3.connect(":memory:")) as database:
        for statement in _SCHEMA:
            database.execute(statement)
        return _schema(database)


def _empty_index(parameters: DedupeParameters) -> bytes:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as database:
        for statement in _SCHEMA:
            database.execute(statement)
        database.execute("INSERT INTO parameters VALUES (?)", (canonical_json(parameters.model_dump()).decode(),))
        return database.serialize()


def _check(path: Path, database: sqlite3.Connection, parameters: DedupeParameters) -> None:
    """Check that a file is a whole index of these parameters."""
    if (found := _schema(database)) != (wanted_schema := _expected_schema()):
        names = sorted({*found, *wanted_schema}, key=str)
        other = [name for name in names if found.get(name) != wanted_schema.get(name)]
        raise StoreDamaged(f"{path}: declares other than this product does: {', '.join(map(repr, other))}. {_REBUILD}")
    state = " ".join(database.execute("PRAGMA quick_check(1)").fetchone()[0].split())
    if state != "ok":
        raise StoreDamaged(f"{path}: is damaged ({state}). {_REBUILD}")
    ((recorded,),) = database.execute("SELECT value FROM parameters").fetchall()
    found, wanted = dict(json.loads(recorded)), parameters.model_dump()
    other = [
        f"{key} is {found.get(key)!r}, wanted {wanted.get(key)!r}"
        for key in sorted({*found, *wanted})
        if found.get(key) != wanted.get(key)
    ]
    if other:
        raise UsageError(f"{path}: was made with other parameters: {'; '.join(other)}. {_REBUILD}")


def _row_digest(request_id: str, prints: bytes, signatures: bytes) -> str:
    return digest_json([request_id, digest_bytes(prints), digest_bytes(signatures)])


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into ours; each statement is a transaction of its own."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise  # our own mistake, such as use after close
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY):
            raise NoSpace(
                f"{path}: cannot be written ({error}). Nothing was added; free some space and repeat."
            ) from error
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise WorkspaceBusy(f"{path}: is in use by another process. Nothing was changed; repeat later.") from error
        raise StoreDamaged(f"{path}: is not a whole index ({error}). {_REBUILD}") from error
    except (ValueError, TypeError) as error:
        raise StoreDamaged(f"{path}: holds what this product does not write ({error}). {_REBUILD}") from error
