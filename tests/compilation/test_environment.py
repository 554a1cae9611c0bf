"""Child processes import this package and the other modules that this process imports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import onelaunch
from onelaunch.compilation.children import Child
from onelaunch.compilation.environment import child_environment

PACKAGE = Path(onelaunch.__file__).parent

PARENT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from onelaunch.compilation.background import Compilation
from onelaunch.compilation.cache import Store
from onelaunch.compilation.children import Child
if sys.argv[2] == "forgotten":
    del sys.path[0]

child = Child([sys.executable, "-c", "import onelaunch; print(onelaunch.__file__)"])
line = child.receive_within(60)
child.end()
CODE = '''
import sys
from onelaunch.compilation.child import deliver
import onelaunch
deliver(sys.argv[-1], onelaunch.__file__.encode())
'''
command = [sys.executable, "-c", CODE]
compilation = Compilation(Store(), "key", command, bytes.decode, lambda line: None, "it", 60)
print(json.dumps([line, compilation.wait(60), compilation.failed]))
"""


@pytest.fixture
def elsewhere(tmp_path):
    """A copy of the package that only the code of a process finds."""
    folder = tmp_path / "a folder" / "with a name"
    shutil.copytree(PACKAGE, folder / "onelaunch", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.mark.parametrize("after", ["kept", "forgotten"])
def test_children_find_the_package_that_code_has_put_on_the_path(elsewhere, tmp_path, after):
    """In a folder whose modules do not shadow those of the child."""
    started_in = tmp_path / "started in"
    started_in.mkdir()
    (started_in / "onelaunch.py").write_text("raise SystemExit('another module')")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", PARENT, str(elsewhere), after],
        env=environment | {"ONELAUNCH_CACHE": str(tmp_path / "store")},
        cwd=started_in,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    path = str(elsewhere / "onelaunch" / "__init__.py")
    assert json.loads(done.stdout) == [path, path, None]


def test_the_rest_of_the_path_keeps_its_order(tmp_path, monkeypatch):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "only_here.py").write_text(f"print({name!r})")
        monkeypatch.syspath_prepend(tmp_path / name)
    child = Child([sys.executable, "-m", "only_here"])
    try:
        assert child.receive_within(60) == "second"
    finally:
        child.end()


def test_the_folder_that_a_process_is_in_is_there_where_it_is_for_the_process(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", str(PACKAGE.parent), None, "lib", str(PACKAGE.parent)])
    paths = child_environment()["PYTHONPATH"].split(os.pathsep)
    assert paths == [str(tmp_path), str(PACKAGE.parent), str(tmp_path / "lib")]
    monkeypatch.setattr(sys, "path", ["/lib"])
    assert child_environment()["PYTHONPATH"] == f"{PACKAGE.parent}{os.pathsep}/lib"
    assert child_environment(TMPDIR="x", PYTHONPATH="y")["PYTHONPATH"] == "y"
    assert child_environment(TMPDIR="x")["TMPDIR"] == "x"


def test_no_engine_starts_processes_by_itself():
    """All of them by `Child` or `Compilation`, which give them this environment."""
    starters = ("subprocess.", "Popen(", "os.exec", "os.spawn", "multiprocessing.Process")
    for file in (PACKAGE / "engines").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert not any(word in text for word in starters), file
