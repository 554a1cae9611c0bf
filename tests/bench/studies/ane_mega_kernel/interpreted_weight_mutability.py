"""weight-mutability's ways of a GPU without one, through Triton's interpreter, their times made up.
Run by test_system_experiments.py in a process of its own."""

from __future__ import annotations

import os
import sys

assert "triton" not in sys.modules, "too late: Triton was imported before this"
os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

from onelaunch.bench.studies.ane_mega_kernel.weight_mutability import cuda, views  # noqa: E402
from onelaunch.engines.cuda.program import BoundForward  # noqa: E402
from onelaunch.errors import RunFailed  # noqa: E402
from tests.engines.suite import SMALL  # noqa: E402
from tests.interpreting import mend_loop_bounds  # noqa: E402

mend_loop_bounds()
CPU = torch.device("cpu")


class Replayed:
    """In a CUDA graph's place."""

    def __init__(self, run) -> None:
        self.replay = run


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(cuda, "preset", lambda name: SMALL)
    monkeypatch.setattr(views, "TOKENS", 8)
    monkeypatch.setattr(cuda, "DTYPE", torch.float32)
    monkeypatch.setattr(cuda, "SIZE", 2 * cuda.BLOCK)
    monkeypatch.setattr(cuda, "QUICK_CHANGES", 1)
    monkeypatch.setattr(cuda, "calls", lambda run: lambda: 30.0)
    monkeypatch.setattr(cuda, "replays", lambda graph, owner: lambda: 20.0)
    monkeypatch.setattr(cuda, "_compiled", lambda x, y, scale: object())
    monkeypatch.setattr(BoundForward, "captured", lambda bound: Replayed(bound.run))


def test_which_ways_follow():
    rows = {row.case: row for row in cuda.rows(CPU, True)}
    follows = {case: row.notes["follows"] for case, row in rows.items()}
    assert follows == {
        views.ARGUMENTS: True, views.OTHERS: False, views.CONSTEXPR: True, views.EAGER: True,
    }  # fmt: skip
    assert rows[views.OTHERS].notes["follows_loaded_anew"]
    assert [case for case, row in rows.items() if row.notes["compiled_anew"]] == [views.CONSTEXPR]
    assert all(row.notes["error"] < 1e-5 for row in rows.values())
    assert rows[views.ARGUMENTS].ours == 0.02
    record = {"device": "here", "rows": [row.to_dict() for row in rows.values()]}
    assert [f.verdict for f in views.findings(record)] == ["refuted", "confirmed"]
    assert views.table(record).isascii()


def test_old_weights_do_not_follow():
    forward = cuda._Forward(CPU)
    packed = forward.pack(0)
    bound = forward.bind(packed)
    _, error = cuda._followed(
        forward, lambda which: None, lambda: cuda._replayed(bound, bound.captured()), 1
    )
    assert error > 1
    assert not cuda._notes("nobody", error)["follows"]
    nothing = torch.full((8, SMALL.vocab_size), torch.nan)
    _, error = cuda._followed(forward, lambda which: None, lambda: nothing, 1)
    assert not cuda._notes("nobody", error)["follows"]


def test_a_graph_of_other_weights_is_no_result(monkeypatch):
    monkeypatch.setattr(
        BoundForward, "captured", lambda bound: Replayed(lambda: bound.buffers.logits.zero_())
    )
    with pytest.raises(RunFailed, match="neither"):
        cuda._other_buffers(cuda._Forward(CPU), 1)
