"""The stages compiled, without a GPU, for NVIDIA's sm_80 and sm_90 and AMD's gfx942: they compile,
and keep their tiles in registers but for some bytes. Nothing runs, so nothing else is claimed."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from onelaunch.config import preset
from onelaunch.engines.cuda import program
from onelaunch.engines.cuda.blocking import H200, Limits
from onelaunch.engines.cuda.program import BoundForward, FusedForward, Shape
from onelaunch.errors import BadInput
from onelaunch.operators.rms_norm import launch
from tests.compiling import absent, spilled
from tests.engines.cuda.staged_forward import StagedForward

BF16 = torch.bfloat16
MAX_PARAMETERS = 20  # of a kernel
LIMITS = {
    "sm_80": Limits(108, 166_912, tma=False),
    "sm_90": H200,
    "gfx942": Limits(304, 65_536, tma=False),
}


@pytest.fixture
def triton():
    found = pytest.importorskip("triton")
    if launch.INTERPRETED:
        pytest.skip("Triton interprets in this process (TRITON_INTERPRET), so it compiles nothing")
    return found


def weights_of(config):
    return {n: torch.zeros(shape, dtype=BF16) for n, shape in config.weight_shapes().items()}


@pytest.mark.extended
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("name", ["stories15m", "qwen3-0.6b"])
def test_the_stages_stay_in_registers(target, name, monkeypatch, tmp_path, triton):
    from triton.runtime import driver

    monkeypatch.setattr(driver, "_active", absent(target))
    monkeypatch.setattr(program, "limits_of", lambda device: LIMITS[target])
    config = preset(name).with_(n_layers=1, vocab_size=512, max_seq_len=256)
    packed = StagedForward(config, weights_of(config), BF16, torch.device("cpu")).packed
    chain = BoundForward(config, packed, Shape(1, 256), {})
    fused = FusedForward(config, packed, Shape(1, 256), {})
    names = [stage.kind for stage in chain.plan.stages]
    assert names == ["embed", "qkv", "attention", "out_proj", "gate_up", "down", "head"]
    spills = {}
    for kind, call in zip([*names, "one launch"], [*chain.calls, *fused.calls], strict=True):
        compiled = call.compile()
        assert compiled.metadata.shared <= LIMITS[target].shared_bytes
        assert len(call.kernel.arg_names) <= MAX_PARAMETERS
        spills[kind] = spilled(triton, compiled, tmp_path)
    assert spills.pop("one launch") <= 512  # it has the registers of its largest stage
    assert max(spills.values()) <= 128, spills


@pytest.mark.extended
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize(("name", "rows"), [("stories15m", 1), ("qwen3-0.6b", 8)])
def test_the_stages_of_a_token_stay_in_registers(target, name, rows, monkeypatch, tmp_path, triton):
    from triton.runtime import driver

    from onelaunch.engines.cuda.decoding import chain

    monkeypatch.setattr(driver, "_active", absent(target))
    monkeypatch.setattr(chain, "limits_of", lambda device: LIMITS[target])
    monkeypatch.setattr(chain, "dependent_launch", lambda device: target == "sm_90")
    config = preset(name).with_(n_layers=1, vocab_size=4096, max_seq_len=256)
    packed = StagedForward(config, weights_of(config), BF16, torch.device("cpu")).packed
    memory = chain.Memory.of(config, packed, rows, 256)
    spills = {}
    for call in chain.TokenChain(config, packed, memory, rows, 256).calls:
        compiled = call.compile()
        assert len(call.kernel.arg_names) <= MAX_PARAMETERS
        spills[compiled.metadata.name] = spilled(triton, compiled, tmp_path)
    assert len(spills) == 7
    assert max(spills.values()) <= 128, spills


@pytest.mark.extended
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("vocab_size", [4096, 49152])
def test_a_penalty_leaves_the_sums_of_rows_without_one_as_they_are(
    target, vocab_size, monkeypatch, tmp_path, triton
):
    """Each thread adds up as many logits, of the same ids, in both kernels that choose a token."""
    from triton.runtime import driver

    from onelaunch.engines.cuda.decoding import chain

    monkeypatch.setattr(driver, "_active", absent(target))
    monkeypatch.setattr(chain, "limits_of", lambda device: LIMITS[target])
    monkeypatch.setattr(chain, "dependent_launch", lambda device: target == "sm_90")
    config = preset("stories15m").with_(n_layers=1, vocab_size=vocab_size, max_seq_len=256)
    packed = StagedForward(config, weights_of(config), BF16, torch.device("cpu")).packed
    memory = chain.Memory.of(config, packed, 4, 256)
    layouts, spills = [], []
    for seen in (None, torch.zeros(5, vocab_size, dtype=torch.int32)):
        compiled = chain.TokenChain(config, packed, memory, 4, 256, seen).sample.compile()
        spills.append(spilled(triton, compiled, tmp_path))
        layout = dict(re.findall(r"^(#\w+) = (#ttg\.blocked<.*>)", compiled.asm["ttgir"], re.M))
        sums = re.findall(r": \((tensor<\w+), (#\w+)>\) -> f32", compiled.asm["ttgir"])
        assert len(sums) >= 5
        layouts.append({(shape, layout[name]) for shape, name in sums})
    assert layouts[0] == layouts[1]
    assert len(layouts[0]) == 1
    assert spills[1] <= spills[0] + 128


@pytest.mark.extended
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("name", ["stories260k", "stories15m", "qwen3-0.6b", "llama-3.2-1b"])
def test_a_chunk_of_a_prompt_stays_in_registers(target, name, monkeypatch, tmp_path, triton):
    from triton.runtime import driver

    from onelaunch.engines.cuda.decoding import prefill

    monkeypatch.setattr(driver, "_active", absent(target))
    for module in (prefill, program):
        monkeypatch.setattr(module, "limits_of", lambda device: LIMITS[target])
        monkeypatch.setattr(module, "dependent_launch", lambda device: target == "sm_90")
    config = preset(name).with_(n_layers=1, vocab_size=512, max_seq_len=2048)
    packed = StagedForward(config, weights_of(config), BF16, torch.device("cpu")).packed
    calls = prefill.Prompts(config, packed).calls(1024, with_logits=True)
    names = ["embed", "qkv", "attention", "out_proj", "gate_up", "down"]
    later = [*names[:2], "store", *names[2:], "head"]
    assert len(calls) == len(names) + len(later)
    for kind, call in zip(later, calls[len(names) :], strict=True):
        compiled = call.compile()
        assert compiled.metadata.shared <= LIMITS[target].shared_bytes
        assert len(call.kernel.arg_names) <= MAX_PARAMETERS
        assert spilled(triton, compiled, tmp_path) <= 128, kind
        if kind in ("store", "attention"):
            assert compiled.metadata.name == f"prompt_{kind}"
        if kind == "attention" and target != "gfx942":  # whole 16 bytes, from an address in memory
            assert re.search(r"cp\.async\.cg[^;]*, 0x10", compiled.asm["ptx"])


@pytest.mark.extended
@pytest.mark.parametrize("part", ["ffn", "attention"])
def test_one_block_of_every_layer_compiles(part, monkeypatch, tmp_path, triton):
    from triton.runtime import driver

    monkeypatch.setattr(driver, "_active", absent("sm_90"))
    config = preset("stories260k").with_(n_layers=2)
    packed = StagedForward(config, weights_of(config), BF16, torch.device("cpu")).packed
    shape = Shape(1, 40, part=part)
    forms = [FusedForward(config, packed, shape, {}, depth) for depth in (1, "all")]
    compiled = [call.compile() for form in forms for call in form.calls]
    assert all(each is compiled[0] for each in compiled)  # one binary for every depth
    assert spilled(triton, compiled[0], tmp_path) <= 512


@pytest.mark.extended
def test_only_a_traced_or_delayed_forward_has_instructions_for_it(monkeypatch, triton):
    from triton.runtime import driver

    monkeypatch.setattr(driver, "_active", absent("sm_90"))
    config = preset("stories15m").with_(n_layers=1, vocab_size=512, max_seq_len=256)
    packed = StagedForward(config, weights_of(config), BF16, torch.device("cpu")).packed
    stages, waits = 7, 6
    stamps = ("%smid", "st.global.u64"), {True: (stages, 4 * stages), False: (0, 0)}
    # two about each wait and each publication, and one before a program ends
    sleeps = ("nanosleep.u32",), {True: (2 * waits + 2 * waits + 1,), False: (0,)}
    for traced in (False, True):
        for delayed in (False, True):
            forward = FusedForward(
                config, packed, Shape(1, 256), {}, traced=traced, delayed=delayed
            )
            ptx = forward.calls[0].compile().asm["ptx"]
            for (words, counts), on in ((stamps, traced), (sleeps, delayed)):
                assert tuple(ptx.count(word) for word in words) == counts[on]
            clocks = ptx.count("%globaltimer")
            assert clocks == waits + (3 * stages if traced else 0)


@pytest.mark.parametrize("dim", [64, 96, 512, 576])
def test_the_sums_of_squares_are_all_asked_for_before_the_first_is_waited_for(
    dim, monkeypatch, triton
):
    from triton.runtime import driver

    monkeypatch.setattr(driver, "_active", absent("sm_90"))
    config = preset("stories260k").with_(dim=dim, n_heads=4, n_kv_heads=4, n_layers=1)
    forward = StagedForward(config, weights_of(config), BF16, torch.device("cpu"))
    bound = forward.bind(1, 16)  # whose tiles have 32 columns
    number = [stage.kind for stage in bound.plan.stages].index("gate_up")
    kernel = bound.calls[number].compile()
    loads = [n for n in kernel.asm["ptx"].splitlines() if "ld.global.cg.b32" in n]
    assert len(loads) == dim // 32  # no loop: 2, 3, 16 and 18
    assert ".entry gate_up_kernel(" in kernel.asm["ptx"]  # as profilers show it


def test_what_is_written_for_nvidia_is_refused_elsewhere(monkeypatch):
    config = preset("stories260k")
    packed = StagedForward(config, weights_of(config), BF16, torch.device("cpu")).packed
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for option in ("traced", "delayed"):
        with pytest.raises(BadInput, match="NVIDIA"):
            FusedForward(config, packed, Shape(1, 16), {}, **{option: True})


NAMES = """
import sys
from onelaunch.engines.cuda import kernels
from onelaunch.engines.cuda.stages import TILES
every = [kernels.forward_kernel, kernels.stage_kernel, *TILES]
if sys.argv[1] == "settled":
    kernels.settle_names()
if sys.argv[2] == "backwards":
    every = every[::-1]
named = {kernel.fn.__name__: kernel.cache_key for kernel in every}
print(sorted(named.items()))
"""


def names(*how):
    command = [sys.executable, "-c", NAMES, *how]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return done.stdout


def test_kernels_have_the_same_names_in_every_process():
    pytest.importorskip("triton")
    assert names("settled", "forwards") == names("settled", "backwards")


def test_no_name_has_two_values_in_the_modules_of_kernels():
    """Triton 3.6 orders the constants that a kernel uses by name, then by where its module lies in
    memory: with two values of one name a process may not find what another one compiled."""
    pytest.importorskip("triton")
    from triton.language import constexpr

    from onelaunch.engines.cuda import kernels, sync, tracer
    from onelaunch.engines.cuda.decoding import kernels as decode_kernels
    from onelaunch.engines.cuda.decoding import prompt_kernels
    from onelaunch.engines.cuda.stages import attention, common, embed, gate_up, head, qkv

    modules = (
        kernels, sync, tracer, attention, common, embed, gate_up, head, qkv, decode_kernels,
        prompt_kernels,
    )  # fmt: skip
    values: dict[str, set[object]] = {}
    for module in modules:
        for name, value in vars(module).items():
            if isinstance(value, constexpr):
                values.setdefault(name, set()).add(value.value)
    assert not {name for name, of in values.items() if len(of) > 1}
