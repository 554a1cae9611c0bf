"""What every engine offers, and how text is sampled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from onelaunch.errors import BadInput

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from onelaunch.config import ModelConfig

OnToken = Callable[[int, int], None]
"""Called with (index of the prompt, new token id) as each token is chosen. Texts that grow together
come in turns; each text's own tokens come in order."""

OnEnd = Callable[[int], None]
"""Called with the index of a prompt whose text is complete, after its last token."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen from its logits.

    temperature 0 takes the most likely token. Otherwise the logits are divided by it, then
    `top_k` keeps the k most likely (0: all), `min_p` those at least `min_p` times as likely as
    the best (0: all), `top_p` the smallest set whose probability reaches it (1: all), and one of
    what is left is drawn. The same seed draws the same tokens on the same engine.

    A sequence's draws depend on the seed and its prompt alone, not on what else is generated with
    it. Equal prompts of one call are samples of it: the first is what the prompt alone gives, the
    second another, and so on, each the same wherever it stands among other prompts.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise BadInput(f"temperature={self.temperature}: must be 0 (greedy) or positive")
        if self.top_k < 0:
            raise BadInput(f"top_k={self.top_k}: must be 0 (all) or positive")
        if not 0.0 < self.top_p <= 1.0:
            raise BadInput(f"top_p={self.top_p}: must be above 0 and at most 1")
        if not 0.0 <= self.min_p <= 1.0:
            raise BadInput(f"min_p={self.min_p}: must be from 0 to 1")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


class Engine(Protocol):
    """Runs one model on one device."""

    config: ModelConfig

    def logits(
        self,
        tokens_BS: Tensor | Sequence[Sequence[int]],
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Logits of every position of a batch of sequences.

        `tokens_BS` is an integer tensor of token ids, (batch, sequence), on any device, or lists of
        equal length, `[[1, 403], [1, 407]]`; a single sequence is a batch of one, `tokens[None]`.
        Shorter sequences are padded behind, with any id: no position sees those after it.
        Returns a tensor (batch, sequence, vocabulary) on the engine's device, float32 unless
        `dtype` is the narrower one that the engine computes in; it is the caller's, and no later
        call changes it. Position i holds the logits of token i + 1. An empty batch or sequence
        gives an empty tensor.

        Raises BadInput for another shape, for ids that are no integers, for more positions than the
        model's context, for an id outside its vocabulary, and for another dtype.
        """

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        on_token: OnToken | None = None,
        stop: Sequence[int] = (),
        on_end: OnEnd | None = None,
    ) -> list[list[int]]:
        """Continue each prompt (token ids, at least one) by up to `n` tokens.

        Returns the new ids per prompt, without the stop id that ended it. A text also ends where
        the model's context is full. Raises BadInput for an empty prompt, one beyond the context,
        or an id beyond the vocabulary.
        """

    def describe(self) -> dict[str, Any]:
        """Engine, device, dtype, bytes of weights."""


class TrainableEngine(Engine, Protocol):
    """An engine that also gives gradients."""

    def parameters(self) -> dict[str, Tensor]:
        """The float32 tensors to be updated, by canonical name; `.grad` holds their gradient."""

    def loss_and_gradients(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor,
        scale: float = 1.0,
        mark: Callable[[str], None] = lambda part: None,
    ) -> Tensor:
        """Add `scale` times the gradient of the mean loss to each parameter's `.grad`.

        Returns the unscaled loss as a scalar on the device. Calls `mark("forward")` and
        `mark("backward")` as each part has been issued, and `mark("stall")` where it had to wait
        for a program to be compiled.
        """

    def say_to(self, say: Callable[[str], None]) -> None:
        """Where lines for people go from now on, from any thread."""

    def updated(self) -> None:
        """The parameters were changed."""

    def telemetry(self) -> dict[str, Any]:
        """What else there is to tell of the time since it was last asked."""

    def state_tensors(self) -> dict[str, Tensor]:
        """What a resume needs beside the parameters."""

    def load_state_tensors(self, tensors: Mapping[str, Tensor], version: int) -> None:
        """The inverse, after so many updates."""

    @property
    def spent(self) -> bool:
        """Whether a fresh process should go on from here."""

    def close(self) -> None:
        """Nothing more is asked of it."""
