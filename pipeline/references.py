"""Texts that a workspace was given beside the requests: to keep, to measure on, and what is nobody's.

In: a workspace and a kind. Out: texts by file name. Never: imports torch.
"""

from __future__ import annotations

from typing import Literal

from pipeline.errors import UsageError
from pipeline.workspace import Workspace

Kind = Literal["retain", "kept", "heldout", "boilerplate"]
KINDS: tuple[Kind, ...] = ("retain", "kept", "heldout", "boilerplate")
MEASURED: tuple[Kind, ...] = KINDS[:3]
"""What v0 is measured on."""


def read_texts(workspace: Workspace, kind: Kind) -> dict[str, str]:
    """The texts of one kind, by file name; none where there is no such folder.

    Raises:
        UsageError: One is not UTF-8.
    """
    found = {}
    for path in sorted((workspace.reference / kind).glob("*.txt")):
        try:
            found[path.name] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{path}: is not UTF-8 (byte {error.start}). Save it as UTF-8, or take it away."
            ) from error
    return found


def boilerplate(workspace: Workspace) -> tuple[str, ...]:
    """Texts that are evidence for nothing, such as licences: ``reference/boilerplate/*.txt``."""
    return tuple(read_texts(workspace, "boilerplate").values())
