"""A store, and compilations that are cancelled at the end of their test."""

import pytest

from onelaunch.compilation.background import Compilation
from onelaunch.compilation.cache import Store
from tests.compilation.children import compiler


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def logged():
    return []


@pytest.fixture
def compiling(store, logged):
    """Starts a compilation, which is cancelled at the end of the test."""
    begun = []

    def begin(command=None, prepare=bytes.decode, key="key", store=store, **more):
        command = compiler() if command is None else command
        compilation = Compilation(
            store, key, command, prepare, logged.append, "the fast form", **more
        )
        begun.append(compilation)
        return compilation

    yield begin
    for compilation in begun:
        compilation.cancel()
        compilation.wait(60)
        assert compilation.ended
