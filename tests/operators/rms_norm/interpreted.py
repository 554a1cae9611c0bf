"""The kernels through Triton's interpreter, on CPU tensors: float32 and float16, since it truncates
where bfloat16 should round. A program takes it milliseconds, so everything here is small.

    python -m pytest tests/operators/rms_norm/interpreted.py

Whether Triton interprets is decided once a process, when Triton is imported, and then holds for
whatever else the process does: a run of its own (test_interpreter.py starts it). So what is
replaced below is replaced for good.
"""

from __future__ import annotations

import os
import sys

assert "triton" not in sys.modules, "too late: Triton was imported before this"
os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from onelaunch.operators.rms_norm import kernels, launch, plan  # noqa: E402
from tests.interpreting import mend_loop_bounds  # noqa: E402
from tests.operators.rms_norm import suite  # noqa: E402
from tests.operators.rms_norm.edge_suite import FAR_ELEMENTS, EdgeSuite  # noqa: E402
from tests.operators.rms_norm.kernel_suite import KernelSuite  # noqa: E402
from tests.operators.rms_norm.source_suite import SourceSuite  # noqa: E402
from tests.operators.rms_norm.suite import Case  # noqa: E402

# A CPU counts as one; with more, several programs share the tiles and their partials are added.
PROCESSORS = 3
launch.multiprocessors = suite.multiprocessors = lambda device: PROCESSORS

# Rows are chunked from a thousand columns on, and a program of the second launch adds more columns.
plan.MAX_TILE_COLUMNS = plan.FORWARD_MAX_TILE_COLUMNS = 1024
plan.CHUNK_COLUMNS = 512
plan.CHUNKED_BACKWARD = (2, 256, 8)
plan.REDUCE_NARROW = (64, 16, 8)


def _add_pairs_at_once(slow):
    """The interpreter calls the function that adds two pairs once for each element: half a second
    a tile. Here NumPy adds them; `test_pairs_are_added_as_the_kernel_says` is the check."""

    def reduce(self, input):
        if self.combine_fn is kernels._add_pairs:
            return [self.sum(part) for part in input]
        return slow(self, input)

    return reduce


mend_loop_bounds()
slow_reduce = interpreter.ReduceOps.generic_reduce
interpreter.ReduceOps.generic_reduce = _add_pairs_at_once(slow_reduce)


class TestInterpreted(KernelSuite, EdgeSuite, SourceSuite):
    device = torch.device("cpu")
    dtypes = ((torch.float32, torch.float16), (torch.float16, torch.float32))
    main_dtypes = (torch.float32, torch.float16)
    widths = (1, 7, 64, 96, 257, 768)
    source_shapes = ((35, 96),)
    source_row_mode = "block"
    row_counts = (1, 7, 40, 60)
    independent_widths = (96,)
    its_shapes = ((63, 41), (517, 60))
    its_dtypes = (torch.float16,)
    its_ways = ({"in_place": True}, {"rule": "source", "row_mode": "block"})

    def far_storage(self, tmp_path):
        """A file that is nearly all hole."""
        file = str(tmp_path / "far")
        return torch.from_file(file, shared=True, size=FAR_ELEMENTS, dtype=torch.float16)

    def test_the_sources_row_count_reaches_its_block_kernel(self):
        self.verify(Case((4099, 7), rule="source"), "block")

    def test_pairs_are_added_as_the_kernel_says(self, monkeypatch):
        monkeypatch.setattr(interpreter.ReduceOps, "generic_reduce", slow_reduce)
        self.verify(Case((3, 5), row_mode="row"), "row")
