"""The stages through Triton's interpreter, on CPU tensors: float32 and float16. Run by
test_interpreter.py in a process of its own."""

from __future__ import annotations

import os
import random
import sys
from dataclasses import replace

assert "triton" not in sys.modules, "too late: Triton was imported before this"
os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

from onelaunch.engines.cuda import kernels, sync  # noqa: E402
from onelaunch.engines.cuda.blocking import (  # noqa: E402
    KINDS,
    Blocking,
    blocks,
    default,
    default_fused,
    padded,
    tilings,
)
from onelaunch.engines.cuda.pack import pack  # noqa: E402
from onelaunch.engines.cuda.program import (  # noqa: E402
    BoundForward,
    FusedForward,
    Shape,
)
from onelaunch.engines.cuda.stages import STAGES, TILES, common  # noqa: E402
from onelaunch.engines.cuda.trace import timeline_of, trace  # noqa: E402
from onelaunch.errors import BadInput, EngineTimeout, RunFailed  # noqa: E402
from onelaunch.model import Model  # noqa: E402
from onelaunch.plan import (  # noqa: E402
    Launch,
    TilePlan,
    check_tiles,
    launches,
    make_plan,
    make_tiles,
    part_of,
)
from onelaunch.plan.tiles import Wait  # noqa: E402
from tests.engines.cuda.staged_forward import StagedForward  # noqa: E402
from tests.engines.suite import (  # noqa: E402
    SHAPES,
    SMALL,
    exact_logits,
    layers_alone,
    relative_error,
    weights_of,
)
from tests.interpreting import mend_loop_bounds  # noqa: E402

CPU = torch.device("cpu")
MORE = {
    "no power of two": SMALL.with_(dim=40, n_heads=5, n_kv_heads=5, hidden_dim=44, vocab_size=67),
    "heads of 6": SMALL.with_(head_dim=6, n_kv_heads=2),
    "norms of heads of 24": SMALL.with_(head_dim=24, n_kv_heads=2, qk_norm=True),
}


mend_loop_bounds()


@pytest.fixture(autouse=True)
def _memory_is_poisoned():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def tokens_of(config, batch, sequence):
    generator = torch.Generator().manual_seed(batch * 100 + sequence)
    return torch.randint(config.vocab_size, (batch, sequence), generator=generator)


@pytest.mark.parametrize("config", [*SHAPES.values(), *MORE.values()], ids=[*SHAPES, *MORE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_logits_are_the_models(config, dtype):
    weights, tokens = weights_of(config), tokens_of(config, 2, 19)
    got = StagedForward(config, weights, dtype, CPU).logits(tokens)
    exact = exact_logits(config, weights, tokens)
    own = Model.from_weights(config, {name: w.to(dtype) for name, w in weights.items()})
    with torch.no_grad():
        plain = torch.nn.functional.linear(own.hidden(tokens), own.head_weight())
    error, allowed = relative_error(got, exact), 1.5 * relative_error(plain, exact)
    assert got.dtype == torch.float32
    assert error <= allowed, f"{error:.2e} where {allowed:.2e} is allowed"


@pytest.mark.parametrize(("batch", "sequence"), [(1, 1), (3, 16), (1, 17), (2, SMALL.max_seq_len)])
def test_lengths_at_both_sides_of_a_tile(batch, sequence):
    weights, tokens = weights_of(SMALL), tokens_of(SMALL, batch, sequence)
    forward = StagedForward(SMALL, weights, torch.float32, CPU)
    every = forward.logits(tokens)
    assert relative_error(every, exact_logits(SMALL, weights, tokens)) < 1e-5
    assert torch.equal(forward.logits(tokens, all_positions=False), every[:, -1:])
    for text in range(batch):
        assert torch.equal(forward.logits(tokens[text : text + 1])[0, 0], every[text, 0])


@pytest.mark.parametrize("form", ["staged", "all"])
@pytest.mark.parametrize("bad", [-1, SMALL.vocab_size, 1 << 40])
def test_an_id_outside_the_vocabulary_is_told_and_gives_nan(form, bad):
    """From it on, in its own sequence alone."""
    forward = StagedForward(SMALL, weights_of(SMALL), torch.float32, CPU)
    packed, tokens = forward.packed, tokens_of(SMALL, 3, 19)
    expected = forward.logits(tokens)
    assert packed.take_bad_id() is None
    tokens[1, 7] = bad
    if form == "staged":
        got = forward.logits(tokens)
    else:
        fused = FusedForward(SMALL, packed, Shape(3, 19), {}, form)
        fused.buffers.tokens.copy_(tokens.flatten())
        fused.run()
        got = fused.buffers.logits.view(expected.shape)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[2], expected[2])
    assert got[1, 7:].isnan().all()
    assert packed.take_bad_id() == bad
    assert packed.take_bad_id() is None


@pytest.mark.parametrize("form", ["staged", "all", "half"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_callers_ids_and_logits(form, dtype):
    """The same bits as through the buffers, in float32 and in the model's dtype."""
    forward = StagedForward(SMALL, weights_of(SMALL), dtype, CPU)
    tokens = tokens_of(SMALL, 2, 19)
    expected = forward.logits(tokens)
    shape = Shape(2, 19, True, dtype, own_logits=False)
    if form == "staged":
        bound = BoundForward(SMALL, forward.packed, shape, {})
    else:
        bound = FusedForward(SMALL, forward.packed, shape, {}, form)
    ids = torch.cat((torch.tensor([3]), tokens.flatten()))[1:]  # aligned to 8 bytes
    for wanted in (torch.float32, dtype):
        logits = torch.full((38, SMALL.vocab_size), float("nan"), dtype=wanted)
        bound.launch(ids, logits)
        assert torch.equal(logits.view(expected.shape), expected.to(wanted))
    assert bound.buffers.logits.numel() == 0


def test_what_stands_behind_changes_nothing_before():
    weights, tokens = weights_of(SMALL), tokens_of(SMALL, 1, 20)
    forward = StagedForward(SMALL, weights, torch.float32, CPU)
    whole = forward.logits(tokens)
    assert torch.equal(forward.logits(tokens[:, :7]), whole[:, :7])


@pytest.mark.parametrize("depth", ["stage", "all"])
def test_positions_of_ones_own(depth):
    """Every second position of the rotary embedding, as with a table of every second row."""
    sequence = 9
    packed = pack(SMALL, weights_of(SMALL), torch.float32, CPU)
    tokens, shape = tokens_of(SMALL, 2, sequence), Shape(2, sequence, own_positions=True)
    tables = {"cos": packed.cos.clone(), "sin": packed.sin.clone()}
    for table in tables.values():
        table[:sequence] = table[: 2 * sequence : 2].clone()
    expected = BoundForward(SMALL, replace(packed, **tables), Shape(2, sequence), {})
    if depth == "stage":
        got = BoundForward(SMALL, packed, shape, {})
    else:
        got = FusedForward(SMALL, packed, shape, {}, depth)
    results = []
    for step in (1, 2):  # the buffer begins with the usual ones
        assert got.buffers.positions is not None
        got.buffers.positions.copy_(step * torch.arange(sequence).repeat(2))
        for each in (expected, got):
            each.buffers.tokens.copy_(tokens.flatten())
            each.run()
        results.append(torch.equal(got.buffers.logits, expected.buffers.logits))
    assert results == [False, True]


@pytest.mark.parametrize("form", ["staged", "all"])
def test_texts_of_different_length(form):
    """Each text's last logits are those that it has alone."""
    forward = StagedForward(SMALL, weights_of(SMALL), torch.float32, CPU)
    tokens, lengths = tokens_of(SMALL, 3, 19), (5, 19, 1)
    alone = [forward.logits(tokens[i : i + 1, :n], False)[0] for i, n in enumerate(lengths)]
    if form == "staged":
        got = forward.logits(tokens, False, lengths)
    else:
        fused = FusedForward(SMALL, forward.packed, Shape(3, 19, False), {}, form)
        fused.buffers.tokens.copy_(tokens.flatten())
        fused.end_at(lengths)
        fused.run()
        fused.check()
        got = fused.buffers.logits.view(3, 1, -1)
    assert relative_error(got, torch.stack(alone)) < 1e-6
    for wrong in ((5, 19), (5, 20, 1), (5, 19, 0)):
        with pytest.raises(BadInput, match="lengths"):
            forward.logits(tokens, False, wrong)


def test_a_dtype_without_stages_is_refused():
    with pytest.raises(TypeError, match="not torch.float64"):
        StagedForward(SMALL, weights_of(SMALL), torch.float64, CPU)


EARLY = {
    "qkv": Blocking(16, 32, num_stages=0),
    "out_proj": Blocking(32, 16, 16, 2, warmup_pass=True),
    "gate_up": Blocking(16, 64, num_stages=0),
    "down": Blocking(16, 16, num_stages=0, warmup_pass=True),
    "embed": Blocking(32, 16),
}


@pytest.mark.parametrize("config", [*SHAPES.values(), *MORE.values()], ids=[*SHAPES, *MORE])
def test_weights_that_come_early_are_the_same_weights(config):
    if config.qk_norm:
        pytest.skip("its tiles of qkv are heads")
    weights, tokens = weights_of(config), tokens_of(config, 1, 18)
    got = StagedForward(config, weights, torch.float32, CPU, EARLY).logits(tokens)
    assert relative_error(got, exact_logits(config, weights, tokens)) < 1e-5


OTHERWISE = {
    "qkv": Blocking(16, 32, 16, 2, tma=True),
    "attention": Blocking(16, 16, num_stages=2, chunk=16),
    "out_proj": Blocking(16, 16, 16, 2, tma=True, warmup_pass=True),
    "gate_up": Blocking(32, 32, 32, 2, tma=True),
    "down": Blocking(32, 16, 16, 3, tma=True),
    "head": Blocking(16, 32, 16, 2, tma=True, programs=3),
    "embed": Blocking(16, 16),
}


@pytest.mark.parametrize("name", ["plain", "qk-norm-wide-heads", *MORE])
def test_blocks_by_descriptors_and_attention_in_chunks(name):
    """The last chunk to arrive is any: the counters say so, and are as before at the end."""
    config = {**SHAPES, **MORE}[name]
    given = dict(OTHERWISE)
    if config.qk_norm:
        given["qkv"] = Blocking(16, padded(config.head_dim), 16, 2, tma=True)
    weights = weights_of(config)
    forward = StagedForward(config, weights, torch.float32, CPU, given)
    for batch, sequence in ((2, 21), (1, 5)):
        tokens = tokens_of(config, batch, sequence)
        bound = forward.bind(batch, sequence)
        bound.buffers.tokens.copy_(tokens.flatten())
        for _ in range(2):
            bound.buffers.logits.fill_(float("nan"))
            bound.run()
            got = bound.buffers.logits.view(batch, sequence, -1)
            assert relative_error(got, exact_logits(config, weights, tokens)) < 1e-5
        chunks = bound._sources.chunks
        assert chunks is None or not chunks.arrived.any()
        assert torch.equal(forward.logits(tokens, all_positions=False), got[:, -1:])


@pytest.mark.parametrize("every", [True, False])
def test_logits_by_the_library(every):
    weights = weights_of(SMALL)
    given = {"head": Blocking(16, 32, library=True)}
    forward = StagedForward(SMALL, weights, torch.float32, CPU, given)
    tokens = tokens_of(SMALL, 3, 17)
    exact = exact_logits(SMALL, weights, tokens)[:, slice(None) if every else slice(-1, None)]
    assert relative_error(forward.logits(tokens, every), exact) < 1e-5
    assert [call.launches for call in forward.bind(3, 17, every).calls[-2:]] == [1, 2]
    own = forward.bind(3, 17, every, torch.float16)  # the library gives what it multiplies
    assert type(own.calls[-1]) is not type(forward.bind(3, 17, every).calls[-1])


FORMS = {
    "all": (2, 19, True),
    "half": (1, 1, True),
    1: (3, 17, False),
    "stage": (1, 5, True),
}


EVERY = {**SHAPES, **MORE}
# every depth of one configuration, and one of every other: the depths are one kernel
DEPTHS = [("plain", depth) for depth in FORMS]
DEPTHS += [
    (name, list(FORMS)[i % len(FORMS)]) for i, name in enumerate(EVERY) if name != DEPTHS[0][0]
]


@pytest.mark.parametrize(
    ("config", "depth"),
    [pytest.param(EVERY[name], depth, id=f"{name}-{depth}") for name, depth in DEPTHS],
)
def test_a_few_launches_have_the_same_bits_as_one_for_each_stage(config, depth):
    weights = weights_of(config)
    staged = StagedForward(config, weights, torch.float32, CPU)
    for batch, sequence, every in (FORMS[depth],):
        shape = Shape(batch, sequence, every)
        fused = FusedForward(config, staged.packed, shape, {}, depth)
        for seed in range(2):  # the second finds the counters as the first left them
            tokens = tokens_of(config.with_(vocab_size=config.vocab_size - seed), batch, sequence)
            fused.buffers.tokens.copy_(tokens.flatten())
            fused.run()
            fused.check()
            expected = staged.logits(tokens, every)
            assert torch.equal(fused.buffers.logits.view(expected.shape), expected)


@pytest.mark.parametrize("depth", ["stage", 1, 2, "all"])
@pytest.mark.parametrize("part", ["ffn", "attention"])
def test_a_part_of_every_layer_is_what_its_formula_says_at_any_depth(part, depth):
    config = MORE["no power of two"].with_(n_layers=3)
    weights, tokens = weights_of(config), tokens_of(config, 2, 19)
    packed = StagedForward(config, weights, torch.float32, CPU).packed
    shape = Shape(2, 19, part=part)
    staged = BoundForward(config, packed, shape, {})
    fused = FusedForward(config, packed, shape, {}, depth)
    assert len(fused.calls) == len(launches(staged.tiles.plan, depth))
    for forward in (staged, fused, fused):  # twice: counters are as the first left them
        forward.buffers.tokens.copy_(tokens.flatten())
        forward.buffers.x.fill_(float("nan"))
        forward.run()
        forward.check()
        assert forward.buffers.logits.isnan().all()
        assert torch.equal(forward.buffers.x, staged.buffers.x)
    exact = layers_alone(config, weights, tokens, part)
    assert relative_error(staged.buffers.x.view(exact.shape), exact) < 1e-5


@pytest.mark.parametrize("part", ["whole", "ffn", "attention"])
def test_launches_of_one_s_own_may_end_early(part):
    """embed with the first layer, then with two: a forward of a few layers, again and again."""
    config = SMALL.with_(n_layers=3)
    weights, tokens = weights_of(config), tokens_of(config, 1, 20)
    packed = StagedForward(config, weights, torch.float32, CPU).packed
    shape = Shape(1, 20, part=part)
    of_layer = {"whole": 5, "ffn": 2, "attention": 3}[part]
    ends = [1 + of_layer, 1 + 2 * of_layer]
    staged = BoundForward(config, packed, shape, {})
    fused = FusedForward(
        config, packed, shape, {}, [Launch("", 0, ends[0]), Launch("", ends[0], ends[1])]
    )
    staged.buffers.tokens.copy_(tokens.flatten())
    for call in staged.calls[: ends[1]]:
        call()
    for _ in range(2):
        fused.buffers.tokens.copy_(tokens.flatten())
        fused.run()
        fused.check()
        assert torch.equal(fused.buffers.x, staged.buffers.x)


def number(value):
    """Of what the interpreter hands about."""
    value = getattr(value, "value", value)  # of a constant
    if hasattr(value, "handle"):
        return int(value.handle.data.reshape(-1)[0])
    return int(value)


@pytest.mark.parametrize("part", ["whole", "ffn", "attention"])
@pytest.mark.parametrize("seed", range(4))
def test_the_kernel_waits_for_what_the_plan_says(seed, part, monkeypatch):
    """The interpreter runs tile after tile, so a wait for too little changes no result there: what
    the kernel waits for is written down, and the plan must be right with it."""
    choose = random.Random(seed)
    seen = []
    monkeypatch.setattr(common, "wait_for", seen.append)
    monkeypatch.setattr(
        kernels,
        "publish",
        lambda counter, tracer, stage, tile_id, mode: seen.append((counter, stage, tile_id)),
    )
    config = SMALL.with_(max_seq_len=60)
    batch, sequence, every = choose.choice([(2, 40, True), (3, 17, False), (5, 9, True)])
    columns = choose.choice([16, 32])
    blockings = {
        kind: Blocking(choose.choice([16, 32, 64]), 32, 32, 2)
        for kind in ("qkv", "gate_up", "attention", "head")
    }
    for kind in ("embed", "out_proj", "down"):
        blockings[kind] = Blocking(choose.choice([16, 32, 64]), columns, 32, 2)
    packed = StagedForward(config, weights_of(config), torch.float32, CPU).packed
    forward = FusedForward(
        config,
        packed,
        Shape(batch, sequence, every, part=part),
        blockings,
        choose.choice(["all", "half", 1]),
    )
    forward.buffers.tokens.zero_()
    epoch = choose.choice([0, 5])
    forward.sync[sync.EPOCH] = epoch
    forward.run()

    tiles, events, waits = forward.tiles, iter(seen), {}

    row_tiles = max(len(phase.spans) for phase in tiles.phases)
    counters = forward.sync.data_ptr() + 4 * sync.COUNTERS
    for index, tile in enumerate(map(tiles.tile, range(tiles.tiles))):
        place = tile.phase, index - tiles.phases[tile.phase].first
        found = ()
        if tile.phase > 0:
            wait = next(events)
            assert (number(wait.stage), number(wait.tile_id)) == place
            first_counter, count, target = map(number, (wait.counter, wait.count, wait.target))
            phase, first = divmod((first_counter - counters) // 4, row_tiles)
            found = (Wait(phase, first, first + count - 1),)
            assert target == (epoch + 1) * tiles.phases[phase].column_tiles
            assert number(wait.report) == sync.GAVE_UP + (phase << sync.ROW_TILE_BITS) + first
        assert waits.setdefault(tile[:2], found) == found
        if tiles.plan.stages[tile.phase].kind != "head":
            at = counters + 4 * (tile.phase * row_tiles + tile.row_tile)
            assert tuple(map(number, next(events))) == (at, *place)
    assert next(events, None) is None
    phases = [
        replace(phase, waits=tuple(waits[i, j] for j in range(len(phase.spans))))
        for i, phase in enumerate(tiles.phases)
    ]
    check_tiles(TilePlan(tiles.plan, tiles.tilings, tuple(phases)))


@pytest.mark.parametrize(("depth", "programs"), [("all", 1), ("half", 1), ("stage", 3)])
def test_each_tile_leaves_its_times_in_its_own_place(depth, programs):
    """The interpreter's clock counts the times that it was asked for."""
    packed = StagedForward(SMALL, weights_of(SMALL), torch.float32, CPU).packed
    plain = FusedForward(SMALL, packed, Shape(2, 20), {}, depth, programs)
    traced = FusedForward(SMALL, packed, Shape(2, 20), {}, depth, programs, traced=True)
    with pytest.raises(BadInput, match="not traced"):
        timeline_of(plain)
    with pytest.raises(RunFailed, match="embed: tile 0 left no times"):
        timeline_of(traced)
    for _ in range(2):
        for forward in (plain, traced):
            forward.buffers.tokens.copy_(tokens_of(SMALL, 2, 20).flatten())
            forward.run()
        assert torch.equal(traced.buffers.logits, plain.buffers.logits)
        timeline = timeline_of(traced)
        spans, tiles = timeline.spans, timeline.tiles
        assert [span.tile for span in spans] == [tiles.tile(i) for i in range(tiles.tiles)]
        times = sorted(time for span in spans for time in (span.began, span.ready, span.ended))
        assert len(set(times)) == 3 * tiles.tiles == times[-1] - times[0] + 1
        for number, launch in enumerate(timeline.launches):
            of = [s for s in spans if launch.first <= s.tile.phase < launch.last]
            assert all(s.launch == number for s in of)
            assert [s.program for s in of] == [i % min(programs, len(of)) for i in range(len(of))]
    assert times[-1] == 6 * tiles.tiles


def test_a_trace_of_a_forward():
    timeline = trace(SMALL, weights_of(SMALL), tokens_of(SMALL, 1, 17), torch.float32, CPU, "half")
    assert len(timeline.spans) == timeline.tiles.tiles
    assert len(timeline.launches) == 2 + 2 * SMALL.n_layers


def test_a_delayed_forward_has_the_same_bits():
    """The interpreter does not sleep."""
    packed = StagedForward(SMALL, weights_of(SMALL), torch.float32, CPU).packed
    forwards = [FusedForward(SMALL, packed, Shape(1, 9), {}, delayed=d) for d in (False, True)]
    for forward in forwards:
        forward.buffers.tokens.copy_(tokens_of(SMALL, 1, 9).flatten())
        forward.run()
        forward.check()
    assert torch.equal(forwards[0].buffers.logits, forwards[1].buffers.logits)


def test_a_forward_that_was_broken_off_lets_no_later_one_pass():
    weights = weights_of(SMALL)
    packed = StagedForward(SMALL, weights, torch.float32, CPU).packed
    forward = FusedForward(SMALL, packed, Shape(2, 20), {}, "stage")
    forward.buffers.tokens.zero_()
    calls = forward.calls

    def broken():
        raise KeyboardInterrupt

    forward.calls = [*calls[:3], broken]
    with pytest.raises(KeyboardInterrupt):
        forward.run()
    forward.calls = [call for i, call in enumerate(calls) if i != 1]
    forward.run()
    with pytest.raises(EngineTimeout, match="layer 0 qkv"):
        forward.check()


def test_more_row_tiles_than_are_counted_are_refused(monkeypatch):
    monkeypatch.setattr(sync, "ROW_TILE_BITS", 3)
    packed = StagedForward(SMALL, weights_of(SMALL), torch.float32, CPU).packed
    FusedForward(SMALL, packed, Shape(7, 16), {})
    with pytest.raises(BadInput, match="8 row tiles"):
        FusedForward(SMALL, packed, Shape(8, 16), {})


def test_attention_does_not_read_what_comes_later():
    """In one launch it may not have been written when a tile begins."""
    bound = StagedForward(SMALL, weights_of(SMALL), torch.float32, CPU).bind(2, 20)
    bound.buffers.tokens.copy_(tokens_of(SMALL, 2, 20).flatten())
    for call in bound.calls[:3]:
        call()
    expected = bound.buffers.attn_out.clone()
    bound.buffers.qkv[0].view(2, 20, -1)[:, 16:] = float("nan")
    bound.buffers.attn_out.fill_(float("nan"))
    bound.calls[2]()
    got = bound.buffers.attn_out.view(2, 20, -1)
    assert torch.equal(got[:, :16], expected.view(2, 20, -1)[:, :16])
    assert got[:, 16:].isnan().all()


@pytest.mark.parametrize("dropped", [0, 1, 3, -2])
def test_a_stage_that_did_not_run_is_noticed(dropped):
    """In the interpreter nothing waits: what is not there at a wait is told of at once."""
    weights = weights_of(SMALL)
    packed = StagedForward(SMALL, weights, torch.float32, CPU).packed
    fused = FusedForward(SMALL, packed, Shape(2, 20), {}, "stage")
    fused.buffers.tokens.zero_()
    missing = fused.tiles.plan.stages[dropped].label
    del fused.calls[dropped]
    fused.run()
    assert fused.buffers.logits.isnan().all()
    with pytest.raises(EngineTimeout, match=f"row tile [0-9]+ of {missing};"):
        fused.check()
    fused.copy_status()
    fused.raise_if_timed_out()


def test_what_gave_up_is_named():
    weights = weights_of(SMALL)
    packed = StagedForward(SMALL, weights, torch.float32, CPU).packed
    forward = FusedForward(SMALL, packed, Shape(2, 24), {})
    forward.check()
    forward.sync[sync.STATUS] = sync.GAVE_UP + (3 << sync.ROW_TILE_BITS) + 2
    with pytest.raises(EngineTimeout, match="row tile 2 of layer 0 out_proj"):
        forward.check()
    assert not forward.sync.any()


def test_the_tiles_are_a_right_plan():
    for config in (*SHAPES.values(), *MORE.values()):
        for itemsize in (2, 4):
            for rule in (default, default_fused):
                cut = tilings(config, rule(config, 63, itemsize))
                for part in ("whole", "ffn", "attention"):
                    check_tiles(make_tiles(part_of(make_plan(config, 3, 21), part), cut))
    assert [padded(n) for n in (1, 16, 17, 48)] == [16, 16, 32, 64]
    early = Blocking(16, 16, num_stages=0)
    assert [blocks(n, early) for n in (288, 768, 64, 40, 8)] == [
        (256, 32), (512, 256), (64, 0), (32, 16), (16, 0),
    ]  # fmt: skip


def test_every_kind_has_its_stage_and_its_tile():
    assert tuple(STAGES) == KINDS
    names = {tile.__name__ for tile in TILES}
    bound = StagedForward(SMALL, weights_of(SMALL), torch.float32, CPU).bind(2, 9)
    assert {STAGES[kind](bound._sources, kind, 0).tile.__name__ for kind in KINDS} <= names
