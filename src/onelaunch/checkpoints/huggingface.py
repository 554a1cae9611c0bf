"""Read and write Hugging Face model folders: config.json and safetensors files.

Supports the architectures LlamaForCausalLM (SmolLM2 too) and Qwen3ForCausalLM, and the
configurations of transformers 4 and 5. Canonical weight names are Hugging Face's without `model.`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from onelaunch.checkpoints.atomic import atomic_directory, read_json, write_json
from onelaunch.checkpoints.chat_template_files import read_chat_template, write_chat_template
from onelaunch.checkpoints.lfs import refuse_pointer_at
from onelaunch.checkpoints.rope_layout import to_layout
from onelaunch.checkpoints.tensors import write_tensors
from onelaunch.checkpoints.weights import LoadedModel, check_weights
from onelaunch.config import ModelConfig, RopeScaling
from onelaunch.errors import BadInput

_MODEL_TYPES = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3"}
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
}
_FIELD_NAME = re.compile(rf"\b({'|'.join(_FIELDS | _OPTIONAL_FIELDS)})\b")
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"

# Parsed JSON takes many times its size in memory. Real configurations have a few kilobytes, the
# index of a large model less than a megabyte.
_CONFIG_BYTES = 1 << 20
_INDEX_BYTES = 4 << 20


def matches(path: Path) -> bool:
    """Return whether `path` is a folder with files of a Hugging Face model."""
    names = ("config.json", _WEIGHTS, _INDEX, "pytorch_model.bin")
    return path.is_dir() and any((path / name).is_file() for name in names)


def read(path: Path) -> LoadedModel:
    """Read the model in a folder; raises BadInput for missing files or unsupported features."""
    path = Path(path)
    config_path = path / "config.json"
    if not config_path.is_file():
        raise BadInput(f"{path}: config.json is missing; is the download complete?")
    data = read_json(config_path, _CONFIG_BYTES)
    try:
        config = parse_config(data)
    except BadInput as error:
        raise BadInput(f"{config_path}: {_with_hf_names(str(error))}") from error
    bos_id, stop_ids = _special_ids(path, data, config)
    chat_template, notices = read_chat_template(path)
    return LoadedModel(
        config=config,
        weights=_read_weights(path, config),
        source=path,
        format="hf",
        bos_id=bos_id,
        stop_ids=stop_ids,
        chat_template=chat_template,
        notices=notices,
    )


def parse_config(data: dict[str, Any]) -> ModelConfig:
    """Convert a config.json to a ModelConfig; raises BadInput for unsupported features."""
    architecture = _architecture(data)
    _refuse_variants(data)
    heads = data.get("num_attention_heads")
    # Qwen3's default; Llama's is hidden_size / num_attention_heads, as in ModelConfig.
    head_dim = data.get("head_dim", 128 if architecture == "Qwen3ForCausalLM" else None)
    rope_theta, rope_scaling = _rope(data)
    for key in _FIELDS.values():
        if key not in data:
            raise BadInput(f"{key} is missing; is this the configuration of a language model?")
    kv_heads = data.get("num_key_value_heads")
    return ModelConfig(
        **{field: data[key] for field, key in _FIELDS.items()},
        n_kv_heads=heads if kv_heads is None else kv_heads,  # type: ignore[arg-type]
        head_dim=0 if head_dim is None else head_dim,
        norm_eps=data.get("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        rope_layout="half",
        rope_scaling=rope_scaling,
        qk_norm=architecture == "Qwen3ForCausalLM",
        tied_embeddings=data.get("tie_word_embeddings", False),
    )


def _with_hf_names(message: str) -> str:
    """Replace ModelConfig field names in a message by those of config.json."""
    return _FIELD_NAME.sub(lambda match: (_FIELDS | _OPTIONAL_FIELDS)[match[1]], message)


def _architecture(data: dict[str, Any]) -> str:
    names = data.get("architectures")
    if names is None:
        model_type = data.get("model_type")
        names = [name for name, kind in _MODEL_TYPES.items() if kind == model_type] or [model_type]
    if not isinstance(names, list) or len(names) != 1 or names[0] not in list(_MODEL_TYPES):
        shown = names[0] if isinstance(names, list) and len(names) == 1 else names
        raise BadInput(f"architecture {shown!r}: must be one of {', '.join(_MODEL_TYPES)}")
    return str(names[0])


def _refuse_variants(data: dict[str, Any]) -> None:
    for key in ("attention_bias", "mlp_bias"):
        if data.get(key):
            raise BadInput(f"{key}: projections with a bias are not supported")
    activation = data.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise BadInput(f"hidden_act {activation!r} is not supported; only silu is")
    if data.get("quantization_config"):
        raise BadInput("quantized weights are not supported; use the float32 or bfloat16 model")
    layer_types = data.get("layer_types") or []
    full = isinstance(layer_types, list) and all(kind == "full_attention" for kind in layer_types)
    if data.get("use_sliding_window") or not full:
        raise BadInput("sliding-window attention is not supported")


def _rope(data: dict[str, Any]) -> tuple[Any, RopeScaling | None]:
    """Return base and scaling, in two keys in transformers 4, in one table in 5."""
    rope = data.get("rope_scaling") or data.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise BadInput("rope_parameters must be one table for all layers")
    if any(d.get("partial_rotary_factor", 1.0) not in (None, 1) for d in (data, rope)):
        raise BadInput("partial_rotary_factor is not supported; every element must rotate")
    rope_theta = rope.get("rope_theta", data.get("rope_theta"))
    rope_theta = 10000.0 if rope_theta is None else rope_theta
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return rope_theta, None
    if kind != "llama3":
        raise BadInput(f"rope scaling {kind!r} is not supported; only llama3 is")
    original = rope.get("original_max_position_embeddings", data.get("max_position_embeddings"))
    values = {
        "factor": rope.get("factor"),
        "low_freq_factor": rope.get("low_freq_factor"),
        "high_freq_factor": rope.get("high_freq_factor"),
        "original_max_seq_len": data.get("original_max_position_embeddings", original),
    }
    return rope_theta, RopeScaling(**values)  # type: ignore[arg-type]


def _special_ids(
    path: Path, data: dict[str, Any], config: ModelConfig
) -> tuple[int | None, tuple[int, ...]]:
    """Return the BOS id and the stop ids (EOS and BOS); generation_config.json takes precedence.

    Ids outside the vocabulary, as in shrunken test models, are dropped.
    """
    generation: dict[str, Any] = {}
    generation_path = path / "generation_config.json"
    if generation_path.is_file():
        generation = read_json(generation_path, _CONFIG_BYTES)
    # LlamaConfig's defaults, for keys that the file leaves out.
    defaults = {} if config.qk_norm else {"bos_token_id": 1, "eos_token_id": 2}

    def ids(key: str) -> list[int]:
        value = generation.get(key)
        if value is None:
            value = data.get(key, defaults.get(key))
        values = value if isinstance(value, list) else [] if value is None else [value]
        for i in values:
            if isinstance(i, bool) or not isinstance(i, int):
                raise BadInput(f"{path / 'config.json'}: {key} {value!r} is not a token id")
        return [i for i in values if 0 <= i < config.vocab_size]

    bos = ids("bos_token_id")[:1]
    return (bos[0] if bos else None), tuple(sorted({*bos, *ids("eos_token_id")}))


def _read_weights(path: Path, config: ModelConfig) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for file, names in _files(path):
        with _open(file) as tensors:
            present = set(tensors.keys())
            for name in sorted(present) if names is None else names:
                if name not in present:
                    raise BadInput(f"{file}: the tensor {name} of {_INDEX} is missing")
                # Old exports stored the rotary frequencies, which the configuration implies.
                if name.endswith("rotary_emb.inv_freq"):
                    continue
                dtype = tensors.get_slice(name).get_dtype()
                if dtype not in _DTYPES:
                    raise BadInput(
                        f"{file}: the tensor {name} is {dtype}; "
                        f"supported are {', '.join(_DTYPES.values())}"
                    )
                canonical = name.removeprefix("model.")
                if canonical in weights:
                    raise BadInput(f"{file}: the tensor {name} occurs twice")
                weights[canonical] = tensors.get_tensor(name)
    head = weights.pop("lm_head.weight", None) if config.tied_embeddings else None
    check_weights(config, weights, path)
    if head is not None and not torch.equal(head, weights["embed_tokens.weight"]):
        raise BadInput(
            f"{path}: config.json ties the classifier to the embedding, but lm_head.weight "
            "differs from it; set tie_word_embeddings to false"
        )
    return weights


def _files(path: Path) -> list[tuple[Path, list[str] | None]]:
    """List the weight files, each with the names of its tensors (None: all of them)."""
    if (path / _WEIGHTS).is_file():
        return [(path / _WEIGHTS, None)]
    if not (path / _INDEX).is_file():
        if any(path.glob("pytorch_model*.bin")):
            raise BadInput(
                f"{path}: pickled weights (pytorch_model.bin) are not loaded, as a pickle can run "
                "code; convert them to safetensors"
            )
        raise BadInput(f"{path}: {_WEIGHTS} is missing; is the download complete?")
    index = path / _INDEX
    weight_map = read_json(index, _INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInput(f"{index}: weight_map is missing or empty")
    shards: dict[str, list[str]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise BadInput(f"{index}: {shard!r} is not a safetensors file name in this folder")
        shards.setdefault(shard, []).append(tensor)
    for shard in shards:
        if not (path / shard).is_file():
            raise BadInput(f"{path}: {shard} is missing; is the download complete?")
    return [(path / shard, names) for shard, names in shards.items()]


# A plain file name: no separator, no drive, no leading dot, so that it cannot leave the folder.
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*\.safetensors", re.ASCII)


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    """Map a safetensors file; any error in it raises BadInput."""
    refuse_pointer_at(file)
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, RuntimeError, ValueError, OverflowError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{file}: damaged or incomplete safetensors file ({error})") from error
    except OSError as error:
        raise BadInput(f"{file}: cannot read: {error.strerror or error}") from error


def write(model: LoadedModel, out: Path) -> None:
    """Write a folder that transformers can load; `out` must not exist.

    Raises BadInput if it exists or cannot be written, and for weights other than float32, float16
    or bfloat16. The caller saves the tokenizer.
    """
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise BadInput(f"{out}: already exists; choose a new folder, or delete this one")
    config, weights = to_layout(model.config, model.weights, "half")
    dtype = str(weights["embed_tokens.weight"].dtype).removeprefix("torch.")
    if dtype not in _DTYPES.values():
        raise BadInput(f"{out}: {dtype} weights cannot be written; convert them to float32")
    tensors = {
        name if name.startswith("lm_head.") else f"model.{name}": tensor.detach().contiguous()
        for name, tensor in weights.items()
    }
    bos_id, stop_ids = _ids_in_vocabulary(model)
    with atomic_directory(out) as folder:
        write_json(folder / "config.json", config_json(config, bos_id, stop_ids, dtype))
        write_json(
            folder / "generation_config.json",
            {"bos_token_id": bos_id, "eos_token_id": _one_or_list(list(stop_ids))},
        )
        if model.chat_template is not None:
            write_chat_template(folder, model.chat_template)
        write_tensors(folder / _WEIGHTS, tensors)


def _ids_in_vocabulary(model: LoadedModel) -> tuple[int | None, tuple[int, ...]]:
    """Return BOS and the stop ids, without those outside the vocabulary."""
    size, bos_id = model.config.vocab_size, model.bos_id
    return (
        bos_id if bos_id is not None and 0 <= bos_id < size else None,
        tuple(i for i in model.stop_ids if 0 <= i < size),
    )


def config_json(
    config: ModelConfig, bos_id: int | None, stop_ids: tuple[int, ...], dtype: str
) -> dict[str, Any]:
    """Return the content of config.json, in keys that transformers 4 and 5 both read."""
    architecture = "Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"
    eos_ids = [i for i in stop_ids if i != bos_id] or list(stop_ids)
    data: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": _MODEL_TYPES[architecture],
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
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": bos_id,
        "eos_token_id": _one_or_list(eos_ids),
        "use_cache": True,
        "torch_dtype": dtype,
    }
    if config.qk_norm:
        window = {"use_sliding_window": False, "sliding_window": None}
        return {**data, **window, "max_window_layers": config.n_layers}
    return {**data, "mlp_bias": False, "pretraining_tp": 1}


def _rope_scaling_json(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    return {
        "rope_type": "llama3",
        "factor": float(scaling.factor),
        "low_freq_factor": float(scaling.low_freq_factor),
        "high_freq_factor": float(scaling.high_freq_factor),
        "original_max_position_embeddings": scaling.original_max_seq_len,
    }


def _one_or_list(ids: list[int]) -> int | list[int] | None:
    return ids[0] if len(ids) == 1 else ids or None
