"""The measured choice of a form, and its storage.

A choice is of a model's shape, a dtype, a device, the versions and sources that compile for it, and
of batches and sequences up to a power of two. Nothing that is read is trusted: what is not exactly
a choice is none.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from onelaunch.compilation.cache import Store, program_key
from onelaunch.config import ModelConfig
from onelaunch.engines.cuda.blocking import Blocking
from onelaunch.engines.cuda.forms import STAGED, Form
from onelaunch.engines.cuda.tuning.facts import SHAPE, Facts, digest_of, shape_of
from onelaunch.engines.cuda.tuning.space import KINDS, WRITES_X
from onelaunch.errors import BadInput
from onelaunch.plan import parse_depth

RULE = "rule"
"""The name, among what was timed, of one kernel per stage with the rule's tiles."""
WHAT = "the choice of a form"
_EXTENT, _STAGES, _WARPS, _CHUNK, _PROGRAMS = 1024, 16, 32, 1 << 16, 32  # more than any has


@dataclass(frozen=True)
class Choice:
    """form: STAGED or a fusion depth; programs: CTAs of a launch of several stages, or None; us:
    microseconds of each form's best, as a CUDA graph; seconds: what finding it took; tried: how
    many forwards were timed; measured: when, in UTC."""

    form: str
    blockings: Mapping[str, Blocking]
    programs: int | None
    us: Mapping[str, float]
    seconds: float
    tried: int
    measured: str

    def as_form(self) -> Form:
        """The form that was chosen, with its tiles."""
        return Form(self.form, self.blockings, self.programs)


def bucket(config: ModelConfig, batch: int, sequence: int) -> tuple[int, int]:
    """The batch and sequence whose choice is used: the next powers of two, the model's context at
    most."""
    return _power(batch), min(_power(sequence), config.max_seq_len)


def facts_of(
    config: ModelConfig,
    dtype: str,
    batch: int,
    sequence: int,
    device: Mapping[str, str | int],
    all_positions: bool = True,
) -> Facts:
    """All that a choice depends on, except the sources. `device`: its name, how many
    multiprocessors it has, and the versions of what compiles for it."""
    batch, sequence = bucket(config, batch, sequence)
    return {
        **shape_of(config),
        "dtype": dtype,
        "batch": batch,
        "sequence": sequence,
        "all_positions": all_positions,
        **device,
    }


def find(store: Store, facts: Facts) -> Choice | None:
    """The choice that is kept for these facts. One that cannot be read is removed."""
    key = _key(store, facts)
    text = store.get(key)
    if text is None:
        return None
    parsed = _parse(text)
    if parsed is None or parsed[0] != facts:
        store.remove(key)
        return None
    return parsed[1]


def keep(store: Store, facts: Facts, choice: Choice) -> bool:
    """Store a choice. Returns whether that succeeded; `store.last_error` is why not."""
    about: dict[str, str | float] = {
        "what": WHAT,
        "seconds": choice.seconds,
        "model": _name(facts),
    }
    text = json.dumps({"of": facts, "choice": asdict(choice)}, sort_keys=True)
    return store.put(_key(store, facts), text.encode("ascii"), about)


def kept(store: Store, config: ModelConfig) -> list[tuple[Facts, Choice]]:
    """The choices for a model that these sources made, on whatever device, the smallest first."""
    name = _name(shape_of(config))
    choices = []
    for entry in store.entries():
        if entry.about.get("what") != WHAT or entry.about.get("model") != name:
            continue
        read = _parse(store.peek(entry.key) or b"")
        if read is not None and _key(store, read[0]) == entry.key:
            choices.append(read)
    return sorted(choices, key=lambda pair: _order(pair[0]))


def _order(of: Facts) -> tuple[str, str, int, int]:
    return str(of["device"]), str(of["dtype"]), int(of["batch"]), int(of["sequence"])


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _name(facts: Facts) -> str:
    """The name of a model's shape."""
    shape = json.dumps([facts[name] for name in SHAPE])
    return hashlib.sha256(shape.encode("ascii")).hexdigest()


def _key(store: Store, facts: Facts) -> str:
    return program_key(_sources(store), facts)


def _sources(store: Store) -> bytes:
    """A digest of all that a forward is made of."""
    return digest_of(store, _source_files(), "the sources of forwards")


def _source_files() -> list[Path]:
    here = Path(__file__).parent.parent
    package = here.parent.parent
    apart = [here / "tuning", here / "decoding", here / "training"]
    files = [file for file in here.rglob("*.py") if not set(apart) & set(file.parents)]
    return sorted([*files, *(package / "plan").glob("*.py"), package / "operators" / "handles.py"])


def _parse(text: bytes) -> tuple[Facts, Choice] | None:
    """Facts and choice, or None for what is not exactly these."""
    try:
        entry = json.loads(text)
        facts, choice = entry["of"], entry["choice"]
        of = [type(facts[name]) for name in (*SHAPE, "dtype", "batch", "sequence", "device")]
        if of != [int] * (len(SHAPE) - 1) + [bool, str, int, int, str]:
            return None
        return facts, read_choice(choice, facts["n_layers"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def read_choice(data: Any, n_layers: int) -> Choice:
    """Raises ValueError, TypeError or KeyError for what is none."""
    if set(data) != {field.name for field in fields(Choice)}:
        raise ValueError("fields")
    for name in (form for form in (data["form"], *data["us"]) if form not in (STAGED, RULE)):
        parse_depth(name, n_layers)
    programs = data["programs"]
    if data["form"] == STAGED:
        _require(programs is None)
    else:
        _require(data["form"] in data["us"] and data["form"] not in (RULE, "stage"))
        _require(type(programs) is int and 1 <= programs <= 1 << 16)
    _require(set(data["blockings"]) == set(KINDS))
    blockings = {kind: read_blocking(b) for kind, b in data["blockings"].items()}
    _require(len({blockings[kind].columns for kind in WRITES_X}) == 1)
    _require(all(type(us) is float and 0 < us < math.inf for us in data["us"].values()))
    _require(type(data["seconds"]) is float and 0 <= data["seconds"] < math.inf)
    _require(STAGED in data["us"] and type(data["tried"]) is int and type(data["measured"]) is str)
    return Choice(**{**data, "blockings": blockings})


def read_blocking(data: Mapping[str, Any]) -> Blocking:
    """A blocking from plain data. Raises ValueError, TypeError or KeyError for what is none."""
    _require(set(data) == {field.name for field in fields(Blocking)})
    for field in fields(Blocking):
        expected = int if field.default is MISSING else type(field.default)
        _require(type(data[field.name]) is expected)
    blocking = Blocking(**data)
    for extent in (blocking.rows, blocking.columns, blocking.block_k):
        _require(16 <= extent <= _EXTENT and extent & (extent - 1) == 0)
    _require(0 <= blocking.num_stages <= _STAGES)
    _require(0 <= blocking.chunk <= _CHUNK and 0 <= blocking.programs <= _PROGRAMS)
    _require(blocking.chunk % max(blocking.rows, blocking.columns) == 0)
    _require(1 <= blocking.warps <= _WARPS and blocking.warps & (blocking.warps - 1) == 0)
    return blocking


def _require(right: bool) -> None:
    if not right:
        raise BadInput("not a choice")
