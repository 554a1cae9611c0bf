"""generate: the cells' rows, the other rows, the children, and the command's --peer."""

import json
import mmap
import os
import time
from pathlib import Path

import pytest
import torch

from onelaunch import cli
from onelaunch.bench.core import runner
from onelaunch.bench.core.weights import random_weights
from onelaunch.bench.engines.generate import cell as generate_cell
from onelaunch.bench.engines.generate import child as generation_child
from onelaunch.bench.engines.generate import cuda_child
from onelaunch.bench.engines.generate import experiment as generate
from onelaunch.bench.engines.generate import life as generate_life
from onelaunch.bench.engines.generate.cell import AUTO, Cell, bytes_per_token, prompt_of
from onelaunch.bench.peers.run_c import LETTERS
from onelaunch.checkpoints import random_model
from onelaunch.config import preset
from onelaunch.engines.engine import Sampling, TokenEvent
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.errors import RunFailed
from onelaunch.generation.decode import generate_ids


class FakeRunC:
    """Writes what the reference engine would, at a rate of its own."""

    def __init__(self, ids, rate=500.0):
        self.ids, self.rate, self.calls = ids, rate, []

    def generate(self, prompt, n, threads):
        self.calls.append((len(prompt), n, threads))
        if len(self.ids) < n:
            raise RunFailed(f"run.c: it stopped after {len(self.ids)} of {n} tokens")
        return self.rate, self.ids[:n]


def test_prompts_are_such_as_run_c_can_read():
    ids = prompt_of(256)
    assert len(ids) == 256
    assert ids[:2] == [1, 3]
    assert set(ids[2:]) == set(LETTERS)
    assert len(prompt_of(3)) == 3


def test_bytes_per_token_are_all_weights_and_a_row_of_the_embedding():
    config = preset("stories15m")
    assert bytes_per_token(config, 4) == 4 * (config.n_params + config.dim)
    norms = (2 * config.n_layers + 1) * config.dim
    assert 2 * (config.n_params + config.dim) <= bytes_per_token(config, 2)
    assert bytes_per_token(config, 2) <= 2 * (config.n_params + config.dim + norms)


def test_a_row_stands_beside_the_peers_of_as_many_threads():
    samples = {
        ("ours", 1): [10.0, 20.0, 30.0],
        ("ours", AUTO): [100.0, 200.0, 90.0],
        ("reference", 1): [5.0, 10.0, 10.0],
        ("reference", Cell.number(AUTO)): [50.0, 50.0, 50.0],
        ("read", 1): [2.0, 2.0, 2.0],
        ("read", Cell.number(AUTO)): [4.0, 5.0, 2.0],
    }
    row = generate.row_of("m float32", AUTO, samples, 10**7).to_dict()
    assert row["case"] == "m float32, automatic threads"
    assert (row["ours"], row["gb_s"]) == (100.0, 1.0)
    assert row["peers"] == {"reference": 50.0}
    assert row["ratios"] == {"reference": 2.0}
    if Cell.number(AUTO) > 1:
        assert row["share_of_read"] == pytest.approx(0.4)
        row = generate.row_of("m float32", 1, samples, 10**7).to_dict()
        assert row["case"] == "m float32, 1 thread"
        assert row["ratios"] == {"reference": 2.0}
        assert row["share_of_read"] == pytest.approx(0.1)


@pytest.fixture
def small(monkeypatch):
    """Everything at its smallest, no child processes."""
    monkeypatch.setattr(generate, "QUICK_TOKENS", {"stories260k": 6})
    monkeypatch.setattr(generate, "ROUNDS", 2)
    monkeypatch.setattr(generate_life, "MODEL", "stories260k")
    monkeypatch.setattr(generate_life, "PROMPT", 20)
    monkeypatch.setattr(generate_cell, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr("onelaunch.bench.engines.generate.reading.PASS_BYTES", 1 << 20)
    measured = {
        "start": {"seconds": 1.0, "import_seconds": 0.8, "ready_seconds": 0.2},
        "memory": {"bytes": 70e6, "weight_bytes": 1e6, "cache_bytes": 1e6},
        "cold": {
            "first_token_seconds": 0.5,
            "swap_seconds": 9.0,
            "longest_gap_ms": 20.0,
            "longest_gap_at_swap_ms": 15.0,
            "median_gap_before_ms": 5.0,
            "median_gap_after_ms": 1.0,
        },
    }
    monkeypatch.setattr(generate_life, "in_child", lambda what, model, **rest: measured[what])
    return measured


def test_the_experiment(small, tmp_path, capsys, compiled_program):
    pytest.importorskip("matplotlib")
    code = cli.run(["bench", "generate", "--quick", "--out", str(tmp_path)])
    out, err = capsys.readouterr()
    assert code == 0, err
    path = Path(out.strip())
    rows = {row["case"]: row for row in json.loads(path.read_text())["rows"]}
    row = rows["stories260k float32, automatic threads"]
    assert set(row["peers"]) == set(row["ratios"]) == {"reference", "bare loop"}
    assert row["n"] == 2
    assert row["ours"] > 0 < row["share_of_read"]
    assert row["gb_s"] == pytest.approx(row["ours"] * row["bytes_per_token"] / 1e9, rel=1e-2)
    assert rows["stories260k memory"]["allowed_mb"] == pytest.approx(69.11, abs=0.01)
    assert rows["stories260k memory"]["within"] is False
    assert rows["stories260k second start"]["import_seconds"]["median"] == 0.8
    table = path.with_suffix(".md").read_text()
    assert table.isascii()
    assert "## A prompt read" in table
    assert path.with_suffix(".png").stat().st_size > 5000


def test_memory_s_bound_holds_on_its_edge(small):
    small["memory"]["bytes"] = 2e6 + (64 << 20)
    assert next(generate_life.memory(print)).notes["within"] is True
    small["memory"]["bytes"] += 1
    assert next(generate_life.memory(print)).notes["within"] is False


def test_rows_that_cannot_be_had_are_left_out_and_logged(small, monkeypatch):
    def broken(what, model, **rest):
        raise RunFailed("a child fell")

    monkeypatch.setattr(generate_life, "in_child", broken)
    log = []
    assert list(generate_life.memory(log.append)) == []
    assert list(generate_life.cold_start(2, log.append)) == []
    assert len([line for line in log if "a child fell" in line]) == 3


def test_a_first_start_as_rows_and_table(small):
    (row,) = generate_life.cold_start(3, print)
    assert (row.ours, row.n) == (0.5, 3)
    record = {"device": "d", "rows": [row.to_dict()]}
    line = generate.table(record).splitlines()[-1]
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    assert cells == ["0.50", "9.00", "5.00", "15.0", "20.0", "1.00"]
    assert generate.draw(record) is None


def cell(tmp_path, monkeypatch, peer, log):
    monkeypatch.setattr(generate_cell, "run_c", lambda *rest: peer)
    monkeypatch.setattr(generate_cell, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr("onelaunch.bench.engines.generate.reading.PASS_BYTES", 1)
    config = preset("stories260k")
    return Cell(config, "float32", [1, AUTO], tmp_path, tmp_path, log.append)


def test_run_c_takes_part_and_its_tokens_are_compared(tmp_path, monkeypatch, compiled_program):
    weights = random_weights(preset("stories260k"))
    engine = generate_cell.ReferenceEngine(preset("stories260k"), weights, "cpu")
    (ids,) = generate_ids(engine, [prompt_of(3)], 8, Sampling())
    ids[5] = (ids[5] + 1) % 512
    made = cell(tmp_path, monkeypatch, FakeRunC(ids), [])
    threads = torch.get_num_threads()
    samples = made.rounds(prompt_of(3), 8, 2)
    assert torch.get_num_threads() == threads
    assert made.same_tokens == {"run.c": 5}
    numbers = {1, Cell.number(AUTO)}
    names = ("reference", "bare loop", "run.c", "read")
    assert set(samples) == {("ours", 1), ("ours", AUTO), *((a, b) for a in names for b in numbers)}
    assert all(len(values) == 2 and min(values) > 0 for values in samples.values())
    assert samples["run.c", 1] == [500.0, 500.0]


def test_a_run_c_that_stops_early_is_left_out_and_logged(tmp_path, monkeypatch, compiled_program):
    log = []
    made = cell(tmp_path, monkeypatch, FakeRunC([7, 8]), log)
    samples = made.rounds(prompt_of(3), 8, 1)
    assert not [key for key in samples if key[0] == "run.c"]
    assert log[-1] == "without run.c: it stopped after 2 of 8 tokens"


def test_beside_a_busy_core(monkeypatch, small, compiled_program):
    peer = FakeRunC(list(range(200)), rate=1e6)
    monkeypatch.setattr(generate_life, "run_c", lambda *rest: peer)
    monkeypatch.setattr(generate_life, "WRITING_SECONDS", 1e-4)
    monkeypatch.setattr(generate_life, "BUSY_TOKENS", 5)
    rows = list(generate_life.busy_core(Path("run"), 2, print))
    ours, theirs = (row.to_dict() for row in rows)
    assert ours["who"] == "ours"
    assert ours["peers"] == {"run.c": 1e6}
    assert (theirs["who"], theirs["busy_over_idle"], theirs["least"]) == ("run.c", 1.0, 1e6)
    assert "| run.c" in generate.table({"device": "d", "rows": [ours, theirs]})


def test_a_busy_loop_computes_and_ends():
    with generate_life.busy_loop() as child:
        assert child.poll() is None
    assert child.poll() is not None


@pytest.mark.extended
def test_children_measure_and_say_what_is_wrong(tmp_path, compiled_program):
    model = generate_cell.write_model(
        preset("stories260k"), random_weights(preset("stories260k")), tmp_path / "model.bin"
    )
    measured = generate_life.in_child("start", model)
    assert measured["compiled"] == 1.0
    assert 0 < measured["ready_seconds"] < measured["seconds"]
    with pytest.raises(RunFailed, match=r"child start: .*absent\.bin: no such file"):
        generate_life.in_child("start", tmp_path / "absent.bin")


def test_memory_of_this_process(tmp_path, compiled_program):
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("this system does not count it")
    before = generation_child.private_bytes()
    # pages of its own: a large object could lie where an earlier one was
    with mmap.mmap(-1, 20 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        held.write(os.urandom(20 << 20))
        assert generation_child.private_bytes() - before > 15 << 20
    model = generate_cell.write_model(
        preset("stories260k"), random_weights(preset("stories260k")), tmp_path / "model.bin"
    )
    measured = generation_child.memory(model)
    assert measured["bytes"] < 64 << 20
    assert measured["cache_bytes"] == 4 * 5 * 2 * 32 * 512


class FakeEngine:
    """Writes a token a millisecond; compiled from a token on, at which it takes longer."""

    failed = None

    def __init__(self, swap_at):
        self.swap_at, self.written = swap_at, 0

    def wait(self, seconds):
        return self.written >= self.swap_at

    def session(self, max_batch, max_len):
        return self

    def submit(self, request):
        self.left = request.max_new_tokens

    def step(self, seconds=0.02):
        """Two tokens where it is compiled."""
        n = min(self.left, 1 + self.wait(0))
        time.sleep(0.03 if self.written == self.swap_at else 0.0005)
        self.left, self.written = self.left - n, self.written + n
        return [TokenEvent(0, 5, None)] * n


@pytest.mark.parametrize("swap_at", [5, 509, 510, 700])
def test_the_swap_is_found_amid_the_tokens(monkeypatch, swap_at):
    fake = FakeEngine(swap_at)
    monkeypatch.setattr(generation_child, "CpuEngine", lambda config, weights: fake)
    measured = generation_child.watch_swap(random_model("stories260k"), 60.0)
    assert measured["swap_after_tokens"] == swap_at
    assert fake.written >= swap_at + generation_child.TOKENS_AFTER
    assert measured["longest_gap_at_swap_ms"] >= 30
    assert measured["median_gap_after_ms"] < 25
    assert 0 < measured["first_token_seconds"] < measured["swap_seconds"]


@pytest.mark.parametrize(
    ("swap_at", "failed", "log"),
    [(10**9, None, "too slow"), (10**9, "no compiler", "no compiler"), (1, None, "second token")],
)
def test_without_a_swap_there_is_no_figure(monkeypatch, swap_at, failed, log):
    fake = FakeEngine(swap_at)
    fake.failed = failed
    monkeypatch.setattr(generation_child, "CpuEngine", lambda config, weights: fake)
    with pytest.raises(RunFailed, match=log):
        generation_child.watch_swap(random_model("stories260k"), 0.0)


@pytest.mark.parametrize(
    ("argv", "log"),
    [
        (["generate", "--peer", "run.c"], "--peer run.c: must be NAME=PATH"),
        (["generate", "--peer", "=x"], "must be NAME=PATH"),
        (["generate", "--peer", "run.c="], "must be NAME=PATH"),
        (["generate", "--peer", "run.c=a", "--peer", "run.c=b"], "given twice"),
        (["generate", "--peer", "x=a"], "--peer x: generate knows run.c, llama.cpp only"),
        (["generate", "--peer", "llama.cpp=/nowhere"], "--peer llama.cpp=/nowhere: no such file"),
        (["generate", "--peer", "run.c=/nowhere/run"], "--peer run.c=/nowhere/run: no such file"),
        (["fusion-depth", "--peer", "run.c=a"], "--peer run.c: fusion-depth takes none"),
    ],
)
def test_peers_that_cannot_be_are_refused_in_a_line(argv, log, tmp_path, capsys):
    assert cli.run(["bench", *argv, "--out", str(tmp_path)]) == 2
    assert log in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.glob("*/*"))


def test_a_path_may_hold_the_sign(monkeypatch, tmp_path):
    paths = {}
    monkeypatch.setattr(runner, "conduct", lambda *rest: paths.update(rest[-1]) or tmp_path)
    assert cli.run(["bench", "generate", "--peer", "run.c=a=b"]) == 0
    assert paths == {"run.c": Path("a=b")}


def test_rows_of_a_gpu_as_table_and_picture():
    row = {
        "case": "stories15m bfloat16, batch 1", "ours": 16_000.0, "spread": [15_000.0, 17_000.0],
        "n": 9, "peers": {"torch.compile + graph": 4_000.0, "eager": 500.0}, "floor": None,
        "kind": "gpu", "slope_us": {"median": 61.5}, "first_token_ms": {"median": 0.75},
        "first_token_512_ms": {"median": 0.91},
        "ratios": {"torch.compile + graph": 4.0, "eager": 32.0},
    }  # fmt: skip
    start = {
        "case": "stories15m, nothing compiled", "ours": 0.29, "spread": [0.28, 0.3], "n": 3,
        "peers": {}, "floor": None, "kind": "gpu start", "text_seconds": {"median": 0.5},
        "kernels_seconds": {"median": 6.4}, "by_pytorch": {"median": 1.0},
    }  # fmt: skip
    record = {
        "device": "a GPU", "date": "2026-11-29", "commit": "1234567", "versions": {},
        "unit": generate.UNIT, "rows": [row, start],
    }  # fmt: skip
    text = generate.table(record)
    for cell in ("61.5", "0.75", "0.91", "0.29", "6.4", " yes |", "4,000 (4.00x)", "500 (32.00x)"):
        assert cell in text
    assert generate.draw(record) is not None


def test_a_first_text_on_a_gpu_is_timed_to_its_kernels(monkeypatch):
    """With the reference engine in the GPU's place, and kernels that are there after two looks."""
    looks = iter([True, True, False])

    class Compiling(ReferenceEngine):
        def describe(self):
            return {"compiling": next(looks)}

    def chosen(name, config, weights, device, dtype, log):
        log("PyTorch generates, one operator a launch")
        return Compiling(config, weights)

    monkeypatch.setattr(cuda_child, "choose", chosen)
    times = cuda_child.first_text("stories260k", "cpu")
    order = [times[name] for name in ("first_token_seconds", "text_seconds", "kernels_seconds")]
    assert 0 < order[0] < order[1] < order[2]
    assert times["by_pytorch"] == 1.0
