"""Read the ckpt.pt of llama2.c's train.py, by PyTorch's loader for weights only.

A dictionary with the model's state ("model", with "_orig_mod." before names where it was compiled)
and its arguments ("model_args"); the optimizer's state is left alone. The loader makes tensors,
numbers and strings and runs no code of the file. Records of the archive must be stored, not
compressed, as PyTorch writes them: a compressed one may be a thousand times as long as the file.
"""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onelaunch.checkpoints.lfs import refuse_pointer_at
from onelaunch.checkpoints.llama2c import FIELDS, make_config
from onelaunch.checkpoints.weights import LoadedModel, check_weights
from onelaunch.config import ModelConfig
from onelaunch.errors import BadInput

_LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_WHOLE_NAMES = {"tok_embeddings": "embed_tokens", "norm": "norm", "output": "lm_head"}
_COMPILED = "_orig_mod."
# Old versions kept the rotary tables, which the configuration implies.
_TABLES = ("freqs_cos", "freqs_sin", "freqs_cis")
# The pickle without tensors: real ones have about a hundred kilobytes.
_MAX_PICKLE_BYTES = 4 << 20


def matches(path: Path) -> bool:
    """Return whether `path` is a file named `*.pt`."""
    return path.suffix == ".pt" and path.is_file()


def read(path: Path) -> LoadedModel:
    """Read a checkpoint; weights are memory-mapped. Raises BadInput for other files, and for those
    that need more than tensors and numbers to be loaded."""
    refuse_pointer_at(path)
    data = _load(path)
    state, args = data.get("model"), data.get("model_args")
    if not isinstance(state, dict) or not isinstance(args, dict):
        raise BadInput(
            f"{path}: not a checkpoint of llama2.c's train.py (no model and model_args in it); "
            "save other models as safetensors and pass their folder"
        )
    tensors = {}
    for name, tensor in state.items():
        name = str(name).removeprefix(_COMPILED)
        if name in _TABLES:
            continue
        # contiguous: its bytes are in the file
        plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided
        if not plain or tensor.is_meta or not tensor.is_contiguous():
            raise BadInput(f"{path}: damaged: {name[:80]!r} is not a plain tensor")
        canonical = _canonical(path, name)
        if canonical in tensors:
            raise BadInput(f"{path}: the tensor {name[:80]!r} occurs twice")
        tensors[canonical] = tensor
    head = tensors.get("lm_head.weight")
    embedding = tensors.get("embed_tokens.weight")
    tied = (
        head is None
        or embedding is None
        or (head.shape == embedding.shape and torch.equal(head, embedding))
    )
    if tied:
        tensors.pop("lm_head.weight", None)
    config = _config(path, args, tensors, tied)
    check_weights(config, tensors, path)
    return LoadedModel(
        config, {name: tensors[name] for name in config.weight_shapes()}, path, "llama2c-ckpt"
    )


def _load(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED:
                    raise BadInput(f"{path}: damaged: {record.filename[:80]!r} is compressed")
                if record.filename.endswith(".pkl") and record.file_size > _MAX_PICKLE_BYTES:
                    raise BadInput(f"{path}: {record.filename[:80]!r} has {record.file_size} bytes")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except BadInput:
        raise
    except OSError as error:
        raise BadInput(f"{path}: cannot read: {error.strerror or error}") from error
    except Exception as error:  # whatever the pickle holds
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BadInput(
            f"{path}: cannot be loaded as tensors and numbers alone; nothing else is loaded, as a "
            f"pickle can run code ({reason[0][:200]})"
        ) from error
    if not isinstance(data, dict):
        raise BadInput(f"{path}: not a checkpoint of llama2.c's train.py: it is no dictionary")
    return data


def _canonical(path: Path, name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in _WHOLE_NAMES:
        return f"{_WHOLE_NAMES[stem]}.weight"
    prefix, _, rest = stem.partition(".")
    layer, _, kind = rest.partition(".")
    if prefix != "layers" or not layer.isascii() or not layer.isdigit() or kind not in _LAYER_NAMES:
        raise BadInput(f"{path}: unexpected tensor {name[:80]!r}; this is not a model of llama2.c")
    return f"layers.{int(layer)}.{_LAYER_NAMES[kind]}.weight"


def _config(
    path: Path, args: dict[str, Any], tensors: dict[str, Tensor], tied: bool
) -> ModelConfig:
    numbers = {name: args.get(name) for name in FIELDS}
    if numbers["n_kv_heads"] is None:
        numbers["n_kv_heads"] = numbers["n_heads"]
    gate = tensors.get("layers.0.mlp.gate_proj.weight")
    if gate is None:
        raise BadInput(f"{path}: damaged: layers.0.feed_forward.w1.weight is missing")
    numbers["hidden_dim"] = gate.shape[0] if gate.ndim else 0
    for name, value in numbers.items():
        if type(value) is not int:
            raise BadInput(f"{path}: damaged: its argument {name} is {str(value)[:40]!r}")
    return make_config(path, numbers, tied)
