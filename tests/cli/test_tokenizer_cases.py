"""The inputs that went wrong for users, where they lie beside the repository."""

import json
from pathlib import Path

import pytest

from onelaunch import checkpoints

CASES = Path(__file__).parents[2] / ".." / "shared" / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="shared/cases is not at hand")
SHORT = ("--engine", "reference", "--temperature", "0", "--max-new-tokens", "4")


def test_tokenizer_cut_off(tmp_path, onelaunch):
    pytest.importorskip("tokenizers")
    model = CASES / "tokenizer-cut-off"
    code, out, err = onelaunch("generate", model, "--prompt", "a")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{model / 'tokenizer.json'}: truncated" in err
    code, _, err = onelaunch("export", model, tmp_path / "out", "--format", "hf")
    assert code == 0
    assert f"left out: {model / 'tokenizer.json'}: truncated" in err
    assert checkpoints.load(tmp_path / "out").config.vocab_size == 257


def test_tokenizer_original_and_rewritten(tmp_path, onelaunch):
    pytest.importorskip("tokenizers")
    original = CASES / "tokenizer-original" / "tokenizer.json"
    made = ("prepare", CASES / "text.txt", "--tokenizer", original, "--out", tmp_path / "t")
    assert onelaunch(*made)[0] == 0
    code, out, err = onelaunch("eval", CASES / "tokenizer-rewritten", "--data", tmp_path / "t")
    assert code == 0, err
    assert "validation loss" in out


@pytest.mark.parametrize("named", [False, True])
def test_padded_vocabulary(named, onelaunch):
    model = CASES / "padded-vocabulary"
    spec = ("--tokenizer", model / "tokenizer.bin") if named else ()
    code, out, err = onelaunch("generate", model, "--prompt", "a", *spec, *SHORT)
    assert code == 0, err
    assert out.startswith("a")
    facts = json.loads(onelaunch("inspect", model, "--json")[1])
    assert facts["tokenizer"]["kind"] == "llama2c"
    assert facts["tokenizer"]["vocab_size"] < facts["config"]["vocab_size"]


def test_lfs_pointer(onelaunch):
    path = CASES / "lfs-pointer"
    code, out, err = onelaunch("inspect", path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{path / 'model.safetensors'}: a Git LFS pointer" in err
    assert "git lfs pull" in err
