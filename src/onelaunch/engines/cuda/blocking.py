"""How each kind of stage is cut into tiles, and how a tile goes through its inner dimension."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onelaunch.config import ModelConfig
from onelaunch.plan import Tiling

PRODUCTS = ("qkv", "out_proj", "gate_up", "down", "head")


@dataclass(frozen=True)
class Blocking:
    """A tile of `rows` by `columns`; of gate_up, rows of its weight, two to a column of what it
    writes; of attention, keys at once. `inner` is how much of the inner dimension is taken at once,
    `loads` how many such blocks are on their way; with `loads` 0 all of it is, and the weights are
    asked for before the tile's turn. `warps` run a tile; one that is `rehearsed` is computed once
    before its turn, of no rows, where a stage is a launch of its own."""

    rows: int
    columns: int
    inner: int = 64
    loads: int = 3
    warps: int = 4
    rehearsed: bool = False


def blocks(inner: int, blocking: Blocking) -> tuple[int, int]:
    """The constants BK and TAIL of a product over `inner`: powers of two from 16 on."""
    if blocking.loads:
        return blocking.inner, 0
    whole = 1 << (inner.bit_length() - 1)
    rest = inner - whole
    return max(16, whole), padded(rest) if rest else 0


def padded(n: int, least: int = 16) -> int:
    """The power of two from `least` on, the narrowest product, that holds n."""
    return max(least, 1 << (n - 1).bit_length())


def inner_of(config: ModelConfig, kind: str) -> int:
    """What a kind of product sums over."""
    return {"out_proj": config.q_dim, "down": config.hidden_dim}.get(kind, config.dim)


def tilings(config: ModelConfig, blockings: Mapping[str, Blocking]) -> dict[str, Tiling]:
    """The tiles as the plan counts them."""
    found = {}
    for kind, b in blockings.items():
        columns = b.columns
        if kind == "qkv" and config.qk_norm:
            columns = config.head_dim
        elif kind == "attention":
            columns = 1
        elif kind == "gate_up":
            columns = b.columns // 2
        found[kind] = Tiling(b.rows, columns)
    return found


def default(config: ModelConfig, rows: int, itemsize: int) -> dict[str, Blocking]:
    """A blocking of each kind for so many rows, as good as a rule knows: searched for stories15m
    with 256 rows of bfloat16 on an H200 (docs/log.md). x is written in tiles of the same columns
    everywhere: their sums of squares are counted by them."""
    if itemsize == 4:
        small = Blocking(16, 32, 32, 3)
        found = dict.fromkeys(PRODUCTS, small)
        found["attention"] = Blocking(16, 32, loads=2)
    elif rows < 64:
        few = Blocking(16 if rows <= 16 else 32, 32, 64, 4)
        found = dict.fromkeys(PRODUCTS, few)
        found["gate_up"] = Blocking(few.rows, 64, 64, 4)
        found["attention"] = Blocking(16, 64, loads=2)
    else:
        at_once = config.dim <= 384  # registers hold a tile's weights
        found = {
            "qkv": Blocking(32, 128, loads=0) if at_once else Blocking(64, 64, 64, 4),
            "attention": Blocking(16, 128, loads=2),
            "out_proj": Blocking(64, 32, 32, 6, rehearsed=True),
            "gate_up": Blocking(32, 128, loads=0) if at_once else Blocking(64, 128, 64, 4),
            "down": Blocking(64, 32, 128, 4, rehearsed=True),
            "head": Blocking(128, 128, 64, 3),
        }
        if padded(config.head_dim) <= 64 and rows <= 256:
            found["attention"] = Blocking(16, 256, loads=3)
    if config.qk_norm:
        found["qkv"] = Blocking(min(found["qkv"].rows, 64), padded(config.head_dim), 32, 3)
    found["embed"] = Blocking(16, found["down"].columns)
    return found
