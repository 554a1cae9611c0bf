"""One launch that writes many tokens of one sequence (text.cu), bound to a session's cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from onelaunch.compilation.cache import Store
from onelaunch.config import ModelConfig
from onelaunch.engines.cuda import nvrtc
from onelaunch.engines.cuda.decoding.sampling import STOP_IDS
from onelaunch.engines.cuda.pack import PackedModel
from onelaunch.engines.cuda.program import TIMEOUT_NS, limits_of
from onelaunch.errors import EngineTimeout

SOURCES = ("device.cu", "parts.cu", "text.cu")
WARPS = 8
SLOT_BYTES = 16384
MIN_SLOTS, MAX_SLOTS = 4, 32
REPLICAS = 8
CHUNKS = 8
"""Of a sequence's context, about, at most."""
_NUMBERS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


def why_not(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a model's texts cannot be written in one launch; None where they can."""
    c = config
    if device.type != "cuda" or torch.version.hip is not None:
        return "it needs an NVIDIA GPU"
    if torch.cuda.get_device_capability(device)[0] < 9:
        return "it needs compute capability 9.0"
    if c.dim % 8 or c.head_dim % 8 or c.hidden_dim % 4:
        return "its widths are not of multiples of 8"
    limits = limits_of(device)
    if _slots(c, dtype, limits.multiprocessors, limits.shared_bytes) < MIN_SLOTS:
        return "it does not fit into shared memory"
    return nvrtc.why_not()


def _slot_bytes(config: ModelConfig, itemsize: int, ctas: int) -> int:
    """Of a slot of the ring: 16 rows of the head or some more, or eight of a wide one; and the rows
    that a warp takes at once of the other weights."""
    c = config
    rows = 16 * c.dim * itemsize
    rows = -(-SLOT_BYTES // rows) * rows if rows <= 1.5 * SLOT_BYTES else rows // 2
    of_warp = -(-c.dim // (ctas * WARPS))
    return max(rows, min(4, of_warp + of_warp % 2) * max(c.hidden_dim, c.q_dim) * itemsize)


def _slots(config: ModelConfig, dtype: torch.dtype, ctas: int, shared_bytes: int) -> int:
    """Slots of the ring that a CTA has room for."""
    c = config
    numbers = c.dim + max(c.q_dim, c.hidden_dim)
    floats = (
        (3 + WARPS) * c.head_dim
        + (WARPS + 1) * (c.head_dim + 2)
        + max(16, -(-c.dim // ctas))
        + 8
        + 3 * (ctas + WARPS)
    )
    taken = numbers * dtype.itemsize + 4 * floats + 1024  # alignment, barriers and counters
    return min(MAX_SLOTS, (shared_bytes - taken) // _slot_bytes(c, dtype.itemsize, ctas))


def macros(
    config: ModelConfig, dtype: torch.dtype, ctas: int, shared_bytes: int, trace: int = 0
) -> dict[str, object]:
    """What text.cu is compiled with. `trace`: marks of a CTA, none where it is 0."""
    c = config
    return {
        "D": c.dim, "H": c.n_heads, "KV": c.n_kv_heads, "E": c.head_dim, "F": c.hidden_dim,
        "V": c.vocab_size, "LAYERS": c.n_layers, "GRID": ctas, "WARPS": WARPS,
        "SLOT_BYTES": _slot_bytes(c, dtype.itemsize, ctas),
        "SLOTS": _slots(c, dtype, ctas, shared_bytes),
        "SHARED_BYTES": shared_bytes, "DTYPE": _NUMBERS[dtype], "QK_NORM": int(c.qk_norm),
        "EPS": f"{c.norm_eps!r}f", "SCALE": f"{c.head_dim**-0.5!r}f", "TRACE": trace,
        "REPLICAS": REPLICAS,
    }  # fmt: skip


@cache
def source() -> str:
    """The kernel's source."""
    folder = Path(__file__).parent
    return "".join((folder / name).read_text(encoding="utf-8") for name in SOURCES)


class Mailbox:
    """What a launch writes into, free again when it has ended: words of `stride` numbers a copy, on
    the device; on the host, pinned, `written` (max_len,) and `ending` (2,)."""

    def __init__(self, stride: int, max_len: int, device: torch.device) -> None:
        self.stride, self.max_len = stride, max_len
        self.words = torch.zeros(REPLICAS * stride, dtype=torch.int64, device=device)
        self.status = torch.zeros(1, dtype=torch.int32, device=device)
        self.stop = torch.full((STOP_IDS,), -1, dtype=torch.int32, device=device)
        self.written = torch.zeros(max_len, dtype=torch.int64, pin_memory=True)
        self.ending = torch.zeros(2, dtype=torch.int32, pin_memory=True)
        self.started = torch.cuda.Event(enable_timing=True)
        self.ended = torch.cuda.Event(enable_timing=True)
        self.epoch = 1

    def clear(self) -> None:
        """No word has an epoch."""
        self.words.zero_()
        self.status.zero_()
        self.epoch = 1


class TextKernel:
    """The kernel of a model's shape for a device, of `ctas` CTAs, by default one a
    multiprocessor."""

    def __init__(
        self,
        config: ModelConfig,
        packed: PackedModel,
        store: Store | None = None,
        ctas: int | None = None,
        trace: int = 0,
    ) -> None:
        device, dtype = packed.embedding.device, packed.embedding.dtype
        self.config, self.packed, self.trace = config, packed, trace
        limits = limits_of(device)
        self.ctas, shared_bytes = ctas or limits.multiprocessors, limits.shared_bytes
        major, minor = torch.cuda.get_device_capability(device)
        code = nvrtc.compiled(
            source(),
            macros(config, dtype, self.ctas, shared_bytes, trace),
            f"sm_{major}{minor}",
            store,
        )
        self.function = nvrtc.Function(code, "write_text", device, shared_bytes)
        p = packed
        weights = (p.embedding, p.qkv, p.norms, p.out, p.gate_up, p.down, p.head, p.cos, p.sin)
        self.model = _pointers(weights, device)
        self.token_seconds: float | None = None  # that the last launch took
        self._free: list[Mailbox] = []

    def take_mailbox(self, max_len: int) -> Mailbox:
        """One that no launch writes into, for texts of up to `max_len` positions."""
        for mailbox in self._free:
            if mailbox.max_len >= max_len:
                self._free.remove(mailbox)
                return mailbox
        c = self.config
        chunks = -(-max_len // (16 * WARPS * _passes(max_len)))
        words = c.q_dim + 2 * c.kv_dim + 2 * c.dim + c.hidden_dim + 6 * self.ctas
        words += chunks * (c.q_dim + c.n_heads)
        return Mailbox(-(-words // 16) * 16, max_len, self.packed.embedding.device)

    def give_back(self, mailbox: Mailbox) -> None:
        """Its launches have ended."""
        self._free.append(mailbox)


def _passes(max_len: int) -> int:
    """How often a CTA takes 16 positions a warp of its chunk."""
    return -(-max_len // (16 * WARPS * CHUNKS))


class Text:
    """Writes into a session's cache: keys and values, (L, S, K, context, E) each. One launch at a
    time; its tokens are there as they come."""

    def __init__(
        self, kernel: TextKernel, keys: Tensor, values: Tensor, timeout_ns: int = TIMEOUT_NS
    ) -> None:
        self._kernel, self._slots, self._max_len = kernel, keys.shape[1], keys.shape[3]
        self._timeout_ns, self._passes = timeout_ns, _passes(keys.shape[3])
        self._cache = keys, values
        self._mailbox: Mailbox | None = kernel.take_mailbox(self._max_len)
        m = self._mailbox
        tensors = (keys, values, m.words, m.status, m.written, m.ending, m.stop)
        self._memory = _pointers(tensors, keys.device)
        self._written: np.ndarray = m.written.numpy()
        self.marks = torch.zeros(
            kernel.ctas * max(1, kernel.trace), dtype=torch.int64, device=keys.device
        )

    def stop_at(self, ids: Sequence[int]) -> None:
        """Set the ids that end a text: the first STOP_IDS of these."""
        row = list(ids[:STOP_IDS])
        row += [-1] * (STOP_IDS - len(row))
        self._box.stop.copy_(torch.tensor(row, dtype=torch.int32))

    def launch(self, slot: int, token: int, position: int, n: int) -> None:
        """Begin to write `n` tokens after one at a position; the launch before has ended."""
        box, layers = self._box, self._kernel.config.n_layers
        if box.epoch + (n + 1) * layers >= 1 << 31:
            box.clear()
        self._written[:n] = _ABSENT
        arguments = [
            (self._kernel.model.data_ptr(), nvrtc.POINTER),
            (self._memory.data_ptr(), nvrtc.POINTER),
            (slot, nvrtc.INT), (self._slots, nvrtc.INT), (self._max_len, nvrtc.INT),
            (token, nvrtc.INT), (position, nvrtc.INT), (n, nvrtc.INT), (self._passes, nvrtc.INT),
            (box.stride, nvrtc.INT), (box.epoch, nvrtc.UINT), (self._timeout_ns, nvrtc.LONG),
        ]  # fmt: skip
        if self._kernel.trace:
            arguments.append((self.marks.data_ptr(), nvrtc.POINTER))
        box.epoch += (n + 1) * layers
        box.started.record()
        self._kernel.function.launch(self._kernel.ctas, 32 * (WARPS + 1), arguments)
        box.ended.record()

    def wait_for_one(self) -> None:
        """Until the launch has written a token, or has ended without one."""
        while self._written[0] == _ABSENT and not self._box.ended.query():
            pass

    def arrived(self, first: int = 0) -> tuple[list[int], list[float]]:
        """The tokens that the launch has written, from number `first` on, and their logprobs."""
        words = self._written[first:].copy()
        (absent,) = (words == _ABSENT).nonzero()
        return _unpacked(words[: absent[0]] if len(absent) else words)

    def finish(self, first: int = 0) -> tuple[list[int], list[float], int]:
        """Wait for the launch to end: its tokens from number `first` on, their logprobs, and what
        ended it. Raises EngineTimeout where a wait timed out."""
        box = self._box
        box.ended.synchronize()
        count, ending = box.ending.tolist()
        if ending < 0:
            where = int(box.status)
            box.clear()
            raise EngineTimeout(f"a text timed out after {count} tokens, at {where:#x}")
        self._kernel.token_seconds = box.started.elapsed_time(box.ended) / 1e3 / max(1, count)
        return *_unpacked(self._written[first:count]), ending

    def close(self) -> None:
        """Wait for the launch to end, and let go of its memory."""
        if self._mailbox is not None:
            self._mailbox.ended.synchronize()
            self._kernel.give_back(self._mailbox)
            self._mailbox = None

    @property
    def token_seconds(self) -> float | None:
        """That a token of the last launch took."""
        return self._kernel.token_seconds

    @property
    def _box(self) -> Mailbox:
        assert self._mailbox is not None, "closed"
        return self._mailbox


_ABSENT = -1


def _unpacked(words: np.ndarray) -> tuple[list[int], list[float]]:
    tokens: list[int] = (words & 0xFFFFFFFF).tolist()
    logprobs: list[float] = (words >> 32).astype(np.int32).view(np.float32).tolist()
    return tokens, logprobs


def _pointers(tensors: tuple[Tensor | None, ...], device: torch.device) -> Tensor:
    """Addresses of tensors, on the device."""
    at = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    return torch.tensor(at, dtype=torch.int64).to(device)
