"""Foreign text on a terminal: shown as it stands, and without effect."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mteditflow._text import escape_controls, escape_markup

ANY = st.text(st.characters(exclude_categories=()))


def printed(markup):
    console = Console(width=10_000, color_system="standard", highlight=False, force_terminal=True)
    with console.capture() as captured:
        console.print(markup, end="")
    return captured.get()


@given(ANY)
def test_nothing_that_acts_is_left(text):
    shown = escape_controls(text)
    assert not {unicodedata.category(c) for c in shown} & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    assert escape_controls(shown) == shown


@given(st.text(st.characters(categories=["L", "N", "P", "S"])))
def test_what_is_shown_stays(text):
    assert escape_controls(text) == text


@pytest.mark.parametrize(
    "text", ["[link=http://evil]x[/link]", "[/]", "[bold]", "\\[/]", "[[red]]", "[", "x"]
)
def test_markup_is_printed_as_it_stands(text):
    assert printed(escape_markup(text)) == text
    assert printed(f"[bold]{escape_markup(text)}[/bold]") == f"\x1b[1m{text}\x1b[0m"


def test_an_escape_sequence_does_not_reach_the_terminal():
    text = "\x1b]8;;http://evil\x1b\\\\click\x1b[2J\r\n\u202ecod.exe"
    assert printed(escape_markup(text)).isprintable()
