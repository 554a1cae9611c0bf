"""Sampling and the exponential inside the compiled program, against PyTorch's and float64's."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Sequence
from random import Random

import numpy as np
import pytest
import torch
from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.engines.cpu.layout import Operation, Seq, State
from onelaunch.engines.cpu.runtime import Runtime
from onelaunch.engines.cpu.sequence import CachedSequence
from onelaunch.engines.engine import Request, Sampling
from onelaunch.engines.sampling import LARGEST_UNIFORM, adjusted, draw, penalised
from tests.engines.cpu.making import floats_at, make_runtime
from tests.engines.suite import weights_of

NOT_FINITE = -2
BELOW_ONE = LARGEST_UNIFORM
ROW = 2  # not the first: a row, its candidates and its text lie apart from the others
SPREAD = 4e-6  # float32 cumulative sums of some thousand weights, relative to their total


class Drawer:
    """Draws from given logits with given numbers, in the program."""

    def __init__(self, code: bytes, vocab: int) -> None:
        config = ModelConfig(
            dim=2, n_layers=1, n_heads=1, hidden_dim=2, vocab_size=vocab, max_seq_len=4
        )
        self.runtime: Runtime = make_runtime(code, config, weights_of(config))
        self.vocab = vocab

    def __call__(
        self, logits: Tensor, sampling: Sampling, uniform: float, ids: Sequence[int] = (0, 0)
    ) -> int:
        """`ids`: a prompt and the first new token."""
        # the second new token of its text: the first number is not for it
        texts = self.texts(Request(0, ids[:-1], 2, sampling), torch.tensor([math.nan, uniform]))
        texts[ROW].resume(ids[-1:], 0)
        return self.draw(logits, texts)

    def texts(self, request: Request, uniforms: Tensor | None = None) -> list[CachedSequence]:
        """Of a request each; the last is drawn by these numbers."""
        config, lanes = self.runtime.config, self.runtime.program.lanes
        n = request.max_new_tokens
        texts = [CachedSequence(config, lanes, request, n) for _ in range(ROW + 1)]
        for text in texts:
            text.uniforms = uniforms
        return texts

    def draw(self, logits: Tensor, texts: Sequence[CachedSequence]) -> int:
        """The next token of the last of them."""
        runtime = self.runtime
        runtime._lay_out(texts)
        runtime._need_logits(len(texts), not texts[ROW].sampling.greedy)
        runtime._sequences[ROW * Seq.LENGTH + Seq.ROW] = ROW
        for memory in (runtime._logits_memory, runtime._candidates):
            if memory is not None:
                ctypes.memset(memory.address, 0xFF, memory.size)
        state = runtime.state
        address = state[State.LOGITS] + ROW * state[State.LOGITS_ROW]
        row = logits.float().contiguous()
        ctypes.memmove(address, row.data_ptr(), 4 * self.vocab)
        token = int(runtime.program.call(Operation.SAMPLE, state.address, ROW, 0))
        assert runtime._sequences[ROW * Seq.LENGTH + Seq.NEXT] == token
        assert torch.equal(floats_at(address, self.vocab), row) or row.isnan().any()
        return token

    def adjusted(
        self,
        logits: Tensor,
        sampling: Sampling,
        uniform: float,
        prompt: Sequence[int],
        new: Sequence[int],
    ) -> tuple[int, Tensor]:
        """The drawn token, and the logits that it was drawn from."""
        uniforms = torch.full((len(new) + 1,), math.nan)
        uniforms[-1] = uniform
        texts = self.texts(Request(0, prompt, len(new) + 1, sampling), uniforms)
        texts[ROW].resume(new, 0)
        token = self.draw(logits, texts)
        return token, texts[ROW].adjusted_2V[0]

    def top(self, logits: Tensor, n: int) -> tuple[tuple[int, float], ...]:
        """The n most likely tokens in the place of the second new one."""
        texts = self.texts(Request(0, [0], 2, top_logprobs=n))
        texts[ROW].resume([0], 0)
        self.draw(logits, texts)
        assert texts[ROW].logprob(1) is None
        assert not texts[ROW].tops_NK2[0].any()
        return texts[ROW].top(1)

    def weights(self) -> Tensor:
        """The exponentials that the last draw made, where no filter moved them."""
        each = 16 * (self.vocab + self.runtime.program.lanes) + 8 * 256
        return floats_at(self.runtime.state[State.CANDIDATES] + ROW * each, self.vocab)


def position(logits: Tensor, sampling: Sampling, uniform: float, top_p: float) -> list[int]:
    """In float64: the ids that are left in their order, cut behind the one that is drawn."""
    p = (logits.double() - logits.double().max()) / max(sampling.temperature, 1e-30)
    p = p.exp()
    filtered = sampling.top_k or sampling.min_p or sampling.top_p < 1
    ids = list(range(len(p)))
    if filtered:
        ids.sort(key=lambda i: (-p[i].item(), i))
        ids = ids[: sampling.top_k or None]
        ids = [i for i in ids if p[i] >= sampling.min_p]
    if sampling.top_p < 1:
        before = torch.cumsum(p[ids], 0) - p[ids]
        ids = ids[: max(1, int((before < top_p * p[ids].sum()).sum()))]
    reached = torch.cumsum(p[ids], 0)
    n = int((reached <= uniform * reached[-1]).sum())
    return ids[: n + 1]


def may_be(token: int, logits: Tensor, sampling: Sampling, uniform: float) -> bool:
    """Whether a token is drawn for a number and a top_p within SPREAD of those given."""
    ends = [
        position(logits, sampling, min(max(uniform + du, 0.0), BELOW_ONE), sampling.top_p + dp)
        for du, dp in itertools.product((-SPREAD, SPREAD), repeat=2)
    ]
    longest, shortest = max(ends, key=len), min(ends, key=len)
    return token in longest[len(shortest) - 1 :]


FILTERS = [
    dict(zip(("top_k", "top_p", "min_p"), values, strict=True))
    for values in itertools.product((0, 1, 7, 10**6), (1.0, 0.9, 1e-6), (0.0, 0.05, 1.0))
]
UNIFORMS = (0.0, 1e-7, 0.3, 0.77, BELOW_ONE)


@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 33, 300, 3001])
def test_the_program_draws_what_pytorch_draws(compiled_program, vocab):
    drawer = Drawer(compiled_program, vocab)
    generator = torch.Generator().manual_seed(vocab)
    same = total = 0
    for filters in FILTERS:
        for temperature in (0.3, 1.0, 4.0):
            sampling = Sampling(temperature, **filters)
            logits = 3 * torch.randn(vocab, generator=generator)
            drawn = torch.rand(1, generator=generator).clamp_(max=BELOW_ONE).item()
            for uniform in (*UNIFORMS, drawn) if vocab < 1000 else (drawn,):
                token = drawer(logits, sampling, uniform)
                expected = int(draw(logits, sampling, torch.tensor([uniform])))
                total += 1
                same += token == expected
                if token != expected:
                    assert may_be(token, logits, sampling, uniform), (sampling, uniform)
    assert same >= 0.99 * total


@pytest.mark.parametrize("penalty", [1.3, 0.7, 5e-324, 1e300])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("vocab", [2, 15, 16, 17, 300])
def test_the_program_penalises_what_pytorch_does(compiled_program, vocab, temperature, penalty):
    """With every token of the text, often one of them twice; the logits themselves stay."""
    drawer = Drawer(compiled_program, vocab)
    generator = torch.Generator().manual_seed(vocab)
    sampling = Sampling(temperature, repetition_penalty=penalty)
    plain = Sampling(temperature)
    same = changed = 0
    for _ in range(40):
        logits = 3 * torch.randn(vocab, generator=generator)
        ids = torch.randint(vocab, (1 + vocab // 2,), generator=generator).tolist()
        ids = [*ids, ids[0], int(logits.argmax())]
        uniform = torch.rand(1, generator=generator).clamp_(max=BELOW_ONE).item()
        token = drawer(logits, sampling, uniform, ids)
        scores = penalised(logits, ids, penalty)
        changed += token != drawer(logits, plain, uniform, ids)
        if temperature == 0:
            expected = int(scores.argmax())
            assert token == expected
        else:
            expected = int(draw(scores, sampling, torch.tensor([uniform])))
            assert token == expected or may_be(token, scores, sampling, uniform)
        same += token == expected
    assert same >= 39
    if vocab > 2 and (penalty > 1 or temperature):
        assert changed


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("vocab", [2, 15, 16, 17, 300])
def test_the_program_adjusts_as_pytorch_does(compiled_program, vocab, temperature):
    """The bits of the logits that are chosen from, in the program's memory, with tokens that are
    biased, in the prompt, and several times among the new ones; the logits themselves stay."""
    drawer = Drawer(compiled_program, vocab)
    generator = torch.Generator().manual_seed(vocab)
    random = Random(vocab)
    for _ in range(30):
        logits = 3 * torch.randn(vocab, generator=generator)
        prompt = random.choices(range(vocab), k=4)
        new = random.choices(range(vocab), k=vocab // 2) + [int(logits.argmax())] * 3
        sampling = Sampling(
            temperature,
            repetition_penalty=random.choice([1.0, 1.3, 0.7]),
            presence_penalty=random.choice([0.0, random.uniform(-2, 2)]),
            frequency_penalty=random.choice([0.1, random.uniform(-2, 2)]),
            logit_bias={token: random.uniform(-100, 100) for token in {new[0], prompt[0]}},
        )
        uniform = torch.rand(1, generator=generator).clamp_(max=BELOW_ONE).item()
        scores = adjusted(logits, sampling, prompt, new)
        token, found = drawer.adjusted(logits, sampling, uniform, prompt, new)
        assert torch.equal(found, scores)
        if temperature == 0:
            assert token == int(scores.argmax())
        else:
            expected = int(draw(scores, sampling, torch.tensor([uniform])))
            assert token == expected or may_be(token, scores, sampling, uniform)


@pytest.mark.parametrize("vocab", [1, 2, 16, 19, 20, 21, 300])
def test_the_program_has_the_most_likely_tokens(compiled_program, vocab):
    """Those of the largest logits, of equal ones the first, with exact log-probabilities."""
    drawer = Drawer(compiled_program, vocab)
    generator = torch.Generator().manual_seed(vocab)
    for n in (1, 3, 19, 20):
        for spread in (3.0, 0.0, 1.0):
            logits = spread * torch.randn(vocab, generator=generator)
            if spread == 1.0:
                logits = logits.round()  # many are equal
            order = sorted(range(vocab), key=lambda i: (-logits[i].item(), i))[:n]
            exact = logits.double().log_softmax(-1)[order].tolist()
            ids, logprobs = zip(*drawer.top(logits, n), strict=True)
            assert list(ids) == order
            assert logprobs == pytest.approx(exact, abs=2e-6)


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-46, 1e-38, 1e-30, 1e-3])
@pytest.mark.parametrize("vocab", [3, 16, 65, 130])
def test_cold_takes_the_first_of_the_largest(compiled_program, vocab, temperature):
    drawer = Drawer(compiled_program, vocab)
    generator = torch.Generator().manual_seed(vocab)
    for _ in range(20):
        logits = torch.randn(vocab, generator=generator)
        logits[logits.argmax()] = logits.max() + 1  # what 0.001 still tells apart
        for uniform in (0.0, 0.5, BELOW_ONE):
            assert drawer(logits, Sampling(temperature), uniform) == logits.argmax()
    tied = torch.zeros(vocab)
    tied[[1, vocab - 1]] = 5.0
    if not temperature:
        assert drawer(tied, Sampling(), 0.9) == 1


@pytest.mark.parametrize("temperature", [1e6, 1e38, 3.4e38, 1e39, 1e300])
def test_hot_is_uniform(compiled_program, temperature):
    drawer = Drawer(compiled_program, 20)
    logits = torch.randn(20, generator=torch.Generator().manual_seed(0))
    tokens = [drawer(logits, Sampling(temperature), (i + 0.5) / 20) for i in range(20)]
    assert tokens == list(range(20))


@pytest.mark.parametrize("vocab", [17, 33, 40])
def test_equally_likely_tokens_are_kept_by_their_ids(compiled_program, vocab):
    """Wherever they stand: what a whole vector computes and what is left of one must agree."""
    drawer = Drawer(compiled_program, vocab)
    generator = torch.Generator().manual_seed(1)
    for _ in range(60):
        temperature = 0.5 + 2 * torch.rand(1, generator=generator).item()
        logits = torch.full((vocab,), -2 * torch.rand(1, generator=generator).item())
        logits[3] = 1.0
        for keep in (2, vocab // 2, vocab - 1):
            sampling = Sampling(temperature, top_k=keep)
            last = keep - 1 if keep > 3 else keep - 2
            assert drawer(logits, sampling, BELOW_ONE) == last, (temperature, keep)
            assert drawer(logits, sampling, 0.0) == 3
    assert drawer(torch.zeros(vocab), Sampling(1.0, top_p=3.5 / vocab), BELOW_ONE) == 3


def test_one_token_that_dominates_is_always_drawn(compiled_program):
    drawer = Drawer(compiled_program, 100)
    logits = torch.full((100,), -1000.0)
    logits[77] = 50.0
    for filters in FILTERS:
        for uniform in UNIFORMS:
            assert drawer(logits, Sampling(1.0, **filters), uniform) == 77


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("vocab", [1, 16, 33, 64, 77])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_logit_that_is_not_finite_is_seen_wherever_it_is(
    compiled_program, vocab, temperature, value
):
    """-inf too, though PyTorch's draw would take it for a token that cannot be: no model that this
    engine runs masks its logits."""
    drawer = Drawer(compiled_program, vocab)
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(3))
    assert drawer(logits, Sampling(temperature), 0.5) >= 0
    for at in range(vocab):
        bad = logits.clone()
        bad[at] = value
        assert drawer(bad, Sampling(temperature), 0.5) == NOT_FINITE


def test_the_largest_floats_are_still_numbers(compiled_program):
    drawer = Drawer(compiled_program, 40)
    logits = torch.full((40,), -3.4e38)
    logits[9] = 3.4e38  # their difference is infinite
    for temperature in (0.0, 0.5, 1.0, 1e30):
        assert drawer(logits, Sampling(temperature), 0.7) == 9


def test_the_exponential_is_exact_to_two_units(compiled_program):
    """The weights of a draw at temperature 1: e to the power of each logit below a largest of 0."""
    drawer = Drawer(compiled_program, 40_000)
    logits = -87.0 * torch.rand(40_000, generator=torch.Generator().manual_seed(0)) ** 3
    logits[0], logits[1], logits[-1] = 0.0, -1e-30, -87.0
    drawer(logits, Sampling(1.0), 0.5)
    exact = logits.double().exp()
    off = (drawer.weights().double() - exact).abs() / exact
    assert off.max() <= 2 * 2.0**-23
    assert off.mean() <= 2.0**-24
    assert drawer.weights()[0] == 1


def test_the_exponential_of_the_very_small_is_zero(compiled_program):
    drawer = Drawer(compiled_program, 64)
    logits = -torch.logspace(math.log10(87.01), 38, 64)
    logits[5] = 0.0
    drawer(logits, Sampling(1.0), 0.5)
    expected = torch.zeros(64)
    expected[5] = 1.0
    assert torch.equal(drawer.weights(), expected)


def test_silu_is_exact_for_every_gate(compiled_program):
    """A model of width 1 whose normalized x is 1: its gates are the weights themselves."""
    gates = torch.cat([torch.linspace(-80, 80, 3000), torch.linspace(-3, 3, 1000)])
    far = torch.tensor([-1e6, -1e4, -200.0, -100.0, -89.0, -88.5, 89.0, 200.0, 1e30])
    gates = torch.cat([gates, far])
    config = ModelConfig(
        dim=1, n_layers=1, n_heads=1, head_dim=2, hidden_dim=len(gates), vocab_size=2,
        max_seq_len=4, norm_eps=1e-30,
    )  # fmt: skip
    weights = {name: torch.zeros(shape) for name, shape in config.weight_shapes().items()}
    for name in ("embed_tokens.weight", "layers.0.post_attention_layernorm.weight"):
        weights[name].fill_(1.0)
    weights["layers.0.mlp.gate_proj.weight"] = gates[:, None]
    weights["layers.0.mlp.up_proj.weight"].fill_(1.0)
    runtime = make_runtime(compiled_program, config, weights)
    logits = torch.empty(1, 2)
    runtime.forward(torch.tensor([0]), logits, [(0, runtime._labels.index("layer 0 gate_up") + 1)])
    found = floats_at(runtime.state[State.ACTIVATION], len(gates)).double()
    exact = gates.double() * torch.sigmoid(gates.double())
    near = gates.abs() <= 80
    off = ((found - exact) / exact)[near & (gates != 0)].abs()
    assert off.max() <= 6 * 2.0**-24
    assert np.allclose(found[~near], exact[~near], rtol=1e-6, atol=1e-30)
