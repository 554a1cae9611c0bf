"""Samples of text during training, drawn from the weights as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing

from onelaunch.checkpoints.tokenizers import Tokenizer, check_ids
from onelaunch.config import ModelConfig
from onelaunch.engines.engine import Engine, Request, Sampling
from onelaunch.errors import BadInput

SAMPLING = Sampling(temperature=0.8, seed=0)


def encode_prompt(prompt: str, tokenizer: Tokenizer, config: ModelConfig) -> list[int]:
    """Encode `eval.prompt`; an empty one is BOS, or else EOS, and no id if there is neither.

    Raises BadInput if it exceeds the model's context or has an id outside its vocabulary.
    """
    if not prompt:
        starts = (tokenizer.bos_id, tokenizer.eos_id)
        return [token for token in starts if token is not None][:1]
    ids = tokenizer.encode(prompt)
    if len(ids) > config.max_seq_len:
        raise BadInput(
            f"eval.prompt has {len(ids)} tokens, more than the model's context of "
            f"{config.max_seq_len}; shorten it"
        )
    check_ids(tokenizer, ids, config, "eval.prompt")
    return ids


def draw_sample(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    n: int,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[str, int] | None:
    """Continue a prompt by at most `n` tokens: up to a stop id, or where the context is full.

    Returns the text and its number of tokens; None if `stop`, which is polled before each step of
    the session, ended it. The same weights draw the same text, and training's random numbers are
    not used.
    """
    request = Request(0, prompt_ids, n, SAMPLING, tokenizer.stop_ids)
    stream = tokenizer.decoder()
    for token in prompt_ids:  # the new text continues the prompt
        stream.push(token)
    pieces: list[str] = []
    ended = False
    max_len = min(len(prompt_ids) + n, engine.config.max_seq_len)
    with closing(engine.session(1, max_len)) as session:
        session.submit(request)
        while not ended:
            if stop():
                return None
            for event in session.step():
                if event.token is not None:
                    pieces.append(stream.push(event.token))
                ended = ended or event.finish is not None
    return "".join([*pieces, stream.finish()]), len(pieces)
