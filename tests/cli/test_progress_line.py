"""The line that eval shows while it reads: in its place at any width, gone at the end."""

import os
import sys

import pytest

from onelaunch.cli.common import progress_line
from tests.training.screens import Screen


@pytest.fixture
def window(monkeypatch, capsys):
    """Standard error as a terminal of so many columns; the screen that was written to."""

    def open_window(columns: int):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        monkeypatch.setattr("onelaunch.cli.common._columns", lambda: columns)
        return Screen(columns)

    return open_window


@pytest.mark.parametrize("columns", [10, 20, 40, 120])
def test_one_row_whatever_the_width(window, capsys, columns):
    screen = window(columns)
    with progress_line() as show:
        for done in (8192, 16384, 1_000_000):
            show(f"{done:,} of 1,000,000 tokens")
            screen.write(capsys.readouterr().err)
            assert screen.text() == [f"{done:,} of 1,000,000 tokens"[: columns - 1].rstrip()]
    screen.write(capsys.readouterr().err)
    assert screen.text() == [""]


def test_it_is_gone_when_what_is_under_way_fails(window, capsys):
    screen = window(40)

    def fail():
        with progress_line() as show:
            show("10 tokens")
            raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        fail()
    screen.write(capsys.readouterr().err)
    assert screen.text() == [""]


def test_nothing_is_shown_where_nobody_looks(window, capsys):
    with progress_line() as show:
        show("10 tokens")
    window(40)
    with progress_line(quiet=True) as show:
        show("10 tokens")
    assert capsys.readouterr().err == ""


def test_the_width_is_that_of_standard_error(monkeypatch):
    from onelaunch.cli import common

    monkeypatch.setattr(os, "get_terminal_size", lambda descriptor: os.terminal_size((33, 9)))
    monkeypatch.setattr(sys.stderr, "fileno", lambda: 2, raising=False)
    assert common._columns() == 33
