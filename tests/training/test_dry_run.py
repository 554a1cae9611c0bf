"""`onelaunch train --plan`: what a run would be, while nothing is trained or written."""

import json

import pytest
import torch

from onelaunch import cli
from onelaunch.checkpoints import random_model
from onelaunch.checkpoints import save as save_checkpoint
from onelaunch.config import PRESETS
from onelaunch.training import dry_run, memory
from onelaunch.training.flops import flops_per_token
from onelaunch.training.recipe import Recipe
from onelaunch.training.run import dry_run as plan
from onelaunch.training.story_data import stories_tokenizer
from tests.kills import SETTINGS
from tests.training.token_folders import make_folder


def recipe(**changed) -> Recipe:
    settings = SETTINGS | {key.replace("__", "."): value for key, value in changed.items()}
    return Recipe().with_settings(settings, "test")


def words_of(settings) -> list[str]:
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def test_figures_are_those_of_the_run():
    r = recipe(train__updates=60, train__accum=3, optimizer__name="muon", optimizer__lr=2e-3)
    facts = plan(r)
    config = r.model_config(512)
    assert facts["parameters"] == config.n_params
    assert facts["tokens"] == 60 * 3 * 4 * 32
    assert facts["tokens_per_update"] == 3 * 4 * 32
    assert facts["flops"] == facts["tokens"] * flops_per_token(config, 32)
    assert (facts["optimizer"], facts["schedule"], facts["peak_lr"]) == ("muon", "cosine", 2e-3)
    assert (facts["engine"], facts["device"], facts["dtype"]) == ("reference", "cpu", "float32")
    assert facts["data_tokens"] is facts["epochs"] is facts["init"] is facts["misfit"] is None
    sizes = facts["memory"]
    matrices = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    assert sizes["weight_bytes"] == sizes["gradient_bytes"] == 4 * config.n_params
    assert sizes["optimizer_bytes"] == 4 * (2 * config.n_params - matrices)
    assert sizes["total_bytes"] == memory.estimate(r, config, 32, False).total
    assert 0 < facts["seconds_per_update"] < 60
    assert facts["seconds"] == pytest.approx(60 * facts["seconds_per_update"])
    assert facts["measured_sequences"] == 4


def test_epochs_are_those_of_prepared_data(tmp_path):
    data = make_folder(tmp_path / "data", n_train=400, n_val=100)
    facts = plan(recipe(data__path=str(data), train__updates=5, train__accum=1))
    assert facts["data_tokens"] == 400
    assert facts["epochs"] == pytest.approx(5 * 4 * 32 / 400)


def test_the_option_writes_nothing_and_shows_all(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    words = ["train", "--plan", "--preset", "stories260k", *words_of({"train.batch_size": 2})]
    words += words_of({"train.updates": 7, "train.seq_len": 16, "train.engine": "reference"})
    assert cli.run([*words, "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["tokens"] == 7 * 2 * 16
    assert cli.run(words) == 0
    said = capfd.readouterr()
    assert said.err == ""
    for text in ("0.26 million", "random, seed 1337", "7, each 1 micro-step of 2 x 16", "adamw"):
        assert text in said.out
    for text in ("reference on cpu in float32", "optimizer 2.08 MB", " free", "about "):
        assert text in said.out
    assert list(tmp_path.iterdir()) == []


def test_a_model_to_start_from_is_named(tmp_path, capfd):
    save_checkpoint(random_model("stories260k"), tmp_path / "model.bin", "llama2c")
    stories_tokenizer().save(tmp_path)
    words = ["train", "--plan", "--init", str(tmp_path / "model.bin")]
    assert cli.run([*words, *words_of({"train.batch_size": 1})]) == 0
    assert f"weights    {tmp_path / 'model.bin'}\n" in capfd.readouterr().out


def test_what_compiles_first_is_not_measured(monkeypatch, capfd):
    monkeypatch.setattr("onelaunch.training.run.measure_update", None)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    words = ["train", "--plan", "--preset", "stories260k", *words_of({"train.seq_len": 16})]
    assert cli.run([*words, *words_of({"train.compile": "true"})]) == 0
    assert "not measured" in capfd.readouterr().out
    pytest.importorskip("coremltools")
    assert cli.run([*words, "--engine", "coreml"]) == 0
    said = capfd.readouterr().out
    assert "not measured" in said
    assert "engine     coreml on cpu" in said


def test_what_cannot_fit_is_said_beside_the_figures(monkeypatch, capfd):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10_000_000)
    monkeypatch.setattr("onelaunch.training.run.measure_update", None)  # nothing is measured then
    words = ["train", "--plan", *words_of({"train.batch_size": 100})]
    assert cli.run(words) == 0
    shown = capfd.readouterr().out
    assert "of 10 MB free" in shown
    assert "set train.batch_size to" in shown
    assert cli.run([*words, "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert "batch_size" in facts["misfit"]
    assert facts["seconds"] is None
    assert cli.run(["train", *words[2:]]) == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--json"], "--json: is for --plan"),
        (["--plan", "--resume"], "leave out --resume"),
        (["--plan", "--set", "train.acum=3"], "did you mean train.accum?"),
        (["--plan", "--accum", "1001"], "--accum: train.accum = 1001"),
        (["--plan", "--data", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capfd, words, expected):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["train", *words]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert expected in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sizes", "seconds"),
    [
        ([(8, 0.5)], 2.0),  # in proportion
        ([(32, 0.5)], 0.5),
        ([(4, 0.3), (8, 0.5)], 1.7),  # 0.1 s, and 0.05 s a sequence
        ([(2, 9.9), (4, 0.3), (8, 0.5)], 1.7),
        ([(4, 0.5), (8, 0.4)], 0.4),  # noise: not below what was measured
    ],
)
def test_a_batch_is_extrapolated(sizes, seconds):
    assert dry_run.extrapolate(sizes, 32) == pytest.approx(seconds)


class Paced:
    """An engine and optimizer on a clock of their own: seconds of a micro-step by sequences."""

    config = PRESETS["stories15m"]

    def __init__(self, monkeypatch, fixed, each):
        self.now, self.fixed, self.each, self.sizes = 0.0, fixed, each, []
        monkeypatch.setattr(dry_run.time, "perf_counter", lambda: self.now)

    def parameters(self):
        return {"norm.weight": torch.zeros(3)}

    def train_step(self, tokens_BS, targets_BS, scale):
        assert tokens_BS.shape == targets_BS.shape == (len(tokens_BS), 256)
        assert torch.equal(tokens_BS[:, 1:], targets_BS[:, :-1])
        self.sizes.append(len(tokens_BS))
        self.now += self.fixed + self.each * len(tokens_BS)

    def step(self):
        self.now += 0.01


@pytest.mark.parametrize(
    ("fixed", "each", "sizes", "most_seconds"),
    [
        (0.1, 0.001, [1, 1, 2, 2, 4, 4, 8, 8, 16, 16, 32, 32], 2.0),
        (0.0, 0.1, [1, 1, 2, 2, 4, 4], 2.0),
        (5.0, 1.0, [1], 6.1),  # the first is never cut off
    ],
)
def test_measuring_ends_in_time_whatever_the_speed(monkeypatch, fixed, each, sizes, most_seconds):
    paced = Paced(monkeypatch, fixed, each)
    got = dry_run.measure_update(paced, paced, recipe(train__batch_size=32, train__accum=2), 256)
    assert paced.sizes == sizes
    assert paced.now <= most_seconds
    assert got["sequences"] == sizes[-1]
    if len(sizes) > 1:
        assert got["update"] == pytest.approx(2 * (fixed + 32 * each) + 0.01)
