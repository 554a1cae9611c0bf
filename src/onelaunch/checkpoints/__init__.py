"""Load and save models: one module per file format, and the table of formats.

The module of a format has `matches(path) -> bool`, `read(path) -> LoadedModel` and, if the format
can be written, `write(model, out)`. It is imported on first use.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from onelaunch.config import PRESETS, preset
from onelaunch.errors import BadInput, ModelNotFound

if TYPE_CHECKING:
    from collections.abc import Callable

    from onelaunch.checkpoints.tokenizers import Tokenizer
    from onelaunch.checkpoints.weights import LoadedModel

__all__ = ["FORMATS", "GGUF", "INT8", "load", "random_model", "save", "writable_formats"]


@dataclass(frozen=True, slots=True)
class Format:
    """A file format: its module, a description for messages, and whether it can be written."""

    module: str
    description: str
    writable: bool

    def matches(self, path: Path) -> bool:
        """Return whether `path` looks like this format; it may still be damaged."""
        return cast("Callable[[Path], bool]", self._function("matches"))(path)

    def read(self, path: Path) -> LoadedModel:
        """Read the model in `path`; raises BadInput if it cannot be used."""
        return cast("Callable[[Path], LoadedModel]", self._function("read"))(path)

    def write(self, model: LoadedModel, out: Path, **options: object) -> None:
        """Write `model` to `out`; raises BadInput if the format cannot express it."""
        cast("Callable[..., None]", self._function("write"))(model, out, **options)

    def _function(self, name: str) -> object:
        return getattr(importlib.import_module(f"{__name__}.{self.module}"), name)


GGUF, INT8 = "gguf", "llama2c-int8"
# In the order in which `load` tries them: a run folder may contain files of another format.
FORMATS: dict[str, Format] = {
    GGUF: Format("gguf", "a GGUF file (NAME.gguf)", writable=True),
    INT8: Format("llama2c_versions", "a llama2.c file of version 1 or 2", writable=True),
    "llama2c": Format("llama2c", "a llama2.c file (NAME.bin)", writable=True),
    "llama2c-ckpt": Format(
        "llama2c_checkpoint", "a ckpt.pt of llama2.c's train.py", writable=False
    ),
    "run": Format("run_folder", "a run folder of `onelaunch train`", writable=False),
    "hf": Format(
        "huggingface",
        "a Hugging Face folder (config.json and safetensors)",
        writable=True,
    ),
}


def writable_formats() -> list[str]:
    """Return the names of the formats that `save` can write."""
    return [name for name, entry in FORMATS.items() if entry.writable]


def load(path: Path | str) -> LoadedModel:
    """Read a model from a file or folder of any known format.

    Weights are memory-mapped if the format allows it. Raises BadInput, naming `path`, if it does
    not exist, has no known format, or is damaged.
    """
    name, path = str(path), Path(path)
    if not name:
        raise BadInput("the model path is empty; pass a file or a folder")
    try:
        path.stat()
    except (OSError, ValueError) as error:
        raise _not_found(name, error) from error
    for entry in FORMATS.values():
        if entry.matches(path):
            return entry.read(path)
    known = ", ".join(entry.description for entry in FORMATS.values())
    kind = "folder" if path.is_dir() else "file"
    names = ("*.bin", "*.gguf")
    files = [file for name in names for file in sorted(path.glob(name)) if file.is_file()]
    hint = f"; did you mean {files[0]}?" if len(files) == 1 else ""
    raise BadInput(f"{name}: not a model {kind}; known formats: {known}{hint}")


def save(
    model: LoadedModel,
    out: Path | str,
    format: str,
    weights: str | None = None,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write a model to `out` in one of `writable_formats()`.

    For "gguf" only: `weights`, the type of matrices in the file ("f32", "f16", "bf16", "q8_0" or
    "q4_0"; default: their dtype), and `tokenizer`, which the file then contains. Raises BadInput
    for an unknown format, a model that the format cannot express, or a path that cannot be written.
    """
    from onelaunch.checkpoints.weights import check_weights

    if format not in writable_formats():
        raise BadInput(f"format={format!r}: must be one of {', '.join(writable_formats())}")
    check_weights(model.config, model.weights, model.source or "the model to save")
    if format == GGUF:
        FORMATS[format].write(model, Path(out), weights=weights, tokenizer=tokenizer)
        return
    if weights is not None:
        raise BadInput(f"weights={weights!r}: is for format={GGUF!r}; leave it out")
    FORMATS[format].write(model, Path(out))


def random_model(preset_name: str, seed: int = 0) -> LoadedModel:
    """Make a model of a preset's shape with random float32 weights, fixed by the seed, to measure
    speed.

    Raises BadInput for an unknown preset.
    """
    config = preset(preset_name)
    import torch

    from onelaunch.checkpoints.weights import LoadedModel
    from onelaunch.model import Model

    # On "meta" first: the default initialization of the layers would draw every weight twice.
    with torch.device("meta"):
        model = Model(config)
    weights = model.to_empty(device="cpu").init_weights(seed).state_dict()
    return LoadedModel(config, weights, format="random", bos_id=1, stop_ids=(1, 2))


def _not_found(name: str, error: OSError | ValueError) -> BadInput:
    """Make the error for a path that does not exist, with a hint for preset names and Hub ids."""
    if name in PRESETS:
        return ModelNotFound(
            f"{name}: a preset has no weights: train one, or measure speed with random weights "
            f"(onelaunch.load({name!r}, random=True))"
        )
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError | NotADirectoryError):
        return BadInput(f"{name}: cannot read: {error.strerror or error}")
    if _HUB_ID.fullmatch(name) and not Path(name).parent.exists():
        folder = name.split("/")[1]
        return BadInput(
            f"{name}: no such file or folder. onelaunch does not download models: for one on the "
            f"Hugging Face Hub, run `hf download {name} --local-dir {folder}` and pass {folder}"
        )
    return ModelNotFound(f"{name}: no such file or folder")


# "org/name" as the Hub allows it: two parts, no leading dot.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
