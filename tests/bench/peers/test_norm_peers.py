"""RMSNorm's peers: a line names what is missing, and Liger's copy differs in its two conditions."""

import importlib
import sys

import pytest
import torch

from onelaunch.bench.peers import rms_norm as peers
from onelaunch.errors import BadInput
from onelaunch.operators.rms_norm.reference import rms_norm as plain

MODULE = """
import inspect
{lines}

def where():
    return __name__
"""
CONDITION = f"    if {peers.LIGER_CONDITION}:\n        return 'row'\n    return 'block'\n"
SIGNATURE = "(BLOCK_SIZE, n_rows, row_mode=None):\n"


def a_module(tmp_path, monkeypatch, places):
    name = f"a_liger_{places}"
    lines = "".join(f"def path{i}{SIGNATURE}{CONDITION}" for i in range(places))
    (tmp_path / f"{name}.py").write_text(MODULE.format(lines=lines))
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module(name)


def test_the_copy_takes_the_published_rule_and_the_original_keeps_its_own(tmp_path, monkeypatch):
    released = a_module(tmp_path, monkeypatch, 2)
    patched = peers.with_condition(released, peers.SOURCE_CONDITION)
    assert patched is not released
    for path in ("path0", "path1"):
        before, after = getattr(released, path), getattr(patched, path)
        assert [before(256, n) for n in (4096 * 8 - 1, 4096 * 8)] == ["row", "block"]
        assert [after(512, n) for n in (4095, 4096)] == ["row", "block"]
        assert after(1024, 65536) == "row"
        assert after(64, 65536, True) == "row"


def test_ligers_block_path_is_taken_at_every_number_of_rows(tmp_path, monkeypatch):
    released = a_module(tmp_path, monkeypatch, 2)
    patched = peers.with_condition(released, peers.BLOCK_CONDITION)
    assert [patched.path0(512, n) for n in (1, 512, 65536)] == ["block"] * 3
    assert patched.path1(1024, 65536) == patched.path1(64, 1, True) == "row"


@pytest.mark.parametrize("places", [0, 1, 3])
def test_a_liger_that_looks_otherwise_is_not_patched(tmp_path, monkeypatch, places):
    with pytest.raises(ValueError, match=f"in {places} places"):
        peers.with_condition(a_module(tmp_path, monkeypatch, places), peers.SOURCE_CONDITION)


def test_missing_peers_are_named(monkeypatch):
    for name in ("liger_kernel", "liger_kernel.ops", "liger_kernel.ops.rms_norm", "quack"):
        monkeypatch.setitem(sys.modules, name, None)
    lines = []
    contenders = peers.peers(torch.device("cuda"), lines.append)
    assert [contender.name for contender in contenders] == ["torch", "torch.compile"]
    assert [line.split(":")[0] for line in lines] == ["without Liger", "without QuACK"]
    assert peers.liger_paths(lines.append) == []
    assert lines[-1].startswith("without Liger")


def test_a_cpu_has_no_more_than_pytorch():
    lines = []
    contenders = peers.peers(torch.device("cpu"), lines.append)
    assert [contender.name for contender in contenders] == ["torch", "torch.compile"]
    assert lines == []


def test_pytorchs_norm_and_ours_do_the_same_work():
    x, weight = torch.randn(33, 40), torch.rand(40) + 0.5
    expected = plain(x, weight, peers.EPS)
    forms = {c.name: c.fresh() for c in peers.ours()}
    assert list(forms) == ["ours", "row", "block", "source"]
    norms = [*forms.values(), peers.peers(torch.device("cpu"), print)[0].fresh()]
    for norm in norms:
        torch.testing.assert_close(norm(x, weight), expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def with_quack(monkeypatch):
    """A PyTorch that runs QuACK's kernels; called, changes one thing about it and checks."""
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: object())

    def check(torch_version="2.12.0+cu130", cutlass="4.5.2", **switches):
        monkeypatch.setattr(peers.torch, "__version__", torch_version)
        monkeypatch.setattr(peers.metadata, "version", lambda name: cutlass)
        for name in ("TORCH_DISABLE_NATIVE_JIT", "TORCH_NATIVE_SKIP_VERSION_CHECK"):
            monkeypatch.delenv(name, raising=False)
        for name, value in switches.items():
            monkeypatch.setenv(name, value)
        return peers.torch_may_run_quack()

    return check


def test_whether_pytorch_may_run_quack(with_quack, monkeypatch):
    assert with_quack()
    assert with_quack(TORCH_DISABLE_NATIVE_JIT="0")
    assert not with_quack(TORCH_DISABLE_NATIVE_JIT="1")
    assert not with_quack(torch_version="2.11.0")
    assert with_quack(torch_version="3.0.0")
    assert not with_quack(cutlass="4.7.0")
    assert with_quack(cutlass="4.7.0", TORCH_NATIVE_SKIP_VERSION_CHECK="1")
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert not with_quack()


def test_the_compiled_norm_for_backward_passes_is_compiled_without_donated_buffers(monkeypatch):
    config = pytest.importorskip("torch._functorch.config")
    seen = []

    def compiled(x, weight):
        seen.append(config.donated_buffer)
        return x * weight

    monkeypatch.setattr(torch, "compile", lambda function, fullgraph: compiled)
    there = {c.name: c for c in peers.peers(torch.device("cpu"), print)}
    before = config.donated_buffer
    norm = there["torch.compile"].repeatable()
    norm(torch.ones(2, 3), torch.ones(3))
    assert seen == [False]
    assert config.donated_buffer == before
    assert there["torch"].repeatable is None


def test_interpreted_kernels_and_devices_without_triton_are_refused(monkeypatch):
    lines = []
    assert not peers.has_kernel(torch.device("cpu"), lines.append)
    assert "no kernel on this device" in lines[0]
    monkeypatch.setattr(peers.launch, "available", lambda device: device.type == "xpu")
    for device in ("cuda", "xpu"):
        with pytest.raises(BadInput, match=f"device {device}"):
            peers.has_kernel(torch.device(device), print)
    monkeypatch.setattr(peers.launch, "INTERPRETED", True)
    with pytest.raises(BadInput, match="TRITON_INTERPRET"):
        peers.has_kernel(torch.device("cpu"), print)
