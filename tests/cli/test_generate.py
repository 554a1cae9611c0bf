"""`onelaunch generate`: what lands on which stream, prompts, errors, the known text."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from onelaunch import checkpoints
from onelaunch.checkpoints.tokenizers import Llama2cTokenizer
from onelaunch.checkpoints.weights import LoadedModel
from onelaunch.config import ModelConfig
from tests.engines.suite import weights_of

WEIGHTS = Path(__file__).parents[2] / ".." / "shared" / "weights"
STORIES = WEIGHTS / "stories260K.bin"
pytestmark = pytest.mark.usefixtures("compiled_program")
needs_stories = pytest.mark.skipif(
    not STORIES.exists(), reason="the trained model stories260K.bin is not beside the repository"
)
CONFIG = ModelConfig(
    dim=16,
    n_layers=2,
    n_heads=2,
    hidden_dim=24,
    vocab_size=259,
    max_seq_len=32,
    rope_layout="interleaved",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A small random model with a byte tokenizer beside it."""
    folder = tmp_path_factory.mktemp("model")
    checkpoints.save(LoadedModel(CONFIG, weights_of(CONFIG)), folder / "model.bin", "llama2c")
    (folder / "tokenizer.bytes").write_text("bytes")
    return str(folder / "model.bin")


@pytest.fixture
def bare(model, tmp_path) -> str:
    """The same without a tokenizer."""
    path = tmp_path / "bare.bin"
    path.write_bytes(Path(model).read_bytes())
    return str(path)


@pytest.fixture
def written(onelaunch):
    """Standard output of a `generate` that must succeed and say nothing but the summary."""

    def run(*argv: str) -> str:
        code, out, err = onelaunch("generate", *argv)
        assert code == 0, err
        assert err.count("\n") == (0 if "--quiet" in argv else 1)
        return out

    return run


def larger_tokenizer() -> Llama2cTokenizer:
    """The byte tokenizer's pieces and three more: "ab" and its letters."""
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % byte for byte in range(256))]
    return Llama2cTokenizer([*pieces, b"ab", b"a", b"b"], [0.0] * 262)


def ids_of(text: str) -> list[int]:
    return [int(token) for token in text.split()]


def shell(*argv: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "onelaunch", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **options,
    )


@needs_stories
def test_the_known_text_comes_out_of_the_real_command():
    process = shell(
        *("generate", str(STORIES), "--temperature", "0", "--max-new-tokens", "256", "--ids")
    )
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0
    assert out.decode() == (WEIGHTS / "stories260K_greedy_ids_n256.txt").read_text()
    assert b"tokens/s" in err


@needs_stories
@pytest.mark.parametrize("format", ["llama2c", "hf"])
def test_the_known_text_survives_export(format, tmp_path, written):
    out = tmp_path / ("again.bin" if format == "llama2c" else "folder")
    checkpoints.save(checkpoints.load(STORIES), out, format)
    ids = written(out, "--temperature", "0", "--max-new-tokens", "256", "--ids")
    assert ids == (WEIGHTS / "stories260K_greedy_ids_n256.txt").read_text()


@needs_stories
def test_the_tokenizer_beside_the_model_is_found(written):
    options = (STORIES, "--temperature", "0", "--max-new-tokens", "12")
    begin = "Once upon a time, there was a little girl"
    assert written(*options).startswith(begin)
    assert written(*options, "--prompt", "Once upon").startswith(begin)
    assert written(*options, "--prompt", "Once upon", "--no-echo").startswith(" a time, there")
    named = written(*options, "--tokenizer", WEIGHTS / "tok512.bin")
    assert named == written(*options)


def test_prompt_and_continuation_on_standard_output_and_nothing_else(model, written):
    whole = written(model, "--prompt", "ab", "--max-new-tokens", "5", "--quiet")
    assert whole.startswith("ab")
    assert whole.endswith("\n")
    rest = written(model, "--prompt", "ab", "--max-new-tokens", "5", "--no-echo")
    assert whole == "ab" + rest


def test_the_defaults_are_llama2cs(model, onelaunch):
    _, plain, _ = onelaunch("generate", model)
    spelled = ("--temperature", "1", "--top-p", "0.9", "--seed", "0", "--max-new-tokens", "256")
    assert onelaunch("generate", model, *spelled)[1] == plain
    assert onelaunch("generate", model, "--seed", "1")[1] != plain
    assert onelaunch("generate", model, "--temperature", "0")[1] != plain


def test_a_repetition_penalty_keeps_tokens_from_coming_again(model, written):
    options = (model, "--temperature", "0", "--max-new-tokens", "30", "--ids", "--no-echo")
    ids = ids_of(written(*options, "--prompt", "ab", "--repetition-penalty", "1e9"))
    assert len({100, 101, *ids}) == 2 + len(ids)
    assert written(*options, "--repetition-penalty", "1") == written(*options)


def test_penalties_and_biases_change_the_text(model, written):
    options = (model, "--temperature", "0", "--max-new-tokens", "30", "--ids", "--no-echo")
    plain = ids_of(written(*options))
    for more in (
        ("--presence-penalty", "2"),
        ("--frequency-penalty", "2"),
        (f"--logit-bias={plain[0]}=-100", "--logit-bias=9=1"),
    ):
        assert ids_of(written(*options, *more)) != plain
    assert plain[0] not in ids_of(written(*options, *more))
    assert set(ids_of(written(*options, "--logit-bias=97=100", "--logit-bias=5=-1"))) == {97}
    neither = ("--presence-penalty", "0", "--frequency-penalty", "0")
    assert ids_of(written(*options, *neither)) == plain


def test_ids_are_those_of_the_text(model, written):
    options = (model, "--max-new-tokens", "6", "--seed", "3")
    alone = ids_of(written(*options, "--prompt", "ab", "--ids", "--no-echo"))
    assert 0 < len(alone) <= 6
    assert ids_of(written(*options, "--prompt", "ab", "--ids")) == [100, 101, *alone]
    told = json.loads(written(*options, "--prompt", "ab", "--json"))
    assert told["texts"][0]["ids"] == alone
    assert told["texts"][0]["prompt_ids"] == [1, 100, 101]


def test_several_prompts_are_separated_by_a_blank_line(model, written):
    options = (model, "--max-new-tokens", "3", "--temperature", "0", "--ids")
    one = written(*options, "--prompt", "x")
    two = written(*options, "--prompt", "y")
    assert written(*options, "--prompt", "x", "--prompt", "y") == f"{one}\n{two}"


@pytest.fixture
def silent(bare) -> str:
    """A model that ends every text at once: each token's embedding points one way, BOS furthest."""
    weights = {name: 0 * tensor for name, tensor in checkpoints.load(bare).weights.items()}
    weights["embed_tokens.weight"] += 0.5
    weights["embed_tokens.weight"][1] = 1
    weights["norm.weight"] += 1
    checkpoints.save(LoadedModel(CONFIG, weights), bare + ".silent.bin", "llama2c")
    return bare + ".silent.bin"


def test_a_text_that_ends_at_once_still_shows_its_prompt(silent, written):
    options = (silent, "--tokenizer", "bytes", "--temperature", "0", "--quiet")
    assert written(*options) == "\n"
    assert written(*options, "--prompt", "a", "--prompt", "b") == "a\n\nb\n"
    assert written(*options, "--prompt", "a", "--no-echo") == "\n"
    assert written(*options, "--ids") == "\n"
    told = json.loads(written(*options, "--json"))
    assert told["texts"][0]["ids"] == []
    assert told["tokens_per_second"] is None


def test_prompts_from_files_and_standard_input(model, written, tmp_path, monkeypatch):
    options = (model, "--max-new-tokens", "4")
    expected = written(*options, "--prompt", "a\u00e9")
    path = tmp_path / "prompt.txt"
    for ending in ("", "\n", "\r\n"):
        path.write_bytes("a\u00e9".encode() + ending.encode())
        assert written(*options, "--prompt", f"@{path}") == expected
    path.write_bytes("a\u00e9\n\n".encode())
    assert written(*options, "--prompt", f"@{path}").startswith("a\u00e9\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("a\u00e9\n".encode())))
    assert written(*options, "--prompt", "-") == expected


def test_json_is_one_object_with_everything(model, written):
    told = json.loads(
        written(model, "--json", "--prompt", "a", "--prompt", "b", "--max-new-tokens", "4")
    )
    assert set(told) == {"model", "engine", "sampling", "texts", "tokens_per_second"}
    assert told["sampling"]["max_new_tokens"] == 4
    assert [text["prompt"] for text in told["texts"]] == ["a", "b"]
    for text in told["texts"]:
        assert set(text) == {
            "prompt",
            "prompt_ids",
            "text",
            "ids",
            "finish",
            "first_token_seconds",
            "seconds",
        }
        assert 0 < text["first_token_seconds"] <= text["seconds"]


def test_a_text_ends_before_a_stop_string(model, written, onelaunch):
    options = (model, "--prompt", "ab", "--temperature", "0", "--max-new-tokens", "9")
    (text,) = json.loads(written(*options, "--json"))["texts"]
    assert text["finish"] == "length"
    stop = next(char for char in text["text"][2:] if char != "\ufffd")
    ended = text["text"][: text["text"].index(stop)]
    assert written(*options, "--no-echo", "--stop", stop) == ended + "\n"
    assert written(*options, "--no-echo", "--stop", "nowhere", "--stop", stop) == ended + "\n"
    (found,) = json.loads(written(*options, "--json", "--stop", stop))["texts"]
    assert (found["text"], found["finish"]) == (ended, "stop")
    code, out, err = onelaunch("generate", model, "--stop", "")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--stop" in err


def test_ids_need_no_tokenizer(bare, written, onelaunch):
    assert len(ids_of(written(bare, "--ids", "--max-new-tokens", "3"))) == 3
    for options in ((), ("--ids", "--prompt", "a"), ("--prompt", "a"), ("--json",)):
        code, out, err = onelaunch("generate", bare, *options)
        assert (code, out) == (2, "")
        assert "--tokenizer" in err
        assert "--ids" in err


def test_a_preset_runs_at_random(written, onelaunch):
    options = ("stories260k", "--random", "--ids", "--max-new-tokens", "5")
    assert len(ids_of(written(*options))) == 5
    assert written(*options) == written(*options)
    code, out, err = onelaunch("generate", "stories260k", "--random")
    assert (code, out) == (2, "")
    assert "--ids" in err


def test_the_summary_says_where_the_context_ended_the_text(model, onelaunch):
    _, _, err = onelaunch("generate", model, "--temperature", "0", "--max-new-tokens", "99")
    assert "32 new tokens" in err
    assert "context of 32" in err
    _, _, err = onelaunch("generate", model, "--temperature", "0", "--max-new-tokens", "32")
    assert "context" not in err


def test_the_summary_says_which_seed_draws_the_text_again(model, onelaunch):
    _, text, err = onelaunch("generate", model)
    assert "; seed 0" in err
    assert onelaunch("generate", model, "--seed", "0")[1] == text
    _, other, err = onelaunch("generate", model, "--seed", "3")
    assert "; seed 3" in err
    assert other != text
    assert "seed" not in onelaunch("generate", model, "--temperature", "0")[2]


def test_bad_input_is_one_line_and_exit_2(model, onelaunch, tmp_path):
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9")
    for argv, named in [
        (("--prompt", f"@{latin}"), "not UTF-8"),
        (("--prompt", f"@{tmp_path}/absent"), "absent"),
        (("--prompt", f"@{tmp_path}"), "directory"),
        (("--prompt", "@nul\0byte"), "--prompt"),
        (("--prompt", "caf\udce9"), "not UTF-8"),
        (("--prompt", "-", "--prompt", "-"), "standard input"),
        (("--prompt", "x" * 32), "33 tokens"),
        (("--tokenizer", str(latin)), "latin.txt"),
        (("--device", "cpu", "--engine", "cuda"), "--engine cuda"),
        (("--device", "gpu"), "--device gpu"),
        (("--dtype", "fp8"), "--dtype fp8"),
        (("--temperature", "-1"), "temperature"),
        (("--temperature", "nan"), "temperature"),
        (("--top-p", "0"), "top-p"),
        (("--top-k", "-1"), "top-k"),
        (("--min-p", "2"), "min-p"),
        (("--repetition-penalty", "nan"), "repetition-penalty"),
        (("--presence-penalty", "nan"), "presence-penalty"),
        (("--frequency-penalty", "2.5"), "frequency-penalty"),
        (("--logit-bias", "97"), "--logit-bias 97"),
        (("--logit-bias", "97=inf"), "--logit-bias 97"),
        (("--threads", "0"), "--threads"),
        (("--max-new-tokens", "0"), "--max-new-tokens"),
    ]:
        code, out, err = onelaunch("generate", model, *argv)
        assert (code, out) == (2, ""), argv
        assert err.count("\n") == 1, argv
        assert named in err, argv


def test_standard_input_that_is_not_utf8(model, onelaunch, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    code, out, err = onelaunch("generate", model, "--prompt", "-")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "standard input" in err


def test_a_text_that_needs_an_id_beyond_the_model_is_refused(model, onelaunch, tmp_path):
    larger = larger_tokenizer().save(tmp_path)
    code, out, err = onelaunch("generate", model, "--tokenizer", larger, "--prompt", "abab")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "prompt 1: 'ab' is id 259 of the tokenizer" in err
    assert "vocabulary of 259" in err
    code, out, _ = onelaunch("generate", model, "--tokenizer", larger, "--prompt", "xyz")
    assert code == 0
    assert out.startswith("xyz")


def test_weights_that_are_not_numbers_fail_in_one_line(bare, onelaunch):
    loaded = checkpoints.load(bare)
    weights = {name: tensor.clone() for name, tensor in loaded.weights.items()}
    weights["norm.weight"][3] = float("nan")
    checkpoints.save(LoadedModel(CONFIG, weights), bare + ".nan.bin", "llama2c")
    code, out, err = onelaunch("generate", bare + ".nan.bin", "--ids")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "not finite" in err


def test_a_reader_that_leaves_is_no_error(bare):
    process = shell("generate", bare, "--ids")
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(300) == 0
    assert err == b""


def test_an_interrupt_keeps_what_was_written_and_exits_130():
    options = ("--random", "--ids", "--max-new-tokens", "1024", "--threads", "1")
    process = shell("generate", "stories42m", *options)
    begun = os.read(process.stdout.fileno(), 100)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert 0 < len(ids_of((begun + out).decode())) < 1024
    assert b"Traceback" not in err
