"""Both forms of a small forward, and texts in one launch, each tensor an allocation of its own, for
compute-sanitizer to watch: `make memcheck` on a machine with a GPU.

The sanitizer makes everything slow: there are two programs, and a wait has all the time it wants.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # what lies behind a tensor is then nobody's
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from onelaunch.engines.cuda.blocking import Blocking, padded
from onelaunch.engines.cuda.decoding.grids import FEW, MANY, Grid
from onelaunch.engines.cuda.decoding.text import Row, Text, TextKernel
from onelaunch.engines.cuda.pack import pack
from onelaunch.engines.cuda.program import FusedForward, Shape
from onelaunch.engines.engine import Request, Sampling
from tests.engines.cuda.staged_forward import StagedForward
from tests.engines.suite import SMALL, exact_logits, relative_error, weights_of
from tests.gpu.test_forward_forms import EARLY, OTHERWISE

BY = Sampling(1.0, top_k=40, top_p=0.9, min_p=0.01, seed=3, repetition_penalty=1.2)
HOUR = 3_600_000_000_000
CONFIGS = {
    "no power of two": SMALL.with_(dim=40, n_heads=5, n_kv_heads=5, hidden_dim=44, vocab_size=67),
    "heads with norms": SMALL.with_(head_dim=16, qk_norm=True, n_kv_heads=2, norm_eps=1e-6),
}


def main() -> None:
    device = torch.device("cuda", 0)
    for name, config in CONFIGS.items():
        weights = weights_of(config)
        tokens = torch.randint(
            config.vocab_size, (2, 19), generator=torch.Generator().manual_seed(0)
        )
        exact = exact_logits(config, weights, tokens)
        for what, tiles in {"otherwise": OTHERWISE, "early": EARLY}.items():
            if config.qk_norm:
                tiles = tiles | {"qkv": Blocking(64, padded(config.head_dim), 64, 3, tma=True)}
            bound = StagedForward(config, weights, torch.bfloat16, device, tiles).bind(
                2, config.max_seq_len, True, torch.bfloat16
            )
            bound.buffers.tokens.random_(0, config.vocab_size)
            for _ in range(2):
                bound.run()
            assert bound.buffers.logits.isfinite().all(), (name, what)
            print(f"{name}, staged {what}: finite")
        staged = StagedForward(config, weights, torch.bfloat16, device)
        expected = staged.logits(tokens.to(device))
        assert relative_error(expected, exact) < 0.05, name
        for depth in ("all", "half"):
            for watched in (False, True):
                fused = FusedForward(
                    config, staged.packed, Shape(2, 19), {}, depth, ctas=2, timeout_ns=HOUR,
                    traced=watched, delayed=watched,
                )  # fmt: skip
                fused.buffers.tokens.copy_(tokens.flatten())
                for _ in range(2):
                    fused.run()
                fused.check()
                same = torch.equal(fused.buffers.logits.view(expected.shape), expected)
                assert same, (name, depth, watched)
                print(f"{name}, {depth}{', traced and delayed' if watched else ''}: right")


def texts() -> None:
    """A few tokens of one sequence, and of three, in one group of CTAs or in two; the most likely
    ones, and drawn and penalised ones."""
    device = torch.device("cuda", 0)
    config = SMALL.with_(dim=96, n_heads=4, head_dim=24, n_kv_heads=2, hidden_dim=160)
    packed = pack(config, weights_of(config), torch.bfloat16, device)
    grids = (
        Grid(1, 2, tiles=False), Grid(1, 2), Grid(FEW, 1), Grid(FEW, 2), Grid(FEW, 17),
        Grid(MANY, 2, 2),
    )  # fmt: skip
    for grid, draws in ((grid, draws) for grid in grids for draws in (False, True)):
        rows = [Row(i, 3 + i, 0, 6) for i in range(1 if grid.sequences == 1 else 3)]
        shape = (config.n_layers, len(rows), config.n_kv_heads, config.max_seq_len, config.head_dim)
        keys, values = (packed.embedding.new_zeros(shape) for _ in range(2))
        kernel = TextKernel(config, packed, grid=grid, draws=draws)
        text = Text(kernel, keys, values, HOUR)
        written = []
        for _ in range(2):
            for i, row in enumerate(rows):
                request = Request(i, [row.token], 6, BY if draws else Sampling())
                text.prepare(i, row.slot, request, 6)
            text.launch(rows)
            written.append([end.unpacked() for end in text.finish([0] * len(rows))])
        assert written[0] == written[1]
        assert all(len(tokens) == 6 for tokens, _ in written[0])
        print(f"{len(rows)} texts in one launch: the same twice")
        text.close()


if __name__ == "__main__":
    main()
    texts()
