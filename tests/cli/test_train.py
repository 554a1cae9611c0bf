"""The verbs train and eval through the real command line."""

import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from onelaunch import cli
from onelaunch.checkpoints.run_folder import list_checkpoints
from tests.kills import interrupt_until_done, outcome, run_to_the_end, train_command
from tests.metrics import read_metrics


def onelaunch(*words, **rest):
    command = [sys.executable, "-m", "onelaunch", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=1800, **rest)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run of the default recipe, its folder and what the command said."""
    run = tmp_path_factory.mktemp("cli") / "run"
    done = onelaunch(
        "train", "quickstart", "--run", run, "--accum", 2,
        "--set", "train.updates=6", "--set", "train.batch_size=4", "--set", "eval.every=3",
        "--set", "eval.batches=2", "--set", "train.threads=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return run, done


def test_train_says_what_it_does_and_what_to_try_next(finished):
    run, done = finished
    assert done.stdout == ""
    for words in (
        f"onelaunch train: {run}",
        "0.26 million parameters",
        "synthetic stories",
        "2 micro-steps of 4 x 128 = 1,024 tokens",
        "update 3: validation loss",
        "micro-steps/s",
        "updates/s",
        "tokens/s",
        f"run folder: {run}",
        f" generate {run}",
    ):
        assert words in done.stderr
    assert "\x1b" not in done.stderr  # not a terminal: plain lines
    assert (run / "recipe.toml").read_text().count("accum = 2") == 1


def test_the_run_folder_evaluates_generates_and_inspects(finished):
    run, _ = finished
    done = onelaunch("eval", run, "--data", "stories", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    evals = [r["loss"] for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "eval"]
    assert figures["synthetic"] is True
    assert abs(figures["loss"] - min(evals)) < 0.3
    text = onelaunch("generate", run, "--max-new-tokens", 8, "--temperature", 0)
    assert text.returncode == 0, text.stderr
    assert text.stdout.strip()
    assert onelaunch("inspect", run).returncode == 0


def test_a_finished_run_is_not_overwritten(finished):
    run, _ = finished
    again = onelaunch("train", "--run", run)
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1
    assert "--resume continues" in again.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "nothing.toml"], "built-in recipes: quickstart"),
        (["train", "--set", "train.acum=3"], "did you mean train.accum?"),
        (["train", "--accum", "1001"], "--accum: train.accum = 1001"),
        (["train", "--preset", "stories15"], "--preset stories15"),
        (["train", "--resume"], "runs/: no run to resume"),
        (["train", "--resume", "--run", "nowhere"], "nothing to resume"),
        (["train", "--data", "nowhere", "--run", "r"], "nowhere"),
        (["train", "--device", "tpu", "--run", "r"], "must be auto, cpu"),
        (["eval", "nowhere", "--data", "stories"], "no such file"),
        (["bench", "generation-spede"], "did you mean generation-speed?"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capfd, words, expected):
    monkeypatch.chdir(tmp_path)
    assert cli.run(words) == 2
    said = capfd.readouterr()
    assert said.err.startswith("onelaunch: ")
    assert said.err.count("\n") == 1
    assert expected in said.err
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


def test_sigterm_saves_partial_gradients_says_how_to_go_on_and_resumes_exactly(tmp_path):
    long = {"train__updates": 2, "train__accum": 200, "checkpoint__every": 0, "eval__every": 0}
    run_to_the_end(tmp_path / "whole", **long)
    run = tmp_path / "cut"
    command = [word for word in train_command(run, **long) if word != "--quiet"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(run / "metrics.jsonl", '"kind": "update"', process)
    time.sleep(0.1)  # a few micro-steps into the second update, which has 200
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=1800)[1]
    assert process.returncode == 128 + signal.SIGTERM, said
    assert f" train --resume --run {run}" in said
    newest = list_checkpoints(run)[-1]
    assert "-micro-" in newest.name
    assert (newest / "gradients.safetensors").exists()
    subprocess.run(train_command(run, resume=True), check=True, timeout=1800)
    assert outcome(run) == outcome(tmp_path / "whole")


@pytest.mark.extended
def test_a_few_kills_at_random_moments_resume_exactly(tmp_path):
    """A small sample of what `make soak` does fifty times."""
    long = {"train__updates": 200}
    run_to_the_end(tmp_path / "whole", **long)
    story = interrupt_until_done(tmp_path / "killed", 3, seed=1, **long)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole"), story


def test_a_terminal_gets_a_live_panel_and_ends_clean(tmp_path):
    master, slave = pty.openpty()
    command = [w for w in train_command(tmp_path / "run", train__updates=30) if w != "--quiet"]
    process = subprocess.Popen(command, stderr=slave)
    os.close(slave)
    seen = b""
    try:
        while chunk := os.read(master, 65536):
            seen += chunk
    except OSError:
        pass
    assert process.wait(1800) == 0
    assert re.search(rb"\r\x1b\[\d+A", seen)  # redrawn in place
    assert b"\x1b[?25h" in seen  # the cursor is back
    assert b"next:" in seen


def wait_for(path, text, process, seconds=1800):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"{path} never held {text}: {process.communicate()}")


def test_a_closed_standard_error_stops_nothing(tmp_path):
    command = " ".join(map(shlex.quote, train_command(tmp_path / "run", train__updates=2)))
    command = command.replace(" --quiet", "")
    done = subprocess.run(["bash", "-c", f"{command} 2>&-"], capture_output=True, timeout=1800)
    assert (done.returncode, done.stdout) == (0, b"")
    assert list_checkpoints(tmp_path / "run")


def test_sigterm_during_prepare_leaves_nothing(tmp_path):
    (tmp_path / "text.txt").write_text("a word or two\n" * 2_000_000)
    command = [sys.executable, "-m", "onelaunch", "prepare", "text.txt", "--out", "data"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 1800
    while not list(tmp_path.glob(".data.*.tmp")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert process.wait(1800) == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
