"""Families beyond Llama and Qwen3: against transformers, with caches, and in training."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from onelaunch.checkpoints import huggingface
from onelaunch.checkpoints.rope_layout import to_layout
from onelaunch.config import (
    FAMILY_FIELDS,
    LinearRopeScaling,
    ModelConfig,
    RopeScaling,
    YarnRopeScaling,
)
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.errors import BadInput
from onelaunch.model import KVCache, Model, RaggedCache, rms_norm, rope_tables
from tests.test_model import error, one_thread, random_tokens, random_weights

__all__ = ["one_thread"]  # a fixture of this module too

S = 40
SHAPE = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "vocab_size": 97,
    "max_position_embeddings": S,
    "bos_token_id": 3,
    "eos_token_id": 5,
    "pad_token_id": None,
}
OURS = ModelConfig(
    dim=48, n_layers=4, n_heads=6, n_kv_heads=2, hidden_dim=80, vocab_size=97, max_seq_len=S,
    norm_eps=1e-6, tied_embeddings=False,
)  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10}
GEMMA = {
    "head_dim": 16,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "query_pre_attn_scalar": 24,
}
OUR_GEMMA = OURS.with_(
    head_dim=16, tied_embeddings=True, qk_norm=True, norm_placement="both", norm_offset=1.0,
    activation="gelu_tanh", embedding_scale=48**0.5, attention_scale=24**-0.5, sliding_window=7,
    sliding_layers=(0, 2), rope_theta=1e6, sliding_rope_theta=1e4,
)  # fmt: skip


class Case(NamedTuple):
    """A configuration class of transformers with its arguments, and what it is here."""

    kind: str
    arguments: dict[str, Any]
    config: ModelConfig


def scaled(table: dict[str, Any], theta: float = 10000.0) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": theta, **table}}


CASES = {
    "mistral": Case("Mistral", {"sliding_window": None}, OURS),
    "mistral, window": Case("Mistral", {"sliding_window": 7}, OURS.with_(sliding_window=7)),
    "qwen2": Case("Qwen2", {}, OURS.with_(qkv_bias=True)),
    "qwen2, windows, tied": Case(
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 1,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
        OURS.with_(
            qkv_bias=True, sliding_window=1, sliding_layers=(1, 2, 3), tied_embeddings=True
        ),
    ),
    "qwen3, windows": Case(
        "Qwen3",
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
        OURS.with_(head_dim=16, qk_norm=True, sliding_window=7, sliding_layers=(2, 3)),
    ),
    "smollm3": Case(
        "SmolLM3",
        {"no_rope_layer_interval": 2},
        OURS.with_(layers_without_rope=(1, 3), rope_theta=2e6, tied_embeddings=True),
    ),
    "olmo2": Case(
        "Olmo2",
        {"rms_norm_eps": 1e-5},
        OURS.with_(norm_eps=1e-5, norm_placement="post", qk_norm="full"),
    ),
    "gemma3": Case("Gemma3Text", GEMMA, OUR_GEMMA),
    "gemma3, softcap, scaled": Case(
        "Gemma3Text",
        {
            **GEMMA,
            "query_pre_attn_scalar": 16,
            "final_logit_softcapping": 2.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
        OUR_GEMMA.with_(
            attention_scale=None, logit_softcap=2.0, rope_theta=500.0, sliding_rope_theta=50.0,
            rope_scaling=LinearRopeScaling(8.0),
        ),
    ),
    "linear": Case(
        "Llama",
        scaled({"rope_type": "linear", "factor": 3.0}),
        OURS.with_(rope_scaling=LinearRopeScaling(3.0)),
    ),
    "yarn": Case(
        "Qwen2",
        scaled(YARN, theta=100.0),
        OURS.with_(qkv_bias=True, rope_theta=100.0, rope_scaling=YarnRopeScaling(4.0, 10)),
    ),
    "yarn, by hand": Case(
        "Llama",
        scaled({**YARN, "beta_fast": 3.0, "beta_slow": 0.2, "attention_factor": 0.7}),
        OURS.with_(rope_scaling=YarnRopeScaling(4.0, 10, 3.0, 0.2, 0.7)),
    ),
}  # fmt: skip
by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
# one of each family: the slower tests take these
FEW = {name: CASES[name] for name in ("qwen2, windows, tied", "smollm3", "olmo2", "gemma3")}
by_family = pytest.mark.parametrize("case", FEW.values(), ids=FEW)


@pytest.fixture(scope="module")
def transformers() -> Any:
    module = pytest.importorskip("transformers", "5", reason="the hf extra is not installed")
    return module


def their_model(case: Case, transformers: Any) -> Any:
    """transformers' own model with weights of which every one matters."""
    arguments = {"tie_word_embeddings": case.config.tied_embeddings, "rms_norm_eps": 1e-6}
    config = getattr(transformers, f"{case.kind}Config")(**SHAPE | arguments | case.arguments)
    generator = torch.Generator().manual_seed(0)
    architecture = case.kind.removesuffix("Text") + "ForCausalLM"
    model = getattr(transformers, architecture)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if name.endswith(".bias"):
                parameter.copy_(0.3 * values)
            elif parameter.dim() == 1:
                parameter.copy_(1 - case.config.norm_offset + 0.3 * values)
            else:
                parameter.copy_(values / math.sqrt(parameter.shape[-1]))
    return model.eval()


@by_case
def test_logits_equal_transformers(case: Case, transformers: Any, tmp_path: Path) -> None:
    theirs = their_model(case, transformers)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = huggingface.read(tmp_path / "theirs")
    assert loaded.config == case.config
    assert (loaded.bos_id, loaded.stop_ids) == (3, (3, 5))
    tokens = random_tokens(loaded.config)
    assert tokens.shape == (2, S)
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert error(Model.from_weights(loaded.config, loaded.weights)(tokens), expected) < 1e-5
        # and what we write is the same model again, to us and to transformers
        huggingface.write(loaded, tmp_path / "ours")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
        assert error(again(tokens).logits, expected) < 1e-6
    written = huggingface.read(tmp_path / "ours")
    assert written.config == loaded.config
    assert written.stop_ids == loaded.stop_ids
    for name, tensor in loaded.weights.items():
        assert torch.equal(written.weights[name], tensor), name


@by_case
def test_every_field_matters(case: Case) -> None:
    """The test shapes are such that a field that is ignored changes the logits."""
    weights, tokens = random_weights(case.config), random_tokens(case.config)
    logits = Model.from_weights(case.config, weights)(tokens)
    plain = {
        "norm_offset": 0.0, "activation": "silu", "embedding_scale": 1.0, "attention_scale": None,
        "logit_softcap": None, "layers_without_rope": (), "sliding_rope_theta": None,
        "sliding_layers": (), "rope_scaling": None,
    }  # fmt: skip
    for name, value in plain.items():
        if getattr(case.config, name) != value:
            changed = Model.from_weights(case.config.with_(**{name: value}), weights)
            assert error(changed(tokens), logits) > 1e-3, name
    if case.config.sliding_window is not None:
        narrower = {"sliding_window": case.config.sliding_window + 1}
        changed = Model.from_weights(case.config.with_(**narrower), weights)
        assert error(changed(tokens), logits) > 1e-3


@by_case
def test_steps_with_a_cache_are_the_whole_sequence(case: Case) -> None:
    """In pieces of several positions and of one, and rows of different lengths together."""
    config = case.config
    weights = {name: w.double() for name, w in random_weights(config).items()}
    model, tokens = Model.from_weights(config, weights), random_tokens(config, batch=3)
    whole = model.hidden(tokens)
    cache = KVCache(config, 3, S, dtype=torch.float64)
    ends = [0, 3, 4, 5, 17, *range(18, 25), S]
    pieces = [model.hidden(tokens[:, a:b], cache) for a, b in itertools.pairwise(ends)]
    assert error(torch.cat(pieces, 1), whole) < 1e-12
    lengths = [5, 30, 9]
    cache = KVCache(config, 3, S, dtype=torch.float64)
    for row, length in enumerate(lengths):
        model.hidden(tokens[row : row + 1, :length], cache.row(row, 0))
    for step in range(6):
        at = [length + step for length in lengths]
        ragged = RaggedCache(cache, at)
        rows = torch.arange(3)
        got = model.hidden(tokens[rows, at][:, None], ragged)
        assert error(got[:, 0], whole[rows, at]) < 1e-12


@by_family
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sessions_of_the_reference_engine(case: Case, dtype: str) -> None:
    """Greedy tokens of a batch, by steps, have the logits of the whole sequences."""
    from onelaunch.engines.engine import Request

    weights = random_weights(case.config)
    engine = ReferenceEngine(case.config, weights, "cpu", dtype)
    exact = Model.from_weights(case.config, {n: w.double() for n, w in weights.items()})
    session = engine.session(3, S)
    prompts = [random_tokens(case.config, 1, seed)[0, :n].tolist() for seed, n in ((1, 3), (2, 12))]
    for id, prompt in enumerate(prompts):
        session.submit(Request(id, prompt, 16, logprobs=True))
    tokens: dict[int, list[int]] = {0: [], 1: []}
    logprobs: dict[int, list[float]] = {0: [], 1: []}
    while events := session.step():
        for event in events:
            assert event.token is not None
            assert event.logprob is not None
            tokens[event.id].append(event.token)
            logprobs[event.id].append(event.logprob)
    allowed = 1e-4 if dtype == "float32" else 0.25
    for id, prompt in enumerate(prompts):
        assert len(tokens[id]) == 16
        sequence = torch.tensor([[*prompt, *tokens[id]]])
        expected = exact(sequence)[0, len(prompt) - 1 : -1].log_softmax(-1)
        chosen = expected[torch.arange(16), torch.tensor(tokens[id])]
        assert (torch.tensor(logprobs[id]) - chosen).abs().max() < allowed
        last = engine.logits(sequence, last=True)
        assert error(last, exact(sequence)[:, -1]) < allowed / 5


@by_family
@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_the_other_rope_layout_is_the_same_model(case: Case, layout: Any) -> None:
    config = case.config.with_(rope_layout=layout)
    weights, tokens = random_weights(config), random_tokens(config)
    other = to_layout(config, weights, "half" if layout == "interleaved" else "interleaved")
    assert other[0].rope_layout != layout
    with torch.no_grad():
        logits = Model.from_weights(config, weights)(tokens)
        assert error(Model.from_weights(*other)(tokens), logits) < 1e-5


@by_family
def test_gradients_are_differences_of_the_loss(case: Case) -> None:
    """In float64, along a random direction of each kind of parameter."""
    config = case.config
    weights = {name: w.double() for name, w in random_weights(config).items()}
    model = Model.from_weights(config, weights).requires_grad_(True)
    tokens = random_tokens(config)

    def loss() -> Tensor:
        """`Model.loss`, but not rounded to float32."""
        logits_BSV = F.linear(model.hidden(tokens[:, :-1]), model.head_weight())
        return F.cross_entropy(logits_BSV.flatten(0, 1), tokens[:, 1:].flatten())

    assert loss().item() == pytest.approx(model.loss(tokens[:, :-1], tokens[:, 1:]).item())
    loss().backward()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        assert parameter.grad is not None, name
        slope = float((parameter.grad * direction).sum())
        losses = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter += step * direction
                losses.append(loss().item())
                parameter -= step * direction
        difference = (losses[0] - losses[1]) / 2e-5
        assert difference == pytest.approx(slope, rel=1e-5, abs=1e-8), name


@by_family
def test_the_reference_engine_trains(case: Case) -> None:
    """A few updates lower the loss, and what it generates with uses the updated weights."""
    config = case.config
    weights = {n: w.detach().clone() for n, w in Model(config).init_weights(1).named_parameters()}
    engine = ReferenceEngine(config, weights, "cpu", "float32", train=True)
    optimizer = torch.optim.AdamW(engine.parameters().values(), lr=3e-3)
    tokens = random_tokens(config)
    losses = []
    for _ in range(5):
        losses.append(float(engine.train_step(tokens[:, :-1], tokens[:, 1:])))
        assert all(p.grad is not None for p in engine.parameters().values())
        optimizer.step()
        optimizer.zero_grad()
    assert abs(losses[0] - math.log(config.vocab_size)) < 1.5
    assert losses[-1] < losses[0] - 0.5
    rows = engine.session_and_rows(1, S)[1]
    with torch.inference_mode():
        logits = rows.read(0, tokens[0].tolist())
    assert error(logits, engine.logits(tokens[:1], last=True)) < 1e-5


def test_initial_weights_compute_as_llamas() -> None:
    """Norms begin as the identity's weights, whatever their offset, and biases at zero."""
    model = Model(OUR_GEMMA.with_(qkv_bias=True)).init_weights(3)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert not parameter.any(), name
    assert all(p.eq(1).all() for p in Model(OURS).init_weights(3).parameters() if p.dim() == 1)


def test_a_norm_with_an_offset_keeps_the_digits_of_its_weights() -> None:
    """1 + w in bfloat16 would lose nearly all of a small w. The norm is the one that is given."""
    config = OUR_GEMMA
    generator = torch.Generator().manual_seed(2)
    weights = {
        name: torch.randn(shape, generator=generator)
        .mul(1e-3 if len(shape) == 1 else 0.1)
        .bfloat16()
        for name, shape in config.weight_shapes().items()
    }
    seen: list[Tensor] = []

    def noted(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        assert x.dtype == torch.float32
        seen.append(weight)
        return rms_norm(x, weight, eps)

    tokens = random_tokens(config)
    logits = Model.from_weights(config, weights, norm=noted)(tokens)
    assert len(seen) == 6 * config.n_layers + 1
    assert torch.equal(seen[-1], 1 + weights["norm.weight"].float())
    assert torch.equal(logits, Model.from_weights(config, weights)(tokens))


def test_yarn_blends_from_kept_to_slowed_frequencies() -> None:
    config = OURS.with_(head_dim=32, rope_theta=100.0, max_seq_len=64)
    plain = [table[1] for table in rope_tables(config)]
    yarn = rope_tables(config.with_(rope_scaling=YarnRopeScaling(4.0, 16, 2.0, 0.5, 1.0)))
    ratio = torch.atan2(yarn[1][1], yarn[0][1]) / torch.atan2(plain[1], plain[0])
    assert ratio[0] == pytest.approx(1.0)
    assert ratio[-1] == pytest.approx(0.25)
    assert ((ratio[1:] - ratio[:-1]) < 1e-6).all()
    assert ((ratio > 0.3) & (ratio < 0.9)).any()
    default = rope_tables(config.with_(rope_scaling=YarnRopeScaling(4.0, 16, 2.0, 0.5)))
    assert torch.allclose(default[0], yarn[0] * (0.1 * math.log(4) + 1))


def test_dropout_reaches_every_family() -> None:
    tokens = random_tokens(OUR_GEMMA)
    model = Model.from_weights(OUR_GEMMA, random_weights(OUR_GEMMA), dropout=0.5)
    still = model(tokens)
    torch.manual_seed(0)
    assert error(model.train()(tokens), still) > 0.1


@by_family
def test_a_run_folder_keeps_the_configuration(case: Case) -> None:
    saved = json.loads(json.dumps(case.config.to_dict()))
    assert ModelConfig.from_dict(saved) == case.config


def test_softcap_bounds_the_logits() -> None:
    config = OUR_GEMMA.with_(logit_softcap=0.5)
    weights, tokens = random_weights(config), random_tokens(config)
    capped = Model.from_weights(config, weights)(tokens)
    plain = Model.from_weights(config.with_(logit_softcap=None), weights)(tokens)
    assert capped.abs().max() <= 0.5
    assert torch.equal(capped, 0.5 * torch.tanh(plain / 0.5))
    engine = ReferenceEngine(config, weights, "cpu")
    assert error(engine.logits(tokens, last=True), capped[:, -1]) < 1e-5
    hidden = Model.from_weights(config, weights).hidden(tokens)
    assert F.linear(hidden, weights["embed_tokens.weight"]).abs().max() > 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": "half"}, "qk_norm must be true, false or 'full', not 'half'"),
        ({"qkv_bias": 1}, "qkv_bias must be true or false, not 1"),
        ({"tied_embeddings": "full"}, "tied_embeddings must be true or false"),
        ({"norm_placement": "around"}, "norm_placement 'around': must be 'pre', 'post' or 'both'"),
        ({"norm_placement": []}, "norm_placement "),
        ({"activation": "gelu"}, "activation 'gelu': must be 'silu' or 'gelu_tanh'"),
        ({"norm_offset": -1.0}, "norm_offset must be positive"),
        ({"norm_offset": math.nan}, "norm_offset must be positive and finite"),
        ({"norm_offset": "1"}, "norm_offset must be a number"),
        ({"embedding_scale": 0.0}, "embedding_scale must be positive"),
        ({"attention_scale": 0}, "attention_scale must be positive"),
        ({"attention_scale": math.inf}, "attention_scale must be positive and finite"),
        ({"logit_softcap": -30.0}, "logit_softcap must be positive"),
        ({"sliding_window": 0}, "sliding_window must be a whole number from 1"),
        ({"sliding_window": 8.0}, "sliding_window must be a whole number"),
        ({"sliding_window": 8, "sliding_layers": [4]}, "sliding_layers has layer 4: .* 0 to 3"),
        ({"sliding_window": 8, "sliding_layers": [-1]}, "sliding_layers has layer -1"),
        ({"sliding_window": 8, "sliding_layers": [True]}, "sliding_layers must be a list"),
        ({"sliding_window": 8, "sliding_layers": 3}, "sliding_layers must be a list"),
        ({"sliding_window": 8, "sliding_rope_theta": 0}, "sliding_rope_theta must be positive"),
        ({"sliding_layers": (1,)}, r"sliding_layers \(1,\) without a sliding_window"),
        ({"sliding_rope_theta": 1e4}, "sliding_rope_theta 10000.0 without a sliding_window"),
        ({"layers_without_rope": (0, 7)}, "layers_without_rope has layer 7"),
        ({"layers_without_rope": "0"}, "layers_without_rope must be a list"),
        ({"rope_scaling": YarnRopeScaling(2.0, 8), "rope_theta": 1.0}, "YaRN needs a base"),
    ],
)
def test_config_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        OURS.with_(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (LinearRopeScaling, (0.0,), "rope_scaling.factor must be positive"),
        (YarnRopeScaling, (None, 8), "rope_scaling.factor must be a number"),
        (YarnRopeScaling, (2.0, 0), "rope_scaling.original_max_seq_len"),
        (YarnRopeScaling, (2.0, 8, 0.0), "rope_scaling.beta_fast"),
        (YarnRopeScaling, (2.0, 8, 1.0, 2.0), "beta_fast must not be smaller"),
        (YarnRopeScaling, (2.0, 8, 2.0, 1.0, -1.0), "rope_scaling.attention_factor"),
    ],
)
def test_rope_scaling_refuses(kind: Any, arguments: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        kind(*arguments)


def test_layers_are_written_in_one_way() -> None:
    config = OURS.with_(sliding_window=8, sliding_layers=[2, 0, 2], layers_without_rope=[3, 1])
    assert (config.sliding_layers, config.layers_without_rope) == ((0, 2), (1, 3))
    assert [config.window(i) for i in range(4)] == [8, None, 8, None]
    every = OURS.with_(sliding_window=8, sliding_layers=[0, 1, 2, 3])
    assert every == OURS.with_(sliding_window=8)
    assert [every.window(i) for i in range(4)] == [8] * 4
    assert hash(config) != hash(every)
    assert OURS.window(0) is None


def test_configurations_from_before_these_fields_are_read() -> None:
    """Run folders and checkpoints have no such keys, and a Llama 3 scaling has no type."""
    scaled = OURS.with_(rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16), qk_norm=True)
    data = scaled.to_dict()
    assert data["rope_scaling"].pop("type") == "llama3"
    for name in FAMILY_FIELDS:
        del data[name]
    assert ModelConfig.from_dict(data) == scaled
    assert not scaled.extensions


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"type": "ntk", "factor": 2.0}, "rope_scaling.type 'ntk': must be one of llama3, linear"),
        ({"type": "linear"}, "incomplete model configuration"),
        ({"type": "linear", "factor": 2.0, "beta_fast": 1.0}, "incomplete model configuration"),
        ({"type": "yarn", "factor": -2.0, "original_max_seq_len": 8}, "rope_scaling.factor"),
    ],
)
def test_from_dict_names_its_source(scaling: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        ModelConfig.from_dict({**OURS.to_dict(), "rope_scaling": scaling}, "some.json")
    assert str(caught.value).startswith("some.json")


@pytest.mark.extended
def test_torch_compile_takes_a_step_as_one_graph() -> None:
    config = OUR_GEMMA.with_(
        n_layers=2, sliding_layers=(0,), layers_without_rope=(1,), qkv_bias=True, logit_softcap=5.0
    )
    weights, tokens = random_weights(config), random_tokens(config)
    engine = ReferenceEngine(config, weights, "cpu", "float32", train=True)
    compiled = torch.compile(engine.model.loss, fullgraph=True, backend="aot_eager")
    compiled(tokens, tokens).backward()
    gradients = {name: p.grad.clone() for name, p in engine.parameters().items()}
    engine.model.zero_grad()
    engine.train_step(tokens, tokens)
    for name, parameter in engine.parameters().items():
        assert error(gradients[name], parameter.grad) < 1e-4, name
