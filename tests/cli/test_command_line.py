"""The command line as a whole: what it offers, what it loads, how it refuses."""

import json
import re
import subprocess
import sys
import textwrap
import tomllib
import typing
from pathlib import Path

import pytest
import typer

from onelaunch import __version__
from onelaunch.cli import app as app_module
from onelaunch.engines import installed
from onelaunch.errors import BadInput, RunFailed

# What people type and scripts rely on. A change here is a change for them: it belongs into the
# commit message.
LISTING = """\
onelaunch [--version] [--debug]
prepare TEXT... --out DIR [--vocab-size N] [--tokenizer FILE] [--quiet] [--debug]
train [RECIPE] [--preset NAME] [--init MODEL] [--data DIR] [--run DIR] [--resume] [--accum N]
    [--device DEVICE] [--engine ENGINE] [--compile-budget N] [--set A.B=C...] [--plan] [--json]
    [--quiet] [--debug]
eval MODEL --data DIR [--engine ENGINE] [--device DEVICE] [--dtype DTYPE] [--json] [--quiet]
    [--debug]
generate MODEL [--random] [--tokenizer FILE] [--prompt TEXT|@FILE|-...] [--no-echo]
    [--max-new-tokens N] [--stop TEXT...] [--temperature T] [--top-k K] [--top-p P] [--min-p P]
    [--repetition-penalty X] [--presence-penalty X] [--frequency-penalty X] [--logit-bias
    ID=X...] [--seed S] [--engine ENGINE] [--device DEVICE] [--dtype DTYPE] [--threads N]
    [--fusion-depth DEPTH] [--trace FILE] [--ids] [--json] [--quiet] [--debug]
chat MODEL [--tokenizer FILE] [--system TEXT] [--max-new-tokens N] [--temperature T] [--top-k K]
    [--top-p P] [--min-p P] [--repetition-penalty X] [--presence-penalty X] [--frequency-penalty
    X] [--seed S] [--engine ENGINE] [--device DEVICE] [--dtype DTYPE] [--threads N] [--quiet]
    [--debug]
serve MODEL [--random] [--host HOST] [--port PORT] [--max-batch N] [--max-queue N] [--context N]
    [--max-new-tokens N] [--temperature T] [--top-p P] [--seed S] [--name NAME] [--chat-template
    FILE] [--api-key KEY] [--cors ORIGIN...] [--timeout SECONDS] [--grace SECONDS] [--engine
    ENGINE] [--device DEVICE] [--dtype DTYPE] [--threads N] [--tokenizer FILE] [--quiet]
    [--debug]
tune MODEL [--batch N] [--seq N] [--training BxS] [--random] [--device DEVICE] [--dtype DTYPE]
    [--json] [--quiet] [--debug]
export MODEL OUT --format FORMAT [--random] [--seq N] [--fusion-depth DEPTH] [--taps TAPS]
    [--weights DTYPE] [--quiet] [--debug]
inspect MODEL|PROGRAM [--random] [--fusion-depth D] [--training BxS] [--json] [--debug]
bench EXPERIMENT [--device DEVICE] [--out DIR] [--quick] [--peer NAME=PATH...] [--quiet]
    [--debug]
report [RECORD...] [--again FOLDER...] [--out FILE] [--markdown FILE] [--quiet] [--debug]
doctor [--clear-cache] [--json] [--debug]
"""


def listing() -> str:
    """Every verb with its arguments and options."""
    command = typer.main.get_command(app_module.app)
    lines = [_line("onelaunch", command.params)]
    lines += [_line(name, verb.params) for name, verb in command.commands.items()]
    return "".join(f"{line}\n" for line in lines)


def _line(name, params) -> str:
    words = [name]
    for param in params:
        word = param.metavar or ("VALUE" if param.param_type_name == "option" else param.name)
        if param.param_type_name == "option":
            word = "|".join(param.opts) + ("" if param.is_flag else f" {word}")
        if param.nargs == -1 or getattr(param, "multiple", False):
            word = word.removesuffix("...") + "..."
        words.append(word if param.required else f"[{word.strip('[]')}]")
    return textwrap.fill(" ".join(words), 96, subsequent_indent="    ", break_on_hyphens=False)


def test_the_command_line_is_as_frozen_here():
    assert listing() == LISTING


def test_help_version_and_import_load_nothing_heavy():
    """In a process of its own: this one has everything loaded."""
    verbs = list(typer.main.get_command(app_module.app).commands)
    code = f"""
import sys
import onelaunch
assert "typer" not in sys.modules
from onelaunch.cli import run
for argv in [["--version"], ["--help"], ["-h"], []] + [[verb, "--help"] for verb in {verbs}]:
    assert run(argv) == 0, argv
heavy = {{"torch", "numpy", "numba", "safetensors", "transformers", "jinja2"}} & set(sys.modules)
print("heavy:", sorted(heavy))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout.splitlines()[0] == f"onelaunch {__version__}"
    assert done.stdout.splitlines()[-1] == "heavy: []"
    assert done.stderr == ""


def test_help_is_plain_text(onelaunch):
    for argv in ([], ["--help"], ["generate", "-h"]):
        code, out, err = onelaunch(*argv)
        assert (code, err) == (0, "")
        assert out.startswith("Usage: onelaunch")
        assert out.isascii()
        assert "\x1b" not in out


def test_python_dash_m():
    done = subprocess.run(
        [sys.executable, "-m", "onelaunch", "--version"], capture_output=True, timeout=300
    )
    assert (done.returncode, done.stdout.decode().strip()) == (0, f"onelaunch {__version__}")


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["generat"], "'generate'"),
        (["xyzzy"], "'xyzzy'"),
        (["--nope"], "--nope"),
        (["generate"], "'MODEL'"),
        (["generate", "a", "b"], "(b)"),
        (["generate", "a", "--temprature", "1"], "--temperature"),
        (["generate", "a", "--seed"], "--seed"),
        (["generate", "a", "--seed", "x"], "--seed"),
        (["generate", "a", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["generate", "a", "--json=yes"], "--json"),
        (["export", "a", "b"], "--format"),
        (["doctor", "extra"], "extra"),
    ],
    ids=" ".join,
)
def test_usage_errors_are_one_line_and_exit_2(onelaunch, argv, named):
    code, out, err = onelaunch(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("onelaunch: ")
    assert err.count("\n") == 1
    assert named in err
    verb = f"onelaunch {argv[0]}" if argv[0] in ("generate", "export", "doctor") else "onelaunch"
    assert f"(see: {verb} --help)" in err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (BadInput("x.bin: too\n  short"), 2, "onelaunch: x.bin: too short"),
        (RunFailed("the loss is not a number"), 1, "onelaunch: the loss is not a number"),
        (FileNotFoundError(2, "No such file", "y"), 2, "onelaunch: y: No such file"),
        (OSError(28, "No space left on device"), 1, "onelaunch: No space left on device"),
        (MemoryError(), 1, "onelaunch: not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), 1, "memory"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(32, "Broken pipe"), 0, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_error_has_its_line_and_code(onelaunch, monkeypatch, error, code, line):
    def fail():
        raise error

    monkeypatch.setattr(installed, "examine", fail)
    outcome, out, err = onelaunch("doctor")
    assert (outcome, out) == (code, "")
    assert line in err
    assert err.count("\n") == bool(line)


def test_an_error_loses_no_line_that_was_printed(onelaunch, monkeypatch):
    def fail():
        print("what was found so far")
        raise FileNotFoundError(2, "No such file", "y")

    monkeypatch.setattr(installed, "examine", fail)
    outcome, out, err = onelaunch("doctor")
    assert (outcome, out) == (2, "what was found so far\n")
    assert "y: No such file" in err


def test_an_error_of_ours_is_not_hidden(onelaunch, monkeypatch):
    def fail():
        raise RuntimeError("a bug")

    monkeypatch.setattr(installed, "examine", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        onelaunch("doctor")


@pytest.mark.parametrize("argv", [["--debug", "doctor"], ["doctor", "--debug"]], ids=" ".join)
def test_debug_shows_the_traceback_and_keeps_the_code(onelaunch, monkeypatch, argv):
    def fail():
        raise BadInput("x.bin: bad")

    monkeypatch.setattr(installed, "examine", fail)
    code, _, err = onelaunch(*argv)
    assert code == 2
    assert "Traceback" in err
    assert "in fail" in err
    assert onelaunch("doctor")[2] == "onelaunch: x.bin: bad\n"


@pytest.mark.parametrize(
    "argv",
    [
        ["prepare", "nothing", "--out", "out"],
        ["train", "nothing.toml"],
        ["eval", "nothing", "--data", "stories"],
        ["generate", "nothing"],
        ["chat", "nothing"],
        ["serve", "nothing"],
        ["tune", "nothing"],
        ["export", "nothing", "out.bin", "--format", "llama2c"],
        ["inspect", "nothing"],
        ["bench", "nothing"],
        ["report", "nothing"],
        ["doctor"],
    ],
    ids=lambda argv: argv[0],
)
def test_every_verb_has_debug(onelaunch, monkeypatch, tmp_path, argv):
    """The traceback in the place of the one line, with the same exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(installed, "examine", lambda: (_ for _ in ()).throw(BadInput("bad")))
    code, out, err = onelaunch(*argv)
    assert (code, out, err.count("\n")) == (2, "", 1)
    for debugging in ([*argv, "--debug"], ["--debug", *argv]):
        again, out, traceback = onelaunch(*debugging)
        assert (again, out) == (2, "")
        assert traceback.startswith("Traceback (most recent call last)")
        # its last line has the words of the one line
        assert err.removeprefix("onelaunch: ").split(":")[0].strip() in traceback.splitlines()[-1]


def test_no_verb_is_without_a_test_of_debug():
    verbs = typer.main.get_command(app_module.app).commands
    assert all(
        "--debug" in [name for p in verb.params for name in p.opts] for verb in verbs.values()
    )
    tried = {argv[0] for argv in test_every_verb_has_debug.pytestmark[0].args[1]}
    assert tried == set(verbs)


def test_a_full_disk_behind_standard_output():
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "onelaunch", "--version"],
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=300,
        )
    assert done.returncode == 1
    assert done.stderr.decode() == "onelaunch: No space left on device\n"


def test_doctor_tells_what_is_here(onelaunch):
    code, out, err = onelaunch("doctor", "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert facts["versions"]["onelaunch"] == __version__
    assert facts["versions"]["torch"]
    assert facts["cpu"]["usable_cores"] >= 1
    auto = facts["engines"]["auto"]
    assert (auto["engine"], auto["device"]) in (
        ("cpu", "cpu"),
        ("cuda", "cuda"),
        ("reference", "cuda"),
    )
    assert facts["engines"]["cpu"]["vector_bits"] in (128, 256, 512)
    assert bool(facts["cuda"]["devices"]) == (facts["cuda"]["missing"] is None)
    code, out, err = onelaunch("doctor")
    assert (code, err) == (0, "")
    for word in ("torch", "memory", "cuda", "mps", "extra hf", "engine cpu"):
        assert word in out


def test_doctor_says_why_the_cpu_engine_cannot_run(onelaunch, monkeypatch):
    monkeypatch.setattr("onelaunch.engines.cpu.why_not", lambda: "numba went away")
    facts = json.loads(onelaunch("doctor", "--json")[1])
    assert facts["engines"]["auto"]["engine"] == "reference"
    assert "engine cpu       no: numba went away" in onelaunch("doctor")[1]


def test_doctor_knows_every_extra():
    with open(Path(__file__).parents[2] / "pyproject.toml", "rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    named = {
        extra: tuple(re.split("[=>]", requirement)[0] for requirement in requirements)
        for extra, requirements in extras.items()
        if extra != "dev"
    }
    assert named == installed.EXTRAS


def test_doctor_says_how_to_get_what_is_missing(onelaunch, monkeypatch):
    monkeypatch.setattr(installed, "EXTRAS", {"hf": ("no-such-package",)})
    _, out, _ = onelaunch("doctor")
    assert "without no-such-package; pip install 'onelaunch[hf]'" in out


def test_every_option_is_named():
    """Typer 0.27 names one that is not after its metavar."""
    for command in app_module.app.registered_commands:
        hints = typing.get_type_hints(command.callback, include_extras=True)
        for name, hint in hints.items():
            for about in getattr(hint, "__metadata__", ()):
                if isinstance(about, typer.models.OptionInfo):
                    names = (about.default, *about.param_decls)  # as Typer has it before it runs
                    assert str(names[0]).startswith("--"), f"{command.name}: {name}"
