"""OpenAI's endpoints: shapes, text, log-probabilities, limits, errors."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from onelaunch.engines.engine import Sampling
from onelaunch.generation.decode import generate_ids
from tests.generation.server.serving import BYTES, CONFIG, GatedEngine, serving, tiny_model

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}]
CHATML = "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
PROMPT = CHATML + "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def client():
    with serving() as client:
        yield client


def greedy(text: str, n: int) -> list[int]:
    _, engine = tiny_model()
    return generate_ids(engine, [BYTES.encode(text)], n, stop_ids=BYTES.stop_ids)[0]


def test_a_chat_is_the_templates_text_continued(client):
    answer = client.post(CHAT, {"messages": MESSAGES, "max_tokens": 12, "temperature": 0})
    expected = greedy(PROMPT, 12)
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "tiny"
    assert answer["usage"] == {
        "prompt_tokens": len(PROMPT) + 1,
        "completion_tokens": len(expected),
        "total_tokens": len(PROMPT) + 1 + len(expected),
    }
    (choice,) = answer["choices"]
    stream = BYTES.decoder()
    text = "".join(map(stream.push, expected)) + stream.finish()
    assert choice["message"] == {"role": "assistant", "content": text}
    assert choice["finish_reason"] == ("length" if len(expected) == 12 else "stop")
    assert client.post("/apply-template", {"messages": MESSAGES}) == {"prompt": PROMPT}


@pytest.mark.parametrize("usage", [False, True])
def test_a_streamed_chat_has_the_chunks_of_openai(client, usage):
    body = {"messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    whole = client.post(CHAT, body)
    options = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = client.stream(CHAT, body | options)
    assert chunks.pop() == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    if usage:
        last = chunks.pop()
        assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert all("usage" not in chunk for chunk in chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": None}
    assert deltas[-1] == {}
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons[:-1] == [None] * (len(chunks) - 1)
    assert reasons[-1] == whole["choices"][0]["finish_reason"]
    text = "".join(delta["content"] for delta in deltas[1:-1])
    assert text == whole["choices"][0]["message"]["content"]


def test_log_probabilities_are_those_of_the_logits(client):
    body = {
        "messages": MESSAGES, "max_tokens": 6, "temperature": 0, "logprobs": True,
        "top_logprobs": 3, "ignore_eos": True,
    }  # fmt: skip
    whole = client.post(CHAT, body)["choices"][0]
    entries = whole["logprobs"]["content"]
    _, engine = tiny_model()
    ids = BYTES.encode(PROMPT)
    for entry in entries:
        logprobs = engine.logits([ids], last=True)[0].log_softmax(-1)
        best = torch.topk(logprobs, 3)
        assert entry["logprob"] == pytest.approx(best.values[0].item(), abs=1e-5)
        tops = [each["logprob"] for each in entry["top_logprobs"]]
        assert tops == pytest.approx(best.values.tolist(), abs=1e-5)
        assert bytes(entry["bytes"]) == entry["token"].encode()
        ids.append(int(best.indices[0]))
    chunks = client.stream(CHAT, body)[:-1]
    streamed = [
        entry
        for chunk in chunks
        for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert [each["token"] for each in streamed] == [each["token"] for each in entries]


def test_older_log_probabilities_and_echo(client):
    body = {"prompt": "ab", "max_tokens": 3, "temperature": 0, "logprobs": 2, "echo": True}
    (choice,) = client.post(TEXT, body | {"ignore_eos": True})["choices"]
    assert choice["text"].startswith("ab")
    lists = choice["logprobs"]
    assert [len(lists[name]) for name in ("tokens", "token_logprobs", "text_offset")] == [3, 3, 3]
    assert lists["text_offset"][0] == 2
    assert client.post(TEXT, body | {"logprobs": None})["choices"][0]["logprobs"] is None


def test_each_choice_is_another_and_a_seed_draws_them_again(client):
    body = {"prompt": ["one", "two"], "n": 3, "seed": 5, "max_tokens": 12, "ignore_eos": True}
    first, again = (client.post(TEXT, body)["choices"] for _ in range(2))
    assert [choice["index"] for choice in first] == list(range(6))
    assert first == again
    assert len({choice["text"] for choice in first}) == 6
    other = client.post(TEXT, body | {"seed": 6})["choices"]
    assert [choice["text"] for choice in other] != [choice["text"] for choice in first]
    _, engine = tiny_model()
    ids = generate_ids(engine, [BYTES.encode("two")], 12, Sampling(1.0, seed=5))[0]
    assert first[3]["text"] == BYTES.decode([*BYTES.encode("two"), *ids])[3:]


def test_a_text_is_the_same_alone_and_among_others(client):
    bodies = [
        {"prompt": f"text {i}", "seed": i, "max_tokens": 30, "ignore_eos": True} for i in range(10)
    ]
    alone = [client.post(TEXT, body)["choices"] for body in bodies]
    with ThreadPoolExecutor(10) as threads:
        together = list(threads.map(lambda body: client.post(TEXT, body)["choices"], bodies))
    assert together == alone


def test_without_a_seed_texts_differ(client):
    body = {"prompt": "a", "max_tokens": 24, "ignore_eos": True}
    texts = {client.post(TEXT, body)["choices"][0]["text"] for _ in range(2)}
    assert len(texts) == 2


@pytest.mark.parametrize("stop", ["STOP", ["nothing", "STOP", "TOPx"]])
def test_a_stop_string_across_tokens_ends_a_text_before_it(stop):
    engine = GatedEngine(BYTES.encode("ab ST STOP more", bos=False), open_=True)
    body = {"prompt": "a", "stop": stop, "max_tokens": 40}
    with serving(engine) as client:
        (choice,) = client.post(TEXT, body)["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("ab ST ", "stop")
        chunks = client.stream(TEXT, body)[:-1]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "ab ST "
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        # what looked like a stop string and was none comes at the end
        cut = client.stream(TEXT, body | {"max_tokens": 8})[:-1]
        assert "".join(chunk["choices"][0]["text"] for chunk in cut) == "ab ST ST"


def test_a_character_of_several_tokens_comes_whole():
    text = "\u00e9\u5abd\U0001f917"
    engine = GatedEngine(BYTES.encode(text, bos=False), open_=True)
    with serving(engine) as client:
        chunks = client.stream(TEXT, {"prompt": "a", "max_tokens": len(text.encode())})[:-1]
        assert [c["choices"][0]["text"] for c in chunks] == [*text, ""]


def test_limits_of_tokens(client):
    def count(**fields):
        body = {"messages": MESSAGES, "temperature": 0, "ignore_eos": True} | fields
        return client.post(CHAT, body)["usage"]

    assert count(max_tokens=5)["completion_tokens"] == 5
    assert count(max_completion_tokens=4, max_tokens=9)["completion_tokens"] == 4
    assert count(max_tokens=None)["total_tokens"] == CONFIG.max_seq_len
    assert count(max_tokens=100_000)["total_tokens"] == CONFIG.max_seq_len
    assert (
        client.post(TEXT, {"prompt": "a", "ignore_eos": True})["usage"]["completion_tokens"] == 16
    )


def test_a_prompt_without_room_is_refused(client):
    longest = CONFIG.max_seq_len - 2  # and BOS, and one new token
    assert client.post(TEXT, {"prompt": "x" * longest})["usage"]["completion_tokens"] == 1
    status, body, _ = client.send("POST", TEXT, {"prompt": "x" * (longest + 1)})
    error = body["error"]
    assert status == 400
    assert error["type"] == "exceed_context_size_error"
    assert error["n_prompt_tokens"] == error["n_ctx"] == CONFIG.max_seq_len


def test_prompts_of_every_form(client):
    body = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}
    ids = BYTES.encode("hey")

    def texts(prompt):
        return [c["text"] for c in client.post(TEXT, body | {"prompt": prompt})["choices"]]

    (expected,) = texts("hey")
    assert texts(ids) == texts(["hey"]) == texts([ids]) == [expected]
    assert texts([ids[0], "hey"]) == texts(["hey", ids])[:1] == [expected]
    assert texts([ids, "hey"]) == [expected] * 2


def test_the_beginning_of_an_answer(client):
    messages = [*MESSAGES, {"role": "assistant", "content": [{"type": "text", "text": "Sure"}]}]
    assert client.post("/apply-template", {"messages": messages})["prompt"] == PROMPT + "Sure"


BAD = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"max_tokens": -2}, "max_tokens"),
    ({"max_tokens": 1e30}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"seed": 1 << 70}, "seed"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"frequency_penalty": -2.1}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"0": 101}}, "logit_bias"),
    ({"logit_bias": {str(CONFIG.vocab_size): 1}}, "logit_bias"),
    ({"logit_bias": [[1]]}, "logit_bias"),
    ({"stop": ""}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop": ["x"] * 65}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": []}, "stream_options"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"grammar": "root"}, "grammar"),
]
BAD_CHAT = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [1]}, "messages[0]"),
    ({"messages": [{"role": "someone", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"tools": [{"type": "function"}], "tool_choice": "auto"}, "tools"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tools": "none", "tool_choice": "none"}, "tools"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
]
BAD_TEXT = [
    ({"prompt": 5}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [CONFIG.vocab_size]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [None]}, "prompt"),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"prompt": "\udfff"}, "prompt"),
    ({"logprobs": 21}, "logprobs"),
    ({"best_of": 2}, "best_of"),
    ({"suffix": "end"}, "suffix"),
]


def test_what_is_wrong_with_a_request_comes_back_as_one_line(client):
    cases = [(TEXT, {"prompt": "a"} | fields, param) for fields, param in [*BAD, *BAD_TEXT]]
    cases += [(CHAT, {"messages": MESSAGES} | fields, param) for fields, param in [*BAD, *BAD_CHAT]]
    for path, body, param in cases:
        status, answer, _ = client.send("POST", path, body)
        assert status == 400, (body, answer)
        assert answer["error"]["param"] == param, (body, answer)
        assert answer["error"]["type"] == "invalid_request_error"
        assert "\n" not in answer["error"]["message"]


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"\xff", b'{"n": NaN}', b"[" * 100_000, b'{"n": %s}' % (b"1" * 5000)]
)
def test_a_body_that_is_no_json_object_is_refused(client, raw):
    status, answer, _ = client.send("POST", TEXT, raw)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
