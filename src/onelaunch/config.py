"""ModelConfig: the shape of a Llama-family model, and the named presets.

Pure data: no torch, no files.
"""

from __future__ import annotations

import math
import sys
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, Literal

from onelaunch.errors import BadInput

RopeLayout = Literal["interleaved", "half"]

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
class ModelConfig:
    """Every number that fixes a Llama-family model's shape and arithmetic.

    `n_kv_heads` and `head_dim` of 0 mean `n_heads` and `dim // n_heads`.
    `rope_layout` says which two elements of a head rotate together: "interleaved" (2i, 2i+1), as in
    llama2.c, or "half" (i, i + head_dim/2), as in Hugging Face. It also fixes the row order of the
    q and k projections.
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
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False
    tied_embeddings: bool = True

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
        if self.rope_layout not in ("interleaved", "half"):
            raise BadInput(f"rope_layout {self.rope_layout!r}: must be 'interleaved' or 'half'")
        for name in ("qk_norm", "tied_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise BadInput(f"{name} must be true or false, not {getattr(self, name)!r}")

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
        qk_norms: dict[str, tuple[int, ...]] = {}
        if self.qk_norm:
            qk_norms = {
                "self_attn.q_norm.weight": (self.head_dim,),
                "self_attn.k_norm.weight": (self.head_dim,),
            }
        return {
            "input_layernorm.weight": (self.dim,),
            "self_attn.q_proj.weight": (self.q_dim, self.dim),
            "self_attn.k_proj.weight": (self.kv_dim, self.dim),
            "self_attn.v_proj.weight": (self.kv_dim, self.dim),
            **qk_norms,
            "self_attn.o_proj.weight": (self.dim, self.q_dim),
            "post_attention_layernorm.weight": (self.dim,),
            "mlp.gate_proj.weight": (self.hidden_dim, self.dim),
            "mlp.up_proj.weight": (self.hidden_dim, self.dim),
            "mlp.down_proj.weight": (self.dim, self.hidden_dim),
        }

    def with_(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` is its inverse."""
        return asdict(self)

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
                data["rope_scaling"] = RopeScaling(**data["rope_scaling"])
            return cls(**data)
        except TypeError as error:
            raise BadInput(f"{source}: incomplete model configuration ({error})") from error
        except BadInput as error:
            raise BadInput(f"{source}: {error}") from error


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
