"""Convert a ModelConfig to config.json of a Hugging Face folder."""

from __future__ import annotations

from typing import Any

from onelaunch.checkpoints.hf_config import ACTIVATIONS, FAMILIES, FULL, SLIDING, parse_config
from onelaunch.config import (
    AnyRopeScaling,
    LinearRopeScaling,
    ModelConfig,
    RopeScaling,
    YarnRopeScaling,
)
from onelaunch.errors import BadInput


def config_json(
    config: ModelConfig, bos_id: int | None, stop_ids: tuple[int, ...], dtype: str
) -> dict[str, Any]:
    """Return the content of config.json, in keys that transformers 4 and 5 both read, by the first
    architecture that reads back as `config`. Raises BadInput where none does."""
    eos_ids = [i for i in stop_ids if i != bos_id] or list(stop_ids)
    for architecture in FAMILIES:
        try:
            data = _written(architecture, config, bos_id, one_or_list(eos_ids), dtype)
            if parse_config(data) == config:
                return data
        except (BadInput, OverflowError):  # a value that this architecture cannot have
            continue
    raise BadInput(
        f"format='hf': no architecture in Hugging Face's folders has "
        f"{', '.join(config.extensions) or 'this configuration'}; known are {', '.join(FAMILIES)}"
    )


def _written(
    architecture: str, config: ModelConfig, bos_id: int | None, eos_id: Any, dtype: str
) -> dict[str, Any]:
    model_type = FAMILIES[architecture].model_type
    activations = {kept: name for name, kept in reversed(ACTIVATIONS.items())}
    data: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_scaling_json(config.rope_scaling),
        "hidden_act": activations[config.activation],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "use_cache": True,
        "torch_dtype": dtype,
    }
    layers = range(config.n_layers)
    windows = [config.window(i) is not None for i in layers]
    kinds = [SLIDING if slides else FULL for slides in windows]
    window = {"use_sliding_window": any(windows), "sliding_window": config.sliding_window}
    no_pad = {"pad_token_id": None}  # the default may lie outside a small vocabulary
    match model_type:
        case "llama":
            return {**data, "mlp_bias": False, "pretraining_tp": 1}
        case "qwen2" | "qwen3":
            first = windows.index(True) if any(windows) else config.n_layers
            data |= {**window, "max_window_layers": first}
            return {**data, "layer_types": kinds} if any(windows) else data
        case "mistral":
            return {**data, "sliding_window": config.sliding_window}
        case "smollm3":
            ropes = [int(i not in config.layers_without_rope) for i in layers]
            return {**data, **no_pad, **window, "layer_types": kinds, "no_rope_layers": ropes}
        case "olmo2":
            return {**data, **no_pad}
        case "gemma3_text":
            scale = config.attention_scale
            activation = data.pop("hidden_act")
            return {
                **data,
                **no_pad,
                "hidden_activation": activation,
                "query_pre_attn_scalar": config.head_dim if scale is None else round(scale**-2),
                "sliding_window": config.sliding_window,
                "layer_types": kinds,
                "rope_local_base_freq": config.sliding_rope_theta or config.rope_theta,
                "final_logit_softcapping": config.logit_softcap,
                "attn_logit_softcapping": None,
            }
    return data


def _rope_scaling_json(scaling: AnyRopeScaling | None) -> dict[str, Any] | None:
    match scaling:
        case LinearRopeScaling():
            return {"rope_type": "linear", "factor": float(scaling.factor)}
        case YarnRopeScaling():
            table: dict[str, Any] = {
                "rope_type": "yarn",
                "factor": float(scaling.factor),
                "beta_fast": float(scaling.beta_fast),
                "beta_slow": float(scaling.beta_slow),
                "original_max_position_embeddings": scaling.original_max_seq_len,
            }
            factor = scaling.attention_factor
            return table if factor is None else {**table, "attention_factor": float(factor)}
        case RopeScaling():
            return {
                "rope_type": "llama3",
                "factor": float(scaling.factor),
                "low_freq_factor": float(scaling.low_freq_factor),
                "high_freq_factor": float(scaling.high_freq_factor),
                "original_max_position_embeddings": scaling.original_max_seq_len,
            }
    return None


def one_or_list(ids: list[int]) -> int | list[int] | None:
    """A single id, a list of several, or None."""
    return ids[0] if len(ids) == 1 else ids or None
