"""One string of a JSON object that is too long to be held.

In: a JSON text in chunks. Out: the text in one field, in chunks. Never: more than some chunks in memory; a check of
what stands beside the field.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator

_KEPT_CHARS = 1 << 16
"""Characters of a key that are looked at."""


def long_text(chunks: Iterable[str], field: str) -> Iterator[str]:
    """The text in one field of a JSON object that is too long to be held: only the field's own string is decoded.

    Args:
        chunks: The JSON text in chunks of any size.
        field: Name of the field, at the top of the object; null is an empty text.

    Yields:
        Its text in chunks.

    Raises:
        ValueError: The object has no text there, or names the field again behind it, or the string is not JSON.
    """
    source = _Source(chunks)
    depth, key, is_key, named, texts = 0, "", False, 0, 0
    while mark := source.next_mark():
        if depth == 0 and mark != "{":
            break
        if mark == '"':
            parts = source.string()
            if depth == 1 and is_key:
                key = _unescaped(_beginning(parts))
                named += key == field
            elif depth == 1 and key == field and named == 1:
                yield from map(_unescaped, parts)
                texts += 1
            for _ in parts:
                pass
        elif mark == "n":
            texts += depth == 1 and key == field
        elif mark in "{[":
            depth += 1
            is_key = depth == 1
        elif mark in "}]":
            depth -= 1
        elif depth == 1:
            is_key = mark == ","
    if named != 1 or not texts:
        raise ValueError(no_text(field, named))


def no_text(field: str, named: int) -> str:
    """What is wrong with a JSON object that names a field so many times, in words."""
    if named > 1:
        return f"names its field {field!r} {named} times, so which one is meant is not known"
    return f"holds no text in a field {field!r} (see --text-field)"


def _unescaped(raw: str) -> str:
    """A stretch of a JSON string that ends inside no escape."""
    return str(json.loads(f'"{raw}"'))


def _beginning(parts: Iterable[str]) -> str:
    """The first blocks of a string; keys longer than a block are nobody's."""
    kept = ""
    for part in parts:
        if len(kept) < _KEPT_CHARS:
            kept += part
    return kept


class _Source:
    """JSON text that comes in chunks, read through a window."""

    _MARK = re.compile(r'["{}\[\],:n]')  # no word but null has an n
    _UNFINISHED = re.compile(
        # A backslash that no backslash escapes, with too little behind it; the first of two surrogates waits, too.
        r"(?<!\\)(?:\\\\)*(\\(?:u[0-9a-fA-F]{0,3})?|\\u[dD][89abAB][0-9a-fA-F]{2}(?:\\(?:u[0-9a-fA-F]{0,3})?)?)\Z"
    )
    _LONGEST_UNFINISHED = 11

    def __init__(self, chunks: Iterable[str]) -> None:
        self._chunks = iter(chunks)
        self._text, self._at = "", 0

    def _more(self) -> bool:
        """Take another chunk behind what is not yet read; False at the end."""
        chunk = next(self._chunks, None)
        self._text, self._at = self._text[self._at :] + (chunk or ""), 0
        return chunk is not None

    def next_mark(self) -> str:
        """Go behind the next character that means something outside of strings; empty at the end."""
        while not (found := self._MARK.search(self._text, self._at)):
            self._at = len(self._text)
            if not self._more():
                return ""
        self._at = found.end()
        return found[0]

    def string(self) -> Iterator[str]:
        """The blocks of the string that begins here, as they are written; none ends inside an escape.

        Raises:
            ValueError: The text ends inside the string.
        """
        while (end := self._quote()) < 0:
            stop = self._finished()
            yield self._text[self._at : stop]
            self._at = stop
            if not self._more():
                raise ValueError("ends inside a string")
        yield self._text[self._at : end]
        self._at = end + 1

    def _quote(self) -> int:
        """Place of the quote that ends the string: one with an even number of backslashes in front; -1 for none."""
        end = self._text.find('"', self._at)
        while end >= 0:
            before = end
            while before > self._at and self._text[before - 1] == "\\":
                before -= 1
            if (end - before) % 2 == 0:
                return end
            end = self._text.find('"', end + 1)
        return -1

    def _finished(self) -> int:
        """Up to where every escape is whole."""
        body = self._text[self._at :]
        begin = len(body[: -self._LONGEST_UNFINISHED].rstrip("\\"))
        found = self._UNFINISHED.search(body, begin)
        return self._at + (found.start(1) if found else len(body))
