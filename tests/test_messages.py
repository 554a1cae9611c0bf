"""Errors speak of Python arguments: options are the command line's, which puts their names in."""

import ast
import re
from pathlib import Path

import onelaunch

SOURCE = Path(onelaunch.__file__).parent
# Where the command line itself speaks, and experiments, which it alone runs.
OF_THE_COMMAND_LINE = ("cli", "bench")
# A command to be typed is quoted in backticks, or is another program's.
QUOTED = re.compile(r"`[^`]*`|export\.py --version 0")
OPTION = re.compile(r"(?:^|\s)--[a-z][a-z-]+")


def texts(path: Path):
    """(line, text) of a file's string literals that are prose, without docstrings."""
    tree = ast.parse(path.read_text("utf-8"))
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        pieces = node.values if isinstance(node, ast.JoinedStr) else [node]
        constants = [p for p in pieces if isinstance(p, ast.Constant) and isinstance(p.value, str)]
        text = "{}".join(p.value for p in constants)
        if constants and id(node) not in docs and " " in text.strip():
            yield node.lineno, text


def test_no_message_of_the_library_names_an_option():
    seen = 0
    found = []
    for path in SOURCE.rglob("*.py"):
        if path.relative_to(SOURCE).parts[0] in OF_THE_COMMAND_LINE:
            continue
        for line, text in texts(path):
            seen += 1
            if OPTION.search(QUOTED.sub("", text)):
                found.append(f"{path.relative_to(SOURCE)}:{line}: {text}")
    assert seen > 300
    assert not found, "\n".join(found)
