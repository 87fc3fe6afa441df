"""Every error a user can meet, in one tree.

A message says where, what was found and what to do next. Misuse (exit 2), evidence that says no
(exit 1) and interruptions that a later run resumes (exit 3) are different classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with an input.

    Attributes:
        where: File, field or tensor, e.g. ``batch.json: requests[2].text_file``.
        found: What was found there, and what was expected.
        remedy: What the user can do about it.
    """

    where: str
    found: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.where}: {self.found}. {self.remedy}"


class TakedownError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 2


class UsageError(TakedownError):
    """The call or its input is wrong; nothing was changed."""


class InvalidInput(UsageError):
    """An input has problems; all of them are listed.

    Attributes:
        problems: Every problem found, in the order of the input.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(p) for p in self.problems))


class NotAWorkspace(UsageError):
    """The folder is not a workspace, or not one this release can read."""


class UnsupportedModel(UsageError):
    """The model cannot be used: not safetensors, remote code, tokenizer that does not fit."""


class EvidenceError(TakedownError):
    """Stored evidence contradicts itself, or a result contradicts what was promised."""

    exit_code = 1


class StoreDamaged(EvidenceError):
    """A stored file or row does not match its digest."""


class VaultLocked(StoreDamaged):
    """The vault's master key is missing, is no key, or is another one; nothing was changed."""


class NumericalFailure(EvidenceError):
    """A loss, gradient or weight is not finite, or an update missed its target."""


class Refused(EvidenceError):
    """What is asked for would undo what was promised, or destroy what must be kept; nothing was changed."""


class Interrupted(TakedownError):
    """The work stopped early; nothing acknowledged is lost and the same command resumes it."""

    exit_code = 3


class Withheld(Interrupted):
    """Something failed whose message quotes a request, and is therefore not shown."""


class WorkspaceBusy(Interrupted):
    """Another process is writing to this workspace."""


class NotEnough(Interrupted):
    """Memory or disk cannot suffice for what is asked for; it was not begun."""


class NoSpace(Interrupted):
    """The disk is full or read-only."""
