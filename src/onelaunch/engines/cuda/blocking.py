"""The tiles of each kind of stage, and how a tile goes through its inner dimension."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from onelaunch.config import ModelConfig
from onelaunch.errors import BadInput
from onelaunch.plan import STAGE_KINDS, Tiling

KINDS = tuple(name for name in STAGE_KINDS if name != "sample")
"""The kinds of stage that the CUDA engine runs."""
PRODUCTS = tuple(name for name, kind in STAGE_KINDS.items() if kind.inner is not None)


@dataclass(frozen=True)
class Blocking:
    """A tile of `rows` by `columns`; of gate_up, rows of its weight, two to a column of what it
    writes; of attention, keys at once. `block_k` is how much of the inner dimension is taken at
    once, `num_stages` how many such blocks are on their way; with `num_stages` 0 all of it is, and
    the loads of the weights are issued before the tile's turn. `warps` run a tile.

    Where a stage is a launch of its own: with a `warmup_pass` a tile is computed once before its
    turn, and nothing of it stored; with `tma` blocks are fetched by the tensor memory accelerator,
    if the device has one and the extents allow it; a `chunk`, a multiple of `rows` and of
    `columns`, is how many keys a program of attention looks at, 0 all of them; so many `programs` a
    multiprocessor go through all of head's tiles, the next one's blocks on their way while a tile
    ends, 0: a program a tile; and with `library` head is the product of the library that PyTorch
    has, of rows normalized before."""

    rows: int
    columns: int
    block_k: int = 64
    num_stages: int = 3
    warps: int = 4
    warmup_pass: bool = False
    tma: bool = False
    chunk: int = 0
    programs: int = 0
    library: bool = False


LIBRARY_HEAD = Blocking(128, 128, library=True)
"""cuBLAS's product: with more than a few hundred rows or a width of 576 on 2 to 6% less for a whole
forward than the fastest of our own (docs/log.md)."""


@dataclass(frozen=True)
class Limits:
    """Limits of a device: its multiprocessors, the bytes of shared memory that a program can have,
    and whether it has a tensor memory accelerator; by default those of an H200."""

    multiprocessors: int = 132
    shared_bytes: int = 232_448
    tma: bool = True

    @property
    def room(self) -> int:
        """Bytes for the blocks themselves: sums over the warps of a program take a few."""
        return self.shared_bytes - 3072


H200 = Limits()


def blocks(inner: int, blocking: Blocking) -> tuple[int, int]:
    """The constants BK and TAIL of a product over `inner`: powers of two from 16 on."""
    if blocking.num_stages:
        return blocking.block_k, 0
    whole = 1 << (inner.bit_length() - 1)
    rest = inner - whole
    return max(16, whole), padded(rest) if rest else 0


def padded(n: int, least: int = 16) -> int:
    """The power of two from `least` on, the narrowest product, that holds n."""
    return max(least, 1 << (n - 1).bit_length())


def inner_of(config: ModelConfig, kind: str) -> int:
    """The inner dimension of a kind of product."""
    inner = STAGE_KINDS[kind].inner
    if inner is None:
        raise ValueError(f"{kind} is no product")
    return inner(config)


def shared_bytes(config: ModelConfig, kind: str, blocking: Blocking, itemsize: int) -> int:
    """The bytes of shared memory that the blocks of a tile take, about; embed's none."""
    b = blocking
    if kind == "embed":
        return 0
    if kind == "attention":
        return (b.rows + 2 * b.columns * b.num_stages) * padded(config.head_dim) * itemsize
    inner = b.block_k * b.num_stages or sum(blocks(inner_of(config, kind), b))
    way_out = b.rows * b.columns // 2 if b.programs else 0
    return ((b.rows + b.columns) * inner + way_out) * itemsize


def tilings(config: ModelConfig, blockings: Mapping[str, Blocking]) -> dict[str, Tiling]:
    """The tiles as the plan counts them."""
    tiles = {}
    for kind, b in blockings.items():
        columns = b.columns
        if kind == "qkv" and config.qk_norm:
            columns = config.head_dim
        elif kind == "attention":
            columns = 1
        elif kind == "gate_up":
            columns = b.columns // 2
        tiles[kind] = Tiling(b.rows, columns)
    return tiles


def default(
    config: ModelConfig, rows: int, itemsize: int, limits: Limits = H200
) -> dict[str, Blocking]:
    """A blocking of each kind for so many rows where each stage is a launch, as good as a rule
    knows: searched for models of 15 to 600 million parameters with 256 and 1,024 rows of bfloat16
    on an H200 (docs/log.md). x is written in tiles of the same columns everywhere: their sums of
    squares are counted by them."""
    if itemsize == 4:
        blockings = _exact()
    elif rows < 64:
        blockings = _few_rows(rows)
    elif rows < 512:
        blockings = _some_rows(config, rows)
    else:
        blockings = _many_rows(config)
    return _completed(config, blockings, itemsize, limits)


def default_fused(
    config: ModelConfig, rows: int, itemsize: int, limits: Limits = H200
) -> dict[str, Blocking]:
    """The same where one launch runs many stages: all of them with the same few warps, on all of
    the registers that the largest of their tiles needs."""
    if itemsize == 4:
        return _completed(config, _exact(), itemsize, limits)
    if rows < 64:
        return _completed(config, _few_rows(rows), itemsize, limits)
    small = config.dim <= 384
    blockings = {
        "qkv": Blocking(64, 32, num_stages=0) if small else Blocking(64, 64, 64, 4),
        "attention": Blocking(16, 128, num_stages=2)
        if rows <= 256
        else Blocking(64, 64, num_stages=2),
        "out_proj": Blocking(64, 32, 32, 5) if small else Blocking(64, 64, 64, 4),
        "gate_up": Blocking(64, 64, num_stages=0) if small else Blocking(64, 128, 64, 4),
        "down": Blocking(64, 32, 128, 3) if small else Blocking(64, 64, 64, 4),
        "head": Blocking(128, 128, 64, 3),
    }
    if config.qk_norm and padded(config.head_dim) > 64:
        # of 64 rows registers do not hold a tile with its norms, and ptxas takes 1.7 s longer
        blockings["qkv"] = replace(blockings["qkv"], rows=32)
    return _completed(config, blockings, itemsize, limits)


def at_once(
    config: ModelConfig,
    rows: int,
    blockings: Mapping[str, Blocking],
    itemsize: int,
    limits: Limits = H200,
) -> int:
    """How many programs one launch of many stages has at once: two a multiprocessor from 512 rows
    on, where its shared memory holds both, and otherwise one. One multiprocessor is no GPU, and has
    one: its programs run one after another."""
    if limits.multiprocessors == 1:
        return 1
    largest = max(shared_bytes(config, kind, b, itemsize) for kind, b in blockings.items())
    both_fit = 2 * (largest + limits.shared_bytes - limits.room) <= limits.shared_bytes
    return limits.multiprocessors * (2 if rows >= 512 and both_fit else 1)


def _completed(
    config: ModelConfig, blockings: dict[str, Blocking], itemsize: int, limits: Limits
) -> dict[str, Blocking]:
    """The blockings adapted to the model, and reduced to the device's limits."""
    if config.qk_norm:  # a tile is a head
        qkv = blockings["qkv"]
        columns = padded(config.head_dim)
        blockings["qkv"] = replace(
            qkv, rows=min(qkv.rows, 64), columns=columns, num_stages=qkv.num_stages or 3
        )
    blockings["embed"] = Blocking(16, blockings["down"].columns)
    return {kind: _fitted(config, kind, b, itemsize, limits) for kind, b in blockings.items()}


def _fitted(
    config: ModelConfig, kind: str, blocking: Blocking, itemsize: int, limits: Limits
) -> Blocking:
    """The same tile with fewer blocks on their way, or fewer rows, where the device has less shared
    memory."""
    b = blocking
    while shared_bytes(config, kind, b, itemsize) > limits.room:
        if not b.num_stages:
            b = replace(b, num_stages=3)
        elif b.num_stages > 2:
            b = replace(b, num_stages=b.num_stages - 1)
        elif b.programs:
            b = replace(b, programs=0)
        elif kind == "attention" and b.columns > 16:
            b = replace(b, columns=b.columns // 2)
        elif kind != "attention" and b.block_k > 16:
            b = replace(b, block_k=b.block_k // 2)
        elif b.rows > 16:
            b = replace(b, rows=b.rows // 2)
        else:
            raise BadInput(f"{kind}: {limits.shared_bytes} bytes of shared memory hold no tile")
    return b


def _exact() -> dict[str, Blocking]:
    """Blockings of float32, whose products are exact ones and slow."""
    blockings = dict.fromkeys(PRODUCTS, Blocking(16, 32, 32, 3))
    return blockings | {"attention": Blocking(16, 32, num_stages=2)}


def _few_rows(rows: int) -> dict[str, Blocking]:
    few = Blocking(16 if rows <= 16 else 32, 32, 64, 4)
    blockings = dict.fromkeys(PRODUCTS, few)
    blockings["gate_up"] = Blocking(few.rows, 64, 64, 4)
    return blockings | {"attention": Blocking(16, 64, num_stages=2)}


def _some_rows(config: ModelConfig, rows: int) -> dict[str, Blocking]:
    """64 to 511 of them: tiles so small that every multiprocessor has one."""
    if config.dim <= 384:  # registers hold a tile's weights
        blockings = {
            "qkv": Blocking(32, 128, num_stages=0),
            "out_proj": Blocking(64, 32, 32, 6, warmup_pass=True),
            "gate_up": Blocking(32, 128, num_stages=0),
            "down": Blocking(64, 32, 128, 4, warmup_pass=True),
            "head": Blocking(128, 256, 32, 4, 8, tma=True, programs=1),
        }
    elif config.dim < 768:
        blockings = {
            "qkv": Blocking(64, 64, num_stages=0),
            "out_proj": Blocking(64, 32, 64, 4),
            "gate_up": Blocking(128, 64, 64, 6, tma=True),
            "down": Blocking(64, 32, 128, 5, tma=True),
            "head": LIBRARY_HEAD,
        }
    else:
        deep = config.q_dim > 1024
        blockings = {
            "qkv": Blocking(128, 64, 64, 6, tma=True),
            "out_proj": Blocking(64, 32, 128, 5, tma=True)
            if deep
            else Blocking(64, 64, 128, 3, warmup_pass=True, tma=True),
            "gate_up": Blocking(128, 128, 64, 6, 8, tma=True)
            if 2 * config.hidden_dim > 4096  # or two tiles for a multiprocessor
            else Blocking(128, 64, 64, 6, tma=True),
            "down": Blocking(64, 32 if deep else 64, 128, 5, tma=True),
            "head": LIBRARY_HEAD,
        }
    heads = rows * config.n_heads
    if padded(config.head_dim) > 64:
        blockings["attention"] = Blocking(32, 128, num_stages=3)
    elif rows > 256:
        blockings["attention"] = Blocking(16, 128, num_stages=2)
    elif heads <= 2048:
        blockings["attention"] = Blocking(16, 256, num_stages=3)
    elif heads <= 2560:
        blockings["attention"] = Blocking(32, 128, num_stages=2)
    else:  # two tiles for a multiprocessor
        blockings["attention"] = Blocking(16, 256, num_stages=1)
    return blockings


def _many_rows(config: ModelConfig) -> dict[str, Blocking]:
    if config.dim <= 384:
        return {
            "qkv": Blocking(64, 64, 64, 4, tma=True),
            "attention": Blocking(64, 128, num_stages=2, chunk=256),
            "out_proj": Blocking(128, 32, 64, 4, tma=True),
            "gate_up": Blocking(128, 128, 64, 4, 8, tma=True),
            "down": Blocking(64, 32, 128, 4, tma=True),
            "head": LIBRARY_HEAD,
        }
    return {
        "qkv": Blocking(64, 128, 64, 4, tma=True),
        "attention": Blocking(
            64, 128 if padded(config.head_dim) <= 64 else 64, num_stages=2, chunk=512
        ),
        "out_proj": Blocking(64, 128, 64, 6, tma=True),
        "gate_up": Blocking(128, 128, 64, 3, tma=True),
        "down": Blocking(64, 128, 64, 6, tma=True),
        "head": LIBRARY_HEAD,
    }
