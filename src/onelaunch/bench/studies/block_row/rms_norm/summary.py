"""A summary of the record of rms-norm: means, the worst shapes, and whether our RMSNorm
is as fast as the project wants it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from onelaunch.bench.core.tables import geometric_mean
from onelaunch.bench.studies.block_row.norm_cell import bytes_moved, shape_of

Rows = list[dict[str, Any]]

# What the project wants of its RMSNorm on an H200. Kernels only, ours against the best peer of each
# shape: time at most, and the geometric mean of speed at least.
FULL_TIME, FULL_MEAN_SPEED = 1.02, 1.25
# Forward: this much of the best peer's time or so many microseconds more, whichever is larger.
FORWARD_TIME, FORWARD_MORE_US, FORWARD_MEAN_SPEED = 1.03, 0.1, 0.99
# Share of the bandwidth of a copy, at least, from so many megabytes moved on.
COPY_SHARES = (("forward", 250.0, 0.95), ("full", 150.0, 0.82), ("full", 600.0, 0.88))
# Eager, host included: time of forward and backward at most, by peer.
HOST_TIMES = (("torch", 1.25), ("liger", 0.5))
# The widths of the published table in which the block path is taken.
PUBLISHED_COLUMNS = 512

ELEMENT_BYTES = 2  # of bfloat16, in which a GPU is measured


def summary(kinds: dict[str, Rows]) -> list[str]:
    """Lines of a Markdown list. `kinds`: the rows by kind of case, `full gpu` and so on."""
    lines = [line for kind, rows in kinds.items() for line in _means(kind, rows)]
    wanted = [*_against_peers(kinds), *_copy_shares(kinds), *_host(kinds), *_published(kinds)]
    return [*lines, *wanted, *_memory(kinds)]


def best_time(row: dict[str, Any]) -> float | None:
    """The best time of the peers; None where there is none."""
    return min(row["peers"].values(), default=None)


def _means(kind: str, rows: Rows) -> Iterable[str]:
    rated = [row for row in rows if "ratio" in row]
    if not rated:
        return
    mean = geometric_mean([1 / row["ratio"] for row in rated])
    worst = sorted(rated, key=lambda row: row["ratio"], reverse=True)[:3]
    slowest = ", ".join(f"{_name(row)} {row['ratio']:.3f} of {row['best_peer']}" for row in worst)
    yield (
        f"- {kind}: {mean:.3f}x the speed of the best peer (geometric mean of {len(rated)}); "
        f"slowest against it: {slowest}"
    )


def _against_peers(kinds: dict[str, Rows]) -> Iterable[str]:
    full = _rated(kinds.get("full gpu", []))
    if full:
        over = [f"{_name(r)} {r['ours'] / b:.3f}" for r, b in full if r["ours"] > FULL_TIME * b]
        wanted = f"full gpu, at most {FULL_TIME} of the best peer's time in each shape"
        yield _verdict(wanted, over, len(full))
        yield _mean_verdict("full gpu", full, FULL_MEAN_SPEED)
    forward = _rated(kinds.get("forward gpu", []))
    if forward:
        over = [
            f"{_name(row)} {row['ours'] / best:.3f} ({row['ours'] - best:+.2f} us)"
            for row, best in forward
            if row["ours"] > max(FORWARD_TIME * best, best + FORWARD_MORE_US)
        ]
        wanted = (
            f"forward gpu, at most {FORWARD_TIME} of the best peer's time or {FORWARD_MORE_US} us "
            "more in each shape"
        )
        yield _verdict(wanted, over, len(forward))
        yield _mean_verdict("forward gpu", forward, FORWARD_MEAN_SPEED)


def _copy_shares(kinds: dict[str, Rows]) -> Iterable[str]:
    for pass_, least_mb, share in COPY_SHARES:
        rows = [
            row
            for row in kinds.get(f"{pass_} gpu", [])
            if row["floor"] is not None
            and bytes_moved(*shape_of(row), pass_, ELEMENT_BYTES) >= 1e6 * least_mb
        ]
        if rows:
            under = [
                f"{_name(row)} {100 * row['floor'] / row['ours']:.1f}%"
                for row in rows
                if row["floor"] < share * row["ours"]
            ]
            wanted = f"{pass_} gpu, at least {100 * share:.0f}% of copy bandwidth"
            yield _verdict(f"{wanted} from {least_mb:.0f} MB moved", under, len(rows))


def _host(kinds: dict[str, Rows]) -> Iterable[str]:
    for peer, most in HOST_TIMES:
        rows = [row for row in kinds.get("full host", []) if row["peers"].get(peer)]
        # of the plain form, which runs on a CPU, nothing is wanted
        rows = [row for row in rows if row.get("kernel") is None]
        if rows:
            ratios = {_name(row): row["ours"] / row["peers"][peer] for row in rows}
            over = [f"{name} {ratio:.2f}" for name, ratio in ratios.items() if ratio > most]
            measured = f"measured {min(ratios.values()):.2f} to {max(ratios.values()):.2f}"
            wanted = f"full host, at most {most} of {peer}'s time"
            yield f"{_verdict(wanted, over, len(rows))}; {measured}"


def _published(kinds: dict[str, Rows]) -> Iterable[str]:
    for pass_ in ("full", "backward"):
        rows = [
            row
            for row in kinds.get(f"{pass_} gpu", [])
            if "published_percent" in row and shape_of(row)[1] <= PUBLISHED_COLUMNS
        ]
        if rows:
            less = [
                f"{_name(row)} {row['percent_of_liger_row']:+.1f}%"
                for row in rows
                if row["percent_of_liger_row"] >= row["published_percent"]
            ]
            wanted = (
                f"{pass_} gpu, saves more of Liger's row path than the source did, "
                f"up to {PUBLISHED_COLUMNS} wide"
            )
            yield _verdict(wanted, less, len(rows))


def _memory(kinds: dict[str, Rows]) -> Iterable[str]:
    rows = [row for row in kinds.get("memory", []) if row.get("planned")]
    if rows:
        worst = max(rows, key=lambda row: row["ours"] - row["planned"])
        over = worst["ours"] - worst["planned"]
        yield (
            "- memory, nothing but y, dX, dW and the planned partials: "
            f"{'yes' if over <= 0 else 'no'}, at most {over / 1e3:+,.1f} kB "
            f"({100 * over / worst['planned']:+.1f}%) in {len(rows)} shapes, at {_name(worst)}"
        )


def _rated(rows: Rows) -> list[tuple[dict[str, Any], float]]:
    return [(row, best) for row in rows if (best := best_time(row)) is not None]


def _mean_verdict(kind: str, rated: Sequence[tuple[dict[str, Any], float]], least: float) -> str:
    mean = geometric_mean([best / row["ours"] for row, best in rated])
    reached = "yes" if mean >= least else "no"
    return f"- {kind}, at least {least}x the best peer's speed on average: {reached}, {mean:.3f}x"


def _verdict(wanted: str, failing: Sequence[str], count: int) -> str:
    if not failing:
        return f"- {wanted}: yes, in all {count}"
    return f"- {wanted}: no, not in {len(failing)} of {count}: {', '.join(failing)}"


def _name(row: dict[str, Any]) -> str:
    return str(row["case"].split()[0])
