"""The experiments that time training, made small: rows, tables, findings, pictures, refusals."""

from __future__ import annotations

import importlib
import math
import os
import shutil
import time

import pytest
import torch

from onelaunch.errors import RunFailed

pytest.importorskip("coremltools")

from onelaunch.bench.core.published import PUBLISHED
from onelaunch.bench.experiments import module_name
from onelaunch.bench.studies.ane_mega_kernel import (
    accumulation,
    overlap,
    program_training,
    stack,
    step_breakdown,
    warm_up,
)
from onelaunch.bench.studies.ane_mega_kernel.accumulation import validation as accumulation_learning
from onelaunch.bench.studies.ane_mega_kernel.overlap import background as overlap_background
from onelaunch.bench.studies.ane_mega_kernel.step_breakdown.step_parts import (
    BACKWARD,
    HEAD,
    program_parts,
)
from onelaunch.checkpoints.atomic import read_json
from onelaunch.engines.coreml import training
from onelaunch.training import engines
from onelaunch.training.optim import clip_and_step
from onelaunch.training.recipe import Recipe
from tests.bench.records import record_of
from tests.bench.test_findings import RECORDS
from tests.engines.coreml.in_process import InProcess
from tests.engines.suite import SMALL

TINY = SMALL.with_(n_layers=2, vocab_size=512, max_seq_len=32)
COMPILING = 0.05
ENGINE = "CPU engine stories260k 1x16"
EXPERIMENTS = (accumulation, overlap, stack, step_breakdown, warm_up)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The programs of each shape."""
    return tmp_path_factory.mktemp("programs"), {}


@pytest.fixture
def small(monkeypatch, made):
    """Models of a few thousand weights, whose programs are compiled once; then that is a wait."""
    place, folders = made

    class Once(InProcess):
        def compile(self, weights, folder):
            if self.shape not in folders:
                kept = place / str(len(folders))
                kept.mkdir()
                super().compile(weights, kept)
                folders[self.shape] = kept
            shutil.copytree(folders[self.shape], folder, dirs_exist_ok=True)
            time.sleep(COMPILING)
            return {"compilations": 2, "hits": 0}

    monkeypatch.setattr(program_training, "preset", lambda name: TINY)
    monkeypatch.setattr(training, "Compiler", Once)


def test_an_update_clips_as_the_training_loop_does(small):
    timed = program_training.pytorch_driver("stories260k", 16, "cpu")
    (update,) = timed.updates(2, 1)
    assert update.micro_steps == 2
    assert 0 < update.optimizer_seconds < update.seconds
    plain = program_training.pytorch_driver("stories260k", 16, "cpu")
    recipe = Recipe()
    for _ in range(2):
        plain.micro_step(0.5)
    parameters = plain.engine.parameters()
    norm = clip_and_step(
        plain.optimizer, parameters.values(), recipe.optimizer.lr, recipe.optimizer.grad_clip
    )
    assert norm > recipe.optimizer.grad_clip  # or nothing was clipped
    for name, parameter in timed.engine.parameters().items():
        assert parameter.grad is None
        assert parameter.equal(parameters[name]), name


def test_without_an_engine_of_ours_pytorch_is_timed_alone(small, monkeypatch):
    monkeypatch.setattr(engines.cpu, "why_not", lambda: "no compiler")
    lines = []
    with program_training.pytorch_and_engine("stories260k", 16, "cpu", lines.append) as trainings:
        assert list(trainings) == ["PyTorch"]
    assert len(lines) == 1
    assert "takes PyTorch" in lines[0]


class Result:
    """What an experiment returned: rows by case, and its views of the record."""

    def __init__(self, module, folder):
        rows = list(module.run("cpu", True, lambda line: None))
        self.record = record_of(module, rows, folder)
        self.rows = {row["case"]: row for row in self.record["rows"]}
        assert len(self.rows) == len(rows), "two rows of one case"
        self.text = module.table(self.record)
        self.findings = module.findings(self.record)
        self.keys = {key for each in self.findings for key in each.answers}
        for axes in module.draw(self.record).axes:
            assert axes.get_xlabel(), "an axis without a name"

    def verdicts(self, key):
        return [each.verdict for each in self.findings if key in each.answers]


@pytest.mark.parametrize("module", EXPERIMENTS)
def test_an_empty_record_says_nothing(module):
    record = {"device": "here", "rows": []}
    assert module.findings(record) == []
    assert module.draw(record) is None
    assert module.table(record).startswith("# ")


@pytest.fixture
def few(monkeypatch):
    counts = {1: 2, 10: 2, 50: 1, 100: 0}
    monkeypatch.setattr(accumulation, "QUICK_PROGRAMS", (("stories260k", 16, counts),))
    monkeypatch.setattr(accumulation, "QUICK_PYTORCH", (("stories260k", 16, {10: 2, 50: 1}),))
    monkeypatch.setattr(accumulation, "PYTORCH_SAMPLE", 30)
    monkeypatch.setattr(accumulation_learning, "QUICK_MICRO_STEPS", 20)
    monkeypatch.setattr(accumulation_learning, "QUICK_ACCUMS", (10, 20))
    monkeypatch.setattr(accumulation_learning, "EVAL_BATCHES", 1)


@pytest.mark.soak
@pytest.mark.usefixtures("compiled_training")
def test_more_micro_steps_compile_less(small, few, tmp_path):
    result = Result(accumulation, tmp_path)
    rows = [result.rows[f"ML Programs stories260k 1x16, accum {k}"] for k in (1, 10, 50, 100)]
    shares = [row["compile_share"] for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert 0 < shares[-1] < shares[0] < 1
    assert rows[-1]["micro_steps_per_s"] > rows[1]["micro_steps_per_s"]
    # PyTorch and the engine have nothing to compile
    assert result.verdicts("accum-10") == ["not applicable"] * 3


@pytest.mark.extended
@pytest.mark.usefixtures("compiled_training")
def test_every_number_of_micro_steps_has_its_row(small, few, tmp_path):
    result = Result(accumulation, tmp_path)
    rows = [result.rows[f"ML Programs stories260k 1x16, accum {k}"] for k in (1, 10, 50, 100)]
    assert rows[1]["speedup"] == 1
    assert [row["computed"] for row in rows] == [False, False, False, True]
    assert [row["updates_timed"] for row in rows] == [2, 2, 1, 0]
    ours = [result.rows[f"{ENGINE}, accum {k}"] for k in (10, 50)]
    for row in (result.rows["PyTorch stories260k 1x16, accum 10"], ours[0]):
        assert row["updates_timed"] == 2 * 3
        assert "over_pytorch" in row or row["case"].startswith("PyTorch")
    assert ours[0]["speedup"] == 1
    assert all(row["over_pytorch"] > 0 and row["compile_share"] == 0 for row in ours)
    assert all(0 < row["optimizer_share"] < 1 for row in ours)
    for row in (*rows, *ours):
        assert row["tokens_per_s"] == pytest.approx(16 * row["micro_steps_per_s"], rel=1e-3)
        assert row["updates_per_s"] * row["accum"] == pytest.approx(
            row["micro_steps_per_s"], rel=0.02
        )
    assert result.rows["PyTorch stories260k 1x16, accum 10"]["compile_share"] == 0
    assert {"accum-10", "accum-50", "accum-100", "accum-learning"} <= result.keys
    assert "accum-500" not in result.keys
    assert result.verdicts("accum-learning") == ["quick run"]  # of one update
    assert "## What they cost in learning" in result.text


@pytest.mark.parametrize(("share", "verdict"), [(0.009, "confirmed"), (0.011, "refuted")])
def test_what_an_engine_saves_is_its_optimizer_step(share, verdict):
    def row(name, accum, optimizer_share, **notes):
        return {
            "case": f"{name}, accum {accum}", "accum": accum, "ours": 2.0, "spread": [2.0, 2.0],
            "n": 3, "micro_steps_per_s": 500.0, "updates_per_s": 500 / accum, "updates_timed": 3,
            "tokens_per_s": 1e4, "compile_share": 0.0, "compile_seconds": 0.0, "computed": False,
            "optimizer_share": optimizer_share, "speedup": 0.8 if accum == 1 else 1.0, **notes,
        }  # fmt: skip

    rows = [row("PyTorch", k, 0.2 / k) for k in (1, 10, 100)]
    rows += [row("CUDA engine", k, s, over_pytorch=20.0) for k, s in ((1, 0.2), (10, 0.03))]
    record = {"device": "here", "rows": [*rows, row("CUDA engine", 100, share, over_pytorch=21.0)]}
    (finding,) = (f for f in accumulation.findings(record) if not f.answers)
    assert finding.claim.startswith("CUDA engine: ")
    assert finding.verdict == verdict
    assert (
        finding.ours == f"20.0% of the time with 1 micro-step, 3.0% with 10, {share:.2%} with 100"
    )
    assert "100 are 1.25 times as fast as 1" in finding.why


@pytest.mark.parametrize("name", ["accumulation", "stack", "step-breakdown", "warm-up"])
@pytest.mark.parametrize("device", ["amd-epyc-2-cores", "nvidia-h200"])
def test_a_record_without_an_engine_has_no_words_about_one(device, name):
    module = importlib.import_module(module_name(name))
    record = read_json(RECORDS / device / f"{name}.json")
    record["rows"] = [row for row in record["rows"] if " engine " not in row["case"]]
    text = module.table(record)
    assert "PyTorch stories15m 1x32" in text
    assert "over PyTorch" not in text
    assert " engine " not in text
    assert not any(" engine " in f.claim or not f.answers for f in module.findings(record))


def test_a_rule_wins_by_more_than_seeds_do():
    def row(accum, rule, loss, spread=0.0):
        case = f"learning, accum {accum}, rule {rule}"
        return {
            "case": case, "accum": accum, "rule": rule, "ours": loss, "range": spread, "updates": 9,
        }  # fmt: skip

    def verdict(linear):
        rows = [row(10, "any", 1.0, 0.1), row(50, "none", 2.0), row(50, "linear", linear)]
        (finding,) = accumulation.findings({"rows": rows})
        return finding.verdict

    assert [verdict(loss) for loss in (1.85, 1.95, 2.5)] == ["confirmed", "refuted", "refuted"]


@pytest.mark.extended
def test_learning_is_of_as_many_tokens(few, tmp_path):
    lines = []
    rows = list(accumulation_learning.learning("cpu", True, lines.append))
    assert [row.notes["rule"] for row in rows] == ["any", "none", "linear"]
    assert len({row.notes["tokens"] for row in rows}) == 1
    base, none, linear = rows
    assert base.n == len(accumulation_learning.QUICK_SEEDS)
    assert none.notes["rate"] == base.notes["rate"] == linear.notes["rate"] / 2
    assert all(0 < row.ours < math.log(512) + 1 for row in rows)


@pytest.fixture
def two_updates(monkeypatch):
    monkeypatch.setattr(step_breakdown, "QUICK_CASES", (("stories260k", 16),))
    monkeypatch.setattr(step_breakdown, "QUICK_UPDATES", 2)
    monkeypatch.setattr(step_breakdown, "K", 2)


@pytest.mark.soak
@pytest.mark.usefixtures("compiled_training")
def test_parts_explain_the_micro_step(small, two_updates, tmp_path):
    result = Result(step_breakdown, tmp_path)
    unexplained = [row for row in result.rows.values() if row.get("part") == "unexplained"]
    assert len(unexplained) == 3
    assert all(abs(row["share"]) < 0.1 for row in unexplained)


@pytest.mark.extended
@pytest.mark.usefixtures("compiled_training")
def test_parts_add_up_to_the_micro_step(small, two_updates, tmp_path):
    result = Result(step_breakdown, tmp_path)
    for case in ("ML Programs stories260k 1x16", "PyTorch stories260k 1x16", ENGINE):
        of_case = [row for row in result.rows.values() if row.get("of") == case and "part" in row]
        rows = {row["part"]: row for row in of_case}
        parts = [
            row["share"] for name, row in rows.items() if name != "whole" and "beside" not in name
        ]
        assert sum(parts) == pytest.approx(1, abs=1e-3)
        assert {"data", "optimizer", "unexplained"} <= rows.keys()
    programs = {row["part"] for row in result.rows.values() if row.get("of", "").startswith("ML")}
    for direction in ("forward", "backward"):
        for kind in ("products", "elementwise", "moves", "rounding", "interpreting"):
            assert f"{direction}: {kind}" in programs
        assert {f"{direction}: conversions", f"{direction}: classifier"} <= programs
    ours = {
        row["part"] for row in result.rows.values() if row.get("of") == ENGINE and "part" in row
    }
    assert {"forward: layers", HEAD, BACKWARD["cpu"]} < ours
    assert result.rows[f"{ENGINE}: whole"]["without_clocks"] > 0
    kinds = {row["kind"]: row["share"] for row in result.rows.values() if "kind" in row}
    assert sum(kinds.values()) == pytest.approx(1, abs=1e-3)
    assert {"weight gradient", "loss", "waiting", "outside the compiled step"} < kinds.keys()
    assert "| all threads together " in result.text
    # the head is one part for both directions: no half of the study's
    of_ours = {f.answers: f.verdict for f in result.findings if f.claim.startswith(ENGINE)}
    assert of_ours[("part-forward",)] == of_ours[("part-backward",)] == "not applicable"
    assert of_ours[("part-whole",)] == "confirmed"
    depths = [row for row in result.rows.values() if "depth" in row]
    assert [row["depth"] for row in depths] == ["stage", "half", "all layers"]
    assert [row["programs"] for row in depths] == [20, 8, 2]
    expected = {key for key in PUBLISHED if key.startswith("part-") and "110m" not in key}
    assert expected | {"backward-mega"} == result.keys
    assert "## By how much a program holds" in result.text


def test_timing_the_parts_changes_nothing(small):
    with program_training.driver("stories260k", 16, staleness=0) as timed:
        timed.micro_step(1.0)
        with program_parts(timed) as update:
            update(2, True)
        engine = timed.engine
        assert not {"_forward", "_end", "_backward", "_products"} & engine.__dict__.keys()
        weights = {n: p.detach().clone() for n, p in engine.parameters().items()}
    with program_training.driver("stories260k", 16, staleness=0) as plain:
        plain.micro_step(1.0)
        for _ in range(2):
            plain.micro_step(0.5)
        plain.step()
        for name, parameter in plain.engine.parameters().items():
            assert parameter.equal(weights[name]), name


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(stack, "QUICK_CASES", (("stories260k", 16, 2),))
    monkeypatch.setattr(stack, "SHORT", 2)
    monkeypatch.setattr(stack, "QUICK_LONG", 8)


def of_programs(result):
    return {row["stage"]: row for row in result.rows.values() if row["of"].startswith("ML")}


@pytest.mark.soak
@pytest.mark.usefixtures("compiled_training")
def test_each_optimization_is_over_the_first(small, short, tmp_path):
    programs = of_programs(Result(stack, tmp_path))
    baseline, accumulated, _, asymptote = programs.values()
    assert baseline["ours"] < accumulated["ours"] < asymptote["ours"]
    assert baseline["wait_share"] > accumulated["wait_share"] > 0.1
    assert asymptote["wait_share"] < 0.01
    for row in (baseline, accumulated):
        assert row["model"] == pytest.approx(row["ours"], rel=0.5)


@pytest.mark.extended
@pytest.mark.usefixtures("compiled_training")
def test_every_optimization_has_its_row(small, short, tmp_path):
    result = Result(stack, tmp_path)
    programs = of_programs(result)
    assert list(programs) == list(stack.STAGES)
    assert programs["stack-baseline"]["speedup"] == 1
    for case in ("PyTorch stories260k 1x16", ENGINE):
        rows = [row for row in result.rows.values() if row["of"] == case]
        stages = [row["stage"] for row in rows]
        assert stages == ["stack-baseline", "stack-accumulation", "stack-asymptote"]
        assert all(("over_pytorch" in row) == (case == ENGINE) for row in rows)
    assert result.keys == set(stack.STAGES)
    assert result.verdicts("stack-baseline") == ["not applicable"] * 3
    assert "| over PyTorch |" in result.text
    assert len(result.verdicts("stack-background")) == 2
    assert (
        "| ML Programs stories260k 1x16: 8 micro-steps an update, compiled in the " in result.text
    )
    # of an evaluator; of fewer micro-steps than the study's
    assert result.verdicts("stack-accumulation") == ["not applicable"] + ["quick run"] * 2
    for row in result.rows.values():
        row["k"], row["speedup"] = stack.LONG, 100.0
    of_pytorch = [f for f in stack.findings(result.record) if f.claim.startswith("PyTorch")]
    assert [each.verdict for each in of_pytorch] == ["not applicable", "confirmed", "confirmed"]


@pytest.mark.extended
def test_a_forward_is_timed_during_compilations(small, monkeypatch, tmp_path):
    monkeypatch.setattr(overlap, "preset", lambda name: TINY)
    monkeypatch.setattr(overlap_background, "Compiler", training.Compiler)
    monkeypatch.setattr(overlap, "QUICK_CASES", (("stories260k", 16),))
    monkeypatch.setattr(overlap, "QUICK_ROUNDS", 2)
    monkeypatch.setattr(overlap, "ALONE_SECONDS", 0.05)
    result = Result(overlap, tmp_path)
    alone, during = result.rows.values()
    assert during["case"] == "ML Program stories260k 1x16, beside 8 compilations"
    for row in (alone, during):
        assert row["n"] >= 2
        assert 0 < row["median"] <= row["most"]
        assert 0 < row["ours"] <= row["most"]
    assert during["slowdown"] > 0
    assert during["compile_alone"] >= COMPILING / 2  # two compilations an answer
    assert result.keys == {"overlap-alone", "overlap-beside"}
    during |= {"slowdown": overlap.LITTLE + 0.01, "slowdown_spread": [1.27, 1.27]}
    assert overlap.findings(result.record)[1].verdict == "not applicable"  # of an evaluator
    alone["of"] = during["of"] = "PyTorch stories260k 1x16"
    assert overlap.findings(result.record)[1].verdict == "refuted"
    during["slowdown"] = overlap.LITTLE - 0.01
    assert overlap.findings(result.record)[1].verdict == "confirmed"
    assert "20 compilations" in result.text


def test_a_compiler_that_fails_during_a_forward_raises():
    class Fails:
        each = 2

        def compile(self):
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        overlap._during(lambda: None, Fails(), [])


@pytest.fixture
def warming(monkeypatch):
    monkeypatch.setattr(warm_up, "_child", lambda *words: warm_up.main(*map(str, words)))
    monkeypatch.setattr(warm_up, "QUICK_PYTORCH", (("stories260k", 16, 140, 2),))
    monkeypatch.setattr(warm_up, "QUICK_PROGRAMS", (("stories260k", 16, 32, 1),))
    monkeypatch.setattr(warm_up, "QUICK_AFTER", 4)
    monkeypatch.setattr(warm_up, "QUICK_ENGINE_AFTER", 8)


@pytest.mark.soak
@pytest.mark.usefixtures("compiled_training")
def test_the_wait_for_a_compilation_is_no_part_of_a_micro_step(small, warming, tmp_path):
    result = Result(warm_up, tmp_path)
    fresh = result.rows["ML Programs stories260k 1x16 after an update, from 4 on"]
    assert fresh["by_step"][0] < 1e3 * COMPILING + fresh["by_step"][-1]


@pytest.mark.extended
@pytest.mark.usefixtures("compiled_training")
def test_the_first_micro_steps_have_rows(small, warming, tmp_path):
    result = Result(warm_up, tmp_path)
    for mark in ("micro-step 1", "micro-step 30", "from 136 on"):
        assert result.rows[f"PyTorch stories260k 1x16, {mark}"]["ours"] > 0
        assert result.rows[f"{ENGINE}, {mark}"]["ours"] > 0
    after = result.rows[f"{ENGINE} after the first update, from 7 on"]
    assert (after["steps"], after["processes"], len(after["by_step"])) == (8, 2, 8)
    assert "CPU engine's code was compiled by a process before" in result.text
    assert "CUDA engine" not in result.text
    programs = result.rows["ML Programs stories260k 1x16, from 25 on"]
    assert (programs["steps"], programs["n"], len(programs["by_step"])) == (32, 8, 32)
    fresh = result.rows["ML Programs stories260k 1x16 after an update, from 4 on"]
    assert (fresh["steps"], fresh["processes"]) == (4, 2)
    assert result.keys == {"warm-1", "warm-30", "warm-136"}
    ends = [row for row in result.record["rows"] if "steady_from" in row]
    # of an evaluator, in the process that trains and after an update
    assert result.verdicts("warm-136")[3:] == ["not applicable"] * 2
    for row in result.record["rows"]:  # as if PyTorch had been: too few micro-steps for an answer
        row["of"] = row["of"].replace("ML Programs", "PyTorch again")
    of_each = [f.verdict for f in warm_up.findings(result.record) if f.answers == ("warm-136",)]
    assert of_each[2:] == [
        "inconclusive" if row["steady_from"] is None else "quick run" for row in ends[2:]
    ]
    assert len(ends) == 5
    assert "study: from 136 on" in result.text


@pytest.mark.parametrize(
    ("times", "number"),
    [
        ([1.0] * 40, 1),
        ([1.5] + [1.0] * 39, 2),
        ([1.5] * 10 + [1.0] * 30, 11),
        ([1.0] * 20 + [9.0] + [1.0] * 19, 1),  # one interruption is none
        ([1.0 + 0.1 * (i < 35) for i in range(40)], None),
        ([2.0 - i / 40 for i in range(40)], None),
    ],
)
def test_steady_is_from_where_nothing_changes(times, number):
    assert warm_up.steady_from(times, warm_up.WITHIN) == number


def test_a_process_that_cannot_train_says_why():
    with pytest.raises(RunFailed, match="warm_up.*the process ended with 1"):
        warm_up._child("PyTorch", "cpu", "nothing", 16, 1, 0, 0)


def test_kernels_are_compiled_once_each_into_a_store_of_their_own(monkeypatch):
    sent = []

    class Child:
        def __init__(self, command):
            assert command[1:3] == ["-m", overlap_background.CHILD]
            assert os.environ["TRITON_CACHE_DIR"] != "before"

        def send(self, line):
            sent.append(line)

        def receive_within(self, seconds):
            return "null" if len(sent) % 2 else '"it does not fit"'

        def end(self):
            pass

    monkeypatch.setattr(overlap_background, "Child", Child)
    monkeypatch.setenv("TRITON_CACHE_DIR", "before")
    kernels = overlap_background.KernelCompilations(TINY, 16, torch.device("cuda", 0))
    needed = 1 + overlap.COMPILATIONS * (overlap.ROUNDS + overlap.ALONE_ROUNDS)
    for _ in range(needed):
        kernels.compile()
    kernels.close()
    assert len(set(sent)) == needed
    assert kernels.refused == needed // 2
    assert os.environ["TRITON_CACHE_DIR"] == "before"
