"""The CUDA engine's own logic with made-up forms on the CPU: shapes, choices, threads. The forms
are tested through the interpreter and on a GPU."""

from __future__ import annotations

import gc
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch

from onelaunch.compilation.cache import Store
from onelaunch.engines.choice import automatic, choose
from onelaunch.engines.cuda import engine as engine_module
from onelaunch.engines.cuda import forms, why_not
from onelaunch.engines.cuda.blocking import default
from onelaunch.engines.cuda.engine import LOCK, CudaEngine
from onelaunch.engines.cuda.tuning import timer
from onelaunch.engines.cuda.tuning.store import Choice, facts_of, find, keep
from onelaunch.engines.engine import Sampling
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.errors import BadInput, EngineTimeout
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
        assert LOCK._is_owned()
        assert ids.dtype == torch.int64
        self.fail(how)
        self.events.append(how)
        logits.copy_(ids[:, None])

    def launch(self, ids, logits):
        self._compute("run", ids, logits)

    def copy_status(self):
        assert self.events[-1] in ("run", "replay")

    def raise_if_timed_out(self, wait):
        assert not wait
        if Form.timeout:
            Form.timeout = False
            raise EngineTimeout("the forward was given up")


class Replayed:
    def __init__(self, form):
        assert LOCK._is_owned()
        form.fail("capture")
        form.events.append("captured")
        self.form, self.prepared = form, set()

    def prepare(self, logits):
        assert LOCK._is_owned()
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
    monkeypatch.setattr(forms, "BoundForward", Form)
    monkeypatch.setattr(forms, "FusedForward", Form)
    monkeypatch.setattr(engine_module, "Replay", Replayed)
    monkeypatch.setattr(timer, "device_facts", lambda device: DEVICE)
    monkeypatch.setattr(engine_module, "tune", found)


def found(config, packed, batch, sequence, progress):
    progress("timing tiles", 1, 1)
    return CHOICE


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
    engine = make(store, log=lines.append)
    answers(engine, 1, 9)
    answers(engine, 1, 16)
    assert [(f.depth, f.programs) for f in Form.made] == [("all", 4)] * 2
    about = {"form": "all", "programs": 4, "us": CHOICE.us}
    assert engine.describe()["forms"] == {"1x9": about, "1x16": about}
    assert lines == []
    answers(make(store, dtype="float16"), 1, 9)
    assert Form.made[-1].depth == "stage", "another dtype, another choice"


def test_what_is_tuned_is_kept_and_used_at_once(store):
    engine, heard = make(store), []
    for sequence in (9, 12, 20):
        answers(engine, 1, sequence)
    about = engine.tune(1, 12, lambda *how: heard.append(how))
    assert about == {
        "batch": 1, "sequence": 16, "form": "all", "us": CHOICE.us, "tried": 7, "seconds": 1.5,
    }  # fmt: skip
    assert heard == [("timing tiles", 1, 1)]
    assert list(engine.describe()["forms"]) == ["1x20"], "the rule's forms of these are gone"
    for sequence in (9, 12, 20):
        answers(engine, 1, sequence)
    assert [f.depth for f in Form.made] == ["stage"] * 3 + ["all"] * 2
    assert find(store, facts_of(SMALL, "bfloat16", 1, 16, DEVICE)) == CHOICE
    answers(make(store), 1, 16)
    assert Form.made[-1].depth == "all"


def test_the_context_is_tuned_unless_another_sequence_is_asked_for(store):
    assert make(store).tune()["sequence"] == SMALL.max_seq_len


def test_a_store_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    lines = []
    engine = make(Store(tmp_path / "file"), log=lines.append)
    engine.tune(1, 9)
    assert "could not be stored" in lines[-1]
    answers(engine, 1, 9)
    assert Form.made[-1].depth == "all"


@pytest.mark.parametrize(
    ("options", "given", "named"),
    [
        ({}, (0, 9), "batch=0"),
        ({}, (65, 9), "batch=65"),
        ({}, (1, 0), "sequence=0"),
        ({}, (1, SMALL.max_seq_len + 1), "sequence="),
        ({"fusion_depth": "all"}, (), "fusion_depth='all'"),
        ({"dtype": "float32"}, (), "dtype='float32'"),
    ],
)
def test_what_cannot_be_tuned_is_refused(store, options, given, named):
    with pytest.raises(BadInput, match=named):
        make(store, **options).tune(*given)


def test_an_interrupt_of_tuning_keeps_nothing_and_holds_nobody_up(store, monkeypatch):
    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine_module, "tune", interrupted)
    engine = make(store)
    with pytest.raises(KeyboardInterrupt):
        engine.tune(1, 9)
    thread = threading.Thread(target=answers, args=(engine, 1, 9))
    thread.start()
    thread.join(30)
    assert [form.depth for form in Form.made] == ["stage"]


def test_threads_are_served_one_at_a_time(store):
    engine, results = make(store), []

    def work(sequence):
        for _ in range(20):
            results.append(answers(engine, 1, sequence))

    threads = [threading.Thread(target=work, args=(n,)) for n in (3, 5, 3, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 80
    assert len(Form.made) == 3


@pytest.mark.parametrize("where", ["bind", "run", "replay"])
def test_a_tuned_form_that_fails_is_given_up_for_one_launch_a_stage(store, where):
    lines = []
    keep(store, facts_of(SMALL, "bfloat16", 1, 16, DEVICE), CHOICE)
    engine = make(store, log=lines.append)
    if where == "replay":
        answers(engine, 1, 12)
        answers(engine, 1, 9)
    Form.fails["all", where] = RuntimeError("out of resources\nmore of it")
    for sequence in (9, 9, 9, 12):
        answers(engine, 1, sequence)
    assert [(f.depth, f.shape.sequence) for f in Form.made][-2:] == [("stage", 9), ("stage", 12)]
    why = "RuntimeError: out of resources"
    assert lines == [f"1x16 tokens: the tuned form fails ({why}); the rule's answers"]
    about = {"form": "staged", "failed": why}
    assert engine.describe()["forms"] == {"1x9": about, "1x12": about}
    Form.fails.clear()
    answers(make(store), 1, 9)
    assert Form.made[-1].depth == "all", "another engine tries it"


@pytest.mark.parametrize("error", [BadInput("too long"), EngineTimeout("given up")])
def test_what_is_no_fault_of_a_tuned_form_is_raised(store, error):
    keep(store, facts_of(SMALL, "bfloat16", 1, 16, DEVICE), CHOICE)
    engine = make(store)
    Form.fails["all", "run"] = error
    with pytest.raises(type(error), match=str(error)):
        answers(engine, 1, 9)
    Form.fails.clear()
    answers(engine, 1, 9)
    assert {form.depth for form in Form.made} == {"all"}


@pytest.mark.parametrize("depth", ["auto", "all"])
def test_what_fails_and_was_not_tuned_is_raised(store, depth):
    engine = make(store, fusion_depth=depth)
    Form.fails["stage", "run"] = Form.fails["all", "run"] = RuntimeError("no room")
    with pytest.raises(RuntimeError, match="no room"):
        answers(engine, 1, 9)


def test_without_a_graph_each_kernel_is_launched(store):
    lines = []
    engine = make(store, fusion_depth="stage", log=lines.append)
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
def test_what_is_given_by_hand_or_for_checking_is_not_tuned(store, options, depth):
    keep(store, facts_of(SMALL, "bfloat16", 1, 16, DEVICE), CHOICE)
    lines = []
    engine = make(store, log=lines.append, **options)
    answers(engine, 1, 9)
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


def test_without_a_gpu_the_reference_engine_generates(store):
    weights = weights_of(SMALL)
    reference = ReferenceEngine(SMALL, weights, "cpu", "bfloat16")
    engine = CudaEngine(SMALL, weights, "cpu", store=store)
    prompts, sampling = [[5, 17, 3], [9]], Sampling(temperature=1.0, seed=3)
    expected = generate_ids(reference, prompts, 8, sampling)
    assert generate_ids(engine, prompts, 8, sampling) == expected
    assert engine.describe()["generates_with"] == "reference"
    assert engine._packed is None, "nothing is packed for what nobody asked"
    lines = []
    engine = CudaEngine(SMALL, weights, "cpu", fusion_depth="all", log=lines.append, store=store)
    assert generate_ids(engine, prompts, 8, sampling) == expected
    assert "PyTorch" in lines[0]


@pytest.mark.parametrize(("max_len", "own"), [(8192, True), (8193, False), (None, False)])
def test_its_own_kernels_generate_up_to_so_many_positions(store, monkeypatch, max_len, own):
    pytest.importorskip("triton")
    from onelaunch.engines.cuda.decoding.options import OptionsByPyTorch
    from onelaunch.engines.cuda.decoding.session import CudaSession

    monkeypatch.setattr(CudaEngine, "_generates", lambda engine: True)
    config = SMALL.with_(max_seq_len=9000)
    for depth, kind in (("auto", OptionsByPyTorch), ("stage", CudaSession)):
        engine = CudaEngine(config, weights_of(config), "cpu", fusion_depth=depth, store=store)
        for max_batch in (1, 8, 64):
            assert isinstance(engine.session(max_batch, max_len), kind) == own


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


@pytest.mark.parametrize("inference", [False, True])
def test_gradients_are_off_within_a_turn(store, inference):
    engine = CudaEngine(SMALL, weights_of(SMALL), "cpu", store=store)
    with torch.inference_mode(inference), engine._alone():
        assert not torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
