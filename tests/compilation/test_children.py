"""Children with a line protocol: time limits, and their standard error."""

from __future__ import annotations

import sys

import pytest

from onelaunch.compilation.children import Child


@pytest.fixture
def started():
    children = []

    def start(does):
        children.append(Child((sys.executable, "-c", f"import os, sys, time\n{does}")))
        return children[-1]

    yield start
    for each in children:
        each.end()


def test_lines_come_one_by_one_and_then_nothing(started):
    child = started("os.write(1, b'one\\ntwo\\n' + b'x' * 200_000 + b'\\ncut off')")
    assert [child.receive_within(60) for _ in range(2)] == ["one", "two"]
    assert child.receive_within(60) == "x" * 200_000
    assert child.receive_within(60) == ""


def test_an_incomplete_line_times_out(started):
    child = started("os.write(1, b'one\\ntw'); sys.stdin.readline(); os.write(1, b'o\\n')")
    assert child.receive_within(60) == "one"
    with pytest.raises(TimeoutError):
        child.receive_within(0.2)
    child.send("on")
    assert child.receive_within(60) == "two"


def test_standard_error_is_read_while_it_runs(started):
    child = started(
        "for i in range(3):\n"
        "    os.write(2, b'a\\tremark %d\\n\\n' % i); print(flush=True); sys.stdin.readline()"
    )
    for number in range(3):
        child.receive_within(60)
        assert child.stderr_lines() == [f"a remark {i}" for i in range(number + 1)]
        child.send("on")
    child.end()
    assert child.stderr_lines() == []
