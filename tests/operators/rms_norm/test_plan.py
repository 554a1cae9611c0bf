"""Which kernel runs in what shape: both sides of every boundary, on no device."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onelaunch.operators.rms_norm import plan as plans
from onelaunch.operators.rms_norm.plan import (
    BACKWARD_BLOCK,
    BACKWARD_ROW,
    FORWARD_BLOCK,
    MAX_COLUMNS,
    MAX_TILE_COLUMNS,
    Plan,
    backward_plan,
    forward_plan,
    reduce_plan,
)

MULTIPROCESSORS = (1, 8, 132, 304)
every_size = pytest.mark.parametrize("element_bytes", [2, 4])
every_device = pytest.mark.parametrize("multiprocessors", MULTIPROCESSORS)
both_ways = pytest.mark.parametrize("make", [forward_plan, backward_plan])

# The most programs a multiprocessor that any rule may use: so many rows of dW partials.
MOST_PROGRAMS = 16


def tiles(rows: int, plan: Plan) -> int:
    return -(-rows // plan.rows_per_tile)


def power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


# ------------------------------------------------------------------------------ the published rule


@every_size
@every_device
@pytest.mark.parametrize(
    ("rows", "columns", "kernel"),
    [
        (4096, 512, "block"),
        (4095, 512, "row"),
        (4096, 513, "row"),
        (4096, 511, "block"),
        (4096, 257, "block"),
        (4096, 256, "block"),
        (4095, 257, "row"),
        (4096, 1, "block"),
        (4095, 1, "row"),
        (4096, 768, "row"),
        (32768, 64, "block"),
        (32768, 768, "row"),
        (1, 64, "row"),
        (2**33, 512, "block"),
        (2**33, 513, "row"),
    ],
)
def test_the_published_rule(rows, columns, kernel, element_bytes, multiprocessors):
    """16 rows a tile and 4 warps where the padded width is at most 512 and there are 4,096 rows."""
    forward = forward_plan(rows, columns, element_bytes, multiprocessors, rule="source")
    backward = backward_plan(rows, columns, element_bytes, multiprocessors, rule="source")
    for plan in (forward, backward):
        assert plan.kernel == kernel
        assert plan.rows_per_tile == (16 if kernel == "block" else 1)
        assert plan.warps == 4
        assert plan.stages == 1
    assert forward.grid == tiles(rows, forward)
    assert backward.grid == backward.partials == min(multiprocessors, tiles(rows, backward))


@both_ways
@pytest.mark.parametrize(
    ("columns", "warps"),
    [(1024, 4), (1025, 8), (2048, 8), (4096, 8), (4097, 16), (8192, 16), (16384, 16)],
)
def test_the_published_rules_warps_of_one_row(make, columns, warps):
    plan = make(4096, columns, 2, 132, rule="source")
    assert (plan.kernel, plan.warps) == ("row", warps)


@both_ways
@pytest.mark.parametrize("columns", [64, 512, 513, 1024])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 4095, 4096])
def test_the_published_rule_forced(make, rows, columns):
    """Its block kernel has no tile for wider rows."""
    block = make(rows, columns, 2, 132, "block", "source")
    wanted = ("block", 16) if columns <= 512 else ("row", 1)
    assert (block.kernel, block.rows_per_tile, block.warps) == (*wanted, 4)
    row = make(rows, columns, 2, 132, "row", "source")
    assert (row.kernel, row.rows_per_tile) == ("row", 1)


# --------------------------------------------------------------------------------------------- ours


# Backward by blocks a width has an entry for each range of rows: here that of the most.
BACKWARD_BLOCK_OF_MOST = tuple((most, by_rows[-1][1]) for most, by_rows in BACKWARD_BLOCK)
MOST_ROWS = max(by_rows[-1][0] for _, by_rows in BACKWARD_BLOCK)
TABLES = {
    "forward by blocks": (forward_plan, "block", FORWARD_BLOCK),
    "backward by blocks": (backward_plan, "block", BACKWARD_BLOCK_OF_MOST),
    "backward by rows": (backward_plan, "row", BACKWARD_ROW),
}
ENTRIES = [(name, i) for name, (_, _, table) in TABLES.items() for i in range(len(table))]


@every_size
@every_device
@pytest.mark.parametrize(("name", "i"), ENTRIES)
def test_each_entry_holds_up_to_its_width(name, i, element_bytes, multiprocessors):
    make, row_mode, table = TABLES[name]
    rows = MOST_ROWS * multiprocessors  # enough that every program backward has a tile, too

    def check(width: int, entry: tuple[int, ...]) -> None:
        plan = make(rows, width, element_bytes, multiprocessors, row_mode)
        rows_per_tile, warps, *others = entry
        assert (plan.rows_per_tile, plan.warps) == (rows_per_tile, warps)
        assert plan.kernel == ("block" if rows_per_tile > 1 else "row")
        if make is forward_plan:
            (weight_first,) = others
            assert plan.weight_first is weight_first
            assert (plan.stages, plan.grid) == (1, tiles(rows, plan))
            return
        stages, programs = others
        assert 1 <= plan.stages <= stages
        assert plan.grid == min(tiles(rows, plan), multiprocessors * programs)

    most, entry = table[i]
    check(most, entry)
    check(most - 1, entry)
    if i + 1 < len(table):
        check(most + 1, table[i + 1][1])


@every_size
@every_device
@pytest.mark.parametrize("width", [63, 64, 65, 128, 129, 256, 257])
def test_more_rows_of_a_width_may_have_another_tile(width, element_bytes, multiprocessors):
    by_rows = next(entries for most, entries in BACKWARD_BLOCK if width <= most)

    def tile(rows: int, row_mode: str) -> tuple[int, ...]:
        plan = backward_plan(rows, width, element_bytes, multiprocessors, row_mode)
        return plan.rows_per_tile, plan.warps

    for i, (least, entry) in enumerate(by_rows):
        rows = max(least, plans.BLOCK_MIN_ROWS_PER_MULTIPROCESSOR) * multiprocessors
        for mode in ("auto", "block"):
            assert tile(rows, mode) == tile(rows + 1, mode) == entry[:2]
        if i:
            assert tile(rows - 1, "block") == by_rows[i - 1][1][:2]
        assert tile(rows, "row") == tile(1, "row")


def test_every_width_has_a_tile_from_the_first_row_on():
    for _, by_rows in BACKWARD_BLOCK:
        leasts = [least for least, _ in by_rows]
        assert leasts[0] == 0
        assert leasts == sorted(set(leasts))


def test_the_tables_reach_as_far_as_one_tile_does():
    for make, _, table in TABLES.values():
        widths = [most for most, _ in table]
        assert widths == sorted(set(widths))
        assert all(map(power_of_two, widths))
        most = plans.FORWARD_MAX_TILE_COLUMNS if make is forward_plan else MAX_TILE_COLUMNS
        assert widths[-1] == most
    assert all(rows == 1 for _, (rows, *_) in BACKWARD_ROW)


@pytest.mark.parametrize("width", [1, 64, 511, 512, 513, 767, 769, 1024, 1025, 4095, 4096])
def test_warps_of_one_row_forward_follow_its_width(width):
    plan = forward_plan(4096, width, 2, 132, "row")
    wanted = plan.block_columns // plans.FORWARD_ROW_ELEMENTS_PER_WARP
    assert plan.weight_first is plans._entry(FORWARD_BLOCK, plan.block_columns)[2]
    assert (plan.kernel, plan.warps) == ("row", max(1, min(wanted, plans.MAX_WARPS)))


@both_ways
@every_size
@every_device
@pytest.mark.parametrize("columns", [1, 64, 257, 512, 1000])
def test_few_rows_get_a_program_each(make, columns, multiprocessors, element_bytes):
    def kernel(rows: int, row_mode: str = "auto") -> str:
        return make(rows, columns, element_bytes, multiprocessors, row_mode).kernel

    enough = plans.BLOCK_MIN_ROWS_PER_MULTIPROCESSOR * multiprocessors
    assert kernel(enough) == kernel(enough + 1) == "block"
    assert kernel(enough - 1) == kernel(1) == "row"
    assert kernel(enough - 1, "block") == kernel(1, "block") == "block"
    assert kernel(enough, "row") == "row"


@both_ways
def test_the_automatic_choice_is_one_of_the_forced_ones(make):
    for rows in (1, 7, 132, 4096, 131072):
        for columns in (1, 64, 257, 768, 1024, 4096, 5000, 16384, 40000):
            forced = [make(rows, columns, 2, 132, mode) for mode in ("row", "block")]
            assert make(rows, columns, 2, 132) in forced


@every_size
def test_the_pipeline_fits_in_shared_memory(element_bytes, monkeypatch):
    entries = [("block", *entry) for entry in BACKWARD_BLOCK_OF_MOST]
    entries += [("row", *entry) for entry in BACKWARD_ROW]
    for mode, most, (rows, _, stages, _) in entries:
        tile_bytes = 2 * rows * most * element_bytes
        for spare, granted in ((0, stages), (-1, stages - 1)):
            monkeypatch.setattr(plans, "MAX_PIPELINE_BYTES", tile_bytes * (stages - 1) + spare)
            assert backward_plan(MOST_ROWS * 132, most, element_bytes, 132, mode).stages == max(
                1, granted
            )


# ------------------------------------------------------------------------------------- wide rows


@both_ways
@every_size
@pytest.mark.parametrize("rule", ["tuned", "source"])
@pytest.mark.parametrize("row_mode", ["auto", "row", "block"])
def test_wide_rows_are_cut_in_chunks(make, element_bytes, rule, row_mode):
    ours = make is forward_plan and rule == "tuned"
    most = plans.FORWARD_MAX_TILE_COLUMNS if ours else MAX_TILE_COLUMNS
    for columns in (most, most - 1):
        last = make(9, columns, element_bytes, 132, row_mode, rule)
        one_row = last.rows_per_tile == 1
        assert last.kernel == ("row" if one_row else "block")
    for columns in (most + 1, 2 * most, 20_000, 32768, 100_000, MAX_COLUMNS):
        plan = make(9, columns, element_bytes, 132, row_mode, rule)
        assert plan.kernel == "chunked"
        assert power_of_two(plan.block_columns)
        assert plan.block_columns < columns
        if ours:
            chunks = -(-columns // plan.block_columns)
            assert chunks == plans.FORWARD_MIN_CHUNKS or plan.block_columns == plans.CHUNK_COLUMNS


@every_size
@every_device
@pytest.mark.parametrize("row_mode", ["auto", "row", "block"])
@pytest.mark.parametrize("rows", [1, 7, 4096, 131072])
def test_three_parts_make_a_row_of_exactly_that_width(
    rows, row_mode, multiprocessors, element_bytes
):
    for width, (rows_per_tile, warps, weight_first) in plans.FORWARD_THREE_SEGMENTS.items():
        plan = forward_plan(rows, width, element_bytes, multiprocessors, row_mode)
        assert (plan.segments, plan.segments * plan.block_columns) == (3, width)
        assert power_of_two(plan.block_columns)
        assert (plan.rows_per_tile, plan.warps) == (rows_per_tile, warps)
        assert plan.weight_first is weight_first
        for other in (width - 1, width + 1):
            assert forward_plan(rows, other, element_bytes, multiprocessors, row_mode).segments == 1
        source = forward_plan(rows, width, element_bytes, multiprocessors, row_mode, "source")
        assert source.segments == 1


@both_ways
@pytest.mark.parametrize("columns", [-1, 0, MAX_COLUMNS + 1])
def test_other_widths_are_refused(make, columns):
    with pytest.raises(ValueError, match=f"1 to {MAX_COLUMNS} columns.*{columns}"):
        make(4096, columns, 2, 132)


@both_ways
@pytest.mark.parametrize("rows", [-1, 0])
def test_no_rows_are_nothing_to_plan(make, rows):
    with pytest.raises(ValueError, match=f"{rows} rows"):
        make(rows, 64, 2, 132)


@both_ways
def test_unknown_words_are_refused(make):
    with pytest.raises(ValueError, match="row_mode .*auto, row, block.*'rows'"):
        make(4096, 64, 2, 132, "rows")
    with pytest.raises(ValueError, match="rule .*tuned, source.*'liger'"):
        make(4096, 64, 2, 132, rule="liger")


# -------------------------------------------------------------------------------- for every shape

shapes = given(
    rows=st.one_of(st.integers(1, 5000), st.integers(1, 2**33)),
    columns=st.one_of(st.integers(1, 1100), st.integers(1, MAX_COLUMNS)),
    element_bytes=st.sampled_from([2, 4]),
    multiprocessors=st.integers(1, 400),
    row_mode=st.sampled_from(plans.ROW_MODES),
    rule=st.sampled_from(plans.RULES),
)


def check_tile(plan: Plan, columns: int) -> None:
    assert power_of_two(plan.rows_per_tile)
    assert power_of_two(plan.block_columns)
    assert power_of_two(plan.warps)
    assert plan.warps <= 32
    assert plan.stages >= 1
    if plan.kernel == "chunked":
        assert plan.block_columns < columns
    else:
        assert plan.kernel == ("block" if plan.rows_per_tile > 1 else "row")
        assert columns <= plan.segments * plan.block_columns < 2 * columns
        assert plan.segments == 1 or plan.segments * plan.block_columns == columns


@shapes
@settings(max_examples=300, deadline=None)
def test_every_row_is_normalized_once(rows, columns, **rest):
    plan = forward_plan(rows, columns, *rest.values())
    check_tile(plan, columns)
    assert plan.grid == tiles(rows, plan)
    assert plan.partials == 0


@shapes
@settings(max_examples=300, deadline=None)
def test_no_program_backward_is_idle_and_partials_are_bounded(
    rows, columns, element_bytes, multiprocessors, row_mode, rule
):
    plan = backward_plan(rows, columns, element_bytes, multiprocessors, row_mode, rule)
    check_tile(plan, columns)
    assert 1 <= plan.grid <= tiles(rows, plan)
    assert plan.partials == plan.grid
    assert plan.grid <= MOST_PROGRAMS * multiprocessors
    assert plan.grid == tiles(rows, plan) or plan.grid % multiprocessors == 0


@shapes
@settings(max_examples=200, deadline=None)
def test_a_tile_of_one_kernel_depends_on_the_width_alone(
    rows, columns, element_bytes, multiprocessors, row_mode, rule
):
    """So a row's sum is added in one order, for any number of rows. Where a width has
    several tiles, a warp of each holds whole rows, and the GPU tests compare the bits."""
    width = max(plans.padded(columns), BACKWARD_BLOCK[0][0])
    by_rows = dict(BACKWARD_BLOCK).get(width, ())
    several = rule == "tuned" and len({entry[:3] for _, entry in by_rows}) > 1

    def tile(make, rows):
        plan = make(rows, columns, element_bytes, multiprocessors, row_mode, rule)
        figures = (plan.rows_per_tile, plan.warps, plan.stages)
        if several and make is backward_plan and plan.kernel == "block":
            assert 32 * 16 // element_bytes >= plan.block_columns
            figures = ()
        return plan.kernel, (plan.block_columns, plan.weight_first, *figures)

    for make in (forward_plan, backward_plan):
        kernel, figures = tile(make, rows)
        for others in (1, 7, 4096, 131072):
            other_kernel, other_figures = tile(make, others)
            assert other_kernel != kernel or other_figures == figures


@given(partials=st.integers(1, 8000), columns=st.integers(1, MAX_COLUMNS))
@settings(max_examples=200, deadline=None)
def test_the_second_launch_backward_adds_every_column(partials, columns):
    plan = reduce_plan(partials, columns)
    assert power_of_two(plan.block_columns)
    assert power_of_two(plan.block_partials)
    assert 0 <= plan.grid * plan.block_columns - columns < plan.block_columns
    narrow = columns <= plans.REDUCE_NARROW_MAX_COLUMNS
    block_columns, block_partials, warps = plans.REDUCE_NARROW if narrow else plans.REDUCE_WIDE
    assert (plan.block_columns, plan.warps) == (block_columns, warps)
    assert plan.dependent is narrow
    assert plan.block_partials <= block_partials
    # no wider than the partials need, and not so narrow that the order of adding is left to luck
    assert plan.block_partials < max(32, 2 * partials)


def test_the_second_launch_at_both_sides_of_its_boundary():
    most = plans.REDUCE_NARROW_MAX_COLUMNS
    for columns, (block_columns, _, _) in (
        (most, plans.REDUCE_NARROW),
        (most + 1, plans.REDUCE_WIDE),
    ):
        plan = reduce_plan(4096, columns)
        assert (plan.block_columns, plan.dependent) == (block_columns, columns == most)
