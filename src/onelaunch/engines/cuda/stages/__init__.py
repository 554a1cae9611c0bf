"""The stages in Triton, written once: of each kind its tile, its operands, and what binds them.
kernels.py runs them, one stage a launch or many.

Shapes: N rows (positions through the batch), D model width, H heads, K kv heads, E head width, F
hidden width, V vocabulary. A tile is known by its number: row tile, then column tile. Sums are
float32; what is stored has the dtype of where it goes. Products of float32 are exact ones (`ieee`),
not TF32. A stage that writes rows of x leaves the sums of squares of what it wrote, one for each
row and column tile: that is all that a norm needs of them.

BM, BN, BK: the tile's rows, its columns, and how much of the inner dimension is taken at once.
NUM_STAGES blocks are on their way at once; 0 means all of the tile's weights in two blocks, of BK
and TAIL, loaded before what the tile waits for is there. What other stages wrote is read past the
L1 (".cg"): in one launch, who wrote it may be another multiprocessor.

To add a kind: its row in plan/kinds.py, with what the plan needs; a file here, and its lines
in STAGES and TILES; its tensors in binding.py; its blockings in ../blocking.py, and those to be
tried in ../tuning/space.py. Which rows a stage has is one of three ways (common.py, and
../kernels.py for waits). What a forward knows of its first and last stage is in ../program.py
(`_call`, `last_call`, `_stages`) and ../replay.py.
"""

from __future__ import annotations

from collections.abc import Callable

from onelaunch.engines.cuda.stages import add_product, attention, embed, gate_up, head, qkv
from onelaunch.engines.cuda.stages.binding import Bound, Sources

Bind = Callable[[Sources, str, int | None], Bound]
"""Binds a kind of stage in one layer, or in all where a kernel counts them (None)."""

STAGES: dict[str, Bind] = {
    "embed": embed.bind,
    "qkv": qkv.bind,
    "attention": attention.bind,
    "out_proj": add_product.bind,
    "gate_up": gate_up.bind,
    "down": add_product.bind,
    "head": head.bind,
}
TILES = (
    embed.embed_tile, qkv.qkv_tile, attention.attention_tile, add_product.add_product_tile,
    gate_up.gate_up_tile, head.head_tile, head.normalize_tile,
)  # fmt: skip
"""Every tile, for what must know all code that a kernel may run."""

__all__ = ["STAGES", "TILES", "Bind"]
