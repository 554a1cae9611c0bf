"""The CUDA engine: logits of whole sequences, in the form tuned for this GPU or the rule's, and
sessions that generate."""

from __future__ import annotations

import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from onelaunch.compilation.background import in_a_line, log_line
from onelaunch.compilation.cache import Store
from onelaunch.config import ModelConfig
from onelaunch.engines.checks import (
    check_session,
    check_tokens,
    last_positions,
    logits_dtype,
    outside_vocabulary,
    token_tensor,
)
from onelaunch.engines.cuda import DTYPES, TEXT, why_not
from onelaunch.engines.cuda.forms import STAGED, Form, bind
from onelaunch.engines.cuda.pack import PackedModel, pack
from onelaunch.engines.cuda.program import BoundForward, Shape
from onelaunch.engines.cuda.replay import Replay
from onelaunch.engines.cuda.staging import Staging
from onelaunch.engines.cuda.tuning.search import Progress, ignore_progress
from onelaunch.engines.cuda.tuning.store import Choice, bucket, find, keep
from onelaunch.engines.cuda.tuning.timer import facts, tune
from onelaunch.engines.engine import Session
from onelaunch.engines.reference import ReferenceEngine, resolve_device
from onelaunch.errors import BadInput, RunFailed
from onelaunch.operators.empty import Empty
from onelaunch.operators.handles import current_device, current_stream
from onelaunch.operators.triton_cache import prepare_triton
from onelaunch.plan import Depth, parse_depth

if TYPE_CHECKING:
    from onelaunch.engines.cuda.decoding.sessions import Sessions

set_grad_enabled = torch._C._set_grad_enabled  # torch.set_grad_enabled makes an object: 1.5 us

LOCK = threading.RLock()
"""Held by the one thread of the process that makes, launches or tunes a form. Two must not load
kernels or capture a graph at once, not even on two devices, nor use one form's buffers; and what
else there is to do is some microseconds of Python, which runs in one thread at a time anyway."""

MAX_BATCH, MAX_SEQUENCE = 64, 2048
MAX_TEXT = 8192
"""Positions of a sequence that its own kernels generate, its prompt among them."""
MAX_FORMS, MAX_FORM_BYTES = 16, 2 << 30
"""How many shapes keep their buffers and graphs, and bytes of these; the latest always does."""


class CudaEngine:
    """Runs a model on a GPU; see `Engine`.

    Logits are by one kernel per stage, or by fewer launches; generation is by kernels of its own
    (decoding/). The reference engine, of the same dtype on the same device, answers for more than
    MAX_BATCH sequences or MAX_SEQUENCE positions.

    With `fusion_depth` "auto" the form of a shape and its tiles are those that `tune` found on this
    GPU and `store` keeps, else the rule's: one kernel per stage. "stage", "half", a number of
    layers or "all" are a form by hand; "text" is one of generation (`session`). float32, which is
    for checking, and AMD's GPUs have one kernel per stage and nothing to tune. `dtype` is one of
    DTYPES, bfloat16 by default. `log` gets lines for people. With `meanwhile` and the depth "auto"
    PyTorch writes the texts that begin before their kernels are compiled. Raises BadInput for what
    is not supported.

    Engines may be used from several threads; one at a time is served. At the second use of a shape
    a CUDA graph is captured, and in these milliseconds whatever waits for the whole device in
    another thread fails, such as torch.cuda.synchronize; to wait for a stream or an event does not.
    """

    max_batch = MAX_BATCH

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Tensor],
        device: str = "auto",
        dtype: str | None = None,
        fusion_depth: str | int = "auto",
        log: Callable[[str], None] = lambda line: None,
        store: Store | None = None,
        meanwhile: bool = False,
    ) -> None:
        self.config = config
        self.device = resolve_device(device)
        if reason := why_not(self.device, config):
            raise BadInput(f"engine='cuda': {reason}; use engine='reference'")
        name = dtype or DTYPES[0]
        if name not in DTYPES:
            raise BadInput(f"dtype={name!r}: the CUDA engine knows {', '.join(DTYPES)}")
        self.dtype: torch.dtype = getattr(torch, name)
        self.fusion_depth: Depth | str = fusion_depth
        if fusion_depth not in ("auto", TEXT):
            self.fusion_depth = parse_depth(fusion_depth, config.n_layers)
        amd = torch.version.hip is not None
        if amd and self.fusion_depth not in ("auto", "stage"):
            raise BadInput(f"fusion_depth={fusion_depth!r}: on AMD's GPUs it is 'stage'")
        self._tunes = (
            self.fusion_depth in ("auto", TEXT) and self.dtype != torch.float32 and not amd
        )
        self._weights = dict(weights)
        self._packed: PackedModel | None = None
        self._reference: ReferenceEngine | None = None
        self._sessions: Sessions | None = None
        self._meanwhile = meanwhile
        self._store, self._log = store or Store(), log
        self._choices: dict[str, Choice] = {}
        self._disabled: dict[str, str] = {}
        # by batch, sequence, and whether all positions have logits
        self._forms: OrderedDict[tuple[int, int, bool], _BoundForm] = OrderedDict()
        self._used = torch.cuda.Event() if self.device.type == "cuda" else None
        self._stream: torch.cuda.Stream | None = None  # of the last call
        self._staging = Staging()
        self._prepares = False
        self._prepare()
        if self._used is not None:
            # its memory may go to another stream, but not when the interpreter ends
            weakref.finalize(self, _wait_for, self._used).atexit = False

    def logits(
        self,
        tokens_BS: Tensor | Sequence[Sequence[int]],
        dtype: torch.dtype | None = None,
        *,
        last: bool = False,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """Logits of every position, (B, S, V), or of each last one, (B, V), on the GPU; see
        `LogitsEngine`.

        Launches and returns: nothing here waits for the GPU. Ids that come on the host are checked
        at once: BadInput for one beyond the vocabulary, or for more positions than the context.
        Of ids that lie on the GPU a kernel looks at each: the logits of a sequence are NaN from a
        bad one on, perhaps before it too, and a later call, or `describe`, raises BadInput that
        names it. EngineTimeout likewise reports an earlier forward, of the same shape and in few
        launches, that timed out; its logits are NaN, and so may be those that were launched
        before it was reported. A tuned form that fails in another way is not used again: the
        rule's answers.
        """
        dtype = logits_dtype(dtype, self.dtype)
        self._check_bad_id()
        on_gpu = isinstance(tokens_BS, Tensor) and tokens_BS.device.type != "cpu"
        tokens_BS = (token_tensor if on_gpu else check_tokens)(self.config, tokens_BS)
        batch, sequence = tokens_BS.shape
        ends = last_positions(tokens_BS, last, lengths)
        if not (1 <= batch <= MAX_BATCH and 1 <= sequence <= MAX_SEQUENCE):
            return self._by_pytorch().logits(tokens_BS, last=last, lengths=lengths).to(dtype)
        with self._alone():
            try:
                return self._run_form(tokens_BS, dtype, ends)
            except (BadInput, RunFailed):
                raise
            except Exception as error:  # whatever Triton, its compiler or the driver raises
                if not self._give_up_choice(batch, sequence, error):
                    raise
            return self._run_form(tokens_BS, dtype, ends)

    def session(self, max_batch: int = 1, max_len: int | None = None) -> Session:
        """Begin to generate; see `Engine`.

        Up to 64 sequences grow together; a sequence's tokens are the same alone and among others. A
        single launch writes some 5 ms of tokens of all of them, where they fit into it and the
        fusion depth is "auto" or "text"; else one kernel per stage, in graphs of a few tokens.

        A sequence has up to MAX_TEXT positions. Its prompt is read in chunks of 512, between which
        the others grow. Sessions of more positions, and those on AMD's GPUs, are the reference
        engine's, and so are requests with an option that no kernel has: a presence or frequency
        penalty, a logit bias, top log-probabilities. With a fusion depth by hand such a request is
        refused. Raises BadInput where the fusion depth is "text" and the model or `max_batch` does
        not fit.
        """
        length = check_session(max_batch, max_len, self.config)
        if length > MAX_TEXT or not self._generates():
            return self._session_of_pytorch(max_batch, length)
        from onelaunch.engines.cuda.decoding.sessions import Sessions  # imports Triton

        with self._alone():
            if self._sessions is None:
                self._prepare()
                self._sessions = Sessions(
                    self.config, self._pack(), self.fusion_depth, self._store, self._log,
                    self._meanwhile,
                )  # fmt: skip
            pytorchs = partial(self._session_of_pytorch, max_batch, length)
            return self._sessions.session(max_batch, length, self._alone, pytorchs)

    def _prepare(self) -> None:
        """Have Triton ready in a moment, while weights are packed; once Triton is imported, as two
        threads that import it at once may get halves of it."""
        if self.device.type == "cuda" and not self._prepares and "triton" in sys.modules:
            self._prepares = True
            threading.Thread(target=prepare_triton, name="onelaunch", daemon=True).start()

    def _session_of_pytorch(self, max_batch: int, length: int) -> Session:
        self._log("PyTorch generates, one operator a launch")
        return self._by_pytorch().session(max_batch, length)

    def _generates(self) -> bool:
        """Whether its own kernels generate: on NVIDIA's GPUs."""
        return self.device.type == "cuda" and torch.version.hip is None

    def tune(
        self, batch: int = 1, sequence: int | None = None, progress: Progress | None = None
    ) -> dict[str, Any]:
        """Time the forms and tiles of a shape on this GPU and keep the fastest in the store. It is
        used from the next call on, for every shape up to the same powers of two.

        It takes some tens of seconds, in which other threads' calls wait. `sequence` is by default
        the model's context, MAX_SEQUENCE at most; `progress` is called with a phase, how much of
        it is done and of how much, by several threads. An interrupt (KeyboardInterrupt) ends it,
        and nothing is kept but the compiled kernels. Returns the batch and sequence that the answer
        is for, its form, `us` by form, how many forwards were timed, and the seconds that it took.
        Raises BadInput for what cannot be tuned, and RunFailed where nothing runs.
        """
        if not self._tunes:
            raise BadInput(self._why_not_tuned())
        longest = min(self.config.max_seq_len, MAX_SEQUENCE)
        sequence = longest if sequence is None else sequence
        if not 1 <= batch <= MAX_BATCH:
            raise BadInput(f"batch={batch}: must be from 1 to {MAX_BATCH}")
        if not 1 <= sequence <= longest:
            raise BadInput(f"sequence={sequence}: must be from 1 to {longest}")
        with self._alone():
            packed = self._pack()
            if self._used is not None:
                self._used.synchronize()
            choice = tune(self.config, packed, batch, sequence, progress or ignore_progress)
            if not keep(self._store, facts(self.config, packed, batch, sequence), choice):
                self._log(f"the choice could not be stored: {self._store.last_error}")
            name = self._name(batch, sequence)
            self._choices[name] = choice
            self._disabled.pop(name, None)
            self._drop_forms_of({name})
        of_batch, of_sequence = bucket(self.config, batch, sequence)
        return {
            "batch": of_batch,
            "sequence": of_sequence,
            "form": choice.form,
            "us": dict(choice.us),
            "tried": choice.tried,
            "seconds": choice.seconds,
        }

    def _why_not_tuned(self) -> str:
        if self.fusion_depth not in ("auto", TEXT):
            return f"fusion_depth={str(self.fusion_depth)!r}: nothing to tune; use 'auto'"
        if self.dtype == torch.float32:
            return "dtype='float32': nothing to tune; use bfloat16 or float16"
        return "nothing to tune on AMD's GPUs: one kernel per stage is all there is"

    def _check_bad_id(self) -> None:
        """Raise BadInput where a forward met an id that the model does not have."""
        if self._packed is not None and (bad_id := self._packed.take_bad_id()) is not None:
            raise outside_vocabulary(self.config, bad_id, "the tokens of an earlier call")

    def describe(self) -> dict[str, Any]:
        """Engine, device, dtype, bytes of weights, what generates, whether kernels for it are being
        compiled, and of each shape in use its form, with what each form took where that was
        measured, or why nothing was chosen. Waits for the forwards that were launched; raises
        BadInput where one of them met an id outside the vocabulary."""
        if self._used is not None:
            self._used.synchronize()
        self._check_bad_id()
        stored = self.config.n_params * self.dtype.itemsize
        return {
            "engine": "cuda",
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "weight_bytes": stored if self._packed is None else _bytes_of(self._packed),
            "generates_with": "cuda" if self._generates() else "reference",
            "compiling": self._sessions is not None and self._sessions.compiling,
            "fusion_depth": self.fusion_depth,
            "forms": {
                f"{batch}x{sequence}{'' if every else ' last'}": self._about(batch, sequence)
                for batch, sequence, every in list(self._forms)
            },
        }

    def _about(self, batch: int, sequence: int) -> dict[str, Any]:
        name = self._name(batch, sequence)
        choice = self._choices.get(name)
        if choice is None:
            by_hand = self.fusion_depth not in ("auto", "stage", TEXT)
            about = {"form": str(self.fusion_depth) if by_hand else STAGED}
            why = self._disabled.get(name)
            return about if why is None else about | {"failed": why}
        return {"form": choice.form, "programs": choice.programs, "us": dict(choice.us)}

    # ---- what is made once

    def _by_pytorch(self) -> ReferenceEngine:
        with LOCK:
            if self._reference is None:
                dtype = str(self.dtype).removeprefix("torch.")
                self._reference = ReferenceEngine(
                    self.config, self._weights, str(self.device), dtype
                )
                self._let_go()
            return self._reference

    def _pack(self) -> PackedModel:
        with LOCK:
            if self._packed is None:
                placed = {name: w.to(self.device) for name, w in self._weights.items()}
                self._packed = pack(self.config, placed, self.dtype, self.device)
                if self._used is not None:  # other streams will read it
                    torch.cuda.synchronize(self.device)
                self._let_go()
            return self._packed

    def _let_go(self) -> None:
        """Release the caller's weights once all has been made of them."""
        if self._packed is not None and self._reference is not None:
            self._weights = {}

    # ---- the forms

    def _run_form(self, tokens_BS: Tensor, dtype: torch.dtype, ends: list[int] | None) -> Tensor:
        batch, sequence = tokens_BS.shape
        ids_N = self._staging.on_device(tokens_BS.flatten(), self.device)
        form = self._form(batch, sequence, all_positions=ends is None)
        if ends is None:
            return form(ids_N, dtype).view(batch, sequence, -1)
        form.end_at(ends)
        return form(ids_N, dtype)

    def _form(self, batch: int, sequence: int, all_positions: bool) -> _BoundForm:
        key = (batch, sequence, all_positions)
        form = self._forms.pop(key, None)
        if form is None:
            shape = (batch * sequence if all_positions else batch, self.config.vocab_size)
            form = _BoundForm(self._bind(*key), shape, self._log)
            self._make_room(form)
        self._forms[key] = form  # the latest is last
        return form

    def _bind(self, batch: int, sequence: int, all_positions: bool) -> BoundForward:
        packed = self._pack()
        shape = Shape(batch, sequence, all_positions, self.dtype, own_logits=False)
        if self.fusion_depth not in ("auto", "stage", TEXT):
            return bind(self.config, packed, shape, Form(str(self.fusion_depth), {}))
        choice = self._choice(packed, batch, sequence) if self._tunes else None
        form = Form(STAGED, {}) if choice is None else choice.as_form()
        return bind(self.config, packed, shape, form)

    def _choice(self, packed: PackedModel, batch: int, sequence: int) -> Choice | None:
        """The tuned choice for a shape, None where there is none."""
        name = self._name(batch, sequence)
        if name in self._disabled:
            return None
        if name not in self._choices:
            kept = find(self._store, facts(self.config, packed, batch, sequence))
            if kept is None:
                return None
            self._choices[name] = kept
        return self._choices[name]

    def _give_up_choice(self, batch: int, sequence: int, error: Exception) -> bool:
        """Go on without the choice for a shape, whose form fails; whether there was one."""
        name = self._name(batch, sequence)
        if self._choices.pop(name, None) is None:
            return False
        self._disabled[name] = why = in_a_line(error)
        log_line(self._log, f"{name} tokens: the tuned form fails ({why}); the rule's answers")
        if self._used is not None:
            self._used.record()  # what was launched of it is its last use
        self._drop_forms_of({name})
        return True

    def _drop_forms_of(self, names: Container[str]) -> None:
        for shape in [shape for shape in self._forms if self._name(*shape[:2]) in names]:
            self._drop(shape)

    def _make_room(self, newest: _BoundForm) -> None:
        """Evict forms to make room for one more."""
        room = MAX_FORM_BYTES - newest.n_bytes
        while self._forms and (
            len(self._forms) >= MAX_FORMS or sum(f.n_bytes for f in self._forms.values()) > room
        ):
            self._drop(next(iter(self._forms)))

    def _drop(self, shape: tuple[int, int, bool]) -> None:
        if self._used is not None:
            self._used.synchronize()  # its memory may go to another stream
        del self._forms[shape]

    def _name(self, batch: int, sequence: int) -> str:
        return "{}x{}".format(*bucket(self.config, batch, sequence))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Alone in this process, after what was launched before, on whichever stream; with tensors
        that outlive a caller's inference mode.

        Most calls come with the device and the stream of the call before. What they need not is
        left out, as each of PyTorch's guards takes the host 3 to 10 us, of about 100 that a small
        model's forward takes the GPU.
        """
        with LOCK:
            gradients = torch.is_grad_enabled()
            try:
                set_grad_enabled(False)
                if self._used is None or torch.is_inference_mode_enabled() or not self._is_here():
                    with self._guarded():
                        yield
                    return
                stream = self._stream_after_the_last()
                try:
                    yield
                finally:
                    self._used.record(stream)
            finally:
                set_grad_enabled(gradients)

    def _is_here(self) -> bool:
        """Whether its GPU is the current one."""
        here: bool = current_device() == self.device.index
        return here

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """What `_alone` does, with every guard."""
        with torch.inference_mode(False), torch.no_grad():  # the first turns gradients on
            if self._used is None:
                yield
                return
            with torch.cuda.device(self.device):
                stream = self._stream_after_the_last()
                try:
                    yield
                finally:
                    self._used.record(stream)

    def _stream_after_the_last(self) -> torch.cuda.Stream:
        """The current stream, after what was launched on another one."""
        assert self._used is not None
        handle = current_stream(self.device.index)
        if self._stream is None or handle != self._stream.cuda_stream:
            self._stream = torch.cuda.current_stream(self.device)
            self._used.wait(self._stream)
        return self._stream


class _BoundForm:
    """A bound forward: launched at its first use, replayed from its second, or launched further on
    where there can be no graph."""

    def __init__(
        self,
        bound: BoundForward,
        shape: tuple[int, int],
        log: Callable[[str], None],
    ) -> None:
        self.n_bytes = bound.n_bytes
        self._bound, self._shape, self._log = bound, shape, log
        self._empty: dict[torch.dtype, Empty] = {}
        self._replay: Replay | None = None
        self._uses = 0
        self._ends: list[int] | None = None

    def __call__(self, ids_N: Tensor, dtype: torch.dtype) -> Tensor:
        self._bound.raise_if_timed_out(wait=False)  # of the calls before
        empty = self._empty.get(dtype)
        if empty is None:
            strides = (self._shape[1], 1)
            self._empty[dtype] = empty = Empty(self._shape, strides, dtype, ids_N.device)
        logits = empty()
        if self._uses == 1 and self._bound.buffers.x.device.type == "cuda":
            self._capture()
        self._uses += 1
        if self._replay is None:
            self._bound.launch(ids_N, logits)
        else:
            if not self._replay.is_prepared(dtype):
                self._replay.prepare(logits)
            self._replay(ids_N, logits)
        self._bound.copy_status()
        return logits

    def end_at(self, ends: list[int]) -> None:
        """The position of each sequence whose logits are wanted, from the next call on."""
        if ends != self._ends:
            self._bound.end_at([end + 1 for end in ends])
            self._ends = ends

    def _capture(self) -> None:
        try:
            self._replay = Replay(self._bound)
        except Exception as error:  # slower without, not wrong
            log_line(
                self._log,
                f"there is no CUDA graph, and each kernel is launched: {in_a_line(error)}",
            )


def _wait_for(used: torch.cuda.Event) -> None:
    with suppress(RuntimeError):  # a device that is broken computes no more
        used.synchronize()


def _bytes_of(tensors: object) -> int:
    """The bytes of all tensors among an object's fields."""
    return sum(t.nbytes for t in vars(tensors).values() if isinstance(t, Tensor))
