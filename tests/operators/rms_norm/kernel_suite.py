"""What the kernels must do wherever they run: derive from `KernelSuite` and say on which device.

Run by tests/gpu on a GPU and by interpreted.py through Triton's interpreter on a CPU. A path is a
kernel that a plan can name; every case asserts that the plan takes the path it is meant for, so
retuning cannot turn a test into one of something else in silence.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from onelaunch import RMSNorm, rms_norm
from onelaunch.operators.rms_norm import launch
from tests.operators.rms_norm.suite import (
    CASTINGS,
    STRIDED,
    Case,
    assert_same,
    check,
    check_promises,
    check_roundings,
    check_roundings_of_dw,
    eager_forward,
    inputs,
    lay_out,
    run,
    semantics,
    source_matrix,
)

PATHS = ("row", "block", "chunked")
every_path = pytest.mark.parametrize("path", PATHS)
every_row_mode = pytest.mark.parametrize("row_mode", ["row", "block"])


class KernelSuite:
    """The contract of the kernels on one device."""

    device: torch.device
    # each dtype with another one for weights that differ from their input
    dtypes: tuple[tuple[torch.dtype, torch.dtype], ...]
    main_dtypes: tuple[torch.dtype, ...]  # of these also every width, rule and row count
    widths: tuple[int, ...]
    source_shapes: tuple[tuple[int, int], ...]  # on the block path by the published rule
    source_row_mode: str  # "auto", or "block" where the shapes have too few rows for that
    row_counts: tuple[int, ...]  # for the independence of rows, ascending
    independent_widths: tuple[int, ...]

    @pytest.fixture(autouse=True)
    def _kernels_are_there_and_memory_is_poisoned(self, monkeypatch):
        """Memory that PyTorch hands out uninitialized is NaN: an element left unwritten shows."""
        assert launch.available(self.device)
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        assert torch.empty(3, device=self.device).isnan().all()
        yield
        torch.use_deterministic_algorithms(before)

    def verify(self, case: Case, *paths: str) -> None:
        """The case's results are near the oracle, and its plans are on these paths, or on any."""
        for plan in case.plans(self.device):
            assert not paths or plan.kernel in paths, f"{case} is planned as {plan}"
        x, weight, dy = inputs(case, self.device)
        got = run(case, x, weight, dy.clone() if case.in_place else dy)
        check(case, got, x, weight, dy)

    def on_path(self, path: str, dtype: torch.dtype) -> Case:
        """A small case that takes a path both ways, its width no power of two."""
        if path == "row":
            return Case((5, 96), dtype, row_mode="row")
        if path == "block":
            return Case((35, 96), dtype, row_mode="block")
        for width in (2**k + 3 for k in range(10, 18)):
            case = Case((3, width), dtype)
            if all(plan.kernel == "chunked" for plan in case.plans(self.device)):
                return case
        raise AssertionError("no width is chunked both ways")

    # ------------------------------------------------------------------------------------- values

    @every_path
    def test_every_meaning(self, path):
        for dtype, other in self.dtypes:
            for meaning in semantics(dtype, other):
                self.verify(replace(self.on_path(path, dtype), **meaning), path)

    @every_path
    @pytest.mark.parametrize("casting", CASTINGS)
    def test_roundings_are_those_of_the_casting(self, path, casting):
        for dtype, other in self.dtypes:
            if dtype == torch.float32:
                continue
            for weight_dtype, offset in ((dtype, 0.0), (dtype, 1.0), (other, 0.0)):
                case = self.on_path(path, dtype)
                rows = max(case.rows, -(-4096 // case.columns))
                meaning = {"weight_dtype": weight_dtype, "casting": casting, "offset": offset}
                case = replace(case, shape=(rows, case.columns), **meaning)
                x, weight, dy = inputs(case, self.device)
                got = run(case, x, weight, dy)
                if weight_dtype == dtype:
                    check_roundings(case, got.y, x, weight)
                check_roundings_of_dw(case, got.dw, x, weight, dy)

    @every_path
    @pytest.mark.parametrize("eps", [0.0, 1e-5, 0.1])
    def test_eps(self, path, eps):
        case = replace(self.on_path(path, torch.float32), eps=eps)
        if eps == 0:  # a row of zeros has no direction then
            case = replace(case, shape=(4, case.columns))
        self.verify(case, path)

    @every_row_mode
    def test_every_width_at_both_sides_of_a_tile(self, row_mode):
        for columns in self.widths:
            for dtype in self.main_dtypes:
                case = Case((1, columns), dtype, dtype, row_mode=row_mode)
                plans = case.plans(self.device)
                # by blocks, one of the two ways may hold a single row
                assert row_mode in {plan.kernel for plan in plans}
                sides = {plan.rows_per_tile + i for plan in plans for i in (-1, 0, 1)}
                for rows in sorted({1, 2} | sides - {0}):
                    self.verify(replace(case, shape=(rows, columns)), "row", row_mode)

    @pytest.mark.parametrize("rule", ["tuned", "source"])
    def test_the_automatic_choice(self, rule):
        for dtype in self.main_dtypes:
            for shape in ((1, 64), (7, 768), (3, 2, 5, 64), (33, 257)):
                self.verify(Case(shape, dtype, dtype, rule=rule))

    def test_the_sources_own_matrix(self):
        for columns in (shape[1] for shape in self.source_shapes):
            assert columns & (columns - 1), (
                "a width that is no power of two reaches the column mask"
            )
        assert any(rows % 16 for rows, _ in self.source_shapes), "and a row tail the row mask"
        for case in source_matrix(self.main_dtypes, self.source_shapes):
            self.verify(replace(case, row_mode=self.source_row_mode), "block")

    @every_row_mode
    def test_without_rows(self, row_mode):
        for shape in ((0, 64), (2, 0, 3, 64)):
            case = Case(shape, row_mode=row_mode)
            x, weight, dy = inputs(case, self.device)
            got = run(case, x, weight, dy)
            assert got.y.shape == got.dx.shape == shape
            assert torch.equal(got.dw, torch.zeros_like(weight))

    @every_path
    @pytest.mark.parametrize("casting", CASTINGS)
    def test_programs_that_walk_several_tiles(self, path, casting):
        for dtype in self.main_dtypes:
            case = replace(self.on_path(path, dtype), casting=casting)
            plan = case.plans(self.device)[1]
            while plan.grid * plan.rows_per_tile * 2 >= case.rows:
                case = replace(case, shape=(2 * case.rows + 1, case.columns))
                plan = case.plans(self.device)[1]
            self.verify(case, path)

    # ------------------------------------------------------------------------------------ strides

    @every_row_mode
    @pytest.mark.parametrize(("x_layout", "dy_layout", "shape"), STRIDED)
    def test_strides(self, x_layout, dy_layout, shape, row_mode):
        case = Case(shape, row_mode=row_mode, x_layout=x_layout, dy_layout=dy_layout)
        for in_place in (False, True):
            x, weight, dy = inputs(case, self.device)
            kept = x.clone(), weight.clone(), dy.clone()
            check(case, run(replace(case, in_place=in_place), x, weight, dy), *kept)
            assert_same((x, weight), kept[:2])

    @pytest.mark.parametrize(("x_layout", "dy_layout", "shape"), STRIDED)
    def test_strides_of_results_are_those_promised(self, x_layout, dy_layout, shape):
        """The compiler plans with the strides of the fake form."""
        check_promises(Case(shape, x_layout=x_layout, dy_layout=dy_layout), self.device)

    @pytest.mark.parametrize("layout", ["shifted", "every other column"])
    def test_strided_weights(self, layout):
        case = Case((9, 64))
        x, weight, dy = inputs(case, self.device)
        weight = lay_out(weight, layout)
        check(case, run(case, x, weight, dy), x, weight, dy)

    def test_a_weight_of_one_number_for_all(self):
        case = Case((9, 64))
        x, weight, dy = inputs(case, self.device)
        weight = weight[:1].expand(64)
        check(case, run(case, x, weight, dy), x, weight, dy)

    @every_row_mode
    def test_what_one_call_compiled_does_not_serve_another_unlike_it(self, row_mode):
        """Alignment, strides and a row count of one are compiled into a kernel; the order matters,
        so each comes after one that it must not be confused with."""
        for columns in (64, 96):
            plain = Case((16, columns), row_mode=row_mode)
            for case in (
                plain,
                replace(plain, x_layout="shifted"),
                replace(plain, dy_layout="shifted"),
                replace(plain, x_layout="padded rows"),
                replace(plain, dy_layout="padded rows"),
                replace(plain, shape=(1, columns)),
                replace(plain, shape=(17, columns)),
                replace(plain, shape=(16, columns + 1)),
                replace(plain, weight_dtype=torch.float16),
                replace(plain, eps=0.5),
                replace(plain, weight_dtype=None),
                replace(plain, dy_layout="scalar"),
                plain,
            ):
                self.verify(case, row_mode)

    # ----------------------------------------------------------------------------------- autograd

    @every_path
    def test_in_place_writes_over_the_gradient_and_otherwise_nothing_does(self, path):
        case = self.on_path(path, torch.float32)
        x, weight, dy = inputs(case, self.device)
        before = dy.clone()
        free = run(case, x, weight, dy)
        assert torch.equal(dy, before)
        assert free.dx.data_ptr() != dy.data_ptr()
        bound = run(replace(case, in_place=True), x, weight, dy)
        assert bound.dx.data_ptr() == dy.data_ptr()
        assert_same((bound.y, bound.dx, bound.dw), (free.y, free.dx, free.dw))

    @pytest.mark.parametrize("layout", ["expanded", "scalar"])
    def test_a_gradient_that_overlaps_itself_is_never_written(self, layout):
        case = Case((9, 64), dy_layout=layout, in_place=True)
        x, weight, dy = inputs(case, self.device)
        before = dy.clone()
        run(case, x, weight, dy)
        assert torch.equal(dy, before)

    @pytest.fixture
    def launched(self, monkeypatch) -> list[str]:
        """The names of the kernels launched, of settings that were not bound before."""
        names = []
        bind = launch.bind

        def noted(kernel, *arguments, **options):
            bound = bind(kernel, *arguments, **options)

            def run(*tensors):
                names.append(kernel.__name__)
                bound(*tensors)

            return run

        monkeypatch.setattr(launch, "bind", noted)
        monkeypatch.setattr(launch, "settings", launch.Settings)
        monkeypatch.setattr("onelaunch.operators.rms_norm.settings", launch.Settings)
        return names

    @every_row_mode
    def test_a_frozen_weight_costs_no_gradient(self, launched, row_mode):
        x, weight, dy = inputs(Case((99, 64)), self.device)
        x.requires_grad_()

        def norm(weight):
            return rms_norm(x, weight, row_mode=row_mode)

        (frozen,) = torch.autograd.grad(norm(weight), x, dy)
        assert launched == ["forward_kernel", "backward_kernel"]
        launched.clear()
        dx, dw = torch.autograd.grad(norm(weight.requires_grad_()), (x, weight), dy)
        assert launched == ["forward_kernel", "backward_kernel", "reduce_kernel"]
        assert torch.equal(frozen, dx)
        (alone,) = torch.autograd.grad(norm(weight), weight, dy)
        assert torch.equal(alone, dw)

    def test_one_program_adds_dw_itself(self, launched):
        x, weight, dy = inputs(Case((5, 64)), self.device)
        weight.requires_grad_()
        torch.autograd.grad(rms_norm(x, weight, row_mode="block"), weight, dy)
        assert launched == ["forward_kernel", "backward_kernel"]

    def test_a_second_derivative_is_refused(self):
        x = torch.randn(4, 8, device=self.device, requires_grad=True)
        weight = torch.rand(8, device=self.device, requires_grad=True)
        for leaf in (x, weight):
            (first,) = torch.autograd.grad(
                rms_norm(x, weight).pow(2).sum(), leaf, create_graph=True
            )
            with pytest.raises(RuntimeError, match="twice|second|double"):
                first.sum().backward()

    def test_functorch_equals_autograd(self):
        x, weights = torch.randn(3, 5, 8), torch.rand(3, 8)
        x, weights = x.to(self.device), weights.to(self.device)

        def loss(x, weight):
            return rms_norm(x, weight).pow(3).sum()

        def by_autograd(x, weight):
            leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
            return torch.autograd.grad(loss(*leaves), leaves)

        close = torch.testing.assert_close
        for got, want in zip(
            torch.func.grad(loss, (0, 1))(x, weights[0]), by_autograd(x, weights[0]), strict=True
        ):
            close(got, want)
        each = [by_autograd(a, w) for a, w in zip(x, weights, strict=True)]
        got = torch.func.vmap(torch.func.grad(loss, (0, 1)))(x, weights)
        close(got[0], torch.stack([dx for dx, _ in each]))
        close(got[1], torch.stack([dw for _, dw in each]))
        shared = torch.func.vmap(torch.func.grad(loss, 1), in_dims=(0, None))(x, weights[0])
        close(shared, torch.stack([by_autograd(a, weights[0])[1] for a in x]))
        y = torch.func.vmap(rms_norm)(x, weights)
        close(y, torch.stack([rms_norm(a, w) for a, w in zip(x, weights, strict=True)]))
        jacobian = torch.func.jacrev(rms_norm)(x[0, 0], weights[0])
        plain = torch.func.jacrev(lambda x: eager_forward(x, weights[0], 1e-6, "llama", 0.0))
        close(jacobian, plain(x[0, 0]))

    @pytest.mark.parametrize("transform", ["grad of grad", "hessian", "jvp", "dual numbers"])
    def test_derivatives_without_a_kernel_are_refused_or_right(self, transform):
        """Never a result from which a part was lost in silence."""
        x, tangent = torch.randn(2, 4, 8, device=self.device)
        weight = torch.rand(8, device=self.device)

        def derive(norm):
            def loss(x):
                return norm(x).pow(3).sum()

            if transform == "grad of grad":
                return torch.func.grad(lambda x: torch.func.grad(loss)(x).pow(2).sum())(x)
            if transform == "hessian":
                return torch.func.hessian(loss)(x[:1])
            if transform == "jvp":
                return torch.func.jvp(norm, (x,), (tangent,))[1]
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(norm(forward_ad.make_dual(x, tangent))).tangent

        want = derive(lambda x: eager_forward(x, weight, 1e-6, "llama", 0.0))
        try:
            got = derive(lambda x: rms_norm(x, weight))
        except (NotImplementedError, RuntimeError):
            return
        assert got is not None, "lost"
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    def test_it_is_not_differentiated_where_nothing_asks(self):
        x, weight = torch.randn(4, 8, device=self.device), torch.rand(8, device=self.device)
        want = rms_norm(x, weight)
        assert want.grad_fn is None
        x.requires_grad_()
        with torch.no_grad():
            y = rms_norm(x, weight)
            assert y.grad_fn is None
            assert torch.equal(y, want)
        with torch.inference_mode():
            assert torch.equal(rms_norm(x, weight), want)

    def test_an_input_changed_in_between_is_noticed(self):
        x = torch.randn(4, 8, device=self.device)
        weight = torch.rand(8, device=self.device, requires_grad=True)
        y = rms_norm(x, weight)
        x.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_the_module_trains(self):
        norm = RMSNorm(96, casting="gemma", offset=1.0, device=self.device, row_mode="block")
        case = Case((35, 96), casting="gemma", offset=1.0, row_mode="block")
        x, _, dy = inputs(case, self.device)
        x.requires_grad_()
        norm(x).backward(dy)
        want = run(case, x, norm.weight, dy)
        assert torch.equal(x.grad, want.dx)
        assert torch.equal(norm.weight.grad, want.dw)

    # ---------------------------------------------------------------------------------- contracts

    @every_row_mode
    def test_a_row_does_not_depend_on_the_others(self, row_mode):
        """Bit for bit, for the first rows and for rows elsewhere in a tile, among few and many."""
        for columns in self.independent_widths:
            for dtype in self.main_dtypes:
                self._rows_are_independent(columns, dtype, row_mode)

    def _rows_are_independent(self, columns: int, dtype: torch.dtype, row_mode: str) -> None:
        case = Case((self.row_counts[-1], columns), dtype, dtype, row_mode=row_mode)
        x, weight, dy = inputs(case, self.device)
        whole = run(case, x, weight, dy)
        wanted = [plan.kernel for plan in case.plans(self.device)]
        for rows in self.row_counts[:-1]:
            part = replace(case, shape=(rows, columns))
            assert [plan.kernel for plan in part.plans(self.device)] == wanted
            for first in (0, 3, case.rows - rows):
                chosen = slice(first, first + rows)
                got = run(part, x[chosen], weight, dy[chosen])
                where = f"{part}, rows from {first}"
                assert torch.equal(got.y, whole.y[chosen]), f"y: {where}"
                assert torch.equal(got.dx, whole.dx[chosen]), f"dX: {where}"

    @every_path
    def test_every_run_gives_the_same_bits(self, path):
        case = self.on_path(path, torch.float32)
        rows = self.row_counts[1 if path == "chunked" else -2]
        case = replace(case, shape=(max(case.rows, rows), case.columns))
        assert {plan.kernel for plan in case.plans(self.device)} == {path}
        tensors = inputs(case, self.device)
        first = run(case, *tensors)
        kept: list[Tensor] = []
        for i in range(4):
            kept.append(torch.randn(1000 * (i + 1), device=self.device))  # memory lies elsewhere
            again = run(case, *tensors)
            assert_same((again.y, again.dx, again.dw), (first.y, first.dx, first.dw))
