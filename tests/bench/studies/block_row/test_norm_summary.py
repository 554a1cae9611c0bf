"""What rms-norm's record is summed up to: each figure that is wanted, and what misses it."""

import pytest

from onelaunch.bench.core.tables import provenance
from onelaunch.bench.studies.block_row.rms_norm import row_of
from onelaunch.bench.studies.block_row.rms_norm.summary import summary
from onelaunch.bench.studies.block_row.rms_norm.views import table

FORMS = {"ours"}


def a_row(case, ours, floor=None, **peers):
    row = row_of(case, {"ours": [ours], **{n: [t] for n, t in peers.items()}}, FORMS)
    row.floor = floor
    return row.to_dict()


def line(kinds, *words):
    (match,) = [one for one in summary(kinds) if all(word in one for word in words)]
    return match


def test_full_shapes_may_take_two_hundredths_more():
    rows = [a_row("4096x64 full gpu", 10.2, torch=10.0), a_row("8192x64 full gpu", 5.0, torch=10.0)]
    assert "yes, in all 2" in line({"full gpu": rows}, "at most 1.02")
    assert "yes, 1.400x" in line({"full gpu": rows}, "at least 1.25x")
    rows[0] = a_row("4096x64 full gpu", 10.3, torch=10.0)
    text = line({"full gpu": rows}, "at most 1.02")
    assert "no, not in 1 of 2: 4096x64 1.030" in text
    rows[1] = a_row("8192x64 full gpu", 9.0, torch=10.0)
    assert ": no, 1.039x" in line({"full gpu": rows}, "at least 1.25x")


@pytest.mark.parametrize(
    ("ours", "best", "reached"),
    [(2.09, 2.0, True), (2.12, 2.0, False), (102.9, 100.0, True), (103.2, 100.0, False)],
)
def test_forward_shapes_may_take_a_tenth_of_a_microsecond_more(ours, best, reached):
    kinds = {"forward gpu": [a_row("4096x64 forward gpu", ours, torch=best)]}
    assert (": yes, in all 1" in line(kinds, "0.1 us more")) == reached


def test_shares_are_wanted_of_large_shapes_alone():
    # 251 and 134 MB forward; 157 and 671 MB both
    forward = [a_row("8192x7680 forward gpu", 10.0, 9.4), a_row("8192x4096 forward gpu", 9.0, 1.0)]
    text = line({"forward gpu": forward}, "at least 95%")
    assert "no, not in 1 of 1: 8192x7680 94.0%" in text
    full = [a_row("4096x3840 full gpu", 10.0, 8.3), a_row("8192x8192 full gpu", 10.0, 8.7)]
    assert "yes, in all 2" in line({"full gpu": full}, "at least 82%")
    assert "not in 1 of 1: 8192x8192 87.0%" in line({"full gpu": full}, "at least 88%")


def test_the_host_is_compared_with_torch_and_liger():
    rows = [
        a_row("4096x64 full host", 60.0, torch=50.0, liger=100.0),
        a_row("4096x128 full host", 45.0, torch=50.0, liger=100.0),
    ]
    assert "yes, in all 2; measured 0.90 to 1.20" in line({"full host": rows}, "1.25 of torch")
    assert "not in 1 of 2: 4096x64 0.60" in line({"full host": rows}, "0.5 of liger")
    # nothing is wanted of the plain form
    plain = [row | {"kernel": "none: the plain form"} for row in rows]
    assert not [one for one in summary({"full host": plain}) if "at most" in one]


def test_savings_are_compared_with_the_sources_where_it_takes_blocks():
    notes = {"percent_of_liger_row": -60.0, "published_percent": -67.9}
    rows = [a_row(f"4096x{columns} full gpu", 4.0, torch=5.0) | notes for columns in (64, 768)]
    assert "not in 1 of 1: 4096x64 -60.0%" in line({"full gpu": rows}, "the source did")


def test_memory_names_the_largest_excess():
    rows = [
        a_row("4096x64 memory", 1000.0) | {"planned": 1000, "unit": "bytes"},
        a_row("4096x768 memory", 5000.0) | {"planned": 4000, "unit": "bytes"},
    ]
    text = line({"memory": rows}, "planned partials")
    assert ": no, at most +1.0 kB (+25.0%) in 2 shapes, at 4096x768" in text
    assert ": yes, at most +0.0 kB" in line({"memory": rows[:1]}, "planned partials")
    assert "| rows x columns | planned |" in table({"device": "a device", "rows": rows})


def test_a_variant_of_liger_is_named_only_where_it_is_faster():
    times = {"liger": 10.0, "liger source": 9.95, "torch": 20.0}
    row = a_row("4096x64 full gpu", 5.0, **times)
    assert (row["best_peer"], row["ratio"]) == ("liger", pytest.approx(5 / 9.95, abs=1e-4))
    row = a_row("4096x64 full gpu", 5.0, **times | {"liger source": 9.0})
    assert row["best_peer"] == "liger source"


def test_a_table_begins_with_where_its_figures_come_from():
    rows = [
        a_row("4096x64 full gpu", 4.0, torch=5.0)
        | {"commit": commit, "dtype": "bfloat16", "copy_GBps": gbps}
        for commit, gbps in (("aaa", 4256.0), ("bbb", 4300.0))
    ]
    stamp = {"device": "a device", "date": "2030-01-02", "commit": "bbb"}
    record = stamp | {"versions": {"torch": "2.11.0", "liger-kernel": "0.8.5"}, "rows": rows}
    first, warning = provenance(record).split("\n\n")
    assert first == (
        "a device; 2030-01-02; commit bbb; torch 2.11.0; liger-kernel 0.8.5; bfloat16; "
        "copy 4,256 GB/s to copy 4,300 GB/s; n = 1."
    )
    assert warning == "Warning: the rows are not of one commit: 1 of aaa, 1 of bbb."
    assert "\n\n" not in provenance(record | {"rows": rows[:1]})
    assert table(record).splitlines()[2] == first
