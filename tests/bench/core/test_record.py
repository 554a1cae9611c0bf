"""Records: what they hold, and that a later run replaces its own cases only."""

import json

import pytest

from onelaunch.bench.core import record
from onelaunch.bench.core.record import Row, percentiles, slug, write_record
from onelaunch.errors import BadInput


def test_a_record_has_what_is_needed_to_repeat_it(tmp_path):
    row = Row.of("case a", [3.0, 1.0, 2.0, 5.0, 4.0], peers={"peer": 2.0}, notes={"threads": 2})
    path = write_record("speed", "tokens/s", [row], tmp_path, "Maker Model, 2 cores")
    assert path == tmp_path / "maker-model-2-cores" / "speed.json"
    data = json.loads(path.read_text())
    assert data["schema"] == 1
    for key in ("experiment", "date", "commit", "device", "versions", "unit"):
        assert data[key], key
    assert "torch" in data["versions"]
    (only,) = data["rows"]
    assert only["ours"] == 3.0
    assert only["spread"] == pytest.approx([1.8, 4.2])
    assert only["n"] == 5
    assert only["peers"] == {"peer": 2.0}
    assert only["threads"] == 2


def test_a_later_run_replaces_the_rows_of_its_cases_and_keeps_the_others(tmp_path):
    write_record("speed", "s", [Row("a", 1.0), Row("b", 2.0)], tmp_path, "cpu")
    path = write_record("speed", "s", [Row("b", 3.0), Row("c", 4.0)], tmp_path, "cpu")
    rows = {row["case"]: row["ours"] for row in json.loads(path.read_text())["rows"]}
    assert rows == {"a": 1.0, "b": 3.0, "c": 4.0}


def test_another_schema_is_not_overwritten(tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "speed.json").write_text('{"schema": 2}')
    with pytest.raises(BadInput, match="schema"):
        write_record("speed", "s", [Row("a", 1.0)], tmp_path, "cpu")
    assert (tmp_path / "cpu" / "speed.json").read_text() == '{"schema": 2}'


def test_percentiles():
    assert percentiles([7.0]) == (7.0, 7.0)
    assert percentiles([float(i) for i in range(11)]) == pytest.approx((2.0, 8.0))


def test_slugs_are_plain():
    assert slug("NVIDIA H200") == "nvidia-h200"
    assert slug("Intel(R) Xeon(R) @ 2.2GHz, 2 cores") == "intel-r-xeon-r-2-2ghz-2-cores"


def test_the_commit_is_told(monkeypatch):
    assert record.commit()
    monkeypatch.setattr(record, "_git", lambda *words: (_ for _ in ()).throw(OSError()))
    monkeypatch.setenv("ONELAUNCH_COMMIT", "abc")
    assert record.commit() == "abc"
