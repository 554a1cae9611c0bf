"""Several processes that need one program of a store: one compiles, the others wait."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from onelaunch.compilation.background import Compilation
from onelaunch.compilation.cache import Store
from onelaunch.compilation.lock import CompileLock
from tests.compilation.children import DELIVER, child, compiler, until

pytest.importorskip("fcntl", reason="locks as POSIX has them")

# A process with one compilation, which counts itself in `log` and waits for the file `go`.
PARENT = """
import os, sys, time
from pathlib import Path
from onelaunch.compilation.background import Compilation
from onelaunch.compilation.cache import Store
compiler = [sys.executable, "-c", sys.argv[2]]
done = Compilation(Store(Path(sys.argv[1])), "key", compiler, bytes, print, "the fast form")
print(done.wait(60))
"""


def slow_compiler(tmp_path) -> str:
    """A child that records that it runs, and delivers once the file `go` exists."""
    return "\n".join(
        (
            "import os, sys, time",
            DELIVER,
            f"open({str(tmp_path / 'runs')!r}, 'a').write('x')",
            f"while not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.01)",
            "deliver(sys.argv[-1], b'program')",
        )
    )


def runs(tmp_path) -> int:
    path = tmp_path / "runs"
    return len(path.read_text()) if path.exists() else 0


def start(store: Store, code: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-u", "-c", PARENT, str(store.folder), code]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_of_several_processes_one_compiles(store, tmp_path):
    code = slow_compiler(tmp_path)
    processes = [start(store, code)]
    first = [processes[0].stdout.readline()]
    until(lambda: runs(tmp_path))
    processes += [start(store, code) for _ in range(2)]
    others = [process.stdout.readline() for process in processes[1:]]
    assert first[0].startswith("compiling the fast form")
    assert all(line.startswith("waiting for the fast form") for line in others)
    (tmp_path / "go").touch()
    for process, by in zip(processes, ("", *[" by another process"] * 2), strict=True):
        lines = process.communicate(timeout=60)[0].splitlines()
        assert lines[0].startswith(f"the fast form: compiled{by} in ")
        assert lines[1] == "b'program'"
    assert runs(tmp_path) == 1
    assert [path.suffix for path in store.folder.iterdir()] == [".program"], "no lock is left"


def test_a_child_whose_parent_has_ended_is_waited_for(store, tmp_path, compiling, logged):
    process = start(store, slow_compiler(tmp_path))
    until(lambda: runs(tmp_path))
    process.kill()
    process.communicate()
    compilation = compiling(child("sys.exit('not to be run')"))
    until(lambda: logged)
    (line,) = logged
    assert line.startswith("waiting for the fast form")
    (tmp_path / "go").touch()
    assert compilation.wait(60) == "program", compilation.failed
    assert runs(tmp_path) == 1


def test_where_another_process_fails_the_next_compiles(store, compiling, logged):
    lock = CompileLock(store, "key")
    assert lock.acquire()
    compilation = compiling()
    until(lambda: logged)
    assert compilation.wait(0.0) is None
    lock.release()
    assert compilation.wait(60) == "program", compilation.failed
    assert logged[1].startswith("compiling the fast form")
    assert logged[2].startswith("the fast form: compiled in ")


def test_a_waiting_compilation_can_be_cancelled(store, compiling, logged):
    lock = CompileLock(store, "key")
    assert lock.acquire()
    compilation = compiling()
    until(lambda: logged)
    compilation.cancel()
    assert compilation.wait(20) is None
    until(lambda: compilation.ended)
    assert compilation.failed is None
    assert len(logged) == 1
    lock.release()


def test_a_process_that_waited_too_long_compiles_itself(store, compiling, monkeypatch):
    lock = CompileLock(store, "key")
    assert lock.acquire()
    monkeypatch.setattr(Compilation, "_compile_here", lambda self, lock: b"own")
    assert compiling(timeout=0.05).wait(60) == "own"
    lock.release()


def test_other_programs_do_not_wait(store, compiling):
    lock = CompileLock(store, "another")
    assert lock.acquire()
    assert compiling().wait(60) == "program"
    lock.release()


def test_a_lock_is_held_once_and_leaves_nothing(store):
    locks = [CompileLock(store, "key") for _ in range(2)]
    for one, other in (locks, locks[::-1]):
        assert one.acquire()
        assert not other.acquire()
        one.release()
        one.release()
    assert list(store.folder.iterdir()) == []


def test_a_lock_that_was_removed_while_it_was_opened_is_not_held(store, monkeypatch):
    lock, other = CompileLock(store, "key"), CompileLock(store, "key")
    assert lock.acquire()
    take = CompileLock._take

    def late(self, descriptor):
        if self is other and lock.descriptor is not None:
            lock.release()
        return take(self, descriptor)

    monkeypatch.setattr(CompileLock, "_take", late)
    assert not other.acquire()
    assert other.acquire()
    other.release()


def test_a_child_whose_program_cannot_be_stored_ends_with_its_parent(tmp_path):
    """If it can be stored, it goes on."""
    (tmp_path / "file").write_text("x")
    code = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    command = child(code)
    parent = PARENT.replace("compiler = ", f"compiler = {command!r} or ").replace(
        "wait(60)", "wait(0)"
    )
    parent += (
        f"\nwhile not os.path.exists({str(tmp_path / 'pid')!r}) or "
        f"not open({str(tmp_path / 'pid')!r}).read(): time.sleep(0.01)"
    )
    store = Store(tmp_path / "file" / "store")
    done = subprocess.run(
        [sys.executable, "-c", parent, str(store.folder), ""],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert f"not cached ({store.folder}: " in done.stdout
    pid = int((tmp_path / "pid").read_text())
    until(lambda: not alive(pid))


def test_a_process_does_not_exit_during_a_preparation(tmp_path, store):
    """PyTorch's C++ code in a thread that the interpreter ends would abort the process."""
    store.put("key", b"program")
    code = f"""
import threading, time
from pathlib import Path
from onelaunch.compilation.background import Compilation
from onelaunch.compilation.cache import Store
begun = threading.Event()
def prepare(program):
    begun.set()
    time.sleep(0.3)
    Path({str(tmp_path / "prepared")!r}).touch()
Compilation(Store(Path({str(store.folder)!r})), "key", [], prepare, print, "the fast form")
begun.wait()
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
    assert (tmp_path / "prepared").exists()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # a zombie does not run
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return True


def test_a_store_that_cannot_be_written_is_named_by_every_compilation(tmp_path, logged):
    (tmp_path / "file").write_text("x")
    store = Store(tmp_path / "file" / "store")
    for _ in range(2):
        made = Compilation(store, "key", compiler(), bytes, logged.append, "the fast form")
        assert made.wait(60) == b"program"
    assert len([line for line in logged if f"not cached ({store.folder}: " in line]) == 2
    assert len(logged) == 4
