"""A whole text in one launch: the same numbers as the other forms, whatever the grid; waits that
end. The engines' shared suite has it in float32 (test_cuda_engine.py)."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from onelaunch.checkpoints import load
from onelaunch.compilation.cache import Store
from onelaunch.config import preset
from onelaunch.engines import session
from onelaunch.engines.engine import Request, Sampling
from onelaunch.errors import BadInput, EngineTimeout
from onelaunch.generation.decode import generate_ids
from onelaunch.model import Model
from tests.engines.cuda.test_emulated_text import kept
from tests.engines.suite import SHAPES, SMALL, YARN, exact_logits, run, weights_of

pytest.importorskip("triton")
pytest.importorskip("cuda.bindings")
if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
    pytest.skip("needs a GPU of compute capability 9.0", allow_module_level=True)

from onelaunch.engines.cuda import nvrtc
from onelaunch.engines.cuda.decoding import grids
from onelaunch.engines.cuda.decoding.chain import Memory
from onelaunch.engines.cuda.decoding.grids import FEW, Grid, grid_for, why_not
from onelaunch.engines.cuda.decoding.text import Row, Text, TextKernel
from onelaunch.engines.cuda.decoding.text_trace import trace_text
from onelaunch.engines.cuda.engine import CudaEngine
from onelaunch.engines.cuda.program import limits_of

WEIGHTS = Path(__file__).parents[2] / ".." / "shared" / "weights"
WIDE = SMALL.with_(max_seq_len=1500)
TILED_WIDE = WIDE.with_(dim=64, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=96)
FITTING = {
    name: config
    for name, config in SHAPES.items()
    if why_not(config, torch.device("cuda"), torch.float32) is None
}
CONFIGS = {
    **FITTING,
    "yarn": YARN,
    "15m": preset("stories15m").with_(n_layers=2),
    "grouped": preset("llama-3.2-1b").with_(n_layers=1, vocab_size=4100),
    "qk-norm": preset("qwen3-0.6b").with_(n_layers=1, vocab_size=4100),
}


MIXED = (
    Sampling(),
    Sampling(0.8, seed=3),
    Sampling(1.1, top_p=0.9, seed=4),
    Sampling(1.2, 20, 0.9, 0.01, seed=5),
    Sampling(repetition_penalty=1.4),
    Sampling(1.0, top_p=0.9, seed=6, repetition_penalty=1.2),
)


def events_of(config, new, dtype="bfloat16", depth="text", weights=None, **options):
    """Of one sequence that is written alone."""
    engine = CudaEngine(config, weights or weights_of(config), "cuda", dtype, depth)
    prompt = torch.randint(config.vocab_size, (20,), generator=torch.manual_seed(1)).tolist()
    session = engine.session(1)
    session.submit(Request(0, prompt, new, Sampling(), logprobs=True, **options))
    events = []
    while not events or events[-1].finish is None:
        events += session.step()
    session.close()
    return prompt, events


@pytest.fixture(params=[True, False], ids=["tiles", "rows"])
def by_tiles(request, monkeypatch):
    """One sequence by either kernel."""
    monkeypatch.setattr(grids, "TILED", request.param)


@pytest.mark.usefixtures("by_tiles")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logprobs_are_as_exact_as_pytorchs(config):
    """Over 80 steps: keys and values of all positions, prompt and text."""
    config = config.with_(max_seq_len=128)
    weights = weights_of(config)
    prompt, events = events_of(config, 80, weights=weights)
    assert_as_exact(config, weights, prompt, events)


def assert_as_exact(config, weights, prompt, events):
    """The logprobs of a text are nearly as exact as those of PyTorch in bfloat16."""
    new = [event.token for event in events]
    tokens = torch.tensor([prompt + new[:-1]])
    narrow = Model.from_weights(config, {name: w.bfloat16() for name, w in weights.items()})
    with torch.no_grad():
        plain = torch.nn.functional.linear(narrow.hidden(tokens), narrow.head_weight())
        exact = exact_logits(config, weights, tokens)

    def logprobs(logits_1SV):
        rows = logits_1SV[0, len(prompt) - 1 :].double().log_softmax(-1)
        return rows.gather(1, torch.tensor(new)[:, None])[:, 0]

    allowed = 1.5 * (logprobs(plain) - logprobs(exact)).norm()
    got = torch.tensor([event.logprob for event in events]).double()
    assert (got - logprobs(exact)).norm() <= allowed


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_float32_writes_the_tokens_of_the_other_forms(config):
    config = config.with_(max_seq_len=128)
    if why_not(config, torch.device("cuda"), torch.float32):
        pytest.skip("float32 does not fit into shared memory")
    weights = weights_of(config)
    _, by_text = events_of(config, 90, "float32", "text", weights)
    _, by_stage = events_of(config, 90, "float32", "stage", weights)
    assert [event.token for event in by_text] == [event.token for event in by_stage]
    for a, b in zip(by_text, by_stage, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-3)


def test_a_text_is_the_same_each_time_in_any_number_of_launches():
    weights = weights_of(WIDE)
    _, first = events_of(WIDE, 1400, weights=weights)  # chunks of more than one pass
    assert len(first) == 1400
    assert events_of(WIDE, 1400, weights=weights)[1] == first
    assert events_of(WIDE, 100, weights=weights)[1][:99] == first[:99]


def test_a_context_beyond_the_forwards():
    config = SMALL.with_(max_seq_len=8192)
    weights = weights_of(config)
    engine = CudaEngine(config, weights, "cuda", "float32", "text")
    prompt = torch.randint(config.vocab_size, (1900,), generator=torch.manual_seed(1)).tolist()
    requests = [Request(0, prompt, 2500)]
    tokens, finish = run(engine, requests, 1)[0]
    assert (len(tokens), finish) == (2500, "length")
    ids = torch.tensor([[*prompt, *tokens[:-1]]])
    best = exact_logits(config, weights, ids)[0, len(prompt) - 1 :].argmax(-1)
    assert (best == torch.tensor(tokens)).double().mean() > 0.99  # but for ties


def ended(text, n):
    """Of each row its tokens, their logprobs, and what ended it."""
    return [(*end.unpacked(), end.how) for end in text.finish([0] * n)]


def launched(kernel, config, packed, n, timeout_ns=2_000_000_000, poison=0.0):
    memory = Memory.of(config, packed, 1, config.max_seq_len)
    for cache in (memory.keys, memory.values):
        cache.fill_(poison)
    text = Text(kernel, memory.keys, memory.values, timeout_ns)
    text.launch([Row(0, 3, 0, n)])
    return ended(text, 1)[0], memory


@pytest.mark.parametrize("ctas", [1, 2, 7, 50, 131])
@pytest.mark.parametrize("tiles", [False, True])
def test_any_grid_writes_the_same(ctas, tiles):
    config = TILED_WIDE if tiles else WIDE
    engine = CudaEngine(config, weights_of(config), "cuda", "bfloat16" if tiles else "float32")
    packed = engine._pack()
    multiprocessors = limits_of(torch.device("cuda")).multiprocessors
    grid, whole = (Grid(1, n, tiles=tiles) for n in (ctas, multiprocessors))
    n = 120 if tiles else 200  # within one chunk: how many there are depends on the grid
    full, memory = launched(TextKernel(config, packed, grid=whole), config, packed, n)
    kernel = TextKernel(config, packed, grid=grid)
    part, other = launched(kernel, config, packed, n, poison=float("nan"))
    assert part[0] == full[0]
    # of what it has written: what stood in the cache behind it had no effect
    assert other.keys[:, 0, :, :n].isfinite().all()
    torch.testing.assert_close(other.values[:, 0, :, :n], memory.values[:, 0, :, :n])


def test_keys_and_values_are_exact():
    config = preset("stories15m").with_(n_layers=2, max_seq_len=64)
    weights = weights_of(config)
    packed = CudaEngine(config, weights, "cuda", "float32")._pack()
    (tokens, _, _), memory = launched(TextKernel(config, packed), config, packed, 60)
    ids = torch.tensor([[3, *tokens[:-1]]])
    exact = Model.from_weights(config, {name: w.double() for name, w in weights.items()})
    got = memory.values[0, 0, :, :60].transpose(0, 1).flatten(1).double().cpu()
    names = ("layers.0.input_layernorm.weight", "layers.0.self_attn.v_proj.weight")
    norm, v_proj = (weights[name].double() for name in names)
    x = weights["embed_tokens.weight"].double()[ids[0]]
    values = torch.nn.functional.rms_norm(x, (config.dim,), norm, config.norm_eps) @ v_proj.T
    assert (got - values).norm() <= 1e-5 * values.norm()
    with torch.no_grad():
        logits = torch.nn.functional.linear(exact.hidden(ids), exact.head_weight())
    assert logits[0].argmax(-1).tolist() == tokens


@pytest.mark.parametrize("tiles", [False, True])
def test_a_wait_that_does_not_end_times_out(tiles):
    engine = CudaEngine(TILED_WIDE, weights_of(TILED_WIDE), "cuda")
    packed = engine._pack()
    kernel = TextKernel(TILED_WIDE, packed, grid=Grid(1, 2, tiles=tiles))
    memory = Memory.of(TILED_WIDE, packed, 1, TILED_WIDE.max_seq_len)
    text = Text(kernel, memory.keys, memory.values, 20_000_000)
    expected = launched(kernel, TILED_WIDE, packed, 30)[0]
    kernel.ctas = 1  # the other half of every stage never comes
    text.launch([Row(0, 3, 0, 30)])
    with pytest.raises(EngineTimeout, match="timed out"):
        text.finish([0])
    kernel.ctas = 2
    text.launch([Row(0, 3, 0, 30)])
    assert ended(text, 1) == [expected]


def test_ten_thousand_texts_are_the_same():
    engine = CudaEngine(SMALL, weights_of(SMALL), "cuda")
    packed = engine._pack()
    memory = Memory.of(SMALL, packed, 1, SMALL.max_seq_len)
    text = Text(TextKernel(SMALL, packed), memory.keys, memory.values)
    expected = None
    for _ in range(10_000):
        text.launch([Row(0, 3, 0, 8)])
        result = ended(text, 1)
        assert expected is None or result == expected
        expected = result


@pytest.mark.parametrize("at_once", [1, 5, 60])
def test_delays_change_no_token(at_once):
    """Each warp sleeps for up to 20 us now and then. Drawn tokens, and of several greedy ones and
    penalised ones beside them."""
    config = SMALL.with_(
        dim=96, n_heads=4, head_dim=24, n_kv_heads=2, hidden_dim=160, vocab_size=500, max_seq_len=40
    )
    packed = CudaEngine(config, weights_of(config), "cuda")._pack()
    sms = limits_of(torch.device("cuda")).multiprocessors
    wide = preset("stories110m")  # whose grids have many CTAs
    grid = grid_for(wide, torch.bfloat16, at_once, sms)
    by = MIXED[2:3] if at_once == 1 else MIXED
    requests = [Request(i, [3 + i], 30, by[i % len(by)]) for i in range(at_once)]
    shape = (config.n_layers, at_once, config.n_kv_heads, 40, config.head_dim)

    def written(kernel, times):
        keys, values = (packed.embedding.new_zeros(shape) for _ in range(2))
        text = Text(kernel, keys, values)
        for _ in range(times):
            for i, request in enumerate(requests):
                text.prepare(i, i, request, 30)
            text.launch([Row(i, 3 + i, 0, 30) for i in range(at_once)])
            yield ended(text, at_once)
        text.close()

    (expected,) = written(TextKernel(config, packed, grid=grid, draws=True), 1)
    assert all(len(tokens) == 30 for tokens, _, _ in expected)
    for result in written(TextKernel(config, packed, None, grid, True, delays_ns=20_000), 30):
        assert result == expected


def test_tokens_are_there_as_they_come():
    engine = CudaEngine(WIDE, weights_of(WIDE), "cuda")
    packed = engine._pack()
    memory = Memory.of(WIDE, packed, 1, WIDE.max_seq_len)
    text = Text(TextKernel(WIDE, packed), memory.keys, memory.values)
    text.launch([Row(0, 3, 0, 1000)])
    text.wait_for_one([0])
    early, _ = text.arrived(0)
    ((tokens, logprobs, _),) = ended(text, 1)
    assert 1 <= len(early) < len(tokens) == 1000
    assert tokens[: len(early)] == early
    assert text.arrived(0, 990) == (tokens[990:], logprobs[990:])
    text.close()


def test_a_text_takes_few_launches():
    engine = CudaEngine(WIDE, weights_of(WIDE), "cuda")
    requests = [Request(0, [1, 2, 3], 200)]
    for _ in range(3):  # kernels, graphs and a token's time are known
        run(engine, requests, 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(engine, requests, 1)
    kernels = [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    assert 1 <= sum("write_text" in name for name in kernels) <= 8
    # the prompt's forward, and copies
    assert len(kernels) <= 8 + 7 * WIDE.n_layers + 20, kernels


def test_a_token_has_a_timeline():
    config = preset("stories15m").with_(n_layers=2)
    spans = trace_text(config, weights_of(config), [1, 2, 3], torch.bfloat16, torch.device("cuda"))
    assert {span.layer for span in spans if span.kind == "down"} == {0, 1}
    assert all(span.began <= span.ready <= span.ended for span in spans)
    took = max(span.ended for span in spans) - min(span.began for span in spans)
    assert 1_000 < took < 1_000_000


def test_a_stop_id_ends_it_at_once():
    tokens = [event.token for event in events_of(WIDE, 60)[1]]
    stop = tokens[40]
    _, ended = events_of(WIDE, 60, stop_ids=(stop,))
    assert [event.token for event in ended] == [*tokens[: tokens.index(stop)], None]
    assert ended[-1].finish == "stop"


SEVERAL_SHAPES = {
    name: config
    for name, config in CONFIGS.items()
    if why_not(config, torch.device("cuda"), torch.bfloat16, FEW) is None
}


def several_of(config, context, at_once):
    if reason := why_not(config, torch.device("cuda"), torch.bfloat16, at_once):
        pytest.skip(reason)
    return config.with_(max_seq_len=context)


@pytest.mark.parametrize("at_once", [FEW, 10, 64])
@pytest.mark.parametrize("config", SEVERAL_SHAPES.values(), ids=SEVERAL_SHAPES)
def test_several_texts_are_the_same_alone_and_among_others(config, at_once):
    config = several_of(config, 300, at_once)
    engine = CudaEngine(config, weights_of(config), "cuda", fusion_depth="text")
    generator = torch.Generator().manual_seed(3)
    prompts = torch.randint(config.vocab_size, (11, 30), generator=generator).tolist()
    requests = [
        Request(i, prompt[: 1 + 2 * i], 40 + 20 * i, Sampling(), logprobs=True)
        for i, prompt in enumerate(prompts)
    ]
    together = run(engine, requests, at_once)  # of few, three wait
    assert run(engine, requests, at_once) == together
    for request in requests[::4]:
        assert run(engine, [request], at_once)[request.id] == together[request.id]
    if at_once == FEW:
        assert run(engine, requests[:3], 3) == {i: together[i] for i in range(3)}


@pytest.mark.parametrize("at_once", [FEW, 24, 64])
@pytest.mark.parametrize("config", SEVERAL_SHAPES.values(), ids=SEVERAL_SHAPES)
def test_logprobs_of_several_are_as_exact_as_pytorchs(config, at_once):
    config = several_of(config, 128, at_once)
    weights = weights_of(config)
    engine = CudaEngine(config, weights, "cuda", fusion_depth="text")
    session = engine.session(at_once)
    generator = torch.Generator().manual_seed(4)
    prompts = torch.randint(config.vocab_size, (at_once, 20), generator=generator).tolist()
    for i, prompt in enumerate(prompts):
        session.submit(Request(i, prompt, 60, Sampling(), logprobs=True))
    events = []
    while sum(event.finish is not None for event in events) < at_once:
        events += session.step()
    session.close()
    for i, prompt in list(enumerate(prompts))[:: at_once // 8]:
        assert_as_exact(config, weights, prompt, [event for event in events if event.id == i])


def test_who_asks_for_it_is_told_why_it_is_not_there():
    config = SMALL.with_(hidden_dim=SMALL.hidden_dim + 1)
    engine = CudaEngine(config, weights_of(config), "cuda", "float32", "text")
    with pytest.raises(BadInput, match="widths"):
        engine.session(1)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.8, seed=3),
        Sampling(1.1, top_p=0.9),
        Sampling(1.2, 20, 0.9, 0.01),
        Sampling(1.0, 5),
        Sampling(1.0, top_p=0.9, repetition_penalty=1.3),
        Sampling(repetition_penalty=1.5),
    ],
)
def test_drawn_texts_are_those_of_the_reference(sampling, monkeypatch):
    """In float32, where both draw by the same random numbers, here both in the order of ids; a
    weight is rounded to 2^-28."""
    monkeypatch.setattr(session, "draw", drawn_in_order)
    weights = weights_of(WIDE)
    engine = CudaEngine(WIDE, weights, "cuda", "float32", "text")
    request = Request(0, [1, 2, 3], 200, sampling, logprobs=True)
    drawn = run(engine, [request], 1)
    assert run(engine, [request], 1) == drawn
    reference = run(engine._by_pytorch(), [request], 1)
    tokens, expected = drawn[0][0], reference[0][0]
    assert sum(a == b for a, b in zip(tokens, expected, strict=True)) >= 150


@pytest.mark.parametrize("at_once", [FEW, 64])
@pytest.mark.parametrize("config", SEVERAL_SHAPES.values(), ids=SEVERAL_SHAPES)
def test_several_are_drawn_each_by_its_own_filters(config, at_once):
    """The same alone and among others, greedy ones too, and from run to run; a penalty leaves no
    token the same for long."""
    config = several_of(config, 300, at_once)
    engine = CudaEngine(config, weights_of(config), "cuda", fusion_depth="text")
    generator = torch.Generator().manual_seed(5)
    prompts = torch.randint(config.vocab_size, (12, 30), generator=generator).tolist()
    requests = [
        Request(i, prompt[: 2 + 2 * i], 90, MIXED[i % len(MIXED)], logprobs=True)
        for i, prompt in enumerate(prompts)
    ]
    together = run(engine, requests, at_once)
    assert run(engine, requests, at_once) == together
    for request in requests[:6]:
        assert run(engine, [request], at_once)[request.id] == together[request.id]
    unpenalised = run(engine, [replace(requests[4], sampling=Sampling())], at_once)
    if config.vocab_size < 1000:  # a larger one repeats too little in 90 tokens
        assert unpenalised[4] != together[4]


def drawn_in_order(logits_V, sampling, uniform_1):
    """An id by a random number, from the distribution over ids in their order."""
    probabilities = kept(logits_V.double(), sampling)
    up_to = probabilities.cumsum(0)
    return torch.searchsorted(up_to, uniform_1.double() * up_to[-1], right=True)


@pytest.mark.usefixtures("by_tiles")
@pytest.mark.parametrize("at_once", [1, FEW, 64])
def test_drawn_tokens_have_the_references_distribution(at_once):
    """A chi-square test of first tokens: 4,000 texts of different seeds."""
    config = SMALL.with_(
        dim=64, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=96, vocab_size=160
    )
    weights = weights_of(config)
    engine = CudaEngine(config, weights, "cuda", fusion_depth="text")
    sampling = Sampling(1.5, top_p=0.95)
    counts = torch.zeros(config.vocab_size, dtype=torch.float64)
    session = engine.session(at_once)
    for seed in range(4000):
        session.submit(Request(seed, [1, 2], 1, replace(sampling, seed=seed)))
    done = 0
    while done < 4000:
        for event in session.step():
            counts[event.token] += 1
            done += 1
    session.close()
    # of the same bfloat16: another rounding may keep a token more, or less
    narrow = Model.from_weights(config, {name: w.bfloat16() for name, w in weights.items()})
    with torch.no_grad():
        x = narrow.hidden(torch.tensor([[1, 2]]))
        logits = torch.nn.functional.linear(x, narrow.head_weight())[0, -1].double()
    expected = 4000 * kept(logits, sampling)
    assert counts[expected == 0].sum() <= 60
    seen = expected > 0
    chi_square = ((counts - expected)[seen] ** 2 / expected[seen]).sum()
    freedom = int(seen.sum()) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5  # some five standard deviations


def test_pytorch_writes_while_kernels_are_compiled(tmp_path, monkeypatch):
    """What begins before they are there has its first token soon, and what begins later is what
    they write."""
    config = preset("stories15m").with_(n_layers=2, max_seq_len=100)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    compiled = nvrtc.compiled

    def slowly(*of):
        time.sleep(3)
        return compiled(*of)

    monkeypatch.setattr(nvrtc, "compiled", slowly)
    weights, store, lines = weights_of(config), Store(tmp_path / "store"), []
    engine = CudaEngine(config, weights, "cuda", log=lines.append, store=store, meanwhile=True)
    by_pytorch = run(engine._by_pytorch(), [Request(0, [1, 2, 3], 20)], 1)
    session = engine.session(1)
    start = time.perf_counter()
    session.submit(Request(0, [1, 2, 3], 20))
    events = list(session.step())
    assert events
    assert time.perf_counter() - start < 5.0  # some 0.5 s on a quiet machine
    while events[-1].finish is None:
        events += session.step()
    session.close()
    assert [event.token for event in events] == by_pytorch[0][0]
    assert any("compil" in line for line in lines)
    engine._sessions._compiled.result(timeout=60)
    later = [Request(1, [1, 2], 20)]
    assert run(engine, later, 1) == run(CudaEngine(config, weights, "cuda", store=store), later, 1)


@pytest.mark.skipif(not (WEIGHTS / "stories260K.bin").exists(), reason="no trained model here")
def test_a_known_text():
    loaded = load(str(WEIGHTS / "stories260K.bin"))
    expected = [int(i) for i in (WEIGHTS / "stories260K_greedy_ids_n256.txt").read_text().split()]
    engine = CudaEngine(loaded.config, loaded.weights, "cuda", "float32", "text")
    assert generate_ids(engine, [[1]], 256, Sampling()) == [expected]
