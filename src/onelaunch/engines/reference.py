"""The reference engine: the model's definition, run by PyTorch on whatever device it knows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from onelaunch.config import ModelConfig
from onelaunch.engines.checks import check_prompts, check_tokens, logits_dtype, not_finite
from onelaunch.engines.engine import OnEnd, OnToken, Sampling
from onelaunch.engines.norm import choose_norm, has_norm_kernel, norm_function
from onelaunch.engines.sampling import copy_numbers, draw, uniforms
from onelaunch.errors import BadInput
from onelaunch.model import KVCache, Model

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
        raise BadInput(f"device {name!r}: must be auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda":
        return _cuda_device(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise BadInput("device mps: this machine or this PyTorch has no Apple GPU; use cpu")
    return torch.device(device.type)


def _cuda_device(device: torch.device) -> torch.device:
    if not torch.cuda.is_available():
        reason = "this PyTorch is built without CUDA" if not torch.version.cuda else "no GPU found"
        raise BadInput(f"device {device}: {reason}; use cpu or auto")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise BadInput(f"device {device}: the GPUs here are numbered 0 to {last}")
    return torch.device("cuda", index)


def resolve_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype of a name; None means bfloat16 on a CUDA GPU and float32 elsewhere."""
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise BadInput(f"dtype {name!r}: must be one of {', '.join(DTYPES)}")
    return DTYPES[name]


class ReferenceEngine:
    """Runs a model with PyTorch's own operators; see `Engine` and `TrainableEngine`.

    `weights` are used as they are where device and dtype fit. With `train` they are copied to
    float32 tensors that take gradients, `dtype` is then what autocast computes in, `dropout` acts
    in `loss_and_gradients` only, and `compile` gives that method to torch.compile. `norm` is one of
    `engines.norm.NORMS`; the attribute says which of them "auto" was.
    `threads` sets PyTorch's CPU threads for the whole process. Raises BadInput for a device, dtype,
    norm or number of threads that cannot be had.
    """

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
                raise BadInput(f"threads {threads}: must be from 1 to {MAX_THREADS}")
            torch.set_num_threads(threads)
        if train and self.dtype == torch.float16:
            raise BadInput("dtype float16 cannot train here; use bfloat16 or float32")
        stored = torch.float32 if train else self.dtype
        placed = {
            name: _place(tensor, self.device, stored, copy=train)
            for name, tensor in weights.items()
        }
        self.model = Model.from_weights(config, placed, dropout, norm_function(self.norm))
        self.model.requires_grad_(train)
        self._layers = self.model.layer_weights()
        self._head_VD = self.model.head_weight()
        # Made here, so that torch.compile finds it made and does not trace into the making.
        self.model.rope(self.model.norm.weight.device, self.dtype, 1)
        if self.norm == "onelaunch" and not has_kernel:
            # Without a kernel the operator says so once: now, rather than amid what is printed.
            weight_D = self.model.norm.weight.detach()
            self.model.norm_function(weight_D, weight_D, config.norm_eps)
        self._loss = torch.compile(self.model.loss) if compile else self.model.loss

    def logits(
        self, tokens_BS: Tensor | Sequence[Sequence[int]], dtype: torch.dtype | None = None
    ) -> Tensor:
        """Logits of every position, (B, S, V), on the engine's device; see `Engine`."""
        dtype = logits_dtype(dtype, self.dtype)
        tokens_BS = check_tokens(self.config, tokens_BS).to(self.device, torch.int64)
        with torch.no_grad(), self._autocast():
            return self.model(tokens_BS).to(dtype)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        on_token: OnToken | None = None,
        stop: Sequence[int] = (),
        on_end: OnEnd | None = None,
    ) -> list[list[int]]:
        """Continue each prompt by up to `n` tokens, one prompt after another; see `Engine`.

        A prompt of P tokens in a context of C leaves room for C - P + 1 new ones, as the last
        one need not be read back. Raises RunFailed where the logits are not finite.
        """
        check_prompts(self.config, prompts, n)
        copies = copy_numbers(prompts)
        texts: list[list[int]] = []
        for index, prompt in enumerate(prompts):
            new, _ = self.continue_text(prompt, n, sampling, index, copies[index], on_token, stop)
            texts.append(new)
            if on_end is not None:
                on_end(index)
        return texts

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

    def loss_and_gradients(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor,
        scale: float = 1.0,
        mark: Callable[[str], None] = lambda part: None,
    ) -> Tensor:
        """Add `scale` times the mean loss's gradient to each `.grad`; see `TrainableEngine`."""
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

    def say_to(self, say: Callable[[str], None]) -> None:
        """It has nothing to say."""

    def updated(self) -> None:
        """The parameters are what computes: there is nothing to be made of them."""

    def telemetry(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def state_tensors(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def load_state_tensors(self, tensors: Mapping[str, Tensor], version: int) -> None:
        """Nothing to be put back."""

    @property
    def spent(self) -> bool:
        """Never."""
        return False

    def close(self) -> None:
        """Nothing to be ended."""

    @torch.inference_mode()
    def continue_text(
        self,
        prompt: Sequence[int],
        n: int,
        sampling: Sampling,
        index: int,
        copy: int,
        on_token: OnToken | None = None,
        stop: Sequence[int] = (),
        leave: Callable[[], bool] = lambda: False,
    ) -> tuple[list[int], KVCache | None]:
        """The new ids of the text number `index`, by up to `n` tokens; `copy` is its copy number.

        Ends early where `leave` says so, asked after each token: then the cache comes too, filled
        with all of the text but its last token. It is None where the text is complete.
        """
        n = min(n, self.config.max_seq_len - len(prompt) + 1)
        if n == 0:
            return [], None
        capacity = len(prompt) + n - 1
        cache = KVCache(self.config, 1, capacity, self.device, self.dtype)
        uniforms_N = None
        if not sampling.greedy:
            uniforms_N = uniforms(sampling.seed, prompt, copy, n).to(self.device)
        tokens_1S = torch.tensor([prompt], device=self.device)
        new: list[int] = []
        with self._autocast(), self._growing_attention():
            for i in range(n):
                hidden_1SD = self.model.hidden(tokens_1S, cache, self._layers)
                logits_V = F.linear(hidden_1SD[0, -1], self._head_VD).float()
                best, token = logits_V.max(-1)
                if not math.isfinite(best.item()):
                    dtype = str(self.dtype).removeprefix("torch.")
                    raise not_finite(cache.length - 1, dtype)
                if uniforms_N is not None:
                    token = draw(logits_V, sampling, uniforms_N[i : i + 1])
                chosen = int(token.item())
                if chosen in stop:
                    break
                new.append(chosen)
                if on_token is not None:
                    on_token(index, chosen)
                if len(new) < n and leave():
                    return new, cache
                tokens_1S = token.view(1, 1)
        return new, None

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


def _place(tensor: Tensor, device: torch.device, dtype: torch.dtype, copy: bool) -> Tensor:
    return tensor.detach().to(device, dtype, copy=copy).contiguous()
