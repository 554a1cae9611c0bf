"""llama2.c's tokenizer.bin: sentencepiece BPE with a byte for every character it lacks.

The file is `<I` max_token_length, then per piece `<fI` score, length and the raw bytes. Piece 0 is
unknown, 1 begins a text, 2 ends it, 3..258 are the 256 bytes; a space stands for itself. How many
pieces there are is not stored: the model's header says it.
"""

from __future__ import annotations

import codecs
import hashlib
import heapq
import io
import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from onelaunch.checkpoints.atomic import atomic_file, read_bytes
from onelaunch.checkpoints.foreign_stderr import without_stderr
from onelaunch.errors import BadInput, MissingExtra

FIRST_BYTE = 3
FIRST_PIECE = FIRST_BYTE + 256
_SPECIALS = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % byte for byte in range(256))]

# Far beyond any real file (32,000 pieces take 434 kB); larger ones are refused unread.
MAX_FILE_BYTES = 16 << 20
MAX_PIECES = 1 << 18

# Longer chunks are rare and not worth remembering; the memory is emptied when it is full.
_CACHED_CHUNK = 64
_CACHE_ENTRIES = 1 << 16

# sentencepiece reads sentences; a longer line is cut so that it cannot skip or choke on it.
_SENTENCE = 4000


class Utf8Stream:
    """Turns ids into text as soon as their bytes are whole characters.

    `piece(id, first)` gives an id's bytes; `first` is true at the beginning of a text. Bytes that
    are not UTF-8 become U+FFFD.
    """

    def __init__(self, piece: Callable[[int, bool], bytes], bos_id: int) -> None:
        self._piece = piece
        self._bos_id = bos_id
        self._first = True
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that this id completes, which may be empty."""
        text = self._utf8.decode(self._piece(token, self._first))
        self._first = token == self._bos_id
        return text

    def finish(self) -> str:
        """What is left: U+FFFD for a character that was cut off, or nothing."""
        return self._utf8.decode(b"", final=True)


def utf8_bytes(text: str) -> bytes:
    """A text's UTF-8; bytes that Python smuggled in from a terminal come back as they were."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise BadInput(f"the text is not valid Unicode: {error.reason}") from None


class Llama2cTokenizer:
    """Pieces and scores of a llama2.c tokenizer.

    Equal to sentencepiece's BPE: the best-scoring neighbours are joined, the leftmost of equals
    first, until no two neighbours make a piece. Control and byte pieces are never made from text.
    """

    kind = "llama2c"
    file_name = "tokenizer.bin"
    bos_id: int | None = 1
    eos_id: int | None = 2
    stop_ids: tuple[int, ...] = (1, 2)

    def __init__(
        self, pieces: list[bytes], scores: list[float], max_token_length: int | None = None
    ) -> None:
        """Raises BadInput unless the first 259 pieces are the three control pieces and the bytes,
        and there is one finite score per piece."""
        if len(pieces) < FIRST_PIECE or pieces[FIRST_BYTE:FIRST_PIECE] != _SPECIALS[FIRST_BYTE:]:
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
        # No piece has a space behind another character, as good as always: then nothing joins
        # across such a place, the text falls apart there, and each part needs merging once.
        crossing = re.compile(rb"[^ ] ")
        falls_apart = not any(map(crossing.search, pieces[FIRST_PIECE:]))
        self._chunks = re.compile(r" *[^ ]+| +" if falls_apart else r"(?s:.+)")
        self._cache: dict[str, tuple[int, ...]] = {}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the file's bytes, which have one form only."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def file_fingerprint(self) -> str:
        """The same."""
        return self.fingerprint

    @classmethod
    def from_bytes(cls, data: bytes, source: Path | str = "tokenizer.bin") -> Llama2cTokenizer:
        """Parse a tokenizer.bin; raises BadInput naming `source` where it is not one."""
        try:
            return cls(*_parse(data))
        except BadInput as error:
            raise BadInput(f"{source}: not a llama2.c tokenizer: {error}") from None

    @classmethod
    def read(cls, path: Path | str) -> Llama2cTokenizer:
        """Read a tokenizer.bin; raises BadInput naming the file."""
        return cls.from_bytes(read_bytes(path, MAX_FILE_BYTES, "a llama2.c tokenizer"), path)

    def to_bytes(self) -> bytes:
        """The file's bytes; the inverse of `from_bytes`."""
        parts = [struct.pack("<I", self.max_token_length)]
        for piece, score in zip(self.pieces, self.scores, strict=True):
            parts += (struct.pack("<fI", score, len(piece)), piece)
        return b"".join(parts)

    def save(self, folder: Path | str, prefix: str = "") -> Path:
        """Write `tokenizer.bin`, `prefix` before its name, into a folder, atomically."""
        path = Path(folder) / (prefix + self.file_name)
        with atomic_file(path) as file:
            file.write(self.to_bytes())
        return path

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Token ids of a text; a space is put before it, as sentencepiece does."""
        ids = [1] if bos else []
        if not text:
            return ids
        for chunk in self._chunks.findall(" " + text):
            known = self._cache.get(chunk)
            if known is None:
                known = tuple(self._merge(chunk))
                if len(chunk) <= _CACHED_CHUNK:
                    if len(self._cache) >= _CACHE_ENTRIES:
                        self._cache.clear()
                    self._cache[chunk] = known
            ids += known
        return ids

    def _merge(self, chunk: str) -> list[int]:
        """Join the best neighbours until there are none: a heap of candidates (best score, then
        leftmost) over a linked list. Ids are those of characters, or -byte where there is none."""
        ids: list[int] = []
        for character in chunk:
            raw = utf8_bytes(character)
            known = self._ids.get(raw)
            ids += (-byte for byte in raw) if known is None else (known,)
        before = list(range(-1, len(ids) - 1))
        after = [*range(1, len(ids)), -1]
        heap: list[tuple[float, int, int, int, int]] = []

        def consider(left: int, right: int) -> None:
            if left < 0 or right < 0 or ids[left] <= 0 or ids[right] <= 0:
                return
            merged = self._ids.get(self.pieces[ids[left]] + self.pieces[ids[right]])
            if merged is not None:
                score = -self.scores[merged]
                heapq.heappush(heap, (score, left, ids[left], ids[right], merged))

        for left in range(len(ids) - 1):
            consider(left, left + 1)
        gone = FIRST_BYTE - 1  # an id that no text has
        while heap:
            _, left, left_id, right_id, merged = heapq.heappop(heap)
            right = after[left]
            if right < 0 or ids[left] != left_id or ids[right] != right_id:
                continue
            ids[left], ids[right] = merged, gone
            after[left] = after[right]
            if after[left] >= 0:
                before[after[left]] = left
            consider(before[left], left)
            consider(left, after[left])
        return [i if i > 0 else FIRST_BYTE - i for i in ids if i != gone]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, without the space that `encode` put before it; 1 and 2 are silent, and
        so are ids beyond the vocabulary, which a model may have for padding.

        To decode a continuation alone, push its prompt through `decoder()` first, or its leading
        space is taken for the added one.
        """
        stream = self.decoder()
        return "".join([stream.push(token) for token in ids]) + stream.finish()

    def decoder(self) -> Utf8Stream:
        """Decodes id by id."""
        return Utf8Stream(self._piece_bytes, 1)

    def piece(self, token: int) -> str:
        """An id's name in the vocabulary."""
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
            raise BadInput(f"it has more than the {MAX_PIECES} pieces supported")
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

    Only pieces and scores are taken. Raises BadInput naming `source` for a model that does more
    (normalizes text, collapses spaces, has pieces that users defined) or is of another kind,
    MissingExtra without sentencepiece.
    """
    processor = _sentencepiece(f"reading {source}").SentencePieceProcessor()
    try:
        without_stderr(lambda: processor.LoadFromSerializedProto(model))
        n = processor.vocab_size()
    except (RuntimeError, TypeError) as error:
        raise BadInput(f"{source}: not a sentencepiece model ({error})") from error
    pieces = [processor.id_to_piece(i).replace("\u2581", " ").encode("utf-8") for i in range(n)]
    scores = [processor.get_score(i) for i in range(n)]
    pieces[: min(3, n)] = _SPECIALS[: min(3, n)]
    special = (processor.unk_id(), processor.bos_id(), processor.eos_id())
    if n < FIRST_PIECE or special != (0, 1, 2) or not processor.is_byte(FIRST_BYTE):
        raise BadInput(f"{source}: needs ids 0 unknown, 1 begin, 2 end, 3 to 258 the bytes")
    try:
        made = Llama2cTokenizer(pieces, scores)
    except BadInput as error:
        raise BadInput(f"{source}: {error}") from None
    unscored = [pieces[i].decode("utf-8") for i in range(FIRST_PIECE, n) if scores[i] >= 0]
    for text in (*_PROBES, *unscored[:_MOST_UNSCORED]):
        if made.encode(text, bos=False) != processor.encode(text):
            raise BadInput(
                f"{source}: it rewrites a text before splitting it, or has pieces that users "
                "defined, which is not read here; convert it to a tokenizer.json"
            )
    return made


# What normalization, or a missing space before the text, would change.
_PROBES = (
    "a",
    "  two  spaces and\ta tab ",
    "line\nline",
    "\uff21\u00bd\ufb01 e\u0301 \u00c5 \u2126 \u200b\u00a0x",
    "12 \U0001f600",
)
# Pieces that users define have a score of 0, beside the first that was learnt.
_MOST_UNSCORED = 256


def train_llama2c(texts: Iterable[str], vocab_size: int) -> Llama2cTokenizer:
    """Train BPE on the texts' lines, with the settings of llama2.c's custom vocabularies.

    The same texts in the same order give the same tokenizer. Raises BadInput where the texts are
    too small for `vocab_size`, or have more distinct characters than fit; MissingExtra without
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
            remove_extra_whitespaces=False,  # as in Llama 2's own: runs of spaces are text
            split_digits=True,
            allow_whitespace_only_pieces=True,
            unk_surface=" \u2047 ",
            max_sentence_length=4 * _SENTENCE,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size) from error
    return from_sentencepiece(model.getvalue())


def _training_error(message: str, vocab_size: int) -> BadInput:
    if found := re.search(r"value <= (\d+)", message):
        return BadInput(
            f"vocabulary size {vocab_size}: the text is too small for it; "
            f"take at most {found[1]}, or more text"
        )
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return BadInput(
            f"vocabulary size {vocab_size}: the text has too many distinct characters for it; "
            f"take at least {found[1]}"
        )
    if "sentences_.empty()" in message:
        return BadInput(f"vocabulary size {vocab_size}: there is no text to train a tokenizer on")
    return BadInput(f"vocabulary size {vocab_size}: sentencepiece cannot train it: {message}")


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            while len(line) > _SENTENCE:
                cut = line.rfind(" ", 1, _SENTENCE)
                cut = cut if cut > 0 else _SENTENCE
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
