"""The CUDA engine on a GPU: the shared suite, its forms, and tuning."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import torch.nn.functional as F

from onelaunch.compilation.cache import Store
from onelaunch.engines.choice import choose
from onelaunch.engines.cuda import engine as engine_module
from onelaunch.engines.cuda.blocking import Blocking, default
from onelaunch.engines.cuda.engine import CudaEngine
from onelaunch.engines.cuda.forms import Form
from onelaunch.engines.cuda.program import BoundForward, Shape
from onelaunch.engines.cuda.replay import Replay
from onelaunch.engines.cuda.tuning.store import find
from onelaunch.engines.cuda.tuning.timer import Timer, facts
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.errors import BadInput, EngineTimeout
from onelaunch.model import Model
from tests.engines.cuda.staged_forward import StagedForward
from tests.engines.suite import (
    SHAPES,
    SMALL,
    EngineSuite,
    every_shape,
    exact_logits,
    relative_error,
    weights_of,
)

CUDA = torch.device("cuda", 0)
LONGER = SMALL.with_(
    dim=288, n_heads=6, n_kv_heads=6, head_dim=48, hidden_dim=768, vocab_size=500, max_seq_len=256
)
SIZES = [(1, 1), (3, 7), (2, SMALL.max_seq_len)]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def tokens_of(config, batch, sequence, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + sequence)
    return torch.randint(config.vocab_size, (batch, sequence), generator=generator)


def allowed_error(config, weights, tokens, dtype):
    """1.5 times PyTorch's in the same dtype; of float32, that is a few roundings."""
    own = Model.from_weights(config, {name: w.to(CUDA, dtype) for name, w in weights.items()})
    with torch.no_grad():
        plain = F.linear(own.hidden(tokens.to(CUDA)), own.head_weight())
    exact = exact_logits(config, weights, tokens)
    return exact, max(1.5 * relative_error(plain, exact), 4e-6)


class TestCuda(EngineSuite):
    def make(self, config, weights):
        return CudaEngine(config, weights, "cuda", "float32")

    @every_shape
    @pytest.mark.parametrize("size", SIZES)
    def test_logits_are_as_exact_as_plain_pytorch(self, config, size):
        weights, tokens = weights_of(config), tokens_of(config, *size)
        logits = self.make(config, weights).logits(tokens)
        exact, allowed = allowed_error(config, weights, tokens, torch.float32)
        assert logits.dtype == torch.float32
        assert logits.shape == exact.shape
        assert relative_error(logits, exact) <= allowed


@pytest.mark.parametrize(
    ("config", "dtype"),
    [*((config, "bfloat16") for config in SHAPES.values()), (SMALL, "float16")],
    ids=[*SHAPES, "plain-float16"],
)
def test_narrow_logits_are_as_exact_as_pytorchs(config, dtype):
    weights = weights_of(config)
    engine = CudaEngine(config, weights, "cuda", dtype, fusion_depth="stage")
    for size in SIZES:
        tokens = tokens_of(config, *size)
        exact, allowed = allowed_error(config, weights, tokens, getattr(torch, dtype))
        results = [engine.logits(tokens) for _ in range(3)]  # launched, captured, replayed
        assert relative_error(results[0], exact) <= allowed
        assert results[0].device == CUDA
        assert all(torch.equal(each, results[0]) for each in results)


@pytest.mark.parametrize("depth", ["half", "1", 2])
def test_depths_by_hand_have_the_same_bits(depth):
    weights = weights_of(LONGER)
    whole = CudaEngine(LONGER, weights, "cuda", fusion_depth="all")
    parted = CudaEngine(LONGER, weights, "cuda", fusion_depth=depth)
    for seed in range(3):
        for size in ((1, 200), (3, 17)):
            tokens = tokens_of(LONGER, *size, seed)
            exact, allowed = allowed_error(LONGER, weights, tokens, torch.bfloat16)
            logits = parted.logits(tokens)
            assert relative_error(logits, exact) <= allowed
            assert torch.equal(whole.logits(tokens), logits)
    assert parted.describe()["forms"]["1x200"] == {"form": str(depth)}


@pytest.mark.parametrize("depth", ["stage", "half", "all"])
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_a_result_is_not_changed_by_later_calls(depth, where):
    engine = CudaEngine(LONGER, weights_of(LONGER), "cuda", fusion_depth=depth)
    tokens = [tokens_of(LONGER, 2, 100, seed).to(where) for seed in range(10)]
    kept = [engine.logits(each) for each in tokens]
    narrow = [engine.logits(each, torch.bfloat16) for each in tokens]
    again = [engine.logits(each).clone() for each in tokens]
    assert len({result.data_ptr() for result in kept}) == 10
    for one, other, third in zip(kept, again, narrow, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)
        assert torch.equal(one.bfloat16(), third)


@pytest.mark.parametrize("head", [Blocking(128, 128, library=True), None])
def test_float32_logits_of_either_head_are_as_exact(head):
    """Of a library's product, and of a kernel's: written in float32 at once."""
    weights, tokens = weights_of(LONGER), tokens_of(LONGER, 1, 200)
    exact, allowed = allowed_error(LONGER, weights, tokens, torch.bfloat16)
    packed = StagedForward(LONGER, weights, torch.bfloat16, CUDA).packed
    tiles = {} if head is None else {"head": head}
    shape = Shape(1, 200, True, torch.bfloat16, own_logits=False)
    bound = BoundForward(LONGER, packed, shape, tiles)
    ids = tokens.flatten().to(CUDA)
    for dtype in (torch.float32, torch.bfloat16):
        both = torch.full((2, 200, LONGER.vocab_size), float("nan"), device=CUDA, dtype=dtype)
        launched, replayed = both
        bound.launch(ids, launched)
        replay = Replay(bound)
        replay.prepare(replayed)
        replay(ids, replayed)
        assert relative_error(launched.view(exact.shape), exact) <= allowed
        assert torch.equal(launched, replayed)


@pytest.mark.parametrize("depth", ["stage", "half", "all"])
@pytest.mark.parametrize("bad", [-1, LONGER.vocab_size, 1 << 40])
def test_a_bad_id_on_the_gpu_is_told_by_a_later_call(depth, bad):
    engine = CudaEngine(LONGER, weights_of(LONGER), "cuda", fusion_depth=depth)
    tokens = tokens_of(LONGER, 2, 60).to(CUDA)
    expected = engine.logits(tokens)
    wrong = tokens.clone()
    wrong[1, 20] = bad
    for _ in range(3):  # launched, captured, replayed
        got = engine.logits(wrong)
        assert torch.equal(got[0], expected[0])
        assert got[1, 20:].isnan().all()
        with pytest.raises(BadInput, match=f"an earlier call: id {bad} is outside"):
            engine.logits(tokens)
        assert torch.equal(engine.logits(tokens), expected)
    engine.logits(wrong)
    with pytest.raises(BadInput, match=f"id {bad} is outside"):
        engine.describe()
    engine.describe()


def test_logits_wait_for_nothing():
    """With seconds of work ahead of it on the GPU a call returns, whatever the ids' place."""
    engine = CudaEngine(LONGER, weights_of(LONGER), "cuda", fusion_depth="stage")
    tokens = tokens_of(LONGER, 2, 60)
    for each in (tokens, tokens.to(CUDA)):
        for _ in range(3):
            engine.logits(each)
    each = tokens.to(CUDA)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    ahead = torch.cuda.Event()
    ahead.record()
    results = [engine.logits(ids) for ids in (tokens, each)]
    assert not ahead.query(), "the calls returned while the work ahead of them was running"
    torch.cuda.synchronize()
    assert torch.equal(*results)


def test_tuning_chooses_keeps_and_answers_as_well(store):
    lines, weights, tokens = [], weights_of(LONGER), tokens_of(LONGER, 1, 250)
    exact, allowed = allowed_error(LONGER, weights, tokens, torch.bfloat16)
    engine = CudaEngine(LONGER, weights, "cuda", log=lines.append, store=store)
    before = engine.logits(tokens)
    assert engine.describe()["forms"] == {"1x250": {"form": "staged"}}
    waited, phases = [], []

    def call():
        start = time.perf_counter()
        waited.append((engine.logits(tokens), time.perf_counter() - start))

    meanwhile = threading.Thread(target=call)

    def progress(phase, done, total):
        if not phases:
            meanwhile.start()
        phases.append(phase)

    tuned = engine.tune(1, 250, progress)
    meanwhile.join(60)
    print({phase: phases.count(phase) for phase in phases}, tuned)
    after = engine.logits(tokens)
    for logits in (before, after, waited[0][0]):
        assert relative_error(logits, exact) <= allowed
    assert torch.equal(engine.logits(tokens), after)
    assert {"rule", "staged", "all", "half", "1", "2"} <= set(tuned["us"])
    assert tuned["us"]["staged"] <= tuned["us"]["rule"]
    assert tuned["us"][tuned["form"]] <= 1.04 * min(tuned["us"].values())
    assert tuned["tried"] > 30
    assert lines == []
    kept = find(store, facts(LONGER, engine._packed, 1, 250))
    assert (kept.form, kept.us) == (tuned["form"], tuned["us"])
    second = CudaEngine(LONGER, weights, "cuda", store=store)
    start = time.perf_counter()
    assert torch.equal(second.logits(tokens), after)
    print(f"with the choice kept, the first logits after {time.perf_counter() - start:.2f} s")
    assert second.describe() == engine.describe()


def test_an_interrupt_ends_tuning(store):
    weights, tokens = weights_of(LONGER), tokens_of(LONGER, 1, 250)
    engine = CudaEngine(LONGER, weights, "cuda", store=store)
    before = engine.logits(tokens)

    def interrupt(phase, done, total):
        if phase == "timing tiles" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.tune(1, 250, interrupt)
    assert torch.equal(engine.logits(tokens), before)
    assert find(store, facts(LONGER, engine._packed, 1, 250)) is None


def test_shapes_come_and_go(monkeypatch, store):
    monkeypatch.setattr(engine_module, "MAX_FORMS", 3)
    weights = weights_of(LONGER)
    engine = CudaEngine(LONGER, weights, "cuda", fusion_depth="stage", store=store)
    staged = StagedForward(LONGER, weights, torch.bfloat16, CUDA)
    for turn in range(3):
        for size in ((1, 16), (1, 32), (2, 48), (1, 64), (4, 16)):
            tokens = tokens_of(LONGER, *size, turn)
            shape = Shape(*size, True, torch.bfloat16)
            bound = staged.bind(*size, logits_dtype=shape.logits_dtype)
            bound.buffers.tokens.copy_(tokens.flatten())
            bound.run()
            expected = bound.buffers.logits.view(*size, -1)
            for _ in range(2):
                assert torch.equal(engine.logits(tokens, torch.bfloat16), expected)
            assert len(engine.describe()["forms"]) <= 3


def test_a_forward_that_was_given_up_is_told_once():
    from onelaunch.engines.cuda import sync  # it imports Triton

    engine = CudaEngine(SMALL, weights_of(SMALL), "cuda", fusion_depth="all")
    tokens = tokens_of(SMALL, 2, 20)
    right = engine.logits(tokens)
    for _ in range(2):
        bound = engine._forms[2, 20, True]._bound
        bound.sync[sync.STATUS] = sync.GAVE_UP + (3 << sync.ROW_TILE_BITS)
        assert engine.logits(tokens).isnan().all()
        with pytest.raises(EngineTimeout, match="row tile 0 of layer 0 out_proj"):
            engine.logits(tokens)
        assert torch.equal(engine.logits(tokens), right)


def test_any_thread_stream_and_mode_may_call(store):
    weights = weights_of(LONGER)
    engine = CudaEngine(LONGER, weights, "cuda", fusion_depth="all", store=store)
    expected = {s: engine.logits(tokens_of(LONGER, 1, s)) for s in (16, 48, 100)}
    wrong = []

    def call(seed):
        with torch.cuda.stream(torch.cuda.Stream()), torch.inference_mode(seed % 2 == 0):
            for turn in range(30):
                s = (16, 48, 100)[(seed + turn) % 3]
                got = engine.logits(tokens_of(LONGER, 1, s).to(CUDA))
                torch.cuda.current_stream().synchronize()
                if not torch.equal(got, expected[s]):
                    wrong.append((seed, turn))

    torch.cuda.synchronize()
    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_timer_times_what_runs_and_nothing_else():
    staged = StagedForward(LONGER, weights_of(LONGER), torch.bfloat16, CUDA)
    timer = Timer(LONGER, staged.packed, Shape(1, 256, True, torch.bfloat16))
    tiles = default(LONGER, 256, 2)
    one, other = timer(Form("staged", tiles)), timer(Form("all", tiles, 132))
    print(f"staged {one:.1f} us, all {other:.1f} us")
    assert 5 < one < 5000
    assert 5 < other < 5000
    assert timer(Form("all", tiles, 1 << 14)) == float("inf"), "more than fit together"
    too_large = tiles | {"head": Blocking(128, 256, 128, 4, 8)}
    assert timer(Form("staged", too_large)) == float("inf")
    assert 5 < timer(Form("staged", tiles)) < 5000


def test_auto_is_this_engine():
    weights = weights_of(SMALL)
    engine = choose("auto", SMALL, weights)
    assert isinstance(engine, CudaEngine)
    assert engine.describe()["generates_with"] == "cuda"
    assert isinstance(choose("auto", SMALL, weights, dtype="float32"), ReferenceEngine)
