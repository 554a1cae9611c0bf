"""What came to light in review: calls that look like an earlier one and are not, tensors at odd
places, and the ways around the kernels. Shared by the interpreter's run and the GPU's."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
import torch._dynamo.compiled_autograd

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
            expected = reference.rms_norm_backward(dy, x, w, 1.5e-6)[0]
            torch.testing.assert_close(gradients(y, x, dy)[0], expected)
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
        expected = reference.rms_norm_backward(dy, x, w, 1.25e-5)[0]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.half(), lambda t: t):
            y = rms_norm(x, w, 1.25e-5)
        with pytest.raises(ValueError, match="must agree"):
            gradients(y, x, dy)
        torch.testing.assert_close(gradients(rms_norm(x, w, 1.25e-5), x, dy)[0], expected)

    def test_compiled_functorch_gradients(self):
        norm, x = RMSNorm(8, device=self.device), self.randn(4, 8)
        for function in (
            torch.func.grad(lambda x: norm(x).pow(2).sum()),
            lambda x: torch.func.vjp(norm, x)[1](x)[0],
        ):
            torch._dynamo.reset()
            compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(compiled(x), function(x))

    def test_compiled_autograd(self):
        """The backward is then traced, not run: also that of a call like the last ones."""
        x, w = self.randn(8, 16, requires_grad=True), self.randn(16, requires_grad=True)
        dy = self.randn(8, 16)
        for _ in range(2):
            expected = torch.autograd.grad(rms_norm(x, w), (x, w), dy)
        torch._dynamo.reset()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
            got = torch.autograd.grad(rms_norm(x, w), (x, w), dy)
        torch.testing.assert_close(got, expected)

    def test_in_place_leaves_rows_that_overlap_alone(self):
        x = self.randn(4, 8, requires_grad=True)
        dy = self.randn(20).as_strided((4, 8), (4, 1))
        expected = reference.rms_norm_backward(dy, x)[0]
        torch.testing.assert_close(gradients(rms_norm(x, in_place=True), x, dy)[0], expected)

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

    def test_a_trace_holds_the_plain_form_of_a_shape_that_was_launched(self):
        norm, x = RMSNorm(8, device=self.device), self.randn(4, 8)
        for _ in range(2):
            norm(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(norm, x)
        other = self.randn(4, 8)
        torch.testing.assert_close(traced(other), norm(other))

    @pytest.mark.parametrize("warm", [0, 3])
    def test_calls_like_the_last_ones_but_for_one_thing(self, warm):
        """What was remembered of the last calls must not serve one that differs from them."""
        eps = 1e-6 * (1 + warm)  # settings of its own
        storage = self.randn(12, 17)
        x, w = self.randn(12, 16), self.randn(16)
        column_major = torch.empty(16, 12, device=self.device).t()
        far = storage.view(-1)[1 : 1 + 12 * 16].view(12, 16)
        autocast = torch.autocast(self.device.type, dtype=torch.bfloat16)

        def verify(x, w, dy, needs=(True, True), context=contextlib.nullcontext, hooks=None):
            leaves = [
                t.detach().requires_grad_(need) for t, need in zip((x, w), needs, strict=True)
            ]
            hooked = contextlib.nullcontext if hooks is None else hooks
            with context(), hooked():
                y = rms_norm(*leaves, eps)
            # Two roundings to float16, each of which may fall the other way.
            near = {"rtol": 5e-3, "atol": 1e-3} if x.dtype is torch.half else {}
            torch.testing.assert_close(y, reference.rms_norm(x, w, eps), **near)
            if any(needs):
                inputs = [leaf for leaf in leaves if leaf.requires_grad]
                expected = reference.rms_norm_backward(dy, x, w, eps)
                both = [w for w, need in zip(expected, needs, strict=True) if need]
                torch.testing.assert_close(torch.autograd.grad(y, inputs, dy), tuple(both), **near)

        def laid(t, like):
            return torch.empty_strided(t.shape, like.stride(), device=t.device).copy_(t)

        dy = self.randn(12, 16)
        for _ in range(warm):
            verify(x, w, dy)
        saved_tensors_hooks = torch.autograd.graph.saved_tensors_hooks
        verify(far, w, dy)
        verify(x, storage.view(-1)[1:17], dy)
        verify(x, w, storage.view(-1)[3 : 3 + 12 * 16].view(12, 16))
        verify(storage[:, :16], w, dy)
        verify(x, w, storage[:, :16])
        verify(laid(x, column_major), w, dy)
        verify(x, w, laid(dy, column_major))
        verify(x, w, dy, (True, False))
        verify(x, w, dy, (False, True))
        verify(x, w, dy, (False, False))
        verify(x[:7], w, dy[:7])
        verify(x.view(3, 4, 16), w, dy.view(3, 4, 16))
        verify(x, w.half(), dy)
        verify(x.half(), w, dy.half())
        verify(x, w, dy, context=lambda: autocast)
        verify(
            x, w, dy,
            hooks=lambda: saved_tensors_hooks(
                lambda t: t, lambda t: laid(t, column_major) if t.dim() == 2 else t
            ),
        )  # fmt: skip
        with torch.no_grad():
            assert not rms_norm(x.clone().requires_grad_(), w, eps).requires_grad
        with torch.inference_mode():
            assert rms_norm(x, w, eps).is_inference()
        verify(x, w, dy)

    def test_what_functorch_leaves_behind(self):
        kept = []
        x = self.randn(4, 8)
        torch.func.grad(lambda x: kept.append(x) or x.sum())(x)
        torch.testing.assert_close(rms_norm(kept[0]), rms_norm(x))

    def test_a_lazy_negation(self):
        x, dy = self.randn(4, 8), self.randn(4, 8)
        rms_norm(x)
        torch.testing.assert_close(rms_norm(torch._neg_view(x)), rms_norm(-x))
        leaf = x.clone().requires_grad_()
        for gradient in (dy, torch._neg_view(dy)):
            expected = reference.rms_norm_backward(gradient.clone(), x)[0]
            torch.testing.assert_close(gradients(rms_norm(leaf), leaf, gradient)[0], expected)

    def test_only_the_unsupported_tensor_is_copied(self, monkeypatch):
        """A gradient of an unsupported layout is copied, x is not."""
        launches = []
        bind = launch.bind

        def recorded(*arguments, **options):
            run = bind(*arguments, **options)
            return lambda *tensors: launches.append(tensors) or run(*tensors)

        monkeypatch.setattr(launch, "bind", recorded)
        x, w = self.randn(6, 8, requires_grad=True), self.randn(16)[::2]
        rms_norm(x, w, 1.75e-6).sum().backward()
        forward, backward = launches[0], launches[1]
        assert forward[0].data_ptr() == x.data_ptr()
        assert backward[1].data_ptr() == x.data_ptr()

    def test_a_kernel_that_does_not_compile_falls_back_to_the_plain_form_with_a_warning(
        self, monkeypatch
    ):
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
