"""The RMSNorm experiments, at tiny shapes; what a GPU does is played by a stand-in."""

import json
import math
from pathlib import Path

import pytest
import torch

from onelaunch import cli
from onelaunch.bench.core.children import Ended
from onelaunch.bench.core.record import Row
from onelaunch.bench.core.timing import Replay
from onelaunch.bench.peers.rms_norm import Contender
from onelaunch.bench.studies.block_row import (
    compile_ahead,
    norm_cell,
    paths,
    rms_norm,
    rms_norm_threshold,
    rms_norm_training,
)
from onelaunch.bench.studies.block_row.rms_norm import views as rms_norm_views
from onelaunch.errors import RunFailed
from tests.bench.studies.block_row.norms import FakeGraph, InPlace, last_row_missing, right

CPU = torch.device("cpu")


def bench(experiment, folder, capsys):
    """Runs the verb; returns the record and what was shown."""
    code = cli.run(["bench", experiment, "--quick", "--device", "cpu", "--out", str(folder)])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert out.strip().endswith(f"{experiment}.json")
    record = json.loads(Path(out.strip()).read_text())
    return record, err


def test_rms_norm_on_a_cpu(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(rms_norm, "CPU_QUICK", ((16, 8), (4, 24)))
    monkeypatch.setattr(rms_norm, "CPU_SAMPLE_US", 100.0)
    only_torch = rms_norm.peers(CPU, print)[:1]
    monkeypatch.setattr(rms_norm, "peers", lambda device, log: only_torch)
    record, log = bench("rms-norm", tmp_path, capsys)
    rows = {row["case"]: row for row in record["rows"]}
    assert set(rows) == {f"{s} {p} host" for s in ("16x8", "4x24") for p in norm_cell.PASSES}
    row = rows["16x8 full host"]
    assert row["ours"] > 0
    assert row["ratio"] == pytest.approx(row["ours"] / row["peers"]["torch"], rel=1e-3)
    assert row["best_peer"] == "torch"
    assert row["n"] == rms_norm.HOST_SAMPLES
    assert "no kernel on this device" in log
    (folder,) = tmp_path.iterdir()
    table = (folder / "rms-norm.md").read_text()
    assert table.isascii()
    assert table.strip() in log
    assert "| 16x8 " in table
    assert (folder / "rms-norm.png").stat().st_size > 5000


@pytest.mark.extended
def test_what_torch_compile_cannot_do_is_left_out_and_logged(monkeypatch):
    def broken(x, weight):
        raise RuntimeError("no C++ compiler found\nmore")

    monkeypatch.setattr(rms_norm, "CPU_QUICK", ((16, 8),))
    compiled = Contender("torch.compile", lambda: broken)
    monkeypatch.setattr(rms_norm, "peers", lambda device, log: [compiled])
    lines = []
    rows = list(rms_norm.run("cpu", True, lines.append))
    assert [row.peers for row in rows] == [{}, {}, {}]
    assert (
        len([line for line in lines if "without torch.compile: RuntimeError: no C++" in line]) == 1
    )
    text = rms_norm.table({"device": "a device", "rows": [row.to_dict() for row in rows]})
    assert "16x8" in text


@pytest.fixture
def gpu(monkeypatch):
    """The GPU's half of rms-norm on a CPU: graphs that call again, times by contender."""
    by_name = {"ours": 2.0, "row": 4.0, "block": 3.0, "source": 3.5, "torch": 5.0, "liger": 2.5}
    by_name |= {"liger row": 8.0, "liger source": 6.0, "torch.compile": 9.0}

    def capture(call, sets, calls):
        kept = [call(i) for i in range(sets)]
        return Replay(FakeGraph(call, sets, calls, kept), calls, kept)

    def in_turn(replays, samples, before):
        # forward has one output, backward two, full three
        parts = {name: len(replay.kept[0]) / 3 for name, replay in replays.items()}
        return {name: [by_name[name] * part] * samples for name, part in parts.items()}

    monkeypatch.setattr(norm_cell, "capture", capture)
    monkeypatch.setattr(norm_cell, "replays_in_turn", in_turn)
    monkeypatch.setattr(norm_cell, "l2_bytes", lambda device: 4096)
    monkeypatch.setattr(rms_norm, "copy_bandwidth", lambda device: 4000.0)
    monkeypatch.setattr(rms_norm, "precompile", lambda device, shapes, log: None)
    monkeypatch.setattr(rms_norm, "peak_bytes", lambda cell, norm: 12345)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(rms_norm, "GPU_QUICK", ((64, 16), (4096, 64)))
    monkeypatch.setattr(rms_norm, "HOST_SHAPES", ((64, 16),))
    monkeypatch.setattr(rms_norm, "MEMORY_SHAPES", ((64, 16),))
    monkeypatch.setattr(rms_norm, "HOST_CALLS", 2)
    return by_name


def refuses_twice(x, weight):
    """As torch.compile does: its backward pass runs once."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            ctx.ran = False
            return right(x, weight)

        @staticmethod
        def backward(ctx, dy):
            if ctx.ran:
                raise RuntimeError("donated buffers")
            ctx.ran = True
            x, weight = (t.detach().requires_grad_() for t in ctx.saved_tensors)
            with torch.enable_grad():
                return torch.autograd.grad(right(x, weight), (x, weight), dy)

    return Once.apply(x, weight)


def contenders(ours=right):
    forms = [Contender(n, lambda: right, form=True, sibling=True) for n in ("row", "block")]
    return [
        Contender("ours", lambda: ours, form=True),
        *forms,
        Contender("torch", lambda: right),
        Contender("torch.compile", lambda: refuses_twice, repeatable=lambda: right),
        Contender("liger", lambda: InPlace.apply, in_place=True),
        Contender("liger row", lambda: InPlace.apply, in_place=True, sibling=True),
        Contender("liger source", lambda: InPlace.apply, in_place=True, sibling=True),
    ]


def test_rms_norm_as_on_a_gpu(gpu):
    lines = []
    rows = {row.case: row for row in rms_norm.on_a_gpu(CPU, contenders(), True, lines.append)}
    assert set(rows) == {
        *(f"{s} {p} gpu" for s in ("64x16", "4096x64") for p in ("forward", "full", "backward")),
        *(f"64x16 {p} host" for p in norm_cell.PASSES),
        "64x16 memory",
    }
    row = rows["4096x64 full gpu"]
    assert (row.ours, row.n) == (2.0, rms_norm.SAMPLES)
    assert row.notes["forms"] == {"row": 4.0, "block": 3.0}
    assert row.peers["liger"] == 2.5
    assert (row.notes["best_peer"], row.notes["ratio"]) == ("liger", 0.8)
    # 5 tensors of 4096 x 64 two-byte elements at 4000 GB/s
    assert row.floor == pytest.approx(5 * 4096 * 64 * 2 / 4000e3, rel=1e-3)
    assert row.notes["copy_share"] == pytest.approx(row.floor / 2.0, abs=1e-4)
    assert row.notes["percent_of_liger_row"] == -75.0
    assert row.notes["liger_source_percent"] == -25.0
    assert row.notes["published_percent"] == -67.9
    assert rows["4096x64 backward gpu"].notes["published_percent"] == -69.8
    assert "published_percent" not in rows["64x16 full gpu"].notes
    assert set(row.notes["plan"]) == {"forward", "backward"}
    backward = rows["4096x64 backward gpu"]
    # by its second form, which runs twice
    assert backward.peers["torch.compile"] == pytest.approx(6.0)
    assert not [line for line in lines if " without " in line]
    host = rows["64x16 full host"]
    assert set(host.peers) == {"torch", "torch.compile", "liger"}
    assert "forms" not in host.notes
    memory = rows["64x16 memory"]
    assert (memory.ours, memory.notes["unit"]) == (12345, "bytes")
    assert memory.notes["forms"]["in place"] == 12345
    # y and dX, dW; partials
    plan = rms_norm.backward_plan(64, 16, 2, 1)
    assert memory.floor == 2 * 64 * 16 * 2 + 16 * 2
    assert memory.notes["planned"] == memory.floor + plan.partials * 16 * 4
    assert lines[0].startswith("copy on the device: 4,000 GB/s")


def test_a_wrong_result_of_ours_fails_the_run_at_its_end(gpu):
    rows = rms_norm.on_a_gpu(CPU, contenders(last_row_missing), True, print)
    assert next(rows).case == "64x16 memory"
    with pytest.raises(RunFailed, match="64x16 forward gpu.*4096x64 full gpu"):
        next(rows)


def test_compiling_ahead_runs_every_contender_and_minds_no_failure(monkeypatch):
    ran = []

    def counted(x, weight):
        ran.append(x.requires_grad)
        return right(x, weight)

    def broken(x, weight):
        raise RuntimeError("no")

    there = [Contender("torch", lambda: broken), Contender("liger", lambda: counted)]
    monkeypatch.setattr(compile_ahead, "ours", list)
    monkeypatch.setattr(compile_ahead, "peers", lambda device, log: there)
    compile_ahead.warm(CPU, 4, 8)
    assert ran == [False, True]


@pytest.mark.parametrize("ended", ["not done", OSError("no processes here")])
def test_compiling_ahead_may_fail_and_says_so(monkeypatch, ended):
    def together(commands, timeout):
        assert len(commands) == 1
        assert json.loads(commands[0][-1]) == ["cpu", [[4, 8]]]
        if isinstance(ended, OSError):
            raise ended
        return [Ended(True, "", 1.0), Ended(None, ended, timeout)]

    monkeypatch.setattr(compile_ahead, "together", together)
    monkeypatch.setattr(compile_ahead, "_set_inductor", lambda: None)
    lines = []
    compile_ahead.precompile(CPU, [(4, 8)], lines.append)
    assert str(ended) in lines[-1]
    assert "shape by shape" in lines[-1]


@pytest.mark.extended
def test_a_process_compiles_ahead(monkeypatch):
    monkeypatch.setattr(compile_ahead, "_set_inductor", lambda: None)
    lines = []
    compile_ahead.precompile(CPU, [(4, 8), (2, 8)], lines.append)
    assert len(lines) == 1, "no failure"


def test_the_grids_are_those_of_the_source_and_the_larger_shapes():
    assert len(rms_norm.GPU_SHAPES) == len(set(rms_norm.GPU_SHAPES)) == 28
    assert {shape for by_shape in rms_norm_views.PUBLISHED.values() for shape in by_shape} == {
        (rows, columns) for rows in rms_norm.ROWS for columns in rms_norm.COLUMNS
    }
    assert rms_norm_views.PUBLISHED["full"][16384, 512] == -39.7
    assert rms_norm_views.PUBLISHED["backward"][32768, 64] == -83.3
    assert set(rms_norm.GPU_QUICK) <= set(rms_norm.GPU_SHAPES)


def a_record(rows):
    return {"device": "a device", "rows": [row.to_dict() for row in rows]}


def test_the_table_says_means_and_worst_shapes():
    times = {"4096x64": (2.0, 4.0), "8192x64": (4.0, 4.0), "4096x128": (8.0, 4.0)}
    rows = [
        rms_norm.row_of(f"{shape} full gpu", {"ours": [ours], "torch": [peer]}, {"ours"})
        for shape, (ours, peer) in times.items()
    ]
    text = rms_norm.table(a_record(rows))
    assert "1.000x the speed of the best peer (geometric mean of 3)" in text
    assert "slowest against it: 4096x128 2.000 of torch, 8192x64 1.000 of torch" in text
    # by width, then by rows
    shapes = [line.split()[1] for line in text.splitlines() if line.startswith(("| 4", "| 8"))]
    assert shapes == ["4096x64", "8192x64", "4096x128"]


def test_the_picture_has_a_panel_a_pass():
    pytest.importorskip("matplotlib")
    rows = [
        rms_norm.row_of(
            f"4096x64 {pass_} gpu", {"ours": [2.0], "row": [3.0], "torch": [4.0]}, {"ours", "row"}
        )
        for pass_ in norm_cell.PASSES
    ]
    figure = rms_norm.draw(a_record(rows))
    full, forward = figure.axes[:2]
    assert full.get_title().startswith("Forward and backward")
    assert forward.get_title().startswith("Forward,")
    assert [t.get_text() for t in full.get_xticklabels()] == ["ours", "ours: row", "torch"]
    assert [t.get_text() for t in full.texts] == ["2.00", "1.33", "1.00"]
    assert rms_norm.draw(a_record([Row("8x8 memory", 1.0)])) is None


def ratios(full, forward=0.9, backward=0.9):
    return {"forward": forward, "full": full, "backward": backward}


@pytest.mark.parametrize(
    ("by_rows", "lowest"),
    [
        ({256: ratios(0.9), 512: ratios(0.8)}, 256),
        ({256: ratios(1.1), 512: ratios(0.8), 1024: ratios(0.8)}, 512),
        # one loss higher up counts, in whichever pass
        ({256: ratios(0.9), 512: ratios(0.9, forward=1.1), 1024: ratios(0.8)}, 1024),
        # a tie decides nothing: it neither ends what wins nor wins alone
        ({256: ratios(0.9), 512: ratios(0.9, forward=1.005), 1024: ratios(0.8)}, 256),
        ({256: ratios(0.9), 512: ratios(1.0, 1.009, 0.995), 1024: ratios(1.0, 1.0, 1.0)}, 256),
        ({256: ratios(1.0, 1.0, 1.0), 512: ratios(0.8)}, 512),
        ({256: ratios(1.0, 1.0, 1.0)}, None),
        ({256: ratios(0.9), 512: ratios(0.9, backward=1.2)}, None),
        # a pass that was not timed has not won
        ({256: ratios(0.9), 512: {"full": 0.5}}, None),
        ({512: ratios(0.9), 256: ratios(0.9), 1024: {"forward": 0.5}}, None),
    ],
)
def test_the_threshold_is_where_every_pass_wins_from_there_on(by_rows, lowest):
    by_pass = {
        pass_: {(rows, 64): each[pass_] for rows, each in by_rows.items() if pass_ in each}
        for pass_ in norm_cell.PASSES
    }
    assert paths.wins_from(by_pass, norm_cell.PASSES, [64], ties=True) == lowest


def test_rms_norm_threshold_on_a_cpu(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(rms_norm_threshold, "CPU_QUICK_ROWS", (4, 8))
    monkeypatch.setattr(rms_norm_threshold, "CPU_QUICK_COLUMNS", (16,))
    monkeypatch.setattr(rms_norm_threshold, "CPU_CALLS", 2)
    record, log = bench("rms-norm-threshold", tmp_path, capsys)
    assert {row["case"] for row in record["rows"]} == {
        f"{n}x16 {p} host" for n in (4, 8) for p in norm_cell.PASSES
    }
    assert "no kernel on this device" in log
    (folder,) = tmp_path.iterdir()
    assert "time of ours / time of PyTorch's" in (folder / "rms-norm-threshold.md").read_text()
    assert (folder / "rms-norm-threshold.png").stat().st_size > 5000


def on_a_cpu(rows, columns, dtype, device):
    return norm_cell.Cell(rows, columns, dtype, CPU)


def test_the_published_sentence_is_measured_on_its_own_form(gpu, monkeypatch):
    """With the tuned pair our kernels by the published tile, and Liger's two paths, at the
    sentence's widths and row counts only."""
    monkeypatch.setattr(rms_norm_threshold, "has_kernel", lambda place, log: True)
    monkeypatch.setattr(rms_norm_threshold, "Cell", on_a_cpu)
    monkeypatch.setattr(norm_cell, "synchronizer", lambda device: lambda: None)
    monkeypatch.setattr(rms_norm_threshold, "QUICK_ROWS", (16, 4096))
    monkeypatch.setattr(rms_norm_threshold, "QUICK_COLUMNS", (8, 64))
    monkeypatch.setattr(
        rms_norm_threshold,
        "ours",
        lambda: [Contender(name, lambda: right, form=True) for name in ("row", "block")],
    )
    liger = [
        Contender(name, lambda: InPlace.apply, in_place=True)
        for name in ("liger block", "liger row")
    ]
    source = [Contender(name, lambda: right) for name in ("source block", "source row")]
    monkeypatch.setattr(rms_norm_threshold, "liger_paths", lambda log: liger)
    monkeypatch.setattr(rms_norm_threshold, "source_paths", lambda: source)
    gpu |= {"source block": 3.0, "source row": 6.0, "liger block": 2.0, "liger row": 8.0}
    rows = list(rms_norm_threshold.run("cuda", True, lambda line: None))
    of_the_sentence = [row for row in rows if row.case.startswith("4096x64 ")]
    assert [set(row.notes["forms"]) for row in of_the_sentence] == [
        {"source block", "source row", "liger block", "liger row"}
    ] * 3
    assert len(rows) == 12
    assert all("forms" not in row.notes for row in rows if row not in of_the_sentence)
    assert all(row.peers.keys() == {"row"} and row.notes["best_peer"] == "row" for row in rows)
    record = a_record(rows)
    for key, ratio in (("source", 0.5), ("liger", 0.25), ("tuned", 0.5)):
        ratios = paths.ratios_of(record, paths.PAIRS[key])
        assert ratios == {
            pass_: {(4096, 64): pytest.approx(ratio, rel=1e-3)} for pass_ in norm_cell.PASSES
        }


def test_rms_norm_threshold_as_on_a_gpu(gpu, monkeypatch):
    """The block path, 3 us, against the row path, 4 us."""
    forms = {c.name: c for c in contenders() if c.form}
    monkeypatch.setattr(rms_norm_threshold, "ours", lambda: list(forms.values()))
    there = rms_norm_threshold._contenders(torch.device("cuda"))
    assert [c.name for c in there] == ["ours", "row"]
    monkeypatch.setattr(norm_cell, "synchronizer", lambda device: lambda: None)
    gpu["ours"] = 3.0
    monkeypatch.setattr(rms_norm_threshold, "Cell", on_a_cpu)
    made = norm_cell.make(there, print)
    rows = list(rms_norm_threshold._shape(8, 16, torch.device("cuda"), made, lambda line: None))
    assert [row.case for row in rows] == [f"8x16 {p} gpu" for p in norm_cell.PASSES]
    assert [row.notes["ratio"] for row in rows] == [0.75] * 3
    assert rows[1].peers == {"row": 4.0}
    text = rms_norm_threshold.table(a_record(rows))
    lines = {
        line.split("|")[1].strip(): line.split("|")[2:] for line in text.splitlines() if "|" in line
    }
    # the multiprocessors of a CPU are 1: 8 rows are what `auto` begins with
    assert [cell.strip() for cell in lines["16"][:4]] == ["8", "8.0", "from 8", "from 8"]
    assert lines["all to 512"][0].strip() == "8"
    assert lines["published, to 512"][0].strip() == "4,096"
    assert "0.75 wins" in text
    assert "the block path" in text


def test_the_overall_threshold_is_of_the_published_widths_together():
    def rows(count, width, ratio):
        cases = [f"{count}x{width} {p} gpu" for p in norm_cell.PASSES]
        return [Row(case, ratio, peers={"row": 1.0}, notes={"ratio": ratio}) for case in cases]

    there = [*rows(256, 64, 0.9), *rows(512, 64, 0.8), *rows(256, 512, 1.2), *rows(512, 512, 1.0)]
    there += [*rows(256, 1024, 1.2), *rows(512, 1024, 1.2)]
    text = rms_norm_threshold.table(a_record(there))
    starts = [
        [c.strip() for c in line.split("|")[1:3]] for line in text.splitlines() if "|" in line
    ]
    for expected in (["64", "256"], ["512", "none"], ["1024", "none"], ["all to 512", "512"]):
        assert expected in starts


def test_rms_norm_training_on_a_cpu(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(rms_norm_training, "CPU_QUICK", (("stories260k", 2, 16, False),))
    monkeypatch.setattr(rms_norm_training, "BLOCK_SECONDS", 0.01)
    monkeypatch.setattr(rms_norm_training, "QUICK_BLOCKS", 3)

    def rates(ours, peer, work, repeats, blocks):
        ours(), peer()
        return [200.0] * blocks, [100.0] * blocks, [2.0] * blocks

    monkeypatch.setattr(rms_norm_training, "in_turn", rates)
    record, log = bench("rms-norm-training", tmp_path, capsys)
    (row,) = record["rows"]
    assert row["case"] == "stories260k 2x16 eager"
    assert record["unit"] == "ms/step"
    assert row["ratio"] == row["ours"] / row["peers"]["torch"] == 0.5
    assert row["vocab_size"] == 512
    assert "no kernel on this device" in log
    (folder,) = tmp_path.iterdir()
    assert "stories260k 2x16 eager" in (folder / "rms-norm-training.md").read_text()
    assert (folder / "rms-norm-training.png").stat().st_size > 5000


def test_training_runs_the_recipe_as_asked():
    recipe = rms_norm_training._recipe(("stories15m", 1, 256, True), "onelaunch")
    train = recipe.train
    assert (train.norm, train.compile, train.seq_len, train.batch_size) == (
        "onelaunch",
        True,
        256,
        1,
    )
    settings = {"train.seq_len": 16, "train.batch_size": 2, "train.norm": "torch"}
    small = rms_norm_training.Recipe().with_settings(
        {"model.preset": "stories260k", **settings}, "test"
    )
    with rms_norm_training.timed_trainer(small, "cpu", vocab_size=700) as trainer:
        assert trainer.engine.config.vocab_size == 700
        assert trainer.engine.norm == "torch"
        assert trainer.seq_len == 16
        trainer._update()
        assert math.isfinite(trainer._loss_sum.item())


def test_training_rows_without_spread_have_a_table():
    row = Row("stories15m 1x256 eager", 2.0, peers={"torch": 2.5}, notes={"ratio": 0.8})
    assert "| 0.800 |" in " ".join(
        rms_norm_training.table(a_record([row])).replace("  ", " ").split()
    )
    pytest.importorskip("matplotlib")
    axes = rms_norm_training.draw(a_record([row])).axes[0]
    low, high = axes.get_xlim()
    assert low + high == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("experiment", "options", "device"),
    [
        ("rms-norm", [], "auto"),
        ("rms-norm-training", ["--device", "cpu"], "cpu"),
        ("train", [], "cpu"),
        ("train", ["--device", "auto"], "auto"),
    ],
)
def test_norms_are_timed_on_the_gpu_where_there_is_one(monkeypatch, experiment, options, device):
    from onelaunch.bench.core import runner
    from onelaunch.engines import reference

    names = []
    monkeypatch.setattr(reference, "resolve_device", lambda name: names.append(name) or CPU)
    monkeypatch.setattr(runner, "conduct", lambda *args: Path("a-record.json"))
    assert cli.run(["bench", experiment, *options]) == 0
    assert names == [device]
