"""The layout of the tables that Python and the compiled training step share.

Every field is an int64 (addresses in bytes; a float32 lies in the low half). Names are offsets in
fields; a table has the length LENGTH. Matrices of activations lie in blocks of tokens, see
`native.training.products`.
"""

from __future__ import annotations

from enum import IntEnum

PANEL_BLOCKS = 16  # of tokens, whose inputs are turned at once for a weight's gradient
MOST_TERMS = 320  # of a sum: longer ones are taken in parts, which are then added
MOST_SCALARS = 12  # that a product takes at once
PANEL_FLOATS = (MOST_TERMS + 1) * 2 * MOST_SCALARS  # a tile's weights, gathered


class Step(IntEnum):
    """One per shape of a batch: the model, where everything is, and what is to be done."""

    # the model
    DIM = 0
    HEADS = 1
    KV_HEADS = 2
    HEAD_DIM = 3
    HIDDEN = 4
    VOCAB = 5
    INTERLEAVED = 6
    QK_NORM = 7
    EPS = 8
    EMBEDDING = 9
    HEAD = 10
    FINAL_NORM = 11
    LAYERS = 12  # table of Layer
    # the batch; sequences are padded to whole blocks
    SEQUENCE_BLOCKS = 13
    BLOCKS = 14
    ITEM_BLOCKS = 15  # that one item of work takes
    TOKENS = 16  # int64 per token
    TARGETS = 17  # int64 per token, -1: does not count
    LOSS_WEIGHTS = 18  # float32 per token: of its loss in the gradient
    COS = 19  # of a sequence's positions, in blocks, head_dim / 2 features
    SIN = 20
    # activations
    X_LAST = 21  # (dim)
    NORMED_LAST = 22  # (dim)
    RSTD_LAST = 23  # float32 per token
    LOGITS = 24  # of HEAD_BLOCKS blocks (vocab), then their gradients
    LARGEST = 25  # per token: the largest logit,
    SUM = 26  # the sum of the exponentials relative to it,
    AT_TARGET = 27  # and the target's logit
    # gradients of activations
    DX = 28  # (dim), of a layer's output
    DX_MID = 29  # (dim), of its middle
    D_ATTN = 30  # (q_dim)
    DELTA = 31  # float32 (heads, tokens)
    ACTIVATION = 32  # (hidden), computed again in the backward
    PARTIAL_LAST = 33  # of the final norm's weight, float32 (blocks, dim padded to vectors)
    # the call
    FRESH = 34  # gradients are written; else added to
    PHASES = 35  # table of Phase
    N_PHASES = 36
    OPERATIONS = 37  # table of Operation
    COUNTERS = 38  # two words for each phase, APART fields apart: items taken, items done
    SCRATCH = 39
    SCRATCH_SIZE = 40
    SLEEP = 41  # f(microseconds)
    STUCK_PHASE = 42
    WITHOUT_GRADIENTS = 43  # the loss alone
    N_LAYERS = 44
    CLOCK = 45  # int64 f(clock, timespec)
    TIMES = 46  # nanoseconds: when the step began, and when each phase ended
    SPENT = 47  # per thread SPENT_FIELDS: nanoseconds on items of each Kind, then of waiting
    LENGTH = 48


APART = 16
SPENT_FIELDS = 16


class Layer(IntEnum):
    """One layer: its weights, what is saved of it for the backward, gradients of activations."""

    INPUT_NORM = 0
    Q = 1
    K = 2
    V = 3
    Q_NORM = 4
    K_NORM = 5
    O_PROJ = 6
    POST_NORM = 7
    GATE = 8
    UP = 9
    DOWN = 10
    X = 11  # (dim), its input
    RSTD = 12  # float32 per token
    RAW = 13  # (q_dim + kv_dim), queries and keys before their norms
    RAW_RSTD = 14  # float32 (heads + kv_heads, tokens)
    QKV = 15  # (q_dim + 2 kv_dim), rotated
    LARGEST = 16  # float32 (heads, tokens): the largest score,
    INVERSE_SUM = 17  # and one over the sum of the exponentials relative to it
    ATTN = 18  # (q_dim)
    X_MID = 19  # (dim)
    RSTD_MID = 20
    GATED = 21  # (hidden), then its gradient
    UPPED = 22  # (hidden), then its gradient
    D_QKV = 23  # (q_dim + 2 kv_dim)
    # of the norms' weights, float32 (blocks, width padded to vectors)
    PARTIAL_INPUT = 24
    PARTIAL_POST = 25
    PARTIAL_Q = 26
    PARTIAL_K = 27
    LENGTH = 28


class Kind(IntEnum):
    """What an operation does with one item."""

    FORWARD_ROWS = 0  # what is done to each token between two attentions; before layer ARG
    FORWARD_ATTENTION = 1  # of a head of a sequence in layer ARG
    LOSS = 2  # head, loss and their backward; of the blocks FIRST_BLOCK on
    BACKWARD_ROWS = 3  # from the attention of layer ARG + 1 to that of layer ARG
    BACKWARD_ATTENTION = 4
    WEIGHT_GRADIENT = 5
    EMBEDDING_GRADIENT = 6
    NORM_GRADIENT = 7
    WAITING = 8  # no operation: for other threads' items


class Operation(IntEnum):
    """COUNT items of one kind."""

    KIND = 0
    COUNT = 1
    ARG = 2
    FIRST_BLOCK = 3
    N_BLOCKS = 4
    # a weight's gradient: the sum over tokens of its output's gradients times its inputs
    INPUT = 5
    INPUTS = 6  # features
    RSTD = 7  # of the input's norm, 0: it has none
    NORM = 8  # that norm's weight
    OUTPUT = 9  # the gradients; the first of OUTPUTS features
    OUTPUTS = 10
    OUTPUT_BLOCK = 11  # bytes from a block of gradients to the next
    ROWS = 12  # outputs that one item takes
    GRADIENT = 13
    ALWAYS_ADDS = 14  # even where gradients are fresh
    LENGTH = 16


class Phase(IntEnum):
    """Operations that need not wait for each other."""

    FIRST = 0
    ITEMS = 1
    LENGTH = 2


class Call(IntEnum):
    """The operations of the compiled program's entry."""

    RUN = 0  # take part in the step at `state`, as thread a
    SHAPE = 1  # floats in a vector
