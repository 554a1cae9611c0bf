"""Packed weights read back element by element, by a reader of their own."""

from itertools import chain

import numpy as np
import pytest
import torch

from onelaunch.config import ModelConfig
from onelaunch.engines.cpu.layout import Layer
from onelaunch.engines.cpu.pack import PackedWeights
from tests.engines.suite import weights_of

CONFIG = ModelConfig(
    dim=20, n_layers=2, n_heads=3, n_kv_heads=1, head_dim=6, hidden_dim=37, vocab_size=43,
    max_seq_len=8, qk_norm=True, tied_embeddings=False, qkv_bias=True,
)  # fmt: skip


def up_to(n: int, size: int) -> int:
    return (n + size - 1) // size * size


class Reader:
    """Reads packed memory by addresses, as bits widened to float32."""

    def __init__(self, packed: PackedWeights, lanes: int, tile: int, dtype: torch.dtype) -> None:
        memory = packed.memory
        raw = memory.tensor(0, (packed.n_bytes,), torch.uint8).numpy()
        self.bytes, self.base = raw, memory.address
        self.lanes, self.tile, self.narrow = lanes, tile, dtype == torch.bfloat16

    def element(self, address: int, row: int, column: int, columns: int) -> float:
        """A matrix's element: group of rows, block of columns, row in the group, lane."""
        group, in_group = divmod(row, self.tile)
        block, lane = divmod(column, self.lanes)
        blocks = up_to(columns, 16) // self.lanes
        index = ((group * blocks + block) * self.tile + in_group) * self.lanes + lane
        at = address - self.base + index * (2 if self.narrow else 4)
        if self.narrow:
            bits = np.uint32(self.bytes[at : at + 2].view(np.uint16)[0]) << np.uint32(16)
            return float(np.array([bits], np.uint32).view(np.float32)[0])
        return float(self.bytes[at : at + 4].view(np.float32)[0])

    def matrix(self, address: int, rows: int, columns: int) -> torch.Tensor:
        """With all of its padding."""
        wide = up_to(columns, 16)
        return torch.tensor(
            [[self.element(address, r, c, columns) for c in range(wide)] for r in range(rows)]
        )

    def vector(self, address: int, n: int) -> torch.Tensor:
        at = address - self.base
        return torch.from_numpy(self.bytes[at : at + 4 * up_to(n, 16)].view(np.float32).copy())


def in_zeros(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
    """A tensor at the origin of a larger one."""
    larger = torch.zeros(shape)
    larger[tuple(slice(n) for n in tensor.shape)] = tensor
    return larger


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lanes", "tile"), [(4, 8), (4, 16), (8, 8), (16, 16), (16, 8), (8, 16)])
def test_every_weight_lies_where_it_is_read_and_zeros_around_it(lanes, tile, dtype):
    weights = weights_of(CONFIG)
    packed = PackedWeights(CONFIG, weights, dtype, lanes, tile)
    read = Reader(packed, lanes, tile, dtype)
    rounded = {name: w.to(dtype).float() for name, w in weights.items() if w.dim() == 2}

    def check_matrix(address: int, expected: torch.Tensor) -> None:
        rows, columns = expected.shape
        found = read.matrix(address, up_to(rows, tile), columns)
        assert torch.equal(found, in_zeros(expected, *found.shape))

    def check_vector(address: int, name: str) -> None:
        found = read.vector(address, len(weights[name]))
        assert torch.equal(found, in_zeros(weights[name], len(found)))

    check_matrix(packed.embedding, rounded["embed_tokens.weight"])
    check_matrix(packed.head, rounded["lm_head.weight"])
    check_vector(packed.final_norm, "norm.weight")
    for i, table in enumerate(packed.tables):
        attention, mlp = f"layers.{i}.self_attn.", f"layers.{i}.mlp."
        qkv = torch.cat([rounded[attention + f"{x}_proj.weight"] for x in "qkv"])
        check_matrix(table[Layer.QKV], qkv)
        biases = torch.cat([weights[attention + f"{x}_proj.bias"] for x in "qkv"])
        assert torch.equal(
            read.vector(table[Layer.QKV_BIAS], len(biases)),
            in_zeros(biases, up_to(len(biases), 16)),
        )
        check_matrix(table[Layer.O_PROJ], rounded[attention + "o_proj.weight"])
        check_matrix(table[Layer.DOWN], rounded[mlp + "down_proj.weight"])
        both = []
        for first in range(0, CONFIG.hidden_dim, tile):
            for name in ("gate_proj", "up_proj"):
                part = rounded[f"{mlp}{name}.weight"][first : first + tile]
                both.append(in_zeros(part, tile, CONFIG.dim))
        check_matrix(table[Layer.GATE_UP], torch.cat(both))
        check_vector(table[Layer.INPUT_NORM], f"layers.{i}.input_layernorm.weight")
        check_vector(table[Layer.POST_NORM], f"layers.{i}.post_attention_layernorm.weight")
        check_vector(table[Layer.Q_NORM], attention + "q_norm.weight")
        check_vector(table[Layer.K_NORM], attention + "k_norm.weight")


def test_tied_embeddings_are_there_once_and_a_norm_that_is_not_is_0():
    tied = CONFIG.with_(tied_embeddings=True, qk_norm=False)
    packed = PackedWeights(tied, weights_of(tied), torch.float32, 8, 8)
    assert packed.head == packed.embedding
    assert all(table[Layer.Q_NORM] == table[Layer.K_NORM] == 0 for table in packed.tables)
    untied = PackedWeights(CONFIG, weights_of(CONFIG), torch.float32, 8, 8)
    assert untied.head != untied.embedding
    assert untied.n_bytes > packed.n_bytes


def test_nothing_overlaps_and_everything_is_aligned():
    packed = PackedWeights(CONFIG, weights_of(CONFIG), torch.bfloat16, 16, 16)
    starts = sorted({packed.embedding, packed.head, packed.final_norm, *chain(*packed.tables)})
    assert all(start % 128 == 0 for start in starts)
    assert packed.memory.address < starts[0]
    assert (
        starts[-1]
        < packed.memory.address + packed.n_bytes
        <= (packed.memory.address + packed.memory.size)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_dtype_and_stride_pack_alike(dtype):
    """What a file holds is packed as what it means, transposed views among it."""
    weights = {name: w.to(dtype) for name, w in weights_of(CONFIG).items()}
    strided = {n: w.t().contiguous().t() if w.dim() == 2 else w for n, w in weights.items()}
    plain = {name: w.float() for name, w in weights.items()}
    one, other = (
        PackedWeights(CONFIG, w, torch.float32, 8, 8).memory.tensor(0, (4096,), torch.float32)
        for w in (strided, plain)
    )
    assert torch.equal(one, other)
    assert one.any()
