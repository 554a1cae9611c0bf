from itertools import permutations

import pytest

from onelaunch.config import PRESETS
from onelaunch.plan import PlanError, Storage, assign_storage, check_storage, make_plan
from onelaunch.plan.storage import ALIGNMENT, lifetimes
from tests.plan.plans import TINY, tiny_plans


def _run(plan, storage):
    """Every byte says which version of which buffer lies in it; every read finds its own."""
    owners = [None] * storage.nbytes

    def span(name):
        first = storage.offsets[name]
        return slice(first, first + plan.buffer(name).nbytes)

    def holds(name, version):
        return set(owners[span(name)]) == {(name, version)}

    last = {}
    for stage in plan.stages:
        for access in stage.reads:
            if access.buffer in storage.offsets:
                assert holds(access.buffer, access.version), (stage.label, access)
        for access in stage.writes:
            if access.buffer in storage.offsets:
                place = span(access.buffer)
                size = plan.buffer(access.buffer).nbytes
                owners[place] = [(access.buffer, access.version)] * size
                last[access.buffer] = access.version
        # a stage may still read what it needs while it writes
        for access in stage.reads:
            replaced = access.buffer in {write.buffer for write in stage.writes}
            if access.buffer in storage.offsets and not replaced:
                assert holds(access.buffer, access.version), (stage.label, access)
    for buffer in plan.buffers:
        if buffer.role == "output":
            assert holds(buffer.name, last[buffer.name])


@pytest.mark.parametrize("alignment", [1, 16, ALIGNMENT])
@pytest.mark.parametrize("plan", tiny_plans().values(), ids=tiny_plans())
def test_no_value_is_overwritten_while_it_is_needed(plan, alignment):
    storage = assign_storage(plan, alignment)
    check_storage(plan, storage)
    assert set(storage.offsets) == {b.name for b in plan.buffers if not b.given}
    assert all(offset % alignment == 0 for offset in storage.offsets.values())
    _run(plan, storage)


def _most_at_once(plan):
    lives = lifetimes(plan)
    return max(
        sum(
            plan.buffer(name).nbytes
            for name, spans in lives.items()
            if any(first <= i <= last for first, last in spans)
        )
        for i in range(len(plan.stages))
    )


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("sequence", [1, 64])
@pytest.mark.parametrize("sample", [False, True])
def test_presets_take_no_more_than_lives_at_once(name, sequence, sample):
    plan = make_plan(PRESETS[name], sequence=sequence, sample=sample)
    storage = assign_storage(plan)
    check_storage(plan, storage)
    assert _most_at_once(plan) <= storage.nbytes <= _most_at_once(plan) + 4 * ALIGNMENT


def test_a_layers_ffn_takes_the_place_of_its_attention():
    plan = make_plan(PRESETS["stories15m"], sequence=64)
    x = q = mixed = 64 * 288 * 4
    hidden, logits = 64 * 768 * 4, 32000 * 4
    storage = assign_storage(plan)
    assert storage.nbytes == x + max(q + mixed, hidden, logits)
    assert storage.offsets["hidden"] == storage.offsets["logits"] == 0
    assert storage.offsets["x"] == hidden


def test_lifetimes_run_from_each_write_to_its_last_read():
    plan = make_plan(TINY.with_(n_layers=2), sample=True)
    assert lifetimes(plan) == {
        "x": [(0, 3), (3, 5), (5, 8), (8, 10), (10, 11)],
        "q": [(1, 2), (6, 7)],
        "mixed": [(2, 3), (7, 8)],
        "hidden": [(4, 5), (9, 10)],
        "logits": [(11, 12)],
        "next": [(12, 12)],
    }
    kept = make_plan(TINY.with_(n_layers=1), sample=True, all_positions=True)
    assert lifetimes(kept)["logits"] == [(6, 7)]


def test_places_that_collide_are_missing_or_lie_outside_are_caught():
    plan = make_plan(TINY, 2, 3, sample=True)
    right = assign_storage(plan)
    for name in right.offsets:
        without = {other: at for other, at in right.offsets.items() if other != name}
        with pytest.raises(PlanError, match=f"buffer {name} has no storage"):
            check_storage(plan, Storage(without, right.nbytes))
        for offset in (-1, right.nbytes - plan.buffer(name).nbytes + 1):
            with pytest.raises(PlanError, match=f"buffer {name} lies outside"):
                check_storage(plan, Storage({**right.offsets, name: offset}, right.nbytes))


def test_one_byte_in_common_is_caught_where_both_are_needed():
    plan = make_plan(TINY, 2, 3, sample=True)
    sizes = {buffer.name: buffer.nbytes for buffer in plan.buffers if not buffer.given}
    total = sum(sizes.values())
    apart, at = {}, 0
    for name, size in sizes.items():
        apart[name] = at
        at += size
    check_storage(plan, Storage(apart, total))
    needed_at_once = [{"x", name} for name in ("q", "mixed", "hidden", "logits")]
    needed_at_once += [{"q", "mixed"}, {"logits", "next"}]
    for first, second in permutations(sizes, 2):
        touching = {**apart, first: total, second: total + sizes[first]}
        check_storage(plan, Storage(touching, 3 * total))
        overlapping = Storage({**touching, second: total + sizes[first] - 1}, 3 * total)
        if {first, second} in needed_at_once:
            with pytest.raises(PlanError, match="share storage while both are needed"):
                check_storage(plan, overlapping)
        else:
            check_storage(plan, overlapping)
