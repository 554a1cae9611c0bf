"""Text in, text out: decoding as tokens come, several prompts, timing."""

import pytest

from onelaunch.checkpoints.tokenizers import BytesTokenizer, Llama2cTokenizer
from onelaunch.config import ModelConfig
from onelaunch.engines.engine import Sampling
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.errors import BadInput
from onelaunch.generation.text import (
    Completion,
    Prompt,
    complete,
    encode_prompts,
    tokens_per_second,
)
from tests.engines.suite import weights_of

BYTES = BytesTokenizer()
CONFIG = ModelConfig(
    dim=16, n_layers=1, n_heads=2, hidden_dim=24, vocab_size=BYTES.vocab_size, max_seq_len=16
)


class Script:
    """An engine that says what it is told, whatever is asked."""

    config = CONFIG

    def __init__(self, *texts: list[int]) -> None:
        self.texts = texts

    def generate(self, prompts, n, sampling, on_token=None, stop=(), on_end=None):
        self.asked = (prompts, n, sampling, tuple(stop))
        for index, ids in enumerate(self.texts):
            for token in ids:
                on_token(index, token)
            on_end(index)
        return [list(ids) for ids in self.texts]


def spoken(text: str) -> list[int]:
    return BYTES.encode(text, bos=False)


def heard(engine, texts, tokenizer=BYTES):
    """What `on_piece` was told, less the ends without a text, and what came back."""
    pieces: list[tuple[int, int | None, str]] = []
    prompts = encode_prompts(tokenizer, texts)
    result = complete(
        engine,
        prompts,
        9,
        Sampling(),
        tokenizer=tokenizer,
        on_piece=lambda index, token, text: pieces.append((index, token, text)),
    )
    ends = [index for index, token, _ in pieces if token is None]
    assert sorted(ends) == list(range(len(texts)))
    return [piece for piece in pieces if piece[1:] != (None, "")], result


def test_text_comes_piece_by_piece_and_whole_at_the_end():
    pieces, (completion,) = heard(Script(spoken("hey")), ["Oh "])
    assert [text for _, _, text in pieces] == ["h", "e", "y"]
    assert [token for _, token, _ in pieces] == spoken("hey") == completion.ids
    assert completion.text == "hey"
    assert completion.prompt == Prompt("Oh ", [1, *spoken("Oh ")])


def test_a_character_of_several_tokens_comes_when_it_is_whole():
    pieces, (completion,) = heard(Script(spoken("a\u20acb")), [""])
    assert [text for _, _, text in pieces] == ["a", "", "", "\u20ac", "b"]
    assert completion.text == "a\u20acb"


def test_a_character_cut_off_is_marked_before_the_next_text_begins():
    cut = spoken("\u20ac")[:2]
    pieces, completions = heard(Script(cut, spoken("x"), cut), ["", "", ""])
    told = [(index, text) for index, _, text in pieces if text]
    assert told == [(0, "\ufffd"), (1, "x"), (2, "\ufffd")]
    assert [completion.text for completion in completions] == ["\ufffd", "x", "\ufffd"]
    assert [(i, t) for i, t, text in pieces if text == "\ufffd"] == [(0, None), (2, None)]


def llama2c_tokenizer(words: list[bytes]) -> Llama2cTokenizer:
    specials = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % i for i in range(256))]
    return Llama2cTokenizer(specials + words, [0.0] * (259 + len(words)))


def test_only_a_text_from_bos_loses_its_first_space():
    tokenizer = llama2c_tokenizer([b" ", b"a", b" a"])
    (a,) = [i for i, piece in enumerate(tokenizer.pieces) if piece == b" a"]
    _, (from_bos,) = heard(Script([a, a]), [""], tokenizer)
    assert from_bos.text == "a a"
    _, (continued,) = heard(Script([a, a]), ["a"], tokenizer)
    assert continued.text == " a a"


def test_texts_without_tokens_are_empty_and_do_not_shift_the_others():
    pieces, completions = heard(Script([], spoken("b"), []), ["x", "y", "z"])
    assert [(index, text) for index, _, text in pieces] == [(1, "b")]
    assert [completion.text for completion in completions] == ["", "b", ""]
    assert [completion.first_token_seconds is None for completion in completions] == [
        True,
        False,
        True,
    ]


def test_ids_alone_need_no_tokenizer():
    engine = Script([7, 8])
    pieces: list[tuple[int, int | None, str]] = []
    (completion,) = complete(
        engine,
        [Prompt("", [1])],
        2,
        Sampling(seed=4),
        stop=[2],
        on_piece=lambda *piece: pieces.append(piece),
    )
    assert pieces == [(0, 7, ""), (0, 8, ""), (0, None, "")]
    assert completion.ids == [7, 8]
    assert completion.text is None
    assert engine.asked == ([[1]], 2, Sampling(seed=4), (2,))


def test_no_prompts_no_texts():
    assert complete(Script(), [], 5, Sampling()) == []


class InTurns(Script):
    """Its texts grow together, a token each."""

    def generate(self, prompts, n, sampling, on_token=None, stop=(), on_end=None):
        for i in range(max(map(len, self.texts))):
            for index, ids in enumerate(self.texts):
                if i < len(ids):
                    on_token(index, ids[i])
                    if i + 1 == len(ids):
                        on_end(index)
        return [list(ids) for ids in self.texts]


def test_texts_that_grow_together_are_decoded_apart():
    pieces, completions = heard(InTurns(spoken("a\u20acc"), spoken("xy")), ["", ""])
    assert [completion.text for completion in completions] == ["a\u20acc", "xy"]
    assert [(i, text) for i, _, text in pieces if text] == [
        (0, "a"),
        (1, "x"),
        (1, "y"),
        (0, "\u20ac"),
        (0, "c"),
    ]


def test_seconds_run_from_the_beginning_of_all(monkeypatch):
    """A clock that ticks once a look: the start, then each token."""
    ticks = iter(range(100))
    monkeypatch.setattr("onelaunch.generation.text.time.perf_counter", lambda: next(ticks))
    first, second = heard(Script(spoken("abc"), spoken("de")), ["", ""])[1]
    assert (first.first_token_seconds, first.seconds) == (1, 3)
    assert (second.first_token_seconds, second.seconds) == (4, 5)
    # four of the five tokens came after the first one, in 4 seconds
    assert tokens_per_second([first, second]) == 1.0


def test_no_speed_without_two_tokens():
    assert tokens_per_second([]) is None
    one = Completion(Prompt("", [1]), ids=[5], first_token_seconds=0.1, seconds=0.1)
    assert tokens_per_second([one, Completion(Prompt("", [1]))]) is None


def test_on_a_real_engine_the_text_is_the_engines_ids_decoded():
    engine = ReferenceEngine(CONFIG, weights_of(CONFIG), device="cpu")
    pieces, completions = heard(engine, ["ab", "c"])
    ids = engine.generate([[1, *spoken("ab")], [1, *spoken("c")]], 9, Sampling())
    assert [completion.ids for completion in completions] == ids
    for index, completion in enumerate(completions):
        assert completion.text == BYTES.decode(ids[index])
        assert "".join(text for i, _, text in pieces if i == index) == completion.text
        assert 0 < completion.first_token_seconds < completion.seconds


def test_a_prompt_beyond_the_context_is_named_with_both_lengths():
    engine = ReferenceEngine(CONFIG, weights_of(CONFIG), device="cpu")
    assert len(heard(engine, ["x" * 15])[1][0].ids) == 1
    with pytest.raises(BadInput, match=r"prompt 2 has 17 tokens, .* context holds 16"):
        heard(engine, ["x", "x" * 16])
