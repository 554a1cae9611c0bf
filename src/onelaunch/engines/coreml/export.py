"""A model written as ML Programs: one, or a folder of them in the order in which they run."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from onelaunch.checkpoints.atomic import write_error
from onelaunch.config import ModelConfig
from onelaunch.engines.coreml.emit import (
    LOGITS,
    TAPS,
    Taps,
    emit,
    program_launches,
    save,
    tap_names,
)
from onelaunch.engines.coreml.pack import Packed
from onelaunch.errors import BadInput
from onelaunch.plan import Depth, Launch, Plan, make_plan, parse_depth

SUFFIX = ".mlpackage"
LIST = "programs.json"
USUAL_SEQUENCE = 256


@dataclass(frozen=True)
class Written:
    """A program on disk: its name and launch, operations without constants, the seconds of
    emitting, and of converting and saving."""

    path: Path
    launch: Launch
    operations: int
    emit_seconds: float
    save_seconds: float


def checked(
    config: ModelConfig, out: Path, sequence: int | None, depth: str | None, taps: str
) -> tuple[int, Depth, Taps]:
    """Sequence, depth and taps with their defaults. Raises BadInput."""
    if config.extensions:
        raise BadInput(f"format='coreml': programs do not have {config.extensions[0]}")
    if taps not in TAPS:
        raise BadInput(f"taps={taps!r}: must be {', '.join(TAPS[:-1])} or {TAPS[-1]}")
    if sequence is None:
        sequence = min(USUAL_SEQUENCE, config.max_seq_len)
    if not 1 <= sequence <= config.max_seq_len:
        raise BadInput(f"sequence={sequence}: must be from 1 to the model's {config.max_seq_len}")
    parsed = parse_depth(depth or "all", config.n_layers)
    count = len(program_launches(make_plan(config), parsed))
    if (out.suffix == SUFFIX) != (count == 1):
        kind = f"one program: OUT must end in {SUFFIX}"
        if count > 1:
            kind = f"{count} programs: OUT must be a folder's name, not one ending in {SUFFIX}"
        raise BadInput(f"{out}: fusion depth {parsed} is {kind}")
    return sequence, parsed, taps  # type: ignore[return-value]


def write(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    out: Path,
    sequence: int,
    depth: Depth,
    taps: Taps,
) -> list[Written]:
    """Write the programs of a forward over one text of `sequence` tokens, all positions' logits;
    they appear whole or not at all. A folder has a list of them, `programs.json`, too. Raises
    BadInput for weights that float16 does not hold."""
    plan = make_plan(config, 1, sequence, all_positions=True)
    packed = Packed(config, weights)
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise BadInput(f"{name}: has numbers that are infinite or NaN; nothing was written")
    selected = program_launches(plan, depth)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise write_error(out, error) from error
    try:
        written = []
        for number, launch in enumerate(selected, start=1):
            emitted = emit(plan, launch, packed, taps)
            name = f"{number:02}-{launch.name.replace(' ', '-')}{SUFFIX}"
            notes = _notes(plan, launch, taps)
            seconds = save(emitted, folder / name, {"onelaunch": json.dumps(notes)})
            written.append(
                Written(folder / name, launch, emitted.operations, emitted.seconds, seconds)
            )
        if len(selected) == 1:
            written[0].path.rename(out)
            return [replace(written[0], path=out)]
        listed = [{"file": w.path.name, **_notes(plan, w.launch, taps)} for w in written]
        (folder / LIST).write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
        folder.chmod(0o755)
        folder.rename(out)
        return [replace(each, path=out / each.path.name) for each in written]
    except OSError as error:
        converting = error.filename == tempfile.gettempdir()
        place = f"{error.filename}, where programs are converted (TMPDIR)" if converting else out
        raise write_error(place, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _notes(plan: Plan, launch: Launch, taps: Taps) -> dict[str, Any]:
    """The metadata of a program."""
    stages = plan.stages[launch.first : launch.last]
    return {
        "model": plan.config.to_dict(),
        "sequence": plan.sequence,
        "launch": launch.name,
        "input": "tokens (1, S) int32" if stages[0].kind == "embed" else "x (1, D, 1, S) float16",
        "output": f"{LOGITS}_N (1, rows, 1, S)" if stages[-1].kind == "head" else "x_out",
        "taps": tap_names(plan, launch, taps),
    }
