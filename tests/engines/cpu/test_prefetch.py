"""How weights are prefetched: the choice from made-up times, what is kept of it, and the bits."""

from __future__ import annotations

import ctypes
import json
import random

import pytest
import torch

from onelaunch import cli
from onelaunch.compilation.cache import Store
from onelaunch.config import ModelConfig
from onelaunch.engines.cpu import prefetch, prefetch_choice
from onelaunch.engines.cpu.layout import Operation, PrefetchTo, Product, State
from onelaunch.engines.cpu.pack import PackedWeights
from onelaunch.engines.cpu.prefetch import CANDIDATES, NONE, Measured, Prefetch, Slices, choose
from onelaunch.engines.cpu.program import Program
from onelaunch.errors import BadInput
from tests.engines.cpu.making import grow, logits_of, make_engine, make_runtime, sequence_of
from tests.engines.suite import SMALL, weights_of

L2, L2_FAR, ONCE = CANDIDATES[1:]
SLOW = {each: 1.0 + 0.1 * i for i, each in enumerate(CANDIDATES)}


class Machine:
    """Samples that take made-up times, on a clock that goes on by them. `disturbed` are the numbers
    of samples that take a hundred times as long."""

    def __init__(self, times, disturbed=(), noise=0.0, seed=0):
        self.times, self.disturbed, self.noise = times, set(disturbed), noise
        self.random = random.Random(seed)
        self.now, self.taken = 0.0, []

    def sample(self, each: Prefetch) -> float:
        took = 1e-4 * self.times[each] * (1 + self.noise * self.random.uniform(-1, 1))
        if len(self.taken) in self.disturbed:
            took *= 100
        self.taken.append(each)
        self.now += took
        return took

    def clock(self) -> float:
        return self.now

    def choose(self, seconds=0.12) -> Measured | None:
        return choose([self.sample], seconds, self.clock)


@pytest.mark.parametrize("best", CANDIDATES, ids=str)
def test_the_choice_follows_the_measurement(best):
    machine = Machine(SLOW | {best: 0.8})
    found = machine.choose()
    assert found.prefetch == best
    assert found.gain == pytest.approx(1.0 if best == NONE else 1 / 0.8)
    assert set(machine.taken) == set(CANDIDATES)
    assert machine.now <= 0.125


@pytest.mark.parametrize("best", CANDIDATES, ids=str)
def test_a_disturbed_sample_changes_no_choice(best):
    for disturbed in range(60):
        found = Machine(SLOW | {best: 0.8}, {disturbed}).choose()
        assert found.prefetch == best, disturbed


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("best", CANDIDATES, ids=str)
def test_a_busy_machine_changes_no_choice(best, seed):
    """A third of the samples are disturbed, and all scatter by a tenth."""
    disturbed = random.Random(seed).sample(range(3000), 1000)
    found = Machine(SLOW | {best: 0.8}, disturbed, 0.1, seed).choose(seconds=2.0)
    assert found.prefetch == best


@pytest.mark.parametrize(("faster", "expected"), [(0.98, NONE), (0.96, L2)])
def test_no_prefetch_stays_unless_another_is_clearly_faster(faster, expected):
    assert Machine(SLOW | {L2: faster}).choose().prefetch == expected


@pytest.mark.parametrize("seed", range(20))
def test_noise_alone_chooses_nothing(seed):
    times = dict.fromkeys(CANDIDATES, 1.0)
    assert Machine(times, noise=0.1, seed=seed).choose().prefetch == NONE


def test_without_the_time_to_tell_there_is_no_choice():
    assert Machine({each: 100.0 for each in CANDIDATES}).choose() is None


def test_threads_measure_at_the_same_time():
    machines = [Machine(SLOW | {ONCE: 0.7}) for _ in range(3)]
    now = iter(range(10**9))
    found = choose([machine.sample for machine in machines], 600.0, lambda: float(next(now)))
    assert found.prefetch == ONCE
    assert all(len(machine.taken) > 0 for machine in machines)


@pytest.mark.parametrize("each", CANDIDATES, ids=str)
def test_names(each):
    assert Prefetch.parse(str(each)) == each


@pytest.mark.parametrize(
    "text",
    ["l1:64", "l2", "l2:", "l2:0", "l2:-4", "l2:99999999", "once:4k", "none:64", "", "L2:64"],
)
def test_what_is_no_prefetch_is_refused(text):
    with pytest.raises(BadInput, match="must be none, l2:BYTES or once:BYTES"):
        Prefetch.parse(text)


# ---- what is measured


@pytest.fixture
def large(monkeypatch):
    """Every model's weights are large enough to be measured."""
    monkeypatch.setattr(prefetch, "MEASURED_FROM", 0)
    monkeypatch.setattr(prefetch, "SLICE_BYTES", 1 << 14)


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_lie_within_the_weights(large, dtype, threads):
    config = ModelConfig(
        dim=40, n_layers=2, n_heads=5, hidden_dim=96, vocab_size=2000, max_seq_len=8
    )
    packed = PackedWeights(config, weights_of(config), dtype, 4, 8)
    begin, end = packed.memory.address, packed.memory.address + packed.n_bytes
    read = []

    class Fake:
        tile = 8

        def call(self, operation, state, table, count):
            assert operation == Operation.PRODUCT
            weights, rows, columns, *_ = (ctypes.c_int64 * Product.LENGTH).from_address(table)
            read.append((weights, weights + count * rows * 48 * dtype.itemsize))
            assert columns == 40
            assert rows % 8 == 0

    shares = [Slices(Fake(), packed, config.dim, i, threads) for i in range(threads)]
    for _ in range(100):
        for share in shares:
            assert share(L2) > 0
    assert all(begin <= first < last <= end for first, last in read)
    if threads == 1:  # all but the last slice's rest
        assert max(last for _, last in read) > end - (1 << 15)


def test_a_slice_on_this_processor(compiled_program):
    program = Program(compiled_program)
    config = SMALL.with_(vocab_size=5000)
    packed = PackedWeights(config, weights_of(config), torch.float32, program.lanes, program.tile)
    share = Slices(program, packed, config.dim, 0, 1)
    assert all(share(each) > 0 for each in CANDIDATES)


# ---- what is kept


FASTER = Measured(L2, 1.25, 60)


class Watched:
    """In the place of `prefetch.choose`."""

    def __init__(self, monkeypatch, found=FASTER):
        self.found, self.calls = found, []
        monkeypatch.setattr(prefetch, "choose", self)

    def __call__(self, samples):
        self.calls.append(len(samples))
        return self.found


def prefetch_of(engine) -> tuple[str, str]:
    one, several = engine._runtime.prefetch
    return str(one), str(several)


def test_a_kept_choice_is_read_without_measuring(large, monkeypatch, compiled_program):
    watched = Watched(monkeypatch)
    engine = make_engine(SMALL, weights_of(SMALL), threads=2)
    assert watched.calls == [2], "two threads by hand: one alone never works"
    assert prefetch_of(engine) == ("none", "l2:4096")
    assert engine.describe()["prefetch"] == "l2:4096"
    again = make_engine(SMALL, weights_of(SMALL, 1), threads=2)
    assert watched.calls == [2]
    assert prefetch_of(again) == prefetch_of(engine)
    for options in ({"threads": 1}, {"dtype": "bfloat16", "threads": 2}):
        make_engine(SMALL, weights_of(SMALL), **options)
    make_engine(SMALL.with_(n_layers=1), weights_of(SMALL.with_(n_layers=1)), threads=2)
    assert watched.calls == [2, 1, 2, 2]


def test_automatic_threads_measure_one_and_all(large, monkeypatch, compiled_program):
    watched = Watched(monkeypatch)
    monkeypatch.setattr("onelaunch.engines.cpu.engine.usable_cores", lambda: 3)
    config = SMALL.with_(vocab_size=63)
    assert prefetch_of(make_engine(config, weights_of(config))) == ("l2:4096", "l2:4096")
    assert watched.calls == [1, 3]


def entry_of(store: Store, config: ModelConfig) -> str:
    ((of, _),) = prefetch_choice.kept(store, config)
    return prefetch_choice._key(of)


DAMAGES = {
    "no JSON": lambda data: b"{",
    "another shape": lambda data: json.dumps(data | {"of": data["of"] | {"dim": 9}}).encode(),
    "no such prefetch": lambda data: json.dumps(
        data | {"several": data["several"] | {"prefetch": "l9:1"}}
    ).encode(),
    "a gain that is none": lambda data: json.dumps(
        data | {"several": data["several"] | {"gain": "much"}}
    ).encode(),
    "not an object": lambda data: b"[]",
}


@pytest.mark.parametrize("damage", [*DAMAGES, "a byte", "cut off"])
def test_a_damaged_choice_is_measured_again(large, monkeypatch, compiled_program, tmp_path, damage):
    store = Store(tmp_path / "store")
    store.put(prefetch_choice.program.key(), compiled_program)
    watched = Watched(monkeypatch)
    make_engine(SMALL, weights_of(SMALL), threads=2, store=store)
    key = entry_of(store, SMALL)
    if damage in DAMAGES:
        changed = DAMAGES[damage](json.loads(store.peek(key)))
        store.put(key, changed, {"what": prefetch_choice.WHAT})
    else:
        path = store._path(key)
        data = bytearray(path.read_bytes())
        data[-9] ^= 1
        path.write_bytes(data if damage == "a byte" else data[:-9])
    engine = make_engine(SMALL, weights_of(SMALL), threads=2, store=store)
    assert watched.calls == [2, 2]
    assert prefetch_of(engine) == ("none", "l2:4096")
    make_engine(SMALL, weights_of(SMALL), threads=2, store=store)
    assert watched.calls == [2, 2]


def test_a_choice_of_another_processor_is_not_used(large, monkeypatch, compiled_program):
    watched = Watched(monkeypatch)
    config = SMALL.with_(vocab_size=67)
    make_engine(config, weights_of(config), threads=2)
    facts = prefetch_choice.processor()
    for other in ({"processor": "another"}, {"cores": 999}, {"caches": []}, {"features": "-all"}):
        monkeypatch.setattr(prefetch_choice, "processor", lambda other=other: facts | other)
        make_engine(config, weights_of(config), threads=2)
    assert watched.calls == [2] * 5


def test_what_could_not_be_told_is_not_kept(large, monkeypatch, compiled_program):
    watched = Watched(monkeypatch, None)
    config = SMALL.with_(vocab_size=71)
    for _ in range(2):
        assert prefetch_of(make_engine(config, weights_of(config), threads=2)) == ("none", "none")
    assert watched.calls == [2, 2]


def test_small_models_are_not_measured(monkeypatch, compiled_program):
    watched = Watched(monkeypatch)
    assert prefetch_of(make_engine(SMALL, weights_of(SMALL), threads=2)) == ("none", "none")
    assert watched.calls == []


def test_by_hand(large, monkeypatch, compiled_program):
    watched = Watched(monkeypatch)
    monkeypatch.setenv("ONELAUNCH_PREFETCH", "once:512")
    engine = make_engine(SMALL, weights_of(SMALL), threads=1)
    assert prefetch_of(engine) == ("once:512", "once:512")
    assert engine.describe()["prefetch_chosen"] == "by hand"
    engine = make_engine(SMALL, weights_of(SMALL), threads=1, prefetch="none")
    assert prefetch_of(engine) == ("none", "none")
    assert watched.calls == []
    for automatic in ("", "auto"):
        monkeypatch.setenv("ONELAUNCH_PREFETCH", automatic)
        engine = make_engine(SMALL, weights_of(SMALL), threads=1)
        assert engine.describe()["prefetch_chosen"] == "automatically"
    monkeypatch.setenv("ONELAUNCH_PREFETCH", "much")
    with pytest.raises(
        BadInput, match="^ONELAUNCH_PREFETCH: prefetch='much': must be .*, or auto$"
    ):
        make_engine(SMALL, weights_of(SMALL), threads=1)
    with pytest.raises(BadInput, match="^prefetch='more': must be"):
        make_engine(SMALL, weights_of(SMALL), threads=1, prefetch="more")


def test_doctor_and_inspect_show_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("ONELAUNCH_CACHE", str(tmp_path / "store"))
    monkeypatch.delenv("ONELAUNCH_PREFETCH", raising=False)
    from onelaunch.config import preset

    facts = prefetch_choice.facts_of(preset("stories260k"), "bfloat16", 4, True)
    facts["processor"] = "A processor"
    choice = prefetch_choice.Choice(
        Measured(NONE, 1.0, 40), Measured(L2_FAR, 1.372, 30), "2026-11-29T10:11:12+00:00"
    )
    assert prefetch_choice.keep(Store(), facts, choice)
    assert prefetch_choice.find(Store(), facts) == choice
    assert cli.run(["inspect", "stories260k", "--random"]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("prefetch ")]
    assert [line.split(maxsplit=1)[1] for line in shown] == [
        "none, 1 thread in bfloat16 on A processor, measured 2026-11-29",
        "l2:8192, 1.37 times as fast as none, 4 threads in bfloat16 on A processor, "
        "measured 2026-11-29",
    ]
    assert cli.run(["inspect", "stories15m", "--random", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prefetch"] == []
    assert cli.run(["doctor"]) == 0
    assert "; prefetch measured for 1 shape of models so far\n" in capsys.readouterr().out
    monkeypatch.setenv("ONELAUNCH_PREFETCH", "l2:2048")
    assert cli.run(["doctor"]) == 0
    assert "; prefetch l2:2048 (ONELAUNCH_PREFETCH)\n" in capsys.readouterr().out


# ---- what is computed

VARIANTS = [Prefetch(to, ahead) for to in PrefetchTo if to for ahead in (1, 64, 4096, 1 << 20)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
def test_each_variant_gives_the_same_bits(compiled_program, threads, dtype):
    config = SMALL.with_(dim=88, n_heads=4, n_kv_heads=2, head_dim=20, hidden_dim=150)
    runtime = make_runtime(compiled_program, config, weights_of(config), threads, dtype)
    ids = torch.randint(0, 61, (7,), generator=torch.Generator().manual_seed(1)).tolist()
    at = State.ONE_PREFETCH_TO if threads == 1 else State.SEVERAL_PREFETCH_TO

    def results() -> list[torch.Tensor]:
        text = sequence_of(runtime, ids, 12)
        grow(runtime, [text])
        return [*(logits_of(runtime, ids[:n]) for n in (1, 3, 7)), torch.tensor(text.new)]

    expected = results()
    for each in VARIANTS:
        runtime.state[at], runtime.state[at + 1] = each.to, each.ahead
        assert all(map(torch.equal, results(), expected)), each
        # what a generation's clock and counters write is elsewhere
        assert runtime.state[State.PREFETCH_TO] == each.to
        assert runtime.state[State.PREFETCH_AHEAD] == each.ahead
        assert runtime.state[at] == each.to


@pytest.mark.parametrize(
    ("triple", "expected"),
    [
        ("x86_64-unknown-linux-gnu", ["prefetcht1", "prefetchnta"]),
        ("aarch64-unknown-linux-gnu", ["prfm\tpldl2keep", "prfm\tpldl1strm"]),
        ("arm64-apple-darwin", ["prfm\tpldl2keep", "prfm\tpldl1strm"]),
    ],
)
def test_each_variant_is_an_instruction_of_every_processor(triple, expected):
    """Of the plainest of its kind: no feature is asked for."""
    pytest.importorskip("numba")
    from llvmlite import binding, ir

    from onelaunch.engines.cpu.native import vectors

    module = ir.Module()
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)])
    function = ir.Function(module, kind, "f")
    builder = ir.IRBuilder(function.append_basic_block())
    for locality in (vectors.LOCALITY_L2, vectors.LOCALITY_ONCE):
        vectors.prefetch(builder, function.args[0], locality)
    builder.ret_void()
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    try:
        target = binding.Target.from_triple(triple)
    except RuntimeError as error:
        pytest.skip(f"this llvmlite has no such target: {error}")
    machine = target.create_target_machine()
    text = machine.emit_assembly(binding.parse_assembly(str(module)))
    lines = [line.strip() for line in text.splitlines()]
    found = [line for line in lines if line.startswith(("prefetch", "prfm"))]
    assert [line.startswith(name) for line, name in zip(found, expected, strict=True)] == [True] * 2


def test_fields_of_the_state_do_not_overlap():
    """`State` would make two names of one number the same member."""
    named = [int(value) for name, value in vars(State).items() if name.isupper()]
    assert len(named) == len(set(named))
    # the clock writes a timespec there
    assert State.STARTED_NANOSECONDS == State.STARTED + 1
    assert max(named) == State.LENGTH
