"""Serve: a socket, uvicorn, and a graceful end."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from onelaunch.errors import BadInput, MissingExtra
from onelaunch.generation.server.batcher import Batcher
from onelaunch.generation.server.service import Service

MAX_CONNECTIONS = 2048
LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")


@dataclass(frozen=True)
class Address:
    """Where a server is reached, and by whom.

    port: 0 takes a free one. api_key: requests must have it. origins: web origins that may call
    it. grace_seconds: how long running requests may go on after a signal to end.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    origins: Sequence[str] = ()
    grace_seconds: float = 10.0


def serve(service: Service, address: Address, log: Callable[[str], None]) -> None:
    """Answer requests until SIGINT or SIGTERM; running ones may then end within the grace time.

    Raises BadInput where the address cannot be had, MissingExtra without the extra `serve`.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise MissingExtra(error.name or "uvicorn", "serve", "an HTTP server") from None
    from onelaunch.generation.server.app import Server, make_app

    with _listening(address) as listener, _batching(service, log) as batcher:
        host, port = listener.getsockname()[:2]
        name = f"[{host}]" if ":" in host else host
        hosts = LOOPBACK if address.host in LOOPBACK else ()
        app = make_app(Server(service, batcher), address.api_key, address.origins, hosts)
        config = uvicorn.Config(
            app,
            log_level="error",
            access_log=False,
            lifespan="off",
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=max(1, round(address.grace_seconds)),
        )
        log(f"serving {service.name} at http://{name}:{port}")
        uvicorn.Server(config).run([listener])


@contextlib.contextmanager
def _listening(address: Address) -> Iterator[socket.socket]:
    try:
        family, _, _, _, where = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.create_server(where[:2], family=family, backlog=MAX_CONNECTIONS)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"port={address.port}: cannot listen at {address.host}: {reason}") from error
    with listener:
        yield listener


@contextlib.contextmanager
def _batching(service: Service, log: Callable[[str], None]) -> Iterator[Batcher]:
    limits = service.limits
    batcher = Batcher(service.engine, limits.max_batch, limits.context, log)
    try:
        yield batcher
    finally:
        batcher.close()
