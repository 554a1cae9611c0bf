"""Read and write llama2.c model files, version 0: the format of its train.py and run.c.

A header of seven little-endian int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size,
max_seq_len), then float32 tensors, row-major (out, in), each kind for all layers. A negative
vocab_size means that an untied classifier ends the file. There is no magic number: the header is
checked against the size of the file.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from onelaunch.checkpoints.atomic import atomic_file, check_file_path
from onelaunch.checkpoints.chat_template_files import read_chat_template
from onelaunch.checkpoints.lfs import refuse_pointer
from onelaunch.checkpoints.rope_layout import to_layout
from onelaunch.checkpoints.weights import LoadedModel
from onelaunch.config import ModelConfig
from onelaunch.errors import BadInput
from onelaunch.model import rope_tables

_HEADER = struct.Struct("<7i")
FIELDS = (
    "dim",
    "hidden_dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "vocab_size",
    "max_seq_len",
)
"""The numbers of a header, by their names in ModelConfig."""
_ZIP_MAGIC = b"PK\x03\x04"
_COS, _SIN = "llama2c.freqs_cos", "llama2c.freqs_sin"

# Constants of run.c, which the file does not store.
_THETA = 10000.0
_EPS = 1e-5

LAYER_KINDS = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.down_proj",
    "mlp.up_proj",
)
"""The tensors of a layer, in file order."""


def matches(path: Path) -> bool:
    """Return whether `path` is a file named `*.bin`."""
    return path.suffix == ".bin" and path.is_file()


def read(path: Path) -> LoadedModel:
    """Memory-map a v0 file; only the header is read until a tensor is used.

    The mapping is private: writing to a tensor does not change the file. `extras` keeps the rotary
    tables of the file, so that writing the model again gives the same bytes. Raises BadInput for a
    file that is not v0, is damaged, or has the wrong size.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            config = _read_header(path, file, size)
            values = np.memmap(file, dtype="<f4", mode="c", offset=_HEADER.size)
    except OSError as error:
        raise BadInput(f"{path}: cannot read: {error.strerror or error}") from error
    flat = torch.from_numpy(values)
    tensors = {}
    start = 0
    for name, shape in _tensors(config):
        end = start + math.prod(shape)
        tensors[name] = flat[start:end].view(shape)
        start = end
    extras = {name: tensors.pop(name) for name in (_COS, _SIN)}
    weights = {name: tensors[name] for name in config.weight_shapes()}
    chat_template, notices = read_chat_template(path.parent, f"{path.stem}.")
    return LoadedModel(
        config,
        weights,
        source=path,
        format="llama2c",
        extras=extras,
        chat_template=chat_template,
        notices=notices,
    )


def write(model: LoadedModel, out: Path) -> None:
    """Write a v0 file in float32, atomically.

    Raises BadInput if v0 cannot express the model, or `out` cannot be written.
    """
    check_expressible(model.config, "llama2c")
    check_file_path(out, "model.bin")
    config, weights = to_layout(model.config, model.weights, "interleaved")
    tensors = weights | _tables(config, model.extras)
    with atomic_file(out) as file:
        sign = 1 if config.tied_embeddings else -1
        numbers = {name: getattr(config, name) for name in FIELDS}
        numbers["vocab_size"] *= sign
        file.write(_HEADER.pack(*numbers.values()))
        for name, _ in _tensors(config):
            values = tensors[name].detach().to("cpu", torch.float32).contiguous().numpy()
            file.write(values.astype("<f4", copy=False).data)


def _read_header(path: Path, file: BinaryIO, size: int) -> ModelConfig:
    raw = file.read(_HEADER.size)
    if len(raw) < _HEADER.size:
        raise BadInput(
            f"{path}: {size} bytes are too few for a llama2.c model, whose header has "
            f"{_HEADER.size}; download or export the file again"
        )
    _refuse_other_formats(path, raw)
    numbers = dict(zip(FIELDS, _HEADER.unpack(raw), strict=True))
    tied = numbers["vocab_size"] > 0
    config = make_config(path, {**numbers, "vocab_size": abs(numbers["vocab_size"])}, tied)
    expected = _HEADER.size + 4 * sum(math.prod(shape) for _, shape in _tensors(config))
    check_size(path, size, expected)
    return config


def make_config(path: Path, numbers: dict[str, Any], tied: bool) -> ModelConfig:
    """Make the configuration of a file from its `FIELDS`; raises BadInput naming the file."""
    if numbers["n_kv_heads"] < 1:
        # In ModelConfig 0 means "as many as n_heads"; in the file it is invalid.
        raise BadInput(
            f"{path}: not a llama2.c model, or damaged: "
            f"n_kv_heads must be at least 1, not {numbers['n_kv_heads']}"
        )
    try:
        return ModelConfig(
            **numbers,
            norm_eps=_EPS,
            rope_theta=_THETA,
            rope_layout="interleaved",
            tied_embeddings=tied,
        )
    except BadInput as error:
        raise BadInput(f"{path}: not a llama2.c model, or damaged: {error}") from error


def check_size(path: Path, size: int, expected: int) -> None:
    """Raise BadInput if a file does not have the size that its header implies."""
    if size != expected:
        fault = "truncated" if size < expected else "followed by other bytes"
        raise BadInput(
            f"{path}: the file has {size} bytes, its header needs {expected}: {fault}, or not a "
            f"llama2.c model; download or export the file again"
        )


def _refuse_other_formats(path: Path, raw: bytes) -> None:
    refuse_pointer(path, raw)
    if raw.startswith(_ZIP_MAGIC):
        raise BadInput(
            f"{path}: a pickled PyTorch file is not loaded, as a pickle can run code; save the "
            f"model as safetensors and pass its folder"
        )


def _tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield canonical name and shape of every tensor, in file order."""
    shapes = config.weight_shapes()
    names = ["embed_tokens.weight"]
    names += [f"layers.{i}.{kind}.weight" for kind in LAYER_KINDS for i in range(config.n_layers)]
    names.append("norm.weight")
    for name in names:
        yield name, shapes[name]
    table = (config.max_seq_len, config.head_dim // 2)
    yield _COS, table
    yield _SIN, table
    if not config.tied_embeddings:
        yield "lm_head.weight", shapes["lm_head.weight"]


def _tables(config: ModelConfig, extras: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the rotary tables: those of the file it was read from, or computed ones."""
    shape = (config.max_seq_len, config.head_dim // 2)
    if all(name in extras and tuple(extras[name].shape) == shape for name in (_COS, _SIN)):
        return {name: extras[name] for name in (_COS, _SIN)}
    # numpy's cosine differs from torch's in the last bit; llama2.c's exporter used torch's.
    cos, sin = rope_tables(config)
    return {_COS: cos, _SIN: sin}


def check_expressible(config: ModelConfig, format: str) -> None:
    """Raise BadInput for a model that none of the versions can store; names `format`."""
    reason = ""
    if config.extensions:
        reason = config.extensions[0]
    elif config.qk_norm:
        reason = "norms on queries and keys (qk_norm)"
    elif config.rope_scaling is not None:
        reason = "scaled rotary frequencies (rope_scaling)"
    elif config.rope_theta != _THETA:
        reason = f"rope_theta {config.rope_theta:g} (only {_THETA:g})"
    elif not math.isclose(config.norm_eps, _EPS, rel_tol=1e-6):
        reason = f"norm_eps {config.norm_eps:g} (only {_EPS:g})"
    elif config.q_dim != config.dim:
        reason = f"head_dim {config.head_dim} other than dim / n_heads"
    if reason:
        raise BadInput(f"format={format!r}: the file cannot store {reason}; use format='hf'")
