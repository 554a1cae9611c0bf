"""A training step of one shape of batch: forward, loss and backward, as one CUDA graph or three.

The residual stream, its gradient and all sums are float32, as in PyTorch's autocast; what products
read and write is in the engine's dtype. The forward keeps of each layer both residuals, their
norms, queries, keys and values, attention's output, gates and ups, and what the SwiGLU gives; or
less (plan/training.py). Logits exist for some rows at a time: their loss, their gradient in their
place, and its products follow at once.

On a GPU the gradients of weights are computed on a side stream; the main stream waits for them
only where it would overwrite what they read. That and the tiles of kernels are its forms
(forms.py).

The backward makes dropout's masks again. The sites of dropout are numbered: 3 i is what is added
before layer i, the embedding or a feed-forward; 3 i + 1 are its attention's weights, and 3 i + 2 is
its attention's output.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.engines.cuda.training import launches
from onelaunch.engines.cuda.training.flat import FlatParameters
from onelaunch.engines.cuda.training.forms import TrainingForms, has_own_attention, rule
from onelaunch.engines.cuda.training.kinds import KindEvents
from onelaunch.engines.cuda.training.launches import Dropout, HeadNorms, Heads
from onelaunch.engines.cuda.training.products import (
    Attention,
    multiply,
    multiply_back,
    weight_gradient,
)
from onelaunch.engines.cuda.training.side_stream import End, SideStream
from onelaunch.engines.cuda.training.swiglu_launches import (
    can_fuse,
    down_back_swiglu,
    gate_up_swiglu,
)
from onelaunch.engines.engine import Mark, no_mark
from onelaunch.model import rope_tables
from onelaunch.plan.training import Recompute, logit_rows

BACKWARD = "backward"
PARTS = ("forward", "loss", BACKWARD)
BACKWARD_END = "backward end"
Ready = Callable[[int, int], None]
"""Called with the begin and the end of gradients that are final."""
NORM_CTAS = 1056
"""Of the backward of norms, each with a partial sum of the weight's gradient."""


def forms_by_rule(
    config: ModelConfig,
    flat: FlatParameters,
    sequences: int,
    length: int,
) -> TrainingForms:
    """The rule's forms of a micro-step with these parameters, where they lie."""
    fuses = can_fuse(flat.half_M, config.dim, config.hidden_dim)
    return rule(config, sequences, length, flat.half_M.dtype, fuses)


@dataclass(slots=True)
class _Kept:
    """Of a layer, for the backward. `rotated` has queries and keys where they have norms;
    `lse_HN` is where attention is ours, and else `attention` a library's."""

    x_ND: Tensor
    normed_ND: Tensor
    rstd_N: Tensor
    qkv_NC: Tensor
    rotated: Tensor | None
    mid_ND: Tensor
    normed_mid_ND: Tensor
    rstd_mid_N: Tensor
    gate_up_N2F: Tensor
    hidden_NF: Tensor
    out_NQ: Tensor | None
    lse_HN: Tensor | None
    attention: Attention | None = None


class CapturedStep(NamedTuple):
    """A whole micro-step as a CUDA graph, and the logits that it writes."""

    graph: torch.cuda.CUDAGraph
    logits_CV: Tensor


class TrainingStep:
    """Micro-steps of (sequences, length) tokens: `load`, `forward`, then `loss` and `backward`, or
    `loss_sum`. With `dropout`, a probability, attention must be ours. `forms` are by default the
    rule's; others round otherwise."""

    def __init__(
        self,
        config: ModelConfig,
        flat: FlatParameters,
        sequences: int,
        length: int,
        dropout: float = 0.0,
        recompute: Recompute = "nothing",
        forms: TrainingForms | None = None,
    ) -> None:
        c = self._config = config
        self._flat, self._shape, self._recompute = flat, (sequences, length), recompute
        dtype, device = flat.half_M.dtype, flat.half_M.device
        self._on_gpu = device.type == "cuda"
        N = sequences * length
        C, Q = c.q_dim + 2 * c.kv_dim, c.q_dim

        def real(*shape: int) -> Tensor:
            return torch.empty(shape, device=device)

        def half(*shape: int) -> Tensor:
            return torch.empty(shape, device=device, dtype=dtype)

        def whole(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device, dtype=torch.int64)

        attends = has_own_attention(c, dtype)
        assert attends or not dropout
        forms = forms or forms_by_rule(c, flat, sequences, length)
        assert attends == (forms.attention_forward is not None)
        self._probability, self._drops = dropout, False
        # of each site the key of its random numbers and its number
        self._generators_G2 = whole(3 * c.n_layers + 1, 2)
        self._generators_G2[:, 1] = torch.arange(len(self._generators_G2))
        self._tokens_N, self._targets_N = whole(N), whole(N)
        self._sorted_2N = None
        if N <= launches.COUNTED:
            self._sorted_2N = torch.empty(2, N, device=device, dtype=torch.int32)
        self._scale, self._scale_is = real(1), float("nan")
        self._weight, self._count, self._mean, self._sum = (real(1) for _ in range(4))
        shared_hidden = None if recompute == "nothing" else half(N, c.hidden_dim)

        def kept() -> _Kept:
            return _Kept(
                real(N, c.dim), half(N, c.dim), real(N), half(N, C),
                half(N, Q + c.kv_dim) if c.qk_norm else None,
                real(N, c.dim), half(N, c.dim), real(N), half(N, 2 * c.hidden_dim),
                half(N, c.hidden_dim) if shared_hidden is None else shared_hidden,
                half(N, Q) if attends else None, real(c.n_heads, N) if attends else None,
            )  # fmt: skip

        self._layers = [kept()]
        for _ in range(1, c.n_layers):
            if recompute == "layers":
                x, normed, rstd = real(N, c.dim), half(N, c.dim), real(N)
                self._layers.append(replace(self._layers[0], x_ND=x, normed_ND=normed, rstd_N=rstd))
            else:
                self._layers.append(kept())
        self._last_ND, self._normed_ND, self._rstd_N = real(N, c.dim), half(N, c.dim), real(N)
        self._delta_ND = half(N, c.dim)
        self._losses_N = real(N)
        # of the backward
        self._dnormed_ND, self._dhidden_NF = half(N, c.dim), half(N, c.hidden_dim)
        self._dx_ND = real(N, c.dim)
        # written in turn, as a weight's gradient may still be read from the other one
        self._dx_half_2ND = half(N, c.dim), half(N, c.dim)
        self._dout_NQ, self._dqkv_NC = half(N, Q), half(N, C)
        self._delta_HN = real(c.n_heads, N)
        self._edges = real(*launches.edges_shape(N, c.dim))
        self._partials = real(2 * c.n_layers + 1, min(NORM_CTAS, N), c.dim)
        self._partials_of_heads = None
        if c.qk_norm:
            self._partials_of_heads = real(c.n_layers, 2, min(NORM_CTAS, N), c.head_dim)
        names = [
            f"layers.{i}.{which}_layernorm.weight"
            for i in range(c.n_layers)
            for which in ("input", "post_attention")
        ]
        self._offsets = self._begins([*names, "norm.weight"], device)
        self._offsets_of_heads = self._begins(
            [
                f"layers.{i}.self_attn.{which}_norm.weight"
                for i in range(c.n_layers if c.qk_norm else 0)
                for which in "qk"
            ],
            device,
        )
        self._cos_SP, self._sin_SP = (table.to(device) for table in rope_tables(config, length))
        self._heads = Heads(c.n_heads, c.n_kv_heads, c.head_dim, c.rope_layout == "interleaved")
        self._segments = flat.segments()
        self._watches = True
        self._kinds: dict[tuple[str, bool, bool], KindEvents] = {}
        self._measured: list[KindEvents] = []
        self._side_stream, self._logits_CV = SideStream(device), half(0, c.vocab_size)
        self._use(forms)

    def _use(self, forms: TrainingForms) -> None:
        """Have nothing captured, and be in these forms from now on."""
        self.forms, half_M, V = forms, self._flat.half_M, self._config.vocab_size
        rows = logit_rows(len(self._tokens_N), V, forms.logits)
        if self._logits_CV.shape[0] != rows:
            self._logits_CV = half_M.new_empty(0, V)  # those of before may go first
            self._logits_CV = half_M.new_empty(rows, V)
        self._side_stream.use(forms.side_stream)
        self._launched: set[tuple[str, bool, bool]] = set()
        self._graphs: dict[tuple[str, bool, bool], torch.cuda.CUDAGraph] = {}
        self._pool: Any = None

    def load(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor,
        scale: float,
        dropout_key: int | None = None,
    ) -> None:
        """The batch of the next micro-step, what its gradients are multiplied by, and the key of
        its random numbers, an int64; without one nothing is dropped."""
        self._tokens_N.copy_(tokens_BS.reshape(-1), non_blocking=True)
        self._targets_N.copy_(targets_BS.reshape(-1), non_blocking=True)
        if scale != self._scale_is:
            self._scale.fill_(scale)
            self._scale_is = scale
        self._drops = dropout_key is not None
        if dropout_key is not None:
            self._generators_G2[:, 0].fill_(dropout_key)

    def train(self, accumulate: bool, mark: Mark = no_mark, ready: Ready | None = None) -> Tensor:
        """The mean loss, and all gradients, added to what is there with `accumulate`. With a `mark`
        it is three graphs, else one. `ready` is called as parts of the gradients are final on the
        current stream, with more graphs, until all have been named."""
        # a library's attention is captured with what it keeps, which parts must share
        if ready is not None and self.forms.attention_forward is not None:
            self._train_in_segments(accumulate, mark, ready)
            return self._mean[0].clone()
        if mark is no_mark:
            self._run("step", accumulate)
        else:
            for part in PARTS:
                self._run(part, accumulate)
                mark(part)
            keys = ((part, accumulate, self._drops) for part in PARTS)
            self._measured = [self._kinds[key] for key in keys if key in self._kinds]
        if ready is not None:
            ready(0, self._flat.gradients_M.numel())
        return self._mean[0].clone()

    def _train_in_segments(self, accumulate: bool, mark: Mark, ready: Ready) -> None:
        flat, self._watches = self._flat, False
        for part in PARTS[:-1]:
            self._run(part, accumulate)
            mark(part)
        layers = self._segments[-1].begin
        begin = layers if self._config.tied_embeddings else flat.begin("lm_head.weight")
        if begin < layers:
            ready(begin, layers)
        for number, segment in enumerate(self._segments):
            self._run(f"{BACKWARD} {number}", accumulate)
            ready(segment.begin, segment.end)
        self._run(BACKWARD_END, accumulate)
        ready(0, begin)
        ready(flat.n_decayed, flat.gradients_M.numel())
        mark(BACKWARD)

    def kind_seconds(self) -> dict[str, float]:
        """The seconds of each kind of work in the last micro-step with a `mark`, all on one stream;
        once, and nothing while it runs or where no graph had it."""
        found = [events.seconds() for events in self._measured]
        if any(seconds is None for seconds in found):
            return {}
        self._measured = []
        return {kind: s for seconds in found if seconds for kind, s in seconds.items()}

    def capture(self, forms: TrainingForms) -> CapturedStep:
        """A micro-step in other forms, for a GPU, which has run once before. What was captured
        before stays as it is; all write the same buffers, but for logits."""
        self._use(forms)
        self._launch("step", False)
        return CapturedStep(self._captured("step", False), self._logits_CV)

    def loss_sum(self) -> Tensor:
        """The loss summed over the targets; no gradient is touched."""
        self._run("evaluation", False)
        return self._sum[0].clone()

    def _run(self, part: str, accumulate: bool) -> None:
        """Launched at its first use, captured and replayed from its second. What is a part of
        something that was launched has its kernels loaded."""
        key = part, accumulate, self._drops
        whole = PARTS if part == "step" else (part.split()[0],)
        loaded = key in self._launched or all((each, *key[1:]) in self._launched for each in whole)
        if not self._on_gpu or not loaded:
            self._launch(part, accumulate)
            self._launched |= {key, *((each, *key[1:]) for each in whole if part == "step")}
            return
        if key not in self._graphs:
            # those of parts at once, or the first step that is measured would wait for them
            for name in ("step", *PARTS) if part == "step" else (part,):
                self._graphs[name, *key[1:]] = self._captured(name, accumulate)
        self._graphs[key].replay()

    def _captured(self, part: str, accumulate: bool) -> torch.cuda.CUDAGraph:
        if part in PARTS and self._watches:
            events = KindEvents()
            try:
                with self._side_stream.at_once():
                    graph = self._capture(part, accumulate, events)
            except (RuntimeError, TypeError):  # events cannot be captured here
                self._watches = False
            else:
                self._kinds[part, accumulate, self._drops] = events
                return graph
        return self._capture(part, accumulate)

    def _capture(
        self, part: str, accumulate: bool, events: KindEvents | None = None
    ) -> torch.cuda.CUDAGraph:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            with nullcontext() if events is None else events.watching(part):
                self._launch(part, accumulate)
        self._pool = graph.pool()
        return graph

    def _launch(self, part: str, accumulate: bool) -> None:
        if part in ("step", "forward", "evaluation"):
            self._forward()
        if part == "evaluation":
            self._loss(False, False)
        if part in ("step", "loss"):
            self._loss(True, accumulate)
        if part == "loss":
            self._side_stream.join_all()
        if part in ("step", BACKWARD):
            self._backward(accumulate)
        elif part == BACKWARD_END:
            self._backward_end(accumulate, self._sorted())
        elif part.startswith(BACKWARD):
            self._backward_layers(accumulate, self._segments[int(part.split()[1])].layers)
            self._side_stream.join_all()

    # ---- the parts

    def _forward(self) -> None:
        c, flat, eps = self._config, self._flat, self._config.norm_eps
        first = self._layers[0]
        launches.embed_norm(
            self._tokens_N, flat.weight("embed_tokens.weight"), self._norm(0, "input"), eps,
            first.x_ND, first.normed_ND, first.rstd_N, self._dropout(0),
        )  # fmt: skip
        for i, kept in enumerate(self._layers):
            self._forward_layer(i, kept)
            multiply(kept.hidden_NF, flat.half(i, "down"), self._delta_ND)
            if self._recompute == "layers" and i + 1 < c.n_layers:
                kept.attention = None
            to = self._last_ND, self._normed_ND, self._rstd_N
            weight = flat.weight("norm.weight")
            if i + 1 < c.n_layers:
                after = self._layers[i + 1]
                to = after.x_ND, after.normed_ND, after.rstd_N
                weight = self._norm(i + 1, "input")
            dropout = self._dropout(3 * i + 3)
            launches.add_norm(kept.mid_ND, self._delta_ND, weight, eps, *to, dropout)

    def _forward_layer(self, i: int, kept: _Kept) -> None:
        """From the norm of a layer's input to what its SwiGLU gives."""
        flat = self._flat
        multiply(kept.normed_ND, flat.half(i, "qkv"), kept.qkv_NC)
        norms = self._head_norms(i)
        rotated = kept.qkv_NC if kept.rotated is None else kept.rotated
        launches.rotate(kept.qkv_NC, self._cos_SP, self._sin_SP, self._heads, rotated, norms)
        self._attend(i, kept)
        assert kept.out_NQ is not None
        multiply(kept.out_NQ, flat.half(i, "out"), self._delta_ND)
        launches.add_norm(
            kept.x_ND, self._delta_ND, self._norm(i, "post_attention"), self._config.norm_eps,
            kept.mid_ND, kept.normed_mid_ND, kept.rstd_mid_N, self._dropout(3 * i + 2),
        )  # fmt: skip
        weight_2FD, tile = flat.half(i, "gate_up"), self.forms.swiglu_forward
        if tile is None:
            multiply(kept.normed_mid_ND, weight_2FD, kept.gate_up_N2F)
            launches.swiglu(kept.gate_up_N2F, kept.hidden_NF)
        else:
            gate_up_swiglu(kept.normed_mid_ND, weight_2FD, kept.gate_up_N2F, kept.hidden_NF, tile)

    def _inputs(self, kept: _Kept) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, (N, heads, E) each."""
        c = self._config
        rotated = kept.qkv_NC if kept.rotated is None else kept.rotated
        queries_keys = rotated[:, : c.q_dim + c.kv_dim].unflatten(1, (-1, c.head_dim))
        values = kept.qkv_NC[:, c.q_dim + c.kv_dim :].unflatten(1, (-1, c.head_dim))
        return queries_keys[:, : c.n_heads], queries_keys[:, c.n_heads :], values

    def _attend(self, layer: int, kept: _Kept) -> None:
        inputs, blocks = self._inputs(kept), self.forms.attention_forward
        if blocks is not None:
            assert kept.out_NQ is not None
            assert kept.lse_HN is not None
            dropout = self._dropout(3 * layer + 1)
            launches.attention_forward(
                *inputs, self._shape[1], kept.out_NQ, kept.lse_HN, blocks, dropout
            )
            return
        kept.attention = Attention(*(x.unflatten(0, self._shape) for x in inputs))
        kept.out_NQ = kept.attention.out_NQ

    def _attend_backward(self, layer: int, kept: _Kept) -> None:
        """From the gradient of attention's output to that of packed rows."""
        tables, norms = (self._cos_SP, self._sin_SP), self._head_norms(layer)
        dout_NHE = self._dout_NQ.unflatten(1, (-1, self._config.head_dim))
        partials = None
        if self._partials_of_heads is not None:
            partials = self._partials_of_heads[layer]
        blocks = self.forms.attention_backward
        if blocks is None:
            assert kept.attention is not None
            dq, dk, dv = kept.attention.backward(dout_NHE.unflatten(0, self._shape))
            raw = None if norms is None else kept.qkv_NC
            launches.rotate_backward(
                dq, dk, dv, *tables, self._heads, self._dqkv_NC, norms, raw, partials
            )
            return
        assert kept.out_NQ is not None
        assert kept.lse_HN is not None
        launches.attention_backward(
            dout_NHE, self._inputs(kept), kept.out_NQ, kept.lse_HN, *tables, self._heads,
            self._delta_HN, self._dqkv_NC, blocks, self._dropout(3 * layer + 1),
        )  # fmt: skip
        if norms is not None and partials is not None:
            launches.head_norms_backward(self._dqkv_NC, self._heads, norms, kept.qkv_NC, partials)

    def _loss(self, with_gradient: bool, accumulate: bool) -> None:
        flat, N = self._flat, len(self._tokens_N)
        name = "embed_tokens.weight" if self._config.tied_embeddings else "lm_head.weight"
        head_VD = flat.view(flat.half_M, name)
        launches.count_targets(self._targets_N, self._scale, self._weight, self._count)
        rows = len(self._logits_CV)
        for first in range(0, N, rows):
            chunk = slice(first, min(N, first + rows))
            normed = self._normed_ND[chunk]
            logits = self._logits_CV[: len(normed)]
            multiply(normed, head_VD, logits)
            launches.cross_entropy(
                logits, self._targets_N[chunk], self._weight, self._losses_N[chunk], with_gradient
            )
            if with_gradient:
                gradient, adds = flat.gradient(name), accumulate or first > 0
                done = self._side_stream.run(
                    partial(weight_gradient, logits, normed, gradient, adds)
                )
                multiply_back(logits, head_VD, self._dnormed_ND[chunk])
                if first + rows < N:
                    self._side_stream.join(done)
        to = self._mean if with_gradient else self._sum
        launches.mean_loss(self._losses_N, self._count, to, total=not with_gradient)

    def _backward(self, accumulate: bool) -> None:
        tokens = list[Tensor]()
        self._side_stream.run(lambda: tokens.extend(self._sorted()))
        self._backward_layers(accumulate, range(self._config.n_layers))
        self._side_stream.join_all()
        self._backward_end(accumulate, (tokens[0], tokens[1]))

    def _backward_layers(self, accumulate: bool, layers: range) -> None:
        """Neighbouring layers; behind the last one its norm first."""
        c, flat, side_stream = self._config, self._flat, self._side_stream
        dx, dnormed, dqkv = self._dx_ND, self._dnormed_ND, self._dqkv_NC
        half, other = self._dx_half_2ND

        def weight(layer: int, group: str, dy: Tensor, x: Tensor) -> End:
            gradient = flat.group_gradient(layer, group)
            return side_stream.run(partial(weight_gradient, dy, x, gradient, accumulate))

        if layers.stop == c.n_layers:
            launches.norm_backward(
                dnormed, self._last_ND, self._rstd_N, flat.weight("norm.weight"), None, dx, half,
                self._partials[-1], self._dropout(3 * c.n_layers),
            )  # fmt: skip
        of_out = of_qkv = None
        for i in reversed(layers):
            kept = self._layers[i]
            if self._recompute == "layers" and i + 1 < c.n_layers:
                side_stream.join(
                    of_out
                )  # which reads what all layers share, and is behind the others
                self._forward_layer(i, kept)
            self._swiglu_backward(i, kept, half)
            of_down = weight(i, "down", half, kept.hidden_NF)
            multiply_back(kept.gate_up_N2F, flat.half(i, "gate_up"), dnormed)
            weight(i, "gate_up", kept.gate_up_N2F, kept.normed_mid_ND)
            side_stream.join(of_out)
            launches.norm_backward(
                dnormed, kept.mid_ND, kept.rstd_mid_N, self._norm(i, "post_attention"),
                dx, dx, other, self._partials[2 * i + 1], self._dropout(3 * i + 2),
            )  # fmt: skip
            assert kept.out_NQ is not None
            multiply_back(other, flat.half(i, "out"), self._dout_NQ)
            of_out = weight(i, "out", other, kept.out_NQ)
            side_stream.join(of_qkv)
            self._attend_backward(i, kept)
            if self._recompute == "layers" and i + 1 < c.n_layers:
                kept.attention = None
            multiply_back(dqkv, flat.half(i, "qkv"), dnormed)
            of_qkv = weight(i, "qkv", dqkv, kept.normed_ND)
            side_stream.join(of_down)
            dropout = self._dropout(3 * i)
            to: tuple[Tensor | None, Tensor | None] = dx, half
            if i == 0:  # the embedding's gradient has its mask
                to = (dx, None) if dropout is None else (None, dx)
            launches.norm_backward(
                dnormed, kept.x_ND, kept.rstd_N, self._norm(i, "input"), dx, *to,
                self._partials[2 * i], dropout,
            )  # fmt: skip

    def _backward_end(self, accumulate: bool, tokens: tuple[Tensor, Tensor]) -> None:
        """The gradients of norms' weights, and of the embedding by `_sorted` tokens."""
        c, flat = self._config, self._flat
        launches.sum_partials(self._partials, flat.gradients_M, self._offsets, accumulate)
        if self._partials_of_heads is not None:
            launches.sum_partials(
                self._partials_of_heads.flatten(0, 1), flat.gradients_M, self._offsets_of_heads,
                accumulate,
            )  # fmt: skip
        embedding = flat.gradient("embed_tokens.weight")
        if not (accumulate or c.tied_embeddings):
            embedding.zero_()
        launches.embedding_gradient(*tokens, self._dx_ND, embedding, self._edges)

    def _swiglu_backward(self, i: int, kept: _Kept, dx_half_ND: Tensor) -> None:
        """From the gradient of a layer's output to that of its gates and ups, in their place."""
        weight_DF, tile = self._flat.half(i, "down"), self.forms.swiglu_backward
        gate_up, hidden = kept.gate_up_N2F, None
        if self._recompute == "hidden":
            hidden = kept.hidden_NF
        if tile is None:
            multiply_back(dx_half_ND, weight_DF, self._dhidden_NF)
            launches.swiglu_backward(self._dhidden_NF, gate_up, gate_up, hidden)
        else:
            down_back_swiglu(dx_half_ND, weight_DF, gate_up, gate_up, hidden, tile)

    def _sorted(self) -> tuple[Tensor, Tensor]:
        """The tokens in a stable order, and the rows that they came from."""
        if self._sorted_2N is None:
            return torch.sort(self._tokens_N.int(), stable=True)
        launches.sort_tokens(self._tokens_N, *self._sorted_2N)
        return self._sorted_2N[0], self._sorted_2N[1]

    def _dropout(self, site: int) -> Dropout | None:
        return Dropout(self._generators_G2[site], self._probability) if self._drops else None

    # ---- weights

    def _norm(self, layer: int, which: str) -> Tensor:
        return self._flat.weight(f"layers.{layer}.{which}_layernorm.weight")

    def _head_norms(self, layer: int) -> HeadNorms | None:
        if not self._config.qk_norm:
            return None
        q, k = (
            self._flat.weight(f"layers.{layer}.self_attn.{which}_norm.weight") for which in "qk"
        )
        return HeadNorms(q, k, self._config.norm_eps)

    def _begins(self, names: list[str], device: torch.device) -> Tensor:
        return torch.tensor([self._flat.begin(name) for name in names], device=device)
