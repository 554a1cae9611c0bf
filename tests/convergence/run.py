"""A four-layer Llama trained with PyTorch's norm and with the operator, losses side by side.

python tests/convergence/run.py [--updates N] [--dtype float32] [--model qk-norm]

On a GPU the operator runs its kernels, in float32 and bfloat16. Without one it runs them through
Triton's interpreter, in float32 and at a tiny size; bfloat16, which the interpreter gets wrong,
is then trained with the operator's plain PyTorch form. `tests/convergence/llama.py` says how far
apart losses may be. Exits with 1 where they are further.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    # read when Triton is imported, which nothing above has done
    os.environ["TRITON_INTERPRET"] = "1"

from onelaunch.operators.rms_norm import launch, reference  # noqa: E402
from tests.convergence import llama  # noqa: E402

SHOWN = 11  # rows of a table
DTYPES = ("float32", "bfloat16", llama.HELD)
MODELS = {"gqa": "GQA", "qk-norm": "GQA and QK-norm"}


def float32(title: str, size: llama.Size, device: str) -> bool:
    """Every loss with the operator equals PyTorch's to `llama.TOLERANCE`."""
    started = time.monotonic()
    plain = llama.losses(size, "torch", device)
    ours = llama.losses(size, "onelaunch", device)
    difference = llama.relative_difference(ours, plain)
    _table(f"{title}, float32", plain, ours, started)
    worst = difference.max().item()
    good = worst <= llama.TOLERANCE
    print(
        f"largest relative difference {worst:.1e}, allowed {llama.TOLERANCE:.0e}: {_word(good)}\n"
    )
    return good


def bfloat16(title: str, size: llama.Size, device: str, norm: str | llama.Norm, dtype: str) -> bool:
    """The losses with `norm` are within the spread of `llama.PLAIN_RUNS` runs with PyTorch's."""
    started = time.monotonic()
    plain = [llama.losses(size, "torch", device, dtype, noise) for noise in range(llama.PLAIN_RUNS)]
    ours = llama.losses(size, norm, device, dtype)
    mean = torch.stack(plain).mean(0)
    _table(f"{title}, {dtype} (torch: mean of {len(plain)} runs)", mean, ours, started)
    distances, allowed = llama.plain_distances(plain), llama.limit(plain)
    found = llama.distance(ours, plain)
    good = found <= allowed
    print(
        f"distance {found:.2e}; of a plain run {distances.mean():.2e}, "
        f"at most {distances.max():.2e}; allowed {allowed:.2e}: {_word(good)}\n"
    )
    return good


def _table(title: str, plain: Tensor, ours: Tensor, started: float) -> None:
    print(f"{title}, {len(plain)} updates, {time.monotonic() - started:.1f} s")
    print(f"{'update':>8} {'torch':>12} {'onelaunch':>12} {'difference':>12}")
    steps = torch.linspace(0, len(plain) - 1, min(SHOWN, len(plain))).round().int().tolist()
    for i in steps:
        print(f"{i + 1:>8} {plain[i]:>12.7f} {ours[i]:>12.7f} {ours[i] - plain[i]:>12.1e}")


def _word(good: bool) -> str:
    return "good" if good else "TOO FAR"


def _plain_form(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return reference.rms_norm(x, weight, eps, casting="gemma")


def main() -> int:
    """Run the selected comparisons, all by default; returns 0 if every loss is within bounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=DTYPES)
    parser.add_argument("--model", choices=list(MODELS), nargs="+", default=list(MODELS))
    options = parser.parse_args()
    device = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
    if not launch.available(device):
        print(f"the operator has no kernel for {device} here: is Triton installed?")
        return 1
    where = torch.cuda.get_device_name() if ON_GPU else "Triton's interpreter"
    good = True
    for model in options.model:

        def sized(size: llama.Size, qk_norm: bool = model == "qk-norm") -> llama.Size:
            size = size.with_qk_norm() if qk_norm else size
            return replace(size, updates=options.updates)

        title, size = f"{MODELS[model]}, {where}", sized(llama.LARGE if ON_GPU else llama.TINY)
        if "float32" in options.dtype:
            good &= float32(title, size, device.type)
        for dtype in (d for d in options.dtype if d != "float32"):
            if ON_GPU:
                good &= bfloat16(title, size, device.type, "onelaunch", dtype)
            else:
                plain_title = f"{MODELS[model]}, the operator's plain form"
                good &= bfloat16(plain_title, sized(llama.SMALL), "cpu", _plain_form, dtype)
    return 0 if good else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
