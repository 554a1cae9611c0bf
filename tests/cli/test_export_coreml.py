"""`onelaunch export --format coreml`: programs on disk that say what the model says."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from onelaunch.checkpoints import random_model
from onelaunch.cli.export import export
from onelaunch.errors import BadInput, MissingExtra
from tests.engines.suite import exact_logits, relative_error

pytest.importorskip("coremltools")

from onelaunch.engines.coreml.evaluate import Evaluator
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
        ("a", (), "is one program: OUT must end in .mlpackage"),
        ("a.mlpackage", ("--fusion-depth", "half"), "is 11 programs: OUT must be a folder's name"),
        ("a.mlpackage", ("--fusion-depth", "stage"), "holds half a layer at least"),
        ("a.mlpackage", ("--fusion-depth", "9"), "--fusion-depth.*from 1 to 5"),
        ("a.mlpackage", ("--seq", "513"), "--seq 513: must be from 1 to the model's 512"),
        ("a.mlpackage", ("--taps", "some"), "--taps some: must be none, inputs or full"),
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
    with pytest.raises(BadInput, match="cannot write: No space left"):
        run("stories260k", tmp_path / "a.mlpackage", "--seq", 32)
    assert list(tmp_path.iterdir()) == []


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
