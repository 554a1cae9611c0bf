"""The child side of a compilation: where its program goes, and its priority."""

import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from onelaunch.compilation import entry
from onelaunch.compilation.cache import Store
from onelaunch.compilation.child import NICENESS, NOT_CACHED, Destination, deliver
from onelaunch.errors import BadInput, RunFailed
from tests.compilation.children import child, compiler


@pytest.fixture
def to(tmp_path):
    return Destination(str(tmp_path / "store"), 1 << 20, "key", "a program", time.time() - 3)


def store_of(to: Destination) -> Store:
    return Store(os.fspath(to.folder))


def unusable(to: Destination, tmp_path) -> Destination:
    (tmp_path / "file").write_text("x")
    return replace(to, folder=str(tmp_path / "file" / "store"))


def test_a_destination_comes_back_from_its_text(to):
    assert Destination.parse(str(to)) == to
    assert "\n" not in str(to)


@pytest.mark.parametrize("text", ["", "{}", "[]", "3", '{"folder": "x"}', "/x", "{" * 5000])
def test_an_invalid_destination_is_refused(text):
    with pytest.raises(BadInput, match="not a destination") as caught:
        deliver(text, b"x")
    assert len(str(caught.value)) < 200


def test_a_program_goes_to_the_store_with_its_metadata(to):
    deliver(str(to), b"program")
    assert store_of(to).get("key") == b"program"
    (stored,) = store_of(to).entries()
    assert stored.about["what"] == "a program"
    assert 3 <= stored.about["seconds"] < 60
    deliver(str(to), b"program", {"seconds": 1.5, "target": "here"})
    (stored,) = store_of(to).entries()
    assert stored.about == {"what": "a program", "seconds": 1.5, "target": "here"}


def test_the_limit_is_the_parents(to):
    store_of(to).put("older", b"x" * 1000)
    deliver(str(to), b"y" * 1000)
    assert len(store_of(to).entries()) == 2
    deliver(str(replace(to, limit_bytes=1)), b"y" * 1000)
    assert [each.key for each in store_of(to).entries()] == ["key"]


def test_past_an_unusable_store_it_goes_to_standard_output(to, tmp_path):
    to = unusable(to, tmp_path)
    chatter = "print('compiling ' * 100, flush=True); print('not yet flushed')"
    with open(tmp_path / "out", "w+b") as out:
        subprocess.run(
            [*compiler(b"\r\n\x00\xff", chatter), str(to)], stdout=out, check=True, timeout=300
        )
        out.seek(0)
        header, program = entry.read(out, "key")
    assert program == b"\r\n\x00\xff"
    assert str(to.folder) in header.about[NOT_CACHED]


def test_without_a_store_and_a_file_it_fails(to, tmp_path):
    to = unusable(to, tmp_path)
    done = subprocess.run([*compiler(), str(to)], capture_output=True, timeout=300)
    assert done.returncode != 0
    last = done.stderr.decode().splitlines()[-1]
    assert RunFailed.__name__ in last
    assert str(to.folder) in last


@pytest.mark.skipif(not hasattr(os, "nice"), reason="no priorities as POSIX has them")
@pytest.mark.parametrize("session", [False, True])
def test_a_child_lowers_its_priority(session):
    code = (
        "from onelaunch.compilation.child import lower_priority; "
        "before = os.nice(0); lower_priority(); print(before, os.nice(0))"
    )
    done = subprocess.run(
        child(code), stdout=subprocess.PIPE, check=True, timeout=300, start_new_session=session
    )
    before, after = map(int, done.stdout.split())
    assert after == min(19, before + NICENESS)


def test_a_system_without_priorities_is_no_error(monkeypatch):
    from onelaunch.compilation import child as module

    def refuse(by):
        raise PermissionError(1, "no")

    monkeypatch.setattr(os, "nice", refuse, raising=False)
    monkeypatch.delattr(os, "getsid", raising=False)
    module.lower_priority()
    monkeypatch.delattr(os, "nice")
    module.lower_priority()
    assert sys.modules["os"] is os
