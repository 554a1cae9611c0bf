"""The ckpt.pt of llama2.c's train.py."""

import os
import zipfile

import pytest
import torch

from onelaunch.checkpoints import load
from onelaunch.config import ModelConfig
from onelaunch.errors import BadInput

SHAPES = {
    "tok_embeddings": (40, 16),
    "norm": (16,),
    "output": (40, 16),
}
LAYER = {
    "attention.wq": (16, 16),
    "attention.wk": (8, 16),
    "attention.wv": (8, 16),
    "attention.wo": (16, 16),
    "feed_forward.w1": (24, 16),
    "feed_forward.w2": (16, 24),
    "feed_forward.w3": (24, 16),
    "attention_norm": (16,),
    "ffn_norm": (16,),
}
SHAPES |= {f"layers.{i}.{name}": shape for i in range(2) for name, shape in LAYER.items()}
ARGS = {
    "dim": 16,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 40,
    "multiple_of": 8,
    "max_seq_len": 32,
    "dropout": 0.0,
}


def _state(prefix="", tied=True):
    generator = torch.Generator().manual_seed(0)
    state = {
        f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in SHAPES.items()
    }
    if tied:
        state["output.weight"] = state["tok_embeddings.weight"]
    return {prefix + name: tensor for name, tensor in state.items()}


def _save(folder, state=None, args=None, **changes):
    """As train.py saves it, its optimizer included."""
    state = _state() if state is None else state
    moments = {i: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(3)} for i in range(2)}
    checkpoint = {
        "model": state,
        "optimizer": {"state": moments, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "model_args": {**ARGS, **(args or {})},
        "iter_num": 7,
        "best_val_loss": torch.tensor(2.5),
        "config": {"out_dir": "out", "compile": True},
    }
    path = folder / "ckpt.pt"
    torch.save({**checkpoint, **changes}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("tied", [True, False])
def test_what_train_py_saves(tmp_path, prefix, tied):
    state = _state(prefix, tied)
    model = load(_save(tmp_path, state))
    assert model.config == ModelConfig(
        dim=16,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        hidden_dim=24,
        vocab_size=40,
        max_seq_len=32,
        rope_layout="interleaved",
        tied_embeddings=tied,
    )
    assert list(model.weights) == list(model.config.weight_shapes())
    for stored, name in [
        ("tok_embeddings", "embed_tokens"),
        ("layers.1.attention.wk", "layers.1.self_attn.k_proj"),
        ("layers.0.attention.wo", "layers.0.self_attn.o_proj"),
        ("layers.1.feed_forward.w1", "layers.1.mlp.gate_proj"),
        ("layers.1.feed_forward.w2", "layers.1.mlp.down_proj"),
        ("layers.1.feed_forward.w3", "layers.1.mlp.up_proj"),
        ("layers.1.ffn_norm", "layers.1.post_attention_layernorm"),
        ("norm", "norm"),
        *([] if tied else [("output", "lm_head")]),
    ]:
        assert torch.equal(model.weights[f"{name}.weight"], state[f"{prefix}{stored}.weight"])


def test_without_kv_heads_and_with_old_tables(tmp_path):
    state = _state()
    for i in range(2):
        for name in ("wk", "wv"):
            state[f"layers.{i}.attention.{name}.weight"] = torch.zeros(16, 16)
    state["freqs_cos"] = torch.zeros(32, 2)
    model = load(_save(tmp_path, state, {"n_kv_heads": None}))
    assert model.config.n_kv_heads == 4


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


def test_nothing_in_it_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = _save(tmp_path, config=Harmful())
    with pytest.raises(
        BadInput, match=r"ckpt\.pt: cannot be loaded as tensors .*run code"
    ) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "harmed").exists()


def _without(name):
    state = _state()
    del state[name]
    return state


@pytest.mark.parametrize(
    ("state", "args", "message"),
    [
        (_without("norm.weight"), {}, r"norm\.weight is missing"),
        (_without("layers.0.feed_forward.w1.weight"), {}, r"feed_forward\.w1\.weight is missing"),
        (_without("tok_embeddings.weight"), {}, r"embed_tokens\.weight is missing"),
        ({**_state(), "layers.0.attention.wq.bias": torch.zeros(16)}, {}, "unexpected tensor"),
        ({**_state(), "layers.x.attention.wq.weight": torch.zeros(1)}, {}, "unexpected tensor"),
        ({**_state(), "_orig_mod.norm.weight": torch.zeros(16)}, {}, "occurs twice"),
        ({**_state(), "norm.weight": 3}, {}, "not a plain tensor"),
        ({**_state(), "norm.weight": torch.zeros(16).to_sparse()}, {}, "not a plain tensor"),
        ({**_state(), "norm.weight": torch.zeros(1).expand(16)}, {}, "not a plain tensor"),
        ({**_state(), "norm.weight": torch.zeros(16, dtype=torch.int8)}, {}, "not a float"),
        (None, {"dim": 32}, "but the configuration implies"),
        (None, {"dim": "16"}, "its argument dim is '16'"),
        (None, {"n_heads": None}, "its argument n_heads is 'None'"),
        (None, {"n_layers": 3}, r"layers\.2\.input_layernorm\.weight is missing"),
        (None, {"n_layers": 1 << 40}, "n_layers must be a whole number"),
        (None, {"n_heads": 3}, "not a multiple of n_heads"),
    ],
)
def test_what_is_no_such_model(tmp_path, state, args, message):
    with pytest.raises(BadInput, match=rf"^\S+ckpt\.pt: .*{message}"):
        load(_save(tmp_path, state, args))


@pytest.mark.parametrize(
    "content", [[1, 2], {"a": torch.zeros(2)}, {"model": {}, "model_args": 3}, torch.zeros(3)]
)
def test_other_pickles(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(BadInput, match=r"other\.pt: not a checkpoint of llama2\.c's train\.py"):
        load(tmp_path / "other.pt")


def test_damaged_files(tmp_path):
    path = _save(tmp_path)
    whole = path.read_bytes()
    for data in (b"", b"PK", whole[:1000], whole[: len(whole) // 2]):
        path.write_bytes(data)
        with pytest.raises(BadInput, match=r"ckpt\.pt: cannot be loaded"):
            load(path)
    path.write_bytes(whole)
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w") as out:
        for record in source.infolist():
            out.writestr(record.filename, source.read(record), zipfile.ZIP_DEFLATED)
    with pytest.raises(BadInput, match=r"packed\.pt: damaged: \S+ is compressed"):
        load(packed)
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(BadInput, match="Git LFS"):
        load(path)
