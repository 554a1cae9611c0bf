"""`onelaunch doctor`: what is here, what will run where, and why not elsewhere."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from onelaunch.cli.common import Debug, Json


def doctor(
    clear_cache: Annotated[
        bool, typer.Option("--clear-cache", help="Remove all compiled programs, and end there.")
    ] = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Show what is installed here, and what will run where."""
    from onelaunch.engines import installed

    if clear_cache:
        gone = installed.clear_cache()
        text = f"{gone['folder']}: {_programs(gone)} removed"
        print(json.dumps(gone, indent=2) if json_ else text)
        return
    facts = installed.examine()
    print(json.dumps(facts, indent=2) if json_ else _page(facts))


def _page(facts: dict[str, Any]) -> str:
    """The facts as aligned lines."""
    versions, cpu, cuda, mps = (facts[key] for key in ("versions", "cpu", "cuda", "mps"))
    rows = [(name, version or "not installed") for name, version in versions.items()]
    rows.append(("platform", facts["platform"]))
    cores = f"{cpu['usable_cores']} of {cpu['cores']} cores usable"
    rows.append(
        ("cpu", f"{cpu['model']}, {cores}, {cpu['torch_threads']} threads, {cpu['capability']}")
    )
    rows.append(("memory", _gib(cpu["memory_bytes"])))
    for index, gpu in enumerate(cuda["devices"]):
        rows.append(
            (
                f"cuda:{index}",
                f"{gpu['name']}, capability {gpu['capability']}, {_gib(gpu['memory_bytes'])}, "
                f"{gpu['multiprocessors']} multiprocessors",
            )
        )
    if cuda["missing"]:
        rows.append(("cuda", f"no: {cuda['missing']}"))
    rows.append(("mps", "yes, with --device mps" if mps["available"] else f"no: {mps['missing']}"))
    cache = facts["cache"]
    state = f"{cache['folder']}: {_programs(cache)} of at most {_gib(cache['limit_bytes'])}"
    if cache["unusable"]:
        state = f"not used: {cache['unusable']}"
    rows.append(("cache", state))
    for extra, missing in facts["extras"].items():
        state = "installed"
        if missing:
            state = f"without {', '.join(missing)}; pip install 'onelaunch[{extra}]'"
        rows.append((f"extra {extra}", state))
    auto, compiled = facts["engines"]["auto"], facts["engines"]["cpu"]
    rows.append(
        (
            "engine",
            f"{auto['engine']}, generating on {auto['device']} in {auto['dtype']} "
            "unless --engine, --device and --dtype say otherwise",
        )
    )
    if compiled["missing"]:
        rows.append(("engine cpu", f"no: {compiled['missing']}"))
    else:
        there = {True: "compiled", False: "compiled at its first use"}
        state = f"generation {there[compiled['compiled']]}, "
        state += f"training {there[compiled['compiled_training']]}"
        processor = f"{compiled['processor']}, vectors of {compiled['vector_bits']} bits"
        rows.append(("engine cpu", f"for {processor}: {state}; prefetch {_prefetch(compiled)}"))
    gpu = facts["engines"]["cuda"]
    state = f"logits and generation in few launches; tuned for {gpu['choices']} shapes so far"
    rows.append(("engine cuda", f"no: {gpu['missing']}" if gpu["missing"] else state))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _prefetch(compiled: dict[str, Any]) -> str:
    if compiled["prefetch"] != "auto":
        return f"{compiled['prefetch']} (ONELAUNCH_PREFETCH)"
    n = compiled["prefetch_choices"]
    return f"measured for {n} shape{'' if n == 1 else 's'} of models so far"


def _programs(counted: dict[str, Any]) -> str:
    plural = "" if counted["programs"] == 1 else "s"
    return f"{counted['programs']} compiled program{plural}, {counted['bytes'] / 1e6:.1f} MB"


def _gib(n: int | None) -> str:
    return "unknown" if n is None else f"{n / 2**30:.1f} GiB"
