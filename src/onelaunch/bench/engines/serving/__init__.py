"""serve: a server under load, compared with llama.cpp's on the same GGUF file.

stories15m's shape with random weights in bfloat16. 1, 8 and 32 clients stream completions of 128
tokens of prompts of 32, one after the other, over connections of their own; greedy, and no prompt
is like another. Both servers run with their defaults and as many threads as there are cores, in
processes of their own; llama.cpp with a slot for each client. In every round each has the same
clients once, one server after the other; the client shares the cores with them. Tokens a second
are those of all clients, from the first request to the last token. First tokens are over all
rounds.

It wants llama.cpp: the package xllamacpp here, or `--peer llama.cpp=PYTHON`, a Python that has it.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from onelaunch.bench.core.compiled import compiled_program
from onelaunch.bench.core.record import Log, Row
from onelaunch.bench.core.rounds import ratio
from onelaunch.bench.core.tables import by_columns, document, figure
from onelaunch.bench.engines.serving.load import Answers, run_load
from onelaunch.bench.engines.serving.model import write_model
from onelaunch.bench.engines.serving.servers import ours, theirs
from onelaunch.bench.peers import llama_cpp
from onelaunch.errors import BadInput

UNIT = "tokens/s"
PEERS = (llama_cpp.NAME,)
MODEL, DTYPE = "stories15m", "bf16"
PROMPT, TOKENS = 32, 128
REQUESTS = {1: 8, 8: 3, 32: 2}
"""Requests of each client in a round, by the number of clients."""
ROUNDS, QUICK_ROUNDS = 9, 2
OURS, THEIRS = "ours", llama_cpp.NAME


def run(device: str, quick: bool, log: Log, peers: Mapping[str, Path]) -> Iterator[Row]:
    """Yields rows of tokens a second, higher is better, and of first tokens in ms."""
    python = peers.get(llama_cpp.NAME) or llama_cpp.installed_here()
    if python is None:
        raise BadInput(
            f"serve: pass --peer {llama_cpp.NAME}=PYTHON, a Python that has the package xllamacpp"
        )
    compiled_program(log)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / f"{MODEL}.gguf"
        write_model(MODEL, path)
        for clients, requests in REQUESTS.items():
            with ours(path, device) as here, theirs(python, path, clients) as there:
                ports = {OURS: here, THEIRS: there}
                for port in ports.values():  # threads, caches and slots are warm
                    run_load(port, clients, 1, PROMPT, 16, seed=0)
                answers: dict[str, list[Answers]] = {who: [] for who in ports}
                for number in range(QUICK_ROUNDS if quick else ROUNDS):
                    for who in list(ports)[:: -1 if number % 2 else 1]:
                        answers[who].append(
                            run_load(ports[who], clients, requests, PROMPT, TOKENS, number)
                        )
            yield from _rows(clients, answers)


def _rows(clients: int, answers: Mapping[str, list[Answers]]) -> Iterator[Row]:
    case = f"{MODEL} {DTYPE}, {clients} client{'s' if clients > 1 else ''}"
    rates = {who: [each.rate for each in of] for who, of in answers.items()}
    notes: dict[str, Any] = {
        "kind": "rate",
        "clients": clients,
        "requests": sum(len(each.firsts) for each in answers[OURS]),
        "ratio": round(ratio(rates[OURS], rates[THEIRS]), 4),
    }
    peers = {THEIRS: statistics.median(rates[THEIRS])}
    yield Row.of(f"{case}, tokens/s", rates[OURS], peers=peers, notes=notes)
    firsts = {who: [1e3 * s for each in of for s in each.firsts] for who, of in answers.items()}
    for percent in (50, 99):
        of = {who: _percentile(values, percent) for who, values in firsts.items()}
        yield Row(
            f"{case}, first token p{percent}, ms",
            of[OURS],
            n=len(firsts[OURS]),
            peers={THEIRS: of[THEIRS]},
            notes={"kind": "first", "unit": "ms", "ratio": round(of[OURS] / of[THEIRS], 4)},
        )


def _percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def table(record: dict[str, Any]) -> str:
    """The record's table in Markdown."""
    text = by_columns(
        record["rows"],
        {
            "case": figure("case", form=str),
            "ours": figure("ours"),
            "llama.cpp": figure("peers", THEIRS),
            "ours / llama.cpp": figure("ratio", form=".2f"),
            "n": figure("n", form=str),
        },
    )
    words = (
        "Completions of 128 tokens streamed to clients that send one request after the other; "
        "prompts of 32 tokens; bfloat16, greedy. n: rounds, or requests where a row is of first "
        "tokens. llama.cpp has a slot for each client."
    )
    return document(record, "A server under load on", words, text)
