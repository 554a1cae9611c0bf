"""Valid plans pass `check`; a plan broken in any one place does not.

The stages of a plan form a chain: each reads what the previous one wrote. So no swap of two stages
is valid, and the tests below try them all. Not checked: the number of operations, a read of fewer
bytes than the buffer has, and extra buffers that are used in order.
"""

from dataclasses import replace
from itertools import combinations

import pytest

from onelaunch.config import PRESETS
from onelaunch.plan import KINDS, NO_LAYER, PlanError, check, check_launches, launches, make_plan
from onelaunch.plan.launches import Launch
from onelaunch.plan.stages import Access, Buffer, Stage
from tests.plan.plans import TINY, tiny_plans

PLAN = make_plan(TINY, 2, 3, 4, sample=True)
INDICES = range(len(PLAN.stages))
OUT_OF_ORDER = "not written yet|has replaced|after version"


def _with_stages(stages):
    return replace(PLAN, stages=tuple(stages))


def _with_stage(index, **changes):
    stages = list(PLAN.stages)
    stages[index] = replace(stages[index], **changes)
    return _with_stages(stages)


def _with_buffer(name, **changes):
    buffers = (replace(b, **changes) if b.name == name else b for b in PLAN.buffers)
    return replace(PLAN, buffers=tuple(buffers))


def _index(kind, layer=NO_LAYER):
    return next(i for i in INDICES if (PLAN.stages[i].kind, PLAN.stages[i].layer) == (kind, layer))


@pytest.mark.parametrize("plan", tiny_plans().values(), ids=tiny_plans())
def test_right_plans_pass(plan):
    check(plan)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_pass(name):
    for size in ((1, 1, 0), (1, 64, 0), (4, 3, 100)):
        for sample in (False, True):
            check(make_plan(PRESETS[name], *size, sample=sample))


def test_every_swap_of_two_stages_is_caught():
    for i, j in combinations(INDICES, 2):
        stages = list(PLAN.stages)
        stages[i], stages[j] = stages[j], stages[i]
        with pytest.raises(PlanError, match=OUT_OF_ORDER):
            check(_with_stages(stages))


def test_every_missing_stage_is_caught():
    for i in INDICES:
        with pytest.raises(PlanError, match=f"{OUT_OF_ORDER}|never written|never read"):
            check(_with_stages(PLAN.stages[:i] + PLAN.stages[i + 1 :]))


def test_every_stage_that_comes_twice_is_caught():
    for i in INDICES:
        for j in range(len(PLAN.stages) + 1):
            again = (*PLAN.stages[:j], PLAN.stages[i], *PLAN.stages[j:])
            with pytest.raises(PlanError, match=OUT_OF_ORDER):
                check(_with_stages(again))


def test_every_other_kind_or_layer_is_caught():
    for i in INDICES:
        stage = PLAN.stages[i]
        for kind in (*KINDS, "norm"):
            if kind != stage.kind:
                with pytest.raises(PlanError):
                    check(_with_stage(i, kind=kind))
        for layer in (NO_LAYER, 0, 1, 2, 3):
            if layer != stage.layer:
                with pytest.raises(PlanError):
                    check(_with_stage(i, layer=layer))


def test_every_other_buffer_or_version_is_caught():
    for i in INDICES:
        for side in ("reads", "writes"):
            accesses = getattr(PLAN.stages[i], side)
            for at, access in enumerate(accesses):
                others = [
                    access._replace(version=access.version - 1),
                    access._replace(version=access.version + 1),
                    access._replace(buffer="absent"),
                    *(access._replace(buffer=b.name) for b in PLAN.buffers),
                ]
                for other in others:
                    if other != access:
                        changed = (*accesses[:at], other, *accesses[at + 1 :])
                        with pytest.raises(PlanError):
                            check(_with_stage(i, **{side: changed}))


def test_every_access_that_is_missing_or_twice_is_caught():
    for i in INDICES:
        for side in ("reads", "writes"):
            accesses = getattr(PLAN.stages[i], side)
            for at, access in enumerate(accesses):
                without = accesses[:at] + accesses[at + 1 :]
                with pytest.raises(PlanError):
                    check(_with_stage(i, **{side: without}))
                with pytest.raises(PlanError):
                    check(_with_stage(i, **{side: (*accesses, access)}))


def test_every_size_that_disagrees_is_caught():
    for i in INDICES:
        stage = PLAN.stages[i]
        for at, access in enumerate(stage.reads):
            whole = PLAN.buffer(access.buffer).nbytes
            for nbytes in (0, whole + 1):
                changed = list(stage.reads)
                changed[at] = access._replace(nbytes=nbytes)
                with pytest.raises(PlanError, match=f"reads {nbytes} bytes of {access.buffer}"):
                    check(_with_stage(i, reads=tuple(changed)))
        for at, access in enumerate(stage.writes):
            for nbytes in (access.nbytes - 1, access.nbytes + 1):
                changed = list(stage.writes)
                changed[at] = access._replace(nbytes=nbytes)
                with pytest.raises(PlanError, match=f"writes {nbytes} bytes of {access.buffer}"):
                    check(_with_stage(i, writes=tuple(changed)))
        for nbytes in (stage.weight_bytes - 1, stage.weight_bytes + 1):
            with pytest.raises(PlanError, match="bytes of weights"):
                check(_with_stage(i, weight_bytes=nbytes))


@pytest.mark.parametrize("name", [buffer.name for buffer in PLAN.buffers])
def test_a_buffer_that_is_missing_twice_there_or_of_another_shape_is_caught(name):
    buffer = PLAN.buffer(name)
    without = tuple(b for b in PLAN.buffers if b.name != name)
    with pytest.raises(PlanError, match=rf"\b{name}\b.* not a buffer"):
        check(replace(PLAN, buffers=without))
    with pytest.raises(PlanError, match="same name"):
        check(replace(PLAN, buffers=(*PLAN.buffers, buffer)))
    for shape in ((*buffer.shape[:-1], buffer.shape[-1] + 1), (*buffer.shape, 1), buffer.shape[1:]):
        with pytest.raises(PlanError, match=f"buffer {name} has shape"):
            check(_with_buffer(name, shape=shape))
    if name != "tokens":  # whose ids may be wider than what a stage reads of them
        with pytest.raises(PlanError, match=f"writes .* bytes of {name}"):
            check(_with_buffer(name, itemsize=buffer.itemsize + 1))
    with pytest.raises(PlanError):
        check(_with_buffer(name, itemsize=0))


@pytest.mark.parametrize("field", ["batch", "sequence", "past", "weight_itemsize"])
def test_a_plan_whose_size_is_not_its_stages_is_caught(field):
    with pytest.raises(PlanError):
        check(replace(PLAN, **{field: getattr(PLAN, field) + 1}))


def test_a_plan_of_another_model_is_caught():
    for changes in (
        {"n_layers": 2},
        {"n_layers": 4},
        {"dim": 6},
        {"hidden_dim": 12},
        {"n_kv_heads": 2},
        {"vocab_size": 18},
        {"qk_norm": True},
        {"qkv_bias": True},
        {"tied_embeddings": False},
    ):
        with pytest.raises(PlanError):
            check(replace(PLAN, config=TINY.with_(**changes)))


def _scratch(name):
    return Buffer(name, (2, 3, 4), 4)


def test_a_buffer_of_no_stage_is_caught():
    with pytest.raises(PlanError, match="spare is never written"):
        check(replace(PLAN, buffers=(*PLAN.buffers, _scratch("spare"))))
    unread = Buffer("spare", (2, 3, 4), 4, "input")
    with pytest.raises(PlanError, match="spare: version 0 is never read"):
        check(replace(PLAN, buffers=(*PLAN.buffers, unread)))


def test_a_buffer_beyond_those_of_the_model_passes_if_used_in_turn():
    """So that a plan may hold partial sums, or what else an engine needs."""
    gate_up, down = _index("gate_up", 1), _index("down", 1)
    stages = list(PLAN.stages)
    partial = Access("partial", 1, 96)
    stages[gate_up] = replace(stages[gate_up], writes=(*stages[gate_up].writes, partial))
    plan = replace(PLAN, stages=tuple(stages), buffers=(*PLAN.buffers, _scratch("partial")))
    with pytest.raises(PlanError, match="partial: version 1 is never read"):
        check(plan)
    stages[down] = replace(stages[down], reads=(*stages[down].reads, partial))
    check(replace(plan, stages=tuple(stages)))
    too_early = (*stages[gate_up].reads, partial._replace(version=0))
    early = [*stages[:gate_up], replace(stages[gate_up], reads=too_early), *stages[gate_up + 1 :]]
    with pytest.raises(PlanError, match="partial version 0.* not written"):
        check(replace(plan, stages=tuple(early)))
    stages[down] = replace(stages[down], reads=(*stages[down].reads, partial._replace(version=2)))
    with pytest.raises(PlanError, match="partial version 2.* not written"):
        check(replace(plan, stages=tuple(stages)))


def test_a_value_replaced_before_it_is_read_is_caught():
    gate_up = _index("gate_up", 1)
    stages = list(PLAN.stages)
    partial = Access("partial", 1, 96)
    for index, version in ((gate_up, 1), (gate_up + 1, 2)):
        written = partial._replace(version=version)
        stages[index] = replace(stages[index], writes=(*stages[index].writes, written))
    plan = replace(PLAN, stages=tuple(stages), buffers=(*PLAN.buffers, _scratch("partial")))
    with pytest.raises(PlanError, match="layer 1 down.* overwrites partial"):
        check(plan)


def test_writing_an_input_is_caught():
    embed = PLAN.stages[0]
    written = (*embed.writes, Access("tokens", 1, 24))
    with pytest.raises(PlanError, match="tokens.* input"):
        check(_with_stage(0, writes=written))


def test_every_weight_that_is_missing_unknown_or_twice_is_caught():
    for i in INDICES:
        weights = PLAN.stages[i].weights
        for at in range(len(weights)):
            with pytest.raises(PlanError):
                check(_with_stage(i, weights=weights[:at] + weights[at + 1 :]))
            unknown = (*weights[:at], weights[at].replace("weight", "bias"), *weights[at + 1 :])
            with pytest.raises(PlanError, match="bias.* not a weight"):
                check(_with_stage(i, weights=unknown))
            with pytest.raises(PlanError):
                check(_with_stage(i, weights=(*weights, weights[at])))


def test_weights_of_another_layer_of_the_same_size_are_caught():
    out_proj = _index("out_proj", 1)
    other = ("layers.2.self_attn.o_proj.weight",)
    with pytest.raises(PlanError, match=r"layers\.2\..* of another layer"):
        check(_with_stage(out_proj, weights=other))


def test_a_weight_read_by_two_stages_or_none_is_caught_where_the_sizes_agree():
    qkv = _index("qkv", 1)
    k, v = (f"layers.1.self_attn.{part}_proj.weight" for part in "kv")
    weights = tuple(k if name == v else name for name in PLAN.stages[qkv].weights)
    with pytest.raises(PlanError, match=r"k_proj\.weight is read by qkv and qkv"):
        check(_with_stage(qkv, weights=weights))
    embed, sample = PLAN.stages[0], PLAN.stages[-1]
    table = TINY.vocab_size * TINY.dim * 4
    stages = [replace(embed, weights=()), *PLAN.stages[1:-1]]
    stages += [replace(sample, weights=embed.weights, weight_bytes=table)]
    with pytest.raises(PlanError, match=r"embed_tokens\.weight is read by head and sample"):
        check(_with_stages(stages))
    nothing_reads = TINY.with_(qk_norm=True)
    with pytest.raises(PlanError, match=r"layers\.0.*q_norm\.weight is read by no stage"):
        check(replace(PLAN, config=nothing_reads))


def test_kinds_out_of_order_are_caught_where_the_values_are_in_turn():
    i, j = _index("out_proj", 1), _index("gate_up", 1)
    stages = list(PLAN.stages)
    stages[i], stages[j] = replace(stages[i], kind="gate_up"), replace(stages[j], kind="out_proj")
    with pytest.raises(PlanError, match="gate_up.* out of order.* layer 1 out_proj"):
        check(_with_stages(stages))


def test_a_stage_too_many_is_caught_where_the_values_are_in_turn():
    idle = Stage("sample", NO_LAYER, (), (), (), 0, 0)
    with pytest.raises(PlanError, match="19 stages, not 18"):
        check(_with_stages((*PLAN.stages, idle)))


@pytest.mark.parametrize("depth", ["stage", "half", 2, "all"])
def test_launches_that_do_not_tile_are_caught(depth):
    right = list(launches(PLAN, depth))
    check_launches(PLAN, right)
    count = len(PLAN.stages)
    broken = [[], right[:-1], right[1:], [*right, right[-1]]]
    broken += [[*right, Launch("another", count, last)] for last in (count, count + 1)]
    for i, launch in enumerate(right):
        for first, last in ((1, 0), (0, 1), (-1, 0), (0, -1)):
            moved = launch._replace(first=launch.first + first, last=launch.last + last)
            broken.append([*right[:i], moved, *right[i + 1 :]])
        if i:
            broken.append([*right[: i - 1], launch, right[i - 1], *right[i + 1 :]])
            broken.append([*right[:i], launch._replace(name=right[i - 1].name), *right[i + 1 :]])
    for launched in broken:
        with pytest.raises(PlanError):
            check_launches(PLAN, launched)


def test_a_wrong_plan_is_our_defect_and_not_the_users():
    """It comes out with its traceback: no line at the command line would help."""
    from onelaunch.errors import OnelaunchError

    assert issubclass(PlanError, AssertionError)
    assert not issubclass(PlanError, OnelaunchError)
