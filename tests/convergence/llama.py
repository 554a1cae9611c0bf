"""Train a small Llama with two norms, and compare the losses.

All runs of a size have the same data, initial weights and settings; only the function that computes
their norms differs. The result of a run is its loss at each update.

float32: every loss equals that of the run with PyTorch's norm within a relative 1e-5.

bfloat16: the loss of a plain run is uncertain itself. `PLAIN_RUNS` runs with PyTorch's norm, whose
initial weights differ by one unit in the last place of float32, measure by how much: the distance
of a run is the root mean square, over its updates, of its loss minus the mean loss of the (other)
plain runs. The distance of the operator must not exceed the mean distance of the plain runs plus
three standard deviations.

Under autocast the residual stream is float32, and only the norms of queries and keys get bfloat16.
So a third kind of run, `bfloat16 weights`, has the whole model in bfloat16, without autocast: the
input and weight of every norm are then bfloat16. Its plain runs differ by one unit in the last
place of bfloat16 in one initial weight of 256.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onelaunch.config import ModelConfig
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.model import Model, Norm
from onelaunch.training.data import open_data
from onelaunch.training.optim import make_optimizer
from onelaunch.training.recipe import Recipe

TOLERANCE = 1e-5
PLAIN_RUNS = 8
HELD = "bfloat16-weights"
SEED = 11
GQA = {"n_layers": 4, "vocab_size": 512, "tied_embeddings": True}


@dataclass(frozen=True)
class Size:
    """The shape of a model and its training: `batch` sequences of the length of its context."""

    config: ModelConfig
    batch: int
    updates: int = 100

    def with_qk_norm(self) -> Size:
        """Return this size with QK-norm."""
        return Size(self.config.with_(qk_norm=True), self.batch, self.updates)


# For a GPU: 4,096 rows of 256, and 32,768 and 8,192 rows of 32 where queries and keys are normed.
LARGE = Size(
    ModelConfig(dim=256, n_heads=8, n_kv_heads=2, hidden_dim=688, max_seq_len=128, **GQA), batch=32
)
# For a CPU.
SMALL = Size(
    ModelConfig(dim=64, n_heads=8, n_kv_heads=2, hidden_dim=176, max_seq_len=32, **GQA), batch=4
)
# For Triton's interpreter, where a tile of 64 x 16 takes 60 ms backward: two tiles, one not full,
# and widths that are no powers of two.
TINY = Size(
    ModelConfig(dim=12, n_heads=4, n_kv_heads=2, head_dim=6, hidden_dim=24, max_seq_len=8, **GQA),
    batch=9,
)


def losses(
    size: Size,
    norm: str | Norm,
    device: str = "cpu",
    dtype: str = "float32",
    noise: int = 0,
    make_engine: Callable[[ModelConfig, dict[str, Tensor]], ReferenceEngine] | None = None,
) -> Tensor:
    """The loss at every update, (updates,) in float64; of the reference engine, or of another one,
    which has a norm and a dtype of its own.

    `norm` is one of `engines.norm.NORMS`, or a function in its place; `dtype` float32, bfloat16
    (autocast) or `HELD`. Each `noise` but 0 moves the initial weights by one unit in the last
    place, up or down by its own draw.
    """
    name = norm if isinstance(norm, str) else "torch"
    weights = dict(Model(size.config).init_weights(SEED).state_dict())
    if noise:
        weights = {key: _moved(weight, noise, dtype == HELD) for key, weight in weights.items()}
    autocast = "float32" if dtype == HELD else dtype
    if make_engine is not None:
        engine = make_engine(size.config, weights)
    else:
        engine = ReferenceEngine(
            size.config, weights, device=device, dtype=autocast, train=True, norm=name
        )
    if not isinstance(norm, str):
        engine.model.norm_function = norm
    if dtype == HELD:
        engine.model.bfloat16()
    settings = {"optimizer.lr": 1e-3, "optimizer.warmup": 10, "train.updates": size.updates}
    recipe = Recipe().with_settings(settings, "convergence")
    optimizer = make_optimizer(engine.parameters(), recipe)
    sampler = open_data("stories", SEED).train(size.config.max_seq_len, SEED)
    result = []
    for update in range(size.updates):
        tokens_BS, targets_BS = (torch.from_numpy(ids) for ids in sampler.next(size.batch))
        result.append(engine.train_step(tokens_BS, targets_BS))
        torch.nn.utils.clip_grad_norm_(engine.parameters().values(), recipe.optimizer.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate(update)
        optimizer.step()
        optimizer.zero_grad()
        engine.after_update()
    return torch.stack(result).double().cpu()


def _moved(weight: Tensor, seed: int, held: bool) -> Tensor:
    """Every element's neighbour in float32, above or below; or one's of 256 in bfloat16."""
    draw = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed))
    if held:
        narrow = weight.bfloat16()
        return torch.where(draw < 1 / 256, (narrow * (1 + 2**-7)).to(narrow.dtype), narrow).float()
    return torch.nextafter(weight, torch.where(draw < 0.5, torch.inf, -torch.inf))


def relative_difference(a: Tensor, b: Tensor) -> Tensor:
    """|a - b| / |b| at every update."""
    return (a - b).abs() / b.abs()


def distance(run: Tensor, others: Sequence[Tensor]) -> float:
    """Root mean square, over the updates, of a run's loss minus the mean of the others'."""
    return (run - torch.stack(list(others)).mean(0)).square().mean().sqrt().item()


def plain_distances(plain: Sequence[Tensor]) -> Tensor:
    """Each plain run's distance from the other plain runs."""
    others = [[b for b in plain if b is not a] for a in plain]
    return torch.tensor([distance(a, rest) for a, rest in zip(plain, others, strict=True)])


def limit(plain: Sequence[Tensor]) -> float:
    """The largest distance from the plain runs that is still within their spread."""
    distances = plain_distances(plain)
    return (distances.mean() + 3 * distances.std()).item()
