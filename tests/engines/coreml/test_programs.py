"""Programs emitted, saved, read back from disk and evaluated, against the model in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from onelaunch.config import preset
from onelaunch.engines.coreml import pack
from onelaunch.errors import BadInput
from onelaunch.model import Model, attention, feed_forward, rms_norm, rope_tables, widen_rope
from onelaunch.plan import make_plan, part_of
from tests.engines.suite import (
    SHAPES,
    SMALL,
    YARN,
    every_shape,
    exact_logits,
    layers_alone,
    relative_error,
    rows_of_tokens,
    weights_of,
)

pytest.importorskip("coremltools")

from onelaunch.engines.coreml import emit
from onelaunch.engines.coreml.evaluate import Evaluator
from onelaunch.engines.coreml.package import Package

MORE = {
    "heads of 48": SMALL.with_(dim=96, n_heads=2, n_kv_heads=2, head_dim=48, max_seq_len=40),
    "heads of 6": SMALL.with_(dim=40, n_heads=5, head_dim=6, n_kv_heads=1, hidden_dim=44),
    "norms of heads of 24": SMALL.with_(n_heads=4, n_kv_heads=2, head_dim=24, qk_norm=True),
    "yarn": YARN,
    "heads of 128": SMALL.with_(n_heads=2, n_kv_heads=1, head_dim=128, rope_layout="interleaved"),
}


def tokens_of(config, batch, sequence, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, sequence), generator=generator)


def saved(tmp_path, config, weights, batch, sequence, depth, taps="none", part="whole"):
    """The packages of a forward, and the plan."""
    plan = part_of(make_plan(config, batch, sequence, all_positions=True), part)
    packed = pack.Packed(config, weights)
    packages = []
    for number, launch in enumerate(emit.program_launches(plan, depth)):
        path = tmp_path / f"{depth}-{number}.mlpackage"
        emit.save(emit.emit(plan, launch, packed, taps), path)
        packages.append(Package(path))
    return packages, plan


def looked_up(weights, tokens):
    """What the host hands to the first program."""
    rows_BSD = weights["embed_tokens.weight"].half().float()[tokens]
    return rows_BSD.transpose(1, 2)[:, :, None, :]


def run(packages, weights, tokens, precision):
    """Through all of them; the last one's outputs."""
    given = {"tokens": tokens, "x": looked_up(weights, tokens)}
    for package in packages:
        evaluator = Evaluator(package, precision)
        outputs = evaluator({name: given[name] for name in evaluator.function.inputs})
        given = {"x": outputs.get("x_out")}
    return outputs


def logits_of(outputs):
    tiles = [outputs[name] for name in outputs if name.startswith("logits")]
    return torch.cat(tiles, 1)[:, :, 0].transpose(1, 2).double()


def rounded_hidden(config, model, tokens):
    """x of the last layer by PyTorch in float16, every operation of a layer by itself and so
    rounded: what float16 costs."""
    c = config
    batch, sequence = tokens.shape
    interleaved = c.rope_layout == "interleaved"
    tables = (table.half() for table in rope_tables(c, sequence))
    cos, sin = widen_rope(*tables, interleaved)
    mask = torch.full((sequence, sequence), pack.MASKED).triu(1).half()
    scale = c.head_dim**-0.5

    def heads(x, n):
        return x.view(batch, sequence, n, c.head_dim).transpose(1, 2)

    def rotated(x):
        pairs = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        halves = torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1)
        return x * cos + (pairs if interleaved else halves) * sin

    x = model.embed_tokens(tokens)
    for w in model.layer_weights():
        normed = rounded_norm(x, w.input_norm_D, c.norm_eps)
        q_weight = w.q_proj if c.qk_norm else w.q_proj * scale
        q, k = heads(normed @ q_weight.T, c.n_heads), heads(normed @ w.k_proj.T, c.n_kv_heads)
        if c.qk_norm:
            q = rounded_norm(q, w.q_norm_E * scale, c.norm_eps)
            k = rounded_norm(k, w.k_norm_E, c.norm_eps)
        v = heads(normed @ w.v_proj.T, c.n_kv_heads)
        k, v = (each.repeat_interleave(c.n_heads // c.n_kv_heads, 1) for each in (rotated(k), v))
        attended = torch.softmax(rotated(q) @ k.transpose(2, 3) + mask, -1) @ v
        x = x + attended.transpose(1, 2).flatten(2) @ w.o_proj.T
        normed = rounded_norm(x, w.post_norm_D, c.norm_eps)
        x = x + (F.silu(normed @ w.gate_proj.T) * (normed @ w.up_proj.T)) @ w.down_proj.T
    return x


def rounded_norm(x, weight, eps):
    """Every operation rounded to float16. Rows are brought near 1 first, by a power of two: what
    float16 costs where its range does not matter."""
    near = x.detach().double().abs().amax(-1, keepdim=True).clamp(min=eps**0.5).log2().round()
    x, eps = (x.double() * 2**-near).half(), (eps * 4**-near).half()
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def plain_half(config, weights, tokens):
    """PyTorch's logits in float16."""
    model = Model.from_weights(config, {name: w.half() for name, w in weights.items()})
    with torch.no_grad():
        x = rounded_hidden(config, model, tokens)
        return F.linear(rounded_norm(x, model.norm.weight, config.norm_eps), model.head_weight())


@pytest.mark.parametrize("config", [*SHAPES.values(), *MORE.values()], ids=[*SHAPES, *MORE])
def test_logits_are_the_models(config, tmp_path):
    weights = weights_of(config)
    size = 2, config.max_seq_len
    tokens = rows_of_tokens(config, size)
    exact = exact_logits(config, weights, tokens)
    allowed = 1.5 * relative_error(plain_half(config, weights, tokens), exact)
    packages, _ = saved(tmp_path, config, weights, *size, "all")

    def error(precision):
        parts = (logits_of(run(packages, weights, each, precision)) for each in tokens.split(2))
        return relative_error(torch.cat(list(parts)), exact)

    errors = {precision: error(precision) for precision in ("float64", "float32", "float16")}
    assert errors["float16"] <= allowed
    assert errors["float32"] <= allowed
    assert errors["float32"] == pytest.approx(errors["float64"], rel=1e-3)
    assert errors["float64"] < errors["float16"]


@pytest.mark.parametrize("depth", ["half", 1, 2, 3])
def test_every_depth_gives_the_same(depth, tmp_path):
    config = SMALL.with_(n_layers=3, n_kv_heads=2)
    weights, tokens = weights_of(config), tokens_of(config, 1, 20)
    whole, _ = saved(tmp_path, config, weights, 1, 20, "all")
    parts, plan = saved(tmp_path, config, weights, 1, 20, depth)
    layer_programs = {"half": 6, 1: 3, 2: 2, 3: 1}[depth]
    assert len(parts) == layer_programs + 1  # and head
    for precision in ("float32", "float16"):
        one = logits_of(run(whole, weights, tokens, precision))
        many = logits_of(run(parts, weights, tokens, precision))
        assert torch.equal(one, many)
    assert [stage.kind for stage in plan.stages][-1] == "head"


def test_a_depth_of_stages_is_refused():
    plan = make_plan(SMALL, 1, 8, all_positions=True)
    with pytest.raises(BadInput, match="half a layer at least"):
        emit.program_launches(plan, "stage")


@pytest.mark.parametrize("part", ["ffn", "attention"])
def test_layers_of_one_block_alone(part, tmp_path):
    weights, tokens = weights_of(SMALL), tokens_of(SMALL, 1, 24)
    packages, _ = saved(tmp_path, SMALL, weights, 1, 24, 2, part=part)
    outputs = run(packages, weights, tokens, "float32")
    exact = layers_alone(SMALL, weights, tokens, part)
    assert relative_error(outputs["x_out"][:, :, 0].transpose(1, 2), exact) < 3e-3


def test_a_head_of_many_rows_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(emit, "HEAD_ROWS", 16)
    weights, tokens = weights_of(SMALL), tokens_of(SMALL, 1, 24)
    (package,), _ = saved(tmp_path, SMALL, weights, 1, 24, "all")
    names = package.main.outputs
    rows = [package.main.types[name].shape[1] for name in names]
    assert names == ("logits_0", "logits_1", "logits_2", "logits_3")
    assert rows == [16, 16, 16, 13]
    exact = exact_logits(SMALL, weights, tokens)
    assert relative_error(logits_of(run([package], weights, tokens, "float32")), exact) < 5e-3


def hooked(config, weights, tokens):
    """The values of the model's own forward that taps are of, in float64, by layer and name."""
    model = Model.from_weights(config, {name: w.double() for name, w in weights.items()})
    x = model.embed_tokens(tokens).detach()
    found = []
    cos, sin = model.rope(x.device, x.dtype, tokens.shape[1])
    rope = (cos[: tokens.shape[1]], sin[: tokens.shape[1]])
    with torch.no_grad():
        for w in model.layer_weights():
            normed = rms_norm(x, w.input_norm_D, config.norm_eps)
            taps = {"input": x, "normed": normed, "v": normed @ w.v_proj.T}
            x = x + attention(normed, w, config, rope)
            normed = rms_norm(x, w.post_norm_D, config.norm_eps)
            gate, up = normed @ w.gate_proj.T, normed @ w.up_proj.T
            taps |= {"middle": x, "normed_2": normed, "gate": gate, "up": up}
            taps["hidden"] = torch.nn.functional.silu(gate) * up
            x = x + feed_forward(normed, w)
            found.append(taps)
    return found


@every_shape
def test_taps_are_what_the_backward_reads(config, tmp_path):
    weights, tokens = weights_of(config), tokens_of(config, 1, 24)
    (package,), plan = saved(tmp_path, config, weights, 1, 24, "all", taps="full")
    outputs = run([package], weights, tokens, "float32")
    (launch,) = emit.program_launches(plan, "all")
    names = emit.tap_names(plan, launch, "full")
    assert package.main.outputs == ("logits_0", *names)
    expected = hooked(config, weights, tokens)
    wide = pack.whole_rows(config, config.n_kv_heads)
    for layer, taps in enumerate(expected):
        for name, value in taps.items():
            got = outputs[emit.tap_name(layer, name)][:, :, 0].transpose(1, 2)
            if name == "v":
                got = pack.returned(got[0].T, wide, config.kv_dim).T[None]
            assert relative_error(got, value) < 6e-3, name


def test_layer_inputs_alone(tmp_path):
    weights, tokens = weights_of(SMALL), tokens_of(SMALL, 1, 24)
    packages, _ = saved(tmp_path, SMALL, weights, 1, 24, "half", taps="inputs")
    names = [package.main.outputs for package in packages]
    assert names[:3] == [("x_out", "layer_0_input"), ("x_out",), ("x_out", "layer_1_input")]
    first = run(packages[:1], weights, tokens, "float32")
    assert torch.equal(first["layer_0_input"], looked_up(weights, tokens))


def test_what_is_packed_comes_back():
    for config in (*SHAPES.values(), *MORE.values()):
        for heads in (config.n_heads, config.n_kv_heads):
            for rows in (pack.half_rows(config, heads), pack.whole_rows(config, heads)):
                weight = torch.randn(heads * config.head_dim, 5)
                packed = pack.taken(weight, rows)
                assert len(packed) == heads * pack.padded_head(config)
                assert torch.equal(pack.returned(packed, rows, len(weight)), weight)


def test_the_real_widths_pad():
    assert pack.padded_head(preset("stories15m")) == 64
    assert pack.padded_head(preset("stories110m")) == 64
    assert pack.padded_head(preset("stories260k")) == 32
    assert pack.padded_head(preset("qwen3-0.6b")) == 128
