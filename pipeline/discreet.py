"""Errors that quote nobody: what leaves a stage is told to the terminal, to Prefect and to its logs.

In: an exception that nobody foresaw, such as a library's that repeats what it was given. Out: the same exception, or
one that says only what it was and where. Never: a run of words of a request's text, or a contact.

The product's own errors quote nothing by themselves. A single word of a text cannot be told from any other word, and
passes.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pipeline.errors import StoreDamaged, TakedownError, Withheld
from pipeline.vault import Vault

T = TypeVar("T")

WORDS = 4
"""Words in a row from which a message quotes a text."""
CONTACT_CHARS = 6
"""Characters from which a part of a contact (a name, a number, an address) counts."""

_WORD = re.compile(r"\w+")
_ESCAPE = re.compile(r"\\[nrt]")
"""A line break or tab as a quoted text shows it."""


def discreet(vault: Vault, stage: str, compute: Callable[[], T]) -> T:
    """Compute something, and hold back the message of an exception that quotes a request.

    Args:
        vault: All requests; read only when something fails.
        stage: What is computed, for the message.
        compute: Computes it.

    Raises:
        Withheld: In the place of such an exception, which is neither its cause nor its context.
    """
    try:
        return compute()
    except TakedownError:
        raise
    except Exception as error:  # whatever it is, its message goes to places where no text may go
        if not quotes(error, vault):
            raise
        held = Withheld(
            f"{stage}: stopped by {type(error).__name__} at {_place(error)}. Its message is not shown, because it "
            "quotes a request. What is finished is kept; the same command resumes."
        )
    raise held  # out here: where the other one is handled, it would hang on this one as context


def quotes(error: BaseException, vault: Vault) -> bool:
    """Whether an exception, or one that led to it, quotes a request; also where the vault cannot be asked."""
    told = "".join(traceback.format_exception(error))
    words = _WORD.findall(_ESCAPE.sub(" ", told.casefold()))
    runs = {tuple(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)}
    try:
        for request in vault.requests():
            parts = re.split(r"[\s,;<>]+", request.contact or "")
            if any(len(part) >= CONTACT_CHARS and part in told for part in parts):
                return True
            text = _WORD.findall(request.text.casefold())
            if any(tuple(text[i : i + WORDS]) in runs for i in range(len(text) - WORDS + 1)):
                return True
    except (StoreDamaged, OSError):
        return True
    return False


def _place(error: BaseException) -> str:
    """File and line where an exception was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "an unknown place"
