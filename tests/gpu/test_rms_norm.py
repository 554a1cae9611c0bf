"""RMSNorm's kernels on a GPU: every meaning on every path, wide rows, many rows."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch

from onelaunch import rms_norm
from onelaunch.operators.rms_norm.plan import (
    FORWARD_MAX_TILE_COLUMNS,
    MAX_COLUMNS,
    MAX_TILE_COLUMNS,
)
from tests.operators.rms_norm.edge_suite import EdgeSuite
from tests.operators.rms_norm.kernel_suite import KernelSuite, every_row_mode
from tests.operators.rms_norm.source_suite import BLOCK_ROW_SHAPES, SMALL_SHAPES, SourceSuite
from tests.operators.rms_norm.suite import Case, Results, check, inputs, run

CUDA = torch.device("cuda", 0)
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
GIB = 2**30


class TestOnCuda(KernelSuite, EdgeSuite, SourceSuite):
    device = CUDA
    dtypes = ((BF16, F32), (F16, F32), (F32, BF16))
    main_dtypes = (BF16, F32)
    widths = (1, 2, 7, 33, 64, 96, 128, 257, 500, 512, 513, 768, 1000, 1024, 1025, 2048, 2049, 3000)
    source_shapes = ((4099, 96), (4100, 257), (5003, 500))
    source_row_mode = "auto"
    row_counts = (1, 7, 4096, 8448, 131072)
    independent_widths = (64, 96, 128, 257, 768)
    its_shapes = (*SMALL_SHAPES, *BLOCK_ROW_SHAPES)
    its_dtypes = (BF16, F32)

    @pytest.mark.parametrize("rule", ["tuned", "source"])
    @pytest.mark.parametrize(
        ("rows", "columns", "kernels"),
        [
            # the published boundaries; ours lie where the plan says, and test_plan.py tests them
            (4095, 512, {"source": "row"}),
            (4096, 512, {"source": "block"}),
            (4096, 513, {"source": "row"}),
            (32768, 64, {"source": "block", "tuned": "block"}),
            (131072, 128, {"source": "block", "tuned": "block"}),
            (4096, 1024, {"source": "row", "tuned": "block"}),
            (4096, 768, {"source": "row", "tuned": "row block"}),  # three parts forward
            (1, 64, {"source": "row"}),
        ],
    )
    def test_the_rules_own_choice(self, rows, columns, kernels, rule):
        for dtype in self.main_dtypes:
            self.verify(
                Case((rows, columns), dtype, dtype, rule=rule), *kernels.get(rule, "").split()
            )

    @pytest.mark.parametrize("rows", [1, 3, 700])
    @pytest.mark.parametrize(
        "columns",
        [
            4096, 4097, 5000, 8192, 12288, MAX_TILE_COLUMNS, MAX_TILE_COLUMNS + 1,
            20_001, 32768, 65536, 100_000, 131072, MAX_COLUMNS - 1, MAX_COLUMNS,
        ],
    )  # fmt: skip
    def test_wide_rows(self, columns, rows):
        for dtype in (BF16, F32):
            case = Case((rows, columns), dtype, dtype, row_mode="row")
            forward, backward = (
                "row" if columns <= most else "chunked"
                for most in (FORWARD_MAX_TILE_COLUMNS, MAX_TILE_COLUMNS)
            )
            assert [plan.kernel for plan in case.plans(self.device)] == [forward, backward]
            self.verify(case)

    def test_beyond_the_widest_the_plain_form_runs(self):
        case = Case((2, MAX_COLUMNS + 1), BF16, BF16)
        tensors = inputs(case, CUDA)
        check(case, run(case, *tensors), *tensors)

    def test_float64_takes_the_plain_form(self):
        x = torch.randn(4, 8, device=CUDA, dtype=torch.float64)
        want = x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
        torch.testing.assert_close(rms_norm(x), want)

    @pytest.mark.parametrize("columns", [64, 512])
    def test_dw_of_a_million_rows(self, columns):
        """Partials are float32; bfloat16 ones would stop growing at 256."""
        case = Case((2**20 + 3, columns), BF16, F32, "none")
        x, weight, _ = inputs(case, CUDA)
        dy = torch.ones_like(x)
        check(case, run(case, x, weight, x), x, weight, x)
        check(case, run(case, x, weight, dy), x, weight, dy)


# ------------------------------------------------------------------ more than 2^31 elements


@pytest.fixture
def much_memory():
    """60 GiB free, and given back afterwards."""
    gc.collect()
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info(CUDA)[0] < 60 * GIB:
        pytest.skip("needs 60 GiB of free GPU memory")
    yield
    gc.collect()
    torch.cuda.empty_cache()


def check_sample(case: Case, got: Results, x, weight, dy) -> None:
    """First, last and some rows between, and those around element 2^31; dW over all rows."""
    rows, columns = case.rows, case.columns
    middle = 2**31 // columns
    chosen = torch.arange(0, rows, max(1, rows // 60), device=CUDA).tolist()
    chosen += [0, 1, rows - 2, rows - 1, *(r for r in range(middle - 2, middle + 3) if r < rows)]
    chosen_N = torch.tensor(sorted(set(chosen)), device=CUDA)
    part = replace(case, shape=(len(chosen_N), columns), in_place=False)
    x_SC, dy_SC, y_SC, dx_SC = (t[chosen_N] for t in (x, dy, got.y, got.dx))
    own = run(part, x_SC, weight, dy_SC)
    check(part, Results(y_SC, dx_SC, own.dw), x_SC, weight, dy_SC)
    want = torch.zeros(columns, dtype=torch.float64, device=CUDA)
    step = 2**27 // columns
    for first in range(0, rows, step):
        wide = x[first : first + step].double()
        rstd = (wide.pow(2).mean(-1, keepdim=True) + case.eps).rsqrt()
        want += (dy[first : first + step].double() * wide * rstd).sum(0)
    assert float((got.dw.double() - want).norm() / want.norm()) < 4e-3


@every_row_mode
@pytest.mark.parametrize("shape", [(2**21 + 3, 1024), (2**27 + 5, 16)])
def test_more_than_2_31_elements(shape, row_mode, much_memory):
    case = Case(shape, BF16, BF16, row_mode=row_mode, in_place=True)
    assert {plan.kernel for plan in case.plans(CUDA)} == {row_mode}
    x = torch.randn(shape, dtype=BF16, device=CUDA)
    dy = torch.randn(shape, dtype=BF16, device=CUDA)
    weight = torch.rand(case.columns, dtype=BF16, device=CUDA)
    kept = dy.clone()
    check_sample(case, run(case, x, weight, dy), x, weight, kept)


@pytest.mark.parametrize("nested", [False, True])
def test_strides_that_reach_beyond_2_31_elements(nested, much_memory):
    """Few rows, far apart: offsets of rows are 64-bit."""
    big = torch.full((2**31 + 2**20,), float("nan"), dtype=BF16, device=CUDA)
    shape, strides = (9, 64), (2**28, 1)
    if nested:
        shape, strides = (9, 3, 64), (2**28, 128, 1)
    x = big.as_strided(shape, strides)
    x.copy_(torch.randn(shape))
    case = Case(shape, BF16, BF16)
    _, weight, dy = inputs(case, CUDA)
    check(case, run(case, x, weight, dy), x, weight, dy)
    gradient = big.as_strided(shape, strides, 4096)
    gradient.copy_(dy)
    check(case, run(replace(case, in_place=True), x, weight, gradient), x, weight, dy)


def test_a_wide_row_far_away(much_memory):
    case = Case((2**31 // 32768 + 5, 32768), BF16, None)
    x = torch.randn(case.shape, dtype=BF16, device=CUDA)
    dy = torch.randn(case.shape, dtype=BF16, device=CUDA)
    got = run(case, x, None, dy)
    last = replace(case, shape=(5, case.columns))
    check(last, Results(got.y[-5:], got.dx[-5:], None), x[-5:], None, dy[-5:])
