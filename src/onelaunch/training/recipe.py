"""A recipe: everything that fixes a training run, as strict TOML.

Pure data: no torch. An unknown key is refused with the nearest known one.
"""

from __future__ import annotations

import codecs
import difflib
import math
import tomllib
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from onelaunch.config import PRESETS, ModelConfig, preset
from onelaunch.errors import BadInput

BUILT_IN = Path(__file__).parent / "recipes"
MAX_BYTES = 1 << 20
MAX_ACCUM = 1000


@dataclass(frozen=True)
class ModelSection:
    """The shape: a preset, and any field of it to be changed; or every field.

    An unset `vocab_size` is the data's.
    """

    preset: str = ""
    dim: int | None = None
    n_layers: int | None = None
    n_heads: int | None = None
    n_kv_heads: int | None = None
    head_dim: int | None = None
    hidden_dim: int | None = None
    vocab_size: int | None = None
    max_seq_len: int | None = None
    norm_eps: float | None = None
    rope_theta: float | None = None
    rope_layout: str | None = None
    qk_norm: bool | None = None
    tied_embeddings: bool | None = None


@dataclass(frozen=True)
class DataSection:
    """`path`: a folder made by `onelaunch prepare`, or "stories"."""

    path: str = "stories"


@dataclass(frozen=True)
class TrainSection:
    """One update is `accum` micro-steps of `batch_size` sequences of `seq_len` tokens. `engine`
    "coreml" runs the layers as ML Programs, on the CPU in float32 for the rest of them.

    `seq_len` 0 is the model's context. `dtype` "auto" is bfloat16 autocast on CUDA, float32
    elsewhere. `norm` "auto" is this package's operator on a GPU that runs its kernel, PyTorch's
    elsewhere and with `compile`. `threads` 0 leaves torch's choice.
    """

    updates: int = 1000
    batch_size: int = 32
    seq_len: int = 0
    accum: int = 1
    dropout: float = 0.0
    seed: int = 1337
    engine: str = "reference"
    device: str = "auto"
    dtype: str = "auto"
    norm: str = "auto"
    compile: bool = False
    threads: int = 0


@dataclass(frozen=True)
class OptimizerSection:
    """AdamW; matrices decay, vectors do not. Warm-up is linear, then cosine to
    `lr * min_lr_ratio` at the last update.

    `lr_rule` scales `lr` with accumulation: by accum / lr_base_accum ("linear"), by its square root
    ("sqrt"), or not at all ("none").
    """

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    warmup: int = 100
    min_lr_ratio: float = 0.1
    lr_rule: str = "none"
    lr_base_accum: int = 10


@dataclass(frozen=True)
class EvalSection:
    """Every `every` updates (0: only after the last), on the same `batches` batches each time."""

    every: int = 200
    batches: int = 20


@dataclass(frozen=True)
class CheckpointSection:
    """Every `every` updates (0: only after the last) and at least every `minutes`; the newest
    `keep` and the best are kept."""

    every: int = 200
    minutes: float = 10.0
    keep: int = 2


@dataclass(frozen=True)
class CoreMLSection:
    """Of `train.engine` "coreml". A program holds `fusion_depth` of the model: stage, half (a
    layer), or a number of layers, all of them where it is empty; hands out `taps` (full, or inputs:
    layers are computed again); is evaluated in `dtype`. Micro-steps run on programs `staleness`
    updates old. After `compile_budget` compilations (0: never) a fresh process goes on."""

    fusion_depth: str = ""
    taps: str = "full"
    staleness: int = 1
    dtype: str = "float16"
    compile_budget: int = 0


@dataclass(frozen=True)
class Recipe:
    """All sections. `from_dict`, `load` and `with_settings` check; so does the constructor.

    `source` is where the recipe was read from, for messages; it makes no difference.
    """

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    eval: EvalSection = field(default_factory=EvalSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    coreml: CoreMLSection = field(default_factory=CoreMLSection)
    source: str = field(default="the recipe", compare=False)

    def __post_init__(self) -> None:
        t, o = self.train, self.optimizer
        _within("train.updates", t.updates, 1, 10**9)
        _within("train.batch_size", t.batch_size, 1, 10**6)
        _within("train.seq_len", t.seq_len, 0, 10**7)
        _within("train.accum", t.accum, 1, MAX_ACCUM)
        _within("train.dropout", t.dropout, 0.0, 0.95)
        _within("train.seed", t.seed, 0, 2**63 - 1)
        _within("train.threads", t.threads, 0, 1024)
        _one_of("train.dtype", t.dtype, ("auto", "float32", "bfloat16"))
        _one_of("train.norm", t.norm, ("auto", "torch", "onelaunch"))
        _within("optimizer.lr", o.lr, 1e-12, 1e3)
        _within("optimizer.beta1", o.beta1, 0.0, 1.0 - 1e-9)
        _within("optimizer.beta2", o.beta2, 0.0, 1.0 - 1e-9)
        _within("optimizer.eps", o.eps, 1e-30, 1.0)
        _within("optimizer.weight_decay", o.weight_decay, 0.0, 100.0)
        _within("optimizer.grad_clip", o.grad_clip, 0.0, 1e9)
        _within("optimizer.warmup", o.warmup, 0, 10**9)
        _within("optimizer.min_lr_ratio", o.min_lr_ratio, 0.0, 1.0)
        _one_of("optimizer.lr_rule", o.lr_rule, ("none", "sqrt", "linear"))
        _within("optimizer.lr_base_accum", o.lr_base_accum, 1, MAX_ACCUM)
        _within("eval.every", self.eval.every, 0, 10**9)
        _within("eval.batches", self.eval.batches, 1, 10**6)
        _within("checkpoint.every", self.checkpoint.every, 0, 10**9)
        _within("checkpoint.minutes", self.checkpoint.minutes, 0.01, 10**6)
        _within("checkpoint.keep", self.checkpoint.keep, 1, 10**4)
        _one_of("train.engine", t.engine, ("reference", "coreml"))
        _one_of("coreml.taps", self.coreml.taps, ("full", "inputs"))
        _one_of("coreml.dtype", self.coreml.dtype, ("float16", "float32"))
        _within("coreml.staleness", self.coreml.staleness, 0, 8)
        _within("coreml.compile_budget", self.coreml.compile_budget, 0, 10**9)
        if t.engine == "coreml":
            self._check_programs()
        if self.model.preset and self.model.preset not in PRESETS:
            preset(self.model.preset)

    def _check_programs(self) -> None:
        t = self.train
        for name, value, right in (
            ("dropout", t.dropout, (0.0,)),
            ("compile", t.compile, (False,)),
            ("device", t.device, ("auto", "cpu")),
            ("dtype", t.dtype, ("auto", "float32")),
            ("norm", t.norm, ("auto", "torch")),
        ):
            if value not in right:
                raise BadInput(
                    f"train.{name} = {value!r} does not go with train.engine coreml; leave it out"
                )

    def model_config(self, data_vocab_size: int) -> ModelConfig:
        """The shape to train, its vocabulary taken from the data where the recipe names none.

        A larger vocabulary than the data's is padded. Raises BadInput where the shape is incomplete
        or its vocabulary smaller than the data's.
        """
        chosen = {k: v for k, v in asdict(self.model).items() if v is not None and k != "preset"}
        chosen.setdefault("vocab_size", data_vocab_size)
        if chosen["vocab_size"] < data_vocab_size:
            raise BadInput(
                f"{self.source}: model.vocab_size is {chosen['vocab_size']}, but the data's "
                f"tokenizer has {data_vocab_size} ids; leave it out to take the data's"
            )
        if self.model.preset:
            base = preset(self.model.preset).to_dict()
            if {"dim", "n_heads"} & set(chosen):
                # a changed width takes a new head width unless the recipe fixes one
                base.update(head_dim=0, n_kv_heads=0)
            return ModelConfig.from_dict(base | chosen, f"{self.source}: [model]")
        missing = [name for name in ModelConfig.required_fields() if name not in chosen]
        if missing:
            raise BadInput(
                f"{self.source}: [model] has no {', '.join(missing)}; add what is missing, or name "
                f'a preset, such as preset = "{next(iter(PRESETS))}"'
            )
        return ModelConfig.from_dict(chosen, f"{self.source}: [model]")

    @property
    def lr_scale(self) -> float:
        """What `lr_rule` multiplies the learning rate by."""
        ratio = self.train.accum / self.optimizer.lr_base_accum
        return {"none": 1.0, "sqrt": math.sqrt(ratio), "linear": ratio}[self.optimizer.lr_rule]

    def learning_rate(self, update: int) -> float:
        """The rate of update 0, 1, ...: linear warm-up, then cosine (1608.03983)."""
        o = self.optimizer
        peak = o.lr * self.lr_scale
        if update < o.warmup:
            return peak * (update + 1) / o.warmup
        progress = (update - o.warmup) / max(1, self.train.updates - o.warmup)
        low = peak * o.min_lr_ratio
        return low + (peak - low) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    def with_settings(self, settings: dict[str, Any], source: str) -> Recipe:
        """A copy with `{"section.key": value}` changed; raises BadInput naming `source`."""
        data: dict[str, dict[str, Any]] = {}
        for path, value in settings.items():
            section, dot, key = path.partition(".")
            if not dot:
                _known(section, [f"{s}.{k}" for s in SECTIONS for k in _types(s)], source)
            data.setdefault(section, {})[key] = value
        return _merged(self, data, source)

    def to_toml(self) -> str:
        """The resolved recipe as TOML; `load` reads it back equal."""
        lines: list[str] = []
        for section in SECTIONS:
            lines.append(f"[{section}]")
            for key, value in asdict(getattr(self, section)).items():
                if value is not None:
                    lines.append(f"{key} = {_toml_value(value)}")
            lines.append("")
        return "\n".join(lines)

    @classmethod
    def from_dict(cls, data: dict[str, Any], source: str) -> Recipe:
        """Build from parsed TOML; raises BadInput naming `source` and the key."""
        return _merged(cls(source=source), data, source)

    @classmethod
    def load(cls, name: str) -> Recipe:
        """Read a recipe file, or a built-in recipe by name."""
        path = Path(name)
        built_in = BUILT_IN / f"{name}.toml"
        if not path.is_file() and path.name == name and built_in.exists():
            path = built_in
        try:
            with open(path, "rb") as file:
                raw = file.read(MAX_BYTES + 1)
        except OSError as error:
            known = ", ".join(sorted(p.stem for p in BUILT_IN.glob("*.toml")))
            raise BadInput(
                f"{name}: cannot read the recipe ({error.strerror}); built-in ones: {known}"
            ) from error
        if len(raw) > MAX_BYTES:
            raise BadInput(f"{name}: larger than {MAX_BYTES} bytes; this is not a recipe")
        return cls.parse(raw, name)

    @classmethod
    def parse(cls, raw: bytes, source: str) -> Recipe:
        """Build from TOML bytes; a byte order mark before them, which some editors write, is no
        part of it."""
        if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise BadInput(f"{source}: is UTF-16; save it as UTF-8")
        try:
            data = tomllib.loads(raw.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{source}: not valid TOML ({error})") from error
        return cls.from_dict(data, source)


SECTIONS = tuple(section.name for section in fields(Recipe) if section.name != "source")


def parse_setting(text: str) -> tuple[str, Any]:
    """Key and value of `a.b=c`: c as a TOML value, or as plain text where it is none."""
    path, equals, raw = text.partition("=")
    if not equals or not path.strip():
        raise BadInput(f"{text}: must look like section.key=value")
    try:
        value = tomllib.loads(f"value = {raw.strip()}")["value"]
    except (ValueError, RecursionError):
        value = raw.strip()
    return path.strip(), value


def _merged(recipe: Recipe, data: dict[str, Any], source: str) -> Recipe:
    changed: dict[str, Any] = {}
    for section, values in data.items():
        _known(section, list(SECTIONS), source)
        if not isinstance(values, dict):
            raise BadInput(f"{source}: [{section}] must be a section of key = value lines")
        types = _types(section)
        checked = {}
        for key, value in values.items():
            _known(key, list(types), source, f"{section}.")
            checked[key] = _typed(f"{section}.{key}", value, types[key], source)
        changed[section] = replace(getattr(recipe, section), **checked)
    try:
        return replace(recipe, **changed)
    except BadInput as error:
        raise BadInput(f"{source}: {error}") from error


def _types(section: str) -> dict[str, Any]:
    return get_type_hints(get_type_hints(Recipe)[section])


def _known(name: str, known: list[str], source: str, prefix: str = "") -> None:
    if name in known:
        return
    # Keys are often known by their last word: accum, lr, updates.
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5) or [
        k for k in known if k.split(".")[-1] == name
    ]
    hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(known)}"
    raise BadInput(f"{source}: unknown key {prefix}{name}; {hint}")


def _typed(name: str, value: Any, kind: Any, source: str) -> Any:
    wanted = next(t for t in (get_args(kind) or (kind,)) if t is not type(None))
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**53 else value
    if type(value) is not wanted:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        raise BadInput(f"{source}: {name} must be {words[wanted]}, not {value!r}")
    return value


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise BadInput(f"{name} = {value} is outside {low} to {high}")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise BadInput(f"{name} = {value!r} must be one of {', '.join(choices)}")


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if " " <= c != "\x7f" else f"\\u{ord(c):04x}" for c in escaped) + '"'
    return repr(value)
