"""The ``takedown`` command: verbs a paralegal understands, JSON for machines, exit codes for schedulers.

Exit 0 fine · 1 the evidence or the gate says no · 2 wrong use · 3 interrupted, the same command resumes it.
"""

from __future__ import annotations

import getpass
import json
import logging
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import pipeline
from pipeline.display import cell, plain
from pipeline.errors import InvalidInput, TakedownError, UsageError
from pipeline.history import acknowledged_versions, lineage_view, read_entries, step_view, version_views
from pipeline.ledger import current_version, request_states
from pipeline.records import Comparison, Evaluation, Record
from pipeline.report import render
from pipeline.verify import verify as find_breaks
from pipeline.versions import VersionStore
from pipeline.workspace import Workspace, open_workspace, writing

app = typer.Typer(
    name="takedown", no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, rich_markup_mode=None,
    help="Take copyrighted text out of a language model, one takedown after another, with proof.\n\n"
    "Example: takedown -w ws init --model ./my-model --retain ./retain; takedown -w ws run batch.json; "
    "takedown -w ws checkout v1 ./served",
)  # fmt: skip
out = Console(highlight=False)
TIME = "%Y-%m-%d %H:%MZ"  # all times are kept in UTC
GROUPS = {"earlier": "earlier requests", "kept": "kept works", "held-out": "held-out texts"}
err = Console(stderr=True, highlight=False)

INTERRUPTED_BY_USER = 130
"""Typer's exit code for Ctrl-C, as shells have it."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of text.")]
Actor = Annotated[str, typer.Option("--actor", help="Who does it, for the ledger.", default_factory=getpass.getuser)]


@app.callback(invoke_without_command=True)
def choose(
    context: typer.Context,
    workspace: Annotated[
        Path, typer.Option("--workspace", "-w", envvar="TAKEDOWN_WORKSPACE", help="Workspace folder.")
    ] = Path(),
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Remember the workspace for the verb."""
    if version:
        out.print(f"takedown-pipeline {pipeline.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        out.print(context.get_help(), markup=False)
        raise typer.Exit(2)
    context.obj = workspace


def opened(context: typer.Context) -> Workspace:
    """The workspace of this call."""
    return open_workspace(context.obj)


def show_json(value: Any) -> None:
    """Print a value as JSON; records become objects."""

    def plain_value(item: Any) -> Any:
        return item.model_dump(mode="json") if isinstance(item, Record) else str(item)

    sys.stdout.write(json.dumps(value, default=plain_value, indent=2, ensure_ascii=True) + "\n")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """A table whose cells are shown literally, whatever they hold."""
    made = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column.endswith(("before", "after")) else "left", overflow="fold")
    for row in rows:
        made.add_row(*(cell("" if v is None else str(v)) for v in row))
    return made


def say(text: str) -> None:
    """Print a line literally."""
    out.print(Text(text), soft_wrap=True)


# --- writing verbs ----------------------------------------------------------------------------------------


@app.command()
def init(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="Model folder, or a hub id to download.")],
    actor: Actor,
    retain: Annotated[Path | None, typer.Option(help="Folder of *.txt that the model must keep (anchor).")] = None,
    kept: Annotated[Path | None, typer.Option(help="Folder of *.txt works to keep; only ever measured.")] = None,
    heldout: Annotated[Path | None, typer.Option(help="Folder of *.txt that the model never saw.")] = None,
) -> None:
    """Start a lineage: version v0 is the untouched model.

    Example: takedown -w ws init --model ./llama --retain ./retain --heldout ./heldout
    """
    quiet_libraries()
    from pipeline.lineage import start_lineage

    references = {"retain": retain, "kept": kept, "heldout": heldout}
    workspace = start_lineage(context.obj, model, references, actor)
    manifest = VersionStore(workspace.versions).manifest(0)
    say(f"Started {workspace.root}\nv0  {manifest.root}\nNext: takedown -w {context.obj} run BATCH")


@app.command()
def check(context: typer.Context, batch: Path, as_json: Json = False) -> None:
    """Validate a batch without touching anything.

    Example: takedown -w ws check 2026-11-acme.json
    """
    from pipeline.submit import check_batch

    found = check_batch(opened(context), batch)
    if as_json:
        show_json({"batch_id": found.batch_id, "requests": [r.request_id for r in found.requests]})
        return
    rows = [(r.request_id, r.title, r.rights_holder, f"{len(r.text.split()):,} words") for r in found.requests]
    out.print(table(f"Batch {found.batch_id}: fine", ("request", "title", "rights holder", "length"), rows))


@app.command()
def submit(context: typer.Context, batch: Path, actor: Actor, as_json: Json = False) -> None:
    """Take a batch in for the next run; its texts go into the vault.

    Example: takedown -w ws submit 2026-11-acme.json
    """
    from pipeline.submit import submit as take_in

    found = take_in(opened(context), batch, actor)
    if as_json:
        show_json({"batch_id": found.batch_id, "requests": [r.request_id for r in found.requests]})
        return
    say(f"Took in {len(found.requests)} requests of {found.batch_id}. Next: takedown -w {context.obj} run")


@app.command()
def run(
    context: typer.Context,
    actor: Actor,
    batch: Annotated[Path | None, typer.Argument(help="A batch to take in and work on now.")] = None,
    as_json: Json = False,
) -> None:
    """One step: for a batch now, or for all that waits and lies in the inbox.

    Example: takedown -w ws run 2026-11-acme.json
    """
    workspace = opened(context)
    workspace.settings()  # a mistake in takedown.toml is told before anything is taken in
    with writing(workspace):
        pass  # so is another writer, before Prefect takes its time to start
    from pipeline.submit import submit_or_resume, take_inbox

    requests, bad_files = None, False
    if batch is not None:
        requests = submit_or_resume(workspace, batch, actor)
    else:
        try:
            take_inbox(workspace, actor)
        except InvalidInput as error:
            err.print(Text(f"takedown: {plain_lines(str(error))}"), soft_wrap=True)
            bad_files = True
    states = request_states(read_entries(workspace)).values()
    if requests == [] or not any(s.state in ("waiting", "refused") for s in states):
        idle = "Nothing waits." if batch is None else "Every request of this batch is answered; see takedown status."
        show_json({"outcome": "idle"}) if as_json else say(idle)
    else:
        run_step(workspace, requests, actor, as_json)
    if bad_files:
        raise typer.Exit(2)


def run_step(workspace: Workspace, requests: list[str] | None, actor: str, as_json: bool) -> None:
    """Run the flow and show what came of it.

    Raises:
        typer.Exit: With 1, when the gate refused.
    """
    from flows.environment import prepare

    prepare(workspace.root)
    quiet_libraries()
    from flows.progress import bars

    with bars(err, "starting Prefect"):
        from flows.takedown import takedown

        publication = takedown(str(workspace.root), requests, actor)
    if publication is None:  # another process answered them in the meantime
        show_json({"outcome": "idle"}) if as_json else say("Nothing waits.")
        return
    view = step_view(workspace, publication.run_id, read_entries(workspace))
    if as_json:
        show_json({"run": publication.run_id, **publication.model_dump(), "step": view})
    else:
        show_step(workspace, view)
    if publication.outcome == "refused":
        raise typer.Exit(1)


def quiet_libraries() -> None:
    """Keep the bars and notices of the libraries out of the terminal; errors stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("prefect").setLevel(logging.ERROR)


def show_step(workspace: Workspace, view: Any) -> None:
    """A step's outcome: one row per text, then the verdict."""
    states = request_states(read_entries(workspace))
    decisions = {d.request_id: d for d in view.dedupe.decisions}
    rows = []
    for found in view.screen.requests:
        decision = decisions[found.request_id]
        other = decision.evidence[0].request_id if decision.evidence and decision.verdict != "fresh" else ""
        rows.append((found.request_id, states[found.request_id].state, other, f"{decision.covered:.2f}",
                     f"{len(found.memorised)}/{found.passages}", f"{found.exact_memorisation:.3f}"))  # fmt: skip
    columns = ("request", "answer", "like", "covered", "memorised passages", "EM before")
    out.print(table(f"{view.run_id}: requests", columns, rows))
    if view.evaluation:
        out.print(score_table(view.evaluation, {name: s.state for name, s in states.items()}))
    for reason in view.verdict.reasons if view.verdict else ():
        say(f"Refused: {reason}")
    for sentence in view.verdict.unchecked if view.verdict else ():
        say(f"Not checked: {sentence}")
    if view.version is not None:
        manifest = VersionStore(workspace.versions).manifest(view.version)
        say(f"Published v{view.version}  {manifest.root}")
        say(f"Changed {manifest.report['changed']:,} of {manifest.report['total']:,} target weights.")
    elif view.verdict is None:
        say(f"No new version was needed; v{view.parent} stays current.")
    else:
        say(f"v{view.parent} stays current; the requests keep waiting. Change takedown.toml and run again.")


def score_table(evaluation: Evaluation, answers: Mapping[str, str]) -> Table:
    """Before → after: a row for each request of the batch, then the means of earlier, kept and held-out texts.

    Args:
        evaluation: What was measured.
        answers: State of each request, shown beside its id.
    """
    groups: dict[str, list[Comparison]] = {}
    for c in evaluation.comparisons:
        groups.setdefault(c.role if c.role in GROUPS else c.name, []).append(c)
    rows = [
        (
            f"{GROUPS[key]} ({len(found)})" if key in GROUPS else f"{key} {answers.get(key, '')}",
            change(found, "rouge_l"),
            change(found, "exact_memorisation"),
            change(found, "extraction_strength"),
            change(found, "nll"),
        )
        for key, found in groups.items()
    ]
    level = evaluation.level
    title = f"Before → after (never-seen level: EM {level.mean:.3f} ± {level.std:.3f}, {level.source})"
    return table(title, ("text", "ROUGE-L", "EM", "ES", "perplexity"), rows)


def change(found: Sequence[Comparison], field: str) -> str:
    """Mean of a score before and after, in as few characters as can be read; NLL is shown as perplexity."""
    pairs = [(getattr(c.before, field), getattr(c.after, field)) for c in found]
    if any(value is None for pair in pairs for value in pair):
        return ""
    means = [statistics.fmean(column) for column in zip(*pairs, strict=True)]
    if field == "nll":
        return "→".join(f"{math.exp(min(m, 700)):.1f}" for m in means)
    return "→".join(f"{m:.3f}" for m in means)


# --- reading verbs ----------------------------------------------------------------------------------------


@app.command()
def status(context: typer.Context, as_json: Json = False) -> None:
    """Requests and their state, and what waits.

    Example: takedown -w ws status
    """
    workspace = opened(context)
    entries = read_entries(workspace)
    states = request_states(entries)
    if as_json:
        show_json({"current": current_version(entries), "requests": list(states.values())})
        return
    say(f"Current version: v{current_version(entries)}")
    rows = [
        (
            s.request_id,
            s.state,
            s.batch_id,
            s.received_at.strftime(TIME),
            f"v{s.version}" if s.state in ("applied", "folded", "repeat") else "",
        )
        for s in states.values()
    ]
    out.print(table("Requests", ("request", "state", "batch", "received", "excluded since"), rows))
    waiting = sum(s.state in ("waiting", "refused") for s in states.values())
    say(f"{waiting} waiting." if waiting else "Nothing waits.")


@app.command()
def log(context: typer.Context, as_json: Json = False) -> None:
    """The ledger: every event, oldest first.

    Example: takedown -w ws log
    """
    entries = read_entries(opened(context))
    if as_json:
        show_json(list(entries))
        return
    rows = [(e.seq, e.at.strftime(TIME), e.event.kind, e.event.actor, e.event.request_id,
             f"v{e.event.version}" if e.event.version is not None else "", e.event.run_id, e.digest[7:19])
            for e in entries]  # fmt: skip
    out.print(table("Ledger", ("#", "at", "event", "actor", "request", "version", "run", "digest"), rows))


def version_number(workspace: Workspace, name: str) -> int:
    """``v3`` or ``3`` as a number of a published version."""
    digits = name.removeprefix("v")
    numbers = [m.version for m in acknowledged_versions(workspace, read_entries(workspace))]
    if not digits.isdecimal() or int(digits) not in numbers:
        raise UsageError(f"{plain(name)}: no such request or version; there are v{numbers[0]} to v{numbers[-1]}.")
    return int(digits)


@app.command()
def show(context: typer.Context, name: str, as_json: Json = False) -> None:
    """One version (v3) or one request.

    Example: takedown -w ws show v1; takedown -w ws show TD-1
    """
    workspace = opened(context)
    entries = read_entries(workspace)
    states = request_states(entries)
    if name in states:
        events = [e for e in entries if e.event.request_id == name]
        if as_json:
            show_json({"state": states[name], "events": events})
            return
        state = states[name]
        since = f", excluded since v{state.version}" if state.state in ("applied", "folded") else ""
        say(f"{state.request_id}: {state.state}{since}  (batch {state.batch_id})")
        for e in events:
            say(f"  {e.at.strftime(TIME)}  {e.event.kind}  by {plain(e.event.actor)}")
            for key, value in e.event.data.items():
                say(f"    {key}: {plain(json.dumps(value), 200)}")
        return
    manifest = VersionStore(workspace.versions).manifest(version_number(workspace, name))
    if as_json:
        show_json(manifest)
        return
    say(f"v{manifest.version}  {manifest.root}")
    parent = f"v{manifest.parent}  {manifest.parent_root}" if manifest.parent is not None else "none"
    say(f"  made {manifest.created_at.strftime(TIME)} by {manifest.run_id or 'init'}, parent {parent}")
    say(f"  excludes first: {', '.join(manifest.requests) or 'nothing'}")
    for key in ("alpha", "selected", "changed", "total"):
        if key in manifest.report:
            say(f"  {key}: {manifest.report[key]}")
    rows = [(f.path, f"{f.size:,}", f.digest) for f in manifest.files]
    out.print(table("Files", ("file", "bytes", "digest"), rows))


@app.command()
def checkout(context: typer.Context, version: str, folder: Path) -> None:
    """Write a version as a model folder that from_pretrained loads, bit-exact.

    Example: takedown -w ws checkout v1 ./served
    """
    workspace = opened(context)
    number = version_number(workspace, version)
    if folder.resolve().is_relative_to(workspace.root):
        raise UsageError(f"{plain(str(folder))}: lies inside the workspace. Choose a folder outside of it.")
    manifest = VersionStore(workspace.versions).restore(number, folder)
    say(f"Wrote v{number} to {folder}\n{manifest.root}")


@app.command()
def verify(context: typer.Context, as_json: Json = False) -> None:
    """Re-check everything that is stored; print every break. Exit 1 if there is one.

    Example: takedown -w ws verify && echo sound
    """
    breaks = find_breaks(opened(context))
    if as_json:
        show_json(breaks)
    elif breaks:
        rows = [(b.where, b.found, b.means) for b in breaks]
        out.print(table(f"{len(breaks)} breaks", ("where", "found", "means"), rows))
    else:
        say("Everything matches: ledger chain, manifests, every byte of every version, vault.")
    if breaks:
        raise typer.Exit(1)


@app.command()
def report(
    context: typer.Context,
    file: Annotated[Path | None, typer.Option("--out", help="File to write; default reports/report.html.")] = None,
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page about the whole lineage.

    Example: takedown -w ws report --out takedowns.html
    """
    from pipeline.files import write_atomic

    workspace = opened(context)
    view = lineage_view(workspace, find_breaks(workspace))
    if as_json:
        show_json(view)
        return
    path = file or workspace.reports / "report.html"
    try:
        write_atomic(path, render(view).encode())
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror}). Name a file in an existing folder.") from error
    say(f"Wrote {path}")


@app.command()
def versions(context: typer.Context, as_json: Json = False) -> None:
    """All versions and what they exclude.

    Example: takedown -w ws versions
    """
    workspace = opened(context)
    entries = read_entries(workspace)
    views = version_views(acknowledged_versions(workspace, entries), current_version(entries))
    if as_json:
        show_json(list(views))
        return
    rows = [(f"v{v.version}", v.status, v.created_at.strftime(TIME), ", ".join(v.requests),
             f"{v.changed:,}" if v.changed is not None else "", v.root[12:24]) for v in views]  # fmt: skip
    out.print(table("Versions", ("version", "status", "made", "excludes first", "entries changed", "root"), rows))


def main() -> None:
    """Run the command; turn the product's errors into messages and exit codes."""
    try:
        app()
    except SystemExit as stop:  # Typer exits itself: 0, a verb's own code, 2 for wrong use, 130 for Ctrl-C
        if stop.code != INTERRUPTED_BY_USER:
            raise
        err.print("takedown: interrupted. Nothing acknowledged is lost; the same command continues.")
        sys.exit(3)
    except TakedownError as error:
        err.print(Text(f"takedown: {plain_lines(str(error))}"), soft_wrap=True)
        sys.exit(error.exit_code)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        err.print(Text(f"takedown: {plain_lines(place + (error.strerror or str(error)))}. Check the path and its "
                       "permissions; nothing was published."), soft_wrap=True)  # fmt: skip
        sys.exit(2)


def plain_lines(message: str) -> str:
    """A message with several lines, each made safe for the terminal."""
    return "\n".join(plain(line, 2000) for line in message.splitlines())
