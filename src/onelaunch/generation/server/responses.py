"""Jobs to JSON: the shapes of OpenAI's responses and chunks, and of llama.cpp's `/completion`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from onelaunch.generation.server.requests import Job
from onelaunch.generation.server.running import Choice, Piece
from onelaunch.generation.server.service import FINGERPRINT, Service

Json = dict[str, Any]


class Shape(Protocol):
    """How an endpoint writes its results.

    done: what ends a stream, after the last chunk.
    """

    done: str

    def first(self, choice: Choice) -> list[Json]:
        """The chunks before any text of a choice."""

    def chunk(self, choice: Choice, piece: Piece) -> list[Json]:
        """The chunks of a new piece, the last one of a choice included."""

    def last(self, choices: Sequence[Choice]) -> list[Json]:
        """The chunks after all choices."""

    def whole(self, choices: Sequence[Choice]) -> Any:
        """The response that is not streamed."""


class ChatShape:
    """`/v1/chat/completions`."""

    done = "[DONE]"

    def __init__(self, service: Service, job: Job) -> None:
        self._service, self._job = service, job
        self._base = _base(service, "chatcmpl", "chat.completion.chunk")

    def first(self, choice: Choice) -> list[Json]:
        return [self._chunk(choice, {"role": "assistant", "content": None})]

    def chunk(self, choice: Choice, piece: Piece) -> list[Json]:
        logprobs = chat_logprobs(self._service, self._job, [piece])
        chunks = []
        if piece.text or (logprobs and piece.token is not None):
            chunks.append(self._chunk(choice, {"content": piece.text}, logprobs))
        if choice.stop_type and choice.pieces[-1] is piece:
            chunks.append(self._chunk(choice, {}, finish=choice.finish_reason))
        return chunks

    def last(self, choices: Sequence[Choice]) -> list[Json]:
        return _usage_chunk(self._base, self._job, choices)

    def whole(self, choices: Sequence[Choice]) -> Json:
        entries = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.text},
                "logprobs": chat_logprobs(self._service, self._job, choice.pieces),
                "finish_reason": choice.finish_reason,
            }
            for choice in choices
        ]
        base = self._base | {"object": "chat.completion"}
        return base | {"choices": entries, "usage": usage(choices), "timings": timings(choices)}

    def _chunk(
        self, choice: Choice, delta: Json, logprobs: Json | None = None, finish: str | None = None
    ) -> Json:
        entry = {
            "index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish,
        }  # fmt: skip
        return self._base | {"choices": [entry]}


class CompletionShape:
    """`/v1/completions`."""

    done = "[DONE]"

    def __init__(self, service: Service, job: Job) -> None:
        self._service, self._job = service, job
        self._base = _base(service, "cmpl", "text_completion")
        self._offsets: dict[int, int] = {}

    def first(self, choice: Choice) -> list[Json]:
        return [self._chunk(choice, choice.prompt.text)] if self._job.echo else []

    def chunk(self, choice: Choice, piece: Piece) -> list[Json]:
        logprobs = self._logprobs(choice, [piece])
        chunks = []
        if piece.text or (logprobs and piece.token is not None):
            chunks.append(self._chunk(choice, piece.text, logprobs))
        if choice.stop_type and choice.pieces[-1] is piece:
            chunks.append(self._chunk(choice, "", finish=choice.finish_reason))
        return chunks

    def last(self, choices: Sequence[Choice]) -> list[Json]:
        return _usage_chunk(self._base, self._job, choices)

    def whole(self, choices: Sequence[Choice]) -> Json:
        entries = [
            {
                "text": (choice.prompt.text if self._job.echo else "") + choice.text,
                "index": choice.index,
                "logprobs": self._logprobs(choice, choice.pieces),
                "finish_reason": choice.finish_reason,
            }
            for choice in choices
        ]
        return self._base | {
            "choices": entries, "usage": usage(choices), "timings": timings(choices),
        }  # fmt: skip

    def _chunk(
        self, choice: Choice, text: str, logprobs: Json | None = None, finish: str | None = None
    ) -> Json:
        entry = {
            "text": text, "index": choice.index, "logprobs": logprobs, "finish_reason": finish,
        }  # fmt: skip
        return self._base | {"choices": [entry]}

    def _logprobs(self, choice: Choice, pieces: Sequence[Piece]) -> Json | None:
        """OpenAI's older form: lists side by side, with each token's place in the text."""
        if not self._job.logprobs:
            return None
        start = len(choice.prompt.text) if self._job.echo else 0
        offset = self._offsets.get(choice.index, start)
        lists: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for piece in pieces:
            if piece.token is None:
                continue
            text = self._service.token_text(piece.token)
            lists["tokens"].append(text)
            lists["token_logprobs"].append(piece.logprob)
            likeliest = {self._service.token_text(token): lp for token, lp in piece.top}
            lists["top_logprobs"].append(likeliest or None)
            lists["text_offset"].append(offset)
            offset += len(text)
        self._offsets[choice.index] = offset
        return lists


class NativeShape:
    """llama.cpp's `/completion`."""

    done = ""

    def __init__(self, service: Service, job: Job, fields: Sequence[str] = ()) -> None:
        self._service, self._job, self._fields = service, job, fields

    def first(self, choice: Choice) -> list[Json]:
        return []

    def chunk(self, choice: Choice, piece: Piece) -> list[Json]:
        chunks = []
        if piece.token is not None:
            counts = {
                "tokens_predicted": len(choice.tokens), "tokens_evaluated": len(choice.prompt.ids),
            }  # fmt: skip
            probabilities = self._probabilities([piece])
            chunks.append(
                {"index": choice.index, "content": piece.text, "tokens": [piece.token]}
                | {"stop": False, "id_slot": -1} | counts | probabilities
            )  # fmt: skip
        if choice.stop_type and choice.pieces[-1] is piece:
            rest = "" if piece.token is not None else piece.text
            chunks.append(self._end(choice, rest, []))
        return chunks

    def last(self, choices: Sequence[Choice]) -> list[Json]:
        return []

    def whole(self, choices: Sequence[Choice]) -> Any:
        wholes = [
            self._end(choice, choice.text, choice.tokens if self._job.return_tokens else [])
            | self._probabilities(choice.pieces)
            for choice in choices
        ]
        if self._fields:
            wholes = [_picked(whole, self._fields) for whole in wholes]
        return wholes[0] if len(wholes) == 1 else wholes

    def _end(self, choice: Choice, content: str, tokens: Sequence[int]) -> Json:
        full = len(choice.prompt.ids) + len(choice.tokens) >= self._service.limits.context
        return {
            "index": choice.index,
            "content": content,
            "tokens": list(tokens),
            "id_slot": -1,
            "stop": True,
            "model": self._service.name,
            "tokens_predicted": len(choice.tokens),
            "tokens_evaluated": len(choice.prompt.ids),
            "generation_settings": generation_settings(self._service, self._job),
            "prompt": self._prompt_text(choice),
            "has_new_line": "\n" in choice.text,
            "truncated": choice.stop_type == "limit" and full,
            "stop_type": choice.stop_type,
            "stopping_word": "",
            "tokens_cached": len(choice.prompt.ids) + len(choice.tokens),
            "timings": timings([choice]),
        }

    def _prompt_text(self, choice: Choice) -> str:
        prompt = choice.prompt
        special = [self._service.tokenizer.piece(token) for token in prompt.ids[: prompt.special]]
        text = self._service.text_within(prompt.ids[prompt.special :])
        return "".join(piece.strip() for piece in special) + text

    def _probabilities(self, pieces: Sequence[Piece]) -> Json:
        if not self._job.top_logprobs:
            return {}
        return {"completion_probabilities": _entries(self._service, pieces, with_ids=True)}


def generation_settings(service: Service, job: Job | None = None) -> Json:
    """The settings of a job, or the server's own, by llama.cpp's names."""
    sampling = service.defaults if job is None else job.sampling
    most = service.limits.max_new_tokens
    seed = service.seed if job is None else sampling.seed
    return {
        "n_predict": (-1 if most is None else most) if job is None else job.max_new_tokens,
        "seed": -1 if seed is None else seed,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "logit_bias": [{"token": token, "bias": bias} for token, bias in sampling.logit_bias],
        "stop": [] if job is None else list(job.stop),
        "n_probs": 0 if job is None else job.top_logprobs,
    }


def usage(choices: Sequence[Choice]) -> Json:
    """Counts of tokens; a prompt with several choices counts once."""
    prompts = {id(choice.prompt): len(choice.prompt.ids) for choice in choices}
    prompt, new = sum(prompts.values()), sum(len(choice.tokens) for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def timings(choices: Sequence[Choice]) -> Json:
    """llama.cpp's: reading the prompts, waiting included, then writing."""
    first = min(choice.first_token for choice in choices)
    rest = max(max(choice.seconds for choice in choices) - first, 0.0)
    counts = usage(choices)
    prompt, new = counts["prompt_tokens"], counts["completion_tokens"]
    return {
        "cache_n": 0,
        "prompt_n": prompt,
        "prompt_ms": 1e3 * first,
        "prompt_per_second": prompt / first if first else 0.0,
        "predicted_n": new,
        "predicted_ms": 1e3 * rest,
        "predicted_per_second": new / rest if rest else 0.0,
    }


def chat_logprobs(service: Service, job: Job, pieces: Sequence[Piece]) -> Json | None:
    """OpenAI's `logprobs` of a chat's choice."""
    if not job.logprobs:
        return None
    return {"content": _entries(service, pieces), "refusal": None}


def _entries(service: Service, pieces: Sequence[Piece], with_ids: bool = False) -> list[Json]:
    def entry(token: int, logprob: float | None) -> Json:
        text = service.token_text(token)
        own = {"id": token} if with_ids else {}
        return own | {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return [
        entry(piece.token, piece.logprob)
        | {"top_logprobs": [entry(token, logprob) for token, logprob in piece.top]}
        for piece in pieces
        if piece.token is not None
    ]


def _base(service: Service, prefix: str, kind: str) -> Json:
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": service.name,
        "system_fingerprint": FINGERPRINT,
    }


def _usage_chunk(base: Json, job: Job, choices: Sequence[Choice]) -> list[Json]:
    if not job.include_usage:
        return []
    return [base | {"choices": [], "usage": usage(choices), "timings": timings(choices)}]


def _picked(whole: Json, fields: Sequence[str]) -> Json:
    """Some fields of a response, those of objects in it by paths such as a/b."""
    picked: Json = {}
    for name in fields:
        value: Any = whole
        for part in name.split("/"):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            picked[name] = value
    return picked
