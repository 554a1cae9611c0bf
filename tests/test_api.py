"""The Python interface: what users call, on a small random model."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import onelaunch
from onelaunch import LanguageModel, Sampling, api
from onelaunch.checkpoints import random_model
from onelaunch.checkpoints import save as save_checkpoint
from onelaunch.config import ModelConfig
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.errors import BadInput
from onelaunch.generation.decode import Decoding, Limits
from onelaunch.generation.prompts import encode_prompts
from onelaunch.model import Model
from onelaunch.training.prepare import prepare
from onelaunch.training.story_data import stories_tokenizer


@pytest.fixture
def path(tmp_path):
    """A random stories260k whose logits differ enough to be told apart, and its tokenizer."""
    loaded = random_model("stories260k", seed=3)
    loaded.weights = {name: 3 * tensor for name, tensor in loaded.weights.items()}
    file = tmp_path / "model.bin"
    save_checkpoint(loaded, file, "llama2c")
    stories_tokenizer().save(tmp_path)
    return file


@pytest.fixture
def model(path):
    with onelaunch.load(path, engine="reference", device="cpu") as model:
        yield model


def expected(model, prompts, n, sampling):
    loaded = model.checkpoint
    engine = ReferenceEngine(loaded.config, loaded.weights, "cpu")
    tokenizer = model.tokenizer
    stop = sorted({*loaded.stop_ids, *tokenizer.stop_ids})
    encoded = encode_prompts(tokenizer, prompts)
    decoding = Decoding(engine, encoded, Limits(n, sampling, stop), tokenizer)
    return [completion.text for completion in decoding.finish()]


def test_a_text_is_what_the_command_line_writes(model, path):
    text = model.generate("Once upon", max_new_tokens=12, temperature=0.7, seed=5)
    assert [text] == expected(model, ["Once upon"], 12, Sampling(0.7, 0, 0.9, 0.0, 5))
    command = [sys.executable, "-m", "onelaunch", "generate", str(path), "--prompt", "Once upon"]
    command += ["--max-new-tokens", "12", "--temperature", "0.7", "--seed", "5", "--no-echo"]
    command += ["--engine", "reference", "--device", "cpu", "--quiet"]
    written = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert written == text + "\n"


def test_a_repetition_penalty_reaches_the_engine(model):
    how = {"max_new_tokens": 12, "temperature": 0.7, "repetition_penalty": 0.3, "seed": 5}
    sampling = Sampling(0.7, 0, 0.9, 0.0, 5, 0.3)
    text = model.generate("Once upon", **how)
    assert [text] == expected(model, ["Once upon"], 12, sampling)
    assert text == "".join(model.stream("Once upon", **how))
    assert text != model.generate("Once upon", **{**how, "repetition_penalty": 1.0})


def test_penalties_and_a_bias_reach_the_engine(model):
    how = {"max_new_tokens": 24, "temperature": 0.01, "seed": 5}
    plain = model.generate("Once upon", **how)
    for options in (
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"logit_bias": {101: 100}},
        {"logit_bias": [(101, 3.0)], "presence_penalty": -2.0, "frequency_penalty": -1.5},
    ):
        text = model.generate("Once upon", **how, **options)
        sampling = Sampling(0.01, 0, 0.9, 0.0, 5, **options)
        assert [text] == expected(model, ["Once upon"], 24, sampling)
        assert text == "".join(model.stream("Once upon", **how, **options))
        assert text != plain


def test_events_have_log_probabilities_where_requested(model):
    prompt, how = "Once upon", {"max_new_tokens": 8, "temperature": 0.7, "seed": 5}
    ids = model.tokenizer.encode(prompt)
    for logprobs, top in ((True, 0), (False, 3), (True, 20), (False, 0)):
        events = list(model.decode(prompt, logprobs=logprobs, top_logprobs=top, **how))
        tokens = [event.token for event in events if event.token is not None]
        logits_SV = model.logits([[*ids, *tokens]])[0, len(ids) - 1 :].log_softmax(-1)
        for i, event in enumerate(each for each in events if each.token is not None):
            expected_V = logits_SV[i].tolist()
            if logprobs:
                assert event.logprob == pytest.approx(expected_V[event.token], abs=1e-4)
            else:
                assert event.logprob is None
            assert len(event.top) == top
            assert [value for _, value in event.top] == pytest.approx(
                sorted(expected_V, reverse=True)[:top], abs=1e-4
            )
    with pytest.raises(BadInput, match=r"^top_logprobs=21: must be from 0 to 20$"):
        model.decode(prompt, top_logprobs=21)


def test_an_option_that_there_is_not_is_a_type_error(model):
    for options in ({"top_q": 1}, {"ids_only": True}, {"logprobs": True}):
        for call in (model.generate, model.stream):
            with pytest.raises(TypeError, match=next(iter(options))):
                call("Once", **options)
    with pytest.raises(TypeError, match="top_q"):
        model.decode("Once", top_q=1)


def test_a_list_gives_a_list(model):
    prompts = ["Once", "One day", "Once"]
    texts = model.generate(prompts, max_new_tokens=8, temperature=1.0, seed=2)
    assert texts == expected(model, prompts, 8, Sampling(1.0, 0, 0.9, 0.0, 2))
    assert texts[0] != texts[2]  # two samples of one prompt
    assert model.generate([], max_new_tokens=8) == []
    assert model.generate(["Once"], max_new_tokens=8, seed=2) == texts[:1]


def test_without_a_prompt_a_text_begins_at_bos(model):
    text = model.generate(max_new_tokens=6, temperature=0.0)
    assert isinstance(text, str)
    assert model.generate(["", "Once"], max_new_tokens=6, temperature=0.0)[0] == text


def test_a_stream_is_the_text_in_pieces(model):
    how = {"max_new_tokens": 20, "temperature": 0.9, "seed": 4}
    pieces = list(model.stream("The cat", **how))
    assert len(pieces) > 1
    assert "".join(pieces) == model.generate("The cat", **how)


def test_a_stream_may_be_left(model):
    stream = model.stream("The cat", max_new_tokens=200, temperature=1.0)
    assert next(stream)
    stream.close()
    assert list(stream) == []
    assert model.generate("The cat", max_new_tokens=3, temperature=0.0)


@pytest.mark.usefixtures("compiled_program")
@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_a_model_is_free_amid_a_stream(path, engine):
    how = {"max_new_tokens": 40, "temperature": 0.9, "seed": 4}
    with onelaunch.load(path, engine=engine, device="cpu") as model:
        expected = model.generate("The cat", **how)
        first, second = model.stream("The cat", **how), model.stream("The cat", **how)
        begin = next(first)
        assert model.generate("The cat", **how) == expected
        assert model.logits([[1, 2]]).shape == (1, 2, 512)
        assert "".join(second) == expected
        assert begin + "".join(first) == expected


def test_a_text_ends_before_a_stop_string(model):
    how = {"max_new_tokens": 30, "temperature": 0.0}
    whole = model.generate("Once", **how)
    stop = whole[5:8]
    ended = whole[: whole.index(stop)]
    assert model.generate("Once", stop=stop, **how) == ended
    assert model.generate("Once", stop=["not there", stop], **how) == ended
    assert "".join(model.stream("Once", stop=stop, **how)) == ended
    with pytest.raises(BadInput, match="stop=''"):
        model.generate("Once", stop="")


def test_decode_tells_tokens_and_ends(model):
    how = {"max_new_tokens": 8, "temperature": 0.0}
    decoding = model.decode(["Once", "One day"], **how)
    assert [completion.ids for completion in decoding.completions] == [[], []]
    events = list(decoding)
    for index, completion in enumerate(decoding.completions):
        mine = [event for event in events if event.prompt_index == index]
        assert [event.token for event in mine] == completion.ids
        assert "".join(event.text for event in mine) == completion.text
        assert [event.finish for event in mine] == [None] * 7 + ["length"]
        assert 0 < completion.first_token_seconds <= completion.seconds
    assert [c.text for c in decoding.completions] == model.generate(["Once", "One day"], **how)


def test_ids_alone_need_no_tokenizer(path):
    (path.parent / "tokenizer.bin").unlink()
    model = onelaunch.load(path, engine="reference", device="cpu")
    decoding = model.decode(ids_only=True, max_new_tokens=4, temperature=0.0)
    (completion,) = decoding.finish()
    assert (len(completion.ids), completion.text, completion.finish) == (4, None, "length")
    for wrong in ({"ids_only": False}, {"prompt": "Once", "ids_only": True}):
        with pytest.raises(BadInput, match=r"no tokenizer found .* tokenizer='FILE'.*ids_only"):
            model.decode(**wrong)


def test_an_error_in_a_stream_is_the_callers(model):
    with pytest.raises(BadInput, match="context holds 512"):
        model.stream("a" * 5000)
    with pytest.raises(BadInput, match="temperature"):
        model.stream("Once", temperature=-1.0)


def test_a_stream_that_is_alive_at_the_end_ends_with_the_process(path):
    code = (
        f"import onelaunch; model = onelaunch.load({str(path)!r}, engine='reference', device='cpu')"
        "; stream = model.stream('Once upon', max_new_tokens=400); print(next(stream), flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_error_names_its_prompt(model):
    with pytest.raises(BadInput, match="prompt 3"):
        model.generate(["", "Once", "a" * 5000])


def test_stop_ids_end_a_text(model):
    long = model.generate("Once", max_new_tokens=30, temperature=0.0)
    ids = model.tokenizer.encode("Once" + long)
    first_new = model.tokenizer.encode("Once")
    stop = next(i for i in ids[len(first_new) :])
    assert len(model.generate("Once", max_new_tokens=30, temperature=0.0, stop_ids=[stop])) < len(
        long
    )


def test_logits_and_loss(model):
    ids = [[1, 403, 407, 261], [1, 300, 5, 17]]
    logits = model.logits(ids)
    assert logits.shape == (2, 4, 512)
    exact = Model.from_weights(
        model.config, {name: tensor.double() for name, tensor in model.weights.items()}
    )(torch.tensor(ids))
    assert (logits - exact).norm() / exact.norm() < 1e-5
    loss = F.cross_entropy(exact[:, :-1].flatten(0, 1), torch.tensor(ids)[:, 1:].flatten())
    assert model.loss(ids) == pytest.approx(loss.item(), rel=1e-5)
    assert model.loss(torch.tensor(ids, dtype=torch.int32)) == model.loss(ids)
    for wrong in ([[1]], [], torch.zeros(0, 4, dtype=torch.int64), [[1, 512]], [[1, -100]]):
        with pytest.raises(BadInput):
            model.loss(wrong)
    assert math.isfinite(model.loss(ids[:1]))


@pytest.mark.usefixtures("compiled_program")
def test_the_loss_over_some_data_is_the_same_on_every_engine(path, tmp_path):
    rows = "Once upon a time there was a cat. The cat was happy. " * 60
    (tmp_path / "text.txt").write_text(rows)
    prepare([tmp_path / "text.txt"], tmp_path / "data", str(path.parent / "tokenizer.bin"))
    seen = []
    found = onelaunch.load(path, device="cpu").evaluate(tmp_path / "data", seen.append)
    assert seen[-1].endswith("tokens")
    assert (found.window, found.data, found.synthetic) == (512, str(tmp_path / "data"), False)
    assert found.nats_per_byte < found.loss
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    for how in ({"engine": "reference"}, {"engine": "cpu"}, {"dtype": "float32"}):
        other = onelaunch.load(path, device="cpu", **how).evaluate(tmp_path / "data")
        assert other.tokens == found.tokens
        assert other.loss == pytest.approx(found.loss, rel=1e-5)
    narrow = onelaunch.load(path, device="cpu", dtype="bfloat16").evaluate(tmp_path / "data")
    assert 1e-6 < abs(narrow.loss / found.loss - 1) < 0.02


def test_a_model_is_saved_in_every_format_also_when_closed(model, path, tmp_path):
    again = tmp_path / "again.bin"
    model.close()
    model.save(again, "llama2c")
    assert again.read_bytes() == path.read_bytes()
    onelaunch.save(model, tmp_path / "hf", "hf")
    folder = onelaunch.load(tmp_path / "hf")
    assert folder.config.with_(rope_layout="interleaved") == model.config
    with pytest.raises(RuntimeError, match="closed"):
        model.generate("Once")
    assert "closed" in repr(model)


def test_a_pytorch_model_is_saved(tmp_path):
    config = ModelConfig(
        dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=64, max_seq_len=32
    )
    made = Model(config).init_weights(1)
    onelaunch.save(made, tmp_path / "made.bin", "llama2c")
    read = onelaunch.load(tmp_path / "made.bin", engine="reference", device="cpu")
    ids = torch.randint(64, (2, 32))
    with torch.no_grad():
        exact = made(ids)
    assert (read.logits(ids) - exact).norm() / exact.norm() < 1e-5


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"engine": "gpu"}, "engine='gpu'"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"dtype": "int3", "engine": "reference"}, "dtype='int3'"),
        ({"threads": 0, "engine": "reference"}, "threads=0"),
        ({"fusion_depth": "none", "engine": "reference"}, "fusion_depth='none'"),
        ({"tokenizer": "nowhere.bin"}, "nowhere.bin"),
    ],
)
def test_wrong_arguments_are_named(path, how, says):
    with pytest.raises(BadInput, match=re.escape(says)):
        onelaunch.load(path, **how).generate("Once", max_new_tokens=1)


def test_wrong_prompts_are_refused(model):
    for wrong in (5, [1, 2], None):
        with pytest.raises(BadInput, match="^prompt.*must be"):
            model.generate(wrong)
    with pytest.raises(BadInput, match="max_new_tokens=-1"):
        model.generate("Once", max_new_tokens=-1)


def test_a_model_without_a_tokenizer_gives_logits(path):
    (path.parent / "tokenizer.bin").unlink()
    model = onelaunch.load(path, engine="reference")
    assert model.logits([[1, 2]]).shape == (1, 2, 512)
    with pytest.raises(BadInput, match=r"no tokenizer .*tokenizer='FILE'"):
        model.generate("Once")


def test_a_random_preset():
    model = onelaunch.load("stories260k", random=True, tokenizer="bytes", engine="reference")
    assert isinstance(model, LanguageModel)
    assert isinstance(model.generate("Once", max_new_tokens=4), str)
    with pytest.raises(BadInput, match=r"onelaunch.load\('stories260k', random=True\)"):
        onelaunch.load("stories260k")


def test_notices_reach_the_log(path, monkeypatch):
    checkpoint = replace(api.load_checkpoint(path), notices=("an older checkpoint was read",))
    monkeypatch.setattr(api, "load_checkpoint", lambda path: checkpoint)
    lines = []
    onelaunch.load(path, engine="reference", log=lines.append)
    assert lines == ["an older checkpoint was read"]


def test_a_model_describes_its_engine(model):
    about = model.describe()
    assert (about["engine"], about["device"]) == ("reference", "cpu")


def test_training_gives_a_run_folder_that_loads(tmp_path):
    sections = {
        "model": {
            "preset": "stories260k",
            "dim": 32,
            "n_layers": 1,
            "n_heads": 2,
            "hidden_dim": 64,
        },
        "data": {"path": "stories"},
        "train": {"updates": 2, "batch_size": 2, "seq_len": 32, "device": "cpu"},
    }
    run = onelaunch.train(sections, run=tmp_path / "run", settings={"train.updates": 3})
    assert run == tmp_path / "run"
    with torch.no_grad():
        assert onelaunch.train(run=run, resume=True, settings={"train.updates": 4}) == run
    with pytest.raises(BadInput, match="another model"):
        onelaunch.train({"model": sections["model"] | {"dim": 48}}, run=run, resume=True)
    with onelaunch.load(run, engine="reference") as model:
        assert model.config.dim == 32
        assert model.loss([[1, 2, 3]]) > 0
    with pytest.raises(BadInput, match="updatez"):
        onelaunch.train(sections, settings={"train.updatez": 3})


def test_importing_the_names_loads_no_torch():
    code = (
        "import sys, onelaunch; onelaunch.load, onelaunch.train, onelaunch.LanguageModel; "
        "assert not {'torch', 'numpy', 'numba'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
