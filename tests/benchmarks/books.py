"""Retain text for a benchmark from whole books: without their ends and without what is only ever measured.

    python -m tests.benchmarks.books BOOKS passages.jsonl OUT

BOOKS is a folder of ``*.txt``. The last 15 % of each book, where the held-out passages come from, are left off, and
passages of the splits ``keep_measured`` and ``heldout`` are cut out. Words are joined by single spaces, as in passages.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

MEASURED = ("keep_measured", "heldout")
KEPT_SHARE = 0.85


def without(text: str, passages: Iterable[str]) -> str:
    """A text less passages of it."""
    for passage in passages:
        text = text.replace(passage, " ")
    return text


def main(arguments: list[str] | None = None) -> None:
    """Cut and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name in ("books", "passages", "out"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args(arguments)
    lines = map(json.loads, options.passages.read_text(encoding="utf-8").splitlines())
    measured = [line["text"] for line in lines if line["split"] in MEASURED]
    options.out.mkdir(parents=True)
    for path in sorted(options.books.glob("*.txt")):
        text = path.read_text(encoding="utf-8")
        text = without(" ".join(text[: int(len(text) * KEPT_SHARE)].split()), measured)
        (options.out / path.name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
