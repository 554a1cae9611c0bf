"""Decoding: streamed text, several prompts, stop strings, finish reasons, timing."""

import gc
import weakref

import pytest

from onelaunch.checkpoints.tokenizers import BytesTokenizer, Llama2cTokenizer
from onelaunch.config import ModelConfig
from onelaunch.engines.engine import Request, Sampling, TokenEvent
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.errors import BadInput, RunFailed
from onelaunch.generation.decode import (
    Completion,
    Decoding,
    Limits,
    generate_ids,
    tokens_per_second,
)
from onelaunch.generation.prompts import Prompt, encode_prompts
from onelaunch.generation.stops import StopStrings
from tests.engines.suite import weights_of

BYTES = BytesTokenizer()
CONFIG = ModelConfig(
    dim=16, n_layers=1, n_heads=2, hidden_dim=24, vocab_size=BYTES.vocab_size, max_seq_len=16
)


class ScriptedEngine:
    """An engine whose session returns scripted tokens: one list per request, `per_step` of each in
    a step."""

    config, max_batch = CONFIG.with_(vocab_size=300), 16

    def __init__(self, *outputs: list[int], per_step: int = 99, finish: str = "length") -> None:
        self.outputs, self.per_step, self.finish = [list(ids) for ids in outputs], per_step, finish
        self.requests: list[Request] = []
        self.seconds: list[float] = []
        self.cancelled: list[int] = []
        self.closed = False

    def session(self, max_batch, max_len):
        self.size = max_batch, max_len
        return self

    def submit(self, request):
        self.requests.append(request)

    def step(self, seconds=0.02):
        self.seconds.append(seconds)
        events = []
        for request in self.requests:
            left = self.outputs[request.id]
            if left is None:
                continue
            now, self.outputs[request.id] = left[: self.per_step], left[self.per_step :]
            events += [TokenEvent(request.id, token, None) for token in now]
            if not self.outputs[request.id]:
                events.append(TokenEvent(request.id, None, None, self.finish))
                self.outputs[request.id] = None
        return events

    def cancel(self, id):
        self.cancelled.append(id)
        if self.outputs[id] is not None:
            self.outputs[id] = []

    def close(self):
        self.closed = True


def byte_ids(text: str) -> list[int]:
    return BYTES.encode(text, bos=False)


def decode(engine, texts, tokenizer=BYTES, stop=()):
    """Return the (prompt, token, text) of all events that add any, and the completions."""
    decoding = Decoding(
        engine, encode_prompts(tokenizer, texts), Limits(9, Sampling(), (), stop), tokenizer
    )
    events = list(decoding)
    ends = [event.prompt_index for event in events if event.finish is not None]
    assert sorted(ends) == list(range(len(texts)))
    pieces = [event[:3] for event in events if event[1:3] != (None, "")]
    return pieces, decoding.completions


def test_text_comes_piece_by_piece_and_whole_at_the_end():
    pieces, (completion,) = decode(ScriptedEngine(byte_ids("hey")), ["Oh "])
    assert [text for _, _, text in pieces] == ["h", "e", "y"]
    assert [token for _, token, _ in pieces] == byte_ids("hey") == completion.ids
    assert completion.text == "hey"
    assert completion.prompt == Prompt("Oh ", [1, *byte_ids("Oh ")], special=1)
    assert completion.finish == "length"


def test_a_character_of_several_tokens_comes_when_it_is_whole():
    pieces, (completion,) = decode(ScriptedEngine(byte_ids("a\u20acb")), [""])
    assert [text for _, _, text in pieces] == ["a", "", "", "\u20ac", "b"]
    assert completion.text == "a\u20acb"


def test_a_character_cut_off_is_marked_before_the_next_text_begins():
    cut = byte_ids("\u20ac")[:2]
    pieces, completions = decode(ScriptedEngine(cut, byte_ids("x"), cut), ["", "", ""])
    streamed = [(index, text) for index, _, text in pieces if text]
    assert streamed == [(0, "\ufffd"), (1, "x"), (2, "\ufffd")]
    assert [completion.text for completion in completions] == ["\ufffd", "x", "\ufffd"]
    assert [(i, t) for i, t, text in pieces if text == "\ufffd"] == [(0, None), (2, None)]


def llama2c_tokenizer(words: list[bytes]) -> Llama2cTokenizer:
    specials = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % i for i in range(256))]
    return Llama2cTokenizer(specials + words, [0.0] * (259 + len(words)))


def test_only_a_text_from_bos_loses_its_first_space():
    tokenizer = llama2c_tokenizer([b" ", b"a", b" a"])
    (a,) = [i for i, piece in enumerate(tokenizer.pieces) if piece == b" a"]
    _, (from_bos,) = decode(ScriptedEngine([a, a]), [""], tokenizer)
    assert from_bos.text == "a a"
    _, (continued,) = decode(ScriptedEngine([a, a]), ["a"], tokenizer)
    assert continued.text == " a a"


def test_texts_without_tokens_are_empty_and_do_not_shift_the_others():
    pieces, completions = decode(ScriptedEngine([], byte_ids("b"), []), ["x", "y", "z"])
    assert [(index, text) for index, _, text in pieces] == [(1, "b")]
    assert [completion.text for completion in completions] == ["", "b", ""]
    assert [completion.first_token_seconds is None for completion in completions] == [
        True,
        False,
        True,
    ]


def test_ids_alone_need_no_tokenizer():
    engine = ScriptedEngine([7, 8])
    decoding = Decoding(engine, [Prompt("", [1])], Limits(2, Sampling(seed=4), [2]))
    assert [event[:4] for event in decoding] == [
        (0, 7, "", None),
        (0, 8, "", None),
        (0, None, "", "length"),
    ]
    (completion,) = decoding.completions
    assert completion.ids == [7, 8]
    assert completion.text is None
    assert engine.requests == [Request(0, [1], 2, Sampling(seed=4), [2])]
    with pytest.raises(BadInput, match="need a tokenizer"):
        Decoding(engine, [Prompt("", [1])], Limits(2, stop=["x"]))


def test_no_prompts_no_texts():
    assert Decoding(ScriptedEngine(), [], Limits(5)).finish() == []
    assert generate_ids(ScriptedEngine(), [], 5) == []


def test_equal_prompts_are_samples_and_the_session_is_as_large_as_needed():
    prompts = [Prompt("", ids) for ids in ([1], [2], [1], [1, 4, 5], [1])]
    engine = ScriptedEngine(*[[7]] * 5)
    Decoding(engine, prompts, Limits(3)).finish()
    assert [request.sample for request in engine.requests] == [0, 0, 1, 0, 2]
    assert engine.size == (5, 5)  # the last new token is not read back
    many = ScriptedEngine(*[[7]] * 40)
    Decoding(many, [Prompt("", [1])] * 40, Limits(3)).finish()
    assert many.size == (16, 3)


@pytest.mark.parametrize("per_step", [1, 2, 99])
@pytest.mark.parametrize(
    ("stop", "text", "ids"),
    [
        (["lo"], "hel", 5),
        (["l"], "he", 3),
        (["low", "o w"], "hell", 7),
        (["world!", "el"], "h", 3),
        (["worlds"], "hello world", 11),
        (["h"], "", 1),
        (["ldx", "xd"], "hello world", 11),
    ],
)
def test_a_text_ends_before_a_stop_string(stop, text, ids, per_step):
    """For any number of tokens per step; a possible beginning of it is held back."""
    engine = ScriptedEngine(byte_ids("hello world"), byte_ids("ha"), per_step=per_step)
    pieces, completions = decode(engine, ["", "b"], stop=stop)
    first, _ = completions
    assert first.text == text
    assert "".join(piece for index, _, piece in pieces if index == 0) == text
    assert first.ids == byte_ids("hello world")[:ids]
    assert first.finish == ("length" if text == "hello world" else "stop")
    assert (0 in engine.cancelled) == (first.finish == "stop")
    assert engine.closed


def test_a_stop_string_may_be_of_one_character_that_takes_several_tokens():
    _, (completion,) = decode(ScriptedEngine(byte_ids("a\u20acb")), [""], stop=["\u20ac"])
    assert completion.text == "a"
    assert len(completion.ids) == 4


def test_stop_strings_hold_back_a_possible_beginning_and_no_more():
    stops = StopStrings(["abab", "bac"])
    pushed = [stops.push(each) for each in ("xa", "b", "a", "x", "ab", "a", "b", "more")]
    assert (
        pushed[:6] == [("x", False), ("", False), ("", False), ("abax", False)] + [("", False)] * 2
    )
    assert pushed[6] == ("", True)
    assert stops.push("ba") == ("", False)
    assert stops.finish() == "ba"


def test_a_stop_string_that_is_empty_is_refused():
    with pytest.raises(BadInput, match="stop=''"):
        Decoding(ScriptedEngine([7]), [Prompt("", [1])], Limits(2, stop=[""]), BYTES)


def test_a_text_may_be_cancelled_and_the_others_go_on():
    engine = ReferenceEngine(CONFIG, weights_of(CONFIG), device="cpu")
    prompts = encode_prompts(BYTES, ["ab", "c"])
    alone = Decoding(engine, prompts, Limits(9), BYTES).finish()
    decoding = Decoding(engine, prompts, Limits(9), BYTES)
    next(decoding)
    decoding.cancel(0)
    first, second = decoding.finish()
    assert first.finish == "cancelled"
    assert 0 < len(first.ids) < 9
    assert first.ids == alone[0].ids[: len(first.ids)]
    assert (second.ids, second.text) == (alone[1].ids, alone[1].text)


def test_leaving_early_closes_the_session():
    engine = ScriptedEngine(byte_ids("hey"), per_step=1)
    decoding = Decoding(engine, encode_prompts(BYTES, ["a"]), Limits(9), BYTES)
    next(decoding)
    assert not engine.closed
    decoding.close()
    assert engine.closed
    assert list(decoding) == []
    engine = ScriptedEngine(byte_ids("hey"), per_step=1)
    decoding = Decoding(engine, encode_prompts(BYTES, ["a"]), Limits(9), BYTES)
    next(decoding)
    gone = weakref.ref(decoding)
    del decoding
    gc.collect()
    assert gone() is None
    assert engine.closed


def test_an_error_of_a_request_is_raised():
    engine = ScriptedEngine([7])
    engine.step = lambda seconds: [TokenEvent(0, None, None, "error", RunFailed("not finite"))]
    with pytest.raises(RunFailed, match="not finite"):
        generate_ids(engine, [[1]], 5)
    assert engine.closed


def test_texts_that_grow_together_are_decoded_apart():
    pieces, completions = decode(
        ScriptedEngine(byte_ids("a\u20acc"), byte_ids("xy"), per_step=1), ["", ""]
    )
    assert [completion.text for completion in completions] == ["a\u20acc", "xy"]
    assert [(i, text) for i, _, text in pieces if text] == [
        (0, "a"),
        (1, "x"),
        (1, "y"),
        (0, "\u20ac"),
        (0, "c"),
    ]


def test_seconds_run_from_the_beginning_of_all(monkeypatch):
    """The clock ticks once per call: at the start, then at each step."""
    ticks = iter(range(100))
    monkeypatch.setattr("onelaunch.generation.decode.time.perf_counter", lambda: next(ticks))
    first, second = decode(ScriptedEngine(byte_ids("abcde"), byte_ids("fg"), per_step=2), ["", ""])[
        1
    ]
    assert (first.first_token_seconds, first.seconds) == (1, 3)
    assert (second.first_token_seconds, second.seconds) == (1, 1)
    # six of the seven tokens came after the first one, in 2 seconds
    assert tokens_per_second([first, second]) == 3.0


def test_no_speed_without_two_tokens():
    assert tokens_per_second([]) is None
    one = Completion(Prompt("", [1]), ids=[5], first_token_seconds=0.1, seconds=0.1)
    assert tokens_per_second([one, Completion(Prompt("", [1]))]) is None


def test_on_a_real_engine_the_text_is_the_engines_ids_decoded():
    engine = ReferenceEngine(CONFIG, weights_of(CONFIG), device="cpu")
    pieces, completions = decode(engine, ["ab", "c"])
    ids = generate_ids(engine, [[1, *byte_ids("ab")], [1, *byte_ids("c")]], 9)
    assert [completion.ids for completion in completions] == ids
    for index, completion in enumerate(completions):
        assert completion.text == BYTES.decode(ids[index])
        assert "".join(text for i, _, text in pieces if i == index) == completion.text
        assert 0 < completion.first_token_seconds < completion.seconds


def test_a_prompt_beyond_the_context_is_named_with_both_lengths():
    engine = ReferenceEngine(CONFIG, weights_of(CONFIG), device="cpu")
    assert len(decode(engine, ["x" * 15])[1][0].ids) == 1
    with pytest.raises(BadInput, match=r"prompt 2 has 17 tokens, .* context holds 16"):
        decode(engine, ["x", "x" * 16])


@pytest.mark.parametrize(("stop", "longer"), [((), True), (("xyz",), False)])
def test_steps_are_longer_when_text_is_not_streamed(stop, longer):
    """But not with stop strings: tokens after one would be wasted."""
    engine = ScriptedEngine(byte_ids("one two"), per_step=1)
    decoding = Decoding(engine, [Prompt("", [1])], Limits(20, stop=stop), BYTES)
    next(decoding)
    next(decoding)
    streamed = set(engine.seconds)
    decoding.finish()
    assert len(streamed) == 1
    assert (max(engine.seconds) > max(streamed)) == longer


@pytest.mark.parametrize("looks", [0, 3, 99])
@pytest.mark.parametrize("per_step", [1, 4, 99])
def test_whoever_looks_at_events_gets_the_same(looks, per_step):
    outputs = [[1, 2, 3, 4, 5], [6], [7, 8, 9]]
    engine = ScriptedEngine(*outputs, per_step=per_step)
    decoding = Decoding(engine, [Prompt("", [1])] * 3, Limits(9))
    for _, _event in zip(range(looks), decoding, strict=False):
        pass
    completions = decoding.finish()
    assert [completion.ids for completion in completions] == outputs
    assert {completion.finish for completion in completions} == {"length"}
    assert all(
        0.0 <= completion.first_token_seconds <= completion.seconds for completion in completions
    )
    assert engine.closed


def test_events_have_what_was_requested_of_log_probabilities():
    engine = ReferenceEngine(CONFIG, weights_of(CONFIG), "cpu")
    prompt = Prompt("", [1, 70])
    for tokenizer in (None, BYTES):
        limits = Limits(6, Sampling(1.0, seed=1), logprobs=True, top_logprobs=4)
        events = list(Decoding(engine, [prompt, prompt], limits, tokenizer))
        session = engine.session(2)
        for index in range(2):
            request = Request(index, prompt.ids, 6, limits.sampling, (), index, True, 4)
            session.submit(request)
        expected = []
        while more := session.step():
            expected += more
        found = [(each.prompt_index, each.token, each.logprob, each.top) for each in events]
        assert found == [(each.id, each.token, each.logprob, each.top) for each in expected]
        assert {len(each.top) for each in events} == {4}
        plain = list(Decoding(engine, [prompt], Limits(6, limits.sampling), tokenizer))
        assert {(each.logprob, each.top) for each in plain} == {(None, ())}
        finished = Decoding(engine, [prompt], limits, tokenizer).finish()
        assert finished[0].ids == [each.token for each in plain]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(1, top_logprobs=-1), "^top_logprobs=-1: must be from 0 to 20$"),
        (Limits(1, top_logprobs=21), "^top_logprobs=21: must be"),
        (Limits(1, Sampling(logit_bias=((CONFIG.vocab_size, 1.0),))), "^logit_bias=2.*vocabulary"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused_before_any_token(limits, message):
    engine = ReferenceEngine(CONFIG, weights_of(CONFIG), "cpu")
    with pytest.raises(BadInput, match=message):
        Decoding(engine, [Prompt("", [1])], limits)
