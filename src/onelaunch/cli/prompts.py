"""Read the argument of `--prompt`: a text, a file, or standard input."""

from __future__ import annotations

import codecs
import sys

from onelaunch.errors import BadInput

# Far more text than any context holds; a prompt beyond it is a mistake, such as @/dev/zero.
_LARGEST_PROMPT = 64 << 20


def read_prompts(prompts: list[str]) -> list[str]:
    """Read the text of each --prompt. Raises BadInput for one that cannot be read."""
    if prompts.count("-") > 1:
        raise BadInput("--prompt -: standard input can be read once only")
    return [_read_prompt(prompt) for prompt in prompts]


def _read_prompt(prompt: str) -> str:
    if prompt == "-":
        return _decode(sys.stdin.buffer.read(_LARGEST_PROMPT + 1), "--prompt - (standard input)")
    if prompt.startswith("@"):
        try:
            with open(prompt[1:], "rb") as file:
                return _decode(file.read(_LARGEST_PROMPT + 1), f"--prompt {prompt}")
        except (OSError, ValueError) as error:
            if isinstance(error, BadInput):
                raise
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise BadInput(
                f"--prompt {prompt}: cannot read the file: {reason} "
                "(a text that begins with @ can come from standard input: --prompt -)"
            ) from error
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise BadInput("--prompt: the text is not UTF-8") from None
    return prompt


def _decode(raw: bytes, name: str) -> str:
    """UTF-8 text without a byte order mark and one final line end, which editors add."""
    if len(raw) > _LARGEST_PROMPT:
        raise BadInput(f"{name}: more than {_LARGEST_PROMPT >> 20} MiB; no context holds so much")
    from onelaunch.checkpoints.lfs import refuse_pointer

    refuse_pointer(name, raw)
    try:
        text = raw.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{name}: not UTF-8 text (byte {error.start})") from None
    return text.removesuffix("\n").removesuffix("\r")
