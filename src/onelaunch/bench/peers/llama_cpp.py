"""llama.cpp as its user gets it: the wheel xllamacpp, on a GGUF file written by the package gguf.

It runs in a process of its own (`llama_cpp_child.py`), by any Python that has the two packages: an
environment without onelaunch will do. Matrices are float32 or bfloat16, as ours; keys and values
are float16, its default.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onelaunch.bench.peers import run_c
from onelaunch.compilation.children import Child
from onelaunch.config import ModelConfig
from onelaunch.errors import BadInput, RunFailed

if TYPE_CHECKING:
    from torch import Tensor

NAME = "llama.cpp"
PACKAGES = ("xllamacpp", "gguf")
START_SECONDS = 120.0
CHILD = Path(__file__).with_name("llama_cpp_child.py")


def installed_here() -> Path | None:
    """This Python, where it has the packages."""
    return Path(sys.executable) if all(map(util.find_spec, PACKAGES)) else None


def check_python(python: Path) -> None:
    """Raise BadInput where this is no Python that has the packages."""
    run_c.check_binary(python, NAME, "name the Python of an environment that has its wheel")
    code = f"import {', '.join(PACKAGES)}"
    done = subprocess.run(
        [str(python.absolute()), "-c", code], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise BadInput(
            f"--peer {NAME}={python}: it cannot {code} ({last[:100]}); "
            f"run {python} -m pip install {' '.join(PACKAGES)}"
        )


class LlamaCpp:
    """A running child with one model and so many threads."""

    def __init__(self, child: Child) -> None:
        self._child = child

    def generate(
        self, prompt: Sequence[int], n: int, seconds: float = 300.0
    ) -> tuple[float, list[int]]:
        """Tokens a second of every token but the first, and the new ids, greedy. Raises RunFailed
        where it failed, took longer than `seconds` or wrote fewer than `n`."""
        self._child.send(json.dumps({"prompt": list(prompt), "n": n}))
        answer = json.loads(_hear(self._child, seconds))
        if "error" in answer:
            raise RunFailed(f"{NAME}: {answer['error']}")
        return float(answer["rate"]), [int(i) for i in answer["ids"]]


def _hear(child: Child, seconds: float) -> str:
    try:
        line = child.receive_within(seconds)
    except TimeoutError as error:
        raise RunFailed(f"{NAME}: it took longer than {seconds:g} s") from error
    if not line:
        raise RunFailed(f"{NAME}: {child.reason()}")
    return line


@contextmanager
def llama_cpp(
    python: Path,
    config: ModelConfig,
    weights: dict[str, Tensor],
    dtype: str,
    threads: int,
    folder: Path,
) -> Iterator[LlamaCpp]:
    """llama.cpp on these weights, which are written to `folder`, until the block ends."""
    if config.rope_layout != "interleaved" or config.qk_norm:
        raise RunFailed(f"{NAME}: this model's form is not written as GGUF here")
    model = folder / "model.npz"
    if not model.exists():
        arrays: dict[str, Any] = {k: tensor.float().numpy() for k, tensor in weights.items()}
        np.savez(model, config=np.array(json.dumps(config.to_dict())), **arrays)
    gguf = folder / f"{dtype}-{threads}.gguf"
    child = Child([str(python.absolute()), str(CHILD), str(model), str(gguf), dtype, str(threads)])
    try:
        ready = _hear(child, START_SECONDS)
        if ready != "ready":
            raise RunFailed(f"{NAME}: it printed {ready[:80]!r}")
        yield LlamaCpp(child)
    finally:
        child.end()
