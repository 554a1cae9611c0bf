"""weight-mutability: its cases, on a CPU and on a GPU, and what a record of either says.

Rows of a GPU say `by` what a way is run; those of a CPU are all ML Programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from onelaunch.bench.core.findings import Finding, Verdict, needs_a_mac
from onelaunch.bench.core.published import PUBLISHED
from onelaunch.bench.core.tables import digits, document, markdown, spread

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
    """Of each way that the study tried, where the device has it."""
    rows, found = {row["case"]: row for row in record["rows"]}, []
    for answer in ANSWERS:
        case = answer.on_gpu if _on_gpu(record) else answer.on_cpu
        if case not in rows:
            continue
        row = rows[case]
        verdict, why = _judged_on_gpu(rows, row) if _on_gpu(record) else _judged(row)
        told = str(PUBLISHED[answer.key].values["told"])
        found.append(Finding((answer.key,), answer.claim, told, in_words(row), verdict, why))
    return found


def _judged(row: Mapping[str, Any]) -> tuple[Verdict, str]:
    if row["case"] == FILE:  # when the file is read is the evaluator's affair, not the program's
        return needs_a_mac("this package's evaluator reads it once; when Core ML does is not known")
    took = "took it, and its result is right" if row["follows"] else "took it"
    return needs_a_mac(
        f"the public converter {took if row['converts'] else 'refuses it too'}; what the private "
        "parser refuses, and what a Neural Engine runs, it does not say"
    )


def _judged_on_gpu(
    rows: Mapping[str, Mapping[str, Any]], row: Mapping[str, Any]
) -> tuple[Verdict, str]:
    took = _median(row["change_ms"])
    if row["case"] == OTHERS:
        why = (
            "a CUDA graph reads the buffers that it was captured with; packed into others and "
            f"captured again, {took} ms, it follows"
        )
        return "confirmed" if row["follows_loaded_anew"] and not row["follows"] else "refuted", why
    why = f"kernels read weights from memory; {took} ms of packing"
    if CONSTEXPR in rows:
        why += f", where a constant is {_median(rows[CONSTEXPR]['convert_ms'])} ms of compiling"
    return "refuted" if row["follows"] and not row["compiled_anew"] else "confirmed", why


def table(record: dict[str, Any]) -> str:
    """In Markdown."""
    parts = _of_kernels(record) if _on_gpu(record) else _of_programs(record)
    return document(record, "Weights that are no constants, on", *parts)


def _of_programs(record: dict[str, Any]) -> list[str]:
    rows = record["rows"]
    told = {each.on_cpu: str(PUBLISHED[each.key].values["told"]) for each in ANSWERS}
    lines = [
        [
            row["case"], "yes" if row["converts"] else "no",
            "loaded anew" if row.get("follows_loaded_anew") else "yes" if row["follows"] else "no",
            digits(row["ours"]) if row["converts"] else "-", spread(row), _to_change(row),
            _median(row.get("convert_ms", {})), told.get(row["case"], "-"),
        ]
        for row in rows
    ]  # fmt: skip
    parts = [
        f"One linear map, {COLUMNS} to {OUT}, of {WIDTH} tokens. A result follows where it is "
        f"within {MOST_APART:g} of float64 with one weight and then with another; a program with "
        "constants does so compiled anew. Milliseconds of evaluating the saved program on this "
        "CPU in float32: they say nothing about the Neural Engine, nor whether it takes the "
        "program at all.",
        markdown(
            [
                "weights are", "converts", "result follows", "evaluating, ms", "p20-p80",
                "to change them, ms", "converting, ms", "the study",
            ],
            lines,
        ),
    ]  # fmt: skip
    refused = [f"{row['case']}: {row['refused']}" for row in rows if row.get("refused")]
    if refused:
        parts.append("Refused: " + "; ".join(refused) + ".")
    parts.append(
        "In a state the weights are written by the host before a call; that is not timed here. "
        "The study calls its emitter of products never called; of this package every emitter is "
        "reached (tests/engines/coreml/test_weights_as_constants.py)."
    )
    return parts


def _of_kernels(record: dict[str, Any]) -> list[str]:
    told = {each.on_gpu: str(PUBLISHED[each.key].values["told"]) for each in ANSWERS}
    lines = [
        [
            row["case"], row["by"],
            "captured anew" if row.get("follows_loaded_anew") else
            "compiled anew" if row["compiled_anew"] and row["follows"] else
            "yes" if row["follows"] else "no",
            digits(row["ours"]), spread(row), _to_change(row), told.get(row["case"], "-"),
        ]
        for row in record["rows"]
    ]  # fmt: skip
    header = [
        "weights are", "of", "result follows", "running, ms", "p20-p80", "to change them, ms",
        "the study",
    ]  # fmt: skip
    parts = [
        f"The forward of {MODEL}, {TOKENS} tokens, bfloat16, by the CUDA engine's kernels as a "
        "graph and by PyTorch; and a small kernel in float32. A result follows where it is within "
        f"{MOST_APART_BFLOAT16:g} of float64 ({MOST_APART:g} in float32) with one set of weights "
        "and then with another. PyTorch and the small kernel are called from Python: what running "
        "takes is no comparison of the ways.",
        markdown(header, lines, left=2),
    ]
    others = next((row for row in record["rows"] if row["case"] == OTHERS), None)
    if others is not None:
        parts.append(
            "To change arguments is to pack them, from float32 weights on the GPU. Under a graph "
            "captured with other buffers, which are still there, the result stays that of the "
            f"old weights; of the milliseconds to change them then {_median(others['convert_ms'])} "
            "are the capture. A constant is changed by compiling its kernel, which is not in "
            "Triton's store before."
        )
    return parts


def _on_gpu(record: dict[str, Any]) -> bool:
    return any("by" in row for row in record["rows"])


def _to_change(row: Mapping[str, Any]) -> str:
    return _median(row.get("convert_ms" if row.get("compiled_anew") else "change_ms", {}))


def _median(found: Mapping[str, Any]) -> str:
    return digits(found.get("median"))


def in_words(row: Mapping[str, Any]) -> str:
    """How a way took new weights."""
    if not row["converts"]:
        return "refused"
    if row.get("follows_loaded_anew"):
        loaded = "captured" if "by" in row else "loaded"
        return f"no effect on what is {loaded}, taken when {loaded} anew"
    follows = "the result follows" if row["follows"] else "the result does not follow"
    told = follows if "by" in row else f"converts, {follows}"
    return f"{told}{', compiled anew' if row['compiled_anew'] else ''}"
