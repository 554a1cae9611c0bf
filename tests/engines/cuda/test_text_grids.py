"""Which CTAs write how many sequences of a launch, and how the weights lie for them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from onelaunch.config import preset
from onelaunch.engines.cuda.decoding.grids import FEW, MANY, SHARED_BYTES, Grid, fits, grid_for
from onelaunch.engines.cuda.decoding.text import tiled

BFLOAT16 = torch.bfloat16


@pytest.mark.parametrize(
    ("name", "max_batch", "expected"),
    [
        ("stories15m", 1, Grid(1, 132, tiles=False)),
        ("stories15m", 2, Grid(FEW, 132)),
        ("stories15m", 8, Grid(FEW, 132)),
        ("stories15m", 9, Grid(FEW, 66, 2)),
        ("stories15m", 32, Grid(FEW, 33, 4)),
        ("stories15m", 33, Grid(MANY, 44, 3)),  # the L2 holds its weights
        ("stories15m", 64, Grid(MANY, 33, 4)),
        ("stories110m", 64, Grid(FEW, 16, 8)),
    ],
)
def test_groups_have_few_sequences_or_many(name, max_batch, expected):
    assert grid_for(preset(name), BFLOAT16, max_batch, 132) == expected


@pytest.mark.parametrize("max_batch", [12, 64])
def test_of_two_grids_one_that_fits(max_batch):
    outcomes = set()
    for hidden_dim in range(512, 4096, 256):
        config = preset("stories15m").with_(hidden_dim=hidden_dim)
        grid = grid_for(config, BFLOAT16, max_batch, 40)
        groups = [-(-max_batch // n) for n in (FEW, MANY)]
        both = [Grid(n, 40 // of, of) for n, of in zip((FEW, MANY), groups, strict=True)]
        fit = {each: fits(config, BFLOAT16, each, SHARED_BYTES) for each in both}
        assert fit[grid] == any(fit.values())
        outcomes.add(fit[grid])
    assert outcomes == {True, False}


@pytest.mark.parametrize("rows", [16, 40])
def test_weights_in_the_order_of_tensor_cores(rows):
    weight = torch.randn(2, rows, 64)
    in_tiles = tiled(weight)
    padded = torch.zeros(2, -(-rows // 16) * 16, 64)
    padded[:, :rows] = weight
    assert in_tiles.shape == padded.shape
    numbers = in_tiles.reshape(2, -1, 2, 2, 32, 8)  # block, unit, half, lane, its numbers
    for block in range(padded.shape[1] // 16):
        for unit in range(2):
            for lane in range(32):
                columns = 32 * unit + lane % 4 * 8
                lower = padded[:, 16 * block + lane // 4, columns : columns + 8]
                upper = padded[:, 16 * block + lane // 4 + 8, columns : columns + 8]
                for half in range(2):
                    a, b = (part[:, 4 * half : 4 * half + 4] for part in (lower, upper))
                    expected = torch.cat((a[:, :2], b[:, :2], a[:, 2:], b[:, 2:]), 1)
                    assert torch.equal(numbers[:, block, unit, half, lane], expected)
