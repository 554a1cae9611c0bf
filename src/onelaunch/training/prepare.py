"""Tokenize text files: train.bin, val.bin, the tokenizer, and a manifest, written last.

The text is read twice, document by document: to measure and check it, and to write tokens. A line
with only <|endoftext|> ends a document; so does the end of a file. Its tokens begin with BOS, or
end with EOS if the tokenizer has no BOS.
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
from onelaunch.training.binary_files import refuse_binary
from onelaunch.training.manifest import (
    MANIFEST_FILE,
    SPLITS,
    Manifest,
    SourceFacts,
    SplitFacts,
    TokenizerFacts,
    dtype_for,
)

SEPARATOR = "<|endoftext|>"
TEXT_SUFFIXES = (".txt", ".md")

_BOM = b"\xef\xbb\xbf"
# Encoding takes a list entry per byte: long documents are encoded in pieces.
_BYTES_PIECE = 1 << 18
# sentencepiece keeps several copies of its training text in memory.
_TOKENIZER_TEXT = 64 << 20
_PROGRESS_AFTER_S = 2.0
_PROGRESS_EVERY_S = 1.0


@dataclass(frozen=True)
class Prepared:
    """The result of `prepare`: folder, manifest, and the number of files that were not text."""

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
    """Text for one split; `begins` and `ends` are whether a document starts or ends here."""

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
    """Tokenize text files and folders into the new folder `out`, atomically.

    `vocab_size` trains a tokenizer of that many pieces on the training text; otherwise `tokenizer`
    is a file, or "bytes". Documents begin with BOS, or end with EOS if the tokenizer has no BOS; if
    it has neither, they have no separator. The last tenth of the text is for validation: from the
    first document boundary at or after 90% of the characters if that leaves at least 5%, otherwise
    from 90% within a document (and then without a separator). `progress` is called with a line
    about once per second if it takes long. Raises BadInput naming the file, argument or folder.
    """
    out = Path(out).resolve()
    _check_out(out)
    chosen = None if vocab_size is not None else load_tokenizer(tokenizer)
    sources, ignored = _find_sources(texts)
    for source in sources:
        refuse_binary(source.path)
    with atomic_directory(out) as folder:
        reporter = _ProgressReporter(progress, 2 if vocab_size is None else 3)
        total = _measure(sources, reporter)
        if chosen is None:
            chosen = train_llama2c(_training_text(sources, total, reporter), vocab_size or 0)
        manifest = _write(folder, sources, total, chosen, reporter)
        if out.exists():
            out.rmdir()  # an empty folder, which a rename cannot replace on every system
    return Prepared(out, manifest, ignored)


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out}: is a file; pass a new folder")
    if out.is_dir() and any(out.iterdir()):
        raise BadInput(f"{out}: is not empty; pass a new folder")


def _find_sources(texts: Sequence[str | Path]) -> tuple[list[_Source], int]:
    """List the files to read, in order, each once; also returns the number of ignored files."""
    sources: dict[Path, _Source] = {}
    ignored = 0
    for text in texts:
        path = Path(text)
        if path.is_dir():
            names, others = _text_files(path)
            ignored += others
            top = path.resolve().name
            for name in names:
                sources.setdefault((path / name).resolve(), _Source(path / name, f"{top}/{name}"))
        elif path.is_file():
            sources.setdefault(path.resolve(), _Source(path, path.name))
        elif path.exists():
            raise BadInput(f"{path}: neither a file nor a folder; save the text to a file")
        else:
            raise BadInput(f"{path}: no such file or folder")
    if not sources:
        raise BadInput(
            f"{', '.join(map(str, texts))}: no {' or '.join(TEXT_SUFFIXES)} files "
            f"({ignored} others ignored); pass other files one by one"
        )
    return list(sources.values()), ignored


def _text_files(folder: Path) -> tuple[list[str], int]:
    """List the text files below a folder by relative name, sorted; also returns the number of other
    files. Hidden files and folders are skipped.

    Linked folders are read too, after the others; each folder is read once, for any number of
    links, and a link to a parent folder is not followed.
    """

    def refuse(error: OSError) -> None:
        raise BadInput(f"{error.filename}: cannot read: {error.strerror or error}") from error

    names: list[str] = []
    others = 0
    seen: set[str] = set()
    pending = deque([folder])
    while pending:
        top = pending.popleft()
        if os.path.realpath(top) in seen:
            continue
        for parent, folders, entries in os.walk(top, onerror=refuse):
            resolved = os.path.realpath(parent)
            seen.add(resolved)
            inner = [Path(parent, name) for name in sorted(folders) if not name.startswith(".")]
            pending += [
                path
                for path in inner
                if path.is_symlink() and not _contains(path.resolve(), resolved)
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


def _contains(folder: Path, inner: str) -> bool:
    """Return whether a resolved folder is `inner` or one of its parents."""
    return Path(inner).is_relative_to(folder)


class _ProgressReporter:
    """Reports the progress of reading, about once per second."""

    def __init__(self, progress: Callable[[str], None], passes: int) -> None:
        self._progress = progress
        self._passes = passes
        self._read = 0
        self._next = time.monotonic() + _PROGRESS_AFTER_S
        self.total_bytes = 0

    def add(self, n_bytes: int) -> None:
        self._read += n_bytes
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _PROGRESS_EVERY_S
            share = self._read / max(1, self.total_bytes * self._passes)
            size = f"{self.total_bytes / 1e6:,.0f} MB of text"
            self._progress(f"preparing {size}: {min(share, 1.0):.0%}")


def _documents(source: _Source, reporter: _ProgressReporter) -> Iterator[str]:
    """Yield the documents of a file, except those of white space only.

    Sets the size and digest of `source` at the end; raises BadInput if they have changed.
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
                    reporter.add(size + len(line) - start)
                    document = bytearray()
                    start = size + len(line)
                elif size == 0 and line.startswith(_BOM):
                    document += line[len(_BOM) :]
                    start = len(_BOM)
                else:
                    document += line
                size += len(line)
            yield from _decoded(document, start, source.path)
            reporter.add(size - start)
    except OSError as error:
        raise BadInput(f"{source.path}: cannot read: {error.strerror or error}") from error
    if source.sha256 not in ("", digest.hexdigest()):
        raise BadInput(f"{source.path}: changed during reading; run again")
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


def _measure(sources: list[_Source], reporter: _ProgressReporter) -> int:
    """Count the characters of all documents; raises BadInput for bytes that are not UTF-8."""
    try:
        reporter.total_bytes = sum(source.path.stat().st_size for source in sources)
    except OSError as error:
        raise BadInput(f"{error.filename}: cannot read: {error.strerror or error}") from error
    total = sum(len(text) for source in sources for text in _documents(source, reporter))
    names = ", ".join(str(source.path) for source in sources[:3])
    names += f" and {len(sources) - 3} more" if len(sources) > 3 else ""
    if total == 0:
        raise BadInput(f"{names}: no text except white space")
    if total == 1:
        raise BadInput(f"{names}: one character cannot be split into training and validation")
    return total


def _pieces(sources: list[_Source], total: int, reporter: _ProgressReporter) -> Iterator[_Piece]:
    """Yield all documents by split; `total` is the number of their characters, at least 2."""
    cut = total * 9 // 10
    seen = 0
    split = "train"
    for source in sources:
        for text in _documents(source, reporter):
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


def _training_text(
    sources: list[_Source], total: int, reporter: _ProgressReporter
) -> Iterator[str]:
    """Yield the training documents for a tokenizer; only their beginnings if the text is large."""
    for piece in _pieces(sources, total, reporter):
        if piece.split == "train":
            length = len(piece.text) * _TOKENIZER_TEXT // total
            yield piece.text[: max(1, length)] if total > _TOKENIZER_TEXT else piece.text


def separating_eos(tokenizer: Tokenizer) -> int | None:
    """Return the id that ends each document: EOS if there is no BOS, else None."""
    return tokenizer.eos_id if tokenizer.bos_id is None else None


class _TokenWriter:
    """Writes the token file of one split."""

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
        for start in range(0, len(piece.text), step):
            text = piece.text[start : start + step]
            self._bytes += len(text.encode("utf-8"))
            self._write(self._tokenizer.encode(text, bos=False))
        if piece.ends and (eos_id := separating_eos(self._tokenizer)) is not None:
            self._write([eos_id])
        self._documents += 1

    def _write(self, ids: Iterable[int]) -> None:
        tokens_N = np.array(ids, dtype=np.int64)
        if tokens_N.size and int(tokens_N.max()) >= self._tokenizer.vocab_size:
            raise BadInput(
                f"the tokenizer is damaged: id {tokens_N.max()} is outside its vocabulary of "
                f"{self._tokenizer.vocab_size}"
            )
        data = tokens_N.astype(self._dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self._tokens += tokens_N.size

    def facts(self) -> SplitFacts:
        """Return the manifest entry of the file."""
        return SplitFacts(
            self._name, self._tokens, self._bytes, self._documents, self._digest.hexdigest()
        )


def _write(
    folder: Path,
    sources: list[_Source],
    total: int,
    tokenizer: Tokenizer,
    reporter: _ProgressReporter,
) -> Manifest:
    with ExitStack() as stack:
        writers = {}
        for split in SPLITS:
            name = f"{split}.bin"
            file = stack.enter_context(atomic_file(folder / name))
            writers[split] = _TokenWriter(file, name, tokenizer)
        for piece in _pieces(sources, total, reporter):
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
