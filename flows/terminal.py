"""What all verbs of the command line share: where they print, how tables look, which workspace is meant."""

from __future__ import annotations

import getpass
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.display import cell, plain
from pipeline.errors import UsageError
from pipeline.keys import log_vkey
from pipeline.records import LedgerEntry, Record
from pipeline.states import RequestState
from pipeline.workspace import Workspace, open_workspace, read_entries

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

TIME = "%Y-%m-%d %H:%MZ"
"""All times are kept in UTC."""

RIGHT = ("before", "after", "bytes", "entries", "changed")
"""Last words of column titles whose cells are numbers."""

LONG = 500
"""Rows from which a table that grows with the history is written line by line: of 1,600 rows rich makes a table in 1.8
CPU seconds, of 16,000 in ten times that."""

UNBROKEN = ("#", "at", "event", "version", "received", "made", "status")
"""Columns that stay on one line when a terminal is narrow; the others fold."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of text.")]


def _named(actor: str) -> str:
    if not actor.strip():
        raise typer.BadParameter("the ledger needs a name")
    return actor


Actor = Annotated[
    str,
    typer.Option("--actor", help="Who does it, for the ledger.", default_factory=getpass.getuser, callback=_named),
]
Reason = Annotated[str, typer.Option("--reason", help="Why; stays on record for ever, so no names and no texts.")]


def opened(context: typer.Context) -> Workspace:
    """The workspace of this call."""
    root: Path = context.obj
    return open_workspace(root)


def show_json(value: Any) -> None:
    """Print a value as JSON; records become objects."""

    def plain_value(item: Any) -> Any:
        return item.model_dump(mode="json") if isinstance(item, Record) else str(item)

    sys.stdout.write(json.dumps(value, default=plain_value, indent=2, ensure_ascii=True) + "\n")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], limit: int = 80) -> Table:
    """A table whose cells are shown literally, whatever they hold, up to so many characters."""
    made = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.endswith(RIGHT) else "left"
        made.add_column(column, justify=justify, overflow="fold", no_wrap=column in UNBROKEN)
    for row in rows:
        made.add_row(*(cell("" if v is None else str(v), limit) for v in row))
    return made


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table that grows with the history; a long one as plain aligned lines that do not fold, as for a pager."""
    if len(rows) <= LONG:
        out.print(table(title, columns, rows))
    else:
        print(aligned(title, columns, rows), file=out.file)  # rich takes half a second to wrap 10,000 lines


def aligned(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], limit: int = 80) -> str:
    """A table as text, one line for each row; cells as in `table`."""
    cells = [[plain("" if v is None else str(v), limit) for v in row] for row in rows]
    widths = [max(map(_width, column)) for column in zip(columns, *cells, strict=True)]
    sides = [column.endswith(RIGHT) for column in columns]
    lines = (
        "  ".join(map(_padded, row, widths, sides)).rstrip() for row in (columns, ["─" * w for w in widths], *cells)
    )  # fmt: skip
    return "\n".join([title, *lines])


def _padded(text: str, width: int, right: bool) -> str:
    space = " " * (width - _width(text))
    return space + text if right else text + space


def _width(text: str) -> int:
    """Columns that a text takes in a terminal."""
    return len(text) if text.isascii() else cell_len(text)


def outside(workspace: Workspace, path: Path) -> Path:
    """A place to write to that is not among a workspace's own files; its ``reports/`` is.

    Raises:
        UsageError: It is.
    """
    found = path.resolve()
    if found.is_relative_to(workspace.root) and not found.is_relative_to(workspace.reports):
        raise UsageError(f"{plain(str(path))}: lies inside the workspace. Choose a place outside of it.")
    return path


def say(text: str) -> None:
    """Print a line literally."""
    out.print(Text(text), soft_wrap=True)


def number_of(name: str) -> int:
    """``v3`` or ``3`` as a number.

    Raises:
        UsageError: It is neither.
    """
    digits = name.removeprefix("v")
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 10):
        raise UsageError(f"{name!r}: is no version. Versions are called v0, v1, …; `takedown versions` lists them.")
    return int(digits)


def megabytes(nbytes: int) -> str:
    """A size for people."""
    return f"{nbytes / 1e6:,.1f} MB" if nbytes >= 1e5 else f"{nbytes:,} bytes"


def quiet_libraries() -> None:
    """Keep the bars and notices of the libraries out of the terminal; errors stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("prefect").setLevel(logging.ERROR)
    logging.getLogger("EventsWorker").setLevel(logging.ERROR)  # Prefect's; counts what it could not send


def checked_entries(workspace: Workspace) -> tuple[LedgerEntry, ...]:
    """All ledger entries; whoever may not read the public key is told that nobody's signature was checked.

    Raises:
        StoreDamaged: The chain does not hold, or the entries are not those that the newest checkpoint signs.
    """
    entries = read_entries(workspace)
    try:
        log_vkey(workspace.keys)
    except UsageError as error:
        err.print(Text(f"takedown: {plain(str(error), 2000)} Whose entries these are was not checked."), soft_wrap=True)
    return entries


def state_words(state: RequestState) -> str:
    """A state with the answer that led to it, where it has another name, a hold, and an erasure."""
    answer = f" ({state.decision})" if state.decision not in (None, state.state, "applied") else ""
    if state.reinstated_in is not None and state.state == "reinstated":
        answer = f" in v{state.reinstated_in}"
    return f"{state.state}{answer}{', on hold' if state.on_hold else ''}{', erased' if state.erased else ''}"


def plain_lines(message: str) -> str:
    """A message with several lines, each made safe for the terminal."""
    return "\n".join(plain(line, 2000) for line in message.splitlines())
