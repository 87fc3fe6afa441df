"""The guard: what a token costs with it, what it lets through, and how often it is in the way of other text.

    python -m tests.benchmarks.guard [--letters 20 30 40 60] [--tokens 200] [--json FILE]

**Cost**: milliseconds per token and row of `GuardProcessor`, medians, for vocabularies of 32,000 and 128,000 tokens of
one to twelve letters: while ordinary text is written (no beginning of a guarded run stands there, which is nearly
always), and while a guarded text is being recited, so that every token is looked up. One thread.

**What gets through**: a small model that recites a work (`tests/workspaces.py`) goes on from its first eight words,
greedily; the longest run of letters of the work in what it writes, without a guard, with MemFree over runs of ten
tokens, and with runs of letters.

**In the way**: the share of letters of the demo's other texts at which a run of its works ends, by the
length of the run: phrases that belong to nobody, and quotations.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.guard import Guard, Spelling, letters
from pipeline.models import load_model, load_tokenizer
from tests.workspaces import WORKS, trained_model

ROOT = Path(__file__).resolve().parents[2]


def cost(vocabulary: int, tokens: int) -> dict[str, float]:
    """Milliseconds per token: idle, and reciting."""
    draw = np.random.default_rng(vocabulary)
    spelled = [tuple(map(int, draw.integers(97, 123, draw.integers(1, 13)))) for _ in range(vocabulary)]
    spelling = Spelling("letters", spelled)
    guarded, other = (draw.integers(0, vocabulary, tokens + 50).tolist() for _ in range(2))
    text = "".join(chr(letter) for token in guarded for letter in spelled[token])
    guard = Guard.build_texts([text], seed=1)
    processor = guard.processor(spelling)
    scores = torch.zeros(1, vocabulary)
    found = {}
    for name, ids in (("idle", other), ("reciting", guarded)):
        times = []
        for end in range(50, 50 + tokens):
            row = torch.tensor([ids[:end]])
            start = time.perf_counter()
            blocked = processor(row, scores)
            times.append(time.perf_counter() - start)
            assert bool(torch.isneginf(blocked).any()) == (name == "reciting")
        found[name] = 1000 * statistics.median(times)
    return found


def through(folder: Path, lengths: Sequence[int]) -> dict[str, int]:
    """Longest run of the work's letters that is written, by guard."""
    path = trained_model(folder)
    model: Any = load_model(path, "cpu")
    tokenizer = load_tokenizer(path)
    work = WORKS["one"]
    ids = tokenizer(work, add_special_tokens=False)["input_ids"]
    spelling = Spelling.of_letters(tokenizer)
    guards = {"none": None, "10 tokens": Guard.build([ids], 10, seed=1).processor(Spelling.of_tokens(len(tokenizer)))}
    guards |= {f"{n} letters": Guard.build_texts([work], n, seed=1).processor(spelling) for n in lengths}
    prompt = torch.tensor([tokenizer(" ".join(work.split()[:8]), add_special_tokens=False)["input_ids"]])
    found = {}
    for name, processor in guards.items():
        made = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=70, do_sample=False,
            pad_token_id=tokenizer.pad_token_id, logits_processor=[processor] if processor else None,
        )  # fmt: skip
        written = letters(tokenizer.decode(made[0, prompt.shape[1] :])).tolist()
        match = SequenceMatcher(None, written, letters(work).tolist(), autojunk=False)
        found[name] = match.find_longest_match().size
    return found


def in_the_way(lengths: Sequence[int]) -> dict[int, float]:
    """Share of letters of the demo's other texts (not the copies) at which a run of its works ends."""
    texts, general = (
        [path.read_text() for name in names for path in sorted((ROOT / "takedowns" / "demo" / name).glob("*.txt"))]
        for names in (("works",), ("general", "unseen"))
    )
    found = {}
    for n in lengths:
        guard = Guard.build_texts(texts, n, 1e-9, seed=1)
        others = [letters(text) for text in general]
        found[n] = sum(len(guard.found(o)) for o in others) / sum(map(len, others))
    return found


def main() -> None:
    """Measure, print, and write numbers where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--letters", type=int, nargs="+", default=[20, 30, 40, 60])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        numbers = {
            "milliseconds per token": {str(v): cost(v, options.tokens) for v in (32_000, 128_000)},
            "longest run of letters written": through(Path(folder), options.letters),
            "share of other text that ends a run": {str(n): s for n, s in in_the_way(options.letters).items()},
        }
    print(json.dumps(numbers, indent=1))
    if options.json:
        options.json.write_text(json.dumps(numbers))


if __name__ == "__main__":
    main()
