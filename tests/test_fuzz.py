"""Every readable format under mutation, a process each; `make soak` runs more of the same."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import fuzz

FUZZ = Path(__file__).with_name("fuzz.py")


def _run(*command):
    result = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300
    )
    lines = result.stdout.splitlines() or [result.stderr]
    return result, json.loads(lines[-1]) if lines[-1].startswith("{") else {}


SAMPLE = ("llama2c", "hf-config", "checkpoint-state", "tokenizer-json")
"""A format of each kind, of which `make test` reads damaged files; a process takes seconds."""


def sampled(names, sample):
    return [
        pytest.param(name, marks=() if name in sample else pytest.mark.extended) for name in names
    ]


@pytest.mark.parametrize("name", sampled(fuzz.FORMATS, SAMPLE))
def test_damaged_files_raise_only_our_own_error(name):
    for prefix, package in (("coreml-", "coremltools"), ("gguf", "gguf"), ("gguf", "tokenizers")):
        if name.startswith(prefix) and find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    result, told = _run(FUZZ, "--format", name, "--examples", 200, "--seed", 0)
    assert result.returncode == 0, result.stdout + result.stderr
    # Both sides of the reader's judgement were exercised; a damaged best.json is passed over.
    assert told["accepted"] > 0
    assert told["accepted"] < told["read"] or name == "run-best"
    assert told["read"] >= 200


# Readers that must be caught. They stand in for llama2c's; the rest of the harness is as it is.
_BAD_READERS = {
    "foreign exception": ("raise KeyError('vocab')", "KeyError"),
    "not even an Exception": ("raise BaseException('panic')", "panic"),
    "memory": ("use.hoard = use.hoard or bytearray(b'x') * (300 << 20)", "memory grow"),
    "absurd allocation": ("bytearray(1 << 40)", "MemoryError"),
}


@pytest.mark.parametrize("reader", sampled(_BAD_READERS, ("foreign exception",)))
def test_the_harness_catches(reader):
    body, said = _BAD_READERS[reader]
    code = f"""
import sys, dataclasses
sys.path.insert(0, {str(FUZZ.parent)!r})
import fuzz
row = fuzz.FORMATS["llama2c"]
def use(path):
    if len(path.read_bytes()) != use.size:
        {body}
use.size, use.hoard = 0, None
def make(folder):
    path = row.make(folder)
    use.size = len(path.read_bytes())
    return path
fuzz.FORMATS["llama2c"] = dataclasses.replace(row, make=make, use=use)
sys.exit(fuzz.main(["--format", "llama2c", "--examples", "40"]))
"""
    result, told = _run("-c", code)
    assert result.returncode == 1, result.stdout + result.stderr
    assert said in told["failure"]
    kept = Path(told["kept"])
    assert kept.is_file()
    kept.unlink()


@pytest.mark.extended
def test_more_than_one_batch_reads_the_examples_asked_for():
    asked = fuzz._BATCH + 30
    told = _run(FUZZ, "--format", "llama2c", "--examples", asked)[1]
    assert told["failure"] is None
    assert asked <= told["read"] <= asked + 30
