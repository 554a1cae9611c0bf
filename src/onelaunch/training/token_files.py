"""Token data from a folder made by `onelaunch prepare`: checked once, then read in windows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from onelaunch.checkpoints.lfs import refuse_pointer_at
from onelaunch.checkpoints.tokenizers import Tokenizer, load_tokenizer
from onelaunch.errors import BadInput
from onelaunch.training.batches import Batch, check_request, check_state, split_rows, spread
from onelaunch.training.manifest import ITEM_BYTES, Manifest, SplitFacts
from onelaunch.training.shuffle import mix64, shuffled

# Positions whose shuffled windows are computed at once, to amortize the cost of numpy calls.
_ORDER_BLOCK = 4096
_SCAN_TOKENS = 1 << 20


class TokenFile:
    """A headerless file of little-endian token ids. It is not memory-mapped: a file that shrinks
    while it is read then raises an error instead of a bus error."""

    def __init__(self, path: Path, facts: SplitFacts, dtype: str, vocab_size: int) -> None:
        self.path = path
        self.n_tokens = facts.tokens
        self.vocab_size = vocab_size
        self.largest_id = -1
        self._dtype = np.dtype(dtype).newbyteorder("<")
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - open as long as the data
            size = self._file.seek(0, 2)
        except OSError as error:
            raise BadInput(f"{path}: cannot read: {error.strerror or error}") from error
        if size % ITEM_BYTES[dtype]:
            refuse_pointer_at(path)
            raise BadInput(
                f"{path}: {size} bytes are not a whole number of {dtype} tokens; "
                "run `onelaunch prepare` again"
            )
        if size != facts.tokens * ITEM_BYTES[dtype]:
            refuse_pointer_at(path)
            raise BadInput(
                f"{path}: has {size // ITEM_BYTES[dtype]} tokens, its manifest "
                f"{facts.tokens}; run `onelaunch prepare` again"
            )

    def __del__(self) -> None:
        if file := getattr(self, "_file", None):
            file.close()

    def read_into(self, start: int, out_R: np.ndarray) -> None:
        """Read the tokens from `start` on into a contiguous array."""
        try:
            self._file.seek(start * out_R.itemsize)
            n = self._file.readinto(out_R.view(np.uint8).data)
        except OSError as error:
            raise BadInput(f"{self.path}: cannot read: {error.strerror or error}") from error
        if n != out_R.nbytes:
            raise BadInput(f"{self.path}: was truncated during use")

    def rows(self, starts: np.ndarray | list[int], length: int) -> np.ndarray:
        """Read `length` tokens from each start, (B, R)."""
        rows_BR = np.empty((len(starts), length), self._dtype)
        for row_R, start in zip(rows_BR, starts, strict=True):
            self.read_into(int(start), row_R)
        if rows_BR.size and int(rows_BR.max()) >= self.vocab_size:
            raise BadInput(f"{self.path}: changed during use (ids outside the vocabulary)")
        return rows_BR

    def check(self, sha256: str) -> None:
        """Read the whole file: check the ids and the digest, and set `largest_id` (-1 for an empty
        file). Raises BadInput."""
        digest = hashlib.sha256()
        buffer = np.empty(min(_SCAN_TOKENS, self.n_tokens), self._dtype)
        for start in range(0, self.n_tokens, _SCAN_TOKENS):
            chunk = buffer[: self.n_tokens - start]
            self.read_into(start, chunk)
            self.largest_id = max(self.largest_id, int(chunk.max()))
            if self.largest_id >= self.vocab_size:
                index = int(np.argmax(chunk >= self.vocab_size))
                raise BadInput(
                    f"{self.path}: token {start + index} is id {int(chunk[index])}, outside the "
                    f"vocabulary of {self.vocab_size}; run `onelaunch prepare` again"
                )
            digest.update(chunk.data)
        if digest.hexdigest() != sha256:
            raise BadInput(
                f"{self.path}: does not match its manifest (SHA-256 differs); "
                "run `onelaunch prepare` again"
            )


class FileData:
    """A folder made by `onelaunch prepare`."""

    def __init__(self, folder: Path) -> None:
        """Raises BadInput if the manifest, a token file or the tokenizer is damaged."""
        manifest = Manifest.read(folder)
        self.folder = folder
        self.synthetic = manifest.synthetic
        self.label = f"{folder} (synthetic)" if self.synthetic else str(folder)
        self.vocab_size = manifest.vocab_size
        self.bos_id = manifest.bos_id
        self.tokenizer = self._load_tokenizer(manifest)
        self._splits = manifest.splits
        self._files = {
            name: TokenFile(folder / facts.file, facts, manifest.dtype, manifest.vocab_size)
            for name, facts in manifest.splits.items()
        }
        identity = [manifest.dtype, str(manifest.vocab_size), manifest.tokenizer.fingerprint]
        for name, file in self._files.items():
            file.check(manifest.splits[name].sha256)
            identity.append(manifest.splits[name].sha256)
        self.fingerprint = hashlib.sha256(" ".join(identity).encode()).hexdigest()

    def _load_tokenizer(self, manifest: Manifest) -> Tokenizer:
        path = self.folder / manifest.tokenizer.file
        tokenizer = load_tokenizer(path)
        actual = (tokenizer.kind, tokenizer.vocab_size, tokenizer.bos_id)
        recorded = manifest.tokenizer
        # older manifests have the digest of the file
        fingerprints = (tokenizer.fingerprint, tokenizer.file_fingerprint)
        expected = (recorded.kind, manifest.vocab_size, manifest.bos_id)
        if actual != expected or recorded.fingerprint not in fingerprints:
            raise BadInput(
                f"{path}: is not the tokenizer of the manifest; run `onelaunch prepare` again"
            )
        return tokenizer

    def train(self, seq_len: int, seed: int) -> FileSampler:
        """Make a sampler of windows of the train split, in shuffled order."""
        check_request("train", seq_len, 1)
        return FileSampler(self._files["train"], seq_len, seed, self.fingerprint)

    def eval_batches(
        self, split: str, seq_len: int, batch_size: int, max_batches: int | None = None
    ) -> Iterator[Batch]:
        """Yield evaluation batches. Without `max_batches`, every token after the first is predicted
        exactly once: full windows in batches (the last may be smaller), then the rest as one
        shorter row. With it, that many full batches, evenly spaced. Raises BadInput, before the
        iteration, if the split has fewer than two tokens."""
        check_request(split, seq_len, batch_size)
        file = self._files[split]
        if file.n_tokens < 2:
            raise BadInput(
                f"{file.path}: {file.n_tokens} tokens are too few to evaluate; prepare more text"
            )
        return self._eval_batches(file, seq_len, batch_size, max_batches)

    @staticmethod
    def _eval_batches(
        file: TokenFile, seq_len: int, batch_size: int, max_batches: int | None
    ) -> Iterator[Batch]:
        full, tail = divmod(file.n_tokens - 1, seq_len)
        n_whole, n_all = full // batch_size, -(-full // batch_size)
        everything = max_batches is None or max_batches >= n_all + (tail > 0)
        # full batches only, if there are enough, so that all rows have the same weight
        few = max_batches is not None and max_batches <= n_whole
        for i in spread(n_whole if few else n_all, max_batches):
            rows = np.arange(i * batch_size, min((i + 1) * batch_size, full))
            yield split_rows(file.rows(rows * seq_len, seq_len + 1))
        if tail and (everything or not full):
            yield split_rows(file.rows([full * seq_len], tail + 1))

    def largest_id(self, split: str) -> int:
        """Return the largest id in the split."""
        return self._files[split].largest_id

    def n_tokens(self, split: str) -> int:
        """Return the number of tokens in the split."""
        return self._splits[split].tokens

    def bytes_of(self, split: str) -> int:
        """Return the UTF-8 bytes of the text of the split."""
        return self._splits[split].bytes


class FileSampler:
    """Samples shuffled windows of a token file.

    An epoch visits each window of S tokens once; the windows are contiguous, do not overlap, and
    start at an offset below S that differs by epoch. The order is a computed keyed permutation: a
    billion tokens need no memory and no start-up time.
    """

    def __init__(self, file: TokenFile, seq_len: int, seed: int, fingerprint: str) -> None:
        """Raises BadInput if the file is shorter than one sequence."""
        if file.n_tokens < seq_len + 1:
            raise BadInput(
                f"{file.path}: {file.n_tokens} tokens are fewer than one sequence of {seq_len} and "
                "its targets; prepare more text, or lower seq_len"
            )
        self._source = file
        self._identity = {"kind": "file", "data": fingerprint, "seq_len": seq_len, "seed": seed}
        self._seq_len = seq_len
        self._seed = seed
        self._epoch = 0
        self._position = 0
        self._block: tuple[int, int, np.ndarray] | None = None

    def windows(self, epoch: int) -> tuple[int, int]:
        """Return the offset of the first window of an epoch, and its number of windows."""
        n = self._source.n_tokens - 1
        choices = min(self._seq_len, n - self._seq_len + 1)
        offset = mix64(mix64(self._seed) ^ mix64(epoch)) % choices
        return offset, (n - offset) // self._seq_len

    def _starts(self, batch_size: int) -> list[int]:
        """Return the first tokens of the next windows, and advance, also to the next epoch."""
        starts: list[int] = []
        while len(starts) < batch_size:
            offset, n_windows = self.windows(self._epoch)
            first = self._position - self._position % _ORDER_BLOCK
            if self._block is None or self._block[:2] != (self._epoch, first):
                positions = np.arange(first, min(first + _ORDER_BLOCK, n_windows))
                key = mix64(mix64(self._seed) + mix64(~self._epoch))
                self._block = (self._epoch, first, shuffled(positions, n_windows, key))
            order = self._block[2]
            begin = self._position - first
            windows = order[begin : begin + batch_size - len(starts)]
            starts += (offset + windows * self._seq_len).tolist()
            self._position += len(windows)
            if self._position == n_windows:
                self._epoch, self._position = self._epoch + 1, 0
        return starts

    def next(self, batch_size: int) -> Batch:
        """Return (tokens_BS, targets_BS) of the next windows."""
        return split_rows(self._source.rows(self._starts(batch_size), self._seq_len + 1))

    def skip(self, batch_size: int) -> None:
        """Move past the next windows, without reading them."""
        self._starts(batch_size)

    def state_dict(self) -> dict[str, Any]:
        """Return data, seed, sequence length, epoch and position in it."""
        return {**self._identity, "epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state of the same data, seed and sequence length."""
        check_state(state, self._identity, ("epoch", "position"))
        if state["position"] >= self.windows(state["epoch"])[1]:
            raise BadInput("the saved position in the data is past the end of its epoch")
        self._epoch, self._position = state["epoch"], state["position"]
