"""Files in and out: one module per format, and the table that finds the right one.

A format's module offers `matches(path) -> bool`, `read(path) -> LoadedModel` and, where the
format can be written, `write(model, out)`. It is imported when it is first needed.
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

    from onelaunch.checkpoints.weights import LoadedModel

__all__ = ["FORMATS", "load", "random_model", "save", "writable_formats"]


@dataclass(frozen=True, slots=True)
class Format:
    """One row of the table: where a format's code is, and how a person recognizes it."""

    module: str
    looks_like: str
    writable: bool

    def matches(self, path: Path) -> bool:
        """Whether `path` looks like this format; says nothing about whether it is sound."""
        return cast("Callable[[Path], bool]", self._function("matches"))(path)

    def read(self, path: Path) -> LoadedModel:
        """The model in `path`; raises BadInput where it cannot be used."""
        return cast("Callable[[Path], LoadedModel]", self._function("read"))(path)

    def write(self, model: LoadedModel, out: Path) -> None:
        """Write `model` to `out`; raises BadInput where the format cannot express it."""
        cast("Callable[[LoadedModel, Path], None]", self._function("write"))(model, out)

    def _function(self, name: str) -> object:
        return getattr(importlib.import_module(f"{__name__}.{self.module}"), name)


# In the order in which `load` tries them: a run folder may hold what another format looks for.
FORMATS: dict[str, Format] = {
    "llama2c": Format("llama2c", "a llama2.c file (NAME.bin)", writable=True),
    "run": Format("run_folder", "a run folder of `onelaunch train`", writable=False),
    "hf": Format(
        "huggingface",
        "a Hugging Face folder (config.json and safetensors)",
        writable=True,
    ),
}


def writable_formats() -> list[str]:
    """The formats that `save` knows."""
    return [name for name, entry in FORMATS.items() if entry.writable]


def load(path: Path | str) -> LoadedModel:
    """Read a model from a file or folder of any known format.

    Weights are mapped, not read, where the format allows. Raises BadInput, naming `path`, for
    what does not exist, is of no known format, or is damaged.
    """
    name, path = str(path), Path(path)
    if not name:
        raise BadInput("the path of the model is empty; give a file or a folder")
    try:
        path.stat()
    except (OSError, ValueError) as error:
        raise _absent(name, error) from error
    for entry in FORMATS.values():
        if entry.matches(path):
            return entry.read(path)
    kinds = ", ".join(entry.looks_like for entry in FORMATS.values())
    where = "this folder holds none of" if path.is_dir() else "this file is none of"
    inside = sorted(file for file in path.glob("*.bin") if FORMATS["llama2c"].matches(file))
    mend = f"; {inside[0]} is in it: give that" if len(inside) == 1 else ""
    raise BadInput(f"{name}: {where} what a model can be: {kinds}{mend}")


def save(model: LoadedModel, out: Path | str, format: str) -> None:
    """Write a model to `out` in one of `writable_formats()`.

    Raises BadInput for an unknown format, for a model that the format cannot express, and for a
    place that cannot be written.
    """
    from onelaunch.checkpoints.weights import check_weights

    if format not in writable_formats():
        raise BadInput(f"format={format!r}: must be one of {', '.join(writable_formats())}")
    check_weights(model.config, model.weights, model.source or "the model to be written")
    FORMATS[format].write(model, Path(out))


def random_model(preset_name: str, seed: int = 0) -> LoadedModel:
    """A preset's shape with random float32 weights, the same for the same seed: for speed only.

    Raises BadInput for an unknown preset.
    """
    config = preset(preset_name)
    import torch

    from onelaunch.checkpoints.weights import LoadedModel
    from onelaunch.model import Model

    # On "meta" first: the layers' own initialization would draw every weight a second time.
    with torch.device("meta"):
        model = Model(config)
    weights = model.to_empty(device="cpu").init_weights(seed).state_dict()
    return LoadedModel(config, weights, format="random", bos_id=1, stop_ids=(1, 2))


def _absent(name: str, error: OSError | ValueError) -> BadInput:
    """The error for a model that is not on disk: what it may have been meant to be."""
    if name in PRESETS:
        return ModelNotFound(
            f"{name}: a preset is a shape without weights: train one, or try its speed with random "
            f"weights (onelaunch.load({name!r}, random=True))"
        )
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError | NotADirectoryError):
        return BadInput(f"{name}: cannot read: {error.strerror or error}")
    if _HUB_ID.fullmatch(name) and not Path(name).parent.exists():
        folder = name.split("/")[1]
        return BadInput(
            f"{name}: no such file or folder. If it is a model on the Hugging Face Hub: onelaunch "
            f"downloads nothing; run `hf download {name} --local-dir {folder}` and give {folder}"
        )
    return ModelNotFound(f"{name}: no such file or folder")


# "org/name" as the Hub allows it: no third part, no leading dot.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
