"""Calls of the command line in this process, as the console script makes them.

In: arguments. Out: exit code and what was printed. Never: a traceback taken for an answer.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from unittest import mock

from flows import cli

if TYPE_CHECKING:
    from pipeline.workspace import Workspace


class Answer(NamedTuple):
    """What a call left behind.

    Attributes:
        code: Exit code.
        out: Standard output.
        err: Standard error.
    """

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        """Everything printed, line breaks and runs of spaces as one space."""
        return " ".join((self.out + self.err).split())


def takedown(*arguments: str, folder: Path) -> Answer:
    """Call ``takedown`` in a folder; an exception that the product does not turn into a message comes out here."""
    out, err = io.StringIO(), io.StringIO()
    environment = {name: value for name, value in os.environ.items() if name != "TAKEDOWN_WORKSPACE"}
    with (
        chdir(folder),
        mock.patch.dict(os.environ, environment | {"COLUMNS": "1000"}, clear=True),
        mock.patch.object(sys, "argv", ["takedown", *arguments]),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    return Answer(code, out.getvalue(), err.getvalue())


def call_in(workspace: Workspace, *arguments: str) -> Answer:
    """Call ``takedown -w WORKSPACE …`` in the folder above it."""
    return takedown("-w", str(workspace.root), *arguments, folder=workspace.root.parent)
