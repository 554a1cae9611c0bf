"""The kernels of a training step compiled, without a GPU, for NVIDIA's sm_90: they compile, keep
their tiles in registers and access memory in whole 16 bytes. Nothing runs, so nothing else is
claimed."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from onelaunch.operators.rms_norm import launch
from tests.compiling import absent, spilled

BF16, F32 = torch.bfloat16, torch.float32
N, S, P = 16_384, 1024, 264


class Compiled(NamedTuple):
    spilled: int
    ptx: str

    def widest(self, kind: str) -> set[str]:
        """The forms of all loads (ld) or stores (st) of more than one register, and of one."""
        found = re.findall(rf"{kind}\.global[.\w:]*?(?:\.(v\d))?\.(b\d+)", self.ptx)
        return {f"{vector or 'v1'}.{bits}" for vector, bits in found}


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    """The kernels that a call of `launches` would launch, by name."""
    triton = pytest.importorskip("triton")
    if launch.INTERPRETED:
        pytest.skip("Triton interprets in this process (TRITON_INTERPRET), so it compiles nothing")
    from triton.runtime import driver

    from onelaunch.engines.cuda.training import launches

    monkeypatch.setattr(driver, "_active", absent("sm_90"))
    found: dict[str, Compiled] = {}

    def compile_only(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        assert all(0 < size < 65_536 for size in grid[1:])
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        name = compiled.metadata.name
        found[name] = Compiled(spilled(triton, compiled, tmp_path), compiled.asm["ptx"])

    monkeypatch.setattr(launches, "launch", compile_only)
    return launches, found


def empty(*shape: int, dtype=F32) -> Tensor:
    """A tensor of which nothing is ever touched."""
    return torch.empty(shape, dtype=dtype, device="meta")


def half(*shape: int) -> Tensor:
    return empty(*shape, dtype=BF16)


def whole(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.int64)


def assert_in_registers(found: dict[str, Compiled], names: set[str]) -> None:
    assert found.keys() == names
    assert not any(one.spilled for one in found.values()), {n: c.spilled for n, c in found.items()}


@pytest.mark.extended
@pytest.mark.parametrize("D", [48, 288, 768, 2048, 4096])
def test_norms_and_the_embeddings_gradient(D, kernels):
    launches, found = kernels
    x, normed, rstd, w = empty(N, D), half(N, D), empty(N), empty(D)
    launches.embed_norm(whole(N), empty(32_000, D), w, 1e-5, x, normed, rstd)
    launches.add_norm(x, half(N, D), w, 1e-5, x, normed, rstd)
    launches.norm_backward(normed, x, rstd, w, x, x, normed, empty(P, D))
    launches.sum_partials(empty(13, P, D), empty(10**9), whole(13), False)
    edges = empty(*launches.edges_shape(N, D))
    launches.embedding_gradient(whole(N), whole(N), x, empty(32_000, D), edges)
    assert_in_registers(
        found,
        {
            "embed_norm_kernel", "add_norm_kernel", "norm_backward_kernel", "sum_partials_kernel",
            "embedding_gradient_kernel", "join_edges_kernel",
        },
    )  # fmt: skip
    for name in ("embed_norm_kernel", "add_norm_kernel", "norm_backward_kernel"):
        assert "v4.b32" in found[name].widest("ld")
        assert found[name].widest("st") <= {"v4.b32", "v2.b32", "v1.b32"}
    if D >= 288:
        assert found["embedding_gradient_kernel"].widest("st") == {"v4.b32"}
