"""What a measured choice depends on: a model's shape, a device, versions and sources."""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import torch

from onelaunch.compilation.cache import Store, program_key
from onelaunch.config import ModelConfig

SHAPE = (
    "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "qk_norm",
)  # fmt: skip

Facts = dict[str, str | int | bool]


def shape_of(config: ModelConfig) -> Facts:
    """What of a model kernels depend on."""
    return {name: getattr(config, name) for name in SHAPE}


@cache
def device_facts(device: torch.device) -> dict[str, str | int]:
    """The facts of a device and its compilers that a choice depends on."""
    import triton

    name, multiprocessors = device.type, 0
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, multiprocessors = properties.name, properties.multi_processor_count
    return {
        "device": name,
        "multiprocessors": multiprocessors,
        "torch": str(torch.__version__),
        "triton": triton.__version__,
    }


_digests: dict[str, bytes] = {}


def digest_of(store: Store, files: Sequence[Path], what: str) -> bytes:
    """A digest of the syntax trees of source files, without comments, docstrings and line numbers:
    an edit of these leaves what was measured as it is. Parsing takes up to 0.4 s, so the digest is
    kept by the files' bytes."""
    read = [(file.name.encode(), file.read_bytes()) for file in files]
    raw = b"\0".join(name + b"\0" + text for name, text in read)
    key = program_key(raw, {"what": "a digest of syntax trees", "python": sys.version})
    digest = _digests.get(key) or store.peek(key)
    if digest is None:
        trees = (name + b"\0" + syntax(text.decode()) for name, text in read)
        digest = hashlib.sha256(b"\0".join(trees)).digest()
        store.put(key, digest, {"what": what})
    _digests[key] = digest
    return digest


def syntax(source: str) -> bytes:
    """A module's syntax tree as bytes, without its docstrings."""
    tree = ast.parse(source)
    for node in _with_docstrings(tree):
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            first.value.value = ""
    return ast.dump(tree).encode()


def _with_docstrings(
    tree: ast.Module,
) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
