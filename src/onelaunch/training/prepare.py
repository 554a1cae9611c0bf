"""Text to token files: train.bin, val.bin, the tokenizer, and a manifest that is written last.

The text is read twice, a document at a time: once to measure and check it, once to write tokens.
A line that holds only <|endoftext|> ends a document; so does the end of a file. Its tokens begin
with BOS, or end with EOS where the tokenizer names no BOS.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from onelaunch.checkpoints.atomic import atomic_directory, atomic_file, write_json
from onelaunch.checkpoints.lfs import refuse_pointer
from onelaunch.checkpoints.tokenizers import Tokenizer, load_tokenizer, train_llama2c
from onelaunch.errors import BadInput
from onelaunch.training.manifest import (
    MANIFEST_FILE,
    SPLITS,
    Manifest,
    SourceFacts,
    SplitFacts,
    TokenizerFacts,
    dtype_for,
)
from onelaunch.training.packed import check_is_not_packed

SEPARATOR = "<|endoftext|>"
TEXT_SUFFIXES = (".txt", ".md")

_BOM = b"\xef\xbb\xbf"
# A byte needs a list entry while it is encoded: long documents of bytes go piece by piece.
_BYTES_PIECE = 1 << 18
# sentencepiece holds its training text in memory, several times over.
_TOKENIZER_TEXT = 64 << 20
_PROGRESS_AFTER_S = 2.0
_PROGRESS_EVERY_S = 1.0


@dataclass(frozen=True)
class Prepared:
    """What was written, and how many files of the named folders were not text."""

    folder: Path
    manifest: Manifest
    ignored: int


@dataclass
class _Source:
    path: Path
    name: str
    bytes: int = 0
    sha256: str = ""


class _Piece(NamedTuple):
    """Text for one split; `begins` and `ends` say whether a document does so here."""

    split: str
    text: str
    begins: bool = True
    ends: bool = True


def prepare(
    texts: Sequence[str | Path],
    out: str | Path,
    tokenizer: str | Path = "bytes",
    vocab_size: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Prepared:
    """Tokenize text files and folders into the new folder `out`, which appears whole or not at all.

    `vocab_size` trains a tokenizer of that many pieces on the training text; otherwise `tokenizer`
    is a file, or "bytes". Documents begin with BOS, or end with EOS where the tokenizer names no
    BOS; where it names neither they have no separator. The last tenth of the text is for
    validation: from the first document boundary at or after 90% of the characters if that leaves at
    least 5%, otherwise from 90% within a document (and then without a separator).
    `progress` is given a line about once a second, only where it takes long.
    Raises BadInput naming the file, flag or folder.
    """
    out = Path(out).resolve()
    _check_out(out)
    made = None if vocab_size is not None else load_tokenizer(tokenizer)
    sources, ignored = _find_sources(texts)
    for source in sources:
        check_is_not_packed(source.path)
    with atomic_directory(out) as folder:
        ticker = _Ticker(progress, 2 if vocab_size is None else 3)
        total = _measure(sources, ticker)
        if made is None:
            made = train_llama2c(_training_text(sources, total, ticker), vocab_size or 0)
        manifest = _write(folder, sources, total, made, ticker)
        if out.exists():
            out.rmdir()  # an empty folder, which not every system lets a rename replace
    return Prepared(out, manifest, ignored)


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out}: is a file; name a new folder")
    if out.is_dir() and any(out.iterdir()):
        raise BadInput(f"{out}: already holds files; name a new folder")


def _find_sources(texts: Sequence[str | Path]) -> tuple[list[_Source], int]:
    """The files to read, in order, each once; and the number of others in the named folders."""
    found: dict[Path, _Source] = {}
    ignored = 0
    for text in texts:
        path = Path(text)
        if path.is_dir():
            names, others = _text_files(path)
            ignored += others
            top = path.resolve().name
            for name in names:
                found.setdefault((path / name).resolve(), _Source(path / name, f"{top}/{name}"))
        elif path.is_file():
            found.setdefault(path.resolve(), _Source(path, path.name))
        elif path.exists():
            raise BadInput(f"{path}: is neither a file nor a folder; save the text in a file")
        else:
            raise BadInput(f"{path}: no such file or folder")
    if not found:
        raise BadInput(
            f"{', '.join(map(str, texts))}: no {' or '.join(TEXT_SUFFIXES)} files in there "
            f"({ignored} others); name other files one by one to have them read"
        )
    return list(found.values()), ignored


def _text_files(folder: Path) -> tuple[list[str], int]:
    """Relative names of the text files below a folder, sorted; hidden files and folders are not
    looked at. And the number of other files.

    Linked folders are read too, after those that lie there; each folder is read once, however many
    links lead to it, and a link to a folder around it is not followed.
    """

    def refuse(error: OSError) -> None:
        raise BadInput(f"{error.filename}: cannot read: {error.strerror or error}") from error

    names: list[str] = []
    others = 0
    seen: set[str] = set()
    waiting = deque([folder])
    while waiting:
        top = waiting.popleft()
        if os.path.realpath(top) in seen:
            continue
        for parent, folders, entries in os.walk(top, onerror=refuse):
            here = os.path.realpath(parent)
            seen.add(here)
            inner = [Path(parent, name) for name in sorted(folders) if not name.startswith(".")]
            waiting += [
                path for path in inner if path.is_symlink() and not _holds(path.resolve(), here)
            ]
            folders[:] = [
                path.name
                for path in inner
                if not path.is_symlink() and os.path.realpath(path) not in seen
            ]
            for entry in entries:
                path = Path(parent, entry)
                if entry.startswith(".") or path.suffix.lower() not in TEXT_SUFFIXES:
                    others += 1
                elif path.is_file():
                    names.append(path.relative_to(folder).as_posix())
                else:
                    others += 1
    return sorted(names), others


def _holds(folder: Path, inner: str) -> bool:
    """Whether a resolved folder is another one, or is around it."""
    return Path(inner).is_relative_to(folder)


class _Ticker:
    """Says how far the reading is, seldom."""

    def __init__(self, progress: Callable[[str], None], passes: int) -> None:
        self._progress = progress
        self._passes = passes
        self._read = 0
        self._next = time.monotonic() + _PROGRESS_AFTER_S
        self.total_bytes = 0

    def tick(self, n_bytes: int) -> None:
        self._read += n_bytes
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _PROGRESS_EVERY_S
            share = self._read / max(1, self.total_bytes * self._passes)
            size = f"{self.total_bytes / 1e6:,.0f} MB of text"
            self._progress(f"preparing {size}: {min(share, 1.0):.0%}")


def _documents(source: _Source, ticker: _Ticker) -> Iterator[str]:
    """The documents of a file that hold more than white space, each with its lines as they are.

    At the end `source` knows the file's size and digest; raises BadInput where it had others.
    """
    digest = hashlib.sha256()
    size = 0
    try:
        with open(source.path, "rb") as file:
            document = bytearray()
            start = 0
            for line in file:
                if size == 0:
                    refuse_pointer(source.path, line)
                digest.update(line)
                if line.strip() == SEPARATOR.encode():
                    yield from _decoded(document, start, source.path)
                    ticker.tick(size + len(line) - start)
                    document = bytearray()
                    start = size + len(line)
                elif size == 0 and line.startswith(_BOM):
                    document += line[len(_BOM) :]
                    start = len(_BOM)
                else:
                    document += line
                size += len(line)
            yield from _decoded(document, start, source.path)
            ticker.tick(size - start)
    except OSError as error:
        raise BadInput(f"{source.path}: cannot read: {error.strerror or error}") from error
    if source.sha256 not in ("", digest.hexdigest()):
        raise BadInput(f"{source.path}: changed while it was being read; run again")
    source.bytes, source.sha256 = size, digest.hexdigest()


def _decoded(document: bytearray, start: int, path: Path) -> Iterator[str]:
    try:
        text = document.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{path}: not UTF-8 at byte {start + error.start} ({error.reason}); convert it first, "
            "for example with iconv"
        ) from None
    if text and not text.isspace():
        yield text


def _measure(sources: list[_Source], ticker: _Ticker) -> int:
    """Characters of all documents; every byte is checked to be UTF-8."""
    try:
        ticker.total_bytes = sum(source.path.stat().st_size for source in sources)
    except OSError as error:
        raise BadInput(f"{error.filename}: cannot read: {error.strerror or error}") from error
    total = sum(len(text) for source in sources for text in _documents(source, ticker))
    names = ", ".join(str(source.path) for source in sources[:3])
    names += f" and {len(sources) - 3} more" if len(sources) > 3 else ""
    if total == 0:
        raise BadInput(f"{names}: no text, only white space")
    if total == 1:
        raise BadInput(f"{names}: a single character cannot be split for training and validation")
    return total


def _pieces(sources: list[_Source], total: int, ticker: _Ticker) -> Iterator[_Piece]:
    """All documents, split; `total` is the number of their characters, at least 2."""
    cut = total * 9 // 10
    seen = 0
    split = "train"
    for source in sources:
        for text in _documents(source, ticker):
            end = seen + len(text)
            if split == "train" and end >= cut:
                if (total - end) * 20 >= total:
                    yield _Piece("train", text)
                else:
                    yield _Piece("train", text[: cut - seen], ends=False)
                    yield _Piece("val", text[cut - seen :], begins=False)
                split = "val"
            else:
                yield _Piece(split, text)
            seen = end


def _training_text(sources: list[_Source], total: int, ticker: _Ticker) -> Iterator[str]:
    """What a tokenizer learns from: the training documents, of each its beginning where all would
    be too much."""
    for piece in _pieces(sources, total, ticker):
        if piece.split == "train":
            kept = len(piece.text) * _TOKENIZER_TEXT // total
            yield piece.text[: max(1, kept)] if total > _TOKENIZER_TEXT else piece.text


def separating_eos(tokenizer: Tokenizer) -> int | None:
    """The id that ends each document: EOS, where there is no BOS that begins the next."""
    return tokenizer.eos_id if tokenizer.bos_id is None else None


class _TokenWriter:
    """One split's file while it is written."""

    def __init__(self, file: IO[bytes], name: str, tokenizer: Tokenizer) -> None:
        self._file = file
        self._name = name
        self._tokenizer = tokenizer
        self._dtype = np.dtype(dtype_for(tokenizer.vocab_size)).newbyteorder("<")
        self._digest = hashlib.sha256()
        self._tokens = self._bytes = self._documents = 0

    def add(self, piece: _Piece) -> None:
        """Encode and write a piece of text."""
        if piece.begins and self._tokenizer.bos_id is not None:
            self._write([self._tokenizer.bos_id])
        step = _BYTES_PIECE if self._tokenizer.kind == "bytes" else len(piece.text)
        for at in range(0, len(piece.text), step):
            part = piece.text[at : at + step]
            self._bytes += len(part.encode("utf-8"))
            self._write(self._tokenizer.encode(part, bos=False))
        if piece.ends and (eos_id := separating_eos(self._tokenizer)) is not None:
            self._write([eos_id])
        self._documents += 1

    def _write(self, ids: Iterable[int]) -> None:
        tokens_N = np.array(ids, dtype=np.int64)
        if tokens_N.size and int(tokens_N.max()) >= self._tokenizer.vocab_size:
            raise BadInput(
                f"the tokenizer makes id {tokens_N.max()}, beyond its own vocabulary of "
                f"{self._tokenizer.vocab_size}; it is damaged"
            )
        data = tokens_N.astype(self._dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self._tokens += tokens_N.size

    def facts(self) -> SplitFacts:
        """What the manifest says of the file."""
        return SplitFacts(
            self._name, self._tokens, self._bytes, self._documents, self._digest.hexdigest()
        )


def _write(
    folder: Path, sources: list[_Source], total: int, tokenizer: Tokenizer, ticker: _Ticker
) -> Manifest:
    with ExitStack() as stack:
        writers = {}
        for split in SPLITS:
            name = f"{split}.bin"
            file = stack.enter_context(atomic_file(folder / name))
            writers[split] = _TokenWriter(file, name, tokenizer)
        for piece in _pieces(sources, total, ticker):
            writers[piece.split].add(piece)
    manifest = Manifest(
        dtype=dtype_for(tokenizer.vocab_size),
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=separating_eos(tokenizer),
        tokenizer=TokenizerFacts(
            tokenizer.kind, tokenizer.save(folder).name, tokenizer.fingerprint
        ),
        synthetic=False,
        splits={split: writer.facts() for split, writer in writers.items()},
        sources=tuple(SourceFacts(s.name, s.bytes, s.sha256) for s in sources),
    )
    write_json(folder / MANIFEST_FILE, manifest.to_dict())
    return manifest
