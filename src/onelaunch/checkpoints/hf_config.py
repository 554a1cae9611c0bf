"""Convert config.json of a Hugging Face folder to a ModelConfig.

`FAMILIES` lists the architectures. An absent key has the default of the family's configuration
class in transformers 5; the styles of transformers 4 and 5 are both read. A feature that
ModelConfig does not carry raises BadInput with the key's name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from onelaunch.config import (
    MAX_EXTENT,
    MAX_LAYERS,
    Activation,
    AnyRopeScaling,
    LinearRopeScaling,
    ModelConfig,
    RopeScaling,
    YarnRopeScaling,
)
from onelaunch.errors import BadInput


@dataclass(frozen=True)
class Family:
    """An architecture of transformers.

    defaults: of absent keys of its config.json, where they are not those of Llama.
    fields: of ModelConfig that the architecture itself fixes.
    """

    model_type: str
    defaults: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)


FAMILIES = {
    "LlamaForCausalLM": Family("llama", {"bos_token_id": 1, "eos_token_id": 2}),
    "Qwen3ForCausalLM": Family("qwen3", {"head_dim": 128}, {"qk_norm": True}),
    "Qwen2ForCausalLM": Family("qwen2", {"num_key_value_heads": 32}, {"qkv_bias": True}),
    "MistralForCausalLM": Family(
        "mistral",
        {"num_key_value_heads": 8, "sliding_window": 4096, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        {
            "num_key_value_heads": 4,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        },
    ),
    "Olmo2ForCausalLM": Family(
        "olmo2",
        {"rms_norm_eps": 1e-5, "eos_token_id": 50279},
        {"norm_placement": "post", "qk_norm": "full"},
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        {
            "num_key_value_heads": 4,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
            "bos_token_id": 2,
            "eos_token_id": 1,
        },
        {"norm_placement": "both", "norm_offset": 1.0, "qk_norm": True},
    ),
}

_FIELDS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
}
"""Required fields of config.json, by their names in ModelConfig."""
_OPTIONAL_FIELDS = {
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "original_max_seq_len": "original_max_position_embeddings",
    "tied_embeddings": "tie_word_embeddings",
    "attention_scale": "query_pre_attn_scalar",
    "logit_softcap": "final_logit_softcapping",
    "sliding_layers": "layer_types",
    "sliding_rope_theta": "rope_local_base_freq",
    "layers_without_rope": "no_rope_layers",
}
_FIELD_NAME = re.compile(rf"\b({'|'.join(_FIELDS | _OPTIONAL_FIELDS)})\b")

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
SLIDING, FULL = "sliding_attention", "full_attention"
_SWITCHED = ("qwen2", "qwen3", "smollm3")  # families whose windows hold if use_sliding_window
_GEMMA_PERIOD = 6  # of layers, the last of which sees all positions


def with_defaults(data: dict[str, Any]) -> dict[str, Any]:
    """Fill in the keys that a config.json leaves out. Raises BadInput for an architecture that is
    not in `FAMILIES`."""
    return {**FAMILIES[_architecture(data)].defaults, **data}


def parse_config(data: dict[str, Any]) -> ModelConfig:
    """Convert a config.json to a ModelConfig; raises BadInput for unsupported features, with the
    names that config.json has."""
    architecture = _architecture(data)
    family, data = FAMILIES[architecture], with_defaults(data)
    _refuse_variants(data)
    for key in _FIELDS.values():
        if key not in data:
            raise BadInput(f"{key} is missing; is this the configuration of a language model?")
    try:
        return _parsed(family, data)
    except BadInput as error:
        raise BadInput(_FIELD_NAME.sub(_hf_name, str(error))) from error


def _hf_name(match: re.Match[str]) -> str:
    return (_FIELDS | _OPTIONAL_FIELDS)[match[1]]


def _architecture(data: dict[str, Any]) -> str:
    names = data.get("architectures")
    if names is None:
        model_type = data.get("model_type")
        names = [name for name, family in FAMILIES.items() if family.model_type == model_type]
        names = names or [model_type]
    if not isinstance(names, list) or len(names) != 1 or names[0] not in list(FAMILIES):
        shown = names[0] if isinstance(names, list) and len(names) == 1 else names
        raise BadInput(f"architecture {shown!r}: must be one of {', '.join(FAMILIES)}")
    return str(names[0])


def _refuse_variants(data: dict[str, Any]) -> None:
    if data.get("attention_bias"):
        raise BadInput(
            "attention_bias: a bias on the output projection of attention is not supported"
        )
    if data.get("mlp_bias"):
        raise BadInput("mlp_bias: projections with a bias are not supported")
    if data.get("quantization_config"):
        raise BadInput("quantized weights are not supported; use the float32 or bfloat16 model")
    if data.get("attn_logit_softcapping") is not None:
        raise BadInput("attn_logit_softcapping: a cap on the scores of attention is not supported")
    if data.get("use_bidirectional_attention"):
        raise BadInput("use_bidirectional_attention: only causal attention is supported")


def _parsed(family: Family, data: dict[str, Any]) -> ModelConfig:
    kv_heads, head_dim = data.get("num_key_value_heads"), data.get("head_dim")
    rope_theta, rope_scaling = _rope(data, _rope_table(data))
    layers = data["num_hidden_layers"]
    if type(layers) is not int or layers > MAX_LAYERS:
        layers = 0  # refused with the other dimensions
    fields = {name: data[key] for name, key in _FIELDS.items()}
    fields |= {
        "n_kv_heads": data["num_attention_heads"] if kv_heads is None else kv_heads,
        "head_dim": 0 if head_dim is None else head_dim,
        "norm_eps": data.get("rms_norm_eps", 1e-6),
        "rope_theta": rope_theta,
        "rope_layout": "half",
        "rope_scaling": rope_scaling,
        "tied_embeddings": data.get("tie_word_embeddings", False),
        "activation": _activation(data),
        **family.fields,
        **_windows(family.model_type, data, layers),
    }
    if family.model_type == "gemma3_text":
        fields |= _gemma(data, fields)
    if family.model_type == "smollm3":
        fields["layers_without_rope"] = [i for i, on in enumerate(_ropes(data, layers)) if not on]
    return ModelConfig(**fields)


def _activation(data: dict[str, Any]) -> Activation:
    key = "hidden_activation" if data.get("hidden_activation") is not None else "hidden_act"
    name = data.get(key, "silu")
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise BadInput(f"{key} {name!r} is not supported; {' and '.join(ACTIVATIONS)} are")
    return ACTIVATIONS[name]


def _gemma(data: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Gemma 3's own fields. transformers 4 has its second rotary base in `rope_local_base_freq`, 5
    in a table of rope_parameters for each kind of layer."""
    of_scores = _number(data, "query_pre_attn_scalar", 256)
    gemma: dict[str, Any] = {
        "embedding_scale": _number(data, "hidden_size", 0) ** 0.5,
        "attention_scale": None if of_scores == fields["head_dim"] else of_scores**-0.5,
        "logit_softcap": data.get("final_logit_softcapping"),
    }
    if fields["sliding_window"] is not None:
        local = {**data, "rope_theta": data["rope_local_base_freq"]}
        theta, scaling = _rope(local, _rope_table(data, SLIDING))
        if scaling is not None:
            raise BadInput(f"rope_parameters: scaling of {SLIDING} is not supported")
        gemma["sliding_rope_theta"] = theta
    return gemma


def _number(data: dict[str, Any], key: str, default: int) -> int:
    """A positive whole number."""
    value = data.get(key, default)
    if type(value) is not int or not 0 < value <= MAX_EXTENT:
        raise BadInput(f"{key} must be a whole number from 1 to {MAX_EXTENT}, not {value!r}")
    return value


def _ropes(data: dict[str, Any], layers: int) -> list[Any]:
    """SmolLM3's `no_rope_layers`: despite its name 1 for a layer with rotary embedding."""
    flags = data.get("no_rope_layers")
    if flags is None:
        interval = _number(data, "no_rope_layer_interval", 4)
        return [(i + 1) % interval for i in range(layers)]
    if not isinstance(flags, list) or len(flags) < layers or any(i not in (0, 1) for i in flags):
        raise BadInput(f"no_rope_layers must have 0 or 1 for each layer, not {flags!r}")
    return flags[:layers]


def _windows(model_type: str, data: dict[str, Any], layers: int) -> dict[str, Any]:
    """The window and its layers, as each family writes them."""
    window, kinds = data.get("sliding_window"), data.get("layer_types")
    switched_on = bool(data.get("use_sliding_window"))
    if switched_on and model_type not in _SWITCHED:
        raise BadInput(f"use_sliding_window: {model_type} has no sliding-window attention")
    named = model_type == "gemma3_text"  # whether `layer_types` decides
    slides = [False] * layers
    if named:
        period = _number(data, "sliding_window_pattern", _GEMMA_PERIOD)
        slides = [(i + 1) % period != 0 for i in range(layers)]
    elif model_type == "mistral":
        slides = [window is not None] * layers
    elif switched_on and window is not None:
        named = True
        if model_type == "smollm3":
            slides = [not on for on in _ropes(data, layers)]
        else:
            first = data.get("max_window_layers", 28)
            if type(first) is not int:
                raise BadInput(f"max_window_layers must be a whole number, not {first!r}")
            slides = [i >= first for i in range(layers)]
    if kinds and layers:
        if not isinstance(kinds, list) or any(kind not in (FULL, SLIDING) for kind in kinds):
            raise BadInput(
                f"layer_types {kinds!r}: must be a list of {FULL} and {SLIDING} (sliding-window)"
            )
        chosen = [kind == SLIDING for kind in kinds]
        if len(chosen) != layers or (chosen != slides and not named):
            raise BadInput(
                f"layer_types does not fit the {layers} layers, or names sliding-window attention "
                f"that {model_type} has not"
            )
        slides = chosen
    if not any(slides):
        return {"sliding_window": None}
    if window is None:
        raise BadInput(f"sliding_window is missing, and layer_types has {SLIDING}")
    return {"sliding_window": window, "sliding_layers": [i for i, on in enumerate(slides) if on]}


def _rope_table(data: dict[str, Any], kind: str = FULL) -> dict[str, Any]:
    """The rotary parameters of a kind of layer: in transformers 5 one table for all layers, or
    Gemma 3's for each kind; in 4 a table of the scaling, which is not for sliding layers."""
    rope = data.get("rope_scaling") or data.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise BadInput("rope_parameters must be one table for all layers")
    if any(isinstance(value, dict) for value in rope.values()):
        if "rope_local_base_freq" not in data:
            raise BadInput("rope_parameters must be one table for all layers")
        rope = rope.get(kind) or {}
        if not isinstance(rope, dict):
            raise BadInput(f"rope_parameters: {kind} must be a table")
        return rope
    return {} if kind == SLIDING else rope


def _rope(data: dict[str, Any], rope: dict[str, Any]) -> tuple[Any, AnyRopeScaling | None]:
    """Return base and scaling, in two keys in transformers 4, in one table in 5."""
    if any(d.get("partial_rotary_factor", 1.0) not in (None, 1) for d in (data, rope)):
        raise BadInput("partial_rotary_factor is not supported; every element must rotate")
    rope_theta = rope.get("rope_theta", data.get("rope_theta"))
    rope_theta = 10000.0 if rope_theta is None else rope_theta
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return rope_theta, None
    key = "original_max_position_embeddings"
    original: Any = data.get(key, rope.get(key, data.get("max_position_embeddings")))
    factor: Any = rope.get("factor")
    if kind == "linear":
        return rope_theta, LinearRopeScaling(factor)
    if kind == "llama3":
        low, high = rope.get("low_freq_factor"), rope.get("high_freq_factor")
        return rope_theta, RopeScaling(factor, low, high, original)  # type: ignore[arg-type]
    if kind != "yarn":
        raise BadInput(
            f"rope scaling {kind!r} is not supported; default, linear, llama3 and yarn are"
        )
    for key in ("mscale", "mscale_all_dim"):
        if rope.get(key):
            raise BadInput(f"rope scaling 'yarn' with {key} is not supported")
    if rope.get("truncate") is False:
        raise BadInput("rope scaling 'yarn' with truncate = false is not supported")
    fast, slow = rope.get("beta_fast") or 32.0, rope.get("beta_slow") or 1.0
    return rope_theta, YarnRopeScaling(factor, original, fast, slow, rope.get("attention_factor"))
