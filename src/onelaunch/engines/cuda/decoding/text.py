"""Kernels that write many tokens in one launch, bound to a session's cache: texts.cu, of one or
several sequences, on tensor cores; and text.cu, of one sequence, whose numbers and widths may be
others."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from onelaunch.compilation.cache import Store
from onelaunch.config import ModelConfig
from onelaunch.engines.cuda import nvrtc
from onelaunch.engines.cuda.decoding import STOP_IDS
from onelaunch.engines.cuda.decoding.grids import (
    BINS,
    MORE_WARPS,
    ROUNDS,
    WARPS,
    Grid,
    grid_for,
    padded,
    slot_bytes,
    slots,
    tile_units,
)
from onelaunch.engines.cuda.pack import PackedModel
from onelaunch.engines.cuda.program import TIMEOUT_NS, limits_of
from onelaunch.engines.engine import Request
from onelaunch.engines.sampling import float32_penalty, request_uniforms
from onelaunch.errors import EngineTimeout

_NUMBERS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_ROW_INTS = 10  # a row, and what it is drawn by
_ABSENT = -1  # a word that no token has been written into
# of a kernel's arguments: what comes first, and numbers that come next
_STRUCTURES, _NUMBERS_OF_ONE, _NUMBERS_OF_SEVERAL = 2, 8, 5


class Row(NamedTuple):
    """A sequence of a launch: where its cache is, its last token and its position, how many new
    tokens it is to have at most, and how many it has."""

    slot: int
    token: int
    position: int
    n: int
    first: int = 0


class Ended(NamedTuple):
    """What a launch has written of a row, from some token on, a word each, and how it ended."""

    words: np.ndarray
    how: int

    @property
    def last(self) -> int:
        """Its last token."""
        return int(self.words[-1] & 0xFFFFFFFF)

    def unpacked(self) -> tuple[list[int], list[float]]:
        """Its tokens and their logprobs."""
        tokens: list[int] = (self.words & 0xFFFFFFFF).tolist()
        logprobs: list[float] = (self.words >> 32).astype(np.int32).view(np.float32).tolist()
        return tokens, logprobs


def tiled(weight: Tensor) -> Tensor:
    """Rows, (..., R, K), as texts.cu reads them: of each 16 rows, some of which may be zeros, and
    32 columns the 8 numbers of each lane."""
    *layers, rows, columns = weight.shape
    weight = torch.nn.functional.pad(weight, (0, 0, 0, -rows % 16))
    in_parts = weight.reshape(-1, -(-rows // 16), 2, 8, columns // 32, 4, 2, 2, 2)
    return in_parts.permute(0, 1, 4, 6, 3, 5, 7, 2, 8).reshape(*layers, -1, columns).contiguous()


def kernel_weights(
    config: ModelConfig, packed: PackedModel, grid: Grid
) -> tuple[Tensor | None, ...]:
    """A model as a kernel has it, in the order of its struct `Model`."""
    p = packed
    qkv, out, gate_up, down, head = p.qkv, p.out, p.gate_up, p.down, p.head
    if grid.tiles:
        more = padded(config, grid).hidden_dim - config.hidden_dim
        gate_up = torch.nn.functional.pad(gate_up, (0, 0, 0, 2 * more))
        down = torch.nn.functional.pad(down, (0, more))
        qkv, out, gate_up, down, head = map(tiled, (qkv, out, gate_up, down, head))
    return p.embedding, qkv, p.norms, out, gate_up, down, head, p.cos, p.sin


def macros(
    config: ModelConfig,
    dtype: torch.dtype,
    grid: Grid,
    shared_bytes: int,
    draws: bool = False,
    trace: int = 0,
    delays_ns: int = 0,
) -> dict[str, object]:
    """What a kernel is compiled with. `draws`: whether tokens are drawn. `trace`: of one sequence,
    marks of a CTA, none where it is 0. `delays_ns`: how long warps sleep now and then, for
    tests."""
    c = padded(config, grid)
    shape = {
        "D": c.dim, "H": c.n_heads, "KV": c.n_kv_heads, "E": c.head_dim, "F": c.hidden_dim,
        "V": c.vocab_size, "LAYERS": c.n_layers, "GRID": grid.ctas, "WARPS": WARPS,
        "SLOT_BYTES": slot_bytes(c, dtype.itemsize, grid),
        "SLOTS": slots(c, dtype, grid, shared_bytes, draws),
        "SHARED_BYTES": shared_bytes, "DTYPE": _NUMBERS[dtype], "QK_NORM": int(c.qk_norm),
        "EPS": f"{c.norm_eps!r}f", "SCALE": f"{c.head_dim**-0.5!r}f", "REPLICAS": grid.replicas,
        "DELAYS": delays_ns, "DRAWS": int(draws), "TRACE": trace,
    }  # fmt: skip
    if not grid.tiles:
        return shape
    alone, units = int(grid.alone(c)), tile_units(c, grid.sequences)
    return shape | {
        "SEQUENCES": grid.sequences, "ALONE": alone, "CHUNKS": grid.chunks(c), "TILE_UNITS": units,
    }  # fmt: skip


@cache
def source(tiles: bool = True) -> str:
    """A kernel's source."""
    own = ("draws.cu", "texts.cu") if tiles else ("draw.cu", "text.cu")
    folder, names = Path(__file__).parent, ("device.cu", "parts.cu", "search.cu", *own)
    return "".join((folder / name).read_text(encoding="utf-8") for name in names)


class Mailbox:
    """What launches read and write, free again when they have ended: on the device words, `copies`
    of `stride` each, and of each sequence its stop ids; on the host, pinned, `written` (sequences,
    max_len), `ending` (sequences, 2) and `rows` (sequences, 10). Where tokens are drawn, too, on
    the device: `sums`, of each slot random numbers and the text's tokens, and `n_logits`."""

    def __init__(
        self, grid: Grid, stride: int, n_logits: int, max_len: int, device: torch.device
    ) -> None:
        sequences = grid.groups * grid.sequences

        def on_device(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        def on_host(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, pin_memory=device.type == "cuda")

        self.stride, self.max_len = stride, max_len
        self.words = on_device(grid.groups * grid.replicas * stride, dtype=torch.int64)
        self.status, self.rows_there = on_device(1), on_device(sequences, _ROW_INTS)
        self.stop = on_device(sequences, STOP_IDS).fill_(-1)
        self.written = on_host(sequences, max_len, dtype=torch.int64)
        self.ending, self.rows = on_host(sequences, 2), on_host(sequences, _ROW_INTS)
        self.started = torch.cuda.Event(enable_timing=True)
        self.ended = torch.cuda.Event(enable_timing=True)
        self.stop_ids = [(-1,) * STOP_IDS] * sequences  # that `stop` has
        kept = sequences if n_logits else 0
        rounds = 2 * ROUNDS * grid.groups if grid.tiles else ROUNDS
        self.sums = on_device(rounds * (BINS * grid.sequences + 16), dtype=torch.int64)
        self.uniforms = on_device(kept, max_len, dtype=torch.float32)
        self.history = on_device(kept, max_len)
        self.logits = on_device(kept if grid.tiles else 0, n_logits, dtype=torch.float32)
        self.drawn: list[Request | None] = [None] * sequences  # whose they are, by slot
        self.epoch = 1

    def clear(self) -> None:
        """No word has an epoch."""
        self.words.zero_()
        self.sums.zero_()
        self.status.zero_()
        self.epoch = 1


class TextKernel:
    """The kernel of a model's shape for one sequence, whose tokens are the most likely ones or are
    drawn, or for several, and for a device. `grid` is by default that of one sequence; `code` what
    `compile` gave."""

    def __init__(
        self,
        config: ModelConfig,
        packed: PackedModel,
        store: Store | None = None,
        grid: Grid | None = None,
        draws: bool = False,
        trace: int = 0,
        delays_ns: int = 0,
        code: bytes | None = None,
    ) -> None:
        device = packed.embedding.device
        self.config, self.packed, self.trace = config, packed, trace
        limits = limits_of(device)
        dtype = packed.embedding.dtype
        self.grid = grid or grid_for(config, dtype, 1, limits.multiprocessors, limits.shared_bytes)
        self.draws, shared_bytes = draws, limits.shared_bytes
        self.sequences = self.grid.groups * self.grid.sequences
        self.ctas = self.grid.groups * self.grid.ctas
        if code is None:
            code = self.compile(config, packed, store, self.grid, draws, trace, delays_ns)
        name = "write_texts" if self.grid.tiles else "write_text"
        self.function = nvrtc.Function(code, name, device, shared_bytes)
        self._weights = kernel_weights(config, packed, self.grid)
        self.model = nvrtc.addresses(self._weights)
        self.token_seconds: float | None = None  # of the last launch
        self._free: list[Mailbox] = []

    @staticmethod
    def compile(
        config: ModelConfig,
        packed: PackedModel,
        store: Store | None,
        grid: Grid,
        draws: bool,
        trace: int = 0,
        delays_ns: int = 0,
    ) -> bytes:
        """Its machine code. Needs no GPU's context, so that any thread may call it."""
        device, dtype = packed.embedding.device, packed.embedding.dtype
        major, minor = torch.cuda.get_device_capability(device)
        shared_bytes = limits_of(device).shared_bytes
        names = macros(config, dtype, grid, shared_bytes, draws, trace, delays_ns)
        return nvrtc.compiled(source(grid.tiles), names, f"sm_{major}{minor}a", store)

    def take_mailbox(self, max_len: int) -> Mailbox:
        """One that no launch writes into, for texts of up to `max_len` positions."""
        for mailbox in self._free:
            if mailbox.max_len == max_len:
                self._free.remove(mailbox)
                return mailbox
        c, grid = padded(self.config, self.grid), self.grid
        chunks = grid.chunks(c)
        words = c.q_dim + 2 * c.kv_dim + 2 * c.dim + c.hidden_dim + 11 * grid.ctas + 2
        words = grid.sequences * (words + chunks * (c.q_dim + c.n_heads + 1)) + 1
        device, n_logits = self.packed.embedding.device, c.vocab_size if self.draws else 0
        return Mailbox(grid, -(-words // 16) * 16, n_logits, max_len, device)

    def give_back(self, mailbox: Mailbox) -> None:
        """Its launches have ended."""
        self._free.append(mailbox)
        del self._free[:-4]


class Text:
    """Writes into a session's cache: keys and values, (L, S, K, context, E) each. One launch at a
    time; its tokens are there as they come."""

    def __init__(
        self, kernel: TextKernel, keys: Tensor, values: Tensor, timeout_ns: int = TIMEOUT_NS
    ) -> None:
        self._kernel, self._slots, self._max_len = kernel, keys.shape[1], keys.shape[3]
        self._timeout_ns = timeout_ns
        self._passes = kernel.grid.passes(kernel.config, self._max_len)
        self._cache = keys, values
        self._mailbox: Mailbox | None = kernel.take_mailbox(self._max_len)
        m = self._mailbox
        rows = (m.rows_there,) if kernel.grid.tiles else ()
        tensors = (
            keys, values, m.words, m.status, m.written, m.ending, m.stop, *rows, m.sums, m.uniforms,
            m.history, m.logits,
        )  # fmt: skip
        memory = nvrtc.addresses(tensors)
        self._written: np.ndarray = m.written.numpy()
        self._limits: list[int] = []  # tokens of each row of the launch at most
        self._state = np.zeros((0, 5), dtype=np.int64)  # its rows
        # of the launch before: how many tokens there were of each row, and the last ones
        self._counts = self._lasts = np.zeros(0, dtype=np.int64)
        self._prepared: list[tuple[int, Request] | None] = [None] * kernel.sequences  # by row
        self._by = [(0, 0.0, 1.0, 0.0, 1.0)] * kernel.sequences  # what each row is drawn by
        self._rows: np.ndarray = m.rows.numpy()
        self._ending: np.ndarray = m.ending.numpy()
        self.marks = torch.empty(0, dtype=torch.int64)
        if kernel.trace:
            self.marks = torch.zeros(kernel.ctas, kernel.trace, dtype=torch.int64).to(keys.device)
        self._arguments = nvrtc.Arguments([kernel.model, memory, *self._places()])

    @property
    def sequences(self) -> int:
        """Of one launch at most."""
        return self._kernel.sequences

    @property
    def token_seconds(self) -> float | None:
        """That a token of each sequence took in the last launch; None before the first."""
        return self._kernel.token_seconds

    def prepare(self, row: int, slot: int, request: Request, limit: int) -> None:
        """Set the ids that end the text of a row of the launches to come, the first STOP_IDS of
        them, and by what up to `limit` tokens of a request are drawn."""
        before = self._prepared[row]
        if before is not None and before[0] == slot and before[1] is request:
            return
        self._prepared[row] = slot, request
        box, first = self._box, tuple(request.stop_ids[:STOP_IDS])
        first += (-1,) * (STOP_IDS - len(first))
        if first != box.stop_ids[row]:
            box.stop[row].copy_(torch.tensor(first, dtype=torch.int32))
            box.stop_ids[row] = first
        if not self._kernel.draws:
            return
        sampling, most = request.sampling, self._kernel.config.vocab_size
        penalty = float32_penalty(sampling.repetition_penalty)
        of_filters = sampling.temperature, sampling.top_p, sampling.min_p, penalty
        self._by[row] = min(sampling.top_k, most), *of_filters
        self._rows[row, 5] = self._by[row][0]
        self._rows[row, 6:] = np.array(of_filters, dtype=np.float32).view(np.int32)
        if box.drawn[slot] is not request:
            uniforms_N = request_uniforms(request, limit)
            if uniforms_N is not None:
                box.uniforms[slot, :limit].copy_(uniforms_N)
            if request.sampling.penalises:
                prompt = torch.tensor(request.prompt_ids, dtype=torch.int32)
                box.history[slot, : len(prompt)].copy_(prompt)
            box.drawn[slot] = request

    def launch(self, rows: Sequence[Row]) -> None:
        """Begin to write; the launch before has ended, and each row is prepared."""
        self._state = np.array(rows, dtype=np.int64)
        self._start()

    def go_on(self, n: int) -> None:
        """Begin to write n more tokens of each row of the launch that has ended, in which none of
        them has: the same as `launch`, in less time where there are many."""
        slots, _, positions, _, firsts = self._state.T
        self._state = np.stack(
            [slots, self._lasts, positions + self._counts, np.full_like(slots, n),
             firsts + self._counts], 1,
        )  # fmt: skip
        self._start()

    def _start(self) -> None:
        box, layers = self._box, self._kernel.config.n_layers
        limits = self._state[:, 3]
        n = int(limits.max())
        if box.epoch + (n + 1) * layers >= 1 << 31:
            box.clear()
        self._written[: len(limits), :n] = _ABSENT
        self._limits = limits.tolist()
        self._arguments.set(_STRUCTURES, [*self._numbers(n), box.epoch])
        if self._kernel.draws and not self._kernel.grid.tiles:
            top_k, *fractions = self._by[0]
            drawn = [top_k, int(self._state[0, 4]), *fractions]
            self._arguments.set(_STRUCTURES + _NUMBERS_OF_ONE + 2, drawn)
        box.epoch += (n + 1) * layers
        box.started.record()
        threads = 32 * (WARPS + MORE_WARPS)
        self._kernel.function.launch(self._kernel.ctas, threads, self._arguments)
        box.ended.record()

    def _places(self) -> list[Any]:
        """Of the kernel's arguments after its structures."""
        tiles = self._kernel.grid.tiles
        numbers = [nvrtc.INT() for _ in range(_NUMBERS_OF_SEVERAL if tiles else _NUMBERS_OF_ONE)]
        places: list[Any] = [*numbers, nvrtc.UINT(), nvrtc.LONG(self._timeout_ns)]
        if self._kernel.draws and not tiles:
            places += [nvrtc.INT() for _ in range(2)] + [nvrtc.FLOAT() for _ in range(4)]
        if self._kernel.trace:
            places.append(nvrtc.POINTER(self.marks.data_ptr()))
        return places

    def _numbers(self, n: int) -> list[int]:
        """The kernel's arguments between its structures and the epoch."""
        box, state = self._box, self._state
        if not self._kernel.grid.tiles:
            slot, token, position = state[0, :3].tolist()
            one = [slot, self._slots, self._max_len, token, position, n]
            return [*one, self._passes, box.stride]
        self._rows[: len(state), :5] = state
        box.rows_there.copy_(box.rows, non_blocking=True)
        return [len(state), self._slots, self._max_len, n, box.stride]

    def wait_for_one(self, rows: Sequence[int]) -> None:
        """Until the launch has written a token of each of some rows, or has ended."""
        while any(self._written[row, 0] == _ABSENT for row in rows):
            if self._box.ended.query():
                return

    def ends_within(self, seconds: float) -> bool:
        """Wait for so long, or until the launch has ended; whether it has."""
        until = time.perf_counter() + seconds
        while not (ended := self._box.ended.query()) and time.perf_counter() < until:
            time.sleep(2e-5)
        return ended

    def arrived(self, row: int, first: int = 0) -> tuple[list[int], list[float]]:
        """The tokens that the launch has written of a row, from number `first` on, and their
        logprobs."""
        words = self._written[row, first : self._limits[row]].copy()
        (absent,) = (words == _ABSENT).nonzero()
        return Ended(words[: absent[0]] if len(absent) else words, 0).unpacked()

    def finish(self, firsts: Sequence[int]) -> list[Ended]:
        """Wait for the launch to end. Of each row its tokens from such a number on, and what ended
        it. Raises EngineTimeout where a wait timed out."""
        box = self._box
        box.ended.synchronize()
        self._counts = self._ending[: len(firsts), 0].astype(np.int64)
        counts, endings = self._ending[: len(firsts)].T.tolist()
        if min(endings) < 0:
            where = int(box.status) & 0x7FFFFFFF  # its highest bit is always set
            box.clear()
            raise EngineTimeout(f"a text timed out after {max(counts)} tokens, at {where:#x}")
        self._kernel.token_seconds = box.started.elapsed_time(box.ended) / 1e3 / max(1, *counts)
        words = self._written[: len(firsts), : max(counts)].copy()  # the next launch's come there
        if words.size:
            newest = np.maximum(self._counts - 1, 0)
            self._lasts = words[np.arange(len(newest)), newest] & 0xFFFFFFFF
        return [
            Ended(words[row, first:count], how)
            for row, (first, count, how) in enumerate(zip(firsts, counts, endings, strict=True))
        ]

    def close(self) -> None:
        """Wait for the launch to end, and let go of its memory."""
        if self._mailbox is not None:
            self._mailbox.ended.synchronize()
            if self._limits and self._ending.min() < 0:  # a time-out that was not reported
                self._mailbox.clear()
            self._kernel.give_back(self._mailbox)
            self._mailbox = None

    @property
    def _box(self) -> Mailbox:
        assert self._mailbox is not None, "closed"
        return self._mailbox
