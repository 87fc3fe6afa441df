"""How much of what is changed is still found, and what is found wrongly, for each kind of edit.

Texts are cut into passages of 100 to 200 words. Every second one is taken down; the others, from the same works, are
the hard negatives. Both are edited in each way and looked for by each stage: the candidates that the index proposes,
the decisions related, folded and repeat, and the corpus scan, for which the edited passage is put into a host of 1,000
words made of other negatives.

In: ``python -m tests.benchmarks.dedupe_quality [FOLDER] [--json FILE]``; the project's own texts, or every *.txt below
a folder. Out: a Markdown table, found / falsely found in per cent. Never: an edit that is not the same in every run.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.dedupe import dedupe
from pipeline.fingerprints import FingerprintSet
from pipeline.index import DedupeIndex
from pipeline.records import DedupeDecision, TakedownRequest
from pipeline.scan import Rule, scan_documents
from pipeline.settings import DedupeSettings
from pipeline.shingles import shingle

ROOT = Path(__file__).resolve().parent.parent.parent
OWN = tuple(ROOT / "takedowns" / "demo" / name for name in ("works", "general", "unseen"))
"""Not ``copies``: they are edited already, and would be found in the works that they were made from."""
LICENCE = re.compile(r"\A.*?\*\*\* ?START OF[^\n]*\n|\*\*\* ?END OF.*\Z|End of the Project Gutenberg.*\Z", re.DOTALL)
"""What stands around the text in files of Project Gutenberg: the same in all, so that it would be found rightly."""
HOST_WORDS = 1000
PASSAGE_WORDS = (100, 200)
STAGES = ("candidate", "related", "folded", "repeat", "scan", "scan --thorough")
Edit = Callable[[str, random.Random], str]

# --- edits ------------------------------------------------------------------------------------------------

_TYPOGRAPHY = str.maketrans({"'": "’", '"': "”", "-": "–"})
_LIGATURES = {"ffi": "ﬃ", "fi": "ﬁ", "fl": "ﬂ", "ff": "ﬀ"}
_FULL_WIDTH = {c: c + 0xFEE0 for c in range(0x21, 0x7F)}
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def typographic(text: str, draw: random.Random) -> str:
    """Curly quotes, dashes and ligatures."""
    for plain, joined in _LIGATURES.items():
        text = text.replace(plain, joined)
    return text.translate(_TYPOGRAPHY)


def wrapped(text: str, draw: random.Random) -> str:
    """Other line breaks, indents and double spaces."""
    return "".join(word + draw.choice([" ", " ", "  ", "\n", "\n    ", "\r\n", "\t"]) for word in text.split())


def hyphenated(text: str, draw: random.Random) -> str:
    """Every eighth long word is divided at a line end."""

    def divided(word: str) -> str:
        at = len(word) // 2
        return f"{word[:at]}-\n{word[at:]}" if word.isalpha() and len(word) > 5 and draw.random() < 0.125 else word

    return " ".join(map(divided, text.split()))


def decomposed(text: str, draw: random.Random) -> str:
    """Accents on every tenth vowel in the original's place, decomposed."""
    return unicodedata.normalize(
        "NFD", "".join(c + "\u0301" if c in "aeiou" and draw.random() < 0.1 else c for c in text)
    )


def zero_width(text: str, draw: random.Random) -> str:
    """An invisible character behind every twentieth letter."""
    return "".join(
        c + draw.choice("\u200b\u00ad\ufeff\u2060") if c.isalpha() and draw.random() < 0.05 else c for c in text
    )


def misread(share: float) -> Edit:
    """Characters replaced, lost or doubled, and words split, as by optical character recognition."""

    def edit(text: str, draw: random.Random) -> str:
        made = []
        for c in text:
            if not c.isalpha() or draw.random() >= share:
                made.append(c)
            else:
                made.append(draw.choice([draw.choice(_LETTERS), "", c + draw.choice(_LETTERS), c + " "]))
        return "".join(made)

    return edit


def substituted(share: float) -> Edit:
    """Words replaced by other words of the same passage's kind."""

    def edit(text: str, draw: random.Random) -> str:
        stock = text.split()
        return " ".join(draw.choice(stock) if draw.random() < share else word for word in stock)

    return edit


def reordered(text: str, draw: random.Random) -> str:
    """Sentences in another order."""
    sentences = re.split(r"(?<=[.!?;])\s+", text)
    draw.shuffle(sentences)
    return " ".join(sentences)


def shortened(share: float) -> Edit:
    """The beginning, the end or the middle is all that is left."""

    def edit(text: str, draw: random.Random) -> str:
        words = text.split()
        count = round(share * len(words))
        at = draw.choice([0, len(words) - count, (len(words) - count) // 2])
        return " ".join(words[at : at + count])

    return edit


EDITS: dict[str, Edit] = {
    "exact": lambda text, draw: text,
    "upper case": lambda text, draw: text.upper(),
    "quotes, dashes, ligatures": typographic,
    "re-wrapped": wrapped,
    "hyphenated line ends": hyphenated,
    "accents, NFD": decomposed,
    "full-width letters": lambda text, draw: text.translate(_FULL_WIDTH),
    "zero-width characters": zero_width,
    **{f"OCR {share} %": misread(share / 100) for share in (1, 2, 3, 5)},
    **{f"words changed {share} %": substituted(share / 100) for share in (5, 10, 20)},
    "sentences reordered": reordered,
    "cut to 75 %": shortened(0.75),
    "cut to 50 %": shortened(0.5),
}
EXCERPTS = (30, 50, 100)
"""Words of an excerpt in a host; it is the host that every stage is asked about."""

# --- texts ------------------------------------------------------------------------------------------------


def passages(texts: Sequence[str], draw: random.Random) -> Iterator[str]:
    """Contiguous stretches of texts as they are, line breaks and all."""
    for text in texts:
        words = list(re.finditer(r"\S+", text))
        at = 0
        while at + PASSAGE_WORDS[0] <= len(words):
            end = min(at + draw.randint(*PASSAGE_WORDS), len(words))
            yield text[words[at].start() : words[end - 1].end()]
            at = end


def spread(items: Sequence[str], most: int) -> list[str]:
    """At most so many, evenly over all."""
    return [items[at * len(items) // most] for at in range(most)] if len(items) > most else list(items)


def excerpt(text: str, words: int, draw: random.Random) -> str:
    """So many words in a row."""
    found = text.split()
    at = draw.randrange(max(1, len(found) - words))
    return " ".join(found[at : at + words])


def hosted(text: str, own: str, others: Sequence[str], draw: random.Random) -> str:
    """A text in the middle of a host of about `HOST_WORDS` words, made of passages that are not its own."""
    parts: list[str] = []
    while sum(len(part.split()) for part in parts) < HOST_WORDS - len(text.split()):
        part = draw.choice(others)
        if part != own and part not in parts[-3:]:
            parts.append(part)
    parts.insert(draw.randint(0, len(parts)), text)
    return "\n\n".join(parts)


# --- measuring --------------------------------------------------------------------------------------------


def request(name: str, text: str) -> TakedownRequest:
    return TakedownRequest(
        request_id=name, title="", rights_holder="", basis="copyright", batch_id="b",
        received_at=datetime(2026, 1, 1, tzinfo=UTC), text=text,
    )  # fmt: skip


class Stages:
    """Everything that is asked about a text: which of the works taken down does each stage see in it?"""

    def __init__(self, works: dict[str, str], folder: Path) -> None:
        self.settings = DedupeSettings()
        self.works = works
        self.index = DedupeIndex.open(folder / "index")
        self.index.add_many(works.items())
        self.empty = DedupeIndex.open(folder / "empty")
        self.prints = FingerprintSet.of(works.items())

    def decided(self, text: str) -> DedupeDecision:
        return dedupe([request("new", text)], self.index, self.settings)[0]

    def of(self, text: str, host: str, original: str | None) -> dict[str, set[str]]:
        """The works that each stage finds; ``folded`` is asked in a batch with the original, or the nearest."""
        decision = self.decided(text)
        related = {
            pair.request_id
            for pair in decision.evidence
            if pair.jaccard >= self.settings.retain_jaccard
            or max(pair.containment, pair.contained) >= self.settings.retain_containment
        }
        mate = original or (decision.evidence[0].request_id if decision.evidence else None)
        folded: set[str] = set()
        if mate is not None:
            batch = [request(mate, self.works[mate]), request("new", text)]
            verdicts = {d.verdict for d in dedupe(batch, self.empty, self.settings)}
            folded = {mate} if "folded" in verdicts else set()
        return {
            "candidate": set(self.index.candidates(shingle(text, self.index.parameters))),
            "related": related,
            "folded": folded,
            "repeat": {pair.request_id for pair in decision.evidence} if decision.verdict == "repeat" else set(),
            "scan": {copy.request_id for copy in scan_documents([(None, host)], self.prints)},
            "scan --thorough": {
                copy.request_id for copy in scan_documents([(None, host)], self.prints, Rule(hits=1))
            },
        }  # fmt: skip


def measure(texts: Sequence[str], most: int, folder: Path, seed: int) -> dict[str, Any]:
    """All edits of all passages.

    Returns:
        ``works`` and ``negatives``: how many passages; ``repeats``: how many negatives hold ten words in a row of a
        passage taken down (authors repeat themselves, and no host is made of those), and of how many; ``edits``: for
        each edit and stage the share of the works that is found (``found``) and of the negatives in which any work is
        (``false``).
    """
    draw = random.Random(seed)
    every = list(passages(texts, draw))
    works = {f"W{n}": text for n, text in enumerate(spread(every[::2], most))}
    negatives = every[1::2]
    asked = [*works.items(), *((None, text) for text in spread(negatives, most))]
    stages = Stages(works, folder)
    repeats = {
        copy.document - 1 for copy in scan_documents([(None, n) for n in negatives], stages.prints, Rule(hits=1))
    }
    others = [text for at, text in enumerate(negatives) if at not in repeats]
    kinds: list[tuple[str, Callable[[str, str], tuple[str, str]]]] = []
    for kind, edit in EDITS.items():

        def by_edit(text: str, own: str, edit: Edit = edit) -> tuple[str, str]:
            edited = edit(text, draw)
            return edited, hosted(edited, own, others, draw)

        kinds.append((kind, by_edit))
    for words in EXCERPTS:

        def by_excerpt(text: str, own: str, words: int = words) -> tuple[str, str]:
            host = hosted(excerpt(text, words, draw), own, others, draw)
            return host, host

        kinds.append((f"{words} words in a host", by_excerpt))
    edits: dict[str, Any] = {}
    for kind, make in kinds:
        found = {stage: [0, 0] for stage in STAGES}
        for name, text in asked:
            for stage, seen in stages.of(*make(text, text), name).items():
                found[stage][name is None] += (name in seen) if name else bool(seen)
        edits[kind] = {
            stage: {"found": right / len(works), "false": wrong / (len(asked) - len(works))}
            for stage, (right, wrong) in found.items()
        }
    stages.index.close()
    stages.empty.close()
    return {
        "works": len(works),
        "negatives": len(asked) - len(works),
        "repeats": [len(repeats), len(negatives)],
        "edits": edits,
    }


def table(found: dict[str, Any]) -> str:
    """The result in Markdown."""

    def cell(pair: dict[str, float]) -> str:
        return f"{100 * pair['found']:.1f} / {100 * pair['false']:.1f}"

    rows = (f"| {kind} | {' | '.join(cell(row[stage]) for stage in STAGES)} |" for kind, row in found["edits"].items())
    lines = [
        f"Found / falsely found, %: {found['works']} passages taken down, {found['negatives']} others of these works. "
        f"{found['repeats'][0]} of all {found['repeats'][1]} others hold ten words in a row of a passage taken down.",
        "",
        f"| edit | {' | '.join(STAGES)} |",
        "|---|" + "---:|" * len(STAGES),
        *rows,
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="*", type=Path, default=OWN, help="of *.txt; default: the project's own texts")
    parser.add_argument("--passages", type=int, default=400, help="most passages taken down, and most others")
    parser.add_argument("--seed", type=int, default=1, help="of passages and edits")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args(arguments)
    paths = [path for folder in options.folder for path in sorted(folder.rglob("*.txt"))]
    texts = [LICENCE.sub("", path.read_text(encoding="utf-8", errors="replace")) for path in paths]
    with tempfile.TemporaryDirectory() as folder:
        found = measure(texts, options.passages, Path(folder), options.seed)
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
