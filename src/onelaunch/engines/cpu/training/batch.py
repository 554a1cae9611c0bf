"""Buffers and tables of a training step for one shape of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.engines.cpu.pack import Memory, padded
from onelaunch.engines.cpu.tables import Table
from onelaunch.engines.cpu.training.layout import (
    APART,
    PANEL_BLOCKS,
    PANEL_FLOATS,
    SPENT_FIELDS,
    Kind,
    Layer,
    Operation,
    Phase,
    Step,
)
from onelaunch.model import rope_tables

ITEM_TOKENS = 128  # of work on rows: so often a weight is used once it is in the nearest cache
LOGITS_BYTES = 128 << 20  # of the logits that are kept at once
GRADIENT_ROWS = 384  # of a weight, of one item
_ALIGN = 128
FORWARD = (Kind.FORWARD_ROWS, Kind.FORWARD_ATTENTION)
BEFORE = (*FORWARD, Kind.LOSS)  # the gradients

_ATTENTION, _MLP = "layers.{}.self_attn.", "layers.{}.mlp."
_WEIGHTS = {
    Layer.INPUT_NORM: "layers.{}.input_layernorm.weight",
    Layer.Q: _ATTENTION + "q_proj.weight",
    Layer.K: _ATTENTION + "k_proj.weight",
    Layer.V: _ATTENTION + "v_proj.weight",
    Layer.Q_NORM: _ATTENTION + "q_norm.weight",
    Layer.K_NORM: _ATTENTION + "k_norm.weight",
    Layer.O_PROJ: _ATTENTION + "o_proj.weight",
    Layer.POST_NORM: "layers.{}.post_attention_layernorm.weight",
    Layer.GATE: _MLP + "gate_proj.weight",
    Layer.UP: _MLP + "up_proj.weight",
    Layer.DOWN: _MLP + "down_proj.weight",
}


class Batch:
    """Everything that a step over `sequences` of `length` tokens reads and writes but weights and
    their gradients, which lie in PyTorch's tensors `weights` and `gradients`, by canonical name.

    Sequences are padded to whole blocks of 2 `lanes` tokens. `threads` is for how many threads
    there is room.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Tensor],
        gradients: dict[str, Tensor],
        sequences: int,
        length: int,
        lanes: int,
        threads: int,
        sleep: int,
        clock: int,
    ) -> None:
        self._config, self._weights, self._gradients = config, weights, gradients
        self.sequences, self.length, self.block = sequences, length, 2 * lanes
        self.sequence_blocks = -(-length // self.block)
        self.blocks = sequences * self.sequence_blocks
        self.tokens = self.blocks * self.block
        self._lanes, self._threads = lanes, threads
        self.state = Table(Step.LENGTH)
        self._layers = Table(Layer.LENGTH * config.n_layers)
        self._size = _ALIGN  # never offset 0: in the tables 0 means that there is nothing
        self._places: list[tuple[Table, int, int]] = []  # table, field, offset
        self._set_model()
        self._set_shape()
        self._place_activations()
        self._memory = Memory(self._size)
        for table, field, offset in self._places:
            table[field] = self._memory.address + offset
        self.n_bytes = self._size
        self._fill_positions()
        self.state[Step.SLEEP], self.state[Step.CLOCK] = sleep, clock
        self._phases: list[list[dict[Operation, int]]] = []
        self._plan()
        self._lay_out()

    # ---- the call

    def begin(
        self, tokens_BS: Tensor, targets_BS: Tensor, weight: float, fresh: bool, gradients: bool
    ) -> None:
        """Before a step: what it reads, and what it is to do."""
        self._ids.fill_(0)
        self._ids[:, : self.length] = tokens_BS
        self._targets.fill_(-1)
        self._targets[:, : self.length] = targets_BS
        torch.mul(self._targets >= 0, weight, out=self._loss_weights)
        s = self.state
        s[Step.FRESH] = int(fresh)
        s[Step.WITHOUT_GRADIENTS] = int(not gradients)
        first = 0 if gradients else len(self._phases)
        s[Step.PHASES] = self._phase_table.address + 8 * Phase.LENGTH * first
        s[Step.N_PHASES] = len(self._phases) if gradients else len(self._loss_phases)
        self._counters.fill_(0)

    def loss_sum(self) -> Tensor:
        """After a step: the loss summed over the targets that count, in float64."""
        losses = self._sum.double().log() + self._largest.double() - self._at_target.double()
        return losses.view(self._targets.shape)[self._targets >= 0].sum()

    def seconds(self) -> tuple[float, float, float]:
        """After a step: the time of the forward up to the head, of head and loss with their
        backward, and of the rest."""
        times = self._times.tolist()
        parts = [0, 0, 0]
        for number, phase in enumerate(self._phases):
            kind = phase[0][Operation.KIND]
            part = 1 if kind == Kind.LOSS else 0 if kind in FORWARD else 2
            parts[part] += times[number + 1] - times[number]
        forward, loss, backward = (part * 1e-9 for part in parts)
        return forward, loss, backward

    def take_spent(self) -> dict[Kind, float]:
        """Seconds of all threads together on each kind of work, since the last call."""
        totals = self._spent.sum(0).tolist()
        self._spent.zero_()
        return {kind: totals[kind] * 1e-9 for kind in Kind}

    # ---- the model and the batch

    def _set_model(self) -> None:
        c, s = self._config, self.state
        s[Step.DIM], s[Step.HEADS], s[Step.KV_HEADS] = c.dim, c.n_heads, c.n_kv_heads
        s[Step.HEAD_DIM], s[Step.HIDDEN], s[Step.VOCAB] = c.head_dim, c.hidden_dim, c.vocab_size
        s[Step.INTERLEAVED] = int(c.rope_layout == "interleaved")
        s[Step.QK_NORM], s[Step.N_LAYERS] = int(c.qk_norm), c.n_layers
        s.set_float(Step.EPS, c.norm_eps)
        s[Step.EMBEDDING] = self._weights["embed_tokens.weight"].data_ptr()
        s[Step.HEAD] = self._weights[self._head_name].data_ptr()
        s[Step.FINAL_NORM] = self._weights["norm.weight"].data_ptr()
        s[Step.LAYERS] = self._layers.address
        for layer in range(c.n_layers):
            for field, name in _WEIGHTS.items():
                if (weight := self._weights.get(name.format(layer))) is not None:
                    self._layers[layer * Layer.LENGTH + field] = weight.data_ptr()

    @property
    def _head_name(self) -> str:
        return "embed_tokens.weight" if self._config.tied_embeddings else "lm_head.weight"

    def _set_shape(self) -> None:
        s = self.state
        s[Step.SEQUENCE_BLOCKS], s[Step.BLOCKS] = self.sequence_blocks, self.blocks
        most = max(1, ITEM_TOKENS // self.block)
        self._item_blocks = max(1, min(most, self.blocks // self._threads))
        s[Step.ITEM_BLOCKS] = self._item_blocks
        row = 4 * self._config.vocab_size * self.block
        at_once = max(self._item_blocks * self._threads, LOGITS_BYTES // row)
        self._loss_blocks = min(self.blocks, padded(at_once, self._item_blocks))

    # ---- memory

    def _place_activations(self) -> None:
        c, tokens = self._config, self.tokens
        q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        for layer in range(c.n_layers):

            def place(field: Layer, floats: int, at: int = layer * Layer.LENGTH) -> None:
                self._place(self._layers, at + field, floats)

            place(Layer.X, c.dim * tokens)
            place(Layer.RSTD, tokens)
            place(Layer.QKV, (q + 2 * kv) * tokens)
            place(Layer.LARGEST, c.n_heads * tokens)
            place(Layer.INVERSE_SUM, c.n_heads * tokens)
            place(Layer.ATTN, q * tokens)
            place(Layer.X_MID, c.dim * tokens)
            place(Layer.RSTD_MID, tokens)
            place(Layer.GATED, c.hidden_dim * tokens)
            place(Layer.UPPED, c.hidden_dim * tokens)
            place(Layer.PARTIAL_INPUT, padded(c.dim, self._lanes) * self.blocks)
            place(Layer.PARTIAL_POST, padded(c.dim, self._lanes) * self.blocks)
            if c.qk_norm:
                place(Layer.RAW, (q + kv) * tokens)
                place(Layer.RAW_RSTD, (c.n_heads + c.n_kv_heads) * tokens)
                place(Layer.PARTIAL_Q, padded(c.head_dim, self._lanes) * self.blocks)
                place(Layer.PARTIAL_K, padded(c.head_dim, self._lanes) * self.blocks)
        # a layer's are read while the one before it makes its own
        shared = [self._take((q + 2 * kv) * tokens) for _ in range(min(2, c.n_layers))]
        for layer in range(c.n_layers):
            at = layer * Layer.LENGTH + Layer.D_QKV
            self._places.append((self._layers, at, shared[layer % 2]))
        for field, floats in (
            (Step.X_LAST, c.dim * tokens),
            (Step.NORMED_LAST, c.dim * tokens),
            (Step.RSTD_LAST, tokens),
            (Step.LOGITS, c.vocab_size * self._loss_blocks * self.block),
            (Step.DX, c.dim * tokens),
            (Step.DX_MID, c.dim * tokens),
            (Step.D_ATTN, q * tokens),
            (Step.DELTA, c.n_heads * tokens),
            (Step.ACTIVATION, c.hidden_dim * tokens),
            (Step.PARTIAL_LAST, padded(c.dim, self._lanes) * self.blocks),
        ):
            self._place(self.state, field, floats)
        self.state[Step.SCRATCH_SIZE] = size = padded(4 * self._scratch_floats(), 4096)
        self._place(self.state, Step.SCRATCH, size * self._threads // 4)

    def _scratch_floats(self) -> int:
        """Of one thread."""
        c, block = self._config, self.block
        widest = max(c.dim, c.hidden_dim)
        rows = widest * block * self._item_blocks
        scores = (2 * self.sequence_blocks + 1) * block * block
        panel = (PANEL_BLOCKS + 2) * block * block
        return max(rows, scores, panel) + PANEL_FLOATS

    def _take(self, floats: int) -> int:
        offset = padded(self._size, _ALIGN)
        self._size = offset + 4 * floats
        return offset

    def _place(self, table: Table, field: int, floats: int) -> None:
        self._places.append((table, field, self._take(floats)))

    def _fill_positions(self) -> None:
        c, s = self._config, self.state
        shape = (self.sequence_blocks, self.block, c.head_dim // 2)
        cos, sin = rope_tables(c, self.sequence_blocks * self.block)
        self._cos, self._sin = (
            table.view(shape).transpose(1, 2).contiguous() for table in (cos, sin)
        )
        s[Step.COS], s[Step.SIN] = self._cos.data_ptr(), self._sin.data_ptr()
        padded_shape = (self.sequences, self.sequence_blocks * self.block)
        self._ids = torch.zeros(padded_shape, dtype=torch.int64)
        self._targets = torch.full(padded_shape, -1, dtype=torch.int64)
        self._loss_weights = torch.zeros(padded_shape)
        self._largest, self._sum, self._at_target = (torch.ones(self.tokens) for _ in range(3))
        for field, tensor in (
            (Step.TOKENS, self._ids),
            (Step.TARGETS, self._targets),
            (Step.LOSS_WEIGHTS, self._loss_weights),
            (Step.LARGEST, self._largest),
            (Step.SUM, self._sum),
            (Step.AT_TARGET, self._at_target),
        ):
            s[field] = tensor.data_ptr()

    # ---- what is done

    def _plan(self) -> None:
        """The phases of a step, and of one that gives the loss alone."""
        c = self._config
        row_items = -(-self.blocks // self._item_blocks)

        def rows(kind: Kind, layer: int) -> dict[Operation, int]:
            return {Operation.KIND: kind, Operation.COUNT: row_items, Operation.ARG: layer}

        for layer in range(c.n_layers + 1):
            self._phases.append([rows(Kind.FORWARD_ROWS, layer)])
            if layer < c.n_layers:
                heads = self.sequences * c.n_heads
                self._phases.append([self._of_layer(Kind.FORWARD_ATTENTION, heads, layer)])
        for first in range(0, self.blocks, self._loss_blocks):
            self._phases += self._losses(first, min(self._loss_blocks, self.blocks - first))
        for layer in range(c.n_layers - 1, -1, -1):
            self._phases.append([rows(Kind.BACKWARD_ROWS, layer)])
            heads = self.sequences * c.n_kv_heads
            phase = [self._of_layer(Kind.BACKWARD_ATTENTION, heads, layer)]
            phase += self._behind_attention(layer)
            if layer + 1 < c.n_layers:
                phase += self._before_attention(layer + 1)
            self._phases.append(phase)
        self._phases.append([rows(Kind.BACKWARD_ROWS, -1)])
        self._phases.append([*self._before_attention(0), self._embedding(), *self._norms()])
        self._loss_phases = [phase for phase in self._phases if phase[0][Operation.KIND] in BEFORE]

    def _of_layer(self, kind: Kind, count: int, layer: int) -> dict[Operation, int]:
        return {Operation.KIND: kind, Operation.COUNT: count, Operation.ARG: layer}

    def _losses(self, first: int, n: int) -> list[list[dict[Operation, int]]]:
        """Loss and its backward of some blocks, then the head's gradient."""
        c, s = self._config, self.state
        loss = {
            Operation.KIND: Kind.LOSS,
            Operation.COUNT: -(-n // self._item_blocks),
            Operation.FIRST_BLOCK: first,
            Operation.N_BLOCKS: n,
        }
        row = 4 * self.block
        head = self._weight_gradient(
            self._head_name,
            s[Step.NORMED_LAST] + first * c.dim * row,
            s[Step.LOGITS],
            c.vocab_size,
            blocks=n,
        )
        head[Operation.ALWAYS_ADDS] = int(first > 0)
        return [[loss], [head]]

    def _weight_gradient(
        self,
        name: str,
        source: int,
        output: int,
        features: int,
        norm: tuple[int, int] = (0, 0),
        blocks: int | None = None,
    ) -> dict[Operation, int]:
        """Of the weight `name`: from its inputs at `source`, with the (rstd, weight) of the norm
        that they go through, and its outputs' gradients, in a matrix of `features`."""
        outputs, inputs = self._weights[name].shape
        return {
            Operation.KIND: Kind.WEIGHT_GRADIENT,
            Operation.COUNT: -(-inputs // self.block) * -(-outputs // GRADIENT_ROWS),
            Operation.INPUT: source,
            Operation.INPUTS: inputs,
            Operation.RSTD: norm[0],
            Operation.NORM: norm[1],
            Operation.OUTPUT: output,
            Operation.OUTPUTS: outputs,
            Operation.OUTPUT_BLOCK: 4 * self.block * features,
            Operation.N_BLOCKS: self.blocks if blocks is None else blocks,
            Operation.ROWS: GRADIENT_ROWS,
            Operation.GRADIENT: self._gradients[name].data_ptr(),
        }

    def _layer(self, layer: int, field: Layer) -> int:
        return self._layers[layer * Layer.LENGTH + field]

    def _behind_attention(self, layer: int) -> list[dict[Operation, int]]:
        c, s = self._config, self.state
        norm = self._layer(layer, Layer.RSTD_MID), self._layer(layer, Layer.POST_NORM)
        middle = self._layer(layer, Layer.X_MID)
        attn = self._layer(layer, Layer.ATTN)
        mlp, attention = _MLP.format(layer), _ATTENTION.format(layer)
        return [
            self._weight_gradient(
                mlp + "down_proj.weight", s[Step.ACTIVATION], s[Step.DX], c.dim
            ),
            self._weight_gradient(
                mlp + "gate_proj.weight", middle, self._layer(layer, Layer.GATED), c.hidden_dim,
                norm,
            ),
            self._weight_gradient(
                mlp + "up_proj.weight", middle, self._layer(layer, Layer.UPPED), c.hidden_dim, norm
            ),
            self._weight_gradient(attention + "o_proj.weight", attn, s[Step.DX_MID], c.dim),
        ]  # fmt: skip

    def _before_attention(self, layer: int) -> list[dict[Operation, int]]:
        c = self._config
        norm = self._layer(layer, Layer.RSTD), self._layer(layer, Layer.INPUT_NORM)
        x, output = self._layer(layer, Layer.X), self._layer(layer, Layer.D_QKV)
        q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        row, attention = 4 * self.block, _ATTENTION.format(layer)
        return [
            self._weight_gradient(
                f"{attention}{letter}_proj.weight", x, output + at * row, q + 2 * kv, norm
            )
            for letter, at in (("q", 0), ("k", q), ("v", q + kv))
        ]

    def _embedding(self) -> dict[Operation, int]:
        return {
            Operation.KIND: Kind.EMBEDDING_GRADIENT,
            Operation.COUNT: -(-self._config.dim // self.block),
            Operation.ARG: self.length,
            Operation.GRADIENT: self._gradients["embed_tokens.weight"].data_ptr(),
        }

    def _norms(self) -> list[dict[Operation, int]]:
        c = self._config
        parts = [("norm.weight", self.state[Step.PARTIAL_LAST])]
        fields = [(Layer.INPUT_NORM, Layer.PARTIAL_INPUT), (Layer.POST_NORM, Layer.PARTIAL_POST)]
        if c.qk_norm:
            fields += [(Layer.Q_NORM, Layer.PARTIAL_Q), (Layer.K_NORM, Layer.PARTIAL_K)]
        for layer in range(c.n_layers):
            for norm, partial in fields:
                parts.append((_WEIGHTS[norm].format(layer), self._layer(layer, partial)))
        return [
            {
                Operation.KIND: Kind.NORM_GRADIENT,
                Operation.COUNT: 1,
                Operation.INPUT: partial,
                Operation.INPUTS: len(self._weights[name]),
                Operation.GRADIENT: self._gradients[name].data_ptr(),
            }
            for name, partial in parts
        ]

    def _lay_out(self) -> None:
        """Put the plan into tables."""
        s = self.state
        phases = [*self._phases, *self._loss_phases]
        self._operation_table = Table(Operation.LENGTH * sum(map(len, phases)))
        self._phase_table = Table(Phase.LENGTH * len(phases))
        at = 0
        for p, phase in enumerate(phases):
            self._phase_table[p * Phase.LENGTH + Phase.FIRST] = at
            items = sum(each[Operation.COUNT] for each in phase)
            self._phase_table[p * Phase.LENGTH + Phase.ITEMS] = items
            for each in phase:
                for field, value in each.items():
                    self._operation_table[at * Operation.LENGTH + field] = value
                at += 1
        self._counters = torch.zeros(2 * APART * (len(self._phases) + 1), dtype=torch.int64)
        self._times = torch.zeros(len(self._phases) + 1, dtype=torch.int64)
        self._spent = torch.zeros(self._threads, SPENT_FIELDS, dtype=torch.int64)
        s[Step.COUNTERS] = padded(self._counters.data_ptr(), 8 * APART)
        s[Step.OPERATIONS] = self._operation_table.address
        s[Step.TIMES], s[Step.SPENT] = self._times.data_ptr(), self._spent.data_ptr()
