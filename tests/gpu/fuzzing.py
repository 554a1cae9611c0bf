"""Forwards whose tiles sleep for random times about their waits and publications, in buffers full
of NaN: whatever the order in which tiles then come, the logits must have the bits of a forward that
does not sleep."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.engines.cuda.blocking import Blocking
from onelaunch.engines.cuda.pack import pack
from onelaunch.engines.cuda.program import FusedForward, Shape
from tests.engines.suite import SMALL, weights_of

CUDA = torch.device("cuda", 0)
TEXTS = 4  # different ones, in turn: what a forward left does for the same text only
WIDE = SMALL.with_(
    dim=288, n_heads=6, n_kv_heads=6, head_dim=48, hidden_dim=768, vocab_size=500, max_seq_len=300
)
NORMED = SMALL.with_(
    dim=96, n_heads=6, n_kv_heads=2, head_dim=32, hidden_dim=160, qk_norm=True, max_seq_len=64
)
# Row tiles of most stages end at other rows; two programs fit on a multiprocessor.
MIXED = {
    "embed": Blocking(16, 32),
    "qkv": Blocking(32, 32, num_stages=0),
    "attention": Blocking(16, 32, num_stages=2),
    "out_proj": Blocking(64, 32, 32, 3),
    "gate_up": Blocking(16, 64, 32, 3),
    "down": Blocking(32, 32, 64, 3),
    "head": Blocking(64, 64, 32, 3),
}


class Case(NamedTuple):
    config: ModelConfig
    batch: int
    sequence: int
    depth: str | int
    programs: int
    all_positions: bool = True


CASES = {
    "one program": Case(WIDE, 3, 37, "all", 1),
    "7 programs": Case(WIDE, 2, 200, "all", 7),
    "100 programs": Case(WIDE, 3, 37, "all", 100),
    "a program a multiprocessor": Case(WIDE, 2, 200, "all", 132),
    "two programs a multiprocessor": Case(WIDE, 2, 200, "all", 264),
    "half a layer": Case(WIDE, 5, 61, "half", 132),
    "a layer, two programs a multiprocessor": Case(WIDE, 3, 137, 1, 264),
    "stages, last positions": Case(WIDE, 5, 9, "stage", 100, all_positions=False),
    "heads with norms": Case(NORMED, 3, 37, "all", 132),
    "heads with norms, half a layer": Case(NORMED, 7, 19, "half", 7),
}


def blockings_of(config: ModelConfig) -> dict[str, Blocking]:
    """MIXED, and of a model with norms of heads, whose tiles of qkv are heads, its own there."""
    return MIXED | ({"qkv": Blocking(64, 32, 32, 3)} if config.qk_norm else {})


class Fuzzed:
    """A case's forward, delayed, and the logits of its texts without delays."""

    def __init__(self, case: Case) -> None:
        config, blockings = case.config, blockings_of(case.config)
        packed = pack(config, weights_of(config), torch.bfloat16, CUDA)
        shape = Shape(case.batch, case.sequence, case.all_positions)
        self.plain, self.forward = (
            FusedForward(
                config, packed, shape, blockings, case.depth, case.programs, delayed=delayed
            )
            for delayed in (False, True)
        )
        generator = torch.Generator().manual_seed(0)
        size = TEXTS, case.batch * case.sequence
        self.texts = torch.randint(config.vocab_size, size, generator=generator).to(CUDA)
        self.expected = [self._logits(self.plain, text) for text in self.texts]

    def wrong(self, seeds: Iterable[int]) -> list[int]:
        """The seeds whose delays changed a bit. Raises EngineTimeout where a tile gave up."""
        found = []
        assert self.forward.seed is not None
        for number, seed in enumerate(seeds):
            self.forward.seed.fill_(seed)
            got = self._logits(self.forward, self.texts[number % TEXTS])
            if not torch.equal(got, self.expected[number % TEXTS]):
                found.append(seed)
        return found

    def _logits(self, forward: FusedForward, text: Tensor) -> Tensor:
        b = forward.buffers
        for scratch in (b.x, b.partial_sumsq, b.qkv, b.attn_out, b.hidden, b.logits):
            scratch.fill_(float("nan"))
        b.tokens.copy_(text)
        forward.run()
        forward.check()
        assert not b.logits.isnan().any()
        return b.logits.clone()
