"""The kernel of a whole text on a CPU: its threads are fibers that run in a random order
(emulator.h), so that what waits for too little shows. Against PyTorch."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from onelaunch.engines.cuda.blocking import H200
from onelaunch.engines.cuda.decoding import STOP_IDS, grids, sampling, text
from onelaunch.engines.cuda.decoding.text_trace import (
    format_token,
    spans_of_last_token,
    token_events,
)
from onelaunch.engines.cuda.pack import pack
from onelaunch.engines.engine import Sampling
from onelaunch.model import Model
from tests.engines.suite import SHAPES, SMALL, exact_logits, weights_of

COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")
HERE = Path(__file__).parent
OPTIONS = (
    "-std=c++20", "-O1", "-fPIC", "-shared", "-fno-strict-aliasing", "-w",
    f"-I{HERE}", f"-I{Path(text.__file__).parent}",
)  # fmt: skip
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
GROUPED = SMALL.with_(dim=64, n_kv_heads=2, head_dim=24, hidden_dim=84, vocab_size=300)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """By macros, each compiled once."""
    folder, libraries = tmp_path_factory.mktemp("emulated"), {}

    def library(macros):
        key = tuple(sorted(macros.items()))
        if key not in libraries:
            path = folder / f"{len(libraries)}.so"
            defined = [f"-D{name}={value}" for name, value in macros.items()]
            source = HERE / "emulated_text.cpp"
            subprocess.run([COMPILER, *OPTIONS, *defined, "-o", path, source], check=True)
            libraries[key] = ctypes.CDLL(path)
        return libraries[key]

    return library


def pointers(*tensors):
    return np.array([0 if t is None else t.data_ptr() for t in tensors], dtype=np.int64)


class Emulated:
    """Launches of one cache, whose numbers are NaN until they are written."""

    groups = 1

    def __init__(
        self, compiled, config, weights, dtype, ctas, timeout_ns=10**11, grid=None, **changed
    ):
        c = config
        self.config, self.ctas, self.timeout_ns = config, ctas, timeout_ns
        grid = grid or grids.Grid(1, ctas, tiles=False)
        macros = text.macros(config, dtype, grid, H200.shared_bytes) | changed
        self.library = compiled(macros)
        p = self.packed = pack(config, weights, dtype, torch.device("cpu"))
        self.weights = text.kernel_weights(config, p, grid)
        self.model = pointers(*self.weights)
        shape = (c.n_layers, 1, c.n_kv_heads, c.max_seq_len, c.head_dim)
        self.keys, self.values = (torch.full(shape, float("nan"), dtype=dtype) for _ in "kv")
        self.stride = 16 * c.dim + 64 * ctas + 8 * (c.q_dim + c.n_heads + c.hidden_dim)
        self.words = torch.zeros(grids.REPLICAS * self.stride, dtype=torch.int64)
        self.status = torch.zeros(1, dtype=torch.int32)
        self.sums = torch.randint(0, 1 << 40, (8, 272))  # whatever it is
        self.history = torch.full((c.max_seq_len,), -1, dtype=torch.int32)
        self.uniforms = torch.rand(c.max_seq_len)
        self.written = torch.full((c.max_seq_len,), -1)
        self.ending = torch.zeros(2, dtype=torch.int32)
        self.stop = torch.full((STOP_IDS,), -1, dtype=torch.int32)
        self.memory = pointers(
            self.keys, self.values, self.words, self.status, self.written, self.ending, self.stop,
            self.sums, self.uniforms, self.history,
        )  # fmt: skip
        self.marks = torch.zeros(ctas, max(1, changed.get("TRACE", 0)), dtype=torch.int64)
        self.epoch = 1

    def launch(self, numbers, n, seed, fractions=(0.0, 1.0, 0.0, 1.0)):
        at = [array.ctypes.data_as(ctypes.c_void_p) for array in (self.model, self.memory)]
        self.library.run_text(
            *at, (ctypes.c_int * 10)(*numbers), (ctypes.c_float * 4)(*fractions),
            ctypes.c_uint(self.epoch),
            ctypes.c_ulonglong(self.timeout_ns), self.groups * self.ctas, ctypes.c_uint(seed),
            ctypes.c_void_p(self.marks.data_ptr()),
        )  # fmt: skip
        self.epoch += (n + 1) * self.config.n_layers

    def write(self, token, position, n, passes=1, seed=0, first=0, drawn=None, penalty=1.0):
        numbers = [0, 1, self.config.max_seq_len, token, position, n, passes, self.stride]
        if drawn is None:
            self.launch(numbers, n, seed)
        else:
            fractions = drawn.temperature, drawn.top_p, drawn.min_p, penalty
            self.launch([*numbers, drawn.top_k, first], n, seed, fractions)
        return self.result(self.written, self.ending)

    @staticmethod
    def result(written, ended):
        count, ending = ended.tolist()
        words = written[:count].numpy()
        logprobs = (words >> 32).astype(np.int32).view(np.float32)
        return (words & 0xFFFFFFFF).tolist(), logprobs.tolist(), ending


def check(emulated, weights, tokens, logprobs, first=3):
    """The most likely tokens of the model, and their logprobs, in float32 exactly; keys and values
    are there up to the last token."""
    config = emulated.config
    ids = torch.tensor([[first, *tokens[:-1]]])
    exact = exact_logits(config, weights, ids)[0].log_softmax(-1)
    got = torch.tensor(logprobs).double()
    chosen = exact.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    if emulated.packed.embedding.dtype == FLOAT32:
        assert exact.argmax(-1).tolist() == tokens
        torch.testing.assert_close(got, chosen, atol=1e-4, rtol=1e-4)
    else:
        narrow = Model.from_weights(config, {name: w.bfloat16() for name, w in weights.items()})
        with torch.no_grad():
            plain = F.linear(narrow.hidden(ids), narrow.head_weight())[0].double().log_softmax(-1)
        allowed = 1.5 * (plain - exact).norm() / exact.shape[1] ** 0.5
        assert (got - chosen).norm() <= max(allowed, 0.02 * len(tokens) ** 0.5)
    for cache in (emulated.keys, emulated.values):
        assert cache[:, 0, :, : len(tokens)].isfinite().all()
        assert cache[:, 0, :, len(tokens) :].isnan().all()


FEW = {"WARPS": 2}  # whose CTAs are quick, and have not all rows of every stage


def test_a_text_is_the_models(compiled):
    weights = weights_of(GROUPED)
    emulated = Emulated(compiled, GROUPED, weights, BFLOAT16, 5, **FEW)
    tokens, logprobs, ending = emulated.write(3, 0, 12)
    assert len(tokens) == 12
    assert ending == sampling.FULL
    check(emulated, weights, tokens, logprobs)


@pytest.mark.extended
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, torch.float16])
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_a_text_of_every_shape(compiled, config, dtype):
    weights = weights_of(config)
    emulated = Emulated(compiled, config, weights, dtype, 3, **FEW)
    tokens, logprobs, _ = emulated.write(3, 0, 20)
    assert len(tokens) == 20
    check(emulated, weights, tokens, logprobs)


@pytest.mark.extended
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("width", [1028, 2304])
def test_rows_that_are_long(compiled, width, dtype):
    """Of which some words are there before x, and others are read in a loop; one is cut in whole
    pieces."""
    config = SMALL.with_(hidden_dim=width, n_layers=1)
    weights = weights_of(config)
    emulated = Emulated(compiled, config, weights, dtype, 3)
    tokens, logprobs, _ = emulated.write(3, 0, 6)
    assert len(tokens) == 6
    check(emulated, weights, tokens, logprobs)


@pytest.mark.extended
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("ctas", "changed"),
    [(1, {}), (2, {}), (7, FEW), (4, FEW | {"SLOTS": 2}), (3, FEW | {"REPLICAS": 1})],
)
def test_any_grid_and_any_order_write_the_same(compiled, ctas, changed, seed):
    weights = weights_of(GROUPED)
    emulated = Emulated(compiled, GROUPED, weights, FLOAT32, ctas, **changed)
    tokens, logprobs, _ = emulated.write(3, 0, 10, seed=seed)
    check(emulated, weights, tokens, logprobs)
    # it goes on where it stopped
    more, _, _ = emulated.write(tokens[-1], 10, 5, seed=seed)
    check(emulated, weights, [*tokens, *more], [*logprobs, *emulated_logprobs(emulated, 5)])


def emulated_logprobs(emulated, n):
    words = emulated.written[:n].numpy()
    return (words >> 32).astype(np.int32).view(np.float32).tolist()


@pytest.mark.extended
def test_chunks_of_several_passes(compiled):
    config = SMALL.with_(max_seq_len=160, n_layers=1)
    weights = weights_of(config)
    emulated = Emulated(compiled, config, weights, FLOAT32, 2, **FEW)
    # 16 positions a warp and pass: chunks of 64
    tokens, logprobs, _ = emulated.write(3, 0, 150, passes=2)
    assert len(tokens) == 150
    check(emulated, weights, tokens, logprobs)


@pytest.mark.extended
def test_what_ends_a_text(compiled):
    weights = weights_of(SMALL)
    emulated = Emulated(compiled, SMALL, weights, FLOAT32, 2, **FEW)
    tokens, _, _ = emulated.write(3, 0, 15)
    stop = tokens[9]
    emulated.stop[5] = stop
    first = tokens.index(stop)
    assert emulated.write(3, 0, 15)[::2] == (tokens[:first], sampling.STOPPED)
    emulated.stop[5] = -1
    assert emulated.write(3, 0, 15)[::2] == (tokens, sampling.FULL)
    emulated.packed.down[1] *= float("inf")
    assert emulated.write(3, 0, 15)[::2] == ([], sampling.NOT_FINITE)


@pytest.mark.extended
def test_a_wait_that_does_not_end_times_out(compiled):
    weights = weights_of(SMALL)
    emulated = Emulated(compiled, SMALL, weights, FLOAT32, 2, timeout_ns=10**7, **FEW)
    emulated.ctas = 1  # the other half of every stage never comes
    assert emulated.write(3, 0, 2)[2] == -1
    assert emulated.status.item() != 0


@pytest.mark.extended
def test_marks_make_a_timeline(compiled):
    weights, ctas = weights_of(SMALL), 12  # some of them have a part in attention alone
    emulated = Emulated(compiled, SMALL, weights, FLOAT32, ctas, TRACE=200, **FEW)
    emulated.write(3, 0, 4)
    spans = spans_of_last_token(emulated.marks, SMALL.n_layers)
    for cta in range(ctas):
        own = [span for span in spans if span.cta == cta]
        assert [span.began for span in own] == sorted(span.began for span in own)
        assert all(span.began <= span.ready <= span.ended for span in own)
    kinds = [span.kind for span in spans]
    assert kinds.count("head") == kinds.count("choice") == ctas
    assert kinds.count("attention") == SMALL.n_layers * SMALL.n_heads
    for kind in ("qkv", "attention", "out_proj", "gate_up", "down"):
        layers = {span.layer for span in spans if span.kind == kind}
        assert layers == set(range(SMALL.n_layers))
    assert "head" in format_token(spans)
    json.dumps(token_events(spans, "a token"))


FILTERS = {
    "none": Sampling(0.9),
    "top-k": Sampling(1.2, top_k=7),
    "top-p": Sampling(1.1, top_p=0.8),
    "min-p": Sampling(1.3, min_p=0.1),
    "one": Sampling(1.0, top_k=1),
    "little": Sampling(1.0, top_p=1e-6),
    "all": Sampling(0.7, top_k=40, top_p=0.7, min_p=0.02),
    "cold": Sampling(1e-4),
    "more than there are": Sampling(0.3, top_k=1000, min_p=2e-8),
}


def penalised(logits_V, ids, penalty):
    """By the definition: each token that the text has is made less likely, or more."""
    changed = logits_V.clone()
    for id in set(ids):
        changed[id] = logits_V[id] / penalty if logits_V[id] > 0 else logits_V[id] * penalty
    return changed


def check_drawn(logits_NV, ids, tokens, logprobs, uniforms, sampling, penalty):
    """Tokens after `ids`, whose logits are those of `logits_NV`: each by its random number, from
    the distribution over ids in their order; or the most likely one."""
    for i, token in enumerate(tokens):
        logits = penalised(logits_NV[i], [*ids, *tokens[:i]], penalty)
        if sampling.greedy:
            assert logits[token] >= logits.max() - 1e-5
            continue
        probabilities = kept(logits, sampling)
        up_to, uniform = probabilities.cumsum(0), float(uniforms[i])
        assert probabilities[token] > 0
        assert up_to[token] - probabilities[token] - 1e-4 <= uniform <= up_to[token] + 1e-4
    exact = logits_NV.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(logprobs).double(), exact, atol=1e-4, rtol=1e-4)


def kept(logits_V, sampling):
    """The probability of each token, float64, by the definition."""
    weights = ((logits_V - logits_V.max()) / sampling.temperature).exp()
    order = weights.argsort(descending=True, stable=True)
    keep = torch.zeros_like(weights, dtype=torch.bool)
    keep[order[: sampling.top_k or len(order)]] = True
    keep &= weights >= sampling.min_p
    weights = torch.where(keep, weights, 0.0)
    before = weights[order].cumsum(0) - weights[order]
    keep[order] &= before < sampling.top_p * weights.sum()
    return torch.where(keep, weights, 0.0) / torch.where(keep, weights, 0.0).sum()


@pytest.mark.parametrize(
    ("name", "ctas"),
    [
        ("all", 3),
        *(pytest.param(name, 3, marks=pytest.mark.extended) for name in FILTERS if name != "all"),
        *(pytest.param("all", ctas, marks=pytest.mark.extended) for ctas in (1, 7)),
    ],
)
def test_tokens_are_drawn_from_what_the_filters_leave(compiled, name, ctas):
    """Each by its random number, from the distribution over ids in their order."""
    sampling, weights, n = FILTERS[name], weights_of(SMALL), 20
    emulated = Emulated(compiled, SMALL, weights, FLOAT32, ctas, DRAWS=1, SLOTS=6, **FEW)
    tokens, logprobs, _ = emulated.write(3, 0, n, first=2, drawn=sampling)
    assert len(tokens) == n
    logits = exact_logits(SMALL, weights, torch.tensor([[3, *tokens[:-1]]]))[0]
    check_drawn(logits, [3], tokens, logprobs, emulated.uniforms[2:], sampling, 1.0)


@pytest.mark.extended
@pytest.mark.parametrize("penalty", [1.5, 0.6])
@pytest.mark.parametrize("sampling", [Sampling(), FILTERS["all"], FILTERS["top-p"]])
def test_tokens_that_the_text_has_are_penalised(compiled, sampling, penalty):
    """Those of the prompt and those of the launches before, too."""
    weights, before, n = weights_of(SMALL), [9, 40, 3], 12
    emulated = Emulated(compiled, SMALL, weights, FLOAT32, 3, DRAWS=1, SLOTS=6, **FEW)
    emulated.history[: len(before)] = torch.tensor(before, dtype=torch.int32)
    for position, token in enumerate(before[:-1]):
        emulated.write(token, position, 1, drawn=Sampling())  # its keys and values
    options = {"drawn": sampling, "penalty": penalty}
    emulated.history[len(before) :] = -1
    tokens, logprobs, _ = emulated.write(3, 2, 5, **options)
    more = emulated.write(tokens[-1], 7, n - 5, first=5, **options)
    tokens, logprobs = tokens + more[0], logprobs + more[1]
    assert emulated.history[: 3 + n].tolist() == [*before, *tokens]
    logits = exact_logits(SMALL, weights, torch.tensor([[*before, *tokens[:-1]]]))[0, 2:]
    check_drawn(logits, before, tokens, logprobs, emulated.uniforms, sampling, penalty)
    if sampling.greedy:
        assert tokens != emulated.write(3, 2, n, drawn=Sampling())[0]


@pytest.mark.extended
def test_ties_at_the_bound_are_kept_from_the_lowest_id_on(compiled):
    """With a head of equal rows every token is as likely: of top_k of them those of the lowest ids
    are left."""
    weights = weights_of(SMALL.with_(tied_embeddings=False))
    weights["lm_head.weight"][:] = weights["lm_head.weight"][0]
    config = SMALL.with_(tied_embeddings=False)
    emulated = Emulated(compiled, config, weights, FLOAT32, 3, DRAWS=1, SLOTS=6, **FEW)
    tokens, _, _ = emulated.write(3, 0, 20, drawn=Sampling(1.0, top_k=10))
    assert tokens == [int(u * 10) for u in emulated.uniforms[:20].tolist()]
    tokens, _, _ = emulated.write(3, 0, 20, drawn=Sampling(1.0, top_k=10, top_p=0.45))
    assert tokens == [int(u * 5) for u in emulated.uniforms[:20].tolist()]
