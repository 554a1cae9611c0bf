"""fusion-depth on a GPU, without one: its cases, its tables, what it says where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from onelaunch import cli
from onelaunch.bench.studies.ane_mega_kernel.fusion_depth import cuda
from onelaunch.bench.studies.ane_mega_kernel.fusion_depth.cases import rows_of
from onelaunch.bench.studies.ane_mega_kernel.fusion_depth.views import draw, table
from onelaunch.config import preset
from onelaunch.plan import launches, make_plan
from tests.interpreting import run_interpreted


@pytest.mark.extended
def test_every_way_through_the_interpreter():
    run_interpreted(Path(__file__).with_name("interpreted_fusion_depth.py"))


@pytest.mark.parametrize(("name", "halves"), [("stories15m", 12), ("stories110m", 24)])
def test_the_ways_of_a_model(name, halves):
    config = preset(name)
    case = cuda.model_case(name, config)
    n, plan = config.n_layers, make_plan(config)
    for depth in ("stage", "half", "all"):
        assert case.ways[depth] == [tuple(launch[1:]) for launch in launches(plan, depth)]
    assert len(case.ways["half"]) == halves + 2
    for way in case.whole:
        assert [i for r in case.ways[way] for i in range(*r)] == list(range(len(plan.stages)))
    assert case.whole == ["stage", "half", "1", "2", "4", *(["8"] if n > 8 else []), "all"]
    for way, count in case.layers.items():
        assert case.ways[way] == [(0, 1 + 5 * count)]
    for way, by_halves in case.halves.items():
        assert len(case.ways[by_halves]) == 2 * case.layers[way]
        assert [i for r in case.ways[by_halves] for i in range(*r)] == list(
            range(case.ways[way][0][1])
        )


def made_up(case, peers=("staged", "staged + graph")):
    """Rows where a launch takes 2 us as a graph and 30 one by one, and a layer of a model 10."""
    rows = []
    for how, launch in ((cuda.ONE_BY_ONE, 30.0), (cuda.GRAPH, 2.0)):
        samples = {}
        for way, ranges in case.ways.items():
            stages = ranges[-1][1]
            samples[way] = [drift * (2 * stages + launch * len(ranges)) for drift in (1, 1.1, 1.3)]
        of_peers = {peer: [50.0 * (i + 1)] * 3 for i, peer in enumerate(peers)}
        rows += [row.to_dict() for row in rows_of(case, samples, how, of_peers)]
    return rows


def record():
    cases = [cuda.block_case(block) for block in cuda.BLOCKS]
    cases += [cuda.model_case(name, preset(name)) for name in cuda.MODELS]
    rows = []
    for case in cases:
        case.notes = {"all": {"compiling_s": 2.5}}
        rows += made_up(case)
    return {"device": "a GPU", "date": "2026-01-01", "commit": "0", "versions": {}, "rows": rows}


def cells(text, start):
    line = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.split("|")][2:-1]


def test_the_table():
    text = table(record())
    assert text.isascii()
    # 25 stages 2 us each, and a launch's 30 us once or 12 times
    assert cells(text, "64/128, 1 tok., one by one") == [
        "39.6", "88.0", "451", "5.12x", "2.50", "183", "247", "2,197", "8.9x", "0.21",
    ]  # fmt: skip
    assert cells(text, "288/768, 128 tok., graph")[5:] == ["228", "654", "2,740", "4.2x", "0.18"]
    assert "## Attention layers alone" in text
    assert len(cells(text, "768/12, 128 tok., graph")) == 5
    assert cells(text, "stories110m 1x256, one by one")[4:] == [
        "5,081", "15,227 (24)", "3.00x", "4.2",
    ]  # fmt: skip
    # 21 stages in one launch, in 8, and 62 stages in 26
    like, whole = (42 + 240) / (42 + 30), (124 + 26 * 30) / (42 + 30)
    assert cells(text, "stories110m 1x256, 4 layers, one by one") == [
        "79.2", "310 (8)", f"{like:.2f}x", f"{whole:.2f}x", "1,978 / 5,076 (8)", "2.57x", "7.70x",
    ]  # fmt: skip
    assert cells(text, "stories15m 1x256, 4 layers, graph")[-1] == "-"
    assert "divides all 12 layers" in text
    prices = text[text.index("## The price of a call") :]
    assert cells(prices, "stories15m 1x256, graph")[0] == "2.20"
    assert cells(prices[prices.index("of a layer") :], "stories15m 1x256, graph")[0] == "11.0"
    peers = cells(text[text.index("## Compared with") :], "stories15m 1x256")
    assert peers == ["72.6 (all, graph)", "50.0", "100", "0.69x"]
    assert "one compiled program" not in text


def test_the_picture():
    pytest.importorskip("matplotlib")
    figure = draw(record())
    assert [axes.get_title() for axes in figure.axes] == [
        "256 tokens at once, graph", "256 tokens at once, one by one",
    ]  # fmt: skip
    for axes in figure.axes:
        assert [line.get_label() for line in axes.lines] == list(cuda.MODELS)
        # the first layers alone are no points of it
        assert [len(line.get_xdata()) for line in axes.lines] == [6, 7]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    code = cli.run(["bench", "fusion-depth", "--device", "cuda", "--out", str(tmp_path)])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert "device cuda" in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())
