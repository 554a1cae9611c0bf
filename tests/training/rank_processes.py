"""Start the processes of a run as torchrun does, but forked from one that has imported PyTorch once
for all of them: on two busy cores an import takes four seconds."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).parents[2]
SECONDS = 120.0


class Launcher:
    """The process from which ranks are forked; ended with the context."""

    def __enter__(self) -> Launcher:
        command = [sys.executable, "-m", __name__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT, text=True)
        return self

    def __exit__(self, *raised: object) -> None:
        self._process.kill()
        self._process.communicate()

    def start(self, folder: Path, n_ranks: int, words: list[str]) -> RankProcesses:
        """Start ranks that run `onelaunch` with these words; or, after a first word `call`, the
        function MODULE:FUNCTION with the words that follow. In a new folder rank r's output is
        r.out and r.err, its process id r.pid, and once it has ended its exit status r.code."""
        folder.mkdir(parents=True)
        # held by torchrun itself, too
        store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
        )
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "WORLD_SIZE": str(n_ranks),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        request = {"folder": str(folder), "words": words, "environment": environment}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return RankProcesses(folder, n_ranks, store)


class RankProcesses:
    """Processes that a launcher started; ended with the context."""

    def __init__(self, folder: Path, n_ranks: int, store: dist.Store) -> None:
        self.folder, self._ranks, self._store = folder, range(n_ranks), store

    def __enter__(self) -> RankProcesses:
        return self

    def __exit__(self, *raised: object) -> None:
        wait_until(lambda: all((self.folder / f"{rank}.pid").exists() for rank in self._ranks))
        for rank in self._ranks:
            if self.code(rank) is None:
                self.signal(rank, signal.SIGKILL)

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to one rank."""
        os.kill(int((self.folder / f"{rank}.pid").read_text()), number)

    def code(self, rank: int) -> int | None:
        """The exit status of a rank, negative for a signal; None while it runs."""
        path = self.folder / f"{rank}.code"
        return int(path.read_text()) if path.exists() else None

    def codes(self, seconds: float = SECONDS) -> list[int]:
        """Wait until all have ended; their exit statuses."""
        wait_until(lambda: None not in map(self.code, self._ranks), seconds)
        return [self.code(rank) for rank in self._ranks]

    def errors(self) -> list[list[str]]:
        """The lines of each rank's standard error."""
        return [(self.folder / f"{rank}.err").read_text().splitlines() for rank in self._ranks]

    def output(self) -> str:
        """All standard output."""
        return "".join((self.folder / f"{rank}.out").read_text() for rank in self._ranks)


def wait_until(condition: Callable[[], bool], seconds: float = SECONDS) -> None:
    """Wait until a condition holds; fails after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def _fork(folder: Path, words: list[str], environment: dict[str, str]) -> None:
    ranks = {}
    for rank in range(int(environment["WORLD_SIZE"])):
        pid = os.fork()
        if not pid:
            os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
            os._exit(_run(folder, rank, words))
        _write(folder / f"{rank}.pid", pid)
        ranks[pid] = rank
    while ranks:
        pid, status = os.wait()
        _write(folder / f"{ranks.pop(pid)}.code", os.waitstatus_to_exitcode(status))


def _write(path: Path, number: int) -> None:
    path.with_suffix(".tmp").write_text(str(number))
    path.with_suffix(".tmp").rename(path)


def _run(folder: Path, rank: int, words: list[str]) -> int:
    for descriptor, name in ((0, os.devnull), (1, f"{rank}.out"), (2, f"{rank}.err")):
        os.dup2(os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o600), descriptor)
    try:
        if words[0] == "call":
            module, _, name = words[1].partition(":")
            getattr(importlib.import_module(module), name)(*words[2:])
        else:
            importlib.import_module("onelaunch.cli").main(words)
    except SystemExit as leaving:
        return int(leaving.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in ("torch._dynamo", "onelaunch.training.train", "onelaunch.cli.app"):
        importlib.import_module(name)  # optimizers import the first
    for line in sys.stdin:
        request = json.loads(line)
        _fork(Path(request["folder"]), request["words"], request["environment"])
