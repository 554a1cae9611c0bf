"""forward: logits of whole sequences on a GPU, by the number of launches, compared with PyTorch.

Random weights in bfloat16, logits of every position in bfloat16, as in PyTorch. `ours` is
what a user gets: the wall time of `engine.logits`, WALL_CALLS calls back to back with one wait at
the end, ids on the GPU; `logits float32` the same with float32 logits. Then the forms' graphs
alone: one kernel per stage, half a layer, one or more layers, or the whole, with the rule's tiles,
and `chosen`, the form and the tiles that the engine's own measurement chooses. Peers: the
forward that a careful user writes, run as it is, through torch.compile, and both as CUDA graphs.
Triton's store and ours are empty at the beginning of a run: seconds to a first forward are those of
compiling, `its kernel alone` those of compiling the one kernel of `fused all`; `kept` are those of
another process, which reads from the stores what was chosen. Imports are made before.
A sample is a replay's time over replays back to back, by two events; what is no graph is timed by
the host's clock over calls back to back with one wait at the end. Every contestant is sampled once
in each round, but PyTorch's forms that are no graphs: these are timed alone, in the host's quiet
moments, and the row's `host` says what they were (settled.py). `floor` is the time to read every
weight and write the logits once, at the speed of a copy on the device, measured at the beginning.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from onelaunch.bench.core.children import run_child
from onelaunch.bench.core.gpu_forwards import pytorch_samples, random_weights, replays, walls
from onelaunch.bench.core.record import Log, Row, rounded
from onelaunch.bench.core.rounds import Samples, digest, in_rounds, ratio, ratio_of_medians
from onelaunch.bench.core.settled import LEAST_WINDOWS, QUICK_WINDOWS, Settled, settle
from onelaunch.bench.core.timing import copy_bandwidth
from onelaunch.bench.engines.forward.views import draw, findings, table
from onelaunch.bench.peers.forward import BareForward
from onelaunch.config import ModelConfig, preset
from onelaunch.errors import EngineTimeout, RunFailed

if TYPE_CHECKING:
    from onelaunch.engines.cuda.engine import CudaEngine
    from onelaunch.engines.cuda.pack import PackedModel
    from onelaunch.engines.cuda.program import BoundForward, Shape

__all__ = ["UNIT", "draw", "findings", "run", "table"]

UNIT = "us"
CASES = (
    ("stories15m", 1, 256),
    ("stories15m", 1, 1024),
    ("stories110m", 1, 256),
    ("stories110m", 1, 1024),
    ("smollm2-135m", 1, 256),
    ("qwen3-0.6b", 1, 256),
)
QUICK_CASES = CASES[:1]
ROUNDS, QUICK_ROUNDS = 15, 9
LOGITS, FLOAT32 = "logits", "logits float32"
CHOSEN, KEPT, READS_ITSELF = "chosen", "kept", "Triton reads itself"
FUSED, ITS_KERNEL = "fused all", "its kernel alone"
TRITON_STORE = "TRITON_CACHE_DIR"
CHILD_SECONDS = 120.0


class Subject(NamedTuple):
    """A model on the device, tokens (B, S), and PyTorch's float32 logits of them. `store`: the
    folder of what tuning chooses; None where nothing is tuned, as in a quick run."""

    config: ModelConfig
    weights: dict[str, Tensor]
    tokens: Tensor
    expected: Tensor
    store: Path | None


Forms = dict[str, tuple["torch.cuda.CUDAGraph", "BoundForward"]]


def run(device: str, quick: bool, log: Log) -> Iterator[Row]:
    """Time every case; yields rows."""
    import triton.compiler.code_generator  # noqa: F401 - what Triton imports at its first kernel
    from triton.runtime.cache import triton_key

    triton_key()  # it reads all of itself, once a process
    bandwidth = copy_bandwidth(torch.device(device))
    log(f"copy on the device: {bandwidth:,.0f} GB/s")
    with _empty_stores() as folder:
        for name, batch, sequence in QUICK_CASES if quick else CASES:
            config = preset(name)
            config = config.with_(max_seq_len=max(sequence, config.max_seq_len))
            row = _case(
                config, batch, sequence, torch.device(device), None if quick else folder, log
            )
            row.case = f"{name} forward {batch}x{sequence}"
            row.floor = round(_floor_us(config, batch * sequence, bandwidth), 2)
            yield row
            gc.collect()
            torch.cuda.empty_cache()


@contextmanager
def _empty_stores() -> Iterator[Path]:
    """A folder for choices; Triton's store is another in the same place, for children too."""
    before = os.environ.get(TRITON_STORE)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[TRITON_STORE] = str(Path(folder) / "triton")
        try:
            yield Path(folder) / "choices"
        finally:
            del os.environ[TRITON_STORE]
            if before is not None:
                os.environ[TRITON_STORE] = before


def _case(
    config: ModelConfig,
    batch: int,
    sequence: int,
    device: torch.device,
    store: Path | None,
    log: Log,
) -> Row:
    gc.collect()
    gc.freeze()  # what torch.compile left of the cases before would slow down every collection
    generator = torch.Generator(device=device).manual_seed(0)
    weights = random_weights(config, device, generator)
    tokens = torch.randint(config.vocab_size, (batch, sequence), device=device, generator=generator)
    bare = BareForward(config, weights, torch.bfloat16, device)
    with torch.inference_mode():
        subject = Subject(config, weights, tokens, bare(tokens).float(), store)
        forms, notes = _forms(subject, log)
        engine = _engine(subject)
        contestants = {name: replays(*form) for name, form in forms.items()}
        for what, dtype in ((LOGITS, torch.bfloat16), (FLOAT32, torch.float32)):
            contestants[what] = walls(partial(engine.logits, tokens, dtype))
        of_pytorch = pytorch_samples(bare, tokens)
        contestants |= of_pytorch.graphs
        notes["seconds_to_first"]["torch.compile"] = round(of_pytorch.seconds, 2)
        samples = in_rounds(contestants, QUICK_ROUNDS if store is None else ROUNDS)
        least = QUICK_WINDOWS if store is None else LEAST_WINDOWS
        alone = {name: settle(sample, least) for name, sample in of_pytorch.launched.items()}
        for _, bound in forms.values():
            bound.check()  # a forward that timed out is fast
    return _row("", [*forms, LOGITS, FLOAT32], samples, notes, alone)


def _forms(subject: Subject, log: Log) -> tuple[Forms, dict[str, Any]]:
    """Our forms, each with its graph, and a row's notes on them."""
    from onelaunch.engines.cuda.pack import pack
    from onelaunch.engines.cuda.program import BoundForward, FusedForward, Shape

    config, tokens = subject.config, subject.tokens
    packed = pack(config, subject.weights, torch.bfloat16, tokens.device)
    batch, sequence = tokens.shape
    shape = Shape(batch, sequence, True, torch.bfloat16)
    notes: dict[str, Any] = {"launches": {}, "seconds_to_first": {}, "apart_from_pytorch": {}}
    makers: dict[str, Callable[[], BoundForward]] = {
        f"fused {depth}": partial(FusedForward, config, packed, shape, {}, depth)
        for depth in ("all", "half", 1, 2, 4)
        if not isinstance(depth, int) or depth < config.n_layers
    }
    makers["staged"] = partial(BoundForward, config, packed, shape, {})
    if subject.store is not None:
        makers[CHOSEN] = partial(_chosen, subject, subject.store, packed, shape, notes, log)
    forms: Forms = {}
    for form, make in makers.items():
        start = time.perf_counter()
        try:
            bound = make()
            bound.buffers.tokens.copy_(tokens.flatten())
            compiling = time.perf_counter()
            for call in bound.calls:
                call.compile()
            compiled = time.perf_counter()
            graph = bound.captured()
            graph.replay()
            bound.check()
        except (RuntimeError, EngineTimeout) as error:
            log(f"without {form}: {str(error).splitlines()[0]}")
            continue
        notes["seconds_to_first"][form] = round(time.perf_counter() - start, 2)
        if form == FUSED:
            notes["seconds_to_first"][ITS_KERNEL] = round(compiled - compiling, 2)
        notes["launches"][form] = sum(call.launches for call in bound.calls)
        logits = bound.buffers.logits.view(subject.expected.shape)
        notes["apart_from_pytorch"][form] = rounded(_check(form, logits, subject.expected), 3)
        forms[form] = graph, bound
    if subject.store is not None:
        notes["seconds_to_first"] |= _kept_seconds(subject, subject.store)
    return forms, notes


def _engine(subject: Subject) -> CudaEngine:
    """The engine that reads what was tuned; without a store, of one kernel per stage. Raises
    RunFailed where it does not read it, or its logits are wrong."""
    from onelaunch.compilation.cache import Store
    from onelaunch.engines.cuda.engine import CudaEngine

    config, weights, tokens, expected, folder = subject
    if folder is None:
        engine = CudaEngine(config, weights, "cuda", "bfloat16", "stage")
    else:
        engine = CudaEngine(config, weights, "cuda", "bfloat16", store=Store(folder))
    _check("the engine", engine.logits(tokens, torch.bfloat16), expected)
    form = engine.describe()["forms"]["{}x{}".format(*tokens.shape)]
    if folder is not None and "us" not in form:
        raise RunFailed("the engine did not read what was chosen")
    return engine


def _check(what: str, logits: Tensor, expected: Tensor) -> float:
    """How far logits are from PyTorch's; raises RunFailed where they are wrong."""
    apart = float((logits.float() - expected).norm() / expected.norm())
    if not apart < 0.05:
        raise RunFailed(f"{what}: logits {apart:.1%} from PyTorch's")
    return apart


def _chosen(
    subject: Subject,
    store: Path,
    packed: PackedModel,
    shape: Shape,
    notes: dict[str, Any],
    log: Log,
) -> BoundForward:
    """The form that tuning chooses, kept in the store, and in the notes what tuning took."""
    from onelaunch.compilation.cache import Store
    from onelaunch.engines.cuda.forms import bind
    from onelaunch.engines.cuda.tuning.store import keep
    from onelaunch.engines.cuda.tuning.timer import facts, tune

    case = subject.config, packed, shape.batch, shape.sequence
    choice = tune(*case)
    keep(Store(store), facts(*case), choice)
    tiles = {kind: list(vars(b).values()) for kind, b in choice.blockings.items()}
    notes["choice"] = {
        "form": choice.form, "programs": choice.programs, "us": dict(choice.us),
        "seconds": choice.seconds, "tried": choice.tried, "tiles": tiles,
    }  # fmt: skip
    name = f"{shape.batch}x{shape.sequence}"
    log(f"{name}: {choice.form} chosen in {choice.seconds:.0f} s, {choice.tried} tried")
    return bind(subject.config, packed, shape, choice.as_form())


def _kept_seconds(subject: Subject, store: Path) -> dict[str, float]:
    """Seconds from weights on the device to logits in a new process that reads the choice and its
    kernels, without imports and the device's context; and those that Triton reads itself."""
    arg = json.dumps([subject.config.to_dict(), *subject.tokens.shape, str(store)])
    command = [sys.executable, "-m", "onelaunch.bench.engines.forward.child", arg]
    seconds = run_child(command, timeout=CHILD_SECONDS)
    return {KEPT: float(seconds["kept"]), READS_ITSELF: float(seconds["triton"])}


def _row(
    case: str,
    mine: list[str],
    samples: Samples,
    notes: dict[str, Any],
    alone: Mapping[str, Settled],
) -> Row:
    """`alone`: peers that were not sampled in the rounds."""
    forms = {name: digest(samples[name]) for name in mine if name not in (LOGITS, FLOAT32)}
    fastest = min(forms, key=lambda name: forms[name]["median"])
    best = CHOSEN if CHOSEN in mine else fastest
    ours = samples[LOGITS]
    peers = {name: values for name, values in samples.items() if name not in mine}
    by_name = {name: settled.samples for name, settled in alone.items()}
    speedup = {name: ratio(values, ours) for name, values in peers.items()}
    speedup |= {name: ratio_of_medians(each, ours) for name, each in by_name.items()}
    notes |= {
        "form": best,
        "forms": forms,
        "graph": forms[best]["median"],
        FLOAT32: digest(samples[FLOAT32]),
        "over_graph": round(ratio(ours, samples[best]), 4),
        "over_fastest": round(ratio(samples[best], samples[fastest]), 4),
        "speedup": {name: round(value, 4) for name, value in speedup.items()},
        "host": {name: settled.note() for name, settled in alone.items()},
    }
    medians = {name: digest(values)["median"] for name, values in (peers | by_name).items()}
    return Row.of(case, ours, peers=medians, notes=notes)


def _floor_us(config: ModelConfig, rows: int, bandwidth: float) -> float:
    """Microseconds to move the weights and the logits once, 2 bytes each, at so many GB/s."""
    weights = sum(
        shape[0] * shape[1] for shape in config.weight_shapes().values() if len(shape) > 1
    )
    return 2 * (weights + rows * config.vocab_size) / bandwidth / 1e3
