"""Progress bars in the terminal, one per stage; silent where there is no terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from pipeline.patience import STAGE as WAITING
from pipeline.progress import listening


@contextmanager
def bars(console: Console, waiting_for: str) -> Iterator[Progress]:
    """Draw a bar for each stage that reports progress; who is waited for is said where nothing can be drawn, too.

    Args:
        console: Where to draw; standard error, so that output can be piped.
        waiting_for: What is shown until the first stage reports.
    """
    columns = (TextColumn("{task.description:<12}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("{task.fields[note]}", markup=False))  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        known: dict[str, TaskID] = {waiting_for: progress.add_task(waiting_for, total=None, note="")}

        def listen(stage: str, done: int, total: int, note: str) -> None:
            if stage == WAITING:
                progress.console.print(Text(f"takedown: waiting: {note}"), soft_wrap=True)
                return
            if waiting_for in known:
                progress.remove_task(known.pop(waiting_for))
            if stage not in known:
                known[stage] = progress.add_task(stage, total=total or None, note="")
            progress.update(known[stage], completed=done, total=total or None, note=note)

        with listening(listen):
            yield progress
