import subprocess
import sys

import pytest
import torch

import onelaunch
from onelaunch import api
from onelaunch.checkpoints import FORMATS, load, random_model, save, writable_formats
from onelaunch.checkpoints.weights import LoadedModel
from onelaunch.config import PRESETS, ModelConfig
from onelaunch.errors import BadInput
from onelaunch.model import Model


@pytest.fixture
def model():
    config = ModelConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=24, vocab_size=32, max_seq_len=8)
    weights = Model(config).init_weights(3).state_dict()
    return LoadedModel(config, weights)


def _logits(model):
    tokens = torch.arange(8)[None]
    return Model.from_weights(model.config, {k: v.float() for k, v in model.weights.items()})(
        tokens
    )


@pytest.mark.parametrize("name", writable_formats())
def test_every_writable_format_comes_back(model, tmp_path, name):
    if name == "gguf":
        pytest.importorskip("gguf")
    out = tmp_path / "model.bin"
    save(model, out, name)
    again = load(str(out))
    assert again.format == name
    expected = _logits(model)
    tolerance = 0.02 if name == "llama2c-int8" else 1e-5
    assert (_logits(again) - expected).norm() / expected.norm() < tolerance


def test_formats_convert_into_each_other(model, tmp_path):
    save(model, tmp_path / "a.bin", "llama2c")
    save(load(tmp_path / "a.bin"), tmp_path / "hf", "hf")
    save(load(tmp_path / "hf"), tmp_path / "b.bin", "llama2c")
    assert (tmp_path / "b.bin").read_bytes() == (tmp_path / "a.bin").read_bytes()


def test_the_public_names_are_these():
    assert onelaunch.load is api.load
    assert onelaunch.save is api.save
    assert set(writable_formats()) == {"llama2c", "llama2c-int8", "gguf", "hf"}
    assert "run" in FORMATS


def test_listing_the_formats_loads_no_torch():
    code = (
        "import sys; from onelaunch.checkpoints import writable_formats; writable_formats(); "
        "assert not {'torch', 'numpy', 'safetensors'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "path is empty"),
        ("absent.bin", r"absent\.bin: no such file"),
        ("a/b/c", "a/b/c: no such file"),
        ("./org/name", "org/name: no such file"),
        ("x" * 5000, "File name too long"),
        ("nul\0byte", "byte: no such file"),
    ],
)
def test_names_of_nothing(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=message) as caught:
        load(name)
    assert "hf download" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "SmolLM2-135M"),
        ("Qwen/Qwen3-0.6B", "Qwen3-0.6B"),
        ("a/b_c.d", "b_c.d"),
    ],
)
def test_hub_id(name, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput) as caught:
        load(name)
    message = str(caught.value)
    assert "does not download" in message
    assert f"hf download {name} --local-dir {folder}" in message
    assert "\n" not in message
    (tmp_path / name.split("/")[0]).mkdir()
    with pytest.raises(BadInput) as caught:
        load(name)  # a path into a folder that exists is a path
    assert "hf download" not in str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_without_random(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=f"^{name}: .*preset.*no weights.*random=True"):
        load(name)
    (tmp_path / name).mkdir()
    with pytest.raises(BadInput, match=f"^{name}: not a model folder"):
        load(name)  # what is on disk comes first


def test_folder_and_file_of_nothing_known(tmp_path):
    with pytest.raises(BadInput, match=r"not a model folder.*\.bin.*run folder.*config"):
        load(tmp_path)
    (tmp_path / "m.bin").write_bytes(bytes(28))
    with pytest.raises(BadInput, match=rf"not a model folder.*{tmp_path}/m\.bin\?$"):
        load(tmp_path)
    (tmp_path / "m.bin").rename(tmp_path / "m.gguf")
    with pytest.raises(BadInput, match=rf"not a model folder.*{tmp_path}/m\.gguf\?$"):
        load(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(BadInput, match=r"notes\.txt: not a model file"):
        load(tmp_path / "notes.txt")


def test_saving_refuses_what_is_not_a_model(model, tmp_path):
    for name in ("run", "onnx", ""):
        with pytest.raises(BadInput, match=rf"format='{name}': .*gguf, llama2c-int8, llama2c, hf"):
            save(model, tmp_path / "out", name)
    del model.weights["norm.weight"]
    for name in writable_formats():
        with pytest.raises(BadInput, match=r"norm\.weight is missing"):
            save(model, tmp_path / "out", name)
    assert not list(tmp_path.iterdir())


def test_random_model():
    model = random_model("stories260k")
    assert model.config == PRESETS["stories260k"]
    assert (model.format, model.source, model.bos_id, model.stop_ids) == ("random", None, 1, (1, 2))
    expected = Model(model.config).init_weights(0).state_dict()
    assert list(model.weights) == list(model.config.weight_shapes())
    assert all(torch.equal(model.weights[name], expected[name]) for name in expected)
    other = random_model("stories260k", seed=1).weights["embed_tokens.weight"]
    assert not torch.equal(other, expected["embed_tokens.weight"])
    assert _logits(model).isfinite().all()
    with pytest.raises(BadInput, match="unknown preset 'nothing'; known: stories260k"):
        random_model("nothing")
