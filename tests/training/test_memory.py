"""Whether a run fits in memory: the estimate, what is free, and the line where it does not."""

from __future__ import annotations

import itertools

import pytest
import torch

from onelaunch import cli
from onelaunch.checkpoints.run_folder import list_checkpoints
from onelaunch.config import preset
from onelaunch.errors import BadInput, RunFailed
from onelaunch.training import memory
from onelaunch.training import run as runs
from onelaunch.training.loop import Trainer
from onelaunch.training.recipe import Recipe
from tests.kills import SETTINGS

CPU = torch.device("cpu")

# Peaks of two updates on an NVIDIA H200 (torch 2.11, fused AdamW), torch.cuda.max_memory_allocated:
# preset, layers (0: all), batch, sequence, compile, dtype, accum, bytes.
PEAKS = [
    ("stories15m", 0, 32, 256, False, "bfloat16", 1, 4112365568),
    ("stories110m", 0, 16, 256, False, "bfloat16", 1, 4972959232),
    ("stories15m", 0, 4, 256, False, "bfloat16", 1, 691726336),
    ("stories15m", 0, 32, 256, False, "float32", 1, 4405682176),
    ("stories110m", 0, 4, 1024, False, "float32", 1, 5746140672),
    ("stories110m", 0, 4, 1024, False, "bfloat16", 2, 5409505792),
    ("stories260k", 0, 64, 512, False, "bfloat16", 1, 701652992),
    ("qwen3-0.6b", 8, 4, 512, False, "bfloat16", 1, 9071938048),
    ("smollm2-135m", 0, 8, 512, False, "bfloat16", 1, 7566263296),
    ("llama-3.2-1b", 4, 1, 256, False, "bfloat16", 1, 9149143552),
    ("qwen3-0.6b", 8, 1, 64, False, "bfloat16", 1, 5129731072),
    ("stories15m", 0, 32, 256, True, "bfloat16", 1, 1276443136),
    ("stories110m", 0, 16, 256, True, "bfloat16", 1, 3269416960),
    ("stories15m", 0, 32, 256, True, "float32", 1, 2193065984),
    ("qwen3-0.6b", 8, 4, 512, True, "bfloat16", 1, 5761321984),
    ("stories260k", 0, 64, 512, True, "bfloat16", 1, 410674176),
]


def recipe(**changed) -> Recipe:
    settings = SETTINGS | {"train.updates": 6, "train.accum": 1, "checkpoint.every": 2}
    settings |= {key.replace("__", "."): value for key, value in changed.items()}
    return Recipe().with_settings(settings, "test")


@pytest.mark.parametrize(
    "case", PEAKS, ids=lambda c: f"{c[0]}-{c[2]}x{c[3]}-{c[5]}{'-compile' * c[4]}"
)
def test_the_estimate_is_below_what_was_measured_and_not_far(case):
    name, layers, batch, sequence, compiled, dtype, accum, peak = case
    config = preset(name)
    config = config.with_(n_layers=layers or config.n_layers)
    r = recipe(train__batch_size=batch, train__compile=compiled, train__accum=accum)
    estimated = memory.estimate(r, config, sequence, dtype == "bfloat16").total
    assert (0.5 if compiled else 0.85) * peak < estimated <= peak


@pytest.mark.parametrize(("name", "peak"), [("stories15m", 2.55e9), ("stories110m", 8.98e9)])
def test_the_estimate_of_the_cuda_engine(name, peak):
    """64 x 256 tokens on an H200; and less where more is computed again."""
    how = {"train__engine": "cuda", "train__batch_size": 64}

    def estimated(recompute):
        r = recipe(**how, train__recompute=recompute)
        return memory.estimate(r, preset(name), 256, True).total

    assert 0.95 * peak < estimated("nothing") <= peak
    assert estimated("nothing") > estimated("hidden") > estimated("layers")
    assert estimated("nothing") > estimated("auto") > estimated("layers")


@pytest.mark.parametrize("accum", [1, 3])
def test_what_fits_to_the_byte_is_let_through_and_one_byte_less_is_not(monkeypatch, accum):
    r, config = recipe(train__batch_size=64, train__accum=accum), preset("stories15m")
    needed = memory.estimate(r, config, 256, False)
    monkeypatch.setattr(memory, "available_bytes", lambda device: needed.total)
    memory.check_fits(r, config, 256, CPU)
    monkeypatch.setattr(memory, "available_bytes", lambda device: needed.total - 1)
    with pytest.raises(BadInput, match="set train.batch_size to 63 or less"):
        memory.check_fits(r, config, 256, CPU)
    memory.check_fits(recipe(train__batch_size=63, train__accum=accum), config, 256, CPU)


def test_the_field_to_change_is_the_one_that_helps(monkeypatch):
    r, config = recipe(train__batch_size=4), preset("stories15m")
    needed = memory.estimate(r, config, 256, False)
    monkeypatch.setattr(memory, "available_bytes", lambda device: needed.fixed + needed.gradients)
    with pytest.raises(BadInput, match=r"train.batch_size to 1 .*train.seq_len"):
        memory.check_fits(recipe(train__batch_size=4), config, 4096 * 64, CPU)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1000)
    with pytest.raises(BadInput, match=r"smaller model \(\[model\]\)"):
        memory.check_fits(r, config, 256, CPU)
    with pytest.raises(BadInput, match=r"smaller model"):
        memory.check_fits(recipe(train__engine="coreml", train__dropout=0.0), config, 256, CPU)
    monkeypatch.setattr(memory, "available_bytes", lambda device: None)
    memory.check_fits(r, config, 256, CPU)


def test_a_run_that_cannot_fit_is_refused_before_it_leaves_anything(tmp_path, monkeypatch, capsys):
    run, words = tmp_path / "run", []
    for key, value in (SETTINGS | {"model.max_seq_len": 64}).items():
        words += ["--preset", value] if key == "model.preset" else ["--set", f"{key}={value}"]
    monkeypatch.setattr(memory, "available_bytes", lambda device: 300_000)
    assert cli.run(["train", "--run", str(run), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "of memory" in line
    assert "train.batch_size" in line or "[model]" in line
    assert not run.exists()


def test_a_resume_that_cannot_fit_is_refused_and_changes_nothing(tmp_path, monkeypatch):
    runs.start(recipe(), tmp_path / "run", quiet=True)
    before = (tmp_path / "run" / "recipe.toml").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available_bytes", lambda device: 10_000_000)
        with pytest.raises(BadInput, match="set train.batch_size to"):
            runs.resume(tmp_path / "run", {"train.batch_size": 1000}, quiet=True)
    assert (tmp_path / "run" / "recipe.toml").read_bytes() == before


def test_memory_here_is_found():
    estimated = memory.available_bytes(CPU)
    assert estimated is None or 1 << 20 < estimated < 1 << 50


def test_a_control_group_counts_with_those_around_it(tmp_path):
    mount, membership = tmp_path / "cgroup", tmp_path / "membership"
    inner = mount / "outer" / "inner"
    inner.mkdir(parents=True)

    def group(folder, limit, usage, file):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{usage}\n")
        (folder / "memory.stat").write_text(f"anon 1\nfile {file}\n")

    group(inner, "max", 500, 0)
    group(inner.parent, 1000, 700, 200)  # the cache of files can be given up
    group(mount, 5000, 700, 0)
    membership.write_text("0::/outer/inner\n")
    assert memory._group_bytes(membership, mount) == [500, 4300]
    membership.write_text("1:cpu:/x\n0::/gone\n")
    assert memory._group_bytes(membership, mount) == [4300]
    assert memory._group_bytes(tmp_path / "none", mount) == []
    old = mount / "memory"
    old.mkdir()
    for name, text in (
        ("memory.limit_in_bytes", "900"),
        ("memory.usage_in_bytes", "400"),
        ("memory.stat", "cache 1\ntotal_cache 100"),
    ):
        (old / name).write_text(text)
    membership.write_text("4:memory:/a/b\n")
    assert memory._group_bytes(membership, mount) == [600]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes"),
        MemoryError(),
    ],
    ids=["cuda", "linux", "windows", "python"],
)
def test_after_running_out_of_memory_the_line_names_batch_size(tmp_path, monkeypatch, error):
    micro_step, count = Trainer._micro_step, itertools.count(1)

    def greedy(self):
        if next(count) == 4:
            raise error
        micro_step(self)

    monkeypatch.setattr(Trainer, "_micro_step", greedy)
    with pytest.raises(RunFailed, match=r"batch_size, which is 4: continue from update-00000002"):
        runs.start(recipe(), tmp_path / "run", quiet=True)
    assert list_checkpoints(tmp_path / "run")[-1].name == "update-00000002"
    monkeypatch.undo()
    runs.resume(tmp_path / "run", {"train.batch_size": 2}, quiet=True)


def test_before_the_first_step_too_and_no_other_error_is_taken_for_it(tmp_path, monkeypatch):
    def fail(error):
        def init_weights(self, seed):
            raise error

        monkeypatch.setattr("onelaunch.training.run.Model.init_weights", init_weights)

    fail(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    with pytest.raises(RunFailed, match="train.seq_len, as train.batch_size is 1"):
        runs.start(recipe(train__batch_size=1), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    fail(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        runs.start(recipe(), tmp_path / "run", quiet=True)
