"""`onelaunch doctor`: what is here, what will run where, and why not elsewhere."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from typing import Any

from onelaunch import __version__
from onelaunch.cli.common import Debug, Json

PACKAGES = ("torch", "triton", "numpy", "safetensors", "typer", "rich")
EXTRAS = {
    "hf": ("transformers", "tokenizers"),
    "tokenizer": ("sentencepiece",),
    "bench": ("matplotlib",),
}


def doctor(json_: Json = False, debug: Debug = False) -> None:
    """What is installed here, and what will run where."""
    facts = examine()
    print(json.dumps(facts, indent=2) if json_ else _page(facts))


def examine() -> dict[str, Any]:
    """Everything that doctor shows, as plain data."""
    import torch

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
            "model": _cpu_model(),
            "cores": os.cpu_count(),
            "usable_cores": _usable_cores(),
            "torch_threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "memory_bytes": _memory(),
        },
        "cuda": {"devices": cuda, "missing": cuda_missing},
        "mps": {"available": mps_missing is None, "missing": mps_missing},
        "extras": {
            extra: [name for name in names if _version(name) is None]
            for extra, names in EXTRAS.items()
        },
        "engines": {
            "reference": {
                "auto_device": "cuda" if cuda else "cpu",
                "dtype": "bfloat16" if cuda else "float32",
            }
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    """The name on the box, where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _usable_cores() -> int | None:
    """Cores that this process may use, which a container can narrow."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


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


def _page(facts: dict[str, Any]) -> str:
    """The facts as aligned lines."""
    versions, cpu, cuda, mps = (facts[key] for key in ("versions", "cpu", "cuda", "mps"))
    rows = [(name, version or "not installed") for name, version in versions.items()]
    rows.append(("platform", facts["platform"]))
    cores = f"{cpu['usable_cores']} of {cpu['cores']} cores usable"
    rows.append(
        ("cpu", f"{cpu['model']}, {cores}, {cpu['torch_threads']} threads, {cpu['capability']}")
    )
    rows.append(("memory", _gib(cpu["memory_bytes"])))
    for index, gpu in enumerate(cuda["devices"]):
        rows.append(
            (
                f"cuda:{index}",
                f"{gpu['name']}, capability {gpu['capability']}, {_gib(gpu['memory_bytes'])}, "
                f"{gpu['multiprocessors']} multiprocessors",
            )
        )
    if cuda["missing"]:
        rows.append(("cuda", f"no: {cuda['missing']}"))
    rows.append(("mps", "yes, with --device mps" if mps["available"] else f"no: {mps['missing']}"))
    for extra, missing in facts["extras"].items():
        state = "installed"
        if missing:
            state = f"without {', '.join(missing)}; pip install 'onelaunch[{extra}]'"
        rows.append((f"extra {extra}", state))
    reference = facts["engines"]["reference"]
    rows.append(
        (
            "engine",
            f"reference, generating on {reference['auto_device']} in {reference['dtype']} "
            "unless --device and --dtype say otherwise",
        )
    )
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _gib(n: int | None) -> str:
    return "unknown" if n is None else f"{n / 2**30:.1f} GiB"
