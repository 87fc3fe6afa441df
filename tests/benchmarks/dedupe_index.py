"""The index of takedowns against datasketch's ``MinHashLSH``: build, query, memory, and opening, in one run.

    python -m tests.benchmarks.dedupe_index [--passages 100000] [--large 1000000] [--rounds 3] [--json FILE]

Passages are drawn at random: 98 shingles each, the window of the default parameters, signed as always. Half of the
queries are passages with half of their shingles exchanged (Jaccard 1/3), the others are new. Both indexes have the
default 64 bands of 2 rows and get the same ready signatures, and for every query both must give the same candidates.

Times are CPU seconds of one thread, the two taking turns; ratios are taken within a turn. Memory is what the resident
set of a process of its own grows by: datasketch's index built there, ours opened from disk, checked, and searched with
all queries. Opening is wall time with the files in the page cache.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasketch import MinHashLSH
from rich.console import Console
from rich.table import Table

from pipeline.index import DedupeIndex
from pipeline.segments import Segment, Windows, build, describe, write_segment
from pipeline.shingles import DedupeParameters, Prints, Signatures, sign, to_lean

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = DedupeParameters()
SHINGLES = PARAMETERS.window_shingles
BLOCK = 5_000
TARGETS = {"build": 30.0, "query": 10.0, "memory": 20.0, "open_seconds": 0.1}

Tree = dict[str, Any]


def say(text: str) -> None:
    """Progress, beside the result."""
    print(text, file=sys.stderr, flush=True)


def passages(count: int, seed: int = 0) -> Iterator[tuple[Prints, Signatures]]:
    """Blocks of passages: (block, 98) sorted fingerprints and (block, 128) signatures."""
    for at in range(0, count, BLOCK):
        rng = np.random.default_rng((seed, at))
        prints = np.sort(rng.integers(0, 1 << 64, (min(BLOCK, count - at), SHINGLES), dtype=np.uint64), axis=1)
        yield prints, sign(list(prints), PARAMETERS)


def drawn(count: int) -> tuple[Prints, Signatures]:
    """All passages at once."""
    prints, signatures = zip(*passages(count), strict=True)
    return np.concatenate(prints), np.concatenate(signatures)


def queries(prints: Prints, count: int) -> Windows:
    """Windows to ask for, half of them edited passages."""
    rng = np.random.default_rng(1)
    asked = rng.integers(0, 1 << 64, (count, SHINGLES), dtype=np.uint64)
    known = prints[rng.integers(0, len(prints), count // 2)]
    asked[: len(known), : SHINGLES // 2] = rng.permuted(known, axis=1)[:, : SHINGLES // 2]
    return Windows(sign(list(asked), PARAMETERS), np.arange(count), count)


def cpu(work: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """CPU seconds of a call, and its result."""
    start = time.process_time()
    result = work(*arguments)
    return time.process_time() - start, result


def datasketch_index(signatures: Signatures) -> MinHashLSH:
    """What a user of datasketch does with signatures."""
    lsh = MinHashLSH(num_perm=PARAMETERS.num_perm, params=(PARAMETERS.bands, PARAMETERS.rows))
    for number, sketch in enumerate(to_lean(signatures, PARAMETERS)):
        lsh.insert(number, sketch)
    return lsh


def datasketch_answers(lsh: MinHashLSH, asked: Windows) -> list[tuple[int, int]]:
    """Pairs of query and candidate."""
    sketches = enumerate(to_lean(asked.signatures, PARAMETERS))
    return [(number, name) for number, sketch in sketches for name in sorted(lsh.query(sketch))]


def our_index(prints: Prints, signatures: Signatures) -> Segment:
    """The same in memory."""
    windows = Windows(signatures, np.arange(len(signatures)), len(signatures))
    return build(range(1, len(prints) + 1), list(prints), windows, PARAMETERS)


def our_answers(segment: Segment, asked: Windows) -> list[tuple[int, int]]:
    """Pairs of query and candidate."""
    texts, works = segment.candidates(asked, PARAMETERS)
    return list(zip(texts.tolist(), works.tolist(), strict=True))


def one_round(prints: Prints, signatures: Signatures, asked: Windows) -> Tree:
    """Build and ask both once."""
    theirs, lsh = cpu(datasketch_index, signatures)
    their_query, their_pairs = cpu(datasketch_answers, lsh, asked)
    del lsh
    ours, segment = cpu(our_index, prints, signatures)
    our_query, our_pairs = cpu(our_answers, segment, asked)
    assert our_pairs == their_pairs, "the candidates differ"
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        write_segment(Path(folder), segment, describe(segment, PARAMETERS, 1, 0, "sha256:"))
        written = time.perf_counter() - start
    return {
        "build": {"datasketch": theirs, "ours": ours},
        "query": {"datasketch": their_query, "ours": our_query},
        "candidates": len(our_pairs),
        "write_and_sync_wall": written,
    }


# --- memory: each in a process of its own -----------------------------------------------------------------


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def memory_of_datasketch(count: int) -> int:
    """Growth by an index; the signatures are drawn block by block and not kept."""
    next(passages(BLOCK, seed=2))  # what drawing leaves behind is no index
    lsh = MinHashLSH(num_perm=PARAMETERS.num_perm, params=(PARAMETERS.bands, PARAMETERS.rows))
    before, number = resident(), 0
    for _, signatures in passages(count):
        for sketch in to_lean(signatures, PARAMETERS):
            lsh.insert(number, sketch)
            number += 1
    return resident() - before


def memory_of_ours(folder: Path, count: int) -> int:
    """Growth by opening an index and asking it."""
    first, _ = next(passages(count))
    asked = queries(first, min(10_000, count))
    before = resident()
    with DedupeIndex.open(folder) as index:
        index.candidates_many(asked)
        return resident() - before


def child(*arguments: object) -> int:
    """A measurement in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.dedupe_index", "--measure", *map(str, arguments)]
    return int(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout)


# --- on disk ----------------------------------------------------------------------------------------------


def fill(folder: Path, count: int) -> float:
    """Make an index of takedowns of one passage each; returns the wall seconds that it took, signing left out."""
    taken = 0.0
    with DedupeIndex.open(folder) as index:
        number = 0
        for prints, signatures in passages(count):
            start = time.perf_counter()
            index._insert([(f"R{number + at}", prints[at], signatures[at, None]) for at in range(len(prints))])
            taken += time.perf_counter() - start
            number += len(prints)
    return taken


def on_disk(folder: Path, count: int) -> Tree:
    """Record and segments of many passages: making, opening, asking."""
    say(f"{count:,} passages on disk …")
    filled = fill(folder, count)
    first, _ = next(passages(count))
    asked = queries(first, 1_000)

    def wall(work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    with DedupeIndex.open(folder) as index:
        segmented = wall(lambda: index.candidates_many(asked))
    opened = []
    for _ in range(9):
        start = time.perf_counter()
        DedupeIndex.open(folder).close()
        opened.append(time.perf_counter() - start)
    with DedupeIndex.open(folder) as index:
        first_search = wall(lambda: index.candidates_many(asked))
        again = statistics.median(wall(lambda: index.candidates_many(asked)) for _ in range(5))
    return {
        "passages": count,
        "record_bytes": (folder / "index.db").stat().st_size,
        "segment_bytes": sum(path.stat().st_size for path in folder.glob("segments/*")),
        "segment_files": len(list(folder.glob("segments/*"))),
        "insert_seconds": filled,
        "segments_seconds": segmented,
        "open_seconds": statistics.median(opened),
        "first_search_seconds": first_search,
        "thousand_queries_seconds": again,
    }


def measured(count: int, large: int, rounds: int, work: Path) -> Tree:
    """Everything."""
    prints, signatures = drawn(count)
    asked = queries(prints, min(10_000, count))
    turns = []
    for number in range(rounds):
        say(f"round {number + 1} of {rounds} …")
        turns.append(one_round(prints, signatures, asked))
    del prints, signatures
    small = on_disk(work / "small", count)
    say("memory …")
    theirs, ours = child("datasketch", count, work), child("ours", count, work / "small")
    found: Tree = {
        "passages": count,
        "queries": asked.texts,
        "rounds": turns,
        "ratios": {
            key: statistics.median(turn[key]["datasketch"] / turn[key]["ours"] for turn in turns)
            for key in ("build", "query")
        },
        "memory": {"datasketch": theirs, "ours": ours},
        "small": small,
    }
    found["ratios"]["memory"] = theirs / ours
    if large:
        found["large"] = on_disk(work / "large", large)
    return found


def show(found: Tree) -> None:
    """A table for people, in Markdown."""
    count, turns = found["passages"], found["rounds"]
    table = Table(title=f"{count:,} passages", box=None)
    for column in ("", "datasketch", "ours", "ratio", "target"):
        table.add_column(column)
    for key, units in (("build", count), ("query", found["queries"])):
        rates = [units / statistics.median(turn[key][who] for turn in turns) for who in ("datasketch", "ours")]
        shown = [f"{rate:,.0f}/s" for rate in rates]
        table.add_row(key, *shown, f"{found['ratios'][key]:.1f}x", f">= {TARGETS[key]:.0f}x")
    memory = [f"{found['memory'][who] / 1e6:,.0f} MB" for who in ("datasketch", "ours")]
    table.add_row("memory", *memory, f"1/{found['ratios']['memory']:.0f}", f"<= 1/{TARGETS['memory']:.0f}")
    console = Console(width=100)
    console.print(table)
    for key in ("small", "large"):
        if key in found:
            disk = found[key]
            console.print(
                f"{disk['passages']:,} passages on disk: record {disk['record_bytes'] / 1e6:,.0f} MB, "
                f"{disk['segment_files']} segments {disk['segment_bytes'] / 1e6:,.0f} MB; "
                f"inserted in {disk['insert_seconds']:.1f} s, segments made in {disk['segments_seconds']:.1f} s; "
                f"opens in {disk['open_seconds'] * 1e3:.1f} ms (target < {TARGETS['open_seconds'] * 1e3:.0f}), "
                f"first search {disk['first_search_seconds']:.2f} s (every byte checked), then 1,000 queries "
                f"{disk['thousand_queries_seconds'] * 1e3:.0f} ms"
            )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument(
        "--large", type=int, default=1_000_000, help="passages on disk for the last part; 0 leaves it out"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all numbers there")
    parser.add_argument("--measure", nargs=3, metavar=("WHAT", "PASSAGES", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        what, count, folder = given.measure
        print(memory_of_datasketch(int(count)) if what == "datasketch" else memory_of_ours(Path(folder), int(count)))
        return
    with tempfile.TemporaryDirectory(prefix="dedupe-index-") as folder:
        found = measured(given.passages, given.large, given.rounds, Path(folder))
    show(found)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
