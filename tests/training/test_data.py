"""Token data: every token once per epoch, exact restore, and one line for anything damaged."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onelaunch.errors import BadInput
from onelaunch.training import token_files
from onelaunch.training.data import open_data
from onelaunch.training.shuffle import mix64, shuffled
from onelaunch.training.stories import story
from onelaunch.training.story_data import STORIES_EVAL_ROWS, stories_tokenizer
from tests.training.token_folders import make_folder, make_tokens, use


def edit(folder: Path, *keys: str, value: object = None, drop: bool = False) -> None:
    """Change one field of a manifest."""
    path = folder / "manifest.json"
    root = json.loads(path.read_text())
    table = root
    for key in keys[:-1]:
        table = table[key]
    if drop:
        del table[keys[-1]]
    else:
        table[keys[-1]] = value
    path.write_text(json.dumps(root))


def rewrite(folder: Path, tokens: np.ndarray, dtype: str = "<u2", split: str = "train") -> None:
    """Replace a split's tokens, the manifest with them."""
    data = tokens.astype(dtype).tobytes()
    (folder / f"{split}.bin").write_bytes(data)
    edit(folder, "splits", split, "tokens", value=len(tokens))
    edit(folder, "splits", split, "sha256", value=hashlib.sha256(data).hexdigest())


# --- the permutation ------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [*range(1, 70), 255, 256, 257, 1000, 4095, 4097, 65537])
def test_shuffled_is_a_permutation(n):
    for key in (0, 12345):
        assert np.array_equal(np.sort(shuffled(np.arange(n), n, key)), np.arange(n))


def test_shuffled_is_the_same_in_any_portion_and_differs_by_key():
    whole = shuffled(np.arange(5000), 5000, 9)
    assert np.array_equal(whole[3100:3117], shuffled(np.arange(3100, 3117), 5000, 9))
    assert (whole == np.arange(5000)).sum() < 10
    assert (whole == shuffled(np.arange(5000), 5000, 10)).sum() < 10
    # neighbours go far apart: a random permutation's mean distance is n / 3
    assert 1500 < np.abs(np.diff(whole)).mean() < 1830


def test_shuffled_reaches_beyond_32_bits():
    n = (1 << 40) + 12345
    places = shuffled(np.arange(n - 1000, n), n, 3)
    assert places.min() >= 0
    assert places.max() < n
    assert len(set(places.tolist())) == 1000
    assert places.max() > 1 << 39


def test_mix64_is_splitmix64():
    # The first outputs of the published generator from seed 0.
    gamma = 0x9E3779B97F4A7C15
    assert mix64(gamma) == 0xE220A8397B1DCDAF
    assert mix64(2 * gamma) == 0x6E789E6AA1B965F4


# --- training batches from files ------------------------------------------------------------------


@pytest.mark.parametrize(("n", "seq_len"), [(100, 8), (9, 8), (10, 8), (17, 8), (16, 15), (50, 1)])
def test_an_epoch_visits_every_window_once(tmp_path, n, seq_len):
    make_folder(tmp_path)
    rewrite(tmp_path, 3 + np.arange(n))
    sampler = open_data(str(tmp_path)).train(seq_len, seed=5)
    offsets = set()
    for epoch in range(12):
        offset, n_windows = sampler.windows(epoch)
        offsets.add(offset)
        assert 0 <= offset < seq_len
        assert n_windows >= 1
        assert offset + n_windows * seq_len + 1 <= n  # no target beyond the end
        assert n - 1 - (offset + n_windows * seq_len) < seq_len  # none left out at the end
        seen = []
        for _ in range(n_windows):
            assert sampler.state_dict()["epoch"] == epoch
            tokens_BS, targets_BS = sampler.next(1)
            assert tokens_BS.dtype == targets_BS.dtype == np.int64
            assert np.array_equal(targets_BS, tokens_BS + 1)
            seen.append(int(tokens_BS[0, 0]) - 3)
        assert sorted(seen) == [offset + i * seq_len for i in range(n_windows)]
    assert len(offsets) > 1 or min(seq_len, n - seq_len) == 1


def test_batches_do_not_depend_on_how_they_are_cut(tmp_path, monkeypatch):
    make_folder(tmp_path, n_train=200)
    data = open_data(str(tmp_path))
    singles = data.train(8, 3)
    rows = np.concatenate([singles.next(1)[0] for _ in range(90)])
    monkeypatch.setattr(token_files, "_ORDER_BLOCK", 5)
    cut = data.train(8, 3)
    pieces = [cut.next(size)[0] for size in (1, 2, 30, 7, 50)]  # over the end of epochs
    assert np.array_equal(np.concatenate(pieces), rows)
    other = data.train(8, 4)
    assert not np.array_equal(other.next(90)[0], rows)


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data"), n_train=150)


@pytest.mark.parametrize("spec", ["stories", "files"])
@given(before=st.integers(0, 25), size=st.integers(1, 9), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=25, deadline=None)
def test_a_restored_sampler_goes_on_bit_for_bit(shared_folder, spec, before, size, seed):
    data = open_data("stories" if spec == "stories" else str(shared_folder), seed)
    sampler = data.train(16, seed)
    for _ in range(before):
        sampler.next(size)
    saved = json.loads(json.dumps(sampler.state_dict()))
    assert len(json.dumps(saved)) < 300
    ahead = [sampler.next(3) for _ in range(4)]
    restored = data.train(16, seed)
    restored.next(2)  # where it stood before must not matter
    restored.load_state_dict(saved)
    for expected in ahead:
        for ours, theirs in zip(restored.next(3), expected, strict=True):
            assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("spec", ["stories", "files"])
def test_skipped_batches_are_those_that_another_process_reads(shared_folder, spec):
    data = open_data("stories" if spec == "stories" else str(shared_folder))
    all_batches, every_third = data.train(16, 5), data.train(16, 5)
    for _ in range(4):
        expected = [all_batches.next(3)[0] for _ in range(3)][1]
        every_third.skip(3)
        assert np.array_equal(every_third.next(3)[0], expected)
        every_third.skip(3)
    assert every_third.state_dict() == all_batches.state_dict()


@pytest.mark.parametrize("spec", ["stories", "files"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s.pop("seed"),
        lambda s: s.update(extra=1),
        lambda s: s.update(seed=s["seed"] + 1),
        lambda s: s.update(seed=True),
        lambda s: s.update(seq_len=17),
        lambda s: s.update(data="0" * 64),
        lambda s: s.update(kind="other"),
        lambda s: s.update({list(s)[-1]: -1}),
        lambda s: s.update({list(s)[-1]: 1.0}),
        lambda s: s.update({list(s)[-1]: "1"}),
        lambda s: s.update({list(s)[-1]: 1 << 70}),
        lambda s: s.update({list(s)[-1]: None}),
    ],
)
def test_a_state_that_does_not_fit_is_refused(shared_folder, spec, damage):
    data = open_data("stories" if spec == "stories" else str(shared_folder))
    sampler = data.train(16, 1)
    state = sampler.state_dict()
    damage(state)
    with pytest.raises(BadInput, match="saved position"):
        sampler.load_state_dict(state)
    with pytest.raises(BadInput, match="saved position"):
        sampler.load_state_dict([])


def test_a_position_beyond_the_epoch_is_refused(shared_folder):
    sampler = open_data(str(shared_folder)).train(16, 1)
    n_windows = sampler.windows(0)[1]
    sampler.load_state_dict({**sampler.state_dict(), "position": n_windows - 1})
    with pytest.raises(BadInput, match="past the end"):
        sampler.load_state_dict({**sampler.state_dict(), "position": n_windows})


def test_a_file_shorter_than_one_sequence_is_refused(tmp_path):
    make_folder(tmp_path, n_train=9)
    data = open_data(str(tmp_path))
    assert data.train(8, 1).next(3)[0].shape == (3, 8)
    with pytest.raises(BadInput, match=r"train\.bin: 9 tokens .* 9 "):
        data.train(9, 1)
    with pytest.raises(BadInput, match="sequence length 0"):
        data.train(0, 1)


# --- evaluation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 8, 9, 10, 17, 24, 25, 26, 49, 100, 137])
def test_evaluation_predicts_every_token_after_the_first_once(tmp_path, n):
    make_folder(tmp_path, n_val=n)
    data = open_data(str(tmp_path))
    batches = list(data.eval_batches("val", 8, 3))
    expected = np.fromfile(tmp_path / "val.bin", "<u2").astype(np.int64)
    flat = np.concatenate([tokens.flatten() for tokens, _ in batches])
    targets = np.concatenate([targets.flatten() for _, targets in batches])
    assert np.array_equal(flat, expected[:-1])
    assert np.array_equal(targets, expected[1:])
    for tokens_BS, _ in batches[:-2]:
        assert tokens_BS.shape == (3, 8)
    for limit in (len(batches), len(batches) + 1):
        again = list(data.eval_batches("val", 8, 3, limit))
        assert len(again) == len(batches)
    assert data.n_tokens("val") == data.bytes_of("val") == n


def test_limited_evaluation_is_spread_and_always_the_same(tmp_path):
    make_folder(tmp_path, n_val=8 * 3 * 40 + 20)  # 40 whole batches of 3, 2 more rows, a tail
    data = open_data(str(tmp_path))
    whole = [tokens.tobytes() for tokens, _ in data.eval_batches("val", 8, 3)]
    assert len(whole) == 42
    for limit in (1, 2, 7, 39, 40):
        some = [tokens.tobytes() for tokens, _ in data.eval_batches("val", 8, 3, limit)]
        places = [whole.index(batch) for batch in some]
        assert len(places) == limit
        assert places[-1] < 40
        assert places == [i * 40 // limit for i in range(limit)] or len(set(whole)) < 42
        assert some == [tokens.tobytes() for tokens, _ in data.eval_batches("val", 8, 3, limit)]
    assert len(list(data.eval_batches("val", 8, 3, 41))) == 41


@pytest.mark.parametrize("n", [0, 1])
def test_evaluation_needs_two_tokens(tmp_path, n):
    make_folder(tmp_path, n_val=n)
    data = open_data(str(tmp_path))
    with pytest.raises(BadInput, match=r"val\.bin: [01] tokens "):
        data.eval_batches("val", 8, 3)


def test_unknown_splits_and_empty_batches_are_refused(shared_folder):
    for data in (open_data(str(shared_folder)), open_data("stories")):
        with pytest.raises(BadInput, match="split 'test'"):
            data.eval_batches("test", 8, 3)
        with pytest.raises(BadInput, match="batch size 0"):
            data.eval_batches("val", 8, 0)


# --- stories --------------------------------------------------------------------------------------


def test_story_rows_begin_with_a_story_and_go_on_with_the_next():
    data = open_data("stories", 3)
    sampler = data.train(128, 3)
    tokenizer = stories_tokenizer()
    tokens_BS, targets_BS = sampler.next(4)
    assert np.array_equal(tokens_BS[:, 1:], targets_BS[:, :-1])
    number = 0
    for tokens_S, targets_S in zip(tokens_BS, targets_BS, strict=True):
        row = [*tokens_S.tolist(), int(targets_S[-1])]
        expected: list[int] = []
        while len(expected) < 129:
            expected += tokenizer.encode(story(sampler._series, number))
            number += 1
        assert row == expected[:129]
        assert row[0] == data.bos_id
    assert sampler.state_dict()["story"] == number


def test_stories_train_and_val_are_different_series_and_say_synthetic():
    data = open_data("stories", 0)
    assert data.synthetic
    assert "synthetic" in data.label
    assert data.n_tokens("train") is None
    assert data.bytes_of("val") is None
    train = {row.tobytes() for row in data.train(128, 0).next(STORIES_EVAL_ROWS)[0]}
    val = [row.tobytes() for tokens, _ in data.eval_batches("val", 128, 32) for row in tokens]
    assert len(val) == STORIES_EVAL_ROWS
    assert len(train & set(val)) < 3
    own = [row.tobytes() for tokens, _ in data.eval_batches("train", 128, 32) for row in tokens]
    assert set(own) == train
    assert not train & {row.tobytes() for row in data.train(128, 1).next(STORIES_EVAL_ROWS)[0]}


def test_stories_evaluation_is_fixed_whatever_the_seed():
    batches = list(open_data("stories", 1).eval_batches("val", 32, 100))
    assert [len(tokens) for tokens, _ in batches] == [100, 100, 56]
    for (ours, _), (theirs, _) in zip(
        batches, open_data("stories", 2).eval_batches("val", 32, 100), strict=True
    ):
        assert np.array_equal(ours, theirs)
    some = list(open_data("stories").eval_batches("val", 32, 64, 2))
    assert len(some) == 2
    assert np.array_equal(some[0][0][:64], batches[0][0][:64])


# --- damage ---------------------------------------------------------------------------------------


def test_a_valid_folder_can_be_used(tmp_path):
    use(make_tokens(tmp_path))
    data = open_data(str(tmp_path))
    assert data.label == str(tmp_path)
    assert not data.synthetic
    edit(tmp_path, "synthetic", value=True)
    assert "synthetic" in open_data(str(tmp_path)).label


def test_the_fingerprint_changes_with_the_tokens(tmp_path):
    one = open_data(str(make_folder(tmp_path / "a"))).fingerprint
    assert open_data(str(make_folder(tmp_path / "b"))).fingerprint == one
    assert open_data(str(make_folder(tmp_path / "c", n_val=31))).fingerprint != one
    assert open_data("stories").fingerprint not in (one, "")


def test_a_folder_without_a_manifest_says_what_to_run(tmp_path):
    with pytest.raises(BadInput, match=r"no manifest\.json.*onelaunch prepare"):
        open_data(str(tmp_path))
    with pytest.raises(BadInput, match=r"no such data folder.*onelaunch prepare"):
        open_data(str(tmp_path / "missing"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match=r"no such data folder"):
        open_data(str(tmp_path / "file"))


def test_token_files_that_are_not_as_the_manifest_says(tmp_path):
    path = make_tokens(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(BadInput, match=r"train\.bin: 199 bytes"):
        open_data(str(tmp_path))
    path.write_bytes(whole[:-2])
    with pytest.raises(BadInput, match=r"train\.bin: has 99 tokens.* 100"):
        open_data(str(tmp_path))
    path.write_bytes(whole + b"\0\0")
    with pytest.raises(BadInput, match=r"train\.bin: has 101 tokens.* 100"):
        open_data(str(tmp_path))
    path.write_bytes(whole[2:] + whole[:2])
    with pytest.raises(BadInput, match=r"train\.bin: .*SHA-256"):
        open_data(str(tmp_path))
    path.unlink()
    with pytest.raises(BadInput, match=r"train\.bin: cannot read"):
        open_data(str(tmp_path))
    path.mkdir()
    with pytest.raises(BadInput, match=r"train\.bin: cannot read"):
        open_data(str(tmp_path))


@pytest.mark.parametrize("at", [0, 57, 99])
def test_ids_beyond_the_vocabulary_are_found(tmp_path, monkeypatch, at):
    monkeypatch.setattr(token_files, "_SCAN_TOKENS", 40)
    make_folder(tmp_path)
    tokens = 3 + np.arange(100)
    tokens[at] = 258
    rewrite(tmp_path, tokens)
    open_data(str(tmp_path))
    tokens[at] = 259
    rewrite(tmp_path, tokens)
    with pytest.raises(BadInput, match=rf"train\.bin: token {at} is id 259, outside .* 259"):
        open_data(str(tmp_path))


def test_a_file_that_changes_under_its_reader_is_one_line(tmp_path):
    path = make_tokens(tmp_path)
    data = open_data(str(tmp_path))
    sampler = data.train(8, 1)
    sampler.next(2)
    with open(path, "r+b") as file:
        file.write(b"\xff" * 200)
    with pytest.raises(BadInput, match=r"train\.bin: changed"):
        sampler.next(2)
    os.truncate(path, 0)
    with pytest.raises(BadInput, match=r"train\.bin: was truncated"):
        sampler.next(2)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("schema",), 2),
        (("schema",), "1"),
        (("schema",), True),
        (("dtype",), "float32"),
        (("dtype",), "uint32"),
        (("dtype",), 2),
        (("vocab_size",), 0),
        (("vocab_size",), -259),
        (("vocab_size",), 259.0),
        (("vocab_size",), 260),
        (("vocab_size",), 1 << 80),
        (("vocab_size",), None),
        (("bos_id",), 259),
        (("bos_id",), 2),
        (("bos_id",), "1"),
        (("bos_id",), None),
        (("tokenizer",), "bytes"),
        (("tokenizer", "kind"), "llama2c"),
        (("tokenizer", "file"), "../tokenizer.bytes"),
        (("tokenizer", "file"), "missing.bin"),
        (("tokenizer", "fingerprint"), "0" * 64),
        (("tokenizer", "fingerprint"), 5),
        (("synthetic",), 0),
        (("splits",), []),
        (("splits", "train"), None),
        (("splits", "train", "file"), "../train.bin"),
        (("splits", "train", "file"), "/dev/zero"),
        (("splits", "train", "file"), ".."),
        (("splits", "train", "file"), "a\0b"),
        (("splits", "train", "file"), "\ud800"),
        (("splits", "train", "file"), ""),
        (("splits", "train", "file"), "x" * 5000),
        (("splits", "train", "tokens"), 1 << 59),
        (("splits", "train", "tokens"), 10**40),
        (("splits", "train", "tokens"), -1),
        (("splits", "train", "tokens"), 100.0),
        (("splits", "val", "bytes"), "many"),
        (("splits", "val", "documents"), None),
        (("splits", "val", "sha256"), "abc"),
        (("sources",), {}),
        (("sources",), ["a.txt"]),
    ],
)
def test_a_damaged_manifest_is_one_line_that_names_it(tmp_path, keys, value):
    make_folder(tmp_path)
    edit(tmp_path, *keys, value=value)
    with pytest.raises(BadInput) as caught:
        open_data(str(tmp_path))
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize(
    "keys",
    [
        ("schema",),
        ("dtype",),
        ("vocab_size",),
        ("bos_id",),
        ("tokenizer",),
        ("tokenizer", "file"),
        ("synthetic",),
        ("splits", "val"),
        ("splits", "val", "tokens"),
        ("sources",),
    ],
)
def test_a_manifest_with_a_missing_field_is_one_line(tmp_path, keys):
    make_folder(tmp_path)
    edit(tmp_path, *keys, drop=True)
    with pytest.raises(BadInput, match=rf"manifest\.json.*{keys[-1]} is missing"):
        open_data(str(tmp_path))


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 50_000, b"1" * 5000])
def test_a_manifest_that_is_no_json_object_is_one_line(tmp_path, raw):
    make_folder(tmp_path)
    (tmp_path / "manifest.json").write_bytes(raw)
    with pytest.raises(BadInput, match=r"manifest\.json"):
        open_data(str(tmp_path))
