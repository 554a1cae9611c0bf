"""A saved program as plain data and as lines: its inputs and outputs, what it is made of, what
would keep it off the Neural Engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from onelaunch.engines.coreml.lint import Finding, lint
from onelaunch.engines.coreml.package import Constant, Function, Package, Stored, Type


def describe(package: Package) -> dict[str, Any]:
    """Functions, bytes and findings. Raises BadInput for damaged weights."""
    return {
        "program": str(package.path),
        "specification_version": package.version,
        "weight_bytes": package.weight_file_bytes,
        "file_bytes": package.n_bytes,
        "functions": {name: _function(each) for name, each in package.functions.items()},
        "findings": [asdict(finding) for finding in lint(package)],
    }


def _function(function: Function) -> dict[str, Any]:
    counts = Counter(operation.kind for operation in function.operations)
    outputs = {
        name: function.types[name] if name in function.types else _type(function.constants[name])
        for name in function.outputs
    }
    return {
        "inputs": {name: _plain(kind) for name, kind in function.inputs.items()},
        "states": {name: _plain(kind) for name, kind in function.states.items()},
        "outputs": {name: _plain(kind) for name, kind in outputs.items()},
        "operations": dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
        "constants": len(function.constants),
    }


def _type(constant: Constant) -> Type:
    if isinstance(constant, Stored):
        return constant.type
    return (
        Type("string") if isinstance(constant, str) else Type(str(constant.dtype), constant.shape)
    )


def _plain(kind: Type) -> dict[str, Any]:
    return {"dtype": kind.dtype, "shape": list(kind.shape)}


def lines(described: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What `describe` returns, a name and a text for each line."""
    yield "program", described["program"]
    yield "specification version", str(described["specification_version"])
    yield "weight bytes", f"{described['weight_bytes']:,}"
    yield "file bytes", f"{described['file_bytes']:,}"
    for name, function in described["functions"].items():
        if len(described["functions"]) > 1:
            yield "function", name
        for role in ("input", "state", "output"):
            for value, kind in function[f"{role}s"].items():
                yield role, f"{value}, {Type(kind['dtype'], tuple(kind['shape']))}"
        counts = function["operations"]
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in counts.items())
        yield "operations", f"{sum(counts.values()):,}: {kinds}"
        yield "constants", f"{function['constants']:,}"
    for finding in described["findings"]:
        severity, _, text = str(Finding(**finding)).partition(": ")
        yield severity, text
    if not described["findings"]:
        yield "findings", "none: nothing here is known to keep it off the Neural Engine"
