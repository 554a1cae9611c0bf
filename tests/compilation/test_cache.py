"""The store of compiled programs: what it keeps, how much, and for how many at once."""

import hashlib
import os
import random
import subprocess
import sys
import time

import pytest

from onelaunch.compilation import cache
from onelaunch.compilation.cache import Store, program_key
from tests.compilation.children import counts, the_file

# keys


def test_a_key_is_made_of_the_digests_of_its_parts():
    options = {"b": [1, 2.5, None], "a": "x"}
    key = program_key("text", options)
    texts = [b"text", b'{"a":"x","b":[1,2.5,null]}']
    assert key == "_".join(hashlib.sha256(text).hexdigest() for text in texts)
    assert program_key(b"text", dict(reversed(options.items()))) == key
    baked = program_key("text", options, b"weights")
    assert baked == f"{key}_{hashlib.sha256(b'weights').hexdigest()}"
    assert program_key("text", options, [memoryview(b"wei"), bytearray(b"ghts")]) == baked


def test_keys_differ_where_anything_does():
    keys = [
        program_key("a", {}),
        program_key("b", {}),
        program_key("a", {"n": 1}),
        program_key("a", {"n": 1.0}),
        program_key("a", {"n": "1"}),
        program_key("a", {"n": True}),
        program_key("a", {}, b""),
        program_key("a", {}, b"w"),
    ]
    assert len(set(keys)) == len(keys)


def test_options_that_are_not_plain_data_have_no_key():
    with pytest.raises(TypeError):
        program_key("a", {"n": object()})


# what comes back


@pytest.mark.parametrize("size", [0, 1, 4096, 1_000_003])
def test_what_is_put_comes_back(store, size):
    program = random.Random(size).randbytes(size)
    assert store.put("key", program, {"what": "a program", "seconds": 5.25})
    assert store.get("key") == program
    assert Store(store.folder).get("key") == program
    (entry,) = store.entries()
    assert (entry.key, entry.about) == ("key", {"what": "a program", "seconds": 5.25})
    assert entry.bytes == the_file(store).stat().st_size > size
    assert abs(entry.last_used - time.time()) < 60


def test_a_later_program_replaces_an_earlier(store):
    store.put("key", b"first")
    store.put("key", b"second")
    assert store.get("key") == b"second"
    assert len(store.entries()) == 1


def test_any_text_is_a_key_and_none_leaves_the_folder(store):
    keys = ["../up", "/abs", "", "a" * 5000, "\0", "\u00e9", program_key("a", {}, b"w")]
    for key in keys:
        assert store.put(key, key.encode())
    assert [store.get(key) for key in keys] == [key.encode() for key in keys]
    assert len(list(store.folder.iterdir())) == len(keys)
    assert list(store.folder.parent.iterdir()) == [store.folder]


def test_hits_and_misses_are_counted_and_contains_counts_nothing(store):
    assert not store.contains("key")
    assert store.peek("key") is None
    assert counts(store) == (0, 0, 0)
    assert store.get("key") is None
    assert counts(store) == (0, 1, 0)
    store.put("key", b"x")
    assert store.contains("key")
    assert store.peek("key") == b"x"
    assert counts(store) == (0, 1, 0)
    assert store.get("key") == b"x"
    assert counts(store) == (1, 1, 0)
    assert store.get("other") is None
    assert counts(store) == (1, 2, 0)


def test_contains_does_not_read_the_program(store):
    store.put("key", b"x" * 1000)
    path = the_file(store)
    path.write_bytes(path.read_bytes()[:-1] + b"y")
    assert store.contains("key")
    assert store.get("key") is None
    assert not store.contains("key")


def test_a_program_can_be_forgotten(store):
    assert not store.remove("key")
    store.put("key", b"x")
    assert store.remove("key")
    assert not store.contains("key")


def test_about_must_be_plain_and_nothing_is_left_of_a_failed_write(store):
    with pytest.raises(TypeError):
        store.put("key", b"x", {"what": object()})
    assert list(store.folder.iterdir()) == []


# how much


def test_the_limit_holds_on_both_sides(tmp_path):
    roomy = Store(tmp_path / "store")
    for key in "abc":
        roomy.put(key, key.encode() * 1000)
    size = roomy.entries()[0].bytes
    exact = Store(roomy.folder, limit_bytes=4 * size)
    exact.put("d", b"d" * 1000)
    assert {each.key for each in exact.entries()} == set("abcd")
    tight = Store(roomy.folder, limit_bytes=5 * size - 1)
    tight.put("e", b"e" * 1000)
    assert [each.key for each in tight.entries()] == list("edcb")


def test_the_least_recently_used_go_first(tmp_path):
    store = Store(tmp_path / "store")
    for key in "abcd":
        store.put(key, b"x" * 1000)
    assert store.get("a")
    assert store.contains("b")
    store.limit_bytes = 3 * store.entries()[0].bytes
    store.put("e", b"x" * 1000)
    assert [each.key for each in store.entries()] == list("ead")


def test_the_newest_stays_even_where_it_alone_is_too_much(tmp_path):
    store = Store(tmp_path / "store", limit_bytes=500)
    assert store.put("a", b"")
    assert store.put("b", b"x" * 1000)
    assert [each.key for each in store.entries()] == ["b"]
    assert store.put("c", b"y" * 1000)
    assert [each.key for each in store.entries()] == ["c"]


def test_temporary_files_go_when_they_are_old(store):
    store.put("key", b"x")
    now = time.time()
    ages = {".old.tmp": cache.STALE_SECONDS + 60, ".new.tmp": cache.STALE_SECONDS - 60}
    ages |= {"theirs.txt": 1e8, "theirs.tmp": 1e8}
    for clean in (lambda: store.put("key", b"y"), store.clear):
        for name, age in ages.items():
            (store.folder / name).write_text("x")
            os.utime(store.folder / name, (now - age, now - age))
        clean()
        names = {path.name for path in store.folder.iterdir()}
        assert {".new.tmp", "theirs.txt", "theirs.tmp"} <= names
        assert ".old.tmp" not in names


def test_clear_says_what_went(store):
    store.put("a", b"x" * 100)
    store.put("b", b"x" * 200)
    sizes = [each.bytes for each in store.entries()]
    (store.folder / ("0" * 64 + cache.SUFFIX)).write_bytes(b"damaged")
    (store.folder / "notes.txt").write_text("mine")
    assert store.clear() == (3, sum(sizes) + len(b"damaged"))
    assert [path.name for path in store.folder.iterdir()] == ["notes.txt"]
    assert store.clear() == (0, 0)
    assert store.put("a", b"x")


# several processes

WRITER = """
import hashlib, sys, time
from pathlib import Path
from onelaunch.compilation.cache import Store
store = Store(Path(sys.argv[1]), limit_bytes=70_000)
seed, until = sys.argv[2], time.monotonic() + 1.0
gone = rounds = 0
while time.monotonic() < until:
    rounds += 1
    key = str(rounds % 3)
    program = hashlib.sha256(f"{seed}{rounds}".encode()).digest() * 1000
    if not store.put(key, program, {"seed": seed}):
        sys.exit(f"put: {store.last_error}")
    program = store.get(key)
    if program is not None and (len(program) != 32000 or program != program[:32] * 1000):
        sys.exit("not what anybody wrote")
    store.entries()
    if rounds % 5 == 0:
        gone += store.clear()[0]
if store.damaged or not store.hits:
    sys.exit(f"{store.damaged} damaged, {store.hits} hits")
"""


def test_two_processes_write_read_and_clear_at_once(store):
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(store.folder), seed],
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in "ab"
    ]
    for writer in writers:
        _, errors = writer.communicate(timeout=300)
        assert (writer.returncode, errors) == (0, "")
    assert not [path for path in store.folder.iterdir() if path.suffix == ".tmp"]


def test_the_room_needs_nothing_heavy():
    code = (
        "import sys, onelaunch.compilation.background; "
        "assert not {'torch', 'numpy', 'numba', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
