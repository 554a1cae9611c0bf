"""The stages in Triton, written once: a tile of each as a function. kernels.py has a launch for
each, fused.py one for all.

Shapes: N rows (positions through the batch), D model width, H heads, K kv heads, E head width, F
hidden width, V vocabulary. A tile is known by its number: row tile, then column tile. Sums are
float32; what is stored has the dtype of where it goes. Products of float32 are exact ones (`ieee`),
not TF32. A stage that writes rows of x leaves the sums of squares of what it wrote, one for each
row and column tile, (PARTS, N): that is all that a norm needs of them.

BM, BN, BK: the tile's rows, its columns, and how much of the inner dimension is taken at once.
LOADS blocks are on their way at once; LOADS = 0 means all of the tile's weights in two blocks, of
BK and TAIL, asked for before what the tile waits for is there. What other stages wrote is read past
the first cache (".cg"): in one launch, who wrote it may be another multiprocessor.
"""

from onelaunch.engines.cuda.stages.add_product import add_product_tile
from onelaunch.engines.cuda.stages.attention import attention_tile
from onelaunch.engines.cuda.stages.common import AFTER, COUNTED, COUNTED_PTX, DEPENDENT, REAL
from onelaunch.engines.cuda.stages.embed import embed_tile
from onelaunch.engines.cuda.stages.gate_up import gate_up_tile
from onelaunch.engines.cuda.stages.head import head_tile, normalize_tile
from onelaunch.engines.cuda.stages.qkv import qkv_tile

__all__ = [
    "AFTER",
    "COUNTED",
    "COUNTED_PTX",
    "DEPENDENT",
    "REAL",
    "add_product_tile",
    "attention_tile",
    "embed_tile",
    "gate_up_tile",
    "head_tile",
    "normalize_tile",
    "qkv_tile",
]
