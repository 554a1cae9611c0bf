"""Several processes that train one model: equal to one with as many micro-steps, stopped together,
resumed by as many or by others, and ended together."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from onelaunch.checkpoints.run_folder import list_checkpoints, read_state
from onelaunch.errors import BadInput
from onelaunch.training import run as runs
from onelaunch.training.buckets import group_by_size
from onelaunch.training.ranks import ALONE, joined
from tests.kills import outcome, train_command
from tests.metrics import read_metrics
from tests.training.rank_processes import Launcher, wait_until
from tests.training.rank_work import recipe
from tests.training.token_folders import make_folder


def words(run: Path, resume: bool = False, **changed) -> list[str]:
    """The words of `onelaunch train` for a small run."""
    command = train_command(run, resume, **{"train__engine": "reference"} | changed)
    return [word for word in command[3:] if word != "--quiet"]


def losses(run: Path, kind: str = "update") -> list[float]:
    return [r["loss"] for r in read_metrics(run / "metrics.jsonl") if r["kind"] == kind]


def equal_losses(run: Path, other: Path, rel: float = 1e-6) -> None:
    """Of updates and evaluations."""
    for kind in ("update", "eval"):
        assert losses(run, kind) == pytest.approx(losses(other, kind), rel=rel, abs=0)
        assert losses(run, kind)


@pytest.fixture(scope="module")
def launcher():
    with Launcher() as started:
        yield started


@pytest.fixture(scope="module")
def trained(launcher, tmp_path_factory):
    """What two ranks left that called `rank_work.everything`, which tests what they exchange."""
    folder = tmp_path_factory.mktemp("ranks")
    call = ["call", "tests.training.rank_work:everything", str(folder)]
    with launcher.start(folder / "two", 2, call) as ranks:
        assert ranks.codes() == [0, 0], "\n".join(map("\n".join, ranks.errors()))
    return folder


def test_two_ranks_stop_together_and_go_on_exactly(trained):
    assert outcome(trained / "cut") == outcome(trained / "whole")


def test_ranks_equal_one_process_with_as_many_micro_steps(trained, tmp_path):
    runs.start(recipe(train__accum=4), tmp_path / "one", quiet=True)
    equal_losses(trained / "plain", tmp_path / "one")
    a, b = (
        [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "update"]
        for run in (trained / "plain", tmp_path / "one")
    )
    for ours, one in zip(a, b, strict=True):
        same = ("update", "lr", "micro_steps", "tokens")
        assert [ours[key] for key in same] == [one[key] for key in same]
        assert ours["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
        assert "reduce" in ours["seconds"]
        assert "reduce" not in one["seconds"]
    assert read_metrics(trained / "plain" / "metrics.jsonl")[0]["ranks"] == 2


def test_one_process_goes_on_for_two(trained):
    run = trained / "between"
    runs.resume(run, {"train.accum": 4}, quiet=True)
    equal_losses(run, trained / "plain")


def test_an_unfinished_update_needs_as_many_ranks(trained):
    with pytest.raises(BadInput, match="2 of 3 micro-steps .* each of 2 processes, not 1; finish"):
        runs.resume(trained / "unfinished", {}, quiet=True)
    files = read_state(list_checkpoints(trained / "unfinished")[-1])["sha256"]
    assert {"gradients.safetensors", "gradients-1.safetensors"} <= set(files)


def test_the_first_rank_has_all_saved_by_its_clock(trained):
    equal_losses(trained / "by-the-clock", trained / "undisturbed")


def test_weights_that_differ_are_not_saved(trained):
    (first, silent), (other, elsewhere) = (
        json.loads((trained / f"error-{rank}").read_text()) for rank in (0, 1)
    )
    assert other == f"rank 1: {first}"
    assert "update 4: the weights of rank 1 differ" in first
    assert (silent, elsewhere) == (False, True)
    (checkpoint,) = list_checkpoints(trained / "differ")
    assert checkpoint.name == "update-00000002"


def test_torchrun(tmp_path):
    """As a user starts it: one display, one folder, one line of each kind."""
    run = tmp_path / "two"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    # `--`: torchrun would take --run as one of its own options
    command += ["--nproc-per-node", "2", "-m", "--", "onelaunch"]
    changed = {"train__accum": 2, "train__updates": 4, "train__dropout": 0.0, "eval__every": 2}
    done = subprocess.run([*command, *words(run, **changed)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    for line in ("onelaunch train: ", "update 2: validation loss", "done: update 4"):
        assert done.stderr.count(line) == 1
    assert "2 micro-steps of 4 x 32 in each of 2 processes = 512 tokens" in done.stderr
    runs.start(recipe(train__accum=4, eval__batches=2), tmp_path / "one", quiet=True)
    equal_losses(run, tmp_path / "one")


def test_a_signal_to_one_rank_stops_all_and_saves_once(launcher, tmp_path):
    run = tmp_path / "run"
    argv = words(run, train__updates=10**6, train__accum=2, checkpoint__every=0, eval__every=0)
    with launcher.start(tmp_path / "two", 2, argv) as ranks:
        wait_until(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) > 3)
        ranks.signal(1, signal.SIGTERM)
        assert ranks.codes(60) == [143, 143]
        first, other = ranks.errors()
        assert "stopped; saved at update" in first[-1]
        assert (other, ranks.output()) == ([], "")
    (checkpoint,) = list_checkpoints(run)
    assert read_state(checkpoint)["ranks"] == 2


def test_a_rank_that_is_killed_ends_four(launcher, tmp_path):
    run = tmp_path / "run"
    changed = {"train__accum": 1, "train__dropout": 0.0, "eval__every": 0}
    with launcher.start(tmp_path / "four", 4, words(run, train__updates=10**6, **changed)) as ranks:
        wait_until(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) > 3)
        ranks.signal(2, signal.SIGKILL)
        codes = ranks.codes(10)
        assert codes == [1, 1, -signal.SIGKILL, 1]
        errors = ranks.errors()
    (line,) = [line for rank in errors for line in rank if line.startswith("onelaunch: ")]
    assert "another process of the run ended" in line
    assert [line for rank in errors[1:] for line in rank] in ([], [line])
    four = losses(run)[:4]
    alone = recipe(train__accum=4, eval__every=0, train__updates=4, optimizer__warmup=5)
    runs.start(alone, tmp_path / "one", quiet=True)
    assert four == pytest.approx(losses(tmp_path / "one"), rel=1e-6, abs=0)


def test_the_first_rank_killed_ends_the_other(launcher, tmp_path):
    run = tmp_path / "run"
    with launcher.start(tmp_path / "two", 2, words(run, train__updates=10**6)) as ranks:
        wait_until(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) > 3)
        ranks.signal(0, signal.SIGKILL)
        assert ranks.codes(10) == [-signal.SIGKILL, 1]
        (line,) = ranks.errors()[1]
        assert line.startswith("onelaunch: rank 1: another process of the run ended")


def test_a_run_that_fails_on_one_rank_names_it(launcher, tmp_path):
    run = tmp_path / "run"
    call = ["call", "tests.training.rank_work:out_of_memory", *words(run, checkpoint__every=1)]
    with launcher.start(tmp_path / "three", 3, call) as ranks:
        assert ranks.codes(30) == [1, 1, 1]
        lines = [line for rank in ranks.errors() for line in rank if "onelaunch: " in line]
    (line,) = lines
    assert line.startswith(f"onelaunch: rank 1: {run}: not enough memory: lower train.batch_size")
    assert list_checkpoints(run)[-1].name == "update-00000002"


def test_a_loss_that_is_not_finite_is_printed_once(launcher, tmp_path):
    """All ranks find it, as the sum of their losses."""
    run = tmp_path / "run"
    call = ["call", "tests.training.rank_work:not_finite", *words(run)]
    with launcher.start(tmp_path / "two", 2, call) as ranks:
        assert ranks.codes(30) == [1, 1]
        first, other = ranks.errors()
    assert f"onelaunch: {run}: the loss is nan" in first[-1]
    assert other == []
    assert read_metrics(run / "metrics.jsonl")[-1] == {"kind": "diverged", "update": 2}


def test_ranks_with_other_options_are_refused(launcher, tmp_path):
    run = tmp_path / "run"
    argv = [*words(run), "--set", "train.accum=1{rank}"]
    call = ["call", "tests.training.rank_work:command", *argv]
    with launcher.start(tmp_path / "two", 2, call) as ranks:
        assert ranks.codes(30) == [2, 2]
        (line,) = [line for rank in ranks.errors() for line in rank]
    assert line.startswith("onelaunch: rank 1: accum = 11: differs from rank 0")
    assert not run.exists()


@pytest.mark.parametrize("rank", [None, 1])
def test_bad_input_is_printed_once(launcher, tmp_path, rank):
    """A folder that no process has, or that one has not, which says who."""
    run, data = tmp_path / "run", tmp_path / "data-0"
    make_folder(data)
    data = tmp_path / "data-{rank}" if rank else tmp_path / "nowhere"
    call = ["call", "tests.training.rank_work:command", *words(run, data__path=str(data))]
    with launcher.start(tmp_path / "two", 2, call) as ranks:
        assert ranks.codes(60) == [2, 2]
        (line,) = [line for rank in ranks.errors() for line in rank]
    where = f"rank 1: {tmp_path}/data-1" if rank else data
    assert line.startswith(f"onelaunch: {where}: no such data folder")
    assert not run.exists()


def test_variables_of_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with joined() as ranks:
        assert ranks is ALONE
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined() as ranks:
        assert ranks is ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="RANK is None"), joined():
        pass
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(BadInput, match="WORLD_SIZE is 'two'"), joined():
        pass


def test_buckets_have_a_fixed_order_and_size():
    import torch

    sizes = [100, 30, 20, 60, 5]
    parameters = [torch.empty(n) for n in sizes]
    groups = [[p.numel() for p in group] for group in group_by_size(parameters, 4 * 80)]
    assert groups == [[5, 60], [20, 30], [100]]
