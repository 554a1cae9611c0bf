"""The metrics file: whole records, bounded queue, counted drops, clean-up for a resume."""

import errno
import json
import os
import threading

import pytest

from onelaunch.errors import BadInput, RunFailed
from onelaunch.training import metrics
from onelaunch.training.metrics import MetricsWriter, drop_after
from tests.metrics import read_metrics


def test_records_arrive_in_order_and_flush_waits_for_them(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    for i in range(1000):
        writer.push({"kind": "update", "update": i})
    assert writer.flush()
    assert [r["update"] for r in read_metrics(path)] == list(range(1000))
    writer.close()
    assert writer.dropped == 0


def test_a_stalled_disk_drops_and_counts_but_never_blocks(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    stalled, go_on = threading.Event(), threading.Event()
    write = os.write

    def slow_write(descriptor, data):
        stalled.set()
        go_on.wait(30)
        return write(descriptor, data)

    monkeypatch.setattr(metrics.os, "write", slow_write)
    writer = MetricsWriter(path, queue_records=10)
    writer.push({"kind": "update", "update": 0})
    assert stalled.wait(30)
    for i in range(1, 101):
        writer.push({"kind": "update", "update": i})  # would hang here if it waited
    assert writer.dropped == 90
    assert not writer.flush(0.05)
    go_on.set()
    writer.close()
    records = read_metrics(path)
    assert [r["update"] for r in records if r["kind"] == "update"] == list(range(11))
    assert [r["count"] for r in records if r["kind"] == "dropped"] == [90]


def test_a_full_disk_is_kept_as_one_line(tmp_path, monkeypatch):
    def no_space(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    monkeypatch.setattr(metrics.os, "write", no_space)
    writer.push({"kind": "update"})
    assert writer.flush()
    assert isinstance(writer.error, RunFailed)
    assert "disk is full" in str(writer.error)
    writer.close()


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(BadInput, match="cannot write"):
        MetricsWriter(tmp_path / "missing" / "metrics.jsonl")


def test_drop_after_forgets_what_will_be_done_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [
        {"kind": "run", "update": 0},
        {"kind": "update", "update": 1},
        {"kind": "eval", "update": 1},
        {"kind": "update", "update": 2},
        {"kind": "eval", "update": 2},
        {"kind": "update", "update": 3},
        {"kind": "end", "update": 3},
    ]
    lines = [json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + '\n[1]\n{"kind": "upda')
    drop_after(path, update=2, eval_done=1)
    assert read_metrics(path) == [records[i] for i in (0, 1, 2, 3, 6)]
    assert path.read_bytes().endswith(b"\n")
    drop_after(tmp_path / "none.jsonl", 0, 0)


def test_drop_after_forgets_what_is_no_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = '{"kind": "update", "update": 1}\n'
    odd = ['{"kind": "update", "update": "x"}', '{"kind": []}', "[" * 200_000, "3", "\x00"]
    path.write_text("\n".join(odd) + "\n" + good)
    assert read_metrics(path)[-1] == {"kind": "update", "update": 1}
    drop_after(path, update=1, eval_done=0)
    assert path.read_text() == good
