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
        + -(-c.dim // ctas)
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
    return (Path(__file__).parent / "text.cu").read_text(encoding="utf-8")


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


class Text:
    """Writes into a session's cache: keys and values, (L, S, K, context, E) each."""

    def __init__(
        self,
        kernel: TextKernel,
        keys: Tensor,
        values: Tensor,
        timeout_ns: int = TIMEOUT_NS,
    ) -> None:
        c, device = kernel.config, keys.device
        self._kernel, self._slots, self._max_len = kernel, keys.shape[1], keys.shape[3]
        self._timeout_ns = timeout_ns
        self._passes = -(-self._max_len // (16 * WARPS * CHUNKS))
        chunks = -(-self._max_len // (16 * WARPS * self._passes))
        n_words = (
            c.q_dim + 2 * c.kv_dim + 2 * c.dim + c.hidden_dim + 6 * kernel.ctas
            + chunks * (c.q_dim + c.n_heads)
        )  # fmt: skip
        self._stride = -(-n_words // 16) * 16
        self._words = torch.zeros(REPLICAS * self._stride, dtype=torch.int64, device=device)
        self._status = torch.zeros(1, dtype=torch.int32, device=device)
        self._stop = torch.full((STOP_IDS,), -1, dtype=torch.int32, device=device)
        self._written = torch.zeros(self._max_len, dtype=torch.int64, pin_memory=True)
        self._ending = torch.zeros(2, dtype=torch.int32, pin_memory=True)
        self.marks = torch.zeros(
            kernel.ctas * max(1, kernel.trace), dtype=torch.int64, device=device
        )
        self._keep = (keys, values)
        tensors = (keys, values, self._words, self._status, self._written, self._ending, self._stop)
        self._memory = _pointers(tensors, device)
        self._epoch = 1

    def stop_at(self, ids: Sequence[int]) -> None:
        """Set the ids that end a text: the first STOP_IDS of these."""
        row = list(ids[:STOP_IDS])
        row += [-1] * (STOP_IDS - len(row))
        self._stop.copy_(torch.tensor(row, dtype=torch.int32))

    def launch(self, slot: int, token: int, position: int, n: int) -> None:
        """Begin to write `n` tokens after one at a position."""
        layers = self._kernel.config.n_layers
        if self._epoch + (n + 1) * layers >= 1 << 31:
            self._words.zero_()
            self._epoch = 1
        arguments = [
            (self._kernel.model.data_ptr(), nvrtc.POINTER),
            (self._memory.data_ptr(), nvrtc.POINTER),
            (slot, nvrtc.INT), (self._slots, nvrtc.INT), (self._max_len, nvrtc.INT),
            (token, nvrtc.INT), (position, nvrtc.INT), (n, nvrtc.INT), (self._passes, nvrtc.INT),
            (self._stride, nvrtc.INT),
            (self._epoch, nvrtc.UINT), (self._timeout_ns, nvrtc.LONG),
        ]  # fmt: skip
        if self._kernel.trace:
            arguments.append((self.marks.data_ptr(), nvrtc.POINTER))
        self._epoch += (n + 1) * layers
        threads = 32 * (WARPS + 1)
        self._kernel.function.launch(self._kernel.ctas, threads, arguments)

    def result(self) -> tuple[list[int], list[float], int]:
        """The tokens of the last launch, which has ended, their logprobs, and what ended it.
        Raises EngineTimeout where a wait timed out."""
        count, ending = self._ending.tolist()
        if ending < 0:
            where = int(self._status)
            self._status.zero_()
            self._words.zero_()
            raise EngineTimeout(f"a text timed out after {count} tokens, at {where:#x}")
        words = self._written[:count].numpy()
        tokens = (words & 0xFFFFFFFF).astype(np.int64).tolist()
        logprobs = (words >> 32).astype(np.int32).view(np.float32).tolist()
        return tokens, logprobs, ending


def _pointers(tensors: tuple[Tensor | None, ...], device: torch.device) -> Tensor:
    """Addresses of tensors, on the device."""
    at = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    return torch.tensor(at, dtype=torch.int64).to(device)
