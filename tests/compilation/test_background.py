"""Compiling in the background, with real children and threads."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from onelaunch.compilation.background import Compilation
from onelaunch.compilation.cache import Store
from onelaunch.errors import BadInput
from tests.compilation.children import HANG, child, compiler, until


def alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        # without /proc it ran a moment ago; with it the process has just ended
        return not os.path.isdir("/proc")


# success


def test_a_program_is_compiled_kept_and_made_ready(compiling, store, logged):
    began = time.monotonic()
    compilation = compiling()
    assert compilation.wait(60) == compilation.poll() == "program"
    assert compilation.ended
    assert compilation.failed is None
    assert not compilation.was_cached
    assert 0 < compilation.seconds <= time.monotonic() - began
    start, end = logged
    assert "compiling the fast form" in start
    assert "not cached" not in start
    assert f"the fast form: compiled in {compilation.seconds:.1f} s" in end
    assert (store.hits, store.misses) == (0, 1)
    (entry,) = store.entries()
    assert (entry.key, entry.about["what"]) == ("key", "the fast form")


def test_a_cached_program_needs_no_child_and_logs_nothing(compiling, store, logged):
    store.put("key", b"kept")
    threads = []

    def prepare(program):
        threads.append(threading.current_thread())
        return program

    compilation = compiling(child("sys.exit('not to be run')"), prepare)
    assert compilation.wait(60) == b"kept"
    assert compilation.was_cached
    assert compilation.seconds >= 0
    assert logged == []
    assert (store.hits, store.misses) == (1, 0)
    assert threads != [threading.main_thread()]
    assert threads[0].daemon


def test_a_damaged_program_is_compiled_again(compiling, store):
    store.put("key", b"kept")
    (path,) = store.folder.iterdir()
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    compilation = compiling()
    assert compilation.wait(60) == "program"
    assert not compilation.was_cached
    assert store.damaged == 1
    assert store.get("key") == b"program"


@pytest.mark.parametrize(("seconds", "shown"), [(5.4, 5), (0.2, 1)])
def test_the_previous_compile_time_is_logged(compiling, store, logged, seconds, shown):
    store.put("other", b"x", {"what": "the fast form", "seconds": seconds})
    store.put("alien", b"x", {"what": "another form", "seconds": 77})
    assert compiling().wait(60)
    assert logged[0].startswith("compiling the fast form")
    assert logged[0].endswith(f" {shown} s")


def test_without_a_store_it_runs_all_the_same(compiling, logged, tmp_path):
    (tmp_path / "file").write_text("x")
    store = Store(tmp_path / "file" / "store")
    compilation = compiling(compiler(first="print('chatter')"), store=store)
    assert compilation.wait(60) == "program"
    assert not compilation.was_cached
    assert f"not cached ({store.folder}: " in logged[0]
    assert "not cached" not in logged[1]
    assert len(logged) == 2


def test_a_program_that_could_not_be_stored_is_logged(compiling, store, logged):
    """The folder becomes a file while the child works."""
    folder = repr(str(store.folder))
    first = f"import shutil; shutil.rmtree({folder}); open({folder}, 'w').close()"
    compilation = compiling(compiler(first=first))
    assert compilation.wait(20) == "program", compilation.failed
    assert "not cached" not in logged[0]
    assert f"not cached ({store.folder}: " in logged[1]


def test_the_child_is_in_a_session_of_its_own_and_reads_nothing(compiling):
    first = "assert os.getsid(0) == os.getpid() and sys.stdin.read() == ''"
    compilation = compiling(compiler(first=first))
    assert compilation.wait(60) == "program", compilation.failed


# failure


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (child("sys.exit('one\\ntwo: this is why\\n\\n')"), "two: this is why"),
        (child("1 / 0"), "ZeroDivisionError: division by zero"),
        (child("sys.exit(7)"), "exit status 7"),
        (child("sys.exit('\\x1b[31mred\\tand\\x00 so on')"), "[31mred and so on"),
        (child("sys.stderr.buffer.write(b'\\xff' * 9999); sys.exit(1)"), "\ufffd" * 300),
        (child("pass"), "the compiler returned no program"),
        (child("print('not a program')"), "the compiler returned no program"),
    ],
    ids=lambda value: "" if isinstance(value, list) else value[:24],
)
def test_a_child_that_fails_is_logged_in_one_line(compiling, store, logged, command, reason):
    compilation = compiling(command)
    assert compilation.wait(60) is None
    assert compilation.ended
    assert compilation.failed == reason
    assert compilation.seconds is None
    (line,) = logged[1:]
    assert line.startswith(f"the fast form: compilation failed ({reason})")
    assert not store.contains("key")


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_the_signal_of_a_killed_child_is_the_reason(compiling):
    compilation = compiling(child("os.kill(os.getpid(), 11)"))
    assert compilation.wait(60) is None
    assert compilation.failed == "ended by SIGSEGV"


def test_a_command_that_is_not_there(compiling, tmp_path):
    compilation = compiling([str(tmp_path / "no-such-program")])
    assert compilation.wait(60) is None
    assert "No such file" in compilation.failed


def test_a_child_that_hangs_is_killed(compiling, logged):
    compilation = compiling(child(HANG), timeout=0.5)
    assert compilation.wait(60) is None
    assert compilation.ended
    assert "longer than 0.5 s" in compilation.failed
    assert compilation.failed in logged[-1]
    assert compilation._child.returncode is not None


def _refuse(error):
    def prepare(program):
        raise error

    return prepare


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("no such\nsymbol"), "ValueError: no such"),
        (BadInput("x: bad"), "x: bad"),
        (KeyError(), "KeyError"),
        (SystemExit(3), "SystemExit: 3"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("cached", [False, True])
def test_a_program_that_cannot_be_made_ready(compiling, store, logged, error, reason, cached):
    if cached:
        store.put("key", b"kept")
    compilation = compiling(prepare=_refuse(error))
    assert compilation.wait(60) is None
    assert compilation.failed == reason
    assert logged[-1].startswith(f"the fast form: compilation failed ({reason})")
    assert not store.contains("key")


def test_a_program_stays_where_only_memory_was_short(compiling, store):
    compilation = compiling(prepare=_refuse(MemoryError()))
    assert compilation.wait(60) is None
    assert compilation.failed == "MemoryError"
    assert store.contains("key")


def test_an_error_of_the_log_changes_nothing(store):
    def mute(text):
        raise BrokenPipeError(32, "Broken pipe")

    compilation = Compilation(store, "key", compiler(), bytes.decode, mute, "the fast form")
    assert compilation.wait(60) == "program"
    assert compilation.failed is None


# cancellation


def test_cancelling_ends_the_child_and_what_it_started(compiling, store, logged, tmp_path):
    note = tmp_path / "pids"
    first = (
        "import subprocess\n"
        f"other = subprocess.Popen([sys.executable, '-c', 'import time; {HANG}'])\n"
        f"open({str(note)!r}, 'w').write(f'{{os.getpid()}} {{other.pid}} .')\n"
        f"{HANG}"
    )
    compilation = compiling(compiler(first=first))
    until(lambda: note.exists() and note.read_text().endswith("."))
    pids = [int(word) for word in note.read_text().split()[: 2 if os.name == "posix" else 1]]
    assert all(alive(pid) for pid in pids)
    compilation.cancel()
    until(lambda: not any(alive(pid) for pid in pids))
    assert compilation.wait(60) is None
    assert compilation.ended
    assert compilation.failed is None
    assert len(logged) == 1
    assert not store.contains("key")
    compilation.cancel()


def test_cancelling_at_once_and_after_the_end(compiling, logged):
    compilation = compiling(child(HANG))
    compilation.cancel()
    assert compilation.wait(60) is None
    assert compilation.failed is None
    compilation = compiling(key="other")
    assert compilation.wait(60) == "program"
    compilation.cancel()
    assert compilation.poll() is None


def test_cancelling_while_it_is_made_ready(compiling, store, logged):
    store.put("key", b"kept")
    inside, go = threading.Event(), threading.Event()

    def prepare(program):
        inside.set()
        go.wait(60)
        return program

    compilation = compiling(prepare=prepare)
    assert inside.wait(60)
    compilation.cancel()
    assert not compilation.ended
    go.set()
    assert compilation.wait(60) is None
    assert compilation.ended
    assert logged == []


# never blocking


def test_poll_never_waits(compiling, store):
    store.put("key", b"kept")
    go = threading.Event()
    slow = compiling(prepare=lambda program: go.wait(60) and "new")
    for _ in range(2000):  # one that waited would find the new form, or no end
        assert slow.poll() is None
    assert slow.wait(0.01) is None
    go.set()
    assert slow.wait(60) == "new"


PARENT = """
import os, sys, threading
from pathlib import Path
from onelaunch.compilation import background
from onelaunch.compilation.cache import Store

store = Store(Path(sys.argv[1]))
begun = threading.Event()

def say(text):
    print(text)
    begun.set()

prepared = []
compilation = background.Compilation(store, "key", sys.argv[2:], prepared.append, say, "it")
assert begun.wait(60)
while compilation._child is None:
    pass
"""


def parent(store: Store, ending: str, first: str = "pass") -> subprocess.CompletedProcess:
    """A process that begins to compile, then does `ending`."""
    return subprocess.run(
        [sys.executable, "-u", "-c", PARENT + ending, str(store.folder), *compiler(first=first)],
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("ending", ["pass", "os.kill(os.getpid(), 9)"], ids=["ends", "dies"])
def test_a_parent_does_not_wait_and_its_child_still_delivers(store, tmp_path, ending):
    if os.name != "posix" and "kill" in ending:
        pytest.skip("signals as POSIX has them")
    gate = tmp_path / "gate"
    first = (
        f"while not os.path.exists({str(gate)!r}): time.sleep(0.01)\n"
        "print('chatter', flush=True)\n"
        "print('chatter', file=sys.stderr, flush=True)"
    )
    done = parent(store, ending, first)
    try:
        # the child still waits: its parent did not
        assert not store.contains("key")
        assert done.returncode == (0 if ending == "pass" else -signal.SIGKILL)
        assert done.stderr == ""
        assert done.stdout.startswith("compiling it ")
        assert done.stdout.count("\n") == 1
    finally:
        gate.touch()
    until(lambda: store.contains("key"))
    assert store.get("key") == b"program"


@pytest.mark.parametrize("well", [True, False], ids=["compiled", "failed"])
def test_an_exiting_parent_logs_and_prepares_nothing_more(store, tmp_path, well):
    gate = tmp_path / "gate"
    done = parent(
        store,
        "background._at_exit()\n"
        f"Path({str(gate)!r}).touch()\n"
        "assert compilation.wait(60) is None and compilation.ended\n"
        f"assert store.contains('key') is {well} and not prepared",
        f"while not os.path.exists({str(gate)!r}): time.sleep(0.01)\n"
        f"if not {well}: sys.exit('failed')",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("compiling it ")
    assert done.stdout.count("\n") == 1
