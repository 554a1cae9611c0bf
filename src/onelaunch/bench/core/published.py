"""The figures of the two published studies, row by row, and which experiment answers each.

"mega-kernel": "full-transformer mega-kernel fusion + ACCUM_STEPS=100", issue 24 of a project that
trains on Apple's Neural Engine by its private interfaces; M1 Pro, macOS 26.2. "block-row": "extend
RMSNorm block-row dispatch to hidden<=512", Liger-Kernel's pull request 1238; RTX 5060 Ti, bfloat16.
Figures are theirs; the words are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Study = Literal["mega-kernel", "block-row"]


@dataclass(frozen=True)
class Published:
    """A row of a study's tables. `values` are its figures by name, the unit in the name; `answer`
    the experiment whose record answers it; where none does, `why_not` says why."""

    study: Study
    table: str
    row: str
    values: Mapping[str, float | str] = field(default_factory=dict)
    answer: str = ""
    why_not: str = ""


_Grid = Mapping[int, tuple[tuple[float, float], ...]]
_WIDTHS = (64, 128, 256, 512, 768)
_BOTH: _Grid = {
    4096: ((0.075, 0.024), (0.080, 0.034), (0.088, 0.047), (0.110, 0.059), (0.131, 0.131)),
    8192: ((0.133, 0.034), (0.141, 0.051), (0.159, 0.077), (0.198, 0.106), (0.247, 0.247)),
    16384: ((0.248, 0.051), (0.264, 0.088), (0.293, 0.131), (0.387, 0.233), (0.485, 0.484)),
    32768: ((0.477, 0.086), (0.506, 0.158), (0.584, 0.258), (0.779, 0.452), (0.946, 0.945)),
}
_BACKWARD: _Grid = {
    4096: ((0.069, 0.021), (0.071, 0.030), (0.080, 0.037), (0.096, 0.047), (0.105, 0.104)),
    8192: ((0.122, 0.028), (0.131, 0.047), (0.145, 0.061), (0.168, 0.080), (0.188, 0.188)),
    16384: ((0.229, 0.045), (0.243, 0.079), (0.265, 0.100), (0.315, 0.145), (0.353, 0.354)),
    32768: ((0.438, 0.073), (0.462, 0.133), (0.508, 0.172), (0.602, 0.274), (0.688, 0.688)),
}


def _rows(table: str, answer: str, names: str, *rows: tuple[Any, ...]) -> dict[str, Published]:
    """Rows of a table of the mega-kernel study, by key: each its key, its name, and its figures in
    the order of `names`, fewer or others by name."""
    published = {}
    for key, row, *figures in rows:
        values = dict(zip(names.split("; "), figures, strict=False))
        if figures and isinstance(figures[0], dict):
            (values,) = figures
        published[key] = Published("mega-kernel", table, row, values, answer)
    return published


def _normed(name: str, passes: str, grid: _Grid) -> dict[str, Published]:
    """Speedups of milliseconds with one row a program and with 16, by rows, then by _WIDTHS."""
    return {
        f"norm-{name}-{rows}-{width}": Published(
            "block-row", f"RMSNorm, {passes}", f"{rows} x {width}",
            {"a row a program, ms": one, "16 rows, ms": block, "speedup": round(one / block, 2)},
            "rms-norm",
        )
        for rows, times in grid.items()
        for width, (one, block) in zip(_WIDTHS, times, strict=True)
    }  # fmt: skip


PUBLISHED: dict[str, Published] = {
    **_rows(
        "feed-forward layers in one program", "fusion-depth",
        "1 layer, us; 12 in one, us; 12 apart, us; speedup; compiling, ms",
        ("ffn-64", "64/128", 183, 247, 2197, 8.9, 209),
        ("ffn-128", "128/256", 160, 344, 1921, 5.6, 145),
        ("ffn-288", "288/768", 218, 705, 2611, 3.7, 244),
        ("ffn-288-128", "288/768, 128 positions", 228, 654, 2740, 4.2, 179),
        ("ffn-768", "768/2048", 429, 1839, 5153, 2.8, 512),
    ),
    **_rows(
        "whole layers in one program", "fusion-depth",
        "one program, us; two a layer, us; calls; speedup; compiling, s",
        ("whole-15m", "stories15M, 6 layers", 728, 3039, 12, 4.17, 1.0),
        ("whole-110m", "stories110M, 12 layers", 5081, 15227, 24, 3.00, 4.2),
        ("part-110m-4", "stories110M, 4 layers", 1978, 5076, 8, 2.57, 1.0),
        ("part-110m-8", "stories110M, 8 layers", 3515, 10150, 16, 2.89, 2.5),
        ("sweet-spot", "4 of 12 layers a program", {"speedup": 7.70}),
        ("whole-over-ffn", "compared with the feed-forward alone, at 288",
         {"whole, speedup": 4.17, "feed-forward, speedup": 3.7}),
    ),
    **_rows(
        "compiling what is fused", "coreml", "4 layers, s; 8 layers, s; 12 layers, s",
        ("compile-growth", "4, 8 and 12 layers of stories110M", 1.0, 2.5, 4.2),
    ),
    **_rows(
        "compiling what is fused", "forward", "told",
        ("compile-forms", "each fused form of a model",
         "each compiled anew: 0.1 to 0.5 s of feed-forward, 1.0 to 4.2 s of whole layers"),
    ),
    **_rows(
        "the price of a call", "fusion-depth", "us",
        ("call-price", "an evaluation, without the arithmetic", 160),
    ),
    **_rows(
        "how large a program may be", "compile-budget", "MB",
        ("sram", "162 MB of weights in one", 162),
    ),
    **_rows(
        "micro-steps an update", "accumulation",
        "ms/micro-step; micro-steps/s; speedup; compiling, %",
        ("accum-10", "10", 208.6, 0.66, 1.0, 86.2),
        ("accum-50", "50", 175.4, 2.56, 3.86, 55.0),
        ("accum-100", "100", 169.4, 3.15, 4.74, 46.7),
        ("accum-500", "500", 168.7, 4.68, 7.1, 20.0),
        ("accum-learning", "what they cost in learning",
         {"told": "scale the learning rate with them; not measured"}),
    ),
    **_rows(
        "a micro-step by parts", "step-breakdown", "ms; told",
        ("part-forward", "forward", 62.5),
        ("part-forward-eval", "forward: programs", 33.3),
        ("part-forward-io", "forward: conversions", 6.7),
        ("part-forward-classifier", "forward: classifier", 6.6),
        ("part-forward-elementwise", "forward: elementwise", 15.9),
        ("part-backward", "backward", 105.9, "only the whole was measured"),
        ("part-backward-eval", "backward: programs", 66.5, "estimated"),
        ("part-backward-io", "backward: conversions", 10.5, "estimated, 8 to 13"),
        ("part-backward-classifier", "backward: classifier", 6.6, "estimated"),
        ("part-backward-cpu", "backward: copies and sums", 4.0),
        ("part-backward-dw", "backward: the weights' gradients", 29.0,
         "at the same time, awaited 0.005"),
        ("part-whole", "the micro-step", 168.7),
    ),
    **_rows(
        "warming up", "warm-up", "ms",
        ("warm-1", "micro-step 1", 258),
        ("warm-30", "micro-step 30", 175),
        ("warm-136", "from 136 on", 169),
    ),
    **_rows(
        "compilations in one process", "compile-budget", "failures",
        ("budget-312", "312 of a trainer", 0),
        ("budget-252", "252 in 4 updates of 50", 0),
        ("budget-150", "150 distinct ones", 0),
        ("budget-restart", "what a restart costs", {"s": 1.7}),
    ),
    **_rows(
        "compiled programs kept", "cache", "told",
        ("cache-key", "by hashes of program, options, weights", "kept across processes"),
        ("cache-exists", "whether one exists", "yes for kept ones"),
        ("cache-weight-free", "one without weights, another process", "hit"),
        ("cache-weights", "one with weights, after an update", "miss"),
    ),
    **_rows(
        "a line each step", "terminal-io", "micro-steps/s; slower",
        ("terminal-file", "to a file", 4.68),
        ("terminal-slow", "to a terminal", 0.63, 7.4),
    ),
    **_rows(
        "running while compiling", "overlap", "average, ms; most, ms; slowdown",
        ("overlap-alone", "alone", 0.337, 0.514),
        ("overlap-beside", "during 20 compilations", 0.381, 1.419, 1.13),
    ),
    **_rows(
        "the optimizations together", "stack", "micro-steps/s; speedup",
        ("stack-baseline", "10 micro-steps an update", 0.66, 1.0),
        ("stack-accumulation", "100 micro-steps an update", 3.15, 4.74),
        ("stack-background", "and compiling in the background", 5.24, 7.9),
        ("stack-asymptote", "no overhead at all", 5.93, 9.0),
    ),
    **_rows(
        "what the host does", "cpu-overhead", "ms",
        ("host-allocation", "133 buffers, 144 MB, allocated and freed", 0.1),
        ("host-copies", "144 MB copied", 3.4),
        ("host-sums", "24 sums, 4.7 million elements", 0.53),
    ),
    "host-sums-vector": Published(
        "mega-kernel", "what the host does", "the same by vector instructions", {"ms": 0.22},
        why_not="ours are by vector instructions already: the row above",
    ),
    **_rows(
        "what the host does", "cpu-overhead", "ms", ("host-locks", "228 pairs of locks", 0.14)
    ),
    **_rows(
        "micro-steps that hide a compilation", "recompile", "compiling, s; micro-step, s; K",
        ("hide-15m-ffn", "stories15M, feed-forward", 0.244, 0.003, 82),
        ("hide-15m", "stories15M, whole", 1.0, 0.003, 338),
        ("hide-110m-ffn", "stories110M, feed-forward", 0.512, 0.008, 64),
        ("hide-110m", "stories110M, whole", 4.2, 0.008, 520),
        ("hide-110m-4", "stories110M, 4 layers", 1.0, 0.008, 125),
    ),
    **_rows(
        "weights that are no constants", "weight-mutability", "told",
        ("mutable-inputs", "inputs of the program", "refused by the parser"),
        ("mutable-packed", "packed into the channels", "refused: convolutions want constants"),
        ("mutable-file", "a file overwritten", "no effect: baked in when compiled"),
        ("mutable-matmul", "an emitter of products", "never called; would fail alike"),
    ),
    "forward-mega": Published(
        "mega-kernel", "training", "the fused forward in a step",
        {"stories15M, saved, ms": 2.3, "stories110M, saved, ms": 10.15},
        why_not="no engine trains through a fused forward on a GPU yet; through ML Programs a "
        "step needs a Mac",
    ),
    **_rows(
        "training", "step-breakdown", "told",
        ("backward-mega", "backward in few programs", "projected: about 2x a step"),
    ),
    **_normed("both", "forward and backward", _BOTH),
    **_normed("backward", "backward", _BACKWARD),
    "norm-forward-4096-512": Published(
        "block-row", "RMSNorm, forward", "4096 x 512", {"saved, %": 8.1}, "rms-norm"
    ),
    "norm-forward-32768-512": Published(
        "block-row", "RMSNorm, forward", "32768 x 512", {"saved, %": 1.8}, "rms-norm"
    ),
    "norm-rows": Published(
        "block-row", "RMSNorm, from how many rows", "hidden up to 512", {"rows": 4096},
        "rms-norm-threshold",
    ),
    "dispatch-elsewhere": Published(
        "block-row", "RMSNorm, the rule on other devices", "XPU and NPU",
        {"told": "not gated by device, not measured there"},
        why_not="no XPU or NPU here; our plan depends on a device's number of compute units alone, "
        "and its boundaries are tested without one",
    ),
}  # fmt: skip
"""By a key that findings name."""
