"""Writing GGUF: what comes back, and what the package gguf reads in the file."""

import dataclasses
import sys

import numpy as np
import pytest
import torch

from onelaunch.checkpoints import gguf, gguf_writer, load, save
from onelaunch.checkpoints.rope_layout import to_layout
from onelaunch.checkpoints.weights import LoadedModel
from onelaunch.config import LinearRopeScaling, ModelConfig, RopeScaling, YarnRopeScaling
from onelaunch.errors import BadInput, MissingExtra, RunFailed
from onelaunch.model import Model

package = pytest.importorskip("gguf")

CONFIG = ModelConfig(
    dim=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    hidden_dim=96,
    vocab_size=40,
    max_seq_len=24,
    rope_layout="interleaved",
    norm_eps=3e-6,
    rope_theta=5e5,
)


def _model(dtype=torch.float32, seed=0, **changes):
    config = CONFIG.with_(**changes)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in config.weight_shapes().items()
    }
    return LoadedModel(config, weights)


def _stored(path):
    """The tensors as the package gguf reads them, by name: (type, shape, bytes)."""
    reader = package.GGUFReader(path)
    return {t.name: (t.tensor_type.name, tuple(t.shape), t.data) for t in reader.tensors}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_every_bit_comes_back(tmp_path, dtype, tied):
    model = _model(dtype, tied_embeddings=tied)
    save(model, tmp_path / "a.gguf", "gguf")
    again = load(tmp_path / "a.gguf")
    assert again.config == model.config
    for name, weight in model.weights.items():
        back = again.weights[name]
        assert back.dtype == (dtype if back.ndim == 2 else torch.float32)
        assert torch.equal(back.to(dtype), weight), name
    save(again, tmp_path / "b.gguf", "gguf")
    first, second = ((tmp_path / name).read_bytes() for name in ("a.gguf", "b.gguf"))
    assert first.replace(b"\1\0\0\0\0\0\0\0a", b"\1\0\0\0\0\0\0\0b") == second


def test_what_the_package_reads(tmp_path):
    model = dataclasses.replace(_model(), bos_id=3, stop_ids=(3, 5, 7, 9), chat_template="{{ x }}")
    save(model, tmp_path / "a.gguf", "gguf")
    fields = package.GGUFReader(tmp_path / "a.gguf").fields
    values = {key: field.contents() for key, field in fields.items()}
    assert values["general.architecture"] == "llama"
    assert values["general.file_type"] == 0
    expected = {"block_count": 2, "embedding_length": 64, "feed_forward_length": 96}
    expected |= {"attention.head_count": 4, "attention.head_count_kv": 2, "vocab_size": 40}
    expected |= {"attention.key_length": 16, "rope.dimension_count": 16, "context_length": 24}
    assert {key: values[f"llama.{key}"] for key in expected} == expected
    assert values["llama.rope.freq_base"] == 5e5
    ids = [values[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "eot", "eom")]
    assert ids == [3, 5, 7, 9]
    assert values["tokenizer.chat_template"] == "{{ x }}"
    again = load(tmp_path / "a.gguf")
    assert (again.bos_id, again.stop_ids, again.chat_template) == (3, (3, 5, 7, 9), "{{ x }}")
    kind, shape, data = _stored(tmp_path / "a.gguf")["blk.1.attn_k.weight"]
    assert (kind, shape) == ("F32", (64, 32))
    np.testing.assert_array_equal(data, model.weights["layers.1.self_attn.k_proj.weight"])


@pytest.mark.parametrize("name", ["q8_0", "q4_0"])
def test_quantized_as_the_package_does(tmp_path, monkeypatch, name):
    for module in (gguf, gguf_writer):
        monkeypatch.setattr(module, "_CHUNK", 64 * 7)  # a matrix is in several chunks
    model = _model(hidden_dim=80)
    save(model, tmp_path / "a.gguf", "gguf", weights=name)
    kind = package.GGMLQuantizationType[name.upper()]
    stored = _stored(tmp_path / "a.gguf")
    again = load(tmp_path / "a.gguf")
    for canonical, weight in model.weights.items():
        kind_name, _, data = stored[gguf_writer.gguf_name(canonical)]
        if weight.ndim == 1:
            assert kind_name == "F32"
        elif "down_proj" in canonical:  # rows of 80
            assert kind_name == "F16"
            assert torch.equal(again.weights[canonical], weight.half())
        else:
            expected = package.quants.quantize(weight.numpy(), kind)
            assert kind_name == kind.name
            np.testing.assert_array_equal(data, expected)
            values = package.quants.dequantize(expected, kind)
            np.testing.assert_array_equal(again.weights[canonical], values)
    assert len(again.notices) == 1
    assert gguf_writer.unquantized(model, name) == [
        f"layers.{i}.mlp.down_proj.weight" for i in range(2)
    ]


def _logits(model):
    weights = {name: tensor.double() for name, tensor in model.weights.items()}
    network = Model.from_weights(model.config, weights).double()
    return network(torch.arange(20)[None] * 7 % 40)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize(
    ("changes", "architecture"),
    [
        ({}, "llama"),
        ({"head_dim": 24}, "llama"),
        ({"rope_scaling": RopeScaling(factor=8.0)}, "llama"),
        ({"rope_scaling": RopeScaling(factor=3.0, original_max_seq_len=16)}, "llama"),
        ({"qk_norm": True, "head_dim": 24}, "qwen3"),
        ({"qkv_bias": True}, "qwen2"),
    ],
)
def test_the_same_logits_in_both_layouts(tmp_path, layout, changes, architecture):
    model = _model(rope_layout=layout, **changes)
    save(model, tmp_path / "a.gguf", "gguf")
    again = load(tmp_path / "a.gguf")
    fields = package.GGUFReader(tmp_path / "a.gguf").fields
    assert fields["general.architecture"].contents() == architecture
    assert again.config.rope_layout == ("interleaved" if architecture == "llama" else "half")
    config, weights = to_layout(again.config, again.weights, layout)
    assert config == model.config
    assert all(torch.equal(weights[name], model.weights[name]) for name in weights)
    expected = _logits(model)
    assert float((_logits(again) - expected).norm() / expected.norm()) < 1e-6


def test_what_cannot_be_written(tmp_path):
    out = tmp_path / "a.gguf"
    with pytest.raises(BadInput, match="weights='q5': must be one of f32, f16, bf16, q8_0, q4_0"):
        save(_model(), out, "gguf", weights="q5")
    with pytest.raises(BadInput, match="weights='f16': is for format='gguf'"):
        save(_model(), tmp_path / "a.bin", "llama2c", weights="f16")
    for changes, lost in [
        (
            {"qk_norm": True, "rope_scaling": RopeScaling()},
            "rope_scaling of kind 'llama3'",
        ),
        ({"rope_scaling": LinearRopeScaling(2.0)}, "rope_scaling of kind 'linear'"),
        ({"rope_scaling": YarnRopeScaling(2.0, 16)}, "rope_scaling of kind 'yarn'"),
        ({"norm_placement": "post"}, "norm_placement='post'"),
        ({"qk_norm": "full"}, "qk_norm='full'"),
        ({"qk_norm": True, "qkv_bias": True}, "qkv_bias=True"),
        ({"sliding_window": 8}, "sliding_window=8"),
    ]:
        with pytest.raises(BadInput, match=f"format='gguf': .*{lost}"):
            save(_model(**changes), out, "gguf")
    model = _model()
    model.weights["layers.0.mlp.up_proj.weight"][95, 63] = 65520.0
    with pytest.raises(BadInput, match="weights='f16': a weight is beyond the range"):
        save(model, out, "gguf", weights="f16")
    with pytest.raises(BadInput, match=r"absent does not exist"):
        save(_model(), tmp_path / "absent" / "a.gguf", "gguf")
    with pytest.raises(BadInput, match=r"is a folder; pass a file name, such as .*model\.gguf"):
        save(_model(), tmp_path, "gguf")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_writer, "_pad", full)
    with pytest.raises(RunFailed, match=r"a\.gguf: cannot write: the disk is full"):
        save(_model(), tmp_path / "a.gguf", "gguf")
    assert not list(tmp_path.iterdir())


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtra, match=r"writing a GGUF file needs .*onelaunch\[gguf\]"):
        save(_model(), tmp_path / "a.gguf", "gguf")
    assert not list(tmp_path.iterdir())
    assert gguf.matches(tmp_path / "a.gguf") is False
