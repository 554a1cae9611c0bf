"""What lies between files and engines: a configuration and canonically named tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.errors import BadInput


@dataclass
class LoadedModel:
    """A model as read from a file, or about to be written to one.

    `weights` has exactly `config.weight_shapes()`'s names and shapes, in the file's dtype, mapped
    from the file where the format allows. `extras` are tensors that a format stores beside the
    weights and must give back unchanged. `notices` are lines that a user must see, such as what was
    read in the place of a damaged file.
    """

    config: ModelConfig
    weights: dict[str, Tensor]
    source: Path | None = None
    format: str = ""
    bos_id: int | None = 1
    stop_ids: tuple[int, ...] = (1, 2)
    extras: dict[str, Tensor] = field(default_factory=dict)
    notices: tuple[str, ...] = ()

    @property
    def n_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.weights.values())


def check_weights(config: ModelConfig, weights: dict[str, Tensor], source: Path | str) -> None:
    """Raise BadInput unless `weights` has exactly the names and shapes of `config`."""
    expected = config.weight_shapes()
    for name, shape in expected.items():
        if name not in weights:
            raise BadInput(f"{source}: the tensor {name} is missing; is the file complete?")
        if tuple(weights[name].shape) != shape:
            raise BadInput(
                f"{source}: the tensor {name} has shape {tuple(weights[name].shape)}, "
                f"but the configuration says {shape}"
            )
        if not weights[name].is_floating_point():
            raise BadInput(f"{source}: the tensor {name} is {weights[name].dtype}, not a float")
    unknown = sorted(set(weights) - set(expected))
    if unknown:
        raise BadInput(
            f"{source}: unexpected tensor {unknown[0]}; this is not a plain Llama-family model"
        )
