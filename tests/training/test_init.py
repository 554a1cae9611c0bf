"""`train.init`: training that starts from a model's weights, with its shape and tokenizer."""

import shutil

import pytest
import torch

import onelaunch
from onelaunch import cli
from onelaunch.checkpoints import random_model, run_folder
from onelaunch.checkpoints import save as save_checkpoint
from onelaunch.checkpoints.run_folder import list_checkpoints
from onelaunch.checkpoints.tokenizers import find_tokenizer
from onelaunch.checkpoints.weights import LoadedModel
from onelaunch.config import ModelConfig
from onelaunch.errors import BadInput
from onelaunch.model import Model
from onelaunch.training import run as runs
from onelaunch.training.data import open_data
from onelaunch.training.loop import Trainer
from onelaunch.training.recipe import Recipe
from onelaunch.training.story_data import stories_tokenizer
from tests.kills import SETTINGS, outcome
from tests.metrics import read_metrics
from tests.training.token_folders import make_folder

SHAPE = ModelConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, vocab_size=512, max_seq_len=32,
    tied_embeddings=False,
)  # fmt: skip
FORMATS = {"llama2c": "model.bin", "hf": "model-hf"}
TRAINING = {key: value for key, value in SETTINGS.items() if not key.startswith("model.")}


def recipe(init, **changed) -> Recipe:
    settings = TRAINING | {"train.updates": 3, "eval.every": 2, "checkpoint.every": 0}
    settings |= {"train.init": str(init), "train.dropout": 0.0}
    settings |= {key.replace("__", "."): value for key, value in changed.items()}
    return Recipe().with_settings(settings, "test")


def losses(run):
    return [r["loss"] for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "update"]


def write_model(folder, format="llama2c", config=SHAPE):
    """A model of random weights with the stories' tokenizer in a folder of its own; its path."""
    folder.mkdir(exist_ok=True)
    model = LoadedModel(config, dict(Model(config).init_weights(3).state_dict()))
    out = folder / FORMATS[format]
    save_checkpoint(model, out, format)
    stories_tokenizer().save(out if out.is_dir() else folder)
    return out


@pytest.mark.parametrize("format", FORMATS)
def test_the_first_loss_is_that_of_the_models_own_weights(tmp_path, format):
    path = write_model(tmp_path / "model", format)
    r = recipe(path, train__updates=1, train__accum=1)
    runs.start(r, tmp_path / "run", quiet=True)
    tokens, targets = open_data("stories", 1337).train(32, 1337).next(4)
    model = onelaunch.load(path, engine="reference", device="cpu", dtype="float32")
    logits = model.logits(torch.from_numpy(tokens))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten())
    assert losses(tmp_path / "run") == pytest.approx([loss.item()], rel=1e-5)
    trained = run_folder.read(tmp_path / "run")
    assert trained.config == onelaunch.load(path).config
    assert find_tokenizer(trained).fingerprint == stories_tokenizer().fingerprint


def test_a_run_folder_is_started_from_at_its_best_checkpoint(tmp_path):
    first = recipe(write_model(tmp_path / "model"), train__updates=6, optimizer__warmup=1)
    runs.start(first, tmp_path / "first", quiet=True)
    runs.start(recipe(tmp_path / "first", checkpoint__keep=9), tmp_path / "second", quiet=True)
    start = run_folder.read(list_checkpoints(tmp_path / "second")[0])
    best = run_folder.read(tmp_path / "first")
    assert list_checkpoints(tmp_path / "second")[0].name == "update-00000000"
    assert all(torch.equal(start.weights[name], best.weights[name]) for name in best.weights)


def test_a_run_keeps_the_chat_template_of_the_model_it_starts_from(tmp_path):
    template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    path = write_model(tmp_path / "model", "hf")
    (path / "chat_template.jinja").write_text(template)
    runs.start(recipe(path, train__updates=1, train__accum=1), tmp_path / "run", quiet=True)
    assert run_folder.read(tmp_path / "run").chat_template == template
    assert run_folder.read(list_checkpoints(tmp_path / "run")[0]).chat_template == template
    (tmp_path / "run" / "chat_template.jinja").unlink()
    assert run_folder.read(tmp_path / "run").chat_template is None


def test_a_resume_needs_the_file_no_more(tmp_path, monkeypatch):
    """Killed before its first own checkpoint, with dropout and inside an update."""

    class Killed(BaseException):
        pass

    path = write_model(tmp_path / "model")
    r = recipe(path, train__dropout=0.1)
    runs.start(r, tmp_path / "whole", quiet=True)
    micro_step, count = Trainer._micro_step, iter(range(100))

    def killed(self):
        if next(count) == 4:
            raise Killed
        micro_step(self)

    monkeypatch.setattr(Trainer, "_micro_step", killed)
    with pytest.raises(Killed):
        runs.start(r, tmp_path / "cut", quiet=True)
    monkeypatch.undo()
    shutil.rmtree(path.parent)
    runs.resume(tmp_path / "cut", {}, quiet=True)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    again = {"train.updates": 4, "train.init": str(path)}
    assert runs.resume(tmp_path / "cut", again, quiet=True).progress.update == 4
    with pytest.raises(BadInput, match="init='other': .* has weights already"):
        runs.resume(tmp_path / "cut", {"train.init": "other"}, quiet=True)


def test_a_model_section_must_be_equal(tmp_path):
    path = write_model(tmp_path / "model")
    same = {f"model__{key}": getattr(SHAPE, key) for key in ("dim", "n_heads", "max_seq_len")}
    runs.start(recipe(path, train__updates=1, **same), tmp_path / "run", quiet=True)
    for changed, words in (
        ({"model__dim": 64, "model__head_dim": 8}, "dim 64, not 32"),
        ({"model__vocab_size": 600}, "vocab_size 600, not 512"),
        ({"model__preset": "stories260k"}, "dim 64, not 32; n_layers 5, not 2"),
        ({"model__norm_eps": 1e-6}, "norm_eps 1e-06, not 1e-05"),
    ):
        with pytest.raises(BadInput, match=rf"init='.*model\.bin': .*\({words}.*leave out"):
            runs.start(recipe(path, **changed), tmp_path / "other", quiet=True)
    assert not (tmp_path / "other").exists()


def test_a_preset_of_the_same_shape_is_equal(tmp_path):
    save_checkpoint(random_model("stories260k"), tmp_path / "model.bin", "llama2c")
    stories_tokenizer().save(tmp_path)
    r = recipe(tmp_path / "model.bin", model__preset="stories260k", train__seq_len=16)
    assert r.model_config(512, random_model("stories260k").config).dim == 64
    runs.start(r, tmp_path / "run", quiet=True)


def test_data_of_another_tokenizer_is_refused_and_leaves_nothing(tmp_path):
    path = write_model(tmp_path / "model")
    data = make_folder(tmp_path / "data")
    with pytest.raises(BadInput, match=r"data='.*data': its tokenizer is not that of .*model\.bin"):
        runs.start(recipe(path, data__path=str(data)), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_ids_beyond_the_models_vocabulary_are_refused(tmp_path):
    """Without a tokenizer by the model, in the training split alone."""
    config = SHAPE.with_(vocab_size=250)
    path = write_model(tmp_path / "model", config=config)
    (path.parent / "tokenizer.bin").unlink()
    data = make_folder(tmp_path / "data", n_train=300)
    assert [open_data(str(data)).largest_id(split) for split in ("train", "val")] == [258, 32]
    with pytest.raises(BadInput, match="outside the model's vocabulary of 250"):
        runs.start(recipe(path, data__path=str(data)), tmp_path / "run", quiet=True)


def test_weights_in_other_dtypes_are_trained_in_float32(tmp_path):
    path = write_model(tmp_path / "model", "hf")
    from safetensors.torch import load_file, save_file

    file = next(path.glob("*.safetensors"))
    halves = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(halves, file, {"format": "pt"})
    runs.start(recipe(path, checkpoint__keep=9), tmp_path / "run", quiet=True)
    start = run_folder.read(list_checkpoints(tmp_path / "run")[0]).weights
    assert {tensor.dtype for tensor in start.values()} == {torch.float32}
    assert torch.equal(start["norm.weight"], halves["model.norm.weight"].float())
    name = "layers.1.mlp.up_proj.weight"
    assert torch.equal(start[name], halves[f"model.{name}"].float())


def test_the_option_and_the_keyword(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    path = write_model(tmp_path / "model").relative_to(tmp_path)
    words = [f"--set={key}={value}" for key, value in TRAINING.items() if key != "data.path"]
    words += ["--set=train.updates=1", "--set=train.dropout=0.0"]
    assert cli.run(["train", "--init", str(path), *words]) == 0
    said = capfd.readouterr().err
    assert f"from {tmp_path / path}" in said
    (by_option,) = (tmp_path / "runs").iterdir()
    assert by_option.name.startswith("model-")
    settings = TRAINING | {"train.updates": 1, "train.dropout": 0.0}
    by_keyword = onelaunch.train(init=path, settings=settings, run="run")
    assert outcome(by_keyword) == outcome(by_option)
    assert Recipe.load(str(by_keyword / "recipe.toml")).train.init == str(tmp_path / path)
    with pytest.raises(BadInput, match="init='': is empty"):
        onelaunch.train(init="")
    assert cli.run(["train", "--init", ""]) == 2
    assert "--init: is empty" in capfd.readouterr().err
    assert cli.run(["train", "--init", "stories15m"]) == 2
    assert "a preset has no weights" in capfd.readouterr().err
    assert cli.run(["train", "quickstart", "--init", str(path)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"onelaunch: --init {path}: [model] differs")
