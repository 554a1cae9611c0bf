"""Micro-steps in two forms on a device, as CUDA graphs, timed in turn."""

from __future__ import annotations

import torch
from torch import Tensor

from onelaunch.compilation.background import in_a_line
from onelaunch.engines.cuda.training.forms import TrainingForms
from onelaunch.engines.cuda.training.step import CapturedStep, TrainingStep
from onelaunch.engines.cuda.training.tuning.search import Comparison, comparison_of
from onelaunch.engines.cuda.tuning.timer import replay_us
from onelaunch.errors import RunFailed

SLICE_US = 10_000.0
"""What one sample takes, one micro-step at least."""
SAMPLES = 15
HOPELESS, FIRST_LOOK = 1.25, 3
"""A candidate that takes so much more than the best is left after so many samples."""
MOST_APART, NUMBERS_COMPARED = 0.05, 1 << 20
"""Forms whose gradients are further than that from the first's, in some of their numbers, are
wrong."""


class Timer:
    """Compares two forms of a micro-step, see `Compare`, whose batch has been loaded. The first
    that it sees must be right. Raises RunFailed where the better one, or nothing more, runs."""

    def __init__(self, step: TrainingStep, gradients_M: Tensor) -> None:
        self._step, self._gradients_M = step, gradients_M
        self._every = -(-gradients_M.numel() // NUMBERS_COMPARED)
        self._expected: Tensor | None = None
        self._captured: dict[TrainingForms, CapturedStep] = {}

    def __call__(self, best: TrainingForms, candidate: TrainingForms) -> Comparison | str:
        both = best, candidate
        # the others' memory goes before the next is made
        self._captured = {forms: self._captured[forms] for forms in both if forms in self._captured}
        for forms in both:
            if reason := self._capture(forms):
                if forms == best:
                    raise RunFailed(f"a training step does not run here: {reason}")
                return reason
        graphs = [self._captured[forms].graph for forms in both]
        counts = [max(1, int(SLICE_US / replay_us(graph, 1))) for graph in graphs]
        pairs: list[tuple[float, float]] = []
        while len(pairs) < SAMPLES:
            best_us, us = (replay_us(graph, n) for graph, n in zip(graphs, counts, strict=True))
            pairs.append((best_us, us))
            if len(pairs) == FIRST_LOOK and min(us for _, us in pairs) > HOPELESS * best_us:
                break
        return comparison_of(pairs)

    def _capture(self, forms: TrainingForms) -> str | None:
        """Capture a micro-step in these forms, unless it is there; returns why that failed."""
        if forms in self._captured:
            return None
        try:
            self._gradients_M.zero_()
            captured = self._step.capture(forms)
            captured.graph.replay()
            gradients = self._gradients_M[:: self._every].clone()
            torch.cuda.synchronize()
        except Exception as error:  # too much shared memory, too little memory, a compiler's error
            self._check_device(error)
            torch.cuda.empty_cache()
            return in_a_line(error)
        if self._expected is None:
            self._expected = gradients
        apart = float((gradients - self._expected).norm() / self._expected.norm())
        if not apart < MOST_APART:
            return f"its gradients are {apart:.1%} from the rule's"
        self._captured[forms] = captured
        return None

    def _check_device(self, error: Exception) -> None:
        """Raise RunFailed where nothing will run any more."""
        try:
            torch.cuda.synchronize()
        except RuntimeError as gone:
            raise RunFailed(f"a training step broke the device: {in_a_line(error)}") from gone
