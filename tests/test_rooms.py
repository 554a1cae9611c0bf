"""The rooms of the house: imports point down, form no circle, and take no private name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import onelaunch

SRC = Path(onelaunch.__file__).parent
# From the top down. A room imports rooms below its own, and some beside it.
LEVELS = (
    ("cli",),
    ("bench",),
    ("api",),
    ("training", "generation"),
    ("engines",),
    ("operators", "plan", "compilation"),
    ("model", "checkpoints"),
    ("config", "errors"),
)
BESIDE = {("checkpoints", "model"), ("config", "errors")}
BENCH_LEVELS = (("everything", "report"), ("engines", "studies"), ("core",), ("peers",))
EVERYWHERE_IN_BENCH = "experiments"  # the registry: names alone
ENGINES = ("cpu", "cuda", "coreml")


@dataclass(frozen=True)
class Import:
    """`name` is imported from module `source` in `importer`, within functions too."""

    importer: str
    line: int
    source: str
    name: str

    def __str__(self) -> str:
        return f"{self.importer}, line {self.line}: {self.name} from {self.source}"


@cache
def modules() -> dict[str, Path]:
    found = {}
    for path in SRC.rglob("*.py"):
        parts = ("onelaunch", *path.relative_to(SRC).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


@cache
def imports() -> tuple[Import, ...]:
    return tuple(one for name, path in modules().items() for one in _imports_of(name, path))


def _imports_of(importer: str, path: Path) -> Iterator[Import]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{importer}, line {node.lineno}: a relative import"
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                source = module if module in modules() else node.module
                yield Import(importer, node.lineno, source, alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(importer, node.lineno, alias.name, alias.name)


def own() -> list[Import]:
    return [one for one in imports() if one.source.split(".")[0] == "onelaunch"]


def place(module: str, depth: int) -> str:
    parts = module.split(".")
    return parts[depth] if len(parts) > depth else ""


def level(name: str, levels: tuple[tuple[str, ...], ...]) -> int | None:
    return next((i for i, rooms in enumerate(levels) if name in rooms), None)


def test_every_file_has_a_room():
    rooms = {place(name, 1) for name in modules()} - {"", "__main__"}
    assert rooms == {room for rooms in LEVELS for room in rooms}
    in_bench = {place(name, 2) for name in modules() if place(name, 1) == "bench"} - {""}
    assert in_bench == {room for rooms in BENCH_LEVELS for room in rooms} | {EVERYWHERE_IN_BENCH}


def test_rooms_import_what_is_below_them():
    wrong = []
    for one in own():
        mine, its = place(one.importer, 1), place(one.source, 1)
        if mine in ("", "__main__") or not its or mine == its or (mine, its) in BESIDE:
            continue
        if level(mine, LEVELS) >= level(its, LEVELS):
            wrong.append(str(one))
    assert not wrong


def test_rooms_of_bench_import_what_is_below_them():
    wrong = []
    for one in own():
        if place(one.importer, 1) != "bench" or place(one.source, 1) != "bench":
            continue
        mine, its = place(one.importer, 2), place(one.source, 2)
        if "" in (mine, its) or mine == its or its == EVERYWHERE_IN_BENCH:
            continue
        if level(mine, BENCH_LEVELS) >= level(its, BENCH_LEVELS):
            wrong.append(str(one))
    assert not wrong


def test_imports_form_no_circle():
    """But through the root, which holds the version and names all else lazily."""
    below = {name: set() for name in modules() if name != "onelaunch"}
    for one in own():
        if {one.source, one.importer} <= below.keys() and one.source != one.importer:
            below[one.importer].add(one.source)
    while free := {name for name, sources in below.items() if not sources}:
        for name in free:
            del below[name]
        for sources in below.values():
            sources -= free
    assert not below, "in a circle, or above one"


def test_no_engine_imports_another():
    for one in own():
        if one.importer.startswith("onelaunch.engines.") and place(one.importer, 2) in ENGINES:
            its = place(one.source, 2) if place(one.source, 1) == "engines" else ""
            assert its not in ENGINES or its == place(one.importer, 2), str(one)


def test_no_private_name_leaves_its_module():
    wrong = [
        str(one)
        for one in own()
        if one.name.startswith("_") and not one.name.startswith("__") and one.source != one.importer
    ]
    assert not wrong


@pytest.mark.parametrize("room", ["plan", "config", "errors"])
def test_what_is_pure_imports_no_torch(room):
    for one in imports():
        if place(one.importer, 1) == room:
            assert one.source.split(".")[0] not in ("torch", "triton", "numba"), str(one)


def test_operators_know_no_model():
    for one in own():
        if place(one.importer, 1) == "operators":
            assert place(one.source, 1) in ("operators", "errors"), str(one)
