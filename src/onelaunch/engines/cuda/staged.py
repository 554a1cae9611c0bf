"""A whole forward, one launch a stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.engines.cuda.blocking import (
    Blocking,
    Limits,
    blocks,
    default,
    inner_of,
    padded,
    tilings,
)
from onelaunch.engines.cuda.calls import Call, CallAndProduct, captured, on, share_first_cache
from onelaunch.engines.cuda.pack import PackedModel
from onelaunch.errors import BadInput
from onelaunch.operators.kept import verified
from onelaunch.plan import Part, Plan, Stage, TilePlan, counts, make_plan, make_tiles, part_of

Made = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""A kernel, its arguments, its constants."""


@dataclass(frozen=True)
class Buffers:
    """tokens: (N,), int64; x: (N, D); parts: (parts of a row, N), float32; qkv: (layers that have
    their own, N, (H + 2 K) E); mixed: (N, H E); hidden: (N, F); logits: (rows, V); of: (rows,),
    int32, the rows of x that they are of, ascending."""

    tokens: Tensor
    x: Tensor
    parts: Tensor
    qkv: Tensor
    mixed: Tensor
    hidden: Tensor
    logits: Tensor
    of: Tensor


@dataclass(frozen=True)
class Shape:
    """What a forward is bound to. Of a part (plan/parts.py) the result is x, and logits are not
    written. Without `own_logits` it has no buffer for them: it runs by `launch` and `Replay`
    alone, into tensors of its caller's."""

    batch: int
    sequence: int
    all_positions: bool = True
    logits_dtype: torch.dtype = torch.float32
    part: Part = "whole"
    own_logits: bool = True


class BoundForward:
    """A forward of one shape: `buffers.tokens` in, `run`, `buffers.logits` out; or by `launch` or
    `Replay` (replay.py) from and into its caller's tensors."""

    qkv_buffers = 1
    _staged = True
    _default = staticmethod(default)

    def __init__(
        self,
        config: ModelConfig,
        packed: PackedModel,
        shape: Shape,
        blockings: Mapping[str, Blocking],
    ) -> None:
        from onelaunch.engines.cuda.kernels import settle_names

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
        self.parts = -(-config.dim // columns)

        def empty(*extents: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(*extents, dtype=dtype, device=device)

        logit_rows = rows if shape.all_positions else batch
        self.buffers = Buffers(
            torch.zeros(rows, dtype=torch.int64, device=device),  # ids that a model has
            empty(rows, config.dim),
            empty(self.parts, rows, dtype=torch.float32),
            empty(self.qkv_buffers, rows, config.q_dim + 2 * config.kv_dim),
            empty(rows, config.q_dim),
            empty(rows, config.hidden_dim),
            empty(
                logit_rows if shape.own_logits else 0, config.vocab_size, dtype=shape.logits_dtype
            ),
            torch.arange(logit_rows, dtype=torch.int32, device=device),
        )
        if not shape.all_positions:
            self.end_at([sequence] * batch)
        self._place_for_chunks()
        settle_names()
        self.calls = self._calls()
        self._compiling: AbstractContextManager[None] = verified  # of the first run

    @cached_property
    def tiles(self) -> TilePlan:
        """The tiles and what each waits for: seconds for some hundred thousand positions."""
        return make_tiles(self.plan, self._tilings)

    def _calls(self) -> list[Call | CallAndProduct]:
        return [self._call(number) for number in range(len(self.plan.stages))]

    def end_at(self, lengths: Sequence[int]) -> None:
        """Where each text ends, 1 to the sequence: its logits are those of its last position. Only
        of a shape without those of all positions; they stay until they are given again."""
        longest = self.plan.sequence
        if len(lengths) != self.plan.batch or not all(1 <= n <= longest for n in lengths):
            raise BadInput(
                f"lengths {list(lengths)}: must be {self.plan.batch} of them, from 1 to {longest}"
            )
        last = [text * longest + n - 1 for text, n in enumerate(lengths)]
        self.buffers.of.copy_(torch.tensor(last, dtype=torch.int32))

    def run(self) -> None:
        """Launch it on its device's current stream."""
        with on(self.buffers.x.device), self._compiling, self.whole():
            for call in self.calls:
                call()
        self._compiling = nullcontext()

    def launch(self, ids_N: Tensor, logits: Tensor) -> None:
        """Launch it on the current stream, with a caller's ids, (N,), int64, and into a caller's
        logits, (rows, V), float32 or the model's dtype."""
        with on(self.buffers.x.device), self._compiling, self.whole():
            for call in self.calls_on(ids_N, logits):
                call()
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

    def whole(self) -> AbstractContextManager[None]:
        """In it all of its calls are launched; or an exception ends it."""
        return nullcontext()

    @property
    def n_bytes(self) -> int:
        """Of all that it holds beside the weights."""
        held = [*vars(self.buffers).values(), self._chunk_parts, self._arrived]
        held += [c.left for c in self.calls if isinstance(c, CallAndProduct)]
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def ask(self) -> None:
        """Ask how what was launched went; `told` says. One launch a stage never waits."""

    def told(self, wait: bool = True) -> None:
        """Raise EngineTimeout where the forward that was last asked about was given up, as far as
        that is known without waiting unless `wait`."""

    def check(self) -> None:
        """Both, at once."""

    def captured(self) -> torch.cuda.CUDAGraph:
        """The forward as a CUDA graph, which reads and writes the same buffers."""
        device = self.buffers.x.device
        # the stream that is the current one stays it where capturing fails, too
        with on(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            for call in self.calls:
                share_first_cache(call.load())
            self.run()
            torch.cuda.synchronize(device)
            return captured(self.run, device)

    def _call(self, number: int, logits: Tensor | None = None) -> Call | CallAndProduct:
        """A stage's call; head's may write other logits than the buffer."""
        from onelaunch.engines.cuda import stages
        from onelaunch.operators.handles import dependent_launch

        stage, (row_tiles, column_tiles) = self.plan.stages[number], self.counts[number]
        device = self.buffers.x.device
        mode = stages.DEPENDENT if dependent_launch(device) else stages.AFTER
        to = self.buffers.logits if logits is None else logits
        make: dict[str, Callable[[Stage], Made]] = {
            "embed": self._embed, "qkv": self._qkv, "attention": self._attention,
            "out_proj": self._add_product, "gate_up": self._gate_up, "down": self._add_product,
            "head": partial(self._head, logits=to),
        }  # fmt: skip
        pdl = {"launch_pdl": True} if mode == stages.DEPENDENT else {}
        blocking = self.blockings[stage.kind]
        if stage.kind == "head" and blocking.library and self._library_multiplies(to):
            return self._head_by_library({"MODE": mode.value} | pdl, to)
        kernel, given, constants = make[stage.kind](stage)
        programs = row_tiles * column_tiles
        if stage.kind == "attention":
            programs *= self._chunks
        elif stage.kind == "head" and constants["PERSISTENT"]:
            programs = min(programs, blocking.programs * limits_of(device).multiprocessors)
        if stage.kind not in ("embed", "head"):
            later = self._weights_of(number + 2)
            given += (self.buffers.x, 0) if later is None else (later, later.nbytes // 16 * 16)
            constants["FETCH"] = device.type == "cuda" and limits_of(device).tma
        options = constants | {"MODE": mode.value, "num_warps": blocking.warps} | pdl
        return Call(kernel, programs, given, options)

    def _library_multiplies(self, logits: Tensor) -> bool:
        """Whether the library's product gives logits of the dtype that is wanted."""
        x = self.buffers.x
        if logits.dtype == x.dtype:
            return True
        cuda = x.device.type == "cuda" and torch.version.hip is None
        return cuda and logits.dtype == torch.float32

    def _embed(self, stage: Stage) -> Made:
        from onelaunch.engines.cuda.kernels import embed_kernel

        b, blocking = self.buffers, self.blockings[stage.kind]
        given = b.tokens, self.packed.embedding, b.x, b.parts, self.packed.bad_id, b.x.shape[0]
        c = self.config
        return embed_kernel, given, {"V": c.vocab_size, "D": c.dim} | _size(blocking)

    def _qkv(self, stage: Stage) -> Made:
        from onelaunch.engines.cuda.kernels import qkv_kernel

        c, w, b = self.config, self.packed, self.buffers
        x, weight, passes, constants = self._product(stage, b.x, w.qkv)
        norms = None if w.norms is None else w.norms[stage.layer]
        given = (
            x, b.parts, weight, norms, w.cos, w.sin, b.qkv, passes, b.x.shape[0],
            self.plan.sequence, c.norm_eps,
        )  # fmt: skip
        constants |= {"D": c.dim, "QK_NORM": c.qk_norm, "PARTS": self.parts} | _heads(c)
        return qkv_kernel, given, constants | {"STEP": self._tilings["qkv"].columns}

    def _attention(self, stage: Stage) -> Made:
        from onelaunch.engines.cuda.kernels import attention_kernel

        c, b, blocking = self.config, self.buffers, self.blockings[stage.kind]
        given = (
            b.qkv, b.mixed, self._chunk_parts, self._arrived, self.plan.sequence,
            c.head_dim**-0.5,
        )  # fmt: skip
        constants = _heads(c) | _size(blocking) | {"LOADS": blocking.loads}
        chunk = blocking.chunk if self._chunks > 1 else 0
        return attention_kernel, given, constants | {"WIDTH": padded(c.head_dim), "CHUNK": chunk}

    def _add_product(self, stage: Stage) -> Made:
        from onelaunch.engines.cuda.kernels import add_product_kernel

        w, b, kind = self.packed, self.buffers, stage.kind
        y, weights = (b.mixed, w.out) if kind == "out_proj" else (b.hidden, w.down)
        y, weight, passes, constants = self._product(stage, y, weights)
        given = y, weight, b.x, b.parts, passes, b.x.shape[0]
        inner = inner_of(self.config, kind)
        return add_product_kernel, given, constants | {"INNER": inner, "D": self.config.dim}

    def _gate_up(self, stage: Stage) -> Made:
        from onelaunch.engines.cuda.kernels import gate_up_kernel

        c, w, b = self.config, self.packed, self.buffers
        x, weight, passes, constants = self._product(stage, b.x, w.gate_up)
        given = x, b.parts, weight, b.hidden, passes, b.x.shape[0], c.norm_eps
        constants |= {"D": c.dim, "F": c.hidden_dim, "PARTS": self.parts}
        return gate_up_kernel, given, constants

    def _head(self, stage: Stage, logits: Tensor) -> Made:
        from onelaunch.engines.cuda.kernels import head_kernel

        c, w, b = self.config, self.packed, self.buffers
        rows = b.of.shape[0]
        x, weight, _, constants = self._product(stage, b.x, w.head)
        given = x, b.parts, weight, logits, b.of, rows, b.x.shape[0], c.norm_eps
        constants |= {"D": c.dim, "V": c.vocab_size, "PARTS": self.parts}
        # of one pipeline a tile's way out has shared memory of its own: too much in float32
        narrow = logits.element_size() <= b.x.element_size()
        persistent = self.blockings["head"].programs > 0 and constants["TMA"] and narrow
        return head_kernel, given, constants | {"PERSISTENT": persistent}

    def _head_by_library(self, options: dict[str, Any], logits: Tensor) -> CallAndProduct:
        from onelaunch.engines.cuda.kernels import normalize_kernel

        c, b = self.config, self.buffers
        rows = b.of.shape[0]
        normalized = torch.empty(rows, c.dim, dtype=b.x.dtype, device=b.x.device)
        given = b.x, b.parts, normalized, b.of, rows, b.x.shape[0], c.norm_eps
        size = {"BM": 16, "BN": min(128, padded(c.dim))}
        programs = -(-rows // size["BM"]) * -(-c.dim // size["BN"])
        constants = {"D": c.dim, "PARTS": self.parts, "num_warps": 4} | size
        call = Call(normalize_kernel, programs, given, constants | options)
        return CallAndProduct(call, normalized, self.packed.head.T, logits)

    def _product(
        self, stage: Stage, rows: Tensor, weights: Tensor
    ) -> tuple[Any, Any, int, dict[str, Any]]:
        """What a product's two sides are handed over as, its passes, and its constants. Blocks come
        by the tensor memory accelerator from rows of whole 16 bytes, all of them, and where a
        tile's last columns are not the next tile's first."""
        blocking = self.blockings[stage.kind]
        weight = weights if stage.kind == "head" else weights[stage.layer]
        BK, TAIL = blocks(weight.shape[-1], blocking)
        row_bytes = weight.shape[-1] * weight.element_size()
        every_row = stage.kind != "head" or self.buffers.of.shape[0] == rows.shape[0]
        apart = stage.kind != "qkv" or self._tilings["qkv"].columns == blocking.columns
        fits = blocking.loads > 0 and row_bytes % 16 == 0 and every_row and apart
        tma = blocking.tma and fits and limits_of(rows.device).tma
        sides = (rows, weight)
        if tma:
            sides = (
                descriptor(rows, blocking.rows, BK), descriptor(weight, blocking.columns, BK)
            )  # fmt: skip
        through = {"BK": BK, "TAIL": TAIL, "LOADS": blocking.loads, "TMA": tma}
        return *sides, 2 if blocking.rehearsed else 1, _size(blocking) | through

    def _weights_of(self, number: int) -> Tensor | None:
        """The weights of a stage, where it has any and half of the second cache holds them."""
        plan, w = self.plan, self.packed
        if number >= len(plan.stages):
            return None
        stage = plan.stages[number]
        of = {"qkv": w.qkv, "out_proj": w.out, "gate_up": w.gate_up, "down": w.down}
        if stage.kind in of:
            weight = of[stage.kind][stage.layer]
        elif stage.kind == "head":
            weight = w.head
        else:
            return None
        if weight.device.type != "cuda":
            return None
        cache = torch.cuda.get_device_properties(weight.device).L2_cache_size
        return weight if 2 * weight.nbytes <= cache and weight.data_ptr() % 16 == 0 else None

    def _place_for_chunks(self) -> None:
        """Where attention's chunks leave their parts and count themselves, for all layers: places
        that launches of a kernel for each stage need."""
        blocking, plan, x = self.blockings["attention"], self.plan, self.buffers.x
        self._chunks = -(-plan.sequence // blocking.chunk) if blocking.chunk and self._staged else 1
        self._chunk_parts: Tensor | None = None
        self._arrived: Tensor | None = None
        if self._chunks > 1:
            if blocking.chunk % max(blocking.rows, blocking.columns):
                raise ValueError(f"{blocking}: no chunk of whole tiles and blocks")
            tiles = -(-plan.sequence // blocking.rows) * self.config.n_heads * plan.batch
            size = blocking.rows * (padded(self.config.head_dim) + 2)
            numbers = tiles * self._chunks * size
            self._chunk_parts = torch.empty(numbers, dtype=torch.float32, device=x.device)
            self._arrived = torch.zeros(tiles, dtype=torch.int32, device=x.device)


def _size(blocking: Blocking) -> dict[str, Any]:
    return {"BM": blocking.rows, "BN": blocking.columns}


def _heads(config: ModelConfig) -> dict[str, Any]:
    return {"H": config.n_heads, "K": config.n_kv_heads, "E": config.head_dim}


def descriptor(tensor: Tensor, rows: int, columns: int) -> Any:
    """How the tensor memory accelerator fetches blocks of a matrix."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns])


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
