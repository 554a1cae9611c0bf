"""parity, made small: rows, table, findings, picture, what is refused."""

import pytest

pytest.importorskip("coremltools")

from onelaunch.bench.engines import parity
from onelaunch.bench.engines.parity import views as parity_views
from onelaunch.engines import cpu
from onelaunch.engines.coreml import training
from tests.bench.records import record_of
from tests.engines.coreml.in_process import InProcess
from tests.engines.suite import SMALL


@pytest.mark.extended
def test_errors_of_engines_and_gradients(monkeypatch, tmp_path):
    monkeypatch.setattr(parity, "QUICK_MODELS", (("stories260k", 16),))
    monkeypatch.setattr(parity, "GRADIENTS", ("stories260k", 16))
    monkeypatch.setattr(parity, "preset", lambda name: SMALL)
    monkeypatch.setattr(training, "Compiler", InProcess)
    monkeypatch.setattr(cpu, "why_not", lambda: "not in this test")
    rows = list(parity.run("cpu", True, lambda line: None))
    record = record_of(parity, rows, tmp_path)
    logits = {(r["engine"], r["dtype"]): r for r in record["rows"] if r["what"] == "logits"}
    assert logits["reference", "float32"]["ours"] < 1e-5 < logits["coreml", "float32"]["ours"]
    gradients = {(r["engine"], r["dtype"]): r for r in record["rows"] if r["what"] == "gradients"}
    assert len(gradients) == 4
    for dtype, most in (("float32", 1e-5), ("bfloat16", 5e-2)):
        row = gradients["reference", dtype]
        assert 0 < row["ours"] < most
        assert row["ours"] <= row["worst_error"]
        assert row["parameters"] == len(SMALL.weight_shapes())
        assert row["norm"] == "torch"  # on a CPU training is PyTorch's
        assert row["times_pytorch"] == pytest.approx(1, abs=0.01)
    kinds = {row["kind"]: row for row in record["rows"] if row["what"] == "magnitude"}
    assert kinds["add"]["ours"] > 39_000  # the mask
    assert {finding.verdict for finding in parity.findings(record)} == {"confirmed"}
    gradients["reference", "bfloat16"]["times_pytorch"] = parity_views.MOST_TIMES + 0.01
    refuted = [f.claim for f in parity.findings(record) if f.verdict == "refuted"]
    assert len(refuted) == 1
    assert "gradients of training in bfloat16" in refuted[0]
