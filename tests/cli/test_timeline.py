"""`--trace FILE`, as far as it goes without a GPU: what would be run, and what is written."""

import json

import pytest
import torch

from onelaunch import cli
from onelaunch.checkpoints import random_model
from onelaunch.cli.timeline import write_timeline
from onelaunch.engines.cuda import trace as traces
from onelaunch.errors import BadInput
from tests.engines.cuda.test_timeline import played

CPU = torch.device("cpu")


@pytest.fixture
def loaded():
    return random_model("stories260k")


@pytest.fixture
def asked(monkeypatch):
    """What a forward was asked for; its timeline is one of another model."""
    found = []

    def trace(config, weights, tokens, dtype, device, depth):
        found.append((tokens, dtype, depth))
        return played("half", 7)

    monkeypatch.setattr(traces, "trace", trace)
    return found


def test_prompts_are_one_batch(loaded, asked, tmp_path):
    path = tmp_path / "trace.json"
    told = write_timeline(path, loaded, [[1, 5, 7], [1]], CPU, None, "half")
    assert told.splitlines()[0] == f"{path}: forward of 2x3 tokens, launches: 6"
    ((tokens, dtype, depth),) = asked
    assert (tokens.tolist(), dtype, depth) == ([[1, 5, 7], [1, 0, 0]], torch.float32, "half")
    events = json.loads(path.read_text())["traceEvents"]
    assert events[0]["args"]["name"] == "forward of 2x3 tokens, launches: 6"


def test_without_a_prompt_a_context_is_read(loaded, asked, tmp_path):
    write_timeline(tmp_path / "trace.json", loaded, [], CPU, "float16", "auto")
    ((tokens, dtype, depth),) = asked
    assert tokens.shape == (1, loaded.config.max_seq_len)
    assert tokens.min() >= 0
    assert tokens.max() < loaded.config.vocab_size
    assert (dtype, depth) == (torch.float16, "all")


def test_what_cannot_be_traced_or_written_is_refused(loaded, asked, tmp_path):
    with pytest.raises(BadInput, match="cannot write"):
        write_timeline(tmp_path / "none" / "trace.json", loaded, [], CPU, None, "auto")
    with pytest.raises(BadInput, match="context"):
        write_timeline(tmp_path / "trace.json", loaded, [[1] * 9999], CPU, None, "auto")


def test_without_a_gpu_nothing_is_loaded(capsys, tmp_path):
    path = tmp_path / "trace.json"
    assert cli.run(["generate", "no such model", "--device", "cpu", "--trace", str(path)]) == 2
    assert "--trace: device cpu: " in capsys.readouterr().err
    assert not path.exists()
