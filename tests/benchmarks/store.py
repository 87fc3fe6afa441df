"""What a version costs: disk, publish, restore, memory, for this store and for the usual ways, side by side in one run.

Run ``python -m tests.benchmarks.store --help``. A sequence of versions, each changing a share of the entries of the one
before, is published and restored five ways; every restored file is compared with the one that was published:

    deltas   this store as it is used
    whole    this store, every version whole: the same checks and syncs
    tensors  every tensor an object by digest
    zstd     each file compressed with the one before as dictionary
    copy     copyfile and fsync, nothing hashed: the floor

Every call runs in a process of its own. The ways take turns, and ratios are taken within a turn, so that what else the
machine does hits all alike. Files are in the page cache; all writes are synced.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = ("deltas", "whole", "tensors", "zstd", "copy")
ZSTD_MOST = 1 << 30
"""Bytes of a file up to which zstd can reach all of the file before: its longest window is 2 GiB."""
CLI = """
import sys
from flows.cli import main
try:
    main()
finally:
    assert "torch" not in sys.modules, "torch was imported"
"""

Tree = dict[str, Any]


def child(module: str, *arguments: object) -> Tree:
    """Run a function of `benchmarks.jobs` or `benchmarks.making` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", f"benchmarks.{module}", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))},
        stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    found: Tree = json.loads(done.stdout)
    return found


def say(text: str) -> None:
    """Progress, beside the result."""
    print(text, file=sys.stderr, flush=True)


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def stored_bytes(folder: Path) -> int:
    """Size of everything in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def machine(work: Path) -> Tree:
    """What the machine can do: numbers to judge the others by."""
    piece, pieces = os.urandom(1 << 24), 16  # small: a child's peak memory is never below its parent's
    sha = hashlib.sha256()
    start = time.perf_counter()
    for _ in range(pieces):
        sha.update(piece)
    hashing = time.perf_counter() - start
    with (work / "random").open("wb") as stream:
        stream.writelines([piece] * pieces)
    start = time.perf_counter()
    shutil.copyfile(work / "random", work / "copy")
    copying = time.perf_counter() - start
    for name in ("random", "copy"):
        (work / name).unlink()
    return {
        "cpus": os.cpu_count(),
        "sha256_gb_s": pieces * len(piece) / hashing / 1e9,
        "copyfile_gb_s": pieces * len(piece) / copying / 1e9,
        "load": os.getloadavg()[0],
    }


def publish_all(work: Path, options: argparse.Namespace, dtype: str) -> tuple[list[Tree], list[str], dict[int, str]]:
    """Publish the sequence every way; returns one record per version from 1 on, the ways, and the files' digests."""
    models, records, digests = work / "models", list[Tree](), dict[int, str]()
    models.mkdir()
    if options.model:
        child("making", "copied", options.model, models / "0")
    else:
        child("making", "model", models / "0", options.megabytes, dtype)
    small = (models / "0" / "model.safetensors").stat().st_size <= ZSTD_MOST
    variants = [name for name in VARIANTS if name != "zstd" or small]
    for version in range(options.versions + 1):
        say(f"{dtype}: version {version} of {options.versions}")
        record: Tree = {}
        if version:
            record = child("making", "step", models / str(version - 1), models / str(version), options.density, version)
        digests[version] = file_digest(models / str(version) / "model.safetensors")
        for name in variants:
            before = stored_bytes(work / name)
            took = child("jobs", name, "publish", work / name, models, version)
            record[name] = {**took, "bytes": stored_bytes(work / name) - before}
        if version:
            records.append(record)
            shutil.rmtree(models / str(version - 1))
    return records, variants, digests


def restore_all(work: Path, variants: Iterable[str], version: int, digest: str, rounds: int) -> list[Tree]:
    """Restore a version every way, in turns; one record per round. Every file must be the published one.

    One more round comes before them and fills the page cache.
    """
    records = list[Tree]()
    for number in range(rounds + 1):
        record: Tree = {}
        for name in variants:
            record[name] = child("jobs", name, "restore", work / name, work / "out", version)
            if file_digest(work / "out" / "model.safetensors") != digest:
                raise ValueError(f"{name}: v{version} was restored with other bytes than were published")
            shutil.rmtree(work / "out")
        if number:
            records.append(record)
    return records


def timing(records: list[Tree], name: str) -> Tree:
    """Medians of one way: seconds, multiple of the floor's time in the same turn; the fastest, and the most memory."""
    return {
        "seconds": statistics.median(r[name]["seconds"] for r in records),
        "fastest_seconds": min(r[name]["seconds"] for r in records),
        "times_copy": statistics.median(r[name]["seconds"] / r["copy"]["seconds"] for r in records),
        "peak_bytes": max(r[name]["peak_bytes"] for r in records),
    }


def sequence(work: Path, options: argparse.Namespace, dtype: str) -> Tree:
    """One whole comparison."""
    work.mkdir()
    published, variants, digests = publish_all(work, options, dtype)
    restored = {}
    for key, version in (("newest", options.versions), ("first", 1)):
        say(f"{dtype}: restore version {version}")
        restored[key] = restore_all(work, variants, version, digests[version], options.rounds)
    shutil.rmtree(work)
    ways = {}
    for name in variants:
        ways[name] = {
            "bytes": statistics.median(r[name]["bytes"] for r in published),
            "share_of_whole": statistics.median(r[name]["bytes"] / r["whole_bytes"] for r in published),
            "times_changed": statistics.median(r[name]["bytes"] / r["changed_bytes"] for r in published),
            "publish": timing(published, name),
            "restore": {key: timing(records, name) for key, records in restored.items()},
        }
    first = published[0]
    return {
        "dtype": dtype,
        "file_bytes": first["whole_bytes"],
        "versions": options.versions,
        "density": statistics.median(r["changed"] / r["entries"] for r in published),
        "changed_bytes": statistics.median(r["changed_bytes"] for r in published),
        "zstd": "measured" if "zstd" in variants else f"left out: files above {ZSTD_MOST} bytes",
        "ways": ways,
    }


def history(work: Path, versions: int, rounds: int) -> Tree:
    """How long a quick check of a long history takes, in the process and from the command line."""
    say(f"history of {versions} versions")
    start = time.perf_counter()
    child("making", "history", work / "history", versions)
    built = time.perf_counter() - start
    checks = [child("jobs", "quick-check", work / "history")["seconds"] for _ in range(rounds)]
    cold = list[float]()
    for _ in range(rounds):
        start = time.perf_counter()
        command = [sys.executable, "-P", "-c", CLI, "-w", str(work / "history"), "verify", "--quick"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)})
        cold.append(time.perf_counter() - start)
    return {
        "versions": versions,
        "build_seconds": built,
        "quick_check_seconds": statistics.median(checks),
        "cli_seconds": statistics.median(cold),
    }


# --- for people ---------------------------------------------------------------------------------------------


def ways_table(found: Tree) -> Table:
    """One comparison as a Markdown table."""
    last = found["versions"]
    title = (
        f"{found['dtype']}, {found['file_bytes'] / 1e6:.0f} MB, {found['density']:.2%} of the entries changed per "
        f"version, {last} versions"
    )
    made = Table(title=title, box=box.MARKDOWN)
    heads = (
        "", "bytes/version", "of whole", "× changed", "publish s", "× copy", "MiB", f"restore v{last} s",
        "of copy's speed", "MiB", "restore v1 s", "of copy's speed",
    )  # fmt: skip
    for head in heads:
        made.add_column(head, justify="right" if head else "left", no_wrap=True)
    for name, way in found["ways"].items():
        publish, newest, first = way["publish"], way["restore"]["newest"], way["restore"]["first"]
        made.add_row(
            name, f"{way['bytes']:,.0f}", f"{way['share_of_whole']:.2%}", f"{way['times_changed']:.2f}",
            f"{publish['seconds']:.2f}", f"{publish['times_copy']:.1f}", f"{publish['peak_bytes'] / 2**20:.0f}",
            f"{newest['seconds']:.2f}", f"{1 / newest['times_copy']:.0%}", f"{newest['peak_bytes'] / 2**20:.0f}",
            f"{first['seconds']:.2f}", f"{1 / first['times_copy']:.0%}",
        )  # fmt: skip
    return made


def targets(found: Tree) -> list[tuple[str, str, bool]]:
    """What the store promises, what was measured, whether it holds."""
    deltas, whole = found["ways"]["deltas"], found["ways"]["whole"]
    speed = {key: 1 / timed["times_copy"] for key, timed in deltas["restore"].items()}
    against_whole = deltas["publish"]["seconds"] / whole["publish"]["seconds"]
    size, copies = deltas["times_changed"], deltas["publish"]["times_copy"]
    return [
        ("a version takes at most 1.3 × what changed", f"{size:.2f} ×", size <= 1.3),
        ("v1 restores at 50 % of copy's speed or more", f"{speed['first']:.0%}", speed["first"] >= 0.5),
        (f"so does v{found['versions']}, a chain of as many deltas", f"{speed['newest']:.0%}", speed["newest"] >= 0.5),
        ("publish is no slower than whole with the same checks", f"{against_whole:.2f} ×", against_whole <= 1),
        ("publish is no slower than copyfile + fsync", f"{copies:.2f} ×", copies <= 1),
    ]


def targets_table(found: Tree) -> Table:
    """The targets as a Markdown table."""
    made = Table(title=f"Targets, {found['dtype']}", box=box.MARKDOWN)
    for head in ("target", "measured", "reached"):
        made.add_column(head, no_wrap=True)
    for target, measured, reached in targets(found):
        made.add_row(target, measured, "yes" if reached else "no")
    return made


def steps_table(rows: list[Tree]) -> Table:
    """The deltas of an existing workspace as a Markdown table."""
    made = Table(title="Deltas of the workspace", box=box.MARKDOWN)
    for head in ("version", "file", "changed", "bytes", "of whole", "× changed"):
        made.add_column(head, justify="left" if head == "file" else "right", no_wrap=True)
    for row in rows:
        times = f"{row['bytes'] / row['changed_bytes']:.2f}" if row["changed_bytes"] else "–"
        made.add_row(
            f"v{row['version']}", row["file"], f"{row['changed'] / row['entries']:.2%}", f"{row['bytes']:,}",
            f"{row['bytes'] / row['whole']:.2%}", times,
        )  # fmt: skip
    return made


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--megabytes", type=float, default=240, help="size of the made models (default 240)")
    parser.add_argument("--versions", type=int, default=20, help="length of the sequence (default 20)")
    parser.add_argument("--density", type=float, default=0.01, help="share of entries each step changes (default .01)")
    parser.add_argument("--dtype", default="bf16,fp32", help="of the made models: bf16, fp32, or bf16,fp32 (default)")
    parser.add_argument("--rounds", type=int, default=5, help="restores of which the median counts (default 5)")
    parser.add_argument("--model", type=Path, help="folder of a real model in one file, instead of made ones")
    parser.add_argument("--workspace", type=Path, help="only report the deltas of this workspace")
    parser.add_argument(
        "--history",
        type=int,
        default=1000,
        help="versions of the long history (default 1000, which take long to make; 0: none)",
    )
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    options = options_of(arguments)
    console = Console(width=200)
    found: Tree = {}
    with tempfile.TemporaryDirectory(prefix="store-benchmark-") as name:
        work = Path(name)
        found["machine"] = machine(work)
        console.print(
            "{cpus} CPUs, SHA-256 {sha256_gb_s:.2f} GB/s per core, copyfile {copyfile_gb_s:.2f} GB/s without fsync, "
            "load {load:.1f} before the start".format(**found["machine"])
        )
        if options.workspace:
            found["steps"] = child("jobs", "steps", options.workspace)["result"]
            console.print(steps_table(found["steps"]))
        else:
            dtypes = (
                ["real"] if options.model else [{"bf16": "BF16", "fp32": "F32"}[d] for d in options.dtype.split(",")]
            )
            found["sequences"] = []
            for dtype in dtypes:
                found["sequences"].append(sequence(work / dtype, options, dtype))
                console.print(ways_table(found["sequences"][-1]), targets_table(found["sequences"][-1]))
        if options.history and not options.workspace:
            found["history"] = history(work, options.history, options.rounds)
            console.print(
                "History of {versions} versions (made in {build_seconds:.0f} s): quick check "
                "{quick_check_seconds:.2f} s, `takedown verify --quick` from the shell {cli_seconds:.2f} s".format(
                    **found["history"]
                )
            )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
