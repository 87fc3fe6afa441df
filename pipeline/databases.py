"""What an SQLite file declares, compared with what this product declares: nothing may act by itself in it.

In: a connection, or statements. Out: tables, indexes and triggers by name. Never: a row.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from functools import cache
from typing import Any


def declarations(connection: sqlite3.Connection) -> dict[str, tuple[Any, ...]]:
    """Everything that a database declares, by name; but for the page where a table begins."""
    return {row[0]: row[1:] for row in connection.execute("SELECT name, type, tbl_name, sql FROM sqlite_master")}


@cache
def declared_by(statements: tuple[str, ...]) -> dict[str, tuple[Any, ...]]:
    """What a fresh database declares after some statements."""
    with closing(sqlite3.connect(":memory:")) as connection:
        for statement in statements:
            connection.execute(statement)
        return declarations(connection)
