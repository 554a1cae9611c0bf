"""The measured forms of a training step, and their storage.

They are of a model's shape, a batch of exactly so many sequences and tokens, a dtype, a device, and
the versions and sources that compile for it. Nothing that is read is trusted: what is not exactly
such forms is none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from onelaunch.compilation.cache import Store, program_key
from onelaunch.config import ModelConfig
from onelaunch.engines.cuda.training.forms import AttentionBlocks, ProductTile, TrainingForms
from onelaunch.engines.cuda.tuning.facts import Facts, digest_of, shape_of
from onelaunch.errors import BadInput

WHAT = "the forms of a training step"
_EXTENT, _STAGES, _WARPS, _CTAS, _AHEAD = 256, 16, 16, 32, 2  # more than any has
_LOGITS = 1 << 40


@dataclass(frozen=True)
class TunedForms:
    """us, rule_us: microseconds of a micro-step in these forms and in the rule's; tried: how many
    candidates were timed; seconds: what that took; measured: when, in UTC."""

    forms: TrainingForms
    us: float
    rule_us: float
    tried: int
    seconds: float
    measured: str


def facts_of(
    config: ModelConfig,
    sequences: int,
    length: int,
    dtype: str,
    dropout: bool,
    device: Mapping[str, str | int],
) -> Facts:
    """All that measured forms depend on, except the sources; `device` as in `device_facts`."""
    return {
        **shape_of(config),
        "rope_layout": config.rope_layout,
        "tied_embeddings": config.tied_embeddings,
        "sequences": sequences,
        "length": length,
        "dtype": dtype,
        "dropout": dropout,
        **device,
    }


def find(store: Store, facts: Facts) -> TunedForms | None:
    """The forms that are kept for these facts. What cannot be read is removed."""
    key = _key(store, facts)
    text = store.get(key)
    if text is None:
        return None
    try:
        entry = json.loads(text)
        if set(entry) == {"of", "tuned"} and entry["of"] == facts:
            return _read_tuned(entry["tuned"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    store.remove(key)
    return None


def keep(store: Store, facts: Facts, tuned: TunedForms) -> bool:
    """Store measured forms. Returns whether that succeeded; `store.last_error` is why not."""
    data = {**asdict(tuned), "forms": data_of(tuned.forms)}
    text = json.dumps({"of": facts, "tuned": data}, sort_keys=True)
    about: dict[str, str | float] = {"what": WHAT, "seconds": tuned.seconds}
    return store.put(_key(store, facts), text.encode("ascii"), about)


def data_of(forms: TrainingForms) -> dict[str, Any]:
    """Forms as JSON data; `read_forms` is the inverse."""
    data = {field.name: getattr(forms, field.name) for field in fields(forms)}
    for name, value in data.items():
        if isinstance(value, AttentionBlocks):
            data[name] = value._asdict()
        elif isinstance(value, ProductTile):
            data[name] = asdict(value)
    return data


def read_forms(data: Any) -> TrainingForms:
    """Forms from JSON data. Raises ValueError, TypeError, KeyError or AttributeError for what is
    none."""
    _require(set(data) == {field.name for field in fields(TrainingForms)})
    attention = [_read_blocks(data[f"attention_{part}"]) for part in ("forward", "backward")]
    _require((attention[0] is None) == (attention[1] is None))
    _require(_is_whole(data["logits"], 1, _LOGITS) and type(data["side_stream"]) is bool)
    return TrainingForms(
        _read_tile(data["swiglu_forward"]),
        _read_tile(data["swiglu_backward"]),
        attention[0],
        attention[1],
        data["logits"],
        data["side_stream"],
    )


def _read_tuned(data: Any) -> TunedForms:
    _require(set(data) == {field.name for field in fields(TunedForms)})
    for name in ("us", "rule_us", "seconds"):
        _require(type(data[name]) is float and 0 < data[name] < math.inf)
    _require(_is_whole(data["tried"], 0, 1 << 20) and type(data["measured"]) is str)
    return TunedForms(**{**data, "forms": read_forms(data["forms"])})


def _read_blocks(data: Any) -> AttentionBlocks | None:
    if data is None:
        return None
    _require(set(data) == set(AttentionBlocks._fields))
    blocks = AttentionBlocks(**data)
    _require(_is_extent(blocks.rows) and _is_extent(blocks.columns))
    _require(_is_whole(blocks.num_stages, 1, _STAGES) and _is_power(blocks.num_warps, 1, _WARPS))
    return blocks


def _read_tile(data: Any) -> ProductTile | None:
    if data is None:
        return None
    _require(set(data) == {field.name for field in fields(ProductTile)})
    for field in fields(ProductTile):
        if field.name != "max_registers":
            expected = int if field.default is MISSING else type(field.default)
            _require(type(data[field.name]) is expected)
    tile = ProductTile(**data)
    _require(all(map(_is_extent, (tile.block_m, tile.block_f, tile.block_k))))
    _require(_is_whole(tile.num_stages, 1, _STAGES) and _is_power(tile.num_warps, 4, _WARPS))
    _require(_is_whole(tile.ctas_per_sm, 0, _CTAS) and _is_whole(tile.ahead, 0, _AHEAD))
    _require(_is_power(tile.parts, 1, tile.block_f // 16))
    _require(tile.max_registers is None or _is_whole(tile.max_registers, 16, 255))
    return tile


def _is_whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _is_power(value: Any, least: int, most: int) -> bool:
    return _is_whole(value, least, most) and value & (value - 1) == 0


def _is_extent(value: Any) -> bool:
    return _is_power(value, 16, _EXTENT)


def _require(right: bool) -> None:
    if not right:
        raise BadInput("not the forms of a training step")


def _key(store: Store, facts: Facts) -> str:
    return program_key(digest_of(store, _source_files(), "the sources of training steps"), facts)


def _source_files() -> list[Path]:
    training = Path(__file__).parent.parent
    package = training.parents[2]
    return [*sorted(training.glob("*.py")), package / "plan" / "training.py"]
