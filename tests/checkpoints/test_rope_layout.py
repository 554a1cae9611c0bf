import pytest
import torch

from onelaunch.checkpoints.rope_layout import to_layout
from onelaunch.config import ModelConfig
from onelaunch.model import Model

SHAPES = {
    "plain": {},
    "grouped": {"n_kv_heads": 2},
    "one kv head": {"n_kv_heads": 1},
    "qk_norm": {"qk_norm": True, "n_kv_heads": 2},
    "wide heads": {"head_dim": 12, "qk_norm": True},
    "two elements a head": {"head_dim": 2, "qk_norm": True},
}


def _model(layout, **changes):
    config = ModelConfig(
        dim=24,
        n_layers=2,
        n_heads=4,
        hidden_dim=20,
        vocab_size=40,
        max_seq_len=16,
        rope_layout=layout,
    ).with_(**{"head_dim": 6, **changes})
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator)
        for name, shape in config.weight_shapes().items()
    }
    return config, weights


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("start", "end"), [("half", "interleaved"), ("interleaved", "half")])
def test_logits_stay_and_the_way_back_is_exact(changes, start, end):
    config, weights = _model(start, **changes)
    moved_config, moved = to_layout(config, weights, end)
    assert moved_config == config.with_(rope_layout=end)
    tokens = torch.randint(0, 40, (2, 16), generator=torch.Generator().manual_seed(1))
    expected = Model.from_weights(config, weights)(tokens)
    got = Model.from_weights(moved_config, moved)(tokens)
    assert (got - expected).norm() / expected.norm() < 1e-5
    back_config, back = to_layout(moved_config, moved, start)
    assert back_config == config
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    if config.head_dim > 2:  # the two layouts of a single pair are the same
        wrong = Model.from_weights(moved_config, weights)(tokens)
        assert (wrong - expected).norm() / expected.norm() > 1e-2


def test_rows_move_as_the_hub_expects():
    config, weights = _model("interleaved", n_kv_heads=2)
    name = "layers.0.self_attn.k_proj.weight"
    weights[name] = torch.arange(12.0).unsqueeze(1).expand(12, 24)
    moved = to_layout(config, weights, "half")[1][name][:, 0]
    assert moved.tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


def test_what_does_not_move_is_not_copied():
    config, weights = _model("half", qk_norm=True)
    moved = to_layout(config, weights, "interleaved")[1]
    kept = [name for name in weights if ".q_" not in name and ".k_" not in name]
    assert kept
    assert all(moved[name] is weights[name] for name in kept)
    assert to_layout(config, weights, "half") == (config, weights)


def test_the_given_weights_stay_as_they_are():
    config, weights = _model("half", qk_norm=True)
    before = {name: tensor.clone() for name, tensor in weights.items()}
    to_layout(config, weights, "interleaved")
    assert all(torch.equal(weights[name], before[name]) for name in before)
