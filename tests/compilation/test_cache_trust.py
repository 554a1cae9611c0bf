"""The store refuses what is damaged and what others could have written, and says why."""

import hashlib
import os
import random
import stat
import sys
from pathlib import Path

import pytest

from onelaunch.compilation import cache, entry
from onelaunch.compilation.cache import Store, default_folder
from tests.compilation.children import counts, the_file

posix = pytest.mark.skipif(os.name != "posix", reason="owners and modes as POSIX has them")


# damage


def test_no_bit_of_an_entry_can_change_unseen(store):
    store.put("key", b"\x00program\xff", {"seconds": 1.5})
    path = the_file(store)
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in (1, 32, 128):
            changed = bytearray(whole)
            changed[place] ^= bit
            path.write_bytes(changed)
            assert store.get("key") is None, (place, bit)
            assert not path.exists()
    assert store.damaged == 3 * len(whole) == store.misses
    path.write_bytes(whole)
    assert store.get("key") == b"\x00program\xff"


def test_no_shorter_or_longer_entry_is_trusted(store):
    program = random.Random(1).randbytes(300)
    store.put("key", program)
    path = the_file(store)
    whole = path.read_bytes()
    others = [whole[:n] for n in range(len(whole))] + [whole + b"\0", whole + whole]
    for number, other in enumerate(others, 1):
        path.write_bytes(other)
        assert not store.contains("key")
        assert store.entries() == []
        assert store.get("key") is None
        assert not path.exists()
        assert store.damaged == number


def test_the_entry_of_another_key_is_not_returned(store):
    store.put("one", b"1")
    first = the_file(store)
    whole = first.read_bytes()
    first.unlink()
    store.put("two", b"2")
    the_file(store).write_bytes(whole)
    assert not store.contains("two")
    assert store.get("two") is None
    assert store.damaged == 1


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"7",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        b'{"key": "key", "bytes": Infinity, "about": {}}',
        b'{"key": "key", "bytes": 0, "about": 3}',
        b'{"key": "key", "bytes": -1, "about": {}}',
    ],
    ids=lambda header: header[:50].decode("latin-1"),
)
def test_a_header_of_nonsense_is_damage_even_under_its_right_digest(store, header):
    store.put("key", b"")
    path = the_file(store)
    line = header + b"\n"
    path.write_bytes(entry._MAGIC + hashlib.sha256(line).hexdigest().encode() + b"\n" + line)
    assert not store.contains("key")
    assert store.entries() == []
    assert store.get("key") is None
    assert counts(store) == (0, 1, 1)


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "inside").write_text("x")


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _link(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


@posix
@pytest.mark.parametrize("make", [_folder, _pipe, _link])
@pytest.mark.parametrize("first", ["get", "put"])
def test_what_is_no_file_gives_way(store, make, first):
    store.put("key", b"x")
    path = the_file(store)
    path.unlink()
    make(path)
    assert not store.contains("key")
    if first == "get":
        assert store.get("key") is None
        assert store.damaged == 1
        assert not os.path.lexists(path)
    assert store.put("key", b"again")
    assert store.get("key") == b"again"


@posix
def test_a_file_that_others_could_write_is_not_trusted(store):
    for mode in (0o620, 0o602, 0o666):
        store.put("key", b"x")
        the_file(store).chmod(mode)
        assert not store.contains("key")
        assert store.get("key") is None
    assert store.damaged == 3
    store.put("key", b"x")
    the_file(store).chmod(0o644)
    assert store.get("key") == b"x"


# where


@posix
def test_the_folder_is_made_at_the_first_write_for_its_owner_alone(tmp_path):
    store = Store(tmp_path / "a" / "b")
    assert store.unusable is None
    assert store.get("key") is None
    assert not store.contains("key")
    assert store.entries() == []
    assert store.clear() == (0, 0)
    assert not (tmp_path / "a").exists()
    before = os.umask(0)
    try:
        assert store.put("key", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(the_file(store).stat().st_mode) == 0o600
    assert store.get("key") == b"x"


def check_unusable(store: Store, *words: str) -> None:
    """As if empty, without an exception, and with the reason."""
    assert all(word in store.unusable for word in (*words, str(store.folder)))
    assert "\n" not in store.unusable
    assert store.get("key") is None
    assert not store.contains("key")
    assert store.entries() == []
    assert store.clear() == (0, 0)
    assert not store.remove("key")
    assert not store.put("key", b"y")
    assert store.last_error == store.unusable
    assert counts(store) == (0, 1, 0)


@posix
@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777, 0o1777])
def test_a_folder_that_others_can_write_to_is_refused(store, mode):
    store.put("key", b"x")
    store.folder.chmod(mode)
    check_unusable(store, "others can write to it", "chmod go-w", "ONELAUNCH_CACHE")
    store.folder.chmod(0o755)
    assert store.unusable is None
    assert store.get("key") == b"x"


@posix
def test_a_folder_of_another_user_is_refused(store, monkeypatch):
    store.put("key", b"x")
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    check_unusable(store, "belongs to another user", "ONELAUNCH_CACHE")
    monkeypatch.undo()
    assert store.get("key") == b"x"


@posix
def test_a_file_of_another_user_is_not_trusted(store, monkeypatch):
    store.put("key", b"x")
    monkeypatch.setattr(cache, "_has_other_owner", lambda status: stat.S_ISREG(status.st_mode))
    assert not store.contains("key")
    assert store.get("key") is None
    assert store.damaged == 1


def test_a_place_that_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    check_unusable(Store(tmp_path / "file"), "not a folder")
    check_unusable(Store(tmp_path / "file" / "below"), "ONELAUNCH_CACHE")
    assert (tmp_path / "file").read_text() == "x"


def test_a_full_or_read_only_disk_is_named_and_leaves_nothing(store, monkeypatch):
    store.put("key", b"x")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert not store.put("other", b"y")
    assert "disk is full" in store.last_error
    assert str(store.folder) in store.last_error
    monkeypatch.undo()
    assert [path.name[0] for path in store.folder.iterdir()].count(".") == 0
    assert store.get("key") == b"x"

    def read_only(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert not store.put("other", b"y")
    assert "read-only" in store.last_error
    monkeypatch.undo()
    monkeypatch.setattr(os, "utime", read_only)
    assert store.get("key") == b"x"
    monkeypatch.undo()
    assert store.put("other", b"y")
    assert store.last_error is None


def test_a_file_that_cannot_be_read_is_a_miss(store, monkeypatch):
    store.put("key", b"x")

    def broken(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(entry, "read", broken)
    assert store.get("key") is None
    assert counts(store) == (0, 1, 0)
    assert "Input/output error" in store.last_error
    monkeypatch.undo()
    assert store.get("key") == b"x"


def test_the_default_folder(monkeypatch, tmp_path):
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setenv("ONELAUNCH_CACHE", "")
    for platform, folder in {
        "linux": home / ".cache",
        "darwin": home / "Library" / "Caches",
        "win32": home / "AppData" / "Local",
    }.items():
        monkeypatch.setattr(sys, "platform", platform)
        assert default_folder() == folder / "onelaunch"
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert default_folder() == tmp_path / "local" / "onelaunch"
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "onelaunch"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_folder() == home / ".cache" / "onelaunch"
    monkeypatch.setenv("ONELAUNCH_CACHE", "~/mine")
    assert default_folder() == Store().folder == home / "mine"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONELAUNCH_CACHE", "here")
    assert default_folder() == tmp_path / "here"


@posix
def test_a_user_without_a_home_has_a_folder_too(monkeypatch):
    for name in ("ONELAUNCH_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(sys, "platform", "linux")
    assert default_folder().is_absolute()
    assert str(os.getuid()) in str(default_folder())
