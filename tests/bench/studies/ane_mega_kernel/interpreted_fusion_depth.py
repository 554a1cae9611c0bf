"""fusion-depth on a GPU without one: every way through Triton's interpreter, its times made up. Run
by test_fusion_depth_cuda.py in a process of its own."""

from __future__ import annotations

import os
import sys
from itertools import count

assert "triton" not in sys.modules, "too late: Triton was imported before this"
os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

from onelaunch.bench.core.gpu_forwards import OfPyTorch  # noqa: E402
from onelaunch.bench.core.settled import settle  # noqa: E402
from onelaunch.bench.studies.ane_mega_kernel.fusion_depth import cases, cuda  # noqa: E402
from onelaunch.bench.studies.ane_mega_kernel.fusion_depth.views import draw, table  # noqa: E402
from onelaunch.engines.cuda import sync  # noqa: E402
from onelaunch.engines.cuda.program import BoundForward  # noqa: E402
from onelaunch.errors import EngineTimeout, RunFailed  # noqa: E402
from tests.engines.suite import SMALL  # noqa: E402
from tests.interpreting import mend_loop_bounds  # noqa: E402

mend_loop_bounds()


class Replayed:
    """In a CUDA graph's place."""

    def __init__(self, run) -> None:
        self.replay = run


@pytest.fixture
def made_up_times(monkeypatch):
    """What is timed takes as long as its place in the order says."""
    place = count(1)

    def sample(run):
        took = 10.0 * next(place)
        return lambda: took

    monkeypatch.setattr(cuda, "calls", sample)
    monkeypatch.setattr(cuda, "replays", lambda graph, owner: sample(graph.replay))
    monkeypatch.setattr(BoundForward, "captured", lambda bound: Replayed(bound.run))
    monkeypatch.setattr(cuda, "_compiling", lambda call: 1.25)
    monkeypatch.setattr(
        cuda,
        "pytorch_samples",
        lambda bare, tokens: OfPyTorch(
            {"eager + graph": sample(lambda: bare(tokens))},
            {"eager": sample(lambda: bare(tokens))},
            7.0,
        ),
    )
    monkeypatch.setattr(
        cuda, "settle", lambda sample, least: settle(sample, 2, sleep=lambda seconds: None)
    )
    monkeypatch.setattr(cuda, "DTYPE", torch.float32)
    monkeypatch.setattr(cuda, "ROUNDS", 2)
    monkeypatch.setattr(cuda, "TOKENS", 8)
    monkeypatch.setattr(cuda, "LAYERS_A_LAUNCH", (1, 2))
    monkeypatch.setattr(cuda, "BY_HALVES", (2,))
    monkeypatch.setattr(cases, "LAYERS", 2)
    monkeypatch.setattr(cases, "DEPTHS", (1, 2))


MODEL = SMALL.with_(n_layers=3)
BLOCKS = (cases.Block("ffn", 32, 48, 1), cases.Block("attention", 32, 2, 17))


def test_every_way_is_run_and_checked(made_up_times, monkeypatch):
    monkeypatch.setattr(cuda, "BLOCKS", BLOCKS)
    monkeypatch.setattr(cuda, "MODELS", ("m",))
    monkeypatch.setattr(cuda, "preset", lambda name: MODEL)
    lines = []
    rows = [row.to_dict() for row in cuda.run_all_on("cpu", False, lines.append)]
    by_case = {row["case"]: row for row in rows}
    assert len(by_case) == len(rows)
    for how in ("one by one", "graph"):
        calls = {
            row["depth"]: row["calls"]
            for row in rows
            if row["model"] == "m" and row["launched"] == how and "depth" in row
        }
        assert calls == {
            "stage": 17, "half": 8, "1": 5, "2": 4, "all": 1,
            "first layer": 1, "first 2 layers": 1, "first 3 layers": 1,
            "first 2 layers by halves": 4,
        }  # fmt: skip
        assert by_case[f"m forward 1x8 price of a layer, {how}"]["points"] == [1, 2, 3]
        calls = {
            row["depth"]: row["calls"]
            for row in rows
            if row["model"] == "32/2 heads" and row["launched"] == how and "depth" in row
        }
        assert calls == {"one layer": 1, "stage": 6, "1": 2, "all": 1}
    assert all(row["apart_from_staged"] == 0 for row in rows if "depth" in row)
    whole = by_case["m forward 1x8 depth all, graph"]
    assert (whole["compiling_s"], whole["torch_compile_s"]) == (1.25, 7.0)
    assert list(whole["peers"]) == [
        "stage", "staged", "staged + graph", "eager + graph", "eager",
    ]  # fmt: skip
    assert whole["speed_against"]["eager"] > 0
    assert whole["host"]["eager"]["agree"]
    assert whole["speed_against"]["staged"] < 1
    assert any("compiled in 1.25 s" in line for line in lines)
    text = table({"device": "a GPU", "date": "2026-01-01", "versions": {}, "rows": rows})
    assert "| m 1x8, 2 layers, graph" in text
    pytest.importorskip("matplotlib")
    figure = draw({"device": "a GPU", "rows": rows})
    assert [axes.get_title() for axes in figure.axes] == [
        "8 tokens at once, graph", "8 tokens at once, one by one",
    ]  # fmt: skip


def staged_and_ways():
    case = cuda.model_case("m", SMALL)
    generator = torch.Generator().manual_seed(0)
    weights = cuda.random_weights(SMALL, torch.device("cpu"), generator)
    packed = cuda.pack(SMALL, weights, torch.float32, torch.device("cpu"))
    shape = cuda.Shape(1, 8)
    staged = BoundForward(SMALL, packed, shape, {})
    staged.buffers.tokens.copy_(torch.arange(8))
    return case, staged, cuda._forms(case, staged, shape)


def test_a_wrong_result_is_no_result():
    case, staged, forms = staged_and_ways()
    fused, last = forms["1"], case.ways["1"][-1][1]
    result, apart = cuda._first_of("m", fused, staged, last)
    assert apart == 0  # float32 has the same tiles in both forms
    assert cuda._check("m", cuda._result(forms["all"], forms["all"].run, last), result, 0.0) == 0

    def a_little_off():
        fused.run()
        fused.buffers.logits[0, 0] *= 1.001

    got = cuda._result(fused, a_little_off, last)
    assert 0 < cuda._check("m", got, result, 0.05) < 0.02
    with pytest.raises(RunFailed, match="m: its result is .* apart, where 0.0 is allowed"):
        cuda._check("m", got, result, 0.0)
    with pytest.raises(RunFailed, match="its result is nan apart"):
        cuda._check("m", cuda._result(fused, lambda: None, last), result, 0.05)


def test_a_forward_that_gave_up_is_no_result():
    case, _, forms = staged_and_ways()
    fused = forms["all"]

    def gave_up():
        fused.run()
        fused.sync[sync.STATUS] = sync.GAVE_UP

    with pytest.raises(EngineTimeout):
        cuda._result(fused, gave_up, case.ways["all"][-1][1])
