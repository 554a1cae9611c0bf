"""The pinned buffers that ids are copied through, with made-up events and memory."""

from __future__ import annotations

import pytest
import torch

from onelaunch.engines.cuda.staging import LEAST_IDS, Staging


class Event:
    done = True

    def query(self):
        return Event.done


@pytest.fixture
def made(monkeypatch):
    """Sizes of the buffers that are made."""
    sizes = []

    def empty(n, **options):
        assert options.pop("pin_memory")
        sizes.append(n)
        return torch.zeros(n, **options)

    Event.done = True
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr("onelaunch.engines.cuda.staging.torch.empty", empty)
    return sizes


def use(staging, n):
    event, buffer = staging._free(n)
    assert len(buffer) >= n
    staging._buffers.append((event, buffer))
    return buffer


def test_a_buffer_whose_copy_has_ended_is_used_again(made):
    staging = Staging()
    first = use(staging, 100)
    assert all(use(staging, n) is first for n in (1, 100, LEAST_IDS))
    assert made == [LEAST_IDS]


def test_a_buffer_that_is_still_read_is_not_touched(made):
    staging = Staging()
    Event.done = False
    assert len({id(use(staging, 10)) for _ in range(5)}) == 5
    Event.done = True
    assert len({id(use(staging, 10)) for _ in range(20)}) == 5
    assert len(made) == 5


def test_longer_ids_after_shorter_ones_do_not_pile_up(made):
    staging = Staging()
    for n in (10, 1000, *[1000] * 50, 10, 2000, *[2000] * 50):
        use(staging, n)
    assert made == [LEAST_IDS, 1000, 2000]
    assert len(staging._buffers) == 1


def test_ids_that_are_there_already_are_not_copied():
    ids = torch.arange(5)
    assert Staging().on_device(ids, ids.device) is ids
    assert Staging().on_device(ids.to(torch.int32), ids.device).dtype == torch.int64
