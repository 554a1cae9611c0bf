"""The description at /openapi.json is true: its paths, its fields, and what it promises."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.generation.server.serving import GatedEngine, Refused, serving  # isort: skip

from onelaunch.generation.server import requests as parsing
from onelaunch.generation.server.app import Server, resource

DOCUMENT = json.loads(resource("openapi.json"))
SCHEMAS = DOCUMENT["components"]["schemas"]
QUIETLY = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
ALIASES = {"/models", "/chat/completions", "/completions"}
BODIES = {
    path: methods["post"]["requestBody"]["content"]["application/json"]["schema"]
    for path, methods in DOCUMENT["paths"].items()
    if "post" in methods
}


@pytest.fixture(scope="module")
def client():
    with serving(GatedEngine(open_=True)) as client:
        yield client


def test_it_has_every_path_and_no_other():
    routes = {(route.path, method) for route in Server(None, None).routes()
              for method in route.methods - {"HEAD"}}  # fmt: skip
    described = {
        (path, method.upper()) for path, methods in DOCUMENT["paths"].items() for method in methods
    }
    assert {path for path, _ in routes - described} == ALIASES
    assert not described - routes
    operations = [
        m["operationId"] for methods in DOCUMENT["paths"].values() for m in methods.values()
    ]
    assert len(set(operations)) == len(operations)


def test_its_fields_are_those_that_are_read():
    source = Path(parsing.__file__).read_text(encoding="utf-8")
    read = set(re.findall(r'body\.(?:integer|number|boolean|table|first)\(\s*"(\w+)"', source))
    read |= set(re.findall(r'body\.fields\.get\("(\w+)"', source))
    names = ("ChatRequest", "CompletionRequest", "NativeRequest")
    described = {name for each in names for name in SCHEMAS[each]["properties"]}
    # refused unless they change nothing, or another name of one
    apart = {"best_of", "post_sampling_probs", "response_format", "tools", "tool_choice"}
    apart |= {"add_generation_prompt"}
    assert read - apart <= described
    assert described - read <= {"model", "n_predict", "max_tokens", "return_tokens",
                                "response_fields", "repetition_penalty"}  # fmt: skip


def resolved(schema):
    return SCHEMAS[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def conforms(value, schema) -> bool:
    """The part of JSON Schema that the document uses."""
    schema = resolved(schema)
    if "oneOf" in schema:
        return any(conforms(value, each) for each in schema["oneOf"])
    if "const" in schema:
        return bool(value == schema["const"])
    if "enum" in schema:
        return value in schema["enum"]
    kinds = {
        "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None),
        "integer": int, "number": (int, float),
    }  # fmt: skip
    names = schema.get("type", list(kinds))
    names = [names] if isinstance(names, str) else names
    if not any(isinstance(value, kinds[name]) for name in names):
        return False
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        return all(name in value for name in schema.get("required", [])) and all(
            conforms(value[name], each) for name, each in properties.items() if name in value
        )
    if isinstance(value, list):
        return all(conforms(each, schema.get("items", {})) for each in value)
    return True


def strategy(schema, depth=0):
    """Values that a schema allows, small enough to be answered at once."""
    schema = resolved(schema)
    if "oneOf" in schema:
        return st.one_of([strategy(each, depth) for each in schema["oneOf"]])
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if isinstance(kind, list):
        return st.one_of([strategy({**schema, "type": each}, depth) for each in kind])
    if kind == "integer":
        low, high = schema.get("minimum", 0), schema.get("maximum", 300)
        return st.integers(low, high) | st.integers(max(low, 0), min(high, 4))
    if kind == "number":
        return st.floats(schema.get("minimum"), schema.get("maximum"), allow_nan=False)
    if kind == "string":
        return st.text(min_size=schema.get("minLength", 0), max_size=8)
    if kind == "array":
        least = schema.get("minItems", 0)
        return st.lists(strategy(schema.get("items", {}), depth + 1), min_size=least, max_size=3)
    if kind == "object":
        required = set(schema.get("required", []))
        fields = {
            name: strategy(each, depth + 1) for name, each in schema.get("properties", {}).items()
        }
        optional = {name: each for name, each in fields.items() if name not in required}
        if "additionalProperties" in schema:
            return st.dictionaries(
                st.integers(0, 300).map(str), strategy(schema["additionalProperties"]), max_size=2
            )
        return st.fixed_dictionaries({name: fields[name] for name in required}, optional=optional)
    return {"boolean": st.booleans(), "null": st.none()}.get(kind, JUNK)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@st.composite
def bodies(draw):
    """A path and a body that its schema allows, but perhaps for one field."""
    path = draw(st.sampled_from(sorted(BODIES)))
    body = draw(strategy(BODIES[path]))
    if draw(st.booleans()):
        name = draw(st.sampled_from(sorted(resolved(BODIES[path])["properties"])))
        body = {**body, name: draw(JUNK)}
    return path, body


def check(client, path, body):
    responses = DOCUMENT["paths"][path]["post"]["responses"]
    if body.get("stream") is True:
        try:
            chunks = client.stream(path, body)
        except Refused as refusal:
            status, chunks = refusal.status, []
        else:
            status = 200
        assert status in (200, 400, 429), (path, body)
        assert not any("error" in chunk for chunk in chunks if chunk != "[DONE]"), (path, body)
        return
    status, answer, _ = client.send("POST", path, body)
    assert status in (200, 400, 429), (path, body, answer)
    content = responses[str(status)]["content"]["application/json"]["schema"]
    assert conforms(answer, content), (path, body, answer)


@settings(max_examples=40, **QUIETLY)
@given(bodies())
def test_any_request_is_answered_as_described(client, case):
    check(client, *case)


@pytest.mark.soak
@settings(
    max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
@given(bodies())
def test_ten_thousand_requests_are_answered_as_described(client, case):
    check(client, *case)


@pytest.mark.parametrize("path", sorted(set(DOCUMENT["paths"]) - set(BODIES) - {"/", "/metrics"}))
def test_what_is_read_is_as_described(client, path):
    status, answer, _ = client.send("GET", path)
    assert status == 200
    schema = DOCUMENT["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]
    assert conforms(answer, schema["schema"])
