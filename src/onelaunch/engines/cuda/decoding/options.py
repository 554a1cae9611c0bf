"""Options of a request that the kernels do not have: PyTorch writes its tokens."""

from __future__ import annotations

from collections.abc import Callable

from onelaunch.config import ModelConfig
from onelaunch.engines.checks import check_request
from onelaunch.engines.cuda.decoding.split import Split
from onelaunch.engines.engine import STEP_SECONDS, Request, Session, TokenEvent
from onelaunch.errors import BadInput


def without_kernel(request: Request) -> str | None:
    """The first option of a request that the kernels do not have, as Python writes it."""
    sampling = request.sampling
    values = {
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "logit_bias": dict(sampling.logit_bias),
        "top_logprobs": request.top_logprobs,
    }
    return next((f"{name}={value}" for name, value in values.items() if value), None)


def check_kernels(request: Request) -> None:
    """Raise BadInput for an option that the kernels do not have."""
    if option := without_kernel(request):
        raise BadInput(
            f"{option}: the CUDA kernels do not have it; with fusion_depth='auto' PyTorch generates"
        )


class OptionsByPyTorch:
    """A `Session` of requests that `session` writes, by kernels, but for those with an option that
    they do not have: PyTorch's session writes these, made by `other` for the first of them."""

    def __init__(self, config: ModelConfig, session: Session, other: Callable[[], Session]) -> None:
        self._config, self._sessions = config, Split(session, other)

    def submit(self, request: Request) -> None:
        """Add a request; see `Session`."""
        check_request(self._config, request)
        if without_kernel(request):
            self._sessions.submit_to_other(request)
        else:
            self._sessions.submit(request)

    def step(self, seconds: float = STEP_SECONDS) -> list[TokenEvent]:
        """Go on for so many seconds; see `Session`. PyTorch writes one token of each of its
        requests."""
        return self._sessions.step(seconds)

    def cancel(self, id: int) -> None:
        """End a request; see `Session`."""
        self._sessions.cancel(id)

    def close(self) -> None:
        """End all requests."""
        self._sessions.close()
