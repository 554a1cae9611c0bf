"""onelaunch: small transformers with fewer kernel launches.

Names are loaded when first used, so importing the package costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "ModelConfig": "onelaunch.config",
    "PRESETS": "onelaunch.config",
    "preset": "onelaunch.config",
    "OnelaunchError": "onelaunch.errors",
    "Model": "onelaunch.model",
    "RMSNorm": "onelaunch.operators.rms_norm",
    "LanguageModel": "onelaunch.api",
    "Sampling": "onelaunch.engines.engine",
    "load": "onelaunch.api",
    "rms_norm": "onelaunch.operators.rms_norm",
    "save": "onelaunch.api",
    "train": "onelaunch.api",
}
__all__ = [
    "PRESETS",
    "LanguageModel",
    "Model",
    "ModelConfig",
    "OnelaunchError",
    "RMSNorm",
    "Sampling",
    "load",
    "preset",
    "rms_norm",
    "save",
    "train",
]

if TYPE_CHECKING:
    from onelaunch.api import LanguageModel, load, save, train
    from onelaunch.config import PRESETS, ModelConfig, preset
    from onelaunch.engines.engine import Sampling
    from onelaunch.errors import OnelaunchError
    from onelaunch.model import Model
    from onelaunch.operators.rms_norm import RMSNorm, rms_norm


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'onelaunch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
