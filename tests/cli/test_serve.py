"""`onelaunch serve` as a process: the line that says where, signals, refusals."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest

from onelaunch.api import save
from onelaunch.checkpoints.tokenizers import BytesTokenizer
from onelaunch.checkpoints.weights import LoadedModel
from onelaunch.config import ModelConfig
from tests.engines.suite import weights_of

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("jinja2")

CONFIG = ModelConfig(
    dim=16, n_layers=1, n_heads=2, hidden_dim=24, vocab_size=259, max_seq_len=4096,
    rope_layout="interleaved",
)  # fmt: skip
SECONDS = 120


@pytest.fixture
def model(tmp_path) -> str:
    path = tmp_path / "tiny.bin"
    save(LoadedModel(CONFIG, weights_of(CONFIG)), path, "llama2c")
    BytesTokenizer().save(tmp_path, "tiny.")
    return str(path)


def start(*argv: str, **environment: str) -> tuple[subprocess.Popen, int]:
    """A server, and its port, once it listens."""
    process = subprocess.Popen(
        [sys.executable, "-m", "onelaunch", "serve", *argv, "--port", "0", "--engine", "reference"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | environment,
    )  # fmt: skip
    line = process.stderr.readline().decode()
    found = re.fullmatch(r"serving tiny at http://127\.0\.0\.1:(\d+)\n", line)
    assert found, line + process.stderr.read().decode()
    return process, int(found[1])


def stream(port: int, tokens: int) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    body = {"prompt": "a", "max_tokens": tokens, "stream": True, "ignore_eos": True}
    connection.request("POST", "/v1/completions", json.dumps(body).encode())
    return connection, connection.getresponse()


@pytest.mark.extended
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_requests_end(model, number):
    process, port = start(model, "--grace", "100")
    connection, response = stream(port, 300)
    assert response.readline().startswith(b"data: ")
    process.send_signal(number)
    assert response.read().endswith(b"data: [DONE]\n\n")
    connection.close()
    out, error = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + number
    assert (out, error) == (b"", b"")
    with socket.socket() as other:
        assert other.connect_ex(("127.0.0.1", port))


@pytest.mark.extended
def test_what_does_not_end_in_its_grace_time_is_cancelled(model):
    process, port = start(model, "--grace", "1")
    connection, response = stream(port, 4000)
    assert response.readline().startswith(b"data: ")
    process.terminate()
    ended = threading.Event()

    def read():
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            response.read()
        ended.set()

    threading.Thread(target=read, daemon=True).start()
    process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + signal.SIGTERM
    assert ended.wait(SECONDS)
    connection.close()


def test_bad_input_is_one_line_and_exit_2(model, onelaunch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases = [
            (("--port", port), f"--port {port}: cannot listen at 127.0.0.1"),
            (("--port", 0, "--host", "no.such.host.invalid"), "--port 0: cannot listen at no.such"),
            (("--context", 5000), "--context 5000: the model's context is 4096"),
            (("--temperature", -1), "--temperature -1.0: must be 0"),
            (("--api-key", ""), "--api-key is empty"),
            (("--chat-template", tmp_path / "none"), "none: cannot read"),
        ]
        (tmp_path / "wrong.jinja").write_text("{% for %}")
        cases.append((("--chat-template", tmp_path / "wrong.jinja"), "does not compile"))
        for argv, message in cases:
            code, out, error = onelaunch("serve", model, "--engine", "reference", *argv)
            assert (code, out) == (2, ""), argv
            assert message in error, argv
            assert error.count("\n") == 1
