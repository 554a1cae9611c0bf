"""Describe a model, what running it takes, and the engines' tuned choices, without a run."""

from __future__ import annotations

from typing import Any

from onelaunch.checkpoints.weights import LoadedModel
from onelaunch.errors import BadInput, MissingExtra

PROMPT_TOKENS = 64


def inspect(
    loaded: LoadedModel,
    fusion_depth: str | None = None,
    training: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """A model's format, size, tokenizer and configuration; its `plan`, and that plan's launches
    where `fusion_depth` is not None; what a `training` step of so many sequences of so many tokens
    takes; the forms that were chosen for it on a GPU (`choices`), and how its weights are
    prefetched on a CPU. Raises BadInput for a depth that it does not have, or for more tokens than
    its context. A model that only the reference engine runs has no plan and no choices; raises
    BadInput where they are requested."""
    from onelaunch.plan import unplanned

    missing, extensions = unplanned(loaded.config), loaded.config.extensions
    if missing and fusion_depth is not None:
        raise BadInput(f"fusion_depth={fusion_depth!r}: plans have no stage for {missing}")
    if extensions and training is not None:
        shape = "x".join(map(str, training))
        raise BadInput(f"training={shape!r}: plans of training have no work for {extensions[0]}")
    if missing:
        return {**_facts(loaded), "plan": None, "choices": [], "prefetch": []}
    plan = _plan(loaded, fusion_depth)
    if training is not None:
        plan["training"] = _training(loaded, *training)
    return {
        **_facts(loaded),
        "plan": plan,
        "choices": _choices(loaded),
        "prefetch": _prefetch(loaded),
    }


def _plan(loaded: LoadedModel, depth: str | None) -> dict[str, Any]:
    """What a forward of one token and of a prompt takes, embedding to logits, in numbers of the
    width that the weights are stored in; and in how many launches, at each fusion depth."""
    from onelaunch.plan import describe, every_depth, launches, make_plan, parse_depth

    config = loaded.config
    if depth is not None:
        depth = str(parse_depth(depth, config.n_layers))
    itemsize = max(tensor.element_size() for tensor in loaded.weights.values())
    plans = [
        make_plan(config, sequence=tokens, weight_itemsize=itemsize, activation_itemsize=itemsize)
        for tokens in sorted({1, min(PROMPT_TOKENS, config.max_seq_len)})
    ]
    return {
        "forwards": [describe(plan, depth) for plan in plans],
        "launches": {str(d): len(launches(plans[0], d)) for d in every_depth(config.n_layers)},
        "fusion_depth": depth,
    }


def _training(loaded: LoadedModel, batch: int, sequence: int) -> dict[str, Any]:
    """A training step in bfloat16, of float32 weights."""
    from onelaunch.plan import check_training, describe_training, make_training_plan
    from onelaunch.plan.training import RECOMPUTE

    most = loaded.config.max_seq_len
    if batch < 1 or not 1 <= sequence <= most:
        raise BadInput(
            f"training='{batch}x{sequence}': a step has one sequence or more, of 1 to {most} tokens"
        )
    plans = {
        recompute: make_training_plan(loaded.config, batch, sequence, recompute=recompute)
        for recompute in RECOMPUTE
    }
    for plan in plans.values():
        check_training(plan)
    saved = {recompute: plan.saved_bytes for recompute, plan in plans.items()}
    return describe_training(plans[RECOMPUTE[0]]) | {"saved_bytes_by_recompute": saved}


def _choices(loaded: LoadedModel) -> list[dict[str, Any]]:
    """The stored choices of the CUDA engine for this model's shape, on every GPU."""
    from dataclasses import asdict

    from onelaunch.compilation.cache import Store
    from onelaunch.engines.cuda.tuning.store import kept

    return [{"of": of, **asdict(choice)} for of, choice in kept(Store(), loaded.config)]


def _prefetch(loaded: LoadedModel) -> list[dict[str, Any]]:
    """The stored choices of the CPU engine's prefetch for this model, on every processor."""
    from onelaunch.compilation.cache import Store
    from onelaunch.engines.cpu.prefetch_choice import kept

    choices = []
    for of, choice in kept(Store(), loaded.config):
        for threads, each in ((1, choice.one), (of["threads"], choice.several)):
            if each is not None:
                choices.append(
                    {
                        "threads": threads,
                        "prefetch": str(each.prefetch),
                        "gain": each.gain,
                        "dtype": of["dtype"],
                        "processor": of["processor"],
                        "measured": choice.measured,
                    }
                )
    return choices


def _facts(loaded: LoadedModel) -> dict[str, Any]:
    from onelaunch.checkpoints.tokenizers import find_tokenizer

    unusable = None
    try:
        tokenizer = find_tokenizer(loaded)
    except (BadInput, MissingExtra) as error:
        tokenizer, unusable = None, str(error)
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in loaded.weights.values()}
    return {
        "format": loaded.format,
        "parameters": loaded.config.n_params,
        "bytes": loaded.n_bytes,
        "dtype": ", ".join(sorted(dtypes)),
        "tokenizer": None
        if tokenizer is None
        else {
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "fingerprint": tokenizer.fingerprint,
        },
        "tokenizer_error": unusable,
        "bos_id": loaded.bos_id,
        "stop_ids": list(loaded.stop_ids),
        "config": loaded.config.to_dict(),
    }
