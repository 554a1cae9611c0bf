"""The session of `onelaunch chat`: lines in, answers out, commands."""

from __future__ import annotations

import codecs
import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING

from onelaunch.cli.common import log
from onelaunch.errors import BadInput

if TYPE_CHECKING:
    from onelaunch.api import LanguageModel
    from onelaunch.generation.decode import Completion
    from onelaunch.generation.options import GenerateOptions

HELP = """\
/system TEXT  replace the system message; without TEXT, remove it
/reset        forget the conversation, but not the system message
/help         show this
/exit         leave, as ctrl-D does, and ctrl-C in an empty line
Ctrl-C ends an answer. A line that begins with a space is a message, also before a /."""

_PROMPT = "> "
# Far more than any context holds; such a line is a mistake, as /dev/zero is.
_LONGEST_LINE = 16 << 20


class Notices:
    """Lines for standard error, held back while an answer or a line is being written."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self._held: list[str] | None = None

    def __call__(self, line: str) -> None:
        if self._held is None:
            log(line, self.quiet)
        else:
            self._held.append(line)

    def hold(self) -> None:
        """Print what is held back, and hold back what comes from now on."""
        held, self._held = self._held or [], []
        for line in held:
            log(line, self.quiet)


class ChatSession:
    """A conversation by lines: of a terminal, edited and with a history, or of any other input."""

    def __init__(
        self, model: LanguageModel, options: GenerateOptions, system: str, notices: Notices
    ) -> None:
        """Make the engine and the conversation; raises BadInput for what cannot be used."""
        from onelaunch.generation.conversation import Conversation

        self._model, self._options, self._notices = model, options, notices
        self._interactive = sys.stdin.isatty()
        chat = model.chat_format
        self._conversation = Conversation(chat, options["max_new_tokens"], system)
        if not chat.is_own:
            notices("note: the model has no chat template; ChatML is used, which it may not know")
        model.engine  # noqa: B018
        if self._interactive:
            notices("each line is a message; /help lists commands")

    def run(self) -> None:
        """Answer each line, until /exit or the end of the input.

        Raises BadInput for a message that cannot be answered, unless a terminal is there to try
        again.
        """
        lines = _typed_lines() if self._interactive else _lines()
        self._notices.hold()
        try:
            for line in lines:
                if line.rstrip() == "/exit":
                    break
                try:
                    with _interrupts(self._interactive) as interrupted:
                        self._take(line, interrupted)
                except BadInput as error:
                    if not self._interactive:
                        raise
                    log(f"onelaunch: {error}")
                self._notices.hold()
        finally:
            self._notices.hold()

    def _take(self, line: str, interrupted: Callable[[], bool]) -> None:
        if line.startswith("/"):
            self._command(*line.rstrip().partition(" ")[::2])
        elif line.strip():
            self._answer(line.strip(), interrupted)

    def _command(self, name: str, argument: str) -> None:
        if name == "/system":
            self._conversation.set_system(argument.strip())
        elif name == "/reset":
            self._conversation.reset()
        elif name == "/help":
            log(HELP)
        else:
            raise BadInput(f"{name}: no such command; /help lists them")

    def _answer(self, text: str, interrupted: Callable[[], bool]) -> None:
        conversation = self._conversation
        if dropped := conversation.ask(text):
            log(
                f"the context of {self._model.config.max_seq_len} tokens is full: dropped the "
                f"oldest {f'{dropped} turns' if dropped > 1 else 'turn'}",
                self._notices.quiet,
            )
        try:
            completion, answer = self._write_answer(interrupted)
        except BaseException:
            conversation.withdraw()
            raise
        if answer or completion.finish is not None:
            conversation.answer(answer)
        else:
            conversation.withdraw()
        if completion.finish == "length":
            full = len(completion.ids) < self._options["max_new_tokens"]
            limit = "the model's context" if full else "--max-new-tokens"
            log(f"the answer was cut off by {limit}", self._notices.quiet)

    def _write_answer(self, interrupted: Callable[[], bool]) -> tuple[Completion, str]:
        """Generate and print an answer; ends early when interrupted."""
        decoding = self._model.decode_chat(self._conversation.messages, **self._options)
        pieces = []
        with closing(decoding):
            for event in decoding:
                if event.text:
                    pieces.append(event.text)
                    sys.stdout.write(event.text)
                    sys.stdout.flush()
                if interrupted():
                    break
        sys.stdout.write("\n")
        sys.stdout.flush()
        return decoding.completions[0], "".join(pieces)


@contextlib.contextmanager
def _interrupts(interactive: bool) -> Iterator[Callable[[], bool]]:
    """Give a function that says whether ctrl-C was pressed. The first does not interrupt what is
    running, so that no engine is left in the middle of a step; the second ends the program."""
    pressed = threading.Event()

    def handler(number: int, frame: object) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    if not interactive or threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _typed_lines() -> Iterator[str]:
    """The lines that are typed at a prompt, until ctrl-D, or ctrl-C in an empty line."""
    try:
        import readline
    except ImportError:  # not on Windows; the terminal edits a line itself
        readline = None  # type: ignore[assignment]
    while True:
        try:
            yield _typed_line()
        except UnicodeDecodeError:
            log("onelaunch: the line is not UTF-8")
        except EOFError:
            log("")
            return
        except KeyboardInterrupt:
            log("")
            if readline is None or not readline.get_line_buffer():
                return


def _typed_line() -> str:
    if sys.stdout.isatty():
        return input(_PROMPT)
    # the answers go elsewhere: the prompt must not
    with contextlib.suppress(OSError):
        print(_PROMPT, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _lines() -> Iterator[str]:
    """The lines of standard input. Raises BadInput for one that is not UTF-8."""
    read = sys.stdin.buffer.readline
    for number, raw in enumerate(iter(lambda: read(_LONGEST_LINE + 1), b""), start=1):
        name = f"standard input, line {number}"
        if len(raw) > _LONGEST_LINE:
            raise BadInput(f"{name}: more than {_LONGEST_LINE >> 20} MiB; no context holds so much")
        try:
            yield raw.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadInput(f"{name}: not UTF-8 text (byte {error.start})") from None
