"""The command line: one file per command, one line per error."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence

from onelaunch.cli.arguments import with_options
from onelaunch.errors import OnelaunchError, Terminated, is_out_of_memory


def main(argv: Sequence[str] | None = None) -> None:
    """Run a verb and exit: 0 done, 1 a run failed, 2 bad input, 128+n ended by signal n."""
    try:
        code = run(sys.argv[1:] if argv is None else list(argv))
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def run(argv: list[str]) -> int:
    """Run a verb; returns the exit code."""
    import typer

    from onelaunch.cli import common
    from onelaunch.cli.app import app

    usage_errors: tuple[type[Exception], ...] = tuple(
        kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
    )
    common.debug = False
    _mend_standard_streams()
    command = typer.main.get_command(app)
    verbs = getattr(command, "commands", {})
    verb = next((word for word in argv if not word.startswith("-")), "")
    try:
        try:
            # `command.main` would turn a broken pipe and an interrupt into its own exits.
            with (
                _signals_unwind(),
                command.make_context("onelaunch", argv or ["--help"]) as context,
            ):
                outcome = command.invoke(context)
        except typer.Exit as leaving:
            outcome = leaving.exit_code
        sys.stdout.flush()
        return outcome if isinstance(outcome, int) else 0
    except OnelaunchError as error:
        params = verbs[verb].params if verb in verbs else []
        options = {name for param in params for name in param.opts}
        return _fail(with_options(str(error), options, argv), error.exit_code, error)
    except usage_errors as error:
        topic = f"onelaunch {verb}" if verb in verbs else "onelaunch"
        message = error.format_message().rstrip(".")  # type: ignore[attr-defined]
        if verb == "train" and os.environ.get("RANK", "0") != "0":
            return 2  # of several processes with the same words, the first prints it
        return _fail(f"{message} (see: {topic} --help)", 2, error)
    except BrokenPipeError:
        # The reader of our standard output left, as `head` does.
        _flush_or_discard_standard_output()
        return 0
    except OSError as error:
        _flush_or_discard_standard_output()
        where = f"{error.filename}: " if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return _fail(f"{where}{error.strerror or error}", 1 if full else 2, error)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Terminated as terminated:
        return 128 + terminated.number
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _fail("not enough memory; take a smaller model, or another device", 1, error)


@contextlib.contextmanager
def _signals_unwind() -> Iterator[None]:
    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, _raise_terminated)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise_terminated(number: int, frame: object) -> None:
    raise Terminated(number)


def _mend_standard_streams() -> None:
    """Never fail for a character that the terminal cannot show, or for a stream that is closed."""
    # Python has None for a closed one; a file opened later would take its place.
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def _flush_or_discard_standard_output() -> None:
    """Write what is buffered. Where it cannot be written Python would complain at exit: drop it."""
    with contextlib.suppress(OSError, ValueError):
        try:
            sys.stdout.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)


def _fail(message: str, code: int, error: BaseException) -> int:
    from onelaunch.cli import common

    if getattr(error, "elsewhere", False):
        return code  # another process of the run prints it
    if common.debug:
        traceback.print_exception(error)
    else:
        print(f"onelaunch: {' '.join(message.split())}", file=sys.stderr)
    return code
