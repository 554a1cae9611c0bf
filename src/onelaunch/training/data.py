"""Open token data for training and evaluation: the built-in stories, or a prepared folder."""

from __future__ import annotations

from pathlib import Path

from onelaunch.errors import BadInput
from onelaunch.training.batches import Batch, Sampler, TokenData
from onelaunch.training.manifest import MANIFEST_FILE
from onelaunch.training.story_data import StoryData
from onelaunch.training.token_files import FileData

__all__ = ["Batch", "Sampler", "TokenData", "open_data"]

STORIES = "stories"


def open_data(spec: str, seed: int = 0) -> TokenData:
    """Open "stories", or a folder made by `onelaunch prepare`, after a check of all its files.

    `seed` selects the train split of the stories in evaluations. Raises BadInput if the folder does
    not exist or does not match its manifest.
    """
    if spec == STORIES:
        return StoryData(seed)
    folder = Path(spec)
    if not folder.is_dir():
        raise BadInput(
            f"{spec}: no such data folder; make one with `onelaunch prepare TEXT --out DIR`, "
            f'or use "{STORIES}"'
        )
    if not (folder / MANIFEST_FILE).is_file():
        raise BadInput(
            f"{spec}: not a data folder (it has no {MANIFEST_FILE}); "
            "run `onelaunch prepare TEXT --out DIR` to make one"
        )
    return FileData(folder)
