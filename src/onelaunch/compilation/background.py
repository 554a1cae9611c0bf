"""Compile a faster form beside the one that serves, then swap.

The compiler runs in a child process, at low priority and in a session of its own: it takes neither
the interpreter's lock nor an interrupt meant for its parent, and it ends its work in the store
even where its parent ends first. A thread waits for it and makes the new form ready.
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
from onelaunch.compilation.child import NOT_KEPT, Destination
from onelaunch.compilation.entry import Damaged
from onelaunch.compilation.environment import child_environment
from onelaunch.compilation.lock import CompileLock
from onelaunch.errors import BadInput, OnelaunchError, RunFailed

T = TypeVar("T")

LOOK_SECONDS = 0.02
"""Between two looks whether the child has ended."""
REASON_LETTERS = 300
PREPARING_SECONDS = 5.0
"""How long a process that ends waits for a form that is being made ready."""

_speaking = threading.RLock()
_leaving = False
_not_kept: weakref.WeakSet[Compilation[Any]] = weakref.WeakSet()
"""Those whose program nobody will find: their children end with this process."""
_preparing: set[Compilation[Any]] = set()
"""Those that make a program ready now."""


def _fall_silent() -> None:
    """A thread that is stopped in the middle of a print can take the whole exit down with it."""
    global _leaving
    _leaving = True
    for compilation in list(_not_kept):
        compilation.cancel()
    # the interpreter ends a thread where it comes back from C++ code, and with it the process
    end = time.monotonic() + PREPARING_SECONDS
    for compilation in list(_preparing):
        compilation._ended.wait(max(0.0, end - time.monotonic()))
    # bounded: a reader of ours that is stuck must not keep the interpreter
    if _speaking.acquire(timeout=1.0):
        _speaking.release()


atexit.register(_fall_silent)


def tell(say: Callable[[str], None], text: str) -> None:
    """Say a line for people from a thread of the background; none when the process is leaving."""
    with _speaking:
        if not _leaving:
            # a broken terminal is no failure of the work
            with suppress(Exception):
                say(text)


class Compilation(Generic[T]):
    """One program being compiled, or loaded where the store has it, and made ready.

    It begins at once. `command` is a child's command line without its last argument, which is
    added here: its destination, for `onelaunch.compilation.child.deliver`. `prepare` turns the
    program into the new form, in the thread. `say` is called from the thread with lines for
    people that begin with or name `what`, as in "the fast form". A child that takes longer than
    `timeout` seconds is killed and has failed.

    Of several processes that want the same program of a store one compiles, and the others wait for
    it. Where the store cannot be written, each compiles for itself, and the first line that is
    said names the reason.

    A program that `prepare` refuses is taken out of the store: the next run compiles it anew.
    """

    def __init__(
        self,
        store: Store,
        key: str,
        command: Sequence[str],
        prepare: Callable[[bytes], T],
        say: Callable[[str], None],
        what: str,
        timeout: float = 300.0,
    ) -> None:
        self.failed: str | None = None
        """Why there will be no new form, in a line."""
        self.seconds: float | None = None
        """From the beginning until the new form was ready."""
        self.was_cached = False
        self._store = store
        self._key = key
        self._command = list(command)
        self._prepare = prepare
        self._say = say
        self._what = what
        self._timeout = timeout
        self._form: T | None = None
        self._by_another = False  # whether another process compiles it
        self._not_kept: str | None = None  # why it will not be, known from the beginning
        self._lost: str | None = None  # why it was not, known at the end
        self._cancelled = False
        self._child: subprocess.Popen[bytes] | None = None
        # held wherever the child is looked at: its id is its own only until it has been reaped
        self._lock = threading.Lock()
        self._ended = threading.Event()
        threading.Thread(target=self._run, name=f"compiling {what}", daemon=True).start()

    @property
    def ended(self) -> bool:
        """Whether all is done: ready, failed or cancelled."""
        return self._ended.is_set()

    def poll(self) -> T | None:
        """The new form once it is ready, else None; never waits."""
        return self._form

    def wait(self, timeout: float | None = None) -> T | None:
        """The new form, waiting for it up to `timeout` seconds; None where there is none then."""
        self._ended.wait(timeout)
        return self._form

    def cancel(self) -> None:
        """Kill the child and forget the form; `failed` stays None."""
        with self._lock:
            self._cancelled = True
            self._form = None
            self._kill()

    def _run(self) -> None:
        began = time.monotonic()
        try:
            program = self._store.get(self._key)
            self.was_cached = program is not None
            if program is None:
                program = self._compile()
            if self._cancelled or _leaving:
                return
            form = self._make_ready(program)
            self.seconds = time.monotonic() - began
            with self._lock:
                if self._cancelled:
                    return
                self._form = form
            self._tell_ready()
        except BaseException as error:
            # of any kind: a thread has nobody to raise to
            if not self._cancelled:
                self.failed = in_a_line(error)
                self._tell(f"{self._what}: compilation failed ({self.failed}); going on without it")
        finally:
            self._ended.set()

    def _make_ready(self, program: bytes) -> T:
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
        """The program, from a child of this process or of another. Raises RunFailed with the
        reason."""
        lock = CompileLock(self._store, self._key)
        try:
            try:
                program = self._await_turn(lock)
            except (BadInput, OSError) as error:
                self._not_kept = why_not_written(self._store, error)
                program = None
            return self._compile_here(lock.descriptor) if program is None else program
        finally:
            lock.release()

    def _await_turn(self, lock: CompileLock) -> bytes | None:
        """Wait until the lock is held, or for another process's program, which is returned."""
        deadline = time.monotonic() + self._timeout
        while not lock.acquire():
            if not self._by_another:
                self._by_another = True
                self._tell(f"waiting for {self._what}, which another process compiles")
            if self._cancelled or _leaving:
                raise RunFailed("cancelled")
            if time.monotonic() >= deadline:
                break
            time.sleep(LOOK_SECONDS)
        program = self._store.peek(self._key) if self._by_another else None
        self._by_another = program is not None
        return program

    def _compile_here(self, lock: int | None) -> bytes:
        """The program, from a child of this process, which inherits the lock."""
        if self._not_kept is not None:
            _not_kept.add(self)
        self._tell_beginning()
        # files, not pipes: a child whose parent has ended can still write to them
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
            status = self._run_child(out, errors, lock)
            if status != 0:
                raise RunFailed(why_ended(status, errors))
            program = self._store.peek(self._key)
            if program is None:
                out.seek(0)
                try:
                    header, program = entry.read(out, self._key)
                except Damaged as error:
                    raise RunFailed("it ended without a program") from error
                why = str(header.about.get(NOT_KEPT, "")) or None
                if self._not_kept is None:
                    self._lost = why
            return program

    def _run_child(self, out: BinaryIO, errors: BinaryIO, lock: int | None) -> int:
        """Start the child and wait for its exit status; negative: the signal that ended it."""
        to = Destination(
            str(self._store.folder), self._store.limit_bytes, self._key, self._what, time.time()
        )
        with self._lock:
            if self._cancelled:
                raise RunFailed("cancelled")
            self._child = child = subprocess.Popen(
                [*self._command, str(to)],
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
            time.sleep(LOOK_SECONDS)
        child.wait()
        raise RunFailed(f"it took longer than {self._timeout:g} s")

    def _kill(self) -> None:
        """End the child with all that it started; the lock is held."""
        if self._child is None or self._child.poll() is not None:
            return
        if hasattr(os, "killpg"):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._child.pid, signal.SIGKILL)
        else:
            self._child.kill()

    def _tell_beginning(self) -> None:
        """With the time that it last took a program of this name."""
        last = ""
        for each in self._store.entries():
            seconds = each.about.get("seconds")
            if each.about.get("what") == self._what and isinstance(seconds, float | int):
                last = f", about {max(1, round(seconds))} s"
                break
        if self._not_kept is not None:
            kept = f"; not kept for the next time ({self._not_kept})"
        else:
            kept = ", once"
        self._tell(f"compiling {self._what} in the background{kept}{last}")

    def _tell_ready(self) -> None:
        if self.was_cached:
            return
        but = f"; not kept for the next time ({self._lost})" if self._lost else ""
        by = " by another process" if self._by_another else ""
        self._tell(f"{self._what}: compiled{by} in {self.seconds:.1f} s{but}")

    def _tell(self, text: str) -> None:
        tell(self._say, text)


def why_not_written(store: Store, error: BadInput | OSError) -> str:
    """Why a store's folder cannot be written, in a line."""
    return str(error if isinstance(error, BadInput) else write_error(store.folder, error))


def why_ended(status: int, errors: BinaryIO) -> str:
    """Why a child failed: its signal, or the last line it wrote on standard error."""
    if status < 0:
        with suppress(ValueError):
            return f"ended by {signal.Signals(-status).name}"
        return f"ended by signal {-status}"
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - 16 * REASON_LETTERS))
    lines = errors.read().decode("utf-8", "replace").split("\n")
    last = next((text for line in reversed(lines) if (text := plain(line))), "")
    return last or f"exit status {status}"


def in_a_line(error: BaseException) -> str:
    """An error's first line, with its type where that says more."""
    text = plain(str(error).strip().split("\n", 1)[0])
    if isinstance(error, OnelaunchError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def plain(line: str) -> str:
    """One line that a terminal shows as it is."""
    shown = "".join(letter if letter.isprintable() else " " for letter in line)
    return " ".join(shown.split())[:REASON_LETTERS]
