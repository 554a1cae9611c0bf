from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.engines.cuda.blocking import Blocking
from onelaunch.engines.cuda.pack import pack
from onelaunch.engines.cuda.program import BoundForward, Shape

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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

    def logits(
        self,
        tokens_BS: Tensor,
        all_positions: bool = True,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """(B, S, V) in float32, or (B, 1, V) of the last positions. Texts shorter than the longest
        are padded behind, which changes nothing before; `lengths` says where each one's last
        position is. Raises BadInput for other lengths than 1 to S, one for each text."""
        batch, sequence = tokens_BS.shape
        bound = self.bind(batch, sequence, all_positions)
        if lengths is not None and not all_positions:
            bound.end_at(lengths)
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
