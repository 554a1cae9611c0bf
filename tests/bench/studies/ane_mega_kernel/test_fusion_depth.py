"""fusion-depth: all ways do the same work, the price of a call is found, the views say it."""

import json
import random
from pathlib import Path

import pytest
import torch

from onelaunch import cli
from onelaunch.bench.core import compiled
from onelaunch.bench.core.published import PUBLISHED
from onelaunch.bench.core.weights import random_weights
from onelaunch.bench.studies.ane_mega_kernel.fusion_depth import cases
from onelaunch.bench.studies.ane_mega_kernel.fusion_depth import cpu as fusion_depth_cpu
from onelaunch.bench.studies.ane_mega_kernel.fusion_depth.cases import (
    LAYERS,
    ONE_LAYER,
    Block,
    Case,
    How,
    block_ways,
    rows_of,
)
from onelaunch.bench.studies.ane_mega_kernel.fusion_depth.views import FFNS, MODELS, PARTS
from onelaunch.engines.cpu.runtime import Runtime
from onelaunch.model import Model
from onelaunch.plan import every_depth, launches, make_plan, part_of

TWO_THREADS = How("2 threads", {"threads": 2})


@pytest.mark.parametrize("with_embed", [False, True])
@pytest.mark.parametrize("block", [Block("ffn", 32, 48, 1), Block("attention", 32, 2, 1)])
def test_block_ways_are_all_layers_once_in_order(block, with_embed):
    ways, first = block_ways(block.stages, with_embed), int(not with_embed)
    plan = part_of(make_plan(block.config), block.part)
    assert len(plan.stages) == 1 + block.stages * LAYERS
    assert ways.pop(ONE_LAYER) == [(first, 1 + block.stages)]
    calls = {name: len(ranges) for name, ranges in ways.items()}
    assert calls == {"stage": block.stages * 12, "1": 12, "2": 6, "4": 3, "all": 1}
    for ranges in ways.values():
        assert [i for pair in ranges for i in range(*pair)] == list(range(first, len(plan.stages)))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_forward_laid_out_can_be_run_again_at_every_depth(compiled_program, threads):
    config = compiled.TINY.with_(n_layers=3, vocab_size=40)
    program = compiled.compiled_program(print)
    plan = make_plan(config)
    runtime = Runtime(config, compiled.pack(config, program), program, plan, threads, False)
    ids = torch.tensor([3, 39, 0, 7, 11])
    expected = Model.from_weights(config, random_weights(config))(ids[None])[0]
    for depth in every_depth(3):

        def forward(depth=depth):
            for _ in range(2):
                for each in launches(plan, depth):
                    runtime.run(each.first, each.last)

        logits = compiled.while_laid_out(runtime, ids, forward)
        assert (logits - expected).norm() / expected.norm() < 1e-5
    assert compiled.while_laid_out(runtime, ids, lambda: None).isnan().all()


def test_an_ffn_forward_starts_from_the_embedding_each_time(compiled_program):
    """Not from zeros, and not from what the forward before left."""
    ffn = Block("ffn", 32, 48, 3)
    plan = part_of(make_plan(ffn.config), "ffn")
    program = compiled.compiled_program(print)
    runtime = Runtime(ffn.config, compiled.pack(ffn.config, program), program, plan, 1, False)
    seen = []

    def forwards():
        for _ in range(2):
            for first, last in [(0, 1), *block_ways(2)["all"]]:
                runtime.run(first, last)
            seen.append(_residual(runtime, 3, 32))

    compiled.while_laid_out(runtime, torch.tensor([1, 5, 60]), forwards)
    w = random_weights(ffn.config)
    x = w["embed_tokens.weight"][[1, 5, 60]]
    for i in range(LAYERS):
        h = torch.nn.functional.rms_norm(x, (32,), None, ffn.config.norm_eps)
        gate, up, down = (w[f"layers.{i}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        x = x + (torch.nn.functional.silu(h @ gate.T) * (h @ up.T)) @ down.T
    assert torch.equal(seen[0], seen[1])
    assert (seen[0] - x).norm() / x.norm() < 1e-5


def _residual(runtime, rows, columns):
    import ctypes

    from onelaunch.engines.cpu.layout import State

    data = ctypes.string_at(runtime.state[State.X], 4 * rows * columns)
    return torch.frombuffer(bytearray(data), dtype=torch.float32).view(rows, columns)


def made_up(name="m forward 1x1", model="m", price=2.0, rest=50.0, less=()):
    """A case whose forwards take `rest + price x calls`, on a machine that drifts."""
    ways = {"stage": [(i, i + 1) for i in range(7)], "half": [(0, 3), (3, 5), (5, 7)]}
    ways |= {"1": [(0, 3), (3, 7)], "all": [(0, 7)]} | {way: [(0, 2)] for way in less}
    drift = random.Random(5)
    samples = {way: [] for way in ways}
    for _ in range(9):
        speed = drift.uniform(1, 1.6)
        for way, ranges in ways.items():
            samples[way].append(speed * (rest + price * len(ranges)))
    return Case(name, model, 1, ways, tuple(less)), samples


def test_rows_have_calls_ratios_and_the_price_of_a_call():
    case, samples = made_up(less=("one layer",))
    rows = {row.case: row.to_dict() for row in rows_of(case, samples, TWO_THREADS)}
    assert list(rows) == [
        "m forward 1x1 depth stage, 2 threads",
        "m forward 1x1 depth half, 2 threads",
        "m forward 1x1 depth 1, 2 threads",
        "m forward 1x1 depth all, 2 threads",
        "m forward 1x1 one layer, 2 threads",
        "m forward 1x1 price of a call, 2 threads",
    ]
    half = rows["m forward 1x1 depth half, 2 threads"]
    assert half["calls"] == 3
    assert half["speed_against_stage"] == pytest.approx(64 / 56, abs=1e-4)
    assert half["speed_of_all"] == pytest.approx(56 / 52, abs=1e-4)
    assert "speed_of_all" not in rows["m forward 1x1 one layer, 2 threads"]
    price = rows["m forward 1x1 price of a call, 2 threads"]
    assert 2.0 <= price["spread"][0] <= price["ours"] <= price["spread"][1] <= 3.2
    assert price["rest"]["median"] == pytest.approx(25 * price["ours"], rel=1e-4)
    assert price["points"] == [1, 2, 3, 7]


def test_the_price_does_not_hang_on_ways_that_do_less():
    prices = []
    for less in ((), ("one layer",)):
        case, samples = made_up(less=less)
        if less:
            samples["one layer"] = [1.0] * 9
        prices.append([row for row in rows_of(case, samples, TWO_THREADS)][-1].ours)
    assert prices[0] == prices[1]


def test_the_experiment(tmp_path, capsys, monkeypatch, compiled_program):
    pytest.importorskip("matplotlib")
    cpu = fusion_depth_cpu
    monkeypatch.setattr(cases, "QUICK_FFNS", (Block("ffn", 64, 128, 1),))
    monkeypatch.setattr(cpu, "QUICK_MODELS", ("stories260k",))
    monkeypatch.setattr(cpu, "thread_counts", lambda: (1,))
    monkeypatch.setattr(cpu, "QUICK_ROUNDS", 3)
    monkeypatch.setattr(cpu, "QUICK_SAMPLE_SECONDS", 0.001)
    code = cli.run(["bench", "fusion-depth", "--quick", "--out", str(tmp_path)])
    out, err = capsys.readouterr()
    assert code == 0, err
    record = json.loads(Path(out.strip()).read_text())
    assert record["unit"] == "us"
    rows = {row["case"]: row for row in record["rows"]}
    row = rows["stories260k forward 1x64 depth half, 1 thread"]
    assert row["calls"] == 12
    assert row["n"] == 3
    assert row["ours"] > 0
    assert rows["ffn 64/128 1x1 depth stage, 1 thread"]["calls"] == 24
    assert "compilation" not in rows
    table = Path(out.strip()).with_suffix(".md").read_text()
    assert table.isascii()
    line = next(line for line in table.splitlines() if line.startswith("| 64/128, 1 tok., 1 thr."))
    assert [cell.strip() for cell in line.split("|")][6:10] == ["183", "247", "2,197", "8.9x"]
    assert Path(out.strip()).with_suffix(".png").stat().st_size > 5000


def test_compilation_is_from_an_empty_store(monkeypatch):
    stores = []
    monkeypatch.setattr(fusion_depth_cpu, "compiled_program", lambda _, store: stores.append(store))
    row = fusion_depth_cpu.compilation(print)
    assert (row.case, row.notes["unit"]) == ("compilation", "s")
    assert row.ours >= 0
    (store,) = stores
    assert not store.folder.exists()


def test_published_speedups_are_of_the_published_times():
    for key in FFNS.values():
        values = PUBLISHED[key].values
        assert round(values["12 apart, us"] / values["12 in one, us"], 1) == values["speedup"]
    for key in (*MODELS.values(), *PARTS.values()):
        values = PUBLISHED[key].values
        speedup = values["two a layer, us"] / values["one program, us"]
        assert speedup == pytest.approx(values["speedup"], abs=0.01)
    whole, part = (PUBLISHED[key].values for key in ("whole-110m", "part-110m-4"))
    divided = round(whole["two a layer, us"] / part["one program, us"], 2)
    assert divided == PUBLISHED["sweet-spot"].values["speedup"]
