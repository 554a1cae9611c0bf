"""Read and write GGUF files, the format of llama.cpp: architectures llama and qwen3.

A file has the model, its tokenizer and its chat template. Tensors in F32, F16 and BF16 are
memory-mapped; Q8_0, Q6_K and Q4_0 are converted to float32. Tensors of one dimension are float32 in
any file, as llama.cpp demands. Arch llama pairs (2i, 2i+1) in rotary embedding, qwen3 (i, i + E/2).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from onelaunch.checkpoints import gguf_writer
from onelaunch.checkpoints.chat_template_files import checked_template, read_chat_template
from onelaunch.checkpoints.gguf_header import Header, TensorInfo, begins_as_gguf
from onelaunch.checkpoints.gguf_names import (
    ARCHITECTURE,
    ARCHITECTURES,
    DIVISORS,
    FLOAT_KEYS,
    KEYS,
    OPTIONAL,
    gguf_name,
)
from onelaunch.checkpoints.gguf_package import gguf_package
from onelaunch.checkpoints.gguf_rope import (
    SCALING_FACTORS,
    SCALING_KEY,
    is_scaling,
    recognize_scaling,
)
from onelaunch.checkpoints.gguf_tokenizer import special_ids
from onelaunch.checkpoints.weights import LoadedModel, check_weights
from onelaunch.config import ModelConfig, RopeScaling
from onelaunch.errors import BadInput

if TYPE_CHECKING:
    from onelaunch.checkpoints.tokenizers import Tokenizer

# Elements that are converted at once.
_CHUNK = 1 << 22
# Variants of an architecture, each off where its number is absent or 0.
_UNSUPPORTED = (
    "expert_count",
    "attention.sliding_window",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "logit_scale",
    "embedding_scale",
    "residual_scale",
    "attention.scale",
)


def matches(path: Path) -> bool:
    """Return whether `path` is a file named `*.gguf`, or one that begins as such a file."""
    if not path.is_file():
        return False
    return path.suffix == ".gguf" or begins_as_gguf(path)


def read(path: Path) -> LoadedModel:
    """Read a model; raises BadInput for damaged files and unsupported features, MissingExtra for
    quantized tensors without the package gguf."""
    header = Header(path)
    _refuse_variants(header)
    config = _read_config(header)
    names = {gguf_name(name): name for name in config.weight_shapes()}
    unknown = sorted(header.tensors.keys() - names.keys() - {DIVISORS})
    if unknown:
        raise header.error(
            f"unexpected tensor {unknown[0]!r}; this is not a plain {header.text(ARCHITECTURE)}"
        )
    weights = {
        name: read_tensor(header, header.tensors[stored])
        for stored, name in names.items()
        if stored in header.tensors
    }
    check_weights(config, weights, path)
    kinds = [header.tensors[stored].type for stored in names]
    quantized = [kind.name for kind in kinds if kind.block > 1]
    types = " and ".join(sorted(set(quantized)))
    template, notices = _chat_template(header)
    if quantized:
        notices += (f"{path}: {len(quantized)} tensors in {types} were converted to float32",)
    bos_id, stop_ids = special_ids(header, config.vocab_size)
    return LoadedModel(
        config=config,
        weights=weights,
        source=path,
        format="gguf",
        bos_id=bos_id,
        stop_ids=stop_ids,
        chat_template=template,
        notices=notices,
    )


def _chat_template(header: Header) -> tuple[str | None, tuple[str, ...]]:
    """Return NAME.chat_template.jinja next to NAME.gguf, or else the template in the file; and a
    line for the user about one that cannot be used."""
    path = header.path
    template, notices = read_chat_template(path.parent, f"{path.stem}.")
    stored = header.text("tokenizer.chat_template")
    if template is None and not notices and stored is not None:
        try:
            template = checked_template(path, stored.encode("utf-8"))
        except BadInput as error:
            return None, (f"note: the model's chat template is not used: {error}",)
    return template, notices


def _refuse_variants(header: Header) -> None:
    architecture = header.text(ARCHITECTURE)
    if architecture not in ARCHITECTURES:
        raise header.error(
            f"architecture {architecture!r} is not supported; only {', '.join(ARCHITECTURES)} are"
        )
    if (header.integer("split.count") or 0) > 1:
        raise header.error(
            "one of several files of a model; join them with `llama-gguf-split --merge`"
        )
    for name in _UNSUPPORTED:
        key = f"{architecture}.{name}"
        if value := header.number(key):
            raise header.error(f"{key} {value:g} is not supported")
    if header.flag(f"{architecture}.attention.causal") is False:
        raise header.error("attention that is not causal is not supported")
    kind = header.text(f"{architecture}.rope.scaling.type")
    if kind not in (None, "none"):
        raise header.error(f"rope scaling {kind!r} is not supported; only llama3 is")
    for name in ("rope.scaling.factor", "rope.scale_linear"):
        if header.real(f"{architecture}.{name}") not in (None, 0.0, 1.0):
            raise header.error("rope scaling 'linear' is not supported; only llama3 is")


def _read_config(header: Header) -> ModelConfig:
    architecture = str(header.text(ARCHITECTURE))
    values: dict[str, Any] = {}
    for field, name in (KEYS | FLOAT_KEYS).items():
        key = f"{architecture}.{name}"
        value = _integer(header, key) if field in KEYS else header.real(key)
        if value is not None:
            values[field] = value
        elif field not in OPTIONAL:
            raise header.error(f"{key} is missing; is this a language model?")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise header.error("the tensor token_embd.weight is missing; is the file complete?")
    try:
        config = ModelConfig(
            **values,
            vocab_size=embedding.shape[0],
            rope_layout=ARCHITECTURES[architecture],
            qkv_bias=architecture == "qwen2",
            qk_norm=architecture == "qwen3",
            tied_embeddings="output.weight" not in header.tensors,
        )
    except BadInput as error:
        raise header.error(_with_keys(str(error), architecture)) from error
    for name in ("rope.dimension_count", "attention.value_length"):
        width = _integer(header, f"{architecture}.{name}")
        if width not in (None, config.head_dim):
            raise header.error(f"{architecture}.{name} {width} other than that of the head")
    if DIVISORS in header.tensors:
        config = config.with_(rope_scaling=_read_scaling(header, config))
    return config


def _with_keys(message: str, architecture: str) -> str:
    """Replace ModelConfig field names in a message by the keys of the file."""
    keys = KEYS | FLOAT_KEYS
    names = rf"\b({'|'.join(keys)})\b"
    return re.sub(names, lambda match: f"{architecture}.{keys[match[1]]}", message)


def _integer(header: Header, key: str) -> int | None:
    """Return an integer, or what all elements of an array are: some files have one per layer."""
    if not header.is_array(key):
        return header.integer(key)
    values = set(header.numbers(key) or ())
    if len(values) != 1:
        raise header.error(f"{key} differs between layers, which is not supported")
    return int(values.pop())


def _read_scaling(header: Header, config: ModelConfig) -> RopeScaling:
    info = header.tensors[DIVISORS]
    if info.shape != (config.head_dim // 2,) or info.type.name != "F32":
        raise header.error(f"the tensor {DIVISORS} is not one float32 per pair of a head")
    divisors = read_tensor(header, info)
    stored = {name: header.real(f"{SCALING_KEY}.{name}") for name in SCALING_FACTORS}
    original = header.integer(f"{SCALING_KEY}.original_max_seq_len")
    scaling = recognize_scaling(divisors, config.rope_theta)
    if original is not None and None not in stored.values():
        try:
            exact = RopeScaling(**stored, original_max_seq_len=original)  # type: ignore[arg-type]
        except BadInput as error:
            raise header.error(str(error)) from error
        if is_scaling(divisors, exact, config.rope_theta):
            scaling = exact
    if scaling is None:
        raise header.error(
            f"the rotary divisors of {DIVISORS} are not those of Llama 3; other rope scaling is "
            "not supported"
        )
    return scaling


def read_tensor(header: Header, info: TensorInfo) -> Tensor:
    """Return a tensor: a view of the file, or float32 where it is quantized."""
    raw = header.data[info.start : info.start + info.n_bytes]
    kind = info.type.name
    if kind == "F32":
        return torch.from_numpy(raw.view(np.float32)).view(info.shape)
    if kind == "F16":
        return torch.from_numpy(raw.view(np.float16)).view(info.shape)
    if kind == "BF16":
        return torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16).view(info.shape)
    package = gguf_package(f"reading {header.path}, whose tensors are quantized ({kind}),")
    rows = raw.reshape(-1, info.shape[-1] // info.type.block * info.type.block_bytes)
    values = np.empty((len(rows), info.shape[-1]), np.float32)
    step = max(1, _CHUNK // info.shape[-1])
    with np.errstate(all="ignore"):  # scales of damaged files
        for first in range(0, len(rows), step):
            chunk = slice(first, first + step)
            values[chunk] = package.quants.dequantize(
                rows[chunk], package.GGMLQuantizationType[kind]
            )
    return torch.from_numpy(values).view(info.shape)


def write(
    model: LoadedModel,
    out: Path,
    weights: str | None = None,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write a model, its chat template and a tokenizer, see `gguf_writer.write`."""
    gguf_writer.write(model, out, weights, tokenizer)
