"""`onelaunch generate`: text out of a model, as it comes."""

from __future__ import annotations

import codecs
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onelaunch.cli.common import Debug, Device, Json, ModelArgument, Quiet, load_model, say
from onelaunch.cli.timeline import traced_device, write_timeline
from onelaunch.errors import BadInput, MissingExtra

if TYPE_CHECKING:
    from onelaunch.checkpoints.tokenizers import Tokenizer
    from onelaunch.checkpoints.weights import LoadedModel
    from onelaunch.engines.engine import Engine, Sampling
    from onelaunch.generation.text import Completion, Prompt

# Far more text than any context holds; a prompt beyond it is a mistake, such as @/dev/zero.
_LARGEST_PROMPT = 64 << 20


def generate(
    model: ModelArgument,
    random: Annotated[
        bool, typer.Option("--random", help="MODEL is a preset; random weights, for speed only.")
    ] = False,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", metavar="FILE", help="Where none lies beside the model."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            metavar="TEXT|@FILE|-",
            help="How the text begins: itself, a file, or - for standard input; a byte order mark "
            "and one final line end of a file are dropped. May be given several times. Without it "
            "the text begins at BOS, or at EOS where the model has no BOS.",
        ),
    ] = None,
    no_echo: Annotated[
        bool, typer.Option("--no-echo", help="The continuation alone, without the prompt.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", min=1, help="The most tokens to add.")
    ] = 256,
    temperature: Annotated[
        float,
        typer.Option("--temperature", metavar="T", help="0 takes the most likely token each time."),
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option("--top-k", metavar="K", help="Draw among the K most likely; 0: all.")
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(
            "--top-p", metavar="P", help="Draw among the likeliest that add up to P; 1: all."
        ),
    ] = 0.9,
    min_p: Annotated[
        float,
        typer.Option(
            "--min-p", metavar="P", help="Draw among those P times as likely as the best; 0: all."
        ),
    ] = 0.0,
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            metavar="S",
            help="The same seed and prompt draw the same text again, also where no seed is given; "
            "a prompt given twice draws two.",
        ),
    ] = 0,
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            metavar="ENGINE",
            help="auto, reference (PyTorch), cpu (compiled: one call for a whole generation), "
            "cuda (generates with PyTorch so far) or coreml (ML Programs, evaluated here, for "
            "checking); auto is the device's own.",
        ),
    ] = "auto",
    device: Device = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            help="float32, bfloat16 or float16; bfloat16 on a CUDA GPU and float32 elsewhere "
            "unless given.",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            metavar="N",
            min=1,
            help="CPU threads; as many as measure fastest unless given (reference engine: "
            "PyTorch's choice).",
        ),
    ] = None,
    fusion_depth: Annotated[
        str,
        typer.Option(
            "--fusion-depth",
            metavar="DEPTH",
            help="What one call holds: auto (on the CPU a whole generation), stage, half, a number "
            "of layers, or all (one forward).",
        ),
    ] = "auto",
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            metavar="FILE",
            help="On an NVIDIA GPU, write when each tile of one forward ran, for ui.perfetto.dev: "
            "of the prompts, or without one of a whole context, in one launch unless "
            "--fusion-depth says how many.",
        ),
    ] = None,
    ids: Annotated[
        bool,
        typer.Option("--ids", help="Token ids instead of text, without BOS and the final stop id."),
    ] = False,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write text.

    The prompt, if any, and its continuation go to standard output as they come.
    """
    texts = _read_prompts(prompt or [])
    traced = None if trace is None else traced_device(device)

    from onelaunch.engines.choice import choose
    from onelaunch.engines.engine import Sampling
    from onelaunch.generation.text import complete

    sampling = Sampling(temperature, top_k, top_p, min_p, seed)
    loaded = load_model(model, random)
    found = _tokenizer(tokenizer, loaded, model, bool(texts) or not ids, quiet)
    prompts = _prompts(texts, loaded, found, model)
    if trace is not None and traced is not None:
        written = [each.ids for each in prompts] if texts else []
        told = write_timeline(trace, loaded, written, traced, dtype, fusion_depth)
        say(told, quiet)
    out = _Output(prompts, _bos_ids(loaded, found), echo=not no_echo, ids=ids, quiet=quiet)
    runner = choose(
        engine, loaded.config, loaded.weights, device, dtype, threads, fusion_depth, out.notice
    )
    loaded.weights, loaded.extras = {}, {}  # the engine has what it needs of them
    ends = {*loaded.stop_ids, *(found.stop_ids if found else ())}
    stop = sorted(i for i in ends if i < loaded.config.vocab_size)
    try:
        completions = complete(
            runner, prompts, max_new_tokens, sampling, stop, found, None if json_ else out.piece
        )
    except BaseException:
        out.break_off()
        raise
    if json_:
        print(_as_json(model, runner, sampling, max_new_tokens, completions))
    else:
        out.finish()
    say(_summary(runner, completions, max_new_tokens, sampling), quiet)


def _read_prompts(given: list[str]) -> list[str]:
    """The texts that --prompt names; raises BadInput for one that cannot be read."""
    if given.count("-") > 1:
        raise BadInput("--prompt -: standard input can be read once only")
    return [_read_prompt(prompt) for prompt in given]


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


def _tokenizer(
    spec: str | None, loaded: LoadedModel, model: str, needed: bool, quiet: bool
) -> Tokenizer | None:
    """The one named, else the one found for the model; None only where none is needed."""
    from onelaunch.checkpoints.tokenizers import find_tokenizer, load_tokenizer, size_note

    mend = "name one with --tokenizer FILE, or print token ids with --ids and no --prompt"
    if spec is not None:
        found: Tokenizer | None = load_tokenizer(spec)
    else:
        try:
            found = find_tokenizer(loaded)
        except (BadInput, MissingExtra) as error:
            if needed and isinstance(error, BadInput):
                raise BadInput(f"{error}; {mend}") from error
            if needed:
                raise
            say(f"note: the model's tokenizer cannot be used: {error}", quiet)
            return None
    if found is None:
        if needed:
            raise BadInput(f"{model}: no tokenizer found for it; {mend}")
        return None
    if needed and (note := size_note(found, loaded.config)):
        say(note, quiet)
    return found


def _prompts(
    texts: list[str], loaded: LoadedModel, tokenizer: Tokenizer | None, model: str
) -> list[Prompt]:
    from onelaunch.generation.text import Prompt, encode_prompts, first_id

    if texts and tokenizer is not None:
        return encode_prompts(tokenizer, texts, loaded.config)
    first = first_id(loaded, tokenizer)
    if first is None:
        raise BadInput(f"{model}: the model names no BOS to begin with; give it a --prompt")
    return [Prompt("", [first])]


def _bos_ids(loaded: LoadedModel, tokenizer: Tokenizer | None) -> set[int | None]:
    from onelaunch.generation.text import first_id

    return {first_id(loaded, tokenizer), tokenizer.bos_id if tokenizer else None}


class _Output:
    """Standard output: texts one after another, a blank line between them, flushed as they come.

    Texts may grow together: what comes for a later one waits until those before it are complete.
    """

    def __init__(
        self,
        prompts: list[Prompt],
        bos_ids: set[int | None],
        echo: bool,
        ids: bool,
        quiet: bool,
    ) -> None:
        self._quiet = quiet
        self._held: list[str] = []
        self._prompts, self._bos_ids, self._echo, self._ids = prompts, bos_ids, echo, ids
        self._begun = 0
        self._space = ""
        self._ended = [False] * len(prompts)
        self._waiting: list[list[tuple[int | None, str]]] = [[] for _ in prompts]
        self._current = 0

    def piece(self, index: int, token: int | None, text: str) -> None:
        """One more token of a text, or its end; nothing is written before the first."""
        self._waiting[index].append((token, text))
        self._ended[index] = token is None
        while self._current < len(self._prompts):
            for waiting in self._waiting[self._current]:
                self._write(self._current, *waiting)
            self._waiting[self._current].clear()
            if not self._ended[self._current]:
                break
            self._current += 1
        sys.stdout.flush()

    def _write(self, index: int, token: int | None, text: str) -> None:
        if token is None and not text:
            return
        self._begin(index)
        if not self._ids:
            sys.stdout.write(text)
        elif token is not None:
            self._write_id(token)

    def finish(self) -> None:
        """End the last text's line, after the prompts that nothing was added to."""
        self._begin(len(self._prompts) - 1)
        sys.stdout.write("\n")
        sys.stdout.flush()
        for line in self._held:
            say(line, self._quiet)

    def break_off(self) -> None:
        """On a terminal end the line of a text that is not complete: what follows is no part of
        it."""
        with contextlib.suppress(OSError):
            if self._begun and sys.stdout.isatty():
                sys.stdout.write("\n")
                sys.stdout.flush()

    def notice(self, line: str) -> None:
        """A line for standard error; not amid a text on the same terminal."""
        if self._begun and sys.stderr.isatty() and sys.stdout.isatty():
            self._held.append(line)
        else:
            say(line, self._quiet)

    def _begin(self, index: int) -> None:
        while self._begun <= index:
            if self._begun:
                sys.stdout.write("\n\n")
            prompt = self._prompts[self._begun]
            self._begun += 1
            self._space = ""
            if self._echo and self._ids:
                for token in prompt.ids[prompt.ids[0] in self._bos_ids :]:
                    self._write_id(token)
            elif self._echo:
                sys.stdout.write(prompt.text)

    def _write_id(self, token: int) -> None:
        sys.stdout.write(f"{self._space}{token}")
        self._space = " "


def _as_json(
    model: str, engine: Engine, sampling: Sampling, n: int, completions: list[Completion]
) -> str:
    from dataclasses import asdict

    from onelaunch.generation.text import tokens_per_second

    def entry(completion: Completion) -> dict[str, Any]:
        return {
            "prompt": completion.prompt.text,
            "prompt_ids": completion.prompt.ids,
            "text": completion.text,
            "ids": completion.ids,
            "first_token_seconds": completion.first_token_seconds,
            "seconds": completion.seconds,
        }

    return json.dumps(
        {
            "model": model,
            "engine": engine.describe(),
            "sampling": asdict(sampling) | {"max_new_tokens": n},
            "texts": [entry(completion) for completion in completions],
            "tokens_per_second": tokens_per_second(completions),
        }
    )


def _summary(engine: Engine, completions: list[Completion], n: int, sampling: Sampling) -> str:
    """Tokens and speed, and why a text is shorter than asked where the context is."""
    from onelaunch.generation.text import tokens_per_second

    about = engine.describe()
    new = sum(len(completion.ids) for completion in completions)
    read = sum(len(completion.prompt.ids) for completion in completions)
    parts = [f"{new} new token{'s' * (new != 1)}"]
    rate = tokens_per_second(completions)
    if rate is not None:
        parts[0] += f" at {rate:.1f} tokens/s"
    first = completions[0].first_token_seconds
    if first is not None:
        parts.append(f"the first after {first * 1000:.1f} ms")
    parts.append(f"{read} prompt token{'s' * (read != 1)}")
    wrote = about.get("generates_with", about["engine"])
    parts.append(f"{wrote} engine on {about['device']} in {about['dtype']}")
    if not sampling.greedy:
        parts.append(f"seed {sampling.seed}")
    context = engine.config.max_seq_len
    if any(len(c.prompt.ids) + len(c.ids) > context and len(c.ids) < n for c in completions):
        parts.append(f"ended by the model's context of {context} tokens")
    return "; ".join(parts)
