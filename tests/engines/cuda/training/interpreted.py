"""The kernels of a training step through Triton's interpreter, on CPU tensors: float32 and float16,
since it truncates where bfloat16 should round. Each against PyTorch in float64; what a kernel is to
write begins as NaN. Run by test_interpreter.py in processes of its own."""

from __future__ import annotations

import math
import os
import sys

assert "triton" not in sys.modules, "too late: Triton was imported before this"
os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from onelaunch.engines.cuda.training import launches, loss  # noqa: E402
from onelaunch.engines.cuda.training.forms import AttentionBlocks, attention_blocks  # noqa: E402
from onelaunch.engines.cuda.training.launches import Dropout, HeadNorms, Heads  # noqa: E402
from onelaunch.model import apply_rope, rms_norm, widen_rope  # noqa: E402
from tests.engines.cuda.training import dropout_masks  # noqa: E402
from tests.interpreting import mend_loop_bounds  # noqa: E402

mend_loop_bounds()

EPS = 1e-5
DTYPES = (torch.float32, torch.float16)
SHAPES = ((1, 48), (7, 288), (130, 320), (9, 2048))
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1.2e-3}  # of the largest value of a tensor


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def normal(*shape: int, dtype=torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def poisoned(*shape: int, dtype=torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def assert_close(got: Tensor, exact: Tensor, tolerance: float | None = None) -> None:
    tolerance = TOLERANCE[got.dtype] if tolerance is None else tolerance
    error = (got.double() - exact.double()).abs().max()
    assert error <= tolerance * exact.double().abs().max(), f"{error:.2e}"  # no NaN is below


def dropout_at(site: int, probability: float = 0.2, key: int = (77 << 40) + 5) -> Dropout:
    return Dropout(torch.tensor([key, site]), probability)


def multiplier_of(dropout: Dropout, *shape: int) -> Tensor:
    """What elements are multiplied by, (rows, columns) or (B, H, S, S) of three numbers; float64"""
    (key, site), p = dropout.generator_2.tolist(), dropout.probability
    if len(shape) == 3:
        return dropout_masks.keep_weights(key, site, shape, p).double() / (1 - p)
    return dropout_masks.keep_elements(key, site, *shape, p).double() / (1 - p)


def rstd_of(x: Tensor) -> Tensor:
    return (x.double().square().mean(1) + EPS).rsqrt()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_embed_norm(shape, dtype):
    N, D = shape
    embedding, weight = normal(50, D), normal(D)
    tokens = torch.randint(50, (N,), dtype=torch.int32 if N == 7 else torch.int64)
    x, normed, rstd = poisoned(N, D), poisoned(N, D, dtype=dtype), poisoned(N)
    launches.embed_norm(tokens, embedding, weight, EPS, x, normed, rstd)
    assert torch.equal(x, embedding[tokens.long()])
    assert_close(rstd, rstd_of(x))
    assert_close(normed, rms_norm(x.double(), weight.double(), EPS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("in_place", [False, True])
def test_add_norm(shape, dtype, in_place):
    N, D = shape
    x, delta, weight = normal(N, D), normal(N, D, dtype=dtype, seed=1), normal(D)
    expected = x + delta.float()
    total = x if in_place else poisoned(N, D)
    normed, rstd = poisoned(N, D, dtype=dtype), poisoned(N)
    launches.add_norm(x, delta, weight, EPS, total, normed, rstd)
    assert torch.equal(total, expected)
    assert_close(rstd, rstd_of(expected))
    assert_close(normed, rms_norm(expected.double(), weight.double(), EPS))


@pytest.mark.parametrize("shape", [*SHAPES, (7, 2)])
def test_norms_with_dropout(shape):
    N, D = shape
    embedding, weight, delta = normal(50, D), normal(D), normal(N, D, seed=1)
    tokens, dropout = torch.randint(50, (N,)), dropout_at(4)
    mask = multiplier_of(dropout, N, D)
    x, normed, rstd = poisoned(N, D), poisoned(N, D), poisoned(N)
    launches.embed_norm(tokens, embedding, weight, EPS, x, normed, rstd, dropout)
    assert_close(x, embedding[tokens] * mask)
    assert_close(normed, rms_norm(x.double(), weight.double(), EPS), 1e-5)
    total = poisoned(N, D)
    launches.add_norm(x, delta, weight, EPS, total, normed, rstd, dropout)
    assert_close(total, x + delta * mask)
    assert_close(normed, rms_norm(total.double(), weight.double(), EPS), 1e-5)
    dx, half = normal(N, D, seed=3), poisoned(N, D, dtype=torch.float16)
    out, masked, partial = poisoned(N, D), dx.clone(), poisoned(3, D)
    launches.norm_backward(delta, total, rstd, weight, dx, out, half, partial, dropout)
    assert_close(half, out * mask)
    launches.norm_backward(delta, total, rstd, weight, masked, None, masked, partial, dropout)
    assert_close(masked, out * mask)


def kept(probability, shape=(64, 96), **where):
    """Which elements of ones `add_norm` keeps."""
    N, D = shape
    total, normed, rstd = poisoned(N, D), poisoned(N, D), poisoned(N)
    where = {"site": 0, "probability": probability} | where
    launches.add_norm(
        torch.zeros(N, D), torch.ones(N, D), torch.ones(D), EPS, total, normed, rstd,
        dropout_at(**where),
    )  # fmt: skip
    assert_close(total[total != 0], torch.tensor(1 / (1 - probability)))
    return total != 0


@pytest.mark.parametrize("probability", [0.05, 0.2, 0.5, 0.95])
def test_as_many_are_dropped_as_the_probability_says(probability):
    keep = kept(probability)
    deviation = math.sqrt(probability * (1 - probability) / keep.numel())
    assert abs(1 - keep.double().mean() - probability) < 4 * deviation
    pairs = dropout_masks.keep_weights(
        3, 1, (2, 3, 32), probability
    )  # what the kernels keep: below
    deviation *= math.sqrt(keep.numel() / pairs.numel())
    assert abs(1 - pairs.double().mean() - probability) < 4 * deviation


def test_masks_of_sites_and_keys_and_places_are_independent():
    key = 123 << 32
    masks = [kept(0.5, site=site, key=key + step) for site in (0, 1, 5) for step in (0, 1, 1 << 32)]
    masks += [masks[0].roll(1, 0), masks[0].roll(1, 1), masks[0].roll(8, 1), ~masks[0].roll(8, 0)]
    pairs = [mask.double() * 2 - 1 for mask in masks]
    for i, one in enumerate(pairs):
        for other in pairs[:i]:
            assert abs((one * other).mean()) < 4.5 / math.sqrt(one.numel())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("residual", ["none", "other", "in place"])
def test_norm_backward(shape, dtype, residual):
    N, D = shape
    P = 5  # more than there are tiles of few rows, fewer than there are of many
    dnormed, x, weight = normal(N, D, dtype=dtype), normal(N, D, seed=1), normal(D, seed=2)
    dx = None if residual == "none" else normal(N, D, seed=3)
    x64, weight64 = x.double().requires_grad_(), weight.double().requires_grad_()
    rms_norm(x64, weight64, EPS).backward(dnormed.double())
    expected = x64.grad if dx is None else x64.grad + dx
    out = dx if residual == "in place" else poisoned(N, D)
    half = None if residual == "other" else poisoned(N, D, dtype=dtype)
    partial = poisoned(P, D)
    rstd = rstd_of(x).float()
    launches.norm_backward(dnormed, x, rstd, weight, dx, out, half, partial)
    assert_close(out, expected)
    assert half is None or torch.equal(half, out.to(dtype))
    assert_close(partial.double().sum(0), weight64.grad, 1e-5)


@pytest.mark.parametrize("accumulate", [False, True])
def test_sum_partials(accumulate):
    G, P, D = 3, 70, 48
    partial, offsets = normal(G, P, D), torch.tensor([200, 3, 100])
    gradients = normal(300)
    expected = gradients.double()
    for g, offset in enumerate(offsets):
        before = expected[offset : offset + D] if accumulate else 0
        expected[offset : offset + D] = before + partial[g].double().sum(0)
    if not accumulate:
        gradients[3:51] = float("nan")
    launches.sum_partials(partial, gradients, offsets, accumulate)
    assert_close(gradients, expected)


HEADS = [
    Heads(6, 2, 48, False), Heads(6, 2, 48, True), Heads(2, 2, 64, True), Heads(3, 1, 6, False),
    Heads(1, 1, 2, True),
]  # fmt: skip


def tables(S: int, E: int) -> tuple[Tensor, Tensor]:
    angles = normal(S, E // 2, seed=9)
    return angles.cos(), angles.sin()


def rotated(qkv, cos, sin, heads, norms=None):
    """(N, H, E), (N, K, E) and (N, K, E) of packed rows, in float64."""
    H, K, E, interleaved = heads
    N, S = qkv.shape[0], cos.shape[0]
    q, k, v = qkv.view(N, H + 2 * K, E).split((H, K, K), 1)
    if norms is not None:
        q, k = (rms_norm(x, w, EPS) for x, w in zip((q, k), norms, strict=True))
    cos, sin = (
        table[torch.arange(N) % S][:, None]
        for table in widen_rope(cos.double(), sin.double(), interleaved)
    )
    return apply_rope(q, cos, sin, interleaved), apply_rope(k, cos, sin, interleaved), v


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("batch", "sequence"), [(1, 1), (2, 17)])
def test_rotate_in_place(heads, batch, sequence, dtype):
    N, (H, K, E, _) = batch * sequence, heads
    qkv = normal(N, (H + 2 * K) * E, dtype=dtype)
    cos, sin = tables(sequence, E)
    expected = torch.cat(rotated(qkv.double(), cos, sin, heads), 1).flatten(1)
    values = qkv[:, (H + K) * E :].clone()
    launches.rotate(qkv, cos, sin, heads, qkv)
    assert_close(qkv, expected)
    assert torch.equal(qkv[:, (H + K) * E :], values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_rotate_with_norms(heads, dtype):
    N, (H, K, E, _) = 34, heads
    qkv = normal(N, (H + 2 * K) * E, dtype=dtype)
    cos, sin = tables(17, E)
    weights = normal(E, seed=1), normal(E, seed=2)
    before, out = qkv.clone(), poisoned(N, (H + K) * E, dtype=dtype)
    launches.rotate(qkv, cos, sin, heads, out, HeadNorms(*weights, EPS))
    norms = [w.double() for w in weights]
    expected = torch.cat(rotated(qkv.double(), cos, sin, heads, norms)[:2], 1).flatten(1)
    assert_close(out, expected)
    assert torch.equal(qkv, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize(("batch", "sequence"), [(1, 1), (2, 17)])
def test_rotate_backward(heads, with_norms, batch, sequence, dtype):
    N, (H, K, E, _) = batch * sequence, heads
    qkv = normal(N, (H + 2 * K) * E, dtype=dtype)
    cos, sin = tables(sequence, E)
    weights = normal(E, seed=1), normal(E, seed=2)
    # rows of q and heads of k and v lie apart, as in gradients that attention has transposed
    dq = normal(N, H + 1, E, dtype=dtype, seed=3)[:, :H]
    dk = normal(K, N, E, dtype=dtype, seed=4).transpose(0, 1)
    dv = normal(N, K, E + 2, dtype=dtype, seed=5)[..., :E]
    qkv64 = qkv.double().requires_grad_()
    norms64 = [w.double().requires_grad_() for w in weights] if with_norms else None
    outputs = rotated(qkv64, cos, sin, heads, norms64)
    torch.autograd.backward(outputs, [d.double() for d in (dq, dk, dv)])
    dqkv = poisoned(*qkv.shape, dtype=dtype)
    if norms64 is None:
        launches.rotate_backward(dq, dk, dv, cos, sin, heads, dqkv)
    else:
        partial = poisoned(2, 3, E)
        norms = HeadNorms(*weights, EPS)
        launches.rotate_backward(dq, dk, dv, cos, sin, heads, dqkv, norms, qkv, partial)
        for g in range(2):
            assert_close(partial[g].double().sum(0), norms64[g].grad, 1e-5)
    # elements of one pair with a norm nearly cancel where a head has no other
    assert_close(dqkv, qkv64.grad, None if E > 2 else 5e-3)


def test_norms_of_heads_need_raw_rows_and_partials():
    d, tables_ = torch.zeros(1, 1, 2), torch.ones(1, 1)
    norms = HeadNorms(torch.ones(2), torch.ones(2), EPS)
    with pytest.raises(ValueError, match="raw rows"):
        launches.rotate_backward(
            d, d, d, tables_, tables_, Heads(1, 1, 2, True), torch.zeros(1, 6), norms
        )


def attention_in_float64(q, k, v, sequence, mask=1.0):
    """(N, heads E), with its gradients."""
    q, k, v = (x.unflatten(0, (-1, sequence)).transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores += torch.full_like(scores[0, 0], float("-inf")).triu(1)
    lse = scores.logsumexp(-1) / math.log(2)
    out = scores.softmax(-1) * mask @ v
    return out.transpose(1, 2).flatten(2).flatten(0, 1), lse.transpose(0, 1).flatten(1)


def blocks_of(batch, sequence, heads):
    """Of the forward and the backward by the rule."""
    shape = batch, sequence, heads.n_heads, heads.head_dim
    return tuple(attention_blocks(*shape, backward=each) for each in (False, True))


def check_attention(heads, batch, sequence, dtype, dropout=None, blocks=None):
    """Forward and backward, each twice; by default in the rule's blocks."""
    N, (H, K, E, _) = batch * sequence, heads
    forward, backward = blocks or blocks_of(batch, sequence, heads)
    mask = 1.0 if dropout is None else multiplier_of(dropout, batch, H, sequence)
    qkv64 = normal(N, (H + 2 * K) * E).double().requires_grad_()
    cos, sin = tables(sequence, E)
    expected, lse64 = attention_in_float64(*rotated(qkv64, cos, sin, heads), sequence, mask)
    # slices of packed rows, as a step has them, and values whose heads lie apart
    q_k = torch.cat(rotated(qkv64.detach(), cos, sin, heads)[:2], 1).to(dtype)
    v = poisoned(K, N, E + 8, dtype=dtype).transpose(0, 1)[..., :E]
    v.copy_(qkv64.detach().view(N, H + 2 * K, E)[:, H + K :])
    dout = poisoned(N, H + 1, E, dtype=dtype)[:, :H]
    dout.copy_(normal(N, H, E, seed=1))
    expected.backward(dout.double().flatten(1))
    inputs = q_k[:, :H], q_k[:, H:], v
    first: tuple[Tensor, ...] | None = None
    for _ in range(2):
        out, lse = poisoned(N, H * E, dtype=dtype), poisoned(H, N)
        launches.attention_forward(*inputs, sequence, out, lse, forward, dropout)
        dqkv = poisoned(*qkv64.shape, dtype=dtype)
        delta = poisoned(H, N)
        launches.attention_backward(
            dout, inputs, out, lse, cos, sin, heads, delta, dqkv, backward, dropout
        )
        first = first or (out, lse, dqkv)
        assert all(map(torch.equal, first, (out, lse, dqkv)))
    assert_close(out, expected.detach())
    assert_close(lse, lse64.detach(), TOLERANCE[dtype])
    assert_close(dqkv, qkv64.grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "sequence"), [(2, 1), (1, 7), (2, 33), (1, 130)])
@pytest.mark.parametrize(
    "heads",
    [
        Heads(2, 2, 8, False), Heads(2, 1, 16, True), Heads(3, 1, 48, False),
        Heads(2, 2, 48, True), Heads(2, 1, 64, False), Heads(1, 1, 128, True),
    ],
)  # fmt: skip
def test_attention(heads, batch, sequence, dtype):
    check_attention(heads, batch, sequence, dtype)


@pytest.mark.parametrize(("batch", "sequence"), [(2, 1), (1, 7), (3, 33), (1, 130)])
@pytest.mark.parametrize(
    "heads",
    [
        Heads(2, 2, 8, False), Heads(2, 1, 16, True), Heads(3, 1, 48, False), Heads(2, 2, 48, True),
    ],
)  # fmt: skip
def test_attention_with_dropout(heads, batch, sequence):
    check_attention(heads, batch, sequence, torch.float32, dropout_at(7))


def test_attention_with_dropout_in_half_precision():
    check_attention(Heads(4, 2, 64, False), 1, 66, torch.float16, dropout_at(7))


@pytest.mark.parametrize("sequence", [70, 128])
@pytest.mark.parametrize("rows_columns", [(16, 128), (32, 64), (64, 32), (64, 64)])
@pytest.mark.parametrize("heads", [Heads(2, 1, 40, False), Heads(1, 1, 24, True)])
def test_blocks_of_attention(heads, rows_columns, sequence):
    blocks = (AttentionBlocks(*rows_columns, 2, 4),) * 2
    check_attention(heads, 1, sequence, torch.float32, None, blocks)
    check_attention(heads, 1, sequence, torch.float32, dropout_at(2, 0.4), blocks)


def test_scores_far_from_zero_leave_attention_finite():
    """Each softmax has one key alone; exp2 of what is masked would overflow."""
    heads, sequence = Heads(1, 1, 16, True), 40
    q = normal(sequence, 1, 16) * 100
    k, v, dout = (normal(sequence, 1, 16, seed=s) * 100 for s in (1, 2, 3))
    k[-1] = 1e4 * q[0]  # behind all but the last query
    cos, sin = torch.ones(sequence, 8), torch.zeros(sequence, 8)
    q64, k64, v64 = (x.double().requires_grad_() for x in (q, k, v))
    expected, _ = attention_in_float64(q64, k64, v64, sequence)
    expected.backward(dout.double().flatten(1))
    out, lse = poisoned(sequence, 16), poisoned(1, sequence)
    dqkv, delta = poisoned(sequence, 48), poisoned(1, sequence)
    forward, backward = blocks_of(1, sequence, heads)
    launches.attention_forward(q, k, v, sequence, out, lse, forward)
    launches.attention_backward(dout, (q, k, v), out, lse, cos, sin, heads, delta, dqkv, backward)
    assert_close(out, expected.detach(), 1e-4)
    assert dqkv.isfinite().all()
    assert_close(dqkv[:, 32:], v64.grad.flatten(1), 1e-4)


FEED_FORWARDS = ((1, 48), (7, 1376), (130, 288), (3, 1024))


def swiglu_in_float64(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, 1)
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", FEED_FORWARDS)
def test_swiglu(shape, dtype):
    N, hidden_dim = shape
    gate_up = normal(N, 2 * hidden_dim, dtype=dtype)
    hidden = poisoned(N, hidden_dim, dtype=dtype)
    launches.swiglu(gate_up, hidden)
    assert_close(hidden, swiglu_in_float64(gate_up.double()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", FEED_FORWARDS)
@pytest.mark.parametrize("in_place", [False, True])
def test_swiglu_backward(shape, dtype, in_place):
    N, hidden_dim = shape
    gate_up = normal(N, 2 * hidden_dim, dtype=dtype)
    dhidden = normal(N, hidden_dim, dtype=dtype, seed=1)
    gate_up64 = gate_up.double().requires_grad_()
    expected = swiglu_in_float64(gate_up64)
    expected.backward(dhidden.double())
    to = gate_up if in_place else poisoned(N, 2 * hidden_dim, dtype=dtype)
    hidden = poisoned(N, hidden_dim, dtype=dtype) if in_place else None
    launches.swiglu_backward(dhidden, gate_up, to, hidden)
    assert_close(to, gate_up64.grad)
    assert hidden is None or assert_close(hidden, expected.detach()) is None


@pytest.mark.parametrize("column_count", [1, 48, 128, 129, 288, 768, 1376, 2048, 5504, 11008])
def test_tiles_waste_little_and_fill_their_threads(column_count):
    whole = launches.row_tile(column_count)
    narrow = launches.row_tile(column_count, launches.TILE // 2, fewest_warps=2)
    some = launches.column_tile(column_count)
    tiles = ((whole, launches.TILE, 16), (narrow, launches.TILE // 2, 16))
    for tile, elements, of_thread in (*tiles, (some, launches.COLUMN_TILE, 8)):
        assert tile["R"] * tile["BLOCK"] >= elements
        assert tile["R"] * tile["BLOCK"] / (32 * tile["num_warps"]) >= of_thread
        assert not tile["BLOCK"] & (tile["BLOCK"] - 1)
    assert whole["BLOCK"] == narrow["BLOCK"] >= column_count
    if column_count >= 288:
        assert -(-column_count // some["BLOCK"]) * some["BLOCK"] <= column_count * 4 / 3


ROWS_OF_LOGITS = ((1, 48), (130, 67), (7, 4096), (3, 4097), (2, 8192), (2, 8193), (2, 32_769))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ROWS_OF_LOGITS)
def test_cross_entropy(shape, dtype):
    C, V = shape
    storage = (4 * normal(C, V + 3)).to(dtype)  # rows of any stride
    logits, beyond = storage[:, :V], storage[:, V:].clone()
    targets = torch.randint(V, (C,), dtype=torch.int32 if C == 7 else torch.int64)
    targets[0], targets[-1] = V - 1, -1 if C > 1 else V - 1
    logits[-1, 0] = logits[-1, 0] if C == 1 else float("nan")
    weight = torch.tensor([0.37])
    logits64 = logits.double().requires_grad_()
    expected = F.cross_entropy(logits64, targets.long(), ignore_index=-1, reduction="none")
    (0.37 * expected[: C if C == 1 else -1].sum()).backward()
    before = storage.clone()
    losses = poisoned(C)
    launches.cross_entropy(logits, targets, weight, losses, False)
    assert torch.equal(storage.nan_to_num(), before.nan_to_num())
    assert_close(losses, expected.detach(), 2e-6)
    again = poisoned(C)
    launches.cross_entropy(logits, targets, weight, again, True)
    assert torch.equal(again, losses)
    assert_close(logits, logits64.grad.nan_to_num())
    assert torch.equal(storage[:, V:], beyond)


@pytest.mark.parametrize("V", [300, 40_000])
def test_extreme_logits(V):
    logits = normal(4, V)
    logits[0] = -1e4
    logits[0, V - 1] = 1e4  # far above the rest
    logits[1] = float("-inf")
    logits[1, 5] = 0.0  # the only one that is possible
    logits[2, 7] = float("nan")
    logits[3] = -3e4  # far from 0 together
    targets = torch.tensor([3, 5, 1, 2])
    exact = F.cross_entropy(logits.double(), targets, reduction="none")
    losses = poisoned(4)
    launches.cross_entropy(logits, targets, torch.ones(1), losses, True)
    assert torch.allclose(losses.double(), exact, rtol=1e-6, equal_nan=True)
    assert not logits[1].any()
    assert logits[2].isnan().all()
    assert abs(logits[3].sum()) < 1e-5  # a softmax less a one


def test_a_row_is_read_once_up_to_8192_logits(monkeypatch):
    kernels = []
    monkeypatch.setattr(launches, "launch", lambda kernel, *a, **o: kernels.append(kernel))
    for V in (8192, 8193):
        launches.cross_entropy(
            torch.empty(1, V), torch.zeros(1).long(), torch.ones(1), torch.empty(1), True
        )
    assert kernels == [loss.cross_entropy_kernel, loss.cross_entropy_blocks_kernel]


@pytest.mark.parametrize(
    ("V", "lanes"),
    [(16_384, 2048), (16_385, 4096), (32_000, 4096), (49_152, 2048), (151_936, 4096)],
)
def test_the_lanes_of_a_row_of_logits(V, lanes):
    assert launches.logit_lanes(V) == lanes


@pytest.mark.parametrize("N", [1, 130, 5000])
@pytest.mark.parametrize("kept", ["some", "none", "all"])
def test_targets_and_the_mean_loss(N, kept):
    targets = torch.randint(3, (N,)) - {"some": 1, "none": 3, "all": 0}[kept]
    if kept == "none":
        targets[:] = -1
    losses = normal(N).where(targets != -1, 0.0)
    scale, weight, count = torch.tensor([0.7]), poisoned(1), poisoned(1)
    launches.count_targets(targets, scale, weight, count)
    expected = int((targets != -1).sum())
    assert count.item() == expected
    assert_close(weight, scale / expected if expected else torch.zeros(1))
    mean, total = poisoned(1), poisoned(1)
    launches.mean_loss(losses, count, mean)
    launches.mean_loss(losses, count, total, total=True)
    exact = losses.double().sum()
    assert abs(total.item() - exact) <= 1e-6 * losses.abs().sum()
    if expected:
        assert torch.equal(mean, total / count)
    else:
        assert mean.isnan().all()
        assert weight.item() == 0.0


torch.manual_seed(0)
TOKENS = {
    "one row": torch.tensor([3]),
    "different ones": torch.randperm(130),
    "few": torch.randint(3, (130,)),
    "one token": torch.full((200,), 7),
    "a frequent one": torch.where(torch.rand(300) < 0.4, 5, torch.randint(300, (300,))),
    "runs of whole chunks": torch.arange(4).repeat_interleave(launches.CHUNK),
    "runs over chunks": torch.arange(4).repeat_interleave(launches.CHUNK + 1),
    "the last row alone": torch.arange(5).repeat_interleave(launches.CHUNK // 4)[:33],
}


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("D", [48, 600])
def test_embedding_gradient(tokens, D):
    N = tokens.numel()
    tokens = tokens[torch.randperm(N)]
    dx, gradient = normal(N, D), normal(301, D)
    expected = gradient.double().index_add(0, tokens, dx.double())
    untouched = torch.ones(301, dtype=torch.bool).index_fill(0, tokens, False)
    before = gradient[untouched].clone()
    sorted_N, order_N = torch.sort(tokens, stable=True)
    edges, again = poisoned(*launches.edges_shape(N, D)), gradient.clone()
    launches.embedding_gradient(sorted_N, order_N, dx, gradient, edges)
    launches.embedding_gradient(sorted_N, order_N, dx, again, edges)  # which are as left behind
    assert torch.equal(again, gradient)
    assert_close(gradient, expected, 1e-6)
    assert torch.equal(gradient[untouched], before)


@pytest.mark.parametrize("tokens", [*TOKENS.values(), torch.randint(99, (launches.COUNTED,))])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tokens_are_sorted_stably(tokens, dtype):
    tokens = tokens[torch.randperm(tokens.numel())].to(dtype)
    found = torch.full((2, tokens.numel()), -7, dtype=torch.int32)
    launches.sort_tokens(tokens, found[0], found[1])
    expected = torch.sort(tokens, stable=True)
    assert torch.equal(found[0].long(), expected.values.long())
    assert torch.equal(found[1].long(), expected.indices)


def test_the_chunks_of_a_long_run_are_looked_for_in_turns(monkeypatch):
    """More chunks than one look covers, and more edges than are loaded at once."""
    original = launches.launch

    def narrow(kernel, grid, *arguments, **options):
        if "HEADS" in options:
            options |= {"HEADS": 4, "EDGES": 2}
        original(kernel, grid, *arguments, **options)

    monkeypatch.setattr(launches, "launch", narrow)
    for chunks in (4, 5, 9):
        test_embedding_gradient(torch.full((chunks * launches.CHUNK,), 7), 48)


@pytest.mark.parametrize("M", [1, 4096, 70_001])
def test_sum_of_squares(M):
    gradients, partial = normal(M), poisoned(6)
    launches.sum_of_squares(gradients, partial)
    assert_close(partial.double().sum(), gradients.double().square().sum(), 3e-7)


LR, DECAY, ADAM_EPS = 3e-3, 0.1, 1e-8
SIZES = (3100, 1900)  # what decays, and what does not
STEPS = 3


def adamw_of_torch(weights, betas, clip, dtype):
    """Weights, both moments and the last norm after STEPS updates in a dtype."""
    parts = [torch.nn.Parameter(part.to(dtype, copy=True)) for part in weights.split(SIZES)]
    groups = [{"params": parts[:1], "weight_decay": DECAY}, {"params": parts[1:]}]
    own = torch.optim.AdamW(groups, LR, betas, ADAM_EPS, weight_decay=0.0, foreach=False)
    for step in range(1, STEPS + 1):
        gradients = normal(sum(SIZES), seed=step).to(dtype)
        for part, gradient in zip(parts, gradients.split(SIZES), strict=True):
            part.grad = gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_(parts, clip or float("inf"))
        own.step()
    moments = [torch.cat([own.state[p][name] for p in parts]) for name in ("exp_avg", "exp_avg_sq")]
    return torch.cat([part.detach() for part in parts]), *moments, norm[None]


@pytest.mark.parametrize("dtype", [*DTYPES, None])
@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6, float("inf")])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.4, 0.95)])
def test_adamw_is_torchs(dtype, clip, betas):
    """As near to float64 as PyTorch in float32 is, or a rounding more."""
    M = sum(SIZES)
    weights, moments, norm = normal(M), torch.zeros(2, M), poisoned(1)
    exact = adamw_of_torch(weights, betas, clip, torch.float64)
    plain = adamw_of_torch(weights, betas, clip, torch.float32)
    half = None if dtype is None else poisoned(M, dtype=dtype)
    for step in range(1, STEPS + 1):
        gradients, partial = normal(M, seed=step), poisoned(6)
        before = gradients.clone()
        numbers = torch.tensor(launches.adamw_numbers(LR, betas, ADAM_EPS, DECAY, step, clip))
        launches.sum_of_squares(gradients, partial)
        launches.adamw(weights, gradients, *moments, half, partial, numbers, SIZES[0], norm)
        assert torch.equal(gradients, before)
    for got, own, true in zip((weights, *moments, norm), plain, exact, strict=True):
        rounding = 1.2e-7 * true.abs().max()
        error, allowed = (got - true).abs().max(), 1.5 * (own - true).abs().max() + rounding
        assert error <= allowed, f"{error:.2e} where {allowed:.2e} is allowed"
    assert half is None or torch.equal(half, weights.to(dtype))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_shows(bad):
    """As in PyTorch: with clipping, a norm that is NaN makes all weights so, an infinite one only
    what it came from; the others get no gradient."""
    M = 2000
    weights, moments, norm, partial = normal(M), torch.zeros(2, M), poisoned(1), poisoned(2)
    gradients = normal(M, seed=1)
    gradients[5] = bad
    numbers = torch.tensor(launches.adamw_numbers(1e-3, (0.9, 0.95), 1e-8, 0.0, 1, 1.0))
    launches.sum_of_squares(gradients, partial)
    launches.adamw(weights, gradients, *moments, None, partial, numbers, M, norm)
    assert torch.equal(norm, torch.tensor([bad])) or norm.isnan().all()
    wrong = weights.isnan()
    assert wrong.all() if bad != bad else wrong.nonzero().flatten().tolist() == [5]
