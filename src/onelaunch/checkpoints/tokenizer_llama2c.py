"""llama2.c's tokenizer.bin: sentencepiece BPE with byte fallback.

The file is `<I` max_token_length, then per piece `<fI` score, length and the raw bytes. Piece 0 is
unknown, 1 is BOS, 2 is EOS, 3..258 are the 256 bytes; a space is stored as itself. The number of
pieces is not stored: it is in the header of the model.
"""

from __future__ import annotations

import codecs
import hashlib
import heapq
import io
import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from onelaunch.checkpoints.atomic import atomic_file, read_bytes
from onelaunch.checkpoints.foreign_stderr import without_stderr
from onelaunch.errors import BadInput, MissingExtra

FIRST_BYTE = 3
FIRST_PIECE = FIRST_BYTE + 256
LLAMA2C_SPECIAL_TOKENS = {"<s>": 1, "</s>": 2}
SPECIALS = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % byte for byte in range(256))]
"""The pieces that every vocabulary begins with."""

# Far beyond real files (32,000 pieces take 434 kB); larger ones are refused unread.
MAX_FILE_BYTES = 16 << 20
MAX_PIECES = 1 << 18

# Longer chunks are rare and not cached; the cache is cleared when it is full.
_CACHED_CHUNK = 64
_CACHE_ENTRIES = 1 << 16

# sentencepiece trains on sentences; longer lines are split, or it would skip them.
_MAX_SENTENCE = 4000


class Utf8Stream:
    """A streaming decoder that emits text as soon as its bytes are complete characters.

    `piece(id, first)` returns the bytes of an id; `first` is true at the beginning of a text. Bytes
    that are not UTF-8 become U+FFFD.
    """

    def __init__(self, piece: Callable[[int, bool], bytes], bos_id: int) -> None:
        self._piece = piece
        self._bos_id = bos_id
        self._first = True
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Add an id; returns the text that it completes, which may be empty."""
        text = self._utf8.decode(self._piece(token, self._first))
        self._first = token == self._bos_id
        return text

    def finish(self) -> str:
        """Return the remaining text: U+FFFD for an incomplete character, or nothing."""
        return self._utf8.decode(b"", final=True)


def utf8_bytes(text: str) -> bytes:
    """Encode a text as UTF-8; surrogate escapes, from a terminal, become their bytes again."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise BadInput(f"the text is not valid Unicode: {error.reason}") from None


class Llama2cTokenizer:
    """A llama2.c tokenizer: pieces and their scores.

    It equals sentencepiece's BPE: the neighbours with the best score are merged, the leftmost first
    among equals, until no two neighbours form a piece. Text never becomes control or byte pieces,
    except by byte fallback.
    """

    kind = "llama2c"
    file_name = "tokenizer.bin"
    bos_id: int | None = 1
    eos_id: int | None = 2
    stop_ids: tuple[int, ...] = (1, 2)
    special_tokens: Mapping[str, int] = LLAMA2C_SPECIAL_TOKENS

    def __init__(
        self, pieces: list[bytes], scores: list[float], max_token_length: int | None = None
    ) -> None:
        """Raises BadInput unless the first 259 pieces are the three control pieces and the bytes,
        and there is one finite score per piece."""
        if len(pieces) < FIRST_PIECE or pieces[FIRST_BYTE:FIRST_PIECE] != SPECIALS[FIRST_BYTE:]:
            raise BadInput("pieces 3 to 258 are not the 256 bytes")
        if len(pieces) > MAX_PIECES:
            raise BadInput(f"{len(pieces)} pieces are more than the {MAX_PIECES} supported")
        if len(scores) != len(pieces) or not all(map(math.isfinite, scores)):
            raise BadInput("each piece needs one finite score")
        self.pieces = pieces
        self.scores = scores
        self.vocab_size = len(pieces)
        if max_token_length is None:
            max_token_length = max(map(len, pieces))
        self.max_token_length = max_token_length
        self._ids: dict[bytes, int] = {}
        for i in range(FIRST_PIECE, len(pieces)):
            self._ids.setdefault(pieces[i], i)
        # In nearly all vocabularies no piece has a space after another character. Then no merge
        # crosses such a position: the text splits there into chunks, each cached once merged.
        crossing = re.compile(rb"[^ ] ")
        splits = not any(map(crossing.search, pieces[FIRST_PIECE:]))
        self._chunks = re.compile(r" *[^ ]+| +" if splits else r"(?s:.+)")
        self._cache: dict[str, tuple[int, ...]] = {}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the bytes of the file: a tokenizer has only one encoding."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def file_fingerprint(self) -> str:
        """The same as `fingerprint`."""
        return self.fingerprint

    @classmethod
    def from_bytes(cls, data: bytes, source: Path | str = "tokenizer.bin") -> Llama2cTokenizer:
        """Parse a tokenizer.bin; raises BadInput naming `source` if it is invalid."""
        try:
            return cls(*_parse(data))
        except BadInput as error:
            raise BadInput(f"{source}: not a llama2.c tokenizer: {error}") from None

    @classmethod
    def read(cls, path: Path | str) -> Llama2cTokenizer:
        """Read a tokenizer.bin; raises BadInput naming the file."""
        return cls.from_bytes(read_bytes(path, MAX_FILE_BYTES, "a llama2.c tokenizer"), path)

    def to_bytes(self) -> bytes:
        """Serialize to the bytes of a file; the inverse of `from_bytes`."""
        chunks = [struct.pack("<I", self.max_token_length)]
        for piece, score in zip(self.pieces, self.scores, strict=True):
            chunks += (struct.pack("<fI", score, len(piece)), piece)
        return b"".join(chunks)

    def save(self, folder: Path | str, prefix: str = "") -> Path:
        """Write `tokenizer.bin`, its name after `prefix`, into a folder, atomically."""
        path = Path(folder) / (prefix + self.file_name)
        with atomic_file(path) as file:
            file.write(self.to_bytes())
        return path

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Encode a text, with a space added in front, as sentencepiece does."""
        ids = [1] if bos else []
        if not text:
            return ids
        for chunk in self._chunks.findall(" " + text):
            cached = self._cache.get(chunk)
            if cached is None:
                cached = tuple(self._merge(chunk))
                if len(chunk) <= _CACHED_CHUNK:
                    if len(self._cache) >= _CACHE_ENTRIES:
                        self._cache.clear()
                    self._cache[chunk] = cached
            ids += cached
        return ids

    def _merge(self, chunk: str) -> list[int]:
        """Merge neighbours by score: a heap of candidates (best score, then leftmost) over a linked
        list. Characters without an id become -byte for each of their bytes."""
        ids: list[int] = []
        for character in chunk:
            raw = utf8_bytes(character)
            token = self._ids.get(raw)
            ids += (-byte for byte in raw) if token is None else (token,)
        before = list(range(-1, len(ids) - 1))
        after = [*range(1, len(ids)), -1]
        heap: list[tuple[float, int, int, int, int]] = []

        def push_pair(left: int, right: int) -> None:
            if left < 0 or right < 0 or ids[left] <= 0 or ids[right] <= 0:
                return
            merged = self._ids.get(self.pieces[ids[left]] + self.pieces[ids[right]])
            if merged is not None:
                score = -self.scores[merged]
                heapq.heappush(heap, (score, left, ids[left], ids[right], merged))

        for left in range(len(ids) - 1):
            push_pair(left, left + 1)
        removed = FIRST_BYTE - 1  # an id that text never has
        while heap:
            _, left, left_id, right_id, merged = heapq.heappop(heap)
            right = after[left]
            if right < 0 or ids[left] != left_id or ids[right] != right_id:
                continue
            ids[left], ids[right] = merged, removed
            after[left] = after[right]
            if after[left] >= 0:
                before[after[left]] = left
            push_pair(before[left], left)
            push_pair(left, after[left])
        return [i if i > 0 else FIRST_BYTE - i for i in ids if i != removed]

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids, without the space that `encode` added. 1 and 2 are skipped, and ids outside
        the vocabulary, the padding of some models.

        To decode a continuation, push its prompt through `decoder()` first: otherwise its leading
        space is removed as the added one.
        """
        stream = self.decoder()
        return "".join([stream.push(token) for token in ids]) + stream.finish()

    def decoder(self) -> Utf8Stream:
        """Make a decoder for a stream of ids."""
        return Utf8Stream(self._piece_bytes, 1)

    def piece(self, token: int) -> str:
        """Return the piece of an id."""
        return self.pieces[token].decode("utf-8", "replace")

    def _piece_bytes(self, token: int, first: bool) -> bytes:
        if not 0 <= token < self.vocab_size:
            return b""
        if FIRST_BYTE <= token < FIRST_PIECE:
            return bytes([token - FIRST_BYTE])
        if token in (1, 2):
            return b""
        piece = self.pieces[token]
        return piece[1:] if first and piece.startswith(b" ") else piece


def _parse(data: bytes) -> tuple[list[bytes], list[float], int]:
    if len(data) < 4:
        raise BadInput("the file is too short")
    (max_token_length,) = struct.unpack_from("<I", data)
    pieces: list[bytes] = []
    scores: list[float] = []
    offset = 4
    while offset < len(data):
        if len(pieces) == MAX_PIECES:
            raise BadInput(f"more than the {MAX_PIECES} pieces supported")
        if offset + 8 > len(data):
            raise BadInput(f"the file ends within piece {len(pieces)}")
        score, length = struct.unpack_from("<fI", data, offset)
        offset += 8
        if offset + length > len(data):
            raise BadInput(f"the file ends within piece {len(pieces)}")
        pieces.append(data[offset : offset + length])
        scores.append(score)
        offset += length
    return pieces, scores, max_token_length


def from_sentencepiece(
    model: bytes, source: Path | str = "sentencepiece model"
) -> Llama2cTokenizer:
    """Convert a serialized sentencepiece BPE model with byte fallback, as llama2.c does.

    Only pieces and scores are used. Raises BadInput naming `source` for a model of another kind, or
    with features that a tokenizer.bin lacks (normalization, removal of extra spaces, user-defined
    pieces); MissingExtra without sentencepiece.
    """
    processor = _sentencepiece(f"reading {source}").SentencePieceProcessor()
    try:
        without_stderr(lambda: processor.LoadFromSerializedProto(model))
        n = processor.vocab_size()
    except (RuntimeError, TypeError) as error:
        raise BadInput(f"{source}: not a sentencepiece model ({error})") from error
    pieces = [processor.id_to_piece(i).replace("\u2581", " ").encode("utf-8") for i in range(n)]
    scores = [processor.get_score(i) for i in range(n)]
    pieces[: min(3, n)] = SPECIALS[: min(3, n)]
    special = (processor.unk_id(), processor.bos_id(), processor.eos_id())
    if n < FIRST_PIECE or special != (0, 1, 2) or not processor.is_byte(FIRST_BYTE):
        raise BadInput(f"{source}: must have ids 0 unknown, 1 BOS, 2 EOS, 3 to 258 the bytes")
    try:
        tokenizer = Llama2cTokenizer(pieces, scores)
    except BadInput as error:
        raise BadInput(f"{source}: {error}") from None
    unscored = [pieces[i].decode("utf-8") for i in range(FIRST_PIECE, n) if scores[i] >= 0]
    for text in (*_PROBES, *unscored[:_MAX_UNSCORED]):
        if tokenizer.encode(text, bos=False) != processor.encode(text):
            raise BadInput(
                f"{source}: text normalization and user-defined pieces are not supported; convert "
                "it to a tokenizer.json"
            )
    return tokenizer


# Texts that normalization, or a missing leading space, would change.
_PROBES = (
    "a",
    "  two  spaces and\ta tab ",
    "line\nline",
    "\uff21\u00bd\ufb01 e\u0301 \u00c5 \u2126 \u200b\u00a0x",
    "12 \U0001f600",
)
# User-defined pieces have a score of 0, as has the first learned piece.
_MAX_UNSCORED = 256


def train_llama2c(texts: Iterable[str], vocab_size: int) -> Llama2cTokenizer:
    """Train BPE on the lines of texts, with the settings of llama2.c's custom vocabularies.

    The same texts in the same order give the same tokenizer. Raises BadInput if the texts are too
    small for `vocab_size`, or have too many distinct characters; MissingExtra without
    sentencepiece.
    """
    if not FIRST_PIECE < vocab_size <= MAX_PIECES:
        raise BadInput(
            f"vocabulary size {vocab_size}: must be from {FIRST_PIECE + 1} to {MAX_PIECES} "
            f"({FIRST_PIECE} pieces are control characters and bytes)"
        )
    trainer = _sentencepiece("training a tokenizer").SentencePieceTrainer
    model = io.BytesIO()
    try:
        trainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=1.0,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,  # as in Llama 2's tokenizer: runs of spaces are text
            split_digits=True,
            allow_whitespace_only_pieces=True,
            unk_surface=" \u2047 ",
            max_sentence_length=4 * _MAX_SENTENCE,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size) from error
    return from_sentencepiece(model.getvalue())


def _training_error(message: str, vocab_size: int) -> BadInput:
    if match := re.search(r"value <= (\d+)", message):
        return BadInput(
            f"vocabulary size {vocab_size}: too large for this text; "
            f"use at most {match[1]}, or more text"
        )
    if match := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return BadInput(
            f"vocabulary size {vocab_size}: the text has too many distinct characters; "
            f"use at least {match[1]}"
        )
    if "sentences_.empty()" in message:
        return BadInput(f"vocabulary size {vocab_size}: no text to train a tokenizer on")
    return BadInput(f"vocabulary size {vocab_size}: sentencepiece failed: {message}")


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            while len(line) > _MAX_SENTENCE:
                cut = line.rfind(" ", 1, _MAX_SENTENCE)
                cut = cut if cut > 0 else _MAX_SENTENCE
                yield line[:cut]
                line = line[cut:]
            if line:
                yield line


def _sentencepiece(purpose: str) -> Any:
    try:
        import sentencepiece
    except ImportError:
        raise MissingExtra("sentencepiece", "tokenizer", purpose) from None
    return sentencepiece
