"""From raw passages to MinHash signatures: this project's kernels and what people use today, side by side in one run.

Run ``python -m tests.benchmarks.dedupe_signing --help``. All make 128 values per passage from word 3-grams:

    ours        `shingle_many` and `sign`: normalised words, 64-bit fingerprints, datasketch's values
    update      datasketch as its tutorial shows it: lower-cased words, SHA-1, one `update` per shingle
    generator   datasketch's fastest call, `MinHash.generator` with xxHash, behind this project's normaliser
    text-dedup  its `embed_func` with 32-bit hashes
    datatrove   its `MinhashDedupSignature` with words split at white space, without its files
    rensa       its full R-MinHash (not the lossy *rho*) behind this project's shingles
    numba       the same signatures from a compiled loop, behind this project's shingles

Whatever is not installed is named and left out. The ways take turns; slow ones get a share of the passages; seconds are
of this process's one thread, and ratios are taken within a turn, so that what else the machine does hits all alike.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasketch import MinHash
from rich import box
from rich.console import Console
from rich.table import Table

from pipeline.normalise import word_arrays
from pipeline.shingles import DedupeParameters, Prints, shingle_many, sign

TEXTS = Path(__file__).resolve().parents[2] / "takedowns" / "demo"
PARAMETERS = DedupeParameters()
PERMUTATIONS = PARAMETERS.num_perm
WORDS = PARAMETERS.shingle_words

Sign = Callable[[list[str]], object]


class Way(NamedTuple):
    """One way to sign.

    Attributes:
        share: Part of the passages that it gets in a turn.
        target: How many times faster ours should be; None where no target is set.
        make: Prepares it, and raises ImportError where it is not installed.
    """

    share: float
    target: float | None
    make: Callable[[], Sign]


def passages(folder: Path, megabytes: float) -> list[str]:
    """Raw passages of 100 to 200 words; texts are cut again and again at other places until there are enough."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.txt"))]
    if not texts:
        raise SystemExit(f"{folder}: no .txt files. Name a folder with texts.")
    rng, found, size = random.Random(1), list[str](), 0
    while size < megabytes * 1e6:
        for text in texts:
            places = [match.span() for match in re.finditer(r"\S+", text)]
            at = rng.randrange(100)
            while at + 100 < len(places):
                to = min(at + rng.randint(100, 200), len(places))
                found.append(text[places[at][0] : places[to - 1][1]])
                size += len(found[-1])
                at = to
    return found


# --- the ways ---------------------------------------------------------------------------------------------------


def ours() -> Sign:
    """This project's."""
    return lambda texts: sign((text.sequence for text in shingle_many(texts, PARAMETERS)), PARAMETERS)


def update() -> Sign:
    """datasketch, the tutorial's loop."""

    def run(texts: list[str]) -> list[MinHash]:
        result = list[MinHash]()
        for text in texts:
            words = re.findall(r"\w+", text.lower())
            sketch = MinHash(num_perm=PERMUTATIONS)
            for at in range(len(words) - WORDS + 1):
                sketch.update(" ".join(words[at : at + WORDS]).encode())
            result.append(sketch)
        return result

    return run


def generator() -> Sign:
    """datasketch's generator behind this project's normaliser."""
    from xxhash import xxh32_intdigest

    def shingles(text: str) -> Iterator[bytes]:
        words = list[bytes]()
        for block in word_arrays(text):
            if block.letters.dtype == np.uint8:
                words += block.letters.tobytes().split(b"\0")
            else:
                words += block.letters.tobytes().decode("utf-32-le").encode().split(b"\0")
        words = [word for word in words if word]
        return (b" ".join(words[at : at + WORDS]) for at in range(len(words) - WORDS + 1))

    def run(texts: list[str]) -> list[MinHash]:
        return list(
            MinHash.generator(
                map(list, map(shingles, texts)), num_perm=PERMUTATIONS, hashfunc=xxh32_intdigest, scheme="affine32"
            )
        )

    return run


def text_dedup() -> Sign:
    """text-dedup's function for one document."""
    from text_dedup.minhash import embed_func
    from text_dedup.utils import xxh3_32hash

    rng, prime = np.random.RandomState(42), np.uint32((1 << 32) - 5)
    options: dict[str, Any] = {
        "num_perm": PERMUTATIONS, "ngram_size": WORDS, "min_length": 0, "hash_func": xxh3_32hash, "dtype": np.uint32,
        "hashranges": [(i, i + 2) for i in range(0, PERMUTATIONS, 2)], "modulo_prime": prime,
        "max_hash": np.uint32((1 << 32) - 1),
        "permutations": tuple(rng.randint(low, prime, size=PERMUTATIONS, dtype=np.uint32) for low in (1, 0)),
    }  # fmt: skip
    return lambda texts: [embed_func(text, number, **options) for number, text in enumerate(texts)]


def datatrove() -> Sign:
    """datatrove's first stage, without writing."""
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Split(WordTokenizer):  # type: ignore[misc]
        """What its own tokenisers cost more is not counted: they load spaCy."""

        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        def sent_tokenize(self, text: str) -> list[str]:
            return [text]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [(0, len(text))]

    config = MinhashConfig(n_grams=WORDS, num_buckets=PERMUTATIONS // 2, hashes_per_bucket=2)
    stage = MinhashDedupSignature(tempfile.gettempdir(), config, language=Split())
    return lambda texts: [stage.get_signature(stage.get_shingles(text)) for text in texts]


def flat(texts: Iterable[str]) -> tuple[Prints, Prints]:
    """This project's fingerprints of all texts in a row, and where each text begins and the last ends."""
    sequences = [text.sequence for text in shingle_many(texts, PARAMETERS)]
    return np.concatenate(sequences), np.cumsum([0, *map(len, sequences)], dtype=np.uint64)


def rensa() -> Sign:
    """rensa's R-MinHash behind this project's shingles."""
    from rensa import RMinHash

    return lambda texts: RMinHash.digest_matrix_from_flat_token_hashes(*flat(texts), num_perm=PERMUTATIONS, seed=1)


def numba() -> Sign:
    """The kernel of `sign` as a compiled loop."""
    from numba import njit

    multipliers, summands = MinHash(num_perm=PERMUTATIONS, seed=PARAMETERS.seed, scheme="affine32").permutations

    @njit(cache=False)  # type: ignore[untyped-decorator]
    def minima(hashes, bounds, multipliers, summands):  # type: ignore[no-untyped-def]
        result = np.full((len(bounds) - 1, len(multipliers)), np.uint32(0xFFFFFFFF))
        for row in range(len(bounds) - 1):
            out = result[row]
            for at in range(bounds[row], bounds[row + 1]):
                mixed = np.uint32(hashes[at])
                mixed = np.uint32((mixed ^ (mixed >> np.uint32(16))) * np.uint32(0x85EBCA6B))
                mixed = np.uint32((mixed ^ (mixed >> np.uint32(13))) * np.uint32(0xC2B2AE35))
                mixed = np.uint32(mixed ^ (mixed >> np.uint32(16)))
                for k in range(len(multipliers)):
                    out[k] = min(out[k], np.uint32(np.uint32(mixed * multipliers[k]) + summands[k]))
        return result

    return lambda texts: minima(*flat(texts), multipliers, summands)


WAYS = {
    "ours": Way(1, None, ours),
    "update": Way(0.04, 60, update),
    "generator": Way(0.3, 4, generator),
    "text-dedup": Way(0.15, 10, text_dedup),
    "datatrove": Way(0.1, 15, datatrove),
    "rensa": Way(1, 0.8, rensa),
    "numba": Way(1, None, numba),
}
DISTRIBUTIONS = {"update": "datasketch", "generator": "xxhash"}
"""Where the distribution whose version is told has another name than the way."""


# --- measuring --------------------------------------------------------------------------------------------------


def check(texts: list[str]) -> None:
    """Ours must be datasketch's values."""
    found = shingle_many(texts, PARAMETERS)
    sketches = MinHash.generator(
        [(text.sequence & np.uint64(0xFFFFFFFF)).tolist() for text in found],
        num_perm=PERMUTATIONS, seed=PARAMETERS.seed, scheme="affine32", hashfunc=int,
    )  # fmt: skip
    if not np.array_equal(ours()(texts), [sketch.hashvalues for sketch in sketches]):
        raise ValueError("signatures differ from datasketch's")


def measured(texts: list[str], ways: dict[str, Sign], rounds: int) -> list[dict[str, float]]:
    """CPU seconds per passage of each way, one record per round; one more round comes before them and is not told."""
    rng, records = random.Random(2), list[dict[str, float]]()
    for number in range(rounds + 1):
        record = dict[str, float]()
        for name in rng.sample(sorted(ways), len(ways)):
            part = texts[: max(1, round(len(texts) * WAYS[name].share))]
            gc.collect()  # what the way before left behind is not this one's cost
            start = time.process_time()
            ways[name](part)
            record[name] = (time.process_time() - start) / len(part)
        if number:
            records.append(record)
    return records


def parts(texts: list[str], rounds: int) -> dict[str, float]:
    """CPU seconds per passage of the steps of ours: words of all passages as one text, shingles, signatures."""
    whole = "\n\n".join(texts)
    sequences = [text.sequence for text in shingle_many(texts, PARAMETERS)]
    steps: dict[str, Callable[[], object]] = {
        "words": lambda: sum(len(block.starts) for block in word_arrays(whole)),
        "words and shingles": lambda: shingle_many(texts, PARAMETERS),
        "signatures": lambda: sign(sequences, PARAMETERS),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.process_time()
            step()
            seconds[name].append((time.process_time() - start) / len(texts))
    return {name: statistics.median(found) for name, found in seconds.items()}


def summary(records: list[dict[str, float]], name: str, size: float) -> dict[str, Any]:
    """Rates of a way, and how many times faster ours is, within turns: median, lowest, highest."""
    seconds = statistics.median(record[name] for record in records)
    ratios = [record[name] / record["ours"] for record in records]
    target = WAYS[name].target
    return {
        "passages_s": 1 / seconds,
        "mb_s": size / seconds / 1e6,
        "ours_faster": statistics.median(ratios),
        "ours_faster_range": [min(ratios), max(ratios)],
        "target": target,
        "met": None if target is None else statistics.median(ratios) >= target,
    }


def show(found: dict[str, Any]) -> None:
    """A table for people."""
    table = Table("way", "version", "passages/s", "MB/s", "ours is faster", "target", box=box.MARKDOWN)
    for name, way in found["ways"].items():
        low, high = way["ours_faster_range"]
        ratio = "" if name == "ours" else f"{way['ours_faster']:.2f}x ({low:.2f}–{high:.2f})"
        target = "" if way["target"] is None else f">= {way['target']}x, {'met' if way['met'] else 'NOT met'}"
        table.add_row(name, way["version"], f"{way['passages_s']:,.0f}", f"{way['mb_s']:.2f}", ratio, target)
    for name in found["not_installed"]:
        table.add_row(name, "not installed", "", "", "", "")
    console = Console(width=120)
    console.print(table)
    for name, rates in found["parts"].items():
        console.print(f"{name}: {rates['passages_s']:,.0f} passages/s, {rates['mb_s']:.1f} MB/s")


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the numbers where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=TEXTS, help="texts (*.txt); default: takedowns/demo")
    parser.add_argument("--megabytes", type=float, default=4, help="text signed in a turn (default 4)")
    parser.add_argument("--rounds", type=int, default=7, help="turns (default 7)")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args(arguments)

    texts = passages(options.folder, options.megabytes)
    check(texts[:500])
    ways, missing = dict[str, Sign](), list[str]()
    for name, way in WAYS.items():
        try:
            ways[name] = way.make()
        except ImportError:
            missing.append(name)
    size = sum(len(text.encode()) for text in texts) / len(texts)
    records = measured(texts, ways, options.rounds)
    found: dict[str, Any] = {
        "passages": len(texts),
        "bytes_per_passage": size,
        "machine": {"cpus": os.cpu_count(), "load": os.getloadavg()[0], "numpy": np.__version__},
        "ways": {
            name: {
                "version": "" if name == "ours" else version(DISTRIBUTIONS.get(name, name)),
                **summary(records, name, size),
            }
            for name in ways
        },
        "not_installed": missing,
        "parts": {
            name: {"passages_s": 1 / seconds, "mb_s": size / seconds / 1e6}
            for name, seconds in parts(texts, options.rounds).items()
        },
    }
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
