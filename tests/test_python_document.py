"""The examples of docs/python.md run as they stand, in their order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from onelaunch.checkpoints import random_model
from onelaunch.checkpoints import save as save_checkpoint
from onelaunch.training.story_data import stories_tokenizer

DOCUMENT = Path(__file__).parents[1] / "docs" / "python.md"


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.filterwarnings("ignore:rms_norm")  # on a CPU the plain form runs and says so
def test_the_examples_run(tmp_path, monkeypatch):
    pytest.importorskip("jinja2")  # of chats
    save_checkpoint(random_model("stories260k"), tmp_path / "model.bin", "llama2c")
    stories_tokenizer().save(tmp_path)
    monkeypatch.chdir(tmp_path)
    found = examples()
    assert len(found) == 14
    names: dict[str, object] = {}
    for number, example in enumerate(found, start=1):
        exec(compile(example, f"docs/python.md, example {number}", "exec"), names)
    assert (tmp_path / "model-hf" / "config.json").is_file()
    assert names["trained"].config.dim == 32


def test_readme_names_the_document():
    assert "docs/python.md" in (DOCUMENT.parents[1] / "README.md").read_text(encoding="utf-8")
