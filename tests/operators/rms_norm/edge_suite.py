"""What came to light in review: calls that look like an earlier one and are not, tensors at odd
places, and the ways around the kernels. Shared by the interpreter's run and the GPU's."""

from __future__ import annotations

import warnings

import pytest
import torch

from onelaunch.operators.rms_norm import RMSNorm, launch, reference, rms_norm

FAR = (2, 3, 64), (2**33, 3 * 2**29, 1)  # shape and strides; offsets within beyond 2^31
FAR_ELEMENTS = 2**33 + 2 * 3 * 2**29 + 64


def gradients(y, x, dy):
    return torch.autograd.grad(y, x, dy)


class EdgeSuite:
    device: torch.device

    def randn(self, *shape, **options):
        return torch.randn(*shape, device=self.device, **options)

    def far_storage(self, tmp_path):
        """Half-precision elements enough for FAR."""
        return torch.empty(FAR_ELEMENTS, dtype=torch.float16, device=self.device)

    def test_alignment_is_each_tensors_own(self, monkeypatch):
        """One misaligned tensor is not another: a kernel compiled for the first call would read the
        second's in 16 bytes where it must not."""
        bound = []
        bind = launch.bind
        monkeypatch.setattr(launch, "bind", lambda *a, **k: bound.append(a) or bind(*a, **k))
        at_0, at_4 = self.randn(4 * 8 + 1), self.randn(9)
        x_0, x_4, w_0, w_4 = at_0[:32].view(4, 8), at_0[1:].view(4, 8), at_4[:8], at_4[1:]
        dy = self.randn(4, 8)
        for x, w in ((x_0, w_4), (x_4, w_0), (x_0, w_0), (x_4, w_4)):
            x = x.detach().requires_grad_()
            y = rms_norm(x, w, 1.5e-6)
            torch.testing.assert_close(y, reference.rms_norm(x, w, 1.5e-6))
            wanted = reference.rms_norm_backward(dy, x, w, 1.5e-6)[0]
            torch.testing.assert_close(gradients(y, x, dy)[0], wanted)
        assert len(bound) == 8  # forward and backward of each of the four

    def test_offsets_within_are_64_bit(self, tmp_path):
        shape, strides = FAR
        x = self.far_storage(tmp_path).as_strided(shape, strides)
        x.copy_(torch.randn(shape))
        dy = self.randn(*shape, dtype=torch.float16)
        near = x.clone().requires_grad_()
        far = x.detach().requires_grad_()
        y = rms_norm(far)
        torch.testing.assert_close(y, rms_norm(near))
        torch.testing.assert_close(gradients(y, far, dy)[0], gradients(rms_norm(near), near, dy)[0])

    @pytest.mark.parametrize("wrong", ["shape", "dtype"])
    def test_a_gradient_that_does_not_fit_is_refused(self, wrong):
        x, w = self.randn(6, 8), self.randn(8)
        rest = (x, w, 1e-6, "llama", 0.0, True, "auto", "tuned")
        good = self.randn(6, 8)
        torch.ops.onelaunch.rms_norm_backward(good, *rest)
        bad = good[:2] if wrong == "shape" else good.half()
        with pytest.raises(ValueError, match="must agree"):
            torch.ops.onelaunch.rms_norm_backward(bad, *rest)

    def test_hooks_that_change_what_was_saved_spoil_no_later_call(self):
        x, w, dy = self.randn(32, 8, requires_grad=True), self.randn(8), self.randn(32, 8)
        wanted = reference.rms_norm_backward(dy, x, w, 1.25e-5)[0]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.half(), lambda t: t):
            y = rms_norm(x, w, 1.25e-5)
        with pytest.raises(ValueError, match="must agree"):
            gradients(y, x, dy)
        torch.testing.assert_close(gradients(rms_norm(x, w, 1.25e-5), x, dy)[0], wanted)

    def test_compiled_functorch_gradients(self):
        norm, x = RMSNorm(8, device=self.device), self.randn(4, 8)
        for function in (
            torch.func.grad(lambda x: norm(x).pow(2).sum()),
            lambda x: torch.func.vjp(norm, x)[1](x)[0],
        ):
            torch._dynamo.reset()
            compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(compiled(x), function(x))

    def test_in_place_leaves_rows_that_overlap_alone(self):
        x = self.randn(4, 8, requires_grad=True)
        dy = self.randn(20).as_strided((4, 8), (4, 1))
        wanted = reference.rms_norm_backward(dy, x)[0]
        torch.testing.assert_close(gradients(rms_norm(x, in_place=True), x, dy)[0], wanted)

    def test_in_place_tells_autograd(self):
        """What else has saved the gradient then knows that it has changed."""
        x, dy = self.randn(4, 8, requires_grad=True), self.randn(4, 8)
        version = dy._version
        gradients(rms_norm(x, in_place=True), x, dy)
        assert dy._version > version

    def test_a_trace_holds_the_plain_form(self):
        norm, x = RMSNorm(8, device=self.device), self.randn(4, 8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(norm, x)
        other = self.randn(3, 8)
        torch.testing.assert_close(traced(other), norm(other))

    def test_what_functorch_leaves_behind(self):
        kept = []
        x = self.randn(4, 8)
        torch.func.grad(lambda x: kept.append(x) or x.sum())(x)
        torch.testing.assert_close(rms_norm(kept[0]), rms_norm(x))

    def test_a_sign_that_is_only_noted(self):
        x, dy = self.randn(4, 8), self.randn(4, 8)
        rms_norm(x)
        torch.testing.assert_close(rms_norm(torch._neg_view(x)), rms_norm(-x))
        leaf = x.clone().requires_grad_()
        for given in (dy, torch._neg_view(dy)):
            wanted = reference.rms_norm_backward(given.clone(), x)[0]
            torch.testing.assert_close(gradients(rms_norm(leaf), leaf, given)[0], wanted)

    def test_only_what_is_at_fault_is_copied(self, monkeypatch):
        """A gradient that no kernel walks is copied, x is not."""
        given = []
        bind = launch.bind

        def recorded(*arguments, **options):
            run = bind(*arguments, **options)
            return lambda *tensors: given.append(tensors) or run(*tensors)

        monkeypatch.setattr(launch, "bind", recorded)
        x, w = self.randn(6, 8, requires_grad=True), self.randn(16)[::2]
        rms_norm(x, w, 1.75e-6).sum().backward()
        forward, backward = given[0], given[1]
        assert forward[0].data_ptr() == x.data_ptr()
        assert backward[1].data_ptr() == x.data_ptr()

    def test_where_a_kernel_does_not_compile_the_plain_form_runs_and_says_so(self, monkeypatch):
        def broken(*arguments):
            raise RuntimeError("Failed to find C compiler.")

        monkeypatch.setattr(launch, "_forward_launch", broken)
        monkeypatch.setattr(launch, "_failed", set())
        x = self.randn(5, 24)
        with pytest.warns(UserWarning, match="does not compile.*Failed to find C compiler"):
            y = rms_norm(x)
        torch.testing.assert_close(y, reference.rms_norm(x))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            rms_norm(x)
            again = torch.ops.onelaunch.rms_norm(x, None, 1e-6, "llama", 0.0, "auto", "tuned")
        torch.testing.assert_close(again, y)
