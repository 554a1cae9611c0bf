"""One thread: small tensors gain nothing from two, and lose much where another process is busy.

Compiled programs of a session lie in a folder of its own, made at the first test that needs one.
"""

import os
import shutil
import sys
import tempfile

import pytest
import torch

from tests.interpreting import SHARE

torch.set_num_threads(1)


def pytest_configure(config):
    config.cache_folder = tempfile.mkdtemp(prefix="onelaunch-cache-")
    os.environ["ONELAUNCH_CACHE"] = config.cache_folder


def pytest_unconfigure(config):
    shutil.rmtree(config.cache_folder, ignore_errors=True)


def pytest_collection_modifyitems(items):
    """Keep this process's share; see interpreting.py."""
    part, parts = map(int, os.environ.get(SHARE, "0 1").split())
    items[:] = items[part::parts]


@pytest.fixture(scope="session")
def compiled_program() -> bytes:
    """The CPU engine's object code, in the session's store too."""
    from onelaunch.compilation.background import Compilation
    from onelaunch.compilation.cache import Store, program_key
    from onelaunch.engines.cpu import program

    command = [sys.executable, "-m", "onelaunch.engines.cpu.native.build"]
    key = program_key(program.source(), program.options())
    compilation = Compilation(Store(), key, command, bytes, print, "the program")
    code = compilation.wait()
    assert code is not None, compilation.failed
    return code
