"""The sections of a recipe: each key with its default, meaning, unit and allowed values.

Pure data: no torch. docs/recipes.md is made from these classes by `make recipes`.
"""

from __future__ import annotations

from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeVar, get_args

from onelaunch.config import MAX_EXTENT, MAX_LAYERS, PRESETS, RopeLayout
from onelaunch.errors import BadInput

MAX_ACCUM = 1000

T = TypeVar("T")


@dataclass(frozen=True)
class Key:
    """The description of one key.

    `within` (both ends included) and `choices` are checked when a recipe is made. `allowed`
    describes checks that depend on the model, the data or the device and are made at first use.
    """

    meaning: str
    unit: str = ""
    within: tuple[float, float] | None = None
    choices: tuple[str, ...] = ()
    allowed: str = ""

    def check(self, name: str, value: Any) -> None:
        """Raise BadInput if a value is not allowed; None, for an unset key, is."""
        if value is None:
            return
        if self.within is not None:
            low, high = self.within
            if not low <= value <= high:  # nan is outside too
                raise BadInput(f"{name} = {value}: must be from {low} to {high}")
        if self.choices and value not in self.choices:
            raise BadInput(f"{name} = {value!r}: must be one of {', '.join(self.choices)}")


def key(
    default: T,
    meaning: str,
    *,
    unit: str = "",
    within: tuple[float, float] | None = None,
    choices: tuple[str, ...] = (),
    allowed: str = "",
) -> T:
    """Make a dataclass field with its description; see `Key`."""
    description = Key(meaning, unit, within, choices, allowed)
    return field(default=default, metadata={"key": description})


def described_keys(section: Any) -> list[tuple[Field[Any], Key]]:
    """List the fields of a section (class or instance) with their descriptions.

    Raises TypeError for a field that was not made by `key`.
    """
    result = []
    for each in fields(section):
        if "key" not in each.metadata:
            raise TypeError(f"{each.name} has no description: write {each.name} = key(...)")
        result.append((each, each.metadata["key"]))
    return result


@dataclass(frozen=True)
class ModelSection:
    """The shape of the model: a preset, changed by the other keys; or, without a preset, at least
    `dim`, `n_layers`, `n_heads`, `hidden_dim` and `max_seq_len`.

    Frequency scaling of the rotary embedding has no key: it comes with a preset (llama-3.2-1b).
    """

    preset: str = key(
        "",
        "The shape to start from. Empty: the other keys are the whole shape.",
        allowed=", ".join(f'`"{name}"`' for name in PRESETS),
    )
    dim: int | None = key(
        None,
        "Width of the residual stream. A multiple of `n_heads`, unless `head_dim` is set.",
        unit="elements",
        within=(1, MAX_EXTENT),
    )
    n_layers: int | None = key(None, "Transformer layers.", unit="layers", within=(1, MAX_LAYERS))
    n_heads: int | None = key(
        None,
        "Query heads of each attention. A multiple of `n_kv_heads`.",
        unit="heads",
        within=(1, MAX_EXTENT),
    )
    n_kv_heads: int | None = key(
        None,
        "Key and value heads of each attention (grouped-query attention). 0: as many as `n_heads`, "
        "which is also the default where `dim` or `n_heads` changes a preset.",
        unit="heads",
        within=(0, MAX_EXTENT),
    )
    head_dim: int | None = key(
        None,
        "Width of a head; even. 0: `dim / n_heads`, which is also the default where `dim` or "
        "`n_heads` changes a preset.",
        unit="elements",
        within=(0, MAX_EXTENT),
    )
    hidden_dim: int | None = key(
        None, "Width of the feed-forward layer (SwiGLU).", unit="elements", within=(1, MAX_EXTENT)
    )
    vocab_size: int | None = key(
        None,
        "Rows of the embedding. At least the number of ids of the data's tokenizer; more are "
        "padding.",
        unit="tokens",
        within=(1, MAX_EXTENT),
    )
    max_seq_len: int | None = key(None, "Context length.", unit="tokens", within=(1, MAX_EXTENT))
    norm_eps: float | None = key(
        None,
        "What RMSNorm adds to the mean of squares.",
        allowed="positive, finite",
    )
    rope_theta: float | None = key(
        None, "Base of the rotary embedding's frequencies.", allowed="positive, finite"
    )
    rope_layout: str | None = key(
        None,
        "Which two elements of a head rotate together: 2i and 2i + 1 (interleaved, as in llama2.c) "
        "or i and i + head_dim / 2 (half, as in Hugging Face).",
        choices=get_args(RopeLayout),
    )
    qk_norm: bool | None = key(
        None, "RMSNorm over each query and key head before the rotary embedding, as in Qwen3."
    )
    tied_embeddings: bool | None = key(
        None, "The output projection shares the weights of the token embedding."
    )


@dataclass(frozen=True)
class DataSection:
    """The tokens to train on and to evaluate on."""

    path: str = key(
        "stories",
        "A folder made by `onelaunch prepare`, relative to the working directory; or the built-in "
        "synthetic stories, which need no file.",
        allowed='`"stories"`, a folder',
    )


@dataclass(frozen=True)
class TrainSection:
    """How long a run is, what an update consists of, and what computes it.

    One update is `accum` micro-steps of `batch_size` sequences of `seq_len` tokens, and one
    optimizer step on their averaged gradient.
    """

    init: str = key(
        "",
        "The model whose weights training starts from: a llama2.c or GGUF file, a Hugging Face "
        "folder or a run folder. Its shape comes with it: [model] is empty, or equal to it. The "
        "data must be prepared with its tokenizer. Empty: random weights.",
        allowed='`""`, a file, a folder',
    )
    updates: int = key(1000, "Length of the run.", unit="updates", within=(1, 10**9))
    batch_size: int = key(32, "Sequences of one micro-step.", unit="sequences", within=(1, 10**6))
    seq_len: int = key(
        0,
        "Length of a sequence; at most the model's context. 0: the model's context.",
        unit="tokens",
        within=(0, 10**7),
    )
    accum: int = key(
        1,
        "Micro-steps of one update (gradient accumulation). Of n processes that torchrun starts, "
        "each does so many: an update has n times `accum`.",
        unit="micro-steps",
        within=(1, MAX_ACCUM),
    )
    dropout: float = key(
        0.0,
        "Probability that an element is dropped, in training only: of the embedding, of the "
        "attention weights and of both residual branches.",
        within=(0.0, 0.95),
    )
    seed: int = key(
        1337,
        "Seed of the initial weights, of the order of the batches and of dropout.",
        within=(0, 2**63 - 1),
    )
    engine: str = key(
        "auto",
        "What runs the model: PyTorch (reference); code compiled for this processor, in float32 "
        "(cpu); CUDA graphs with kernels of its own, on an NVIDIA GPU (cuda); or ML Programs for "
        "the layers and PyTorch, on the CPU in float32, for the rest (coreml, which needs "
        "`onelaunch[coreml]`). auto: cpu or cuda, by the device, where it and the other keys allow "
        "it, else reference.",
        choices=("auto", "reference", "cpu", "cuda", "coreml"),
    )
    device: str = key(
        "auto",
        "Where the model is trained. auto: the GPU where CUDA has one, else the CPU. Of several "
        "processes each has a GPU of its own.",
        allowed='`"auto"`, `"cpu"`, `"cuda"`, `"cuda:N"`, `"mps"`',
    )
    dtype: str = key(
        "auto",
        "What forward and backward compute in. Parameters and optimizer state are float32; "
        "bfloat16 is autocast. auto: bfloat16 on CUDA, float32 elsewhere.",
        choices=("auto", "float32", "bfloat16"),
    )
    norm: str = key(
        "auto",
        "Which RMSNorm is used: PyTorch's (torch), or this package's operator (onelaunch). auto: "
        "the operator on a GPU that runs its kernel and without `compile`, else PyTorch's.",
        choices=("auto", "torch", "onelaunch"),
    )
    compile: bool = key(False, "Compile forward and backward with torch.compile.")
    recompute: str = key(
        "auto",
        "With the engine cuda, what the backward computes again to keep less in memory: nothing, "
        "what the SwiGLU gives (hidden), or layers from their inputs; with these two there are "
        "fewer logits at once, too. auto: the least that the free memory of the GPU allows, which "
        "changes no bit.",
        choices=("auto", "nothing", "hidden", "layers"),
    )
    threads: int = key(
        0,
        "CPU threads of PyTorch. 0: PyTorch's own choice.",
        unit="threads",
        within=(0, 1024),
    )


@dataclass(frozen=True)
class OptimizerSection:
    """The optimizer and its learning rate, which rises linearly for `warmup` updates and then
    follows `schedule`."""

    name: str = key(
        "adamw",
        "AdamW (adamw); or Muon for the matrices of the layers and AdamW for the embedding, the "
        "head and vectors (muon). Muon's updates are scaled to the size of AdamW's, so that `lr` "
        "and `weight_decay` serve both (arXiv 2502.16982).",
        choices=("adamw", "muon"),
    )
    lr: float = key(1e-3, "Peak learning rate, before `lr_rule`.", within=(1e-12, 1e3))
    beta1: float = key(
        0.9, "AdamW's decay of the running mean of gradients.", within=(0.0, 1.0 - 1e-9)
    )
    beta2: float = key(
        0.95, "AdamW's decay of the running mean of squared gradients.", within=(0.0, 1.0 - 1e-9)
    )
    eps: float = key(1e-8, "What AdamW adds to its denominator.", within=(1e-30, 1.0))
    momentum: float = key(
        0.95, "Muon's decay of the running mean of gradients.", within=(0.0, 1.0 - 1e-9)
    )
    weight_decay: float = key(
        0.1,
        "Decoupled weight decay of matrices, the embedding included; norm weights have none.",
        within=(0.0, 100.0),
    )
    grad_clip: float = key(
        1.0,
        "Largest norm of an update's gradient; a larger one is scaled down. 0: never.",
        within=(0.0, 1e9),
    )
    warmup: int = key(100, "Length of the warm-up.", unit="updates", within=(0, 10**9))
    schedule: str = key(
        "cosine",
        "How the learning rate goes on after the warm-up: down along a cosine to the end of the "
        "run (cosine, arXiv 1608.03983), at its peak and then linearly down (wsd: warm-up, stable, "
        "decay; arXiv 2404.06395), or at its peak (constant).",
        choices=("cosine", "wsd", "constant"),
    )
    decay_fraction: float = key(
        0.2,
        "Length of the decay at the end of the run, as a fraction of `train.updates`; read with a "
        "`schedule` of wsd only.",
        within=(0.0, 1.0),
    )
    min_lr_ratio: float = key(
        0.1,
        "What cosine and wsd fall to at the end of the run, as a fraction of the peak.",
        within=(0.0, 1.0),
    )
    lr_rule: str = key(
        "none",
        "How the learning rate is scaled with accumulation: not at all (none), by "
        "`train.accum / lr_base_accum` (linear), or by the square root of that (sqrt); of n "
        "processes with n times `train.accum`.",
        choices=("none", "sqrt", "linear"),
    )
    lr_base_accum: int = key(
        10,
        "The `train.accum` at which `lr_rule` leaves `lr` as it is.",
        unit="micro-steps",
        within=(1, MAX_ACCUM),
    )


@dataclass(frozen=True)
class EvalSection:
    """Loss over the validation split during training. A checkpoint is saved before each
    evaluation."""

    every: int = key(
        200,
        "Updates between evaluations; there is always one after the last update. 0: only that.",
        unit="updates",
        within=(0, 10**9),
    )
    batches: int = key(
        20,
        "Batches of one evaluation, each of `train.batch_size` sequences, spread over the split; "
        "the same ones each time. Fewer where the split has fewer.",
        unit="batches",
        within=(1, 10**6),
    )
    sample_tokens: int = key(
        48,
        "Length of the text that is drawn from the model after each evaluation, at a temperature "
        "of 0.8 with the same random numbers each time; the display shows it. 0: none.",
        unit="tokens",
        within=(0, 10**6),
    )
    prompt: str = key(
        "",
        "What that text continues. Empty: BOS, or else EOS; without either there is no text.",
        allowed="at most as many tokens as the model's context",
    )


@dataclass(frozen=True)
class CheckpointSection:
    """When the run is saved, so that `--resume` continues exactly there. A run that is stopped by a
    signal is saved too."""

    every: int = key(
        200,
        "Updates between checkpoints; there is always one after the last update. 0: only that, and "
        "those by `minutes`.",
        unit="updates",
        within=(0, 10**9),
    )
    minutes: float = key(
        10.0,
        "Longest time between checkpoints; looked at after each micro-step.",
        unit="minutes",
        within=(0.01, 10**6),
    )
    keep: int = key(
        2,
        "Newest checkpoints that are kept. The one with the best validation loss is kept as well.",
        unit="checkpoints",
        within=(1, 10**4),
    )


@dataclass(frozen=True)
class LogSection:
    """Services that get the numbers and samples of metrics.jsonl as well. A field is named
    KIND/FIELD, such as update/loss; its step is the update. Needs `onelaunch[log]`. An error there
    is shown once and does not stop a run."""

    tensorboard: str = key(
        "",
        "A folder for the event files of TensorBoard, in a folder of the run's name, relative to "
        "the working directory. Empty: none.",
        allowed='`""`, a folder',
    )
    wandb: str = key(
        "",
        "A project of Weights & Biases, where the run has the name of its folder. WANDB_API_KEY, "
        "WANDB_MODE=offline and the other variables of wandb have an effect. Empty: none.",
        allowed='`""`, a name',
    )
    parts: int = key(
        50,
        "With the engine cuda the parts of an update's time are measured in the third update and "
        "then in each so manieth, as that takes more launches. 0: never.",
        unit="updates",
        within=(0, 10**9),
    )


@dataclass(frozen=True)
class CoreMLSection:
    """How the layers become ML Programs; read with `train.engine = "coreml"` only. Weights are
    constants of a program, so every update compiles new programs."""

    fusion_depth: str = key(
        "",
        "How much of the model one program holds: one stage, half a layer, or a number of layers. "
        "Empty: all layers. A number is a string, too: `--set 'coreml.fusion_depth=\"2\"'`.",
        allowed='`""`, `"stage"`, `"half"`, `"1"` to the number of layers',
    )
    taps: str = key(
        "full",
        "What a forward program keeps for the backward: all that it needs (full), or its inputs, "
        "from which layers are computed again (inputs; not with a `fusion_depth` of stage).",
        choices=("full", "inputs"),
    )
    staleness: int = key(
        1,
        "How many updates old the programs are that micro-steps run on. 0: each update waits for "
        "its programs; more: they are compiled in the background.",
        unit="updates",
        within=(0, 8),
    )
    dtype: str = key(
        "float16",
        "In float16 Core ML runs programs on a Mac; elsewhere, and in float32, they are evaluated.",
        choices=("float16", "float32"),
    )
    compile_budget: int = key(
        0,
        "Compilations after which the run is saved and a fresh process continues it. 0: no limit.",
        unit="compilations",
        within=(0, 10**9),
    )


_ON_CPU: dict[str, tuple[Any, ...]] = {
    "dropout": (0.0,),
    "compile": (False,),
    "device": ("auto", "cpu"),
    "dtype": ("auto", "float32"),
    "norm": ("auto", "torch"),
    "recompute": ("auto",),
}
_ON_GPU: dict[str, tuple[Any, ...]] = {
    "compile": (False,),
    "norm": ("auto", "torch"),
}
_WITH_PYTORCH: dict[str, tuple[Any, ...]] = {"recompute": ("auto",)}
TRAIN_WITH = {
    "cpu": _ON_CPU, "coreml": _ON_CPU, "cuda": _ON_GPU, "reference": _WITH_PYTORCH,
}  # fmt: skip
"""The keys of [train] that a `train.engine` restricts, and the values that it takes. With auto
another value of any of them has PyTorch train."""
