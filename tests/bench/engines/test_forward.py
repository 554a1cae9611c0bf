"""The forward experiment without a GPU: what it says of its figures, and that it wants one."""

from __future__ import annotations

import math

import pytest
import torch

from onelaunch.bench.core.settled import Settled
from onelaunch.bench.engines.forward import experiment as forward
from onelaunch.bench.engines.forward.views import draw, table
from onelaunch.config import preset
from onelaunch.errors import RunFailed


def samples():
    return {
        "staged": [10.0, 11.0, 12.0],
        "fused all": [9.0, 10.0, 14.0],
        "logits": [12.0, 11.0, 15.0],
        "logits float32": [13.0, 13.0, 13.5],
        "eager + graph": [50.0, 50.0, 50.0],
        "torch.compile + graph": [20.0, 22.0, 21.0],
    }


OURS = ["logits", "logits float32"]


def alone():
    """What was timed by itself: other numbers of samples."""
    times = {"eager": [100.0, 110.0, 120.0, 90.0], "torch.compile": [60.0, 61.0]}
    return {
        name: Settled(taken, [*taken, 300.0], True, (0.5, 0.75)) for name, taken in times.items()
    }


def row():
    notes = {"launches": {}, "seconds_to_first": {"staged": 1.0, "fused all": 3.0}}
    made = forward._row("m forward 1x8", [*OURS, "staged", "fused all"], samples(), notes, alone())
    made.floor = 1.0
    return made


def test_ours_is_the_wall_time_and_ratios_are_round_by_round():
    made = row()
    assert (made.ours, made.notes["form"], made.notes["graph"]) == (12.0, "fused all", 10.0)
    assert made.notes["logits float32"]["median"] == 13.0
    assert set(made.notes["forms"]) == {"staged", "fused all"}
    assert made.peers["torch.compile + graph"] == 21.0
    # 20 / 12, 22 / 11, 21 / 15; 12 / 9, 11 / 10, 15 / 14
    assert made.notes["speedup"]["torch.compile + graph"] == 1.6667
    assert made.notes["over_graph"] == 1.1


def test_what_python_launches_is_a_ratio_of_medians_and_the_row_says_what_the_host_did():
    made = row().to_dict()
    assert made["peers"]["eager"] == 105.0
    assert made["speedup"]["eager"] == 8.75
    host = made["host"]["eager"]
    assert host["fastest"] == [90.0, 100.0]
    assert host["of_all_windows"]["slowest"] == 300.0
    assert (host["agree"], host["load"]) == (True, [0.5, 0.75])


def test_the_floor_is_the_weights_and_the_logits_once():
    config = preset("stories260k")
    matrices = sum(math.prod(s) for s in config.weight_shapes().values() if len(s) == 2)
    # 2 bytes each, 1,000 bytes in a microsecond at 1 GB/s
    expected = 2 * (matrices + 8 * 512) / 1e3
    assert forward._floor_us(config, 8, 1.0) == pytest.approx(expected)


def test_what_is_chosen_is_the_form_though_another_be_faster():
    taken = samples() | {"chosen": [10.0, 10.5, 14.5]}
    made = forward._row("m", [*OURS, "staged", "fused all", "chosen"], taken, {}, alone())
    assert (made.notes["graph"], made.notes["form"]) == (10.5, "chosen")
    assert made.notes["over_fastest"] == 1.05  # round by round: 10 / 9, 10.5 / 10, 14.5 / 14


def test_the_stores_are_empty_and_the_old_one_comes_back(monkeypatch):
    monkeypatch.setenv(forward.TRITON_STORE, "before")
    with forward._empty_stores() as folder:
        assert forward.os.environ[forward.TRITON_STORE] != "before"
        assert not folder.exists()
    assert forward.os.environ[forward.TRITON_STORE] == "before"
    monkeypatch.delenv(forward.TRITON_STORE)
    with forward._empty_stores():
        pass
    assert forward.TRITON_STORE not in forward.os.environ


def test_the_views():
    record = {
        "experiment": "forward", "device": "a GPU", "date": "2026-01-01", "commit": "0",
        "versions": {}, "unit": "us", "rows": [row().to_dict()],
    }  # fmt: skip
    text = table(record)
    assert "| m forward 1x8 |" in text
    assert "| **12.0** | 13.0 | 11.0 | 10.0 |" in " ".join(text.split())
    assert "1.67x" in text
    assert "8.8x" in text, "over eager: 105 / 12"
    chosen = row().to_dict()
    chosen["choice"] = {"form": "staged", "us": {"staged": 9.0}, "tried": 7, "tiles": {"qkv": [64]}}
    chosen["seconds_to_first"]["kept"] = 0.25
    text = table(record | {"rows": [chosen]})
    assert "| m forward 1x8 | staged | staged 9.00 |" in text
    assert "0.25" in text
    old = {k: v for k, v in chosen.items() if k not in ("graph", "over_graph", "logits float32")}
    text = table(record | {"rows": [chosen, old | {"case": "m forward 1x9"}]})
    assert "| m forward 1x9 | - | - | 11.0 | 10.0 |" in " ".join(text.split())
    pytest.importorskip("matplotlib")
    figure = draw(record)
    assert figure.axes[0].get_ylabel()
    assert draw(record | {"rows": []}) is None


def test_logits_that_are_wrong_end_the_run():
    expected = torch.randn(3, 5)
    assert forward._check("a form", (1.01 * expected).bfloat16(), expected) < 0.02
    for wrong in (1.1 * expected, expected.roll(1), torch.full_like(expected, math.nan)):
        with pytest.raises(RunFailed, match="a form: logits"):
            forward._check("a form", wrong, expected)


@pytest.mark.parametrize(("form", "kept"), [({"us": {}}, True), ({"form": "staged"}, False)])
def test_the_engine_that_is_timed_is_of_what_was_chosen(monkeypatch, tmp_path, form, kept):
    expected = torch.randn(1, 8, 5)

    class Engine:
        def __init__(self, config, weights, device, dtype, depth="auto", store=None):
            assert (depth, store is None) in (("stage", True), ("auto", False))

        def logits(self, tokens, dtype):
            return expected.to(dtype)

        def describe(self):
            return {"forms": {"1x8": form}}

    monkeypatch.setattr("onelaunch.engines.cuda.engine.CudaEngine", Engine)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    subject = forward.Subject(preset("stories260k"), {}, tokens, expected, None)
    assert isinstance(forward._engine(subject), Engine)
    if kept:
        assert isinstance(forward._engine(subject._replace(store=tmp_path)), Engine)
    else:
        with pytest.raises(RunFailed, match="what was chosen"):
            forward._engine(subject._replace(store=tmp_path))
