"""The staged and the fused forward on a GPU, against the definition in float64 and each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from onelaunch.engines.cuda.blocking import Blocking, default_fused, padded
from onelaunch.engines.cuda.program import FusedForward, Shape
from onelaunch.errors import EngineTimeout
from onelaunch.model import Model
from tests.engines.cuda.staged_forward import StagedForward
from tests.engines.suite import SHAPES, SMALL, YARN, exact_logits, relative_error, weights_of

CUDA = torch.device("cuda", 0)
MORE = {
    "no power of two": SMALL.with_(dim=40, n_heads=5, n_kv_heads=5, hidden_dim=44, vocab_size=67),
    "heads of 6": SMALL.with_(head_dim=6, n_kv_heads=2),
    "heads of 48, longer": SMALL.with_(
        dim=288, n_heads=6, n_kv_heads=6, head_dim=48, hidden_dim=768, vocab_size=500,
        max_seq_len=300,
    ),
    "norms of heads of 24": SMALL.with_(
        dim=96, n_heads=4, n_kv_heads=2, head_dim=24, qk_norm=True, hidden_dim=200, max_seq_len=300
    ),
    "heads of 128": SMALL.with_(dim=256, n_heads=4, n_kv_heads=2, head_dim=128, max_seq_len=100),
}  # fmt: skip
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EVERY = {**SHAPES, **MORE, "yarn": YARN}
# compiling is what takes time: bfloat16 everywhere, the others where they differ most
FEW = ("plain", "heads of 48, longer", "no power of two")
COMBINATIONS = [
    pytest.param(config, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for name, config in EVERY.items()
    for dtype in DTYPES
    if dtype == torch.bfloat16 or name in FEW
]
EARLY = {
    "qkv": Blocking(64, 32, num_stages=0),
    "gate_up": Blocking(64, 64, num_stages=0),
    "out_proj": Blocking(32, 32, num_stages=0, warmup_pass=True),
    "down": Blocking(64, 32, 64, 4, warmup_pass=True),
}
OTHERWISE = {
    "qkv": Blocking(64, 64, 64, 3, tma=True),
    "attention": Blocking(64, 64, num_stages=2, chunk=64),
    "out_proj": Blocking(64, 32, 64, 4, tma=True, warmup_pass=True),
    "gate_up": Blocking(128, 128, 64, 3, 8, tma=True),
    "down": Blocking(128, 32, 64, 3, tma=True),
    "head": Blocking(128, 256, 64, 3, 8, tma=True, programs=1),
}
LIBRARY = {"head": Blocking(128, 128, library=True)}


def alike(config, rows, dtype, given):
    """Blockings for both forms."""
    return default_fused(config, rows, dtype.itemsize) | given


def logits_of(forward, tokens, dtype, every=True):
    """In a dtype, from a place where nothing was."""
    bound = forward.bind(*tokens.shape, every, dtype)
    bound.buffers.tokens.copy_(tokens.flatten())
    bound.buffers.logits.fill_(float("nan"))
    bound.run()
    return bound.buffers.logits.view(tokens.shape[0], -1, forward.config.vocab_size)


@pytest.fixture(autouse=True)
def _memory_is_poisoned():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def tokens_of(config, batch, sequence, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + sequence)
    return torch.randint(config.vocab_size, (batch, sequence), generator=generator)


def plain_logits(config, weights, tokens, dtype):
    """PyTorch's."""
    own = Model.from_weights(config, {name: w.to(CUDA, dtype) for name, w in weights.items()})
    with torch.no_grad():
        return torch.nn.functional.linear(own.hidden(tokens.to(CUDA)), own.head_weight())


@pytest.mark.parametrize(("config", "dtype"), COMBINATIONS)
def test_logits_are_the_models(config, dtype):
    weights = weights_of(config)
    some = [{}]
    if dtype == torch.bfloat16:
        columns = {"columns": padded(config.head_dim)} if config.qk_norm else {}
        otherwise = OTHERWISE | {"qkv": replace(OTHERWISE["qkv"], **columns)}
        some += [otherwise, LIBRARY] if config.qk_norm else [EARLY, otherwise, LIBRARY]
    forwards = [StagedForward(config, weights, dtype, CUDA, given) for given in some]
    for batch, sequence in ((1, 1), (3, 17), (2, config.max_seq_len)):
        tokens = tokens_of(config, batch, sequence)
        exact = exact_logits(config, weights, tokens)
        plain = plain_logits(config, weights, tokens, dtype)
        # of float32, PyTorch's own error is a few roundings
        allowed = max(1.5 * relative_error(plain, exact), 4e-6)
        for forward, given in zip(forwards, some, strict=True):
            for logits_dtype in {torch.float32, dtype}:
                got = logits_of(forward, tokens, logits_dtype)
                error = relative_error(got, exact)
                assert error <= allowed, f"{batch}x{sequence}: {error:.2e}, {allowed:.2e} allowed"
                assert torch.equal(logits_of(forward, tokens, logits_dtype), got)
                last = logits_of(forward, tokens, logits_dtype, every=False)
                if given is LIBRARY:  # which has another product for fewer rows
                    assert relative_error(last, exact[:, -1:]) <= 2 * allowed
                else:
                    assert torch.equal(last, got[:, -1:])


@pytest.mark.parametrize("form", ["staged", "all"])
def test_texts_of_different_length(form):
    config = EVERY["heads of 48, longer"]
    weights = weights_of(config)
    tokens, lengths = tokens_of(config, 5, 300), (5, 300, 1, 64, 257)
    exact = torch.stack(
        [
            exact_logits(config, weights, tokens[i : i + 1, :n])[0, -1:]
            for i, n in enumerate(lengths)
        ]
    )
    forward = StagedForward(config, weights, torch.bfloat16, CUDA)
    whole = relative_error(forward.logits(tokens), exact_logits(config, weights, tokens))
    if form == "staged":
        got = forward.logits(tokens, False, lengths)
    else:
        fused = FusedForward(config, forward.packed, Shape(5, 300, False), {})
        fused.buffers.tokens.copy_(tokens.flatten())
        fused.end_at(lengths)
        fused.run()
        fused.check()
        got = fused.buffers.logits.view(5, 1, -1)
    assert relative_error(got, exact) < 2 * whole


def test_logits_in_the_models_dtype_by_the_library_and_as_a_graph():
    config = EVERY["heads of 48, longer"]
    weights = weights_of(config)
    tokens = tokens_of(config, 2, 150)
    exact = exact_logits(config, weights, tokens)
    plain = plain_logits(config, weights, tokens, torch.bfloat16)
    allowed = 1.5 * relative_error(plain, exact)
    for every in (True, False):
        errors = []
        for given in ({}, LIBRARY):
            forward = StagedForward(config, weights, torch.bfloat16, CUDA, given)
            bound = forward.bind(2, 150, every, torch.bfloat16)
            bound.buffers.tokens.copy_(tokens.flatten())
            bound.run()
            launched = bound.buffers.logits.clone()
            bound.buffers.logits.fill_(float("nan"))
            bound.captured().replay()
            assert torch.equal(bound.buffers.logits, launched)
            of = exact if every else exact[:, -1:]
            errors.append(relative_error(launched.view(of.shape), of))
        assert errors[0] <= (allowed if every else 2 * allowed)
        assert errors[1] < 1.5 * errors[0]


@pytest.mark.parametrize(("config", "dtype"), COMBINATIONS)
def test_a_few_launches_have_the_same_bits_as_one_for_each_stage(config, dtype):
    weights = weights_of(config)
    early = EARLY if dtype == torch.bfloat16 and not config.qk_norm else {}
    for shape in (Shape(1, 1), Shape(3, 17), Shape(2, config.max_seq_len, False)):
        early = alike(config, shape.batch * shape.sequence, dtype, early)
        staged = StagedForward(config, weights, dtype, CUDA, early)
        for depth in ("all", "half", 1, "stage"):
            fused = FusedForward(config, staged.packed, shape, early, depth)
            for seed in range(3):
                tokens = tokens_of(config, shape.batch, shape.sequence, seed)
                expected = staged.logits(tokens, shape.all_positions)
                fused.buffers.logits.fill_(float("nan"))
                fused.buffers.tokens.copy_(tokens.flatten())
                fused.run()
                fused.check()
                assert torch.equal(fused.buffers.logits.view(expected.shape), expected)


@pytest.mark.parametrize("programs", [1, 2, 7, 33, 131, 132])
def test_any_number_of_programs_has_the_same_bits(programs):
    config = EVERY["heads of 48, longer"]
    weights = weights_of(config)
    given = alike(config, 400, torch.bfloat16, EARLY)
    staged = StagedForward(config, weights, torch.bfloat16, CUDA, given)
    fused = FusedForward(config, staged.packed, Shape(2, 200), given, ctas=programs)
    b = fused.buffers
    for seed in range(5):
        tokens = tokens_of(config, 2, 200, seed)
        expected = staged.logits(tokens)
        for scratch in (b.x, b.partial_sumsq, b.qkv, b.attn_out, b.hidden, b.logits):
            scratch.fill_(float("nan"))
        b.tokens.copy_(tokens.flatten())
        fused.run()
        fused.check()
        assert torch.equal(b.logits.view(expected.shape), expected)


def test_a_tile_waits_for_more_row_tiles_than_it_has_threads():
    config = EVERY["heads of 48, longer"]
    narrow = {"down": Blocking(16, 32, 64, 3), "head": Blocking(128, 128, 64, 3)}
    narrow = alike(config, 12800, torch.bfloat16, narrow)
    staged = StagedForward(config, weights_of(config), torch.bfloat16, CUDA, narrow)
    fused = FusedForward(config, staged.packed, Shape(128, 100, False), narrow)
    for seed in range(3):
        tokens = tokens_of(config, 128, 100, seed)
        fused.buffers.tokens.copy_(tokens.flatten())
        fused.run()
        fused.check()
        expected = staged.logits(tokens, all_positions=False)
        assert torch.equal(fused.buffers.logits.view(expected.shape), expected)


@pytest.mark.parametrize("form", ["staged", "all", "half"])
def test_a_graph_has_the_same_bits(form):
    config = EVERY["heads of 48, longer"]
    weights = weights_of(config)
    given = alike(config, 300, torch.bfloat16, EARLY)
    if form == "staged":
        given |= OTHERWISE
    staged = StagedForward(config, weights, torch.bfloat16, CUDA, given)
    if form == "staged":
        bound = staged.bind(2, 150)
    else:
        bound = FusedForward(config, staged.packed, Shape(2, 150), given, form)
    graph = bound.captured()
    for seed in range(20):
        tokens = tokens_of(config, 2, 150, seed)
        bound.buffers.logits.fill_(float("nan"))
        bound.buffers.tokens.copy_(tokens.flatten())
        graph.replay()
        expected = staged.logits(tokens)
        assert torch.equal(bound.buffers.logits.view(expected.shape), expected)


@pytest.mark.parametrize("form", ["staged", "half"])
def test_a_launch_by_its_handle_is_tritons_own(form):
    config = EVERY["heads of 48, longer"]
    given = OTHERWISE if form == "staged" else {}
    forward = StagedForward(config, weights_of(config), torch.bfloat16, CUDA, given)
    if form == "staged":
        bound = forward.bind(2, 150)
    else:
        bound = FusedForward(config, forward.packed, Shape(2, 150), {}, form)
    for seed in range(2):
        bound.buffers.tokens.copy_(tokens_of(config, 2, 150, seed).flatten())
        bound.buffers.logits.fill_(float("nan"))
        for call in bound.calls:
            call.kernel[(call.ctas,)](*call.arguments, **call.options)
        bound.check()
        expected = bound.buffers.logits.clone()
        bound.buffers.logits.fill_(float("nan"))
        bound.run()
        bound.check()
        assert torch.equal(bound.buffers.logits, expected)


def test_a_wait_gives_up_and_says_where():
    from onelaunch.engines.cuda import sync  # it imports Triton

    config = EVERY["heads of 48, longer"]
    given = alike(config, 100, torch.bfloat16, {})
    staged = StagedForward(config, weights_of(config), torch.bfloat16, CUDA, given)
    fused = FusedForward(
        config, staged.packed, Shape(1, 100), given, "stage", timeout_ns=20_000_000
    )
    fused.buffers.tokens.zero_()
    fused.calls[2]()  # attention, without what it reads
    with pytest.raises(EngineTimeout, match=r"waited 0.02 s for row tile 0 of layer 0 qkv"):
        fused.check()
    fused.run()
    fused.check()
    expected = staged.logits(torch.zeros(1, 100, dtype=torch.int64))
    assert torch.equal(fused.buffers.logits.view(expected.shape), expected)
    assert int(fused.sync[sync.EPOCH]) == 1
