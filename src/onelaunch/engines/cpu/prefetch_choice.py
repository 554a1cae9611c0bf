"""The measured choice of a prefetch, and its storage.

A choice is of a processor, the compiled program, a model's shape, a dtype and a number of threads.
Nothing that is read is trusted: what is not exactly a choice is removed and measured again.
"""

from __future__ import annotations

import json
import math
import os
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from onelaunch.compilation.cache import Store, program_key
from onelaunch.config import ModelConfig
from onelaunch.engines.cpu import prefetch, program, usable_cores
from onelaunch.engines.cpu.pack import PackedWeights
from onelaunch.engines.cpu.prefetch import NONE, Measured, Prefetch, Slices
from onelaunch.errors import BadInput

WHAT = "the choice of a prefetch"
_SHAPE = (
    "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "qk_norm",
    "tied_embeddings",
)  # fmt: skip
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")

Facts = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Choice:
    """The prefetch of one thread and of several; None: the engine never has so many."""

    one: Measured | None
    several: Measured | None
    measured: str
    """When, in UTC."""

    @property
    def prefetch(self) -> tuple[Prefetch, Prefetch]:
        """The prefetch of one thread, and of several."""
        return _prefetch_of(self.one), _prefetch_of(self.several)


def _prefetch_of(measured: Measured | None) -> Prefetch:
    return NONE if measured is None else measured.prefetch


def chosen(
    store: Store,
    config: ModelConfig,
    packed: PackedWeights,
    compiled: program.Program,
    threads: int,
    adapt: bool,
) -> tuple[Prefetch, Prefetch]:
    """The prefetch of one thread and of several for these weights: the stored choice, or one
    measured now and stored. `threads` is the maximum; with `adapt` one alone may work too."""
    if packed.n_bytes < prefetch.MEASURED_FROM:
        return NONE, NONE
    facts = facts_of(config, str(packed.dtype).removeprefix("torch."), threads, adapt)
    choice = find(store, facts)
    if choice is not None:
        return choice.prefetch

    numbers = [1] * (adapt or threads == 1) + [threads] * (threads > 1)
    measured = {
        n: prefetch.choose([Slices(compiled, packed, config.dim, i, n) for i in range(n)])
        for n in numbers
    }
    now = datetime.now(UTC).isoformat(timespec="seconds")
    choice = Choice(measured.get(1), measured.get(threads) if threads > 1 else None, now)
    if None not in measured.values():
        keep(store, facts, choice)
    return choice.prefetch


def facts_of(config: ModelConfig, dtype: str, threads: int, adapt: bool) -> Facts:
    """All that a choice depends on, except the sources."""
    return {
        **_shape_of(config),
        "dtype": dtype,
        "threads": threads,
        "adapt": adapt,
        **processor(),
    }


@cache
def processor() -> Facts:
    """The processor: its name, its features, its caches, and how many cores may be used."""
    return {
        **program.options(),
        "processor": processor_name(),
        "cores": usable_cores(),
        "caches": _caches(),
    }


def processor_name() -> str:
    """The processor's model name, where the system has it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _caches() -> list[str]:
    """Level, kind and size of each cache of the first core, as Linux reports them."""
    try:
        folders = sorted(path for path in _CACHES.iterdir() if path.name.startswith("index"))
        return [
            " ".join((folder / name).read_text().strip() for name in ("level", "type", "size"))
            for folder in folders
        ]
    except OSError:
        return []


def find(store: Store, facts: Facts) -> Choice | None:
    """The choice that is kept for these facts. One that cannot be read is removed."""
    key = _key(facts)
    text = store.peek(key)
    if text is None:
        return None
    parsed = _parse(text)
    if parsed is None or parsed[0] != facts:
        store.remove(key)
        return None
    return parsed[1]


def keep(store: Store, facts: Facts, choice: Choice) -> bool:
    """Store a choice. Returns whether that succeeded; `store.last_error` is why not."""
    data = {
        "of": facts,
        "one": _as_data(choice.one),
        "several": _as_data(choice.several),
        "measured": choice.measured,
    }
    text = json.dumps(data, sort_keys=True).encode("ascii")
    return store.put(_key(facts), text, {"what": WHAT, "model": _name(facts)})


def kept(store: Store, config: ModelConfig | None = None) -> list[tuple[Facts, Choice]]:
    """The choices for a model, or all, that these sources made, on whatever processor."""
    choices = []
    for entry in store.entries():
        if entry.about.get("what") != WHAT:
            continue
        if config is not None and entry.about.get("model") != _name(_shape_of(config)):
            continue
        read = _parse(store.peek(entry.key) or b"")
        if read is not None and _key(read[0]) == entry.key:
            choices.append(read)
    return sorted(
        choices, key=lambda pair: (pair[0]["dtype"], pair[0]["threads"], pair[1].measured)
    )


def _shape_of(config: ModelConfig) -> Facts:
    return {name: getattr(config, name) for name in _SHAPE}


def _name(facts: Facts) -> str:
    """The name of a model's shape."""
    return " ".join(str(facts[name]) for name in _SHAPE)


def _key(facts: Facts) -> str:
    here = Path(prefetch.__file__)
    return program_key(program.source() + here.read_bytes() + Path(__file__).read_bytes(), facts)


def _as_data(measured: Measured | None) -> Facts | None:
    if measured is None:
        return None
    return {
        "prefetch": str(measured.prefetch),
        "gain": round(measured.gain, 4),
        "rounds": measured.rounds,
    }


def _parse(text: bytes) -> tuple[Facts, Choice] | None:
    """Facts and choice, or None for what is not exactly these."""
    try:
        entry = json.loads(text)
        facts = entry["of"]
        types = [type(facts[name]) for name in ("dtype", "threads", "processor", *_SHAPE)]
        if types[:3] != [str, int, str] or not set(types[3:]) <= {int, bool}:
            return None
        measured = entry["measured"]
        if type(measured) is not str:
            return None
        return facts, Choice(_measured(entry["one"]), _measured(entry["several"]), measured)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _measured(data: Any) -> Measured | None:
    """Raises ValueError, TypeError or KeyError for what is none."""
    if data is None:
        return None
    gain, rounds = data["gain"], data["rounds"]
    if type(gain) is not float or not 0 < gain < math.inf or type(rounds) is not int or rounds < 1:
        raise BadInput("not a choice")
    return Measured(Prefetch.parse(data["prefetch"]), gain, rounds)


def by_hand(requested: str | None) -> Prefetch | None:
    """The prefetch of `requested` or ONELAUNCH_PREFETCH; None where that is empty, or "auto"."""
    text = requested if requested is not None else os.environ.get("ONELAUNCH_PREFETCH", "")
    if text in ("", "auto"):
        return None
    try:
        return Prefetch.parse(text)
    except BadInput as error:
        where = "" if requested is not None else "ONELAUNCH_PREFETCH: "
        raise BadInput(f"{where}{error}, or auto") from None
