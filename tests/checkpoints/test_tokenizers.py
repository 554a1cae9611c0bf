"""Tokenizers against sentencepiece, against a slow twin, and against the tokenizers library."""

from __future__ import annotations

import hashlib
import io
import json
import random
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from onelaunch.checkpoints import tokenizer_json, tokenizer_llama2c
from onelaunch.checkpoints.tokenizer_export import save_for_transformers
from onelaunch.checkpoints.tokenizer_llama2c import FIRST_PIECE
from onelaunch.checkpoints.tokenizers import (
    BytesTokenizer,
    JsonTokenizer,
    Llama2cTokenizer,
    check_ids,
    find_tokenizer,
    from_sentencepiece,
    load_tokenizer,
    size_note,
    train_llama2c,
)
from onelaunch.checkpoints.weights import LoadedModel
from onelaunch.config import ModelConfig
from onelaunch.errors import BadInput, MissingExtra

SHARED = Path(__file__).parents[3] / "shared" / "weights"
needs_shared = pytest.mark.skipif(
    not (SHARED / "tok512.bin").exists(), reason="stories260K's tokenizer is not at hand"
)

CORPUS = [
    "Once upon a time there was a little girl named Lily. She had 12 cats and 345 dogs.",
    "The cat sat on the mat;  the dog ran   away.\nThen\tcame the rain, and the cat was wet.",
    "    indented code = [1, 2, 3]    \n\n  caf\u00e9 na\u00efve",
    "\U0001f600 \U0001f600 \u4f60\u597d\u00a0\u00e9",
    "a little cat and a little dog and a little bird: all of them little!",
]
ALPHABET = [*"abcdehlnoprst", *["a", " ", "  ", "\n", "\t", "1", "2", "."] * 2, "\x00", "Q"]
ALPHABET += ["\u00e9", "\u00ef", "\U0001f600", "\U0001f680", "\u4f60", "\u597d", "\u00a0", "the "]


def random_texts(n: int, seed: int, longest: int = 40) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(ALPHABET, k=rng.randrange(longest))) for _ in range(n)]


def slow_encode(tokenizer: Llama2cTokenizer, text: str) -> list[int]:
    """The definition: join the best neighbours of the whole text, leftmost first, until none."""
    ids = {}
    for i in range(FIRST_PIECE, tokenizer.vocab_size):
        ids.setdefault(tokenizer.pieces[i], i)
    out = []
    for character in (" " + text) if text else "":
        raw = character.encode()
        out += [ids[raw]] if raw in ids else [byte + 3 for byte in raw]
    while True:
        best = None
        for i in range(len(out) - 1):
            if out[i] < FIRST_PIECE or out[i + 1] < FIRST_PIECE:
                continue
            merged = ids.get(tokenizer.pieces[out[i]] + tokenizer.pieces[out[i + 1]])
            if merged is not None and (best is None or tokenizer.scores[merged] > best[0]):
                best = (tokenizer.scores[merged], i, merged)
        if best is None:
            return [1, *out]
        out[best[1] : best[1] + 2] = [best[2]]


def made(extra: list[bytes], scores: list[float] | None = None) -> Llama2cTokenizer:
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % i for i in range(256)), *extra]
    scores = [0.0] * FIRST_PIECE + (scores or [-float(i) for i in range(len(extra))])
    return Llama2cTokenizer(pieces, scores)


@pytest.fixture(scope="module")
def trained() -> Llama2cTokenizer:
    pytest.importorskip("sentencepiece")
    return train_llama2c(CORPUS, 340)


class TestLlama2c:
    def test_encode_equals_the_slow_twin(self, trained: Llama2cTokenizer) -> None:
        for text in [*CORPUS, *random_texts(400, seed=1)]:
            assert trained.encode(text) == slow_encode(trained, text), repr(text)

    def test_encode_equals_the_slow_twin_where_a_piece_crosses_words(self) -> None:
        # "a b" holds a space behind a letter: the text may not be cut there.
        tokenizer = made(
            [b"a b", b" a", b"a ", b"  ", b"a", b"b", b" ", b"aa"], [5, 1, 2, 3, 0, 0, 0, 1]
        )
        rng = random.Random(2)
        texts = ["".join(rng.choices("ab  ", k=rng.randrange(30))) for _ in range(300)]
        for text in texts:
            assert tokenizer.encode(text) == slow_encode(tokenizer, text), repr(text)
        assert any(FIRST_PIECE in tokenizer.encode(text) for text in texts)

    def test_ties_go_to_the_leftmost(self) -> None:
        tokenizer = made([b"a", b" ", b"aa", b" a"], [0, 0, 7, 7])
        a, aa, space_a = FIRST_PIECE, FIRST_PIECE + 2, FIRST_PIECE + 3
        assert tokenizer.encode("aaaa", bos=False) == [space_a, aa, a]

    def test_of_equal_pieces_the_first_id_is_used(self) -> None:
        assert made([b"x", b"x", b" "]).encode("x", bos=False) == [261, 259]

    def test_no_piece_without_its_characters(self) -> None:
        # Joining starts from single characters; "\xc3" is half of one and never starts anything.
        tokenizer = made([b"\xc3", b"\xc3\xa9x", b"x"], [0, 9, 0])
        assert tokenizer.encode("\u00e9x", bos=False) == [3 + 0x20, 3 + 0xC3, 3 + 0xA9, 261]

    def test_control_and_byte_pieces_are_not_made_from_text(self) -> None:
        tokenizer = made([bytes([c]) for c in b"<0x41>s\nunk "] + [b"<0x4", b"<un", b"k>", b"<s>"])
        ids = tokenizer.encode("<0x41><unk>\n<s>\n", bos=False)
        assert min(ids) >= FIRST_PIECE
        assert tokenizer.decode(ids) == "<0x41><unk>\n<s>\n"

    def test_equals_sentencepiece(self) -> None:
        sentencepiece = pytest.importorskip("sentencepiece")
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([line for text in CORPUS for line in text.split("\n") if line]),
            model_writer=model,
            model_type="bpe",
            vocab_size=350,
            character_coverage=1.0,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            minloglevel=2,
        )
        processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        tokenizer = from_sentencepiece(model.getvalue())
        assert tokenizer.vocab_size == 350
        for text in [*CORPUS, *random_texts(400, seed=3)]:
            ids = tokenizer.encode(text)
            assert ids == [1, *processor.encode(text)], repr(text)
            assert tokenizer.decode(ids) == processor.decode(ids), repr(text)

    def test_decode_gives_the_text_back(self, trained: Llama2cTokenizer) -> None:
        for text in [*CORPUS, *random_texts(200, seed=4), " ", "  two", "\u2581", "\x00"]:
            assert trained.decode(trained.encode(text)) == text
            assert trained.decode(trained.encode(text, bos=False)) == text

    def test_stream_gives_whole_characters(self, trained: Llama2cTokenizer) -> None:
        for text in [*CORPUS, *random_texts(100, seed=5)]:
            stream = trained.decoder()
            parts = [stream.push(i) for i in trained.encode(text)]
            assert "\ufffd" not in "".join(parts)
            assert "".join(parts) + stream.finish() == text

    def test_stream_ends_within_a_character(self) -> None:
        stream = made([]).decoder()
        assert [stream.push(3 + byte) for byte in "\U0001f600".encode()[:3]] == ["", "", ""]
        assert stream.finish() == "\ufffd"

    def test_a_leading_space_goes_only_at_the_start_and_after_bos(self) -> None:
        tokenizer = made([b" a", b" "])
        assert tokenizer.decode([259, 259]) == "a a"
        assert tokenizer.decode([1, 259, 259, 1, 259, 2]) == "a aa"
        assert tokenizer.decode([260, 260]) == " "
        assert tokenizer.decode([3 + 0x20]) == " "  # a byte is not the added space

    def test_empty_text(self, trained: Llama2cTokenizer) -> None:
        assert trained.encode("") == [1]
        assert trained.encode("", bos=False) == []
        assert trained.decode([]) == ""

    @pytest.mark.parametrize("token", [-1, 259, 1 << 40])
    def test_ids_beyond_the_vocabulary_are_silent(self, token: int) -> None:
        # a model's vocabulary may be padded
        assert made([]).decode([3 + 0x61, token, 3 + 0x62]) == "ab"

    def test_bytes_from_a_terminal_and_broken_surrogates(self) -> None:
        assert made([]).encode("\udcff", bos=False) == [3 + 0x20, 3 + 0xFF]
        with pytest.raises(BadInput, match="not valid Unicode"):
            made([]).encode("\ud83d")

    def test_cache_full(self, trained: Llama2cTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tokenizer_llama2c, "_CACHE_ENTRIES", 2)
        assert trained.encode(CORPUS[0]) == slow_encode(trained, CORPUS[0])

    def test_file_round_trip(self, trained: Llama2cTokenizer, tmp_path: Path) -> None:
        path = trained.save(tmp_path)
        again = load_tokenizer(tmp_path)
        assert path.name == "tokenizer.bin"
        assert isinstance(again, Llama2cTokenizer)
        assert again.to_bytes() == path.read_bytes()
        assert again.fingerprint == trained.fingerprint
        assert again.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()
        assert (again.bos_id, again.stop_ids, again.kind) == (1, (1, 2), "llama2c")
        assert again.max_token_length == max(map(len, trained.pieces))

    def test_every_truncation_is_one_line(self) -> None:
        whole = made([b"ab", b"c"]).to_bytes()
        for size in range(len(whole)):
            # Cut between two pieces it is a smaller tokenizer, if all the bytes are there.
            if size in (len(whole) - 9, len(whole) - 19):
                assert Llama2cTokenizer.from_bytes(whole[:size]).vocab_size < 261
                continue
            with pytest.raises(BadInput, match=r"t\.bin") as caught:
                Llama2cTokenizer.from_bytes(whole[:size], "t.bin")
            assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (struct.pack("<IfI", 1, 0.0, 0xFFFFFFFF), "ends within piece 0"),
            (b"\0" * 3, "too short"),
            (b"\0" * (4 + 8 * 400), "not the 256 bytes"),
        ],
    )
    def test_damaged(self, data: bytes, message: str) -> None:
        with pytest.raises(BadInput, match=message):
            Llama2cTokenizer.from_bytes(data)

    def test_scores_must_be_finite(self) -> None:
        data = made([b"a"]).to_bytes()
        for score in (float("nan"), float("inf")):
            bad = data[:-9] + struct.pack("<fI", score, 1) + b"a"
            with pytest.raises(BadInput, match="finite score"):
                Llama2cTokenizer.from_bytes(bad)

    def test_file_too_large(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = made([]).save(tmp_path)
        size = path.stat().st_size
        monkeypatch.setattr(tokenizer_llama2c, "MAX_FILE_BYTES", size)
        Llama2cTokenizer.read(path)
        monkeypatch.setattr(tokenizer_llama2c, "MAX_FILE_BYTES", size - 1)
        with pytest.raises(BadInput, match="larger than"):
            Llama2cTokenizer.read(path)

    def test_too_many_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        data = made([b"a", b"b"]).to_bytes()
        monkeypatch.setattr(tokenizer_llama2c, "MAX_PIECES", 261)
        Llama2cTokenizer.from_bytes(data)
        monkeypatch.setattr(tokenizer_llama2c, "MAX_PIECES", 260)
        with pytest.raises(BadInput, match="more than the 260 pieces"):
            Llama2cTokenizer.from_bytes(data)

    @needs_shared
    def test_stories260k(self) -> None:
        tokenizer = Llama2cTokenizer.read(SHARED / "tok512.bin")
        assert tokenizer.vocab_size == 512
        assert tokenizer.to_bytes() == (SHARED / "tok512.bin").read_bytes()
        ids = [int(i) for i in (SHARED / "stories260K_greedy_ids_n256.txt").read_text().split()]
        text = tokenizer.decode(ids)
        assert text.startswith("Once upon a time, there was a little girl named Lily. She loved")
        assert tokenizer.decode([1, *ids]) == text
        assert tokenizer.encode("Once upon a time") == [1, 403, 407, 261, 378]
        assert tokenizer.decode(tokenizer.encode(text)) == text


class TestTraining:
    def test_repeatable(self, trained: Llama2cTokenizer) -> None:
        assert train_llama2c(iter(CORPUS), 340).fingerprint == trained.fingerprint
        assert trained.vocab_size == 340

    def test_settings(self, trained: Llama2cTokenizer) -> None:
        learnt = trained.pieces[FIRST_PIECE:]
        assert b" little" in learnt
        assert not [piece for piece in learnt if b"\n" in piece]  # lines, as llama2.c reads them
        digits = [piece for piece in learnt if any(b"%d" % digit in piece for digit in range(10))]
        assert digits
        assert all(len(piece.strip()) == 1 for piece in digits)
        # sentencepiece leaves a tab to its byte, before 0.2.3
        assert set("".join(CORPUS)) - {"\n", "\t"} <= {
            piece.decode() for piece in learnt if len(piece.decode()) == 1
        }

    def test_long_lines_and_words_count(self) -> None:
        pytest.importorskip("sentencepiece")
        words = " ".join(["abc", "abd"] * 3000)
        assert b" abc" in train_llama2c([words], 268).pieces
        assert train_llama2c(["xy" * 9000], 263).vocab_size == 263

    @pytest.mark.parametrize("size", [-1, 0, 259, (1 << 18) + 1])
    def test_size_out_of_range(self, size: int) -> None:
        with pytest.raises(BadInput, match=f"size {size}: .* from 260"):
            train_llama2c(CORPUS, size)

    def test_too_little_text(self) -> None:
        pytest.importorskip("sentencepiece")
        with pytest.raises(BadInput, match="size 5000: .*at most") as caught:
            train_llama2c(CORPUS, 5000)
        most = int(str(caught.value).split("at most ")[1].split(",")[0])
        assert train_llama2c(CORPUS, most).vocab_size == most

    def test_too_many_characters(self) -> None:
        pytest.importorskip("sentencepiece")
        with pytest.raises(BadInput, match="size 265: .*characters") as caught:
            train_llama2c(CORPUS, 265)
        least = int(str(caught.value).split("at least ")[1])
        assert train_llama2c(CORPUS, least).vocab_size == least

    @pytest.mark.parametrize("texts", [[], [""], ["\n\n"]])
    def test_no_text(self, texts: list[str]) -> None:
        pytest.importorskip("sentencepiece")
        with pytest.raises(BadInput, match="size 300: no text"):
            train_llama2c(texts, 300)

    def test_other_sentencepiece_models_are_refused(self) -> None:
        sentencepiece = pytest.importorskip("sentencepiece")
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=model,
            model_type="unigram",
            vocab_size=80,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        with pytest.raises(BadInput, match=r"x\.model: .*3 to 258"):
            from_sentencepiece(model.getvalue(), "x.model")
        with pytest.raises(BadInput, match=r"x\.model: not a sentencepiece model"):
            from_sentencepiece(b"\xff\xff nonsense", "x.model")

    def test_without_sentencepiece(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "sentencepiece", None)
        with pytest.raises(MissingExtra, match=r"onelaunch\[tokenizer\]"):
            train_llama2c(CORPUS, 340)


class TestBytes:
    def test_ids(self) -> None:
        tokenizer = BytesTokenizer()
        assert tokenizer.encode("a\u00e9") == [1, 3 + 0x61, 3 + 0xC3, 3 + 0xA9]
        assert tokenizer.encode("", bos=False) == []
        assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.stop_ids) == (259, 1, (1, 2))
        assert tokenizer.fingerprint == hashlib.sha256(b"bytes").hexdigest()

    def test_round_trip(self) -> None:
        tokenizer = BytesTokenizer()
        for text in random_texts(50, seed=6):
            assert tokenizer.decode([0, *tokenizer.encode(text), 2]) == text
        stream = tokenizer.decoder()
        parts = [stream.push(i) for i in tokenizer.encode("\u00e9\U0001f600")]
        assert parts == ["", "", "\u00e9", "", "", "", "\U0001f600"]

    @pytest.mark.parametrize("token", [-1, 259])
    def test_ids_beyond_are_silent(self, token: int) -> None:
        assert BytesTokenizer().decode([3 + 0x61, token, 3 + 0x62]) == "ab"

    def test_file(self, tmp_path: Path) -> None:
        path = BytesTokenizer().save(tmp_path)
        assert path.name == "tokenizer.bytes"
        assert load_tokenizer(path).kind == load_tokenizer(tmp_path).kind == "bytes"
        assert hashlib.sha256(path.read_bytes()).hexdigest() == BytesTokenizer.fingerprint


@pytest.fixture(scope="module")
def json_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE trained here, with special tokens and no template."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    folder = tmp_path_factory.mktemp("json")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def copy_json(folder: Path, to: Path, **files: dict) -> Path:
    (to / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    for name, content in files.items():
        (to / f"{name}.json").write_text(json.dumps(content))
    return to / "tokenizer.json"


class TestJson:
    def test_round_trip_and_stream(self, json_folder: Path) -> None:
        tokenizer = load_tokenizer(json_folder)
        assert tokenizer.kind == "json"
        assert tokenizer.vocab_size == 300
        for text in [*CORPUS, *random_texts(100, seed=7)]:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            stream = tokenizer.decoder()
            parts = [stream.push(i) for i in ids]
            assert "".join(parts) + stream.finish() == text
            assert not any("\ufffd" in part for part in parts)

    def test_stream_of_random_ids_equals_decode(self, json_folder: Path) -> None:
        tokenizer = load_tokenizer(json_folder)
        rng = random.Random(8)
        plain = [i for i in range(300) if tokenizer.decode([i]).isascii()]
        for _ in range(50):
            ids = rng.choices([*plain, 0, 1, 999], k=30)
            stream = tokenizer.decoder()
            assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids)

    def test_stream_of_broken_bytes_does_not_wait_for_ever(self, json_folder: Path) -> None:
        tokenizer = load_tokenizer(json_folder)
        half = tokenizer.encode("\U0001f680")[:1]
        assert tokenizer.decode(half) == "\ufffd"
        stream = tokenizer.decoder()
        parts = [stream.push(half[0]) for _ in range(100)]
        assert len([part for part in parts if part]) == 6
        assert ("".join(parts) + stream.finish()).count("\ufffd") == 100

    def test_stream_keeps_spaces_of_a_sentencepiece_style_decoder(self, tmp_path: Path) -> None:
        tokenizers = pytest.importorskip("tokenizers")
        pieces = ["<unk>", "<s>", "\u2581a", "\u2581", "b", "<0xC3>", "<0xA9>"]
        inner = tokenizers.Tokenizer(
            tokenizers.models.BPE(
                vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True
            )
        )
        inner.add_special_tokens(["<s>"])
        d = tokenizers.decoders
        inner.decoder = d.Sequence(
            [d.Replace("\u2581", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)]
        )
        inner.save(str(tmp_path / "tokenizer.json"))
        tokenizer = load_tokenizer(tmp_path)
        ids = [1, 2, 2, 3, 3, 4, 1, 2, 5, 6, 2, 1, 2]
        stream = tokenizer.decoder()
        parts = [stream.push(i) for i in ids]
        assert parts[1:4] == ["a", " a", " "]
        assert "".join(parts) + stream.finish() == tokenizer.decode(ids) == "a a  b a\u00e9 a a"

    def test_special_ids_from_the_files_beside_it(self, json_folder: Path, tmp_path: Path) -> None:
        alone = load_tokenizer(json_folder)
        assert (alone.bos_id, alone.stop_ids) == (None, ())
        path = copy_json(
            json_folder,
            tmp_path,
            tokenizer_config={"bos_token": {"content": "<|begin|>"}, "eos_token": "<|end|>"},
            config={"bos_token_id": 7, "eos_token_id": 8},
            generation_config={"eos_token_id": [9, 10, 5000]},
        )
        tokenizer = load_tokenizer(path)
        assert (tokenizer.bos_id, tokenizer.stop_ids) == (0, (0, 1, 9, 10))
        # transformers adds a begin-of-text id only where the tokenizer's template has it
        assert tokenizer.encode("a") == tokenizer.encode("a", bos=False)
        (tmp_path / "tokenizer_config.json").unlink()
        (tmp_path / "generation_config.json").unlink()
        tokenizer = load_tokenizer(path)
        assert (tokenizer.bos_id, tokenizer.stop_ids) == (7, (7, 8))
        assert tokenizer.encode("a") == alone.encode("a")
        assert tokenizer.encode("") == [7]
        assert alone.encode("") == tokenizer.encode("", bos=False) == []

    def test_template_adds_bos(self, json_folder: Path, tmp_path: Path) -> None:
        tokenizers = pytest.importorskip("tokenizers")
        inner = tokenizers.Tokenizer.from_file(str(json_folder / "tokenizer.json"))
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
        )
        inner.save(str(tmp_path / "tokenizer.json"))
        tokenizer = load_tokenizer(tmp_path)
        assert (tokenizer.bos_id, tokenizer.stop_ids) == (0, (0,))
        for text in CORPUS:
            assert tokenizer.encode(text) == inner.encode(text).ids
            assert tokenizer.encode(text) == [0, *tokenizer.encode(text, bos=False)]
            assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode("") == [0]

    def test_template_that_only_ends_a_text_is_not_bos(
        self, json_folder: Path, tmp_path: Path
    ) -> None:
        tokenizers = pytest.importorskip("tokenizers")
        inner = tokenizers.Tokenizer.from_file(str(json_folder / "tokenizer.json"))
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single="$A <|end|>", special_tokens=[("<|end|>", 1)]
        )
        inner.save(str(tmp_path / "tokenizer.json"))
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.bos_id is None
        assert 1 not in tokenizer.encode("the cat")

    @pytest.mark.parametrize(
        "files",
        [
            {},
            {"tokenizer_config": {"bos_token": "<|begin|>"}},
            {"config": {"bos_token_id": 7, "eos_token_id": [8, 9]}},
            {
                "tokenizer_config": {"eos_token": "<|end|>"},
                "generation_config": {"bos_token_id": 3, "eos_token_id": 4},
            },
        ],
    )
    def test_save_keeps_the_special_ids(
        self, files: dict[str, Any], json_folder: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        tokenizer = load_tokenizer(copy_json(json_folder, tmp_path / "a", **files))
        path = tokenizer.save(tmp_path / "b")
        again = load_tokenizer(tmp_path / "b")
        assert path == tmp_path / "b" / "tokenizer.json"
        assert path.read_bytes() == (json_folder / "tokenizer.json").read_bytes()
        assert again.fingerprint == tokenizer.fingerprint
        assert again.file_fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()
        assert (again.bos_id, again.stop_ids) == (tokenizer.bos_id, tokenizer.stop_ids)

    def test_save_keeps_the_models_generation_config(
        self, json_folder: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}')
        settings = {"bos_token": "<|begin|>"}
        path = copy_json(json_folder, tmp_path / "a", tokenizer_config=settings)
        load_tokenizer(path).save(tmp_path)
        assert load_tokenizer(tmp_path).stop_ids == (0, 5)

    @pytest.mark.parametrize(
        "content", [b"", b"{}", b"[]", b"\xff\xfe", b'{"version": "1.0", "model": {"type": "?"}}']
    )
    def test_damaged(self, content: bytes, tmp_path: Path) -> None:
        pytest.importorskip("tokenizers")
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(BadInput, match=r"tokenizer\.json"):
            load_tokenizer(tmp_path)

    def test_damaged_settings(self, json_folder: Path, tmp_path: Path) -> None:
        path = copy_json(json_folder, tmp_path)
        (tmp_path / "tokenizer_config.json").write_text("{")
        with pytest.raises(BadInput, match=r"tokenizer_config\.json"):
            load_tokenizer(path)

    def test_text_that_is_no_text(self, json_folder: Path) -> None:
        with pytest.raises(BadInput, match="not valid Unicode"):
            load_tokenizer(json_folder).encode("\udcff")

    def test_a_panic_is_bad_input(self, json_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Panic(BaseException):
            __module__ = "pyo3_runtime"

        class Inner:
            def encode(self, *_: object, **__: object) -> None:
                raise Panic("called `Option::unwrap()` on a `None` value")

        tokenizer = load_tokenizer(json_folder)
        monkeypatch.setattr(tokenizer, "_tokenizer", Inner())
        with pytest.raises(BadInput, match="unwrap"):
            tokenizer.encode("a")

    def test_too_large(self, json_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tokenizer_json, "MAX_FILE_BYTES", 100)
        with pytest.raises(BadInput, match="larger than 100 bytes"):
            load_tokenizer(json_folder)

    def test_without_the_library(self, json_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tokenizers", None)
        with pytest.raises(MissingExtra, match=r"onelaunch\[hf\]"):
            JsonTokenizer(json_folder / "tokenizer.json")


def shape(vocab_size: int) -> ModelConfig:
    return ModelConfig(8, 1, 2, 16, vocab_size, 16)


def model_at(source: Path | None, vocab_size: int) -> LoadedModel:
    return LoadedModel(shape(vocab_size), {"x": torch.zeros(1)}, source=source)


class TestLoadAndFind:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("absent.bin", r"absent\.bin: no such file"),
            ("tokenizer.vocab", r"tokenizer\.vocab: .*tokenizer\.bin"),
            ("empty", r"empty: no tokenizer .*tokenizer\.bin"),
        ],
    )
    def test_load_refuses(self, name: str, message: str, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.vocab").write_bytes(b"x")
        (tmp_path / "empty").mkdir()
        with pytest.raises(BadInput, match=message):
            load_tokenizer(tmp_path / name)

    def test_the_word_bytes(self) -> None:
        assert load_tokenizer("bytes").kind == "bytes"

    @pytest.mark.parametrize("as_folder", [False, True])
    def test_find_next_to_a_file_and_in_a_folder(self, as_folder: bool, tmp_path: Path) -> None:
        source = tmp_path if as_folder else tmp_path / "model.bin"
        assert find_tokenizer(model_at(source, 261)) is None
        made([b"a", b"b"]).save(tmp_path)
        tokenizer = find_tokenizer(model_at(source, 261))
        assert tokenizer is not None
        assert tokenizer.kind == "llama2c"
        for padded_or_short in (262, 260):
            tokenizer = find_tokenizer(model_at(source, padded_or_short))
            assert tokenizer is not None
            assert tokenizer.kind == "llama2c"
        BytesTokenizer().save(tmp_path)
        tokenizer = find_tokenizer(model_at(source, 259))
        assert tokenizer is not None
        assert tokenizer.kind == "bytes"
        assert find_tokenizer(model_at(None, 259)) is None

    def test_find_tok_bin(self, tmp_path: Path) -> None:
        source = tmp_path / "model.bin"
        for name, extra in (("tok260.bin", [b"a"]), ("tok261.bin", [b"a", b"b"])):
            (tmp_path / name).write_bytes(made(extra).to_bytes())
        (tmp_path / "tok9.bin").write_bytes(b"damaged")
        (tmp_path / "tokenizer.bin").write_bytes(made([]).to_bytes())
        tokenizer = find_tokenizer(model_at(source, 261))
        assert tokenizer is not None
        assert tokenizer.vocab_size == 261
        (tmp_path / "tok261b.bin").write_bytes(made([b"x", b"y"]).to_bytes())
        tokenizer = find_tokenizer(model_at(source, 261))
        assert tokenizer is not None
        assert tokenizer.vocab_size == 259  # which of the two? the one of the plain name
        (tmp_path / "tokenizer.bin").unlink()
        with pytest.raises(BadInput, match=r"tok261\.bin and tok261b\.bin .*pass one"):
            find_tokenizer(model_at(source, 261))

    def test_find_json_of_a_padded_model(self, json_folder: Path) -> None:
        for vocab_size in (300, 320):
            tokenizer = find_tokenizer(model_at(json_folder, vocab_size))
            assert tokenizer is not None
            assert tokenizer.kind == "json"
        tokenizer = find_tokenizer(model_at(json_folder, 299))  # only a text may be refused
        assert tokenizer is not None
        assert tokenizer.vocab_size == 300

    @needs_shared
    def test_find_stories260k(self) -> None:
        tokenizer = find_tokenizer(model_at(SHARED / "stories260K.bin", 512))
        assert tokenizer is not None
        assert tokenizer.vocab_size == 512

    def test_ids_that_the_model_lacks(self, json_folder: Path) -> None:
        for tokenizer in (BytesTokenizer(), made([b"a"]), load_tokenizer(json_folder)):
            last = tokenizer.vocab_size - 1
            check_ids(tokenizer, [0, last], shape(last + 1), "here")
            with pytest.raises(BadInput, match=f"here: .* id {last} ") as caught:
                check_ids(tokenizer, [0, last], shape(last), "here")
            assert repr(tokenizer.piece(last)) in str(caught.value)

    def test_a_size_that_is_another_models(self) -> None:
        for rows, likely in ((207, False), (208, True), (259, True), (517, True), (518, False)):
            assert (size_note(BytesTokenizer(), shape(rows)) is None) is likely


@pytest.fixture(scope="module", params=["trained", "shared", "bytes"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Llama2cTokenizer | BytesTokenizer, Path]:
    """A tokenizer of ours, and the folder with its tokenizer.json."""
    pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("hub")
    if request.param == "bytes":
        ours: Llama2cTokenizer | BytesTokenizer = BytesTokenizer()
    elif request.param == "trained":
        ours = request.getfixturevalue("trained")
    elif (SHARED / "tok512.bin").exists():
        ours = Llama2cTokenizer.read(SHARED / "tok512.bin")
    else:
        pytest.skip("stories260K's tokenizer is not at hand")
    assert save_for_transformers(ours, folder) == folder / "tokenizer.json"
    return ours, folder


class TestForTransformers:
    def test_same_ids_and_text(self, pair: tuple[Llama2cTokenizer, Path]) -> None:
        ours, folder = pair
        theirs = load_tokenizer(folder)
        assert theirs.kind == "json"
        assert theirs.vocab_size == ours.vocab_size
        assert (theirs.bos_id, theirs.stop_ids) == (1, (1, 2))
        rng = random.Random(9)
        runs = ["".join(rng.choices("  al\n", k=rng.randrange(20))) for _ in range(200)]
        for text in [*CORPUS, *random_texts(300, seed=10), *runs, "", " ", "\u2581", "\ufffd"]:
            ids = ours.encode(text)
            assert theirs.encode(text) == ids, repr(text)
            assert theirs.decode(ids) == text

    def test_auto_tokenizer(self, pair: tuple[Llama2cTokenizer, Path]) -> None:
        transformers = pytest.importorskip("transformers")
        ours, folder = pair
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        for text in CORPUS:
            assert theirs(text)["input_ids"] == ours.encode(text)
            assert theirs.decode(ours.encode(text), skip_special_tokens=True) == text
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (1, 2, 0)
        assert len(theirs) == ours.vocab_size

    def test_pieces_that_no_text_gives(self, tmp_path: Path) -> None:
        pytest.importorskip("tokenizers")
        ours = made([b"a", b" ", b"a", b"\xff", b"", b"<0x41>", b" a", b"<s>"])
        save_for_transformers(ours, tmp_path)
        theirs = load_tokenizer(tmp_path)
        assert theirs.vocab_size == ours.vocab_size
        for text in ("a a", "aA", "b"):
            assert theirs.encode(text) == ours.encode(text)
