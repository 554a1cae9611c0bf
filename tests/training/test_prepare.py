"""`prepare`: what is read, how it is split, what is written, and that it is all or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from onelaunch.checkpoints.tokenizers import BytesTokenizer, Llama2cTokenizer, load_tokenizer
from onelaunch.errors import BadInput, RunFailed
from onelaunch.training import prepare as prepare_module
from onelaunch.training.data import open_data
from onelaunch.training.manifest import Manifest, dtype_for
from onelaunch.training.prepare import prepare
from onelaunch.training.stories import story

SHAKESPEARE = Path(__file__).parents[2] / ".." / "shared" / "data" / "tinyshakespeare.txt"
SEPARATOR = "<|endoftext|>\n"


def tokens_of(out: Path, split: str) -> list[int]:
    manifest = json.loads((out / "manifest.json").read_text())
    return np.fromfile(
        out / f"{split}.bin", f"<u{2 if manifest['dtype'] == 'uint16' else 4}"
    ).tolist()


def text_of(out: Path, split: str) -> str:
    return load_tokenizer(out / "tokenizer.bytes").decode(tokens_of(out, split))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("utf-8"))
    return path


# --- what is written ------------------------------------------------------------------------------


def test_one_file_is_split_at_nine_tenths_of_its_characters(tmp_path):
    text = "".join(random.Random(1).choices("abc \n", k=1003))
    out = tmp_path / "out"
    prepared = prepare([write(tmp_path / "a.txt", text)], out)
    assert prepared.folder == out
    assert prepared.ignored == 0
    assert text_of(out, "train") == text[:902]
    assert text_of(out, "val") == text[902:]
    train, val = tokens_of(out, "train"), tokens_of(out, "val")
    assert train[0] == 1
    assert 1 not in val
    assert sorted(os.listdir(out)) == ["manifest.json", "tokenizer.bytes", "train.bin", "val.bin"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest == {
        "schema": 1,
        "dtype": "uint16",
        "vocab_size": 259,
        "bos_id": 1,
        "eos_id": None,
        "tokenizer": {
            "kind": "bytes",
            "file": "tokenizer.bytes",
            "fingerprint": BytesTokenizer.fingerprint,
        },
        "synthetic": False,
        "splits": {
            split: {
                "file": f"{split}.bin",
                "tokens": len(ids),
                "bytes": n,
                "documents": 1,
                "sha256": hashlib.sha256((out / f"{split}.bin").read_bytes()).hexdigest(),
            }
            for split, ids, n in (("train", train, 902), ("val", val, 101))
        },
        "sources": [
            {"file": "a.txt", "bytes": 1003, "sha256": hashlib.sha256(text.encode()).hexdigest()}
        ],
    }
    assert Manifest.read(out) == prepared.manifest


@pytest.mark.skipif(
    not SHAKESPEARE.is_file(), reason="../shared/data/tinyshakespeare.txt is absent"
)
def test_shakespeare_splits_as_nanogpt_does(tmp_path):
    text = SHAKESPEARE.read_text()
    prepare([SHAKESPEARE], tmp_path / "out")
    data = open_data(str(tmp_path / "out"))
    assert data.n_tokens("train") == 1_003_854 + 1
    assert data.n_tokens("val") == 111_540
    assert data.bytes_of("val") == 111_540
    assert text_of(tmp_path / "out", "val") == text[int(0.9 * len(text)) :]
    predicted = sum(targets.size for _, targets in data.eval_batches("val", 64, 64))
    assert predicted == 111_539


@pytest.mark.parametrize(
    ("lengths", "train_parts", "val_parts"),
    [
        ([90, 10], [90], [10]),  # a boundary exactly at 90%
        ([91, 9], [91], [9]),
        ([95, 5], [95], [5]),  # 5% is still enough
        ([96, 4], [90], [6, 4]),  # 4% is not: cut within
        ([89, 11], [89, 1], [10]),  # the boundary is before 90%
        ([50, 45, 5], [50, 45], [5]),
        ([50, 46, 4], [50, 40], [6, 4]),
        ([100], [90], [10]),
        ([10] * 10, [10] * 9, [10]),
        ([2], [1], [1]),
    ],
)
def test_the_cut_is_at_a_boundary_where_that_leaves_enough(
    tmp_path, lengths, train_parts, val_parts
):
    documents = [("x" * (n - 1)) + "\n" for n in lengths]
    path = write(tmp_path / "a.txt", SEPARATOR.join(documents))
    out = tmp_path / "out"
    manifest = prepare([path], out).manifest
    train, val = manifest.splits["train"], manifest.splits["val"]
    assert (train.bytes, train.documents) == (sum(train_parts), len(train_parts))
    assert (val.bytes, val.documents) == (sum(val_parts), len(val_parts))
    assert text_of(out, "train") + text_of(out, "val") == "".join(documents)
    whole = sum(train_parts) in np.cumsum(lengths)
    assert (tokens_of(out, "val")[0] == 1) == whole
    assert tokens_of(out, "train").count(1) == len(train_parts)


def test_documents_separators_and_empty_ones(tmp_path):
    one = write(tmp_path / "1.txt", f"a\n<|endoftext|> not alone\n{SEPARATOR}\n \n{SEPARATOR}b\r\n")
    two = write(tmp_path / "2.txt", f"  <|endoftext|> \r\n{SEPARATOR}c{'d' * 96}\n<|endoftext|>")
    empty = write(tmp_path / "3.txt", "\n\n")
    bom = write(tmp_path / "4.txt", "\ufeffe" + "f" * 20)
    out = tmp_path / "out"
    prepared = prepare([one, two, empty, bom], out)
    first = "a\n<|endoftext|> not alone\n"
    texts = [first, "b\r\n", f"c{'d' * 96}\n", "e" + "f" * 20]
    ids = [i for text in texts for i in BytesTokenizer().encode(text)]
    written = tokens_of(out, "train") + tokens_of(out, "val")
    assert written == ids
    assert [source.file for source in prepared.manifest.sources] == [
        "1.txt",
        "2.txt",
        "3.txt",
        "4.txt",
    ]


def test_long_documents_of_many_scripts_round_trip(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "_BYTES_PIECE", 7)
    text = "Zo\u00eb \u4f60\u597d \U0001f642\n" * 30
    out = tmp_path / "out"
    manifest = prepare([write(tmp_path / "a.txt", text)], out).manifest
    cut = len(text) * 9 // 10
    assert text_of(out, "train") == text[:cut]
    assert text_of(out, "val") == text[cut:]
    assert manifest.splits["train"].bytes == len(text[:cut].encode())
    assert manifest.splits["train"].tokens == len(text[:cut].encode()) + 1


# --- tokenizers -----------------------------------------------------------------------------------


def test_a_named_tokenizer_is_used_and_kept(tmp_path):
    texts = [story(1, i) for i in range(60)]
    path = write(tmp_path / "a.txt", SEPARATOR.join(text + "\n" for text in texts))
    source = Path(prepare_module.__file__).with_name("stories_tokenizer.bin")
    out = tmp_path / "out"
    manifest = prepare([path], out, tokenizer=source).manifest
    assert manifest.vocab_size == 512
    assert manifest.tokenizer.kind == "llama2c"
    assert (out / manifest.tokenizer.file).read_bytes() == source.read_bytes()
    tokenizer = load_tokenizer(source)
    ids = tokens_of(out, "train") + tokens_of(out, "val")
    assert ids == [i for text in texts for i in tokenizer.encode(text + "\n")]
    assert open_data(str(out)).tokenizer.fingerprint == tokenizer.fingerprint


def test_vocab_size_trains_on_the_training_part(tmp_path):
    pytest.importorskip("sentencepiece")
    text = "".join(story(2, i) + "\n" for i in range(300))
    path = write(tmp_path / "a.txt", text + "\u00e9" * (len(text) // 9 - 5))
    out = tmp_path / "out"
    manifest = prepare([path], out, vocab_size=400).manifest
    tokenizer = load_tokenizer(out / manifest.tokenizer.file)
    assert manifest.vocab_size == tokenizer.vocab_size == 400
    assert isinstance(tokenizer, Llama2cTokenizer)
    assert "\u00e9".encode() not in tokenizer.pieces  # it stands in the validation part only
    with pytest.raises(BadInput, match="vocabulary size 259"):
        prepare([path], tmp_path / "other", vocab_size=259)
    assert not (tmp_path / "other").exists()


def test_a_tokenizer_learns_from_the_beginnings_of_too_much_text(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "_TOKENIZER_TEXT", 30)
    seen = []

    def train(texts, vocab_size):
        seen.extend(texts)
        return load_tokenizer(Path(prepare_module.__file__).with_name("stories_tokenizer.bin"))

    monkeypatch.setattr(prepare_module, "train_llama2c", train)
    documents = ["abcdefghi\n", "jklmnopqr\n", "stuvwxyza\n"] * 10
    prepare([write(tmp_path / "a.txt", SEPARATOR.join(documents))], tmp_path / "out", vocab_size=9)
    assert seen == ["a", "j", "s"] * 9


def test_vocabularies_above_65535_take_four_bytes(tmp_path, monkeypatch):
    assert (dtype_for(65_535), dtype_for(65_536)) == ("uint16", "uint32")

    class Wide(BytesTokenizer):
        vocab_size = 70_000

        def encode(self, text, bos=True):
            return [69_741 + byte for byte in text.encode()]

    monkeypatch.setattr(prepare_module, "load_tokenizer", lambda spec: Wide())
    out = tmp_path / "out"
    manifest = prepare([write(tmp_path / "a.txt", "hello world")], out).manifest
    assert manifest.dtype == "uint32"
    ids = tokens_of(out, "train") + tokens_of(out, "val")
    assert ids == [1, *(69_741 + byte for byte in b"hello world")]
    assert (out / "val.bin").stat().st_size == 2 * 4

    Wide.vocab_size = 69_800
    with pytest.raises(BadInput, match="tokenizer .*id 69860 .*69800"):
        prepare([tmp_path / "a.txt"], tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_wide_tokens_are_read_back(tmp_path, monkeypatch):
    class Wide(BytesTokenizer):
        vocab_size = 70_000

    monkeypatch.setattr(prepare_module, "load_tokenizer", lambda spec: Wide())
    monkeypatch.setattr("onelaunch.training.token_files.load_tokenizer", lambda spec: Wide())
    out = tmp_path / "out"
    prepare([write(tmp_path / "a.txt", "hello wide world " * 9)], out)
    tokens_BS, targets_BS = open_data(str(out)).train(4, 1).next(2)
    assert tokens_BS.max() < 259
    assert np.array_equal(tokens_BS[:, 1:], targets_BS[:, :-1])


# --- what is read ---------------------------------------------------------------------------------


def test_folders_are_read_in_order_and_other_files_counted(tmp_path):
    top = tmp_path / "texts"
    for name in ("b.txt", "a/z.md", "a/b/c.TXT", "c.csv", ".hidden.txt", ".git/x.txt", "README"):
        write(top / name, f"[{name}]")
    extra = write(tmp_path / "notes.log", "[log]")
    os.symlink(top / "missing.txt", top / "broken.txt")
    out = tmp_path / "out"
    prepared = prepare([top, extra, top / "b.txt"], out)
    assert [source.file for source in prepared.manifest.sources] == [
        "texts/a/b/c.TXT",
        "texts/a/z.md",
        "texts/b.txt",
        "notes.log",
    ]
    assert prepared.ignored == 4  # c.csv, .hidden.txt, README, broken.txt
    everything = text_of(out, "train") + text_of(out, "val")
    assert everything == "[a/b/c.TXT][a/z.md][b.txt][log]"


def test_out_may_lie_in_the_folder_that_is_read(tmp_path):
    write(tmp_path / "a.txt", "some text")
    prepare([tmp_path], tmp_path / "data")
    again = prepare([tmp_path], tmp_path / "data2")
    assert [source.file for source in again.manifest.sources] == [f"{tmp_path.name}/a.txt"]


def test_an_empty_folder_may_be_the_target(tmp_path):
    path = write(tmp_path / "a.txt", "some text")
    out = tmp_path / "new" / "deep" / "out"
    prepare([path], out)
    assert (out / "manifest.json").is_file()
    empty = tmp_path / "empty"
    empty.mkdir()
    prepare([path], empty)
    assert (empty / "manifest.json").read_bytes() == (out / "manifest.json").read_bytes()


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "at"),
    [
        (b"\xff", 0),
        (b"abc\n\xc3(", 4),
        (b"abc\n<|endoftext|>\nde\xe2\x82", 20),
        (b"\xef\xbb\xbfabc\xff", 6),
        ("wide".encode("utf-16"), 0),
    ],
)
def test_text_that_is_not_utf8_names_file_and_byte(tmp_path, data, at):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(BadInput, match=rf"a\.txt: not UTF-8 .*byte {at} "):
        prepare([tmp_path / "a.txt"], tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("text", ["", " \n\t\n", SEPARATOR * 3, "\ufeff"])
def test_no_text_at_all(tmp_path, text):
    with pytest.raises(BadInput, match=r"a\.txt: no text"):
        prepare([write(tmp_path / "a.txt", text)], tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.txt"]


def test_inputs_that_cannot_be_read(tmp_path):
    with pytest.raises(BadInput, match=r"missing\.txt: no such file"):
        prepare([tmp_path / "missing.txt"], tmp_path / "out")
    folder = tmp_path / "folder"
    write(folder / "a.csv", "1,2")
    with pytest.raises(BadInput, match=r"folder: no \.txt or \.md files \(1 others"):
        prepare([folder], tmp_path / "out")
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(BadInput, match=r"pipe\.txt: neither a file"):
        prepare([tmp_path / "pipe.txt"], tmp_path / "out")
    with pytest.raises(BadInput, match="one character"):
        prepare([write(tmp_path / "a.txt", "x")], tmp_path / "out")
    with pytest.raises(BadInput, match=r"nothing\.bin"):
        prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer=tmp_path / "nothing.bin")
    assert not (tmp_path / "out").exists()


def test_targets_that_cannot_be_written(tmp_path):
    path = write(tmp_path / "a.txt", "some text")
    with pytest.raises(BadInput, match=r"a\.txt: is a file; .*new folder"):
        prepare([path], path)
    with pytest.raises(BadInput, match=r": is not empty; .*new folder"):
        prepare([path], tmp_path)
    with pytest.raises(BadInput, match="cannot write"):
        prepare([path], path / "below")
    assert path.read_text() == "some text"


def test_a_file_that_changes_between_the_passes_is_noticed(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "some text")
    measure = prepare_module._measure

    def change(*args):
        total = measure(*args)
        path.write_text("some next")
        return total

    monkeypatch.setattr(prepare_module, "_measure", change)
    with pytest.raises(BadInput, match=r"a\.txt: changed"):
        prepare([path], tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "some text")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_module._TokenWriter, "add", full)
    with pytest.raises(RunFailed, match=r"out.*the disk is full"):
        prepare([path], tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.txt"]


def test_progress_is_said_seldom(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", SEPARATOR.join(f"{i}\n" for i in range(100)))
    now = [0.0]

    def clock():
        now[0] += 0.125
        return now[0]

    monkeypatch.setattr(prepare_module.time, "monotonic", clock)
    lines: list[str] = []
    prepare([path], tmp_path / "out", progress=lines.append)
    # two passes of 100 documents and an end each, eight to the second
    assert 20 <= len(lines) <= 26
    assert lines[0].startswith("preparing 0 MB of text: ")


# --- the verb -------------------------------------------------------------------------------------


def verb(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "onelaunch", "prepare", *map(str, args)],
        capture_output=True,
        text=True,
    )


def test_the_verb_says_what_it_wrote(tmp_path):
    folder = tmp_path / "texts"
    write(folder / "a.txt", "some text")
    write(folder / "a.csv", "1")
    done = verb(folder, "--out", tmp_path / "out")
    assert done.returncode == 0
    assert done.stdout == ""
    for fact in ("9 tokens", "1 file", "vocabulary 259", "uint16"):
        assert fact in done.stderr
    assert "ignored 1 files" in done.stderr
    assert "onelaunch train --data" in done.stderr
    quiet = verb(folder, "--out", tmp_path / "out2", "--quiet")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")


def test_the_verb_refuses_in_one_line(tmp_path):
    path = write(tmp_path / "a.txt", "some text")
    both = verb(path, "--out", tmp_path / "out", "--vocab-size", 300, "--tokenizer", "bytes")
    missing = verb(tmp_path / "b.txt", "--out", tmp_path / "out")
    no_out = verb(path)
    for failed in (both, missing, no_out):
        assert failed.returncode == 2
        assert failed.stdout == ""
        assert failed.stderr.startswith("onelaunch: ")
        assert failed.stderr.count("\n") == 1
    assert "--vocab-size" in both.stderr
    assert "b.txt" in missing.stderr
    assert "--out" in no_out.stderr
