"""A tokenizer.json that makes texts without end is refused unrun; a Rust panic prints nothing."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.tokenizer_files import json_tokenizer, token, write_json_tokenizer, write_model

from onelaunch.checkpoints import tokenizer_growth
from onelaunch.checkpoints.foreign_stderr import without_stderr
from onelaunch.checkpoints.tokenizer_growth import MAX_SCALE, MAX_STEPS, check_growth
from onelaunch.checkpoints.tokenizers import load_tokenizer
from onelaunch.errors import BadInput

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}


def replace(times: int, pattern: dict[str, str] | None = None) -> dict[str, Any]:
    pattern = pattern or {"String": "a"}
    return {"type": "Replace", "pattern": pattern, "content": "a" * times}


def sequence(kind: str, *steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", kind: list(steps)}


def template(*single: dict[str, Any], ids: int = 1) -> dict[str, Any]:
    return {
        "type": "TemplateProcessing",
        "single": list(single),
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"x": {"id": "x", "ids": [1] * ids, "tokens": ["x"] * ids}},
    }


def charsmap(*replacements: bytes) -> str:
    trie = b"\0" * 8
    raw = len(trie).to_bytes(4, "little") + trie + b"\0".join(replacements)
    return base64.b64encode(raw).decode()


A = {"Sequence": {"id": "A", "type_id": 0}}
X = {"SpecialToken": {"id": "x", "type_id": 0}}

HOSTILE: dict[str, dict[str, Any]] = {
    "five replacements": {"normalizer": sequence("normalizers", *[replace(1000)] * 5)},
    "without a type": {
        "normalizer": {"normalizers": [{**replace(1000), "type": "Sequence"}, replace(1000)]}
    },
    "an expression": {"normalizer": replace(MAX_SCALE, {"Regex": ""})},
    "an empty pattern": {"normalizer": replace(MAX_SCALE, {"String": ""})},
    "nested": {
        "normalizer": sequence("normalizers", sequence("normalizers", replace(40)), replace(40))
    },
    "over two parts": {
        "normalizer": replace(MAX_SCALE // 2),
        "pre_tokenizer": sequence("pretokenizers", BYTE_LEVEL, BYTE_LEVEL),
    },
    "bytes of bytes": {"pre_tokenizer": sequence("pretokenizers", *[BYTE_LEVEL] * 10)},
    "metaspaces": {
        "pre_tokenizer": sequence("pretokenizers", *[{"type": "Metaspace", "replacement": "_"}] * 5)
    },
    "a table": {
        "normalizer": {
            "type": "Precompiled",
            "precompiled_charsmap": charsmap(b"a", b"b" * (MAX_SCALE + 1)),
        }
    },
    "decoders": {"decoder": sequence("decoders", *[replace(30)] * 2)},
    "templates": {
        "post_processor": sequence("processors", *[template(*[A] * 30)] * 2),
    },
    "ids of a template": {
        "post_processor": sequence("processors", *[template(A, *[X] * 500, ids=500)] * 300)
    },
    "many steps": {"normalizer": sequence("normalizers", *[{"type": "NFC"}] * MAX_STEPS)},
    "long tokens": {
        "normalizer": sequence("normalizers", {"type": "Prepend", "prepend": "b" * 300_000}),
        "added_tokens": [token(256, "a" * 300_000)],
        "pre_tokenizer": None,
        "decoder": replace(300),
    },
}
USUAL: dict[str, dict[str, Any]] = {
    "bytes": {},
    "llama": {
        "normalizer": sequence(
            "normalizers",
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        ),
        "pre_tokenizer": None,
        "decoder": sequence(
            "decoders",
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ),
        "post_processor": template(X, A),
    },
    "nfc and bytes": {"normalizer": {"type": "NFC"}},
    "a table of sentencepiece": {
        "normalizer": sequence(
            "normalizers",
            {"type": "Precompiled", "precompiled_charsmap": charsmap(b"x" * 33, b"y")},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        ),
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581"},
    },
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_growing_file_is_refused_unrun(name: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(BadInput, match=r"tokenizer\.json: .* at most \d+") as caught:
        check_growth(json_tokenizer(**HOSTILE[name]), path)
    assert len(str(caught.value)) - len(str(path)) < 200


@pytest.mark.parametrize("name", USUAL)
def test_the_usual_ones_are_not(name: str, tmp_path: Path) -> None:
    check_growth(json_tokenizer(**USUAL[name]), tmp_path)


@pytest.mark.parametrize(
    ("steps", "growth"),
    [
        ([replace(3)], 3),
        ([replace(3), replace(5)], 15),
        ([replace(6, {"String": "aa"})], 3),
        ([replace(0, {"String": "aa"})], 1),
        ([{"type": "ByteLevel"}] * 3, 8),
    ],
)
def test_the_bound_is_what_the_library_does(steps: list[dict[str, Any]], growth: int) -> None:
    """At least: it is never below, and for a text that grows in every step it is met."""
    tokenizers = pytest.importorskip("tokenizers")
    scale = 1.0
    for step in steps:
        scale *= tokenizer_growth._growth(step)[0]
    assert scale == growth
    data = json_tokenizer(normalizer=sequence("normalizers", *steps), pre_tokenizer=None)
    normalizer = tokenizers.Tokenizer.from_str(json.dumps(data)).normalizer
    for text in ("a" * 12, "\u00e9" * 12):
        assert len(normalizer.normalize_str(text).encode()) <= scale * len(text.encode())
    text = "\u00e9" * 12 if steps[0]["type"] == "ByteLevel" else "a" * 12
    if steps[0].get("content") != "":
        assert len(normalizer.normalize_str(text).encode()) == scale * len(text.encode())


def _odd(**changes: Any) -> Any:
    return {"a": [1, {"b": None}], **changes}


@pytest.mark.parametrize("odd", [None, [], "x", 7, {}, {"type": 3}, _odd(type="Replace")])
def test_parts_of_no_known_form_are_left_to_the_library(odd: Any, tmp_path: Path) -> None:
    parts = ("normalizer", "pre_tokenizer", "decoder", "post_processor", "added_tokens")
    for part in parts:
        check_growth(json_tokenizer(**{part: odd}), tmp_path)
    for kind in ("normalizers", "single", "special_tokens", "pattern", "precompiled_charsmap"):
        step = {"type": "Sequence", "content": odd, kind: odd}
        check_growth(json_tokenizer(normalizer=step), tmp_path)


def shell(*argv: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """A verb in a process that may take 12 GB of address space, where limits can be set."""
    limit = (
        "import sys\n"
        "try:\n"
        "    import resource\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))\n"
        "except (ImportError, ValueError, OSError):\n"
        "    pass\n"
        "from onelaunch.cli import main\n"
        "main()\n"
    )
    return subprocess.run(
        [sys.executable, "-c", limit, *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
    )


def test_inspect_of_a_hostile_folder_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    model = write_model(tmp_path / "model", 257)
    write_json_tokenizer(model, json_tokenizer(**HOSTILE["five replacements"]))
    result = shell("inspect", model)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("\n") == 1
    assert re.search(r"tokenizer\.json: .*normalizer.* 2e\+15 times", result.stderr)
    assert "cannot be used" in result.stdout


PANICS: dict[str, dict[str, Any]] = {
    "at reading": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "at encoding": {"normalizer": replace(3, {"String": ""})},
}


@pytest.mark.parametrize("backtrace", ["0", "full"])
@pytest.mark.parametrize("name", PANICS)
def test_a_panic_prints_nothing_of_its_own(
    name: str, backtrace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tokenizers")
    path = write_json_tokenizer(tmp_path, json_tokenizer(**PANICS[name]))
    result = shell("prepare", path, "--tokenizer", path, "--out", "o", RUST_BACKTRACE=backtrace)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"onelaunch: {path}: not a usable")
    assert "panicked" not in result.stderr


def test_a_panic_while_decoding_prints_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tokenizers")
    tokenizer = load_tokenizer(write_json_tokenizer(tmp_path))

    def panic(ids: list[int]) -> str:
        os.write(2, b"thread '<unnamed>' panicked at lib.rs:1:2:\nindex out of bounds\n")
        raise RuntimeError("index out of bounds")

    tokenizer._tokenizer = type("Inner", (), {"decode": staticmethod(panic)})()
    stream = tokenizer.decoder()
    for call in (lambda: tokenizer.decode([5]), lambda: stream.push(5), stream.finish):
        with pytest.raises(BadInput, match="index out of bounds"):
            call()
    assert capfd.readouterr() == ("", "")


class TestStandardError:
    def test_what_others_write_is_passed_on(self, capfd: pytest.CaptureFixture[str]) -> None:
        def call() -> int:
            os.write(2, b"from the library\n")
            print("from Python", file=sys.__stderr__, flush=True)
            return 7

        assert without_stderr(call) == 7
        assert sorted(capfd.readouterr().err.splitlines()) == ["from Python", "from the library"]
        assert without_stderr(lambda: 8) == 8
        assert capfd.readouterr().err == ""

    def test_what_a_failing_call_writes_is_dropped(self, capfd: pytest.CaptureFixture[str]) -> None:
        def call() -> None:
            os.write(2, b"panicked\n")
            raise KeyError

        with pytest.raises(KeyError):
            without_stderr(call)
        os.write(2, b"after\n")
        assert capfd.readouterr().err == "after\n"

    def test_a_closed_one(self) -> None:
        code = (
            "import os; from onelaunch.checkpoints.foreign_stderr import without_stderr\n"
            "os.close(2); print(without_stderr(lambda: 5))"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        assert result.stdout.strip() == b"5"


def test_a_signal_during_a_call_is_not_taken_for_a_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tokenizers")
    tokenizer = load_tokenizer(write_json_tokenizer(tmp_path))

    class Terminated(BaseException):
        pass

    def interrupted(*_: object, **__: object) -> None:
        raise Terminated

    monkeypatch.setattr(tokenizer, "_decode", interrupted)
    with pytest.raises(Terminated):
        tokenizer.decode([5])
