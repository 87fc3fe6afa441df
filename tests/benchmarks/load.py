"""What a long history and a long queue cost: `status`, `log` and `submit` at two sizes, from the shell and in process.

    python -m tests.benchmarks.load [--versions 1000] [--batches 500] [--batch-size 20] [--rounds 5] [--json FILE]

A workspace with so many published versions and waiting batches is made, and one of a tenth of that. Each verb is called
in a process of its own: from the shell with everything that a user waits for, and in a process that has loaded the
command line already, where the time is that of the call alone. Wall-clock and CPU seconds, medians; the most memory
that any process had. `submit` takes in one more batch each time.

The events of a step in these workspaces name no evidence (`making.load`), so `takedown verify` finds breaks in them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from tests.benchmarks.store import CLI, ROOT, Tree, child, say

VERBS = ("status", "log", "submit")
LOADED = """
import json, sys, time
from flows import cli
clocks = time.perf_counter(), time.process_time()
try:
    cli.main()
finally:
    took = time.perf_counter() - clocks[0], time.process_time() - clocks[1]
    print(json.dumps(took), file=sys.stderr)
"""
"""The command line with its own time behind everything else on standard error."""
WAYS = {"shell": CLI, "process": LOADED}


def timed(code: str, arguments: Sequence[str], errors: Path) -> tuple[float, float, int]:
    """Run Python code with arguments; returns its seconds, its CPU seconds and the most memory that it had, in bytes.

    Raises:
        ValueError: It failed.
    """
    command = [sys.executable, "-P", "-c", code, *arguments]
    start = time.perf_counter()
    with errors.open("wb") as stream:
        quiet = os.open(os.devnull, os.O_WRONLY)
        actions = [(os.POSIX_SPAWN_DUP2, quiet, 1), (os.POSIX_SPAWN_DUP2, stream.fileno(), 2)]
        # Not `subprocess`, which does not tell what a process used; nor a fork, whose memory would count.
        number = os.posix_spawn(sys.executable, command, {**os.environ, "PYTHONPATH": str(ROOT)}, file_actions=actions)
        os.close(quiet)
        _, status, used = os.wait4(number, 0)
    seconds = time.perf_counter() - start
    if status:
        raise ValueError(f"{' '.join(arguments)}: failed\n{errors.read_text()}")
    return seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


def arguments_of(verb: str, workspace: Path, scratch: Path, label: str) -> list[str]:
    """The arguments of a call; a new batch for each `submit`."""
    start = ["-w", str(workspace), verb]
    if verb != "submit":
        return start
    name = f"more-{os.getpid()}-{label}"
    requests = [
        {"request_id": f"{name}-{i}", "title": "Work", "rights_holder": "A. Holder", "basis": "copyright",
         "text": f"The {i}. text of batch {label}, in which there are some words that nobody has to remember."}
        for i in range(20)
    ]  # fmt: skip
    path = scratch / f"{name}.json"
    path.write_text(json.dumps({"batch_id": name, "received_at": "2026-11-23T09:00:00Z", "requests": requests}))
    return [*start, str(path), "--actor", "load"]


def measure(workspace: Path, rounds: int, scratch: Path) -> Tree:
    """Every verb each way, so many times; medians, and the peak of memory."""
    found: Tree = {}
    for verb in VERBS:
        for way, code in WAYS.items():
            say(f"{workspace.name}: {verb}, {way}")
            rows = list[tuple[float, float, int]]()
            for number in range(rounds):
                call = arguments_of(verb, workspace, scratch, f"{way}-{workspace.name}-{number}")
                wall, cpu, peak = timed(code, call, scratch / "errors")
                if way == "process":
                    wall, cpu = json.loads((scratch / "errors").read_text().splitlines()[-1])
                rows.append((wall, cpu, peak))
            found[f"{verb} {way}"] = {
                "seconds": statistics.median(r[0] for r in rows),
                "cpu_seconds": statistics.median(r[1] for r in rows),
                "peak_bytes": max(r[2] for r in rows),
            }
    return found


@contextmanager
def folder_of(kept: Path | None) -> Iterator[Path]:
    """Where workspaces are made: a folder that stays, or one that goes."""
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="load-benchmark-") as name:
        yield Path(name)


def made(folder: Path, versions: int, batches: int, size: int) -> Path:
    """The workspace of a size, made where it is not there yet."""
    path = folder / f"{versions}-{batches}-{size}"
    if not path.is_dir():
        say(f"making {versions} versions and {batches} batches of {size}")
        part = folder / f".{path.name}"
        shutil.rmtree(part, ignore_errors=True)  # what a stopped benchmark left
        child("making", "load", part, versions, batches, size)
        part.rename(path)
    return path


def shown(sizes: Sequence[Tree]) -> Table:
    """All numbers as a Markdown table."""
    table = Table(title="What a long history and a long queue cost", box=box.MARKDOWN)
    table.add_column("", no_wrap=True)
    for size in sizes:
        label = f"{size['versions']} versions, {size['waiting']} waiting: "
        for head in ("s", "CPU s", "MiB"):
            table.add_column(label + head, justify="right")
    for name in sizes[0]["verbs"]:
        cells = [
            cell
            for size in sizes
            for found in (size["verbs"][name],)
            for cell in (
                f"{found['seconds']:.2f}", f"{found['cpu_seconds']:.2f}", f"{found['peak_bytes'] / 2**20:.0f}"
            )
        ]  # fmt: skip
        table.add_row(name, *cells)
    return table


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--versions", type=int, default=1000, help="published versions (default 1000)")
    parser.add_argument("--batches", type=int, default=500, help="batches that wait (default 500)")
    parser.add_argument("--batch-size", type=int, default=20, help="requests of each (default 20)")
    parser.add_argument("--rounds", type=int, default=5, help="calls of which the median counts (default 5)")
    parser.add_argument("--work", type=Path, help="folder to keep the workspaces in, and to take them from again")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    options = options_of(arguments)
    sizes = list[Tree]()
    with folder_of(options.work) as folder, tempfile.TemporaryDirectory(prefix="load-batches-") as scratch:
        for share in (10, 1):
            versions, batches = max(1, options.versions // share), max(1, options.batches // share)
            path = made(folder, versions, batches, options.batch_size)
            verbs = measure(path, options.rounds, Path(scratch))
            sizes.append({"versions": versions, "waiting": batches * options.batch_size, "verbs": verbs})
    found = {"cpus": os.cpu_count(), "load": os.getloadavg()[0], "rounds": options.rounds, "sizes": sizes}
    Console(width=200).print(shown(sizes), f"\n{found['cpus']} CPUs, load {found['load']:.1f} at the end")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
