"""Two tokenizers are the same when they do the same, whatever their files look like."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from tests.tokenizer_files import END, json_tokenizer, llama2c_tokenizer, token

from onelaunch.checkpoints.tokenizer_compare import same_tokenizer
from onelaunch.checkpoints.tokenizer_export import save_for_transformers
from onelaunch.checkpoints.tokenizers import (
    BytesTokenizer,
    JsonTokenizer,
    Llama2cTokenizer,
    Tokenizer,
    load_tokenizer,
    train_llama2c,
)

CORPUS = ["the cat sat on the mat", "a dog and a little cat, 12 of them", "caf\u00e9 \u4f60\u597d"]


def written(folder: Path, text: str) -> JsonTokenizer:
    pytest.importorskip("tokenizers")
    folder.mkdir()
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    return JsonTokenizer(folder / "tokenizer.json")


def merged(merges: list[Any]) -> dict[str, Any]:
    data = json_tokenizer()
    data["model"]["vocab"] |= {"th": 257, "the": 258}
    data["model"]["merges"] = merges
    return data


def test_white_space_order_and_escapes_do_not_count(tmp_path: Path) -> None:
    data = merged([["t", "h"], ["th", "e"]])
    one = written(tmp_path / "a", json.dumps(data))
    turned = dict(reversed(data.items())) | {"model": dict(reversed(data["model"].items()))}
    padding = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    layouts = [
        json.dumps(data, indent=2, ensure_ascii=False),
        json.dumps(data, sort_keys=True),
        json.dumps(turned),
        "\ufeff" + json.dumps(data),
        json.dumps(data | {"padding": padding}),
        json.dumps(merged(["t h", "th e"])),
    ]
    for i, layout in enumerate(layouts):
        other = written(tmp_path / f"b{i}", layout)
        assert other.fingerprint == one.fingerprint, layout[:40]
        assert same_tokenizer(one, other)
        assert other.encode("the thing") == one.encode("the thing")
    assert len({one.file_fingerprint, other.file_fingerprint}) == 2
    digest = hashlib.sha256((tmp_path / "a" / "tokenizer.json").read_bytes())
    assert one.file_fingerprint == digest.hexdigest()


@pytest.mark.parametrize(
    "changed",
    [
        merged([["t", "h"]]),
        merged([["t", "h"], ["th", "e"]]) | {"normalizer": {"type": "Lowercase"}},
        json_tokenizer(added_tokens=[token(256, END), token(259, "<new>", special=False)]),
        json_tokenizer(
            model={**json_tokenizer()["model"], "vocab": {"a": 0, "b": 1, "<unk>": 2}},
        ),
    ],
)
def test_what_they_do_counts(changed: dict[str, Any], tmp_path: Path) -> None:
    one = written(tmp_path / "a", json.dumps(merged([["t", "h"], ["th", "e"]])))
    other = written(tmp_path / "b", json.dumps(changed))
    assert other.fingerprint != one.fingerprint
    assert not same_tokenizer(one, other)
    assert not same_tokenizer(other, one)


def test_tokens_of_the_settings_count(tmp_path: Path) -> None:
    text = json.dumps(json_tokenizer(added_tokens=[]))
    one = written(tmp_path / "a", text)
    written(tmp_path / "b", text)
    settings = {"added_tokens_decoder": {"256": {"content": END, "special": True}}}
    (tmp_path / "b" / "tokenizer_config.json").write_text(json.dumps(settings))
    other = JsonTokenizer(tmp_path / "b" / "tokenizer.json")
    assert other.fingerprint != one.fingerprint
    # as the file that has the token itself
    whole = written(tmp_path / "c", json.dumps(json_tokenizer()))
    assert same_tokenizer(whole, other)


@pytest.fixture(scope="module", params=["trained", "bytes", "made"])
def ours(request: pytest.FixtureRequest) -> Llama2cTokenizer | BytesTokenizer:
    if request.param == "bytes":
        return BytesTokenizer()
    if request.param == "made":
        return llama2c_tokenizer(" the", " th", "th", "e", "t", "h", " t", " ")
    pytest.importorskip("sentencepiece")
    return train_llama2c(CORPUS, 330)


def test_a_tokenizer_bin_and_the_tokenizer_json_made_of_it(
    ours: Llama2cTokenizer | BytesTokenizer, tmp_path: Path
) -> None:
    pytest.importorskip("tokenizers")
    save_for_transformers(ours, tmp_path)
    theirs = load_tokenizer(tmp_path / "tokenizer.json")
    assert same_tokenizer(ours, theirs)
    assert same_tokenizer(theirs, ours)
    others: list[Tokenizer] = [llama2c_tokenizer("a", " a"), llama2c_tokenizer(" ", "t")]
    for other in others:
        assert not same_tokenizer(other, theirs)
        assert not same_tokenizer(other, ours)


def test_what_is_not_used_of_a_tokenizer_bin_does_not_count() -> None:
    tokenizer = llama2c_tokenizer("the", "th", "t", "h", "e", " ")
    data = tokenizer.to_bytes()
    longer = Llama2cTokenizer.from_bytes(struct.pack("<I", 99) + data[4:])
    assert longer.fingerprint != tokenizer.fingerprint
    assert same_tokenizer(longer, tokenizer)


def test_a_sentencepiece_model_and_what_is_made_of_it(tmp_path: Path) -> None:
    import io

    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    one = load_tokenizer(tmp_path / "tokenizer.model")
    assert same_tokenizer(one, load_tokenizer(one.save(tmp_path)))
