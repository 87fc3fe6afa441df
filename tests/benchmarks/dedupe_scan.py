"""Searching a corpus of several hundred megabytes: speed, memory, planted copies found, documents found wrongly.

A corpus is generated, or made from texts of a folder: JSON lines and plain text, packed and not, with copies planted in
one document of twenty. The works are single passages and whole long works; beside their shingles the set holds as
many random ones as asked for, for the size that the set of a large register has.

In: ``python -m tests.benchmarks.dedupe_scan [FOLDER] [--megabytes N] [--json FILE]``. Out: Markdown tables; every
measurement in a process of its own, the memory beside that of a search of a quarter of the corpus. Never: a time that
is not of the whole path from the file to the list.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import zstandard

from pipeline.corpus import corpus_files
from pipeline.fingerprints import CORPUS_PARAMETERS, FingerprintSet, _filter
from pipeline.normalise import words as slow_words
from pipeline.scan import Rule
from pipeline.search import find_copies
from tests.benchmarks.dedupe_quality import LICENCE, excerpt, misread, substituted

ROOT = Path(__file__).resolve().parent.parent.parent
WORK_WORDS = (150, 1000)
LINE_WORDS = (50, 3000)
PLANTED_EVERY = 20
KINDS: dict[str, Callable[[str, random.Random], str]] = {
    "whole work": lambda text, draw: text,
    "30 words": lambda text, draw: excerpt(text, 30, draw),
    "50 words": lambda text, draw: excerpt(text, 50, draw),
    "100 words": lambda text, draw: excerpt(text, 100, draw),
    "OCR 2 %": misread(0.02),
    "OCR 5 %": misread(0.05),
    "words changed 10 %": substituted(0.1),
}
FORMATS: dict[str, Callable[[Path], BinaryIO]] = {
    "jsonl": lambda path: path.open("wb"),
    "jsonl.gz": lambda path: cast(BinaryIO, gzip.GzipFile(path, "wb", compresslevel=3)),
    "jsonl.zst": lambda path: cast(BinaryIO, zstandard.open(path, "wb")),
    "txt": lambda path: path.open("wb"),
}
FILES = 16

# --- a corpus ---------------------------------------------------------------------------------------------


class Generated:
    """Text without end: words drawn with the frequencies of a language, sentences, paragraphs."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        parts = ["ba", "ren", "lo", "tis", "mu", "dar", "e", "kin", "so", "vel", "a", "ther", "in", "pro", "ge", "ul"]
        stock = sorted({"".join(draw.choices(parts, k=draw.randint(1, 4))) for _ in range(40_000)})
        draw.shuffle(stock)
        self._stock = np.array(stock, dtype=object)
        self._share = 1 / np.arange(2, len(stock) + 2)
        self._share /= self._share.sum()
        self._draw = np.random.default_rng(seed)

    def text(self, count: int) -> str:
        found = self._stock[self._draw.choice(len(self._stock), count, p=self._share)]
        ends = self._draw.random(count)
        found[ends < 0.08] += "."
        found[ends > 0.92] += ","
        found[(ends > 0.5) & (ends < 0.51)] += "’s"
        found[(ends > 0.6) & (ends < 0.61)] += "\n"
        return " ".join(found.tolist())


class Given:
    """Text of a folder: every second stretch of 1,000 words, drawn at random; the others are for the works."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._draw = random.Random(seed)
        paths = sorted(folder.rglob("*.txt"))
        stretches = [
            " ".join(found[at : at + 1000])
            for path in paths
            for found in [LICENCE.sub("", path.read_text(encoding="utf-8", errors="replace")).split(" ")]
            for at in range(0, len(found) - 999, 1000)
        ]
        self.works, self._hosts = stretches[::2], stretches[1::2]

    def text(self, count: int) -> str:
        parts = [self._draw.choice(self._hosts) for _ in range(1 + count // 1000)]
        return " ".join(" ".join(parts).split(" ")[:count])


def make_corpus(folder: Path, source: Generated | Given, works: Sequence[str], megabytes: float, seed: int) -> None:
    """Write `FILES` files, and ``planted.json``: kind and work of each copy by file and document."""
    draw = random.Random(seed)
    planted: dict[str, tuple[str, int]] = {}
    for number in range(FILES):
        kind = list(FORMATS)[number % len(FORMATS)]
        path, left, document = folder / f"part-{number:02}.{kind}", megabytes * 1e6 / FILES, 0
        with FORMATS[kind](path) as stream:
            while left > 0:
                text, document = source.text(draw.randint(*LINE_WORDS)), document + 1
                if draw.randrange(PLANTED_EVERY) == 0:
                    name, work = draw.choice(list(KINDS)), draw.randrange(len(works))
                    at = draw.choice([0, text.find(" ", len(text) // 2), len(text)])
                    text = f"{text[:at]}\n{KINDS[name](works[work], draw)}\n{text[at:]}"
                    # A text file is one document; what is planted there is told apart by its place.
                    planted[f"{path.name}:{document}"] = (name, work)
                data = text.encode()
                left -= len(data)
                if kind != "txt":
                    data = json.dumps({"id": document, "text": text}, ensure_ascii=draw.random() < 0.5).encode()
                stream.write(data + b"\n")
    (folder / "planted.json").write_text(json.dumps(planted))


# --- measuring --------------------------------------------------------------------------------------------


def widened(prints: FingerprintSet, count: int) -> FingerprintSet:
    """A set with so many fingerprints: random ones of a work that is nowhere are added."""
    extra = np.random.default_rng(0).integers(0, 2**64, max(0, count - len(prints.keys)), dtype=np.uint64)
    extra = np.setdiff1d(extra, prints.keys)
    every = np.concatenate([prints.keys, extra])
    owners = np.concatenate([prints.owners[prints.first[:-1]], np.full(len(extra), len(prints.names), np.int32)])
    order = np.argsort(every)
    keys, owners = every[order], owners[order].astype(np.int32)
    return FingerprintSet(
        names=(*prints.names, "nowhere"),
        sizes=np.append(prints.sizes, len(extra)),
        keys=keys,
        first=np.arange(len(keys) + 1),
        owners=owners,
        bits=_filter(keys),
        short=False,
    )


def save(prints: FingerprintSet, path: Path) -> None:
    """Keep a set for the processes that search with it."""
    np.savez(path, names=np.array(prints.names), **{name: getattr(prints, name) for name in FingerprintSet.ARRAYS})


def load(path: Path) -> FingerprintSet:
    """The set as it was kept; NumPy's own format, without pickle."""
    with np.load(path) as arrays:
        names = tuple(arrays["names"].tolist())
        return FingerprintSet(names=names, short=False, **{name: arrays[name] for name in FingerprintSet.ARRAYS})


def job(work: str, files: str, workers: str) -> None:
    """Search the first so many files; one line of JSON."""
    folder = Path(work)
    prints = load(folder / "set.npz")
    found = corpus_files([folder / "corpus"], [folder / "corpus" / "planted.json"])[0][: int(files)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    outcome = find_copies(prints, found, folder / "hits.jsonl", Rule(), workers=int(workers))
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - wall,
                "cpu_seconds": time.process_time() - cpu,
                "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
                "before_bytes": 1024 * before,
                "fingerprints": len(prints.keys),
                "characters": outcome.totals.characters,
                "documents": outcome.totals.documents,
            }
        )
    )


def child(*arguments: object) -> dict[str, Any]:
    """A search in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.dedupe_scan", "job", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return cast(dict[str, Any], json.loads(done.stdout))


def judged(work: Path) -> dict[str, Any]:
    """Recall by kind, and documents found that hold nothing, from the list of hits."""
    planted = json.loads((work / "corpus" / "planted.json").read_text())
    lines = {key: value for key, value in planted.items() if ".txt:" not in key}
    found = defaultdict[str, set[int]](set)
    for line in (work / "hits.jsonl").read_bytes().splitlines():
        hit = json.loads(line)
        found[f"{Path(hit['file']).name}:{hit['document']}"].add(int(hit["request_id"][1:]))
    kinds = {kind: [0, 0] for kind in KINDS}
    for key, (kind, number) in lines.items():
        kinds[kind][0] += number in found[key]
        kinds[kind][1] += 1
    texts = {key.split(":")[0] for key in planted if ".txt:" in key}
    in_texts = {name: {number for key, (_, number) in planted.items() if key.startswith(f"{name}:")} for name in texts}
    right = {key: {lines[key][1]} if key in lines else set() for key in found if ".txt:" not in key}
    false = sum(bool(found[key] - works) for key, works in right.items())
    return {
        "kinds": {kind: {"planted": count, "found": right / max(1, count)} for kind, (right, count) in kinds.items()},
        "text_files": {
            "planted": sum(map(len, in_texts.values())),
            "found": sum(len(works & found[f"{name}:1"]) for name, works in in_texts.items()),
            "false": sum(len(found[f"{name}:1"] - works) for name, works in in_texts.items()),
        },
        "false_documents": false,
    }


def naive_rate(works: Sequence[str], text: str) -> float:
    """MB per CPU second of the obvious way: a set of all word 10-grams as strings, one look-up each."""
    count = CORPUS_PARAMETERS.shingle_words
    known = set[str]()
    for work in works:
        found = [word.text for word in slow_words(work)]
        known.update(" ".join(found[at : at + count]) for at in range(len(found)))
    start = time.process_time()
    found = [word.text for word in slow_words(text)]
    sum(" ".join(found[at : at + count]) in known for at in range(len(found)))
    return len(text.encode()) / 1e6 / (time.process_time() - start)


def measure(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Make the corpus, search it, judge what was found."""
    source = Given(options.folder, options.seed) if options.folder else Generated(options.seed)
    draw = random.Random(options.seed)
    if isinstance(source, Given):
        works = source.works
    else:
        works = [source.text(draw.randint(*WORK_WORDS)) for _ in range(options.works)]
    (work / "corpus").mkdir()
    (work / "works.json").write_text(json.dumps(works))
    make_corpus(work / "corpus", source, works, options.megabytes, options.seed)
    own = FingerprintSet.of((f"W{n}", text) for n, text in enumerate(works))
    runs = []
    for fingerprints in options.fingerprints:
        save(widened(own, fingerprints), work / "set.npz")
        for workers in options.workers:
            quarter = child(work, FILES // 4, workers)
            whole = child(work, FILES, workers)
            runs.append(whole | {"workers": workers, "quarter_peak_bytes": quarter["peak_bytes"]})
    return {
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "works": len(works),
        "megabytes": options.megabytes,
        "naive_mb_per_cpu_s": naive_rate(works[:200], source.text(100_000)),
        "runs": runs,
        **judged(work),
    }


def table(found: dict[str, Any]) -> Iterator[str]:
    """The result in Markdown."""
    yield (
        f"{found['megabytes']:,.0f} MB, {found['works']:,} works; {found['cpus']} CPUs, load {found['load']:.1f}; a "
        f"Python set of strings: {found['naive_mb_per_cpu_s']:.1f} MB/s\n"
    )
    yield "| fingerprints | workers | MB/s of CPU time | MB/s | × set of strings | peak MB | of a quarter |"
    yield "|---:|---:|---:|---:|---:|---:|---:|"
    for run in found["runs"]:
        rate = run["characters"] / 1e6 / run["cpu_seconds"]
        # With several processes this one only reads, and its own time says nothing.
        alone = (f"{rate:.1f}", f"{rate / found['naive_mb_per_cpu_s']:.0f}") if run["workers"] == 1 else ("", "")
        yield (
            f"| {run['fingerprints']:,} | {run['workers']} | {alone[0]} | "
            f"{run['characters'] / 1e6 / run['seconds']:.1f} | {alone[1]} | {run['peak_bytes'] / 1e6:.0f} | "
            f"{run['quarter_peak_bytes'] / 1e6:.0f} |"
        )
    yield "\n| planted | documents | found |\n|---|---:|---:|"
    for kind, row in found["kinds"].items():
        yield f"| {kind} | {row['planted']} | {row['found']:.1%} |"
    texts = found["text_files"]
    yield f"| in text files, any kind | {texts['planted']} | {texts['found'] / max(1, texts['planted']):.1%} |"
    yield (
        f"\nFound wrongly: {found['false_documents']} of {found['runs'][-1]['documents']:,} documents; "
        f"{texts['false']} works in text files."
    )


def main() -> None:
    """Measure, print, write."""
    if sys.argv[1:2] == ["job"]:
        job(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="make works and hosts from its *.txt")
    parser.add_argument("--megabytes", type=float, default=300, help="size of the corpus, unpacked (default 300)")
    parser.add_argument("--works", type=int, default=2000, help="works that are generated (default 2,000)")
    parser.add_argument("--fingerprints", type=lambda v: [int(n) for n in v.split(",")], default=[0, 15_000_000],
                        help="sizes of the set, filled up with random ones (default 0,15000000)")  # fmt: skip
    parser.add_argument("--workers", type=lambda v: [int(n) for n in v.split(",")], default=[1, 2],
                        help="numbers of processes (default 1,2)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=1, help="of everything that is drawn")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options)
    print("\n".join(table(found)))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
