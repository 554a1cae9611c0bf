"""Special tokens that tokenizer_config.json alone names count as if tokenizer.json had them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.tokenizer_files import END, byte_names, json_tokenizer, token, write_json_tokenizer

from onelaunch.checkpoints.tokenizers import JsonTokenizer

pytest.importorskip("tokenizers")


def entry(content: str, special: bool = True, **flags: bool) -> dict[str, Any]:
    return {"content": content, "special": special, **flags}


def loaded(tmp_path: Path, data: dict[str, Any] | None = None, **settings: Any) -> JsonTokenizer:
    files = {"tokenizer_config": settings} if settings else {}
    return JsonTokenizer(write_json_tokenizer(tmp_path, data, **files))


BARE = json_tokenizer(added_tokens=[])


def with_pieces(*names: str) -> dict[str, Any]:
    """Ordinary pieces after the bytes: 256, 257 and so on."""
    vocab = {name: i for i, name in enumerate([*byte_names(), *names])}
    return json_tokenizer(added_tokens=[], model={**BARE["model"], "vocab": vocab})


def test_added_tokens_decoder(tmp_path: Path) -> None:
    tokens = {"256": entry("<s>"), "257": entry("</s>"), "258": entry("<tool>", special=False)}
    tokenizer = loaded(
        tmp_path,
        BARE,
        added_tokens_decoder=tokens,
        bos_token="<s>",
        eos_token={"content": "</s>", "lstrip": False},
    )
    assert (tokenizer.bos_id, tokenizer.stop_ids) == (256, (256, 257))
    assert tokenizer.vocab_size == 259
    assert tokenizer.encode("a<s>b</s><tool>") == [64, 256, 65, 257, 258]
    assert tokenizer.decode([64, 256, 65, 257, 258]) == "ab<tool>"
    assert [tokenizer.piece(i) for i in (64, 256, 258)] == ["a", "<s>", "<tool>"]


def test_they_are_found_in_the_vocabulary_too(tmp_path: Path) -> None:
    data = with_pieces("<s>", "</s>")
    plain = loaded(tmp_path / "a", data)
    assert plain.stop_ids == ()
    assert 256 not in plain.encode("<s>")
    tokenizer = loaded(tmp_path / "b", data, bos_token={"content": "<s>"}, eos_token="</s>")
    assert (tokenizer.bos_id, tokenizer.stop_ids) == (256, (256, 257))
    assert tokenizer.encode("a<s>b") == [64, 256, 65]
    assert tokenizer.decode([64, 256, 65, 257]) == "ab"
    stream = tokenizer.decoder()
    assert [stream.push(i) for i in (64, 256, 65, 257)] == ["a", "", "b", ""]


def test_a_token_that_was_not_special_becomes_so(tmp_path: Path) -> None:
    data = json_tokenizer(added_tokens=[token(256, "<x>", special=False)])
    assert loaded(tmp_path / "a", data).decode([256]) == "<x>"
    settings = {"added_tokens_decoder": {"256": entry("<x>")}}
    assert loaded(tmp_path / "b", data, **settings).decode([64, 256]) == "a"


def test_a_number_beyond_the_next_is_known_by_number(tmp_path: Path) -> None:
    # the library would give it 256
    tokenizer = loaded(
        tmp_path, BARE, added_tokens_decoder={"300": entry("<end>")}, eos_token="<end>"
    )
    assert (tokenizer.bos_id, tokenizer.stop_ids, tokenizer.vocab_size) == (None, (300,), 301)
    assert 300 not in tokenizer.encode("<end>")
    assert tokenizer.decode([64, 300]) == "a"
    assert tokenizer.piece(300) == "<end>"


@pytest.mark.parametrize(
    "settings",
    [
        {"added_tokens_decoder": {"0": entry("<s>")}, "bos_token": "<s>"},  # 0 is "!"
        {"added_tokens_decoder": {"5": entry(END)}, "bos_token": None},  # END is 256
        {"added_tokens_decoder": {"-1": entry("<s>"), "x": entry("y"), "9" * 5000: entry("z")}},
        {"added_tokens_decoder": {"257": "x", "258": None, "259": entry(""), "260": {}}},
        {"added_tokens_decoder": [entry("<s>")], "bos_token": 5, "eos_token": ["<s>"]},
        {"added_tokens_decoder": {"257": entry("x" * 5000)}, "eos_token": "nowhere"},
        {"bos_token": "", "eos_token": {"content": 3}},
    ],
)
def test_settings_that_contradict_the_file_change_nothing(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    plain = loaded(tmp_path / "a")
    tokenizer = loaded(tmp_path / "b", **settings)
    assert (tokenizer.bos_id, tokenizer.stop_ids) == (None, ())
    assert tokenizer.vocab_size in (257, 258)
    for text in ("a<s>", f"!{END}"):
        assert tokenizer.encode(text) == plain.encode(text)
        assert tokenizer.decode(plain.encode(text)) == plain.decode(plain.encode(text))


def test_many_are_added_quickly_and_in_order(tmp_path: Path) -> None:
    table = {str(256 + i): entry(f"<t{i}>", special=i % 2 == 0) for i in range(3000)}
    tokenizer = loaded(tmp_path, BARE, added_tokens_decoder=table)
    assert tokenizer.encode("<t0><t2999>a<t1500>") == [256, 3255, 64, 1756]
    assert tokenizer.decode([256, 257, 258]) == "<t1>"


def test_transformers_agrees(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokens = {"256": entry("<s>"), "257": entry("</s>"), "258": entry("<tool>", special=False)}
    tokenizer = loaded(
        tmp_path,
        BARE,
        tokenizer_class="PreTrainedTokenizerFast",
        added_tokens_decoder=tokens,
        bos_token="<s>",
        eos_token="</s>",
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (256, 257)
    for text in ("a<s>b</s> <tool> c", "plain"):
        assert theirs(text)["input_ids"] == tokenizer.encode(text)


def test_they_are_kept_by_save(tmp_path: Path) -> None:
    tokenizer = loaded(
        tmp_path / "a", BARE, added_tokens_decoder={"256": entry("<end>")}, eos_token="<end>"
    )
    again = JsonTokenizer(tokenizer.save(tmp_path / "a" / ".."))
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode("x<end>") == tokenizer.encode("x<end>") == [87, 256]
    assert again.stop_ids == (256,)
