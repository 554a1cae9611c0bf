"""Compile a faster form in the background while another one runs.

The compiler runs in a child process, at low priority and in its own session: it does not hold the
GIL, gets no interrupt meant for its parent, and stores its result even if the parent ends first. A
thread waits for it and prepares the new form.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, BinaryIO, Generic, TypeVar

from onelaunch.checkpoints.atomic import write_error
from onelaunch.compilation import entry
from onelaunch.compilation.cache import Store
from onelaunch.compilation.child import NOT_CACHED, Destination
from onelaunch.compilation.entry import Damaged
from onelaunch.compilation.environment import child_environment
from onelaunch.compilation.lock import CompileLock
from onelaunch.errors import BadInput, OnelaunchError, RunFailed

T = TypeVar("T")

POLL_SECONDS = 0.02
"""Interval of checks whether the child has ended."""
MAX_REASON_LENGTH = 300
PREPARE_SECONDS = 5.0
"""How long a process waits at its exit for `prepare` calls that are running."""

_log_lock = threading.RLock()
_exiting = False
_uncached: weakref.WeakSet[Compilation[Any]] = weakref.WeakSet()
"""Compilations whose program will not be stored: their children end with this process."""
_preparing: set[Compilation[Any]] = set()
"""Compilations that are in `prepare` now."""


def _at_exit() -> None:
    """Stop logging, end useless children and wait for `prepare` calls, so that no daemon thread is
    stopped inside a print or C++ code, which can abort the exit."""
    global _exiting
    _exiting = True
    for compilation in list(_uncached):
        compilation.cancel()
    end = time.monotonic() + PREPARE_SECONDS
    for compilation in list(_preparing):
        compilation._ended.wait(max(0.0, end - time.monotonic()))
    # bounded: a blocked reader of our output must not block the exit
    if _log_lock.acquire(timeout=1.0):
        _log_lock.release()


atexit.register(_at_exit)


def log_line(log: Callable[[str], None], text: str) -> None:
    """Log a line from a background thread; nothing while the process is exiting."""
    with _log_lock:
        if not _exiting:
            # a broken terminal must not fail the compilation
            with suppress(Exception):
                log(text)


class Compilation(Generic[T]):
    """A program that is compiled in the background, or loaded from the store, and then prepared.

    It starts at once. `command` is the command line of the child without its last argument, the
    destination for `onelaunch.compilation.child.deliver`, which is added here. `prepare` turns the
    program into the new form, in the thread. `log` is called from the thread, with lines that
    contain `name`, such as "the fast form". A child that takes longer than `timeout` seconds is
    killed and the compilation fails.

    Of several processes that need the same program of a store one compiles, and the others wait. If
    the store cannot be written, each compiles for itself, and the first line has the reason.

    A program that `prepare` raises an error for is removed from the store: the next run compiles it
    again.
    """

    def __init__(
        self,
        store: Store,
        key: str,
        command: Sequence[str],
        prepare: Callable[[bytes], T],
        log: Callable[[str], None],
        name: str,
        timeout: float = 300.0,
    ) -> None:
        self.failed: str | None = None
        """Why there will be no new form, in one line."""
        self.seconds: float | None = None
        """From the start until the new form was ready."""
        self.was_cached = False
        self._store = store
        self._key = key
        self._command = list(command)
        self._prepare = prepare
        self._log_line = log
        self._name = name
        self._timeout = timeout
        self._form: T | None = None
        self._other_process = False  # whether another process compiles it
        self._not_cached: str | None = None  # why it will not be stored, known at the start
        self._store_failed: str | None = None  # why it was not stored, known at the end
        self._cancelled = False
        self._child: subprocess.Popen[bytes] | None = None
        # held whenever the child is used: its id may be reused once it has been reaped
        self._lock = threading.Lock()
        self._ended = threading.Event()
        threading.Thread(target=self._run, name=f"compiling {name}", daemon=True).start()

    @property
    def ended(self) -> bool:
        """Whether it is ready, failed or cancelled."""
        return self._ended.is_set()

    def poll(self) -> T | None:
        """Return the new form if it is ready, else None, without waiting."""
        return self._form

    def wait(self, timeout: float | None = None) -> T | None:
        """Wait up to `timeout` seconds for the new form; returns None if it is not ready then."""
        self._ended.wait(timeout)
        return self._form

    def cancel(self) -> None:
        """Kill the child and drop the form; `failed` stays None."""
        with self._lock:
            self._cancelled = True
            self._form = None
            self._kill()

    def _run(self) -> None:
        start = time.monotonic()
        try:
            program = self._store.get(self._key)
            self.was_cached = program is not None
            if program is None:
                program = self._compile()
            if self._cancelled or _exiting:
                return
            form = self._prepared(program)
            self.seconds = time.monotonic() - start
            with self._lock:
                if self._cancelled:
                    return
                self._form = form
            self._log_end()
        except BaseException as error:
            # of any type: a thread cannot raise to a caller
            if not self._cancelled:
                self.failed = in_a_line(error)
                self._log(
                    f"{self._name}: compilation failed ({self.failed}); continuing without it"
                )
        finally:
            self._ended.set()

    def _prepared(self, program: bytes) -> T:
        _preparing.add(self)
        try:
            return self._prepare(program)
        except MemoryError:
            raise
        except BaseException:
            self._store.remove(self._key)
            raise
        finally:
            _preparing.discard(self)

    def _compile(self) -> bytes:
        """Return the program, from a child of this or another process. Raises RunFailed with the
        reason."""
        lock = CompileLock(self._store, self._key)
        try:
            try:
                program = self._acquire(lock)
            except (BadInput, OSError) as error:
                self._not_cached = write_failure(self._store, error)
                program = None
            return self._compile_here(lock.descriptor) if program is None else program
        finally:
            lock.release()

    def _acquire(self, lock: CompileLock) -> bytes | None:
        """Wait for the lock, or for the program of another process, which is returned."""
        deadline = time.monotonic() + self._timeout
        while not lock.acquire():
            if not self._other_process:
                self._other_process = True
                self._log(f"waiting for {self._name}, which another process compiles")
            if self._cancelled or _exiting:
                raise RunFailed("cancelled")
            if time.monotonic() >= deadline:
                break
            time.sleep(POLL_SECONDS)
        program = self._store.peek(self._key) if self._other_process else None
        self._other_process = program is not None
        return program

    def _compile_here(self, lock: int | None) -> bytes:
        """Return the program, from a child of this process, which inherits the lock."""
        if self._not_cached is not None:
            _uncached.add(self)
        self._log_start()
        # files, not pipes: a child can still write to them after its parent has ended
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
            status = self._run_child(out, errors, lock)
            if status != 0:
                raise RunFailed(exit_reason(status, errors))
            program = self._store.peek(self._key)
            if program is None:
                out.seek(0)
                try:
                    header, program = entry.read(out, self._key)
                except Damaged as error:
                    raise RunFailed("the compiler returned no program") from error
                reason = str(header.about.get(NOT_CACHED, "")) or None
                if self._not_cached is None:
                    self._store_failed = reason
            return program

    def _run_child(self, out: BinaryIO, errors: BinaryIO, lock: int | None) -> int:
        """Run the child; returns its exit status, or the negated signal that ended it."""
        destination = Destination(
            str(self._store.folder), self._store.limit_bytes, self._key, self._name, time.time()
        )
        with self._lock:
            if self._cancelled:
                raise RunFailed("cancelled")
            self._child = child = subprocess.Popen(
                [*self._command, str(destination)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                start_new_session=True,
                env=child_environment(),
                pass_fds=() if lock is None or os.name != "posix" else (lock,),
            )
        deadline = time.monotonic() + self._timeout
        while True:
            with self._lock:
                status = child.poll()
                if status is not None:
                    return status
                if time.monotonic() >= deadline:
                    self._kill()
                    break
            time.sleep(POLL_SECONDS)
        child.wait()
        raise RunFailed(f"the compiler took longer than {self._timeout:g} s")

    def _kill(self) -> None:
        """Kill the child and its own children; the caller holds the lock."""
        if self._child is None or self._child.poll() is not None:
            return
        if hasattr(os, "killpg"):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._child.pid, signal.SIGKILL)
        else:
            self._child.kill()

    def _log_start(self) -> None:
        """Log the start, with the time that the last compilation of this name took."""
        duration = ""
        for each in self._store.entries():
            seconds = each.about.get("seconds")
            if each.about.get("what") == self._name and isinstance(seconds, float | int):
                duration = f", about {max(1, round(seconds))} s"
                break
        if self._not_cached is not None:
            cached = f"; not cached ({self._not_cached})"
        else:
            cached = ", once"
        self._log(f"compiling {self._name} in the background{cached}{duration}")

    def _log_end(self) -> None:
        if self.was_cached:
            return
        suffix = f"; not cached ({self._store_failed})" if self._store_failed else ""
        by = " by another process" if self._other_process else ""
        self._log(f"{self._name}: compiled{by} in {self.seconds:.1f} s{suffix}")

    def _log(self, text: str) -> None:
        log_line(self._log_line, text)


def write_failure(store: Store, error: BadInput | OSError) -> str:
    """Return why the folder of a store cannot be written, in one line."""
    return str(error if isinstance(error, BadInput) else write_error(store.folder, error))


def exit_reason(status: int, errors: BinaryIO) -> str:
    """Return why a child failed: its signal, or its last line on standard error."""
    if status < 0:
        with suppress(ValueError):
            return f"ended by {signal.Signals(-status).name}"
        return f"ended by signal {-status}"
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - 16 * MAX_REASON_LENGTH))
    lines = errors.read().decode("utf-8", "replace").split("\n")
    last = next((text for line in reversed(lines) if (text := printable(line))), "")
    return last or f"exit status {status}"


def in_a_line(error: BaseException) -> str:
    """Return the first line of an error, with its type unless it is one of ours."""
    text = printable(str(error).strip().split("\n", 1)[0])
    if isinstance(error, OnelaunchError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def printable(line: str) -> str:
    """Return a line without control characters and repeated spaces, shortened."""
    text = "".join(letter if letter.isprintable() else " " for letter in line)
    return " ".join(text.split())[:MAX_REASON_LENGTH]
