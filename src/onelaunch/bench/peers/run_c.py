"""llama2.c's run.c, as its user builds it: a program that reads a model and writes text.

It takes one token a time and computes in float32. Its rate is its own: of every token but the
first, by a clock of milliseconds. It stops where it draws token 1.
"""

from __future__ import annotations

import os
import re
import string
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from onelaunch.checkpoints.atomic import atomic_file
from onelaunch.errors import BadInput, RunFailed

NAME = "run.c"
BOS, SPACE = 1, 3
_BYTE = 3  # the id of a byte that has no piece of its own is so much larger
_DIGITS = 6
LETTERS = tuple(ord(letter) + _BYTE for letter in string.ascii_letters)
"""Ids of which a prompt may consist, behind BOS and SPACE."""
_RATE = re.compile(r"achieved tok/s: ([0-9.]+)")


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """A tokenizer.bin whose pieces are the ids themselves, in six digits: what run.c writes shows
    which tokens it drew. Only SPACE is a space, which run.c puts before every prompt."""
    with atomic_file(path) as file:
        file.write(struct.pack("<i", _DIGITS))
        for i in range(vocab_size):
            piece = b" " if i == SPACE else f"{i:0{_DIGITS}d}".encode("ascii")
            file.write(struct.pack("<fi", 0.0, len(piece)) + piece)


class RunC:
    """The program on one model (a llama2.c file, v0). Raises BadInput where it cannot be run."""

    def __init__(self, binary: Path, model: Path, vocab_size: int, max_seq_len: int) -> None:
        check_binary(binary)
        self._command = [str(binary.absolute()), str(model)]
        self._max_seq_len = max_seq_len
        self._tokenizer = model.with_suffix(".tokenizer")
        write_tokenizer(self._tokenizer, vocab_size)

    def generate(
        self, prompt: Sequence[int], n: int, threads: int, seconds: float = 300.0
    ) -> tuple[float, list[int]]:
        """Tokens a second and the new ids, greedy, of a prompt of BOS, SPACE and LETTERS.

        Raises BadInput for another prompt or one that does not fit, and RunFailed where the
        program failed, took longer than `seconds` or wrote fewer than `n`: its rate is then not
        of the whole work.
        """
        text = self._text(prompt, n)
        steps = len(prompt) - 1 + n
        options = ["-t", "0", "-n", str(steps), "-z", str(self._tokenizer), "-i", text]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        # a file: a pipe's reader would be woken at each token, and take a core from it
        with tempfile.TemporaryFile() as out:
            try:
                done = subprocess.run(
                    [*self._command, *options],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.PIPE,
                    env=environment,
                    timeout=seconds,
                )
            except subprocess.TimeoutExpired as error:
                raise RunFailed(f"{NAME}: it took longer than {seconds:g} s") from error
            out.seek(0)
            written = out.read().decode("ascii", "replace")
        log = done.stderr.decode("utf-8", "replace")
        rate = _RATE.search(log)
        if done.returncode or rate is None or not float(rate[1]):
            last = (log.strip().splitlines() or ["it printed nothing"])[-1]
            raise RunFailed(f"{NAME}: exit status {done.returncode}, no rate ({last[:100]})")
        ids = [int(piece) if piece.strip() else SPACE for piece in _PIECES.findall(written)]
        new = ids[len(prompt) - 2 :]
        if len(new) != n:
            raise RunFailed(f"{NAME}: it stopped after {len(new)} of {n} tokens")
        return float(rate[1]), new

    def _text(self, prompt: Sequence[int], n: int) -> str:
        if list(prompt[:2]) != [BOS, SPACE] or len(prompt) < 3 or set(prompt[2:]) - set(LETTERS):
            raise BadInput(f"{NAME}: a prompt must be {BOS}, {SPACE} and then ids of letters")
        if len(prompt) - 1 + n > self._max_seq_len:
            raise BadInput(f"{NAME}: {len(prompt)} and {n} tokens do not fit the model's context")
        return "".join(chr(i - _BYTE) for i in prompt[2:])


_PIECES = re.compile(rf"[0-9]{{{_DIGITS}}}| ")


def check_binary(
    binary: Path, name: str = NAME, mend: str = "build llama2.c's run.c and name it"
) -> None:
    """Raise BadInput where there is no program at this path."""
    if not binary.is_file():
        raise BadInput(f"--peer {name}={binary}: no such file; {mend}")
    if not os.access(binary, os.X_OK):
        raise BadInput(f"--peer {name}={binary}: not a program; run chmod +x on it")
