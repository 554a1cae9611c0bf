"""Plans that several tests look at."""

from onelaunch.config import ModelConfig
from onelaunch.plan import Plan, make_plan

TINY = ModelConfig(
    dim=4, n_layers=3, n_heads=2, n_kv_heads=1, head_dim=6, hidden_dim=10, vocab_size=17,
    max_seq_len=12,
)  # fmt: skip

CONFIGS = {
    "tied": TINY,
    "untied": TINY.with_(tied_embeddings=False),
    "qk-norm": TINY.with_(qk_norm=True, rope_layout="interleaved"),
    "biases": TINY.with_(qkv_bias=True),
    "one-layer": TINY.with_(n_layers=1, n_kv_heads=2),
}

SIZES = {
    "one": {},
    "prompt": {"sequence": 5},
    "batch-with-past": {"batch": 3, "sequence": 2, "past": 7},
    "every-position": {"batch": 2, "sequence": 4, "all_positions": True},
    "sampled": {"batch": 2, "sequence": 3, "past": 1, "sample": True},
    "sampled-every-position": {"sequence": 3, "sample": True, "all_positions": True},
    "narrow": {"sequence": 2, "weight_itemsize": 1, "activation_itemsize": 2, "sample": True},
}


def tiny_plans() -> dict[str, Plan]:
    """Every tiny model at every size."""
    return {
        f"{model}-{size}": make_plan(config, **arguments)
        for model, config in CONFIGS.items()
        for size, arguments in SIZES.items()
    }
