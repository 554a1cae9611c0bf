"""weight-mutability: its cases, on a CPU and on a GPU, and what a record of either says.

Rows of a GPU say `by` what a way is run; those of a CPU are all ML Programs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from onelaunch.bench.core.findings import Finding, Verdict, needs_a_mac
from onelaunch.bench.core.tables import digits, document, spread
from onelaunch.bench.core.views import column, median_and_spread, statement, table_of

COLUMNS, OUT, WIDTH = 288, 768, 64
"""Of the map, and of how many tokens: the first of stories15M's feed-forward."""
MOST_APART = 1e-4
"""Error of a result in float32 against float64, relative; other weights are 1.4 apart."""
MODEL, TOKENS = "stories15m", 64
"""Of the forward on a GPU."""
MOST_APART_BFLOAT16 = 0.05
"""Error of its logits against float64, relative; those of other weights are 1.4 apart."""

CONSTANTS, FILE, INPUTS = "constants", "a weight file overwritten", "an input of a convolution"
PRODUCT, LINEAR = "an input of a matmul", "an input of a linear layer"
PACKED, KEPT = "packed into the input's channels", "a state"
ARGUMENTS = "arguments, packed into the same buffers"
OTHERS = "arguments, packed into other buffers than those captured"
CONSTEXPR = "a constant of a kernel"
EAGER = "PyTorch's parameters, changed in place"
Row = Mapping[str, Any]


class Answer(NamedTuple):
    """A published row, the cases that answer it on a CPU and on a GPU, and what it claims."""

    key: str
    on_cpu: str
    on_gpu: str | None
    claim: str


ANSWERS = (
    Answer("mutable-inputs", INPUTS, ARGUMENTS, "weights as an input of the program are refused"),
    Answer("mutable-packed", PACKED, None, "weights packed into the channels are refused"),
    Answer(
        "mutable-file", FILE, OTHERS,
        "overwriting the file of weights has no effect on what is loaded",
    ),
    Answer("mutable-matmul", PRODUCT, None, "an emitter of products would be refused alike"),
)  # fmt: skip


def findings(record: dict[str, Any]) -> list[Finding]:
    """A finding for each way that the study tried, where the device has it."""
    rows, gpu, results = {row["case"]: row for row in record["rows"]}, _on_gpu(record), []
    for answer in ANSWERS:
        if row := rows.get(answer.on_gpu if gpu else answer.on_cpu):
            verdict, why = _judged_on_gpu(row, rows.get(CONSTEXPR)) if gpu else _judged(row)
            theirs = statement(answer.key)
            results.append(
                Finding((answer.key,), answer.claim, theirs, in_words(row), verdict, why)
            )
    return results


def _on_gpu(record: dict[str, Any]) -> bool:
    return any("by" in row for row in record["rows"])


def _judged(row: Row) -> tuple[Verdict, str]:
    if row["case"] == FILE:  # when the file is read depends on the evaluator, not on the program
        return needs_a_mac("this package's evaluator reads it once; when Core ML does is not known")
    took = "took it, and its result is right" if row["follows"] else "took it"
    return needs_a_mac(
        f"the public converter {took if row['converts'] else 'refuses it too'}; what the private "
        "parser refuses, and what a Neural Engine runs, it does not say"
    )


def _judged_on_gpu(row: Row, constant: Row | None) -> tuple[Verdict, str]:
    took = _median(row["change_ms"])
    if row["case"] == OTHERS:
        why = (
            "a CUDA graph reads the buffers that it was captured with; packed into others and "
            f"captured again, {took} ms, it follows"
        )
        return "confirmed" if row["follows_loaded_anew"] and not row["follows"] else "refuted", why
    why = f"kernels read weights from memory; {took} ms of packing"
    if constant is not None:
        why += f", where a constant is {_median(constant['convert_ms'])} ms of compiling"
    return "refuted" if row["follows"] and not row["compiled_anew"] else "confirmed", why


def in_words(row: Row) -> str:
    """A description of how a way took new weights."""
    if not row["converts"]:
        return "refused"
    if row.get("follows_loaded_anew"):
        loaded = "captured" if "by" in row else "loaded"
        return f"no effect on what is {loaded}, taken when {loaded} anew"
    follows = "the result follows" if row["follows"] else "the result does not follow"
    converts = "" if "by" in row else "converts, "
    return f"{converts}{follows}{', compiled anew' if row['compiled_anew'] else ''}"


def table(record: dict[str, Any]) -> str:
    """The record's table in Markdown."""
    parts = _of_kernels(record) if _on_gpu(record) else _of_programs(record)
    return document(record, "Weights that are not constants, on", *parts)


def _of_programs(record: dict[str, Any]) -> list[str]:
    rows = record["rows"]
    refused = [f"{row['case']}: {row['refused']}" for row in rows if row.get("refused")]
    return [
        f"One linear map, {COLUMNS} to {OUT}, of {WIDTH} tokens. A result follows where it is "
        f"within {MOST_APART:g} of float64 with one weight and then with another; a program with "
        "constants does so compiled anew. Milliseconds of evaluating the saved program on this "
        "CPU in float32: they say nothing about the Neural Engine, nor whether it takes the "
        "program at all.",
        table_of(
            rows,
            column("weights are", "case"),
            ("converts", lambda row: "yes" if row["converts"] else "no"),
            ("result follows", lambda row: _follows(row, "loaded anew")),
            ("evaluating, ms", lambda row: digits(row["ours"]) if row["converts"] else "-"),
            ("p20-p80", spread),
            ("to change them, ms", _to_change),
            ("converting, ms", lambda row: _median(row.get("convert_ms", {}))),
            ("the study", _study({answer.on_cpu: answer.key for answer in ANSWERS})),
        ),
        *([f"Refused: {'; '.join(refused)}."] if refused else []),
        "In a state the weights are written by the host before a call; that is not timed here. "
        "The study calls its emitter of products never called; of this package every emitter is "
        "reached (tests/engines/coreml/test_weights_as_constants.py).",
    ]


def _of_kernels(record: dict[str, Any]) -> list[str]:
    parts = [
        f"The forward of {MODEL}, {TOKENS} tokens, bfloat16, by the CUDA engine's kernels as a "
        "graph and by PyTorch; and a small kernel in float32. A result follows where it is within "
        f"{MOST_APART_BFLOAT16:g} of float64 ({MOST_APART:g} in float32) with one set of weights "
        "and then with another. PyTorch and the small kernel are called from Python: what running "
        "takes is no comparison of the ways.",
        table_of(
            record["rows"],
            column("weights are", "case"),
            column("of", "by"),
            ("result follows", lambda row: _follows(row, "captured anew", "compiled anew")),
            *median_and_spread("running, ms"),
            ("to change them, ms", _to_change),
            ("the study", _study({each.on_gpu: each.key for each in ANSWERS if each.on_gpu})),
            left=2,
        ),
    ]
    for row in record["rows"]:
        if row["case"] == OTHERS:
            parts.append(
                "To change arguments is to pack them, from float32 weights on the GPU. Under a "
                "graph captured with other buffers, which are still there, the result stays that "
                "of the old weights; of the milliseconds to change them then "
                f"{_median(row['convert_ms'])} are the capture. A constant is changed by compiling "
                "its kernel, which is not in Triton's store before."
            )
    return parts


def _follows(row: Row, loaded_anew: str, compiled_anew: str = "yes") -> str:
    if row.get("follows_loaded_anew"):
        return loaded_anew
    if not row["follows"]:
        return "no"
    return compiled_anew if row["compiled_anew"] else "yes"


def _study(keys: Mapping[str, str]) -> Callable[[Row], str]:
    """A column of what the study says of a case."""
    return lambda row: statement(keys[row["case"]]) if row["case"] in keys else "-"


def _to_change(row: Row) -> str:
    return _median(row.get("convert_ms" if row.get("compiled_anew") else "change_ms", {}))


def _median(of: Mapping[str, Any]) -> str:
    return digits(of.get("median"))
