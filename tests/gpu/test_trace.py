"""The times that a traced forward leaves, and the file that is made of them."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise

import pytest
import torch

from onelaunch import cli
from onelaunch.engines.cuda.blocking import Blocking
from onelaunch.engines.cuda.pack import pack
from onelaunch.engines.cuda.program import FusedForward, Shape
from onelaunch.engines.cuda.timeline import format_summary, summary
from onelaunch.engines.cuda.trace import timeline_of, trace, write
from tests.engines.suite import weights_of
from tests.gpu.fuzzing import CUDA, MIXED, WIDE

STEP = 1_000  # nanoseconds: of the clock; some devices' goes on by as much


def tokens_of(batch, sequence):
    generator = torch.Generator().manual_seed(sequence)
    return torch.randint(WIDE.vocab_size, (batch, sequence), generator=generator)


@pytest.mark.parametrize("depth", ["all", "half", "stage"])
@pytest.mark.parametrize("programs", [1, 100, 264])
def test_times_are_those_of_tiles_that_waited(depth, programs):
    packed = pack(WIDE, weights_of(WIDE), torch.bfloat16, CUDA)
    forwards = [
        FusedForward(WIDE, packed, Shape(2, 200), MIXED, depth, programs, traced=traced)
        for traced in (False, True)
    ]
    for forward in forwards:
        forward.buffers.tokens.copy_(tokens_of(2, 200).flatten())
        for _ in range(2):
            forward.run()
    assert torch.equal(forwards[0].buffers.logits, forwards[1].buffers.logits)
    timeline = timeline_of(forwards[1])
    assert len(timeline.spans) == timeline.tiles.tiles
    assert 10_000 < timeline.ended - timeline.began < 1_000_000_000

    rows = defaultdict(list)
    for span in timeline.spans:
        rows[span.tile[:2]].append(span)
    for span in timeline.spans:
        for wait in timeline.tiles.waits(span.tile, timeline.launches[span.launch]):
            for row_tile in range(wait.first, wait.last + 1):
                assert all(a.ready <= span.ready + STEP for a in rows[wait.phase, row_tile])

    programs_of = defaultdict(list)
    for span in timeline.spans:
        programs_of[span.launch, span.program].append(span)
    for each in programs_of.values():
        assert len({span.multiprocessor for span in each}) == 1
        assert all(a.ended <= b.began for a, b in pairwise(each))
    there = torch.cuda.get_device_properties(CUDA).multi_processor_count
    assert {span.program for span in timeline.spans} <= set(range(programs))
    assert all(0 <= span.multiprocessor < there for span in timeline.spans)


def test_a_trace_can_be_read(tmp_path):
    timeline = trace(WIDE, weights_of(WIDE), tokens_of(1, 256), torch.bfloat16, CUDA)
    print(format_summary(summary(timeline)))
    write(timeline, tmp_path / "trace.json", "a forward")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    works = [e for e in events if e["ph"] == "X" and e["cat"].startswith("work") and e["tid"]]
    assert len(works) == len(timeline.spans)
    assert all(e["dur"] >= 0 for e in works)
    assert timeline.path[0].after == "start"
    assert {step.after for step in timeline.path} <= {"start", "wait", "turn"}


def test_the_command_line_writes_one(tmp_path, capsys):
    path = tmp_path / "trace.json"
    words = "generate stories260k --random --ids --max-new-tokens 1 --device cuda --trace"
    assert cli.run([*words.split(), str(path)]) == 0
    assert "forward of 1x512 tokens, launches: 1" in capsys.readouterr().err
    assert json.loads(path.read_text())["traceEvents"]


def test_tiles_of_many_rows_have_records_of_their_own():
    """The head has more tiles than any other stage: its records lie behind all."""
    narrow = MIXED | {"head": Blocking(16, 16, 32, 3)}
    packed = pack(WIDE, weights_of(WIDE), torch.bfloat16, CUDA)
    forward = FusedForward(WIDE, packed, Shape(1, 256), narrow, traced=True)
    assert forward.tiles.phases[-1].tiles > forward.max_tiles
    forward.buffers.tokens.zero_()
    forward.run()
    assert len(timeline_of(forward).spans) == forward.tiles.tiles
