"""What the record of generate looks like as tables and as a picture."""

from __future__ import annotations

from typing import Any

from onelaunch.bench.core import plots
from onelaunch.bench.core.tables import digits, document, markdown, spread

Record = dict[str, Any]
Rows = list[dict[str, Any]]

PEERS = ("run.c", "llama.cpp", "bare loop", "reference")
EXPLANATION = (
    "Greedy, one text. `of reading`: weight bytes read a second, over what as many threads reach "
    "reading the packed weights and doing nothing else (the best of 15 passes, in each round). A "
    "model that a cache holds is read from there. In brackets the median of the rounds' ratios, "
    "ours over the peer. Peers of automatic threads have every core. run.c computes in float32."
)


def table(record: Record) -> str:
    """In Markdown: speeds beside the peers', then each of the other rows."""
    rows = record["rows"]
    parts = [EXPLANATION]
    if speeds := _speeds(rows):
        parts.append(f"## Tokens a second\n\n{_speed_table(speeds)}")
    parts += [
        f"## {title}\n\n{make(found)}"
        for kind, title, make in _SECTIONS
        if (found := [row for row in rows if row.get("kind") == kind])
    ]
    return document(record, "Generation on", *parts)


def _speeds(rows: Rows) -> Rows:
    return [row for row in rows if "gb_s" in row]


def _beside(row: dict[str, Any], names: tuple[str, ...]) -> list[str]:
    """Each peer's figure with the ratio to it."""
    ratios = row["ratios"]
    return [
        f"{digits(value)} ({ratios[name]:.2f}x)" if (value := row["peers"].get(name)) else "-"
        for name in names
    ]


def _speed_table(rows: Rows) -> str:
    lines = [
        [
            row["case"],
            digits(row["ours"]),
            spread(row),
            digits(row["gb_s"]),
            digits(row["read_gb_s"]),
            f"{row['share_of_read']:.0%}",
            *_beside(row, PEERS),
        ]
        for row in rows
    ]
    header = ["tokens/s", "ours", "p20-p80", "GB/s", "reading, GB/s", "of reading", *PEERS]
    return markdown(header, lines)


def _prompt_table(rows: Rows) -> str:
    names = ("run.c", "reference")
    lines = [[r["case"], digits(r["ours"]), spread(r), *_beside(r, names)] for r in rows]
    text = markdown(["tokens/s read", "ours", "p20-p80", *names], lines)
    return f"{text}\n\nrun.c takes a prompt one token at a time, as it writes."


def _busy_table(rows: Rows) -> str:
    lines = [
        [
            row["who"],
            digits(row["idle"]["median"]),
            digits(row["ours"]),
            spread(row),
            digits(row["least"]),
            f"{row['busy_over_idle']:.2f}x",
        ]
        for row in rows
    ]
    return markdown(["tokens/s", "alone", "beside it", "p20-p80", "least", "ratio"], lines)


def _start_table(rows: Rows) -> str:
    parts = ("import_seconds", "ready_seconds")
    lines = [
        [r["case"], digits(r["ours"]), spread(r), *(digits(r[part]["median"]) for part in parts)]
        for r in rows
    ]
    return markdown(["s", "all", "p20-p80", "imports", "load and pack"], lines)


def _memory_table(rows: Rows) -> str:
    keys = ("weights_mb", "cache_mb", "allowed_mb")
    lines = [
        [r["case"], digits(r["ours"]), *(digits(r[k]) for k in keys), str(r["within"]).lower()]
        for r in rows
    ]
    header = ["MB", "growth", "packed weights", "cache", "with 64 MiB: allowed", "within"]
    return markdown(header, lines)


_COLD = {
    "swap_seconds": "swap after, s",
    "median_gap_before_ms": "between tokens before, ms",
    "longest_gap_at_swap_ms": "longest near the swap, ms",
    "longest_gap_ms": "longest, ms",
    "median_gap_after_ms": "after, ms",
}


def _cold_table(rows: Rows) -> str:
    lines = [
        [r["case"], digits(r["ours"]), *(digits(r[key]["median"]) for key in _COLD)] for r in rows
    ]
    return markdown(["", "first token, s", *_COLD.values()], lines)


_SECTIONS = (
    ("prompt", "A prompt read", _prompt_table),
    ("busy", "While another process keeps a core busy", _busy_table),
    ("start", "A second start: from the first import to the compiled form", _start_table),
    ("memory", "Memory of a process's own, from the imports to the end of a text", _memory_table),
    ("cold", "A first start: the program is compiled while the text grows", _cold_table),
)


def draw(record: Record) -> plots.Figure | None:
    """Bars: tokens a second of ours and the peers, relative to ours; None without speeds."""
    rows = _speeds(record["rows"])
    series = {"ours": {row["case"]: 1.0 for row in rows}} | {
        peer: {row["case"]: 1 / row["ratios"][peer] for row in rows if peer in row["ratios"]}
        for peer in PEERS
    }
    return plots.bars(
        f"Generation on {record['device']}",
        {name: values for name, values in series.items() if values},
        "speed relative to ours (medians of rounds)", "", across=True, at=1,
    )  # fmt: skip
