"""The choice of a form, as it is kept: what it is of, and that nothing else is taken for one."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from onelaunch.compilation.cache import Store
from onelaunch.config import preset
from onelaunch.engines.cuda.blocking import Blocking, default
from onelaunch.engines.cuda.tuning import facts as facts_module
from onelaunch.engines.cuda.tuning import store as store_module
from onelaunch.engines.cuda.tuning.facts import syntax
from onelaunch.engines.cuda.tuning.store import (
    Choice,
    bucket,
    facts_of,
    find,
    keep,
    kept,
)
from onelaunch.errors import BadInput

CONFIG = preset("stories15m")
DEVICE = {"device": "NVIDIA H200", "multiprocessors": 132, "torch": "2.11", "triton": "3.6"}
FACTS = facts_of(CONFIG, "bfloat16", 1, 200, DEVICE)
STAGED = Choice(
    "staged",
    default(CONFIG, 256, 2),
    None,
    {"rule": 120.0, "staged": 110.5, "all": 121.25, "1": 150.0},
    31.5,
    97,
    "2026-11-21T10:11:12+00:00",
)
FUSED = replace(STAGED, form="all", programs=132)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.mark.parametrize("choice", [STAGED, FUSED])
def test_what_is_kept_is_found_again(store, choice):
    assert find(store, FACTS) is None
    assert keep(store, FACTS, choice)
    assert find(store, FACTS) == choice
    assert find(Store(store.folder), FACTS) == choice
    assert (store.hits, store.misses) == (1, 1)


def test_sizes_share_a_choice_up_to_a_power_of_two():
    sizes = [(1, 1), (3, 129), (4, 256), (64, 250), (1, 256)]
    assert [bucket(CONFIG, *size) for size in sizes] == [
        (1, 1), (4, 256), (4, 256), (64, 256), (1, 256),
    ]  # fmt: skip
    odd = CONFIG.with_(max_seq_len=200)
    assert bucket(odd, 1, 129) == bucket(odd, 1, 200) == (1, 200)
    assert facts_of(CONFIG, "bfloat16", 1, 129, DEVICE) == FACTS
    assert facts_of(CONFIG, "bfloat16", 1, 128, DEVICE) != FACTS


CHANGES = {
    "dim": {"dim": 576, "head_dim": 48},
    "layers": {"n_layers": 7},
    "heads": {"n_heads": 12, "n_kv_heads": 6, "head_dim": 48},
    "kv heads": {"n_kv_heads": 3},
    "head width": {"head_dim": 64},
    "hidden width": {"hidden_dim": 1024},
    "vocabulary": {"vocab_size": 512},
    "qk_norm": {"qk_norm": True},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_another_models_choice_is_another(store, changes):
    keep(store, FACTS, STAGED)
    assert find(store, facts_of(CONFIG.with_(**changes), "bfloat16", 1, 200, DEVICE)) is None
    assert kept(store, CONFIG.with_(**changes)) == []
    assert find(store, FACTS) == STAGED


@pytest.mark.parametrize(
    "other",
    [
        facts_of(CONFIG, "float16", 1, 200, DEVICE),
        facts_of(CONFIG, "bfloat16", 2, 200, DEVICE),
        facts_of(CONFIG, "bfloat16", 1, 100, DEVICE),
        facts_of(CONFIG, "bfloat16", 1, 200, DEVICE, all_positions=False),
        *(facts_of(CONFIG, "bfloat16", 1, 200, DEVICE | {name: 1}) for name in DEVICE),
    ],
)
def test_another_dtype_size_device_or_version_has_another(store, other):
    keep(store, FACTS, STAGED)
    assert find(store, other) is None


def test_what_changes_no_kernel_changes_no_choice(store):
    keep(store, FACTS, STAGED)
    same = CONFIG.with_(norm_eps=1e-6, rope_theta=5e5, rope_layout="half", tied_embeddings=False)
    assert find(store, facts_of(same, "bfloat16", 1, 200, DEVICE)) == STAGED


def test_other_sources_have_other_choices(store, monkeypatch):
    keep(store, FACTS, STAGED)
    monkeypatch.setattr(store_module, "_sources", lambda store: b"another day's")
    assert find(store, FACTS) is None
    assert kept(store, CONFIG) == []


def test_sources_are_parsed_once(store, monkeypatch):
    facts_module._digests.clear()
    keep(store, FACTS, STAGED)
    facts_module._digests.clear()  # as another process begins
    monkeypatch.setattr(facts_module, "syntax", None)
    assert find(store, FACTS) == STAGED


def test_an_edit_of_a_comment_is_no_other_source():
    source = '''"""A module."""

import math


def area(r):
    """Of a circle."""
    return math.pi * r**2  # in square units
'''
    edited = source.replace("A module", "One idea").replace("Of a circle", "In units")
    edited = edited.replace("\n\n\n", "\n\n\n# of geometry\n").replace("  # in square units", "")
    assert syntax(edited) == syntax(source)
    assert syntax(edited.replace("r**2", "r**3")) != syntax(source)
    assert syntax(edited.replace("def area(r)", "def area(r, n=1)")) != syntax(source)


def changed(path, value):
    """The text of a choice with something else in a place of it."""
    whole = json.loads(json.dumps({"of": FACTS, "choice": store_module.asdict(FUSED)}))
    at = whole
    for name in path[:-1]:
        at = at[name]
    if value is None:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return json.dumps(whole).encode()


TILE = ("choice", "blockings", "qkv")
WRONG = {
    "empty": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "no facts": changed(("of",), None),
    "another size": changed(("of", "batch"), 2),
    "a size that is none": changed(("of", "batch"), "1"),
    "a truth for a number": changed(("of", "n_layers"), True),
    "no form": changed(("choice", "form"), None),
    "an unknown form": changed(("choice", "form"), "both"),
    "more layers than there are": changed(("choice", "form"), "7"),
    "the rule as a form": changed(("choice", "form"), "rule"),
    "a form without its time": changed(("choice", "form"), "half"),
    "another field": changed(("choice", "more"), 1),
    "no programs": changed(("choice", "programs"), 0),
    "programs by halves": changed(("choice", "programs"), 1.5),
    "no time of the staged form": changed(("choice", "us", "staged"), None),
    "no time": changed(("choice", "us", "all"), 0.0),
    "an endless time": changed(("choice", "us", "all"), float("inf")),
    "a time that is none": changed(("choice", "us", "all"), "fast"),
    "a form that is none": changed(("choice", "us", "0"), 1.0),
    "no count": changed(("choice", "tried"), 1.0),
    "no date": changed(("choice", "measured"), 5),
    "a kind missing": changed(("choice", "blockings", "head"), None),
    "a kind too many": changed(("choice", "blockings", "sample"), {}),
    "rows that are no power of two": changed((*TILE, "rows"), 48),
    "too many rows": changed((*TILE, "rows"), 1 << 30),
    "no rows": changed((*TILE, "rows"), 0),
    "rows less than none": changed((*TILE, "rows"), -16),
    "rows by halves": changed((*TILE, "rows"), 32.0),
    "a truth for warps": changed((*TILE, "warps"), True),
    "too many stages": changed((*TILE, "num_stages"), 17),
    "a warm-up pass by number": changed((*TILE, "warmup_pass"), 1),
    "a blocking's field missing": changed((*TILE, "block_k"), None),
    "x in tiles of two widths": changed(("choice", "blockings", "down", "columns"), 64),
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_what_is_not_exactly_a_choice_is_none_and_goes(store, text):
    """Under the right key and with the store's digest right: as if these sources had been wrong."""
    key = store_module._key(store, FACTS)
    store.put(key, text, {"what": store_module.WHAT, "model": store_module._name(FACTS)})
    assert kept(store, CONFIG) == []
    assert find(store, FACTS) is None
    assert not store.contains(key)


def test_a_damaged_file_is_no_choice(store):
    assert find(store, FACTS) is None  # the first use of all in a process keeps a digest of sources
    before = set(store.folder.glob("*.program"))
    keep(store, FACTS, STAGED)
    (path,) = set(store.folder.glob("*.program")) - before
    whole = path.read_bytes()
    for at in range(0, len(whole), 97):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert find(store, FACTS) is None
        assert kept(store, CONFIG) == []
    path.write_bytes(whole)
    assert find(store, FACTS) == STAGED


def test_all_that_is_kept_of_a_model_is_listed_in_order(store):
    store.put("something", b"else", {"what": "a program"})
    other = facts_of(preset("stories110m"), "bfloat16", 1, 256, DEVICE)
    keep(store, other, replace(STAGED, blockings=default(preset("stories110m"), 256, 2)))
    facts = [
        facts_of(CONFIG, dtype, batch, sequence, DEVICE)
        for dtype in ("bfloat16", "float16")
        for batch, sequence in ((1, 64), (2, 16), (16, 16))
    ]
    for each in reversed(facts):
        keep(store, each, STAGED)
    assert kept(store, CONFIG) == [(each, STAGED) for each in facts]
    assert kept(Store(store.folder / "none"), CONFIG) == []


def test_a_store_that_cannot_be_used_keeps_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file")
    assert not keep(store, FACTS, STAGED)
    assert find(store, FACTS) is None
    assert kept(store, CONFIG) == []


def test_a_blocking_is_read_as_it_was_written():
    for blocking in (*STAGED.blockings.values(), Blocking(16, 512, 128, 0, 8, True)):
        data = json.loads(json.dumps(store_module.asdict(blocking)))
        assert store_module.read_blocking(data) == blocking
    with pytest.raises(BadInput):
        store_module.read_blocking({"rows": 16, "columns": 16})
