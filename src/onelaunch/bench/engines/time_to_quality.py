"""time-to-quality: seconds from the start of a process to a validation loss, compared with nanoGPT.

Characters of Shakespeare with nanoGPT's two published budgets and losses:
- on a CPU 4 layers, 128 wide, 12 x 64 tokens an update, at most 2,000 updates, loss 1.88;
- on a GPU 6 layers, 384 wide, 64 x 256 tokens an update, dropout 0.2, at most 5,000 updates, loss
  1.4697.
Ours is `onelaunch train` with a built-in recipe within the budget, on a GPU of 500 updates and with
more weight decay in place of dropout, chosen by this very loss; nanoGPT is its own train.py, on a
GPU with torch.compile. Both evaluate every 250 updates, and the time of it counts; where one ends
without having reached the target, its whole time is taken.

Ours is evaluated on the whole last tenth of the text. So is nanoGPT on a GPU, by another
`estimate_loss` in a copy of its train.py (bench/peers/nanogpt.py), which takes less time than the
published one: that evaluates 400 random batches. On a CPU it is as published, and estimates the
loss from 20 random batches (and that of its training split from as many).

Neither has compiled programs before the first round; both keep them from then on, as for a user.
The rounds alternate.

It wants `--peer nanogpt=FOLDER`: a checkout of nanoGPT with data/shakespeare_char/input.txt.
"""

from __future__ import annotations

import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from onelaunch.bench.core import triton_store
from onelaunch.bench.core.record import Log, Row
from onelaunch.bench.core.rounds import ratio
from onelaunch.bench.core.tables import by_columns, digits, document, figure
from onelaunch.bench.peers import nanogpt
from onelaunch.compilation.environment import child_environment
from onelaunch.errors import BadInput, RunFailed

UNIT = "s"
OURS = "ours"
NANOGPT = nanogpt.NAME
PEERS = (NANOGPT,)
ROUNDS = 3
LIMIT_SECONDS = 1800.0


@dataclass(frozen=True)
class Budget:
    """A published budget of nanoGPT: the loss to reach, our recipe for it, and train.py's options.

    eval_batches: batches of ours that are the last tenth of the text; the CPU's are all full, and
        leave out 179 of its 111,539 characters.
    whole_split: nanoGPT evaluates the whole last tenth too, and not random batches.
    """

    target: float
    recipe: str
    eval_batches: int
    options: tuple[str, ...]
    whole_split: bool

    @property
    def case(self) -> str:
        return f"{self.recipe} to {self.target}"


CPU = Budget(
    target=1.88,
    recipe="shakespeare-char",
    eval_batches=145,
    options=(
        *("--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=100"),
        *("--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128"),
        *("--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"),
    ),
    whole_split=False,
)
GPU = Budget(
    target=1.4697,
    recipe="shakespeare-char-gpu",
    eval_batches=8,
    options=(),  # its configuration file is of this budget
    whole_split=True,
)


class Contestant(NamedTuple):
    """A command, the folder and the environment that it is run in, and the form of a line with an
    update and its validation loss."""

    command: Sequence[str]
    folder: Path
    environment: Mapping[str, str]
    line: re.Pattern[str]


class Reached(NamedTuple):
    """The seconds that a process took, and the update and the loss of its best evaluation."""

    seconds: float
    update: int
    loss: float


_OUR_LINE = re.compile(r"update (\d+): validation loss ([0-9.]+)")
_THEIR_LINE = re.compile(r"step (\d+): .*val loss ([0-9.]+)")


def run(device: str, quick: bool, log: Log, peers: Mapping[str, Path]) -> list[Row]:
    """Time both in turn; returns one row."""
    source = peers.get(NANOGPT)
    if source is None or not (source / nanogpt.TEXT).is_file():
        raise BadInput(
            f"time-to-quality: pass --peer {NANOGPT}=FOLDER, a checkout of nanoGPT with "
            f"{nanogpt.TEXT}"
        )
    budget = CPU if device == "cpu" else GPU
    results: dict[str, list[Reached]] = {OURS: [], NANOGPT: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        theirs = _theirs(budget, device, source, folder)
        data = _prepare_ours(source / nanogpt.TEXT, folder)
        for number in range(1 if quick else ROUNDS):
            run_folder = folder / f"run-{number}"
            contestants = {OURS: _ours(budget, device, data, run_folder), NANOGPT: theirs}
            for who in list(contestants)[:: -1 if number % 2 else 1]:
                result = _seconds_to(budget.target, contestants[who])
                log(
                    f"round {number + 1}: {who}: {result.loss:.4f} at update {result.update} after "
                    f"{result.seconds:.1f} s"
                )
                results[who].append(result)
    return [_row(budget, results)]


def _row(budget: Budget, results: Mapping[str, Sequence[Reached]]) -> Row:
    seconds = {who: [each.seconds for each in of] for who, of in results.items()}
    notes: dict[str, Any] = {
        "first": round(seconds[OURS][0], 2),
        "peers_first": {NANOGPT: round(seconds[NANOGPT][0], 2)},
        "ratio": round(ratio(seconds[OURS], seconds[NANOGPT]), 4),
        "target": budget.target,
        "losses": {who: [each.loss for each in of] for who, of in results.items()},
        "updates": {who: [each.update for each in of] for who, of in results.items()},
    }
    peers = {NANOGPT: statistics.median(seconds[NANOGPT])}
    return Row.of(budget.case, seconds[OURS], peers=peers, notes=notes)


def _onelaunch(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "onelaunch", *arguments]


def _prepare_ours(text: Path, folder: Path) -> str:
    data = str(folder / "data")
    command = _onelaunch("prepare", str(text), "--out", data, "--quiet")
    subprocess.run(command, check=True, env=child_environment())
    return data


def _ours(budget: Budget, device: str, data: str, run_folder: Path) -> Contestant:
    command = [
        *_onelaunch("train", budget.recipe, "--data", data, "--device", device),
        *("--run", str(run_folder), "--set", f"eval.batches={budget.eval_batches}"),
    ]
    folder = run_folder.parent
    return Contestant(command, folder, triton_store.environment(folder / "compiled"), _OUR_LINE)


def _theirs(budget: Budget, device: str, source: Path, folder: Path) -> Contestant:
    place = folder / NANOGPT
    command = nanogpt.prepare(source, place, budget.whole_split)
    environment = {
        **os.environ,
        "PYTHONPATH": str(place),  # where train.py finds its neighbours
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "inductor" / "triton"),
    }
    command += [*budget.options, f"--device={device}"]
    return Contestant(command, place, environment, _THEIR_LINE)


def _seconds_to(target: float, contestant: Contestant) -> Reached:
    """Run a process to the first loss at or below the target that it prints, or to its end where it
    comes to none. Raises RunFailed where there is no loss at all, or an error before that."""
    start = time.monotonic()
    env = {**contestant.environment, "PYTHONUNBUFFERED": "1"}
    output: list[str] = []
    update, loss, failed = 0, math.inf, False
    with subprocess.Popen(
        contestant.command,
        cwd=contestant.folder,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as child:
        assert child.stdout is not None
        try:
            for line in child.stdout:
                output.append(line)
                match = contestant.line.search(line)
                if match and float(match[2]) < loss:
                    update, loss = int(match[1]), float(match[2])
                if loss <= target or time.monotonic() - start > LIMIT_SECONDS:
                    break
            else:
                failed = child.wait() != 0  # it ended by itself
        finally:
            took = time.monotonic() - start
            child.kill()
    if loss == math.inf or failed:
        how = "without a loss" if loss == math.inf else f"with an error after a loss of {loss}"
        raise RunFailed(f"{contestant.command[1]} ended {how}: {''.join(output[-3:])}")
    return Reached(took, update, loss)


def table(record: dict[str, Any]) -> str:
    """The record's table in Markdown."""
    text = by_columns(
        record["rows"],
        {
            "s": figure("case", form=str),
            "ours": lambda row: f"**{digits(row['ours'])}**",
            "ours, nothing compiled": figure("first"),
            "nanoGPT": figure("peers", NANOGPT),
            "nanoGPT, nothing compiled": figure("peers_first", NANOGPT),
            "ours / nanoGPT": figure("ratio", form=".2f"),
            "our losses": lambda row: _losses(row, OURS),
            "nanoGPT's losses": lambda row: _losses(row, NANOGPT),
        },
    )
    words = (
        "Seconds from the start of a process to the first evaluation at or below the published "
        "loss, or to the end of the budget where none is; evaluations, every 250 updates, count. "
        "The losses are those of the best evaluation, round by round."
    )
    return document(record, "Time to a validation loss on", words, text)


def _losses(row: dict[str, Any], who: str) -> str:
    return ", ".join(f"{loss:.4f}" for loss in row["losses"][who])
