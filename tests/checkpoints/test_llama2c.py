import hashlib
import struct
from pathlib import Path

import pytest
import torch

from onelaunch.checkpoints import llama2c, save
from onelaunch.checkpoints.weights import LoadedModel, check_weights
from onelaunch.config import PRESETS, ModelConfig, RopeScaling
from onelaunch.errors import BadInput
from onelaunch.model import Model

STORIES = Path(__file__).parents[2] / ".." / "shared" / "weights" / "stories260K.bin"
STORIES_SHA256 = "b0a507e7ad0f626624f17112325e66691f9076d622e1d3274d103d00299f2696"

needs_stories = pytest.mark.skipif(
    not STORIES.is_file(), reason="stories260K.bin is not in ../shared/weights"
)


def _model(seed=0, **changes):
    config = ModelConfig(
        dim=24,
        n_layers=3,
        n_heads=4,
        n_kv_heads=2,
        hidden_dim=20,
        vocab_size=40,
        max_seq_len=16,
        rope_layout="interleaved",
    ).with_(**changes)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(shape, generator=generator)
        for name, shape in config.weight_shapes().items()
    }
    return LoadedModel(config, weights)


def _file(folder, **changes):
    path = folder / "model.bin"
    llama2c.write(_model(**changes), path)
    return path


def _with_header(path, **changes):
    data = bytearray(path.read_bytes())
    for name, value in changes.items():
        place = llama2c.FIELDS.index(name)
        data[4 * place : 4 * place + 4] = struct.pack("<i", value)
    path.write_bytes(data)
    return path


@needs_stories
def test_the_published_model_reads_and_comes_back_byte_for_byte(tmp_path):
    data = STORIES.read_bytes()
    assert hashlib.sha256(data).hexdigest() == STORIES_SHA256
    model = llama2c.read(STORIES)
    assert model.config == PRESETS["stories260k"]
    assert model.config.n_params == 260_032
    check_weights(model.config, model.weights, STORIES)
    save(model, tmp_path / "again.bin", "llama2c")
    assert (tmp_path / "again.bin").read_bytes() == data
    model.extras.clear()  # as after a detour through another format
    save(model, tmp_path / "computed.bin", "llama2c")
    assert (tmp_path / "computed.bin").read_bytes() == data


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_write_then_read_then_write(tmp_path, tied, n_kv_heads):
    model = _model(tied_embeddings=tied, n_kv_heads=n_kv_heads)
    llama2c.write(model, tmp_path / "a.bin")
    again = llama2c.read(tmp_path / "a.bin")
    assert again.config == model.config
    assert (again.format, again.source) == ("llama2c", tmp_path / "a.bin")
    assert list(again.weights) == list(model.config.weight_shapes())
    assert all(torch.equal(again.weights[name], model.weights[name]) for name in model.weights)
    llama2c.write(again, tmp_path / "b.bin")
    assert (tmp_path / "b.bin").read_bytes() == (tmp_path / "a.bin").read_bytes()


def test_the_file_is_laid_out_as_llama2c_does(tmp_path):
    """Every float holds its own place: kind after kind, each for all layers in turn."""
    model = _model(tied_embeddings=False)
    model.weights = {name: torch.zeros_like(tensor) for name, tensor in model.weights.items()}
    place = 0
    order = ["input_layernorm"]
    order += [f"self_attn.{short}_proj" for short in "qkvo"]
    order += ["post_attention_layernorm", "mlp.gate_proj", "mlp.down_proj", "mlp.up_proj"]
    names = ["embed_tokens", *(f"layers.{i}.{kind}" for kind in order for i in range(3)), "norm"]
    for name in names:
        tensor = model.weights[f"{name}.weight"]
        tensor.view(-1).copy_(torch.arange(place, place + tensor.numel()))
        place += tensor.numel()
    tables = 2 * 16 * 3
    head = model.weights["lm_head.weight"]
    head.view(-1).copy_(torch.arange(place + tables, place + tables + head.numel()))
    llama2c.write(model, tmp_path / "a.bin")
    data = (tmp_path / "a.bin").read_bytes()
    assert struct.unpack_from("<7i", data) == (24, 20, 3, 4, 2, -40, 16)
    values = torch.frombuffer(bytearray(data[28:]), dtype=torch.float32)
    expected = torch.arange(len(values)).float()
    assert torch.equal(values[:place], expected[:place])
    assert torch.equal(values[place + tables :], expected[place + tables :])
    assert len(values) == place + tables + head.numel()
    cos, sin = values[place : place + tables].view(2, 16, 3)
    angles = torch.arange(16)[:, None] * 10000.0 ** (-torch.arange(3)[None] / 3)
    assert torch.allclose(cos, torch.cos(angles), atol=1e-6)
    assert torch.allclose(sin, torch.sin(angles), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "size"),
    [("stories260k", 1_056_540), ("stories15m", 60_816_028), ("stories110m", 438_381_596)],
)
def test_sizes_of_the_published_models(name, size):
    numbers = [shape for _, shape in llama2c._tensors(PRESETS[name])]
    assert 28 + 4 * sum(torch.Size(shape).numel() for shape in numbers) == size


def test_odd_rotary_tables_and_values_that_are_not_finite_come_back(tmp_path):
    """Readers skip the tables, so a file may hold anything there; NaN payloads count as bytes."""
    path = _file(tmp_path, tied_embeddings=False)
    data = bytearray(path.read_bytes())
    for place, bits in enumerate((0x7FC00001, 0x7F800001, 0xFF800000, 0x80000000, 1)):
        data[28 + 4 * place : 32 + 4 * place] = struct.pack("<I", bits)
    end_of_tables = len(data) - 4 * 40 * 24
    data[end_of_tables - 8 : end_of_tables] = b"\x01\x02\xa0\x7f\x04\x05\x06\x07"
    path.write_bytes(data)
    llama2c.write(llama2c.read(path), tmp_path / "again.bin")
    assert (tmp_path / "again.bin").read_bytes() == data


def test_half_layout_becomes_interleaved_with_the_same_logits(tmp_path):
    model = _model(rope_layout="half", tied_embeddings=False)
    llama2c.write(model, tmp_path / "a.bin")
    again = llama2c.read(tmp_path / "a.bin")
    assert again.config == model.config.with_(rope_layout="interleaved")
    tokens = torch.randint(0, 40, (2, 16), generator=torch.Generator().manual_seed(1))
    expected = Model.from_weights(model.config, model.weights)(tokens)
    got = Model.from_weights(again.config, again.weights)(tokens)
    assert (got - expected).norm() / expected.norm() < 1e-5


def test_bfloat16_weights_are_widened(tmp_path):
    model = _model()
    model.weights = {name: tensor.bfloat16() for name, tensor in model.weights.items()}
    llama2c.write(model, tmp_path / "a.bin")
    again = llama2c.read(tmp_path / "a.bin").weights
    assert all(torch.equal(again[name], model.weights[name].float()) for name in again)


def test_tables_of_another_length_are_computed_anew(tmp_path):
    model = llama2c.read(_file(tmp_path))
    model.config = model.config.with_(max_seq_len=8)
    llama2c.write(model, tmp_path / "short.bin")
    assert llama2c.read(tmp_path / "short.bin").config.max_seq_len == 8


def test_changing_a_weight_leaves_the_file_alone(tmp_path):
    path = _file(tmp_path)
    before = path.read_bytes()
    model = llama2c.read(path)
    model.weights["norm.weight"].fill_(7.0)
    assert path.read_bytes() == before
    assert llama2c.read(path).weights["norm.weight"][0] != 7.0


def test_writing_over_the_file_that_is_mapped(tmp_path):
    path = _file(tmp_path)
    before = path.read_bytes()
    llama2c.write(llama2c.read(path), path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("size", [0, 1, 4, 27, 28, 29, 5000, -4, -1])
def test_truncated(tmp_path, size):
    path = _file(tmp_path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(BadInput, match=r"model\.bin.*(too few|truncated)"):
        llama2c.read(path)


@pytest.mark.parametrize("extra", [b"x", b"\0\0\0\0", b"\0" * 4 * 40 * 24])
def test_trailing_bytes(tmp_path, extra):
    path = _file(tmp_path)
    path.write_bytes(path.read_bytes() + extra)
    with pytest.raises(BadInput, match=r"model\.bin.*followed by other bytes"):
        llama2c.read(path)


@pytest.mark.parametrize("tied", [True, False])
def test_the_sign_of_vocab_size_counts(tmp_path, tied):
    path = _file(tmp_path, tied_embeddings=tied)
    with pytest.raises(BadInput, match="truncated" if tied else "followed by other bytes"):
        llama2c.read(_with_header(path, vocab_size=-40 if tied else 40))


@pytest.mark.parametrize("value", [0, -1, 3, 1 << 24, (1 << 31) - 1, -(1 << 31)])
@pytest.mark.parametrize("name", llama2c.FIELDS)
def test_header_that_cannot_be_true(tmp_path, name, value):
    if (name, value) == ("n_layers", 3):
        value = 4
    path = _with_header(_file(tmp_path), **{name: value})
    with pytest.raises(BadInput, match=r"model\.bin: ") as caught:
        llama2c.read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 5}, "dim 24 .*n_heads 5"),
        ({"n_heads": 8, "n_kv_heads": 3}, "n_heads 8 .*n_kv_heads 3"),
        ({"n_heads": 24, "n_kv_heads": 1}, "head_dim 1 is odd"),
        ({"n_kv_heads": 0}, "n_kv_heads .*at least 1, not 0"),
        ({"n_layers": 1025}, "n_layers .*1 to 1024, not 1025"),
    ],
)
def test_dimensions_that_do_not_fit_each_other(tmp_path, changes, message):
    with pytest.raises(BadInput, match=rf"model\.bin: .*{message}"):
        llama2c.read(_with_header(_file(tmp_path), **changes))


def test_pickled_checkpoint_is_not_opened(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(3)}, path)
    with pytest.raises(BadInput, match="pickled PyTorch file"):
        llama2c.read(path)


def test_absent_file_and_folder(tmp_path):
    for path in (tmp_path / "absent.bin", tmp_path):
        with pytest.raises(BadInput, match="cannot read"):
            llama2c.read(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": True}, "qk_norm"),
        ({"rope_scaling": RopeScaling()}, "rope_scaling"),
        ({"rope_theta": 500000.0}, "rope_theta 500000 "),
        ({"norm_eps": 1e-6}, "norm_eps 1e-06 "),
        ({"head_dim": 12}, "head_dim 12 "),
    ],
)
def test_what_the_format_cannot_express_is_refused(tmp_path, changes, message):
    with pytest.raises(BadInput, match=message) as caught:
        llama2c.write(_model(**changes), tmp_path / "a.bin")
    assert "use format='hf'" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_epsilon_rounded_to_float32_is_the_same_epsilon(tmp_path):
    rounded = torch.tensor(1e-5).item()
    assert rounded != 1e-5
    llama2c.write(_model(norm_eps=rounded), tmp_path / "a.bin")
    assert llama2c.read(tmp_path / "a.bin").config.norm_eps == 1e-5


def test_places_that_cannot_be_written(tmp_path):
    with pytest.raises(BadInput, match="is a folder"):
        llama2c.write(_model(), tmp_path)
    with pytest.raises(BadInput, match="absent does not exist"):
        llama2c.write(_model(), tmp_path / "absent" / "a.bin")


def test_a_write_that_the_system_stops_leaves_what_was_there(tmp_path):
    resource = pytest.importorskip("resource")
    path = _file(tmp_path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) - 1, hard))
    try:
        with pytest.raises(BadInput, match=r"model\.bin: cannot write"):
            llama2c.write(_model(seed=1), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_matches(tmp_path):
    assert llama2c.matches(_file(tmp_path))
    assert not llama2c.matches(tmp_path)
    assert not llama2c.matches(tmp_path / "absent.bin")
    (tmp_path / "folder.bin").mkdir()
    assert not llama2c.matches(tmp_path / "folder.bin")
