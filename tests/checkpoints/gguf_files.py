"""Small GGUF files made by hand, byte by byte, so that their damage can be chosen."""

import math
import struct

import torch

_INTEGERS = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}


def string(text):
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(content):
    """The type and the bytes of a value: bool, int, float, text, or a list of one of these."""
    if isinstance(content, list):
        parts = [value(each) for each in content]
        kind = parts[0][:4] if parts else struct.pack("<I", 4)
        payload = b"".join(part[4:] for part in parts)
        return struct.pack("<I", 9) + kind + struct.pack("<Q", len(content)) + payload
    if isinstance(content, str | bytes):
        return struct.pack("<I", 8) + string(content)
    kind, form = _INTEGERS[type(content)]
    return struct.pack(f"<I{form}", kind, content)


def tensor(name, shape, kind, offset):
    dimensions = list(reversed(shape))
    return string(name) + struct.pack(
        f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset
    )


def gguf_bytes(metadata, tensors, alignment=32, version=3):
    """`tensors` maps a name to (shape, type, bytes)."""
    table, data = b"", b""
    for name, (shape, kind, raw) in tensors.items():
        table += tensor(name, shape, kind, len(data))
        data += raw + bytes(-len(raw) % alignment)
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(string(key) + value(each) for key, each in metadata.items()) + table
    return head + bytes(-len(head) % alignment) + data


DIM, LAYERS, HEADS, KV_HEADS, HIDDEN, ROWS, CONTEXT = 64, 2, 4, 2, 96, 40, 24


def metadata(architecture="llama", **changes):
    """What a llama file has at least; `changes` by the last part of the key, None removes."""
    prefix = architecture
    entries = {
        "general.architecture": architecture,
        f"{prefix}.block_count": LAYERS,
        f"{prefix}.embedding_length": DIM,
        f"{prefix}.feed_forward_length": HIDDEN,
        f"{prefix}.attention.head_count": HEADS,
        f"{prefix}.attention.head_count_kv": KV_HEADS,
        f"{prefix}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{prefix}.context_length": CONTEXT,
    }
    entries |= {key.replace("__", "."): each for key, each in changes.items()}
    return {key: each for key, each in entries.items() if each is not None}


def shapes(tied=False):
    found = {"token_embd.weight": (ROWS, DIM)}
    for i in range(LAYERS):
        for name, shape in {
            "attn_norm": (DIM,),
            "attn_q": (DIM, DIM),
            "attn_k": (DIM // HEADS * KV_HEADS, DIM),
            "attn_v": (DIM // HEADS * KV_HEADS, DIM),
            "attn_output": (DIM, DIM),
            "ffn_norm": (DIM,),
            "ffn_gate": (HIDDEN, DIM),
            "ffn_up": (HIDDEN, DIM),
            "ffn_down": (DIM, HIDDEN),
        }.items():
            found[f"blk.{i}.{name}.weight"] = shape
    found["output_norm.weight"] = (DIM,)
    if not tied:
        found["output.weight"] = (ROWS, DIM)
    return found


def tensors(tied=False, seed=0):
    """Random float32 tensors, as `gguf_bytes` takes them, and as tensors."""
    generator = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes(tied).items()}
    raw = {name: (tuple(t.shape), 0, t.numpy().tobytes()) for name, t in values.items()}
    assert all(math.prod(shape) * 4 == len(data) for shape, _, data in raw.values())
    return raw, values


def small_file(tokenizer):
    """The bytes of a model of a few kilobytes with a tokenizer, "llama" or "gpt2"; one matrix each
    is F16, BF16, Q8_0 and Q4_0."""
    changes = {
        "embedding_length": 32,
        "feed_forward_length": 32,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "block_count": 1,
    }
    entries = metadata(**{f"llama__{key.replace('.', '__')}": n for key, n in changes.items()})
    if tokenizer == "llama":
        pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        pieces += ["\u2581", "a", "b", "\u2581a", "ab", "\u2581ab"]
        keys = {
            "scores": [-float(i) for i in range(len(pieces))],
            "token_type": [2, 3, 3, *[6] * 256, *[1] * 6],
        }
    else:
        pieces = [chr(code) for code in range(33, 127)] + ["\u0120", "\u0120a", "ca", "<|x|>"]
        keys = {
            "pre": "llama-bpe",
            "merges": ["\u0120 a", "c a"],
            "token_type": [*[1] * (len(pieces) - 1), 3],
            "bos_token_id": len(pieces) - 1,
        }
    keys |= {"model": tokenizer, "tokens": pieces}
    entries |= {f"tokenizer.ggml.{key}": each for key, each in keys.items()}
    entries["tokenizer.chat_template"] = "{{ messages }}"
    table = {"token_embd.weight": (len(pieces), 32), "blk.0.attn_norm.weight": (32,)}
    table |= {f"blk.0.attn_{x}.weight": (16, 32) for x in "kv"}
    table |= {f"blk.0.{name}.weight": (32, 32) for name in ("attn_q", "attn_output")}
    table |= {f"blk.0.ffn_{name}.weight": (32, 32) for name in ("gate", "up", "down")}
    table |= {"blk.0.ffn_norm.weight": (32,), "output_norm.weight": (32,)}
    kinds = {"attn_q": (8, 34 / 32), "attn_k": (2, 18 / 32), "attn_v": (1, 2), "ffn_up": (30, 2)}
    data = {}
    for name, shape in table.items():
        kind, size = kinds.get(name.removeprefix("blk.0.").removesuffix(".weight"), (0, 4))
        raw = struct.pack("<e", 0.5) * (int(math.prod(shape) * size) // 2)
        data[name] = (shape, kind, raw)
    return gguf_bytes(entries, data)
