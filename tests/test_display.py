"""Untrusted text on a terminal: nothing hidden, nothing interpreted, one line."""

from __future__ import annotations

import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from pipeline.display import INVISIBLE, cell, plain


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("The Tempest", "The Tempest"),
        ("", ""),
        ("日本語 – ça va ß", "日本語 – ça va ß"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("bell\x07 nul\x00 del\x7f csi\x9b", r"bell\x07 nul\x00 del\x7f csi\x9b"),
        ("safe\u202egnp.exe", r"safe\u202egnp.exe"),
        ("a\u200bb\ufeffc\u2060d\u00ade", r"a\u200bb\ufeffc\u2060d\xade"),
        ("filler\u3164 tag\U000e0041", r"filler\u3164 tag\U000e0041"),
        ("lone\ud800", r"lone\ud800"),
        ("one\r\n\n two\t\tthree\u2028four\x85", "one two three four"),
        ("  \n padded \n ", "padded"),
        ("[red]bold[/red] :smile:", "[red]bold[/red] :smile:"),
        ("back\\slash", "back\\slash"),
    ],
)
def test_shown_as(text: str, shown: str) -> None:
    assert plain(text) == shown


@pytest.mark.parametrize(
    ("text", "limit", "shown"),
    [
        ("abcdefgh", 8, "abcdefgh"),
        ("abcdefghi", 8, "abcde..."),
        ("abcdefgh\n", 8, "abcdefgh"),
        ("abcd efghi", 8, "abcd..."),
        ("abc\x1b\x1b", 8, "abc..."),  # the escape is not cut in half
        ("abcdef", 2, ".."),
    ],
)
def test_cut(text: str, limit: int, shown: str) -> None:
    assert plain(text, limit) == shown


def test_long_text_is_not_walked_through() -> None:
    assert plain("x" * 50_000_000, 10) == "xxxxxxx..."


@given(st.text(st.characters(), max_size=200), st.integers(0, 120))
def test_result_is_one_visible_line_within_the_limit(text: str, limit: int) -> None:
    shown = plain(text, limit)
    assert len(shown) <= limit
    assert all(unicodedata.category(c)[0] != "C" and unicodedata.category(c) not in ("Zl", "Zp") for c in shown)
    assert not INVISIBLE.search(shown)
    shown.encode()  # printable on any UTF-8 terminal


@given(st.text(max_size=60))
def test_plain_of_plain_changes_nothing(text: str) -> None:
    assert plain(plain(text, 1000), 1000) == plain(text, 1000)


def test_cell_shows_markup_as_written() -> None:
    table = Table()
    table.add_column("title")
    table.add_row(cell("[red]x[/red] [/] :smile: \x1b[2J"))
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="truecolor")
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    assert r"[red]x[/red] [/] :smile: \x1b[2J" in console.file.getvalue()
    assert "\x1b[2J" not in console.file.getvalue()
