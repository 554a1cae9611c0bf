"""Prompts in chunks, and one more token, stage by stage, through Triton's interpreter on CPU
tensors. Run by test_interpreter.py in a process of its own."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext

assert "triton" not in sys.modules, "too late: Triton was imported before this"
os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

from onelaunch.config import YarnRopeScaling  # noqa: E402
from onelaunch.engines.cuda import engine as engine_module  # noqa: E402
from onelaunch.engines.cuda import sync  # noqa: E402
from onelaunch.engines.cuda.blocking import padded  # noqa: E402
from onelaunch.engines.cuda.decoding import chain, prompt_kernels, sampling  # noqa: E402
from onelaunch.engines.cuda.decoding.chain import Memory, TokenChain  # noqa: E402
from onelaunch.engines.cuda.decoding.prefill import Prompts  # noqa: E402
from onelaunch.engines.cuda.decoding.session import CudaSession  # noqa: E402
from onelaunch.engines.cuda.engine import CudaEngine  # noqa: E402
from onelaunch.engines.cuda.pack import pack  # noqa: E402
from onelaunch.engines.engine import Request, Sampling  # noqa: E402
from onelaunch.engines.reference import ReferenceEngine  # noqa: E402
from onelaunch.engines.sampling import _keep_likely, float32_penalty, penalised  # noqa: E402
from onelaunch.generation.decode import generate_ids  # noqa: E402
from tests.engines.suite import (  # noqa: E402
    SMALL,
    by_request,
    exact_logits,
    finished,
    relative_error,
    run,
    weights_of,
)
from tests.interpreting import mend_loop_bounds  # noqa: E402

CPU = torch.device("cpu")

mend_loop_bounds()


class Rows:
    """Sequences that are read a token at a time, in slots that are not their rows."""

    def __init__(self, config, dtype, n, length, context=None, seen=None):
        self.packed = pack(config, weights_of(config), dtype, CPU)
        self.memory = Memory.of(config, self.packed, n, context or config.max_seq_len)
        rows = len(self.memory.slots)
        self.chain = TokenChain(config, self.packed, self.memory, rows, length, seen)
        self.memory.slots[:n] = torch.arange(n).flip(0)
        for cache in (self.memory.keys, self.memory.values):
            cache.fill_(float("nan"))  # what is not written is not read
        self.n = n

    def step(self, token_B, position_B):
        """The logits of one token of each row."""
        slots = self.memory.slots[: self.n].long()
        self.memory.positions[slots] = torch.as_tensor(position_B, dtype=torch.int32)
        self.memory.x[: self.n] = self.packed.embedding[torch.as_tensor(token_B)]
        for call in self.chain.calls[:-1]:
            call()
        return self.memory.logits[: self.n].clone()


def tokens_of(config, batch, length):
    generator = torch.Generator().manual_seed(batch * 100 + length)
    return torch.randint(config.vocab_size, (batch, length), generator=generator)


TINY = SMALL.with_(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, hidden_dim=24)
KINDS = {
    "grouped heads": TINY,
    "norms of heads": TINY.with_(
        qk_norm=True, n_kv_heads=2, rope_layout="half", rope_scaling=YarnRopeScaling(4.0, 8)
    ),
    "two layers": TINY.with_(n_layers=2, head_dim=12, tied_embeddings=False),
}


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_logits_of_a_token_are_the_models(config, dtype):
    tokens = tokens_of(config, 3, 4)
    exact = exact_logits(config, weights_of(config), tokens)
    rows = Rows(config, dtype, 3, 4)
    got = torch.stack([rows.step(tokens[:, i], [i] * 3) for i in range(4)], 1)
    assert relative_error(got, exact) < (2e-6 if dtype == torch.float32 else 3e-3)


def test_a_context_of_several_chunks(monkeypatch):
    monkeypatch.setattr(chain, "CHUNK_NUMBERS", 64)  # chunks of 4
    tokens = tokens_of(TINY, 2, 10)
    exact = exact_logits(TINY, weights_of(TINY), tokens)
    rows = Rows(TINY, torch.float32, 2, 10)
    for i in range(10):
        at = [i, max(0, i - 3)]  # one row lags behind
        got = rows.step([tokens[0, at[0]], tokens[1, at[1]]], at)
        for row in range(2):
            assert relative_error(got[row], exact[row, at[row]]) < 2e-6


def test_a_rows_bits_do_not_depend_on_the_others():
    tokens = tokens_of(TINY, 3, 3)
    together, alone = Rows(TINY, torch.float16, 3, 3), Rows(TINY, torch.float16, 1, 3)
    for i in range(3):
        got = together.step(tokens[:, i], [i] * 3)
        assert torch.equal(got[1], alone.step(tokens[1:2, i], [i])[0])


FILTERS = [
    Sampling(1.0),
    Sampling(0.7, top_k=3),
    Sampling(1.3, top_p=0.7),
    Sampling(1.0, min_p=0.2),
    Sampling(1.5, top_k=9, top_p=0.8, min_p=0.05),
]


def drawn(logits_V, sampling, uniforms):
    """The tokens that numbers draw, in the order of ids, and where they are far from another."""
    weights = torch.zeros(len(logits_V))
    ids_C, weights_C = _keep_likely(
        torch.exp((logits_V - logits_V.max()) / sampling.temperature), sampling
    )
    weights[ids_C] = weights_C
    reached = torch.cumsum(weights.double() / weights.double().sum(), 0)
    expected = torch.searchsorted(reached, uniforms.double(), right=True)
    clear = (reached[None] - uniforms[:, None].double()).abs().min(1).values > 1e-6
    return expected, clear


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("block", [16, 64])
def test_a_uniform_number_draws_from_the_kept_tokens(filters, block, monkeypatch):
    """Each kept token for as much of 0 to 1 as its share, in the order of ids; of equal ones the
    lower ids are kept."""
    monkeypatch.setattr(chain, "SAMPLE_BLOCK", block)
    V, n, at_once = TINY.vocab_size, 24, chain.ROWS  # more rows have the forward's logits
    rows = Rows(TINY, torch.float32, at_once, 4)
    memory, generator = rows.memory, torch.Generator().manual_seed(3)
    logits_V = 2 * torch.randn(V, generator=generator)
    logits_V[[5, 9, 20, 33]] = logits_V.sort().values[-3]  # ties
    uniforms = (torch.arange(n) + 0.5) / n
    expected, clear = drawn(logits_V, filters, uniforms)
    for first in range(0, n, at_once):
        these = slice(first, first + at_once)
        memory.logits[:] = logits_V
        memory.whole[:, sampling.COUNT] = 0
        memory.whole[:, sampling.FINISH] = sampling.GROWING
        memory.whole[:, sampling.LIMIT] = 9
        memory.whole[:, sampling.DRAWN] = 1
        memory.whole[:, sampling.TOP_K] = filters.top_k
        for column, value in enumerate((filters.temperature, filters.top_p, filters.min_p)):
            memory.fraction[:, column] = value
        memory.positions.zero_()
        slots = memory.slots[:at_once].long()
        memory.uniforms[slots, 0] = uniforms[these]
        rows.chain.sample()
        got = memory.tokens[slots, 0]
        assert torch.equal(got[clear[these]], expected.int()[these][clear[these]])
        logprobs = logits_V.log_softmax(-1)[got.long()]
        assert torch.allclose(memory.logprobs[slots, 0], logprobs, atol=1e-5)
        assert torch.equal(memory.x[:at_once], rows.packed.embedding[got.long()])


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("how", [Sampling(), Sampling(1.2, top_k=9)], ids=str)
def test_a_repetition_penalty_is_for_the_rows_that_have_one(how, block, monkeypatch):
    """A penalty in every other slot. The others' tokens and logprobs have the same bits as without
    a table of what was seen; the chosen ones are seen from then on."""
    monkeypatch.setattr(chain, "SAMPLE_BLOCK", block)
    V, penalties = TINY.vocab_size, [3.0, 1.0, 1e-40, 1.0]
    n = len(penalties)
    generator = torch.Generator().manual_seed(4)
    logits_BV = 2 * torch.randn(n, V, generator=generator)
    logits_BV[:, 11] = 0.0
    before = (torch.rand(n + 1, V, generator=generator) < 0.4).to(torch.int32)
    before[torch.arange(n).flip(0), logits_BV.argmax(1)] = 1  # by slots, which are not the rows
    uniforms = torch.rand(n, generator=generator)
    found, seen = [], before.clone()
    for table in (None, seen):
        rows = Rows(TINY, torch.float32, n, 4, seen=table)
        memory = rows.memory
        memory.logits[:] = logits_BV
        memory.whole[:n, sampling.FINISH] = sampling.GROWING
        memory.whole[:, sampling.LIMIT] = 9
        memory.whole[:, sampling.DRAWN] = int(not how.greedy)
        memory.whole[:, sampling.TOP_K] = how.top_k
        for slot, penalty in enumerate(penalties):
            numbers = how.temperature, how.top_p, how.min_p, float32_penalty(penalty)
            memory.fraction[slot] = torch.tensor(numbers)
        memory.uniforms[:n, 0] = uniforms
        rows.chain.sample()
        assert torch.equal(memory.logits, logits_BV)
        found.append((memory.tokens[:n, 0].clone(), memory.logprobs[:n, 0].clone()))
    slots = rows.memory.slots[:n].tolist()
    (plain_tokens, plain_logprobs), (tokens, logprobs) = found
    changed = 0
    for row, slot in enumerate(slots):
        token, penalty = tokens[slot].item(), penalties[slot]
        if penalty == 1.0:
            assert token == plain_tokens[slot]
            assert logprobs[slot] == plain_logprobs[slot]
        scores_V = penalised(logits_BV[row], before[slot].nonzero().flatten().tolist(), penalty)
        expected, clear = scores_V.argmax(), True
        if not how.greedy:
            (expected,), (clear,) = drawn(scores_V, how, uniforms[slot : slot + 1])
        assert token == expected or not clear
        assert torch.allclose(logprobs[slot], logits_BV[row].log_softmax(-1)[token], atol=1e-5)
        changed += token != plain_tokens[slot].item()
        before[slot, token] = 1
    assert changed
    assert torch.equal(seen, before)


@pytest.mark.parametrize(
    ("limit", "stop", "value", "finish", "count"),
    [
        (2, -1, 0.0, sampling.GROWING, 1),
        (1, -1, 0.0, sampling.FULL, 1),
        (2, 7, 0.0, sampling.STOPPED, 0),
        (2, -1, float("nan"), sampling.NOT_FINITE, 0),
        (2, -1, float("inf"), sampling.NOT_FINITE, 0),
    ],
)
def test_how_a_sequence_ends(limit, stop, value, finish, count):
    rows = Rows(TINY, torch.float32, 1, 4)
    memory = rows.memory
    memory.logits[0] = torch.linspace(0, 1, TINY.vocab_size)
    memory.logits[0, 7] = 2.0
    memory.logits[0, 3] += value
    memory.whole[0, sampling.FINISH] = sampling.GROWING
    memory.whole[0, sampling.LIMIT] = limit
    memory.stop[0, 5] = stop
    memory.positions[0] = 3
    for _ in range(2 if finish != sampling.GROWING else 1):  # what has ended stays as it is
        rows.chain.sample()
    assert memory.progress[0].tolist() == [count, finish]
    assert memory.positions[0] == 3 + (finish == sampling.GROWING)
    if count:
        assert memory.tokens[0, 0] == 7


@pytest.mark.parametrize("max_batch", [2, 9])
def test_a_session_writes_what_the_reference_engine_does(max_batch):
    """Seven requests, of which two or all have room; one ends at a stop id, one where its slot is
    full; some have a repetition penalty."""
    weights, max_len = weights_of(TINY), 12
    packed = pack(TINY, weights, torch.float32, CPU)
    reference = ReferenceEngine(TINY, weights, "cpu")
    prompts = tokens_of(TINY, 3, 6).tolist()
    plain = generate_ids(reference, prompts, 5, Sampling())
    requests = [
        Request(0, prompts[0], 5, stop_ids=[plain[0][3]], logprobs=True),
        Request(1, prompts[1], 99),
        Request(2, prompts[2], 2),
        Request(3, prompts[0], 6, Sampling(repetition_penalty=1.5), logprobs=True),
        Request(4, prompts[1], 4),
        Request(5, prompts[1], 6, Sampling(1.0, seed=2, repetition_penalty=0.6)),
        Request(6, prompts[2], 6, Sampling(repetition_penalty=1e9)),
    ]
    ends = []
    for session in (
        reference.session(max_batch, max_len),
        CudaSession(
            TINY, packed, Prompts(TINY, packed), nullcontext, max_batch, max_len, lambda line: None
        ),
    ):
        for request in requests:
            session.submit(request)
        ends.append(finished(session, len(requests)))
        session.close()
    assert ends[1] == ends[0]
    assert ends[0][1][1] == "length"
    assert len({*prompts[2], *ends[0][6][0]}) == len({*prompts[2]}) + 6
    assert ends[0][3][0] != generate_ids(reference, prompts[:1], 6, Sampling())[0]


def test_options_that_no_kernel_has_are_pytorchs_among_the_kernels_requests(monkeypatch):
    monkeypatch.setattr(engine_module, "why_not", lambda device, config: None)
    monkeypatch.setattr(CudaEngine, "_generates", lambda engine: True)
    weights = weights_of(TINY)
    engine = CudaEngine(TINY, weights, "cpu", "float32")
    reference = ReferenceEngine(TINY, weights, "cpu")
    prompt = tokens_of(TINY, 1, 6).tolist()[0]
    requests = [
        Request(0, prompt, 6),
        Request(1, prompt, 6, Sampling(frequency_penalty=2.0, presence_penalty=2.0)),
        Request(2, prompt, 6, Sampling(1.0, seed=2), logprobs=True),
        Request(3, prompt, 6, Sampling(logit_bias=((7, 100.0),)), top_logprobs=2),
    ]
    found = run(engine, requests)
    assert found == run(reference, requests)
    assert found[1] != found[0]
    assert found[3] == ([7] * 6, "length")


def test_requests_that_keep_joining_do_not_stop_the_others():
    packed = pack(TINY, weights_of(TINY), torch.float32, CPU)
    prompts = Prompts(TINY, packed)
    session = CudaSession(TINY, packed, prompts, nullcontext, 2, 12, lambda line: None)
    session.submit(Request(0, [9], 6))
    events = []
    for number in range(1, 4):
        session.submit(Request(number, [number], 1))
        events += session.step()
    assert [event.finish for event in events if event.id == 0][5:] == ["length"]


NAN = float("nan")


@pytest.mark.parametrize("tile", [(16, 16), (32, 16), (16, 64)], ids=str)
@pytest.mark.parametrize(("first", "n"), [(16, 16), (16, 1), (48, 33), (32, 17)])
@pytest.mark.parametrize(
    ("heads", "dtype"),
    [
        ((4, 2, 8), torch.float32),
        ((3, 1, 12), torch.float16),
        ((2, 2, 128), torch.float16),
    ],
    ids=str,
)
def test_attention_of_a_chunk_over_the_cache(heads, dtype, first, n, tile):
    """Of a slot's last layer, everything else in the cache being NaN."""
    H, K, E = heads
    BM, BN = tile
    length, context = max(16, chain.bucket(n)), 96
    generator = torch.Generator().manual_seed(first + n)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    qkv = random(length, (H + 2 * K) * E)
    qkv[n:] = NAN
    keys, values = (torch.full((2, 3, K, context, E), NAN, dtype=dtype) for _ in range(2))
    for cache in (keys, values):
        cache[1, 1, :, :first] = random(K, first, E)
    k, v = keys[:, 1], values[:, 1]
    before = [cache.clone() for cache in (keys, values)]
    positions = torch.arange(first, first + length, dtype=torch.int32).clamp_(max=first + n - 1)
    vectors = [k.stride(0) // E, k.stride(1) // E]
    place = torch.tensor([k.data_ptr(), v.data_ptr(), *vectors])
    attn_out = torch.full((length, H * E), NAN, dtype=dtype)
    options = {"H": H, "K": K, "E": E, "PADDED": padded(E), "MODE": sync.AFTER.value}
    grid = (K * -(-length // 16),)
    prompt_kernels.store_kernel[grid](qkv, positions, place, 1, length, BM=16, **options)
    grid, tiles = (H * -(-length // BM),), {"BM": BM, "BN": BN, "NUM_STAGES": 2}
    prompt_kernels.attention_kernel[grid](
        qkv, attn_out, positions, place, 1, length, E**-0.5, **tiles, **options
    )
    end = first + n
    q, new_k, new_v = qkv[:n].split([H * E, K * E, K * E], -1)
    for cache, new in zip(before, (new_k, new_v), strict=True):
        cache[1, 1, :, first:end] = new.unflatten(-1, (K, E)).transpose(0, 1)
    for cache, exact in zip((keys, values), before, strict=True):
        assert torch.equal(cache.nan_to_num(99.0), exact.nan_to_num(99.0))
    q_HNE = q.unflatten(-1, (H, E)).transpose(0, 1).double()
    k_HNE, v_HNE = (
        cache[1, :, :end].double().repeat_interleave(H // K, 0) for cache in (k, v)
    )  # fmt: skip
    seen = torch.arange(end) <= torch.arange(first, end)[:, None]
    scores = (q_HNE @ k_HNE.mT * E**-0.5).masked_fill(~seen, float("-inf"))
    exact = (scores.softmax(-1) @ v_HNE).transpose(0, 1).flatten(1)
    assert relative_error(attn_out[:n], exact) < (5e-7 if dtype == torch.float32 else 5e-4)


def cache_of(config, slots=2, context=None):
    shape = (config.n_layers, slots, config.n_kv_heads, context or config.max_seq_len)
    return torch.full((2, *shape, config.head_dim), NAN)


def read_whole(prompts, ids, cache, slot=0, with_logits=True):
    reading = prompts.begin(ids, cache, slot, with_logits=with_logits)
    steps = 1
    while not reading.step():
        steps += 1
    assert steps == -(-len(ids) // prompts.chunk)
    return reading.logits.clone() if with_logits else None


@pytest.mark.parametrize(
    "config", [each.with_(max_seq_len=44) for each in KINDS.values()], ids=KINDS
)
def test_a_prompt_in_chunks_is_the_whole_prompt(config):
    """Its logits, and its keys and values, those of the last chunk beside the context's end."""
    packed = pack(config, weights_of(config), torch.float32, CPU)
    tokens = tokens_of(config, 1, 44)
    exact = exact_logits(config, weights_of(config), tokens)[0]
    ids = tokens[0].tolist()
    whole, chunks = Prompts(config, packed, 64), Prompts(config, packed, 16)
    expected = cache_of(config)
    read_whole(whole, ids, expected)
    for n in (15, 16, 17, 32, 33, 44):
        cache = cache_of(config)
        logits_1V = read_whole(chunks, ids[:n], cache, slot=1)
        assert relative_error(logits_1V[0], exact[n - 1]) < 5e-6
        for got, of_whole in zip(cache, expected, strict=True):
            assert relative_error(got[:, 1, :, :n], of_whole[:, 0, :, :n]) < 5e-6
            assert got[:, 1, :, n:].isnan().all()
            assert got[:, 0].isnan().all()


def test_a_prompts_bits_do_not_depend_on_what_else_is_read():
    """Two that take turns, in one slot each of caches of two contexts, and the same ones alone."""
    config = TINY.with_(max_seq_len=64)
    packed = pack(config, weights_of(config), torch.float16, CPU)
    prompts = Prompts(config, packed, 16)
    both = tokens_of(config, 2, 40).tolist()
    both[1] = both[1][:37]
    caches = [cache_of(config, 2, context).half() for context in (64, 41)]
    readings = [
        prompts.begin(ids, cache, slot, with_logits=True)
        for slot, (ids, cache) in enumerate(zip(both, caches, strict=True))
    ]
    together = [None, None]
    while None in together:
        for i, reading in enumerate(readings):
            if together[i] is None and reading.step():
                together[i] = reading.logits.clone()
    for i, (ids, cache) in enumerate(zip(both, caches, strict=True)):
        alone = cache_of(config).half()
        assert torch.equal(read_whole(Prompts(config, packed, 16), ids, alone), together[i])
        for got, expected in zip(cache, alone, strict=True):
            assert torch.equal(got[:, i, :, : len(ids)], expected[:, 0, :, : len(ids)])
    # without logits keys and values are the same
    kept = cache_of(config).half()
    read_whole(prompts, both[0], kept, with_logits=False)
    assert torch.equal(kept[0][:, 0, :, :40], caches[0][0][:, 0, :, :40])


def test_prompts_that_one_forward_reads_have_the_bits_of_each_alone():
    config = TINY.with_(max_seq_len=64)
    packed = pack(config, weights_of(config), torch.float16, CPU)
    prompts = Prompts(config, packed, 32)
    tokens = tokens_of(config, 3, 32).tolist()
    ids = [tokens[0], tokens[1][:17], tokens[2][:20]]
    cache = cache_of(config, 3).half()
    readings = [
        prompts.begin(each, cache, slot, with_logits=False) for slot, each in enumerate(ids)
    ]
    assert all(readings[0].reads_with(other, 3) for other in readings[1:])
    assert not readings[0].reads_with(readings[1], prompts.at_once(32) + 1)
    assert readings[0].step(readings[1:])
    assert all(reading.step() for reading in readings)
    for slot, each in enumerate(ids):
        alone = cache_of(config).half()
        read_whole(Prompts(config, packed, 32), each, alone, with_logits=False)
        for got, expected in zip(cache, alone, strict=True):
            assert torch.equal(got[:, slot, :, : len(each)], expected[:, 0, :, : len(each)])
            assert got[:, slot, :, len(ids[0]) :].isnan().all()


@pytest.mark.parametrize(
    ("n", "m", "logits", "together"),
    [(20, 30, False, True), (20, 30, True, False), (16, 17, False, False), (0, 8, False, False),
     (33, 40, False, False)],
)  # fmt: skip
def test_prompts_are_read_together_where_one_chunk_of_a_length_has_each(n, m, logits, together):
    config = TINY.with_(max_seq_len=64)
    packed = pack(config, weights_of(config), torch.float16, CPU)
    prompts, cache = Prompts(config, packed, 32), cache_of(config)
    one, other = (prompts.begin([1] * length, cache, 0, with_logits=logits) for length in (n, m))
    assert one.reads_with(other, 2) == together


def test_sequences_with_long_prompts_are_the_reference_engines():
    """They join while another grows, and the other's tokens stay the same."""
    config = TINY.with_(max_seq_len=64)
    weights = weights_of(config)
    packed = pack(config, weights, torch.float32, CPU)
    prompts = tokens_of(config, 3, 40).tolist()
    requests = [
        Request(0, prompts[0][:3], 20),
        Request(1, prompts[1], 3),
        Request(2, prompts[2][:35], 2, Sampling(1.0, seed=5)),
    ]
    ends = []
    for session in (
        ReferenceEngine(config, weights, "cpu").session(2, 44),
        CudaSession(
            config, packed, Prompts(config, packed, 16), nullcontext, 2, 44, lambda line: None
        ),
    ):
        session.submit(requests[0])
        events = session.step()
        for request in requests[1:]:
            session.submit(request)
        while len(by_request(events)) < 3:
            events += session.step()
        ends.append(by_request(events))
        session.close()
    assert ends[1] == ends[0]
