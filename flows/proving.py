"""Proof for others: `takedown verify`, `certificate`, `export`, `report`. They write nothing to the workspace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from flows.progress import bars
from flows.terminal import Json, checked_entries, err, opened, out, outside, say, show_json, table
from pipeline.certificate import write_certificate
from pipeline.display import plain
from pipeline.erase import erased_notes
from pipeline.errors import UsageError
from pipeline.export import EVENT_COLUMNS, REQUEST_COLUMNS, event_rows, request_rows, to_csv
from pipeline.files import write_atomic
from pipeline.history import lineage_view
from pipeline.rekey import rekey_notes
from pipeline.report import render
from pipeline.storecheck import Depth
from pipeline.verify import index_notes, key_notes, seal_notes
from pipeline.verify import verify as find_breaks
from pipeline.workspace import read_entries

verbs = typer.Typer(rich_markup_mode=None)

SOUND = {
    Depth.QUICK: "Everything is there and signed: ledger, checkpoints, manifests; no content was re-read.",
    Depth.FULL: "Everything matches: ledger, checkpoints, manifests, every stored byte, signatures, index, vault.",
    Depth.DEEP: "Everything matches, and every version was made again from the store, tensor by tensor.",
}


@verbs.command()
def verify(
    context: typer.Context,
    quick: Annotated[bool, typer.Option("--quick", help="Names, sizes and signatures only; reads no content.")] = False,
    deep: Annotated[bool, typer.Option("--deep", help="Also make every version again from the store.")] = False,
    checkpoint: Annotated[
        list[Path] | None, typer.Option("--checkpoint", help="A checkpoint kept elsewhere; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Re-check everything that is stored; print every break and what it means. Exit 1 if there is one.

    A missing private key is no break, for a copy is checked without it; a note on standard error says so.

    Example: takedown -w ws verify && echo sound; takedown -w ws verify --deep --checkpoint /media/kept/checkpoint
    """
    if quick and deep:
        raise UsageError("--quick and --deep exclude each other. Give one of them, or neither.")
    depth = Depth.QUICK if quick else Depth.DEEP if deep else Depth.FULL
    workspace = opened(context)
    with bars(err, "verify"):
        breaks = find_breaks(workspace, depth, checkpoint or ())
    erased = erased_notes(read_entries(workspace)) if not breaks else ()
    told = (*key_notes(workspace), *rekey_notes(workspace), *seal_notes(workspace, depth), *index_notes(workspace))
    for note in (*told, *erased):
        err.print(Text(f"Note: {plain(note, 2000)}"), soft_wrap=True)
    if as_json:
        show_json(breaks)
    elif breaks:
        rows = [(b.where, b.found, b.means) for b in breaks]
        title = "1 break" if len(breaks) == 1 else f"{len(breaks)} breaks"
        out.print(table(title, ("where", "found", "means"), rows, limit=2000))
    else:
        say(SOUND[depth])
    if breaks:
        raise typer.Exit(1)


@verbs.command()
def certificate(
    context: typer.Context,
    request: str,
    folder: Annotated[Path, typer.Option("--out", help="New folder for the certificate and its proof.")],
    since: Annotated[
        Path | None,
        typer.Option("--since", help="A checkpoint kept earlier: prove that the log was only added to since."),
    ] = None,
    as_json: Json = False,
) -> None:
    """What was done about a request and measured, with proof that needs none of this software.

    It certifies a process and a measurement, never absence. Check it anywhere: python verify_bundle.py FOLDER

    Example: takedown -w ws certificate TD-1 --out ./TD-1; takedown -w ws certificate TD-1 --out ./TD-1-again
    --since ./TD-1/checkpoint
    """
    workspace = opened(context)
    made = write_certificate(workspace, request, outside(workspace, folder), since)
    if as_json:
        show_json(made.as_json())
        return
    say(f"Wrote {folder}\nCheck it: python {folder}/verify_bundle.py {folder}")


@verbs.command()
def export(
    context: typer.Context,
    folder: Annotated[Path | None, typer.Option("--out", help="New or empty folder; default reports/export.")] = None,
    as_json: Json = False,
) -> None:
    """The register as CSV and JSON: requests and events, without texts and contacts.

    Cells that a spreadsheet would run as a formula get an apostrophe in front.

    Example: takedown -w ws export --out ./register
    """
    workspace = opened(context)
    entries = checked_entries(workspace)
    requests, events = request_rows(workspace, entries), event_rows(entries)
    if as_json:
        show_json({"requests": requests, "events": events})
        return
    target = outside(workspace, folder or workspace.register)
    target.mkdir(parents=True, exist_ok=True)
    for name, columns, rows in (("requests", REQUEST_COLUMNS, requests), ("events", EVENT_COLUMNS, events)):
        # With a byte order mark, without which spreadsheets take UTF-8 for something else.
        write_atomic(target / f"{name}.csv", to_csv(columns, rows).encode("utf-8-sig"))
        write_atomic(target / f"{name}.json", (json.dumps(rows, indent=2, ensure_ascii=True) + "\n").encode())
    say(f"Wrote {len(requests)} requests and {len(events)} events to {target} (CSV and JSON)")


@verbs.command()
def report(
    context: typer.Context,
    file: Annotated[Path | None, typer.Option("--out", help="File to write; default reports/report.html.")] = None,
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page about the whole lineage.

    Example: takedown -w ws report --out takedowns.html
    """
    workspace = opened(context)
    with bars(err, "verify"):
        breaks = find_breaks(workspace)
    view = lineage_view(workspace, breaks)
    if as_json:
        show_json(view)
        return
    path = outside(workspace, file or workspace.report_page)
    if file is None:
        workspace.reports.mkdir(exist_ok=True)  # an empty folder does not survive every copy of a workspace
    try:
        write_atomic(path, render(view).encode())
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror}). Name a file in an existing folder.") from error
    say(f"Wrote {path}")
