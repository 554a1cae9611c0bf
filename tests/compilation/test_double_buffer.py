"""Swapping the form that serves for a newer one."""

from onelaunch.compilation.background import DoubleBuffer
from tests.compilation.children import HANG, child, compiler, until


def test_a_buffer_takes_a_new_form_as_soon_as_it_is_there(compiling):
    buffer = DoubleBuffer("old")
    assert (buffer.current(), buffer.swaps) == ("old", 0)
    compilation = compiling()
    buffer.begin(compilation)
    compilation.wait(60)
    assert (buffer.current(), buffer.swaps) == ("program", 1)
    assert (buffer.current(), buffer.swaps) == ("program", 1)
    compilation.cancel()
    assert buffer.current() == "program"
    buffer.begin(compiling(compiler(b"newer"), key="newer"))
    until(lambda: buffer.current() == "newer")
    assert buffer.swaps == 2


def test_a_failure_keeps_the_old_form(compiling):
    buffer = DoubleBuffer("old")
    for number, command in enumerate([child("sys.exit(1)"), compiler()]):
        compilation = compiling(command)
        buffer.begin(compilation)
        compilation.wait(60)
        assert (buffer.current(), buffer.swaps) == (("old", "program")[number], number)


def test_a_newer_compilation_replaces_an_unfinished_one(compiling):
    buffer = DoubleBuffer("old")
    older, newer = compiling(child(HANG), key="older"), compiling()
    buffer.begin(older)
    buffer.begin(newer)
    assert older.wait(60) is None
    assert older.ended
    buffer.begin(newer)
    assert newer.wait(60) == "program"
    assert (buffer.current(), buffer.swaps) == ("program", 1)


def test_a_finished_one_is_not_lost_to_a_newer(compiling):
    buffer = DoubleBuffer("old")
    older = compiling()
    buffer.begin(older)
    older.wait(60)
    buffer.begin(compiling(child(HANG), key="newer"))
    assert (buffer.current(), buffer.swaps) == ("program", 1)
