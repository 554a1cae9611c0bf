"""Our GGUF files in llama.cpp: the same ids, prompts and probabilities as here.

Needs the package xllamacpp, llama.cpp as a wheel, besides gguf and tokenizers.
"""

import json
import urllib.request
from pathlib import Path

import pytest
import torch
from tests.checkpoints.test_gguf_tokenizer import TEXT, other_layout_file, train_bpe

from onelaunch.checkpoints import load, save
from onelaunch.checkpoints.gguf_pre_tokenizers import PRE_TOKENIZERS
from onelaunch.checkpoints.gguf_tokenizer import read_tokenizer
from onelaunch.checkpoints.tokenizers import BytesTokenizer, find_tokenizer
from onelaunch.checkpoints.weights import LoadedModel
from onelaunch.config import ModelConfig, RopeScaling
from onelaunch.model import Model

pytestmark = pytest.mark.extended
pytest.importorskip("gguf")

WEIGHTS = Path(__file__).parents[2] / ".." / "shared" / "weights"
needs_stories = pytest.mark.skipif(
    not (WEIGHTS / "stories260K.bin").is_file(), reason="stories260K.bin is not in ../shared"
)
TEXTS = (
    TEXT,
    "Once upon a time",
    " a  b ",
    "\n",
    "\u00e9\u00e8 \U0001f600 $x^2 += '3'",
    "I'LL 123456",
)


def _server(path, context=512):
    library = pytest.importorskip("xllamacpp")
    params = library.CommonParams()
    params.model.path = str(path)
    params.n_ctx = context
    params.n_parallel = 1
    params.warmup = False
    params.verbosity = 0
    # float32 throughout: its attention rounds to float16 by default
    params.cache_type_k = params.cache_type_v = library.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    return library.Server(params)


def _complete(server, prompt, n):
    """The ids, greedy."""
    content = _content(server, {"prompt": prompt, "n_predict": n, "n_probs": 1})
    return [each["id"] for each in content]


def _log_probabilities(server, prompt, rows):
    """Of all tokens after a prompt. The token that is drawn is made to be text, "a": the server
    keeps half a character back."""
    drawn = {"n_predict": 1, "n_probs": rows, "logit_bias": [[100, 1e4]]}
    (content,) = _content(server, {"prompt": prompt} | drawn)
    top = {each["id"]: each["logprob"] for each in content["top_logprobs"]}
    return torch.tensor([top[i] for i in range(rows)], dtype=torch.float64)


def _content(server, request):
    greedy = {"temperature": 0.0, "samplers": ["top_k"], "top_k": 1}
    answer = server.handle_completions(
        {"ignore_eos": True, "cache_prompt": False} | greedy | request
    )
    return answer["choices"][0]["logprobs"]["content"]


def _tokenize(server, text, bos):
    body = {"content": text, "add_special": bos, "parse_special": True}
    request = urllib.request.Request(
        f"{server.listening_address}/tokenize",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["tokens"]


def _check_probabilities(path, model, tolerance):
    """Of one prompt: log probabilities of all tokens."""
    rows = model.config.vocab_size
    prompt = [(7 * i + 1) % rows for i in range(12)]
    network = Model.from_weights(
        model.config, {name: tensor.double() for name, tensor in model.weights.items()}
    ).double()
    expected = network(torch.tensor([prompt]))[0, -1].log_softmax(-1)
    actual = _log_probabilities(_server(path), prompt, rows)
    assert float(expected.std()) > 10 * tolerance
    assert float((actual - expected).abs().max()) < tolerance


@needs_stories
def test_the_published_model_writes_the_same_story(tmp_path):
    model = load(WEIGHTS / "stories260K.bin")
    tokenizer = find_tokenizer(model)
    save(model, tmp_path / "stories.gguf", "gguf", tokenizer=tokenizer)
    server = _server(tmp_path / "stories.gguf")
    text = (WEIGHTS / "stories260K_greedy_ids_n256.txt").read_text()
    expected = [int(i) for i in text.split()]
    ids = _complete(server, [1], 200)
    assert len(ids) == 200
    assert ids == expected[:200]
    for text in TEXTS:
        for bos in (True, False):
            assert _tokenize(server, text, bos) == tokenizer.encode(text, bos=bos)


@needs_stories
@pytest.mark.parametrize(
    ("weights", "tolerance"),
    [("f32", 5e-5), ("f16", 0.02), ("bf16", 0.1), ("q8_0", 0.3), ("q4_0", 0.4)],
)
def test_the_published_model_in_each_type(tmp_path, weights, tolerance):
    model = load(WEIGHTS / "stories260K.bin")
    path = tmp_path / "stories.gguf"
    save(model, path, "gguf", weights=weights, tokenizer=find_tokenizer(model))
    # against the rounded weights: what remains is llama.cpp's own rounding
    _check_probabilities(path, load(path), tolerance)


CONFIG = ModelConfig(
    dim=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    hidden_dim=96,
    vocab_size=259,
    max_seq_len=64,
)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_embeddings": False, "head_dim": 24, "norm_eps": 1e-3, "rope_theta": 500.0},
        {"rope_scaling": RopeScaling(factor=8.0, original_max_seq_len=16), "rope_theta": 5e5},
        {"qk_norm": True, "head_dim": 32, "rope_theta": 1e6},
        {"qkv_bias": True, "tied_embeddings": False, "rope_theta": 1e6},
    ],
)
def test_every_shape(tmp_path, layout, changes):
    config = CONFIG.with_(rope_layout=layout, **changes)
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: torch.randn(shape, generator=generator) * (0.2 if len(shape) > 1 else 1)
        for name, shape in config.weight_shapes().items()
    }
    model = LoadedModel(config, weights)
    save(model, tmp_path / "m.gguf", "gguf", tokenizer=BytesTokenizer())
    _check_probabilities(tmp_path / "m.gguf", model, 5e-5)


def _tokenizer(folder, name):
    if name == "bytes":
        return BytesTokenizer()
    if name == "sentencepiece":
        return read_tokenizer(other_layout_file(folder))
    return train_bpe(folder, name)


@pytest.mark.parametrize("name", [*PRE_TOKENIZERS, "bytes", "sentencepiece"])
def test_prompts_have_the_same_ids(tmp_path, name):
    tokenizer = _tokenizer(tmp_path, name)
    rows = tokenizer.vocab_size + 3
    config = CONFIG.with_(vocab_size=rows)
    model = LoadedModel(config, Model(config).init_weights(0).state_dict())
    model.bos_id = tokenizer.bos_id
    save(model, tmp_path / "m.gguf", "gguf", tokenizer=tokenizer)
    server = _server(tmp_path / "m.gguf")
    special = ("a[INST]b <|im|> ab", "<|im|>", " [INST] a") if name == "sentencepiece" else ()
    for text in (*TEXTS, *special):
        if name == "qwen2":
            text = text.replace("e\u0301", "")  # llama.cpp does not compose characters
        for bos in (True, False):
            assert _tokenize(server, text, bos) == tokenizer.encode(text, bos=bos), (text, bos)
