"""The text that is drawn at each evaluation: the model's own, and without effect on training."""

import os
import signal

import pytest
import torch

import onelaunch
from onelaunch.config import ModelConfig
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.errors import BadInput
from onelaunch.model import Model
from onelaunch.training import run as runs
from onelaunch.training.display import Display
from onelaunch.training.loop import Trainer
from onelaunch.training.metrics import drop_after
from onelaunch.training.recipe import Recipe
from onelaunch.training.samples import draw_sample, encode_prompt
from onelaunch.training.story_data import stories_tokenizer
from tests.kills import SETTINGS, outcome
from tests.metrics import read_metrics
from tests.training.test_display import HEADER

CONFIG = ModelConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=512, max_seq_len=32)


def recipe(**changed) -> Recipe:
    settings = SETTINGS | {"train.updates": 6, "eval.every": 2, "checkpoint.every": 2}
    settings |= {"checkpoint.keep": 9, "eval.sample_tokens": 12}
    settings |= {key.replace("__", "."): value for key, value in changed.items()}
    return Recipe().with_settings(settings, "test")


def samples(run):
    return [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "sample"]


@pytest.fixture
def engine():
    weights = dict(Model(CONFIG).init_weights(0).state_dict())
    return ReferenceEngine(CONFIG, weights, device="cpu", train=True, dropout=0.5)


@pytest.mark.parametrize("prompt", ["", "Once there was"])
def test_it_is_what_the_saved_weights_generate(tmp_path, prompt):
    runs.start(recipe(eval__prompt=prompt), tmp_path / "run", quiet=True)
    records = samples(tmp_path / "run")
    assert [record["update"] for record in records] == [2, 4, 6]
    for record in records:
        path = tmp_path / f"run/checkpoints/update-{record['update']:08d}"
        model = onelaunch.load(path, engine="reference", device="cpu")
        text = model.generate(prompt, max_new_tokens=12, temperature=0.8, top_p=1.0, seed=0)
        assert record["text"] == text
        assert record["prompt"] == prompt
        assert 0 < record["tokens"] <= 12
    assert len({record["text"] for record in records}) > 1


def test_training_is_the_same_to_the_bit_with_and_without(tmp_path):
    runs.start(recipe(), tmp_path / "with", quiet=True)
    runs.start(recipe(eval__sample_tokens=0), tmp_path / "without", quiet=True)
    assert outcome(tmp_path / "with") == outcome(tmp_path / "without")
    assert len(samples(tmp_path / "with")) == 3
    assert samples(tmp_path / "without") == []


def test_random_numbers_and_weights_are_left_alone(engine):
    before, state = engine.model.norm.weight.clone(), torch.get_rng_state()
    tokenizer = stories_tokenizer()
    first = draw_sample(engine, tokenizer, [1], 8)
    torch.manual_seed(5)
    assert draw_sample(engine, tokenizer, [1], 8) == first
    torch.set_rng_state(state)
    assert torch.equal(before, engine.model.norm.weight)
    assert all(p.grad is None for p in engine.parameters().values())


@pytest.mark.parametrize(("n_prompt", "n", "most"), [(1, 100, 32), (32, 5, 1), (4, 5, 5)])
def test_it_ends_with_the_context(engine, monkeypatch, n_prompt, n, most):
    """The last token is not read back, so that it needs no position."""
    tokenizer = stories_tokenizer()
    monkeypatch.setattr(type(tokenizer), "stop_ids", ())
    prompt = list(range(10, 10 + n_prompt))
    _, drawn = draw_sample(engine, tokenizer, prompt, n)
    assert drawn == most


def test_it_ends_before_a_stop_id(engine, monkeypatch):
    tokenizer, tokens = stories_tokenizer(), []
    session = type(engine.session())
    step = session.step

    def noted(self):
        events = step(self)
        tokens.extend(event.token for event in events if event.token is not None)
        return events

    monkeypatch.setattr(session, "step", noted)
    monkeypatch.setattr(type(tokenizer), "stop_ids", ())
    draw_sample(engine, tokenizer, [1], 8)
    assert tokens[3] not in tokens[:3]
    monkeypatch.setattr(type(tokenizer), "stop_ids", (tokens[3],))
    assert draw_sample(engine, tokenizer, [1], 8) == (tokenizer.decode([1, *tokens[:3]]), 3)


def test_a_prompt_that_cannot_be_continued_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(BadInput, match=r"eval.prompt has \d+ tokens.* context of 32"):
        runs.start(recipe(eval__prompt="a cat " * 30), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(BadInput, match=r"eval.prompt: .* outside the model's vocabulary of 5"):
        encode_prompt("a cat", stories_tokenizer(), CONFIG.with_(vocab_size=5))


def test_without_a_first_token_there_is_no_text(tmp_path, monkeypatch):
    class Bare:
        bos_id = eos_id = None

    assert encode_prompt("", Bare(), CONFIG) == []
    monkeypatch.setattr("onelaunch.training.loop.encode_prompt", lambda *args: [])
    runs.start(recipe(), tmp_path / "run", quiet=True)
    assert samples(tmp_path / "run") == []


def test_a_stop_while_it_is_drawn_leaves_it_out_and_resumes_exactly(tmp_path, monkeypatch):
    runs.start(recipe(), tmp_path / "whole", quiet=True)
    sample = Trainer._sample

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGTERM)
        sample(self)

    monkeypatch.setattr(Trainer, "_sample", interrupted)
    stopped = runs.start(recipe(), tmp_path / "cut", quiet=True)
    assert (stopped.signal, stopped.progress.evaluated) == (signal.SIGTERM, 2)
    monkeypatch.undo()
    runs.resume(tmp_path / "cut", {}, quiet=True)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    assert samples(tmp_path / "cut") == samples(tmp_path / "whole")[1:]


def test_a_resume_that_repeats_an_evaluation_repeats_its_text(tmp_path):
    runs.start(recipe(), tmp_path / "run", quiet=True)
    path = tmp_path / "run" / "metrics.jsonl"
    drop_after(path, 5, 4)
    assert [record["update"] for record in samples(tmp_path / "run")] == [2, 4]


def test_the_display_shows_one_line_without_control_characters():
    read, write = os.pipe()
    display = Display(HEADER, (0, 0), write)
    text = " upon\n\na \x1b[2Jtime\t\x07"
    display.push({"kind": "sample", "update": 2, "prompt": "Once", "text": text, "tokens": 9})
    display.close()
    os.close(write)
    shown = os.read(read, 65536).decode()
    os.close(read)
    assert "sample: Once upon a ?[2Jtime ?\n" in shown
