import json
import re

import pytest
import typer
from typer.testing import CliRunner

from onelaunch.checkpoints import load, save
from onelaunch.checkpoints.tokenizers import BytesTokenizer
from onelaunch.checkpoints.weights import LoadedModel
from onelaunch.cli.export import export
from onelaunch.cli.inspect import inspect
from onelaunch.config import ModelConfig, YarnRopeScaling
from onelaunch.errors import BadInput, MissingExtra
from onelaunch.model import Model

app = typer.Typer()
app.command()(export)
app.command()(inspect)


def _run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.stderr
    return result


def _weights(config):
    return Model(config).init_weights(0).state_dict()


@pytest.fixture
def bin_file(tmp_path):
    """A byte-level model with its tokenizer beside it, in a folder of its own."""
    folder = tmp_path / "source"
    folder.mkdir()
    config = ModelConfig(
        dim=16, n_layers=2, n_heads=2, hidden_dim=24, vocab_size=259, max_seq_len=8
    )
    save(LoadedModel(config, _weights(config)), folder / "model.bin", "llama2c")
    BytesTokenizer().save(folder)
    return folder / "model.bin"


def test_there_and_back_with_the_tokenizer(bin_file, tmp_path):
    hf = tmp_path / "hf"
    result = _run("export", bin_file, hf, "--format", "hf")
    assert result.stdout == ""
    tokenizer = {"tokenizer.bytes", "tokenizer.json", "tokenizer_config.json"}
    size = sum(f.stat().st_size for f in hf.iterdir() if f.name not in tokenizer)
    assert result.stderr.splitlines() == [
        f"wrote {hf} (hf, {size:,} bytes)",
        f"wrote {hf / 'tokenizer.bytes'}",
        f"wrote {hf / 'tokenizer.json'}, for transformers",
    ]
    assert tokenizer <= {f.name for f in hf.iterdir()}

    out = tmp_path / "again" / "model.bin"
    out.parent.mkdir()
    result = _run("export", hf, out, "--format", "llama2c")
    assert out.read_bytes() == bin_file.read_bytes()
    assert result.stderr.endswith(f"wrote {out.parent / 'model.tokenizer.bytes'}\n")
    assert (out.parent / "model.tokenizer.bytes").read_text() == "bytes"
    assert sorted(f.name for f in out.parent.iterdir()) == ["model.bin", "model.tokenizer.bytes"]


def test_nothing_that_exists_is_overwritten(bin_file, tmp_path):
    before = bin_file.read_bytes()
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    for out in (bin_file, tmp_path / "empty", tmp_path / "dangling"):
        for format in ("llama2c", "hf"):
            with pytest.raises(BadInput, match="exists already"):
                _run("export", bin_file, out, "--format", format)
    assert bin_file.read_bytes() == before
    assert not list((tmp_path / "empty").iterdir())


def test_bad_flags_write_nothing(bin_file, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(BadInput, match="--format onnx: .*llama2c, hf"):
        _run("export", bin_file, out, "--format", "onnx")
    with pytest.raises(BadInput, match="add --random"):
        _run("export", "stories260k", out, "--format", "hf")
    with pytest.raises(BadInput, match="--random is for presets"):
        _run("export", bin_file, out, "--format", "hf", "--random")
    assert not out.exists()
    assert CliRunner().invoke(app, ["export", str(bin_file), str(out)]).exit_code == 2


def test_a_model_that_the_format_cannot_express(tmp_path):
    config = ModelConfig(
        dim=16, n_layers=1, n_heads=2, hidden_dim=8, vocab_size=9, max_seq_len=4, qk_norm=True
    )
    save(LoadedModel(config, _weights(config)), tmp_path / "qwen", "hf")
    with pytest.raises(BadInput, match="qk_norm"):
        _run("export", tmp_path / "qwen", tmp_path / "a.bin", "--format", "llama2c")
    assert not (tmp_path / "a.bin").exists()


def test_without_the_library_of_its_tokenizer(tmp_path, monkeypatch):
    def find(model):
        raise MissingExtra("tokenizers", "hf", "reading tokenizer.json")

    for module in ("export", "tokenizers"):
        monkeypatch.setattr(f"onelaunch.checkpoints.{module}.find_tokenizer", find)
    out = tmp_path / "a.bin"
    result = _run("export", "stories260k", out, "--format", "llama2c", "--random")
    assert out.is_file()
    assert re.search("tokenizer .*left out: .*tokenizer.json needs .*tokenizers", result.stderr)
    result = _run("inspect", out, "--json")
    assert json.loads(result.stdout)["tokenizer"] is None
    assert re.search("tokenizer .*: .*tokenizer.json needs .*tokenizers", result.stderr)


def test_random_preset_and_quiet(tmp_path):
    out = tmp_path / "random.bin"
    result = _run("export", "stories260k", out, "--format", "llama2c", "--random")
    assert f"wrote {out} (llama2c, 1,056,540 bytes)" in result.stderr
    assert "no tokenizer found" in result.stderr
    quiet = tmp_path / "quiet.bin"
    result = _run("export", "stories260k", quiet, "--format", "llama2c", "--random", "--quiet")
    assert (result.stdout, result.stderr) == ("", "")
    assert quiet.read_bytes() == out.read_bytes()


def test_special_ids_that_are_lost_are_told(tmp_path):
    config = ModelConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=8, vocab_size=9, max_seq_len=4)
    model = LoadedModel(config, _weights(config), bos_id=5, stop_ids=(6, 7))
    save(model, tmp_path / "hf", "hf")
    result = _run("export", tmp_path / "hf", tmp_path / "a.bin", "--format", "llama2c")
    assert re.search("BOS 5 .*6", result.stderr)


def test_inspect_json(bin_file):
    facts = json.loads(_run("inspect", bin_file, "--json").stdout)
    model = load(bin_file)
    assert facts["config"] == model.config.to_dict()
    assert ModelConfig.from_dict(facts["config"]) == model.config
    assert facts["parameters"] == model.config.n_params
    assert facts["bytes"] == 4 * facts["parameters"]
    assert (facts["format"], facts["dtype"], facts["model"]) == (
        "llama2c",
        "float32",
        str(bin_file),
    )
    assert facts["tokenizer"]["kind"] == "bytes"
    assert facts["tokenizer"]["vocab_size"] == 259
    assert (facts["bos_id"], facts["stop_ids"]) == (1, [1, 2])


def test_inspect_table(bin_file):
    result = _run("inspect", bin_file)
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in lines)
    assert rows["parameters"] == f"{load(bin_file).config.n_params:,}"
    assert rows["tokenizer"] == "bytes, 259 tokens"
    assert rows["stop ids"] == "1, 2"
    assert rows["rope scaling"] == "none"
    assert rows["rope theta"] == "10000"
    assert rows["norm eps"] == "1e-05"
    assert rows["tied embeddings"] == "yes"
    columns = {line.index(re.split(r"  +", line, maxsplit=1)[1], 10) for line in lines}
    assert len(columns) == 1  # aligned


def test_inspect_shows_what_a_family_sets(bin_file, tmp_path):
    config = ModelConfig(
        dim=16, n_layers=2, n_heads=2, hidden_dim=8, vocab_size=9, max_seq_len=8,
        sliding_window=4, rope_scaling=YarnRopeScaling(4.0, 8),
    )  # fmt: skip
    save(LoadedModel(config, _weights(config)), tmp_path / "hf", "hf")
    lines = _run("inspect", tmp_path / "hf").stdout.splitlines()
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in lines)
    assert rows["sliding window"] == "4"
    assert rows["rope scaling"].startswith("type yarn, factor 4, original max seq len 8, ")
    assert rows["plan"] == "none: only the reference engine (PyTorch) runs this model"
    assert "norm placement" not in rows
    assert "sliding window" not in _run("inspect", bin_file).stdout
    facts = json.loads(_run("inspect", tmp_path / "hf", "--json").stdout)
    assert facts["plan"] is None
    assert ModelConfig.from_dict(facts["config"]) == config
    with pytest.raises(BadInput, match="^fusion_depth='half': .* sliding_window=4"):
        _run("inspect", tmp_path / "hf", "--fusion-depth", "half")


def test_inspect_says_what_a_forward_takes(bin_file):
    lines = _run("inspect", bin_file).stdout.splitlines()
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in lines)
    config = load(bin_file).config
    D, F, V, L = 16, 24, 259, 2
    weights = 4 * (config.n_params + D)
    activations = 4 * (1 + L * (4 * D + 2 * D + F) + D) + 4 * (D + L * (2 * D + 2 * D + F) + V)
    attention = 2 * (4 * 8 + 5)
    norm = 4 * D + 3
    layer = 8 * D * D + 6 * D * F + 2 * norm + 8 * D + 5 * F + attention
    assert rows["1 token"] == (
        f"{weights:,} bytes of weights, {activations:,} of activations, "
        f"{4 * 2 * L * 2 * D:,} of cache, {L * layer + norm + 2 * D * V:,} operations"
    )
    # 64 tokens, where the context holds so many: here 8
    assert rows["8 tokens"].startswith(f"{4 * (config.n_params + 8 * D):,} bytes of weights")
    assert rows["launches"] == "stage: 12, half: 6, 1 layer: 4, 2 layers: 3, all: 1"
    assert list(rows)[-3:] == ["1 token", "8 tokens", "launches"]


def _weight_bytes(line):
    return int(re.search(r"([\d,]+) bytes of weights", line)[1].replace(",", ""))


@pytest.mark.parametrize(
    ("depth", "launched"),
    [
        (
            "half",
            ["embed", *(f"layer {i} {b} block" for i in (0, 1) for b in ("attention", "FFN"))],
        ),
        ("1", ["embed", "layer 0", "layer 1"]),
        ("2", ["embed", "layers 0 to 1"]),
        ("all", []),
    ],
)
def test_inspect_lists_the_launches_of_a_depth(bin_file, depth, launched):
    without = _run("inspect", bin_file).stdout.splitlines()
    lines = _run("inspect", bin_file, "--fusion-depth", depth).stdout.splitlines()
    assert lines[: len(without)] == without
    rows = [re.split(r"  +|, ", line) for line in lines[len(without) :]]
    names = [*launched, "head"] if launched else ["all"]
    assert [row[0] for row in rows] == [f"launch {i}" for i in range(len(names))]
    assert [row[1] for row in rows] == names
    assert sum(int(row[2].split()[0]) for row in rows) == 12
    weights = re.search(r"^1 token +([\d,]+) bytes", "\n".join(lines), re.M)[1]
    listed = sum(
        int(re.search(r"([\d,]+) bytes", line)[1].replace(",", ""))
        for line in lines[len(without) :]
    )
    assert listed == int(weights.replace(",", ""))


def test_inspect_json_has_the_plan(bin_file):
    plan = json.loads(_run("inspect", bin_file, "--json").stdout)["plan"]
    assert plan["launches"] == {"stage": 12, "half": 6, "1": 4, "2": 3, "all": 1}
    assert plan["fusion_depth"] is None
    assert [forward["sequence"] for forward in plan["forwards"]] == [1, 8]
    for forward in plan["forwards"]:
        assert "launches" not in forward
        spans = [(line["kind"], line["layers"]) for line in forward["stages"]]
        assert spans[0] == ("embed", None)
        assert spans[1:3] == [("qkv", [0, 1]), ("attention", [0, 1])]
    deep = json.loads(_run("inspect", bin_file, "--json", "--fusion-depth", "2").stdout)["plan"]
    assert deep["fusion_depth"] == "2"
    assert [launch["name"] for launch in deep["forwards"][1]["launches"]] == [
        "embed",
        "layers 0 to 1",
        "head",
    ]
    assert {**deep, "fusion_depth": None, "forwards": plan["forwards"]} == plan


def test_inspect_counts_in_the_width_of_the_weights(tmp_path):
    config = ModelConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=8, vocab_size=9, max_seq_len=1)
    weights = {name: tensor.bfloat16() for name, tensor in _weights(config).items()}
    save(LoadedModel(config, weights), tmp_path / "narrow", "hf")
    facts = json.loads(_run("inspect", tmp_path / "narrow", "--json").stdout)
    (forward,) = facts["plan"]["forwards"]  # a context of one token has no longer prompt
    assert (forward["weight_itemsize"], forward["activation_itemsize"]) == (2, 2)
    assert forward["totals"]["weight_bytes"] == facts["bytes"] + 2 * 16


def test_inspect_refuses_a_depth_that_the_model_does_not_have(bin_file):
    for depth in ("3", "0", "auto", "Half"):
        for flags in ([], ["--json"]):
            with pytest.raises(BadInput, match=f"fusion_depth='{depth}': .*stage, half, all"):
                _run("inspect", bin_file, "--fusion-depth", depth, *flags)


def test_inspect_random_preset_has_no_tokenizer():
    result = _run("inspect", "stories260k", "--random")
    assert re.search(r"^parameters +260,032$", result.stdout, re.M)
    assert re.search(r"^tokenizer +none$", result.stdout, re.M)


def test_a_llama2c_file_must_be_named_as_one(bin_file, tmp_path):
    with pytest.raises(BadInput, match=r"must end in \.bin"):
        export(str(bin_file), tmp_path / "plain", "llama2c")
    assert not (tmp_path / "plain").exists()


def test_an_export_without_room_for_the_tokenizer_leaves_nothing(bin_file, tmp_path, monkeypatch):

    class Unwritable:
        def save(self, folder, prefix=""):
            (folder / f"{prefix}tokenizer.json").touch()
            raise BadInput(f"{folder}: cannot write: the disk is full")

    monkeypatch.setattr("onelaunch.checkpoints.export.find_tokenizer", lambda model: Unwritable())
    for name, format in (("out", "hf"), ("out.bin", "llama2c")):
        with pytest.raises(BadInput, match="the disk is full"):
            export(str(bin_file), tmp_path / name, format)
        assert not (tmp_path / name).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_inspect_shows_what_was_chosen_for_the_model_on_a_gpu(bin_file, tmp_path, monkeypatch):
    from onelaunch.compilation.cache import Store
    from onelaunch.engines.cuda.blocking import default
    from onelaunch.engines.cuda.tuning.store import Choice, facts_of, keep

    monkeypatch.setenv("ONELAUNCH_CACHE", str(tmp_path / "store"))
    config = load(bin_file).config
    without = _run("inspect", bin_file).stdout
    assert json.loads(_run("inspect", bin_file, "--json").stdout)["choices"] == []
    device = {"device": "NVIDIA H200", "multiprocessors": 132, "torch": "2", "triton": "3"}
    us = {"rule": 48.25, "staged": 41.125, "all": 37.5}
    choice = Choice("all", default(config, 8, 2), 132, us, 31.0, 90, "2026-11-21T10:11:12+00:00")
    for other in (config, config.with_(n_layers=3)):
        keep(Store(), facts_of(other, "bfloat16", 1, 7, device), choice)
    text = _run("inspect", bin_file).stdout
    assert text.startswith(without)
    assert re.split(r"  +", text[len(without) :].strip(), maxsplit=1) == [
        "1x8",
        "all, 37.5 us (rule 48.2, staged 41.1), in bfloat16 on NVIDIA H200, measured 2026-11-21",
    ]
    (shown,) = json.loads(_run("inspect", bin_file, "--json").stdout)["choices"]
    assert (shown["form"], shown["us"], shown["of"]["sequence"]) == ("all", us, 8)
    assert shown["blockings"]["head"]["rows"] == choice.blockings["head"].rows


def test_inspect_says_what_a_training_step_takes(onelaunch):
    shape = "stories15m", "--random", "--training"
    code, out, _ = onelaunch("inspect", *shape, "64x256")
    assert code == 0
    assert "64 x 256 tokens: 1,548,655,847,936 operations, 94,522,451 a token" in out
    assert "24 x weight gradient" in out
    assert "1,021,575,168 bytes for the backward" in out
    assert "870,580,224 bytes are kept then" in out
    code, out, _ = onelaunch("inspect", *shape, "1x8", "--json")
    assert code == 0
    assert json.loads(out)["plan"]["training"]["state_bytes"] == 18 * 15_191_712
    for text, words in (("64", "must be as 64x256"), ("0x8", "1 to 256"), ("1x257", "1 to 256")):
        code, _, err = onelaunch("inspect", *shape, text)
        assert code == 2
        assert f"--training {text}" in err
        assert words in err
