"""The CUDA engine's own logic with made-up forms on the CPU: shapes, choices, turns. The forms are
tested through the interpreter and on a GPU."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from onelaunch.compilation.cache import Store
from onelaunch.engines.choice import automatic, choose
from onelaunch.engines.cuda import engine as engine_module
from onelaunch.engines.cuda import timer, why_not
from onelaunch.engines.cuda.blocking import default
from onelaunch.engines.cuda.choice import Choice, facts_of, keep
from onelaunch.engines.cuda.chooser import Chooser
from onelaunch.engines.cuda.engine import CudaEngine
from onelaunch.engines.cuda.turns import LOADING, Turns
from onelaunch.engines.engine import Sampling
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.errors import BadInput, EngineTimeout, RunFailed
from onelaunch.generation.decode import generate_ids
from tests.engines.suite import SMALL, weights_of

DEVICE = {"device": "made up", "multiprocessors": 4, "torch": "2", "triton": "3"}
CPU = torch.device("cpu")
BYTES_PER_ROW = 100
CHOICE = Choice(
    "all", default(SMALL, 16, 2), 4, {"rule": 9.0, "staged": 8.0, "all": 5.0}, 1.5, 7, "today"
)


class Form:
    """Gives the tokens back as logits, and writes down what happens to it."""

    made: list[Form]
    alive: list[weakref.ref]
    timeout = False
    fails: dict[tuple[str, str], Exception]
    """By depth, and what is done with it."""

    def __init__(self, config, packed, shape, blockings, depth="stage", programs=None, patience=0):
        rows = shape.batch * shape.sequence
        self.shape, self.depth, self.programs = shape, str(depth), programs
        self.fail("bind")
        self.buffers = SimpleNamespace(x=SimpleNamespace(device=torch.device("cuda", 0)))
        self.n_bytes = rows * BYTES_PER_ROW
        self.events: list[str] = []
        Form.made.append(self)

    def fail(self, how):
        if (self.depth, how) in Form.fails:
            raise Form.fails[self.depth, how]

    def _compute(self, how, ids, logits):
        assert not torch.is_inference_mode_enabled()
        assert LOADING.locked() == (how == "run")
        assert ids.dtype == torch.int64
        self.fail(how)
        self.events.append(how)
        logits.copy_(ids[:, None])

    def launch(self, ids, logits):
        self._compute("run", ids, logits)

    def ask(self):
        assert self.events[-1] in ("run", "replay")

    def told(self, wait):
        assert not wait
        if Form.timeout:
            Form.timeout = False
            raise EngineTimeout("the forward was given up")


class Replayed:
    def __init__(self, form):
        assert LOADING.locked()
        form.fail("capture")
        form.events.append("captured")
        self.form, self.prepared = form, set()

    def prepare(self, logits):
        assert LOADING.locked()
        self.prepared.add(logits.dtype)

    def is_prepared(self, dtype):
        return dtype in self.prepared

    def __call__(self, ids, logits):
        assert logits.dtype in self.prepared
        self.form._compute("replay", ids, logits)


@pytest.fixture(autouse=True)
def _made_up(monkeypatch):
    Form.made, Form.timeout, Form.fails = [], False, {}
    monkeypatch.setattr(engine_module, "why_not", lambda device, config: None)
    for module in (engine_module, timer):
        monkeypatch.setattr(module, "BoundForward", Form)
        monkeypatch.setattr(module, "FusedForward", Form)
    monkeypatch.setattr(engine_module, "Replay", Replayed)
    monkeypatch.setattr(timer, "device_facts", lambda device: DEVICE)
    monkeypatch.setattr(engine_module, "choose", no_choice)


def no_choice(config, dtype, device, batch, sequence, store, cancelled, used):
    raise RunFailed("nothing is measured here")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def make(store, **options):
    return CudaEngine(SMALL, weights_of(SMALL), "cpu", store=store, **options)


def tokens_of(batch, sequence):
    return torch.arange(batch * sequence).view(batch, sequence) % SMALL.vocab_size


def answers(engine, batch, sequence):
    tokens = tokens_of(batch, sequence)
    got = engine.logits(tokens)
    assert got.dtype == torch.float32
    assert torch.equal(got, tokens[:, :, None].float().expand(batch, sequence, SMALL.vocab_size))
    return got


def test_a_shape_is_launched_first_and_replayed_from_its_second_use(store):
    engine = make(store)
    results = [answers(engine, 2, 5) for _ in range(4)]
    assert len({r.data_ptr() for r in results}) == 4, "a result is the caller's own"
    (form,) = Form.made
    assert form.events == ["run", "captured", "replay", "replay", "replay"]
    assert form.shape.logits_dtype == engine.dtype == torch.bfloat16
    answers(engine, 1, 5)
    assert Form.made[1].events == ["run"]


@pytest.mark.parametrize("uses", [1, 3])
def test_logits_in_the_engines_own_dtype(store, uses):
    engine, tokens = make(store), tokens_of(2, 5)
    for _ in range(uses):
        narrow = engine.logits(tokens, torch.bfloat16)
        wide = engine.logits(tokens)
    assert (narrow.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(narrow.float(), wide)
    assert engine.logits(tokens_of(65, 2), torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(BadInput, match=r"dtype=torch.float16: .* torch.float32 or .*bfloat16"):
        engine.logits(tokens, torch.float16)


def test_a_result_is_not_changed_by_later_calls(store):
    engine = make(store)
    tokens = [(tokens_of(2, 5) + i) % SMALL.vocab_size for i in range(10)]
    results = [engine.logits(each) for each in tokens]
    for each, result in zip(tokens, results, strict=True):
        assert torch.equal(result, each[:, :, None].float().expand_as(result))


def test_ids_of_any_integer_dtype_and_layout(store):
    engine, tokens = make(store), tokens_of(4, 6)
    expected = engine.logits(tokens)
    assert torch.equal(engine.logits(tokens.to(torch.int32)), expected)
    assert torch.equal(engine.logits(tokens.T.contiguous().T), expected)


@pytest.mark.parametrize("bad", [-1, SMALL.vocab_size])
def test_ids_on_the_host_are_checked_at_once(store, bad):
    tokens = tokens_of(2, 5)
    tokens[1, 2] = bad
    with pytest.raises(BadInput, match=f"id {bad} is outside the model's vocabulary"):
        make(store).logits(tokens)
    assert Form.made == []


@pytest.mark.parametrize("how", ["logits", "describe"])
def test_a_bad_id_that_a_kernel_met_is_told_once_afterwards(store, how):
    engine = make(store)
    answers(engine, 1, 4)
    engine._packed.bad_id[0] = 99
    with pytest.raises(BadInput, match="the tokens of an earlier call: id 99 is outside"):
        engine.describe() if how == "describe" else engine.logits(tokens_of(1, 4))
    answers(engine, 1, 4)
    engine.describe()


def test_it_works_in_anybodys_inference_mode(store):
    engine = make(store)
    with torch.inference_mode():
        answers(engine, 1, 4)
    answers(engine, 1, 4)
    with torch.inference_mode():
        answers(engine, 1, 4)
    assert Form.made[0].events == ["run", "captured", "replay", "replay"]


def test_the_least_recently_used_shapes_go(store, monkeypatch):
    monkeypatch.setattr(engine_module, "MAX_FORMS", 3)
    engine = make(store)
    for sequence in (1, 2, 3, 1, 4, 1, 2):
        answers(engine, 1, sequence)
    assert list(engine.describe()["forms"]) == ["1x4", "1x1", "1x2"]
    assert [form.shape.sequence for form in Form.made] == [1, 2, 3, 4, 2]


def test_buffers_are_bounded_and_the_latest_always_has_its_own(store, monkeypatch):
    monkeypatch.setattr(engine_module, "MAX_FORM_BYTES", 10 * BYTES_PER_ROW)
    engine = make(store)
    for sequence in (4, 5, 2):
        answers(engine, 1, sequence)
    assert list(engine.describe()["forms"]) == ["1x5", "1x2"]
    answers(engine, 1, 20)
    assert list(engine.describe()["forms"]) == ["1x20"]
    answers(engine, 1, 1)
    assert list(engine.describe()["forms"]) == ["1x1"]


def test_a_stored_choice_is_used_at_once(store):
    lines = []
    keep(store, facts_of(SMALL, "bfloat16", 1, 16, DEVICE), CHOICE)
    engine = make(store, say=lines.append)
    answers(engine, 1, 9)
    answers(engine, 1, 16)
    assert [(f.depth, f.programs) for f in Form.made] == [("all", 4)] * 2
    about = {"form": "all", "programs": 4, "us": CHOICE.us}
    assert engine.describe()["forms"] == {"1x9": about, "1x16": about}
    assert lines == []
    answers(make(store, dtype="float16"), 1, 9)
    assert Form.made[-1].depth == "stage", "another dtype, another choice"


def test_a_choice_is_measured_in_the_background_and_then_used(store, monkeypatch):
    may_end, asked, lines = threading.Event(), [], []

    def slowly(config, dtype, device, batch, sequence, store, cancelled, used):
        asked.append((batch, sequence))
        assert may_end.wait(30)
        keep(store, facts_of(config, "bfloat16", batch, sequence, DEVICE), CHOICE)
        return CHOICE

    monkeypatch.setattr(engine_module, "choose", slowly)
    engine = make(store, say=lines.append)
    for sequence in (9, 16, 9, 12):
        answers(engine, 1, sequence)
    assert not engine.wait(0.05)
    assert {form.depth for form in Form.made} == {"stage"}
    assert engine.describe()["forms"]["1x9"] == {"form": "staged"}
    may_end.set()
    assert engine.wait(30)
    assert engine.describe()["forms"] == {}, "the forms by rule are gone"
    before = len(Form.made)
    answers(engine, 1, 9)
    answers(engine, 1, 12)
    assert [form.depth for form in Form.made[before:]] == ["all", "all"]
    assert asked == [(1, 9)], "once for all lengths up to 16"
    assert lines == [
        "measuring forms and tiles for 1x16 tokens in the background, once",
        "1x16 tokens: fusion depth all, 5.0 us (9.0 before); measured in 2 s",
    ]
    answers(make(store), 1, 16)
    assert Form.made[-1].depth == "all"


def test_what_cannot_be_measured_is_told_once_and_the_rule_goes_on(store):
    lines = []
    engine = make(store, say=lines.append)
    for _ in range(3):
        answers(engine, 1, 9)
        assert engine.wait(30)
    assert lines[1:] == ["1x16: nothing chosen (nothing is measured here)"]
    about = {"form": "staged", "failed": "nothing is measured here"}
    assert engine.describe()["forms"] == {"1x9": about}
    assert {form.depth for form in Form.made} == {"stage"}


@pytest.mark.parametrize("where", ["bind", "run", "replay"])
def test_a_measured_form_that_fails_is_given_up_for_one_launch_a_stage(store, where):
    lines = []
    keep(store, facts_of(SMALL, "bfloat16", 1, 16, DEVICE), CHOICE)
    engine = make(store, say=lines.append)
    if where == "replay":
        answers(engine, 1, 12)
        answers(engine, 1, 9)
    Form.fails["all", where] = RuntimeError("out of resources\nmore of it")
    for sequence in (9, 9, 9, 12):
        answers(engine, 1, sequence)
    assert [(f.depth, f.shape.sequence) for f in Form.made][-2:] == [("stage", 9), ("stage", 12)]
    why = "RuntimeError: out of resources"
    assert lines == [f"1x16 tokens: the measured form fails ({why}); one launch a stage"]
    about = {"form": "staged", "failed": why}
    assert engine.describe()["forms"] == {"1x9": about, "1x12": about}
    assert engine.wait(0), "nor is it measured again"
    Form.fails.clear()
    answers(make(store), 1, 9)
    assert Form.made[-1].depth == "all", "another engine tries it"


@pytest.mark.parametrize("error", [BadInput("too long"), EngineTimeout("given up")])
def test_what_is_no_fault_of_a_measured_form_is_raised(store, error):
    keep(store, facts_of(SMALL, "bfloat16", 1, 16, DEVICE), CHOICE)
    engine = make(store)
    Form.fails["all", "run"] = error
    with pytest.raises(type(error), match=str(error)):
        answers(engine, 1, 9)
    Form.fails.clear()
    answers(engine, 1, 9)
    assert {form.depth for form in Form.made} == {"all"}


@pytest.mark.parametrize("depth", ["auto", "all"])
def test_what_fails_and_was_not_measured_is_raised(store, depth):
    engine = make(store, fusion_depth=depth)
    Form.fails["stage", "run"] = Form.fails["all", "run"] = RuntimeError("no room")
    with pytest.raises(RuntimeError, match="no room"):
        answers(engine, 1, 9)


def test_without_a_graph_each_kernel_is_launched(store):
    lines = []
    engine = make(store, fusion_depth="stage", say=lines.append)
    Form.fails["stage", "capture"] = RuntimeError("not now")
    for _ in range(4):
        answers(engine, 1, 9)
    assert Form.made[0].events == ["run"] * 4
    why = "RuntimeError: not now"
    assert lines == [f"there is no CUDA graph, and each kernel is launched: {why}"]


@pytest.mark.parametrize(
    ("options", "depth"),
    [
        ({"fusion_depth": "stage"}, "stage"),
        ({"fusion_depth": "half"}, "half"),
        ({"fusion_depth": "2"}, "2"),
        ({"fusion_depth": "all"}, "all"),
        ({"dtype": "float32"}, "stage"),
    ],
)
def test_what_is_given_by_hand_or_for_checking_is_not_measured(store, options, depth):
    keep(store, facts_of(SMALL, "bfloat16", 1, 16, DEVICE), CHOICE)
    lines = []
    engine = make(store, say=lines.append, **options)
    answers(engine, 1, 9)
    assert engine.wait(0)
    assert [form.depth for form in Form.made] == [depth]
    assert lines == []


def test_on_amd_every_stage_is_a_launch(store, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    answers(make(store), 1, 9)
    answers(make(store, fusion_depth="stage"), 1, 9)
    assert [form.depth for form in Form.made] == ["stage", "stage"]
    with pytest.raises(BadInput, match="fusion_depth='all': on AMD"):
        make(store, fusion_depth="all")


def test_a_forward_that_was_given_up_is_told_and_the_next_is_not(store):
    engine = make(store, fusion_depth="all")
    answers(engine, 1, 4)
    Form.timeout = True
    with pytest.raises(EngineTimeout):
        engine.logits(tokens_of(1, 4))
    answers(engine, 1, 4)


def test_what_is_out_of_range_is_answered_by_pytorch(store):
    engine = make(store, dtype="float32")
    tokens = tokens_of(65, 2)
    reference = ReferenceEngine(SMALL, weights_of(SMALL), "cpu")
    assert torch.equal(engine.logits(tokens), reference.logits(tokens))
    assert engine.logits(tokens_of(1, 0)).shape == (1, 0, SMALL.vocab_size)
    assert Form.made == []
    answers(engine, 64, 2)


def test_text_is_pytorchs(store):
    weights = weights_of(SMALL)
    reference = ReferenceEngine(SMALL, weights, "cpu", "bfloat16")
    engine = CudaEngine(SMALL, weights, "cpu", store=store)
    prompts, sampling = [[5, 17, 3], [9]], Sampling(temperature=1.0, seed=3)
    expected = generate_ids(reference, prompts, 8, sampling)
    assert generate_ids(engine, prompts, 8, sampling) == expected
    assert engine.describe()["generates_with"] == "reference"
    assert engine._packed is None, "nothing is packed for what nobody asked"
    lines = []
    engine = CudaEngine(SMALL, weights, "cpu", fusion_depth="all", say=lines.append, store=store)
    assert generate_ids(engine, prompts, 8, sampling) == expected
    assert lines == ["fusion depth all: PyTorch generates, one operator a launch"]


def test_the_weights_that_were_given_go_when_all_is_made_of_them(store):
    weights = {name: w.clone() for name, w in weights_of(SMALL).items()}
    tensors = [weakref.ref(w) for w in weights.values()]
    engine = CudaEngine(SMALL, weights, "cpu", "float16", store=store)
    del weights
    before = engine.describe()["weight_bytes"]
    assert before == 2 * SMALL.n_params
    answers(engine, 1, 3)
    assert all(t() is not None for t in tensors)
    generate_ids(engine, [[1]], 2, Sampling())
    gc.collect()
    assert all(t() is None for t in tensors)
    assert engine.describe()["weight_bytes"] > before, "a tied head is there twice"
    answers(engine, 1, 3)


def test_an_engine_that_is_let_go_measures_no_more(store, monkeypatch):
    begun, stopped = threading.Event(), threading.Event()

    def until_cancelled(config, dtype, device, batch, sequence, store, cancelled, used):
        begun.set()
        while not cancelled():
            time.sleep(0.01)
        stopped.set()
        raise RunFailed("cancelled")

    lines = []
    monkeypatch.setattr(engine_module, "choose", until_cancelled)
    engine = make(store, say=lines.append)
    answers(engine, 1, 9)
    assert begun.wait(30)
    del engine
    gc.collect()
    assert stopped.wait(30)
    assert lines == ["measuring forms and tiles for 1x16 tokens in the background, once"]


def test_an_engine_that_hears_its_own_lines_is_let_go_too(store):
    class Host:
        def __init__(self):
            self.lines = []
            self.engine = make(store, say=self.hear)

        def hear(self, line):
            self.lines.append(line)

    host = Host()
    answers(host.engine, 1, 9)
    assert host.engine.wait(30)
    engine, cancelled = weakref.ref(host.engine), host.engine._chooser.cancelled
    del host
    gc.collect()
    assert engine() is None
    assert cancelled.is_set()


def test_the_memory_of_an_engine_that_is_let_go_is_not_free_before_its_last_use(store, monkeypatch):
    waited = []

    class Event:
        def synchronize(self):
            assert packed() is not None
            waited.append(self)
            raise RuntimeError("the device is broken")

    monkeypatch.setattr(engine_module, "resolve_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    engine = make(store)
    engine._packed = torch.zeros(4)
    packed, used = weakref.ref(engine._packed), engine._used
    del engine
    gc.collect()
    assert waited == [used]
    assert packed() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "the CUDA engine knows bfloat16, float16, float32"),
        ({"fusion_depth": "3"}, "fusion_depth='3': must be stage, half, all"),
        ({"fusion_depth": "both"}, "fusion_depth='both'"),
    ],
)
def test_what_cannot_be_had_is_refused(store, options, message):
    with pytest.raises(BadInput, match=message):
        make(store, **options)


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.undo()
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    for device in ("auto", "cpu"):
        message = "engine='cuda': it runs on a GPU, and the device is cpu; use engine='reference'"
        with pytest.raises(BadInput, match=message):
            choose("cuda", SMALL, weights_of(SMALL), device)
    with pytest.raises(BadInput, match="no GPU|without CUDA"):
        choose("cuda", SMALL, weights_of(SMALL), "cuda")
    with pytest.raises(BadInput, match="threads=2: the CUDA engine"):
        choose("cuda", SMALL, weights_of(SMALL), threads=2)
    with pytest.raises(
        BadInput, match="engine='vulkan': must be auto, reference, cpu, cuda or coreml"
    ):
        choose("vulkan", SMALL, weights_of(SMALL))


def test_what_auto_is(monkeypatch):
    gpu, capability = torch.device("cuda", 0), (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("onelaunch.engines.cuda.util.find_spec", lambda name: True)
    monkeypatch.setenv("CC", "cc")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert [automatic(gpu, SMALL, d, None) for d in (None, "bfloat16", "float16", "float32")] == [
        "cuda", "cuda", "cuda", "reference",
    ]  # fmt: skip
    assert automatic(gpu, SMALL, None, 2) == "reference"
    assert automatic(torch.device("mps"), SMALL, None, None) == "reference"
    assert automatic(CPU, SMALL, "float16", None) == "reference"
    wide = SMALL.with_(head_dim=130)
    assert automatic(gpu, wide, None, None) == "reference"
    assert "at most 128 wide, the model's are 130" in why_not(gpu, wide)
    capability = (7, 5)
    assert automatic(gpu, SMALL, None, None) == "reference"
    assert why_not(gpu) == "it needs compute capability 8.0, and cuda:0 has 7.5"
    capability = (9, 0)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" in why_not(gpu)
    monkeypatch.setattr("onelaunch.engines.cuda.util.find_spec", lambda name: None)
    assert why_not(gpu) == "the package triton is not installed"


def test_turns_go_to_whoever_waited_longest():
    turns, order = Turns(), []
    first = threading.Event()

    def ask(name):
        with turns.turn():
            order.append(name)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(5)]
    with turns.turn():
        for thread in threads:
            thread.start()
            first.wait(0.05)
        assert order == []
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3, 4]


def test_a_turn_that_fails_is_over():
    turns = Turns()
    with pytest.raises(KeyError), turns.turn():
        raise KeyError
    with turns.turn():
        pass


def test_who_is_interrupted_while_queueing_holds_nobody_up():
    class Interrupted(deque):
        def append(self, entry):
            super().append(entry)
            raise KeyboardInterrupt

    turns = Turns()
    turns._queue = Interrupted()
    holding, done = threading.Event(), threading.Event()

    def hold():
        with turns.turn():
            holding.set()
            done.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    assert holding.wait(20)
    with pytest.raises(KeyboardInterrupt), turns.turn():
        pytest.fail("two turns at once")
    assert not turns._queue
    done.set()
    holder.join(20)
    with turns.turn():
        pass


INTERRUPTED = """
import random, signal, sys, threading, time
from onelaunch.engines.cuda.turns import Turns

def interrupt(number, frame):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
turns, counts, ended = Turns(), [0, 0], threading.Event()

def ask(i):
    while not ended.is_set():
        with turns.turn():
            counts[i] += 1
        time.sleep(random.random() * 1e-4)

others = [threading.Thread(target=ask, args=(i,), daemon=True) for i in range(int(sys.argv[1]))]
for thread in others:
    thread.start()
for _ in range(2000):
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(5e-6, 2e-4))
        while True:
            with turns.turn():
                pass
    except KeyboardInterrupt:
        pass
with turns.turn():
    before = list(counts)
time.sleep(0.5)
ended.set()
for thread in others:
    thread.join(20)
    assert not thread.is_alive(), "waits for ever"
assert all(now > then for now, then in zip(counts[: len(others)], before)), (before, counts)
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers here")
@pytest.mark.parametrize("others", [0, 1, 2])
def test_interrupts_hold_nobody_up(others):
    """2,000 of them, at whatever moment of a turn they come; whoever was interrupted asks again."""
    command = [sys.executable, "-c", INTERRUPTED, str(others)]
    subprocess.run(command, check=True, timeout=120)


@pytest.mark.parametrize("inference", [False, True])
def test_gradients_are_off_within_a_turn(store, inference):
    engine = CudaEngine(SMALL, weights_of(SMALL), "cpu", store=store)
    with torch.inference_mode(inference), engine._alone():
        assert not torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


def test_two_who_ask_all_the_time_take_turns():
    turns, order, done = Turns(), [], threading.Event()

    def ask():
        while not done.is_set():
            with turns.turn():
                order.append("measurement")
                time.sleep(0.001)

    thread = threading.Thread(target=ask)
    thread.start()
    for _ in range(50):
        with turns.turn():
            order.append("caller")
            time.sleep(0.001)
    done.set()
    thread.join()
    caller = [i for i, who in enumerate(order) if who == "caller"]
    assert max(b - a for a, b in pairwise(caller)) <= 2
    assert order.count("measurement") >= 25


def test_a_chooser_finds_one_after_another_and_each_once():
    lines, running, most = [], [], []

    def finding(value):
        def find(cancelled):
            running.append(value)
            most.append(len(running))
            time.sleep(0.02)
            running.remove(value)
            if value == 2:
                raise ValueError("no two")
            return value

        return find

    chooser = Chooser(lines.append)
    for value in (1, 2, 3, 1):
        chooser.ask(str(value), finding(value))
    assert chooser.wait(30)
    assert chooser.take() == {"1": 1, "3": 3}
    assert chooser.take() == {}
    assert max(most) == 1
    assert len(most) == 3
    assert lines == ["2: nothing chosen (ValueError: no two)"]
    chooser.ask("4", finding(4))
    assert chooser.wait(30)
    assert chooser.take() == {"4": 4}
    chooser.cancelled.set()
    chooser.ask("5", finding(5))
    assert chooser.wait(0)
    assert chooser.take() == {}
