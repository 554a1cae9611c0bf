"""One thread: small tensors gain nothing from two, and lose much where another process is busy."""

import torch

torch.set_num_threads(1)
