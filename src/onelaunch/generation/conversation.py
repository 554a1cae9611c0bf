"""Conversations: what a model reads of one, where its answer ends, and what fits its context."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onelaunch.checkpoints.tokenizers import Tokenizer, check_ids
from onelaunch.checkpoints.weights import LoadedModel
from onelaunch.config import ModelConfig
from onelaunch.errors import BadInput
from onelaunch.generation.chat import CHATML, ChatTemplate, chat_template
from onelaunch.generation.prompts import Prompt, prompt_ids

ANSWER_TOKENS = 1024
"""An answer ends after so many tokens where no other number is passed."""

_PROBE = "onelaunch-probe"
_OWN_VARIABLES = {"self", "messages", "tools", "add_generation_prompt"}
_TAG = re.compile(r"<[^\s<>]+>|\[[^\s\[\]]+\]")


@dataclass(frozen=True)
class ChatFormat:
    """How a model converses.

    is_own: whether the template is the model's own; else it is ChatML.
    stop_ids, stop: the special token, or else the string, that ends a turn in the template.
    """

    template: ChatTemplate
    is_own: bool
    tokenizer: Tokenizer
    config: ModelConfig
    stop_ids: tuple[int, ...]
    stop: tuple[str, ...]

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """Encode a conversation, up to the beginning of the answer. Raises as
        `ChatTemplate.render`, and BadInput for ids outside the model's vocabulary. `variables`
        are others of the template."""
        variables = dict(variables or {})
        for name in _OWN_VARIABLES & variables.keys():
            raise BadInput(f"variables: {name!r} is not one to be set here")
        text = self.template.render(messages, tools=tools, **variables)
        ids = prompt_ids(self.tokenizer, text)
        check_ids(self.tokenizer, ids, self.config, "the conversation")
        return Prompt(text, ids)


def chat_format(checkpoint: LoadedModel, tokenizer: Tokenizer) -> ChatFormat:
    """How a model converses: by its own template, or ChatML. Raises as `chat_template`."""
    template, is_own = chat_template(checkpoint, tokenizer)
    stop_ids, stop = end_of_turn(template, tokenizer)
    return ChatFormat(template, is_own, tokenizer, checkpoint.config, stop_ids, stop)


def end_of_turn(
    template: ChatTemplate, tokenizer: Tokenizer
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the special token that a template writes after an answer, or else the string, where
    it is a tag such as <|im_end|>; neither where it writes none."""
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": _PROBE},
    ]
    try:
        text = template.render(messages, add_generation_prompt=False)
    except BadInput:
        return (), ()
    end = text.rpartition(_PROBE)[2].lstrip() if _PROBE in text else ""
    special = [token for token in tokenizer.special_tokens if end.startswith(token)]
    if special:
        return (tokenizer.special_tokens[max(special, key=len)],), ()
    tag = _TAG.match(end)
    if tag is None:
        return (), ()
    # a model that was not trained on ChatML may begin the next turn without ending its own
    return (), (tag[0], "<|im_start|>") if template.source == CHATML else (tag[0],)


class Conversation:
    """The messages of a conversation, as many as fit the model's context.

    max_new_tokens: of an answer; so much room is left for it, but at most a quarter of the context.
    system: the system message; "" for none.
    """

    def __init__(self, chat: ChatFormat, max_new_tokens: int, system: str = "") -> None:
        """Raises BadInput as `set_system`."""
        self._chat = chat
        self._context = chat.config.max_seq_len
        self._longest = self._context - min(max_new_tokens, self._context // 4)
        self._system: list[dict[str, str]] = []
        self._turns: list[dict[str, str]] = []
        self.set_system(system)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The messages, the system message first."""
        return [*self._system, *self._turns]

    def reset(self) -> None:
        """Forget all messages but the system message."""
        self._turns.clear()

    def set_system(self, text: str) -> None:
        """Replace the system message, or remove it; the turns stay. Raises BadInput, and changes
        nothing, where the template has none or it does not fit the context."""
        system = [{"role": "system", "content": text}] if text else []
        self._check_length([*system, {"role": "user", "content": ""}])
        self._system = system

    def ask(self, text: str) -> int:
        """Add a message of the user. Where the context is full the oldest turns are dropped;
        returns how many. Raises BadInput, and adds nothing, if it does not fit on its own."""
        message = {"role": "user", "content": text}
        self._check_length([*self._system, message])
        self._turns.append(message)
        dropped = 0
        while len(self._turns) > 1 and self._length(self.messages) > self._longest:
            next_turn = [m["role"] for m in self._turns].index("user", 1)
            del self._turns[:next_turn]
            dropped += 1
        return dropped

    def answer(self, text: str) -> None:
        """Add the model's answer."""
        self._turns.append({"role": "assistant", "content": text})

    def withdraw(self) -> None:
        """Remove the last message of the user, to which there is no answer."""
        self._turns.pop()

    def _length(self, messages: list[dict[str, str]]) -> int:
        return len(self._chat.prompt(messages).ids)

    def _check_length(self, messages: list[dict[str, str]]) -> None:
        length = self._length(messages)
        if length > self._context:
            what = "the message" if len(messages) == 1 else "the message with the system message"
            raise BadInput(
                f"{what} has {length} tokens in the chat template, the model's context holds "
                f"{self._context}; shorten it"
            )
