"""What a published study of the Neural Engine found about weights that change, asked of the
converter: as inputs, packed into the input, overwritten on disk, and code that nothing reaches.

It found through private interfaces that weights must be constants. The public converter takes more;
what it takes is evaluated here, and whether the Neural Engine would run it is not known.
"""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from onelaunch.engines.coreml import pack
from onelaunch.plan import make_plan
from onelaunch.plan.kinds import LAYER_KINDS
from tests.engines.coreml.test_programs import looked_up, saved, tokens_of
from tests.engines.coreml.tiny import read, value
from tests.engines.suite import SMALL, relative_error, weights_of

pytest.importorskip("coremltools")

from coremltools.converters.mil import Builder as mb

from onelaunch.engines.coreml import backward, emit
from onelaunch.engines.coreml.evaluate import KINDS, Evaluator
from onelaunch.engines.coreml.lint import lint
from onelaunch.engines.coreml.package import Package

C, S = 32, 64


def inputs(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half().float()


def test_weights_as_a_second_input_convert_and_are_followed(tmp_path):
    shapes = value(1, C, 1, S), value(C, C, 1, 1)
    package = read(tmp_path, lambda x, w: mb.conv(x=x, weight=w, name="out"), *shapes)
    x = inputs(1, C, 1, S)
    for seed in (1, 2):
        w = inputs(C, C, 1, 1, seed=seed)
        out = Evaluator(package, "float32")({"x": x, "w": w})["out"]
        assert relative_error(out[0, :, 0], w[:, :, 0, 0] @ x[0, :, 0]) < 1e-6
    # and the weight's last axis is what the Neural Engine pads most
    assert any("w" in finding.operation or "w" in finding.text for finding in lint(package))


def test_weights_packed_into_the_input_convert_and_are_followed(tmp_path):
    def body(both):
        x = mb.slice_by_size(x=both, begin=[0, 0, 0, 0], size=[1, C, 1, S])
        w = mb.slice_by_size(x=both, begin=[0, C, 0, 0], size=[1, C * C // S, 1, S])
        return mb.conv(x=x, weight=mb.reshape(x=w, shape=[C, C, 1, 1]), name="out")

    package = read(tmp_path, body, value(1, C + C * C // S, 1, S))
    both = inputs(1, C + C * C // S, 1, S)
    out = Evaluator(package, "float32")({"both": both})["out"]
    w = both[0, C:, 0].reshape(C, C)
    assert relative_error(out[0, :, 0], w @ both[0, :C, 0]) < 1e-6


def test_a_linear_layer_refuses_weights_that_are_no_constants(tmp_path):
    with pytest.raises(ValueError, match="weight.*must be const"):
        read(tmp_path, lambda x, w: mb.linear(x=x, weight=w), value(S, C), value(C, C))


def test_an_overwritten_weight_file_is_read_at_the_next_load_only(tmp_path):
    tokens = tokens_of(SMALL, 1, 24)
    given = {"x": looked_up(weights_of(SMALL), tokens)}
    found = []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        (layers, _), _ = saved(folder, SMALL, weights_of(SMALL, seed), 1, 24, 2)
        found.append(layers)
    loaded = Evaluator(found[0])
    before, other = (Evaluator(package)(given)["x_out"] for package in found)
    assert not torch.equal(before, other)
    shutil.copyfile(found[1].weights_path, found[0].weights_path)
    assert torch.equal(Evaluator(Package(found[0].path))(given)["x_out"], other)
    assert torch.equal(loaded(given)["x_out"], before)


@pytest.mark.parametrize("config", [SMALL, SMALL.with_(qk_norm=True, tied_embeddings=False)])
def test_the_output_follows_every_weight(config, tmp_path):
    weights, tokens = weights_of(config), tokens_of(config, 1, 24)
    keys = []

    def logits(changed):
        keys.append(len(keys))
        folder = tmp_path / str(keys[-1])
        folder.mkdir()
        (package,), _ = saved(folder, config, changed, 1, 24, "all")
        return Evaluator(package)({"tokens": tokens})["logits_0"]

    before = logits(weights)
    for name, weight in weights.items():
        if not (name.startswith("layers.1.") or "layers" not in name):
            continue
        assert not torch.equal(logits(weights | {name: weight * 1.5}), before), name


def test_no_stage_has_an_emitter_that_nothing_reaches(monkeypatch):
    reached = set()

    def counted(kind, name, function):
        def call(self, *args, **kwargs):
            reached.add((kind, name))
            return function(self, *args, **kwargs)

        return call

    kinds = {"forward": emit.Emitter, "backward": backward._Backward}
    for kind, made in kinds.items():
        for name in [n for n in vars(made) if callable(vars(made)[n]) and n != "__init__"]:
            monkeypatch.setattr(made, name, counted(kind, name, vars(made)[name]))
    config = SMALL.with_(qk_norm=True)
    packed = pack.Packed(config, weights_of(config))
    plan = make_plan(config, 1, 24, all_positions=True)
    for depth in ("all", 2):
        for launch in emit.program_launches(plan, depth):
            emit.emit(plan, launch, packed, "full")
    layers = emit.program_launches(plan, 2)[0]
    for taps in ("full", "inputs"):
        backward.emit_backward(plan, layers, packed, taps)
    expected = {
        (kind, name)
        for kind, made in kinds.items()
        for name in vars(made)
        if callable(vars(made)[name]) and name != "__init__"
    }
    assert reached == expected
    assert {("backward", kind) for kind in LAYER_KINDS} <= reached


PROBES = {
    "add": (lambda x, y: mb.add(x=x, y=y), lambda x, y: x + y),
    "sub": (lambda x, y: mb.sub(x=x, y=y), lambda x, y: x - y),
    "mul": (lambda x, y: mb.mul(x=x, y=y), lambda x, y: x * y),
    "real_div": (lambda x, y: mb.real_div(x=x, y=y), lambda x, y: x / y),
    "maximum": (lambda x, y: mb.maximum(x=x, y=y), lambda x, y: torch.where(x > y, x, y)),
    "abs": (lambda x, y: mb.abs(x=x), lambda x, y: x * x.sign()),
    "ceil": (lambda x, y: mb.ceil(x=x), lambda x, y: -torch.floor(-x)),
    "exp2": (lambda x, y: mb.exp2(x=x), lambda x, y: 2.0**x),
    "log": (
        lambda x, y: mb.log(x=mb.mul(x=x, y=x), epsilon=np.float16(0.5)),
        lambda x, y: torch.log1p(x * x - 0.5),
    ),
    "identity": (lambda x, y: mb.identity(x=x), lambda x, y: x),
    "sigmoid": (lambda x, y: mb.sigmoid(x=x), lambda x, y: 1 / (1 + torch.exp(-x))),
    "silu": (lambda x, y: mb.silu(x=x), lambda x, y: x / (1 + torch.exp(-x))),
    "rsqrt": (
        lambda x, y: mb.rsqrt(x=mb.mul(x=x, y=x), epsilon=np.float16(0.5)),
        lambda x, y: (x * x + 0.5) ** -0.5,
    ),
    "softmax": (
        lambda x, y: mb.softmax(x=x, axis=1),
        lambda x, y: torch.exp(x) / torch.exp(x).sum(1, keepdim=True),
    ),
    "reduce_max": (
        lambda x, y: mb.reduce_max(x=x, axes=[1], keep_dims=True),
        lambda x, y: x.sort(1).values[:, -1:],
    ),
    "reduce_mean": (
        lambda x, y: mb.reduce_mean(x=x, axes=[1], keep_dims=True),
        lambda x, y: x.sum(1, keepdim=True) / C,
    ),
    "reduce_sum": (
        lambda x, y: mb.reduce_sum(x=x, axes=[1], keep_dims=True),
        lambda x, y: x.sum(1, keepdim=True),
    ),
    "conv": (
        lambda x, y: mb.conv(
            x=x, weight=np.eye(C, dtype=np.float16)[::-1].copy()[:, :, None, None]
        ),
        lambda x, y: x.flip(1),
    ),
    "einsum": (
        lambda x, y: mb.einsum(
            values=(mb.transpose(x=x, perm=[0, 3, 2, 1]), y), equation="nchw,nwhu->nchu"
        ),
        lambda x, y: (x[0, :, 0].T @ y[0, :, 0])[None, :, None],
    ),
    "matmul": (
        lambda x, y: mb.matmul(x=x, y=y, transpose_y=True),
        lambda x, y: (x * y).sum(-1, keepdim=True),
    ),
    "concat": (lambda x, y: mb.concat(values=(x, y), axis=1), lambda x, y: torch.cat((x, y), 1)),
    "split": (lambda x, y: mb.split(x=x, num_splits=2, axis=1)[1], lambda x, y: x[:, C // 2 :]),
    "slice_by_size": (
        lambda x, y: mb.slice_by_size(x=x, begin=[0, 3, 0, 0], size=[1, 5, 1, -1]),
        lambda x, y: x[:, 3:8],
    ),
    "transpose": (
        lambda x, y: mb.transpose(x=x, perm=[0, 3, 2, 1]),
        lambda x, y: x.swapaxes(1, 3),
    ),
    "reshape": (
        lambda x, y: mb.reshape(x=x, shape=[1, 4, C // 4, S]),
        lambda x, y: x.reshape(1, 4, C // 4, S),
    ),
    "expand_dims": (lambda x, y: mb.expand_dims(x=x, axes=[2]), lambda x, y: x[:, :, None]),
    "gather": (
        lambda x, y: mb.gather(x=x, indices=np.array([5, 0, 5], dtype=np.int32), axis=1),
        lambda x, y: x[:, [5, 0, 5]],
    ),
}


@pytest.mark.parametrize("kind", PROBES)
def test_each_kind_of_operation_means_what_it_says(kind, tmp_path):
    write, formula = PROBES[kind]
    package = read(
        tmp_path,
        lambda x, y: mb.identity(x=write(x, y), name="out"),
        value(1, C, 1, S),
        value(1, C, 1, S),
    )
    assert kind in {operation.kind for operation in package.main.operations}
    x, y = inputs(1, C, 1, S), inputs(1, C, 1, S, seed=1)
    expected = formula(x.double(), y.double())
    for precision, allowed in (("float64", 1e-12), ("float32", 1e-5), ("float16", 2e-3)):
        got = Evaluator(package, precision)({"x": x, "y": y})["out"]
        assert got.shape == expected.shape
        assert relative_error(got, expected) <= allowed


def test_every_kind_that_is_evaluated_has_a_probe():
    assert set(KINDS) - {"cast"} == set(PROBES)
