"""Messages that name Python arguments, for people who gave options."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Sequence

# Options whose name is not that of the argument.
OPTIONS = {"sequence": "seq", "ids_only": "ids"}
_ARGUMENT = re.compile(
    r"""(?<![\w.])([a-z][a-z_]*)=('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[\w.+-]*\w)"""
)


def with_options(message: str, options: Collection[str], argv: Sequence[str]) -> str:
    """The message with `--some-name value` for each `some_name=value` that is one of a verb's
    options. What is wrong comes first in a message: it may be from a recipe, and is called an
    option where it was given as one."""

    def option(match: re.Match[str]) -> str:
        name = "--" + OPTIONS.get(match[1], match[1]).replace("_", "-")
        is_option = any(word == name or word.startswith(f"{name}=") for word in argv)
        if name not in options or (match.start() == 0 and not is_option):
            return match[0]
        return name if match[2] == "True" else f"{name} {_shown(match[2])}"

    return _ARGUMENT.sub(option, message)


def _shown(value: str) -> str:
    """A value as typed, without quotes where none are needed."""
    if value[0] not in "'\"":
        return value
    text = str(ast.literal_eval(value))
    return text if text and not re.search(r"\s", text) else value
