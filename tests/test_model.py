"""The model against transformers, against float64, and against itself with a cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from onelaunch.checkpoints import huggingface
from onelaunch.checkpoints.rope_layout import to_layout
from onelaunch.checkpoints.weights import LoadedModel
from onelaunch.config import PRESETS, ModelConfig, RopeScaling, preset
from onelaunch.errors import BadInput
from onelaunch.model import KVCache, Model, rope_tables, widen_rope

SMALL = ModelConfig(
    dim=48, n_layers=3, n_heads=6, n_kv_heads=2, hidden_dim=80, vocab_size=97, max_seq_len=64
)
SHAPES: dict[str, ModelConfig] = {
    "gqa, tied": SMALL,
    "one kv head per head, untied": SMALL.with_(n_kv_heads=6, tied_embeddings=False),
    "head_dim independent of dim": SMALL.with_(head_dim=16, norm_eps=1e-6, rope_theta=5e5),
    "qk-norm, head_dim independent of dim": SMALL.with_(head_dim=32, qk_norm=True, norm_eps=1e-6),
    "scaled rope, untied": SMALL.with_(
        max_seq_len=128,
        rope_theta=500.0,
        rope_scaling=RopeScaling(factor=8.0, original_max_seq_len=32),
        tied_embeddings=False,
    ),
    "interleaved": SMALL.with_(rope_layout="interleaved", norm_eps=1e-4),
    "interleaved, qk-norm, scaled rope": SMALL.with_(
        rope_layout="interleaved",
        qk_norm=True,
        max_seq_len=128,
        rope_scaling=RopeScaling(factor=4.0, original_max_seq_len=32),
    ),
}
by_shape = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)


def random_weights(
    config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Weights large enough that every part matters; norm weights are not ones."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, size in config.weight_shapes().items():
        values = torch.randn(size, generator=generator, dtype=torch.float64)
        values = 1 + 0.3 * values if len(size) == 1 else values / math.sqrt(size[-1])
        weights[name] = values.to(dtype)
    return weights


def random_tokens(config: ModelConfig, batch: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, config.max_seq_len), generator=generator)


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small are slower on several threads, much slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="the hf extra is not installed")


@by_shape
def test_logits_equal_transformers_after_our_write(
    config: ModelConfig, transformers: Any, tmp_path: Path
) -> None:
    weights = random_weights(config)
    huggingface.write(LoadedModel(config, weights), tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    expected_class = "Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"
    assert type(theirs).__name__ == expected_class
    tokens = random_tokens(config)
    with torch.no_grad():
        ours = Model.from_weights(config, weights)(tokens)
        assert error(ours, theirs(tokens).logits) < 1e-5
    again = huggingface.read(tmp_path / "out")
    half, moved = to_layout(config, weights, "half")
    assert again.config == half
    for name, tensor in moved.items():
        assert torch.equal(again.weights[name], tensor)


def their_model(config: ModelConfig, transformers: Any) -> Any:
    """transformers' own model of a shape, made with its own configuration class."""
    kind = "Qwen3" if config.qk_norm else "Llama"
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_max_seq_len,
        }
    if transformers.__version__.startswith("4."):
        theta = rope.pop("rope_theta")
        rope_fields = {
            "rope_theta": theta,
            "rope_scaling": rope if config.rope_scaling else None,
        }
    else:
        rope_fields = {"rope_parameters": rope}
    their_config = getattr(transformers, f"{kind}Config")(
        hidden_size=config.dim,
        intermediate_size=config.hidden_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tied_embeddings,
        bos_token_id=3,
        eos_token_id=[5, 4],
        pad_token_id=None,
        **rope_fields,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(their_config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.3)
            else:
                parameter.normal_(0.0, 1 / math.sqrt(parameter.shape[-1]))
    return model.eval()


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
@by_shape
def test_logits_equal_transformers_after_their_save(
    config: ModelConfig, max_shard_size: str, transformers: Any, tmp_path: Path
) -> None:
    config = config.with_(rope_layout="half")
    theirs = their_model(config, transformers)
    theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    shards = len(list(tmp_path.glob("*.safetensors")))
    assert (shards > 3) if max_shard_size == "20KB" else (shards == 1)
    loaded = huggingface.read(tmp_path)
    assert loaded.config == config
    assert (loaded.bos_id, loaded.stop_ids) == (3, (3, 4, 5))
    tokens = random_tokens(config)
    with torch.no_grad():
        ours = Model.from_weights(loaded.config, loaded.weights)(tokens)
        assert error(ours, theirs(tokens).logits) < 1e-5


def test_rope_scaling_matters_in_its_test_shape() -> None:
    config = SHAPES["scaled rope, untied"]
    weights, tokens = random_weights(config), random_tokens(config)
    scaled = Model.from_weights(config, weights)(tokens)
    plain = Model.from_weights(config.with_(rope_scaling=None), weights)(tokens)
    assert error(scaled, plain) > 1e-2
    # all three kinds of frequency occur: slowed, blended, kept
    kept = rope_tables(config.with_(rope_scaling=None), 2)[1][1]
    ratio = rope_tables(config, 2)[1][1].asin() / kept.asin()
    assert (ratio - 1).abs().min() < 1e-5
    assert (ratio - 1 / 8).abs().min() < 1e-5
    assert ((ratio > 0.13) & (ratio < 0.99)).any()


@by_shape
def test_float64_oracle(config: ModelConfig) -> None:
    weights = random_weights(config, dtype=torch.float64)
    tokens = random_tokens(config)
    exact = Model.from_weights(config, weights)(tokens)
    single = {name: tensor.float() for name, tensor in weights.items()}
    assert error(Model.from_weights(config, single)(tokens), exact) < 1e-5


def naive_logits(config: ModelConfig, w: dict[str, Tensor], tokens_S: Tensor) -> Tensor:
    """The same model, one position and one head at a time, written from the papers."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean() + config.norm_eps).sqrt() * weight

    def turn(x: Tensor, position: int) -> Tensor:
        out = x.clone()
        half = config.head_dim // 2
        for i in range(half):
            angle = position * config.rope_theta ** (-2 * i / config.head_dim)
            a, b = (2 * i, 2 * i + 1) if config.rope_layout == "interleaved" else (i, i + half)
            out[a] = x[a] * math.cos(angle) - x[b] * math.sin(angle)
            out[b] = x[b] * math.cos(angle) + x[a] * math.sin(angle)
        return out

    def rotary(p: str, name: str, x: Tensor, position: int) -> Tensor:
        return turn(norm(x, w[f"{p}{name}_norm.weight"]) if config.qk_norm else x, position)

    xs = [w["embed_tokens.weight"][token] for token in tokens_S]
    E, group = config.head_dim, config.n_heads // config.n_kv_heads
    for i in range(config.n_layers):
        p = f"layers.{i}."
        a = p + "self_attn."
        normed = [norm(x, w[p + "input_layernorm.weight"]) for x in xs]
        qs, ks, vs = (
            [(w[f"{a}{name}_proj.weight"] @ x).view(-1, E) for x in normed] for name in "qkv"
        )
        attended = []
        for s in range(len(xs)):
            heads = []
            for h in range(config.n_heads):
                q = rotary(a, "q", qs[s][h], s)
                keys = [rotary(a, "k", ks[t][h // group], t) for t in range(s + 1)]
                scores = torch.stack([q @ key / math.sqrt(E) for key in keys])
                share = torch.softmax(scores, 0)
                heads.append(sum(share[t] * vs[t][h // group] for t in range(s + 1)))
            attended.append(w[a + "o_proj.weight"] @ torch.cat(heads))
        xs = [x + a for x, a in zip(xs, attended, strict=True)]
        for s, x in enumerate(xs):
            y = norm(x, w[p + "post_attention_layernorm.weight"])
            gate = w[p + "mlp.gate_proj.weight"] @ y
            hidden = gate * torch.sigmoid(gate) * (w[p + "mlp.up_proj.weight"] @ y)
            xs[s] = x + w[p + "mlp.down_proj.weight"] @ hidden
    head = w["embed_tokens.weight" if config.tied_embeddings else "lm_head.weight"]
    return torch.stack([head @ norm(x, w["norm.weight"]) for x in xs])


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_equals_the_papers_in_float64(layout: Any, qk_norm: bool) -> None:
    config = ModelConfig(
        dim=12,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=6,
        hidden_dim=20,
        vocab_size=31,
        max_seq_len=7,
        rope_layout=layout,
        qk_norm=qk_norm,
        tied_embeddings=not qk_norm,
    )
    weights = random_weights(config, dtype=torch.float64)
    tokens = random_tokens(config, batch=1)
    ours = Model.from_weights(config, weights)(tokens)[0]
    # the rotary tables are float32 by definition, as in transformers and llama2.c
    assert error(ours, naive_logits(config, weights, tokens[0])) < 1e-6


@by_shape
@pytest.mark.parametrize("pieces", [[1] * 10, [10], [4, 1, 1, 4], [1, 9], [3, 3, 4]], ids=str)
def test_cache_equals_the_whole_forward(config: ModelConfig, pieces: list[int]) -> None:
    weights = random_weights(config, dtype=torch.float64)
    model = Model.from_weights(config, weights)
    tokens = random_tokens(config)[:, -10:]
    cache = KVCache(config, batch=2, capacity=10, dtype=torch.float64)
    layers = model.layer_weights()
    hidden, start = [], 0
    for piece in pieces:
        hidden.append(model.hidden(tokens[:, start : start + piece], cache, layers))
        start += piece
        assert cache.length == start
    assert error(torch.cat(hidden, dim=1), model.hidden(tokens)) < 1e-12


def test_later_tokens_do_not_change_earlier_logits() -> None:
    model = Model.from_weights(SMALL, random_weights(SMALL))
    tokens = random_tokens(SMALL)
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % SMALL.vocab_size
    a, b = model(tokens), model(changed)
    assert error(a[:, :20], b[:, :20]) < 1e-6
    assert error(a[:, 20:], b[:, 20:]) > 1e-2


@pytest.mark.parametrize("qk_norm", [False, True])
def test_interleaved_equals_half_after_reordering(qk_norm: bool) -> None:
    config = SMALL.with_(rope_layout="interleaved", qk_norm=qk_norm)
    weights = random_weights(config, dtype=torch.float64)
    tokens = random_tokens(config)
    half, moved = to_layout(config, weights, "half")
    assert half.rope_layout == "half"
    expected = Model.from_weights(config, weights)(tokens)
    assert error(Model.from_weights(half, moved)(tokens), expected) < 1e-12
    assert error(Model.from_weights(half, weights)(tokens), expected) > 1e-3


def test_dropout_acts_only_in_training() -> None:
    tokens = random_tokens(SMALL)
    torch.manual_seed(0)
    plain, dropped = Model(SMALL), Model(SMALL, dropout=0.5)
    for model in (plain, dropped):
        model.load_state_dict(random_weights(SMALL))
    with torch.no_grad():
        assert torch.equal(plain.eval()(tokens), dropped.eval()(tokens))
        assert torch.equal(plain.train()(tokens), plain.eval()(tokens))
        dropped.train()
        assert error(dropped(tokens), plain(tokens)) > 0.1
        assert not torch.equal(dropped(tokens), dropped(tokens))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_init_weights_repeatable(qk_norm: bool) -> None:
    config = SMALL.with_(qk_norm=qk_norm, tied_embeddings=False, hidden_dim=512, dim=96)
    first = Model(config).init_weights(7).state_dict()
    torch.manual_seed(99)  # the global generator has no part in it
    again = Model(config).init_weights(7).state_dict()
    other = Model(config).init_weights(8).state_dict()
    assert list(first) == list(again)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        if tensor.dim() == 1:
            assert bool((tensor == 1).all())
            continue
        assert not torch.equal(tensor, other[name])
        narrow = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = config.dim**-0.5 / (math.sqrt(2 * config.n_layers) if narrow else 1)
        assert abs(float(tensor.std()) / std - 1) < 0.05
        assert abs(float(tensor.mean())) < 4 * std / math.sqrt(tensor.numel())


@by_shape
def test_state_dict_has_the_canonical_names_and_shapes(config: ModelConfig) -> None:
    state = Model(config).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert shapes == config.weight_shapes()
    assert sum(p.numel() for p in Model(config).parameters()) == config.n_params


def test_from_weights_copies_nothing() -> None:
    weights = random_weights(SMALL)
    model = Model.from_weights(SMALL, weights)
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == weights[name].data_ptr()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("stories260k", 260_032),
        ("stories15m", 15_191_712),
        ("stories42m", 41_689_600),
        ("stories110m", 109_529_856),
        ("smollm2-135m", 134_515_008),
        ("qwen3-0.6b", 596_049_920),
        ("llama-3.2-1b", 1_235_814_400),
    ],
)
def test_presets_have_the_published_sizes(name: str, parameters: int) -> None:
    assert preset(name).n_params == parameters
    assert len(PRESETS) == 7


def test_loss_is_cross_entropy_without_the_ignored() -> None:
    model = Model.from_weights(SMALL, random_weights(SMALL))
    tokens = random_tokens(SMALL)
    targets = random_tokens(SMALL, seed=2)
    targets[0, :40] = -1
    targets[1, 3] = -1
    logits = model(tokens).double()
    kept = targets != -1
    rows = torch.log_softmax(logits[kept], dim=-1)
    expected = -rows.gather(1, targets[kept][:, None]).mean()
    assert abs(float(model.loss(tokens, targets)) - float(expected)) < 1e-5
    whole = model.loss(tokens, random_tokens(SMALL, seed=2))
    assert abs(float(whole) - float(model.loss(tokens, targets))) > 1e-4


def test_loss_gives_no_gradient_to_what_only_ignored_targets_see() -> None:
    model = Model(SMALL).init_weights(0)
    tokens = torch.tensor([[1, 2, 3, 4]])
    model.loss(tokens, torch.tensor([[5, 6, -1, -1]])).backward()
    gradient = model.embed_tokens.weight.grad
    assert gradient is not None
    logits = model(tokens).detach()
    # tied: rows 3 and 4 are inputs of ignored positions, so they get the classifier's part alone
    share = torch.softmax(logits[0, :2], -1)[:, 3:5]
    hidden = model.hidden(tokens).detach()[0, :2]
    torch.testing.assert_close(gradient[3:5], (share.T @ hidden) / 2)


def test_training_after_inference_mode() -> None:
    model = Model(SMALL).init_weights(0)
    tokens = random_tokens(SMALL)
    with torch.inference_mode():
        expected = model.loss(tokens, tokens)
    loss = model.loss(tokens, tokens)
    loss.backward()
    assert loss.item() == expected.item()


def test_autocast_keeps_the_rotary_tables_exact() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        model = Model(SMALL).init_weights(0)
        logits = model(random_tokens(SMALL))
        tables = model.rope(torch.device("cpu"), torch.float32, 1)
    assert logits.dtype == torch.float32
    interleaved = SMALL.rope_layout == "interleaved"
    for table, expected in zip(tables, widen_rope(*rope_tables(SMALL), interleaved), strict=True):
        assert torch.equal(table, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_and_loss_are_float32_in_any_dtype(dtype: torch.dtype) -> None:
    weights = random_weights(SMALL)
    model = Model.from_weights(SMALL, {k: v.to(dtype) for k, v in weights.items()})
    tokens, targets = random_tokens(SMALL), random_tokens(SMALL, seed=2)
    logits = model(tokens)
    assert logits.dtype == torch.float32
    loss = model.loss(tokens, targets)
    assert loss.dtype == torch.float32
    expected = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten())
    assert abs(float(loss) / float(expected) - 1) < 1e-6
    assert error(logits, Model.from_weights(SMALL, weights)(tokens)) < 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, "dim must be .* from 1 .* 0"),
        ({"dim": 1 << 25}, "dim must be .* to 16777216"),
        ({"dim": 8.0}, "dim must be .*whole.* 8.0"),
        ({"dim": True}, "dim must be .*whole.* True"),
        ({"n_layers": 1025}, "n_layers must be .* to 1024"),
        ({"n_heads": 0}, "n_heads must be"),
        ({"vocab_size": -5}, "vocab_size must be"),
        ({"max_seq_len": None}, "max_seq_len must be"),
        ({"n_kv_heads": 4}, "n_heads 6 .*n_kv_heads 4"),
        ({"n_kv_heads": -1}, "n_kv_heads must be"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"dim": 50, "head_dim": 0}, "dim 50 .*n_heads 6"),
        ({"norm_eps": 0.0}, "norm_eps must be positive"),
        ({"norm_eps": "1e-5"}, "norm_eps must be a number"),
        ({"rope_theta": math.inf}, "rope_theta must be .*finite"),
        ({"rope_theta": math.nan}, "rope_theta must be .*finite"),
        ({"rope_theta": 10**400}, "rope_theta must be .*finite"),
        ({"rope_layout": "spiral"}, "rope_layout 'spiral'"),
        ({"tied_embeddings": 1}, "tied_embeddings must be true"),
        ({"qk_norm": None}, "qk_norm must be true"),
    ],
)
def test_config_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        SMALL.with_(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": 0.0}, "rope_scaling.factor"),
        ({"original_max_seq_len": 0}, "rope_scaling.original_max_seq_len"),
        ({"low_freq_factor": 4.0}, "high_freq_factor must be larger"),
    ],
)
def test_rope_scaling_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        RopeScaling(**changes)


@by_shape
def test_config_round_trip(config: ModelConfig) -> None:
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "must be a table"),
        ({}, "incomplete model configuration"),
        ({**SMALL.to_dict(), "depth": 3}, "unknown field 'depth'"),
        ({**SMALL.to_dict(), "dim": 0}, "dim must be"),
        ({**SMALL.to_dict(), "rope_scaling": {"speed": 1}}, "incomplete model configuration"),
        ({**SMALL.to_dict(), "rope_scaling": 3}, "incomplete model configuration"),
    ],
)
def test_from_dict_names_its_source(data: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        ModelConfig.from_dict(data, "some.json")
    assert str(caught.value).startswith("some.json")


def test_unknown_preset() -> None:
    with pytest.raises(BadInput, match="known: stories260k"):
        preset("gpt-5")


def test_a_context_of_millions_costs_what_is_used_of_it() -> None:
    """Tables grow with the positions asked for, and stay the same where they were."""
    config = SMALL.with_(max_seq_len=1 << 24)
    model = Model(config).init_weights(0).eval()
    device = torch.device("cpu")
    first = model.rope(device, torch.float32, 10)[0]
    assert first.shape[0] == 4096
    later = model.rope(device, torch.float32, 5000)[0]
    assert later.shape[0] == 10000
    assert torch.equal(later[:4096], first)
    assert model.rope(device, torch.float32, 4097)[0] is later
