"""cache and compile-budget on a GPU without one: Triton's own store for a device that is absent,
processes that end in every way, rows, tables, findings."""

from __future__ import annotations

import hashlib
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from onelaunch.bench.core import triton_store
from onelaunch.bench.core.children import Ended, together
from onelaunch.bench.studies.ane_mega_kernel.cache import cuda as cache_cuda
from onelaunch.bench.studies.ane_mega_kernel.cache import experiment as cache
from onelaunch.bench.studies.ane_mega_kernel.cache import views
from onelaunch.bench.studies.ane_mega_kernel.compile_budget import experiment as compile_budget
from onelaunch.errors import RunFailed
from onelaunch.operators.rms_norm import launch
from onelaunch.operators.triton_cache import verified
from tests.bench.records import record_of
from tests.compiling import absent
from tests.interpreting import run_interpreted

KERNELS = (1, 2)


@pytest.mark.extended
def test_the_children_through_the_interpreter():
    run_interpreted(Path(__file__).with_name("interpreted_kernels_kept.py"))


# ---- cache


@pytest.fixture
def number_kernel(monkeypatch):
    """A kernel that is compiled, for a GPU that is not there."""
    pytest.importorskip("triton")
    if launch.INTERPRETED:
        pytest.skip("Triton interprets in this process (TRITON_INTERPRET), so it compiles nothing")
    from triton.runtime import driver

    from onelaunch.bench.studies.ane_mega_kernel.compile_budget.cuda_child import number_kernel

    monkeypatch.setattr(driver, "_active", absent("sm_90"))
    yield number_kernel
    number_kernel.device_caches.clear()


@pytest.fixture
def processes(number_kernel, monkeypatch):
    """In their place: Triton compiles or reads two kernels, having forgotten those it had. Logits
    are the kernels' bits and the seed; a kernel that is cut off cannot be loaded."""
    target = torch.zeros(1, dtype=torch.int32)
    sizes = {}

    def engine(seed):
        with triton_store.counting() as counts, stand_in.store:
            kernels = [number_kernel.warmup(target, NUMBER=n, grid=(1,)) for n in KERNELS]
        code = [kernel.asm["cubin"] for kernel in kernels]
        error = any(
            len(c) < sizes.setdefault(n, len(c)) for n, c in zip(KERNELS, code, strict=True)
        )
        return {
            "seconds": 0.1 + counts.compilations, "compilations": counts.compilations,
            "hits": counts.hits, "digest": hashlib.sha256(b"".join(code) + seed).hexdigest(),
            "apart": 0.01, "error": "RuntimeError: no kernel image" if error else "",
        }  # fmt: skip

    def stand_in(commands, env, timeout):
        ended = []
        for command, each in zip(commands, env, strict=True):
            number_kernel.device_caches.clear()
            monkeypatch.setenv("TRITON_CACHE_DIR", each["TRITON_CACHE_DIR"])
            seeds = command[len(cache_cuda.CHILD) + 2 :]
            ended.append(Ended([engine(seed.encode()) for seed in seeds], "", 1.0))
        return ended

    stand_in.store = verified
    monkeypatch.setattr(cache_cuda, "together", stand_in)
    return stand_in


@pytest.mark.parametrize("verifies", [True, False])
def test_kernels_are_kept_and_damage_is_a_row(processes, tmp_path, verifies):
    processes.store = verified if verifies else nullcontext()
    rows = list(cache.run("cuda", False, lambda line: None))
    record = record_of(cache, rows, tmp_path)
    text = cache.table(record)
    by_what = {row["what"]: row for row in record["rows"]}
    right = [
        views.EMPTY, views.SAME, views.UPDATED, views.OTHER, views.OTHER_UPDATED, views.AT_ONCE,
    ]  # fmt: skip
    assert list(by_what) == [*right, views.CUT]
    as_expected = [*right, views.CUT] if verifies else right
    assert [what for what, row in by_what.items() if row["as_expected"]] == as_expected
    counts = {what: (row["n"], row["found"].split(";")[0]) for what, row in by_what.items()}
    assert counts[views.EMPTY] == (2, "0 read, 4 compiled")
    assert counts[views.SAME] == counts[views.UPDATED] == (1, "0 read, 0 compiled")
    assert counts[views.OTHER] == (2, "4 read, 0 compiled")
    assert by_what[views.AT_ONCE]["found"].endswith("2 kept; a third process: 2 read, 0 compiled")
    if verifies:
        assert counts[views.CUT] == (1, "1 read, 1 compiled")
        assert by_what[views.CUT]["found"].endswith("whole again")
        assert " bytes: the same logits" in text
    else:
        assert counts[views.CUT] == (1, "2 read, 0 compiled, 1 of 1 failed")
        assert by_what[views.CUT]["found"].endswith("damaged still")
        assert " bytes: RuntimeError: no kernel image" in text
    verdicts = {key: f.verdict for f in cache.findings(record) for key in f.answers or [""]}
    assert verdicts == {
        "cache-key": "confirmed", "cache-weight-free": "confirmed",
        "": "confirmed" if verifies else "refuted",
        "cache-exists": "not applicable", "cache-weights": "not applicable",
    }  # fmt: skip


def test_a_process_that_died_is_a_row(processes, monkeypatch):
    def died(commands, env, timeout):
        alive = not env[0]["TRITON_CACHE_DIR"].endswith("copy/triton")
        return processes(commands, env, timeout) if alive else [Ended(None, "ended by SIGSEGV", 2)]

    monkeypatch.setattr(cache_cuda, "together", died)
    *_, cut = cache.run("cuda", True, lambda line: None)
    assert (cut.ours, cut.n, cut.notes["failed"]) == (2, 1, 1)
    assert cut.notes["outcomes"][0].endswith(" bytes: the process ended by SIGSEGV")


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"error": "no device"}, "nothing damaged: no device"),
        ({"apart": 0.3}, "logits 30.00% from PyTorch's"),
        ({"apart": None}, "logits that are no numbers"),
        ({"compilations": 0}, "compiled nothing"),
    ],
)
def test_where_the_first_process_fails_there_is_no_row(other, reason):
    result = {"compilations": 2, "hits": 0, "digest": "a", "apart": 0.01, "error": ""}
    with pytest.raises(RunFailed, match=reason):
        cache_cuda._read([result | other] * 3)


def test_processes_end_in_every_way():
    begin = "import os, sys, time; print('noise'); print('ready', flush=True); sys.stdin.readline()"
    programs = [
        f"{begin}; print('more'); print([1, 2])",
        f"{begin}; os.kill(os.getpid(), 11)",
        f"{begin}; time.sleep(60)",
        f"{begin}; raise ValueError('of its own')",
        "raise SystemExit('before it was ready')",
    ]
    ended = together([[sys.executable, "-c", each] for each in programs], timeout=1.0)
    assert [each.output for each in ended] == [[1, 2], None, None, None, None]
    assert [each.reason for each in ended] == [
        "", "ended by SIGSEGV", "killed after 1 s", "ended with 1: ValueError: of its own",
        "ended with 1: before it was ready",
    ]  # fmt: skip


# ---- compile-budget


@pytest.mark.parametrize("quick", [True, False])
def test_what_many_kernels_take(quick, monkeypatch, tmp_path):
    def child(command, env):
        assert env["TRITON_CACHE_DIR"] != env["ONELAUNCH_CACHE"]
        module, what, number, device = command[2:]
        assert module == compile_budget.GPU_CHILD
        assert device == "cuda:0"
        if what == "restart":
            return {"until_first": 3.0, "second": 0.5}
        if what == "layers":
            return {
                "seconds": 4.0, "refused": "", "weight_bytes": int(number) * 14_155_776,
                "operations": 2 + 5 * int(number), "apart_from_pytorch": 0.012,
            }  # fmt: skip
        count = int(number)
        return {
            "seconds": [0.2] * count, "bytes": [1000 * n for n in range(count)],
            "bytes_before": 0, "failures": 0, "compilations": count if what == "distinct" else 0,
            "gpu_bytes": [2000 * (n + 1) for n in range(count)], "gpu_bytes_before": 0,
        }  # fmt: skip

    monkeypatch.setattr(compile_budget, "run_child", child)
    rows = list(compile_budget.run("cuda:0", quick, lambda line: None))
    record = record_of(compile_budget, rows, tmp_path)
    by_key = {key: each for each in compile_budget.findings(record) for key in each.answers}
    assert {key: each.verdict for key, each in by_key.items()} == {
        "budget-312": "not applicable", "budget-252": "not applicable",
        "budget-150": "quick run" if quick else "confirmed",
        "budget-restart": "confirmed", "sram": "confirmed",
    }  # fmt: skip
    assert "new weights: 0 compiled, none failed" in by_key["budget-312"].ours
    assert "+1.0 kB each, +2.0 kB on the GPU" in by_key["budget-150"].why
    assert by_key["sram"].ours == ("170 MB" if quick else "1,359 MB")
    layers = f"| {12 if quick else 96} layers of 768/2048 in a launch "
    assert layers in compile_budget.table(record)
    pytest.importorskip("matplotlib")
    figure = compile_budget.draw(record)
    assert len(figure.axes[0].lines) == 4
