"""The file of the index: what it declares, what older releases declared, how it is opened, and what its errors mean.

In: a path. Out: a connection to a database that declares exactly what this release does, or errors of ours. Never: a
row, which is `pipeline.index`.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from pipeline.databases import declarations, declared_by
from pipeline.errors import NoSpace, StoreDamaged, UsageError, WorkspaceBusy
from pipeline.files import canonical_json
from pipeline.shingles import DedupeParameters

REBUILD = "Rebuild the index: delete this file; the next run adds every takedown again from the vault."

_SCHEMA = (
    "CREATE TABLE parameters (value TEXT NOT NULL)",
    "CREATE TABLE takedown (position INTEGER PRIMARY KEY, request_id TEXT NOT NULL UNIQUE, digest TEXT NOT NULL,"
    " chain TEXT NOT NULL, prints BLOB NOT NULL, signatures BLOB NOT NULL)",
    "CREATE TABLE removed (position INTEGER PRIMARY KEY, chain TEXT NOT NULL)",
)


class _Release(NamedTuple):
    """What the index of an older release declares."""

    schema: tuple[str, ...]
    parameters: Mapping[str, str | int]


_OLDER_RELEASES = {
    "0.1.0": _Release(
        (
            "CREATE TABLE parameters (value TEXT NOT NULL)",
            "CREATE TABLE takedown (position INTEGER PRIMARY KEY, request_id TEXT NOT NULL UNIQUE,"
            " prints BLOB NOT NULL, signatures BLOB NOT NULL, digest TEXT NOT NULL)",
        ),
        {
            "normaliser": "v1", "shingle_words": 3, "shingle_characters": 8, "fingerprint": "blake2b-64",
            "scheme": "affine32", "seed": 1, "num_perm": 128, "bands": 64, "rows": 2, "window_shingles": 98,
            "window_step": 49,
        },
    )
}  # fmt: skip


@contextmanager
def connected(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that is closed where the block fails, with SQLite's errors explained."""
    database = sqlite3.connect(path, timeout=30, isolation_level=None)
    try:
        with explained(path):
            database.execute("PRAGMA synchronous = FULL")
            database.execute("PRAGMA cell_size_check = ON")  # a damaged page is an error when it is read
            database.execute("PRAGMA secure_delete = ON")  # what is removed is not to stay in free pages
            yield database
    except BaseException:
        database.close()
        raise


@contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """Everything in the block is done, or nothing."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        database.rollback()
        raise
    database.commit()


def declare(database: sqlite3.Connection, parameters: DedupeParameters) -> None:
    """Make the tables of this release in an empty database."""
    for statement in _SCHEMA:
        database.execute(statement)
    database.execute("INSERT INTO parameters VALUES (?)", (canonical_json(parameters.model_dump()).decode(),))


def empty_index(parameters: DedupeParameters) -> bytes:
    """The file of an index that holds nothing."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as database:
        declare(database, parameters)
        return database.serialize()


def release_of(database: sqlite3.Connection) -> str | None:
    """The older release that an index is of; None where it is of none that is known."""
    schema = declarations(database)
    for release, made in _OLDER_RELEASES.items():
        if schema == declared_by(made.schema) and _recorded(database) == made.parameters:
            return release
    return None


def _recorded(database: sqlite3.Connection) -> dict[str, object]:
    """The parameters that an index names."""
    ((recorded,),) = database.execute("SELECT value FROM parameters").fetchall()
    return dict(json.loads(recorded))


def check_declared(path: Path, database: sqlite3.Connection, parameters: DedupeParameters) -> None:
    """Check that a file declares an index of these parameters; takes no longer for a large one."""
    if (found := declarations(database)) != (wanted_schema := declared_by(_SCHEMA)):
        names = sorted({*found, *wanted_schema}, key=str)
        other = [name for name in names if found.get(name) != wanted_schema.get(name)]
        raise StoreDamaged(f"{path}: declares other than this product does: {', '.join(map(repr, other))}. {REBUILD}")
    recorded, wanted = _recorded(database), parameters.model_dump()
    other = [
        f"{key} is {recorded.get(key)!r}, wanted {wanted.get(key)!r}"
        for key in sorted({*recorded, *wanted})
        if recorded.get(key) != wanted.get(key)
    ]
    if other:
        raise UsageError(f"{path}: was made with other parameters: {'; '.join(other)}. {REBUILD}")


@contextmanager
def explained(path: Path) -> Iterator[None]:
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
        raise StoreDamaged(f"{path}: is not a whole index ({error}). {REBUILD}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise StoreDamaged(f"{path}: holds what this product does not write ({error}). {REBUILD}") from error
