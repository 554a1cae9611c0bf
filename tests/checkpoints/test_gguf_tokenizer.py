"""Tokenizers in GGUF files."""

import json
import re

import pytest
from tests.checkpoints import gguf_files

from onelaunch.checkpoints import load, random_model, save
from onelaunch.checkpoints.gguf_pre_tokenizers import PRE_TOKENIZERS, recognize, steps
from onelaunch.checkpoints.gguf_tokenizer import read_tokenizer
from onelaunch.checkpoints.gguf_tokenizer_export import tokenizer_keys
from onelaunch.checkpoints.tokenizer_compare import same_tokenizer
from onelaunch.checkpoints.tokenizers import (
    BytesTokenizer,
    JsonTokenizer,
    Llama2cTokenizer,
    find_tokenizer,
    load_tokenizer,
)
from onelaunch.errors import BadInput, MissingExtra

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = [
    *map(chr, range(33, 127)),
    "\u2581",
    "\u2581a",
    "ab",
    "\u2581ab",
    "\u00e9",
    "\u2581\u2581",
]


def _sentencepiece(**changes):
    """The keys of a small "llama" tokenizer; None removes one."""
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *PIECES]
    keys = {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 259 + [-float(i) for i in range(len(PIECES))],
        "token_type": [2, 3, 3, *[6] * 256, *[1] * len(PIECES)],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    keys |= changes
    return {f"tokenizer.ggml.{key}": each for key, each in keys.items() if each is not None}


def _file(folder, keys, name="m.gguf"):
    path = folder / name
    entries = {**gguf_files.metadata(), **keys}
    path.write_bytes(gguf_files.gguf_bytes(entries, gguf_files.tensors()[0]))
    return path


def _reference():
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % byte for byte in range(256))]
    pieces += [piece.replace("\u2581", " ").encode() for piece in PIECES]
    return Llama2cTokenizer(pieces, [0.0] * 259 + [-float(i) for i in range(len(PIECES))])


def test_sentencepiece(tmp_path):
    tokenizer = read_tokenizer(_file(tmp_path, _sentencepiece()))
    assert tokenizer.fingerprint == _reference().fingerprint
    assert tokenizer.decode(tokenizer.encode("ab  a \u00e9\u4f60")) == "ab  a \u00e9\u4f60"


def test_padding_is_no_part_of_the_vocabulary(tmp_path):
    keys = _sentencepiece()
    keys["tokenizer.ggml.tokens"] += ["[PAD359]", "[PAD360]"]
    keys["tokenizer.ggml.scores"] += [0.0, 0.0]
    keys["tokenizer.ggml.token_type"] += [5, 5]
    assert read_tokenizer(_file(tmp_path, keys)).vocab_size == 259 + len(PIECES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "kind 'bert' is not supported"),
        ({"model": 3}, "tokenizer.ggml.model must be a string"),
        ({"tokens": None}, "pieces of its tokenizer are missing"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens must be an array of strings"),
        ({"token_type": [1]}, "not one type each"),
        ({"scores": None}, "one finite score"),
        ({"scores": [float("nan")] * 400}, "one finite score"),
        ({"tokens": ["a"] * (259 + len(PIECES))}, "occurs twice"),
        ({"tokens": [f"p{i}" for i in range(259 + len(PIECES))]}, "has not all bytes"),
        ({"add_space_prefix": False, "unknown_token_id": 9999}, "9999 is no piece"),
    ],
)
def test_a_tokenizer_that_cannot_be_used(tmp_path, changes, message):
    path = _file(tmp_path, _sentencepiece(**changes))
    with pytest.raises(BadInput, match=message) as caught:
        read_tokenizer(path)
    assert str(caught.value).startswith(f"{path}: ")
    with pytest.raises(BadInput, match=message):
        load_tokenizer(path)


def _other_layout(**changes):
    """As `_sentencepiece`, with special tokens before the bytes and at the end."""
    keys = _sentencepiece()
    tokens, scores = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.scores"]
    keys["tokenizer.ggml.tokens"] = [*tokens[:3], "[INST]", *tokens[3:], "<|im|>"]
    keys["tokenizer.ggml.scores"] = [*scores[:3], 0.0, *scores[3:], 0.0]
    keys["tokenizer.ggml.token_type"] = [2, 3, 3, 3, *[6] * 256, *[1] * len(PIECES), 4]
    return keys | {f"tokenizer.ggml.{key}": each for key, each in changes.items()}


def other_layout_file(folder):
    return _file(folder, _other_layout())


def test_sentencepiece_with_special_tokens_elsewhere(tmp_path):
    pytest.importorskip("tokenizers")
    tokenizer = read_tokenizer(_file(tmp_path, _other_layout()))
    assert tokenizer.kind == "json"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (1, 2, (1, 2))
    assert tokenizer.vocab_size == 261 + len(PIECES)

    def expected(text):
        ids = _reference().encode(text, bos=False)
        return [i + 1 if i >= 3 else i for i in ids]

    for text in ("ab", "a", "  ab  a", "\u00e9\u4f60!", TEXT):
        assert tokenizer.encode(text) == [1, *expected(text)]
        assert tokenizer.decode(tokenizer.encode(text)) == text
    last = tokenizer.vocab_size - 1
    ids = [1, *expected("ab"), 3, *expected("a"), last, *expected("b")]
    assert tokenizer.encode("ab[INST]a<|im|>b") == ids
    bare = _file(tmp_path, _other_layout(add_bos_token=False, add_space_prefix=False))
    assert read_tokenizer(bare).encode("ab") == [260 + PIECES.index("ab")]


def test_other_ids_of_bos_and_eos(tmp_path):
    pytest.importorskip("tokenizers")
    tokenizer = read_tokenizer(_file(tmp_path, _sentencepiece(bos_token_id=2, eos_token_id=1)))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (2, 1)
    assert tokenizer.encode("a")[0] == 2


def test_where_a_tokenizer_is_looked_for(tmp_path):
    path = _file(tmp_path, _sentencepiece())
    model = load(path)
    assert (model.bos_id, model.stop_ids) == (1, (1, 2))
    (tmp_path / "tokenizer.bytes").write_text("bytes")
    assert find_tokenizer(model).kind == "llama2c"
    assert load_tokenizer(path).kind == "llama2c"
    (tmp_path / "m.tokenizer.bytes").write_text("bytes")
    assert find_tokenizer(model).kind == "bytes"
    (tmp_path / "m.tokenizer.bytes").unlink()
    # none inside: what lies in the folder
    for changes in ({"model": "no_vocab"}, {"model": None}):
        path = _file(tmp_path, _sentencepiece(**changes))
        assert find_tokenizer(load(path)).kind == "bytes"
    (tmp_path / "tokenizer.bytes").unlink()
    assert find_tokenizer(load(path)) is None
    with pytest.raises(BadInput, match=r"m\.gguf: has no tokenizer in it"):
        load_tokenizer(path)
    # one inside that cannot be used: not that of another model in the folder
    (tmp_path / "tokenizer.bytes").write_text("bytes")
    path = _file(tmp_path, _sentencepiece(model="bert"))
    with pytest.raises(BadInput, match="kind 'bert'"):
        find_tokenizer(load(path))


def test_ends_by_key_and_by_name(tmp_path):
    tokens = ["a", "<|im_end|>", "<|eot_id|>", "b", "c", "d"]
    keys = {"model": "gpt2", "tokens": tokens, "token_type": [1, 3, 1, 3, 3, 3]}
    keys |= {"eos_token_id": 3, "eot_token_id": 4, "bos_token_id": 99}
    model = load(_file(tmp_path, {f"tokenizer.ggml.{k}": v for k, v in keys.items()}))
    assert (model.bos_id, model.stop_ids) == (None, (1, 3, 4))


# ---------------------------------------------------------------- written and read again


def _model(rows):
    model = random_model("stories260k")
    model.config = model.config.with_(vocab_size=rows)
    model.weights["embed_tokens.weight"] = model.weights["embed_tokens.weight"][:1].repeat(rows, 1)
    return model


def _there_and_back(folder, tokenizer, extra=0, **ids):
    pytest.importorskip("gguf")
    model = _model(tokenizer.vocab_size + extra)
    for name, value in ids.items():
        setattr(model, name, value)
    save(model, folder / "out.gguf", "gguf", tokenizer=tokenizer)
    again = find_tokenizer(load(folder / "out.gguf"))
    assert again is not None
    assert load_tokenizer(folder / "out.gguf").fingerprint == again.fingerprint
    return again


@pytest.mark.parametrize("extra", [0, 3])
def test_bytes_and_sentencepiece_come_back(tmp_path, extra):
    for tokenizer in (BytesTokenizer(), _reference()):
        again = _there_and_back(tmp_path, tokenizer, extra)
        assert type(again) is type(tokenizer)
        assert again.fingerprint == tokenizer.fingerprint


def test_pieces_that_no_text_becomes_have_other_names():
    tokenizer = _reference()
    pieces = [*tokenizer.pieces, b"\xff", b"ab", b"", "\u2581x".encode()]
    tokenizer = Llama2cTokenizer(pieces, [*tokenizer.scores, -1.0, -2.0, -3.0, -4.0])
    keys = tokenizer_keys(tokenizer, len(pieces))
    first = len(pieces) - 4
    assert keys["token_list"][first:] == [b"<piece %d>" % i for i in range(first, len(pieces))]
    assert keys["token_types"][first:] == [5] * 4
    assert len(keys["token_scores"]) == len(pieces)


def test_a_tokenizer_json_of_sentencepiece_comes_back(tmp_path):
    pytest.importorskip("tokenizers")
    pytest.importorskip("gguf")
    first = read_tokenizer(_file(tmp_path, _other_layout()))
    again = _there_and_back(tmp_path, first, extra=2)
    assert same_tokenizer(first, again)
    assert again.encode("ab[INST] a<|im|>") == first.encode("ab[INST] a<|im|>")
    keys = tokenizer_keys(first, first.vocab_size)
    assert keys["token_types"] == _other_layout()["tokenizer.ggml.token_type"]
    # a step of another name that does the same, and one that does not
    data = first.definition()
    data["normalizer"] = None
    spaces = {"type": "Metaspace", "replacement": "\u2581", "split": False}
    data["pre_tokenizer"] = {**spaces, "prepend_scheme": "never"}
    other = JsonTokenizer.from_definition(data, {"bos_token_id": 1, "eos_token_id": 2}, "x")
    assert same_tokenizer(other, _there_and_back(tmp_path, other))
    data["pre_tokenizer"]["prepend_scheme"] = "always"
    other = JsonTokenizer.from_definition(data, {}, "x")
    with pytest.raises(BadInput, match="the file cannot store the tokenizer"):
        tokenizer_keys(other, other.vocab_size)


def test_merges_that_are_not_in_the_order_of_scores(tmp_path):
    """BPE that was learned otherwise forms pieces only by its own merges."""
    pytest.importorskip("tokenizers")
    data = read_tokenizer(_file(tmp_path, _other_layout())).definition()
    merges = data["model"]["merges"]
    assert ["\u2581a", "b"] in merges
    data["model"]["merges"] = [merge for merge in merges if merge != ["\u2581a", "b"]]
    tokenizer = JsonTokenizer.from_definition(data, {}, "x")
    with pytest.raises(BadInput, match="its merges are not in the order of scores"):
        tokenizer_keys(tokenizer, tokenizer.vocab_size)


TEXT = """It's we'LL 12345 x<<=3 $$ ++
  two  spaces,\ta tab\r\n\n \u00e9 e\u0301 \u4f60\u597d \U0001f600 don't <|end|>!! 7 77"""


def train_bpe(folder, name, **changes):
    """A trained tokenizer.json whose text is split as `name` says."""
    library = pytest.importorskip("tokenizers")
    pre = PRE_TOKENIZERS[name]
    model = library.models.BPE(ignore_merges=pre.ignore_merges)
    data = json.loads(library.Tokenizer(model).to_str())
    data["pre_tokenizer"] = steps(pre)
    data["normalizer"] = pre.normalizer and {"type": pre.normalizer}
    data["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    tokenizer = library.Tokenizer.from_str(json.dumps({**data, **changes}))
    trainer = library.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|begin|>", "<|end|>"],
        show_progress=False,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
    )
    corpus = "we'll go there 12345 it's the\n\n  two spaces then some text of it 12 123 1234" * 20
    tokenizer.train_from_iterator([corpus], trainer)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    settings = {"bos_token_id": 0, "eos_token_id": [1]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return JsonTokenizer(path)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_bpe_comes_back(tmp_path, name):
    tokenizer = train_bpe(tmp_path, name)
    assert recognize(tokenizer.definition()) == name
    again = _there_and_back(tmp_path, tokenizer, extra=2, bos_id=0, stop_ids=(0, 1))
    assert (again.kind, again.vocab_size) == ("json", tokenizer.vocab_size)
    assert (again.bos_id, again.eos_id, again.stop_ids) == (0, 1, (0, 1))
    assert again.adds_bos is tokenizer.adds_bos is False
    assert same_tokenizer(tokenizer, again)
    ids = tokenizer.encode(TEXT)
    assert again.encode(TEXT) == ids
    assert 1 in ids
    assert again.decode(ids) == tokenizer.decode(ids)
    assert len(ids) > 40


def test_the_names_of_pre_tokenizers_differ_in_what_they_do(tmp_path):
    split = {name: tuple(train_bpe(tmp_path, name).encode("1234 12345")) for name in PRE_TOKENIZERS}
    assert len(set(split.values())) >= 3


def test_a_template_with_bos(tmp_path):
    tokenizer = train_bpe(tmp_path, "llama-bpe")
    data = tokenizer.definition()
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|begin|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [0], "tokens": ["<|begin|>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = JsonTokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.adds_bos
    again = _there_and_back(tmp_path, tokenizer, bos_id=0, stop_ids=(0, 1))
    assert again.adds_bos
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    assert again.encode(TEXT)[0] == 0


def test_a_saved_copy_of_it(tmp_path):
    """`export --format hf` writes the tokenizer of a GGUF file as a tokenizer.json."""
    tokenizer = train_bpe(tmp_path, "qwen2")
    again = _there_and_back(tmp_path, tokenizer, bos_id=0, stop_ids=(0, 1))
    (tmp_path / "copy").mkdir()
    copy = load_tokenizer(again.save(tmp_path / "copy"))
    assert copy.fingerprint == again.fingerprint
    assert (copy.bos_id, copy.eos_id, copy.stop_ids) == (0, 1, (0, 1))


def test_without_the_library(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    tokenizer = train_bpe(tmp_path, "gpt-2")
    save(_model(tokenizer.vocab_size), tmp_path / "out.gguf", "gguf", tokenizer=tokenizer)
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(MissingExtra, match=r"reading \S+out\.gguf needs the package tokenizers"):
        find_tokenizer(load(tmp_path / "out.gguf"))


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("gpt-2", {"decoder": None}, "way of splitting"),
        ("gpt-2", {"normalizer": {"type": "NFKC"}}, "way of splitting"),
        ("gpt-2", {"pre_tokenizer": {"type": "Whitespace"}}, "way of splitting"),
        ("gpt-2", {"pre_tokenizer": None}, "way of splitting"),
        ("gpt-2", {"model": {"ignore_merges": True}}, "way of splitting"),
        ("llama-bpe", {"model": {"ignore_merges": False}}, "way of splitting"),
        ("gpt-2", {"model": {"merges": []}}, "no merges"),
        ("gpt-2", {"model": {"byte_fallback": True}}, "no BPE over bytes"),
    ],
)
def test_what_a_file_cannot_store(tmp_path, name, changes, reason):
    data = train_bpe(tmp_path, name).definition()
    data |= {key: each for key, each in changes.items() if key != "model"}
    data["model"] |= changes.get("model", {})
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = JsonTokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(BadInput, match=f"format='gguf': .*{reason}"):
        tokenizer_keys(tokenizer, tokenizer.vocab_size)


def test_more_tokens_than_the_model_has_rows():
    with pytest.raises(BadInput, match="has 259 tokens, more than the 258 of the model"):
        tokenizer_keys(BytesTokenizer(), 258)


def test_damaged_bpe(tmp_path):
    pytest.importorskip("tokenizers")
    tokens = [chr(i) for i in range(33, 127)]
    keys = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "merges": ["a b"]}
    for changes, message in [
        ({"merges": ["a zz"]}, "not a usable"),
        ({"tokens": ["a", "a"]}, "occurs twice"),
        ({"tokens": [b"\xff"]}, "not UTF-8"),
        ({"pre": "jina"}, "pre-tokenizer 'jina' is not supported, only gpt-2, smollm"),
    ]:
        entries = {f"tokenizer.ggml.{k}": v for k, v in (keys | changes).items()}
        path = _file(tmp_path, entries)
        with pytest.raises(BadInput, match=re.escape(str(path)) + f": .*{message}"):
            read_tokenizer(path)
