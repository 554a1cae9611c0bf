"""The kernel of several texts on a CPU, as test_emulated_text.py has that of one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from onelaunch.engines.cuda.decoding import STOP_IDS, sampling, text
from tests.engines.cuda.test_emulated_text import BFLOAT16, Emulated, check, pointers
from tests.engines.cuda.test_emulated_text import compiled as compiled
from tests.engines.cuda.test_emulated_text import pytestmark as pytestmark
from tests.engines.suite import SMALL, weights_of

SEQUENCES = text.SEVERAL
CONFIG = SMALL.with_(
    dim=96, n_heads=4, head_dim=24, n_kv_heads=2, hidden_dim=160, vocab_size=200, max_seq_len=40
)
SLOT_BYTES = 16 * 2 * 96 + 1024  # less than a row of `down`: its columns come in two tiles


class Several(Emulated):
    sequences = SEQUENCES

    def __init__(self, compiled, config, weights, dtype, ctas, **changed):
        super().__init__(compiled, config, weights, dtype, ctas, **changed)
        c = config
        shape = (c.n_layers, SEQUENCES + 1, c.n_kv_heads, c.max_seq_len, c.head_dim)
        self.keys, self.values = (torch.full(shape, float("nan"), dtype=dtype) for _ in "kv")
        self.stride *= SEQUENCES
        self.words = torch.zeros(16 * self.stride, dtype=torch.int64)
        self.written = torch.full((SEQUENCES, c.max_seq_len), -1)
        self.ending = torch.zeros(SEQUENCES, 2, dtype=torch.int32)
        self.stop = torch.full((SEQUENCES, STOP_IDS), -1, dtype=torch.int32)
        self.sequences = torch.zeros(SEQUENCES, 4, dtype=torch.int32)
        self.memory = pointers(
            self.keys, self.values, self.words, self.status, self.written, self.ending, self.stop,
            self.sequences,
        )  # fmt: skip

    def write_all(self, rows, seed=0):
        """Rows of slot, token, position and number of tokens."""
        self.sequences[: len(rows)] = torch.tensor(rows, dtype=torch.int32)
        longest = max(row[3] for row in rows)
        context = self.config.max_seq_len
        numbers = [len(rows), SEQUENCES + 1, context, longest, 1, self.stride, 0, 0, 0, 0]
        self.launch(numbers, longest, seed)
        return [self.result(self.written[i], self.ending[i]) for i in range(len(rows))]


def one(several, slot):
    """What `check` looks at, of one slot."""
    view = object.__new__(Emulated)
    view.config, view.packed = several.config, several.packed
    view.keys, view.values = several.keys[:, slot : slot + 1], several.values[:, slot : slot + 1]
    return view


@pytest.mark.parametrize(
    ("ctas", "seed"),
    [(3, 0), *(pytest.param(ctas, 1, marks=pytest.mark.extended) for ctas in (1, 2, 5))],
)
def test_each_text_is_the_models_and_the_same_alone(compiled, ctas, seed):
    weights = weights_of(CONFIG)
    several = Several(compiled, CONFIG, weights, BFLOAT16, ctas, SLOT_BYTES=SLOT_BYTES)
    rows = [(5, 3, 0, 7), (0, 9, 0, 4), (2, 60, 0, 9)]
    together = several.write_all(rows, seed)
    for (slot, first, _, n), (tokens, logprobs, ending) in zip(rows, together, strict=True):
        assert ending == sampling.FULL
        assert len(tokens) == n
        alone = Several(compiled, CONFIG, weights, BFLOAT16, ctas, SLOT_BYTES=SLOT_BYTES)
        assert alone.write_all([(slot, first, 0, n)], seed + 7) == [(tokens, logprobs, ending)]
        check(one(alone, slot), weights, tokens, logprobs, first)


@pytest.mark.extended
@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float16])
def test_they_go_on_from_where_they_are(compiled, dtype):
    weights = weights_of(CONFIG)
    options = {"SLOT_BYTES": SLOT_BYTES, "SLOTS": 4}
    several = Several(compiled, CONFIG, weights, dtype, 2, **options)
    rows = [(i, 11 * i + 1, 0, 12) for i in range(SEQUENCES)]
    whole = several.write_all(rows)
    other = Several(compiled, CONFIG, weights, dtype, 2, **options)
    first = other.write_all([(slot, token, 0, 5) for slot, token, _, _ in rows])
    # in another order, and one of them has left
    order = [6, 0, 3, 1, 7, 2, 5]
    second = other.write_all([(i, first[i][0][-1], 5, 7) for i in order])
    for i, (tokens, logprobs, _) in zip(order, second, strict=True):
        assert [*first[i][0], *tokens] == whole[i][0]
        assert [*first[i][1], *logprobs] == whole[i][1]


@pytest.mark.extended
def test_what_ends_one_of_them(compiled):
    weights = weights_of(CONFIG)
    several = Several(compiled, CONFIG, weights, BFLOAT16, 2, SLOT_BYTES=SLOT_BYTES)
    rows = [(0, 3, 0, 10), (1, 9, 0, 10)]
    (tokens, _, _), (others, _, _) = whole = several.write_all(rows)
    stop = tokens[6]
    several.stop[0, 3] = stop
    ended, left = several.write_all(rows)
    assert ended[::2] == (tokens[: tokens.index(stop)], sampling.STOPPED)
    assert left == whole[1]
    several.packed.embedding[others[2]] = float("nan")
    several.stop[0, 3] = -1
    again = several.write_all(rows)
    assert again[1][::2] == (others[: others.index(others[2]) + 1], sampling.NOT_FINITE)
    if others[2] not in [3, *tokens]:
        assert again[0] == whole[0]
