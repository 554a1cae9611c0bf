"""Tables and plot of a record of generate."""

from __future__ import annotations

from typing import Any, NamedTuple

from onelaunch.bench.core import plots
from onelaunch.bench.core.tables import Cell, by_columns, digits, document, figure, spread

Record = dict[str, Any]

PEERS = ("run.c", "llama.cpp", "bare loop", "reference")
EXPLANATION = (
    "Greedy, one sequence. `of reading`: weight bytes read a second, over what as many threads "
    "reach that do nothing but read the packed weights (the best of 15 passes, in each round). A "
    "model that fits into a cache is read from there. In brackets the median of the rounds' "
    "ratios, ours over the peer. Peers of automatic threads use every core. run.c computes "
    "in float32."
)


class Section(NamedTuple):
    """A table of the rows of one kind."""

    title: str
    columns: dict[str, Cell]
    note: str = ""


def _of_peers(*names: str) -> dict[str, Cell]:
    """Each peer's figure, and in brackets the ratio to it."""

    def cell_of(name: str) -> Cell:
        def cell(row: Any) -> str:
            value = row["peers"].get(name)
            return f"{digits(value)} ({row['ratios'][name]:.2f}x)" if value else "-"

        return cell

    return {name: cell_of(name) for name in names}


def _yes(value: float) -> str:
    return "yes" if value else "no"


CASE, OURS = figure("case", form=str), figure("ours")
SECTIONS = {
    "speed": Section(
        "Tokens a second",
        {
            "tokens/s": CASE, "ours": OURS, "p20-p80": spread, "GB/s": figure("gb_s"),
            "reading, GB/s": figure("read_gb_s"),
            "of reading": figure("share_of_read", form=".0%"), **_of_peers(*PEERS),
        },
    ),
    "prompt": Section(
        "A prompt read",
        {
            "tokens/s read": CASE, "ours": OURS, "p20-p80": spread,
            **_of_peers("run.c", "reference"),
        },
        "run.c takes a prompt one token at a time, as it writes.",
    ),
    "gpu": Section(
        "Tokens a second of all sequences, the whole call",
        {
            "tokens/s": CASE, "ours": OURS, "p20-p80": spread,
            "a token, us": figure("slope_us", "median"),
            "first token, ms": figure("first_token_ms", "median"),
            "of 512, ms": figure("first_token_512_ms", "median"),
            "after a cancel, ms": figure("after_cancel_ms", "median"),
            **_of_peers("torch.compile + graph", "eager + graph", "eager", "transformers"),
        },
        "Greedy, prompts of 32 tokens, 256 new ones, bfloat16. `a token`: the slope between 16 and "
        "272 new tokens. `of 512`: the first token after a prompt of 512. `after a "
        "cancel`: the first token of a sequence that waited for the place of one that was "
        "cancelled. Peers have a static cache, and their graphs one token each.",
    ),
    "gpu start": Section(
        "The first text of a process, from the imports and the GPU's context on",
        {
            "s": CASE, "first token": OURS, "p20-p80": spread,
            "its last": figure("text_seconds", "median"),
            "kernels there": figure("kernels_seconds", "median"),
            "PyTorch wrote it": figure("by_pytorch", "median", form=_yes),
        },
        "A prompt of 32 tokens, 64 new ones, bfloat16.",
    ),
    "busy": Section(
        "While another process keeps a core busy",
        {
            "tokens/s": figure("who", form=str), "alone": figure("idle", "median"),
            "with it": OURS, "p20-p80": spread, "least": figure("least"),
            "ratio": figure("busy_over_idle", form=lambda ratio: f"{ratio:.2f}x"),
        },
    ),
    "start": Section(
        "A second start: from the first import to the compiled form",
        {
            "s": CASE, "all": OURS, "p20-p80": spread,
            "imports": figure("import_seconds", "median"),
            "load and pack": figure("ready_seconds", "median"),
        },
    ),
    "memory": Section(
        "Memory of a process's own, from the imports to the end of a sequence",
        {
            "MB": CASE, "growth": OURS, "packed weights": figure("weights_mb"),
            "cache": figure("cache_mb"), "with 64 MiB: allowed": figure("allowed_mb"),
            "within": figure("within", form=lambda within: str(within).lower()),
        },
    ),
    "cold": Section(
        "A first start: the program is compiled while the sequence grows",
        {
            "": CASE, "first token, s": OURS, "swap after, s": figure("swap_seconds", "median"),
            "between tokens before, ms": figure("median_gap_before_ms", "median"),
            "longest near the swap, ms": figure("longest_gap_at_swap_ms", "median"),
            "longest, ms": figure("longest_gap_ms", "median"),
            "after, ms": figure("median_gap_after_ms", "median"),
        },
    ),
}  # fmt: skip
"""By the `kind` of the rows; rows of speed have none."""


def table(record: Record) -> str:
    """The record's tables in Markdown: speeds compared with the peers', then each of the other
    kinds of rows."""
    parts = [EXPLANATION] if _of_kind(record, "speed") else []
    for kind, section in SECTIONS.items():
        if rows := _of_kind(record, kind):
            parts += [f"## {section.title}", by_columns(rows, section.columns)]
            parts += [section.note] if section.note else []
    return document(record, "Generation on", *parts)


def _of_kind(record: Record, kind: str) -> list[dict[str, Any]]:
    return [row for row in record["rows"] if row.get("kind", "speed") == kind]


def draw(record: Record) -> plots.Figure | None:
    """Bars: tokens a second of ours and the peers, relative to ours; None without speeds."""
    rows = [*_of_kind(record, "speed"), *_of_kind(record, "gpu")]
    names = dict.fromkeys(peer for row in rows for peer in row["ratios"])
    series = {"ours": {row["case"]: 1.0 for row in rows}} | {
        peer: {row["case"]: 1 / row["ratios"][peer] for row in rows if peer in row["ratios"]}
        for peer in names
    }
    return plots.bars(
        f"Generation on {record['device']}",
        {name: values for name, values in series.items() if values},
        "speed relative to ours (medians of rounds)", "", across=True, at=1,
    )  # fmt: skip
