"""Children that are heard with a time limit, and what they have said beside."""

from __future__ import annotations

import sys

import pytest

from onelaunch.compilation.children import Child


@pytest.fixture
def started():
    made = []

    def start(does):
        made.append(Child((sys.executable, "-c", f"import os, sys, time\n{does}")))
        return made[-1]

    yield start
    for each in made:
        each.end()


def test_lines_come_one_by_one_and_then_nothing(started):
    child = started("os.write(1, b'one\\ntwo\\n' + b'x' * 200_000 + b'\\ncut off')")
    assert [child.hear_within(60) for _ in range(2)] == ["one", "two"]
    assert child.hear_within(60) == "x" * 200_000
    assert child.hear_within(60) == ""


def test_a_line_that_is_cut_off_is_not_waited_for(started):
    child = started("os.write(1, b'one\\ntw'); sys.stdin.readline(); os.write(1, b'o\\n')")
    assert child.hear_within(60) == "one"
    with pytest.raises(TimeoutError):
        child.hear_within(0.2)
    child.tell("on")
    assert child.hear_within(60) == "two"


def test_what_it_has_said_is_read_while_it_goes_on(started):
    child = started(
        "for i in range(3):\n"
        "    os.write(2, b'a\\tremark %d\\n\\n' % i); print(flush=True); sys.stdin.readline()"
    )
    for number in range(3):
        child.hear_within(60)
        assert child.said() == [f"a remark {i}" for i in range(number + 1)]
        child.tell("on")
    child.end()
    assert child.said() == []
