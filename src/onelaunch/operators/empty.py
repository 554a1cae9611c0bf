"""Empty tensors for a host-bound operator's results.

`torch.empty_like` reads its arguments by name and goes through the dispatcher, `Tensor.new_empty`
takes longer still: 1.3 and 2.4 us where the function that torch.compile's own programs call takes
1.0. It is not a public interface: where it is not, `torch.empty_strided` makes the same tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

try:
    from torch._C._dynamo import guards as _guards
except ImportError:
    _guards = None  # type: ignore[assignment]

make_on_current_gpu: Any = getattr(_guards, "_empty_strided_cuda", None)
current_device: Any = getattr(torch._C, "_cuda_getDevice", None)


class Empty:
    """Called, an empty tensor of a shape, strides, dtype and device, whichever is current.

    `described` is what `make_on_current_gpu` makes it of, on the current GPU.
    """

    __slots__ = ("_gpu", "described", "device")

    def __init__(
        self,
        shape: Sequence[int],
        strides: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.described = (tuple(shape), tuple(strides), dtype)
        self.device = device
        on_gpu = device.type == "cuda" and make_on_current_gpu is not None
        self._gpu = device.index if on_gpu else None

    @classmethod
    def like(cls, tensor: Tensor) -> Empty:
        """What `torch.empty_like(tensor)` makes of a plain tensor. It keeps nothing of it."""
        made = torch.empty_like(tensor, device="meta")
        return cls(made.shape, made.stride(), made.dtype, tensor.device)

    def __call__(self) -> Tensor:
        made: Tensor
        if self._gpu is not None and current_device() == self._gpu:
            made = make_on_current_gpu(*self.described)
            return made
        shape, strides, dtype = self.described
        return torch.empty_strided(shape, strides, dtype=dtype, device=self.device)
