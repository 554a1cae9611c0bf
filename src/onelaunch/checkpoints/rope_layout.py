"""Convert q and k between the two rotary layouts.

Rotary embedding rotates pairs of elements of a head. "interleaved" (llama2.c) pairs (2i, 2i+1);
"half" (Hugging Face) pairs (i, i + E/2). Conversion reorders the weight rows that produce the
elements of a head; attention scores stay the same, as q and k are reordered alike.
"""

from __future__ import annotations

from torch import Tensor

from onelaunch.config import ModelConfig, RopeLayout


def to_layout(
    config: ModelConfig, weights: dict[str, Tensor], layout: RopeLayout
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Convert a model to a rotary layout.

    `weights` has canonical names; unchanged tensors are not copied. Biases of the projections and
    the weights of QK-norm, one per element of a head or of all heads, are reordered too.
    """
    if layout == config.rope_layout:
        return config, weights
    reordered = {name: tensor_to_layout(config, name, weights[name], layout) for name in weights}
    return config.with_(rope_layout=layout), reordered


def tensor_to_layout(config: ModelConfig, name: str, tensor: Tensor, layout: RopeLayout) -> Tensor:
    """Convert one tensor of a model, by its canonical name; those without heads of q and k are
    returned as they are."""
    if layout == config.rope_layout or not name.endswith(_REORDERED):
        return tensor
    return _reorder(tensor, config.head_dim, layout)


_REORDERED = tuple(
    f"self_attn.{x}_{kind}" for x in "qk" for kind in ("proj.weight", "proj.bias", "norm.weight")
)


def _reorder(tensor: Tensor, head_dim: int, layout: RopeLayout) -> Tensor:
    """Reorder the leading axis, (heads x E, ...), within each head."""
    if layout == "half":
        pairs = (head_dim // 2, 2)
    else:
        pairs = (2, head_dim // 2)
    return tensor.unflatten(0, (-1, *pairs)).transpose(1, 2).flatten(0, 2).contiguous()
