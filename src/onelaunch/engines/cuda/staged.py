"""A whole forward, one launch a stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.engines.cuda.pack import pack
from onelaunch.plan import Plan, TilePlan, Tiling, make_plan, make_tiles
from onelaunch.plan.tiles import columns_of

# Not tuned: no figure stands behind these yet.
ROWS, COLUMNS, INNER = 16, 32, 32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def padded(n: int, least: int = 16) -> int:
    """The power of two from `least` on, the narrowest product, that holds n."""
    return max(least, 1 << (n - 1).bit_length())


def tilings_of(config: ModelConfig) -> dict[str, Tiling]:
    """How each kind of stage is cut: qkv and attention by heads."""
    tilings = dict.fromkeys(("out_proj", "gate_up", "down", "head"), Tiling(ROWS, COLUMNS))
    tilings["embed"] = Tiling(ROWS, padded(config.dim))
    tilings["qkv"] = Tiling(ROWS, config.head_dim)
    tilings["attention"] = Tiling(ROWS, 1)
    return tilings


@dataclass(frozen=True)
class _Buffers:
    """tokens: (N,); x: (N, D); qkv: (N, (H + 2 K) E); mixed: (N, H E); hidden: (N, F); logits:
    (rows, V)."""

    tokens: Tensor
    x: Tensor
    qkv: Tensor
    mixed: Tensor
    hidden: Tensor
    logits: Tensor


class StagedForward:
    """Logits of whole texts. Weights as checkpoints name them; raises TypeError for a dtype that
    the stages do not compute in."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if dtype not in DTYPES:
            raise TypeError(f"the stages compute in float32, bfloat16 or float16, not {dtype}")
        self.config, self.dtype, self.device = config, dtype, device
        self.packed = pack(config, weights, dtype, device)

    def logits(self, tokens_BS: Tensor, all_positions: bool = True) -> Tensor:
        """(B, S, V) in float32, or (B, 1, V) of the last positions. Texts shorter than the longest
        are padded behind, which changes nothing before."""
        batch, sequence = tokens_BS.shape
        plan = make_plan(self.config, batch, sequence, all_positions=all_positions)
        tiles = make_tiles(plan, tilings_of(self.config))
        buffers = self._buffers(plan, tokens_BS)
        for number in range(len(plan.stages)):
            self._launch(tiles, number, buffers)
        return buffers.logits.view(batch, -1, self.config.vocab_size)

    def _buffers(self, plan: Plan, tokens_BS: Tensor) -> _Buffers:
        c, n = self.config, tokens_BS.numel()

        def rows(width: int) -> Tensor:
            return torch.empty(n, width, dtype=self.dtype, device=self.device)

        logits_shape = plan.buffer("logits").shape
        return _Buffers(
            tokens_BS.to(self.device, torch.int32).flatten(),
            rows(c.dim),
            rows(c.q_dim + 2 * c.kv_dim),
            rows(c.q_dim),
            rows(c.hidden_dim),
            torch.empty(logits_shape, dtype=torch.float32, device=self.device).flatten(0, 1),
        )

    def _launch(self, tiles: TilePlan, number: int, b: _Buffers) -> None:
        from onelaunch.engines.cuda import stages

        c, plan = self.config, tiles.plan
        stage, phase = plan.stages[number], tiles.phases[number]
        tiling = tiles.tilings[stage.kind]
        n, grid = b.x.shape[0], (phase.tiles,)
        layer = self.packed.layers[max(stage.layer, 0)]
        assert phase.column_tiles == -(-columns_of(c, stage.kind) // tiling.columns)
        size = {"BM": tiling.rows, "BN": tiling.columns, "BK": INNER}
        match stage.kind:
            case "embed":
                stages.embed_kernel[grid](
                    b.tokens, self.packed.embedding, b.x, n, c.dim, tiling.rows, tiling.columns
                )
            case "qkv":
                stages.qkv_kernel[grid](
                    b.x, layer.qkv, layer.norms, self.packed.cos, self.packed.sin, b.qkv, n,
                    plan.sequence, c.norm_eps, c.dim, c.n_heads, c.n_kv_heads, c.head_dim,
                    c.qk_norm, tiling.rows, padded(c.head_dim // 2), INNER,
                )  # fmt: skip
            case "attention":
                stages.attention_kernel[grid](
                    b.qkv, b.mixed, plan.sequence, c.head_dim**-0.5, c.n_heads,
                    c.n_kv_heads, c.head_dim, tiling.rows, COLUMNS, padded(c.head_dim),
                )  # fmt: skip
            case "out_proj":
                stages.add_product_kernel[grid](b.mixed, layer.out, b.x, n, c.q_dim, c.dim, **size)
            case "gate_up":
                stages.gate_up_kernel[grid](
                    b.x, layer.gate_up, b.hidden, n, c.norm_eps, c.dim, c.hidden_dim, **size
                )
            case "down":
                stages.add_product_kernel[grid](
                    b.hidden, layer.down, b.x, n, c.hidden_dim, c.dim, **size
                )
            case "head":
                rows = b.logits.shape[0]
                step = n // rows
                stages.head_kernel[grid](
                    b.x, self.packed.head, b.logits, rows, step, step - 1, c.norm_eps, c.dim,
                    c.vocab_size, **size,
                )  # fmt: skip
