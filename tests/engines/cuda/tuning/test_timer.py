"""How a form is timed, and what is compiled for which shape. Nothing runs."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from onelaunch.config import preset
from onelaunch.engines.cuda.blocking import Limits, default
from onelaunch.engines.cuda.forms import Form
from onelaunch.engines.cuda.pack import pack
from onelaunch.engines.cuda.program import Shape
from onelaunch.engines.cuda.tuning import timer
from onelaunch.engines.cuda.tuning.search import Job
from onelaunch.errors import RunFailed
from onelaunch.operators.rms_norm import launch
from tests.compiling import absent

CONFIG = preset("stories15m")
PACKED = SimpleNamespace(
    embedding=SimpleNamespace(device=torch.device("cuda", 1), dtype=torch.bfloat16)
)


@pytest.fixture
def made_up(monkeypatch):
    """A timer and a compiler that are made up; what they were given is in the list."""
    given = []

    class Made:
        def __init__(self, *how):
            given.append(how)

        def __call__(self, subject):
            return 100.0 if getattr(subject, "name", "") == "staged" else 120.0

    for name in ("Timer", "Compiler"):
        monkeypatch.setattr(timer, name, Made)
    monkeypatch.setattr(timer, "limits_of", lambda device: Limits(4))
    return given


def test_a_choice_is_measured_at_its_own_size(made_up):
    choice = timer.tune(CONFIG, PACKED, 3, 200)
    assert choice.form == "staged"
    (_, _, sequence, _), (_, _, shape) = made_up
    assert sequence == 256
    assert (shape.batch, shape.sequence, shape.logits_dtype) == (4, 256, torch.bfloat16)


@pytest.mark.extended
def test_kernels_are_compiled_several_at_a_time(monkeypatch):
    """For sm_90, without a GPU: what was compiled is found, and what fails to is left out."""
    triton = pytest.importorskip("triton")
    if launch.INTERPRETED:
        pytest.skip("Triton interprets in this process (TRITON_INTERPRET), so it compiles nothing")
    from triton.runtime import driver

    from onelaunch.engines.cuda.program import BoundForward, FusedForward

    monkeypatch.setattr(driver, "_active", absent("sm_90"))
    config = preset("stories260k").with_(n_layers=2)
    zeros = {n: torch.zeros(s, dtype=torch.bfloat16) for n, s in config.weight_shapes().items()}
    packed = pack(config, zeros, torch.bfloat16, torch.device("cpu"))
    rule = default(config, 64, 2)
    wide = replace(rule["gate_up"], columns=64)
    broken = replace(rule["head"], rows=24, tma=False)  # no power of two
    jobs = [
        Job(Form("staged", rule)),
        Job(Form("staged", rule | {"gate_up": wide}), "gate_up"),
        Job(Form("staged", rule | {"head": broken}), "head"),
        Job(Form("staged", rule | {"head": replace(broken, tma=True)}), "head"),  # cannot be bound
        Job(Form("all", {}, 4)),
    ]
    heard = []
    timer.Compiler(config, packed, 64, lambda *how: heard.append(how))(jobs)
    assert heard[-1] == ("compiling kernels", 10, 10)
    compiled = []
    monkeypatch.setattr(
        triton.runtime.jit.JITFunction, "_do_compile", lambda *given: compiled.append(given)
    )
    shape = Shape(2, 64, True, torch.bfloat16)  # of two texts
    bound = BoundForward(config, packed, shape, {"gate_up": wide})
    fused = FusedForward(config, packed, shape, {}, 1, 4)
    for call in (*bound.calls, *fused.calls):
        call.compile()
    assert compiled == []
    BoundForward(config, packed, shape, {"head": broken}).calls[-1].compile()
    assert len(compiled) == 1, "what failed is tried again where it is timed"


@pytest.mark.extended
def test_an_interrupt_leaves_out_what_is_not_begun(monkeypatch):
    pytest.importorskip("triton")
    if launch.INTERPRETED:
        pytest.skip("Triton interprets in this process (TRITON_INTERPRET), so it compiles nothing")
    from triton.runtime import driver

    monkeypatch.setattr(driver, "_active", absent("sm_90"))
    monkeypatch.setattr(timer, "usable_cores", lambda: 1)
    config = preset("stories260k").with_(n_layers=1)
    zeros = {n: torch.zeros(s, dtype=torch.bfloat16) for n, s in config.weight_shapes().items()}
    packed = pack(config, zeros, torch.bfloat16, torch.device("cpu"))

    asked_for = threading.Event()

    class Held(timer._Counting):
        def submit(self, fn, /, *args, **kwargs):
            return super().submit(lambda: asked_for.wait(60) and fn(*args, **kwargs))

    monkeypatch.setattr(timer, "_Counting", Held)

    def jobs():
        for columns in (16, 32, 64, 128):
            wide = replace(default(config, 64, 2)["gate_up"], rows=16, columns=columns, warps=2)
            yield Job(Form("staged", {"gate_up": wide}), "gate_up")
        asked_for.set()
        raise KeyboardInterrupt

    heard = []
    with pytest.raises(KeyboardInterrupt):
        timer.Compiler(config, packed, 64, lambda *how: heard.append(how))(jobs())
    compiled = []
    monkeypatch.setattr(
        "triton.runtime.jit.JITFunction._do_compile", lambda *how: compiled.append(how)
    )
    timer.Compiler(config, packed, 64, lambda *how: None)(list(jobs_before_the_interrupt(jobs)))
    assert compiled, "some were not begun"


def jobs_before_the_interrupt(jobs):
    try:
        yield from jobs()
    except KeyboardInterrupt:
        return


@pytest.fixture
def timed():
    packed = SimpleNamespace(embedding=torch.empty(2, 2))
    return timer.Timer(CONFIG, packed, Shape(2, 300))


def test_a_timer_says_inf_for_what_does_not_run(timed, monkeypatch):
    monkeypatch.setattr(timed, "_median", lambda candidate: candidate)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert timed(3.0) == 3.0
    assert timed._least == 3.0

    def fails(candidate):
        raise RuntimeError("too many blocks")

    monkeypatch.setattr(timed, "_median", fails)
    assert timed(3.0) == float("inf")


def test_where_nothing_runs_any_more_nothing_is_chosen(timed, monkeypatch):
    def fails(candidate):
        raise RuntimeError("an illegal address")

    def broken(device):
        raise RuntimeError("still an illegal address")

    monkeypatch.setattr(timed, "_median", fails)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(RunFailed, match=r"all broke the device: RuntimeError: an illegal address"):
        timed(Form("all", {}))

    def full(candidate):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(timed, "_median", full)
    with pytest.raises(RunFailed, match="no memory"):
        timed(Form("all", {}))


def test_wrong_logits_are_no_candidates(timed):
    rule = torch.randn(200, 7)
    timed._compare(rule)
    timed._compare(rule * 1.01)
    for wrong in (rule * 1.2, rule.where(rule != rule[3, 3], float("nan"))):
        with pytest.raises(RunFailed, match="from the rule's"):
            timed._compare(wrong)
    assert timed._every == 3
