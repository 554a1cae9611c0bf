"""Damage files of every readable format and see that only the package's own error comes out.

    python tests/fuzz.py --format llama2c --examples 10000 --seed 0

makes a small valid file, mutates it with hypothesis, reads each mutant with the package's reader
and uses what it gives a little. Fails where anything but OnelaunchError escapes (a Rust panic or
MemoryError too), or where the peak resident memory of this process ever grows by more than 256 MB
over its value after imports. The offending file is kept and named. Run one format per process:
memory's peak belongs to the process.

A format is a row of FORMATS: how to make a valid file, how to read and use it, how to mutate it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import struct
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Set before hypothesis is imported: it would put a folder into the working directory.
os.environ.setdefault(
    "HYPOTHESIS_STORAGE_DIRECTORY", str(Path(tempfile.gettempdir()) / "onelaunch-hypothesis")
)
# A caught panic's backtrace would fill the screen, and its symbols the memory that is measured.
os.environ["RUST_BACKTRACE"] = "0"

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

MEMORY_LIMIT = 256 << 20
_HEADROOM = 2 << 30

# Hypothesis remembers what it has drawn, about 13 kB an example, until a batch ends.
_BATCH = 1000


# ---------------------------------------------------------------- mutations

_NUMBERS = [0, 1, 2, 3, 7, 127, 128, 255, 256, 65535, 65536, 1 << 20, 1 << 24, (1 << 24) + 1]
_NUMBERS += [(1 << 30), (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, (1 << 62)]
_NUMBERS += [(1 << 63) - 1, (1 << 64) - 1, (1 << 64) - 8, (1 << 64) - (1 << 31)]

_HOT = 64  # headers live here; half of all places are drawn from it


@st.composite
def mutated_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """One to four edits: flipped bits, cuts, insertions, extreme numbers, repeated pieces."""
    if draw(st.integers(0, 39)) == 0:
        return draw(st.binary(max_size=300))
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        end = max(len(out) - 1, 0)
        place = draw(st.one_of(st.integers(0, min(_HOT, end)), st.integers(0, end)))
        kind = draw(st.sampled_from(["flip", "number", "number", "cut", "drop", "insert", "copy"]))
        if kind == "flip":
            out[place : place + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "number":
            width = draw(st.sampled_from([4, 4, 8, 2]))
            place -= place % draw(st.sampled_from([4, 1]))
            number = draw(st.one_of(st.sampled_from(_NUMBERS), st.integers(0, 1 << 33)))
            out[place : place + width] = (number % (1 << 8 * width)).to_bytes(width, "little")
        elif kind == "cut":
            del out[place:]
        elif kind == "drop":
            del out[place : place + draw(st.integers(1, 64))]
        elif kind == "insert":
            out[place:place] = draw(st.binary(min_size=1, max_size=64))
        else:
            out += out[place : place + draw(st.integers(1, 4096))]
    return bytes(out)


_DEEP = "@deep@"
_ODD_VALUES: list[Any] = [
    None, True, False, 0, 1, 2, 3, -1, 7, 0.5, 1 << 24, 1 << 31, 1 << 53, 1 << 64, 10**40, 1e308,
    -0.0, float("nan"), float("inf"), "", "x", "0", "../x", "/dev/zero", "/", "a\0b", "\ud800",
    "F64", "I8", "BF16", "BOOL", "llama", "float16", "x" * 5000, _DEEP, [], {}, [0], [[]],
    [1, 1 << 62], [-1, 4], [1 << 40, 1 << 40], list(range(3000)), {"": None}, {"x": {"y": [1]}},
]  # fmt: skip


def _places(node: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON document, in order."""
    found: list[tuple[Any, Any]] = []
    waiting = [node]
    while waiting:
        at = waiting.pop()
        keys = list(at) if isinstance(at, dict) else range(len(at))
        for key in keys:
            found.append((at, key))
            if isinstance(at[key], dict | list):
                waiting.append(at[key])
    return found


@st.composite
def mutated_json(draw: st.DrawFn, data: bytes) -> bytes:
    """Values replaced, swapped or deleted, keys added; or the text itself damaged."""
    if draw(st.integers(0, 4)) == 0:
        return draw(mutated_bytes(data))
    root = {"root": json.loads(data)}
    for _ in range(draw(st.integers(1, 3))):
        places = _places(root)
        if not places:
            break
        container, key = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(["value", "value", "number", "other", "delete", "add"]))
        if kind == "value":
            container[key] = deepcopy(draw(st.sampled_from(_ODD_VALUES)))
        elif kind == "number":
            container[key] = draw(st.one_of(st.integers(-9, 1 << 33), st.floats()))
        elif kind == "other":
            other, its_key = draw(st.sampled_from(places))
            container[key] = deepcopy(other[its_key])
        elif kind == "delete":
            del container[key]
        elif isinstance(container, dict):
            container[draw(st.sampled_from(["x", "", f"{key}_", "a.b"]))] = deepcopy(container[key])
        else:
            container.insert(key, deepcopy(draw(st.sampled_from(_ODD_VALUES))))
    text = json.dumps(root.get("root"))
    return text.replace(f'"{_DEEP}"', "[" * 5000 + "]" * 5000).encode()


@st.composite
def mutated_safetensors(draw: st.DrawFn, data: bytes) -> bytes:
    """The JSON header mutated under a length that fits it; or the bytes damaged anywhere."""
    if draw(st.integers(0, 2)) == 0:
        return draw(mutated_bytes(data))
    (length,) = struct.unpack_from("<Q", data)
    header = draw(mutated_json(data[8 : 8 + length]))
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


@st.composite
def mutated_archive(draw: st.DrawFn, data: bytes) -> bytes:
    """A record of a zip archive mutated, the archive around it whole; or its bytes damaged."""
    if draw(st.integers(0, 2)) == 0:
        return draw(mutated_bytes(data))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    pickled = [name for name in records if name.endswith(".pkl")]
    chosen = draw(st.sampled_from([*pickled * len(records), *records]))
    records[chosen] = draw(mutated_bytes(records[chosen]))
    if draw(st.integers(0, 9)) == 0:
        del records[draw(st.sampled_from(list(records)))]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return out.getvalue()


# ---------------------------------------------------------------- formats


@dataclass(frozen=True)
class Fuzzed:
    """`make` writes a valid file into a folder and returns its path, the file to be damaged;
    `use` reads it (or the folder it lies in) and uses the result; `mutate` damages its bytes."""

    make: Callable[[Path], Path]
    use: Callable[[Path], None]
    mutate: Callable[[bytes], st.SearchStrategy[bytes]]


def _small_model() -> Any:
    from onelaunch.checkpoints.weights import LoadedModel
    from onelaunch.config import ModelConfig
    from onelaunch.model import Model

    config = ModelConfig(
        dim=8,
        n_layers=2,
        n_heads=2,
        n_kv_heads=1,
        hidden_dim=6,
        vocab_size=16,
        max_seq_len=8,
        tied_embeddings=False,
    )
    return LoadedModel(config, Model(config).init_weights(0).state_dict())


def _touch(model: Any) -> None:
    float(next(iter(model.weights.values())).sum())


def _make_llama2c(folder: Path) -> Path:
    from onelaunch.checkpoints import llama2c

    llama2c.write(_small_model(), folder / "model.bin")
    return folder / "model.bin"


def _use_llama2c(path: Path) -> None:
    from onelaunch.checkpoints import llama2c

    model = llama2c.read(path)
    _touch(model)
    again = path.with_name("again.bin")
    llama2c.write(model, again)
    assert again.read_bytes() == path.read_bytes(), "write(read(file)) is not the file"


def _make_llama2c_int8(folder: Path) -> Path:
    from onelaunch.checkpoints import llama2c_versions

    llama2c_versions.write(_small_model(), folder / "model.bin")
    return folder / "model.bin"


def _make_llama2c_v1(folder: Path) -> Path:
    """Nothing writes version 1 any more: the header and the tensors by hand."""
    from onelaunch.checkpoints import llama2c_versions

    model = _small_model()
    config = model.config
    sizes = (config.dim, config.hidden_dim, config.n_layers, config.n_heads, config.n_kv_heads)
    header = struct.pack("<4s8iB", b"24ka", 1, *sizes, config.vocab_size, config.max_seq_len, 0)
    names = [name for name, _ in llama2c_versions._tensors(config)]
    body = b"".join(model.weights[name].numpy().tobytes() for name in names)
    path = folder / "model.bin"
    path.write_bytes(header.ljust(256, b"\0") + body)
    return path


def _use_llama2c_versions(path: Path) -> None:
    from onelaunch.checkpoints import llama2c_versions

    _touch(llama2c_versions.read(path))


def _make_checkpoint(folder: Path) -> Path:
    import torch

    from onelaunch.checkpoints import llama2c_checkpoint

    model = _small_model()
    names = {new: old for old, new in llama2c_checkpoint._LAYER_NAMES.items()}
    names |= {new: old for old, new in llama2c_checkpoint._WHOLE_NAMES.items()}
    state = {}
    for name, tensor in model.weights.items():
        stem = name.removesuffix(".weight")
        layer, _, kind = stem.removeprefix("layers.").partition(".")
        own = f"layers.{layer}.{names[kind]}" if kind else names[stem]
        state[f"_orig_mod.{own}.weight"] = tensor
    config = model.config
    sizes = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
    args = {name: getattr(config, name) for name in sizes}
    path = folder / "ckpt.pt"
    torch.save({"model": state, "model_args": args, "best_val_loss": torch.tensor(1.5)}, path)
    return path


def _use_checkpoint(path: Path) -> None:
    from onelaunch.checkpoints import llama2c_checkpoint

    _touch(llama2c_checkpoint.read(path))


def _make_gguf(kind: str) -> Callable[[Path], Path]:
    """A model with a tokenizer of a kind, and a tensor of each type."""

    def make(folder: Path) -> Path:
        _find_tests()
        from tests.checkpoints import gguf_files

        path = folder / "model.gguf"
        path.write_bytes(gguf_files.small_file(kind))
        return path

    return make


def _use_gguf(path: Path) -> None:
    from onelaunch.checkpoints import gguf
    from onelaunch.checkpoints.tokenizers import find_tokenizer

    model = gguf.read(path)
    for tensor in model.weights.values():
        float(tensor.float().sum())
    tokenizer = find_tokenizer(model)
    if tokenizer is not None:
        tokenizer.decode(tokenizer.encode("a cat, \u00e9 \U0001f408 ab"))


def _make_hf(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        from onelaunch.checkpoints import huggingface

        huggingface.write(_small_model(), folder / "model")
        return folder / "model" / name

    return make


def _make_hf_index(folder: Path) -> Path:
    """A folder in two shards, as large models come."""
    from safetensors.torch import load_file, save_file

    whole = _make_hf("model.safetensors")(folder)
    tensors = load_file(whole)
    whole.unlink()
    shards: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(tensors):
        shard = f"model-{i % 2 + 1:05d}-of-00002.safetensors"
        shards.setdefault(shard, {})[name] = tensors[name]
    for shard, part in shards.items():
        save_file(part, whole.with_name(shard), metadata={"format": "pt"})
    index = whole.with_name("model.safetensors.index.json")
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    index.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    return index


def _use_hf(path: Path) -> None:
    from onelaunch.checkpoints import huggingface

    _touch(huggingface.read(path.parent))


def _make_tokenizer_bin(folder: Path) -> Path:
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % byte for byte in range(256))]
    pieces += [b" ", b"a", b"b", b"c", b" a", b"ab", b" ab", b"abc", "\u00e9".encode()]
    parts = [struct.pack("<I", max(map(len, pieces)))]
    for i, piece in enumerate(pieces):
        parts.append(struct.pack("<fI", -float(i), len(piece)) + piece)
    path = folder / "tokenizer.bin"
    path.write_bytes(b"".join(parts))
    return path


def _make_tokenizer_json(folder: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=60, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat", "a cat and a hat"], trainer)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def _use_tokenizer(path: Path) -> None:
    from onelaunch.checkpoints.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode("a cat, \u00e9 \U0001f408 ab")
    tokenizer.decode(ids)
    stream = tokenizer.decoder()
    for token in ids:
        stream.push(token)
    stream.finish()


def _make_data(maker: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        return getattr(_token_folders(), maker)(folder)

    return make


def _use_data(path: Path) -> None:
    _token_folders().use(path)


def _use_tokens(path: Path) -> None:
    """With the manifest's digest made to fit, so that what the digest hides is read as well."""
    from onelaunch.checkpoints.atomic import sha256_file

    manifest_file = path.with_name("manifest.json")
    manifest = json.loads(manifest_file.read_text())
    manifest["splits"]["train"]["sha256"] = sha256_file(path)
    manifest_file.write_text(json.dumps(manifest))
    _token_folders().use(path)


def _find_tests() -> None:
    """Make the tests' own modules importable, also where this file runs by its path."""
    root = str(Path(__file__).resolve().parents[1])
    if root not in sys.path:
        sys.path.insert(0, root)


def _token_folders() -> Any:
    _find_tests()
    from tests.training import token_folders

    return token_folders


def _make_recipe(folder: Path) -> Path:
    from onelaunch.training.recipe import Recipe

    path = folder / "recipe.toml"
    path.write_text("# a comment\n" + Recipe.load("quickstart").to_toml())
    return path


def _use_recipe(path: Path) -> None:
    from onelaunch.training.recipe import Recipe

    recipe = Recipe.load(str(path))
    recipe.model_config(512)
    recipe.learning_rate(3)


def _make_run(name: str) -> Callable[[Path], Path]:
    """A run folder with one checkpoint that stopped inside an update."""

    def make(folder: Path) -> Path:
        from onelaunch.checkpoints import run_folder
        from onelaunch.checkpoints.atomic import write_json

        model, run = _small_model(), folder / "run"
        (run / "checkpoints").mkdir(parents=True)
        write_json(run / "run.json", {"schema": 1, "config": model.config.to_dict()})
        state = {
            "update": 3, "micro": 2, "loss_sum": 1.5, "tokens": 96, "evaluated": 0,
            "val_loss": None, "best_update": 3, "best_val_loss": 2.5, "sampler": {},
            "config": model.config.to_dict(), "bos_id": 1, "stop_ids": [1, 2],
        }  # fmt: skip
        checkpoint = run_folder.write_checkpoint(run, state, {run_folder.MODEL_FILE: model.weights})
        run_folder.set_best(run, checkpoint, 3, 2.5)
        return run / name if (run / name).exists() else checkpoint / name

    return make


def _use_run(path: Path) -> None:
    from onelaunch.checkpoints import run_folder
    from onelaunch.checkpoints.atomic import sha256_file
    from onelaunch.training.state import read_progress

    run = path.parents[2] if path.parent.name.startswith("update-") else path.parent
    # Damage that a checksum does not show, as made by whoever writes both.
    if path.name == run_folder.MODEL_FILE:
        state = run_folder.read_state(path.parent)
        sums = {**state["sha256"], path.name: sha256_file(path)}
        run_folder._write_state(path.parent, state, sums)
    elif path.name == run_folder.STATE_FILE:
        with contextlib.suppress(ValueError, RecursionError, TypeError, LookupError):
            state = json.loads(path.read_bytes())
            sums = dict(state["sha256"])
            sums.pop(run_folder.STATE_FILE, None)
            run_folder._write_state(path.parent, state, sums)
    _touch(run_folder.read(run))
    checkpoint, state, _ = run_folder.newest_valid_checkpoint(run)
    read_progress(state, checkpoint)


def _make_package(name: str) -> Callable[[Path], Path]:
    """A Core ML program of a few operations, its weights in their own file."""

    def make(folder: Path) -> Path:
        import numpy as np

        from onelaunch.engines.coreml import coremltools

        ct = coremltools("a test")
        from coremltools.converters.mil import Builder as mb
        from coremltools.converters.mil.mil import types

        def body(x: Any) -> Any:
            y = mb.conv(x=x, weight=np.ones((8, 16, 1, 1), np.float16))
            return mb.mul(x=mb.split(x=y, num_splits=2, axis=1)[0], y=np.float16(0.5))

        x = mb.TensorSpec((1, 16, 1, 32), types.fp16)
        model = ct.convert(
            mb.program(input_specs=[x], opset_version=ct.target.iOS18)(body),
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
            pass_pipeline=ct.PassPipeline.EMPTY,
        )
        package = folder / "tiny.mlpackage"
        model.save(str(package))
        return next(package.rglob(name))

    return make


def _use_package(path: Path) -> None:
    import numpy as np

    from onelaunch.engines.coreml.describe import describe, lines
    from onelaunch.engines.coreml.package import Package

    package = Package(next(p for p in path.parents if p.suffix == ".mlpackage"))
    list(lines(describe(package)))
    for function in package.functions.values():
        for constant in function.constants.values():
            np.array(package.value(constant))


FORMATS: dict[str, Fuzzed] = {
    "llama2c": Fuzzed(_make_llama2c, _use_llama2c, mutated_bytes),
    "llama2c-v1": Fuzzed(_make_llama2c_v1, _use_llama2c_versions, mutated_bytes),
    "llama2c-int8": Fuzzed(_make_llama2c_int8, _use_llama2c_versions, mutated_bytes),
    "llama2c-ckpt": Fuzzed(_make_checkpoint, _use_checkpoint, mutated_archive),
    "gguf": Fuzzed(_make_gguf("llama"), _use_gguf, mutated_bytes),
    "gguf-bpe": Fuzzed(_make_gguf("gpt2"), _use_gguf, mutated_bytes),
    "hf-config": Fuzzed(_make_hf("config.json"), _use_hf, mutated_json),
    "hf-safetensors": Fuzzed(_make_hf("model.safetensors"), _use_hf, mutated_safetensors),
    "hf-index": Fuzzed(_make_hf_index, _use_hf, mutated_json),
    "tokenizer-bin": Fuzzed(_make_tokenizer_bin, _use_tokenizer, mutated_bytes),
    "tokenizer-json": Fuzzed(_make_tokenizer_json, _use_tokenizer, mutated_json),
    "manifest": Fuzzed(_make_data("make_manifest"), _use_data, mutated_json),
    "tokens": Fuzzed(_make_data("make_tokens"), _use_tokens, mutated_bytes),
    "recipe": Fuzzed(_make_recipe, _use_recipe, mutated_bytes),
    "run": Fuzzed(_make_run("run.json"), _use_run, mutated_json),
    "run-best": Fuzzed(_make_run("best.json"), _use_run, mutated_json),
    "checkpoint-state": Fuzzed(_make_run("state.json"), _use_run, mutated_json),
    "checkpoint-model": Fuzzed(_make_run("model.safetensors"), _use_run, mutated_safetensors),
    "coreml-manifest": Fuzzed(_make_package("Manifest.json"), _use_package, mutated_json),
    "coreml-model": Fuzzed(_make_package("model.mlmodel"), _use_package, mutated_bytes),
}


# ---------------------------------------------------------------- the run


def reset_peak() -> int:
    """Forget the peak resident memory so far, where the system can; returns the peak in bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    return peak_memory()


def peak_memory() -> int:
    """Peak resident memory of this process, in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def limit_address_space() -> None:
    """Turn a runaway allocation into a MemoryError here, rather than trouble for the machine."""
    if sys.platform == "linux":
        import resource

        status = Path("/proc/self/status").read_text()
        now = int(status.partition("VmSize:")[2].split()[0]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (now + _HEADROOM, resource.RLIM_INFINITY))


def fuzz(name: str, examples: int, first_seed: int, folder: Path) -> dict[str, Any]:
    """Read `examples` mutants of a format; returns what happened.

    `failure` is None where all went well; the mutant that fails is kept, at `kept`.
    """
    from onelaunch.errors import OnelaunchError

    row = FORMATS[name]
    path = row.make(folder)
    valid = path.read_bytes()
    row.use(path)  # a valid file must do; and every import is done now
    result: dict[str, Any] = {"format": name, "read": 0, "accepted": 0, "failure": None}
    kept = Path(tempfile.gettempdir()) / f"onelaunch-fuzz-{name}-{os.getpid()}"
    before = reset_peak()
    limit_address_space()

    def put(data: bytes) -> None:
        # A new file each time: a mapping of the last one must not see its bytes vanish.
        fresh = path.with_name(f"{path.name}.new")
        fresh.write_bytes(data)
        os.replace(fresh, path)

    def check(data: bytes) -> None:
        put(data)
        result["read"] += 1
        try:
            row.use(path)
            result["accepted"] += 1
        except OnelaunchError:
            pass
        except BaseException as error:
            # While hypothesis shrinks, the last failure is the smallest.
            kept.write_bytes(data)
            raise AssertionError(f"{type(error).__name__}: {error}") from error
        if peak_memory() - before > MEMORY_LIMIT and not result["failure"]:
            kept.write_bytes(data)
            result["failure"] = "this file made the memory grow beyond the limit"

    try:
        for part in range(0, examples, _BATCH):
            options = settings(
                max_examples=min(_BATCH, examples - part),
                database=None,
                deadline=None,
                phases=[Phase.generate, Phase.shrink],
                suppress_health_check=list(HealthCheck),
            )
            # A function of its own: hypothesis keeps each one's history as long as it lives.
            batch = given(row.mutate(valid))(lambda data: check(data))
            seed(first_seed + part)(options(batch))()
    except (Exception, BaseExceptionGroup) as error:
        result["failure"] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    result["peak_growth_mb"] = round((peak_memory() - before) / (1 << 20), 1)
    if result["failure"]:
        result["kept"] = str(kept)
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fuzz one readable format.")
    parser.add_argument("--format", choices=list(FORMATS), required=True)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="onelaunch-fuzz-") as folder:
        result = fuzz(arguments.format, arguments.examples, arguments.seed, Path(folder))
    print(json.dumps(result))
    return 1 if result["failure"] else 0


if __name__ == "__main__":
    sys.exit(main())
