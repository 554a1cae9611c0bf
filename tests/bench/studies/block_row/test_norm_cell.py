"""Cells: no contender is timed on a wrong result, and repeats stay valid."""

import pytest
import torch

from onelaunch.bench.core.timing import Replay
from onelaunch.bench.peers.rms_norm import Contender
from onelaunch.bench.studies.block_row import norm_cell
from onelaunch.bench.studies.block_row.norm_cell import Cell, WrongResult, host_times, kernel_times
from tests.bench.studies.block_row.norms import (
    FakeGraph,
    InPlace,
    last_row_missing,
    right,
    without_weight,
)

CPU = torch.device("cpu")
ROWS, COLUMNS = 37, 48


@pytest.fixture
def cell():
    return Cell(ROWS, COLUMNS, torch.float32, CPU, sets=3)


def test_the_oracle_is_autograd_in_float64(cell):
    x = cell.x[0].detach().double().requires_grad_()
    weight = cell.weight.detach().double().requires_grad_()
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight
    dx, dw = torch.autograd.grad(y, (x, weight), cell.dy[0].double())
    for ours, theirs in zip(cell.oracle, (y, dx, dw), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_results_pass(dtype):
    cell = Cell(ROWS, COLUMNS, dtype, CPU, sets=2)
    for pass_ in norm_cell.PASSES:
        cell.check(pass_, cell.call(pass_, right)(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pass_", norm_cell.PASSES)
@pytest.mark.parametrize("norm", [without_weight, last_row_missing])
def test_wrong_results_do_not(dtype, pass_, norm):
    cell = Cell(ROWS, COLUMNS, dtype, CPU, sets=2)
    with pytest.raises(WrongResult, match="off float64"):
        cell.check(pass_, cell.call(pass_, norm)(0))


def test_nan_is_wrong(cell):
    y = cell.oracle.y.clone()
    y[5, 7] = float("nan")
    with pytest.raises(WrongResult):
        cell.check("forward", (y,))


def test_forward_asks_for_no_gradient(cell):
    """Under no_grad alone a peer would still store what only the backward pass needs."""
    seen = []
    cell.call("forward", lambda x, w: seen.append(x.requires_grad or w.requires_grad))(0)
    assert seen == [False]


def test_sets_differ_and_weights_are_no_ones(cell):
    assert not torch.equal(cell.x[0], cell.x[1])
    assert not torch.equal(cell.dy[0], cell.dy[1])
    assert cell.weight.std() > 0.05
    assert 0.7 <= cell.weight.min() <= cell.weight.max() <= 1.3


def test_bytes():
    assert norm_cell.bytes_moved(4096, 64, "forward", 2) == 4096 * 64 * 4
    assert norm_cell.bytes_moved(4096, 64, "backward", 2) == 4096 * 64 * 6
    assert norm_cell.bytes_moved(4096, 64, "full", 2) == 4096 * 64 * 10


def test_small_shapes_fit_the_cache_and_large_ones_do_not(monkeypatch):
    monkeypatch.setattr(norm_cell, "l2_bytes", lambda device: 1 << 20)
    small = Cell(8, 64, torch.bfloat16, CPU)
    large = Cell(1024, 512, torch.bfloat16, CPU)
    assert small.sets == 24
    assert small.in_cache("full")
    assert large.sets == 2
    assert not large.in_cache("forward")
    middle = Cell(128, 256, torch.bfloat16, CPU)
    assert middle.sets_for("full") < middle.sets == middle.sets_for("forward")


@pytest.fixture
def fake_device(monkeypatch):
    """Graphs that replay by calling again; timing that replays twice."""
    replayed = []

    def capture(call, sets, calls):
        kept = [call(i) for i in range(sets)]
        return Replay(FakeGraph(call, sets, calls, kept), calls, kept)

    def in_turn(replays, samples, before):
        for name, replay in replays.items():
            before(name)
            replay.graph.replay()
            replayed.append((name, replay.calls))
        return {name: [1.0] * samples for name in replays}

    monkeypatch.setattr(norm_cell, "capture", capture)
    monkeypatch.setattr(norm_cell, "replays_in_turn", in_turn)
    return replayed


def contenders(**norms):
    """In their order, as `make` leaves them; "liger" writes over gradients."""
    there = [
        Contender(name, lambda norm=norm: norm, in_place=name == "liger")
        for name, norm in norms.items()
    ]
    return norm_cell.make(there, print)


@pytest.mark.parametrize("pass_", norm_cell.PASSES)
def test_only_right_contenders_are_replayed(cell, fake_device, pass_):
    there = contenders(ours=right, peer=last_row_missing, liger=InPlace.apply)
    lines = []
    times = kernel_times(cell, pass_, there, 3, lines.append)
    assert times == {"ours": [1.0] * 3, "liger": [1.0] * 3}
    assert [line.split(":")[0] for line in lines] == [f"  37x48 {pass_} without peer"]
    assert [name for name, _ in fake_device] == ["ours", "liger"]


def test_a_graph_that_holds_nothing_is_refused(cell, fake_device, monkeypatch):
    """As if the kernels had gone to another stream than the captured one."""
    monkeypatch.setattr(FakeGraph, "replay", lambda self: None)
    there = contenders(ours=right)
    lines = []
    assert kernel_times(cell, "full", there, 3, lines.append) == {}
    assert "nan off float64" in lines[0]


@pytest.mark.parametrize("pass_", ["full", "backward"])
def test_after_an_in_place_contender_others_meet_the_gradients_as_made(cell, fake_device, pass_):
    there = contenders(liger=InPlace.apply, ours=right)
    cell.call("full", InPlace.apply)(0)
    assert not torch.equal(cell.dy[0], cell._dy_as_made[0])
    assert list(kernel_times(cell, pass_, there, 3, print)) == ["liger", "ours"]
    cell.call("full", InPlace.apply)(0)
    assert list(host_times(cell, pass_, there, 2, 2, print)) == ["liger", "ours"]


def test_in_place_contenders_begin_every_sample_with_the_gradients_as_made(cell, monkeypatch):
    states = []

    def in_turn(calls, sets, repeats, samples, wait, before):
        for name in calls:
            cell.dy[0].zero_()
            before(name)
            states.append((name, bool(cell.dy[0].any())))
            cell.restore()
        return {name: [1.0] for name in calls}

    monkeypatch.setattr(norm_cell, "calls_in_turn", in_turn)
    there = contenders(ours=right, liger=InPlace.apply)
    host_times(cell, "full", there, 1, 1, print)
    assert states == [("ours", False), ("liger", True)]


def test_host_times_leave_out_what_is_wrong(cell):
    there = contenders(ours=right, peer=without_weight)
    lines = []
    times = host_times(cell, "full", there, 2, 2, lines.append)
    assert list(times) == ["ours"]
    assert lines[0].startswith("  37x48 full without peer: WrongResult: y is")


def test_a_backward_norm_that_cannot_be_made_is_left_out_of_backward_passes_alone(cell):
    def no_compiler():
        raise RuntimeError("no compiler")

    lines = []
    made = norm_cell.make(
        [
            Contender("broken", lambda: right, repeatable=no_compiler),
            Contender("again", lambda: last_row_missing, repeatable=lambda: right),
        ],
        lines.append,
    )
    assert [line.split(":")[0] for line in lines] == ["  backward passes without broken"]
    assert list(host_times(cell, "backward", made, 2, 2, print)) == ["again"]
    assert list(host_times(cell, "full", made, 2, 2, print)) == ["broken"]


def test_the_same_reason_is_said_once_and_another_again():
    lines = []
    say = norm_cell.each_reason_once(lines.append)
    for line in ("a", "  8x8 full without p: No: c", "  8x9 forward without p: No: c", "a"):
        say(line)
    say("  8x9 full without q: No: c")
    assert lines == ["a", "  8x8 full without p: No: c", "a", "  8x9 full without q: No: c"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_wrong_row_of_many_is_found(dtype):
    """Of the whole it is a hundredth: the distance of all rows together would let it pass."""
    cell = Cell(12_000, 8, dtype, CPU, sets=2)
    for at, pass_ in ((0, "forward"), (1, "full"), (0, "backward")):
        outputs = [output.detach().clone() for output in cell.call(pass_, right)(0)]
        cell.check(pass_, outputs)
        outputs[at][7777] *= 0.5
        with pytest.raises(WrongResult, match="off float64"):
            cell.check(pass_, outputs)
