"""The model in a file whose weights a run starts from."""

from __future__ import annotations

from dataclasses import replace

import torch

from onelaunch.checkpoints import load
from onelaunch.checkpoints.tokenizers import check_ids
from onelaunch.checkpoints.weights import LoadedModel
from onelaunch.training.data import TokenData
from onelaunch.training.evaluate import check_tokenizer
from onelaunch.training.recipe import Recipe


def load_init(recipe: Recipe, data: TokenData) -> LoadedModel | None:
    """Return the model of `train.init`, in float32; None if the recipe names none.

    Raises BadInput if it cannot be read, the recipe describes another shape, or the data was
    prepared with another tokenizer.
    """
    path = recipe.train.init
    if not path:
        return None
    model = load(path)
    recipe.model_config(data.vocab_size, model.config)
    notices = list(model.notices)
    check_tokenizer(model, path, recipe.data.path, data, notices.append)
    # that looks at the ids of the validation split alone
    name = f"data={recipe.data.path!r}"
    check_ids(data.tokenizer, [data.largest_id("train")], model.config, name)
    weights = {name: tensor.to(torch.float32) for name, tensor in model.weights.items()}
    return replace(model, weights=weights, notices=tuple(notices))
