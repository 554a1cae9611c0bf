"""Hugging Face folders: what is read, what is written, what is refused in one line."""

from __future__ import annotations

import errno
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from onelaunch.checkpoints import huggingface, tensors
from onelaunch.checkpoints.weights import LoadedModel
from onelaunch.config import ModelConfig, RopeScaling
from onelaunch.errors import BadInput, RunFailed

CONFIG = ModelConfig(
    dim=16, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=24, vocab_size=40, max_seq_len=32
)
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 40,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
}
QWEN = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "head_dim": 8}


def random_weights(config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in config.weight_shapes().items()
    }


def hub_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name if "lm_head" in name else f"model.{name}": t for name, t in weights.items()}


def folder(
    path: Path,
    config: dict[str, Any] | None = None,
    tensors: dict[str, Tensor] | None = None,
    **files: Any,
) -> Path:
    """A folder with a configuration, weights in one file, and other JSON files."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(LLAMA if config is None else config))
    if tensors is None:
        tensors = hub_names(random_weights(CONFIG))
    if tensors:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def sharded(path: Path, tensors: dict[str, Tensor], n: int = 3) -> dict[str, str]:
    """Weights over n files with an index; returns the index's map."""
    names = list(tensors)
    weight_map = {}
    for i in range(n):
        shard = f"model-{i + 1:05d}-of-{n:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::n]}
        save_file(part, path / shard)
        weight_map |= dict.fromkeys(part, shard)
    write_index(path, weight_map)
    return weight_map


def write_index(path: Path, weight_map: Any) -> None:
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def refused(path: Path, *needles: str) -> str:
    with pytest.raises(BadInput) as caught:
        huggingface.read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    for needle in needles:
        assert needle in message
    return message


class TestConfig:
    def test_plain(self) -> None:
        assert huggingface.parse_config(LLAMA) == CONFIG

    def test_defaults(self) -> None:
        least = {
            key: value
            for key, value in LLAMA.items()
            if key not in ("num_key_value_heads", "tie_word_embeddings", "rms_norm_eps")
        }
        config = huggingface.parse_config({**least, "head_dim": None})
        assert (config.n_kv_heads, config.head_dim, config.tied_embeddings) == (4, 4, False)
        assert (config.norm_eps, config.rope_theta) == (1e-6, 10000.0)
        del least["architectures"]
        assert huggingface.parse_config({**least, "model_type": "llama"}) == config

    def test_qwen3(self) -> None:
        config = huggingface.parse_config(QWEN)
        assert config == CONFIG.with_(qk_norm=True, head_dim=8)
        without = {key: value for key, value in QWEN.items() if key != "head_dim"}
        assert huggingface.parse_config(without).head_dim == 128

    @pytest.mark.parametrize(
        "fields",
        [
            {"rope_theta": 5e5},
            {"rope_theta": 5e5, "rope_scaling": None},
            {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5},
            {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e4, "rope_scaling": {}},
        ],
    )
    def test_rope_base_in_both_styles(self, fields: dict[str, Any]) -> None:
        config = huggingface.parse_config({**LLAMA, **fields})
        assert config == CONFIG.with_(rope_theta=5e5)

    def test_rope_scaling_in_both_styles(self) -> None:
        scaling = {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
        expected = CONFIG.with_(rope_theta=5e5, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16))
        four = {**LLAMA, "rope_theta": 5e5, "rope_scaling": scaling}
        five = {**LLAMA, "rope_parameters": {**scaling, "rope_theta": 5e5}}
        older = {**four, "rope_scaling": {**scaling, "type": scaling["rope_type"]}}
        del older["rope_scaling"]["rope_type"]
        for data in (four, five, older):
            assert huggingface.parse_config(data) == expected
        unsaid = {**five, "rope_parameters": dict(five["rope_parameters"])}
        del unsaid["rope_parameters"]["original_max_position_embeddings"]
        parsed = huggingface.parse_config(unsaid).rope_scaling
        assert parsed is not None
        assert parsed.original_max_seq_len == 32

    def test_what_has_no_effect_is_accepted(self) -> None:
        extra = {
            "attention_bias": False,
            "mlp_bias": False,
            "hidden_act": "silu",
            "use_sliding_window": False,
            "sliding_window": 4096,
            "layer_types": ["full_attention"] * 2,
            "quantization_config": None,
            "partial_rotary_factor": 1.0,
            "some_new_key": {"a": 1},
        }
        assert huggingface.parse_config({**LLAMA, **extra}) == CONFIG

    @pytest.mark.parametrize(
        ("changes", "needle"),
        [
            ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel'"),
            ({"architectures": ["LlamaForCausalLM", "Other"]}, "architecture"),
            ({"architectures": []}, "architecture"),
            ({"architectures": [["LlamaForCausalLM"]]}, "architecture"),
            ({"architectures": "LlamaForCausalLM"}, "architecture"),
            ({"architectures": None}, "architecture None"),
            ({"architectures": None, "model_type": "gemma2"}, "'gemma2'"),
            ({"attention_bias": True}, "attention_bias"),
            ({"mlp_bias": True}, "mlp_bias"),
            ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
            ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.factor"),
            ({"rope_scaling": {"type": "linear", "factor": -2.0}}, "rope_scaling.factor"),
            ({"rope_parameters": {"rope_type": "dynamic"}}, "'dynamic'"),
            ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "one table"),
            ({"rope_scaling": "llama3"}, "one table"),
            ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.factor"),
            ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
            ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
            ({"use_sliding_window": True}, "sliding-window"),
            ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
            ({"layer_types": 7}, "sliding-window"),
            ({"quantization_config": {"bits": 4}}, "quantized"),
            ({"hidden_size": "16"}, "hidden_size must be"),
            ({"hidden_size": 10**9}, "hidden_size must be"),
            ({"num_hidden_layers": 10**6}, "num_hidden_layers must be"),
            ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
            ({"head_dim": 5}, "head_dim 5 is odd"),
            ({"rope_theta": 10**400}, "rope_theta"),
            ({"rope_theta": [1]}, "rope_theta"),
            ({"tie_word_embeddings": None}, "tie_word_embeddings"),
            ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ],
    )
    def test_refused_in_one_line(
        self, changes: dict[str, Any], needle: str, tmp_path: Path
    ) -> None:
        refused(folder(tmp_path / "m", {**LLAMA, **changes}), "config.json", needle)

    @pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "max_position_embeddings"])
    def test_missing_dimension(self, key: str, tmp_path: Path) -> None:
        config = {name: value for name, value in LLAMA.items() if name != key}
        refused(folder(tmp_path / "m", config), f"{key} is missing")

    @pytest.mark.parametrize("content", ["", "{", "[]", "\udcff", "[" * 100000, "9" * 5000])
    def test_not_json(self, content: str, tmp_path: Path) -> None:
        path = folder(tmp_path / "m")
        (path / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
        refused(path, "config.json")

    def test_absurdly_large(self, tmp_path: Path) -> None:
        path = folder(tmp_path / "m")
        (path / "config.json").write_text(json.dumps(LLAMA) + " " * (1 << 20))
        refused(path, "config.json", "larger than")


class TestSpecialIds:
    @pytest.mark.parametrize(
        ("config", "generation", "bos", "stops"),
        [
            ({}, None, 1, (1, 2)),  # LlamaConfig's own defaults
            ({"bos_token_id": 5, "eos_token_id": 6}, None, 5, (5, 6)),
            ({"bos_token_id": 5, "eos_token_id": [7, 6]}, None, 5, (5, 6, 7)),
            ({"bos_token_id": None, "eos_token_id": None}, None, None, ()),
            ({"bos_token_id": 5, "eos_token_id": 6}, {"eos_token_id": [8, 9]}, 5, (5, 8, 9)),
            ({"bos_token_id": 5, "eos_token_id": 6}, {"bos_token_id": 4}, 4, (4, 6)),
            ({"bos_token_id": 5, "eos_token_id": 6}, {"eos_token_id": None}, 5, (5, 6)),
            ({"bos_token_id": 40, "eos_token_id": [39, 128001]}, None, None, (39,)),
        ],
    )
    def test_llama(
        self, config: Any, generation: Any, bos: int | None, stops: Any, tmp_path: Path
    ) -> None:
        files = {} if generation is None else {"generation_config": generation}
        model = huggingface.read(folder(tmp_path / "m", {**LLAMA, **config}, **files))
        assert (model.bos_id, model.stop_ids) == (bos, stops)

    def test_qwen3_has_no_defaults(self, tmp_path: Path) -> None:
        tensors = hub_names(random_weights(CONFIG.with_(qk_norm=True, head_dim=8)))
        model = huggingface.read(folder(tmp_path / "m", QWEN, tensors))
        assert (model.bos_id, model.stop_ids) == (None, ())

    @pytest.mark.parametrize("value", ["2", 2.0, True, [1, "x"], {"a": 1}])
    def test_not_an_id(self, value: Any, tmp_path: Path) -> None:
        path = folder(tmp_path / "m", {**LLAMA, "eos_token_id": value})
        refused(path, "eos_token_id", "not a token id")


class TestWeights:
    def test_matches(self, tmp_path: Path) -> None:
        assert not huggingface.matches(tmp_path)
        assert huggingface.matches(folder(tmp_path / "m"))
        assert not huggingface.matches(tmp_path / "m" / "config.json")
        assert not huggingface.matches(tmp_path / "absent")
        (tmp_path / "p").mkdir()
        (tmp_path / "p" / "pytorch_model.bin").write_bytes(b"x")
        assert huggingface.matches(tmp_path / "p")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("shards", [0, 1, 3])
    def test_read(self, dtype: torch.dtype, shards: int, tmp_path: Path) -> None:
        weights = random_weights(CONFIG, dtype)
        path = folder(tmp_path / "m", tensors={} if shards else hub_names(weights))
        if shards:
            sharded(path, hub_names(weights), shards)
        model = huggingface.read(path)
        assert (model.source, model.format) == (path, "hf")
        assert model.config == CONFIG
        assert set(model.weights) == set(weights)
        for name, tensor in weights.items():
            assert model.weights[name].dtype == dtype
            assert torch.equal(model.weights[name], tensor)

    def test_a_tied_head_in_the_file_is_dropped(self, tmp_path: Path) -> None:
        tensors = hub_names(random_weights(CONFIG))
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        path = folder(tmp_path / "m", tensors=tensors)
        assert "lm_head.weight" not in huggingface.read(path).weights
        tensors["lm_head.weight"][3, 3] += 1
        refused(folder(path, tensors=tensors), "lm_head.weight differs", "tie_word_embeddings")
        tensors["lm_head.weight"] = torch.zeros(2)
        refused(folder(path, tensors=tensors), "lm_head.weight differs")

    def test_an_untied_head_is_needed(self, tmp_path: Path) -> None:
        untied = {**LLAMA, "tie_word_embeddings": False}
        refused(folder(tmp_path / "m", untied), "lm_head.weight is missing")
        tensors = hub_names(random_weights(CONFIG.with_(tied_embeddings=False)))
        model = huggingface.read(folder(tmp_path / "n", untied, tensors))
        assert torch.equal(model.weights["lm_head.weight"], tensors["lm_head.weight"])

    def test_rotary_frequencies_are_ignored(self, tmp_path: Path) -> None:
        tensors = hub_names(random_weights(CONFIG))
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
        assert huggingface.read(folder(tmp_path / "m", tensors=tensors)).config == CONFIG

    def test_wrong_tensors(self, tmp_path: Path) -> None:
        whole = hub_names(random_weights(CONFIG))
        name = "model.layers.1.mlp.up_proj.weight"
        for change, needle in (
            ({name: None}, "layers.1.mlp.up_proj.weight is missing"),
            ({name: torch.zeros(24, 17)}, "has shape (24, 17)"),
            ({name: torch.zeros(24, 16, dtype=torch.float64)}, "is F64"),
            ({name: torch.zeros(24, 16, dtype=torch.int8)}, "is I8"),
            ({"model.extra.weight": torch.zeros(2)}, "unexpected tensor extra.weight"),
            ({"norm.weight": torch.zeros(16)}, "norm.weight occurs twice"),
            ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(16)}, "unexpected tensor"),
        ):
            tensors = {k: v for k, v in {**whole, **change}.items() if v is not None}
            refused(folder(tmp_path / "m", tensors=tensors), needle)

    def test_missing_files(self, tmp_path: Path) -> None:
        path = folder(tmp_path / "m", tensors={})
        refused(path, "model.safetensors is missing")
        (path / "pytorch_model.bin").write_bytes(b"x")
        refused(path, "pytorch_model.bin", "safetensors")
        (path / "config.json").unlink()
        refused(path, "config.json is missing")

    @pytest.mark.parametrize(
        "shard",
        [
            "../m/model-00001-of-00003.safetensors",
            "/etc/passwd",
            "sub/model.safetensors",
            "..",
            "",
            ".hidden.safetensors",
            "..\\model.safetensors",
            "C:model.safetensors",
            "model.safetensors\n",
            "pytorch_model.bin",
            7,
            None,
        ],
    )
    def test_shards_stay_in_the_folder(self, shard: Any, tmp_path: Path) -> None:
        path = folder(tmp_path / "m", tensors={})
        weight_map: dict[str, Any] = sharded(path, hub_names(random_weights(CONFIG)))
        weight_map["model.norm.weight"] = shard
        write_index(path, weight_map)
        refused(path, f"{shard!r} is not a safetensors file")

    def test_damaged_index(self, tmp_path: Path) -> None:
        path = folder(tmp_path / "m", tensors={})
        weight_map = sharded(path, hub_names(random_weights(CONFIG)))
        for content in ([], None, {}, "x"):
            write_index(path, content)
            refused(path, "weight_map is missing or empty")
        write_index(path, {**weight_map, "model.norm.weight": "absent.safetensors"})
        refused(path, "absent.safetensors is missing")
        other = weight_map["model.embed_tokens.weight"]
        assert weight_map["model.norm.weight"] != other
        write_index(path, {**weight_map, "model.norm.weight": other})
        refused(path, "model.norm.weight of model.safetensors.index.json is missing")
        write_index(path, {k: v for k, v in weight_map.items() if k != "model.norm.weight"})
        refused(path, "norm.weight is missing")

    def test_every_truncation_is_one_line(self, tmp_path: Path) -> None:
        path = folder(tmp_path / "m")
        file = path / "model.safetensors"
        whole = file.read_bytes()
        for size in [0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1]:
            file.write_bytes(whole[:size])
            refused(path, "model.safetensors")
        file.write_bytes(whole + b"x")
        refused(path, "model.safetensors")

    @pytest.mark.parametrize("length", [0, 1 << 40, (1 << 64) - 1])
    def test_absurd_header_length(self, length: int, tmp_path: Path) -> None:
        path = folder(tmp_path / "m")
        (path / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}" * 100)
        refused(path, "damaged or incomplete")

    def test_flipped_header_bytes(self, tmp_path: Path) -> None:
        """Whatever the header then says, it is read or refused, never a crash."""
        path = folder(tmp_path / "m")
        file = path / "model.safetensors"
        whole = file.read_bytes()
        (header,) = struct.unpack_from("<Q", whole)
        generator = torch.Generator().manual_seed(0)
        outcomes = set()
        for _ in range(200):
            at = int(torch.randint(8 + header, (1,), generator=generator))
            bit = int(torch.randint(8, (1,), generator=generator))
            damaged = bytearray(whole)
            damaged[at] ^= 1 << bit
            file.write_bytes(damaged)
            try:
                huggingface.read(path)
                outcomes.add("read")
            except BadInput:
                outcomes.add("refused")
        assert "refused" in outcomes


class TestWrite:
    @pytest.mark.parametrize(
        "config",
        [
            CONFIG,
            CONFIG.with_(tied_embeddings=False, rope_theta=5e5),
            CONFIG.with_(qk_norm=True, head_dim=8, norm_eps=1e-6),
            CONFIG.with_(rope_scaling=RopeScaling(8, 1, 4, 16)),
        ],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_read_gives_it_back(
        self, config: ModelConfig, dtype: torch.dtype, tmp_path: Path
    ) -> None:
        weights = random_weights(config, dtype)
        model = LoadedModel(config, weights, bos_id=3, stop_ids=(3, 4, 9))
        huggingface.write(model, tmp_path / "new" / "out")
        again = huggingface.read(tmp_path / "new" / "out")
        assert again.config == config
        assert (again.bos_id, again.stop_ids) == (3, (3, 4, 9))
        assert set(again.weights) == set(weights)
        for name, tensor in weights.items():
            assert torch.equal(again.weights[name], tensor)
        # and once more, from tensors that are mapped from the first file
        huggingface.write(again, tmp_path / "twice")
        for file in ("model.safetensors", "config.json", "generation_config.json"):
            assert (tmp_path / "twice" / file).read_bytes() == (
                tmp_path / "new" / "out" / file
            ).read_bytes()

    @pytest.mark.parametrize(
        ("bos", "stops", "eos"),
        [(1, (1, 2), 2), (None, (), None), (None, (7,), 7), (0, (0,), 0), (1, (1, 2, 3), [2, 3])],
    )
    def test_special_ids(self, bos: int | None, stops: Any, eos: Any, tmp_path: Path) -> None:
        model = LoadedModel(CONFIG, random_weights(CONFIG), bos_id=bos, stop_ids=stops)
        huggingface.write(model, tmp_path / "out")
        data = json.loads((tmp_path / "out" / "config.json").read_text())
        assert (data["bos_token_id"], data["eos_token_id"]) == (bos, eos)
        again = huggingface.read(tmp_path / "out")
        assert (again.bos_id, again.stop_ids) == (bos, stops)

    def test_files(self, tmp_path: Path) -> None:
        huggingface.write(LoadedModel(CONFIG, random_weights(CONFIG)), tmp_path / "out")
        names = {file.name for file in (tmp_path / "out").iterdir()}
        assert names == {"config.json", "generation_config.json", "model.safetensors"}
        assert [file.name for file in tmp_path.iterdir()] == ["out"]
        with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as tensors:
            assert tensors.metadata() == {"format": "pt"}
            names = set(tensors.keys())
        assert names == {f"model.{name}" for name in CONFIG.weight_shapes()}
        data = json.loads((tmp_path / "out" / "config.json").read_text())
        assert data["torch_dtype"] == "float32"
        assert data["rope_theta"] == 10000.0

    def test_interleaved_becomes_half(self, tmp_path: Path) -> None:
        config = CONFIG.with_(rope_layout="interleaved")
        weights = random_weights(config)
        huggingface.write(LoadedModel(config, weights), tmp_path / "out")
        tensors = load_file(tmp_path / "out" / "model.safetensors")
        for kind, heads in (("q", 4), ("k", 2)):
            ours = weights[f"layers.1.self_attn.{kind}_proj.weight"]
            moved = ours.view(heads, 2, 2, 16).transpose(1, 2).reshape(heads * 4, 16)
            assert torch.equal(tensors[f"model.layers.1.self_attn.{kind}_proj.weight"], moved)
            assert not torch.equal(moved, ours)
        assert huggingface.read(tmp_path / "out").config == CONFIG

    def test_nothing_is_overwritten(self, tmp_path: Path) -> None:
        model = LoadedModel(CONFIG, random_weights(CONFIG))
        for name in ("folder", "file"):
            out = tmp_path / name
            out.mkdir() if name == "folder" else out.write_text("mine")
            with pytest.raises(BadInput, match="already exists"):
                huggingface.write(model, out)
        assert (tmp_path / "file").read_text() == "mine"
        assert not any((tmp_path / "folder").iterdir())

    def test_float64_is_refused(self, tmp_path: Path) -> None:
        model = LoadedModel(CONFIG, random_weights(CONFIG, torch.float64))
        with pytest.raises(BadInput, match="float64 weights cannot be written"):
            huggingface.write(model, tmp_path / "out")
        assert not any(tmp_path.iterdir())

    def test_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from safetensors import SafetensorError

        def full(*_: Any, **__: Any) -> None:
            raise SafetensorError(
                f"Error while serializing: I/O error: No space (os error {errno.ENOSPC})"
            )

        monkeypatch.setattr(tensors, "save_file", full)
        with pytest.raises(RunFailed, match="the disk is full"):
            huggingface.write(LoadedModel(CONFIG, random_weights(CONFIG)), tmp_path / "out")
        assert not any(tmp_path.iterdir())

    def test_a_place_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        with pytest.raises(BadInput, match="cannot write"):
            huggingface.write(LoadedModel(CONFIG, random_weights(CONFIG)), tmp_path / "file" / "x")
