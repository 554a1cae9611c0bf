"""config.json of each family: the Hub's own files, both styles of transformers, refusals."""

from __future__ import annotations

from typing import Any

import pytest

from onelaunch.checkpoints.hf_config import FAMILIES, parse_config, with_defaults
from onelaunch.checkpoints.hf_config_write import config_json
from onelaunch.config import LinearRopeScaling, ModelConfig, RopeScaling, YarnRopeScaling
from onelaunch.errors import BadInput

PLAIN = ModelConfig(
    dim=16, n_layers=6, n_heads=4, n_kv_heads=2, hidden_dim=24, vocab_size=40, max_seq_len=32,
    norm_eps=1e-6, tied_embeddings=False,
)  # fmt: skip
SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 24,
    "vocab_size": 40,
    "max_position_embeddings": 32,
}
GEMMA = PLAIN.with_(
    qk_norm=True, norm_placement="both", norm_offset=1.0, activation="gelu_tanh",
    embedding_scale=4.0, sliding_window=4, sliding_layers=(0, 1, 2, 3, 4), rope_theta=1e6,
    sliding_rope_theta=1e4, tied_embeddings=True, attention_scale=256**-0.5,
)  # fmt: skip


def parsed(architecture: str, **keys: Any) -> ModelConfig:
    return parse_config({"architectures": [architecture], **SHAPE, **keys})


def refusal(architecture: str, **keys: Any) -> str:
    with pytest.raises(BadInput) as caught:
        parsed(architecture, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What the Hub has, shortened to the keys that matter here. The models: Mistral-7B-v0.1 and v0.3,
# Qwen2.5-0.5B, SmolLM3-3B, OLMo-2-0425-1B, gemma-3-1b-pt (a file of transformers 4.50) and
# gemma-3-270m (of 4.56).
MISTRAL: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
    "tie_word_embeddings": False, "vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
QWEN: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2",
    "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
    "tie_word_embeddings": True, "use_mrope": False, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
SMOL: dict[str, Any] = {
    "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 11008, "layer_types": ["full_attention"] * 36,
    "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": False,
    "model_type": "smollm3", "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9,
    "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4,
    "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 5000000.0,
    "sliding_window": None, "use_sliding_window": False, "vocab_size": 128256,
}  # fmt: skip
OLMO: dict[str, Any] = {
    "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "eos_token_id": 100257,
    "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192,
    "max_position_embeddings": 4096, "model_type": "olmo2", "num_attention_heads": 16,
    "num_hidden_layers": 16, "num_key_value_heads": 16, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False,
    "vocab_size": 100352,
}  # fmt: skip
GEMMA_1B: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False,
    "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid",
    "eos_token_id": 1, "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
    "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4,
    "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
    "vocab_size": 262144,
}  # fmt: skip
GEMMA_270M: dict[str, Any] = {
    **GEMMA_1B, "_sliding_window_pattern": 6, "hidden_size": 640, "intermediate_size": 2048,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    "num_hidden_layers": 18, "use_bidirectional_attention": False,
}  # fmt: skip
del GEMMA_270M["sliding_window_pattern"]
ON_THE_HUB = {
    "mistral": (
        MISTRAL, 7_241_732_096, {"sliding_window": 4096, "norm_eps": 1e-5, "rope_theta": 1e4}
    ),
    "mistral without window": (
        MISTRAL | {"sliding_window": None, "vocab_size": 32768, "rope_theta": 1e6},
        7_248_023_552, {"sliding_window": None, "rope_theta": 1e6},
    ),
    "qwen2": (
        QWEN, 494_032_768, {"qkv_bias": True, "head_dim": 64, "sliding_window": None},
    ),
    "smollm3": (
        SMOL, 3_075_098_624,
        {
            "layers_without_rope": tuple(range(3, 36, 4)), "tied_embeddings": True,
            "rope_theta": 5e6, "sliding_window": None,
        },
    ),
    "olmo2": (
        OLMO, 1_484_916_736,
        {"norm_placement": "post", "qk_norm": "full", "norm_eps": 1e-6, "qkv_bias": False},
    ),
    "gemma3 1b": (
        GEMMA_1B, 999_885_952,
        {
            "sliding_layers": tuple(i for i in range(26) if i % 6 != 5), "sliding_window": 512,
            "attention_scale": None, "embedding_scale": 1152**0.5, "tied_embeddings": True,
            "rope_theta": 1e6, "sliding_rope_theta": 1e4, "norm_offset": 1.0,
        },
    ),
    "gemma3 270m": (
        GEMMA_270M, 268_098_176,
        {"sliding_layers": tuple(i for i in range(18) if i % 6 != 5), "dim": 640},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ON_THE_HUB)
def test_files_of_the_hub(name: str) -> None:
    """With their published numbers of parameters."""
    data, parameters, expected = ON_THE_HUB[name]
    config = parse_config(data)
    assert config.n_params == parameters
    for field, value in expected.items():
        assert getattr(config, field) == value, field
    assert bool(config.extensions) == (name != "mistral without window")
    again = config_json(config, 1, (1, 2), "bfloat16")
    assert again["architectures"] in (data["architectures"], ["LlamaForCausalLM"])
    assert parse_config(again) == config


# absent keys of the first two are read as Llama's, which is older than this rule
@pytest.mark.parametrize("architecture", [*FAMILIES][2:])
def test_defaults_are_those_of_transformers(architecture: str) -> None:
    """A file with the dimensions alone means what it means to transformers."""
    transformers = pytest.importorskip("transformers", "5")
    model_type = FAMILIES[architecture].model_type
    required = {key: SHAPE[key] for key in SHAPE if key not in ("num_key_value_heads", "head_dim")}
    required |= {"num_attention_heads": 32, "hidden_size": 64}
    theirs = transformers.AutoConfig.for_model(model_type, **required)
    least = {"architectures": [architecture], **required}
    assert parse_config(least) == parse_config({**least, **theirs.to_dict()})
    for key in ("bos_token_id", "eos_token_id"):
        assert with_defaults(least).get(key) == getattr(theirs, key)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"factor": 2.0}, LinearRopeScaling(2.0)),
        ({"factor": 4.0, "original_max_position_embeddings": 8}, YarnRopeScaling(4.0, 8)),
        ({"factor": 4.0, "beta_fast": None, "attention_factor": 0.5},
         YarnRopeScaling(4.0, 32, attention_factor=0.5)),
        ({"factor": 4.0, "beta_fast": 16.0, "beta_slow": 2, "truncate": True},
         YarnRopeScaling(4.0, 32, 16.0, 2.0)),
    ],
)  # fmt: skip
def test_rope_scaling_in_both_styles(scaling: dict[str, Any], expected: Any) -> None:
    kind = "linear" if isinstance(expected, LinearRopeScaling) else "yarn"
    wanted = PLAIN.with_(rope_theta=5e5, rope_scaling=expected)
    for key in ("type", "rope_type"):
        four = {"rope_theta": 5e5, "rope_scaling": {key: kind, **scaling}}
        assert parsed("LlamaForCausalLM", **four) == wanted
    five = {"rope_parameters": {"rope_type": kind, "rope_theta": 5e5, **scaling}}
    assert parsed("LlamaForCausalLM", **five) == wanted


def test_gemmas_two_rotary_bases_in_both_styles() -> None:
    base = {"sliding_window": 4}
    assert parsed("Gemma3ForCausalLM", **base) == GEMMA
    four = {"rope_theta": 3e6, "rope_local_base_freq": 2e4}
    five = {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 3e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        }
    }
    wanted = GEMMA.with_(rope_theta=3e6, sliding_rope_theta=2e4)
    assert parsed("Gemma3ForCausalLM", **base, **four) == wanted
    assert parsed("Gemma3ForCausalLM", **base, **five) == wanted
    wanted = wanted.with_(rope_scaling=LinearRopeScaling(8.0))
    four["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}  # type: ignore[assignment]
    five["rope_parameters"]["full_attention"] |= {"rope_type": "linear", "factor": 8.0}
    assert parsed("Gemma3ForCausalLM", **base, **four) == wanted
    assert parsed("Gemma3ForCausalLM", **base, **five) == wanted
    all_full = {"layer_types": ["full_attention"] * 6}
    plain = parsed("Gemma3ForCausalLM", **base, **all_full)
    assert (plain.sliding_window, plain.sliding_rope_theta) == (None, None)


@pytest.mark.parametrize(
    ("architecture", "keys", "window", "layers"),
    [
        ("MistralForCausalLM", {}, 4096, ()),
        ("MistralForCausalLM", {"sliding_window": 8}, 8, ()),
        ("MistralForCausalLM", {"sliding_window": None}, None, ()),
        ("Qwen2ForCausalLM", {"sliding_window": 8, "max_window_layers": 2}, None, ()),
        (
            "Qwen2ForCausalLM",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
            8,
            (2, 3, 4, 5),
        ),
        (
            "Qwen3ForCausalLM",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
            8,
            (),
        ),
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 8}, None, ()),
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": None}, None, ()),
        (
            "SmolLM3ForCausalLM",
            {"use_sliding_window": True, "sliding_window": 8, "no_rope_layer_interval": 3},
            8,
            (2, 5),
        ),
        (
            "Gemma3ForCausalLM",
            {"sliding_window": 8, "sliding_window_pattern": 2},
            8,
            (0, 2, 4),
        ),
    ],
)
def test_windows(
    architecture: str, keys: dict[str, Any], window: int | None, layers: tuple[int, ...]
) -> None:
    config = parsed(architecture, **keys)
    assert (config.sliding_window, config.sliding_layers) == (window, layers)
    # the kinds of layers by name are the same
    if window is not None and architecture != "MistralForCausalLM":
        slides = [config.window(i) is not None for i in range(6)]
        kinds = ["sliding_attention" if each else "full_attention" for each in slides]
        assert parsed(architecture, **keys, layer_types=kinds) == config


@pytest.mark.parametrize(
    ("architecture", "keys", "needle"),
    [
        ("Qwen2ForCausalLM", {"attention_bias": True}, "attention_bias"),
        ("SmolLM3ForCausalLM", {"mlp_bias": True}, "mlp_bias"),
        ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional"),
        ("Gemma3ForCausalLM", {"final_logit_softcapping": -1.0}, "final_logit_softcapping must"),
        ("Gemma3ForCausalLM", {"hidden_activation": "gelu"}, "hidden_activation 'gelu'"),
        ("Gemma3ForCausalLM", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must"),
        ("Gemma3ForCausalLM", {"query_pre_attn_scalar": 10**400}, "query_pre_attn_scalar must"),
        ("Gemma3ForCausalLM", {"hidden_size": 10**400}, "hidden_size must"),
        ("Gemma3ForCausalLM", {"hidden_size": "16"}, "hidden_size must"),
        ("Gemma3ForCausalLM", {"sliding_window": "x"}, "sliding_window must"),
        ("Gemma3ForCausalLM", {"sliding_window_pattern": 0}, "sliding_window_pattern must"),
        ("Gemma3ForCausalLM", {"rope_local_base_freq": 0}, "rope_local_base_freq must"),
        (
            "Gemma3ForCausalLM",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "scaling of sliding_attention",
        ),
        (
            "Gemma3ForCausalLM",
            {"rope_parameters": {"sliding_attention": {}, "full_attention": 3, "x": {}}},
            "full_attention must be a table",
        ),
        ("Gemma3ForCausalLM", {"layer_types": ["full_attention"] * 5}, "layer_types"),
        ("Gemma3ForCausalLM", {"layer_types": ["chunked_attention"] * 6}, "layer_types"),
        ("Olmo2ForCausalLM", {"use_sliding_window": True}, "use_sliding_window"),
        ("Olmo2ForCausalLM", {"layer_types": ["sliding_attention"] * 6}, "sliding-window"),
        ("MistralForCausalLM", {"layer_types": ["full_attention"] * 6}, "layer_types"),
        ("Qwen2ForCausalLM", {"layer_types": ["sliding_attention"] * 6}, "sliding-window"),
        (
            "Qwen2ForCausalLM",
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": "2"},
            "max_window_layers",
        ),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0, 2, 1, 1, 1]}, "no_rope_layers"),
        ("SmolLM3ForCausalLM", {"no_rope_layer_interval": 0}, "no_rope_layer_interval"),
        ("SmolLM3ForCausalLM", {"num_hidden_layers": 10**12}, "num_hidden_layers must"),
        ("MistralForCausalLM", {"num_hidden_layers": 10**12}, "num_hidden_layers must"),
        ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "longrope"}}, "'longrope'"),
        (
            "LlamaForCausalLM",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0}},
            "mscale",
        ),
        (
            "LlamaForCausalLM",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": False}},
            "truncate",
        ),
        (
            "LlamaForCausalLM",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_theta": 1.0},
            "YaRN needs",
        ),
    ],
)
def test_refused_by_name(architecture: str, keys: dict[str, Any], needle: str) -> None:
    assert needle in refusal(architecture, **keys)


@pytest.mark.parametrize(
    "config",
    [
        PLAIN.with_(norm_placement="post"),
        PLAIN.with_(norm_placement="both", qk_norm=True),
        PLAIN.with_(qkv_bias=True, qk_norm=True),
        PLAIN.with_(norm_offset=1.0),
        PLAIN.with_(embedding_scale=2.0),
        PLAIN.with_(attention_scale=0.3),
        PLAIN.with_(logit_softcap=30.0),
        PLAIN.with_(sliding_window=4, sliding_rope_theta=1e3),
        PLAIN.with_(qkv_bias=True, layers_without_rope=(1,)),
        GEMMA.with_(attention_scale=0.3),
        GEMMA.with_(attention_scale=1e-200),
        GEMMA.with_(embedding_scale=3.9),
    ],
)
def test_what_no_architecture_has_is_not_written(config: ModelConfig) -> None:
    with pytest.raises(BadInput, match=r"^format='hf': .* has ") as caught:
        config_json(config, 1, (1, 2), "float32")
    assert config.extensions[0] in str(caught.value)


def test_what_llama_can_say_is_written_as_before() -> None:
    """Keys and their order: files of the same model stay the same bytes."""
    for config, last in (
        (PLAIN.with_(rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16)), ["mlp_bias", "pretraining_tp"]),
        (
            PLAIN.with_(qk_norm=True),
            ["use_sliding_window", "sliding_window", "max_window_layers"],
        ),
    ):
        data = config_json(config, 1, (1, 2), "float32")
        assert [*data][:4] == ["architectures", "model_type", "hidden_size", "intermediate_size"]
        assert [*data][22:] == last
        assert data["hidden_act"] == "silu"
        assert "layer_types" not in data


HOSTILE = (
    None, True, 0, -1, 10**400, 1.5, float("nan"), "x", "", [], [1, None], {}, {"rope_type": []},
    {"full_attention": None, "sliding_attention": {"rope_theta": "x"}},
)  # fmt: skip


@pytest.mark.parametrize("name", ON_THE_HUB)
def test_any_value_of_any_key_is_read_or_refused(name: str) -> None:
    data = ON_THE_HUB[name][0]
    switches = {"use_sliding_window", "no_rope_layers", "layer_types", "rope_parameters"}
    messages = []
    for key in sorted({*data} | switches):
        for value in HOSTILE:
            try:
                parse_config({**data, key: value})
            except BadInput as error:
                messages.append(str(error))
    assert len(messages) > 50
    assert not any("\n" in message for message in messages)
