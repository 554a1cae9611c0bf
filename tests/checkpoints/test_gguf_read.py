"""Reading GGUF: files made by hand, whole, damaged and of unsupported kinds."""

import struct
import sys
import tracemalloc

import pytest
import torch
from tests.checkpoints import gguf_files
from tests.checkpoints.gguf_files import DIM, gguf_bytes, metadata, shapes, tensors

from onelaunch.checkpoints import gguf, load
from onelaunch.checkpoints.gguf_header import Header
from onelaunch.config import RopeScaling
from onelaunch.errors import BadInput, MissingExtra


def _file(folder, changes=None, table=None, name="m.gguf", **options):
    path = folder / name
    path.write_bytes(gguf_bytes(metadata(**changes or {}), table or tensors()[0], **options))
    return path


def test_a_plain_model(tmp_path):
    raw, values = tensors()
    model = load(_file(tmp_path, {"llama__rope__freq_base": 500000.0}, raw))
    config = model.config
    assert (config.dim, config.n_layers, config.n_heads, config.n_kv_heads) == (DIM, 2, 4, 2)
    assert (config.hidden_dim, config.vocab_size, config.max_seq_len) == (96, 40, 24)
    assert (config.norm_eps, config.rope_theta) == (1e-5, 500000.0)
    assert (config.rope_layout, config.tied_embeddings) == ("interleaved", False)
    assert (model.format, model.notices, model.chat_template) == ("gguf", (), None)
    assert (model.bos_id, model.stop_ids) == (None, ())
    assert list(model.weights) == list(config.weight_shapes())
    assert torch.equal(model.weights["embed_tokens.weight"], values["token_embd.weight"])
    assert torch.equal(model.weights["norm.weight"], values["output_norm.weight"])
    assert torch.equal(model.weights["lm_head.weight"], values["output.weight"])
    for name, stored in {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }.items():
        for i in range(2):
            weight = model.weights[f"layers.{i}.{name}.weight"]
            assert torch.equal(weight, values[f"blk.{i}.{stored}.weight"])


def test_a_file_by_its_magic_alone_and_by_other_alignments(tmp_path):
    """Ollama's files have no suffix."""
    assert load(_file(tmp_path, name="sha256-0123")).format == "gguf"
    other = {"general__alignment": 64}
    assert load(_file(tmp_path, other, alignment=64)).config.dim == DIM
    assert load(_file(tmp_path, version=2)).config.dim == DIM


def test_tensors_are_mapped_and_private(tmp_path):
    path = _file(tmp_path)
    before = path.read_bytes()
    model = load(path)
    model.weights["norm.weight"].fill_(7)
    assert path.read_bytes() == before
    assert float(load(path).weights["norm.weight"][0]) != 7


@pytest.mark.parametrize(("number", "dtype"), [(1, torch.float16), (30, torch.bfloat16)])
def test_half_precision(tmp_path, number, dtype):
    raw, values = tensors(tied=True)
    for name, value in values.items():
        if value.ndim == 2:
            data = value.to(dtype).contiguous().view(torch.int16).numpy().tobytes()
            raw[name] = (tuple(value.shape), number, data)
    model = load(_file(tmp_path, table=raw))
    assert model.config.tied_embeddings
    embedding = model.weights["embed_tokens.weight"]
    assert embedding.dtype == dtype
    assert torch.equal(embedding, values["token_embd.weight"].to(dtype))
    assert model.weights["norm.weight"].dtype == torch.float32


def _quantized(value, number):
    """The bytes of Q8_0 or Q4_0 with scales of powers of two, and what they stand for."""
    generator = torch.Generator().manual_seed(3)
    blocks = value.numel() // 32
    scales = 2.0 ** torch.randint(-8, 4, (blocks,), generator=generator)
    low, high = (-128, 128) if number == 8 else (-8, 8)
    integers = torch.randint(low, high, (blocks, 32), generator=generator)
    data = b""
    for scale, numbers in zip(scales.tolist(), integers.tolist(), strict=True):
        data += struct.pack("<e", scale)
        if number == 8:
            data += struct.pack("<32b", *numbers)
        else:
            low, high = numbers[:16], numbers[16:]
            data += bytes((a + 8) | (b + 8) << 4 for a, b in zip(low, high, strict=True))
    return data, (scales[:, None] * integers).view(value.shape)


@pytest.mark.parametrize(("number", "name"), [(8, "Q8_0"), (2, "Q4_0")])
def test_quantized_tensors_become_float32(tmp_path, monkeypatch, number, name):
    raw, values = tensors()
    stored = {}
    for key in ("token_embd.weight", "blk.0.ffn_down.weight"):
        data, stored[key] = _quantized(values[key], number)
        raw[key] = (tuple(values[key].shape), number, data)
    path = _file(tmp_path, table=raw)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gguf", None)
        with pytest.raises(MissingExtra, match=rf"m\.gguf.*{name}.*onelaunch\[gguf\]"):
            load(path)
    pytest.importorskip("gguf")
    model = load(path)
    assert model.notices == (f"{path}: 2 tensors in {name} were converted to float32",)
    assert torch.equal(model.weights["embed_tokens.weight"], stored["token_embd.weight"])
    assert torch.equal(
        model.weights["layers.0.mlp.down_proj.weight"], stored["blk.0.ffn_down.weight"]
    )


def test_k_quants_as_ggml_defines_them(tmp_path):
    """Q6_K: 128 bytes of low halves, 64 of high pairs of bits, 16 scales, and one of all."""
    pytest.importorskip("gguf")
    generator = torch.Generator().manual_seed(5)
    raw, expected = b"", []
    for scale in (0.5, -2.0, 0.125):
        low = torch.randint(0, 256, (128,), generator=generator).tolist()
        high = torch.randint(0, 256, (64,), generator=generator).tolist()
        scales = torch.randint(-128, 128, (16,), generator=generator).tolist()
        raw += struct.pack("<128B64B16be", *low, *high, *scales, scale)
        for i in range(256):
            half, quarter, place = i // 128, i % 128 // 32, i % 32
            nibble = low[half * 64 + quarter % 2 * 32 + place] >> quarter // 2 * 4 & 15
            number = nibble | (high[half * 32 + place] >> 2 * quarter & 3) << 4
            expected.append(scale * scales[i // 16] * (number - 32))
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes({}, {"x": ((3, 256), 14, raw)}))
    header = Header(path)
    values = gguf.read_tensor(header, header.tensors["x"])
    assert torch.equal(values, torch.tensor(expected).view(3, 256))


def test_a_file_of_a_vocabulary_alone(tmp_path):
    """It ends with its header, without padding."""
    path = tmp_path / "m.gguf"
    data = gguf_bytes({"tokenizer.ggml.tokens": ["a", "bc"]}, {})
    path.write_bytes(data.rstrip(b"\0"))
    assert len(path.read_bytes()) % 32
    assert Header(path).strings("tokenizer.ggml.tokens") == [b"a", b"bc"]


def test_the_chat_template(tmp_path):
    entries = {"tokenizer__chat_template": "{{ messages }}"}
    path = _file(tmp_path, entries)
    assert load(path).chat_template == "{{ messages }}"
    (tmp_path / "chat_template.jinja").write_text("of another model")
    assert load(path).chat_template == "{{ messages }}"
    own = tmp_path / "m.chat_template.jinja"
    own.write_text("mine")
    assert load(path).chat_template == "mine"
    own.unlink()
    model = load(_file(tmp_path, {"tokenizer__chat_template": "x" * (1 << 20)}))
    assert model.chat_template is None
    assert "m.gguf: its chat template is larger" in model.notices[0]


def test_a_name_of_megabytes_is_cut(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes({"general.architecture": "x" * (1 << 20)}, {}))
    with pytest.raises(BadInput) as caught:
        load(path)
    assert len(str(caught.value)) < 1000


def _divisors(scaling, theta=10000.0, head_dim=DIM // gguf_files.HEADS):
    """The tensor as defined by Llama 3: see transformers' modeling_rope_utils."""
    wavelengths = [2 * torch.pi * theta ** (i / head_dim) for i in range(0, head_dim, 2)]
    found = []
    for wavelength in wavelengths:
        turns = scaling.original_max_seq_len / wavelength
        span = scaling.high_freq_factor - scaling.low_freq_factor
        smooth = min(1.0, max(0.0, (turns - scaling.low_freq_factor) / span))
        found.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return torch.tensor(found)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_scaling_of_llama_3(tmp_path, factor):
    scaling = RopeScaling(factor=factor)
    values = _divisors(scaling)
    assert len(set(values.tolist())) > 1
    raw = {**tensors()[0], "rope_freqs.weight": ((8,), 0, values.numpy().tobytes())}
    assert load(_file(tmp_path, table=raw)).config.rope_scaling == scaling


@pytest.mark.parametrize("spoiled", ["other", "shape", "nan", "zero"])
def test_other_divisors_are_refused(tmp_path, spoiled):
    values = _divisors(RopeScaling())
    if spoiled == "other":
        values[5] *= 1.01
    values = {"shape": values[:4], "nan": values * torch.nan, "zero": values * 0}.get(
        spoiled, values
    )
    raw = {**tensors()[0], "rope_freqs.weight": (tuple(values.shape), 0, values.numpy().tobytes())}
    with pytest.raises(BadInput, match=r"m\.gguf: .*rope_freqs\.weight"):
        load(_file(tmp_path, table=raw))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general__architecture": "qwen2moe"}, "'qwen2moe' is not supported"),
        ({"general__architecture": "gemma3"}, "'gemma3' is not supported; only llama, qwen2, "),
        ({"general__architecture": None}, "architecture None is not supported"),
        ({"general__architecture": 3}, r"general\.architecture must be a string"),
        ({"llama__rope__scaling__type": "yarn"}, "rope scaling 'yarn'"),
        ({"llama__rope__scaling__type": "linear"}, "rope scaling 'linear'"),
        ({"llama__rope__scaling__factor": 4.0}, "rope scaling 'linear'"),
        ({"llama__rope__scale_linear": 2.0}, "rope scaling 'linear'"),
        ({"llama__rope__dimension_count": 8}, r"llama\.rope\.dimension_count 8"),
        ({"llama__attention__value_length": 32}, r"llama\.attention\.value_length 32"),
        ({"llama__expert_count": 8}, r"llama\.expert_count 8 is not supported"),
        ({"llama__attention__sliding_window": 9}, r"sliding_window 9 is not supported"),
        ({"llama__logit_scale": 0.5}, r"llama\.logit_scale 0\.5 is not supported"),
        ({"llama__attention__causal": False}, "not causal"),
        ({"split__count": 2}, "one of several files"),
        ({"llama__block_count": None}, r"llama\.block_count is missing"),
        ({"llama__attention__layer_norm_rms_epsilon": None}, "rms_epsilon is missing"),
        ({"llama__attention__layer_norm_rms_epsilon": 0.0}, "rms_epsilon must be positive"),
        ({"llama__embedding_length": 0}, r"llama\.embedding_length must be a whole number"),
        ({"llama__attention__head_count": 3}, r"not a multiple of llama\.attention\.head_count 3"),
        ({"llama__attention__head_count_kv": [2, 1]}, "differs between layers"),
        ({"llama__context_length": "24"}, r"llama\.context_length must be an integer"),
        ({"llama__context_length": True}, r"llama\.context_length must be an integer"),
        ({"llama__feed_forward_length": 95}, r"ffn_|mlp\.gate_proj\.weight has shape"),
        ({"llama__block_count": 3}, r"layers\.2\.input_layernorm\.weight is missing"),
        ({"llama__block_count": 1}, r"unexpected tensor 'blk\.1\."),
        ({"general__alignment": 3}, r"general\.alignment 3"),
        ({"general__alignment": 0}, r"general\.alignment 0"),
    ],
)
def test_what_is_not_supported(tmp_path, changes, message):
    with pytest.raises(BadInput, match=message) as caught:
        load(_file(tmp_path, changes))
    assert str(caught.value).startswith(str(tmp_path / "m.gguf: "))
    assert "\n" not in str(caught.value)


def test_keys_per_layer_that_are_all_equal(tmp_path):
    changes = {"llama__attention__head_count_kv": [2, 2]}
    assert load(_file(tmp_path, changes)).config.n_kv_heads == 2


@pytest.mark.parametrize(("number", "name"), [(12, "Q4_K"), (15, "Q8_K"), (99, "of type 99")])
def test_tensor_types_that_are_not_supported(tmp_path, number, name):
    raw, values = tensors()
    raw["output.weight"] = (tuple(values["output.weight"].shape), number, bytes(64))
    with pytest.raises(BadInput, match=rf"'output\.weight' is {name}; .* Q8_0, Q6_K, BF16$"):
        load(_file(tmp_path, table=raw))


def test_damage_anywhere(tmp_path):
    whole = gguf_bytes(metadata(), tensors()[0])
    path = tmp_path / "m.gguf"
    header = whole.index(b"blk.1.ffn_down.weight") + 200
    for end in (0, 3, 4, 23, 24, 60, header // 2, header, len(whole) - 33):
        path.write_bytes(whole[:end])
        with pytest.raises(BadInput, match=r"^\S+m\.gguf: .*(too few|truncated)"):
            load(path)
    for place, number, form, message in [
        (4, 1, "<I", "version 1 is not supported"),
        (4, 3, ">I", "big-endian"),
        (8, 1 << 40, "<Q", "claims 1099511627776 tensors"),
        (16, 1 << 62, "<Q", "claims"),
        (24, 1 << 63, "<Q", "ends within its header"),
    ]:
        damaged = bytearray(whole)
        struct.pack_into(form, damaged, place, number)
        path.write_bytes(damaged)
        with pytest.raises(BadInput, match=message):
            load(path)


def test_the_header_of_tensors_is_checked(tmp_path):
    path = tmp_path / "m.gguf"
    whole = gguf_bytes(metadata(), tensors()[0])
    entry = whole.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight")
    for place, number, form, message in [
        (entry, 0, "<I", "has 0 dimensions"),
        (entry, 5, "<I", "has 5 dimensions"),
        (entry + 4, 0, "<Q", "rows of 0"),
        (entry + 4, 1 << 60, "<Q", "not where the last one ends"),
        (entry + 24, 32, "<Q", "'blk.0.attn_q.weight' is not where the last one ends"),
    ]:
        damaged = bytearray(whole)
        struct.pack_into(form, damaged, place, number)
        path.write_bytes(damaged)
        with pytest.raises(BadInput, match=message):
            load(path)
    twice = whole.replace(b"blk.0.attn_q.weight", b"blk.0.attn_k.weight")
    path.write_bytes(twice)
    with pytest.raises(BadInput, match=r"'blk\.0\.attn_k\.weight' occurs twice"):
        load(path)


def test_an_array_that_claims_too_much_takes_no_memory(tmp_path):
    path = tmp_path / "m.gguf"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + gguf_files.string("x")
    for count, message in [((3 << 17) + 1, "at most 393216"), (3 << 17, "ends within its header")]:
        path.write_bytes(head + struct.pack("<IIQ", 9, 8, count) + bytes(64))
        tracemalloc.start()
        with pytest.raises(BadInput, match=message):
            load(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()
    path.write_bytes(head + struct.pack("<IIQ", 9, 9, 1) + bytes(64))
    with pytest.raises(BadInput, match="arrays of the type 9"):
        load(path)
    path.write_bytes(head + struct.pack("<I", 13) + bytes(64))
    with pytest.raises(BadInput, match="unknown type 13"):
        load(path)


def test_a_pointer_and_no_file(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    with pytest.raises(BadInput, match="Git LFS pointer"):
        load(path)
    path.write_bytes(b"PK\3\4" + bytes(60))
    with pytest.raises(BadInput, match="not a GGUF file"):
        load(path)
    path.unlink()
    path.mkdir()
    assert not gguf.matches(path)


def test_every_tensor_is_needed(tmp_path):
    for name in ("token_embd.weight", "output_norm.weight", "blk.1.attn_v.weight"):
        raw = tensors()[0]
        del raw[name]
        with pytest.raises(BadInput, match="is missing; is the file complete"):
            load(_file(tmp_path, table=raw))
    assert "output.weight" in shapes()
