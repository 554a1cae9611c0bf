"""The Core ML engine: a model as ML Programs, run by Core ML on a Mac and evaluated elsewhere."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from onelaunch.compilation.cache import Store
from onelaunch.config import ModelConfig
from onelaunch.engines.checks import (
    check_session,
    check_tokens,
    last_positions,
    logits_dtype,
    not_computed,
)
from onelaunch.engines.coreml import DTYPES, coremltools
from onelaunch.engines.coreml.emit import LOGITS, RESULT, TOKENS, X, program_launches
from onelaunch.engines.coreml.pack import HEAD_STEP, Packed, weight_bytes
from onelaunch.engines.coreml.programs import Programs, Wanted
from onelaunch.engines.coreml.ready import Opener, ReadyProgram
from onelaunch.engines.session import RowSession
from onelaunch.errors import BadInput
from onelaunch.plan import make_plan, parse_depth

MAX_SEQUENCES = 4
"""Of how many lengths programs are kept loaded; the latest always."""


class CoreMLEngine:
    """Runs a model through its ML Programs; see `Engine`.

    A program has a fixed length: a sequence is padded at its end to the next power of two from 32
    on, the model's context at most; sequences are computed one after another. With `dtype`
    "float16" Core ML runs the programs on a Mac, and elsewhere they are evaluated, rounded after
    every operation; "float32" evaluates them in float32, with their float16 constants. There is no
    cache of keys and values: each new token
    reads its whole sequence, which is for checking and short sequences. `store` keeps compiled
    programs. Raises BadInput for what is not supported, MissingExtra without coremltools.
    """

    max_batch = 16

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Tensor],
        dtype: str | None = None,
        fusion_depth: str | int = "auto",
        log: Callable[[str], None] = lambda line: None,
        store: Store | None = None,
    ) -> None:
        coremltools("engine='coreml'")
        if reason := not_computed(config):
            raise BadInput(f"engine='coreml': {reason}; use engine='reference'")
        self.config = config
        self.dtype = dtype or DTYPES[0]
        if self.dtype not in DTYPES:
            raise BadInput(f"dtype={dtype!r}: the Core ML engine knows {', '.join(DTYPES)}")
        depth = "all" if fusion_depth == "auto" else fusion_depth
        self.fusion_depth = parse_depth(depth, config.n_layers)
        program_launches(make_plan(config), self.fusion_depth)  # raises for single stages
        self.programs = Programs(store or Store())
        self._packed = Packed(config, dict(weights))
        self._log, self._logged = log, False
        self._open = Opener(self.dtype, log)  # type: ignore[arg-type]
        self._loaded: OrderedDict[int, list[ReadyProgram]] = OrderedDict()

    def logits(
        self,
        tokens_BS: Tensor | Sequence[Sequence[int]],
        dtype: torch.dtype | None = None,
        *,
        last: bool = False,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """Logits of every position, (B, S, V), or of each last one, (B, V), float32, on the CPU;
        see `LogitsEngine`."""
        logits_dtype(dtype)
        tokens_BS = check_tokens(self.config, tokens_BS)
        batch, sequence = tokens_BS.shape
        ends = last_positions(tokens_BS, last, lengths)
        if not tokens_BS.numel():
            extents = (batch,) if last else (batch, sequence)
            return torch.empty(*extents, self.config.vocab_size)
        logits = [self._sequence(ids.tolist()) for ids in tokens_BS.cpu()]
        if ends is not None:
            return torch.stack([each[end] for each, end in zip(logits, ends, strict=True)])
        return torch.stack(logits)[:, :sequence]

    def session(self, max_batch: int = 1, max_len: int | None = None) -> RowSession:
        """Begin to generate, a token of each request in a step; see `Engine`."""
        max_len = check_session(max_batch, max_len, self.config)
        return RowSession(
            self.config, WholeSequences(self._sequence), max_batch, max_len, self.dtype
        )

    def describe(self) -> dict[str, Any]:
        """Engine, device, dtype, bytes of weights, fusion depth, and what was compiled."""
        return {
            "engine": "coreml",
            "device": "cpu",
            "programs": "run by Core ML" if self._open.runs else "evaluated",
            "dtype": self.dtype,
            "weight_bytes": weight_bytes(self.config),
            "fusion_depth": self.fusion_depth,
            "lengths": list(self._loaded),
            "compilations": self.programs.compilations,
            "cache_hits": self.programs.hits,
            "compile_seconds": round(self.programs.compile_seconds, 3),
        }

    def _sequence(self, ids: Sequence[int]) -> Tensor:
        """Logits of one sequence and of its padding, (length, V)."""
        length = self._length(len(ids))
        tokens = torch.tensor([[*ids, *[0] * (length - len(ids))]])
        values = {TOKENS: tokens, X: self._looked_up(tokens)}
        for program in self._programs(length):
            outputs = program({name: values[name] for name in program.inputs})
            values = {X: outputs.get(RESULT, tokens)}
        tiles = [value for name, value in outputs.items() if name.startswith(LOGITS)]
        return torch.cat(tiles, 1)[0, :, 0].T.float()

    def _length(self, sequence: int) -> int:
        power = 1 << (sequence - 1).bit_length()
        return min(max(HEAD_STEP, power), self.config.max_seq_len)

    def _looked_up(self, tokens_1S: Tensor) -> Tensor:
        """The input of the first program where the host looks the embedding up."""
        table = self._packed.unpacked("embed_tokens.weight")
        return table[tokens_1S].half().float().transpose(1, 2)[:, :, None]

    def _programs(self, length: int) -> list[ReadyProgram]:
        if length in self._loaded:
            self._loaded.move_to_end(length)
            return self._loaded[length]
        plan = make_plan(self.config, 1, length, all_positions=True)
        selected = program_launches(plan, self.fusion_depth)
        if not (self._logged or self._open.runs):
            self._logged = True
            self._log(
                "Core ML runs on macOS: here its programs are evaluated, operation by operation in "
                f"{self.dtype}"
            )
        paths = [self.programs.get(Wanted(plan, launch), self._packed) for launch in selected]
        while len(self._loaded) >= MAX_SEQUENCES:
            self._close(self._loaded.popitem(last=False)[1])
        opened: list[ReadyProgram] = []
        try:
            for path in paths:
                opened.append(self._open(path))
        except BaseException:
            self._close(opened)
            raise
        self._loaded[length] = opened
        return opened

    def close(self) -> None:
        """End what runs the programs; they are made ready again where they are needed."""
        while self._loaded:
            self._close(self._loaded.popitem()[1])

    @staticmethod
    def _close(programs: Sequence[ReadyProgram]) -> None:
        for program in programs:
            program.close()


class WholeSequences:
    """Rows of a session without a cache: each new token reads its whole sequence; see `Rows`."""

    def __init__(self, logits: Callable[[Sequence[int]], Tensor]) -> None:
        self._logits = logits
        self._sequences: list[list[int]] = []

    def read(self, row: int, prompt_ids: Sequence[int]) -> Tensor:
        """The last position's logits of a new sequence, (1, V)."""
        self._sequences[row:] = [list(prompt_ids)]
        return self._last(self._sequences[row])[None]

    def step(self, token_B: Tensor) -> Tensor:
        """The logits behind one more token of each row, (B, V)."""
        sequences = self._sequences[: len(token_B)]
        for ids, token in zip(sequences, token_B.tolist(), strict=True):
            ids.append(token)
        return torch.stack([self._last(ids) for ids in sequences])

    def move(self, source: int, row: int) -> None:
        """Put a sequence in the place of another."""
        self._sequences[row] = self._sequences[source]

    def _last(self, ids: Sequence[int]) -> Tensor:
        return self._logits(ids)[len(ids) - 1]
