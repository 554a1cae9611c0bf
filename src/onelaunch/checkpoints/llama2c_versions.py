"""Read llama2.c model files of version 1 (float32) and 2 (int8 in groups), and write version 2,
the format of its runq.c.

A header of 256 bytes: "24ka", int32 version, seven int32 as in version 0 (the vocabulary always
positive), uint8 whether the classifier is tied, and in version 2 int32 group size. Then the norms
in float32, then the matrices, each kind for all layers. In version 2 a matrix is its int8 numbers,
then one float32 scale for each group of consecutive elements. Nothing of llama2.c reads version 1.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from onelaunch.checkpoints.atomic import atomic_file, check_file_path
from onelaunch.checkpoints.chat_template_files import read_chat_template
from onelaunch.checkpoints.llama2c import (
    FIELDS,
    LAYER_KINDS,
    check_expressible,
    check_size,
    make_config,
)
from onelaunch.checkpoints.rope_layout import tensor_to_layout
from onelaunch.checkpoints.weights import LoadedModel
from onelaunch.config import ModelConfig
from onelaunch.errors import BadInput

FORMAT = "llama2c-int8"
GROUP_SIZE = 64
"""That of llama2.c's export.py; less where it does not divide the rows."""
_MAGIC = b"24ka"
_HEADER = struct.Struct("<4si7iBi")
_HEADER_BYTES = 256
# Elements that are quantized at once.
_CHUNK = 1 << 22


def matches(path: Path) -> bool:
    """Return whether `path` is a file named `*.bin` with the magic of these versions."""
    if path.suffix != ".bin" or not path.is_file():
        return False
    try:
        with open(path, "rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def read(path: Path) -> LoadedModel:
    """Read a model: version 1 is memory-mapped, version 2 converted to float32. Raises BadInput for
    other versions, and for a file that is damaged or has the wrong size."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            raw = file.read(_HEADER_BYTES)
            if len(raw) < _HEADER_BYTES:
                raise BadInput(f"{path}: truncated: {size} bytes are too few for a llama2.c model")
            data = np.memmap(file, dtype=np.uint8, mode="c")
    except OSError as error:
        raise BadInput(f"{path}: cannot read: {error.strerror or error}") from error
    _, version, *numbers, tied, group = _HEADER.unpack_from(raw)
    if version not in (1, 2):
        raise BadInput(
            f"{path}: llama2.c version {version} is not supported, only versions 0 to 2; export "
            f"the model again with llama2.c's export.py --version 0"
        )
    config = make_config(path, dict(zip(FIELDS, numbers, strict=True)), bool(tied))
    group = group if version == 2 else 0
    if version == 2 and group < 1:
        raise BadInput(f"{path}: damaged: the group size is {group}")
    weights = {}
    place = _HEADER_BYTES
    for name, shape in _tensors(config):
        n_bytes = _bytes_of(path, name, shape, group)
        weights[name] = (place, n_bytes)
        place += n_bytes
    check_size(path, size, place)
    shapes = config.weight_shapes()
    tensors = {
        name: _read_tensor(data[start : start + n_bytes], shapes[name], group)
        for name, (start, n_bytes) in weights.items()
    }
    chat_template, notices = read_chat_template(path.parent, f"{path.stem}.")
    if version == 2:
        notices += (f"{path}: int8 weights were converted to float32",)
    return LoadedModel(
        config,
        {name: tensors[name] for name in shapes},
        source=path,
        format=FORMAT if version == 2 else "llama2c",
        chat_template=chat_template,
        notices=notices,
    )


def write(model: LoadedModel, out: Path) -> None:
    """Write a file of version 2, atomically, as llama2.c's export.py does, with a group size that
    divides all rows: runq.c's results are wrong where it does not.

    Raises BadInput if the format cannot express the model, or `out` cannot be written.
    """
    config = model.config
    check_expressible(config, FORMAT)
    check_file_path(out, "model.bin")
    group = group_size(config)
    numbers = [getattr(config, name) for name in FIELDS]
    with atomic_file(out) as file:
        header = _HEADER.pack(_MAGIC, 2, *numbers, config.tied_embeddings, group)
        file.write(header.ljust(_HEADER_BYTES, b"\0"))
        for name, shape in _tensors(config):
            tensor = tensor_to_layout(config, name, model.weights[name], "interleaved").detach()
            if len(shape) == 1:
                file.write(tensor.to("cpu", torch.float32).contiguous().numpy().data)
                continue
            scales = []
            for chunk in tensor.flatten().split(_CHUNK // group * group):
                values, scale = quantize(chunk.to("cpu", torch.float32), group)
                if not scale.isfinite().all():
                    raise BadInput(f"format={FORMAT!r}: the weights of {name} are not all finite")
                file.write(values.numpy().data)
                scales.append(scale)
            for scale in scales:
                file.write(scale.numpy().data)


def group_size(config: ModelConfig) -> int:
    """Return the largest group size, 64 halved as often as needed, that divides the rows of all
    matrices."""
    return math.gcd(GROUP_SIZE, config.dim, config.hidden_dim)


def quantize(values: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Quantize n float32 values to int8, (n,), and a scale for each group, (n / group,).

    The scale is the largest magnitude / 127; halves are rounded to even, as in export.py.
    """
    groups = values.view(-1, group)
    scales = groups.abs().amax(1) / 127.0
    integers = (groups / scales[:, None]).round()
    # 0 / 0 in a group of zeros
    return integers.nan_to_num(0.0).to(torch.int8).flatten(), scales


def _tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield canonical name and shape of every tensor, in file order."""
    shapes = config.weight_shapes()
    names = [_layer_name(i, kind) for kind in _NORMS for i in range(config.n_layers)]
    names += ["norm.weight", "embed_tokens.weight"]
    names += [_layer_name(i, kind) for kind in _MATRICES for i in range(config.n_layers)]
    if not config.tied_embeddings:
        names.append("lm_head.weight")
    for name in names:
        yield name, shapes[name]


_NORMS = [kind for kind in LAYER_KINDS if kind.endswith("norm")]
_MATRICES = [kind for kind in LAYER_KINDS if kind not in _NORMS]


def _layer_name(layer: int, kind: str) -> str:
    return f"layers.{layer}.{kind}.weight"


def _bytes_of(path: Path, name: str, shape: tuple[int, ...], group: int) -> int:
    """Bytes of a tensor; `group` is 0 where all are float32."""
    n = math.prod(shape)
    if not group or len(shape) == 1:
        return 4 * n
    if n % group:
        raise BadInput(f"{path}: damaged: {name} is not whole groups of {group}")
    return n + 4 * (n // group)


def _read_tensor(raw: np.ndarray, shape: tuple[int, ...], group: int) -> Tensor:
    if not group or len(shape) == 1:
        return torch.from_numpy(raw.view("<f4")).view(shape)
    n = math.prod(shape)
    integers = torch.from_numpy(raw[:n].view(np.int8)).view(-1, group)
    # a copy: scales may not lie at a multiple of four bytes
    scales = torch.from_numpy(raw[n:].copy().view("<f4"))
    return (integers * scales[:, None]).view(shape)
