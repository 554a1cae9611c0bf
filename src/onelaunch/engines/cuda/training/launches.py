"""Launch the kernels of a training step on the current stream, into tensors that the caller gives.

Shapes: N rows (batch times sequence), S sequence, D model width, H heads, K kv heads, E head width,
P = E/2 pairs of a head, Q = H E, F hidden width, V vocabulary, C columns of packed queries, keys
and values, (H + 2 K) E, G gradients, M elements of flat tensors; "partials" of a gradient are one
sum per CTA.

T is the compute dtype: float32, bfloat16 or float16. Tensors without "in T" are float32, tokens and
targets int64 or int32; all are contiguous unless a docstring says otherwise. Nothing is allocated
and nothing waits for the device, so that launches can be captured as a CUDA graph. Token ids and
targets are not checked.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from onelaunch.engines.cuda.training import attention, loss, rotary, rows, update
from onelaunch.engines.cuda.training.forms import AttentionBlocks, ctas, next_power_of_2
from onelaunch.operators.triton_cache import verified

TILE = 2048  # elements of a tile of rows: 16 for each thread of four warps
COLUMN_TILE = 1024  # elements of a tile of some columns
ROW_IN_REGISTERS = 8192  # logits of a row; wider rows are read twice
LOGITS_OF_LANE = 8  # neighbouring ones, 16 bytes
COUNTED = 4096  # tokens at most that are sorted by comparing all with all
COUNT_BLOCK = 4096  # targets and losses that the one CTA reads at once
UPDATE_BLOCK = 1024  # elements of the flat tensors, eight for each thread of four warps
SQUARES_BLOCK = 4096
LOG2_E = 1.4426950408889634
CHUNK = 32  # sorted tokens of a CTA of the embedding's gradient


class Heads(NamedTuple):
    """How a packed row is divided: H heads of queries, K of keys and K of values, each E wide.
    `interleaved` pairs neighbouring elements, else those of a head's two halves."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    interleaved: bool


class Dropout(NamedTuple):
    """One of the sites of dropout: `generator_2`, int64, are the key of a micro-step's random
    numbers and the site's number; each element is dropped with `probability`."""

    generator_2: Tensor
    probability: float


class HeadNorms(NamedTuple):
    """The norms of queries and keys: weights, (E,) each."""

    q_weight_E: Tensor
    k_weight_E: Tensor
    eps: float


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel on the current device and its current stream; tests replace it."""
    with verified:
        kernel[grid](*arguments, **options)


def row_tile(columns: int, elements: int = TILE, fewest_warps: int = 4) -> dict[str, int]:
    """Return a tile of R rows of BLOCK columns, all of a row's, and its warps: 16 elements or more
    per thread, in 16 warps at most."""
    block = next_power_of_2(columns)
    count = max(1, elements // block)
    warps = max(fewest_warps, min(16, count * block // 512))
    return {"R": count, "BLOCK": block, "num_warps": warps}


def column_tile(columns: int) -> dict[str, int]:
    """Return a tile of R rows of BLOCK columns, some of a row's: the widest of which a quarter at
    most lies beyond the row's end."""
    blocks = (1024, 512, 256)
    fitting = (b for b in blocks if -(-columns // b) * b <= columns * 4 / 3)
    block = next(fitting, min(128, next_power_of_2(columns)))
    return {"R": COLUMN_TILE // block, "BLOCK": block, "num_warps": 4}


def _dropout_arguments(dropout: Dropout | None) -> dict[str, Any]:
    if dropout is None:
        return {"generator_ptr": None, "DROPPED": 0}
    generator_2, probability = dropout
    return {"generator_ptr": generator_2, "DROPPED": round(probability * 2**32)}


def embed_norm(
    tokens_N: Tensor,
    embedding_VD: Tensor,
    weight_D: Tensor,
    eps: float,
    x_ND: Tensor,
    normed_ND: Tensor,
    rstd_N: Tensor,
    dropout: Dropout | None = None,
) -> None:
    """Write x = dropout(embedding[token]), its norm in T, and 1 / rms."""
    (N, D), tile = x_ND.shape, row_tile(x_ND.shape[1])
    launch(
        rows.embed_norm_kernel, (ctas(N, tile["R"]),),
        tokens_N, embedding_VD, weight_D, x_ND, normed_ND, rstd_N, N, eps, D=D, **tile,
        **_dropout_arguments(dropout),
    )  # fmt: skip


def add_norm(
    x_ND: Tensor,
    delta_ND: Tensor,
    weight_D: Tensor,
    eps: float,
    sum_ND: Tensor,
    normed_ND: Tensor,
    rstd_N: Tensor,
    dropout: Dropout | None = None,
) -> None:
    """Write sum = x + dropout(delta), which may be x itself, its norm in T, and 1 / rms. delta is
    in T."""
    (N, D), tile = x_ND.shape, row_tile(x_ND.shape[1])
    launch(
        rows.add_norm_kernel, (ctas(N, tile["R"]),),
        x_ND, delta_ND, weight_D, sum_ND, normed_ND, rstd_N, N, eps, D=D, **tile,
        **_dropout_arguments(dropout),
    )  # fmt: skip


def norm_backward(
    dnormed_ND: Tensor,
    x_ND: Tensor,
    rstd_N: Tensor,
    weight_D: Tensor,
    dx_ND: Tensor | None,
    out_ND: Tensor | None,
    half_ND: Tensor | None,
    partial_PD: Tensor,
    dropout: Dropout | None = None,
) -> None:
    """Write out = dx + the gradient of RMSNorm, half = dropout(out), and the weight's partials.

    dnormed is in T, half in any dtype. Without dx it is zero; out or half may be dx itself, or None
    and is not written then. There are P CTAs."""
    (N, D), tile = x_ND.shape, row_tile(x_ND.shape[1], TILE // 2, fewest_warps=2)
    launch(
        rows.norm_backward_kernel, (partial_PD.shape[0],),
        dnormed_ND, x_ND, rstd_N, weight_D, dx_ND, out_ND, half_ND, partial_PD, N, D=D, **tile,
        **_dropout_arguments(dropout),
    )  # fmt: skip


def sum_partials(
    partial_GPD: Tensor, gradients_M: Tensor, offsets_G: Tensor, accumulate: bool
) -> None:
    """Sum the partials of G gradients, each D wide, to where `offsets_G`, int64, begin in
    `gradients_M`; `accumulate` adds to what is there."""
    G, P, D = partial_GPD.shape
    columns = 32
    launch(
        rows.sum_partials_kernel, (ctas(D, columns), G),
        partial_GPD, gradients_M, offsets_G, P, D=D, BLOCK_PARTIALS=256, BLOCK_COLUMNS=columns,
        ACCUMULATE=accumulate, num_warps=8,
    )  # fmt: skip


def rotate(
    qkv_NC: Tensor,
    cos_SP: Tensor,
    sin_SP: Tensor,
    heads: Heads,
    out: Tensor,
    norms: HeadNorms | None = None,
) -> None:
    """Write rotated queries and keys, in T; row n has position n % S.

    `out` is `qkv_NC` itself, or (N, (H + K) E) and the packed rows stay. With `norms` each head is
    normalized first; the backward needs the raw rows, so that `out` is another tensor then."""
    (N, _), (S, P) = qkv_NC.shape, cos_SP.shape
    H, K, E, interleaved = heads
    q_weight, k_weight, eps = norms or (None, None, 0.0)
    tile = row_tile(P, TILE // 2)
    launch(
        rotary.rotate_kernel, (ctas(N * (H + K), tile["R"]),),
        qkv_NC, cos_SP, sin_SP, q_weight, k_weight, out, qkv_NC.stride(0), out.stride(0), N, S, eps,
        H=H, K=K, E=E, INTERLEAVED=interleaved, **tile,
    )  # fmt: skip


def rotate_backward(
    dq_NHE: Tensor,
    dk_NKE: Tensor,
    dv_NKE: Tensor,
    cos_SP: Tensor,
    sin_SP: Tensor,
    heads: Heads,
    dqkv_NC: Tensor,
    norms: HeadNorms | None = None,
    qkv_NC: Tensor | None = None,
    partial_2PE: Tensor | None = None,
) -> None:
    """Write the gradient of packed rows from those of rotated queries and keys and of values, all
    in T; the three may have any strides of rows and heads.

    With `norms`: from the raw packed rows too, and with the partials of the weights of queries and
    keys, for `sum_partials`; there are P CTAs then."""
    H, K, E, interleaved = heads
    N, S = dq_NHE.shape[0], cos_SP.shape[0]
    tile = row_tile(E // 2, TILE // 2)
    gradients = (dq_NHE, dk_NKE, dv_NKE)
    strides = tuple(stride for d in gradients for stride in (d.stride(0), d.stride(1)))
    weights: tuple[Tensor | None, ...] = (None, None)
    partials: tuple[Tensor | None, ...] = (None, None)
    grid, eps = ctas(N * H, tile["R"]), 0.0
    if norms is not None:
        if qkv_NC is None or partial_2PE is None:
            raise ValueError("the backward of norms of heads needs the raw rows and partials")
        weights, eps = (norms.q_weight_E, norms.k_weight_E), norms.eps
        partials, grid = (partial_2PE[0], partial_2PE[1]), partial_2PE.shape[1]
    launch(
        rotary.rotate_backward_kernel, (grid,),
        gradients, strides, cos_SP, sin_SP, weights, qkv_NC, dqkv_NC, partials, N, S, eps,
        H=H, K=K, E=E, INTERLEAVED=interleaved, **tile,
    )  # fmt: skip


def attention_forward(
    q_NHE: Tensor,
    k_NKE: Tensor,
    v_NKE: Tensor,
    S: int,
    out_NQ: Tensor,
    lse_HN: Tensor,
    blocks: AttentionBlocks,
    dropout: Dropout | None = None,
) -> None:
    """Write causal attention of N / S sequences, in T, and log2 of each softmax's sum.

    Queries and keys are rotated; the three, in T, may have any strides of rows and heads. E is a
    multiple of 8, up to 128."""
    (N, H, E), K = q_NHE.shape, k_NKE.shape[1]
    inputs = (q_NHE, k_NKE, v_NKE)
    launch(
        attention.attention_forward_kernel, (ctas(S, blocks.rows) * (N // S) * H,),
        inputs, _row_and_head_strides(inputs), out_NQ, lse_HN, N, S, E**-0.5 * LOG2_E,
        H=H, K=K, E=E, PADDED=max(16, next_power_of_2(E)), ROWS=blocks.rows,
        COLUMNS=blocks.columns, EVEN=_even(S, blocks), NUM_STAGES=blocks.num_stages,
        num_warps=blocks.num_warps, **_dropout_arguments(dropout),
    )  # fmt: skip


def attention_backward(
    dout_NHE: Tensor,
    rotated: tuple[Tensor, Tensor, Tensor],
    out_NQ: Tensor,
    lse_HN: Tensor,
    cos_SP: Tensor,
    sin_SP: Tensor,
    heads: Heads,
    delta_HN: Tensor,
    dqkv_NC: Tensor,
    blocks: AttentionBlocks,
    dropout: Dropout | None = None,
) -> None:
    """Write the gradient of packed rows before the rotation of queries and keys, in T.

    `rotated` are the inputs of `attention_forward`, `out_NQ` and `lse_HN` its results. dout, in T,
    may have any strides of rows and heads. `delta_HN` gets the sums of dout * out, in a launch of
    its own."""
    (N, _, E), S = dout_NHE.shape, cos_SP.shape[0]
    H, K, _, interleaved = heads
    inputs = (*rotated, dout_NHE)
    tile = row_tile(E)
    launch(
        attention.attention_delta_kernel, (ctas(N * H, tile["R"]),),
        dout_NHE, out_NQ, delta_HN, dout_NHE.stride(0), dout_NHE.stride(1), N, H=H, E=E, **tile,
    )  # fmt: skip
    launch(
        attention.attention_backward_kernel, (ctas(S, blocks.rows) * (N // S) * (H + K),),
        inputs, _row_and_head_strides(inputs), lse_HN, delta_HN, (cos_SP, sin_SP), dqkv_NC, N, S,
        E**-0.5, E**-0.5 * LOG2_E,
        H=H, K=K, E=E, PADDED=max(16, next_power_of_2(E)), ROWS=blocks.rows, STEP=blocks.columns,
        INTERLEAVED=interleaved, EVEN=_even(S, blocks), NUM_STAGES=blocks.num_stages,
        num_warps=blocks.num_warps, **_dropout_arguments(dropout),
    )  # fmt: skip


def _row_and_head_strides(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(stride for t in tensors for stride in (t.stride(0), t.stride(1)))


def _even(S: int, blocks: AttentionBlocks) -> bool:
    """Whether no block reaches beyond a sequence."""
    return S % max(blocks.rows, blocks.columns) == 0


def swiglu(gate_up_N2F: Tensor, hidden_NF: Tensor) -> None:
    """Write hidden = silu(gate) * up, in T; a row has the F gates first."""
    N, F = hidden_NF.shape
    tile = column_tile(F)
    launch(
        rows.swiglu_kernel, (ctas(N, tile["R"]), ctas(F, tile["BLOCK"])),
        gate_up_N2F, hidden_NF, N, F=F, **tile,
    )  # fmt: skip


def swiglu_backward(
    dhidden_NF: Tensor, gate_up_N2F: Tensor, dgate_up_N2F: Tensor, hidden_NF: Tensor | None
) -> None:
    """Write the gradient of gates and ups, which may take their place, and hidden again unless it
    is None; all in T."""
    N, F = dhidden_NF.shape
    tile = column_tile(F)
    launch(
        rows.swiglu_backward_kernel, (ctas(N, tile["R"]), ctas(F, tile["BLOCK"])),
        dhidden_NF, gate_up_N2F, dgate_up_N2F, hidden_NF, N, F=F, **tile,
    )  # fmt: skip


def cross_entropy(
    logits_CV: Tensor, targets_C: Tensor, weight: Tensor, loss_C: Tensor, with_gradient: bool
) -> None:
    """Write each row's loss, 0 for target -1. With the gradient, logits, in T, become
    (softmax - onehot) * weight; `weight` has one element.

    Rows of logits may have any stride; C here counts rows."""
    C, V = logits_CV.shape
    arguments = (logits_CV, targets_C, weight, loss_C, logits_CV.stride(0))
    if V <= ROW_IN_REGISTERS:
        tile = row_tile(V, 2 * TILE)
        launch(
            loss.cross_entropy_kernel, (ctas(C, tile["R"]),),
            *arguments, C, V=V, WITH_GRADIENT=with_gradient, **tile,
        )  # fmt: skip
    else:
        lanes = logit_lanes(V)
        launch(
            loss.cross_entropy_blocks_kernel, (C,),
            *arguments, V=V, LANES=lanes, WIDTH=LOGITS_OF_LANE, WITH_GRADIENT=with_gradient,
            num_warps=lanes // 128,
        )  # fmt: skip


def logit_lanes(V: int) -> int:
    """Return how many lanes read a row's logits: the most, unless fewer end nearer to its end."""
    most, fewer = (lanes * LOGITS_OF_LANE for lanes in (4096, 2048))
    return (most if ctas(V, most) * most <= ctas(V, fewer) * fewer else fewer) // LOGITS_OF_LANE


def count_targets(targets_N: Tensor, scale: Tensor, weight: Tensor, count: Tensor) -> None:
    """Write the number of targets that are not -1, and weight = scale / count, 0 where that is 0.
    `scale`, `weight` and `count` have one element each."""
    launch(
        loss.count_targets_kernel, (1,),
        targets_N, scale, weight, count, targets_N.numel(), BLOCK=COUNT_BLOCK, num_warps=16,
    )  # fmt: skip


def mean_loss(loss_N: Tensor, count: Tensor, out: Tensor, total: bool = False) -> None:
    """Write the sum of losses over count, NaN where that is 0; with `total` the sum alone. `count`
    and `out` have one element each."""
    launch(
        loss.sum_loss_kernel, (1,),
        loss_N, count, out, loss_N.numel(), BLOCK=COUNT_BLOCK, MEAN=not total, num_warps=16,
    )  # fmt: skip


def sort_tokens(tokens_N: Tensor, sorted_N: Tensor, order_N: Tensor) -> None:
    """Write the tokens sorted stably and the rows that they came from, int32 each; of `COUNTED`
    tokens at most, as the work grows with their square."""
    N = tokens_N.numel()
    launch(
        update.sort_tokens_kernel, (ctas(N, 16),), tokens_N, sorted_N, order_N, N,
        R=16, BLOCK=256, num_warps=4,
    )  # fmt: skip


def edges_shape(n_rows: int, dim: int) -> tuple[int, int, int]:
    """Return the shape of `embedding_gradient`'s edges: two rows for each chunk of positions."""
    return ctas(n_rows, CHUNK), 2, dim


def embedding_gradient(
    sorted_N: Tensor, order_N: Tensor, dx_ND: Tensor, gradient_VD: Tensor, edges: Tensor
) -> None:
    """Add to each token's gradient the rows of dx of that token: two launches, no atomics.

    `sorted_N` are the tokens sorted stably, `order_N` the rows they came from; `edges` has the
    shape of `edges_shape` and need not be cleared."""
    N, D = dx_ND.shape
    block = min(512, next_power_of_2(D))
    grid = (ctas(N, CHUNK), ctas(D, block))
    launch(
        update.embedding_gradient_kernel, grid, sorted_N, order_N, dx_ND, gradient_VD, edges, N,
        D=D, CHUNK=CHUNK, GROUP=8, BLOCK=block, num_warps=4,
    )  # fmt: skip
    if N > CHUNK:
        launch(
            update.join_edges_kernel, grid, sorted_N, gradient_VD, edges, N,
            D=D, CHUNK=CHUNK, HEADS=512, EDGES=8, BLOCK=block, num_warps=4,
        )  # fmt: skip


def sum_of_squares(gradients_M: Tensor, partial_P: Tensor) -> None:
    """Write P partial sums of the squares of all gradients, one per CTA."""
    launch(
        update.sum_of_squares_kernel, (partial_P.numel(),),
        gradients_M, partial_P, gradients_M.numel(), BLOCK=SQUARES_BLOCK, num_warps=8,
    )  # fmt: skip


def adamw_numbers(
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, step: int, clip: float
) -> list[float]:
    """Return what `adamw` reads from its eight numbers at a step, counted from 1.

    1 - beta and the corrections are computed here, in float64 as torch.optim.AdamW does: from
    0.999 in float32, 1 - beta2 would be off by a part in 10^5."""
    beta1, beta2 = betas
    return [
        1 - lr * weight_decay, lr / (1 - beta1**step), 1 - beta1, beta2, 1 - beta2,
        (1 - beta2**step) ** 0.5, eps, clip,
    ]  # fmt: skip


def adamw(
    weights_M: Tensor,
    gradients_M: Tensor,
    exp_avg_M: Tensor,
    exp_avg_sq_M: Tensor,
    half_M: Tensor | None,
    partial_P: Tensor,
    numbers_8: Tensor,
    n_decayed: int,
    norm_out: Tensor,
) -> None:
    """Update weights and moments from gradients clipped by their norm; `half_M` gets the weights
    in T. The first `n_decayed` elements decay.

    `partial_P` are the sums of `sum_of_squares`, `numbers_8` those of `adamw_numbers`; a clip of 0
    or infinity is none. `norm_out`, one element, gets the norm before clipping. Accesses are 16
    bytes wide where M is a multiple of 16."""
    M, P = weights_M.numel(), partial_P.numel()
    launch(
        update.adamw_kernel, (min(ctas(M, UPDATE_BLOCK), 2 * P),),
        weights_M, gradients_M, exp_avg_M, exp_avg_sq_M, half_M, partial_P, numbers_8, norm_out,
        M, P, n_decayed, BLOCK=UPDATE_BLOCK, BLOCK_PARTIALS=next_power_of_2(P), num_warps=4,
    )  # fmt: skip
