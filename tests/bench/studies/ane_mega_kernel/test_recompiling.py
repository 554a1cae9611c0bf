"""bench recompile and bench compile-budget, made small: rows, tables, what is refused."""

from __future__ import annotations

import shutil
import sys
import time

import pytest

from onelaunch.bench.core.children import run_child
from onelaunch.errors import RunFailed

pytest.importorskip("coremltools")

from onelaunch.bench.studies.ane_mega_kernel import program_training, recompile
from onelaunch.bench.studies.ane_mega_kernel.compile_budget import experiment as compile_budget
from onelaunch.engines.coreml import training
from tests.bench.records import record_of
from tests.engines.coreml.in_process import InProcess
from tests.engines.suite import SMALL


@pytest.fixture
def rows(monkeypatch, tmp_path):
    """Of the experiment, where a compilation takes a fifth of a second."""

    class Slow(InProcess):
        """Compiles once; then waits, as a compiler does that has a core of its own."""

        made = tmp_path / "made"

        def compile(self, weights, folder):
            if not self.made.exists():
                super().compile(weights, folder)
                shutil.copytree(folder, self.made)
            shutil.copytree(self.made, folder, dirs_exist_ok=True)
            time.sleep(0.2)
            return {"compilations": 2, "hits": 0}

    small = SMALL.with_(n_layers=1, vocab_size=512, max_seq_len=32)
    monkeypatch.setattr(program_training, "preset", lambda name: small)
    monkeypatch.setattr(training, "Compiler", Slow)
    monkeypatch.setattr(recompile, "QUICK_CASES", (("stories260k", 16, 2),))
    monkeypatch.setattr(recompile, "QUICK_FIRST_UPDATES", 5)
    monkeypatch.setattr(recompile, "QUICK_UPDATES", 2)
    return list(recompile.run("cpu", True, [].append))


@pytest.mark.soak
def test_less_than_k_waits(rows):
    half, _, twice = rows[-3:]
    assert half.ours > 0.05 > twice.ours
    assert half.notes["wait_share"] > twice.notes["wait_share"]


@pytest.mark.extended
def test_k_is_found(rows, tmp_path):
    count = len(recompile.KEYS) + 1
    published, measured = rows[:count], rows[count:]
    assert [row.notes["k"] for row in published] == [82, 334, 64, 125, 525, 25]
    assert [row.case for row in measured] == [f"stories260k 1x16, {k}" for k in ("K/2", "K", "2K")]
    half, whole, twice = measured
    assert half.notes["k"] == whole.notes["k"] // 2
    assert twice.notes["k"] == 2 * whole.notes["k"]
    text = recompile.table(record_of(recompile, rows, tmp_path))
    assert "| stories15M, whole " in text
    assert "| stories260k 1x16, K/2 " in text


@pytest.mark.parametrize(
    ("k", "least", "expected"),
    # hidden from `least` on; half of what is expected is not
    [(40, 38, 40), (40, 20, 20), (80, 20, 20), (40, 21, 30), (40, 45, 50), (10, 19, 22), (3, 1, 1)],
)
def test_k_settles_where_it_hides_and_half_does_not(k, least, expected):
    tried = []

    def waits(k):
        tried.append(k)
        return max(0.0, (least - k) / least)

    assert recompile.settled(k, waits) == expected
    assert expected >= least
    assert expected // 2 < least
    assert len(tried) <= 2 + recompile.LONGER + k.bit_length()


def test_k_does_not_grow_without_end():
    assert recompile.settled(8, lambda k: 0.5) == 8 + 2 + 3 + 4 + 5


@pytest.mark.extended
def test_compilations_are_counted_with_their_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(compile_budget, "QUICK_AGAIN", 4)
    monkeypatch.setattr(compile_budget, "QUICK_DISTINCT", 3)
    monkeypatch.setattr(compile_budget, "QUICK_LAYERS", (1,))
    monkeypatch.setattr(compile_budget, "QUICK_RESTARTS", 1)
    lines = []
    rows = list(compile_budget.run("cpu", True, lines.append))
    again, distinct, fresh, layers = rows
    assert (fresh.case, fresh.n) == ("a fresh process", 1)
    assert fresh.ours > 0
    assert (again.n, distinct.n) == (4, 3)
    for row in (again, distinct):
        assert row.notes["failures"] == 0
        assert row.ours > 0
        assert row.notes["bytes_after"] >= row.notes["bytes_before"] > 10**7
    assert layers.notes["weight_bytes"] > 14e6
    assert not layers.notes["refused"]
    text = compile_budget.table(record_of(compile_budget, rows, tmp_path))
    assert "| 4 compilations, new weights " in text
    assert "| 1 layers of 768/2048 in a program " in text


def test_a_process_that_ends_says_why():
    with pytest.raises(RunFailed, match="compile_budget.*the process ended with 1: KeyError"):
        run_child((sys.executable, "-m", compile_budget.CHILD, "nothing", "1"))
