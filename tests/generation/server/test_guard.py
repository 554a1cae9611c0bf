"""Who may use a server: API keys, origins, host names; bodies and paths that are wrong."""

from __future__ import annotations

import http.client

import pytest

from tests.generation.server.serving import GatedEngine, serving  # isort: skip

from onelaunch.generation.server.app import MAX_BODY_BYTES, PUBLIC
from onelaunch.generation.server.run import LOOPBACK

TEXT = "/v1/completions"
BODY = {"prompt": "a", "max_tokens": 1}


@pytest.fixture(scope="module")
def guarded():
    with serving(
        GatedEngine(open_=True), api_key="secret", hosts=LOOPBACK, origins=["https://a.example"]
    ) as client:
        yield client


@pytest.mark.parametrize(
    "headers", [{"Authorization": "Bearer secret"}, {"X-Api-Key": "secret"}], ids=["bearer", "x"]
)
def test_with_the_key_requests_are_answered(guarded, headers):
    assert guarded.send("POST", TEXT, BODY, headers)[0] == 200
    assert guarded.send("GET", "/slots", headers=headers)[0] == 200


@pytest.mark.parametrize("value", ["", "Bearer", "Bearer wrong", "Bearer secret2", "secre"])
def test_without_the_key_only_public_paths_are(guarded, value):
    headers = {"Authorization": value} if value else {}
    status, body, _ = guarded.send("POST", TEXT, BODY, headers)
    assert (status, body["error"]["type"]) == (401, "authentication_error")
    assert guarded.send("GET", "/props", headers=headers)[0] == 401
    assert all(guarded.send("GET", path, headers=headers)[0] == 200 for path in PUBLIC)


def test_pages_of_other_origins_may_not_call_unless_allowed(guarded):
    def status(origin):
        return guarded.send("GET", "/health", headers={"Origin": origin})[0]

    assert status("https://evil.example") == status("null") == 403
    assert status("https://a.example") == status(f"http://127.0.0.1:{guarded.port}") == 200


def test_a_preflight_needs_no_key_and_names_the_origin(guarded):
    headers = {
        "Origin": "https://a.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    status, _, answer = guarded.send("OPTIONS", TEXT, headers=headers)
    assert (status, answer["access-control-allow-origin"]) == (200, "https://a.example")
    other = guarded.send("OPTIONS", TEXT, headers=headers | {"Origin": "https://b.example"})
    assert "access-control-allow-origin" not in other[2]


@pytest.mark.parametrize(
    ("host", "status"),
    [("evil.example", 403), ("evil.example:80", 403), ("localhost", 200), ("[::1]:8080", 200)],
)
def test_the_server_goes_by_its_own_name_alone(guarded, host, status):
    assert guarded.send("GET", "/health", headers={"Host": host})[0] == status


@pytest.fixture(scope="module")
def client():
    with serving(GatedEngine(open_=True)) as client:
        yield client


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", TEXT, 405), ("POST", "/health", 405)],
)
def test_other_paths_and_methods_are_refused_in_json(client, method, path, status):
    found, body, _ = client.send(method, path, b"" if method == "POST" else None)
    assert found == status
    assert path in body["error"]["message"]


def test_a_body_that_is_too_large_is_refused_unread(client):
    connection = client.connect()
    connection.putrequest("POST", TEXT)
    connection.putheader("Content-Length", str(MAX_BODY_BYTES + 1))
    connection.endheaders(b"{")
    response = connection.getresponse()
    assert response.status == 400
    assert b"larger than" in response.read()
    connection.close()


def test_a_body_that_grows_too_large_is_refused(client):
    connection = client.connect()

    def parts():
        for _ in range(MAX_BODY_BYTES // (1 << 20) + 1):
            yield b" " * (1 << 20)

    try:
        connection.request("POST", TEXT, parts(), encode_chunked=True)
        assert connection.getresponse().status == 400
    except (BrokenPipeError, ConnectionResetError, http.client.RemoteDisconnected):
        pass  # refused while it was still being sent
    connection.close()


def test_tokens_and_text(client):
    ids = client.post("/tokenize", {"content": "h\u00e9"})["tokens"]
    assert client.post("/detokenize", {"tokens": ids}) == {"content": "h\u00e9"}
    special = client.post("/tokenize", {"content": "h", "add_special": True})["tokens"]
    assert special == [1, *ids[:1]]
    pieces = client.post("/tokenize", {"content": "h", "with_pieces": True})["tokens"]
    assert pieces == [{"id": ids[0], "piece": "h"}]
    assert client.post("/tokenize", {}) == {"tokens": []}
    assert client.send("POST", "/detokenize", {"tokens": ["x"]})[0] == 400
    assert client.send("POST", "/detokenize", {"tokens": [-1]})[0] == 400


def test_the_model_and_its_settings(client):
    (model,) = client.send("GET", "/v1/models")[1]["data"]
    assert (model["id"], model["object"]) == ("tiny", "model")
    props = client.send("GET", "/props")[1]
    assert props["total_slots"] == 4
    assert props["default_generation_settings"]["params"]["temperature"] == 1.0
    page = client.send("GET", "/")
    assert page[0] == 200
    assert page[1].startswith("<!doctype html>")
    assert "default-src 'none'" in page[2]["content-security-policy"]
