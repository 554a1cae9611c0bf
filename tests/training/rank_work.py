"""What each rank does in test_ranks.py: a function for each test, called in every process."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import onelaunch
from onelaunch import cli
from onelaunch.checkpoints.run_folder import list_checkpoints
from onelaunch.errors import BadInput, RunFailed
from onelaunch.training import run as runs
from onelaunch.training.buckets import FlatBuckets, GradientBuckets
from onelaunch.training.evaluate import evaluate
from onelaunch.training.loop import Trainer
from onelaunch.training.ranks import Decision, Ranks, decision_of, joined
from onelaunch.training.recipe import Recipe
from tests.kills import SETTINGS


def recipe(**changed) -> Recipe:
    """Two updates of two micro-steps for each of two ranks, then an evaluation, twice."""
    settings = SETTINGS | {"train.updates": 4, "train.accum": 2, "train.dropout": 0.0}
    settings["train.engine"] = "reference"  # the compiled one is not compiled yet
    settings |= {"eval.every": 2, "eval.batches": 3, "checkpoint.every": 2, "checkpoint.keep": 9}
    settings |= {key.replace("__", "."): value for key, value in changed.items()}
    return Recipe().with_settings(settings, "test")


def everything(folder: str) -> None:
    """Exchange numbers and gradients, train, and end with weights that differ."""
    torch.set_num_threads(1)
    here = Path(folder)
    with joined() as ranks:
        _numbers(ranks)
        _decisions(ranks)
        _evaluations(ranks)
        _bits(ranks)
        _devices(ranks)
        _buckets(ranks)
        _flat_buckets(ranks)
        _during_the_backward()
        _changed_after_its_sum(ranks)
    os.chdir(here)
    run = onelaunch.train(recipe(train__updates=1))  # the first rank names it
    with joined() as ranks:  # a second run of the same processes
        assert run == ranks.from_first(run)
        _runs(ranks, here)
    assert not _gloo_threads()
    with pytest.raises(RunFailed) as raised, joined() as ranks:
        _differ(ranks, here)
    assert not _gloo_threads()
    (here / f"error-{ranks.rank}").write_text(
        json.dumps([str(raised.value), raised.value.elsewhere])
    )


def _gloo_threads() -> list[str]:
    """Threads that abort a process that exits."""
    tasks = Path("/proc/self/task")
    names = [(task / "comm").read_text() for task in tasks.iterdir()] if tasks.exists() else []
    return [name for name in names if "gloo" in name]


def _numbers(ranks: Ranks) -> None:
    rank = ranks.rank
    assert ranks.writes == (rank == 0)
    assert ranks.from_first(Path(f"run-{rank}")) == Path("run-0")
    assert ranks.add(rank + 1, 1e16 * rank, 1.0) == [3.0, 1e16, 2.0]
    weights = {"a": torch.full((3,), float(rank)), "b": torch.eye(2) * rank}
    assert not any(weight.any() for weight in ranks.weights_from_first(weights).values())
    assert weights["a"].tolist() == [rank] * 3
    gathered = ranks.gather(torch.tensor([rank, 7 * rank]))
    expected = [[0, 0], [1, 7]] if rank == 0 else []
    assert [values.tolist() for values in gathered] == expected


def _decisions(ranks: Ranks) -> None:
    """A signal of any rank counts, time and interval of the first alone."""
    first = ranks.writes
    assert ranks.agree(Decision()) == Decision()
    one_stops = Decision(None if first else signal.SIGTERM, save=not first, interval=9)
    assert ranks.agree(one_stops) == Decision(signal.SIGTERM, False, 9)
    all_stop = Decision(signal.SIGINT, save=first, interval=3 if first else 5)
    assert ranks.agree(all_stop) == Decision(signal.SIGINT, True, 3)
    assert decision_of(ranks.encode(Decision(signal.SIGHUP))).signal == signal.SIGHUP


def _evaluations(ranks: Ranks) -> None:
    """Each rank has other batches, of other sizes; a stop of one stops all."""

    class Engine:
        def logits(self, tokens_BS: torch.Tensor) -> torch.Tensor:
            calls.append(len(tokens_BS))
            seed = int(tokens_BS.sum())
            return torch.randn(*tokens_BS.shape, 11, generator=torch.Generator().manual_seed(seed))

    rng = np.random.default_rng(3)
    batches = [tuple(rng.integers(0, 11, (2, n, 6))) for n in (3, 5, 1, 4, 2)]
    calls: list[int] = []
    ours = evaluate(Engine(), batches, ranks=ranks)
    assert calls == ([3, 1, 2] if ranks.writes else [5, 4])
    alone = evaluate(Engine(), batches)
    assert (ours.tokens, ours.whole) == (alone.tokens, True) == (90, True)
    assert ours.loss == pytest.approx(alone.loss, rel=1e-12)
    stopped = evaluate(Engine(), batches, stop=lambda: ranks.rank == 1, ranks=ranks)
    assert not stopped.whole


def _bits(ranks: Ranks) -> None:
    """One bit of one weight, and two weights that changed places."""
    weights = [torch.randn(40, generator=torch.Generator().manual_seed(n)) for n in (1, 2)]
    ranks.check_same(weights, "before")
    changed = weights[0].clone()
    changed.view(torch.int32)[17] ^= ranks.rank
    with pytest.raises(RunFailed, match=r"update 3: the weights of rank 1 differ"):
        ranks.check_same([changed, weights[1]], "update 3")
    with pytest.raises(RunFailed, match="rank 1 differ"):
        ranks.check_same(weights if ranks.writes else weights[::-1], "update 3")


def _flat_buckets(ranks: Ranks) -> None:
    """Parts are summed as they are named, in place; without any, all at the end."""
    flat = SimpleNamespace(gradients_M=torch.arange(10.0) * (ranks.rank + 1))
    engine = SimpleNamespace(flat=flat, on_gradients=None)
    buckets = FlatBuckets(engine, 2)
    total = sum(range(1, ranks.size + 1))
    buckets.overlap()
    for part in ((4, 10), (0, 4)):
        assert engine.on_gradients is not None
        engine.on_gradients(*part)
    numbers = buckets.finish(torch.tensor([1.0, float(ranks.rank)]))
    assert engine.on_gradients is None
    assert torch.equal(flat.gradients_M, torch.arange(10.0) * total)
    assert numbers.tolist() == [ranks.size, sum(range(ranks.size))]
    buckets.finish(torch.zeros(2))
    assert torch.equal(flat.gradients_M, torch.arange(10.0) * total * ranks.size)
    buckets.close()


def _buckets(ranks: Ranks) -> None:
    """Sums over ranks equal float64's, in buckets of any size, with and without autograd, and have
    the same bits on each rank and in a repetition."""
    for most_bytes in (1, 3000, 1 << 20):
        for overlapped in (True, False):
            first, again = (_summed(ranks, most_bytes, overlapped) for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def _summed(ranks: Ranks, most_bytes: int, overlapped: bool) -> list[torch.Tensor]:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 20, bias=False), nn.Tanh())
    model.append(nn.Linear(20, 7))
    model.append(nn.Linear(1, 1))  # unused
    used, unused = model[:5], model[5]
    parameters = list(model.parameters())
    buckets = GradientBuckets(parameters, 2, most_bytes)
    for update in range(2):
        x_BD = torch.randn(2, 2, 8, 20, generator=torch.Generator().manual_seed(update))
        for micro in range(2):
            if overlapped and micro == 1:
                buckets.overlap()
            used(x_BD[micro, ranks.rank]).square().sum().backward()
        numbers = torch.tensor([1.0 + ranks.rank, 0.25])
        assert buckets.finish(numbers).tolist() == [3.0, 0.5]
        exact = [p.detach().double().requires_grad_() for p in used.parameters()]
        names = [name for name, _ in used.named_parameters()]
        out = torch.func.functional_call(
            used, dict(zip(names, exact, strict=True)), x_BD.double().flatten(0, 2)
        )
        out.square().sum().backward()
        for parameter, oracle in zip(used.parameters(), exact, strict=True):
            scale = oracle.grad.abs().max()
            assert (parameter.grad - oracle.grad).abs().max() < 2e-6 * scale
        assert not unused.weight.grad.any()
        ranks.check_same([p.grad for p in parameters], "gradients")
        gradients = [p.grad.clone() for p in parameters]
        model.zero_grad(set_to_none=True)
    return gradients


def _devices(ranks: Ranks) -> None:
    ranks.use_device("cpu")
    for name in ("mps", "cuda:1"):
        with pytest.raises(BadInput, match="one device, for 2 processes"):
            ranks.use_device(name)


def _during_the_backward() -> None:
    """Sums of buckets start as soon as these are complete, the last one's with the numbers."""
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(5)))
    buckets = GradientBuckets(list(model.parameters()), 1, bucket_bytes=128)  # two in each
    started, all_reduce = [], dist.all_reduce
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            dist, "all_reduce", lambda *a, **k: started.append(a) or all_reduce(*a, **k)
        )
        model(torch.ones(4)).sum().backward()
        assert not started
        buckets.overlap()
        steps = []
        for layer in model[::-1]:
            layer.weight.register_post_accumulate_grad_hook(lambda _: steps.append(len(started)))
        model(torch.ones(4)).sum().backward()
        assert steps == [0, 1, 1, 2, 2]
        buckets.finish(torch.zeros(1))
    assert len(started) == 3


def _changed_after_its_sum(ranks: Ranks) -> None:
    """Two backwards after `overlap`: the second would change what is being summed."""
    layer = nn.Linear(3, 3)
    buckets = GradientBuckets(list(layer.parameters()), 1)
    buckets.overlap()
    layer(torch.ones(3)).sum().backward()
    with pytest.raises(RuntimeError, match="changed after its sum"):
        layer(torch.ones(3)).sum().backward()
    buckets.finish(torch.zeros(1))
    plain = torch.zeros(4)  # of an engine without autograd
    buckets = GradientBuckets([plain], 0)
    plain.grad = torch.full((4,), 1.0 + ranks.rank)
    buckets.finish(torch.empty(0))
    assert plain.grad.tolist() == [3.0] * 4


def _runs(ranks: Ranks, here: Path) -> None:
    """A run left alone, one that a signal to the other rank stops within an update, and one resumed
    there, with dropout. Then two without, one stopped between updates."""
    r = recipe(train__dropout=0.1, train__accum=3, train__updates=2)
    runs.start(r, here / "whole", True, ranks=ranks)
    _stopped_at(ranks, 2, r, here / "cut")
    if ranks.writes:
        shutil.copytree(here / "cut", here / "unfinished")
    ranks.wait()
    runs.resume(here / "cut", {}, None, True, ranks)
    _stopped_at(ranks, 4, recipe(), here / "between")
    _saved_by_the_clock(ranks, here / "by-the-clock")
    outcome = runs.start(recipe(), here / "plain", True, ranks=ranks)
    assert (outcome.progress.update, outcome.run) == (4, here / "plain")


@contextmanager
def _in_micro_step(n: int, act: Callable[[Trainer], None]) -> Iterator[None]:
    """Within the context, `act` before the n-th micro-step; ranks agree after each."""
    step, count = Trainer._micro_step, 0

    def counted(self: Trainer) -> None:
        nonlocal count
        count += 1
        self._micro_seconds = 10.0
        if count == n:
            act(self)
        step(self)

    Trainer._micro_step = counted
    try:
        yield
    finally:
        Trainer._micro_step = step


def _saved_by_the_clock(ranks: Ranks, run: Path) -> None:
    """The first rank finds a checkpoint due within the second update; another's clock is its
    own."""
    r = recipe(train__accum=4, train__updates=2, checkpoint__every=1, eval__every=0)

    def long_ago(trainer: Trainer) -> None:
        trainer._saved_time -= 1e6

    def look(trainer: Trainer) -> None:
        if ranks.writes:  # the other does not wait for it
            names = [path.name for path in list_checkpoints(run)]
            assert names == ["update-00000001", "update-00000001-micro-0003"]

    with _in_micro_step(7 if ranks.writes else 6, long_ago), _in_micro_step(8, look):
        runs.start(r, run, True, ranks=ranks)
    runs.start(r, run.with_name("undisturbed"), True, ranks=ranks)


def _stopped_at(ranks: Ranks, micro_step: int, r: Recipe, run: Path) -> None:
    """The last rank gets a signal in this micro-step; all stop after it."""

    def ended(trainer: Trainer) -> None:
        if ranks.rank == ranks.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with _in_micro_step(micro_step, ended):
        outcome = runs.start(r, run, True, ranks=ranks)
    accum = r.train.accum
    at = (outcome.progress.update, outcome.progress.micro)
    assert (outcome.signal, at) == (signal.SIGTERM, divmod(micro_step, accum)), (ranks.rank, at)


def _differ(ranks: Ranks, here: Path) -> None:
    """The weights of rank 1 change by themselves: no checkpoint has them."""

    def changed(trainer: Trainer) -> None:
        if ranks.rank == 1:
            with torch.no_grad():
                trainer.parameters["norm.weight"][3] += 1e-3

    with _in_micro_step(6, changed):
        runs.start(recipe(), here / "differ", True, ranks=ranks)


def command(*words: str) -> None:
    """`onelaunch` with words in which {rank} is the rank."""
    cli.main([word.replace("{rank}", os.environ["RANK"]) for word in words])


def out_of_memory(*words: str) -> None:
    """`onelaunch`, in which rank 1 has no memory left in the third update."""

    def fail(trainer: Trainer) -> None:
        if trainer.ranks.rank == 1:
            raise MemoryError

    with _in_micro_step(8, fail):
        cli.main(list(words))


def not_finite(*words: str) -> None:
    """`onelaunch`, in which the loss of rank 1 is no number in the second update."""

    def poison(trainer: Trainer) -> None:
        if trainer.ranks.rank == 1:
            trainer._loss_sum += math.nan

    with _in_micro_step(5, poison):
        cli.main(list(words))
