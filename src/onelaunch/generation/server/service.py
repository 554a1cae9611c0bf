"""What is served: a model with its tokenizer and template, its limits and defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from onelaunch import __version__
from onelaunch.checkpoints.tokenizers import Tokenizer, check_ids
from onelaunch.checkpoints.weights import LoadedModel
from onelaunch.engines.engine import Engine, Sampling
from onelaunch.errors import BadInput
from onelaunch.generation.chat import ChatTemplate, chat_template
from onelaunch.generation.conversation import end_of_turn
from onelaunch.generation.prompts import Prompt, empty_prompt
from onelaunch.generation.server.body import InvalidRequest

FINGERPRINT = f"b-onelaunch-{__version__}"
"""OpenAI's `system_fingerprint`; llama.cpp's begin with b."""
DEFAULT_CONTEXT = 8192
"""A server's context where the model's own is longer: of 100,000 positions few would be used."""


@dataclass(frozen=True)
class Limits:
    """Of a server.

    context: tokens of a prompt and its completion together.
    max_batch: sequences that grow at once. max_queue: further ones that wait; more are refused.
    max_new_tokens: the most new tokens of a sequence; None: as the context allows.
    timeout_seconds: of a request, waiting included.
    """

    context: int
    max_batch: int
    max_queue: int = 256
    max_new_tokens: int | None = None
    timeout_seconds: float = 600.0


@dataclass(frozen=True)
class Service:
    """A model to be served.

    name: the model's id in the API. defaults: of requests that do not say how to sample. seed: of
    requests without one; None: a random one each. stop_ids: tokens that end a sequence;
    chat_stop_ids, chat_stop: tokens and strings that end an answer in a chat.
    """

    engine: Engine
    model: LoadedModel
    tokenizer: Tokenizer
    template: ChatTemplate
    name: str
    limits: Limits
    defaults: Sampling
    seed: int | None
    stop_ids: Sequence[int]
    chat_stop_ids: Sequence[int]
    chat_stop: Sequence[str]
    _token_texts: dict[int, str] = field(default_factory=dict, repr=False, compare=False)

    def encode(self, text: str) -> Prompt:
        """A text prompt, BOS included where the tokenizer has it; raises InvalidRequest."""
        try:
            if not text:
                return empty_prompt(self.model, self.tokenizer)
            ids = self.tokenizer.encode(text)
            check_ids(self.tokenizer, ids, self.engine.config, "prompt")
        except BadInput as error:
            raise InvalidRequest(str(error), "prompt") from None
        return Prompt(text, ids, int(ids[:1] == [self.tokenizer.bos_id]))

    def check_prompt(self, ids: Sequence[int], name: str) -> None:
        """Raise InvalidRequest for a prompt without a token, with ids outside the vocabulary, or
        without room for a completion."""
        rows, context = self.engine.config.vocab_size, self.limits.context
        if not ids:
            raise InvalidRequest(f"{name}: is empty", name)
        wrong = next((i for i in ids if not 0 <= i < rows), None)
        if wrong is not None:
            raise InvalidRequest(
                f"{name}: id {wrong} is outside the model's vocabulary of {rows}", name
            )
        if len(ids) >= context:
            raise InvalidRequest(
                f"the request exceeds the available context size: {len(ids)} tokens of a context "
                f"of {context}, which holds the completion too; shorten the prompt",
                name,
                kind="exceed_context_size_error",
                code="context_length_exceeded",
                n_prompt_tokens=len(ids),
                n_ctx=context,
            )

    def token_text(self, token: int) -> str:
        """The text of a token within a text."""
        known = self._token_texts.get(token)
        if known is None:
            known = self._token_texts[token] = self.text_within([token])
        return known

    def text_within(self, ids: Sequence[int]) -> str:
        """The text of tokens behind another one: the first of a text loses its space in some
        tokenizers."""
        stream = self.tokenizer.decoder()
        for id_ in self.tokenizer.encode("a", bos=False):
            stream.push(id_)
        return "".join(map(stream.push, ids)) + stream.finish()


def make_service(
    model: LoadedModel,
    engine: Engine,
    tokenizer: Tokenizer,
    limits: Limits,
    *,
    name: str | None = None,
    template: str | None = None,
    defaults: Sampling | None = None,
    seed: int | None = None,
) -> Service:
    """A service of a model. A `max_batch` of 0, or beyond the engine's own, is as many sequences
    as the engine can grow at once; a `context` of 0 is the model's, at most `DEFAULT_CONTEXT`.

    Raises BadInput for a context beyond the model's, and for a template that cannot be used.
    """
    longest = model.config.max_seq_len
    if limits.context > longest:
        raise BadInput(f"context={limits.context}: the model's context is {longest}")
    chat, _ = chat_template(model, tokenizer)
    if template is not None:
        chat = ChatTemplate(template, chat.bos_token, chat.eos_token)
    limits = replace(
        limits,
        context=limits.context or min(longest, DEFAULT_CONTEXT),
        max_batch=min(limits.max_batch or engine.max_batch, engine.max_batch),
    )
    turn_ids, turn_texts = end_of_turn(chat, tokenizer)
    rows = model.config.vocab_size
    stop_ids = sorted(i for i in {*model.stop_ids, *tokenizer.stop_ids} if i < rows)
    return Service(
        engine,
        model,
        tokenizer,
        chat,
        name or (model.source.stem if model.source else "model"),
        limits,
        defaults or Sampling(temperature=1.0),
        seed,
        stop_ids,
        sorted({*stop_ids, *(i for i in turn_ids if i < rows)}),
        turn_texts,
    )
