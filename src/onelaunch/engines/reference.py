"""The reference engine: the model's definition, run by PyTorch on whatever device it knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from onelaunch.config import ModelConfig
from onelaunch.engines.checks import check_session, check_tokens, last_positions, logits_dtype
from onelaunch.engines.engine import Mark, no_mark
from onelaunch.engines.norm import choose_norm, has_norm_kernel, norm_function
from onelaunch.engines.session import RowSession
from onelaunch.errors import BadInput
from onelaunch.model import Cache, KVCache, Model, RaggedCache, softcapped

MAX_THREADS = 1024

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def resolve_device(name: str = "auto") -> torch.device:
    """The device that a name means here: auto, cpu, cuda, cuda:N or mps.

    auto is the GPU where there is one, else the CPU. Raises BadInput where it does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise BadInput(f"device={name!r}: must be auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda":
        return _cuda_device(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise BadInput("device='mps': this machine or this PyTorch has no Apple GPU; use cpu")
    return torch.device(device.type)


def _cuda_device(device: torch.device) -> torch.device:
    if not torch.cuda.is_available():
        reason = "this PyTorch is built without CUDA" if not torch.version.cuda else "no GPU found"
        raise BadInput(f"device='{device}': {reason}; use cpu or auto")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise BadInput(f"device='{device}': the GPUs here are numbered 0 to {last}")
    return torch.device("cuda", index)


def resolve_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype of a name; None means bfloat16 on a CUDA GPU and float32 elsewhere."""
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise BadInput(f"dtype={name!r}: must be one of {', '.join(DTYPES)}")
    return DTYPES[name]


class ReferenceEngine:
    """Runs a model with PyTorch's own operators; see `Engine` and `TrainEngine`.

    `weights` are used as they are where device and dtype fit. With `train` they are copied to
    float32 tensors that take gradients, `dtype` is then what autocast computes in, `dropout` acts
    in `train_step` only, and `compile` compiles that method with torch.compile. `norm` is one of
    `engines.norm.NORMS`; the attribute is the one that "auto" selected.
    `threads` sets PyTorch's CPU threads for the whole process. Raises BadInput for a device, dtype,
    norm or number of threads that cannot be had.
    """

    max_batch = 16
    steps_at_once = False
    flat: Any = None
    """All parameters side by side, for who updates them at once; only an engine that has them so
    has it."""

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Tensor],
        device: str = "auto",
        dtype: str | None = None,
        threads: int | None = None,
        dropout: float = 0.0,
        compile: bool = False,
        train: bool = False,
        norm: str = "torch",
    ) -> None:
        self.config = config
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        has_kernel = has_norm_kernel(self.device)
        self.norm = choose_norm(norm, has_kernel, compile)
        self.trains = train
        if threads is not None:
            if not 1 <= threads <= MAX_THREADS:
                raise BadInput(f"threads={threads}: must be from 1 to {MAX_THREADS}")
            torch.set_num_threads(threads)
        if train and self.dtype == torch.float16:
            raise BadInput("dtype='float16' cannot train here; use bfloat16 or float32")
        stored = torch.float32 if train else self.dtype
        placed = {
            name: _place(tensor, self.device, stored, copy=train)
            for name, tensor in weights.items()
        }
        self.model = Model.from_weights(config, placed, dropout, norm_function(self.norm))
        self.model.requires_grad_(train)
        self._layers = self.model.layer_weights()
        self._head_VD = self.model.head_weight()
        # Tables are made here, so that torch.compile does not trace into their making.
        self.model.positions(1, None, self.model.norm.weight.device, self.dtype)
        if self.norm == "onelaunch" and not has_kernel:
            # Without a kernel the operator warns once: now, rather than amid the printed tokens.
            weight_D = self.model.norm.weight.detach()
            self.model.norm_function(weight_D, weight_D, config.norm_eps)
        self._loss = torch.compile(self.model.loss) if compile else self.model.loss

    def logits(
        self,
        tokens_BS: Tensor | Sequence[Sequence[int]],
        dtype: torch.dtype | None = None,
        *,
        last: bool = False,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """Logits of every position, (B, S, V), or of each last one, (B, V), on the engine's device;
        see `LogitsEngine`."""
        dtype = logits_dtype(dtype, self.dtype)
        tokens_BS = check_tokens(self.config, tokens_BS).to(self.device, torch.int64)
        ends = last_positions(tokens_BS, last, lengths)
        with torch.no_grad(), self._autocast():
            if ends is None:
                return self.model(tokens_BS).to(dtype)
            hidden_BSD = self.model.hidden(tokens_BS)
            ends_B = torch.tensor(ends, dtype=torch.int64, device=self.device)
            hidden_BD = hidden_BSD[torch.arange(len(ends), device=self.device), ends_B]
            logits_BV = F.linear(hidden_BD, self._head_VD).float()
            return softcapped(logits_BV, self.config.logit_softcap).to(dtype)

    def session(self, max_batch: int = 1, max_len: int | None = None) -> RowSession:
        """Begin to generate, a token of each request in a step; see `Engine`.

        A sequence alone is computed as `Model` does; among others PyTorch's products of a batch
        sum in another order, so that two tokens that are as likely within the dtype's rounding may
        stand for each other.
        """
        return self.session_and_rows(max_batch, check_session(max_batch, max_len, self.config))[0]

    @torch.inference_mode()
    def session_and_rows(self, max_batch: int, max_len: int) -> tuple[RowSession, CachedRows]:
        """A session, and its keys and values, for an engine that takes its sequences over."""
        cache = KVCache(self.config, max_batch, max_len, self.device, self.dtype)
        rows = CachedRows(cache, self._last_logits)
        dtype = str(self.dtype).removeprefix("torch.")
        return RowSession(self.config, rows, max_batch, max_len, dtype), rows

    def describe(self) -> dict[str, Any]:
        """Engine, device, dtype, norm, bytes of weights."""
        parameters = self.model.parameters()
        return {
            "engine": "reference",
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "norm": self.norm,
            "weight_bytes": sum(p.numel() * p.element_size() for p in parameters),
            "threads": torch.get_num_threads() if self.device.type == "cpu" else None,
        }

    def parameters(self) -> dict[str, Tensor]:
        """The float32 tensors to be updated, by canonical name."""
        self._check_trains()
        return dict(self.model.named_parameters())

    def train_step(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor,
        scale: float = 1.0,
        mark: Mark = no_mark,
    ) -> Tensor:
        """Add `scale` times the mean loss's gradient to each `.grad`; see `TrainEngine`."""
        self._check_trains()
        self.model.training = True  # the root alone reads it
        try:
            with self._autocast():
                loss = self._loss(tokens_BS.to(self.device), targets_BS.to(self.device))
            mark("forward")
            (loss * scale).backward()
            mark("backward")
        finally:
            self.model.training = False
        return loss.detach()

    def wait(self) -> None:
        """Until a first step takes no longer than others: nothing here is compiled before it."""

    def log_to(self, log: Callable[[str], None]) -> None:
        """Nothing: it logs no line."""

    def after_update(self) -> None:
        """The parameters are what computes: there is nothing to be made of them."""

    def telemetry(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def load_state_dict(self, tensors: Mapping[str, Tensor], version: int) -> None:
        """Nothing to be put back."""

    def forms(self, sequences: int, length: int) -> dict[str, Any] | None:
        """None: there is one form."""
        return None

    def use_forms(self, saved: Any) -> bool:
        """There are none to be used."""
        return False

    @property
    def restart_requested(self) -> bool:
        """Never."""
        return False

    def close(self) -> None:
        """Nothing to be ended."""

    def _last_logits(self, tokens_BS: Tensor, cache: Cache) -> Tensor:
        """Logits of the last position of each sequence, (B, V) in float32."""
        with self._autocast(), self._growing_attention():
            hidden_BSD = self.model.hidden(tokens_BS.to(self.device), cache, self._layers)
            if len(hidden_BSD) == 1:  # a matrix-vector product is faster than one of a batch of 1
                logits_BV = F.linear(hidden_BSD[0, -1], self._head_VD).float()[None]
            else:
                logits_BV = F.linear(hidden_BSD[:, -1], self._head_VD).float()
            return softcapped(logits_BV, self.config.logit_softcap)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.trains and self.dtype != torch.float32:
            return torch.autocast(self.device.type, self.dtype)
        return nullcontext()

    def _growing_attention(self) -> AbstractContextManager[Any]:
        """Keep cuDNN out: it makes a plan for every length of the cache, 5 ms in each layer.

        On an H200 (torch 2.11) the first 200 tokens of stories15m came at 28 a second with it and
        at 620 without; its plans, once made, were no faster.
        """
        if self.device.type != "cuda":
            return nullcontext()
        return sdpa_kernel(
            [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        )

    def _check_trains(self) -> None:
        if not self.trains:
            raise RuntimeError("this engine was made without train=True")


class CachedRows:
    """Rows of a session with their keys and values in one cache; see `session.Rows`."""

    def __init__(self, cache: KVCache, last_logits: Callable[[Tensor, Cache], Tensor]) -> None:
        self._cache, self._last_logits = cache, last_logits
        self.caches: list[KVCache] = []
        """Each row's part, filled to its length."""

    def read(self, row: int, prompt_ids: Sequence[int]) -> Tensor:
        """Read a prompt into a row; its last position's logits, (1, V)."""
        if row == len(self.caches):
            self.caches.append(self._cache.row(row, 0))
        else:  # of what was there a number that is not finite would spread, though it is masked
            self.caches[row] = self._cache.row(row, 0)
            for tensor in (*self.caches[row].keys, *self.caches[row].values):
                tensor.zero_()
        return self._last_logits(torch.tensor([prompt_ids]), self.caches[row])

    def step(self, token_B: Tensor) -> Tensor:
        """Read a token of each row; their logits, (B, V)."""
        if len(token_B) == 1:
            return self._last_logits(token_B[None], self.caches[0])
        caches = self.caches[: len(token_B)]
        ragged = RaggedCache(self._cache, [each.length for each in caches])
        logits_BV = self._last_logits(token_B[:, None], ragged)
        for each in caches:
            each.length += 1
        return logits_BV

    @torch.inference_mode()
    def move(self, source: int, row: int) -> None:
        """Copy a row's sequence over another's."""
        moved = self.caches[source]
        for tensor in (*self._cache.keys, *self._cache.values):
            tensor[row].copy_(tensor[source])
        self.caches[row] = self._cache.row(row, moved.length)


def _place(tensor: Tensor, device: torch.device, dtype: torch.dtype, copy: bool) -> Tensor:
    return tensor.detach().to(device, dtype, copy=copy).contiguous()
