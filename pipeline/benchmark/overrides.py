"""The benchmark's settings: a ``takedown.toml`` for all rows, and tables ``[methods.NAME]`` for single ones.

In: a TOML file. Out: resolved settings for each row and seed. A name that is no method is a row of its own, whose
``unlearn.method`` says what it is based on::

    [unlearn]                            # for every row, over its method's defaults
    iterations = 20
    [methods.ssu-paper.calibrate]        # for one row
    fixed_alpha = 1
    [methods.ssu-lora.unlearn]           # a row of its own
    method = "ssu"
    parameterisation = "lora"
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.benchmark.records import FIXED
from pipeline.errors import InvalidInput, Problem
from pipeline.method_defaults import METHOD_DEFAULTS
from pipeline.settings import ASKED, Settings

AS_RELEASED = "ssu-as-released"
"""The one row that no settings of a takedown can name: see `pipeline.methods.ssu_as_released`."""

ROWS = (*METHOD_DEFAULTS, AS_RELEASED)
"""Rows that need no table of their own."""

_NAME = re.compile("[a-z0-9][a-z0-9.+-]{0,60}")
_SEE = "See pipeline/settings.py for all keys."


@dataclass(frozen=True)
class Overrides:
    """What a file sets.

    Attributes:
        common: Section → keys, for every row.
        own: Row → section → keys.
    """

    common: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def settings(self, row: str, seed: int) -> Settings:
        """The settings of a row for a seed: its method's defaults, what holds for all, what holds for it.

        Raises:
            ValidationError: An unknown key or a value out of range.
        """
        tree: dict[str, Any] = {name: dict(section) for name, section in self.common.items()}
        if row in METHOD_DEFAULTS:
            tree.setdefault("unlearn", {})["method"] = row
        elif row == AS_RELEASED:  # what it reads of these is the paper's; it holds on to nothing
            tree.setdefault("unlearn", {})["method"] = "ssu-paper"
        for name, section in self.own.get(row, {}).items():
            tree[name] = {**tree.get(name, {}), **section}
        tree["runtime"] = {**tree.get("runtime", {}), "seed": seed}
        return Settings.model_validate(tree, context=ASKED)


def read_overrides(path: Path | None, rows: Sequence[str]) -> Overrides:
    """Read a file, and check it for the rows that are asked for.

    Raises:
        InvalidInput: Not TOML, an unknown row or key, a value out of range; every problem is listed.
    """
    found = Overrides() if path is None else _parsed(path)
    problems = []
    for row in rows:
        if row not in ROWS and row not in found.own:
            known = ", ".join((*ROWS, *(name for name in found.own if name not in ROWS)))
            problems.append(Problem(f"--methods {row}", "is no method", f"Use some of {known}."))
        elif row in FIXED or not _NAME.fullmatch(row):
            remedy = f"Use small letters, digits and hyphens, and none of {', '.join(FIXED)}."
            problems.append(Problem(f"--methods {row}", "is no name for a row", remedy))
        else:
            try:
                found.settings(row, 0)
            except ValidationError as error:
                problems += [
                    Problem(f"{path}: {row}: {'.'.join(map(str, e['loc']))}", e["msg"], _SEE) for e in error.errors()
                ]
    if problems:
        raise InvalidInput(problems)
    return found


def _parsed(path: Path) -> Overrides:
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput([Problem(str(path), f"is no TOML file ({error})", "Correct the file.")]) from error
    own = tree.pop("methods", {})
    tables = {f"methods.{name}": table for name, table in own.items()} if isinstance(own, dict) else {"methods": own}
    wrong = [name for name, table in (*tree.items(), *tables.items()) if not _is_tree(name, table)]
    if wrong:
        raise InvalidInput(Problem(f"{path}: {name}", "is no table of settings", _SEE) for name in wrong)
    return Overrides(tree, own)


def _is_tree(name: str, table: Any) -> bool:
    """Whether a table holds keys, or, of a row, sections with keys."""
    if not isinstance(table, dict):
        return False
    return not name.startswith("methods.") or all(isinstance(section, dict) for section in table.values())
