"""The tokenizer of a model's folder is loaded, or named with the reason why it is unusable."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.tokenizer_files import (
    POINTER,
    json_tokenizer,
    llama2c_tokenizer,
    token,
    write_json_tokenizer,
)

from onelaunch.checkpoints import atomic, tokenizer_json, tokenizer_llama2c, tokenizers
from onelaunch.checkpoints.tokenizers import (
    BytesTokenizer,
    Tokenizer,
    find_tokenizer,
    load_tokenizer,
)
from onelaunch.checkpoints.weights import LoadedModel
from onelaunch.config import ModelConfig
from onelaunch.errors import BadInput, MissingExtra


def tokenizer_of(source: Path, rows: int) -> Tokenizer | None:
    return find_tokenizer(LoadedModel(ModelConfig(8, 1, 2, 16, rows, 16), {}, source=source))


def _nested(path: Path) -> None:
    deep = "[" * 200_000 + "]" * 200_000
    path.write_text(json.dumps(json_tokenizer(decoder="deep")).replace('"deep"', deep))


def _nested_in_rust(path: Path) -> None:
    """Not too deep for Python, but for the library."""
    deep = "[" * 200 + "]" * 200
    path.write_text(json.dumps(json_tokenizer(decoder="deep")).replace('"deep"', deep))


def _cut_off(path: Path) -> None:
    path.write_text(json.dumps(json_tokenizer())[:2000])


FAULTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "cut off": ("tokenizer.json", _cut_off, "truncated"),
    "nested": ("tokenizer.json", _nested, "nested too deep"),
    "nested for Rust": ("tokenizer.json", _nested_in_rust, "recursion limit"),
    "another JSON": ("tokenizer.json", lambda p: p.write_text('{"a": 1}'), "no model"),
    "no model of ours": (
        "tokenizer.json",
        lambda p: p.write_text(json.dumps(json_tokenizer(model={"type": "Magic"}))),
        "not a usable tokenizer.json",
    ),
    "pointer in JSON": ("tokenizer.json", lambda p: p.write_text(POINTER), "Git LFS pointer"),
    "binary": ("tokenizer.json", lambda p: p.write_bytes(b"\x80\x02}q\x00."), "not valid JSON"),
    "folder": ("tokenizer.json", Path.mkdir, "not a file"),
    "dangling link": ("tokenizer.json", lambda p: p.symlink_to("absent"), "broken link"),
    "loop of links": ("tokenizer.json", lambda p: p.symlink_to(p.name), "tokenizer.json: "),
    "damaged .bin": ("tokenizer.bin", lambda p: p.write_bytes(b"\x07\0\0\0\0"), "ends within"),
    "pointer in .bin": ("tokenizer.bin", lambda p: p.write_text(POINTER), "Git LFS pointer"),
    "sized .bin": ("tok512.bin", lambda p: p.write_bytes(b"damaged"), "not a llama2.c tokenizer"),
    "tiktoken": ("tokenizer.model", lambda p: p.write_text("IQ== 0\nIg== 1\n"), "tiktoken"),
    "pointer in .model": ("tokenizer.model", lambda p: p.write_text(POINTER), "Git LFS pointer"),
    "slow": ("vocab.json", lambda p: p.write_text("{}"), "unsupported"),
    "pieces": ("spiece.model", lambda p: p.write_bytes(b"\n"), "unsupported"),
}


class TestFaults:
    @pytest.mark.parametrize("fault", FAULTS)
    def test_the_file_and_the_reason_are_named(self, fault: str, tmp_path: Path) -> None:
        pytest.importorskip("tokenizers")
        name, spoil, reason = FAULTS[fault]
        spoil(tmp_path / name)
        with pytest.raises(BadInput) as caught:
            tokenizer_of(tmp_path, 257)
        message = str(caught.value)
        assert str(tmp_path / name) in message
        assert reason in message
        assert "\n" not in message
        assert len(message) < 500

    @pytest.mark.parametrize("fault", [f for f in FAULTS if FAULTS[f][0].startswith("tokenizer.")])
    def test_so_they_are_where_the_file_is_named(self, fault: str, tmp_path: Path) -> None:
        pytest.importorskip("tokenizers")
        name, spoil, reason = FAULTS[fault]
        spoil(tmp_path / name)
        for spec in (tmp_path, tmp_path / name):
            with pytest.raises(BadInput, match="tokenizer") as caught:
                load_tokenizer(spec)
            if spec.is_dir() and not (tmp_path / name).is_dir():
                assert reason in str(caught.value)

    def test_a_file_without_permission(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        llama2c_tokenizer().save(tmp_path)

        def refuse(*_: object) -> None:
            raise PermissionError(13, "Permission denied")

        # the mode of a file does not bind root, who runs tests in containers
        monkeypatch.setattr(atomic, "open", refuse, raising=False)
        with pytest.raises(BadInput, match=r"tokenizer\.bin: cannot read: Permission denied"):
            tokenizer_of(tmp_path, 259)

    @pytest.mark.parametrize("kind", ["json", "llama2c"])
    def test_a_file_beyond_the_limit(
        self, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module = tokenizer_json if kind == "json" else tokenizer_llama2c
        monkeypatch.setattr(module, "MAX_FILE_BYTES", 100)
        if kind == "json":
            pytest.importorskip("tokenizers")
            path = write_json_tokenizer(tmp_path)
        else:
            path = llama2c_tokenizer().save(tmp_path)
        with pytest.raises(BadInput, match="larger than 100 bytes") as caught:
            tokenizer_of(tmp_path, 259)
        assert str(path) in str(caught.value)

    def test_lists_beyond_the_limit_are_not_parsed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tokenizer_json, "_MAX_BRACKETS", 100)
        path = tmp_path / "tokenizer.json"
        path.write_text("[" + "[]," * 100 + "[]]")
        with pytest.raises(BadInput, match="more than 100 lists"):
            load_tokenizer(path)

    def test_damaged_settings_are_named(self, tmp_path: Path) -> None:
        pytest.importorskip("tokenizers")
        write_json_tokenizer(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text("{")
        with pytest.raises(BadInput, match=r"tokenizer_config\.json: not valid JSON"):
            tokenizer_of(tmp_path, 257)

    def test_settings_that_are_not_there_are_named(self, tmp_path: Path) -> None:
        pytest.importorskip("tokenizers")
        write_json_tokenizer(tmp_path)
        (tmp_path / "tokenizer_config.json").symlink_to("absent")
        with pytest.raises(BadInput, match=r"tokenizer_config\.json: cannot read"):
            tokenizer_of(tmp_path, 257)

    def test_each_of_several_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.bin").write_bytes(b"damaged")
        (tmp_path / "tokenizer.json").write_text("{")
        with pytest.raises(BadInput) as caught:
            tokenizer_of(tmp_path, 257)
        assert "tokenizer.bin: " in str(caught.value)
        assert "tokenizer.json: " in str(caught.value)

    def test_one_that_can_be_used_is_taken(self, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.json").write_text("{")
        llama2c_tokenizer("a").save(tmp_path)
        for rows in (260, 300):
            tokenizer = tokenizer_of(tmp_path, rows)
            assert tokenizer is not None
            assert tokenizer.vocab_size == 260
        assert load_tokenizer(tmp_path).kind == "llama2c"

    def test_without_the_library(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_json_tokenizer(tmp_path)
        monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
        with pytest.raises(MissingExtra, match="needs the package tokenizers") as caught:
            tokenizer_of(tmp_path, 257)
        assert str(path) in str(caught.value)

    def test_nothing_there_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "token-model.bin").write_bytes(b"another model")
        (tmp_path / "notes.json").write_text("{}")
        assert tokenizer_of(tmp_path, 257) is None
        assert tokenizer_of(tmp_path / "model.bin", 257) is None
        # a vocabulary of some other project in the same folder is no business of a file's
        (tmp_path / "vocab.txt").write_text("a")
        assert tokenizer_of(tmp_path / "model.bin", 257) is None

    def test_a_model_whose_name_begins_as_a_tokenizers(self, tmp_path: Path) -> None:
        (tmp_path / "tok1.bin").write_bytes(b"the model itself")
        assert tokenizer_of(tmp_path / "tok1.bin", 257) is None


class TestSizes:
    """Which of several is taken, and that a model may have more rows or fewer than its ids."""

    def test_the_same_size_first(self, tmp_path: Path) -> None:
        pytest.importorskip("tokenizers")
        source = tmp_path / "model.bin"
        llama2c_tokenizer("a").save(tmp_path)
        write_json_tokenizer(tmp_path)
        for rows, kind in ((260, "llama2c"), (257, "json"), (300, "llama2c"), (256, "llama2c")):
            tokenizer = tokenizer_of(source, rows)
            assert tokenizer is not None
            assert tokenizer.kind == kind, rows
        # fewer ids before more
        tokenizer = tokenizer_of(source, 258)
        assert tokenizer is not None
        assert tokenizer.kind == "json"

    @pytest.mark.parametrize("kind", ["llama2c", "bytes", "json", "sentencepiece"])
    def test_padded_whatever_the_format(self, kind: str, tmp_path: Path) -> None:
        if kind == "llama2c":
            llama2c_tokenizer("a", " ").save(tmp_path)
        elif kind == "bytes":
            BytesTokenizer().save(tmp_path)
        elif kind == "json":
            pytest.importorskip("tokenizers")
            write_json_tokenizer(tmp_path)
        else:
            (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
        tokenizer = tokenizer_of(tmp_path, 320)
        assert tokenizer is not None
        ids = tokenizer.encode("a", bos=False)
        assert tokenizer.decode([*ids, 319]) == "a"
        stream = tokenizer.decoder()
        assert "".join(map(stream.push, [*ids, 319])) + stream.finish() == "a"

    def test_a_sized_one_must_fit(self, tmp_path: Path) -> None:
        (tmp_path / "tok260.bin").write_bytes(llama2c_tokenizer("a").to_bytes())
        with pytest.raises(BadInput, match=r"tok260\.bin: .*260 .*320"):
            tokenizer_of(tmp_path / "model.bin", 320)


class TestOwnName:
    def test_a_files_own_tokenizer_comes_first(self, tmp_path: Path) -> None:
        BytesTokenizer().save(tmp_path)
        llama2c_tokenizer("a").save(tmp_path, "one.")
        llama2c_tokenizer("b", "c").save(tmp_path, "two.")
        for name, pieces in (("one", 260), ("two", 261), ("three", 259)):
            tokenizer = tokenizer_of(tmp_path / f"{name}.bin", 259)
            assert tokenizer is not None
            assert tokenizer.vocab_size == pieces

    def test_a_damaged_one_is_not_replaced_by_another_models(self, tmp_path: Path) -> None:
        BytesTokenizer().save(tmp_path)
        (tmp_path / "one.tokenizer.bin").write_bytes(b"damaged")
        with pytest.raises(BadInput, match=r"one\.tokenizer\.bin"):
            tokenizer_of(tmp_path / "one.bin", 259)

    def test_its_settings_have_its_name_too(self, tmp_path: Path) -> None:
        pytest.importorskip("tokenizers")
        data = json_tokenizer(added_tokens=[token(256, "<end>")])
        settings = {"eos_token": "<end>"}
        path = write_json_tokenizer(tmp_path / "a", data, tokenizer_config=settings)
        load_tokenizer(path).save(tmp_path, "one.")
        (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
        (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<end>"}')
        assert sorted(p.name for p in tmp_path.glob("one.*")) == [
            "one.generation_config.json",
            "one.tokenizer.json",
            "one.tokenizer_config.json",
        ]
        tokenizer = tokenizer_of(tmp_path / "one.bin", 257)
        assert tokenizer is not None
        assert (tokenizer.bos_id, tokenizer.stop_ids) == (None, (256,))


def sentencepiece_model(**settings: object) -> bytes:
    import io

    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    options = {
        "model_type": "bpe",
        "vocab_size": 290,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "a dog and a little cat"] * 4),
        model_writer=model,
        **(options | settings),
    )
    return model.getvalue()


class TestSentencepiece:
    def test_is_read_as_llama2cs(self, tmp_path: Path) -> None:
        path = tmp_path / "tokenizer.model"
        path.write_bytes(sentencepiece_model())
        tokenizer = load_tokenizer(path)
        assert tokenizer.kind == "llama2c"
        assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
        assert tokenizer.save(tmp_path).name == "tokenizer.bin"

    @pytest.mark.parametrize(
        "settings",
        [
            {"normalization_rule_name": "nmt_nfkc"},
            {"remove_extra_whitespaces": True},
            {"add_dummy_prefix": False},
            {"user_defined_symbols": ["<end>"]},
        ],
    )
    def test_one_that_does_more_is_refused(
        self, settings: dict[str, object], tmp_path: Path
    ) -> None:
        path = tmp_path / "tokenizer.model"
        path.write_bytes(sentencepiece_model(**settings))
        with pytest.raises(BadInput, match=r"tokenizer\.model: "):
            load_tokenizer(path)

    def test_a_damaged_one_prints_nothing(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "tokenizer.model"
        path.write_bytes(sentencepiece_model()[:-100])
        with pytest.raises(BadInput, match=r"tokenizer\.model: "):
            load_tokenizer(path)
        assert capfd.readouterr() == ("", "")
        assert os.path.exists(path)


def test_every_name_that_is_looked_for_can_be_loaded() -> None:
    suffixes = {Path(name).suffix for name in tokenizers.FILE_NAMES}
    assert suffixes == {".bin", ".bytes", ".json", ".model"}
