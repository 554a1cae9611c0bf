"""The names in GGUF files: architectures, keys of metadata, and tensors."""

from __future__ import annotations

from onelaunch.config import RopeLayout

ARCHITECTURE = "general.architecture"
ARCHITECTURES: dict[str, RopeLayout] = {
    "llama": "interleaved",
    "qwen2": "half",
    "qwen3": "half",
}
"""The rotary layout of each architecture."""
KEYS = {
    "dim": "embedding_length",
    "n_layers": "block_count",
    "n_heads": "attention.head_count",
    "hidden_dim": "feed_forward_length",
    "max_seq_len": "context_length",
    "n_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
}
"""Fields of ModelConfig that are integers, and their keys after that of the architecture."""
FLOAT_KEYS = {"norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base"}
OPTIONAL = ("n_kv_heads", "head_dim", "rope_theta")
"""Fields whose keys a file may leave out."""

DIVISORS = "rope_freqs.weight"
"""The tensor with Llama 3's rotary scaling."""
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_WHOLE_NAMES = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    """Return the name in a GGUF file of a tensor by its canonical name."""
    stem, _, suffix = name.rpartition(".")
    if stem in _WHOLE_NAMES:
        return f"{_WHOLE_NAMES[stem]}.{suffix}"
    _, layer, kind = stem.split(".", 2)
    return f"blk.{layer}.{_LAYER_NAMES[kind]}.{suffix}"
