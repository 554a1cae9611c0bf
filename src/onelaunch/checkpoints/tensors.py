"""Writing safetensors files whole: synced, readable by others, refusals told in one line."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from onelaunch.checkpoints.atomic import write_error


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors and sync them; `path` belongs into a folder of `atomic_directory`.

    Raises RunFailed where the disk is full, BadInput where the system refuses otherwise.
    """
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(ready, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # The library tells the system's refusal in words only: "... (os error 28)".
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise write_error(path, OSError(number, os.strerror(number))) from error
    with open(path, "rb+") as written:
        os.fsync(written.fileno())
    # The library leaves 0600; other files here have what the user's mask allows.
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)
