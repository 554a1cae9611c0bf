"""generation-speed: the reference engine against a bare PyTorch loop with a KV cache.

The bare loop is written for speed and nothing else: plain functions, weights in tuples, a
preallocated cache, greedy, batch one. Both generate the same tokens, or where two tokens are nearly
as likely and sums of another order decide, either of them. They are interleaved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from onelaunch.bench.core.record import Log, Row
from onelaunch.bench.core.rig import compared_row, in_turn
from onelaunch.config import ModelConfig, preset
from onelaunch.engines.engine import LogitsEngine
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.errors import RunFailed
from onelaunch.generation.decode import generate_ids
from onelaunch.model import Model, rope_tables

UNIT = "tokens/s"
CASES = {"stories260k": 200, "stories15m": 100, "stories110m": 24}
QUICK = ("stories260k", "stories15m")
NEAR_TIE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""How far behind the best logit a greedy token's may be, of the spread from the least to the best:
what sums of another order and other points of rounding make of the engine's arithmetic. Of 100
tokens of stories15m in bfloat16 on a CPU it was up to 7e-3; a wrong token is half the spread
behind."""


def run(device: str, quick: bool, log: Log) -> list[Row]:
    """Time every case; returns one row each, higher is better."""
    return [
        _compare(name, CASES[name], device, 9 if quick else 25, log)
        for name in (QUICK if quick else CASES)
    ]


def _compare(name: str, n: int, device: str, blocks: int, log: Log) -> Row:
    config = preset(name)
    weights = dict(Model(config).init_weights(1).state_dict())
    engine = ReferenceEngine(config, weights, device=device)
    placed = {k: v.to(engine.device, engine.dtype) for k, v in weights.items()}
    bare = BareLoop(config, placed)
    ours, theirs = generate_ids(engine, [[1]], n)[0], bare.generate([1], n)
    alike = common_tokens(name, engine, engine.dtype, ours, theirs)
    if alike < n:
        log(f"{name}: the same {alike} tokens, then two that are nearly as likely")
    samples = in_turn(
        lambda: generate_ids(engine, [[1]], n), lambda: bare.generate([1], n), n, 1, blocks
    )
    dtype = str(engine.dtype).removeprefix("torch.")
    return compared_row(f"{name} greedy {n}", samples, "bare loop", dtype=dtype, tokens_alike=alike)


def common_tokens(
    name: str, engine: LogitsEngine, dtype: torch.dtype, ours: Sequence[int], theirs: Sequence[int]
) -> int:
    """How many tokens two greedy sequences, which follow token 1, begin with in common. Where they
    differ, every token of either must be the engine's own choice after the tokens before it, or
    nearly: raises RunFailed where one is further behind the best than NEAR_TIE."""
    if len(ours) != len(theirs):
        raise RunFailed(f"{name}: the engine writes {len(ours)} tokens, the loop {len(theirs)}")
    if list(ours) == list(theirs):
        return len(ours)
    for writer, ids in (("the engine", ours), ("the bare loop", theirs)):
        logits_NV = engine.logits(torch.tensor([[1, *ids[:-1]]]))[0].double().cpu()
        best_N, least_N = logits_NV.amax(-1), logits_NV.amin(-1)
        chosen_N = logits_NV.gather(-1, torch.tensor(ids)[:, None])[:, 0]
        behind_N = (best_N - chosen_N) / (best_N - least_N)
        within_N = behind_N <= NEAR_TIE[dtype]  # of what is no number: not
        if not within_N.all():
            at = int(within_N.int().argmin())
            raise RunFailed(
                f"{name}: {writer} writes {ids[at]} as token {at}, {behind_N[at]:.1e} of the "
                "logits' spread behind the engine's best"
            )
    return next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)


class BareLoop:
    """The loop that a careful user writes by hand for one model and one sequence."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor]) -> None:
        self.config = config
        self.embedding = weights["embed_tokens.weight"]
        self.norm = weights["norm.weight"]
        names = (
            "input_layernorm", *(f"self_attn.{name}_proj" for name in "qkvo"),
            "post_attention_layernorm", *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        )  # fmt: skip
        self.layers = [
            tuple(weights[f"layers.{i}.{name}.weight"] for name in names)
            for i in range(config.n_layers)
        ]
        cos, sin = rope_tables(config)
        self.cos, self.sin = cos.to(self.embedding), sin.to(self.embedding)

    @torch.inference_mode()
    def generate(
        self, prompt: list[int], n: int, on_token: Callable[[int], None] | None = None
    ) -> list[int]:
        """Greedy continuation of one prompt by n tokens; `on_token` gets each as it is drawn."""
        c = self.config
        length = len(prompt) + n
        shape = (c.n_layers, 2, 1, c.n_kv_heads, length, c.head_dim)
        cache = torch.zeros(shape, device=self.embedding.device, dtype=self.embedding.dtype)
        token = prompt[0]
        out = []
        for position in range(length - 1):
            token_next = int(self._step(token, position, cache).argmax())
            if position + 1 < len(prompt):
                token = prompt[position + 1]
                continue
            token = token_next
            out.append(token)
            if on_token is not None:
                on_token(token)
        return out

    def _step(self, token: int, position: int, cache: Tensor) -> Tensor:
        c = self.config
        H, K, E = c.n_heads, c.n_kv_heads, c.head_dim
        x = self.embedding[token].view(1, 1, c.dim)
        cos, sin = self.cos[position], self.sin[position]

        def rotate(heads: Tensor) -> Tensor:
            a, b = heads.unflatten(-1, (-1, 2)).unbind(-1)
            return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)

        for i, (norm1, wq, wk, wv, wo, norm2, gate, up, down) in enumerate(self.layers):
            h = F.rms_norm(x, (c.dim,), norm1, c.norm_eps)
            q = rotate(F.linear(h, wq).view(1, 1, H, E).transpose(1, 2))
            cache[i, 0, :, :, position] = rotate(F.linear(h, wk).view(1, K, E))
            cache[i, 1, :, :, position] = F.linear(h, wv).view(1, K, E)
            keys, values = cache[i, 0, :, :, : position + 1], cache[i, 1, :, :, : position + 1]
            y = F.scaled_dot_product_attention(q, keys, values, enable_gqa=H != K)
            x = x + F.linear(y.view(1, 1, H * E), wo)
            h = F.rms_norm(x, (c.dim,), norm2, c.norm_eps)
            x = x + F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)
        return F.linear(F.rms_norm(x, (c.dim,), self.norm, c.norm_eps), self.embedding)
