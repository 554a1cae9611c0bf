"""The rule of a training step's forms, at its boundaries, without a device."""

from __future__ import annotations

import pytest
import torch

from onelaunch.config import preset
from onelaunch.engines.cuda.training.forms import (
    FEW_ROWS,
    FEW_ROWS_BACK,
    MANY_ROWS,
    TrainingForms,
    attention_blocks,
    rule,
    swiglu_tiles,
)
from onelaunch.plan.training import LOGITS

SMALL = preset("stories15m")


@pytest.mark.parametrize(
    ("n_sequences", "S", "forward", "backward"),
    [
        (1, 256, (16, 128, 2), (16, 128, 2)), (2, 256, (16, 128, 2), (16, 128, 2)),
        (3, 256, (32, 64, 2), (32, 32, 2)), (5, 256, (32, 64, 2), (32, 32, 2)),
        (6, 256, (64, 64, 2), (64, 32, 3)), (64, 256, (64, 64, 2), (64, 32, 3)),
        (1, 2048, (64, 64, 2), (64, 32, 3)), (1, 7, (16, 16, 2), (16, 16, 2)),
        (1, 33, (16, 64, 2), (16, 64, 2)), (200, 20, (64, 32, 2), (64, 32, 3)),
    ],
)  # fmt: skip
def test_the_rule_of_attentions_blocks(n_sequences, S, forward, backward):
    rule = attention_blocks
    assert rule(n_sequences, S, 6, 48, False) == (*forward, 4)
    assert rule(n_sequences, S, 6, 48, True) == (*backward, 4)
    assert rule(n_sequences, S, 6, 64, True) == (*backward, 4)
    stages = 3 if forward[0] == 64 else 2
    assert rule(n_sequences, S, 6, 64, False) == (*forward[:2], stages, 4)


@pytest.mark.parametrize(
    ("n_sequences", "forward", "backward"),
    [
        (2, (16, 64, 2, 4), (16, 64, 2, 4)), (3, (32, 64, 2, 4), (32, 32, 2, 8)),
        (6, (64, 64, 2, 4), (64, 32, 2, 8)),
    ],
)  # fmt: skip
def test_the_rule_of_attentions_blocks_for_wide_heads(n_sequences, forward, backward):
    for head_dim in (72, 128):
        assert attention_blocks(n_sequences, 256, 6, head_dim, False) == forward
        assert attention_blocks(n_sequences, 256, 6, head_dim, True) == backward


@pytest.mark.parametrize(
    ("shape", "forward", "backward"),
    [
        ((256, 768, 2048), FEW_ROWS, FEW_ROWS_BACK), ((2260, 288, 768), FEW_ROWS, FEW_ROWS_BACK),
        ((2261, 288, 768), None, None), ((11_136, 288, 768), None, None),
        ((11_137, 288, 768), MANY_ROWS, None), ((16_384, 768, 2048), MANY_ROWS, None),
        ((4096, 768, 2048), None, None),
    ],
)  # fmt: skip
def test_the_rule_of_products_with_swiglu(shape, forward, backward):
    assert swiglu_tiles(*shape) == (forward, backward)


def test_the_rule_of_all_forms():
    blocks = (64, 64, 2, 4), (64, 32, 3, 4)
    forms = rule(SMALL, 64, 256, torch.bfloat16, fuses=True)
    assert forms == TrainingForms(MANY_ROWS, None, *blocks, LOGITS, True)
    forms = rule(SMALL, 64, 256, torch.float32, fuses=False)
    assert forms == TrainingForms(None, None, *blocks, LOGITS, True)


def test_where_a_library_does_attention_there_are_no_blocks():
    config, dtype = SMALL.with_(dim=288, n_heads=4, n_kv_heads=4, head_dim=72), torch.float32
    forms = rule(config, 64, 256, dtype, fuses=False)
    assert forms.attention_forward is forms.attention_backward is None
    assert rule(config, 64, 256, torch.bfloat16, fuses=False).attention_forward
