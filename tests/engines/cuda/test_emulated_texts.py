"""The kernel of several texts on a CPU, as test_emulated_text.py has that of one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from onelaunch.config import preset
from onelaunch.engines.cuda.decoding import STOP_IDS, grids, sampling
from onelaunch.engines.engine import Sampling
from tests.engines.cuda.test_emulated_text import (
    BFLOAT16,
    FILTERS,
    Emulated,
    check,
    kept,
    penalised,
    pointers,
)
from tests.engines.cuda.test_emulated_text import compiled as compiled
from tests.engines.cuda.test_emulated_text import pytestmark as pytestmark
from tests.engines.suite import SMALL, exact_logits, weights_of

CONFIG = SMALL.with_(
    dim=96, n_heads=4, head_dim=24, n_kv_heads=2, hidden_dim=160, vocab_size=200, max_seq_len=40
)
TILE = {"SLOT_BYTES": 3 << 10, "TILE_UNITS": 3}  # those of `down` come in two tiles
NARROW = TILE | {"SLOTS": 4}
ONE_GROUP, TWO_GROUPS, THREE_GROUPS = grids.Grid(8, 3), grids.Grid(16, 2, 2), grids.Grid(8, 1, 3)


class Several(Emulated):
    def __init__(self, compiled, config, weights, dtype, grid, slots=16, **changed):
        self.groups = grid.groups
        super().__init__(compiled, config, weights, dtype, grid.ctas, grid=grid, **changed)
        c, sequences = config, grid.sequences * grid.groups
        shape = (c.n_layers, slots, c.n_kv_heads, c.max_seq_len, c.head_dim)
        self.keys, self.values = (torch.full(shape, float("nan"), dtype=dtype) for _ in "kv")
        self.slots = slots
        self.stride *= grid.sequences
        self.words = torch.zeros(16 * grid.groups * self.stride, dtype=torch.int64)
        self.written = torch.full((sequences, c.max_seq_len), -1)
        self.ending = torch.zeros(sequences, 2, dtype=torch.int32)
        self.stop = torch.full((sequences, STOP_IDS), -1, dtype=torch.int32)
        self.rows = torch.zeros(sequences, 10, dtype=torch.int32)
        self.sums = torch.zeros(grid.groups, 2, 8, 256 * grid.sequences + 16, dtype=torch.int64)
        self.uniforms = torch.rand(slots, c.max_seq_len)
        self.logits = torch.full((sequences, c.vocab_size), float("nan"))
        self.history = torch.full((slots, c.max_seq_len), -1, dtype=torch.int32)
        self.memory = pointers(
            self.keys, self.values, self.words, self.status, self.written, self.ending, self.stop,
            self.rows, self.sums, self.uniforms, self.history, self.logits,
        )  # fmt: skip

    def write_all(self, rows, seed=0, drawn=()):
        """Rows of slot, token, position and number of tokens. `drawn`: of each how many tokens
        there are, by what it is drawn, and its penalty."""
        self.rows[: len(rows), :4] = torch.tensor(rows, dtype=torch.int32)
        for i, (first, by, penalty) in enumerate(drawn):
            self.rows[i, 4:6] = torch.tensor([first, by.top_k])
            fractions = torch.tensor([by.temperature, by.top_p, by.min_p, penalty])
            self.rows[i, 6:] = fractions.view(torch.int32)
        longest = max(row[3] for row in rows)
        context = self.config.max_seq_len
        numbers = [len(rows), self.slots, context, longest, self.stride, 0, 0, 0, 0]
        self.launch(numbers, longest, seed)
        return [self.result(self.written[i], self.ending[i]) for i in range(len(rows))]


def one(several, slot):
    """What `check` looks at, of one slot."""
    view = object.__new__(Emulated)
    view.config, view.packed = several.config, several.packed
    view.keys, view.values = several.keys[:, slot : slot + 1], several.values[:, slot : slot + 1]
    return view


@pytest.mark.parametrize(
    ("grid", "alone"),
    [
        (ONE_GROUP, 0),
        *(
            pytest.param(grid, alone, marks=pytest.mark.extended)
            for grid in (ONE_GROUP, TWO_GROUPS, THREE_GROUPS, grids.Grid(16, 5))
            for alone in (0, 1)
            if (grid, alone) != (ONE_GROUP, 0)
        ),
    ],
)
def test_each_text_is_the_models_and_the_same_alone(compiled, grid, alone):
    weights = weights_of(CONFIG)
    options = TILE | {"ALONE": alone}
    several = Several(compiled, CONFIG, weights, BFLOAT16, grid, **options)
    rows = [(5, 3, 0, 7), (0, 9, 0, 4), (2, 60, 0, 9)]
    together = several.write_all(rows, 1)
    for (slot, first, _, n), (tokens, logprobs, ending) in zip(rows, together, strict=True):
        assert ending == sampling.FULL
        assert len(tokens) == n
        lone = Several(compiled, CONFIG, weights, BFLOAT16, grid, **options)
        assert lone.write_all([(slot, first, 0, n)], 8) == [(tokens, logprobs, ending)]
        check(one(lone, slot), weights, tokens, logprobs, first)


@pytest.mark.extended
@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float16])
@pytest.mark.parametrize(
    ("grid", "alone"), [(grids.Grid(8, 2), 0), (grids.Grid(8, 2), 1), (TWO_GROUPS, 1)]
)
def test_they_go_on_from_where_they_are(compiled, dtype, grid, alone):
    weights = weights_of(CONFIG)
    options = NARROW | {"ALONE": alone}
    several = Several(compiled, CONFIG, weights, dtype, grid, **options)
    rows = [(i, 11 * i + 1, 0, 12) for i in range(8)]
    whole = several.write_all(rows)
    other = Several(compiled, CONFIG, weights, dtype, grid, **options)
    first = other.write_all([(slot, token, 0, 5) for slot, token, _, _ in rows])
    # in another order, and one of them has left
    order = [6, 0, 3, 1, 7, 2, 5]
    second = other.write_all([(i, first[i][0][-1], 5, 7) for i in order])
    for i, (tokens, logprobs, _) in zip(order, second, strict=True):
        assert [*first[i][0], *tokens] == whole[i][0]
        assert [*first[i][1], *logprobs] == whole[i][1]


@pytest.mark.extended
def test_as_many_as_there_is_room_for(compiled):
    """More than 8 columns, and all of them: of two groups, 32 sequences."""
    weights = weights_of(CONFIG)
    several = Several(compiled, CONFIG, weights, BFLOAT16, TWO_GROUPS, slots=32, **NARROW)
    rows = [(31 - i, 6 * i + 1, 0, 3 + i % 3) for i in range(32)]
    together = several.write_all(rows)
    lone = Several(compiled, CONFIG, weights, BFLOAT16, TWO_GROUPS, slots=32, **NARROW)
    for i in (0, 7, 8, 15, 16, 31):
        assert lone.write_all([rows[i]], i) == [together[i]]
        check(one(lone, 31 - i), weights, *together[i][:2], rows[i][1])


@pytest.mark.extended
@pytest.mark.parametrize("head_dim", [8, 48, 64, 128])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_warps_that_attend_alone(compiled, head_dim, qk_norm):
    """Over a chunk's end, with as many positions as several turns of a warp; chunks grow."""
    config = SMALL.with_(
        dim=64, n_heads=4, head_dim=head_dim, n_kv_heads=2, hidden_dim=64, vocab_size=80,
        max_seq_len=150, qk_norm=qk_norm, n_layers=1,
    )  # fmt: skip
    weights, grid = weights_of(config), grids.Grid(8, 2)
    several = Several(compiled, config, weights, BFLOAT16, grid, ALONE=1, CHUNKS=head_dim // 24 + 1)
    together = several.write_all([(3, 7, 0, 140), (1, 9, 0, 30)], 5)
    for (slot, first), (tokens, logprobs, _) in zip(((3, 7), (1, 9)), together, strict=True):
        check(one(several, slot), weights, tokens, logprobs, first)


@pytest.mark.extended
def test_chunks_that_grow(compiled):
    """One of 128 positions, two of them, then two of 256."""
    config = SMALL.with_(
        dim=64, n_heads=2, head_dim=16, n_kv_heads=1, hidden_dim=64, vocab_size=80, max_seq_len=300,
        n_layers=1,
    )  # fmt: skip
    weights, grid = weights_of(config), grids.Grid(8, 2)
    several = Several(compiled, config, weights, BFLOAT16, grid, CHUNKS=2)
    together = several.write_all([(3, 7, 0, 290), (1, 9, 0, 140)], 5)
    for (slot, first), (tokens, logprobs, _) in zip(((3, 7), (1, 9)), together, strict=True):
        check(one(several, slot), weights, tokens, logprobs, first)


@pytest.mark.extended
def test_what_ends_one_of_them(compiled):
    weights = weights_of(CONFIG)
    several = Several(compiled, CONFIG, weights, BFLOAT16, grids.Grid(8, 2), **TILE)
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


BY = [
    (Sampling(), 1.0),
    (FILTERS["all"], 1.0),
    (FILTERS["top-p"], 1.3),
    (Sampling(), 1.4),
    (FILTERS["cold"], 1.0),
    (FILTERS["min-p"], 0.8),
    (FILTERS["one"], 1.0),
    (Sampling(1.2), 1.0),
    (FILTERS["top-p"], 1.0),
    (FILTERS["all"], 1.2),
]


@pytest.mark.extended
@pytest.mark.parametrize(
    ("grid", "texts"), [(grids.Grid(8, 3), 8), (grids.Grid(8, 2, 2), 10), (grids.Grid(16, 2), 10)]
)
def test_each_is_drawn_by_its_own_filters(compiled, grid, texts):
    """Beside others that are not, and after those that have ended; in two launches as in one; alone
    as among others; and the sums are zero again."""
    weights, options = weights_of(CONFIG), NARROW | {"DRAWS": 1}
    rows = [(i, 5 * i + 1, 0, 14 if i % 3 else 5) for i in range(texts)]

    def several():
        made = Several(compiled, CONFIG, weights, BFLOAT16, grid, **options)
        made.uniforms = torch.rand(made.slots, 40, generator=torch.Generator().manual_seed(3))
        made.memory[9] = made.uniforms.data_ptr()
        made.history[:, 0] = torch.tensor([5 * i + 1 for i in range(made.slots)])
        return made

    whole = several()
    together = whole.write_all(rows, 2, drawn=[(0, *by) for by in BY[:texts]])
    assert not whole.sums.any()
    other = several()
    first = other.write_all([(*row[:3], 4) for row in rows], 5, drawn=[(0, *b) for b in BY[:texts]])
    left = [i for i in range(texts) if rows[i][3] > 4]
    second = other.write_all(
        [(i, first[i][0][-1], 4, rows[i][3] - 4) for i in left],
        6,
        drawn=[(4, *BY[i]) for i in left],
    )
    for i, (tokens, logprobs, ending) in zip(left, second, strict=True):
        assert together[i] == ([*first[i][0], *tokens], [*first[i][1], *logprobs], ending)
    for i in (0, 1, 2, 5):
        assert several().write_all([rows[i]], drawn=[(0, *BY[i])]) == [together[i]]
    differ = 0
    for i, (tokens, logprobs, ending) in enumerate(together):
        assert ending == sampling.FULL
        assert len(tokens) == rows[i][3]
        ids = torch.tensor([[rows[i][1], *tokens[:-1]]])
        logits = exact_logits(CONFIG, weights, ids)[0]
        exact = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert (torch.tensor(logprobs).double() - exact).norm() < 0.1 * len(tokens) ** 0.5
        differ += tokens != together[0][0][: len(tokens)]
    assert differ >= texts - 2


@pytest.mark.extended
def test_what_several_draw_is_what_one_draws(compiled):
    """By the same logits: the distribution of each token is the filters'."""
    config = CONFIG.with_(n_layers=1)
    weights = weights_of(config)
    weights = {name: w.bfloat16().float() for name, w in weights.items()}
    several = Several(compiled, config, weights, BFLOAT16, grids.Grid(8, 3), **NARROW, DRAWS=1)
    rows = [(i, 7 * i + 2, 0, 1) for i in range(8)]
    drawn = [(0, *by) for by in BY[:8]]
    for i in range(8):
        several.history[i, 0] = 7 * i + 2
    for turn in range(6):
        several.uniforms[:, 0] = torch.rand(several.slots)
        for i, (tokens, _, _) in enumerate(several.write_all(rows, turn, drawn=drawn)):
            logits = exact_logits(config, weights, torch.tensor([[7 * i + 2]]))[0]
            by, penalty = BY[i]
            if by.greedy or by.temperature > 0.1:
                close_to_drawn(logits, [7 * i + 2], tokens[0], several.uniforms[i, 0], by, penalty)


def close_to_drawn(logits_1V, ids, token, uniform, by, penalty):
    """As `check_drawn`, with the error of bfloat16."""
    logits = penalised(logits_1V[0], ids, penalty)
    if by.greedy:
        assert logits[token] >= logits.max() - 0.05
        return
    probabilities = kept(logits, by)
    up_to = probabilities.cumsum(0)
    assert up_to[token] - probabilities[token] - 0.03 <= uniform <= up_to[token] + 0.03


@pytest.mark.extended
@pytest.mark.parametrize("context", [1, 130])
@pytest.mark.parametrize("grid", [grids.Grid(1, 3), grids.Grid(1, 1), grids.Grid(8, 2, 2)])
def test_hidden_numbers_are_padded(compiled, grid, context):
    """Over a chunk's end; a sequence that is alone in its group, and several."""
    config = preset("stories260k").with_(n_layers=2, vocab_size=90, max_seq_len=150)
    weights = weights_of(config)
    assert config.hidden_dim % 32
    several = Several(compiled, config, weights, BFLOAT16, grid)
    rows = [(3, 7, 0, context + 3), (1, 9, 0, 5), (0, 11, 0, 4)][: grid.sequences]
    together = several.write_all(rows, 5)
    for (slot, first, _, n), (tokens, logprobs, _) in zip(rows, together, strict=True):
        assert len(tokens) == n
        check(one(several, slot), weights, tokens, logprobs, first)
    # again, with the words of other launches there
    assert several.write_all(rows, 6) == together
