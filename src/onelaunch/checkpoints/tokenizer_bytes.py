"""The byte tokenizer: a vocabulary of the 256 bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from onelaunch.checkpoints.atomic import write_text
from onelaunch.checkpoints.tokenizer_llama2c import (
    FIRST_BYTE,
    FIRST_PIECE,
    LLAMA2C_SPECIAL_TOKENS,
    Utf8Stream,
    utf8_bytes,
)


class BytesTokenizer:
    """One token per byte: id = byte + 3, as in llama2.c's vocabularies; 1 is BOS and 2 is EOS."""

    kind = "bytes"
    file_name = "tokenizer.bytes"
    vocab_size = FIRST_PIECE
    bos_id: int | None = 1
    eos_id: int | None = 2
    stop_ids: tuple[int, ...] = (1, 2)
    special_tokens: Mapping[str, int] = LLAMA2C_SPECIAL_TOKENS
    fingerprint = file_fingerprint = hashlib.sha256(b"bytes").hexdigest()

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Encode a text to one id per UTF-8 byte."""
        ids = [FIRST_BYTE + byte for byte in utf8_bytes(text)]
        return [1, *ids] if bos else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids; 0, 1, 2 and those above 258 are skipped."""
        stream = self.decoder()
        return "".join([stream.push(token) for token in ids]) + stream.finish()

    def decoder(self) -> Utf8Stream:
        """Make a decoder for a stream of ids."""
        return Utf8Stream(_byte, 1)

    def piece(self, token: int) -> str:
        """Return the byte of an id, as "<0x41>"."""
        return f"<0x{token - FIRST_BYTE:02X}>" if token >= FIRST_BYTE else f"<{token}>"

    def save(self, folder: Path | str, prefix: str = "") -> Path:
        """Write `tokenizer.bytes`, its name after `prefix`, a file with the word "bytes"."""
        path = Path(folder) / (prefix + self.file_name)
        write_text(path, "bytes")
        return path


def _byte(token: int, first: bool) -> bytes:
    return bytes([token - FIRST_BYTE]) if FIRST_BYTE <= token < FIRST_PIECE else b""
