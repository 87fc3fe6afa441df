"""`takedown find-copies`: which documents of a training corpus hold a work that somebody claims.

Exit 0 also with copies found: it is a search · 1 a file could not be read · 2 wrong use · 3 interrupted.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from flows.progress import bars
from flows.terminal import Json, checked_entries, err, opened, out, outside, say, show_json, table
from pipeline.display import plain
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.search import Outcome

verbs = typer.Typer(rich_markup_mode=None)

SHOWN = 50
"""Rows of a table; the file given with --out has all."""


@verbs.command("find-copies")
def find_copies_in(
    context: typer.Context,
    corpus: Annotated[
        list[Path], typer.Argument(help="Files and folders: .txt, .jsonl, .parquet, each also .gz or .zst.")
    ],
    file: Annotated[
        Path | None, typer.Option("--out", help="Write a JSON line per document and work; makes it resumable.")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, max=256, help="Processes that search.")] = 1,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="One run of ten words in common is enough; expect false hits.")
    ] = False,
    text_field: Annotated[
        str, typer.Option("--text-field", help="Field of JSON lines, or column, that holds the text.")
    ] = "text",
    as_json: Json = False,
) -> None:
    """Search a training corpus for documents that hold a claimed work or a piece of one, so that the next training
    leaves them out. Reads only.

    With runtime.runner = "dask" or "ray" in the settings, workers of that cluster search; this process reads.

    All requests count but withdrawn and reinstated ones. A copy is three different runs of ten words of one work
    within 300 words. Interrupted, the same command with --out goes on. Exit 1 when something could not be read.

    Example: takedown -w ws find-copies ./corpus --out copies.jsonl --workers 4
    """
    # Imported here: every other verb would wait for it.
    from pipeline.corpus import SUFFIXES, corpus_files
    from pipeline.scan import Rule
    from pipeline.search import PART, STATE, Fault, claimed_works, find_copies

    workspace = opened(context)
    if file is not None:
        outside(workspace, file)
        if not file.parent.is_dir() or (file.exists() and not file.is_file()):  # a device would be replaced by a file
            raise UsageError(f"{plain(str(file))}: cannot be written. Name a file in an existing folder.")
    prints = claimed_works(workspace, checked_entries(workspace))
    own = [file.with_name(file.name + ending) for ending in ("", PART, STATE)] if file is not None else []
    files, unread, others = corpus_files(corpus, own)
    if not files and not unread:
        raise UsageError(f"There is nothing to search: no file in {', '.join(SUFFIXES)}, but {others:,} others.")
    with _hits_file(file) as path:
        with bars(err, "reading"):
            rule, runner = Rule(hits=1 if thorough else 3), workspace.settings().runtime.runner
            outcome = find_copies(prints, files, path, rule, text_field, workers, runner, note)
        faults = (*(Fault(where=p.where, found=p.found, count=1) for p in unread), *outcome.faults)
        outcome = outcome.model_copy(update={"faults": faults})
        if as_json:
            hits = None if file is not None else [json.loads(line) for line in _lines(path)]
            show_json({**outcome.model_dump(mode="json"), "works": len(prints.names), "other_files": others,
                       "out": None if file is None else str(file), "hits": hits})  # fmt: skip
        else:
            show(outcome, path, len(prints.names), others)
            if file is not None:
                say(f"Wrote {plain(str(file), 2000)}")
    if faults:
        raise typer.Exit(1)


def note(text: str) -> None:
    """Say something beside the result."""
    err.print(Text(f"takedown: {plain(text, 2000)}"), soft_wrap=True)


@contextmanager
def _hits_file(file: Path | None) -> Iterator[Path]:
    """Where hits are written: the file asked for, or one that is only shown."""
    if file is not None:
        yield file
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / "hits.jsonl"


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        yield from stream


def show(outcome: Outcome, path: Path, works: int, others: int) -> None:
    """Files with copies, the copies, then what was read and what could not be."""
    per_file: dict[str, dict[str, Any]] = {}
    rows: list[tuple[object, ...]] = []
    for line in _lines(path):
        hit = json.loads(line)
        known = per_file.setdefault(hit["file"], {"documents": 0, "last": None, "requests": set(), "copies": 0})
        known["documents"] += known["last"] != hit["document"]
        known["last"] = hit["document"]
        known["requests"].add(hit["request_id"])
        known["copies"] += 1
        if len(rows) < SHOWN:
            rows.append(_row(hit))
    found = [
        (name, f"{k['documents']:,}", f"{k['copies']:,}", f"{len(k['requests']):,}") for name, k in per_file.items()
    ]
    if found:
        files = ("file", "documents with copies", "copies", "works")
        copies = ("file", "document", "id", "request", "characters", "words", "of the work")
        out.print(table("Files with copies", files, found[:SHOWN], limit=200))
        out.print(table("Copies", copies, rows, limit=120))
    left = max(len(found) - SHOWN, 0), max(outcome.totals.copies - SHOWN, 0)
    if any(left):
        say(f"Not shown: {left[0]:,} files and {left[1]:,} copies. --out writes all of them.")
    totals = outcome.totals
    say(
        f"{totals.holding:,} of {totals.documents:,} documents in {outcome.files:,} files hold one of {works:,} works "
        f"or a piece of one: {totals.copies:,} copies in {totals.characters:,} characters of text."
    )
    if others:
        say(f"Not read, for their endings: {others:,} other files.")
    if totals.replaced:
        say(f"{totals.replaced:,} characters stand for bytes that are not UTF-8.")
    for fault in outcome.faults[:SHOWN]:
        more = f" (and {fault.count - 1:,} more in this file)" if fault.count > 1 else ""
        say(f"Not read: {plain(fault.where, 500)}: {plain(fault.found, 500)}{more}")
    if len(outcome.faults) > SHOWN:
        say(f"Not read: {len(outcome.faults) - SHOWN:,} more files.")


def _row(hit: dict[str, Any]) -> tuple[object, ...]:
    """A copy as a row: its ranges end to end, and how many there are."""
    ranges = hit["ranges"]
    places = f"{ranges[0][0]:,}-{ranges[-1][1]:,}" + (f" in {len(ranges):,} pieces" if len(ranges) > 1 else "")
    return (hit["file"], hit["document"], hit["name"], hit["request_id"], places, f"{hit['words']:,}",
            f"{hit['containment']:.1%}")  # fmt: skip
