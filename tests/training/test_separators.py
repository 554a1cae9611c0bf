"""What stands between documents: BOS, else EOS, else nothing, and that a model learns to stop."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from onelaunch import cli
from onelaunch.checkpoints.tokenizers import BytesTokenizer, Llama2cTokenizer, load_tokenizer
from onelaunch.training.manifest import Manifest
from onelaunch.training.prepare import prepare

CASE = Path(__file__).parents[2] / ".." / "shared" / "cases" / "eos-only"
SEPARATOR = "<|endoftext|>\n"
EOS = "<|endoftext|>"


def json_tokenizer(folder: Path, **special: str) -> Path:
    """A tokenizer.json of bytes and one special token; `special` is its tokenizer_config.json."""
    tokenizers = pytest.importorskip("tokenizers")
    folder.mkdir(exist_ok=True)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(alphabet)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([EOS])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder / "tokenizer.json"


def ids_of(out: Path, split: str) -> list[int]:
    return np.fromfile(out / f"{split}.bin", "<u2").tolist()


def documents(folder: Path, *texts: str) -> Path:
    path = folder / "docs.txt"
    path.write_text(SEPARATOR.join(texts))
    return path


def test_documents_end_with_eos_where_there_is_no_bos(tmp_path):
    tokenizer = json_tokenizer(tmp_path / "t", eos_token=EOS)
    texts = ["one\n", "two\n", "three\n" + "x" * 94]
    prepare([documents(tmp_path, *texts)], tmp_path / "out", tokenizer=tokenizer)
    own = load_tokenizer(tokenizer)
    assert (own.bos_id, own.eos_id) == (None, 256)
    train, val = ids_of(tmp_path / "out", "train"), ids_of(tmp_path / "out", "val")
    # the cut is within the last document: its first part has no end, the second has
    expected = [i for text in texts for i in [*own.encode(text), 256]]
    assert train + val == expected
    assert train.count(256) == 2
    assert val[-1] == 256
    manifest = Manifest.read(tmp_path / "out")
    assert (manifest.bos_id, manifest.eos_id) == (None, 256)
    assert load_tokenizer(tmp_path / "out").eos_id == 256


def test_documents_begin_with_bos_where_there_is_one(tmp_path):
    tokenizer = json_tokenizer(tmp_path / "t", bos_token=EOS, eos_token=EOS)
    texts = ["a" * 90 + "\n", "b" * 10]
    prepare([documents(tmp_path, *texts)], tmp_path / "out", tokenizer=tokenizer)
    train, val = ids_of(tmp_path / "out", "train"), ids_of(tmp_path / "out", "val")
    assert (train[0], train.count(256), val[0], val.count(256)) == (256, 1, 256, 1)
    assert Manifest.read(tmp_path / "out").eos_id is None


@pytest.mark.parametrize(
    ("special", "line"),
    [
        ({"bos_token": EOS}, None),
        ({"eos_token": EOS}, "no BOS: .*EOS, id 256"),
        ({}, "neither .*BOS .*EOS.*without a separator"),
    ],
)
def test_the_verb_says_what_separates(tmp_path, capsys, special, line):
    tokenizer = json_tokenizer(tmp_path / "t", **special)
    words = ["prepare", str(documents(tmp_path, "some\n", "text")), "--out", str(tmp_path / "out")]
    assert cli.run([*words, "--tokenizer", str(tokenizer)]) == 0
    lines = [text for text in capsys.readouterr().err.splitlines() if "BOS" in text]
    assert len(lines) == (line is not None)
    assert line is None or re.search(line, lines[0])


def test_the_first_of_several_ends_stays_the_separator_when_a_tokenizer_is_saved(tmp_path):
    tokenizer = json_tokenizer(tmp_path / "t")
    (tmp_path / "t" / "generation_config.json").write_text('{"eos_token_id": [256, 3]}')
    (tmp_path / "copy").mkdir()
    load_tokenizer(tokenizer).save(tmp_path / "copy")
    again = load_tokenizer(tmp_path / "copy")
    assert (again.bos_id, again.eos_id, again.stop_ids) == (None, 256, (3, 256))


def test_llama2c_and_bytes_name_both():
    assert (BytesTokenizer.bos_id, BytesTokenizer.eos_id) == (1, 2)
    assert (Llama2cTokenizer.bos_id, Llama2cTokenizer.eos_id) == (1, 2)


def test_a_model_without_bos_learns_where_a_text_ends(tmp_path, capsys):
    """Trained on one short text over and over, it writes that text and stops, with a prompt and
    without one; nothing is left of the separator in what it writes."""
    tokenizer = json_tokenizer(tmp_path / "t", eos_token=EOS)
    data, run = tmp_path / "data", tmp_path / "run"
    prepare([documents(tmp_path, *["abcd\n"] * 200)], data, tokenizer=tokenizer)
    settings = {
        "model.dim": 32, "model.n_layers": 1, "model.n_heads": 2, "model.hidden_dim": 32,
        "model.max_seq_len": 16, "train.batch_size": 8, "train.updates": 60, "train.threads": 1,
        "train.device": "cpu", "optimizer.lr": 0.02, "optimizer.warmup": 5, "eval.batches": 1,
    }  # fmt: skip
    words = [f"--set={name}={value}" for name, value in settings.items()]
    words += ["--preset", "stories260k", "--set", "model.n_kv_heads=2", "--quiet"]
    assert cli.run(["train", "--data", str(data), "--run", str(run), *words]) == 0
    greedy = ["--temperature", "0", "--max-new-tokens", "12", "--engine", "reference", "--quiet"]
    for prompt, written in ((["--prompt", "ab"], "abcd\n\n"), ([], "abcd\n\n")):
        capsys.readouterr()
        assert cli.run(["generate", str(run), *prompt, *greedy]) == 0
        assert capsys.readouterr().out == written
    assert cli.run(["generate", str(run), *greedy, "--ids"]) == 0
    assert 256 not in map(int, capsys.readouterr().out.split())


@pytest.mark.skipif(not CASE.is_dir(), reason="../shared/cases/eos-only is absent")
def test_the_case_of_three_documents(tmp_path):
    pytest.importorskip("tokenizers")
    shutil.copytree(CASE, tmp_path / "case")
    case = tmp_path / "case"
    prepare([case / "docs.txt"], tmp_path / "out", tokenizer=case / "tokenizer.json")
    train = ids_of(tmp_path / "out", "train")
    text = load_tokenizer(case / "tokenizer.json").decode(train[: train.index(256)])
    assert (text, train.count(256)) == ("one two three\n", 2)
