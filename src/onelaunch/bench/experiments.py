"""The experiments by name. Pure data, so that listing them imports none."""

EXPERIMENTS = {
    "training-speed": "the trainer against a bare PyTorch loop",
    "generation-speed": "the reference engine against a bare PyTorch loop with a KV cache",
    "terminal-io": "what a slow terminal costs a training step, with our display and without",
}
