"""Records: measured figures with what is needed to repeat them, one JSON file per experiment."""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from onelaunch.checkpoints.atomic import read_json, write_json
from onelaunch.errors import BadInput

Log = Callable[[str], None]
"""Shows the user a line."""
SCHEMA = 1
# What else figures may depend on: peers, and what PyTorch's own RMSNorm may be replaced through.
PACKAGES = ("onelaunch", "torch", "triton", "numpy", "numba", "llvmlite", "coremltools")
PEERS = ("liger-kernel", "quack-kernels", "nvidia-cutlass-dsl", "apache-tvm-ffi")
SWITCHES = ("TORCH_DISABLE_NATIVE_JIT", "TORCH_NATIVE_SKIP_VERSION_CHECK")
DEFAULT_FOLDER = Path("benchmarks/records")


@dataclass
class Row:
    """One case: the median of ours with its 20th and 80th percentile, n samples, peers' medians."""

    case: str
    ours: float
    spread: tuple[float, float] | None = None
    n: int = 1
    peers: dict[str, float] = field(default_factory=dict)
    floor: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, case: str, samples: Sequence[float], **rest: Any) -> Row:
        """Median and spread of samples."""
        return cls(case, statistics.median(samples), percentiles(samples), len(samples), **rest)

    def line(self, unit: str) -> str:
        """The row in one line, for the user who waits."""
        figures = [f"{self.case}: {self.ours:,.4g} {self.notes.get('unit', unit)}"]
        return ", ".join(figures + [f"{name} {value:,.4g}" for name, value in self.peers.items()])

    def to_dict(self) -> dict[str, Any]:
        return {
            "case": self.case,
            "ours": rounded(self.ours),
            "spread": [rounded(v) for v in self.spread] if self.spread else None,
            "n": self.n,
            "peers": {name: rounded(value) for name, value in self.peers.items()},
            "floor": self.floor,
            **self.notes,
        }


def percentiles(samples: Sequence[float]) -> tuple[float, float]:
    """The 20th and the 80th percentile (of one sample: itself)."""
    if len(samples) < 2:
        return samples[0], samples[0]
    cuts = statistics.quantiles(samples, n=5, method="inclusive")
    return cuts[0], cuts[3]


def write_record(
    experiment: str, unit: str, rows: Sequence[Row], folder: Path, device: str
) -> Path:
    """Add rows to an experiment's record under `folder/<slug of device>/`; a row of a case that is
    there already replaces it, other rows stay."""
    path = record_path(experiment, folder, device)
    new = {row.case for row in rows}
    kept = [row for row in rows_there(path) if row["case"] not in new]
    stamp = {"date": time.strftime("%Y-%m-%d"), "commit": commit()}
    record = {
        "schema": SCHEMA,
        "experiment": experiment,
        **stamp,
        "device": device,
        "versions": versions(),
        "unit": unit,
        "rows": [*kept, *({**row.to_dict(), **stamp} for row in rows)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    return path


def record_path(experiment: str, folder: Path, device: str) -> Path:
    """The path of the record of an experiment on a device."""
    return folder / slug(device) / f"{experiment}.json"


def rows_there(path: Path) -> list[dict[str, Any]]:
    """The rows of a record, none where it does not exist. Raises BadInput where the file is not one
    that rows can be added to."""
    if not path.exists():
        return []
    old = read_json(path)
    if old.get("schema") != SCHEMA:
        raise BadInput(f"{path}: its schema is not {SCHEMA}; move it away")
    rows = old.get("rows")
    if not isinstance(rows, list) or not all(isinstance(r, dict) and "case" in r for r in rows):
        raise BadInput(f"{path}: it holds no rows; move it away")
    return rows


def cpu_name() -> str:
    """Vendor, model and number of cores of this machine's processor."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            match = re.search(r"^model name\s*:\s*(.+)$", file.read(), re.MULTILINE)
        name = match[1].strip() if match else name
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} cores"


def device_name(device: str) -> str:
    """The name under which a device's records are kept."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    return cpu_name()


def slug(device: str) -> str:
    """A device's folder name: lower case, words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def versions() -> dict[str, str]:
    """The versions of the packages, and the switches that are set, that the figures depend on."""
    versions = {"python": platform.python_version()}
    for package in (*PACKAGES, *PEERS):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions | {name: os.environ[name] for name in SWITCHES if name in os.environ}


def commit() -> str:
    """The commit of the working tree, with `-dirty` where sources differ from it. ONELAUNCH_COMMIT
    names it where the tree is a copy whose own git, if it has one, knows another."""
    if named := os.environ.get("ONELAUNCH_COMMIT"):
        return named
    here = Path(__file__).parent
    try:
        head = _git(here, "rev-parse", "--short=12", "HEAD")
        changed = _git(here, "status", "--porcelain", "--", ":/src")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("-dirty" if changed else "")


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def rounded(value: float, digits: int = 6) -> float:
    """To so many significant digits, as records keep figures."""
    return float(f"{value:.{digits}g}")
