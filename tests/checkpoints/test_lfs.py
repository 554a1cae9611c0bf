"""Every reader names a Git LFS pointer that it finds in place of a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.tokenizer_files import POINTER, llama2c_tokenizer, small_model, write_model

from onelaunch.checkpoints import load
from onelaunch.checkpoints.atomic import read_json
from onelaunch.checkpoints.run_folder import write_checkpoint
from onelaunch.checkpoints.tokenizers import load_tokenizer
from onelaunch.errors import BadInput
from onelaunch.training.data import open_data
from onelaunch.training.prepare import prepare


def pointer_error(path: Path) -> str:
    return rf"{path.name}.*: .*Git LFS pointer.*`git lfs pull`"


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors", "model.bin"]
)
def test_of_a_model(name: str, tmp_path: Path) -> None:
    if name.endswith(".bin"):
        model = path = tmp_path / name
    else:
        model = write_model(tmp_path / "model", 260)
        path = model / name
    path.write_text(POINTER)
    with pytest.raises(BadInput, match=pointer_error(path)):
        load(model)


def test_of_a_shard(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", 260)
    shard = "model-00001-of-00001.safetensors"
    (model / "model.safetensors").unlink()
    (model / shard).write_text(POINTER)
    index = {"weight_map": {"model.norm.weight": shard}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInput, match=pointer_error(model / shard)):
        load(model)


def test_of_a_checkpoint(tmp_path: Path) -> None:
    model = small_model(260)
    state = {"update": 1, "micro": 0, "config": model.config.to_dict()}
    checkpoint = write_checkpoint(tmp_path, state, {"model.safetensors": model.weights})
    assert load(checkpoint).config == model.config
    (checkpoint / "model.safetensors").write_text(POINTER)
    with pytest.raises(BadInput, match=pointer_error(checkpoint / "model.safetensors")):
        load(checkpoint)


@pytest.mark.parametrize("name", ["tokenizer.bin", "tokenizer.json", "tokenizer.model"])
def test_of_a_tokenizer(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(BadInput, match=pointer_error(tmp_path / name)):
        load_tokenizer(tmp_path / name)


def test_of_text_and_tokens(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(POINTER)
    with pytest.raises(BadInput, match=pointer_error(text)):
        prepare([text], tmp_path / "out")
    text.write_text("the cat sat on the mat " * 20)
    prepare([text], tmp_path / "out")
    for name in ("val.bin", "train.bin"):  # train.bin is opened first
        (tmp_path / "out" / name).write_text(POINTER)
        with pytest.raises(BadInput, match=pointer_error(tmp_path / "out" / name)):
            open_data(str(tmp_path / "out"))


def test_a_text_that_only_begins_alike_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"version": "https://git-lfs"}')
    assert read_json(path) == {"version": "https://git-lfs"}
    llama2c_tokenizer().save(tmp_path)
    assert load_tokenizer(tmp_path).kind == "llama2c"


def test_a_byte_order_mark_is_dropped_from_settings(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", 260)
    config = model / "config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    assert load(model).config.vocab_size == 260
