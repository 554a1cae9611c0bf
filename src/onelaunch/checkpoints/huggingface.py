"""Read and write Hugging Face model folders: config.json and safetensors files.

Supports the architectures of `hf_config.FAMILIES`: Llama (SmolLM2 too), Qwen2, Qwen3, Mistral,
SmolLM3, OLMo 2 and the text models of Gemma 3. Canonical weight names are Hugging Face's without
`model.`.
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
from onelaunch.checkpoints.hf_config import parse_config, with_defaults
from onelaunch.checkpoints.hf_config_write import config_json, one_or_list
from onelaunch.checkpoints.lfs import refuse_pointer_at
from onelaunch.checkpoints.rope_layout import to_layout
from onelaunch.checkpoints.tensors import write_tensors
from onelaunch.checkpoints.weights import LoadedModel, check_weights
from onelaunch.config import ModelConfig
from onelaunch.errors import BadInput

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
        raise BadInput(f"{config_path}: {error}") from error
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
    data = with_defaults(data)

    def ids(key: str) -> list[int]:
        value = generation.get(key)
        if value is None:
            value = data.get(key)
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
            {"bos_token_id": bos_id, "eos_token_id": one_or_list(list(stop_ids))},
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
