"""Lines redrawn in place, in a window that changes its width, and what a narrow window shows."""

import os
import random

import pytest

from onelaunch.training.display import ASCII_BLOCKS, BLOCKS, Display, Header
from onelaunch.training.terminal import Block, Line, Terminal
from tests.training.screens import Screen
from tests.training.test_display import FLOPS, update_record

HEADER = Header(
    "onelaunch train: runs/quickstart-20261129-120000",
    (
        "model  0.26 million parameters: dim 64, 5 layers, 8 heads, vocabulary 512",
        "data   built-in synthetic stories",
    ),
    updates=1000,
    accum=4,
    tokens_per_micro_step=64,
    flops=FLOPS,
)


class Window:
    """In the place of a Terminal: writes to a screen; `known` columns are what the system says."""

    encoding = "utf-8"

    def __init__(self, columns: int) -> None:
        self.screen = Screen(columns)
        self.known = columns

    def resize(self, columns: int, known: int | None = None) -> None:
        self.screen.resize(columns)
        self.known = known or columns

    def size(self) -> os.terminal_size:
        return os.terminal_size((self.known, 40))

    def write(self, text: str) -> None:
        self.screen.write(text)


def lines_of(width: int, number: int) -> list[Line]:
    return [Line(((f"{letter}{number}".ljust(width, letter), "dim"),)) for letter in "abcd"]


def test_a_frame_takes_the_place_of_the_last_in_any_width():
    choose = random.Random(0)
    for _ in range(50):
        window = Window(100)
        window.write("before\n")
        block = Block(window)
        for number in range(12):
            width = choose.choice((7, 20, 39, 40, 41, 60, 99, 100, 150))
            window.resize(width)
            lines = lines_of(choose.randint(2, width - 1), number)
            block.draw(lines, ["a notice"] if number == 5 else [])
            shown = window.screen.text()
            assert shown[-4:] == [line.plain for line in lines]
            joined = "".join(shown)
            expected = "before" + "a notice" * (number >= 5)
            assert joined == expected + "".join(line.plain for line in lines)
        block.close()
        window.write("after")
        assert window.screen.text()[-1] == "after"[-(5 % window.known or 5) :]
        assert window.screen.cursor_shown
        assert not window.screen.clips


def test_a_window_narrower_than_the_system_says_leaves_one_frame_behind_at_most():
    window = Window(100)
    block = Block(window)
    block.draw(lines_of(90, 0))
    window.resize(40, known=100)
    for number in range(1, 20):
        block.draw(lines_of(90, number))
    assert len(window.screen.text()) <= 4 + 3 * 4
    window.known = 40
    block.draw(lines_of(30, 20))
    assert [row for row in window.screen.text() if "20" in row] == window.screen.text()[-4:]


@pytest.fixture
def display():
    descriptor = os.open(os.devnull, os.O_WRONLY)
    display = Display(HEADER, (0, 0), descriptor)
    display.close()
    for update in range(60):
        display.push(update_record(update) | {"loss": 9.0 - update / 10})
    display.push({"kind": "eval", "update": 40, "loss": 2.25})
    display.progress(412, 3)
    display._speed.clear()
    display._speed.extend([(10.0, 100), (12.0, 110)])
    yield display
    os.close(descriptor)


@pytest.mark.parametrize("columns", [24, 40, 41, 60, 80, 100, 200])
def test_nothing_is_cut_off_in_a_window_that_is_high_enough(display, columns):
    lines = [line.plain for line in display.panel(columns, 60)]
    assert all(len(line) < columns for line in lines)
    words = " ".join(lines).split()
    for line in (HEADER.title, *HEADER.lines):
        at = words.index(line.split()[0])
        if columns > len("runs/quickstart-20261129-120000"):
            assert words[at : at + len(line.split())] == line.split()
    for name, value in display.status():
        assert any(f"{name} {value}" in line for line in lines), name
    assert any("forward 75.0%" in line for line in lines)
    assert any("41.3%" in line for line in lines)


def test_a_wide_window_has_the_fields_in_lines_of_six(display):
    lines = [line.plain for line in display.panel(120, 60)]
    assert lines[:3] == [HEADER.title, *HEADER.lines]
    assert lines[4].startswith("update 412/1000   micro-step 3/4   loss 3.1000   val 2.2500   lr ")
    assert lines[4].endswith("   grad norm 0.75")
    speeds = "micro-steps/s 5   updates/s 1.25   tokens/s 320   compute 320 MFLOP/s   left "
    assert lines[5].startswith(speeds)


@pytest.mark.parametrize("rows", range(1, 16))
def test_a_low_window_shows_how_far_the_run_is(display, rows):
    lines = [line.plain for line in display.panel(40, rows)]
    assert len(lines) <= max(1, rows - 1)
    assert any("41.3%" in line for line in lines)


@pytest.mark.parametrize("columns", range(1, 12))
def test_a_window_of_a_few_columns_is_no_error(display, columns):
    assert all(len(line.plain) <= max(1, columns - 1) for line in display.panel(columns, 100))


def test_a_terminal_without_block_characters_gets_ascii(display):
    assert any(set(BLOCKS) & set(line.plain) for line in display.panel(80, 40))
    display._terminal.encoding = "iso8859-1"
    shown = "".join(line.plain for line in display.panel(80, 40))
    assert shown.isascii()
    assert set(ASCII_BLOCKS) & set(shown)


def test_text_goes_out_in_the_terminal_s_encoding():
    read, write = os.pipe()
    terminal = Terminal(write, "iso8859-1")
    terminal.write("caf\u00e9 \u2581")
    terminal.close()
    os.close(write)
    assert os.read(read, 100) == b"caf\xe9 ?"
    os.close(read)


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(monkeypatch):
    import pty

    master, slave = pty.openpty()
    terminal = Terminal(slave)
    monkeypatch.setenv("TERM", "xterm")
    assert terminal.redraws()
    monkeypatch.setenv("TERM", "dumb")
    assert not terminal.redraws()
    terminal.close()
    os.close(slave)
    os.close(master)
