"""Checks of a plan: order of reads and writes, buffer sizes, weights, stage order, launches.

The stages of a valid plan form a chain: each reads what the previous one wrote. So two swapped
stages, a missing one and a repeated one all show as a wrong version of a buffer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from onelaunch.plan.build import activation_shapes
from onelaunch.plan.kinds import LAYER_KINDS, NO_LAYER, STAGE_KINDS, buffers_of
from onelaunch.plan.launches import Launch
from onelaunch.plan.stages import Buffer, Plan, Stage


class PlanError(AssertionError):
    """A plan that cannot run: a bug in this package, not an error of the user."""


def check(plan: Plan) -> None:
    """Raise PlanError, naming the stage and the buffer or weight, unless the plan can run."""
    buffers = _check_buffers(plan)
    _check_values(plan, buffers)
    _check_order(plan)
    _check_access(plan)
    _check_sizes(plan, buffers)
    _check_weights(plan)


def check_launches(plan: Plan, launches: Sequence[Launch]) -> None:
    """Raise PlanError unless the launches hold every stage exactly once, in order."""
    next_stage = 0
    for launch in launches:
        if launch.first != next_stage or launch.last <= launch.first:
            raise PlanError(
                f"launch {launch.name!r} holds stages {launch.first} to {launch.last}; "
                f"it must begin at stage {next_stage}"
            )
        next_stage = launch.last
    if next_stage != len(plan.stages):
        raise PlanError(f"the launches hold {next_stage} of {len(plan.stages)} stages")
    if len({launch.name for launch in launches}) != len(launches):
        raise PlanError("two launches have the same name")


def _check_buffers(plan: Plan) -> dict[str, Buffer]:
    """Check that buffer names are unique and that shapes follow from the model."""
    buffers = {buffer.name: buffer for buffer in plan.buffers}
    if len(buffers) != len(plan.buffers):
        raise PlanError("two buffers have the same name")
    batch, sequence, vocabulary = plan.batch, plan.sequence, plan.config.vocab_size
    shapes = {name: {shape} for name, shape in _activation_shapes(plan).items()}
    shapes["tokens"] = {(batch, sequence)}
    shapes["logits"] = {(batch, positions, vocabulary) for positions in (1, sequence)}
    shapes["next"] = {(batch,)}
    for name, buffer in buffers.items():
        if name in shapes and buffer.shape not in shapes[name]:
            expected = " or ".join(map(str, sorted(shapes[name])))
            raise PlanError(f"buffer {name} has shape {buffer.shape}, not {expected}")
    return buffers


def _activation_shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    return activation_shapes(plan.config, plan.batch, plan.sequence, plan.past)


def _check_values(plan: Plan, buffers: dict[str, Buffer]) -> None:
    """Check that every version is written once and read before the next one replaces it."""
    current = dict.fromkeys(buffers, 0)
    written = {name: buffer.live_in for name, buffer in buffers.items()}
    read = dict.fromkeys(buffers, False)
    for index, stage in enumerate(plan.stages):
        where = _where(index, stage)
        for name, version, _ in stage.reads:
            if name not in buffers:
                raise PlanError(f"{where} reads {name}, which is not a buffer of the plan")
            if version > current[name] or (version == 0 and not buffers[name].live_in):
                raise PlanError(f"{where} reads {name} version {version}, which is not written yet")
            if version < current[name]:
                raise PlanError(
                    f"{where} reads {name} version {version}, "
                    f"which version {current[name]} has replaced"
                )
            read[name] = True
        for name, version, _ in stage.writes:
            if name not in buffers:
                raise PlanError(f"{where} writes {name}, which is not a buffer of the plan")
            if buffers[name].role == "input":
                raise PlanError(f"{where} writes {name}, which is an input")
            if version != current[name] + 1:
                raise PlanError(
                    f"{where} writes {name} version {version} after version {current[name]}"
                )
            if current[name] and not read[name]:
                raise PlanError(f"{where} overwrites {name}, which nothing has read")
            current[name], read[name], written[name] = version, False, True
    for name, buffer in buffers.items():
        if not written[name]:
            raise PlanError(f"buffer {name} is never written")
        if not read[name] and buffer.role != "output":
            raise PlanError(f"buffer {name}: version {current[name]} is never read")


def _check_access(plan: Plan) -> None:
    """Check that each stage reads and writes the buffers that its kind names, each once."""
    model_buffers = set(_activation_shapes(plan)) | {"tokens", "logits", "next"}
    for index, stage in enumerate(plan.stages):
        kind = STAGE_KINDS[stage.kind]
        sides = (("reads", stage.reads, kind.reads), ("writes", stage.writes, kind.writes))
        for verb, accesses, values in sides:
            actual = [access.buffer for access in accesses if access.buffer in model_buffers]
            expected = sorted(buffers_of(values, stage.layer))
            if sorted(actual) != expected:
                raise PlanError(
                    f"{_where(index, stage)} {verb} {' and '.join(actual) or 'nothing'}, "
                    f"not {' and '.join(expected)}"
                )


def _check_sizes(plan: Plan, buffers: dict[str, Buffer]) -> None:
    """Check that a write fills its buffer (in a cache: the new positions) and a read fits in it."""
    for index, stage in enumerate(plan.stages):
        for name, _, nbytes in stage.reads:
            if not 1 <= nbytes <= buffers[name].nbytes:
                raise PlanError(
                    f"{_where(index, stage)} reads {nbytes} bytes of {name}, "
                    f"which has {buffers[name].nbytes}"
                )
        for name, _, nbytes in stage.writes:
            expected = buffers[name].nbytes
            if buffers[name].role == "state":
                expected = expected // (plan.past + plan.sequence) * plan.sequence
            if nbytes != expected:
                raise PlanError(
                    f"{_where(index, stage)} writes {nbytes} bytes of {name}, not {expected}"
                )


def _check_weights(plan: Plan) -> None:
    """Check that one stage of its layer reads each weight; embed and head read a tied embedding."""
    shapes = plan.config.weight_shapes()
    readers: dict[str, list[str]] = {name: [] for name in shapes}
    for index, stage in enumerate(plan.stages):
        where = _where(index, stage)
        for name in stage.weights:
            if name not in shapes:
                raise PlanError(f"{where} reads {name}, which is not a weight of the model")
            layer = int(name.split(".")[1]) if name.startswith("layers.") else NO_LAYER
            if layer != stage.layer:
                raise PlanError(f"{where} reads {name}, which is of another layer")
            readers[name].append(stage.kind)
        elements = sum(math.prod(shapes[name]) for name in stage.weights)
        if stage.kind == "embed":
            elements = plan.batch * plan.sequence * plan.config.dim
        if stage.weight_bytes != elements * plan.weight_itemsize:
            raise PlanError(
                f"{where} reads {stage.weight_bytes} bytes of weights, "
                f"not {elements * plan.weight_itemsize}"
            )
    for name, kinds in readers.items():
        tied = name == "embed_tokens.weight" and plan.config.tied_embeddings
        if len(kinds) != 1 + tied or (tied and kinds != ["embed", "head"]):
            raise PlanError(f"the weight {name} is read by {' and '.join(kinds) or 'no stage'}")


def _check_order(plan: Plan) -> None:
    """Check the order: embed, the kinds of each layer, head, and sample if the plan has it."""
    expected = [("embed", NO_LAYER)]
    expected += [(kind, layer) for layer in range(plan.config.n_layers) for kind in LAYER_KINDS]
    expected += [("head", NO_LAYER)]
    if any(buffer.name == "next" for buffer in plan.buffers):
        expected += [("sample", NO_LAYER)]
    for index, (stage, (kind, layer)) in enumerate(zip(plan.stages, expected, strict=False)):
        if (stage.kind, stage.layer) != (kind, layer):
            label = kind if layer == NO_LAYER else f"layer {layer} {kind}"
            raise PlanError(f"{_where(index, stage)} is out of order: expected {label}")
    if len(plan.stages) != len(expected):
        raise PlanError(f"the plan has {len(plan.stages)} stages, not {len(expected)}")


def _where(index: int, stage: Stage) -> str:
    return f"stage {index} ({stage.label})"
