"""Training through ML Programs: forward and backward of the layers are programs whose weights are
constants, so that every update makes new ones.

A version of the weights is what they are after so many updates. The micro-steps of update u run on
version u - staleness: with 0 each update waits for its programs, with 1 these are compiled in the
background while the version before serves, and so on. Which version an update has does not depend
on time, so that a run can be repeated and resumed; where programs are not ready, it waits, and the
wait is measured. embed, head and loss are the host's, in float32, of the same version.

Where each stage is a program, those of attention have no weights: the store has them from the
second update on, and in other processes.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from onelaunch.compilation.background import in_a_line
from onelaunch.compilation.cache import Store
from onelaunch.compilation.schedule import MicroStepEstimator
from onelaunch.config import ModelConfig
from onelaunch.engines.checks import check_tokens, not_computed
from onelaunch.engines.coreml import DTYPES, coremltools
from onelaunch.engines.coreml.backward import BACK, BEGINS, DX, DX_IN
from onelaunch.engines.coreml.compiler import Compiler, Shape, program_path
from onelaunch.engines.coreml.emit import HANDED, RESULT, TAPS, X, tap_name
from onelaunch.engines.coreml.products import Products, single_core_thread
from onelaunch.engines.coreml.programs import DIRECTIONS
from onelaunch.engines.coreml.ready import Opener, ReadyProgram
from onelaunch.engines.coreml.step_clock import (
    BACKWARD,
    CLASSIFIER,
    CLASSIFIER_BACKWARD,
    FORWARD,
    LOSS,
    PRODUCTS_WAIT,
    PROGRAMS_WAIT,
    SUMS,
    Clock,
    no_clock,
)
from onelaunch.engines.engine import Mark, no_mark
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.errors import BadInput, RunFailed
from onelaunch.plan import parse_depth

MAX_STALENESS = 8
GOAL = 64.0
"""What the largest gradient of x is scaled to, about: far from both ends of float16."""
LOWER, TRIES = 2.0**-8, 3
_ENDS = {"out_proj": "d_middle", "down": "d_out"}
"""As which tap the gradient of x is known where a program ends with such a stage."""
_HANDED = tuple(name for names in HANDED.values() for name in names)
_HANDED_BACK = tuple(name for names in BACK.values() for name in names)


@dataclass(frozen=True)
class Loaded:
    """A version's programs, by launch."""

    version: int
    weights: Mapping[str, Tensor]
    forward: list[ReadyProgram]
    backward: list[ReadyProgram]

    def close(self) -> None:
        """Give their memory back."""
        for program in (*self.forward, *self.backward):
            program.close()


class CoreMLTrainer(ReferenceEngine):
    """A `TrainEngine` whose layers run as ML Programs, by Core ML on a Mac and evaluated elsewhere;
    logits, for evaluation, and generation are PyTorch's of the newest weights.

    `depth` is layers for each program, or half, or stage; `taps` "full", or "inputs" to compute
    forwards again; `dtype` "float16", or "float32" to evaluate programs in it; `compile_budget` how
    many compilations until it has `restart_requested`, 0: any number; `store` is searched
    for programs before they are compiled. Call `after_update` after each optimizer step. Raises
    BadInput for what is not supported, MissingExtra without coremltools.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Tensor],
        depth: str | int = "",
        taps: str = "full",
        staleness: int = 1,
        dtype: str = DTYPES[0],
        compile_budget: int = 0,
        store: Store | None = None,
    ) -> None:
        coremltools("engine='coreml'")
        if reason := not_computed(config):
            raise BadInput(f"engine='coreml': {reason}; use engine='reference'")
        if taps not in TAPS[1:]:
            raise BadInput(f"coreml.taps {taps}: must be {' or '.join(TAPS[1:])}")
        if dtype not in DTYPES:
            raise BadInput(f"coreml.dtype {dtype}: must be {' or '.join(DTYPES)}")
        if not 0 <= staleness <= MAX_STALENESS:
            raise BadInput(f"coreml.staleness {staleness}: must be from 0 to {MAX_STALENESS}")
        parsed = parse_depth(depth or config.n_layers, config.n_layers)
        if parsed == "all":
            raise BadInput(
                f"coreml.fusion_depth {depth}: training has programs of a stage, of half a layer "
                f"or of 1 to {config.n_layers} layers; embed and head are not in them"
            )
        if parsed == "stage" and taps != "full":
            raise BadInput(
                "coreml.fusion_depth stage: only whole blocks can be computed again from their "
                "inputs; leave coreml.taps at full"
            )
        super().__init__(config, weights, "cpu", "float32", train=True)
        self.version = 0
        self.clock: Clock = no_clock
        """For measurements."""
        self.staleness = staleness
        self.schedule = MicroStepEstimator(1)
        self._depth, self._taps = parsed, taps
        self._open = Opener(dtype, lambda line: self._log(line))  # type: ignore[arg-type]
        self._budget, self._compilations = compile_budget, 0
        self._store = store
        self._log: Callable[[str], None] = lambda line: None
        self._closed = False
        self._shape: Shape | None = None
        self._compiler: Compiler | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="onelaunch-coreml-")
        self._compiling = single_core_thread("compiling")
        self._multiplying = single_core_thread("products")
        self.serving: Loaded | None = None
        """The programs of the last micro-step."""
        self._coming: deque[tuple[int, Future[Loaded]]] = deque()
        self._snapshots: dict[int, dict[str, Tensor]] = {0: self._snapshot()}
        self._counted = _nothing_counted()

    # ---- what the trainer calls

    def train_step(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor,
        scale: float = 1.0,
        mark: Mark = no_mark,
    ) -> Tensor:
        """Add `scale` times the mean loss's gradient to each `.grad`; see `TrainEngine`. The
        gradient is of the version that serves."""
        check_tokens(self.config, tokens_BS)
        self._begin(*tokens_BS.shape)
        with self.clock(PROGRAMS_WAIT):
            loaded = self._loaded()
        mark("stall")
        start, compiling = time.perf_counter(), self._is_compiling
        with self.clock(FORWARD):
            known, x = self._forward(loaded, tokens_BS)
        with self.clock(LOSS):
            loss, d_x, host = self._end(loaded, x, targets_BS)
        mark("forward")
        with self.clock(SUMS):
            factor = _loss_scale(d_x)
        for _ in range(TRIES):
            with self.clock(BACKWARD):
                d_embedding, products = self._backward(loaded, known, d_x * factor)
            with self.clock(PRODUCTS_WAIT):
                d_weights = self._awaited(products)
            with self.clock(SUMS):
                finite = _all_finite(*d_weights.values(), d_embedding)
            if finite:
                break
            factor *= LOWER  # somewhere inside it went beyond float16
        with self.clock(SUMS):
            self._add(host, scale)
            self._add(d_weights, scale / factor)
            self._add_embedding(tokens_BS, d_embedding, scale / factor)
        mark("backward")
        if compiling == self._is_compiling:
            self.schedule.add_micro_step(time.perf_counter() - start, compiling)
        return loss

    def log_to(self, log: Callable[[str], None]) -> None:
        """Send the compiling thread's log lines to `log` from now on."""
        self._log = log

    def after_update(self) -> None:
        """The parameters were changed: have the programs of what they are now compiled. Returns at
        once; whoever needs them waits."""
        self.version += 1
        self._snapshots[self.version] = self._snapshot()
        for version in [v for v in self._snapshots if v < self.version - self.staleness]:
            del self._snapshots[version]
        if self._shape is not None:
            self._submit(self.version)

    def state_dict(self) -> dict[str, Tensor]:
        """The versions, but the newest, that micro-steps still run on."""
        return {
            f"{self.version - version}.{name}": weight
            for version, weights in self._snapshots.items()
            if version < self.version
            for name, weight in weights.items()
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor], version: int) -> None:
        """The inverse, after so many updates; the parameters are the newest version."""
        self.version = version
        self._snapshots = {version: self._snapshot()}
        for name, weight in tensors.items():
            age, _, name = name.partition(".")
            if age.isdigit() and 0 < int(age) <= self.staleness:
                self._snapshots.setdefault(version - int(age), {})[name] = weight.clone()

    def describe(self) -> dict[str, Any]:
        """As `ReferenceEngine.describe`; the dtype is that of what is not in programs."""
        return {**super().describe(), "engine": "coreml"}

    def telemetry(self) -> dict[str, Any]:
        """Counts since the last call: compilations and their seconds, the wait for
        them, conversions, the wait for products; and how many updates old the programs are."""
        counted, self._counted = self._counted, _nothing_counted()
        served = self.serving.version if self.serving else self.version
        return {name: round(value, 6) for name, value in counted.items()} | {
            "staleness": max(0, self.version - 1 - served), "k_to_hide": self.schedule.k,
        }  # fmt: skip

    @property
    def restart_requested(self) -> bool:
        """Whether as many programs were compiled as the budget has."""
        return 0 < self._budget <= self._compilations

    def settle(self, version: int | None = None) -> None:
        """Wait until the programs of a version are compiled; by default until nothing is being
        compiled. Raises what a compilation ended with."""
        for each, coming in list(self._coming):
            if version is None or each <= version:
                coming.result()

    def close(self) -> None:
        """End the compiler and the threads."""
        self._closed = True
        if self._compiler is not None:
            self._compiler.close()
        self._compiling.shutdown(cancel_futures=True)
        self._multiplying.shutdown(cancel_futures=True)
        self._drop_programs()
        self._folder.cleanup()

    @property
    def _is_compiling(self) -> bool:
        return any(not coming.done() for _, coming in self._coming)

    # ---- versions

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def _begin(self, batch: int, sequence: int) -> None:
        shape = Shape(self.config, batch, sequence, self._depth, self._taps)  # type: ignore[arg-type]
        if shape == self._shape:
            return
        if self._compiler is not None:
            self._compiler.close()
        self._drop_programs()
        self._shape = shape
        self._plan, self._launches = shape.plan, shape.layer_launches()
        self._compiler = Compiler(shape, self._store)
        for version in sorted(self._snapshots):
            self._submit(version)

    def _drop_programs(self) -> None:
        """Drop the programs of the last shape: the loaded ones, and those that are being
        compiled."""
        if self.serving is not None:
            self.serving.close()
        self.serving = None
        while self._coming:
            _, coming = self._coming.popleft()
            coming.cancel()
            coming.add_done_callback(_close_if_loaded)

    def _submit(self, version: int) -> None:
        # with all that the thread is to read: another shape may come before it does
        assert self._compiler is not None
        work = self._compiler, len(self._launches), version, self._snapshots[version]
        self._coming.append((version, self._compiling.submit(self._compile, *work)))

    def _compile(
        self, compiler: Compiler, count: int, version: int, weights: Mapping[str, Tensor]
    ) -> Loaded:
        """Compile a version, in the thread; once more where it fails."""
        try:
            return self._compiled(compiler, count, version, weights)
        except RunFailed as error:
            if self._closed or compiler is not self._compiler:
                raise
            self._log(f"{in_a_line(error)}; once more, and the old programs serve meanwhile")
            return self._compiled(compiler, count, version, weights)

    def _compiled(
        self, compiler: Compiler, count: int, version: int, weights: Mapping[str, Tensor]
    ) -> Loaded:
        folder = Path(tempfile.mkdtemp(dir=self._folder.name))
        try:
            save_file(dict(weights), folder / "weights.safetensors")
            start = time.perf_counter()
            report = compiler.compile(folder / "weights.safetensors", folder)
            forward, backward = self._opened(folder, count)
            seconds = time.perf_counter() - start
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._counted["compilations"] += report["compilations"]
        self._counted["cache_hits"] += report["hits"]
        self._compilations += int(report["compilations"])
        self._counted["compile_seconds"] += seconds
        if self.serving is not None:  # else nothing ran meanwhile
            self.schedule.add_compilation(seconds)
        return Loaded(version, weights, forward, backward)

    def _opened(self, folder: Path, count: int) -> tuple[list[ReadyProgram], list[ReadyProgram]]:
        """A version's programs, forward and backward."""
        opened: tuple[list[ReadyProgram], list[ReadyProgram]] = [], []
        try:
            for programs, direction in zip(opened, DIRECTIONS, strict=True):
                for number in range(count):
                    programs.append(self._open(program_path(folder, direction, number)))
        except BaseException:
            for program in (*opened[0], *opened[1]):
                program.close()
            raise
        return opened

    def _loaded(self) -> Loaded:
        """The version that is this update's, waited for."""
        wanted = max(0, self.version - self.staleness)
        start = time.perf_counter()
        while self.serving is None or self.serving.version < wanted:
            version, coming = self._coming.popleft()
            loaded = coming.result()
            if version <= wanted:
                if self.serving is not None:
                    self.serving.close()
                self.serving = loaded
        self._counted["stall_seconds"] += time.perf_counter() - start
        return self.serving

    # ---- a micro-step

    def _forward(self, loaded: Loaded, tokens_BS: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Every tap by its name, and x behind the last layer."""
        start = time.perf_counter()
        x = loaded.weights["embed_tokens.weight"][tokens_BS].transpose(1, 2)[:, :, None]
        x = x.half().float()
        self._counted["conversion_seconds"] += time.perf_counter() - start
        known: dict[str, Tensor] = {}
        values = {X: x}
        for launch, program in zip(self._launches, loaded.forward, strict=True):
            first = self._plan.stages[launch.first]
            if first.kind in BEGINS:
                known[tap_name(first.layer, BEGINS[first.kind])] = values[X]
            outputs = program({name: values[name] for name in program.inputs})
            if RESULT in outputs:
                values[X] = outputs.pop(RESULT)
            handed = {name: outputs.pop(name) for name in _HANDED if name in outputs}
            values |= handed
            known |= outputs | {tap_name(first.layer, name): v for name, v in handed.items()}
        return known, values[X]

    def _end(
        self, loaded: Loaded, x: Tensor, targets_BS: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Norm, classifier, loss in float32: the loss, the gradient of x, and of the weights."""
        tied = self.config.tied_embeddings
        names = ("norm.weight", "embed_tokens.weight" if tied else "lm_head.weight")
        norm, head = (loaded.weights[name].detach().requires_grad_(True) for name in names)
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            rows = F.rms_norm(x[:, :, 0].transpose(1, 2), norm.shape, norm, self.config.norm_eps)
            with self.clock(CLASSIFIER):
                logits = F.linear(rows, head)
            loss = F.cross_entropy(
                logits.flatten(0, 1), targets_BS.flatten().long(), ignore_index=-1
            )
            with self.clock(CLASSIFIER_BACKWARD):
                d_x, d_norm, d_head = torch.autograd.grad(loss, (x, norm, head))
        return loss.detach(), d_x, dict(zip(names, (d_norm, d_head), strict=True))

    def _backward(
        self, loaded: Loaded, known: dict[str, Tensor], d_x: Tensor
    ) -> tuple[Tensor, dict[str, Future[Tensor]]]:
        """The gradient of the embedded rows, and the weights' as they come."""
        known, values = dict(known), {DX: d_x}
        products = Products(self.config, known, self._multiplying, self.clock)
        pairs = list(zip(self._launches, loaded.backward, strict=True))
        for launch, program in reversed(pairs):
            last = self._plan.stages[launch.last - 1]
            if last.kind in _ENDS:
                products.know(tap_name(last.layer, _ENDS[last.kind]), values[DX])
            pool = known | values
            for name in _HANDED:
                if (tap := tap_name(last.layer, name)) in known:
                    pool[name] = known[tap]
            outputs = program({name: pool[name] for name in program.inputs}, products.know)
            if DX_IN in outputs:
                values[DX] = outputs[DX_IN]
            values |= {name: outputs[name] for name in _HANDED_BACK if name in outputs}
        assert products.is_whole, "a weight's gradient has no operands"
        return values[DX], products.futures

    def _awaited(self, products: dict[str, Future[Tensor]]) -> dict[str, Tensor]:
        start = time.perf_counter()
        d_weights = {name: product.result() for name, product in products.items()}
        self._counted["product_wait_seconds"] += time.perf_counter() - start
        return d_weights

    def _add(self, d_weights: dict[str, Tensor], scale: float) -> None:
        """Takes them out, so that each one's memory is freed with it."""
        parameters = dict(self.model.named_parameters())
        while d_weights:
            name, gradient = d_weights.popitem()
            parameter = parameters[name]
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.add_(gradient, alpha=scale)

    def _add_embedding(self, tokens_BS: Tensor, d_x: Tensor, scale: float) -> None:
        table = self.model.embed_tokens.weight
        if table.grad is None:
            table.grad = torch.zeros_like(table)
        rows = d_x[:, :, 0].transpose(1, 2).flatten(0, 1).float()
        table.grad.index_add_(0, tokens_BS.flatten().long(), rows, alpha=scale)


def _close_if_loaded(coming: Future[Loaded]) -> None:
    if not coming.cancelled() and coming.exception() is None:
        coming.result().close()


def _all_finite(*gradients: Tensor) -> bool:
    return all(bool(g.isfinite().all()) for g in gradients)


def _loss_scale(d_x: Tensor) -> float:
    """A power of two that brings the largest gradient near GOAL."""
    largest = float(d_x.abs().max())
    if not (largest > 0 and math.isfinite(largest)):
        return 1.0
    return 2.0 ** math.floor(math.log2(GOAL / largest))


def _nothing_counted() -> dict[str, float]:
    names = (
        "compilations", "cache_hits", "compile_seconds", "stall_seconds", "conversion_seconds",
        "product_wait_seconds",
    )  # fmt: skip
    return dict.fromkeys(names, 0.0)
