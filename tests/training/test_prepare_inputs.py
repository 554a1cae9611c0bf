"""`prepare`: linked folders, files that are no text, and what a killed one leaves behind."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from onelaunch.checkpoints.atomic import atomic_directory
from onelaunch.errors import BadInput
from onelaunch.training.prepare import prepare

TEXT = b"some text, some more text, and some more of it\n" * 20


def write(path: Path, text: bytes = TEXT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text)
    return path


def sources(*texts: Path, out: Path) -> list[str]:
    return [source.file for source in prepare(texts, out).manifest.sources]


# --- linked folders -------------------------------------------------------------------------------


def test_linked_folders_are_followed_each_once(tmp_path):
    top, far = tmp_path / "top", tmp_path / "far"
    write(top / "a.txt")
    write(top / "inner" / "b.txt")
    write(far / "c.txt")
    write(far / "deep" / "d.md")
    write(far / "deep" / "e.csv")
    (top / "again").symlink_to(top / "inner")  # what lies there is read under its own name
    (top / "one").symlink_to(far)
    (top / "two").symlink_to(far)
    (top / "zdeep").symlink_to(far / "deep")
    (top / ".hidden").symlink_to(far)
    prepared = prepare([top], tmp_path / "out")
    assert [source.file for source in prepared.manifest.sources] == [
        "top/a.txt",
        "top/inner/b.txt",
        "top/one/c.txt",
        "top/one/deep/d.md",
    ]
    assert prepared.ignored == 1  # e.csv, once


def test_loops_of_links_end(tmp_path):
    top, far = tmp_path / "top", tmp_path / "far"
    write(top / "inner" / "a.txt")
    write(far / "b.txt")
    write(tmp_path / "outside.txt")
    (top / "self").symlink_to(top)
    (top / "inner" / "up").symlink_to("..")
    (top / "inner" / "around").symlink_to(tmp_path)  # holds the folder that is read
    (top / "out").symlink_to(far)
    (far / "back").symlink_to(top)
    (top / "nowhere").symlink_to(top / "nowhere")
    found = sources(top, out=tmp_path / "out")
    assert found == ["top/inner/a.txt", "top/out/b.txt"]


def test_a_named_link_to_a_folder_is_that_folder(tmp_path):
    write(tmp_path / "real" / "a.txt")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    found = sources(tmp_path / "link", tmp_path / "real", out=tmp_path / "out")
    assert found == ["real/a.txt"]


# --- files that are no text -----------------------------------------------------------------------


def packed(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("a.txt", TEXT)  # stored as it is: valid UTF-8 in parts
        return buffer.getvalue()
    if kind == "tar":
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
        return buffer.getvalue()
    return {
        "gz": gzip.compress(TEXT),
        "bz2": bz2.compress(TEXT),
        "xz": lzma.compress(TEXT),
        "zst": b"\x28\xb5\x2f\xfd\x20\x05\x29\x00\x00hello",
        "parquet": b"PAR1\x15\x04\x15 some columns PAR1",
    }[kind]


@pytest.mark.parametrize(
    ("kind", "what", "mend"),
    [
        ("gz", "compressed by gzip", "gunzip -k "),
        ("bz2", "compressed by bzip2", "bunzip2 -k "),
        ("xz", "compressed by xz", "unxz -k "),
        ("zst", "compressed by Zstandard", "unzstd "),
        ("zip", "a zip archive", "unzip "),
        ("tar", "a tar archive", "tar -xf "),
        ("parquet", "a Parquet table", "pandas"),
    ],
)
@pytest.mark.parametrize("name", ["a.{kind}", "a.txt"])
def test_what_is_packed_is_named_with_what_to_do(tmp_path, kind, what, mend, name):
    path = write(tmp_path / name.format(kind=kind), packed(kind))
    for named in (path, tmp_path) if path.suffix == ".txt" else (path,):
        with pytest.raises(BadInput) as refused:
            prepare([named], tmp_path / "out")
        line = str(refused.value)
        assert line.startswith(f"{path}: is {what}, not text; ")
        assert mend in line
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("text", [b"BZh is a name\n", b"PAR1 of the text\n", b"PK\n", b"7z x\n"])
def test_text_that_begins_like_one_is_text(tmp_path, text):
    assert sources(write(tmp_path / "a.gz", text), out=tmp_path / "out") == ["a.gz"]


# --- what a killed one leaves ---------------------------------------------------------------------

HOLDING = """
import os, sys, time
from onelaunch.checkpoints.atomic import atomic_directory
with atomic_directory(sys.argv[1]) as folder:
    (folder / "train.bin").write_bytes(b"tokens")
    print(folder.name, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holding(tmp_path):
    """Another process amid `atomic_directory`, and its temporary folder."""
    command = [sys.executable, "-c", HOLDING, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process, tmp_path / process.stdout.readline().strip()
    process.kill()
    process.communicate()


def test_what_a_killed_one_left_is_removed_by_the_next(tmp_path, holding):
    pytest.importorskip("fcntl")
    path = write(tmp_path / "a.txt")
    process, left = holding
    process.send_signal(signal.SIGKILL)
    process.wait()
    others = [".out2.77.tmp", ".out.tmp", ".out.77x.tmp"]  # of others
    for name in others:
        (tmp_path / name).mkdir()
    assert left.is_dir()
    prepare([path], tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "a.txt", "out"])


def test_what_a_living_one_holds_stays(tmp_path, holding):
    _, held = holding
    with atomic_directory(tmp_path / "out") as folder:
        assert folder != held
        assert (held / "train.bin").is_file()
    assert held.is_dir()
