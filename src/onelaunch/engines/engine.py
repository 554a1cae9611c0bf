"""The protocols of an engine: logits of whole sequences, sessions that generate, steps that train.

Three protocols, small and separate; an engine has those that it can.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

from onelaunch.errors import BadInput

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from onelaunch.config import ModelConfig

Finish = Literal["stop", "length", "cancelled", "error"]
"""Why a request ended: a stop id, its number of tokens or the context, `cancel`, an error."""


STEP_SECONDS = 0.02
"""The default time limit of a session's step."""

MAX_PENALTY, MAX_BIAS, MAX_TOP_LOGPROBS = 2.0, 100.0, 20
"""Bounds of OpenAI's API: of a presence or frequency penalty and of a logit bias, either sign, and
of how many of the most likely tokens an event has."""

Bias = tuple[tuple[int, float], ...]
"""Token ids and what is added to their logits."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen from its logits.

    The logits are changed in this order, which is vLLM's:

    1. `logit_bias`, pairs of a token id and an amount from -100 to 100, no id twice, or a mapping
       from ids to amounts: the amount is added to the token's logit. -100 bans the token and 100
       all others, where logits are as close together as those of trained models.
    2. `repetition_penalty`: the logit of each token that is in the prompt or among the new tokens
       so far is divided by it where it is positive, and multiplied by it where it is negative:
       above 1 such tokens become less likely, below 1 more likely, 1 changes nothing (Keskar et al.
       2019, CTRL).
    3. `frequency_penalty` and `presence_penalty`, each from -2 to 2: of a token that is n times
       among the new tokens so far, n above 0, frequency_penalty * n + presence_penalty is
       subtracted. Tokens of the prompt do not count (OpenAI's API reference, and vLLM).

    temperature 0 then takes the most likely token. Otherwise the logits are divided by it, then
    `top_k` keeps the k most likely (0: all), `min_p` those at least `min_p` times as likely as
    the best (0: all), `top_p` the smallest set whose probability reaches it (1: all), and one of
    what is left is drawn. The same seed draws the same tokens on the same engine: a request's
    random numbers depend on the seed, its prompt and its sample number alone, not on what else is
    generated with it.

    Raises BadInput for a number out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Bias = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise BadInput(f"temperature={self.temperature}: must be 0 (greedy) or positive")
        if self.top_k < 0:
            raise BadInput(f"top_k={self.top_k}: must be 0 (all) or positive")
        if not 0.0 < self.top_p <= 1.0:
            raise BadInput(f"top_p={self.top_p}: must be above 0 and at most 1")
        if not 0.0 <= self.min_p <= 1.0:
            raise BadInput(f"min_p={self.min_p}: must be from 0 to 1")
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise BadInput(
                f"repetition_penalty={self.repetition_penalty}: must be positive and finite; "
                "1 is none"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not -MAX_PENALTY <= getattr(self, name) <= MAX_PENALTY:
                raise BadInput(
                    f"{name}={getattr(self, name)}: must be from -2 to 2; 0 changes nothing"
                )
        object.__setattr__(self, "logit_bias", bias_pairs(self.logit_bias))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalises(self) -> bool:
        """Whether there is a repetition penalty."""
        return self.repetition_penalty != 1.0

    @property
    def counts(self) -> bool:
        """Whether there is a presence or frequency penalty."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed before a token is chosen."""
        return self.penalises or self.counts or bool(self.logit_bias)


def bias_pairs(bias: Mapping[int, float] | Iterable[tuple[int, float]]) -> Bias:
    """A logit bias as pairs of a token id and an amount. Raises BadInput for what is neither a
    mapping nor pairs of such numbers, for an amount out of range, and for an id twice."""
    try:
        items = list(bias.items() if isinstance(bias, Mapping) else bias)
        pairs = tuple((token, amount) for token, amount in items)
    except (TypeError, ValueError) as error:
        raise _not_a_bias(bias) from error
    for token, amount in pairs:
        numbers = isinstance(token, Integral) and isinstance(amount, Real)
        if not numbers or isinstance(token, bool) or isinstance(amount, bool):
            raise _not_a_bias(bias)
        if not -MAX_BIAS <= amount <= MAX_BIAS:
            raise BadInput(f"logit_bias={token}: {amount} must be from -100 to 100")
    twice = [token for token, n in Counter(token for token, _ in pairs).items() if n > 1]
    if twice:
        raise BadInput(f"logit_bias={twice[0]}: this id is there twice; pass it once")
    return tuple((int(token), float(amount)) for token, amount in pairs)


def _not_a_bias(bias: object) -> BadInput:
    return BadInput(f"logit_bias={bias!r}: must map token ids to numbers, such as {{403: -100}}")


@dataclass(frozen=True, slots=True)
class Request:
    """A sequence to be continued.

    id: names it in the session's events.
    prompt_ids: its first tokens, one at least.
    max_new_tokens: it ends after so many new tokens, or before, where the model's context or the
        session's `max_len` is full. A prompt of P tokens in a context of C leaves room for
        C - P + 1 new ones, as the last one is not read back.
    sampling: how its tokens are chosen.
    stop_ids: a new token among these ends it, and is not returned.
    sample: its number among requests with an equal prompt, 0, 1, ...; each number draws another
        continuation.
    logprobs: whether its events have `logprob`.
    top_logprobs: how many of the most likely tokens its events have in `top`, 0 to 20.
    """

    id: int
    prompt_ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: Sequence[int] = ()
    sample: int = 0
    logprobs: bool = False
    top_logprobs: int = 0


class TokenEvent(NamedTuple):
    """A new token of a request, its end, or both.

    id: the request's.
    token: the new token; None where the request ends without one.
    logprob: the natural logarithm of the token's probability before bias, penalties, temperature
        and filters, where it was requested.
    finish: why the request ended; None where it goes on. The last event of a request has one.
    error: what went wrong, where finish is "error".
    top: as many of the most likely tokens as were requested, or the whole vocabulary where it is
        smaller, each with its log-probability, which is of the same kind as `logprob`: the most
        likely first, of equally likely ones the lower id. The new token may not be among them.
    """

    id: int
    token: int | None
    logprob: float | None
    finish: Finish | None = None
    error: Exception | None = None
    top: tuple[tuple[int, float], ...] = ()


class Session(Protocol):
    """Generation under way: requests join, grow together, and leave.

    A request's tokens do not depend on the others'. For one thread at a time.
    """

    def submit(self, request: Request) -> None:
        """Add a request. Where as many as the session holds at once are growing, it waits for one
        of them to end. Raises BadInput for an empty prompt, one beyond the model's context, an id
        beyond its vocabulary, there or in the logit bias, a negative number of tokens, or more top
        log-probabilities than 20."""

    def step(self, seconds: float = STEP_SECONDS) -> list[TokenEvent]:
        """Go on, and return what came of it: one or more tokens of each growing request. A request
        that joins gets its first token in a step that ends soon after it. Events of one request
        come in order. Without requests there are none, and there may be none while a long prompt is
        read. A step takes about `seconds`, or one token's time where an engine writes no more at
        once: longer ones cost a little less."""

    def cancel(self, id: int) -> None:
        """End a request; its end comes with the next step. One that has ended, or is unknown, is
        left alone."""

    def close(self) -> None:
        """End all requests, without events. The session is used no more."""


class LogitsEngine(Protocol):
    """Computes logits."""

    config: ModelConfig

    def logits(
        self,
        tokens_BS: Tensor | Sequence[Sequence[int]],
        dtype: torch.dtype | None = None,
        *,
        last: bool = False,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """Logits of every position of a batch of sequences, or of each one's last.

        `tokens_BS` is an integer tensor of token ids, (batch, sequence), on any device, or lists of
        equal length, `[[1, 403], [1, 407]]`; a single sequence is a batch of one, `tokens[None]`.
        Shorter sequences are padded behind, with any id: no position sees those after it.
        Returns a tensor (batch, sequence, vocabulary) on the engine's device, float32 unless
        `dtype` is the narrower one that the engine computes in; it is the caller's, and no later
        call changes it. Position i holds the logits of token i + 1. An empty batch or sequence
        gives an empty tensor.

        last: only the logits of each sequence's last position, (batch, vocabulary); less work than
            those of all.
        lengths: with `last`, how many tokens of each sequence count, from 1 to S; all S by
            default. The tokens after them have no effect.

        Raises BadInput for another shape, for ids that are no integers, for more positions than the
        model's context, for an id outside its vocabulary, for another dtype, for lengths that do
        not fit or come without `last`, and for the last of no position.
        """

    def describe(self) -> dict[str, Any]:
        """Engine, device, dtype, bytes of weights."""


class Engine(LogitsEngine, Protocol):
    """Runs one model on one device: logits, and sessions that generate.

    max_batch: how many sequences may well grow at once.
    """

    max_batch: int

    def session(self, max_batch: int = 1, max_len: int | None = None) -> Session:
        """Begin to generate. At most `max_batch` requests grow at once, or fewer where the engine
        has a smaller limit. Of a request `max_len` positions are kept: its prompt and its new
        tokens but the last; the model's context by default. Sessions of one engine may be open at
        the same time."""


class Mark(Protocol):
    """Called as a part of a step has been issued."""

    def __call__(self, part: str, seconds: float | None = None) -> None:
        """The time since the last call was spent on `part`; only `seconds` of it where given, and
        the rest on what is named next."""


def no_mark(part: str, seconds: float | None = None) -> None:
    """A `Mark` for who wants to know of none."""


@runtime_checkable
class LossEngine(Protocol):
    """Computes losses without logits that anyone sees."""

    def loss_sum(self, tokens_BS: Tensor, targets_BS: Tensor) -> float:
        """The loss in nats, summed over the targets that are not -1; both are (batch, sequence)
        integers."""


class TrainEngine(Engine, Protocol):
    """Computes gradients, evaluates and generates by the weights as they are: what a training loop
    drives.

    steps_at_once: whether a micro-step without a `mark` takes fewer launches than one with.
    """

    @property
    def steps_at_once(self) -> bool: ...

    def parameters(self) -> dict[str, Tensor]:
        """The float32 tensors to be updated, by canonical name; `.grad` holds their gradient."""

    def train_step(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor,
        scale: float = 1.0,
        mark: Mark = no_mark,
    ) -> Tensor:
        """One micro-step: add `scale` times the gradient of the mean loss to each parameter's
        `.grad`.

        tokens_BS, targets_BS: integers, (batch, sequence); a target of -1 does not count.
        mark: called with "forward" and "backward" as each part has been issued, with "loss" where
            the head, the loss and their backward are a part of their own, and with "stall" where
            the step had to wait for a program to be compiled.
        Returns the unscaled loss, in nats per token, as a scalar on the device.
        """

    def after_update(self) -> None:
        """The parameters have been changed: make of them what is computed with."""

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors that a resumed run needs in addition to the parameters."""

    def load_state_dict(self, tensors: Mapping[str, Tensor], version: int) -> None:
        """Put back what `state_dict` gave after `version` updates."""

    def forms(self, sequences: int, length: int) -> dict[str, Any] | None:
        """The tiles and the like of a micro-step of this shape, as JSON data with their `source`;
        other ones round otherwise. None where an engine has no choice. `describe()["forms"]` has
        those of all shapes in use."""

    def use_forms(self, saved: Any) -> bool:
        """Take the forms that an earlier `describe` had; whether they can be used here."""

    # an engine that compiles in the background while it trains has something to log here

    def log_to(self, log: Callable[[str], None]) -> None:
        """Send log lines to `log` from now on, from any thread."""

    def telemetry(self) -> dict[str, Any]:
        """Further figures of the time since the last call, for metrics.jsonl."""

    @property
    def restart_requested(self) -> bool:
        """Whether the run should go on in a fresh process."""

    def close(self) -> None:
        """End what runs in the background. The engine is used no more."""
