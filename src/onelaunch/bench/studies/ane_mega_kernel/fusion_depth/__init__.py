"""fusion-depth: one forward by how much one call holds: of compiled code on a CPU, a kernel launch
on a GPU.

Whole models, and stacks of one block of their layers, as the published figures have them of FFN
layers. Every way does the same work, in more calls or fewer, but those in `Case.less`. What a
sample is: cpu.py and cuda.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from onelaunch.bench.core.record import Log, Row
from onelaunch.bench.studies.ane_mega_kernel.fusion_depth.findings import findings
from onelaunch.bench.studies.ane_mega_kernel.fusion_depth.views import draw, table

__all__ = ["UNIT", "draw", "findings", "run", "table"]

UNIT = "us"


def run(device: str, quick: bool, log: Log) -> Iterator[Row]:
    """Time every case; yields a row for each way and one for the price of a call."""
    if device == "cpu":
        from onelaunch.bench.studies.ane_mega_kernel.fusion_depth.cpu import run_all

        yield from run_all(quick, log)
    else:
        from onelaunch.bench.studies.ane_mega_kernel.fusion_depth.cuda import run_all_on

        yield from run_all_on(device, quick, log)
