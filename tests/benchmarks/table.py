"""The README's table of the benchmark, from what `takedown bench` wrote.

    python -m tests.benchmarks.table DIR [DIR …] [--methods vanilla,short-context,…]

Several folders are put together where they are of the same model, texts and settings, so that seeds and methods may
have been run apart. Numbers are of the last step that every seed of a method finished, means and sample deviations over
seeds; PrivLeak is printed where a model was trained without the texts.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from pipeline.benchmark import summary
from pipeline.benchmark.records import AS_IT_IS, FIXED, UNDER_ATTACK, Results, Row
from pipeline.benchmark.summary import Reading, Spread, score
from pipeline.methods import METHODS

HALF_WAY = 5
"""Step after which what is not taken down yet is looked at: at the last one nothing is left."""


def together(parts: Sequence[Results]) -> Results:
    """One set of results of several.

    Raises:
        ValueError: They are of another model, other texts or steps, or a method was run with other settings.
    """
    first = parts[0]
    for part in parts[1:]:
        for name in ("model_root", "inputs_digest", "steps", "screened"):
            if getattr(part, name) != getattr(first, name):
                raise ValueError(f"not comparable: {name} differs")
        for method in set(part.settings) & set(first.settings):
            ours, theirs = (r.settings[method].model_dump(exclude={"seed", "runtime"}) for r in (first, part))
            if ours != theirs:
                raise ValueError(f"not comparable: {method} was run with other settings")
        rows = {(r.method, r.seed, r.step): r for r in (*part.rows, *first.rows)}
        recovered = {(r.method, r.seed): r for r in (*part.recovered, *first.recovered)}
        first = first.model_copy(update={
            "rows": tuple(rows.values()), "recovered": tuple(recovered.values()),
            "methods": tuple(dict.fromkeys((*first.methods, *part.methods))),
            "settings": {**part.settings, **first.settings}, "reference": first.reference or part.reference,
        })  # fmt: skip
    return first


def short(value: float, form: str = ".3f") -> str:
    """A number without the zero before its point."""
    return re.sub(r"(?<!\d)0\.", ".", f"{value:{form}}")


def signed(value: float) -> str:
    """A difference."""
    return short(value, "+.3f")


def hundredths(value: float) -> str:
    """To two places."""
    return short(value, ".2f")


def one(value: float) -> str:
    """To one place."""
    return f"{value:.1f}"


def whole(value: float) -> str:
    """To none."""
    return f"{value:.0f}"


@dataclass(frozen=True)
class Line:
    """A row of the table: what it says of a method.

    Attributes:
        label: For people.
        read: The number of a method; None where there is none.
        shown: A number in words.
    """

    label: str
    read: Callable[[str], Spread | None]
    shown: Callable[[float], str] = short


def lines_of(results: Results) -> list[Line]:
    """All rows of the table."""

    def last(read: Reading) -> Callable[[str], Spread | None]:
        return lambda method: summary.over_seeds(results, method, summary.last_step(results, method), read)

    def each_step(read: Reading) -> Callable[[str], Spread | None]:
        def mean(method: str) -> Spread | None:
            found: dict[int, list[float]] = {}
            for row in results.rows:
                if row.method == method and (value := read(row)) is not None:
                    found.setdefault(row.seed, []).append(value)
            return summary.spread_of(statistics.fmean(values) for values in found.values())

        return mean

    def changed(row: Row) -> float | None:
        return row.change.changed / row.change.total if row.change else None

    def auc(attack: str) -> Reading:
        return lambda row: row.membership.get(attack)

    def attacked(attack: str) -> Callable[[str], Spread | None]:
        return lambda method: summary.under_attack(results, method, attack, "exact_memorisation")

    def later(method: str) -> Spread | None:
        return summary.over_seeds(results, method, half, score("later", "exact_memorisation"))

    def privleak(row: Row) -> float | None:
        return summary.privleak_reading(results)(row) if results.reference else None

    half = min(HALF_WAY, len(results.steps))
    return [
        Line("EM of this step", last(score("this", "exact_memorisation"))),
        Line("EM of all earlier steps", last(score("earlier", "exact_memorisation"))),
        Line("EM of never-seen text", last(score("unseen", "exact_memorisation"))),
        Line("EM of kept passages, never listed anywhere", last(score("kept", "exact_memorisation"))),
        Line("free recitation of kept passages, ROUGE-L", last(score("kept", "rouge_l"))),
        Line(f"EM of passages not taken down yet, after step {half}", later),
        Line(
            "held-out NLL, nats over the untouched model's",
            last(summary.over_vanilla(results, "heldout", "nll")),
            signed,
        ),
        Line("NLL of this step", last(score("this", "nll")), hundredths),
        Line("NLL of never-seen text", last(score("unseen", "nll")), hundredths),
        Line("longest verbatim run, mean words", last(score("this", "longest_run")), one),
        Line("longest run of never-seen text", last(score("unseen", "longest_run")), one),
        Line("AUC of the loss against never-seen text (.5 is ideal)", last(auc("loss")), hundredths),
        Line("AUC of min-k", last(auc("min-k")), hundredths),
        Line("PrivLeak against the retrained model", last(privleak), one),
        Line("EM of all steps: as it is", last(summary.taken_down(results))),
        *(Line(f"– {attack}", attacked(attack)) for attack in UNDER_ATTACK if attack != AS_IT_IS),
        Line("share of the target weights that a step changes", each_step(changed), hundredths),
        Line("seconds of a step", each_step(lambda row: row.cost.seconds if row.cost else None), whole),
        Line(
            "memory that a step adds, MB", each_step(lambda row: row.cost.rise_bytes / 1e6 if row.cost else None), whole
        ),
    ]


def cell(found: Spread | None, shown: Callable[[float], str], fixed: bool) -> str:
    """A number with its deviation, where there are several seeds that make a difference."""
    if found is None:
        return ""
    deviation = f" ± {shown(found.std).lstrip('+')}" if found.seeds > 1 and not fixed else ""
    return shown(found.mean) + deviation


def table_of(results: Results, methods: Sequence[str]) -> Table:
    """One column per method."""
    titles = {name: method.title for name, method in METHODS.items()}
    table = Table(box=box.MARKDOWN)
    table.add_column("", no_wrap=True)
    for method in methods:
        seeds = sorted({row.seed for row in results.rows if row.method == method})
        head = f"{summary.title_of(method, titles)}, step {summary.last_step(results, method)}"
        table.add_column(head if method in FIXED else f"{head}, seeds {', '.join(map(str, seeds))}")
    for line in lines_of(results):
        cells = [cell(line.read(method), line.shown, method in FIXED) for method in methods]
        if any(cells):
            table.add_row(line.label, *cells)
    return table


def main(arguments: list[str] | None = None) -> None:
    """Read, put together, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", nargs="+", type=Path, help="what `takedown bench --out` wrote")
    parser.add_argument("--methods", help="which, in this order; all by default")
    options = parser.parse_args(arguments)
    try:
        parts = [Results.model_validate_json((f / "results.json").read_text()) for f in options.folders]
        results = together(parts)
    except (OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: {error}")
    methods = options.methods.split(",") if options.methods else list(results.methods)
    Console(width=60 + 40 * len(methods)).print(table_of(results, methods))


if __name__ == "__main__":
    main()
