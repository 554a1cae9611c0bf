"""The figures of the two published studies, row by row, and which experiment answers each.

"mega-kernel": "full-transformer mega-kernel fusion + ACCUM_STEPS=100", issue 24 of a project that
trains on Apple's Neural Engine by its private interfaces; M1 Pro, macOS 26.2. "block-row": "extend
RMSNorm block-row dispatch to hidden<=512", Liger-Kernel's pull request 1238; RTX 5060 Ti, bfloat16.
Figures are theirs; the words are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

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


def _fused(row: str, one: int, fused: int, apart: int, times: float, ms: int) -> Published:
    return Published(
        "mega-kernel", "feed-forward layers in one program", row,
        {
            "1 layer, us": one, "12 in one, us": fused, "12 apart, us": apart, "speedup": times,
            "compiling, ms": ms,
        },
        "fusion-depth",
    )  # fmt: skip


def _whole(row: str, one: float, apart: float, calls: int, times: float, s: float) -> Published:
    return Published(
        "mega-kernel", "whole layers in one program", row,
        {
            "one program, us": one, "two a layer, us": apart, "calls": calls, "speedup": times,
            "compiling, s": s,
        },
        "fusion-depth",
    )  # fmt: skip


def _accumulated(steps: int, ms: float, rate: float, times: float, share: float) -> Published:
    return Published(
        "mega-kernel", "micro-steps an update", f"{steps}",
        {
            "ms/micro-step": ms, "micro-steps/s": rate, "speedup": times, "compiling, %": share,
        },
        "accumulation",
    )  # fmt: skip


def _part(row: str, ms: float, told: str = "") -> Published:
    values: dict[str, float | str] = {"ms": ms} | ({"told": told} if told else {})
    return Published("mega-kernel", "a micro-step by parts", row, values, "step-breakdown")


def _hidden(row: str, compile_s: float, step_s: float, k: int) -> Published:
    return Published(
        "mega-kernel", "micro-steps that hide a compilation", row,
        {"compiling, s": compile_s, "micro-step, s": step_s, "K": k}, "recompile",
    )  # fmt: skip


def _overhead(row: str, ms: float) -> Published:
    return Published("mega-kernel", "what the host does", row, {"ms": ms}, "cpu-overhead")


def _stacked(row: str, rate: float, times: float) -> Published:
    values = {"micro-steps/s": rate, "speedup": times}
    return Published("mega-kernel", "the optimizations together", row, values, "stack")


def _mutable(row: str, told: str) -> Published:
    return Published(
        "mega-kernel", "weights that are no constants", row, {"told": told}, "weight-mutability"
    )


def _normed(passes: str, rows: int, hidden: int, one: float, block: float) -> Published:
    return Published(
        "block-row", f"RMSNorm, {passes}", f"{rows} x {hidden}",
        {"a row a program, ms": one, "16 rows, ms": block, "speedup": round(one / block, 2)},
        "rms-norm",
    )  # fmt: skip


_WIDTHS = (64, 128, 256, 512, 768)
_BOTH = {
    4096: ((0.075, 0.024), (0.080, 0.034), (0.088, 0.047), (0.110, 0.059), (0.131, 0.131)),
    8192: ((0.133, 0.034), (0.141, 0.051), (0.159, 0.077), (0.198, 0.106), (0.247, 0.247)),
    16384: ((0.248, 0.051), (0.264, 0.088), (0.293, 0.131), (0.387, 0.233), (0.485, 0.484)),
    32768: ((0.477, 0.086), (0.506, 0.158), (0.584, 0.258), (0.779, 0.452), (0.946, 0.945)),
}
_BACKWARD = {
    4096: ((0.069, 0.021), (0.071, 0.030), (0.080, 0.037), (0.096, 0.047), (0.105, 0.104)),
    8192: ((0.122, 0.028), (0.131, 0.047), (0.145, 0.061), (0.168, 0.080), (0.188, 0.188)),
    16384: ((0.229, 0.045), (0.243, 0.079), (0.265, 0.100), (0.315, 0.145), (0.353, 0.354)),
    32768: ((0.438, 0.073), (0.462, 0.133), (0.508, 0.172), (0.602, 0.274), (0.688, 0.688)),
}

PUBLISHED: dict[str, Published] = {
    "ffn-64": _fused("64/128", 183, 247, 2197, 8.9, 209),
    "ffn-128": _fused("128/256", 160, 344, 1921, 5.6, 145),
    "ffn-288": _fused("288/768", 218, 705, 2611, 3.7, 244),
    "ffn-288-128": _fused("288/768, 128 positions", 228, 654, 2740, 4.2, 179),
    "ffn-768": _fused("768/2048", 429, 1839, 5153, 2.8, 512),
    "whole-15m": _whole("stories15M, 6 layers", 728, 3039, 12, 4.17, 1.0),
    "whole-110m": _whole("stories110M, 12 layers", 5081, 15227, 24, 3.00, 4.2),
    "part-110m-4": _whole("stories110M, 4 layers", 1978, 5076, 8, 2.57, 1.0),
    "part-110m-8": _whole("stories110M, 8 layers", 3515, 10150, 16, 2.89, 2.5),
    "sweet-spot": Published(
        "mega-kernel", "whole layers in one program", "4 of 12 layers a program",
        {"speedup": 7.70}, "fusion-depth",
    ),
    "whole-over-ffn": Published(
        "mega-kernel", "whole layers in one program", "beside the feed-forward alone, at 288",
        {"whole, speedup": 4.17, "feed-forward, speedup": 3.7}, "fusion-depth",
    ),
    "compile-growth": Published(
        "mega-kernel", "compiling what is fused", "4, 8 and 12 layers of stories110M",
        {"4 layers, s": 1.0, "8 layers, s": 2.5, "12 layers, s": 4.2}, "coreml",
    ),
    "compile-forms": Published(
        "mega-kernel", "compiling what is fused", "each fused form of a model",
        {"told": "each compiled anew: 0.1 to 0.5 s of feed-forward, 1.0 to 4.2 s of whole layers"},
        "forward",
    ),
    "call-price": Published(
        "mega-kernel", "the price of a call", "an evaluation, beside the arithmetic",
        {"us": 160}, "fusion-depth",
    ),
    "sram": Published(
        "mega-kernel", "how large a program may be", "162 MB of weights in one",
        {"MB": 162}, "compile-budget",
    ),
    "accum-10": _accumulated(10, 208.6, 0.66, 1.0, 86.2),
    "accum-50": _accumulated(50, 175.4, 2.56, 3.86, 55.0),
    "accum-100": _accumulated(100, 169.4, 3.15, 4.74, 46.7),
    "accum-500": _accumulated(500, 168.7, 4.68, 7.1, 20.0),
    "accum-learning": Published(
        "mega-kernel", "micro-steps an update", "what they cost in learning",
        {"told": "scale the learning rate with them; not measured"}, "accumulation",
    ),
    "part-forward": _part("forward", 62.5),
    "part-forward-eval": _part("forward: programs", 33.3),
    "part-forward-io": _part("forward: conversions", 6.7),
    "part-forward-classifier": _part("forward: classifier", 6.6),
    "part-forward-elementwise": _part("forward: elementwise", 15.9),
    "part-backward": _part("backward", 105.9, "only the whole was measured"),
    "part-backward-eval": _part("backward: programs", 66.5, "estimated"),
    "part-backward-io": _part("backward: conversions", 10.5, "estimated, 8 to 13"),
    "part-backward-classifier": _part("backward: classifier", 6.6, "estimated"),
    "part-backward-cpu": _part("backward: copies and sums", 4.0),
    "part-backward-dw": _part("backward: the weights' gradients", 29.0, "beside it, awaited 0.005"),
    "part-whole": _part("the micro-step", 168.7),
    "warm-1": Published("mega-kernel", "warming up", "micro-step 1", {"ms": 258}, "warm-up"),
    "warm-30": Published("mega-kernel", "warming up", "micro-step 30", {"ms": 175}, "warm-up"),
    "warm-136": Published("mega-kernel", "warming up", "from 136 on", {"ms": 169}, "warm-up"),
    "budget-312": Published(
        "mega-kernel", "compilations in one process", "312 of a trainer", {"failures": 0},
        "compile-budget",
    ),
    "budget-252": Published(
        "mega-kernel", "compilations in one process", "252 in 4 updates of 50", {"failures": 0},
        "compile-budget",
    ),
    "budget-150": Published(
        "mega-kernel", "compilations in one process", "150 distinct ones", {"failures": 0},
        "compile-budget",
    ),
    "budget-restart": Published(
        "mega-kernel", "compilations in one process", "what a restart costs", {"s": 1.7},
        "compile-budget",
    ),
    "cache-key": Published(
        "mega-kernel", "compiled programs kept", "by hashes of program, options, weights",
        {"told": "kept across processes"}, "cache",
    ),
    "cache-exists": Published(
        "mega-kernel", "compiled programs kept", "asked whether one is there",
        {"told": "yes for kept ones"}, "cache",
    ),
    "cache-weight-free": Published(
        "mega-kernel", "compiled programs kept", "one without weights, another process",
        {"told": "hit"}, "cache",
    ),
    "cache-weights": Published(
        "mega-kernel", "compiled programs kept", "one with weights, after an update",
        {"told": "miss"}, "cache",
    ),
    "terminal-file": Published(
        "mega-kernel", "a line each step", "to a file", {"micro-steps/s": 4.68}, "terminal-io"
    ),
    "terminal-slow": Published(
        "mega-kernel", "a line each step", "to a terminal",
        {"micro-steps/s": 0.63, "slower": 7.4}, "terminal-io",
    ),
    "overlap-alone": Published(
        "mega-kernel", "running while compiling", "alone",
        {"average, ms": 0.337, "most, ms": 0.514}, "overlap",
    ),
    "overlap-beside": Published(
        "mega-kernel", "running while compiling", "beside 20 compilations",
        {"average, ms": 0.381, "most, ms": 1.419, "slowdown": 1.13}, "overlap",
    ),
    "stack-baseline": _stacked("10 micro-steps an update", 0.66, 1.0),
    "stack-accumulation": _stacked("100 micro-steps an update", 3.15, 4.74),
    "stack-background": _stacked("and compiling in the background", 5.24, 7.9),
    "stack-asymptote": _stacked("no overhead at all", 5.93, 9.0),
    "host-allocation": _overhead("133 buffers, 144 MB, allocated and freed", 0.1),
    "host-copies": _overhead("144 MB copied", 3.4),
    "host-sums": _overhead("24 sums, 4.7 million elements", 0.53),
    "host-sums-vector": Published(
        "mega-kernel", "what the host does", "the same by vector instructions", {"ms": 0.22},
        why_not="ours are by vector instructions already: the row before",
    ),
    "host-locks": _overhead("228 pairs of locks", 0.14),
    "hide-15m-ffn": _hidden("stories15M, feed-forward", 0.244, 0.003, 82),
    "hide-15m": _hidden("stories15M, whole", 1.0, 0.003, 338),
    "hide-110m-ffn": _hidden("stories110M, feed-forward", 0.512, 0.008, 64),
    "hide-110m": _hidden("stories110M, whole", 4.2, 0.008, 520),
    "hide-110m-4": _hidden("stories110M, 4 layers", 1.0, 0.008, 125),
    "mutable-inputs": _mutable("inputs of the program", "refused by the parser"),
    "mutable-packed": _mutable("packed into the channels", "refused: convolutions want constants"),
    "mutable-file": _mutable("a file overwritten", "no effect: baked in when compiled"),
    "mutable-matmul": _mutable("an emitter of products", "never called; would fail alike"),
    "forward-mega": Published(
        "mega-kernel", "training", "the fused forward in a step",
        {"stories15M, saved, ms": 2.3, "stories110M, saved, ms": 10.15},
        why_not="no engine trains through a fused forward on a GPU yet; through ML Programs a step "
        "needs a Mac",
    ),
    "backward-mega": Published(
        "mega-kernel", "training", "backward in few programs",
        {"told": "projected: about 2x a step"}, "step-breakdown",
    ),
    **{
        f"norm-{name}-{rows}-{hidden}": _normed(passes, rows, hidden, one, block)
        for name, passes, table in (
            ("both", "forward and backward", _BOTH),
            ("backward", "backward", _BACKWARD),
        )
        for rows, cells in table.items()
        for hidden, (one, block) in zip(_WIDTHS, cells, strict=True)
    },
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
        why_not="no XPU or NPU here; our plan asks a device for its number of compute units alone, "
        "and its boundaries are tested without one",
    ),
}  # fmt: skip
"""By a key that findings name."""
