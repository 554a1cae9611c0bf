"""Device properties that kernel plans need, cached."""

from __future__ import annotations

from functools import cache

import torch


@cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of parallel compute units: multiprocessors of cuda and hip, execution units
    of xpu, vector cores of npu, 1 for a cpu.

    `device` must have an index unless it is the cpu.
    """
    if device.type == "cuda":  # hip as well
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).gpu_eu_count
    if device.type == "npu":
        properties = torch.get_device_module("npu").get_device_properties(device)
        return int(getattr(properties, "vector_core_num", getattr(properties, "cube_core_num", 1)))
    return 1
