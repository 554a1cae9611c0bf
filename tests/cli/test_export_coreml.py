"""`onelaunch export --format coreml`: programs on disk that say what the model says."""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from typer.testing import CliRunner

from onelaunch.checkpoints import random_model
from onelaunch.cli.export import export
from onelaunch.errors import BadInput, MissingExtra, OnelaunchError, RunFailed
from tests.engines.suite import exact_logits, relative_error

pytest.importorskip("coremltools")

from onelaunch.engines.coreml.evaluate import Evaluator
from onelaunch.engines.coreml.lint import lint
from onelaunch.engines.coreml.package import Package

app = typer.Typer()
app.command()(export)


def run(*arguments):
    result = CliRunner().invoke(app, ["--format", "coreml", "--random", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.stderr
    return result


def test_one_program_gives_the_models_logits(tmp_path):
    out = tmp_path / "model.mlpackage"
    result = run("stories260k", out, "--seq", 64)
    assert f"wrote {out} (all: 576 operations" in result.stderr
    assert result.stdout == ""
    assert [each.name for each in tmp_path.iterdir()] == ["model.mlpackage"]
    loaded = random_model("stories260k")
    tokens = torch.arange(64)[None] * 7 % loaded.config.vocab_size
    logits = Evaluator(Package(out))({"tokens": tokens})["logits_0"][:, :, 0].transpose(1, 2)
    weights = {name: w.float() for name, w in loaded.weights.items()}
    assert relative_error(logits, exact_logits(loaded.config, weights, tokens)) < 1e-2


def test_several_programs_are_a_folder_with_their_order(tmp_path):
    out = tmp_path / "programs"
    run("stories260k", out, "--seq", 32, "--fusion-depth", 2, "--taps", "inputs")
    listed = json.loads((out / "programs.json").read_text())
    names = [each["file"] for each in listed]
    assert names == [
        "01-layers-0-to-1.mlpackage",
        "02-layers-2-to-3.mlpackage",
        "03-layer-4.mlpackage",
        "04-head.mlpackage",
    ]
    assert {each.name for each in out.iterdir()} == {"programs.json", *names}
    assert listed[1]["taps"] == ["layer_2_input", "layer_3_input"]
    taps = Package(out / names[1]).main.outputs
    assert taps == ("x_out", "layer_2_input", "layer_3_input")


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("a", (), r"a: .*one program.*\.mlpackage"),
        ("a.mlpackage", ("--fusion-depth", "half"), r"a\.mlpackage: .*11 programs.*folder"),
        ("a.mlpackage", ("--fusion-depth", "stage"), "half a layer"),
        ("a.mlpackage", ("--fusion-depth", "9"), "fusion_depth='9'.*from 1 to 5"),
        ("a.mlpackage", ("--seq", "513"), "sequence=513: .* 512"),
        ("a.mlpackage", ("--taps", "some"), "taps='some': must be none, inputs or full"),
        ("a.mlpackage", ("--weights", "int8"), "--weights int8: must be fp16"),
        ("missing/a.mlpackage", (), "cannot write"),
    ],
)
def test_what_cannot_be_is_refused(out, options, message, tmp_path):
    with pytest.raises(BadInput, match=message):
        run("stories260k", tmp_path / out, *options)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_where_writing_fails(tmp_path, monkeypatch):
    from onelaunch.engines.coreml import export as module

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save", full)
    with pytest.raises(RunFailed, match=r"a\.mlpackage: .*the disk is full"):
        run("stories260k", tmp_path / "a.mlpackage", "--seq", 32)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("depth", ["all", "half"])
@pytest.mark.parametrize(
    ("name", "number", "message"),
    [
        ("embed_tokens.weight", 65_520.0, "65,520.* float16.* 65,504"),
        ("norm.weight", -7e4, "of magnitude 70,000"),
        ("layers.3.mlp.up_proj.weight", 1e38, "of magnitude 9[0-9,]*;"),
        ("layers.1.self_attn.v_proj.weight", 1e5, "of magnitude 100,000"),
        ("layers.0.input_layernorm.weight", math.inf, "infinite or NaN"),
        ("layers.4.self_attn.o_proj.weight", math.nan, "infinite or NaN"),
    ],
)
def test_a_weight_that_float16_cannot_hold_is_named(
    name, number, message, depth, tmp_path, monkeypatch
):
    loaded = random_model("stories260k")
    loaded.weights[name].view(-1)[3] = number
    monkeypatch.setattr("onelaunch.checkpoints.random_model", lambda model: loaded)
    out = tmp_path / ("a.mlpackage" if depth == "all" else "a")
    with pytest.raises(BadInput, match=f"^{re.escape(name)}: has .*{message}"):
        run("stories260k", out, "--seq", 32, "--fusion-depth", depth)
    assert list(tmp_path.iterdir()) == []


def test_a_weight_at_the_end_of_float16_is_no_error(tmp_path, monkeypatch):
    loaded = random_model("stories260k")
    loaded.weights["layers.0.mlp.up_proj.weight"].view(-1)[3] = 65_519.0  # rounds to 65,504
    monkeypatch.setattr("onelaunch.checkpoints.random_model", lambda model: loaded)
    run("stories260k", tmp_path / "a.mlpackage", "--seq", 32)
    errors = [each for each in lint(Package(tmp_path / "a.mlpackage")) if each.severity == "error"]
    assert errors == []


WEIGHTS = "/dir/weights/weight.bin"
NOT_WRITTEN = {
    "weights": RuntimeError(
        "[MIL FileWriter]: Unknown error occurred while writing data to the file."
    ),
    "a package's item": RuntimeError(
        "filesystem error: cannot copy: Input/output error [/dir/a] [/dir/b.mlpackage/weights]"
    ),
    "a package's copy": shutil.Error(
        [(WEIGHTS, WEIGHTS, f"[Errno 28] No space left on device: {WEIGHTS!r}")] * 2
    ),
    "the model": OSError(28, "No space left on device"),
}


@pytest.mark.parametrize("full", ["out", "temporary"])
@pytest.mark.parametrize("error", NOT_WRITTEN.values(), ids=NOT_WRITTEN)
def test_a_full_disk_is_one_line(error, full, tmp_path, monkeypatch):
    """coremltools writes weights to the system's temporary folder first, then copies twice."""
    import coremltools

    temporary, folder = tmp_path / "temporary", tmp_path / "folder"
    temporary.mkdir()
    folder.mkdir()
    out = folder / "a.mlpackage"
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def disk_usage(place):
        is_full = Path(place).is_relative_to(folder if full == "out" else temporary)
        return SimpleNamespace(free=4096 if is_full else 1 << 40)

    def refused(*args, **kwargs):
        raise error

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    monkeypatch.setattr(coremltools, "convert", refused)
    place, hint = (out, "") if full == "out" else (temporary, "TMPDIR")
    with pytest.raises(OnelaunchError) as raised:
        run("stories260k", out, "--seq", 32)
    message = str(raised.value)
    assert message.startswith(str(place))
    assert "the disk is full" in message
    assert hint in message
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("error", NOT_WRITTEN.values(), ids=NOT_WRITTEN)
def test_another_failure_to_write_is_one_line_too(error, tmp_path, monkeypatch):
    import coremltools

    def refused(*args, **kwargs):
        raise error

    monkeypatch.setattr(coremltools, "convert", refused)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1 << 40))
    with pytest.raises(OnelaunchError, match="a.mlpackage: cannot write: ") as raised:
        run("stories260k", tmp_path / "a.mlpackage", "--seq", 32)
    assert "\n" not in str(raised.value)


def test_what_is_no_failure_to_write_is_not_said_to_be_one(tmp_path, monkeypatch):
    import coremltools

    def broken(*args, **kwargs):
        raise RuntimeError("no such pass")

    monkeypatch.setattr(coremltools, "convert", broken)
    with pytest.raises(RuntimeError, match="no such pass"):
        run("stories260k", tmp_path / "a.mlpackage", "--seq", 32)


def test_options_of_programs_are_for_programs(tmp_path):
    arguments = ["stories260k", str(tmp_path / "a.bin"), "--format", "llama2c", "--random"]
    result = CliRunner().invoke(app, [*arguments, "--taps", "full"])
    assert "--taps full: is for --format coreml" in str(result.exception)


def test_without_the_package_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    from importlib import metadata

    def missing(name):
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(MissingExtra, match=r"--format coreml needs .*onelaunch\[coreml\]"):
        run("stories260k", tmp_path / "a.mlpackage")
