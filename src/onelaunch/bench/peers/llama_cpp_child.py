"""llama.cpp on one model, run by a Python that has xllamacpp and gguf; nothing of onelaunch is
imported here, so that it need not be installed there.

Run as `PYTHON llama_cpp_child.py MODEL.npz GGUF DTYPE THREADS`. MODEL.npz has the weights in
float32 by their canonical names, and the configuration as JSON. It prints "ready", then answers
each line {"prompt": ids, "n": tokens} with {"rate": tokens per second, "ids": new ids}, or with
{"error": why}.
"""

from __future__ import annotations

import json
import os
import re
import sys

import gguf  # type: ignore[import-not-found, unused-ignore]
import numpy as np
import xllamacpp  # type: ignore[import-not-found, unused-ignore]

SPECIAL = ("<unk>", "<s>", "</s>")
BOS, EOS = 1, 2
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_PIECES = re.compile("t([0-9]+)")


def gguf_name(name: str) -> str:
    """A tensor's name in a GGUF file."""
    whole = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in whole:
        return f"{whole[stem]}.weight"
    _, layer, rest = stem.split(".", 2)
    return f"blk.{layer}.{LAYER[rest]}.weight"


def write_gguf(model: str, path: str, dtype: str) -> dict[str, int]:
    """Write the model as a GGUF file, matrices in `dtype`, norms in float32; its configuration."""
    with np.load(model) as stored:
        weights = {name: stored[name] for name in stored.files if name != "config"}
        config = json.loads(str(stored["config"]))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_seq_len"])
    writer.add_embedding_length(config["dim"])
    writer.add_block_count(config["n_layers"])
    writer.add_feed_forward_length(config["hidden_dim"])
    writer.add_head_count(config["n_heads"])
    writer.add_head_count_kv(config["n_kv_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    bfloat16 = dtype == "bfloat16"
    kinds = gguf.LlamaFileType
    writer.add_file_type(kinds.MOSTLY_BF16 if bfloat16 else kinds.ALL_F32)
    _add_tokenizer(writer, config["vocab_size"])
    for name, weight in weights.items():
        if bfloat16 and weight.ndim == 2:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return config


def _add_tokenizer(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    """One whose pieces are the ids themselves: what llama.cpp writes shows which tokens it drew.
    Prompts are ids."""
    types = gguf.TokenType
    tokens = [*SPECIAL, *(f"t{i}" for i in range(len(SPECIAL), vocab_size))]
    kinds = [types.UNKNOWN, types.CONTROL, types.CONTROL]
    kinds += [types.NORMAL] * (vocab_size - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_token_list([token.encode("ascii") for token in tokens])
    writer.add_token_scores([0.0] * vocab_size)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)


def serve(path: str, threads: int, context: int) -> xllamacpp.Server:
    """The model in llama.cpp's server, without its network."""
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = context
    params.n_parallel = 1
    params.warmup = True
    params.verbosity = 0
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    return xllamacpp.Server(params)


def generate(server: xllamacpp.Server, prompt: list[int], n: int) -> dict[str, object]:
    """Greedy; the rate is of every token but the first, whose time is the prompt's."""
    answer = server.handle_completions(
        {
            "prompt": prompt,
            "n_predict": n,
            "temperature": 0.0,
            "samplers": ["top_k"],
            "top_k": 1,
            "ignore_eos": True,
            "cache_prompt": False,
        }
    )
    timings = answer.get("timings")
    if timings is None or timings["predicted_n"] != n:
        return {"error": f"not {n} tokens: {answer.get('error', timings)}"[:200]}
    # its clock starts with the first token
    rate = (n - 1) / (timings["predicted_ms"] / 1e3)
    return {"rate": rate, "ids": [int(i) for i in _PIECES.findall(answer["choices"][0]["text"])]}


def main() -> None:
    """Serve lines until they end."""
    model, path, dtype, threads = sys.argv[1:]
    # what llama.cpp prints goes to standard error
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    config = write_gguf(model, path, dtype)
    server = serve(path, int(threads), config["max_seq_len"])
    print("ready", file=out)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = generate(server, request["prompt"], request["n"])
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:200]}
        print(json.dumps(answer), file=out)


if __name__ == "__main__":
    main()
