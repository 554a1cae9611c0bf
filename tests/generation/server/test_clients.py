"""Clients that leave, do not read, or are too many; engines that fail."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from onelaunch.errors import RunFailed
from tests.generation.server.serving import SECONDS, GatedEngine, serving, with_limits

TEXT = "/v1/completions"


def begin(client, body, stream=True):
    """A request sent, and its socket."""
    raw = json.dumps({**body, "stream": stream}).encode()
    connection = socket.create_connection(("127.0.0.1", client.port), timeout=SECONDS)
    head = f"POST {TEXT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(raw)}\r\n\r\n"
    connection.sendall(head.encode() + raw)
    return connection


def wait_for(condition, what):
    """Until a state of another thread is there; a bound that only a failure reaches."""
    pause = threading.Event()
    for _ in range(SECONDS * 100):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError(what)


def read_until(connection, needle):
    data = b""
    while needle not in data:
        new = connection.recv(1 << 16)
        assert new, data
        data += new
    return data


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request_and_no_other(stream):
    engine = GatedEngine()
    with serving(engine) as client, ThreadPoolExecutor(1) as threads:
        staying = threads.submit(client.post, TEXT, {"prompt": "b", "max_tokens": 4})
        wait_for(lambda: len(engine.submitted) == 1, "the first request")
        leaving = begin(client, {"prompt": "a", "max_tokens": 100}, stream)
        wait_for(lambda: len(engine.submitted) == 2, "the second request")
        engine.gate.release()
        if stream:
            read_until(leaving, b"data: ")
        leaving.close()
        with engine.left:
            assert engine.left.wait_for(lambda: engine.cancelled, SECONDS)
        assert engine.cancelled == [1]
        engine.gate.release(4)
        assert staying.result(SECONDS)["choices"][0]["text"] == "A" * 4
        wait_for(lambda: client.batcher.slots == [None] * 4, "free slots")


def test_one_that_waits_and_leaves_never_starts():
    engine = GatedEngine()
    with serving(engine, limits=with_limits(max_batch=1)) as client:
        first = begin(client, {"prompt": "a", "max_tokens": 2})
        wait_for(lambda: len(engine.submitted) == 1, "the first request")
        second = begin(client, {"prompt": "b", "max_tokens": 2})
        wait_for(lambda: client.batcher.waiting == 1, "one that waits")
        second.close()
        wait_for(lambda: client.batcher.waiting == 0, "none that waits")
        engine.gate.release(2)
        read_until(first, b"[DONE]")
        first.close()
        assert len(engine.submitted) == 1


def test_half_a_request_is_no_error_of_the_server():
    logged = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = logged.append
    logger = logging.getLogger("uvicorn.error")
    with serving(GatedEngine(open_=True)) as client:
        logger.addHandler(handler)
        try:
            for i in range(20):
                with socket.create_connection(("127.0.0.1", client.port), timeout=SECONDS) as half:
                    head = f"POST {TEXT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 50\r\n"
                    half.sendall(head.encode() + (b"" if i % 2 else b'\r\n{"prompt"'))
            for _ in range(3):
                assert client.post(TEXT, {"prompt": "a", "max_tokens": 1})
        finally:
            logger.removeHandler(handler)
    assert not logged


def test_all_of_more_requests_than_slots_are_answered():
    engine = GatedEngine(open_=True)
    with serving(engine, limits=with_limits(max_batch=2)) as client, ThreadPoolExecutor(9) as pool:
        bodies = [{"prompt": "a", "max_tokens": 1 + i} for i in range(9)]
        answers = list(pool.map(lambda body: client.post(TEXT, body), bodies))
    assert [a["usage"]["completion_tokens"] for a in answers] == list(range(1, 10))


def test_a_full_queue_refuses_and_says_when_to_come_again():
    engine = GatedEngine()
    with serving(engine, limits=with_limits(max_batch=1, max_queue=1)) as client:
        running = [begin(client, {"prompt": "a", "max_tokens": 1})]
        wait_for(lambda: len(engine.submitted) == 1, "the first request")
        running.append(begin(client, {"prompt": "a", "max_tokens": 1}))
        wait_for(lambda: client.batcher.waiting == 1, "one that waits")
        status, body, headers = client.send("POST", TEXT, {"prompt": "a"})
        assert (status, body["error"]["code"]) == (429, "queue_full")
        assert int(headers["retry-after"]) >= 1
        engine.open = True
        for connection in running:
            read_until(connection, b"[DONE]")
            connection.close()
        assert client.post(TEXT, {"prompt": "a", "max_tokens": 1})


def test_more_choices_than_the_server_can_hold_are_refused():
    with serving(GatedEngine(), limits=with_limits(max_batch=1, max_queue=1)) as client:
        assert client.send("POST", TEXT, {"prompt": "a", "n": 3})[0] == 429


def test_a_request_that_takes_too_long_ends():
    engine = GatedEngine()
    with serving(engine, limits=with_limits(timeout_seconds=0.05)) as client:
        status, body, _ = client.send("POST", TEXT, {"prompt": "a"})
        assert (status, body["error"]["type"]) == (504, "timeout_error")
        (event,) = client.stream(TEXT, {"prompt": "a"})
        assert event["error"]["type"] == "timeout_error"
        wait_for(lambda: client.batcher.slots == [None] * 4, "free slots")


def test_a_failing_engine_is_said_and_then_unhealthy():
    engine = GatedEngine(open_=True)
    with serving(engine) as client:
        engine.broken = RunFailed("the logits are not finite")
        status, body, _ = client.send("POST", TEXT, {"prompt": "a"})
        assert (status, body["error"]["message"]) == (500, "the logits are not finite")
        engine.broken = None
        assert client.post(TEXT, {"prompt": "a", "max_tokens": 1})
        assert client.send("GET", "/health")[0] == 200
        engine.broken = RunFailed("the logits are not finite")
        for _ in range(3):
            (event,) = client.stream(TEXT, {"prompt": "a"})
            assert event["error"]["type"] == "server_error"
        assert client.send("GET", "/health")[0] == 503
        assert client.send("POST", TEXT, {"prompt": "a"})[0] == 503


def test_slots_and_metrics_say_what_runs():
    engine = GatedEngine()
    with serving(engine, limits=with_limits(max_batch=2)) as client:
        running = begin(client, {"prompt": "a", "max_tokens": 3})
        wait_for(lambda: len(engine.submitted) == 1, "the request")
        slots = client.send("GET", "/slots")[1]
        assert [slot["is_processing"] for slot in slots] == [True, False]
        assert "onelaunch_requests_processing 1\n" in client.send("GET", "/metrics")[1]
        engine.open = True
        read_until(running, b"[DONE]")
        running.close()
        text = client.send("GET", "/metrics")[1]
        assert "onelaunch_tokens_predicted_total 3\n" in text
        assert "onelaunch_prompt_tokens_total 2\n" in text
        assert "onelaunch_requests_processing 0\n" in text


def test_nothing_is_left_of_many_requests():
    with serving(GatedEngine(open_=True)) as client, ThreadPoolExecutor(8) as pool:
        client.post(TEXT, {"prompt": "a", "max_tokens": 2})
        threads = threading.active_count()

        def one(i):
            body = {"prompt": "a", "max_tokens": 200 if i % 3 == 0 else 3}
            with contextlib.closing(begin(client, body)) as connection:
                read_until(connection, b"data: " if i % 3 == 0 else b"[DONE]")

        list(pool.map(one, range(60)))
        wait_for(lambda: client.batcher.slots == [None] * 4, "free slots")
        assert client.batcher.waiting == 0
        assert threading.active_count() <= threads + 8
