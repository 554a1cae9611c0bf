"""`onelaunch eval`."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Annotated

import typer

from onelaunch.cli.common import Debug, Device, Json, Quiet, load_model, progress_line, say
from onelaunch.errors import BadInput, MissingExtra

# Longer contexts are read in windows of this; the window is printed.
MAX_WINDOW = 2048
BATCH_TOKENS = 8192
# logits of a batch, 0.5 GB in float32; one window may need more
BATCH_LOGITS = 1 << 27


if TYPE_CHECKING:
    from onelaunch.checkpoints.weights import LoadedModel
    from onelaunch.training.data import TokenData


def evaluate(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A .bin file, a Hugging Face folder or a run folder."),
    ],
    data: Annotated[
        str,
        typer.Option(
            "--data", metavar="DIR", help="A folder made by `onelaunch prepare`, or: stories."
        ),
    ],
    device: Device = "auto",
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure the loss on the validation split.

    The whole split, in non-overlapping windows of the model's context, 2,048 at most.
    """
    from onelaunch.engines.reference import ReferenceEngine
    from onelaunch.training.data import open_data
    from onelaunch.training.evaluate import evaluate as evaluate_batches

    loaded = load_model(model, offers_random=False)
    tokens = open_data(data, seed=0)
    config = loaded.config
    _check_tokenizer(model, loaded, data, tokens, quiet)
    engine = ReferenceEngine(config, loaded.weights, device=device, dtype="float32")
    window = min(config.max_seq_len, MAX_WINDOW)
    batch_tokens = min(BATCH_TOKENS, BATCH_LOGITS // config.vocab_size)
    batches = tokens.eval_batches("val", window, max(1, batch_tokens // window))
    total = tokens.n_tokens("val")
    share = f" of {total:,}" if total else ""
    with progress_line(quiet) as show:
        result = evaluate_batches(
            engine, batches, progress=lambda done: show(f"{done:,}{share} tokens")
        )
    n_bytes = tokens.bytes_of("val")
    per_byte = result.loss * result.tokens / n_bytes if n_bytes else None
    if json_:
        figures = {
            "loss": result.loss,
            "perplexity": math.exp(min(result.loss, 700.0)),
            "nats_per_byte": per_byte,
            "tokens": result.tokens,
            "window": window,
            "data": tokens.label,
            "synthetic": tokens.synthetic,
        }
        print(json.dumps(figures))
        return
    print(f"validation loss {result.loss:.4f} nats per token")
    print(f"perplexity      {math.exp(min(result.loss, 700.0)):.3f}")
    if per_byte is not None:
        print(f"per byte        {per_byte:.4f} nats")
    say(
        f"{result.tokens:,} tokens of {tokens.label}, in non-overlapping windows of {window}",
        quiet,
    )


def _check_tokenizer(
    model: str, loaded: LoadedModel, data: str, tokens: TokenData, quiet: bool
) -> None:
    """Raise BadInput where the data's tokenizer is not the model's, or its ids are beyond it; say
    so where that cannot be told."""
    from onelaunch.checkpoints.tokenizer_compare import same_tokenizer
    from onelaunch.checkpoints.tokenizers import check_ids, find_tokenizer, size_note

    config, made_with = loaded.config, tokens.tokenizer
    note = size_note(made_with, config)
    try:
        own = find_tokenizer(loaded)
    except (BadInput, MissingExtra) as error:
        say(f"note: the model's tokenizer cannot be compared with the data's: {error}", quiet)
        own = None
    # one of another size than the model's, lying beside it by chance, says nothing of the data
    if own is not None and (note or not size_note(own, config)):
        if not same_tokenizer(own, made_with):
            raise BadInput(
                f"--data {data}: was made with another tokenizer than {model}'s; "
                "prepare the text with the model's own (onelaunch prepare --tokenizer)"
            )
    elif note:
        say(note.replace("the tokenizer", "the data's tokenizer"), quiet)
    check_ids(made_with, [tokens.largest_id("val")], config, f"--data {data}")
