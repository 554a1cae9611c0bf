"""GGUF, llama2.c's other versions and sentencepiece on the command line."""

import io
import json

import pytest
import torch

from onelaunch.checkpoints import load, save
from onelaunch.checkpoints.weights import LoadedModel
from onelaunch.config import ModelConfig
from onelaunch.model import Model
from tests.tokenizer_files import llama2c_tokenizer, write_json_tokenizer

GREEDY = ("--engine", "reference", "--temperature", "0", "--max-new-tokens", "6")
CONFIG = ModelConfig(
    dim=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    hidden_dim=32,
    vocab_size=320,
    max_seq_len=32,
    rope_layout="interleaved",
)


@pytest.fixture
def bin_file(tmp_path):
    """A model with random weights, wide enough that its greedy ids differ, and its tokenizer."""
    folder = tmp_path / "source"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator) * 0.3
        for name, shape in CONFIG.weight_shapes().items()
    }
    save(LoadedModel(CONFIG, weights), folder / "model.bin", "llama2c")
    llama2c_tokenizer("a", "b", " ", " a").save(folder)
    return folder / "model.bin"


def _ids(onelaunch, model, *options):
    code, out, err = onelaunch("generate", model, "--prompt", "a b", "--ids", *GREEDY, *options)
    assert code == 0, err
    return out


def test_gguf_there_and_back(bin_file, tmp_path, onelaunch):
    pytest.importorskip("gguf")
    out = tmp_path / "out.gguf"
    code, text, err = onelaunch("export", bin_file, out, "--format", "gguf")
    assert (code, text) == (0, "")
    assert err == f"wrote {out} (gguf, {out.stat().st_size:,} bytes)\n"
    assert list(tmp_path.glob("out*")) == [out]
    assert _ids(onelaunch, out) == _ids(onelaunch, bin_file)
    facts = json.loads(onelaunch("inspect", out, "--json")[1])
    assert (facts["format"], facts["tokenizer"]["kind"]) == ("gguf", "llama2c")
    assert facts["tokenizer"]["vocab_size"] == 263
    again = tmp_path / "again.bin"
    code, _, err = onelaunch("export", out, again, "--format", "llama2c")
    assert code == 0, err
    assert again.read_bytes() == bin_file.read_bytes()
    tokenizer = (tmp_path / "again.tokenizer.bin").read_bytes()
    assert tokenizer == (bin_file.parent / "tokenizer.bin").read_bytes()


def test_gguf_in_eight_bits(bin_file, tmp_path, onelaunch):
    pytest.importorskip("gguf")
    out = tmp_path / "out.gguf"
    code, _, err = onelaunch("export", bin_file, out, "--format", "gguf", "--weights", "q8_0")
    assert code == 0, err
    assert out.stat().st_size < bin_file.stat().st_size / 2
    code, _, err = onelaunch("generate", out, "--prompt", "a", *GREEDY)
    assert code == 0
    assert f"{out}: 15 tensors in Q8_0 were converted to float32\n" in err
    narrow = CONFIG.with_(hidden_dim=40)
    save(LoadedModel(narrow, Model(narrow).init_weights(0).state_dict()), bin_file, "llama2c")
    code, _, err = onelaunch(
        "export", bin_file, tmp_path / "n.gguf", "--format", "gguf", "--weights", "q4_0"
    )
    assert code == 0
    assert "note: 2 matrices, such as layers.0.mlp.down_proj.weight, are in float16: their" in err


def test_a_tokenizer_that_no_gguf_holds_is_left_out(bin_file, tmp_path, onelaunch):
    pytest.importorskip("gguf")
    pytest.importorskip("tokenizers")
    (bin_file.parent / "tokenizer.bin").unlink()
    write_json_tokenizer(bin_file.parent)
    out = tmp_path / "out.gguf"
    code, _, err = onelaunch("export", bin_file, out, "--format", "gguf")
    assert code == 0
    assert "the tokenizer was left out: format='gguf': the file cannot store the tokenizer" in err
    code, _, err = onelaunch("generate", out, "--prompt", "a")
    assert (code, err.count("\n")) == (2, 1)
    assert "no tokenizer found" in err


def test_eight_bits_for_runq(bin_file, tmp_path, onelaunch):
    out = tmp_path / "out.bin"
    code, _, err = onelaunch("export", bin_file, out, "--format", "llama2c-int8")
    assert code == 0
    assert err.splitlines()[1:] == [
        "note: the weights are in groups of 32, as rows of 32 and 32 are not whole groups of 64: "
        "each has a scale of four bytes",
        f"wrote {tmp_path / 'out.tokenizer.bin'}",
    ]
    code, _, err = onelaunch("generate", out, "--prompt", "a", *GREEDY)
    assert code == 0
    assert f"{out}: int8 weights were converted to float32\n" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("m.gguf", "--format", "gguf", "--weights", "q5"), "--weights q5: must be one of f32"),
        (("m.gguf", "--format", "gguf", "--weights", "fp16"), "--weights fp16: must be one of"),
        (("m.bin", "--format", "gguf"), "m.bin: a GGUF file is known by its name: it must end in"),
        (("m.bin", "--format", "llama2c", "--weights", "f16"), "--weights f16: is for --format gg"),
        (("m.gguf", "--format", "gguf", "--seq", "8"), "--seq 8: is for --format coreml"),
    ],
)
def test_options_that_do_not_fit(bin_file, tmp_path, onelaunch, options, message):
    pytest.importorskip("gguf")
    code, out, err = onelaunch("export", bin_file, tmp_path / options[0], *options[1:])
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_file_that_would_be_taken_for_its_tokenizer(bin_file, tmp_path, onelaunch):
    (tmp_path / "m.tokenizer.json").write_text("{}")
    code, _, err = onelaunch("export", bin_file, tmp_path / "m.gguf", "--format", "gguf")
    assert code == 2
    assert "m.tokenizer.json: exists already, and would be taken for the tokenizer" in err


def test_a_sentencepiece_model_by_option(bin_file, tmp_path, onelaunch):
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "a cat and a hat"] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    text = "the cat, \u00e9 and  a mat"
    bare = tmp_path / "bare"
    bare.mkdir()
    moved = bin_file.rename(bare / "model.bin")
    spec = ("--tokenizer", path)
    code, out, err = onelaunch("generate", moved, "--prompt", text, "--ids", *GREEDY, *spec)
    assert code == 0, err
    expected = processor.encode(text)
    assert [int(i) for i in out.split()][: len(expected)] == expected
    (tmp_path / "text.txt").write_text(text)
    made = ("prepare", tmp_path / "text.txt", "--out", tmp_path / "data", *spec)
    code, _, err = onelaunch(*made)
    assert code == 0, err
    assert (tmp_path / "data" / "tokenizer.bin").is_file()


def test_a_tokenizer_out_of_a_gguf_file_by_option(bin_file, tmp_path, onelaunch):
    pytest.importorskip("gguf")
    out = tmp_path / "out.gguf"
    assert onelaunch("export", bin_file, out, "--format", "gguf")[0] == 0
    expected = _ids(onelaunch, bin_file)
    (bin_file.parent / "tokenizer.bin").unlink()
    assert _ids(onelaunch, bin_file, "--tokenizer", out) == expected


def test_a_saved_model_has_its_tokenizer(bin_file, tmp_path):
    pytest.importorskip("gguf")
    import onelaunch

    with onelaunch.load(bin_file, engine="reference") as model:
        model.save(tmp_path / "a.gguf", "gguf")
        onelaunch.save(model, tmp_path / "b.gguf", "gguf")
    for name in ("a.gguf", "b.gguf"):
        with onelaunch.load(tmp_path / name) as again:
            assert again.tokenizer.encode("a b a") == model.tokenizer.encode("a b a")
    assert load(tmp_path / "a.gguf").config == CONFIG
