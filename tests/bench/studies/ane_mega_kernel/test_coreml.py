"""bench coreml on models of no size: rows, errors, the table."""

from __future__ import annotations

import pytest

from tests.bench.records import record_of
from tests.engines.suite import SMALL

pytest.importorskip("coremltools")

from onelaunch.bench.studies.ane_mega_kernel import coreml


@pytest.mark.extended
def test_every_case_has_its_figures_and_a_line(monkeypatch, tmp_path):
    monkeypatch.setattr(coreml, "SEQUENCE", 32)
    monkeypatch.setattr(coreml, "FFN", ((32, 48),))
    monkeypatch.setattr(coreml, "preset", lambda name: SMALL.with_(max_seq_len=32))
    lines = []
    rows = list(coreml.run("cpu", True, lines.append))
    cases = [row.case for row in rows]
    assert cases == [
        "stories260k 1x32 half", "stories260k 1x32 all", "stories260k 1x32 backward full",
        "stories260k 1x32 backward inputs", "ffn 32/48 1x32, 1 layer", "ffn 32/48 1x32, 12 layers",
    ]  # fmt: skip
    assert "Core ML runs on macOS" in lines[0]
    assert len(lines) == 1
    half, whole = rows[0].notes, rows[1].notes
    assert (half["programs"], whole["programs"]) == (5, 1)
    for notes in (half, whole):
        assert 0 < notes["errors"]["float32"]["relative"] < notes["errors"]["float16"]["relative"]
        assert notes["errors"]["float16"]["one_minus_cosine"] < 1e-4
    assert rows[3].notes["operations"] > rows[2].notes["operations"]
    assert all(row.ours > row.notes["emit_seconds"] > 0 for row in rows)
    text = coreml.table(record_of(coreml, rows, tmp_path))
    assert text.count("not run here") == len(rows)
    assert all(f"| {case} " in text for case in cases)
