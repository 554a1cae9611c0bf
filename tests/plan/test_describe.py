import json

import pytest

from onelaunch.config import PRESETS
from onelaunch.errors import BadInput
from onelaunch.plan import describe, every_depth, make_plan
from tests.plan.plans import tiny_plans


@pytest.mark.parametrize("plan", tiny_plans().values(), ids=tiny_plans())
def test_lines_and_launches_add_up_to_the_totals(plan):
    for depth in (None, *every_depth(plan.config.n_layers)):
        data = describe(plan, depth)
        assert json.loads(json.dumps(data)) == data
        assert (data["batch"], data["sequence"], data["past"]) == (
            plan.batch,
            plan.sequence,
            plan.past,
        )
        for name, total in plan.totals._asdict().items():
            assert data["totals"][name] == total
            times = [
                1 if line["layers"] is None else line["layers"][1] - line["layers"][0] + 1
                for line in data["stages"]
            ]
            lines = zip(data["stages"], times, strict=True)
            assert sum(line[name] * n for line, n in lines) == total
            if depth is not None:
                assert sum(launch[name] for launch in data["launches"]) == total
        assert ("launches" in data) == (depth is not None)


def test_equal_layers_share_their_lines():
    data = describe(make_plan(PRESETS["smollm2-135m"], sample=True), 8)
    kinds = [(line["kind"], line["layers"]) for line in data["stages"]]
    layers = [(kind, [0, 29]) for kind in ("qkv", "attention", "out_proj", "gate_up", "down")]
    assert kinds == [("embed", None), *layers, ("head", None), ("sample", None)]
    assert [(launch["name"], launch["first"], launch["last"]) for launch in data["launches"]] == [
        ("embed", 0, 1),
        ("layers 0 to 7", 1, 41),
        ("layers 8 to 15", 41, 81),
        ("layers 16 to 23", 81, 121),
        ("layers 24 to 29", 121, 151),
        ("head and sample", 151, 153),
    ]


def test_layers_that_differ_have_lines_of_their_own():
    from dataclasses import replace

    plan = make_plan(PRESETS["stories260k"])
    stages = list(plan.stages)
    stages[12] = replace(stages[12], flops=1)  # layer 2's attention
    data = describe(replace(plan, stages=tuple(stages)))
    spans = [line["layers"] for line in data["stages"] if line["kind"] == "attention"]
    assert spans == [[0, 1], [2, 2], [3, 4]]


def test_a_depth_that_the_model_does_not_have():
    with pytest.raises(BadInput, match="fusion_depth=9"):
        describe(make_plan(PRESETS["stories260k"]), 9)
