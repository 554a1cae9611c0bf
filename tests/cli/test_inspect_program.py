"""`onelaunch inspect` of a saved Core ML program."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec

import numpy as np
import pytest

from onelaunch.errors import BadInput, MissingExtra

needs_coremltools = pytest.mark.skipif(
    find_spec("coremltools") is None, reason="coremltools is not installed"
)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A gather, a product, a mask with infinities, two of a kind."""
    pytest.importorskip("coremltools")
    from onelaunch.engines.coreml import coremltools

    coremltools("a test")
    from coremltools.converters.mil import Builder as mb

    from tests.engines.coreml.tiny import built, value

    def body(tokens):
        # named: coremltools numbers what has no name, through all that a process builds
        x = mb.gather(x=np.ones((40, 64), np.float16), indices=tokens, axis=0, name="rows")
        mask = mb.const(val=np.full((1, 8, 64), -np.inf, np.float16), name="mask")
        return mb.relu(x=mb.relu(x=mb.add(x=x, y=mask)), name="out")

    return built(tmp_path_factory.mktemp("program"), body, value(1, 8, dtype="int32"))


FINDINGS = [  # severity, and what the text must name
    ("cpu", "tokens: .*int32.*CPU"),
    ("cpu", "rows: .*gather.*CPU"),
    ("error", "mask: .*infinite.* 65,504.* -40,000"),
]


def check_findings(findings):
    for (severity, text), (expected, pattern) in zip(findings, FINDINGS, strict=True):
        assert severity == expected
        assert re.match(pattern, text), text


def sizes(program):
    files = [file for file in program.rglob("*") if file.is_file()]
    weights = next(file for file in files if file.name == "weight.bin")
    return weights.stat().st_size, sum(file.stat().st_size for file in files)


@needs_coremltools
def test_lines(onelaunch, program):
    code, out, err = onelaunch("inspect", program)
    assert (code, err) == (0, "")
    weight_bytes, file_bytes = sizes(program)
    lines = [tuple(re.split(r"  +", line, maxsplit=1)) for line in out.splitlines()]
    assert lines[:8] == [
        ("program", str(program)),
        ("specification version", "9"),
        ("weight bytes", f"{weight_bytes:,}"),
        ("file bytes", f"{file_bytes:,}"),
        ("input", "tokens, int32 1x8"),
        ("output", "out, float16 1x8x64"),
        ("operations", "4: relu 2, add 1, gather 1"),
        ("constants", lines[7][1]),
    ]
    check_findings(lines[8:])
    assert int(lines[7][1]) >= 3  # the table, the axis, the mask, what coremltools adds
    columns = {line.index(text) for line, (_, text) in zip(out.splitlines(), lines, strict=True)}
    assert len(columns) == 1


@needs_coremltools
def test_json(onelaunch, program):
    code, out, err = onelaunch("inspect", program, "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert (told["weight_bytes"], told["file_bytes"]) == sizes(program)
    assert (told["program"], told["specification_version"]) == (str(program), 9)
    (main,) = told["functions"].values()
    assert list(told["functions"]) == ["main"]
    assert main["inputs"] == {"tokens": {"dtype": "int32", "shape": [1, 8]}}
    assert main["outputs"] == {"out": {"dtype": "float16", "shape": [1, 8, 64]}}
    assert (main["states"], main["operations"]) == ({}, {"relu": 2, "add": 1, "gather": 1})
    findings = told["findings"]
    check_findings([(f["severity"], f"{f['operation']}: {f['text']}") for f in findings])
    assert [(f["rule"], f["count"]) for f in told["findings"]] == [
        ("dtype", 1),
        ("operation", 1),
        ("constant", 1),
    ]


@needs_coremltools
def test_a_program_without_findings_and_of_two_functions(onelaunch, tmp_path):
    from onelaunch.engines.coreml import coremltools

    coremltools("a test")
    from coremltools.converters.mil import Builder as mb

    from tests.engines.coreml.tiny import built, edited, value

    path = built(tmp_path, lambda x: mb.relu(x=x), value(1, 8, 1, 64))
    last = onelaunch("inspect", path)[1].splitlines()[-1]
    assert last.split("  ")[-1].strip().startswith("none: ")

    def twice(spec):
        functions = spec.mlProgram.functions
        functions["again"].CopyFrom(functions["main"])

    edited(path, twice)
    out = onelaunch("inspect", path)[1]
    assert re.findall(r"^function +(\w+)$", out, re.M) == ["again", "main"]
    assert len(re.findall(r"^input +x, float16 1x8x1x64$", out, re.M)) == 2


@needs_coremltools
def test_a_folder_of_another_name_and_options_of_models(onelaunch, program, tmp_path):
    plain = tmp_path / "plain"
    plain.symlink_to(program)
    assert onelaunch("inspect", plain)[0] == 0
    code, _, err = onelaunch("inspect", program, "--fusion-depth", "1")
    assert code == 2
    assert "--fusion-depth 1" in err
    code, _, err = onelaunch("inspect", program, "--random")
    assert code == 2
    assert "--random is for presets" in err


def test_what_is_no_program(onelaunch, tmp_path):
    """Says so without coremltools."""
    folder = tmp_path / "empty.mlpackage"
    folder.mkdir()
    code, out, err = onelaunch("inspect", folder)
    assert (code, out) == (2, "")
    assert err.startswith(f"onelaunch: {folder}: ")
    assert "Manifest.json" in err
    assert err.count("\n") == 1
    code, _, err = onelaunch("inspect", tmp_path / "absent.mlpackage")
    assert code == 2
    assert "absent.mlpackage: no such file" in err


@pytest.mark.parametrize(
    ("reason", "error", "line"),
    [
        (
            "the package coremltools is not installed",
            MissingExtra,
            "onelaunch: .*coremltools.* not installed.*pip install 'onelaunch\\[coreml\\]'\n",
        ),
        (
            "coremltools 8.0 is not known here; 9.0 is",
            BadInput,
            "onelaunch: .*coremltools 8.0 .*9.0 .*pip install 'onelaunch\\[coreml\\]'\n",
        ),
    ],
)
def test_without_coremltools(onelaunch, tmp_path, monkeypatch, reason, error, line):
    from onelaunch.engines import coreml
    from onelaunch.engines.coreml.package import Package

    folder = tmp_path / "some.mlpackage"
    (folder / "Data").mkdir(parents=True)
    (folder / "Data" / "model.mlmodel").write_bytes(b"")
    manifest = {"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": "model.mlmodel"}}}
    (folder / "Manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(coreml, "why_not", lambda: reason)
    with pytest.raises(error):
        Package(folder)
    code, out, err = onelaunch("inspect", folder)
    assert (code, out) == (2, "")
    assert re.fullmatch(line, err), err
