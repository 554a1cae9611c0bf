"""The experiments on storing, the host, weights that change and terminals, made small: rows,
tables, findings, pictures, errors."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from onelaunch.bench.core.findings import above, below, standard_error, unless
from onelaunch.bench.studies.ane_mega_kernel import cpu_overhead, terminal_io
from onelaunch.bench.studies.ane_mega_kernel.cpu_overhead import cases as cpu_overhead_cases
from onelaunch.engines import cpu
from onelaunch.errors import MissingExtra, RunFailed

pytest.importorskip("coremltools")

from onelaunch.bench.studies.ane_mega_kernel import baked_or_argument, weight_mutability
from onelaunch.bench.studies.ane_mega_kernel.cache import experiment as cache
from onelaunch.bench.studies.ane_mega_kernel.cache import programs as cache_programs
from onelaunch.bench.studies.ane_mega_kernel.cache import views as cache_views
from tests.bench.records import record_of
from tests.interpreting import run_interpreted


def verdicts(module, record):
    return {key: f.verdict for f in module.findings(record) for key in f.answers}


# ---- cache


@pytest.mark.extended
def test_programs_are_kept_and_damage_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "MODEL", "stories260k")
    monkeypatch.setattr(cache, "QUICK_REPEATS", 1)
    monkeypatch.setattr(cpu, "why_not", lambda: "not in this test")
    lines = []
    rows = list(cache.run("cpu", True, lines.append))
    assert "without the CPU engine: not in this test" in lines
    record = record_of(cache, rows, tmp_path)
    by_what = {(row["kind"], row["what"]): row for row in record["rows"]}
    assert len(by_what) == len(rows) == 11
    assert all(row["as_expected"] for row in by_what.values())
    layer = {what: row for (kind, what), row in by_what.items() if kind == cache.LAYER}
    assert layer[cache_views.DAMAGED]["damaged"] == 1
    assert layer[cache_views.AT_ONCE]["compilations"] in (1, 2)
    assert layer[cache_views.SAME]["ours"] < layer[cache_views.EMPTY]["ours"]
    assert set(verdicts(cache, record).values()) == {"confirmed"}
    assert len(verdicts(cache, record)) == 4


def test_a_store_that_serves_the_wrong_program_refutes():
    row = {
        "kind": cache.LAYER,
        "what": cache_views.EMPTY,
        "ours": 1.0,
        "as_expected": True,
        "found": "",
    }
    wrong = row | {"what": cache_views.UPDATED, "as_expected": False}
    assert verdicts(cache, {"rows": [row, wrong]}) == {"cache-weights": "refuted"}


def test_the_cpu_engines_program_is_looked_up_in_the_store(monkeypatch, tmp_path):
    key = cache_programs.cpu_program.key()

    def compiled(log, store):
        if store.get(key) is None:
            store.put(key, b"code")

    monkeypatch.setattr(cache_programs, "compiled_program", compiled)
    monkeypatch.setattr(
        cache, "in_processes", lambda folder, *rest: [cache.Case(*rest[:2], 0).get(folder)]
    )
    rows = list(cache._cpu(2, quick=False))
    assert all(row.notes["as_expected"] for row in rows)
    assert [row.notes["compilations"] for row in rows] == [2, 0, 0, 1, 0, 1]


def test_a_process_that_ends_says_why(tmp_path):
    with pytest.raises(RunFailed, match="ended with 1: .*none"):
        cache_programs.in_processes(tmp_path, "none", cache.LAYER, [0])


def test_where_nothing_can_be_compiled_the_extra_is_named(monkeypatch):
    def missing(purpose):
        raise MissingExtra("coremltools", "coreml", purpose)

    monkeypatch.setattr(cache, "coremltools", missing)
    monkeypatch.setattr(cpu, "why_not", lambda: "no Numba")
    lines = []
    with pytest.raises(MissingExtra):
        list(cache.run("cpu", True, lines.append))
    assert len(lines) == 2


# ---- cpu-overhead


def test_what_the_host_takes(monkeypatch, tmp_path):
    for name, value in (("BUFFER_BYTES", 1000), ("ELEMENTS", 100), ("CALLS", 10), ("STEPS", 1)):
        monkeypatch.setattr(cpu_overhead_cases, name, value)
    monkeypatch.setattr(cpu_overhead, "QUICK_ROUNDS", 2)
    monkeypatch.setattr(cpu_overhead, "QUICK_STEP_ROUNDS", 2)
    monkeypatch.setattr(cpu_overhead, "_compiled_call", lambda log: {})
    threads = torch.get_num_threads()
    rows = list(cpu_overhead.run("cpu", True, lambda line: None))
    assert torch.get_num_threads() == threads
    assert all(row.ours > 0 and row.n == 2 and row.spread for row in rows)
    record = record_of(cpu_overhead, rows, tmp_path)
    by_key = verdicts(cpu_overhead, record)
    assert by_key.keys() == cpu_overhead.ANSWERS.keys()
    # what they are depends on the machine's other work; which time is which verdict: below
    assert {by_key["host-copies"], by_key["host-sums"]} <= {"confirmed", "refuted", "inconclusive"}
    assert "the loss asked for each step" in cpu_overhead.table(record)


@pytest.mark.parametrize(("ms", "verdict"), [(6.7, "confirmed"), (6.9, "refuted")])
def test_twice_a_published_time_is_the_most(ms, verdict):
    what, by = cpu_overhead.ANSWERS["host-copies"]
    row = {"what": what, "by": by, "ours": ms, "spread": [ms, ms], "n": 25}
    assert verdicts(cpu_overhead, {"rows": [row]}) == {"host-copies": verdict}


# ---- weight-mutability


@pytest.mark.extended
def test_which_weights_are_followed(monkeypatch, tmp_path):
    for name, value in (("COLUMNS", 64), ("OUT", 96), ("WIDTH", 32)):
        monkeypatch.setattr(weight_mutability, name, value)
    monkeypatch.setattr(weight_mutability, "QUICK_EVALUATIONS", 2)
    monkeypatch.setattr(weight_mutability, "QUICK_CONVERSIONS", 1)
    rows = list(weight_mutability.run("cpu", True, lambda line: None))
    record = record_of(weight_mutability, rows, tmp_path)
    by_case = {row["case"]: row for row in record["rows"]}
    refused = [case for case, row in by_case.items() if not row["converts"]]
    assert refused == [weight_mutability.views.LINEAR]
    assert "must be const" in by_case[weight_mutability.views.LINEAR]["refused"]
    still = [case for case, row in by_case.items() if row["converts"] and not row["follows"]]
    assert still == [weight_mutability.views.FILE]
    assert by_case[weight_mutability.views.FILE]["follows_loaded_anew"]
    # a public converter, and an evaluator: no word on a private parser
    keys = ("mutable-inputs", "mutable-packed", "mutable-matmul", "mutable-file")
    assert verdicts(weight_mutability, record) == dict.fromkeys(keys, "not applicable")


def on_a_gpu(case, **more):
    took = {"median": 0.5, "spread": [0.4, 0.6], "n": 5}
    row = {
        "case": case, "ours": 0.2, "spread": [0.1, 0.3], "by": "kernels", "converts": True,
        "follows": True, "compiled_anew": False, "change_ms": took, "convert_ms": took,
    }  # fmt: skip
    return row | more


def test_the_verdicts_of_a_gpus_ways():
    from onelaunch.bench.studies.ane_mega_kernel.weight_mutability import views

    rows = [
        on_a_gpu(views.ARGUMENTS),
        on_a_gpu(views.OTHERS, follows=False, follows_loaded_anew=True),
        on_a_gpu(views.CONSTEXPR, compiled_anew=True),
        on_a_gpu(views.EAGER),
    ]
    record = {"device": "a GPU", "rows": rows}
    expected = {"mutable-inputs": "refuted", "mutable-file": "confirmed"}
    assert verdicts(weight_mutability, record) == expected
    cells = {
        line.split(" |")[0].strip("| "): [cell.strip() for cell in line.split("|")][3]
        for line in weight_mutability.table(record).splitlines()
        if line.startswith("| ")
    }
    assert [cells[row["case"]] for row in rows] == ["yes", "captured anew", "compiled anew", "yes"]
    rows[0]["compiled_anew"] = rows[1]["follows"] = True
    expected = {"mutable-inputs": "confirmed", "mutable-file": "refuted"}
    assert verdicts(weight_mutability, record) == expected


@pytest.mark.extended
def test_a_gpus_ways_through_the_interpreter():
    run_interpreted(Path(__file__).with_name("interpreted_weight_mutability.py"))


# ---- baked-or-argument


@pytest.mark.extended
def test_constants_and_arguments_are_the_same_layer(monkeypatch, tmp_path):
    monkeypatch.setattr(baked_or_argument, "QUICK_MODELS", ("stories260k",))
    monkeypatch.setattr(baked_or_argument, "SEQUENCE", 16)
    monkeypatch.setattr(baked_or_argument, "QUICK_ROUNDS", 3)
    monkeypatch.setattr(baked_or_argument, "QUICK_UPDATES", 1)
    monkeypatch.setattr(baked_or_argument, "QUICK_CHECKED", (1,))
    rows = list(baked_or_argument.run("cpu", True, lambda line: None))
    record = record_of(baked_or_argument, rows, tmp_path)
    assert len(rows) == 10
    (finding,) = baked_or_argument.findings(record)
    assert (finding.verdict, finding.why.split(":")[0]) == ("not applicable", "needs a Mac")
    updates = {r["form"]: r["ours"] for r in record["rows"] if r["what"] == "update"}
    assert updates["constants"] > updates["arguments"]


@pytest.mark.parametrize(
    ("spread", "n"), [((0.001, 0.003), 150), ((0.0, 0.003), None), ((-0.001, 0.003), None)]
)
def test_constants_overtake_where_their_step_is_shorter(spread, n):
    def row(what, form, ours):
        return {"model": "m", "what": what, "form": form, "ours": ours, "spread": spread}

    rows = [
        row("update", "constants", 0.301), row("update", "arguments", 0.001),
        row("saved", None, 0.002),
    ]  # fmt: skip
    assert baked_or_argument.overtakes({"rows": rows}, "m") == n


# ---- terminal-io


@pytest.mark.extended
def test_lines_to_every_output(monkeypatch, tmp_path):
    monkeypatch.setattr(terminal_io, "QUICK_SLOW_BLOCKS", 1)
    monkeypatch.setattr(terminal_io, "QUICK_BLOCKS", 1)
    monkeypatch.setattr(terminal_io, "QUICK_SECONDS", 0.02)
    monkeypatch.setattr(terminal_io, "QUICK_NAIVE_UPDATES", 3)
    rows = terminal_io.run("cpu", True, lambda line: None)
    kinds = [row.case.removeprefix("small 4x32 ") for row in rows]
    assert kinds == ["slow terminal", "fast terminal", "pipe", "file"]
    record = record_of(terminal_io, rows, tmp_path)
    answered = [finding.answers for finding in terminal_io.findings(record)]
    assert answered == [("terminal-file",), ("terminal-slow",), ("terminal-slow",)]


@pytest.mark.parametrize(
    ("step", "times", "cost", "expected"),
    [
        (5.0, 2.0, 0.029, ["confirmed", "confirmed"]),
        (5.0, 1.9, 0.03, ["refuted", "refuted"]),
        (50.0, 1.0, 0.0, ["not applicable", "confirmed"]),
    ],
)
def test_what_a_slow_terminal_may_cost(step, times, cost, expected):
    row = {
        "case": "small 4x32 slow terminal", "times_naive": times, "cost_of_display": cost,
        "cost_spread": [cost, cost], "n": 9, "terminal_bytes_per_second": 4000,
        "peers": {"unwatched": step, "a line each update": step * times},
    }  # fmt: skip
    assert [f.verdict for f in terminal_io.findings({"rows": [row]})] == expected


def test_what_noise_may_hide_has_no_verdict():
    """Medians of normal samples: their standard error is estimated, and a verdict needs two of them
    between a median and a bar."""
    draws = np.random.default_rng(1).normal(size=(4000, 25))
    errors = [standard_error(list(np.percentile(each, (20, 80))), 25) for each in draws]
    assert np.median(errors) == pytest.approx(np.median(draws, axis=1).std(), rel=0.1)
    assert [below(v, 3, 1) for v in (0.9, 1.1, 4.9, 5.1)] == [
        "confirmed", "inconclusive", "inconclusive", "refuted",
    ]  # fmt: skip
    assert [above(v, 3, 1) for v in (0.9, 1.1, 5.1)] == ["refuted", "inconclusive", "confirmed"]
    assert below(0, 3, standard_error(None, 1)) == "inconclusive"
    assert unless("refuted") == unless("not applicable") == "" != unless("inconclusive")


def test_a_pipe_and_a_file_take_lines():

    for output in (terminal_io.pipe, terminal_io.file):
        with output() as descriptor:
            assert os.write(descriptor, b"line\n" * 50_000) == 250_000
