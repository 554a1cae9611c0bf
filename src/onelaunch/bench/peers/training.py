"""Training loops as a careful user writes them by hand: the trainer's model, fused AdamW with decay
groups, clipping, no telemetry, no display, batches ready in memory. Each function returns what
makes one update."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from onelaunch.model import Model, Norm, rms_norm
from onelaunch.training.loop import Trainer


def _model_and_optimizer(
    trainer: Trainer, capturable: bool = False, norm: Norm = rms_norm
) -> tuple[Model, torch.optim.Optimizer, list[tuple[torch.Tensor, ...]]]:
    """The same model, what updates it, and batches of the same kind."""
    recipe, device = trainer.recipe, trainer.device
    o = recipe.optimizer
    model = Model(trainer.engine.config, norm=norm).init_weights(0).to(device)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": o.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=o.lr, betas=(o.beta1, o.beta2), fused=True, capturable=capturable
    )
    sampler = trainer.data.train(trainer.seq_len, seed=1)
    batches = [
        tuple(torch.from_numpy(a).to(device) for a in sampler.next(recipe.train.batch_size))
        for _ in range(32)
    ]
    return model, optimizer, batches


def graphed_updates(trainer: Trainer) -> Callable[[], None]:
    """The same with the loss compiled and a whole update in one CUDA graph; the loss stays on the
    device."""
    model, optimizer, batches = _model_and_optimizer(trainer, capturable=True)
    clip, parameters = trainer.recipe.optimizer.grad_clip, list(model.parameters())
    tokens, targets = (tensor.clone() for tensor in batches[0])
    torch.compiler.reset()
    loss_of = torch.compile(model.loss, dynamic=False)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()

    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    position = 0

    def update() -> None:
        nonlocal position
        for static, batch in zip((tokens, targets), batches[position % len(batches)], strict=True):
            static.copy_(batch)
        position += 1
        graph.replay()

    return update


def bare_updates(
    trainer: Trainer,
    compiled: bool = False,
    norm: Norm = rms_norm,
    loss_of: Callable[[Model, Tensor, Tensor], Tensor] = Model.loss,
) -> Callable[[], float]:
    """A loop of the same model on the same kind of batch; each call is one update and returns its
    loss."""
    device, clip = trainer.device, trainer.recipe.optimizer.grad_clip
    model, optimizer, batches = _model_and_optimizer(trainer, norm=norm)
    parameters = list(model.parameters())
    position = 0
    # what ours computes in: bfloat16 on a GPU
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    if compiled:
        torch.compiler.reset()  # the cases before are no shapes of this one
        loss_of = torch.compile(loss_of)

    def update() -> float:
        nonlocal position
        tokens, targets = batches[position % len(batches)]
        position += 1
        with autocast:
            loss = loss_of(model, tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    return update


def liger_updates(trainer: Trainer) -> Callable[[], float]:
    """The eager loop with what Liger-Kernel has for such a model as a function: its RMSNorm, and
    the head's product fused with the cross-entropy. Raises ImportError where it is not
    installed."""
    liger: Any = importlib.import_module("liger_kernel.transformers.functional")

    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y: Tensor = liger.liger_rms_norm(x, weight, eps, in_place=False)
        return y

    def loss_of(model: Model, tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
        hidden_ND = model.hidden(tokens_BS).flatten(0, 1)
        head_VD = model.head_weight()
        half = torch.get_autocast_dtype(tokens_BS.device.type)
        loss: Tensor = liger.liger_fused_linear_cross_entropy(
            hidden_ND.to(half), head_VD.to(half), targets_BS.flatten(), ignore_index=-1
        )
        return loss

    return bare_updates(trainer, norm=norm, loss_of=loss_of)
