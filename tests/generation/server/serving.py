"""A server in this process, on a free port, and a client of the standard library."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("starlette")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("jinja2")

from onelaunch.checkpoints.tokenizers import BytesTokenizer  # noqa: E402
from onelaunch.checkpoints.weights import LoadedModel  # noqa: E402
from onelaunch.config import ModelConfig  # noqa: E402
from onelaunch.engines.engine import Request, Sampling, TokenEvent  # noqa: E402
from onelaunch.engines.reference import ReferenceEngine  # noqa: E402
from onelaunch.generation.server.app import Server, make_app  # noqa: E402
from onelaunch.generation.server.batcher import Batcher  # noqa: E402
from onelaunch.generation.server.service import Limits, make_service  # noqa: E402
from tests.engines.suite import weights_of  # noqa: E402

BYTES = BytesTokenizer()
CONFIG = ModelConfig(
    dim=16, n_layers=1, n_heads=2, hidden_dim=24, vocab_size=BYTES.vocab_size, max_seq_len=256
)
SECONDS = 60
"""A bound on every wait: only a failure reaches it."""


def tiny_model() -> tuple[LoadedModel, ReferenceEngine]:
    weights = weights_of(CONFIG)
    model = LoadedModel(CONFIG, weights, bos_id=BYTES.bos_id, stop_ids=BYTES.stop_ids)
    return model, ReferenceEngine(CONFIG, weights, "cpu", "float32", 1)


class GatedEngine:
    """An engine whose tokens are scripted, and which makes a step where `gate` allows one.

    script: the token ids of every sequence, again from the start at its end. broken: what steps
    raise.
    """

    config, max_batch = CONFIG, 4

    def __init__(self, script: Sequence[int] = (68,), open_: bool = False) -> None:
        self.script, self.gate, self.open = list(script), threading.Semaphore(0), open_
        self.broken: Exception | None = None
        self.cancelled: list[int] = []
        self.submitted: list[Request] = []
        self.left = threading.Condition()

    def describe(self) -> dict[str, Any]:
        return {"engine": "scripted", "calls": "one for many tokens"}

    def session(self, max_batch: int = 1, max_len: int | None = None) -> GatedSession:
        return GatedSession(self)


class GatedSession:
    def __init__(self, engine: GatedEngine) -> None:
        self._engine = engine
        self._growing: dict[int, tuple[Request, int]] = {}

    def submit(self, request: Request) -> None:
        self._engine.submitted.append(request)
        self._growing[request.id] = request, 0

    def step(self, seconds: float = 0.0) -> list[TokenEvent]:
        engine = self._engine
        # for a moment: what was cancelled meanwhile is noticed between steps
        if not engine.open and not engine.gate.acquire(timeout=0.01):
            return []
        if engine.broken is not None:
            raise engine.broken
        events = []
        for id_, (request, n) in list(self._growing.items()):
            token = engine.script[n % len(engine.script)]
            end = "length" if n + 1 >= request.max_new_tokens else None
            if token in request.stop_ids:
                events.append(TokenEvent(id_, None, None, "stop"))
                del self._growing[id_]
                continue
            events.append(TokenEvent(id_, token, None, end))
            self._growing[id_] = request, n + 1
            if end:
                del self._growing[id_]
        return events

    def cancel(self, id: int) -> None:
        with self._engine.left:
            self._growing.pop(id, None)
            self._engine.cancelled.append(id)
            self._engine.left.notify_all()

    def close(self) -> None:
        self._growing.clear()


class Refused(Exception):
    """A stream that did not begin."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text}")
        self.status = status


class Client:
    """Requests to a server at a port of this machine."""

    def __init__(self, port: int, batcher: Batcher) -> None:
        self.port, self.batcher = port, batcher

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)

    def send(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, body (JSON where it is) and headers."""
        with contextlib.closing(self.connect()) as connection:
            raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, path, raw, headers or {})
            response = connection.getresponse()
            data = response.read()
            kind = response.headers.get("content-type", "")
            parsed = json.loads(data) if kind.startswith("application/json") else data.decode()
            return response.status, parsed, {k.lower(): v for k, v in response.getheaders()}

    def post(self, path: str, body: Any) -> Any:
        """The body of a response with status 200."""
        status, data, _ = self.send("POST", path, body)
        assert status == 200, data
        return data

    def stream(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The chunks of a stream; "[DONE]" is one."""
        with contextlib.closing(self.connect()) as connection:
            connection.request("POST", path, json.dumps({**body, "stream": True}).encode())
            response = connection.getresponse()
            text = response.read().decode()
            if response.status != 200:
                raise Refused(response.status, text)
            assert response.headers["content-type"].startswith("text/event-stream")
        events = text.split("\n\n")
        assert events.pop() == ""
        assert all(event.startswith("data: ") for event in events)
        bodies = [event.removeprefix("data: ") for event in events]
        return [each if each == "[DONE]" else json.loads(each) for each in bodies]


@contextlib.contextmanager
def serving(
    engine: Any = None,
    *,
    limits: Limits | None = None,
    template: str | None = None,
    seed: int | None = None,
    defaults: Sampling | None = None,
    **app: Any,
) -> Iterator[Client]:
    """A client of a server of a tiny random model, or of another engine."""
    model, own = tiny_model()
    limits = limits or Limits(0, 4)
    service = make_service(
        model, engine or own, BYTES, limits, name="tiny", template=template, seed=seed,
        defaults=defaults,
    )  # fmt: skip
    batcher = Batcher(service.engine, service.limits.max_batch, service.limits.context)
    config = uvicorn.Config(
        make_app(Server(service, batcher), **app), port=0, log_level="error", lifespan="off"
    )
    server = uvicorn.Server(config)
    started = threading.Event()
    startup = server.startup

    async def startup_and_say(sockets: Any = None) -> None:
        await startup(sockets)
        started.set()

    server.startup = startup_and_say
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert started.wait(SECONDS)
        yield Client(server.servers[0].sockets[0].getsockname()[1], batcher)
    finally:
        server.should_exit = server.force_exit = True
        if isinstance(engine, GatedEngine):
            engine.open = True
        thread.join(SECONDS)
        batcher.close()
        torch.set_num_threads(1)


def with_limits(**changes: Any) -> Limits:
    return replace(Limits(0, 4), **changes)
