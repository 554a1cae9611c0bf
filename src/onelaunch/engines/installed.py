"""Describe what is installed, which engines can run, and why others cannot."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

from onelaunch import __version__
from onelaunch.compilation.cache import Store
from onelaunch.errors import RunFailed

PACKAGES = ("torch", "triton", "numpy", "numba", "llvmlite", "safetensors", "typer", "rich")
EXTRAS = {
    "hf": ("transformers", "tokenizers"),
    "tokenizer": ("sentencepiece",),
    "gguf": ("gguf",),
    "bench": ("matplotlib",),
    "coreml": ("coremltools",),
    "log": ("tensorboard", "wandb"),
    "serve": ("starlette", "uvicorn", "jinja2"),
}


def clear_cache() -> dict[str, Any]:
    """Empty the cache; returns its folder and what went: `programs`, and their `bytes`.

    Raises RunFailed where the cache cannot be used or something in it cannot be removed.
    """
    store = Store()
    if store.unusable is not None:
        raise RunFailed(store.unusable)
    programs, size = store.clear()
    if left := len(store.entries()):
        raise RunFailed(
            f"{store.folder}: {left} programs are still there; remove the folder by hand"
        )
    return {"folder": str(store.folder), "programs": programs, "bytes": size}


def examine() -> dict[str, Any]:
    """Versions, devices, the cache, extras and engines, as plain data."""
    import torch

    from onelaunch.engines.cpu import usable_cores
    from onelaunch.engines.cpu.prefetch_choice import processor_name

    cuda, cuda_missing = _cuda()
    mps_missing = _why_no_mps()
    return {
        "versions": {
            "onelaunch": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "platform": platform.platform(),
        "cpu": {
            "model": processor_name(),
            "cores": os.cpu_count(),
            "usable_cores": usable_cores(),
            "torch_threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "memory_bytes": _memory(),
        },
        "cuda": {"devices": cuda, "missing": cuda_missing},
        "mps": {"available": mps_missing is None, "missing": mps_missing},
        "cache": _cache(),
        "extras": {
            extra: [name for name in names if _version(name) is None]
            for extra, names in EXTRAS.items()
        },
        "engines": {
            "auto": _auto_engine(bool(cuda)),
            "cpu": _cpu_engine(),
            "cuda": _cuda_engine(bool(cuda)),
        },
    }


def _auto_engine(cuda: bool) -> dict[str, str]:
    """The engine that `generate` runs by default."""
    import torch

    from onelaunch.engines.choice import automatic

    device = "cuda" if cuda else "cpu"
    return {
        "engine": automatic(torch.device(device), None, None, None),
        "device": device,
        "dtype": "bfloat16" if cuda else "float32",
    }


def _cpu_engine() -> dict[str, Any]:
    """Whether the CPU engine can run, for which processor, and which of its programs are there."""
    from onelaunch.engines import cpu

    missing = cpu.why_not()
    if missing is not None:
        return {"missing": missing}
    from onelaunch.engines.cpu import prefetch_choice, program

    options = program.options()
    store = Store()
    return {
        "missing": None,
        "processor": options["cpu"],
        "vector_bits": 32 * options["lanes"],
        "compiled": store.contains(program.key()),
        "compiled_training": store.contains(program.key(program.TRAINING)),
        "prefetch": os.environ.get("ONELAUNCH_PREFETCH") or "auto",
        "prefetch_choices": len(prefetch_choice.kept(store)),
    }


def _cuda_engine(cuda: bool) -> dict[str, Any]:
    """Whether the CUDA engine can run, and for how many shapes of models its form is chosen."""
    import torch

    from onelaunch.engines.cuda import why_not
    from onelaunch.engines.cuda.tuning.store import WHAT

    return {
        "missing": why_not(torch.device("cuda", 0)) if cuda else "there is no CUDA GPU here",
        "choices": sum(entry.about.get("what") == WHAT for entry in Store().entries()),
    }


def _cache() -> dict[str, Any]:
    store = Store()
    entries = store.entries()
    return {
        "folder": str(store.folder),
        "programs": len(entries),
        "bytes": sum(entry.bytes for entry in entries),
        "limit_bytes": store.limit_bytes,
        "unusable": store.unusable,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _cuda() -> tuple[list[dict[str, Any]], str | None]:
    """The CUDA GPUs, or why there are none."""
    import torch

    if torch.version.cuda is None:
        return [], "this PyTorch is built without CUDA"
    if not torch.cuda.is_available():
        return [], f"PyTorch has CUDA {torch.version.cuda}, but no NVIDIA driver or GPU is found"
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return devices, None


def _why_no_mps() -> str | None:
    import torch

    if torch.backends.mps.is_available():
        return None
    if sys.platform != "darwin":
        return "not a Mac"
    return "this macOS, Mac or PyTorch has no Metal backend"
