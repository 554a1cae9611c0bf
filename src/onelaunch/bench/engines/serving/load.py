"""Clients that stream completions, in one event loop."""

from __future__ import annotations

import asyncio
import json
import random
import time
from typing import NamedTuple

from onelaunch.errors import RunFailed

SECONDS = 600.0
_FIRST = b'"text":"'


class Answers(NamedTuple):
    """rate: tokens a second of all clients; firsts: each request's seconds to its first text."""

    rate: float
    firsts: list[float]


def run_load(
    port: int, clients: int, requests: int, prompt: int, tokens: int, seed: int
) -> Answers:
    """So many clients send so many requests each, one after the other, for `tokens` new tokens of
    prompts of `prompt`. Raises RunFailed for an answer that is not whole."""
    return asyncio.run(
        asyncio.wait_for(_load(port, clients, requests, prompt, tokens, seed), SECONDS)
    )


async def _load(
    port: int, clients: int, requests: int, prompt: int, tokens: int, seed: int
) -> Answers:
    start = time.perf_counter()
    results = await asyncio.gather(
        *(
            _client(port, requests, prompt, tokens, random.Random(f"{seed} {number}"))
            for number in range(clients)
        )
    )
    seconds = time.perf_counter() - start
    return Answers(clients * requests * tokens / seconds, [s for each in results for s in each])


async def _client(
    port: int, requests: int, prompt: int, tokens: int, rng: random.Random
) -> list[float]:
    return [
        await _request(port, [1, *(rng.randrange(300, 32000) for _ in range(prompt - 1))], tokens)
        for _ in range(requests)
    ]


async def _request(port: int, prompt: list[int], tokens: int) -> float:
    """The seconds to the first text of a request."""
    body = json.dumps(
        {
            "model": "any",
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    start = time.perf_counter()
    writer.write(head.encode() + body)
    first, data = 0.0, bytearray()
    while new := await reader.read(1 << 16):
        data += new
        if not first and _FIRST in data:
            first = time.perf_counter() - start
    writer.close()
    await writer.wait_closed()
    if b'"completion_tokens":%d' % tokens not in data:
        raise RunFailed(f"port {port}: not {tokens} tokens: ...{bytes(data[-300:])!r}")
    return first
