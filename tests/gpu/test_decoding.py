"""Generation by the CUDA engine in bfloat16; the engines' shared suite has it in float32
(test_cuda_engine.py)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from onelaunch.config import preset
from onelaunch.engines.engine import Request, Sampling
from onelaunch.model import KVCache, Model
from tests.engines.suite import (
    SHAPES,
    SMALL,
    YARN,
    by_request,
    exact_logits,
    relative_error,
    run,
    weights_of,
)

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from onelaunch.engines.cuda.decoding import grids
from onelaunch.engines.cuda.decoding.prefill import CHUNK, Prompts
from onelaunch.engines.cuda.engine import CudaEngine
from onelaunch.engines.cuda.pack import pack

CUDA = torch.device("cuda", 0)
LONGER = SMALL.with_(max_seq_len=400)
LONGEST = SMALL.with_(max_seq_len=8192, hidden_dim=64)  # several in one launch have widths of 32
PROMPTS = {
    **SHAPES,
    "yarn": YARN,
    "heads of 48": preset("stories15m").with_(n_layers=2),
    "grouped heads of 64": preset("llama-3.2-1b").with_(
        n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=4100
    ),
    "norms of heads of 128": preset("qwen3-0.6b").with_(
        n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=4100
    ),
}
LENGTHS = (CHUNK - 1, CHUNK, CHUNK + 1, 4 * CHUNK + 1, 5000)


def requests_of(n, length, new, sampling):
    generator = torch.Generator().manual_seed(7)
    prompts = torch.randint(SMALL.vocab_size, (n, length), generator=generator).tolist()
    return [
        Request(i, prompt[: 1 + 3 * i], new, sampling, logprobs=True)
        for i, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("max_batch", [8, 16, 64])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.1, top_k=20, top_p=0.9, min_p=0.01)])
def test_a_text_is_the_same_each_time_alone_and_among_others(sampling, max_batch):
    engine = CudaEngine(LONGER, weights_of(LONGER), "cuda")
    requests = requests_of(5, 40, 330, sampling)  # beyond the first context of a graph
    together = run(engine, requests, max_batch)
    assert run(engine, requests, max_batch) == together
    for request in requests[::2]:
        assert run(engine, [request], max_batch)[request.id] == together[request.id]
    # with less room: the others wait
    assert run(engine, requests, 2) == run(engine, requests[::-1], 2)


@pytest.mark.parametrize("max_batch", [1, 8, 16, 64])
@pytest.mark.parametrize("temperature", [0.0, 1.1])
def test_a_repetition_penalty_alone_and_among_others(temperature, max_batch):
    """A request's tokens are the same where others have a penalty, or none, and where some leave:
    graphs of both kinds follow one another."""
    engine = CudaEngine(LONGER, weights_of(LONGER), "cuda")
    plain = requests_of(6, 40, 300, Sampling(temperature, top_k=30, seed=1))
    requests = [
        replace(
            each,
            max_new_tokens=40 + 50 * each.id,
            sampling=replace(each.sampling, repetition_penalty=penalty),
        )
        for each, penalty in zip(plain, [1.0, 1.3, 1.0, 0.7, 1.3, 1.0], strict=True)
    ]
    together = run(engine, requests, max_batch)
    assert run(engine, requests, max_batch) == together
    assert run(engine, requests[::-1], max_batch) == together
    for request in requests:
        alone = run(engine, [request], max_batch)[request.id]
        assert alone == together[request.id]
        free = replace(request, sampling=replace(request.sampling, repetition_penalty=1.0))
        same = run(engine, [free], max_batch)[request.id] == alone
        assert same == (not request.sampling.penalises)
    # room for one at a time: a slot's table is that of its sequence alone
    assert run(engine, requests, 1) == run(engine, requests[::-1], 1)


def test_rows_without_a_penalty_have_the_same_bits_among_rows_with_one():
    """Tokens and logprobs, drawn with filters, of vocabularies that one block holds or does not."""
    for vocab_size in (4096, 40_000):
        config = SMALL.with_(vocab_size=vocab_size, max_seq_len=64)
        engine = CudaEngine(config, weights_of(config), "cuda")
        sampling = Sampling(1.2, top_k=300, top_p=0.95, seed=2)
        requests = [Request(i, [i + 1], 60, sampling, logprobs=True) for i in range(4)]
        other = Request(9, [3], 60, replace(sampling, repetition_penalty=1.3))
        events = []
        for batch in (requests, [other, *requests]):
            session = engine.session(8)
            for request in batch:
                session.submit(request)
            found = []
            while sum(event.finish is not None for event in found) < len(batch):
                found += session.step()
            session.close()
            events.append([[e for e in found if e.id == request.id] for request in requests])
        assert events[0] == events[1]


@pytest.mark.parametrize("max_batch", [1, 16])
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_logprobs_are_as_exact_as_pytorchs(config, max_batch):
    """Over 80 steps: keys and values of all positions, prompt and text."""
    config = config.with_(max_seq_len=128)
    weights = weights_of(config)
    engine = CudaEngine(config, weights, "cuda")
    session = engine.session(max_batch, 128)
    prompt = torch.randint(config.vocab_size, (20,), generator=torch.manual_seed(1)).tolist()
    session.submit(Request(0, prompt, 80, Sampling(1.0, seed=2), logprobs=True))
    events = []
    while not events or events[-1].finish is None:
        events += session.step()
    session.close()
    new = [event.token for event in events]
    tokens = torch.tensor([prompt + new[:-1]])
    narrow = Model.from_weights(config, {name: w.bfloat16() for name, w in weights.items()})
    with torch.no_grad():
        plain = torch.nn.functional.linear(narrow.hidden(tokens), narrow.head_weight())
    chosen = torch.tensor(new)[:, None]

    def logprobs(logits_1SV):
        rows = logits_1SV[0, len(prompt) - 1 :].double().log_softmax(-1)
        return rows.gather(1, chosen)[:, 0]

    exact = logprobs(exact_logits(config, weights, tokens))
    allowed = 1.5 * (logprobs(plain) - exact).norm()
    got = torch.tensor([event.logprob for event in events]).double()
    assert (got - exact).norm() <= allowed


def test_memory_goes_at_close():
    engine = CudaEngine(LONGER, weights_of(LONGER), "cuda")
    first = engine.session(64, 400)
    first.submit(Request(0, [1, 2], 3))
    first.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    first.close()
    assert torch.cuda.memory_allocated() < before - 64 * 400 * LONGER.kv_dim


def test_memory_of_a_text_goes_at_close():
    engine = CudaEngine(LONGER, weights_of(LONGER), "cuda")
    first = engine.session(1, 400)
    first.submit(Request(0, [1, 2], 3))
    while not first.step():
        pass
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    first.close()
    cache = 2 * LONGER.n_layers * 400 * LONGER.kv_dim * 2
    assert torch.cuda.memory_allocated() <= before - cache


def ids_of(config, n, seed=1):
    generator = torch.Generator().manual_seed(1000 * seed + n)
    return torch.randint(config.vocab_size, (n,), generator=generator).tolist()


@torch.no_grad()
def by_pytorch(config, weights, ids, dtype):
    """The last position's logits, (V,), and keys and values, (L, K, N, E), as the cache has them:
    the elements of a rotary pair are neighbours."""
    model = Model.from_weights(config, {name: w.to(dtype) for name, w in weights.items()})
    device = model.norm.weight.device
    cache = KVCache(config, 1, len(ids), device, dtype)
    hidden_1ND = model.hidden(torch.tensor([ids], device=device), cache)
    keys, values = (torch.cat(each) for each in (cache.keys, cache.values))
    if config.rope_layout == "half":
        keys = keys.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return F.linear(hidden_1ND[0, -1], model.head_weight()), keys, values


def in_cache(config, prompts, dtype, ids, slot, context):
    """The same of a prompt that is read in chunks, into a slot of a cache that is NaN elsewhere."""
    shape = (2, config.n_layers, 3, config.n_kv_heads, context, config.head_dim)
    caches = torch.full(shape, float("nan"), dtype=dtype, device=CUDA)
    keys, values = (cache[:, slot] for cache in caches)
    reading, steps = prompts.begin(ids, caches, slot, with_logits=True), 1
    while not reading.step():
        steps += 1
    assert steps == -(-len(ids) // prompts.chunk)
    logits_V = reading.logits[0].clone()
    for cache in caches:
        written = torch.zeros(cache.shape, dtype=torch.bool, device=CUDA)
        written[:, slot, :, : len(ids)] = True
        assert torch.equal(cache.isnan(), ~written)
    return logits_V, keys[:, :, : len(ids)], values[:, :, : len(ids)]


def longer(config):
    return config.with_(max_seq_len=8192)


@pytest.mark.parametrize("config", map(longer, PROMPTS.values()), ids=PROMPTS)
def test_prompts_are_as_exact_as_pytorchs_in_any_number_of_chunks(config):
    """Their logits, keys and values: launched, captured and replayed they have the same bits."""
    weights = {name: w.cuda() for name, w in weights_of(config).items()}
    prompts = Prompts(config, pack(config, weights, torch.bfloat16, CUDA))
    squares = torch.zeros(2, dtype=torch.float64)
    for n in LENGTHS:
        ids = ids_of(config, n)
        exact = by_pytorch(config, weights, ids, torch.float64)
        plain = by_pytorch(config, weights, ids, torch.bfloat16)
        got = in_cache(config, prompts, torch.bfloat16, ids, 1, n)
        for slot, context in ((0, n + 1), (2, 8192)):
            again = in_cache(config, prompts, torch.bfloat16, ids, slot, context)
            assert all(torch.equal(a, b) for a, b in zip(again, got, strict=True))
        for kind, *each in zip(("keys", "values"), got[1:], plain[1:], exact[1:], strict=True):
            error, allowed = (relative_error(tensor, each[2]) for tensor in each[:2])
            assert error <= 1.5 * allowed, (n, kind)
        squares += torch.tensor(
            [relative_error(tensor[0], exact[0]) ** 2 for tensor in (got, plain)]
        )
    # one row of each prompt: the error of so few is within a factor of two, not of 1.5
    assert squares[0] <= 4 * squares[1]


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", ["plain", "qk-norm-wide-heads", "heads of 48"])
def test_float32_prompts_are_exact_in_any_number_of_chunks(name, n):
    config = longer(PROMPTS[name])
    weights = {name: w.cuda() for name, w in weights_of(config).items()}
    prompts = Prompts(config, pack(config, weights, torch.float32, CUDA))
    ids = ids_of(config, n)
    exact = by_pytorch(config, weights, ids, torch.float64)
    got = in_cache(config, prompts, torch.float32, ids, 0, n)
    for tensor, expected in zip(got, exact, strict=True):
        assert relative_error(tensor, expected) < 2e-5


@pytest.mark.parametrize("n", [20, 100, 400])
def test_prompts_that_one_forward_reads_have_the_same_bits_as_alone(n):
    config = longer(SMALL)
    packed = pack(config, weights_of(config), torch.bfloat16, CUDA)
    prompts = Prompts(config, packed)
    ids = [ids_of(config, n + i) for i in range(prompts.at_once(n))]
    shape = (2, config.n_layers, len(ids), config.n_kv_heads, 512, config.head_dim)
    for _ in range(3):  # launched, captured and replayed
        cache = torch.full(shape, float("nan")).bfloat16().cuda()
        first, *others = [
            prompts.begin(each, cache, slot, with_logits=False) for slot, each in enumerate(ids)
        ]
        assert all(first.reads_with(other, len(ids)) for other in others)
        assert first.step(others)
        for slot, each in enumerate(ids):
            alone = torch.full((*shape[:2], 1, *shape[3:]), float("nan")).bfloat16().cuda()
            assert prompts.begin(each, alone, 0, with_logits=False).step()
            got, expected = cache[:, :, slot], alone[:, :, 0]
            assert torch.equal(got[..., : len(each), :], expected[..., : len(each), :])
            assert got[..., len(ids[-1]) :, :].isnan().all()


def test_prompts_that_take_turns_have_the_same_bits_as_alone():
    config = longer(SMALL)
    packed = pack(config, weights_of(config), torch.bfloat16, CUDA)
    prompts = Prompts(config, packed)
    both = [ids_of(config, n) for n in (3000, 1100)]
    alone = [in_cache(config, prompts, torch.bfloat16, ids, 0, 3000) for ids in both]
    shape = (2, config.n_layers, 2, config.n_kv_heads, 3001, config.head_dim)
    keys, values = cache = torch.full(shape, float("nan")).bfloat16().cuda()
    readings = [prompts.begin(ids, cache, slot, with_logits=True) for slot, ids in enumerate(both)]
    ended = {}
    while len(ended) < 2:
        for slot, reading in enumerate(readings):
            if slot not in ended and reading.step():
                ended[slot] = reading.logits[0].clone()
    for slot, ids in enumerate(both):
        assert torch.equal(ended[slot], alone[slot][0])
        assert torch.equal(keys[:, slot, :, : len(ids)], alone[slot][1])
        assert torch.equal(values[:, slot, :, : len(ids)], alone[slot][2])


def engine_of(depth, max_batch, dtype="bfloat16"):
    """One whose sessions of so many sequences are of a form; skips where there is none."""
    reason = grids.why_not(LONGEST, CUDA, getattr(torch, dtype), max_batch)
    if depth == "text" and reason:
        pytest.skip(reason)
    return CudaEngine(LONGEST, weights_of(LONGEST), "cuda", dtype, depth)


@pytest.mark.parametrize(
    ("depth", "max_batch"), [("stage", 4), ("stage", 16), ("text", 4)], ids=str
)
def test_a_long_prompt_beside_a_sequence_that_grows(depth, max_batch):
    """The others' tokens and logprobs do not change, and come between its chunks."""
    engine = engine_of(depth, max_batch)
    requests = [
        Request(0, ids_of(LONGEST, 9), 1500, logprobs=True),
        Request(1, ids_of(LONGEST, 5000), 60, logprobs=True),
        Request(2, ids_of(LONGEST, 1300), 60, logprobs=True),
        Request(3, ids_of(LONGEST, 40), 60, logprobs=True),
    ]

    def submitted(requests):
        session = engine.session(max_batch)
        session.submit(requests[0])
        events = session.step()
        while not events:
            events += session.step()
        for request in requests[1:]:
            session.submit(request)
        between = 0
        while len(by_request(events)) < len(requests):
            first = any(event.id == 1 for event in events)
            events += (more := session.step())
            between += not first and any(event.id == 0 for event in more)
        session.close()
        return [[event for event in events if event.id == each.id] for each in requests], between

    together, between = submitted(requests)
    assert between >= 5000 // CHUNK
    for request, events in zip(requests, together, strict=True):
        assert submitted([request])[0] == [events]
    assert submitted(requests)[0] == together


@pytest.mark.parametrize(("depth", "max_batch"), [("text", 1), ("stage", 1), ("stage", 16)])
def test_texts_of_long_prompts_are_the_most_likely_ones(depth, max_batch):
    """In float32, of as many positions as a session has at most."""
    engine = engine_of(depth, max_batch, "float32")
    prompt = ids_of(LONGEST, 5000)
    new = 8192 - len(prompt) + 1
    tokens, finish = run(engine, [Request(0, prompt, 9999)], max_batch)[0]
    assert (len(tokens), finish) == (new, "length")
    weights = {name: w.cuda() for name, w in weights_of(LONGEST).items()}
    ids = torch.tensor([[*prompt, *tokens[:-1]]], device=CUDA)
    with torch.no_grad():
        best = exact_logits(LONGEST, weights, ids)[0, len(prompt) - 1 :].argmax(-1)
    assert (best.cpu() == torch.tensor(tokens)).double().mean() > 0.99  # but for ties


@pytest.mark.parametrize(("depth", "max_batch"), [("stage", 2), ("text", 2)])
def test_a_request_leaves_in_mid_prompt_and_its_slot_is_free(depth, max_batch):
    engine = engine_of(depth, max_batch)
    first, third = Request(0, [1, 2], 900), Request(2, ids_of(LONGEST, 700), 30)
    expected = run(engine, [first], max_batch) | run(engine, [third], max_batch)
    session = engine.session(max_batch)
    session.submit(first)
    events = session.step()
    while not events:
        events += session.step()
    session.submit(Request(1, ids_of(LONGEST, 8000), 30))
    session.submit(third)
    for _ in range(3):  # of sixteen chunks some are read
        events += session.step()
    session.cancel(1)
    while len(by_request(events)) < 3:
        events += session.step()
    session.close()
    found = by_request(events)
    assert found.pop(1) == ([], "cancelled")
    assert found == expected
