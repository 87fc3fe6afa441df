"""What the benchmark's rows say together: means over seeds, PrivLeak, one flat table. Pure.

In: `Results`. Out: numbers by method and step, rows of a CSV.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pipeline.benchmark.records import (
    FIXED,
    RETRAINED,
    UNDER_ATTACK,
    VANILLA,
    GroupScore,
    Recovered,
    Results,
    Row,
)
from pipeline.membership import ATTACKS, CHANCE, PRIVLEAK_ATTACK, privleak

GROUPS = ("this", "earlier", "later", "kept", "heldout", "unseen")
SCORES = tuple(name for name in GroupScore.model_fields if name != "passages")

Reading = Callable[[Row], float | None]


@dataclass(frozen=True)
class Spread:
    """A number over seeds.

    Attributes:
        mean: Over the seeds that have it.
        std: Sample standard deviation; 0 for one seed.
        seeds: How many have it.
    """

    mean: float
    std: float
    seeds: int


def spread_of(values: Iterable[float | None]) -> Spread | None:
    """Mean and deviation of what is known; None where nothing is."""
    known = [v for v in values if v is not None]
    if not known:
        return None
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else 0.0, len(known))


def score(group: str, name: str) -> Reading:
    """Read one score of one group from a row."""

    def read(row: Row) -> float | None:
        return getattr(row.groups[group], name) if group in row.groups else None

    return read


def rows_of(results: Results, method: str, step: int) -> list[Row]:
    """The rows of a method after a step, one per seed."""
    return [row for row in results.rows if row.method == method and row.step == step]


def over_seeds(results: Results, method: str, step: int, read: Reading) -> Spread | None:
    """A number of a method after a step, over seeds."""
    return spread_of(read(row) for row in rows_of(results, method, step))


def last_step(results: Results, method: str) -> int:
    """The last step that every seed of a method has finished; 0 where there is none."""
    done = {row.seed: 0 for row in results.rows if row.method == method}
    for row in results.rows:
        if row.method == method:
            done[row.seed] = max(done[row.seed], row.step)
    return min(done.values(), default=0)


def title_of(method: str, titles: dict[str, str]) -> str:
    """A method's name for people."""
    return FIXED.get(method) or titles.get(method, method)


def privleak_reading(results: Results) -> Reading:
    """PrivLeak of a row: relative to the retrained model at the same step, else to a model that saw neither text."""
    reference = {row.step: row.membership.get(PRIVLEAK_ATTACK) for row in results.rows if row.method == RETRAINED}

    def read(row: Row) -> float | None:
        found, base = row.membership.get(PRIVLEAK_ATTACK), reference.get(row.step, CHANCE)
        return None if found is None or base is None else privleak(found, base)

    return read


def over_vanilla(results: Results, group: str, name: str) -> Reading:
    """How far a score lies above that of the untouched model at the same step."""
    read = score(group, name)
    before = {row.step: read(row) for row in results.rows if row.method == VANILLA}

    def difference(row: Row) -> float | None:
        now, base = read(row), before.get(row.step)
        return None if now is None or base is None else now - base

    return difference


def taken_down(results: Results) -> Reading:
    """Exact memorisation of everything taken down so far, steps weighted equally."""

    def read(row: Row) -> float | None:
        known = [v for name in results.steps[: row.step] if (v := row.persistence[name]) is not None]
        return statistics.fmean(known) if known else None

    return read


def under_attack(results: Results, method: str, attack: str, name: str) -> Spread | None:
    """A score of a method's final model under an attack, over seeds."""
    found: list[Recovered] = [r for r in results.recovered if r.method == method and attack in r.attacks]
    return spread_of(getattr(r.attacks[attack], name) for r in found)


def attacks_of(results: Results) -> list[str]:
    """All attacks that were made, in their order."""
    made = {attack for r in results.recovered for attack in r.attacks}
    return [attack for attack in UNDER_ATTACK if attack in made]


CSV_COLUMNS = (
    "method", "seed", "step", "source",
    *(f"{group}_{name}" for group in GROUPS for name in ("passages", *SCORES)),
    *(f"auc_{attack}" for attack in ATTACKS), "privleak",
    "alpha", "reached", "selected", "changed", "total", "seconds", "tokens", "peak_bytes", "rise_bytes",
)  # fmt: skip


def csv_rows(results: Results) -> list[dict[str, object]]:
    """One flat row for each method, seed and step; empty where something was not measured."""
    leak, flat = privleak_reading(results), []
    for row in results.rows:
        line: dict[str, object] = dict.fromkeys(CSV_COLUMNS)
        line |= {"method": row.method, "seed": row.seed, "step": row.step, "source": row.source}
        for group, found in row.groups.items():
            line |= {f"{group}_{name}": value for name, value in found.model_dump().items()}
        line |= {f"auc_{attack}": value for attack, value in row.membership.items()}
        line["privleak"] = leak(row)
        for part in (row.change, row.cost):
            line |= part.model_dump() if part is not None else {}
        flat.append(line)
    return flat
