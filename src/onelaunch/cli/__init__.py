"""The command line: one file per verb, one line per error."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from onelaunch.errors import OnelaunchError


def main(argv: Sequence[str] | None = None) -> None:
    """Run a verb and exit: 0 done, 1 a run failed, 2 bad input, 128+n ended by signal n."""
    sys.exit(run(sys.argv[1:] if argv is None else list(argv)))


def run(argv: list[str]) -> int:
    """Run a verb; returns the exit code."""
    import typer

    from onelaunch.cli import common
    from onelaunch.cli.app import app

    usage_errors = tuple(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
    common.debug = False
    try:
        command = typer.main.get_command(app)
        outcome = command.main(args=argv, prog_name="onelaunch", standalone_mode=False)
        sys.stdout.flush()
        return outcome if isinstance(outcome, int) else 0
    except OnelaunchError as error:
        return _fail(str(error), error.exit_code, error)
    except usage_errors as error:
        return _fail(f"{error.format_message()} (see: onelaunch --help)", 2, error)  # type: ignore
    except BrokenPipeError:
        # The reader of our standard output left, as `head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", 2, error)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except MemoryError as error:
        return _fail("not enough memory", 1, error)


def _fail(message: str, code: int, error: BaseException) -> int:
    from onelaunch.cli import common

    if common.debug:
        raise error
    print(f"onelaunch: {' '.join(message.split())}", file=sys.stderr)
    return code
