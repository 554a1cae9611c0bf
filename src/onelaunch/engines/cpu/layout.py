"""The layout of the tables that Python and the compiled program share.

Every field is an int64 (addresses in bytes; a float32 lies in the low half). Names are offsets in
fields; a table has the length LENGTH.
"""

from __future__ import annotations

from enum import IntEnum

SYMBOL = "onelaunch_entry"  # the program's one function
PAD = 16  # columns of a packed matrix, and of what it multiplies, are a multiple of it
QUERIES = 4  # tokens whose attention is taken at once
DIGITS = 256  # of the radix sort of candidates


class State(IntEnum):
    """One per engine: the model, the call at hand, and where everything is."""

    # the model
    DIM = 0
    HEADS = 1
    KV_HEADS = 2
    HEAD_DIM = 3
    HIDDEN = 4
    VOCAB = 5
    INTERLEAVED = 6
    QK_NORM = 7
    NARROW = 8  # weights are bfloat16
    EPS = 9
    # packed weights
    EMBEDDING = 10
    HEAD = 11
    FINAL_NORM = 12
    LAYERS = 13  # table of Layer
    COS = 14  # (positions, head_dim / 2)
    SIN = 15
    # the plan: pairs (kind, layer)
    STAGES = 16
    # the tokens of this forward
    N_TOKENS = 17
    TOKENS = 18  # table of Token
    N_GROUPS = 19
    GROUPS = 20  # table of Group
    N_ROWS = 21  # requested rows of logits
    SEQUENCES = 22  # table of Seq
    N_SEQUENCES = 23
    MAX_TOKENS = 24
    # buffers
    X = 25
    NORMED = 26
    QUERY = 27
    ATTN_OUT = 28
    ACTIVATION = 29
    LOGITS = 30
    LOGITS_ROW = 31  # bytes from a row of logits to the next
    SCRATCH = 32  # one for each thread
    SCRATCH_SIZE = 33
    CANDIDATES = 40  # (sequences, vocab) float32 and int32
    # the call
    FIRST_STAGE = 41
    LAST_STAGE = 42
    ALL_STAGES = 43
    NEWS = 44  # a sequence has its first token, or has ended: the call returns
    SLICE = 45  # nanoseconds after which the call returns
    CLOCK = 46  # int64 f(clock, timespec)
    SLEEP = 47  # f(microseconds)
    THREADS = 48  # at most so many work at once
    ADAPT = 49  # choose among 1 .. THREADS while running
    SYNC = 50  # Sync
    GOVERNOR = 51  # Governor
    STATUS_AT = 53
    SPIN = 54  # pauses before a waiting thread sleeps
    OUT_ROW = 55  # bytes between two tokens' results of one item
    MAX_ROWS = 56  # rows of an item, at most
    STAMP = 57
    STARTED = 58  # a timespec, two fields
    STARTED_NANOSECONDS = 59
    # how a product of one token prefetches its weights: where to (see PrefetchTo), and how many
    # bytes ahead of its reading
    PREFETCH_TO = 60
    PREFETCH_AHEAD = 61
    # what `run` puts there for one thread, and for several
    ONE_PREFETCH_TO = 62
    ONE_PREFETCH_AHEAD = 63
    SEVERAL_PREFETCH_TO = 64
    SEVERAL_PREFETCH_AHEAD = 65
    LENGTH = 72


class Layer(IntEnum):
    """Addresses of one layer's packed weights."""

    INPUT_NORM = 0
    QKV = 1
    Q_NORM = 2
    K_NORM = 3
    O_PROJ = 4
    POST_NORM = 5
    GATE_UP = 6
    DOWN = 7
    QKV_BIAS = 8
    LENGTH = 9


class Token(IntEnum):
    """One token of a forward."""

    ID = 0
    SEQUENCE = 1
    POSITION = 2
    LOGITS = 3  # row of logits, -1: none
    LENGTH = 4


class Group(IntEnum):
    """Neighbouring tokens of one sequence, attended together."""

    FIRST = 0
    COUNT = 1
    LENGTH = 2


class Seq(IntEnum):
    """One sequence that grows."""

    IDS = 0  # int32, prompt and new
    SIZE = 1  # how many there are
    READ = 2  # how many of them are in the cache
    LIMIT = 3  # the size at which it ends
    PROMPT = 4  # the size it began with
    CACHE = 5
    BLOCKS = 6  # the cache's capacity, in blocks of LANES positions
    UNIFORMS = 7  # float32, one for each new token
    NEXT = 8  # what was drawn
    END = 9  # an End
    ROW = 10  # its row of logits in this forward, -1: none
    # sampling; floats are float32
    TEMPERATURE = 11
    TOP_K = 12
    TOP_P = 13
    MIN_P = 14
    STOPS = 15  # int64
    N_STOPS = 16
    LOGPROBS = 17  # for each new token its logit and the sum of all exponentials, both relative to
    # the largest logit, in float32; 0: not wanted
    PENALTY = 18  # of repetition, for tokens among IDS
    ADJUSTED = 19  # room for the float32 logits that are chosen from, and an int32 for each; 0: the
    # logits are not changed
    FREQUENCY = 20  # penalties of tokens among the new IDS
    PRESENCE = 21
    BIASES = 22  # pairs: a token, and what is added to its logit
    N_BIASES = 23
    TOPS = 24  # for each new token N_TOPS pairs, the largest first: an int32 id, and its logit
    # relative to the largest, in float32
    N_TOPS = 25  # 0: not wanted
    LENGTH = 32


class End(IntEnum):
    """Why a sequence has ended, if it has."""

    NONE = 0
    STOP = 1
    LIMIT = 2
    NOT_FINITE = 3


class Product(IntEnum):
    """Products of one vector with matrices of one shape that follow each other in memory: what
    prefetching is measured with."""

    WEIGHTS = 0
    ROWS = 1
    COLUMNS = 2
    X = 3
    OUT = 4
    LENGTH = 8


class Sync(IntEnum):
    """Words that threads share, each in a cache line of its own (offsets in fields)."""

    FINISHED = 0  # items done in this call
    EPOCH = 16  # number of the call
    ACTIVE = 32  # threads that work, the caller's included
    CLOSING = 48
    BUSY = 64  # a call of many forwards is under way: helpers stay
    TICKETS = 80  # one for each thread
    APART = 16


class Governor(IntEnum):
    """The search for the number of threads: the time of each number, and the state of the search.

    Numbers tried are 1, 2, 4 ... and THREADS itself, by index; times are float64 nanoseconds."""

    INDEX = 0  # in use
    LAST = 1  # the largest index
    TRYING = 2  # index being tried, -1: none
    SAMPLES = 3
    SUM = 4
    SINCE = 5  # forwards since the last search
    PERIOD = 6  # forwards between searches
    FIRST = 7  # the range of indices this search tries
    FINAL = 8
    BEFORE = 9  # index in use before this search
    SLOWEST = 10  # of the samples so far
    TIMES = 16  # one for each index
    LENGTH = 48


class Status(IntEnum):
    """The status that a call returns."""

    OK = 0
    TIMEOUT = 2


class PrefetchTo(IntEnum):
    """The cache that weights are prefetched to."""

    NONE = 0
    L2 = 1
    ONCE = 2  # to be read once: into L1, past the other caches where the processor can


class Operation(IntEnum):
    """The operations of `entry`."""

    RUN = 0  # stages a .. b of the forward at hand
    ADVANCE = 1  # take the drawn tokens, lay out the next forward; how many tokens it has
    GENERATE = (
        2  # advance and run until every sequence has ended, there is NEWS, or a slice is over
    )
    HELP = 3  # a helper thread's work, thread a, for at most b microseconds without any
    SAMPLE = 4  # draw sequence a's next token from its logits
    RESET = 5  # forget how many threads are best
    READ = 6  # add up the floats of b bytes at address `state`: what reading alone takes
    SHAPE = 7  # how many floats a vector holds (a = 0), how many rows a tile (a = 1)
    PRODUCT = 8  # b products that the Product table at a describes
