"""The package's own errors. The command line prints each as one line and exits with its code.

A message names an argument as Python does, `threads=0`; the command line prints the option of that
name in its place, `--threads 0`.
"""


class OnelaunchError(Exception):
    """Something the user can mend. The message says which file or argument is wrong, how, and what
    to do."""

    exit_code = 2
    elsewhere = False
    """Whether another process of the same run prints it."""


class BadInput(OnelaunchError, ValueError):
    """A file, argument, recipe or text that cannot be used."""


class ModelNotFound(BadInput):
    """There is no file or folder of a model's name."""


class RunFailed(OnelaunchError):
    """The input was good, the run was not."""

    exit_code = 1


class EngineTimeout(RunFailed):
    """A part of a model's work was not finished in time. The message names the stage."""


class Terminated(BaseException):
    """A signal that ends the process now, through every `finally`: no half-made file stays."""

    def __init__(self, number: int) -> None:
        self.number = number


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed. PyTorch raises RuntimeError where one on a CPU does, and a kind
    of it on a GPU."""
    text = str(error)
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(word in text for word in words)
    )


class MissingExtra(OnelaunchError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package}, which is not installed; "
            f"install it with: pip install 'onelaunch[{extra}]'"
        )
