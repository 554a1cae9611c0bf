"""llama.cpp as a peer, its two packages played by stand-ins in an environment of their own."""

from __future__ import annotations

import json
import os
import stat
import sys

import pytest

from onelaunch.bench.core.weights import random_weights
from onelaunch.bench.engines.generate import cell as generate_cell
from onelaunch.bench.engines.generate.cell import AUTO, Cell, prompt_of
from onelaunch.bench.peers.llama_cpp import NAME, check_python, installed_here, llama_cpp
from onelaunch.config import preset
from onelaunch.errors import BadInput, RunFailed

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the stand-in is a shell script")

CONFIG = preset("stories260k")

# Writes its input as JSON.
GGUF = """
import enum, json
class LlamaFileType(enum.IntEnum):
    ALL_F32 = 0
    MOSTLY_BF16 = 32
class TokenType(enum.IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
class GGMLQuantizationType(enum.Enum):
    BF16 = "BF16"
class quants:
    @staticmethod
    def quantize(array, kind):
        return array
class GGUFWriter:
    def __init__(self, path, arch):
        self.path, self.facts, self.tensors = path, {"arch": arch}, {}
    def add_tensor(self, name, array, raw_dtype=None):
        assert array.dtype == "float32"
        kind = "F32" if raw_dtype is None else raw_dtype.value
        self.tensors[name] = [list(array.shape), kind]
    def __getattr__(self, name):
        if not name.startswith("add_"):
            return lambda: None
        return lambda value: self.facts.update({name[4:]: repr(value)[:400]})
    def close(self):
        with open(self.path, "w") as file:
            json.dump({"facts": self.facts, "tensors": self.tensors}, file)
"""

# "Draws" 200, 201 ... in 10 ms each, and prints on standard output.
XLLAMACPP = """
import json, types
class CommonParams:
    def __init__(self):
        self.model, self.cpuparams, self.cpuparams_batch = [types.SimpleNamespace() for _ in "abc"]
class Server:
    def __init__(self, params):
        print("loading")
        START
        self.params = params
    def handle_completions(self, request):
        print("drawing")
        assert request["temperature"] == 0.0 and request["ignore_eos"]
        assert self.params.cpuparams.n_threads == self.params.cpuparams_batch.n_threads
        n = request["n_predict"]
        ANSWER
        text = "".join(f"t{200 + i}" for i in range(n))
        timings = {"predicted_n": n, "predicted_ms": 10.0 * (n - 1)}
        return {"timings": timings, "choices": [{"text": text}]}
"""


@pytest.fixture
def python(tmp_path):
    """A Python that has the stand-ins."""

    def make(start="pass", answer="pass", packages=("gguf", "xllamacpp")):
        folder = tmp_path / "packages"
        folder.mkdir()
        code = {
            "gguf": GGUF,
            "xllamacpp": XLLAMACPP.replace("START", start).replace("ANSWER", answer),
        }
        for name in packages:
            (folder / f"{name}.py").write_text(code[name])
        path = tmp_path / "python"
        path.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    return make


def running(python, tmp_path, dtype="float32", threads=2):
    return llama_cpp(python, CONFIG, random_weights(CONFIG), dtype, threads, tmp_path)


def test_rate_and_tokens_come_back(python, tmp_path):
    with running(python(), tmp_path) as peer:
        for n in (5, 3):
            assert peer.generate(prompt_of(3), n) == (
                pytest.approx(100.0),
                [200, 201, 202, 203, 204][:n],
            )


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "F32"), ("bfloat16", "BF16")])
def test_the_file_has_every_weight_by_its_name_there(python, tmp_path, dtype, kind):
    with running(python(), tmp_path, dtype, 1):
        written = json.loads((tmp_path / f"{dtype}-1.gguf").read_text())
    facts, tensors = written["facts"], written["tensors"]
    assert len(tensors) == len(random_weights(CONFIG))
    assert tensors["token_embd.weight"] == [[512, 64], kind]
    assert tensors["blk.4.ffn_up.weight"] == [[CONFIG.hidden_dim, 64], kind]
    assert tensors["blk.0.attn_k.weight"] == [[CONFIG.kv_dim, 64], kind]
    assert tensors["blk.0.ffn_norm.weight"] == tensors["output_norm.weight"] == [[64], "F32"]
    assert (facts["head_count_kv"], facts["block_count"]) == ("4", "5")
    assert float(facts["rope_freq_base"]) == CONFIG.rope_theta
    assert ("BF16" in facts["file_type"]) is (dtype == "bfloat16")


@pytest.mark.parametrize(
    ("made", "log"),
    [
        ({"answer": "n -= 1"}, "not 5 tokens"),
        ({"answer": "return {'error': {'message': 'no slot'}}"}, "not 5 tokens.*no slot"),
        ({"answer": "raise ValueError('gone')"}, "ValueError: gone"),
        ({"answer": "import os; print('no memory', flush=True); os._exit(3)"}, "no memory"),
    ],
)
def test_a_sample_of_other_work_is_refused(python, tmp_path, made, log):
    with running(python(**made), tmp_path) as peer, pytest.raises(RunFailed, match=log):
        peer.generate(prompt_of(3), 5)


def test_one_that_does_not_answer_is_ended(python, tmp_path):
    with running(python(answer="import time; time.sleep(600)"), tmp_path) as peer:
        child = peer._child
        with pytest.raises(RunFailed, match=r"longer than 0\.2 s"):
            peer.generate(prompt_of(3), 5, seconds=0.2)
    assert not child.alive


def test_one_that_does_not_start_is_said(python, tmp_path):
    with (
        pytest.raises(RunFailed, match=r"^llama\.cpp: ValueError: bad file$"),
        running(python(start="raise ValueError('bad file')"), tmp_path),
    ):
        pass


def test_pythons_that_cannot_be(python, tmp_path):
    with pytest.raises(BadInput, match="no such file; name the Python"):
        check_python(tmp_path / "absent")
    without = python(packages=("gguf",))
    with pytest.raises(BadInput, match=r"cannot import .*xllamacpp.*; run .* -m pip install"):
        check_python(without)


def test_it_is_found_where_it_is_installed(monkeypatch):
    present = {"xllamacpp", "gguf"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name in present or None)
    assert str(installed_here()) == sys.executable
    present.remove("gguf")
    assert installed_here() is None


def test_it_takes_part_in_a_cell(python, tmp_path, monkeypatch, compiled_program):
    monkeypatch.setattr(generate_cell, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr("onelaunch.bench.engines.generate.reading.PASS_BYTES", 1)
    log = []
    cell = Cell(CONFIG, "bfloat16", [1, AUTO], None, tmp_path, log.append, python())
    samples = cell.rounds(prompt_of(3), 6, 2)
    for number in {1, Cell.number(AUTO)}:
        assert samples[NAME, number] == pytest.approx([100.0, 100.0])
    assert cell.same_tokens[NAME] in range(7)


def test_a_cell_goes_on_without_it(python, tmp_path, monkeypatch, compiled_program):
    monkeypatch.setattr(generate_cell, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr("onelaunch.bench.engines.generate.reading.PASS_BYTES", 1)
    log = []
    broken = python(answer="raise ValueError('gone')")
    cell = Cell(CONFIG, "float32", [1], None, tmp_path, log.append, broken)
    samples = cell.rounds(prompt_of(3), 6, 1)
    assert not [key for key in samples if key[0] == NAME]
    assert log == ["without llama.cpp: ValueError: gone"]
