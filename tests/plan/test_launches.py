import pytest

from onelaunch.config import PRESETS
from onelaunch.errors import BadInput
from onelaunch.plan import check_launches, every_depth, launches, make_plan, parse_depth
from tests.plan.plans import TINY


def _sizes(config, depth, **arguments):
    return [last - first for _, first, last in launches(make_plan(config, **arguments), depth)]


def test_every_depth_holds_what_it_says():
    assert _sizes(TINY, "stage") == [1] * 17
    assert _sizes(TINY, "half") == [1, 3, 2, 3, 2, 3, 2, 1]
    assert _sizes(TINY, 1) == [1, 5, 5, 5, 1]
    assert _sizes(TINY, 2) == [1, 10, 5, 1]
    assert _sizes(TINY, 3) == [1, 15, 1]
    assert _sizes(TINY, "all") == [17]


def test_sampling_joins_the_head_except_at_depth_stage():
    assert _sizes(TINY, "stage", sample=True) == [1] * 18
    assert _sizes(TINY, "half", sample=True) == [1, 3, 2, 3, 2, 3, 2, 2]
    assert _sizes(TINY, "2", sample=True) == [1, 10, 5, 2]
    assert _sizes(TINY, "all", sample=True) == [18]


@pytest.mark.parametrize(("name", "calls"), [("stories15m", 12), ("stories110m", 24)])
def test_half_is_the_two_calls_a_layer_of_the_published_figures(name, calls):
    """They are the layers' calls: embed and head were done elsewhere."""
    grouped = launches(make_plan(PRESETS[name]), "half")
    assert (grouped[0].name, grouped[-1].name) == ("embed", "head")
    assert len(grouped) == calls + 2


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("sample", [False, True])
def test_every_depth_of_every_preset_tiles_the_stages(name, sample):
    plan = make_plan(PRESETS[name], sample=sample)
    n = plan.config.n_layers
    counts = []
    for depth in (*every_depth(n), *range(1, n + 1)):
        grouped = launches(plan, depth)
        check_launches(plan, grouped)
        stages = [stage for _, first, last in grouped for stage in plan.stages[first:last]]
        assert tuple(stages) == plan.stages
        if isinstance(depth, int):
            assert len(grouped) == -(-n // depth) + 2
        counts.append(len(grouped))
    several = counts[: len(every_depth(n))]
    assert several == sorted(several, reverse=True)
    assert several[-1] == 1


def test_launches_are_named_for_what_they_hold():
    plan = make_plan(TINY, sample=True)

    def names(depth):
        return [launch.name for launch in launches(plan, depth)]

    assert names("stage")[:3] == ["embed", "layer 0 qkv", "layer 0 attention"]
    assert names("stage")[-2:] == ["head", "sample"]
    assert names("half")[3:] == [
        "layer 1 attention block",
        "layer 1 FFN block",
        "layer 2 attention block",
        "layer 2 FFN block",
        "head and sample",
    ]
    assert names(1) == ["embed", "layer 0", "layer 1", "layer 2", "head and sample"]
    assert names(2) == ["embed", "layers 0 to 1", "layer 2", "head and sample"]
    assert names("all") == ["all"]


@pytest.mark.parametrize(
    ("text", "depth"),
    [("stage", "stage"), ("half", "half"), ("all", "all"), ("1", 1), ("6", 6), (1, 1), (6, 6)],
)
def test_depths(text, depth):
    parsed = parse_depth(text, 6)
    assert parsed == depth
    assert type(parsed) is type(depth)


NO_DEPTHS = ["", "auto", "Stage", " all", "0", "7", "-1", "+2", "02", "2.0", "1_0", "\u0662"]


@pytest.mark.parametrize("text", [*NO_DEPTHS, "9" * 5000, 0, 7, -1, True, None, 2.0])
def test_what_is_no_depth(text):
    with pytest.raises(BadInput) as caught:
        parse_depth(text, 6)
    message = str(caught.value)
    assert message.startswith(f"fusion_depth={text!r}: ")
    for allowed in ("stage", "half", "all", "from 1 to 6"):
        assert allowed in message.removeprefix(f"fusion_depth={text!r}: ")


def test_a_depth_of_more_layers_than_the_model_has_is_refused():
    assert parse_depth("1", 1) == 1
    with pytest.raises(BadInput, match="fusion_depth='2'.* 1 layer$"):
        parse_depth("2", 1)
    with pytest.raises(BadInput, match="fusion_depth=4"):
        launches(make_plan(TINY), 4)


@pytest.mark.parametrize(
    ("layers", "numbers"),
    [
        (1, (1,)),
        (2, (1, 2)),
        (3, (1, 2, 3)),
        (4, (1, 2, 4)),
        (5, (1, 2, 4, 5)),
        (6, (1, 2, 4, 6)),
        (8, (1, 2, 4, 8)),
        (9, (1, 2, 4, 8, 9)),
    ],
)
def test_depths_worth_comparing(layers, numbers):
    assert every_depth(layers) == ("stage", "half", *numbers, "all")
