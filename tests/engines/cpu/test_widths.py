"""The program for vectors of other widths than this processor's own: what other processors run."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from onelaunch.engines.cpu import program
from onelaunch.engines.cpu.program import Program
from onelaunch.model import Model
from tests.engines.cpu.making import grow, logits_of, make_runtime, sequence_of
from tests.engines.cpu.test_shapes import SHAPES as SMALL_SHAPES
from tests.engines.suite import (
    SHAPES,
    SMALL,
    exact_logits,
    greedy_by_recomputing,
    relative_error,
    rows_of_tokens,
    weights_of,
)

pytestmark = pytest.mark.soak

WIDTHS = {"sse": (4, 16), "neon": (4, 32), "avx2": (8, 16), "avx512": (16, 32)}
# rows of an item that are a multiple of 8 and not of 16 with one thread: many columns
ODD_ITEMS = SMALL.with_(dim=88, n_heads=4, n_kv_heads=2, head_dim=20, hidden_dim=1536)
CONFIGS = {**SHAPES, **SMALL_SHAPES, "odd-items": ODD_ITEMS}

BUILD = """
import json, sys
from onelaunch.engines.cpu.native.build import build
sys.stdout.buffer.write(build(json.loads(sys.argv[1])))
"""


@pytest.fixture(scope="module", params=WIDTHS)
def code(request) -> bytes:
    lanes, registers = WIDTHS[request.param]
    options = {**program.options(), "lanes": lanes, "registers": registers}
    child = subprocess.run(
        [sys.executable, "-c", BUILD, json.dumps(options)], capture_output=True, check=False
    )
    assert child.returncode == 0, child.stderr.decode()
    made = Program(child.stdout)
    assert (made.lanes, made.tile) == (lanes, 16 if registers == 32 else 8)
    return child.stdout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_shape_is_as_exact_as_plain_pytorch(code, threads, dtype):
    wrong = {}
    for name, config in CONFIGS.items():
        weights = {
            n: w.to(dtype).float() if w.dim() == 2 else w for n, w in weights_of(config).items()
        }
        tokens_NS = rows_of_tokens(config, (1, config.max_seq_len))
        exact = exact_logits(config, weights, tokens_NS)
        plain = relative_error(Model.from_weights(config, weights)(tokens_NS), exact)
        runtime = make_runtime(code, config, weights, threads, dtype)
        logits = torch.stack([logits_of(runtime, tokens_S.tolist()) for tokens_S in tokens_NS])
        ours = relative_error(logits, exact)
        if not ours <= max(2 * plain, 2.0**-22):
            wrong[name] = ours
    assert not wrong


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", [*SHAPES, "odd-items"])
def test_greedy_equals_reading_the_whole_text_anew(code, name, threads):
    config = CONFIGS[name]
    weights = weights_of(config)
    runtime = make_runtime(code, config, weights, threads)
    prompts = [[5, 17, 3], [1]]
    texts = [sequence_of(runtime, prompt, 12) for prompt in prompts]
    grow(runtime, texts)
    for prompt, text in zip(prompts, texts, strict=True):
        assert text.new == greedy_by_recomputing(config, weights, prompt, 12)
