"""The timeline of a forward in one launch, or in a few, on an NVIDIA GPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from onelaunch.checkpoints.atomic import write_text
from onelaunch.config import ModelConfig
from onelaunch.engines.cuda.pack import pack
from onelaunch.engines.cuda.program import FusedForward, Shape
from onelaunch.engines.cuda.timeline import Span, Timeline, perfetto
from onelaunch.errors import BadInput, RunFailed

WARM = 20  # replays before the one whose times are kept


def trace(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    tokens_BS: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    depth: str | int = "all",
) -> Timeline:
    """Run the forward of the tokens, all logits in the model's dtype, as a CUDA graph; the timeline
    is of the last of some replays. Raises BadInput for a GPU that is not NVIDIA's."""
    batch, sequence = tokens_BS.shape
    packed = pack(config, weights, dtype, device)
    forward = FusedForward(
        config, packed, Shape(batch, sequence, True, dtype), {}, depth, traced=True
    )
    forward.buffers.tokens.copy_(tokens_BS.flatten())
    again = forward.captured().replay if device.type == "cuda" else forward.run
    for _ in range(WARM + 1 if device.type == "cuda" else 1):
        again()
    return timeline_of(forward)


def timeline_of(forward: FusedForward) -> Timeline:
    """The timeline of the last run of a traced forward. Raises EngineTimeout where it timed out,
    and RunFailed where a tile recorded nothing."""
    forward.check()
    if forward.records is None:
        raise BadInput("the forward is not traced; make it with traced=True")
    records = forward.records.tolist()
    tiles = forward.tiles
    of = forward.launches
    spans = []
    for number, phase in enumerate(tiles.phases[: of[-1].last]):
        launch = next(i for i, launch in enumerate(of) if launch.first <= number < launch.last)
        for within in range(phase.tiles):
            tile = tiles.tile(phase.first + within)
            began, ready, ended, where = records[1 + number * forward.max_tiles + within]
            if not 0 < began <= ready <= ended:
                raise RunFailed(
                    f"{tiles.plan.stages[number].label}: tile {within} left no times, or wrong ones"
                    f" ({began}, {ready}, {ended})"
                )
            program, multiprocessor = where & 0xFFFFFFFF, where >> 32
            spans.append(Span(tile, launch, program, multiprocessor, began, ready, ended))
    return Timeline(tiles, of, tuple(spans))


def write(timeline: Timeline, path: Path, name: str) -> None:
    """The timeline as a file that ui.perfetto.dev opens. Raises BadInput where there is no place
    for it."""
    write_text(path, json.dumps(perfetto(timeline, name), separators=(",", ":")) + "\n")
