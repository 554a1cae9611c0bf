"""The server's counters, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onelaunch.generation.server.batcher import Batcher
from onelaunch.generation.server.running import Choice


@dataclass
class Metrics:
    """Totals since the start. Seconds of a prompt include waiting for a slot."""

    requests: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    prompt_seconds: float = 0.0
    new_seconds: float = 0.0

    def count(self, choices: Sequence[Choice]) -> None:
        """Add a job that has ended, by its end or before."""
        for choice in choices:
            self.prompt_tokens += len(choice.prompt.ids)
            self.new_tokens += len(choice.tokens)
            self.prompt_seconds += choice.first_token
            self.new_seconds += max(choice.seconds - choice.first_token, 0.0)

    def text(self, batcher: Batcher) -> str:
        """The exposition, version 0.0.4."""
        busy = sum(slot is not None for slot in batcher.slots)
        rate = self.new_tokens / self.new_seconds if self.new_seconds else 0.0
        rows = (
            ("requests_total", "counter", "Requests for text", self.requests),
            ("requests_failed_total", "counter", "Of these, ended by an error", self.failed),
            ("prompt_tokens_total", "counter", "Tokens of prompts", self.prompt_tokens),
            ("tokens_predicted_total", "counter", "New tokens", self.new_tokens),
            ("prompt_seconds_total", "counter", "Until first tokens", self.prompt_seconds),
            ("tokens_predicted_seconds_total", "counter", "After them", self.new_seconds),
            ("predicted_tokens_seconds", "gauge", "New tokens per second and sequence", rate),
            ("requests_processing", "gauge", "Sequences that grow", busy),
            ("requests_deferred", "gauge", "Sequences that wait", batcher.waiting),
            ("slots", "gauge", "Sequences that can grow at once", batcher.max_batch),
        )
        return "".join(
            f"# HELP onelaunch_{name} {about}.\n# TYPE onelaunch_{name} {kind}\n"
            f"onelaunch_{name} {value:.9g}\n"
            for name, kind, about, value in rows
        )
