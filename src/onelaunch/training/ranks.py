"""Several processes that train one model together, as torchrun starts them.

    torchrun --nproc-per-node 2 -m onelaunch train ...

Each process is a rank, numbered from 0. All read the data and compute; rank 0 alone decides what
depends on time, and writes. Numbers on the host go through gloo, tensors on a GPU through NCCL.

An error of one rank ends all, and one of them prints it: the others lose their connection to it,
and learn from the store, a small key-value server of torchrun, that it is printed.
"""

from __future__ import annotations

import importlib
import itertools
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from onelaunch.errors import BadInput, OnelaunchError, RunFailed, Terminated
from onelaunch.training.signals import NUMBERS

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)
"""A rank that does not answer for so long is lost. The others wait while rank 0 saves."""

FIRST_RANK_SECONDS = 1.0
"""How long another rank waits for rank 0 to print the same error, in which no rank is named."""

_ENDED = "ended"
"""The key of the store that has the exit code, once a rank prints why the run ends."""
_joins = itertools.count()


class RankLost(RunFailed):
    """The connection to another rank ended."""


class Decision(NamedTuple):
    """What all ranks do next.

    signal: the number of the signal that stops the run; None to go on.
    save: whether a checkpoint is due by the time since the last one.
    interval: micro-steps between two agreements within an update.
    """

    signal: int | None = None
    save: bool = False
    interval: int = 1


DECISION_NUMBERS = 2 + len(NUMBERS)
"""How many numbers a decision is sent as."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run: this one is `rank` of `size`, and `local_rank` of its machine.

    Each method but `use_device` is called by all ranks in the same order. It raises RankLost if the
    connection to a rank ends. For a process alone, it returns at once.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def writes(self) -> bool:
        """Whether this is the rank that writes the run folder and on the terminal."""
        return self.rank == 0

    def use_device(self, name: str) -> None:
        """Make the GPU of this rank the one that `cuda` means. Raises BadInput for a device that
        ranks cannot share, and for more ranks than GPUs."""
        if self.size == 1:
            return
        kind, colon, _ = name.partition(":")
        if colon or kind == "mps":
            raise BadInput(f"device={name!r}: is one device, for {self.size} processes; use cuda")
        if kind == "cpu" or not torch.cuda.is_available():
            return
        count = torch.cuda.device_count()
        if self.local_rank >= count:
            raise BadInput(
                f"device={name!r}: this machine has {count} GPUs, and torchrun started more "
                f"processes; start at most {count} on it, or use cpu"
            )
        torch.cuda.set_device(self.local_rank)

    def wait(self) -> None:
        """Wait until all ranks have come here."""
        self.add(0.0)

    def from_first(self, value: T) -> T:
        """Return rank 0's value, which is picklable."""
        if self.size == 1:
            return value
        values = [value]
        with connection():
            dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def weights_from_first(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return rank 0's values of tensors on the CPU, of which each rank has the shapes."""
        if self.size == 1:
            return weights
        copies = {name: tensor.clone() for name, tensor in weights.items()}
        with connection():
            for tensor in copies.values():
                dist.broadcast(tensor, src=0)
        return copies

    def add(self, *numbers: float) -> list[float]:
        """Return the sum of each number over all ranks, in float64."""
        if self.size == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64)
        with connection():
            dist.all_reduce(sums)
        return sums.tolist()

    def gather(self, values_N: Tensor) -> list[Tensor]:
        """Return the values of each rank, on the CPU, to rank 0; nothing to the others."""
        values_N = values_N.cpu()
        if self.size == 1:
            return [values_N]
        gathered = [torch.empty_like(values_N) for _ in range(self.size)] if self.writes else []
        with connection():
            dist.gather(values_N, gathered or None, dst=0)
        return gathered

    def agree(self, proposal: Decision) -> Decision:
        """Return the common decision: a signal of any rank; rank 0's time and interval."""
        if self.size == 1:
            return proposal
        return decision_of(self.add(*self.encode(proposal)))

    def encode(self, proposal: Decision) -> list[float]:
        """Return DECISION_NUMBERS numbers, whose sums over all ranks `decision_of` reads."""
        own = (float(proposal.save), float(proposal.interval)) if self.writes else (0.0, 0.0)
        return [*own, *(float(proposal.signal == number) for number in NUMBERS)]

    def check_same(self, parameters: Iterable[Tensor], state: str) -> None:
        """Raise RunFailed on all ranks, naming `state`, unless the float32 parameters have the same
        bits on each."""
        if self.size == 1:
            return
        sums = [p.detach().view(torch.int32).sum(dtype=torch.int64) for p in parameters]
        weights = torch.arange(1, 2 * len(sums), 2)  # so that two parameters cannot change places
        own = (torch.stack(sums).cpu() * weights).sum(0, keepdim=True)
        all_ranks = [torch.empty_like(own) for _ in range(self.size)]
        with connection():
            dist.all_gather(all_ranks, own)
        other = [rank for rank, each in enumerate(all_ranks) if each != all_ranks[0]]
        if other:
            raise RunFailed(
                f"{state}: the weights of rank {', '.join(map(str, other))} differ from those of "
                "rank 0; stopped, and not saved; give all ranks equal processors, threads and "
                "versions"
            )


ALONE = Ranks()


def decision_of(sums: Iterable[float]) -> Decision:
    """Read a decision from the sums of what each rank's `Ranks.encode` returned."""
    save, interval, *signals = sums
    received = (number for number, n in zip(NUMBERS, signals, strict=True) if n)
    return Decision(next(received, None), bool(save), int(interval))


@contextmanager
def joined() -> Iterator[Ranks]:
    """Connect the processes that torchrun started, until the last has left; without torchrun, or
    for one process, this one is alone.

    Of an error that leaves the context, one rank has what is to be printed: on the others it has
    `elsewhere` set, and the same exit code.

    Raises BadInput for variables of torchrun that are missing or no numbers, RunFailed if the
    processes cannot be connected.
    """
    size = _variable("WORLD_SIZE", 1)
    if size == 1:
        yield ALONE
        return
    ranks = Ranks(_variable("RANK"), size, _variable("LOCAL_RANK"))
    # The optimizers import it. After the group is made, defaults of its functions would keep that
    # alive, and threads of gloo that abort the process when it exits.
    importlib.import_module("torch.distributed.nn")
    with _connecting(ranks):
        # torchrun's server outlives a group of these processes
        server, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
        store = dist.PrefixStore(f"onelaunch-{next(_joins)}", server)
    try:
        with _connecting(ranks):
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                store=store,
                rank=ranks.rank,
                world_size=ranks.size,
                timeout=TIMEOUT,
            )
        ranks.wait()  # else an error that ends one could keep another from being connected
        yield ranks
        ranks.wait()
    except BaseException as error:
        # When one has ended, torchrun sends the others a signal; this one may have to print why.
        with _stop_signals_are(signal.SIG_IGN):
            _report(error, ranks, store)
            if not torch.cuda.is_available():  # NCCL may wait for a rank that is gone
                _disconnect(error)
        raise
    dist.destroy_process_group()


def _variable(name: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        raise BadInput(
            f"the variable {name} is {text!r}, and must be a number where WORLD_SIZE is more than "
            "1; start with torchrun, or unset WORLD_SIZE"
        )
    return int(text)


@contextmanager
def _connecting(ranks: Ranks) -> Iterator[None]:
    """Raise RunFailed where it fails. Signals end the process: while it waits for one that has
    ended, Python does not come to handle them."""
    try:
        with _stop_signals_are(signal.SIG_DFL):
            yield
    except (RuntimeError, ValueError) as error:
        raise RunFailed(
            f"the {ranks.size} processes cannot be connected ({error}); start them with torchrun"
        ) from error


@contextmanager
def connection() -> Iterator[None]:
    """Raise RankLost where a collective operation fails."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(
            "another process of the run ended, or does not answer: stopped without saving; "
            "resume=True continues from the newest checkpoint"
        ) from error


def _report(error: BaseException, ranks: Ranks, store: dist.Store) -> None:
    """Find out whether this rank prints its error; if not, set its `elsewhere` and exit code."""
    mine = f"{ranks.rank} {_exit_code(error)}"
    try:
        if not ranks.writes and not isinstance(error, RankLost):
            end = time.monotonic() + FIRST_RANK_SECONDS
            while not store.check([_ENDED]) and time.monotonic() < end:
                time.sleep(0.01)
        printed = store.compare_set(_ENDED, "", mine).decode()
        prints = printed == mine
    except RuntimeError:  # the store is gone, with the process that held it
        prints, printed = ranks.rank == 1, mine
    if isinstance(error, Exception) and not prints:
        error.elsewhere = True  # type: ignore[attr-defined]
    if isinstance(error, OnelaunchError):
        error.exit_code = int(printed.split()[1])
        if not ranks.writes:
            error.args = (f"rank {ranks.rank}: {error}",)


def _disconnect(error: BaseException) -> None:
    """Close the connections to the other ranks, which ends these."""
    link: BaseException | None = error
    while link is not None:  # their variables have operations that keep connections open
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    if dist.is_initialized():
        dist.destroy_process_group()


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(error, Terminated):
        return 128 + error.number
    return error.exit_code if isinstance(error, OnelaunchError) else 1


@contextmanager
def _stop_signals_are(action: signal.Handlers) -> Iterator[None]:
    """Have the signals that stop a run end the process at once (SIG_DFL), or do nothing
    (SIG_IGN)."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in NUMBERS:
            # an ignored signal stays ignored, as nohup needs
            if (handler := signal.getsignal(number)) not in (None, signal.SIG_IGN):
                before[number] = handler
                signal.signal(number, action)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
