"""The routes: OpenAI's API, what llama.cpp's server has besides, and a page."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from onelaunch.errors import OnelaunchError
from onelaunch.generation.server.batcher import Batcher
from onelaunch.generation.server.body import Body, InvalidRequest
from onelaunch.generation.server.metrics import Metrics
from onelaunch.generation.server.requests import (
    Job,
    chat_job,
    chat_prompt,
    completion_job,
    native_job,
)
from onelaunch.generation.server.responses import (
    ChatShape,
    CompletionShape,
    NativeShape,
    Shape,
    generation_settings,
)
from onelaunch.generation.server.running import RunningJob
from onelaunch.generation.server.service import FINGERPRINT, Service
from onelaunch.generation.server.streams import EventStream, JsonResponse, encode, unless_gone

MAX_BODY_BYTES = 8 << 20
BODY_SECONDS = 60.0
RETRY_SECONDS = 1
CLIENT_LEFT = 499
"""The status, which has no reader, of a request whose client has left; nginx's."""
PUBLIC = ("/", "/health", "/v1/models", "/models", "/openapi.json")
"""Paths that need no API key, as in llama.cpp's server."""

Handler = Callable[[Request], Awaitable[Response]]


class Server:
    """The endpoints of one service."""

    def __init__(self, service: Service, batcher: Batcher) -> None:
        self._service, self._batcher, self.metrics = service, batcher, Metrics()

    def routes(self) -> list[Route]:
        """All routes; those of OpenAI's API also without /v1, as llama.cpp has them."""
        table: list[tuple[str, str, Handler]] = [
            ("GET", "/", self.page),
            ("GET", "/health", self.health),
            ("GET", "/v1/models", self.models),
            ("GET", "/models", self.models),
            ("POST", "/v1/chat/completions", self.chat),
            ("POST", "/chat/completions", self.chat),
            ("POST", "/v1/completions", self.completions),
            ("POST", "/completion", self.native),
            ("POST", "/completions", self.native),
            ("POST", "/tokenize", self.tokenize),
            ("POST", "/detokenize", self.detokenize),
            ("POST", "/apply-template", self.apply_template),
            ("GET", "/props", self.props),
            ("GET", "/slots", self.slots),
            ("GET", "/metrics", self.prometheus),
            ("GET", "/openapi.json", self.openapi),
        ]
        return [Route(path, handler, methods=[method]) for method, path, handler in table]

    # ---- text

    async def chat(self, request: Request) -> Response:
        """OpenAI's chat completions."""
        body = await read(request)
        job = chat_job(self._service, body)
        return await self._answer(request, job, ChatShape(self._service, job))

    async def completions(self, request: Request) -> Response:
        """OpenAI's completions."""
        body = await read(request)
        job = completion_job(self._service, body)
        return await self._answer(request, job, CompletionShape(self._service, job))

    async def native(self, request: Request) -> Response:
        """llama.cpp's completion."""
        body = await read(request)
        job = native_job(self._service, body)
        fields = body.fields.get("response_fields", [])
        if not isinstance(fields, list) or not all(isinstance(name, str) for name in fields):
            body.refuse("response_fields", "must be a list of names")
        return await self._answer(request, job, NativeShape(self._service, job, fields))

    async def _answer(self, request: Request, job: Job, shape: Shape) -> Response:
        self._check_room(len(job.prompts) * job.n)
        self.metrics.requests += 1
        running = RunningJob(self._service, self._batcher, job)
        if job.stream:
            return EventStream(self._events(running, shape))
        done = await unless_gone(request, self._finish(running))
        return (
            JsonResponse(shape.whole(running.choices))
            if done
            else Response(status_code=CLIENT_LEFT)
        )

    def _check_room(self, sequences: int) -> None:
        limits, batcher = self._service.limits, self._batcher
        if batcher.broken:
            raise InvalidRequest(batcher.broken, status=503, kind="server_error")
        busy = sum(slot is not None for slot in batcher.slots)
        if busy + batcher.waiting + sequences > limits.max_batch + limits.max_queue:
            raise InvalidRequest(
                f"the queue is full: {batcher.waiting} sequences wait; try again later",
                status=429,
                kind="rate_limit_error",
                code="queue_full",
                headers={"retry-after": str(RETRY_SECONDS)},
            )

    async def _finish(self, running: RunningJob) -> bool:
        try:
            async for _ in running.updates():
                pass
        except OnelaunchError:
            self.metrics.failed += 1
            raise
        finally:
            self.metrics.count(running.choices)
        return True

    async def _events(self, running: RunningJob, shape: Shape) -> AsyncIterator[bytes]:
        try:
            first = [chunk for choice in running.choices for chunk in shape.first(choice)]
            if first:
                yield _events(first)
            async for pieces in running.updates():
                chunks = [chunk for each in pieces for chunk in shape.chunk(*each)]
                if chunks:
                    yield _events(chunks)
            last = _events(shape.last(running.choices))
            yield last + (f"data: {shape.done}\n\n".encode() if shape.done else b"")
        except OnelaunchError as error:
            self.metrics.failed += 1
            yield _events([as_invalid(error).body()])
        finally:
            self.metrics.count(running.choices)

    # ---- tokens and templates

    async def tokenize(self, request: Request) -> Response:
        """Text to token ids, with their pieces where they are wanted."""
        body, tokenizer = await read(request), self._service.tokenizer
        text = body.string("content")
        ids = tokenizer.encode(text, bos=body.boolean("add_special")) if text else []
        if body.boolean("with_pieces"):
            pieces = [{"id": id_, "piece": self._service.token_text(id_)} for id_ in ids]
            return JsonResponse({"tokens": pieces})
        return JsonResponse({"tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        """Token ids to text."""
        body = await read(request)
        ids = body.fields.get("tokens", [])
        if not isinstance(ids, list) or not all(type(id_) is int and id_ >= 0 for id_ in ids):
            body.refuse("tokens", "must be a list of token ids")
        return JsonResponse({"content": self._service.tokenizer.decode(ids)})

    async def apply_template(self, request: Request) -> Response:
        """Messages as the chat template writes them."""
        return JsonResponse({"prompt": chat_prompt(self._service, await read(request))})

    # ---- the server

    async def health(self, request: Request) -> Response:
        """200 while requests can be answered."""
        if self._batcher.broken:
            raise InvalidRequest(self._batcher.broken, status=503, kind="server_error")
        return JsonResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        """The one model."""
        config = self._service.engine.config
        model = {
            "id": self._service.name,
            "object": "model",
            "created": 0,
            "owned_by": "onelaunch",
            "meta": {
                "n_vocab": config.vocab_size,
                "n_ctx_train": config.max_seq_len,
                "n_embd": config.dim,
                "n_params": config.n_params,
            },
        }
        return JsonResponse({"object": "list", "data": [model]})

    async def props(self, request: Request) -> Response:
        """The server's settings, by llama.cpp's names."""
        service = self._service
        settings = {
            "n_ctx": service.limits.context, "params": generation_settings(service),
        }  # fmt: skip
        tokenizer = service.tokenizer
        bos, eos = tokenizer.bos_id, tokenizer.eos_id
        return JsonResponse(
            {
                "default_generation_settings": settings,
                "total_slots": service.limits.max_batch,
                "model_alias": service.name,
                "model_path": str(service.model.source or ""),
                "chat_template": service.template.source,
                "bos_token": "" if bos is None else tokenizer.piece(bos).strip(),
                "eos_token": "" if eos is None else tokenizer.piece(eos).strip(),
                "build_info": FINGERPRINT,
                "engine": await asyncio.wrap_future(self._batcher.describe()),
            }
        )

    async def slots(self, request: Request) -> Response:
        """The sequences that can grow at once, and which do."""
        context = self._service.limits.context
        return JsonResponse(
            [
                {"id": i, "n_ctx": context, "is_processing": task is not None}
                | ({} if task is None else {"id_task": task})
                for i, task in enumerate(self._batcher.slots)
            ]
        )

    async def prometheus(self, request: Request) -> Response:
        """Counters for Prometheus."""
        text = self.metrics.text(self._batcher)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def openapi(self, request: Request) -> Response:
        """This API's description."""
        return Response(resource("openapi.json"), media_type="application/json")

    async def page(self, request: Request) -> Response:
        """A page to chat on."""
        policy = "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'unsafe-inline'"
        headers = {"content-security-policy": f"{policy}; connect-src 'self'; base-uri 'none'"}
        return Response(resource("page.html"), media_type="text/html", headers=headers)


def make_app(
    server: Server,
    api_key: str | None = None,
    origins: Sequence[str] = (),
    hosts: Sequence[str] = (),
) -> Starlette:
    """The application.

    api_key: what requests must have as a bearer token, but for `PUBLIC`. origins: web origins that
    may use the API (CORS), "*" for all. hosts: names by which requests may call the server, all
    if empty: a page elsewhere whose name is made to lead here (DNS rebinding) calls it by its own.
    """
    middleware = []
    if origins:
        middleware.append(
            Middleware(
                CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST"],
                allow_headers=["*"],
            )
        )  # fmt: skip
    middleware.append(Middleware(_Guard, api_key=api_key, origins=origins, hosts=hosts))
    return Starlette(
        routes=server.routes(),
        middleware=middleware,
        exception_handlers={
            OnelaunchError: _on_error,  # type: ignore[dict-item]
            HTTPException: _on_http_error,  # type: ignore[dict-item]
            Exception: _on_bug,
        },
    )


async def read(request: Request) -> Body:
    """The JSON body of a request; raises InvalidRequest."""
    too_large = InvalidRequest(f"the body is larger than {MAX_BODY_BYTES:,} bytes")
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length) > MAX_BODY_BYTES:
        raise too_large
    raw = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                raw += part
                if len(raw) > MAX_BODY_BYTES:
                    raise too_large
    except TimeoutError:
        raise InvalidRequest("the body did not come in time", status=408) from None
    except ClientDisconnect:
        raise InvalidRequest("the client has left", status=CLIENT_LEFT) from None
    return Body.parse(bytes(raw))


def as_invalid(error: OnelaunchError) -> InvalidRequest:
    """Any error as one with a status: 500 where it is not the request's fault."""
    if isinstance(error, InvalidRequest):
        return error
    if error.exit_code == 2:
        return InvalidRequest(str(error))
    return InvalidRequest(str(error), status=500, kind="server_error")


def resource(name: str) -> bytes:
    """A file of this folder."""
    return files("onelaunch.generation.server").joinpath(name).read_bytes()


def _events(chunks: Sequence[Any]) -> bytes:
    return b"".join(b"data: " + encode(chunk) + b"\n\n" for chunk in chunks)


def _respond(error: InvalidRequest) -> Response:
    return JsonResponse(error.body(), error.status, error.headers)


async def _on_error(request: Request, error: OnelaunchError) -> Response:
    return _respond(as_invalid(error))


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    path, kind = request.url.path, "not_found_error" if error.status_code == 404 else None
    message = {404: f"no such path: {path}", 405: f"{path} has no {request.method}"}
    return _respond(
        InvalidRequest(
            message.get(error.status_code, str(error.detail)),
            status=error.status_code,
            kind=kind or "invalid_request_error",
            headers=error.headers,
        )
    )


async def _on_bug(request: Request, error: Exception) -> Response:
    return _respond(InvalidRequest("an internal error", status=500, kind="server_error"))


class _Guard:
    """Refuses requests without the API key, by another name than the server's, or of a page of
    another origin."""

    def __init__(
        self, app: ASGIApp, api_key: str | None, origins: Sequence[str], hosts: Sequence[str]
    ) -> None:
        self._app, self._api_key = app, api_key
        self._origins, self._hosts = frozenset(origins), frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            refusal = self._refusal(Request(scope))
            if refusal is not None:
                await _respond(refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, request: Request) -> InvalidRequest | None:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        name = host.rpartition(":")[0] if ":" in host.rpartition("]")[2] else host
        if self._hosts and name not in self._hosts:
            return InvalidRequest(f"not the name of this server: {name}", status=403)
        allowed = origin in (None, f"http://{host}", f"https://{host}")
        if not allowed and not self._origins & {origin, "*"}:
            return InvalidRequest(f"pages of {origin} may not use this server", status=403)
        if self._api_key is None or request.url.path in PUBLIC or request.method == "OPTIONS":
            return None
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        keys = (bearer, request.headers.get("x-api-key", ""))
        if any(hmac.compare_digest(key.encode(), self._api_key.encode()) for key in keys):
            return None
        return InvalidRequest(
            "the API key is missing or wrong: send it as Authorization: Bearer KEY",
            status=401,
            kind="authentication_error",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
