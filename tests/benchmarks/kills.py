"""Real runs, killed at any moment and started again: does the workspace end as if nothing had happened?

    python -m tests.benchmarks.kills [--moments 200] [--seeds 0,1,2] [--json FILE]

For each seed a workspace with a real small model and one published version is made, and `takedown run BATCH` is let run
to its end once: two requests are taken in, worked on, published as v2. Then, in copies of the workspace, the same
command is killed (SIGKILL) and given again until it ends by itself, and everything that lasts is compared (`outcome`).

Half of the moments are boundaries: the process kills itself right after the record of a stage was written. The others
are random: another process kills it once it has used a share of the CPU time that the undisturbed run used between its
first ledger entry and its end. CPU time, because on a busy machine a moment of the clock means nothing. A tenth of all
runs is killed a second time.

Processes are forked from one that has loaded everything, so that no moment is wasted on imports, and talk to one
Prefect server: that is the command line with ``PREFECT_API_URL`` set, without the start of a server of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

Tree = dict[str, Any]

BOUNDARIES = (
    "plan", "dedupe", "screened/D", "screened/E", "screen", "saliency", "unlearn", "repair", "merge", "evaluate",
    "gate",
)  # fmt: skip
"""Records after which a process kills itself."""
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
RENEWED = ("plan", "reference")
"""Records that every start writes again, without computing anything."""
RANDOM_FACTS = ("manifest", "signature")
"""What the ledger says of a version and two runs never share: the manifest's digest, which holds a time, and the
digest of an ECDSA signature, which is drawn."""


class Moment(NamedTuple):
    """When a process is killed: after a stage's record, or after a share of the run's CPU time."""

    boundary: str = ""
    share: float = 0.0


# --- processes --------------------------------------------------------------------------------------------


def started(workspace: Path, batch: Path, log: Path, boundary: str = "") -> int:
    """Fork a process that runs the command; returns its number. It kills itself after a boundary's record."""
    if pid := os.fork():
        return pid
    code = 70
    try:
        os.setsid()
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        if boundary:
            _kill_after(boundary)
        from flows import cli

        sys.argv = ["takedown", "-w", str(workspace), "run", str(batch), "--actor", "tester"]
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
    finally:
        os._exit(code)  # nothing of the parent's may be unwound here


def apart(call: Callable[[], object]) -> None:
    """Call something in a forked process, so that no thread of its stays in this one, which forks others.

    Raises:
        ValueError: It failed.
    """
    if (pid := os.fork()) == 0:
        code = 1
        try:
            call()
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise ValueError("what was to be prepared was not; the reason stands above")


def _kill_after(boundary: str) -> None:
    """Have this process die when the record of a stage has been written."""
    from pipeline import runs

    write = runs.write_json

    def written(path: Path, value: object) -> None:
        write(path, value)
        if path.with_suffix("").as_posix().endswith(f"/{boundary}"):
            os.kill(os.getpid(), signal.SIGKILL)

    runs.write_json = written


def cpu_seconds(pid: int) -> float:
    """CPU time of a living process, all its threads, in seconds; resolution 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def ended(pid: int, watch: Callable[[float], bool] = lambda cpu: False) -> int | None:
    """Wait for a process; returns its exit code, or None where it was killed.

    Args:
        pid: The process.
        watch: Called every few milliseconds with its CPU seconds; kills it by returning True.
    """
    while True:
        cpu = cpu_seconds(pid)
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)
        if watch(cpu):
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.003)


# --- what a run leaves --------------------------------------------------------------------------------------


def entries_of(workspace: Path) -> Sequence[Any]:
    """All entries of the ledger."""
    from pipeline.ledger import Ledger

    with Ledger.open(workspace / "ledger.db", read_only=True) as ledger:
        return ledger.entries()


def outcome(workspace: Path) -> Tree:
    """Everything that lasts, but for what differs from run to run by nature.

    Left out: times, and with them digests and signatures of entries, checkpoints and seals; of a manifest its time,
    of what the ledger says of it `RANDOM_FACTS`, and the files that these name; the random keys under which the vault
    keeps a text, not the text; Prefect's own records.

    Of the store all names of objects and deltas, which are digests of their contents; of the index every row. That the
    files hold what their names say is what `takedown verify` checks, which must find nothing.
    """
    from pipeline.states import request_states
    from pipeline.storecheck import Depth
    from pipeline.vault import Vault
    from pipeline.verify import verify
    from pipeline.versions import VersionStore
    from pipeline.workspace import open_workspace

    opened, entries = open_workspace(workspace), entries_of(workspace)
    events = [entry.event.model_dump(mode="json") for entry in entries]
    for event in events:
        for name in RANDOM_FACTS:
            event["data"].pop(name, None)
    store, vault = VersionStore(opened.versions), Vault(opened.vault)
    manifests = [store.manifest(n).model_dump(mode="json") | {"created_at": ""} for n in store.numbers()]
    folders = [p for p in opened.versions.iterdir() if p.is_dir()]
    with closing(sqlite3.connect(f"file:{opened.index / 'index.db'}?mode=ro", uri=True)) as index:
        rows = sorted(index.iterdump())
    return {
        "events": events,
        "states": [s.model_dump(mode="json") | {"decided_at": ""} for s in request_states(entries).values()],
        "manifests": manifests,
        "contents": sorted(str(p.relative_to(opened.versions)) for f in folders for p in f.rglob("*") if p.is_file()),
        "index": rows,
        "vault": [vault.get(name).model_dump(mode="json") for name in vault.ids()],
        "left in the run": sorted(p.name for f in opened.runs.iterdir() for p in f.iterdir()),
        "breaks": [b.model_dump() for b in verify(opened, Depth.DEEP)],
    }


def records_of(workspace: Path) -> dict[str, tuple[int, int]]:
    """The records of stages under ``runs/``, by run and stage, each with the file that it is and when it was made.

    By run, because what the step before left there stays until the next one is planned.
    """
    found, runs = {}, workspace / "runs"
    for path in sorted(runs.glob("run-*/**/*.json")):
        found[path.relative_to(runs).with_suffix("").as_posix()] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def stage_of(workspace: Path) -> str:
    """How far a killed process came: the last stage with a record, or what the ledger says."""
    kinds = Counter(e.event.kind for e in entries_of(workspace))
    if kinds["published"] > 1:
        return "published"
    if kinds["received"] < 5:
        return "taking in"
    there = {name.partition("/")[2] for name in records_of(workspace)}
    planned = kinds["planned"] > 1
    return next((name for name in reversed(BOUNDARIES) if name in there and planned), "received")


# --- moments ------------------------------------------------------------------------------------------------


class Undisturbed(NamedTuple):
    """A run that nobody killed: CPU seconds to its first entry and to its end, and what it left."""

    first: float
    last: float
    left: Tree


def undisturbed(start: Path, work: Path) -> Undisturbed:
    """Let the command run to its end in a copy of the workspace."""
    workspace, batch = copy_of(start, work / "undisturbed")
    before, seen = len(entries_of(workspace)), [0.0, 0.0]

    def watch(cpu: float) -> bool:
        seen[1] = cpu
        if not seen[0] and _entry_count(workspace) > before:
            seen[0] = cpu
        return False

    pid = started(workspace, batch, work / "log")
    if code := ended(pid, watch):
        raise ValueError(f"the undisturbed run ended with {code}\n{(work / 'log').read_text()}")
    left = outcome(workspace)
    if left["breaks"] or sum(e["kind"] == "published" for e in left["events"]) != 2:
        raise ValueError(f"the undisturbed run is none: {left['breaks']}")
    return Undisturbed(seen[0], seen[1], left)


def _entry_count(workspace: Path) -> int:
    with closing(sqlite3.connect(f"file:{workspace / 'ledger.db'}?mode=ro", uri=True)) as connection:
        return int(connection.execute("SELECT count(*) FROM entries").fetchone()[0])


def copy_of(start: Path, target: Path) -> tuple[Path, Path]:
    """A copy of the prepared workspace and its batch."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(start, target)
    return target / "ws", target / "batch-2.json"


def moments_of(count: int, seed: int) -> list[Moment]:
    """Boundaries and random moments in turn."""
    draw = random.Random(f"moments {seed}")
    boundaries = [Moment(boundary=BOUNDARIES[i % len(BOUNDARIES)]) for i in range(count // 2)]
    return [*boundaries, *(Moment(share=draw.random()) for _ in range(count - len(boundaries)))]


def survive(start: Path, work: Path, moment: Moment, whole: Undisturbed, again: float | None) -> Tree:
    """Kill a run at a moment, give the command again until it ends, compare; returns what was found.

    Args:
        start: The prepared workspace.
        work: For the copy.
        moment: When the first process is killed.
        whole: The undisturbed run.
        again: Share of its CPU time at which the second one is killed, too; None to let it end.
    """
    workspace, batch = copy_of(start, work / "killed")
    log = work / "log"
    log.unlink(missing_ok=True)

    def at(share: float) -> Callable[[float], bool]:
        return lambda cpu: cpu >= whole.first + share * (whole.last - whole.first)

    first = started(workspace, batch, log, moment.boundary)
    code = ended(first) if moment.boundary else ended(first, at(moment.share))
    found: Tree = {"stage": stage_of(workspace), "killed": int(code is None), "problems": []}
    before = records_of(workspace)
    if code is None and again is not None:
        code = ended(started(workspace, batch, log), at(again))
        found["killed"] += int(code is None)
        before = records_of(workspace) | before  # the first file of each
    if code is None:
        code = ended(started(workspace, batch, log))
    if code != 0:
        found["problems"].append(f"ended with {code}: {log.read_text()[-2000:]}")
    after = records_of(workspace)
    repeated = [n for n, file in before.items() if n.split("/")[-1] not in RENEWED and after.get(n, file) != file]
    if repeated:
        found["problems"].append(f"computed again: {', '.join(repeated)}")
    left = outcome(workspace)
    found["problems"] += [f"{name}: differs" for name, value in left.items() if value != whole.left[name]]
    if found["problems"]:
        found["differences"] = {name: value for name, value in left.items() if value != whole.left[name]}
    return found


# --- workspaces -----------------------------------------------------------------------------------------------


def prepare(folder: Path, model: Path, seed: int, method: str) -> None:
    """Make a folder with a workspace at v1, and the batch of the run that is killed."""
    from tests.workspaces import WORKS, near_copy, new_workspace, step, take_in, with_settings, write_batch

    folder.mkdir()
    settings = with_settings(runtime={"seed": seed, "note_s": 0.0}, unlearn={"method": method})
    workspace = new_workspace(folder / "ws", model, settings)
    take_in(workspace, "batch-1", {"A": WORKS["one"], "B": near_copy(WORKS["one"]), "C": WORKS["three"]})
    done = step(workspace)
    if done is None or done.outcome != "published":
        raise ValueError(f"v1 was not published with seed {seed}: {done}")
    write_batch(folder, "batch-2", {"D": WORKS["two"], "E": WORKS["one"]})


def harness(work: Path, moments: int, seeds: Sequence[int], method: str, tell: Callable[[str], None]) -> list[Tree]:
    """All moments of all seeds, evenly; needs a Prefect server in ``PREFECT_API_URL``."""
    import torch

    torch.set_num_threads(1)
    from flows import cli, stepping, takedown  # noqa: F401 (loaded here, for all processes that are forked)
    from tests.workspaces import trained_model

    apart(lambda: trained_model(work))
    found = list[Tree]()
    for place, seed in enumerate(seeds):
        start = work / f"start-{seed}"
        apart(lambda start=start, seed=seed: prepare(start, work / "model", seed, method))  # type: ignore[misc]
        if threading.active_count() > 1:
            raise ValueError("other threads run here, and a forked process would lack them")
        whole = undisturbed(start, work)
        tell(f"seed {seed}: undisturbed {whole.last - whole.first:.1f} CPU s from the first entry to the end")
        draw = random.Random(f"again {seed}")
        for moment in moments_of(moments // len(seeds) + (place < moments % len(seeds)), seed):
            again = draw.random() if draw.random() < 0.1 else None
            row = survive(start, work, moment, whole, again) | {"seed": seed, **moment._asdict()}
            found.append(row)
            tell(f"{len(found)}/{moments}: {row['stage']}: {row['problems'] or 'survived'}")
    return found


def shown(rows: Sequence[Tree]) -> Table:
    """Moments by how far the killed process had come."""
    table = Table(title="Killed and started again", box=box.MARKDOWN)
    for head in ("last that was finished", "at the boundary", "at random", "survived / tried"):
        table.add_column(head, justify="left" if head.startswith("last") else "right")
    stages = ("taking in", "received", *BOUNDARIES, "published")
    for stage in (*stages, "all"):
        here = [r for r in rows if stage in ("all", r["stage"])]
        if here:
            fine, edges = sum(not r["problems"] for r in here), sum(bool(r["boundary"]) for r in here)
            table.add_row(stage, str(edges), str(len(here) - edges), f"{fine} / {len(here)}")
    return table


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--moments", type=int, default=200, help="runs that are killed (default 200)")
    parser.add_argument("--seeds", default="0,1,2", help="seeds of the runs (default 0,1,2)")
    parser.add_argument("--method", default="ssu", help="unlearn.method of the runs (default ssu)")
    parser.add_argument("--port", type=int, default=4290, help="of the Prefect server on 127.0.0.1 (default 4290)")
    parser.add_argument("--json", type=Path, help="also write what was found here")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Kill, compare, print, write; exit 1 where a run did not survive."""
    options = options_of(arguments)
    from flows.environment import QUIET
    from flows.server import own_server

    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        work = Path(name)
        # Before Prefect is imported: after that these change nothing.
        os.environ.update({**QUIET, "PREFECT_HOME": str(work / "prefect")})
        with own_server(work, options.port) as (api_url, _):
            os.environ["PREFECT_API_URL"] = api_url
            seeds = [int(seed) for seed in options.seeds.split(",")]
            rows = harness(
                work, options.moments, seeds, options.method, lambda text: print(text, file=sys.stderr, flush=True)
            )
    killed = sum(r["killed"] for r in rows)
    Console(width=160).print(shown(rows), f"\n{killed} processes killed in {len(rows)} runs, seeds {options.seeds}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if any(r["problems"] for r in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
