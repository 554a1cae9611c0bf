"""`onelaunch inspect`: what a model or a saved program is, without running it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from onelaunch.cli.common import Debug, Json, batch_shape, load_model, log
from onelaunch.errors import BadInput

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|PROGRAM",
            help="A .bin or .gguf file, a Hugging Face folder, a run folder, or a preset with "
            "--random; or a Core ML program, an .mlpackage.",
        ),
    ],
    random: Annotated[
        bool, typer.Option("--random", help="MODEL is a preset; random weights, for speed only.")
    ] = False,
    fusion_depth: Annotated[
        str | None,
        typer.Option(
            "--fusion-depth",
            metavar="D",
            help="List the launches at this depth: stage, half, a number of layers, or all.",
        ),
    ] = None,
    training: Annotated[
        str | None,
        typer.Option(
            "--training",
            metavar="BxS",
            help="What a training step of B sequences of S tokens takes on a GPU, in bfloat16, "
            "such as 64x256.",
        ),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a model or a Core ML program is.

    Of a model its configuration and size, what running or training it takes, by batch and sequence
    the fusion depths chosen for it on a GPU, and how its weights are prefetched on a CPU. Of a Core
    ML program inputs, outputs, operations, and what would keep it off the Neural Engine.
    """
    import json as json_module
    from pathlib import Path

    from onelaunch.config import FAMILY_FIELDS
    from onelaunch.engines import inspection
    from onelaunch.engines.coreml.package import is_package

    if not random and is_package(Path(model)):
        if fusion_depth is not None:
            raise BadInput(
                f"--fusion-depth {fusion_depth}: {model} is a program, of a depth already"
            )
        if training is not None:
            raise BadInput(f"--training {training}: {model} is a program, which does not train")
        _inspect_program(Path(model), json)
        return
    shape = None if training is None else batch_shape(training)
    loaded = load_model(model, random)
    facts = {"model": model, **inspection.inspect(loaded, fusion_depth, shape)}
    if facts["tokenizer_error"] is not None:
        log(f"the tokenizer cannot be used: {facts['tokenizer_error']}")
    if json:
        print(json_module.dumps(facts))
        return
    plan, choices, prefetch, config = map(facts.pop, ("plan", "choices", "prefetch", "config"))
    if facts.pop("tokenizer_error") is not None:
        facts["tokenizer"] = "cannot be used"
    elif facts["tokenizer"] is not None:
        facts["tokenizer"] = "{kind}, {vocab_size:,} tokens".format(**facts["tokenizer"])
    for name in FAMILY_FIELDS:
        if not any(each.startswith(f"{name}=") for each in loaded.config.extensions):
            del config[name]  # as in Llama
    width = max(map(len, [*facts, *config]))
    for name, value in [*facts.items(), *config.items()]:
        print(f"{name.replace('_', ' '):<{width}}  {_shown(value)}")
    lines = *_plan_lines(plan), *_choice_lines(choices), *_prefetch_lines(prefetch)
    _print_lines(lines, width)


def _training_lines(training: dict[str, Any]) -> Iterator[tuple[str, str]]:
    tokens = training["batch"] * training["sequence"]
    kept = sum(training["kept"].values())
    yield (
        "training",
        f"{training['batch']} x {training['sequence']} tokens: {training['flops']:,} operations, "
        f"{training['flops'] // tokens:,} a token",
    )
    for line in training["kinds"]:
        yield (
            line["phase"],
            f"{line['count']} x {line['kind'].replace('_', ' ')}: {line['bytes']:,} bytes, "
            f"{line['flops']:,} operations",
        )
    parts = ", ".join(f"{name.replace('_', ' ')} {n:,}" for name, n in training["kept"].items())
    yield (
        "kept",
        f"{training['saved_bytes']:,} bytes for the backward; of a layer {kept:,}: {parts}",
    )
    fewer = training["saved_bytes_by_recompute"]
    yield (
        "computed again",
        f"nothing; what the SwiGLU gives, where memory asks: {fewer['hidden']:,} bytes are kept "
        f"then; or layers from their inputs: {fewer['layers']:,}",
    )
    yield "logits", f"{training['logits_bytes']:,} bytes of them at once"
    yield (
        "state",
        f"{training['state_bytes']:,} bytes of weights, in float32 and rounded, gradients and two "
        "moments",
    )


def _inspect_program(path: Path, json: bool) -> None:
    import json as json_module

    from onelaunch.engines.coreml.describe import describe, lines
    from onelaunch.engines.coreml.package import Package

    described = describe(Package(path))
    if json:
        print(json_module.dumps(described))
        return
    shown = list(lines(described))
    _print_lines(shown, max(len(name) for name, _ in shown))


def _print_lines(lines: Iterable[tuple[str, str]], width: int) -> None:
    for name, text in lines:
        print(f"{name:<{width}}  {text}")


def _plan_lines(plan: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    if plan is None:
        yield "plan", "none: only the reference engine (PyTorch) runs this model"
        return
    for forward in plan["forwards"]:
        totals, tokens = forward["totals"], forward["sequence"]
        activations = totals["activation_bytes_read"] + totals["activation_bytes_written"]
        cache = totals["cache_bytes_read"] + totals["cache_bytes_written"]
        yield (
            "1 token" if tokens == 1 else f"{tokens} tokens",
            f"{totals['weight_bytes']:,} bytes of weights, {activations:,} of activations, "
            f"{cache:,} of cache, {totals['flops']:,} operations",
        )
    counts = (f"{_depth_name(depth)} {count}" for depth, count in plan["launches"].items())
    yield "launches", ", ".join(counts)
    if "training" in plan:
        yield from _training_lines(plan["training"])
    for index, launch in enumerate(plan["forwards"][0].get("launches", ())):
        stages = launch["last"] - launch["first"]
        yield (
            f"launch {index}",
            f"{launch['name']}, {stages} {'stage' if stages == 1 else 'stages'}, "
            f"{launch['weight_bytes']:,} bytes of weights",
        )


def _choice_lines(choices: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for choice in choices:
        of, us = choice["of"], choice["us"]
        others = ", ".join(f"{form} {us[form]:.1f}" for form in us if form != choice["form"])
        yield (
            f"{of['batch']}x{of['sequence']}",
            f"{choice['form']}, {us[choice['form']]:.1f} us ({others}), in {of['dtype']} on "
            f"{of['device']}, measured {choice['measured'][:10]}",
        )


def _prefetch_lines(choices: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for each in choices:
        threads = f"{each['threads']} thread{'s' * (each['threads'] > 1)}"
        gain = "" if each["prefetch"] == "none" else f", {each['gain']:.2f} times as fast as none"
        yield (
            "prefetch",
            f"{each['prefetch']}{gain}, {threads} in {each['dtype']} on {each['processor']}, "
            f"measured {each['measured'][:10]}",
        )


def _depth_name(depth: str) -> str:
    if depth.isdecimal():
        return "1 layer:" if depth == "1" else f"{depth} layers:"
    return f"{depth}:"


def _shown(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{k.replace('_', ' ')} {_shown(each)}" for k, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
