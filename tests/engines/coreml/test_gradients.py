"""Backward programs against autograd in float64, of the model that the programs state: weights,
rotary tables and eps as float16 has them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from onelaunch.config import preset
from onelaunch.engines.coreml import gradients, pack
from onelaunch.errors import BadInput
from onelaunch.model import Model, rope_tables, widen_rope
from onelaunch.plan import make_plan
from tests.engines.coreml.test_programs import MORE, looked_up, rounded_hidden, tokens_of
from tests.engines.suite import SHAPES, SMALL, YARN, relative_error, weights_of

pytest.importorskip("coremltools")

from onelaunch.engines.coreml import backward, emit
from onelaunch.engines.coreml.evaluate import Evaluator
from onelaunch.engines.coreml.norm import stated_eps
from onelaunch.engines.coreml.package import Package


def stated(config, weights):
    """Weights as the programs have them, by canonical name, float32; all but the queries' must be
    float16 numbers already."""
    packed, c = pack.Packed(config, weights), config
    found = dict(weights)
    for layer in range(c.n_layers):
        prefix = f"layers.{layer}.self_attn."
        name = f"{prefix}q_norm.weight" if c.qk_norm else f"{prefix}q_proj.weight"
        scale = c.head_dim**0.5
        value = torch.from_numpy(packed(name)).float().flatten(1)
        if c.qk_norm:
            one_head = value.view(2, c.n_heads, -1)[:, 0].flatten()
            found[name] = pack.returned(one_head, pack.half_rows(c, 1), c.head_dim) * scale
        else:
            found[name] = pack.returned(value, pack.half_rows(c, c.n_heads), c.q_dim) * scale
    return found


def rounded(config, weights):
    return {name: w.half().float() for name, w in weights.items()}


def exact_gradients(config, weights, tokens, targets, dtype=torch.float64):
    """Of the model that the programs state, by autograd: loss and gradients by canonical name."""
    config = config.with_(norm_eps=stated_eps(config.norm_eps))
    parameters = {name: w.to(dtype) for name, w in stated(config, weights).items()}
    model = Model.from_weights(config, parameters).requires_grad_(True)
    tables = (table.half().to(dtype) for table in rope_tables(config, tokens.shape[1]))
    tables = widen_rope(*tables, config.rope_layout == "interleaved")
    model.rope = lambda device, dtype, length: tables
    logits = F.linear(model.hidden(tokens), model.head_weight())
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def program_gradients(config, weights, tokens, targets, depth, taps, precision, folder, scale=1.0):
    """Through programs, one after another, and products on the host."""
    batch, sequence = tokens.shape
    plan = make_plan(config, batch, sequence, all_positions=True)
    packed = pack.Packed(config, weights)
    launches = [each for each in emit.program_launches(plan, depth) if "head" not in each.name]
    known, x = {}, looked_up(weights, tokens)
    for number, launch in enumerate(launches):
        path = folder / f"forward-{number}.mlpackage"
        emit.save(emit.emit(plan, launch, packed, taps), path)
        first = plan.stages[launch.first]
        known[emit.tap_name(first.layer, "input" if first.kind == "qkv" else "middle")] = x
        outputs = Evaluator(Package(path), precision)({"x": x})
        x = outputs.pop("x_out")
        known |= outputs
    found, dx, loss = host_end(config, weights, x, targets, scale)
    for number, launch in reversed(list(enumerate(launches))):
        path = folder / f"backward-{number}.mlpackage"
        emit.save(backward.emit_backward(plan, launch, packed, taps), path)
        evaluator = Evaluator(Package(path), precision)
        names = backward.backward_inputs(plan, launch, taps)
        assert [*evaluator.function.inputs] == names
        stages = plan.stages[launch.first : launch.last]
        top = "d_out" if stages[-1].kind == "down" else "d_middle"
        known[emit.tap_name(stages[-1].layer, top)] = dx
        known["dx"] = dx
        outputs = evaluator({name: known[name] for name in names})
        dx = outputs.pop("dx_in")
        known |= outputs
    for layer in range(config.n_layers):
        prefix = emit.tap_name(layer, "")
        values = {k.removeprefix(prefix): v for k, v in known.items() if k.startswith(prefix)}
        for name, product in gradients.products(config, layer, values).items():
            found[name] = product() / scale
    table = torch.zeros_like(weights["embed_tokens.weight"], dtype=torch.float64)
    rows = dx[:, :, 0].transpose(1, 2).flatten(0, 1).double() / scale
    table.index_add_(0, tokens.flatten(), rows)
    found["embed_tokens.weight"] = found.pop("classifier", 0) + table
    return loss, found


def host_end(config, weights, x, targets, scale):
    """Norm, classifier and loss: gradients of their weights, and of x times `scale`."""
    x = x.double().requires_grad_(True)
    norm = weights["norm.weight"].double().requires_grad_(True)
    tied = config.tied_embeddings
    head = weights["embed_tokens.weight" if tied else "lm_head.weight"].double()
    head.requires_grad_(True)
    rows = x[:, :, 0].transpose(1, 2)
    eps = stated_eps(config.norm_eps)
    logits = F.linear(F.rms_norm(rows, rows.shape[-1:], norm, eps), head)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    loss.backward()
    found = {"norm.weight": norm.grad, "classifier" if tied else "lm_head.weight": head.grad}
    return found, (x.grad * scale).float(), loss.item()


def half_gradients(config, weights, tokens, targets, scale):
    """PyTorch's in float16; head and loss in float32."""
    c = config
    model = Model.from_weights(c, {name: w.half() for name, w in weights.items()})
    model.requires_grad_(True)
    x = rounded_hidden(c, model, tokens)
    rows = F.rms_norm(x.float(), x.shape[-1:], model.norm.weight.float(), c.norm_eps)
    logits = F.linear(rows, model.head_weight().float())
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    (loss * scale).backward()
    return {name: p.grad.double() / scale for name, p in model.named_parameters()}


def batch_of(config, batch, sequence):
    tokens = tokens_of(config, batch, sequence)
    targets = tokens_of(config, batch, sequence, seed=1)
    targets[0, :2] = -1
    return tokens, targets


EVERY = {**SHAPES, **MORE}
SCALED = pytest.param(YARN, marks=pytest.mark.extended)


@pytest.mark.parametrize("taps", ["full", "inputs"])
@pytest.mark.parametrize("config", [*EVERY.values(), SCALED], ids=[*EVERY, "yarn"])
def test_gradients_are_autograds(config, taps, tmp_path):
    weights = rounded(config, weights_of(config))
    tokens, targets = batch_of(config, 2, 20)
    loss, exact = exact_gradients(config, weights, tokens, targets)
    got_loss, got = program_gradients(
        config, weights, tokens, targets, config.n_layers, taps, "float32", tmp_path
    )
    assert got_loss == pytest.approx(loss, rel=1e-5)
    assert got.keys() == exact.keys()
    check(config, weights, tokens, targets, exact, got)


def check(config, weights, tokens, targets, exact, got):
    """Within 1e-5, or where these wild weights cost PyTorch's float32 more, as exact as that."""
    _, plain = exact_gradients(config, weights, tokens, targets, torch.float32)
    for name, gradient in exact.items():
        allowed = max(1e-5, 1.5 * relative_error(plain[name], gradient))
        assert relative_error(got[name], gradient) <= allowed, name


@pytest.mark.parametrize(("depth", "taps"), [("half", "full"), ("half", "inputs"), (2, "inputs")])
def test_every_depth_gives_the_same(depth, taps, tmp_path):
    config = SMALL.with_(n_layers=3, n_kv_heads=2)
    weights = rounded(config, weights_of(config))
    tokens, targets = batch_of(config, 1, 24)
    _, exact = exact_gradients(config, weights, tokens, targets)
    _, got = program_gradients(config, weights, tokens, targets, depth, taps, "float64", tmp_path)
    for name, gradient in exact.items():
        assert relative_error(got[name], gradient) <= 1e-5, name


@pytest.mark.parametrize(
    ("name", "sequence"),
    [("stories260k", 256), pytest.param("stories15m", 64, marks=pytest.mark.extended)],
)
def test_float16_is_as_exact_as_pytorchs(name, sequence, tmp_path):
    config = preset(name)
    weights = dict(Model(config).init_weights(0).named_parameters())
    weights = rounded(config, {n: w.detach() for n, w in weights.items()})
    tokens, targets = batch_of(config, 1, sequence)
    _, exact = exact_gradients(config, weights, tokens, targets)
    _, got = program_gradients(
        config, weights, tokens, targets, config.n_layers, "full", "float32", tmp_path
    )
    for key, gradient in exact.items():
        assert relative_error(got[key], gradient) <= 1e-5, key
    plain = half_gradients(config, weights, tokens, targets, 1024.0)
    _, got = program_gradients(
        config, weights, tokens, targets, config.n_layers, "full", "float16", tmp_path, 1024.0
    )
    for key, gradient in exact.items():
        allowed = 1.5 * relative_error(plain[key], gradient)
        assert relative_error(got[key], gradient) <= allowed, key


def test_what_has_no_backward_program():
    plan = make_plan(SMALL, 1, 8, all_positions=True)
    packed = pack.Packed(SMALL, weights_of(SMALL))
    (whole,) = emit.program_launches(plan, "all")
    layers = emit.program_launches(plan, 2)[0]
    with pytest.raises(BadInput, match="of layers"):
        backward.emit_backward(plan, whole, packed)
    with pytest.raises(BadInput, match="without taps"):
        backward.emit_backward(plan, layers, packed, "none")
