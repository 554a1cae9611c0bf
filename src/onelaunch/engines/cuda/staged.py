"""A whole forward, one launch a stage."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.engines.cuda.blocking import Blocking, blocks, default, inner_of, padded, tilings
from onelaunch.engines.cuda.pack import PackedModel, pack
from onelaunch.plan import Part, TilePlan, make_plan, make_tiles, part_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Buffers:
    """tokens: (N,), int32; x: (N, D); parts: (parts of a row, N), float32; qkv: (layers that have
    their own, N, (H + 2 K) E); mixed: (N, H E); hidden: (N, F); logits: (rows, V)."""

    tokens: Tensor
    x: Tensor
    parts: Tensor
    qkv: Tensor
    mixed: Tensor
    hidden: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Call:
    """A kernel, its grid, its arguments in order, its options."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(self) -> None:
        self.kernel[(self.programs,)](*self.arguments, **self.options)

    def compile(self) -> Any:
        """The compiled kernel; nothing is launched."""
        return self.kernel.warmup(*self.arguments, grid=(self.programs,), **self.options)


class StagedForward:
    """Logits of whole texts. Weights as checkpoints name them; raises TypeError for a dtype that
    the stages do not compute in. `blockings` are of the kinds that are not to be cut as the rule
    has it."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
        blockings: Mapping[str, Blocking] | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise TypeError(f"the stages compute in float32, bfloat16 or float16, not {dtype}")
        self.config, self.dtype, self.device = config, dtype, device
        self.packed = pack(config, weights, dtype, device)
        self._blockings = dict(blockings or {})

    def logits(self, tokens_BS: Tensor, all_positions: bool = True) -> Tensor:
        """(B, S, V) in float32, or (B, 1, V) of the last positions. Texts shorter than the longest
        are padded behind, which changes nothing before."""
        batch, sequence = tokens_BS.shape
        bound = self.bind(batch, sequence, all_positions)
        bound.buffers.tokens.copy_(tokens_BS.flatten())
        bound.run()
        return bound.buffers.logits.view(batch, -1, self.config.vocab_size)

    def bind(
        self,
        batch: int,
        sequence: int,
        all_positions: bool = True,
        logits_dtype: torch.dtype = torch.float32,
    ) -> BoundForward:
        """The forward of one shape, with buffers of its own."""
        shape = Shape(batch, sequence, all_positions, logits_dtype)
        return BoundForward(self.config, self.packed, shape, self._blockings)


@dataclass(frozen=True)
class Shape:
    """What a forward is bound to. Of a part (plan/parts.py) the result is x, and logits are not
    written."""

    batch: int
    sequence: int
    all_positions: bool = True
    logits_dtype: torch.dtype = torch.float32
    part: Part = "whole"


class BoundForward:
    """A forward of one shape: `buffers.tokens` in, `run`, `buffers.logits` out."""

    qkv_buffers = 1

    def __init__(
        self,
        config: ModelConfig,
        packed: PackedModel,
        shape: Shape,
        blockings: Mapping[str, Blocking],
    ) -> None:
        batch, sequence = shape.batch, shape.sequence
        rows, dtype, device = batch * sequence, packed.embedding.dtype, packed.embedding.device
        self.config, self.packed = config, packed
        self.blockings = default(config, rows, dtype.itemsize) | dict(blockings)
        plan = make_plan(config, batch, sequence, all_positions=shape.all_positions)
        part = part_of(plan, shape.part)
        self.tiles: TilePlan = make_tiles(part, tilings(config, self.blockings))
        columns = self.blockings["down"].columns
        assert columns == self.blockings["out_proj"].columns == self.blockings["embed"].columns
        self.parts = -(-config.dim // columns)

        def empty(*extents: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(*extents, dtype=dtype, device=device)

        self.buffers = Buffers(
            empty(rows, dtype=torch.int32),
            empty(rows, config.dim),
            empty(self.parts, rows, dtype=torch.float32),
            empty(self.qkv_buffers, rows, config.q_dim + 2 * config.kv_dim),
            empty(rows, config.q_dim),
            empty(rows, config.hidden_dim),
            empty(*plan.buffer("logits").shape, dtype=shape.logits_dtype).flatten(0, 1),
        )
        self.calls = self._calls()

    def _calls(self) -> list[Call]:
        return [self._call(number) for number in range(len(self.tiles.plan.stages))]

    def run(self) -> None:
        """Launch it on the current stream."""
        for call in self.calls:
            call()

    def check(self) -> None:
        """Raise EngineTimeout where a forward was given up. One launch a stage never waits."""

    def captured(self) -> torch.cuda.CUDAGraph:
        """The forward as a CUDA graph, which reads and writes the same buffers."""
        for call in self.calls:
            share_first_cache(call.compile())
        self.run()
        torch.cuda.synchronize(self.buffers.x.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run()
        return graph

    def _call(self, number: int) -> Call:
        from onelaunch.engines.cuda import kernels, stages
        from onelaunch.operators.handles import dependent_launch

        c, w, b, plan = self.config, self.packed, self.buffers, self.tiles.plan
        stage = plan.stages[number]
        layer, blocking = stage.layer, self.blockings[stage.kind]
        mode = stages.DEPENDENT if dependent_launch(b.x.device) else stages.AFTER
        inner = inner_of(c, stage.kind)
        BK, TAIL = blocks(inner, blocking)
        size = {"BM": blocking.rows, "BN": blocking.columns}
        through = {"BK": BK, "TAIL": TAIL, "LOADS": blocking.loads}
        norm = {"PARTS": self.parts}
        n, passes = b.x.shape[0], 2 if blocking.rehearsed else 1
        heads = {"H": c.n_heads, "K": c.n_kv_heads, "E": c.head_dim}
        given: tuple[Any, ...]
        constants: dict[str, Any]
        kernel: Callable[..., Any]
        match stage.kind:
            case "embed":
                kernel, given = kernels.embed_kernel, (b.tokens, w.embedding, b.x, b.parts, n)
                constants = {"D": c.dim} | size
            case "qkv":
                kernel = kernels.qkv_kernel
                norms = None if w.norms is None else w.norms[layer]
                given = (
                    b.x, b.parts, w.qkv[layer], norms, w.cos, w.sin, b.qkv, passes, n,
                    plan.sequence, c.norm_eps,
                )  # fmt: skip
                step = self.tiles.tilings["qkv"].columns
                constants = {"D": c.dim, "QK_NORM": c.qk_norm, "STEP": step}
                constants |= heads | norm | size | through
            case "attention":
                kernel = kernels.attention_kernel
                given = (b.qkv, b.mixed, plan.sequence, c.head_dim**-0.5)
                constants = heads | size
                constants |= {"WIDTH": padded(c.head_dim), "LOADS": blocking.loads}
            case "out_proj" | "down":
                kernel = kernels.add_product_kernel
                y, weight = (b.mixed, w.out) if stage.kind == "out_proj" else (b.hidden, w.down)
                given = (y, weight[layer], b.x, b.parts, passes, n)
                constants = {"INNER": inner, "D": c.dim} | size | through
            case "gate_up":
                kernel = kernels.gate_up_kernel
                given = (b.x, b.parts, w.gate_up[layer], b.hidden, passes, n, c.norm_eps)
                constants = {"D": c.dim, "F": c.hidden_dim} | norm | size | through
            case "head":
                kernel, rows = kernels.head_kernel, b.logits.shape[0]
                given = (
                    b.x, b.parts, w.head, b.logits, passes, rows, n // rows, c.norm_eps,
                )  # fmt: skip
                constants = {"D": c.dim, "V": c.vocab_size} | norm | size | through
            case _:
                raise ValueError(f"no kernel for {stage.kind}")
        constants["MODE"] = mode.value
        options = constants | {"num_warps": blocking.warps}
        if mode == stages.DEPENDENT:
            options["launch_pdl"] = True
        return Call(kernel, self.tiles.phases[number].tiles, given, options)


def share_first_cache(compiled: Any) -> None:
    """Have a multiprocessor give its first cache to shared memory, as much as it can. Between
    kernels that want it divided in different ways a multiprocessor must run empty: with all of them
    alike, the stages of a 15-million-parameter model took 138 us in place of 158."""
    if torch.version.hip is not None:
        return
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:  # another system's name for it: slower, not wrong
        return
    compiled.run  # noqa: B018 - loads the kernel onto the device
    carveout = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, in percent
    driver.cuFuncSetAttribute(ctypes.c_void_p(compiled.function), carveout, 100)
