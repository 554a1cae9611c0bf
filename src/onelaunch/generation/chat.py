"""Chat templates: messages to the text that a model was trained to continue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from onelaunch.checkpoints.tokenizers import Tokenizer
from onelaunch.checkpoints.weights import LoadedModel
from onelaunch.errors import BadInput, MissingExtra

CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}
"""
"""The ChatML template, for models that have none."""

# The longest on the Hub have some 30,000 characters.
MAX_SOURCE = 1 << 18
_LONGEST_REASON = 300
_PROBE = "onelaunch-probe"


class ChatTemplate:
    """A chat template in Jinja, as transformers renders it.

    Templates of models are not trusted: they are rendered in Jinja's sandbox, and those that loop
    for too long or write too much end with BadInput.
    """

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "") -> None:
        """Raises BadInput if `source` does not compile, MissingExtra without jinja2."""
        try:
            import jinja2
        except ImportError:
            raise MissingExtra("jinja2", "serve", "a chat template") from None
        from onelaunch.generation.sandbox import compile_template

        self.source, self.bos_token, self.eos_token = source, bos_token, eos_token
        if len(source) > MAX_SOURCE:
            raise BadInput(f"the chat template has more than {MAX_SOURCE} characters")
        try:
            self._template = compile_template(source)
        except jinja2.TemplateSyntaxError as error:
            reason = f"line {error.lineno}: {error.message}"
            raise BadInput(f"the chat template does not compile: {_short(reason)}") from error
        except (RecursionError, SyntaxError, ValueError, MemoryError) as error:
            # the compiler writes Python, which refuses, for one, deep nesting
            raise BadInput(f"the chat template does not compile: {_short(error)}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation.

        messages: each with a "role", such as "user", and its "content": a string, or a list of
            parts {"type": "text", "text": ...}. Keys whose value is None count as missing.
        add_generation_prompt: end with the beginning of the assistant's answer.
        tools, variables: what else the template may use, such as the functions that the model may
            call, or enable_thinking=False.

        Raises BadInput for messages of another form, or that the template refuses or fails on.
        """
        return self._render(
            [self._with_content(message) for message in _checked(messages)],
            {"tools": tools, "add_generation_prompt": add_generation_prompt, **variables},
        )

    def _render(self, messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
        from onelaunch.generation.sandbox import Refusal, TooMuch, render_bounded

        tokens = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        try:
            plain = _plain({**tokens, "documents": None, **variables, "messages": messages})
            return render_bounded(self._template, plain)
        except BadInput:
            raise
        except Refusal as error:
            reason = f"refuses these messages: {_short(error)}"
        except TooMuch as error:
            reason = f"was stopped: {_short(error)}"
        except Exception as error:  # of any kind: it is the template's code that runs
            reason = f"fails on these messages: {_short(error) or type(error).__name__}"
        raise BadInput(f"the chat template {reason}")

    def _with_content(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message with its content in the form that the template reads."""
        content = message.get("content")
        if isinstance(content, str) and self._reads_parts_only:
            return {**message, "content": [{"type": "text", "text": content}]}
        if isinstance(content, list) and not self._reads_parts:
            return {**message, "content": "\n".join(part["text"] for part in content)}
        return message

    @cached_property
    def _reads_parts(self) -> bool:
        """Whether the template reads a list of parts: those written for strings alone fail on one,
        or write it as Python does."""
        text = self._probe([{"type": "text", "text": _PROBE}])
        return _PROBE in text and "'type'" not in text and '"type"' not in text

    @cached_property
    def _reads_parts_only(self) -> bool:
        if "text" not in self.source:
            return False  # it does not read parts
        return self._reads_parts and _PROBE not in self._probe(_PROBE)

    def _probe(self, content: Any) -> str:
        try:
            return self._render(
                [{"role": "user", "content": content}],
                {"tools": None, "add_generation_prompt": False},
            )
        except BadInput:
            return ""


def chat_template(checkpoint: LoadedModel, tokenizer: Tokenizer) -> tuple[ChatTemplate, bool]:
    """The chat template of a model and whether it is its own: ChatML for models without one.

    Raises as ChatTemplate, naming the model.
    """
    own = checkpoint.chat_template
    bos, eos = (_special_text(tokenizer, i) for i in (tokenizer.bos_id, tokenizer.eos_id))
    try:
        return ChatTemplate(CHATML if own is None else own, bos, eos), own is not None
    except BadInput as error:
        raise BadInput(f"{checkpoint.source or 'the model'}: {error}") from error


def _special_text(tokenizer: Tokenizer, token: int | None) -> str:
    return next((text for text, i in tokenizer.special_tokens.items() if i == token), "")


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages without the keys whose value is None. Raises BadInput for what is no message."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise BadInput("messages: must be a list of one message or more")
    checked = []
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise BadInput(f"{name}: must have a role and a content")
        content = message.get("content")
        if isinstance(content, list | tuple):
            _check_parts(content, name)
        elif not (content is None or isinstance(content, str)):
            raise BadInput(f"{name}: its content must be a text or a list of parts")
        checked.append({key: value for key, value in message.items() if value is not None})
        if isinstance(content, tuple):
            checked[-1]["content"] = list(content)
    return checked


def _check_parts(parts: Sequence[Any], name: str) -> None:
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            shown = repr(kind) if isinstance(kind, str) else "without a type"
            raise BadInput(f"{name}: a part of its content is {shown}: only text is supported")


def _plain(value: Any) -> Any:
    """A copy of plain data: no methods of other classes within a template's reach."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise BadInput(f"a value of type {type(value).__name__}: must be plain data, as in JSON")


def _short(reason: object) -> str:
    text = " ".join(str(reason).split())
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."
