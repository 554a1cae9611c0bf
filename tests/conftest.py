"""One thread: small tensors gain nothing from two, and lose much where another process is busy.

Compiled programs of a session lie in a folder of its own, made at the first test that needs one.
"""

import os
import shutil
import signal
import sys
import tempfile

import pytest
import torch

from tests.interpreting import SHARE

torch.set_num_threads(1)
# a shell ignores it for what runs in its background
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    config.cache_folder = tempfile.mkdtemp(prefix="onelaunch-cache-")
    os.environ["ONELAUNCH_CACHE"] = config.cache_folder


def pytest_unconfigure(config):
    shutil.rmtree(config.cache_folder, ignore_errors=True)


QUIET = (
    "bench/test_forward.py", "bench/test_generate.py",
    "bench/test_recompiling.py::test_k_is_found_and_less_waits",
    "bench/test_report_browser.py::test_the_page_of_the_kept_records", "bench/test_rounds.py",
    "bench/test_timing.py", "cli/test_generate.py", "cli/test_train.py",
    "compilation/test_background.py", "compilation/test_children.py",
    "compilation/test_double_buffer.py", "engines/cpu/test_cold.py",
    "engines/cpu/test_threads.py", "training/test_coreml.py::test_what_it_tells",
    "training/test_display.py", "training/test_loop.py",
)  # fmt: skip
"""Files of tests, and tests, that time something, or wait for a process for so long."""


def pytest_collection_modifyitems(items):
    """Mark those that are to run alone; keep this process's share, see interpreting.py."""
    for item in items:
        path = item.path.as_posix()
        if path.endswith(QUIET) or f"{path}::{item.originalname}".endswith(QUIET):
            item.add_marker("quiet")
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
