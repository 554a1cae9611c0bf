"""The library in Python: `load` a model, generate, score, save; `train` one."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack, overload

from onelaunch.checkpoints import GGUF, random_model
from onelaunch.checkpoints import load as load_checkpoint
from onelaunch.checkpoints import save as save_checkpoint
from onelaunch.config import ModelConfig
from onelaunch.engines.choice import ENGINES
from onelaunch.errors import BadInput, MissingExtra, RunFailed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from onelaunch.checkpoints.tokenizers import Tokenizer
    from onelaunch.checkpoints.weights import LoadedModel
    from onelaunch.engines.engine import Engine
    from onelaunch.generation.conversation import ChatFormat
    from onelaunch.generation.decode import Decoding, Limits
    from onelaunch.generation.options import GenerateOptions
    from onelaunch.generation.prompts import Prompt
    from onelaunch.model import Model
    from onelaunch.training.evaluate import SplitLoss
    from onelaunch.training.recipe import Recipe

Log = Callable[[str], None]


def load(
    path: str | Path,
    *,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    engine: str = "auto",
    threads: int | None = None,
    fusion_depth: str | int = "auto",
    tokenizer: str | Path | None = None,
    random: bool = False,
    log: Log | None = None,
) -> LanguageModel:
    """Open a model: a llama2.c or GGUF file, a Hugging Face folder or a run folder of `train`.

    Weights are mapped from the file where its format allows; the engine that runs them is made at
    the first use.

    device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:N" or "mps".
    dtype: what is computed in, "float32", "bfloat16" or "float16" or PyTorch's own; bfloat16 on a
        CUDA GPU and float32 elsewhere by default.
    engine: "auto" (the device's own, or PyTorch where that does not compute the model),
        "reference" (PyTorch), "cpu", "cuda" or "coreml".
    threads: CPU threads; by default as many as measure fastest.
    fusion_depth: how much one launch holds: "auto", "stage", "half", a number of layers, or "all".
    tokenizer: a file or folder, or "bytes", where none lies next to the model.
    random: `path` is the name of a preset; its weights are random, for measuring speed.
    log: called with lines for people, such as that a compilation ended; none are printed unless
        given.

    Raises BadInput, naming `path` or the argument, for what cannot be used.
    """
    if engine not in ENGINES:
        raise BadInput(f"engine={engine!r}: must be {', '.join(ENGINES[:-1])} or {ENGINES[-1]}")
    checkpoint = random_model(str(path)) if random else load_checkpoint(path)
    log = log or _no_log
    for notice in checkpoint.notices:
        log(notice)
    how = {"device": device, "dtype": dtype, "threads": threads, "fusion_depth": str(fusion_depth)}
    return LanguageModel(checkpoint, engine, how, tokenizer, log)


class LanguageModel:
    """A model with its tokenizer and its engine; `load` makes it.

    For one thread at a time. It is a context manager: at its end, or with `close`, the engine's
    memory is freed.
    """

    def __init__(
        self,
        checkpoint: LoadedModel,
        engine: str = "auto",
        how: Mapping[str, Any] | None = None,
        tokenizer: str | Path | None = None,
        log: Log | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self._engine_name, self._how = engine, dict(how or {})
        self._tokenizer_path = tokenizer
        self._tokenizer: Tokenizer | None = None
        self._engine: Engine | None = None
        self._chat_format: ChatFormat | None = None
        self._closed = False
        self._log = log or _no_log

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self.checkpoint.config

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights by canonical name, in the file's dtype."""
        return self.checkpoint.weights

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer passed to `load`, else the one next to the model. Raises BadInput where
        there is none."""
        from onelaunch.checkpoints.tokenizers import find_tokenizer, load_tokenizer, size_note

        if self._tokenizer is None:
            if self._tokenizer_path is not None:
                self._tokenizer = load_tokenizer(self._tokenizer_path)
            else:
                self._tokenizer = find_tokenizer(self.checkpoint)
            if self._tokenizer is None:
                raise BadInput(f"{self._source}: no tokenizer found for it")
            if note := size_note(self._tokenizer, self.config):
                self._log(note)
        return self._tokenizer

    @property
    def engine(self) -> Engine:
        """What runs the model; made at the first use."""
        self._check_open()
        if self._engine is None:
            from onelaunch.engines.choice import choose

            self._engine = choose(
                self._engine_name, self.config, self.weights, log=self._log, **self._how
            )
        return self._engine

    @overload
    def generate(self, prompt: str = "", **options: Unpack[GenerateOptions]) -> str: ...

    @overload
    def generate(self, prompt: list[str], **options: Unpack[GenerateOptions]) -> list[str]: ...

    def generate(
        self, prompt: str | list[str] = "", **options: Unpack[GenerateOptions]
    ) -> str | list[str]:
        """The continuation of a prompt, without the prompt, or of each of a list of them.

        max_new_tokens (256): a text ends after so many tokens, or before, where the model's context
            is full or at one of the model's own stop ids.
        temperature (1), top_k (0), top_p (0.9), min_p (0), seed (0): how tokens are drawn, see
            `Sampling`; temperature 0 takes the most likely token each time.
        repetition_penalty (1), presence_penalty (0), frequency_penalty (0): how much less likely
            tokens of the text so far become, see `Sampling`.
        logit_bias: what is added to the logits of tokens, a mapping from their ids or pairs, such
            as {403: -100}, which bans a token.
        stop: a string that ends a text, or several; it does not come back.
        stop_ids: further token ids that end it.
        Without a prompt a text begins at BOS.

        Raises BadInput for a prompt beyond the context and for arguments out of range, RunFailed
        where logits are not finite numbers.
        """
        from onelaunch.generation.options import limits

        decoding = self._decode(prompt, limits(**options))
        texts = [completion.text or "" for completion in decoding.finish()]
        return texts[0] if isinstance(prompt, str) else texts

    def stream(self, prompt: str = "", **options: Unpack[GenerateOptions]) -> Iterator[str]:
        """The pieces of the continuation of a prompt as they come; together they are what
        `generate` returns, and the arguments are the same. Ending the iteration early ends the
        generation; the model may be used for other things meanwhile."""
        from onelaunch.generation.options import limits

        decoding = self._decode(prompt, limits(**options))

        return _pieces(decoding)

    def decode(
        self,
        prompt: str | list[str] = "",
        *,
        logprobs: bool = False,
        top_logprobs: int = 0,
        ids_only: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> Decoding:
        """What `generate` and `stream` are made of: an iterator of `TextEvent` (the prompt's
        number, token id, text, finish reason) whose `completions` hold ids, text, finish reason and
        seconds of each prompt. Nothing is computed before the first event is requested.

        logprobs: events have `logprob`, the natural logarithm of the token's probability before
            bias, penalties, temperature and filters.
        top_logprobs: events have so many of the most likely tokens in `top`, 0 to 20, each with its
            log-probability.
        ids_only: a model without a usable tokenizer will do, where there is no prompt either; the
            events of such a model have no text.
        The other arguments are those of `generate`.
        """
        from onelaunch.generation.options import limits

        ends = replace(limits(**options), logprobs=logprobs, top_logprobs=top_logprobs)
        return self._decode(prompt, ends, ids_only)

    @property
    def chat_format(self) -> ChatFormat:
        """The model's chat template, or ChatML where it has none, and what ends an answer. Raises
        BadInput for a template that cannot be used, MissingExtra without jinja2."""
        from onelaunch.generation.conversation import chat_format

        if self._chat_format is None:
            try:
                tokenizer = self.tokenizer
            except BadInput as error:
                raise BadInput(f"{error}; load it with tokenizer='FILE'") from error
            self._chat_format = chat_format(self.checkpoint, tokenizer)
        return self._chat_format

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> str:
        """The model's answer to a conversation.

        messages: dicts with a "role" ("system", "user", "assistant") and a "content": a text, or a
            list of parts {"type": "text", "text": ...}.
        tools: descriptions of functions, for chat templates that can show them to the model.
        variables: others that the chat template reads, such as {"enable_thinking": False}.
        options: those of `generate`; max_new_tokens is 1024 by default.
        An answer ends where the chat template ends a turn, too.

        Raises BadInput for messages that the template refuses and for a conversation longer than
        the context, and what `generate` raises.
        """
        (completion,) = self.decode_chat(
            messages, tools=tools, variables=variables, **options
        ).finish()
        return completion.text or ""

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Iterator[str]:
        """The pieces of the answer as they come, as `stream` yields those of a text."""
        return _pieces(self.decode_chat(messages, tools=tools, variables=variables, **options))

    def decode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Decoding:
        """What `chat` and `stream_chat` are made of, as `decode` is of `generate`. The whole
        conversation is read anew for each answer: no engine keeps it in between."""
        from onelaunch.generation.conversation import ANSWER_TOKENS
        from onelaunch.generation.decode import Decoding
        from onelaunch.generation.options import limits

        options.setdefault("max_new_tokens", ANSWER_TOKENS)
        ends = limits(**options)
        chat = self.chat_format
        prompt = chat.prompt(messages, tools, variables)
        ids = self._stop_ids(chat.tokenizer, (*chat.stop_ids, *ends.stop_ids))
        ends = replace(ends, stop_ids=ids, stop=(*chat.stop, *ends.stop))
        return Decoding(self.engine, [prompt], ends, chat.tokenizer)

    def _stop_ids(self, tokenizer: Tokenizer | None, more: Sequence[int]) -> list[int]:
        """The ids that end a text, those of the model's vocabulary."""
        ends = {*self.checkpoint.stop_ids, *(tokenizer.stop_ids if tokenizer else ()), *more}
        return sorted(i for i in ends if i < self.config.vocab_size)

    def logits(
        self,
        ids: Tensor | Sequence[Sequence[int]],
        dtype: torch.dtype | None = None,
        *,
        last: bool = False,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """Logits of every position, (batch, sequence, vocabulary), on the engine's device; with
        `last` those of each sequence's last position alone, (batch, vocabulary), and `lengths` is
        how many tokens of each count. See `engines.engine.LogitsEngine.logits`."""
        return self.engine.logits(ids, dtype, last=last, lengths=lengths)

    def loss(self, ids: Tensor | Sequence[Sequence[int]]) -> float:
        """Mean cross-entropy of the ids after the first of each sequence, in nats per token.

        ids: (batch, sequence), at least two in a sequence. Raises BadInput for other shapes.
        """
        import torch
        import torch.nn.functional as F

        from onelaunch.engines.checks import check_tokens

        tokens_BS = check_tokens(self.config, ids)
        if tokens_BS.shape[1] < 2 or not len(tokens_BS):
            raise BadInput(
                f"ids of shape {tuple(tokens_BS.shape)}: a loss needs two tokens or more of each "
                "sequence"
            )
        logits_BSV = self.engine.logits(tokens_BS)
        targets_BS = tokens_BS[:, 1:].to(logits_BSV.device, torch.int64)
        return float(F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), targets_BS.flatten()))

    def tune(
        self,
        batch: int = 1,
        sequence: int | None = None,
        *,
        training: bool = False,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> dict[str, Any]:
        """Measure which fusion depth and tiles are fastest on this GPU, and keep the answer.

        It is used from the next call on, and by every later process for the same shape of model,
        dtype, GPU and versions, for batches and sequences up to the next powers of two. Without it
        a rule decides. It takes some tens of seconds, in which nothing else should use the GPU.

        batch, sequence: of (B, S) token ids; by default the model's context, 2,048 at most.
        training: tune the training step of exactly this batch and sequence, for `train`: its tiles,
            logits at once and streams, without dropout.
        progress: called with a phase, how much of it is done and of about how much, from several
            threads.

        Returns the batch and sequence that it holds for, the chosen form, each form's microseconds,
        how many forwards were timed, and the seconds that it took; of a training step see
        `CudaTrainer.tune`. Raises BadInput where there is nothing to tune, such as on a CPU.
        """
        from onelaunch.engines.cuda import why_not
        from onelaunch.engines.cuda.engine import CudaEngine
        from onelaunch.engines.reference import resolve_device

        if training:
            return self._tune_training(batch, sequence, progress)
        device = resolve_device(self._how.get("device") or "auto")
        if reason := why_not(device, self.config):
            raise BadInput(f"only the CUDA engine can be tuned: {reason}")
        engine = self.engine
        if not isinstance(engine, CudaEngine):
            name = engine.describe()["engine"]
            raise BadInput(f"only the CUDA engine can be tuned, and the engine is {name!r}")
        return engine.tune(batch, sequence, progress)

    def _tune_training(
        self,
        batch: int,
        sequence: int | None,
        progress: Callable[[str, int, int], None] | None,
    ) -> dict[str, Any]:
        from onelaunch.compilation.cache import Store
        from onelaunch.engines.cuda import why_not_train
        from onelaunch.engines.reference import resolve_device

        self._check_open()
        device = resolve_device(self._how.get("device") or "auto")
        if reason := why_not_train(device, self.config):
            raise BadInput(f"only the CUDA engine can be tuned: {reason}")
        if self._engine_name not in ("auto", "cuda"):
            raise BadInput(
                f"only the CUDA engine can be tuned, and the engine is {self._engine_name!r}"
            )
        from onelaunch.engines.cuda.training.engine import CudaTrainer  # imports Triton

        dtype = str(self._how.get("dtype") or "bfloat16").removeprefix("torch.")
        store = Store()
        trainer = CudaTrainer(self.config, self.weights, str(device), dtype, store=store)
        with closing(trainer):
            length = min(self.config.max_seq_len, 2048) if sequence is None else sequence
            tuned = trainer.tune(batch, length, progress or (lambda phase, done, total: None))
        if not tuned["kept"]:
            self._log(f"the forms could not be stored: {store.last_error}")
        return tuned

    def evaluate(self, data: str | Path, progress: Log | None = None) -> SplitLoss:
        """The loss over the whole validation split of some data, in windows of the model's context,
        2,048 at most.

        data: a folder made by `onelaunch prepare`, or "stories".
        progress: called with how many tokens were read.
        It is computed in float32 unless the model was loaded with a dtype, and, where no engine was
        chosen, by the one that is fastest for batches: the GPU's own, or PyTorch.

        Raises BadInput where the data were made with another tokenizer than the model's.
        """
        from onelaunch.engines.choice import automatic_for_evaluation, choose
        from onelaunch.engines.reference import resolve_device
        from onelaunch.training.data import open_data
        from onelaunch.training.evaluate import check_tokenizer, evaluate_split

        self._check_open()
        tokens = open_data(str(data))
        check_tokenizer(self.checkpoint, self._source, str(data), tokens, self._log)
        how = {"device": "auto", "threads": None} | self._how
        how["dtype"] = str(how.get("dtype") or "float32").removeprefix("torch.")
        name = self._engine_name
        if name == "auto":
            device = resolve_device(how["device"])
            name = automatic_for_evaluation(device, self.config, how["dtype"], how["threads"])
        engine = choose(name, self.config, self.weights, log=self._log, **how)
        return evaluate_split(engine, tokens, progress or _no_log)

    def save(self, path: str | Path, format: str) -> None:
        """Write the model to `path` as "llama2c" or "gguf" (a file) or "hf" (a folder). Only a GGUF
        file gets the tokenizer too, if there is one; `onelaunch export` writes both for all."""
        tokenizer = self._tokenizer_for([], ids_only=True) if format == GGUF else None
        save_checkpoint(self.checkpoint, path, format, tokenizer=tokenizer)

    def describe(self) -> dict[str, Any]:
        """The engine, its device, dtype, bytes of weights, and what it chose."""
        return self.engine.describe()

    def close(self) -> None:
        """Give the engine's memory back. A closed model can still be saved."""
        self._engine = None
        self._closed = True

    def __enter__(self) -> LanguageModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        millions = self.config.n_params / 1e6
        state = ", closed" if self._closed else ""
        return f"LanguageModel({self.checkpoint.source}, {millions:.1f}M parameters{state})"

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this model is closed; load it again")

    @property
    def _source(self) -> str:
        return str(self.checkpoint.source or "the model")

    def _tokenizer_for(self, texts: Sequence[str], ids_only: bool) -> Tokenizer | None:
        """What `decode` needs; where it can do without, None, and a note, for one that cannot be
        used."""
        from onelaunch.checkpoints.tokenizers import find_tokenizer

        if not ids_only or any(texts):
            try:
                return self.tokenizer
            except BadInput as error:
                raise BadInput(
                    f"{error}; load it with tokenizer='FILE', or have ids alone, ids_only=True, "
                    "of no prompt"
                ) from error
        if self._tokenizer is not None or self._tokenizer_path is not None:
            return self.tokenizer
        try:
            return find_tokenizer(self.checkpoint)
        except (BadInput, MissingExtra) as error:
            self._log(f"note: the model's tokenizer cannot be used: {error}")
            return None

    def _decode(self, prompt: str | list[str], limits: Limits, ids_only: bool = False) -> Decoding:
        """Of prompts that are text; the model's own stop ids end them, too."""
        from onelaunch.generation.decode import Decoding

        texts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(texts, list | tuple) or not all(isinstance(t, str) for t in texts):
            raise BadInput(f"prompt={prompt!r}: must be a text or a list of texts")
        tokenizer = self._tokenizer_for(texts, ids_only)
        ids = self._stop_ids(tokenizer, limits.stop_ids)
        prompts = self._prompts(texts, tokenizer)
        return Decoding(self.engine, prompts, replace(limits, stop_ids=ids), tokenizer)

    def _prompts(self, texts: Sequence[str], tokenizer: Tokenizer | None) -> list[Prompt]:
        from onelaunch.generation.prompts import begins_twice, empty_prompt, encode_prompts

        if tokenizer is None:
            return [empty_prompt(self.checkpoint, None) for _ in texts]
        prompts = encode_prompts(tokenizer, texts, self.config)
        for index, prompt in enumerate(prompts):
            if begins_twice(tokenizer, prompt.ids):
                self._log(
                    f"note: prompt {index + 1} begins with {tokenizer.piece(prompt.ids[0])}, "
                    "and the tokenizer adds one: the model reads it twice"
                )
        return [
            prompt if prompt.text else empty_prompt(self.checkpoint, tokenizer)
            for prompt in prompts
        ]


def save(model: LanguageModel | LoadedModel | Model, path: str | Path, format: str) -> None:
    """Write a model to `path` as "llama2c" or "gguf" (a file) or "hf" (a folder): one that was
    loaded, or a `Model` in PyTorch. Raises BadInput for what the format cannot express."""
    from onelaunch.checkpoints.weights import LoadedModel

    if isinstance(model, LanguageModel):
        model.save(path, format)
        return
    if not isinstance(model, LoadedModel):
        weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
        model = LoadedModel(model.config, weights)
    save_checkpoint(model, path, format)


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    *,
    run: str | Path | None = None,
    init: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
    quiet: bool = True,
) -> Path:
    """Train a model; returns its run folder, which `load` opens.

    recipe: a built-in name or a TOML file (docs/recipes.md), the sections as a dict, or a Recipe;
        by default "quickstart", and with `init` the defaults of all keys. With `resume` it must
        describe the run's model.
    run: the run folder, made here; by default a new one in `runs`. With `resume` the one to go
        on with, by its own recipe: by default the newest.
    init: a model to start from, as `load` takes it; its shape replaces the recipe's, the data must
        be prepared with its tokenizer. By default the weights are random.
    settings: keys to change, such as {"train.updates": 100}.
    quiet: no progress on the terminal.

    Raises BadInput for what does not fit together, RunFailed where the run diverges or memory or
    the disk do not suffice, KeyboardInterrupt where it is interrupted: the run is saved before.
    """
    import torch

    from onelaunch.training.ranks import joined
    from onelaunch.training.train import train as train_run

    settings = dict(settings or {})
    if init == "":
        raise BadInput("init='': is empty; pass a file or a folder")
    if init is not None:
        settings["train.init"] = str(init)
    folder = Path(run) if run else None
    with joined() as ranks, torch.inference_mode(False), torch.enable_grad():
        outcome = train_run(recipe, folder, settings, resume, quiet, ranks=ranks)
    if outcome.restart_requested:  # coreml.compile_budget is spent
        _go_on(outcome.run)
    if outcome.signal is not None:
        raise KeyboardInterrupt(f"stopped; {outcome.run} is saved and can be resumed")
    return outcome.run


def _go_on(run: Path) -> None:
    """Have a fresh process finish a run."""
    from onelaunch.compilation.environment import child_environment
    from onelaunch.training.train import resume_command

    command = resume_command(run, quiet=True)
    status = subprocess.run(command, env=child_environment()).returncode
    if status < 0 or status > 128:
        raise KeyboardInterrupt(f"stopped; {run} is saved and can be resumed")
    if status:
        raise RunFailed(f"{run}: the process that continued it ended with {status}")


def _pieces(decoding: Decoding) -> Iterator[str]:
    with closing(decoding):
        for event in decoding:
            if event.text:
                yield event.text


def _no_log(line: str) -> None:
    pass
