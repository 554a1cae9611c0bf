"""The kernels of a training step compiled, without a GPU, for NVIDIA's sm_90: they compile, keep
their tiles in registers and access memory in whole 16 bytes. Nothing runs, so nothing else is
claimed."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from onelaunch.config import preset
from onelaunch.engines.cuda.training.forms import attention_blocks, swiglu_tiles
from onelaunch.engines.cuda.training.tuning.candidates import candidates
from onelaunch.operators.rms_norm import launch
from tests.compiling import absent, spilled

BF16, F32 = torch.bfloat16, torch.float32
N, S, P = 16_384, 1024, 264


class Compiled(NamedTuple):
    spilled: int
    ptx: str
    shared: int  # bytes of shared memory

    def widths(self, kind: str) -> set[int]:
        """Bytes of a thread's loads (ld) or stores (st)."""
        found = re.findall(rf"{kind}\.global[.\w:]*?(?:\.v(\d))?\.b(\d+)", self.ptx)
        return {int(count or 1) * int(bits) // 8 for count, bits in found}


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    """The kernels that a call of `launches` would launch, by name."""
    triton = pytest.importorskip("triton")
    if launch.INTERPRETED:
        pytest.skip("Triton interprets in this process (TRITON_INTERPRET), so it compiles nothing")
    from triton.runtime import driver

    from onelaunch.engines.cuda.training import launches

    monkeypatch.setattr(driver, "_active", absent("sm_90"))
    found: dict[str, Compiled] = {}

    def compile_only(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        assert all(0 < size < 65_536 for size in grid[1:])
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        name = compiled.metadata.name
        found[name] = Compiled(
            spilled(triton, compiled, tmp_path), compiled.asm["ptx"], compiled.metadata.shared
        )

    monkeypatch.setattr(launches, "launch", compile_only)
    return launches, found


def empty(*shape: int, dtype=F32) -> Tensor:
    """A tensor of which nothing is ever touched."""
    return torch.empty(shape, dtype=dtype, device="meta")


def half(*shape: int) -> Tensor:
    return empty(*shape, dtype=BF16)


def whole(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.int64)


def assert_in_registers(found: dict[str, Compiled], names: set[str]) -> None:
    assert found.keys() == names
    assert not any(c.spilled for c in found.values()), {n: c.spilled for n, c in found.items()}
    # what is narrower is one number of a row or for all, or a head's weight
    for name, one in found.items():
        assert 16 in one.widths("ld"), name


def assert_stores_are_wide(found: dict[str, Compiled], *names: str) -> None:
    for name in names:
        assert found[name].widths("st") == {16}, name


@pytest.mark.extended
@pytest.mark.parametrize("D", [288, 768, 2048, 4096])
def test_norms_and_the_embeddings_gradient(D, kernels):
    launches, found = kernels
    x, normed, rstd, w = empty(N, D), half(N, D), empty(N), empty(D)
    launches.embed_norm(whole(N), empty(32_000, D), w, 1e-5, x, normed, rstd)
    launches.add_norm(x, half(N, D), w, 1e-5, x, normed, rstd)
    launches.norm_backward(normed, x, rstd, w, x, x, normed, empty(P, D))
    launches.sum_partials(empty(13, P, D), empty(10**9), whole(13), False)
    edges = empty(*launches.edges_shape(N, D))
    ids = empty(N, dtype=torch.int32)
    launches.embedding_gradient(ids, ids, x, empty(32_000, D), edges)
    launches.sort_tokens(whole(4096), ids, ids)
    assert_in_registers(
        found,
        {
            "embed_norm_kernel", "add_norm_kernel", "norm_backward_kernel", "sum_partials_kernel",
            "embedding_gradient_kernel", "join_edges_kernel", "sort_tokens_kernel",
        },
    )  # fmt: skip
    assert_stores_are_wide(
        found, "norm_backward_kernel", "embedding_gradient_kernel", "join_edges_kernel"
    )
    for name in ("embed_norm_kernel", "add_norm_kernel"):
        assert found[name].widths("st") == {16, 4}  # 4 of rstd


@pytest.mark.extended
@pytest.mark.parametrize("D", [288, 768, 2048])
def test_norms_with_dropout(D, kernels):
    launches, found = kernels
    x, normed, rstd, w = empty(N, D), half(N, D), empty(N), empty(D)
    dropout = launches.Dropout(whole(2), 0.1)
    launches.embed_norm(whole(N), empty(32_000, D), w, 1e-5, x, normed, rstd, dropout)
    launches.add_norm(x, half(N, D), w, 1e-5, x, normed, rstd, dropout)
    launches.norm_backward(normed, x, rstd, w, x, x, normed, empty(P, D), dropout)
    assert_in_registers(found, {"embed_norm_kernel", "add_norm_kernel", "norm_backward_kernel"})
    assert_stores_are_wide(found, "norm_backward_kernel")
    launches.norm_backward(normed, x, rstd, w, x, None, x, empty(P, D), dropout)
    assert_stores_are_wide(found, "norm_backward_kernel")


@pytest.mark.extended
@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize(
    "heads", [(6, 6, 48, True), (6, 6, 48, False), (12, 4, 64, True), (16, 8, 128, False)]
)
def test_rotary_embedding(heads, with_norms, kernels):
    launches, found = kernels
    heads = launches.Heads(*heads)
    H, K, E, _ = heads
    qkv, cos = half(N, (H + 2 * K) * E), empty(S, E // 2)
    # the layout that attention gives its gradients: heads outside of positions, batches outside
    dq, dk, dv = (half(n, N, E).transpose(0, 1) for n in (H, K, K))
    if with_norms:
        norms = launches.HeadNorms(empty(E), empty(E), 1e-6)
        launches.rotate(qkv, cos, cos, heads, half(N, (H + K) * E), norms)
        partial = empty(2, P, E)
        launches.rotate_backward(dq, dk, dv, cos, cos, heads, qkv, norms, qkv, partial)
        assert not found.pop("rotate_backward_kernel").spilled
        launches.head_norms_backward(qkv, heads, norms, half(*qkv.shape), partial)
    else:
        launches.rotate(qkv, cos, cos, heads, qkv)
        launches.rotate_backward(dq, dk, dv, cos, cos, heads, qkv)
    assert_in_registers(found, {"rotate_kernel", "rotate_backward_kernel"})
    assert_stores_are_wide(found, "rotate_kernel")
    if not with_norms:
        assert_stores_are_wide(found, "rotate_backward_kernel")


def blocks_of(B, S, H, E):
    """Of the forward and the backward by the rule."""
    return tuple(attention_blocks(B, S, H, E, backward=each) for each in (False, True))


def launch_attention(launches, B, E, n_heads, interleaved, dropout=None, blocks=None, only=None):
    """The forward and the backward, or one of them `only`; by default in the rule's blocks."""
    heads = launches.Heads(*n_heads, E, interleaved)
    (H, K, _, _), n_rows = heads, B * 256
    inputs = half(n_rows, (H + 2 * K) * E).view(n_rows, -1, E).split((H, K, K), 1)
    out, lse, cos = half(n_rows, H * E), empty(H, n_rows), empty(256, E // 2)
    forward, backward = blocks or blocks_of(B, 256, H, E)
    if only != "backward":
        launches.attention_forward(*inputs, 256, out, lse, forward, dropout)
    if only != "forward":
        launches.attention_backward(
            out.view(n_rows, H, E), inputs, out, lse, cos, cos, heads, lse,
            half(n_rows, (H + 2 * K) * E), backward, dropout,
        )  # fmt: skip


@pytest.mark.extended
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("n_heads", [(6, 6), (6, 2)])
@pytest.mark.parametrize("E", [48, 64, 128])
@pytest.mark.parametrize("B", [1, 4, 64])
def test_attention(B, E, n_heads, interleaved, kernels):
    launches, found = kernels
    launch_attention(launches, B, E, n_heads, interleaved)
    names = {"attention_forward_kernel", "attention_backward_kernel"}
    _, blocks = blocks_of(B, 256, n_heads[0], E)
    assert_in_registers(found, names | {"attention_delta_kernel"})
    assert found["attention_forward_kernel"].widths("st") == {16, 4}  # 4 of lse
    assert min(found["attention_backward_kernel"].widths("st")) >= 8
    product = "wgmma" if blocks.rows == 64 else "mma"
    for name in names:
        assert re.search(rf"\b{product}[.\w]*\.sync", found[name].ptx), name


@pytest.mark.extended
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("E", [48, 64, 128])
@pytest.mark.parametrize("B", [1, 4, 64])
def test_attention_with_dropout(B, E, interleaved, kernels):
    launches, found = kernels
    launch_attention(launches, B, E, (6, 2), interleaved, launches.Dropout(whole(2), 0.1))
    assert not any(c.spilled for c in found.values()), {n: c.spilled for n, c in found.items()}
    if B == 64:  # a thread has 32 weights: 8 calls, of 16 products each at most
        assert found["attention_forward_kernel"].ptx.count("mul.hi.u32") <= 8 * 16


@pytest.mark.extended
@pytest.mark.parametrize(("H", "E", "D", "F"), [(6, 48, 288, 768), (12, 64, 768, 2048)])
@pytest.mark.parametrize("B", [1, 64])
def test_all_that_is_worth_timing_compiles(B, H, E, D, F, kernels):
    """And fits into shared memory. What spills is slow, but right."""
    launches, found = kernels
    from onelaunch.engines.cuda.training import swiglu_launches as fused

    config = preset("stories15m").with_(
        dim=D, n_heads=H, n_kv_heads=H, head_dim=E, hidden_dim=F, max_seq_len=256
    )
    values = candidates(config, B, 256, BF16, fuses=True)
    spilled_bytes = {}
    for part in ("forward", "backward"):
        for blocks in values[f"attention_{part}"]:
            found.clear()
            launch_attention(launches, B, E, (H, H), True, blocks=(blocks, blocks), only=part)
            spilled_bytes[part, blocks] = check_fits(found, f"attention_{part}_kernel")
    rows = B * 256
    gate_up, hidden = half(rows, 2 * F), half(rows, F)
    for tile in filter(None, values["swiglu_forward"]):
        fused.gate_up_swiglu(half(rows, D), half(2 * F, D), gate_up, hidden, tile)
        spilled_bytes["swiglu forward", tile] = check_fits(found, "gate_up_swiglu_kernel")
    for tile in filter(None, values["swiglu_backward"]):
        fused.down_back_swiglu(half(rows, D), half(D, F), gate_up, gate_up, None, tile)
        spilled_bytes["swiglu backward", tile] = check_fits(found, "down_back_swiglu_kernel")
    assert not any(spilled_bytes.values()), spilled_bytes


def check_fits(found: dict[str, Compiled], name: str) -> int:
    """The bytes that a kernel spills."""
    assert found[name].shared <= 232_448, name
    return found[name].spilled


@pytest.mark.extended
@pytest.mark.parametrize("hidden_dim", [768, 1376, 2048, 5504])
def test_swiglu(hidden_dim, kernels):
    launches, found = kernels
    hidden, gate_up = half(N, hidden_dim), half(N, 2 * hidden_dim)
    launches.swiglu(gate_up, hidden)
    launches.swiglu_backward(hidden, gate_up, gate_up, hidden)
    assert_in_registers(found, {"swiglu_kernel", "swiglu_backward_kernel"})
    assert_stores_are_wide(found, *found)


def assert_fast_product(one: Compiled, tile: Any) -> None:
    """From shared memory that TMA fills, which is never read back into registers, and with as many
    CTAs on a multiprocessor as the tile counts on."""
    assert re.search(r"\bwgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.bf16\.bf16", one.ptx)
    assert "cp.async.bulk.tensor" in one.ptx
    assert not re.search(r"\bcp\.async\.c[ag]\b|\bmma\.sync", one.ptx)
    assert one.shared + 1024 <= 233_472 // max(1, tile.ctas_per_sm)


@pytest.mark.extended
@pytest.mark.parametrize(
    "shape",
    [(N, 288, 768), (N, 768, 2048), (8192, 576, 1536), (256, 768, 2048), (4096, 64, 176)],
)
def test_products_with_swiglu(shape, kernels):
    _, found = kernels
    from onelaunch.engines.cuda.training import swiglu_launches as fused

    rows, D, F = shape
    gate_up, hidden = half(rows, 2 * F), half(rows, F)
    forward, backward = swiglu_tiles(*shape)
    assert forward is not None
    fused.gate_up_swiglu(half(rows, D), half(2 * F, D), gate_up, hidden, forward)
    one = found.pop("gate_up_swiglu_kernel")
    assert_fast_product(one, forward)
    assert one.spilled == 0
    assert one.widths("st") == {16}
    assert (backward is None) == (rows * D > 10**6)
    for out in (hidden, None) if backward else ():
        fused.down_back_swiglu(half(rows, D), half(D, F), gate_up, gate_up, out, backward)
        one = found.pop("down_back_swiglu_kernel")
        assert_fast_product(one, backward)
        assert one.spilled == 0
        assert one.widths("ld") == one.widths("st") == {16}


@pytest.mark.extended
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("V", [512, 8192, 32_000, 49_152, 151_936])
def test_cross_entropy(V, dtype, kernels):
    launches, found = kernels
    name = "cross_entropy_kernel" if V <= 8192 else "cross_entropy_blocks_kernel"
    for with_gradient in (False, True):
        found.clear()
        logits = empty(4096, V, dtype=dtype)
        launches.cross_entropy(logits, whole(4096), empty(1), empty(4096), with_gradient)
        assert_in_registers(found, {name})
    # 4 of the loss, and the gradient at the target
    assert found[name].widths("st") == {16, 4, dtype.itemsize}


@pytest.mark.extended
def test_targets_and_the_mean_loss(kernels):
    launches, found = kernels
    launches.count_targets(whole(N), empty(1), empty(1), empty(1))
    launches.mean_loss(empty(N), empty(1), empty(1))
    assert_in_registers(found, {"count_targets_kernel", "sum_loss_kernel"})


@pytest.mark.extended
@pytest.mark.parametrize("M", [15_191_712, 2_400_000_000])
def test_the_update(M, kernels):
    """The same for more elements than 32 bits count."""
    launches, found = kernels
    weights, partial = empty(M), empty(528)
    launches.sum_of_squares(weights, partial)
    launches.adamw(weights, weights, weights, weights, half(M), partial, empty(8), M // 2, empty(1))
    assert_in_registers(found, {"sum_of_squares_kernel", "adamw_kernel"})
    assert found["adamw_kernel"].widths("st") == {16, 4}  # 4 of the norm


@pytest.mark.extended
def test_one_row_and_one_cta(kernels):
    """Triton makes constants of arguments that are 1."""
    launches, found = kernels
    x, normed, one = empty(1, 288), half(1, 288), empty(1)
    w, dropout = empty(288), launches.Dropout(whole(2), 0.1)
    launches.embed_norm(whole(1), empty(9, 288), w, 1e-5, x, normed, one)
    launches.add_norm(x, normed, w, 1e-5, x, normed, one, dropout)
    launches.norm_backward(normed, x, one, w, None, x, None, empty(1, 288))
    launches.sum_partials(empty(1, 1, 288), w, whole(1), True)
    heads = launches.Heads(1, 1, 2, True)
    norms, qkv, cos = launches.HeadNorms(empty(2), empty(2), 0.0), half(1, 6), empty(1, 1)
    launches.rotate(qkv, cos, cos, heads, half(1, 4), norms)
    d = half(1, 1, 2)
    launches.rotate_backward(d, d, d, cos, cos, heads, qkv, norms, qkv, empty(2, 1, 2))
    inputs, lse = half(1, 3, 8).split((1, 1, 1), 1), empty(1, 1)
    for each in (None, dropout):
        forward, backward = blocks_of(1, 1, 1, 8)
        launches.attention_forward(*inputs, 1, half(1, 8), lse, forward, each)
        launches.attention_backward(
            inputs[0], inputs, half(1, 8), lse, empty(1, 4), empty(1, 4),
            launches.Heads(1, 1, 8, True), lse, half(1, 24), backward, each,
        )  # fmt: skip
    launches.swiglu(half(1, 2), half(1, 1))
    launches.swiglu_backward(half(1, 1), half(1, 2), half(1, 2), None)
    for V in (9, 40_000):
        launches.cross_entropy(half(1, V), whole(1), one, one, True)
    launches.count_targets(whole(1), one, one, one)
    launches.mean_loss(one, one, one, total=True)
    launches.sort_tokens(whole(1), whole(1), whole(1))
    launches.embedding_gradient(whole(1), whole(1), x, empty(9, 288), empty(1, 2, 288))
    launches.sum_of_squares(one, one)
    launches.adamw(one, one, one, one, None, one, empty(8), 1, one)
    assert len(found) == 19
    assert not any(compiled.spilled for compiled in found.values())


def test_no_name_has_a_value_in_the_modules_of_kernels():
    """They would need names of their own, see test_compiled.py of the stages."""
    triton = pytest.importorskip("triton")
    from onelaunch.engines.cuda.training import (
        attention,
        dropout,
        loss,
        rotary,
        rows,
        swiglu_products,
        update,
    )

    for module in (attention, dropout, loss, rotary, rows, swiglu_products, update):
        for name, value in vars(module).items():
            assert not isinstance(value, triton.language.constexpr), name
