"""The ``takedown`` command: verbs a paralegal understands, JSON for machines, exit codes for schedulers.

Exit 0 fine · 1 the evidence or the gate says no · 2 wrong use · 3 interrupted, the same command resumes it.
"""

from __future__ import annotations

import atexit
import gc
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text
from typer.core import TyperGroup
from typer.main import get_group

import pipeline
from flows.terminal import err, out, plain_lines
from pipeline.errors import TakedownError

MODULES = {
    "standing": ("status", "log"),
    "reading": ("show", "versions", "first-version", "diff", "checkout"),
    "proving": ("verify", "certificate", "export", "report"),
    "doctoring": ("doctor",),
    "scanning": ("find-copies",),
    "requesting": ("check", "submit", "hold", "release", "withdraw", "counter"),
    "stepping": ("init", "run", "reinstate"),
    "versioning": ("rollback", "repack", "purge"),
    "approving": ("review", "approve", "refuse"),
    "serving": ("serve",),
    "keeping": ("rekey", "erase", "guard"),
    "sharing": ("share-index",),
    "benchmarking": ("bench",),
}
"""Module of this package → its verbs. A verb loads its own module only, since what some of them need takes a second."""

MODULE_OF = {verb: module for module, verbs in MODULES.items() for verb in verbs}

INTERRUPTED_BY_USER = 130
"""Typer's exit code for Ctrl-C, as shells have it."""


class Verbs(TyperGroup):
    """All verbs, each loaded once it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(MODULE_OF)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in MODULE_OF:
            for verb in MODULE_OF:  # what resembles a wrong verb is looked for among the loaded ones
                self.get_command(ctx, verb)
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in MODULE_OF:
            return None
        if cmd_name not in self.commands:
            module = import_module(f"flows.{MODULE_OF[cmd_name]}")
            self.commands.update(get_group(module.verbs).commands)
        return self.commands[cmd_name]


app = typer.Typer(
    name="takedown", cls=Verbs, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False,
    rich_markup_mode=None,
    help="Take copyrighted text out of a language model, one takedown after another, with proof.\n\n"
    "Example: takedown -w ws init --model ./my-model --retain ./retain; takedown -w ws run batch.json; "
    "takedown -w ws checkout v1 ./served",
)  # fmt: skip


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


def main() -> None:
    """Run the command; turn the product's errors into messages and exit codes."""
    # What it read goes with the process; to look through a long ledger for cycles first takes a fifth of the time.
    atexit.register(gc.freeze)
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
