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
from onelaunch.engines.cuda.calls import on
from onelaunch.engines.cuda.decoding.grids import Grid, grid_for, why_not
from onelaunch.engines.cuda.decoding.meanwhile import Meanwhile
from onelaunch.engines.cuda.decoding.options import OptionsByPyTorch
from onelaunch.engines.cuda.decoding.prefill import Prompts
from onelaunch.engines.cuda.decoding.session import CudaSession
from onelaunch.engines.cuda.decoding.text import TextKernel
from onelaunch.engines.cuda.decoding.text_session import OnGPU, TextSession
from onelaunch.engines.cuda.pack import PackedModel
from onelaunch.engines.cuda.program import limits_of
from onelaunch.engines.engine import Request, Session
from onelaunch.errors import BadInput, RunFailed
from onelaunch.plan import Depth


class Sessions:
    """Makes sessions, which share their prompts' forwards and their kernels.

    With `meanwhile` and the fusion depth "auto" PyTorch writes what begins before its kernels are
    compiled.
    """

    def __init__(
        self,
        config: ModelConfig,
        packed: PackedModel,
        fusion_depth: Depth | str,
        store: Store,
        log: Callable[[str], None],
        meanwhile: bool,
    ) -> None:
        self._config, self._packed = config, packed
        self._depth, self._store, self._log = fusion_depth, store, log
        self._meanwhile = meanwhile and fusion_depth == "auto"
        self._prompts = Prompts(config, packed)
        self._kernels: dict[tuple[Grid, bool], TextKernel] = {}
        self._codes: dict[tuple[Grid, bool], bytes] = {}
        self._no_texts: str | None = None  # why no such kernel could be made
        self._compiler: ThreadPoolExecutor | None = None
        self._compiled: Future[None] | None = None  # what was begun last

    def session(
        self,
        max_batch: int,
        length: int,
        alone: Callable[[], AbstractContextManager[None]],
        pytorchs: Callable[[], Session],
    ) -> Session:
        """For up to `max_batch` sequences of `length` positions. `alone` is held while kernels are
        prepared and launched; `pytorchs` makes PyTorch's session, which has no part in a fusion
        depth by hand. Raises BadInput where the fusion depth is "text" and one launch cannot write
        them."""
        c = self._config
        by_stage = partial(
            CudaSession,
            c, self._packed, self._prompts, alone, max_batch, length, self._log,
        )  # fmt: skip
        grid = self._grid(max_batch)
        session: TextSession | CudaSession
        if grid is None:
            session = by_stage()
        else:
            source = self._source(grid, max_batch, length)
            dtype = self._packed.embedding.dtype
            session = TextSession(
                c, source, by_stage, alone, max_batch, length, dtype, self._failed
            )
        if self._depth != "auto":
            return session
        whole: Session = session
        if self._meanwhile:
            begin = partial(self._begin, session, alone)
            whole = Meanwhile(c, session, pytorchs, begin, self._log)
        return OptionsByPyTorch(c, whole, pytorchs)

    @property
    def compiling(self) -> bool:
        """Whether kernels are compiled in the background."""
        return self._compiled is not None and not self._compiled.done()

    def _grid(self, max_batch: int) -> Grid | None:
        """Of the launches that write its sequences; None where they are written by stages."""
        if self._depth not in ("auto", TEXT):
            return None
        device, dtype = self._packed.embedding.device, self._packed.embedding.dtype
        reason = self._no_texts or why_not(self._config, device, dtype, max_batch)
        if reason and self._depth == TEXT:
            raise BadInput(f"fusion_depth={TEXT!r}: {reason}")
        if reason:
            return None
        limits = limits_of(device)
        return grid_for(self._config, dtype, max_batch, limits.multiprocessors, limits.shared_bytes)

    def _source(self, grid: Grid, max_batch: int, length: int) -> OnGPU:
        c = self._config
        shape = (2, c.n_layers, max_batch, c.n_kv_heads, length, c.head_dim)

        def cache() -> Tensor:  # with anything in it
            return self._packed.embedding.new_empty(shape)

        compilation, kernel = partial(self._compilation, grid), partial(self._kernel, grid)
        return OnGPU(self._prompts, compilation, kernel, cache, self._log, max_batch > 1)

    def _failed(self, error: RunFailed) -> None:
        """No kernel could be made that writes a text in one launch."""
        self._no_texts = str(error)
        if self._depth == TEXT:
            raise error
        self._log(f"one launch cannot generate here, one kernel per stage does: {error}")

    def _compilation(self, grid: Grid, draws: bool) -> Callable[[], object] | None:
        """What compiles a kernel; None where that is done."""
        return None if (grid, draws) in self._codes else partial(self._code, grid, draws)

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

    def _begin(
        self,
        session: TextSession | CudaSession,
        alone: Callable[[], AbstractContextManager[None]],
        request: Request,
    ) -> Future[None]:
        """Compile in the background what a request needs, after what was begun before."""
        with alone():  # it may make tensors, which a caller's inference mode must not reach
            compile = session.compilation(request)
        if compile is None and not self.compiling:
            done: Future[None] = Future()
            done.set_result(None)
            return done
        if self._compiler is None:
            self._compiler = ThreadPoolExecutor(1, thread_name_prefix="onelaunch-compiler")
        self._compiled = self._compiler.submit(self._compile_on_device, compile)
        return self._compiled

    def _compile_on_device(self, compile: Callable[[], None] | None) -> None:
        """A thread's own current device is another one."""
        with on(self._packed.embedding.device):
            if compile is not None:
                compile()
