"""Every shape of model against its definition in float64, and results that do not depend on how
the work is cut: threads, fusion depth, company, chunks of a prompt."""

import random

import pytest
import torch

from onelaunch.config import LinearRopeScaling, ModelConfig, RopeScaling
from onelaunch.engines.cpu import runtime as runtime_module
from onelaunch.engines.cpu.layout import State
from onelaunch.engines.engine import Sampling
from onelaunch.generation.decode import generate_ids
from onelaunch.model import Model
from onelaunch.plan import every_depth
from tests.engines.cpu.making import floats_at, logits_of, make_engine, make_runtime
from tests.engines.suite import (
    SMALL,
    YARN,
    exact_logits,
    relative_error,
    rows_of_tokens,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("compiled_program")

ROUNDING = 2.0**-22  # what a result of a few operations may be off in float32
TINY = SMALL.with_(n_layers=1, n_heads=2, n_kv_heads=2, max_seq_len=12)


def errors(config, dtype=torch.float32, threads=1, seed=0):
    """The engine's error, plain PyTorch's and the engine's against weights that are not rounded;
    over hundreds of rows, see ROWS."""
    weights = weights_of(config, seed)
    rounded = {name: w.to(dtype).float() if w.dim() == 2 else w for name, w in weights.items()}
    tokens = rows_of_tokens(config, (1, min(config.max_seq_len, 11)), seed=seed + 1)
    exact = exact_logits(config, rounded, tokens)
    name = str(dtype).removeprefix("torch.")
    logits = make_engine(config, weights, dtype=name, threads=threads).logits(tokens)
    assert logits.isfinite().all()
    plain = relative_error(Model.from_weights(config, rounded)(tokens), exact)
    unrounded = relative_error(logits, exact_logits(config, weights, tokens))
    return relative_error(logits, exact), plain, unrounded


SHAPES = {
    **{f"head-{e}": TINY.with_(head_dim=e) for e in (2, 6, 10, 20, 48, 80, 128, 136, 264)},
    **{f"hidden-{f}": TINY.with_(hidden_dim=f) for f in (1, 50, 172, 257)},
    **{f"dim-{d}": TINY.with_(dim=d, head_dim=8) for d in (1, 20, 36, 100)},
    **{f"vocab-{v}": TINY.with_(vocab_size=v) for v in (1, 2, 15, 16, 17, 31, 33, 70)},
    **{f"vocab-{v}-untied": TINY.with_(vocab_size=v, tied_embeddings=False) for v in (7, 48)},
    "gqa-4-1": TINY.with_(n_heads=8, n_kv_heads=2, head_dim=6, qk_norm=True),
    "one-kv-head": TINY.with_(n_heads=3, n_kv_heads=1, head_dim=10, rope_layout="interleaved"),
    "scaled-interleaved": TINY.with_(
        rope_layout="interleaved", rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16), qk_norm=True
    ),
    "linear-scaled": TINY.with_(rope_scaling=LinearRopeScaling(3.0)),
    "yarn": YARN,
    "biases": TINY.with_(qkv_bias=True, n_heads=6, n_kv_heads=2, head_dim=10),
    "biases, qk-norm": TINY.with_(qkv_bias=True, qk_norm=True, rope_layout="interleaved"),
}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_every_shape_is_as_exact_as_plain_pytorch(config, threads):
    ours, plain, _ = errors(config, threads=threads)
    # 0.5x to 1.3x with vectors of 16 numbers; shorter ones sum heads of 264 in more steps
    assert ours <= max(2 * plain, ROUNDING)


def random_config(seed: int) -> ModelConfig:
    pick = random.Random(seed)
    kv_heads = pick.randint(1, 3)
    return ModelConfig(
        dim=pick.randint(1, 90),
        n_layers=pick.randint(1, 3),
        n_heads=kv_heads * pick.randint(1, 4),
        n_kv_heads=kv_heads,
        head_dim=2 * pick.randint(1, 40),
        hidden_dim=pick.randint(1, 200),
        vocab_size=pick.randint(2, 150),
        max_seq_len=pick.randint(1, 40),
        rope_layout=pick.choice(["half", "interleaved"]),
        rope_scaling=pick.choice([None, RopeScaling(4.0, 1.0, 4.0, 16)]),
        qk_norm=pick.random() < 0.5,
        tied_embeddings=pick.random() < 0.5,
        qkv_bias=pick.random() < 0.5,
    )


def test_random_shapes_are_as_exact_as_plain_pytorch():
    ours_2, plain_2 = 0.0, 0.0
    for seed in range(25):
        config = random_config(seed)
        ours, plain, _ = errors(config, threads=1 + seed % 3, seed=seed)
        assert ours <= max(2 * plain, ROUNDING), (seed, config)
        ours_2, plain_2 = ours_2 + ours**2, plain_2 + plain**2
    assert ours_2**0.5 <= 1.5 * plain_2**0.5


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["head-20", "hidden-50", "dim-36", "vocab-33", "gqa-4-1"])
def test_bfloat16_weights_cost_their_own_rounding_and_no_more(name, threads):
    ours, plain, unrounded = errors(SHAPES[name], torch.bfloat16, threads)
    assert ours <= max(2 * plain, ROUNDING)
    # 8 bits of a weight: the model itself is another by so much, whichever engine runs it
    assert 1e-4 < unrounded < 5e-2


def test_a_larger_bfloat16_model_is_as_exact_as_plain_pytorch_on_its_weights():
    config = SMALL.with_(dim=96, hidden_dim=200, vocab_size=300, n_layers=3)
    ours, plain, _ = errors(config, torch.bfloat16)
    assert ours <= 1.5 * plain


# ---- the same bits, however the work is cut

LONG = ModelConfig(
    dim=36, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=10, hidden_dim=50, vocab_size=67,
    max_seq_len=256,
)  # fmt: skip
TEXT = torch.randint(0, LONG.vocab_size, (200,), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def expected(compiled_program):
    """Read one token after another, by one thread: (200, V)."""
    runtime = make_runtime(compiled_program, LONG, weights_of(LONG))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime_module, "MAX_TOKENS", 1)
        return logits_of(runtime, TEXT.tolist())


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("chunk", [2, 3, 4, 5, 7, 127, 128])
def test_a_text_read_in_chunks_gives_the_same_bits(
    compiled_program, expected, monkeypatch, threads, chunk
):
    runtime = make_runtime(compiled_program, LONG, weights_of(LONG), threads)
    monkeypatch.setattr(runtime_module, "MAX_TOKENS", chunk)
    assert torch.equal(logits_of(runtime, TEXT.tolist()), expected)


@pytest.mark.parametrize("depth", every_depth(LONG.n_layers))
@pytest.mark.parametrize("threads", [1, 2])
def test_every_fusion_depth_gives_the_same_bits(expected, depth, threads):
    engine = make_engine(LONG, weights_of(LONG), threads=threads, fusion_depth=depth)
    assert torch.equal(engine.logits(TEXT[None])[0], expected)
    prompts = [[1], TEXT[:9].tolist(), [3, 4]]
    whole = make_engine(LONG, weights_of(LONG), threads=1)
    for sampling in (Sampling(), Sampling(0.9, top_k=20, top_p=0.9, seed=2)):
        assert generate_ids(engine, prompts, 15, sampling) == generate_ids(
            whole, prompts, 15, sampling
        )
    assert engine.describe()["fusion_depth"] == depth


@pytest.mark.parametrize("length", [1, 3, 4, 5, 127, 128, 129, 200])
def test_a_prompt_read_by_generate_has_the_logits_of_reading_it(expected, length):
    engine = make_engine(LONG, weights_of(LONG), threads=2)
    generate_ids(engine, [TEXT[:length].tolist()], 1, Sampling())
    row = floats_at(engine._runtime.state[State.LOGITS], LONG.vocab_size)
    assert torch.equal(row, expected[length - 1])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_texts_in_company_have_the_bits_that_they_have_alone(expected, threads):
    """Together 128 tokens at most: one forward reads them all, rows in the prompts' order."""
    lengths = [5, 1, 40, 3, 4, 64, 9]
    engine = make_engine(LONG, weights_of(LONG), threads=threads)
    generate_ids(engine, [TEXT[:n].tolist() for n in lengths], 1, Sampling())
    state = engine._runtime.state
    for i, n in enumerate(lengths):
        row = floats_at(state[State.LOGITS] + i * state[State.LOGITS_ROW], LONG.vocab_size)
        assert torch.equal(row, expected[n - 1]), n


def test_prompts_that_one_forward_cannot_hold_give_the_same_text():
    engine = make_engine(LONG, weights_of(LONG), threads=2)
    prompts = [TEXT[i : i + n].tolist() for i, n in enumerate([130, 7, 120, 1, 128, 64, 3])]
    alone = [generate_ids(engine, [prompt], 20, Sampling())[0] for prompt in prompts]
    assert generate_ids(engine, prompts, 20, Sampling()) == alone
    assert len({tuple(text) for text in alone}) == len(prompts)
