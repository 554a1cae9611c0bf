"""Runs that are killed at random moments and resumed until done, held against one left alone."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from onelaunch.checkpoints.run_folder import list_checkpoints, read_state
from onelaunch.training.loop import Trainer
from tests.metrics import read_metrics

# small, with dropout, so that random states matter, and accumulation, so that a stop falls inside
SETTINGS = {
    "model.preset": "stories260k",
    "model.dim": 32,
    "model.n_layers": 2,
    "model.n_heads": 4,
    "model.n_kv_heads": 2,
    "model.hidden_dim": 48,
    "model.max_seq_len": 32,
    "data.path": "stories",
    "train.batch_size": 4,
    "train.accum": 3,
    "train.updates": 60,
    "train.dropout": 0.1,
    "train.threads": 1,
    "train.device": "cpu",
    "optimizer.warmup": 5,
    "eval.every": 7,
    "eval.batches": 2,
    "eval.sample_tokens": 4,
    "checkpoint.every": 5,
    "checkpoint.keep": 2,
}


def train_command(run: Path, resume: bool = False, **changed: Any) -> list[str]:
    """The command line of a small run; `changed` keys have `__` for the dot."""
    settings = SETTINGS | {key.replace("__", "."): value for key, value in changed.items()}
    command = [sys.executable, "-m", "onelaunch", "train", "--run", str(run), "--quiet"]
    if resume:
        return [*command, "--resume"]
    command += ["--preset", settings.pop("model.preset")]
    for key, value in settings.items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    return command


def run_to_the_end(run: Path, **changed: Any) -> None:
    """Train without a stop."""
    subprocess.run(train_command(run, **changed), check=True, timeout=1800)


def outcome(run: Path) -> dict[str, Any]:
    """What must not depend on stops: losses, evaluations, and the last checkpoint's checksums."""
    records = read_metrics(run / "metrics.jsonl")
    last = read_state(list_checkpoints(run)[-1])
    return {
        "losses": [
            (r["update"], r["loss"], r["grad_norm"]) for r in records if r["kind"] == "update"
        ],
        "evals": [(r["update"], r["loss"]) for r in records if r["kind"] == "eval"],
        "sha256": last["sha256"],
        "best": (last["best_update"], last["best_val_loss"]),
    }


def interrupt_until_done(
    run: Path,
    interruptions: int,
    seed: int,
    number: int = signal.SIGKILL,
    **changed: Any,
) -> list[dict[str, Any]]:
    """Interrupt a run `interruptions` times at random moments, then let it finish.

    Moments are drawn over the whole life of a process, its start included. Returns, for each
    interruption, the seconds it ran, its exit code, and the updates that will be done again.
    """
    rng = random.Random(seed)
    story = []
    finished = False
    for _ in range(interruptions):
        resume = (run / "run.json").exists()
        if not resume:
            # killed while the folder was being made
            shutil.rmtree(run, ignore_errors=True)
        started = time.monotonic()
        process = subprocess.Popen(train_command(run, resume, **changed))
        if rng.random() < 0.8:
            _wait_for_progress(run, process)
        time.sleep(rng.random() * 0.5)
        os.kill(process.pid, number) if process.poll() is None else None
        code = process.wait(timeout=1800)
        story.append(
            {
                "seconds": round(time.monotonic() - started, 2),
                "exit": code,
                "updates_lost": _updates_lost(run),
            }
        )
        finished = code == 0
        if finished:
            break
    if not finished:
        subprocess.run(train_command(run, resume=True, **changed), check=True)
    return story


def _updates_lost(run: Path) -> int:
    """Updates that telemetry knows of and the newest checkpoint does not hold."""
    checkpoints = list_checkpoints(run)
    path = run / "metrics.jsonl"
    done = (
        [r["update"] for r in read_metrics(path) if r["kind"] == "update"] if path.exists() else []
    )
    return max(done, default=0) - (read_state(checkpoints[-1])["update"] if checkpoints else 0)


def _wait_for_progress(run: Path, process: subprocess.Popen[bytes]) -> None:
    """Until this process has written telemetry, or ended."""
    path = run / "metrics.jsonl"
    before = path.stat().st_size if path.exists() else 0
    deadline = time.monotonic() + 1800
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and path.stat().st_size > before + 200:
            return
        time.sleep(0.01)


def stop_before(monkeypatch, micro_step: int) -> None:
    """Send this process SIGTERM as its training begins such a micro-step, counted from 1."""
    run, count = Trainer._micro_step, 0

    def counted(self):
        nonlocal count
        count += 1
        if count == micro_step:
            os.kill(os.getpid(), signal.SIGTERM)
        run(self)

    monkeypatch.setattr(Trainer, "_micro_step", counted)
