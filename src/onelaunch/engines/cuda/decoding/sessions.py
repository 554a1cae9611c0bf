"""The sessions of a model that its own kernels write: in one launch, or stage by stage."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial

from torch import Tensor

from onelaunch.compilation.cache import Store
from onelaunch.config import ModelConfig
from onelaunch.engines.cuda import TEXT
from onelaunch.engines.cuda.decoding.meanwhile import Meanwhile
from onelaunch.engines.cuda.decoding.prefill import Prompts
from onelaunch.engines.cuda.decoding.session import CudaSession
from onelaunch.engines.cuda.decoding.text import Grid, TextKernel, grid_for, why_not
from onelaunch.engines.cuda.decoding.text_session import OnGPU, TextSession
from onelaunch.engines.cuda.pack import PackedModel
from onelaunch.engines.cuda.program import limits_of
from onelaunch.engines.engine import Request, Session
from onelaunch.errors import BadInput, RunFailed
from onelaunch.plan import Depth


class Sessions:
    """Makes sessions, which share their prompts' forwards and their kernels.

    `alone` is held while kernels are launched. With `meanwhile` and the fusion depth "auto" a
    session of `pytorchs`, for so many sequences of such a length, writes what begins before its
    kernels are compiled.
    """

    def __init__(
        self,
        config: ModelConfig,
        packed: PackedModel,
        alone: Callable[[], AbstractContextManager[None]],
        pytorchs: Callable[[int, int], Session],
        fusion_depth: Depth | str,
        store: Store,
        log: Callable[[str], None],
        meanwhile: bool,
    ) -> None:
        self._config, self._packed, self._alone = config, packed, alone
        self._pytorchs, self._depth, self._store, self._log = pytorchs, fusion_depth, store, log
        self._meanwhile = meanwhile and fusion_depth == "auto"
        self._prompts = Prompts(config, packed)
        self._kernels: dict[tuple[Grid, bool], TextKernel] = {}
        self._codes: dict[tuple[Grid, bool], bytes] = {}
        self._no_texts: str | None = None  # why no such kernel could be made
        self._compiler: ThreadPoolExecutor | None = None
        self._compiled: Future[None] | None = None  # what was begun last

    def session(self, max_batch: int, length: int) -> Session:
        """For up to `max_batch` sequences of `length` positions. Raises BadInput where the fusion
        depth is "text" and one launch cannot write them."""
        c = self._config
        by_stage = partial(
            CudaSession,
            c, self._packed, self._prompts, self._alone, max_batch, length, self._log,
        )  # fmt: skip
        grid = self._grid(max_batch)
        session = by_stage() if grid is None else self._texts(grid, max_batch, length, by_stage)
        if not self._meanwhile:
            return session
        others, compiling = (
            partial(self._pytorchs, max_batch, length),
            partial(self._begin, session),
        )
        return Meanwhile(c, session, others, compiling, self._log)

    @property
    def compiling(self) -> bool:
        """Whether kernels are compiled in the background."""
        return self._compiled is not None and not self._compiled.done()

    def _grid(self, max_batch: int) -> Grid | None:
        """Of the launches that write a session's texts; None where they are written by stages."""
        if self._depth not in ("auto", TEXT):
            return None
        device, dtype = self._packed.embedding.device, self._packed.embedding.dtype
        reason = self._no_texts or why_not(self._config, device, dtype, max_batch)
        if reason and self._depth == TEXT:
            raise BadInput(f"fusion_depth={TEXT!r}: {reason}")
        by_itself = max_batch == 1 or self._depth == TEXT
        if reason or not by_itself:
            return None
        return grid_for(self._config, dtype, max_batch, limits_of(device).multiprocessors)

    def _texts(
        self, grid: Grid, max_batch: int, length: int, others: Callable[[], Session]
    ) -> TextSession:
        c, dtype = self._config, self._packed.embedding.dtype
        shape = (c.n_layers, max_batch, c.n_kv_heads, length, c.head_dim)

        def cache() -> tuple[Tensor, Tensor]:  # with anything in it
            like = self._packed.embedding
            return like.new_empty(shape), like.new_empty(shape)

        code, kernel = partial(self._code, grid), partial(self._kernel, grid)
        source = OnGPU(self._prompts, code, kernel, cache, self._log)
        return TextSession(c, source, others, self._alone, max_batch, length, dtype, self._failed)

    def _failed(self, error: RunFailed) -> None:
        """No kernel could be made that writes a text in one launch."""
        self._no_texts = str(error)
        if self._depth == TEXT:
            raise error
        self._log(f"one launch cannot write texts here, one kernel per stage does: {error}")

    def _code(self, grid: Grid, draws: bool) -> bytes:
        key = grid, draws
        if key not in self._codes:
            compile = TextKernel.compile
            self._codes[key] = compile(self._config, self._packed, self._store, grid, draws)
        return self._codes[key]

    def _kernel(self, grid: Grid, draws: bool) -> TextKernel:
        key = grid, draws
        if key not in self._kernels:
            code = self._code(grid, draws)
            self._kernels[key] = TextKernel(
                self._config, self._packed, grid=grid, draws=draws, code=code
            )
        return self._kernels[key]

    def _begin(self, session: TextSession | CudaSession, request: Request) -> Future[None]:
        """Compile in the background what a request needs, after what was begun before."""
        compile = session.compilation(request)
        if compile is None and not self.compiling:
            done: Future[None] = Future()
            done.set_result(None)
            return done
        if self._compiler is None:
            self._compiler = ThreadPoolExecutor(1, thread_name_prefix="onelaunch-compiler")
        self._compiled = self._compiler.submit(compile or (lambda: None))
        return self._compiled
