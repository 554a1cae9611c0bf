"""A forward's stages bound to buffers, and launched: a chain of one kernel per stage, or one kernel
over ranges of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.engines.cuda.blocking import (
    Blocking,
    Limits,
    at_once,
    default,
    default_fused,
    padded,
    tilings,
)
from onelaunch.engines.cuda.calls import Call, CallAndProduct, captured, on, prefer_shared_memory
from onelaunch.engines.cuda.pack import PackedModel
from onelaunch.errors import BadInput, EngineTimeout
from onelaunch.operators.handles import dependent_launch
from onelaunch.operators.triton_cache import verified
from onelaunch.plan import (
    LAYER_KINDS,
    Launch,
    Part,
    Plan,
    TilePlan,
    counts,
    launches,
    make_plan,
    make_tiles,
    part_of,
)

if TYPE_CHECKING:
    from onelaunch.engines.cuda.stages.binding import Bound, Chunks, Sources

WARPS = 4
TIMEOUT_NS = 2_000_000_000  # that a tile waits for another


@dataclass(frozen=True)
class Shape:
    """The shape that a forward is bound to. Of a part (plan/parts.py) the result is x, and logits
    are not written. Without `own_logits` it has no buffer for them: it runs by `launch` and
    `Replay` alone, into tensors of its caller's. With `own_positions` the rotary embedding takes
    each row's position from `buffers.positions`. With `keep_qkv` each layer's are kept, in
    `buffers.qkv`."""

    batch: int
    sequence: int
    all_positions: bool = True
    logits_dtype: torch.dtype = torch.float32
    part: Part = "whole"
    own_logits: bool = True
    own_positions: bool = False
    keep_qkv: bool = False


class BoundForward:
    """A forward of one shape, one kernel per stage: `buffers.tokens` in, `run`, `buffers.logits`
    out; or by `launch` or `Replay` (replay.py) from and into its caller's tensors."""

    qkv_buffers = 1
    _default = staticmethod(default)

    def __init__(
        self,
        config: ModelConfig,
        packed: PackedModel,
        shape: Shape,
        blockings: Mapping[str, Blocking],
    ) -> None:
        from onelaunch.engines.cuda.kernels import settle_names
        from onelaunch.engines.cuda.stages.binding import Buffers

        batch, sequence = shape.batch, shape.sequence
        rows, dtype, device = batch * sequence, packed.embedding.dtype, packed.embedding.device
        self.config, self.packed = config, packed
        rule = self._default(config, rows, dtype.itemsize, limits_of(device))
        self.blockings = rule | dict(blockings)
        plan = make_plan(config, batch, sequence, all_positions=shape.all_positions)
        self.plan: Plan = part_of(plan, shape.part)
        self._tilings = tilings(config, self.blockings)
        self.counts = [counts(self.plan, s, self._tilings[s.kind]) for s in self.plan.stages]
        columns = self.blockings["down"].columns
        assert columns == self.blockings["out_proj"].columns == self.blockings["embed"].columns

        def empty(*extents: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(*extents, dtype=dtype, device=device)

        logit_rows = rows if shape.all_positions else batch
        self.buffers = Buffers(
            torch.zeros(rows, dtype=torch.int64, device=device),  # ids that a model has
            empty(rows, config.dim),
            empty(-(-config.dim // columns), rows, dtype=torch.float32),
            empty(
                config.n_layers if shape.keep_qkv else self.qkv_buffers,
                rows,
                config.q_dim + 2 * config.kv_dim,
            ),
            empty(rows, config.q_dim),
            empty(rows, config.hidden_dim),
            empty(
                logit_rows if shape.own_logits else 0, config.vocab_size, dtype=shape.logits_dtype
            ),
            torch.arange(logit_rows, dtype=torch.int32, device=device),
            torch.arange(sequence, dtype=torch.int32, device=device).repeat(batch)
            if shape.own_positions
            else None,
        )
        if not shape.all_positions:
            self.end_at([sequence] * batch)
        settle_names()
        self._sources = self._make_sources()
        self.calls = self._calls()
        self._compiling: AbstractContextManager[None] = verified  # of the first run

    @cached_property
    def tiles(self) -> TilePlan:
        """The tiles and what each waits for: seconds for some hundred thousand positions."""
        return make_tiles(self.plan, self._tilings)

    def end_at(self, lengths: Sequence[int]) -> None:
        """Set where each sequence ends, from 1 to the longest: its logits are those of its last
        position. Only of a shape without those of all positions; they stay until they are set
        again. Raises BadInput for other lengths."""
        longest = self.plan.sequence
        if len(lengths) != self.plan.batch or not all(1 <= n <= longest for n in lengths):
            raise BadInput(
                f"lengths {list(lengths)}: must be {self.plan.batch} of them, from 1 to {longest}"
            )
        last = [number * longest + n - 1 for number, n in enumerate(lengths)]
        self.buffers.of.copy_(torch.tensor(last, dtype=torch.int32))

    def run(self, with_logits: bool = True) -> None:
        """Launch it on its device's current stream, without logits all but its last stage."""
        self._launch_all(self._called(with_logits))

    def _called(self, with_logits: bool) -> Sequence[Call | CallAndProduct]:
        return self.calls if with_logits else self.calls[:-1]

    def launch(self, ids_N: Tensor, logits: Tensor) -> None:
        """Launch it on the current stream, with a caller's ids, (N,), int64, and into a caller's
        logits, (rows, V), float32 or the model's dtype."""
        self._launch_all(self.calls_on(ids_N, logits))

    def _launch_all(self, calls: Sequence[Call | CallAndProduct]) -> None:
        with on(self.buffers.x.device), self._compiling:
            try:
                for call in calls:
                    call()
            except BaseException:
                self.break_off()
                raise
        self._compiling = nullcontext()

    def calls_on(self, ids_N: Tensor, logits: Tensor) -> list[Call | CallAndProduct]:
        """Its calls with other ids and logits."""
        calls = [*self.calls[:-1], self.last_call(logits)]
        first = calls[0]
        assert isinstance(first, Call)
        calls[0] = first.with_tensor(self.buffers.tokens, ids_N)
        return calls

    def last_call(self, logits: Tensor) -> Call | CallAndProduct:
        """The last call, as it writes other logits."""
        return self._call(len(self.plan.stages) - 1, logits)

    def break_off(self) -> None:
        """Reset after some of its launches were made and not all."""

    @property
    def n_bytes(self) -> int:
        """Bytes of all that it holds except the weights."""
        held = [tensor for tensor in vars(self.buffers).values() if tensor is not None]
        if (chunks := self._sources.chunks) is not None:
            held += [chunks.partial, chunks.arrived]
        held += [c.left for c in self.calls if isinstance(c, CallAndProduct)]
        return sum(tensor.nbytes for tensor in held)

    def copy_status(self) -> None:
        """Start to copy the status of what was launched to the host, for `raise_if_timed_out`.
        One kernel per stage never waits, and has none."""

    def raise_if_timed_out(self, wait: bool = True) -> None:
        """Raise EngineTimeout where the last copied status is of a forward that timed out. Without
        `wait` a status that has not arrived yet is left to a later call."""

    def check(self) -> None:
        """Wait for the device; raise EngineTimeout where the forward timed out."""

    def captured(self, with_logits: bool = True) -> torch.cuda.CUDAGraph:
        """The forward as a CUDA graph, which reads and writes the same buffers; as `run`."""
        device = self.buffers.x.device
        # the stream that is the current one stays it where capturing fails, too
        with on(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            for call in self._called(with_logits):
                prefer_shared_memory(call.load())
            self.run(with_logits)
            torch.cuda.synchronize(device)
            return captured(partial(self.run, with_logits), device)

    # ---- the chain

    def _make_sources(self) -> Sources:
        from onelaunch.engines.cuda.stages.binding import Sources

        return Sources(
            self.config, self.packed, self.buffers, self.blockings, self._tilings,
            limits_of(self.buffers.x.device), self._chunks(),
        )  # fmt: skip

    def _calls(self) -> list[Call | CallAndProduct]:
        return [self._call(number, self.buffers.logits) for number in range(len(self.plan.stages))]

    def _call(self, number: int, logits: Tensor) -> Call | CallAndProduct:
        """A stage's call; head's writes the logits."""
        from onelaunch.engines.cuda.stages import STAGES

        stage, blocking = self.plan.stages[number], self.blockings[self.plan.stages[number].kind]
        if stage.kind == "head" and blocking.library and self._library_multiplies(logits):
            return self._head_by_library(logits)
        bound = STAGES[stage.kind](self._sources, stage.kind, stage.layer)
        row_tiles, column_tiles = self.counts[number]
        ctas, options = row_tiles * column_tiles, {"num_warps": blocking.warps}
        b, later, to = self.buffers, None, None
        if stage.kind == "attention":
            ctas *= 1 if self._sources.chunks is None else self._sources.chunks.count
        elif stage.kind == "head":
            # of one pipeline a tile's way out has shared memory of its own: too much in float32
            narrow, to = logits.element_size() <= b.x.element_size(), logits
            if blocking.programs and narrow and bound.x_desc is not None:
                options["PERSISTENT"] = True
                limit = blocking.programs * self._sources.limits.multiprocessors
                ctas = min(ctas, limit)
        if stage.kind not in ("embed", "head"):
            later = self._later_weights(number)
        ids = b.tokens if stage.kind == "embed" else None
        return self._stage_call(bound, ctas, options, ids, to, later)

    def _stage_call(
        self,
        bound: Bound,
        ctas: int,
        options: dict[str, Any],
        ids: Tensor | None = None,
        logits: Tensor | None = None,
        later: tuple[Tensor, int] | None = None,
    ) -> Call:
        from onelaunch.engines.cuda import sync
        from onelaunch.engines.cuda.kernels import stage_kernel

        b = self.buffers
        arguments = (
            *bound.stage, self._sources.residual, ids, logits, bound.x_desc, bound.w_desc,
            b.x.shape[0], self.plan.sequence, b.of.shape[0], 2 if bound.warmup else None,
            *(later or (None, None)),
        )  # fmt: skip
        mode, pdl = sync.AFTER, {}
        if dependent_launch(b.x.device):
            mode, pdl = sync.DEPENDENT, {"launch_pdl": True}
        defaults = {"BACKWARDS": bound.backwards, "PERSISTENT": False, "MODE": mode.value}
        return Call(stage_kernel, ctas, arguments, defaults | options | pdl)

    def _library_multiplies(self, logits: Tensor) -> bool:
        """Whether the library's product returns logits of the dtype that is wanted."""
        x = self.buffers.x
        if logits.dtype == x.dtype:
            return True
        cuda = x.device.type == "cuda" and torch.version.hip is None
        return cuda and logits.dtype == torch.float32

    def _head_by_library(self, logits: Tensor) -> CallAndProduct:
        from onelaunch.engines.cuda.stages.head import bind_normalize

        b = self.buffers
        normalized = torch.empty(b.of.shape[0], self.config.dim, dtype=b.x.dtype, device=b.x.device)
        bound, ctas = bind_normalize(self._sources, normalized)
        call = self._stage_call(bound, ctas, {"num_warps": 4})
        return CallAndProduct(call, normalized, self.packed.head.T, logits)

    def _later_weights(self, number: int) -> tuple[Tensor, int] | None:
        """The weights that a stage prefetches into the L2, and their bytes: those of the stage
        after the next one, where it has any and half of the L2 holds them; else no bytes. None
        where a device does not prefetch."""
        device = self.buffers.x.device
        if device.type != "cuda" or not self._sources.limits.tma:
            return None
        nothing = self.buffers.x, 0
        if number + 2 >= len(self.plan.stages):
            return nothing
        stage = self.plan.stages[number + 2]
        if not stage.weights:
            return nothing
        weight = self.packed.weight(stage.kind, stage.layer)
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        if 2 * weight.nbytes > l2 or weight.data_ptr() % 16:
            return nothing
        return weight, weight.nbytes // 16 * 16

    def _chunks(self) -> Chunks | None:
        """What attention in chunks of its keys needs, where its tiles are cut so."""
        from onelaunch.engines.cuda.stages.binding import Chunks

        blocking, plan, device = self.blockings["attention"], self.plan, self.buffers.x.device
        count = -(-plan.sequence // blocking.chunk) if blocking.chunk else 1
        if count == 1:
            return None
        if blocking.chunk % max(blocking.rows, blocking.columns):
            raise ValueError(f"{blocking}: no chunk of whole tiles and blocks")
        tiles = -(-plan.sequence // blocking.rows) * self.config.n_heads * plan.batch
        numbers = tiles * count * blocking.rows * (padded(self.config.head_dim) + 2)
        return Chunks(
            count,
            torch.empty(numbers, dtype=torch.float32, device=device),
            torch.zeros(tiles, dtype=torch.int32, device=device),
        )


class FusedForward(BoundForward):
    """A forward of one shape at a fusion depth, with WARPS warps for every stage, whatever their
    blockings have, and without their options for one kernel per stage. In place of a depth the
    launches themselves may be handed over, in order from embed on; they may end before the last
    stage. `ctas` is how many run at once, by default one or two a multiprocessor; all of
    them must fit on the device together. A tile that waits for another for `timeout_ns` times out.

    A traced one leaves its tiles' times in `records` (trace.py reads them); a delayed one sleeps
    before and after each wait and publication, by the number in `seed` (tracer.py).
    """

    _default = staticmethod(default_fused)

    def __init__(
        self,
        config: ModelConfig,
        packed: PackedModel,
        shape: Shape,
        blockings: Mapping[str, Blocking],
        depth: str | int | Sequence[Launch] = "all",
        ctas: int | None = None,
        timeout_ns: int = TIMEOUT_NS,
        traced: bool = False,
        delayed: bool = False,
    ) -> None:
        if (traced or delayed) and torch.version.hip is not None:
            raise BadInput("traces and delays are written for NVIDIA's GPUs; leave them out")
        self._traced, self._delayed = traced, delayed
        self.qkv_buffers = config.n_layers
        self._depth, self._timeout_ns = depth, timeout_ns
        self._ctas = ctas
        super().__init__(config, packed, shape, blockings)

    def break_off(self) -> None:
        """Clear the counters: they are ahead of the epoch, and would let later forwards pass."""
        self.sync.zero_()

    def last_call(self, logits: Tensor) -> Call | CallAndProduct:
        last = self.calls[-1]
        assert isinstance(last, Call)
        return last.with_tensor(self.buffers.logits, logits)

    @property
    def n_bytes(self) -> int:
        traced = [self.sync, self.records, self.seed]
        return super().n_bytes + sum(tensor.nbytes for tensor in traced if tensor is not None)

    def copy_status(self) -> None:
        """Start to copy the status of what was launched to the host, without waiting for it."""
        self._host_status.copy_(self._status[0], non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def raise_if_timed_out(self, wait: bool = True) -> None:
        """Raise EngineTimeout where the last copied status is that of a tile that timed out; logits
        behind it are NaN. Without `wait` a status that has not arrived yet is left to a later
        call."""
        from onelaunch.engines.cuda import sync

        if self._copied is not None:
            if not wait and not self._copied.query():
                return
            self._copied.synchronize()
        status = int(self._host_status)
        if not status:
            return
        self._host_status.zero_()
        self.sync.zero_()
        stage = self.plan.stages[(status - sync.GAVE_UP) >> sync.ROW_TILE_BITS]
        row_tile = status & ((1 << sync.ROW_TILE_BITS) - 1)
        raise EngineTimeout(
            f"a forward timed out: a tile waited {self._timeout_ns / 1e9:g} s for row tile "
            f"{row_tile} of {stage.label}; its logits are NaN"
        )

    def check(self) -> None:
        """Wait for the device; raise EngineTimeout where a tile timed out."""
        with on(self.buffers.x.device):
            self.copy_status()
            self.raise_if_timed_out()

    def _make_sources(self) -> Sources:
        from onelaunch.engines.cuda import sync

        device, plan = self.buffers.x.device, self.plan
        self._row_tiles = max(rows for rows, _ in self.counts)
        max_stages = sync.GAVE_UP >> sync.ROW_TILE_BITS
        if self._row_tiles >> sync.ROW_TILE_BITS or len(plan.stages) >= max_stages:
            raise BadInput(
                f"one launch: {self._row_tiles} row tiles of {len(plan.stages)} stages are more "
                f"than it counts, {1 << sync.ROW_TILE_BITS} of {max_stages}; run it stage by stage"
            )
        words = sync.COUNTERS + self._row_tiles * len(plan.stages)
        self.sync: Tensor = torch.zeros(words, dtype=torch.int32, device=device)
        self._status = self.sync[sync.STATUS : sync.STATUS + 1]
        gpu = device.type == "cuda"
        self._host_status = torch.zeros((), dtype=torch.int32, pin_memory=gpu)
        self._copied = torch.cuda.Event() if gpu else None
        return replace(super()._make_sources(), status=self._status)

    def _chunks(self) -> None:
        return None

    def _calls(self) -> list[Call | CallAndProduct]:
        from onelaunch.engines.cuda.kernels import forward_kernel

        b, plan, tracer = self.buffers, self.plan, self._tracer()
        depth = self._depth
        self.launches = launches(plan, depth) if isinstance(depth, str | int) else tuple(depth)
        limits, itemsize = limits_of(b.x.device), b.x.element_size()
        ctas = self._ctas or at_once(self.config, b.x.shape[0], self.blockings, itemsize, limits)
        stages = self._stages()
        options = self._options() | {"PER_LAYER": len(stages[1])}
        calls: list[Call | CallAndProduct] = []
        for launch in self.launches:
            ends = int(launch == self.launches[-1])
            arguments: tuple[Any, ...] = (
                *stages, self._sources.residual, b.tokens, b.logits, self.sync, tracer,
                b.x.shape[0], plan.sequence, b.of.shape[0], self._row_tiles, launch.first,
                launch.last, ends, self._timeout_ns,
            )  # fmt: skip
            tiles = sum(rows * cols for rows, cols in self.counts[launch.first : launch.last])
            calls.append(Call(forward_kernel, min(ctas, tiles), arguments, options))
        return calls

    def _stages(self) -> tuple[Any, Any, Any]:
        """embed, those of every layer, and head or none; each with how that which it reads is cut
        into row tiles."""
        from onelaunch.engines.cuda.stages import STAGES
        from onelaunch.engines.cuda.stages.common import Stage

        kinds = dict.fromkeys(stage.kind for stage in self.plan.stages)
        bound = {kind: STAGES[kind](self._sources, kind, None) for kind in kinds}
        of_layer = [bound[kind] for kind in LAYER_KINDS if kind in bound]
        embed, head = bound["embed"], bound.get("head")
        assert len(bound) == len(of_layer) + 1 + (head is not None)  # what this kernel has room for
        last = of_layer[-1]
        before = [last, *of_layer[:-1]]
        stages = [each.reading(read.cut) for each, read in zip(of_layer, before, strict=True)]
        # x was written by embed, or by the last stage of the layer before
        stages[0] = of_layer[0].reading(last.cut, embed.cut)
        return embed.stage, tuple(stages), Stage() if head is None else head.reading(last.cut)

    def _options(self) -> dict[str, Any]:
        from onelaunch.engines.cuda import sync

        mode = sync.COUNTED_PTX if _nvidia() else sync.COUNTED
        options = {"LAYERS": self.config.n_layers, "MODE": mode.value, "num_warps": WARPS}
        if self.buffers.x.device.type == "cuda":
            options["launch_cooperative_grid"] = True
        return options

    def _tracer(self) -> Any:
        """Records, (a place for each tile and one, words), and seed, where they are wanted."""
        from onelaunch.engines.cuda.stages.common import constant
        from onelaunch.engines.cuda.tracer import RECORD, Tracer

        device, tiles = self.buffers.x.device, [rows * columns for rows, columns in self.counts]
        self.records: Tensor | None = None
        self.seed: Tensor | None = None
        # the last stage can have as many as it has: nothing lies behind
        self.max_tiles = max(tiles[:-1], default=0)
        if self._traced:
            places = 1 + self.max_tiles * (len(tiles) - 1) + tiles[-1]
            self.records = torch.zeros(places, RECORD, dtype=torch.int64, device=device)
        if self._delayed:
            self.seed = torch.zeros(1, dtype=torch.int32, device=device)
        limit = constant(self.max_tiles) if self._traced else None
        return Tracer(self.records, limit, self.seed)


@cache
def limits_of(device: torch.device) -> Limits:
    """A GPU's; where there is none, one multiprocessor of the usual kind."""
    if device.type != "cuda":
        return Limits(1)
    properties = torch.cuda.get_device_properties(device)
    # the device's own limit, which PyTorch does not name everywhere: a block's usual 48 KiB
    shared = getattr(properties, "shared_memory_per_block_optin", 48 << 10)
    tma = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
    return Limits(properties.multi_processor_count, shared, tma)


def _nvidia() -> bool:
    """Whether Triton compiles for NVIDIA's GPUs."""
    from triton.runtime import driver

    try:
        return bool(driver.active.get_current_target().backend == "cuda")
    except RuntimeError:  # no device: the interpreter, which has no use for the answer
        return False
