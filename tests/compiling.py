"""Triton's compiler without a device: kernels for GPUs that are not there, and what they spill."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@dataclass
class Absent:
    """A device that is not there, as Triton's driver describes one."""

    target: Any

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # kernels are kept by device

    def get_current_stream(self, device: str) -> int:
        return 0


def absent(target: str) -> Absent:
    """The driver of a target that is not there: put in the place of Triton's active one."""
    from triton.backends.compiler import GPUTarget

    return Absent(GPUTarget(*TARGETS[target]))


def spilled(triton: Any, compiled: Any, folder: Path) -> int:
    """Bytes of registers that a thread of a compiled kernel keeps in memory."""
    if "amdgcn" in compiled.asm:
        counted = re.search(r"\.vgpr_spill_count:\s+(\d+)", compiled.asm["amdgcn"])
        return 4 * int(counted[1])
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", told)[1]) + int(re.search(r"LOCAL:(\d+)", told)[1])
