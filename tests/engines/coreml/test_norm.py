"""RMSNorm in float16, forward and backward, over all of float16's range: as exact at every
magnitude as PyTorch's float16 is where nothing overflows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.engines.coreml.test_gradients import (
    batch_of,
    exact_gradients,
    half_gradients,
    program_gradients,
    rounded,
)
from tests.engines.coreml.test_programs import (
    MORE,
    logits_of,
    plain_half,
    rounded_norm,
    run,
    saved,
    tokens_of,
)
from tests.engines.suite import SHAPES, SMALL, exact_logits, relative_error, weights_of

pytest.importorskip("coremltools")

from onelaunch.engines.coreml import norm
from onelaunch.engines.coreml.evaluate import Evaluator
from onelaunch.engines.coreml.lint import lint, magnitudes
from onelaunch.generation.decode import generate_ids
from tests.engines.coreml.tiny import read, value

C, ROWS = 96, 256
LARGEST, SMALLEST = 65504.0, 2.0**-24
EPS = (1e-3, 1e-5, 1e-6, 1e-8, 1e-12)
MAGNITUDES = (
    SMALLEST, 2.0**-20, 1e-5, 1e-4, 1e-3, 3e-3, 0.02, 1.0, 40.0, 256.0, 2e3, 2e4, LARGEST,
)  # fmt: skip


def rows_of(magnitude, kind="noise"):
    """(1, C, 1, ROWS) of float16 numbers, the largest near `magnitude`."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, C, 1, ROWS, generator=generator, dtype=torch.float64)
    if kind == "spikes":  # one channel of each row holds nearly all
        x = x / 256
        x[:, 5] = 4 * x[:, 5].sign()
    x = (x * magnitude / 4).clamp(-LARGEST, LARGEST).half().double()
    if magnitude == LARGEST:
        x[:, :, :, 0] = LARGEST
    return x


def weight_of():
    generator = torch.Generator().manual_seed(1)
    return (1 + 0.3 * torch.randn(C, generator=generator)).half()


def channels_last(x):
    return x[:, :, 0].transpose(1, 2)


def exact_norm(x, weight, eps):
    return F.rms_norm(channels_last(x), (C,), weight.double(), eps)


def forward_program(folder, eps, weight):
    from coremltools.converters.mil import Builder as mb

    def body(x):
        (normalized,) = norm.normalize(mb, eps, [x], axis=1).parts
        return mb.mul(x=normalized, y=weight.numpy()[None, :, None, None])

    return read(folder, body, value(1, C, 1, ROWS))


def output_of(package, precision="float16", **given):
    (found,) = Evaluator(package, precision)(given).values()
    return channels_last(found)


@pytest.mark.parametrize("eps", EPS)
def test_a_norm_is_exact_at_every_magnitude(eps, tmp_path):
    weight = weight_of()
    package = forward_program(tmp_path, eps, weight)
    for kind in ("noise", "spikes"):
        for magnitude in MAGNITUDES:
            x = rows_of(magnitude, kind)
            exact = exact_norm(x, weight, eps)
            plain = rounded_norm(channels_last(x).half(), weight, eps)
            got = output_of(package, x=x)
            assert relative_error(got, exact) <= 1.5 * relative_error(plain, exact), (
                kind,
                magnitude,
            )
            assert relative_error(output_of(package, "float32", x=x), exact) <= 5e-4


def test_where_the_plain_form_holds_its_bits_are_kept(tmp_path):
    from coremltools.converters.mil import Builder as mb

    def plain(x):
        mean = mb.reduce_mean(x=mb.mul(x=x, y=x), axes=[1], keep_dims=True)
        normalized = mb.mul(x=x, y=mb.rsqrt(x=mean, epsilon=np.float16(0)))
        return mb.mul(x=normalized, y=weight.numpy()[None, :, None, None])

    weight, x = weight_of(), rows_of(4.0)
    expected = output_of(read(tmp_path / "plain", plain, value(1, C, 1, ROWS)), x=x)
    got = output_of(forward_program(tmp_path, 1e-12, weight), x=x)
    normal = channels_last(x).abs() > 2.0**-12
    assert torch.equal(got[normal], expected[normal])
    assert relative_error(got, expected) < 1e-7


@pytest.mark.parametrize("eps", [1e-5, 1e-12, 1e-30])
def test_a_row_of_zeros_stays_one(eps, tmp_path):
    x = rows_of(1.0)
    x[..., ::2] = 0.0
    got = output_of(forward_program(tmp_path, eps, weight_of()), x=x)
    assert torch.equal(got[:, ::2], torch.zeros(1, ROWS // 2, C))
    assert got[:, 1::2].isfinite().all()
    assert got[:, 1::2].abs().amax(-1).min() > 1


def test_nothing_comes_near_the_end_of_float16(tmp_path):
    """A reduction may add up in float16: what it adds is below 4."""
    package = forward_program(tmp_path, 1e-6, weight_of())
    evaluator = Evaluator(package, "float16", watch=True)
    for kind in ("noise", "spikes"):
        for magnitude in MAGNITUDES:
            evaluator({"x": rows_of(magnitude, kind)})
    operations = evaluator.function.operations
    assert magnitudes(evaluator.function, evaluator.largest) == []
    (mean,) = (each for each in operations if each.kind == "reduce_mean")
    assert evaluator.largest[mean.inputs["x"][0]] <= 4.1


def test_none_of_its_operations_is_known_to_leave_the_neural_engine(tmp_path):
    package = forward_program(tmp_path, 1e-6, weight_of())
    assert lint(package) == []
    assert len(package.main.operations) == 16


@pytest.mark.parametrize("eps", EPS)
def test_its_backward_is_exact_at_every_magnitude(eps, tmp_path):
    from coremltools.converters.mil import Builder as mb

    def body(x, g):
        found = norm.normalize(mb, eps, [x], axis=1)
        (dx,) = norm.normalize_backward(mb, found, [g], axis=1)
        return dx

    package = read(tmp_path, body, value(1, C, 1, ROWS), value(1, C, 1, ROWS))
    for magnitude in MAGNITUDES:
        x = rows_of(magnitude)
        # so that the gradient of x is near 1
        rms = math.sqrt(float(x.square().mean()) + eps)
        g = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)) * min(64.0, rms)
        g = g.half().double()
        exact = gradient_of(x, g, lambda x: F.rms_norm(x, (C,), None, eps))
        plain = gradient_of(x.half(), g.half(), lambda x: rounded_norm(x, 1, eps))
        got = output_of(package, x=x, g=g)
        assert relative_error(got, exact) <= 1.5 * relative_error(plain, exact), magnitude


def gradient_of(x, g, function):
    rows = channels_last(x).contiguous().requires_grad_(True)
    (found,) = torch.autograd.grad(function(rows), rows, channels_last(g))
    return found


def test_eps_as_a_program_has_it():
    for eps in (*EPS, 0.1, 1e-10, 6e-5):
        assert norm.stated_eps(eps) == pytest.approx(eps, rel=2.0**-11)
        floor = 2.0 ** -norm.floor_exponent(eps)
        assert floor == np.float16(floor) >= 2.0**-14
        assert floor >= math.sqrt(eps) or eps > 1
    assert norm.stated_eps(1e-30) > 0


# ---- in models


EVERY = {**SHAPES, **MORE}


def far(config, weights, factor):
    """A model whose hidden states, and with norms of heads whose queries and keys, are of another
    magnitude: each residual branch too, so that all of it counts."""
    c = config
    found = {
        name: w * factor if name == "embed_tokens.weight" else w for name, w in weights.items()
    }
    if c.tied_embeddings:  # or the logits would be as far
        found["norm.weight"] = found["norm.weight"] / factor
    for name, w in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            found[name] = w * factor
        if c.qk_norm and name.endswith(("q_proj.weight", "k_proj.weight")):
            found[name] = w * factor
    return rounded(c, found)


@pytest.mark.parametrize("factor", [2.0**-10, 2.0**8])
@pytest.mark.parametrize("config", EVERY.values(), ids=EVERY)
def test_logits_of_models_far_from_one(config, factor, tmp_path):
    weights = far(config, weights_of(config), factor)
    tokens = tokens_of(config, 2, config.max_seq_len)
    exact = exact_logits(config, weights, tokens)
    allowed = 1.5 * relative_error(plain_half(config, weights, tokens), exact)
    (package,), _ = saved(tmp_path, config, weights, *tokens.shape, "all")
    assert relative_error(logits_of(run([package], weights, tokens, "float16")), exact) <= allowed


@pytest.mark.parametrize("taps", ["full", "inputs"])
@pytest.mark.parametrize("factor", [2.0**-10, 2.0**8])
def test_gradients_of_models_far_from_one(factor, taps, tmp_path):
    for name, config in {"plain": SMALL, "norms of heads": SHAPES["qk-norm-wide-heads"]}.items():
        config = config.with_(tied_embeddings=False)
        weights = far(config, weights_of(config), factor)
        tokens, targets = batch_of(config, 8, 24)
        _, exact = exact_gradients(config, weights, tokens, targets)
        scale = 1024.0 * min(1.0, factor)  # the gradient of x is by that factor smaller
        plain = half_gradients(config, weights, tokens, targets, scale)
        folder = tmp_path / name
        _, got = program_gradients(
            config, weights, tokens, targets, config.n_layers, taps, "float16", folder, scale
        )
        for key, gradient in exact.items():
            allowed = 1.5 * relative_error(plain[key], gradient)
            assert relative_error(got[key], gradient) <= allowed, (name, key)


def test_a_norm_of_256_says_what_the_reference_says():
    """Residual states of 256 with two channels: the square of that is infinite in float16."""
    from onelaunch.engines.coreml.engine import CoreMLEngine
    from onelaunch.engines.engine import Sampling
    from onelaunch.engines.reference import ReferenceEngine

    config = SMALL.with_(
        dim=2, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=2, hidden_dim=2, vocab_size=4,
        max_seq_len=16, tied_embeddings=False,
    )  # fmt: skip
    weights = {name: torch.zeros(shape) for name, shape in config.weight_shapes().items()}
    for name in weights:
        if "norm" in name:
            weights[name].fill_(1.0)
    weights["embed_tokens.weight"].fill_(256.0)
    weights["lm_head.weight"] = torch.arange(8.0).view(4, 2)
    expected = generate_ids(ReferenceEngine(config, weights), [[1]], 4, Sampling())
    assert expected == [[3, 3, 3, 3]]
    assert generate_ids(CoreMLEngine(config, weights), [[1]], 4, Sampling()) == expected
