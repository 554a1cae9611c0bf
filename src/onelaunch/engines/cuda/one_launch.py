"""A whole forward in one launch, or in a few."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.engines.cuda.blocking import (
    Blocking,
    at_once,
    blocks,
    default_fused,
    inner_of,
    padded,
)
from onelaunch.engines.cuda.calls import Call, CallAndProduct, on
from onelaunch.engines.cuda.pack import PackedModel
from onelaunch.engines.cuda.staged import BoundForward, Shape, limits_of
from onelaunch.errors import BadInput, EngineTimeout
from onelaunch.plan import Launch, launches

WARPS = 4
PATIENCE = 2_000_000_000  # nanoseconds that a tile waits for another


class FusedForward(BoundForward):
    """A forward of one shape at a fusion depth, with WARPS warps for every stage, whatever their
    blockings say, and nothing of what those say of a launch a stage. In place of a depth the
    launches themselves may be given, in order from embed on; they may end before the last stage.
    `programs` is how many run at once, one or two a multiprocessor unless it is given; all of them
    must fit on the device together.

    A traced one leaves its tiles' times in `records` (trace.py reads them); a delayed one sleeps
    before and after whatever its tiles wait for or say, as the number in `seed` has it (watch.py).
    """

    _staged = False
    _default = staticmethod(default_fused)

    def __init__(
        self,
        config: ModelConfig,
        packed: PackedModel,
        shape: Shape,
        blockings: Mapping[str, Blocking],
        depth: str | int | Sequence[Launch] = "all",
        programs: int | None = None,
        patience: int = PATIENCE,
        traced: bool = False,
        delayed: bool = False,
    ) -> None:
        if (traced or delayed) and torch.version.hip is not None:
            raise BadInput("traces and delays are written for NVIDIA's GPUs; leave them out")
        self._traced, self._delayed = traced, delayed
        self.qkv_buffers = config.n_layers
        self._depth, self._patience = depth, patience
        self._programs = programs
        super().__init__(config, packed, shape, blockings)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Where some of its launches were made and not all, the counters are cleared: they would
        be ahead of the epoch, and let later forwards pass."""
        try:
            yield
        except BaseException:
            self.sync.zero_()
            raise

    def last_call(self, logits: Tensor) -> Call | CallAndProduct:
        last = self.calls[-1]
        assert isinstance(last, Call)
        return last.with_tensor(self.buffers.logits, logits)

    @property
    def n_bytes(self) -> int:
        watched = [self.sync, self.records, self.seed]
        return super().n_bytes + sum(tensor.nbytes for tensor in watched if tensor is not None)

    def ask(self) -> None:
        """Have the status of what was launched brought to the host, without waiting for it."""
        from onelaunch.engines.cuda import sync

        self._told.copy_(self.sync[sync.STATUS], non_blocking=True)
        if self._asked is not None:
            self._asked.record()

    def told(self, wait: bool = True) -> None:
        """Raise EngineTimeout where the status that was last asked for says that a tile gave up
        waiting; logits behind it are NaN. Without `wait` a status that is not there yet is left to
        a later call."""
        from onelaunch.engines.cuda import sync

        if self._asked is not None:
            if not wait and not self._asked.query():
                return
            self._asked.synchronize()
        status = int(self._told)
        if not status:
            return
        self._told.zero_()
        self.sync.zero_()
        stage = self.plan.stages[(status - sync.GAVE_UP) >> sync.ROW_TILE_BITS]
        row_tile = status & ((1 << sync.ROW_TILE_BITS) - 1)
        raise EngineTimeout(
            f"a forward was given up: a tile waited {self._patience / 1e9:g} s for row tile "
            f"{row_tile} of {stage.label}; its logits are NaN"
        )

    def check(self) -> None:
        """Wait for the device; raise EngineTimeout where a tile gave up waiting."""
        with on(self.buffers.x.device):
            self.ask()
            self.told()

    def _calls(self) -> list[Call | CallAndProduct]:
        from onelaunch.engines.cuda import fused, sync

        c, w, b, plan = self.config, self.packed, self.buffers, self.plan
        n, row_tiles = b.x.shape[0], max(rows for rows, _ in self.counts)
        most_stages = sync.GAVE_UP >> sync.ROW_TILE_BITS
        if row_tiles >> sync.ROW_TILE_BITS or len(plan.stages) >= most_stages:
            raise BadInput(
                f"one launch: {row_tiles} row tiles of {len(plan.stages)} stages are more than it "
                f"counts, {1 << sync.ROW_TILE_BITS} of {most_stages}; run it stage by stage"
            )
        words = sync.COUNTERS + row_tiles * len(plan.stages)
        self.sync: Tensor = torch.zeros(words, dtype=torch.int32, device=b.x.device)
        gpu = b.x.device.type == "cuda"
        self._told = torch.zeros((), dtype=torch.int32, pin_memory=gpu)
        self._asked = torch.cuda.Event() if gpu else None
        self.records, self.seed = self._watched()
        depth = self._depth
        self.launches = launches(plan, depth) if isinstance(depth, str | int) else tuple(depth)
        constants = self._constants()
        rows = b.of.shape[0]
        most = self._programs or at_once(
            c, n, self.blockings, b.x.element_size(), limits_of(b.x.device)
        )
        found: list[Call | CallAndProduct] = []
        for launch in self.launches:
            ends = int(launch == self.launches[-1])
            given: tuple[Any, ...] = (
                b.tokens, w.embedding, b.x, b.parts, w.qkv, w.cos if w.norms is None else w.norms,
                w.cos, w.sin, b.qkv, b.mixed, w.out, w.gate_up, b.hidden, w.down, w.head, b.logits,
                b.of, w.bad_id, self.sync, self.records, self.seed, n, plan.sequence, rows,
                row_tiles,
                launch.first, launch.last, ends, self._patience,
                self.most_tiles if self._traced else None, c.norm_eps, c.head_dim**-0.5,
            )  # fmt: skip
            programs = min(most, self._tiles_of(launch))
            found.append(Call(fused.forward_kernel, programs, given, constants))
        return found

    def _watched(self) -> tuple[Tensor | None, Tensor | None]:
        """Records, (a place for each tile and one, words), and seed, where they are wanted."""
        from onelaunch.engines.cuda import watch

        device, tiles = self.buffers.x.device, [rows * columns for rows, columns in self.counts]
        # the last stage can have as many as it has: nothing lies behind
        self.most_tiles = max(tiles[:-1], default=0)
        places = 1 + self.most_tiles * (len(tiles) - 1) + tiles[-1]
        records = torch.zeros(places, watch.RECORD, dtype=torch.int64, device=device)
        seed = torch.zeros(1, dtype=torch.int32, device=device)
        return records if self._traced else None, seed if self._delayed else None

    def _tiles_of(self, launch: Launch) -> int:
        return sum(rows * columns for rows, columns in self.counts[launch.first : launch.last])

    def _constants(self) -> dict[str, Any]:
        from onelaunch.engines.cuda import stages

        c = self.config
        kinds = {stage.kind for stage in self.plan.stages}
        constants: dict[str, Any] = {
            "LAYERS": c.n_layers, "ATTENTION": "qkv" in kinds, "FFN": "down" in kinds,
            "D": c.dim, "H": c.n_heads, "K": c.n_kv_heads, "E": c.head_dim,
            "F": c.hidden_dim, "V": c.vocab_size, "QK_NORM": c.qk_norm, "PARTS": self.parts,
            "WIDTH": padded(c.head_dim),
            "X_BN": self.blockings["down"].columns, "EMBED_BM": self.blockings["embed"].rows,
            "QKV_STEP": self._tilings["qkv"].columns,
        }  # fmt: skip
        names = {"qkv": "QKV", "out_proj": "OUT", "gate_up": "GATE_UP", "down": "DOWN"}
        for kind, name in (names | {"head": "HEAD"}).items():
            blocking = self.blockings[kind]
            BK, TAIL = blocks(inner_of(c, kind), blocking)
            constants |= {
                f"{name}_BM": blocking.rows, f"{name}_BK": BK, f"{name}_TAIL": TAIL,
                f"{name}_LOADS": blocking.loads,
            }  # fmt: skip
            if kind not in ("out_proj", "down"):
                constants[f"{name}_BN"] = blocking.columns
        attention = self.blockings["attention"]
        constants |= {
            "ATTENTION_BM": attention.rows, "ATTENTION_BN": attention.columns,
            "ATTENTION_LOADS": attention.loads,
        }  # fmt: skip
        mode = stages.COUNTED_PTX if _nvidia() else stages.COUNTED
        options: dict[str, Any] = {"MODE": mode.value, "num_warps": WARPS}
        if self.buffers.x.device.type == "cuda":
            options["launch_cooperative_grid"] = True
        return constants | options


def _nvidia() -> bool:
    """Whether Triton compiles for NVIDIA's GPUs."""
    from triton.runtime import driver

    try:
        return bool(driver.active.get_current_target().backend == "cuda")
    except RuntimeError:  # no device: the interpreter, which has no use for the answer
        return False
