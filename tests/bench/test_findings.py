"""What committed records say about the published studies; every published row has an answer."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from onelaunch.bench.core.findings import PROGRAMS, of_a_gain
from onelaunch.bench.core.published import PUBLISHED
from onelaunch.bench.experiments import EXPERIMENTS, module_name
from onelaunch.checkpoints.atomic import read_json

RECORDS = Path(__file__).parents[2] / "benchmarks" / "records"
PATHS = sorted(path for path in RECORDS.glob("*/*.json") if path.stem in EXPERIMENTS)


def findings_of(path):
    module = importlib.import_module(module_name(path.stem))
    return module.findings(read_json(path)) if hasattr(module, "findings") else []


def verdicts_of(device, experiment):
    """Verdicts by key; of a key with several findings, all of them."""
    verdicts = {}
    for finding in findings_of(RECORDS / device / f"{experiment}.json"):
        for key in finding.answers:
            verdicts.setdefault(key, []).append(finding.verdict)
    return verdicts


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_findings_answer_published_rows_with_figures(path):
    for finding in findings_of(path):
        assert set(finding.answers) <= PUBLISHED.keys()
        assert all((finding.claim, finding.published, finding.why))
        assert finding.ours or finding.verdict == "not applicable"
        assert "\n" not in finding.claim + finding.ours + finding.why


def test_every_published_row_has_an_experiment_or_says_why_not():
    for key, row in PUBLISHED.items():
        known = row.answer in EXPERIMENTS
        assert known != bool(row.why_not), key


def test_fused_layers_pay_where_a_call_is_launched_one_by_one():
    verdicts = verdicts_of("nvidia-h200", "fusion-depth")
    for key in ("ffn-64", "ffn-288-128", "whole-15m", "whole-110m"):
        # direction and size, over one kernel per stage: from Python, and as a graph
        assert verdicts[key] == ["confirmed"] * 2 + ["refuted"] * 2, key
    assert verdicts["sweet-spot"] == ["confirmed", "refuted"]
    assert verdicts["part-110m-4"] == ["inconclusive"] * 2  # no kernel per stage was timed of them
    assert verdicts["call-price"] == ["confirmed", "not applicable"] * 2
    on_a_cpu = verdicts_of("amd-epyc-2-cores", "fusion-depth")
    assert on_a_cpu["call-price"] == ["confirmed", "not applicable"]
    assert on_a_cpu["ffn-64"] == ["confirmed", "refuted"]
    assert on_a_cpu["whole-110m"][1] == "refuted"
    assert on_a_cpu["whole-110m"][0] in ("refuted", "inconclusive")  # 1.01x


def test_separate_calls_on_a_gpu_are_one_kernel_per_stage():
    record = read_json(RECORDS / "nvidia-h200" / "fusion-depth.json")
    for row in record["rows"]:
        if row.get("depth") in ("half", "1"):  # the fused kernel's own launch repeated: no baseline
            row["ours"] *= 100
    module = importlib.import_module(module_name("fusion-depth"))
    assert module.findings(record) == findings_of(RECORDS / "nvidia-h200" / "fusion-depth.json")
    for row in record["rows"]:
        if row.get("depth") == "all":
            row["speed_against"] = dict.fromkeys(row["speed_against"], 100.0)
    wholes = [f for f in module.findings(record) if f.answers == ("whole-15m",)]
    assert {finding.verdict for finding in wholes} == {"confirmed"}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_no_verdict_rests_on_the_seconds_of_an_evaluator(path):
    record = read_json(path)
    for row in record["rows"]:
        if PROGRAMS in row["case"]:
            slower(row)
    module = importlib.import_module(module_name(path.stem))
    if hasattr(module, "findings") and path.stem not in ("cache",):  # real compilations
        verdicts = [(f.claim, f.verdict) for f in module.findings(record)]
        assert verdicts == [(f.claim, f.verdict) for f in findings_of(path)]


def slower(row):
    """As an evaluator a hundred times as slow would have it: every figure but counts and names."""
    for name, value in row.items():
        if isinstance(value, float):
            row[name] = 100 * value


def test_a_public_converter_refutes_no_private_parser():
    for experiment in ("weight-mutability", "baked-or-argument"):
        for key, verdicts in verdicts_of("amd-epyc-2-cores", experiment).items():
            assert set(verdicts) == {"not applicable"}, key


def test_the_block_path_is_compared_with_the_row_path_where_there_are_kernels():
    verdicts = verdicts_of("nvidia-h200", "rms-norm")
    assert len(verdicts) == 42
    assert [key for key, each in verdicts.items() if each == ["refuted"]] == [
        "norm-forward-4096-512"
    ]
    assert set(map(tuple, verdicts_of("amd-epyc-2-cores", "rms-norm").values())) == {
        ("not applicable",)
    }
    assert verdicts_of("nvidia-h200", "rms-norm-threshold") == {
        "norm-rows": ["confirmed", "confirmed"]
    }
    assert verdicts_of("amd-epyc-2-cores", "rms-norm-threshold") == {
        "norm-rows": ["not applicable"]
    }


@pytest.mark.parametrize(
    ("speedup", "verdict"), [(2.0, "confirmed"), (1.99, "refuted"), (0.9, "refuted")]
)
def test_half_of_a_gain_confirms_it(speedup, verdict):
    assert of_a_gain(speedup, 3.0)[0] == verdict
    assert of_a_gain(speedup, 3.0, error=2.0)[0] == "inconclusive"
