"""Untrusted text made safe for a terminal.

In: titles, names, paths, whatever a sender chose. Out: one short line without control, format or invisible
characters. Never: interprets markup, never changes what is stored.
"""

from __future__ import annotations

import re
import unicodedata

from rich.text import Text

INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
"""Unicode's Default_Ignorable_Code_Point (DerivedCoreProperties.txt): characters that are there and show nothing."""

_SPACES = "\t\n\v\f\r\x85\u2028\u2029 "
_TOKEN = re.compile(f"[{_SPACES}]+|.", re.DOTALL)
_SHOWN_AS_IT_IS = re.compile("[!-~]+(?: [!-~]+)*")
"""Nearly every id, name and time: a log of 10,000 entries has 70,000 cells."""


def plain(text: str, limit: int = 80) -> str:
    r"""Show any text on one line: runs of line breaks, tabs and spaces become one space, what cannot be seen an escape.

    Args:
        text: Untrusted text of any length; only as much as is shown is looked at.
        limit: Most characters of the result; a longer text ends in ``...``, never inside an escape.

    Returns:
        Text without characters of the categories C*, Zl and Zp and without default-ignorable ones; those stand there
        as ``\x1b``, ``\u202e`` or ``\U000e0001``.
    """
    if len(text) <= limit and _SHOWN_AS_IT_IS.fullmatch(text):
        return text
    shown = kept = ""
    for token in _TOKEN.finditer(text.strip(_SPACES)):
        shown += _visible(token.group())
        if len(shown) > limit:
            return (kept.rstrip(" ") + "...")[:limit]
        if len(shown) <= limit - 3:
            kept = shown
    return shown


def size_words(nbytes: int) -> str:
    """A size for people, rounded: ``1.5 GB``, ``340 MB``."""
    return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.0f} MB"


def cell(text: str, limit: int = 80) -> Text:
    """`plain` as a rich text: ``[red]`` and ``:smile:`` come out as they are written."""
    return Text(plain(text, limit))


def plural(count: int, noun: str) -> str:
    """``1 request``, ``2 requests``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _visible(token: str) -> str:
    """One character, or a run of spaces, as it is shown."""
    if token[0] in _SPACES:
        return " "
    if unicodedata.category(token)[0] != "C" and not INVISIBLE.match(token):
        return token
    code = ord(token)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
