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
