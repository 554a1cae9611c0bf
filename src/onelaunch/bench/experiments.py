"""The experiments by name. Pure data, so that listing them imports none."""

EXPERIMENTS = {
    "train": "updates of training compared with PyTorch loops, as they are and compiled",
    "time-to-quality": "seconds to a validation loss, compared with nanoGPT",
    "learning": "loss curves of the device's engine and of PyTorch, one on the other",
    "generation-speed": "the reference engine compared with a bare PyTorch loop with a KV cache",
    "generate": "the device's engine compared with PyTorch, on a CPU with llama2.c and llama.cpp",
    "serve": "a server's tokens a second and first tokens under load, compared with llama.cpp's",
    "fusion-depth": "a forward by how much one call, on a GPU one launch, holds",
    "forward": "the logits of a whole sequence on a GPU, by launches, compared with PyTorch",
    "coreml": "what making ML Programs of a model takes, and how exact they are",
    "accumulation": "what more micro-steps an update save, and what they cost in learning",
    "warm-up": "what the first micro-steps take, and from which on they take no less",
    "overlap": "what a forward takes while something is compiled at the same time",
    "step-breakdown": "where a micro-step's time goes, forward and backward, part by part",
    "stack": "accumulation, background compilation and no overhead at all, one after the other",
    "recompile": "how many micro-steps hide the compilation of an update, and what fewer wait",
    "compile-budget": "whether a process can only compile so many times, or so many layers",
    "cache": "what keeping compiled programs saves, and that no wrong one is served",
    "weight-mutability": "in which forms a program's weights can be replaced",
    "cpu-overhead": "what the host takes besides arithmetic in a step, and what a call costs",
    "parity": "how far engines, and the gradients of training, are from float64",
    "baked-or-argument": "from how many micro-steps an update weights as constants would pay",
    "terminal-io": "what a slow terminal costs a training step, with our display and without",
    "rms-norm": "RMSNorm compared with PyTorch, torch.compile, Liger and QuACK",
    "rms-norm-threshold": "from how many rows on several rows in a program pay, by width",
    "rms-norm-training": "a training step with our RMSNorm and with PyTorch's",
}

MODULES = {
    "train": "engines.train",
    "time-to-quality": "engines.time_to_quality",
    "learning": "engines.learning",
    "generation-speed": "engines.generation_speed",
    "generate": "engines.generate.experiment",
    "serve": "engines.serving",
    "fusion-depth": "studies.ane_mega_kernel.fusion_depth",
    "forward": "engines.forward.experiment",
    "coreml": "studies.ane_mega_kernel.coreml",
    "accumulation": "studies.ane_mega_kernel.accumulation",
    "warm-up": "studies.ane_mega_kernel.warm_up",
    "overlap": "studies.ane_mega_kernel.overlap",
    "step-breakdown": "studies.ane_mega_kernel.step_breakdown",
    "stack": "studies.ane_mega_kernel.stack",
    "recompile": "studies.ane_mega_kernel.recompile",
    "compile-budget": "studies.ane_mega_kernel.compile_budget.experiment",
    "cache": "studies.ane_mega_kernel.cache.experiment",
    "weight-mutability": "studies.ane_mega_kernel.weight_mutability",
    "cpu-overhead": "studies.ane_mega_kernel.cpu_overhead",
    "parity": "engines.parity",
    "baked-or-argument": "studies.ane_mega_kernel.baked_or_argument",
    "terminal-io": "studies.ane_mega_kernel.terminal_io",
    "rms-norm": "studies.block_row.rms_norm",
    "rms-norm-threshold": "studies.block_row.rms_norm_threshold",
    "rms-norm-training": "studies.block_row.rms_norm_training",
}
"""Where the module of an experiment is, from this package on."""

NOT_ON_A_GPU = {
    "coreml": "ML Programs are made and evaluated on the CPU",
    "recompile": "weights are arguments of a GPU's kernels, so an update has nothing compiled; "
    "what it packs anew is in accumulation, and the micro-steps that hide it are one",
    "baked-or-argument": "weights are arguments of a GPU's kernels; what a constant costs there is "
    "in weight-mutability",
}
"""Why an experiment has no form for a GPU."""

# Unless --device names another, these run on the GPU where there is one, the others on the CPU.
ON_THE_GPU = frozenset(
    name for name in EXPERIMENTS if name == "forward" or name.startswith("rms-norm")
)
ON_ANY_DEVICE = frozenset(("train", "learning", "generation-speed", "terminal-io")) | frozenset(
    name for name in EXPERIMENTS if name.startswith("rms-norm")
)
OF_THE_CUDA_ENGINE = frozenset(
    (
        "cache",
        "compile-budget",
        "forward",
        "fusion-depth",
        "generate",
        "overlap",
        "weight-mutability",
    )
)
"""What these measure on a GPU are the engine's own kernels."""


def devices(experiment: str) -> tuple[str, ...]:
    """The kinds of device that an experiment runs on; none where it is any."""
    if experiment in ON_ANY_DEVICE:
        return ()
    if experiment == "forward":
        return ("cuda",)
    return ("cpu",) if experiment in NOT_ON_A_GPU else ("cpu", "cuda")


def module_name(experiment: str) -> str:
    """The whole name of an experiment's module."""
    return f"onelaunch.bench.{MODULES[experiment]}"
