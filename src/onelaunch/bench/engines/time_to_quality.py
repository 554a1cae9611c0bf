"""time-to-quality: seconds from the start of a process to a validation loss, compared with nanoGPT.

Characters of Shakespeare with nanoGPT's published budget for a CPU: 4 layers, 128 wide, 12 x 64
tokens an update, at most 2,000 updates, published loss 1.88; both evaluate every 250 updates, and
the time of it counts. Ours is `onelaunch train shakespeare-char`, evaluated on the whole last tenth
of the text; nanoGPT is its own train.py as its README has it for a CPU, which estimates the loss
from 20 random batches (and that of its training split from as many); where it ends without having
reached the target, its whole time is taken. Nothing is compiled before the
first round of ours and kept from then on, as for a user; the rounds alternate.

It wants `--peer nanogpt=FOLDER`: a checkout of nanoGPT with data/shakespeare_char/input.txt.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onelaunch.bench.core.record import Log, Row
from onelaunch.bench.core.rounds import ratio
from onelaunch.bench.core.tables import by_columns, digits, document, figure
from onelaunch.compilation.environment import child_environment
from onelaunch.errors import BadInput, RunFailed

UNIT = "s"
NANOGPT = "nanogpt"
PEERS = (NANOGPT,)
TARGET = 1.88
TEXT = Path("data/shakespeare_char/input.txt")
ROUNDS = 3
LIMIT_SECONDS = 1800.0
WINDOWS = 145
"""Batches of 12 x 64 characters that the last tenth has: all of it is evaluated."""
_OURS = re.compile(r"validation loss ([0-9.]+)")
_THEIRS = re.compile(r"val loss ([0-9.]+)")
_FLAGS = (
    *("--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=100"),
    *("--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128"),
    *("--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"),
)


def run(device: str, quick: bool, log: Log, peers: Mapping[str, Path]) -> list[Row]:
    """Time both in turn; returns one row."""
    source = peers.get(NANOGPT)
    if source is None or not (source / TEXT).is_file():
        raise BadInput(
            f"time-to-quality: pass --peer {NANOGPT}=FOLDER, a checkout of nanoGPT with {TEXT}"
        )
    seconds: dict[str, list[float]] = {"ours": [], NANOGPT: []}
    reached: dict[str, list[float]] = {"ours": [], NANOGPT: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = _prepare_ours(source / TEXT, folder)
        theirs = _prepare_theirs(source, folder)
        for number in range(1 if quick else ROUNDS):
            ours = [
                *_onelaunch("train", "shakespeare-char", "--data", data, "--device", "cpu"),
                *("--run", str(folder / f"run-{number}"), "--set", f"eval.batches={WINDOWS}"),
            ]
            environment = {**child_environment(), "ONELAUNCH_CACHE": str(folder / "store")}
            contestants: list[tuple[str, Sequence[str], re.Pattern[str], Mapping[str, str]]] = [
                ("ours", ours, _OURS, environment),
                # where train.py finds its neighbours
                (NANOGPT, theirs, _THEIRS, {**os.environ, "PYTHONPATH": str(folder / NANOGPT)}),
            ]
            for who, command, pattern, env in contestants[:: -1 if number % 2 else 1]:
                took, loss = _seconds_to(command, pattern, folder / NANOGPT, env)
                log(f"round {number + 1}: {who}: {loss:.4f} after {took:.1f} s")
                seconds[who].append(took)
                reached[who].append(loss)
    return [_row(seconds, reached)]


def _row(seconds: dict[str, list[float]], reached: dict[str, list[float]]) -> Row:
    notes: dict[str, Any] = {
        "first": round(seconds["ours"][0], 2),
        "ratio": round(ratio(seconds["ours"], seconds[NANOGPT]), 4),
        "target": TARGET,
        "losses": reached,
    }
    peers = {NANOGPT: statistics.median(seconds[NANOGPT])}
    return Row.of(f"shakespeare-char to {TARGET}", seconds["ours"], peers=peers, notes=notes)


def _onelaunch(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "onelaunch", *arguments]


def _prepare_ours(text: Path, folder: Path) -> str:
    data = str(folder / "data")
    command = _onelaunch("prepare", str(text), "--out", data, "--quiet")
    subprocess.run(command, check=True, env=child_environment())
    return data


def _prepare_theirs(source: Path, folder: Path) -> list[str]:
    """Its files in a folder of ours, the text as its prepare.py leaves it; the command."""
    place = folder / NANOGPT
    data = place / TEXT.parent
    data.mkdir(parents=True)
    for name in ("train.py", "model.py", "configurator.py"):
        (place / name).write_bytes((source / name).read_bytes())
    config = "config/train_shakespeare_char.py"
    (place / "config").mkdir()
    (place / config).write_bytes((source / config).read_bytes())
    text = (source / TEXT).read_text(encoding="utf-8")
    letters = sorted(set(text))
    numbers = {letter: i for i, letter in enumerate(letters)}
    cut = int(0.9 * len(text))
    for name, part in (("train", text[:cut]), ("val", text[cut:])):
        (data / f"{name}.bin").write_bytes(array("H", [numbers[c] for c in part]).tobytes())
    meta = {"vocab_size": len(letters), "itos": dict(enumerate(letters)), "stoi": numbers}
    (data / "meta.pkl").write_bytes(pickle.dumps(meta))
    return [sys.executable, "train.py", config, *_FLAGS]


def _seconds_to(
    command: Sequence[str], pattern: re.Pattern[str], place: Path, environment: Mapping[str, str]
) -> tuple[float, float]:
    """Seconds from a process's start to the first loss at or below TARGET that it prints, or to its
    end where it comes to none; and its last loss. Raises RunFailed where there is no loss at all.
    """
    start = time.monotonic()
    env = {**environment, "PYTHONUNBUFFERED": "1"}
    output: list[str] = []
    loss = math.inf
    with subprocess.Popen(
        command, cwd=place, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as child:
        assert child.stdout is not None
        try:
            for line in child.stdout:
                output.append(line)
                if match := pattern.search(line):
                    loss = float(match[1])
                if loss <= TARGET or time.monotonic() - start > LIMIT_SECONDS:
                    break
        finally:
            took = time.monotonic() - start
            child.kill()
    if loss == math.inf:
        raise RunFailed(f"{command[1]} ended without a loss: {''.join(output[-3:])}")
    return took, loss


def table(record: dict[str, Any]) -> str:
    """The record's table in Markdown."""
    text = by_columns(
        record["rows"],
        {
            "s": figure("case", form=str),
            "ours": lambda row: f"**{digits(row['ours'])}**",
            "ours, nothing compiled": figure("first"),
            "nanoGPT": figure("peers", NANOGPT),
            "ours / nanoGPT": figure("ratio", form=".2f"),
        },
    )
    words = (
        "Seconds from the start of a process to the first evaluation at or below the published "
        "loss; evaluations, every 250 updates, count."
    )
    return document(record, "Time to a validation loss on", words, text)
