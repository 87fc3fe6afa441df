"""The benchmark's texts: steps in order, and what stands beside them.

In: folders of ``*.txt``, or one ``.jsonl`` of passages. Out: texts by step and request, all problems at once. Never:
imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.benchmark.records import Inputs
from pipeline.dedupe import exclude_retain
from pipeline.errors import InvalidInput, Problem
from pipeline.files import digest_json
from pipeline.settings import DedupeSettings

SPLITS = {"keep_retain": "retain", "keep_measured": "kept", "heldout": "heldout", "unseen": "unseen"}
"""Splits of a passages file beside ``takedown``, and the groups they belong to."""


@dataclass(frozen=True)
class BenchText:
    """One text.

    Attributes:
        text: What it says.
        whole: Whether it is a single passage, whose first half is the prompt; else it is cut as a work is.
    """

    text: str
    whole: bool


@dataclass
class BenchTexts:
    """All texts of a benchmark.

    Attributes:
        steps: Step → request → its texts, in order.
        retain: What a method may hold the model to, by name.
        kept: What must survive and is only ever measured.
        heldout: General text never seen.
        unseen: Text of the same kind as what is taken down, never seen.
        passage_tokens: Where whole passages are cut off; None for nowhere.
    """

    steps: dict[str, dict[str, list[BenchText]]] = field(default_factory=dict)
    retain: dict[str, BenchText] = field(default_factory=dict)
    kept: dict[str, BenchText] = field(default_factory=dict)
    heldout: dict[str, BenchText] = field(default_factory=dict)
    unseen: dict[str, BenchText] = field(default_factory=dict)
    passage_tokens: int | None = None

    def groups(self) -> dict[str, dict[str, BenchText]]:
        """Everything but the steps, by group."""
        return {"retain": self.retain, "kept": self.kept, "heldout": self.heldout, "unseen": self.unseen}

    def digest(self) -> str:
        """Digest of every text, its name and its place, and of where passages are cut off."""
        steps = [
            [s, r, i.text, i.whole] for s, found in self.steps.items() for r, texts in found.items() for i in texts
        ]
        rest = [[g, n, i.text, i.whole] for g, found in self.groups().items() for n, i in found.items()]
        return digest_json([steps, rest, self.passage_tokens])

    def works(self) -> list[str]:
        """The texts of all steps."""
        return [item.text for found in self.steps.values() for texts in found.values() for item in texts]


def read_texts(inputs: Inputs) -> BenchTexts:
    """Read everything.

    Raises:
        InvalidInput: A folder is missing or empty, a file is not UTF-8, a line is no passage, a text belongs to two
            groups; every problem is listed.
    """
    found, problems = BenchTexts(passage_tokens=inputs.passage_tokens), list[Problem]()
    source = Path(inputs.texts)
    if source.suffix == ".jsonl":
        _read_passages(source, found, problems)
    else:
        _read_steps(source, found, problems)
    for group, texts in found.groups().items():
        folder = getattr(inputs, group)
        if folder is not None:
            texts.update({name: BenchText(text, False) for name, text in _folder(Path(folder), problems).items()})
    if not problems:
        problems += _shared(found)
    if problems:
        raise InvalidInput(problems)
    return found


def _shared(found: BenchTexts) -> list[Problem]:
    """Texts that stand in two groups which must have nothing in common."""
    places: dict[str, str] = dict.fromkeys(found.works(), "a step")
    problems = []
    for group, texts in found.groups().items():
        for name, item in texts.items():
            other = places.setdefault(item.text, group)
            if other != group:
                problems.append(
                    Problem(f"{group}: {name}", f"is the same text as one of {other}", "Leave it out of one of them.")
                )
    return problems


def usable_retain(found: BenchTexts, settings: DedupeSettings) -> dict[str, str]:
    """Retain texts that hold nothing of a step: holding the model to those would undo the takedown."""
    retain = {name: item.text for name, item in found.retain.items()}
    works = {str(number): text for number, text in enumerate(found.works())}
    alike = {excluded.document for excluded in exclude_retain(retain, works, settings)}
    return {name: text for name, text in retain.items() if name not in alike}


def _read(path: Path, problems: list[Problem]) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        problems.append(Problem(str(path), f"cannot be read ({error.strerror})", "Name a file that can be read."))
    except UnicodeDecodeError as error:
        problems.append(Problem(str(path), f"is not UTF-8 (byte {error.start})", "Save it as UTF-8."))
    return None


def _folder(folder: Path, problems: list[Problem]) -> dict[str, str]:
    """Texts of a folder by file name."""
    paths = sorted(folder.glob("*.txt"))
    if not paths:
        problems.append(Problem(str(folder), "holds no *.txt file", "Name a folder of texts, or leave the option out."))
    texts = {path.name: _read(path, problems) for path in paths}
    return {name: text for name, text in texts.items() if text is not None}


def _read_steps(folder: Path, found: BenchTexts, problems: list[Problem]) -> None:
    """Sub-folders and files in the order of their names: each is a step, each file a request."""
    entries = sorted(p for p in folder.glob("*") if p.is_dir() or p.suffix == ".txt")
    if not entries:
        problems.append(
            Problem(str(folder), "holds no step", "Give each step a sub-folder of *.txt, or one *.txt, named in order.")
        )
    for entry in entries:
        texts = _folder(entry, problems) if entry.is_dir() else {entry.name: _read(entry, problems)}
        step = found.steps.setdefault(entry.name if entry.is_dir() else entry.stem, {})
        step.update({name: [BenchText(text, False)] for name, text in texts.items() if text is not None})


def _read_passages(path: Path, found: BenchTexts, problems: list[Problem]) -> None:
    """Lines ``{"split": …, "source": …, "text": …}``; every source of the split ``takedown`` is a step."""
    text = _read(path, problems)
    for number, line in enumerate((text or "").split("\n"), 1):
        where = f"{path}: line {number}"
        if not line.strip():
            continue
        row = _row(line)
        if row is None:
            problems.append(
                Problem(where, "is no passage", 'Write {"split": "takedown", "source": "step_01", "text": "…"}.')
            )
        elif row["split"] == "takedown":
            requests = found.steps.setdefault(row["source"], {row["source"]: []})
            requests[row["source"]].append(BenchText(row["text"], True))
        elif row["split"] in SPLITS:
            found.groups()[SPLITS[row["split"]]][f"{row['source']}/{number}"] = BenchText(row["text"], True)
        else:
            known = ", ".join(("takedown", *SPLITS))
            problems.append(Problem(where, f"has the split {row['split']!r}", f"Use one of {known}."))
    if text is not None and not found.steps and not problems:
        problems.append(Problem(str(path), "has no passage of the split takedown", "Say what is to be taken down."))


def _row(line: str) -> Mapping[str, str] | None:
    """A line with its three fields, or None."""
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    fields = ("split", "source", "text")
    return row if isinstance(row, dict) and all(isinstance(row.get(f), str) and row[f] for f in fields) else None
