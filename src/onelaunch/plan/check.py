"""Where a plan is wrong: values read too early or too late, sizes, weights, order, launches.

The stages of a right plan are a chain, each reading what the one before it wrote. So no two of
them can change places, none can be missing and none can come twice: the values alone show it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from onelaunch.plan.build import activation_shapes
from onelaunch.plan.kinds import LAYER_KINDS, NO_LAYER, STAGE_KINDS, buffers_of
from onelaunch.plan.launches import Launch
from onelaunch.plan.stages import Buffer, Plan, Stage


class PlanError(AssertionError):
    """A plan that cannot run: a defect of this package, which no user can mend."""


def check(plan: Plan) -> None:
    """Raise PlanError, naming stage and buffer or weight, unless the plan can run as it is."""
    buffers = _check_buffers(plan)
    _check_values(plan, buffers)
    _check_order(plan)
    _check_access(plan)
    _check_sizes(plan, buffers)
    _check_weights(plan)


def check_launches(plan: Plan, launches: Sequence[Launch]) -> None:
    """Raise PlanError unless the launches hold every stage exactly once, in order."""
    at = 0
    for launch in launches:
        if launch.first != at or launch.last <= launch.first:
            raise PlanError(
                f"launch {launch.name!r} holds stages {launch.first} to {launch.last}, "
                f"where the next to be launched is {at}"
            )
        at = launch.last
    if at != len(plan.stages):
        raise PlanError(f"the launches hold {at} stages of {len(plan.stages)}")
    if len({launch.name for launch in launches}) != len(launches):
        raise PlanError("two launches have the same name")


def _check_buffers(plan: Plan) -> dict[str, Buffer]:
    """Buffers have one name each and the shapes that the model gives them."""
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
            right = " or ".join(map(str, sorted(shapes[name])))
            raise PlanError(f"buffer {name} has the shape {buffer.shape}, not {right}")
    return buffers


def _activation_shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    return activation_shapes(plan.config, plan.batch, plan.sequence, plan.past)


def _check_values(plan: Plan, buffers: dict[str, Buffer]) -> None:
    """Every version is written once, then read while it is there, then perhaps replaced."""
    current = dict.fromkeys(buffers, 0)
    there = {name: buffer.given for name, buffer in buffers.items()}
    read = dict.fromkeys(buffers, False)
    for index, stage in enumerate(plan.stages):
        where = _where(index, stage)
        for name, version, _ in stage.reads:
            if name not in buffers:
                raise PlanError(f"{where} reads {name}, which is no buffer of the plan")
            if version > current[name] or (version == 0 and not buffers[name].given):
                raise PlanError(f"{where} reads {name} version {version}, which is not written yet")
            if version < current[name]:
                raise PlanError(
                    f"{where} reads {name} version {version}, "
                    f"which version {current[name]} has replaced"
                )
            read[name] = True
        for name, version, _ in stage.writes:
            if name not in buffers:
                raise PlanError(f"{where} writes {name}, which is no buffer of the plan")
            if buffers[name].role == "input":
                raise PlanError(f"{where} writes {name}, which is an input")
            if version != current[name] + 1:
                raise PlanError(
                    f"{where} writes {name} version {version} after version {current[name]}"
                )
            if current[name] and not read[name]:
                raise PlanError(f"{where} writes {name} again, before anything has read it")
            current[name], read[name], there[name] = version, False, True
    for name, buffer in buffers.items():
        if not there[name]:
            raise PlanError(f"buffer {name} is never written")
        if not read[name] and buffer.role != "output":
            raise PlanError(f"buffer {name}: nothing reads its version {current[name]}")


def _check_access(plan: Plan) -> None:
    """Each kind of stage touches the model's own buffers that its formula names, each once."""
    known = set(_activation_shapes(plan)) | {"tokens", "logits", "next"}
    for index, stage in enumerate(plan.stages):
        kind = STAGE_KINDS[stage.kind]
        sides = (("reads", stage.reads, kind.reads), ("writes", stage.writes, kind.writes))
        for verb, accesses, values in sides:
            found = [access.buffer for access in accesses if access.buffer in known]
            right = sorted(buffers_of(values, stage.layer))
            if sorted(found) != right:
                raise PlanError(
                    f"{_where(index, stage)} {verb} {' and '.join(found) or 'nothing'}, "
                    f"not {' and '.join(right)}"
                )


def _check_sizes(plan: Plan, buffers: dict[str, Buffer]) -> None:
    """A write fills its buffer, or in a cache the new positions; a read stays within it."""
    for index, stage in enumerate(plan.stages):
        for name, _, nbytes in stage.reads:
            if not 1 <= nbytes <= buffers[name].nbytes:
                raise PlanError(
                    f"{_where(index, stage)} reads {nbytes} bytes of {name}, "
                    f"which has {buffers[name].nbytes}"
                )
        for name, _, nbytes in stage.writes:
            right = buffers[name].nbytes
            if buffers[name].role == "state":
                right = right // (plan.past + plan.sequence) * plan.sequence
            if nbytes != right:
                raise PlanError(
                    f"{_where(index, stage)} writes {nbytes} bytes of {name}, not {right}"
                )


def _check_weights(plan: Plan) -> None:
    """Every weight is read by one stage, of its own layer; tied embeddings by embed and head."""
    shapes = plan.config.weight_shapes()
    readers: dict[str, list[str]] = {name: [] for name in shapes}
    for index, stage in enumerate(plan.stages):
        where = _where(index, stage)
        for name in stage.weights:
            if name not in shapes:
                raise PlanError(f"{where} reads {name}, which is no weight of the model")
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
    """embed, each layer's kinds in turn, head, and sample where there is one."""
    right = [("embed", NO_LAYER)]
    right += [(kind, layer) for layer in range(plan.config.n_layers) for kind in LAYER_KINDS]
    right += [("head", NO_LAYER)]
    if any(buffer.name == "next" for buffer in plan.buffers):
        right += [("sample", NO_LAYER)]
    for index, (stage, (kind, layer)) in enumerate(zip(plan.stages, right, strict=False)):
        if (stage.kind, stage.layer) != (kind, layer):
            place = kind if layer == NO_LAYER else f"layer {layer} {kind}"
            raise PlanError(f"{_where(index, stage)} stands where {place} belongs")
    if len(plan.stages) != len(right):
        raise PlanError(f"the plan has {len(plan.stages)} stages, not {len(right)}")


def _where(index: int, stage: Stage) -> str:
    return f"stage {index} ({stage.label})"
