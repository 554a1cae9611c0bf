"""The in-memory form of a model: a configuration and canonically named tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.errors import BadInput


@dataclass
class LoadedModel:
    """A model that was read from a file, or is to be saved.

    `weights` has exactly the names and shapes of `config.weight_shapes()`, in the dtype of the
    file, memory-mapped if the format allows it. `extras` are other tensors of the file, which are
    written back unchanged. `chat_template` is the Jinja source of the model's chat template; None
    if its files have none. `notices` are lines for the user, such as which checkpoint replaced a
    damaged one.
    """

    config: ModelConfig
    weights: dict[str, Tensor]
    source: Path | None = None
    format: str = ""
    bos_id: int | None = 1
    stop_ids: tuple[int, ...] = (1, 2)
    extras: dict[str, Tensor] = field(default_factory=dict)
    chat_template: str | None = None
    notices: tuple[str, ...] = ()

    @property
    def n_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.weights.values())


def check_weights(config: ModelConfig, weights: dict[str, Tensor], source: Path | str) -> None:
    """Raise BadInput unless `weights` has exactly the names and shapes that `config` implies."""
    expected = config.weight_shapes()
    for name, shape in expected.items():
        if name not in weights:
            raise BadInput(f"{source}: the tensor {name} is missing; is the file complete?")
        if tuple(weights[name].shape) != shape:
            raise BadInput(
                f"{source}: the tensor {name} has shape {tuple(weights[name].shape)}, "
                f"but the configuration implies {shape}"
            )
        if not weights[name].is_floating_point():
            raise BadInput(f"{source}: the tensor {name} is {weights[name].dtype}, not a float")
    unknown = sorted(set(weights) - set(expected))
    if unknown:
        raise BadInput(
            f"{source}: unexpected tensor {unknown[0]}; this is not a plain Llama-family model"
        )
