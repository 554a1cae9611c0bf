"""ModelConfig: the shape of a decoder of the Llama family and its relatives; the named presets.

Pure data: no torch, no files.
"""

from __future__ import annotations

import math
import sys
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, Literal, NamedTuple, get_args

from onelaunch.errors import BadInput

RopeLayout = Literal["interleaved", "half"]
NormPlacement = Literal["pre", "post", "both"]
Activation = Literal["silu", "gelu_tanh"]

# Far beyond any model in reach; a header that claims more is damaged or hostile.
MAX_EXTENT = 1 << 24
MAX_LAYERS = 1 << 10
_LARGEST_FLOAT = sys.float_info.max


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3's frequency scaling (`rope_type = "llama3"` in Hugging Face configurations)."""

    factor: float = 32.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            _positive_float(f"rope_scaling.{name}", getattr(self, name))
        _extent("rope_scaling.original_max_seq_len", self.original_max_seq_len, MAX_EXTENT)
        if self.high_freq_factor <= self.low_freq_factor:
            raise BadInput("rope_scaling: high_freq_factor must be larger than low_freq_factor")


@dataclass(frozen=True, slots=True)
class LinearRopeScaling:
    """All frequencies divided by `factor` (`rope_type = "linear"`)."""

    factor: float

    def __post_init__(self) -> None:
        _positive_float("rope_scaling.factor", self.factor)


@dataclass(frozen=True, slots=True)
class YarnRopeScaling:
    """YaRN (Peng et al., arXiv 2309.00071; `rope_type = "yarn"`).

    Pairs that turn more than `beta_fast` times within `original_max_seq_len` positions keep their
    frequency, those that turn less than `beta_slow` times have it divided by `factor`, the ones
    between are blended. Cosine and sine are multiplied by `attention_factor`; None is the paper's
    0.1 ln(factor) + 1.
    """

    factor: float
    original_max_seq_len: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        for name in ("factor", "beta_fast", "beta_slow"):
            _positive_float(f"rope_scaling.{name}", getattr(self, name))
        _extent("rope_scaling.original_max_seq_len", self.original_max_seq_len, MAX_EXTENT)
        if self.attention_factor is not None:
            _positive_float("rope_scaling.attention_factor", self.attention_factor)
        if self.beta_fast < self.beta_slow:
            raise BadInput("rope_scaling: beta_fast must not be smaller than beta_slow")


AnyRopeScaling = RopeScaling | LinearRopeScaling | YarnRopeScaling
ROPE_SCALINGS: dict[str, type[AnyRopeScaling]] = {
    "llama3": RopeScaling,
    "linear": LinearRopeScaling,
    "yarn": YarnRopeScaling,
}
"""By their names in Hugging Face configurations."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Every number that fixes a model's shape and arithmetic. The defaults are Llama's.

    `n_kv_heads` and `head_dim` of 0 mean `n_heads` and `dim // n_heads`.
    `rope_layout` says which two elements of a head rotate together: "interleaved" (2i, 2i+1), as in
    llama2.c, or "half" (i, i + head_dim/2), as in Hugging Face. It also fixes the row order of the
    q and k projections.
    `qk_norm` is RMSNorm of queries and keys before the rotary embedding: True over each head
    (Qwen3, Gemma 3), "full" over all heads together (OLMo 2).

    The other families differ by these; layers count from 0:

    qkv_bias: the projections of queries, keys and values have a bias (Qwen2).
    norm_placement: a norm before attention and before the MLP ("pre"), after each of them, within
        the residual branch ("post", OLMo 2), or "both" (Gemma 3).
    norm_offset: added to the weight of every norm (Gemma: 1).
    activation: of the gate of the MLP: SiLU, or GELU by its tanh approximation (Gemma).
    embedding_scale: what the embedding is multiplied by (Gemma: sqrt(dim)).
    attention_scale: what the scores of attention are multiplied by; None: 1 / sqrt(head_dim).
    logit_softcap: c of c tanh(logits / c); None: the logits as they are.
    sliding_window: in `sliding_layers` a position sees itself and the window's other positions
        before it, so many in all; None: all positions before it.
    sliding_layers: the layers that the window holds for; without any it holds for all.
    sliding_rope_theta: the rotary base of those layers, which `rope_scaling` does not change then;
        None: as in the other layers.
    layers_without_rope: the layers without rotary embedding (SmolLM3).
    """

    dim: int
    n_layers: int
    n_heads: int
    hidden_dim: int
    vocab_size: int
    max_seq_len: int
    n_kv_heads: int = 0
    head_dim: int = 0
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_layout: RopeLayout = "half"
    rope_scaling: AnyRopeScaling | None = None
    qk_norm: bool | Literal["full"] = False
    tied_embeddings: bool = True
    qkv_bias: bool = False
    norm_placement: NormPlacement = "pre"
    norm_offset: float = 0.0
    activation: Activation = "silu"
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    logit_softcap: float | None = None
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = ()
    sliding_rope_theta: float | None = None
    layers_without_rope: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("dim", "n_heads", "hidden_dim", "vocab_size", "max_seq_len"):
            _extent(name, getattr(self, name), MAX_EXTENT)
        _extent("n_layers", self.n_layers, MAX_LAYERS)
        if not self.n_kv_heads:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        if not self.head_dim:
            if self.dim % self.n_heads:
                raise BadInput(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}")
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        _extent("n_kv_heads", self.n_kv_heads, MAX_EXTENT)
        _extent("head_dim", self.head_dim, MAX_EXTENT)
        if self.n_heads % self.n_kv_heads:
            raise BadInput(
                f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise BadInput(f"head_dim {self.head_dim} is odd; rotary embedding needs pairs")
        _positive_float("norm_eps", self.norm_eps)
        _positive_float("rope_theta", self.rope_theta)
        _one_of("rope_layout", self.rope_layout, RopeLayout)
        for name in ("qk_norm", "tied_embeddings", "qkv_bias"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "qk_norm" and value == "full"):
                choices = "true, false or 'full'" if name == "qk_norm" else "true or false"
                raise BadInput(f"{name} must be {choices}, not {value!r}")
        self._check_variant()

    def _check_variant(self) -> None:
        """Check the fields in which families other than Llama differ."""
        if isinstance(self.rope_scaling, YarnRopeScaling) and self.rope_theta <= 1:
            raise BadInput(f"rope_theta {self.rope_theta!r}: YaRN needs a base larger than 1")
        _one_of("norm_placement", self.norm_placement, NormPlacement)
        _one_of("activation", self.activation, Activation)
        if self.norm_offset != 0:
            _positive_float("norm_offset", self.norm_offset)
        _positive_float("embedding_scale", self.embedding_scale)
        for name in ("attention_scale", "logit_softcap", "sliding_rope_theta"):
            if getattr(self, name) is not None:
                _positive_float(name, getattr(self, name))
        for name in ("sliding_layers", "layers_without_rope"):
            object.__setattr__(self, name, _layers(name, getattr(self, name), self.n_layers))
        if self.sliding_window is not None:
            _extent("sliding_window", self.sliding_window, MAX_EXTENT)
            if len(self.sliding_layers) == self.n_layers:
                object.__setattr__(self, "sliding_layers", ())  # one way to write all of them
        for name in ("sliding_layers", "sliding_rope_theta"):
            if self.sliding_window is None and getattr(self, name):
                raise BadInput(f"{name} {getattr(self, name)!r} without a sliding_window")

    @classmethod
    def required_fields(cls) -> tuple[str, ...]:
        """The names of the fields that have no default."""
        return tuple(field.name for field in fields(cls) if field.default is MISSING)

    @property
    def q_dim(self) -> int:
        """Width of the query projection: heads x head width."""
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of the key and of the value projection."""
        return self.n_kv_heads * self.head_dim

    @property
    def n_params(self) -> int:
        """Stored parameters (a tied classifier counts once)."""
        return sum(math.prod(shape) for shape in self.weight_shapes().values())

    @property
    def extensions(self) -> tuple[str, ...]:
        """What takes this model beyond the layers of Llama and Qwen3, which every engine computes,
        as in "norm_placement='post'"."""
        names = [name for name in FAMILY_FIELDS if getattr(self, name) != _DEFAULTS[name]]
        names += ["qk_norm"] if self.qk_norm == "full" else []
        return tuple(f"{name}={getattr(self, name)!r}" for name in names)

    def window(self, layer: int) -> int | None:
        """How many positions each position of a layer sees, itself included; None: all before."""
        slides = not self.sliding_layers or layer in self.sliding_layers
        return self.sliding_window if slides else None

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical weight names and shapes, in order: Hugging Face's names without `model.`."""
        shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (self.vocab_size, self.dim)}
        for i in range(self.n_layers):
            for name, shape in self._layer_shapes().items():
                shapes[f"layers.{i}.{name}"] = shape
        shapes["norm.weight"] = (self.dim,)
        if not self.tied_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.dim)
        return shapes

    def _layer_shapes(self) -> dict[str, tuple[int, ...]]:
        attention: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj.weight": (self.q_dim, self.dim),
            "self_attn.k_proj.weight": (self.kv_dim, self.dim),
            "self_attn.v_proj.weight": (self.kv_dim, self.dim),
        }
        if self.qkv_bias:
            attention["self_attn.q_proj.bias"] = (self.q_dim,)
            attention["self_attn.k_proj.bias"] = (self.kv_dim,)
            attention["self_attn.v_proj.bias"] = (self.kv_dim,)
        if self.qk_norm:
            full = self.qk_norm == "full"
            attention["self_attn.q_norm.weight"] = (self.q_dim if full else self.head_dim,)
            attention["self_attn.k_norm.weight"] = (self.kv_dim if full else self.head_dim,)
        attention["self_attn.o_proj.weight"] = (self.dim, self.q_dim)
        mlp: dict[str, tuple[int, ...]] = {
            "mlp.gate_proj.weight": (self.hidden_dim, self.dim),
            "mlp.up_proj.weight": (self.hidden_dim, self.dim),
            "mlp.down_proj.weight": (self.dim, self.hidden_dim),
        }
        before_attention, after_attention, before_mlp, after_mlp = (
            {} if name is None else {f"{name}.weight": (self.dim,)}
            for name in NORM_NAMES[self.norm_placement]
        )
        return before_attention | attention | after_attention | before_mlp | mlp | after_mlp

    def with_(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` is its inverse."""
        data: dict[str, Any] = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }
        if self.rope_scaling is not None:
            (name,) = (n for n, kind in ROPE_SCALINGS.items() if type(self.rope_scaling) is kind)
            data["rope_scaling"] = {"type": name, **data["rope_scaling"]}
        return data

    @classmethod
    def from_dict(cls, data: Any, source: str = "config") -> ModelConfig:
        """Build from plain data; raises BadInput naming `source` for unknown or missing fields."""
        if not isinstance(data, dict):
            raise BadInput(f"{source}: the model configuration must be a table of fields")
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise BadInput(f"{source}: unknown field {unknown[0]!r} in the model configuration")
        missing = [name for name in cls.required_fields() if name not in data]
        if missing:
            raise BadInput(
                f"{source}: incomplete model configuration: {', '.join(missing)} missing"
            )
        data = dict(data)
        try:
            if data.get("rope_scaling") is not None:
                data["rope_scaling"] = _rope_scaling(**data["rope_scaling"])
            return cls(**data)
        except TypeError as error:
            raise BadInput(f"{source}: incomplete model configuration ({error})") from error
        except BadInput as error:
            raise BadInput(f"{source}: {error}") from error


class NormNames(NamedTuple):
    """The names of a layer's norms by their place; None: there is none."""

    before_attention: str | None
    after_attention: str | None
    before_mlp: str | None
    after_mlp: str | None


NORM_NAMES: dict[NormPlacement, NormNames] = {
    "pre": NormNames("input_layernorm", None, "post_attention_layernorm", None),
    "post": NormNames(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "both": NormNames(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}
FAMILY_FIELDS = (
    "qkv_bias",
    "norm_placement",
    "norm_offset",
    "activation",
    "embedding_scale",
    "attention_scale",
    "logit_softcap",
    "sliding_window",
    "sliding_layers",
    "sliding_rope_theta",
    "layers_without_rope",
)
"""In which families beyond Llama and Qwen3 differ."""
_DEFAULTS = {field.name: field.default for field in fields(ModelConfig)}


def _rope_scaling(type: str = "llama3", **values: Any) -> AnyRopeScaling:
    """Before there were others, "llama3" was not written."""
    if type not in ROPE_SCALINGS:
        raise BadInput(f"rope_scaling.type {type!r}: must be one of {', '.join(ROPE_SCALINGS)}")
    return ROPE_SCALINGS[type](**values)


def _one_of(name: str, value: object, kind: Any) -> None:
    choices = get_args(kind)
    if value not in choices:
        *others, last = map(repr, choices)
        raise BadInput(f"{name} {value!r}: must be {', '.join(others)} or {last}")


def _layers(name: str, value: object, n_layers: int) -> tuple[int, ...]:
    """Sorted layer numbers, from a tuple or from a list out of JSON."""
    if not isinstance(value, list | tuple) or not all(type(i) is int for i in value):
        raise BadInput(f"{name} must be a list of layer numbers, not {value!r}")
    outside = [i for i in value if not 0 <= i < n_layers]
    if outside:
        raise BadInput(f"{name} has layer {outside[0]}: layers go from 0 to {n_layers - 1}")
    return tuple(sorted(set(value)))


def _extent(name: str, value: object, limit: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
        raise BadInput(f"{name} must be a whole number from 1 to {limit}, not {value!r}")


def _positive_float(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadInput(f"{name} must be a number, not {value!r}")
    if not (0 < value <= _LARGEST_FLOAT):  # false for nan; a whole number may be beyond any float
        raise BadInput(f"{name} must be positive and finite, not {value!r}")


def _stories(dim: int, hidden: int, layers: int, heads: int, context: int) -> ModelConfig:
    return ModelConfig(
        dim=dim,
        n_layers=layers,
        n_heads=heads,
        hidden_dim=hidden,
        vocab_size=32000,
        max_seq_len=context,
        rope_layout="interleaved",
    )


PRESETS: dict[str, ModelConfig] = {
    # llama2.c's TinyStories models
    "stories260k": _stories(64, 172, 5, 8, 512).with_(vocab_size=512, n_kv_heads=4),
    "stories15m": _stories(288, 768, 6, 6, 256),
    "stories42m": _stories(512, 1376, 8, 8, 1024),
    "stories110m": _stories(768, 2048, 12, 12, 1024),
    # shapes published on the Hugging Face Hub
    "smollm2-135m": ModelConfig(
        dim=576,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        hidden_dim=1536,
        vocab_size=49152,
        max_seq_len=8192,
        rope_theta=100000.0,
    ),
    "qwen3-0.6b": ModelConfig(
        dim=1024,
        n_layers=28,
        n_heads=16,
        n_kv_heads=8,
        head_dim=128,
        hidden_dim=3072,
        vocab_size=151936,
        max_seq_len=40960,
        norm_eps=1e-6,
        rope_theta=1000000.0,
        qk_norm=True,
    ),
    "llama-3.2-1b": ModelConfig(
        dim=2048,
        n_layers=16,
        n_heads=32,
        n_kv_heads=8,
        hidden_dim=8192,
        vocab_size=128256,
        max_seq_len=131072,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(),
    ),
}


def preset(name: str) -> ModelConfig:
    """The named shape; raises BadInput with the known names."""
    try:
        return PRESETS[name]
    except KeyError:
        raise BadInput(f"unknown preset {name!r}; known: {', '.join(PRESETS)}") from None
