"""llama2.c's versions 1 and 2, against writers spelled out from its export.py."""

import struct

import numpy as np
import pytest
import torch

from onelaunch.checkpoints import llama2c_versions, load, save
from onelaunch.checkpoints.export import export
from onelaunch.checkpoints.rope_layout import to_layout
from onelaunch.checkpoints.weights import LoadedModel
from onelaunch.config import ModelConfig
from onelaunch.errors import BadInput


def _model(seed=0, **changes):
    config = ModelConfig(
        dim=64,
        n_layers=3,
        n_heads=4,
        n_kv_heads=2,
        hidden_dim=192,
        vocab_size=40,
        max_seq_len=16,
        rope_layout="interleaved",
    ).with_(**changes)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(shape, generator=generator) * 10 ** float(i % 5 - 2)
        for i, (name, shape) in enumerate(config.weight_shapes().items())
    }
    return LoadedModel(config, weights)


def _order(config):
    layers = range(config.n_layers)
    norms = [f"layers.{i}.input_layernorm" for i in layers]
    norms += [f"layers.{i}.post_attention_layernorm" for i in layers] + ["norm"]
    matrices = ["embed_tokens"]
    for kind in ("q_proj", "k_proj", "v_proj", "o_proj"):
        matrices += [f"layers.{i}.self_attn.{kind}" for i in layers]
    for kind in ("gate_proj", "down_proj", "up_proj"):
        matrices += [f"layers.{i}.mlp.{kind}" for i in layers]
    return norms, matrices + ([] if config.tied_embeddings else ["lm_head"])


def _expected(model, version, group=64):
    """The bytes that llama2.c's export.py writes."""
    c = model.config
    numbers = c.dim, c.hidden_dim, c.n_layers, c.n_heads, c.n_kv_heads, c.vocab_size, c.max_seq_len
    head = struct.pack("<Ii7iB", 0x616B3432, version, *numbers, c.tied_embeddings)
    head += struct.pack("<i", group) if version == 2 else b""
    out = [head.ljust(256, b"\0")]
    norms, matrices = _order(c)
    out += [model.weights[f"{name}.weight"].numpy().tobytes() for name in norms]
    for name in matrices:
        values = model.weights[f"{name}.weight"].numpy().reshape(-1, group)
        if version == 1:
            out.append(values.tobytes())
            continue
        scale = np.abs(values).max(axis=1) / np.float32(127)
        out.append(np.rint(values / scale[:, None]).astype(np.int8).tobytes())
        out.append(scale.tobytes())
    return b"".join(out)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("changes", "group"),
    [
        ({}, 64),
        ({"dim": 96, "n_heads": 6}, 32),
        ({"hidden_dim": 172}, 4),
        ({"hidden_dim": 173}, 1),
    ],
)
def test_version_2_is_written_byte_for_byte(tmp_path, monkeypatch, tied, changes, group):
    monkeypatch.setattr(llama2c_versions, "_CHUNK", 64 * 5)  # a matrix is in several chunks
    model = _model(tied_embeddings=tied, **changes)
    path = tmp_path / "m.bin"
    save(model, path, "llama2c-int8")
    assert path.read_bytes() == _expected(model, 2, group)
    again = load(path)
    assert again.config == model.config
    assert again.format == "llama2c-int8"
    assert again.notices == (f"{path}: int8 weights were converted to float32",)
    for name, weight in model.weights.items():
        if weight.ndim == 1:
            assert torch.equal(again.weights[name], weight)
            continue
        scale = weight.view(-1, group).abs().amax(1, keepdim=True) / 127
        error = (again.weights[name] - weight).view(-1, group).abs()
        assert (error <= scale * 0.5001).all()
        assert group == 1 or float(error.max()) > 0
    save(again, tmp_path / "n.bin", "llama2c-int8")
    rewritten = load(tmp_path / "n.bin")
    for name, weight in again.weights.items():
        torch.testing.assert_close(rewritten.weights[name], weight, rtol=1e-6, atol=0)


def test_halves_are_rounded_to_even_and_zeros_stay():
    values = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 0.0, 126.5] + [0.0] * 8)
    integers, scales = llama2c_versions.quantize(values, 8)
    assert integers.tolist() == [127, 0, 2, 2, 0, -2, 0, 126] + [0] * 8
    assert scales.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("tied", [True, False])
def test_version_1_is_read(tmp_path, tied):
    model = _model(tied_embeddings=tied)
    path = tmp_path / "m.bin"
    path.write_bytes(_expected(model, 1))
    again = load(path)
    assert (again.config, again.format, again.notices) == (model.config, "llama2c", ())
    assert list(again.weights) == list(model.weights)
    assert all(torch.equal(again.weights[name], model.weights[name]) for name in model.weights)
    again.weights["norm.weight"].fill_(1)
    assert path.read_bytes() == _expected(model, 1)


def test_a_chat_template_of_its_name(tmp_path):
    model = _model()
    model.chat_template = "{{ x }}"
    (tmp_path / "source.bin").write_bytes(_expected(model, 2))
    (tmp_path / "source.tokenizer.bytes").write_text("bytes")
    (tmp_path / "source.chat_template.jinja").write_text("{{ x }}")
    source = load(tmp_path / "source.bin")
    export(source, tmp_path / "copy.bin", "llama2c-int8")
    assert load(tmp_path / "copy.bin").chat_template == "{{ x }}"


def test_groups_that_do_not_divide_rows_are_read(tmp_path):
    """As llama2.c writes them for stories42M, whose rows of 1,376 are no whole groups of 64."""
    model = _model(hidden_dim=172)
    (tmp_path / "m.bin").write_bytes(_expected(model, 2, 64))
    again = load(tmp_path / "m.bin")
    name = "layers.1.mlp.down_proj.weight"
    assert float((again.weights[name] - model.weights[name]).abs().max()) < float(
        model.weights[name].abs().max() / 127
    )


def test_the_other_layout_is_written_as_this_one(tmp_path):
    model = _model()
    save(model, tmp_path / "a.bin", "llama2c-int8")
    config, weights = to_layout(model.config, model.weights, "half")
    save(LoadedModel(config, weights), tmp_path / "b.bin", "llama2c-int8")
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"qk_norm": True}, "qk_norm"),
        ({"rope_theta": 5e5}, "rope_theta 500000"),
        ({"norm_eps": 1e-6}, "norm_eps 1e-06"),
        ({"head_dim": 32}, "head_dim 32"),
    ],
)
def test_what_cannot_be_written(tmp_path, changes, reason):
    with pytest.raises(BadInput, match=f"format='llama2c-int8': .*{reason}"):
        save(_model(**changes), tmp_path / "m.bin", "llama2c-int8")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path, bad):
    model = _model()
    model.weights["layers.2.mlp.up_proj.weight"][3, 4] = bad
    with pytest.raises(BadInput, match=r"layers\.2\.mlp\.up_proj\.weight are not all finite"):
        save(model, tmp_path / "m.bin", "llama2c-int8")
    assert not list(tmp_path.iterdir())


def test_damaged_files(tmp_path):
    path = tmp_path / "m.bin"
    whole = _expected(_model(), 2)
    for end in (4, 8, 255):
        path.write_bytes(whole[:end])
        with pytest.raises(BadInput, match=rf"m\.bin: truncated: {end} bytes are too few"):
            load(path)
    for data, fault in ((whole[:-1], "truncated"), (whole + b"\0", "followed by other bytes")):
        path.write_bytes(data)
        with pytest.raises(BadInput, match=rf"{len(data)} bytes, .*{len(whole)}: {fault}"):
            load(path)
    for place, form, value, message in [
        (4, "<i", 0, "version 0 is not supported"),
        (4, "<i", 3, "version 3 is not supported"),
        (4, "<i", -1, "version -1 is not supported"),
        (8, "<i", 0, "dim must be a whole number"),
        (12, "<i", 1 << 30, "hidden_dim must be a whole number"),
        (24, "<i", 0, "n_kv_heads must be at least 1"),
        (28, "<i", -40, "vocab_size must be a whole number"),
        (36, "<B", 0, "its header needs"),
        (37, "<i", 0, "the group size is 0"),
        (37, "<i", -64, "the group size is -64"),
        (37, "<i", 60, "is not whole groups of 60"),
    ]:
        data = bytearray(whole)
        struct.pack_into(form, data, place, value)
        path.write_bytes(data)
        with pytest.raises(BadInput, match=rf"m\.bin: .*{message}"):
            load(path)


def test_an_export_says_what_its_groups_cost(tmp_path):
    model = _model(hidden_dim=172)
    exported = export(model, tmp_path / "m.bin", "llama2c-int8")
    assert exported.notes == (
        "note: the weights are in groups of 4, as rows of 64 and 172 are not whole groups of 64: "
        "each has a scale of four bytes",
    )
    with pytest.raises(BadInput, match=r"must end in \.bin"):
        export(model, tmp_path / "m.q80", "llama2c-int8")
    assert export(_model(), tmp_path / "n.bin", "llama2c-int8").notes == ()
