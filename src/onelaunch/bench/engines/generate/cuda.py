"""Tokens a second of the CUDA engine, compared with PyTorch's generation with a static cache:
eager, eager as a CUDA graph, and through torch.compile as a CUDA graph; and with the `generate` of
transformers, where that is installed.

Greedy, random weights of the presets' shapes in bfloat16, prompts of 32 tokens, 256 new ones. A
rate is of all new tokens over the whole call, the prompt's reading and the host included: what a
user gets. Also the time of a token alone, the slope between 16 and 272 new tokens.
"""

from __future__ import annotations

import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onelaunch.bench.core.children import run_child
from onelaunch.bench.core.gpu_forwards import captured, random_weights
from onelaunch.bench.core.record import Log, Row, rounded
from onelaunch.bench.core.rounds import digest, in_rounds, ratio
from onelaunch.bench.peers.decoding import BareDecoding, transformers_generate
from onelaunch.compilation.environment import child_environment
from onelaunch.config import preset
from onelaunch.engines.cuda.engine import CudaEngine
from onelaunch.engines.engine import Request, Sampling
from onelaunch.errors import RunFailed
from onelaunch.generation.decode import generate_ids

CASES = (
    ("stories260k", 1), ("stories15m", 1), ("stories110m", 1), ("smollm2-135m", 1),
    ("qwen3-0.6b", 1), ("llama-3.2-1b", 1), ("stories15m", 8), ("stories15m", 64),
    ("llama-3.2-1b", 64),
)  # fmt: skip
QUICK_CASES = CASES[1:2]
COLD, COLD_SAMPLES, COLD_SECONDS = "stories15m", 3, 300.0
LONG_PROMPT = 512
PROMPT, NEW, SLOPE = 32, 256, (16, 272)
CONTEXT = PROMPT + SLOPE[1]
LONGEST = LONG_PROMPT + SLOPE[1]
ROUNDS, QUICK_ROUNDS, EAGER_ROUNDS, WARM = 9, 3, 2, 8
DTYPE = torch.bfloat16

Generate = Callable[[int], Any]
"""Writes so many new tokens of each prompt."""


def run(device: str, quick: bool, log: Log) -> Iterator[Row]:
    """Time every case; yields rows."""
    for name, batch in QUICK_CASES if quick else CASES:
        gc.collect()
        torch.cuda.empty_cache()
        yield _case(name, batch, torch.device(device), quick, log)
    yield from cold_start(device, 1 if quick else COLD_SAMPLES, log)


def cold_start(device: str, samples: int, log: Log) -> Iterator[Row]:
    """The first text of fresh processes, with nothing compiled and with all; no row where that
    failed."""
    empty: list[dict[str, float]] = []
    filled: list[dict[str, float]] = []
    try:
        for _ in range(samples):
            with tempfile.TemporaryDirectory() as folder:
                empty.append(_first_text(device, folder))
                filled.append(_first_text(device, folder))
    except RunFailed as error:
        log(f"without a row of first texts: {error}")
        return
    for what, texts in (("nothing compiled", empty), ("all compiled", filled)):
        names = ("text_seconds", "kernels_seconds", "by_pytorch")
        notes = {name: digest([text[name] for text in texts]) for name in names}
        firsts = [text["first_token_seconds"] for text in texts]
        yield Row.of(f"{COLD}, {what}", firsts, notes={"kind": "gpu start", "unit": "s", **notes})


def _first_text(device: str, folder: str) -> dict[str, float]:
    command = [sys.executable, "-m", "onelaunch.bench.engines.generate.cuda_child", COLD, device]
    caches = {name: str(Path(folder) / name) for name in ("ONELAUNCH_CACHE", "TRITON_CACHE_DIR")}
    return dict(run_child(command, child_environment(**caches), COLD_SECONDS))


@torch.inference_mode()
def _case(name: str, batch: int, device: torch.device, quick: bool, log: Log) -> Row:
    config = preset(name)
    config = config.with_(max_seq_len=max(LONGEST, min(2048, config.max_seq_len)))
    generator = torch.Generator(device=device).manual_seed(0)
    weights = random_weights(config, device, generator)
    prompts = torch.randint(2, config.vocab_size, (batch, PROMPT), generator=torch.manual_seed(1))
    engine = CudaEngine(config, weights, str(device), "bfloat16")
    ours = partial(_ours, engine, prompts.tolist())
    start = time.perf_counter()
    written = ours(NEW)
    first_seconds = time.perf_counter() - start
    log(f"{name} x {batch}: the engine's first text after {first_seconds:.1f} s")
    if ours(NEW) != written:
        raise RunFailed(f"{name} x {batch}: two runs wrote different tokens")
    rounds = QUICK_ROUNDS if quick else ROUNDS
    # before torch.compile's processes are there, which keep the host's cores busy for a while
    slopes = [_slope_us(ours) for _ in range(rounds)]
    firsts = [_first_ms(engine, prompts.tolist()) for _ in range(rounds)]
    long = torch.randint(2, config.vocab_size, (1, LONG_PROMPT)).tolist()
    long_firsts = [_first_ms(engine, long) for _ in range(rounds + 2)][2:] if batch == 1 else []
    cancels = [_after_cancel_ms(engine, prompts.tolist()) for _ in range(rounds)]
    peer = BareDecoding(config, weights, DTYPE, device, batch, CONTEXT)
    peers, compile_seconds = _peers(peer, prompts.to(device))
    theirs = peers["eager"](NEW).tolist()
    same = statistics.mean(_agree(a, b) for a, b in zip(written, theirs, strict=True))
    contestants: dict[str, Callable[[], float]] = {
        "ours": partial(_rate, ours, batch),
        **{peer_: partial(_rate, run_, batch) for peer_, run_ in peers.items() if peer_ != "eager"},
    }
    samples = in_rounds(contestants, rounds)
    # what is launched from Python takes as long as all the others
    slow = {"eager": peers["eager"]}
    generate = transformers_generate(config, DTYPE, device, prompts.to(device))
    if generate is not None:
        generate(WARM)
        slow["transformers"] = generate
    for name_, run_ in slow.items():
        samples[name_] = [_rate(run_, batch) for _ in range(EAGER_ROUNDS)]
    medians = {peer_: statistics.median(values) for peer_, values in samples.items()}
    rates = samples["ours"]
    ratios = {
        peer_: rounded(ratio(rates, samples[peer_])) for peer_ in contestants if peer_ != "ours"
    }
    ratios |= {name_: rounded(medians["ours"] / medians[name_]) for name_ in slow}
    notes = {
        "kind": "gpu",
        "us_per_token": rounded(batch / statistics.median(rates) * 1e6),
        "slope_us": digest(slopes),
        "first_token_ms": digest(firsts),
        "after_cancel_ms": digest(cancels),
        **({"first_token_512_ms": digest(long_firsts)} if long_firsts else {}),
        "first_text_seconds": round(first_seconds, 2),
        "compile_seconds": round(compile_seconds, 2),
        "same_tokens_as_eager": rounded(same),
        "ratios": ratios,
    }
    del medians["ours"]
    return Row.of(f"{name} bfloat16, batch {batch}", rates, peers=medians, notes=notes)


def _ours(engine: CudaEngine, prompts: list[list[int]], n: int) -> list[list[int]]:
    return generate_ids(engine, prompts, n, Sampling())


def _peers(peer: BareDecoding, prompts_BS: Tensor) -> tuple[dict[str, Generate], float]:
    """PyTorch's forms by name, and the seconds to torch.compile's first token."""
    peer.read(prompts_BS)
    eager = captured(peer.step)
    peer.read(prompts_BS)
    start = time.perf_counter()
    torch.compiler.reset()  # the cases before are no shapes of this one
    peer.forward = torch.compile(peer.logits, dynamic=False)
    peer.step()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peer.read(prompts_BS)
    compiled = captured(peer.step)
    peer.forward = peer.logits
    forms = {
        "eager": peer.step,
        "eager + graph": eager.replay,
        "torch.compile + graph": compiled.replay,
    }
    return {
        name: partial(peer.generate, prompts_BS, step=step) for name, step in forms.items()
    }, seconds


def _rate(generate: Generate, batch: int) -> float:
    """Tokens a second of all sequences."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    generate(NEW)
    return batch * NEW / (time.perf_counter() - start)


def _slope_us(generate: Generate) -> float:
    """Microseconds of one more token of each sequence."""
    seconds = []
    for n in SLOPE:
        torch.cuda.synchronize()
        start = time.perf_counter()
        generate(n)
        seconds.append(time.perf_counter() - start)
    return (seconds[1] - seconds[0]) / (SLOPE[1] - SLOPE[0]) * 1e6


def _first_ms(engine: CudaEngine, prompts: list[list[int]]) -> float:
    """Milliseconds to the first token of a session of all prompts."""
    session = engine.session(len(prompts), len(prompts[0]) + SLOPE[1])
    torch.cuda.synchronize()
    start = time.perf_counter()
    for number, prompt in enumerate(prompts):
        session.submit(Request(number, prompt, NEW))
    while not session.step():
        pass
    seconds = time.perf_counter() - start
    session.close()
    return seconds * 1e3


def _after_cancel_ms(engine: CudaEngine, prompts: list[list[int]]) -> float:
    """Milliseconds from the cancelling of a request, beside the others, to the first token of one
    that waits for its place."""
    session = engine.session(len(prompts), len(prompts[0]) + SLOPE[1])
    for number, prompt in enumerate(prompts):
        session.submit(Request(number, prompt, NEW))
    while not any(event.id == 0 for event in session.step()):
        pass
    session.submit(Request(len(prompts), prompts[0], NEW))
    start = time.perf_counter()
    session.cancel(0)
    while not any(event.id == len(prompts) for event in session.step()):
        pass
    seconds = time.perf_counter() - start
    session.close()
    return seconds * 1e3


def _agree(a: list[int], b: list[int]) -> float:
    """How many tokens two texts begin alike with, of all."""
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    return same / len(a)
