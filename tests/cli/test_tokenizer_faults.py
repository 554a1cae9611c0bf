"""What each verb does where a tokenizer cannot be used, is larger, or was written another way."""

import io
import json
import os
import re
import sys

import pytest

from onelaunch import checkpoints
from onelaunch.checkpoints.tokenizers import BytesTokenizer, find_tokenizer, load_tokenizer
from tests.tokenizer_files import (
    END,
    POINTER,
    json_tokenizer,
    llama2c_tokenizer,
    small_model,
    token,
    write_json_tokenizer,
    write_model,
)

TEXT = "the cat sat on the mat. " * 40
REFERENCE = ("--engine", "reference", "--temperature", "0", "--max-new-tokens", "3")


@pytest.fixture
def data(tmp_path, onelaunch):
    """Token files made with the byte tokenizer."""
    (tmp_path / "text.txt").write_text(TEXT)
    code, _, err = onelaunch("prepare", tmp_path / "text.txt", "--out", tmp_path / "data")
    assert code == 0, err
    return tmp_path / "data"


@pytest.fixture
def cut_off(tmp_path):
    """A Hugging Face folder whose tokenizer.json is cut off."""
    model = write_model(tmp_path / "cut-off", 259)
    path = write_json_tokenizer(model)
    path.write_text(path.read_text()[:2000])
    return model


class TestOneThatCannotBeUsed:
    def test_generate_needs_it_for_text(self, cut_off, onelaunch):
        for options in ((), ("--prompt", "a"), ("--json",), ("--ids", "--prompt", "a")):
            code, out, err = onelaunch("generate", cut_off, *options)
            assert (code, out, err.count("\n")) == (2, "", 1)
            assert f"{cut_off / 'tokenizer.json'}: truncated" in err
            assert "--tokenizer FILE" in err
            assert "no tokenizer found" not in err

    def test_generate_of_ids_says_so_and_goes_on(self, cut_off, onelaunch):
        code, out, err = onelaunch("generate", cut_off, "--ids", *REFERENCE)
        assert code == 0
        assert len(out.split()) == 3
        assert f"{cut_off / 'tokenizer.json'}: truncated" in err
        code, out, _ = onelaunch("generate", cut_off, "--tokenizer", "bytes", *REFERENCE)
        assert code == 0

    def test_eval_and_inspect_say_so_and_go_on(self, cut_off, data, onelaunch):
        for argv in (("eval", cut_off, "--data", data), ("inspect", cut_off)):
            code, out, err = onelaunch(*argv)
            assert code == 0
            assert f"{cut_off / 'tokenizer.json'}: truncated" in err
        assert "cannot be used" in out
        facts = json.loads(onelaunch("inspect", cut_off, "--json")[1])
        assert facts["tokenizer"] is None
        assert "truncated" in facts["tokenizer_error"]

    @pytest.mark.parametrize(("format", "name"), [("hf", "out"), ("llama2c", "out.bin")])
    @pytest.mark.parametrize("quiet", [(), ("--quiet",)])
    def test_export_says_what_it_left_out(self, cut_off, format, name, quiet, tmp_path, onelaunch):
        out = tmp_path / name
        code, _, err = onelaunch("export", cut_off, out, "--format", format, *quiet)
        assert code == 0
        assert checkpoints.load(out).config.vocab_size == 259
        line = next(line for line in err.splitlines() if "left out" in line)
        assert f"left out: {cut_off / 'tokenizer.json'}: truncated" in line
        assert find_tokenizer(checkpoints.load(out)) is None

    def test_prepare_and_train_name_it(self, cut_off, data, onelaunch):
        path = cut_off / "tokenizer.json"
        for spec in (path, cut_off):
            argv = ("prepare", data / "manifest.json", "--tokenizer", spec, "--out", data / "o")
            code, out, err = onelaunch(*argv)
            assert (code, out, err.count("\n")) == (2, "", 1)
            assert f"{path}: truncated" in err
        (data / "tokenizer.bytes").unlink()
        (data / "tokenizer.bytes").symlink_to("absent")
        code, out, err = onelaunch("train", "--data", data, "--run", data / "run")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "tokenizer.bytes: a broken link" in err


class TestSizes:
    @pytest.mark.parametrize("kind", ["llama2c", "bytes", "json"])
    def test_more_rows_than_ids_at_every_verb(self, kind, tmp_path, onelaunch):
        model = write_model(tmp_path / "model", 320)
        if kind == "json":
            pytest.importorskip("tokenizers")
            tokenizer = load_tokenizer(write_json_tokenizer(model))
        else:
            tokenizer = llama2c_tokenizer("the", "a") if kind == "llama2c" else BytesTokenizer()
            tokenizer.save(model)
        code, out, err = onelaunch("generate", model, "--prompt", "a", *REFERENCE)
        assert code == 0, err
        assert out.startswith("a")
        assert err.count("\n") == 1  # the summary, and no note
        spec = model / tokenizer.file_name
        assert onelaunch("generate", model, "--tokenizer", spec, *REFERENCE)[0] == 0
        (tmp_path / "text.txt").write_text(TEXT)
        made = ("prepare", tmp_path / "text.txt", "--tokenizer", spec, "--out", tmp_path / "data")
        assert onelaunch(*made)[0] == 0
        code, out, err = onelaunch("eval", model, "--data", tmp_path / "data")
        assert code == 0, err
        assert "validation loss" in out
        assert "note" not in err
        assert json.loads(onelaunch("inspect", model, "--json")[1])["tokenizer"]["kind"] == kind

    def test_more_ids_than_rows(self, tmp_path, onelaunch):
        model = write_model(tmp_path / "model", 260)
        llama2c_tokenizer("a", "b").save(model)  # "a" is 259, "b" 260
        code, out, _ = onelaunch("generate", model, "--prompt", "xa", *REFERENCE)
        assert code == 0
        assert out.startswith("xa")
        code, out, err = onelaunch("generate", model, "--prompt", "xb", *REFERENCE)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "prompt 1: 'b' is id 260 of the tokenizer" in err

        spec = model / "tokenizer.bin"
        for name, text, refused in (("fits", "a c " * 99, False), ("not", "a b " * 99, True)):
            (tmp_path / "text.txt").write_text(text)
            made = ("prepare", tmp_path / "text.txt", "--tokenizer", spec, "--out", tmp_path / name)
            assert onelaunch(*made)[0] == 0
            code, _, err = onelaunch("eval", model, "--data", tmp_path / name)
            assert code == (2 if refused else 0), err
            assert ("'b' is id 260 of the tokenizer" in err) is refused

    def test_another_models_is_noted(self, tmp_path, onelaunch):
        model = write_model(tmp_path / "model.bin", 600)
        BytesTokenizer().save(tmp_path)
        code, _, err = onelaunch("generate", model, *REFERENCE)
        assert code == 0
        assert re.search("note: .*259 tokens.* model 600", err)

    def test_another_models_says_nothing_of_the_data(self, data, tmp_path, onelaunch):
        model = write_model(tmp_path / "lone" / "model.bin", 259)
        llama2c_tokenizer(*map(chr, range(0x4E00, 0x5000))).save(model.parent)
        code, out, err = onelaunch("eval", model, "--data", data)
        assert code == 0, err
        assert "validation loss" in out


class TestTheSame:
    def test_data_and_model_with_files_that_differ_in_layout(self, tmp_path, onelaunch):
        pytest.importorskip("tokenizers")
        first = write_json_tokenizer(tmp_path / "first")
        model = write_model(tmp_path / "model", 257)
        second = write_json_tokenizer(model)
        second.write_text(json.dumps(json.loads(second.read_text()), indent=3, sort_keys=True))
        (tmp_path / "text.txt").write_text(TEXT)
        made = ("prepare", tmp_path / "text.txt", "--tokenizer", first, "--out", tmp_path / "data")
        assert onelaunch(*made)[0] == 0
        code, out, err = onelaunch("eval", model, "--data", tmp_path / "data")
        assert code == 0, err
        assert "validation loss" in out
        # and the data's own file may be laid out anew
        os.replace(second, tmp_path / "data" / "tokenizer.json")
        assert onelaunch("eval", model, "--data", tmp_path / "data")[0] == 0

    def test_another_one_is_refused(self, data, tmp_path, onelaunch):
        pytest.importorskip("tokenizers")
        model = write_model(tmp_path / "model", 259)
        write_json_tokenizer(model)
        code, _, err = onelaunch("eval", model, "--data", data)
        assert (code, err.count("\n")) == (2, 1)
        assert err.startswith(f"onelaunch: --data {data}: its tokenizer ")
        assert f"{model};" in err
        assert "--tokenizer FILE" in err

    def test_a_tokenizer_bin_and_the_exported_tokenizer_json(self, tmp_path, onelaunch):
        pytest.importorskip("tokenizers")
        model = write_model(tmp_path / "model.bin", 262)
        spec = llama2c_tokenizer("the", "th", "e").save(tmp_path)
        (tmp_path / "text.txt").write_text(TEXT)
        made = ("prepare", tmp_path / "text.txt", "--tokenizer", spec, "--out", tmp_path / "data")
        assert onelaunch(*made)[0] == 0
        assert onelaunch("export", model, tmp_path / "hf", "--format", "hf")[0] == 0
        (tmp_path / "hf" / "tokenizer.bin").unlink()
        code, out, err = onelaunch("eval", tmp_path / "hf", "--data", tmp_path / "data")
        assert code == 0, err
        assert "validation loss" in out

    def test_older_manifests_are_read(self, tmp_path, onelaunch):
        pytest.importorskip("tokenizers")
        spec = write_json_tokenizer(tmp_path / "a")
        (tmp_path / "text.txt").write_text(TEXT)
        made = ("prepare", tmp_path / "text.txt", "--tokenizer", spec, "--out", tmp_path / "data")
        assert onelaunch(*made)[0] == 0
        path = tmp_path / "data" / "manifest.json"
        manifest = json.loads(path.read_text())
        tokenizer = load_tokenizer(spec)
        assert manifest["tokenizer"]["fingerprint"] == tokenizer.fingerprint
        # what a version wrote that knew a tokenizer by its file's bytes
        manifest["tokenizer"]["fingerprint"] = tokenizer.file_fingerprint
        path.write_text(json.dumps(manifest))
        model = write_model(tmp_path / "model", 257)
        assert onelaunch("eval", model, "--data", tmp_path / "data")[0] == 0
        manifest["tokenizer"]["fingerprint"] = "0" * 64
        path.write_text(json.dumps(manifest))
        code, _, err = onelaunch("eval", model, "--data", tmp_path / "data")
        assert code == 2
        assert "tokenizer.json: is not the tokenizer" in err


class TestExport:
    def test_each_file_has_its_own_tokenizer(self, tmp_path, onelaunch):
        out = tmp_path / "out"
        out.mkdir()
        for name, pieces in (("one", "a"), ("two", "bc")):
            model = write_model(tmp_path / name, 259 + len(pieces))
            llama2c_tokenizer(*pieces).save(model)
            code, _, err = onelaunch("export", model, out / f"{name}.bin", "--format", "llama2c")
            assert code == 0
            assert f"wrote {out / name}.tokenizer.bin\n" in err
        assert sorted(path.name for path in out.iterdir()) == [
            "one.bin",
            "one.tokenizer.bin",
            "two.bin",
            "two.tokenizer.bin",
        ]
        BytesTokenizer().save(out)  # comes after a file's own
        for name, size in (("one", 260), ("two", 261)):
            found = find_tokenizer(checkpoints.load(out / f"{name}.bin"))
            assert found.vocab_size == size
            code, _, err = onelaunch("generate", out / f"{name}.bin", "--prompt", "a", *REFERENCE)
            assert code == 0, err

    def test_a_tokenizer_json_beside_a_bin_keeps_its_settings(self, tmp_path, onelaunch):
        pytest.importorskip("tokenizers")
        model = write_model(tmp_path / "model", 258, bos_id=None, stop_ids=(257,))
        data = json_tokenizer(added_tokens=[token(256, END), token(257, "<stop>")])
        write_json_tokenizer(model, data, tokenizer_config={"eos_token": "<stop>"})
        tokenizer = find_tokenizer(checkpoints.load(model))
        out = tmp_path / "out.bin"
        code, _, err = onelaunch("export", model, out, "--format", "llama2c")
        assert code == 0, err
        found = find_tokenizer(checkpoints.load(out))
        assert (found.bos_id, found.stop_ids) == (tokenizer.bos_id, tokenizer.stop_ids)
        assert found.stop_ids == (257,)

    @pytest.mark.parametrize("name", ["out.tokenizer.bin", "out.tokenizer.json"])
    def test_what_would_be_taken_for_its_tokenizer_is_not_overwritten(
        self, name, tmp_path, onelaunch
    ):
        model = write_model(tmp_path / "model", 259)
        BytesTokenizer().save(model)
        (tmp_path / name).write_text("precious")
        code, out, err = onelaunch("export", model, tmp_path / "out.bin", "--format", "llama2c")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert f"{tmp_path / name}: exists already" in err
        assert not (tmp_path / "out.bin").exists()
        assert (tmp_path / name).read_text() == "precious"

    def test_help_says_how_the_file_is_called(self, onelaunch):
        code, out, _ = onelaunch("export", "--help")
        assert code == 0
        assert "OUT.tokenizer.bin" in out

    @pytest.mark.parametrize(
        ("bos_id", "stop_ids", "bos", "eos"),
        [
            (1, (1, 2), 1, 1),
            (5, (2, 6), None, None),
            (None, (0, 1, 9), None, [0, 1]),
            (0, (0, -1), 0, 0),
        ],
    )
    def test_no_id_beyond_the_vocabulary(self, bos_id, stop_ids, bos, eos, tmp_path):
        model = small_model(2, bos_id=bos_id, stop_ids=stop_ids)
        checkpoints.save(model, tmp_path / "out", "hf")
        for name in ("config.json", "generation_config.json"):
            found = json.loads((tmp_path / "out" / name).read_text())
            assert (found["bos_token_id"], found["eos_token_id"]) == (bos, eos), name

    def test_no_id_of_a_larger_tokenizer(self, tmp_path, onelaunch):
        pytest.importorskip("tokenizers")
        model = write_model(tmp_path / "model", 256, bos_id=None, stop_ids=())
        write_json_tokenizer(model, tokenizer_config={"eos_token": END})
        assert onelaunch("export", model, tmp_path / "out", "--format", "hf")[0] == 0
        for name in ("config.json", "generation_config.json"):
            assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] is None
        # nor is it waited for
        code, _, err = onelaunch("generate", model, "--prompt", "a", *REFERENCE)
        assert code == 0, err


class TestPrompts:
    @pytest.mark.parametrize("source", ["file", "standard input"])
    def test_a_byte_order_mark_is_dropped(self, source, tmp_path, onelaunch, monkeypatch):
        model = write_model(tmp_path / "model", 259)
        BytesTokenizer().save(model)
        raw = "\ufeffcaf\u00e9\ufeff\r\n".encode()
        (tmp_path / "prompt.txt").write_bytes(raw)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        prompt = f"@{tmp_path / 'prompt.txt'}" if source == "file" else "-"
        code, out, err = onelaunch("generate", model, "--prompt", prompt, "--json", *REFERENCE)
        assert code == 0, err
        assert json.loads(out)["texts"][0]["prompt"] == "caf\u00e9\ufeff"

    def test_a_pointer_is_no_prompt(self, tmp_path, onelaunch):
        model = write_model(tmp_path / "model", 259)
        BytesTokenizer().save(model)
        path = tmp_path / "prompt.txt"
        path.write_text(POINTER)
        code, out, err = onelaunch("generate", model, "--prompt", f"@{path}")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "Git LFS pointer" in err


def test_a_pointer_is_told_at_every_verb(tmp_path, onelaunch):
    model = write_model(tmp_path / "model", 259)
    (model / "model.safetensors").write_text(POINTER)
    for argv in (
        ("inspect", model),
        ("generate", model),
        ("eval", model, "--data", "stories"),
        ("export", model, tmp_path / "out", "--format", "hf"),
    ):
        code, out, err = onelaunch(*argv)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert f"{model / 'model.safetensors'}: a Git LFS pointer" in err


def test_config_json_is_told_in_its_own_words(tmp_path, onelaunch):
    model = write_model(tmp_path / "model", 259)
    right = json.loads((model / "config.json").read_text())
    ours = ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "max_seq_len", "norm_eps")
    for field, value in (
        ("hidden_size", 0),
        ("hidden_size", "8"),
        ("num_hidden_layers", -1),
        ("num_attention_heads", 3),
        ("num_key_value_heads", 5),
        ("intermediate_size", 1.5),
        ("max_position_embeddings", None),
        ("rms_norm_eps", 0),
        ("tie_word_embeddings", "yes"),
    ):
        (model / "config.json").write_text(json.dumps({**right, field: value, "head_dim": None}))
        code, _, err = onelaunch("inspect", model)
        assert (code, err.count("\n")) == (2, 1), field
        assert field in err
        words = err.replace(str(model), "").replace("_", "-").replace(",", " ").split()
        assert not {name.replace("_", "-") for name in ours} & set(words), err
