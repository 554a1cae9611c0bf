"""The timeline of a token that one launch writes: of each CTA when what a stage reads was there,
and when its part of it was done."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onelaunch.checkpoints.atomic import write_text
from onelaunch.config import ModelConfig
from onelaunch.engines.cuda.decoding.grids import why_not
from onelaunch.engines.cuda.decoding.prefill import Prompts
from onelaunch.engines.cuda.decoding.text import Row, Text, TextKernel
from onelaunch.engines.cuda.pack import pack
from onelaunch.engines.cuda.timeline import named
from onelaunch.errors import BadInput

TOKENS = 32
"""Of the launch whose last token is kept."""
# The points of both kernels: of stage i what it reads is there (2 i + 1), and it is done (2 i + 2);
# the choice of the token has an end alone.
KINDS = ("qkv", "attention", "out_proj", "gate_up", "down", "head", "choice")
_BEGIN, _CHOSEN = 0, 2 * len(KINDS) - 1


class Span(NamedTuple):
    """A CTA's part of a stage, in nanoseconds: it waited from `began` on. `layer` is None of the
    head and of the choice of the token, which takes from its logits to what all CTAs have chosen.
    """

    cta: int
    kind: str
    layer: int | None
    began: int
    ready: int
    ended: int


def spans_of_last_token(marks: Tensor, n_layers: int) -> list[Span]:
    """The spans of the last token of marks, (CTAs, marks of a CTA), zeros where there is none."""
    spans: list[Span] = []
    for cta, row in enumerate(marks.tolist()):
        points = sorted((mark >> 16, mark >> 4 & 4095, mark & 15) for mark in row if mark)
        begin = max(i for i, (_, _, point) in enumerate(points) if point == _BEGIN)
        before = ready = points[begin][0]
        for time, layer, point in points[begin + 1 :]:
            if point % 2 and point != _CHOSEN:
                ready = time
                continue
            of_layer = layer if layer < n_layers else None
            begun = before if point == _CHOSEN else ready
            spans.append(Span(cta, KINDS[(point - 1) // 2], of_layer, before, begun, time))
            before = time
    return spans


def trace_text(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    prompt_ids: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> list[Span]:
    """Write TOKENS tokens after a prompt, and keep the last one's spans. Raises BadInput where one
    launch cannot write the model's texts, or the context has no room."""
    if reason := why_not(config, device, dtype):
        raise BadInput(f"fusion_depth='text': {reason}")
    context = len(prompt_ids) + TOKENS
    if context > config.max_seq_len:
        raise BadInput(f"a timeline is of {TOKENS} tokens after the prompt: the context is full")
    packed = pack(config, weights, dtype, device)
    marks = (10 * config.n_layers + 8) * TOKENS
    kernel = TextKernel(config, packed, trace=marks)
    shape = (2, config.n_layers, 1, config.n_kv_heads, context, config.head_dim)
    cache = packed.embedding.new_zeros(shape)
    reading = Prompts(config, packed).begin(prompt_ids[:-1], cache, 0, with_logits=False)
    while not reading.step():
        pass
    text = Text(kernel, cache[0], cache[1])
    for _ in range(2):  # the first one warms the caches
        text.launch([Row(0, prompt_ids[-1], len(prompt_ids) - 1, TOKENS)])
        text.finish([0])
    spans = spans_of_last_token(text.marks.cpu(), config.n_layers)
    text.close()
    return spans


def format_token(spans: Sequence[Span]) -> str:
    """Of each kind of stage how many CTAs have a part, and medians of wait and work and of the time
    from the first that is ready to the last that is done, in microseconds."""
    lines = [f"{'us':<10}{'CTAs':>7}{'wait':>8}{'work':>8}{'stage':>8}"]
    for kind in KINDS:
        own = [span for span in spans if span.kind == kind]
        layers: dict[int | None, list[Span]] = defaultdict(list)
        for span in own:
            layers[span.layer].append(span)
        whole = [
            max(s.ended for s in each) - min(s.ready for s in each) for each in layers.values()
        ]
        figures = (
            statistics.median(span.ready - span.began for span in own),
            statistics.median(span.ended - span.ready for span in own),
            statistics.median(whole),
        )
        ctas = len({span.cta for span in own})
        lines.append(f"{kind:<10}{ctas:>7}" + "".join(f"{each / 1e3:>8.2f}" for each in figures))
    total = max(span.ended for span in spans) - min(span.began for span in spans)
    return "\n".join([*lines, f"{total / 1e3:.2f} us a token, with the marks"])


def token_events(spans: Sequence[Span], name: str) -> dict[str, Any]:
    """The spans as Chrome's trace events, which Perfetto reads: a track for each CTA."""
    start = min(span.began for span in spans)
    events = [named("process_name", 0, name)]
    for cta in sorted({span.cta for span in spans}):
        events.append(named("thread_name", cta, f"CTA {cta}"))
        events.append(named("thread_sort_index", cta, cta))
    for span in spans:
        stage = span.kind if span.layer is None else f"layer {span.layer} {span.kind}"
        for what, first, last in (
            ("wait", span.began, span.ready),
            ("work", span.ready, span.ended),
        ):
            events.append(
                {
                    "ph": "X",
                    "name": stage if what == "work" else f"wait: {stage}",
                    "cat": f"{what} {span.kind}",
                    "pid": 0,
                    "tid": span.cta,
                    "ts": (first - start) / 1e3,
                    "dur": (last - first) / 1e3,
                }
            )
    return {"traceEvents": events, "displayTimeUnit": "ns"}


def write_token(spans: Sequence[Span], path: Path, name: str) -> None:
    """The spans as a file that ui.perfetto.dev opens. Raises BadInput where there is no place for
    it."""
    write_text(path, json.dumps(token_events(spans, name), separators=(",", ":")) + "\n")
