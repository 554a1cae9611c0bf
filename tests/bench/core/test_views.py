"""Tables whose columns are data."""

from __future__ import annotations

from onelaunch.bench.core.published import PUBLISHED
from onelaunch.bench.core.views import (
    CASE,
    N,
    column,
    median_and_spread,
    published,
    statement,
    table_of,
)


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_column_is_scaled_and_written_or_a_dash():
    rows = [{"case": "a", "n": 3, "s": 0.25, "share": 0.0}, {"case": "b", "s": None}]
    ms, share = column("ms", "s", "{:.1f}", 1e3), column("share", "share", "{:.1%}")
    # heads may repeat
    header, _, *lines = table_of(rows, CASE, ms, share, N, column("ms", "s", str)).splitlines()
    assert cells(header) == ["", "ms", "share", "n", "ms"]
    assert [cells(line) for line in lines] == [
        ["a", "250.0", "0.0%", "3", "0.25"], ["b", "-", "-", "-", "-"],
    ]  # fmt: skip


def test_a_median_stands_next_to_its_spread():
    rows = [{"ours": 0.002, "spread": [0.001, 0.0041]}, {"ours": 1.0, "spread": None}]
    *_, first, second = table_of(rows, *median_and_spread("ms", "{:.1f}", 1e3)).splitlines()
    assert (cells(first), cells(second)) == (["2.0", "1.0-4.1"], ["1000.0", "-"])


def test_published_figures_and_statements_by_key():
    assert published("overlap-beside", "slowdown") == 1.13
    assert isinstance(published("budget-312", "failures"), float)
    assert statement("cache-weights") == PUBLISHED["cache-weights"].values["told"]
