"""The chat template of a model: where it is read from, and that it travels with the model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.tokenizer_files import json_tokenizer, small_model, write_json_tokenizer

from onelaunch.checkpoints import load, save
from onelaunch.checkpoints.chat_template_files import read_chat_template
from onelaunch.checkpoints.export import check_out, export
from onelaunch.errors import BadInput

LIMIT = 1 << 18
SOURCE = "{% for m in messages %}{{ m['content'] }}\u00e9\n{% endfor %}"


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(
        content if isinstance(content, str) else json.dumps(content), encoding="utf-8"
    )


def test_the_first_file_with_a_template_counts(tmp_path):
    assert read_chat_template(tmp_path) == (None, ())
    write(tmp_path, "chat_template.json", {"chat_template": "third"})
    assert read_chat_template(tmp_path) == ("third", ())
    write(tmp_path, "tokenizer_config.json", {"bos_token": "<s>"})
    assert read_chat_template(tmp_path) == ("third", ())
    write(tmp_path, "tokenizer_config.json", {"chat_template": "second"})
    assert read_chat_template(tmp_path) == ("second", ())
    write(tmp_path, "chat_template.jinja", SOURCE)
    assert read_chat_template(tmp_path) == (SOURCE, ())
    assert read_chat_template(tmp_path, "other.") == (None, ())


@pytest.mark.parametrize(
    ("value", "template"),
    [
        ([{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}], "b"),
        ([{"name": "tool_use", "template": "a"}], None),
        ([{"name": "default"}, 3, "x", {"template": "c"}], None),
        ([], None),
        (None, None),
        (7, None),
        ({"default": "a"}, None),
    ],
    ids=repr,
)
def test_of_several_templates_the_one_named_default_counts(tmp_path, value, template):
    write(tmp_path, "tokenizer_config.json", {"chat_template": value})
    assert read_chat_template(tmp_path) == (template, ())


def test_a_template_that_cannot_be_used_leaves_the_model(tmp_path):
    small = small_model(257)
    folder = tmp_path / "model"
    save(small, folder, "hf")
    for name, raw, reason in (
        ("chat_template.jinja", b"x" * (LIMIT + 1), "larger"),
        ("chat_template.jinja", b"caf\xe9", "not UTF-8"),
        ("tokenizer_config.json", b"{", "not valid JSON"),
        ("tokenizer_config.json", b'{"chat_template": "%s"}' % (b"x" * (LIMIT + 1)), "larger"),
        ("tokenizer_config.json", b'{"chat_template": "\\ud800"}', "not UTF-8"),
    ):
        (folder / name).write_bytes(raw)
        model = load(folder)
        assert model.chat_template is None
        (notice,) = model.notices
        assert name in notice
        assert reason in notice
        (folder / name).unlink()
    (folder / "chat_template.jinja").write_bytes(b"x" * LIMIT)
    assert len(load(folder).chat_template or "") == LIMIT
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").symlink_to("absent")
    assert "cannot read" in load(folder).notices[0]


@pytest.mark.parametrize(
    ("format", "name", "file"),
    [
        ("hf", "out", "out/chat_template.jinja"),
        ("llama2c", "out.bin", "out.chat_template.jinja"),
    ],
)
def test_the_template_goes_with_an_exported_model(tmp_path, format, name, file):
    pytest.importorskip("tokenizers")
    folder = tmp_path / "model"
    save(replace(small_model(257), chat_template=SOURCE), folder, "hf")
    write_json_tokenizer(folder, json_tokenizer())
    model = load(folder)
    assert model.chat_template == SOURCE
    export(model, tmp_path / name, format)
    assert (tmp_path / file).read_text(encoding="utf-8") == SOURCE
    assert load(tmp_path / name).chat_template == SOURCE


def test_a_file_that_would_be_taken_for_the_template_is_in_the_way(tmp_path):
    (tmp_path / "out.chat_template.jinja").write_text("another model's")
    with pytest.raises(BadInput, match=r"out\.chat_template\.jinja: exists already"):
        check_out(tmp_path / "out.bin", "llama2c")


def test_a_model_without_a_template_is_written_without_one(tmp_path):
    save(small_model(257), tmp_path / "model", "hf")
    assert not (tmp_path / "model" / "chat_template.jinja").exists()
    assert load(tmp_path / "model").chat_template is None
