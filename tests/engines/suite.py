"""What every engine must pass: derive from `EngineSuite` and say how to make the engine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from onelaunch.config import ModelConfig, RopeScaling
from onelaunch.engines.engine import Engine, Sampling
from onelaunch.errors import BadInput, RunFailed
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


class EngineSuite:
    """The contract of `Engine`, checked on small random models."""

    rows = ROWS
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
        assert self.make(config, weights).generate([prompt], 12, Sampling()) == [expected]

    def test_prompts_together_equal_prompts_alone(self, engine):
        prompts = [[1], [4, 9, 2, 33], [7] * 11, [60, 0]]
        together = engine.generate(prompts, 9, Sampling())
        assert together == [engine.generate([p], 9, Sampling())[0] for p in prompts]

    def test_draws_do_not_depend_on_the_other_prompts(self, engine):
        sampling = Sampling(temperature=1.0, seed=3)
        one = engine.generate([[1], [2]], 8, sampling, stop=[5])
        other = engine.generate([[8, 8, 8, 8], [2]], 8, sampling, stop=[5])
        assert one[1] == other[1]

    def test_a_sequence_is_drawn_the_same_alone_and_among_others(self, engine):
        sampling = Sampling(temperature=1.0, seed=3)
        prompts = [[1], [4, 9, 2, 33], [1], [7] * 11, [4, 9], [1]]
        together = engine.generate(prompts, 9, sampling)
        for i in (0, 1, 3, 4):
            assert engine.generate([prompts[i]], 9, sampling) == [together[i]]
        samples = [together[i] for i in (0, 2, 5)]
        assert len(set(map(tuple, samples))) == 3
        assert engine.generate([[1]] * 3, 9, sampling) == samples
        assert engine.generate([[4, 9], *prompts[3::-1]], 9, sampling)[2::2] == samples[:2]

    def test_the_same_seed_draws_the_same_and_another_seed_another(self, engine):
        def text(seed: int) -> list[int]:
            return engine.generate([[1]], 12, Sampling(temperature=1.0, seed=seed))[0]

        assert text(5) == text(5)
        assert len({tuple(text(seed)) for seed in (0, 1, -1, 2**70)}) == 4

    def test_sampling_leaves_the_global_random_state_alone(self, engine):
        before = torch.get_rng_state()
        engine.generate([[1]], 4, Sampling(temperature=1.0))
        assert torch.equal(before, torch.get_rng_state())

    def test_a_stop_id_ends_the_text_and_is_not_returned(self, engine):
        (free,) = engine.generate([[1]], 10, Sampling())
        stop = free[4]
        seen: dict[int, list[int]] = {0: [], 1: []}
        ended: list[int] = []
        texts = engine.generate(
            [[1], [1]],
            10,
            Sampling(),
            lambda i, token: seen[i].append(token),
            stop=[stop, 999],
            on_end=lambda i: ended.append((i, len(seen[i]))),
        )
        expected = free[: free.index(stop)]
        assert texts == [expected, expected]
        assert seen == {0: expected, 1: expected}
        assert ended == [(0, len(expected)), (1, len(expected))]

    def test_a_stop_id_in_the_prompt_does_not_end_the_text(self, engine):
        (free,) = engine.generate([[1, 2]], 3, Sampling())
        assert engine.generate([[1, 2]], 3, Sampling(), stop=[2]) == [
            free[: free.index(2)] if 2 in free else free
        ]

    @pytest.mark.parametrize(("length", "n", "expected"), [(1, 24, 24), (1, 25, 24), (1, 99, 24)])
    def test_the_text_ends_where_the_context_is_full(self, engine, length, n, expected):
        assert len(engine.generate([[3] * length], n, Sampling())[0]) == expected

    def test_a_prompt_may_fill_the_context_but_not_pass_it(self, engine):
        full = [3] * SMALL.max_seq_len
        assert len(engine.generate([full], 5, Sampling())[0]) == 1
        with pytest.raises(BadInput, match=r"prompt 2 has 25 tokens.* 24"):
            engine.generate([[1], [*full, 3]], 5, Sampling())

    def test_nothing_is_generated_where_nothing_is_asked(self, engine):
        assert engine.generate([[1], [2]], 0, Sampling()) == [[], []]
        assert engine.generate([], 5, Sampling()) == []

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
        seen: list[int] = []
        with pytest.raises(BadInput, match=message):
            engine.generate(prompts, 5, Sampling(), lambda i, token: seen.append(token))
        assert not seen

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

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_logits_that_are_not_finite_stop_the_run(self, value, temperature):
        weights = dict(weights_of(SMALL))
        weights["norm.weight"] = weights["norm.weight"].clone()
        weights["norm.weight"][0] = value
        with pytest.raises(RunFailed, match="not finite"):
            self.make(SMALL, weights).generate([[1]], 3, Sampling(temperature))

    def test_an_exception_in_on_token_comes_through(self, engine):
        def leave(index: int, token: int) -> None:
            raise BrokenPipeError

        with pytest.raises(BrokenPipeError):
            engine.generate([[1]], 3, Sampling(), leave)
        assert engine.generate([[1]], 3, Sampling()) == engine.generate([[1]], 3, Sampling())

    def test_the_weights_given_are_not_changed(self):
        weights = weights_of(SMALL)
        before = {name: w.clone() for name, w in weights.items()}
        self.make(SMALL, weights).generate([[1]], 5, Sampling(temperature=1.0))
        assert all(torch.equal(before[name], w) for name, w in weights.items())

    def test_it_describes_itself(self, engine):
        about = engine.describe()
        assert about["weight_bytes"] > 0
        assert {"engine", "device", "dtype"} <= set(about)
