"""Foreign text on a terminal."""

from __future__ import annotations

import time
from unicodedata import east_asian_width

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum.terminal import MARK, quoted, visible


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("plain", "plain"),
        ("two\nlines\ttab", "two\nlines    tab"),
        ("dos\r\nline", "dos\nline"),
        ("back\rover", "back\\rover"),
        ("\x1b[2J\x07", "\\x1b[2J\\x07"),
        ("\x9b31m", "\\x9b31m"),
        ("\x7f", "\\x7f"),
        ("abc\u202ecba", "abc\\u202ecba"),
        ("a\u200bb\u2066", "a\\u200bb\\u2066"),
        ("\u2028\u2029", "\\u2028\\u2029"),
        ("Grüße, 世界 e\u0301", "Grüße, 世界 e\u0301"),
        ("\u3164\u2800\ufe0f\U000e0101", "\\u3164\\u2800\\ufe0f\\U000e0101"),
        ("z" + "\u0300" * 6, "z" + "\u0300" * 4 + "\\u0300" * 2),
        ("\ud800", "\\ud800"),
    ],
)
def test_what_steers_turns_or_hides_is_written_out(text: str, seen: str) -> None:
    assert visible(text) == seen


def test_padding_makes_no_line_that_looks_like_ours() -> None:
    forged = "Send the report?" + " " * 140 + "run_01JD3Y step  another workflow"
    for width in (80, 100, 200):
        assert all(line.startswith(MARK.rstrip()) and len(line) <= width for line in quoted(forged, width).split("\n"))
    assert "run_01JD3Y step" in quoted(forged, 80)


def columns(one: str) -> int:
    return 0 if "\u0300" <= one <= "\u036f" else 2 if east_asian_width(one) in "WF" else 1


@given(st.text(), st.integers(20, 120))
def test_nothing_is_left_out_and_every_line_fits_and_is_marked(text: str, width: int) -> None:
    lines = quoted(text, width).split("\n")
    assert all(line.startswith(MARK.rstrip()) for line in lines)
    assert all(sum(map(columns, line)) <= width for line in lines)
    squeezed = "".join(line[len(MARK) :] for line in lines).replace(" ", "")
    assert squeezed == visible(text).replace("\n", "").replace(" ", "")


def test_a_width_that_cannot_be_is_not_believed() -> None:
    assert quoted("x" * 40, 1) == "\n".join([MARK + "x" * 16] * 2 + [MARK + "x" * 8])


@pytest.mark.parametrize("piece", ["a ", "\x1b", "世", "z\u0300", "\n", " "])
def test_the_cost_grows_with_the_text(piece: str) -> None:
    def cost(count: int) -> float:
        began = time.process_time()
        quoted(piece * count, 80)
        return time.process_time() - began

    assert cost(200_000) < max(10 * cost(50_000), 0.5)
