"""llama2.c's model file, version 0: what its train.py writes and its run.c reads.

A header of seven little-endian int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size,
max_seq_len), then float32 tensors, row-major (out, in), each kind for all layers in turn. A
negative vocab_size says that a classifier of its own ends the file. There is no magic number: the
size of the file is what tells whether the header can be true.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from onelaunch.checkpoints.atomic import atomic_file
from onelaunch.checkpoints.lfs import refuse_pointer
from onelaunch.checkpoints.rope_layout import to_layout
from onelaunch.checkpoints.weights import LoadedModel
from onelaunch.config import ModelConfig
from onelaunch.errors import BadInput
from onelaunch.model import rope_tables

_HEADER = struct.Struct("<7i")
_FIELDS = (
    "dim",
    "hidden_dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "vocab_size",
    "max_seq_len",
)
_VERSIONED_MAGIC = b"24ka"
_ZIP_MAGIC = b"PK\x03\x04"
_COS, _SIN = "llama2c.freqs_cos", "llama2c.freqs_sin"

# What run.c has built in and the file has no place for.
_THETA = 10000.0
_EPS = 1e-5

_LAYER_KINDS = (
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


def matches(path: Path) -> bool:
    """Whether `path` is a file that calls itself a `.bin`."""
    return path.suffix == ".bin" and path.is_file()


def read(path: Path) -> LoadedModel:
    """Map a v0 file into memory; nothing but the header is read until a tensor is used.

    The tensors are private to this process: writing to one leaves the file as it is. The file's
    rotary tables are kept in `extras`, so that writing the model again gives the same bytes.
    Raises BadInput for a file that is not v0, damaged, or of impossible size.
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
    return LoadedModel(config, weights, source=path, format="llama2c", extras=extras)


def write(model: LoadedModel, out: Path) -> None:
    """Write a v0 file in float32, all of it or nothing.

    Raises BadInput where v0 cannot express the model, or `out` cannot be written.
    """
    _check_expressible(model.config)
    if out.is_dir():
        raise BadInput(f"{out}: is a folder; give the name of the file to write, such as model.bin")
    if not out.parent.is_dir():
        raise BadInput(f"{out}: the folder {out.parent} does not exist; make it first")
    config, weights = to_layout(model.config, model.weights, "interleaved")
    tensors = weights | _tables(config, model.extras)
    with atomic_file(out) as file:
        sign = 1 if config.tied_embeddings else -1
        numbers = {name: getattr(config, name) for name in _FIELDS}
        numbers["vocab_size"] *= sign
        file.write(_HEADER.pack(*numbers.values()))
        for name, _ in _tensors(config):
            values = tensors[name].detach().to("cpu", torch.float32).contiguous().numpy()
            file.write(values.astype("<f4", copy=False).data)


def _read_header(path: Path, file: BinaryIO, size: int) -> ModelConfig:
    raw = file.read(_HEADER.size)
    if len(raw) < _HEADER.size:
        raise BadInput(
            f"{path}: {size} bytes are too few for a llama2.c model, whose header alone has "
            f"{_HEADER.size}; fetch or export the file again"
        )
    _refuse_other_formats(path, raw)
    numbers = dict(zip(_FIELDS, _HEADER.unpack(raw), strict=True))
    tied = numbers["vocab_size"] > 0
    numbers["vocab_size"] = abs(numbers["vocab_size"])
    if numbers["n_kv_heads"] < 1:
        # ModelConfig would take 0 for "as many as n_heads"; the file format does not.
        raise BadInput(
            f"{path}: not a llama2.c model, or damaged: "
            f"n_kv_heads must be at least 1, not {numbers['n_kv_heads']}"
        )
    try:
        config = ModelConfig(
            **numbers,
            norm_eps=_EPS,
            rope_theta=_THETA,
            rope_layout="interleaved",
            tied_embeddings=tied,
        )
    except BadInput as error:
        raise BadInput(f"{path}: not a llama2.c model, or damaged: {error}") from error
    expected = _HEADER.size + 4 * sum(math.prod(shape) for _, shape in _tensors(config))
    if size != expected:
        what = "truncated" if size < expected else "followed by other bytes"
        raise BadInput(
            f"{path}: the header asks for {expected} bytes, the file has {size}: {what}, or not a "
            f"llama2.c model; fetch or export the file again"
        )
    return config


def _refuse_other_formats(path: Path, raw: bytes) -> None:
    refuse_pointer(path, raw)
    if raw.startswith(_VERSIONED_MAGIC):
        version = int.from_bytes(raw[4:8], "little", signed=True)
        raise BadInput(
            f"{path}: a llama2.c file of version {version}; this version of onelaunch reads "
            f"version 0: export the model again with llama2.c's export.py --version 0"
        )
    if raw.startswith(_ZIP_MAGIC):
        raise BadInput(
            f"{path}: a pickled PyTorch file, which onelaunch does not open (a pickle can run "
            f"code); save the model as safetensors and give its folder"
        )


def _tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor's canonical name and shape, in the order of the file."""
    shapes = config.weight_shapes()
    names = ["embed_tokens.weight"]
    names += [f"layers.{i}.{kind}.weight" for kind in _LAYER_KINDS for i in range(config.n_layers)]
    names.append("norm.weight")
    for name in names:
        yield name, shapes[name]
    table = (config.max_seq_len, config.head_dim // 2)
    yield _COS, table
    yield _SIN, table
    if not config.tied_embeddings:
        yield "lm_head.weight", shapes["lm_head.weight"]


def _tables(config: ModelConfig, extras: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The rotary tables: the file's own where the model brought them, or computed."""
    shape = (config.max_seq_len, config.head_dim // 2)
    if all(name in extras and tuple(extras[name].shape) == shape for name in (_COS, _SIN)):
        return {name: extras[name] for name in (_COS, _SIN)}
    # numpy's cosine differs from torch's in the last bit; llama2.c's exporter used torch's.
    cos, sin = rope_tables(config)
    return {_COS: cos, _SIN: sin}


def _check_expressible(config: ModelConfig) -> None:
    reason = ""
    if config.qk_norm:
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
        raise BadInput(f"format='llama2c': the file has no place for {reason}; use format='hf'")
