"""Write GGUF files for llama.cpp, by the package gguf: its writer makes the header, the tensors
are converted and written in chunks of rows."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from onelaunch.checkpoints.atomic import atomic_file, check_file_path
from onelaunch.checkpoints.gguf_header import TENSOR_TYPES, TensorInfo, TensorType
from onelaunch.checkpoints.gguf_names import ARCHITECTURES, DIVISORS, FLOAT_KEYS, KEYS, gguf_name
from onelaunch.checkpoints.gguf_package import gguf_package
from onelaunch.checkpoints.gguf_rope import (
    SCALING_FACTORS,
    SCALING_KEY,
    recognize_scaling,
    scaling_divisors,
)
from onelaunch.checkpoints.gguf_tokenizer_export import tokenizer_keys
from onelaunch.checkpoints.rope_layout import tensor_to_layout
from onelaunch.checkpoints.tokenizers import Tokenizer
from onelaunch.checkpoints.weights import LoadedModel
from onelaunch.config import ROPE_SCALINGS, ModelConfig, RopeScaling
from onelaunch.errors import BadInput

WEIGHTS = ("f32", "f16", "bf16", "q8_0", "q4_0")
"""The types of matrices that can be written."""
_DTYPES = {torch.float16: "f16", torch.bfloat16: "bf16"}
_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}
_TYPES = {kind.name.lower(): kind for kind in TENSOR_TYPES.values()}
_ALIGNMENT = 32
# Elements that are converted at once.
_CHUNK = 1 << 22


def write(
    model: LoadedModel,
    out: Path,
    weights: str | None = None,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write a model, its chat template and a tokenizer to one file, atomically.

    `weights` is one of `WEIGHTS`, by default the dtype of the embedding. Tensors of one dimension
    are float32 in any case; matrices whose rows are not whole blocks of a quantized type are
    float16, as llama.cpp's own tool writes them. Raises BadInput for what the format cannot express
    or a path that cannot be written, MissingExtra without the package gguf.
    """
    if weights is not None and weights not in WEIGHTS:
        raise BadInput(f"weights={weights!r}: must be one of {', '.join(WEIGHTS)}")
    check_file_path(out, "model.gguf")
    package = gguf_package("writing a GGUF file")
    architecture = _architecture(model.config)
    kind = weights or _DTYPES.get(model.weights["embed_tokens.weight"].dtype, "f32")
    stored = {name: stored_type(tensor, kind) for name, tensor in model.weights.items()}
    writer = package.GGUFWriter(None, architecture)
    writer.add_name(out.stem)
    _add_config(writer, model, architecture)
    writer.add_file_type(_FILE_TYPES[kind])
    if _TYPES[kind].block > 1:
        writer.add_quantization_version(package.GGML_QUANT_VERSION)
    for key, value in tokenizer_keys(tokenizer, model.config.vocab_size).items():
        getattr(writer, f"add_{key}")(value)
    _add_special_ids(writer, model, tokenizer)
    if model.chat_template:
        writer.add_chat_template(model.chat_template)
    tensors = dict(model.weights)
    if model.config.rope_scaling is not None:
        tensors[DIVISORS] = _add_scaling(writer, model)
    for name, tensor in tensors.items():
        info = TensorInfo(stored.get(name, _TYPES["f32"]), tuple(tensor.shape), 0)
        writer.add_tensor_info(
            name if name == DIVISORS else gguf_name(name),
            info.shape,
            np.dtype(np.float32),
            info.n_bytes,
            package.GGMLQuantizationType[info.type.name],
        )
    with atomic_file(out) as file:
        writer.write_header_to_file(Path(file.name))
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        file.seek(0, 2)
        layout = ARCHITECTURES[architecture]
        for name, tensor in tensors.items():
            _pad(file)
            tensor = tensor_to_layout(model.config, name, tensor, layout)
            for chunk in _encoded(tensor, stored.get(name, _TYPES["f32"]), package):
                file.write(chunk.data)
        _pad(file)


def _architecture(config: ModelConfig) -> str:
    """Return the architecture of a model; raises BadInput where none can express it."""
    architecture = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    plain = config.with_(qkv_bias=False) if architecture == "qwen2" else config
    lost = plain.extensions[0] if plain.extensions else ""
    scaling = config.rope_scaling
    if scaling is not None and not (architecture == "llama" and isinstance(scaling, RopeScaling)):
        kind = next(name for name, of in ROPE_SCALINGS.items() if isinstance(scaling, of))
        lost = f"rope_scaling of kind {kind!r} in architecture {architecture}"
    if lost:
        raise BadInput(f"format='gguf': the file cannot store {lost}; use format='hf'")
    return architecture


def stored_type(tensor: Tensor, kind: str) -> TensorType:
    """Return the type that a tensor is stored in, where matrices have the type `kind`."""
    if tensor.ndim == 1:
        return _TYPES["f32"]
    if tensor.shape[-1] % _TYPES[kind].block:
        return _TYPES["f16"]
    return _TYPES[kind]


def _encoded(tensor: Tensor, kind: TensorType, package: Any) -> Any:
    """Yield the bytes of a tensor as arrays, a few rows at a time."""
    rows = tensor.detach().reshape(-1, tensor.shape[-1])
    step = max(1, _CHUNK // rows.shape[1])
    for first in range(0, len(rows), step):
        chunk = rows[first : first + step].to("cpu")
        if kind.name == "BF16":
            yield chunk.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
        elif kind.name == "F32":
            yield chunk.to(torch.float32).contiguous().numpy()
        elif kind.name == "F16":
            half = chunk.to(torch.float16).contiguous()
            if not half.isfinite().all():
                raise BadInput(
                    "weights='f16': a weight is beyond the range of float16; use weights='bf16'"
                )
            yield half.numpy()
        else:
            values = chunk.to(torch.float32).contiguous().numpy()
            yield package.quants.quantize(values, package.GGMLQuantizationType[kind.name])


def _pad(file: IO[bytes]) -> None:
    file.write(bytes(-file.tell() % _ALIGNMENT))


def _add_config(writer: Any, model: LoadedModel, architecture: str) -> None:
    config = model.config
    for field, key in KEYS.items():
        writer.add_uint32(f"{architecture}.{key}", getattr(config, field))
    for field, key in FLOAT_KEYS.items():
        writer.add_float32(f"{architecture}.{key}", getattr(config, field))
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)


def _add_scaling(writer: Any, model: LoadedModel) -> Tensor:
    """Return the tensor of rotary divisors; adds the parameters if they are not Llama 3's."""
    config, scaling = model.config, model.config.rope_scaling
    assert isinstance(scaling, RopeScaling)
    divisors = scaling_divisors(scaling, config.head_dim, config.rope_theta)
    if recognize_scaling(divisors, config.rope_theta) != scaling:
        for name in SCALING_FACTORS:
            writer.add_float32(f"{SCALING_KEY}.{name}", getattr(scaling, name))
        writer.add_uint32(f"{SCALING_KEY}.original_max_seq_len", scaling.original_max_seq_len)
    return divisors


def _add_special_ids(writer: Any, model: LoadedModel, tokenizer: Tokenizer | None) -> None:
    """Add BOS, EOS, and further stop ids as the ends of a turn and of a message."""
    rows = model.config.vocab_size
    if model.bos_id is not None and 0 <= model.bos_id < rows:
        writer.add_bos_token_id(model.bos_id)
    first = tokenizer.eos_id if tokenizer is not None else None
    ends = sorted(_ends(model), key=lambda end: end != first)
    adders = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, end in zip(adders, ends, strict=False):
        add(end)


def _ends(model: LoadedModel) -> list[int]:
    """Return the stop ids other than BOS, or BOS if it is the only one."""
    inside = [i for i in model.stop_ids if 0 <= i < model.config.vocab_size]
    return [i for i in inside if i != model.bos_id] or inside


def lost_stop_ids(model: LoadedModel) -> list[int]:
    """Return the stop ids that a file has no room for."""
    return _ends(model)[3:]


def unquantized(model: LoadedModel, weights: str | None) -> list[str]:
    """Return the names of the matrices that are not in the type `weights`, as they do not fit."""
    if weights is None:
        return []
    return [
        name
        for name, tensor in model.weights.items()
        if tensor.ndim > 1 and stored_type(tensor, weights) != _TYPES[weights]
    ]
