"""Generation that a careful user writes in PyTorch: a static key and value cache, the greedy token
fed back on the device, so that a step can be compiled and captured as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onelaunch.bench.peers.forward import BareForward
from onelaunch.config import ModelConfig


class BareDecoding:
    """Greedy generation of `batch` sequences of the same prompt length, in up to `context`
    positions. `step` reads `token_B` at `position` and writes the next token and position."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
        batch: int,
        context: int,
    ) -> None:
        self.config = config
        self.model = BareForward(config, weights, dtype, device)
        cache = (config.n_layers, batch, config.n_kv_heads, context, config.head_dim)
        self.keys = torch.zeros(cache, dtype=dtype, device=device)
        self.values = torch.zeros(cache, dtype=dtype, device=device)
        self.places = torch.arange(context, device=device)
        self.token_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.written_BS = torch.zeros(batch, context, dtype=torch.int64, device=device)
        self.forward: Callable[[Tensor, Tensor], Tensor] = self.logits

    def logits(self, tokens_BS: Tensor, positions_S: Tensor) -> Tensor:
        """Logits of the last of some tokens, (B, V), which join the cache at their positions."""
        c, m = self.config, self.model
        B, S = tokens_BS.shape
        H, K, E = c.n_heads, c.n_kv_heads, c.head_dim
        cos, sin = m.cos[positions_S], m.sin[positions_S]
        seen = self.places[None, :] <= positions_S[:, None]
        x = F.embedding(tokens_BS, m.embedding)
        for layer, weights in enumerate(m.layers):
            norm1, wqkv, q_norm, k_norm, wo, norm2, gate_up, down = weights
            h = F.rms_norm(x, (c.dim,), norm1, c.norm_eps)
            qkv = F.linear(h, wqkv).view(B, S, H + 2 * K, E).transpose(1, 2)
            q, k, v = qkv.split((H, K, K), 1)
            if c.qk_norm:
                q = F.rms_norm(q, (E,), q_norm, c.norm_eps)
                k = F.rms_norm(k, (E,), k_norm, c.norm_eps)
            q, k = m.rotated(q, cos, sin), m.rotated(k, cos, sin)
            self.keys[layer].index_copy_(2, positions_S, k)
            self.values[layer].index_copy_(2, positions_S, v)
            y = F.scaled_dot_product_attention(
                q, self.keys[layer], self.values[layer], seen, enable_gqa=H != K
            )
            x = x + F.linear(y.transpose(1, 2).reshape(B, S, H * E), wo)
            h = F.rms_norm(x, (c.dim,), norm2, c.norm_eps)
            gate, up = F.linear(h, gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, down)
        return F.linear(F.rms_norm(x[:, -1], (c.dim,), m.norm, c.norm_eps), m.head)

    def step(self) -> None:
        """One more token of each sequence."""
        logits_BV = self.forward(self.token_B[:, None], self.position)
        self._take(logits_BV)

    def read(self, prompts_BS: Tensor) -> None:
        """Read the prompts, and choose their first tokens."""
        length = prompts_BS.shape[1]
        logits_BV = self.logits(prompts_BS, self.places[:length])
        self.position.fill_(length - 1)
        self._take(logits_BV)

    def _take(self, logits_BV: Tensor) -> None:
        self.token_B.copy_(logits_BV.argmax(-1))
        self.position += 1
        self.written_BS.index_copy_(1, self.position, self.token_B[:, None])

    def generate(self, prompts_BS: Tensor, n: int, step: Callable[[], Any]) -> Tensor:
        """`n` new tokens of each prompt, (B, n), on the host; `step` is `self.step`, or its
        replay."""
        self.read(prompts_BS)
        for _ in range(n - 1):
            step()
        first = prompts_BS.shape[1]
        return self.written_BS[:, first : first + n].cpu()


def transformers_generate(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, prompts_BS: Tensor
) -> Callable[[int], Any] | None:
    """What writes `n` new tokens of each prompt by the `generate` of transformers, greedy, with a
    model of the same shape and random weights of its own; None where it is not installed."""
    if util.find_spec("transformers") is None:
        return None
    import transformers

    kind = transformers.Qwen3Config if config.qk_norm else transformers.LlamaConfig
    shape = kind(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.hidden_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_seq_len,
        tie_word_embeddings=config.tied_embeddings,
        rms_norm_eps=config.norm_eps,
    )
    model = transformers.AutoModelForCausalLM.from_config(shape).to(device=device, dtype=dtype)
    model.eval()
    attended = torch.ones_like(prompts_BS)

    def generate(n: int) -> Any:
        return model.generate(
            prompts_BS, attention_mask=attended, max_new_tokens=n, min_new_tokens=n,
            do_sample=False, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip

    return generate
