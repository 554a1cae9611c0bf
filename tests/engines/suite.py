"""What every engine must pass: derive from `EngineSuite` and say how to make the engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from onelaunch.config import ModelConfig, RopeScaling, YarnRopeScaling
from onelaunch.engines.engine import Engine, Request, Sampling, Session, TokenEvent
from onelaunch.engines.sampling import uniforms
from onelaunch.errors import BadInput, RunFailed
from onelaunch.generation.decode import generate_ids
from onelaunch.model import (
    Model,
    attention,
    feed_forward,
    rms_norm,
    rope_tables,
    widen_rope,
)

SMALL = ModelConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=61, max_seq_len=24)

SHAPES = {
    "plain": SMALL,
    "interleaved-gqa": SMALL.with_(rope_layout="interleaved", n_kv_heads=2),
    "one-kv-head-untied": SMALL.with_(n_kv_heads=1, tied_embeddings=False),
    "qk-norm-wide-heads": SMALL.with_(head_dim=16, qk_norm=True, n_kv_heads=2, norm_eps=1e-6),
    "scaled-rope": SMALL.with_(rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16), rope_theta=100.0),
}

# rotary tables that are longer than one; for what reads or transposes a rotation
YARN = SMALL.with_(rope_scaling=YarnRopeScaling(8.0, 16), rope_theta=100.0, qk_norm=True)

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

every_shape = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)

ROWS = 256
"""Rows of logits over which an engine's error is compared with PyTorch's. The error of one row is a
few roundings, and of two such errors neither need be the smaller: 0.4x to 2x by the order in which
either sums, which the width of a processor's vectors decides. Over 256 rows the CPU engine's is
0.6x to 1.0x PyTorch's for every shape and seed here, so that 1.5x tells a fault from chance."""


@cache
def weights_of(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random weights, large enough that the model's choices differ from token to token."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in config.weight_shapes().items():
        noise = torch.randn(shape, generator=generator)
        # norms off one, so that forgetting a norm's weight shows
        weights[name] = 1 + 0.3 * noise if len(shape) == 1 else 2 * noise / shape[-1] ** 0.5
    return weights


def exact_logits(config: ModelConfig, weights: dict[str, Tensor], tokens_BS: Tensor) -> Tensor:
    """The definition in float64, (B, S, V)."""
    model = Model.from_weights(config, {name: w.double() for name, w in weights.items()})
    return F.linear(model.hidden(tokens_BS), model.head_weight())


def layers_alone(
    config: ModelConfig,
    weights: dict[str, Tensor],
    tokens_BS: Tensor,
    part: str,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """x, (B, S, D), after layers of which the "attention" or the "ffn" block alone is run, with its
    norm and residual; where the weights are, and in float64 unless told otherwise."""
    model = Model.from_weights(config, {name: w.to(dtype) for name, w in weights.items()})
    x_BSD = model.embed_tokens(tokens_BS).detach()
    tables = (table.to(x_BSD) for table in rope_tables(config, tokens_BS.shape[1]))
    rope = widen_rope(*tables, config.rope_layout == "interleaved")
    with torch.no_grad():
        for layer in model.layers:
            w = layer.weights()
            if part == "ffn":
                x_BSD = x_BSD + feed_forward(rms_norm(x_BSD, w.post_norm_D, config.norm_eps), w)
            else:
                h_BSD = rms_norm(x_BSD, w.input_norm_D, config.norm_eps)
                x_BSD = x_BSD + attention(h_BSD, w, config, rope)
    return x_BSD


def greedy_by_recomputing(
    config: ModelConfig, weights: dict[str, Tensor], prompt: Sequence[int], n: int
) -> list[int]:
    """Greedy tokens without any cache, in float64: the whole text is read anew for each."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(exact_logits(config, weights, torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def penalised_exactly(logits_V: Tensor, ids: Sequence[int], penalty: float) -> Tensor:
    """The logits with the repetition penalty of the tokens `ids`, by its definition."""
    changed_V = logits_V.double().clone()
    for token in set(ids):
        z = changed_V[token].item()
        changed_V[token] = z / penalty if z > 0 else z * penalty
    return changed_V


def adjusted_exactly(
    logits_V: Tensor, sampling: Sampling, prompt: Sequence[int], new: Sequence[int]
) -> Tensor:
    """The logits that a token is chosen from, by the definition of `Sampling`, in float64."""
    changed_V = logits_V.double().clone()
    for token, amount in sampling.logit_bias:
        changed_V[token] += amount
    changed_V = penalised_exactly(changed_V, [*prompt, *new], sampling.repetition_penalty)
    for token in set(new):
        changed_V[token] -= sampling.frequency_penalty * new.count(token)
        changed_V[token] -= sampling.presence_penalty
    return changed_V


ADJUSTING = {
    "presence": Sampling(presence_penalty=2.0),
    "frequency": Sampling(frequency_penalty=1.5),
    "negative": Sampling(presence_penalty=-1.0, frequency_penalty=-2.0),
    "bias": Sampling(logit_bias=((19, -6.0), (3, 4.5), (60, 5.0))),
    "all": Sampling(
        repetition_penalty=1.3, presence_penalty=1.5, frequency_penalty=-0.25,
        logit_bias=((19, -4.0), (5, 5.5), (17, 3.0)),
    ),
}  # fmt: skip
"""Each changes what SMALL generates after PROMPT, greedy and drawn."""
PROMPT = (5, 17, 3, 17)


def rows_of_tokens(
    config: ModelConfig, size: tuple[int, int], rows: int = ROWS, seed: int = 1
) -> Tensor:
    """Random tokens, (N, S), for as many batches of `size` as have so many rows."""
    B, S = size
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (-(-rows // (B * S)) * B, S), generator=generator)


def relative_error(a: Tensor, b: Tensor) -> float:
    a, b = a.double().cpu(), b.double().cpu()
    return float((a - b).norm() / b.norm())


Ends = dict[int, tuple[list[int], str]]
"""By request its new tokens and why it ended."""


def by_request(events: Sequence[TokenEvent]) -> Ends:
    """The requests that have ended. Nothing may come after an end."""
    tokens: dict[int, list[int]] = {}
    ends: Ends = {}
    for event in events:
        assert event.id not in ends
        new = tokens.setdefault(event.id, [])
        if event.token is not None:
            new.append(event.token)
        if event.finish is not None:
            ends[event.id] = (new, event.finish)
        else:
            assert event.token is not None
    return ends


def finished(session: Session, n: int) -> Ends:
    """Step until so many requests have ended."""
    events: list[TokenEvent] = []
    while len(by_request(events)) < n:
        events += session.step()
    return by_request(events)


def run(engine: Engine, requests: Sequence[Request], max_batch: int = 4) -> Ends:
    """Submit requests together, and step until all have ended."""
    session = engine.session(max_batch)
    for request in requests:
        session.submit(request)
    return finished(session, len(requests))


class EngineSuite:
    """The contract of `Engine`, checked on small random models."""

    rows = ROWS
    logprob_error = 1e-4
    floor = 0.0
    """An error that is always allowed, for engines that are too slow for so many rows."""

    def make(self, config: ModelConfig, weights: dict[str, Tensor]) -> Engine:
        raise NotImplementedError

    def held(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights as the engine rounds them."""
        return weights

    def plain(self, config: ModelConfig, weights: dict[str, Tensor], tokens_NS: Tensor) -> Tensor:
        """PyTorch's logits in the engine's precision, of weights as it holds them."""
        with torch.no_grad():
            return Model.from_weights(config, weights)(tokens_NS)

    @pytest.fixture
    def engine(self) -> Engine:
        return self.make(SMALL, weights_of(SMALL))

    @every_shape
    @pytest.mark.parametrize("size", [(1, 1), (3, 7), (2, SMALL.max_seq_len)])
    def test_logits_are_as_exact_as_plain_pytorch(self, config, size):
        weights, tokens_NS = weights_of(config), rows_of_tokens(config, size, self.rows)
        engine = self.make(config, weights)
        answers = [engine.logits(tokens_BS) for tokens_BS in tokens_NS.split(size[0])]
        assert all(each.dtype == torch.float32 for each in answers)
        assert all(each.shape == (*size, config.vocab_size) for each in answers)
        held = self.held(weights)
        exact = exact_logits(config, held, tokens_NS)
        allowed = 1.5 * relative_error(self.plain(config, held, tokens_NS), exact)
        assert relative_error(torch.cat(answers), exact) <= max(allowed, self.floor)

    @every_shape
    def test_greedy_equals_reading_the_whole_text_anew(self, config):
        weights = weights_of(config)
        prompt = [5, 17, 3]
        expected = greedy_by_recomputing(config, weights, prompt, 12)
        assert len(set(expected)) > 3, "the model must say more than one thing for this to tell"
        assert generate_ids(self.make(config, weights), [prompt], 12, Sampling()) == [expected]

    def test_prompts_together_equal_prompts_alone(self, engine):
        prompts = [[1], [4, 9, 2, 33], [7] * 11, [60, 0]]
        together = generate_ids(engine, prompts, 9, Sampling())
        assert together == [generate_ids(engine, [p], 9, Sampling())[0] for p in prompts]

    def test_draws_do_not_depend_on_the_other_prompts(self, engine):
        sampling = Sampling(temperature=1.0, seed=3)
        one = generate_ids(engine, [[1], [2]], 8, sampling, stop_ids=[5])
        other = generate_ids(engine, [[8, 8, 8, 8], [2]], 8, sampling, stop_ids=[5])
        assert one[1] == other[1]

    def test_a_sequence_is_drawn_the_same_alone_and_among_others(self, engine):
        sampling = Sampling(temperature=1.0, seed=3)
        prompts = [[1], [4, 9, 2, 33], [1], [7] * 11, [4, 9], [1]]
        together = generate_ids(engine, prompts, 9, sampling)
        for i in (0, 1, 3, 4):
            assert generate_ids(engine, [prompts[i]], 9, sampling) == [together[i]]
        samples = [together[i] for i in (0, 2, 5)]
        assert len(set(map(tuple, samples))) == 3
        assert generate_ids(engine, [[1]] * 3, 9, sampling) == samples
        assert generate_ids(engine, [[4, 9], *prompts[3::-1]], 9, sampling)[2::2] == samples[:2]

    def test_the_same_seed_draws_the_same_and_another_seed_another(self, engine):
        def text(seed: int) -> list[int]:
            return generate_ids(engine, [[1]], 12, Sampling(temperature=1.0, seed=seed))[0]

        assert text(5) == text(5)
        assert len({tuple(text(seed)) for seed in (0, 1, -1, 2**70)}) == 4

    @pytest.mark.parametrize("penalty", [1.3, 0.7])
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_a_repetition_penalty_is_that_of_the_definition(self, engine, temperature, penalty):
        """Each new token, by exact logits of the prompt and the tokens before it: the best one, or
        the one that the random number draws, as far as the engine's logits are exact."""
        prompt, error = [5, 17, 3, 17], 2 * self.logprob_error
        sampling = Sampling(temperature, seed=3, repetition_penalty=penalty)
        (new,) = generate_ids(engine, [prompt], 12, sampling)
        assert len(new) == 12
        assert [new] != generate_ids(engine, [prompt], 12, Sampling(temperature, seed=3))
        tokens = torch.tensor([[*prompt, *new[:-1]]])
        exact_SV = exact_logits(SMALL, self.held(weights_of(SMALL)), tokens)[0, len(prompt) - 1 :]
        for n, u in enumerate(uniforms(3, prompt, 0, 12).tolist()):
            z_V = penalised_exactly(exact_SV[n], [*prompt, *new[:n]], penalty)
            if temperature == 0:
                assert z_V[new[n]] >= z_V.max() - error
            else:
                reached = z_V.softmax(-1)[: new[n] + 1].cumsum(0)
                before = reached[-2].item() if new[n] else 0.0
                assert before - error <= u <= reached[-1] + error

    def test_a_large_repetition_penalty_lets_no_token_come_again(self, engine):
        """While there is another one with a positive logit."""
        prompts = [[5, 17, 3], [9], [7, 60, 7, 2]]
        sampling = Sampling(repetition_penalty=1e9)
        for prompt, new in zip(prompts, generate_ids(engine, prompts, 12, sampling), strict=True):
            assert len({*prompt, *new}) == len(set(prompt)) + 12

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize("name", ADJUSTING)
    def test_logits_are_adjusted_as_defined(self, engine, temperature, name):
        """Each new token, by exact logits, bias and penalties: the best one, or the one that the
        random number draws, as far as the engine's logits are exact."""
        prompt, error, n_new = list(PROMPT), 2 * self.logprob_error, 16
        sampling = replace(ADJUSTING[name], temperature=temperature, seed=3)
        (new,) = generate_ids(engine, [prompt], n_new, sampling)
        assert len(new) == n_new
        assert [new] != generate_ids(engine, [prompt], n_new, Sampling(temperature, seed=3))
        tokens = torch.tensor([[*prompt, *new[:-1]]])
        exact_SV = exact_logits(SMALL, self.held(weights_of(SMALL)), tokens)[0, len(prompt) - 1 :]
        for n, u in enumerate(uniforms(3, prompt, 0, n_new).tolist()):
            z_V = adjusted_exactly(exact_SV[n], sampling, prompt, new[:n])
            if temperature == 0:
                assert z_V[new[n]] >= z_V.max() - error
            else:
                reached = z_V.softmax(-1)[: new[n] + 1].cumsum(0)
                before = reached[-2].item() if new[n] else 0.0
                assert before - error <= u <= reached[-1] + error

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_a_bias_bans_tokens_and_lets_no_others_be(self, engine, temperature):
        plain, prompts = Sampling(temperature, seed=3), [[5, 17, 3], [9]]
        for prompt in prompts:
            (free,) = generate_ids(engine, [prompt], 12, plain)
            bias = tuple((token, -100.0) for token in sorted(set(free)))
            (new,) = generate_ids(engine, [prompt], 12, replace(plain, logit_bias=bias))
            assert len(new) == 12
            assert not set(new) & set(free)
        chosen = replace(plain, logit_bias=((33, 100.0),))
        assert generate_ids(engine, prompts, 5, chosen) == [[33] * 5] * 2

    def test_sampling_leaves_the_global_random_state_alone(self, engine):
        before = torch.get_rng_state()
        generate_ids(engine, [[1]], 4, Sampling(temperature=1.0))
        assert torch.equal(before, torch.get_rng_state())

    def test_a_stop_id_ends_the_text_and_is_not_returned(self, engine):
        (free,) = generate_ids(engine, [[1]], 10, Sampling())
        stop = free[4]
        requests = [Request(i, [1], 10, stop_ids=[stop, 999]) for i in (7, 5)]
        expected = free[: free.index(stop)]
        assert run(engine, requests) == {7: (expected, "stop"), 5: (expected, "stop")}

    def test_requests_of_their_own_join_while_others_run(self, engine):
        requests = [
            Request(0, [1], 12),
            Request(1, [4, 9, 2, 33], 9, Sampling(1.0, seed=3), [5]),
            Request(2, [7] * 11, 5, Sampling(0.8, top_k=9, seed=4), sample=1),
            Request(3, [7] * 11, 0),
            Request(4, [60, 0], 12, Sampling(1.2, top_p=0.8, min_p=0.01)),
            Request(5, [4, 9, 2, 33], 9, Sampling(1.0, seed=3)),
            Request(6, [7] * 11, 12, Sampling(repetition_penalty=1.3)),
            Request(7, [7] * 11, 12, Sampling(1.0, seed=4, repetition_penalty=0.7)),
            Request(8, [7] * 11, 12),
            Request(9, [7] * 11, 12, Sampling(frequency_penalty=2.0), top_logprobs=20),
            Request(10, [7] * 11, 12, Sampling(1.0, seed=4, presence_penalty=-2.0), logprobs=True),
            Request(11, [7] * 11, 12, Sampling(logit_bias=((19, 3.0), (7, -100.0)))),
            Request(12, [7] * 11, 12, Sampling(frequency_penalty=2.0)),  # counts begin anew
        ]
        alone = {}
        for request in requests:
            alone |= run(engine, [request])
        assert alone[3] == ([], "length")
        assert len(alone[2][0]) == 5
        assert alone[6] != alone[8] != alone[9] == alone[12]
        assert run(engine, requests, max_batch=3) == alone
        assert run(engine, requests, max_batch=16) == alone
        session = engine.session(4)
        ended: dict[int, tuple[list[int], str]] = {}
        events: list[TokenEvent] = []
        for request in requests:
            session.submit(request)
            events += session.step()
        while len(ended) < len(requests):
            events += session.step()
            ended = by_request(events)
        assert ended == alone
        assert session.step() == []

    def test_requests_that_keep_joining_do_not_stop_the_others(self, engine):
        (expected,) = generate_ids(engine, [[9]], 6, Sampling())
        session = engine.session(4)
        session.submit(Request(0, [9], 6))
        events: list[TokenEvent] = []
        for number in range(1, 13):
            session.submit(Request(number, [number], 1))
            events += session.step()
        assert by_request(events).get(0) == (expected, "length")

    def test_a_session_holds_so_many_positions(self, engine):
        session = engine.session(2, max_len=6)
        session.submit(Request(0, [1, 2], 99))
        session.submit(Request(1, [3] * 6, 99))
        found = finished(session, 2)
        assert found[0] == (generate_ids(engine, [[1, 2]], 5)[0], "length")
        assert len(found[1][0]) == 1

    def test_logprobs_are_those_of_the_definition(self, engine):
        for sampling in (
            Sampling(),
            Sampling(1.5, top_k=7, seed=2),
            Sampling(repetition_penalty=1.3),
            Sampling(1.5, seed=2, repetition_penalty=0.7),
        ):
            session = engine.session(2)
            session.submit(Request(0, [5, 17, 3], 8, sampling, logprobs=True))
            session.submit(Request(1, [5, 17, 3], 8, sampling))
            events = []
            while len(by_request(events)) < 2:
                events += session.step()
            tokens = [event.token for event in events if event.id == 0]
            exact = exact_logits(
                SMALL, self.held(weights_of(SMALL)), torch.tensor([[5, 17, 3, *tokens[:-1]]])
            )[0, 2:].log_softmax(-1)
            expected = [exact[i, token].item() for i, token in enumerate(tokens)]
            found = [event.logprob for event in events if event.id == 0]
            assert found == pytest.approx(expected, abs=self.logprob_error)
            assert all(event.logprob is None for event in events if event.id == 1)

    def test_top_logprobs_are_those_of_the_definition(self, engine):
        """Before bias, penalties, temperature and filters; with `logprob` and without."""
        prompt, vocab = list(PROMPT), SMALL.vocab_size
        requests = [
            Request(0, prompt, 6, top_logprobs=1),
            Request(1, prompt, 6, ADJUSTING["all"], logprobs=True, top_logprobs=20),
            Request(2, prompt, 6, Sampling(1.5, top_k=9, seed=2), logprobs=True, top_logprobs=5),
            Request(3, prompt, 6, logprobs=True),
        ]
        session = engine.session(4)
        for request in requests:
            session.submit(request)
        events: list[TokenEvent] = []
        while len(by_request(events)) < len(requests):
            events += session.step()
        held = self.held(weights_of(SMALL))
        for request in requests:
            own = [event for event in events if event.id == request.id and event.token is not None]
            tokens = torch.tensor([[*prompt, *(event.token for event in own[:-1])]])
            exact_SV = exact_logits(SMALL, held, tokens)[0, len(prompt) - 1 :].log_softmax(-1)
            engines_SV = engine.logits(tokens)[0, len(prompt) - 1 :].double().cpu().log_softmax(-1)
            for event, exact_V, engines_V in zip(own, exact_SV, engines_SV, strict=True):
                assert (event.logprob is not None) == request.logprobs
                assert len(event.top) == request.top_logprobs
                if not event.top:
                    continue
                ids, logprobs = zip(*event.top, strict=True)
                assert len(set(ids)) == len(ids)
                assert list(logprobs) == sorted(logprobs, reverse=True)
                for expected_V in (exact_V, engines_V):
                    found = expected_V[list(ids)].tolist()
                    assert logprobs == pytest.approx(found, abs=self.logprob_error)
                    largest = expected_V.topk(len(ids)).values.tolist()
                    assert logprobs == pytest.approx(largest, abs=self.logprob_error)
                    left_out = [i for i in range(vocab) if i not in ids]
                    total = sum(map(math.exp, logprobs)) + expected_V[left_out].exp().sum().item()
                    assert total == pytest.approx(1.0, abs=self.logprob_error)
                if event.logprob is not None and event.token in ids:
                    assert event.logprob == logprobs[ids.index(event.token)]

    def test_a_cancelled_request_ends_and_the_others_go_on(self, engine):
        expected = run(engine, [Request(1, [9], 12)])
        session = engine.session(2)
        for id in range(4):
            session.submit(Request(id, [9 if id == 1 else id], 12))
        events = session.step()
        for id in (0, 3, 3, 17):  # one that grows, one that waits, one that is unknown
            session.cancel(id)
        while not {0, 1, 2, 3} <= by_request(events).keys():
            events += session.step()
        found = by_request(events)
        assert found[1] == expected[1]
        assert (found[0][1], found[3]) == ("cancelled", ([], "cancelled"))
        assert len(found[0][0]) < 12
        assert found[2][1] == "length"
        session.cancel(1)
        assert session.step() == []

    def test_sessions_of_one_engine_do_not_disturb_each_other(self, engine):
        requests = [Request(0, [1], 9), Request(1, [4, 9], 9, Sampling(1.0, seed=3))]
        expected = run(engine, requests)
        first, second = engine.session(2), engine.session(2)
        for session in (first, second):
            for request in requests:
                session.submit(request)
        events = {first: [], second: []}
        while any(len(by_request(found)) < 2 for found in events.values()):
            for session, found in events.items():
                found += session.step()
                engine.logits(torch.tensor([[3, 4, 5]]))
        assert by_request(events[first]) == by_request(events[second]) == expected
        first.close()

    @pytest.mark.parametrize(
        ("request_", "message"),
        [
            (Request(4, [], 5), "request 4 is empty"),
            (Request(4, [3] * 25, 5), "request 4 has 25 tokens"),
            (Request(4, [61], 5), "request 4: id 61"),
            (Request(4, [1], -1), "max_new_tokens=-1"),
            (
                Request(4, [1], 5, Sampling(logit_bias=((61, 1.0),))),
                "logit_bias=61: id 61 is outside",
            ),
            (
                Request(4, [1], 5, Sampling(logit_bias=((0, 1.0), (-1, 1.0)))),
                "logit_bias=-1: id -1",
            ),
            (Request(4, [1], 5, top_logprobs=-1), "top_logprobs=-1: must be from 0 to 20"),
            (Request(4, [1], 5, top_logprobs=21), "top_logprobs=21: must be from 0 to 20"),
        ],
    )
    def test_a_bad_request_is_refused_and_the_others_go_on(self, engine, request_, message):
        session = engine.session(2)
        session.submit(Request(0, [1], 3))
        with pytest.raises(BadInput, match=message):
            session.submit(request_)
        assert finished(session, 1) == run(engine, [Request(0, [1], 3)])

    @pytest.mark.parametrize("size", [{"max_batch": 0}, {"max_len": 0}])
    def test_a_session_of_nothing_is_refused(self, engine, size):
        with pytest.raises(BadInput, match=f"{next(iter(size))}=0"):
            engine.session(**size)

    def test_a_stop_id_in_the_prompt_does_not_end_the_text(self, engine):
        (free,) = generate_ids(engine, [[1, 2]], 3, Sampling())
        assert generate_ids(engine, [[1, 2]], 3, Sampling(), stop_ids=[2]) == [
            free[: free.index(2)] if 2 in free else free
        ]

    @pytest.mark.parametrize(("length", "n", "expected"), [(1, 24, 24), (1, 25, 24), (1, 99, 24)])
    def test_the_text_ends_where_the_context_is_full(self, engine, length, n, expected):
        assert len(generate_ids(engine, [[3] * length], n, Sampling())[0]) == expected

    def test_a_prompt_may_fill_the_context_but_not_pass_it(self, engine):
        full = [3] * SMALL.max_seq_len
        assert len(generate_ids(engine, [full], 5, Sampling())[0]) == 1
        with pytest.raises(BadInput, match=r"prompt 2 has 25 tokens.* 24"):
            generate_ids(engine, [[1], [*full, 3]], 5, Sampling())

    def test_nothing_is_generated_where_nothing_is_asked(self, engine):
        assert generate_ids(engine, [[1], [2]], 0, Sampling()) == [[], []]
        assert generate_ids(engine, [], 5, Sampling()) == []

    @pytest.mark.parametrize(
        ("prompts", "message"),
        [
            ([[1], []], "prompt 2 is empty"),
            ([[0, 61]], "prompt 1: id 61"),
            ([[-1, 60]], "prompt 1: id -1"),
            ([1, 2], r"prompt 1: must be a list of token ids, such as \[1, 403\], not int$"),
            (["one"], "prompt 1: must be a list of token ids.*, not str$"),
            ([torch.tensor([1, 2])], r"prompt 1: must be .*, not Tensor: use tolist\(\)$"),
            ([[1], [1, 2.5]], "prompt 2: must be .*, not of float$"),
        ],
    )
    def test_bad_prompts_are_refused_before_any_token(self, engine, prompts, message):
        with pytest.raises(BadInput, match=message):
            generate_ids(engine, prompts, 5, Sampling())

    def test_logits_take_lists_and_any_integers(self, engine):
        ids = [[1, 2, 3], [4, 5, 60]]
        expected = engine.logits(torch.tensor(ids))
        assert expected.shape == (2, 3, SMALL.vocab_size)
        for tokens in (
            ids,
            tuple(map(tuple, ids)),
            *(torch.tensor(ids, dtype=d) for d in INTEGERS),
        ):
            assert torch.equal(engine.logits(tokens), expected)

    @pytest.mark.parametrize(
        ("tokens", "message"),
        [
            (
                torch.tensor([1, 2]),
                r"tokens of shape \(2,\): must be \(batch, sequence\); .*\[None\]",
            ),
            ([1, 2], r"tokens of shape \(2,\): must be \(batch, sequence\); .*\[None\]"),
            (torch.zeros(1, 2, 3, dtype=torch.int64), r"tokens of shape \(1, 2, 3\): must be"),
            (3, r"tokens of shape \(\): must be \(batch, sequence\)$"),
            (torch.zeros(1, 2), "tokens of float32: token ids must be integers"),
            ([[1, 2.5]], "tokens of float32: token ids must be integers"),
            ([[True, False]], "tokens of bool: token ids must be integers"),
            ([[1, 2], [3]], "lists of as many each; pad sequences of different lengths"),
            ("a text", "must be a tensor .* of token ids"),
            ([["a", "b"]], "must be a tensor .* of token ids"),
            ([[2**70]], "must be a tensor .* of token ids"),
            (None, "must be a tensor .* of token ids"),
        ],
        ids=str,
    )
    def test_logits_say_which_shape_and_numbers_they_take(self, engine, tokens, message):
        with pytest.raises(BadInput, match=message):
            engine.logits(tokens)

    def test_logits_of_each_last_position(self, engine):
        tokens = torch.randint(
            SMALL.vocab_size, (3, 21), generator=torch.Generator().manual_seed(5)
        )
        every = engine.logits(tokens).double()
        lengths = [21, 1, 17]
        padded = tokens.clone()
        for row, length in zip(padded, lengths, strict=True):
            row[length:] = 7  # has no effect
        for got, ends in [
            (engine.logits(tokens, last=True), [21, 21, 21]),
            (engine.logits(padded, last=True, lengths=lengths), lengths),
            (engine.logits(padded, last=True, lengths=torch.tensor(lengths)), lengths),
            (engine.logits(tokens, last=True), [21, 21, 21]),  # again, after other lengths
        ]:
            assert got.shape == (3, SMALL.vocab_size)
            for row, (logits_V, end) in enumerate(zip(got.double(), ends, strict=True)):
                expected = every[row, end - 1]
                error = float((logits_V - expected).norm() / expected.norm())
                assert error < self.logprob_error
        none = engine.logits(torch.empty(0, 3, dtype=torch.int64), last=True)
        assert none.shape == (0, SMALL.vocab_size)

    @pytest.mark.parametrize(
        ("last", "lengths", "message"),
        [
            (False, [3, 3], "last=True"),
            (True, [3], "lengths=.*2 whole numbers from 1 to 3"),
            (True, [3, 0], "lengths=.*from 1 to 3"),
            (True, [4, 3], "lengths=.*from 1 to 3"),
            (True, [1.5, 3], "lengths=.*whole numbers"),
        ],
        ids=str,
    )
    def test_logits_say_which_lengths_they_take(self, engine, last, lengths, message):
        with pytest.raises(BadInput, match=message):
            engine.logits([[1, 2, 3], [4, 5, 6]], last=last, lengths=lengths)

    def test_nothing_has_no_last_position(self, engine):
        with pytest.raises(BadInput, match="last"):
            engine.logits(torch.empty(2, 0, dtype=torch.int64), last=True)

    @pytest.mark.parametrize("size", [(0, 3), (2, 0), (0, 0)])
    def test_logits_of_nothing_are_empty(self, engine, size):
        logits = engine.logits(torch.empty(size, dtype=torch.int64))
        assert logits.shape == (*size, SMALL.vocab_size)
        assert logits.dtype == torch.float32

    @pytest.mark.parametrize("bad", [-1, SMALL.vocab_size])
    def test_logits_refuse_ids_beyond_the_vocabulary(self, engine, bad):
        with pytest.raises(BadInput, match=f"id {bad} "):
            engine.logits(torch.tensor([[0, bad]]))

    def test_logits_refuse_more_than_the_context(self, engine):
        engine.logits(torch.zeros(1, SMALL.max_seq_len, dtype=torch.int64))
        with pytest.raises(BadInput, match="context of 24"):
            engine.logits(torch.zeros(1, SMALL.max_seq_len + 1, dtype=torch.int64))

    @pytest.mark.parametrize("penalty", [1.0, 1.3])
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_logits_that_are_not_finite_stop_the_run(self, value, temperature, penalty):
        weights = dict(weights_of(SMALL))
        weights["norm.weight"] = weights["norm.weight"].clone()
        weights["norm.weight"][0] = value
        sampling = Sampling(temperature, repetition_penalty=penalty)
        with pytest.raises(RunFailed, match="not finite"):
            generate_ids(self.make(SMALL, weights), [[1]], 3, sampling)

    def test_a_request_that_is_not_finite_ends_and_the_others_go_on(self):
        weights = dict(weights_of(SMALL))
        weights["lm_head.weight"] = weights["embed_tokens.weight"]
        weights["embed_tokens.weight"] = weights["embed_tokens.weight"].clone()
        weights["embed_tokens.weight"][60] = float("nan")
        config = SMALL.with_(tied_embeddings=False)
        engine = self.make(config, weights)
        prompts = [[60], [1, 2], [1, 60, 2], [4]]
        session = engine.session(2)
        for id, prompt in enumerate(prompts):
            session.submit(Request(id, prompt, 6))
        events: list[TokenEvent] = []
        while len(by_request(events)) < 4:
            events += session.step()
        found = by_request(events)
        errors = {event.id: str(event.error) for event in events if event.error is not None}
        assert {id for id, (_, finish) in found.items() if finish == "error"} == errors.keys()
        assert {0, 2} <= errors.keys()
        assert "position 0 are not finite" in errors[0]
        assert "position 2 are not finite" in errors[2]
        for id in (1, 3):
            assert run(engine, [Request(id, prompts[id], 6)])[id] == found[id]

    def test_the_weights_given_are_not_changed(self):
        weights = weights_of(SMALL)
        before = {name: w.clone() for name, w in weights.items()}
        generate_ids(self.make(SMALL, weights), [[1]], 5, Sampling(temperature=1.0))
        assert all(torch.equal(before[name], w) for name, w in weights.items())

    def test_it_describes_itself(self, engine):
        about = engine.describe()
        assert about["weight_bytes"] > 0
        assert {"engine", "device", "dtype"} <= set(about)
