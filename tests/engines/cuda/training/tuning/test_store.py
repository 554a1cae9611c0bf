"""The measured forms of a training step, as they are kept, and that nothing else is taken for
them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

from onelaunch.compilation.cache import Store
from onelaunch.config import preset
from onelaunch.engines.cuda.training.forms import FEW_ROWS_BACK, rule
from onelaunch.engines.cuda.training.tuning import store as store_module
from onelaunch.engines.cuda.training.tuning.store import (
    TunedForms,
    data_of,
    facts_of,
    find,
    keep,
    read_forms,
)
from onelaunch.errors import BadInput

CONFIG = preset("stories15m")
DEVICE = {"device": "NVIDIA H200", "multiprocessors": 132, "torch": "2.11", "triton": "3.6"}
OF = (CONFIG, 64, 256, "bfloat16", False)
FACTS = facts_of(*OF, DEVICE)
FORMS = rule(CONFIG, 64, 256, torch.bfloat16, fuses=True)
TUNED = TunedForms(
    replace(FORMS, swiglu_backward=FEW_ROWS_BACK, side_stream=False),
    7900.5, 8123.25, 16, 61.2, "2026-12-21T10:11:12+00:00",
)  # fmt: skip


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.mark.parametrize(
    "forms",
    [
        TUNED.forms, FORMS, rule(CONFIG, 1, 16, torch.float32, fuses=False),
        rule(CONFIG.with_(qk_norm=True), 64, 256, torch.bfloat16, fuses=False),
    ],
)  # fmt: skip
def test_what_is_kept_is_found_again(store, forms):
    tuned = replace(TUNED, forms=forms)
    assert find(store, FACTS) is None
    assert keep(store, FACTS, tuned)
    assert find(Store(store.folder), FACTS) == tuned
    assert read_forms(json.loads(json.dumps(data_of(forms)))) == forms


OTHERS = {
    "model": facts_of(CONFIG.with_(hidden_dim=1024), *OF[1:], DEVICE),
    "rope": facts_of(CONFIG.with_(rope_layout="half"), *OF[1:], DEVICE),
    "head": facts_of(CONFIG.with_(tied_embeddings=False), *OF[1:], DEVICE),
    "batch": facts_of(CONFIG, 63, *OF[2:], DEVICE),
    "length": facts_of(CONFIG, 64, 255, *OF[3:], DEVICE),
    "dtype": facts_of(CONFIG, 64, 256, "float32", False, DEVICE),
    "dropout": facts_of(CONFIG, 64, 256, "bfloat16", True, DEVICE),
    **{name: facts_of(*OF, DEVICE | {name: 1}) for name in DEVICE},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_what_is_not_exactly_the_same_has_other_forms(store, other):
    keep(store, FACTS, TUNED)
    assert find(store, other) is None
    assert find(store, FACTS) == TUNED


def test_other_sources_have_other_forms(store, monkeypatch):
    keep(store, FACTS, TUNED)
    names = {path.name for path in store_module._source_files()}
    assert {"attention.py", "step.py", "forms.py", "swiglu_products.py", "training.py"} <= names
    monkeypatch.setattr(store_module, "digest_of", lambda *_: b"another day's")
    assert find(store, FACTS) is None


def changed(path, value):
    """The text of an entry with something else in a place of it; `...` removes it."""
    whole = {"of": FACTS, "tuned": {**asdict(TUNED), "forms": data_of(TUNED.forms)}}
    whole = json.loads(json.dumps(whole))
    at = whole
    for name in path[:-1]:
        at = at[name]
    if value is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return json.dumps(whole).encode()


FORM = ("tuned", "forms")
TILE, BLOCKS = (*FORM, "swiglu_forward"), (*FORM, "attention_forward")
WRONG = {
    "empty": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "no facts": changed(("of",), ...),
    "of another batch": changed(("of", "sequences"), 65),
    "more": changed(("more",), 1),
    "no forms": changed(FORM, ...),
    "forms that are none": changed(FORM, [1]),
    "a form missing": changed((*FORM, "side_stream"), ...),
    "a form too many": changed((*FORM, "around"), True),
    "a number for a truth": changed((*FORM, "side_stream"), 1),
    "a truth for a number": changed((*FORM, "logits"), True),
    "no logits": changed((*FORM, "logits"), 0),
    "half of attention": changed(BLOCKS, None),
    "rows that are no power of two": changed((*BLOCKS, "rows"), 48),
    "too many rows": changed((*BLOCKS, "rows"), 1 << 20),
    "too few columns": changed((*BLOCKS, "columns"), 8),
    "blocks as a list": changed(BLOCKS, [64, 64, 2, 4]),
    "a block's field missing": changed((*BLOCKS, "num_warps"), ...),
    "three warps": changed((*BLOCKS, "num_warps"), 3),
    "no stages": changed((*BLOCKS, "num_stages"), 0),
    "a tile's field too many": changed((*TILE, "more"), 1),
    "a tile by halves": changed((*TILE, "block_k"), 64.0),
    "too wide a tile": changed((*TILE, "block_f"), 512),
    "too many stages": changed((*TILE, "num_stages"), 17),
    "one warp": changed((*TILE, "num_warps"), 1),
    "too many parts": changed((*TILE, "parts"), 16),
    "flattened by number": changed((*TILE, "flatten"), 1),
    "too far ahead": changed((*TILE, "ahead"), 3),
    "no registers": changed((*TILE, "max_registers"), 0),
    "no time": changed(("tuned", "us"), 0.0),
    "an endless time": changed(("tuned", "rule_us"), float("inf")),
    "a time that is none": changed(("tuned", "us"), "fast"),
    "no count": changed(("tuned", "tried"), 1.5),
    "no date": changed(("tuned", "measured"), 5),
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_what_is_not_exactly_such_forms_is_none_and_goes(store, text):
    """Under the right key and with the store's digest right: as if these sources had been wrong."""
    key = store_module._key(store, FACTS)
    store.put(key, text, {"what": store_module.WHAT})
    assert find(store, FACTS) is None
    assert not store.contains(key)


def test_a_damaged_file_has_no_forms(store):
    assert find(store, FACTS) is None  # the first use of all in a process keeps a digest of sources
    before = set(store.folder.glob("*.program"))
    keep(store, FACTS, TUNED)
    (path,) = set(store.folder.glob("*.program")) - before
    whole = path.read_bytes()
    for at in range(0, len(whole), 97):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert find(store, FACTS) is None
    path.write_bytes(whole)
    assert find(store, FACTS) == TUNED


def test_a_store_that_cannot_be_used_keeps_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file")
    assert not keep(store, FACTS, TUNED)
    assert find(store, FACTS) is None


def test_forms_that_are_none_are_refused():
    for data in (None, {}, {"side_stream": True}, data_of(FORMS) | {"logits": -1}):
        with pytest.raises((BadInput, TypeError)):
            read_forms(data)
