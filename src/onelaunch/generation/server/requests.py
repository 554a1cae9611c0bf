"""JSON bodies to jobs: what OpenAI's endpoints and llama.cpp's `/completion` take, checked."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from onelaunch.engines.engine import MAX_BIAS, MAX_PENALTY, MAX_TOP_LOGPROBS, Sampling
from onelaunch.errors import BadInput
from onelaunch.generation.prompts import Prompt, prompt_ids
from onelaunch.generation.server.body import Body, InvalidRequest
from onelaunch.generation.server.service import Service

MAX_SEQUENCES = 128
"""Of one request: prompts times choices."""
MAX_STOPS, MAX_STOP_CHARACTERS = 64, 4096
MAX_TOKENS = 1 << 31
SMALLEST_TOP_P = 1e-6
"""In place of 0, which clients send for the most likely token alone."""
COMPLETION_TOKENS = 16
"""Of `/v1/completions` without max_tokens, as OpenAI has it."""
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# what would change the text and is not here: refused rather than ignored
_REFUSED = {
    "grammar": "grammars are not supported",
    "json_schema": "schemas are not supported",
    "functions": "functions are not supported",
    "audio": "audio is not supported",
    "suffix": "text behind the completion is not supported",
}


@dataclass(frozen=True)
class Job:
    """Sequences to generate, and how to send them.

    n: completions of each prompt. logprobs: whether log-probabilities are sent, with
    `top_logprobs` of the most likely tokens each. echo: whether the prompt is sent too.
    """

    prompts: Sequence[Prompt]
    sampling: Sampling
    max_new_tokens: int
    n: int = 1
    stop: Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    stream: bool = False
    include_usage: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    echo: bool = False
    return_tokens: bool = False


def chat_job(service: Service, body: Body) -> Job:
    """The job of `/v1/chat/completions`."""
    if body.fields.get("tools") and body.fields.get("tool_choice") != "none":
        body.refuse("tools", 'calls of tools are not supported; send tool_choice "none"')
    text = chat_prompt(service, body)
    ids = prompt_ids(service.tokenizer, text)
    service.check_prompt(ids, "messages")
    prompt = Prompt(text, ids, int(ids[:1] == [service.tokenizer.bos_id]))
    top = body.integer("top_logprobs", 0, 0, MAX_TOP_LOGPROBS)
    logprobs = body.boolean("logprobs")
    if top and not logprobs:
        body.refuse("top_logprobs", "needs logprobs to be true")
    job = _job(service, body, [prompt], None, logprobs, top)
    if not body.boolean("ignore_eos"):
        stop = (*job.stop, *service.chat_stop)
        job = replace(job, stop=stop, stop_ids=service.chat_stop_ids)
    return job


def completion_job(service: Service, body: Body) -> Job:
    """The job of `/v1/completions`."""
    top = body.integer("logprobs", 0, 0, MAX_TOP_LOGPROBS)
    if body.integer("best_of", 1, 1, MAX_SEQUENCES) > body.integer("n", 1, 1, MAX_SEQUENCES):
        body.refuse("best_of", "more than n is not supported")
    job = _job(service, body, _prompts(service, body), COMPLETION_TOKENS, "logprobs" in body, top)
    return replace(job, echo=body.boolean("echo"))


def native_job(service: Service, body: Body) -> Job:
    """The job of llama.cpp's `/completion`."""
    top = body.integer("n_probs", 0, 0, MAX_TOP_LOGPROBS)
    if body.boolean("post_sampling_probs"):
        body.refuse("post_sampling_probs", "is not supported")
    job = _job(service, body, _prompts(service, body), None, bool(top), top)
    return replace(job, return_tokens=body.boolean("return_tokens"))


def chat_prompt(service: Service, body: Body) -> str:
    """The messages as the model's template writes them. A last message of the assistant is the
    beginning of the answer."""
    tools = body.fields.get("tools", [])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        body.refuse("tools", "must be a list of objects")
    messages = _messages(body)
    prefill = ""
    if messages[-1]["role"] == "assistant":
        prefill = _joined(messages.pop()["content"])
        if not messages or messages[-1]["role"] == "assistant":
            body.refuse("messages", "one message of the assistant at the end, after another role")
    variables = body.table("chat_template_kwargs").fields
    generate = body.boolean("add_generation_prompt", True)
    reserved = {"messages", "tools", "add_generation_prompt"} & variables.keys()
    if reserved:
        body.refuse("chat_template_kwargs", f"must not have {min(reserved)}")
    try:
        text = service.template.render(
            messages, add_generation_prompt=generate, tools=tools or None, **variables
        )
    except BadInput as error:
        raise InvalidRequest(str(error), "messages") from None
    return text + prefill


def _messages(body: Body) -> list[dict[str, Any]]:
    messages = body.fields.get("messages")
    if not isinstance(messages, list) or not messages:
        body.refuse("messages", "must be a list of messages")
    return [_message(body, each, i) for i, each in enumerate(messages)]


def _message(body: Body, message: Any, index: int) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, dict):
        body.refuse(where, "must be an object with role and content")
    if message.get("role") not in _ROLES:
        body.refuse(f"{where}.role", f"must be one of {', '.join(_ROLES)}")
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            _check_part(body, part, f"{where}.content")
    elif not isinstance(content, str) and (content is not None or message["role"] != "assistant"):
        body.refuse(f"{where}.content", "must be a text or a list of texts")
    body.unicode(f"{where}.content", _joined(content))
    name = message.get("name")
    if not isinstance(name, str | None):
        body.refuse(f"{where}.name", "must be a text")
    named = {} if name is None else {"name": body.unicode(f"{where}.name", name)}
    return {"role": message["role"], "content": content, **named}


def _check_part(body: Body, part: Any, where: str) -> None:
    if not isinstance(part, dict) or part.get("type") != "text":
        body.refuse(where, 'has a part that is not of type "text"')
    if not isinstance(part.get("text"), str):
        body.refuse(where, "has a part without text")


def _joined(content: str | list[dict[str, str]] | None) -> str:
    return "".join(p["text"] for p in content) if isinstance(content, list) else content or ""


def _prompts(service: Service, body: Body) -> list[Prompt]:
    """A text, a list of texts, ids, lists of ids, or ids and texts of one prompt."""
    prompt = body.fields.get("prompt", "")
    many = isinstance(prompt, list) and not any(map(_is_id, prompt))
    entries: list[Any] = prompt if many else [prompt]
    if not entries:
        body.refuse("prompt", "is an empty list")
    if len(entries) > MAX_SEQUENCES:
        body.refuse("prompt", f"has {len(entries)} entries, at most {MAX_SEQUENCES} are allowed")
    prompts = [_prompt(service, body, entry) for entry in entries]
    for each in prompts:
        service.check_prompt(each.ids, "prompt")
    return prompts


def _prompt(service: Service, body: Body, entry: Any) -> Prompt:
    if isinstance(entry, dict) and entry.keys() == {"prompt_string"}:  # llama.cpp's, without images
        entry = entry["prompt_string"]
    if isinstance(entry, str):
        return service.encode(body.unicode("prompt", entry))
    if not isinstance(entry, list) or not all(isinstance(p, str) or _is_id(p) for p in entry):
        body.refuse("prompt", "must be a text, token ids, or a list of either")
    ids: list[int] = []
    for piece in entry:
        if isinstance(piece, str):
            ids += service.tokenizer.encode(body.unicode("prompt", piece), bos=not ids)
        else:
            ids.append(piece)
    return Prompt(service.tokenizer.decode(ids), ids)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _job(
    service: Service,
    body: Body,
    prompts: Sequence[Prompt],
    default_tokens: int | None,
    logprobs: bool,
    top_logprobs: int,
) -> Job:
    for name, reason in _REFUSED.items():
        if body.fields.get(name):
            body.refuse(name, reason)
    if body.table("response_format").string("type", "text") != "text":
        body.refuse("response_format", 'only {"type": "text"} is supported')
    n = body.integer("n", 1, 1, MAX_SEQUENCES)
    if n * len(prompts) > MAX_SEQUENCES:
        body.refuse("n", f"prompts times n must be at most {MAX_SEQUENCES}")
    room = service.limits.context - max(len(prompt.ids) for prompt in prompts)
    name = body.first("max_completion_tokens", "max_tokens", "n_predict")
    wanted = body.integer(name, -1 if default_tokens is None else default_tokens, -1, MAX_TOKENS)
    most = service.limits.max_new_tokens
    limit = min(room if wanted < 0 else wanted, room, room if most is None else most)
    return Job(
        prompts,
        _sampling(service, body),
        limit,
        n,
        _stop(body),
        () if body.boolean("ignore_eos") else service.stop_ids,
        body.boolean("stream"),
        body.table("stream_options").boolean("include_usage"),
        logprobs,
        top_logprobs,
    )


def _sampling(service: Service, body: Body) -> Sampling:
    base, penalty = service.defaults, MAX_PENALTY
    seed = body.integer("seed", -1 if service.seed is None else service.seed, -(2**63), 2**63 - 1)
    repetition = body.first("repetition_penalty", "repeat_penalty")
    try:
        return Sampling(
            body.number("temperature", base.temperature, 0.0, 100.0),
            max(0, body.integer("top_k", base.top_k, -1, MAX_TOKENS)),
            body.number("top_p", base.top_p, 0.0, 1.0) or SMALLEST_TOP_P,
            body.number("min_p", base.min_p, 0.0, 1.0),
            secrets.randbits(62) if seed == -1 else seed,
            body.number(repetition, base.repetition_penalty, 1e-3, 1e3),
            body.number("presence_penalty", base.presence_penalty, -penalty, penalty),
            body.number("frequency_penalty", base.frequency_penalty, -penalty, penalty),
            tuple(_logit_bias(service, body).items()),
        )
    except InvalidRequest:
        raise
    except BadInput as error:
        raise InvalidRequest(str(error)) from None


def _logit_bias(service: Service, body: Body) -> dict[int, float]:
    """OpenAI's object of ids, or llama.cpp's list of pairs; a text stands for its tokens, and false
    for the largest bias against them."""
    value = body.fields.get("logit_bias", {})
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, list) or len(pairs) > 4096:
        body.refuse("logit_bias", "must map at most 4,096 token ids to numbers")
    biases: dict[int, float] = {}
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            body.refuse("logit_bias", "must map token ids to numbers")
        token, amount = pair
        amount = -MAX_BIAS if amount is False else amount
        if isinstance(amount, bool) or not isinstance(amount, int | float):
            body.refuse("logit_bias", "must map token ids to numbers")
        if not -MAX_BIAS <= amount <= MAX_BIAS:
            body.refuse("logit_bias", f"must be from {-MAX_BIAS:g} to {MAX_BIAS:g}")
        for id_ in _biased(service, body, token):
            biases[id_] = float(amount)
    return biases


def _biased(service: Service, body: Body, token: Any) -> Sequence[int]:
    if isinstance(token, str) and token.isascii() and token.isdigit():
        token = int(token) if len(token) < 10 else MAX_TOKENS
    if isinstance(token, str):
        return service.tokenizer.encode(body.unicode("logit_bias", token), bos=False)
    if not _is_id(token):
        body.refuse("logit_bias", "must map token ids to numbers")
    rows = service.engine.config.vocab_size
    if not 0 <= token < rows:
        body.refuse("logit_bias", f"id {token} is outside the model's vocabulary of {rows}")
    return [token]


def _stop(body: Body) -> tuple[str, ...]:
    value = body.fields.get("stop", [])
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        body.refuse("stop", "must be a text or a list of texts, none of them empty")
    if len(stops) > MAX_STOPS or sum(map(len, stops)) > MAX_STOP_CHARACTERS:
        body.refuse(
            "stop", f"at most {MAX_STOPS} texts, of {MAX_STOP_CHARACTERS} characters in all"
        )
    return tuple(body.unicode("stop", stop) for stop in stops)
