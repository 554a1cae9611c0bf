"""The learning rate of an update, by the schedules that a recipe names. A pure function."""

from __future__ import annotations

import math

from onelaunch.training.sections import OptimizerSection


def learning_rate(o: OptimizerSection, peak: float, update: int, updates: int) -> float:
    """Return the rate of update 0, 1, ... of a run of `updates`.

    First a linear warm-up to `peak`, then, by `o.schedule`:

    cosine: down along half a cosine (Loshchilov and Hutter, arXiv 1608.03983).
    wsd: `peak`, and over the last `o.decay_fraction` of the updates, or what the warm-up leaves of
        them, linearly down (warm-up, stable, decay: MiniCPM, arXiv 2404.06395).
    constant: `peak`.

    It would reach `o.min_lr_ratio` of `peak` in the update after the last, and stays there.
    """
    if update < o.warmup:
        return peak * (update + 1) / o.warmup
    low = peak * o.min_lr_ratio
    after_warmup = max(1, updates - o.warmup)
    if o.schedule == "cosine":
        progress = min(1.0, (update - o.warmup) / after_warmup)
        return low + (peak - low) * 0.5 * (1.0 + math.cos(math.pi * progress))
    if o.schedule == "wsd":
        decay = min(round(o.decay_fraction * updates), after_warmup)
        left = max(0, updates - update)
        if left < decay:
            return low + (peak - low) * left / decay
    return peak
