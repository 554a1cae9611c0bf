"""Recipes: the complete configuration of a training run, as strict TOML.

Pure data, without torch. Unknown keys are refused with a suggestion. The keys are in sections.py.
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
from onelaunch.training.schedules import learning_rate
from onelaunch.training.sections import (
    MAX_ACCUM,
    TRAIN_WITH,
    CheckpointSection,
    CoreMLSection,
    DataSection,
    EvalSection,
    LogSection,
    ModelSection,
    OptimizerSection,
    TrainSection,
    described_keys,
)

__all__ = [
    "BUILT_IN",
    "MAX_ACCUM",
    "SECTIONS",
    "Recipe",
    "differences",
    "parse_setting",
    "toml_value",
]

BUILT_IN = Path(__file__).parent / "recipes"
MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Recipe:
    """All sections of a recipe, validated by the constructor.

    `source` is the origin of the recipe, for messages; comparison ignores it.
    """

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    eval: EvalSection = field(default_factory=EvalSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    log: LogSection = field(default_factory=LogSection)
    coreml: CoreMLSection = field(default_factory=CoreMLSection)
    source: str = field(default="the recipe", compare=False)

    def __post_init__(self) -> None:
        for section in SECTIONS:
            values = getattr(self, section)
            for each, described in described_keys(values):
                described.check(f"{section}.{each.name}", getattr(values, each.name))
        self._check_engine()
        if self.model.preset and self.model.preset not in PRESETS:
            preset(self.model.preset)

    def _check_engine(self) -> None:
        for name, allowed in TRAIN_WITH.get(self.train.engine, {}).items():
            value = getattr(self.train, name)
            if value not in allowed:
                raise BadInput(
                    f"train.{name} = {value!r}: not supported by train.engine "
                    f"{self.train.engine}; leave it out"
                )

    def model_config(self, data_vocab_size: int, init: ModelConfig | None = None) -> ModelConfig:
        """Return the shape to train, with the vocabulary of the data unless the recipe sets one.

        A larger vocabulary than that of the data is padded. Raises BadInput if the shape is
        incomplete or its vocabulary too small for the data.

        `init` is the shape of the weights that training starts from, which is then returned; raises
        BadInput if [model] differs from it.
        """
        chosen = {k: v for k, v in asdict(self.model).items() if v is not None and k != "preset"}
        where = f"{self.source}: [model]"
        if init is not None:
            base = init.to_dict()
            if self.model.preset:
                base = self._preset(chosen) | {"vocab_size": init.vocab_size}
            different = differences(ModelConfig.from_dict(base | chosen, where), init)
            if different:
                raise BadInput(
                    f"init={self.train.init!r}: [model] differs from it ({different}); leave out "
                    "[model] and preset: the shape comes with the weights"
                )
            return init
        chosen.setdefault("vocab_size", data_vocab_size)
        if chosen["vocab_size"] < data_vocab_size:
            raise BadInput(
                f"{self.source}: model.vocab_size {chosen['vocab_size']} is smaller than the "
                f"{data_vocab_size} ids of the data's tokenizer; leave it out to use that number"
            )
        if self.model.preset:
            return ModelConfig.from_dict(self._preset(chosen) | chosen, where)
        missing = [name for name in ModelConfig.required_fields() if name not in chosen]
        if missing:
            raise BadInput(
                f"{self.source}: [model] has no {', '.join(missing)}; add them, or a preset, as in "
                f'preset = "{next(iter(PRESETS))}"'
            )
        return ModelConfig.from_dict(chosen, where)

    def _preset(self, chosen: dict[str, Any]) -> dict[str, Any]:
        base = preset(self.model.preset).to_dict()
        if {"dim", "n_heads"} & set(chosen):
            # a changed width gets a new head width unless the recipe sets one
            base.update(head_dim=0, n_kv_heads=0)
        return base

    def lr_scale(self, ranks: int = 1) -> float:
        """Return the factor of the learning rate by `lr_rule`, for so many processes."""
        ratio = ranks * self.train.accum / self.optimizer.lr_base_accum
        return {"none": 1.0, "sqrt": math.sqrt(ratio), "linear": ratio}[self.optimizer.lr_rule]

    def learning_rate(self, update: int, ranks: int = 1) -> float:
        """Return the rate of update 0, 1, ... of so many processes, see
        `schedules.learning_rate`."""
        peak = self.optimizer.lr * self.lr_scale(ranks)
        return learning_rate(self.optimizer, peak, update, self.train.updates)

    def with_settings(self, settings: dict[str, Any], source: str) -> Recipe:
        """Return a copy with settings `{"section.key": value}`; raises BadInput naming `source`."""
        data: dict[str, dict[str, Any]] = {}
        for path, value in settings.items():
            section, dot, key = path.partition(".")
            if not dot:
                _check_key(section, [f"{s}.{k}" for s in SECTIONS for k in _types(s)], source)
            data.setdefault(section, {})[key] = value
        return _merged(self, data, source)

    def to_toml(self) -> str:
        """Return the resolved recipe as TOML; `load` is the inverse."""
        lines: list[str] = []
        for section in SECTIONS:
            lines.append(f"[{section}]")
            for key, value in asdict(getattr(self, section)).items():
                if value is not None:
                    lines.append(f"{key} = {toml_value(value)}")
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
                f"{name}: cannot read the recipe ({error.strerror}); built-in recipes: {known}"
            ) from error
        if len(raw) > MAX_BYTES:
            raise BadInput(f"{name}: larger than {MAX_BYTES} bytes; this is not a recipe")
        return cls.parse(raw, name)

    @classmethod
    def parse(cls, raw: bytes, source: str) -> Recipe:
        """Build from TOML bytes; a byte order mark is skipped."""
        if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise BadInput(f"{source}: is UTF-16; save it as UTF-8")
        try:
            data = tomllib.loads(raw.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{source}: not valid TOML ({error})") from error
        return cls.from_dict(data, source)


SECTIONS = tuple(section.name for section in fields(Recipe) if section.name != "source")


def differences(a: ModelConfig, b: ModelConfig) -> str:
    """Describe the fields in which two shapes differ, as in "dim 64, not 32"."""
    old, new = a.to_dict(), b.to_dict()
    return "; ".join(f"{key} {old[key]}, not {new[key]}" for key in old if old[key] != new[key])


def parse_setting(text: str) -> tuple[str, Any]:
    """Split `a.b=c` into key and value; c is a TOML value, or else plain text."""
    path, equals, raw = text.partition("=")
    if not equals or not path.strip():
        raise BadInput(f"{text}: must have the form section.key=value")
    try:
        value = tomllib.loads(f"value = {raw.strip()}")["value"]
    except (ValueError, RecursionError):
        value = raw.strip()
    return path.strip(), value


def _merged(recipe: Recipe, data: dict[str, Any], source: str) -> Recipe:
    changed: dict[str, Any] = {}
    for section, values in data.items():
        _check_key(section, list(SECTIONS), source)
        if not isinstance(values, dict):
            raise BadInput(f"{source}: [{section}] must be a section of key = value lines")
        types = _types(section)
        checked = {}
        for key, value in values.items():
            _check_key(key, list(types), source, f"{section}.")
            checked[key] = _check_type(f"{section}.{key}", value, types[key], source)
        changed[section] = replace(getattr(recipe, section), **checked)
    try:
        return replace(recipe, **changed)
    except BadInput as error:
        raise BadInput(f"{source}: {error}") from error


def _types(section: str) -> dict[str, Any]:
    return get_type_hints(get_type_hints(Recipe)[section])


def _check_key(name: str, known: list[str], source: str, prefix: str = "") -> None:
    if name in known:
        return
    # People often give only the last word of a key: accum, lr, updates.
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5) or [
        k for k in known if k.split(".")[-1] == name
    ]
    hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(known)}"
    raise BadInput(f"{source}: unknown key {prefix}{name}; {hint}")


def _check_type(name: str, value: Any, kind: Any, source: str) -> Any:
    expected = next(t for t in (get_args(kind) or (kind,)) if t is not type(None))
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**53 else value
    if type(value) is not expected:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
        raise BadInput(f"{source}: {name} must be {words[expected]}, not {value!r}")
    return value


def toml_value(value: Any) -> str:
    """Format a boolean, number or string as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if " " <= c != "\x7f" else f"\\u{ord(c):04x}" for c in escaped) + '"'
    return repr(value)
