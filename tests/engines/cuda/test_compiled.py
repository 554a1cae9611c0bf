"""The stages compiled, without a GPU, for NVIDIA's sm_80 and sm_90 and AMD's gfx942: they compile,
and keep their tiles in registers but for some bytes. Nothing runs, so nothing else is claimed."""

from __future__ import annotations

import pytest
import torch

from onelaunch.config import preset
from onelaunch.engines.cuda.one_launch import FusedForward
from onelaunch.engines.cuda.staged import Shape, StagedForward
from onelaunch.operators.rms_norm import launch
from tests.compiling import absent, spilled

BF16 = torch.bfloat16


class Compiles:
    """In a kernel's place: compiles where the kernel would be launched."""

    def __init__(self, kernel, done, spills) -> None:
        self.kernel, self.done, self.spills = kernel, done, spills

    def __getitem__(self, grid):
        def compile(*args, **kwargs):
            compiled = self.kernel.warmup(*args, grid=grid, **kwargs)
            self.done.append((self.kernel.fn.__name__, self.spills(compiled)))

        return compile


@pytest.mark.parametrize("part", ["ffn", "attention"])
def test_one_block_of_every_layer_compiles(part, monkeypatch, tmp_path):
    triton = pytest.importorskip("triton")
    if launch.INTERPRETED:
        pytest.skip("Triton interprets in this process (TRITON_INTERPRET), so it compiles nothing")
    from triton.runtime import driver

    monkeypatch.setattr(driver, "_active", absent("sm_90"))
    config = preset("stories260k").with_(n_layers=2)
    weights = {n: torch.zeros(shape, dtype=BF16) for n, shape in config.weight_shapes().items()}
    packed = StagedForward(config, weights, BF16, torch.device("cpu")).packed
    shape = Shape(1, 40, part=part)
    half, whole = (FusedForward(config, packed, shape, {}, depth) for depth in (1, "all"))
    compiled = [call.compile() for call in (*half.calls, *whole.calls)]
    assert all(each is compiled[0] for each in compiled)  # one binary for every depth
    assert spilled(triton, compiled[0], tmp_path) <= 512


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("name", ["stories15m", "qwen3-0.6b"])
def test_the_stages_stay_in_registers(target, name, monkeypatch, tmp_path):
    triton = pytest.importorskip("triton")
    if launch.INTERPRETED:
        pytest.skip("Triton interprets in this process (TRITON_INTERPRET), so it compiles nothing")
    from triton.runtime import driver

    from onelaunch.engines.cuda import fused, kernels

    monkeypatch.setattr(driver, "_active", absent(target))
    config = preset(name).with_(n_layers=1, vocab_size=512, max_seq_len=256)
    weights = {n: torch.zeros(shape, dtype=BF16) for n, shape in config.weight_shapes().items()}
    forward = StagedForward(config, weights, BF16, torch.device("cpu"))
    done: list[tuple[str, int]] = []
    for module in (kernels, fused):
        for kernel in [n for n in vars(module) if n.endswith("_kernel")]:
            of = getattr(module, kernel)
            replaced = Compiles(of, done, lambda c: spilled(triton, c, tmp_path))
            monkeypatch.setattr(module, kernel, replaced)
    forward.logits(torch.zeros(1, 256, dtype=torch.int64))
    FusedForward(config, forward.packed, Shape(1, 256), {}).run()
    names = [name for name, _ in done]
    assert names == [
        "embed_kernel", "qkv_kernel", "attention_kernel", "add_product_kernel", "gate_up_kernel",
        "add_product_kernel", "head_kernel", "forward_kernel",
    ]  # fmt: skip
    spills = dict(done)
    assert spills.pop("forward_kernel") <= 512  # it has the registers of its largest stage
    assert max(spills.values()) <= 64, spills
