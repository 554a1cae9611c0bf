"""One thread: small tensors gain nothing from two, and lose much where another process is busy."""

import fcntl
import os
import shutil
import signal
import sys
import tempfile

import pytest
import torch

from tests import skips
from tests.interpreting import SHARE

STORE = "ONELAUNCH_TESTS_STORE"
"""The variable that names the folder of a run's compiled programs."""

torch.set_num_threads(1)
# a shell ignores it for what runs in its background
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    """What is compiled goes to one store for all processes of a run, which begins empty: workers of
    xdist and suites in processes of their own find it named in the environment."""
    config.made_store = None
    if STORE not in os.environ:
        config.made_store = os.environ[STORE] = tempfile.mkdtemp(prefix="onelaunch-tests-")
    os.makedirs(os.environ[STORE], mode=0o700, exist_ok=True)
    os.environ["ONELAUNCH_CACHE"] = os.environ[STORE]


def pytest_unconfigure(config):
    if config.made_store is not None:
        del os.environ[STORE]
        shutil.rmtree(config.made_store, ignore_errors=True)


def pytest_terminal_summary(terminalreporter):
    if line := skips.summary(terminalreporter.stats.get("skipped", [])):
        terminalreporter.write_line(line)


def pytest_collection_modifyitems(items):
    """Keep this process's share, see interpreting.py. Files that need a compiled program come
    last: one worker makes it while another runs the rest."""
    part, parts = map(int, os.environ.get(SHARE, "0 1").split())
    items[:] = items[part::parts]
    last = {item.path for item in items if "compiled_program" in item.fixturenames}
    training = {item.path for item in items if "compiled_training" in item.fixturenames}
    items.sort(key=lambda item: (item.path in last) + 2 * (item.path in training))


COMPILER = """
import runpy
from onelaunch.compilation import child
child.lower_priority = lambda: None
runpy.run_module("onelaunch.engines.cpu.native.build", run_name="__main__")
"""
"""The CPU engine's compiler, but tests wait for it: behind two busy workers a child of low priority
would take five minutes for half of one."""


@pytest.fixture(scope="session")
def compiled_program() -> bytes:
    """The object code of the CPU engine that generates, in the run's store too."""
    from onelaunch.engines.cpu.program import GENERATION

    return compiled(GENERATION)


@pytest.fixture(scope="session")
def compiled_training() -> bytes:
    """The object code of the CPU engine that trains, in the run's store too."""
    from onelaunch.engines.cpu.program import TRAINING

    return compiled(TRAINING)


def compiled(name: str) -> bytes:
    """A program of the CPU engine. The first process of the run that wants it compiles it; the
    others wait for that."""
    from onelaunch.compilation.background import Compilation
    from onelaunch.compilation.cache import Store
    from onelaunch.engines.cpu import program, why_not

    if reason := why_not():
        pytest.skip(reason)
    command = [sys.executable, "-c", COMPILER, name]
    with open(os.path.join(os.environ[STORE], ".compiling"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        key = program.key(name)
        compilation = Compilation(Store(), key, command, bytes, print, "the program", 1800.0)
        code = compilation.wait()
    assert code is not None, compilation.failed
    return code
