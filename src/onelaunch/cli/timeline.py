"""Write the file of `--trace FILE`: the timeline of one forward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onelaunch.errors import BadInput

if TYPE_CHECKING:
    import torch

    from onelaunch.checkpoints.weights import LoadedModel

MAX_RANDOM_TOKENS, RANDOM_PROMPT = 2048, 32


def traced_device(name: str) -> torch.device:
    """The device of a name. Raises BadInput for one that cannot be traced."""
    import torch

    from onelaunch.engines.reference import resolve_device

    device = resolve_device(name)
    if device.type != "cuda" or torch.version.hip is not None:
        raise BadInput(f"--trace: device {device}: only an NVIDIA GPU is traced; leave it out")
    return device


def write_timeline(
    path: Path,
    loaded: LoadedModel,
    prompts: list[Sequence[int]],
    device: torch.device,
    dtype: str | None,
    depth: str,
) -> str:
    """Run a forward of the prompts, or without any of random tokens, as many as the context has but
    MAX_RANDOM_TOKENS at most, and write its timeline; with the depth "text" that of a token after
    the first prompt, or after RANDOM_PROMPT random tokens. Returns a summary."""
    import torch

    from onelaunch.engines.checks import check_prompts
    from onelaunch.engines.cuda.timeline import format_summary, summary
    from onelaunch.engines.cuda.trace import trace, write
    from onelaunch.engines.reference import resolve_dtype

    config = loaded.config
    if depth == "text":
        return _write_token(path, loaded, prompts, device, resolve_dtype(dtype, device))
    if prompts:
        check_prompts(config, prompts)
        longest = max(map(len, prompts))
        tokens = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in prompts])
    else:
        generator = torch.Generator().manual_seed(0)
        size = 1, min(config.max_seq_len, MAX_RANDOM_TOKENS)
        tokens = torch.randint(config.vocab_size, size, generator=generator)
    timeline = trace(
        config,
        loaded.weights,
        tokens,
        resolve_dtype(dtype, device),
        device,
        "all" if depth == "auto" else depth,
    )
    batch, sequence = tokens.shape
    name = f"forward of {batch}x{sequence} tokens, launches: {len(timeline.launches)}"
    write(timeline, path, name)
    return f"{path}: {name}\n{format_summary(summary(timeline))}"


def _write_token(
    path: Path,
    loaded: LoadedModel,
    prompts: list[Sequence[int]],
    device: torch.device,
    dtype: torch.dtype,
) -> str:
    import torch

    from onelaunch.engines.checks import check_prompts
    from onelaunch.engines.cuda.decoding.text_trace import format_token, trace_text, write_token

    config = loaded.config
    if prompts:
        check_prompts(config, prompts)
        prompt = list(prompts[0])
    else:
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(config.vocab_size, (RANDOM_PROMPT,), generator=generator).tolist()
    spans = trace_text(config, loaded.weights, prompt, dtype, device)
    name = f"a token after {len(prompt)} and some, in one launch for all of them"
    write_token(spans, path, name)
    return f"{path}: {name}\n{format_token(spans)}"
