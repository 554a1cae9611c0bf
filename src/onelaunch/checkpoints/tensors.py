"""Write safetensors files: synced, with the usual permissions, and one-line errors."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from onelaunch.checkpoints.atomic import sync_file, write_error


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors and sync the file; `path` must be in a folder of `atomic_directory`.

    Raises RunFailed if the disk is full, BadInput for other errors of the system.
    """
    write_unsynced(path, tensors)
    sync_file(path)


def write_unsynced(path: Path, tensors: dict[str, Tensor]) -> None:
    """`write_tensors`, without the sync, which the caller does."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(ready, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # The library names the system's error in its text only: "... (os error 28)".
        match = re.search(r"os error (\d+)", str(error))
        number = int(match[1]) if match else errno.EIO
        raise write_error(path, OSError(number, os.strerror(number))) from error
    # The library sets mode 0600; other files have the mode of the user's umask.
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)
