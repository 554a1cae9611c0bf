"""Generation by the CUDA engine in bfloat16; the engines' shared suite has it in float32
(test_cuda_engine.py)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from onelaunch.engines.engine import Request, Sampling
from onelaunch.model import Model
from tests.engines.suite import SHAPES, SMALL, exact_logits, run, weights_of

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from onelaunch.engines.cuda.engine import CudaEngine

LONGER = SMALL.with_(max_seq_len=400)


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
